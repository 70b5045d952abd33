"""Distilled sets of other projects read into ours, and ours written in their forms. Nothing is ever unpickled.

    python -m common.exchange logged/run17 mtt.safetensors --source cifar10 --mean .4914 .4822 .4465 \\
        --std .2023 .1994 .2010
    python -m common.exchange runs/X/distilled.safetensors out --form ddranking

    krr_st      a folder with x_syn.pt, y_syn.pt                     KRR-ST's release
    mtt         a folder with images_{best,step}.pt, labels_*.pt     MTT, DATM, MKDT
    dc          one .pt: {"data": [[images, labels], ...], ...}      DC, DSA, DM
    folder      <class>/* of 8-bit images, labels by the folder      SRe2L, RDED
    npz         one .npz: image, label                               FRePo
    ddranking   a folder with images.pt, labels.pt, lr.pt            DD-Ranking
    ours        one .safetensors                                     common/artefact.py

What such a file leaves out (class names, mean and std, the whitening) is the source's: the data set that was distilled.
Constants differ between projects, and with them the pixels: MTT's code has std .2023 .1994 .2010 for CIFAR-10 and
CIFAR-100 where common/sets.py has KRR-ST's; --mean and --std say what the images were normalised by.

Read, written in the same form and read again, a set is the same bit for bit in pixels and targets, though the numbers
in the file may be others that lead to the same pixels: see `to_pixels` and `unwhiten`.
"""

import json
import re
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, log10
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from common.artefact import Distilled, load_distilled, save_distilled
from common.data import SUFFIXES, Data, Zca, fit_zca, load, mix_pixels, zca_stride
from common.run import UserError, cli, write_atomic
from common.sets import reason_of

FORMS = ("krr_st", "mtt", "dc", "folder", "npz", "ddranking", "ours")
KNOWN = "x_syn.pt and y_syn.pt; images_*.pt and labels_*.pt; images.pt and labels.pt; class folders of images; one .pt "
KNOWN += "with a 'data' list; one .npz; one .safetensors"
SPACES = ("normalised", "pixels", "whitened")
FEATURES, SCORES, LABELS = "teacher features", "class scores", "class labels"  # what y is
READ = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by content: others start programs of their own
GRID = 2.0**32  # unwhitened pixels are multiples of 1 / GRID: see `unwhiten`
# metadata that save_distilled writes by itself
OWN = {"format", "method", "data", "content", "y_is", "class_names", "resize", "channels", "num_images", "step", "seed"}
OWN |= {"recipe", "teacher", "storage_bytes", "zca_bytes", "commit", "code"}


def form_of(path: str | Path) -> str:
    """The name in FORMS of what is at `path`, by its file names alone. Raises UserError for none or two of them."""
    path = Path(path)
    if path.is_file():
        if path.suffix in (".safetensors", ".npz"):
            return "ours" if path.suffix == ".safetensors" else "npz"
        if path.suffix in (".pt", ".pth"):
            named = {"x_syn.pt": "krr_st", "y_syn.pt": "krr_st", "images.pt": "ddranking"}
            return named.get(path.name, "mtt" if path.name.startswith("images_") else "dc")
        raise UserError(f"{path}: not a known form of a distilled set; known are {KNOWN}")
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    there = {
        "krr_st": (path / "x_syn.pt").exists() or (path / "y_syn.pt").exists(),
        "mtt": any(path.glob("images_*.pt")),
        "ddranking": (path / "images.pt").exists(),
        "folder": any(image_files(folder) for folder in class_folders(path)),
    }
    found = [form for form, whether in there.items() if whether]
    if len(found) > 1:
        raise UserError(f"{path}: it looks like {' and '.join(found)}; say which with --in-form")
    if not found:
        raise UserError(f"{path}: not a known form of a distilled set; known are {KNOWN}")
    return found[0]


# --------------------------------------------------------------------------------------------- pixels and network input


def per_channel(values: Tensor) -> Tensor:
    return values.double()[:, None, None]


