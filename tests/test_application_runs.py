"""--application of frepo.py and isa.py on digits and a folder: what is distilled, trained on and attacked; resume."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refuse
from safetensors.torch import load_file
from test_bad_input import images
from watched import REPO, flags, start

import common.applications
import common.run
import common.students
import frepo
import isa
from common.artefact import load_distilled
from common.data import fit_zca, load, normalise
from common.run import load_checkpoint

SCRIPTS = {"frepo": frepo, "isa": isa}
BOTH = ["frepo", pytest.param("isa", marks=pytest.mark.slow)]  # which differ by the loss alone: test_frepo.py
TINY = dict(
    steps=12, ipc=2, batch_real=64, widths=(4, 4), pool=3, max_age=4, log_every=1, save_every=4, device="cpu",
    eval_runs=2, eval_steps=6,
)  # fmt: skip
CONTINUAL = TINY | dict(application="continual", class_steps=3)
MEMBERSHIP = TINY | dict(application="membership", members=300, member_chunk=1, attack_updates=(4, 9), eval_batch=64)
GROUPS = [[2, 8, 4, 9], [1, 6, 7], [3, 0, 5]]  # np.random.RandomState(0).permutation(10), array_split into 3


@pytest.fixture(autouse=True)
def unpredicted(monkeypatch):
    """Nobody waits for these runs: their evaluation is not timed beforehand."""
    for each in SCRIPTS.values():
        monkeypatch.setattr(each, "predict_seconds", lambda *args: 0.0)


@pytest.fixture
def one_attack(monkeypatch):
    """The threshold alone, where it does not matter which attacks there are."""
    monkeypatch.setattr(common.applications, "attackers", lambda seed: {})


@pytest.fixture(params=BOTH)
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def arguments(script, out_dir: Path, values: dict, **changes):
    return script.Args(**values | {"out_dir": str(out_dir), "data_dir": str(out_dir / "data")} | changes)


def only_run(out_dir: Path) -> Path:
    (folder,) = (path.parent for path in out_dir.glob("*/args.json"))
    return folder


def of(classes, y):
    """Places of the images of some classes, one by one."""
    return [i for i, label in enumerate(y.tolist()) if label in classes]


class Spy:
    """Calls of a function of a module, passed on unless a result is given."""

    def __init__(self, monkeypatch, module, name, result=None):
        self.calls, original = [], getattr(module, name)

        def spied(*args, **kwargs):
            self.calls.append((args, kwargs))
            return original(*args, **kwargs) if result is None else result

        monkeypatch.setattr(module, name, spied)


# --------------------------------------------------------------------------------------------------- continual learning


@pytest.fixture(scope="module", params=BOTH)
def learned(request, tmp_path_factory):
    """(script, folder, result, calls of evaluate_students, calls of fit_student) of a whole run, not to be changed."""
    script, out_dir = SCRIPTS[request.param], tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script, "predict_seconds", lambda *args: 0.0)
        scored = Spy(monkeypatch, common.applications, "evaluate_students")
        fitted = Spy(monkeypatch, common.students, "fit_student")
        result = script.main(arguments(script, out_dir, CONTINUAL, full_row=True))
    return script, only_run(out_dir), result, scored.calls, fitted.calls


def test_each_step_distils_its_own_classes_alone(learned, digits, tmp_path):
    """The set of the second step is the one that a plain run on a hand-made part of the data ends with."""
    script, folder, result, _, _ = learned
    assert result["class_groups"] == GROUPS
    places = of(GROUPS[1], digits.y_train), of(GROUPS[1], digits.y_test)
    part = dataclasses.replace(
        digits,
        x_train=digits.x_train[places[0]],
        y_train=digits.y_train[places[0]],
        x_test=digits.x_test[places[1]],
        y_test=digits.y_test[places[1]],
    )
    script.main(arguments(script, tmp_path, TINY), part)
    ours, theirs = (load_file(run / "distilled.safetensors") for run in (folder / "step_2", only_run(tmp_path)))
    assert torch.equal(ours["x"], theirs["x"]) and torch.equal(ours["y"], theirs["y"])
    assert ours["y"].shape == (6, 10)  # 2 images of 3 classes, labels over all 10


def test_labels_start_centred_over_all_classes(digits, tmp_path):
    """At learning rates of zero a step's set is real images of its classes with scaled labels over all of them."""
    out_dir = tmp_path / "still"
    script = frepo
    script.main(arguments(script, out_dir, CONTINUAL, lr_img=0.0, lr_label=0.0, steps=2))
    for step, group in enumerate(GROUPS, 1):
        made = load_distilled(only_run(out_dir) / f"step_{step}" / "distilled.safetensors")
        labels = [label for label in sorted(group) for _ in range(2)]
        for y, label in zip(made.y, labels, strict=True):
            assert y.tolist() == pytest.approx([0.9 if i == label else -0.1 for i in range(10)])
        real = digits.x_train[of(group, digits.y_train)].float() / 255
        distances = (made.x[:, None] - real).abs().amax((2, 3, 4))  # each is one of them
        nearest = distances.min(1)
        assert nearest.values.max() < 1e-5
        assert digits.y_train[of(group, digits.y_train)][nearest.indices].tolist() == labels


