"""common/baselines.py: subsets against loops in float64; DM and DSA step by step against independent float64 code."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from sklearn.cluster import KMeans
from torch import nn

import common.baselines
from common.augment import dsa
from common.baselines import (
    DM,
    DSA,
    MATCHED,
    STRATEGY,
    SUBSETS,
    check_finite,
    convnet,
    dm,
    dsa_matching,
    gaussian,
    gradient_distance,
    herding,
    highest,
    kmeans_medoids,
    loops,
    random_subset,
    real_losses,
    subset_of,
)
from common.data import load, normalise
from common.models import ConvNet
from common.run import rng, seed_of, seeded
from common.students import per_class

F64 = torch.float64
CPU = torch.device("cpu")
CLASSES, WIDTH = 3, 4


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def digits():
    """Without the test images: nothing here may look at them."""
    return dataclasses.replace(load("digits"), x_test=None, y_test=None)


@pytest.fixture(scope="module")
def three(digits):
    """14 zeros, 11 ones and 8 twos, in a mixed order."""
    index = torch.cat([(digits.y_train == label).nonzero()[:n, 0] for label, n in enumerate((14, 11, 8))])
    index = index[torch.randperm(33, generator=torch.Generator().manual_seed(0))]
    parts = dict(x_train=digits.x_train[index], y_train=digits.y_train[index])
    return dataclasses.replace(digits, **parts, class_names=["0", "1", "2"])


def unlabelled(data):
    return dataclasses.replace(data, y_train=None, class_names=[])


# ---------------------------------------------------------------------------------------------------- noise, at random


def test_gaussian_noise_is_keyed_and_standard():
    noise = gaussian((20, 3, 16, 16), 5, 1)
    assert noise.dtype == torch.float32 and noise.shape == (20, 3, 16, 16)
    assert torch.equal(noise, torch.randn((20, 3, 16, 16), generator=rng("gaussian", 5, 1)))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert not torch.equal(noise, gaussian((20, 3, 16, 16), 5, 2))


def test_random_images_are_those_that_the_evaluations_draw(three):
    order = torch.randperm(33, generator=rng("random real", 3, 1))
    assert torch.equal(random_subset(None, 33, 9, 3, 1), order[:9])
    y = three.y_train
    found = random_subset(y, 33, 9, 3, 1)
    assert torch.equal(found, per_class(y, 3, "random real", 3, 1))
    wanted = [[i for i in order.tolist() if y[i] == label][:3] for label in range(3)]
    assert found.tolist() == list(itertools.chain(*wanted))
    assert not torch.equal(found, random_subset(y, 33, 9, 3, 2))
    assert len(random_subset(y, 33, 24, 0)) == 24 and len(random_subset(None, 33, 33, 0)) == 33


def test_too_many_or_unequal_images_are_refused(three):
    y = three.y_train
    refuse(lambda: random_subset(y, 33, 10, 0), "10 images", "3 classes", "ask for 9")
    refuse(lambda: random_subset(y, 33, 1, 0), "ask for 3")
    refuse(lambda: random_subset(y, 33, 0, 0), "ask for 3")
    refuse(lambda: random_subset(y, 33, 27, 0), "class 2 has 8", "9 of each", "at most 8 a class, 24 in all")
    refuse(lambda: random_subset(y + (y == 2), 33, 4, 0), "class 2 has no training image")
    for n in (0, 34):
        refuse(lambda n=n: random_subset(None, 33, n, 0), f"{n} images", "33 training images", "1 to 33")
        refuse(lambda n=n: herding(draw(33, 2), n), "1 to 33")
        refuse(lambda n=n: highest(draw(33), n), "1 to 33")


# --------------------------------------------------------------------------------------------------------- the subsets


@pytest.mark.parametrize("n", [2, 9, 60])
def test_medoids_are_the_nearest_to_their_centres(n):
    """Of those not yet taken, in loops, from scikit-learn's centres."""
    features = draw(60, 5, seed=1) + 100
    found = kmeans_medoids(features, n, 0, 5)
    rows = features.double() - features.double().mean(0)
    model = KMeans(n, n_init=1, random_state=seed_of("kmeans", 0, 5) % 2**32).fit(rows.float().numpy())
    taken = []
    for index, centre in zip(found.tolist(), model.cluster_centers_.tolist(), strict=True):
        distances = [sum((a - b) ** 2 for a, b in zip(row, centre, strict=True)) for row in rows.tolist()]
        assert index not in taken
        assert distances[index] <= min(d for i, d in enumerate(distances) if i not in taken) * (1 + 1e-5) + 1e-9
        taken.append(index)
    assert n == 60 or not torch.equal(found, kmeans_medoids(features, n, 0, 6))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_medoids_of_equal_images_are_distinct():
    found = kmeans_medoids(draw(5, 3, seed=84).repeat(4, 1), 8, 0).tolist()
    assert len(set(found)) == 8 and {i % 5 for i in found} == {0, 1, 2, 3, 4}


