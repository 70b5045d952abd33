"""Score any distilled set, ours or another project's, under any protocol, beside its honest neighbours.

    python -m common.evaluate runs/.../distilled.safetensors                     # as its own script scores it
    python -m common.evaluate SET --protocol probe finetune --data cifar10 path/to/folder --models convnet vgg11
    python -m common.evaluate SET --table 1                                      # KRR-ST's seven targets
    python -m common.evaluate --report runs/...                                  # one page of what runs have made

Every row (a set, or a neighbour: common/rows.py) is a training set for --runs networks of each of --models; each is
trained once by the schedule of its kind and then used on every target under every protocol (common/protocols.py). A use
is a cell of the table, scored at the last step on all test images and kept in the run's folder as soon as it is done:
--resume RUN_DIR computes what is missing, also for more rows, targets, protocols, models or networks than before.
Cells are spread over processes by `torchrun --nproc-per-node 4 -m common.evaluate ...`.
"""

import copy
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from common import baselines
from common.artefact import Distilled
from common.augment import dsa_strategy
from common.baselines import DM, DSA
from common.data import Data, Inputs, describe, hold_out, load
from common.exchange import FEATURES, SCORES, load_any
from common.models import PAIR_NETS, convnet_depth
from common.pairs import Protocol, finetune, matching_error, probes, summarise
from common.pretrain import train_supervised
from common.protocols import (
    KINDS,
    LONG,
    SHARES,
    KdRecipe,
    LabelRecipe,
    distil_knowledge,
    embed,
    knn_of,
    neighbours_vote,
    probe,
    test_accuracy,
    without_flip,
)  # fmt: skip
from common.relabel import SoftRecipe, check_recipe, net_digest
from common.report import command, write_report
from common.results import FULL, RANKED, TABLES, Results, against_random, krr_st_table, ranking_of, tables
from common.rows import (
    NEIGHBOURS,
    WIDTHS,
    Entry,
    Row,
    kind_of,
    make_network,
    neighbour,
    on_device,
    own_models,
    own_row,
    recipe_of,
    recipes_for,
    trained,
)  # fmt: skip
from common.run import (
    Run,
    UserError,
    check_limits,
    cli,
    commit,
    device_words,
    first_line,
    new_folder,
    peak_memory,
    pick_device,
    rng,
    seeded,
    versions,
    write_atomic,
    write_json,
)  # fmt: skip
from common.sets import NAMED, NO_FLIP
from common.students import Recipe, score_student
from common.teacher import Rescale, Teacher, classifier, load_classifier, load_teacher


def optional(kind: type, *leave: str) -> type:
    """`kind` with None as every default, for flags that win over what a set's file says; help gives the defaults."""
    flags = []
    for each in fields(kind):
        if each.name not in leave:
            default = f"{each.default}" if each.default is not each.default_factory else "by the number of images"
            words = f"None: as the set's file says, else {default}"
            flags.append((each.name, Annotated[each.type | None, tyro.conf.arg(help=words)], None))
    return make_dataclass(f"{kind.__name__}Flags", flags, namespace=dict(__module__=__name__))


TransferFlags = optional(Protocol, "runs")
ScoresFlags = optional(Recipe, "runs")
SoftFlags = optional(SoftRecipe, "runs")


