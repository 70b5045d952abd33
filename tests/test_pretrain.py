"""common/pretrain.py: Barlow Twins against loops, training that stops and goes on, every way to load a teacher."""

import argparse
import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import types
import urllib.error

import pytest
import torch
import torchvision
from conftest import refuse
from safetensors.torch import save_file
from torch import nn

import common.barlow
import common.pretrain
import common.run
import common.teacher
import kernels.barlow
from common.artefact import save_distilled
from common.augment import draw_variants, num_variants
from common.barlow import barlow_loss, projector, train_barlow
from common.data import load, normalise
from common.models import ResNet
from common.pretrain import cosine_lr, knn_accuracy, lars_
from common.run import Stopped, all_finite, catch_signals, rng, seed_of
from common.teacher import IMAGENET, AugmentedTargets, Teacher, load_teacher

F64 = torch.float64
CPU = torch.device("cpu")
TINY = dict(arch="resnet10", width=4, epochs=3, batch=128, eta=0.002, projector_width=16, crop_min=0.4)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def few(digits):
    """256 training and 60 test images: two steps an epoch."""
    parts = dict(x_train=digits.x_train[:256], y_train=digits.y_train[:256])
    return dataclasses.replace(digits, **parts, x_test=digits.x_test[:60], y_test=digits.y_test[:60], content="f" * 64)


@pytest.fixture(scope="module")
def trained(few, tmp_path_factory):
    """(teacher, the folder of teachers)."""
    place = tmp_path_factory.mktemp("teachers")
    return train_barlow(few, place, CPU, **TINY), place


@pytest.fixture(scope="module")
def colour():
    """Twelve colour images as a Data; only what load_teacher reads is real."""
    x = torch.randint(0, 256, (12, 3, 32, 32), generator=gen(), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.3, 0.2])
    return common.data.Data("colour", x, None, x[:4], None, [], mean, std, "none", "c" * 64, True)


def same(a, b):
    a, b = a.net.state_dict(), b.net.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def forbid(*_, **__):
    raise AssertionError("this must not be called")


# --------------------------------------------------------------------------------------------------------- Barlow Twins


def test_the_loss_is_that_of_the_float32_projections(few, monkeypatch, tmp_path):
    """Also where the networks run in bf16; the loss itself: tests/test_barlow.py."""
    assert common.barlow.barlow_loss is kernels.barlow.barlow_loss
    calls = []

    def record(*args):
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(common.barlow, "barlow_loss", record)
    with pytest.raises(KeyboardInterrupt):
        train_barlow(few, tmp_path, CPU, **TINY | dict(precision="bf16", off_diagonal=0.3))
    ((z_1, z_2, off_diagonal),) = calls
    assert z_1.dtype == z_2.dtype == torch.float32 and z_1.shape == z_2.shape == (128, 16)
    assert torch.equal(z_1, z_1.bfloat16().float())  # the networks did run in bf16
    assert z_1.requires_grad and z_2.requires_grad and not torch.equal(z_1, z_2) and off_diagonal == 0.3


def test_projector_has_two_hidden_layers_with_batch_norm():
    kinds = [type(layer) for layer in projector(3, 8)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert sum(p.numel() for p in projector(3, 8).parameters()) == 3 * 8 + 8 * 8 + 8 * 8 + 4 * 8


# ----------------------------------------------------------------------------------------------------------------- LARS


def test_lars_is_the_loop():
    """One layer each: scaled, clipped, without gradient, without weight, one-dimensional."""
    lr, eta, decay = 0.3, 0.02, 0.01
    params = [torch.randn(shape, dtype=F64, generator=gen(i)) for i, shape in enumerate([(4, 3), (2, 3, 2, 2), (5, 2)])]
    params += [torch.zeros(3, 3, dtype=F64), torch.randn(6, dtype=F64, generator=gen(9))]
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, dtype=F64, generator=gen(20 + i))
    params[1].grad *= 1e-5  # its ratio is above lr: clipped
    params[2].grad.zero_()
    kinds, expected = [], []
    for p in params:
        p_norm, g_norm, scale = p.square().sum().sqrt().item(), p.grad.square().sum().sqrt().item(), 1.0
        if p.ndim == 1:
            kinds.append("left alone")
            expected.append(p.grad.clone())
            continue
        if p_norm > 0 and g_norm > 0:
            ratio = eta * p_norm / (g_norm + decay * p_norm + 1e-8)
            scale = min(ratio / lr, 1.0)
        kinds.append("scaled" if scale < 1 else "whole")
        expected.append((p.grad + decay * p) * scale)
    assert kinds == ["scaled", "whole", "whole", "whole", "left alone"]
    lars_(params, lr, eta, decay)
    for p, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-12, atol=0)


def test_cosine_lr_warms_up_and_ends_at_zero():
    lr, steps, warmup = 0.6, 50, 10
    for step in range(steps + 1):
        if step < warmup:
            expected = max(lr * 1e-4, lr * step / warmup)
        else:
            expected = lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        assert cosine_lr(step, steps, warmup, lr) == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert cosine_lr(0, steps, warmup, lr) == pytest.approx(6e-5)  # solo-learn: 3e-5 for 0.3
    assert cosine_lr(0, 1, 1, 0.5) > 0


# ----------------------------------------------------------------------------------------------------------------- k-NN


def naive_knn(f_train, y_train, f_test, y_test, k):
    right = 0
    for f, y in zip(f_test, y_test, strict=True):
        near = [
            ((f @ g / f.norm() / g.norm()).item(), label) for g, label in zip(f_train, y_train.tolist(), strict=True)
        ]
        votes = {}
        for similarity, label in sorted(near, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / 0.07)
        right += max(votes, key=votes.get) == y
    return right / len(f_test)


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_accuracy_is_the_loop(k):
    y_train, y_test = torch.arange(60) % 3, torch.arange(40) % 3
    f_train, f_test = (torch.randn(n, 4, generator=gen(n)) for n in (60, 40))
    centres = torch.randn(3, 4, generator=gen(7))
    f_train, f_test = f_train + centres[y_train], 3 * (f_test + centres[y_test])
    expected = naive_knn(f_train, y_train, f_test, y_test, k)
    assert 0.4 < expected < 0.95  # neither chance nor certain
    assert knn_accuracy(f_train, y_train, f_test, y_test, k) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------- training


