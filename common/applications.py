"""What a labelled distilled set is for: learning classes step by step, and students that give no member away.

    python frepo.py --data cifar100 --ipc 20 --application continual   # five steps of twenty classes
    python frepo.py --data mnist --ipc 50 --application membership     # attacks on students of 10,000 images
    python -m common.applications RUN_DIR RUN_DIR ...                  # mean ± std over class orders, or over chunks

FRePo's two applications (Zhou, Nezhadarya and Ba 2022, arXiv:2206.00719, and its released scripts), which ISA repeats.
Every distillation is a whole run of the script on a part of the set, in a folder of its own inside the application's.

Both give curves {row: {measure: [{"at", "mean", ..}, ..]}}, over classes seen or over the updates of a student.
"""

import json
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from common.artefact import Distilled, load_distilled, save_distilled
from common.augment import upload
from common.data import Data, Inputs, Zca, part_of
from common.models import frepo_student
from common.pairs import Scored, accuracy, summarise
from common.run import (
    FREE_ON_RESUME,
    Run,
    UserError,
    cli,
    load_checkpoint,
    rng,
    seed_of,
    seeded,
    write_atomic,
    write_json,
)  # fmt: skip
from common.students import BLOCK, Recipe, evaluate_students, fit_student, losses_of, per_class

CONTINUAL_UPDATES = 10_000  # of a student after every step (published)
SMALL_BATCH, CHUNK_BATCH = 256, 1024  # images of an update, attacked students: of a small set, of a chunk (published)
LEAST_ATTACKED = 20  # members, and as many others
Z_95 = 1.959964  # standard errors to either side of a 95 % interval


class Subset:
    """Some of a set's inputs, nothing copied: places (B,) -> (B, C, H, W)."""

    def __init__(self, inputs: Inputs, index: Tensor):
        self.inputs, self.index = inputs, index

    def __len__(self) -> int:
        return len(self.index)

    def __call__(self, places: Tensor) -> Tensor:
        return self.inputs(self.index[places])


def counted_parts(run: Run) -> list[str]:
    """The parts whose seconds are in the run's checkpoint. One is written now: without it no line offers to resume."""
    counted = run.state["counted"] if run.state else []
    run.save(run.start, counted=counted)
    return counted


def distilled_part(distil: Callable, run: Run, counted: list[str], name: str, part: Data, zca: Zca | None) -> Distilled:
    """The set that distil, the script's main, makes of a part of the data, by a run in the folder `name` of `run`.

    A finished one is read, a begun one goes on; `counted` gets its name. Its own evaluation is one student a row, as
    published, of the first model.
    """
    folder = run.file(name)
    if name not in counted:  # its seconds in sessions that are over, which this run's checkpoint has not met
        counted.append(name)
        if (folder / "result.json").exists():
            run.seconds_before += json.loads((folder / "result.json").read_text())["seconds"]
        elif (folder / "checkpoint.pt").exists():
            run.seconds_before += load_checkpoint(folder / "checkpoint.pt")["seconds"]
    if not (folder / "result.json").exists():
        distil(run.part(name, eval_runs=1, eval_models=run.args.eval_models[:1], full_row=False), part, zca)
    return load_distilled(folder / "distilled.safetensors", run.name)


# --------------------------------------------------------------------------------------------------- continual learning


def class_groups(classes: int, steps: int, seed: int) -> list[list[int]]:
    """The classes of each step. Of 100 classes the seeds 0 to 4 give the published orders.

    FRePo's departure 11: the first steps take one class more where `steps` does not divide them.
    """
    order = np.random.RandomState(seed).permutation(classes)
    return [group.tolist() for group in np.array_split(order, steps)]


def places_of(y: Tensor, classes: list[int]) -> Tensor:
    """Where labels y (N,) are of one of the classes."""
    return torch.isin(y, torch.tensor(classes)).nonzero()[:, 0]


