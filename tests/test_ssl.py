"""common/moco.py (v3), swav.py, dino.py and recipes.py: losses and whole trainings against loops, training that stops
and goes on, digits, collapses, multi-crop, and the settings of every preset."""

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
from common.moco import batch_contrast, train_moco3
from common.models import ResNet
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
        scores = (k * query).sum(1) / temperature
        losses.append(scores.exp().sum().log() - scores[i])
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
                terms.append(-(wanted * (logits - logits.exp().sum().log())).sum())
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
    """Three times by default, as in the paper. The shares are 1/K in the limit; what is far off stays finite."""
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


@pytest.mark.parametrize("epsilon", [0.05, 0.02, 0.005, 0.001])
def test_sinkhorn_in_float32_is_that_of_float64(epsilon):
    """Down to the least epsilon that the flag takes: e^(-2 / 0.001) is no number of either, its logarithm is."""
    scores = (units(64, 8) @ units(16, 8, seed=1).T).float()
    scores[0] = -1.0  # an image far from all
    logs = scores.double() / epsilon
    for _ in range(3):
        logs = logs - logs.logsumexp(0) - math.log(16)
        logs = logs - logs.logsumexp(1, keepdim=True) - math.log(64)
    codes = sinkhorn(scores, epsilon)
    assert codes.dtype == torch.float32
    # a score's last bit, 6e-8 of 1, is divided by epsilon
    torch.testing.assert_close(codes.double(), logs.exp() * 64, rtol=0, atol=1e-6 / epsilon)


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


def params_of(state):
    return sorted(key for key in state if key.endswith(("weight", "bias")))


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
    assert params_of(before["head"]) == params_of(before["predictor"]) == ["0.weight", "1.bias", "1.weight", "3.weight"]
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
    assert params_of(before["head"]) == [f"{i}.{part}" for i in (0, 1, 3) for part in ("bias", "weight")]
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
    expected = [f"layers.{i}.{part}" for i in (0, 1, 3) for part in ("bias", "weight")]
    assert params_of(before["head"]) == [*expected, "prototypes.weight"]
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


# ------------------------------------------------------------------------------------------------ views of two sizes


class Caught(Exception):
    pass


def method_of(kind, data, place, **changes):
    """(the Method of a trainer, its modules), before the first step."""
    caught = []

    def optimise(checkpoint, modules, method, *_, **__):
        caught.extend([method, modules])
        raise Caught

    trainer, settings = TRAINERS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.pretrain, "optimise", optimise)
        with pytest.raises(Caught):
            trainer(data, place, CPU, **settings | changes)
    return caught


def shapes_into(module):
    shapes = []
    module.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.fixture(scope="module")
def photographs():
    """Twenty colour images of 32 px without labels."""
    x = torch.randint(0, 256, (20, 3, 32, 32), generator=gen(), dtype=torch.uint8)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.3)
    return Data("made", x, None, x[:4], None, [], mean, std, "none", "c" * 64, True)


@pytest.mark.parametrize("crops", [0, 1, 5])
def test_large_views_go_through_the_network_together_and_small_ones_together(photographs, tmp_path, crops):
    """DINO's teacher sees the large ones alone, and so do the assignments of SwAV; small views have 12 of 32 px."""
    large, small = (40, 3, 32, 32), [(20 * crops, 3, 12, 12)] * (crops > 0)
    changes, index = dict(batch=20, small_crops=crops), torch.arange(20)
    method, modules = method_of("dino", photographs, tmp_path, **changes)
    student, teacher = shapes_into(modules["student_net"]), shapes_into(modules["net"])
    method.loss_of(index, 0, 0)
    assert student == [large, *small] and teacher == [large]
    method, modules = method_of("swav", photographs, tmp_path, **changes)
    net, assigned, whole = shapes_into(modules["net"]), [], sinkhorn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.swav, "sinkhorn", lambda scores, *rest: assigned.append(len(scores)) or whole(scores, *rest)
        )
        method.loss_of(index, 0, 0)
    assert net == [large, *small] and assigned == [20, 20]