@dataclass
class Args:
    artefacts: tyro.conf.Positional[tuple[str, ...]] = ()
    """sets to score: distilled.safetensors of a run, its folder, or another project's files (see README)"""
    report: tuple[str, ...] = ()
    """run folders to write one HTML page about, into the first of them, instead of scoring anything"""

    # what is scored on what
    protocol: tuple[Literal["scratch", "probe", "finetune", "knn", "kd"], ...] = ()
    """scratch: networks trained on the set alone, on test images of its classes; probe, finetune, knn: of networks
    pretrained on the set, on the target; kd: a classifier of the target taught to them on the set's images alone.
    None given: scratch for sets with labels, probe for sets of features"""
    data: tuple[str, ...] = ()
    """targets: names of data sets or folders, loaded at the set's size; none given: what the set was distilled from"""
    targets: Literal["full"] | None = None
    """full: KRR-ST's seven targets, beside those of --data"""
    table: Literal[1, 2, 3] | None = None
    """print rows and columns as KRR-ST's table of this number does (fine-tuned ConvNets, 3 networks); --data takes the
    place of its targets, --neighbours of the rows that are made here"""
    models: tuple[str, ...] = ("own",)
    """own: what the set's script scored it by; convnet, vgg11, alexnet, mobilenet, resnet10, resnet18, vit (KRR-ST's
    variants), timm:NAME, dc_convnet (128 channels, instance norm), frepo_NAME (FRePo's evaluation networks)"""
    neighbours: tuple[str, ...] | None = None
    """rows beside the sets: none, gaussian, random, kmeans, kmeans_pixels, herding, high_loss, dm, dsa, all_real,
    teacher, or NAME:KIND with features, scores, labels or soft as the kind of targets; None: none random"""
    ranking: bool = False
    """hard-label recovery and improvement over random of each set with labels (protocol scratch), with their rows"""
    runs: int | None = None
    """networks of each row and model; None: as the set's file says, else 5"""
    seed: int | None = None
    """of networks, batches and drawn images; None: the set's own"""
    widths: tuple[int, ...] | None = None
    """channels of the ConvNet's blocks, the first scales the other networks; None: as the set's file says, else the
    published ones"""
    norm: Literal["batch", "instance", "none"] | None = None
    """of the ConvNet; None: as the set's file says, else batch"""

    # the sets
    source: str | None = None
    """what the sets were distilled from, a name or a folder; None: as the set's run or file says"""
    in_form: Literal["auto", "ours", "krr_st", "mtt", "dc", "folder", "npz", "ddranking"] = "auto"
    """of the sets' files; auto: recognised"""
    space: Literal["normalised", "whitened", "pixels"] | None = None
    """what the numbers of another project's images are; None: as its form has them"""
    mean: tuple[float, ...] | None = None
    """what another project's images were normalised by; None: the source's"""
    std: tuple[float, ...] | None = None
    """likewise"""
    y_is: Literal["features", "scores"] | None = None
    """what another project's targets are, where their width does not say it"""
    experiment: int = 0
    """of a DC file with several"""
    size: int | None = None
    """side of the images of another project's sets; None: the source's usual one"""
    channels: Literal["auto", "rgb", "grey"] = "auto"
    """of the images of another project's sets; auto: the source's"""
    y: Literal["own", "labels", "soft"] = "own"
    """how networks are trained on the sets; own: as the file says (labels: on their highest class; soft: on --teacher's
    labels of augmented views)"""
    teacher: str | None = None
    """of the sets' targets or labels: a file, torchvision:NAME or timm:NAME; None: the one the set's file names, looked
    for in teachers/ beside its run and in --out-dir"""
    stem_padding: int = 2
    """of a --teacher file whose stem is 3x3"""

    # where it runs
    data_dir: str = "data"
    """where public sets are downloaded to and decoded folders are cached"""
    resize: Literal["squash", "crop"] | None = None
    """of targets that are photographs of all shapes; None: as the set's"""
    out_dir: str = "runs"
    """run folders go here; teachers are looked for and trained in its teachers/"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    resume: str | None = None
    """folder of an evaluation to go on with; finished cells are not computed again"""
    cache_gb: float = 4.0
    """gigabytes for features of a training set, and for whitened images"""

    # schedules, published ones as defaults
    transfer: TransferFlags = field(default_factory=TransferFlags)
    """pretraining on features (epochs to weight_decay), probes and fine-tuning: KRR-ST's; finetune_steps: 5000 on
    targets other than cifar10, cifar100 and tiny_imagenet"""
    scores: ScoresFlags = field(default_factory=ScoresFlags)
    """training on class scores: FRePo's"""
    soft: SoftFlags = field(default_factory=SoftFlags)
    """training on a teacher's labels of augmented views: SRe2L's and SC-DD's"""
    labels: LabelRecipe = field(default_factory=LabelRecipe)
    """training on hard labels: KRR-ST's for other methods' sets"""
    kd: KdRecipe = field(default_factory=KdRecipe)
    """distillation of knowledge: KRR-ST's Table 4"""
    kd_teacher: str = "train"
    """a file with a classifier of the target, or train one (a supervised ResNet, cached)"""
    kd_teacher_arch: Literal["resnet10", "resnet18", "resnet50"] = "resnet18"
    """the ResNet that is trained"""
    kd_teacher_width: int = 64
    """channels of its first stage"""
    kd_teacher_epochs: int = 200
    """of training it"""
    kd_teacher_batch: int = 128
    """of training it"""
    kd_teacher_lr: float = 0.1
    """of training it: SGD, a cosine to zero"""
    shares: tuple[float, ...] = SHARES
    """of the labels of each class, for the columns part_... of the probe; none given: without them"""
    full_epochs: int | None = None
    """of row all_real:labels on all real images; None: as many updates as the set's networks"""
    knn_k: int = 20
    """neighbours that vote"""
    knn_temperature: float = 0.07
    """their weights are exp(cosine / this)"""
    high_loss_networks: int = 5
    """networks whose loss ranks the images of row high_loss"""
    high_loss_epochs: int = 1
    """that they are trained for, on all real images"""
    dm: DM = field(default_factory=DM)
    """of row dm"""
    dsa: DSA = field(default_factory=DSA)
    """of row dsa"""


LIMITS = {(1, 1e6): "runs widths kd_teacher_width kd_teacher_epochs knn_k high_loss_networks high_loss_epochs"}
POSITIVE = dict(
    transfer="epochs batch probe_steps probe_batch few_draws finetune_steps finetune_batch", scores="steps batch",
    soft="epochs batch", labels="epochs batch", kd="epochs batch temperature", dm="iterations batch_real width",
    dsa="iterations outer batch_real batch_train width",
)  # fmt: skip
LIMITS |= {(2, 1e6): "kd_teacher_batch", (1e-3, 1e6): "knn_temperature", (0, 1e6): "cache_gb kd_teacher_lr"}


# ------------------------------------------------------------------------------------------------------ sets and data


def run_flags(path: Path) -> dict:
    """The flags of the run that a set lies in, {} for a set by itself."""
    try:
        flags = json.loads((path.parent / "args.json").read_text())
        own = ("data", "test_fraction", "split_seed", "skip_bad_images", "holdout")
        return flags if all(name in flags for name in own) and isinstance(flags["data"], str) else {}
    except (OSError, ValueError, TypeError):
        return {}


