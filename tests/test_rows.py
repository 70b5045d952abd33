"""common/rows.py: each row's images, targets and facts by hand, its networks against the scripts' own evaluations.

common/results.py: the tables' numbers by hand.
"""

import copy
import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from safetensors.torch import load_file, safe_open, save_file
from sklearn.cluster import KMeans
from torch import nn

import common.pairs
import common.relabel
import common.rows
import common.students
from common import baselines
from common.artefact import Distilled, fit_pairs
from common.bases import Code
from common.data import Inputs, Zca, load, part_of
from common.models import ConvNet, ResNet, frepo_student, pair_net
from common.pairs import Protocol, evaluate_pairs
from common.protocols import LabelRecipe, fit_labels
from common.relabel import SoftRecipe, evaluate_soft, label_all
from common.results import TABLES, against_random, entry_in_words, grid_of, krr_st_table, ranking_of, tables
from common.rows import (
    NEIGHBOURS,
    Entry,
    Row,
    frepo_labels,
    kind_of,
    make_network,
    neighbour,
    own_models,
    own_row,
    recipe_of,
    recipes_for,
    trained,
)
from common.run import UserError, rng, seed_of, seeded
from common.students import Recipe, evaluate_students
from common.teacher import Rescale, Teacher, classifier

F64 = torch.float64
CPU = torch.device("cpu")
CLASSES, DIM, IPC, SEED = 10, 6, 2, 3
N = CLASSES * IPC
WIDTHS = (4, 6)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def data():
    """8 training and 2 test images of each digit, in a mixed order."""
    digits = load("digits")

    def some(y, n):
        index = torch.cat([(y == label).nonzero()[:n, 0] for label in range(CLASSES)])
        return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]

    return part_of(digits, some(digits.y_train, 8), some(digits.y_test, 2))


def teacher_of(seed=0, mean=0.4, std=0.2, fc=True):
    """A linear teacher with constants of its own, which are not the data's."""
    with seeded("teacher", seed):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, DIM)).eval().requires_grad_(False)
        fc = nn.Linear(DIM, CLASSES).requires_grad_(False) if fc else None
    return Teacher(net, DIM, torch.tensor([mean]), torch.tensor([std]), "stub", {}, None, fc)


RECIPES = {
    "features": Protocol(epochs=3, batch=8, lr=0.05, momentum=0.7, weight_decay=0.01),
    "scores": Recipe(steps=4, batch=8, warm_up=2, dsa="color_crop_cutout"),
    "soft": SoftRecipe(epochs=4, batch=8, warm_up=1, mix="mixup", flip=False),
    "labels": LabelRecipe(epochs=4, batch=8, dsa="color_crop_cutout", lr=0.05),
}
WORDS = dict(features="teacher features", scores="class scores", labels="class labels", soft="class scores")
MATCHING = dict(
    dm=baselines.DM(iterations=2, batch_real=4, width=4),
    dsa=baselines.DSA(iterations=1, outer=2, inner=1, batch_real=4, width=4),
)


def distilled_of(kind, data, n=N, whitened=False, **changes):
    y = draw(n, DIM if kind == "features" else CLASSES, seed=11)
    if kind == "labels":
        y = F.one_hot(torch.arange(n) * CLASSES // n, CLASSES).float()
    settings = dict(
        x=draw(n, 1, 8, 8, seed=10) * 0.3 + 0.4, y=y, mean=data.mean, std=data.std, method="stub", data="digits",
        y_is=WORDS[kind], class_names=data.class_names, resize="none", step=5, seed=SEED,
        recipe={"mix": "mixup"} if kind == "soft" else {}, meta=dict(content=data.content),
    )  # fmt: skip
    if whitened:
        half = torch.eye(64) + 0.1 * draw(64, 64, seed=12)
        settings |= dict(zca=half @ half.T, zca_mean=draw(1, 8, 8, seed=13))
    return Distilled(**settings | changes)


@pytest.fixture
def make(data, tmp_path):
    """(kind, **changes of the Entry, zca, set=changes of the set) -> Entry."""

    def make(kind, zca=False, of=None, teacher=None, source=None, **changes):
        source = data if source is None else source
        teacher = teacher_of() if teacher is None else teacher
        settings = dict(
            name="stub", path=tmp_path / "distilled.safetensors", kind=kind, seed=SEED, runs=2, device=CPU,
            distilled=distilled_of(kind, data, whitened=zca, **of or {}), widths=WIDTHS, norm="batch",
            recipes=RECIPES, load_source=lambda: source, load_teacher=lambda: teacher, matching=MATCHING,
            high_loss=dict(networks=2, epochs=2), cache_gb=1.0, folder=tmp_path,
        )  # fmt: skip
        return Entry(**settings | changes)

    return make


# ------------------------------------------------------------------------------------------------ images, by their rule


def normal(entry, index):
    """Network inputs of training images in float64, whitened where the set is, pixel by pixel."""
    data, found = entry.source, []
    for i in index.tolist():
        values = [(p / 255 - float(data.mean[0])) / float(data.std[0]) for p in data.x_train[i].flatten().tolist()]
        found.append(values)
    found = torch.tensor(found, dtype=F64)
    if entry.distilled.zca is not None:
        found = (found - entry.distilled.zca_mean.double().flatten()) @ entry.distilled.zca.double()
    return found.view(-1, 1, 8, 8)


def featured(entry, pixels):
    """The stub teacher's features of pixels (n, 1, 8, 8) in units of white, in float64."""
    teacher, found = entry.teacher, []
    linear, mean, std = teacher.net[1], float(teacher.mean[0]), float(teacher.std[0])
    for image in pixels.double().flatten(1).tolist():
        seen = [(p - mean) / std for p in image]
        found.append([sum(w * p for w, p in zip(row, seen, strict=True)) + b
                      for row, b in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)])  # fmt: skip
    return torch.tensor(found, dtype=F64)


def scored(y):
    """FRePo's centred labels, number by number."""
    return torch.tensor([[((c == label) - 1 / CLASSES) / math.sqrt(CLASSES / 10) for c in range(CLASSES)]
                         for label in y.tolist()], dtype=F64)  # fmt: skip


def target(entry, kind, pixels, y):
    """What networks learn of made or real images, by hand."""
    return {"features": lambda: featured(entry, pixels), "scores": lambda: scored(y)}.get(kind, lambda: y)()


def check(entry, kind, got, index):
    """The row's images and targets are those of the training images at `index`."""
    images, y = got
    pixels = entry.source.x_train[index]
    if kind == "soft":
        assert torch.equal(images, pixels)
    else:
        assert images.dtype == torch.float32
        torch.testing.assert_close(images.double(), normal(entry, index), rtol=1e-4, atol=1e-4)
    wanted = target(entry, kind, pixels / 255, entry.source.y_train[index])
    if y.is_floating_point():
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(y, wanted)


def by_class(data, choose):
    """`choose`(places of a class, label) class after class, in loops."""
    y = data.y_train.tolist()
    return torch.tensor([i for label in range(CLASSES)
                         for i in choose([i for i, each in enumerate(y) if each == label], label)])  # fmt: skip


def are_medoids(index, features, *key):
    """Asserts that each is the nearest to its centre, of those that were not taken; two may be equally near."""
    rows = features.double() - features.double().mean(0)
    model = KMeans(len(index), n_init=1, random_state=seed_of("kmeans", *key) % 2**32).fit(rows.float().numpy())
    left = set(range(len(rows)))
    for i, centre in zip(index, model.cluster_centers_.tolist(), strict=True):
        far = [sum((a - b) ** 2 for a, b in zip(row, centre, strict=True)) for row in rows.tolist()]
        assert i in left and far[i] <= min(far[j] for j in left) * (1 + 1e-5) + 1e-6
        left.remove(i)


def places(plain, entry):
    """Where images, normalised, lie in the training set: those of `data` all differ."""
    pixels = plain * entry.source.std + entry.source.mean
    return torch.cdist(pixels.flatten(1), entry.source.x_train.flatten(1) / 255).argmin(1)