def continual(
    distil: Callable,
    data: Data,
    start: Callable[[], Run],
    recipe: Recipe,
    labels: Callable[[Tensor], Tensor],
    whiten: Callable[[Data], Zca | None],
    *,
    steps: int,
    order: int,
    updates: int,
    models: tuple[str, ...],
    widths: tuple[int, ...],
    seed: int,
    all_real: bool,
    cache_gb: float,
) -> dict:
    """Classes come in steps; each step distils its own alone. After each, students are trained from scratch on all that
    was distilled so far and tested on the test images of all classes seen, each of which they may take for any class.
    Beside them students of as many random real images of the classes seen, drawn anew for every student and step.

    distil(args, part of the data, whitening): the script's main. start: makes or opens the run's folder, once what was
    asked is known to be possible. recipe: the students', but for their updates, where 0 is as published. labels: class
    numbers -> scores. whiten: data -> its whitening; that of all classes, as published. steps, order: see class_groups.
    models, widths: of the students. all_real: a row of students of all real images of the classes seen. cache_gb: 10^9
    bytes for whitened images.
    Returns the contents of result.json. Raises UserError for more steps than classes, or one without a test image.
    """
    if not 1 <= steps <= data.num_classes:
        raise UserError(f"--class-steps {steps}: must be 1 to {data.num_classes}, the number of classes")
    groups = class_groups(data.num_classes, steps, order)
    for step, group in enumerate(groups, 1):
        if not len(places_of(data.y_test, group)):
            names = ", ".join(data.class_names[label] for label in group)
            raise UserError(f"--class-steps {steps}: step {step} ({names}) has no test image; take fewer steps")
    recipe = replace(recipe, steps=updates or CONTINUAL_UPDATES)
    rows = ("random_real", "distilled") + (("all_real",) if all_real else ())
    run = start()
    counted = counted_parts(run)
    zca = whiten(data)

    def score(memory: Distilled, step: int) -> dict:
        """Of students of the memory, tested on all classes seen."""
        seen = [label for group in groups[:step] for label in group]
        of_train, of_test = places_of(data.y_train, seen), places_of(data.y_test, seen)
        test = Inputs(data.x_test, data.mean, data.std, zca, run.device, cache_gb)
        train = Inputs(data.x_train, data.mean, data.std, zca, run.device, (cache_gb - test.gigabytes) * all_real)
        part = part_of(data, torch.arange(0), of_test)
        part = replace(part, y_train=data.y_train[of_train])  # real images are drawn from `train`
        return evaluate_students(
            memory, part, Subset(train, of_train), Subset(test, of_test), labels, widths, run.device, recipe, seed,
            models, rows, run.file(f"students_{step}.json"),
        )  # fmt: skip

    x, y, curves = [], [], {row: {} for row in rows}
    for step, group in enumerate(groups, 1):
        names = ", ".join(data.class_names[label] for label in group)
        print(f"continual: step {step} of {steps}: {len(group)} classes: {names}", flush=True)
        part = part_of(data, places_of(data.y_train, group), places_of(data.y_test, group))
        made = distilled_part(distil, run, counted, f"step_{step}", part, zca)
        run.save(step - 1, counted=counted)
        x.append(made.x), y.append(made.y)
        memory = replace(made, x=torch.cat(x), y=torch.cat(y))
        scores, seen = score(memory, step), sum(map(len, groups[:step]))
        for row, of_row in scores.items():
            for measure, summary in of_row.items():
                curves[row].setdefault(measure, []).append({"at": seen, "images": len(memory.x)} | summary)
                run.log_evaluation(step, {f"{row}/{measure}": summary["mean"]})
        run.save(step, counted=counted)
        print(of_text({row: {m: points[-1:] for m, points in of_row.items()} for row, of_row in curves.items()}))
        left = run.seconds() / step * (steps - step)
        print(f"continual: step {step} of {steps} is done, about {tqdm.format_interval(left)} to go", flush=True)
    save_distilled(
        run.file("distilled.safetensors"),
        memory.x,
        memory.y,
        data.mean,
        data.std,
        method=run.name,
        data=data.name,
        content=data.content,
        y_is=memory.y_is,
        class_names=data.class_names,
        resize=data.resize,
        step=memory.step,
        seed=seed,
        recipe=asdict(recipe),
        zca=zca,
        extra=dict(class_groups=groups) | {key: made.meta[key] for key in ("ipc", "flip", "widths", "eval_models")},
    )
    caption = (
        f"{data.name}, {steps} steps, class order {order}, {run.name}: by classes seen, test accuracy among them in "
        f"per cent, mean ± sample std over {recipe.runs} students"
    )
    return report(run, "continual", data, curves, caption, protocol=asdict(recipe), class_groups=groups)