def test_medoids_far_from_zero_are_the_middles():
    """Four clusters, at a million: float32 could not tell their images apart there."""
    features = 1e-3 * (draw(240, 4, seed=83, dtype=F64) + 100 * torch.eye(4).repeat_interleave(60, 0)) + 1e6
    clusters = enumerate(features.double().split(60))
    wanted = [60 * i + int((rows - rows.mean(0)).square().sum(1).argmin()) for i, rows in clusters]
    assert sorted(kmeans_medoids(features, 4, 0).tolist()) == wanted


def naive_herding(rows, n):
    """Each candidate's new mean, dimension by dimension."""
    d, chosen = len(rows[0]), []
    mean = [sum(row[j] for row in rows) / len(rows) for j in range(d)]
    for _ in range(n):
        distance = {}
        for i in set(range(len(rows))) - set(chosen):
            group = [rows[k] for k in [*chosen, i]]
            distance[i] = sum((sum(row[j] for row in group) / len(group) - mean[j]) ** 2 for j in range(d))
        chosen.append(min(distance, key=distance.get))
    return chosen


@pytest.mark.parametrize(("kept", "rows"), [(True, 65_536), (True, 7), (False, 7)])
@pytest.mark.parametrize("offset", [0, 30])
def test_herding_keeps_the_mean(monkeypatch, kept, rows, offset):
    monkeypatch.setattr(common.baselines, "ROWS", rows)
    monkeypatch.setattr(common.baselines, "KEPT_BYTES", 40 * 4 * 8 - (not kept))
    features = draw(40, 4, seed=2).exp() + offset  # lopsided: the mean is not the middle
    assert herding(features, 12).tolist() == naive_herding(features.double().tolist(), 12)
    assert sorted(herding(features, 40).tolist()) == list(range(40))


@pytest.mark.parametrize("kept", [True, False])
def test_herding_makes_no_float64_copy_of_much(monkeypatch, kept):
    """Eight rows at a time in float64; anew for the mean, the lengths and each choice where the whole may not stay."""
    monkeypatch.setattr(common.baselines, "ROWS", 8)
    monkeypatch.setattr(common.baselines, "KEPT_BYTES", 40 * 4 * 8 - (not kept))
    features, double, sizes = draw(40, 4), torch.Tensor.double, []
    monkeypatch.setattr(torch.Tensor, "double", lambda x: sizes.append(len(x) if x.dim() > 1 else 0) or double(x))
    herding(features, 6)
    assert [size for size in sizes if size] == [8] * 5 * (2 if kept else 8)


def test_herding_takes_each_of_equal_images_once():
    features = draw(1, 3, seed=4).repeat(6, 1)
    assert sorted(herding(features, 6).tolist()) == list(range(6))


def test_highest_first_equal_ones_by_index():
    losses = torch.tensor([1.0, 3, 2, 3, 0, 2, 3])
    assert highest(losses, 5).tolist() == [1, 3, 6, 2, 5] and highest(losses, 1).tolist() == [1]
    many = draw(500, seed=3).round()
    wanted = sorted(range(500), key=lambda i: (-float(many[i]), i))
    assert highest(many, 300).tolist() == wanted[:300]


