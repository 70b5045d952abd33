"""common/moco.py (v3), swav.py, dino.py and recipes.py: losses and whole trainings against loops, training that stops and
goes on, digits, collapses, multi-crop, and the settings of every preset."""

import dataclasses
import inspect
import math
import re
import signal
from collections import deque

import pytest
import ssl_helpers
import torch
from conftest import refuse
from ssl_helpers import (
    CPU,
    F64,
    NaiveSplit,
    Sgd,
    check_net,
    close,
    forbid,
    gen,
    linear,
    naive_net,
    one_label,
    record,
    same,
    signal_at,
    spy,
    stops,
)
from torch import nn

import common.dino
import common.moco
import common.pretrain
import common.recipes
import common.run
import common.swav
from common.augment import ssl_view
from common.data import Data, load, normalise
from common.dino import cross_view_loss, targets_of, train_dino
from common.models import ResNet
from common.moco import batch_contrast, train_moco3
from common.pretrain import embedding_std, lars_, momentum_at, warm_up_epochs
from common.recipes import CIFAR, LIMITS, RECIPES, SETTINGS, fill_teacher, train_teacher
from common.run import Stopped, catch_signals, rng
from common.swav import sinkhorn, swapped_loss, train_swav

handlers = pytest.fixture(ssl_helpers.handlers)
one_thread = pytest.fixture(ssl_helpers.one_thread, autouse=True, scope="module")

NET = dict(arch="resnet10", width=4, epochs=3, batch=32, lr=0.4, eta=0.02, weight_decay=0.01, projector_width=16, dim=8,
           crop_min=0.4)  # fmt: skip
TRAINERS = {
    "moco3": (train_moco3, NET | dict(key_momentum=0.7)),
    "swav": (train_swav, NET | dict(prototypes=12, queue=48, small_crops=2, epsilon=0.1)),
    "dino": (train_dino, NET | dict(prototypes=12, key_momentum=0.7, small_crops=2, temperature=0.1)),
}
PLACES = {"moco3": common.moco, "swav": common.swav, "dino": common.dino}
ONCE = {"moco3": "momentum_at", "swav": "swapped_loss", "dino": "cross_view_loss"}  # called once a step
every = pytest.mark.parametrize("kind", TRAINERS)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def few(digits):
    """70 training and 40 test images: two steps of 32 an epoch, six images left over."""
    parts = dict(x_train=digits.x_train[:70], y_train=digits.y_train[:70])
    return dataclasses.replace(digits, **parts, x_test=digits.x_test[:40], y_test=digits.y_test[:40], content="f" * 64)


@pytest.fixture(scope="module")
def coloured(few):
    """The same in three channels, tinted, in an order of their own, and to be mirrored."""
    tint = torch.rand(70, 3, 1, 1, generator=gen()) * 0.8 + 0.2
    x = (few.x_train * tint + 40 * tint.flip(1)).clamp(max=255).to(torch.uint8)
    x_test, mean, std = few.x_test.expand(-1, 3, -1, -1), torch.tensor([0.3, 0.25, 0.2]), torch.tensor([0.2, 0.3, 0.4])
    return dataclasses.replace(few, x_train=x, x_test=x_test, mean=mean, std=std, flip=True, content="d" * 64)


@pytest.fixture(scope="module")
def made(few, tmp_path_factory):
    """{kind: (its teacher of TRAINERS, all its modules' weights at the end)}."""
    place, results = tmp_path_factory.mktemp("teachers"), {}
    for kind, (trainer, settings) in TRAINERS.items():
        with pytest.MonkeyPatch.context() as patch:
            seen = spy(patch)
            teacher = trainer(few, place, CPU, **settings)
        results[kind] = teacher, states_of(seen)
    return results


def states_of(seen):
    return {name: module.state_dict() for name, module in seen["modules"].items()}


def units(n, d, seed=0, dtype=F64):
    return nn.functional.normalize(torch.randn(n, d, generator=gen(seed), dtype=dtype), dim=1)


def unit(rows):
    return torch.stack([row / row.square().sum().sqrt() for row in rows])


