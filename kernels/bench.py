"""Times the kernels against torch on this machine, and writes the table that backend "auto" goes by.

    python -m kernels.bench --budget 480 --out DIR             # writes DIR/<class of GPU>.json and prints tables
    python -m kernels.bench --table kernels/results/h100.json  # all tables of a file in Markdown

With --out kernels/results the table takes effect. Correctness comes first, against float64: what is wrong, or was not
checked, gets no row for "auto". Times are p20, p50 and p80 in µs, taken twice, on random inputs of which there are so
many that they do not stay in the L2 cache. What takes less than 50 µs is timed as replays of a CUDA graph of 20 calls
if it can be captured, else by triton.testing.do_bench, as all the rest.

It is meant to be run once, on a borrowed GPU. A worker process does the work and keeps the report on disk. Where it
dies (an illegal memory access ends a CUDA context for good, a kernel may hang), that row is marked, and another worker
goes on with the next. Without a GPU the sizes are tiny and the times mean nothing.
"""

import argparse
import contextlib
import datetime
import faulthandler
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from . import solve as solve_file
from .backend import INTERPRETED, WIN, dtype_of, gpu_class, triton
from .gram import Config, gram_, gram_pair_
from .gram import launch as launch_gram
from .krr import factor_ahead, krr_predict, krr_predict_ref
from .solve import MAX_SMALL, FailedFactorization, launch_factor, launch_pack, launch_solve, raise_if_failed

SHORT = 50.0  # µs: below, the gaps between launches matter, and a graph is used
SLOW = 30_000.0  # µs: above, three calls on the host's clock are exact enough
ROTATED = 60e6  # bytes of inputs, more than an L2 cache
CALLS = 20  # in a graph, and at most so many sets of inputs
LARGE = 1e11  # b m³ of systems that are left out: the libraries need seconds for some
PATIENCE = 100  # seconds after which a worker is stuck
RESTARTS, RESTART = 15, 3  # workers in all; the exit status of one whose CUDA context is lost
NO_CAPTURE = ("linalg.solve", "cholesky_solve", "naive")  # they read a status back

Calls = dict[str, Callable[[], object]]  # by the name of the variant


@dataclass
class Bench:
    """A run. All that is known is in `report`, on disk at `path`, so that another process can go on with it."""

    device: torch.device
    path: Path
    report: dict
    start: float  # time.time()
    budget: float  # seconds
    share: tuple[int, int] | None = None  # (i, n): this process only calls every n-th thing once, to compile it
    watched: bool = False  # the process may end itself when it is stuck
    section: str = ""
    limit: float = math.inf  # time.time() after which the section starts nothing more
    turn: int = 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backends(self) -> list[str]:
        return ["torch", "triton"] if triton is not None and (self.cuda or INTERPRETED) else ["torch"]

    @property
    def rows(self) -> list[dict]:
        return self.report["sections"][self.section]["rows"]

    @property
    def marker(self) -> Path:
        """A file that names the row being worked on."""
        return self.path.with_suffix(".running")

    def pick(self, on_gpu, tiny):
        return on_gpu if self.cuda else tiny

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def find(self, size: dict, variant: str) -> dict | None:
        return next((row for row in self.rows if row["variant"] == variant and row["size"] == size), None)

    def compiles(self, call: Callable[[], object]) -> None:
        """One call, if this one is this process's share."""
        self.turn += 1
        if self.turn % self.share[1] == self.share[0]:
            with contextlib.suppress(Exception):
                call()

    def save(self) -> None:
        if self.share is None:
            temporary, text = self.path.with_suffix(".tmp"), json.dumps(self.report)
            for first in ("size", "op", "where"):  # one row a line
                text = text.replace(f'{{"{first}": ', f'\n{{"{first}": ')
            temporary.write_text(text + "\n")
            os.replace(temporary, self.path)

    def leave(self) -> None:
        """Another worker goes on."""
        self.save()
        self.marker.unlink(missing_ok=True)
        raise SystemExit(RESTART)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def number(x: float) -> float | str:
    """Five digits; JSON has no infinity and no NaN."""
    return float(f"{x:.5g}") if math.isfinite(x) else str(x)


def label(size: dict) -> str:
    return " ".join(f"{name}{value}" if isinstance(value, int) else str(value) for name, value in size.items())


# ---------------------------------------------------------------------------------------------- one row, whatever comes


def attempt(bench: Bench, size: dict, variant: str, work: Callable[[], dict], **known) -> dict:
    """The row of a variant at a size: the one of an earlier worker, or what work() returns, or its error."""
    row = bench.find(size, variant)
    if row is not None:
        return row
    row = {"size": size, "variant": variant} | known
    bench.marker.write_text(json.dumps([bench.section, row]))
    if bench.watched:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        row |= work()
        bench.synchronize()
    except Exception as error:
        fail(bench, row, first_line(error))
        try:
            bench.synchronize()
        except Exception:  # the context is lost
            bench.leave()
    else:
        bench.rows.append(row)
    return row


def fail(bench: Bench, row: dict, error: str) -> None:
    row["error"] = error
    bench.rows.append(row)
    if bench.section != "sweep":  # there, a configuration that needs too much shared memory is no news
        where = f"{bench.section}, {label(row['size'])}, {row['variant']}"
        bench.report["failed"].append({"where": where, "error": error})


def left_out(bench: Bench, size: dict, too_large: bool = False) -> bool:
    """Whether a size is skipped, which is recorded: it is too large, or the section has no time left."""
    if time.time() < bench.limit and not too_large:
        return False
    skipped = bench.report["sections"][bench.section]["skipped"]
    skipped += [label(size)] if label(size) not in skipped else []
    return True


# --------------------------------------------------------------------------------------------------------------- timing