class Linear(nn.Module):
    """One layer whose calls note the mode."""

    def __init__(self, d, out, modes):
        super().__init__()
        self.layer, self.modes = nn.Linear(d, out), modes

    def forward(self, x):
        self.modes.append(self.training)
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("epochs", [1, 2])
def test_real_losses_are_those_of_networks_trained_on_all(three, labels, epochs):
    """A linear network: its gradients by hand, momentum and decay in loops, float64."""
    out, lr, momentum, decay, batch, networks = 3, 0.05, 0.8, 0.01, 10, 2
    y = three.y_train if labels else draw(33, out, seed=7)
    modes, nets = [], []

    def make_net():
        nets.append(Linear(64, out, modes))
        return nets[-1]

    sgd = dict(batch=batch, lr=lr, momentum=momentum, weight_decay=decay)
    found = real_losses(three.x_train, y, three, make_net, CPU, 4, 1, networks=networks, epochs=epochs, **sgd)
    assert modes == ([True] * 4 * epochs + [False] * 4) * networks

    x = normalise(three.x_train, three.mean, three.std).double().flatten(1)
    wanted = torch.zeros(33, dtype=F64)
    target = F.one_hot(y, 3).double() if labels else y.double()
    for number in range(networks):
        with seeded("real losses", 4, 1, number):
            net = nn.Linear(64, out)
        weights = [net.weight.detach().double(), net.bias.detach().double()]
        speed = [torch.zeros_like(w) for w in weights]
        for epoch in range(epochs):
            order = torch.randperm(33, generator=rng("real losses", 4, 1, number, epoch)).tolist()
            for i in range(0, 33, batch):
                rows = order[i : i + batch]
                gradient = [torch.zeros_like(w) for w in weights]
                for row in rows:
                    answer = weights[0] @ x[row] + weights[1]
                    if labels:
                        slope = answer.softmax(0) - target[row]
                    else:
                        slope = 2 * (answer - target[row]) / out
                    gradient[0] += torch.outer(slope, x[row]) / len(rows)
                    gradient[1] += slope / len(rows)
                for w, v, g in zip(weights, speed, gradient, strict=True):
                    v.mul_(momentum).add_(g + decay * w)
                    w.sub_(lr * v)
        for row in range(33):
            answer = weights[0] @ x[row] + weights[1]
            if labels:
                wanted[row] -= answer.log_softmax(0)[y[row]]
            else:
                wanted[row] += (answer - target[row]).square().sum() / out
    torch.testing.assert_close(found, wanted / networks, rtol=1e-4, atol=1e-5)


def test_real_losses_are_trained_as_published(three, monkeypatch):
    seen, modes, sgd = [], [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **kwargs: seen.append(kwargs) or sgd(*args, **kwargs))
    make_net = lambda: Linear(64, 3, modes)  # noqa: E731
    real_losses(three.x_train, three.y_train, three, make_net, CPU, 0)
    assert seen == [dict(lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=True)] * 5
    assert modes == [True, False] * 5  # one epoch of one batch each
    make_net = lambda: Linear(64, 5, [])  # noqa: E731
    refuse(
        lambda: real_losses(three.x_train, draw(33, 5), three, make_net, CPU, 0, epochs=3, lr=1e30), "lower its rate"
    )


@pytest.mark.parametrize("name", SUBSETS)
def test_subsets_by_name_inside_each_class_or_over_all(three, name):
    features, losses = draw(33, 6, seed=5), draw(33, seed=6)
    pixels = torch.tensor([[value / 255 for value in image.flatten().tolist()] for image in three.x_train])

    def choose(rows, n, *key):
        rows = torch.tensor(rows)
        if name == "kmeans_pixels":
            return rows[kmeans_medoids(pixels[rows], n, *key)].tolist()
        if name == "kmeans":
            return rows[kmeans_medoids(features[rows], n, *key)].tolist()
        if name == "herding":
            return [rows[i] for i in naive_herding(features[rows].double().tolist(), n)]
        return sorted(rows.tolist(), key=lambda i: -losses[i])[:n]

    y = three.y_train.tolist()
    whole, balanced = (subset_of(name, three, 12, b, features, losses, 2, 0).tolist() for b in (False, True))
    if name == "random":
        assert whole == random_subset(None, 33, 12, 2, 0).tolist()
        assert balanced == random_subset(three.y_train, 33, 12, 2, 0).tolist()
    else:
        members = [[i for i in range(33) if y[i] == label] for label in range(3)]
        assert whole == choose(list(range(33)), 12, 2, 0)
        assert balanced == [i for label, rows in enumerate(members) for i in choose(rows, 4, 2, 0, label)]
    assert [y[i] for i in balanced] == [0] * 4 + [1] * 4 + [2] * 4 and len(set(balanced)) == 12
    assert len(set(whole)) == 12
    assert whole == subset_of(name, unlabelled(three), 12, False, features, losses, 2, 0).tolist()
    refuse(lambda: subset_of(name, unlabelled(three), 12, True, features, losses, 0), name, "no labels")
    refuse(lambda: subset_of(name, three, 11, True, features, losses, 0), "no multiple of the 3 classes", "ask for 12")
    refuse(lambda: subset_of(name, three, 27, True, features, losses, 0), "class 2 has 8")
    refuse(lambda: subset_of(name, three, 34, False, features, losses, 0), "33 training images")
    more = dataclasses.replace(three, class_names=["0", "1", "2", "3"])
    refuse(lambda: subset_of(name, more, 12, True, features, losses, 0), "class 3 has no training image")