def source_of(distilled: Distilled | None, path: Path, args: Args) -> Data:
    """What a set was distilled from: --source, else its run's --data with that run's split, else what its file names.

    Raises UserError where that cannot be had, or where it is not the data that the set was made from.
    """
    flags = {} if args.source else run_flags(path)
    size = args.size if distilled is None else distilled.size
    options = dict(data_dir=args.data_dir, size=size, channels=args.channels)
    if distilled is not None:
        options["channels"] = "grey" if distilled.channels == 1 else "rgb"
        options["resize"] = distilled.resize if distilled.resize in ("squash", "crop") else "squash"
    name = args.source or flags.get("data") or (distilled.data if distilled else None)
    if name is None:
        raise UserError(f"{path}: name what it was distilled from: --source NAME or FOLDER")
    if name not in NAMED and not Path(name).is_dir():
        raise UserError(f"{path}: distilled from {name}, which is not here; give --source FOLDER, or --neighbours none "
                        "and targets by --data")  # fmt: skip
    if flags:
        options |= dict(test_fraction=flags["test_fraction"], seed=flags["split_seed"])
        options |= dict(skip_bad_images=flags["skip_bad_images"])
    data = load(name, **options)
    if flags.get("holdout"):
        data = hold_out(data, flags["holdout"], flags["split_seed"])[0]
    made_from = distilled.meta.get("content") if distilled is not None else data.content
    if made_from != data.content:
        contents = f"content {data.content[:8]}, not {str(made_from)[:8]}"
        words = f"{path}: {name} is not the data it was distilled from ({contents})"
        if not args.source:
            raise UserError(f"{words}; give --source")
        print(f"{words}: --source was given, so it is taken")
    return data if distilled is None else seen_by(distilled, data)


def seen_by(distilled: Distilled, data: Data) -> Data:
    """A set's own source by the constants the set is normalised by, which of another project's may be others."""
    return replace(data, mean=distilled.mean, std=distilled.std)


def find_teacher(
    distilled: Distilled, path: Path, kind: str, source: Data, device: torch.device, args: Args
) -> Teacher:
    """The teacher of a set: --teacher, else the one its file names, if its weights are the same. Raises UserError."""
    info = distilled.meta.get("label_teacher" if kind == "soft" else "teacher") or {}
    spec, name = args.teacher, info.get("name", "")
    if spec is None and name.startswith(("torchvision:", "timm:")):
        spec = name
    if spec is None and name:
        for parent in (*path.resolve().parents[1:4], Path(args.out_dir)):
            parent = parent / "teachers"
            if (parent / name / "teacher.safetensors").is_file():
                spec = str(parent / name)
                break
    if spec is None:
        named = f"its teacher {name} is not in a teachers/ folder near it" if name else "it names no teacher"
        raise UserError(f"{path}: {named}; give --teacher FILE, or leave out the rows that need one: --neighbours none")
    read = load_classifier if kind == "soft" else load_teacher
    teacher = read(spec, source, device, args.stem_padding, flag="--teacher")
    known, found = ((of.get("weights_sha256") or of.get("sha256")) for of in (info, teacher.info))
    if known and found != known:
        raise UserError(f"{path}: --teacher {spec} has other weights than the set's teacher {name}; give that one")
    if kind == "features" and teacher.dim != distilled.y.shape[1]:
        raise UserError(f"{path}: {distilled.y.shape[1]} target features, but {teacher.name} has {teacher.dim}; give "
                        "another --teacher")  # fmt: skip
    return teacher


def entry_of(spec: str, args: Args, device: torch.device) -> Entry:
    """A set as it is to be scored. Raises UserError for what cannot be read or lacks what --y asks for."""
    path = Path(spec)
    if path.is_dir() and (path / "distilled.safetensors").is_file():
        path = path / "distilled.safetensors"
    if not path.exists():
        raise UserError(f"{path}: no such set; name a file, or a run's folder")
    ours = path.suffix == ".safetensors"
    source = None if ours else source_of(None, path, args)
    constants = {name: torch.tensor(value) for name in ("mean", "std") if (value := getattr(args, name)) is not None}
    words = {"features": FEATURES, "scores": SCORES, None: None}
    distilled = load_any(
        path, source, form=args.in_form, space=args.space, experiment=args.experiment, y_is=words[args.y_is],
        data_dir=args.data_dir, **constants,
    )  # fmt: skip
    own = kind_of(distilled)
    kind = own if args.y == "own" else args.y
    if kind != own and own == "features":
        raise UserError(f"{path}: its y are {distilled.y_is}; --y {kind} does not go with that")
    if kind != own:  # the classes that the labels are highest for
        one_hot = torch.nn.functional.one_hot(distilled.y.argmax(1), distilled.y.shape[1]).float()
        distilled = replace(distilled, y=one_hot)
    get_source = cache(lambda: source_of(distilled, path, args) if source is None else seen_by(distilled, source))
    meta, depth = run_flags(path) | distilled.meta, convnet_depth(distilled.size)
    widths = args.widths or tuple(meta.get("widths") or WIDTHS[depth])
    if len(widths) != depth:
        raise UserError(f"--widths {' '.join(map(str, widths))}: {distilled.size} px images take {depth} blocks")
    flips = distilled.data.lower() not in NO_FLIP  # as common.data.load decides it
    matching = {name: replace(s, strategy=without_flip(s.strategy, flips))
                for name, s in dict(dm=args.dm, dsa=args.dsa).items()}  # fmt: skip
    flags = dict(transfer=args.transfer, scores=args.scores, soft=args.soft, labels=args.labels)
    return Entry(
        name=distilled.method,
        path=path,
        distilled=distilled,
        kind=kind,
        seed=distilled.seed if args.seed is None else args.seed,
        runs=args.runs or (3 if args.table else distilled.recipe.get("runs", 5)),
        device=device,
        widths=widths,
        norm=args.norm or meta.get("norm") or "batch",
        recipes=recipes_for(distilled, own, flips, flags),
        load_source=get_source,
        load_teacher=lambda: find_teacher(distilled, path, kind, get_source(), device, args),
        high_loss=dict(networks=args.high_loss_networks, epochs=args.high_loss_epochs),
        matching=matching,
        folder=Path(args.out_dir) / "sets",
        full_epochs=args.full_epochs,
        cache_gb=args.cache_gb,
    )  # fmt: skip


USED = [f.name for f in fields(Protocol) if f.name.startswith(("probe", "few", "finetune"))]  # after the training