def spread(times: list[float]) -> list[float]:
    """p20, p50, p80."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return [tenths[1], tenths[4], tenths[7]]


def by_host(bench: Bench, calls: list[Callable]) -> list[float]:
    times = []
    for call in (calls * 2)[: bench.pick(3, 2)]:
        bench.synchronize()
        start = time.perf_counter()
        call()
        bench.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return spread(times)


def by_events(calls: list[Callable]) -> list[float]:
    from triton.testing import do_bench

    turn = itertools.cycle(calls)
    return [1e3 * t for t in do_bench(lambda: next(turn)(), warmup=2, rep=12, quantiles=[0.2, 0.5, 0.8])]


@lru_cache
def capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all: each has its own workspaces in the libraries


def capture(calls: list[Callable], count: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls in a row."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    # This context comes back to the caller's stream also where a capture fails; that of torch.cuda.graph does not.
    with torch.cuda.stream(stream):
        for i in range(3):  # makes handles, workspaces and the record of failures
            calls[i % len(calls)]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                calls[i % len(calls)]()
    torch.cuda.synchronize()
    return graph


def by_graph(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    times = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / count)
    return spread(times[1:])


def measure(bench: Bench, kind: str, calls: list[Callable], wanted: tuple = (), in_graph: bool = False) -> dict:
    """The times of one call, and its error if it has the results that are wanted.

    kind: of `kind_of`. in_graph: in a graph, however long it takes.
    """
    found = calls[0]()  # compiles
    off = {"off": number(relative(found, wanted))} if wanted and isinstance(found, tuple) else {}
    times = by_host(bench, calls)
    how, sample = "host", partial(by_host, bench, calls)
    if bench.cuda and (times[1] < SLOW or in_graph):
        how, sample = "events", partial(by_events, calls)
        library = kind.split(":")[0].replace("solve", "factor") + ": cholesky_ex"
        known = [bench.report["captures"].get(k, True) for k in (kind, library if "cholesky_ex" in kind else kind)]
        may_capture = known == [True, True] and not kind.split(": ")[1].startswith(NO_CAPTURE)
        if in_graph and not may_capture:
            raise RuntimeError(f"cannot be captured: {known}")
        if in_graph or (may_capture and times[1] < 4 * SHORT):
            count = min(CALLS, max(1, int(2000 / times[1])))
            try:
                graph = capture(calls, count)
            except Exception as error:  # the allocator may believe that the capture goes on: start anew
                bench.report["captures"][kind] = first_line(error)
                bench.leave()
            bench.report["captures"][kind] = True
            if in_graph or by_graph(graph, count)[1] < SHORT:
                how, sample = "graph", partial(by_graph, graph, count)
        times = sample()
    row = dict(p20=times[0], p50=times[1], p80=times[2], again=sample()[1])
    row = {name: number(value) for name, value in row.items()} | {"how": how} | off
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[0]()
        torch.cuda.synchronize()
        row["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    return row


def kind_of(bench: Bench, size: dict, variant: str) -> str:
    """Where something cannot be captured in a graph, neither can others of this kind, and are not tried."""
    batched = ", batched" if size.get("b", 1) > 1 else ""
    return f"{bench.section}{batched}: {variant.removesuffix(' fp64').removesuffix(' fp32')}"


def input_sets(bench: Bench, make: Callable[[], Calls]) -> list[Calls]:
    """As many results of make() as it takes to have inputs of ROTATED bytes."""
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    first = make()
    each = torch.cuda.memory_allocated() - before if bench.cuda else ROTATED
    return [first] + [make() for _ in range(int(min(CALLS - 1, ROTATED // max(1, each))))]


def relative(found, wanted) -> float:
    """The largest relative error of some tensors, by their norms; NaN if there is one."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()


def compare(bench: Bench, size: dict, make: Callable[..., Calls], *, auto=(), graphs=(), exact: str = "") -> None:
    """Times all that make(bench, **size) returns, by name, each on its own inputs.

    auto: (op, precision, size as in `use_triton`, torch's name, ours). graphs: names to time in a graph as well. exact:
    the name whose results the other results are compared with.
    """
    make = partial(make, bench, **size)
    if bench.share is not None:
        for call in make().values():
            bench.compiles(call)
        return
    if bench.find(size, "inputs") or left_out(bench, size):
        return
    gc.collect()  # no old graph may be freed during a capture, and `work` turned the collector off
    sets, wanted = [], []

    def draw() -> dict:
        sets.extend(input_sets(bench, make))
        wanted.extend(sets[0][exact]() if exact else ())
        return {}

    row = attempt(bench, size, "inputs", draw)
    if "error" in row:
        return
    bench.rows.remove(row)
    for name in sets[0]:
        one = partial(measure, bench, kind_of(bench, size, name), [calls[name] for calls in sets], tuple(wanted))
        attempt(bench, size, name, one)
        if name in graphs and bench.cuda:
            attempt(bench, size, f"{name}, graph", partial(one, in_graph=True))
    for op, precision, at, *names in auto:
        pair = [bench.find(size, name) for name in names]
        if bench.report["meaningless"] or not trusted(bench.report, op, precision):
            continue
        if any(row is None or "error" in row for row in pair):
            continue
        times = [min(row["p50"], row["again"]) for row in pair]
        if pair[0]["how"] != pair[1]["how"]:  # both in the same way
            times = [by_events([calls[name] for calls in sets])[1] for name in names]
        row = dict(op=op, precision=precision, size=at, torch_us=round(times[0], 2), triton_us=round(times[1], 2))
        others = [r for r in bench.report["auto"] if (r["op"], r["precision"], r["size"]) != (op, precision, at)]
        bench.report["auto"] = [*others, row]
    bench.save()


