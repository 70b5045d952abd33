"""Named sets and image folders on small made files; no network."""

import contextlib
import json
import os
import socket
import struct
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling

import common.data
from common.data import NAMED, NORMALISATION, denormalise, describe, load, normalise
from common.run import UserError


def pixels(*shape, key=0):
    return np.random.default_rng(key).integers(0, 256, shape, np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def fill(folder, counts, shape=(6, 6, 3), key=0):
    """counts: {"train/cat": 3, ...}; returns {path below folder: array}."""
    made = {}
    for place, n in counts.items():
        for i in range(n):
            key += 1
            made[f"{place}/{i:03d}.png"] = pixels(*shape, key=key)
            save(folder / place / f"{i:03d}.png", made[f"{place}/{i:03d}.png"])
    return made


def chw(array):
    return torch.tensor(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


TWO = {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 2}


@pytest.fixture
def get(tmp_path):
    """load with its cache in the test's own folder."""
    return lambda name, **options: load(str(name), data_dir=tmp_path / "data", **options)


@pytest.fixture
def refuse(get):
    """Asserts that load raises a one-line UserError with these words; returns the line."""

    def check(name, *words, **options):
        with pytest.raises(UserError) as caught:
            get(name, **options)
        line = str(caught.value)
        assert line and len(line.splitlines()) == 1
        for word in words:
            assert str(word) in line, (word, line)
        return line

    return check


@pytest.fixture
def no_decoding(monkeypatch):
    """Call it, and any further decoding fails the test."""

    def forbid():
        def fail(item):
            raise AssertionError(f"decoded {item}")

        monkeypatch.setattr(common.data, "_open", fail)

    return forbid


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("held", ["test", "val"])
def test_train_and_test_folders(tmp_path, get, held):
    made = fill(tmp_path / "pets", {place.replace("test", held): n for place, n in TWO.items()})
    data = get(tmp_path / "pets", labelled=True)
    assert data.name == "pets" and data.class_names == ["cat", "dog"]
    assert (data.size, data.channels, data.num_classes) == (6, 3, 2)
    assert data.labelled and data.flip and data.resize == "none"
    assert data.y_train.tolist() == [0, 0, 0, 1, 1] and data.y_test.tolist() == [0, 1, 1]
    assert data.y_train.dtype == data.y_test.dtype == torch.int64 and data.x_train.dtype == torch.uint8
    assert torch.equal(torch.cat([data.x_train, data.x_test]), torch.stack([chw(made[path]) for path in made]))


def test_test_folder_wins_over_val_unless_it_lacks_classes(tmp_path, get):
    fill(tmp_path / "a", TWO | {"val/cat": 4, "val/dog": 4})
    assert len(get(tmp_path / "a").x_test) == 3
    fill(tmp_path / "b", {"train/cat": 3, "train/dog": 2, "val/cat": 4, "val/dog": 4, "test": 5})
    assert len(get(tmp_path / "b").x_test) == 8


def test_folder_of_classes_is_split_per_class_and_says_so(tmp_path, get, capsys):
    made = fill(tmp_path / "set", {"a": 20, "b": 10, "c": 1})
    data = get(tmp_path / "set", labelled=True)
    assert "data: split 80/20 by seed 0: 25 train, 6 test\n" in capsys.readouterr().out
    assert data.y_train.bincount().tolist() == [16, 8, 1]  # c keeps its only image for training
    assert data.y_test.bincount().tolist() == [4, 2]
    seen = {bytes(x.contiguous().numpy()): int(y) for part in ("train", "test")
            for x, y in zip(getattr(data, f"x_{part}"), getattr(data, f"y_{part}"), strict=True)}  # fmt: skip
    # each image once, with its own label
    assert seen == {bytes(chw(made[path]).numpy()): "abc".index(path[0]) for path in made}
    other = get(tmp_path / "set", seed=1)
    assert not torch.equal(other.x_test, data.x_test) and other.content != data.content
    assert len(get(tmp_path / "set", test_fraction=0.5).x_test) == 15
    assert "data: split 50/50 by seed 0: 16 train, 15 test" in capsys.readouterr().out


def test_split_does_not_depend_on_the_order_of_a_listing(tmp_path, get, monkeypatch):
    images = {f"{label}/{i}.png": pixels(5, 5, key=i) for label in "ba" for i in range(10)}
    for folder, names in (("one/set", sorted(images)), ("two/set", sorted(images, reverse=True))):
        for name in names:
            save(tmp_path / folder / name, images[name])
    one = get(tmp_path / "one/set")
    scandir = os.scandir

    class Backwards(contextlib.nullcontext):
        def __init__(self, top):
            super().__init__()
            self.entries = iter(sorted(scandir(top), key=lambda entry: entry.name, reverse=True))

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

    monkeypatch.setattr(os, "scandir", Backwards)
    two = get(tmp_path / "two/set")
    monkeypatch.undo()
    assert two.class_names == ["a", "b"]
    assert torch.equal(one.x_train, two.x_train) and torch.equal(one.x_test, two.x_test)
    assert one.content == two.content


def test_train_without_test_is_split(tmp_path, get, capsys):
    fill(tmp_path / "set", {"train/a": 5, "train/b": 5})
    data = get(tmp_path / "set")
    assert (len(data.x_train), len(data.x_test)) == (8, 2) and data.name == "set"
    assert "8 train, 2 test" in capsys.readouterr().out


@pytest.mark.parametrize("counts", [{".": 10}, {"train": 8, "test": 2}, {"train": 10}])
def test_unlabelled_folder(tmp_path, get, refuse, counts):
    fill(tmp_path / "set", counts)
    data = get(tmp_path / "set")
    assert (len(data.x_train), len(data.x_test)) == (8, 2)
    assert data.y_train is None and data.y_test is None and data.class_names == [] and not data.labelled
    assert "no labels" in describe(data)
    refuse(tmp_path / "set", "needs labels", "class folders", labelled=True)


def test_one_class_only_without_labels(tmp_path, get, refuse):
    fill(tmp_path / "set", {"a": 5})
    assert get(tmp_path / "set").num_classes == 1
    refuse(tmp_path / "set", "only one class", "class folders", labelled=True)


def test_what_is_ignored_and_what_is_found_deeper(tmp_path, get):
    fill(tmp_path / "set", TWO | {"train/cat/deep/er": 1, "train/.hidden": 1, "train/cat/.thumbs": 1})
    for name in ("train/cat/.x.png", "train/cat/list.txt", "train/readme.md"):
        (tmp_path / "set" / name).write_text("no image")
    save(tmp_path / "set/train/loose.png", pixels(6, 6, 3))
    save(tmp_path / "set/train/dog/upper.JPG", pixels(6, 6, 3), format="JPEG")
    data = get(tmp_path / "set")
    assert data.class_names == ["cat", "dog"] and data.y_train.bincount().tolist() == [4, 3]


def test_data_dir_may_be_the_folder_itself(tmp_path):
    fill(tmp_path / "data", {"a": 5, "b": 5})
    first, second = (load(str(tmp_path / "data"), data_dir=tmp_path / "data") for _ in range(2))
    assert (tmp_path / "data/cache").is_dir() and second.class_names == ["a", "b"] and first.content == second.content


# ------------------------------------------------------------------------------------------------ errors: one line each


def test_errors_of_names_and_options(tmp_path, refuse):
    refuse("cifra100", "cifra100", *NAMED, "did you mean cifar100?", "folder path")
    assert "did you mean" not in refuse(tmp_path / "nowhere", "no such folder", *NAMED)
    refuse("digits", "--size 0", size=0)
    refuse("digits", "'stretch'", "squash, crop", resize="stretch")
    refuse("digits", "'cmyk'", "auto, rgb, grey", channels="cmyk")


def test_errors_of_folders(tmp_path, refuse):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no images", "empty", ".png")
    fill(tmp_path / "hollow", TWO)
    (tmp_path / "hollow/train/fox").mkdir()
    refuse(tmp_path / "hollow", "no images", "fox", "delete")
    fill(tmp_path / "differ", TWO | {"train/fox": 1, "test/owl": 1})
    refuse(tmp_path / "differ", "(fox, owl)", "same class folders")
    fill(tmp_path / "kinds", {"train/cat": 1, "train/dog": 1, "test": 1})
    refuse(tmp_path / "kinds", "differ", "(no class)", "same class folders")
    fill(tmp_path / "headless", {"test/cat": 1})
    refuse(tmp_path / "headless", "no train/", "name the folder")
    fill(tmp_path / "few", {"a": 1, "b": 2})
    refuse(tmp_path / "few", "too few", "add images")
    refuse(tmp_path / "few", "test fraction 1", "between 0 and 1", test_fraction=1)


def test_errors_of_images(tmp_path, get, refuse):
    fill(tmp_path / "broken", TWO)
    bad = tmp_path / "broken/test/dog/000.png"
    whole = bad.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        bad.write_bytes(content)
        refuse(tmp_path / "broken", bad, "delete it or fetch it again")
    assert os.listdir(tmp_path / "data/cache") == []  # nothing half written stays
    bad.unlink()
    bad.symlink_to(tmp_path / "nowhere.png")
    refuse(tmp_path / "broken", bad, "fetch it again")

    fill(tmp_path / "sizes", TWO)
    save(tmp_path / "sizes/test/dog/000.png", pixels(6, 7, 3))
    refuse(tmp_path / "sizes", "000.png has 6x6", "test/dog/000.png has 7x6", "--size")
    assert get(tmp_path / "sizes", size=4).size == 4
    fill(tmp_path / "wide", {"a": 5}, shape=(6, 8))
    refuse(tmp_path / "wide", "not square", "8x6", "--size")


def test_mixed_grey_and_colour(tmp_path, get, refuse):
    fill(tmp_path / "set", TWO)
    grey = pixels(6, 6)
    save(tmp_path / "set/train/dog/001.png", grey)
    refuse(tmp_path / "set", "train/dog/001.png is grey", "train/cat/000.png is in colour", "--channels rgb")
    data = get(tmp_path / "set", channels="rgb")
    assert torch.equal(data.x_train[4], chw(grey).expand(3, 6, 6))
    data = get(tmp_path / "set", channels="grey")
    assert data.channels == 1 and torch.equal(data.x_train[4], chw(grey))
    save(tmp_path / "set/train/cat/000.png", grey)  # now the first one is grey
    refuse(tmp_path / "set", "train/cat/000.png is grey", "train/cat/001.png is in colour")


# ------------------------------------------------------------------------------------------------------------- decoding


def test_grey_folder_stays_one_channel_in_every_mode(tmp_path, get):
    deep = np.random.default_rng(0).integers(0, 65536, (4, 4)).astype(np.uint16)
    grey = pixels(4, 4)
    folder = tmp_path / "set"
    save(folder / "0.png", grey)
    save(folder / "1.png", np.stack([grey, pixels(4, 4, key=1)], 2))  # with transparency, which is dropped
    save(folder / "2.png", deep)
    save(folder / "3.tif", deep)
    Image.fromarray(grey).convert("1").save(folder / "4.png")
    with open(folder / "5.pgm", "wb") as file:
        file.write(b"P5 4 4 65535\n" + deep.astype(">u2").tobytes())
    data = get(folder)
    assert data.channels == 1
    seen = {bytes(x.contiguous().numpy()) for x in torch.cat([data.x_train, data.x_test])}
    eight = np.rint(deep / 257).astype(np.uint8)
    binary = np.asarray(Image.fromarray(grey).convert("1")).astype(np.uint8) * 255
    assert seen == {bytes(grey), bytes(eight), bytes(binary)}


def test_palette_and_alpha_become_rgb(tmp_path, get):
    rgba = pixels(4, 4, 4)
    palette = Image.fromarray(rgba[..., :3]).quantize(8)
    folder = tmp_path / "set"
    for part in ("train", "test"):
        save(folder / part / "0.png", rgba)
        palette.save(folder / part / "1.png", transparency=bytes([0, 90, 255, 255, 255, 255, 255, 255]))
    data = get(folder)
    assert torch.equal(data.x_train[0], chw(rgba[..., :3]))
    assert torch.equal(data.x_train[1], chw(np.asarray(palette.convert("RGB"))))


def test_float_image_is_refused(tmp_path, refuse):
    folder = tmp_path / "set"
    for name in ("0.tif", "1.tif"):
        save(folder / name, np.ones((4, 4), np.float32))
    refuse(folder, ".tif", "neither 8 nor 16 bits", test_fraction=0.5)


@pytest.mark.parametrize("shape", [(20, 33, 3), (33, 20, 3), (12, 12, 3), (8, 31, 3), (5, 7, 3), (40, 40)])
@pytest.mark.parametrize("rule", ["squash", "crop"])
def test_resize_is_pillows(tmp_path, get, shape, rule):
    array = pixels(*shape)
    for part in ("train", "test"):
        save(tmp_path / "set" / part / "0.png", array)
    data = get(tmp_path / "set", size=8, resize=rule)
    image, (height, width) = Image.fromarray(array), shape[:2]
    if rule == "squash":
        want = image.resize((8, 8), Resampling.LANCZOS)
    elif height < width:
        long = int(8 * width / height)
        left = (long - 8) // 2
        want = image.resize((long, 8), Resampling.LANCZOS).crop((left, 0, left + 8, 8))
    else:
        long = int(8 * height / width)
        top = (long - 8) // 2
        want = image.resize((8, long), Resampling.LANCZOS).crop((0, top, 8, top + 8))
    assert data.resize == rule and torch.equal(data.x_train[0], chw(np.asarray(want)))


def test_images_of_the_right_size_are_not_resampled(tmp_path, get):
    made = fill(tmp_path / "set", TWO)
    for rule in ("squash", "crop"):
        assert torch.equal(get(tmp_path / "set", size=6, resize=rule).x_train[0], chw(made["train/cat/000.png"]))


def test_exif_orientation(tmp_path, get):
    array = np.zeros((16, 16), np.uint8)
    array[:8, :8] = 255  # white at the top left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise when shown
    for part in ("train", "test"):
        save(tmp_path / "set" / part / "0.jpg", array, exif=exif, quality=100)
    x = get(tmp_path / "set").x_train[0, 0].float()
    assert x[:8, 8:].mean() > 250 and x[:8, :8].mean() < 5 and x[8:].mean() < 5


# ---------------------------------------------------------------------------------------------------------------- cache


def cache_files(tmp_path):
    return {path.suffix: path for path in (tmp_path / "data/cache").iterdir()}


def same(a, b):
    return (torch.equal(a.x_train, b.x_train) and torch.equal(a.x_test, b.x_test) and torch.equal(a.y_train, b.y_train)
            and torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) and a.content == b.content
            and a.class_names == b.class_names and a.resize == b.resize)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"size": 9, "resize": "crop"}, {"channels": "grey"}])
