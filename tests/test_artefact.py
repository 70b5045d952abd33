"""common/artefact.py: the file and back, also without this project; pretraining against a loop."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from common.artefact import fit_pairs, load_distilled, pretrain, save_distilled
from common.data import Zca, denormalise
from common.run import rng

F64 = torch.float64
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.3, 0.2])
FACTS = dict(
    method="krr_st",
    data="birds",
    content="c" * 64,
    y_is="teacher features",
    class_names=["wren", "great tit", "42", "Häher"],
    resize="crop",
    step=700,
    seed=3,
    recipe={"epochs": 1000, "lr": 0.1},
    teacher={"name": "resnet10", "weights_sha256": "d" * 64, "mean": [0.1, 0.2]},
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "distilled.safetensors"


def write(path, x=None, y=None, **changes):
    x = draw(6, 3, 8, 8) if x is None else x
    y = draw(len(x), 5, seed=1) if y is None else y
    save_distilled(path, x, y, MEAN, STD, **FACTS | changes)
    return x, y


# ------------------------------------------------------------------------------------------------------------- the file


def test_what_is_saved_is_what_loads(path):
    x, y = write(path, x=(3 * draw(6, 3, 8, 8)).requires_grad_(), y=draw(6, 5).requires_grad_())
    distilled = load_distilled(path, "krr_st")
    for name, value in dict(x=x, y=y, mean=MEAN, std=STD).items():
        loaded = getattr(distilled, name)
        assert torch.equal(loaded, value) and loaded.dtype == torch.float32 and not loaded.requires_grad, name
    own = {field.name for field in dataclasses.fields(distilled)}
    for name, value in FACTS.items():
        assert (getattr(distilled, name) if name in own else distilled.meta[name]) == value, name
    assert (distilled.channels, distilled.size) == (3, 8)
    assert distilled.meta["storage_bytes"] == 4 * (6 * 3 * 8 * 8 + 6 * 5 + 3 + 3)
    assert (distilled.meta["num_images"], distilled.meta["channels"]) == (6, 3)
    assert distilled.meta["format"] == "distilled 1" and distilled.meta["commit"]


def test_the_networks_input_survives_pixel_units(path):
    """Four roundings (times std, plus mean, minus mean, by std), each half an ulp of a number of at most this size."""
    z = 3 * draw(50, 3, 8, 8)
    write(path, x=denormalise(z, MEAN, STD))
    distilled = load_distilled(path)
    pixel = MEAN[:, None, None] / STD[:, None, None] + z.abs()
    assert ((distilled.inputs() - z).abs() <= 4 * 2**-24 * pixel).all()
    exact = (distilled.x.double() - MEAN.double()[:, None, None]) / STD.double()[:, None, None]
    torch.testing.assert_close(distilled.inputs().double(), exact, rtol=1e-6, atol=1e-6)


def test_dataset_gives_inputs_with_their_targets(path):
    x, y = write(path)
    dataset = load_distilled(path).dataset()
    assert len(dataset) == 6
    for i, (one_x, one_y) in enumerate(dataset):
        torch.testing.assert_close(one_x, (x[i] - MEAN[:, None, None]) / STD[:, None, None])
        assert torch.equal(one_y, y[i])


def test_the_file_loads_without_this_project(path):
    x, y = write(path)
    tensors = load_file(path)
    mean, std = tensors["mean"].view(-1, 1, 1), tensors["std"].view(-1, 1, 1)
    inputs, targets = (tensors["x"] - mean) / std, tensors["y"]
    facts = safe_open(path, "pt").metadata()

    assert torch.equal(inputs, load_distilled(path).inputs()) and torch.equal(targets, y)
    assert torch.equal(tensors["x"], x)
    assert facts["method"] == "krr_st" and json.loads(facts["class_names"]) == FACTS["class_names"]
    assert all(isinstance(value, str) for value in facts.values())


def test_teacher_and_commit_may_be_missing(path, monkeypatch):
    monkeypatch.setattr("common.artefact.commit", lambda: None)
    write(path, teacher=None, class_names=[])
    distilled = load_distilled(path)
    assert distilled.meta["teacher"] is None and distilled.class_names == []
    assert distilled.meta["commit"] == "unknown"


def test_views_of_larger_tensors_are_stored_as_what_they_are(path):
    big = draw(12, 8, 8, 3)
    x, y = write(path, x=big.permute(0, 3, 1, 2)[::2], y=draw(6, 10)[:, ::2])
    distilled = load_distilled(path)
    assert torch.equal(distilled.x, x) and torch.equal(distilled.y, y)
    assert path.stat().st_size < 4 * (x.numel() + y.numel() + 6) + 4000


def test_other_files_are_refused(path, tmp_path):
    refuse(lambda: load_distilled(tmp_path / "none"), "no such distilled set", "none")
    refuse(lambda: load_distilled(tmp_path), "no such distilled set")
    write(path)
    refuse(lambda: load_distilled(path, "frepo"), "made by krr_st, not by frepo")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"", b"<html>404</html>"):
        path.write_bytes(damaged)
        refuse(lambda: load_distilled(path), str(path), "not a readable distilled set")
    for metadata in (None, {"format": "distilled 0"}, {"format": "teacher 1"}):
        save_file({"x": torch.zeros(3)}, path, metadata=metadata)
        refuse(lambda: load_distilled(path), str(path), "this version reads 'distilled 1'")


def test_a_set_that_cannot_be_written_leaves_the_old_one(path, tmp_path, monkeypatch):
    write(path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.artefact.save_file", full)
    refuse(lambda: write(path, seed=4), "could not write", "No space left")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------------------- whitened sets, extra


CONDITION = 100.0  # of the whitening's matrix; of CIFAR-10's it is 94


def whitening(stride):
    """A Zca of images of 3 x (4 stride)^2 with variances between 0.1 and 1000."""
    u, _ = torch.linalg.qr(draw(48, 48, seed=5, dtype=F64))
    s = 0.1 * CONDITION ** (2 * torch.arange(48, dtype=F64) / 47)
    matrix, inverse = (((u * s**power) @ u.T).float() for power in (-0.5, 0.5))
    return Zca(draw(3, 4 * stride, 4 * stride, seed=6), (matrix + matrix.T) / 2, (inverse + inverse.T) / 2)


def rounding(zca, z):
    """How far whitened images may move through pixel units and back. Each of the few roundings on the way is one of a
    number no larger than |undone z| + |means|, and whitening multiplies it by at most the matrix's norm: with z's part,
    the condition number times z's own rounding. Eight of them, as sums of 48 round like walks of 48 steps."""
    largest = zca.undo(z).abs().max() + zca.mean.abs().max() + (MEAN / STD).max()
    return 8 * 2**-24 * float(torch.linalg.matrix_norm(zca.matrix, 2) * largest)