# ---------------------------------------------------------------------------------------------------------- correctness
# Results are compared by norms. Three TF32 products, or sums in float32, are below 1e-5; one TF32 product is near 3e-4.
BOUND = {"fp64": 1e-13, "fp32": 2e-5, "ieee": 2e-5}
UNIT = {"fp64": 2.0**-53, "fp32": 2.0**-24}  # a backward error is at most 10 m of it
GRAM_CHECKS = [
    (1, 1, 1, 1), (1, 15, 7, 5), (1, 16, 33, 16), (1, 17, 64, 65), (3, 33, 17, 130), (1, 64, 64, 64),
    (1, 65, 130, 1000), (1, 100, 1024, 2048), (2, 128, 128, 256), (1, 500, 1024, 512), (4, 200, 77, 513),
    (1, 1000, 300, 8192),
]  # fmt: skip
FACTOR_CHECKS = [
    (1, 1), (1, 2), (3, 15), (1, 16), (2, 17), (3, 33), (1, 64), (4, 100), (1, 128), (20, 177), (1, 200), (2, MAX_SMALL)
]  # fmt: skip
SOLVE_CHECKS = [
    (1, 1, 1), (1, 15, 3), (1, 16, 16), (2, 17, 17), (1, 33, 10), (3, 64, 100), (1, 100, 10), (4, 200, 512),
    (1, MAX_SMALL, 33), (1, 500, 10), (1, 1000, 100), (2, 2000, 17),
]  # fmt: skip
KRR_CHECKS = [(100, 1024, 2048, 10, False), (100, 300, 512, 512, True), (500, 300, 100, 10, True)]
NEAREST_CHECKS = [
    (2, 1), (15, 5), (16, 16), (17, 33), (64, 64), (65, 130), (130, 1000), (500, 512), (819, 8192), (1024, 2048),
    (1501, 100), (2000, 64),
]  # fmt: skip
BARLOW_CHECKS = [(16, 33), (33, 16), (100, 130), (256, 2048)]
STATS_CHECKS = [  # images, channels, pixels of a side, groups
    (2, 1, 1, 1), (6, 3, 5, 3), (10, 70, 7, 2), (100, 64, 32, 1), (100, 512, 4, 4), (20, 64, 112, 2), (12, 2048, 7, 1)
]  # fmt: skip


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, so that what a kernel leaves unwritten shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def check(bench: Bench, op: str, precision: str, size: dict, draw, kernel, error, bound: float) -> None:
    """kernel(*draw()) twice on each of two draws: the same bits both times, and error(results, *inputs) <= bound."""

    def work() -> dict:
        worst, same = 0.0, True
        for _ in range(2):
            inputs = draw()
            with poisoned():
                first, second = kernel(*inputs), kernel(*inputs)
            same = same and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            value = float(error(first, *inputs))
            worst = worst if value <= worst else value  # NaN stays
        return {"off": number(worst), "bound": bound, "same_bits": same, "ok": same and worst <= bound}

    if bench.share is not None:
        bench.compiles(lambda: kernel(*draw()))
    elif not left_out(bench, size):
        attempt(bench, size, f"{op} {precision}", work, op=op, precision=precision, ok=False)


def checks_of(report: dict) -> list[dict]:
    return report["sections"].get("correctness", {"rows": []})["rows"]


def trusted(report: dict, op: str, precision: str) -> bool:
    """Whether the kernel was checked, and right every time."""
    found = [row["ok"] for row in checks_of(report) if (row["op"], row["precision"]) == (op, precision)]
    return bool(found) and all(found)


def spd(bench: Bench, b: int, m: int, precision: str) -> Tensor:
    """Symmetric positive definite with a condition number near 6, of shape (m, m) if b is 1."""
    x = bench.randn(*([b] if b > 1 else []), m, m, dtype=dtype_of(precision))
    return (x + x.mT) / 2 + 2 * math.sqrt(m) * torch.eye(m, device=bench.device, dtype=x.dtype)


def check_gram(bench: Bench, precision: str, dtype: torch.dtype, b: int, m: int, n: int, d: int, pad: int) -> None:
    """pad: columns between the rows, so that they are not aligned."""
    plus, size = float(m > 1), dict(b=b, n=n, m=m, d=d, dtype=str(dtype).removeprefix("torch."))

    def draw():
        return tuple(bench.randn(b, rows, d + pad, dtype=dtype)[..., :d] for rows in (m, n))

    def error(pairs, found, s, t):
        if pairs[0] == "ss" and not torch.equal(found[0], found[0].mT):
            return math.inf
        x = {"s": s.double(), "t": t.double()}
        return relative(found, [x[a] @ x[b].mT + plus for a, b in pairs])

    for op, kernel, pairs in (
        ("gram", lambda s, t: (gram_(s, None, precision, "triton", plus),), ("ss",)),
        ("gram_xy", lambda s, t: (gram_(t, s, precision, "triton", plus),), ("ts",)),
        ("gram_pair", lambda s, t: gram_pair_(s, t, precision, "triton", plus), ("ss", "ts")),
    ):
        check(bench, op, precision, size, draw, kernel, partial(error, pairs), BOUND[precision])


def check_factor(bench: Bench, precision: str, b: int, m: int) -> None:
    def draw():
        k = spd(bench, b, m, precision)
        return k, k.new_full(k.shape[:-2], 0.5)

    def error(found, k, lam):
        lower, wanted = found[0].tril().double(), k.double() + 0.5 * torch.eye(m, device=k.device)
        return math.inf if found[1].any() else relative([lower @ lower.mT], [wanted])

    check(bench, "factor", precision, dict(b=b, m=m), draw, launch_factor, error, 10 * m * UNIT[precision])


def check_failure(bench: Bench, precision: str) -> None:
    """The second of three matrices has no factor: it alone is NaN, and `raise_if_failed` hears of it."""
    m = bench.pick(33, 9)

    def draw():
        k = spd(bench, 3, m, precision)
        return k * k.new_tensor([1, -1, 1])[:, None, None], k.new_full((3,), 0.5)

    def kernel(k, lam):
        factor, info = launch_factor(k, lam)
        solve_file.record_failure(info, lam, "bench", m, None, 1, by_kernel=True)
        return factor.nan_to_num(0.0), info, factor.isnan().flatten(1).any(1)

    def error(found, k, lam):
        try:
            raise_if_failed("of the benchmark")
        except FailedFactorization:
            return float(not found[1].bool().tolist() == found[2].tolist() == [False, True, False])
        return math.inf

    check(bench, "factor", precision, dict(b=3, m=m, what="failure"), draw, kernel, error, 0.0)


def check_solve(bench: Bench, precision: str, b: int, m: int, c: int) -> None:
    """With the library's factor, and with ours."""

    def draw():
        k = spd(bench, b, m, precision)
        return k, bench.randn(*k.shape[:-1], c, dtype=k.dtype), torch.linalg.cholesky_ex(k)[0].contiguous()

    def kernel(k, rhs, lower):
        factors = [launch_pack(lower.clone())]
        if m <= MAX_SMALL:
            factors.append(launch_factor(k, k.new_zeros(k.shape[:-2]))[0])
        return tuple(launch_solve(factor, rhs) for factor in factors)

    def error(found, k, rhs, lower):
        k, rhs = k.double(), rhs.double()
        rests = [(k @ x.double() - rhs).norm() / (k.norm() * x.double().norm() + rhs.norm()) for x in found]
        return torch.stack(rests).max()

    check(bench, "solve", precision, dict(b=b, m=m, c=c), draw, kernel, error, 10 * m * UNIT[precision])