def test_second_load_decodes_nothing(tmp_path, get, no_decoding, options):
    fill(tmp_path / "set", {"a": 5, "b": 6})
    first = get(tmp_path / "set", **options)
    no_decoding()
    assert same(first, get(tmp_path / "set", **options))


@pytest.mark.parametrize("options", [{"size": 5}, {"channels": "grey"}, {"seed": 1}, {"test_fraction": 0.4}])
def test_other_options_are_other_entries(tmp_path, get, no_decoding, options):
    fill(tmp_path / "set", {"a": 5, "b": 6})
    assert get(tmp_path / "set").content != get(tmp_path / "set", **options).content
    sizes = [get(tmp_path / "set", size=4, resize=rule).resize for rule in ("squash", "crop")]
    assert sizes == ["squash", "crop"]
    no_decoding()
    get(tmp_path / "set"), get(tmp_path / "set", **options)


def test_changed_files_are_decoded_again(tmp_path, get):
    made = fill(tmp_path / "set", TWO)
    before = get(tmp_path / "set")
    path = tmp_path / "set/train/dog/001.png"
    stat = path.stat()
    new = pixels(6, 6, 3, key=99)
    save(path, new)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    after = get(tmp_path / "set")
    assert torch.equal(after.x_train[4], chw(new)) and after.content != before.content
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"more")  # another length at the same time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert get(tmp_path / "set").content == after.content and len(list((tmp_path / "data/cache").glob("*.u8"))) == 3
    path.rename(path.with_name("7.png"))  # another name, the same picture
    assert get(tmp_path / "set").content == after.content
    (tmp_path / "set/train/dog/7.png").unlink()
    assert len(get(tmp_path / "set").x_train) == 4
    save(path, made["train/dog/001.png"])  # the old picture at a new time: decoded again, but the same set
    assert get(tmp_path / "set").content == before.content


