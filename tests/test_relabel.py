"""common/relabel.py: views, labels, training and rows against naive restatements; what is derived again is the same."""

import dataclasses
import itertools
import json
import math
import re
import statistics
from collections import Counter, namedtuple
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_augment import naive_counter
from torch import nn

import common.relabel
from common.data import Inputs, hold_out, load, normalise
from common.relabel import (
    SoftRecipe,
    StoredLabels,
    as_inputs,
    average_,
    batch_statistics,
    check_recipe,
    cut_corners,
    epoch_batches,
    evaluate_soft,
    hits,
    is_scored,
    label_all,
    label_bytes,
    logits_of,
    post_train,
    predict_seconds,
    prefix_maximum,
    random_crops,
    soft_loss,
    soft_lr,
    soft_optimizer,
    table,
    views,
)
from common.run import rng, seeded
from common.students import per_class

F64 = torch.float64
CPU = torch.device("cpu")


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


MEAN, STD = torch.tensor([0.3, 0.5]), torch.tensor([0.2, 0.4])


def pixel_set(n=11, size=6, seed=5):
    """uint8 (n, 2, size, size) as the networks' inputs."""
    pixels = torch.randint(1, 256, (n, 2, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Inputs(pixels, MEAN, STD, None, CPU, 0.0)


def test_the_defaults_are_published():
    """SC-DD's on CIFAR-100, by its code; its cosine is as long as three times the training."""
    recipe = SoftRecipe()
    found = (recipe.epochs, recipe.batch, recipe.opt, recipe.lr, recipe.weight_decay, recipe.decay_all)
    assert found == (200, 64, "adamw", 1e-3, 0.01, True)
    assert (recipe.temperature, recipe.scaled, recipe.loss, recipe.mix_alpha) == (30, False, "kl", 0.8)
    assert (recipe.crop, recipe.flip, recipe.warm_up, recipe.ema, recipe.ce_weight) == ("pad", True, 0, 0, 0.025)
    assert (recipe.labels, recipe.teacher_train, recipe.mix, recipe.momentum) == ("online", False, "none", 0.9)
    assert soft_lr(200, dataclasses.replace(recipe, smooth=3)) == pytest.approx(0.75e-3)


# ---------------------------------------------------------------------------------------------------------------- views


@lru_cache
def naive_beta(alpha):
    """The distribution function of Beta(alpha, alpha) at 40,001 places, integrated with t = sin^2 (midpoint rule)."""
    angles = (np.arange(40_000) + 0.5) / 40_000 * (math.pi / 2)
    weight = (np.sin(angles) * np.cos(angles)) ** (2 * alpha - 1)
    return np.concatenate([[0], np.cumsum(weight)]) / weight.sum()


def naive_quantile(u, alpha):
    return math.sin(np.interp(u, naive_beta(alpha), np.arange(40_001) / 40_000 * (math.pi / 2))) ** 2


def naive_crop(image, u, recipe):
    """One image (C, H, W) of normalised pixels, by its five uniforms; black moves in."""
    channels, size, _ = image.shape
    out, black = np.zeros(image.shape), (-MEAN / STD).numpy()
    mirrored = recipe.flip and u[4] < 0.5
    pad = {"pad": max(1, size // 8), "none": 0}.get(recipe.crop)
    for c, i, j in itertools.product(range(channels), range(size), range(size)):
        across = size - 1 - j if mirrored else j
        if recipe.crop == "resized":
            area, shape = recipe.crop_min + u[0] * (1 - recipe.crop_min), (4 / 3) ** (2 * u[1] - 1)
            width, height = min(1, math.sqrt(area * shape)), min(1, math.sqrt(area / shape))
            column = ((1 - width) * u[2] + width * (across + 0.5) / size) * size - 0.5
            row = ((1 - height) * u[3] + height * (i + 0.5) / size) * size - 0.5
            column, row = (min(max(place, 0), size - 1) for place in (column, row))
            left, top = (min(int(place), size - 2) for place in (column, row))
            s, t = column - left, row - top
            upper = (1 - s) * image[c, top, left] + s * image[c, top, left + 1]
            lower = (1 - s) * image[c, top + 1, left] + s * image[c, top + 1, left + 1]
            out[c, i, j] = (1 - t) * upper + t * lower
        else:
            row, column = i + int(u[0] * (2 * pad + 1)) - pad, across + int(u[1] * (2 * pad + 1)) - pad
            inside = 0 <= row < size and 0 <= column < size
            out[c, i, j] = image[c, row, column] if inside else black[c]
    return out


def naive_views(x, epoch, recipe, *key):
    """All of the set, image by image: (mixed (n, C, H, W) float64, partners, weights)."""
    n, size = len(x), x.pixels.shape[-1]
    images = ((x.pixels.double() / 255 - MEAN.double()[:, None, None]) / STD.double()[:, None, None]).numpy()
    rows = naive_counter(range(n), 5, "view", *key, epoch)
    own = [naive_crop(image, u, recipe) for image, u in zip(images, rows, strict=True)]
    if recipe.mix == "none":
        return np.stack(own), list(range(n)), [1.0] * n
    partner = torch.randperm(n, generator=rng("mix", *key, epoch)).tolist()
    mixed, weights = [], []
    for i, (u, down, right) in enumerate(naive_counter(range(n), 3, "mix", *key, epoch)):
        lam, out = naive_quantile(u, recipe.mix_alpha), own[i].copy()
        if recipe.mix == "mixup":
            out = lam * own[i] + (1 - lam) * own[partner[i]]
        else:
            half, replaced = int(size * math.sqrt(1 - lam)) // 2, 0
            for row, column in itertools.product(range(size), range(size)):
                above, left = row - int(down * size), column - int(right * size)
                if -half <= above < half and -half <= left < half:
                    out[:, row, column] = own[partner[i]][:, row, column]
                    replaced += 1
            lam = 1 - replaced / size**2
        mixed.append(out)
        weights.append(lam)
    return np.stack(mixed), partner, weights


KINDS = [
    dict(crop="none", flip=False), dict(crop="pad"), dict(crop="pad", flip=False), dict(crop="none"),
    dict(crop="resized", crop_min=0.3), dict(crop="resized", flip=False, mix="mixup", mix_alpha=0.8),
    dict(crop="pad", mix="mixup", mix_alpha=1.0), dict(crop="none", mix="cutmix", mix_alpha=1.0),
    dict(crop="resized", mix="cutmix", mix_alpha=0.8),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_the_loop(kind):
    x, recipe = pixel_set(), SoftRecipe(**kind)
    for epoch in (0, 3):
        mixed, partner, lam = views(x, epoch, torch.arange(11), recipe, 7, "run")
        images, partners, weights = naive_views(x, epoch, recipe, 7, "run")
        assert partner.tolist() == partners
        np.testing.assert_allclose(lam.numpy(), weights, rtol=0, atol=2e-6)
        np.testing.assert_allclose(mixed.numpy(), images, rtol=0, atol=2e-5)
    assert mixed.dtype == lam.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_derived_again_bit_for_bit(kind):
    """Whatever the batch and its order, and whatever was asked in between."""
    x, recipe = pixel_set(37), SoftRecipe(**kind)
    whole = views(x, 5, torch.arange(37), recipe, 1)
    views(x, 6, torch.arange(3), recipe, 1), views(x, 5, torch.arange(3), recipe, 2)
    order = torch.randperm(37, generator=rng("any order"))
    for batch in (1, 2, 5, 16, 36):
        common.relabel.epoch_plan.cache_clear()
        for index in order.split(batch):
            assert equal(views(x, 5, index, recipe, 1), [part[index] for part in whole])
    assert equal(views(x, 5, torch.tensor([4, 4]), recipe, 1), [part[[4, 4]] for part in whole])


@pytest.mark.parametrize("kind", [dict(crop="pad"), dict(crop="resized"), dict(mix="mixup"), dict(mix="cutmix")])
def test_epochs_and_keys_have_views_of_their_own(kind):
    x, recipe = pixel_set(64), SoftRecipe(**kind)
    index = torch.arange(64)
    seen = [views(x, epoch, index, recipe, *key)[0] for epoch in (0, 1) for key in ((0, 0), (0, 1), (1, 0))]
    for one, other in itertools.combinations(seen, 2):
        assert (one != other).flatten(1).any(1).float().mean() > 0.8


def test_views_of_a_tensor_are_of_the_tensor_as_it_is():
    x = draw(9, 3, 8, 8, dtype=torch.float32)
    plain = SoftRecipe(crop="none", flip=False)
    assert torch.equal(views(x, 0, torch.tensor([5, 2]), plain)[0], x[[5, 2]])
    float_pixels = Inputs(x, torch.zeros(3), torch.ones(3), None, CPU, 0.0)
    for recipe in (SoftRecipe(mix="cutmix"), SoftRecipe(crop="resized")):
        assert equal(views(x, 2, torch.arange(9), recipe, 4), views(float_pixels, 2, torch.arange(9), recipe, 4))


@pytest.mark.parametrize("alpha", [0.8, 1.0, 0.5, 3.0])
def test_mixing_weights_are_beta_variables(alpha):
    x = torch.zeros(20_000, 1, 1, 1)
    lam = views(x, 0, torch.arange(20_000), SoftRecipe(mix="mixup", mix_alpha=alpha), "beta")[2].double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 4 * math.sqrt(variance / 20_000)
    assert float(lam.var()) == pytest.approx(variance, rel=0.04)
    u = [row[0] for row in naive_counter(range(60), 3, "mix", "beta", 0)]
    np.testing.assert_allclose(lam[:60], [naive_quantile(value, alpha) for value in u], rtol=0, atol=2e-6)


def test_cutmix_boxes_are_the_published_ones():
    lam, u = (
        np.array([0.0, 0.0, 1.0, 0.75, 0.75, 0.5]),
        np.array([[0.5, 0.5], [0, 0.99], [0.5, 0.5], [0.5, 0.25], [0, 0.96], [0.7, 0.1]]),
    )
    found = cut_corners(lam, u, 32).tolist()
    assert found == [[0, 32, 0, 32], [0, 16, 15, 32], [16, 16, 16, 16], [8, 24, 0, 16], [0, 8, 22, 32], [11, 32, 0, 14]]


@pytest.mark.parametrize(("n", "batch"), [(7, 3), (12, 5), (9, 4), (6, 3), (3, 64), (1, 64), (2, 64), (5, 2)])
def test_every_epoch_is_a_permutation_and_no_batch_has_one_image(n, batch):
    orders = set()
    for epoch in range(6):
        parts = epoch_batches(n, batch, 0, epoch)
        order = torch.randperm(n, generator=rng("soft order", 0, epoch)).tolist()
        assert torch.cat(parts).tolist() == order
        sizes = [batch] * (n // batch) + [n % batch] * (n % batch > 0)
        if len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [batch + 1]
        assert [len(part) for part in parts] == sizes
        orders.add(tuple(order))
    assert len(orders) > 1 or n < 3


# ----------------------------------------------------------------------------------------------------------- the labels


class Normed(nn.Module):
    """A float64 network whose logits depend on the mode: convolution, BatchNorm, linear."""

    def __init__(self, channels=2, size=6, classes=4, seed=0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * size * size, classes)
        self.double()
        for i, p in enumerate([*self.parameters(), self.norm.running_mean]):
            p.data.copy_(draw(*p.shape, seed=100 * seed + i))
        self.norm.running_var.fill_(2.5)

    def maps(self, x):
        return self.conv(x.double())

    def forward(self, x):
        return self.head(self.norm(self.maps(x)).relu().flatten(1))


def naive_logits(net, x, mean, var):
    """Of Normed, with these statistics."""
    with torch.no_grad():
        normed = (net.maps(x) - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return net.head((normed * net.norm.weight[:, None, None] + net.norm.bias[:, None, None]).relu().flatten(1))


def of_batch(net, x):
    maps = net.maps(x).detach().transpose(0, 1).flatten(1)
    return maps.mean(1), maps.var(1, correction=0)


def test_teacher_train_takes_the_batchs_statistics_and_keeps_the_buffers():
    net, x = Normed().eval(), draw(5, 2, 6, 6, seed=3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    still = logits_of(net, x, SoftRecipe())
    assert torch.allclose(still, naive_logits(net, x, net.norm.running_mean, net.norm.running_var), rtol=1e-10)
    moved = logits_of(net, x, SoftRecipe(teacher_train=True))
    assert torch.allclose(moved, naive_logits(net, x, *of_batch(net, x)), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(moved, still, rtol=0.1) and not moved.requires_grad
    with pytest.raises(RuntimeError), batch_statistics(net):
        assert net.norm.running_mean is None
        raise RuntimeError
    assert list(net.state_dict()) == list(before) and equal(net.state_dict().values(), before.values())
    assert not net.training and not net.norm.training
    assert torch.equal(logits_of(net, x, SoftRecipe()), still)


@pytest.mark.parametrize("teacher_train", [False, True])
def test_stored_labels_are_the_teachers_logits_of_the_views(tmp_path, monkeypatch, teacher_train):
    """In every epoch, also where epochs are asked for in another order; one file that safetensors reads."""
    monkeypatch.setattr(common.relabel, "BLOCK", 5)  # images that are labelled together: in three parts
    x, teacher, path = pixel_set(), Normed(), tmp_path / "labels.safetensors"
    kind = dict(crop="resized", mix="cutmix", epochs=3, batch=4, labels="stored", teacher_train=teacher_train)
    recipe = SoftRecipe(**kind)
    label_all(x, teacher, recipe, path, 7, "run")
    kept = load_file(path)["logits"]
    assert kept.shape == (3, 11, 4) and kept.dtype == torch.float16
    assert kept.nbytes == label_bytes(11, 4, recipe) == 264 and path.stat().st_size - 264 < 2000
    labels = StoredLabels(path, x, recipe, 7, "run", teacher=teacher)
    for epoch in (2, 0, 1):
        mixed = views(x, epoch, torch.arange(11), recipe, 7, "run")[0]
        expected = naive_logits(teacher, mixed, teacher.norm.running_mean, teacher.norm.running_var)
        if teacher_train:
            order = torch.randperm(11, generator=rng("soft order", 7, "run", epoch))
            for index in order.split(4):
                expected[index] = naive_logits(teacher, mixed[index], *of_batch(teacher, mixed[index]))
        torch.testing.assert_close(kept[epoch].double(), expected, rtol=2**-11, atol=1e-6)
        index = torch.tensor([3, 10, 3])
        assert torch.equal(labels(mixed[index], epoch, index), kept[epoch][index].float())


def test_stored_labels_give_the_loss_of_those_in_memory(tmp_path):
    x, teacher, path = pixel_set(), Normed(), tmp_path / "labels.safetensors"
    recipe = SoftRecipe(mix="mixup", epochs=2, labels="stored", temperature=3)
    label_all(x, teacher, recipe, path, 0)
    labels, y, index = StoredLabels(path, x, recipe, 0, teacher=teacher), torch.arange(11) % 4, torch.arange(10, -1, -1)
    for epoch, loss in itertools.product(range(2), ("kl", "mse_ce")):
        mixed, partner, lam = views(x, epoch, index, recipe, 0)
        scores, kind = draw(11, 4, seed=9, dtype=torch.float32), dataclasses.replace(recipe, loss=loss)
        memory = logits_of(teacher, mixed, recipe).float()
        terms = [soft_loss(scores, each, y, y[partner], lam, kind) for each in (memory, labels(mixed, epoch, index))]
        assert torch.equal(*terms)
        exact = logits_of(teacher, mixed, dataclasses.replace(recipe, labels="online")).float()
        assert not torch.equal(exact, memory) and torch.allclose(exact, memory, rtol=2**-10)


@pytest.mark.parametrize("teacher_train", [False, True])
def test_a_student_of_the_file_is_the_student_of_the_teacher(tmp_path, teacher_train):
    """teacher_train: the labels of the file were made in the batches that the student has."""
    x, teacher, y, path = pixel_set(), Normed(), torch.arange(11) % 4, tmp_path / "labels.safetensors"
    recipe = SoftRecipe(epochs=3, batch=4, mix="cutmix", labels="stored", teacher_train=teacher_train, temperature=2)
    label_all(x, teacher, recipe, path, 3)
    students = []
    for labels in (StoredLabels(path, x, recipe, 3), teacher):
        net = Normed(seed=1)
        assert post_train(net, x, y, labels, recipe, 3) is net
        students.append(net)
    ours, theirs = (torch.cat([p.flatten() for p in net.parameters()]) for net in students)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_labels_of_something_else_are_refused(tmp_path):
    x, teacher, path = pixel_set(), Normed(), tmp_path / "labels.safetensors"
    recipe = SoftRecipe(epochs=2, labels="stored", crop="resized", mix="mixup", teacher_train=True)
    label_all(x, teacher, recipe, path, 0)

    def read(x=x, key=(0,), teacher=teacher, **changes):
        return StoredLabels(path, x, dataclasses.replace(recipe, **changes), *key, teacher=teacher)

    read(), read(teacher=None), read(epochs=1), read(temperature=2, lr=1, opt="sgd", loss="mse_ce")  # of the student
    changes = dict(crop="pad", crop_min=0.2, flip=False, mix="cutmix", mix_alpha=0.5, teacher_train=False, batch=9)
    for name, value in changes.items():
        refuse(lambda name=name, value=value: read(**{name: value}), str(path), f"another {name}", "delete")
    refuse(lambda: read(key=(1,)), "another key")
    refuse(lambda: read(teacher=Normed(seed=2)), "another teacher")
    refuse(lambda: read(x=pixel_set(seed=6)), "another images")
    brighter = Inputs(x.pixels, MEAN + 0.1, STD, None, CPU, 0.0)
    refuse(lambda: read(x=brighter), "another images")
    refuse(lambda: read(epochs=3), "2 epochs and 11 images", "3 and 11", "delete")
    save_file({"logits": torch.zeros(2, 11, 4)}, path)
    refuse(read, "format None", "soft labels 1", "make them again")
    path.write_bytes(b"half a file")
    refuse(read, "no readable soft labels", "make them again")
    path.unlink()
    refuse(read, "no readable soft labels", "make them again")


def test_facts_that_a_view_does_not_depend_on_are_not_compared(tmp_path):
    x, teacher, path = pixel_set(), Normed(), tmp_path / "labels.safetensors"
    recipe = SoftRecipe(epochs=1, labels="stored")
    label_all(x, teacher, recipe, path, 0)
    StoredLabels(path, x, dataclasses.replace(recipe, crop_min=0.5, mix_alpha=2.0, batch=7), 0)


def test_labels_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    x, path, recipe = pixel_set(), tmp_path / "labels.safetensors", SoftRecipe(epochs=5, labels="stored")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(common.relabel.shutil, "disk_usage", lambda folder: usage(10**9, 0, 5 * 11 * 4 * 2 - 1))
    refuse(lambda: label_all(x, Normed(), recipe, path, 0), str(path), "5 epochs", "4.4e-07 GB", "--labels online")
    monkeypatch.setattr(common.relabel.shutil, "disk_usage", lambda folder: usage(10**9, 0, 5 * 11 * 4 * 2))
    label_all(x, Normed(), recipe, path, 0)
    before = path.read_bytes()
    for scale in (math.nan, 1e9):  # the second overflows in half precision alone
        broken = Normed()
        broken.head.weight.data *= scale
        for labels in ("stored", "online"):
            kind = dataclasses.replace(recipe, labels=labels)
            refuse(lambda broken=broken, kind=kind: label_all(x, broken, kind, path, 0), "not finite (epoch 0", "anew")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_labelling_holds_one_epoch_in_memory(tmp_path, monkeypatch):
    """Each epoch is written before the next one is labelled."""
    x, teacher, path, written = pixel_set(), Normed(), tmp_path / "labels.safetensors", []
    epoch_of = common.relabel.label_epoch

    def watch(*args):
        written.append(next(tmp_path.glob(".labels*")).stat().st_size)
        return epoch_of(*args)

    class File:
        def __init__(self, path, mode):
            self.file = raw_open(path, mode, buffering=0)

        def __enter__(self):
            return self.file

        def __exit__(self, *error):
            self.file.close()

    raw_open = open
    monkeypatch.setattr(common.relabel, "open", File, raising=False)
    monkeypatch.setattr(common.relabel, "label_epoch", watch)
    label_all(x, teacher, SoftRecipe(epochs=4, labels="stored"), path, 0)
    assert np.diff(written).tolist() == [11 * 4 * 2] * 3
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["key"]) == "(0,)"


# --------------------------------------------------------------------------------------------------------- the training


def softmax(x):
    odds = np.exp(x - x.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 30.0])
def test_the_divergence_equals_its_loops(temperature, scaled):
    scores, target, other = draw(7, 5), 9 * draw(7, 5, seed=1), torch.zeros(7)
    terms = []
    for s, t in zip(scores.tolist(), target.tolist(), strict=True):
        p, q = ([math.exp(value / temperature) for value in row] for row in (t, s))
        p, q = ([value / sum(row) for value in row] for row in (p, q))
        terms.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    recipe = SoftRecipe(temperature=temperature, scaled=scaled)
    found = float(soft_loss(scores, target, other.long(), other.long(), other, recipe))
    assert found == pytest.approx(sum(terms) / 7 * (temperature**2 if scaled else 1), rel=1e-10)


@pytest.mark.parametrize("weight", [0.025, 0.15])
def test_squared_error_and_cross_entropy_equal_their_loops(weight):
    scores, target, lam = draw(7, 5), draw(7, 5, seed=1), draw(7, seed=2).sigmoid()
    y, other = torch.arange(7) % 5, torch.arange(7) % 3
    squares, entropies = [], []
    for s, t, own, mixed, part in zip(*(each.tolist() for each in (scores, target, y, other, lam)), strict=True):
        squares += [(a - b) ** 2 for a, b in zip(s, t, strict=True)]
        log_sum = math.log(sum(math.exp(value) for value in s))
        entropies.append(part * (log_sum - s[own]) + (1 - part) * (log_sum - s[mixed]))
    recipe = SoftRecipe(loss="mse_ce", ce_weight=weight)
    expected = sum(squares) / 35 + weight * sum(entropies) / 7
    assert float(soft_loss(scores, target, y, other, lam, recipe)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("warm_up", "smooth"), [(0, 1), (0, 2), (5, 1), (3, 2), (30, 1)])
def test_soft_lr_is_torchs_schedule(warm_up, smooth):
    """Linear and cosine one after the other; `smooth` makes the cosine longer and so cuts its end off."""
    recipe = SoftRecipe(epochs=30, lr=0.2, warm_up=warm_up, smooth=smooth)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = torch.optim.lr_scheduler
    parts = [schedule.CosineAnnealingLR(optimizer, smooth * max(1, 30 - warm_up))]
    if warm_up:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
        parts = [schedule.LinearLR(optimizer, 0.01, total_iters=warm_up)]
        parts.append(schedule.CosineAnnealingLR(optimizer, smooth * max(1, 30 - warm_up)))
    both = schedule.SequentialLR(optimizer, parts, [warm_up] if warm_up else [])
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    assert [soft_lr(epoch, recipe) for epoch in range(30)] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_decay_leaves_vectors_alone_unless_asked(opt):
    """With zero gradients a parameter moves by its decay alone."""
    for decay_all in (True, False):
        net = Normed()
        before = [p.detach().clone() for p in net.parameters()]
        recipe = SoftRecipe(opt=opt, lr=0.1, weight_decay=0.5, momentum=0.0, decay_all=decay_all)
        optimizer = soft_optimizer(net, recipe)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert type(optimizer) is {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[opt]
        for p, old in zip(net.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old * (0.95 if decay_all or p.ndim > 1 else 1.0), rtol=1e-12, atol=0)


def test_average_is_the_sum_by_hand_and_copies_buffers():
    nets = [Normed(seed=seed) for seed in range(4)]
    average, expected = nets[0], [p.detach().clone() for p in nets[0].parameters()]
    for net in nets[1:]:
        net.norm.running_mean.add_(1), net.norm.num_batches_tracked.add_(3)
        average_(average, net, 0.9)
        expected = [0.9 * old + 0.1 * new for old, new in zip(expected, net.parameters(), strict=True)]
        assert equal(average.buffers(), net.buffers())
    for p, wanted in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted.detach(), rtol=1e-12, atol=1e-14)


class LinearNet(nn.Module):
    """A linear network in float64 that keeps what it is given."""

    def __init__(self, inputs, classes, seed=0):
        super().__init__()
        self.linear, self.seen, self.modes = nn.Linear(inputs, classes, dtype=F64), [], set()
        self.linear.weight.data.copy_(draw(classes, inputs, seed=8 + seed))
        self.linear.bias.data.copy_(draw(classes, seed=9 + seed))

    def forward(self, x):
        self.seen.append(x.detach().clone())
        self.modes.add(self.training)
        return self.linear(x.flatten(1).double())


def naive_fit(net, teacher, x, y, recipe, *key):
    """Weights (classes, inputs + 1), the bias last, after every epoch: gradients by hand, AdamW or SGD as they are
    written in their papers; and their running average."""
    w, w_t = (np.hstack([n.linear.weight.detach(), n.linear.bias.detach()[:, None]]) for n in (net, teacher))
    m, v, steps, average, epochs = np.zeros_like(w), np.zeros_like(w), 0, w.copy(), []
    decay = np.full(w.shape, recipe.weight_decay)
    if not recipe.decay_all:
        decay[:, -1] = 0
    for epoch in range(recipe.epochs):
        lr = recipe.lr * 0.5 * (1 + math.cos(math.pi * epoch / (recipe.smooth * recipe.epochs)))
        mixed, partner, lam = views(x, epoch, torch.arange(len(x)), recipe, *key)  # checked above
        mixed = np.hstack([mixed.flatten(1).double().numpy(), np.ones((len(x), 1))])
        order = torch.randperm(len(x), generator=rng("soft order", *key, epoch)).tolist()
        for start in range(0, len(x), recipe.batch):
            index = order[start : start + recipe.batch]
            s, t, size = mixed[index] @ w.T, mixed[index] @ w_t.T, len(index)
            if recipe.loss == "kl":
                error = (softmax(s / recipe.temperature) - softmax(t / recipe.temperature)) / recipe.temperature / size
                error *= recipe.temperature**2 if recipe.scaled else 1
            else:
                hard, eye = lam[index].double().numpy()[:, None], np.eye(s.shape[1])
                hard = hard * eye[y[index]] + (1 - hard) * eye[y[partner[index]]]
                error = 2 * (s - t) / s.size + recipe.ce_weight * (softmax(s) - hard) / size
            g, steps = error.T @ mixed[index], steps + 1
            if recipe.opt == "adamw":
                w = w - lr * decay * w
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                w = w - lr * (m / (1 - 0.9**steps)) / (np.sqrt(v / (1 - 0.999**steps)) + 1e-8)
            else:
                m = (recipe.momentum if steps > 1 else 0) * m + g + decay * w
                w = w - lr * m
            average = recipe.ema * average + (1 - recipe.ema) * w
        epochs.append(average if recipe.ema else w)
    return w, epochs


@pytest.mark.parametrize(
    "kind",
    [dict(), dict(temperature=3.0, scaled=True, mix="cutmix", smooth=2.0), dict(loss="mse_ce", mix="mixup", ema=0.7),
     dict(opt="sgd", temperature=2.0, decay_all=False, ema=0.9), dict(loss="mse_ce", mix="cutmix", decay_all=False),
     dict(opt="sgd", loss="mse_ce", momentum=0.5, crop="resized")],
)  # fmt: skip
def test_post_train_is_the_recipe_by_hand(kind):
    x, y, net, teacher = pixel_set(10), torch.arange(10) % 4, LinearNet(72, 4), LinearNet(72, 4, seed=5)
    recipe = SoftRecipe(**dict(epochs=5, batch=4, lr=0.02, weight_decay=0.3) | kind)
    expected, epochs = naive_fit(net, teacher, x, y, recipe, 5, 2)

    def weights(net):
        return torch.cat([net.linear.weight, net.linear.bias[:, None]], 1).detach().numpy().copy()

    seen = []
    scored = post_train(net, x, y, teacher, recipe, 5, 2, after=lambda done, each: seen.append((done, weights(each))))
    np.testing.assert_allclose(weights(net), expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(weights(scored), epochs[-1], rtol=1e-8, atol=1e-10)
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5] and (scored is net) == (not recipe.ema)
    for (_, found), wanted in zip(seen, epochs, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10)


def test_student_and_teacher_see_the_same_batches():
    """In train and in eval mode; an order of its own changes the batches and no view."""
    x, y, recipe = pixel_set(10), torch.arange(10) % 4, SoftRecipe(epochs=2, batch=4, mix="mixup")
    seen = {}
    for order in ((), (1,)):
        net, teacher = LinearNet(72, 4).eval(), LinearNet(72, 4, seed=5).train()
        post_train(net, x, y, teacher, recipe, 5, order=order, after=lambda done, scored: scored.eval())
        assert equal(net.seen, teacher.seen) and net.modes == {True} and teacher.modes == {False}
        expected = []
        for epoch in range(2):
            places = torch.randperm(10, generator=rng("soft order", 5, *order, epoch)).split(4)
            expected += [views(x, epoch, index, recipe, 5)[0] for index in places]
        assert equal(net.seen, expected)
        seen[order] = torch.cat(net.seen[:3])
    ours, theirs = ({tuple(image.flatten().tolist()) for image in images} for images in seen.values())
    assert ours == theirs and not torch.equal(*seen.values())


def test_the_teachers_buffers_and_weights_stay():
    for teacher_train in (False, True):
        teacher, net = Normed().train(), Normed(seed=1)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        recipe = SoftRecipe(epochs=2, batch=4, teacher_train=teacher_train)
        post_train(net, pixel_set(), torch.arange(11) % 4, teacher, recipe, 0)
        assert equal(teacher.state_dict().values(), before.values())
        assert all(p.grad is None for p in teacher.parameters())


def test_students_that_cannot_be_trained_are_refused():
    x, y, teacher = pixel_set(), torch.arange(11) % 4, LinearNet(72, 4, seed=5)

    def fit(x=x, y=y, **changes):
        recipe = SoftRecipe(**dict(epochs=2, loss="mse_ce") | changes)
        return post_train(LinearNet(72, 4), x, y, teacher, recipe, 0)

    fit()
    refuse(lambda: fit(lr=1e200), "11 images", "ended at loss", "--eval-lr 1e+200")
    refuse(lambda: fit(x=pixel_set(1), y=y[:1]), "one image", "--ipc")
    for changes, words in {
        ("opt", "lion"): ["opt 'lion'", "adamw, sgd"], ("loss", "l1"): ["loss 'l1'", "kl, mse_ce"],
        ("crop", "five"): ["crop 'five'", "pad, resized, none"], ("mix", "puzzle"): ["mix 'puzzle'", "mixup, cutmix"],
        ("labels", "none"): ["labels 'none'", "online, stored"], ("batch", 1): ["batch 1", "at least 2"],
        ("epochs", 0): ["epochs 0", "at least 1"], ("runs", 0): ["runs 0", "at least 1"],
        ("temperature", 0.0): ["temperature 0.0", "at least 1e-06"], ("smooth", 0.5): ["smooth 0.5", "at least 1"],
        ("crop_min", 1.5): ["crop_min 1.5", "in 0.0001 .. 1"], ("mix_alpha", 0.0): ["mix_alpha 0.0", "at least 0.001"],
        ("ema", 1.0): ["ema 1.0", "in 0 .. 1"], ("warm_up", -1): ["warm_up -1", "at least 0"],
    }.items():  # fmt: skip
        refuse(lambda changes=changes: fit(**dict([changes])), *words)
        refuse(lambda changes=changes: check_recipe(SoftRecipe(**dict([changes]))), *words)


# ----------------------------------------------------------------------------------------------------------- real crops


@pytest.fixture(scope="module")
def few():
    """300 training and 100 test images of digits."""
    digits = load("digits")
    parts = dict(x_train=digits.x_train[:300], y_train=digits.y_train[:300])
    return dataclasses.replace(digits, **parts, x_test=digits.x_test[:100], y_test=digits.y_test[:100])


def naive_square(image, u):
    """A square box of one image (C, S, S), resized back."""
    size, out = image.shape[-1], np.zeros(image.shape)
    side = math.sqrt(0.08 + u[0] * 0.92)
    for i, j in itertools.product(range(size), range(size)):
        column = ((1 - side) * u[2] + side * (j + 0.5) / size) * size - 0.5
        row = ((1 - side) * u[3] + side * (i + 0.5) / size) * size - 0.5
        column, row = (min(max(place, 0), size - 1) for place in (column, row))
        left, top = (min(int(place), size - 2) for place in (column, row))
        s, t = column - left, row - top
        upper = (1 - s) * image[:, top, left] + s * image[:, top, left + 1]
        lower = (1 - s) * image[:, top + 1, left] + s * image[:, top + 1, left + 1]
        out[:, i, j] = (1 - t) * upper + t * lower
    return out


@pytest.mark.parametrize(("pool", "crops", "ipc"), [(9, 5, 3), (300, 2, 4), (4, 1, 4)])
def test_random_crops_are_the_loop(few, pool, crops, ipc):
    data = dataclasses.replace(few, x_train=few.x_train[:150], y_train=few.y_train[:150])
    net, expected = LinearNet(64, 10), []
    weight, bias = net.linear.weight.detach().numpy(), net.linear.bias.detach().numpy()
    order = torch.randperm(150, generator=rng("random crops", 3)).tolist()
    for label in range(10):
        best = []
        for place in [i for i in order if data.y_train[i] == label][:pool]:
            u, scored = naive_counter([place], 4 * crops, "random crops", 3)[0], []
            for crop in range(crops):
                image = naive_square(data.x_train[place].double().numpy() / 255, u[4 * crop : 4 * crop + 4])
                scores = weight @ ((image - float(data.mean)) / float(data.std)).ravel() + bias
                scored.append((math.log(np.exp(scores).sum()) - scores[label], image))
            best.append(min(scored, key=lambda pair: pair[0]))
        expected += [image for _, image in sorted(best, key=lambda pair: pair[0])[:ipc]]
    x, y = random_crops(data, net, ipc, CPU, 3, pool=pool, crops=crops)
    np.testing.assert_allclose(x.numpy(), np.stack(expected), rtol=0, atol=1e-5)
    assert x.dtype == torch.float32 and y.tolist() == [label for label in range(10) for _ in range(ipc)]
    again, other = (random_crops(data, net, ipc, CPU, seed, pool=pool, crops=crops)[0] for seed in (3, 4))
    assert torch.equal(again, x) and not torch.equal(other, x)


def test_more_crops_than_images_are_refused(few):
    fewest = int(few.y_train.bincount().min())
    name = few.class_names[int(few.y_train.bincount().argmin())]
    random_crops(few, LinearNet(64, 10), fewest, CPU, 0)
    line = refuse(lambda: random_crops(few, LinearNet(64, 10), fewest + 1, CPU, 0), f"--ipc {fewest + 1}", "lower")
    assert f"class {name} {fewest} are" in line
    refuse(lambda: random_crops(few, LinearNet(64, 10), 6, CPU, 0, pool=5), "--ipc 6", "5 are")


# ------------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("n", [10, 64, 65, 128, 300, 1000])
def test_prefix_maximum_is_the_loop(n):
    for seed in range(5):
        right = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.4
        best, done, hit = 0.0, 0, 0
        while done < n:
            batch = right[done : done + 64].tolist()
            done, hit = done + len(batch), hit + sum(batch)
            best = max(best, hit / done)
        assert prefix_maximum(right) == pytest.approx(best, abs=1e-6) and best >= float(right.float().mean()) - 1e-6


def test_the_published_metric_looks_at_every_tenth_epoch_and_the_last():
    looked = [done for done in range(1, 26) if is_scored(done, SoftRecipe(epochs=25))]
    assert looked == [10, 20, 25]


def test_hits_are_of_all_test_images_in_eval_mode(few):
    test = as_inputs(normalise(load("digits").x_test, few.mean, few.std))
    y, net = load("digits").y_test, Normed(1, 8, 10).train()
    found = hits(net, test, y)
    scores = naive_logits(net, test(torch.arange(len(y))), net.norm.running_mean, net.norm.running_var)
    assert found.tolist() == [int(row.argmax()) == int(label) for row, label in zip(scores, y, strict=True)]
    assert len(found) == 360 and 0 < found.sum() < 360


SEED, ROWS = 3, ("random_real", "same", "all_real")
TINY = SoftRecipe(
    epochs=12, runs=2, batch=16, lr=5e-3, temperature=4, crop="pad", flip=False, mix="cutmix", weight_decay=0
)  # fmt: skip


class Small(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.conv, self.norm, self.head = (
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.Linear(16 * width, 10),
        )

    def forward(self, x):
        return self.head(F.avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1))


@pytest.fixture(scope="module")
def teacher():
    """A supervised one, trained on all digits."""
    digits = load("digits")
    with seeded("soft label teacher"):
        net = Small(16)
    x, optimizer = normalise(digits.x_train, digits.mean, digits.std), torch.optim.Adam(net.parameters(), 5e-3)
    for epoch in range(6):
        for index in torch.randperm(len(x), generator=rng("teacher", epoch)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), digits.y_train[index]).backward()
            optimizer.step()
    net.eval()
    assert hits(net, as_inputs(normalise(digits.x_test, digits.mean, digits.std)), digits.y_test).float().mean() > 0.9
    return net


def real(data, run, ipc=3):
    index = per_class(data.y_train, ipc, "random real", SEED, run)
    return data.x_train[index], data.y_train[index]


def sets_of(data):
    """`same` is what random_real draws for student 1, as float pixels."""
    x, y = real(data, 1)
    return dict(
        random_real=lambda run: real(data, run), same=(x.float() / 255, y), all_real=(data.x_train, data.y_train)
    )


def evaluate(data, teacher, recipe=TINY, seed=SEED, student=Small, sets=None, **kind):
    return evaluate_soft(sets or sets_of(data), data, student, teacher, CPU, recipe, seed, **kind)


class Watch:
    """Records every student: what it starts from and is trained on, and the network that is scored."""

    def __init__(self, monkeypatch):
        self.fits, self.fit, self.stop_at = [], common.relabel.post_train, None
        monkeypatch.setattr(common.relabel, "post_train", self)

    def __call__(self, net, x, y, labels, recipe, *key, **rest):
        if len(self.fits) == self.stop_at:
            raise KeyboardInterrupt
        start = [p.detach().clone() for p in net.parameters()]
        scored = self.fit(net, x, y, labels, recipe, *key, **rest)
        whole = x(torch.arange(len(x)))
        self.fits.append(dict(net=scored, start=start, x=whole, y=y, labels=labels, key=key, order=rest["order"]))
        return scored


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.fixture(scope="module")
def scored(few, teacher):
    """One evaluation with its students by (row, run)."""
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        results = evaluate(few, teacher, published=True)
    assert torch.equal(torch.get_rng_state(), before)
    return results, dict(zip(itertools.product(ROWS, range(2)), watch.fits, strict=True))


def test_rows_are_trained_on_what_they_say_and_start_alike(scored, few):
    for (row, run), fit in scored[1].items():
        x, y = {"random_real": real(few, run), "same": real(few, 1), "all_real": (few.x_train, few.y_train)}[row]
        assert torch.equal(fit["x"], normalise(x, few.mean, few.std)) and torch.equal(fit["y"], y)
        assert (fit["key"], fit["order"]) == ((SEED, run), ())
        assert equal(fit["start"], scored[1]["same", run]["start"])
    assert not equal(scored[1]["same", 0]["start"], scored[1]["same", 1]["start"])
    results = scored[0]
    for metric in ("student", "published_metric"):  # float and uint8 pixels of one set
        assert results["random_real"][metric]["values"][1] == results["same"][metric]["values"][1]
    assert results["random_real"] != results["same"]


def test_scores_are_of_the_last_epoch_on_all_test_images(scored, few):
    results, students = scored
    assert tuple(results) == ROWS
    x_test = normalise(few.x_test, few.mean, few.std)
    for (row, run), fit in students.items():
        with torch.no_grad():
            right = fit["net"].eval()(x_test).argmax(1) == few.y_test
        assert results[row]["student"]["values"][run] == pytest.approx(int(right.sum()) / 100, abs=1e-6)
        assert results[row]["published_metric"]["values"][run] >= prefix_maximum(right)
    for column in itertools.chain(*(row.values() for row in results.values())):
        assert column["mean"] == pytest.approx(statistics.mean(column["values"]))
        assert column["std"] == pytest.approx(statistics.stdev(column["values"]))


def test_the_published_metric_is_a_maximum_over_prefixes_and_evaluations(few, teacher, monkeypatch):
    """With given hits: the second evaluation of three has the best prefix."""
    parts = [(0.2, 0.5), (0.9, 0.1), (0.3, 0.3), (0.3, 0.3)]  # of the first 64 test images, and of the other 36
    looks = iter(parts)

    def given(net, test, y_test):
        first, rest = next(looks)
        return torch.tensor([i < first * 64 for i in range(64)] + [i < rest * 36 for i in range(36)])

    monkeypatch.setattr(common.relabel, "hits", given)
    recipe = dataclasses.replace(TINY, runs=1, epochs=21, batch=64)
    found = evaluate(few, teacher, recipe, rows=("same",), published=True)["same"]
    assert found["published_metric"]["values"] == pytest.approx([58 / 64])
    assert found["student"]["values"] == pytest.approx([(20 + 11) / 100]) and next(looks, None) is None
    looks = iter([(0.5, 0.5)])
    assert set(evaluate(few, teacher, recipe, rows=("same",))["same"]) == {"student"}


def test_a_student_learns_digits_from_a_good_teacher(few, teacher):
    """And only from a good one: from a teacher whose classes are renamed it learns the renamed ones."""
    recipe = dataclasses.replace(TINY, epochs=60, runs=1, mix="none", lr=1e-2)
    results = {}
    for labels in ("online", "stored"):
        kind = dataclasses.replace(recipe, labels=labels)
        results[labels] = evaluate(few, teacher, kind, rows=("random_real",))["random_real"]["student"]["mean"]
        assert results[labels] > 0.6  # chance is 0.1
    renamed = nn.Sequential(teacher, Rename())
    assert evaluate(few, renamed, recipe, rows=("random_real",))["random_real"]["student"]["mean"] < 0.2
    data = dataclasses.replace(few, y_test=(few.y_test + 1) % 10)
    assert evaluate(data, renamed, recipe, rows=("random_real",))["random_real"]["student"]["mean"] > 0.6


class Rename(nn.Module):
    def forward(self, scores):
        return scores.roll(1, 1)


def test_students_of_stored_labels_see_the_same_views(few, teacher, watch):
    """Start and order differ; with teacher_train the order is that of the labels."""
    for teacher_train, order in ((False, (1,)), (True, ())):
        watch.fits.clear()
        evaluate(few, teacher, dataclasses.replace(TINY, labels="stored", teacher_train=teacher_train, epochs=1))
        assert [(fit["key"], fit["order"]) for fit in watch.fits[1::2]] == [((SEED,), order)] * 3
        assert not equal(watch.fits[0]["start"], watch.fits[1]["start"])


def test_a_row_is_read_from_its_file(few, teacher, watch, tmp_path):
    recipe, path = dataclasses.replace(TINY, labels="stored", runs=1), tmp_path / "labels.safetensors"
    sets = dict(same=sets_of(few)["same"])
    online = evaluate(few, teacher, recipe, sets=sets)
    x = Inputs(*sets["same"][:1], few.mean, few.std, None, CPU, 0.0)
    label_all(x, teacher, recipe, path, SEED)
    read = evaluate(few, teacher, recipe, sets=sets, stored=dict(same=path))
    assert isinstance(watch.fits[1]["labels"], StoredLabels) and watch.fits[0]["labels"] is teacher
    ours, theirs = (torch.cat([p.flatten() for p in fit["net"].parameters()]) for fit in watch.fits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)  # a label may round the other way
    assert read["same"]["student"]["mean"] == pytest.approx(online["same"]["student"]["mean"], abs=0.1)
    other = dict(same=(sets["same"][0] * 0.9, sets["same"][1]))
    refuse(lambda: evaluate(few, teacher, recipe, sets=other, stored=dict(same=path)), "another images")


def test_a_stopped_evaluation_goes_on_at_the_student_it_was_at(scored, few, teacher, tmp_path, watch):
    keep = tmp_path / "evaluation.json"

    def run(fits, recipe=TINY, **kind):
        watch.fits.clear()
        results = evaluate(few, teacher, recipe, keep=keep, published=True, **kind)
        assert len(watch.fits) == fits
        return results

    watch.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(None)
    watch.stop_at = None
    assert run(6 - 3) == scored[0]
    assert all(
        equal(fit["start"], old["start"]) for fit, old in zip(watch.fits, list(scored[1].values())[3:], strict=True)
    )
    assert run(0) == scored[0]
    more = run(3, dataclasses.replace(TINY, runs=3))
    assert [fit["key"] for fit in watch.fits] == [(SEED, 2)] * 3
    for row in ROWS:
        values = more[row]["student"]["values"]
        assert len(values) == 3 and values[:2] == scored[0][row]["student"]["values"]
    assert run(0, rows=("all_real", "same")) == {row: scored[0][row] for row in ("all_real", "same")}


CHANGED = dict(
    epochs=13, batch=15, opt="sgd", lr=1e-3, weight_decay=0.1, decay_all=False, momentum=0.5, warm_up=2, smooth=2.0,
    temperature=5.0, scaled=True, loss="mse_ce", ce_weight=0.5, crop="none", crop_min=0.5, flip=True, mix="mixup",
    mix_alpha=0.5, ema=0.5, teacher_train=True, labels="stored",
)  # fmt: skip


def test_scores_of_another_set_or_recipe_are_not_taken(few, teacher, tmp_path, watch):
    keep, once = tmp_path / "evaluation.json", dataclasses.replace(TINY, runs=1)
    sets = {row: sets_of(few)[row] for row in ("random_real", "same")}
    evaluate(few, teacher, once, sets=sets, keep=keep)
    text, watch.stop_at = keep.read_text(), 0  # a student that is trained from here on: KeyboardInterrupt
    watch.fits.clear()
    evaluate(few, teacher, once, sets=sets, keep=keep)
    assert {field.name for field in dataclasses.fields(SoftRecipe)} == {"runs", *CHANGED}
    others = [dict(recipe=dataclasses.replace(once, **{name: value})) for name, value in CHANGED.items()]
    pixels, y = sets["same"]
    brighter = dataclasses.replace(few, mean=few.mean * 0.9)
    held = hold_out(few, 0.25, 0)
    others += [
        dict(seed=4), dict(published=True), dict(facts=("ipc", 4)), dict(student=lambda: Small(7)),
        dict(teacher=nn.Sequential(teacher, nn.Linear(10, 10))), dict(sets=dict(sets, same=(pixels * 0.9, y))),
        dict(sets=dict(sets, same=(pixels, y.flip(0)))), dict(data=dataclasses.replace(few, content="others")),
        dict(data=brighter), dict(data=dataclasses.replace(few, y_test=few.y_test.flip(0))), dict(data=held[0]),
        dict(data=held[1]),
    ]  # fmt: skip
    for changes in others:
        with pytest.raises(KeyboardInterrupt):
            evaluate(**dict(data=few, teacher=teacher, recipe=once, sets=sets, keep=keep) | changes)
        assert keep.read_text() == text, changes
    keep.write_text("{half a file")
    with pytest.raises(KeyboardInterrupt):
        evaluate(few, teacher, once, sets=sets, keep=keep)


def test_a_recipe_that_cannot_be_is_refused_before_anything(few, teacher):
    refuse(lambda: evaluate(few, teacher, dataclasses.replace(TINY, batch=1), student=lambda: 1 / 0), "batch 1")


# ----------------------------------------------------------------------------------------------- prediction and text


@pytest.mark.parametrize("batch", [16, 500])
@pytest.mark.parametrize("published", [False, True])
def test_the_prediction_is_of_the_work_that_is_done(few, teacher, monkeypatch, batch, published, tmp_path):
    """Time that passes only in networks: 3 for an image of an update, 1 for one that is scored, 5 for one labelled."""
    passed = Counter()

    class Slow(Small):
        def forward(self, x):
            passed["student"] += (3 if torch.is_grad_enabled() else 1) * len(x)
            return super().forward(x)

    class SlowTeacher(nn.Sequential):
        def forward(self, x):
            passed["teacher"] += 5 * len(x)
            return super().forward(x)

    def seconds(function, device):
        before = passed.total()
        function()
        return passed.total() - before

    monkeypatch.setattr(common.relabel, "seconds_of", seconds)
    slow, path = SlowTeacher(teacher), tmp_path / "labels.safetensors"
    recipe = dataclasses.replace(TINY, batch=batch, labels="stored")
    sets = sets_of(few)
    label_all(Inputs(sets["same"][0], few.mean, few.std, None, CPU, 0.0), slow, recipe, path, SEED)
    sizes = dict(random_real=30, same=30, all_real=300)
    predicted = predict_seconds(sizes, few, Slow, slow, CPU, recipe, published, ("same",))
    passed.clear()
    evaluate(few, slow, recipe, student=Slow, published=published, stored=dict(same=path))
    assert predicted == pytest.approx(passed.total()) and passed["teacher"] == 5 * 2 * 12 * (30 + 300)
    online = dataclasses.replace(recipe, labels="online")  # files are not read then
    predicted, again = (
        predict_seconds(dict(same=30), few, Slow, slow, CPU, online, False, files) for files in ((), ("same",))
    )
    assert predicted == again


def test_table_names_the_published_metric_for_what_it_is():
    one, other = dict(mean=0.4567, std=0.012, values=[]), dict(mean=0.5, std=0.0, values=[])
    text = table({"random_real": {"student": one, "published_metric": other}, "recovered": {"student": one}}, "caption")
    lines = text.splitlines()
    assert re.split(r"  +", lines[0].strip()) == ["student", "prefix maximum"]
    assert lines[1].split() == ["random", "real", "45.7", "±", "1.2", "50.0", "±", "0.0"]
    assert lines[2].split() == ["recovered", "45.7", "±", "1.2", "-"] and lines[3] == "caption"
