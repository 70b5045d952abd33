"""Bad input and bad luck through the command line of every script: one line, exit code 2, nothing lost."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from watched import REPO, flags, start

import common.run
from common.models import ResNet
from common.run import load_checkpoint

# script: (flags of a run of seconds, the flag that says how many images, whether it needs labels)
SCRIPTS = {
    "krr_st": (
        dict(
            steps=12, num_images=5, batch_real=64, widths=(4, 4), pool=3, max_age=4, log_every=1, save_every=4,
            device="cpu", teacher_width=2, teacher_epochs=2, teacher_projector=8, eval_runs=2, eval_epochs=4,
            eval_probe_steps=3, eval_finetune_steps=2,
        ),
        "--num-images",
        False,
    ),
}  # fmt: skip


class Script:
    """A script, its small flags, and an out-dir whose teacher is trained."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.tiny, self.count, self.labelled = SCRIPTS[name]
        self.module = importlib.import_module(name)
        self.out_dir = folder / "runs"

    def words(self, **changes) -> list[str]:
        return flags(**self.tiny | {"out_dir": self.out_dir, "data_dir": self.folder / "data"} | changes)

    def runs(self) -> list[Path]:
        if not self.out_dir.is_dir():
            return []
        return sorted(p for p in self.out_dir.iterdir() if p.name != "teachers")


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    """A whole run of the script, not to be changed."""
    script = Script(request.param, tmp_path_factory.mktemp(request.param))
    done = start(REPO / f"{script.name}.py", script.words())
    assert done.returncode == 0, done.stderr
    return script


@pytest.fixture
def script(finished, tmp_path):
    """The script with a copy of the finished run and of its teacher."""
    shutil.copytree(finished.out_dir, tmp_path / "runs")
    return Script(finished.name, tmp_path)


@pytest.fixture
def refused(script, monkeypatch, capsys):
    """The line on the error stream of a command that must exit with 2; no run folder may be begun unless `begun`."""

    def check(*words, begun=False, **changes) -> str:
        before = script.runs()
        command = [f"{script.name}.py", *map(str, words)]
        if "--resume" not in words:
            command += script.words(**changes)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            common.run.cli(script.module.main, script.module.Args)
        err = capsys.readouterr().err
        assert stop.value.code == 2, err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in err
        assert begun or script.runs() == before
        return lines[0]

    return check


def images(folder: Path, n: int, shape=(8, 8), seed: int = 0) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


# ---------------------------------------------------------------------------------------------------------------- data


def test_unknown_data(refused, tmp_path):
    line = refused(data="digit")
    assert "--data digit" in line and "did you mean digits" in line and "tiny_imagenet" in line
    assert "no such folder" in refused(data=tmp_path / "nowhere")


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(data=tmp_path / "empty")


def test_one_class(script, refused, tmp_path):
    if not script.labelled:
        pytest.skip("takes images without labels")
    images(tmp_path / "one" / "cat", 20)
    assert "only one class" in refused(data=tmp_path / "one")


