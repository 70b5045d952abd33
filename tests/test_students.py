"""common/students.py: the schedule, the training and the scores against naive restatements; what rows share."""

import dataclasses
import itertools
import math
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from torch import nn

import common.students
import kernels
from common.artefact import Distilled
from common.augment import DSA, dsa
from common.data import Inputs, hold_out, load, normalise
from common.models import frepo_student
from common.run import rng
from common.students import (
    STEPS,
    STEPS_ISA,
    Recipe,
    evaluate_students,
    features_of,
    fit_student,
    krr_head,
    per_class,
    predict_seconds,
    score_student,
    stream_index,
    student_loss,
    student_lr,
    student_steps,
    table,
)

F64 = torch.float64
CPU = torch.device("cpu")


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# ------------------------------------------------------------------------------------------------------------- schedule

PUBLISHED = {10: 1000, 100: 2000, 200: 20000, 400: 5000, 500: 5000, 1000: 10000, 2000: 40000, 5000: 40000}
PUBLISHED_ISA = {10: 1000, 100: 2000, 200: 2000, 400: 5000, 500: 5000, 1000: 4000, 2000: 5000, 5000: 40000}


@pytest.mark.parametrize(("table", "published"), [(STEPS, PUBLISHED), (STEPS_ISA, PUBLISHED_ISA)])
def test_student_steps_are_the_published_ones_or_those_of_the_nearest_number(table, published):
    assert table == published
    for n in range(1, 20_000, 7):
        nearest = sorted((n / known if n > known else known / n, steps) for known, steps in published.items())
        assert student_steps(n, table) == nearest[0][1], n
    assert all(student_steps(n, table) == steps for n, steps in published.items())
    assert student_steps(50, table) == 2000  # 10 is nearer by difference, 100 by ratio


