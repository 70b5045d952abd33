"""common/run.py: keyed randomness, files that survive a kill, flags, presets, the run folder."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import run as R
from common.run import Run, UserError


@dataclass
class Args:
    out_dir: str
    lr: float | None = None
    widths: tuple[int, ...] = (1, 2)
    seed: int = 3
    device: str = "cpu"
    resume: str | None = None
    log_every: int = 1
    save_minutes: float = 0.0
    eval_runs: int = 1


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "method.py"
    path.write_text("print('the source')\n")
    return path


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


def test_rng_is_keyed_and_stateless():
    first = torch.rand(3, generator=R.rng("batch", 0, 1))
    torch.rand(5)  # the global generator has nothing to do with it
    assert torch.equal(first, torch.rand(3, generator=R.rng("batch", 0, 1)))
    assert not torch.equal(first, torch.rand(3, generator=R.rng("batch", 0, 2)))
    assert not torch.equal(first, torch.rand(3, generator=R.rng("batch", 1, 0)))
    assert R.seed_of("batch", 0, 1) == 1315615193952824908  # of every machine and version, else no run can be repeated


def test_seeded_restores_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with R.seeded("net", 0):
        a = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with R.seeded("net", 0):
        assert torch.equal(torch.rand(2), a)


def test_write_atomic_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "file"
    R.write_atomic(path, lambda tmp: tmp.write_text("old"))

    def half(tmp):
        tmp.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError) as error:
        R.write_atomic(path, half)
    assert "No space left" in one_line(error) and "free some space" in str(error.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(ZeroDivisionError):
        R.write_atomic(path, lambda tmp: (tmp.write_text("x"), 1 / 0))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A file-size limit stands in for a full disk: torch.save breaks off half-way."""
    code = """if True:
        import resource, signal, sys, torch
        from common.run import UserError, write_atomic
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = sys.argv[1]
        write_atomic(path, lambda tmp: torch.save({"x": torch.arange(10)}, tmp))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_atomic(path, lambda tmp: torch.save({"x": torch.arange(1_000_000)}, tmp))
        except UserError as error:
            print(error)
    """
    path = tmp_path / "checkpoint.pt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not write" in done.stdout and len(done.stdout.splitlines()) == 1
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(10))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_load_checkpoint_refuses_a_truncated_and_a_pickled_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"x": torch.arange(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError) as error:
        R.load_checkpoint(path)
    assert "not a readable checkpoint" in one_line(error)
    torch.save({"x": Image.new("L", (1, 1))}, path)  # weights_only refuses to build it
    with pytest.raises(UserError) as error:
        R.load_checkpoint(path)
    assert "not a readable checkpoint" in one_line(error)


def test_memory_that_runs_out_is_not_blamed_on_the_checkpoint(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate"):
        R.load_checkpoint(tmp_path / "checkpoint.pt")


def test_preset_name_prefers_the_flag_then_the_name_then_the_size():
    presets = {"digits": {}, "cifar10": {}, "8px": {}, "16px": {}, "48px": {}}
    assert R.preset_name(presets, "cifar10", "digits", True, 8) == "cifar10"
    assert R.preset_name(presets, None, "digits", True, 8) == "digits"
    assert R.preset_name(presets, None, "digits", False, 8) == "8px"  # a folder of that name
    assert [R.preset_name(presets, None, "x", False, s) for s in (4, 8, 15, 16, 47, 48, 300)] == [
        "8px", "8px", "8px", "16px", "16px", "48px", "48px",
    ]  # fmt: skip
    with pytest.raises(UserError) as error:
        R.preset_name(presets, "cifar", "digits", True, 8)
    assert "--preset cifar" in one_line(error) and "cifar10" in str(error.value)


def test_fill_replaces_none_only():
    args = R.fill(Args("runs", lr=None), dict(lr=0.1, widths=(9,)))
    assert args.lr == 0.1 and args.widths == (1, 2)
    assert R.fill(Args("runs", lr=0.5), dict(lr=0.1)).lr == 0.5


def test_pick_device():
    assert R.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError) as error:
        R.pick_device("cuda:77")
    assert "--device cuda:77" in one_line(error)
    with pytest.raises(UserError) as error:
        R.pick_device("meta")
    assert "not one of cpu, cuda, mps" in one_line(error)
    with pytest.raises(UserError) as error:
        R.pick_device("toaster")
    assert "--device toaster" in one_line(error)