# ------------------------------------------------------------------------------------------------ membership inference


def auc(members: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Area under the ROC curve of scores that should be higher for members, and its standard error. (m,), (n,)

    The probability that a member scores above another image, ties half; the error is DeLong's (Biometrics 1988).
    """

    def above(scores: np.ndarray, of: np.ndarray) -> np.ndarray:
        """For each score the share of `of` below it."""
        of = np.sort(of)
        return (np.searchsorted(of, scores, "left") + np.searchsorted(of, scores, "right")) / (2 * len(of))

    of_members, of_others = above(members, others), above(others, members)
    variance = of_members.var(ddof=1) / len(members) + of_others.var(ddof=1) / len(others)
    return float(of_members.mean()), float(variance**0.5)


def attackers(seed: int) -> dict:
    """The classifiers that are trained to tell members.

    FRePo's departure 13: fixed settings within the grid that the published attacks (TensorFlow Privacy) search by
    cross-validation; inputs are standardised, and hold the label.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "mlp": make_pipeline(StandardScaler(), MLPClassifier((64,), alpha=0.01, random_state=seed)),
        "forest": RandomForestClassifier(100, max_depth=10, min_samples_leaf=4, random_state=seed),
        "knn": make_pipeline(StandardScaler(), KNeighborsClassifier(7)),
    }


