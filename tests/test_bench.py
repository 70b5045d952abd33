"""kernels/bench.py: a run without a GPU, whatever goes wrong in one, and the table that backend "auto" goes by."""

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels.bench as bench_file
from kernels import backend as backend_file
from kernels import krr_predict
from kernels.barlow import barlow_loss
from kernels.bench import RESTART, SECTIONS, Bench, compare, new_report, run_sections, spread, tables
from kernels.bn_stats import bn_stats
from kernels.nearest import nearest

gram_file = importlib.import_module("kernels.gram")  # the package exports a function of this name
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the kernels
F32, F64 = torch.float32, torch.float64
NAMES = [name for name, _, _ in SECTIONS]


@pytest.fixture(autouse=True)
def small_and_repeatable(monkeypatch):
    """Most of it on the CPU also where there is a GPU: what is tested is the program around the measurements."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bench_file.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    gc.freeze()  # as a worker does, or the collections before each comparison take most of the time
    yield
    gc.enable()  # a worker turned it off
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def bench(tmp_path):
    return Bench(CPU, tmp_path / "cpu.json", new_report(CPU), time.time(), 1000.0)


@pytest.fixture
def gpu(bench, monkeypatch):
    """The same run, believing that it is on a GPU."""
    monkeypatch.setattr(Bench, "cuda", True)
    monkeypatch.setattr(Bench, "synchronize", lambda self: None)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 0)
    monkeypatch.setattr(bench_file, "by_events", lambda calls: [70.0, 80.0, 90.0])
    monkeypatch.setattr(bench_file, "by_graph", lambda graph, count: [20.0, 30.0, 40.0])
    monkeypatch.setattr(bench_file, "capture", lambda calls, count: "graph")
    bench.report["meaningless"] = False
    return bench


def open_section(bench, name="gram"):
    bench.section = name
    bench.report["sections"].setdefault(name, {"status": "running", "seconds": 0.0, "skipped": [], "rows": []})


def on_disk(bench):
    return json.loads(bench.path.read_text())


def fake_times(monkeypatch, times):
    """Rows of times(variant) µs instead of measurements."""
    real = bench_file.attempt

    def attempt(bench, size, variant, work, **known):
        if variant == "inputs" or known:
            return real(bench, size, variant, work, **known)
        t = times(variant)
        row = {
            "size": size,
            "variant": variant,
            "p20": t,
            "p50": t,
            "p80": t,
            "again": t,
            "how": "graph",
            "peak_mb": 1.0,
        }
        bench.rows.append(row)
        return row

    monkeypatch.setattr(bench_file, "attempt", attempt)


# ---------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_every_section_runs_without_a_gpu(bench, capsys):
    run_sections(bench, SECTIONS)
    report = bench.report
    assert report == on_disk(bench)
    assert {name: section["status"] for name, section in report["sections"].items()} == dict.fromkeys(NAMES, "done")
    assert report["failed"] == []
    assert report["meaningless"] is True and report["auto"] == []
    for name, section in report["sections"].items():
        for row in section["rows"] if name != "correctness" else ():
            assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["how"] == "host", row
    if "triton" in bench.backends:
        assert len(report["sections"]["correctness"]["rows"]) == 35
        pairs = [(op, p) for op in ("gram", "gram_xy", "gram_pair") for p in ("fp64", "fp32", "ieee")]
        pairs += [(op, p) for op in ("factor", "solve", "nearest", "krr", "bn_stats") for p in ("fp64", "fp32")]
        assert all(bench_file.trusted(report, op, p) for op, p in pairs)
    for row in report["sections"]["krr"]["rows"]:  # the same result in all ways, to float32 rounding
        assert row["variant"] == "forward" or row["off"] < 1e-4
    assert "the times mean nothing" in tables(report)


@pytest.mark.slow
def test_the_command(tmp_path):
    """With a budget that is too short for the imports: a valid file all the same, and what was left out is in it."""
    command = [sys.executable, "-m", "kernels.bench", "--budget", "2", "--out", str(tmp_path)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = Path(bench_file.__file__).parent.parent
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("No CUDA device: tiny sizes, and the times mean nothing.")
    assert os.listdir(tmp_path) == ["cpu.json"]  # no marker, no temporary file
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert list(report["sections"]) == NAMES
    assert report["meaningless"] is True and report["auto"] == [] and report["failed"] == []
    assert report["sections"]["krr"]["status"] == "done but for 1 sizes"
    assert report["sections"]["krr"]["skipped"] == ["tiny m5 n4 d9 c3"]
    assert run.stdout.endswith(tables(report, complete=False) + "\n")


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_section_that_raises_ends_alone_and_each_section_is_saved(bench):
    seen = {}

    def broken(bench):
        raise ValueError("no such kernel\nat all")

    def after(bench):
        seen.update(on_disk(bench))

    def killed(bench):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sections(bench, [("a", 1, broken), ("b", 1, after), ("c", 1, killed)])
    assert seen["sections"]["a"]["status"] == "error: ValueError: no such kernel"
    assert seen["failed"] == [{"where": "a", "error": "ValueError: no such kernel"}]
    assert on_disk(bench)["sections"]["b"]["status"] == "done"
    assert os.listdir(bench.path.parent) == ["cpu.json"]


def test_a_variant_that_raises_is_an_error_in_its_row_only(bench):
    open_section(bench)
    compare(bench, dict(n=3), lambda bench, n: {"good": lambda: n, "bad": lambda: 1 / 0, "last": lambda: n})
    compare(bench, dict(n=4), lambda bench, n: 1 / 0)
    good, bad, last, inputs = bench.rows
    assert good["p50"] > 0 and last["p50"] > 0
    assert bad["error"] == inputs["error"] == "ZeroDivisionError: division by zero"
    assert [failed["where"] for failed in bench.report["failed"]] == ["gram, n3, bad", "gram, n4, inputs"]


def test_nothing_starts_after_the_deadline(bench):
    bench.start -= 2000
    run_sections(bench, SECTIONS)
    assert all(section["rows"] == [] for section in bench.report["sections"].values())
    assert bench.report["sections"]["gram"]["skipped"] == ["m7 n5 d20"]
    assert bench.report["sections"]["gram"]["status"] == "done but for 1 sizes"
    assert on_disk(bench) == bench.report


def test_a_section_stops_at_its_own_share_of_the_budget(bench):
    bench.start -= 500  # half the budget is gone
    ran = []
    make = lambda bench, n: ran.append(bench.section) or {"one": lambda: None}  # noqa: E731
    section = lambda bench: compare(bench, dict(n=1), make)  # noqa: E731
    run_sections(bench, [("early", 0.4, section), ("later", 0.6, section)])
    assert set(ran) == {"later"}


def test_a_worker_goes_on_where_one_died(bench, monkeypatch):
    calls, made = [], []

    def make(bench, n):
        made.append(n)
        return {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}

    def dies(bench, n):
        return make(bench, n) | {"b": lambda: sys.exit(139)}

    done = ("before", 1, lambda bench: compare(bench, dict(n=1), make))
    monkeypatch.setattr(bench_file, "SECTIONS", [done, ("now", 1, lambda bench: compare(bench, dict(n=2), dies))])
    bench.save()
    with pytest.raises(SystemExit):
        bench_file.work(bench)
    calls.clear(), made.clear()
    monkeypatch.setattr(bench_file, "SECTIONS", [done, ("now", 1, lambda bench: compare(bench, dict(n=2), make))])
    fresh = Bench(CPU, bench.path, {}, bench.start, bench.budget)
    bench_file.work(fresh)
    assert {row["variant"]: row.get("error") for row in on_disk(bench)["sections"]["now"]["rows"]} == {
        "a": None, "b": "the process died", "c": None,
    }  # fmt: skip
    assert set(calls) == {"a", "c"} and set(made) == {2}  # and nothing of the section that was done
    assert not bench.marker.exists()


def test_the_parent_compiles_ahead_and_starts_workers_until_one_is_done(gpu, monkeypatch):
    started, killed, ends = [], [], iter([RESTART, -11, 0])

    def popen(command, **how):
        def wait(seconds):
            assert 0 < seconds <= gpu.budget + 15
            if "--share" not in command:
                return next(ends)
            raise subprocess.TimeoutExpired(command, seconds)  # compiles too slowly

        started.append(command[command.index("--share") :] if "--share" in command else "worker")
        return SimpleNamespace(wait=wait, kill=lambda: killed.append(started[-1]))

    monkeypatch.setattr(bench_file.subprocess, "Popen", popen)
    monkeypatch.setattr(bench_file.os, "cpu_count", lambda: 4)
    bench_file.supervise(gpu)
    assert started == [["--share", str(i), "3"] for i in range(3)] + ["worker"] * 3
    assert len(killed) == 3


# ----------------------------------------------------------------------------------------------- the ways of measuring


def test_short_calls_are_timed_in_a_graph_and_long_ones_by_events(gpu, monkeypatch):
    open_section(gpu)
    compare(gpu, dict(n=1), lambda bench, n: {"one": lambda: None}, graphs=["one"])
    monkeypatch.setattr(bench_file, "by_graph", lambda graph, count: [51.0, 51.0, 51.0])
    compare(gpu, dict(n=2), lambda bench, n: {"one": lambda: None}, graphs=["one"])
    rows = [(row["size"]["n"], row["variant"], row["how"], row["p50"]) for row in gpu.rows]
    assert rows == [(1, "one", "graph", 30), (1, "one, graph", "graph", 30), (2, "one", "events", 80),
                    (2, "one, graph", "graph", 51)]  # fmt: skip


def test_what_cannot_be_captured_costs_one_worker_and_is_not_tried_again(gpu, monkeypatch):
    def capture(calls, count):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(bench_file, "capture", capture)
    make = lambda bench, b: {"cholesky_ex fp64": lambda: None, "cholesky_ex, checked fp32": lambda: None}  # noqa: E731
    open_section(gpu, "factor")
    with pytest.raises(SystemExit) as left:
        compare(gpu, dict(b=1), make)
    assert left.value.code == RESTART and not gpu.marker.exists()
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert on_disk(gpu)["captures"] == {"factor: cholesky_ex": reason}
    compare(gpu, dict(b=1), make, graphs=["cholesky_ex fp64"])
    assert [row.get("how") for row in gpu.rows] == ["events", None, "events"]
    assert reason in gpu.rows[1]["error"]
    with pytest.raises(SystemExit):
        compare(gpu, dict(b=2), make)  # other code of the library, which may well be captured


def test_a_lost_context_ends_the_worker_with_the_row_on_disk(gpu, monkeypatch):
    def lost(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def call():
        monkeypatch.setattr(Bench, "synchronize", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    open_section(gpu)
    with pytest.raises(SystemExit) as left:
        compare(gpu, dict(n=1), lambda bench, n: {"bad": call})
    assert left.value.code == RESTART and not gpu.marker.exists()
    assert "illegal memory access" in on_disk(gpu)["sections"]["gram"]["rows"][-1]["error"]


def test_the_shares_call_everything_once_and_write_nothing(bench):
    called = []
    make = lambda bench, n: {name: lambda name=name: called.append(name) for name in "abcde"}  # noqa: E731
    for i in range(3):
        bench.share, bench.turn = (i, 3), 0
        open_section(bench)
        compare(bench, dict(n=1), lambda bench, n: {"broken": lambda: 1 / 0} | make(bench, n))
        draw = lambda i=i: called.append(f"draw {i}") or (1,)  # noqa: E731
        bench_file.check(bench, "gram", "fp64", {}, draw, lambda x: called.append("kernel"), None, 0.0)
        bench.save()
    assert sorted(called) == ["a", "b", "c", "d", "draw 1", "e", "kernel"]
    assert bench.rows == [] and os.listdir(bench.path.parent) == []


def test_no_error_hides_a_nan():
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert bench_file.relative([one, one * 3], [one, one]) == 2
    assert str(bench_file.number(bench_file.relative([nan, one], [one, one]))) == "nan"
    assert str(bench_file.number(bench_file.relative([one * 3, nan], [one, one]))) == "nan"
    assert bench_file.cell({"off": "nan"}, "off") == "nan"


def test_quantiles():
    assert spread([float(i) for i in (11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6)]) == pytest.approx([3, 6, 9])


# --------------------------------------------------------------------------------------------- never to a wrong kernel


def check_products(bench):
    for precision in ("fp64", "fp32"):
        for m in (5, 6):
            bench_file.check_gram(bench, precision, F32, b=1, m=m, n=4, d=20, pad=0)


def rows_for_auto(bench, monkeypatch):
    """(op, precision) of the rows that "auto" gets where ours was measured twice as fast everywhere."""
    bench.report["meaningless"] = False
    fake_times(monkeypatch, lambda variant: 10.0 if "triton" in variant else 20.0)
    open_section(bench)
    auto = [(op, p, dict(n=1), "torch", "triton") for op in ("gram", "gram_xy", "solve") for p in ("fp64", "fp32")]
    compare(bench, dict(n=1), lambda bench, n: {"torch": lambda: None, "triton": lambda: None}, auto=auto)
    return [(row["op"], row["precision"]) for row in bench.report["auto"]]


def rounded(k):
    return k.to(torch.bfloat16).to(k.dtype)


def unwritten(k):
    """The last entry is what the memory held: by chance the right number, unless the memory was poisoned."""
    held = k.new_empty(())
    return torch.cat([k.flatten()[:-1], torch.where(held.isnan(), held, k.flatten()[-1])[None]]).view(k.shape)


def never_the_same(k):
    return k * (1 + 1e-14 * torch.rand(1, dtype=k.dtype, device=k.device))


@pytest.mark.parametrize("harm", [rounded, unwritten, never_the_same])
def test_a_wrong_kernel_gets_no_row(bench, monkeypatch, harm):
    real = gram_file.launch

    def launch(f_s, f_t, *, mode, **how):
        k_ss, k_ts = real(f_s, f_t, mode=mode, **how)
        return k_ss, (harm(k_ts) if k_ts is not None and mode == "fp64" and k_ts.shape[-1] == 5 else k_ts)

    bench.device = DEVICE
    monkeypatch.setattr(gram_file, "launch", launch)
    open_section(bench, "correctness")
    check_products(bench)
    wrong = {(row["op"], row["precision"]): row["off"] for row in bench.rows if not row["ok"]}
    assert set(wrong) == {("gram_xy", "fp64"), ("gram_pair", "fp64")}
    assert (wrong["gram_xy", "fp64"] == "nan") == (harm is unwritten)
    text = tables(bench.report)
    assert "- WRONG: gram_xy fp64 at b1 n4 m5 d20 float32: off by " in text
    assert (text.count(", other bits the second time") == 2) == (harm is not rounded)
    assert rows_for_auto(bench, monkeypatch) == [("gram", "fp64"), ("gram", "fp32"), ("gram_xy", "fp32")]


def test_a_check_that_raises_or_dies_is_a_wrong_kernel(bench, monkeypatch):
    def launch(f_s, f_t, *, mode, **how):
        raise RuntimeError("out of resources: shared memory")

    monkeypatch.setattr(gram_file, "launch", launch)
    open_section(bench, "correctness")
    check_products(bench)
    assert len(bench.report["failed"]) == 12
    assert rows_for_auto(bench, monkeypatch) == []
    marked = {"size": {}, "variant": "solve fp64", "op": "solve", "precision": "fp64", "ok": False}
    bench.section = "correctness"
    bench_file.fail(bench, marked, "the process died")  # as `work` does with the row of the marker
    assert not bench_file.trusted(bench.report, "solve", "fp64")


# -------------------------------------------------------------------------------------------- what backend "auto" reads


@pytest.fixture
def spied(monkeypatch):
    """(op, precision, size) of all that asks `use_triton`."""
    seen = []
    for name in ("gram", "solve", "nearest", "barlow", "bn_stats"):
        module = importlib.import_module(f"kernels.{name}")
        real = module.use_triton

        def spy(op, backend, precision, device, real=real, **size):
            seen.append((op, precision, size))
            return real(op, backend, precision, device, **size)

        monkeypatch.setattr(module, "use_triton", spy)
    return seen


def test_each_row_has_the_key_of_the_call_that_was_timed(bench, monkeypatch, spied):
    groups = []
    monkeypatch.setattr(
        bench_file, "compare", lambda bench, size, make, auto=(), **how: groups.append((size, make, auto))
    )
    for name, _, section in SECTIONS:
        if name not in ("ceilings", "correctness", "sweep"):
            open_section(bench, name)
            section(bench)
    checked = set()
    for size, make, auto in groups:
        calls = make(bench, **size)
        for op, precision, at, theirs, ours in auto:
            asked = []
            for name in (theirs, ours):
                spied.clear()
                calls.get(name, lambda: None)()
                asked += spied[:1]  # what decides about this call; others may follow inside
            if precision == "ieee" and ours not in calls:
                precision = "fp32"  # the same on torch, and there are no kernels here
            assert (op, precision, at) in asked
            checked.add(op)
    assert checked == {"gram", "gram_xy", "gram_pair", "factor", "solve", "nearest", "bn_stats"}


@pytest.fixture
def report_of_a_gpu(gpu, monkeypatch):
    """All sections of times with the sizes of a GPU, on tensors without data; ours wins in fp64 only."""
    gpu.device = torch.device("meta")
    fake_times(monkeypatch, lambda variant: 20.0 if "fp64" in variant and ("ours" in variant or "triton" in variant)
               else 40.0 if "ours" in variant or "triton" in variant else 30.0)  # fmt: skip
    real = bench_file.compare
    monkeypatch.setattr(bench_file, "compare", lambda *args, exact="", **how: real(*args, **how))
    monkeypatch.setattr(bench_file, "input_sets", lambda bench, make: [make()])
    monkeypatch.setattr(bench_file, "launch_pack", lambda factor: factor)
    monkeypatch.setattr(bench_file, "trusted", lambda *args: True)
    run_sections(gpu, [section for section in SECTIONS if section[0] != "correctness"])
    return gpu.report


def test_the_rows_decide_every_question_that_the_ops_ask(report_of_a_gpu, monkeypatch, spied, tmp_path):
    assert report_of_a_gpu["failed"] == []
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "h100.json").write_text(json.dumps(report_of_a_gpu))
    monkeypatch.setattr(backend_file, "RESULTS", tmp_path / "results")
    backend_file.table.cache_clear()
    backend_file.measured_faster.cache_clear()
    f_t, f_s, wide, y_s = torch.randn(5, 20), torch.randn(9, 20), torch.randn(30, 20), torch.randn(9, 3)
    for precision in ("fp64", "fp32", "ieee"):
        krr_predict(f_t, f_s, y_s, 0.1, precision=precision)
        krr_predict(f_t, f_s, torch.randn(9, 40), 0.1, precision=precision)
        krr_predict(f_t, wide, torch.randn(30, 2), 0.1, precision=precision)
        gram_file.gram(f_t, f_s, precision=precision)
    nearest(f_s), nearest(f_s.double())
    barlow_loss(f_s, f_s + 1, 0.1)
    for x in (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, dtype=F64).to(memory_format=torch.channels_last)):
        bn_stats(x, None, None, torch.zeros(3), torch.ones(3), 0.1)
    assert {op for op, _, _ in spied} == {"gram", "gram_xy", "gram_pair", "factor", "solve", "nearest", "bn_stats"}
    try:
        for op, precision, size in spied:
            faster = backend_file.measured_faster("h100", op, precision, tuple(sorted(size.items())))
            assert faster == (precision == "fp64"), (op, precision, size)  # 20 µs for 30, and 40 for 30
    finally:
        backend_file.table.cache_clear()
        backend_file.measured_faster.cache_clear()


def test_both_of_a_pair_are_timed_in_one_way_and_the_better_of_two_times_counts(gpu, monkeypatch):
    monkeypatch.setattr(bench_file, "trusted", lambda *args: True)
    open_section(gpu)
    make = lambda bench, n: {"torch": lambda: None, "ours": lambda: None}  # noqa: E731
    row = {"size": dict(n=1), "p20": 1.0, "p80": 1.0}
    gpu.rows.append(row | {"variant": "torch", "p50": 12.0, "again": 11.0, "how": "graph"})
    gpu.rows.append(row | {"variant": "ours", "p50": 6.0, "again": 7.0, "how": "graph"})
    gpu.rows.append({"size": dict(n=1), "variant": "broken", "error": "no"})
    names = {9: "ours", 8: "missing", 7: "broken"}
    auto = [("gram", "fp64", dict(n=n), "torch", name) for n, name in names.items()]
    compare(gpu, dict(n=1), make, auto=auto)
    compare(gpu, dict(n=1), make, auto=auto)  # again, as after a restart
    expected = {"op": "gram", "precision": "fp64", "size": {"n": 9}, "torch_us": 11.0, "triton_us": 6.0}
    assert gpu.report["auto"] == [expected]
    gpu.rows[0]["how"] = "events"
    compare(gpu, dict(n=1), make, auto=auto)
    assert gpu.report["auto"] == [expected | {"torch_us": 80.0, "triton_us": 80.0}]


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_of_a_gpu(report_of_a_gpu, tmp_path, monkeypatch, capsys):
    report = report_of_a_gpu | {"gpu": "NVIDIA H100", "date": "2026-11-21", "ceilings": {"copy GB/s": 3000.0}}
    short = tables(report, complete=False)
    assert len(short) < 9_500  # a lent machine shows 12,000; there may be 16 errors of 120, and longer numbers
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["bench", "--table", str(path)])
    bench_file.main()
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == tables(report)
    assert f"NVIDIA H100, torch {torch.__version__}, " in printed and ", 2026-11-21, " in printed
    assert "Ceilings: copy GB/s 3000.0" in printed
    assert "| factor fp64 | b1 m100 | 30.0 | 20.0 | 1.50 |" in printed
    assert "| factor fp32 | b1 m100 | 30.0 | 40.0 | 0.75 |" in printed  # losses too
    assert {line for line in short.split("\n") if line.startswith("| ")} <= set(printed.split("\n"))  # none cut off
    assert "| b20 m1000 c512 | 30 |" in printed and "b20 m1000 c512" not in short
    assert "- solve fp64: 1.50 to 1.50, ours at 90 of 90 sizes" in short
    assert "- solve fp32: 0.75 to 0.75, ours at 0 of 90 sizes" in short


def test_a_pivot():
    rows = [{"size": dict(n=1), "variant": "a", "p50": 1.2345}, {"size": dict(n=1), "variant": "b", "p50": 1234.5},
            {"size": dict(n=2), "variant": "a", "error": "no"}]  # fmt: skip
    table = ["", "|  | n1 | n2 |", "| --- | ---: | ---: |", "| a | 1.23 | error |", "| b | 1234 |  |"]
    assert bench_file.pivot(rows) == table
    more = [{"size": dict(n=n), "variant": "a", "p50": 1.0} for n in (3, 4)]
    assert bench_file.pivot(rows + more)[1:4] == ["|  | a | b |", "| --- | ---: | ---: |", "| n1 | 1.23 | 1234 |"]
