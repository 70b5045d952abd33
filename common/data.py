"""Real images: a named public set or any image folder, as uint8 tensors that may be larger than memory.

    data = load("cifar100")                          # or load("path/to/folder", size=64)
    x = normalise(data.x_train[i], data.mean, data.std)

A folder is read in one of three layouts; hidden files, and files that are no images by their suffix, are ignored.

    train/<class>/*  and test/<class>/*   (or val/; also train/* and test/* without classes)
    <class>/*                             split by class with a seed; loose images beside the classes are ignored
    *                                     images without labels, split likewise

Its images are decoded once into <data_dir>/cache/<name>-<key>.u8, one uint8 array, and mapped from there. The key
covers every file's path, size and time and every option that changes a pixel, so a later start only lists files. Old
entries are never deleted; the cache folder may be emptied at any time.
"""

import difflib
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from common.run import UserError, rng, write_atomic

NAMED = {  # name -> class in torchvision.datasets; digits come with scikit-learn
    "digits": None, "mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100",
}  # fmt: skip
# Mean and std of the training pixels in [0, 1] at the set's own size, as published code has them, so that published
# networks fit. Every other set, and a named set at another size, is measured (the std shrinks with the image).
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # KRR-ST's code, 32 px
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),  # KRR-ST's code, 32 px
    "mnist": ((0.1307,), (0.3081,)),  # PyTorch's MNIST example, 28 px
    "fashion_mnist": ((0.2860,), (0.3530,)),  # the values in common use, 28 px
}
NO_FLIP = {"digits", "mnist", "svhn"}  # a mirrored digit is another thing
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
VERSION = 1  # of the cache; raise it when the same files would decode to other pixels
CHUNK = 32 << 20  # bytes decoded, hashed and written at a time


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

    size = property(lambda self: self.x_train.shape[-1])
    channels = property(lambda self: self.x_train.shape[1])
    num_classes = property(lambda self: len(self.class_names))
    labelled = property(lambda self: self.y_train is not None)


def load(
    name: str, *, data_dir: str | Path = "data", size: int | None = None, resize: str = "squash",
    test_fraction: float = 0.2, seed: int = 0, channels: str = "auto", labelled: bool = False,
) -> Data:  # fmt: skip
    """Load a named set or a folder (a folder that is named like a set: write ./name).

    size: pixels of a side; None keeps the images' own if they all share one square size. resize: "squash" goes straight
    to a square (Lanczos, the published way for fine-grained sets); "crop" scales the shorter side, then cuts the
    centre. test_fraction, seed: the split of a folder without a test part. channels: "auto" keeps grey folders at one
    channel; "rgb" and "grey" convert. labelled: the method needs labels of at least two classes.

    Raises UserError for anything wrong with the name, the options, the folder or an image in it.
    """
    if size is not None and size < 1:
        raise UserError(f"--size {size}: give a number of pixels, for instance --size 32")
    for value, choices in ((resize, ["squash", "crop"]), (channels, ["auto", "rgb", "grey"])):
        if value not in choices:
            raise UserError(f"{value!r}: not one of {', '.join(choices)}; give one of these")
    root, cache = Path(name), Path(data_dir) / "cache"
    safe = name if name in NAMED else re.sub(r"[^\w.-]+", "_", root.resolve().name).strip("._") or "folder"
    rule = "none" if size is None else resize
    convert = True  # whether the pixels come from the cache
    if name in NAMED:
        images, labels, n_train, class_names = _named(name, Path(data_dir))  # (N, H, W) or (N, H, W, 3) uint8
        x = np.ascontiguousarray(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))
        meta = _measure(_chunks(x), x.shape, labels, n_train, class_names) | {"resize": "none"}
        convert = size not in (None, x.shape[-1]) or channels not in ("auto", {1: "grey", 3: "rgb"}[x.shape[1]])
        if name in NORMALISATION:  # of use at this size only: a conversion measures again
            meta["mean"], meta["std"] = NORMALISATION[name]
        key = meta["content"]
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
    if convert:
        key = hashlib.sha256(json.dumps([VERSION, key, n_train, size, rule, channels]).encode()).hexdigest()[:16]
        x, meta = _cached(cache / f"{safe}-{key}", images, labels, n_train, class_names, size, rule, channels)
    x = torch.from_numpy(x)
    y_train = y_test = None
    if labels is not None:
        y_train, y_test = (torch.tensor(part, dtype=torch.int64) for part in (labels[:n_train], labels[n_train:]))
    mean, std = (torch.tensor(meta[key], dtype=torch.float32) for key in ("mean", "std"))
    flip = safe.lower() not in NO_FLIP  # by a folder's name too: a wrong flip harms, a missing one hardly
    return Data(safe, x[:n_train], y_train, x[n_train:], y_test, class_names, mean, std,
                meta["resize"], meta["content"], flip)  # fmt: skip


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
    return (f"{data.name}: {len(data.x_train)} train, {len(data.x_test)} test, {data.size} px, {colour}, {classes}, "
            f"resize {data.resize}, content {data.content[:8]}")  # fmt: skip


# ------------------------------------------------------------------------------------------- what there is, in an order