def to_pixels(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixel units, float32, from normalised float32 (N, C, H, W): z std + mean in float64, rounded once.

    `from_pixels` finds a float32 that leads back to the same pixel, though not always to z. Either the pixels lie
    closer than std times the steps of z (|x| < about |z| std), then rounding x moves x / std by less than half a step
    of z, and z itself comes back; or they lie wider, then half a step of z moves z std by less than half a step of x.
    """
    return (z.double() * per_channel(std) + per_channel(mean)).float()


def from_pixels(x: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised float32 from pixel units, and which of them (bool, same shape) `to_pixels` does not lead back to x.

    (x - mean) / std in float64, rounded once, or its neighbour where only that leads back: what is rounded to a power
    of two reaches half as far below it as above. For pixels that were not made from a float32, and lie closer than std
    times its steps, there may be none: they move by half a step.
    """
    z = ((x.double() - per_channel(mean)) / per_channel(std)).float()
    for direction in (float("inf"), float("-inf")):
        other = torch.nextafter(z, torch.full_like(z, direction))
        better = (to_pixels(z, mean, std) != x) & (to_pixels(other, mean, std) == x)
        z = torch.where(better, other, z)
    return z, to_pixels(z, mean, std) != x


def whiten(x: Tensor, mean: Tensor, std: Tensor, zca_mean: Tensor, matrix: Tensor) -> Tensor:
    """The networks' input in float64 from pixel units (N, C, H, W): ((x - mean) / std - zca_mean) @ matrix."""
    z = (x.double() - per_channel(mean)) / per_channel(std)
    return mix_pixels(z - zca_mean.double(), matrix.double())


def unwhiten(w: Tensor, mean: Tensor, std: Tensor, zca: Zca) -> Tensor:
    """Pixel units, float32, from whitened images (N, C, H, W) of float32 or float64: `whiten` solved for x.

    zca.inverse is only a start (it is rounded by itself, and so not the matrix's inverse): residuals are whitened back
    until they stop falling. Pixels are rounded to multiples of 2^-32 before float32 (which changes those below half a
    grey level, by up to 1e-10), so that float64 whitened images, whose errors are far smaller, lead back to the same
    float32 pixels also near 0. Raises UserError if zca.inverse inverts another matrix.
    """
    w, matrix, inverse = w.double(), zca.matrix.double(), zca.inverse.double()
    z = mix_pixels(w, inverse)
    last = float("inf")
    while True:
        residual = w - mix_pixels(z, matrix)
        size = float(residual.abs().max())
        if not size < last / 2:
            break
        z, last = z + mix_pixels(residual, inverse), size
    if not size <= 1e-9 * float(w.abs().max()):
        raise UserError(f"the whitening cannot be undone (residual {size:.1e}): give the one that the images have")
    x = (z + zca.mean.double()) * per_channel(std) + per_channel(mean)
    return ((x * GRID).round() / GRID + 0.0).float()  # 0 has no sign


def pixel_zca(data: Data, eps: float = 0.1) -> Zca:
    """MTT's whitening of a source: U diag((s + eps)^-1/2) U^T of the covariance (N - 1) of training pixels in [0, 1].

    Theirs is fitted to pixels that are not normalised (kornia's ZCAWhitening, eps 0.1); written here as a whitening of
    normalised images, so that ((x - mean) / std - zca.mean) @ zca.matrix is theirs: the matrix is not symmetric.
    Raises UserError above 64 px, where the matrix would not fit.
    """
    if zca_stride(data.size) > 1:
        raise UserError(f"{data.size} px: MTT whitens images as a whole, which is done up to 64 px here")
    dim, n = data.x_train[0].numel(), len(data.x_train)
    if dim > 1000:
        print(f"exchange: MTT's whitening of {dim} dimensions is fitted now: a minute or more on a CPU", flush=True)
    total, products = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for chunk in data.x_train.split(4096):
        rows = chunk.flatten(1).double() / 255
        total += rows.sum(0)
        products += rows.T @ rows
    mean = total / n
    covariance = (products - n * torch.outer(mean, mean)) / max(1, n - 1)
    s, u = torch.linalg.eigh(covariance)
    s = s.clamp(min=0) + eps
    std, shift = (per_channel(value).expand(data.x_train.shape[1:]).flatten() for value in (data.std, data.mean))
    matrix = std[:, None] * (u * s**-0.5 @ u.T)
    inverse = (u * s**0.5 @ u.T) / std
    return Zca(((mean - shift) / std).view(data.x_train.shape[1:]).float(), matrix.float(), inverse.float())


def zca_of(distilled: Distilled) -> Zca | None:
    """A loaded set's whitening with its inverse, None where it has none."""
    if distilled.zca is None:
        return None
    inverse = torch.linalg.inv(distilled.zca.double()).float()
    return Zca(distilled.zca_mean, distilled.zca, inverse)


# -------------------------------------------------------------------------------------------------------------- reading


def conversion(path: Path) -> str:
    """The shell command that unpickles a file and keeps its tensors, arrays and numbers, in lists and dictionaries."""
    code = (
        "import torch; "
        "keep = lambda s: s.detach().cpu() if isinstance(s, torch.Tensor) else torch.as_tensor(s) "
        'if type(s).__name__ == "ndarray" else {k: keep(v) for k, v in s.items() if k != "accs_all_exps"} '
        "if isinstance(s, dict) else [keep(v) for v in s] if isinstance(s, (list, tuple)) else s "
        "if isinstance(s, (int, float, str)) else None; "
        f's = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False); '
        f"torch.save(keep(s), {json.dumps(f'{path}.clean.pt')})"
    )
    return f"python -c {shlex.quote(code)}"


def load_tensors(path: Path):
    """What torch.save wrote, on the CPU: tensors, numbers, lists and dictionaries of them.

    A {path}.clean.pt beside it is taken in its place. Raises UserError for a file that is missing or damaged, and for
    one that needs unpickling, with the command that writes the .clean.pt.
    """
    clean = Path(f"{path}.clean.pt")
    file = clean if clean.exists() else path
    if not file.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        if file == path and ("GLOBAL" in str(error) or "allowlisted" in str(error)):  # its words for a foreign class
            raise UserError(
                f"{path}: loading it would run pickled code; if you trust it, convert it once with "
                f"{conversion(path)} and give the same path again"
            ) from None
        raise UserError(f"{file}: not a readable file of tensors ({type(error).__name__}); fetch it again") from None


def read_rate(path: Path) -> dict[str, float]:
    """{"lr": the number in a file}, empty without the file. Raises UserError for anything but one number."""
    if not path.exists():
        return {}
    rate = load_tensors(path)
    if isinstance(rate, Tensor) and rate.numel() == 1:
        rate = rate.item()
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not isfinite(rate):
        raise UserError(f"{path}: not one number; delete it, or save the learning rate there")
    return {"lr": float(rate)}


def read_krr_st(path: Path) -> tuple:
    """x_syn.pt and y_syn.pt of a folder, or of the folder that one of them is in. Their tensors are leaves on CUDA."""
    folder = path.parent if path.is_file() else path
    return load_tensors(folder / "x_syn.pt"), load_tensors(folder / "y_syn.pt"), {}


def read_mtt(path: Path, space: str) -> tuple:
    """images_*.pt with its labels_*.pt: the one named, else best, else of the highest step; the rate if it is there.

    With ZCA that code writes the pictures of whitened images as images_zca_*.pt, in pixel units, which no network saw:
    they are read by name with space "pixels" only, and the whitened ones beside them with space "whitened" only.
    """
    folder = path.parent if path.is_file() else path
    pictures = any(folder.glob("images_zca_*.pt"))
    if path.is_file():
        which = path.name.removeprefix("images_").removesuffix(".pt")
    else:
        steps = [
            match[1] for file in folder.glob("images_*.pt") if (match := re.fullmatch(r"images_(\d+)\.pt", file.name))
        ]
        if not (folder / "images_best.pt").exists() and not steps:
            raise UserError(f"{folder}: neither images_best.pt nor images_<step>.pt; name a file")
        which = "best" if (folder / "images_best.pt").exists() else max(steps, key=int)
    if which.startswith("zca_"):
        which = which.removeprefix("zca_")
        if space != "pixels":
            raise UserError(f"{path}: pictures of whitened images, in pixel units, which the networks never saw: name "
                            f"images_{which}.pt with --space whitened, or read these with --space pixels")  # fmt: skip
        images = path
    else:
        images = folder / f"images_{which}.pt"
        if pictures and space == "normalised":
            raise UserError(f"{images}: images_zca_*.pt beside it say that these are whitened: give --space whitened, "
                            "or name a images_zca_*.pt with --space pixels")  # fmt: skip
    print(f"exchange: {images.name} with labels_{which}.pt")
    rate = read_rate(folder / f"lr_{which}.pt")
    return load_tensors(images), load_tensors(folder / f"labels_{which}.pt"), rate


def read_dc(path: Path, experiment: int) -> tuple:
    """[images, labels] of one of the experiments in data["data"]."""
    state = load_tensors(path)
    sets = state.get("data") if isinstance(state, dict) else None
    if not isinstance(sets, list) or not all(isinstance(one, (list, tuple)) and len(one) >= 2 for one in sets):
        raise UserError(f"{path}: no list of [images, labels] under 'data'; known forms are {KNOWN}")
    if not 0 <= experiment < len(sets):
        raise UserError(f"{path}: --experiment {experiment}: it holds {len(sets)}, counted from 0")
    return sets[experiment][0], sets[experiment][1], {}


def read_npz(path: Path, shape: tuple[int, int, int]) -> tuple:
    """The arrays image (images, x) and label (labels, y) as (N, C, S, S) and as they are; shape: (C, S, S).

    FRePo has the channels last. Raises UserError for pickled objects, and where both layouts fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [
                [key for key in keys if key in file] for keys in (("image", "images", "x"), ("label", "labels", "y"))
            ]
            if any(len(found) != 1 for found in names):
                raise UserError(f"{path}: needs one array of image, images, x and one of label, labels, y; it has "
                                f"{', '.join(file) or 'none'}")  # fmt: skip
            x, y = (file[found[0]] for found in names)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path}: holds pickled objects, which are not loaded; save it again as plain arrays"
            ) from None
        raise UserError(f"{path}: not a readable .npz ({reason_of(error)}); fetch it again") from None
    if x.dtype.kind not in "fu" or y.dtype.kind not in "fiu":
        raise UserError(f"{path}: images of {x.dtype}, labels of {y.dtype}; float or uint8 images and numbers are read")
    x, y = (torch.from_numpy(np.ascontiguousarray(a.astype(a.dtype.newbyteorder("=")))) for a in (x, y))
    c, s, _ = shape
    first, last = tuple(x.shape[1:]) == shape, tuple(x.shape[1:]) == (s, s, c)
    if first and last:
        raise UserError(f"{path}: images of {tuple(x.shape[1:])} may have their channels first or last")
    if last:
        x = x.permute(0, 3, 1, 2)
    print(f"exchange: {names[0][0]} has its channels {'last' if last else 'first'}")
    return x, y, {}


def class_folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    files = (each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES and not each.name.startswith("."))
    return sorted(each for each in files if each.is_file())


def safe_name(name: str) -> str:
    """A class name as part of a folder's name, as scdd.py writes it."""
    return re.sub(r"[^\w.-]+", "_", name)


def class_order(folders: list[str], class_names: list[str]) -> tuple[list[int], str]:
    """The label of each folder, and the rule that gave it: the first of these that fits.

    The folders' names are the class names; are number_name, as this project writes them; end in consecutive numbers
    from 0 or 1 behind one prefix (class2 before class10); else stand for the classes in sorted order. Raises UserError
    for another number of folders, and where a name and a number, some of the names or two ways of sorting disagree.
    """
    n = len(class_names)
    if len(folders) != n:
        raise UserError(f"{len(folders)} class folders ({', '.join(folders[:3])} ...) for {n} classes of the source: "
                        "give the --source that was distilled")  # fmt: skip
    for known in (class_names, [safe_name(name) for name in class_names]):
        if set(folders) == set(known) and len(set(known)) == n:
            return [known.index(folder) for folder in folders], "their names are the classes'"
    parts = [re.fullmatch(r"(\d+)_(.*)", folder) for folder in folders]
    if all(parts) and sorted(int(part[1]) for part in parts) == list(range(n)):
        for part in parts:
            if part[2] != safe_name(class_names[int(part[1])]):
                raise UserError(f"class folder {part[0]}: class {int(part[1])} of the source is "
                                f"{class_names[int(part[1])]}: give the --source that was distilled")  # fmt: skip
        return [int(part[1]) for part in parts], "by their number and name"
    if shared := set(folders) & set(class_names):
        missing, other = sorted(set(class_names) - shared), sorted(set(folders) - shared)
        raise UserError(f"{len(shared)} class folders have names of the source's classes, but not {other[0]} (and "
                        f"{missing[0]} has no folder): rename the folders or give another --source")  # fmt: skip
    parts = [re.fullmatch(r"(\D*)(\d+)", folder) for folder in folders]
    if all(parts) and len({part[1] for part in parts}) == 1:
        numbers = [int(part[2]) for part in parts]
        for first in (0, 1):
            if sorted(numbers) == list(range(first, first + n)):
                return [number - first for number in numbers], f"by the number in their names, from {first}"
    natural = sorted(
        folders, key=lambda name: [(int(w), "") if w.isdigit() else (-1, w) for w in re.split(r"(\d+)", name)]
    )
    if natural != sorted(folders):
        a, b = next(pair for pair in zip(natural, sorted(folders), strict=True) if pair[0] != pair[1])
        raise UserError(f"class folders {a} and {b}: sorted by number or by letter, their order differs, and with it "
                        "the labels: rename them to the source's class names")  # fmt: skip
    return [natural.index(folder) for folder in folders], "their sorted order is taken for the order of the classes"


def read_folder(path: Path, source: Data) -> tuple:
    """Pixels (N, C, S, S) uint8 and labels (N,) of <class>/*, class after class, in the order of their file names."""
    folders = class_folders(path)
    try:
        labels, rule = class_order([folder.name for folder in folders], source.class_names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    print(f"exchange: labels of the class folders: {rule} ({folders[0].name} is {source.class_names[labels[0]]})")
    x, y = [], []
    for label, folder in sorted(zip(labels, folders, strict=True)):
        if not (files := image_files(folder)):
            raise UserError(f"{folder}: no images in it")
        x += [read_image(file, source) for file in files]
        y += [label] * len(files)
    return torch.stack(x), torch.tensor(y), {}


def read_image(path: Path, source: Data) -> Tensor:
    """(C, S, S) uint8. Raises UserError for what is no 8-bit image of the source's size and colours."""
    try:
        with Image.open(path, formats=READ) as image:
            if image.size != (source.size, source.size):
                size = "x".join(map(str, image.size))
                raise UserError(
                    f"{path}: {size}, the source has {source.size} px: give --size to read the source at it"
                )
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise UserError(f"{path}: not 8 bits a channel (mode {image.mode})")
            if source.channels == 1 and image.mode not in ("1", "L", "LA"):
                raise UserError(f"{path}: in colour, the source is grey: give --channels rgb")
            pixels = np.asarray(image.convert("L" if source.channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({reason_of(error)}); fetch it again") from None
    return torch.tensor(pixels).view(source.size, source.size, -1).permute(2, 0, 1)


def read_ddranking(path: Path) -> tuple:
    """images.pt, labels.pt and the learning rate, where there is one, of a folder or of the one images.pt is in."""
    folder = path.parent if path.is_file() else path
    return load_tensors(folder / "images.pt"), load_tensors(folder / "labels.pt"), read_rate(folder / "lr.pt")


def by_position(n: int, one_hot: Tensor | None, classes: int, path: Path) -> None:
    """Raises UserError unless n images may be as many of each class, and the labels (n, classes), if given, say so."""
    if not classes or n % classes:
        raise UserError(f"{path}: {n} images for {classes} classes: DD-Ranking has as many of each")
    if one_hot is not None and not torch.equal(
        one_hot.argmax(1), torch.arange(classes).repeat_interleave(n // classes)
    ):
        raise UserError(f"{path}: the labels are not sorted, as many of each class, as DD-Ranking has them")


def check_images(x, source: Data, path: Path) -> None:
    """Raises UserError unless x is a tensor (N, C, S, S) of finite numbers, of the source's channels and size."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
        what = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"{path}: its images are {what}; a tensor of floats, or of uint8 pixels, is read")
    if x.ndim != 4 or not x.numel():
        raise UserError(f"{path}: images of shape {tuple(x.shape)}; (N, channels, size, size) with N > 0 is read")
    if tuple(x.shape[1:]) != tuple(source.x_train.shape[1:]):
        raise UserError(f"{path}: images of {tuple(x.shape[1:])}, the source has {tuple(source.x_train.shape[1:])}: "
                        "give the --source that was distilled, --size or --channels")  # fmt: skip
    if not (finite := x.isfinite().flatten(1).all(1)).all():
        raise UserError(f"{path}: image {int((~finite).nonzero()[0])} is not finite; fetch the set again")


def targets(y, n: int, source: Data, y_is: str | None, form: str, path: Path) -> tuple[Tensor, str]:
    """(y as float32 (N, d), what it is): labels become one-hot. Raises UserError for what cannot be either."""
    classes = source.num_classes
    if not isinstance(y, Tensor) or y.dtype == torch.bool or y.is_complex():
        raise UserError(f"{path}: its labels are no tensor of numbers")
    if len(y.shape) == 0 or len(y) != n:
        raise UserError(f"{path}: {n} images, labels of shape {tuple(y.shape)}: not of one set")
    if not y.is_floating_point():
        if y.ndim != 1:
            raise UserError(f"{path}: integer labels of shape {tuple(y.shape)}; (N,) is read")
        if y_is is not None:
            raise UserError(f"{path}: its labels are integers, not {y_is}; drop --y-is")
        y = y.long()
        if not classes or y.min() < 0 or y.max() >= classes:
            raise UserError(f"{path}: labels {int(y.min())} to {int(y.max())}, the source has {classes} classes: give "
                            "the --source that was distilled")  # fmt: skip
        return torch.nn.functional.one_hot(y, classes).float(), LABELS
    if y.ndim != 2 or not y.shape[1]:
        raise UserError(f"{path}: labels of floats of shape {tuple(y.shape)}; (N,) integers or (N, d) floats are read")
    y = y.detach().float()
    if not (finite := y.isfinite().all(1)).all():
        raise UserError(
            f"{path}: the labels of image {int((~finite).nonzero()[0])} are not finite; fetch the set again"
        )
    if y_is is None:
        fits = y.shape[1] == classes
        if fits == (form == "krr_st"):  # features as wide as there are classes, or scores of other classes
            raise UserError(f"{path}: {y.shape[1]} values an image, the source has {classes} classes: say what they "
                            "are with --y-is features or --y-is scores, or give another --source")  # fmt: skip
        y_is = SCORES if fits else FEATURES
    if y_is == SCORES and y.shape[1] != classes:
        raise UserError(
            f"{path}: {y.shape[1]} scores an image, the source has {classes} classes: give another --source"
        )
    return y.contiguous(), y_is


def load_any(
    path: str | Path, source: Data | None = None, *, form: str = "auto", space: str | None = None, experiment: int = 0,
    y_is: str | None = None, mean: Tensor | None = None, std: Tensor | None = None, zca: Zca | None = None,
    data_dir: str | Path = "data", method: str | None = None, teacher: dict | None = None,
) -> Distilled:  # fmt: skip
    """Read a distilled set of any of FORMS; "ours" needs no source and takes none of the options.

    source: the data set that was distilled. form: "auto" asks form_of. space: what its images are: "normalised" by mean
    and std (C,) (None: the source's), "pixels" (1.0 or uint8 255 is white), or "whitened" after that; None: "whitened"
    for npz in colour, as FRePo does, else "normalised"; folders are pixels. zca: what whitened them; None: the source's
    own, fitted as MTT does for mtt, dc and ddranking, else as FRePo does, cached in data_dir. experiment: of dc. y_is:
    FEATURES or SCORES where the width of y does not say it. method: None is the form's name. teacher: what is known of
    the network that gave the targets.

    x of the result is in pixel units, float32, not clamped; y float32, one-hot for labels. Raises UserError, in one
    line, for all that does not fit.
    """
    path = Path(path)
    form = form_of(path) if form == "auto" else form
    for value, choices, flag in ((form, FORMS, "--in-form"), (space, (None, *SPACES), "--space"),
                                 (y_is, (None, FEATURES, SCORES), "--y-is")):  # fmt: skip
        if value not in choices:
            raise UserError(f"{flag} {value}: not one of {', '.join(filter(None, choices))}")
    if form == "ours":
        return load_distilled(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if source is None:
        raise UserError(f"{path}: a {form} set has no class names and constants: name the data that was distilled with "
                        "--source")  # fmt: skip
    if form == "folder" and space not in (None, "pixels"):
        raise UserError(f"{path}: images of a folder are pixels; drop --space {space}")
    if zca is not None and space not in (None, "whitened"):
        raise UserError(f"{path}: --zca goes with --space whitened; drop one of them")
    if space is None and zca is not None:
        space = "whitened"
    if space is None:
        space = {"folder": "pixels", "npz": "whitened" if source.channels > 1 else "normalised"}.get(form, "normalised")
    mean, std = (source.mean if mean is None else mean), (source.std if std is None else std)
    if not (len(mean) == len(std) == source.channels) or not (std > 0).all():
        raise UserError(f"--mean, --std: give {source.channels} numbers each, std above 0")
    readers: dict[str, Callable] = {
        "krr_st": lambda: read_krr_st(path),
        "mtt": lambda: read_mtt(path, space),
        "dc": lambda: read_dc(path, experiment),
        "folder": lambda: read_folder(path, source),
        "npz": lambda: read_npz(path, tuple(source.x_train.shape[1:])),
        "ddranking": lambda: read_ddranking(path),
    }
    x, y, facts = readers[form]()
    check_images(x, source, path)
    y, y_is = targets(y, len(x), source, y_is, form, path)
    x = x.detach()
    if form == "ddranking":
        by_position(len(x), y if y_is == LABELS else None, source.num_classes, path)
    if x.dtype == torch.uint8:
        if space != "pixels":
            raise UserError(f"{path}: uint8 images are pixels: give --space pixels")
        x = (x.double() / 255).float()
    elif space == "pixels":
        x = x.float()
        if x.min() >= 0 and x.max() > 16:
            raise UserError(f"{path}: values up to {float(x.max()):g}; with --space pixels 1.0 is white: divide by 255")
    elif space == "normalised":
        zca, x = None, to_pixels(x.float(), mean, std)
    if space == "whitened":
        if zca is None:
            own = source if torch.equal(mean, source.mean) and torch.equal(std, source.std) else None
            if own is None:
                raise UserError("--mean, --std: a whitening is fitted with the source's own; drop them, or give --zca")
            zca = pixel_zca(source) if form in ("mtt", "dc", "ddranking") else fit_zca(source, data_dir)
        if zca.mean.shape != source.x_train.shape[1:]:
            raise UserError(f"--zca: a whitening of {tuple(zca.mean.shape)} images, the source has "
                            f"{tuple(source.x_train.shape[1:])}")  # fmt: skip
        x = unwhiten(x, mean, std, zca)
    else:
        zca = None
    if not x.isfinite().all():
        raise UserError(f"{path}: images overflow float32; fetch the set again")
    constants = ", ".join(f"{name} {' '.join(f'{v:.4f}' for v in value.tolist())}" for name, value in
                          (("mean", mean), ("std", std)))  # fmt: skip
    print(f"exchange: {path.name}: {len(x)} images of {tuple(x.shape[1:])}, {y_is} {tuple(y.shape)}; {space}, "
          f"{constants}; pixels {float(x.min()):.3f} to {float(x.max()):.3f}")  # fmt: skip
    meta = dict(
        content=source.content,
        teacher=teacher,
        num_images=len(x),
        channels=source.channels,
        storage_bytes=4 * (x.numel() + y.numel() + 2 * len(mean)),
        zca_bytes=0 if zca is None else 4 * (zca.matrix.numel() + zca.mean.numel()),
        imported_from=path.name,
        form=form,
        space=space,
    )
    return Distilled(
        x=x.contiguous(),
        y=y,
        mean=mean.float(),
        std=std.float(),
        method=method or form,
        data=source.name,
        y_is=y_is,
        class_names=list(source.class_names),
        resize=source.resize,
        step=0,
        seed=0,
        recipe={},
        meta=meta | facts,
        zca=None if zca is None else zca.matrix,
        zca_mean=None if zca is None else zca.mean,
    )


# -------------------------------------------------------------------------------------------------------------- writing


def network_input(distilled: Distilled, space: str, path: Path) -> Tensor:
    """The images in `space` as they are written; says how many do not come back bit for bit."""
    x = distilled.x.detach().cpu().float()
    if space == "pixels":
        return x
    if space == "whitened":
        if distilled.zca is None:
            raise UserError(f"{path}: this set is not whitened; drop --space whitened")
        w = whiten(x, distilled.mean, distilled.std, distilled.zca_mean, distilled.zca)
        off = ((x.double() * GRID).round() / GRID).float() != x
        out = w
    else:
        out, off = from_pixels(x, distilled.mean, distilled.std)
    if off.any():
        most = 2.0**-33 if space == "whitened" else (to_pixels(out, distilled.mean, distilled.std) - x).abs().max()
        print(f"exchange: {int(off.sum())} of {x.numel()} pixels lie between the numbers of this form; read back they "
              f"differ, by at most {float(most):.1e}")  # fmt: skip
    return out


def labels_of(distilled: Distilled, path: Path) -> Tensor:
    """(N,) int64: the class of each image, by its labels or its highest score. Raises UserError without classes."""
    if distilled.y_is not in (LABELS, SCORES) or distilled.y.shape[1] != len(distilled.class_names):
        raise UserError(f"{path}: the targets are {distilled.y_is}, and this form needs classes: take krr_st")
    return distilled.y.detach().cpu().argmax(1)


def as_stored(distilled: Distilled, form: str, path: Path) -> Tensor:
    """y as the forms hold it: (N,) int64 if it is one-hot, else (N, d) float32; FRePo's npz has scores as they are."""
    y = distilled.y.detach().cpu().float().contiguous()
    if distilled.y_is == FEATURES or (form == "npz" and distilled.y_is == SCORES):
        return y
    labels = labels_of(distilled, path)
    if torch.equal(torch.nn.functional.one_hot(labels, y.shape[1]).float(), y):
        if distilled.y_is == SCORES:
            print("exchange: the scores are one-hot: written as integer labels")
        return labels
    if distilled.y_is == LABELS:
        raise UserError(f"{path}: the set says that y is class labels, but it is not one-hot; distil it again")
    return y


def write_folder(distilled: Distilled, path: Path) -> None:
    """PNG files of 8 bits in number_name folders; says what rounding and clamping cost."""
    x, labels = distilled.x.detach().cpu().double(), labels_of(distilled, path)
    empty = sorted(set(range(len(distilled.class_names))) - set(labels.tolist()))
    if empty:
        raise UserError(f"{path}: no image of class {distilled.class_names[empty[0]]}, and a folder needs one of each")
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    error = float((pixels.double() / 255 - x).square().mean())
    if not torch.equal((pixels.double() / 255).float(), distilled.x.detach().cpu().float()):
        clamped = int(((x < 0) | (x > 1)).sum())
        print(f"exchange: rounded to 8 bits, {clamped} of {x.numel()} values clamped, PSNR {-10 * log10(error):.1f} dB")
    if distilled.y_is == SCORES:
        print("exchange: a folder holds labels alone: each image goes to the class of its highest score")
    for place, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        file = path / safe_name(f"{label:03d}_{distilled.class_names[label]}") / f"{place:06d}.png"
        make_folder(file.parent)
        array = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if len(image) == 1 else array))
        write_atomic(file, lambda tmp, picture=picture: picture.save(tmp, format="PNG"))


def by_class(distilled: Distilled, path: Path) -> Tensor:
    """The order (N,) that sorts the images by class and keeps the order within one. Raises UserError if ipc differs.

    A set that was read from this form stays as it is: its scores may well be highest for another class than its place.
    """
    if distilled.meta.get("form") == "ddranking":
        return torch.arange(len(distilled.x))
    labels = labels_of(distilled, path)
    counts = labels.bincount(minlength=len(distilled.class_names))
    if len(counts.unique()) > 1:
        low, high = int(counts.argmin()), int(counts.argmax())
        names = distilled.class_names
        raise UserError(f"{path}: DD-Ranking takes as many images of each class, here are {int(counts[low])} of "
                        f"{names[low]} and {int(counts[high])} of {names[high]}")  # fmt: skip
    return labels.argsort(stable=True)


def make_folder(folder: Path) -> None:
    """Raises UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make a folder there ({error.strerror}); name another") from None


def save_tensor(path: Path, value) -> None:
    make_folder(path.parent)
    write_atomic(path, lambda tmp: torch.save(value, tmp))


def save_as(
    distilled: Distilled, form: str, path: str | Path, lr: float | None = None, space: str | None = None
) -> None:
    """Write a set in one of FORMS. Folders must be new or empty, files are replaced.

    lr: the students' learning rate, which mtt and ddranking have a file for; None: the recipe's or the one that was
    imported, else no file (DD-Ranking then searches one). space: of the images; None: "whitened" for npz of a whitened
    set, else "normalised", or the pixels of a folder. Whitened images are float64, from which float32 pixels come back.

    DD-Ranking's losses take the softmax of soft labels / temperature: it expects logits, and class scores are written
    as they are. FRePo's and ISA's are no logits but regression targets of about one-hot - 1 / C, nearly uniform after a
    softmax: score those by their hard labels. One-hot scores (SC-DD's) are written as integer labels. Its hard labels
    are 0 .. 0, 1 .. 1, ... by position, whatever labels.pt holds, hence the order.

    Raises UserError for targets that the form cannot hold, and for folders that are not empty.
    """
    path = Path(path)
    if form not in FORMS:
        raise UserError(f"--form {form}: not one of {', '.join(FORMS)}")
    if space not in (None, *SPACES):
        raise UserError(f"--space {space}: not one of {', '.join(SPACES)}")
    files = form in ("dc", "npz", "ours")
    if files and path.is_dir():
        raise UserError(f"{path}: a folder; name a file")
    if not files and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise UserError(f"{path}: {'a file' if path.is_file() else 'not empty'}; name a new folder")
    if form == "ours":
        return save_ours(distilled, path)
    if form == "folder":
        if space not in (None, "pixels"):
            raise UserError(f"{path}: images of a folder are pixels; drop --space {space}")
        return write_folder(distilled, path)
    whitened = distilled.zca is not None
    space = space or ("whitened" if form == "npz" and whitened else "normalised")
    if form in ("krr_st", "ddranking") and space == "whitened":
        raise UserError(f"{path}: {form} images are float32 and not whitened; drop --space whitened")
    order = by_class(distilled, path) if form == "ddranking" else slice(None)
    y = as_stored(distilled, form, path)[order]
    if distilled.y_is == FEATURES and form != "krr_st":
        print(f"exchange: the targets are teacher features: read a {form} set of them back with --y-is features")
    if whitened and space == "normalised":
        print("exchange: the networks of this set saw whitened images; these are normalised only")
    x = network_input(distilled, space, path)[order]
    lr = next((rate for rate in (lr, distilled.recipe.get("lr"), distilled.meta.get("lr")) if rate is not None), None)
    if form == "krr_st":
        save_tensor(path / "x_syn.pt", x)
        save_tensor(path / "y_syn.pt", y)
    elif form == "dc":
        save_tensor(path, {"data": [[x, y]], "accs_all_exps": {}})
    elif form == "npz":
        arrays = dict(image=x.permute(0, 2, 3, 1).contiguous().numpy(), label=y.numpy())
        make_folder(path.parent)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # a name would get another suffix
                np.savez(file, **arrays)

        write_atomic(path, write)
    else:
        end = "_best.pt" if form == "mtt" else ".pt"
        for name, value in (("images", x), ("labels", y), ("lr", None if lr is None else torch.tensor(float(lr)))):
            if value is not None:
                save_tensor(path / f"{name}{end}", value)
        if lr is None and form == "ddranking":
            print("exchange: no learning rate is known: no lr.pt, so DD-Ranking searches one; --lr gives it")
    print(f"exchange: {path}: {len(x)} images, {space}, as {form}")


def save_ours(distilled: Distilled, path: Path) -> None:
    """The set as `load_distilled` reads it."""
    zca = distilled.zca
    make_folder(path.parent)
    save_distilled(
        path,
        None if distilled.code is not None else distilled.x,
        None if distilled.code is not None else distilled.y,
        distilled.mean,
        distilled.std,
        method=distilled.method,
        data=distilled.data,
        content=distilled.meta["content"],
        y_is=distilled.y_is,
        class_names=distilled.class_names,
        resize=distilled.resize,
        step=distilled.step,
        seed=distilled.seed,
        recipe=distilled.recipe,
        teacher=distilled.meta.get("teacher"),
        zca=None if zca is None else Zca(distilled.zca_mean, zca, torch.empty(0)),  # the inverse is not stored
        code=distilled.code,
        extra={key: value for key, value in distilled.meta.items() if key not in OWN},
    )
    print(f"exchange: {path}: {len(distilled.x)} images, as ours")


# ----------------------------------------------------------------------------------------------------- the command line


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """the set to read, and where to write it"""
    form: str = "auto"
    """what to write: krr_st, mtt, dc, folder, npz, ddranking or ours; auto: ours for .safetensors, npz for .npz"""
    in_form: str = "auto"
    """what is read; auto: recognised by its file names"""
    source: str | None = None
    """the data set that was distilled: its name, or a folder; for all but ours"""
    data_dir: str = "data"
    """where the data sets are"""
    size: int | None = None
    """side of the source's images in pixels; None: a named set's usual size, a folder as it is"""
    resize: str = "squash"
    """how the source's images become square: squash or crop"""
    channels: str = "auto"
    """auto keeps a grey source at one channel; rgb, grey"""
    space: str | None = None
    """what the images are that are read: normalised, whitened or pixels; None: whitened for npz in colour, pixels for
    a folder, else normalised"""
    mean: tuple[float, ...] = ()
    """what they were normalised by, a number a channel; none: the source's"""
    std: tuple[float, ...] = ()
    """likewise"""
    zca: str | None = None
    """a .safetensors of ours whose whitening they have; None: MTT's of the source for mtt, dc and ddranking, else
    FRePo's"""
    y_is: str | None = None
    """features or scores, where the width of the targets does not say it"""
    experiment: int = 0
    """which of the sets in a dc file"""
    method: str | None = None
    """the name of the method that made it; None: the form's"""
    out_space: str | None = None
    """what the images are that are written; None: whitened for npz of a whitened set, pixels for a folder, else
    normalised"""
    lr: float | None = None
    """the students' learning rate, for mtt and ddranking; None: the recipe's"""


def main(args: Args) -> Distilled:
    """Read, write, return what was read."""
    if len(args.paths) != 2:
        raise UserError("give two paths: the set to read, and where to write it")
    start, end = map(Path, args.paths)
    form = args.form
    if form == "auto":
        form = {".safetensors": "ours", ".npz": "npz"}.get(end.suffix)
        if form is None:
            raise UserError(f"{end}: say with --form what to write: {', '.join(FORMS)}")
    source = None
    if args.source is not None:
        source = load(args.source, data_dir=args.data_dir, size=args.size, resize=args.resize, channels=args.channels)
    y_is = {"features": FEATURES, "scores": SCORES}.get(args.y_is, args.y_is)
    distilled = load_any(
        start,
        source,
        form=args.in_form,
        space=args.space,
        experiment=args.experiment,
        y_is=y_is,
        mean=torch.tensor(args.mean) if args.mean else None,
        std=torch.tensor(args.std) if args.std else None,
        zca=zca_of(load_distilled(args.zca)) if args.zca else None,
        data_dir=args.data_dir,
        method=args.method,
    )
    save_as(distilled, form, end, args.lr, args.out_space)
    return distilled


if __name__ == "__main__":
    cli(main, Args)