def write_whitened(path, stride, **changes):
    zca, z = whitening(stride), draw(6, 3, 4 * stride, 4 * stride)
    write(path, x=denormalise(zca.undo(z), MEAN, STD), zca=zca, **changes)
    return zca, z


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_whitened_images_survive_pixel_units(path, stride):
    zca, z = write_whitened(path, stride)
    distilled = load_distilled(path)
    assert torch.equal(distilled.zca, zca.matrix) and torch.equal(distilled.zca_mean, zca.mean)
    bound = rounding(zca, z)
    assert bound < 4 * CONDITION * 2**-24 * z.abs().max()
    assert (distilled.inputs() - z).abs().max() <= bound
    assert torch.equal(torch.stack([x for x, _ in distilled.dataset()]), distilled.inputs())


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_whitened_file_needs_numpy_alone(path, stride):
    zca, z = write_whitened(path, stride)

    from safetensors.numpy import load_file as load_arrays

    file = load_arrays(path)
    x, zca_matrix = file["x"], file["zca"]
    n, c, h, w = x.shape
    s = round((c * h * w / len(zca_matrix)) ** 0.5)
    normalised = (x - file["mean"][:, None, None]) / file["std"][:, None, None]
    inputs, undone = np.empty_like(x), np.empty_like(x)
    for i in range(s):
        for j in range(s):
            phase = (normalised - file["zca_mean"])[:, :, i::s, j::s]
            inputs[:, :, i::s, j::s] = (phase.reshape(n, -1) @ zca_matrix).reshape(phase.shape)
            rows = inputs[:, :, i::s, j::s].reshape(n, -1)
            undone[:, :, i::s, j::s] = np.linalg.solve(zca_matrix, rows.T).T.reshape(phase.shape)
    pixels = (undone + file["zca_mean"]) * file["std"][:, None, None] + file["mean"][:, None, None]

    assert np.abs(inputs - z.numpy()).max() <= rounding(zca, z)
    assert np.abs(inputs - load_distilled(path).inputs().numpy()).max() <= rounding(zca, z)
    np.testing.assert_allclose(pixels, x, atol=CONDITION * 2**-24 * np.abs(x).max())


