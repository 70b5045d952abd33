"""common/run.py: keyed randomness, files that survive a kill, flags, presets, the run folder."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass

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
        run.log(2, {"loss": value, "lam": 0.5}, "n_s 10, d 65")
    assert all(word in one_line(error) for word in ("step 2", "loss", "lam 0.5", "n_s 10, d 65"))
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