def test_content_covers_labels_names_and_split(tmp_path, get):
    images = [pixels(4, 4, key=i) for i in range(5)]
    contents = set()
    layouts = (
        "train/a train/a train/b test/a test/b",
        "train/a train/b train/b test/a test/b",  # another label
        "train/b train/a train/a test/a test/b",
        "train/a train/a train/c test/a test/c",  # another class name
        "train train train test test",  # none
        "train train train train test",
    )
    for number, places in enumerate(layouts):
        for i, place in enumerate(places.split()):
            save(tmp_path / f"{number}/set/{place}/{i}.png", images[i])
        contents.add(get(tmp_path / f"{number}/set").content)
    assert len(contents) == len(layouts)


@pytest.mark.parametrize("harm", ["truncated", "longer", "no map", "no json", "half a json", "other json"])
def test_a_damaged_entry_is_rebuilt(tmp_path, get, harm):
    fill(tmp_path / "set", TWO)
    first = get(tmp_path / "set")
    want = first.x_train.clone(), first.content
    files = cache_files(tmp_path)
    content = files[".u8"].read_bytes()
    if harm == "truncated":
        files[".u8"].unlink()  # the mapping above keeps the old one
        files[".u8"].write_bytes(content[:-1])
    elif harm == "longer":
        files[".u8"].unlink()
        files[".u8"].write_bytes(content + b"\0")
    elif harm == "no map":
        files[".u8"].unlink()
    elif harm == "no json":  # a kill between the two
        files[".json"].unlink()
    elif harm == "half a json":
        files[".json"].write_text(files[".json"].read_text()[:40])
    else:
        files[".json"].write_text("[]")
    again = get(tmp_path / "set")
    assert torch.equal(again.x_train, want[0]) and again.content == want[1]
    assert cache_files(tmp_path)[".u8"].read_bytes() == content