def entries_of(args: Args, device: torch.device) -> list[Entry]:
    """The sets, with names that differ, to be used alike: by what their files say if they agree, else as published."""
    entries = [entry_of(spec, args, device) for spec in args.artefacts]
    if len({entry.widths for entry in entries}) > 1 and any(name in PAIR_NETS for name in args.models):
        found = ", ".join(f"{entry.path} {' '.join(map(str, entry.widths))}" for entry in entries)
        raise UserError(f"--models: the sets' files name ConvNets of several widths ({found}); give --widths for all")
    recorded = [{name: entry.distilled.recipe[name] for name in USED if name in entry.distilled.recipe}
                for entry in entries if entry.kind == "features"]  # fmt: skip
    agreed = recorded[0] if recorded and all(each == recorded[0] for each in recorded) else {}
    if recorded and not agreed:
        print("probes and fine-tuning: as published, the sets' files differ in them or do not say")
    for entry in entries:
        entry.uses = recipe_of(Protocol(), agreed, args.transfer)
        if args.transfer.finetune_steps is None and not agreed.get("finetune_steps"):
            entry.uses = replace(entry.uses, finetune_steps=None)
        entry.uses_at = {each.source_content for each in entries if each.kind == "features"}
    names = [entry.name for entry in entries]
    for number, entry in enumerate(entries):
        if names.count(entry.name) > 1:
            other = entry.path.resolve().parent.name
            entry.name = f"{entry.name} {number + 1} ({other})"
    return entries


def rows_of(entries: list[Entry], args: Args) -> list[Row]:
    """Neighbours first, each once however many sets it stands beside, then the sets with theirs in `beside`."""
    words = args.neighbours
    if words is None:
        listed = TABLES[args.table][2] if args.table else ("none", "random")
        made_here = [word for word in listed if word.partition(":")[0] in NEIGHBOURS]
        words = [word for word in made_here if word not in [entry.distilled.method for entry in entries]]
    neighbours, sets = {}, []
    for entry in entries:
        ranked = args.ranking and entry.kind != "features"
        row = own_row(entry)
        for word in dict.fromkeys((*words, *(RANKED if ranked else ()))):
            made = neighbour(word, entry)
            recipe = {} if made.kind in ("none", "teacher") else asdict(entry.recipes[made.kind])
            facts = [made.facts, recipe, entry.widths, entry.norm, entry.n, entry.runs, made.out]
            facts += [models_of(entry, args), entry.distilled.meta.get("eval_width")]
            row.beside[word] = neighbours.setdefault(json.dumps(facts), made)
        sets.append(row)
        if ranked and entry.kind in ("scores", "soft"):
            row.beside["hard"] = own_row(entry, "labels")
            sets.append(row.beside["hard"])
    rows = [*neighbours.values(), *sets]
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:  # beside different sets, or a set by the name of a neighbour
            row.name = f"{row.name} (the set)" if row.facts["row"] == "set" else f"{row.name} ({row.entry.name})"
    return rows


class Targets:
    """Target data by the size, channels and rule of a set, loaded once, with its network inputs and its classifier."""

    def __init__(self, args: Args, device: torch.device):
        self.args, self.device = args, device
        self.loaded, self.seen, self.teachers, self.named, self.features = {}, {}, {}, {}, {}

    def data(self, name: str, entry: Entry) -> Data:
        """name: "" for the set's own source."""
        if not name:
            return self.checked(entry.source, name)
        distilled = entry.distilled
        rule = self.args.resize or (distilled.resize if distilled.resize in ("squash", "crop") else "squash")
        key = (name, distilled.size, distilled.channels, rule)
        if key not in self.loaded:
            colour = "grey" if distilled.channels == 1 else "rgb"
            data = load(name, data_dir=self.args.data_dir, size=distilled.size, resize=rule, channels=colour)
            self.loaded[key] = self.checked(data, name)
            print(f"target: {describe(data)}")
        data = self.loaded[key]
        return seen_by(distilled, data) if data.content == entry.source_content else data

    def label(self, name: str, entry: Entry) -> str:
        """A target's name in the tables; of several by one name, with the folder."""
        data = self.data(name, entry)
        first = self.named.setdefault(data.name, (data.content, data.size))
        return data.name if first == (data.content, data.size) else f"{data.name} ({name or data.content[:8]})"

    def checked(self, data: Data, name: str) -> Data:
        if not data.labelled or data.num_classes < 2:
            raise UserError(f"--data {name or data.name}: a target needs labels of at least two classes")
        return data

    def inputs(self, name: str, entry: Entry, part: str) -> Inputs:
        """Network inputs of the target's training or test images, with the set's whitening.

        Whitened images are kept as far as --cache-gb goes for all targets together.
        """
        data = self.data(name, entry)
        constants = (tuple(data.mean.tolist()), tuple(data.std.tolist()))
        key = (data.content, data.size, part, id(entry.distilled.zca), constants)
        if key not in self.seen:
            room = self.args.cache_gb - sum(inputs.gigabytes for inputs in self.seen.values())
            self.seen[key] = entry.inputs(data.x_train if part == "train" else data.x_test, data, room)
        return self.seen[key]

    def embed(self, network: str, net: nn.Module, images: Inputs, index: Tensor | None = None) -> Tensor:
        """protocols.embed, whose result is kept for the other protocols of this network as far as --cache-gb goes."""
        if index is not None:
            return embed(net, images, index)
        self.features = {key: f for key, f in self.features.items() if key[0] == network}
        if (network, id(images)) not in self.features:
            f = embed(net, images)
            if f.nbytes + sum(kept.nbytes for kept in self.features.values()) > self.args.cache_gb * 1e9:
                return f
            self.features[network, id(images)] = f
        return self.features[network, id(images)]

    def classifier(self, name: str, entry: Entry) -> tuple[nn.Module, dict]:
        """Images by the target's constants -> logits of its classes, and what it is; trained if none is named.

        What the set's images are normalised by makes no difference here: student and teacher see the same numbers
        (KRR-ST's code), and the student is tested on numbers that the teacher was trained on.
        """
        data, args = self.data(name, entry), self.args
        key = (data.content, data.size, tuple(data.mean.tolist()), tuple(data.std.tolist()))
        if key not in self.teachers:
            if args.kd_teacher == "train":
                stem = "pad" if data.size < 48 else "resized"
                teacher = train_supervised(
                    data, Path(args.out_dir) / "teachers", self.device, arch=args.kd_teacher_arch,
                    width=args.kd_teacher_width, stem_padding=args.stem_padding, epochs=args.kd_teacher_epochs,
                    batch=args.kd_teacher_batch, lr=args.kd_teacher_lr, crop=stem, flag="kd-teacher",
                )  # fmt: skip
            else:
                teacher = load_classifier(args.kd_teacher, data, self.device, args.stem_padding, flag="--kd-teacher")
            rescale = Rescale(data.mean, data.std, teacher)  # a file's teacher may have other constants
            net = nn.Sequential(rescale, classifier(teacher, teacher.fc)).to(self.device).eval()
            facts = dict(name=teacher.name, weights=net_digest(net), accuracy=teacher.info.get("accuracy"))
            self.teachers[key] = net, facts
        return self.teachers[key]


