"""boost_pca.py: budget, first code, networks and maps against naive restatements; the loop, rows, parts, resume."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import shutil
import sys
import textwrap
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refuse
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from watched import equal, same_end, start

import boost_pca
import common.pairs
import common.run
import krr_st
from boost_pca import Args, Pool, fit_budget, fit_networks, main, reduced_rank
from common.artefact import load_distilled
from common.baselines import kmeans_medoids
from common.bases import VIEWS, Code, Pca, feature_pca, quantised, storage
from common.data import load
from common.recipes import SETTINGS
from common.run import rng
from common.teacher import load_own

TINY = dict(
    steps=4, budget_images=12, num_images=5, batch_real=64, image_bases=6, feature_bases=5, downsample=2, balance=True,
    views="rotations", hidden=2, approx_steps=10, lr_img=1e-2, lr_label=1e-2, widths=(4, 4), pool=3, max_age=4,
    log_every=1, save_every=2, device="cpu", teacher_arch="resnet10", teacher_width=2, teacher_epochs=2,
    teacher_projector=8, eval_runs=2, eval_epochs=2, eval_probe_steps=2, eval_finetune_steps=0, compare=False,
    pairs_steps=3, pairs_lr_img=1e-1, pairs_lr_label=1e-2, cache_gb=1.0,
)  # fmt: skip
LEARNED = {"b_x", "c_x", "b_y", "c_y"}
NETWORKS = {"w1", "b1", "w2", "b2"}
CPU = torch.device("cpu")


def tiny(out_dir, **changes) -> Args:
    own = TINY
    if changes.get("teacher", "train") != "train":  # trained already: no settings beside it
        own = {key: value for key, value in own.items() if key.removeprefix("teacher_") not in SETTINGS}
    return Args(**own | {"out_dir": str(out_dir)} | changes)


def cheap(monkeypatch) -> None:
    """The score of a network is its match error alone, nothing is timed beforehand or drawn."""

    def score(net, data, targets_test, device, *rest):
        x = (data.x_test.float() / 255 - data.mean[:, None, None]) / data.std[:, None, None]
        with torch.no_grad():
            return {"match": common.pairs.matching_error(net.eval()(x), targets_test)}

    monkeypatch.setattr(common.pairs, "score_network", score)
    monkeypatch.setattr(common.pairs, "probes", lambda *args: {"probe": 0.5})
    monkeypatch.setattr(boost_pca, "predict_seconds", lambda *args: 0.0)
    monkeypatch.setattr(common.run.Run, "plot", lambda *args: None)
    monkeypatch.setattr(common.run.Run, "grid", lambda *args: None)


@pytest.fixture
def quick(monkeypatch):
    cheap(monkeypatch)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """An out-dir with a trained teacher, and the tiny run that all others are compared with."""
    out_dir = tmp_path_factory.mktemp("teachers")
    with pytest.MonkeyPatch.context() as patch:
        cheap(patch)
        result = main(tiny(out_dir, compare=True))
    return out_dir, result


@pytest.fixture
def out_dir(tmp_path, teachers):
    shutil.copytree(teachers[0] / "teachers", tmp_path / "runs" / "teachers")
    return tmp_path / "runs"


def only_run(out_dir: Path) -> Path:
    (folder,) = [p for p in out_dir.iterdir() if p.name != "teachers"]
    return folder


def checkpoint(folder: Path) -> dict:
    return common.run.load_checkpoint(folder / "checkpoint.pt")


def targets_of(out_dir: Path, split: str = "train") -> torch.Tensor:
    (path,) = (out_dir / "teachers").glob(f"*/targets-{split}-*")
    return load_file(path)["targets"]


def pixels(data, x: torch.Tensor) -> torch.Tensor:
    """Normalised, float64."""
    mean, std = (value.double()[:, None, None] for value in (data.mean, data.std))
    return (x.double() / 255 - mean) / std


def draw(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("views", ["none", "flips", "rotations", "dihedral"])
@pytest.mark.parametrize("approx", ["after", "joint", "rank", "none"])
def test_the_floats_of_the_budget_are_those_of_the_file(approx, views, dtype):
    """Of a code as main builds it, counted tensor by tensor; int8 has its scales beside them."""
    m, a, u, v, h, dim, basis = 7, len(VIEWS[views]), 6, 5, 3, 11, 2 * 4 * 4
    code = dict(b_x=draw(u, basis), c_x=draw(m, u), mu_x=draw(basis), b_y=draw(v, dim), c_y=draw(m, v), mu_y=draw(dim))
    if a and approx == "none":
        code["c_v"] = draw(a, m, v)
    elif a and approx == "rank":
        code |= reduced_rank(code["c_y"], draw(a, m, v), code["b_y"], h)
    elif a:
        code |= fit_networks(code["c_y"], draw(a, m, v), code["b_y"], h, 1, 0.01, 0)
    Code(quantised(code, dtype), (2, 4, 4), 2, VIEWS[views]).check()
    parts = boost_pca.code_floats(m, basis, dim, u, v, a, approx, h, dtype)
    assert storage(quantised(code, dtype), (2, 8, 8), dim)["floats"] == sum(parts.values())
    assert parts["scales"] == ((u + v + (a * v if approx == "none" else 0)) if dtype == "int8" else 0)
    assert parts["image bases"] == code["b_x"].numel() and parts["feature bases"] == code["b_y"].numel()
    assert parts["means"] == basis + dim
    assert parts["networks"] == sum(code[key].numel() for key in NETWORKS if key in code)
    assert parts["coefficients"] == sum(code[key].numel() for key in ("c_x", "c_y", "c_v") if key in code)


def test_the_budget_holds_as_many_as_fit():
    """By counting up: the sum for the most images fits, that of one more does not."""
    for trial in range(200):
        g = np.random.default_rng(trial)
        fixed, each, budget = (int(g.integers(low, high)) for low, high in ((0, 300), (1, 40), (1, 900)))
        floats_of = partial(lambda m, fixed, each: dict(bases=fixed, nothing=0, rest=m * each), fixed=fixed, each=each)
        most = 0
        while sum(floats_of(most + 1).values()) <= budget:
            most += 1
        if most:
            assert fit_budget(floats_of, budget, "", None) == fit_budget(floats_of, budget, "", most) == most
        else:
            refuse(partial(fit_budget, floats_of, budget, "3 images", None), f"which hold 0, not 1 images, {each} each")
        line = refuse(partial(fit_budget, floats_of, budget, "3 images", most + 1), "--budget-images", "--num-images")
        assert f"3 images are {budget} floats, which hold {most}, not {most + 1} images, {each} each: " in line
        assert f"rest {(most + 1) * each} = {fixed + (most + 1) * each};" in line
        assert (f"bases {fixed} + " in line) == (fixed > 0) and "nothing" not in line


# ---------------------------------------------------------------------------------------------------------- first code


def span(bases: torch.Tensor) -> list[torch.Tensor]:
    """Orthonormal vectors of the rows' span, by Gram and Schmidt; those that add nothing are left out."""
    found = []
    for row in bases:
        for _ in range(2):
            for each in found:
                row = row - (row @ each) * each
        if row.norm() > 1e-9:
            found.append(row / row.norm())
    return found


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("n", [40, 9, 3], ids=["many rows", "fewer rows than bases", "three rows"])
@pytest.mark.parametrize("kind", ["pca", "random", "real"])
def test_the_first_code_is_the_projection_on_its_bases(kind, n, balance):
    found = feature_pca((draw(60, 15) * torch.arange(1, 16) + 3).float(), 10, CPU)
    rows = draw(n, 15, seed=5) * 4 + 1
    bases, c = boost_pca.first_code(found, rows, kind, balance, 7, "features")
    assert bases.dtype == c.dtype == torch.float64 and bases.shape == (10, 15) and c.shape == (n, 10)
    directions = span(bases)
    assert len(directions) == (min(n, 10) if kind == "real" and n < 10 else 10) or (kind == "real" and n == 9)
    for i in range(n):
        centred = rows[i] - found.mean
        projection = sum((centred @ each) * each for each in directions)
        torch.testing.assert_close(c[i] @ bases, projection, rtol=1e-9, atol=1e-9)
    plain, c_plain = boost_pca.first_code(found, rows, kind, False, 7, "features")
    if balance:
        for k in range(10):  # a column that is taken from nothing keeps its bases' scale out of the floats
            size = max(math.sqrt(sum(float(value) ** 2 for value in c_plain[:, k]) / n), 1e-6)
            torch.testing.assert_close(bases[k], plain[k] * size)
            torch.testing.assert_close(c[:, k], c_plain[:, k] / size)
            if size > 1e-5:
                assert math.isclose(float(c[:, k].square().mean()), 1, rel_tol=1e-9)
    else:
        torch.testing.assert_close(bases.norm(dim=1), torch.ones(10, dtype=torch.float64))
    if kind == "pca":
        assert torch.equal(plain, found.bases)
        torch.testing.assert_close(c_plain, found.scores(rows))
    if kind == "random":
        torch.testing.assert_close(plain @ plain.T, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)
    if kind == "real":
        units = (rows - found.mean) / (rows - found.mean).norm(dim=1, keepdim=True)
        for base in plain:
            assert min(float((base - unit).norm()) for unit in units) < 1e-12


