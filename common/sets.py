"""Public sets: where each is fetched from, how its archive is laid out, and how it is checked.

    images, labels, n_train, class_names = read("cub200", Path("data"))

Everything lies in <data_dir> as torchvision lays it out, or as the archive does; a file fetched by hand goes where the
download would have put it, and then no network is needed. An archive is unpacked aside and renamed into place, so a
kill leaves nothing that looks whole.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.run import UserError, write_json

FOLDER = "point --data at a folder with train/<class>/* and test/<class>/*"  # the way out of every failure
Parsed = tuple[np.ndarray | list[str], list[int], int, list[str]]  # what `read` returns


def read(name: str, data_dir: Path) -> Parsed:
    """(images, labels, number of training images, class names) of a named set, training images first.

    images: uint8 (N, H, W) or (N, H, W, 3), or paths of colour images (some of which may be grey), in an order that
    does not depend on the machine. labels: from 0. Fetches what <data_dir> lacks. Raises UserError where that fails.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds without an answer; torchvision itself would wait for ever
    try:
        return NAMED[name].parse(data_dir)
    except UserError:
        raise
    except Exception as error:  # a download fails in many ways: no network, a changed address, a broken file
        raise UserError(f"could not load {name} from {data_dir} ({reason_of(error)}): connect to the network once "
                        f"(delete its files there if they are damaged), or {FOLDER}") from error  # fmt: skip
    finally:
        socket.setdefaulttimeout(timeout)


