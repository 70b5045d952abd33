"""Image folders, the bundled digits, and what is made of either; the other named sets: test_sets.py."""

import contextlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling

import common.data
from common.data import NAMED, denormalise, describe, hold_out, load, normalise
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

        def __enter__(self):
            return self

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
    sizes, at_once = [], []
    chunks = common.data._chunks

    def spy(x):
        for chunk in chunks(x):
            sizes.append(len(chunk))
            yield chunk

    class Pool(ThreadPoolExecutor):
        def map(self, call, batches):
            at_once.append(sum(map(len, batches)))  # so many results may wait to be written
            return super().map(call, batches)

    monkeypatch.setattr(common.data, "CHUNK", 40 * 6 * 6 * 3)
    monkeypatch.setattr(common.data, "_chunks", spy)
    monkeypatch.setattr(common.data, "ThreadPoolExecutor", Pool)
    assert same(whole, get(tmp_path / "set"))
    assert sizes == at_once == [40, 40, 20]


# ---------------------------------------------------------------------------------------------- images that are damaged


def spoil(folder, *names):
    """Make files unreadable in different ways; returns their paths."""
    for i, name in enumerate(names):
        path = folder / name
        path.write_bytes((path.read_bytes()[:40], b"", b"not an image")[i % 3])
    return [folder / name for name in names]


def test_bad_images_can_be_left_out(tmp_path, get, refuse, no_decoding, capsys):
    made = fill(tmp_path / "set", {"train/a": 70, "train/b": 3, "test/a": 2, "test/b": 2})
    clean = fill(tmp_path / "clean/set", {"train/a": 70, "train/b": 3, "test/a": 2, "test/b": 2})
    names = ["train/a/000.png", "train/a/065.png", "train/b/001.png", "test/b/000.png"]
    paths = spoil(tmp_path / "set", *names)
    for name in names:
        del made[name], clean[name]
        (tmp_path / "clean/set" / name).unlink()
    for options in ({}, {"size": 4}, {"channels": "rgb"}):
        refuse(tmp_path / "set", paths[0], "delete it", "--skip-bad-images goes on without it", **options)
    assert not list((tmp_path / "data").rglob("*.*"))
    capsys.readouterr()
    data = get(tmp_path / "set", skip_bad_images=True)
    line = "data: left out 4 of 77 images, which cannot be read: " + ", ".join(map(str, paths[:3])) + ", ...\n"
    assert line in capsys.readouterr().out
    assert data.skipped == 4 and describe(data).endswith(f"content {data.content[:8]}, 4 unreadable left out")
    assert torch.equal(torch.cat([data.x_train, data.x_test]), torch.stack([chw(image) for image in made.values()]))
    assert data.y_train.tolist() == [0] * 68 + [1] * 2 and data.y_test.tolist() == [0, 0, 1]
    without = get(tmp_path / "clean/set")  # the same set as if they had never been there
    assert same(data, without) and without.skipped == 0 and "unreadable" not in describe(without)
    no_decoding()
    again = get(tmp_path / "set", skip_bad_images=True)
    assert same(again, data) and again.skipped == 4 and line in capsys.readouterr().out


def test_skipping_is_another_entry_and_changes_nothing_where_all_is_well(tmp_path, get, refuse):
    fill(tmp_path / "set", TWO)
    strict, lenient = get(tmp_path / "set"), get(tmp_path / "set", skip_bad_images=True)
    assert same(strict, lenient) and lenient.skipped == 0
    stat = os.stat(tmp_path / "set/train/cat/001.png")
    fill(tmp_path / "other/set", TWO)
    path = tmp_path / "other/set/train/cat/001.png"
    path.write_bytes(path.read_bytes()[:40])
    assert get(tmp_path / "other/set", skip_bad_images=True).skipped == 1
    refuse(tmp_path / "other/set", path)  # although its cache entry is there
    assert stat == os.stat(tmp_path / "set/train/cat/001.png")


def test_skipping_in_chunks_and_batches(tmp_path, get, monkeypatch):
    made = fill(tmp_path / "set", {"train": 100, "test": 5})
    names = [f"train/{i:03d}.png" for i in (31, 32, 39, 40, *range(64, 80))] + ["test/004.png"]  # whole batches too
    spoil(tmp_path / "set", *names)
    monkeypatch.setattr(common.data, "CHUNK", 40 * 6 * 6 * 3)
    data = get(tmp_path / "set", skip_bad_images=True)
    want = torch.stack([chw(image) for name, image in made.items() if name not in names])
    assert torch.equal(torch.cat([data.x_train, data.x_test]), want)
    assert (len(data.x_train), len(data.x_test), data.skipped) == (80, 4, 21) and data.y_train is None
    train = data.x_train.double() / 255
    assert torch.allclose(data.mean.double(), train.mean((0, 2, 3)), atol=1e-7)