# ------------------------------------------------------------------------------------------------------------- formulas


def naive_contrast(q, k, temperature):
    """2 T times the mean over queries of -log(exp(q k+ / T) / sum over keys of exp(q k / T))."""
    losses = []
    for i, query in enumerate(q):
        scores = [(query * key).sum() / temperature for key in k]
        losses.append(sum(score.exp() for score in scores).log() - scores[i])
    return 2 * temperature * sum(losses) / len(losses)


def naive_sinkhorn(scores, epsilon, iterations=3):
    """The paper's, in Python's numbers: a matrix (prototypes, images) whose sum is 1; rows to 1/K, columns to 1/B."""
    rows, batch, count = scores.double().tolist(), *scores.shape
    q = [[math.exp(rows[b][k] / epsilon) for b in range(batch)] for k in range(count)]
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        for k in range(count):
            share = sum(q[k])
            q[k] = [value / share / count for value in q[k]]
        for b in range(batch):
            share = sum(q[k][b] for k in range(count))
            for k in range(count):
                q[k][b] /= share * batch
    return torch.tensor([[q[k][b] * batch for k in range(count)] for b in range(batch)], dtype=F64)


def naive_cross(scores, targets, temperature):
    """Of every view other than the target's: -sum target log softmax(scores / T), image by image; the mean of all."""
    terms = []
    for i, target in enumerate(targets):
        for j, view in enumerate(scores):
            if i == j:
                continue
            for wanted, row in zip(target, view, strict=True):
                logits = row / temperature
                log_z = logits.exp().sum().log()
                terms.append(-sum(p * (logit - log_z) for p, logit in zip(wanted, logits, strict=True)))
    return sum(terms) / len(terms)


def naive_targets(scores, centre, temperature):
    rows = []
    for row in scores.tolist():
        exps = [math.exp((value - shift) / temperature) for value, shift in zip(row, centre.tolist(), strict=True)]
        rows.append([value / sum(exps) for value in exps])
    return torch.tensor(rows, dtype=F64)


def naive_momentum(step, steps, first):
    return 1.0 - (1.0 - first) * (math.cos(math.pi * step / steps) + 1) / 2


def naive_lars(eta, decay, rate):
    """The gradient that SGD goes along: of matrices and kernels with decay, shortened to eta |p| / |g| / rate."""

    def change(p, g):
        if p.ndim == 1:
            return g
        p_norm, g_norm, scale = p.square().sum().sqrt().item(), g.square().sum().sqrt().item(), 1.0
        if p_norm > 0 and g_norm > 0:
            scale = min(eta * p_norm / (g_norm + decay * p_norm + 1e-8) / rate, 1.0)
        return (g + decay * p) * scale

    return change


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_batch_contrast_is_the_loop(temperature):
    q, k = units(5, 4).requires_grad_(), units(5, 4, seed=1)
    torch.testing.assert_close(batch_contrast(q, k, temperature), naive_contrast(q, k, temperature), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda q: batch_contrast(q, k, temperature), q)
    perfect = batch_contrast(100 * k, k, temperature)  # each query its own key: the loss is about nothing
    assert perfect < 1e-3 < batch_contrast(100 * k.flip(0), k, temperature)


