"""Every named set from a small made copy of its true layout, and from real images where a pack of them is there."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import refuse as refuse_words
from PIL import Image
from scipy.io import savemat

import common.data
from common import sets
from common.data import NAMED, NO_FLIP, NORMALISATION, load

PACKS = Path(__file__).parents[2] / "shared" / "data"
FOLDER = "--data at a folder with train/<class>/* and test/<class>/*"
ARRAYS = ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "stl10"]
ARCHIVES = {  # of the sets that are unpacked here; what is unpacked, the archive
    "tiny_imagenet": ("tiny-imagenet-200", "tiny-imagenet-200.zip"),
    "imagenette": ("imagenette2", "imagenette2.tgz"),
    "imagewoof": ("imagewoof2", "imagewoof2.tgz"),
    "flowers": ("flowers-102/jpg", "flowers-102/102flowers.tgz"),
    "aircraft": ("fgvc-aircraft-2013b", "fgvc-aircraft-2013b.tar.gz"),
    "cub200": ("CUB_200_2011", "CUB_200_2011.tgz"),
    "dogs": ("stanford_dogs/Images", "stanford_dogs/images.tar"),
}
LOCAL = ["cars", "imagenet"]  # not fetched


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        assert socket.getdefaulttimeout() == 20
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    yield
    assert socket.getdefaulttimeout() is None


def refuse(call, *words):
    return refuse_words(call, *map(str, words))


# ------------------------------------------------------------------------------------- the layouts, written with images
# Each builder writes (image, label) pairs as the set is published, has its checksums accepted, and returns the pairs
# of both parts in the order of the set, and the class names. Images are JPEG bytes, or arrays where the set has pixels.


def pixels(*shape, key=0):
    return np.random.default_rng(key).integers(0, 256, shape, np.uint8)


def jpeg(key, width=30, height=20, grey=False):
    coarse = Image.fromarray(pixels(5, 5, key=key) if grey else pixels(5, 5, 3, key=key))
    file = io.BytesIO()
    coarse.resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def md5(content):
    return hashlib.md5(content).hexdigest()


def mat(**values):
    file = io.BytesIO()
    savemat(file, values)
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def packed(path, files):
    """An archive of files (and their folders), by its suffix; returns its md5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {name: content if isinstance(content, bytes) else content.encode() for name, content in files.items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), 1_000_000_000
                archive.addfile(info, io.BytesIO(content))
    return md5(path.read_bytes())


def accept(patch, name, path, kind="md5"):
    patch.setitem(sets.SOURCES, name, (sets.SOURCES[name][0], hashlib.new(kind, path.read_bytes()).hexdigest()))


