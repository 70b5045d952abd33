"""Real images: a named public set or any image folder, as uint8 tensors that may be larger than memory.

    data = load("cifar100")                          # or load("path/to/folder", size=64)
    x = normalise(data.x_train[i], data.mean, data.std)

A folder is read in one of three layouts; hidden files, and files that are no images by their suffix, are ignored.

    train/<class>/*  and test/<class>/*   (or val/; also train/* and test/* without classes)
    <class>/*                             split by class with a seed; loose images beside the classes are ignored
    *                                     images without labels, split likewise

A named set is what common/sets.py reads, in colour throughout where its images come as files (a few of them are grey).
Image files are decoded once into <data_dir>/cache/<name>-<key>.u8, one uint8 array, and mapped from there. The key
covers every file's path, size and time and every option that changes a pixel, so a later start only lists files. Old
entries are never deleted; the cache folder may be emptied at any time.

FRePo's networks see whitened images: `fit_zca`, and `Inputs` for whole sets of them.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from common.augment import gather, resident, upload
from common.run import UserError, first_line, rng, write_atomic
from common.sets import NAMED, NO_FLIP, NORMALISATION, read, reason_of
from kernels.backend import exact_products

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
VERSION = 1  # of the cache; raise it when the same files would decode to other pixels
CHUNK = 32 << 20  # bytes decoded, hashed and written at a time
PHASE_SIZE = 64  # pixels of a side up to which an image is whitened as a whole
EXACT_ROWS = 1024  # see _moments
ZCA_VERSION = 1  # of the cached whitenings; raise it when the same images would be whitened otherwise


@dataclass
class Data:
    """An image set with its test part."""

    name: str  # the set's name, or the folder's last part made safe for file names
    x_train: Tensor  # (N, C, H, W) uint8; of a folder: memory-mapped, so index it before computing
    y_train: Tensor | None  # (N,) int64; None without labels
    x_test: Tensor
    y_test: Tensor | None
    class_names: list[str]  # empty without labels
    mean: Tensor  # (C,) float32, of the training pixels in [0, 1]
    std: Tensor  # (C,) float32
    resize: str  # the rule that made the images: "squash", "crop" or "none"
    content: str  # sha256 over pixels, labels, class names and the split: what teachers and checkpoints are keyed by
    flip: bool  # whether a mirrored image is still the same thing
    native: bool = False  # a named set at its own or its default size: what presets are made for
    skipped: int = 0  # images left out because they cannot be read

    size = property(lambda self: self.x_train.shape[-1])
    channels = property(lambda self: self.x_train.shape[1])
    num_classes = property(lambda self: len(self.class_names))
    labelled = property(lambda self: self.y_train is not None)


def load(
    name: str, *, data_dir: str | Path = "data", size: int | None = None, resize: str = "squash",
    test_fraction: float = 0.2, seed: int = 0, channels: str = "auto", labelled: bool = False,
    skip_bad_images: bool = False,
) -> Data:  # fmt: skip
    """Load a named set or a folder (a folder that is named like a set: write ./name).

    size: pixels of a side; None takes a named set's default (NAMED[name].size) and keeps a folder's own if its images
    all share one square size. resize: "squash" goes straight to a square (Lanczos, the published way for fine-grained
    sets); "crop" scales the shorter side, then cuts the centre. test_fraction, seed: the split of a folder without a
    test part. channels: "auto" keeps grey sets and grey folders at one channel; "rgb" and "grey" convert. labelled: the
    method needs labels of at least two classes. skip_bad_images: leave out, and count, what is no whole image.

    Raises UserError for anything wrong with the name, the options, the folder or an image in it.
    """
    if size is not None and size < 1:
        raise UserError(f"--size {size}: give a number of pixels, for instance --size 32")
    for value, choices in ((resize, ["squash", "crop"]), (channels, ["auto", "rgb", "grey"])):
        if value not in choices:
            raise UserError(f"{value!r}: not one of {', '.join(choices)}; give one of these")
    root, cache = Path(name), Path(data_dir) / "cache"
    safe = name if name in NAMED else re.sub(r"[^\w.-]+", "_", root.resolve().name).strip("._") or "folder"
    native = name in NAMED and size in (None, NAMED[name].size)
    if native:
        size = None if NAMED[name].square else NAMED[name].size
    rule = "none" if size is None else resize
    own = "rgb"  # the channels of a named set
    convert = True  # whether the pixels come from the cache
    if name in NAMED:
        images, labels, n_train, class_names = read(name, Path(data_dir))
        if isinstance(images, np.ndarray):  # (N, H, W) or (N, H, W, 3) uint8
            x = np.ascontiguousarray(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))
            own = "grey" if x.shape[1] == 1 else "rgb"
            meta = _measure(_chunks(x), x.shape, labels, n_train, class_names) | {"resize": "none"}
            convert = size is not None or channels not in ("auto", own)
            key = meta["content"]
        else:  # paths; labels and names come from other files, which may change by themselves
            key = _sha256(_stat_key(images, Path(data_dir)), labels, class_names)
        channels = own if channels == "auto" else channels
    elif root.is_dir():
        images, labels, n_train, class_names = _folder(root, cache, test_fraction, seed)  # images: paths
        if labelled and len(class_names) < 2:
            found = "only one class" if class_names else "images without class folders"
            raise UserError(f"--data {name}: {found}, and this method needs labels; sort the images into class folders")
        key = _stat_key(images, root)
    else:
        near = difflib.get_close_matches(name.lower(), NAMED, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--data {name}: no such folder, and not one of {', '.join(NAMED)}{hint} (a folder path works)")
    skipped = []
    if convert:
        key = _sha256(VERSION, key, n_train, size, rule, channels, *["skip"] * skip_bad_images)
        stem = cache / f"{safe}-{key[:16]}"
        x, meta = _cached(stem, images, labels, n_train, class_names, size, rule, channels, skip_bad_images)
        labels, n_train, skipped = meta["labels"], meta["n_train"], meta.get("skipped", [])
    if skipped:
        some = ", ".join(images[i] for i in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        print(f"data: left out {len(skipped)} of {len(images)} images, which cannot be read: {some}")
    mean, std = meta["mean"], meta["std"]
    if meta["resize"] != "crop" and channels == own:
        mean, std = NORMALISATION.get((name, x.shape[-1]), (mean, std))
    x = torch.from_numpy(x)
    y_train = y_test = None
    if labels is not None:
        y_train, y_test = (torch.tensor(part, dtype=torch.int64) for part in (labels[:n_train], labels[n_train:]))
    mean, std = (torch.tensor(value, dtype=torch.float32) for value in (mean, std))
    flip = safe.lower() not in NO_FLIP  # by a folder's name too: a wrong flip harms, a missing one hardly
    return Data(safe, x[:n_train], y_train, x[n_train:], y_test, class_names, mean, std,
                meta["resize"], meta["content"], flip, native, len(skipped))  # fmt: skip


def hold_out(data: Data, fraction: float, seed: int) -> tuple[Data, Data]:
    """Take a share of the training images away from distillation, drawn per class where there are labels.

    Returns (the remaining training images with the old test images, the same with the held-out images as the test).
    Both parts are copies in memory, in the old order. Mean and std stay those of `data`; `content` also covers fraction
    and seed, so that teachers and checkpoints are keyed apart. Every class keeps a training image. Raises UserError for
    a fraction outside 0..1, or if no class can spare an image.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction {fraction}: give a number between 0 and 1, for instance 0.1")
    groups = torch.zeros(len(data.x_train), dtype=torch.int64) if data.y_train is None else data.y_train
    held = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        of_class = (groups == group).nonzero()[:, 0]
        n = min(int(fraction * len(of_class) + 0.5), len(of_class) - 1)
        held[of_class[torch.randperm(len(of_class), generator=rng("hold out", seed, int(group)))[:n]]] = True
    if not held.any():
        raise UserError(f"held-out fraction {fraction}: too few training images ({len(held)}) to spare any of a class; "
                        "give a larger fraction")  # fmt: skip
    content = _sha256(data.content, "hold out", float(fraction), seed)
    y_train, y_held = (None, None) if data.y_train is None else (data.y_train[~held], data.y_train[held])
    rest = dataclasses.replace(data, x_train=data.x_train[~held], y_train=y_train, content=content)
    return rest, dataclasses.replace(rest, x_test=data.x_train[held], y_test=y_held)