@pytest.mark.parametrize(
    ("kind", "crops", "views", "scores"),
    [("moco3", None, 2, None), ("swav", 0, 2, (20 * 2 + 2 * 20) * 12), ("dino", 0, 2, 20 * 4 * 12),
     ("swav", 4, 2 + 4 * 9 / 64, (20 * 6 + 2 * 20) * 12), ("dino", 8, 2 + 8 * 9 / 64, 20 * 12 * 12)],
)  # fmt: skip
def test_the_memory_asked_for(photographs, monkeypatch, tmp_path, kind, crops, views, scores):
    """Of the views that have a gradient, by their pixels, and of the scores of all views, the queues' (20 each, an
    epoch) and DINO's teacher's."""
    asked = []
    monkeypatch.setattr(PLACES[kind], "train", lambda *_, **options: asked.append(options))
    trainer, settings = TRAINERS[kind]
    trainer(photographs, tmp_path, CPU, **settings | (dict(small_crops=crops) if crops is not None else {}))
    flags = ("--teacher-batch", "--teacher-projector", "--teacher-lr")
    expected = dict(views=views, flags=flags, save_minutes=10.0) | (dict(scores=scores) if scores else {})
    assert asked == [expected]


@pytest.mark.parametrize(
    ("kind", "change", "images", "flag"),
    [("moco3", dict(projector_width=2000), 1, "projector"), ("moco3", dict(), 10**6, "batch"),
     ("swav", dict(prototypes=3000, dim=2, projector_width=1), 1, "prototypes"), ("dino", dict(), 10**6, "batch"),
     ("dino", dict(prototypes=3000, dim=2, projector_width=1), 1, "prototypes")],
    ids=str,
)  # fmt: skip
def test_too_little_memory_is_named_by_the_flag(few, monkeypatch, tmp_path, kind, change, images, flag):
    """The views, the weights or the scores, whichever takes most."""
    monkeypatch.setattr(common.run, "available_memory", lambda device: 1000)
    monkeypatch.setattr(common.pretrain, "bytes_per_image", lambda net, x: images)
    trainer, settings = TRAINERS[kind]
    refuse(lambda: trainer(few, tmp_path, CPU, **settings | change), f"set by --teacher-{flag}: lower it")
    assert not list(tmp_path.iterdir())


def test_prototypes_and_queues_wait(few, tmp_path):
    """SwAV's prototypes are fixed in two epochs of a thousand and the queue serves from the fiftieth on; DINO's are
    fixed in one. In float64's terms: no gradient, not a gradient of zero, which momentum and decay would go along."""
    many = dict(epochs=1000, queue=48)
    method, modules = method_of("swav", few, tmp_path, **many)
    weight = modules["prototypes"].weight
    for epoch, moves in ((0, False), (1, False), (2, True), (999, True)):
        weight.grad = None
        method.loss_of(torch.arange(32), epoch, 0)[0].backward()
        assert (weight.grad is not None) == moves
        torch.testing.assert_close(weight.detach().norm(dim=1), torch.ones(12))
    with pytest.MonkeyPatch.context() as patch:
        codes = record(patch, common.swav, "sinkhorn")
        for epoch in (0, 49, 50):
            method.loss_of(torch.arange(32), epoch, 0)
    assert [len(each) for each in codes] == [32, 32, 32, 32, 80, 80]
    method, modules = method_of("dino", few, tmp_path, epochs=1000)
    weight = modules["student_head"].prototypes.weight
    for epoch, moves in ((0, False), (1, True)):
        weight.grad = None
        method.loss_of(torch.arange(32), epoch, 0)[0].backward()
        assert (weight.grad is not None) == moves


def test_no_gradient_goes_into_what_follows_or_is_a_target(few, tmp_path):
    for kind, slow in (("moco3", ["key_net", "key_head"]), ("dino", ["net", "head"])):
        method, modules = method_of(kind, few, tmp_path)
        method.loss_of(torch.arange(32), 1, 0)[0].backward()
        for name, module in modules.items():
            params = list(module.parameters())
            assert all((p.grad is None) == (name in slow) for p in params), name
        optimised = {id(p) for group in method.optimizer.param_groups for p in group["params"]}
        expected = {id(p) for name, module in modules.items() if name not in slow for p in module.parameters()}
        assert optimised == expected


# ----------------------------------------------------------------------------------------------------- stopping, caches


@every
def test_a_stopped_training_goes_on_bit_for_bit(few, made, monkeypatch, tmp_path, handlers, kind):
    """Networks, heads, queues, prototypes, centre: all that there is at the end."""
    trainer, settings = TRAINERS[kind]
    seen = spy(monkeypatch)
    teacher = stops(monkeypatch, lambda: trainer(few, tmp_path, CPU, **settings), tmp_path, PLACES[kind], ONCE[kind])
    expected, states = made[kind]
    assert same(teacher.net, expected.net) and teacher.info | {"seconds": 0} == expected.info | {"seconds": 0}
    assert seen["modules"].keys() == states.keys()
    for name, module in seen["modules"].items():
        assert same(module, states[name]), name


