"""Bad input and bad luck through the command line of every script: one line, exit code 2, nothing lost."""

import importlib
import json
import re
import shutil
import sys
from dataclasses import dataclass, field, fields
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
from common.recipes import SETTINGS
from common.run import load_checkpoint


@dataclass(frozen=True)
class Facts:
    """What these tests must know of a script's method."""

    tiny: dict  # flags of a run of seconds
    count: str  # the flag that says how many images
    many: int  # its value for a thousand images or more
    labelled: bool  # takes labelled images alone
    teacher: bool  # trains one first
    out_of_range: dict  # of the method's own flags: a value, and what it must be
    cached: dict  # flags of a method that keeps what --cache-gb allows
    sizes: str  # of the tiny run, in messages: distilled images, features of the ConvNet
    exploding: dict  # flags with which the loss is not finite after a few checkpoints
    exploded: str  # what the message then says of its terms
    folder: dict = field(default_factory=dict)  # further flags for a folder of fifty images
    kind: str = ""  # of the teacher's folder, where there are several
    curve: bool = True  # --eval-every, and a state of networks between the steps
    huge: tuple[dict, str] = (dict(widths=(2**10, 2**19), norm="none"), "--widths")  # terabytes, and what sets them
    big: dict = field(default_factory=lambda: dict(widths=(128, 256), max_age=2, norm="none"))  # 30 MB are too few
    lower: str = "--batch-real"  # beside the number of images, when memory runs out