def test_the_first_code_is_keyed():
    found = Pca(torch.zeros(8, dtype=torch.float64), torch.eye(4, 8, dtype=torch.float64), torch.ones(4), 8.0)
    rows = draw(30, 8)
    for kind in ("random", "real"):
        bases = [boost_pca.first_code(found, rows, kind, False, *key)[0] for key in ((0, "a"), (0, "a"), (1, "a"))]
        assert torch.equal(bases[0], bases[1]) and not torch.equal(bases[0], bases[2])
        assert not torch.equal(bases[0], boost_pca.first_code(found, rows, kind, False, 0, "b")[0])


# ------------------------------------------------------------------------------------------------- networks of a shift


def shifted(c, q, relu):
    """(A, m, V) of the networks, in loops over views and images."""
    out = []
    for w1, b1, w2, b2 in zip(*(q[key] for key in ("w1", "b1", "w2", "b2")), strict=True):
        hidden = [w1 @ row + b1 for row in c]
        out.append(torch.stack([w2 @ (h.clamp(min=0) if relu else h) + b2 for h in hidden]))
    return torch.stack(out)


def problem(a=2, m=9, v=4, d=7, orthonormal=False):
    """c_y, the views' shifts, in part a function of it, and bases."""
    c, b = draw(m, v) * torch.tensor([3.0, 1, 0.5, 2])[:v], draw(v, d, seed=3)
    if orthonormal:
        b = torch.linalg.qr(b.T)[0].T
    target = torch.stack([c @ draw(v, v, seed=10 + i) + 0.3 * draw(m, v, seed=20 + i) + i + 1 for i in range(a)])
    return c, target, b


def naive_adam(c, target, b, q, steps, lr, views):
    """One network of one view: gradients of the mean squared error of the features by hand, Adam by the book."""
    m, d = len(c), b.shape[1]
    moments = {key: (torch.zeros_like(value), torch.zeros_like(value)) for key, value in q.items()}
    for t in range(1, steps + 1):
        grads = {key: torch.zeros_like(value) for key, value in q.items()}
        for i in range(m):
            before = q["w1"] @ c[i] + q["b1"]
            hidden = before.clamp(min=0)
            error = (q["w2"] @ hidden + q["b2"] - target[i]) @ b
            outer = 2 / (views * m * d) * (b @ error)  # (v,); the mean is over all views
            grads["b2"] += outer
            grads["w2"] += torch.outer(outer, hidden)
            inner = (q["w2"].T @ outer) * (before > 0)
            grads["b1"] += inner
            grads["w1"] += torch.outer(inner, c[i])
        for key, grad in grads.items():
            m1, m2 = moments[key]
            m1, m2 = 0.9 * m1 + 0.1 * grad, 0.999 * m2 + 0.001 * grad**2
            moments[key] = m1, m2
            step = m1 / (1 - 0.9**t) / ((m2 / (1 - 0.999**t)).sqrt() + 1e-8)
            q = q | {key: q[key] - lr * step}
    return q


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_networks_are_fitted_by_adam_each_view_by_itself(steps):
    c, target, b = problem()
    ours = fit_networks(c, target, b, 3, steps, 0.02, 5)
    first = fit_networks(c, target, b, 3, 0, 0.02, 5)
    size = math.sqrt(sum(float(value) ** 2 for value in c.flatten()) / c.numel())
    for view in range(2):
        scaled = {key: value[view] for key, value in first.items()}
        scaled |= dict(w1=scaled["w1"] * size, w2=scaled["w2"] / size, b2=scaled["b2"] / size)
        q = naive_adam(c / size, target[view] / size, b, scaled, steps, 0.02, views=2)
        q |= dict(w1=q["w1"] / size, w2=q["w2"] * size, b2=q["b2"] * size)
        for key, value in q.items():
            torch.testing.assert_close(ours[key][view], value, rtol=1e-9, atol=1e-9)


def test_the_first_weights_are_those_of_linear_layers():
    c, target, b = draw(5, 16), draw(3, 5, 16), draw(16, 20)
    q = fit_networks(c, target, b, 9, 0, 0.1, 1)
    size = c.square().mean().sqrt()
    for key, fan in (("w1", 16), ("b1", 16), ("w2", 9), ("b2", 9)):
        value = q[key] * {"w1": size, "b1": 1}.get(key, 1 / size) * fan**0.5  # of inputs of unit size: in -1 .. 1
        assert value.abs().max() <= 1 + 1e-6 and value.abs().max() > 0.8 and abs(value.mean()) < 0.3
        assert not torch.equal(value[0], value[1])
    square = fit_networks(c, target, b, 16, 0, 0.1, 1)  # layers of one shape do not begin alike
    assert not torch.allclose(square["w1"] * size, square["w2"] / size)
    assert not torch.allclose(square["b1"], square["b2"] / size)
    again, other = fit_networks(c, target, b, 9, 0, 0.1, 1), fit_networks(c, target, b, 9, 0, 0.1, 2)
    assert equal(q, again) and not any(torch.equal(q[key], other[key]) for key in q)


def test_fitting_does_not_depend_on_the_scale_of_the_coefficients():
    c, target, b = problem()
    q = fit_networks(c, target, b, 3, 60, 0.02, 0)
    large = fit_networks(1000 * c, 1000 * target, b, 3, 60, 0.02, 0)
    torch.testing.assert_close(shifted(1000 * c, large, True), 1000 * shifted(c, q, True), rtol=1e-6, atol=1e-5)


def test_fitting_networks_explains_the_shift():
    c, target, b = problem(m=30)
    q = fit_networks(c, target, b, 4, 800, 0.02, 0)
    first = fit_networks(c, target, b, 4, 0, 0.02, 0)
    assert max(boost_pca.unexplained(c, target, b, q, True)) < 0.25
    assert min(boost_pca.unexplained(c, target, b, first, True)) > 0.25
    assert not any(value.requires_grad for value in q.values())


def ridge_objective(c, target, b, q, ridge):
    """Of one view's affine map: squared error of the features, and the ridge on what the map adds to them."""
    x = c - c.mean(0)
    lam = ridge * x.square().sum() / c.shape[1]
    error = (shifted(c, {key: value[None] for key, value in q.items()}, False)[0] - target) @ b
    return error.square().sum() + lam * (q["w2"] @ q["w1"] @ torch.eye(c.shape[1]).double()).T.matmul(b).square().sum()


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_the_map_of_low_rank_is_the_best_there_is(rank, ridge, orthonormal):
    """No gradient is left, it is the projection of the full solution, and no descent from elsewhere gets below it."""
    c, target, b = problem(orthonormal=orthonormal)
    ours = reduced_rank(c, target, b, rank, ridge)
    for view in range(2):
        q = {key: value[view].clone().requires_grad_() for key, value in ours.items()}
        loss = ridge_objective(c, target[view], b, q, ridge)
        for key, grad in zip(q, torch.autograd.grad(loss, list(q.values())), strict=True):
            assert grad.norm() < 1e-9 * loss.detach() / q[key].detach().norm() + 1e-9, key
        # by eigenvectors of the fitted rows' second moments, of the features
        x, y = c - c.mean(0), target[view] - target[view].mean(0)
        lam = ridge * sum(float(value) ** 2 for value in x.flatten()) / x.shape[1]
        full = torch.linalg.inv(x.T @ x + lam * torch.eye(4).double()) @ x.T @ y @ b
        vectors = torch.linalg.eigh(full.T @ (x.T @ x + lam * torch.eye(4).double()) @ full)[1].flip(1)[:, :rank]
        expected = x @ full @ vectors @ vectors.T + target[view].mean(0) @ b
        fitted = shifted(c, {key: value[None].detach() for key, value in q.items()}, False)[0] @ b
        torch.testing.assert_close(fitted, expected, rtol=1e-8, atol=1e-8)
        if rank == 4:  # nothing is left out
            torch.testing.assert_close(fitted, x @ full + target[view].mean(0) @ b)
    assert [value.numel() for value in ours.values()] == [
        value.numel() for value in fit_networks(c, target, b, rank, 0, 0.1, 0).values()
    ]