def test_the_whitening_is_counted_apart(path):
    write_whitened(path, 2)
    meta = load_distilled(path).meta
    assert meta["storage_bytes"] == 4 * (6 * 3 * 8 * 8 + 6 * 5 + 3 + 3)
    assert meta["zca_bytes"] == 4 * (48 * 48 + 3 * 8 * 8)


def test_without_whitening_the_tensors_are_as_they_were(path):
    x, y = write(path)
    assert load_file(path).keys() == {"x", "y", "mean", "std"}
    distilled = load_distilled(path)
    assert distilled.zca is None and distilled.zca_mean is None and distilled.meta["zca_bytes"] == 0
    facts = safe_open(path, "pt").metadata()
    del facts["zca_bytes"]  # as an older version wrote it
    save_file({"x": x, "y": y, "mean": MEAN, "std": STD}, path, metadata=facts)
    older = load_distilled(path)
    assert torch.equal(older.inputs(), distilled.inputs()) and older.zca is None
    assert older.meta | {"zca_bytes": 0} == distilled.meta


def test_extra_facts_come_back(path):
    extra = {"ipc": 10, "network": {"width": 128, "norm": None}, "note": "12", "label_scale": 0.1, "ages": [1, 2]}
    write(path, extra=extra)
    distilled = load_distilled(path)
    assert {key: distilled.meta[key] for key in extra} == extra and distilled.step == FACTS["step"]
    for name in ("storage_bytes", "recipe", "zca"):
        with pytest.raises(ValueError, match=name):
            write(path, extra={name: 1})


# ---------------------------------------------------------------------------------------------------------- pretraining


def naive_sgd(weight, bias, x, y, key, steps, batch, lr, momentum, decay):
    """Linear regression by hand: gradients of the mean over rows and outputs, momentum, decay on both parameters."""
    per_epoch, velocity = len(range(0, len(x), batch)), None
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        if per_epoch == 1:
            order = list(range(len(x)))
        else:
            order = torch.randperm(len(x), generator=rng("fit", *key, epoch)).tolist()
        rows = order[position * batch : (position + 1) * batch]
        d_weight, d_bias, loss = torch.zeros_like(weight), torch.zeros_like(bias), 0.0
        for row in rows:
            residual = weight @ x[row] + bias - y[row]
            loss += float(residual.square().sum()) / (len(rows) * len(bias))
            d_weight += 2 * torch.outer(residual, x[row]) / (len(rows) * len(bias))
            d_bias += 2 * residual / (len(rows) * len(bias))
        gradients = d_weight + decay * weight, d_bias + decay * bias
        velocity = (
            gradients if velocity is None else [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
        )
        weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    return weight, bias, loss


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3).to(F64)


@pytest.mark.parametrize("batch", [4, 5, 10, 256])  # last batch of 2, of 5, one full batch
def test_fit_pairs_is_the_loop(batch):
    x, y, net = draw(10, 4, dtype=F64), draw(10, 3, seed=1, dtype=F64), linear()
    weight, bias = (p.detach().clone() for p in net.parameters())
    expected = naive_sgd(weight, bias, x, y, ("k", 2), 7, batch, 0.1, 0.9, 1e-3)
    loss = fit_pairs(net, x, y, "k", 2, steps=7, batch=batch)
    for value, wanted in zip((net.weight, net.bias, torch.tensor(loss)), expected, strict=True):
        torch.testing.assert_close(value.detach().double(), torch.as_tensor(wanted).double(), rtol=1e-12, atol=1e-12)


