"""Wrong test labels change what is reported and nothing else: no image, network, schedule, selection or stop."""

import contextlib
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_evaluate import CODE, KD, PAIRS, PLAIN, POOL, QUICK, SCDD, STUDENTS, newest, unadorned
from test_rows import ALL as EVERY
from torch.optim.optimizer import register_optimizer_step_post_hook
from watched import equal

import boost_pca
import common.baselines
import common.evaluate
import common.pairs
import common.pretrain
import common.protocols
import common.relabel
import common.rows
import common.students
import frepo
import isa
import krr_st
import scdd
from common.baselines import DM, DSA
from common.evaluate import Args, LabelRecipe, ScoresFlags, SoftFlags, main

REPORTED = {"eval", "eval_models", "distilled_minus", "distilled_minus_random_real"}  # test scores
RUN = {
    "seconds",
    "seconds_per_100_steps",
    "prediction",
    "peak_memory_bytes",
    "args",
    "commit",
    "folder",
    "no_better_since",
}
TESTED = {"knn", "accuracy", "probe_accuracy", "seconds"}  # of a teacher's facts: on the test images, selects nothing


def poisoned(load):
    """The loader with every test label wrong; content, which names caches, stays."""

    def wrong(*args, **flags):
        data = load(*args, **flags)
        return replace(data, y_test=None if data.y_test is None else (data.y_test + 3) % data.num_classes)

    return wrong


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


class Record:
    """What happens beside the reported scores: updates, networks that are scored, and what they predict."""

    def __init__(self):
        self.updates, self.networks, self.predictions = Counter(), [], []

    def facts(self) -> tuple:
        return self.updates, self.networks, self.predictions


@contextlib.contextmanager
def recorded(*scripts, wrong: bool):
    """A Record of the block. wrong: with poisoned test labels."""
    record = Record()
    hook = register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: record.updates.update([type(optimizer).__name__])
    )
    with pytest.MonkeyPatch.context() as patch, unadorned():

        def watch(module, name: str, note) -> None:
            original = getattr(module, name)

            def watched(*args, **kwargs):
                note(*args)
                return original(*args, **kwargs)

            patch.setattr(module, name, watched)

        network = lambda net, *rest: record.networks.append(None if net is None else digest(net.state_dict().values()))  # noqa: E731
        predicted = lambda scores, y: record.predictions.append(digest([scores]))  # noqa: E731
        for module in scripts:
            if wrong:
                patch.setattr(module, "load", poisoned(module.load))
        watch(common.pairs, "score_network", network)
        watch(common.students, "score_student", network)
        watch(common.relabel, "hits", network)
        watch(common.pretrain, "accuracy_on_test", network)
        watch(common.evaluate, "score", lambda cell, net, *rest: network(net))
        watch(common.protocols, "test_accuracy", network)
        watch(common.evaluate, "test_accuracy", network)
        watch(common.pairs, "accuracy", predicted)
        watch(common.protocols, "accuracy", predicted)
        try:
            yield record
        finally:
            hook.remove()


def without_scores(value):
    """Facts of a run without what is measured on test images."""
    if isinstance(value, dict):
        return {key: without_scores(each) for key, each in value.items() if key not in REPORTED | RUN | TESTED}
    return value


def end(folder: Path) -> dict:
    """All that a run leaves, but for its reported scores and times."""
    files = sorted(folder.rglob("*.safetensors")) + sorted((folder.parent / "teachers").rglob("*.safetensors"))
    found = {re.sub(r"\d{8}-\d{6}", "", str(path.relative_to(folder.parent))): load_file(path) for path in files}
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    found["checkpoint"] = {key: value for key, value in state.items() if key not in ("seconds", "curve")}
    found["result"] = without_scores(json.loads((folder / "result.json").read_text()))
    return found