@pytest.mark.parametrize(("batch", "count"), [(6, 4), (3, 9), (1, 5), (7, 1)])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.2, 1), (0.1, 7)])
def test_sinkhorn_is_the_loop(batch, count, epsilon, iterations):
    scores = units(batch, 8) @ units(count, 8, seed=1).T
    expected, before = naive_sinkhorn(scores, epsilon, iterations), scores.clone()
    codes = sinkhorn(scores.requires_grad_(), epsilon, iterations)
    torch.testing.assert_close(codes, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(codes.sum(1), torch.ones(batch, dtype=F64))
    assert not codes.requires_grad and torch.equal(scores, before)


def test_sinkhorn_spreads_over_all_prototypes():
    """Three times by default, as in the paper. The shares are 1/K in the limit; far scores and unused prototypes stay finite."""
    scores = units(40, 8) @ units(5, 8, seed=1).T
    torch.testing.assert_close(sinkhorn(scores, 0.05), naive_sinkhorn(scores, 0.05, 3), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(sinkhorn(scores, 0.05, 500).mean(0), torch.full((5,), 0.2, dtype=F64), rtol=1e-6, atol=0)
    same_for_all = torch.zeros(6, 4)
    same_for_all[:, 2] = 1.0  # all nearest to one prototype: nobody knows who is to leave it
    torch.testing.assert_close(sinkhorn(same_for_all, 0.05), torch.full((6, 4), 0.25))
    far = torch.full((6, 4), -1.0)
    far[:, 1] = 1.0
    far[0, 3] = -50.0
    for codes in (sinkhorn(far, 0.05), sinkhorn(far - 1e4, 0.05)):
        assert codes.isfinite().all()
        torch.testing.assert_close(codes.sum(1), torch.ones(6))
    float32 = sinkhorn(scores.float(), 0.05)
    torch.testing.assert_close(float32.double(), sinkhorn(scores.float().double(), 0.05), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", [swapped_loss, cross_view_loss])
@pytest.mark.parametrize("views", [2, 5])
def test_losses_between_views_are_the_loop(loss, views):
    """Two targets against all other views, mean over pairs and images."""
    scores = [(units(3, 4, seed=i) @ units(6, 4, seed=9).T).requires_grad_() for i in range(views)]
    targets = [torch.rand(3, 6, generator=gen(i), dtype=F64).softmax(1) for i in (20, 21)]
    torch.testing.assert_close(loss(scores, targets, 0.3), naive_cross(scores, targets, 0.3), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda *scores: loss(list(scores), targets, 0.3), scores)


def test_the_students_temperature_is_a_tenth():
    scores, targets = [units(3, 4), units(3, 4, seed=1)], [units(3, 4, seed=2).abs()] * 2
    assert cross_view_loss(scores, targets) == cross_view_loss(scores, targets, 0.1)


@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_targets_are_the_loop(temperature):
    scores = (units(5, 4) @ units(7, 4, seed=1).T).requires_grad_()
    centre = torch.randn(1, 7, generator=gen(2), dtype=F64) / 5
    targets = targets_of(scores, centre, temperature)
    torch.testing.assert_close(targets, naive_targets(scores, centre[0], temperature), rtol=1e-10, atol=1e-14)
    assert not targets.requires_grad


def test_the_slow_encoders_momentum_rises_to_one():
    for first in (0.9, 0.996):
        values = [momentum_at(step, 7, first) for step in range(8)]
        assert values == pytest.approx([naive_momentum(step, 7, first) for step in range(8)], rel=1e-12)
        assert values == sorted(values) and values[0] == pytest.approx(first) and values[7] == 1
    assert momentum_at(5, 10, 0.9) == pytest.approx(0.95)


def test_embedding_std_is_the_loop():
    """Of unit vectors: the root of the sum over their entries of the population variance, in [0, 1]."""
    z = 3 * torch.randn(9, 5, generator=gen(), dtype=F64) + 1
    rows, total = [(row / row.norm()).tolist() for row in z], 0.0
    for column in zip(*rows, strict=True):
        mean = sum(column) / 9
        total += sum((value - mean) ** 2 for value in column) / 9
    assert embedding_std(z.requires_grad_()) == pytest.approx(math.sqrt(total), rel=1e-5)
    assert embedding_std(z.detach() * torch.arange(1, 10)[:, None]) == pytest.approx(math.sqrt(total), rel=1e-5)
    assert embedding_std(torch.ones(4, 3).bfloat16()) == pytest.approx(0, abs=1e-3)
    assert embedding_std(torch.eye(8)) == pytest.approx(math.sqrt(7 / 8)) and embedding_std(z[:1]) < 1e-3
    assert embedding_std(torch.cat([torch.eye(8), -torch.eye(8)])) == 1


def test_lars_leaves_alone_what_has_no_gradient():
    params = [torch.randn(3, 2, dtype=F64, generator=gen(i)) for i in range(3)]
    for i in (0, 2):
        params[i].grad = torch.randn(3, 2, dtype=F64, generator=gen(10 + i))
    before = params[1].clone()
    expected = [naive_lars(0.1, 0.01, 0.3)(params[i], params[i].grad) for i in (0, 2)]
    lars_(params, 0.3, 0.1, 0.01)
    assert params[1].grad is None and torch.equal(params[1], before)
    for i, wanted in zip((0, 2), expected, strict=True):
        torch.testing.assert_close(params[i].grad, wanted, rtol=1e-12, atol=0)


def test_warm_up_is_ten_epochs_or_a_tenth():
    assert [warm_up_epochs(epochs) for epochs in (1, 9, 10, 40, 89, 90, 1000)] == [1, 1, 2, 5, 9, 10, 10]


# ------------------------------------------------------------------------------------------------ whole steps, naively


DIGITS = 1e-8  # of the largest number: float64's sixteen, less what six steps make of the last ones


def near(a, b):
    return close(a, b, DIGITS)


class Gelu(nn.Module):
    def forward(self, x):
        return x * (1 + (x / math.sqrt(2)).erf()) / 2


class Relu(nn.Module):
    def forward(self, x):
        return x.clamp(min=0)


def naive_layers(state, kinds, prefix=""):
    """Layers by these kinds with the weights of a state dict, whose keys say the layer's number after the prefix."""
    layers = []
    for i, kind in enumerate(kinds):
        part = {key.removeprefix(f"{prefix}{i}."): v for key, v in state.items() if key.startswith(f"{prefix}{i}.")}
        if kind == "linear":
            layers.append(linear(part))
        elif kind == "norm":
            norm = nn.BatchNorm1d(len(part["running_mean"]), affine="weight" in part).double()
            norm.load_state_dict(part)
            layers.append(NaiveSplit(norm, 1))
        else:
            layers.append({"relu": Relu, "gelu": Gelu}[kind]())
    return nn.Sequential(*layers)


class Steps:
    """Six steps: for each, its epoch, its views, checked against `wanted` of its images, and its learning rate."""

    def __init__(self, data, views, wanted, per_step):
        self.data, self.views, self.wanted, self.per_step = data, views, wanted, per_step
        self.rates = []

    def __iter__(self):
        assert len(self.views) == 6 * self.per_step
        for step in range(6):
            epoch, i = divmod(step, 2)
            index = torch.randperm(70, generator=rng("teacher order", 0, epoch))[32 * i : 32 * (i + 1)]
            views = self.views[self.per_step * step : self.per_step * (step + 1)]
            generator = rng("teacher views", 0, epoch, i)  # one for all, which therefore differ
            for view, (scale, how) in zip(views, self.wanted, strict=True):
                x = self.data.x_train[index] / 255
                assert torch.equal(view, ssl_view(x, generator, scale, self.data.flip, **how))
            # peak: 0.4 for 256 images; from a ten thousandth of it over two steps, then half a cosine over four
            peak = 0.4 * 32 / 256
            rate = (peak / 1e4, peak / 2)[step] if step < 2 else peak / 2 * (1 + math.cos(math.pi * (step - 2) / 4))
            self.rates.append(rate)
            yield step, epoch, [normalise(view, self.data.mean, self.data.std).double() for view in views], rate


@pytest.fixture
def in_double(monkeypatch):
    """The library's own code in float64, its casts to float32 included: what a kink of ReLU would make of rounding
    errors stays out, and the loops have to agree to eight digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def train_watched(monkeypatch, kind, data, place, **changes):
    """The teacher of a kind of TRAINERS, what `spy` saw, the weights at the end and the views that were drawn."""
    seen, views = spy(monkeypatch), record(monkeypatch, PLACES[kind], "ssl_view")
    trainer, settings = TRAINERS[kind]
    teacher = trainer(data, place, CPU, **settings | changes)
    assert same(teacher.net, seen["modules"]["net"])
    return teacher, seen, states_of(seen), views


@pytest.mark.parametrize(("name", "blur"), [("few", False), ("coloured", True)])
def test_moco3_is_the_naive_loop(request, in_double, monkeypatch, tmp_path, name, blur):
    """In float64 from the same start and views: both encoders, all their statistics, the predictor."""
    data = request.getfixturevalue(name)
    _, seen, after, views = train_watched(monkeypatch, "moco3", data, tmp_path, blur=blur)
    before = seen["before"]
    assert same(before["key_net"], before["net"]) and same(before["key_head"], before["head"])
    layers = ["linear", "norm", "relu", "linear", "norm"]
    fast, slow = (naive_net(before[part], channels=len(data.mean), padding=2) for part in ("net", "key_net"))
    head, key_head = (naive_layers(before[part], layers) for part in ("head", "key_head"))
    predictor = naive_layers(before["predictor"], layers[:4])
    followed = list(zip([*slow.parameters(), *key_head.parameters()], [*fast.parameters(), *head.parameters()],
                        strict=True))  # fmt: skip
    sgd = Sgd([*fast.parameters(), *head.parameters(), *predictor.parameters()], 0.9)
    how = [dict(blur=1.0 if blur else 0.0), dict(blur=0.1 if blur else 0.0, solarise=0.2)]
    steps = Steps(data, views, [((0.4, 1.0), each) for each in how], 2)
    for step, _, (x_1, x_2), rate in steps:
        q_1, q_2 = (unit(predictor(head(fast(x)))) for x in (x_1, x_2))
        momentum = naive_momentum(step, 6, 0.7)
        with torch.no_grad():
            for p, q in followed:
                p.copy_(momentum * p + (1 - momentum) * q)
            k_1, k_2 = (unit(key_head(slow(x))) for x in (x_1, x_2))
        loss = naive_contrast(q_1, k_2, 0.2) + naive_contrast(q_2, k_1, 0.2)
        sgd.step(loss, rate, naive_lars(0.02, 0.01, rate))
    assert seen["rates"] == pytest.approx(steps.rates)
    for part, naive in (("net", fast), ("head", head), ("predictor", predictor), ("key_net", slow),
                        ("key_head", key_head)):  # fmt: skip
        check_net(after[part], naive, DIGITS)
        assert not same(after[part], before[part])


@pytest.mark.parametrize(
    ("name", "changes"),
    [("few", dict()), ("coloured", dict(blur=False, queue=0)), ("few", dict(small_crops=0, queue=100))],
    ids=str,
)
def test_swav_is_the_naive_loop(request, in_double, monkeypatch, tmp_path, name, changes):
    """In float64 from the same start and views: network, head, prototypes (still in the first epoch) and queues."""
    data = request.getfixturevalue(name)
    settings = TRAINERS["swav"][1] | dict(blur=True) | changes
    teacher, seen, after, views = train_watched(monkeypatch, "swav", data, tmp_path, **settings)
    before, small, size = seen["before"], settings["small_crops"], min(64, settings["queue"])
    assert teacher.info["queue"] == size
    net = naive_net(before["net"], channels=len(data.mean), padding=2)
    head = naive_layers(before["head"], ["linear", "norm", "relu", "linear"])
    clusters = before["prototypes"]["weight"].double().requires_grad_()
    queues = [deque(before[f"queue_{i}"]["keys"].double(), maxlen=size) for i in range(2) if size]
    assert ("queue_0" in before) == ("queue_1" in before) == bool(size)
    sgd = Sgd([*net.parameters(), *head.parameters(), clusters], 0.9)
    how = dict(jitter=(0.8, 0.8, 0.8, 0.2), blur=0.5 * settings["blur"])
    areas = [((0.4, 1.0), how)] * 2 + [((0.05 / 0.14 * 0.4, 0.4), how | dict(side=4))] * small
    steps = Steps(data, views, areas, 2 + small)
    for _, epoch, x, rate in steps:
        z = list(unit(head(net(torch.cat(x[:2])))).split(32))
        if small:
            z += unit(head(net(torch.cat(x[2:])))).split(32)
        with torch.no_grad():
            clusters.copy_(unit(clusters))
        fixed = clusters.detach() if epoch == 0 else clusters
        scores, codes = [part @ fixed.T for part in z], []
        for i in range(2):
            rows = [*z[i].detach()] + ([*queues[i]] if size and epoch >= 1 else [])
            codes.append(naive_sinkhorn(torch.stack(rows) @ clusters.detach().T, 0.1)[:32])
            if size:
                queues[i].extend(z[i].detach())
        sgd.step(naive_cross(scores, codes, 0.1), rate, naive_lars(0.02, 0.01, rate))
    assert seen["rates"] == pytest.approx(steps.rates)
    check_net(after["net"], net, DIGITS)
    check_net(after["head"], head, DIGITS)
    assert near(after["prototypes"]["weight"], clusters.detach())
    assert not near(after["prototypes"]["weight"], unit(before["prototypes"]["weight"].double()))
    for i, queue in enumerate(queues):
        assert close(torch.roll(after[f"queue_{i}"]["keys"], -(6 * 32) % size, 0), torch.stack(list(queue)))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("few", dict(blur=True)), ("coloured", dict()), ("few", dict(small_crops=0))],
    ids=str,
)
def test_dino_is_the_naive_loop(request, in_double, monkeypatch, tmp_path, name, changes):
    """In float64 from the same start and views: student and teacher, their heads, all statistics, the centre."""
    data = request.getfixturevalue(name)
    settings = TRAINERS["dino"][1] | dict(blur=False) | changes
    _, seen, after, views = train_watched(monkeypatch, "dino", data, tmp_path, **settings)
    before, small = seen["before"], settings["small_crops"]
    assert same(before["student_net"], before["net"]) and same(before["student_head"], before["head"])
    nets, heads, clusters = {}, {}, {}
    for who in ("", "student_"):
        nets[who] = naive_net(before[f"{who}net"], channels=len(data.mean), padding=2)
        heads[who] = naive_layers(before[f"{who}head"], ["linear", "norm", "gelu", "linear"], "layers.")
        clusters[who] = before[f"{who}head"]["prototypes.weight"].double().requires_grad_()
    slow, fast = ([*nets[who].parameters(), *heads[who].parameters(), clusters[who]] for who in ("", "student_"))
    centre, sgd = torch.zeros(12, dtype=F64), Sgd(fast, 0.9)
    blur = settings["blur"]
    wanted = [((0.4, 1.0), dict(blur=float(blur))), ((0.4, 1.0), dict(blur=0.1 * blur, solarise=0.2))]
    wanted += [((0.05 / 0.14 * 0.4, 0.4), dict(blur=0.5 * blur, side=4))] * small

    def scores(who, x, weight):
        return unit(heads[who](nets[who](torch.cat(x)))) @ unit(weight).T

    steps = Steps(data, views, wanted, 2 + small)
    for step, epoch, x, rate in steps:
        momentum = naive_momentum(step, 6, 0.7)
        with torch.no_grad():
            for p, q in zip(slow, fast, strict=True):
                p.copy_(momentum * p + (1 - momentum) * q)
            told = scores("", x[:2], clusters[""])
            targets = [naive_targets(part, centre, 0.1) for part in told.split(32)]
            centre = 0.9 * centre + 0.1 * sum(told) / 64
        weight = clusters["student_"].detach() if epoch == 0 else clusters["student_"]
        said = [*scores("student_", x[:2], weight).split(32)]
        if small:
            said += scores("student_", x[2:], weight).split(32)
        sgd.step(naive_cross(said, targets, 0.1), rate, naive_lars(0.02, 0.01, rate))
    assert seen["rates"] == pytest.approx(steps.rates)
    for who in ("", "student_"):
        check_net(after[f"{who}net"], nets[who], DIGITS)
        layers = {key.removeprefix("layers."): v for key, v in after[f"{who}head"].items() if key.startswith("layers.")}
        check_net(layers, heads[who], DIGITS)
        assert near(after[f"{who}head"]["prototypes.weight"], clusters[who].detach())
        assert not same(after[f"{who}net"], before["net"])
    assert near(after["centre"]["mean"], centre[None]) and not same(after["student_net"], after["net"])