def test_run_folder_explains_itself(tmp_path, script):
    run = Run(str(script), Args(str(tmp_path / "runs"), lr=0.1), "digits", "hash")
    assert run.folder.name.startswith("digits__method__3__") and run.folder.parent == tmp_path / "runs"
    assert json.loads(run.file("args.json").read_text())["lr"] == 0.1
    assert run.file("script.py").read_text() == script.read_text()
    again = Run(str(script), Args(str(tmp_path / "runs"), lr=0.1), "digits", "hash")  # within the same second
    assert again.folder != run.folder
    seen = list(run.steps(3))
    assert seen == [0, 1, 2]
    run.log(3, {"loss": 1.0})
    assert run.history == [[3, 1.0]]
    result = run.finish(data="digits")
    on_disk = json.loads(run.file("result.json").read_text())
    assert on_disk == json.loads(json.dumps(result)) and on_disk["data"] == "digits"
    assert on_disk["peak_memory_bytes"] > 0 and on_disk["versions"]["torch"] == torch.__version__


def test_resume_takes_the_saved_flags_and_refuses_changed_ones(tmp_path, script):
    args = Args(str(tmp_path / "runs"), lr=0.1)
    run = Run(str(script), args, "digits", "hash")
    run.save(7, x_s=torch.ones(2))
    folder = str(run.folder)
    resumed = Run(str(script), R.load_args(Args, folder), "digits", "hash")
    assert resumed.start == 7 and resumed.folder == run.folder and resumed.args.lr == 0.1
    assert list(resumed.steps(9)) == [7, 8] and torch.equal(resumed.state["x_s"], torch.ones(2))
    assert resumed.args.widths == (1, 2)  # a tuple again, not JSON's list
    free = dataclasses.replace(R.load_args(Args, folder), eval_runs=9, device="auto", log_every=3)
    assert Run(str(script), free, "digits", "hash").args.eval_runs == 9
    for change in (dict(lr=0.2), dict(seed=4), dict(widths=(1, 3))):
        with pytest.raises(UserError) as error:
            Run(str(script), dataclasses.replace(R.load_args(Args, folder), **change), "digits", "hash")
        assert f"--{next(iter(change))} was" in one_line(error)
    with pytest.raises(UserError) as error:
        Run(str(script), R.load_args(Args, folder), "digits", "another hash")
    assert "data changed" in one_line(error)


def test_a_checkpoint_of_another_script_is_refused(tmp_path, script):
    run = Run(str(script), Args(str(tmp_path / "runs"), lr=0.1), "digits", "hash")
    torch.save({"format": "other 1", "step": 1, "content": "hash", "seconds": 0.0}, run.file("checkpoint.pt"))
    with pytest.raises(UserError) as error:
        Run(str(script), R.load_args(Args, run.folder), "digits", "hash")
    assert "not a checkpoint of method" in one_line(error)


def test_load_args_names_the_cause(tmp_path):
    with pytest.raises(UserError) as error:
        R.load_args(Args, tmp_path / "nothing")
    assert "no readable args.json" in one_line(error)
    (tmp_path / "args.json").write_text('{"ipc": 1}')
    with pytest.raises(UserError) as error:
        R.load_args(Args, tmp_path)
    assert "another script" in one_line(error) and "ipc" in str(error.value)


def test_out_dir_that_is_a_file(tmp_path, script):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError) as error:
        Run(str(script), Args(str(tmp_path / "runs")), "digits", "hash")
    assert "--out-dir" in one_line(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, script, value):
    run = Run(str(script), Args(str(tmp_path / "runs")), "digits", "hash")
    run.save(1, x_s=torch.ones(2))
    with pytest.raises(UserError) as error:
        run.check_finite(2, {"loss": value, "lam": 0.5}, "n_s 10, d 65")
    assert all(word in one_line(error) for word in ("step 1 to 2", "loss", "lam 0.5", "n_s 10, d 65"))
    with pytest.raises(UserError) as error:
        run.save(2, x_s=torch.tensor([1.0, value]))
    assert "x_s is not finite" in one_line(error)
    assert R.load_checkpoint(run.file("checkpoint.pt"))["step"] == 1