def attack(
    members: tuple[Tensor, Tensor, Tensor], others: tuple[Tensor, Tensor, Tensor], *key
) -> dict[str, tuple[float, float]]:
    """{attack: (AUC, its standard error)} of telling a student's training images from images it never saw.

    members, others: what the student says of as many images of either kind: scores (n, C), losses (n,), labels (n,).
    key: of the split. threshold: the loss itself. The others are trained on one half of the images to tell members from
    scores, loss and label, attack the other half, and the other way round; the AUC is the mean of the two, and so is
    its error: what one half shows by chance is learned for the other, so that they err together.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold

    results = {"threshold": auc(-members[1].numpy(), -others[1].numpy())}
    classes = members[0].shape[1]
    x = np.concatenate(
        [torch.cat([s, loss[:, None], F.one_hot(y, classes)], 1).double().numpy() for s, loss, y in (members, others)]
    )
    is_member = np.repeat([1, 0], [len(members[2]), len(others[2])])
    seed = seed_of("attack", *key) % 2**32
    halves = list(StratifiedKFold(2, shuffle=True, random_state=seed).split(x, is_member))
    for name, classifier in attackers(seed).items():
        parts = []
        for train, test in halves:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the MLP's 200 epochs, as published
                score = classifier.fit(x[train], is_member[train]).predict_proba(x[test])[:, 1]
            parts.append(auc(score[is_member[test] == 1], score[is_member[test] == 0]))
        (auc_1, se_1), (auc_2, se_2) = parts
        results[name] = ((auc_1 + auc_2) / 2, (se_1 + se_2) / 2)
    return results


@torch.no_grad()
def outputs(net: nn.Module, inputs, index: Tensor) -> Tensor:
    """The scores (n, C) of the images at index (n,), on the CPU; the net in eval mode, afterwards in train mode."""
    net.eval()
    scores = torch.cat([net(inputs(block)) for block in index.split(BLOCK)]).cpu()
    net.train()
    return scores


def chunk_order(y: Tensor) -> Tensor:
    """The order in which a set with labels y (N,) is cut into chunks: as it is stored, as published.

    FRePo's departure 15: sets that are stored class after class, as all folders are, are shuffled once for all.
    """
    by_class = bool((y[1:] >= y[:-1]).all())
    return torch.randperm(len(y), generator=rng("chunks")) if by_class else torch.arange(len(y))


def membership(
    distil: Callable,
    data: Data,
    start: Callable[[], Run],
    recipe: Recipe,
    labels: Callable[[Tensor], Tensor],
    whiten: Callable[[Data], Zca | None],
    *,
    ipc: int,
    members: int,
    chunk: int,
    updates: tuple[int, ...],
    target: str,
    others: str,
    attacked: int,
    model: str,
    widths: tuple[int, ...],
    seed: int,
    cache_gb: float,
) -> dict:
    """Distil a chunk of the training images, train students, and attack them: is an image of the chunk?

    Rows, all labelled and trained alike at a constant rate: distilled; random_real, as many images of the chunk, drawn
    anew for each student; unseen_real, as many from outside the chunk: its AUC is what differs between the training and
    the test images themselves; all_real, the whole chunk.
    Members are images of the chunk; others, in equal numbers, test images, or training images from outside the chunk
    that nothing else uses.

    distil .. whiten: see `continual`; the whitening is that of the images outside the chunk. ipc: images per class;
    members: images of a chunk; chunk: which, see chunk_order; updates: of a student when it is tested and attacked;
    attacked: students of a row that are attacked; target "initial": the images and labels that distillation starts from
    in place of what it ends with; others: "test" or "train". model, widths: of the students. Returns the contents of
    result.json. Raises UserError for a chunk beyond the images, one without ipc images of each class, and too few to
    attack.
    """
    updates, chunks = sorted(set(updates)), len(data.x_train) // members
    if not updates:
        raise UserError("--attack-updates: give at least one number, for instance 100 1000")
    if not chunks:
        raise UserError(f"--members {members}: must be at most {len(data.x_train)}, the training images")
    if chunk >= chunks:
        raise UserError(f"--member-chunk {chunk}: must be 0 to {chunks - 1}, there are {chunks} chunks of {members}")
    order = chunk_order(data.y_train)
    of_chunk = torch.arange(len(order)) // members == chunk
    inside, outside = order[of_chunk], order[~of_chunk]
    n = min(members, len(data.x_test) if others == "test" else len(outside))  # members attacked, and as many others
    if n < LEAST_ATTACKED:
        where = f"{len(data.x_test)} test images" if others == "test" else f"{len(outside)} images outside the chunk"
        raise UserError(f"--members {members}, {where}: an attack needs {LEAST_ATTACKED} of each")
    attacked_others = torch.randperm(len(data.x_test), generator=rng("others"))[:n]
    if others == "train":  # then these are used for nothing else
        outside = outside[torch.randperm(len(outside), generator=rng("others"))]
        attacked_others, outside = outside[:n], outside[n:]
    smallest, smallest_outside = (
        int(data.y_train[index].bincount(minlength=data.num_classes).min()) for index in (inside, outside)
    )
    if ipc > smallest:
        raise UserError(f"--ipc {ipc}: must be at most {smallest}, the images of a class in chunk {chunk}; or raise "
                        f"--members {members}")  # fmt: skip
    part = part_of(data, inside, torch.arange(len(data.x_test)))
    # FRePo's departure 12: one student is measured at all numbers of updates, as its rate is constant
    recipe = replace(recipe, steps=updates[-1], warm_up=0, lr_end=1.0)
    run = start()
    counted = counted_parts(run)
    # FRePo's departure 16: its own whitening would give the chunk away, as whitened members are shorter than others
    zca = whiten(part_of(data, outside, torch.arange(0)) if len(outside) else data)
    test = Inputs(part.x_test, data.mean, data.std, zca, run.device, cache_gb)
    train = Inputs(part.x_train, data.mean, data.std, zca, run.device, cache_gb - test.gigabytes)
    whole = Inputs(data.x_train, data.mean, data.std, zca, run.device, 0.0)
    unseen = Subset(whole, outside)
    if target == "learned":
        made = distilled_part(distil, run, counted, "chunk", part, zca)
        run.save(0, counted=counted)
        own, x_s, y_s = "distilled", made.inputs(), made.y
    else:  # FRePo's departure 14: what the released script does by mistake
        index = per_class(part.y_train, ipc, "initial images", seed)  # the script's own draw
        own, x_s, y_s = "initial_real", train(index).cpu(), labels(part.y_train[index])

    def trained_on(row: str, student: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """(places -> network inputs, labels (n, C)) of a row's student."""
        if row == "all_real":
            return train, labels(part.y_train).to(run.device)
        x, y = x_s, y_s
        if row != own:
            inputs, y = (train, part.y_train) if row == "random_real" else (unseen, data.y_train[outside])
            index = per_class(y, ipc, row.replace("_", " "), seed, student)
            x, y = inputs(index), labels(y[index])
        x = x.to(run.device)
        return lambda index: x[upload(index, run.device)], y.to(run.device)

    attacked_members = torch.randperm(len(train), generator=rng("members"))[:n]
    kinds = [(train, part.y_train, attacked_members)]
    kinds.append((test, data.y_test, attacked_others) if others == "test" else (whole, data.y_train, attacked_others))

    def measured(net: nn.Module, student: int) -> dict:
        """Accuracies and attacks of a student as it is."""
        answers = []
        for inputs, y, index in kinds:
            scores = outputs(net, inputs, index)
            if not scores.isfinite().all():
                raise UserError(f"a student's scores are not finite; lower --eval-lr {recipe.lr}")
            answers.append((scores, losses_of(scores, labels(y[index]), recipe.loss, recipe.temperature), y[index]))
        point = {
            "accuracy": accuracy(outputs(net, test, torch.arange(len(test))), data.y_test),
            "accuracy on members": accuracy(answers[0][0], answers[0][2]),
        }
        if student < attacked:
            point |= {f"AUC {name}": found for name, found in attack(*answers, seed, student).items()}
        return point

    rows = ["random_real", own, "unseen_real", "all_real"]
    if ipc > smallest_outside:
        rows.remove("unseen_real")
        print(f"membership: no row of unseen images: {smallest_outside} images of a class are outside the chunk")
    print(f"membership: {n} members, {n} others, {others} images", flush=True)
    facts = [part.content, own, others, updates, attacked, model, seed]
    scored = Scored(run.file(f"students_{target}_{others}.json"), recipe, x_s, y_s, *facts)
    bar = tqdm(total=len(rows) * recipe.runs * updates[-1], desc="students", leave=False, mininterval=1)
    for row in rows:
        for student in range(recipe.runs):
            bar.set_postfix_str(row)
            if scored.has(row, student):
                bar.update(updates[-1])
                continue
            images, y = trained_on(row, student)
            with seeded("student", model, seed, student):  # those of all rows start alike
                net = frepo_student(model, data.channels, data.size, data.num_classes, widths).to(run.device)
            points = []

            def measure(done: int, net=net, student=student, points=points) -> None:
                bar.update()
                if done in updates:
                    points.append(measured(net, student))

            batch = CHUNK_BATCH if row == "all_real" else SMALL_BATCH
            fit_student(net, images, y, replace(recipe, batch=batch), seed, student, after=measure)
            scored.add(row, points)
            run.save(0, counted=counted)
    bar.close()
    curves = {row: over_students(scored.rows[row][: recipe.runs], updates) for row in rows}
    caption = (
        f"{data.name}, chunk {chunk} of {members} images, {ipc} a class, {run.name}: by updates of a student; "
        f"accuracies in per cent, mean ± sample std over {recipe.runs} students; AUC of {n} members and {n} "
        f"{others} images, mean over {min(attacked, recipe.runs)} students ± half the 95 % interval"
    )
    facts = dict(ipc=ipc, target=target, others=others, attacked_members=n, attacked_others=n)
    return report(run, "membership", data, curves, caption, protocol=asdict(recipe), **facts)