def test_a_kill_before_the_json_leaves_an_entry_that_is_rebuilt(tmp_path, get, monkeypatch):
    fill(tmp_path / "set", TWO)
    write_atomic = common.data.write_atomic

    def stop(path, writer):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write_atomic(path, writer)

    monkeypatch.setattr(common.data, "write_atomic", stop)
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path / "set")
    assert set(cache_files(tmp_path)) == {".u8"}
    monkeypatch.undo()
    assert len(get(tmp_path / "set").x_train) == 5 and set(cache_files(tmp_path)) == {".u8", ".json"}


def test_json_has_no_paths_and_says_what_the_array_is(tmp_path, get):
    fill(tmp_path / "set", TWO)
    data = get(tmp_path / "set", size=4)
    text = cache_files(tmp_path)[".json"].read_text()
    meta = json.loads(text)
    assert str(tmp_path) not in text and ".png" not in text
    assert meta["shape"] == [8, 3, 4, 4] and meta["n_train"] == 5 and meta["labels"] == [0, 0, 0, 1, 1, 0, 1, 1]
    assert meta["resize"] == "squash" and meta["content"] == data.content


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_images_are_slices_of_the_mapped_file(tmp_path, get):
    fill(tmp_path / "set", {"a": 50, "b": 50}, shape=(32, 32, 3))
    data = get(tmp_path / "set")
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0] for line in maps if str(cache_files(tmp_path)[".u8"]) in line]
    low, high = (int(end, 16) for end in spans[-1].split("-"))
    assert low <= data.x_train.data_ptr() < high
    assert data.x_test.data_ptr() == data.x_train.data_ptr() + data.x_train.numel()