def test_grid_shows_pixels_clamped_and_enlarged_without_smoothing(tmp_path, script):
    run = Run(str(script), Args(str(tmp_path / "runs")), "digits", "hash")
    x = torch.tensor([[[[0.0, 0.5], [2.0, -1.0]]]]).repeat(2, 1, 1, 1)
    for step in range(0, 31):
        run.grid(step, 30, lambda: x)
    assert sorted(p.name for p in run.folder.glob("grid_*.png")) == [f"grid_{s:06d}.png" for s in (0, 1, 10, 30)]
    pixels = np.asarray(Image.open(run.file("grid_000000.png")).convert("L"))
    inside = pixels[12:60, 12:60]  # 24 pixels a pixel, 12 of padding
    assert (inside[:24, :24] == 0).all() and (inside[:24, 24:] == 128).all()
    assert (inside[24:, :24] == 255).all() and (inside[24:, 24:] == 0).all()


# ------------------------------------------------------------------------------------------------------------- signals

TOY = """
import sys, torch
from dataclasses import dataclass
from common.run import Run, cli

@dataclass
class Args:
    out_dir: str = "runs"
    seed: int = 0
    device: str = "cpu"
    resume: str | None = None
    log_every: int = 1
    save_minutes: float = 0.0

def main(args):
    print("data", flush=True)
    sys.stdin.readline()
    run = Run(__file__, args, "toy", "hash")
    for step in run.steps(5):
        print("in step", step, flush=True)
        sys.stdin.readline()
        if run.due(step + 1, 100):
            run.save(step + 1, x_s=torch.ones(1))
        print("end of step", step, flush=True)
    print("evaluation", flush=True)
    sys.stdin.readline()
    run.finish()

if __name__ == "__main__":
    cli(main, Args)
"""


@pytest.fixture
def toy(tmp_path):
    """Start the toy script; it goes on by a line on its stdin and tells where it is on its stdout."""
    (tmp_path / "toy.py").write_text(TOY)
    env = os.environ | {"PYTHONPATH": str(Path(R.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    started = []

    def start(*words):
        command = [sys.executable, "toy.py", *words]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(subprocess.Popen(command, cwd=tmp_path, text=True, env=env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(process, words: str, stream="stdout") -> None:
    for line in getattr(process, stream):
        if words in line:
            return
    raise AssertionError(f"ended without {words!r}")


def go_on(process) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_finishes_the_step_saves_and_prints_the_command_that_goes_on(toy, tmp_path, number, code):
    process = toy()
    until(process, "data"), go_on(process)
    until(process, "in step 0"), go_on(process)
    until(process, "in step 1")
    process.send_signal(number)
    until(process, "stopping after this step", "stderr")
    out, err = process.communicate("\n")
    assert process.returncode == code
    assert out.splitlines() == ["end of step 1"]  # finished, and no other begun
    (folder,) = (tmp_path / "runs").iterdir()
    assert R.load_checkpoint(folder / "checkpoint.pt")["step"] == 2
    assert err.rstrip().splitlines()[-1] == f"stopped; go on with: {R.interpreter()} toy.py --resume runs/{folder.name}"
    assert "Traceback" not in err
    again = toy("--resume", f"runs/{folder.name}")
    until(again, "data"), go_on(again)
    until(again, "in step 2")


def test_a_second_signal_exits_at_once(toy, tmp_path):
    process = toy()
    until(process, "data"), go_on(process)
    until(process, "in step 0")
    process.terminate()
    until(process, "stopping after this step", "stderr")
    process.terminate()  # nobody writes to its stdin: the step never ends
    assert process.wait(timeout=60) == -signal.SIGTERM
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("place", [pytest.param("data", marks=pytest.mark.slow), "evaluation"])
def test_a_signal_outside_the_loop_stops_there(toy, tmp_path, place):
    process = toy("--seed", "5")
    if place == "evaluation":
        until(process, "data"), go_on(process)
        for step in range(5):
            until(process, f"in step {step}"), go_on(process)
    until(process, place)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143 and "Traceback" not in err
    last = err.rstrip().splitlines()[-1]
    if place == "data":
        assert last == f"stopped; go on with: {R.interpreter()} toy.py --seed 5"
    else:
        (folder,) = (tmp_path / "runs").iterdir()
        assert last == f"stopped; go on with: {R.interpreter()} toy.py --resume runs/{folder.name}"
        assert R.load_checkpoint(folder / "checkpoint.pt")["step"] == 5


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["out of memory", "--cache-gb"]),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            ["lower --cache-gb, --ipc"],
        ),
        (MemoryError(), ["MemoryError", "--precision bf16"]),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), ["could not write runs/x", "free some space"]),
        (UserError("a line"), ["error: a line"]),
    ],
)
def test_cli_turns_what_a_user_can_mend_into_one_line(monkeypatch, capsys, error, words):
    @dataclass
    class Flags:
        cache_gb: float = 1.0
        ipc: int = 1

    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(R.Run, "latest", None)
    with pytest.raises(SystemExit) as stop:
        R.cli(main, Flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.ENOENT, "No such file", "x"), ValueError("b")])