def test_students_learn_from_all_sets_so_far_and_are_tested_on_all_classes_seen(learned, digits):
    _, folder, result, calls, _ = learned
    assert len(calls) == 3
    sets = [load_distilled(folder / f"step_{step}" / "distilled.safetensors") for step in (1, 2, 3)]
    test_inputs = normalise(digits.x_test, digits.mean, digits.std)
    train_inputs = normalise(digits.x_train, digits.mean, digits.std)
    for step, (args, _) in enumerate(calls, 1):
        memory, seen_data, train, test, _, _, _, recipe, seed, models, rows, _ = args
        seen = [label for group in GROUPS[:step] for label in group]
        assert torch.equal(memory.x, torch.cat([each.x for each in sets[:step]]))
        assert torch.equal(memory.y, torch.cat([each.y for each in sets[:step]]))
        trained, tested = of(seen, digits.y_train), of(seen, digits.y_test)
        assert torch.equal(seen_data.y_train, digits.y_train[trained])
        assert torch.equal(seen_data.y_test, digits.y_test[tested])
        assert torch.equal(seen_data.x_test, digits.x_test[tested])
        assert torch.equal(test(torch.arange(len(test))), test_inputs[tested]) and len(test) == len(tested)
        assert torch.equal(train(torch.arange(len(train))), train_inputs[trained]) and len(train) == len(trained)
        assert (recipe.steps, recipe.runs, recipe.warm_up, recipe.batch) == (6, 2, 500, 500)
        assert models == ("conv",) and rows == ("random_real", "distilled", "all_real") and seed == 0
    whole = load_file(folder / "distilled.safetensors")
    assert torch.equal(whole["x"], torch.cat([each.x for each in sets]))
    assert torch.equal(whole["y"], torch.cat([each.y for each in sets]))
    for row, of_row in result["curves"].items():
        for points in of_row.values():
            assert [point["at"] for point in points] == [4, 7, 10]
            assert [point["images"] for point in points] == [8, 14, 20], row


def test_the_memory_of_random_real_images_is_as_large_and_all_real_is_all(learned, digits):
    """Students after each step: rows x 2; before them, those of the part's own run: rows x 1."""
    _, _, _, _, calls = learned
    for step in (1, 2, 3):
        seen = [label for group in GROUPS[:step] for label in group]
        rows = [args[2] for args, _ in calls[8 * (step - 1) :][:8]][2:]
        random_real, distilled, all_real = rows[:2], rows[2:4], rows[4:]
        for y in random_real:
            assert sorted(y.argmax(1).tolist()) == sorted(2 * seen) and y.shape == distilled[0].shape
            assert y.max() == pytest.approx(0.9) and y.min() == pytest.approx(-0.1)
        for y in all_real:
            assert len(y) == len(of(seen, digits.y_train))


def test_a_run_explains_itself(learned):
    script, folder, result, _, _ = learned
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert json.loads((folder / "curve.json").read_text()) == json.loads(json.dumps(result["curves"]))
    assert result["application"] == "continual" and result["method"] == script.__name__
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert set(result["curves"]) == {"random_real", "distilled", "all_real"}
    for step in (1, 2, 3):
        part = folder / f"step_{step}"
        names = {"args.json", "script.py", "grid_000000.png", "result.json", "distilled.safetensors"}
        assert names <= {path.name for path in part.iterdir()}
        flags_of_part = json.loads((part / "args.json").read_text())
        assert flags_of_part["eval_runs"] == 1 and not flags_of_part["full_row"]  # one student a row, as published
    made = load_distilled(folder / "distilled.safetensors", script.__name__)
    assert made.meta["class_groups"] == GROUPS and made.recipe["steps"] == 6


