"""common/applications.py: its functions against naive restatements, attacks on made and on real students, the command
over runs; and what they stand on: part_of, losses_of, fit_student(after=). Whole runs: test_application_runs.py."""

import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from torch import nn

import common.applications
from common.applications import (
    BLOCK,
    Args,
    Subset,
    attack,
    attackers,
    auc,
    chunk_order,
    class_groups,
    half_width,
    main,
    of_auc,
    of_text,
    of_values,
    outputs,
    over_runs,
    over_students,
    plot,
    report,
)
from common.data import Inputs, hold_out, load, part_of
from common.models import frepo_student
from common.run import seeded
from common.students import Recipe, fit_student, losses_of, student_loss, student_lr

F64 = torch.float64
CPU = torch.device("cpu")
TRAINED = ("logistic", "mlp", "forest", "knn")
ATTACKS = ("threshold", *TRAINED)
CONSTANT = dict(warm_up=0, lr_end=1.0)  # the rate of the membership runs


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load("digits", data_dir=tmp_path_factory.mktemp("data"))


# ------------------------------------------------------------------------------------------------------ class orders

PUBLISHED = [  # first and last classes of the orders in FRePo's script
    ([26, 86, 2, 55, 75], [67, 64, 47, 44]),
    ([80, 84, 33, 81], [9, 72, 12, 37]),
    ([83, 30, 56, 24], [72, 15, 40]),
    ([93, 67, 6, 64], [72, 56, 3, 24]),
    ([20, 10, 96, 16], [1, 69, 55, 46]),
]


@pytest.mark.parametrize("steps", [1, 5, 7, 10, 100])
@pytest.mark.parametrize("seed", range(5))
def test_class_groups_cut_the_published_orders(seed, steps):
    groups = class_groups(100, steps, seed)
    order = [label for group in groups for label in group]
    first, last = PUBLISHED[seed]
    assert order[: len(first)] == first and order[-len(last) :] == last
    assert sorted(order) == list(range(100))


@pytest.mark.parametrize(
    ("classes", "steps", "sizes"),
    [(100, 5, [20] * 5), (100, 10, [10] * 10), (10, 3, [4, 3, 3]), (100, 7, [15, 15, 14, 14, 14, 14, 14]),
     (10, 4, [3, 3, 2, 2]), (3, 3, [1, 1, 1]), (7, 1, [7])],
)  # fmt: skip
def test_the_first_steps_take_one_class_more_where_steps_do_not_divide(classes, steps, sizes):
    groups = class_groups(classes, steps, 2)
    assert [len(group) for group in groups] == sizes
    assert sorted(label for group in groups for label in group) == list(range(classes))
    json.dumps(groups)  # goes into result.json


def test_chunks_are_cut_in_the_order_of_the_file_or_shuffled_where_that_is_by_class(digits):
    assert chunk_order(digits.y_train).tolist() == list(range(len(digits.y_train)))
    assert chunk_order(torch.tensor([0, 0, 1, 2, 2, 1])).tolist() == list(range(6))
    by_class = torch.arange(10).repeat_interleave(100)
    order = chunk_order(by_class)
    assert sorted(order.tolist()) == list(range(1000))
    for chunk in by_class[order].split(250):  # some 25 of a class, with a standard deviation of 4
        assert 5 <= int(chunk.bincount(minlength=10).min()) <= int(chunk.bincount(minlength=10).max()) <= 45
    torch.manual_seed(1)
    assert torch.equal(chunk_order(by_class), order)  # in every run


# ------------------------------------------------------------------------------------------------------- area under ROC


def above(member, other):
    return 1.0 if member > other else 0.5 if member == other else 0.0


def naive_auc(members, others):
    """The area, and DeLong's error from the two sets of structural components, as in the paper."""
    m, n = len(members), len(others)
    area = sum(above(x, y) for x in members for y in others) / (m * n)
    v_10 = [sum(above(x, y) for y in others) / n for x in members]
    v_01 = [sum(above(x, y) for x in members) / m for y in others]
    s_10 = sum((v - area) ** 2 for v in v_10) / (m - 1)
    s_01 = sum((v - area) ** 2 for v in v_01) / (n - 1)
    return area, math.sqrt(s_10 / m + s_01 / n)


@pytest.mark.parametrize("decimals", [0, 1, 12])  # many ties, some, none
@pytest.mark.parametrize(("m", "n"), [(30, 41), (41, 30), (2, 2), (2, 50), (60, 60)])
def test_auc_and_its_error_equal_the_loops_and_sklearn(m, n, decimals):
    from sklearn.metrics import roc_auc_score

    g = np.random.default_rng([m, n, decimals])
    members, others = (g.normal(0.6, 1, m).round(decimals), g.normal(0, 1.4, n).round(decimals))
    area, error = auc(members, others)
    assert (area, error) == pytest.approx(naive_auc(members.tolist(), others.tolist()), rel=1e-12)
    labels = np.repeat([1, 0], [m, n])
    assert area == pytest.approx(roc_auc_score(labels, np.concatenate([members, others])), rel=1e-12)
    # swapped and mirrored
    assert auc(others, members) == pytest.approx((1 - area, error), rel=1e-12, abs=1e-15)
    assert auc(-others, -members) == pytest.approx((area, error), rel=1e-12)