def write_mnist(root, patch, train, test, name="MNIST"):
    made, kind = {}, getattr(torchvision.datasets, name)
    for prefix, part in (("train", train), ("t10k", test)):
        x, y = np.stack([x for x, _ in part]), np.array([y for _, y in part], np.uint8)
        made[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(struct.pack(">4i", 2051, len(x), 28, 28) + x.tobytes())
        made[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(struct.pack(">2i", 2049, len(y)) + y.tobytes())
    write(root / name / "raw", made)
    patch.setattr(kind, "resources", [(file, md5(content)) for file, content in made.items()])
    return train, test, kind.classes


def write_fashion_mnist(root, patch, train, test):
    return write_mnist(root, patch, train, test, "FashionMNIST")


def write_cifar10(root, patch, train, test):
    kind, names = torchvision.datasets.CIFAR10, [f"thing {i}" for i in range(10)]
    parts = {f"data_batch_{i + 1}": train[i::5] for i in range(5)} | {"test_batch": test}
    files = {name: pickle.dumps({"data": np.stack([x.transpose(2, 0, 1).reshape(-1) for x, _ in part]),
                                 "labels": [y for _, y in part]}, 2) for name, part in parts.items()}  # fmt: skip
    files["batches.meta"] = pickle.dumps({"label_names": names}, 2)
    write_cifar(root, patch, kind, files, 5)
    return [pair for i in range(5) for pair in train[i::5]], test, names


def write_cifar100(root, patch, train, test):
    kind, names = torchvision.datasets.CIFAR100, [f"thing {i}" for i in range(100)]
    files = {name: pickle.dumps({"data": np.stack([x.transpose(2, 0, 1).reshape(-1) for x, _ in part]),
                                 "fine_labels": [y for _, y in part], "coarse_labels": [0] * len(part)}, 2)
             for name, part in (("train", train), ("test", test))}  # fmt: skip
    files["meta"] = pickle.dumps({"fine_label_names": names, "coarse_label_names": ["x"]}, 2)
    write_cifar(root, patch, kind, files, 1)
    return train, test, names


def write_cifar(root, patch, kind, files, n_train):
    sums = [[name, md5(content)] for name, content in files.items()]
    patch.setattr(kind, "tgz_md5", packed(root / kind.filename, {f"{kind.base_folder}/{n}": files[n] for n in files}))
    patch.setattr(kind, "train_list", sums[:n_train])
    patch.setattr(kind, "test_list", sums[n_train:-1])
    patch.setattr(kind, "meta", kind.meta | {"md5": sums[-1][1]})


def write_svhn(root, patch, train, test):
    splits = {}
    for name, part in (("train", train), ("test", test)):
        file = mat(X=np.stack([x for x, _ in part], 3), y=np.array([[y or 10] for _, y in part], np.uint8))  # 0 is 10
        write(root, {f"{name}_32x32.mat": file})
        splits[name] = ["http://none", f"{name}_32x32.mat", md5(file)]
    patch.setattr(torchvision.datasets.SVHN, "split_list", splits)
    return train, test, list("0123456789")


def write_stl10(root, patch, train, test):
    kind, names = torchvision.datasets.STL10, ["airplane", "bird", "car"]
    files = {"unlabeled_X.bin": pixels(2, 3, 96, 96).tobytes()}
    for name, part in (("train", train), ("test", test)):
        files[f"{name}_X.bin"] = np.stack([x.transpose(2, 1, 0) for x, _ in part]).tobytes()  # columns first
        files[f"{name}_y.bin"] = bytes(y + 1 for _, y in part)
    patch.setattr(kind, "train_list", [[n, md5(files[n])] for n in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")])
    patch.setattr(kind, "test_list", [[n, md5(files[n])] for n in ("test_X.bin", "test_y.bin")])
    files |= {"class_names.txt": "\n".join(names) + "\n", "fold_indices.txt": "0 1\n"}
    patch.setattr(kind, "tgz_md5", packed(root / kind.filename, {f"stl10_binary/{n}": files[n] for n in files}))
    return train, test, names


def by_class(parts, wnids, top=""):
    """{part}/{wnid}/... files, and the pairs in the order of their names."""
    files, ordered = {}, []
    for part, pairs in parts.items():
        made = {f"{top}{part}/{wnids[y]}/{wnids[y]}_{i:04d}.JPEG": (x, y) for i, (x, y) in enumerate(pairs)}
        files |= {name: x for name, (x, _) in made.items()}
        ordered.append([made[name] for name in sorted(made)])
    return files, *ordered


def write_imagenette(root, patch, train, test):
    kind = torchvision.datasets.Imagenette
    files, train, test = by_class({"train": train, "val": test}, list(kind._WNID_TO_CLASS)[:3], "imagenette2/")
    total = packed(root / "imagenette2.tgz", files | {"imagenette2/noisy_imagenette.csv": "path,label\n"})
    patch.setattr(kind, "_ARCHIVES", {"full": (kind._ARCHIVES["full"][0], total)})
    return train, test, ["tench", "English springer", "cassette player"]


def write_imagewoof(root, patch, train, test):
    wnids = ["n02086240", "n02087394", "n02088364", "n02089973", "n02093754",
             "n02096294", "n02099601", "n02105641", "n02111889", "n02115641"]  # fmt: skip
    names = ["Shih-Tzu", "Rhodesian ridgeback", "beagle", "English foxhound", "Border terrier",
             "Australian terrier", "golden retriever", "Old English sheepdog", "Samoyed", "dingo"]  # fmt: skip
    for label in range(3, 10):
        train, test = [*train, (jpeg(label + 50), label)], [*test, (jpeg(label + 70), label)]
    files, train, test = by_class({"train": train, "val": test}, wnids, "imagewoof2/")
    packed(root / "imagewoof2.tgz", files | {"imagewoof2/noisy_imagewoof.csv": "path,label\n"})
    accept(patch, "imagewoof", root / "imagewoof2.tgz")
    return train, test, names


def write_imagenet(root, patch, train, test):
    files, train, test = by_class({"train": train, "val": test}, ["n01440764", "n01443537", "n01484850"])
    write(root / "imagenet", files | {"train/n01443537/._n01443537_0001.JPEG": b"\0\5\26\7", "train/list.txt": "x"})
    return train, test, ["n01440764", "n01443537", "n01484850"]


def write_tiny_imagenet(root, patch, train, test):
    wnids = ["n02124075", "n04067472", "n01443537"] + [f"n{i:08d}" for i in range(20000000, 20000197)]
    files, annotations = {}, []
    for i, (x, y) in enumerate(train):
        files[f"train/{wnids[y]}/images/{wnids[y]}_{i}.JPEG"] = x
    for y in range(3):
        files[f"train/{wnids[y]}/{wnids[y]}_boxes.txt"] = f"{wnids[y]}_0.JPEG\t0\t0\t9\t9\n"
    for i, (x, y) in enumerate(test):
        files[f"val/images/val_{i}.JPEG"] = x
        annotations.append(f"val_{i}.JPEG\t{wnids[y]}\t0\t32\t44\t62\n")
    used = sorted({y for _, y in train})
    wnids = [wnid for y, wnid in enumerate(wnids) if y in used]
    files |= {
        "test/images/test_0.JPEG": jpeg(99, 64, 64),
        "val/val_annotations.txt": "".join(annotations),
        "wnids.txt": "\n".join(wnids),  # without a last newline, as published
        "words.txt": "n00001740\tentity\n" + "".join(f"{wnid}\tthing {wnid}, its Latin name\n" for wnid in wnids[::-1]),
    }
    packed(root / "tiny-imagenet-200.zip", {f"tiny-imagenet-200/{name}": files[name] for name in files})
    accept(patch, "tiny_imagenet", root / "tiny-imagenet-200.zip")
    order = sorted((wnids[y], f"{wnids[y]}_{i}.JPEG", i) for i, (_, y) in enumerate(train))
    return [train[i] for *_, i in order], test, [f"thing {wnid}" for wnid in wnids]


def write_flowers(root, patch, train, test):
    val = [(jpeg(98), 0)]
    pairs = [*test, *val, *train]  # the numbers of the files say nothing of the split
    labels = mat(labels=np.array([[y + 1 for _, y in pairs]], np.uint8))
    ends = np.cumsum([0, len(test), len(val), len(train)]) + 1
    ids = mat(
        **{
            part: np.arange(*ends[i : i + 2], dtype=np.uint16)[None]
            for i, part in enumerate(("tstid", "valid", "trnid"))
        }
    )
    folder, kind = root / "flowers-102", torchvision.datasets.Flowers102
    write(folder, {"imagelabels.mat": labels, "setid.mat": ids})
    total = packed(folder / "102flowers.tgz", {f"jpg/image_{i + 1:05d}.jpg": x for i, (x, _) in enumerate(pairs)})
    patch.setattr(kind, "_file_dict", {"image": ("102flowers.tgz", total), "label": ("imagelabels.mat", md5(labels)),
                                       "setid": ("setid.mat", md5(ids))})  # fmt: skip
    return train, test, kind.classes


def write_aircraft(root, patch, train, test):
    names, files = ["707-320", "An-12", "Cessna 208", "F-16A/B"], {}
    for part, pairs, start in (("trainval", train, 500), ("test", test, 100)):
        for i, (x, _) in enumerate(pairs):
            files[f"images/{start - i:07d}.jpg"] = x  # the order is that of the list
        files[f"images_variant_{part}.txt"] = "".join(f"{start - i:07d} {names[y]}\n" for i, (_, y) in enumerate(pairs))
        files[f"images_family_{part}.txt"] = "".join(f"{start - i:07d} Other\n" for i in range(len(pairs)))
    files |= {"variants.txt": "\n".join(names) + "\n", "families.txt": "Other\n", "manufacturers.txt": "Other\n"}
    archive = root / "fgvc-aircraft-2013b.tar.gz"
    packed(archive, {f"fgvc-aircraft-2013b/data/{name}": files[name] for name in files})
    accept(patch, "aircraft", archive)
    return train, test, names


def write_cars(root, patch, train, test):
    names, files = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo 2012"], {}
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    lists = {}
    for part, pairs in (("train", train), ("test", test)):
        rows = []
        for i, (x, y) in enumerate(pairs):
            files[f"cars_{part}/{i + 1:05d}.jpg"] = x
            rows.append((1, 2, 3, 4, np.uint8(y + 1), f"{i + 1:05d}.jpg"))
        lists[part] = mat(annotations=np.array([rows[::-1]], dtype=fields)[0][None])
    files["devkit/cars_train_annos.mat"], files["cars_test_annos_withlabels.mat"] = lists["train"], lists["test"]
    files["devkit/cars_meta.mat"] = mat(class_names=np.array([names], dtype=object))
    write(root / "stanford_cars", files)
    accept(patch, "cars test list", root / "stanford_cars/cars_test_annos_withlabels.mat", "sha256")
    return train[::-1], test[::-1], names


def write_cub200(root, patch, train, test):
    pairs = [(pair, is_train) for i in range(max(len(train), len(test)))
             for part, is_train in ((test, 0), (train, 1)) for pair in part[i : i + 1]]  # fmt: skip
    n_classes = max(y for (_, y), _ in pairs) + 1
    classes = [f"{y + 1:03d}.Black_footed_Bird-{y}" for y in range(n_classes)]
    names = [f"{classes[y]}/Bird_{i:04d}.jpg" for i, ((_, y), _) in enumerate(pairs)]
    files = {f"images/{name}": x for name, ((x, _), _) in zip(names, pairs, strict=True)} | {
        "images.txt": "".join(f"{i + 1} {name}\n" for i, name in enumerate(names)),
        "image_class_labels.txt": "".join(f"{i + 1} {y + 1}\n" for i, ((_, y), _) in enumerate(pairs)),
        "train_test_split.txt": "".join(f"{i + 1} {is_train}\n" for i, (_, is_train) in enumerate(pairs)),
        "classes.txt": "".join(f"{y + 1} {name}\n" for y, name in enumerate(classes)),
        "parts/parts.txt": "1 back\n",
    }
    archive = root / "CUB_200_2011.tgz"
    packed(archive, {"attributes.txt": "1 has\n"} | {f"CUB_200_2011/{name}": files[name] for name in files})
    accept(patch, "cub200", archive, "sha256")
    return train, test, [f"Black footed Bird-{y}" for y in range(n_classes)]


def write_dogs(root, patch, train, test):
    folders = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02095314-wire-haired_fox_terrier"]
    files, lists, folder = {}, {}, root / "stanford_dogs"
    for part, pairs in (("train", train), ("test", test)):
        names = [f"{folders[y]}/{folders[y][:9]}_{900 - i}{part}.jpg" for i, (_, y) in enumerate(pairs)]
        files |= {f"Images/{name}": x for name, (x, _) in zip(names, pairs, strict=True)}
        lists[f"{part}_list.mat"] = mat(file_list=np.array([[name] for name in names], object),
                                        labels=np.array([[y + 1.0] for _, y in pairs]))  # fmt: skip
    packed(folder / "images.tar", files)
    packed(folder / "lists.tar", lists | {"file_list.mat": lists["train_list.mat"]})
    accept(patch, "dogs", folder / "images.tar", "sha256")
    accept(patch, "dogs lists", folder / "lists.tar", "sha256")
    return train, test, ["Chihuahua", "Japanese spaniel", "wire-haired fox terrier"]


def build(name, root, patch, train=None, test=None):
    """Write the set below root, of made images unless others are given; (train, test, class names) as it must load."""
    if name in ARRAYS:
        side = NAMED[name].size
        shape = (side, side) if "mnist" in name else (side, side, 3)
        train = train or [(pixels(*shape, key=i), (2, 0, 1, 1, 0)[i]) for i in range(5)]
        test = test or [(pixels(*shape, key=9 + i), (1, 0, 2)[i]) for i in range(3)]
    square = name == "tiny_imagenet"
    sizes = [(64, 64)] * 5 if square else [(30, 20), (21, 33), (25, 25), (70, 66), (12, 90)]
    train = train or [(jpeg(i, *sizes[i], grey=i == 1), (2, 0, 1, 1, 0)[i]) for i in range(5)]
    test = test or [(jpeg(9 + i, *sizes[i], grey=i == 0), (1, 0, 2)[i]) for i in range(3)]
    return globals()[f"write_{name}"](root, patch, train, test)


def expected(pairs, side, square):
    """(N, C, H, W) of (image, label) pairs: decoded as RGB and squashed, with Pillow alone."""
    images = []
    for image, _ in pairs:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image)).convert("RGB")
            image = np.asarray(image if square else image.resize((side, side), Image.Resampling.LANCZOS))
        images.append(torch.tensor(image[None] if image.ndim == 2 else image.transpose(2, 0, 1)))
    return torch.stack(images)


def check(data, name, train, test, names):
    """That data is the set as built."""
    side = NAMED[name].size
    square = name in ARRAYS or name == "tiny_imagenet"
    for x, y, pairs in ((data.x_train, data.y_train, train), (data.x_test, data.y_test, test)):
        assert y.tolist() == [label for _, label in pairs]
        assert torch.equal(x, expected(pairs, side, square))
    assert data.class_names == list(names) and data.name == name and data.native and data.skipped == 0
    assert data.resize == ("none" if square else "squash") and data.flip == (name not in NO_FLIP)
    mean, std = NORMALISATION.get((name, side), (None, None))
    if mean is None:
        pixel = data.x_train.double() / 255
        mean, std = pixel.mean((0, 2, 3)), pixel.std((0, 2, 3), correction=0)
    assert torch.allclose(data.mean.double(), torch.as_tensor(mean).double(), atol=1e-6)
    assert torch.allclose(data.std.double(), torch.as_tensor(std).double(), atol=1e-6)


ALL = [*ARRAYS, *ARCHIVES, *LOCAL]


def test_every_named_set_is_tested_here():
    assert sorted([*ALL, "digits"]) == sorted(NAMED)
    sizes = dict(digits=8, mnist=28, fashion_mnist=28, cifar10=32, cifar100=32, svhn=32, stl10=96, tiny_imagenet=64,
                 imagenette=224, imagewoof=224)  # fmt: skip
    assert {name: NAMED[name].size for name in NAMED} == dict.fromkeys(NAMED, 64) | sizes
    assert {"digits", "mnist", "svhn"} == NO_FLIP


@pytest.mark.parametrize("name", ALL)
def test_from_its_true_layout(tmp_path, monkeypatch, name):
    train, test, names = build(name, tmp_path, monkeypatch)
    data = load(name, data_dir=tmp_path, labelled=True)
    check(data, name, train, test, names)
    archives = [path for path in tmp_path.rglob("*") if path.name.endswith((".tgz", ".tar", ".gz", ".zip"))]
    assert bool(archives) == (name not in [*LOCAL, "svhn"])
    for path in archives:  # once unpacked they may go
        path.unlink()
    monkeypatch.setattr(common.data, "_open", lambda item: pytest.fail(f"decoded {item}"))
    again = load(name, data_dir=tmp_path)
    check(again, name, train, test, names)
    assert again.content == data.content
    assert not [path for path in tmp_path.rglob(".*") if not path.name.startswith("._")]  # no temporary file is left


@pytest.mark.parametrize("name", ["cifar10", "cub200", "imagenette"])
def test_other_sizes_channels_and_rules(tmp_path, monkeypatch, name):
    train, _, _ = build(name, tmp_path, monkeypatch)
    own = load(name, data_dir=tmp_path)
    same = load(name, data_dir=tmp_path, size=own.size)
    assert same.native and same.content == own.content and same.resize == own.resize
    assert len(list(tmp_path.glob("cache/*.u8"))) == (name != "cifar10")
    small = load(name, data_dir=tmp_path, size=20, resize="crop")
    assert small.size == 20 and not small.native and small.resize == "crop"
    image = train[0][0]
    image = Image.fromarray(image) if name == "cifar10" else Image.open(io.BytesIO(image)).convert("RGB")
    short = min(image.size)
    image = image.resize(tuple(20 * side // short for side in image.size), Image.Resampling.LANCZOS)
    left, top = ((side - 20) // 2 for side in image.size)
    image = image.crop((left, top, left + 20, top + 20))
    assert torch.equal(small.x_train[0], torch.tensor(np.asarray(image).transpose(2, 0, 1)))
    grey = load(name, data_dir=tmp_path, channels="grey")
    assert grey.channels == 1 and grey.native and grey.content != own.content


def test_imagenet_is_reduced_once_or_kept_at_another_size(tmp_path, monkeypatch):
    build("imagenet", tmp_path, monkeypatch)
    load("imagenet", data_dir=tmp_path)
    native = load("imagenet", data_dir=tmp_path, size=224)
    assert native.size == 224 and not native.native
    assert len(list(tmp_path.glob("cache/imagenet-*.u8"))) == 2


# ------------------------------------------------------------------------------------------------------- normalisation


def close(values, wanted):
    return torch.allclose(values, torch.tensor(wanted), atol=1e-7, rtol=0)


def test_published_statistics_are_used_at_their_size_only(tmp_path, monkeypatch):
    build("cub200", tmp_path, monkeypatch)
    get = lambda **options: load("cub200", data_dir=tmp_path, **options)  # noqa: E731
    assert close(get().mean, (0.4857, 0.4995, 0.4324)) and close(get().std, (0.2218, 0.2170, 0.2564))
    assert close(get(size=32).std, (0.2145, 0.2098, 0.2496)) and close(get(channels="rgb").std, get().std.tolist())
    for options in ({"size": 48}, {"resize": "crop"}, {"size": 32, "resize": "crop"}, {"channels": "grey"}):
        data = get(**options)
        assert torch.allclose(data.mean, (data.x_train / 255.0).mean((0, 2, 3)), atol=1e-6), options
        assert torch.allclose(data.std, (data.x_train / 255.0).std((0, 2, 3), correction=0), atol=1e-6), options


def test_arrays_have_their_statistics_too(tmp_path, monkeypatch):
    build("cifar10", tmp_path, monkeypatch)
    assert close(load("cifar10", data_dir=tmp_path).std, (0.2470, 0.2435, 0.2616))
    assert close(load("cifar10", data_dir=tmp_path, size=64).std, (0.2469, 0.2433, 0.2614))
    grey = load("cifar10", data_dir=tmp_path, channels="grey")
    assert torch.allclose(grey.mean, (grey.x_train / 255.0).mean(), atol=1e-6)
    build("mnist", tmp_path, monkeypatch)
    assert close(load("mnist", data_dir=tmp_path).mean, (0.1307,))
    assert load("mnist", data_dir=tmp_path, channels="rgb").mean.shape == (3,)


def test_a_folder_never_takes_the_statistics_of_a_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, part in enumerate(("train/a", "train/b", "test/a", "test/b")):
        write(tmp_path / "cub200" / part, {"x.jpg": jpeg(i)})
    data = load("./cub200", size=64, channels="rgb")
    assert torch.allclose(data.mean, (data.x_train / 255.0).mean((0, 2, 3)), atol=1e-6)
    assert data.name == "cub200" and not data.native


def test_the_table_has_what_the_released_code_has():
    assert len(NORMALISATION) == 4 + 2 * 9 and {name for name, _ in NORMALISATION} < set(NAMED)
    for (name, _), (mean, std) in NORMALISATION.items():
        assert len(mean) == len(std) == (1 if "mnist" in name else 3)
    assert NORMALISATION["flowers", 32][0][1] == 0.3830  # not .3030
    assert NORMALISATION["imagenette", 224] == ((0.4655, 0.4546, 0.4250), (0.2804, 0.2754, 0.2965))


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("name", ALL)
def test_a_source_that_is_gone_is_one_line_with_the_way_out(tmp_path, name):
    for _ in range(2):  # whatever the first try left behind
        line = refuse(lambda: load(name, data_dir=tmp_path), FOLDER)
        assert name in LOCAL or ("no route to host" in line and "connect to the network" in line)
        assert name in line or Path(ARCHIVES[name][1]).name in line or "lists.tar" in line or "imagelabels.mat" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_network_prints_nothing_of_torchvisions(tmp_path, capfd):
    refuse(lambda: load("cifar100", data_dir=tmp_path), "could not load cifar100")
    assert capfd.readouterr() == ("", "")


def test_imagenet_and_cars_say_where_they_belong(tmp_path, monkeypatch):
    refuse(
        lambda: load("imagenet", data_dir=tmp_path), f"{tmp_path}/imagenet", "train/<wnid>/*", "val/<wnid>/*", "sort"
    )
    refuse(lambda: load("cars", data_dir=tmp_path), f"{tmp_path}/stanford_cars", "torchvision.datasets.StanfordCars")
    build("imagenet", tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "imagenet/val/n01443537")
    refuse(lambda: load("imagenet", data_dir=tmp_path), "differ in 1 classes (n01443537)")
    shutil.rmtree(tmp_path / "imagenet/val")
    write(tmp_path / "imagenet/val", {"ILSVRC2012_val_00000001.JPEG": jpeg(1)})  # as it is published
    refuse(lambda: load("imagenet", data_dir=tmp_path), f"{tmp_path}/imagenet/val has no class folders", "sort it")
    build("cars", tmp_path, monkeypatch)
    (tmp_path / "stanford_cars/cars_test_annos_withlabels.mat").unlink()
    refuse(lambda: load("cars", data_dir=tmp_path), "cars_test_annos_withlabels.mat is not there")


class Server:
    """urlopen for the files of a folder by their names; counts what it sent, and sends `cut` bytes less of each."""

    def __init__(self, folder, cut=0):
        self.files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.sent, self.cut = [], cut

    def __call__(self, request):
        assert socket.getdefaulttimeout() == 20
        name = request.full_url.rsplit("/", 1)[1]
        content = self.files[name][: len(self.files[name]) - self.cut]
        if "Method" not in request.headers:  # torchvision's look at where an address leads
            self.sent.append(request.full_url)
        response = io.BytesIO(content)
        response.url, response.length = request.full_url, len(self.files[name])
        return response


@pytest.mark.parametrize("name", [*ARCHIVES, "svhn", "cifar100", "mnist"])
def test_fetched_once(tmp_path, monkeypatch, name):
    made = build(name, tmp_path / "server", monkeypatch)
    server = Server(tmp_path / "server")
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", {
        part: [f"http://none/{part}_32x32.mat", *rest]
        for part, (_, *rest) in torchvision.datasets.SVHN.split_list.items()})  # fmt: skip
    monkeypatch.setattr(urllib.request, "urlopen", server)
    for _ in range(2):
        check(load(name, data_dir=tmp_path / "data"), name, *made)
    assert len(server.sent) == len(set(server.sent)) == {"flowers": 3, "dogs": 2, "svhn": 2, "mnist": 4}.get(name, 1)
    if name in sets.SOURCES:
        assert sets.SOURCES[name][0] in server.sent


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_truncated_download_is_refused_and_leaves_nothing(tmp_path, monkeypatch, name):
    made = build(name, tmp_path / "server", monkeypatch)
    monkeypatch.setattr(urllib.request, "urlopen", Server(tmp_path / "server", cut=1))
    refuse(lambda: load(name, data_dir=tmp_path / "data"), "damaged", "published", FOLDER)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    monkeypatch.setattr(urllib.request, "urlopen", Server(tmp_path / "server"))
    check(load(name, data_dir=tmp_path / "data"), name, *made)


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_wrong_archive_is_named_and_kept(tmp_path, monkeypatch, name):
    made = build(name, tmp_path, monkeypatch)
    archive = tmp_path / ARCHIVES[name][1]
    whole = archive.read_bytes()
    for content in (whole[:-1], whole[:100], b"", whole + b"\0"):
        archive.write_bytes(content)
        refuse(lambda: load(name, data_dir=tmp_path), archive, "damaged", "delete it and fetch it again", FOLDER)
        assert archive.read_bytes() == content and not (tmp_path / ARCHIVES[name][0]).exists()
    archive.write_bytes(whole)
    check(load(name, data_dir=tmp_path), name, *made)


@pytest.mark.parametrize("name", ["tiny_imagenet", "cub200", "dogs"])
def test_an_archive_that_does_not_unpack_is_named(tmp_path, monkeypatch, name):
    build(name, tmp_path, monkeypatch)
    archive = tmp_path / ARCHIVES[name][1]
    archive.write_bytes(b"not an archive" * 99)
    accept(monkeypatch, name, archive)
    refuse(lambda: load(name, data_dir=tmp_path), f"could not unpack {archive}", "delete it", FOLDER)
    packed(archive, {"something/else.txt": "x"})
    accept(monkeypatch, name, archive)
    refuse(lambda: load(name, data_dir=tmp_path), f"could not unpack {archive}")
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_killed_extraction_is_not_taken_for_whole(tmp_path, monkeypatch, name):
    made = build(name, tmp_path, monkeypatch)
    extract = torchvision.datasets.utils.extract_archive

    def killed(archive, folder):
        extract(archive, folder)
        image = next(path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg"))
        image.unlink()  # the last one to come, say
        shutil.copytree(folder, tmp_path / "seen")
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", killed)
    if name == "dogs":  # the lists come first
        with tarfile.open(tmp_path / "stanford_dogs/lists.tar") as lists:
            lists.extractall(tmp_path / "stanford_dogs", filter="data")
    with pytest.raises(KeyboardInterrupt):
        load(name, data_dir=tmp_path)
    assert not (tmp_path / ARCHIVES[name][0]).exists()
    # a kill that leaves no time to clean up, of a process with the same number
    aside = (tmp_path / ARCHIVES[name][1]).parent / f".{Path(ARCHIVES[name][1]).name}.{os.getpid()}.tmp"
    assert not aside.exists()
    shutil.move(tmp_path / "seen", aside)
    image = next(path for path in aside.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    shutil.copy(image, image.with_stem("stale"))
    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", extract)
    check(load(name, data_dir=tmp_path), name, *made)
    assert not aside.exists()


@pytest.mark.parametrize("name", ["mnist", "cifar10", "stl10", "svhn"])
def test_damaged_files_of_torchvisions_sets_are_one_line(tmp_path, monkeypatch, name):
    build(name, tmp_path, monkeypatch)
    load(name, data_dir=tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    refuse(lambda: load(name, data_dir=tmp_path), f"could not load {name} from {tmp_path}", "delete", FOLDER)


def test_a_wrong_test_list_of_cars_is_refused(tmp_path, monkeypatch):
    build("cars", tmp_path, monkeypatch)
    path = tmp_path / "stanford_cars/cars_test_annos_withlabels.mat"
    path.write_bytes(path.read_bytes() + b"\0")
    refuse(lambda: load("cars", data_dir=tmp_path), path, "sha256", "published")


def test_unpublished_checksums_are_recorded_on_first_use(tmp_path, monkeypatch, capsys):
    build("cars", tmp_path, monkeypatch)
    load("cars", data_dir=tmp_path)
    files = ["stanford_cars/devkit/cars_meta.mat", "stanford_cars/devkit/cars_train_annos.mat"]
    wanted = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files}
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "checksums.json").read_text()) == wanted
    assert all(f"{tmp_path / name} is published" in printed and wanted[name] in printed for name in files)
    load("cars", data_dir=tmp_path)
    assert "published" not in capsys.readouterr().out
    path = tmp_path / files[0]
    path.write_bytes(mat(class_names=np.array([["a", "b", "c"]], dtype=object)))
    refuse(lambda: load("cars", data_dir=tmp_path), path, "first use", wanted[files[0]], tmp_path / "checksums.json")
    assert json.loads((tmp_path / "checksums.json").read_text()) == wanted  # the refused one is not recorded
    (tmp_path / "checksums.json").write_text("{")
    refuse(lambda: load("cars", data_dir=tmp_path), f"{tmp_path}/checksums.json", "delete it")
    (tmp_path / "checksums.json").unlink()
    assert load("cars", data_dir=tmp_path).class_names == ["a", "b", "c"]


def test_other_labels_of_the_same_files_are_another_entry(tmp_path, monkeypatch):
    build("cub200", tmp_path, monkeypatch)
    before = load("cub200", data_dir=tmp_path)
    path = tmp_path / "CUB_200_2011/image_class_labels.txt"
    path.write_text(path.read_text().replace("1 2\n", "1 3\n", 1))  # the first image, of the test
    after = load("cub200", data_dir=tmp_path)
    assert after.y_test.tolist() == [2, *before.y_test.tolist()[1:]] and after.content != before.content
    path = tmp_path / "CUB_200_2011/classes.txt"
    path.write_text(path.read_text().replace("Black", "White"))
    renamed = load("cub200", data_dir=tmp_path)
    assert renamed.class_names[0] == "White footed Bird-0" and renamed.content != after.content


def test_a_missing_image_of_a_list_is_named(tmp_path, monkeypatch):
    build("dogs", tmp_path, monkeypatch)
    load("dogs", data_dir=tmp_path)
    path = next(tmp_path.glob("stanford_dogs/Images/*/*.jpg"))
    path.unlink()
    refuse(lambda: load("dogs", data_dir=tmp_path), path, "fetch it again")


def test_a_bad_image_of_a_set_can_be_skipped(tmp_path, monkeypatch):
    train, test, names = build("imagenet", tmp_path, monkeypatch)
    bad = tmp_path / "imagenet/train/n01440764/n01440764_0001.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    refuse(lambda: load("imagenet", data_dir=tmp_path), bad, "--skip-bad-images")
    data = load("imagenet", data_dir=tmp_path, skip_bad_images=True)
    assert data.skipped == 1 and data.native
    assert torch.equal(data.x_train, expected(train[1:], 64, False)) and data.y_train.tolist() == [0, 1, 1, 2]
    assert torch.equal(data.x_test, expected(test, 64, False)) and data.class_names == names


# ---------------------------------------------------------------------------------------------------------- real images


def pack(name, n_train=30, n_test=10):
    """((image, label) pairs of both parts, class names) of the first images of a pack of real ones."""
    path = PACKS / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"needs the pack of real images {path.name} in shared/data")
    with np.load(path) as z:
        labels, offsets = z["labels"].tolist(), z["offsets"] if "offsets" in z.files else None
        source, starts = z["blob" if offsets is not None else "images"], np.searchsorted(z["split"], [0, 1])
        image = lambda i: source[i] if offsets is None else source[offsets[i] : offsets[i + 1]].tobytes()  # noqa: E731
        parts = [[(image(i), labels[i]) for i in range(start, start + n)]
                 for start, n in zip(starts, (n_train, n_test), strict=True)]  # fmt: skip
        return *parts, [str(name) for name in z["class_names"]]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_pixels_in_the_layout_of_cifar(tmp_path, monkeypatch, name):
    decoded = [[(np.asarray(Image.open(io.BytesIO(x))), y) for x, y in part] for part in pack(name)[:2]]
    made = build(name, tmp_path, monkeypatch, *decoded)
    data = load(name, data_dir=tmp_path)
    check(data, name, *made)
    assert 0.1 < data.x_train.float().std() / 255 < 0.4  # pictures, not noise


def test_real_digits_in_the_layout_of_mnist(tmp_path, monkeypatch):
    made = build("mnist", tmp_path, monkeypatch, *pack("mnist")[:2])
    check(load("mnist", data_dir=tmp_path), "mnist", *made)


@pytest.mark.parametrize(
    "name, source", [("tiny_imagenet", "tinyimagenet64_sub"), ("flowers", "flowers17_64"), ("cub200", "cub100_64")]
)
def test_real_jpegs_in_their_layouts(tmp_path, monkeypatch, name, source):
    train, test, _ = pack(source, n_train=65, n_test=40)  # image 62 of Tiny-ImageNet's is grey
    if name == "tiny_imagenet":
        assert Image.open(io.BytesIO(train[62][0])).mode == "L"
        used = sorted({y for _, y in train})  # the layout has a folder for every class
        train, test = ([(x, used.index(y)) for x, y in part if y in used] for part in (train, test))
    made = build(name, tmp_path, monkeypatch, train, test)
    check(load(name, data_dir=tmp_path), name, *made)


def test_an_unpacked_pack_is_a_folder(tmp_path):
    train, test, names = pack("cifar10", 60, 60)
    for part, pairs in (("train", train), ("test", test)):  # as shared/data/unpack.py has it
        for i, (x, y) in enumerate(pairs):
            write(tmp_path / "real" / part / f"{y:03d}_{names[y]}", {f"{i:05d}.jpg": x})
    data = load(str(tmp_path / "real"), data_dir=tmp_path, labelled=True)
    assert data.class_names == [f"{y:03d}_{name}" for y, name in enumerate(names)] and not data.native
    for x, y, pairs in ((data.x_train, data.y_train, train), (data.x_test, data.y_test, test)):
        pairs = sorted(pairs, key=lambda pair: pair[1])
        assert y.tolist() == [label for _, label in pairs] and torch.equal(x, expected(pairs, 32, True))