def test_students_take_the_published_updates_unless_told(script, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(memory, data, train, test, labels, widths, device, recipe, *rest):
        raise Stop(recipe.steps)

    def part_scored(*args):
        steps.append(args[7].steps)
        return {row: {"conv": blank, "krr": blank} for row in args[10]}

    steps, blank = [], dict(mean=0.5, std=0.0, values=[0.5])
    monkeypatch.setattr(common.applications, "evaluate_students", stop)
    monkeypatch.setattr(script, "evaluate_students", part_scored)
    with pytest.raises(Stop, match="10000"):
        script.main(arguments(script, tmp_path, CONTINUAL, eval_steps=0, ipc=20))
    assert steps == [2000]  # of 80 images, the step's, not of all 200


def colour(folder: Path, classes: int = 3) -> Path:
    for label in range(classes):
        images(folder / "train" / f"{label}", 12, (8, 8, 3), seed=label)
        images(folder / "test" / f"{label}", 4, (8, 8, 3), seed=10 + label)
    return folder


def test_all_classes_share_one_whitening_and_images_count_mirrored(script, tmp_path):
    """As published: the whitening of the whole set, and mirrored images whatever their number. 3 classes in 2 steps."""
    folder = colour(tmp_path / "set")
    changes = dict(data=str(folder), class_steps=2, ipc=5, eval_runs=1)
    result = script.main(arguments(script, tmp_path / "runs", CONTINUAL, **changes))
    run = only_run(tmp_path / "runs")
    assert [len(group) for group in result["class_groups"]] == [2, 1]
    zca = fit_zca(load(str(folder), data_dir=tmp_path / "other"), tmp_path / "other")
    for name in ("step_1", "step_2", "."):
        assert torch.equal(load_distilled(run / name / "distilled.safetensors").zca, zca.matrix)
    for step in (1, 2):  # 10 and 5 images on 36 features: by the rule for other sets, not
        assert json.loads((run / f"step_{step}" / "result.json").read_text())["flip"]
    plain = script.main(arguments(script, tmp_path / "runs", TINY, data=str(folder), ipc=5, eval_runs=1))
    assert not plain["flip"]


def test_sets_that_must_not_be_mirrored_are_not(learned):
    _, folder, _, _, _ = learned
    assert not json.loads((folder / "step_1" / "result.json").read_text())["flip"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_run_killed_in_its_third_step_ends_with_the_same_curve(name, tmp_path):
    """SIGKILL in the third part's loop (12 steps a part); then SIGTERM there, whose last words resume the whole run."""
    path = REPO / f"{name}.py"

    def words(parent):
        return flags(**CONTINUAL, out_dir=parent / "runs", data_dir=parent / "data")

    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    done = start(path, words(straight))
    assert done.returncode == 0, done.stderr
    done = start(path, words(hurt), "step:30:SIGKILL")
    assert done.returncode == -9 and "accident" in done.stdout
    run = only_run(hurt / "runs")
    assert load_checkpoint(run / "step_3" / "checkpoint.pt")["step"] == 4
    done = start(path, ["--resume", run], "step:2:SIGTERM")
    assert done.returncode == 143 and f"--resume {run}\n" in done.stderr, done.stderr
    assert load_checkpoint(run / "step_3" / "checkpoint.pt")["step"] == 6
    done = start(path, ["--resume", run])
    assert done.returncode == 0, done.stderr
    assert "resumed at step 6" in done.stdout
    same(run, only_run(straight / "runs"))


LOOP = [("step", "SIGKILL", 2, 4), ("step", "SIGTERM", 2, 4), ("run_save", "SIGKILL", 1, 3), ("run_save", "disk", 1, 3),
        ("rename", "SIGKILL", 1, 9)]  # fmt: skip
SCORE = [("score", "SIGKILL", 1, 3), ("score", "SIGTERM", 1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "values"), [("frepo", CONTINUAL), ("isa", MEMBERSHIP | dict(attack_students=2))])
def test_accidents_leave_no_trace(name, values, tmp_path, capsys):
    """Seven and four at seeded random places, in parts, between them and in the students, each followed by a resume."""
    path, draw = REPO / f"{name}.py", random.Random(f"{name} {values['application']}")

    def words(parent):
        return flags(**values, save_minutes=0.0, out_dir=parent / "runs", data_dir=parent / "data")

    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    done = start(path, words(straight))
    assert done.returncode == 0, done.stderr
    log = []
    for place, what, low, high in (
        draw.sample(LOOP, k=5 if "class_steps" in values else 2) + SCORE
    ):  # of 36 steps, of 12
        begun = list((hurt / "runs").glob("*/args.json"))
        accident = f"{place}:{draw.randint(low, high)}:{what}"
        done = start(path, ["--resume", begun[0].parent] if begun else words(hurt), accident)
        log.append(f"{name} {values['application']}: {accident}: exit {done.returncode}")
        if f"accident: {what}" not in done.stdout:  # it came to an end before
            assert done.returncode == 0, (accident, done.stderr)
            break
        assert done.returncode == {"SIGKILL": -9, "SIGTERM": 143, "disk": 2}[what], (accident, done.stderr)
        assert "Traceback" not in done.stderr
        if what == "SIGTERM":
            assert f"--resume {only_run(hurt / 'runs')}" in done.stderr, done.stderr
    done = start(path, ["--resume", only_run(hurt / "runs")])
    assert done.returncode == 0, done.stderr
    same(only_run(hurt / "runs"), only_run(straight / "runs"))
    with capsys.disabled():
        print("\n" + "\n".join(log))


def same(one: Path, other: Path) -> None:
    for name in ("curve.json", "students_1.json", "students_learned_test.json"):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
    parts = sorted(path.relative_to(other) for path in other.rglob("distilled.safetensors"))
    assert parts and parts == sorted(path.relative_to(one) for path in one.rglob("distilled.safetensors"))
    for part in parts:
        a, b = load_file(one / part), load_file(other / part)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), part


def test_a_finished_run_is_not_done_again_and_keeps_its_seconds(learned, monkeypatch, tmp_path):
    script, folder, result, _, _ = learned
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    fitted = Spy(monkeypatch, common.students, "fit_student")
    steps = Spy(monkeypatch, common.run.Run, "steps")
    args = common.run.load_args(script.Args, folder)
    again = script.main(args)
    assert not fitted.calls and not steps.calls
    assert again["curves"] == json.loads(json.dumps(result["curves"]))
    assert again["seconds"] >= 0.9 * result["seconds"]
    assert {path: path.read_bytes() for path in folder.rglob("step_*/*.safetensors")}.items() <= before.items()


def test_a_part_cannot_be_resumed_alone(learned):
    script, folder, _, _, _ = learned
    common.run.Run.latest = None
    args = common.run.load_args(script.Args, folder / "step_2")
    refuse(lambda: script.main(args), "--resume", "step_2", f"a part of the run {folder}")


def test_seconds_of_parts_count_once_whatever_was_lost(learned, tmp_path):
    """Parts that took 1000 seconds each; a run whose own checkpoint is lost adds them, one that has them does not."""
    script, folder, result, _, _ = learned
    shutil.copytree(folder, tmp_path / folder.name)
    copy = tmp_path / folder.name
    for step in (1, 2, 3):
        path = copy / f"step_{step}" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(seconds=1000.0)))
    again = resumed(script, copy)["seconds"]
    assert 0.5 * result["seconds"] < again < result["seconds"] + 100  # its last words came after its last checkpoint
    (copy / "checkpoint.pt").unlink()
    lost = resumed(script, copy)["seconds"]
    assert 3000 <= lost < 3100
    assert 3000 <= resumed(script, copy)["seconds"] < 3200