def test_a_teacher_describes_itself(trained, few):
    teacher, place = trained
    assert teacher.folder.parent == place and teacher.dim == 32
    assert teacher.folder.name.startswith("digits-barlow-resnet10x4-3ep-s0-")
    assert len(teacher.folder.name.rsplit("-", 1)[1]) == 8
    assert [file.name for file in teacher.folder.iterdir()] == ["teacher.safetensors"]  # no checkpoint left
    info = teacher.info
    assert torch.equal(teacher.mean, few.mean) and torch.equal(teacher.std, few.std)
    assert torch.tensor(info["mean"]).equal(few.mean) and torch.tensor(info["std"]).equal(few.std)
    facts = dict(method="barlow", stem="cifar", stem_padding=2, content=few.content, flip=False, seed=0, channels=1)
    assert facts.items() <= info.items()
    assert set(info["knn"]) == {"1", "2", "3"} and 0.3 < info["knn"]["3"] <= 1
    assert not teacher.net.training and not any(p.requires_grad for p in teacher.net.parameters())
    assert all(value.isfinite().all() for value in teacher.net.state_dict().values())


def test_a_trained_teacher_is_not_trained_again(trained, few, monkeypatch):
    teacher, place = trained
    monkeypatch.setattr(common.barlow, "barlow_loss", forbid)
    again = train_barlow(few, place, CPU, **TINY)
    assert same(again, teacher) and again.info == teacher.info


def test_how_often_it_is_saved_does_not_make_another_teacher(trained, few, monkeypatch):
    monkeypatch.setattr(common.barlow, "barlow_loss", forbid)
    assert same(train_barlow(few, trained[1], CPU, **TINY, save_minutes=1.0), trained[0])


