"""How good a labelled distilled set is: students trained on it from scratch by FRePo's schedule, and kernel ridge.

Apart from common/pairs.py, which scores pairs of image and teacher feature by pretraining. Every row is trained and
scored the same way, at the last update, on all test images:
  a model's name   accuracy of fresh students of that architecture
  krr              accuracy of kernel ridge regression from the row's images, on features of the first model's students
Rows: random real images, as many of each class, drawn anew for every student, labelled as the distilled ones start;
distilled; and on request all real images for as many updates. The r-th students of all rows start from equal weights.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from common.artefact import Distilled
from common.augment import dsa, upload
from common.data import Data, Inputs
from common.models import frepo_student
from common.pairs import Scored, seconds_of, summarise
from common.run import UserError, rng, seeded

# updates of a student by the number of images, as published; ISA's script differs in three places
STEPS = {10: 1000, 100: 2000, 200: 20_000, 400: 5000, 500: 5000, 1000: 10_000, 2000: 40_000, 5000: 40_000}
STEPS_ISA = STEPS | {200: 2000, 1000: 4000, 2000: 5000}
BLOCK = 256  # images of a forward pass while scoring


@dataclass
class Recipe:
    """How students are trained; every value is recorded in result.json and in the artefact."""

    steps: int  # updates
    runs: int = 5
    batch: int = 500
    lr: float = 3e-4  # Adam's
    warm_up: int = 500  # updates from zero to lr, but at most half of all; then a cosine
    lr_end: float = 0.01  # of it, as a fraction of lr
    loss: str = "mse"  # to the labels as they are; xent: to their argmax; softxent: to softmax(y / temperature)
    temperature: float = 1.0
    dsa: str = "none"  # strategy and strengths of common.augment.dsa
    strengths: str = "frepo"
    shared: bool = False  # the augmentation's parameters: one for a batch, or one for an image
    shuffle: bool = True  # False: the images in the order of the file, class after class
    ridge: float = 1e-6  # of krr: lam = ridge * trace / n
    flip: bool = False  # krr counts mirrored images as well


def student_steps(n: int, table: dict[int, int]) -> int:
    """Updates for n images: the table's, or its value for the nearest number by ratio (FRePo's departure 4)."""
    return table[min(table, key=lambda known: abs(math.log(known / n)))]


def student_lr(step: int, recipe: Recipe) -> float:
    """Linear warm-up from 0, then a cosine; it would be at lr_end * lr one update after the last (FRePo's script)."""
    warm_up = min(recipe.warm_up, recipe.steps // 2)
    if step < warm_up:
        return recipe.lr * step / warm_up
    progress = (step - warm_up) / max(1, recipe.steps - warm_up)
    return recipe.lr * (recipe.lr_end + (1 - recipe.lr_end) * 0.5 * (1 + math.cos(math.pi * progress)))


def losses_of(scores: Tensor, y: Tensor, loss: str, temperature: float) -> Tensor:
    """Of each image, (B,). scores, y: (B, C). mse: half the squared error summed over the classes."""
    if loss == "mse":
        return 0.5 * (scores - y).square().sum(1)
    target = y.argmax(1) if loss == "xent" else (y / temperature).softmax(1)
    return F.cross_entropy(scores, target, reduction="none")


def student_loss(scores: Tensor, y: Tensor, loss: str, temperature: float) -> Tensor:
    """Mean of losses_of over the batch."""
    return losses_of(scores, y, loss, temperature).mean()


@lru_cache(maxsize=2)
def epoch_order(n: int, *key) -> Tensor:
    """The order of n images in an epoch. (n,)"""
    return torch.randperm(n, generator=rng("student order", *key))


def stream_index(step: int, n: int, batch: int, shuffle: bool, *key) -> Tensor:
    """Places of the step-th batch in an endless stream of epochs, each shuffled anew or in order: (min(n, batch),)."""
    size = min(n, batch)
    places = torch.arange(step * size, (step + 1) * size)
    if not shuffle:  # as published; FRePo's departure 5 is to shuffle
        return places % n
    epochs = range(int(places[0]) // n, int(places[-1]) // n + 1)
    return torch.cat([epoch_order(n, *key, epoch)[(places % n)[places // n == epoch]] for epoch in epochs])


def fit_student(
    net: nn.Module, images: Callable[[Tensor], Tensor], y: Tensor, recipe: Recipe, *key, after=lambda done: None
) -> None:
    """Train net on n labelled images, in place: Adam, the schedule of `student_lr`, DSA on every batch.

    images: places (B,) -> network inputs (B, C, H, W) float32 on y's device; y: (n, C) scores; key: of the order and
    the augmentation; after: called with the number of updates done, after each. The net stays in train mode. Raises
    UserError if the last loss is not finite.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr, foreach=True)
    generator = rng("student augmentation", *key)
    for step in range(recipe.steps):
        net.train()
        index = stream_index(step, len(y), recipe.batch, recipe.shuffle, *key)
        x = dsa(images(index), generator, recipe.dsa, recipe.strengths, recipe.shared)
        loss = student_loss(net(x), y[upload(index, y.device)], recipe.loss, recipe.temperature)
        optimizer.param_groups[0]["lr"] = student_lr(step, recipe)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step + 1)
    net.train()
    if not loss.isfinite():
        raise UserError(f"a student of {len(y)} images ended at loss {loss.item()}; lower --eval-lr {recipe.lr}")


@torch.no_grad()
def features_of(net: nn.Module, images: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """net.features of images 0 .. n - 1, (n, d)."""
    return torch.cat([net.features(images(index)) for index in torch.arange(n).split(BLOCK)])


def krr_head(f_s: Tensor, y_s: Tensor, ridge: float) -> Tensor:
    """The head of kernel ridge regression from (f_s, y_s), lam as in the outer loop: ridge * trace(K_ss) / n_s. (d, C)

    f_s: (n_s, d), y_s: (n_s, C); in float64 where the device has it.
    """
    f_s, y_s = (x if x.device.type == "mps" else x.double() for x in (f_s, y_s))
    return kernels.ridge_fit(f_s, y_s, ridge * f_s.square().sum() / len(f_s))


def per_class(y: Tensor, ipc: int, *key) -> Tensor:
    """Indices of ipc random images of each class, class after class: (classes * ipc,). y: (N,) labels."""
    order = torch.randperm(len(y), generator=rng(*key))
    return torch.cat([order[y[order] == label][:ipc] for label in range(int(y.max()) + 1)])


def evaluate_students(
    distilled: Distilled,
    data: Data,
    train: Inputs,
    test: Inputs,
    labels: Callable[[Tensor], Tensor],
    widths: tuple[int, ...],
    device: torch.device,
    recipe: Recipe,
    seed: int,
    models: tuple[str, ...] = ("conv",),
    rows: tuple[str, ...] = ("random_real", "distilled"),
    keep: Path | None = None,
) -> dict[str, dict[str, dict]]:
    """{row: {model or "krr": {"values": one a student, "mean", "std"}}}; std is the sample's, over the students.

    train, test: the network inputs of data.x_train and data.x_test. labels: class numbers (n,) -> scores (n, C) of real
    images. widths: of the student (models.frepo_student). seed: of students and random images. models, rows: see above,
    the first model is krr's. keep: a JSON file of the students scored so far, read only if it was made from the same
    set by the same recipe on the same test images. Raises kernels.FailedFactorization if the ridge of krr failed.
    """
    classes = distilled.y.shape[1]
    tested = hashlib.sha256(data.x_test.contiguous().numpy()).hexdigest()  # the parts of hold_out share their content
    x_s, y_s = distilled.inputs().to(device), distilled.y.to(device)
    scored = Scored(keep, recipe, distilled.x, distilled.y, data.content, tested, seed)
    bar = tqdm(total=len(rows) * len(models) * recipe.runs, desc="students", leave=False, mininterval=1)
    for row in rows:
        for model in models:
            for run in range(recipe.runs):
                bar.set_postfix_str(f"{row} {model}")
                if not scored.has(f"{row} {model}", run):
                    images, y = images_of(row, x_s, y_s, data, train, labels, seed, run)
                    with seeded("student", model, seed, run):  # the run-th student of every row starts alike
                        net = frepo_student(model, data.channels, data.size, classes, widths).to(device)
                    fit_student(net, images, y, recipe, seed, run)
                    scores = score_student(net, images, y, test, data.y_test, recipe, row != "all_real")
                    kernels.raise_if_failed(distilled.step)
                    scored.add(f"{row} {model}", scores)
                bar.update()
    bar.close()
    results = {}
    for row in rows:
        of_model = {model: summarise(scored.rows[f"{row} {model}"][: recipe.runs]) for model in models}
        results[row] = {model: scores["accuracy"] for model, scores in of_model.items()}
        if "krr" in of_model[models[0]]:
            results[row]["krr"] = of_model[models[0]]["krr"]
    return results


def images_of(
    row: str, x_s: Tensor, y_s: Tensor, data: Data, train: Inputs, labels, seed: int, run: int
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(places -> network inputs, labels (n, C)) that the run-th student of a row is trained on.

    x_s: (n_s, C, H, W) network inputs of the distilled set, y_s: (n_s, classes).
    """
    device = y_s.device
    if row == "distilled":
        return lambda index: x_s[upload(index, device)], y_s
    if row == "random_real":
        real = per_class(data.y_train, len(y_s) // len(data.y_train.unique()), "random real", seed, run)
        x = train(real)
        return lambda index: x[upload(index, device)], labels(data.y_train[real]).to(device)
    return train, labels(data.y_train).to(device)


@torch.no_grad()
def score_student(
    net: nn.Module, images, y: Tensor, test: Inputs, y_test: Tensor, recipe: Recipe, krr: bool
) -> dict[str, float]:
    """Accuracy of a trained student, and of the ridge regression on its features from the images it was trained on.

    The test images pass in blocks: of a large set the features would not fit.
    """
    net.eval()
    heads = {"accuracy": net.head}
    if krr:
        f_s, y_s = features_of(net, images, len(y)), y
        if recipe.flip:
            mirrored = features_of(net, lambda index: images(index).flip(3), len(y))
            f_s, y_s = torch.cat([f_s, mirrored]), torch.cat([y, y])
        fitted = krr_head(f_s, y_s, recipe.ridge)
        heads["krr"] = lambda f: f.to(fitted.dtype) @ fitted
    predicted = {name: [] for name in heads}
    for index in torch.arange(len(test)).split(BLOCK):
        f_test = net.features(test(index))  # (BLOCK, d)
        for name, head in heads.items():
            predicted[name].append(head(f_test).argmax(1))
    return {name: float((torch.cat(parts).cpu() == y_test).float().mean()) for name, parts in predicted.items()}


def predict_seconds(
    data: Data, n_s: int, classes: int, widths, device: torch.device, recipe: Recipe, models: tuple[str, ...], rows
) -> float:
    """Seconds that evaluate_students will take over `rows`: one update and one pass of each model are timed."""
    short, total = replace(recipe, steps=5), 0.0  # the operation of DSA differs from update to update
    n_b = {row: min(len(data.x_train) if row == "all_real" else n_s, recipe.batch) for row in rows}  # a batch
    x = torch.zeros(max(BLOCK, *n_b.values()), data.channels, data.size, data.size, device=device)
    y = torch.zeros(len(x), classes, device=device)
    for model in models:
        with seeded("predict seconds"):
            net = frepo_student(model, data.channels, data.size, classes, widths).to(device)
        image = seconds_of(lambda net=net: features_of(net, lambda i: x[: len(i)], BLOCK), device) / BLOCK
        update = {}
        for n in set(n_b.values()):
            fit = lambda net=net, n=n: fit_student(net, lambda i: x[: len(i)], y[:n], short, "predict")  # noqa: E731
            update[n] = seconds_of(fit, device) / short.steps
        total += recipe.runs * sum(recipe.steps * update[n] + image * len(data.x_test) for n in n_b.values())
    return total


def table(results: dict[str, dict[str, dict]], caption: str) -> str:
    """The rows as text: accuracies in per cent, mean ± std."""
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    lines = [f"{'':15}" + "".join(f"{column:>16}" for column in columns)]
    for name, row in results.items():
        cells = [f"{100 * row[c]['mean']:.1f} ± {100 * row[c]['std']:.1f}" if c in row else "-" for c in columns]
        lines.append(f"{name.replace('_', ' '):15}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join([*lines, caption])