def resumed(script, folder: Path, **changes) -> dict:
    common.run.Run.latest = None
    return script.main(dataclasses.replace(common.run.load_args(script.Args, folder), **changes))


def test_a_run_is_resumed_from_inside_its_folder(learned, tmp_path, monkeypatch):
    """`--resume .` names no parent by itself; a run in a folder of runs is no part of one."""
    script, folder, result, _, _ = learned
    shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.chdir(tmp_path / folder.name)
    again = resumed(script, Path("."), data_dir=str(folder.parent / "data"))
    assert again["curves"] == json.loads(json.dumps(result["curves"]))


def test_a_step_without_a_test_image_is_refused(script, tmp_path):
    images(tmp_path / "set" / "cat", 30, (8, 8, 3)), images(tmp_path / "set" / "dog", 2, (8, 8, 3), seed=1)
    images(tmp_path / "set" / "eel", 30, (8, 8, 3), seed=2)
    args = arguments(script, tmp_path / "runs", CONTINUAL, data=str(tmp_path / "set"))
    refuse(lambda: script.main(args), "--class-steps 3", "(dog)", "no test image")
    assert not list((tmp_path / "runs").glob("*/args.json"))


def test_a_student_that_is_not_finite_is_refused_before_it_is_attacked(tmp_path):
    changes = dict(attack_target="initial", eval_lr=1e30)
    args = arguments(frepo, tmp_path, MEMBERSHIP, **changes)
    refuse(lambda: frepo.main(args), "a student's scores are not finite", "--eval-lr 1e+30")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(application="continual", class_steps=11), ["--class-steps 11", "1 to 10"]),
        (dict(application="continual", class_steps=0), ["--class-steps 0", "at least 1"]),
        (dict(application="continual", class_order=-1), ["--class-order -1", "0 .."]),
        (dict(application="continual", ipc=500), ["--ipc 500", "smallest class"]),
        (dict(application="membership", members=1438), ["--members 1438", "at most 1437"]),
        (dict(application="membership", members=0), ["--members 0", "at least 1"]),
        (dict(application="membership", member_chunk=3), ["--member-chunk 3", "0 to 2", "3 chunks of 360"]),
        (dict(application="membership", members=360, ipc=60), ["--ipc 60", "chunk 0", "--members 360"]),
        (dict(application="membership", attack_updates=()), ["--attack-updates", "at least one"]),
        (dict(application="membership", attack_updates=(10, 0)), ["--attack-updates 0", "at least 1"]),
        (dict(application="membership", attack_students=0), ["--attack-students 0", "at least 1"]),
        (dict(application="membership", members=19), ["--members 19", "360 test images", "20 of each"]),
        (dict(application="membership", members=1420, non_members="train"), ["17 images outside", "20 of each"]),
        (dict(application="membership", holdout=0.1), ["--holdout", "membership"]),
        (dict(application="continual", holdout=0.1), ["--holdout", "continual"]),
        (dict(application="membership", eval_models=("conv", "dcconv")), ["--eval-models", "one"]),
    ],
)
def test_bad_values_are_refused_before_anything_begins(script, tmp_path, changes, words):
    values = {key: value for key, value in TINY.items() if key != "ipc"}
    refuse(lambda: script.main(arguments(script, tmp_path, values, **changes)), *words)
    assert not list(tmp_path.glob("*/args.json"))