def reason_of(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 200 else f"{text[:200]}..."


# ---------------------------------------------------------------------------------------------------------- the layouts


def _digits(data_dir: Path) -> Parsed:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)  # 1797 images 8x8 of 0..16
    order = np.concatenate(train_test_split(np.arange(1797), test_size=360, stratify=y, random_state=0))
    images = np.rint(x[order].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return images, y[order].tolist(), 1437, [str(digit) for digit in range(10)]


def _by_train_flag(kind: str, data_dir: Path) -> Parsed:
    """MNIST, FashionMNIST, CIFAR10, CIFAR100: torchvision fetches, checks and reads them."""
    import torchvision

    train, test = (getattr(torchvision.datasets, kind)(str(data_dir), train=part, download=True) for part in (1, 0))
    images = np.concatenate([np.asarray(train.data), np.asarray(test.data)])
    return images, [int(y) for part in (train, test) for y in part.targets], len(train.targets), list(train.classes)


def _by_split(kind: str, data_dir: Path) -> Parsed:
    """SVHN and STL10: torchvision fetches, checks and reads them.

    SVHN's extra part and STL-10's unlabelled part stay out, although the latter is in its archive, and torchvision
    hashes it too at every start (some ten seconds).
    """
    import torchvision

    parts = [getattr(torchvision.datasets, kind)(str(data_dir), part, download=True) for part in ("train", "test")]
    images = np.concatenate([part.data.transpose(0, 2, 3, 1) for part in parts])
    names = [str(digit) for digit in range(10)] if kind == "SVHN" else parts[0].classes
    return images, [int(y) for part in parts for y in part.labels], len(parts[0].labels), list(names)


def _imagenette(data_dir: Path) -> Parsed:
    from torchvision.datasets import Imagenette

    _unpacked(data_dir, *Imagenette._ARCHIVES["full"], ["imagenette2"])
    train, test = (Imagenette(str(data_dir), part) for part in ("train", "val"))
    return _joined(train._samples, test._samples, [names[0] for names in train.classes])


def _flowers(data_dir: Path) -> Parsed:
    """The official 1020 training and 6149 test images; the 1020 for validation stay out.

    KRR-ST's code has no loader of this set; MKDT, which compares with it, trains on the 1020.
    """
    from torchvision.datasets import Flowers102

    source, files = Flowers102._download_url_prefix, Flowers102._file_dict
    for part in ("label", "setid"):
        _fetched(data_dir / "flowers-102", source + files[part][0], files[part][1])
    _unpacked(data_dir / "flowers-102", source + files["image"][0], files["image"][1], ["jpg"])
    parts = (Flowers102(str(data_dir), part) for part in ("train", "test"))
    return _joined(*(zip(part._image_files, part._labels, strict=True) for part in parts), Flowers102.classes)


def _aircraft(data_dir: Path) -> Parsed:
    """The 100 variants; trainval against test."""
    from torchvision.datasets import FGVCAircraft

    _unpacked(data_dir, *SOURCES["aircraft"], ["fgvc-aircraft-2013b"])
    train, test = (FGVCAircraft(str(data_dir), part, "variant") for part in ("trainval", "test"))
    return _joined(*(zip(part._image_files, part._labels, strict=True) for part in (train, test)), train.classes)


def _cars(data_dir: Path) -> Parsed:
    from torchvision.datasets import StanfordCars

    root = data_dir / "stanford_cars"
    lists = [root / "devkit/cars_train_annos.mat", root / "devkit/cars_meta.mat"]
    test_list = root / "cars_test_annos_withlabels.mat"
    if missing := [path for path in (root / "cars_train", root / "cars_test", *lists, test_list) if not path.exists()]:
        raise UserError(f"cars can no longer be downloaded, and {missing[0]} is not there: put a copy of the set into "
                        f"{root} as torchvision.datasets.StanfordCars reads it, or {FOLDER}")  # fmt: skip
    _check(test_list, SOURCES["cars test list"][1])
    _check_against_first_use(lists, data_dir)  # only the archive around them has a published checksum
    train, test = (StanfordCars(str(data_dir), part) for part in ("train", "test"))
    return _joined(train._samples, test._samples, train.classes)


def _tiny_imagenet(data_dir: Path) -> Parsed:
    """Classes in the order of wnids.txt. The validation images are the test: those of test/ have no labels."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    _unpacked(data_dir, *SOURCES["tiny_imagenet"], ["tiny-imagenet-200"])
    root = data_dir / "tiny-imagenet-200"
    index = {wnid: label for label, wnid in enumerate((root / "wnids.txt").read_text().split())}
    words = dict(line.split("\t") for line in (root / "words.txt").read_text().splitlines())
    test = [line.split("\t")[:2] for line in (root / "val/val_annotations.txt").read_text().splitlines()]
    test = [(root / "val/images" / file, index[wnid]) for file, wnid in test]
    train = make_dataset(root / "train", index, IMG_EXTENSIONS)
    return _joined(train, test, [words[wnid].split(",")[0] for wnid in index])


def _imagewoof(data_dir: Path) -> Parsed:
    _unpacked(data_dir, *SOURCES["imagewoof"], ["imagewoof2"])
    images, labels, n_train, wnids = _train_and_val(data_dir / "imagewoof2")
    return images, labels, n_train, [WOOF[wnid] for wnid in wnids]


def _cub200(data_dir: Path) -> Parsed:
    _unpacked(data_dir, *SOURCES["cub200"], ["CUB_200_2011"])
    root = data_dir / "CUB_200_2011"
    # every line is "number value"; numbers of images and of classes count from 1
    files, labels, is_train, classes = (
        dict(line.split() for line in (root / f"{part}.txt").read_text().splitlines())
        for part in ("images", "image_class_labels", "train_test_split", "classes")
    )
    parts = [[(root / "images" / files[i], int(labels[i]) - 1) for i in files if is_train[i] == flag] for flag in "10"]
    return _joined(*parts, [name.split(".", 1)[1].replace("_", " ") for name in classes.values()])


def _dogs(data_dir: Path) -> Parsed:
    from scipy.io import loadmat

    root = data_dir / "stanford_dogs"
    _unpacked(root, *SOURCES["dogs lists"], ["train_list.mat", "test_list.mat"])
    _unpacked(root, *SOURCES["dogs"], ["Images"])
    parts = []
    for part in ("train", "test"):
        lists = loadmat(root / f"{part}_list.mat", squeeze_me=True)
        parts.append([(root / "Images" / str(file), int(label) - 1)
                      for file, label in zip(lists["file_list"], lists["labels"], strict=True)])  # fmt: skip
    names = {label: path.parent.name.split("-", 1)[1].replace("_", " ") for path, label in parts[0]}
    return _joined(*parts, [names[label] for label in range(len(names))])


def _imagenet(data_dir: Path) -> Parsed:
    root = data_dir / "imagenet"
    for part in ("train", "val"):
        if next((root / part).glob("*/"), None) is None:
            raise UserError(f"imagenet cannot be downloaded, and {root / part} has no class folders: put the images at "
                            f"{root} as train/<wnid>/* and val/<wnid>/* (val is published unsorted: sort it into class "
                            f"folders), or {FOLDER}")  # fmt: skip
    return _train_and_val(root)


def _train_and_val(root: Path) -> Parsed:
    """root/train/<class>/* and root/val/<class>/*, hidden files aside."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    (classes, index), (others, _) = (find_classes(root / part) for part in ("train", "val"))
    if differ := sorted(set(classes) ^ set(others)):
        raise UserError(f"{root}: train/ and val/ differ in {len(differ)} classes ({', '.join(differ[:3])}): "
                        f"give both the same, or {FOLDER}")  # fmt: skip
    parts = [make_dataset(root / part, index, IMG_EXTENSIONS) for part in ("train", "val")]
    seen = [[pair for pair in part if not os.path.basename(pair[0]).startswith(".")] for part in parts]
    return _joined(*seen, classes)


def _joined(train, test, class_names: list[str]) -> Parsed:
    """From (path, label) pairs of either part."""
    train, test = list(train), list(test)
    pairs = train + test
    return [str(path) for path, _ in pairs], [int(label) for _, label in pairs], len(train), list(class_names)


# ------------------------------------------------------------------------------------------- fetch, check, unpack


def _unpacked(folder: Path, url: str, checksum: str, members: list[str]) -> None:
    """See to it that `folder` has these top members of the archive at `url`, whole. Raises UserError."""
    from torchvision.datasets.utils import extract_archive

    if all((folder / member).exists() for member in members):
        return
    archive = _fetched(folder, url, checksum)
    aside = folder / f".{archive.name}.{os.getpid()}.tmp"
    print(f"data: unpacking {archive}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        extract_archive(str(archive), str(aside))
        for member in members:
            os.replace(aside / member, folder / member)
    except Exception as error:  # tarfile, zipfile, gzip, zlib and the disk all have their own
        raise UserError(f"could not unpack {archive} ({reason_of(error)}): free some space, or delete it and start "
                        f"again, or {FOLDER}") from error  # fmt: skip
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fetched(folder: Path, url: str, checksum: str) -> Path:
    """The file at `url`, downloaded into `folder` unless it lies there already, and checked. Raises UserError."""
    from torchvision.datasets.utils import download_url

    path = folder / url.rsplit("/", 1)[1]
    if path.exists():
        _check(path, checksum)
        return path
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # a half download never has the name of a whole one
    print(f"data: fetching {url}")
    try:
        download_url(url, str(folder), part.name)
        _check(part, checksum)
        os.replace(part, path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"could not fetch {url} ({reason_of(error)}): connect to the network once, or put the file at "
                        f"{path}, or {FOLDER}") from error  # fmt: skip
    finally:
        part.unlink(missing_ok=True)
    return path


def _digest(path: Path, kind: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _check(path: Path, published: str) -> None:
    """Raises UserError unless the file has this md5 or sha256."""
    kind = {32: "md5", 64: "sha256"}[len(published)]
    if (found := _digest(path, kind)) != published:
        raise UserError(f"{path} is damaged or another file (its {kind} is {found}, published is {published}): delete "
                        f"it and fetch it again, or {FOLDER}")  # fmt: skip


def _check_against_first_use(paths: list[Path], data_dir: Path) -> None:
    """For files without a published checksum: record their sha256 once in <data_dir>/checksums.json, compare later."""
    record = data_dir / "checksums.json"
    try:
        known = dict(json.loads(record.read_text())) if record.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{record} cannot be read ({reason_of(error)}): delete it, to record anew") from None
    for path in paths:
        name, found = path.relative_to(data_dir).as_posix(), _digest(path, "sha256")
        if name not in known:
            known[name] = found
            print(f"data: no checksum of {path} is published; {record} keeps its sha256 {found}")
            write_json(record, known)
        elif known[name] != found:
            raise UserError(f"{path} is not the file of its first use (sha256 {found}, {record} has {known[name]}): "
                            "put the old one back, or delete that entry to accept this one")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Named:
    parse: Callable[[Path], Parsed]
    size: int  # pixels of a side where no other size is asked for
    square: bool = False  # every image has that size already; those of the others are resized


NAMED = {
    "digits": Named(_digits, 8, True),  # come with scikit-learn
    "mnist": Named(partial(_by_train_flag, "MNIST"), 28, True),
    "fashion_mnist": Named(partial(_by_train_flag, "FashionMNIST"), 28, True),
    "cifar10": Named(partial(_by_train_flag, "CIFAR10"), 32, True),
    "cifar100": Named(partial(_by_train_flag, "CIFAR100"), 32, True),
    "svhn": Named(partial(_by_split, "SVHN"), 32, True),
    "stl10": Named(partial(_by_split, "STL10"), 96, True),
    "tiny_imagenet": Named(_tiny_imagenet, 64, True),
    "imagenet": Named(_imagenet, 64),
    "imagenette": Named(_imagenette, 224),
    "imagewoof": Named(_imagewoof, 224),
    "flowers": Named(_flowers, 64),
    "aircraft": Named(_aircraft, 64),
    "cars": Named(_cars, 64),
    "cub200": Named(_cub200, 64),
    "dogs": Named(_dogs, 64),
}
NO_FLIP = {"digits", "mnist", "svhn"}  # a mirrored digit is another thing
SOURCES = {  # where a file lies, and its published md5 or sha256, if torchvision does not fetch it or does not check it
    "tiny_imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                      "90528d7ca1a48142e341f4ef8d21d0de"),  # ContinualAI/avalanche and many others
    # from a table that agrees with torchvision on its sister imagenette2; the archive before 2022 had another
    "imagewoof": ("https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2.tgz", "9aafe18bcdb1632c4249a76c458465ba"),
    # tensorflow/datasets and torchvision's prototype loader
    "cub200": ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
               "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"),
    "dogs": ("http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar",  # both: tensorflow/datasets
             "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"),
    "dogs lists": ("http://vision.stanford.edu/aditya86/ImageNetDogs/lists.tar",
                   "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c"),
    "aircraft": ("https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                 "d4acdd33327262359767eeaa97a4f732"),  # google-deepmind/dm_nevis and others
    "cars test list": ("https://ai.stanford.edu/~jkrause/car196/cars_test_annos_withlabels.mat",  # gone
                       "790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05"),  # torchvision's prototype
}  # fmt: skip
WOOF = {
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle",
    "n02089973": "English foxhound", "n02093754": "Border terrier", "n02096294": "Australian terrier",
    "n02099601": "golden retriever", "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}  # fmt: skip
# Mean and std of the training pixels in [0, 1] of (set, size in pixels), as published code has them, so that published
# networks fit. What is not here is measured (the std shrinks with the image).
NORMALISATION = {
    ("mnist", 28): ((0.1307,), (0.3081,)),  # PyTorch's MNIST example
    ("fashion_mnist", 28): ((0.2860,), (0.3530,)),  # the values in common use
    ("svhn", 32): ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),  # DatasetCondensation's code
    ("imagenette", 224): ((0.4655, 0.4546, 0.4250), (0.2804, 0.2754, 0.2965)),  # KRR-ST's code, as all below
}
for _name, _mean, _std_32, _std_64 in (
    ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), (0.2469, 0.2433, 0.2614)),
    ("cifar100", (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), (0.2671, 0.2562, 0.2760)),
    ("aircraft", (0.4804, 0.5116, 0.5349), (0.2021, 0.1953, 0.2297), (0.2117, 0.2049, 0.2380)),
    ("cars", (0.4706, 0.4600, 0.4548), (0.2746, 0.2740, 0.2831), (0.2836, 0.2826, 0.2914)),
    ("cub200", (0.4857, 0.4995, 0.4324), (0.2145, 0.2098, 0.2496), (0.2218, 0.2170, 0.2564)),
    ("dogs", (0.4765, 0.4516, 0.3911), (0.2490, 0.2435, 0.2479), (0.2551, 0.2495, 0.2539)),
    # green: .3030 there at 32 px, a slip against its .3830 at 64 px
    ("flowers", (0.4344, 0.3830, 0.2955), (0.2811, 0.2318, 0.2607), (0.2878, 0.2390, 0.2674)),
    ("tiny_imagenet", (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), (0.2770, 0.2691, 0.2821)),
    ("imagenet", (0.4810, 0.4574, 0.4078), (0.2633, 0.2560, 0.2708), (0.2633, 0.2560, 0.2708)),
):
    NORMALISATION |= {(_name, 32): (_mean, _std_32), (_name, 64): (_mean, _std_64)}