def test_no_descent_from_twenty_starts_gets_below_the_map_of_low_rank():
    c, target, b = problem(a=1, m=12)
    best = ridge_objective(c, target[0], b, {k: v[0] for k, v in reduced_rank(c, target, b, 2, 0.01).items()}, 0.01)
    found = []
    for seed in range(20):
        q = {key: value[0].requires_grad_() for key, value in fit_networks(c, target, b, 2, 0, 0.1, seed).items()}
        optimizer = torch.optim.LBFGS(q.values(), max_iter=60, line_search_fn="strong_wolfe")

        def closure(q=q, optimizer=optimizer):
            optimizer.zero_grad()
            loss = ridge_objective(c, target[0], b, q, 0.01)
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(closure().item())
    assert min(found) >= float(best) * (1 - 1e-9) and min(found) < float(best) * 1.001


def test_the_map_of_one_image_is_its_shift():
    c, target, b = problem(m=1)
    q = reduced_rank(c, target, b, 2)
    torch.testing.assert_close(shifted(c, q, False), target)


def test_the_map_keeps_the_type_of_its_coefficients():
    c, target, b = (value.float() for value in problem())
    q = reduced_rank(c, target, b, 2)
    assert all(value.dtype == torch.float32 for value in q.values())
    exact = reduced_rank(*(value.double() for value in (c, target, b)), 2)
    torch.testing.assert_close(shifted(c.double(), {k: v.double() for k, v in q.items()}, False),
                               shifted(c.double(), exact, False), rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_unexplained_equals_loops(relu):
    c, target, b = problem()
    q = fit_networks(c, target, b, 3, 5, 0.02, 0)
    predicted = shifted(c, q, relu)
    expected = []
    for view in range(2):
        error = size = 0.0
        for i in range(len(c)):
            for k in range(b.shape[1]):
                wanted = sum(float(target[view, i, j] * b[j, k]) for j in range(len(b)))
                error += (wanted - sum(float(predicted[view, i, j] * b[j, k]) for j in range(len(b)))) ** 2
                size += wanted**2
        expected.append(error / size)
    np.testing.assert_allclose(boost_pca.unexplained(c, target, b, q, relu), expected, rtol=1e-9)


def test_the_rounding_error_equals_loops():
    x, exact = draw(4, 2, 3), draw(4, 2, 3, seed=8) + 5
    error = size = 0.0
    for i in range(4):
        for j in range(2):
            for k in range(3):
                mean = sum(float(exact[n, j, k]) for n in range(4)) / 4
                error += float(x[i, j, k] - exact[i, j, k]) ** 2
                size += (float(exact[i, j, k]) - mean) ** 2
    assert math.isclose(boost_pca.rounding_error(x, exact), math.sqrt(error / size), rel_tol=1e-9)
    assert boost_pca.rounding_error(exact, exact) == 0


# -------------------------------------------------------------------------------------------------- one of the scripts


def without_words(function) -> str:
    """The code of a function or class, docstrings apart."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


@pytest.mark.parametrize("name", ["ridge_lam", "krr_st_loss", "batch_index", "epoch_order", "Pool"])
def test_what_is_krr_sts_is_the_same_there(name):
    ours, theirs = (getattr(module, name) for module in (boost_pca, krr_st))
    unwrapped = [getattr(each, "__wrapped__", each) for each in (ours, theirs)]
    assert without_words(unwrapped[0]) == without_words(unwrapped[1]) and len(without_words(unwrapped[0])) > 80


def test_run_fields_and_landmarks_are_the_other_scripts():
    first, last = "    # the run: word for word the same in all five scripts\n", "    # the method\n"
    ours, theirs = (Path(module.__file__).read_text().split(first)[1].split(last)[0] for module in (boost_pca, krr_st))
    assert ours == theirs and len(ours.splitlines()) > 40
    teacher = [
        Path(module.__file__).read_text().split("    # the teacher\n", 1)[1].split("    # the evaluation\n")[0]
        for module in (boost_pca, krr_st)
    ]
    assert teacher[0] == teacher[1]
    lines = inspect.getsource(main).splitlines()
    landmarks = ["# data", "# teacher", "# distilled set", "# networks", "# outer loop", "# evaluation"]
    places = [lines.index(f"    {landmark}") for landmark in landmarks]
    assert places == sorted(places)


def test_args_document_themselves():
    """Every flag has help, every preset value is a flag that may be left open, and the reverse."""
    source = Path(boost_pca.__file__).read_text()
    fields = {f.name: f for f in dataclasses.fields(Args)}
    for name in fields:
        after = source.split(f"\n    {name}: ", 1)[1].split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), name
    open_flags = {n for n, f in fields.items() if f.default is None} - {"size", "preset", "resume", "chunk"}
    open_flags -= {"num_images"} | {f"teacher_{name}" for name in SETTINGS}
    for name, preset in boost_pca.PRESETS.items():
        assert set(preset) - {"num_images"} == open_flags, name
    limited = " ".join(boost_pca.LIMITS.values()).split()
    assert len(limited) == len(set(limited)) and set(limited) <= set(fields)
    shared = {"batch_real", "widths", "max_age", "teacher_arch", "pairs_lr_img", "pairs_lr_label"}
    for name in shared:  # plain pairs are distilled as krr_st.py does
        theirs = {"pairs_lr_img": "lr_img", "pairs_lr_label": "lr_label"}.get(name, name)
        for preset in boost_pca.PRESETS.keys() & krr_st.PRESETS.keys():
            if (preset, name) not in (
                ("digits", "max_age"),
                ("8px", "max_age"),
            ):
                # a younger pool serves the code, and the pairs are as good at 8
                assert boost_pca.PRESETS[preset][name] == krr_st.PRESETS[preset][theirs], (preset, name)


def test_importing_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("imported", boost_pca.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "imported", module)
    state = torch.random.get_rng_state()
    spec.loader.exec_module(module)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")
    assert torch.equal(state, torch.random.get_rng_state())


# ---------------------------------------------------------------------------------------------------------- a whole run


def turned(x: torch.Tensor, name: str) -> torch.Tensor:
    """A view in which whole pixels move, one by one."""
    side, out = x.shape[-1], torch.empty_like(x)
    for i in range(side):
        for j in range(side):
            source = {"rot90": (j, side - 1 - i), "rot180": (side - 1 - i, side - 1 - j), "rot270": (side - 1 - j, i),
                      "hflip": (i, side - 1 - j), "vflip": (side - 1 - i, j)}[name]  # fmt: skip
            out[..., i, j] = x[..., source[0], source[1]]
    return out


def enlarge(side: int, up: int) -> torch.Tensor:
    """The matrix (side up, side) of linear interpolation with half-pixel centres, clamped at the ends."""
    out = torch.zeros(side * up, side, dtype=torch.float64)
    for i in range(side * up):
        place = min(max((i + 0.5) / up - 0.5, 0), side - 1)
        low = min(int(place), side - 1)
        out[i, low] += 1 - (place - low)
        out[i, min(low + 1, side - 1)] += place - low
    return out


def naive_decode(t: dict, up: int, names: tuple, relu: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, one channel: images, then each view of all, and their targets."""
    m, basis = len(t["c_x"]), t["b_x"].shape[1]
    side = math.isqrt(basis)
    matrix = enlarge(side, up)
    x = torch.stack([matrix @ (c @ t["b_x"] + t["mu_x"]).view(side, side) @ matrix.T for c in t["c_x"]])[:, None]
    coefficients = [t["c_y"]]
    if "c_v" in t:
        coefficients += list(t["c_v"])
    elif names:
        coefficients += [t["c_y"] + s for s in shifted(t["c_y"], t, relu)]
    y = torch.stack([c @ t["b_y"] + t["mu_y"] for each in coefficients for c in each])
    assert len(y) == m * (1 + len(names))
    return torch.cat([x, *(turned(x, name) for name in names)]), y


def bases_of(data, targets: torch.Tensor, up: int, u: int, v: int) -> dict[str, torch.Tensor]:
    """mu_x, mu_y and orthonormal p_x, p_y of all images and targets, by a singular value decomposition."""
    x = pixels(data, data.x_train)
    n, c, side = len(x), x.shape[1], x.shape[2] // up
    rows = x.view(n, c, side, up, side, up).mean((3, 5)).flatten(1)
    out = dict(rows=rows, mu_x=rows.mean(0), mu_y=targets.double().mean(0))
    for key, part, k in (("x", rows, u), ("y", targets.double(), v)):
        _, values, directions = torch.linalg.svd(part - part.mean(0), full_matrices=False)
        out[f"p_{key}"] = directions[:k]
        out[f"left_{key}"] = float(1 - values[:k].square().sum() / values.square().sum())
    return out


def test_a_run_writes_what_it_says(teachers):
    out_dir, result = teachers
    folder = only_run(out_dir)
    assert folder.name.startswith("digits__boost_pca__0__")
    names = {p.name for p in folder.iterdir()}
    assert {"args.json", "script.py", "checkpoint.pt", "distilled.safetensors", "result.json", "curve.json"} <= names
    assert (folder / "script.py").read_text() == Path(boost_pca.__file__).read_text()
    on_disk = json.loads((folder / "result.json").read_text())
    assert on_disk == json.loads(json.dumps(result))
    state, distilled = checkpoint(folder), load_distilled(folder / "distilled.safetensors", "boost_pca")
    assert state["step"] == distilled.step == 4
    tensors = load_file(folder / "distilled.safetensors")
    assert tensors.keys() == LEARNED | NETWORKS | {"mu_x", "mu_y", "mean", "std"}  # the views' coefficients stay out
    assert state["learned"].keys() == LEARNED | {"c_v"}
    for key in LEARNED:
        assert torch.equal(tensors[key], state["learned"][key])
    # counts, from the file
    floats = sum(value.numel() for key, value in tensors.items() if key not in ("mean", "std"))
    size = sum(value.nbytes for value in tensors.values())
    assert on_disk["storage"] == dict(floats=floats, bytes=size, pairs=floats / 80, pixels=floats / 64)
    assert on_disk["storage_bytes"] == size and on_disk["storage"] == distilled.meta["storage"]
    assert on_disk["budget"] == dict(images=12, rule="pairs", floats=960) and floats <= 960
    n, n_bytes = math.ceil(floats / 80), math.ceil(size / (64 + 4 * 16))
    counts = dict(distilled=5, krr_st=n, random_real=n, kmeans=n, random_real_bytes=n_bytes, kmeans_bytes=n_bytes)
    assert on_disk["counts"] == counts and on_disk["num_images"] == 5 and on_disk["pairs"] == 20
    assert on_disk["rounding"] is None and on_disk["eval_models"] == {"convnet": on_disk["eval"]}
    # what is left out, from the learned tensors and the file
    learned = {key: value.double() for key, value in state["learned"].items()}
    q = {key: tensors[key].double() for key in NETWORKS}
    wanted = learned["c_v"] - learned["c_y"]
    error = (wanted - shifted(learned["c_y"], q, True)) @ learned["b_y"]
    expected = [float(e.square().sum() / w.square().sum()) for e, w in zip(error, wanted @ learned["b_y"], strict=True)]
    np.testing.assert_allclose(on_disk["shift_unexplained"], expected, rtol=1e-4)
    expected = fit_networks(*(state["learned"][key] for key in ("c_y",)), state["learned"]["c_v"] -
                            state["learned"]["c_y"], state["learned"]["b_y"], 2, 10, 0.01, 0)  # fmt: skip
    assert equal(expected, {key: tensors[key] for key in expected})
    data, targets = load("digits", data_dir="data"), targets_of(out_dir)
    found = bases_of(data, targets, 2, 6, 5)
    left = on_disk["variance_left_out"]
    assert math.isclose(left["images"], found["left_x"], rel_tol=1e-6)
    assert math.isclose(left["targets"], found["left_y"], rel_tol=1e-5)
    assert math.isclose(on_disk["loss_of_mean"], float(targets.double().var(0, correction=0).mean()), rel_tol=1e-4)
    history = state["history"]
    assert [step for step, _ in history] == [1, 2, 3, 4]
    differences = on_disk["distilled_minus"]
    assert set(differences) == {"random_real", "kmeans", "krr_st", "random_real_bytes", "kmeans_bytes"}
    for row, each in differences.items():
        mean = on_disk["eval"]["distilled"]["match"]["mean"] - on_disk["eval"][row]["match"]["mean"]
        assert math.isclose(each["match"]["mean"], mean, rel_tol=1e-9, abs_tol=1e-9)


class Stop(Exception):
    pass


def begun(out_dir, monkeypatch, **changes) -> tuple[Path, dict]:
    """A run that is stopped before its first step: its folder, and the learned tensors as they begin."""

    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(boost_pca, "batch_index", stop)
        with pytest.raises(Stop):
            main(tiny(out_dir, **changes))
    folder = max(out_dir.glob("digits__*"), key=lambda path: path.stat().st_mtime_ns)
    return folder, checkpoint(folder)["learned"]


@pytest.mark.parametrize("approx", ["after", "joint"])
def test_it_begins_with_the_projection_of_real_images_and_of_their_views_targets(out_dir, quick, monkeypatch, approx):
    """Normalised images, averaged and projected; features of the turned images, all on the bases of the plain ones."""
    _, learned = begun(out_dir, monkeypatch, approx=approx, approx_steps=30)
    (teacher,) = (out_dir / "teachers").iterdir()
    teacher, data = load_own(teacher / "teacher.safetensors"), load("digits", data_dir="data")
    found = bases_of(data, targets_of(out_dir), 2, 6, 5)
    index = torch.randperm(len(data.x_train), generator=rng("initial images", 0))[:5]
    t = {key: value.double() for key, value in learned.items()} | {key: found[key] for key in ("mu_x", "mu_y")}
    rows = found["rows"][index] - found["mu_x"]
    torch.testing.assert_close(t["c_x"] @ t["b_x"], rows @ found["p_x"].T @ found["p_x"], rtol=1e-4, atol=1e-4)
    plain = pixels(data, data.x_train[index])
    coefficients = [t["c_y"], *(t["c_v"] if approx == "after" else ())]
    for c, x in zip(coefficients, [plain, *(turned(plain, name) for name in VIEWS["rotations"])], strict=False):
        back = (x * data.std.double()[:, None, None] + data.mean.double()[:, None, None]).float()
        y = teacher.targets(back, CPU).double() - found["mu_y"]
        torch.testing.assert_close(c @ t["b_y"], y @ found["p_y"].T @ found["p_y"], rtol=1e-3, atol=1e-3)
    for key in ("c_x", "c_y"):  # preset digits: of unit size; the targets' over all views
        size = (
            t[key].square().mean(0) if key == "c_x" or approx == "joint" else torch.cat(coefficients).square().mean(0)
        )
        if key == "c_x" or approx == "after":
            torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-4, atol=0)
    if approx == "joint":  # networks fitted to what the views' coefficients would have been
        assert learned.keys() == LEARNED | NETWORKS
        _, after = begun(out_dir, monkeypatch, approx="after")
        q = fit_networks(after["c_y"], after["c_v"] - after["c_y"], after["b_y"], 2, 30, 0.01, 0)
        assert equal({key: learned[key] for key in q}, q) and equal(learned["c_y"], after["c_y"])