# ------------------------------------------------------------------------------------------------ membership inference


@pytest.fixture(scope="module", params=BOTH)
def attacked(request, tmp_path_factory):
    """(script, folder, result, calls of attack, calls of fit_student) of a whole run, not to be changed."""
    script, out_dir = SCRIPTS[request.param], tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script, "predict_seconds", lambda *args: 0.0)
        attacks = Spy(monkeypatch, common.applications, "attack")
        fitted = Spy(monkeypatch, common.applications, "fit_student")
        result = script.main(arguments(script, out_dir, MEMBERSHIP))
    return script, only_run(out_dir), result, attacks.calls, fitted.calls


def test_the_chunk_is_distilled_and_only_it(attacked, digits, tmp_path):
    script, folder, _, _, _ = attacked
    inside = range(300, 600)
    part = dataclasses.replace(digits, x_train=digits.x_train[300:600], y_train=digits.y_train[300:600])
    assert torch.equal(part.y_train, torch.stack([digits.y_train[i] for i in inside]))
    script.main(arguments(script, tmp_path, TINY), part)
    ours, theirs = (load_file(run / "distilled.safetensors") for run in (folder / "chunk", only_run(tmp_path)))
    assert torch.equal(ours["x"], theirs["x"]) and torch.equal(ours["y"], theirs["y"])


