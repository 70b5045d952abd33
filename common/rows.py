"""The rows of the evaluator's table: the sets it was given, and their neighbours, as what networks are trained on.

A neighbour has as many images as the set it stands beside, the same kind of targets (NAME:KIND takes another) and the
same schedule. Names:
  none            no images: an untrained network
  gaussian        noise
  random          real training images, drawn anew for every network
  kmeans          those nearest to the centres of k-means clusters of the teacher's features, anew for every network
  kmeans_pixels   the same of pixels
  herding         those whose mean of the teacher's features comes closest to the mean of all
  high_loss       those of the highest loss of networks trained on all of them
  dm, dsa         distilled by distribution and by gradient matching (with hard labels, unless told otherwise)
  all_real        all training images, for as many updates
  teacher         the teacher's own features (probe and knn)
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from common import baselines
from common.artefact import Distilled, fit_pairs
from common.augment import upload
from common.data import Data, Inputs, Zca, denormalise, normalise
from common.models import FREPO_STUDENTS, RESNETS, ConvNet, ResNet, convnet_depth, frepo_student, pair_net
from common.pairs import Protocol
from common.protocols import LabelRecipe, fit_labels, without_flip
from common.relabel import SoftRecipe, StoredLabels, digest, net_digest, post_train, views_key
from common.run import UserError, rng, seeded, write_atomic
from common.students import STEPS, Recipe, fit_student, student_steps
from common.teacher import Rescale, Teacher, classifier

NEIGHBOURS = ("none", "gaussian", *baselines.SUBSETS, *baselines.MATCHED, "all_real", "teacher")
SPARE = 4 << 30  # bytes left free on a CUDA device where images are kept there
FREPO_DSA = "flip_color_crop_rotate_translate_cutout"  # FRePo's own, where a set does not say
WIDTHS = {2: (128, 256), 3: (128, 256, 512), 4: (64, 128, 256, 512), 5: (32, 64, 128, 256, 512)}


# ------------------------------------------------------------------------------------------------------------ the sets


@dataclass
class Entry:
    """A set that is scored. source: the data it was distilled from; teacher: whose features or labels it has."""

    name: str
    path: Path
    distilled: Distilled
    kind: str  # of protocols.KINDS
    seed: int
    runs: int
    device: torch.device
    widths: tuple[int, ...]
    norm: str
    recipes: dict[str, Protocol | Recipe | LabelRecipe | SoftRecipe]  # by kind
    load_source: Callable[[], Data]
    load_teacher: Callable[[], Teacher]
    high_loss: dict  # networks, epochs
    matching: dict[str, baselines.DM | baselines.DSA]
    cache_gb: float
    folder: Path  # where sets that are made here are kept
    full_epochs: int | None = None  # of networks trained on all real images with hard labels
    uses: Protocol = field(default_factory=Protocol)  # probes and fine-tuning, of all sets of a table alike
    uses_at: set[str | None] = field(
        default_factory=set
    )  # contents of the data that a recorded fine-tuning length is for

    @cached_property
    def source(self) -> Data:
        return self.load_source()

    @cached_property
    def teacher(self) -> Teacher:
        return self.load_teacher()

    @cached_property
    def teacher_net(self) -> nn.Module:
        """Normalised images -> logits of the labelling teacher."""
        if self.teacher.fc is None:
            raise UserError(
                f"{self.path}: its teacher {self.teacher.name} has no classifier; give --teacher one that has"
            )
        constants = self.distilled.mean, self.distilled.std
        rescale = Rescale(*constants, self.teacher)  # as scdd.py's students see it
        return nn.Sequential(rescale, classifier(self.teacher, self.teacher.fc)).to(self.device).eval()

    @cached_property
    def finds_teacher(self) -> bool:
        """Whether the teacher is at hand; a line says so if not."""
        try:
            return self.teacher is not None
        except UserError as error:
            print(f"without the match to the teacher: {error}")
            return False

    @cached_property
    def teacher_facts(self) -> list:
        """All that its features and labels depend on."""
        teacher = self.teacher
        fc = None if teacher.fc is None else net_digest(teacher.fc)
        return [teacher.name, net_digest(teacher.net), fc, teacher.mean.tolist(), teacher.std.tolist()]

    @cached_property
    def zca(self) -> Zca | None:
        """The whitening, on the CPU; it cannot be undone, which nothing here asks for."""
        if self.distilled.zca is None:
            return None
        return Zca(self.distilled.zca_mean, self.distilled.zca, torch.empty(0))

    @cached_property
    def targets(self) -> Tensor:
        """(N, d) the teacher's features of the source's training images, on the CPU."""
        data = self.source
        return self.teacher.cached_targets(data.x_train, data.content, "train", self.device)

    @cached_property
    def train(self) -> Inputs:
        """What networks see of the source's training images, whitened as they are drawn."""
        return self.inputs(self.source.x_train, self.source, 0.0)

    @property
    def source_content(self) -> str | None:
        """The hash of the data it was distilled from, where it says so."""
        return self.distilled.meta.get("content")

    @property
    def n(self) -> int:
        """Images that networks are trained on, decoded where they are stored as a code."""
        return len(self.distilled.x)

    @property
    def count(self) -> int:
        """Images of a neighbour: as many, or for a code as its storage would hold, rounded up (boost_pca.py's rows)."""
        storage, budget = self.distilled.meta.get("storage"), self.distilled.meta.get("budget", {})
        if self.distilled.code is None or not storage:
            return self.n
        worth = math.ceil(storage["pairs" if budget.get("rule", "pairs") == "pairs" else "pixels"])
        return min(worth, len(self.source.x_train))

    @property
    def classes(self) -> int:
        """Of the set's labels; of a set of features: of its source, 0 without labels."""
        return self.source.num_classes if self.kind == "features" else self.distilled.y.shape[1]

    def inputs(self, x: Tensor, data: Data, gigabytes: float) -> Inputs:
        """Images of `data`, by its constants, with this set's whitening where it has one; gigabytes: of those kept."""
        return Inputs(x, data.mean, data.std, self.zca, self.device, gigabytes, SPARE)

    def prepare(self) -> Callable[[Tensor], Tensor]:
        """Of normalised images on the device: the whitening, where there is one."""
        zca = self.zca and self.zca.to(self.device)
        return zca.whiten if zca else lambda x: x