def test_what_cannot_be_skipped(tmp_path, get, refuse, monkeypatch):
    skip = dict(skip_bad_images=True)
    fill(tmp_path / "lost", TWO)
    spoil(tmp_path / "lost", "train/dog/000.png", "train/dog/001.png")
    refuse(tmp_path / "lost", "no training image of class dog", **skip)
    fill(tmp_path / "part", TWO)
    spoil(tmp_path / "part", *(f"test/{name}.png" for name in ("cat/000", "dog/000", "dog/001")))
    refuse(tmp_path / "part", "none of the test images can be read", **skip)
    fill(tmp_path / "plain", {"train": 2, "test": 2})
    spoil(tmp_path / "plain", "train/000.png", "train/001.png")
    refuse(tmp_path / "plain", "none of the training images can be read", **skip)
    spoil(tmp_path / "plain", "test/000.png", "test/001.png")
    refuse(tmp_path / "plain", "none of 4 images", "train/000.png", **skip)
    assert os.listdir(tmp_path / "data/cache") == []

    fill(tmp_path / "mixed", TWO)
    (bad,) = spoil(tmp_path / "mixed", "train/cat/000.png")
    save(tmp_path / "mixed/train/dog/001.png", pixels(6, 6))
    refuse(tmp_path / "mixed", "train/dog/001.png is grey", "train/cat/001.png is in colour", **skip)
    save(tmp_path / "mixed/train/dog/001.png", pixels(6, 7, 3))
    refuse(tmp_path / "mixed", "cat/001.png has 6x6", "dog/001.png has 7x6", **skip)
    assert get(tmp_path / "mixed", size=4, **skip).skipped == 1

    for error in (OSError(5, "Input/output error"), MemoryError("none left")):  # not the file's fault

        def fail(path, error=error):
            raise error

        monkeypatch.setattr(Image, "open", fail)
        for options in ({}, skip):
            line = refuse(tmp_path / "part", "cannot read", error.args[-1], size=5, **options)
            assert "--skip-bad-images" not in line
    assert bad.exists()


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


def test_native_is_a_named_set_at_its_own_size(tmp_path, get):
    assert get("digits").native and get("digits", size=8).native and get("digits", size=8).resize == "none"
    assert not get("digits", size=9).native
    fill(tmp_path / "digits", {"a": 5}, shape=(8, 8))
    assert not get(tmp_path / "digits").native


# ------------------------------------------------------------------------------------------------------------- hold out


def key(x):
    return [bytes(image.contiguous().numpy()) for image in x]


def test_hold_out_takes_a_share_of_every_class(tmp_path, get):
    fill(tmp_path / "set", {"train/a": 20, "train/b": 10, "train/c": 1, "test/a": 2, "test/b": 2, "test/c": 1})
    data = get(tmp_path / "set")
    rest, judged = hold_out(data, 0.2, 0)
    assert rest.y_train.bincount().tolist() == [16, 8, 1] and judged.y_test.tolist() == [0] * 4 + [1] * 2
    assert torch.equal(rest.x_test, data.x_test) and torch.equal(rest.y_test, data.y_test)
    assert torch.equal(rest.x_train, judged.x_train) and torch.equal(rest.y_train, judged.y_train)
    # every image once, in the old order, with its label
    label = dict(zip(key(data.x_train), data.y_train.tolist(), strict=True))
    kept, held = key(rest.x_train), key(judged.x_test)
    assert sorted(kept + held) == sorted(key(data.x_train))
    assert kept == [image for image in key(data.x_train) if image in set(kept)]
    assert held == [image for image in key(data.x_train) if image in set(held)]
    assert [label[image] for image in kept] == rest.y_train.tolist()
    assert [label[image] for image in held] == judged.y_test.tolist()
    for part in (rest, judged):
        assert torch.equal(part.mean, data.mean) and torch.equal(part.std, data.std)
        assert (part.name, part.class_names, part.flip, part.resize) == (data.name, ["a", "b", "c"], True, "none")
    assert len(data.x_train) == 31  # untouched


def test_hold_out_depends_on_fraction_seed_and_data_alone(tmp_path, get):
    data = load("digits")
    one, two = (hold_out(data, 0.1, 3) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.x_train, b.x_train) and torch.equal(a.x_test, b.x_test) and a.content == b.content
    assert one[0].content == one[1].content
    others = [hold_out(data, 0.1, 4), hold_out(data, 0.2, 3), hold_out(get("digits", size=9), 0.1, 3)]
    assert len({data.content, one[0].content, *(rest.content for rest, _ in others)}) == 5
    assert not torch.equal(others[0][1].x_test, one[1].x_test)
    assert hold_out(data, 1 / 2, 0)[0].native


def test_hold_out_without_labels_and_where_it_cannot(tmp_path, get):
    fill(tmp_path / "set", {"train": 10, "test": 2})
    rest, judged = hold_out(get(tmp_path / "set"), 0.25, 0)
    assert (len(rest.x_train), len(rest.x_test), len(judged.x_test)) == (7, 2, 3)
    assert rest.y_train is None and judged.y_test is None
    fill(tmp_path / "few", {"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    digits, few = load("digits"), get(tmp_path / "few")
    for data, fraction in ((digits, 0), (digits, 1.0), (digits, float("nan")), (digits, 1e-4), (few, 0.9)):
        words = "too few" if fraction in (1e-4, 0.9) else "between 0 and 1"
        with pytest.raises(UserError, match=words) as caught:
            hold_out(data, fraction, 0)
        assert str(fraction) in str(caught.value) and "\n" not in str(caught.value)


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