def check_krr(bench: Bench, precision: str, m: int, n: int, d: int, c: int, ones: bool) -> None:
    """Prediction and gradients, with and without a factor computed ahead."""
    how = dict(ones=ones, precision=precision, backend="triton")

    def draw():
        f_s = bench.randn(m, d)
        return bench.randn(n, d), f_s, bench.randn(m, c), 0.01 * f_s.square().sum() / m, bench.randn(n, c)

    def kernel(f_t, f_s, y_s, lam, weight):
        given = factor_ahead(f_s, lam, c, **how)
        ways = [partial(krr_predict, factor=factor, **how) for factor in (None, given)]
        return sum((with_gradients(way, f_t, f_s, y_s, lam, weight) for way in ways), ())

    def error(found, *inputs):
        return relative(found, 2 * with_gradients(partial(naive, ones=ones, dtype=torch.float64), *inputs))

    size, bound = dict(m=m, n=n, d=d, c=c, ones=int(ones)), {"fp64": 1e-6, "fp32": 1e-3}[precision]
    check(bench, "krr", precision, size, draw, kernel, error, bound)  # float32 results, condition numbers near 1e3


def check_nearest(bench: Bench, dtype: torch.dtype, n: int, d: int) -> None:
    """By how much the similarity found is below the largest: of nearly equal ones, rounding may take either."""
    from .nearest import launch

    def error(found, x):
        f = torch.nn.functional.normalize(x.double())
        similarity = (f @ f.mT).fill_diagonal_(-math.inf)
        return (similarity.amax(1) - similarity.gather(1, found[0][:, None])[:, 0]).max()

    precision = "fp64" if dtype == torch.float64 else "fp32"
    size = dict(n=n, d=d, dtype=str(dtype).removeprefix("torch."))
    draw = lambda: (bench.randn(n, d, dtype=dtype),)  # noqa: E731
    check(bench, "nearest", precision, size, draw, lambda x: (launch(x),), error, BOUND[precision])


def check_barlow(bench: Bench, b: int, d: int) -> None:
    from .barlow import barlow_loss, barlow_loss_ref

    kernel = partial(barlow_gradients, partial(barlow_loss, backend="triton"))

    def error(found, *inputs):
        return relative(found, barlow_gradients(barlow_loss_ref, *(z.double() for z in inputs)))

    draw = lambda: (bench.randn(b, d), bench.randn(b, d))  # noqa: E731
    check(bench, "barlow", "fp32", dict(b=b, d=d), draw, kernel, error, 1e-4)


def check_bn_stats(bench: Bench, dtype: torch.dtype, last: bool, n: int, c: int, side: int, groups: int) -> None:
    from .bn_stats import bn_stats, bn_stats_ref

    kernel = partial(bn_stats_gradients, partial(bn_stats, backend="triton", groups=groups))

    def error(found, *inputs):
        """Of float32; half-precision maps are rounded once, to 2^-8 of themselves at most."""
        wanted = bn_stats_gradients(partial(bn_stats_ref, groups=groups), *(v.double() for v in inputs))
        if dtype != torch.bfloat16:
            return relative(found, wanted)
        return max(relative(found[1:2], wanted[1:2]), 2e-3 * relative(found, wanted))

    def draw():
        return bn_stats_inputs(bench, dtype, last, n, c, side, groups)

    precision = "fp64" if dtype == torch.float64 else "fp32"
    size = dict(n=n, c=c, side=side, groups=groups, last=int(last), dtype=str(dtype).removeprefix("torch."))
    check(bench, "bn_stats", precision, size, draw, kernel, error, BOUND[precision])


def correctness(bench: Bench) -> None:
    if "triton" not in bench.backends:
        return
    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    for i, shape in enumerate(bench.pick(GRAM_CHECKS, [(2, 7, 5, 20)])):
        for precision, dtype in (("fp64", f32), ("fp64", bf16), ("fp32", f32), ("fp32", bf16), ("ieee", f32)):
            check_gram(bench, precision, dtype, *shape, pad=7 * (i % 2))
    for precision in ("fp64", "fp32"):
        check_failure(bench, precision)
        for shape in bench.pick(FACTOR_CHECKS, [(1, 17)]):
            check_factor(bench, precision, *shape)
        for shape in bench.pick(SOLVE_CHECKS, [(1, 17, 5)]):
            check_solve(bench, precision, *shape)
        for shape in bench.pick(KRR_CHECKS, [(5, 4, 9, 12, True), (9, 4, 5, 2, True)]):
            check_krr(bench, precision, *shape)
    for shape, dtype in itertools.product(bench.pick(NEAREST_CHECKS, [(17, 20)]), (f64, f32, bf16)):
        check_nearest(bench, dtype, *shape)
    for shape in bench.pick(BARLOW_CHECKS, [(7, 9)]):
        check_barlow(bench, *shape)
    for shape, dtype, last in itertools.product(
        bench.pick(STATS_CHECKS, [(4, 3, 2, 2)]), (f64, f32, bf16), (False, True)
    ):
        check_bn_stats(bench, dtype, last, *shape)


# ---------------------------------------------------------------------------------------------------- sections of times


def tf32(call: Callable[[], object]) -> Callable[[], object]:
    def run():
        before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return run


def ceiling_calls(bench: Bench, n: int, entries: int) -> Calls:
    x, y, a, b = bench.randn(entries), bench.randn(entries), bench.randn(n, n), bench.randn(n, n)
    calls = {"copy": partial(y.copy_, x), "tf32": tf32(partial(torch.mm, a, b))}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)):
        calls[name] = partial(torch.mm, a.to(dtype), b.to(dtype))
    return calls


def time_ceilings(bench: Bench) -> None:
    """A large copy, counting bytes read and written, and large matrix products."""
    size = bench.pick(dict(n=8192, entries=2**28), dict(n=64, entries=2**12))
    compare(bench, size, ceiling_calls)
    for row in bench.rows if bench.share is None else ():
        amount, unit = (8 * size["entries"] * 1e-3, "GB/s")
        if row["variant"] != "copy":
            amount, unit = (2 * size["n"] ** 3 * 1e-6, "TFLOP/s")
        if "error" not in row:
            bench.report["ceilings"][f"{row['variant']} {unit}"] = round(amount / row["p50"], 1)