def kind_of(distilled: Distilled) -> str:
    """How networks are to be trained on a set, from what its file says of it: see common/protocols.py."""
    if distilled.y_is == "teacher features":
        return "features"
    if distilled.y_is == "class labels":
        return "labels"
    return "soft" if "mix" in distilled.recipe else "scores"


def recipe_of(default, recorded: dict, flags):
    """`default` with the values that the set's file recorded, and over those the flags that were given."""
    known = {field.name for field in fields(default)}
    given = {name: value for name, value in asdict(flags).items() if value is not None}
    return replace(default, **{name: value for name, value in recorded.items() if name in known} | given)


def recipes_for(distilled: Distilled, kind: str, data_flips: bool, flags: dict) -> dict:
    """The schedule of each kind: the set's own where its file has one, else the published one; flags win.

    flags: {"transfer", "scores", "soft", "labels": dataclasses, None where nothing was given}.
    """
    own = {each: distilled.recipe if each == kind else {} for each in ("features", "scores", "soft")}
    steps = student_steps(len(distilled.x), STEPS)
    operations = without_flip(FREPO_DSA, data_flips)
    operations = operations if distilled.channels > 1 else operations.replace("color_", "")
    return {
        "features": recipe_of(Protocol(), own["features"], flags["transfer"]),
        "scores": recipe_of(Recipe(steps=steps, dsa=operations), own["scores"], flags["scores"]),
        "soft": recipe_of(SoftRecipe(flip=data_flips), own["soft"], flags["soft"]),
        "labels": replace(flags["labels"], dsa=without_flip(flags["labels"].dsa, data_flips)),
    }


# ------------------------------------------------------------------------------------------------------------ networks