def test_cli_shows_the_traceback_of_a_bug(monkeypatch, error):
    def main(args):
        raise error

    @dataclass
    class Flags:
        ipc: int = 1

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(type(error)):
        R.cli(main, Flags)


# ----------------------------------------------------------------------------------------------------------- long runs


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(R.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_signal_after_the_question_whether_to_save_waits_for_the_next_step(tmp_path, script):
    """Never a stop without a checkpoint of the step it stops at."""
    run = Run(str(script), Args(str(tmp_path / "runs")), "digits", "hash")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    R.catch_signals()
    try:
        with pytest.raises(R.Stopped):
            for step in run.steps(9):
                saving = run.due(step + 1, 100)
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                if saving:
                    run.save(step + 1, x_s=torch.ones(1))
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(each, handler)
        R._stop.update(signal=0, wait=False)
    assert step == 4 and R.load_checkpoint(run.file("checkpoint.pt"))["step"] == 5


def test_a_signal_stops_what_is_aside_at_once(tmp_path, script):
    run = Run(str(script), Args(str(tmp_path / "runs")), "digits", "hash")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    R.catch_signals()
    reached = []
    try:
        with pytest.raises(R.Stopped):
            for step in run.steps(9):
                run.save(step + 1, x_s=torch.ones(1))
                with run.aside():
                    reached.append(step)
                    if step == 2:
                        os.kill(os.getpid(), signal.SIGTERM)
                        reached.append("after the signal")
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(each, handler)
        R._stop.update(signal=0, wait=False)
    assert reached == [0, 1, 2]


def test_checkpoints_are_due_by_steps_by_time_and_at_the_end(tmp_path, script, clock):
    run = Run(str(script), Args(str(tmp_path / "runs"), save_minutes=2.0), "digits", "hash")
    saved = []
    for step in run.steps(12):
        clock.now += 50
        if run.due(step + 1, 7):
            saved.append(step + 1)
            run.save(step + 1, x_s=torch.ones(1))
    assert saved == [3, 6, 7, 10, 12]  # 150 s after the start and after each save; 7 by steps; 12 is the end
    run = Run(str(script), Args(str(tmp_path / "runs")), "digits", "hash")
    for step in run.steps(3):
        clock.now += 1e6
        assert run.due(step + 1, 100) == (step == 2)  # 0 minutes: never


def test_the_time_left_covers_the_whole_run(tmp_path, script, clock):
    run = Run(str(script), Args(str(tmp_path / "runs")), "digits", "hash")
    clock.now += 30  # a teacher, say
    for step in run.steps(200, lambda done: 100.0 if done >= 50 else 110.0):
        clock.now += 2 if step else 9  # the first also loads what it needs
        if step == 1:
            with run.aside():
                clock.now += 60  # an evaluation inside the loop is no part of a step
        if step == 9:
            run.log(10, {"loss": 1.0})
            assert run.seconds_left() == 2 * 190 + 110
    assert run.prediction == {"at_step": 4, "seconds": 30 + 60 + 407 + 110}
    assert run.seconds_left() == 100 and run.seconds_per_100_steps == 200
    assert run.finish()["seconds_predicted"] == run.prediction


def test_plateau_waits_for_three_points_that_are_no_better_than_noise():
    falling = [1.0, 0.8, 0.6, 0.4]
    assert R.plateau(falling, [0.01] * 4) is None
    assert R.plateau(falling[:3], [9.0] * 3) is None  # too few to tell
    flat = [1.0, 0.5, 0.52, 0.495, 0.51]
    assert R.plateau(flat, [0.01] * 5) == 1
    assert R.plateau(flat, [0.001] * 5) is None  # 0.495 is better by more than its error
    assert R.plateau([1.0, 0.5, 0.6, 0.7, 0.8], [0.0] * 5) == 1


def test_the_plateau_is_said_once(tmp_path, script, capsys):
    run = Run(str(script), Args(str(tmp_path / "runs")), "digits", "hash")
    curve = []
    for step, mean in enumerate([1.0, 0.5, 0.5, 0.5, 0.5, 0.5]):
        curve.append({"step": 10 * step, "match": {"mean": mean, "std": 0.02, "values": [mean] * 4}})
        run.plateau(curve, "match")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plateau")]
    assert len(lines) == 1 and "at step 40" in lines[0] and "at step 10" in lines[0]


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_per_image_counts_each_map_once_and_no_weights(device):
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, device=device)
    x, images, maps = torch.zeros(2, 3, 8, 8, device=device), 3 * 64 * 4, 4 * 64 * 4
    assert R.bytes_per_image(conv, x) == images
    assert R.bytes_per_image(torch.nn.Sequential(conv, torch.nn.ReLU()), x) == images + maps
    linear = torch.nn.Sequential(conv, torch.nn.Flatten(), torch.nn.Linear(256, 1000, device=device))
    assert R.bytes_per_image(linear, x) == images + maps
    assert R.bytes_per_image(lambda x: conv(x) + conv(x), x) == images