def test_subsets_say_what_they_lack(three):
    refuse(lambda: subset_of("medoids", three, 3, True, None, None, 0), "medoids", *SUBSETS)
    for name in ("kmeans", "herding"):
        refuse(lambda name=name: subset_of(name, three, 3, True, None, draw(33), 0), name, "teacher", "kmeans_pixels")
    refuse(lambda: subset_of("high_loss", three, 3, True, draw(33, 2), None, 0), "high_loss", "losses")
    for name in ("random", "kmeans_pixels"):
        subset_of(name, three, 3, True, None, None, 0)


# ---------------------------------------------------------------------------------------------- matching, in float64


def embed(weights, x):
    """Blocks of convolution, instance norm, ReLU, 2x2 mean; by other means than the network's. (N, d)"""
    for w, b, gain, shift in zip(*[iter(weights[:-2])] * 4, strict=True):
        patches = F.unfold(x, 3, padding=1)  # (N, 9 C, H W)
        x = (w.flatten(1) @ patches + b[:, None]).view(len(x), len(w), *x.shape[2:])
        mean = x.mean((2, 3), keepdim=True)
        x = (x - mean) / ((x - mean) ** 2).mean((2, 3), keepdim=True).add(1e-5).sqrt()
        x = (x * gain[:, None, None] + shift[:, None, None]).clamp(min=0)
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    return x.flatten(1)


def cross_entropy(weights, x, labels):
    scores = embed(weights, x) @ weights[-2].mT + weights[-1]
    return sum(row.logsumexp(0) - row[label] for row, label in zip(scores, labels, strict=True)) / len(x)


def naive_distance(g_real, g_syn):
    total = 0
    for real, syn in zip(g_real, g_syn, strict=True):
        if real.dim() > 1:
            for a, b in zip(real.flatten(1), syn.flatten(1), strict=True):
                total = total + 1 - (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt() + 1e-6)
    return total


def drawn_weights(name, *key):
    with seeded(name, *key):
        net = ConvNet(1, 8, CLASSES, (WIDTH, WIDTH), norm="instance")
    return [w.detach().double().requires_grad_() for w in net.parameters()]


def real_batch(data, label, n, *key):
    members = [i for i, y in enumerate(data.y_train.tolist()) if y == label]
    order = torch.randperm(len(members), generator=rng("real batch", *key, label)).tolist()
    return normalise(data.x_train[[members[i] for i in order[:n]]], data.mean, data.std).double()


def together(x_t, x_s, strategy, *key):
    """One call of the augmentation for both: siamese beyond doubt."""
    both = dsa(torch.cat([x_t, x_s]), rng("siamese", *key), strategy, "dc", shared=True)
    return both[: len(x_t)], both[len(x_t) :]


def first_images(data, ipc, init, *key):
    if init == "noise":
        return gaussian((CLASSES, ipc, 1, 8, 8), *key).double()
    real = random_subset(data.y_train, len(data.x_train), CLASSES * ipc, *key)
    return normalise(data.x_train[real], data.mean, data.std).double().view(CLASSES, ipc, 1, 8, 8)


def gradient_by_differences(function, x, places, eps=1e-6):
    """At some places of x only."""
    slopes = []
    for place in places:
        step = torch.zeros_like(x).flatten()
        step[place] = eps
        slopes.append((function(x + step.view_as(x)) - function(x - step.view_as(x))) / (2 * eps))
    return torch.stack(slopes).detach()