def gram_calls(bench: Bench, m: int, n: int, d: int) -> Calls:
    s, t = bench.randn(m, d), bench.randn(n, d)
    s_half, t_half = s.bfloat16(), t.bfloat16()
    both = lambda s, t: (s @ s.mT, t @ s.mT)  # noqa: E731
    calls = {"both cuBLAS tf32": tf32(partial(both, s, t)), "both cuBLAS bf16": partial(both, s_half, t_half)}
    for backend in bench.backends:
        for p in ("fp64", "fp32", "ieee")[: 3 if backend == "triton" else 2]:  # for torch the last two are the same
            x = s.to(dtype_of(p))  # as krr.py has it
            calls[f"K_ss {backend} {p}"] = partial(gram_, x, None, p, backend, mirror=False)
            calls[f"K_ts {backend} {p}"] = partial(gram_, t, s, p, backend)
            calls[f"both {backend} {p}"] = partial(gram_pair_, s, t, p, backend, mirror=False)
        calls[f"K_ss {backend} fp64 of fp32"] = partial(gram_, s, None, "fp64", backend, mirror=False)
        calls[f"K_ss {backend} fp32 of bf16"] = partial(gram_, s_half, None, "fp32", backend, mirror=False)
        calls[f"both {backend} fp32 of bf16"] = partial(gram_pair_, s_half, t_half, "fp32", backend, mirror=False)
    return calls


def time_gram(bench: Bench) -> None:
    shapes = [(100, 1024, 2048), (500, 1024, 8192), (1000, 1024, 512), (1000, 5000, 2048), (2000, 1024, 4096),
              (4000, 1024, 8192)]  # fmt: skip
    for m, n, d in bench.pick(shapes, [(7, 5, 20)]):
        auto = []
        for p, theirs in (("fp64", "fp64"), ("fp32", "fp32"), ("ieee", "fp32")):
            for op, what, rows in (("gram", "K_ss", m), ("gram_xy", "K_ts", n), ("gram_pair", "both", n)):
                at = dict(b=1, n=rows, m=m, d=d)
                auto.append((op, p, at, f"{what} torch {theirs}", f"{what} triton {p}"))
        compare(bench, dict(m=m, n=n, d=d), gram_calls, auto=auto)


def systems(bench: Bench) -> Iterator[tuple[int, int]]:
    """b, m. To compile, one matrix is enough: a batch of them is the same code."""
    sizes = bench.pick([10, 32, 64, 100, 128, 200, 256, 500, 1000, 2000, 4000], [9])
    for b, m in itertools.product(bench.pick([1, 4, 20], [1]), sizes):
        if bench.share is not None and b > 1:
            return
        if b * m**3 <= LARGE or not left_out(bench, dict(b=b, m=m), too_large=True):
            yield b, m


def factor_calls(bench: Bench, b: int, m: int) -> Calls:
    calls = {}
    for p in ("fp64", "fp32"):
        k = spd(bench, b, m, p)
        lam, lower = k.new_full(k.shape[:-2], 0.5), torch.linalg.cholesky_ex(k)[0].contiguous()
        checked = lambda k=k, lam=lam: solve_file.factor_(k, lam, "torch")[0].contiguous()  # noqa: E731  as krr.py
        calls |= {f"cholesky_ex {p}": partial(torch.linalg.cholesky_ex, k), f"cholesky_ex, checked {p}": checked}
        if "triton" in bench.backends:
            calls[f"pack {p}"] = partial(launch_pack, lower)
            if m <= MAX_SMALL:
                calls[f"ours {p}"] = partial(launch_factor, k, lam)
    return calls


def time_factor(bench: Bench) -> None:
    for b, m in systems(bench):
        size = dict(b=b, m=m)
        auto = [("factor", p, size, f"cholesky_ex, checked {p}", f"ours {p}") for p in ("fp64", "fp32")]
        compare(bench, size, factor_calls, auto=auto)


def solve_calls(bench: Bench, b: int, m: int, c: int) -> Calls:
    calls = {}
    for p in ("fp64", "fp32"):
        k = spd(bench, b, m, p)
        lam, rhs = k.new_full(k.shape[:-2], 0.5), bench.randn(*k.shape[:-1], c, dtype=k.dtype)
        lower = torch.linalg.cholesky_ex(k)[0].contiguous()

        def whole(backend, k=k, lam=lam, rhs=rhs):
            return solve_file.solve_(solve_file.factor_(k, lam, backend, c)[0].contiguous(), rhs, backend)

        calls[f"linalg.solve {p}"] = partial(torch.linalg.solve, k, rhs)
        calls[f"cholesky_solve {p}"] = partial(torch.cholesky_solve, rhs, lower)
        calls[f"solve_triangular, twice {p}"] = partial(solve_file.solve_, lower, rhs, "torch")
        calls[f"cholesky_ex, solve_triangular {p}"] = partial(whole, "torch")
        if "triton" in bench.backends:
            packed = launch_pack(lower.clone())
            calls[f"ours without packing {p}"] = partial(launch_solve, packed, rhs)
            calls[f"ours {p}"] = lambda packed=packed, rhs=rhs: launch_solve(launch_pack(packed), rhs)
            first = "our factor" if m <= MAX_SMALL else "cholesky_ex"
            calls[f"{first}, ours {p}"] = partial(whole, "triton")
    return calls


def time_solve(bench: Bench) -> None:
    for (b, m), c in itertools.product(systems(bench), bench.pick([10, 100, 512], [3])):
        size = dict(b=b, m=m, c=c)
        auto = [("solve", p, size, f"solve_triangular, twice {p}", f"ours {p}") for p in ("fp64", "fp32")]
        compare(bench, size, solve_calls, auto=auto)


def naive(f_t: Tensor, f_s: Tensor, y_s: Tensor, lam: Tensor, *, ones: bool, dtype: torch.dtype) -> Tensor:
    f_t, f_s, y_s = (x.to(dtype) for x in (f_t, f_s, y_s))
    if ones:
        f_t, f_s = (torch.cat([f, f.new_ones(len(f), 1)], 1) for f in (f_t, f_s))
    return krr_predict_ref(f_t, f_s, y_s, lam)