def test_students_are_trained_on_what_their_rows_say(attacked, digits):
    """Constant rate, batches of 256 or 1024, images of the chunk or from outside, drawn anew for each student."""
    _, folder, _, _, calls = attacked
    made = load_distilled(folder / "chunk" / "distilled.safetensors")
    inputs = normalise(digits.x_train, digits.mean, digits.std)
    rows = [calls[i : i + 2] for i in (0, 2, 4, 6)]
    drawn = {}
    for name, pair in zip(("random_real", "distilled", "unseen_real", "all_real"), rows, strict=True):
        for student, ((_, of_place, y, recipe, *key), _) in enumerate(pair):
            assert key == [0, student]
            assert (recipe.steps, recipe.warm_up, recipe.lr_end, recipe.lr) == (9, 0, 1.0, 3e-4)
            assert recipe.batch == (1024 if name == "all_real" else 256)
            x = of_place(torch.arange(len(y)))
            if name == "distilled":
                assert torch.equal(x, made.inputs()) and torch.equal(y, made.y)
                continue
            if name == "all_real":
                assert torch.equal(x, inputs[300:600]) and y.argmax(1).tolist() == digits.y_train[300:600].tolist()
                continue
            assert y.argmax(1).tolist() == [label for label in range(10) for _ in range(2)]
            assert y.max() == pytest.approx(0.9) and y.min() == pytest.approx(-0.1)
            places = [next(i for i in range(len(inputs)) if torch.equal(inputs[i], image)) for image in x]
            assert all((300 <= i < 600) == (name == "random_real") for i in places)
            assert digits.y_train[places].tolist() == y.argmax(1).tolist()
            drawn[name, student] = places
    assert drawn["random_real", 0] != drawn["random_real", 1] and drawn["unseen_real", 0] != drawn["unseen_real", 1]


def test_as_many_members_as_others_are_attacked_at_every_number_of_updates(attacked, digits):
    """The first student of each row; 300 members of the chunk against 300 of the 360 test images."""
    _, _, result, calls, fitted = attacked
    assert (result["attacked_members"], result["attacked_others"]) == (300, 300)
    assert len(calls) == 4 * 2  # rows x numbers of updates, one student each
    counts = digits.y_train[300:600].bincount().tolist()
    for (members, others, seed, student), _ in calls:
        assert (seed, student) == (0, 0)
        assert all(len(each) == 300 for each in (*members, *others))
        assert members[2].bincount().tolist() == counts  # all of the chunk
        rest = digits.y_test.bincount() - others[2].bincount()
        assert rest.min() >= 0 and rest.sum() == 60
    # the last attack of a row is on its student as trained, but the first student is followed by the second
    (net, *_), _ = fitted[6]
    net.eval()
    inputs, tests = (normalise(x, digits.mean, digits.std) for x in (digits.x_train[300:600], digits.x_test))
    (members, others, *_), _ = calls[-1]
    for scored, x, y_all in ((members, inputs, digits.y_train[300:600]), (others, tests, digits.y_test)):
        with torch.no_grad():
            scores = net(x)
        found = [(scores - row).abs().amax(1).argmin() for row in scored[0]]
        for place, row, loss, label in zip(found, *scored, strict=True):
            torch.testing.assert_close(row, scores[place], rtol=1e-4, atol=1e-5)
            assert label == y_all[place]
            target = [0.9 if i == label else -0.1 for i in range(10)]
            by_hand = sum((s - t) ** 2 for s, t in zip(row.tolist(), target, strict=True)) / 2
            assert float(loss) == pytest.approx(by_hand, rel=1e-4)
        assert len({int(place) for place in found}) == 300  # each image once


def test_others_may_be_training_images_that_nothing_else_uses(script, digits, tmp_path, monkeypatch, one_attack):
    """--non-members train: 300 from outside the chunk, in no student's images, and in no whitening."""
    attacks = Spy(monkeypatch, common.applications, "attack")
    fitted = Spy(monkeypatch, common.applications, "fit_student")
    whole = Spy(monkeypatch, common.applications, "outputs")
    result = script.main(arguments(script, tmp_path, MEMBERSHIP, non_members="train", eval_runs=1))
    assert result["others"] == "train" and (result["attacked_members"], result["attacked_others"]) == (300, 300)
    (_, _, index), _ = whole.calls[1]  # the members, the others, all test images, ...
    assert len(set(index.tolist())) == 300 and not any(300 <= i < 600 for i in index.tolist())
    for (_, others, *_), _ in attacks.calls:
        assert others[2].tolist() == digits.y_train[index].tolist()
    inputs = normalise(digits.x_train, digits.mean, digits.std)
    (_, of_place, y, *_), _ = fitted.calls[2]  # unseen real
    for image in of_place(torch.arange(len(y))):
        (place,) = [i for i in range(len(inputs)) if torch.equal(inputs[i], image)]
        assert place not in index and not 300 <= place < 600