def test_bases_of_other_kinds_are_of_images_and_of_targets_alike(out_dir, quick, monkeypatch):
    """real: directions of the initial images and of their or their views' targets; random: those of their own keys."""
    (teacher,) = (out_dir / "teachers").iterdir()
    teacher, data = load_own(teacher / "teacher.safetensors"), load("digits", data_dir="data")
    found = bases_of(data, targets_of(out_dir), 2, 6, 5)
    index = torch.randperm(len(data.x_train), generator=rng("initial images", 0))[:5]
    images = data.x_train[index].float() / 255
    targets = torch.cat([teacher.targets(turned(images, name), CPU) for name in ("rot90", "rot180", "rot270")])
    targets = torch.cat([targets_of(out_dir)[index], targets]).double()
    rows = {"b_x": found["rows"][index] - found["mu_x"], "b_y": targets - found["mu_y"]}
    _, real = begun(out_dir, monkeypatch, bases="real", balance=False)
    _, random = begun(out_dir, monkeypatch, bases="random", balance=False)
    for key, name in (("b_x", "images"), ("b_y", "features")):
        units = rows[key] / rows[key].norm(dim=1, keepdim=True)
        for base in real[key].double():
            assert min((base - unit).norm().item() for unit in units) < 1e-4, key
        count, length = random[key].shape
        draws = torch.randn(length, count, generator=rng("bases", 0, name), dtype=torch.float64)
        outside = draws - random[key].T.double() @ (random[key].double() @ draws)
        assert outside.norm() < 1e-5 * draws.norm(), key