def test_chunks_do_not_change_the_result_and_bound_the_memory(tmp_path, get, monkeypatch):
    fill(tmp_path / "set", {"a": 50, "b": 50})
    whole = get(tmp_path / "set")
    for path in cache_files(tmp_path).values():
        path.unlink()
    sizes = []
    decoded = common.data._decoded

    def spy(*args):
        for chunk in decoded(*args):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(common.data, "CHUNK", 40 * 6 * 6 * 3)
    monkeypatch.setattr(common.data, "_decoded", spy)
    assert same(whole, get(tmp_path / "set"))
    assert sizes == [40, 40, 20]


# ----------------------------------------------------------------------------------------------------------- named sets


def test_digits_is_the_bundled_set():
    from sklearn.datasets import load_digits

    data = load("digits", labelled=True)
    assert data.x_train.shape == (1437, 1, 8, 8) and data.x_test.shape == (360, 1, 8, 8)
    assert data.class_names == list("0123456789") and not data.flip and data.resize == "none"
    x, y = load_digits(return_X_y=True)
    want = sorted((bytes(np.floor(a / 16 * 255 + 0.5).astype(np.uint8)), int(b)) for a, b in zip(x, y, strict=True))
    both = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert sorted((bytes(a.numpy()), int(b)) for a, b in zip(*both, strict=True)) == want
    share = data.y_test.bincount() / torch.from_numpy(y).bincount()
    assert share.min() > 0.19 and share.max() < 0.21  # stratified
    again = load("digits", seed=3)
    assert same(data, again)