def test_auc_of_separated_and_of_equal_scores():
    low, high = np.arange(10.0), np.arange(20.0, 35.0)
    assert auc(high, low) == (1.0, 0.0)  # members higher
    assert auc(low, high) == (0.0, 0.0)
    assert auc(np.ones(5), np.ones(7)) == (0.5, 0.0)
    assert auc(np.array([1.0, 3.0]), np.array([0.0, 2.0]))[0] == 0.75


def test_auc_does_not_change_its_scores():
    members, others = np.array([3.0, 1.0, 2.0]), np.array([2.5, 0.5])
    auc(members, others)
    assert members.tolist() == [3, 1, 2] and others.tolist() == [2.5, 0.5]


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_the_error_and_the_interval_of_auc_are_right_on_simulated_scores(shift):
    """4000 data sets whose true area is known. The ratio of the mean squared error stated to the variance found has a
    standard error of sqrt(2 / 4000), the coverage one of sqrt(0.95 0.05 / 4000): four of these are allowed."""
    g, draws, true = np.random.default_rng(5), 4000, statistics.NormalDist().cdf(shift / math.sqrt(2))
    found = [auc(g.normal(shift, 1, 150), g.normal(0, 1, 100)) for _ in range(draws)]
    areas, errors = np.array(found).T
    assert areas.mean() == pytest.approx(true, abs=4 * areas.std() / math.sqrt(draws))
    assert (errors**2).mean() / areas.var() == pytest.approx(1, abs=4 * math.sqrt(2 / draws))
    intervals = [of_auc([pair]) for pair in found]
    covered = sum(each["low"] <= true <= each["high"] for each in intervals) / draws
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / draws))


# -------------------------------------------------------------------------------------------------------------- attacks


def kind(n, seed, classes=4):
    """What a student that knows nothing says of n images: scores, losses, labels."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, classes, generator=g),
        torch.rand(n, generator=g),
        torch.randint(classes, (n,), generator=g),
    )


def distances(found):
    """How many standard errors each AUC lies above one half."""
    return {name: (area - 0.5) / error for name, (area, error) in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_attacks_are_at_chance_where_nothing_tells_members(seed):
    found = attack(kind(300, 2 * seed), kind(300, 2 * seed + 1), seed)
    assert tuple(found) == ATTACKS
    assert all(abs(distance) < 4 for distance in distances(found).values()), found
    for name, (_, error) in found.items():  # sqrt((m + n + 1) / (12 m n)), of 300 and 300 or of their halves
        n = 300 if name == "threshold" else 150
        assert error == pytest.approx(math.sqrt((2 * n + 1) / (12 * n * n)), rel=0.05), name


def test_attacks_find_smaller_losses_and_larger_scores_of_the_own_class():
    members, others = kind(300, 0), kind(300, 1)
    members[0][torch.arange(300), members[2]] += 2.0
    members, others = (
        (s, losses_of(s, 2 * F.one_hot(y, 4).float(), "mse", 1.0), y) for s, _, y in (members, others)
    )  # fmt: skip
    found = attack(members, others, 0)
    assert all(distance > 6 for distance in distances(found).values()), found
    swapped = attack(others, members, 0)
    # the loss itself has a sign; the trained ones learn which side it is
    assert swapped["threshold"][0] == pytest.approx(1 - found["threshold"][0], abs=1e-9)
    assert all(distance > 6 for name, distance in distances(swapped).items() if name != "threshold"), swapped


def test_a_signal_in_the_scores_alone_is_found_by_the_trained_attacks_only():
    members, others = kind(300, 0), kind(300, 1)
    members[0][:, 1] += 1.5
    found = distances(attack(members, others, 0))
    assert abs(found["threshold"]) < 4, found
    assert all(found[name] > 6 for name in TRAINED), found


def test_a_signal_in_the_loss_alone_is_found_by_all():
    members, others = kind(300, 0), kind(300, 1)
    members[1].sub_(0.6)
    found = distances(attack(members, others, 0))
    assert all(found[name] > 6 for name in ATTACKS), found


def test_a_signal_that_differs_by_label_is_found_by_attacks_that_see_the_label():
    """Members of class 0 have smaller losses, members of class 1 larger ones: no one threshold tells them."""
    members, others = kind(600, 0, 2), kind(600, 1, 2)
    members[1].add_(torch.where(members[2] == 0, -0.7, 0.7))
    found = distances(attack(members, others, 0))
    assert abs(found["threshold"]) < 4 and abs(found["logistic"]) < 4, found
    assert all(found[name] > 6 for name in ("mlp", "forest", "knn")), found


def test_a_large_score_that_says_nothing_does_not_drown_the_others():
    members, others = kind(300, 0), kind(300, 1)
    members[0][:, 1] += 2.0
    for each in (members, others):
        each[0][:, 3] *= 1e6
    found = distances(attack(members, others, 0))
    assert all(found[name] > 6 for name in TRAINED), found


class Memory:
    """A classifier that recalls each row it was fitted to, and keeps what it is given."""

    def __init__(self):
        self.fits, self.tests = [], []

    def fit(self, x, is_member):
        self.known = {row.tobytes(): label for row, label in zip(x, is_member, strict=True)}
        self.fits.append((x, is_member))
        return self

    def predict_proba(self, x):
        share = np.array([self.known.get(row.tobytes(), 0.5) for row in x], float)
        self.tests.append(x)
        return np.stack([1 - share, share], 1)


class FirstScore(Memory):
    """The images' first score is what it says of them."""

    def predict_proba(self, x):
        super().predict_proba(x)
        return np.stack([-x[:, 0], x[:, 0]], 1)