CASES = {
    "after": dict(),
    "joint": dict(approx="joint"),
    "none": dict(approx="none"),
    "base": dict(outer_views="base"),
    "without balance": dict(balance=False, downsample=1, views="flips", lr_img=0.02, lr_end=0.5),
    "clipped": dict(grad_clip=1e-3, views="none"),
}


@pytest.fixture(scope="module")
def two_steps(teachers, tmp_path_factory):
    """Case -> a finished run of two steps: folder, tensors as they began, and of each step tensors, gradients, loss."""

    @cache
    def of(case: str):
        out_dir, seen, original = tmp_path_factory.mktemp("steps") / "runs", [], torch.autograd.grad
        shutil.copytree(teachers[0] / "teachers", out_dir / "teachers")

        def record(loss, inputs):
            grads = original(loss, inputs)
            seen.append([[each.detach().clone() for each in part] for part in (inputs, grads, [loss])])
            return grads

        with pytest.MonkeyPatch.context() as patch:
            cheap(patch)
            folder, first = begun(out_dir, patch, **CASES[case], steps=2)
            patch.setattr(torch.autograd, "grad", record)
            main(common.run.load_args(Args, folder))
        assert len(seen) == 2
        return folder, first, seen

    return of


@pytest.mark.parametrize("case", CASES)
def test_the_loop_is_the_method(two_steps, teachers, case):
    """Two outer steps restated in float64: decoding, ridge, gradients of all that is learned, AdamW, inner step."""
    folder, first, seen = two_steps(case)
    original = torch.autograd.grad
    args, state = common.run.load_args(Args, folder), checkpoint(folder)
    names, up, base = VIEWS[args.views], args.downsample, args.outer_views == "base"
    moving = [key for key in first if not (base and key == "c_v")]
    found = load_file(folder / "distilled.safetensors")
    fixed = {key: found[key].double() for key in ("mu_x", "mu_y")}
    data, targets = load("digits", data_dir="data"), targets_of(teachers[0]).double()
    x_train = pixels(data, data.x_train)
    now, moments = {key: value.double() for key, value in first.items()}, {}
    pool = Pool(lambda: boost_pca.ConvNet(1, 8, 16, args.widths), CPU, args)
    pool.warm_up(*(part.float() for part in naive_decode(now | fixed, up, names)))
    for step in range(2):
        for key, value in zip(moving, seen[step][0], strict=True):
            torch.testing.assert_close(value.double(), now[key], rtol=1e-3, atol=1e-4)
            now[key] = value.double()  # from here on as it was: what is compared is this step
        now = {key: value.requires_grad_() for key, value in now.items()}
        slot = int(torch.randint(args.pool, (), generator=rng("slot", 0, step)))
        net = pool.nets[slot].eval()
        twin = boost_pca.ConvNet(1, 8, 16, args.widths).double().eval()
        twin.load_state_dict(net.state_dict())
        x_s, y_s = naive_decode(now | fixed, up, names)
        if base:
            x_s, y_s = x_s[:5], y_s[:5]
        index = krr_st.batch_index(step, len(x_train), 64, 0)
        ones = lambda f: torch.cat([f, torch.ones(len(f), 1).double()], 1)  # noqa: E731
        f_s, f_t = ones(twin.features(x_s)), ones(twin.features(x_train[index])).detach()
        lam = 1e-6 * (f_s @ f_s.T).trace().item()
        alpha = torch.linalg.solve(f_s @ f_s.T + lam * torch.eye(len(f_s)).double(), y_s)
        loss = ((f_t @ f_s.T @ alpha - targets[index]) ** 2).mean()
        assert math.isclose(seen[step][2][0].item(), loss.item(), rel_tol=1e-2)
        naive = original(loss, [now[key] for key in moving])
        for key, ours, theirs in zip(moving, seen[step][1], naive, strict=True):
            assert (ours - theirs).norm() < 0.03 * theirs.norm(), (key, step)  # the features are float32
            grad = ours.double()
            if args.grad_clip:
                grad = grad * min(1, args.grad_clip / (float(grad.norm()) + 1e-6))
            m, v = moments.get(key, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            moments[key] = m, v
            rate = args.lr_img if key in ("b_x", "c_x") else args.lr_label
            rate *= 1 - (1 - args.lr_end) * step / 2
            with torch.no_grad():
                move = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                now[key] = now[key].detach() - rate * move
        now = {key: value.detach() for key, value in now.items()}
        pool.grow(slot, *(part.float() for part in naive_decode(now | fixed, up, names)))
    for key, value in state["learned"].items():
        torch.testing.assert_close(value.double(), now[key], rtol=1e-3, atol=1e-5)
    assert state["pool"]["ages"] == pool.ages and pool.ages != [0, 0, 0]
    for ours, theirs in zip(state["pool"]["nets"], pool.nets, strict=True):
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours[key], value, rtol=0.02, atol=2e-3)
    if base:
        assert torch.equal(state["learned"]["c_v"], first["c_v"])


@pytest.mark.parametrize("case", ["after", "joint", "none", "base"])
def test_all_that_is_learned_has_a_gradient_and_moves(two_steps, case):
    """Coefficients of every image and every view, every base; with --outer-views base the views' stay as they began."""
    folder, first, seen = two_steps(case)
    last = checkpoint(folder)["learned"]
    expected = LEARNED | (NETWORKS if case == "joint" else {"c_v"})
    assert first.keys() == last.keys() == expected
    moving = [key for key in first if case != "base" or key != "c_v"]
    for key, grad in zip(moving, seen[0][1], strict=True):
        dead = {"w1", "b1", "w2"}  # a hidden unit may be off for all images
        rows = grad.flatten(0, -2).norm(dim=1) if key not in dead else grad.flatten(1).norm(dim=1)
        assert (rows > 0).all(), key
        assert not torch.equal(first[key], last[key]), key
    if case == "base":
        assert torch.equal(first["c_v"], last["c_v"])
        assert any(not torch.equal(a, b) for a, b in zip(first.values(), last.values(), strict=True))


@pytest.mark.parametrize("approx", ["rank", "joint", "none"])
def test_the_file_holds_what_was_learned(out_dir, quick, monkeypatch, approx):
    """And decodes to it; what of the shift is left out is the file's; of networks learned jointly, at the start."""
    folder, first = begun(out_dir, monkeypatch, approx=approx)
    result = main(common.run.load_args(Args, folder))
    learned, tensors = checkpoint(folder)["learned"], load_file(folder / "distilled.safetensors")
    t, relu = {key: value.double() for key, value in tensors.items()}, approx != "rank"
    x, y = naive_decode(t, 2, VIEWS["rotations"], relu)
    distilled = load_distilled(folder / "distilled.safetensors")
    torch.testing.assert_close(distilled.inputs().double(), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(distilled.y.double(), y, rtol=1e-4, atol=1e-4)
    if approx == "rank":
        q = reduced_rank(learned["c_y"], learned["c_v"] - learned["c_y"], learned["b_y"], 2)
        assert equal({key: tensors[key] for key in q}, q)
        at = t | {"c_v": learned["c_v"].double()}
    else:
        assert equal({key: tensors[key] for key in learned}, learned)
    if approx == "joint":  # what the networks began from: the views' coefficients of the run that keeps them
        _, stored = begun(out_dir, monkeypatch, approx="none")
        at = {key: value.double() for key, value in (first | {"c_v": stored["c_v"]}).items()}
    if approx == "none":
        assert result["shift_unexplained"] is None
    else:
        wanted = at["c_v"] - at["c_y"]
        error = (wanted - shifted(at["c_y"], at, relu)) @ at["b_y"]
        share = error.square().sum((1, 2)) / (wanted @ at["b_y"]).square().sum((1, 2))
        np.testing.assert_allclose(result["shift_unexplained"], share, rtol=1e-3)


def test_plain_pairs_are_krr_sts_bit_for_bit(out_dir, tmp_path, quick, monkeypatch):
    changes = dict(lr_img=0.1, lr_label=0.01, lr_end=0.1, ridge_scale="trace_mean", pool_opt="adamw", lr_net=0.01)
    main(tiny(out_dir, bases="none", views="none", **changes))
    monkeypatch.setattr(krr_st, "predict_seconds", lambda *args: 0.0)
    known = {field.name for field in dataclasses.fields(krr_st.Args)}
    shutil.copytree(out_dir / "teachers", tmp_path / "theirs" / "teachers")
    own = {key: value for key, value in TINY.items() if key in known} | changes
    krr_st.main(krr_st.Args(**own, out_dir=str(tmp_path / "theirs")))
    ours, theirs = checkpoint(only_run(out_dir)), checkpoint(only_run(tmp_path / "theirs"))
    assert torch.equal(ours["learned"]["x"], theirs["x_s"]) and torch.equal(ours["learned"]["y"], theirs["y_s"])
    a, b = (load_distilled(only_run(d) / "distilled.safetensors") for d in (out_dir, tmp_path / "theirs"))
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and equal(ours["pool"], theirs["pool"])


def test_chunks_are_exact(out_dir, tmp_path, quick):
    shutil.copytree(out_dir, tmp_path / "chunks")
    main(tiny(out_dir, steps=2)), main(tiny(tmp_path / "chunks", steps=2, chunk=3))
    whole, parts = (checkpoint(only_run(d))["learned"] for d in (out_dir, tmp_path / "chunks"))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-3, atol=1e-3)


