"""python -m common.evaluate: scores as in the runs that made the sets, protocols, resume, keys, forms, bad input."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import watched
from conftest import refuse
from PIL import Image
from safetensors.torch import load_file

import boost_pca
import common.evaluate
import common.run
import frepo
import isa
import krr_st
import scdd
from common import exchange
from common.artefact import load_distilled, save_distilled
from common.baselines import DM, DSA
from common.data import load
from common.evaluate import Args, KdRecipe, LabelRecipe, ScoresFlags, SoftFlags, TransferFlags, main
from common.models import ConvNet
from common.pairs import few_label_draws
from common.pretrain import train_supervised
from common.run import rng, seeded
from common.teacher import load_own

REPO = Path(common.evaluate.__file__).parent.parent
POOL = dict(batch_real=64, widths=(4, 4), pool=2, max_age=2, log_every=1, save_every=100, device="cpu", eval_runs=2)
PAIRS = dict(
    steps=2, num_images=5, teacher_arch="resnet10", teacher_width=2, teacher_epochs=1, teacher_projector=8,
    eval_epochs=4, eval_probe_steps=6,
)  # fmt: skip
CODE = dict(
    budget_images=12, image_bases=6, feature_bases=5, downsample=2, balance=True, views="rotations", hidden=2,
    approx_steps=3, compare=False, eval_finetune_steps=0,
)  # fmt: skip
PLAIN = dict(bases="none", views="none", budget_images=6, compare=False, eval_finetune_steps=0)
STUDENTS = dict(steps=2, ipc=1, eval_steps=30, eval_lr=5e-3)
SCDD = dict(
    steps=2, ipc=2, recover_batch=20, chunk=20, teacher_width=4, teacher_epochs=1, teacher_batch=256, teacher_queue=256,
    probe_epochs=1, label_width=4, label_epochs=2, log_every=1, save_every=100, device="cpu", eval_runs=2,
    eval_epochs=3, eval_width=4, eval_batch=10, eval_lr=2e-2, teacher_arch="resnet10", label_arch="resnet10",
    eval_arch="resnet10",
)  # fmt: skip
RUNS = {
    "krr_st": (krr_st, POOL | PAIRS | dict(eval_finetune_steps=2)),
    "boost_pca": (boost_pca, POOL | PAIRS | CODE),
    "plain pairs": (boost_pca, POOL | PAIRS | PLAIN | dict(seed=1)),
    "frepo": (frepo, POOL | STUDENTS),
    "isa": (isa, POOL | STUDENTS | dict(eval_models=("conv", "resnet18"), widths=(2, 2))),
    "scdd": (scdd, SCDD),
    "scdd stored": (scdd, SCDD | dict(labels="stored", seed=1)),
}
WIDTHS = (4, 4)
QUICK = dict(transfer=TransferFlags(epochs=2, probe_steps=3, few_draws=2, finetune_steps=2))
LABELS = dict(labels=LabelRecipe(epochs=3, batch=8))
KD = dict(kd=KdRecipe(epochs=2, batch=4), kd_teacher_arch="resnet10", kd_teacher_width=2, kd_teacher_epochs=1)


def slow_but(fast, parameters) -> list:
    """The parameters of a test, those that are not in `fast` marked slow."""
    return [each if each in fast else pytest.param(each, marks=pytest.mark.slow) for each in parameters]


@contextlib.contextmanager
def unadorned():
    """Nothing is timed beforehand or drawn."""
    with pytest.MonkeyPatch.context() as patch:
        for script in (krr_st, boost_pca, frepo, isa, scdd):
            patch.setattr(script, "predict_seconds", lambda *args: 0.0)
        patch.setattr(common.run.Run, "plot", lambda *args: None)
        patch.setattr(common.run.Run, "grid", lambda *args: None)
        patch.setattr(scdd, "save_grid", lambda *args: None)
        yield


def newest(out_dir) -> Path:
    folders = (path for path in Path(out_dir).iterdir() if (path / "args.json").exists())
    return max(folders, key=lambda path: path.stat().st_mtime_ns)


def make(out_dir: Path, script, **flags) -> tuple[Path, dict]:
    """(folder, result) of a run of a script."""
    with unadorned():
        result = script.main(script.Args(**flags | {"out_dir": str(out_dir)}))
    return newest(out_dir), result


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the commands that are started here have: the last bits of sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of RUNS -> (folder, result) of that run, each made once and not to be changed."""
    out_dir, found = tmp_path_factory.mktemp("runs"), {}

    def get(name: str) -> tuple[Path, dict]:
        if name not in found:
            script, flags = RUNS[name]
            found[name] = make(out_dir, script, **flags)
        return found[name]

    return get


def write_images(root: Path, x, y, names, part: str) -> None:
    """x: (N, C, S, S) uint8, y: (N,), as root/part/<class>/*.png."""
    for number, (image, label) in enumerate(zip(x.numpy(), y.tolist(), strict=True)):
        folder = root / part / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{number:04d}.png")


