"""common/pairs.py: every score against a naive restatement; the rows of a table differ in their pairs only."""

import dataclasses
import itertools
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import common.pairs
from common.artefact import Distilled
from common.data import load, normalise
from common.models import ConvNet, ResNet
from common.pairs import (
    Protocol,
    accuracy,
    evaluate_pairs,
    few_label_draws,
    few_label_probe,
    finetune,
    linear_probe,
    matching_error,
    paired,
    summarise,
    table,
)
from common.run import rng, seeded
from common.teacher import Teacher

F64 = torch.float64
DRAWS = Protocol().few_draws
CPU = torch.device("cpu")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def few(digits):
    """300 training and 100 test images."""
    parts = dict(x_train=digits.x_train[:300], y_train=digits.y_train[:300])
    return dataclasses.replace(digits, **parts, x_test=digits.x_test[:100], y_test=digits.y_test[:100])


# --------------------------------------------------------------------------------------------------------------- scores


def test_matching_error_is_relative_to_the_mean():
    target, prediction = draw(40, 6), draw(40, 6, seed=1)
    mean = [sum(row[j] for row in target.tolist()) / 40 for j in range(6)]
    above = sum((p - t) ** 2 for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))
    below = sum((row[j] - mean[j]) ** 2 for row in target.tolist() for j in range(6))
    assert matching_error(prediction, target) == pytest.approx(above / below, rel=1e-12)
    assert matching_error(target.mean(0).expand(40, 6), target) == pytest.approx(1, rel=1e-6)
    assert matching_error(target, target) == 0
    far = target.double() + 1e4  # an offset does not change it, nor lose digits
    assert matching_error(prediction.double() + 1e4, far) == pytest.approx(above / below, rel=1e-9)


def test_accuracy_is_the_share_of_right_classes():
    assert accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 6.0]]), torch.tensor([1, 0, 0, 1])) == 0.75


def test_few_label_draws_are_balanced_distinct_and_repeatable():
    y = torch.tensor([0] * 9 + [1] * 30 + [2] * 12)[torch.randperm(51, generator=torch.Generator().manual_seed(0))]
    draws = few_label_draws(y, 5, DRAWS, 7, 1)
    assert len(draws) == DRAWS
    for one in draws:
        assert len(set(one.tolist())) == 15 and y[one].bincount().tolist() == [5, 5, 5]
    assert len({tuple(sorted(one.tolist())) for one in draws}) == DRAWS
    assert len(set(draws.flatten().tolist())) > 45  # nearly every image has its turn
    assert torch.equal(draws, few_label_draws(y, 5, DRAWS, 7, 1))
    assert not torch.equal(draws, few_label_draws(y, 5, DRAWS, 7, 2))
    rare = few_label_draws(torch.cat([y, torch.tensor([3, 3])]), 5, DRAWS, 7, 1)  # a class of two
    assert rare.shape == (DRAWS, 17) and set(rare[:, 15:].flatten().tolist()) == {51, 52}
    assert all(y[one[:15]].bincount().tolist() == [5, 5, 5] for one in rare)


@pytest.mark.parametrize(("n", "dim"), [(12, 40), (60, 8)])  # the dual and the primal system
def test_few_label_probe_is_ridge_regression_to_the_classes(monkeypatch, n, dim):
    """scikit-learn's Ridge with an intercept, draw by draw, its alpha from the trace of the centred Gram matrix."""
    classes, ridge = 3, 0.05
    f_l, f_test = draw(4, n, dim, dtype=F64) + 2, draw(30, dim, seed=1, dtype=F64) + 2
    y_l, y_test = torch.arange(n).remainder(classes).expand(4, n), torch.arange(30) % classes
    f_l[..., 0] += y_l
    f_test[:, 0] += y_test
    seen = []
    monkeypatch.setattr(common.pairs, "accuracy", lambda scores, y: seen.append(scores) or accuracy(scores, y))
    found = few_label_probe(f_l, y_l, f_test, y_test, classes, ridge)
    for f, y, scores, value in zip(f_l.numpy(), y_l.numpy(), seen, found, strict=True):
        centred = f - f.mean(0)
        model = Ridge(alpha=ridge * np.trace(centred @ centred.T) / n).fit(f, np.eye(classes)[y])
        expected = model.predict(f_test.numpy())
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-8, atol=1e-9)
        assert value == pytest.approx((expected.argmax(1) == y_test.numpy()).mean())