SLOW = pytest.mark.slow
EACH = [
    dict(coefficients="fp16"), dict(views="corners"), dict(precision="bf16"), dict(budget_rule="pixels"),
    *(pytest.param(change, marks=SLOW) for change in (
        dict(bases="random"), dict(bases="real"), dict(approx="rank"), dict(approx="joint"), dict(approx="none"),
        dict(views="none"), dict(views="tones"), dict(views="dihedral"), dict(views="flips"), dict(outer_views="base"),
        dict(coefficients="int8"), dict(coefficients="int8", approx="none"), dict(coefficients="fp16", approx="joint"),
        dict(num_images=None), dict(num_images=1), dict(num_images=1, approx="joint"), dict(norm="instance"),
        dict(norm="none"), dict(hidden=5), dict(downsample=1), dict(downsample=4, image_bases=4), dict(lr_end=1.0),
        dict(ridge=1e-3), dict(ridge_grad=True), dict(ridge_scale="trace_mean"), dict(ridge_precision="fp32"),
        dict(pool_opt="adamw"), dict(pool=2), dict(wd_net=0.5), dict(seed=1), dict(balance=False),
        dict(approx_steps=3), dict(approx_lr=0.1), dict(batch_real=1000), dict(lr_img=1e-3), dict(lr_label=1e-3),
        dict(image_bases=7), dict(feature_bases=4),
    )),
]  # fmt: skip


@pytest.mark.parametrize("change", EACH, ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()))
def test_every_flag_of_the_method_does_something(out_dir, quick, teachers, change):
    result = main(tiny(out_dir, **change))
    before, after = (load_distilled(only_run(d) / "distilled.safetensors") for d in (teachers[0], out_dir))
    assert after.x.isfinite().all() and after.y.isfinite().all()
    assert math.isfinite(result["eval"]["distilled"]["match"]["mean"])
    tensors = load_file(only_run(out_dir) / "distilled.safetensors")
    floats = sum(value.numel() for key, value in tensors.items() if not key.startswith(("mean", "std")))
    assert result["storage"]["floats"] == floats == after.meta["storage"]["floats"]
    scales = sum(value.numel() for key, value in tensors.items() if key.endswith("_scale"))
    assert floats - scales <= result["budget"]["floats"]
    assert len(after.x) == len(after.y) == result["pairs"] == result["num_images"] * (1 + len(after.code.views))
    if change == dict(num_images=None):  # as many as fit: one more does not
        assert floats + 6 + 5 > result["budget"]["floats"] == 960
    if change == dict(budget_rule="pixels"):
        assert result["budget"]["floats"] == 12 * 64
        assert result["counts"]["random_real"] == math.ceil(result["storage"]["floats"] / 64)
    elif after.x.shape == before.x.shape:
        assert not equal(load_file(only_run(teachers[0]) / "distilled.safetensors"), tensors)
    kinds = {value.dtype for key, value in tensors.items() if key.startswith("c_") and not key.endswith("scale")}
    assert kinds == {dict(fp16=torch.float16, int8=torch.int8).get(change.get("coefficients"), torch.float32)}
    assert ("distilled_fp32" in result["eval"]) == (result["rounding"] is not None) == ("coefficients" in change)
    if "coefficients" in change:
        assert all(0 < value < 0.1 for value in result["rounding"].values())
    unexplained = result["shift_unexplained"]
    assert (unexplained is None) == (not after.code.views or change.get("approx") == "none")


def make_images(folder: Path, n: int, shape: tuple, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)):
        Image.fromarray(image).save(folder / f"{i}.png")


@pytest.mark.parametrize("shape", [(8, 8, 3), pytest.param((8, 8), marks=SLOW)], ids=["colour", "grey"])
def test_an_unlabelled_folder_reports_the_teacher_match_alone(tmp_path, shape):
    make_images(tmp_path / "photos", 30, shape)
    small = dict(
        teacher_batch=8,
        teacher_epochs=1,
        budget_images=30 if len(shape) == 3 else 12,
        batch_real=20,
    )
    result = main(tiny(tmp_path / "runs", data=str(tmp_path / "photos"), data_dir=str(tmp_path / "data"), **small))
    rows = {"none", "random_real", "kmeans", "distilled", "random_real_bytes", "kmeans_bytes"}
    assert set(result["eval"]) == rows and set(result["eval"]["distilled"]) == {"match"}
    distilled = load_distilled(only_run(tmp_path / "runs") / "distilled.safetensors")
    assert distilled.x.shape == (20, 3 if len(shape) == 3 else 1, 8, 8)


# ------------------------------------------------------------------------------------------------------ rows and parts


def watched_fits(monkeypatch) -> list[dict]:
    fits, fit = [], common.pairs.fit_pairs

    def record(net, x, y, *key, **rest):
        first = {name: value.clone() for name, value in net.state_dict().items()}
        fits.append(dict(x=x, y=y, key=key, first=first, **rest))
        return fit(net, x, y, *key, **rest)

    monkeypatch.setattr(common.pairs, "fit_pairs", record)
    return fits


