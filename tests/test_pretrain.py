"""common/pretrain.py: Barlow Twins against loops, training that stops and goes on, every way to load a teacher."""

import argparse
import dataclasses
import json
import math
import shlex
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

import common.pretrain
from common.data import load, normalise
from common.models import ResNet
from common.pretrain import (
    IMAGENET,
    Teacher,
    barlow_loss,
    cosine_lr,
    knn_accuracy,
    lars_,
    load_teacher,
    projector,
    train_teacher,
)

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
    return train_teacher(few, place, CPU, **TINY), place


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


def naive_barlow(z_1, z_2, off_diagonal):
    (n, d), loss = z_1.shape, 0.0
    for z in (z_1, z_2):
        for j in range(d):
            mean = sum(z[b, j] for b in range(n)) / n
            var = sum((z[b, j] - mean) ** 2 for b in range(n)) / n
            z[:, j] = (z[:, j] - mean) / math.sqrt(var + 1e-5)
    for i in range(d):
        for j in range(d):
            c = sum(z_1[b, i] * z_2[b, j] for b in range(n)) / n
            loss += (1 - c) ** 2 if i == j else off_diagonal * c**2
    return loss


def test_barlow_loss_is_the_loop():
    z_1, z_2 = torch.randn(2, 7, 5, dtype=F64, generator=gen())
    z_2 += z_1 + 3
    expected = naive_barlow(z_1.clone(), z_2.clone(), 0.3)
    assert barlow_loss(z_1, z_2, 0.3).item() == pytest.approx(float(expected), rel=1e-12)


def test_barlow_loss_has_the_right_gradient():
    z_1, z_2 = (z.requires_grad_() for z in torch.randn(2, 6, 4, dtype=F64, generator=gen()))
    assert torch.autograd.gradcheck(lambda a, b: barlow_loss(a, b, 0.3), (z_1, z_2))


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
    monkeypatch.setattr(common.pretrain, "barlow_loss", forbid)
    again = train_teacher(few, place, CPU, **TINY)
    assert same(again, teacher) and again.info == teacher.info