# ------------------------------------------------------------------------------------------------------------ cells


@dataclass
class Cell:
    """One number of the table, or a few of one kind: a row's run-th network of a model, used on a target."""

    row: Row
    model: str
    run: int
    use: str  # of --protocol
    target: str  # as --data names it, "" for the source
    facts: dict  # all that its scores depend on

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def file(self) -> str:
        """Its name in cells/: by what it depends on alone, so that a row by another name finds it again."""
        return f"{self.key[:24]}.json"


def fits(use: str, row: Row, data: Data, args: Args) -> bool:
    """Whether a row can be used so. Raises UserError for a target that the set's labels are not of."""
    if row.kind == "teacher":
        return use in ("probe", "knn")
    if use == "kd":
        return row.plain is not None
    if use != "scratch":
        if use == "knn" and args.knn_k > len(data.x_train):
            raise UserError(f"--knn-k {args.knn_k}: {data.name} has {len(data.x_train)} training images")
        return True
    if row.kind in ("none", "features"):
        return False
    names, classes = row.entry.distilled.class_names, row.entry.classes
    if data.num_classes != classes or (names and data.class_names != names):
        raise UserError(f"--protocol scratch: {row.name} has labels of other classes than {data.name}: take a target "
                        "of its classes, or probe, finetune or knn")  # fmt: skip
    return True


def transfer_of(row: Row, data: Data, args: Args) -> Protocol:
    """Probes and fine-tuning on a target: a recorded length holds on the sets' source alone, else the published one."""
    uses, own = row.entry.uses, data.content in row.entry.uses_at
    if args.transfer.finetune_steps is None and (not own or uses.finetune_steps is None):
        uses = replace(uses, finetune_steps=10_000 if data.name in LONG else 5000)
    return uses


def check_networks(entries: list[Entry], args: Args) -> None:
    """Raises UserError for networks and schedules that cannot be, and for scratch without labels."""
    for entry in entries:
        if "scratch" in args.protocol and entry.kind == "features":
            raise UserError(f"--protocol scratch: {entry.path} has features for targets, which train no classifier: "
                            "take probe, finetune, knn or kd")  # fmt: skip
        for strategy, strengths in {(of.dsa, of.strengths) for of in (entry.recipes["scores"], args.labels, args.kd)}:
            dsa_strategy(strategy, strengths)
        check_recipe(entry.recipes["soft"])
        for model in models_of(entry, args):
            with torch.device("cpu" if model.startswith("timm:") else "meta"), seeded("tried"):
                make_network(model, entry, 2)  # some of timm's cannot be made without memory


def models_of(entry: Entry, args: Args) -> list[str]:
    """--models for a set, each once."""
    named = [own_models(entry) if name == "own" else (name,) for name in args.models]
    return list(dict.fromkeys(model for names in named for model in names))


def cells_of(rows: list[Row], args: Args, targets: Targets) -> list[Cell]:
    """All cells of the table, networks together: row by row, model by model, network by network."""
    cells = []
    for row in rows:
        entry = row.entry
        uses = args.protocol or (("finetune",) if args.table else ("probe" if entry.kind == "features" else "scratch",))
        for model in ["-"] if row.kind == "teacher" else models_of(entry, args):
            for run in range(entry.runs):
                for target in target_names(args):
                    data = targets.data(target, entry)
                    for use in dict.fromkeys(uses):
                        if fits(use, row, data, args):
                            facts = facts_of(row, model, run, use, target, data, targets, args)
                            cells.append(Cell(row, model, run, use, target, facts))
    return cells


def target_names(args: Args) -> tuple[str, ...]:
    """As --data, --targets and --table name them; "" is the source of each set."""
    named = args.data or (TABLES[args.table][1] if args.table else ())
    return tuple(dict.fromkeys((*named, *(FULL if args.targets else ())))) or ("",)