def test_every_row_trains_on_its_own_set_and_alike(out_dir, quick, monkeypatch, capsys):
    """All rows at once: inputs, targets, steps and first weights of every network; the parts' flags and sizes."""
    fits = watched_fits(monkeypatch)
    both = dict(eval_models=("convnet", "vgg11"), outer_views="base")
    result = main(tiny(out_dir, coefficients="int8", compare=True, ablate=True, full_row=True, steps=2, **both))
    folder, data, targets = only_run(out_dir), load("digits", data_dir="data"), targets_of(out_dir)
    rows = ("none", "random_real", "kmeans", "krr_st", "bases_only", "and_views", "distilled", "distilled_fp32",
            "all_real", "random_real_bytes", "kmeans_bytes", "krr_st_bytes")  # fmt: skip
    assert tuple(result["eval"]) == ("teacher", *rows) and result["eval_models"]["convnet"] == result["eval"]
    assert tuple(result["eval_models"]["vgg11"]) == rows  # the teacher is no network of these
    tables = capsys.readouterr().out
    assert tables.count("\nteacher ") == 1 and tables.count("\nkmeans bytes") == 2
    assert "digits, convnet, 5 images (20 with views)" in tables and "digits, vgg11, 5 images" in tables
    tensors = load_file(folder / "distilled.safetensors")
    floats = sum(value.numel() for key, value in tensors.items() if key not in ("mean", "std"))
    size = sum(value.nbytes for value in tensors.values())
    n, n_bytes, n_pairs = math.ceil(floats / 80), math.ceil(size / (64 + 2 * 16)), math.ceil(size / (4 * 80))
    assert len({n, n_bytes, n_pairs}) == 3
    sets = {name: load_distilled(folder / name / "distilled.safetensors", "boost_pca")
            for name in (f"krr_st_{n}", f"krr_st_{n_pairs}", "bases_only", "and_views")}  # fmt: skip
    learned = checkpoint(folder)["learned"]
    q = fit_networks(learned["c_y"], learned["c_v"] - learned["c_y"], learned["b_y"], 2, 10, 0.01, 0)
    assert not equal(q, {key: tensors[key] for key in q})  # fitted to the coefficients as the file has them
    q |= {key: tensors[key] for key in ("mu_x", "mu_y")}
    exact = naive_decode({k: v.double() for k, v in ({k: learned[k] for k in LEARNED} | q).items()}, 2,
                         VIEWS["rotations"])  # fmt: skip
    exact = [part.float() for part in exact]
    distilled = load_distilled(folder / "distilled.safetensors", "boost_pca")
    for name, value, reference in zip(("images", "targets"), (distilled.inputs(), distilled.y), exact, strict=True):
        error = (value - reference).double().square().sum() / (reference - reference.mean(0)).double().square().sum()
        assert math.isclose(result["rounding"][name], math.sqrt(error), rel_tol=1e-2)

    def real(index):
        return pixels(data, data.x_train[index]).float(), targets[index]

    def expected(row, run):
        if row.startswith("random_real"):
            index = torch.randperm(1437, generator=rng("random real", 0, run))
            return real(index[: n_bytes if "bytes" in row else n])
        if row.startswith("kmeans"):
            return real(kmeans_medoids(targets, n_bytes if "bytes" in row else n, 0, run))
        if row == "distilled_fp32":
            return exact
        name = {"krr_st": f"krr_st_{n}", "krr_st_bytes": f"krr_st_{n_pairs}"}.get(row, row)
        part = distilled if row == "distilled" else sets[name]
        return part.inputs(), part.y

    calls, trained = iter(fits), rows[1:]
    for model, layers in enumerate(("blocks.0.weight", "layers.0.weight")):
        firsts = {}
        for row in trained:
            for run in range(2):
                call = next(calls)
                assert call["key"] == (0, run) and call["steps"] == 2 and call["batch"] == 256
                assert equal(call["first"], firsts.setdefault(run, call["first"])), row
                if row == "all_real":
                    assert torch.equal(call["x"], data.x_train) and torch.equal(call["y"], targets)
                    sample = call["prepare"](data.x_train[:3])
                    torch.testing.assert_close(sample, pixels(data, data.x_train[:3]).float())
                    continue
                for ours, theirs in zip((call["x"], call["y"]), expected(row, run), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=f"{row} {run} {model}")
        assert layers in firsts[0] and not equal(firsts[0], firsts[1])
    assert next(calls, None) is None
    # the parts
    own = json.loads((folder / "args.json").read_text())
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(sets)
    common_changes = dict(compare=False, ablate=False, eval_every=0, coefficients="fp32")
    left = floats - 96 - 80 - 32  # of the storage taken, int8's scales in it
    bases_m, views_m = (left - 11) // 11, (left - 26) // 26
    plain = dict(bases="none", views="none", budget_rule="pairs", lr_img=0.1, lr_label=0.01, lr_end=1e-3, steps=3)
    wanted = {
        f"krr_st_{n}": plain | dict(budget_images=n, num_images=n),
        f"krr_st_{n_pairs}": plain | dict(budget_images=n_pairs, num_images=n_pairs),
        "bases_only": dict(views="none", approx="none", num_images=bases_m),
        "and_views": dict(approx="none", num_images=views_m),
    }
    for name, part in sets.items():
        flags_ = json.loads((folder / name / "args.json").read_text())
        free = {"resume", "chunk"}
        changed = own | common_changes | wanted[name]
        assert {k: v for k, v in flags_.items() if k not in free} == {k: v for k, v in changed.items() if k not in free}
        assert part.meta["num_images"] == wanted[name]["num_images"] and part.step == flags_["steps"]
        assert (
            json.loads((folder / name / "result.json").read_text())["storage"]["floats"]
            <= part.meta["budget"]["floats"]
        )
        assert "eval" not in json.loads((folder / name / "result.json").read_text())
    counts = result["counts"]
    assert (counts["krr_st"], counts["krr_st_bytes"]) == (n, n_pairs)
    assert (counts["bases_only"], counts["and_views"], counts["distilled"]) == (bases_m, views_m, 5)
    assert (counts["random_real"], counts["kmeans_bytes"]) == (n, n_bytes)
    assert [list(sets[name].code.views) for name in ("and_views", "bases_only")] == [list(VIEWS["rotations"]), []]
    assert "c_v" in load_file(folder / "and_views" / "distilled.safetensors")


@pytest.mark.slow
def test_a_table_for_each_network(out_dir):
    """With the real scores: the first file is read again, a table each."""
    result = main(tiny(out_dir, eval_models=("convnet", "vgg11", "vit"), eval_runs=2))
    names = {path.name for path in only_run(out_dir).glob("evaluation*.json")}
    assert names == {"evaluation.json", "evaluation_vgg11.json", "evaluation_vit.json"}
    matches = [result["eval_models"][name]["distilled"]["match"]["values"] for name in ("convnet", "vgg11", "vit")]
    assert len({tuple(values) for values in matches}) == 3
    assert all(set(row) == {"match", "probe", "few_5", "few_1"} for row in result["eval_models"]["vit"].values())


def test_a_curve_scores_the_set_of_its_step(out_dir, quick, monkeypatch):
    """Points at --eval-every and the end; the set of each is the file then; the seconds of it are no steps'."""
    fits = watched_fits(monkeypatch)
    saved, save = [], boost_pca.save_distilled
    monkeypatch.setattr(boost_pca, "save_distilled", lambda *a, **k: saved.append(k["step"]) or save(*a, **k))
    result = main(tiny(out_dir, eval_every=2, eval_runs=1, save_every=100))
    curve = json.loads((only_run(out_dir) / "curve.json").read_text())
    assert [point["step"] for point in curve] == saved == [2, 4]
    assert curve[-1]["match"] == result["eval"]["distilled"]["match"] and curve[0]["match"] != curve[-1]["match"]
    assert len(fits) == 1 + 5 and not torch.equal(fits[0]["x"], fits[3]["x"])


def test_images_held_out_are_seen_by_nothing_but_the_curve(out_dir, quick, monkeypatch):
    seen, found = [], []
    evaluate, of_images = boost_pca.evaluate_pairs, boost_pca.image_pca
    monkeypatch.setattr(boost_pca, "evaluate_pairs", lambda *args: seen.append(args) or evaluate(*args))
    monkeypatch.setattr(boost_pca, "image_pca", lambda *args: found.append(args[0]) or of_images(*args))
    main(tiny(out_dir, holdout=0.25, eval_every=2, eval_runs=1, compare=True))
    whole = load("digits", data_dir="data")
    curve, final = (args[1] for args in seen)
    assert len(curve.x_test) == len(whole.x_train) - len(final.x_train) > 300
    assert torch.equal(final.x_test, whole.x_test) and torch.equal(curve.x_train, final.x_train)
    assert len(found) == 1 and torch.equal(found[0], final.x_train)
    for args in seen:
        assert len(args[2]) == len(final.x_train) and len(args[3]) == len(args[1].x_test)
    points = json.loads((only_run(out_dir) / "curve.json").read_text())
    assert [point["step"] for point in points] == [2]  # the last is of other images, and in the table


def test_evaluation_flags_do_not_change_the_distilled_set(out_dir, teachers, quick):
    main(tiny(out_dir, eval_every=3, eval_runs=1, eval_epochs=1, log_every=7, save_every=3, full_row=True))
    a, b = (load_file(only_run(d) / "distilled.safetensors") for d in (teachers[0], out_dir))
    assert equal(a, b)


def test_a_renamed_copy_runs_and_names_its_own_runs(tmp_path, out_dir, quick, monkeypatch, capsys):
    """Its parts are its own too: nothing in it calls boost_pca."""
    shutil.copy(boost_pca.__file__, tmp_path / "my_idea.py")
    spec = importlib.util.spec_from_file_location("my_idea", tmp_path / "my_idea.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_idea", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "predict_seconds", lambda *args: 0.0)
    module.main(module.Args(**TINY | dict(eval_runs=1, compare=True, out_dir=str(out_dir))))
    folder, words = only_run(out_dir), capsys.readouterr().out
    assert folder.name.startswith("digits__my_idea__0__")
    assert load_distilled(folder / "distilled.safetensors", "my_idea").step == 4
    assert load_distilled(folder / "krr_st_5" / "distilled.safetensors", "my_idea").step == 3
    assert (folder / "krr_st_5" / "script.py").read_text() == (tmp_path / "my_idea.py").read_text()
    assert "krr st" in words and "random real bytes" in words and "unexplained: rot90" in words


# -------------------------------------------------------------------------------------------------------------- resume


def stopped(out_dir, monkeypatch, place: str, nth: int, **changes) -> Path:
    """A run that meets KeyboardInterrupt at the nth call of a function of boost_pca, or of the evaluation."""
    module = common.pairs if place == "score_network" else boost_pca
    function, calls = getattr(module, place), []

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, place, stop)
        with pytest.raises(KeyboardInterrupt):
            main(tiny(out_dir, **changes))
    folder = only_run(out_dir)
    assert not (folder / "result.json").exists()
    return folder


@pytest.mark.parametrize(
    ("place", "nth"),
    [("batch_index", 1), ("batch_index", 4), ("save_distilled", 1), ("batch_index", 4 + 3), ("score_network", 4)],
    ids=["at the start", "in the loop", "after it", "in a part", "in the evaluation"],
)
def test_a_resumed_run_ends_as_if_it_had_not_stopped(out_dir, teachers, quick, monkeypatch, place, nth):
    folder = stopped(out_dir, monkeypatch, place, nth, compare=True)
    main(common.run.load_args(Args, folder))
    same_end(folder, only_run(teachers[0]))