def test_fit_pairs_takes_other_settings():
    x, y, net = draw(10, 4, dtype=F64), draw(10, 3, seed=1, dtype=F64), linear()
    weight, bias = (p.detach().clone() for p in net.parameters())
    expected = naive_sgd(weight, bias, x, y, (), 5, 4, 0.03, 0.5, 0.2)
    fit_pairs(net, x, y, steps=5, batch=4, lr=0.03, momentum=0.5, weight_decay=0.2)
    torch.testing.assert_close(net.weight.detach(), expected[0], rtol=1e-12, atol=1e-12)


def test_fit_pairs_repeats_by_key_and_trains_batch_norm():
    def fitted(*key):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        torch.manual_seed(len(key) + 7)  # the global generator has no say
        fit_pairs(net, draw(10, 1, 8, 8), draw(10, 3, seed=1), *key, steps=6, batch=4)
        return net.state_dict()

    first, again, other = fitted("a", 1), fitted("a", 1), fitted("a", 2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert first["1.num_batches_tracked"] == 6 and first["1.running_mean"].any()


def test_fit_pairs_refuses_what_diverges():
    x, y = draw(10, 4), draw(10, 3, seed=1)
    refuse(lambda: fit_pairs(nn.Linear(4, 3), 1e4 * x, y, steps=50, lr=10.0), "10 pairs", "learning rate 10.0")
    refuse(lambda: fit_pairs(nn.Linear(4, 3), x, y * torch.nan, steps=1), "loss nan")


def pairs(path):
    """Thirty patterns whose targets are a fixed linear map of them."""
    x = draw(30, 3, 8, 8)
    write(path, x=denormalise(x, MEAN, STD), y=x.flatten(1) @ draw(192, 5, seed=4) / 14)
    return load_distilled(path)


def convolutions():
    """A module with a map of features as output, as a torchvision network without its classifier has."""
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)]
    return nn.Sequential(*layers, nn.ReLU())


@pytest.mark.parametrize(
    ("make", "dim"), [(convolutions, 64), (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Tanh()), 32)]
)
def test_pretrain_takes_any_module(path, make, dim):
    distilled = pairs(path)
    torch.manual_seed(0)
    module = make()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    head = pretrain(module, distilled, epochs=150, batch=16, weight_decay=0.0)
    assert isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (dim, 5)
    assert any(not torch.equal(before[key], value) for key, value in module.state_dict().items())
    with torch.no_grad():
        error = F.mse_loss(head(module(distilled.inputs()).flatten(1)), distilled.y)
    assert error < 0.2 * (distilled.y - distilled.y.mean(0)).square().mean()


def test_pretrain_repeats_by_seed_and_passes_its_settings_on(path, monkeypatch):
    distilled, calls, counter = pairs(path), [], itertools.count(1)

    def fitted(seed):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
        torch.rand(next(counter))  # the global generator has no say
        return pretrain(module, distilled, epochs=2, batch=7, seed=seed).weight

    assert torch.equal(fitted(1), fitted(1)) and not torch.equal(fitted(1), fitted(2))
    monkeypatch.setattr("common.artefact.fit_pairs", lambda net, x, y, *key, **sgd: calls.append((x, y, key, sgd)))
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    pretrain(module, distilled, epochs=3, batch=7, seed=4, lr=0.5, momentum=0.1, weight_decay=0.2)
    ((x, y, key, sgd),) = calls
    assert key == ("pretrain", 4)
    assert torch.equal(x, distilled.inputs()) and torch.equal(y, distilled.y)
    assert sgd == dict(steps=3 * 5, batch=7, lr=0.5, momentum=0.1, weight_decay=0.2)  # 30 pairs: five batches an epoch