STUDENTS = dict(  # of the scripts whose sets are scored by students
    tiny=dict(
        steps=12, ipc=1, batch_real=64, widths=(4, 4), pool=3, max_age=4, log_every=1, save_every=4, device="cpu",
        eval_runs=2, eval_steps=6,
    ),
    count="ipc",
    many=100,
    labelled=True,
    teacher=False,
    cached=dict(channels="rgb"),  # whitened images
    sizes="n_s 10, d 36",
    exploding=dict(lr_label=1e20),  # LAMB moves the labels by this times their norm: at the second step
    exploded="(loss inf, kernel ",
)  # fmt: skip
OF_STUDENTS = dict(
    online_batch=(0, "at least 1"), eval_batch=(0, "at least 1"), zca_reg=(-1.0, "at least 0"),
    eval_lr=(-1.0, "at least 0"), eval_steps=(-1, "at least 0"), eval_temperature=(0.0, "at least 1e-06"),
)  # fmt: skip
SCRIPTS = {
    "krr_st": Facts(
        tiny=dict(
            steps=12, num_images=5, batch_real=64, widths=(4, 4), pool=3, max_age=4, log_every=1, save_every=4,
            device="cpu", teacher_width=2, teacher_epochs=2, teacher_projector=8, eval_runs=2, eval_epochs=4,
            eval_probe_steps=3, eval_finetune_steps=2,
        ),
        count="num_images",
        many=1437,
        labelled=False,
        teacher=True,
        out_of_range=dict(
            eval_epochs=(0, "at least 1"), teacher_lr=(-1.0, "in 0 .. 1e+06"), eval_finetune_steps=(-1, "at least 0"),
            stem_padding=(-5, "at least 0"), teacher_crop_min=(1.5, "in 0.0001 .. 1"),
        ),
        cached=dict(outer_aug="crop_flip"),  # the targets of all variants: digits have 9 each
        sizes="n_s 5, d 16",
        exploding=dict(lr_label=1e6),
        exploded="lam = inf",
        folder=dict(teacher_batch=8),
    ),
    "frepo": Facts(out_of_range=OF_STUDENTS, **STUDENTS),
    "scdd": Facts(
        tiny=dict(
            steps=12, ipc=1, recover_batch=10, teacher_width=4, teacher_epochs=1, teacher_queue=256, probe_epochs=1,
            label_width=4, label_epochs=1, log_every=1, save_every=4, device="cpu", eval_runs=2, eval_epochs=1,
            eval_width=4, eval_batch=10,
        ),
        count="ipc",
        many=100,
        labelled=True,
        teacher=True,
        out_of_range=dict(
            recover_batch=(0, "at least 1"), lr_img=(-1.0, "in 0 .. 1e+06"), r_bn=(1e38, "in 0 .. 1e+06"),
            first_bn_multiplier=(-1.0, "in 0 .. 1e+06"), crop_min=(1.5, "in 0.0001 .. 1"),
            residual=(-0.5, "in 0 .. 1"), segments=(0, "at least 1"),
            teacher_lr=(-1.0, "in 0 .. 1e+06"), stem_padding=(-5, "at least 0"),
            teacher_crop_min=(1.5, "in 0.0001 .. 1"),
            eval_batch=(1, "at least 2"), eval_epochs=(0, "at least 1"), probe_epochs=(0, "at least 1"),
            label_epochs=(0, "at least 1"),
        ),
        cached={},
        sizes="distilled, images 0 to 9",
        exploding={},  # the pixels are clamped, the rates and weights limited: see test_scdd.py
        exploded="",
        folder=dict(
            teacher_arch="resnet10", label_arch="resnet10", eval_arch="resnet10", teacher_batch=8, probe_augment="False"
        ),
        kind="-moco2-",
        curve=False,
        huge=(dict(teacher_width=2**17), "--teacher-width"),
        big=dict(teacher_width=64, recover_batch=1000),
        lower="--recover-batch",
    ),
    "isa": Facts(
        out_of_range=OF_STUDENTS | dict(topk=(-1.5, "in -1 .. 1"), epsilon=(-0.5, "at least 0")), **STUDENTS
    ),
    "boost_pca": Facts(
        tiny=dict(
            steps=12, budget_images=12, num_images=5, batch_real=64, image_bases=6, feature_bases=5, hidden=2,
            approx_steps=10, widths=(4, 4), pool=3, max_age=4, log_every=1, save_every=4, device="cpu",
            teacher_width=2, teacher_epochs=2, teacher_projector=8, eval_runs=2, eval_epochs=2, eval_probe_steps=3,
            eval_finetune_steps=0, pairs_steps=6, views="rotations", downsample=2,
        ),
        count="num_images",
        many=1437,
        labelled=False,
        teacher=True,
        out_of_range=dict(
            budget_images=(0, "at least 1"), image_bases=(0, "at least 1"), feature_bases=(0, "at least 1"),
            downsample=(0, "at least 1"), hidden=(0, "at least 1"), approx_steps=(0, "at least 1"),
            approx_lr=(-1.0, "at least 0"), pairs_steps=(0, "at least 1"), pairs_lr_img=(-1.0, "at least 0"),
            pairs_lr_label=(-1.0, "at least 0"), eval_epochs=(0, "at least 1"),
            eval_finetune_steps=(-1, "at least 0"), stem_padding=(-5, "at least 0"),
            teacher_lr=(-1.0, "in 0 .. 1e+06"), teacher_crop_min=(1.5, "in 0.0001 .. 1"),
        ),
        cached={},
        sizes="n_s 20, d 16",
        exploding=dict(lr_label=1e6),
        exploded="lam = inf",
        folder=dict(teacher_batch=8),
        huge=(dict(widths=(2**10, 2**19), norm="none", budget_images=300, views="none"), "--widths"),
        big=dict(widths=(128, 256), max_age=2, norm="none", budget_images=300),
    ),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dashed(flag: str) -> str:
    return "--" + flag.replace("_", "-")


class Script:
    """A script, what is to know of it, and an out-dir with whole runs."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.facts = name, folder, SCRIPTS[name]
        self.path, self.out_dir = REPO / f"{name}.py", folder / "runs"
        self.count = dashed(self.facts.count)

    def words(self, **changes) -> list[str]:
        own = self.facts.tiny
        if "teacher" in changes:  # which is trained already: no settings beside it
            own = {key: value for key, value in own.items() if key.removeprefix("teacher_") not in SETTINGS}
        return flags(**own | {"out_dir": self.out_dir, "data_dir": self.folder / "data"} | changes)

    def runs(self) -> list[Path]:
        if not self.out_dir.is_dir():
            return []
        return sorted(p for p in self.out_dir.iterdir() if p.name != "teachers")

    def unfinished(self) -> Path:
        (folder,) = (p for p in self.runs() if not (p / "result.json").exists())
        return folder


SLOW = {  # what all scripts share is tried by the first of them
    "frepo": [pytest.mark.slow],
    "isa": [pytest.mark.slow],
    "scdd": [pytest.mark.slow],
    "boost_pca": [pytest.mark.slow],
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW.get(name, [])) for name in SCRIPTS])
def finished(request, tmp_path_factory):
    """A whole run of the script, not to be changed."""
    script = Script(request.param, tmp_path_factory.mktemp(request.param))
    done = start(script.path, script.words())
    assert done.returncode == 0, done.stderr
    return script


@pytest.fixture
def script(finished, tmp_path):
    """The script with a copy of the finished run and of its teacher."""
    shutil.copytree(finished.out_dir, tmp_path / "runs")
    return Script(finished.name, tmp_path)


@pytest.fixture
def own_teacher(script):
    """The file of the teacher that the finished run trained."""
    if not script.facts.teacher:
        pytest.skip(f"{script.name} has no teacher")
    (folder,) = (path for path in (script.out_dir / "teachers").iterdir() if script.facts.kind in path.name)
    return folder / "teacher.safetensors"


@pytest.fixture
def refused(script, monkeypatch, capsys):
    """The line on the error stream of a command that must exit with 2; no run folder may be begun unless `begun`.

    by: the script that is called, if not this one.
    """

    def check(*words, by=script.name, begun=False, **changes) -> str:
        module, before = importlib.import_module(by), script.runs()
        command = [f"{by}.py", *map(str, words)]
        if "--resume" not in words:
            command += script.words(**changes)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            common.run.cli(module.main, module.Args)
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
    if not script.facts.labelled:
        pytest.skip(f"{script.name} needs no classes")
    images(tmp_path / "one" / "cat", 20)
    assert "only one class" in refused(data=tmp_path / "one")


def test_images_without_labels(script, refused, tmp_path):
    if not script.facts.labelled:
        pytest.skip(f"{script.name} needs no classes")
    images(tmp_path / "flat", 20)
    assert "this method needs labels" in refused(data=tmp_path / "flat")


def test_a_corrupt_image_is_named_and_can_be_skipped(script, refused, tmp_path):
    images(tmp_path / "set" / "cat", 30), images(tmp_path / "set" / "dog", 30, seed=1)
    whole = (tmp_path / "set" / "dog" / "7.png").read_bytes()
    (tmp_path / "set" / "dog" / "7.png").write_bytes(whole[: len(whole) // 2])
    line = refused(data=tmp_path / "set")
    assert "dog/7.png" in line and "--skip-bad-images" in line
    done = start(script.path, script.words(data=tmp_path / "set", skip_bad_images=True, **script.facts.folder))
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
    assert f"{script.count} 0: must be 1 to " in refused(**{script.facts.count: 0})
    assert f"{script.count} 99999: must be 1 to " in refused(**{script.facts.count: 99999})
    one, zero, share = "at least 1", "at least 0", "in 0 .. "
    flags_of_all = dict(
        steps=(0, one), batch_real=(0, one), save_every=(0, one), log_every=(0, one), pool=(0, one), max_age=(0, one),
        eval_runs=(0, one), chunk=(0, one), cache_gb=(-1.0, zero), save_minutes=(-1.0, zero), lr_img=(-1.0, zero),
        lr_label=(-1.0, zero), lr_net=(-1.0, zero), ridge=(-1.0, zero), holdout=(1.5, share), lr_end=(1.5, share),
    )  # fmt: skip
    known = {each.name for each in fields(importlib.import_module(script.name).Args)}
    assert script.facts.out_of_range.keys() <= known
    for flag, (value, bound) in (flags_of_all | script.facts.out_of_range).items():
        if flag in known:
            assert f"{dashed(flag)} {value}: must be {bound}" in refused(**{flag: value})
    assert "--size 3: must be at least 4" in refused(size=3)
    if "widths" in known:
        assert "--widths 0" in refused(widths=(0, 4))
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
    huge, flag = script.facts.huge
    line = refused(**{script.facts.count: script.facts.many}, **huge)
    assert "memory" in line and flag in line.split("set by")[1] and ": lower it" in line
    if script.facts.cached:  # what it keeps is counted, not what it might
        done = start(script.path, script.words(cache_gb=50_000, **script.facts.cached))
        assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------------- teacher


def test_a_teacher_with_missing_keys_or_another_architecture(own_teacher, refused, tmp_path):
    weights, meta = load_file(own_teacher), safe_open(own_teacher, "pt").metadata()
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


def test_an_artefact_or_a_file_of_another_format_as_a_teacher(script, own_teacher, refused, tmp_path):
    line = refused(teacher=script.runs()[0] / "distilled.safetensors")
    assert "distilled" in line and "not a teacher" in line
    info = json.loads(safe_open(own_teacher, "pt").metadata()["info"]) | {"format": "teacher 99"}
    save_file(load_file(own_teacher), tmp_path / "later.safetensors", metadata={"info": json.dumps(info)})
    assert "teacher 99" in refused(teacher=tmp_path / "later.safetensors")
    own_teacher.write_bytes(own_teacher.read_bytes()[:500])  # the cached one
    assert "not a readable teacher" in refused(begun=True)


def test_a_broken_checkpoint_of_the_teacher(own_teacher, refused):
    own_teacher.unlink()
    checkpoint = own_teacher.parent / "checkpoint.pt"
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
    before = contents(folder)
    assert "--lr-img was" in refused("--resume", folder, "--lr-img", 0.5)
    assert f"{script.count} was" in refused("--resume", folder, script.count, 6)
    assert before == contents(folder)


def test_resume_of_another_scripts_run(script, refused):
    """With a checkpoint, or killed before its first one."""
    (folder,) = script.runs()
    for _ in range(2):
        before = contents(folder)
        for other in SCRIPTS.keys() - {script.name}:
            line = refused("--resume", folder, by=other)
            said = f"a run of {script.name}.py, not of {other}.py" in line or "made by another script" in line
            assert str(folder) in line and said, line
        assert before == contents(folder)
        (folder / "checkpoint.pt").unlink(missing_ok=True)


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
    before = contents(folder)
    line = refused("--resume", folder)
    assert "checkpoint" in line and str(path) in line and "delete it to start over" in line
    assert before == contents(folder)


def test_resume_with_other_data(script, refused, tmp_path):
    images(tmp_path / "set" / "cat", 30), images(tmp_path / "set" / "dog", 30, seed=1)
    done = start(script.path, script.words(data=tmp_path / "set", **script.facts.folder))
    assert done.returncode == 0, done.stderr
    (folder,) = (p for p in script.runs() if p.name.startswith("set__"))
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
    line = one_line(start(script.path, script.words(seed=1), "run_save:3:disk"))
    assert "checkpoint.pt" in line and "free some space" in line
    folder = script.unfinished()
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 4
    assert not list(folder.glob(".*.tmp"))
    done = start(script.path, ["--resume", folder])
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr


def test_a_disk_that_takes_nothing(script):
    """Not even the first files of a run."""
    assert "free some space" in one_line(start(script.path, script.words(), "begin:1:disk"))


def test_out_of_memory_says_what_to_lower(script):
    """An address-space limit stands in for it, at the second step; the estimate before the start cannot see it."""
    words = script.words(save_every=1, **{script.facts.count: script.facts.many}, **script.facts.big)
    line = one_line(start(script.path, words, "step:2:memory"))
    assert "out of memory" in line and script.count in line and script.facts.lower in line
    folder = script.unfinished()
    assert f"--resume {folder}" in line and load_checkpoint(folder / "checkpoint.pt")["step"] == 1


def test_a_loss_that_is_not_finite_names_its_terms_and_keeps_the_last_checkpoint(script):
    """Labels that explode after a few checkpoints."""
    facts = script.facts
    if not facts.exploding:
        pytest.skip(f"{script.name} has no flag that makes its loss explode")
    line = one_line(start(script.path, script.words(save_every=1, steps=40, **facts.exploding)))
    assert re.search(r"step \d+: ", line) and facts.exploded in line and facts.sizes in line and "loss " in line
    folder = script.unfinished()
    assert f"the last good checkpoint stays in {folder}" in line
    state = load_checkpoint(folder / "checkpoint.pt")
    learned = state.get("learned", {"x_s": state.get("x_s")})
    assert state["step"] >= 1 and all(value.isfinite().all() for value in learned.values())


def test_a_set_that_is_not_finite_is_not_evaluated(script):
    """At a step that neither logs nor saves but for the curve; the loss is named, not the evaluation's own rate."""
    if not script.facts.curve:
        pytest.skip(f"{script.name} has no curve, and looks at every last step")
    words = script.words(save_every=100, log_every=100, steps=40, eval_every=10, **script.facts.exploding)
    line = one_line(start(script.path, words))
    assert "step 2 to 10: " in line and script.facts.sizes in line
    assert "pretraining" not in line and "student" not in line
    assert load_checkpoint(script.unfinished() / "checkpoint.pt")["step"] == 0


def test_a_state_that_is_not_finite_is_not_saved(script):
    """The loss is still finite where the networks no longer are."""
    if not script.facts.curve:
        pytest.skip(f"{script.name} keeps no networks between its steps")
    words = script.words(lr_img=1e12, lr_label=1e30, save_every=1, steps=40)
    line = one_line(start(script.path, words))
    assert "step 1: pool is not finite (loss " in line and "lam " in line and script.facts.sizes in line
    assert "the last good checkpoint stays" in line and "lower the learning rates" in line