def facts_of(row: Row, model: str, run: int, use: str, target: str, data: Data, targets: Targets, args: Args) -> dict:
    """All that a cell's scores depend on, but for the code."""
    entry, transfer = row.entry, transfer_of(row, data, args)
    facts = dict(row=row.facts, model=model, run=run, seed=entry.seed, n=entry.n, use=use, test=target_content(data))
    facts |= dict(widths=entry.widths, norm=entry.norm, eval_width=entry.distilled.meta.get("eval_width"))
    facts |= dict(out=None if row.kind == "teacher" else row.out)
    if row.kind in KINDS:
        later = {"runs", *(USED if row.kind == "features" else ())}  # what training does not depend on
        recipe = asdict(entry.recipes[row.kind])
        facts["recipe"] = {name: value for name, value in recipe.items() if name not in later}
    if row.kind == "soft":
        facts["teacher"] = entry.teacher_facts
    if use in ("probe", "finetune"):
        begins = ("probe", "few") if use == "probe" else ("finetune",)
        facts["transfer"] = {name: value for name, value in asdict(transfer).items() if name.startswith(begins)}
        facts["transfer"] |= dict(shares=args.shares) if use == "probe" else {}
    if use == "probe" and matched(row, data):
        facts["match"] = entry.teacher_facts
    if use == "knn":
        facts["knn"] = [args.knn_k, args.knn_temperature]
    if use == "kd":
        facts["kd"] = [asdict(args.kd), targets.classifier(target, entry)[1]["weights"]]
    return facts


def matched(row: Row, data: Data) -> bool:
    """Whether a probe also measures how well the network's own head matches the teacher: on the set's source."""
    entry = row.entry
    if entry.kind != "features" or row.kind not in ("features", "none") or data.content != entry.source_content:
        return False
    return entry.finds_teacher


def target_content(data: Data) -> list:
    """A target as what networks see of it."""
    return [data.content, data.mean.tolist(), data.std.tolist(), data.flip]


def score(cell: Cell, net: nn.Module | None, targets: Targets, args: Args) -> dict[str, float | list[float]]:
    """A cell's scores. net: the row's network, which is left as it is; None for the teacher itself."""
    row, entry, device = cell.row, cell.row.entry, cell.row.entry.device
    data, inputs = targets.data(cell.target, entry), partial(targets.inputs, cell.target, entry)
    protocol, key, vote = transfer_of(row, data, args), (entry.seed, cell.run), (args.knn_k, args.knn_temperature)
    embedded = partial(targets.embed, network_key(cell))
    if row.kind == "teacher":
        parts = ((data.x_train, "train"), (data.x_test, "test"))
        f_train, f_test = (entry.teacher.cached_targets(x, data.content, part, device).to(device) for x, part in parts)
        if cell.use == "knn":
            return {"knn": knn_of(f_train, f_test, data, *vote)}
        return probes(lambda index: f_train[index.to(device)], f_test, data, protocol, *key, shares=args.shares)
    if cell.use == "scratch":
        if row.kind == "scores":
            images, y = row.draw(cell.run)
            at = images if isinstance(images, Inputs) else on_device(images.to(device))
            recipe = entry.recipes["scores"]
            krr = row.facts["row"] != "all_real"
            return score_student(net, at, y.to(device), inputs("test"), data.y_test, recipe, krr)
        return {"accuracy": test_accuracy(net.eval(), inputs("test"), data.y_test)}
    if cell.use == "probe":
        both, options = (inputs("train"), inputs("test")), dict(shares=args.shares, embed=embedded)
        scores = probe(net, data, *both, protocol, args.cache_gb, *key, **options)
        if matched(row, data):
            wanted = entry.teacher.cached_targets(data.x_test, data.content, "test", device)
            with torch.no_grad():
                scores = {"match": matching_error(net.head(embedded(net, inputs("test"))).cpu(), wanted)} | scores
        return scores
    if cell.use == "knn":
        both = inputs("train"), inputs("test")
        return {"knn": neighbours_vote(net, data, *both, *vote, args.cache_gb, embed=embedded)}
    net = copy.deepcopy(net)
    if cell.use == "finetune":
        return {"finetune": finetune(net, data, device, protocol, *key, prepare=entry.prepare())}
    return {"kd": taught(cell, net, data, inputs("test"), targets, args)}