def herded(features, n):
    mean, chosen = features.double().mean(0), []
    for _ in range(n):
        gap = {}
        for i in range(len(features)):
            if i not in chosen:
                of = [features[j].double() for j in (*chosen, i)]
                gap[i] = float((sum(of) / len(of) - mean).square().sum())
        chosen.append(min(gap, key=gap.get))
    return chosen


def losses(entry, kind):
    """Mean over the two networks' losses after two epochs; 80 images are one batch."""
    data, wanted = entry.source, None
    x = normal(dataclasses.replace(entry, distilled=dataclasses.replace(entry.distilled, zca=None)), torch.arange(80))
    x = x.float()
    wanted = featured(entry, data.x_train / 255).float() if kind == "features" else data.y_train
    total = torch.zeros(80, dtype=F64)
    for number in range(2):
        with seeded("real losses", SEED, number):
            net = ConvNet(1, 8, DIM if kind == "features" else CLASSES, WIDTHS, "batch")
        speed = [torch.zeros_like(p) for p in net.parameters()]

        def each(net=net):
            out = net(x)
            if kind == "features":
                return (out - wanted).square().mean(1)
            return -out.log_softmax(1)[torch.arange(80), wanted]

        for _ in range(2):
            gradients = torch.autograd.grad(each().mean(), list(net.parameters()))
            with torch.no_grad():
                for p, g, v in zip(net.parameters(), gradients, speed, strict=True):
                    v.copy_(0.9 * v + g + 1e-4 * p)
                    p.sub_(0.1 * v)
        net.eval()
        total += each().detach()
    return total / 2


def expected(name, kind, entry, run):
    """Indices of the row's training images, recomputed: as many of each class unless the targets are features."""
    data, balanced = entry.source, kind != "features"
    if name == "random":
        order = torch.randperm(80, generator=rng("random real", SEED, run)).tolist()
        return by_class(data, lambda own, label: [i for i in order if i in own][:IPC]) if balanced else order[:N]
    if name.startswith("kmeans"):
        found = places(neighbour(f"{name}:{kind}", entry).plain(run), entry)
        values = data.x_train.flatten(1) / 255 if name == "kmeans_pixels" else entry.teacher.targets(data.x_train, CPU)
        if not balanced:
            are_medoids(found.tolist(), values, SEED, run)
        for label, chosen in enumerate(found.split(IPC) if balanced else ()):
            own = (data.y_train == label).nonzero()[:, 0].tolist()
            are_medoids([own.index(i) for i in chosen.tolist()], values[own], SEED, run, label)
        return found
    values = losses(entry, kind) if name == "high_loss" else featured(entry, data.x_train / 255)
    if name == "herding":
        choose = lambda own, n: herded(values[own], n)  # noqa: E731
    else:
        choose = lambda own, n: values[own].argsort(descending=True)[:n].tolist()  # noqa: E731
    if balanced:
        return by_class(data, lambda own, label: [own[i] for i in choose(own, IPC)])
    return choose(list(range(80)), N)


@pytest.mark.parametrize("kind", ["features", "scores", "labels", "soft"])
@pytest.mark.parametrize("name", ["random", "kmeans", "kmeans_pixels", "herding", "high_loss"])
def test_real_neighbours_are_the_images_and_targets_that_they_say(make, name, kind):
    """Anew for every network, or the same for all."""
    entry = make(kind, zca=kind == "scores")
    row, found = neighbour(name, entry), []
    for run in (0, 1):
        index = torch.as_tensor(expected(name, kind, entry, run))
        check(entry, kind, row.draw(run), index)
        plain = row.plain(run).double()
        mean, std = float(entry.source.mean[0]), float(entry.source.std[0])
        torch.testing.assert_close(
            plain, (entry.source.x_train[index].double() / 255 - mean) / std, rtol=1e-5, atol=1e-5
        )
        found.append(set(index.tolist()))
        assert len(found[-1]) == N
        if kind != "features":
            assert entry.source.y_train[index].tolist() == [label for label in range(CLASSES) for _ in range(IPC)]
    assert (found[0] == found[1]) == (name in ("herding", "high_loss"))
    y = {"features": 4 * DIM, "scores": 4 * CLASSES}.get(kind, 8)
    assert (row.name, row.kind, row.n, row.storage_bytes) == (name, kind, N, N * (64 + y))


@pytest.mark.parametrize("beside", ["features", "scores", "labels", "soft"])
@pytest.mark.parametrize("kind", ["features", "scores", "labels", "soft"])
def test_a_neighbour_takes_another_kind_by_its_word(make, beside, kind):
    entry = make(beside, zca=beside == "labels")
    row = neighbour(f"random:{kind}", entry)
    assert (row.name, row.kind) == (f"random:{kind}", kind)
    assert row.out == (DIM if kind == "features" else CLASSES)
    check(entry, kind, row.draw(1), torch.as_tensor(expected("random", kind, entry, 1)))
    every = neighbour(f"all_real:{kind}", entry)
    images, y = every.draw(0)
    images = images if kind == "soft" else images(torch.arange(80))
    check(entry, kind, (images, y), torch.arange(80))
    size = {"features": 4 * DIM, "scores": 4 * CLASSES}.get(kind, 8)
    assert (every.n, every.storage_bytes, every.plain) == (80, 80 * (64 + size), None)


