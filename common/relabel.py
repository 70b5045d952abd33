"""Students that learn a teacher's soft labels of augmented, mixed views: how SRe2L, SC-DD and RDED score their sets.

Yin, Xing and Shen 2023, arXiv:2306.13092; Zhou, Yin, Shao and Shen 2024, arXiv:2404.07976; Sun, Shi, Yu and Lin 2024,
arXiv:2312.03526. Every row is trained and scored the same way, on all test images, at the last epoch:
  student            accuracy of fresh students
  published_metric   what the published CIFAR script prints as best accuracy: the maximum over all prefixes of 64, 128,
                     ... test images and over evaluations; on request, beside the accuracy and never in its place
The r-th students of all rows start from equal weights.

A view is a pure function of key, epoch and image: crop, flip, mixing weight and box come from a counter-based
generator, an image's partner is the one at its place in a permutation of the whole set. So crops and mixes that are
derived again are those the labels were made with, bit for bit, whatever the batch, and only the logits of stored labels
are kept. (The published scripts draw weight, box and permutation for a batch.)
"""

import contextlib
import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from scipy.special import betaincinv
from torch import Tensor, nn
from tqdm import tqdm

import common.students
from common.augment import boxes, counter_uniform, crop_variants, gather, resample, upload
from common.data import Data, Inputs, normalise
from common.pairs import Scored, seconds_of, summarise
from common.run import UserError, first_line, rng, seeded, write_atomic
from common.students import BLOCK

FORMAT = "soft labels 1"
PREFIX = 64  # images of a test batch of the published script
SPARE = 2 << 30  # bytes left free on a CUDA device when a set of pixels is kept there


@dataclass
class SoftRecipe:
    """How students learn soft labels; every value is recorded in result.json. The defaults are SC-DD's on CIFAR-100,
    but for `mix`, the teacher's mode and the end of the schedule (`smooth`)."""

    epochs: int = 200
    runs: int = 3
    batch: int = 64
    opt: str = "adamw"  # or sgd
    lr: float = 1e-3
    weight_decay: float = 0.01
    decay_all: bool = True  # False: only parameters with more than one dimension decay
    momentum: float = 0.9  # sgd's
    warm_up: int = 0  # epochs, linear from 1 % of lr
    smooth: float = 1.0  # zeta of the cosine 1/2 (1 + cos(pi e / (zeta E))): 1 ends at zero, 2 at half of lr
    temperature: float = 30.0
    scaled: bool = False  # the KL divergence times temperature^2
    loss: str = "kl"  # or mse_ce: squared error of the logits + ce_weight * cross-entropy to the hard labels
    ce_weight: float = 0.025
    crop: str = "pad"  # zero padding and a crop; resized: a box of area crop_min .. 1; none
    crop_min: float = 0.08
    flip: bool = True
    mix: str = "none"  # mixup, cutmix
    mix_alpha: float = 0.8  # weights are Beta(alpha, alpha)
    ema: float = 0.0  # decay of the averaged weights that are scored; 0: the last weights are
    teacher_train: bool = False  # the teacher's BatchNorm takes the statistics of the student's batch
    labels: str = "online"  # stored: labels in half precision, the same views for all students of a row


def check_recipe(recipe: SoftRecipe) -> None:
    """Raises UserError for a value that no student can be trained with."""
    choices = dict(
        opt=("adamw", "sgd"), loss=("kl", "mse_ce"), crop=("pad", "resized", "none"), mix=("none", "mixup", "cutmix"),
        labels=("online", "stored"),
    )  # fmt: skip
    for name, known in choices.items():
        if getattr(recipe, name) not in known:
            raise UserError(f"students' {name} {getattr(recipe, name)!r}: give one of {', '.join(known)}")
    if recipe.batch < 2:
        raise UserError(f"students' batch {recipe.batch}: BatchNorm needs at least 2 images")
    limits = dict(epochs=(1, math.inf), runs=(1, math.inf), temperature=(1e-6, math.inf), smooth=(1, math.inf))
    limits |= dict(crop_min=(1e-4, 1), mix_alpha=(1e-3, math.inf), ema=(0, 1 - 1e-9), warm_up=(0, math.inf))
    for name, (low, high) in limits.items():
        if not low <= getattr(recipe, name) <= high:
            bound = f"at least {low:g}" if high == math.inf else f"in {low:g} .. {high:g}"
            raise UserError(f"students' {name} {getattr(recipe, name)}: must be {bound}")