def taught(cell: Cell, net: nn.Module, data: Data, test: Inputs, targets: Targets, args: Args) -> float:
    """Test accuracy of the row's network after a classifier of the target taught it on the row's images.

    The row "gaussian" has new noise in every batch and no pretraining (KRR-ST's code).
    """
    row, entry, device, key = cell.row, cell.row.entry, cell.row.entry.device, (cell.row.entry.seed, cell.run)
    teacher, _ = targets.classifier(cell.target, entry)
    recipe, rate, n = args.kd, args.kd.lr, entry.n
    if row.facts["row"] == "gaussian":
        with seeded("evaluation network", *key):
            net = make_network(cell.model, entry, row.out).to(device)
        shape, rate = entry.distilled.x.shape[1:], args.kd.lr_gaussian
        images = lambda index, step: torch.randn(len(index), *shape, generator=rng("kd noise", *key, step)).to(device)  # noqa: E731
    else:
        x = row.plain(cell.run).to(device)
        n = len(x)
        images = lambda index, step: x[index.to(device)]  # noqa: E731
    recipe = replace(recipe, dsa=without_flip(recipe.dsa, data.flip))
    steps = recipe.epochs * -(-entry.n // recipe.batch)  # of all rows
    distil_knowledge(
        net, teacher, images, n, data.num_classes, recipe, rate, entry.prepare(), device, *key, steps=steps
    )
    return test_accuracy(net.train(recipe.student_test_mode == "train"), test, data.y_test)


def jobs_of(cells: list[Cell]) -> list[list[Cell]]:
    """Cells that share a network, in the order of the table."""
    jobs = {}
    for cell in cells:
        jobs.setdefault((id(cell.row), cell.model, cell.run), []).append(cell)
    return list(jobs.values())


def read_cell(folder: Path, cell: Cell) -> dict | None:
    """What a finished cell's file holds, None where it is not finished, or was scored otherwise."""
    try:
        kept = json.loads((folder / "cells" / cell.file).read_text())
        return kept if kept["key"] == cell.key and kept["scores"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{folder / 'cells' / cell.file} cannot be read ({first_line(error)}): it is scored again")
        (folder / "cells" / cell.file).unlink(missing_ok=True)
        return None


def work(job: list[Cell], folder: Path, targets: Targets, args: Args, after: Callable[[Cell], None]) -> None:
    """Train the job's network and score its unfinished cells.

    A network of several cells is kept in a file until all are finished, so that a stop costs one cell.
    """
    left = [cell for cell in job if read_cell(folder, cell) is None]
    if not left:
        return
    first, net, began = left[0], None, time.monotonic()
    row = first.row
    path = folder / "networks" / f"{network_key(first)}.safetensors"
    untrained = row.facts["row"] == "gaussian" and all(cell.use == "kd" for cell in left)
    if row.kind != "teacher" and not untrained:
        net = load_network(path, first) if path.exists() else None
        if net is None:
            net = trained(row, first.model, first.run)
            if len(left) > 1:
                weights = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
                write_atomic(path, lambda tmp: save_file(weights, tmp))
    training = time.monotonic() - began
    for cell in left:
        began = time.monotonic()
        scores = score(cell, net, targets, args)
        kernels.raise_if_failed(0)
        kept = dict(key=cell.key, facts=cell.facts, scores=scores, seconds=time.monotonic() - began + training)
        write_json(folder / "cells" / cell.file, kept)
        training = 0.0
        after(cell)
    path.unlink(missing_ok=True)


def network_key(cell: Cell) -> str:
    """Of all that a trained network depends on: a cell's facts without what it is used for."""
    used_for = ("use", "test", "transfer", "match", "knn", "kd")
    facts = {name: value for name, value in cell.facts.items() if name not in used_for}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_network(path: Path, cell: Cell) -> nn.Module | None:
    """The network in a file of `work`; None if it cannot be read."""
    net = make_network(cell.model, cell.row.entry, cell.row.out)
    try:
        net.load_state_dict(load_file(path))
        return net.to(cell.row.entry.device)
    except (OSError, SafetensorError, RuntimeError) as error:
        print(f"{path} cannot be read ({first_line(error)}): its network is trained again")
        return None


def gathered(cells: list[Cell], folder: Path, targets: Targets) -> tuple[Results, dict]:
    """The scores of all cells over networks, and the seconds they took. Raises UserError if one is missing."""
    scores, seconds = {}, 0.0
    for cell in cells:
        kept = read_cell(folder, cell)
        if kept is None:
            raise UserError(f"{folder}: cell {cell.file} is missing; go on with --resume {folder}")
        place = (cell.use, targets.label(cell.target, cell.row.entry), cell.model, cell.row.name)
        scores.setdefault(place, []).append(kept["scores"])
        seconds += kept["seconds"]
    return {place: summarise(of) for place, of in scores.items()}, seconds


# ------------------------------------------------------------------------------------------------------------- the run


class Processes:
    """The processes that torchrun started, or this one alone."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def device(self, name: str) -> torch.device:
        """--device, or this process's own GPU where there are several processes and GPUs."""
        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return pick_device(name)

    def from_first(self, value: str | None) -> str:
        """The first process's value, in all of them."""
        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.count > 1:
            torch.distributed.destroy_process_group()


def checked(args: Args) -> Args:
    """Raises UserError for flags that do not go together."""
    check_limits(args, LIMITS)
    if not args.artefacts:
        raise UserError("name a set to score: python -m common.evaluate runs/.../distilled.safetensors")
    modes = dict(student_test_mode=args.kd.student_test_mode, teacher_mode=args.kd.teacher_mode)
    for name, value in modes.items():
        if value not in ("eval", "train"):
            raise UserError(f"--kd.{name.replace('_', '-')} {value}: give eval or train")
    for group, names in POSITIVE.items():
        for name in names.split():
            value = getattr(getattr(args, group), name)
            if value is not None and not value > 0:
                raise UserError(f"--{group}.{name.replace('_', '-')} {value}: must be above 0")
    if args.scores.loss not in (None, "mse", "xent", "softxent"):
        raise UserError(f"--scores.loss {args.scores.loss}: not one of mse, xent, softxent")
    if args.table and args.protocol and "finetune" not in args.protocol:
        raise UserError("--table is of fine-tuned networks; add finetune to --protocol, or leave it out")
    if args.table and args.models == ("own",):
        args = replace(args, models=("convnet",))  # KRR-ST's code trains one network for all rows
    if args.ranking and args.protocol and "scratch" not in args.protocol:
        raise UserError("--ranking compares accuracies of protocol scratch; add it to --protocol")
    return args


def begin(args: Args, entry: Entry, device: torch.device) -> Path:
    """The folder of this evaluation, made or gone on with: once all else is found to be in order."""
    folder = Path(args.resume or "")
    if not args.resume:
        folder = new_folder(Path(args.out_dir), f"{entry.distilled.data}__evaluate__{entry.seed}")
    elif not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder; name one of an evaluation")
    for part in ("cells", "networks"):
        (folder / part).mkdir(exist_ok=True)
    for left in folder.rglob(".*.tmp"):  # of a write that was killed
        left.unlink()
    write_json(folder / "args.json", asdict(args))
    Run.latest = folder
    print(f"run: {folder} on {device_words(device)}, torch {torch.__version__}")
    return folder


def main(args: Args) -> dict:
    """Score the sets, print the tables, return what result.json holds. Raises UserError for bad input."""
    if args.report:
        if args.artefacts or args.resume:
            raise UserError("--report: writes about run folders and scores nothing; leave the sets and --resume out")
        page = write_report([Path(folder) for folder in args.report], None, Path(args.data_dir))
        print(f"report: {page}")
        return dict(report=str(page))
    args, began, processes = checked(args), time.monotonic(), Processes()
    device, first, folder = processes.device(args.device), processes.rank == 0, None
    if not first:  # data, teachers and sets are made by the first process, and read from its caches by the others
        processes.wait()
    else:
        print(kernels.describe("auto", device, "auto"))
    entries, targets = entries_of(args, device), Targets(args, device)
    check_networks(entries, args)
    rows = rows_of(entries, args)
    cells = cells_of(rows, args, targets)
    if first:
        folder = begin(args, entries[0], device)
        for row in rows:
            if row.facts["row"] in (*baselines.MATCHED, "high_loss"):
                row.draw(0)  # what takes long and is kept in --out-dir
        processes.wait()
    folder = Path(processes.from_first(str(folder)))
    done = sum(read_cell(folder, cell) is not None for cell in cells)
    print(f"table: {len(rows)} rows, {len(cells)} cells" + (f", {done} finished before" if done else ""))
    bar = tqdm(total=len(cells), initial=done, desc="cells", mininterval=1, dynamic_ncols=True, disable=not first)

    def after(cell: Cell) -> None:
        there = {path.name for path in (folder / "cells").iterdir()} if processes.count > 1 else set()
        bar.update(sum(each.file in there for each in cells) - bar.n if there else 1)

    for job in jobs_of(cells)[processes.rank :: processes.count]:
        bar.set_postfix_str(f"{job[0].row.name} {job[0].model} {job[0].run}")
        work(job, folder, targets, args, after)
    processes.wait()
    bar.close()
    processes.close()
    if not first:
        return {}
    return finish(args, folder, device, rows, cells, targets, time.monotonic() - began)


def finish(args: Args, folder: Path, device, rows: list[Row], cells: list[Cell], targets: Targets, seconds) -> dict:
    """Print and write the results of all cells."""
    results, seconds_of_cells = gathered(cells, folder, targets)
    print()
    if args.table:
        published = TABLES[args.table][0]
        if others := {row.entry.distilled.data for row in rows} - {published}:
            print(f"KRR-ST's Table {args.table} is of sets of {published}, this one of {', '.join(sorted(others))}")
        print(krr_st_table(args.table, results, rows))
    shown = {place: of for place, of in results.items() if not (args.table and place[0] == "finetune")}
    if shown:
        print(tables(shown, [row.name for row in rows]))
    entry = rows[-1].entry
    runs = " or ".join(map(str, sorted({row.entry.runs for row in rows})))
    caption = f"mean ± sample std over {runs} networks, in per cent of all test images, last step"
    if any("match" in of for of in results.values()):
        caption += "; match: squared error to the teacher's features over that of their mean"
    print(caption)
    ranking = ranking_of(results, rows) if args.ranking else None
    for name, of in (ranking or {}).items():
        measures = {what.replace("_", " "): (100 * v["mean"], 100 * v["se_networks"]) for what, v in of.items()}
        words = ", ".join(f"{what} {mean:.1f} ± {se:.1f}" for what, (mean, se) in measures.items())
        length = f"{args.full_epochs} epochs" if args.full_epochs else "as many updates as on the set"
        print(f"{name}: {words} (standard errors; all real data: {length})")
    result = dict(
        method="evaluate",
        data=" ".join(dict.fromkeys(row.entry.distilled.data for row in rows)),
        kind=" ".join(dict.fromkeys(row.entry.kind for row in rows)),
        cells=[
            dict(row=row, target=target, protocol=use, model=model, metric=metric) | of
            for (use, target, model, row), measures in results.items()
            for metric, of in measures.items()
        ],
        minus_random=against_random(results, rows),
        ranking=ranking,
        rows={row.name: facts_in_json(row) for row in rows},
        seed=entry.seed,
        seconds=round(seconds, 1),
        seconds_of_cells=round(seconds_of_cells, 1),
        peak_memory_bytes=peak_memory(device),
        device=device_words(device),
        commit=commit(),
        versions=versions(),
        args=asdict(args),
        command=command_of(args),
    )
    write_json(folder / "result.json", result)
    print(f"run: {folder / 'result.json'} after {seconds:.0f} s")
    return result


def command_of(args: Args) -> str:
    """The command line that makes these flags, without those at their default."""

    def flat(args: Args) -> dict:
        groups = {name: value for name, value in asdict(args).items() if isinstance(value, dict)}
        named = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        return {name: value for name, value in asdict(args).items() if name not in groups} | named

    given, usual = flat(args), {name: ("", value) for name, value in flat(Args()).items()}
    artefacts = " ".join(map(shlex.quote, given.pop("artefacts")))
    ranking = " --ranking" if given.pop("ranking") else ""
    return command(f"-m common.evaluate {artefacts}", given, usual) + ranking


def facts_in_json(row: Row) -> dict:
    """What a reader of result.json wants to know of a row."""
    recipe = asdict(row.entry.recipes[row.kind]) if row.kind in KINDS else None
    transfer = asdict(row.entry.uses)
    facts = dict(kind=row.kind, images=row.n, storage_bytes=row.storage_bytes, recipe=recipe, transfer=transfer)
    if row.facts["row"] == "set":
        meta = row.entry.distilled.meta
        known = ("teacher", "label_teacher", "commit", "content", "imported_from", "form", "space")
        facts |= dict(file=row.entry.path.name, method=row.entry.distilled.method, step=row.entry.distilled.step)
        facts |= {name: meta[name] for name in known if name in meta}
    return facts


if __name__ == "__main__":
    cli(main, Args)