def test_a_corrupt_image_is_named_and_can_be_skipped(script, refused, tmp_path):
    images(tmp_path / "set" / "cat", 30), images(tmp_path / "set" / "dog", 30, seed=1)
    whole = (tmp_path / "set" / "dog" / "7.png").read_bytes()
    (tmp_path / "set" / "dog" / "7.png").write_bytes(whole[: len(whole) // 2])
    line = refused(data=tmp_path / "set")
    assert "dog/7.png" in line and "--skip-bad-images" in line
    words = script.words(data=tmp_path / "set", skip_bad_images=True, teacher_batch=8)
    done = start(REPO / f"{script.name}.py", words)
    assert done.returncode == 0, done.stderr
    assert "left out 1 of 60 images" in done.stdout and "1 unreadable left out" in done.stdout, done.stdout
    result = json.loads((script.runs()[-1] / "result.json").read_text())
    assert result["images_skipped"] == 1


def test_mixed_channel_counts(refused, tmp_path):
    images(tmp_path / "set" / "cat", 5), images(tmp_path / "set" / "dog", 5, (8, 8, 3))
    line = refused(data=tmp_path / "set")
    assert "grey" in line and "--channels" in line


def test_unequal_sizes(refused, tmp_path):
    images(tmp_path / "set" / "cat", 5), images(tmp_path / "set" / "dog", 5, (9, 8))
    assert "--size" in refused(data=tmp_path / "set")


def test_a_public_set_without_a_network_names_the_folder_alternative(refused, monkeypatch):
    import urllib.request
    from urllib.error import URLError

    def no_network(*args, **kwargs):
        raise URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    line = refused(data="cifar100")
    assert "cifar100" in line and "train/<class>" in line


# --------------------------------------------------------------------------------------------------------------- flags


def test_numbers_out_of_range(script, refused):
    count = script.count.removeprefix("--").replace("-", "_")
    assert f"{script.count} 0" in refused(**{count: 0})
    assert f"{script.count} 99999" in refused(**{count: 99999})
    for flag in ("steps", "batch_real", "save_every", "log_every", "pool", "max_age", "eval_runs", "chunk"):
        assert f"--{flag.replace('_', '-')} 0: must be at least 1" in refused(**{flag: 0})
    for flag in ("cache_gb", "save_minutes", "lr_img", "lr_net", "ridge", "teacher_lr", "eval_finetune_steps"):
        assert f"--{flag.replace('_', '-')} -1" in refused(**{flag: -1})
    assert "--stem-padding -5" in refused(stem_padding=-5)
    assert "--widths 0" in refused(widths=(0, 4))
    for flag in ("holdout", "teacher_crop_min", "lr_end"):
        assert f"--{flag.replace('_', '-')} 1.5: must be in 0 .. " in refused(**{flag: 1.5})
    assert "--size 3: must be at least 4" in refused(size=3)
    assert "--widths" in refused(widths=(8,))
    assert "--preset nope" in refused(preset="nope")


@pytest.mark.parametrize("device", ["cuda:99", "toaster", "meta"])
def test_a_device_that_does_not_exist(refused, device):
    assert f"--device {device}" in refused(device=device)


def test_out_dir_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out-dir" in refused(out_dir=tmp_path / "file")


def test_more_memory_than_there_is(script, refused):
    """Widths that need terabytes: refused before anything is computed, with the flag that takes most."""
    count = script.count.removeprefix("--").replace("-", "_")
    line = refused(**{count: 1000 if count == "num_images" else 100}, widths=(2**10, 2**19), norm="none")
    assert "memory" in line and "--widths: lower it" in line
    # 162 features an image would fill it; digits have 9 variants each, so that they do not
    done = start(REPO / f"{script.name}.py", script.words(cache_gb=50_000, outer_aug="crop_flip"))
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------------- teacher


def own_teacher(script: Script) -> Path:
    (folder,) = (script.out_dir / "teachers").iterdir()
    return folder / "teacher.safetensors"


def test_a_teacher_with_missing_keys_or_another_architecture(script, refused, tmp_path):
    path = own_teacher(script)
    weights, meta = load_file(path), safe_open(path, "pt").metadata()
    fewer = {key: value for key, value in weights.items() if key != "layer3.0.conv2.weight"}
    save_file(fewer, tmp_path / "fewer.safetensors", metadata=meta)
    assert "layer3.0.conv2.weight" in refused(teacher=tmp_path / "fewer.safetensors")
    info = json.loads(meta["info"]) | {"arch": "resnet18"}
    save_file(weights, tmp_path / "other.safetensors", metadata={"info": json.dumps(info)})
    line = refused(teacher=tmp_path / "other.safetensors")
    assert "resnet18" in line and "layer1.1" in line
    state = ResNet("resnet18", 1, 4).state_dict()
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "fewer.pt")
    assert "layer4.1.conv2.weight" in refused(teacher=tmp_path / "fewer.pt")
    torch.save({"features.0.weight": torch.zeros(8, 1, 3, 3)}, tmp_path / "vgg.pt")
    assert "no ResNet in it" in refused(teacher=tmp_path / "vgg.pt")
    torch.save(ResNet("resnet10", 3, 4).state_dict(), tmp_path / "rgb.pt")
    assert "takes 3 channels, the data has 1" in refused(teacher=tmp_path / "rgb.pt")
    assert "no such file" in refused(teacher=tmp_path / "none.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "fewer.pt").read_bytes()[:2000])
    assert "not a readable checkpoint" in refused(teacher=tmp_path / "half.pt")


def test_an_artefact_or_a_file_of_another_format_as_a_teacher(script, refused, tmp_path):
    line = refused(teacher=script.runs()[0] / "distilled.safetensors")
    assert "distilled" in line and "not a teacher" in line
    path = own_teacher(script)
    info = json.loads(safe_open(path, "pt").metadata()["info"]) | {"format": "teacher 99"}
    save_file(load_file(path), tmp_path / "later.safetensors", metadata={"info": json.dumps(info)})
    assert "teacher 99" in refused(teacher=tmp_path / "later.safetensors")
    path.write_bytes(path.read_bytes()[:500])  # the cached one
    assert "not a readable teacher" in refused(begun=True)


def test_a_broken_checkpoint_of_the_teacher(script, refused):
    path = own_teacher(script)
    path.unlink()
    checkpoint = path.parent / "checkpoint.pt"
    for content in (b"half a file", None):
        if content:
            checkpoint.write_bytes(content)
        else:
            torch.save({"format": "krr_st 1"}, checkpoint)
        line = refused(begun=True)
        assert str(checkpoint) in line and "delete it" in line
        assert checkpoint.exists()


# -------------------------------------------------------------------------------------------------------------- resume


def test_resume_of_what_is_no_run(refused, tmp_path):
    assert "no readable args.json" in refused("--resume", tmp_path / "nowhere")


def test_resume_with_changed_flags(script, refused):
    (folder,) = script.runs()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "--lr-img was" in refused("--resume", folder, "--lr-img", 0.5)
    assert f"{script.count} was" in refused("--resume", folder, script.count, 6)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", ["truncated", "another method's", "of the teacher", "a list", "text"])
def test_a_truncated_or_foreign_checkpoint(script, refused, kind):
    (folder,) = script.runs()
    path = folder / "checkpoint.pt"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("not a checkpoint")
    else:
        foreign = {"another method's": {"format": "other 1", "step": 3}, "of the teacher": {"net": {}}, "a list": [1]}
        torch.save(foreign[kind], path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    line = refused("--resume", folder)
    assert "checkpoint" in line and str(path) in line and "delete it to start over" in line
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_resume_with_other_data(script, refused, tmp_path):
    images(tmp_path / "set" / "cat", 30), images(tmp_path / "set" / "dog", 30, seed=1)
    words = script.words(data=tmp_path / "set", teacher_batch=8)
    done = start(REPO / f"{script.name}.py", words)
    assert done.returncode == 0, done.stderr
    folder = script.runs()[-1] if "set__" in script.runs()[-1].name else script.runs()[0]
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "set" / "cat" / "3.png")
    assert "the data changed" in refused("--resume", folder)


# ------------------------------------------------------------------------------------------------------------ bad luck


def one_line(done) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    return line


def test_a_full_disk_keeps_the_last_checkpoint(script):
    """A file-size limit stands in for it, met half-way through a checkpoint; then there is room again."""
    done = start(REPO / f"{script.name}.py", script.words(seed=1), "run_save:3:disk")
    line = one_line(done)
    assert "checkpoint.pt" in line and "free some space" in line
    folder = next(p for p in script.runs() if not (p / "result.json").exists())
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 4
    assert not list(folder.glob(".*.tmp"))
    done = start(REPO / f"{script.name}.py", ["--resume", folder])
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr


def test_a_disk_that_takes_nothing(script):
    """Not even the first files of a run."""
    done = start(REPO / f"{script.name}.py", script.words(), "begin:1:disk")
    assert "free some space" in one_line(done)


def test_out_of_memory_says_what_to_lower(script):
    """An address-space limit stands in for it, at the second step; the estimate before the start cannot see it."""
    big = {script.count.removeprefix("--").replace("-", "_"): 1437 if "num" in script.count else 100}
    words = script.words(**big, widths=(128, 256), max_age=2, save_every=1, norm="none")
    done = start(REPO / f"{script.name}.py", words, "step:2:memory")
    line = one_line(done)
    assert "out of memory" in line and script.count in line and "--batch-real" in line
    folder = next(p for p in script.runs() if not (p / "result.json").exists())
    assert f"--resume {folder}" in line and load_checkpoint(folder / "checkpoint.pt")["step"] == 1


def test_a_loss_that_is_not_finite_names_its_terms_and_keeps_the_last_checkpoint(script):
    """Targets that explode after a few checkpoints."""
    line = one_line(start(REPO / f"{script.name}.py", script.words(lr_label=1e6, save_every=1, steps=40)))
    assert re.search(r"step \d+: ", line) and "lam = inf" in line and "n_s 5, d 16" in line and "loss " in line
    folder = next(p for p in script.runs() if not (p / "result.json").exists())
    assert f"the last good checkpoint stays in {folder}" in line
    state = load_checkpoint(folder / "checkpoint.pt")
    assert state["step"] >= 1 and state["x_s"].isfinite().all()


def test_pairs_that_are_not_finite_are_not_evaluated(script):
    """At a step that neither logs nor saves but for the curve; the loss is named, not the evaluation's own rate."""
    words = script.words(lr_label=1e6, save_every=100, log_every=100, steps=40, eval_every=10)
    line = one_line(start(REPO / f"{script.name}.py", words))
    assert "step 2 to 10: " in line and "n_s 5, d 16" in line and "pretraining" not in line
    folder = next(p for p in script.runs() if not (p / "result.json").exists())
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 0


def test_a_state_that_is_not_finite_is_not_saved(script):
    """The loss is still finite where the networks no longer are."""
    words = script.words(lr_img=1e12, lr_label=1e30, save_every=1, steps=40)
    line = one_line(start(REPO / f"{script.name}.py", words))
    assert "step 1: pool is not finite (loss " in line and "lam " in line and "n_s 5, d 16" in line
    assert "the last good checkpoint stays" in line and "lower the learning rates" in line