@pytest.mark.parametrize(
    "change",
    [dict(seed=1), dict(epochs=4), dict(lr=0.2), dict(stem_padding=1), dict(crop_min=0.5), dict(eta=0.02),
     dict(weight_decay=0.0), dict(off_diagonal=0.1), dict(precision="bf16"), dict(projector_width=8),
     dict(batch=64), dict(width=2), dict(arch="resnet18"), "content", "flip"],
    ids=str,
)  # fmt: skip
def test_anything_else_is_another_teacher(trained, few, monkeypatch, tmp_path, change):
    """The folder is made before the first step, which is forbidden here."""
    monkeypatch.setattr(common.barlow, "barlow_loss", forbid)
    teacher, _ = trained
    data, settings = few, TINY
    if isinstance(change, str):
        data = dataclasses.replace(few, **{change: {"content": "e" * 64, "flip": True}[change]})
    else:
        settings = TINY | change
    with pytest.raises(AssertionError, match="must not be called"):
        train_barlow(data, tmp_path, CPU, **settings)
    (folder,) = tmp_path.iterdir()
    assert folder.name != teacher.folder.name
    if isinstance(change, dict) and "epochs" in change:
        assert "-4ep-" in folder.name
    if isinstance(change, dict) and "seed" in change:
        assert "-s1-" in folder.name


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_stopped_teacher_goes_on_bit_for_bit(trained, few, monkeypatch, tmp_path, epoch):
    teacher, _ = trained
    calls, whole = [], common.barlow.barlow_loss

    def stop(*args):
        calls.append(1)
        if len(calls) == 2 * epoch + 2:  # the second step of that epoch; two an epoch
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(common.barlow, "barlow_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train_barlow(few, tmp_path, CPU, **TINY)
    calls.clear()
    monkeypatch.setattr(common.barlow, "barlow_loss", lambda *args: calls.append(1) or whole(*args))
    torch.rand(5)  # the global generator is elsewhere by now
    resumed = train_barlow(few, tmp_path, CPU, **TINY)
    assert len(calls) == 2 * (3 - epoch)
    assert same(resumed, teacher)
    assert resumed.info | {"seconds": 0} == teacher.info | {"seconds": 0}


@pytest.fixture
def handlers():
    """Puts back what catch_signals replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    catch_signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def signal_at(monkeypatch, number, at):
    """The process gets the signal while it draws the views of the `at`-th step from now (1: the next); counts steps."""
    steps, whole = [], common.augment.two_views

    def two_views(*args):
        steps.append(args[1].initial_seed())
        if len(steps) == at:
            os.kill(os.getpid(), number)
        return whole(*args)

    catch_signals()
    monkeypatch.setattr(common.barlow, "two_views", two_views)
    return steps


def test_signals_at_any_step_change_nothing(trained, few, monkeypatch, tmp_path, handlers):
    """Sessions of 1, 1, 1 and 2 steps: stops within an epoch, at an epoch's end, after one within; then the rest."""
    done, seeds = [], []
    for number, at in ((signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)):
        steps = signal_at(monkeypatch, number, at)
        with pytest.raises(Stopped):
            train_barlow(few, tmp_path, CPU, **TINY)
        (path,) = tmp_path.rglob("checkpoint.pt")
        done.append(common.run.load_checkpoint(path)["step"])
        seeds += steps
        torch.rand(5)  # the global generator is elsewhere by now
    assert done == [1, 2, 3, 5] and not list(tmp_path.rglob("*.safetensors"))
    steps = signal_at(monkeypatch, signal.SIGTERM, 0)  # never
    resumed = train_barlow(few, tmp_path, CPU, **TINY)
    seeds += steps
    assert seeds == [seed_of("teacher views", 0, epoch, i) for epoch in range(3) for i in range(2)]
    assert same(resumed, trained[0]) and not path.exists()
    assert resumed.info | {"seconds": 0} == trained[0].info | {"seconds": 0}


def test_a_signal_in_the_last_step_finds_the_teacher_finished(trained, few, monkeypatch, tmp_path, handlers):
    signal_at(monkeypatch, signal.SIGTERM, 6)
    with pytest.raises(Stopped):
        train_barlow(few, tmp_path, CPU, **TINY)
    catch_signals()
    monkeypatch.setattr(common.barlow, "barlow_loss", forbid)
    assert same(train_barlow(few, tmp_path, CPU, **TINY), trained[0])
    (folder,) = tmp_path.iterdir()
    assert [file.name for file in folder.iterdir()] == ["teacher.safetensors"]


@pytest.mark.parametrize(("due", "expected"), [((), [2, 4]), ((1, 2, 5), [1, 2, 4, 5]), (range(7), [1, 2, 3, 4, 5])])
def test_checkpoints_at_epochs_and_on_time(trained, few, monkeypatch, tmp_path, due, expected):
    """Six steps, two an epoch; `due`: after which of them the time has come."""
    steps, saved, starts, write = [0], [], [], common.run.write_atomic

    class Clock(common.run.Interval):
        def start(self):
            starts.append(steps[0])

        def due(self):
            return steps[0] in due

    def write_atomic(path, writer):
        write(path, writer)
        if path.name == "checkpoint.pt":
            saved.append(common.run.load_checkpoint(path)["step"])

    def optimise(*args):
        steps[0] += 1
        lars_(*args)

    monkeypatch.setattr(common.pretrain, "Interval", Clock)
    monkeypatch.setattr(common.barlow, "lars_", optimise)
    monkeypatch.setattr(common.pretrain, "write_atomic", write_atomic)
    assert same(train_barlow(few, tmp_path, CPU, **TINY), trained[0])
    assert saved == expected
    assert starts == [0, *expected]  # the time runs anew from each


def test_the_time_between_checkpoints_is_in_minutes(few, monkeypatch, tmp_path):
    asked, whole = [], common.run.Interval
    monkeypatch.setattr(common.pretrain, "Interval", lambda minutes: asked.append(minutes) or whole(minutes))
    train_barlow(few, tmp_path, CPU, **TINY | dict(epochs=1))
    train_barlow(few, tmp_path, CPU, **TINY | dict(epochs=1, seed=1), save_minutes=2.5)
    assert asked == [10.0, 2.5]


def test_the_loss_falls_on_digits(digits, monkeypatch, tmp_path):
    losses, whole = [], common.barlow.barlow_loss

    def record(*args):
        loss = whole(*args)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(common.barlow, "barlow_loss", record)
    train_barlow(digits, tmp_path, CPU, **TINY | dict(epochs=8))
    per_epoch = torch.tensor(losses).view(8, -1).mean(1)
    assert len(losses) == 8 * (1437 // 128)
    assert per_epoch[-1] < 0.5 * per_epoch[0]


def test_a_diverged_teacher_is_refused(few, monkeypatch, tmp_path):
    monkeypatch.setattr(common.barlow, "barlow_loss", lambda z_1, z_2, _: (z_1 * torch.nan).sum())
    line = refuse(lambda: train_barlow(few, tmp_path, CPU, **TINY), "epoch 1, step 2: loss is nan", "--teacher-lr")
    assert "learning rate 0.075);" in line  # the second of two warm-up steps to 0.3 * 128 / 256
    (folder,) = tmp_path.iterdir()
    assert str(folder) in line and not list(folder.iterdir())


@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize("of", ["loss", "weight"])
def test_what_is_not_finite_is_never_saved(trained, few, monkeypatch, tmp_path, handlers, at, of):
    """In the third step, which a signal ends, and in the last; a weight's while the loss is still finite."""
    steps = signal_at(monkeypatch, signal.SIGTERM, at if at == 3 else 0)

    def loss(*args):
        return barlow_loss(*args) * (torch.nan if len(steps) == at else 1)

    def optimise(params, *rest):
        lars_(params, *rest)
        if len(steps) == at:
            params[0].grad[0] = torch.inf

    name, fault = {"loss": ("barlow_loss", loss), "weight": ("lars_", optimise)}[of]
    with monkeypatch.context() as patch:
        patch.setattr(common.barlow, name, fault)
        epoch = (at + 1) // 2
        line = refuse(lambda: train_barlow(few, tmp_path, CPU, **TINY), f"epoch {epoch}, step {at}:", "not finite")
    terms = dict(part.rsplit(" ", 1) for part in line[line.index("(") + 1 : line.index(")")].split(", "))
    assert list(terms) == ["diagonal", "off-diagonal", "embedding std", "learning rate"]
    on, off, *_ = (float(value) for value in terms.values())
    value = float(line.split("loss is ")[1].split(" ", 1)[0])
    assert math.isnan(value) if of == "loss" else value == pytest.approx(0.1 * (on + 0.0051 * off), rel=1e-2)
    (path,) = tmp_path.rglob("*.*")
    state = common.run.load_checkpoint(path)
    assert path.name == "checkpoint.pt" and state["step"] == 2 * (epoch - 1) and all_finite(state)
    signal_at(monkeypatch, signal.SIGTERM, 0)
    assert same(train_barlow(few, tmp_path, CPU, **TINY), trained[0])


def test_a_checkpoint_that_does_not_fit_is_named(few, monkeypatch, tmp_path, handlers):
    signal_at(monkeypatch, signal.SIGTERM, 1)
    with pytest.raises(Stopped):
        train_barlow(few, tmp_path, CPU, **TINY)
    (path,) = tmp_path.rglob("checkpoint.pt")
    whole, state = path.read_bytes(), common.run.load_checkpoint(path)
    catch_signals()
    monkeypatch.setattr(common.barlow, "barlow_loss", forbid)

    def check(*words):
        refuse(
            lambda: train_barlow(few, tmp_path, CPU, **TINY), str(path), "delete it to train the teacher anew", *words
        )

    for damaged in (whole[: len(whole) // 2], b"", b"<html>"):
        path.write_bytes(damaged)
        check("unreadable")
    older = {key: value for key, value in state.items() if key not in ("format", "step")} | {"epoch": 1}
    wider = state | {"net": ResNet("resnet10", 1, 8).state_dict()}
    other = state | {"optimizer": torch.optim.SGD([torch.zeros(2)], lr=1.0).state_dict()}
    without = {key: value for key, value in state.items() if key != "step"}
    for foreign, word in (
        (older, "format None"),
        ({"format": "krr_st 1", "step": 3}, "format krr_st 1"),
        (wider, "size mismatch"),
        (other, "parameter group"),
        (without, "'step'"),
        ([torch.zeros(2)], "list"),
    ):
        torch.save(foreign, path)
        check(word)
    path.write_bytes(whole)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):  # of the device: the checkpoint is good
        train_barlow(few, tmp_path, CPU, **TINY)


def test_views_are_drawn_without_flips_for_digits(few, monkeypatch, tmp_path):
    asked, whole = [], common.barlow.two_views

    def record(x, generator, scale, flip):
        asked.append((scale, flip, x.max().item() <= 1))
        return whole(x, generator, scale, flip)

    monkeypatch.setattr(common.barlow, "two_views", record)
    train_barlow(few, tmp_path, CPU, **TINY | dict(epochs=1))
    assert asked == [((0.4, 1.0), False, True)] * 2


def test_every_step_is_lars_at_the_scheduled_rate(few, monkeypatch, tmp_path):
    calls, whole = [], common.barlow.lars_

    def record(params, lr, eta, weight_decay):
        calls.append((len(params), lr, eta, weight_decay))
        whole(params, lr, eta, weight_decay)

    monkeypatch.setattr(common.barlow, "lars_", record)
    train_barlow(few, tmp_path, CPU, **TINY)
    n = len(list(ResNet("resnet10", 1, 4).parameters())) + len(list(projector(32, 16).parameters()))
    rates = [cosine_lr(step, 6, 2, 0.3 * 128 / 256) for step in range(6)]  # one warm-up epoch of two steps
    assert calls == [(n, rate, 0.002, 1e-4) for rate in rates]


def test_a_folder_that_cannot_be_made_is_named(few, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(lambda: train_barlow(few, tmp_path / "file", CPU, **TINY), str(tmp_path / "file"), "--out-dir")


# -------------------------------------------------------------------------------------------------------------- targets


def test_targets_are_the_networks_features(trained, few):
    teacher, _ = trained
    expected = teacher.net(normalise(few.x_test, few.mean, few.std))
    torch.testing.assert_close(teacher.targets(few.x_test, CPU, chunk=7), expected, rtol=0, atol=1e-5)
    floats = teacher.targets(few.x_test.float() / 255, CPU)
    assert torch.equal(floats, teacher.targets(few.x_test, CPU))
    assert floats.dtype == torch.float32 and not floats.requires_grad
    thawed = Teacher(resnet("resnet10", width=4, channels=1), 32, few.mean, few.std, "thawed", {}, None)
    assert not thawed.features(few.x_test, CPU).requires_grad


def test_targets_are_cached_by_content_split_and_weights(trained, few, tmp_path, monkeypatch):
    """A copy in another folder, as the module's teacher must stay without targets."""
    teacher = dataclasses.replace(trained[0], folder=tmp_path)
    expected = teacher.targets(few.x_test, CPU)
    assert torch.equal(teacher.cached_targets(few.x_test, few.content, "test", CPU), expected)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "targets", forbid)
        assert torch.equal(teacher.cached_targets(few.x_test, few.content, "test", CPU), expected)
        other_weights = dataclasses.replace(teacher, info=teacher.info | {"weights_sha256": "0" * 64})
        for asked in (
            (teacher, "e" * 64, "test"),
            (teacher, few.content, "train"),
            (other_weights, few.content, "test"),
        ):
            with pytest.raises(AssertionError, match="must not be called"):
                asked[0].cached_targets(few.x_test, asked[1], asked[2], CPU)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", save_bytes({"other": expected}, tmp_path)):
        path.write_bytes(damaged)
        assert torch.equal(teacher.cached_targets(few.x_test, few.content, "test", CPU), expected)
        assert path.read_bytes() == whole
    fewer = teacher.cached_targets(few.x_test[:5], few.content, "test", CPU)
    assert torch.equal(fewer, teacher.targets(few.x_test[:5], CPU))


def test_targets_of_a_folder_that_is_read_only_are_computed(trained, few, tmp_path, monkeypatch, capsys):
    teacher = dataclasses.replace(trained[0], folder=tmp_path)
    expected = teacher.targets(few.x_test, CPU)
    monkeypatch.setattr(common.teacher.os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    assert torch.equal(teacher.cached_targets(few.x_test, few.content, "test", CPU), expected)
    assert not list(tmp_path.iterdir())
    (note,) = capsys.readouterr().out.splitlines()
    assert str(tmp_path) in note and "read-only" in note and "test" in note
    monkeypatch.undo()
    teacher.cached_targets(few.x_test, few.content, "test", CPU)
    monkeypatch.setattr(common.teacher.os, "access", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "targets", forbid)  # what is there is read
        assert torch.equal(teacher.cached_targets(few.x_test, few.content, "test", CPU), expected)
        assert capsys.readouterr().out == ""

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(common.teacher, "load_file", denied)
    assert torch.equal(teacher.cached_targets(few.x_test, few.content, "test", CPU), expected)
    assert "Permission denied" in capsys.readouterr().out


def test_targets_that_a_full_disk_refuses_stop_the_run(trained, few, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.teacher, "save_file", full)
    teacher = dataclasses.replace(trained[0], folder=tmp_path)
    refuse(lambda: teacher.cached_targets(few.x_test, few.content, "test", CPU), "No space left", str(tmp_path))


def save_bytes(tensors, folder):
    save_file(tensors, folder / "scratch")
    return (folder / "scratch").read_bytes()


# ---------------------------------------------------------------------------------------------------- augmented targets


def plain(net, channels):
    """A Teacher that is nothing but this network."""
    mean, std = torch.linspace(0.3, 0.5, channels), torch.linspace(0.2, 0.3, channels)
    return Teacher(net.requires_grad_(False), net.dim, mean, std, "plain", {}, None)


def crops(pixels, flip):
    """Every variant of every image, image by image, variants in their order: shifts down, then right, then mirrored."""
    size = pixels.shape[-1]
    pad = 4 if size >= 28 else 1
    for image in nn.functional.pad(pixels, (pad, pad, pad, pad)):
        for dy in range(2 * pad + 1):
            for dx in range(2 * pad + 1):
                crop = image[:, dy : dy + size, dx : dx + size]
                yield crop
                if flip:
                    yield crop.flip(2)


@pytest.fixture(scope="module")
def mirrored():
    """(teacher, three colour images of 32 px, True, their features (3, 162, 16) in chunks of 64)."""
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=gen(), dtype=torch.uint8)
    return described(plain(resnet("resnet10", width=2), 3), pixels, True)


@pytest.fixture(scope="module")
def upright(few):
    """The same of eleven digits of 8 px, nine variants each."""
    return described(plain(resnet("resnet10", width=2, channels=1), 1), few.x_train[:11], False)


def described(teacher, pixels, flip):
    x = torch.stack(list(crops(pixels, flip)))
    n, padded = len(x), torch.cat([x, x[: -len(x) % 64]])  # in the cache's chunks: the last bits depend on their size
    features = torch.cat([teacher.features(part, CPU) for part in padded.split(64)])[:n]
    assert (features > 0).float().mean() > 0.3 and len(features.unique(dim=0)) > 0.9 * n
    return teacher, pixels, flip, features.view(len(pixels), n // len(pixels), -1)


@pytest.fixture(params=["mirrored", "upright"])
def case(request):
    return request.getfixturevalue(request.param)


def drawn(case, calls, n=40):
    """index and variant (n,) of each call, as a script draws them; some pairs come twice in a call."""
    pixels, flip = case[1:3]
    for step in range(calls):
        index = torch.randint(len(pixels), (n,), generator=rng("index", step))
        variant = draw_variants(n, pixels.shape[-1], flip, rng("variant", step))
        index[n // 2], variant[n // 2] = index[0], variant[0]
        yield index, variant


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_augmented_targets_are_the_features_of_the_crops(case, precision, share):
    """With no cache, one for a third of the pairs and one for all: the same numbers, exactly, and honest counts."""
    teacher, pixels, flip, expected = case
    pairs, row = expected.shape[0] * expected.shape[1], teacher.dim * (4 if precision == "fp32" else 2)
    capacity = int(share * pairs)
    gigabytes = (4 * pairs + capacity * row + 0.5) / 1e9 if capacity else 0.0
    targets = AugmentedTargets(teacher, pixels, flip, CPU, gigabytes=gigabytes, precision=precision)
    kept, misses, rates = set(), 0, []
    for index, variant in drawn(case, 12):
        asked, state = (index.clone(), variant.clone()), torch.get_rng_state()
        got = targets(index, variant)
        assert torch.equal(torch.get_rng_state(), state) and index.equal(asked[0]) and variant.equal(asked[1])
        wanted = expected[index, variant]
        assert torch.equal(got, wanted.bfloat16().float() if precision == "bf16" else wanted)
        assert got.dtype == torch.float32 and not got.requires_grad and not got.is_inference()
        new = sorted(set(zip(index.tolist(), variant.tolist(), strict=True)) - kept)
        misses += len(new)
        kept |= set(new[: capacity - len(kept)])
        rates.append(targets.hit_rate())
        assert rates[-1] == pytest.approx(1 - len(new) / len(index))
    assert (targets.hits, targets.misses) == (12 * 40 - misses, misses)
    assert targets.used == len(kept) <= targets.capacity == capacity
    assert rates[0] < 0.6 and (share < 1 or rates[-1] > rates[0])
    assert targets.hit_rate() == 0


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_the_cache_keeps_to_its_bytes(upright, precision, width):
    teacher, pixels, flip, _ = upright
    pairs, row = 99, 16 * width

    def capacity(size):
        targets = AugmentedTargets(teacher, pixels, flip, CPU, gigabytes=(size + 0.5) / 1e9, precision=precision)
        taken = targets.table.nbytes + targets.store.nbytes
        assert taken <= size and targets.store.dtype == {4: torch.float32, 2: torch.bfloat16}[width]
        return targets.capacity, taken

    assert capacity(4 * pairs + 7 * row) == (7, 4 * pairs + 7 * row)
    assert capacity(4 * pairs + 7 * row - 1) == (6, 4 * pairs + 6 * row)
    assert capacity(4 * pairs + row) == (1, 4 * pairs + row)
    for size in (4 * pairs + row - 1, 4 * pairs, 4 * pairs - 1, 0):
        assert capacity(size) == (0, 0)  # no table either
    assert capacity(4 * pairs + pairs * row)[0] == capacity(10**9)[0] == pairs
    need = lambda gigabytes: AugmentedTargets.need(len(pixels), 8, flip, 16, gigabytes, precision)  # noqa: E731
    assert need(1.0) == 4 * pairs + pairs * row and need(1e-6) == 1000 and need(0.0) == 0


def test_the_cache_says_what_it_is(upright):
    def line(gigabytes, **options):
        return AugmentedTargets(*upright[:3], CPU, gigabytes=gigabytes, **options).describe()

    assert line(1.0) == "targets: cache for 100% of 99 pairs (image, variant) in 0.0 GB (cpu, torch.float32)"
    assert "(meta, torch.float32)" in line(1.0, cache_device=torch.device("meta"))
    assert "cache for 30% of" in line((4 * 99 + 30 * 32 + 0.5) / 1e9, precision="bf16")
    assert "no cache (its table alone does not fit into 3e-07 GB)" in line(3e-7)
    assert line(0.0) == "targets: no cache, the teacher computes all of 99 pairs (image, variant)"


def test_the_cache_does_not_change_what_is_drawn(upright):
    """4,000 draws: each of the 99 pairs as often as chance has it, and each comes back as itself."""
    teacher, pixels, flip, expected = upright
    assert num_variants(8, False) == expected.shape[1] == 9
    targets = AugmentedTargets(teacher, pixels, flip, CPU, gigabytes=(4 * 99 + 50 * 64 + 0.5) / 1e9)
    counts = torch.zeros(11, 9)
    for index, variant in drawn(upright, 100):
        near = torch.cdist(targets(index, variant).double(), expected.flatten(0, 1).double()).argmin(1)
        counts.view(-1).index_add_(0, near, torch.ones(len(near)))
    without = torch.zeros(11, 9)
    for index, variant in drawn(upright, 100):
        without.index_put_((index, variant), torch.ones(len(index)), accumulate=True)
    assert torch.equal(counts, without)
    assert (counts - 4000 / 99).abs().max() < 5 * math.sqrt(4000 / 99)


@pytest.mark.parametrize(
    ("threads", "arch", "width", "size", "channels"),
    [(1, "resnet10", 2, 8, 1), (1, "resnet10", 8, 8, 1), (1, "resnet10", 16, 8, 1), (1, "resnet10", 16, 32, 3),
     (1, "resnet18", 16, 32, 3), (2, "resnet18", 16, 32, 3), (1, "resnet18", 64, 8, 3),
     (1, "resnet18", 64, 32, 3), (1, "resnet50", 8, 32, 3)],
)  # fmt: skip
def test_the_company_of_a_miss_does_not_change_its_bits(threads, arch, width, size, channels):
    """Alone, in another place, among others and in a second chunk: as a resumed run meets it with an empty cache."""
    before = torch.get_num_threads()
    pixels = torch.randint(0, 256, (5, channels, size, size), generator=gen(), dtype=torch.uint8)
    teacher = plain(resnet(arch, width=width, channels=channels), channels)
    targets = AugmentedTargets(teacher, pixels, False, CPU, gigabytes=0)
    pairs = torch.randperm(5 * targets.variants, generator=gen())
    few, other = pairs[:9], pairs[9:]
    try:
        torch.set_num_threads(threads)
        alone, among = targets.compute(few[:1]), targets.compute(few)
        turned = targets.compute(torch.cat([other, other, few.flip(0)])[-(64 + 20) :])  # the last 20 in a second chunk
    finally:
        torch.set_num_threads(before)
    assert (among > 0).float().mean() > 0.3
    assert torch.equal(alone[0], among[0])
    assert torch.equal(turned[-9:].flip(0), among)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kept", ["cuda", "cpu"])
def test_augmented_targets_on_a_gpu(mirrored, kept):
    teacher, pixels, flip, expected = mirrored
    gpu = torch.device("cuda")
    teacher = dataclasses.replace(teacher, net=ResNet("resnet10", width=2).requires_grad_(False).eval().to(gpu))
    teacher.net.load_state_dict(resnet("resnet10", width=2).state_dict())
    targets = AugmentedTargets(teacher, pixels, flip, gpu, gigabytes=1.0, cache_device=torch.device(kept))
    assert targets.store.device.type == kept
    for index, variant in drawn(mirrored, 12):
        got = targets(index, variant)
        assert got.device.type == "cuda"
        wanted = expected[index, variant]
        assert (got.cpu() - wanted).abs().mean() < 0.01 * wanted.mean()  # its convolutions are TF32
    assert targets.hits > 0


# ------------------------------------------------------------------------------------------------------ loading our own


def test_own_teacher_loads_by_file_and_by_folder(trained, few, tmp_path, monkeypatch):
    teacher, _ = trained
    for spec in (teacher.folder, teacher.folder / "teacher.safetensors"):
        loaded = load_teacher(str(spec), few, CPU)
        assert same(loaded, teacher) and loaded.name == teacher.folder.name and loaded.info == teacher.info
        assert torch.equal(loaded.targets(few.x_test, CPU), teacher.targets(few.x_test, CPU))
    monkeypatch.chdir(teacher.folder)
    assert load_teacher("teacher.safetensors", few, CPU).name == teacher.folder.name


def test_two_teachers_in_one_folder_do_not_share_targets(trained, few, tmp_path):
    other = train_barlow(few, tmp_path / "made", CPU, **TINY | dict(seed=1, epochs=1))
    for name, teacher in (("a", trained[0]), ("b", other)):
        (tmp_path / f"{name}.safetensors").write_bytes((teacher.folder / "teacher.safetensors").read_bytes())
    a, b = (load_teacher(str(tmp_path / f"{name}.safetensors"), few, CPU) for name in "ab")
    targets = [teacher.cached_targets(few.x_test, few.content, "test", CPU) for teacher in (a, b)]
    assert torch.equal(targets[1], other.targets(few.x_test, CPU)) and not torch.equal(*targets)


def test_files_that_are_no_teachers_are_refused(trained, few, colour, tmp_path):
    teacher, _ = trained
    path = tmp_path / "x.safetensors"
    for metadata in (None, {"info": "{}"}, {"info": json.dumps({"format": "teacher 0"})}):
        save_file({"x": torch.zeros(3)}, path, metadata=metadata)
        refuse(lambda: load_teacher(str(path), few, CPU), str(path), "not a teacher of this project")
    save_file({"x": torch.zeros(3)}, path, metadata={"info": "no json"})
    refuse(lambda: load_teacher(str(path), few, CPU), str(path), "not a readable teacher")
    whole = (teacher.folder / "teacher.safetensors").read_bytes()
    for damaged in (b"", b"<html>", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        refuse(lambda: load_teacher(str(path), few, CPU), str(path), "not a readable teacher")
    for metadata in ({"info": "[]"}, {"info": '"text"'}):
        save_file({"x": torch.zeros(3)}, path, metadata=metadata)
        refuse(lambda: load_teacher(str(path), few, CPU), str(path), "not a teacher of this project")
    refuse(lambda: load_teacher(str(tmp_path / "none"), few, CPU), "no such file", "torchvision:NAME")
    refuse(lambda: load_teacher(str(tmp_path), few, CPU), "no such file")
    refuse(lambda: load_teacher(str(teacher.folder), colour, CPU), "takes 1 channels", "has 3")


def test_own_files_with_other_contents_are_refused(trained, few, tmp_path):
    info, path = trained[0].info, tmp_path / "teacher.safetensors"
    weights = {key: value.contiguous() for key, value in trained[0].net.state_dict().items()}

    def check(change, weights, *words):
        changed = {key: value for key, value in (info | change).items() if value is not None}
        save_file(weights, path, metadata={"info": json.dumps(changed)})
        assert len(refuse(lambda: load_teacher(str(path), few, CPU), str(path), *words)) < len(str(path)) + 300

    without = {key: value for key, value in weights.items() if "bn2" not in key}
    check({}, without, "resnet10 of width 4", "Missing", "layer1.0.bn2.weight", " ...")
    check({}, weights | {"fc.weight": torch.zeros(2)}, "resnet10 of width 4", "Unexpected", "fc.weight")
    check({}, weights | {"conv1.weight": torch.zeros(8, 1, 3, 3)}, "size mismatch", "conv1.weight", "[8, 1, 3, 3]")
    check(dict(width=8), weights, "resnet10 of width 8", "size mismatch")
    check(dict(arch="resnet99"), weights, "resnet99", "resnet10, resnet18, resnet50 are known")
    for field in ("arch", "channels", "width", "stem", "stem_padding", "mean", "std"):
        check({field: None}, weights, f"does not say its {field};")
    check(dict(width=None, std=None), weights, "does not say its width, std")


def test_a_distilled_set_is_no_teacher(few, tmp_path):
    path = tmp_path / "distilled.safetensors"
    facts = dict(method="krr_st", data="digits", content="f", y_is="teacher features", class_names=[], resize="none")
    save_distilled(path, few.x_test[:4] / 255, torch.zeros(4, 8), few.mean, few.std, **facts, step=1, seed=0, recipe={})
    refuse(lambda: load_teacher(str(path), few, CPU), str(path), "a distilled set (distilled 1), not a teacher")


# ------------------------------------------------------------------------------------------------------- loading others


def resnet(arch="resnet18", **options):
    """A network whose statistics and last norms are not the trivial ones, and whose features are not all zero."""
    torch.manual_seed(3)
    net = ResNet(arch, **options)
    for name, value in net.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape) + (0.5 if name.endswith(("weight", "running_var")) else -0.5))
    return net.eval().to(memory_format=torch.channels_last)  # as teachers are, so that sums run in the same order


@pytest.mark.parametrize("prefix", ["backbone.", "module.encoder_q.", ""])
def test_a_solo_learn_checkpoint_loads(colour, tmp_path, prefix):
    source, path = resnet("resnet18", width=8), tmp_path / "barlow.ckpt"
    state = {prefix + key: value for key, value in source.state_dict().items()}
    beside = {"backbone.": ("projector.0.weight", "classifier.weight", "momentum_backbone.conv1.weight")}
    heads = [f"{prefix}{head}.weight" for head in ("fc", "projector.0", "predictor.0", "classifier")]
    for key in beside.get(prefix, heads):
        state[key] = torch.zeros(2, 2)
    torch.save({"state_dict": state, "epoch": 999}, path)
    teacher = load_teacher(str(path), colour, CPU)
    expected = source(normalise(colour.x_test, colour.mean, colour.std))
    assert torch.equal(teacher.targets(colour.x_test, CPU), expected)
    assert torch.equal(teacher.mean, colour.mean) and torch.equal(teacher.std, colour.std)
    assert teacher.dim == 64 and teacher.folder is None and not teacher.net.training
    assert (teacher.info["arch"], teacher.info["stem"], teacher.info["stem_padding"]) == ("resnet18", "cifar", 2)
    assert len(teacher.info["sha256"]) == 64
    padded = load_teacher(str(path), colour, CPU, stem_padding=1)
    assert padded.net.conv1.padding == (1, 1) and padded.info["stem_padding"] == 1


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torchvision_file_loads(colour, tmp_path, arch, wrapped):
    torch.manual_seed(0)
    source, path = getattr(torchvision.models, arch)(weights=None, num_classes=3).eval(), tmp_path / f"{arch}.pth"
    torch.save({"model": source.state_dict(), "epoch": 1} if wrapped else source.state_dict(), path)
    teacher = load_teacher(str(path), colour, CPU)
    source.fc = nn.Identity()
    source.to(memory_format=torch.channels_last)
    mean, std = map(torch.tensor, IMAGENET)
    assert torch.equal(teacher.mean, mean) and torch.equal(teacher.std, std)
    with torch.no_grad():
        expected = source(normalise(colour.x_test, mean, std))
    # an untrained ResNet's features differ in size by orders of magnitude, their rounding does not: by the whole row
    error = (teacher.targets(colour.x_test, CPU) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 5e-6  # one to two roundings for each of fifty layers
    assert (teacher.info["arch"], teacher.info["stem"]) == (arch, "imagenet")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_file_that_needs_unpickling_is_refused_with_a_command_that_converts_it(colour, tmp_path, key):
    source = resnet("resnet10", width=4)
    path = tmp_path / 'it\'s a "$HOME" file.ckpt'
    torch.save({key: source.state_dict(), "hyper_parameters": argparse.Namespace(lr=0.3)}, path)
    line = refuse(lambda: load_teacher(str(path), colour, CPU), "pickled code", "if you trust it")
    words = shlex.split(line[line.index("python -c") : line.rindex(" and name the .clean.pt")])
    assert words[:2] == ["python", "-c"] and len(words) == 3
    subprocess.run([sys.executable, *words[1:]], check=True, cwd=tmp_path)
    teacher = load_teacher(f"{path}.clean.pt", colour, CPU)
    assert torch.equal(teacher.targets(colour.x_test, CPU), source(normalise(colour.x_test, colour.mean, colour.std)))


class Harmful:
    """What a malicious checkpoint does."""

    def __reduce__(self):
        return forbid, ()


def test_pickled_code_never_runs(colour, tmp_path):
    torch.save({"state_dict": resnet("resnet10", width=4).state_dict(), "x": Harmful()}, tmp_path / "bad.pt")
    refuse(lambda: load_teacher(str(tmp_path / "bad.pt"), colour, CPU), "would run pickled code")


def test_files_that_are_no_resnets_are_refused(colour, tmp_path):
    path = tmp_path / "net.pt"

    def check(value, *words):
        torch.save(value, path)
        refuse(lambda: load_teacher(str(path), colour, CPU), str(path), *words)

    state = resnet("resnet10", width=4).state_dict()
    check({key: value for key, value in state.items() if key != "layer3.0.bn1.running_var"},
          "does not fit a resnet10", "layer3.0.bn1.running_var")  # fmt: skip
    check(state | {"layer1.0.extra": torch.zeros(2)}, "layer1.0.extra")
    check(torchvision.models.resnet34(weights=None).state_dict(), "(3, 4, 6, 3)", "resnet50 are known")
    check({"features.0.weight": torch.zeros(4, 3, 3, 3)}, "no ResNet")
    check([torch.zeros(3)], "no ResNet")
    check({0: torch.zeros(3)}, "no ResNet")
    check({"conv1.weight": torch.zeros(3)}, "no ResNet")
    few = ("conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer3.0.conv1.weight")
    check({key: state[key] for key in (*few, "layer4.0.conv1.weight")}, "Missing", "layer1.0.bn1.weight", " ...")
    check(torch.zeros(3), "no ResNet")
    for stem in ("cifar", "imagenet"):
        check(resnet("resnet10", width=4, channels=1, stem=stem).state_dict(), "takes 1 channels", "the data has 3")
    torch.save(state, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        path.write_bytes(damaged)
        line = refuse(lambda: load_teacher(str(path), colour, CPU), str(path), "not a readable checkpoint")
        assert "trust" not in line  # no conversion would help


# ------------------------------------------------------------------------------------------------------------ libraries


@pytest.fixture
def no_download(monkeypatch):
    """torchvision's get_model with random weights."""
    whole = torchvision.models.get_model

    def get_model(name, weights):
        assert weights == "DEFAULT"
        torch.manual_seed(1)
        return whole(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return get_model


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "fc"), ("mobilenet_v2", "classifier.1")])
def test_torchvision_by_name(colour, no_download, name, layer):
    teacher = load_teacher(f"torchvision:{name}", colour, CPU)
    source = no_download(name, "DEFAULT").eval()
    source.set_submodule(layer, nn.Identity())
    source.to(memory_format=torch.channels_last)
    mean, std = map(torch.tensor, IMAGENET)
    with torch.no_grad():
        expected = source(normalise(colour.x_test, mean, std))
    assert torch.equal(teacher.targets(colour.x_test, CPU), expected)
    assert teacher.dim == expected.shape[1] and teacher.name == f"torchvision:{name}"
    assert torch.equal(teacher.mean, mean) and torch.equal(teacher.std, std)
    assert teacher.cached_targets(colour.x_test, colour.content, "test", CPU).equal(expected)


def test_libraries_fail_in_one_line(colour, few, monkeypatch, no_download):
    refuse(lambda: load_teacher("torchvision:resnet18", few, CPU), "takes 3 channels", "has 1")
    refuse(lambda: load_teacher("torchvision:vit_b_16", colour, CPU), "32", "--size")  # it takes 224 px only
    refuse(lambda: load_teacher("torchvision:resnet19", colour, CPU), "resnet19", "check the name")
    line = refuse(lambda: load_teacher("torchvision:squeezenet1_1", colour, CPU), "squeezenet1_1: has no linear class")
    assert "check the name" not in line
    monkeypatch.undo()

    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    refuse(lambda: load_teacher("torchvision:resnet18", colour, CPU), "Name or service not known", "the network")
    monkeypatch.setitem(sys.modules, "timm", None)
    refuse(lambda: load_teacher("timm:resnet18", colour, CPU), "timm is not installed", "pip install timm")


def test_timm_by_name(colour, monkeypatch):
    source = resnet("resnet10", width=4)
    source.pretrained_cfg = dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))

    def create_model(name, pretrained, num_classes):
        if name != "small":
            raise RuntimeError(f"Unknown model ({name})\nsecond line")
        assert pretrained and num_classes == 0
        return source

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    teacher = load_teacher("timm:small", colour, CPU)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    assert torch.equal(teacher.mean, mean) and torch.equal(teacher.std, std) and teacher.dim == 32
    assert torch.equal(teacher.targets(colour.x_test, CPU), source(normalise(colour.x_test, mean, std)))
    refuse(lambda: load_teacher("timm:large", colour, CPU), "Unknown model (large)")