def with_gradients(predict, f_t: Tensor, f_s: Tensor, y_s: Tensor, lam: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The prediction, and the gradients of f_s and y_s where that of the prediction is `weight`."""
    f_s, y_s = (x.detach().requires_grad_() for x in (f_s, y_s))
    pred = predict(f_t, f_s, y_s, lam)
    return pred.detach(), *torch.autograd.grad(pred, [f_s, y_s], weight.to(pred.dtype))


BLOCKS = [
    ("FRePo CIFAR-10", 100, 1024, 2048, 10, False), ("FRePo CIFAR-100", 1000, 1024, 2048, 100, False),
    ("KRR-ST", 100, 1024, 8192, 512, True), ("KRR-ST", 1000, 1024, 8192, 100, True),
    ("KRR-ST", 1000, 1024, 8192, 512, True), ("Boost-PCA", 968, 1024, 8192, 512, False),
    ("FRePo CIFAR-100", 5000, 1024, 2048, 100, False),
]  # fmt: skip


def krr_calls(bench: Bench, what: str, m: int, n: int, d: int, c: int, *, ones: bool, compiled) -> Calls:
    f_t, f_s, y_s, weight = bench.randn(n, d), bench.randn(m, d), bench.randn(m, c), bench.randn(n, c)
    lam, x = 0.01 * f_s.square().sum() / m, bench.randn(*bench.pick((4096, 4096), (8, 8)), dtype=torch.bfloat16)

    def run(predict):
        return with_gradients(predict, f_t, f_s, y_s, lam, weight)

    def forward():
        y = x
        for _ in range(4):
            y = y @ x

    def after(how):
        forward()
        return run(partial(krr_predict, **how))

    def beside(how):
        factor = factor_ahead(f_s, lam, c, **how)
        forward()
        return run(partial(krr_predict, factor=factor, **how))

    ways = {f"naive {p}": partial(naive, ones=ones, dtype=dtype_of(p)) for p in ("fp64", "fp32")}
    ways["naive fp32, compiled"] = partial(compiled, ones=ones, dtype=torch.float32)
    for backend, p in itertools.product(bench.backends, ("fp64", "fp32")):
        ways[f"{backend} {p}"] = partial(krr_predict, ones=ones, precision=p, backend=backend)
    calls = {name: partial(run, way) for name, way in ways.items()} | {"forward": forward}
    for backend in bench.backends:
        how = dict(ones=ones, precision="fp64", backend=backend)
        calls[f"forward, then {backend} fp64"] = partial(after, how)
        calls[f"forward beside factor, {backend} fp64"] = partial(beside, how)
    return calls


def time_krr(bench: Bench) -> None:
    """Forward and backward; with the factor also beside a stand-in for the real batch's forward, 0.7 ms of products."""
    ways = "{} fp64", "{} fp32", "forward, then {} fp64", "forward beside factor, {} fp64"
    for what, m, n, d, c, ones in bench.pick(BLOCKS, [("tiny", 5, 4, 9, 3, True)]):
        torch.compiler.reset()
        compiled = torch.compile(naive, dynamic=False, backend=bench.pick("inductor", "aot_eager"))
        library = bench.report["captures"].get("factor: cholesky_ex", True) is True
        graphs = [
            way.format(backend) for backend in bench.backends for way in ways
            if library or (backend == "triton" and m <= MAX_SMALL)
        ]  # fmt: skip
        size, make = dict(what=what, m=m, n=n, d=d, c=c), partial(krr_calls, ones=ones, compiled=compiled)
        compare(bench, size, make, graphs=graphs, exact="naive fp64")


def nearest_calls(bench: Bench, n: int, d: int) -> Calls:
    from .nearest import nearest

    def plain(x: Tensor) -> Tensor:
        x = torch.nn.functional.normalize(x)
        return (x @ x.mT).fill_diagonal_(-math.inf).argmax(1)

    calls = {}
    for p, dtype in (("fp32", torch.float32), ("fp64", torch.float64), ("bf16", torch.bfloat16)):
        x = bench.randn(n, d, dtype=dtype)
        calls[f"n × n matrix {p}"] = partial(plain, x)
        calls |= {f"{backend} {p}": partial(nearest, x, backend=backend) for backend in bench.backends}
    return calls


def time_nearest(bench: Bench) -> None:
    for n, d in bench.pick([(819, 8192), (1024, 2048), (10000, 2048)], [(17, 20)]):
        auto = [("nearest", p, dict(n=n, d=d), f"torch {p}", f"triton {p}") for p in ("fp64", "fp32")]
        compare(bench, dict(n=n, d=d), nearest_calls, auto=auto)


def barlow_gradients(loss, z_1: Tensor, z_2: Tensor) -> tuple[Tensor, ...]:
    z_1, z_2 = (z.detach().requires_grad_() for z in (z_1, z_2))
    value = loss(z_1, z_2, 0.0051)
    return value.detach(), *torch.autograd.grad(value, [z_1, z_2])


def barlow_calls(bench: Bench, b: int, d: int) -> Calls:
    """The loss with its gradients, and the two Gram matrices alone, of which the op chooses the backend."""
    from .barlow import _grams, barlow_loss, barlow_loss_ref

    z = bench.randn(b, d), bench.randn(b, d)
    calls = {"plain fp64": partial(barlow_gradients, barlow_loss_ref, *(x.double() for x in z))}
    calls["plain fp32"] = partial(barlow_gradients, barlow_loss_ref, *z)
    for backend in bench.backends:
        calls[f"{backend} fp32"] = partial(barlow_gradients, partial(barlow_loss, backend=backend), *z)
        calls[f"Gram matrices, {backend}"] = partial(_grams, *z, "fp32", backend)
    return calls


def time_barlow(bench: Bench) -> None:
    for b, d in bench.pick([(256, 8192), (256, 2048), (1024, 2048)], [(7, 9)]):
        auto = [("gram", "fp32", dict(b=2, n=b, m=b, d=d), "Gram matrices, torch", "Gram matrices, triton")]
        compare(bench, dict(b=b, d=d), barlow_calls, auto=auto, exact="plain fp64")


def bn_stats_inputs(bench: Bench, dtype: torch.dtype, last: bool, n: int, c: int, side: int, groups: int = 1):
    """x, weight, bias, mean, var, the gradients of y and of term."""
    layout = torch.channels_last if last else torch.contiguous_format
    x, d_y = (bench.randn(n, c, side, side, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = (bench.randn(c, dtype=work) for _ in range(4))
    return x, weight, bias, mean, var.square() + 0.5, d_y, bench.randn(groups, dtype=work)


def bn_stats_gradients(function, x, weight, bias, mean, var, d_y, d_term) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    y, term = function(x, weight, bias, mean, var, 1e-5)
    return y.detach(), term.detach(), *torch.autograd.grad([y, term], x, [d_y.to(y.dtype), d_term.to(term.dtype)])


def bn_stats_calls(bench: Bench, n: int, c: int, side: int, last: int) -> Calls:
    """One layer, forward and backward: with the published hooks, with no statistics at all, and both backends."""
    from .bn_stats import bn_stats, bn_stats_ref

    def alone(x, weight, bias, mean, var, eps):
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=eps)
        return y, (0 * x[0, 0, 0, :1]).to(mean.dtype)

    calls = {}
    for p, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        inputs = bn_stats_inputs(bench, dtype, bool(last), n, c, side)
        calls[f"hooks {p}"] = partial(bn_stats_gradients, bn_stats_ref, *inputs)
        calls[f"no statistics {p}"] = partial(bn_stats_gradients, alone, *inputs)
        for backend in bench.backends:
            calls[f"{backend} {p}"] = partial(bn_stats_gradients, partial(bn_stats, backend=backend), *inputs)
    return calls


def time_bn_stats(bench: Bench) -> None:
    """Layers of a ResNet-18 with a batch of 100 at 32 px, then at 224 px."""
    layers = [(64, 32), (128, 16), (256, 8), (512, 4), (64, 112), (64, 56), (128, 28), (256, 14), (512, 7)]
    for last, (c, side) in itertools.product((1, 0), bench.pick(layers, [(3, 2)])):
        n = bench.pick(100, 4)
        at = dict(n=n, c=c, pixels=side * side, last=last)
        auto = [("bn_stats", p, at, f"torch {p}", f"triton {p}") for p in ("fp32", "fp64")]
        compare(bench, dict(n=n, c=c, side=side, last=last), bn_stats_calls, auto=auto)


def gram_sweep_calls(bench: Bench, mode: str, m: int, n: int, d: int) -> Calls:
    run = partial(launch_gram, bench.randn(m, d), bench.randn(n, d), symmetric=True, mode=mode)
    calls = {f"default, split {split}": partial(run, split=split) for split in bench.pick((None, 1, 2, 4, 8), (1, 2))}
    options = bench.pick(((32, 64, 128), (16, 32), (4, 8), (2, 3)), ((16,), (16,), (4,), (2,)))
    for config in itertools.starmap(Config, itertools.product(*options)):
        calls["tile {} depth {} warps {} stages {}".format(*config)] = partial(run, config=config)
    return calls


def solve_sweep_calls(bench: Bench, m: int, c: int, precision: str) -> Calls:
    k = spd(bench, 1, m, precision)
    packed, rhs = launch_pack(torch.linalg.cholesky_ex(k)[0].contiguous()), bench.randn(m, c, dtype=k.dtype)

    def run(warps, columns):
        with mock.patch.multiple(solve_file, NUM_WARPS=warps, COLUMNS=columns):
            return launch_solve(packed, rhs)

    options = itertools.product(*bench.pick(((2, 4, 8), (16, 32)), ((4,), (16,))))
    return {f"warps {warps} columns {columns}": partial(run, warps, columns) for warps, columns in options}


def sweep(bench: Bench) -> None:
    """Other configurations, for the next version of the kernels."""
    if "triton" in bench.backends:
        for m, n, d in bench.pick([(100, 1024, 2048), (1000, 1024, 8192)], [(9, 9, 20)]):
            for mode in ("fp64", "tf32x3"):
                compare(bench, dict(mode=mode, m=m, n=n, d=d), gram_sweep_calls)
        for m, c in bench.pick([(100, 10), (1000, 100)], [(20, 3)]):
            for precision in ("fp64", "fp32"):
                compare(bench, dict(m=m, c=c, precision=precision), solve_sweep_calls)


COMPILING = 0.2  # at most this share of the budget
SECTIONS = [  # and by which share each section starts its last row
    ("ceilings", 0.30, time_ceilings), ("correctness", 0.42, correctness), ("gram", 0.50, time_gram),
    ("factor", 0.58, time_factor), ("krr", 0.76, time_krr), ("solve", 0.88, time_solve),
    ("nearest", 0.90, time_nearest), ("barlow", 0.92, time_barlow), ("bn_stats", 0.96, time_bn_stats),
    ("sweep", 1.00, sweep),
]  # fmt: skip


def run_sections(bench: Bench, sections: list[tuple[str, float, Callable[[Bench], None]]]) -> None:
    """One after the other, the report saved after each. What a section raises ends that section only."""
    for name, share, function in sections:
        new = {"status": "running", "seconds": 0.0, "skipped": [], "rows": []}
        section = bench.report["sections"].setdefault(name, new)
        start = time.time()
        bench.section, bench.limit = name, bench.start + share * bench.budget
        if section["status"] != "running":  # an earlier worker finished it
            continue
        bench.save()
        try:
            function(bench)
            section["status"] = f"done but for {len(section['skipped'])} sizes" if section["skipped"] else "done"
        except Exception as error:
            section["status"] = f"error: {first_line(error)}"
            bench.report["failed"].append({"where": name, "error": first_line(error)})
        section["seconds"] = round(section["seconds"] + time.time() - start, 1)
        bench.save()
        if bench.share is None:
            print(f"{name}: {section['status']}, {len(section['rows'])} rows, {section['seconds']:.0f} s", flush=True)


# --------------------------------------------------------------------------------------------------------------- tables


def cell(row: dict | None, value: str) -> str:
    if row is None or "error" in row:
        return "" if row is None else "error"
    x = float(row[value])
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def pivot(rows: list[dict], value: str = "p50") -> list[str]:
    """A Markdown table of sizes and variants, the longer of the two downwards."""
    at = {(label(row["size"]), row["variant"]): row for row in rows}
    sizes, variants = (list(dict.fromkeys(key[i] for key in at)) for i in (0, 1))
    if len(sizes) > len(variants):
        lines = [["", *variants]] + [[a] + [cell(at.get((a, b)), value) for b in variants] for a in sizes]
    else:
        lines = [["", *sizes]] + [[b] + [cell(at.get((a, b)), value) for a in sizes] for b in variants]
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return ["", *("| " + " | ".join(line) + " |" for line in lines)]


def section_tables(name: str, rows: list[dict], complete: bool) -> list[str]:
    """The tables of a section; if not complete, only what a reader needs first."""
    if name == "correctness" or (name in ("bn_stats", "sweep") and not complete):
        return []
    if not complete and name in ("factor", "solve"):
        rows = [row for row in rows if row["size"]["b"] == 1]
    lines = []
    for kind in dict.fromkeys(tuple(row["size"]) for row in rows):
        lines += pivot([row for row in rows if tuple(row["size"]) == kind])
    if name == "krr" and complete:
        for value, what in (("peak_mb", "Peak memory of one call, MB"), ("off", "Relative error of the worst result")):
            found = [row for row in rows if value in row]
            lines += ["", f"{what}:", *pivot(found, value)] if found else []
    return lines


def auto_table(report: dict, complete: bool) -> list[str]:
    """What backend "auto" reads, with the losses; if not complete, one line for each op."""
    lines, groups = ["", f"torch's time / ours, as backend auto reads it (it takes ours from {WIN} on):", ""], {}
    for row in report["auto"]:
        groups.setdefault(f"{row['op']} {row['precision']}", []).append((row["torch_us"] / row["triton_us"], row))
    if complete and groups:
        lines += ["| op | size | torch µs | ours µs | ratio |", "| --- | --- | ---: | ---: | ---: |"]
    for name, found in groups.items():
        if complete:
            lines += [
                f"| {name} | {label(r['size'])} | {r['torch_us']} | {r['triton_us']} | {x:.2f} |" for x, r in found
            ]
        else:
            ratios = [x for x, _ in found]
            wins = f"{sum(x >= WIN for x in ratios)} of {len(ratios)} sizes"
            lines.append(f"- {name}: {min(ratios):.2f} to {max(ratios):.2f}, ours at {wins}")
    return lines


def tables(report: dict, complete: bool = True) -> str:
    """Markdown. Not complete: about 10,000 characters, the end of what a run prints."""
    most, width = (None, None) if complete else (8, 120)  # errors, and characters of each
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{report['gpu']}, {versions}, {report['date']}, commit {report['commit']}. Median µs of one call; below"
             f" {SHORT:.0f} µs in a CUDA graph where it can be captured."]  # fmt: skip
    if report["meaningless"]:
        lines.append("**Not on a GPU: the times mean nothing.**")
    lines += ["", "Ceilings: " + (", ".join(f"{name} {value}" for name, value in report["ceilings"].items()) or "none")]
    for name, value in report["captures"].items():
        if value is not True or name == "factor: cholesky_ex":
            lines.append(f"{name} {'can be captured' if value is True else f'cannot be captured: {value}'}")
    wrong = []
    for row in (row for row in checks_of(report) if not row["ok"]):
        what = row.get("error") or f"off by {row['off']}, bound {row['bound']:.2g}"
        bits = "" if row.get("same_bits", True) else ", other bits the second time"
        wrong.append(f"- WRONG: {row['variant']} at {label(row['size'])}: {what}{bits}"[:width])
    right = len(checks_of(report)) - len(wrong)
    lines += [
        "",
        f"Right against float64: {right} of {right + len(wrong)} checks.",
        *wrong[:most],
    ]
    for name, section in report["sections"].items():
        lines += ["", f"**{name}**: {section['status']}", *section_tables(name, section["rows"], complete)]
    lines += [*auto_table(report, complete), "", f"{len(report['failed'])} errors"]
    lines += [f"- {failed['where']}: {failed['error']}"[:width] for failed in report["failed"][:most]]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------- main


def output_of(*command: str) -> str:
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
        return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def new_report(device: torch.device) -> dict:
    cuda, gpu = device.type == "cuda", f"{platform.machine()} CPU"
    versions = {"torch": torch.__version__, "triton": getattr(triton, "__version__", "none")}
    if cuda:
        versions["CUDA"], gpu = torch.version.cuda, torch.cuda.get_device_name(device)
        versions["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": gpu, "versions": versions, "date": datetime.date.today().isoformat(),
        "commit": output_of("git", "rev-parse", "HEAD"), "meaningless": not cuda, "ceilings": {},
        "captures": {},  # what can be captured in a CUDA graph: true, or why not
        "sections": {}, "auto": [], "failed": [],
    }  # fmt: skip


def work(bench: Bench) -> None:
    """A worker process: goes on where an earlier one died."""
    gc.freeze()
    gc.disable()
    if bench.share is None:
        bench.report, bench.watched = json.loads(bench.path.read_text()), True
        if bench.marker.exists():
            bench.section, row = json.loads(bench.marker.read_text())
            fail(bench, row, "the process died")
    run_sections(bench, SECTIONS if bench.share is None else SECTIONS[1:])  # the first needs no kernel and much memory
    faulthandler.cancel_dump_traceback_later()
    if bench.share is None:
        bench.marker.unlink(missing_ok=True)


def supervise(bench: Bench) -> None:
    """Compiles with many processes, then has workers do the sections, one after the other as they die."""
    command = [sys.executable, "-m", "kernels.bench", "--out", str(bench.path.parent), "--budget", str(bench.budget)]
    command += ["--worker", str(bench.start)]
    settings = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    start = partial(subprocess.Popen, cwd=Path(__file__).parent.parent, env=settings)
    if bench.cuda:
        n = max(1, min(14, (os.cpu_count() or 1) - 1))
        with open(bench.path.with_suffix(".log"), "w") as log:
            shares = [start([*command, "--share", str(i), str(n)], stdout=log, stderr=log) for i in range(n)]
            for process in shares:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, bench.start + COMPILING * bench.budget - time.time()))
                process.kill()
        print(f"compiled for {time.time() - bench.start:.0f} s", flush=True)
    for _ in range(RESTARTS):
        worker = start(command)
        try:
            status = worker.wait(max(1.0, bench.start + bench.budget + 15 - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()
            return
        if status == 0:
            return
        print(f"a worker ended with status {status}, another goes on", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--table", type=Path, help="print the tables of this file, and do nothing else")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # when the run started
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table is not None:
        print(tables(json.loads(args.table.read_text())))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = gpu_class(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    start, budget = args.worker or time.time(), args.budget if device.type == "cuda" else min(args.budget, 35)
    bench = Bench(device, args.out.resolve() / f"{name}.json", {}, start, budget, args.share)
    if args.worker is not None:
        bench.report = new_report(device)
        try:
            return work(bench)
        except SystemExit as left:
            os._exit(left.code)  # at once: a context that is lost may hang in its own end
    if device.type != "cuda":
        print("No CUDA device: tiny sizes, and the times mean nothing.", flush=True)
    bench.report = new_report(device)
    bench.path.parent.mkdir(parents=True, exist_ok=True)
    bench.marker.unlink(missing_ok=True)
    bench.save()
    supervise(bench)
    print(tables(json.loads(bench.path.read_text()), complete=False))


if __name__ == "__main__":
    main()