HELD = {
    "moco3": {"net", "head", "predictor", "key_net", "key_head"},
    "swav": {"net", "head", "prototypes", "queue_0", "queue_1"},
    "dino": {"net", "head", "student_net", "student_head", "centre"},
}


@every
def test_a_checkpoint_holds_all_that_is_needed(few, monkeypatch, tmp_path, handlers, kind):
    trainer, settings = TRAINERS[kind]
    seen = spy(monkeypatch)
    with monkeypatch.context() as patch:
        signal_at(patch, PLACES[kind], ONCE[kind], signal.SIGTERM, 4)
        with pytest.raises(Stopped):
            trainer(few, tmp_path, CPU, **settings)
    (path,) = tmp_path.rglob("checkpoint.pt")
    whole = common.run.load_checkpoint(path)
    assert seen["before"].keys() == HELD[kind]
    for name, module in seen["modules"].items():
        assert same(whole[name], module.state_dict()) and not same(whole[name], seen["before"][name]), name
    catch_signals()
    for name in HELD[kind]:
        torch.save({key: value for key, value in whole.items() if key != name}, path)
        words = str(path), f"'{name}'", "delete it to train the teacher anew"
        refuse(lambda: trainer(few, tmp_path, CPU, **settings), *words)


@every
def test_a_teacher_is_trained_once(few, made, monkeypatch, kind):
    monkeypatch.setattr(common.pretrain, "optimise", forbid)
    trainer, settings = TRAINERS[kind]
    teacher, _ = made[kind]
    again = trainer(few, teacher.folder.parent, CPU, **settings, save_minutes=1.0)
    assert same(again.net, teacher.net) and again.info == teacher.info
    assert [file.name for file in teacher.folder.iterdir()] == ["teacher.safetensors"]
    assert teacher.folder.name.startswith(f"digits-{kind}-resnet10x4-3ep-s0-") and teacher.info["method"] == kind
    assert list(teacher.info["embedding_std"]) == list(teacher.info["knn"]) == ["1", "2", "3"]
    assert all(0 < value <= 1 for value in teacher.info["embedding_std"].values())


CHANGES = dict(arch="resnet18", width=2, stem_padding=1, epochs=4, batch=16, lr=0.2, weight_decay=0.0, crop_min=0.5,
               eta=0.1, projector_width=8, dim=4, temperature=0.3, blur=True, seed=1, precision="bf16")  # fmt: skip
OWN = {
    "moco3": dict(key_momentum=0.5),
    "swav": dict(prototypes=6, queue=16, epsilon=0.2, small_crops=1, blur=False),
    "dino": dict(prototypes=6, key_momentum=0.5, small_crops=1),
}


@every
def test_every_setting_makes_another_teacher(few, made, monkeypatch, tmp_path, kind):
    """And is in its info under its own name; so are the data."""
    monkeypatch.setattr(common.pretrain, "optimise", forbid)
    trainer, settings = TRAINERS[kind]
    teacher, _ = made[kind]
    names, changes = {teacher.folder.name.rsplit("-", 1)[1]}, CHANGES | OWN[kind]
    parameters = inspect.signature(trainer).parameters
    assert changes.keys() == parameters.keys() - {"data", "teachers", "device", "save_minutes"}
    for key, value in changes.items():
        assert teacher.info[key] == settings.get(key, parameters[key].default) != value, key
    calls = [(key, few, settings | {key: value}) for key, value in changes.items()]
    calls += [(key, dataclasses.replace(few, **{key: value}), settings)
              for key, value in dict(content="e" * 64, flip=True, mean=few.mean + 1).items()]  # fmt: skip
    for key, data, asked in calls:
        with pytest.raises(AssertionError, match="must not be called"):
            trainer(data, tmp_path / key, CPU, **asked)
        (folder,) = (tmp_path / key).iterdir()
        names.add(folder.name.rsplit("-", 1)[1])
    assert len(names) == 1 + len(calls)


# -------------------------------------------------------------------------------------------------------- odd requests


