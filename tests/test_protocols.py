"""common/protocols.py: trainings recomputed update by update in float64, probes and votes against loops."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import refuse
from torch import nn

from common.augment import dsa
from common.data import Inputs, load, normalise
from common.pairs import Protocol, probes
from common.protocols import (
    CHUNK,
    DSA_OF_DC,
    SHARES,
    KdRecipe,
    LabelRecipe,
    distil_knowledge,
    embed,
    fit_labels,
    kd_loss,
    knn_of,
    neighbours_vote,
    probe,
    test_accuracy,
    without_flip,
)
from common.run import rng, seeded

test_accuracy.__test__ = False  # pytest would take it for a test
F64 = torch.float64
CPU = torch.device("cpu")
CLASSES, PIXELS = 3, 16


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def double():
    """Networks that a test builds, and heads that the code builds, are in float64."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


class Lines(nn.Module):
    """Two linear layers without anything between them; notes in which mode it was called."""

    def __init__(self, dim, out):
        super().__init__()
        self.dim, self.modes = dim, []
        self.first, self.head = nn.Linear(PIXELS, dim, bias=False), nn.Linear(dim, out)

    def features(self, x):
        self.modes.append(self.training)
        return self.first(x.flatten(1))

    def forward(self, x):
        return self.head(self.features(x))


def softmax(row):
    odds = [math.exp(value - max(row)) for value in row]
    return [value / sum(odds) for value in odds]


def gradients(x, wanted, first, weight, bias, temperature=1.0):
    """Of Lines under cross-entropy to `wanted`, probabilities (B, C): by hand, mean over the batch."""
    flat = x.flatten(1)
    found = [torch.zeros_like(first), torch.zeros_like(weight), torch.zeros_like(bias)]
    for image, target in zip(flat, wanted, strict=True):
        f = [sum(w * p for w, p in zip(row, image.tolist(), strict=True)) for row in first.tolist()]
        scores = [sum(w * v for w, v in zip(row, f, strict=True)) + b
                  for row, b in zip(weight.tolist(), bias.tolist(), strict=True)]  # fmt: skip
        guess = softmax([score / temperature for score in scores])
        slope = [(g - t) / temperature / len(x) for g, t in zip(guess, target.tolist(), strict=True)]
        for c, value in enumerate(slope):
            found[2][c] += value
            for j, entry in enumerate(f):
                found[1][c, j] += value * entry
                found[0][j] += value * weight[c, j] * image
    return found


def batches(n, batch, epochs, *key):
    """(epoch, places) of every batch: each epoch in an order of its own, its last batch short."""
    for epoch in range(epochs):
        order = torch.randperm(n, generator=rng("student order", *key, epoch)).tolist()
        while order:
            yield epoch, torch.tensor(order[:batch])
            order = order[batch:]


# ------------------------------------------------------------------------------------------------------------ schedules


def test_the_defaults_are_those_of_krr_sts_code():
    labels, kd = LabelRecipe(), KdRecipe()
    assert (labels.epochs, labels.batch, labels.lr, labels.momentum, labels.weight_decay) == (
        1000,
        256,
        0.01,
        0.9,
        5e-4,
    )
    assert (kd.epochs, kd.batch, kd.lr, kd.lr_gaussian, kd.weight_decay) == (1000, 512, 1e-4, 1e-3, 0.0)
    assert (kd.temperature, kd.student_test_mode, kd.teacher_mode) == (1.0, "eval", "eval")
    for recipe in (labels, kd):
        assert recipe.strengths == "dc"
        assert sorted(recipe.dsa.split("_")) == ["color", "crop", "cutout", "flip", "rotate", "scale"]


def test_only_the_flip_is_taken_out_of_a_strategy():
    assert without_flip(DSA_OF_DC, True) == "color_crop_cutout_flip_scale_rotate"
    assert without_flip(DSA_OF_DC, False) == "color_crop_cutout_scale_rotate"
    assert without_flip("flip_color", False) == "color" and without_flip("none", False) == "none"
    assert without_flip("flip", False) == ""