def twice(tmp_path: Path, script, **flags) -> tuple[list[Path], list[dict], list[Record]]:
    """A run with true and one with wrong test labels: folders, results and records."""
    folders, results, records = [], [], []
    for wrong in (False, True):
        with recorded(script, wrong=wrong) as record:
            results.append(script.main(script.Args(**flags | dict(out_dir=str(tmp_path / f"{wrong}")))))
        folders.append(newest(tmp_path / f"{wrong}"))
        records.append(record)
    return folders, results, records


def assert_alike(folders, results, records) -> None:
    """All is equal, but for the scores, which are not."""
    true, wrong = (end(folder) for folder in folders)
    assert true.keys() == wrong.keys() and any("distilled" in name for name in true)
    for name in true:
        assert equal(true[name], wrong[name]), name
    assert records[0].facts() == records[1].facts()
    assert records[0].networks and sum(records[0].updates.values())
    assert results[0]["eval"] != results[1]["eval"]  # the poison was there


SCRIPTS = {
    "krr_st": (krr_st, POOL | PAIRS | dict(eval_finetune_steps=2, eval_every=1, steps=3)),
    "boost_pca": (boost_pca, POOL | PAIRS | CODE | dict(eval_every=1, full_row=True)),
    "plain pairs": (boost_pca, POOL | PAIRS | PLAIN),
    "frepo": (frepo, POOL | STUDENTS | dict(eval_every=1, steps=3, full_row=True)),
    "isa": (isa, POOL | STUDENTS | dict(eval_every=1)),
    "scdd": (scdd, SCDD | dict(eval_runs=1)),
    "scdd supervised": (scdd, {key: value for key, value in SCDD.items() if not key.startswith("teacher_")}
                        | dict(teacher_method="supervised", labels="stored", published_metric=True, full_row=True)),
}  # fmt: skip
SLOW = {"boost_pca", "plain pairs", "frepo", "isa", "scdd", "scdd supervised"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SCRIPTS]
)
def test_no_script_looks_at_test_labels(tmp_path, name):
    script, flags = SCRIPTS[name]
    assert_alike(*twice(tmp_path, script, **flags))


@pytest.mark.slow
@pytest.mark.parametrize("script", [frepo, isa])
def test_the_best_step_of_held_out_images(tmp_path, capsys, script):
    """--select best with --holdout: by training images that were held out, and it says so."""
    flags = POOL | STUDENTS | dict(select="best", eval_every=1, steps=4, holdout=0.2, lr_img=0.1)
    folders, results, records = twice(tmp_path, script, **flags)
    assert_alike(folders, results, records)
    assert results[0]["selected_step"] == results[1]["selected_step"]
    curves = [json.loads((folder / "curve.json").read_text()) for folder in folders]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    errors = [point["error"]["mean"] for point in curves[0]]
    assert results[0]["selected_step"] == curves[0][errors.index(min(errors))]["step"]
    out = capsys.readouterr().out
    assert out.count(f"selected: step {results[0]['selected_step']}, by the held-out images") == 2


@pytest.mark.slow
@pytest.mark.parametrize("script", [frepo, isa])
def test_the_best_step_of_test_images_is_called_that(tmp_path, capsys, script):
    """--select best without --holdout selects on the test images, as it was published, and says so."""
    flags = POOL | STUDENTS | dict(select="best", eval_every=1, steps=6, lr_img=0.3, eval_runs=1)
    folders, results, _ = twice(tmp_path, script, **flags)
    out = capsys.readouterr().out
    for folder, result in zip(folders, results, strict=True):
        curve = json.loads((folder / "curve.json").read_text())
        errors = [point["error"]["mean"] for point in curve]
        assert result["selected_step"] == curve[errors.index(min(errors))]["step"]
        assert f"selected: step {result['selected_step']}, by the test images" in out
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders]
    assert equal(states[0]["x_s"], states[1]["x_s"])  # the selection apart, nothing


# ------------------------------------------------------------------------------------------------------ the evaluator