def _named(name: str, data_dir: Path) -> tuple[np.ndarray, list[int], int, list[str]]:
    """(images uint8 (N, H, W) or (N, H, W, 3), train first; labels; number of train images; class names).

    torchvision's sets are downloaded into data_dir on first use and need no network later. Raises UserError if not.
    """
    if name == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)  # 1797 images 8x8 of 0..16
        order = np.concatenate(train_test_split(np.arange(1797), test_size=360, stratify=y, random_state=0))
        images = np.rint(x[order].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        return images, y[order].tolist(), 1437, [str(digit) for digit in range(10)]
    import torchvision

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without an answer; torchvision itself would wait for ever
    try:
        make = getattr(torchvision.datasets, NAMED[name])
        train, test = (make(str(data_dir), train=part, download=True) for part in (True, False))
    except Exception as error:  # a download fails in many ways: no network, a changed address, a broken archive
        raise UserError(f"could not fetch {name} into {data_dir} ({_reason(error)}): connect to the network once, or "
                        "point --data at a folder with train/<class>/* and test/<class>/*") from error  # fmt: skip
    finally:
        socket.setdefaulttimeout(timeout)
    images = np.concatenate([np.asarray(train.data), np.asarray(test.data)])
    return images, [int(y) for part in (train, test) for y in part.targets], len(train.targets), list(train.classes)


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


def _stat_key(paths: list[str], root: Path) -> str:
    """A hash over each file's path below `root`, length and time of change, in order. Opens none of them."""
    key = hashlib.sha256()
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"cannot read {path} ({_reason(error)}): delete it or fetch it again") from None
        key.update(os.fsencode(f"{os.path.relpath(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    return key.hexdigest()


# ------------------------------------------------------------------------------------------------- decoding and caching


def _cached(stem, images, labels, n_train, class_names, size, rule, channels) -> tuple[np.ndarray, dict]:
    """The images (N, C, S, S) uint8, mapped from stem.u8, and what stem.json says of them; both are made if need be.

    The .json is written last and says how long the .u8 must be, so a kill at any moment only costs a rebuild.
    """
    pixels, facts = Path(f"{stem}.u8"), Path(f"{stem}.json")
    try:
        meta = json.loads(facts.read_text())
        valid = pixels.stat().st_size == math.prod(meta["shape"])
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        print(f"data: decoding {len(images)} images once into {pixels}")
        shape, decode = _decoder(images, size, rule, channels)
        meta = {"version": VERSION, "resize": rule, "channels": shape[1], "shape": shape, "n_train": n_train,
                "class_names": class_names, "labels": labels}  # fmt: skip

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                chunks = _decoded(decode, shape, file, stem.name)
                meta.update(_measure(chunks, shape, labels, n_train, class_names))

        try:
            pixels.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {pixels.parent} ({_reason(error)}): give another --data-dir") from None
        write_atomic(pixels, write)
        write_atomic(facts, lambda temporary: temporary.write_text(json.dumps(meta)))
    # mode "c" (private copy on write), as torch warns about tensors over memory that it may not write to
    return np.memmap(pixels, np.uint8, "c", shape=tuple(meta["shape"])), meta


def _decoder(images: Sequence, size: int | None, rule: str, channels: str) -> tuple[list[int], Callable]:
    """The shape [N, C, S, S] and a function from indices to pixels (n, C, S, S).

    What the options leave open, the first image decides; one that disagrees raises UserError naming both.
    """
    first = _open(images[0])
    grey = first.mode == "L" if channels == "auto" else channels == "grey"
    side = size or first.width

    def decode(indices: range) -> np.ndarray:
        out = np.empty((len(indices), side, side, 1 if grey else 3), np.uint8)
        for row, i in zip(out, indices, strict=True):
            image = _open(images[i])
            if channels == "auto" and image.mode != first.mode:
                a, b = (images[0], images[i]) if grey else (images[i], images[0])
                raise UserError(f"{a} is grey and {b} is in colour: give --channels rgb or --channels grey")
            if size is None and image.size != (side, side):
                a, b = (f"{one.width}x{one.height}" for one in (first, image))
                raise UserError(f"images differ in size or are not square ({images[0]} has {a}, {images[i]} has {b}): "
                                "give --size N, for instance --size 64")  # fmt: skip
            row[:] = np.asarray(_resize(image.convert("L" if grey else "RGB"), side, rule)).reshape(row.shape)
        return out.transpose(0, 3, 1, 2)

    return [len(images), 1 if grey else 3, side, side], decode


def _open(item: str | np.ndarray) -> Image.Image:
    """A file (or decoded pixels) as an upright image in mode L, or RGB where it has colours or a palette.

    Transparency is dropped, not composited. 16-bit pixels are divided to 8 bits, not stretched to the values in use.
    Raises UserError naming a file that cannot be read.
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
        raise UserError(f"cannot read {item} ({_reason(error)}): delete it or fetch it again") from None


def _resize(image: Image.Image, size: int, rule: str) -> Image.Image:
    """A square of `size`; an image that has it already is not resampled."""
    if rule == "crop":
        short = min(image.size)
        width, height = (size * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)  # at its own size: a copy
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _decoded(decode: Callable, shape: list[int], file, name: str) -> Iterator[np.ndarray]:
    """Write all images to `file` chunk by chunk and yield each chunk: a set larger than memory is never held."""
    step, batch = max(1, CHUNK // math.prod(shape[1:])), 32
    # threads, as Pillow decodes without the interpreter lock; in batches, as a task costs as much as a tiny image
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=shape[0], desc=name, unit="image", disable=None) as bar:
        for start in range(0, shape[0], step):
            stop, parts = min(start + step, shape[0]), []
            for part in pool.map(decode, [range(i, min(i + batch, stop)) for i in range(start, stop, batch)]):
                parts.append(part)
                bar.update(len(part))
            chunk = np.ascontiguousarray(np.concatenate(parts))
            file.write(chunk)
            yield chunk


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


def _reason(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 200 else f"{text[:200]}..."