def test_curves_hold_accuracy_and_auc_of_every_row_at_every_number_of_updates(attacked, digits):
    _, folder, result, _, fitted = attacked
    attacks = [f"AUC {name}" for name in ("threshold", "logistic", "mlp", "forest", "knn")]
    assert list(result["curves"]) == ["random_real", "distilled", "unseen_real", "all_real"]
    tests = normalise(digits.x_test, digits.mean, digits.std)
    for row, of_row in result["curves"].items():
        assert list(of_row) == ["accuracy", "accuracy on members", *attacks], row
        for measure, points in of_row.items():
            assert [point["at"] for point in points] == [4, 9]
            for point in points:
                assert len(point["values"]) == (1 if measure in attacks else 2)
                if measure in attacks:
                    assert point["low"] <= point["mean"] <= point["high"] and point["se"] > 0
    last = [result["curves"][row]["accuracy"][-1]["values"] for row in result["curves"]]
    for i, ((net, *_), _) in enumerate(fitted):
        net.eval()
        with torch.no_grad():
            right = float((net(tests).argmax(1) == digits.y_test).float().mean())
        assert last[i // 2][i % 2] == pytest.approx(right, abs=1e-6)
    assert (folder / "curve.png").exists() and json.loads((folder / "curve.json").read_text())


def test_the_published_mistake_is_the_initial_images(script, tmp_path, monkeypatch, one_attack):
    """--attack-target initial: real images and labels as distillation starts from; nothing is distilled."""
    fitted = Spy(monkeypatch, common.applications, "fit_student")
    result = script.main(arguments(script, tmp_path / "a", MEMBERSHIP, attack_target="initial", eval_runs=1))
    folder = only_run(tmp_path / "a")
    assert list(result["curves"]) == ["random_real", "initial_real", "unseen_real", "all_real"]
    assert not (folder / "chunk").exists() and result["target"] == "initial"
    (_, of_place, y, *_), _ = fitted.calls[1]
    script.main(arguments(script, tmp_path / "b", MEMBERSHIP, lr_img=0.0, lr_label=0.0, eval_runs=1))
    made = load_distilled(only_run(tmp_path / "b") / "chunk" / "distilled.safetensors")
    torch.testing.assert_close(of_place(torch.arange(20)), made.inputs(), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, made.y)


def test_without_images_outside_the_chunk_there_is_no_unseen_row(tmp_path, capsys, one_attack):
    values = MEMBERSHIP | dict(members=1437, member_chunk=0, attack_target="initial", eval_runs=1, attack_updates=(2,))
    result = frepo.main(arguments(frepo, tmp_path, values))
    assert "unseen_real" not in result["curves"] and "no row of unseen images" in capsys.readouterr().out
    assert (result["attacked_members"], result["attacked_others"]) == (360, 360)


@pytest.mark.parametrize("target", [pytest.param("learned", marks=pytest.mark.slow), "initial"])
def test_a_stopped_attack_goes_on_at_its_student_and_may_ask_for_others(target, tmp_path, monkeypatch, one_attack):
    script, own = frepo, "distilled" if target == "learned" else "initial_real"
    result = script.main(arguments(script, tmp_path / "straight", MEMBERSHIP, attack_target=target))
    original, calls = common.applications.fit_student, []

    class Stop(Exception):
        pass

    def fifth(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(common.applications, "fit_student", fifth)
    with pytest.raises(Stop):
        script.main(arguments(script, tmp_path / "stopped", MEMBERSHIP, attack_target=target))
    folder = only_run(tmp_path / "stopped")
    again = resumed(script, folder)
    assert len(calls) == 5 + 4 and again["curves"] == result["curves"]
    more = resumed(script, folder, attack_updates=(2, 4))
    assert [point["at"] for point in more["curves"][own]["accuracy"]] == [2, 4]
    assert more["curves"][own]["accuracy"][1]["values"] == result["curves"][own]["accuracy"][0]["values"]


def test_the_whitening_gives_no_member_away(script, tmp_path, one_attack):
    """Of noise: members and others are equally long after a whitening that met neither; with the chunk's own, of fewer
    images than pixels, members are shorter."""
    folder = tmp_path / "set"
    for label in range(2):  # stored class after class, and so shuffled before it is cut into chunks
        images(folder / "train" / f"{label}", 200, (8, 8, 3), seed=label)
        images(folder / "test" / f"{label}", 60, (8, 8, 3), seed=10 + label)
    values = MEMBERSHIP | dict(data=str(folder), members=120, ipc=1, eval_runs=1, attack_updates=(2,))
    result = script.main(arguments(script, tmp_path / "runs", values))
    assert (result["attacked_members"], result["attacked_others"]) == (120, 120)
    made = load_distilled(only_run(tmp_path / "runs") / "chunk" / "distilled.safetensors")
    data = load(str(folder), data_dir=tmp_path / "other")
    order = torch.randperm(400, generator=common.run.rng("chunks"))
    inside, outside = order[120:240], torch.cat([order[:120], order[240:]])
    zca, own = (
        fit_zca(dataclasses.replace(data, x_train=data.x_train[index], content=name), tmp_path / "other")
        for index, name in ((outside, "outside"), (inside, "inside"))
    )
    assert torch.equal(made.zca, zca.matrix) and torch.equal(made.zca_mean, zca.mean)
    areas = []
    for each in (zca, own):
        x, x_test = (each.whiten(normalise(x, data.mean, data.std)) for x in (data.x_train[inside], data.x_test))
        areas.append(common.applications.auc(-x.flatten(1).norm(dim=1).numpy(), -x_test.flatten(1).norm(dim=1).numpy()))
    (fair, error), (unfair, _) = areas
    assert abs(fair - 0.5) < 3 * error and unfair > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("values", [CONTINUAL | dict(class_steps=2), MEMBERSHIP | dict(members=200, member_chunk=0)])
def test_an_application_on_the_gpu_is_that_on_the_cpu(script, values, tmp_path):
    """Colour, whitened: sets as near as three steps leave them, and scores of students of six or nine updates."""
    folder = tmp_path / "set"
    for label in range(3):
        images(folder / "train" / f"{label}", 80, (8, 8, 3), seed=label)
        images(folder / "test" / f"{label}", 30, (8, 8, 3), seed=10 + label)
    results = {}
    for device in ("cpu", "cuda"):
        changes = dict(data=str(folder), device=device, steps=3, eval_runs=1)
        results[device] = script.main(arguments(script, tmp_path / device, values, **changes))
    name = "step_2" if values["application"] == "continual" else "chunk"
    a, b = (load_distilled(only_run(tmp_path / d) / name / "distilled.safetensors").inputs() for d in results)
    assert (a - b).norm() < 1e-3 * a.norm()
    for row, of_row in results["cpu"]["curves"].items():
        for measure, points in of_row.items():
            for ours, theirs in zip(points, results["cuda"]["curves"][row][measure], strict=True):
                assert abs(ours["mean"] - theirs["mean"]) < 0.15, (row, measure)


# ------------------------------------------------------------------------------------------------- the default commands


@pytest.mark.slow
def test_continual_learning_of_digits_from_distilled_memory_beats_random_real_memory(script, tmp_path):
    """Five classes a step; with every class seen, by more than the sum of the standard deviations."""
    values = dict(application="continual", class_steps=2, device="cpu", eval_runs=3)
    result = script.main(arguments(script, tmp_path, values))
    last = {row: of_row["conv"][-1] for row, of_row in result["curves"].items()}
    assert last["distilled"]["at"] == 10 and len(last["distilled"]["values"]) == 3
    gain = last["distilled"]["mean"] - last["random_real"]["mean"]
    assert gain > last["distilled"]["std"] + last["random_real"]["std"], last


@pytest.mark.slow
def test_attacks_find_members_of_an_overfitted_student_and_chance_for_one_that_saw_none(tmp_path):
    """The default command, frepo.py; students of the whole chunk overfit, those of unseen images cannot know."""
    result = frepo.main(arguments(frepo, tmp_path, dict(application="membership", device="cpu", eval_runs=1)))
    of_row = {row: {name: points[-1] for name, points in each.items()} for row, each in result["curves"].items()}
    for attack in ("AUC threshold", "AUC logistic", "AUC mlp", "AUC forest", "AUC knn"):
        assert of_row["all_real"][attack]["low"] > 0.5, attack
        unseen = of_row["unseen_real"][attack]
        assert abs(unseen["mean"] - 0.5) < 3 * unseen["se"], attack
    assert of_row["all_real"]["AUC threshold"]["mean"] > 0.65
    assert of_row["distilled"]["AUC threshold"]["high"] < of_row["all_real"]["AUC threshold"]["low"]
    assert of_row["distilled"]["accuracy"]["mean"] > of_row["random_real"]["accuracy"]["mean"]