def over_students(students: list[list[dict]], updates: list[int]) -> dict[str, list[dict]]:
    """Curves of a row from the points of its students, of whom the first alone may have been attacked."""
    curves = {}
    for measure in students[0][0]:
        curves[measure] = []
        for place, at in enumerate(updates):
            values = [points[place][measure] for points in students if measure in points[place]]
            curves[measure].append({"at": at} | (of_auc(values) if measure.startswith("AUC") else of_values(values)))
    return curves


def of_values(values: list[float]) -> dict:
    """Their mean, sample standard deviation and the values."""
    return summarise([{"value": value} for value in values])["value"]


def of_auc(values: list[tuple[float, float]]) -> dict:
    """Mean over students of (AUC, standard error); the interval is no narrower for more of them, on the same images."""
    mean, se = (sum(column) / len(values) for column in zip(*values, strict=True))
    low, high = max(0.0, mean - Z_95 * se), min(1.0, mean + Z_95 * se)
    return {"mean": mean, "se": se, "low": low, "high": high, "values": [value for value, _ in values]}


# -------------------------------------------------------------------------------------------------------------- reports


def half_width(point: dict) -> float:
    """What stands behind the ± of a point: a standard deviation, or half the 95 % interval of one AUC."""
    return Z_95 * point["se"] if "se" in point else point["std"]