# ---------------------------------------------------------------------------------------------------------- hard labels


@pytest.mark.parametrize(("n", "batch", "steps"), [(7, 3, 9), (7, 3, 8), (5, 256, 4), (6, 3, 1)])
def test_training_on_labels_is_recomputed_update_by_update(double, n, batch, steps):
    """Order, short last batch, augmentation, momentum, decay, and a tenth of the rate from the middle on."""
    recipe = LabelRecipe(batch=batch, lr=0.3, momentum=0.8, weight_decay=0.05)
    x, y = draw(n, 1, 4, 4, seed=1), torch.arange(n) % CLASSES
    net = Lines(2, CLASSES)
    values = [value.detach().clone() for value in net.parameters()]
    speed, generator, asked = [torch.zeros_like(value) for value in values], rng("labels augmentation", 3, 1), []
    net.eval()
    fit_labels(net, lambda index: asked.append(index) or x[index], y, recipe, steps, 3, 1)
    assert net.training and all(net.modes)
    for step, (_, index) in zip(range(steps), batches(n, batch, steps, 3, 1), strict=False):
        assert torch.equal(asked[step], index)
        seen = dsa(x[index], generator, DSA_OF_DC, "dc")
        wanted = torch.tensor([[float(c == y[i]) for c in range(CLASSES)] for i in index.tolist()])
        rate = 0.3 if step < steps / 2 else 0.03
        for value, gradient, v in zip(values, gradients(seen, wanted, *values), speed, strict=True):
            v.copy_(0.8 * v + gradient + 0.05 * value)
            value -= rate * v
    assert len(asked) == steps
    for value, found in zip(values, net.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), value, rtol=1e-9, atol=1e-12)


def test_a_training_on_labels_that_diverges_says_so(double):
    x, y = draw(6, 1, 4, 4), torch.arange(6) % CLASSES
    recipe = LabelRecipe(batch=3, lr=1e200)
    refuse(lambda: fit_labels(Lines(2, CLASSES), lambda i: x[i], y, recipe, 20, 0), "6 labels", "--labels.lr 1e+200")


# ------------------------------------------------------------------------------------------- knowledge without its data


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_kd_loss_equals_its_loops(temperature):
    scores, target = 3 * draw(5, 4), 3 * draw(5, 4, seed=1)
    total = 0.0
    for row, wanted in zip(scores.tolist(), target.tolist(), strict=True):
        soft = softmax([value / temperature for value in wanted])
        guess = softmax([value / temperature for value in row])
        total -= sum(s * math.log(g) for s, g in zip(soft, guess, strict=True))
    assert float(kd_loss(scores, target, temperature)) == pytest.approx(total / 5, rel=1e-12)


def teacher_of(seed):
    """BatchNorm with statistics of its own, then a linear layer."""
    with seeded("teacher", seed):
        net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(PIXELS), nn.Linear(PIXELS, CLASSES))
    net[1].running_mean.copy_(draw(PIXELS, seed=5))
    net[1].running_var.copy_(draw(PIXELS, seed=6).square() + 0.5)
    return net.requires_grad_(False)