def clusters(n, seed):
    """Features of four classes that a line separates."""
    y = torch.arange(n) % 4
    return 4 * draw(4, 6, seed=9)[y] + 0.3 * draw(n, 6, seed=seed), y


def probe(*key, steps=60, lr=0.2, features=None):
    (f, y), (f_test, y_test) = clusters(200, 1), clusters(80, 2)
    data = SimpleNamespace(y_train=y, y_test=y_test, num_classes=4)
    return linear_probe(features or f.__getitem__, data, f_test, Protocol(probe_steps=steps, probe_lr=lr), *key)


def test_linear_probe_learns_what_a_line_separates():
    assert probe("a") > 0.98
    assert probe("a", steps=0) < 0.7  # not by its first weights


def test_linear_probe_is_sgd_with_a_cosine(monkeypatch):
    """By hand in float64: batches of 512, momentum 0.9, no decay, gradients of the cross-entropy."""
    (f, y), steps, lr, seen = clusters(200, 1), 5, 0.2, []
    monkeypatch.setattr(common.pairs, "accuracy", lambda scores, y: seen.append(scores) or 0.0)
    probe("b", steps=steps, lr=lr)
    with seeded("probe", "b"):
        head = torch.nn.Linear(6, 4)
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    velocity, generator = (0.0, 0.0), rng("probe batches", "b")
    for step in range(steps):
        index = torch.randint(200, (512,), generator=generator)
        x = f[index].double()
        error = (x @ weight.T + bias).softmax(1)
        error[torch.arange(512), y[index]] -= 1
        velocity = 0.9 * velocity[0] + error.T @ x / 512, 0.9 * velocity[1] + error.mean(0)
        rate = lr * (1 + np.cos(np.pi * step / steps)) / 2
        weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    expected = clusters(80, 2)[0].double() @ weight.T + bias
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_linear_probe_repeats_by_key():
    asked = []

    def features(index):
        asked.append(index)
        return clusters(200, 1)[0][index]

    values = [probe(key, steps=3, features=features) for key in ("a", "a", "b")]
    assert values[0] == values[1]
    assert torch.equal(torch.cat(asked[:3]), torch.cat(asked[3:6]))
    assert not torch.equal(torch.cat(asked[:3]), torch.cat(asked[6:]))