def scale_of(measure: str) -> int:
    """Accuracies are shown in per cent."""
    return 1 if measure.startswith("AUC") else 100


def of_text(curves: dict[str, dict[str, list[dict]]]) -> str:
    """A block for each measure, a line for each row, a column for each point."""
    lines = []
    for measure in dict.fromkeys(measure for of_row in curves.values() for measure in of_row):
        having = {row: of_row[measure] for row, of_row in curves.items() if measure in of_row}
        at = next(iter(having.values()))
        lines.append(f"{measure:20}" + "".join(f"{point['at']:>15}" for point in at))
        scale, digits = scale_of(measure), 3 if measure.startswith("AUC") else 1
        for row, points in having.items():
            cells = [f"{scale * p['mean']:.{digits}f} ± {scale * half_width(p):.{digits}f}" for p in points]
            lines.append(f"  {row.replace('_', ' '):18}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def plot(path: Path, curves: dict[str, dict[str, list[dict]]], application: str, title: str) -> None:
    """One panel a measure, one line a row."""
    from matplotlib.figure import Figure

    measures = list(dict.fromkeys(measure for of_row in curves.values() for measure in of_row))
    columns = min(4, len(measures))
    figure = Figure(figsize=(4 * columns, 3.4 * -(-len(measures) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(measures) // columns), columns, squeeze=False).flatten()
    for panel in panels[len(measures) :]:
        panel.remove()
    for panel, measure in zip(panels, measures, strict=False):
        for row, of_row in curves.items():
            points = of_row.get(measure, [])
            scale = scale_of(measure)
            values = [[point["at"], scale * point["mean"], scale * half_width(point)] for point in points]
            if values:
                at, mean, half = zip(*values, strict=True)
                panel.errorbar(at, mean, half, fmt="o-", ms=3, capsize=2, label=row.replace("_", " "))
        panel.set(title=measure, xlabel="classes seen" if application == "continual" else "updates of a student")
        if application == "membership":
            panel.set_xscale("log")
        if measure.startswith("AUC"):
            panel.axhline(0.5, lw=0.7, color="0.6")
    panels[0].legend()
    figure.suptitle(textwrap.fill(title, 50 * columns), fontsize=9)
    write_atomic(path, lambda tmp: figure.savefig(tmp, format="png", dpi=110))


def report(run: Run, application: str, data: Data, curves: dict, caption: str, **result) -> dict:
    """Print the curves, write curve.json, curve.png and result.json; returns the last."""
    print(of_text(curves) + "\n" + caption)
    write_json(run.file("curve.json"), curves)
    plot(run.file("curve.png"), curves, application, caption)
    facts = dict(data=data.name, content=data.content, images_skipped=data.skipped)
    return run.finish(application=application, curves=curves, **facts, **result)


# ------------------------------------------------------------------------------------------------------- several runs


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders of finished runs with --application, which differ in --class-order, --member-chunk or --seed alone"""
    out: str | None = None
    """where the curves go, as {data}__{script}__{application}.json and .png; None: beside the first run"""


def over_runs(of_runs: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Curves of the mean and the sample standard deviation over runs; `values` are the runs' means."""
    curves = {}
    for row, of_row in of_runs[0].items():
        curves[row] = {}
        for measure, points in of_row.items():
            curves[row][measure] = []
            for place, point in enumerate(points):
                values = [each[row][measure][place]["mean"] for each in of_runs]
                curves[row][measure].append({"at": point["at"]} | of_values(values))
    return curves


def main(args: Args) -> dict:
    """Read the runs' results, print, plot and return their means. Raises UserError for runs that do not go together."""
    if len(args.runs) < 2:
        raise UserError("give two run folders or more, of runs with --application")
    results = []
    for folder in args.runs:
        try:
            results.append(json.loads((Path(folder) / "result.json").read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no readable result.json ({error}); name folders of finished runs") from None
        if "application" not in results[-1]:
            raise UserError(f"{folder}: a run without --application; name runs that have one")
    first, own = results[0], dict(class_order="class orders", member_chunk="chunks", seed="seeds")
    compared = sorted(first["args"].keys() - set(own) - FREE_ON_RESUME)
    for folder, result in zip(args.runs, results, strict=True):
        facts = [(fact, result[fact], first[fact]) for fact in ("method", "application", "data", "content")]
        facts += [(f"--{f.replace('_', '-')}", result["args"].get(f), first["args"][f]) for f in compared]
        for name, its, of_first in facts:
            if its != of_first:
                raise UserError(f"{folder}: {name} {its}, but {of_first} in {args.runs[0]}; give runs that differ in "
                                "--class-order, --member-chunk and --seed alone")  # fmt: skip
    which = [[result["args"][flag] for flag in own] for result in results]
    if any(which.count(each) > 1 for each in which):
        raise UserError("two of the runs have the same --class-order, --member-chunk and --seed: give each once")
    common_rows = set.intersection(*[set(result["curves"]) for result in results])
    curves = over_runs([{row: of for row, of in r["curves"].items() if row in common_rows} for r in results])
    (varied,) = [words for flag, words in own.items() if len({r["args"][flag] for r in results}) > 1][:1]
    caption = (
        f"{first['data']}, {first['method']}, {first['application']}: mean ± sample std over {len(results)} {varied}"
    )
    print(of_text(curves) + "\n" + caption)
    out = Path(args.out) if args.out else Path(args.runs[0]).resolve().parent
    stem = f"{first['data']}__{first['method']}__{first['application']}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make a folder there ({error.strerror})") from None
    result = dict(
        application=first["application"], data=first["data"], method=first["method"], curves=curves,
        runs=[dict(zip(own, each, strict=True)) for each in which],
        seconds=sum(r["seconds"] for r in results), commits=sorted({str(r["commit"]) for r in results}),
    )  # fmt: skip
    write_json(out / f"{stem}.json", result)
    plot(out / f"{stem}.png", curves, first["application"], caption)
    print(f"written: {out / stem}.json and .png")
    return result


if __name__ == "__main__":
    cli(main, Args)