@pytest.mark.parametrize("key", range(3))
def test_each_image_is_scored_once_by_a_classifier_that_never_saw_it(monkeypatch, key):
    members, others, memory = kind(60, 0), kind(60, 1), Memory()
    monkeypatch.setattr(common.applications, "attackers", lambda seed: {"memory": memory})
    found = attack(members, others, key)
    assert found["memory"] == (0.5, 0.0)  # a row it knew would be told
    rows = [
        s.tolist() + [loss.item()] + [float(label == c) for c in range(4)]
        for part in (members, others)
        for s, loss, label in zip(*part, strict=True)
    ]
    tested = [row for x in memory.tests for row in x.tolist()]
    assert sorted(tested) == sorted(rows) and len(memory.tests) == 2
    assert all(x.dtype == np.float64 for x in memory.tests)
    for (x, is_member), test in zip(memory.fits, memory.tests, strict=True):
        assert sorted(x.tolist() + test.tolist()) == sorted(rows) and len(x) == len(test) == 60
        assert is_member.sum() == 30
        assert [rows.index(row) < 60 for row in x.tolist()] == is_member.astype(bool).tolist()


def test_a_trained_attack_is_the_mean_of_its_two_halves(monkeypatch):
    members, others, judge = kind(50, 0), kind(50, 1), FirstScore()
    monkeypatch.setattr(common.applications, "attackers", lambda seed: {"judge": judge})
    area, error = attack(members, others, 0)["judge"]
    member_rows = {row.tobytes() for x, is_member in judge.fits for row in x[is_member == 1]}
    halves = []
    for x in judge.tests:
        sides = {True: [], False: []}
        for row in x:
            sides[row.tobytes() in member_rows].append(row[0])
        halves.append(naive_auc(sides[True], sides[False]))
    (area_1, error_1), (area_2, error_2) = halves
    assert area == pytest.approx((area_1 + area_2) / 2, rel=1e-12) and area_1 != area_2
    assert error == pytest.approx((error_1 + error_2) / 2, rel=1e-12) and error_1 != error_2


def test_the_interval_of_a_trained_attack_covers_chance(monkeypatch):
    """250 data sets without a signal; see the simulation of auc for what is allowed.

    A chance difference in either half gives both halves' AUC the same sign: their correlation is 0.9 here.
    """
    monkeypatch.setattr(common.applications, "attackers", lambda seed: {"logistic": attackers(seed)["logistic"]})
    draws, covered = 250, 0
    for i in range(draws):
        interval = of_auc([attack(kind(50, 2 * i), kind(50, 2 * i + 1), i)["logistic"]])
        covered += interval["low"] <= 0.5 <= interval["high"]
    assert covered / draws >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / draws)


def test_threshold_is_the_loss_of_all_images():
    members, others = kind(40, 0), kind(40, 1)
    wanted = naive_auc((-members[1].double()).tolist(), (-others[1].double()).tolist())
    assert attack(members, others, 0)["threshold"] == pytest.approx(wanted, rel=1e-12)


def test_attacks_have_equal_bits_for_equal_keys_and_differ_for_others():
    members, others = kind(80, 0), kind(80, 1)
    np.random.seed(1)
    torch.manual_seed(1)
    one = attack(members, others, 3, 1)
    np.random.seed(2)
    torch.manual_seed(2)
    assert attack(members, others, 3, 1) == one
    for key in ((3, 2), (4, 1)):
        other = attack(members, others, *key)
        assert other["threshold"] == one["threshold"]
        assert all(other[name] != one[name] for name in TRAINED)