def taught_probabilities(teacher, x, mode, temperature):
    """softmax(teacher / T) by loops: of its running statistics, or in mode "train" of the batch's."""
    norm, linear, rows = teacher[1], teacher[2], x.flatten(1).tolist()
    mean, var = norm.running_mean.tolist(), norm.running_var.tolist()
    if mode == "train":
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        var = [sum((value - m) ** 2 for value in column) / len(rows)
               for column, m in zip(zip(*rows, strict=True), mean, strict=True)]  # fmt: skip
    found = []
    for row in rows:
        z = [(value - m) / math.sqrt(v + norm.eps) for value, m, v in zip(row, mean, var, strict=True)]
        logits = [sum(w * value for w, value in zip(weights, z, strict=True)) + b
                  for weights, b in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)]  # fmt: skip
        found.append(softmax([logit / temperature for logit in logits]))
    return torch.tensor(found)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("n", "batch", "noise", "steps"), [(8, 3, False, None), (4, 512, True, None), (8, 3, False, 7), (8, 3, True, 15)]
)
def test_distilling_knowledge_is_recomputed_update_by_update(double, mode, n, batch, noise, steps):
    """AdamW by hand, a cosine by epochs, the teacher's soft targets of what DSA left; `prepare` for the student alone.

    noise: every batch has images of its own; steps: of all epochs, the last of which may be cut short.
    """
    recipe = KdRecipe(epochs=4, batch=batch, weight_decay=0.2, temperature=2.0, teacher_mode=mode)
    x, net, teacher = draw(n, 1, 4, 4, seed=1), Lines(2, 7), teacher_of(0)
    kept = copy.deepcopy(teacher.state_dict())
    with seeded("kd head", 3, 1):
        head = nn.Linear(2, CLASSES)
    values = [net.first.weight, head.weight, head.bias]
    values = [value.detach().clone() for value in values]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    asked, generator, rate = [], rng("kd augmentation", 3, 1), 0.05

    def images(index, step):
        asked.append((index.tolist(), step))
        return draw(len(index), 1, 4, 4, seed=100 + step) if noise else x[index]

    net.eval()
    teacher.train()  # whatever it was: the recipe decides
    distil_knowledge(net, teacher, images, n, CLASSES, recipe, rate, lambda x: 2 * x + 1, CPU, 3, 1, steps=steps)
    assert net.training and all(net.modes)
    assert net.head.out_features == CLASSES
    assert mode == "train" or not teacher.training
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    epochs = 4 if steps is None else len({step // math.ceil(n / batch) for step in range(steps)})
    steps = list(batches(n, batch, epochs, "kd", 3, 1))[:steps]
    assert asked == [(index.tolist(), step) for step, (_, index) in enumerate(steps)]
    for step, (epoch, index) in enumerate(steps):
        seen = dsa(draw(len(index), 1, 4, 4, seed=100 + step) if noise else x[index], generator, DSA_OF_DC, "dc")
        wanted = taught_probabilities(teacher, seen, mode, 2.0)
        lr = rate * (0.5 + 0.5 * math.cos(math.pi * epoch / epochs))
        slopes = gradients(2 * seen + 1, wanted, *values, temperature=2.0)
        for value, gradient, m, v in zip(values, slopes, first, second, strict=True):
            m.copy_(0.9 * m + 0.1 * gradient)
            v.copy_(0.999 * v + 0.001 * gradient**2)
            value *= 1 - lr * 0.2
            value -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    for value, found in zip(values, (net.first.weight, net.head.weight, net.head.bias), strict=True):
        torch.testing.assert_close(found.detach(), value, rtol=1e-7, atol=1e-10)


def test_a_teacher_in_train_mode_teaches_the_next_student_alike(double):
    """Its running statistics drift inside one call alone, and it comes out in eval mode."""
    recipe = KdRecipe(epochs=2, batch=3, teacher_mode="train")
    teacher, students = teacher_of(0).eval(), []
    x = draw(6, 1, 4, 4)
    for _ in range(2):
        with seeded("student"):
            net = Lines(2, 7)
        distil_knowledge(net, teacher, lambda i, step: x[i], 6, CLASSES, recipe, 0.1, lambda x: x, CPU, 0)
        students.append(net.state_dict())
        assert not teacher.training
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_knowledge_that_diverges_says_so(double):
    x, recipe = draw(6, 1, 4, 4), KdRecipe(epochs=4, batch=3, weight_decay=1.0)
    call = lambda: distil_knowledge(Lines(2, 7), teacher_of(0), lambda i, step: x[i], 6, CLASSES, recipe, 1e300,  # noqa: E731
                                    lambda x: x, CPU, 0)  # fmt: skip
    refuse(call, "distilling knowledge", "--kd.lr 1e+300")


# ------------------------------------------------------------------------------------------------------ frozen features


class Norm(nn.Module):
    """A network whose features depend on its mode and that counts the images it saw."""

    def __init__(self, channels, size, dim, out):
        super().__init__()
        self.norm, self.first = nn.BatchNorm2d(channels), nn.Linear(channels * size**2, dim)
        self.head, self.dim, self.sizes = nn.Linear(dim, out), dim, []

    def features(self, x):
        self.sizes.append(len(x))
        return self.first(self.norm(x).flatten(1)).relu()

    def forward(self, x):
        return self.head(self.features(x))


@pytest.fixture
def net():
    with seeded("net"):
        net = Norm(1, 8, 12, 10)
        net.norm.running_mean.fill_(0.3)
        net.norm.running_var.fill_(2.0)
    return net


def inputs(x, data):
    return Inputs(x, data.mean, data.std, None, CPU, 0.0)


def by_hand(net, pixels, data):
    """Features in eval mode, in float64. (N, dim)"""
    x = (pixels.double() / 255 - data.mean.double()) / data.std.double()
    norm, first = net.norm, net.first
    x = (x - norm.running_mean.double()) / (norm.running_var.double() + norm.eps).sqrt()
    x = x * norm.weight.double() + norm.bias.double()
    return (x.flatten(1) @ first.weight.double().T + first.bias.double()).clamp(min=0).detach()


def test_embed_takes_the_network_as_it_stands(digits, net):
    x = inputs(digits.x_train, digits)
    net.eval()
    found = embed(net, x)
    torch.testing.assert_close(found.double(), by_hand(net, digits.x_train, digits), rtol=1e-4, atol=1e-5)
    assert net.sizes == [CHUNK, CHUNK, len(x) - 2 * CHUNK] and not found.requires_grad
    index = torch.tensor([5, 3, 700, 3])
    torch.testing.assert_close(embed(net, x, index), found[index], rtol=1e-5, atol=1e-6)
    net.train()
    assert not torch.allclose(embed(net, x, index), found[index], atol=1e-2) and net.training


@pytest.mark.parametrize("mode", [False, True])
def test_accuracy_is_of_the_networks_head_in_its_mode(digits, net, mode):
    """In train mode each CHUNK of test images is normalised by its own statistics."""
    x, y = digits.x_train[:700], digits.y_train[:700]
    net.train(mode)
    right = 0
    for start in range(0, 700, CHUNK):
        part = normalise(x[start : start + CHUNK], digits.mean, digits.std)
        z = copy.deepcopy(net.norm)(part).flatten(1).double()
        scores = (z @ net.first.weight.double().T + net.first.bias.double()).clamp(min=0)
        scores = scores @ net.head.weight.double().T + net.head.bias.double()
        for row, label in zip(scores.tolist(), y[start : start + CHUNK].tolist(), strict=True):
            right += row.index(max(row)) == label
    assert test_accuracy(net, inputs(x, digits), y) == pytest.approx(right / 700, abs=1e-6)
    assert net.training is mode


@pytest.fixture(scope="module")
def uneven(digits):
    """Features of 50, 30 and 9 images of three classes, mixed, and of 60 test images, beside their data."""
    counts = (50, 30, 9)
    y = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    y_test = torch.arange(60) % 3
    parts = dict(x_train=digits.x_train[: len(y)], x_test=digits.x_test[:60], class_names=["0", "1", "2"])
    data = dataclasses.replace(digits, **parts, y_train=y, y_test=y_test)
    centres = draw(3, 4, seed=9)
    return centres[y] + 0.8 * draw(89, 4, seed=1), centres[y_test] + 0.8 * draw(60, 4, seed=2), data


def ridge_accuracy(f, y, f_test, y_test, ridge):
    """Of the ridge classifier of centred features, in closed form."""
    f, f_test = f.numpy(), f_test.numpy()
    wanted = np.array([[float(label == c) for c in range(3)] for label in y.tolist()])
    centre, offset = f.mean(0), wanted.mean(0)
    z = f - centre
    lam = ridge * (z**2).sum() / len(z)
    head = np.linalg.solve(z.T @ z + lam * np.eye(z.shape[1]), z.T @ (wanted - offset))
    guess = ((f_test - centre) @ head + offset).argmax(1)
    return float((guess == y_test.numpy()).mean())


def test_probes_draw_their_labels_by_number_and_by_share(uneven):
    """5 % of 50, 30 and 9 are 2.5, 1.5 and 0.45: 3, 2 and, as each class has one at least, 1."""
    f_train, f_test, data = uneven
    protocol = Protocol(probe_steps=3, probe_batch=8, few_draws=4, few_ridge=0.3)
    seen = []
    features = lambda index: seen.append(index) or f_train[index].float()  # noqa: E731
    found = probes(features, f_test.float(), data, protocol, 7, 1, shares=SHARES)
    assert list(found) == ["probe", "few_5", "few_1", "part_5", "part_1"]
    wanted = dict(few_5=(5, (5, 5, 5)), few_1=(1, (1, 1, 1)), part_5=(0.05, (3, 2, 1)), part_1=(0.01, (1, 1, 1)))
    calls = iter(seen[3:])
    for name, (share, counts) in wanted.items():
        values = []
        for number in range(4):
            order = torch.randperm(89, generator=rng("few", 7, 1, share, number)).tolist()
            chosen = []
            for label, n in enumerate(counts):
                chosen += [i for i in order if data.y_train[i] == label][:n]
            assert next(calls).tolist() == chosen
            y = data.y_train[chosen]
            values.append(ridge_accuracy(f_train[chosen], y, f_test, data.y_test, 0.3))
        assert found[name] == pytest.approx(values, abs=1e-6), name
    assert not list(calls)


def test_the_probe_is_a_linear_layer_by_sgd(double, uneven):
    f_train, f_test, data = uneven
    protocol = Protocol(probe_steps=6, probe_batch=5, probe_lr=0.5, few_draws=1)
    with seeded("probe", 7, 1):
        layer = nn.Linear(4, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    speed, generator = [torch.zeros(3, 4), torch.zeros(3)], rng("probe batches", 7, 1)
    for step in range(6):
        index = torch.randint(89, (5,), generator=generator).tolist()
        slopes = [torch.zeros(3, 4), torch.zeros(3)]
        for i in index:
            guess = softmax((weight @ f_train[i] + bias).tolist())
            for c in range(3):
                error = (guess[c] - float(data.y_train[i] == c)) / 5
                slopes[0][c] += error * f_train[i]
                slopes[1][c] += error
        for value, v, slope in zip((weight, bias), speed, slopes, strict=True):
            v.copy_(0.9 * v + slope)
            value -= 0.5 * 0.5 * (1 + math.cos(math.pi * step / 6)) * v
    guesses = [row.index(max(row)) for row in (f_test @ weight.T + bias).tolist()]
    wanted = sum(g == y for g, y in zip(guesses, data.y_test.tolist(), strict=True)) / 60
    found = probes(lambda index: f_train[index], f_test, data, protocol, 7, 1)
    assert found["probe"] == pytest.approx(wanted) and list(found) == ["probe", "few_5", "few_1"]


def test_kept_features_change_no_probe(digits, net):
    """With room for them every training image passes once, else each as often as it is drawn; in eval mode."""
    x, y = digits.x_train[:600], digits.y_train[:600]
    data = dataclasses.replace(digits, x_train=x, y_train=y, x_test=digits.x_test[:90], y_test=digits.y_test[:90])
    protocol = Protocol(probe_steps=20, probe_batch=30, few_draws=2)
    train, test, key = inputs(x, data), inputs(data.x_test, data), (3, 1)
    exactly = 600 * 12 * 4 / 1e9
    seen, scores = {}, {}
    for room in (4.0, exactly, 0.99 * exactly, 0.0):
        net.train()
        net.sizes.clear()
        scores[room] = probe(net, data, train, test, protocol, room, *key)
        seen[room] = sum(net.sizes)
        assert not net.training
    assert seen[4.0] == seen[exactly] == 90 + 600
    draws = 2 * (50 + 10 + sum(max(1, int(0.05 * n + 0.5)) for n in y.bincount().tolist()) + 10)
    assert seen[0.0] == seen[0.99 * exactly] == 90 + 20 * 30 + draws
    f_train, f_test = (by_hand(net, part, data).float() for part in (x, data.x_test))
    wanted = probes(lambda index: f_train[index], f_test, data, protocol, *key, shares=SHARES)
    assert all(found == wanted for found in scores.values())
    asked = []
    remembered = lambda net, images: asked.append(images) or (f_test if images is test else f_train)  # noqa: E731
    assert probe(net, data, train, test, protocol, 4.0, *key, embed=remembered) == wanted
    assert asked == [test, train]
    own = probe(net, data, train, test, protocol, 4.0, *key, shares=(0.02,))
    assert list(own) == ["probe", "few_5", "few_1", "part_2"] and own["few_5"] == wanted["few_5"]


# ---------------------------------------------------------------------------------------------------------------- votes


def vote(f_train, y_train, f_test, y_test, k, temperature):
    """Accuracy by loops: the k nearest by cosine, each with the weight exp(cosine / temperature)."""
    right = 0
    for f, label in zip(f_test.tolist(), y_test.tolist(), strict=True):
        cosines = []
        for g, y in zip(f_train.tolist(), y_train.tolist(), strict=True):
            inner = sum(a * b for a, b in zip(f, g, strict=True))
            cosines.append((inner / math.hypot(*f) / math.hypot(*g), y))
        votes = dict.fromkeys(range(10), 0.0)
        for cosine, y in sorted(cosines, reverse=True)[:k]:
            votes[y] += math.exp(cosine / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(y_test)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 5.0), (7, 0.5), (500, 0.3)])
def test_neighbours_vote_as_in_loops(uneven, k, temperature):
    f_train, f_test, data = uneven
    wanted = vote(f_train, data.y_train, f_test, data.y_test, k, temperature)
    assert knn_of(f_train, f_test, data, k, temperature) == pytest.approx(wanted)


def test_k_and_temperature_matter_to_the_vote(uneven):
    f_train, f_test, data = uneven
    found = {(k, t): knn_of(f_train, f_test, data, k, t) for k in (1, 7, 60) for t in (0.05, 5.0)}
    assert len({found[k, 5.0] for k in (1, 7, 60)}) == 3 and found[60, 0.05] != found[60, 5.0]


def test_a_networks_features_vote_in_eval_mode(digits, net):
    data = dataclasses.replace(
        digits, x_train=digits.x_train[:150], y_train=digits.y_train[:150], x_test=digits.x_test[:60],
        y_test=digits.y_test[:60],
    )  # fmt: skip
    net.train()
    found = neighbours_vote(net, data, inputs(data.x_train, data), inputs(data.x_test, data), 5, 0.1)
    assert not net.training
    f_train, f_test = by_hand(net, data.x_train, data), by_hand(net, data.x_test, data)
    assert found == pytest.approx(vote(f_train, data.y_train, f_test, data.y_test, 5, 0.1))
    train, test = inputs(data.x_train, data), inputs(data.x_test, data)
    net.sizes.clear()
    remembered = lambda net, images: (f_test if images is test else f_train).float()  # noqa: E731
    assert neighbours_vote(net, data, train, test, 5, 0.1, embed=remembered) == found and not net.sizes
    exactly = 2 * 150 * 12 * 4 / 1e9  # the features, and those scaled to length 1
    assert neighbours_vote(net, data, train, test, 5, 0.1, exactly) == found
    refuse(lambda: neighbours_vote(net, data, train, test, 5, 0.1, 0.99 * exactly), "knn", "150 images", "--cache-gb")
    swapped = neighbours_vote(net, data, inputs(data.x_train, data), inputs(data.x_test, data), 150, 9.0)
    assert swapped == pytest.approx(vote(f_train, data.y_train, f_test, data.y_test, 150, 9.0)) and swapped != found