def test_digits_at_another_size_are_resized_and_cached(get, no_decoding):
    small, large = get("digits"), get("digits", size=12)
    want = Image.fromarray(small.x_train[7, 0].numpy()).resize((12, 12), Resampling.LANCZOS)
    assert torch.equal(large.x_train[7], chw(np.asarray(want)))
    assert large.resize == "squash" and large.content != small.content and not large.flip
    assert torch.equal(large.y_test, small.y_test)
    colour = get("digits", channels="rgb")
    assert torch.equal(colour.x_test, small.x_test.expand(-1, 3, -1, -1))
    no_decoding()
    assert same(large, get("digits", size=12))
    assert same(small, get("digits", size=8))


def write_mnist(raw, n_train=30, n_test=20):
    """The four files as torchvision unpacks them."""
    raw.mkdir(parents=True)
    made = {}
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        x, y = made[prefix] = pixels(n, 28, 28, key=n), (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + x.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + y.tobytes())
    return made


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        assert socket.getdefaulttimeout() == 20
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_files_already_downloaded_need_no_network(tmp_path, get, no_network, name):
    made = write_mnist(tmp_path / "data" / NAMED[name] / "raw")
    data = get(name, labelled=True)
    assert torch.equal(data.x_train[:, 0], torch.from_numpy(made["train"][0]))
    assert torch.equal(data.x_test[:, 0], torch.from_numpy(made["t10k"][0]))
    assert data.y_test.tolist() == made["t10k"][1].tolist() and data.num_classes == 10
    assert (data.mean.tolist(), data.std.tolist()) == tuple(torch.tensor(v).tolist() for v in NORMALISATION[name])
    assert data.flip == (name == "fashion_mnist")