MATCHING = dict(dm=DM(iterations=2, width=2), dsa=DSA(iterations=1, width=2, outer=2, inner=1))
FLAGS = QUICK | KD | MATCHING | dict(
    labels=LabelRecipe(epochs=2), scores=ScoresFlags(steps=3), soft=SoftFlags(epochs=1), runs=1, high_loss_networks=1,
)  # fmt: skip
TEN = dict(num_images=10, eval_finetune_steps=0)
EVALUATED = {
    "krr_st": (krr_st, POOL | PAIRS | TEN, EVERY, ("probe", "finetune", "knn", "kd")),
    "frepo": (
        frepo, POOL | STUDENTS, ("none", "gaussian", "random", "kmeans_pixels", "high_loss", "dm", "dsa", "all_real"),
        ("scratch", "probe", "knn", "kd"),
    ),
    "scdd": (scdd, SCDD, ("none", "gaussian", "random", "kmeans", "herding", "all_real", "random:labels"),
             ("scratch", "probe", "finetune", "knn", "kd")),
    "boost_pca": (boost_pca, POOL | PAIRS | CODE, ("random", "kmeans", "herding"), ("probe", "knn", "kd")),
    "isa": (isa, POOL | STUDENTS, ("random", "all_real:labels"), ("scratch", "kd")),
}  # fmt: skip
RANKING = {"frepo", "isa", "scdd"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "krr_st" else ()) for name in EVALUATED]
)
def test_the_evaluator_looks_at_test_labels_to_score_alone(tmp_path, name):
    """All rows and protocols: equal rows, networks, teachers, updates and predictions; other scores."""
    script, flags, rows, uses = EVALUATED[name]
    with unadorned():
        script.main(script.Args(**flags | dict(out_dir=str(tmp_path / "made"))))
    made, cells, records, results, teachers, sets = newest(tmp_path / "made"), [], [], [], [], []
    for wrong in (False, True):
        out_dir = tmp_path / f"{wrong}"
        with recorded(common.evaluate, wrong=wrong) as record:
            results.append(main(Args(
                artefacts=(str(made),), device="cpu", out_dir=str(out_dir), neighbours=rows, protocol=uses,
                ranking=name in RANKING, **FLAGS,
            )))  # fmt: skip
        folder = newest(out_dir)
        cells.append({path.name: json.loads(path.read_text()) for path in (folder / "cells").iterdir()})
        sets.append({path.name: load_file(path) for path in out_dir.glob("sets/*.safetensors")})
        teachers.append(
            {str(path.relative_to(out_dir)): load_file(path) for path in out_dir.rglob("teacher.safetensors")}
        )
        records.append(record)
    assert cells[0].keys() == cells[1].keys()
    for file in cells[0]:
        assert cells[0][file]["key"] == cells[1][file]["key"] and cells[0][file]["facts"] == cells[1][file]["facts"]
    assert equal(sets[0], sets[1]) and len(sets[0]) >= sum(row in ("dm", "dsa") for row in rows)
    assert equal(teachers[0], teachers[1]) and len(teachers[0]) == ("kd" in uses)
    assert records[0].facts() == records[1].facts()
    assert len(records[0].networks) > len(cells[0]) - 2 and records[0].predictions
    left = [{key: value for key, value in result.items() if key in ("rows", "method", "kind", "data", "seed")}
            for result in results]  # fmt: skip
    assert left[0] == left[1]
    seen = [{(c["row"], c["protocol"], c["metric"]): c["values"] for c in result["cells"]} for result in results]
    assert seen[0].keys() == seen[1].keys()
    wanted = {use for row, use, metric in seen[0] if seen[0][row, use, metric] != seen[1][row, use, metric]}
    assert wanted == set(uses)  # the poison was there, in each protocol
    for place in seen[0]:
        assert place[2] != "match" or seen[0][place] == seen[1][place]