class SoftStudent(ResNet):
    """scdd.py's student: a ResNet with a CIFAR or ImageNet stem of padding 1, and a linear head."""

    def __init__(self, arch: str, channels: int, size: int, out: int, width: int):
        stem = "cifar" if size <= 96 else "imagenet"
        super().__init__(arch, channels, width, stem, 1)
        self.head = nn.Linear(self.dim, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def own_models(entry: Entry) -> tuple[str, ...]:
    """The networks that a set's script scored it by; ConvNets where its file does not say."""
    meta = entry.distilled.meta
    if "eval_arch" in meta:
        return (f"scdd_{meta['eval_arch']}",)
    if entry.kind == "scores":
        names = meta.get("eval_models", ["conv"])
        return tuple(name if name.startswith("frepo_") else f"frepo_{name}" for name in names)
    return ("dc_convnet",) if entry.kind == "labels" else ("convnet",)


def frepo_name(model: str) -> str:
    """frepo_NAME as frepo_student knows it: two of its names begin so themselves."""
    return model if model in FREPO_STUDENTS else model.removeprefix("frepo_")


def make_network(model: str, entry: Entry, out: int) -> nn.Module:
    """A fresh network for the set's images, with dim, head, features and forward; from torch's global generator.

    model: a name of pair_net; frepo_NAME, of FRePo's evaluation networks; scdd_ARCH, scdd.py's student; dc_convnet, the
    ConvNet of DC, DSA, DM and MTT: 128 channels a block and instance norm. Raises UserError for any other.
    """
    channels, size = entry.distilled.channels, entry.distilled.size
    if model == "dc_convnet":
        return ConvNet(channels, size, out, (128,) * convnet_depth(size), "instance")
    if model.startswith("scdd_"):
        if model[5:] not in RESNETS:
            raise UserError(f"--models {model}: not one of {', '.join(f'scdd_{arch}' for arch in RESNETS)}")
        return SoftStudent(model[5:], channels, size, out, entry.distilled.meta.get("eval_width", 64))
    if model.startswith("frepo_"):
        return frepo_student(frepo_name(model), channels, size, out, entry.widths, flag="--models frepo_...")
    return pair_net(model, channels, size, out, entry.widths, entry.norm, flag="--models")


# ------------------------------------------------------------------------------------------------------------ the rows


@dataclass
class Row:
    """A line of the table. draw: number of the network -> (network inputs (n, C, H, W), y) on the CPU or the device; of
    kind soft (pixels, classes). Of all_real the images are an Inputs. plain: normalised images without the whitening.
    """

    name: str
    entry: Entry
    kind: str  # of protocols.KINDS, or "none", "teacher"
    draw: Callable[[int], tuple[Tensor | Inputs, Tensor]] | None
    plain: Callable[[int], Tensor] | None
    facts: dict  # all that the row depends on beside the model and the number of the network
    n: int
    storage_bytes: int
    beside: dict[str, "Row"] = field(default_factory=dict)  # of a set: its neighbours by name
    word: str = ""  # what the row was asked for by, or the set's method: of a table's known rows

    def __post_init__(self):
        own = self.facts["row"] == "set" and self.kind == self.entry.kind
        self.word = self.entry.distilled.method if own else self.name

    @property
    def out(self) -> int:
        """Outputs of the networks."""
        kind = self.entry.kind if self.kind == "none" else self.kind
        return self.entry.distilled.y.shape[1] if kind == self.entry.kind else self.width(kind)

    def width(self, kind: str) -> int:
        return self.entry.teacher.dim if kind == "features" else self.entry.classes


def frepo_labels(y: Tensor, classes: int) -> Tensor:
    """FRePo's labels of real images, as its distilled ones start: centred, over sqrt(C / 10). (n,) -> (n, C)"""
    return (F.one_hot(y, classes).float() - 1 / classes) / (classes / 10) ** 0.5


def own_row(entry: Entry, kind: str | None = None) -> Row:
    """The set itself; kind "labels": by the classes its labels are highest for."""
    distilled, kind = entry.distilled, kind or entry.kind
    y = distilled.y if kind in ("features", "scores") else distilled.y.argmax(1)
    if kind != entry.kind and (entry.kind == "features" or kind != "labels"):
        raise UserError(f"{entry.name}:{kind}: the set has {distilled.y_is}; only labels can be made of class scores")
    inputs = distilled.x if kind == "soft" else distilled.inputs()
    name = entry.name if kind == entry.kind else f"{entry.name}:{kind}"
    stored = entry.path.parent / "labels.safetensors"  # other labels, where they are there: see fit_soft
    facts = dict(row="set", set=digest(distilled.inputs(), distilled.y), kind=kind)
    facts |= dict(stored=kind == "soft" and stored.exists() and stored.stat().st_size)
    size = distilled.meta.get("storage_bytes", distilled.x.nbytes + distilled.y.nbytes)
    size += distilled.meta.get("label_bytes", 0) + distilled.meta.get("zca_bytes", 0)
    plain = lambda run: normalise(distilled.x, distilled.mean, distilled.std)  # noqa: E731
    return Row(name, entry, kind, lambda run: (inputs, y), plain, facts, entry.n, size)


def neighbour(word: str, entry: Entry) -> Row:
    """The row that `word`, NAME or NAME:KIND, stands for beside a set. Raises UserError if it cannot be."""
    name, _, kind = word.partition(":")
    if name not in NEIGHBOURS:
        raise UserError(f"--neighbours {name}: not one of {', '.join(NEIGHBOURS)}")
    kind = kind or ("labels" if name in baselines.MATCHED else entry.kind)
    if kind not in entry.recipes:
        raise UserError(f"--neighbours {word}: give {name}:KIND with one of {', '.join(entry.recipes)}")
    shape = tuple(entry.distilled.x.shape[1:])
    facts = dict(row=name, kind=kind, seed=entry.seed, shape=shape)
    facts |= dict(whitened=None if entry.zca is None else digest(entry.zca.matrix, entry.zca.mean))
    if name == "none":
        return Row(word, entry, "none", None, None, facts, 0, 0)
    source = entry.source
    facts |= dict(n=entry.count, source=source.content, constants=[source.mean.tolist(), source.std.tolist()])
    if kind != "features" and not source.labelled:
        way = "leave it out" if name in baselines.MATCHED else f"give {name}:features"
        raise UserError(f"--neighbours {word}: {source.name} has no labels; {way}")
    if kind == "soft":
        facts |= dict(seen_by=[entry.distilled.mean.tolist(), entry.distilled.std.tolist()])
    if kind in ("features", "soft") or name in ("kmeans", "herding", "teacher"):
        facts |= dict(teacher=entry.teacher_facts)
    if name == "teacher":
        return Row(word, entry, "teacher", None, None, facts, 0, 0)
    image, total = source.x_train[0].numel(), len(source.x_train)
    width = entry.teacher.dim if kind == "features" else entry.classes if kind == "scores" else 2  # a label: 8 bytes
    if name == "all_real":
        facts |= dict(full_epochs=entry.full_epochs if kind == "labels" else None)

        @lru_cache(maxsize=1)
        def everything() -> tuple[Tensor | Inputs, Tensor]:
            images = source.x_train if kind == "soft" else entry.inputs(source.x_train, source, entry.cache_gb)
            return images, targets_of(entry, kind, torch.arange(total))

        return Row(word, entry, kind, lambda run: everything(), None, facts, total, total * (image + 4 * width))
    if name == "gaussian" or name in baselines.MATCHED:
        drawn = noise(entry) if name == "gaussian" else made(name, entry)
        facts |= {} if name == "gaussian" else dict(matching=asdict(entry.matching[name]))
        plain = lambda run: drawn(run)[0]  # noqa: E731
        draw = lambda run: of_made(entry, kind, *drawn(run))  # noqa: E731
        image *= 4
    else:
        if name == "high_loss":
            facts |= entry.high_loss | dict(widths=entry.widths, norm=entry.norm)
        chosen = lru_cache(maxsize=1)(chooser(name, kind, entry))
        draw = lambda run: of_real(entry, kind, chosen(run))  # noqa: E731
        plain = lambda run: normalise(source.x_train[chosen(run)], source.mean, source.std)  # noqa: E731
    return Row(word, entry, kind, draw, plain, facts, entry.count, entry.count * (image + 4 * width))


def per_class_of(entry: Entry) -> int:
    """Images of each class in the set's number. Raises UserError if that is no whole number."""
    if not entry.classes:
        raise UserError(f"{entry.name}: {entry.source.name} has no labels, which DM and DSA need; leave these out")
    if entry.count % entry.classes:
        raise UserError(f"{entry.name}: {entry.count} images are not equally many of {entry.classes} classes, as DM "
                        "and DSA make them; leave these out")  # fmt: skip
    return entry.count // entry.classes


def targets_of(entry: Entry, kind: str, index: Tensor) -> Tensor:
    """What networks learn of real training images at these indices: features (n, d), scores (n, C) or classes (n,)."""
    return entry.targets[index] if kind == "features" else of_classes(entry, kind, entry.source.y_train[index])


def of_classes(entry: Entry, kind: str, y: Tensor) -> Tensor:
    return frepo_labels(y, entry.classes) if kind == "scores" else y


def of_real(entry: Entry, kind: str, index: Tensor) -> tuple[Tensor, Tensor]:
    """(images, y) of real training images, as Row.draw gives them."""
    images = entry.source.x_train[index] if kind == "soft" else entry.train(index)
    return images, targets_of(entry, kind, index)


def of_made(entry: Entry, kind: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(images, y) of made images, as Row.draw gives them. x: (n, C, H, W) normalised; y: (n,) their classes."""
    pixels = denormalise(x, entry.source.mean, entry.source.std)
    if kind == "soft":
        return pixels, y
    inputs = entry.prepare()(x.to(entry.device))
    return inputs, entry.teacher.targets(pixels, entry.device) if kind == "features" else of_classes(entry, kind, y)


def noise(entry: Entry) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Number of the network -> (normalised noise images, classes in turn): Evaluate's departure 3."""
    shape, classes = (entry.count, *entry.distilled.x.shape[1:]), max(1, entry.classes)
    y = torch.arange(entry.count) * classes // entry.count  # class after class
    return lambda run: (baselines.gaussian(shape, "gaussian", entry.seed, run), y)


def chooser(name: str, kind: str, entry: Entry) -> Callable[[int], Tensor]:
    """Number of the network -> indices (n,) of real training images; as many of each class unless of features."""
    data = entry.source
    balanced = kind != "features" and entry.count % entry.classes == 0
    if name == "random":
        if kind != "features" and entry.kind != "features" and not balanced:
            return lambda run: as_many_of_each(entry, run)
        y = data.y_train if balanced else None
        return lambda run: baselines.random_subset(y, len(data.x_train), entry.count, entry.seed, run)

    if kind != "features" and not balanced:
        print(f"{name}: {entry.count} images are not equally many of {entry.classes} classes: chosen from all images")

    @lru_cache(maxsize=1)
    def fixed() -> tuple[Tensor | None, Tensor | None]:
        """(features, losses) of all training images, where they are asked for."""
        # Evaluate's departure 4: KRR-ST does not say whose features its k-means are of
        features = entry.targets if name in ("kmeans", "herding") else None
        losses = None
        if name == "high_loss":
            y = entry.targets if kind == "features" else data.y_train
            out = entry.targets.shape[1] if kind == "features" else data.num_classes
            make = lambda: ConvNet(data.channels, data.size, out, entry.widths, entry.norm)  # noqa: E731
            settings = [kind, entry.teacher_facts if kind == "features" else None, entry.widths, entry.norm]
            settings += [data.content, data.mean.tolist(), data.std.tolist(), entry.seed, entry.high_loss]
            losses = kept_file(entry.folder, "high_loss", settings, lambda: baselines.real_losses(
                data.x_train, y, data, make, entry.device, entry.seed, **entry.high_loss))  # fmt: skip
        return features, losses

    if name.startswith("kmeans"):  # anew for every network
        return lambda run: baselines.subset_of(name, data, entry.count, balanced, *fixed(), entry.seed, run)
    once = cache(lambda: baselines.subset_of(name, data, entry.count, balanced, *fixed(), entry.seed))
    return lambda run: once()


def as_many_of_each(entry: Entry, run: int) -> Tensor:
    """Indices (n,) of random training images, as many of each class as the set has, which are not equally many."""
    y, wanted = entry.source.y_train, entry.distilled.y.argmax(1).bincount(minlength=entry.classes)
    order = torch.randperm(len(y), generator=rng("random real", entry.seed, run))
    chosen = [order[y[order] == label][:most] for label, most in enumerate(wanted.tolist())]
    if lacking := [label for label, most in enumerate(wanted.tolist()) if len(chosen[label]) < most]:
        raise UserError(f"random: {entry.source.name} has fewer images of class {lacking[0]} than {entry.name}")
    return torch.cat(chosen)


def kept_file(folder: Path, name: str, facts: list | dict, make: Callable[[], Tensor]) -> Tensor:
    """The tensor that `make` returns, from a file of the folder where it was made by the same facts before."""
    key = json.dumps(facts, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    try:
        return load_file(path)["x"]
    except (OSError, SafetensorError, KeyError):  # none yet
        pass
    began, x = time.monotonic(), make()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda tmp: save_file({"x": x.contiguous()}, tmp, metadata={"facts": key}))
    print(f"{name}: made in {time.monotonic() - began:.0f} s, kept in {path}")
    return x


def made(name: str, entry: Entry) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Number of the network -> (normalised images, classes) of one set by DM or DSA, made once and kept in a file."""
    data, settings, ipc = entry.source, entry.matching[name], per_class_of(entry)
    method = {"dm": baselines.dm, "dsa": baselines.dsa_matching}[name]
    facts = dict(settings=asdict(settings), ipc=ipc, seed=entry.seed, content=data.content)
    facts |= dict(constants=[data.mean.tolist(), data.std.tolist()])

    def distil() -> Tensor:
        with tqdm(total=settings.iterations, desc=name, leave=False, mininterval=1, dynamic_ncols=True) as bar:

            def after(done: int, loss: float) -> None:
                bar.update(done - bar.n)
                bar.set_postfix_str(f"loss {loss:.4g}")

            return method(data, ipc, entry.device, settings, entry.seed, after=after)

    y = torch.arange(entry.classes).repeat_interleave(ipc)
    get = cache(lambda: kept_file(entry.folder, f"{name}-{ipc}", facts, distil))
    return lambda run: (get(), y)


# ------------------------------------------------------------------------------------------------------------ training


def trained(row: Row, model: str, run: int) -> nn.Module:
    """The run-th network of a row, trained on it by the schedule of its kind (untrained for "none"), on the device.

    The run-th networks of all rows start alike, as do those of the scripts: equal keys, equal scores.
    """
    entry, device, seed = row.entry, row.entry.device, row.entry.seed
    start = ("evaluation network", seed, run)
    if model.startswith("frepo_"):
        start = ("student", frepo_name(model), seed, run)
    elif model.startswith("scdd_"):
        start = ("student", seed, run)
    with seeded(*start):
        net = make_network(model, entry, row.out).to(device)
    if row.kind == "none":
        return net
    recipe = entry.recipes[row.kind]
    images, y = row.draw(run)
    if row.kind == "features":
        sgd = dict(batch=recipe.batch, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        sgd["steps"] = recipe.epochs * -(-entry.n // recipe.batch)  # of all rows, all real images too
        if isinstance(images, Inputs):
            fit_pairs(net, torch.arange(len(images)), y, seed, run, prepare=images, **sgd)
        else:
            fit_pairs(net, images.to(device), y.to(device), seed, run, **sgd)
    elif row.kind == "soft":
        net = fit_soft(net, row, recipe, images, y, run)
    else:
        at = images if isinstance(images, Inputs) else on_device(images.to(device))
        if row.kind == "scores":
            fit_student(net, at, y.to(device), recipe, seed, run)
        else:
            steps = recipe.epochs * -(-entry.n // recipe.batch)
            if row.facts["row"] == "all_real" and entry.full_epochs:
                steps = entry.full_epochs * -(-len(y) // recipe.batch)
            fit_labels(net, at, y.to(device), recipe, steps, seed, run)
    return net


def on_device(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Places -> images, of images that lie on the device."""
    return lambda index: x[upload(index, x.device)]


def fit_soft(net: nn.Module, row: Row, recipe: SoftRecipe, pixels: Tensor, y: Tensor, run: int) -> nn.Module:
    """As scdd.py's evaluation: the labels beside the set's file where they were stored, else the teacher's own."""
    entry = row.entry
    x = Inputs(pixels, entry.distilled.mean, entry.distilled.std, None, entry.device, 0.0, SPARE)
    if len(pixels) > entry.n:  # all real images, for as many updates
        share = entry.n / len(pixels)
        epochs = max(1, round(recipe.epochs * share))
        recipe = replace(recipe, epochs=epochs, warm_up=min(int(recipe.warm_up * share), epochs - 1), labels="online")
    key, order = views_key(recipe, entry.seed, run)
    labels, path = entry.teacher_net, entry.path.parent / "labels.safetensors"
    if recipe.labels == "stored" and row.facts["row"] == "set" and path.exists():
        labels = StoredLabels(path, x, recipe, *key, teacher=entry.teacher_net)
    return post_train(net, x, y, labels, recipe, *key, order=order)