# ---------------------------------------------------------------------------------------------------------------- views


class Plan(NamedTuple):
    """What one epoch does to each of n images, on the CPU."""

    variant: Tensor  # (n,) of the padding crop and the mirror, see augment.crop_variants
    box: tuple[Tensor, Tensor, Tensor, Tensor]  # (n,) each: top, left, height, width of the resized crop
    mirrored: Tensor  # (n,) bool
    partner: Tensor  # (n,) places of the images mixed in
    lam: Tensor  # (n,) weights of the images themselves
    corners: Tensor  # (n, 4) top, bottom, left, right of the CutMix boxes, in pixels


@lru_cache(maxsize=2)
def epoch_plan(n: int, size: int, epoch: int, recipe: tuple, *key) -> Plan:
    """recipe: (crop, crop_min, flip, mix, mix_alpha). All images at once, so that no bit depends on a batch."""
    crop, crop_min, flip, mix, mix_alpha = recipe
    everything = torch.arange(n)
    u = counter_uniform(everything, 5, "view", *key, epoch)
    mirrored = (u[:, 4] < 0.5) & flip
    variant = crop_variants(u[:, [0, 1, 4]], size, flip, None if crop == "pad" else 0)
    partner, lam, corners = everything, torch.ones(n), torch.zeros(n, 4, dtype=torch.int64)
    if mix != "none":
        partner = torch.randperm(n, generator=rng("mix", *key, epoch))
        u_mix = counter_uniform(everything, 3, "mix", *key, epoch).double().numpy()
        beta = betaincinv(mix_alpha, mix_alpha, u_mix[:, 0])  # the quantile function of Beta(alpha, alpha)
        lam = torch.from_numpy(beta).float()
        if mix == "cutmix":
            corners = torch.from_numpy(cut_corners(beta, u_mix[:, 1:], size))
            top, bottom, left, right = corners.unbind(1)
            lam = 1 - (bottom - top) * (right - left) / size**2  # of the part that the border has left
    return Plan(variant, boxes(u[:, :4], (crop_min, 1.0)), mirrored, partner, lam, corners)


def cut_corners(lam: np.ndarray, u: np.ndarray, size: int) -> np.ndarray:
    """CutMix's boxes: sides sqrt(1 - lam) of the image around a uniform centre, clipped to it (Yun et al. 2019).

    lam: (n,); u: (n, 2) uniform in [0, 1). Returns (n, 4) int64: top, bottom, left, right in pixels.
    """
    half = (size * np.sqrt(1 - lam)).astype(np.int64)[:, None] // 2
    centre = (size * u).astype(np.int64)  # (n, 2)
    ends = np.stack([centre - half, centre + half], 2)  # (n, 2, 2)
    return ends.clip(0, size).reshape(-1, 4)


def as_inputs(x: Inputs | Tensor) -> Inputs:
    """A tensor counts as pixels that the networks take as they are."""
    if isinstance(x, Inputs):
        return x
    return Inputs(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), None, x.device, 0.0)


def augmented(x: Inputs, index: Tensor, plan: Plan, recipe: SoftRecipe) -> Tensor:
    """The images at index (B,), cropped and mirrored: (B, C, H, W) network inputs on x's device. Padding is black."""
    if recipe.crop == "resized":
        return resample(x(index), *(upload(part[index], x.device) for part in (*plan.box, plan.mirrored)))
    pixels = gather(x.pixels, index, plan.variant[index], recipe.flip, None if recipe.crop == "pad" else 0)
    return normalise(upload(pixels, x.device), x.mean, x.std)