def test_finetune_learns_digits_and_never_mirrors_them(digits, monkeypatch):
    flips, batches, whole, counter = [], [], common.pairs.crop_flip, itertools.count(1)

    def record(x, generator, flip):
        flips.append(flip)
        batches.append(x)
        return whole(x, generator, flip)

    monkeypatch.setattr(common.pairs, "crop_flip", record)

    def tuned(*key, steps):
        torch.manual_seed(0)
        net = ConvNet(1, 8, 5, (16, 32))
        torch.rand(next(counter))  # the global generator has no say in the rest
        value = finetune(net, digits, CPU, Protocol(finetune_steps=steps, finetune_lr=0.05), *key)
        return value, net

    value, net = tuned(1, steps=40)
    assert value > 0.8 and net.head.out_features == 10 and not net.training
    assert flips == [False] * 40
    first, again, other = (tuned(key, steps=3)[1].state_dict() for key in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(batches[-6], batches[-3])  # first of keys 1 and 2
    heads = [tuned(key, steps=0)[1].head.weight for key in (1, 2)]  # as they start
    assert not torch.equal(*heads)
    assert not torch.equal(first["blocks.0.weight"], net.state_dict()["blocks.0.weight"])
    flips.clear()
    net = ConvNet(1, 8, 5, (4, 8))
    finetune(net, dataclasses.replace(digits, flip=True), CPU, Protocol(finetune_steps=2), 1)
    assert flips == [True, True]


# ---------------------------------------------------------------------------------------------------------- whole rows

TINY = Protocol(runs=2, epochs=4, batch=16, lr=0.05, probe_steps=8, finetune_steps=2)
N_S = 20


@pytest.fixture(scope="module")
def teacher():
    """A random network, with constants that are not the data's."""
    with seeded("teacher"):
        net = ResNet("resnet10", 1, width=2).eval().requires_grad_(False)
    return Teacher(net, net.dim, torch.tensor([0.1]), torch.tensor([0.7]), "random", {}, None)


@pytest.fixture(scope="module")
def targets(few, teacher):
    return teacher.targets(few.x_train, CPU), teacher.targets(few.x_test, CPU)


def real_pairs(few, targets, run):
    index = torch.randperm(len(few.x_train), generator=rng("random real", 3, run))[:N_S]
    return normalise(few.x_train[index], few.mean, few.std), targets[0][index]


def as_distilled(x, y):
    """A set whose inputs() are x exactly."""
    plain = dict(method="krr_st", data="digits", y_is="teacher features", class_names=[], resize="none")
    return Distilled(x, y, torch.zeros(1), torch.ones(1), **plain, step=0, seed=0, recipe={})


class Spy:
    """Records what every network starts from and is trained on."""

    def __init__(self, monkeypatch):
        self.starts, self.fits, self.draws = [], [], []
        self.fit, self.draw = common.pairs.fit_pairs, common.pairs.few_label_draws
        monkeypatch.setattr(common.pairs, "fit_pairs", self.on_fit)
        monkeypatch.setattr(common.pairs, "few_label_draws", self.on_draw)

    def make_net(self):
        net = ConvNet(1, 8, 16, (4, 8))
        self.starts.append([p.detach().clone() for p in net.parameters()])
        return net

    def on_fit(self, net, x, y, *key, **sgd):
        seen = {name: value for name, value in sgd.items() if name != "prepare"}
        self.fits.append((sgd.get("prepare", lambda x: x)(x), y, key, seen))
        return self.fit(net, x, y, *key, **sgd)

    def on_draw(self, *args):
        self.draws.append(self.draw(*args))
        return self.draws[-1]


def equal(a, b):
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


ROWS = ("teacher", "none", "random_real", "distilled", "all_real")


@pytest.fixture(scope="module")
def scored(few, teacher, targets):
    """One evaluation of all rows, and the spy that watched it. "distilled" is what random_real draws for network 1."""
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        distilled = as_distilled(*real_pairs(few, targets, 1))
        scores = evaluate_pairs(distilled, few, *targets, spy.make_net, CPU, TINY, 3, ROWS)
    return scores, spy


def test_rows_share_networks_and_draws(scored):
    scores, spy = scored
    none, random_real, distilled, all_real = (spy.starts[i : i + 2] for i in (0, 2, 4, 6))
    for row in (random_real, distilled, all_real):
        assert equal(row[0], none[0]) and equal(row[1], none[1])
    assert not equal(none[0], none[1])
    draws = [spy.draws[i : i + 4] for i in range(0, 20, 4)]  # a row: two networks with 5 and 1 labels
    assert all(equal(row, draws[0]) for row in draws)
    assert not torch.equal(draws[0][0], draws[0][2]) and not torch.equal(draws[0][1], draws[0][3])
    assert scores["none"]["match"]["values"][0] != scores["none"]["match"]["values"][1]


def test_rows_are_trained_on_what_they_say(scored, few, targets):
    _, spy = scored
    assert len(spy.fits) == 6  # "none" and "teacher" are not trained
    wanted = [real_pairs(few, targets, run) for run in (0, 1)] + [real_pairs(few, targets, 1)] * 2
    wanted += [(normalise(few.x_train, few.mean, few.std), targets[0])] * 2
    for i, ((x, y, key, sgd), (x_wanted, y_wanted)) in enumerate(zip(spy.fits, wanted, strict=True)):
        assert torch.equal(x, x_wanted) and torch.equal(y, y_wanted), i
        assert key == (3, i % 2)
        assert sgd == dict(
            steps=4 * 2, batch=16, lr=0.05, momentum=0.9, weight_decay=1e-3
        )  # 20 pairs: two batches an epoch


def test_equal_pairs_score_equal(scored):
    scores, _ = scored
    for metric in ("match", "probe", "few_5", "few_1", "finetune"):
        real, distilled = scores["random_real"][metric]["values"], scores["distilled"][metric]["values"]
        assert distilled[1] == real[1]
    assert scores["distilled"]["match"]["values"][0] != scores["random_real"]["match"]["values"][0]


def test_rows_hold_the_scores_that_apply(scored):
    scores, _ = scored
    assert tuple(scores) == ROWS
    for row, metrics in scores.items():
        assert set(metrics) == {"probe", "few_5", "few_1"} | (set() if row == "teacher" else {"match", "finetune"})
        for values in metrics.values():
            assert len(values["values"]) == 2
        assert [len(draws) for draws in metrics["few_5"]["draws"]] == [DRAWS, DRAWS]
    assert scores["random_real"]["match"]["mean"] < scores["none"]["match"]["mean"]  # training helps
    assert scores["teacher"]["few_5"]["mean"] > 0.2  # ten classes


def test_match_is_the_error_of_the_networks_own_head(few, teacher, targets):
    with seeded("evaluation network", 3, 0):
        net = ConvNet(1, 8, 16, (4, 8)).eval()
    with torch.no_grad():
        expected = matching_error(net(normalise(few.x_test, few.mean, few.std)), targets[1])
    unlabelled = dataclasses.replace(few, y_train=None, y_test=None, class_names=[])
    distilled, make_net = as_distilled(*real_pairs(few, targets, 0)), lambda: ConvNet(1, 8, 16, (4, 8))
    rows = ("none", "distilled")
    scores = evaluate_pairs(distilled, unlabelled, *targets, make_net, CPU, TINY, 3, rows)
    assert {row: set(metrics) for row, metrics in scores.items()} == {"none": {"match"}, "distilled": {"match"}}
    assert scores["none"]["match"]["values"][0] == pytest.approx(expected, rel=1e-5)


def test_finetuning_may_be_left_out(few, teacher, targets):
    distilled, protocol = (
        as_distilled(*real_pairs(few, targets, 0)),
        dataclasses.replace(TINY, runs=1, finetune_steps=0),
    )
    make_net = lambda: ConvNet(1, 8, 16, (4, 8))  # noqa: E731
    scores = evaluate_pairs(distilled, few, *targets, make_net, CPU, protocol, 3, ("none",))
    assert set(scores["none"]) == {"match", "probe", "few_5", "few_1"} and scores["none"]["match"]["std"] == 0


@pytest.mark.parametrize("cached", [True, False])
def test_features_are_frozen_and_normalised_kept_or_not(few, teacher, targets, monkeypatch, cached):
    """The probe's features, of the teacher as they are and of a network."""
    seen, distilled = [], as_distilled(*real_pairs(few, targets, 0))
    monkeypatch.setattr(common.pairs, "linear_probe", lambda *args: seen.append(args) or 0.5)
    nets, embedded, few_draws = [], [], TINY.few_draws

    def make_net():
        nets.append(ConvNet(1, 8, 16, (4, 8)))
        whole = nets[-1].features
        nets[-1].features = lambda x: embedded.extend(x) or whole(x)
        return nets[-1]

    protocol = dataclasses.replace(TINY, runs=1, finetune_steps=0)
    dim = 8 * 4  # 8 channels of 2 x 2
    cache_gb = (300 * dim * 4 - (0 if cached else 1)) / 1e9  # exactly enough, or one byte short
    evaluate_pairs(distilled, few, *targets, make_net, CPU, protocol, 3, ("teacher", "distilled"), cache_gb)
    # test images once; training images once, or each time the draws ask for them
    assert len(embedded) == 4 * N_S + 100 + (300 if cached else few_draws * (50 + 10))
    index = torch.tensor([5, 0, 299, 5])
    embed = lambda x: nets[0].eval().features(normalise(x, few.mean, few.std)).detach()  # noqa: E731
    for (features, data, f_test, used, *key), expected in zip(
        seen, (targets, (embed(few.x_train), embed(few.x_test))), strict=True
    ):
        torch.testing.assert_close(features(index), expected[0][index], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(f_test, expected[1], rtol=1e-5, atol=1e-5)
        assert not features(index).requires_grad
        assert data is few and used is protocol and key == [3, 0]


def test_scores_do_not_depend_on_the_cache(scored, few, teacher, targets):
    distilled, protocol = as_distilled(*real_pairs(few, targets, 1)), dataclasses.replace(TINY, finetune_steps=0)
    make_net = lambda: ConvNet(1, 8, 16, (4, 8))  # noqa: E731
    scores = evaluate_pairs(distilled, few, *targets, make_net, CPU, protocol, 3, ("distilled",), 0.0)
    for metric in ("match", "probe", "few_5", "few_1"):
        assert scores["distilled"][metric] == scored[0]["distilled"][metric]


# ---------------------------------------------------------------------------------------------------- long evaluations


def test_a_stopped_evaluation_goes_on_at_the_network_it_was_at(scored, few, targets, tmp_path, monkeypatch):
    distilled, keep = as_distilled(*real_pairs(few, targets, 1)), tmp_path / "evaluation.json"
    make_net = lambda: ConvNet(1, 8, 16, (4, 8))  # noqa: E731
    original, calls = common.pairs.score_network, []

    def stop(*args):
        calls.append(args[-2:])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    def run(protocol=TINY, seed=3, pairs=distilled):
        calls.clear()
        return evaluate_pairs(pairs, few, *targets, make_net, CPU, protocol, seed, ROWS, keep=keep)

    monkeypatch.setattr(common.pairs, "score_network", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(common.pairs, "score_network", lambda *args: calls.append(args[-2:]) or original(*args))
    assert run() == scored[0]
    assert calls == [(3, 1), (3, 0), (3, 1), (3, 0), (3, 1)]  # from random_real's second network on
    assert run() == scored[0] and not calls
    more = run(dataclasses.replace(TINY, runs=3))  # a network more a row
    assert calls == [(3, 2)] * 4 and more["none"]["match"]["values"][:2] == scored[0]["none"]["match"]["values"]
    run(dataclasses.replace(TINY, epochs=3))  # another protocol: nothing of it was scored
    assert len(calls) == 8
    run(dataclasses.replace(TINY, epochs=3), seed=4)
    assert len(calls) == 8
    run(dataclasses.replace(TINY, epochs=3), seed=4, pairs=as_distilled(distilled.x * 1.01, distilled.y))
    assert len(calls) == 8
    keep.write_text("{half a file")
    run(dataclasses.replace(TINY, epochs=3), seed=4)
    assert len(calls) == 8


def test_the_prediction_counts_the_steps(few, targets, monkeypatch):
    """Every step timed as one second, every image by its batch."""
    monkeypatch.setattr(common.pairs, "seconds_of", lambda function, device: function() or 1.0)
    monkeypatch.setattr(common.pairs, "apply_chunked", lambda function, x: None)
    monkeypatch.setattr(common.pairs, "linear_probe", lambda *args: None)
    monkeypatch.setattr(common.pairs, "few_label_probe", lambda *args: None)
    monkeypatch.setattr(common.pairs, "fit_pairs", lambda *args, **sgd: None)
    make_net = lambda: ConvNet(1, 8, 16, (4, 8))  # noqa: E731
    protocol = dataclasses.replace(TINY, runs=3, epochs=7, batch=8, probe_steps=40, finetune_steps=5, finetune_batch=4)

    def predict(data, rows, **changes):
        used = dataclasses.replace(protocol, **changes)
        return common.pairs.predict_seconds(make_net, data, N_S, 16, CPU, used, 1.0, rows)

    fit = 7 * -(-N_S // 8)
    image, probes = 1 / 8, 40 / 20 + 1.5 * DRAWS
    score = image * 100 + image * 300 + probes
    tune = 5 + image * 100
    assert predict(few, ("none",)) == pytest.approx(3 * (score + tune))
    assert predict(few, ("random_real", "distilled")) == pytest.approx(2 * 3 * (fit + score + tune))
    assert predict(few, ("teacher",)) == pytest.approx(3 * probes * 16 / 32)
    assert predict(few, ("distilled",), finetune_steps=0) == pytest.approx(3 * (fit + score))
    unlabelled = dataclasses.replace(few, y_train=None, y_test=None, class_names=[])
    assert predict(unlabelled, ("distilled",)) == pytest.approx(3 * (fit + image * 100))


def test_seconds_of_is_the_mean_after_a_first_call(monkeypatch):
    class Clock:
        now = 0.0

    def function():
        Clock.now += 10.0 if Clock.now == 0 else 0.02  # the first call also loads what it needs

    monkeypatch.setattr(common.pairs.time, "monotonic", lambda: Clock.now)
    assert common.pairs.seconds_of(function, CPU) == pytest.approx(0.02)


# ------------------------------------------------------------------------------------------------------------ summaries

RUNS = [dict(match=0.5, few_5=[0.1, 0.3]), dict(match=0.7, few_5=[0.5, 0.2]), dict(match=0.9, few_5=[0.6, 0.7])]
OTHER = [dict(match=0.6, few_5=[0.0, 0.1]), dict(match=0.9, few_5=[0.4, 0.4]), dict(match=0.8, few_5=[0.2, 0.9])]


def test_summarise_is_mean_and_sample_std():
    summary = summarise(RUNS)
    assert summary["match"]["mean"] == pytest.approx(0.7) and summary["match"]["std"] == pytest.approx(0.2)
    assert summary["match"]["values"] == [0.5, 0.7, 0.9] and "draws" not in summary["match"]
    means = [statistics.mean(run["few_5"]) for run in RUNS]
    assert summary["few_5"]["values"] == pytest.approx(means)
    assert summary["few_5"]["std"] == pytest.approx(statistics.stdev(means))
    assert summary["few_5"]["mean"] == pytest.approx(statistics.mean(means))
    assert summary["few_5"]["draws"] == [run["few_5"] for run in RUNS]
    assert summarise(RUNS[:1])["match"] == dict(mean=0.5, std=0.0, values=[0.5])


def test_paired_is_the_mean_difference_and_its_standard_error():
    results = {"a": summarise(RUNS), "b": summarise(OTHER)}
    for metric, n in (("match", 3), ("few_5", 6)):
        a, b = (np.ravel([run[metric] for run in runs]) for runs in (RUNS, OTHER))
        found = paired(results, "a", "b", metric)
        assert found["mean"] == pytest.approx((a - b).mean())
        assert found["se"] == pytest.approx((a - b).std(ddof=1) / np.sqrt(n))
        means = a.reshape(3, -1).mean(1) - b.reshape(3, -1).mean(1)
        assert found["se_networks"] == pytest.approx(means.std(ddof=1) / np.sqrt(3))
        assert found["pairs"] == n
    one = {"a": summarise(RUNS[:1]), "b": summarise(OTHER[:1])}
    assert paired(one, "a", "b", "match") == dict(mean=pytest.approx(-0.1), se=0.0, se_networks=0.0, pairs=1)


def test_table_has_every_row_and_score():
    results = {"random_real": summarise(RUNS), "teacher": summarise([dict(few_5=[0.25])])}
    lines = table(results, "what it is over").splitlines()
    assert lines[0].split() == ["match", "error", "5", "a", "class"]
    assert lines[1].split() == ["random", "real", "0.700", "±", "0.200", "40.0", "±", "22.9"]
    assert lines[2].split() == ["teacher", "-", "25.0", "±", "0.0"]
    assert lines[3] == "what it is over" and len(lines) == 4