@pytest.mark.parametrize(
    "change",
    [dict(seed=1), dict(epochs=4), dict(lr=0.2), dict(stem_padding=1), dict(crop_min=0.5), dict(eta=0.02),
     dict(weight_decay=0.0), dict(off_diagonal=0.1), dict(precision="bf16"), dict(projector_width=8),
     dict(batch=64), dict(width=2), dict(arch="resnet18"), "content", "flip"],
    ids=str,
)  # fmt: skip
def test_anything_else_is_another_teacher(trained, few, monkeypatch, tmp_path, change):
    """The folder is made before the first step, which is forbidden here."""
    monkeypatch.setattr(common.pretrain, "barlow_loss", forbid)
    teacher, _ = trained
    data, settings = few, TINY
    if isinstance(change, str):
        data = dataclasses.replace(few, **{change: {"content": "e" * 64, "flip": True}[change]})
    else:
        settings = TINY | change
    with pytest.raises(AssertionError, match="must not be called"):
        train_teacher(data, tmp_path, CPU, **settings)
    (folder,) = tmp_path.iterdir()
    assert folder.name != teacher.folder.name
    if isinstance(change, dict) and "epochs" in change:
        assert "-4ep-" in folder.name
    if isinstance(change, dict) and "seed" in change:
        assert "-s1-" in folder.name


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_stopped_teacher_goes_on_bit_for_bit(trained, few, monkeypatch, tmp_path, epoch):
    teacher, _ = trained
    calls, whole = [], common.pretrain.barlow_loss

    def stop(*args):
        calls.append(1)
        if len(calls) == 2 * epoch + 2:  # the second step of that epoch; two an epoch
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(common.pretrain, "barlow_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(few, tmp_path, CPU, **TINY)
    calls.clear()
    monkeypatch.setattr(common.pretrain, "barlow_loss", lambda *args: calls.append(1) or whole(*args))
    torch.rand(5)  # the global generator is elsewhere by now
    resumed = train_teacher(few, tmp_path, CPU, **TINY)
    assert len(calls) == 2 * (3 - epoch)
    assert same(resumed, teacher)
    assert resumed.info | {"seconds": 0} == teacher.info | {"seconds": 0}


def test_the_loss_falls_on_digits(digits, monkeypatch, tmp_path):
    losses, whole = [], common.pretrain.barlow_loss

    def record(*args):
        loss = whole(*args)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(common.pretrain, "barlow_loss", record)
    train_teacher(digits, tmp_path, CPU, **TINY | dict(epochs=8))
    per_epoch = torch.tensor(losses).view(8, -1).mean(1)
    assert len(losses) == 8 * (1437 // 128)
    assert per_epoch[-1] < 0.5 * per_epoch[0]


def test_a_diverged_teacher_is_refused(few, monkeypatch, tmp_path):
    monkeypatch.setattr(common.pretrain, "barlow_loss", lambda z_1, z_2, _: (z_1 * torch.nan).sum())
    refuse(lambda: train_teacher(few, tmp_path, CPU, **TINY), "loss is nan", "--teacher-lr")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_views_are_drawn_without_flips_for_digits(few, monkeypatch, tmp_path):
    asked, whole = [], common.pretrain.two_views

    def record(x, generator, scale, flip):
        asked.append((scale, flip, x.max().item() <= 1))
        return whole(x, generator, scale, flip)

    monkeypatch.setattr(common.pretrain, "two_views", record)
    train_teacher(few, tmp_path, CPU, **TINY | dict(epochs=1))
    assert asked == [((0.4, 1.0), False, True)] * 2


def test_every_step_is_lars_at_the_scheduled_rate(few, monkeypatch, tmp_path):
    calls, whole = [], common.pretrain.lars_

    def record(params, lr, eta, weight_decay):
        calls.append((len(params), lr, eta, weight_decay))
        whole(params, lr, eta, weight_decay)

    monkeypatch.setattr(common.pretrain, "lars_", record)
    train_teacher(few, tmp_path, CPU, **TINY)
    n = len(list(ResNet("resnet10", 1, 4).parameters())) + len(list(projector(32, 16).parameters()))
    rates = [cosine_lr(step, 6, 2, 0.3 * 128 / 256) for step in range(6)]  # one warm-up epoch of two steps
    assert calls == [(n, rate, 0.002, 1e-4) for rate in rates]


def test_a_folder_that_cannot_be_made_is_named(few, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(lambda: train_teacher(few, tmp_path / "file", CPU, **TINY), str(tmp_path / "file"), "--out-dir")


# -------------------------------------------------------------------------------------------------------------- targets


def test_targets_are_the_networks_features(trained, few):
    teacher, _ = trained
    expected = teacher.net(normalise(few.x_test, few.mean, few.std))
    torch.testing.assert_close(teacher.targets(few.x_test, CPU, chunk=7), expected, rtol=0, atol=1e-5)
    floats = teacher.targets(few.x_test.float() / 255, CPU)
    assert torch.equal(floats, teacher.targets(few.x_test, CPU))
    assert floats.dtype == torch.float32 and not floats.requires_grad


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


def save_bytes(tensors, folder):
    save_file(tensors, folder / "scratch")
    return (folder / "scratch").read_bytes()


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
    other = train_teacher(few, tmp_path / "made", CPU, **TINY | dict(seed=1, epochs=1))
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
    refuse(lambda: load_teacher(str(tmp_path / "none"), few, CPU), "no such file", "torchvision:NAME")
    refuse(lambda: load_teacher(str(tmp_path), few, CPU), "no such file")
    refuse(lambda: load_teacher(str(teacher.folder), colour, CPU), "takes 1 channels", "has 3")


# ------------------------------------------------------------------------------------------------------- loading others


def resnet(arch="resnet18", **options):
    """A network whose statistics and last norms are not the trivial ones."""
    torch.manual_seed(3)
    net = ResNet(arch, **options)
    for name, value in net.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape) + (0.5 if "bias" not in name else -0.5))
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
    torch.testing.assert_close(teacher.targets(colour.x_test, CPU), expected, rtol=1e-5, atol=1e-5)
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
    refuse(lambda: load_teacher("torchvision:squeezenet1_1", colour, CPU), "squeezenet1_1")  # no linear classifier
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