def outer_gradient(function, x):
    """By autograd, and as a check of that by differences at a few places."""
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    places = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))[:4]
    slopes = gradient_by_differences(function, x, places)
    torch.testing.assert_close(gradient.flatten()[places], slopes, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
    return value.detach(), gradient


def naive_dm(data, ipc, s, strategy, *key):
    x_s, told = first_images(data, ipc, s.init, *key), []
    speed = torch.zeros_like(x_s)
    for iteration in range(s.iterations):
        weights, values, gradient = drawn_weights("dm network", *key, iteration), [], torch.zeros_like(x_s)
        for label in range(CLASSES):
            x_t = real_batch(data, label, s.batch_real, *key, iteration)

            def loss(x, x_t=x_t, label=label, weights=weights, iteration=iteration):
                a, b = (embed(weights, v) for v in together(x_t, x, strategy, *key, iteration, label))
                return sum((sum(a[:, j]) / len(a) - sum(b[:, j]) / len(b)) ** 2 for j in range(a.shape[1]))

            value, gradient[label] = outer_gradient(loss, x_s[label])
            values.append(value)
        speed = s.momentum * speed + gradient
        x_s = x_s - s.lr_img * speed
        told.append((iteration + 1, float(sum(values) / CLASSES)))
    return x_s.flatten(0, 1), told


def naive_dsa(data, ipc, s, strategy, *key):
    x_s, told = first_images(data, ipc, s.init, *key), []
    speed = torch.zeros_like(x_s)
    for iteration in range(s.iterations):
        weights, values = drawn_weights("dsa network", *key, iteration), []
        for update in range(s.outer):
            gradient, at = torch.zeros_like(x_s), (*key, iteration, update)
            for label in range(CLASSES):
                x_t = real_batch(data, label, s.batch_real, *at)

                def loss(x, x_t=x_t, label=label, weights=weights, at=at):
                    images = together(x_t, x, strategy, *at, label)
                    losses = [cross_entropy(weights, v, [label] * len(v)) for v in images]
                    g_real = torch.autograd.grad(losses[0], weights)
                    return naive_distance(g_real, torch.autograd.grad(losses[1], weights, create_graph=True))

                value, gradient[label] = outer_gradient(loss, x_s[label])
                values.append(value)
            speed = s.momentum * speed + gradient
            x_s = x_s - s.lr_img * speed
            if update == s.outer - 1:
                break
            x, y, generator = x_s.flatten(0, 1), [c for c in range(CLASSES) for _ in range(ipc)], rng("dsa inner", *at)
            for _ in range(s.inner):
                order = torch.randperm(len(x), generator=generator).tolist()
                for i in range(0, len(x), s.batch_train):
                    rows = order[i : i + s.batch_train]
                    images = dsa(x[rows], generator, strategy, "dc")
                    slopes = torch.autograd.grad(cross_entropy(weights, images, [y[j] for j in rows]), weights)
                    weights = [
                        (w - s.lr_net * g).detach().requires_grad_() for w, g in zip(weights, slopes, strict=True)
                    ]
        told.append((iteration + 1, float(sum(values) / len(values))))
    return x_s.flatten(0, 1), told


def check_steps(found, told, wanted, wanted_told, began):
    """The images' movement, not only the images, within float32's rounding."""
    moved, wanted_moved = found.double() - began, wanted - began
    assert wanted_moved.norm() > 0.05 * began.norm()
    assert (moved - wanted_moved).norm() < 1e-5 * wanted_moved.norm()
    assert [done for done, _ in told] == [done for done, _ in wanted_told]
    assert [loss for _, loss in told] == pytest.approx([loss for _, loss in wanted_told], rel=1e-4)


@pytest.mark.parametrize(("flip", "init", "key"), [(False, "real", (0,)), (True, "noise", (1, 2))])
def test_dm_step_by_step(three, flip, init, key):
    data = dataclasses.replace(three, flip=flip)
    settings = DM(iterations=6, lr_img=4.0, batch_real=9, init=init, width=WIDTH)
    told = []
    found = dm(data, 2, CPU, settings, *key, after=lambda done, loss: told.append((done, loss)))
    assert found.dtype == torch.float32 and not found.requires_grad
    strategy = STRATEGY if flip else "color_crop_cutout_scale_rotate"
    began = first_images(data, 2, init, *key).flatten(0, 1)
    check_steps(found, told, *naive_dm(data, 2, settings, strategy, *key), began)


@pytest.mark.parametrize(("flip", "init", "key"), [(False, "real", (0,)), (True, "noise", (1, 2))])
def test_dsa_step_by_step(three, flip, init, key):
    data = dataclasses.replace(three, flip=flip)
    more = dict(batch_real=9, batch_train=4, init=init, width=WIDTH)
    settings = DSA(iterations=2, outer=3, inner=2, lr_img=0.5, lr_net=0.1, **more)
    told = []
    found = dsa_matching(data, 2, CPU, settings, *key, after=lambda done, loss: told.append((done, loss)))
    assert found.dtype == torch.float32 and not found.requires_grad
    strategy = STRATEGY if flip else "color_crop_cutout_scale_rotate"
    began = first_images(data, 2, init, *key).flatten(0, 1)
    check_steps(found, told, *naive_dsa(data, 2, settings, strategy, *key), began)


def test_gradient_distance_is_one_minus_the_cosine_of_each_output():
    shapes = [(5, 2, 3, 3), (5,), (4, 6), (4,)]
    real, syn = ([draw(*shape, seed=seed + i, dtype=F64) for i, shape in enumerate(shapes)] for seed in (10, 20))
    real[0][1], syn[2][2] = 0, 0  # a dead unit counts 1
    syn[0][2] *= 1e-4  # where 1e-6 shows
    wanted = 0.0
    for a, b in ((real[0], syn[0]), (real[2], syn[2])):
        for row in range(len(a)):
            one, other = a[row].flatten().tolist(), b[row].flatten().tolist()
            dot = sum(p * q for p, q in zip(one, other, strict=True))
            lengths = math.sqrt(sum(p * p for p in one)) * math.sqrt(sum(q * q for q in other))
            wanted += 1 - dot / (lengths + 1e-6)
    assert float(gradient_distance(real, syn)) == pytest.approx(wanted, rel=1e-12)
    assert float(gradient_distance(real, real)) == pytest.approx(1, abs=1e-4)  # the dead unit
    assert float(gradient_distance([real[1]], [syn[1]])) == 0
    leaf = syn[2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(gradient_distance([real[2]], [leaf]), leaf)
    assert slope.isfinite().all()


# ------------------------------------------------------------------------------------------------- matching, as a whole

SHORT_DM = DM(iterations=2, batch_real=8, width=WIDTH)
SHORT_DSA = DSA(iterations=1, outer=2, inner=1, batch_real=8, width=WIDTH)
BOTH = pytest.mark.parametrize(("method", "settings"), [(dm, SHORT_DM), (dsa_matching, SHORT_DSA)])


def test_the_settings_are_the_published_ones():
    shared = dict(momentum=0.5, batch_real=256, init="real", width=128, strategy=STRATEGY)
    assert STRATEGY == "color_crop_cutout_flip_scale_rotate"
    assert dataclasses.asdict(DM()) == dict(iterations=20_000, lr_img=1.0) | shared
    own = dict(iterations=1000, lr_img=0.1, lr_net=0.01, batch_train=256, outer=None, inner=None)
    assert dataclasses.asdict(DSA()) == own | shared
    assert set(MATCHED) == {"dm", "dsa"}


def test_the_loops_of_dsa_by_images_a_class():
    published = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: loops(ipc, DSA()) for ipc in published} == published
    assert [loops(ipc, DSA()) for ipc in (2, 3, 4, 100)] == [(1, 1), (1, 1), (10, 50), (50, 10)]
    assert loops(10, DSA(outer=3)) == (3, 50) and loops(10, DSA(inner=0)) == (10, 0)


def test_dsa_trains_no_network_that_it_throws_away(three, monkeypatch):
    calls = []
    monkeypatch.setattr(common.baselines, "train_on", lambda net, *rest: calls.append(rest[-2:]))
    dsa_matching(three, 1, CPU, DSA(iterations=2, outer=3, inner=1, batch_real=8, width=WIDTH), 7)
    assert calls == [(0, 0), (0, 1), (1, 0), (1, 1)]  # iteration and update


def test_the_network_is_the_fields(digits):
    net = convnet(dataclasses.replace(digits, x_train=torch.zeros(1, 3, 32, 32)), 128, CPU, 0)
    assert [conv.out_channels for conv in net.blocks[::4]] == [128, 128, 128]
    assert all(isinstance(norm, nn.GroupNorm) and norm.num_groups == 128 for norm in net.blocks[1::4])
    assert net.head.in_features == 128 * 4 * 4 and net.head.out_features == 10


@BOTH
def test_repeatable_to_the_bit_and_keyed(three, method, settings):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = method(three, 2, CPU, settings, 3, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, method(three, 2, CPU, settings, 3, 1))
    assert not torch.equal(first, method(three, 2, CPU, settings, 3, 2))
    assert first.shape == (6, 1, 8, 8) and first.device == CPU


@BOTH
def test_class_after_class(three, method, settings):
    """What is learnt for a class depends on the real images of that class alone; it starts from them."""
    began = method(three, 2, CPU, dataclasses.replace(settings, iterations=0), 3)
    real = random_subset(three.y_train, 33, 6, 3)
    assert torch.equal(began, normalise(three.x_train[real], three.mean, three.std))
    assert three.y_train[real].tolist() == [0, 0, 1, 1, 2, 2]
    x = three.x_train.clone()
    x[three.y_train == 1] = 255 - x[three.y_train == 1]
    changes = dict(outer=1) if method is dsa_matching else {}  # between two updates the network sees all classes
    settings = dataclasses.replace(settings, init="noise", **changes)
    one, other = (
        method(dataclasses.replace(three, x_train=pixels), 2, CPU, settings, 3) for pixels in (three.x_train, x)
    )
    changed = (one != other).flatten(1).any(1).tolist()
    assert changed == [False, False, True, True, False, False]


@BOTH
def test_what_cannot_be_matched_is_refused(three, method, settings):
    run = lambda data=three, ipc=2, **changes: method(data, ipc, CPU, dataclasses.replace(settings, **changes), 0)  # noqa: E731
    refuse(lambda: run(unlabelled(three)), "needs labels", "digits")
    refuse(lambda: run(ipc=0), "from 1 on")
    refuse(lambda: run(ipc=9), "class 2 has 8")
    run(ipc=9, init="noise", iterations=1)
    refuse(lambda: run(init="zeros"), "zeros", "real, noise")
    refuse(lambda: run(strategy="color_blur"), "blur")
    more = dataclasses.replace(three, class_names=["0", "1", "2", "3"])
    refuse(lambda: run(more, init="noise"), "class 3 has no training image")


@BOTH
def test_a_matching_that_diverges_stops_at_once(three, method, settings):
    told = []
    settings = dataclasses.replace(settings, iterations=50, lr_img=1e38)
    name = "DM" if method is dm else "DSA"
    line = refuse(
        lambda: method(three, 2, CPU, settings, 0, after=lambda *now: told.append(now)),
        f"{name}: not finite", "of 50", "lower the images' rate 1e+38",
    )  # fmt: skip
    assert len(told) < 5 and f"at iteration {len(told) + 1} of 50" in line
    assert all(math.isfinite(loss) for _, loss in told)


@pytest.mark.parametrize(("loss", "pixel"), [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, -math.inf)])
def test_the_loss_and_the_images_must_be_finite(loss, pixel):
    """The last update may spoil the images after a good loss."""
    check_finite("DM", 1.0, torch.zeros(2, 1, 1, 2, 2), 7, SHORT_DM)
    x_s = torch.zeros(2, 1, 1, 2, 2)
    x_s[1, 0, 0, 1, 1] = pixel
    refuse(lambda: check_finite("DM", loss, x_s, 7, SHORT_DM), f"DM: not finite (loss {loss:.4g}) at iteration 7 of 2")


def mean_loss(told, part):
    return sum(loss for _, loss in told[part]) / len(told[part])


def test_dm_lowers_its_loss_on_digits(digits):
    told = []
    settings = DM(iterations=25, batch_real=32, width=16, init="noise")
    dm(digits, 1, CPU, settings, 0, after=lambda *now: told.append(now))
    assert mean_loss(told, slice(-5, None)) < 0.5 * mean_loss(told, slice(5))


def test_dsa_lowers_its_loss_on_digits(digits):
    told = []
    settings = DSA(iterations=12, lr_img=0.5, batch_real=32, width=16, init="noise")
    dsa_matching(digits, 1, CPU, settings, 0, after=lambda *now: told.append(now))
    assert mean_loss(told, slice(-3, None)) < 0.8 * mean_loss(told, slice(3))