def test_the_chunk_fills_seven_tenths_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(R, "available_memory", lambda device: 1000)
    cpu = torch.device("cpu")
    assert R.fit_chunk(50, 10, 200, cpu) == 50 and R.fit_chunk(51, 10, 200, cpu) == 50
    assert R.fit_chunk(51, 10, 5000, cpu) == 1  # check_memory refuses it
    monkeypatch.setattr(R, "available_memory", lambda device: None)
    assert R.fit_chunk(51, 10, 5000, cpu) == 51


def test_limits_name_the_flag_and_the_bound():
    @dataclass
    class Flags:
        lr_img: float = 0.1
        lr_end: float = 0.5
        widths: tuple[int, ...] = (4, 4)
        chunk: int | None = None

    limits = {(0, float("inf")): "lr_img chunk widths", (0, 1): "lr_end"}
    R.check_limits(Flags(), limits)
    for change, words in (
        (dict(lr_img=-1.0), "--lr-img -1.0: must be at least 0"),
        (dict(lr_img=float("nan")), "--lr-img nan: must be at least 0"),
        (dict(widths=(4, -4)), "--widths -4: must be at least 0"),
        (dict(lr_end=1.5), "--lr-end 1.5: must be in 0 .. 1"),
        (dict(chunk=-2), "--chunk -2: must be at least 0"),
    ):
        with pytest.raises(UserError) as error:
            R.check_limits(Flags(**change), limits)
        assert one_line(error) == words


def test_memory_that_does_not_fit_is_refused_with_the_flag_that_takes_most(monkeypatch, capsys):
    monkeypatch.setattr(R, "available_memory", lambda device: 5_000_000_000)
    cpu = torch.device("cpu")
    R.check_memory({"outer loop": {"--num-images": 3 * 10**9, "--pool": 10**9}, "evaluation": {"--pool": 10**9}}, cpu)
    assert "about 4 GB for the outer loop, 5 GB free" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        R.check_memory({"outer loop": {"--pool": 1}, "evaluation": {"--cache-gb": 4 * 10**9, "--pool": 2 * 10**9}}, cpu)
    assert all(
        words in one_line(error) for words in ("evaluation", "6.0 GB", "5.0 GB", "4.0 GB of it are set by --cache-gb")
    )
    monkeypatch.setattr(R, "available_memory", lambda device: None)
    R.check_memory({"outer loop": {"--pool": 10**15}}, cpu)  # unknown: said, not refused


def test_available_memory_is_the_machine_s_within_its_container(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
        "/sys/fs/cgroup/memory.max": "6000000\n",
        "/sys/fs/cgroup/memory.current": "3000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1\nfile 1000000\n",
    }

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(R.Path, "read_text", read_text)
    cpu = torch.device("cpu")
    assert R.available_memory(cpu) == 4_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert R.available_memory(cpu) == 8000 * 1024
    del files["/sys/fs/cgroup/memory.max"]
    assert R.available_memory(cpu) == 8000 * 1024
    del files["/proc/meminfo"]
    assert R.available_memory(cpu) is None