def rates(recipe):
    """The rate of every update and of one more: repeated additions, then torch's own cosine, a recursion."""
    warm_up = min(recipe.warm_up, recipe.steps // 2)
    values = [0.0]
    for _ in range(warm_up):
        values.append(values[-1] + recipe.lr / warm_up)
    values.pop()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    end = recipe.lr * recipe.lr_end
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps - warm_up, eta_min=end)
    while len(values) <= recipe.steps:
        values.append(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    return values


@pytest.mark.parametrize(
    ("steps", "changes"),
    [(1000, {}), (2000, {}), (5000, {}), (700, {}), (9, {}), (2, {}), (1, {}), (40, dict(warm_up=0)),
     (40, dict(warm_up=7, lr_end=0.3, lr=2.0))],
)  # fmt: skip
def test_student_lr_is_the_published_schedule(steps, changes):
    recipe = Recipe(steps=steps, **changes)
    found = [student_lr(step, recipe) for step in range(steps + 1)]
    assert found == pytest.approx(rates(recipe), rel=1e-9, abs=1e-15)
    top = found.index(recipe.lr)
    assert top == min(recipe.warm_up, steps // 2) and (top == 0 or found[0] == 0)
    assert all(a < b for a, b in itertools.pairwise(found[: top + 1]))
    assert all(a > b for a, b in itertools.pairwise(found[top:]))
    assert found[-1] == pytest.approx(recipe.lr_end * recipe.lr, rel=1e-12)


def test_the_defaults_are_published():
    """But for the augmentation, which the scripts name."""
    recipe = Recipe(steps=1000)
    assert (recipe.runs, recipe.batch, recipe.lr, recipe.warm_up, recipe.lr_end) == (5, 500, 3e-4, 500, 0.01)
    assert (recipe.loss, recipe.dsa, recipe.strengths, recipe.shared) == (
        "mse", "none", "frepo", False,
    )  # fmt: skip
    found = [student_lr(step, recipe) for step in (0, 1, 250, 500, 750, 1000)]
    assert found == pytest.approx([0, 6e-7, 1.5e-4, 3e-4, 1.515e-4, 3e-6], rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("loss", ["mse", "xent", "softxent"])
def test_student_loss_equals_its_loops(loss, temperature):
    scores, y = draw(7, 4), draw(7, 4, seed=1)
    terms = []
    for row, wanted in zip(scores.tolist(), y.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(score) for score in row))
        if loss == "mse":
            terms.append(sum((score - target) ** 2 for score, target in zip(row, wanted, strict=True)) / 2)
        elif loss == "xent":
            terms.append(log_sum - row[wanted.index(max(wanted))])
        else:
            odds = [math.exp(target / temperature) for target in wanted]
            terms.append(sum(o / sum(odds) * (log_sum - score) for o, score in zip(odds, row, strict=True)))
    assert float(student_loss(scores, y, loss, temperature)) == pytest.approx(sum(terms) / 7, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ the order


def stream(n, shuffle, epochs, *key):
    """The endless stream as one list."""
    orders = (torch.randperm(n, generator=rng("student order", *key, epoch)).tolist() for epoch in range(epochs))
    return list(itertools.chain(*orders)) if shuffle else list(range(n)) * epochs


@pytest.mark.parametrize(("n", "batch"), [(7, 5), (20, 5), (5, 5), (3, 500), (12, 11)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_stream_index_is_a_stream_of_whole_epochs(n, batch, shuffle):
    wanted, size = stream(n, shuffle, 30, 3, 1), min(n, batch)
    steps = range(30 * n // size)
    found = [stream_index(step, n, batch, shuffle, 3, 1) for step in steps]
    assert [index.tolist() for index in found] == [wanted[step * size : (step + 1) * size] for step in steps]
    whole = torch.cat(found).tolist()
    for epoch in range(len(whole) // n):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(range(n))
    for step in (7, 2, 25, 0):  # any order: a resumed evaluation starts anywhere
        assert torch.equal(stream_index(step, n, batch, shuffle, 3, 1), found[step])


def test_shuffled_epochs_and_students_differ():
    epochs = [stream_index(step, 20, 20, True, seed, run) for step in (0, 1) for seed in (0, 1) for run in (0, 1)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 8


def test_unshuffled_batches_are_the_published_blocks():
    """CIFAR-100, 10 a class: batches of 500 alternate between classes 0 to 49 and 50 to 99."""
    label = torch.arange(100).repeat_interleave(10)
    for step in range(6):
        seen = label[stream_index(step, 1000, 500, False, 0, 0)]
        assert seen.tolist() == sorted(list(range(50)) * 10) if step % 2 == 0 else sorted(list(range(50, 100)) * 10)


# ------------------------------------------------------------------------------------------------------------- training


class LinearNet(nn.Module):
    """A linear network that keeps what it is given."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.linear, self.seen = nn.Linear(inputs, classes, dtype=F64), []
        with torch.no_grad():
            self.linear.weight.copy_(draw(classes, inputs, seed=8))
            self.linear.bias.copy_(draw(classes, seed=9))

    def forward(self, x):
        assert self.training
        self.seen.append(x.detach().clone())
        return self.linear(x.flatten(1))


def softmax(x):
    odds = np.exp(x)
    return odds / odds.sum(1, keepdims=True)


def naive_fit(net, x, y, recipe, *key):
    """Weights (classes, inputs + 1), the bias last, by Adam as it is written in its paper and gradients by hand."""
    x, y = np.hstack([x.flatten(1).numpy(), np.ones((len(x), 1))]), y.numpy()
    w = np.hstack([net.linear.weight.detach().numpy(), net.linear.bias.detach().numpy()[:, None]])
    m, v, size = np.zeros_like(w), np.zeros_like(w), min(len(x), recipe.batch)
    order = stream(len(x), recipe.shuffle, recipe.steps, *key)
    for step, lr in zip(range(recipe.steps), rates(recipe), strict=False):
        index = order[step * size : (step + 1) * size]
        scores = x[index] @ w.T
        if recipe.loss == "mse":
            error = scores - y[index]
        elif recipe.loss == "xent":
            error = softmax(scores) - np.eye(y.shape[1])[y[index].argmax(1)]
        else:
            error = softmax(scores) - softmax(y[index] / recipe.temperature)
        g = error.T @ x[index] / size
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - lr * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
    return w


@pytest.mark.parametrize("batch", [3, 7, 500])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("loss", ["mse", "xent", "softxent"])
def test_fit_student_equals_adam_by_hand(loss, shuffle, batch):
    x, y, net = draw(7, 2, 3, 3), draw(7, 4, seed=1), LinearNet(18, 4)
    recipe = Recipe(steps=12, batch=batch, lr=0.05, warm_up=4, loss=loss, temperature=0.3, dsa="none", shuffle=shuffle)
    expected = naive_fit(net, x, y, recipe, 5, 2)
    fit_student(net.eval(), lambda index: x[index], y, recipe, 5, 2)
    found = torch.cat([net.linear.weight, net.linear.bias[:, None]], 1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
    assert net.training


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("strengths", ["frepo", "dc"])
def test_every_batch_is_augmented_from_the_students_own_generator(strengths, shared):
    x, y = draw(9, 3, 8, 8), draw(9, 4, seed=1)
    strategy = "_".join(DSA[strengths])
    recipe = Recipe(steps=12, batch=4, dsa=strategy, strengths=strengths, shared=shared)
    for key in ((5, 2), (5, 3)):
        net, order = LinearNet(192, 4), stream(9, True, 12, *key)
        fit_student(net, lambda index: x[index], y, recipe, *key)
        generator = rng("student augmentation", *key)
        batches = [x[order[4 * step : 4 * step + 4]] for step in range(12)]
        assert equal(net.seen, [dsa(batch, generator, strategy, strengths, shared) for batch in batches])
        assert sum(not torch.equal(seen, batch) for seen, batch in zip(net.seen, batches, strict=True)) > 6


def test_a_student_that_diverges_is_refused():
    x, y = draw(7, 2, 3, 3), draw(7, 4, seed=1)
    recipe = Recipe(steps=4, lr=1e200, dsa="none")
    refuse(lambda: fit_student(LinearNet(18, 4), lambda i: x[i], y, recipe, 0), "7 images", "--eval-lr 1e+200")
    fit_student(LinearNet(18, 4), lambda i: x[i], y, dataclasses.replace(recipe, lr=1e-3), 0)


# --------------------------------------------------------------------------------------------------------------- scores


class Probed(nn.Module):
    """Features that depend on the mode (BatchNorm) and are not the same mirrored; two classes."""

    def __init__(self):
        super().__init__()
        self.norm, self.sizes = nn.BatchNorm2d(1, dtype=F64), []
        self.norm.running_mean.fill_(0.4), self.norm.running_var.fill_(3.0)
        self.head = nn.Linear(6, 2, dtype=F64)
        with torch.no_grad():
            self.head.weight.copy_(draw(2, 6, seed=4)), self.head.bias.copy_(draw(2, seed=5))

    def features(self, x):
        self.sizes.append(len(x))
        return (self.norm(x) * (1 + torch.arange(3))).flatten(1).cos()


def by_hand(x):
    """Features of Probed in eval mode, of images (N, 1, 2, 3) in numpy."""
    return np.cos((x - 0.4) / np.sqrt(3 + 1e-5) * np.array([1, 2, 3])).reshape(len(x), -1)


def naive_krr(f_test, f_s, y_s, ridge):
    """Scores from the kernel matrices as they are defined, with lam = ridge * trace / n."""
    k = f_s @ f_s.T
    return f_test @ f_s.T @ np.linalg.solve(k + ridge * np.trace(k) / len(k) * np.eye(len(k)), y_s)


def share(scores, y):
    return sum(int(row.argmax()) == int(label) for row, label in zip(scores, y, strict=True)) / len(y)


def test_features_are_those_of_every_image_in_order():
    net, x = Probed().eval(), draw(600, 1, 2, 3)
    found = features_of(net, lambda index: x[index], 600)
    np.testing.assert_allclose(found.numpy(), by_hand(x.numpy()), rtol=1e-12, atol=1e-14)
    assert net.sizes == [256, 256, 88] and not found.requires_grad
    assert torch.equal(features_of(net, lambda index: x[index], 10), found[:10])


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
@pytest.mark.parametrize(("n", "d"), [(8, 30), (30, 8)])
def test_krr_head_is_that_of_kernel_ridge_regression(clean_record, n, d, ridge, dtype):
    """In float64 whatever the features are in."""
    f_s, y_s, f_test = draw(n, d).to(dtype), draw(n, 3, seed=1).to(dtype), draw(50, d, seed=2)
    expected = naive_krr(f_test.numpy(), *(x.double().numpy() for x in (f_s, y_s)), ridge)
    np.testing.assert_allclose((f_test @ krr_head(f_s, y_s, ridge)).numpy(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("flip", [False, True])
def test_score_student_takes_the_networks_head_and_the_ridge_on_its_features(clean_record, flip):
    data = draw(340, 1, 2, 3)
    x, x_test, y, y_test = data[:40], data[40:], draw(40, 2, seed=1), torch.arange(300) % 2
    net, recipe = Probed().train(), Recipe(steps=1, ridge=0.03, flip=flip)

    class Test:
        def __len__(self):
            return 300

        def __call__(self, index):
            return x_test[index]

    found = score_student(net, lambda index: x[index], y, Test(), y_test, recipe, True)
    f_test, f_s, y_s = by_hand(x_test.numpy()), by_hand(x.numpy()), y.numpy()
    if flip:
        f_s, y_s = np.vstack([f_s, by_hand(x.numpy()[..., ::-1])]), np.vstack([y_s, y_s])
    head = f_test @ net.head.weight.detach().numpy().T + net.head.bias.detach().numpy()
    ridge = naive_krr(f_test, f_s, y_s, 0.03)
    wanted = {"accuracy": share(head, y_test), "krr": share(ridge, y_test)}
    assert found == pytest.approx(wanted, abs=1e-6) and len(set(wanted.values())) == 2
    assert net.sizes == [40] * (2 if flip else 1) + [256, 44]  # a large test set is never in memory as a whole
    alone = score_student(net, lambda index: 1 / 0, y, Test(), y_test, recipe, False)
    assert alone == {"accuracy": found["accuracy"]}


# ----------------------------------------------------------------------------------------------------------------- rows


def test_per_class_draws_each_class_anew_and_in_order():
    y = torch.tensor([0] * 9 + [1] * 30 + [2] * 3 + [3] * 12)[torch.randperm(54, generator=rng("mixed"))]
    sets = []
    for run in range(60):
        index = per_class(y, 5, "real", 0, run)
        order = torch.randperm(54, generator=rng("real", 0, run)).tolist()
        assert index.tolist() == [i for label in range(4) for i in [i for i in order if y[i] == label][:5]]
        assert y[index].tolist() == [0] * 5 + [1] * 5 + [2] * 3 + [3] * 5  # all of a class that has fewer
        assert len(set(index.tolist())) == 18
        sets.append(tuple(index.tolist()))
    assert len(set(sets)) == 60 and set(itertools.chain(*sets)) == set(range(54))
    assert tuple(per_class(y, 5, "real", 0, 3).tolist()) == sets[3]


ROWS, MODELS, SEED, IPC = ("random_real", "distilled", "all_real"), ("conv", "dcconv"), 3, 2
TINY = Recipe(steps=12, runs=2, batch=16, lr=3e-3, warm_up=4, ridge=1e-3, dsa="color_crop_rotate")
WIDTHS = (4, 8)


def labels(y):
    """Not what the scripts give, so that it shows where they come from."""
    return 2 * F.one_hot(y, 10).float() - 0.3


@pytest.fixture(scope="module")
def few():
    """300 training and 100 test images."""
    digits = load("digits")
    parts = dict(x_train=digits.x_train[:300], y_train=digits.y_train[:300])
    return dataclasses.replace(digits, **parts, x_test=digits.x_test[:100], y_test=digits.y_test[:100])


def inputs(data):
    return [Inputs(x, data.mean, data.std, None, CPU, 0.0) for x in (data.x_train, data.x_test)]


def real(data, run):
    """What the run-th student of random_real is trained on."""
    order = torch.randperm(len(data.y_train), generator=rng("random real", SEED, run)).tolist()
    index = [i for label in range(10) for i in [i for i in order if data.y_train[i] == label][:IPC]]
    return normalise(data.x_train[index], data.mean, data.std), labels(data.y_train[index])


def as_distilled(x, y):
    """A set whose inputs() are x exactly, but whose pixels are not."""
    plain = dict(method="frepo", data="digits", y_is="class scores", class_names=[], resize="none")
    return Distilled(2 * x, y, torch.zeros(1), torch.full((1,), 2.0), **plain, step=7, seed=0, recipe={})


class Watch:
    """Records every student: what it starts from and is trained on, and itself when it is trained."""

    def __init__(self, monkeypatch):
        self.fits, self.fit, self.stop_at = [], common.students.fit_student, None
        monkeypatch.setattr(common.students, "fit_student", self)

    def __call__(self, net, images, y, recipe, *key):
        if len(self.fits) == self.stop_at:
            raise KeyboardInterrupt
        start = [p.detach().clone() for p in net.parameters()]
        self.fit(net, images, y, recipe, *key)
        self.fits.append(dict(net=net, start=start, x=images(torch.arange(len(y))), y=y, recipe=recipe, key=key))


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def evaluate(data, distilled, recipe=TINY, seed=SEED, models=MODELS, rows=ROWS, keep=None):
    train, test = inputs(data)
    return evaluate_students(
        distilled, data, train, test, labels, WIDTHS, CPU, recipe, seed, models, rows, keep
    )  # fmt: skip


@pytest.fixture(scope="module")
def scored(few):
    """One evaluation, and its students by (row, model, run). "distilled" is what random_real draws for student 1."""
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        results = evaluate(few, as_distilled(*real(few, 1)))
    assert torch.equal(torch.get_rng_state(), before)  # torch's own generator is nobody's business
    return results, dict(zip(itertools.product(ROWS, MODELS, range(2)), watch.fits, strict=True))


def test_rows_are_trained_on_what_they_say(scored, few):
    everything = normalise(few.x_train, few.mean, few.std), labels(few.y_train)
    for (row, model, run), fit in scored[1].items():
        x, y = {"random_real": real(few, run), "distilled": real(few, 1), "all_real": everything}[row]
        assert torch.equal(fit["x"], x) and torch.equal(fit["y"], y), (row, model, run)
        assert fit["key"] == (SEED, run) and fit["recipe"] is TINY
    assert not torch.equal(real(few, 0)[0], real(few, 1)[0])


def test_students_of_all_rows_start_alike(scored):
    students = scored[1]
    for row, model, run in students:
        assert equal(students[row, model, run]["start"], students["distilled", model, run]["start"])
    for model in MODELS:
        assert not equal(students["distilled", model, 0]["start"], students["distilled", model, 1]["start"])
    shapes = [[p.shape for p in frepo_student(model, 1, 8, 10, WIDTHS).parameters()] for model in MODELS]
    assert [[p.shape for p in students["distilled", model, 0]["start"]] for model in MODELS] == shapes


def test_equal_sets_score_equal(scored):
    real_row, distilled = scored[0]["random_real"], scored[0]["distilled"]
    assert real_row != distilled  # the first students' sets differ
    for column in (*MODELS, "krr"):
        assert real_row[column]["values"][1] == distilled[column]["values"][1]


def test_random_real_images_and_labels_are_not_those_of_the_distilled_set(scored, few):
    distilled = as_distilled(draw(20, 1, 8, 8, dtype=torch.float32), draw(20, 10, dtype=torch.float32))
    assert evaluate(few, distilled, rows=("random_real",))["random_real"] == scored[0]["random_real"]


def test_scores_are_of_the_trained_students_on_the_test_images(scored, few):
    results, students = scored
    assert tuple(results) == ROWS
    assert set(results["distilled"]) == set(results["random_real"]) == {*MODELS, "krr"}
    assert set(results["all_real"]) == set(MODELS)
    x_test = normalise(few.x_test, few.mean, few.std)
    ridges = {}
    for (row, model, run), fit in students.items():
        with torch.no_grad():
            net = fit["net"].eval()
            assert results[row][model]["values"][run] == pytest.approx(share(net(x_test), few.y_test), abs=1e-6)
            f_test, f_s = (net.features(x).double().numpy() for x in (x_test, fit["x"]))
        ridges[row, model, run] = share(naive_krr(f_test, f_s, fit["y"].double().numpy(), 1e-3), few.y_test)
    for row in ("random_real", "distilled"):
        of_model = {model: [ridges[row, model, run] for run in range(2)] for model in MODELS}
        assert results[row]["krr"]["values"] == pytest.approx(of_model["conv"], abs=1e-6)  # of the first model
        assert of_model["conv"] != of_model["dcconv"]
    for column in itertools.chain(*(row.values() for row in results.values())):
        assert column["mean"] == pytest.approx(statistics.mean(column["values"]))
        assert column["std"] == pytest.approx(statistics.stdev(column["values"]))


def test_test_images_change_nothing_but_the_scores(scored, few, watch):
    poisoned = dataclasses.replace(few, x_test=255 - few.x_test, y_test=(few.y_test + 1) % 10)
    results = evaluate(poisoned, as_distilled(*real(few, 1)))
    for fit, other in zip(watch.fits, scored[1].values(), strict=True):
        assert equal(fit["net"].state_dict().values(), other["net"].state_dict().values())
    assert results != scored[0]


def test_a_ridge_that_fails_stops_the_evaluation(few, clean_record, tmp_path):
    keep, recipe = tmp_path / "evaluation.json", dataclasses.replace(TINY, ridge=-1.0)  # indefinite
    with pytest.raises(kernels.FailedFactorization, match="7"):
        evaluate(few, as_distilled(*real(few, 1)), recipe, models=("conv",), rows=("distilled",), keep=keep)
    assert not keep.exists()


# ----------------------------------------------------------------------------------------------------- long evaluations


def test_a_stopped_evaluation_goes_on_at_the_student_it_was_at(scored, few, tmp_path, watch):
    keep, distilled = tmp_path / "evaluation.json", as_distilled(*real(few, 1))

    def run(fits, **changes):
        watch.fits.clear()
        results = evaluate(few, distilled, keep=keep, **changes)
        assert len(watch.fits) == fits
        return results

    watch.stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(None)
    watch.stop_at = None
    assert run(12 - 5) == scored[0]
    starts = [fit["start"] for fit in list(scored[1].values())[5:]]
    assert all(equal(fit["start"], start) for fit, start in zip(watch.fits, starts, strict=True))
    assert run(0) == scored[0]
    more = run(6, recipe=dataclasses.replace(TINY, runs=3))
    assert [fit["key"] for fit in watch.fits] == [(SEED, 2)] * 6
    assert run(0) == scored[0]
    one = run(0, recipe=dataclasses.replace(TINY, runs=1))
    for row in ROWS:
        for column, before in scored[0][row].items():
            values = more[row][column]["values"]
            assert len(values) == 3 and values[:2] == before["values"]
            assert one[row][column] == dict(values=values[:1], mean=values[0], std=0.0)
    assert run(0, models=("dcconv",), rows=("distilled",))["distilled"]["dcconv"] == scored[0]["distilled"]["dcconv"]
    assert run(2 * 3, models=("dcconv", "kipconv"))["all_real"]["dcconv"] == scored[0]["all_real"]["dcconv"]


CHANGED = dict(
    steps=13, batch=15, lr=1e-3, warm_up=3, lr_end=0.5, loss="xent", temperature=2.0, dsa="none", strengths="dc",
    shared=True, shuffle=False, ridge=1e-2, flip=True,
)  # fmt: skip


def test_scores_of_another_set_or_recipe_are_not_taken(few, tmp_path, watch):
    distilled, known = as_distilled(*real(few, 1)), tmp_path / "evaluation.json"
    kept = dict(models=("conv",), rows=("distilled",), keep=known)
    evaluate(few, distilled, dataclasses.replace(TINY, runs=1), **kept)
    text, watch.stop_at = known.read_text(), 0  # a student that is trained from here on: KeyboardInterrupt
    watch.fits.clear()
    evaluate(few, distilled, dataclasses.replace(TINY, runs=1), **kept)
    assert {field.name for field in dataclasses.fields(Recipe)} == {"runs", *CHANGED}
    recipes = [{name: value} for name, value in CHANGED.items()]
    others = [(few, distilled, dict(recipe=dataclasses.replace(TINY, runs=1, **change))) for change in recipes]
    others += [
        (few, distilled, dict(seed=4)),
        (few, dataclasses.replace(distilled, x=distilled.x * 1.01), {}),
        (few, dataclasses.replace(distilled, y=distilled.y * 1.01), {}),
        (dataclasses.replace(few, content="others"), distilled, {}),
    ]
    for data, other, changes in others:
        with pytest.raises(KeyboardInterrupt):
            evaluate(data, other, **dict(recipe=dataclasses.replace(TINY, runs=1)) | kept | changes)
        assert known.read_text() == text
    known.write_text("{half a file")
    with pytest.raises(KeyboardInterrupt):
        evaluate(few, distilled, dataclasses.replace(TINY, runs=1), **kept)


def test_scores_on_images_held_out_are_not_taken_for_those_on_the_test_images(few, tmp_path, watch):
    """The selected set has been scored on held-out images, with the same recipe and content."""
    data, curve_data = hold_out(few, 0.25, 0)
    short = dict(models=("conv",), rows=("distilled",))
    distilled = as_distilled(*real(data, 1))
    kept = dict(short, keep=tmp_path / "evaluation.json")
    curve = evaluate(curve_data, distilled, **kept)
    assert data.content == curve_data.content and len(watch.fits) == 2
    final = evaluate(data, distilled, **kept)
    assert final == evaluate(data, distilled, **short) and final != curve


# ----------------------------------------------------------------------------------------------------------- prediction


def test_the_prediction_counts_updates_and_test_images(few, monkeypatch):
    """Every call that is timed takes one second: five updates, or a pass of 256 images."""
    monkeypatch.setattr(common.students, "seconds_of", lambda function, device: function() or 1.0)
    monkeypatch.setattr(common.students, "features_of", lambda *args: None)
    monkeypatch.setattr(common.students, "fit_student", lambda *args: None)

    def predict(models=("conv",), rows=("distilled",), data=few, **changes):
        recipe = dataclasses.replace(TINY, **dict(runs=1, steps=30) | changes)
        return predict_seconds(data, 20, 10, WIDTHS, CPU, recipe, models, rows)

    once = 30 / 5 + 100 / 256
    assert predict() == pytest.approx(once)
    assert predict(MODELS, ROWS, runs=7) == pytest.approx(2 * 3 * 7 * once)
    assert predict(steps=60) == pytest.approx(60 / 5 + 100 / 256)
    other = dataclasses.replace(few, x_test=few.x_train)
    assert predict(data=other) == pytest.approx(30 / 5 + 300 / 256)


@pytest.mark.parametrize("batch", [16, 500])
def test_the_prediction_is_of_the_work_that_is_done(few, monkeypatch, batch):
    """Time that passes only in networks: 3 for an image of an update, 1 for an image that is scored."""
    passed, students = Counter(), frepo_student

    def slow(name, *rest):
        net = students(name, *rest)
        whole = net.features

        def features(x):
            passed[name] += (3 if torch.is_grad_enabled() else 1) * len(x)
            return whole(x)

        net.features = features
        return net

    def seconds(function, device):
        before = passed.total()
        function()
        return passed.total() - before

    monkeypatch.setattr(common.students, "frepo_student", slow)
    monkeypatch.setattr(common.students, "seconds_of", seconds)
    recipe = dataclasses.replace(TINY, batch=batch)
    predicted = predict_seconds(few, 20, 10, WIDTHS, CPU, recipe, MODELS, ROWS)
    assert passed["conv"] == passed["dcconv"] > 0  # each model is timed
    passed.clear()
    evaluate(few, as_distilled(*real(few, 1)), recipe)
    krr = 2 * len(MODELS) * recipe.runs * 20  # images of the ridge, of two rows: left out, an update takes more
    assert predicted == pytest.approx(passed.total() - krr)


# ----------------------------------------------------------------------------------------------------------------- text


def test_table_has_every_row_and_column():
    one, other = dict(mean=0.4567, std=0.012, values=[]), dict(mean=1.0, std=0.0, values=[])
    results = {"random_real": {"conv": one, "dcconv": other, "krr": one}, "all_real": {"conv": other}}
    lines = table(results, "what it is over").splitlines()
    assert lines[0].split() == ["conv", "dcconv", "krr"]
    assert lines[1].split() == ["random", "real", "45.7", "±", "1.2", "100.0", "±", "0.0", "45.7", "±", "1.2"]
    assert lines[2].split() == ["all", "real", "100.0", "±", "0.0", "-", "-"]
    assert lines[3] == "what it is over" and len(lines) == 4
    assert lines[1].startswith("random real") and len({len(line) for line in lines[:3]}) == 1