def some(y, n: int):
    """The first n places of every class."""
    return torch.cat([(y == label).nonzero()[:n, 0] for label in y.unique()])


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Folders with digits below five and from five on, as image files with classes: 20 training and 10 test images."""
    root, data = tmp_path_factory.mktemp("targets"), load("digits")
    for name, classes in (("low", range(5)), ("high", range(5, 10))):
        for part, x, y, n in (("train", data.x_train, data.y_train, 20), ("test", data.x_test, data.y_test, 10)):
            index = some(y, n)
            index = index[torch.isin(y[index], torch.tensor(classes))]
            write_images(root / name, x[index], y[index], data.class_names, part)
    return root


def colours(root: Path, size: int = 8, seed: int = 0) -> Path:
    """A folder of small colour images of two classes: 14 training and 9 test images each."""
    generator = torch.Generator().manual_seed(seed)
    for part, n in (("train", 14), ("test", 9)):
        y = torch.arange(2).repeat_interleave(n)
        noise = torch.randint(0, 160, (2 * n, 3, size, size), generator=generator)
        tint = torch.zeros(2, 3, 1, 1)
        tint[0, 0], tint[1, 2] = 40, 40
        write_images(root, (noise + tint[y]).to(torch.uint8), y, ["red", "blue"], part)
    return root


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """(folder of the whitened run, of the one that is not, their data's folder, another target's folder)."""
    root = tmp_path_factory.mktemp("coloured")
    flags = POOL | STUDENTS | dict(data=str(colours(root / "set")), data_dir=str(root / "data"), ipc=2, batch_real=16)
    runs = [make(root / "runs", frepo, **flags | dict(zca=zca))[0] for zca in (True, False)]
    return *runs, root / "set", colours(root / "other", seed=1)


@pytest.fixture(scope="module")
def another(made, tmp_path_factory):
    """A file with another teacher of as many features as the one of the krr_st run."""
    out_dir = tmp_path_factory.mktemp("another")
    folder, _ = make(out_dir, krr_st, **RUNS["krr_st"][1] | dict(teacher_seed=1, eval_runs=1))
    return teacher_of(folder)


def teacher_of(folder: Path) -> str:
    return str(next((folder.parent / "teachers").glob("*barlow*")) / "teacher.safetensors")


def evaluate(out_dir, *specs, **flags) -> dict:
    return main(Args(**dict(artefacts=tuple(map(str, specs)), device="cpu", out_dir=str(out_dir)) | flags))


def values(result: dict) -> dict:
    """{(row, target, protocol, model, metric): all numbers of the cell}."""
    place = ("row", "target", "protocol", "model", "metric")
    cells = result["cells"]
    found = {tuple(c[k] for k in place): {k: v for k, v in c.items() if k not in place} for c in cells}
    assert len(found) == len(cells)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def scores_in(folder: Path) -> dict:
    """{cell file: scores} of all finished cells of an evaluation, without their times."""
    return {path.name: json.loads(path.read_text())["scores"] for path in (folder / "cells").iterdir()}


@pytest.fixture
def watch(monkeypatch):
    """Lists of (row, model, run) that were trained and of (row, model, run, use, target) that were scored."""
    seen = dict(trained=[], scored=[])
    trained, score = common.evaluate.trained, common.evaluate.score

    def watched_trained(row, model, run):
        seen["trained"].append((row.name, model, run))
        return trained(row, model, run)

    def watched_score(cell, *rest):
        seen["scored"].append((cell.row.name, cell.model, cell.run, cell.use, Path(cell.target).name))
        return score(cell, *rest)

    monkeypatch.setattr(common.evaluate, "trained", watched_trained)
    monkeypatch.setattr(common.evaluate, "score", watched_score)
    return seen


# ----------------------------------------------------------------------------------------------- as in the run itself

OWN = {"random": "random_real", "krr_st": "distilled", "boost_pca": "distilled", "frepo": "distilled",
       "isa": "distilled", "scdd": "distilled"}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(set(RUNS) - {"isa", "plain pairs"}, RUNS))
def test_scores_are_those_of_the_run(made, tmp_path, name):
    """Saved, loaded and evaluated by itself, a set has exactly the scores that its own script gave it."""
    folder, result = made(name)
    of_pairs = name in ("krr_st", "boost_pca", "plain pairs")
    words = ("teacher", "none", "random", "kmeans") if of_pairs else ("random",)
    found = evaluate(tmp_path, folder, neighbours=words)
    compared = set()
    for (row, target, protocol, model, metric), of in values(found).items():
        assert target == "digits" and protocol == ("probe" if of_pairs else "scratch")
        row, column = OWN.get(row, row), metric
        if not of_pairs:
            first = model in ("frepo_conv", "scdd_resnet10")
            own = "student" if name.startswith("scdd") else model.removeprefix("frepo_")
            column = own if metric == "accuracy" else "krr" if first else None
        if row in result["eval"] and column in result["eval"][row]:
            assert of == result["eval"][row][column], (row, metric)
            compared.add((row, column))
    rows = [row for row in ("teacher", "none", "random_real", "kmeans", "distilled") if row in result["eval"]]
    wanted = {(row, metric) for row in rows for metric in result["eval"][row] if metric != "finetune"}
    assert compared == wanted
    assert len({tuple(of["values"]) for of in values(found).values()}) >= 2  # it is not chance that they agree
    assert found["rows"][found["cells"][-1]["row"]]["recipe"]["runs"] == 2
    assert found["seed"] == (1 if name in ("plain pairs", "scdd stored") else 0)


def test_fine_tuning_is_that_of_the_run(made, tmp_path):
    folder, result = made("krr_st")
    found = values(evaluate(tmp_path, folder / "distilled.safetensors", protocol=("finetune",)))
    for row in ("none", "random", "krr_st"):
        assert found[row, "digits", "finetune", "convnet", "finetune"] == result["eval"][OWN.get(row, row)]["finetune"]


@pytest.mark.slow
def test_all_real_images_are_those_of_the_runs(tmp_path):
    """The row of all real images, for as many updates: its file-batched order and schedules too."""
    for number, (script, flags, column) in enumerate(
        ((krr_st, POOL | PAIRS, "probe"), (frepo, POOL | STUDENTS, "conv"), (scdd, SCDD, "student"))
    ):
        flags = flags | dict(full_row=True, eval_runs=1)
        folder, result = make(tmp_path / f"{number}", script, **flags)
        found = values(evaluate(tmp_path / "evaluated", folder, neighbours=("all_real",)))
        metrics = result["eval"]["all_real"] if column == "probe" else ("accuracy",)
        for metric in (m for m in metrics if m != "finetune"):
            (of,) = [of for place, of in found.items() if place[0] == "all_real" and place[4] == metric]
            assert of == result["eval"]["all_real"][column if metric == "accuracy" else metric]


def test_a_network_of_the_table_by_hand(made, targets, tmp_path):
    """Untrained and pretrained ConvNets, a vote of neighbours and closed-form probes on another target, as loops."""
    folder, _ = made("krr_st")
    flags = dict(protocol=("knn", "probe"), data=(str(targets / "low"),), knn_k=3, knn_temperature=0.2)
    found = values(
        evaluate(tmp_path, folder, neighbours=("none", "random"), **flags, transfer=TransferFlags(few_draws=2))
    )
    distilled, digits = load_distilled(folder / "distilled.safetensors"), load("digits")
    data = load(str(targets / "low"), data_dir=str(tmp_path / "data"), size=8, channels="grey")
    teacher = load_own(next((folder.parent / "teachers").glob("*barlow*")) / "teacher.safetensors")
    pixels = lambda x, of: (x.double() / 255 - of.mean.double().view(-1, 1, 1)) / of.std.double().view(-1, 1, 1)  # noqa: E731

    def pairs(row: str, run: int):
        if row == "krr_st":
            mean, std = (v.double().view(-1, 1, 1) for v in (distilled.mean, distilled.std))
            return (distilled.x.double() - mean) / std, distilled.y.double()
        index = torch.randperm(len(digits.x_train), generator=rng("random real", 0, run))[:5]
        real = digits.x_train[index]
        mean, std = teacher.mean.view(-1, 1, 1), teacher.std.view(-1, 1, 1)
        with torch.no_grad():
            return pixels(real, digits), teacher.net((real.float() / 255 - mean) / std).flatten(1).double()

    for row in ("none", "random", "krr_st"):
        for run in (0, 1):
            with seeded("evaluation network", 0, run):
                net = ConvNet(1, 8, 16, WIDTHS, "batch").double()
            if row != "none":
                x, y = pairs(row, run)
                speed = {p: torch.zeros_like(p) for p in net.parameters()}
                for _ in range(RUNS["krr_st"][1]["eval_epochs"]):
                    loss = ((net(x) - y) ** 2).mean()
                    for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
                        with torch.no_grad():
                            speed[p] = 0.9 * speed[p] + g + 1e-3 * p
                            p -= 0.1 * speed[p]
            net.eval()
            with torch.no_grad():
                f_train, f_test = (net.features(pixels(x, data)) for x in (data.x_train, data.x_test))
            right, votes_of = 0, data.y_train.tolist()
            for f, y in zip(f_test, data.y_test.tolist(), strict=True):
                cosines = [float(f @ g / f.norm() / g.norm()) for g in f_train]
                votes = [0.0] * 5
                for near in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:3]:
                    votes[votes_of[near]] += np.exp(cosines[near] / 0.2)
                right += votes.index(max(votes)) == y
            got = found[row, "low", "knn", "convnet", "knn"]["values"][run]
            assert got == pytest.approx(right / 50, abs=1e-6), (row, run)
            draws = found[row, "low", "probe", "convnet", "few_5"]["draws"][run]
            assert len(draws) == 2
            for index, share in zip(few_label_draws(data.y_train, 5, 2, 0, run), draws, strict=True):
                f, y = f_train[index], data.y_train[index]
                one_hot = torch.eye(5, dtype=torch.float64)[y]
                f_c, y_c = f - f.mean(0), one_hot - one_hot.mean(0)
                lam = 1e-2 * (f_c**2).sum() / len(f)
                w = torch.linalg.solve(f_c.T @ f_c + lam * torch.eye(f.shape[1], dtype=torch.float64), f_c.T @ y_c)
                guess = ((f_test - f.mean(0)) @ w + one_hot.mean(0)).argmax(1)
                assert share == pytest.approx(float((guess == data.y_test).double().mean()), abs=1e-6)


def test_whitened_sets_see_whitened_targets(coloured, tmp_path, monkeypatch):
    """Every protocol gives networks of a whitened set ((x - mean) / std - zca_mean) @ zca of the target's images."""
    whitened, _, _, other = coloured
    distilled = load_distilled(whitened / "distilled.safetensors")
    data = load(str(other), data_dir=str(tmp_path / "data"), size=8, channels="rgb")
    wanted = {}
    for part, x in (("train", data.x_train), ("test", data.x_test)):
        z = (x.double() / 255 - data.mean.double()[:, None, None]) / data.std.double()[:, None, None]
        flat = (z - distilled.zca_mean.double()).flatten(1) @ distilled.zca.double()
        wanted[part] = flat.view(x.shape).float()
        assert not torch.allclose(wanted[part], z.float(), atol=0.1)
    score, inputs = common.evaluate.score, []

    def watched_score(cell, net, *rest):
        features = type(net).features
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(net), "features", lambda self, x: (inputs.append(x.detach()), features(self, x))[1])
            return score(cell, net, *rest)

    monkeypatch.setattr(common.evaluate, "score", watched_score)
    flags = QUICK | dict(neighbours=(), runs=1, data=(str(other),), data_dir=str(tmp_path / "data"))
    own = distilled.inputs()  # which ridge regression sees, and mirrored

    def within(rows, of) -> bool:
        """Whether each of rows is one of the images `of`."""
        apart = torch.cdist(rows.flatten(1), of.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        return float(apart.min(1).values.max()) < 1e-3

    for use in ("scratch", "probe", "knn", "finetune"):
        inputs.clear()
        evaluate(tmp_path, whitened, protocol=(use,), **flags)
        seen = torch.cat(inputs)
        assert within(wanted["test"], seen), use
        if use != "finetune":  # which crops the training images
            assert within(seen, torch.cat([*wanted.values(), own, own.flip(3)])), use
            assert within(wanted["train"], seen) == (use != "scratch"), use


def test_whitened_knowledge_distillation(coloured, tmp_path, monkeypatch):
    """The teacher sees normalised images, the student the same ones whitened, and whitened test images."""
    whitened, plain, _, other = coloured
    seen = []
    distil = common.evaluate.distil_knowledge

    def watched_distil(net, teacher, images, n, classes, recipe, lr, prepare, *rest, **more):
        x = images(torch.arange(n), 0)
        seen.append((x, prepare(x), classes, lr))
        return distil(net, teacher, images, n, classes, recipe, lr, prepare, *rest, **more)

    monkeypatch.setattr(common.evaluate, "distil_knowledge", watched_distil)
    flags = KD | dict(protocol=("kd",), neighbours=("random", "gaussian"), runs=1, data_dir=str(tmp_path / "data"))
    evaluate(tmp_path, whitened, data=(str(other),), **flags)
    distilled = load_distilled(whitened / "distilled.safetensors")
    mean, std = distilled.mean.view(-1, 1, 1), distilled.std.view(-1, 1, 1)
    (random, own, noise) = (seen[0], seen[2], seen[1])
    assert torch.allclose(own[0], (distilled.x - mean) / std, atol=1e-5)
    assert torch.allclose(own[1], distilled.inputs(), atol=1e-5)
    assert torch.allclose(random[1].flatten(1), (random[0] - distilled.zca_mean).flatten(1) @ distilled.zca, atol=1e-4)
    assert not torch.allclose(own[1], own[0], atol=0.1)
    assert [each[2] for each in seen] == [2, 2, 2]
    assert [each[3] for each in seen] == [KD["kd"].lr, KD["kd"].lr_gaussian, KD["kd"].lr]
    assert noise[0].shape == own[0].shape
    seen.clear()
    evaluate(tmp_path, plain, data=(str(other),), **flags | dict(neighbours=()))
    assert torch.equal(seen[0][0], seen[0][1])


# ---------------------------------------------------------------------------------------- protocols on another target


@pytest.mark.parametrize("name", ["krr_st", "frepo", "scdd"])
def test_every_protocol_on_another_target(made, targets, tmp_path, capsys, name):
    folder, _ = made(name)
    use = ("probe", "finetune", "knn", "kd")
    flags = QUICK | KD | dict(protocol=use, data=(str(targets / "low"),), neighbours=("none", "random"), knn_k=5)
    result = evaluate(tmp_path, folder, **flags)
    out = capsys.readouterr().out
    model = dict(krr_st="convnet", frepo="frepo_conv", scdd="scdd_resnet10")[name]
    found = values(result)
    metrics = dict(probe=["probe", "few_5", "few_1", "part_5", "part_1"], finetune=["finetune"], knn=["knn"], kd=["kd"])
    assert list(found) == [(row, "low", protocol, model, metric) for row, protocol, metric in sorted(
        ((row, protocol, metric) for row in ("none", "random", name) for protocol in use for metric in metrics[protocol]
         if (row, protocol) != ("none", "kd")),
        key=lambda each: (["none", "random", name].index(each[0]), use.index(each[1]), metrics[each[1]].index(each[2])),
    )]  # fmt: skip
    for (row, _, protocol, _, metric), of in found.items():
        assert len(of["values"]) == 2 and min(of["values"]) >= 0 and max(of["values"]) <= 1
        assert of["mean"] == pytest.approx(sum(of["values"]) / 2)
        assert of["std"] == pytest.approx(abs(of["values"][0] - of["values"][1]) / 2**0.5)
        if metric in metrics["probe"][1:]:
            assert [len(draws) for draws in of["draws"]] == [2, 2]
            assert of["values"] == pytest.approx([sum(draws) / 2 for draws in of["draws"]])
        block = out.split(f"\n{protocol}, {model}\n")[1].split("\n\n")[0].splitlines()
        heads = block[0].split()
        (line,) = [line for line in block if line.split()[0] == row]
        cells = re.findall(r"-?[\d.]+ ± [\d.]+|(?<=\s)-(?=\s|$)", line[len(row) :])
        assert cells[heads.index(metric)] == f"{100 * of['mean']:.1f} ± {100 * of['std']:.1f}"
    assert "mean ± sample std over 2 networks, in per cent of all test images, last step" in out
    kept = json.loads((newest(tmp_path) / "result.json").read_text())
    assert kept["cells"] == json.loads(json.dumps(result["cells"]))
    assert kept["args"]["protocol"] == list(use) and kept["args"]["knn_k"] == 5
    assert kept["args"]["kd"]["epochs"] == 2 and kept["args"]["transfer"]["finetune_steps"] == 2
    for row, facts in kept["rows"].items():
        transfer = facts["transfer"]
        assert [transfer[k] for k in ("probe_steps", "few_draws", "finetune_steps")] == [3, 2, 2], row
        assert facts["kind"] == (
            "none" if row == "none" else dict(krr_st="features", frepo="scores", scdd="soft")[name]
        )
    recipe = kept["rows"][name]["recipe"]
    assert recipe["epochs" if name != "frepo" else "steps"] == dict(krr_st=2, frepo=30, scdd=3)[name]
    assert kept["rows"]["random"]["recipe"] == recipe
    n = dict(krr_st=5, frepo=10, scdd=20)[name]
    assert [kept["rows"][row]["images"] for row in ("none", "random", name)] == [0, n, n]
    assert kept["rows"][name]["content"] == load("digits").content
    assert kept["method"] == "evaluate" and kept["data"] == "digits" and kept["seed"] == 0
    minus = {(m["row"], m["protocol"], m["metric"]): m for m in kept["minus_random"]}
    for metric in metrics["probe"]:
        a, b = found[name, "low", "probe", model, metric], found["random", "low", "probe", model, metric]
        assert minus[name, "probe", metric]["mean"] == pytest.approx(a["mean"] - b["mean"], abs=1e-7)
        apart = [u - v for u, v in zip(a["values"], b["values"], strict=True)]
        assert minus[name, "probe", metric]["se_networks"] == pytest.approx(abs(apart[0] - apart[1]) / 2, abs=1e-7)
    assert ("none", "kd", "kd") not in minus and (name, "kd", "kd") in minus


def test_targets_and_models_beside_each_other(made, targets, tmp_path, capsys):
    """Each target, protocol and model has its column or block; the network of a row is trained once for all targets."""
    folder, _ = made("krr_st")
    data = (str(targets / "low"), "digits", str(targets / "high"), "digits")
    use = ("finetune", "knn", "probe")  # fine-tuning is of a copy: those after it see the network as it was
    flags = QUICK | dict(protocol=use, models=("own", "vgg11", "convnet"), runs=1, neighbours=("none",))
    result = evaluate(tmp_path, folder, data=data, widths=WIDTHS, **flags)
    out = capsys.readouterr().out
    found = values(result)
    assert {place[1] for place in found} == {"low", "digits", "high"}
    assert {place[3] for place in found} == {"convnet", "vgg11"}
    assert ("krr_st", "digits", "probe", "vgg11", "match") in found  # on its source alone
    assert ("krr_st", "low", "probe", "vgg11", "match") not in found
    block = out.split("\nknn, vgg11\n")[1].split("\n\n")[0].splitlines()
    assert block[0].split() == ["low", "digits", "high"]
    block = out.split("\nprobe, convnet\n")[1].split("\n")[0]
    for target in ("low", "digits", "high"):
        assert f"{target} probe" in block
    cell = found["krr_st", "digits", "probe", "convnet", "match"]
    assert f"{cell['mean']:.3f} ± {cell['std']:.3f}" in out.split("\nprobe, convnet\n")[1].splitlines()[2]
    assert "match: squared error to the teacher's features over that of their mean" in out
    for use in (("finetune", "knn", "probe"), ("knn",)):
        alone = values(evaluate(tmp_path, folder, data=data[1:2], widths=WIDTHS, **flags | dict(protocol=use)))
        assert {place: found[place] for place in alone} == alone


def test_networks_and_draws_of_all_rows_begin_alike(made, tmp_path, monkeypatch):
    """The r-th networks of all rows have equal weights before training; those of different r have not."""
    folder, _ = made("krr_st")
    starts = {}
    original = common.rows.fit_pairs

    def fit(net, x, y, *key, **sgd):
        starts.setdefault(key, []).append(torch.cat([p.detach().flatten().clone() for p in net.parameters()]))
        return original(net, x, y, *key, **sgd)

    monkeypatch.setattr(common.rows, "fit_pairs", fit)
    evaluate(tmp_path, folder, neighbours=("random", "kmeans", "all_real"), protocol=("knn",))
    assert list(starts) == [(0, 0), (0, 1)]
    for each in starts.values():
        assert len(each) == 4 and all(torch.equal(each[0], one) for one in each)
    assert not torch.equal(starts[0, 0][0], starts[0, 1][0])


# ------------------------------------------------------------------------------------------------- stopping and resume

TABLE = QUICK | dict(protocol=("probe", "knn", "finetune"), neighbours=("none", "random", "teacher"))


@pytest.fixture(scope="module")
def whole(made, targets, tmp_path_factory):
    """(folder, result) of an evaluation that was not stopped: 4 rows, 2 networks, 3 protocols, 2 targets."""
    out_dir = tmp_path_factory.mktemp("whole")
    result = evaluate(out_dir, made("krr_st")[0], data=("digits", str(targets / "low")), **TABLE)
    return newest(out_dir), result


@pytest.mark.parametrize("kind", slow_but([KeyboardInterrupt], [KeyboardInterrupt, RuntimeError]))
@pytest.mark.parametrize("at", slow_but([9], [1, 9, 20]))
def test_stopped_in_a_cell(made, whole, targets, tmp_path, monkeypatch, capsys, kind, at):
    """Whatever stops a table, it goes on at the cell that was not finished, to the same bits."""
    flags = TABLE | dict(data=("digits", str(targets / "low")))
    score, calls, trainings = common.evaluate.score, [], []
    trained = common.evaluate.trained

    def stopping(cell, net, *rest):
        calls.append(cell.file)
        scores = score(cell, net, *rest)  # a network that is left changed would show
        if len(calls) == at:
            raise kind("stop")
        return scores

    def counted(row, model, run):
        trainings.append((row.name, model, run))
        torch.manual_seed(len(trainings))  # nothing may hang on the global generator
        return trained(row, model, run)

    monkeypatch.setattr(common.evaluate, "score", stopping)
    monkeypatch.setattr(common.evaluate, "trained", counted)
    with pytest.raises(kind):
        evaluate(tmp_path, made("krr_st")[0], **flags)
    folder, before = newest(tmp_path), list(trainings)
    assert not (folder / "result.json").exists()
    assert sorted(path.name for path in (folder / "cells").iterdir()) == sorted(calls[:-1])
    interrupted = calls[-1]
    capsys.readouterr()
    calls.clear(), trainings.clear()
    monkeypatch.setattr(common.evaluate, "score", lambda cell, *rest: (calls.append(cell.file), score(cell, *rest))[1])
    result = evaluate(tmp_path, made("krr_st")[0], **flags | dict(resume=str(folder)))
    assert calls[0] == interrupted and len(calls) == len(scores_in(folder)) - at + 1
    # the network that was being used lies in a file: the others alone are trained
    assert not set(before) & set(trainings)
    out = capsys.readouterr().out
    assert (f", {at - 1} finished before" in out) == (at > 1)
    assert values(result) == values(whole[1]) and scores_in(folder) == scores_in(whole[0])
    assert result["minus_random"] == whole[1]["minus_random"]
    assert not any((folder / "networks").iterdir())
    assert [path for path in tmp_path.iterdir() if path.name.startswith("digits__evaluate")] == [folder]


def test_stopped_in_a_training(made, tmp_path, monkeypatch, whole, targets):
    """A training that is cut off leaves nothing; half-written files of a killed process are removed."""
    flags = TABLE | dict(data=("digits", str(targets / "low")))
    fit, calls = common.rows.fit_pairs, []

    def stopping(*args, **sgd):
        calls.append(args[3:])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args, **sgd)

    monkeypatch.setattr(common.rows, "fit_pairs", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, made("krr_st")[0], **flags)
    folder = newest(tmp_path)
    (folder / "cells" / ".half.json.12.tmp").write_text('{"key"')
    (folder / "networks" / ".half.safetensors.12.tmp").write_bytes(b"half")
    result = evaluate(tmp_path, made("krr_st")[0], **flags | dict(resume=str(folder)))
    assert values(result) == values(whole[1])
    assert not list(folder.rglob("*.tmp"))