def views(x: Inputs | Tensor, epoch: int, index: Tensor, recipe: SoftRecipe, *key) -> tuple[Tensor, Tensor, Tensor]:
    """What the student and its teacher see of the images at index (B,) of the set x, in an epoch.

    x: `common.data.Inputs` of the whole set without whitening, or its network inputs (n, C, H, W), n images on the
    device. Returns the mixed images (B, C, H, W), the partners' places (B,) on the CPU and the weights lam (B,) of the
    images themselves, on the device: a partner, in its own view of that epoch, has the weight 1 - lam.
    """
    x = as_inputs(x)
    size = x.pixels.shape[-1]
    kind = (recipe.crop, recipe.crop_min, recipe.flip, recipe.mix, recipe.mix_alpha)
    plan = epoch_plan(len(x), size, epoch, kind, *key)
    images, partner, lam = augmented(x, index, plan, recipe), plan.partner[index], upload(plan.lam[index], x.device)
    if recipe.mix == "none":
        return images, partner, lam
    others, weight = augmented(x, partner, plan, recipe), lam[:, None, None, None]
    if recipe.mix == "mixup":
        return images * weight + others * (1 - weight), partner, lam
    top, bottom, left, right = upload(plan.corners[index], x.device).T[:, :, None, None, None]  # (B, 1, 1, 1) each
    rows, columns = torch.arange(size, device=x.device)[:, None], torch.arange(size, device=x.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (B, 1, H, W)
    return torch.where(inside, others, images), partner, lam


@lru_cache(maxsize=2)
def epoch_batches(n: int, batch: int, *key) -> tuple[Tensor, ...]:
    """The places of n images in a random order, batch by batch: the last one is short, but never of one image."""
    parts = list(torch.randperm(n, generator=rng("soft order", *key)).split(batch))
    if len(parts) > 1 and len(parts[-1]) < 2:  # SC-DD's departure 11: BatchNorm cannot train on one image
        parts[-2:] = [torch.cat(parts[-2:])]
    return tuple(parts)


# ----------------------------------------------------------------------------------------------------------- the labels


@contextlib.contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Inside the block BatchNorm normalises by its batch, in eval mode as well; its buffers stay as they are."""
    norms = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, (mean, var) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, var


@torch.no_grad()
def logits_of(teacher: nn.Module, x: Tensor, recipe: SoftRecipe) -> Tensor:
    """The teacher's logits of views x (B, C, H, W): (B, classes); rounded to half precision for "stored" labels."""
    with batch_statistics(teacher) if recipe.teacher_train else contextlib.nullcontext():
        logits = teacher(x)
    return logits.half().to(logits.dtype) if recipe.labels == "stored" else logits


def label_facts(x: Inputs, recipe: SoftRecipe, key: tuple) -> dict:
    """What stored labels depend on beside the teacher and the number of epochs: JSON."""
    names = ["crop", "flip", "mix", "teacher_train"]
    names += ["crop_min"] * (recipe.crop == "resized") + ["mix_alpha"] * (recipe.mix != "none")
    names += ["batch"] * recipe.teacher_train
    facts = {name: getattr(recipe, name) for name in names}
    return facts | dict(images=digest(x.pixels, x.mean, x.std), key=repr(key))


def digest(*tensors: Tensor) -> str:
    """sha256 of shapes, types and contents."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(repr((tuple(x.shape), x.dtype)).encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def net_digest(net: nn.Module) -> str:
    return digest(*net.state_dict().values())


def label_bytes(n: int, classes: int, recipe: SoftRecipe) -> int:
    """Of the file of stored labels, but for its header."""
    return 2 * recipe.epochs * n * classes


def label_all(x: Inputs | Tensor, teacher: nn.Module, recipe: SoftRecipe, path: Path, *key) -> None:
    """Write the teacher's logits of all views of all epochs, (epochs, n, classes) float16, as a safetensors file.

    x: as for `views`. key: of the views; with teacher_train also of the batches, which are then those of
    post_train(..., *key). One epoch is in memory at a time. Raises UserError where the disk has too little room, or
    a logit is not finite.
    """
    x, path = as_inputs(x), Path(path)
    teacher.eval()
    n = len(x)
    first = torch.arange(min(2, n))
    classes = logits_of(teacher, x(first), recipe).shape[1]
    size, free = label_bytes(n, classes, recipe), shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f"{path}: soft labels of {recipe.epochs} epochs take {size / 1e9:.2g} GB, {free / 1e9:.2g} GB are free; "
            "free some space or take --labels online"
        )
    facts = label_facts(x, recipe, key) | dict(teacher=net_digest(teacher))
    meta = dict(format=FORMAT, **{name: json.dumps(value) for name, value in facts.items()})
    tensor = dict(dtype="F16", shape=[recipe.epochs, n, classes], data_offsets=[0, size])
    header = json.dumps({"__metadata__": meta, "logits": tensor}).encode()
    header += b" " * (-len(header) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)  # as safetensors lays it out, then epoch by epoch
            for epoch in tqdm(range(recipe.epochs), desc="soft labels", leave=False, disable=None):
                file.write(label_epoch(x, teacher, classes, recipe, epoch, *key).numpy())

    write_atomic(path, write)


def label_epoch(x: Inputs, teacher: nn.Module, classes: int, recipe: SoftRecipe, epoch: int, *key) -> Tensor:
    """(n, classes) float16 on the CPU. Raises UserError if a logit is not finite."""
    table = torch.empty(len(x), classes, dtype=torch.float16)
    parts = torch.arange(len(x)).split(BLOCK)
    for index in epoch_batches(len(x), recipe.batch, *key, epoch) if recipe.teacher_train else parts:
        logits = logits_of(teacher, views(x, epoch, index, recipe, *key)[0], recipe)
        table[index] = logits.half().cpu()
    if not table.isfinite().all():
        raise UserError(f"the labelling teacher's logits are not finite (epoch {epoch}, half precision); train it anew")
    return table


class StoredLabels:
    """The file of `label_all`, read epoch by epoch: a function (views, epoch, index) -> (B, classes) float32."""

    def __init__(self, path: Path, x: Inputs | Tensor, recipe: SoftRecipe, *key, teacher: nn.Module | None = None):
        """Raises UserError if it cannot be read or was made for other images, another recipe, key or teacher (None:
        any teacher)."""
        x, self.path = as_inputs(x), Path(path)
        try:
            self.file = safe_open(self.path, "pt")
            text, self.slice = self.file.metadata() or {}, self.file.get_slice("logits")
            self.shape = tuple(self.slice.get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no readable soft labels ({first_line(error)}); make them again") from None
        if text.get("format") != FORMAT:
            raise UserError(f"{path}: format {text.get('format')!r}, this version reads {FORMAT!r}; make them again")
        facts = label_facts(x, recipe, key) | (dict(teacher=net_digest(teacher)) if teacher is not None else {})
        for name, value in facts.items():
            if text.get(name) != json.dumps(value):
                raise UserError(f"{path}: soft labels of another {name}; delete the file to make them again")
        if self.shape[0] < recipe.epochs or self.shape[1] != len(x):
            raise UserError(
                f"{path}: soft labels of {self.shape[0]} epochs and {self.shape[1]} images, asked for {recipe.epochs} "
                f"and {len(x)}; delete the file to make them again"
            )
        self.device, self.epoch, self.table = x.device, None, None

    def __call__(self, mixed: Tensor, epoch: int, index: Tensor) -> Tensor:
        if epoch != self.epoch:
            self.epoch, self.table = epoch, self.slice[epoch : epoch + 1][0]  # (n, classes) float16
        return upload(self.table[index].float(), self.device)


# --------------------------------------------------------------------------------------------------------- the training


def soft_loss(scores: Tensor, target: Tensor, y: Tensor, y_other: Tensor, lam: Tensor, recipe: SoftRecipe) -> Tensor:
    """Of a batch. scores, target: the student's and the teacher's logits (B, C); y, y_other: classes (B,) of the images
    and of those mixed in, whose weights are lam and 1 - lam (B,).

    kl: KL(softmax(target / T) || softmax(scores / T)), mean over the batch, times T^2 if `scaled`.
    mse_ce: mean squared error over batch and classes + ce_weight * the mean cross-entropy (EDC, G-VBSM).
    """
    if recipe.loss == "kl":
        t = recipe.temperature
        p, q = F.log_softmax(target / t, 1), F.log_softmax(scores / t, 1)
        return F.kl_div(q, p, reduction="batchmean", log_target=True) * (t**2 if recipe.scaled else 1.0)
    own, other = (F.cross_entropy(scores, each, reduction="none") for each in (y, y_other))
    return F.mse_loss(scores, target) + recipe.ce_weight * (lam * own + (1 - lam) * other).mean()


def soft_lr(epoch: int, recipe: SoftRecipe) -> float:
    """The rate of an epoch: linear from 1 % over warm_up epochs, then 1/2 (1 + cos(pi e / (smooth E))) of lr, where e
    and E count the epochs after the warm-up."""
    if epoch < recipe.warm_up:
        return recipe.lr * (0.01 + 0.99 * epoch / recipe.warm_up)
    progress = (epoch - recipe.warm_up) / max(1, recipe.epochs - recipe.warm_up)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress / recipe.smooth))


def soft_optimizer(net: nn.Module, recipe: SoftRecipe) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum. Without decay_all biases and norms (one dimension) do not decay."""
    decayed = [p for p in net.parameters() if recipe.decay_all or p.ndim > 1]
    others = [p for p in net.parameters() if not recipe.decay_all and p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=others, weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, foreach=True)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, foreach=True)