@every
@pytest.mark.parametrize(
    ("images", "changes", "batch"),
    [(70, dict(batch=512), 70), (2, dict(), 2), (3, dict(batch=2), 2), (33, dict(), 32)], ids=str,
)  # fmt: skip
def test_few_images_and_one_batch_an_epoch(few, tmp_path, kind, images, changes, batch):
    """A batch larger than the data, the rest of an epoch, two images; a queue is no longer than an epoch."""
    data = dataclasses.replace(few, x_train=few.x_train[:images], y_train=few.y_train[:images])
    trainer, settings = TRAINERS[kind]
    if kind == "swav":
        changes = changes | dict(queue=4096)
    with pytest.MonkeyPatch.context() as patch:
        seen = spy(patch)
        teacher = trainer(data, tmp_path, CPU, **settings | changes)
    assert teacher.info["batch"] == batch and len(seen["rates"]) == 3 * (images // batch)
    assert teacher.info.get("queue", images // batch * batch) == images // batch * batch
    assert all(value.isfinite().all() for value in teacher.net.state_dict().values())
    assert not same(teacher.net, seen["before"]["net"])


@every
def test_one_image_and_no_labels(few, tmp_path, kind):
    trainer, settings = TRAINERS[kind]
    one = dataclasses.replace(few, x_train=few.x_train[:1], y_train=few.y_train[:1])
    refuse(lambda: trainer(one, tmp_path, CPU, **settings), "cannot be trained on one image")
    bare = dataclasses.replace(few, y_train=None, y_test=None)
    info = trainer(bare, tmp_path, CPU, **settings | dict(epochs=1)).info
    assert info["knn"] == {} and list(info["embedding_std"]) == ["1"]


@every
@pytest.mark.parametrize("name", ["few", "coloured"])
def test_bf16(request, monkeypatch, tmp_path, kind, name):
    """The networks run in bf16, losses and what they are made of in float32; all ends finite and changed."""
    data, (trainer, settings) = request.getfixturevalue(name), TRAINERS[kind]
    loss = {"moco3": "batch_contrast"}.get(kind, ONCE[kind])
    asked, whole, seen = [], getattr(PLACES[kind], loss), spy(monkeypatch)
    monkeypatch.setattr(PLACES[kind], loss, lambda *args: asked.append(args) or whole(*args))
    teacher = trainer(data, tmp_path, CPU, **settings | dict(precision="bf16", blur=True))
    first = asked[0][0] if kind == "moco3" else asked[0][0][0]
    assert first.dtype == torch.float32 and first.requires_grad
    for module in seen["modules"].values():
        assert all(value.isfinite().all() for value in module.state_dict().values())
        assert all(p.dtype == torch.float32 for p in module.parameters())
    assert not same(teacher.net, seen["before"]["net"])
    method, modules = method_of(kind, data, tmp_path / "again", precision="bf16")
    kinds = []
    for name in ("student_net" if kind == "dino" else "net", "head"):
        first = next(module for module in modules[name].modules() if isinstance(module, nn.Conv2d | nn.Linear))
        first.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    method.loss_of(torch.arange(32), 0, 0)
    assert len(kinds) >= 2 and set(kinds) == {torch.bfloat16}


@every
def test_a_training_that_diverges_is_not_saved(few, monkeypatch, tmp_path, kind):
    trainer, settings = TRAINERS[kind]
    loss = {"moco3": "batch_contrast"}.get(kind, ONCE[kind])
    whole = getattr(PLACES[kind], loss)
    monkeypatch.setattr(PLACES[kind], loss, lambda *args: whole(*args) * torch.nan)
    words = "epoch 1, step 2: loss is nan", "embedding std nan", "lower --teacher-lr"
    line = refuse(lambda: trainer(few, tmp_path, CPU, **settings), *words)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in line and "learning rate 0.025)" in line and not list(folder.iterdir())


# --------------------------------------------------------------------------------------------------------------- digits


def train_recorded(method, data, place, width, **changes):
    """The teacher of the digits' recipe through train_teacher; by epoch its mean loss and the entropy of the mean
    target (SwAV, DINO; else None); the untrained network."""
    recipe, losses, whole = RECIPES["digits"][method] | changes, [], common.pretrain.optimise
    settings = dict.fromkeys(SETTINGS) | recipe
    settings["weight_decay"] = settings.pop("wd")

    def optimise(checkpoint, modules, method, *rest, **options):
        def loss_of(*step):
            loss, terms = loss_whole(*step)
            losses.append(loss.item())
            return loss, terms

        loss_whole, method.loss_of = method.loss_of, loss_of
        return whole(checkpoint, modules, method, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.pretrain, "optimise", optimise)
        seen, name = spy(patch), {"swav": "sinkhorn", "dino": "targets_of"}.get(method)
        targets = record(patch, PLACES[method], name) if name else []
        teacher = train_teacher(method, data, place, CPU, arch="resnet10", width=width, stem_padding=2, seed=0,
                                precision="fp32", save_minutes=0.0, **settings)  # fmt: skip
    start = dataclasses.replace(teacher, net=ResNet("resnet10", 1, width, "cifar", 2).eval())
    start.net.load_state_dict(seen["before"]["net"])
    losses, entropies = torch.tensor(losses).view(recipe["epochs"], -1).mean(1), None
    if targets:
        each = torch.stack([target[: recipe["batch"]].mean(0) for target in targets])
        each = each.view(recipe["epochs"], -1, each.shape[1]).mean(1)
        entropies = torch.special.entr(each).sum(1)
    return teacher, losses, entropies, start


def check_gain(teacher, start, data, least):
    """The nearest labelled image is right more often than by the network before training, by `least` and beyond what
    twenty paired draws of the labels scatter."""
    after, before = (one_label(lambda x, of=of: of.targets(x, CPU), data) for of in (teacher, start))
    gain = after - before
    assert gain.mean() > least and gain.mean() > 3 * gain.std() / math.sqrt(len(gain))


def check_loss(losses, entropies, least=0.5):
    """What a training that works does to its loss: it ends below the first epochs'.

    SwAV's and DINO's targets are made by what is trained, and the loss is no less than their own entropy: it falls when
    they get sharper and rises when they spread over more prototypes, as DINO's do for most of a training. Of them the
    loss is compared with that of the best answer that is the same for all images, the entropy of the mean target. Of
    both collapses (all targets uniform: log K; all targets one and the same: 0) no answer is better than that one.
    """
    if entropies is None:
        assert losses[-1] < 0.95 * losses[:2].mean()
    else:
        known = entropies - losses  # nats that the student knows of an image's target
        assert known[-2:].mean() > least and known[-2:].mean() > known[:2].mean() + 0.3


LEAST = dict(moco3=0.35, swav=0.35, dino=0.15, barlow=0.3, moco2=0.3, supervised=0.3)  # of one untrained at 0.21


@pytest.mark.slow
@pytest.mark.parametrize("method", CIFAR)
def test_every_method_learns_digits(digits, capsys, tmp_path, method):
    """Forty epochs (supervised twenty) of ResNet-10 of width 16."""
    teacher, losses, entropies, start = train_recorded(method, digits, tmp_path, 16)
    check_loss(losses, entropies)
    check_gain(teacher, start, digits, LEAST[method])
    assert "warning" not in capsys.readouterr().out and "collapsed" not in teacher.info
    assert method == "supervised" or min(teacher.info["embedding_std"].values()) > 0.1


FAST = dict(moco3=dict(epochs=6), swav=dict(epochs=6), dino=dict(epochs=8))
LEAST_SOON = dict(moco3=0.1, swav=0.15, dino=0.06)


@pytest.mark.parametrize("method", ["moco3", *(pytest.param(m, marks=pytest.mark.slow) for m in ("swav", "dino"))])
def test_methods_learn_digits_soon(digits, capsys, tmp_path, method):
    """The same of a few epochs and width 8."""
    teacher, losses, entropies, start = train_recorded(method, digits, tmp_path, 8, **FAST[method])
    check_loss(losses, entropies, 0.1)
    check_gain(teacher, start, digits, LEAST_SOON[method])
    out = capsys.readouterr().out
    assert "warning" not in out and "collapsed" not in teacher.info
    assert out.count("embedding std") == len(teacher.info["embedding_std"]) == len(teacher.info["knn"])


# ------------------------------------------------------------------------------------------------------------- collapse


def test_a_collapse_is_told_once(few, monkeypatch, tmp_path, capsys, handlers):
    """DINO whose targets are uniform because of their temperature, the loss log K at best: no image is told. The line
    comes in the second epoch, once, also if the training stops and goes on; the teacher says so."""
    trainer, settings = TRAINERS["dino"]
    settings = settings | dict(temperature=20.0)
    with monkeypatch.context() as patch:
        signal_at(patch, common.dino, "cross_view_loss", signal.SIGTERM, 3)
        with pytest.raises(Stopped):
            trainer(few, tmp_path, CPU, **settings)
    catch_signals()
    losses = record(monkeypatch, common.dino, "cross_view_loss")
    info = trainer(few, tmp_path, CPU, **settings).info
    assert len(losses) == 3 and all(loss > math.log(12) - 1e-3 for loss in losses)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "warning" in line]
    assert line.startswith("teacher: warning: epoch 2: ") and "(std 0.0" in line and "collapses" in line
    assert "change --teacher-lr or take another --teacher-method" in line
    assert info["collapsed"] == 2 and list(info["embedding_std"]) == ["1", "2", "3"]
    assert max(info["embedding_std"].values()) < 0.05


@pytest.mark.slow
def test_swav_that_collapses_is_told(digits, tmp_path, capsys):
    """With too few prototypes in too many dimensions every score becomes the same: the loss is log K, and all
    assignments and predictions differ by noise alone."""
    changes = dict(epochs=10, dim=128, prototypes=64, small_crops=6, epsilon=0.05)
    teacher, losses, entropies, _ = train_recorded("swav", digits, tmp_path, 8, **changes)
    assert losses[-1] == pytest.approx(math.log(64), abs=0.03) and (entropies - losses)[-1] < 0.03
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert f"epoch {teacher.info['collapsed']}:" in line and "collapses" in line


@every
def test_a_healthy_training_warns_of_nothing(made, few, tmp_path, capsys, kind):
    trainer, settings = TRAINERS[kind]
    info = trainer(few, tmp_path, CPU, **settings).info
    out = capsys.readouterr().out
    assert "warning" not in out and "collapsed" not in info
    lines = re.findall(r"epoch (\d)/3 loss (\S+) k-NN (\S+)% embedding std (\S+)$", out, re.MULTILINE)
    assert [line[0] for line in lines] == list(info["embedding_std"]) == ["1", "2", "3"]
    for epoch, loss, knn, std in lines:
        assert float(loss) == pytest.approx(info["loss"][epoch], abs=6e-4)
        assert float(std) == pytest.approx(info["embedding_std"][epoch], abs=6e-4)
        assert float(knn) / 100 == pytest.approx(info["knn"][epoch], abs=6e-4)


def test_a_collapse_at_any_epoch_is_told(few, monkeypatch, tmp_path, capsys):
    """Also in an epoch of which no line is printed: of twelve, the seventh, the second in a row; and once alone."""
    stds = iter([0.5, 0.09, 0.08, 0.079, 0.081, 0.079, 0.078, *[0.01] * 5])
    monkeypatch.setattr(common.moco, "embedding_std", lambda z: next(stds))
    info = train_moco3(few, tmp_path, CPU, **TRAINERS["moco3"][1] | dict(epochs=12)).info
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 1 and "epoch 7:" in lines[0] and "(std 0.078)" in lines[0] and info["collapsed"] == 7
    assert info["embedding_std"] == {"1": 0.5, "2": 0.09, "4": 0.079, "6": 0.079, "8": 0.01, "10": 0.01, "12": 0.01}


def test_what_is_watched(few, tmp_path):
    """MoCo v3's queries; of SwAV and DINO the less of the first targets' and of what the other view says of them: both
    are the same for all images where they collapse."""
    for kind, targets, loss in (("moco3", None, "batch_contrast"), ("swav", "sinkhorn", "swapped_loss"),
                                ("dino", "targets_of", "cross_view_loss")):  # fmt: skip
        method, _ = method_of(kind, few, tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            asked, whole = [], getattr(PLACES[kind], loss)
            patch.setattr(
                PLACES[kind], loss, lambda *args, asked=asked, whole=whole: asked.append(args) or whole(*args)
            )
            results = record(patch, PLACES[kind], targets) if targets else []
            _, terms_of = method.loss_of(torch.arange(32), 1, 0)
        if targets:
            said = (asked[0][0][0].detach() * 10).softmax(1)  # all students' temperature is a tenth
            expected = [embedding_std(results[0][:32]), embedding_std(said)]
        else:
            expected = [embedding_std(asked[0][0])]
        assert terms_of() == {"embedding std": pytest.approx(min(expected), rel=1e-4)}, kind
        for one in range(len(expected)):  # whichever is less
            values = iter([0.3, 0.2] if one else [0.2, 0.3])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PLACES[kind], "embedding_std", lambda z, values=values: next(values))
                assert terms_of() == {"embedding std": 0.2}


# -------------------------------------------------------------------------------------------------------------- recipes

Args = dataclasses.make_dataclass(
    "Args",
    [("teacher_method", str), ("teacher_width", int, 16), ("teacher", object, None), ("resume", object, None)]
    + [(f"teacher_{setting}", object, None) for setting in SETTINGS],
)
OF_ALL = dict(epochs=7, batch=5, lr=0.125, wd=0.25)
VALUES = OF_ALL | dict(eta=0.5, projector=11, dim=13, temperature=0.75, key_momentum=0.375, queue=17, epsilon=0.625,
                       prototypes=19, splits=3, mlp=True, crop_min=0.0625, small_crops=2, blur=True)  # fmt: skip
NAMES = dict(wd="weight_decay", projector="projector_width")
SIGNATURES = {method: inspect.signature(getattr(common.recipes, f"train_{method}")) for method in CIFAR}


def handed_on(monkeypatch, data, method, values):
    """The settings that train_teacher gives to the one function that it calls, which takes them."""
    calls = []
    for name in CIFAR:

        def called(*args, _name=name, **kw):
            calls.append((_name, dict(SIGNATURES[_name].bind(*args, **kw).arguments)))
            return _name

        monkeypatch.setattr(common.recipes, f"train_{name}", called)
    settings = dict.fromkeys(SETTINGS) | values
    settings["weight_decay"] = settings.pop("wd")
    result = train_teacher(method, data, "place", CPU, arch="resnet10", width=3, stem_padding=1, seed=23,
                           precision="bf16", save_minutes=0.5, **settings)  # fmt: skip
    ((name, asked),) = calls
    assert result == name == method
    fixed = dict(data=data, teachers="place", device=CPU, arch="resnet10", width=3, stem_padding=1, seed=23,
                 precision="bf16", save_minutes=0.5)  # fmt: skip
    assert all(asked.pop(key) is value or value == 0.5 for key, value in fixed.items())
    assert asked.pop("flag", "teacher") == "teacher"  # in the errors of the supervised one
    return asked


@pytest.mark.parametrize("method", CIFAR)
def test_every_setting_goes_to_its_argument(photographs, few, monkeypatch, method):
    assert VALUES.keys() == set(SETTINGS) == set().union(*CIFAR.values())
    expected = {NAMES.get(key, key): VALUES[key] for key in CIFAR[method]}
    if method == "supervised":
        for data, crop in ((few, "pad"), (photographs, "pad")):
            assert handed_on(monkeypatch, data, method, VALUES) == expected | dict(crop=crop)
        x = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
        large = dataclasses.replace(photographs, x_train=x, x_test=x)
        assert handed_on(monkeypatch, large, method, VALUES) == expected | dict(crop="resized")
    else:
        assert handed_on(monkeypatch, few, method, VALUES) == expected


def test_every_preset_has_what_every_method_is_handed(few, monkeypatch):
    """Of each preset the same settings, none of them missing; all within the limits, as flags."""
    for preset, recipes in RECIPES.items():
        assert recipes.keys() == CIFAR.keys()
        for method, recipe in recipes.items():
            assert recipe.keys() == CIFAR[method].keys(), (preset, method)
            asked = handed_on(monkeypatch, few, method, recipe)
            assert None not in asked.values()
            asked.pop("crop", None)
            assert asked == {NAMES.get(key, key): value for key, value in recipe.items()}
            flags = {f"teacher_{setting}": value for setting, value in recipe.items()}
            filled = fill_teacher(Args(method), preset, True)
            assert filled == Args(method, **flags)
            assert fill_teacher(filled, preset, True) == filled  # which checks the limits of what was filled
    assert set(" ".join(LIMITS.values()).split()) == {
        f"teacher_{setting}" for setting in {*SETTINGS, "width"} - {"mlp", "blur"}
    }


PUBLISHED = {
    "moco3": dict(epochs=1000, batch=256, lr=0.3, wd=1e-6, eta=0.02, temperature=0.2, key_momentum=0.99, projector=4096,
                  dim=256, crop_min=0.08, blur=False),
    "swav": dict(epochs=1000, batch=256, lr=0.6, wd=1e-6, eta=0.02, temperature=0.1, epsilon=0.05, prototypes=3000,
                 queue=3840, projector=2048, dim=128, crop_min=0.08, small_crops=0, blur=True),
    "dino": dict(epochs=1000, batch=256, lr=0.3, wd=1e-6, eta=0.02, temperature=0.04, key_momentum=0.9995,
                 prototypes=4096, projector=2048, dim=256, crop_min=0.08, small_crops=0, blur=False),
    "barlow": dict(epochs=1000, batch=256, lr=0.3, wd=1e-4, eta=0.02, projector=2048, crop_min=0.08),
    "moco2": dict(epochs=200, batch=512, lr=0.06, wd=5e-4, queue=4096, temperature=0.1, key_momentum=0.99, dim=128,
                  splits=8, mlp=False, crop_min=0.08, blur=False),
    "supervised": dict(epochs=200, batch=128, lr=0.1, wd=5e-4),
}  # fmt: skip


@pytest.mark.parametrize("method", CIFAR)
def test_the_defaults_are_solo_learns(few, method):
    """On CIFAR (DINO's temperature is the authors'), in the presets of 32 px and as the functions' own defaults."""
    assert RECIPES["cifar10"][method] == RECIPES["cifar100"][method] == RECIPES["16px"][method] == PUBLISHED[method]
    parameters = SIGNATURES[method].parameters
    for key, value in PUBLISHED[method].items():
        assert parameters[NAMES.get(key, key)].default == value, key
    padding = 1 if method in ("moco2", "supervised") else 2
    assert (parameters["stem_padding"].default, parameters["arch"].default) == (padding, "resnet18")


@pytest.mark.parametrize("method", CIFAR)
def test_flags_that_are_given_stay_and_foreign_ones_are_refused(method):
    given = {f"teacher_{setting}": VALUES[setting] for setting in CIFAR[method]}
    args = Args(method, **given)
    assert fill_teacher(args, "digits", True) == args
    for setting in SETTINGS:
        args = Args(method, **{f"teacher_{setting}": VALUES[setting]})
        if setting in CIFAR[method]:
            filled = fill_teacher(args, "cifar10", True)
            expected = {f"teacher_{key}": value for key, value in RECIPES["cifar10"][method].items()}
            assert filled == Args(method, **expected | {f"teacher_{setting}": VALUES[setting]})
        else:
            owners = [name for name, recipe in CIFAR.items() if setting in recipe]
            flag = f"--teacher-{setting.replace('_', '-')}"
            line = refuse(
                lambda args=args: fill_teacher(args, "cifar10", True), f"{flag}: --teacher-method {method} has"
            )
            assert f"({', '.join(owners)} have)" in line and line.endswith("drop the flag")
            for falsy in (0, False, 0.0):  # is a value too
                with pytest.raises(common.run.UserError):
                    fill_teacher(Args(method, **{f"teacher_{setting}": falsy}), "cifar10", True)
            assert common.recipes.without_foreign(args) == Args(method)
    assert common.recipes.without_foreign(Args(method, **given)) == Args(method, **given)


def test_labels_and_limits():
    refuse(lambda: fill_teacher(Args("supervised"), "cifar10", False), "--teacher-method supervised", "no labels")
    for method in CIFAR.keys() - {"supervised"}:
        assert fill_teacher(Args(method), "cifar10", False).teacher_epochs
    for method, flag, bad, good, words in (
        ("swav", "epochs", 0, 1, "at least 1"),
        ("swav", "batch", 1, 2, "at least 2"),
        ("swav", "queue", -1, 0, "at least 0"),
        ("dino", "small_crops", -1, 0, "at least 0"),
        ("dino", "prototypes", 0, 1, "at least 1"),
        ("moco3", "dim", 0, 1, "at least 1"),
        ("moco3", "projector", 0, 1, "at least 1"),
        ("moco2", "splits", 0, 1, "at least 1"),
        ("moco3", "key_momentum", 1.01, 1, "in 0 .. 1"),
        ("moco3", "key_momentum", -0.1, 0, "in 0 .. 1"),
        ("moco3", "crop_min", 0, 0.0001, "in 0.0001 .. 1"),
        ("moco3", "crop_min", 1.1, 1, "in 0.0001 .. 1"),
        ("moco3", "lr", -0.1, 0, "in 0 .. 1e+06"),
        ("moco3", "lr", math.inf, 1e6, "in 0 .. 1e+06"),
        ("barlow", "eta", -0.1, 0, "in 0 .. 1e+06"),
        ("barlow", "wd", math.nan, 0, "in 0 .. 1e+06"),
        ("dino", "temperature", 0.0, 0.001, "at least 0.001"),
        ("swav", "epsilon", 0.0, 0.001, "at least 0.001"),
    ):
        name = f"teacher_{flag}"
        line = f"--teacher-{flag.replace('_', '-')} {bad}: must be {words}"
        refuse(lambda m=method, n=name, b=bad: fill_teacher(Args(m, **{n: b}), "cifar10", True), line)
        assert getattr(fill_teacher(Args(method, **{name: good}), "cifar10", True), name) == good
    refuse(lambda: fill_teacher(Args("swav", teacher_width=0), "cifar10", True), "--teacher-width 0")