def test_cifar_is_channels_first_with_the_published_statistics(get, monkeypatch):
    import torchvision

    array = {True: pixels(7, 32, 32, 3), False: pixels(3, 32, 32, 3, key=1)}

    class Fake:
        def __init__(self, root, train, download):
            assert download
            self.data, self.targets, self.classes = array[train], [1] * len(array[train]), ["x", "y"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    data = get("cifar100", labelled=True)
    assert torch.equal(data.x_train, torch.from_numpy(array[True]).permute(0, 3, 1, 2))
    assert torch.equal(data.x_test, torch.from_numpy(array[False]).permute(0, 3, 1, 2))
    assert torch.allclose(data.mean, torch.tensor([0.5071, 0.4866, 0.4409]), atol=1e-7)
    assert torch.allclose(data.std, torch.tensor([0.2673, 0.2564, 0.2762]), atol=1e-7)
    small = get("cifar100", size=16)  # the table is for 32 px
    assert torch.allclose(small.mean, (small.x_train / 255.0).mean((0, 2, 3)), atol=1e-6)
    grey = get("cifar100", channels="grey")
    assert torch.equal(grey.x_train[0], chw(np.asarray(Image.fromarray(array[True][0]).convert("L"))))


@pytest.mark.parametrize("name", ["cifar100", "cifar10", "mnist", "fashion_mnist"])
def test_no_network_is_one_line_with_the_way_out(refuse, no_network, capfd, name):
    refuse(name, name, "no route to host", "--data at a folder with train/<class>/* and test/<class>/*")
    assert capfd.readouterr() == ("", "")  # torchvision adds nothing
    assert socket.getdefaulttimeout() is None


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("shape", [(6, 6, 3), (6, 6)])
def test_statistics_equal_numpys(tmp_path, get, shape):
    made = fill(tmp_path / "set", {"train/a": 9, "train/b": 8, "test/a": 5, "test/b": 5}, shape=shape)
    data = get(tmp_path / "set")
    train = np.stack([made[path].reshape(6, 6, -1) for path in made if path.startswith("train")]) / 255  # float64
    assert np.allclose(data.mean.numpy(), train.mean((0, 1, 2)), rtol=1e-7, atol=0)
    assert np.allclose(data.std.numpy(), train.std((0, 1, 2)), rtol=1e-7, atol=0)
    x = normalise(data.x_train, data.mean, data.std)
    assert x.dtype == torch.float32 and x.shape == data.x_train.shape
    assert x.mean((0, 2, 3)).abs().max() < 1e-6 and (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_a_constant_channel_does_not_divide_by_zero(tmp_path, get):
    for part in ("train", "test"):
        save(tmp_path / "set" / part / "0.png", np.full((4, 4, 3), 7, np.uint8))
    data = get(tmp_path / "set")
    assert normalise(data.x_train, data.mean, data.std).abs().max() < 1e-4


def test_normalise_and_back():
    data = load("digits")
    x = normalise(data.x_train, data.mean, data.std)
    assert torch.allclose(normalise(data.x_train / 255, data.mean, data.std), x, atol=1e-6)  # floats: 1.0 is white
    back = denormalise(x, data.mean, data.std)
    assert torch.equal((back * 255).round().to(torch.uint8), data.x_train)
    assert denormalise(x + 9, data.mean, data.std).max() > 3  # not clamped
    z = torch.zeros(2, 1, 8, 8, requires_grad=True)
    normalise(z, data.mean, data.std).sum().backward()
    assert torch.allclose(z.grad, 1 / data.std.expand_as(z))


def test_describe_is_one_line():
    data = load("digits")
    assert describe(data) == ("digits: 1437 train, 360 test, 8 px, 1 channel, 10 classes, resize none, "
                              f"content {data.content[:8]}")  # fmt: skip


def test_names_are_safe_for_files(tmp_path, get):
    fill(tmp_path / "my set (2)", {"a": 5})
    assert get(tmp_path / "my set (2)").name == "my_set_2"
    assert get(f"{tmp_path}/my set (2)/a/..").name == "my_set_2"
    fill(tmp_path / "mnist", {"a": 5})
    assert not get(tmp_path / "mnist").flip