def part_of(data: Data, train: Tensor, test: Tensor) -> Data:
    """The training and test images at these indices, copied; classes keep their numbers and names.

    Mean and std stay those of `data`; `content` also covers the indices.
    """
    content = _sha256(data.content, "part", *[_sha256(index.tolist()) for index in (train, test)])
    parts = dict(x_train=data.x_train[train], y_train=data.y_train[train], x_test=data.x_test[test])
    return dataclasses.replace(data, **parts, y_test=data.y_test[test], content=content)


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Network input, float32 (N, C, H, W), from uint8 pixels or from floats where 1.0 is white."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return (x - mean.to(x).view(-1, 1, 1)) / std.to(x).view(-1, 1, 1)


def denormalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixel units (1.0 is white, not clamped) from network input (N, C, H, W)."""
    return x * std.to(x).view(-1, 1, 1) + mean.to(x).view(-1, 1, 1)


def describe(data: Data) -> str:
    """One line for the start of a log."""
    colour = "1 channel" if data.channels == 1 else f"{data.channels} channels"
    classes = f"{data.num_classes} classes" if data.labelled else "no labels"
    skipped = f", {data.skipped} unreadable left out" if data.skipped else ""
    return (f"{data.name}: {len(data.x_train)} train, {len(data.x_test)} test, {data.size} px, {colour}, {classes}, "
            f"resize {data.resize}, content {data.content[:8]}{skipped}")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- whitening


@dataclass
class Zca:
    """ZCA whitening of normalised images, FRePo's. Fitted by `fit_zca`; symmetric matrices, so side and order of the
    product do not matter."""

    mean: Tensor  # (C, H, W) float32, of the normalised training images
    matrix: Tensor  # (D, D) float32, covariance^(-1/2); D = C H W / stride^2
    inverse: Tensor  # (D, D) float32, covariance^(1/2)

    def whiten(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32, normalised, on this object's device -> whitened, the same shape."""
        return mix_pixels(x - self.mean, self.matrix)

    def undo(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32, whitened -> normalised."""
        return mix_pixels(x, self.inverse) + self.mean

    def to(self, device: torch.device | str) -> "Zca":
        return Zca(self.mean.to(device), self.matrix.to(device), self.inverse.to(device))


def zca_stride(size: int) -> int:
    """Pixels between neighbours in a phase: 1 up to 64 px, 2 at 128 px (FRePo's checkerboard), then ceil(size / 64).

    Raises UserError for a size that it does not divide.
    """
    stride = -(-size // PHASE_SIZE)
    if size % stride:
        raise UserError(f"{size} px images are whitened in {stride} x {stride} interleaved parts, which must be of one "
                        f"size: give --size {size // stride * stride}, or --no-zca")  # fmt: skip
    return stride


def to_phases(x: Tensor, stride: int) -> Tensor:
    """(N, C, H, W) -> (N, stride^2, D): row i stride + j of an image is x[:, i::stride, j::stride], flattened."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // stride, stride, w // stride, stride).permute(0, 3, 5, 1, 2, 4)
    return parts.flatten(3).flatten(1, 2)


def from_phases(phases: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `to_phases`; shape: (N, C, H, W)."""
    n, c, h, w = shape
    stride = math.isqrt(phases.shape[1])
    parts = phases.reshape(n, stride, stride, c, h // stride, w // stride).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c, h, w)


def mix_pixels(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each phase of each image (N, C, H, W) by matrix (D, D): all of the whitening but the mean."""
    stride = math.isqrt(x.shape[1:].numel() // len(matrix))
    with exact_products(x.device):  # the condition number of the matrix is about 100: TF32 would show
        return from_phases(to_phases(x, stride) @ matrix, x.shape)


def fit_zca(data: Data, data_dir: str | Path, reg: float = 0.1) -> Zca:
    """FRePo's whitening of the normalised training images, on the CPU, read from <data_dir>/cache when it is there.

    With U diag(s) U^T = covariance + reg trace(covariance) / D I, the matrix is U diag(s^-1/2) U^T. Where there are
    fewer images than dimensions, the smallest s beyond the number of images give 1 instead. Images above 64 px are
    whitened in phases (`zca_stride`), all by one matrix, from the mean of the phases' covariances.
    Raises UserError for a size without equal phases, for images that do not differ, and for a full disk.
    """
    stride = zca_stride(data.size)
    shape, dim = tuple(data.x_train.shape[1:]), data.x_train[0].numel() // stride**2
    key = _sha256(ZCA_VERSION, data.content, data.mean.tolist(), data.std.tolist(), data.size, float(reg))
    path = Path(data_dir) / "cache" / f"zca-{key[:16]}.safetensors"
    if path.exists():
        try:
            zca = Zca(**load_file(path))
            if (zca.mean.shape, zca.matrix.shape, zca.inverse.shape) == (shape, (dim, dim), (dim, dim)):
                return zca
            reason = "its shapes are others"
        except (OSError, SafetensorError, TypeError) as error:
            reason = first_line(error)
        print(f"data: {path} cannot be read ({reason}); fitting the whitening again")
    start = time.perf_counter()
    mean, covariance = _moments(data, stride)
    covariance.diagonal().add_(reg * covariance.trace() / dim)
    if dim > 5000:
        print(f"data: whitening of {dim} dimensions, fitted once: this takes minutes", flush=True)
    s, u = torch.linalg.eigh(covariance)  # ascending
    beyond = max(0, dim - len(data.x_train))  # FRePo's guard: the number of images, also where each gives many phases
    if not s[beyond] > 1e-12 * s[-1]:
        raise UserError(f"{data.name}: its {len(data.x_train)} training images differ too little for a whitening with "
                        f"regularisation {reg:g}: give --no-zca")  # fmt: skip
    s[:beyond] = 1

    def symmetric(power: float) -> Tensor:
        product = u * s**power @ u.T
        return ((product + product.T) / 2).float()

    zca = Zca(mean.float(), symmetric(-0.5), symmetric(0.5))
    seconds = f"{time.perf_counter() - start:.0f} s"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if os.access(path.parent, os.W_OK):
        write_atomic(path, lambda temporary: save_file(vars(zca), temporary))
        print(f"data: whitening of {dim} dimensions fitted once in {seconds} into {path}")
    else:
        print(f"data: whitening of {dim} dimensions fitted in {seconds}; {path.parent} cannot be written: every run "
              "fits it anew")  # fmt: skip
    return zca


def _moments(data: Data, stride: int) -> tuple[Tensor, Tensor]:
    """float64 mean (C, H, W) of the normalised training images, and covariance (D, D), averaged over the phases.

    FRePo's departure 7: the release has float32.

    Sums of integers, and so the same however the images are divided: products of pixels - 128 are at most 2^14, and
    1024 of them are exact in float32, which is twice as fast as float64. The sums of these are exact in float64.
    """
    x, phases = data.x_train, stride**2
    dim = x[0].numel() // phases
    total = torch.zeros(phases, dim, dtype=torch.float64)
    products = torch.zeros(dim, dim, dtype=torch.float64)
    for chunk in tqdm(x.split(max(1, EXACT_ROWS // phases)), desc="covariance", leave=False, disable=None):
        rows = to_phases(chunk.float() - 128, stride)  # (n, phases, D)
        total += rows.sum(0)
        rows = rows.flatten(0, 1)
        products += rows.T @ rows
    total /= len(x)
    covariance = products / (len(x) * phases) - total.T @ total / phases
    mean, std = data.mean.double()[:, None, None], data.std.double()[:, None, None]
    scale = (1 / (255 * std)).expand(-1, data.size // stride, data.size // stride).flatten()  # (D,), to network input
    covariance *= scale[:, None] * scale
    pixel_mean = from_phases(total[None], (1, *x.shape[1:]))[0] + 128
    return (pixel_mean / 255 - mean) / std, covariance


class Inputs:
    """What the networks see of a set of images: normalised, and with `zca` whitened, float32 on the run's device.

    Whitened images are kept if they fit, else each batch is whitened as it is drawn. An input has the same bits either
    way and in any company, so that a resumed run may keep what the first did not: as the last bits of a matrix product
    on a CPU depend on its number of rows (not on a row's place nor on the other rows: tested), it always whitens
    blocks of one size.
    """

    def __init__(
        self, x: Tensor, mean: Tensor, std: Tensor, zca: Zca | None, device: torch.device, gigabytes: float,
        spare: int = 0,
    ):  # fmt: skip
        """x: uint8 (N, C, H, W), may be memory-mapped; mean, std: (C,). gigabytes: 10^9 bytes for whitened images;
        spare: bytes to leave free on a CUDA device. Pixels are kept on the device where `augment.resident` puts them.
        """
        self.device, self.mean, self.std = device, mean.to(device), std.to(device)
        self.zca = None if zca is None else zca.to(device)
        self.block = 64 if device.type == "cpu" else 256  # images; a GPU wants more, its bits are not promised
        self.pixels, self.kept, self.gigabytes = x, None, 0.0  # gigabytes: of whitened images that are kept
        room = gigabytes * 1e9
        if device.type == "cuda":
            room = min(room, torch.cuda.mem_get_info(device)[0] - spare)
        if zca is None or 4 * x.numel() > room:
            self.pixels = resident(x, device, spare)
            return
        kept = torch.empty(x.shape, device=device)
        for index in tqdm(torch.arange(len(x)).split(self.block), desc="whitening", leave=False, disable=None):
            kept[index[0] : index[-1] + 1] = self(index)
        self.kept, self.gigabytes = kept, kept.nbytes / 1e9

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, index: Tensor) -> Tensor:
        """index: (B,) int64 on the CPU; returns (B, C, H, W) float32 on the device."""
        if self.kept is not None:
            return gather(self.kept, index)
        x = normalise(upload(gather(self.pixels, index), self.device), self.mean, self.std)
        if self.zca is None:
            return x
        full = torch.cat([x, x.new_zeros(-len(x) % self.block, *x.shape[1:])])
        return torch.cat([self.zca.whiten(block) for block in full.split(self.block)])[: len(x)]


# ------------------------------------------------------------------------------------------- what there is, in an order


def _folder(root: Path, cache: Path, test_fraction: float, seed: int) -> tuple:
    """(paths, train first; labels or None; number of train images; class names), ordered by names alone.

    The split is in the order, and so in the key of the cache: train and test are slices of one mapped array.
    """
    parts = {part: _classes(root / part, cache) for part in ("train", "test", "val") if (root / part).is_dir()}
    if parts and "train" not in parts:
        raise UserError(f"{root} has {next(iter(parts))}/ but no train/ beside it: name the folder that holds both")
    train = parts.pop("train", None) or _classes(root, cache)
    if parts:
        # test/ before val/, unless it is of another kind: some sets publish test images without their classes
        part = next((part for part in parts if ("" in parts[part]) == ("" in train)), next(iter(parts)))
        test = parts[part]
        if differ := sorted(set(train) ^ set(test)):
            names = ", ".join(name or "(no class)" for name in differ[:5]) + (", ..." if len(differ) > 5 else "")
            raise UserError(f"{root}: train/ and {part}/ differ in classes ({names}): give both the same class folders")
    else:
        if not 0 < test_fraction < 1:
            raise UserError(f"test fraction {test_fraction}: give a number between 0 and 1, for instance 0.2")
        test = {}
        for name, paths in train.items():
            n_test = min(int(test_fraction * len(paths) + 0.5), len(paths) - 1)  # every class keeps a train image
            drawn = set(torch.randperm(len(paths), generator=rng("split", seed, name))[:n_test].tolist())
            train[name] = [path for i, path in enumerate(paths) if i not in drawn]
            test[name] = [path for i, path in enumerate(paths) if i in drawn]
    paths = [[path for name in train for path in part[name]] for part in (train, test)]
    labels = [label for part in (train, test) for label, name in enumerate(train) for _ in part[name]]
    if not paths[1]:
        raise UserError(f"{root}: too few images ({len(paths[0])}) to hold out {test_fraction:g} of a class for the "
                        "test; add images, or test/ beside train/")  # fmt: skip
    if not parts:
        share = f"{100 - 100 * test_fraction:.4g}/{100 * test_fraction:.4g}"
        print(f"data: split {share} by seed {seed}: {len(paths[0])} train, {len(paths[1])} test")
    flat = "" in train
    return paths[0] + paths[1], None if flat else labels, len(paths[0]), [] if flat else list(train)


def _classes(root: Path, cache: Path) -> dict[str, list[str]]:
    """Class name -> paths of its images at any depth, sorted; {"": paths} for a folder without classes.

    The cache is no class (--data may be --data-dir). Raises UserError for a class or a folder without images.
    """

    def kept(name: str, folder: str | Path) -> bool:
        return not name.startswith(".") and os.path.abspath(f"{folder}/{name}") != os.path.abspath(cache)

    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and kept(entry.name, root))
    classes = {}
    for name in names or [""]:
        paths = []
        for folder, inner, files in os.walk(root / name):
            inner[:] = [part for part in inner if kept(part, folder)]
            images = (file for file in files if os.path.splitext(file)[1].lower() in SUFFIXES)
            paths += [os.path.join(folder, file) for file in images if not file.startswith(".")]
        if not paths:
            mend = "delete the class folder or fill it" if name else "name a folder that holds some"
            raise UserError(f"no images in {root / name} ({' '.join(sorted(SUFFIXES))}): {mend}")
        classes[name] = sorted(paths)
    return classes


def _sha256(*key) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _stat_key(paths: list[str], root: Path) -> str:
    """A hash over each file's path below `root`, length and time of change, in order. Opens none of them."""
    key = hashlib.sha256()
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"cannot read {path} ({reason_of(error)}): delete it or fetch it again") from None
        key.update(os.fsencode(f"{os.path.relpath(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    return key.hexdigest()


# ------------------------------------------------------------------------------------------------- decoding and caching


def _cached(stem, images, labels, n_train, class_names, size, rule, channels, skip) -> tuple[np.ndarray, dict]:
    """The images (N, C, S, S) uint8, mapped from stem.u8, and what stem.json says of them; both are made if need be.

    The .json is written last and says how long the .u8 must be, so a kill at any moment only costs a rebuild. Its
    "skipped" are the indices of images left out, which its labels and n_train do not count.
    """
    pixels, facts = Path(f"{stem}.u8"), Path(f"{stem}.json")
    try:
        meta = json.loads(facts.read_text())
        valid = pixels.stat().st_size == math.prod(meta["shape"])
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        print(f"data: decoding {len(images)} images once into {pixels}")
        shape, decode = _decoder(images, size, rule, channels, skip)
        meta = {"version": VERSION, "resize": rule, "channels": shape[1], "class_names": class_names}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                bad = _decoded(decode, len(images), shape, file, stem.name)
            kept, kept_train = _without(set(bad), labels, n_train, len(images), class_names)
            whole = [len(images) - len(bad), *shape]
            meta.update(shape=whole, n_train=kept_train, labels=kept, skipped=bad)
            # read back rather than measured on the way: what is left out is known only at the end
            x = np.memmap(temporary, np.uint8, "r", shape=tuple(whole))
            meta.update(_measure(_chunks(x), whole, kept, kept_train, class_names))

        try:
            pixels.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {pixels.parent} ({reason_of(error)}): give another --data-dir") from None
        write_atomic(pixels, write)
        write_atomic(facts, lambda temporary: temporary.write_text(json.dumps(meta)))
    # mode "c" (private copy on write), as torch warns about tensors over memory that it may not write to
    return np.memmap(pixels, np.uint8, "c", shape=tuple(meta["shape"])), meta


def _without(bad: set[int], labels, n_train: int, n: int, class_names: list[str]) -> tuple[list[int] | None, int]:
    """Labels and number of training images without the bad ones. Raises UserError where a part or a class is lost."""
    train, test = ([i for i in part if i not in bad] for part in (range(n_train), range(n_train, n)))
    mend = "fetch the set again; --skip-bad-images cannot go on"
    if not (train and test):
        raise UserError(f"none of the {'test' if train else 'training'} images can be read: {mend}")
    if labels is None:
        return None, len(train)
    if lost := set(labels[:n_train]) - {labels[i] for i in train}:
        raise UserError(f"no training image of class {class_names[min(lost)]} can be read: {mend}")
    return [labels[i] for i in train + test], len(train)


class _BadImage(UserError):
    """The bytes of a file are no whole image: what --skip-bad-images leaves out."""


def _decoder(images: Sequence, size: int | None, rule: str, channels: str, skip: bool) -> tuple[list[int], Callable]:
    """The shape [C, S, S] and a function from indices to (pixels (n, C, S, S), indices of images left out).

    What the options leave open, the first image decides; one that disagrees raises UserError naming both.
    """

    def opened(i: int) -> Image.Image | None:
        try:
            return _open(images[i])
        except _BadImage:
            if not skip:
                raise

    at, first = next(((i, image) for i in range(len(images)) if (image := opened(i))), (0, None))
    if first is None:
        raise UserError(f"none of {len(images)} images can be read, the first is {images[0]}: fetch the set again")
    grey = first.mode == "L" if channels == "auto" else channels == "grey"
    side = size or first.width

    def decode(indices: range) -> tuple[np.ndarray, list[int]]:
        out, bad = np.empty((len(indices), side, side, 1 if grey else 3), np.uint8), []
        for i in indices:
            image = opened(i)
            if image is None:
                bad.append(i)
                continue
            if channels == "auto" and image.mode != first.mode:
                a, b = (images[at], images[i]) if grey else (images[i], images[at])
                raise UserError(f"{a} is grey and {b} is in colour: give --channels rgb or --channels grey")
            if size is None and image.size != (side, side):
                a, b = (f"{one.width}x{one.height}" for one in (first, image))
                raise UserError(f"images differ in size or are not square ({images[at]} has {a}, {images[i]} has {b}): "
                                "give --size N, for instance --size 64")  # fmt: skip
            row = out[i - indices.start - len(bad)]
            row[:] = np.asarray(_resize(image.convert("L" if grey else "RGB"), side, rule)).reshape(row.shape)
        return out[: len(indices) - len(bad)].transpose(0, 3, 1, 2), bad

    return [1 if grey else 3, side, side], decode


def _open(item: str | np.ndarray) -> Image.Image:
    """A file (or decoded pixels) as an upright image in mode L, or RGB where it has colours or a palette.

    Transparency is dropped, not composited. 16-bit pixels are divided to 8 bits, not stretched to the values in use.
    Raises UserError naming a file that cannot be read: _BadImage unless it was the system that failed.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        with Image.open(item) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # I;16 in any byte order; I where a 16-bit file opens so
                deep = np.asarray(image).astype(np.float64)
                if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
                    raise ValueError("neither 8 nor 16 bits a pixel")
                return Image.fromarray(np.rint(deep / 257).astype(np.uint8))
            if image.mode in ("P", "PA"):
                image = image.convert("RGBA")  # first, or Pillow warns about a transparent palette
            return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    except Exception as error:  # Pillow raises many kinds for broken files
        words = f"cannot read {item} ({reason_of(error)}): delete it or fetch it again"
        if isinstance(error, MemoryError) or getattr(error, "errno", None):  # the next start may well read it
            raise UserError(words) from None
        raise _BadImage(f"{words}; --skip-bad-images goes on without it") from None


def _resize(image: Image.Image, size: int, rule: str) -> Image.Image:
    """A square of `size`; an image that has it already is not resampled."""
    if rule == "crop":
        short = min(image.size)
        width, height = (size * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)  # at its own size: a copy
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _decoded(decode: Callable, n: int, shape: list[int], file, name: str) -> list[int]:
    """Write n images to `file` chunk by chunk: a set larger than memory is never held. Returns those left out."""
    step, batch, left_out = max(1, CHUNK // math.prod(shape)), 32, []
    # threads, as Pillow decodes without the interpreter lock; in batches, as a task costs as much as a tiny image
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=n, desc=name, unit="image", disable=None) as bar:
        for start in range(0, n, step):
            stop = min(start + step, n)
            batches = [range(i, min(i + batch, stop)) for i in range(start, stop, batch)]
            for part, bad in pool.map(decode, batches):  # in order, whichever is done first
                file.write(np.ascontiguousarray(part))
                left_out += bad
                bar.update(len(part) + len(bad))
    return left_out


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, CHUNK // x[0].size)
    return (x[start : start + step] for start in range(0, len(x), step))


def _measure(chunks: Iterable[np.ndarray], shape: Sequence[int], labels, n_train: int, class_names: list[str]) -> dict:
    """The content hash of all images; mean and std (per channel, pixels in [0, 1]) of the first n_train.

    The sums are exact integers from a histogram, so they do not depend on the chunks.
    """
    content = hashlib.sha256(json.dumps([list(shape), n_train, class_names, labels]).encode())
    counts, done = np.zeros((shape[1], 256), np.int64), 0
    for chunk in chunks:  # (n, C, S, S) uint8
        content.update(chunk)
        train = chunk[: max(0, n_train - done)]
        counts += [np.bincount(train[:, c].reshape(-1), minlength=256) for c in range(shape[1])]
        done += len(chunk)
    mean, std = [], []
    for row in counts.tolist():
        n, total, squares = (sum(count * value**power for value, count in enumerate(row)) for power in (0, 1, 2))
        mean.append(total / n / 255)
        # at least one grey level, so that a constant channel does not divide by zero
        std.append(max(math.sqrt(n * squares - total**2) / n, 1.0) / 255)
    return {"content": content.hexdigest(), "mean": mean, "std": std}