def test_a_damaged_cell_is_computed_again(made, whole, targets, tmp_path, watch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    cells = {path: json.loads(path.read_text()) for path in sorted((folder / "cells").iterdir())}
    cut, empty, other, half = list(cells)[2:6]
    cut.write_text(cut.read_text()[: len(cut.read_text()) // 2])
    empty.write_text("")
    other.write_text(json.dumps(cells[other] | dict(key="0" * 64, scores=dict(knn=7.0))))  # of something else
    half.write_text(json.dumps(dict(key=cells[half]["key"])))
    flags = TABLE | dict(data=("digits", str(targets / "low")), resume=str(folder))
    result = evaluate(tmp_path, made("krr_st")[0], **flags)
    assert len(watch["scored"]) == 4
    assert values(result) == values(whole[1]) and scores_in(folder) == scores_in(whole[0])
    out = capsys.readouterr().out
    for path in (cut, empty, half):
        assert f"{path.name} cannot be read" in out
    assert f", {len(cells) - 4} finished before" in out


@pytest.mark.parametrize("damage", slow_but(["cut"], ["cut", "empty", "another", "none"]))
def test_a_damaged_network_is_trained_again(made, whole, targets, tmp_path, monkeypatch, capsys, damage):
    flags = TABLE | dict(data=("digits", str(targets / "low")))
    score, trained, calls, trainings = common.evaluate.score, common.evaluate.trained, [], []

    def stopping(cell, *rest):
        calls.append(cell)
        if len(calls) == 20:  # of row random
            raise KeyboardInterrupt
        return score(cell, *rest)

    monkeypatch.setattr(common.evaluate, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, made("krr_st")[0], **flags)
    monkeypatch.setattr(common.evaluate, "score", score)
    monkeypatch.setattr(common.evaluate, "trained", lambda *args: (trainings.append(args[1:]), trained(*args))[1])
    folder = newest(tmp_path)
    (network,) = (folder / "networks").iterdir()
    if damage == "cut":
        network.write_bytes(network.read_bytes()[:-100])
    elif damage == "empty":
        network.write_bytes(b"")
    elif damage == "another":
        from safetensors.torch import save_file

        weights = load_file(network)
        save_file({key: value for key, value in weights.items() if "head" not in key}, network)
    capsys.readouterr()
    result = evaluate(tmp_path, made("krr_st")[0], **flags | dict(resume=str(folder)))
    out = capsys.readouterr().out
    first = (calls[-1].model, calls[-1].run)
    assert (f"{network} cannot be read" in out) == (damage != "none")
    assert trainings.count(first) == (2 if damage != "none" else 1)  # of random, of krr_st
    assert values(result) == values(whole[1])


def test_more_of_everything_computes_what_is_new(made, targets, tmp_path, watch):
    folder, _ = made("krr_st")
    flags = QUICK | dict(protocol=("knn",), neighbours=("none",), runs=1, data=("digits",))
    evaluate(tmp_path, folder, **flags)
    evaluation = newest(tmp_path)
    before = scores_in(evaluation)
    assert len(watch["scored"]) == 2
    steps = (
        (dict(runs=2), {("none", "convnet", 1, "knn", "digits"), ("krr_st", "convnet", 1, "knn", "digits")}),
        (dict(neighbours=("none", "random")), {("random", "convnet", run, "knn", "digits") for run in (0, 1)}),
        (
            dict(protocol=("knn", "probe")),
            {(row, "convnet", run, "probe", "digits") for row in ("none", "random", "krr_st") for run in (0, 1)},
        ),
        (
            dict(models=("own", "vgg11"), widths=WIDTHS),
            {(row, "vgg11", run, use, "digits") for row in ("none", "random", "krr_st") for run in (0, 1)
             for use in ("knn", "probe")},
        ),
        (
            dict(data=("digits", str(targets / "low"))),
            {(row, model, run, use, "low") for row in ("none", "random", "krr_st") for run in (0, 1)
             for use in ("knn", "probe") for model in ("convnet", "vgg11")},
        ),
        (dict(), set()),
        (dict(runs=1), set()),
    )  # fmt: skip
    for more, new in steps:
        watch["scored"].clear(), watch["trained"].clear()
        flags |= more
        result = evaluate(tmp_path, folder, resume=str(evaluation), **flags)
        assert set(watch["scored"]) == new and len(watch["scored"]) == len(new), more
        after = scores_in(evaluation)
        assert {name: after[name] for name in before} == before
        before = after
    assert all(len(cell["values"]) == 1 for cell in result["cells"])
    assert values(result) == values(evaluate(tmp_path / "fresh", folder, **flags))


def test_a_source_by_its_name_is_the_same_target(made, tmp_path, watch):
    folder, flags = made("krr_st")[0], QUICK | dict(protocol=("knn",), neighbours=(), runs=1)
    evaluate(tmp_path, folder, **flags)
    evaluate(tmp_path, folder, **flags, data=("digits",), resume=str(newest(tmp_path)))
    assert len(watch["scored"]) == 1


def test_a_second_set_leaves_the_rows_of_the_first(made, tmp_path, watch):
    a, b = made("krr_st")[0], made("boost_pca")[0]
    flags = QUICK | dict(protocol=("knn",), neighbours=("random",), runs=1)
    evaluate(tmp_path, a, **flags)
    watch["scored"].clear()
    evaluate(tmp_path, a, b, **flags, resume=str(newest(tmp_path)))
    assert {place[0] for place in watch["scored"]} == {"random (boost_pca)", "boost_pca"}


CHANGES = [
    (dict(transfer=replace(QUICK["transfer"], epochs=3)), "random krr_st", "probe finetune knn kd"),
    (dict(transfer=replace(QUICK["transfer"], batch=3)), "random krr_st", "probe finetune knn kd"),
    (dict(transfer=replace(QUICK["transfer"], lr=0.2)), "random krr_st", "probe finetune knn kd"),
    (dict(transfer=replace(QUICK["transfer"], momentum=0.5)), "random krr_st", "probe finetune knn kd"),
    (dict(transfer=replace(QUICK["transfer"], weight_decay=0.1)), "random krr_st", "probe finetune knn kd"),
    (dict(transfer=replace(QUICK["transfer"], probe_steps=4)), "none random krr_st teacher", "probe"),
    (dict(transfer=replace(QUICK["transfer"], probe_lr=0.4)), "none random krr_st teacher", "probe"),
    (dict(transfer=replace(QUICK["transfer"], probe_batch=8)), "none random krr_st teacher", "probe"),
    (dict(transfer=replace(QUICK["transfer"], few_draws=3)), "none random krr_st teacher", "probe"),
    (dict(transfer=replace(QUICK["transfer"], few_ridge=1.0)), "none random krr_st teacher", "probe"),
    (dict(transfer=replace(QUICK["transfer"], finetune_steps=3)), "none random krr_st", "finetune"),
    (dict(transfer=replace(QUICK["transfer"], finetune_lr=0.5)), "none random krr_st", "finetune"),
    (dict(transfer=replace(QUICK["transfer"], finetune_batch=8)), "none random krr_st", "finetune"),
    (dict(transfer=replace(QUICK["transfer"], finetune_weight_decay=0.5)), "none random krr_st", "finetune"),
    (dict(knn_k=3), "none random krr_st teacher", "knn"),
    (dict(knn_temperature=0.5), "none random krr_st teacher", "knn"),
    (dict(kd=replace(KD["kd"], epochs=3)), "random krr_st", "kd"),
    (dict(kd=replace(KD["kd"], batch=2)), "random krr_st", "kd"),
    (dict(kd=replace(KD["kd"], lr=1e-2)), "random krr_st", "kd"),
    (dict(kd=replace(KD["kd"], temperature=3.0)), "random krr_st", "kd"),
    (dict(kd=replace(KD["kd"], dsa="none")), "random krr_st", "kd"),
    (dict(kd=replace(KD["kd"], student_test_mode="train")), "random krr_st", "kd"),
    (dict(kd=replace(KD["kd"], teacher_mode="train")), "random krr_st", "kd"),
    (dict(kd_teacher_epochs=2), "random krr_st", "kd"),
    (dict(kd_teacher_width=3), "random krr_st", "kd"),
    (dict(kd_teacher_lr=0.01), "random krr_st", "kd"),
    (dict(kd_teacher_batch=50), "random krr_st", "kd"),
    (dict(seed=3), "none random krr_st teacher", "probe finetune knn kd"),
    (dict(widths=(4, 6)), "none random krr_st", "probe finetune knn kd"),
    (dict(norm="instance"), "none random krr_st", "probe finetune knn kd"),
]


def cells_of(out_dir, *specs, **flags) -> dict[tuple, str]:
    """{(row, model, run, use, target): key} of the cells of an evaluation that is not begun."""
    args = common.evaluate.checked(
        Args(**dict(artefacts=tuple(map(str, specs)), device="cpu", out_dir=str(out_dir)) | flags)
    )
    device = torch.device("cpu")
    entries, targets = common.evaluate.entries_of(args, device), common.evaluate.Targets(args, device)
    rows = common.evaluate.rows_of(entries, args)
    cells = common.evaluate.cells_of(rows, args, targets)
    found = {(c.row.name, c.model, c.run, c.use, Path(c.target).name): (c.key, c.file) for c in cells}
    assert len(found) == len(cells) == len({key for key, _ in found.values()}) == len({f for _, f in found.values()})
    return {place: key for place, (key, _) in found.items()}


def test_what_a_cell_depends_on(made, tmp_path):
    """A flag that changes a score changes its cell's key, and one that does not leaves it as it is."""
    folder, _ = made("krr_st")
    use = ("probe", "finetune", "knn", "kd")
    flags = QUICK | KD | dict(protocol=use, neighbours=("none", "random", "teacher"), runs=1)
    before = cells_of(tmp_path, folder, **flags)
    for change, rows, uses in CHANGES:
        after = cells_of(tmp_path, folder, **flags | change)
        assert after.keys() == before.keys()
        changed = {place for place in after if after[place] != before[place]}
        wanted = {place for place in after if place[0] in rows.split() and place[3] in uses.split()}
        spare = {place for place in after if place[0] == "teacher" and ("widths" in change or "norm" in change)}
        assert wanted <= changed <= wanted | spare, (change, wanted ^ changed)
    same = dict(cache_gb=0.001, scores=ScoresFlags(steps=3), soft=SoftFlags(epochs=3), labels=LabelRecipe(epochs=7))
    same |= dict(data_dir=str(tmp_path / "elsewhere"), dm=DM(iterations=1), dsa=DSA(iterations=1), high_loss_epochs=3)
    assert cells_of(tmp_path, folder, **flags | same) == before
    # more networks are added to those that are there
    more = cells_of(tmp_path, folder, **flags | dict(runs=2))
    assert {place: more[place] for place in before} == before


@pytest.mark.parametrize(
    ("name", "changes", "neighbours"),
    [
        ("frepo", [dict(scores=ScoresFlags(**{k: v})) for k, v in dict(
            steps=7, batch=3, lr=1e-2, warm_up=1, lr_end=0.5, loss="xent", dsa="crop", strengths="dc",
            shared=True, shuffle=False, ridge=1e-2, flip=True).items()], "random"),
        ("scdd", [dict(soft=SoftFlags(**{k: v})) for k, v in dict(
            epochs=3, batch=4, lr=1e-2, weight_decay=0.5, warm_up=1, smooth=3.0, temperature=2.0,
            scaled=True, crop="pad", mix="mixup", ema=0.5, teacher_train=True).items()], "random"),
    ],
)  # fmt: skip
def test_what_a_trained_student_depends_on(made, tmp_path, name, changes, neighbours):
    folder, _ = made(name)
    flags = dict(protocol=("scratch", "knn"), neighbours=("none", neighbours, f"{neighbours}:labels"), runs=1)
    before = cells_of(tmp_path, folder, **flags)
    mine = [place for place in before if place[0] in (name, neighbours)]
    for change in changes:
        after = cells_of(tmp_path, folder, **flags | change)
        (value,) = [v for flag in change.values() for v in vars(flag).values() if v is not None]
        recorded = json.loads((folder / "result.json").read_text())["protocol"]
        (key,) = [k for flag in change.values() for k, v in vars(flag).items() if v is not None]
        changed = {place for place in after if after[place] != before[place]}
        assert changed == (set(mine) if recorded[key] != value else set()), change
    for change in (dict(epochs=3), dict(batch=4), dict(lr=1.0), dict(momentum=0.1), dict(weight_decay=0.1),
                   dict(dsa="none"), dict(strengths="frepo")):  # fmt: skip
        after = cells_of(tmp_path, folder, **flags | dict(labels=LabelRecipe(**change)))
        changed = {place for place in after if after[place] != before[place]}
        assert changed == {place for place in before if place[0] == f"{neighbours}:labels"}


def test_what_a_made_row_depends_on(made, tmp_path):
    folder, _ = made("frepo")
    flags = LABELS | dict(neighbours=("dm", "dsa", "high_loss", "kmeans_pixels"), runs=1)
    before = cells_of(tmp_path, folder, **flags)
    for change, row in (
        (dict(dm=DM(iterations=3)), "dm"), (dict(dm=DM(lr_img=3.0)), "dm"), (dict(dm=DM(init="noise")), "dm"),
        (dict(dm=DM(width=3)), "dm"), (dict(dsa=DSA(iterations=3)), "dsa"), (dict(dsa=DSA(outer=3)), "dsa"),
        (dict(dsa=DSA(inner=3)), "dsa"), (dict(dsa=DSA(lr_net=3.0)), "dsa"), (dict(dsa=DSA(strategy="crop")), "dsa"),
        (dict(high_loss_networks=2), "high_loss"), (dict(high_loss_epochs=2), "high_loss"),
    ):  # fmt: skip
        after = cells_of(tmp_path, folder, **flags | change)
        assert {place[0] for place in after if after[place] != before[place]} == {row}, change


def test_the_updates_of_a_code_s_neighbours(made, tmp_path, monkeypatch):
    """They are as many as of the decoded views, whose number is not that of the neighbour's images."""
    folder, _ = made("boost_pca")
    flags = dict(protocol=("knn",), neighbours=("random",), runs=1)
    before = cells_of(tmp_path, folder, **flags)
    monkeypatch.setattr(common.rows.Entry, "n", property(lambda entry: 300))
    after = cells_of(tmp_path, folder, **flags)
    assert not set(after.values()) & set(before.values())


def test_another_set_is_another_cell(made, coloured, tmp_path):
    """Pixels, targets, whitening, size of the set and its teacher are in the keys."""
    folder, _ = made("krr_st")
    flags = dict(protocol=("knn",), neighbours=("random",), runs=1)
    before = cells_of(tmp_path, folder, **flags)
    text = json.loads((folder / "args.json").read_text())

    def other(name: str, x=lambda x: x, y=lambda y: y) -> Path:
        path = folder.parent / f"other_{name}"
        path.mkdir()
        d = load_distilled(folder / "distilled.safetensors")
        save_distilled(
            path / "distilled.safetensors", x(d.x), y(d.y), d.mean, d.std, method=d.method, data=d.data,
            content=d.meta["content"], y_is=d.y_is, class_names=d.class_names, resize=d.resize, step=d.step,
            seed=d.seed, recipe=d.recipe, teacher=d.meta["teacher"], extra=dict(widths=d.meta["widths"], norm="batch"),
        )  # fmt: skip
        (path / "args.json").write_text(json.dumps(text))
        return path

    same = cells_of(tmp_path, other("same"), **flags)
    assert same == before

    def changed(path: Path) -> set[str]:
        after = cells_of(tmp_path, path, **flags)
        return {place[0] for place in after if after[place] != before.get(place)}

    def bump(t):
        t = t.clone()
        t.view(-1)[3] += 1e-4
        return t

    assert changed(other("x", x=bump)) == {"krr_st"}
    assert changed(other("y", y=bump)) == {"krr_st"}
    assert changed(other("n", x=lambda x: x[:4], y=lambda y: y[:4])) == {"krr_st", "random"}
    whitened, plain, _, _ = coloured
    flags |= dict(data_dir=str(whitened.parent.parent / "data"))
    a, b = (cells_of(tmp_path, each, **flags) for each in (whitened, plain))
    assert not set(a.values()) & set(b.values())


def test_the_match_of_an_untrained_network_knows_its_teacher(made, another, tmp_path):
    """match is to the teacher's features: with another teacher of as many, another number."""
    folder, _ = made("krr_st")
    exchange.save_as(load_distilled(folder / "distilled.safetensors"), "krr_st", tmp_path / "foreign")
    flags = QUICK | dict(source="digits", runs=1, neighbours=("none",), widths=WIDTHS)
    found, keys = [], []
    for teacher in (teacher_of(folder), another):
        keys.append(cells_of(tmp_path, tmp_path / "foreign", teacher=teacher, **flags))
        found.append(values(evaluate(tmp_path, tmp_path / "foreign", teacher=teacher, **flags)))
    for place in found[0]:
        if place[4] == "match":
            assert found[0][place] != found[1][place]
            assert keys[0][place[0], "convnet", 0, "probe", ""] != keys[1][place[0], "convnet", 0, "probe", ""], place


def test_the_untrained_row_knows_the_whitening(coloured, tmp_path):
    """What an untrained network's features are worth depends on the whitening of its inputs."""
    whitened, plain, _, _ = coloured
    flags = QUICK | dict(
        protocol=("knn",), neighbours=("none",), data_dir=str(whitened.parent.parent / "data"), knn_k=1
    )
    a, b = (cells_of(tmp_path, each, **flags) for each in (whitened, plain))
    assert not set(a.values()) & set(b.values())


def test_two_sets_that_are_whitened_and_not_have_two_untrained_rows(coloured, tmp_path):
    whitened, plain, _, _ = coloured
    flags = QUICK | dict(
        protocol=("knn",), neighbours=("none",), data_dir=str(whitened.parent.parent / "data"), knn_k=1
    )
    both = evaluate(tmp_path, whitened, plain, **flags)
    assert len([row for row in both["rows"] if row.startswith("none")]) == 2


@pytest.mark.parametrize(
    "change",
    [
        dict(transfer=replace(QUICK["transfer"], epochs=3, finetune_steps=3)),
        pytest.param(dict(seed=2), marks=pytest.mark.slow),
        pytest.param(dict(norm="instance", knn_k=2), marks=pytest.mark.slow),
    ],
)
def test_resumed_under_other_settings_is_a_fresh_table(made, whole, targets, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    flags = TABLE | dict(data=("digits", str(targets / "low"))) | change
    resumed = evaluate(tmp_path, made("krr_st")[0], **flags, resume=str(folder))
    fresh = evaluate(tmp_path / "fresh", made("krr_st")[0], **flags)
    assert values(resumed) == values(fresh) != values(whole[1])
    back = evaluate(tmp_path, made("krr_st")[0], **TABLE, data=flags["data"], resume=str(folder))
    assert values(back) == values(whole[1])


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(made, whole, targets, tmp_path):
    words = [str(made("krr_st")[0]), "--data", "digits", str(targets / "low"), "--protocol", "probe", "knn", "finetune"]
    words += ["--neighbours", "none", "random", "teacher", "--transfer.epochs", "2", "--transfer.probe-steps", "3"]
    words += ["--transfer.few-draws", "2", "--transfer.finetune-steps", "2", "--device", "cpu"]
    words += ["--out-dir", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "common.evaluate", *words], cwd=REPO, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    folder = newest(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    assert result["cells"] == json.loads(json.dumps(whole[1]["cells"]))
    assert scores_in(folder) == scores_in(whole[0])
    assert ended.stdout.count("\nknn, convnet\n") == 1  # one of them prints the table


# -------------------------------------------------------------------------------------------------------- foreign sets


def labelled_set(path: Path, n: int = 10, one_hot: bool = True):
    """A set of real digits with class labels, as a file of ours: n images, class after class."""
    data = load("digits")
    index = some(data.y_train, -(-n // 10))[:n]
    mean, std = data.mean.view(-1, 1, 1), data.std.view(-1, 1, 1)
    z = ((data.x_train[index].float() / 255 - mean) / std).float()
    x = exchange.to_pixels(z, data.mean, data.std)
    y = torch.nn.functional.one_hot(data.y_train[index], 10).float()
    save_distilled(
        path, x, y, data.mean, data.std, method="mine", data="digits", content=data.content, y_is="class labels",
        class_names=data.class_names, resize=data.resize, step=0, seed=0, recipe={},
    )  # fmt: skip
    return load_distilled(path)


@pytest.mark.parametrize("form", ["krr_st", "mtt", "dc", "folder", "npz", "ddranking"])
def test_foreign_sets_score_as_their_conversion(made, tmp_path, form):
    """A set of another project's form, straight from its files, and after common.exchange made one of ours of it."""
    there = tmp_path / dict(dc="set.pt", npz="set.npz").get(form, "set")
    flags = LABELS | dict(runs=1, source="digits")
    if form == "krr_st":
        distilled = load_distilled(made("krr_st")[0] / "distilled.safetensors")
        teacher = next((made("krr_st")[0].parent / "teachers").glob("*barlow*")) / "teacher.safetensors"
        flags |= QUICK | dict(teacher=str(teacher), widths=WIDTHS)
    elif form == "npz":
        distilled = load_distilled(made("frepo")[0] / "distilled.safetensors")
        flags |= dict(widths=WIDTHS, scores=ScoresFlags(steps=6))
    else:
        distilled = labelled_set(tmp_path / "mine.safetensors")
    exchange.save_as(distilled, form, there)
    direct = evaluate(tmp_path / "direct", there, **flags)
    converted = tmp_path / "converted" / "set.safetensors"
    exchange.main(exchange.Args(paths=(str(there), str(converted)), source="digits"))
    assert torch.equal(load_distilled(converted).x, exchange.load_any(there, load("digits")).x)
    after = evaluate(tmp_path / "after", converted, **flags)
    assert values(direct) == values(after)
    facts = direct["rows"][form]
    assert facts["form"] == form and facts["imported_from"] == there.name
    assert facts["kind"] == dict(krr_st="features", npz="scores").get(form, "labels")
    assert {cell["protocol"] for cell in direct["cells"]} == {"probe" if form == "krr_st" else "scratch"}
    assert {cell["row"] for cell in direct["cells"]} == {"none", "random", form} - (
        {"none"} if form != "krr_st" else set()
    )
    if form == "krr_st":  # the script's own numbers, but for the schedule and its networks
        own = values(evaluate(tmp_path / "own", made("krr_st")[0], **flags | dict(source=None)))
        theirs = {(row, *rest): of for (row, *rest), of in values(direct).items()}
        assert {place: theirs[tuple(place)] for place in own} == own


def test_a_set_needs_its_source(tmp_path):
    labelled_set(tmp_path / "mine.safetensors")
    exchange.save_as(load_distilled(tmp_path / "mine.safetensors"), "mtt", tmp_path / "set")
    refuse(lambda: evaluate(tmp_path, tmp_path / "set"), "--source")


# ------------------------------------------------------------------------------------------- tables, names and reports


def test_a_table_of_krr_st(made, targets, tmp_path, capsys):
    """--table: its rows and columns, "-" where nothing was given; 3 networks; random ones learn labels."""
    folder, _ = made("frepo")
    words = ("none", "random:labels", "dm")
    flags = QUICK | LABELS | dict(table=1, neighbours=words, models=("convnet",), dm=DM(iterations=1, width=2))
    result = evaluate(tmp_path, folder, data=("digits", str(targets / "low")), **flags)
    out = capsys.readouterr().out
    head, *lines = out.split("KRR-ST's Table 1, ")[1].split("\n\n")[0].splitlines()
    assert head == "convnet" and lines[0].split() == ["digits", "low"]
    rows = [line.replace("w/o pre", "none").split()[0] for line in lines[1:]]
    assert rows[:8] == ["none", "random", "kmeans", "dsa", "dm", "mtt", "kip", "frepo"]
    found = values(result)
    for label, row in (("w/o pre", "none"), ("random", "random:labels"), ("dm", "dm"), ("frepo", "frepo")):
        (line,) = [line for line in lines if line.startswith(f"{label} ")]
        shown = re.findall(r"[\d.]+ ± [\d.]+", line)
        cells = [found[row, target, "finetune", "convnet", "finetune"] for target in ("digits", "low")]
        assert shown == [f"{100 * of['mean']:.1f} ± {100 * of['std']:.1f}" for of in cells]
        assert all(len(of["values"]) == 3 for of in cells)
    for label in ("kmeans", "dsa", "mtt", "kip"):
        (line,) = [line for line in lines if line.startswith(f"{label} ")]
        assert line.split()[1:] == ["-", "-"]


def test_a_table_tells_two_random_rows_apart(made, tmp_path, capsys):
    flags = (
        QUICK | LABELS | dict(table=1, neighbours=("random", "random:labels"), models=("convnet",), data=("digits",))
    )
    result = evaluate(tmp_path, made("frepo")[0], **flags)
    out, found = capsys.readouterr().out, values(result)
    for row in ("random", "random:labels"):
        of = found[row, "digits", "finetune", "convnet", "finetune"]
        assert f"{100 * of['mean']:.1f} ± {100 * of['std']:.1f}" in out
    lines = [line for line in out.splitlines() if line.startswith("random ")]
    assert len(lines) <= 1 or lines[0] != lines[1]


def test_the_ranking_by_hand(made, tmp_path, capsys):
    """Hard-label recovery and improvement over random, from the table's own cells."""
    folder, _ = made("frepo")
    result = evaluate(
        tmp_path, folder, ranking=True, neighbours=("none",), labels=LabelRecipe(epochs=40), models=("frepo_conv",)
    )
    found = {row: of["values"] for (row, _, _, _, metric), of in values(result).items() if metric == "accuracy"}
    assert found.keys() == {"random", "all_real:labels", "frepo", "frepo:labels"}
    for name, (a, b) in dict(
        hard_label_recovery=("all_real:labels", "frepo:labels"), improvement_over_random=("frepo", "random")
    ).items():
        apart = [u - v for u, v in zip(found[a], found[b], strict=True)]
        of = result["ranking"]["frepo, frepo_conv, digits"][name]
        assert of["mean"] == pytest.approx(sum(apart) / 2)
        assert of["se_networks"] == pytest.approx(abs(apart[0] - apart[1]) / 2)
    out = capsys.readouterr().out
    measures = result["ranking"]["frepo, frepo_conv, digits"]
    for name, of in measures.items():
        assert f"{name.replace('_', ' ')} {100 * of['mean']:.1f} ± {100 * of['se_networks']:.1f}" in out
    assert found["frepo"] != found["frepo:labels"] and found["random"] != found["all_real:labels"]


def test_hard_labels_of_a_set_of_scores(made, tmp_path, monkeypatch):
    """--y labels: trained on the class that is highest, by the schedule of labels."""
    folder, _ = made("frepo")
    seen = []
    original = common.rows.fit_labels

    def fit(net, images, y, recipe, steps, *key):
        seen.append((y.clone(), recipe.epochs, steps))
        return original(net, images, y, recipe, steps, *key)

    monkeypatch.setattr(common.rows, "fit_labels", fit)
    result = evaluate(
        tmp_path, folder, y="labels", neighbours=("random",), runs=1, labels=LabelRecipe(epochs=3, batch=8)
    )
    y = load_distilled(folder / "distilled.safetensors").y
    assert [each[1:] for each in seen] == [(3, 6), (3, 6)]
    assert torch.equal(seen[1][0], y.argmax(1)) and seen[0][0].tolist() == list(range(10))
    assert {cell["model"] for cell in result["cells"]} == {"dc_convnet"}
    assert result["kind"] == "labels" and result["rows"]["frepo"]["recipe"]["epochs"] == 3


def test_several_sets_and_equal_names(made, tmp_path):
    """Sets of one name are numbered; a neighbour that stands beside several equal ones is made once."""
    folder, _ = made("frepo")
    twin = folder.parent / "twin"
    twin.mkdir(exist_ok=True)
    shutil.copy(folder / "distilled.safetensors", twin)
    flags = dict(runs=1, neighbours=("random",), scores=ScoresFlags(steps=3))
    both = evaluate(tmp_path, folder, twin / "distilled.safetensors", **flags)
    names = [f"frepo 1 ({folder.name})", "frepo 2 (twin)"]
    assert list(both["rows"]) == ["random", *names]
    alone = values(evaluate(tmp_path, folder, **flags))
    for (row, *rest), of in alone.items():
        for name in names if row == "frepo" else ["random"]:
            assert values(both)[name, *rest] == of


def test_sets_of_two_methods(made, tmp_path):
    """Neighbours that differ by the set beside them carry its name; numbers are those of each set alone."""
    sets = {name: made(name)[0] for name in ("krr_st", "boost_pca")}
    flags = QUICK | dict(runs=1, neighbours=("none", "random"), protocol=("knn",))
    both = values(evaluate(tmp_path, *sets.values(), **flags))
    assert {place[0] for place in both} == {"none (krr_st)", "none (boost_pca)", "random (krr_st)",
                                            "random (boost_pca)", *sets} or {place[0] for place in both} == {
        "none", "random (krr_st)", "random (boost_pca)", *sets}  # fmt: skip
    for name, folder in sets.items():
        for (row, *rest), of in values(evaluate(tmp_path, folder, **flags)).items():
            named = [(n, *rest) for n in (row, f"{row} ({name})") if (n, *rest) in both]
            assert any(both[place] == of for place in named)


def test_differences_from_random_of_several_sets(made, tmp_path):
    sets = [made(name)[0] for name in ("krr_st", "boost_pca")]
    flags = QUICK | dict(runs=1, neighbours=("random",), protocol=("knn",))
    result = evaluate(tmp_path, *sets, **flags)
    assert {m["row"] for m in result["minus_random"]} >= {"krr_st", "boost_pca"}


def test_two_targets_of_one_name_stay_apart(made, targets, tmp_path):
    """Folders a/pets and b/pets are two targets, not two networks."""
    for place, source in (("a", "low"), ("b", "high")):
        shutil.copytree(targets / source, tmp_path / place / "pets")
    flags = QUICK | dict(runs=1, neighbours=(), protocol=("knn",))
    folders = tuple(str(tmp_path / place / "pets") for place in ("a", "b"))
    result = evaluate(tmp_path, made("krr_st")[0], data=folders, **flags)
    assert [len(cell["values"]) for cell in result["cells"]] == [1, 1]


def test_knowledge_from_the_neighbours_of_a_code(made, tmp_path):
    """A code's neighbours have another number of images than its decoded views."""
    evaluate(tmp_path, made("boost_pca")[0], neighbours=("random",), protocol=("kd",), runs=1, **KD)


def test_a_report_is_written_of_runs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(common.evaluate, "write_report", lambda *args: (seen.append(args), tmp_path / "page.html")[1])
    result = main(Args(report=("one", "two"), data_dir="there", out_dir=str(tmp_path / "runs")))
    assert seen == [([Path("one"), Path("two")], None, Path("there"))]
    assert result == dict(report=str(tmp_path / "page.html")) and not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------- bad input


def unlabelled(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(root / part / f"{number}.png")
    return root


def one_class(root: Path) -> Path:
    unlabelled(root / "whole")
    for part in ("train", "test"):
        (root / "one" / part).mkdir(parents=True)
        shutil.move(root / "whole" / part, root / "one" / part / "cat")
    return root / "one"


BAD = {
    "row": ("krr_st", dict(neighbours=("foo",)), ["--neighbours foo", "kmeans"]),
    "kind of row": ("krr_st", dict(neighbours=("random:foo",)), ["random:foo", "features"]),
    "model": ("krr_st", dict(models=("foo",)), ["--models foo"]),
    "student": ("frepo", dict(models=("frepo_foo",)), ["--models", "foo"]),
    "target": ("krr_st", dict(data=("foo",)), ["foo", "no such folder"]),
    "set": ("/nowhere/at all", {}, ["/nowhere/at all", "no such set"]),
    "no set": (None, {}, ["name a set"]),
    "teacher missing": ("krr_st", dict(teacher="/nowhere.safetensors"), ["/nowhere.safetensors"]),
    "no teacher": ("frepo", dict(neighbours=("kmeans",)), ["names no teacher", "--teacher"]),
    "y of features": ("krr_st", dict(y="labels"), ["--y labels"]),
    "scratch of features": ("krr_st", dict(protocol=("scratch",)), ["--protocol scratch", "probe"]),
    "dm of five": ("krr_st", dict(neighbours=("dm",)), ["5 images", "10 classes"]),
    "kd student mode": (
        "krr_st",
        dict(protocol=("kd",), kd=KdRecipe(student_test_mode="foo")),
        ["student-test-mode foo"],
    ),
    "kd teacher mode": ("krr_st", dict(protocol=("kd",), kd=KdRecipe(teacher_mode="foo")), ["teacher-mode foo"]),
    "kd epochs": ("krr_st", dict(protocol=("kd",), kd=KdRecipe(epochs=0)), ["--kd.epochs 0"]),
    "kd batch": ("krr_st", dict(protocol=("kd",), kd=KdRecipe(batch=0)), ["--kd.batch 0"]),
    "kd temperature": ("krr_st", dict(protocol=("kd",), kd=KdRecipe(temperature=0.0)), ["--kd.temperature 0"]),
    "kd teacher": ("krr_st", dict(protocol=("kd",), kd_teacher="/nowhere.pt"), ["--kd-teacher /nowhere.pt"]),
    "labels epochs": ("frepo", dict(y="labels", labels=LabelRecipe(epochs=0)), ["--labels.epochs 0"]),
    "labels batch": ("frepo", dict(y="labels", labels=LabelRecipe(batch=0)), ["--labels.batch 0"]),
    "labels strategy": ("frepo", dict(y="labels", labels=LabelRecipe(dsa="foo")), ["foo"]),
    "soft epochs": ("scdd", dict(soft=SoftFlags(epochs=0)), ["epochs 0"]),
    "soft loss": ("scdd", dict(soft=SoftFlags(loss="foo")), ["foo", "kl"]),
    "ranking without scratch": ("frepo", dict(ranking=True, protocol=("knn",)), ["--ranking", "scratch"]),
    "source": ("krr_st", dict(source="nowhere"), ["nowhere", "--source"]),
    "runs": ("krr_st", dict(runs=0), ["--runs 0"]),
    "widths": ("krr_st", dict(widths=(4, 4, 4)), ["--widths 4 4 4", "2 blocks"]),
    "knn": ("krr_st", dict(knn_k=0), ["--knn-k 0"]),
    "temperature": ("krr_st", dict(knn_temperature=0.0), ["--knn-temperature 0"]),
    "transfer epochs": ("krr_st", dict(transfer=TransferFlags(epochs=0)), ["epochs"]),
    "transfer batch": ("krr_st", dict(transfer=TransferFlags(batch=0)), ["batch"]),
    "few draws": ("krr_st", dict(transfer=TransferFlags(few_draws=0)), ["few"]),
    "scores steps": ("frepo", dict(scores=ScoresFlags(steps=0)), ["steps"]),
    "scores batch": ("frepo", dict(scores=ScoresFlags(batch=0)), ["batch"]),
    "scores loss": ("frepo", dict(scores=ScoresFlags(loss="foo")), ["foo"]),
    "scdd student": ("frepo", dict(models=("scdd_resnet99",)), ["--models", "resnet99"]),
    "neighbours to vote": ("krr_st", dict(protocol=("knn",), knn_k=10_000), ["--knn-k 10000", "1437"]),
    "table without fine-tuning": ("krr_st", dict(table=1, protocol=("knn",)), ["--table", "finetune"]),
    "fine-tuning": ("krr_st", dict(transfer=TransferFlags(finetune_steps=0)), ["--transfer.finetune-steps 0"]),
    "dsa": ("frepo", dict(dsa=DSA(batch_train=0)), ["--dsa.batch-train 0"]),
    "dm": ("frepo", dict(dm=DM(iterations=0)), ["--dm.iterations 0"]),
    "resume": ("krr_st", dict(resume="/nowhere/at all"), ["--resume /nowhere/at all"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(made, tmp_path, what):
    """And leaves nothing behind: no folder is begun."""
    name, flags, words = BAD[what]
    specs = [] if name is None else [made(name)[0] if name in RUNS else name]
    refuse(lambda: evaluate(tmp_path, *specs, **flags), *words)
    late = ("labels strategy", "soft loss")  # which the training looks at
    assert what in late or not list(tmp_path.glob("*__evaluate__*"))


def test_bad_targets(made, targets, tmp_path):
    folder, students = made("krr_st")[0], made("frepo")[0]
    flags = dict(data_dir=str(tmp_path / "data"), protocol=("knn",))
    for target in (unlabelled(tmp_path / "plain"), one_class(tmp_path / "single")):
        refuse(lambda target=target: evaluate(tmp_path, folder, data=(str(target),), **flags), "labels", str(target))
    flags |= dict(protocol=("scratch",), data=(str(targets / "low"),))
    refuse(lambda: evaluate(tmp_path, students, **flags), "--protocol scratch", "low", "other classes")
    # the same number of classes by other names
    shutil.copytree(targets / "low", tmp_path / "renamed")
    for part in ("train", "test"):
        for number, path in enumerate(sorted((targets / "high" / part).iterdir())):
            shutil.copytree(path, tmp_path / "renamed" / part / f"class {number}")
    refuse(lambda: evaluate(tmp_path, students, **flags | dict(data=(str(tmp_path / "renamed"),))), "other classes")
    assert load(str(tmp_path / "renamed"), data_dir=str(tmp_path / "data")).num_classes == 10


def test_bad_teachers_and_sources(made, coloured, another, tmp_path):
    folder, _ = made("krr_st")
    wide = train_supervised(load("digits"), tmp_path / "t", torch.device("cpu"), arch="resnet10", width=3, epochs=1)
    refuse(lambda: evaluate(tmp_path, folder, teacher=another), "other weights", "--teacher")
    exchange.save_as(load_distilled(folder / "distilled.safetensors"), "krr_st", tmp_path / "foreign")
    flags = QUICK | dict(source="digits", runs=1)
    refuse(
        lambda: evaluate(tmp_path, tmp_path / "foreign", teacher=str(wide.folder), **flags), "16 target features", "24"
    )
    refuse(lambda: evaluate(tmp_path, tmp_path / "foreign", **flags), "--teacher")
    # a set whose data are not what they were
    whitened, _, data, _ = coloured
    moved = tmp_path / "moved" / "distilled.safetensors"
    moved.parent.mkdir()
    shutil.copy(whitened / "distilled.safetensors", moved)
    refuse(lambda: evaluate(tmp_path, moved), "distilled from set, which is not here", "--source")
    shutil.copytree(data, tmp_path / "set")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "set" / "train" / "red" / "0000.png")
    flags = dict(data_dir=str(tmp_path / "data"), runs=1)
    text = json.loads((whitened / "args.json").read_text()) | dict(data=str(tmp_path / "set"))
    (moved.parent / "args.json").write_text(json.dumps(text))
    refuse(lambda: evaluate(tmp_path, moved, **flags), "is not the data it was distilled from", "--source")


def test_another_source_is_taken_if_it_is_named(coloured, tmp_path, capsys):
    whitened, _, data, _ = coloured
    shutil.copytree(data, tmp_path / "set")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "set" / "train" / "red" / "0000.png")
    flags = dict(data_dir=str(tmp_path / "data"), runs=1, neighbours=(), scores=ScoresFlags(steps=2))
    evaluate(tmp_path, whitened, source=str(tmp_path / "set"), **flags)
    assert "is not the data it was distilled from" in capsys.readouterr().out


def test_ragged_foreign_sets(tmp_path, capsys):
    """Eleven images of ten classes: no DM and no DD-Ranking; random images are as many of each class as the set has."""
    distilled = labelled_set(tmp_path / "mine.safetensors", 11)
    exchange.save_as(distilled, "mtt", tmp_path / "set")
    flags = LABELS | dict(source="digits", runs=1)
    refuse(lambda: evaluate(tmp_path, tmp_path / "set", neighbours=("dm",), **flags), "11 images", "10 classes")
    capsys.readouterr()
    assert len(evaluate(tmp_path, tmp_path / "set", neighbours=("random",), **flags)["cells"]) == 2
    assert "exchange: images_best.pt" in capsys.readouterr().out
    shutil.copytree(tmp_path / "set", tmp_path / "ranked")
    for name in ("images", "labels"):
        (tmp_path / "ranked" / f"{name}_best.pt").rename(tmp_path / "ranked" / f"{name}.pt")
    refuse(lambda: evaluate(tmp_path, tmp_path / "ranked", **flags), "11 images")
    torch.save(distilled.y.argmax(1)[:7], tmp_path / "set" / "labels_best.pt")
    refuse(lambda: evaluate(tmp_path, tmp_path / "set", **flags), "11 images", "(7,)")


def command(*words, accident: str = "none:0:none"):
    return watched.start(REPO / "common" / "evaluate.py", [str(word) for word in words], accident)


def only(ended) -> str:
    """The last line of a command that ended with exit code 2, which says what is wrong."""
    lines = [line for line in ended.stderr.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert ended.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), ended.stderr
    return lines[0]


@pytest.mark.slow
def test_a_bad_command(tmp_path, made):
    words = ("--neighbours", "foo", "--out-dir", tmp_path, "--device", "cpu")
    assert "--neighbours foo: not one of none, gaussian" in only(command(made("krr_st")[0], *words))
    assert "another script" in only(command("--resume", made("krr_st")[0]))


@pytest.mark.slow
def test_the_command(made, tmp_path):
    """By its command line: the same numbers; --resume goes on by the folder's flags and takes new ones."""
    folder, _ = made("krr_st")
    words = [folder, "--protocol", "knn", "--neighbours", "none", "random", "--out-dir", tmp_path, "--device", "cpu"]
    ended = command(*words)
    assert ended.returncode == 0, ended.stderr
    evaluation = newest(tmp_path)
    here = evaluate(tmp_path / "here", folder, protocol=("knn",), neighbours=("none", "random"))
    assert values(json.loads((evaluation / "result.json").read_text())) == values(here)
    before, args = scores_in(evaluation), json.loads((evaluation / "args.json").read_text())
    again = command("--resume", evaluation)
    assert again.returncode == 0 and ", 6 finished before" in again.stdout
    assert scores_in(evaluation) == before
    assert args | dict(resume=str(evaluation)) == json.loads((evaluation / "args.json").read_text())
    less = command("--resume", evaluation, "--neighbours", "none")
    assert less.returncode == 0
    assert {c["row"] for c in json.loads((evaluation / "result.json").read_text())["cells"]} == {"none", "krr_st"}
    assert "no such set" in only(command(tmp_path / "nothing", "--out-dir", tmp_path))
    assert "no readable args.json" in only(command("--resume", tmp_path / "nothing"))


def test_a_bad_flag_does_not_spoil_a_resume(made, tmp_path):
    """--resume with a flag that is refused leaves the flags that the next --resume goes by."""
    flags = QUICK | dict(protocol=("knn",), neighbours=("none",), runs=1)
    evaluate(tmp_path, made("krr_st")[0], **flags)
    evaluation = newest(tmp_path)
    before = json.loads((evaluation / "args.json").read_text())
    refuse(lambda: evaluate(tmp_path, made("krr_st")[0], **flags | dict(resume=str(evaluation), neighbours=("foo",))))
    assert json.loads((evaluation / "args.json").read_text()) | dict(resume=None) == before


@pytest.mark.slow
@pytest.mark.parametrize("accident", ["rename:5:SIGKILL", "rename:3:SIGTERM"])
def test_a_killed_command_goes_on(made, whole, targets, tmp_path, accident):
    words = [made("krr_st")[0], "--data", "digits", targets / "low", "--protocol", "probe", "knn", "finetune"]
    words += ["--neighbours", "none", "random", "teacher", "--transfer.epochs", "2", "--transfer.probe-steps", "3"]
    words += ["--transfer.few-draws", "2", "--transfer.finetune-steps", "2", "--device", "cpu", "--out-dir", tmp_path]
    ended = command(*words, accident=accident)
    assert ended.returncode != 0
    evaluation = newest(tmp_path)
    if "SIGTERM" in accident:
        assert ended.returncode == 143 and f"--resume {evaluation}" in ended.stderr
    again = command("--resume", evaluation)
    assert again.returncode == 0, again.stderr
    assert json.loads((evaluation / "result.json").read_text())["cells"] == json.loads(json.dumps(whole[1]["cells"]))