def test_attacks_print_no_warnings(capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attack(kind(100, 0), kind(100, 1), 0)  # too little for the MLP to converge
    assert not caught and capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------- a real student


def labels(y):
    return F.one_hot(y, 10).float() - 0.1


@pytest.fixture(scope="module")
def overfitted(digits):
    """said(part, first, last): what a student of the first 100 training digits, all of which it knows, says."""
    inputs = {
        name: Inputs(x, digits.mean, digits.std, None, CPU, 0.0)
        for name, x in (("train", digits.x_train), ("test", digits.x_test))
    }
    truth = {"train": digits.y_train, "test": digits.y_test}
    with seeded("overfitted"):
        net = frepo_student("conv", 1, 8, 10, (8, 16))
    recipe = Recipe(steps=300, lr=3e-3, batch=100, **CONSTANT)
    fit_student(net, inputs["train"], labels(digits.y_train[:100]), recipe, 0)

    def said(part, first, last):
        index = torch.arange(first, last)
        scores = outputs(net, inputs[part], index)
        return scores, losses_of(scores, labels(truth[part][index]), "mse", 1.0), truth[part][index]

    scores, _, y = said("train", 0, 100)
    assert (scores.argmax(1) == y).all()
    return said


def test_attacks_on_an_overfitted_student_tell_its_training_images(overfitted):
    found = attack(overfitted("train", 0, 100), overfitted("test", 0, 100), 0)
    interval = of_auc([found["threshold"]])
    assert interval["low"] > 0.8, found
    assert of_auc([found["forest"]])["low"] > 0.7 and of_auc([found["logistic"]])["low"] > 0.6, found


def test_attacks_on_the_same_student_are_at_chance_on_images_that_it_never_saw(overfitted):
    for first in (100, 460):
        found = attack(overfitted("train", first, first + 360), overfitted("test", 0, 360), 0)
        interval = of_auc([found["threshold"]])
        assert interval["low"] < 0.5 < interval["high"], found
        assert all(abs(distance) < 4 for distance in distances(found).values()), found


# ---------------------------------------------------------------------------------------------------- scores of a net


class Normed(nn.Module):
    """Scores that depend on the mode, and on the company in train mode; keeps the mode and size of every pass."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head, self.passes = nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Linear(64, 10), []
        self.norm.running_mean.fill_(0.4), self.norm.running_var.fill_(3.0)

    def forward(self, x):
        self.passes.append((self.training, torch.is_grad_enabled(), len(x)))
        return self.head(self.drop(self.norm(x).flatten(1)))


def test_outputs_are_those_of_one_pass_in_eval_mode(digits):
    with seeded("normed"):
        net = Normed()
    inputs = Inputs(digits.x_train, digits.mean, digits.std, None, CPU, 0.0)
    index = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[: 2 * BLOCK + 30]
    for mode in (True, False):
        net.train(mode)
        found = outputs(net, inputs, index)
        assert net.training and not found.requires_grad
    assert net.passes == [(False, False, BLOCK), (False, False, BLOCK), (False, False, 30)] * 2
    assert net.norm.running_mean == torch.tensor(0.4) and net.norm.num_batches_tracked == 0  # nothing learnt
    x = (digits.x_train[index].double() / 255 - digits.mean.double()) / digits.std.double()
    hidden = ((x - 0.4) / math.sqrt(3 + 1e-5)).flatten(1)
    wanted = hidden @ net.head.weight.detach().double().T + net.head.bias.detach().double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_subset_gives_the_inputs_at_its_places(digits):
    inputs = Inputs(digits.x_train, digits.mean, digits.std, None, CPU, 0.0)
    odd = Subset(inputs, torch.arange(1, 101, 2))
    assert len(odd) == 50
    assert torch.equal(odd(torch.tensor([0, 49, 3, 3])), inputs(torch.tensor([1, 99, 7, 7])))
    assert torch.equal(Subset(odd, torch.tensor([4, 2]))(torch.tensor([1, 0])), inputs(torch.tensor([5, 9])))


# ------------------------------------------------------------------------------------------------------- points of rows


def test_of_auc_is_the_mean_and_no_narrower_for_more_students():
    pairs = [(0.6, 0.01), (0.7, 0.03), (0.62, 0.02)]
    found = of_auc(pairs)
    assert found["values"] == [0.6, 0.7, 0.62]
    assert (found["mean"], found["se"]) == pytest.approx((0.64, 0.02), rel=1e-12)
    z = statistics.NormalDist().inv_cdf(0.975)
    assert (found["low"], found["high"]) == pytest.approx((0.64 - z * 0.02, 0.64 + z * 0.02), rel=1e-6)
    one, many = of_auc([(0.6, 0.02)]), of_auc([(0.6, 0.02)] * 25)  # all attacked on the same images
    assert many["high"] - many["low"] == pytest.approx(one["high"] - one["low"], rel=1e-12)


def test_intervals_of_auc_end_at_0_and_1():
    high, low = of_auc([(0.99, 0.02)]), of_auc([(0.01, 0.02)])
    assert high["high"] == 1.0 and high["low"] == pytest.approx(0.99 - 1.96 * 0.02, abs=1e-5)
    assert low["low"] == 0.0 and low["high"] == pytest.approx(0.01 + 1.96 * 0.02, abs=1e-5)


def test_of_values_is_the_mean_and_sample_std():
    values = [0.5, 0.8, 0.3, 0.9]
    found = of_values(values)
    assert list(found) == ["mean", "std", "values"] and found["values"] == values
    assert found["mean"] == pytest.approx(statistics.mean(values), rel=1e-12)
    assert found["std"] == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert of_values([0.5]) == {"mean": 0.5, "std": 0.0, "values": [0.5]}


def test_over_students_takes_the_attacks_of_those_that_were_attacked():
    students = [[{"accuracy": 0.1 * i + 0.3 * place} for place in range(2)] for i in range(1, 4)]
    for student, areas in zip(students, ([0.6, 0.7], [0.5, 0.9]), strict=False):  # of the first two alone
        for point, value in zip(student, areas, strict=True):
            point["AUC knn"] = [value, 0.01]  # a list, as JSON gives it
    curves = over_students(students, [10, 40])
    assert [list(curves), [p["at"] for p in curves["accuracy"]]] == [["accuracy", "AUC knn"], [10, 40]]
    assert [p["values"] for p in curves["AUC knn"]] == [[0.6, 0.5], [0.7, 0.9]]
    assert [p["mean"] for p in curves["accuracy"]] == pytest.approx([0.2, 0.5], rel=1e-12)
    assert [p["se"] for p in curves["AUC knn"]] == pytest.approx([0.01, 0.01], rel=1e-12)


def test_half_width_is_the_std_or_half_the_interval():
    assert half_width({"mean": 0.5, "std": 0.03}) == 0.03
    point = of_auc([(0.6, 0.05)])
    assert half_width(point) == pytest.approx((point["high"] - point["low"]) / 2, rel=1e-12)
    assert half_width(of_auc([(0.999, 0.05)])) == pytest.approx(1.96 * 0.05, rel=1e-4)  # not the part below 1


def spread(at, mean, std):
    return {"at": at, "mean": mean, "std": std, "values": [mean]}


def area(at, mean, error):
    return {"at": at} | of_auc([(mean, error)])


def example():
    """Two rows; the AUC of one alone, at two of its points."""
    return {
        "random_real": {"accuracy": [spread(100, 0.512, 0.0213), spread(1000, 0.7, 0.01)]},
        "distilled": {
            "accuracy": [spread(100, 0.8126, 0.004), spread(1000, 0.9, 0.02)],
            "AUC threshold": [area(100, 0.5123, 0.02), area(1000, 0.6, 0.01)],
        },
    }


def test_of_text_gives_accuracies_in_per_cent_and_auc_as_it_is():
    lines = [line.split() for line in of_text(example()).splitlines()]
    assert lines == [
        ["accuracy", "100", "1000"],
        ["random", "real", "51.2", "±", "2.1", "70.0", "±", "1.0"],
        ["distilled", "81.3", "±", "0.4", "90.0", "±", "2.0"],
        ["AUC", "threshold", "100", "1000"],
        ["distilled", "0.512", "±", "0.039", "0.600", "±", "0.020"],
    ]
    # columns end below each other
    ends = [len(line) for line in of_text(example()).splitlines()]
    assert len(set(ends)) == 1


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def bars(panel):
    """{label: (at, mean, half width) of each point} of a panel, as they are drawn."""
    found = {}
    for container in panel.containers:
        line, _, (strokes,) = container.lines
        at, mean = (values.tolist() for values in line.get_data())
        ends = [segment[:, 1].tolist() for segment in strokes.get_segments()]
        for middle, (low, high) in zip(mean, ends, strict=True):
            assert middle - low == pytest.approx(high - middle, rel=1e-9)
        found[container.get_label()] = list(zip(at, mean, [(high - low) / 2 for low, high in ends], strict=True))
    return found


def wanted_bars(curves, measure):
    """Accuracies in per cent, AUCs as they are."""
    return {
        row.replace("_", " "): [
            pytest.approx(
                (p["at"], p["mean"], 1.959964 * p["se"]) if "se" in p else (p["at"], 100 * p["mean"], 100 * p["std"]),
                rel=1e-9,
            )
            for p in of_row[measure]
        ]
        for row, of_row in curves.items()
        if measure in of_row
    }


@pytest.mark.parametrize(("application", "scale"), [("continual", "linear"), ("membership", "log")])
def test_plot_draws_every_point_with_its_half_width(tmp_path, drawn, application, scale):
    curves = example()
    plot(tmp_path / "curve.png", curves, application, "the caption")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = drawn
    assert figure.get_suptitle() == "the caption"
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["accuracy", "AUC threshold"]
    for panel in panels:
        assert bars(panel) == wanted_bars(curves, panel.get_title())
        assert panel.get_xscale() == scale
        assert ("classes" if application == "continual" else "updates") in panel.get_xlabel()
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["random real", "distilled"]


def test_plot_has_a_panel_for_each_of_many_measures(tmp_path, drawn):
    curves = {"distilled": {f"m{i}": [spread(10, i / 10, 0.01 * i)] for i in range(9)}}
    plot(tmp_path / "curve.png", curves, "membership", "")
    assert [panel.get_title() for panel in drawn[0].axes] == [f"m{i}" for i in range(9)]
    for panel in drawn[0].axes:
        assert bars(panel) == wanted_bars(curves, panel.get_title())


def test_report_prints_and_writes_what_it_returns(tmp_path, capsys, digits, drawn):
    run = SimpleNamespace(file=lambda name: tmp_path / name, finish=lambda **result: result)
    curves = example()
    result = report(run, "membership", digits, curves, "the caption", ipc=3)
    assert json.loads((tmp_path / "curve.json").read_text()) == result["curves"] == example()
    assert (tmp_path / "curve.png").exists() and bars(drawn[0].axes[1]) == wanted_bars(curves, "AUC threshold")
    assert (result["application"], result["data"], result["ipc"]) == ("membership", "digits", 3)
    assert capsys.readouterr().out == of_text(curves) + "\nthe caption\n"


# --------------------------------------------------------------------------------------------------------- several runs

ARGS = dict(class_order=0, member_chunk=0, seed=0, steps=100, ipc=20, class_steps=5, eval_runs=5, device="cpu",
            out_dir="runs", resume=None, full_row=False, cache_gb=4.0)  # fmt: skip


def continual_curves(shift=0.0, rows=("random_real", "distilled")):
    return {
        row: {
            model: [spread(at, value + shift + 0.1 * (row == "distilled"), 0.5) for at, value in ((20, 0.7), (40, 0.4))]
            for model in ("conv", "krr")
        }
        for row in rows
    }


def write_run(folder, curves, changes=None, drop=(), **args):
    """A folder with a result.json as finish writes it, of the keys that are read."""
    result = dict(method="frepo", application="continual", data="cifar100", args=ARGS | args, curves=curves)
    result |= dict(content="0a1b", seconds=10.0, commit="abc") | (changes or {})
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k not in drop}))
    return str(folder)


def test_main_gives_mean_and_sample_std_over_runs(tmp_path, drawn, capsys):
    shifts = [0.0, 0.05, -0.2]
    folders = [
        write_run(tmp_path / f"runs/{i}", continual_curves(shift), dict(commit=f"c{i % 2}"), class_order=i,
                  device=f"cuda:{i}", out_dir=f"o{i}", resume="x" * i or None, cache_gb=float(i))
        for i, shift in enumerate(shifts)
    ]  # fmt: skip
    result = main(Args(tuple(folders)))
    for row, base in (("random_real", 0), ("distilled", 0.1)):
        assert list(result["curves"][row]) == ["conv", "krr"]
        for points in result["curves"][row].values():
            for point, at, value in zip(points, (20, 40), (0.7, 0.4), strict=True):
                values = [value + base + shift for shift in shifts]
                assert point["at"] == at and point["values"] == pytest.approx(values, rel=1e-9)
                found = (point["mean"], point["std"])
                assert found == pytest.approx((statistics.mean(values), statistics.stdev(values)), rel=1e-9)
    stem = tmp_path / "runs/cifar100__frepo__continual"  # beside the first run
    assert json.loads(Path(f"{stem}.json").read_text()) == result
    assert Path(f"{stem}.png").read_bytes()[:4] == b"\x89PNG"
    assert bars(drawn[0].axes[0]) == wanted_bars(result["curves"], "conv")
    assert result["runs"] == [{"class_order": i, "member_chunk": 0, "seed": 0} for i in range(3)]
    assert result["seconds"] == 30 and result["commits"] == ["c0", "c1"]
    facts = [result[key] for key in ("application", "data", "method")]
    assert facts == ["continual", "cifar100", "frepo"]
    printed = capsys.readouterr().out
    assert of_text(result["curves"]) in printed and "3 class orders" in printed and str(stem) in printed


def test_main_takes_auc_from_chunks_of_membership(tmp_path, capsys):
    folders = []
    for chunk, (mean, error) in enumerate([(0.6, 0.01), (0.7, 0.03)]):
        curves = {"distilled": {"accuracy": [spread(100, mean, 0.2)], "AUC knn": [area(100, mean, error)]}}
        changes = dict(application="membership", data="mnist", method="isa")
        folders.append(write_run(tmp_path / f"{chunk}", curves, changes, member_chunk=chunk))
    result = main(Args(tuple(folders), out=str(tmp_path / "a/b")))
    for measure in ("accuracy", "AUC knn"):  # the spread over chunks, not the interval of one
        (point,) = result["curves"]["distilled"][measure]
        assert (point["mean"], point["std"]) == pytest.approx((0.65, 0.1 / math.sqrt(2)), rel=1e-9)
        assert "se" not in point
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {
        "mnist__isa__membership.json", "mnist__isa__membership.png"
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "2 chunks" in printed and "0.650 ± 0.071" in printed and "65.0 ± 7.1" in printed


def test_over_runs_keeps_the_order_of_the_first_run():
    one, two = continual_curves(), continual_curves(0.1)
    found = over_runs([one, {row: two[row] for row in reversed(two)}])
    assert list(found) == ["random_real", "distilled"]
    assert found["distilled"]["krr"][1]["values"] == pytest.approx([0.5, 0.6], rel=1e-12)
    assert one == continual_curves()  # nothing changed in place


def test_rows_that_not_all_runs_have_are_left_out(tmp_path):
    many, few = ("random_real", "distilled", "all_real"), ("random_real", "distilled")
    for name, rows in (("ab", (many, few)), ("ba", (few, many))):
        folders = [
            write_run(tmp_path / name / f"{i}", continual_curves(rows=each), class_order=i, full_row="all_real" in each)
            for i, each in enumerate(rows)
        ]
        assert set(main(Args(tuple(folders)))["curves"]) == set(few)


def test_main_refuses_fewer_than_two_runs(tmp_path):
    one = write_run(tmp_path / "one", continual_curves())
    for runs in ((), (one,)):
        refuse(lambda runs=runs: main(Args(runs)), "two")


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (dict(class_order=1, changes=dict(method="isa")), ["method", "isa", "frepo"]),
        (dict(class_order=1, changes=dict(application="membership")), ["application", "membership", "continual"]),
        (dict(class_order=1, changes=dict(data="tiny_imagenet")), ["data", "tiny_imagenet", "cifar100"]),
        (dict(class_order=1, changes=dict(content="9f9f")), ["content", "9f9f", "0a1b"]),
        (dict(class_order=1, steps=200), ["--steps 200", "100"]),
        (dict(class_order=1, class_steps=10), ["--class-steps 10", "5"]),
        (dict(class_order=1, eval_runs=3), ["--eval-runs 3", "5"]),
        (dict(class_order=1, drop=["application"]), ["--application"]),
        (dict(), ["--class-order", "--member-chunk", "--seed", "once"]),
    ],
)
def test_main_refuses_runs_that_do_not_go_together(tmp_path, second, words):
    folders = [write_run(tmp_path / "one", continual_curves())]
    folders.append(write_run(tmp_path / "two", continual_curves(), **second))
    line = refuse(lambda: main(Args(tuple(folders))), *words)
    assert folders[1] in line or not second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]  # nothing written


def test_main_takes_runs_that_differ_in_one_of_their_own_flags_and_names_it(tmp_path, capsys):
    first = write_run(tmp_path / "0", continual_curves())
    for flag, words in (("class_order", "class orders"), ("member_chunk", "chunks"), ("seed", "seeds")):
        folders = (first, write_run(tmp_path / flag, continual_curves(), **{flag: 1}))
        assert [run[flag] for run in main(Args(folders))["runs"]] == [0, 1]
        assert f"over 2 {words}\n" in capsys.readouterr().out


def test_main_refuses_an_out_folder_that_is_a_file(tmp_path):
    folders = tuple(write_run(tmp_path / f"{i}", continual_curves(), class_order=i) for i in range(2))
    (tmp_path / "file").write_text("")
    refuse(lambda: main(Args(folders, out=str(tmp_path / "file"))), "--out", str(tmp_path / "file"))


def test_main_refuses_the_same_order_among_three(tmp_path):
    folders = [write_run(tmp_path / f"{i}", continual_curves(), class_order=i % 2) for i in range(3)]
    refuse(lambda: main(Args(tuple(folders))), "same", "once")


@pytest.mark.parametrize("kept", [None, "{", ""])
def test_main_refuses_a_folder_without_a_readable_result(tmp_path, kept):
    one, two = write_run(tmp_path / "one", continual_curves()), tmp_path / "two"
    two.mkdir()
    if kept is not None:
        (two / "result.json").write_text(kept)
    refuse(lambda: main(Args((one, str(two)))), str(two), "result.json", "finished")
    refuse(lambda: main(Args((one, str(tmp_path / "none")))), str(tmp_path / "none"), "result.json")


def test_the_command_itself(tmp_path):
    for i in range(2):
        write_run(tmp_path / f"runs/{i}", continual_curves(i / 10), class_order=i)
    command = [sys.executable, "-m", "common.applications", str(tmp_path / "runs/0"), str(tmp_path / "runs/1")]
    here = Path(common.applications.__file__).parents[1]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    result = json.loads((tmp_path / "out/cifar100__frepo__continual.json").read_text())
    assert (tmp_path / "out/cifar100__frepo__continual.png").exists()
    assert re.sub(r"\s+", " ", done.stdout).startswith("conv 20 40 random real 75.0 ± 7.1 45.0 ± 7.1 distilled 85.0")
    assert result["curves"]["distilled"]["krr"][0]["values"] == pytest.approx([0.8, 0.9])


# -------------------------------------------------------------------------------------------------------- part of a set


def test_part_of_takes_images_and_labels_by_index(digits):
    threes, index = (digits.y_train == 3).nonzero()[:, 0], torch.tensor([7, 2, 2, 300])
    part = part_of(digits, threes, index)
    wanted = [i for i, label in enumerate(digits.y_train.tolist()) if label == 3]
    assert len(part.x_train) == len(part.y_train) == len(wanted) > 100
    assert all(torch.equal(part.x_train[place], digits.x_train[i]) for place, i in enumerate(wanted))
    assert part.y_train.tolist() == [3] * len(wanted)  # its number in the whole
    assert len(part.x_test) == 4
    for place, i in enumerate(index.tolist()):
        assert torch.equal(part.x_test[place], digits.x_test[i]) and part.y_test[place] == digits.y_test[i]
    new = {"x_train", "y_train", "x_test", "y_test", "content"}
    for field in {field.name for field in dataclasses.fields(digits)} - new:  # names, mean and std are kept
        its, of_whole = getattr(part, field), getattr(digits, field)
        assert torch.equal(its, of_whole) if torch.is_tensor(its) else its == of_whole, field
    assert part.num_classes == 10


def test_part_of_copies(digits):
    part = part_of(digits, torch.arange(len(digits.x_train)), torch.arange(len(digits.x_test)))
    before = [int(each.long().sum()) for each in (digits.x_train, digits.y_train, digits.x_test, digits.y_test)]
    for each in (part.x_train, part.y_train, part.x_test, part.y_test):
        each.zero_()
    assert before == [int(e.long().sum()) for e in (digits.x_train, digits.y_train, digits.x_test, digits.y_test)]
    assert min(before) > 0


def test_the_content_of_a_part_is_its_own(digits):
    i, j = torch.arange(20), torch.arange(5)
    pairs = [(i, j), (i, j[:4]), (i[:19], j), (j, i), (i.flip(0), j), (torch.arange(0), j)]
    contents = [part_of(digits, *pair).content for pair in pairs]
    other = dataclasses.replace(digits, content="another set")
    contents += [digits.content, hold_out(digits, 0.1, 0)[0].content, part_of(other, i, j).content]
    assert len(set(contents)) == 9
    assert part_of(digits, i.clone(), j).content == contents[0]


# ----------------------------------------------------------------------------------------------------- losses, students


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("loss", ["mse", "xent", "softxent"])
def test_losses_of_each_image_equal_their_loops(loss, temperature):
    scores, y = draw(7, 4, dtype=F64), draw(7, 4, seed=1, dtype=F64)
    wanted = []
    for row, target in zip(scores.tolist(), y.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(score) for score in row))
        if loss == "mse":
            wanted.append(sum((score - t) ** 2 for score, t in zip(row, target, strict=True)) / 2)
        elif loss == "xent":
            wanted.append(log_sum - row[target.index(max(target))])
        else:
            odds = [math.exp(t / temperature) for t in target]
            wanted.append(sum(o / sum(odds) * (log_sum - score) for o, score in zip(odds, row, strict=True)))
    found = losses_of(scores, y, loss, temperature)
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    assert float(student_loss(scores, y, loss, temperature)) == pytest.approx(statistics.mean(wanted), rel=1e-12)


def fitted(digits, net, steps, after=None, **changes):
    """Train on 60 digits with augmentation; returns the net's state."""
    inputs = Inputs(digits.x_train[:60], digits.mean, digits.std, None, CPU, 0.0)
    recipe = Recipe(steps=steps, batch=25, lr=3e-3, dsa="crop_rotate_cutout", **(CONSTANT | changes))
    after = {} if after is None else dict(after=after)
    fit_student(net, inputs, labels(digits.y_train[:60]), recipe, 4, 1, **after)
    return state_of(net)


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(ones, others):
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


def fresh(name="conv"):
    with seeded("fresh"):
        return Normed() if name == "normed" else frepo_student(name, 1, 8, 10, (4, 8))


def test_after_sees_the_weights_of_every_update_and_those_are_of_a_shorter_run(digits):
    """At a constant rate one student is measured at all numbers of updates (FRePo's departure 12)."""
    assert {student_lr(step, Recipe(steps=9, lr=3e-3, **CONSTANT)) for step in range(9)} == {3e-3}
    net, seen = fresh(), []
    last = fitted(digits, net, 9, after=lambda done: seen.append((done, state_of(net))))
    assert [done for done, _ in seen] == list(range(1, 10))
    assert same(seen[-1][1], last)
    for steps in (1, 2, 5, 9):
        assert same(seen[steps - 1][1], fitted(digits, fresh(), steps)), steps
    assert not any(same(seen[i][1], seen[i + 1][1]) for i in range(8))
    short = fitted(digits, fresh(), 5, warm_up=500, lr_end=0.01)
    assert not same(seen[4][1], short)  # on the usual schedule it would not hold


@pytest.mark.parametrize("name", ["conv", "normed"])
def test_a_callback_in_eval_mode_does_not_change_training(digits, name):
    net, modes = fresh(name), []
    inputs = Inputs(digits.x_test, digits.mean, digits.std, None, CPU, 0.0)

    def measure(done):
        modes.append(net.training)
        outputs(net, inputs, torch.arange(30))
        net.eval()  # and left there

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = fitted(digits, fresh(name), 8)
        torch.manual_seed(0)  # of the dropout
        found = fitted(digits, net, 8, after=measure)
    assert same(found, plain)
    assert modes == [True] * 8 and net.training
    if name == "normed":
        trained = [training for training, gradients, _ in net.passes if gradients]
        assert trained == [True] * 8 and int(found["norm.num_batches_tracked"]) == 8