@torch.no_grad()
def average_(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * net in place; buffers (BatchNorm's statistics) are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
    for kept, new in zip(average.buffers(), net.buffers(), strict=True):
        kept.copy_(new)


def post_train(
    net: nn.Module,
    x: Inputs | Tensor,
    y: Tensor,
    labels: nn.Module | Callable[[Tensor, int, Tensor], Tensor],
    recipe: SoftRecipe,
    *key,
    order: tuple = (),
    after: Callable[[int, nn.Module], None] = lambda done, scored: None,
) -> nn.Module:
    """Train net in place on the soft labels of views of the set x; returns the network to score.

    net: views (B, C, H, W) -> logits (B, classes); x: as for `views`; y: (n,) classes. labels: the teacher, which
    labels each batch, or a function (views, epoch, index) -> logits such as StoredLabels. key: of the views and, with
    `order` behind it, of the batches. Returns net, or with recipe.ema > 0 another one with the averaged weights.
    after: called with the epochs done and the network to score, after each. Raises UserError for a recipe that cannot
    be, for a set of one image, and if the last loss is not finite.
    """
    check_recipe(recipe)
    x = as_inputs(x)
    if len(x) < 2:
        raise UserError("a student cannot be trained on one image; raise --ipc")
    if isinstance(labels, nn.Module):
        teacher = labels.eval()
        labels = lambda mixed, epoch, index: logits_of(teacher, mixed, recipe)  # noqa: E731
    optimizer = soft_optimizer(net, recipe)
    average = copy.deepcopy(net) if recipe.ema else net
    y = upload(y, x.device)
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = soft_lr(epoch, recipe)
        for index in epoch_batches(len(x), recipe.batch, *key, *order, epoch):
            net.train()
            mixed, partner, lam = views(x, epoch, index, recipe, *key)
            target = labels(mixed, epoch, index)
            own, other = (y[upload(places, x.device)] for places in (index, partner))
            loss = soft_loss(net(mixed), target, own, other, lam, recipe)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if recipe.ema:
                average_(average, net, recipe.ema)
        after(epoch + 1, average)
    if not loss.isfinite():
        raise UserError(f"a student of {len(x)} images ended at loss {loss.item()}; lower --eval-lr {recipe.lr:g}")
    return average


# ----------------------------------------------------------------------------------------------------------- real crops


@torch.no_grad()
def random_crops(
    data: Data, net: nn.Module, ipc: int, device: torch.device, *key, pool: int = 300, crops: int = 5
) -> tuple[Tensor, Tensor]:
    """Crops of real images that the teacher finds easiest: RDED's set, in its form for CIFAR (no mosaic).

    Of each class `pool` random images, of each image `crops` square boxes with an area of 0.08 .. 1, resized back; each
    image's crop with the lowest cross-entropy stays, and of these the `ipc` lowest. net: normalised images -> logits.
    Returns pixels (classes * ipc, C, H, W) float32 and classes (classes * ipc,), class after class, on the CPU. Raises
    UserError if a class has fewer images than ipc.
    """
    net.eval()
    order = torch.randperm(len(data.y_train), generator=rng("random crops", *key))
    mean, std, chosen = data.mean.to(device), data.std.to(device), []
    for label in tqdm(range(data.num_classes), desc="random crops", leave=False, disable=None):
        places = order[data.y_train[order] == label][:pool]
        if ipc > len(places):
            raise UserError(
                f"--ipc {ipc}: random crops are of one image each, and of class {data.class_names[label]} "
                f"{len(places)} are looked at; lower --ipc"
            )
        best, loss = [], []
        for index in places.split(max(1, BLOCK // crops)):
            x = upload(data.x_train[index], device).float().div(255).repeat_interleave(crops, 0)
            u = upload(counter_uniform(index, 4 * crops, "random crops", *key), device).view(-1, 4)
            whole = torch.zeros(len(x), dtype=torch.bool, device=device)
            x = resample(x, *boxes(u, (0.08, 1.0), ratio=1.0), whole)
            target = torch.full((len(x),), label, device=device)
            losses = F.cross_entropy(net(normalise(x, mean, std)).float(), target, reduction="none").view(-1, crops)
            lowest, which = losses.min(1)  # (images,) each
            x = x.view(-1, crops, *x.shape[1:])
            best.append(x[torch.arange(len(x), device=device), which].cpu())
            loss.append(lowest.cpu())
        chosen.append(torch.cat(best)[torch.cat(loss).argsort(stable=True)[:ipc]])
    return torch.cat(chosen), torch.arange(data.num_classes).repeat_interleave(ipc)


# ------------------------------------------------------------------------------------------------------------- the rows


@torch.no_grad()
def hits(net: nn.Module, test: Inputs, y_test: Tensor) -> Tensor:
    """Which test images the network classifies rightly, in eval mode: (N,) bool on the CPU."""
    net.eval()
    predicted = [net(test(index)).argmax(1) for index in torch.arange(len(test)).split(BLOCK)]
    return torch.cat(predicted).cpu() == y_test


def prefix_maximum(right: Tensor) -> float:
    """The highest accuracy of the first 64, 128, ... test images, and of all. right: (N,) bool."""
    ends = torch.tensor([*range(PREFIX, len(right), PREFIX), len(right)])
    return float((right.cumsum(0)[ends - 1] / ends).max())


def is_scored(done: int, recipe: SoftRecipe) -> bool:
    """Whether the published metric looks at the student after so many epochs: each tenth, and the last."""
    return done % 10 == 0 or done == recipe.epochs


def views_key(recipe: SoftRecipe, seed: int, run: int) -> tuple[tuple, tuple]:
    """(key of the views, what is added to it for the batches) of the run-th student, for post_train.

    With stored labels all students see the same views, in other batches unless the teacher saw these batches.
    """
    if recipe.labels == "stored":
        return (seed,), () if recipe.teacher_train else (run,)
    return (seed, run), ()


def evaluate_soft(
    sets: dict[str, tuple[Tensor, Tensor] | Callable[[int], tuple[Tensor, Tensor]]],
    data: Data,
    make_student: Callable[[], nn.Module],
    teacher: nn.Module,
    device: torch.device,
    recipe: SoftRecipe,
    seed: int,
    rows: tuple[str, ...] | None = None,
    keep: Path | None = None,
    published: bool = False,
    stored: dict[str, Path] | None = None,
    facts: tuple = (),
    spare: int = SPARE,
) -> dict[str, dict[str, dict]]:
    """{row: {"student": {"values": one a student, "mean", "std"}}}; std is the sample's, over the students.

    sets: {row: (pixels (n, C, H, W), float or uint8, classes (n,)), or a function of the student's number that draws
    them}. teacher: normalised images -> logits, on the device, as are the students. rows: of `sets`, in order; None:
    all. seed: of students, batches and views. With recipe.labels "stored" all students of a row see the same views
    (key: seed), and only start and order differ; `stored` names the file of label_all(x, teacher, recipe, path, seed)
    for a row, other rows are labelled as they go, in the same precision. published: see "published_metric" above.
    keep: a JSON file of the students scored so far, read only if it was made from the same sets, teacher, kind of
    student and recipe on the same test images; `facts` must hold what the sets that are functions depend on beside
    data, seed and teacher. spare: bytes left free on a GPU where sets are kept on it. Raises UserError as post_train
    and StoredLabels do.
    """
    check_recipe(recipe)
    rows, stored = tuple(sets) if rows is None else rows, stored or {}
    with seeded("student", seed, 0):
        kind = [(name, tuple(x.shape)) for name, x in make_student().state_dict().items()]
    tested = digest(data.x_test, data.y_test)
    nothing = torch.zeros(0)
    scored = Scored(
        keep, recipe, nothing, nothing, data.content, tested, seed, net_digest(teacher), kind, published, facts,
        data.mean.tolist(), data.std.tolist(),
    )  # fmt: skip
    test = Inputs(data.x_test, data.mean, data.std, None, device, 0.0, spare)
    bar = tqdm(total=len(rows) * recipe.runs * recipe.epochs, desc="students", leave=False, mininterval=1, unit="epoch")
    names = {}
    for row in rows:
        made = None if callable(sets[row]) else sets[row]
        names[row] = row if made is None else f"{row} {digest(*made)[:12]}"  # another set by this name: another row
        for run in range(recipe.runs):
            bar.set_postfix_str(row)
            if scored.has(names[row], run):
                bar.update(recipe.epochs)
                continue
            pixels, y = sets[row](run) if made is None else made
            x = Inputs(pixels, data.mean, data.std, None, device, 0.0, spare)
            (key, order), labels = views_key(recipe, seed, run), teacher
            if recipe.labels == "stored" and row in stored:
                labels = StoredLabels(stored[row], x, recipe, *key, teacher=teacher)
            with seeded("student", seed, run):  # the run-th student of every row starts alike
                net = make_student().to(device)
            best = [0.0]

            def after(done: int, student: nn.Module, best=best) -> None:
                bar.update()
                if published and is_scored(done, recipe):
                    best.append(prefix_maximum(hits(student, test, data.y_test)))

            student = post_train(net, x, y, labels, recipe, *key, order=order, after=after)
            scores = {"student": float(hits(student, test, data.y_test).float().mean())}
            scored.add(names[row], scores | ({"published_metric": max(best)} if published else {}))
    bar.close()
    return {row: summarise(scored.rows[names[row]][: recipe.runs]) for row in rows}


def predict_seconds(
    sizes: dict[str, int],
    data: Data,
    make_student: Callable[[], nn.Module],
    teacher: nn.Module,
    device: torch.device,
    recipe: SoftRecipe,
    published: bool = False,
    stored: tuple[str, ...] = (),
) -> float:
    """Seconds that evaluate_soft will take over the rows of `sizes`, {row: images}; stored: rows with labels in files.

    One update and one pass of BLOCK images are timed, on blank images.
    """
    with seeded("predict seconds"):
        net = make_student().to(device)
    blank = torch.zeros(BLOCK, data.channels, data.size, data.size, device=device)
    test = as_inputs(blank)
    image = seconds_of(lambda: hits(net, test, torch.zeros(BLOCK)), device) / BLOCK
    evaluations = 1 + (sum(is_scored(done + 1, recipe) for done in range(recipe.epochs)) if published else 0)
    updates, total = {}, 0.0
    for row, n in sizes.items():
        batch, read = min(n, recipe.batch), recipe.labels == "stored" and row in stored
        if (batch, read) not in updates:
            x = torch.zeros(batch, data.channels, data.size, data.size, device=device)
            y = torch.zeros(batch, dtype=torch.int64)
            zeros = torch.zeros(batch, data.num_classes, device=device)
            labels = (lambda mixed, epoch, index, zeros=zeros: zeros) if read else teacher
            once = replace(recipe, epochs=1)
            fit = lambda x=x, y=y, labels=labels, once=once: post_train(net, x, y, labels, once, "predict")  # noqa: E731
            updates[batch, read] = seconds_of(fit, device)
        of_epochs = recipe.epochs * n / batch * updates[batch, read]
        total += recipe.runs * (of_epochs + evaluations * image * len(data.x_test))
    return total


def table(results: dict[str, dict[str, dict]], caption: str) -> str:
    """The rows as text, in per cent, mean ± std; the published metric is named for what it is."""
    words = dict(student="student", published_metric="prefix maximum")
    renamed = {row: {words[column]: value for column, value in scores.items()} for row, scores in results.items()}
    return common.students.table(renamed, caption)