@pytest.mark.parametrize("kind", ["features", "scores", "labels", "soft"])
def test_noise_is_new_for_every_network_and_has_labels_in_turn(make, kind):
    entry = make(kind, zca=kind in ("features", "labels"))
    row = neighbour("gaussian", entry)
    for run in (0, 1):
        x = torch.randn(N, 1, 8, 8, generator=rng("gaussian", "gaussian", SEED, run))
        made_of(entry, kind, row, run, x, torch.tensor([i // IPC for i in range(N)]))
    y = {"features": 4 * DIM, "scores": 4 * CLASSES}.get(kind, 8)
    assert row.storage_bytes == N * (4 * 64 + y) and row.n == N
    assert row.facts["row"] == "gaussian" and not torch.equal(row.plain(0), row.plain(1))


def made_of(entry, kind, row, run, x, y):
    """The row draws the normalised images x and what their classes y or the teacher make of them."""
    images, found = row.draw(run)
    assert torch.equal(row.plain(run), x)
    pixels = x.double() * float(entry.source.std[0]) + float(entry.source.mean[0])
    wanted = x.double()
    if kind == "soft":
        wanted = pixels
    elif entry.distilled.zca is not None:
        wanted = (wanted.flatten(1) - entry.distilled.zca_mean.double().flatten()) @ entry.distilled.zca.double()
        wanted = wanted.view(x.shape)
    torch.testing.assert_close(images.double(), wanted, rtol=1e-4, atol=1e-4)
    wanted = target(entry, kind, pixels, y)
    if found.is_floating_point():
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, wanted)


def test_noise_beside_a_number_that_the_classes_do_not_divide(make):
    entry = make("labels", of=dict(n=13))
    assert neighbour("gaussian", entry).draw(0)[1].tolist() == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]


@pytest.mark.parametrize("name", ["dm", "dsa"])
def test_matched_sets_are_distilled_once_and_read_again(make, data, monkeypatch, tmp_path, capsys, name):
    """By the methods in common/baselines.py from the source and the entry's settings; with hard labels unless told."""
    method = {"dm": "dm", "dsa": "dsa_matching"}[name]
    original, calls = getattr(baselines, method), []
    monkeypatch.setattr(baselines, method, lambda *args, **more: calls.append(args[1]) or original(*args, **more))
    entry = make("scores", zca=True)
    x = original(data, IPC, CPU, MATCHING[name], SEED)
    y = torch.arange(CLASSES).repeat_interleave(IPC)
    rows = {kind: neighbour(f"{name}:{kind}", entry) for kind in RECIPES} | {"own": neighbour(name, entry)}
    assert rows["own"].kind == "labels" and rows["own"].name == name
    assert not calls  # only once it is drawn
    for kind, row in rows.items():
        for run in (0, 1):
            made_of(entry, row.kind, row, run, x, y)
        size = {"features": 4 * DIM, "scores": 4 * CLASSES}.get(kind, 8)
        assert row.storage_bytes == N * (4 * 64 + size)
    assert calls == [IPC] and f"{name}-{IPC}: made" in capsys.readouterr().out
    (path,) = tmp_path.glob(f"{name}-{IPC}-*.safetensors")
    assert torch.equal(load_file(path)["x"], x)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["settings"] == dataclasses.asdict(MATCHING[name]) and facts["content"] == data.content
    path.write_bytes(path.read_bytes()[:100])  # cut short
    assert torch.equal(neighbour(name, entry).plain(0), x) and len(calls) == 2
    save_file({"x": torch.zeros(N, 1, 8, 8)}, path)
    assert float(neighbour(name, make("labels")).plain(0).abs().max()) == 0 and len(calls) == 2


def test_a_matched_set_is_made_again_for_anything_that_it_depends_on(make, data, monkeypatch):
    calls = []
    monkeypatch.setattr(
        baselines, "dm", lambda data, ipc, *more, after: calls.append(1) or torch.zeros(10 * ipc, 1, 8, 8)
    )
    again = [
        make("labels"),
        make("labels", seed=4),
        make("labels", matching=MATCHING | dict(dm=dataclasses.replace(MATCHING["dm"], iterations=3))),
        make("labels", source=dataclasses.replace(data, content="another")),
        make("labels", source=dataclasses.replace(data, mean=data.mean + 0.1)),
        make("labels", source=dataclasses.replace(data, std=data.std + 0.1)),
        make("labels", of=dict(n=30)),
    ]
    for number, entry in enumerate(again):
        neighbour("dm", entry).draw(0)
        assert len(calls) == number + 1
    same = [make("scores", zca=True), make("labels", widths=(2, 2), runs=7), make("labels", teacher=teacher_of(1))]
    for entry in same:
        neighbour("dm", entry).draw(0)
    assert len(calls) == len(again)


def test_rows_without_images(make):
    entry = make("scores")
    for word in ("none", "teacher"):
        row = neighbour(word, entry)
        assert (row.name, row.kind, row.n, row.storage_bytes, row.draw, row.plain) == (word, word, 0, 0, None, None)
    assert neighbour("none", entry).out == CLASSES and neighbour("none", make("features")).out == DIM


def test_a_set_of_features_needs_no_labels(make, data):
    """Random, medoids and noise, but nothing that has classes."""
    bare = dataclasses.replace(data, y_train=None, y_test=None, class_names=[])
    entry = make("features", source=bare)
    for name in ("random", "kmeans", "kmeans_pixels", "herding", "high_loss", "gaussian", "all_real"):
        row = neighbour(name, entry)
        assert row.kind == "features" and row.out == DIM
        assert row.draw(0)[1].shape == (80 if name == "all_real" else N, DIM)
    for kind in ("labels", "scores", "soft"):
        refuse(lambda kind=kind: neighbour(f"random:{kind}", entry), f"random:{kind}", "no labels", "random:features")
    refuse(lambda: neighbour("dm", entry), "dm", "no labels")
    for name in ("dm", "dsa"):
        refuse(lambda name=name: neighbour(f"{name}:features", entry).draw(0), "no labels")


def test_words_that_stand_for_no_row_are_refused(make, data):
    entry = make("labels")
    refuse(lambda: neighbour("medoids", entry), "--neighbours medoids", *NEIGHBOURS)
    refuse(lambda: neighbour("random:pairs", entry), "random:pairs", "random:KIND", *RECIPES)
    odd = make("labels", of=dict(n=15))
    for name in ("dm", "dsa"):
        refuse(lambda name=name: neighbour(name, odd).draw(0), "15 images", "10 classes", "leave these out")
    dumb = make("soft", teacher=teacher_of(fc=False))
    refuse(lambda: trained(own_row(dumb), "scdd_resnet10", 0), "stub has no classifier", "--teacher")


@pytest.mark.parametrize("kind", ["scores", "labels", "soft"])
def test_a_number_that_the_classes_do_not_divide(make, capsys, kind):
    """Random images are as many of each class as the set has; the other choices are from all images, and say so."""
    entry = make(kind, of=dict(n=15))
    best = [values.index(max(values)) for values in entry.distilled.y.tolist()]
    order = torch.randperm(80, generator=rng("random real", SEED, 1)).tolist()
    wanted = by_class(entry.source, lambda own, label: [i for i in order if i in own][: best.count(label)])
    assert len(wanted) == 15
    check(entry, kind, neighbour("random", entry).draw(1), wanted)
    neighbour("random", make("features", of=dict(n=15))).draw(0)
    neighbour("herding", make(kind)).draw(0)
    assert not capsys.readouterr().out
    values = featured(entry, entry.source.x_train / 255)
    check(entry, kind, neighbour("herding", entry).draw(0), torch.tensor(herded(values, 15)))
    assert "15 images are not equally many of 10 classes" in capsys.readouterr().out
    crowd = F.one_hot(torch.tensor([4] * 9 + [5] * 6), CLASSES).float()
    refuse(lambda: neighbour("random", make(kind, of=dict(n=15, y=crowd))).draw(0), "fewer images of class 4")


def test_losses_are_kept_for_the_next_row(make, monkeypatch):
    calls, original = [], baselines.real_losses
    monkeypatch.setattr(baselines, "real_losses", lambda *args, **more: calls.append(1) or original(*args, **more))
    first = neighbour("high_loss", make("labels")).draw(0)[0]
    for entry in (make("labels"), make("labels", of=dict(n=30)), make("labels", teacher=teacher_of(1), runs=9)):
        again = neighbour("high_loss", entry).draw(1)[0]
        assert len(again) == N + 10 * (entry.n == 30) and (entry.n == 30 or torch.equal(again, first))
    assert len(calls) == 1
    data = make("labels").source
    others = [
        make("features"), make("features", teacher=teacher_of(1)), make("labels", widths=(4, 5)),
        make("labels", seed=4), make("labels", norm="none"),
        make("labels", source=dataclasses.replace(data, content="another")),
        make("labels", source=dataclasses.replace(data, mean=data.mean + 1)),
        make("labels", source=dataclasses.replace(data, std=data.std * 2)),
        make("labels", high_loss=dict(networks=1, epochs=2)), make("labels", high_loss=dict(networks=2, epochs=1)),
    ]  # fmt: skip
    for number, entry in enumerate(others):
        neighbour("high_loss", entry).draw(0)
        assert len(calls) == number + 2


def test_a_teacher_that_is_not_at_hand_is_told_of(make, capsys):
    def missing():
        raise UserError("no teacher; give --teacher")

    assert make("features").finds_teacher and not capsys.readouterr().out
    assert not make("features", load_teacher=missing).finds_teacher
    assert "no teacher; give --teacher" in capsys.readouterr().out


def test_all_real_images_are_prepared_once_and_late(make, monkeypatch):
    entry, calls = make("features"), []
    original = Teacher.targets
    monkeypatch.setattr(Teacher, "targets", lambda *args: calls.append(1) or original(*args))
    row = neighbour("all_real", entry)
    assert (row.n, row.out, row.storage_bytes) == (80, DIM, 80 * (64 + 4 * DIM)) and not calls
    first, second = row.draw(0), row.draw(1)
    assert first[0] is second[0] and first[1] is second[1] and len(calls) == 1


def test_a_code_stands_beside_what_its_storage_would_hold(make, data):
    """Boost-PCA: rounded up, by pairs or by pixels alone, never more than there are; trained as long as its images."""
    code = Code({}, (1, 8, 8), 1, ())
    for budget, storage, count in (
        ({}, dict(pairs=6.1, pixels=9.5), 7),
        (dict(rule="pairs"), dict(pairs=6.0, pixels=9.5), 6),
        (dict(rule="pixels"), dict(pairs=6.1, pixels=9.5), 10),
        (dict(rule="pairs"), dict(pairs=90.5, pixels=100.0), 80),
    ):
        entry = make("features", of=dict(code=code, meta=dict(storage=storage, budget=budget)))
        assert (entry.n, entry.count) == (N, count)
        for name in ("random", "gaussian", "kmeans_pixels"):
            row = neighbour(name, entry)
            assert (row.n, len(row.draw(0)[0]), len(row.draw(0)[1])) == (count, count, count)
            assert row.storage_bytes == count * ((256 if name == "gaussian" else 64) + 4 * DIM)
    plain = make("features", of=dict(meta=dict(storage=dict(pairs=6.1, pixels=9.5))))
    assert plain.count == N and make("features", of=dict(code=code)).count == N
    few = make("features", of=dict(code=code, meta=dict(storage=dict(pairs=6.1, pixels=9.5))))
    for word, images in (("random", neighbour("random", few).draw(0)), ("set", own_row(few).draw(0))):
        with seeded("evaluation network", SEED, 0):
            net = pair_net("convnet", 1, 8, DIM, WIDTHS, "batch")
        fit_pairs(net, *images, SEED, 0, **SGD)  # 3 epochs of 3 batches of the set's 20 images
        same(net, trained(own_row(few) if word == "set" else neighbour(word, few), "convnet", 0))


# -------------------------------------------------------------------------------------------------------------- the set


@pytest.mark.parametrize("zca", [False, True])
@pytest.mark.parametrize("kind", ["features", "scores", "labels", "soft"])
def test_the_sets_own_row(make, kind, zca):
    entry = make(kind, zca=zca)
    row, of = own_row(entry), entry.distilled
    images, y = row.draw(1)
    wanted = (of.x.double() - float(of.mean[0])) / float(of.std[0])
    torch.testing.assert_close(row.plain(0).double(), wanted, rtol=1e-5, atol=1e-5)
    if zca and kind != "soft":
        wanted = ((wanted.flatten(1) - of.zca_mean.double().flatten()) @ of.zca.double()).view(wanted.shape)
    torch.testing.assert_close(images.double(), of.x.double() if kind == "soft" else wanted, rtol=1e-4, atol=1e-4)
    best = torch.tensor([values.index(max(values)) for values in of.y.tolist()])
    assert torch.equal(y, of.y if kind in ("features", "scores") else best)
    assert (row.name, row.kind, row.n, row.out) == ("stub", kind, N, of.y.shape[1])
    assert row.storage_bytes == 4 * (N * 64 + N * of.y.shape[1])
    assert row.facts["row"] == "set" and row.beside == {} and row.word == "stub"
    assert own_row(make(kind, name="stub 1 (here)")).word == "stub" and neighbour("random", entry).word == "random"


def test_a_sets_bytes_are_those_that_its_file_counts(make):
    meta = dict(storage_bytes=100, label_bytes=20, zca_bytes=3)
    assert own_row(make("scores", of=dict(meta=meta))).storage_bytes == 123
    meta.pop("storage_bytes")
    assert own_row(make("scores", of=dict(meta=meta))).storage_bytes == 4 * (N * 64 + N * CLASSES) + 23


def test_hard_labels_can_be_made_of_scores_and_nothing_else(make):
    for kind in ("scores", "soft"):
        entry = make(kind, zca=True)
        row = own_row(entry, "labels")
        assert (row.name, row.word, row.kind, row.out) == ("stub:labels", "stub:labels", "labels", CLASSES)
        images, y = row.draw(0)
        assert torch.equal(images, entry.distilled.inputs()) and torch.equal(y, entry.distilled.y.argmax(1))
        assert row.facts != own_row(entry).facts
    for kind, other in (("features", "labels"), ("scores", "features"), ("scores", "soft"), ("labels", "scores")):
        refuse(lambda kind=kind, other=other: own_row(make(kind), other), f"stub:{other}", WORDS[kind])
    assert own_row(make("labels"), "labels").name == "stub"


def test_a_sets_facts_are_its_numbers(make, data):
    first = own_row(make("scores"))
    y = first.entry.distilled.y
    for of in (dict(y=y + 1), dict(x=first.entry.distilled.x + 1), dict(mean=data.mean + 1), dict(std=data.std + 1)):
        assert own_row(make("scores", of=of)).facts != first.facts, of
    assert own_row(make("scores", zca=True)).facts != first.facts
    assert own_row(make("scores", name="other", path=Path("elsewhere"), of=dict(step=9))).facts == first.facts


# ---------------------------------------------------------------------------------------------------------------- facts

ALL = (
    "none",
    "gaussian",
    "random",
    "kmeans",
    "kmeans_pixels",
    "herding",
    "high_loss",
    "dm",
    "dsa",
    "all_real",
    "teacher",
)
REAL = tuple(name for name in ALL if name != "none")
TAUGHT = ("kmeans", "herding", "teacher")  # need the teacher whatever the targets are


def other(settings, **changes):
    return dataclasses.replace(settings, **changes)


@pytest.mark.parametrize("kind", ["features", "scores", "labels", "soft"])
@pytest.mark.parametrize(
    ("what", "changed"),
    [("seed", ALL), ("number", ALL[1:]), ("source", REAL), ("mean", REAL), ("std", REAL), ("whitening", ALL),
     ("teacher", None), ("constants", None), ("networks", ("high_loss",)), ("epochs", ("high_loss",)),
     ("widths", ("high_loss",)), ("norm", ("high_loss",)), ("dm", ("dm",)), ("dsa", ("dsa",)), ("nothing", ()),
     ("seen", None), ("full epochs", None)],
)  # fmt: skip
def test_a_rows_facts_change_with_what_it_depends_on(make, data, kind, what, changed):
    """And with nothing else."""
    again = {
        "seed": lambda: make(kind, seed=4),
        "number": lambda: make(kind, of=dict(n=30)),
        "source": lambda: make(kind, source=other(data, content="another")),
        "mean": lambda: make(kind, source=other(data, mean=data.mean + 0.1)),
        "std": lambda: make(kind, source=other(data, std=data.std + 0.1)),
        "whitening": lambda: make(kind, zca=True),
        "teacher": lambda: make(kind, teacher=teacher_of(1)),
        "constants": lambda: make(kind, teacher=teacher_of(0, std=0.3)),
        "networks": lambda: make(kind, high_loss=dict(networks=3, epochs=2)),
        "epochs": lambda: make(kind, high_loss=dict(networks=2, epochs=3)),
        "widths": lambda: make(kind, widths=(4, 7)),
        "norm": lambda: make(kind, norm="none"),
        "dm": lambda: make(kind, matching=MATCHING | dict(dm=other(MATCHING["dm"], lr_img=2.0))),
        "dsa": lambda: make(kind, matching=MATCHING | dict(dsa=other(MATCHING["dsa"], inner=2))),
        "full epochs": lambda: make(kind, full_epochs=7),
        "seen": lambda: make(kind, of=dict(mean=data.mean + 0.1)),
        "nothing": lambda: make(kind, name="other", path=Path("elsewhere"), runs=9, cache_gb=0.0, of=dict(step=9)),
    }[what]()
    if what == "seen":  # networks and teacher see pixels by the set's constants
        changed = [name for name in REAL if name not in ("dm", "dsa")] if kind == "soft" else ()
    if what == "full epochs":
        changed = ("all_real",) if kind == "labels" else ()
    if changed is None:  # dm and dsa have hard labels
        changed = [name for name in REAL if name not in ("dm", "dsa")] if kind in ("features", "soft") else TAUGHT
    before = make(kind)
    for name in ALL:
        if name == "none" and what == "number":
            continue  # it has none
        facts = [json.dumps(neighbour(name, entry).facts, sort_keys=True) for entry in (before, again)]
        assert (facts[0] != facts[1]) == (name in changed), (name, facts)


def test_facts_tell_names_kinds_and_whitenings_apart(make):
    entry = make("scores", zca=True)
    words = [f"{name}:{kind}" for name in ALL for kind in RECIPES]
    assert len({json.dumps(neighbour(word, entry).facts) for word in words}) == len(words)
    turned = entry.distilled.zca + torch.eye(64)
    other = make("scores", of=dict(zca=turned, zca_mean=entry.distilled.zca_mean))
    moved = make("scores", of=dict(zca=entry.distilled.zca, zca_mean=entry.distilled.zca_mean + 1))
    found = [json.dumps(neighbour(name, each).facts) for each in (entry, other, moved) for name in ("none", "random")]
    assert len(set(found)) == 6
    sizes = [make("features", of=dict(x=draw(N, *shape))) for shape in ((1, 8, 8), (3, 8, 8), (1, 16, 16))]
    assert len({json.dumps(neighbour("none", entry).facts) for entry in sizes}) == 3


# ------------------------------------------------------------------------------------------------------------ trainings

SGD = dict(steps=9, batch=8, lr=0.05, momentum=0.7, weight_decay=0.01)  # RECIPES["features"] on 20 images


def same(one, *others):
    """Equal weights and buffers, bit for bit, in the same order."""
    for net in others:
        pairs = list(zip(one.state_dict().values(), net.state_dict().values(), strict=True))
        assert pairs and all(torch.equal(a, b) for a, b in pairs)


def captured(monkeypatch, module, name, result):
    """Networks that a script's evaluation hands to its scoring function `name`, copied."""
    nets = []
    monkeypatch.setattr(module, name, lambda net, *rest, **more: nets.append(copy.deepcopy(net)) or result)
    return nets


def test_networks_of_features_are_those_of_evaluate_pairs(make, data, monkeypatch):
    """KRR-ST's own evaluation trains the very same, row by row and network by network; all_real for as many updates."""
    entry = make("features")
    targets = entry.teacher.targets(data.x_train, CPU)
    nets = captured(monkeypatch, common.pairs, "score_network", {"x": 0.0})
    rows = ("none", "random_real", "distilled", "all_real")
    make_net = lambda: pair_net("convnet", 1, 8, DIM, WIDTHS, "batch")  # noqa: E731
    recipe = dataclasses.replace(RECIPES["features"], runs=2)
    evaluate_pairs(entry.distilled, data, targets, targets[:20], make_net, CPU, recipe, SEED, rows)
    ours = {"none": neighbour("none", entry), "random_real": neighbour("random", entry), "distilled": own_row(entry),
            "all_real": neighbour("all_real", entry)}  # fmt: skip
    for name in rows:
        for run in (0, 1):
            same(nets.pop(0), trained(ours[name], "convnet", run))
    for run in (0, 1):  # a subset with an index of its own
        with seeded("evaluation network", SEED, run):
            net = pair_net("vgg11", 1, 8, DIM, WIDTHS, "batch")
        fit_pairs(net, *neighbour("herding", entry).draw(run), SEED, run, **SGD)
        same(net, trained(neighbour("herding", entry), "vgg11", run))


def test_networks_of_whitened_features_see_whitened_images(make, data):
    entry = make("features", zca=True)
    zca = Zca(entry.distilled.zca_mean, entry.distilled.zca, torch.empty(0))
    seen = Inputs(data.x_train, data.mean, data.std, zca, CPU, 0.0)
    with seeded("evaluation network", SEED, 1):
        net = pair_net("convnet", 1, 8, DIM, WIDTHS, "batch")
    fit_pairs(net, torch.arange(80), entry.teacher.targets(data.x_train, CPU), SEED, 1, prepare=seen, **SGD)
    for gigabytes in (1.0, 0.0):
        same(net, trained(neighbour("all_real", make("features", zca=True, cache_gb=gigabytes)), "convnet", 1))


@pytest.mark.parametrize("zca", [False, True])
def test_networks_of_scores_are_those_of_evaluate_students(make, data, monkeypatch, zca):
    """FRePo's own evaluation, with all its random numbers."""
    entry = make("scores", zca=zca)
    nets = captured(monkeypatch, common.students, "score_student", {"accuracy": 0.0})
    rows, models = ("random_real", "distilled", "all_real"), ("conv", "frepo_alexnet")
    train = Inputs(data.x_train, data.mean, data.std, entry.zca, CPU, 0.0)
    recipe = dataclasses.replace(RECIPES["scores"], runs=2)
    labels = lambda y: frepo_labels(y, CLASSES)  # noqa: E731
    evaluate_students(entry.distilled, data, train, train, labels, WIDTHS, CPU, recipe, SEED, models, rows)
    ours = {"random_real": neighbour("random", entry), "distilled": own_row(entry)}
    ours["all_real"] = neighbour("all_real", entry)
    for name in rows:
        for model in ("frepo_conv", "frepo_alexnet"):
            for run in (0, 1):
                same(nets.pop(0), trained(ours[name], model, run))
    assert not nets


def label_teacher(entry):
    """As scdd.py's main makes it."""
    teacher, data = entry.teacher, entry.source
    return nn.Sequential(Rescale(data.mean, data.std, teacher), classifier(teacher, teacher.fc))


def small(*_):
    return ConvNet(1, 8, CLASSES, WIDTHS, "batch")


def soft_nets(data, entry, monkeypatch, recipe, student, stored=None):
    """What scdd.py's evaluation trains: {row: [student of run 0, of run 1]}."""
    nets = captured(monkeypatch, common.relabel, "hits", torch.zeros(len(data.x_test), dtype=torch.bool))

    def random_real(number):
        index = common.students.per_class(data.y_train, IPC, "random real", SEED, number)
        return data.x_train[index], data.y_train[index]

    sets = {"set": (entry.distilled.x, entry.distilled.y.argmax(1)), "random": random_real}
    call = lambda sets, recipe: evaluate_soft(  # noqa: E731
        sets, data, student, label_teacher(entry), CPU, recipe, SEED, stored=stored
    )
    call(sets, recipe)
    epochs = max(1, round(recipe.epochs * N / 80))
    warm_up = min(int(recipe.warm_up * N / 80), epochs - 1)
    as_many = dataclasses.replace(recipe, epochs=epochs, warm_up=warm_up, labels="online")
    call(dict(all_real=(data.x_train, data.y_train)), as_many)
    assert len(nets) == 6
    return {name: nets[2 * i : 2 * i + 2] for i, name in enumerate(("set", "random", "all_real"))}


@pytest.mark.parametrize(
    ("labels", "changes"),
    [("online", {}), ("stored", dict(epochs=5, warm_up=4)), ("online", dict(epochs=6, warm_up=5)),
     ("stored", dict(teacher_train=True, batch=7)), ("stored", dict(ema=0.5))],
)  # fmt: skip
def test_networks_of_soft_labels_are_those_of_evaluate_soft(make, data, monkeypatch, tmp_path, labels, changes):
    """SC-DD's own evaluation: the set's stored labels where they lie beside it; for all real images as many updates."""
    recipe = dataclasses.replace(RECIPES["soft"], runs=2, labels=labels, **changes)
    entry = make("soft", recipes=RECIPES | dict(soft=recipe))
    monkeypatch.setattr(common.rows, "make_network", small)
    stored = None
    if labels == "stored":
        stored = dict(set=tmp_path / "labels.safetensors")
        x = Inputs(entry.distilled.x, data.mean, data.std, None, CPU, 0.0)
        label_all(x, label_teacher(entry), recipe, stored["set"], SEED)
    theirs = soft_nets(data, entry, monkeypatch, recipe, small, stored)
    rows = dict(set=own_row(entry), random=neighbour("random", entry), all_real=neighbour("all_real", entry))
    for name, row in rows.items():
        for run in (0, 1):
            same(theirs[name][run], trained(row, "scdd_small", run))


def test_students_are_scdds_resnets(make, data, monkeypatch):
    def student():
        net = ResNet("resnet10", channels=1, width=2, stem="cifar", stem_padding=1)
        return nn.Sequential(net, nn.Linear(net.dim, CLASSES))

    recipe = dataclasses.replace(RECIPES["soft"], runs=2, epochs=1, warm_up=0)
    entry = make("soft", of=dict(meta=dict(eval_width=2)), recipes=RECIPES | dict(soft=recipe))
    theirs = soft_nets(data, entry, monkeypatch, recipe, student)
    for run in (0, 1):
        same(theirs["set"][run], trained(own_row(entry), "scdd_resnet10", run))


def test_the_labelling_teacher_sees_pixels_by_its_own_constants(make, data):
    entry = make("soft", of=dict(mean=data.mean + 0.3, std=data.std * 2))
    pixels = data.x_train[:9].double() / 255
    seen = (pixels - float(entry.distilled.mean[0])) / float(entry.distilled.std[0])
    fc = entry.teacher.fc
    wanted = featured(entry, pixels) @ fc.weight.double().T + fc.bias.double()
    torch.testing.assert_close(entry.teacher_net(seen.float()).double(), wanted, rtol=1e-4, atol=1e-5)
    assert not entry.teacher_net.training


def test_stored_labels_are_read_for_the_set_alone(make, data, tmp_path):
    """Labels that another teacher stored stop the set's row; they are nothing to its neighbours."""
    recipe = dataclasses.replace(RECIPES["soft"], labels="stored")
    entry = make("soft", of=dict(meta=dict(eval_width=2)), recipes=RECIPES | dict(soft=recipe))
    x = Inputs(entry.distilled.x, data.mean, data.std, None, CPU, 0.0)
    label_all(x, label_teacher(make("soft", teacher=teacher_of(1))), recipe, tmp_path / "labels.safetensors", SEED)
    refuse(lambda: trained(own_row(entry), "scdd_resnet10", 0), "another teacher")
    trained(neighbour("random", entry), "scdd_resnet10", 0)
    online = make("soft", of=dict(meta=dict(eval_width=2)))
    trained(own_row(online), "scdd_resnet10", 0)


@pytest.mark.parametrize("zca", [False, True])
def test_networks_of_labels_are_those_of_fit_labels(make, data, zca):
    """All for 4 epochs of the set's 3 batches, all real images too, but where they are told their own epochs."""
    entry = make("labels", zca=zca)
    train = Inputs(data.x_train, data.mean, data.std, entry.zca, CPU, 0.0)
    index = baselines.random_subset(data.y_train, 80, N, SEED, 1)
    pairs = {"random": (train(index), data.y_train[index]), "all_real": (train(torch.arange(80)), data.y_train),
             "set": (entry.distilled.inputs(), torch.arange(N) // IPC)}  # fmt: skip
    for name, (x, y) in pairs.items():
        with seeded("evaluation network", SEED, 1):
            net = ConvNet(1, 8, CLASSES, WIDTHS, "batch")
        asked = []
        fit_labels(net, lambda i, x=x, asked=asked: asked.append(i) or x[i], y, RECIPES["labels"], 12, SEED, 1)
        assert len(asked) == 12
        same(net, trained(own_row(entry) if name == "set" else neighbour(name, entry), "convnet", 1))
    longer = make("labels", zca=zca, full_epochs=2)
    same(net, trained(own_row(longer), "convnet", 1))
    with seeded("evaluation network", SEED, 1):
        net = ConvNet(1, 8, CLASSES, WIDTHS, "batch")
    fit_labels(net, lambda i: train(i), data.y_train, RECIPES["labels"], 20, SEED, 1)
    same(net, trained(neighbour("all_real", longer), "convnet", 1))


@pytest.mark.parametrize("model", ["convnet", "dc_convnet", "frepo_conv", "scdd_resnet10", "alexnet", "frepo_alexnet"])
def test_a_model_of_any_name_trains_on_any_kind(make, model):
    """The run-th networks of all rows start as those of "none" do, and no two numbers alike."""
    entry = make("scores", of=dict(meta=dict(eval_width=2)))
    start = {"frepo_conv": ("student", "conv", SEED), "frepo_alexnet": ("student", "frepo_alexnet", SEED),
             "scdd_resnet10": ("student", SEED)}.get(model, ("evaluation network", SEED))  # fmt: skip
    still = RECIPES | dict(scores=dataclasses.replace(RECIPES["scores"], lr=0.0, steps=1),
                           labels=dataclasses.replace(RECIPES["labels"], lr=0.0, epochs=1))  # fmt: skip
    idle = make("scores", of=dict(meta=dict(eval_width=2)), recipes=still)
    for run in (0, 1):
        with seeded(*start, run):
            net = make_network(model, entry, CLASSES)
        same(net, trained(neighbour("none", entry), model, run))
        weights = list(net.parameters())
        for row in (own_row(idle), neighbour("random", idle), neighbour("gaussian:labels", idle)):
            found = trained(row, model, run)
            assert all(torch.equal(a, b) for a, b in zip(weights, found.parameters(), strict=True))
        moved = trained(own_row(entry), model, run)
        assert not all(torch.equal(a, b) for a, b in zip(weights, moved.parameters(), strict=True))
    one, two = (trained(neighbour("none", entry), model, run) for run in (0, 1))
    assert not torch.equal(next(one.parameters()), next(two.parameters()))


# ------------------------------------------------------------------------------------------------------------- networks


def test_networks_are_those_that_the_names_say(make):
    entry = make("scores", of=dict(meta=dict(eval_width=8)), norm="instance")
    made = {
        "convnet": lambda: ConvNet(1, 8, 5, WIDTHS, "instance"),
        "vgg11": lambda: pair_net("vgg11", 1, 8, 5, WIDTHS, "instance"),
        "dc_convnet": lambda: ConvNet(1, 8, 5, (128, 128), "instance"),
        "frepo_conv": lambda: frepo_student("conv", 1, 8, 5, WIDTHS),
        "frepo_kipconv": lambda: frepo_student("kipconv", 1, 8, 5, WIDTHS),
        "frepo_alexnet": lambda: frepo_student("frepo_alexnet", 1, 8, 5, WIDTHS),
        "scdd_resnet10": lambda: nn.Sequential(
            net := ResNet("resnet10", 1, 8, "cifar", 1), nn.Linear(net.dim, 5)
        ),
    }  # fmt: skip
    x = draw(3, 1, 8, 8)
    for name, build in made.items():
        with seeded("here"):
            found = make_network(name, entry, 5)
        with seeded("here"):
            wanted = build()
        same(wanted, found)
        found, wanted = found.eval(), wanted.eval()
        assert torch.equal(found(x), wanted(x)) and found(x).shape == (3, 5)
        assert torch.equal(found.head(found.features(x)), found(x)) and found.features(x).shape == (3, found.dim)
    refuse(lambda: make_network("lenet", entry, 5), "--models lenet")
    refuse(lambda: make_network("frepo_lenet", entry, 5), "--models")
    refuse(lambda: make_network("scdd_lenet", entry, 5), "--models scdd_lenet", "scdd_resnet18")
    wide = make("scores", of=dict(x=draw(N, 3, 128, 128)))
    student = make_network("scdd_resnet10", wide, 5)
    assert (student.conv1.kernel_size, student.conv1.in_channels, student.conv1.out_channels) == ((7, 7), 3, 64)
    assert make_network("scdd_resnet10", make("scores", of=dict(x=draw(N, 1, 96, 96))), 5).conv1.kernel_size == (3, 3)


def test_own_models_are_those_of_the_sets_script(make):
    assert own_models(make("features")) == ("convnet",)
    assert own_models(make("labels")) == ("dc_convnet",)
    assert own_models(make("scores")) == ("frepo_conv",)
    names = dict(eval_models=["conv", "frepo_alexnet", "resnet18"])
    assert own_models(make("scores", of=dict(meta=names))) == ("frepo_conv", "frepo_alexnet", "frepo_resnet18")
    assert own_models(make("soft", of=dict(meta=dict(eval_arch="resnet18")))) == ("scdd_resnet18",)


# -------------------------------------------------------------------------------------------------------------- recipes


def flags(**given):
    """As the command line has them: None where nothing was given."""

    def blank(kind, values):
        names = {each.name: None for each in dataclasses.fields(kind)}
        return dataclasses.make_dataclass("Flags", names)(**names | values)

    found = dict(transfer=blank(Protocol, given.get("transfer", {})), scores=blank(Recipe, given.get("scores", {})))
    return found | dict(soft=blank(SoftRecipe, given.get("soft", {})), labels=given.get("labels", LabelRecipe()))


def test_the_kind_of_a_set_is_what_its_file_says(data):
    for kind in WORDS:
        assert kind_of(distilled_of(kind, data)) == kind
    assert kind_of(distilled_of("scores", data, recipe=dict(steps=5, lr=0.1))) == "scores"


def test_published_schedules_are_the_defaults(data):
    found = recipes_for(distilled_of("features", data, n=100), "features", True, flags())
    assert (
        found["features"] == Protocol() and found["soft"] == SoftRecipe(flip=True) and found["labels"] == LabelRecipe()
    )
    assert found["scores"] == Recipe(steps=2000, dsa="flip_crop_rotate_translate_cutout")  # grey: no colour
    colour = distilled_of("scores", data, n=10, x=draw(10, 3, 8, 8))
    assert recipes_for(colour, "scores", True, flags())["scores"] == Recipe(
        steps=1000, dsa="flip_color_crop_rotate_translate_cutout"
    )


def test_images_that_must_not_be_mirrored_are_not(data):
    colour = distilled_of("labels", data, n=10, x=draw(10, 3, 8, 8))
    found = recipes_for(colour, "labels", False, flags())
    assert found["scores"].dsa == "color_crop_rotate_translate_cutout" and found["soft"].flip is False
    assert found["labels"] == LabelRecipe(dsa="color_crop_cutout_scale_rotate")
    assert (
        recipes_for(distilled_of("labels", data), "labels", False, flags())["scores"].dsa
        == "crop_rotate_translate_cutout"
    )


def test_a_files_values_win_over_published_ones_and_flags_over_both(data):
    recorded = dict(epochs=7, batch=9, lr=0.5, runs=2, unknown=1, finetune_steps=11)
    set_ = distilled_of("features", data, recipe=recorded)
    found = recipes_for(set_, "features", True, flags(transfer=dict(lr=0.25, probe_steps=3)))
    assert found["features"] == Protocol(epochs=7, batch=9, lr=0.25, runs=2, finetune_steps=11, probe_steps=3)
    assert found["soft"] == SoftRecipe() and found["scores"].batch == 500  # the record is of its own kind alone
    set_ = distilled_of("scores", data, recipe=dict(steps=77, dsa="flip", lr=0.5, loss="xent"))
    found = recipes_for(set_, "scores", False, flags(scores=dict(lr=0.0, loss="mse")))
    assert found["scores"] == Recipe(steps=77, dsa="flip", lr=0.0, loss="mse")  # zero is given too
    assert found["features"] == Protocol() and found["soft"] == SoftRecipe(flip=False)
    set_ = distilled_of("soft", data, recipe=dict(epochs=6, mix="cutmix", flip=True, temperature=4.0))
    found = recipes_for(set_, "soft", False, flags(soft=dict(temperature=5.0, scaled=False)))
    assert found["soft"] == SoftRecipe(epochs=6, mix="cutmix", flip=True, temperature=5.0)
    found = recipes_for(set_, "labels", False, flags(labels=LabelRecipe(lr=0.5, dsa="flip_crop")))  # --y labels
    assert found["labels"] == LabelRecipe(lr=0.5, dsa="crop") and found["soft"] == SoftRecipe(flip=False)


def test_recipe_of_takes_each_value_by_its_name():
    given = dataclasses.make_dataclass("Flags", ["lr", "momentum"])
    found = recipe_of(LabelRecipe(), dict(lr=2.0, batch=3, other=4), given(lr=None, momentum=0.0))
    assert found == LabelRecipe(lr=2.0, batch=3, momentum=0.0)


# -------------------------------------------------------------------------------------------------------------- results


def cell(metric="accuracy", *values, draws=None):
    found = dict(
        mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else 0.0, values=[*values]
    )
    return {metric: found | ({} if draws is None else dict(draws=draws))}


def shown(text):
    """Lines of a table as lists of cells: columns are two spaces or more apart."""
    return [[part.strip() for part in line.strip().split("  ") if part.strip()] for line in text.splitlines()]


def test_entries_are_per_cent_but_the_matching_error():
    of = dict(mean=0.12345, std=0.0567, values=[])
    assert entry_in_words("accuracy", of) == "12.3 ± 5.7" and entry_in_words("few_1", of) == "12.3 ± 5.7"
    assert entry_in_words("match", of) == "0.123 ± 0.057"


def test_a_grid_has_a_line_for_each_row():
    text = grid_of(["a", "longer"], ["x", "column"], {("a", "x"): "1.0 ± 0.1", ("longer", "column"): "2"})
    assert shown(text) == [["x", "column"], ["a", "1.0 ± 0.1", "-"], ["longer", "-", "2"]]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_tables_show_every_score_in_its_place():
    results = {
        ("probe", "a", "m", "none"): cell("probe", 0.1, 0.3) | cell("few_1", 0.05),
        ("probe", "a", "m", "s"): cell("match", 0.5, 0.75) | cell("probe", 0.5, 0.7) | cell("few_1", 0.2),
        ("probe", "a", "-", "teacher"): cell("probe", 0.9) | cell("few_1", 0.8),
        ("probe", "a", "k", "s"): cell("probe", 0.25) | cell("few_1", 0.125),
        ("finetune", "a", "m", "s"): cell("finetune", 0.6),
        ("finetune", "b", "m", "s"): cell("finetune", 0.4),
        ("finetune", "b", "m", "none"): cell("finetune", 0.2),
    }
    blocks = [shown(block) for block in tables(results, ["teacher", "none", "unseen", "s", "s"]).split("\n\n")]
    assert blocks == [
        [["probe, m"], ["match", "probe", "few_1"], ["teacher", "-", "90.0 ± 0.0", "80.0 ± 0.0"],
         ["none", "-", "20.0 ± 14.1", "5.0 ± 0.0"], ["s", "0.625 ± 0.177", "60.0 ± 14.1", "20.0 ± 0.0"]],
        [["probe, k"], ["probe", "few_1"], ["teacher", "90.0 ± 0.0", "80.0 ± 0.0"], ["s", "25.0 ± 0.0", "12.5 ± 0.0"]],
        [["finetune, m"], ["a", "b"], ["none", "-", "20.0 ± 0.0"], ["s", "60.0 ± 0.0", "40.0 ± 0.0"]],
    ]  # fmt: skip


def test_a_measure_has_one_column_a_target_whatever_else_a_row_has():
    values = {("a", "s"): 0.1, ("b", "s"): 0.2, ("a", "l"): 0.3, ("b", "l"): 0.4}
    results = {("scratch", target, "m", row): cell("accuracy", value) for (target, row), value in values.items()}
    for target in "ab":
        results["scratch", target, "m", "s"] |= cell("krr", 0.5)
    header, *lines = shown(tables(results, ["s", "l"]))[1:]
    assert header == ["a accuracy", "a krr", "b accuracy", "b krr"]
    assert lines == [["s", "10.0 ± 0.0", "50.0 ± 0.0", "20.0 ± 0.0", "50.0 ± 0.0"],
                     ["l", "30.0 ± 0.0", "-", "40.0 ± 0.0", "-"]]  # fmt: skip


def test_a_table_of_the_teacher_alone_is_shown():
    found = shown(tables({("knn", "a", "-", "teacher"): cell("knn", 0.5)}, ["teacher"]))
    assert found == [["knn, -"], ["knn"], ["teacher", "50.0 ± 0.0"]]


def row_of(name, row, kind="features", method=""):
    """A row of a table. row: "set", or a neighbour's name."""
    entry = SimpleNamespace(kind=kind, distilled=SimpleNamespace(method=method or name))
    return Row(name, entry, kind, None, None, dict(row=row), 0, 0)


def test_krr_sts_tables_have_its_rows_and_columns():
    """Rows as published, others, the sets; a dash for what was not scored; other uses do not show."""
    words = ("none", "random:labels", "random", "herding")
    rows = [row_of(word, word.partition(":")[0]) for word in words]
    rows += [row_of("krr_st", "set"), row_of("frepo", "set"), row_of("mtt", "set")]
    value = iter(range(1, 99))
    places = itertools.product(("mine", "flowers", "cifar10"), ("convnet", "vgg11"), rows)
    results = {
        ("finetune", target, model, row.name): cell("finetune", next(value) / 100) for target, model, row in places
    }
    results["probe", "cifar100", "convnet", "krr_st"] = cell("probe", 0.99)
    order = ["w/o pre", "random", "kmeans", "dsa", "dm", "mtt", "kip", "frepo"]
    known = {"w/o pre": "none", "random": "random:labels", "random, own targets": "random"}
    for number, left_out in ((1, ()), (2, ("kip",)), (3, ("kmeans", "dsa", "dm", "mtt", "kip"))):
        blocks = [shown(block) for block in krr_st_table(number, results, rows).split("\n\n")]
        assert [block[0] for block in blocks] == [
            [f"KRR-ST's Table {number}, {model}"] for model in ("convnet", "vgg11")
        ]
        names = [name for name in order if name not in left_out] + ["random, own targets", "herding", "krr_st"]
        for block, model in zip(blocks, ("convnet", "vgg11"), strict=True):
            assert block[1] == ["cifar10", "flowers", "mine"]
            for name, line in zip(names + ["mtt"] * (number == 3), block[2:], strict=True):
                of = [results.get(("finetune", target, model, known.get(name, name))) for target in block[1]]
                assert line == [name, *(f"{100 * v['finetune']['mean']:.1f} ± 0.0" if v else "-" for v in of)]


def test_two_rows_of_one_name_keep_their_names_in_krr_sts_tables():
    """Sets of one method, and neighbours of several sets, where the published row stands."""
    rows = [row_of("random:labels", "random") for _ in range(2)]
    rows += [row_of(name, "set", "scores", "frepo") for name in ("frepo 1 (a)", "frepo 2 (b)")] + [
        row_of("krr_st", "set")
    ]
    for row, name in zip(rows, ("random:labels (frepo 1 (a))", "random:labels (krr_st)"), strict=False):
        row.name = name  # as the evaluator tells them apart, once they are made
    results = {
        ("finetune", "cifar10", "convnet", row.name): cell("finetune", (1 + i) / 10) for i, row in enumerate(rows)
    }
    found = shown(krr_st_table(3, results, rows))[2:]
    assert found == [["w/o pre", "-"], *([row.name, f"{10 * (1 + i):.1f} ± 0.0"] for i, row in enumerate(rows))]


def test_krr_sts_seven_targets():
    seven = ("cifar100", "cifar10", "aircraft", "cars", "cub200", "dogs", "flowers")
    assert [(source, targets) for source, targets, _ in TABLES.values()] == [
        ("cifar100", seven), ("tiny_imagenet", ("tiny_imagenet", *seven[1:])),
        ("imagenet", ("cifar10", "cifar100", *seven[2:])),
    ]  # fmt: skip


def difference(one, other):
    """(mean, standard error) of one - other, by hand."""
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    mean = sum(gaps) / len(gaps)
    return mean, math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))


def ranked():
    """(values, results, rows): sets of scores, labels and features with their neighbours, on two targets and models."""
    values = dict(s=(0.5, 0.6, 0.9), hard=(0.4, 0.3, 0.5), every=(0.95, 0.9, 0.97), rand=(0.2, 0.6, 0.1),
                  l=(0.7, 0.8, 0.75), rand_l=(0.3, 0.1, 0.35), f=(0.1, 0.1, 0.1))  # fmt: skip
    scales = {("m", "a"): 1.0, ("k", "a"): 0.5, ("m", "b"): 0.25}
    results = {("scratch", target, model, name): cell("accuracy", *(scale * v for v in of))
               for name, of in values.items() for (model, target), scale in scales.items()}  # fmt: skip
    results |= {("probe", "c", "m", name): cell("probe", *reversed(of)) for name, of in values.items()}
    rows = (
        ("every", "labels", "all_real"), ("rand", "scores", "random"), ("rand_l", "labels", "random"),
        ("s", "scores", "set"), ("hard", "labels", "set"), ("l", "labels", "set"), ("f", "features", "set"),
    )  # fmt: skip
    rows = {name: row_of(name, row, kind) for name, kind, row in rows}
    both = {"all_real:labels": rows["every"]}
    rows["s"].beside = both | dict(random=rows["rand"], hard=rows["hard"])
    rows["l"].beside = both | dict(random=rows["rand_l"])
    rows["f"].beside = dict(random=rows["rand"])
    return values, scales, results, list(rows.values())


def test_the_ranking_is_two_differences_over_networks():
    values, scales, results, rows = ranked()
    found = ranking_of(results, rows)
    assert len(found) == 6
    for name, hard, random in (("s", "hard", "rand"), ("l", "l", "rand_l")):
        for (model, target), scale in scales.items():
            of = found[f"{name}, {model}, {target}"]
            for what, one, other in (("hard_label_recovery", "every", hard), ("improvement_over_random", name, random)):
                mean, error = difference([scale * v for v in values[one]], [scale * v for v in values[other]])
                assert of[what]["mean"] == pytest.approx(mean, rel=1e-9) and of[what]["pairs"] == 3
                assert of[what]["se"] == of[what]["se_networks"] == pytest.approx(error, rel=1e-9)


def test_rows_are_set_against_the_random_row_of_their_own_set():
    values, scales, results, rows = ranked()
    found = against_random(results, rows)
    by_place = {(of["protocol"], of["target"], of["model"], of["row"], of["metric"]): of for of in found}
    assert len(by_place) == len(found) == 20
    places = {("scratch", target, model, "accuracy"): scale for (model, target), scale in scales.items()}
    for (use, target, model, metric), scale in (places | {("probe", "c", "m", "probe"): 1.0}).items():
        for name, random in (("s", "rand"), ("hard", "rand"), ("every", "rand"), ("l", "rand_l"), ("f", "rand")):
            mean, error = difference([scale * v for v in values[name]], [scale * v for v in values[random]])
            of = by_place[use, target, model, name, metric]
            assert of["mean"] == pytest.approx(mean, rel=1e-9) and of["se"] == pytest.approx(error, rel=1e-9)


def test_only_what_both_rows_have_is_compared():
    rows = [row_of("random", "random"), row_of("s", "set"), row_of("t", "set")]
    rows[1].beside = {"random": rows[0]}
    results = {("probe", "a", "m", "random"): cell("probe", 0.1, 0.2), ("knn", "a", "m", "s"): cell("knn", 0.5, 0.5),
               ("probe", "a", "m", "s"): cell("probe", 0.4, 0.6) | cell("match", 0.5, 0.5),
               ("probe", "a", "m", "t"): cell("probe", 0.9, 0.9)}  # fmt: skip
    (found,) = against_random(results, rows)
    assert (found["protocol"], found["row"], found["metric"]) == ("probe", "s", "probe")
    assert found["mean"] == pytest.approx(0.35) and found["se"] == pytest.approx(0.05)