@pytest.mark.parametrize("changes", [
    dict(approx="joint"), pytest.param(dict(coefficients="int8", approx="none", eval_every=2), marks=SLOW),
    pytest.param(dict(ablate=True, outer_views="base"), marks=SLOW),
    pytest.param(dict(approx="rank", views="flips", bases="real"), marks=SLOW),
], ids=str)  # fmt: skip
def test_other_sets_resume_as_well(out_dir, tmp_path, quick, monkeypatch, changes):
    shutil.copytree(out_dir / "teachers", tmp_path / "straight" / "teachers")
    main(tiny(tmp_path / "straight", **changes))
    folder = stopped(out_dir, monkeypatch, "batch_index", 4 + 3 if "ablate" in changes else 4, **changes)
    main(common.run.load_args(Args, folder))
    same_end(folder, only_run(tmp_path / "straight"))


def test_a_finished_run_takes_further_rows_and_does_nothing_twice(out_dir, teachers, quick, monkeypatch):
    """--compare and --ablate added on resume, then once more: no set and no network is made again."""
    main(tiny(out_dir))
    folder = only_run(out_dir)
    assert not (folder / "krr_st_5").exists()
    more = dict(compare=True, ablate=True)
    again = main(dataclasses.replace(common.run.load_args(Args, folder), **more))
    rows = {"krr_st", "bases_only", "and_views"}
    assert again["eval"].keys() - teachers[1]["eval"].keys() == rows - {"krr_st"}
    for row in teachers[1]["eval"]:
        assert again["eval"][row] == teachers[1]["eval"][row], row
    before = {path: load_file(path) for path in folder.rglob("distilled.safetensors")}
    assert len(before) == 4

    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(boost_pca, "krr_st_loss", never)
    monkeypatch.setattr(boost_pca, "main", never)  # of the parts
    monkeypatch.setattr(common.pairs, "fit_pairs", never)
    third = main(common.run.load_args(Args, folder))
    assert third["eval"] == again["eval"] and third["counts"] == again["counts"]
    assert equal(before, {path: load_file(path) for path in folder.rglob("distilled.safetensors")})
    monkeypatch.setattr(common.run.Run, "latest", None)  # as in another process
    refuse(lambda: main(common.run.load_args(Args, folder / "bases_only")), "a part of the run", str(folder))


def test_other_networks_on_resume_are_scored_themselves(out_dir, tmp_path, quick):
    """Not by the scores that the first network left."""
    shutil.copytree(out_dir / "teachers", tmp_path / "fresh" / "teachers")
    short = dict(steps=1, eval_runs=1)
    fresh = main(tiny(tmp_path / "fresh", eval_models=("vgg11", "convnet"), **short))
    first = main(tiny(out_dir, **short))
    other = main(dataclasses.replace(common.run.load_args(Args, only_run(out_dir)), eval_models=("vgg11", "convnet")))
    assert other["eval_models"] == fresh["eval_models"] and other["eval"] == other["eval_models"]["vgg11"]
    assert first["eval"]["distilled"] == other["eval_models"]["convnet"]["distilled"]
    assert other["eval"]["distilled"] != first["eval"]["distilled"]


def test_the_type_of_the_coefficients_may_change_on_resume(out_dir, quick, monkeypatch):
    """A coefficient that fp16 cannot hold is met after the last step: that must not lose the run."""
    result = main(tiny(out_dir, coefficients="fp32"))
    saved = common.run.load_args(Args, only_run(out_dir))
    other = main(dataclasses.replace(saved, coefficients="int8"))
    assert other["storage"]["bytes"] < result["storage"]["bytes"] and other["rounding"] is not None
    assert load_file(only_run(out_dir) / "distilled.safetensors")["c_x"].dtype == torch.int8


def test_real_bases_are_different_images():
    rows = draw(9, 6)
    found = feature_pca(rows, 5, torch.device("cpu"))
    for key in range(20):
        bases, _ = boost_pca.first_code(found, rows, "real", False, key)
        assert len({tuple(row.tolist()) for row in bases}) == 5, key


def test_a_flag_of_the_method_may_not_change_on_resume(out_dir, quick, monkeypatch):
    folder = stopped(out_dir, monkeypatch, "batch_index", 2)
    for change in (dict(approx="rank"), dict(pairs_lr_img=1.0), dict(views="none"), dict(budget_images=13)):
        args = dataclasses.replace(common.run.load_args(Args, folder), **change)
        refuse(lambda: main(args), f"--{next(iter(change)).replace('_', '-')} was", "start a new run")  # noqa: B023


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_images=62), ("--budget-images: 12 images with targets are 960 floats, which hold 61, not 62 images",
                               "11 each: image bases 96 + feature bases 80 + means 32 + networks 81 + coefficients 682 "
                               "= 971")),
        (dict(num_images=62, budget_images=3), ("hold 0, not 62 images",)),
        (dict(num_images=None, budget_images=3), ("hold 0, not 1 images",)),
        (dict(bases="none", views="none", num_images=13), ("hold 12, not 13 images, 80 each: images 832 + targets 2",)),
        (dict(downsample=3), ("--downsample 3", "must divide the 8 px")),
        (dict(image_bases=17), ("--image-bases 17", "at most 16")),
        (dict(feature_bases=17, budget_images=99), ("--feature-bases 17", "at most 16")),
        (dict(hidden=6), ("--hidden 6", "--feature-bases 5")),
        (dict(bases="none"), ("--bases none", "--views none")),
        (dict(ablate=True, views="none"), ("--ablate", "--views")),
        (dict(ablate=True, approx="none"), ("--ablate", "--approx")),
        (dict(approx="joint", outer_views="base"), ("--outer-views base", "--approx after")),
        (dict(eval_models=("convnet", "lenet")), ("--eval-models lenet", "vgg11")),
        (dict(eval_models=()), ("--eval-models: name at least one of convnet", "vit")),
        (dict(num_images=0), ("--num-images 0: must be 1 to 1437",)),
        (dict(num_images=1438), ("--num-images 1438: must be 1 to 1437",)),
        (dict(size=3), ("--size 3: must be at least 4",)),
        (dict(widths=(4,)), ("--widths", "2 blocks")),
        (dict(lr_end=1.5), ("--lr-end 1.5",)),
        (dict(approx_steps=0), ("--approx-steps 0",)),
        (dict(pairs_lr_img=-1.0), ("--pairs-lr-img -1.0",)),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tmp_path, changes, words):
    refuse(lambda: main(tiny(tmp_path / "runs", **changes)), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes", [dict(num_images=61), dict(hidden=6, approx="none"), dict(hidden=6, views="none"),
                                     dict(image_bases=16, budget_images=20), dict(hidden=5)], ids=str)  # fmt: skip
def test_what_just_fits_is_not_refused(out_dir, quick, monkeypatch, changes):
    begun(out_dir, monkeypatch, **changes)


def test_a_folder_of_few_images_bounds_the_bases(tmp_path):
    make_images(tmp_path / "few", 10, (8, 8))
    changes = dict(data=str(tmp_path / "few"), data_dir=str(tmp_path / "data"), num_images=3)
    refuse(lambda: main(tiny(tmp_path / "runs", **changes, image_bases=8)), "--image-bases 8", "at most 7")
    refuse(lambda: main(tiny(tmp_path / "runs", **changes, feature_bases=8)), "--feature-bases 8", "at most 7")
    refuse(lambda: main(tiny(tmp_path / "runs", **changes | dict(num_images=9))), "must be 1 to 8")


def test_a_teacher_without_features_is_refused(out_dir, quick, monkeypatch):
    class Constant(nn.Module):
        dim = 16

        def forward(self, x):
            return torch.ones(len(x), 16)

    original = boost_pca.train_teacher

    def constant(*args, **kwargs):
        teacher = original(*args, **kwargs)
        return dataclasses.replace(teacher, net=Constant(), folder=None)

    monkeypatch.setattr(boost_pca, "train_teacher", constant)
    refuse(lambda: main(tiny(out_dir)), "are the same for all images")


@pytest.mark.slow
def test_the_default_run_beats_random_real_images(tmp_path):
    """`python boost_pca.py` as a user runs it, teacher and comparison included."""
    done = start(boost_pca.__file__, ["--out-dir", tmp_path])
    assert done.returncode == 0, done.stderr
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    real, ours = (result["eval"][row]["match"] for row in ("random_real", "distilled"))
    assert real["mean"] - ours["mean"] > real["std"] + ours["std"]
    assert result["storage"]["floats"] <= result["budget"]["floats"]
