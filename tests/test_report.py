"""common/report.py: the nearest image and the copy check against loops, the page against the files it is made of."""

import base64
import dataclasses
import io
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import refuse
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import common.report as report
import frepo
import krr_st
from common.artefact import save_distilled
from common.bases import Code
from common.data import Zca, load
from common.report import copy_check, distances_between, nearest_real, scalars, write_report

ROOT = Path(__file__).parent.parent
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br"}


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def photos(n, side=8, seed=0):
    """Smooth colour images (n, 3, side, side) uint8: waves of few periods, each with its own phases and contrast."""
    r = np.random.default_rng(seed)
    i, j = np.mgrid[0:side, 0:side] / side
    out = np.empty((n, 3, side, side), np.uint8)
    for k in range(n):
        for c in range(3):
            a, b, p, q = r.uniform(0.3, 2, 2).tolist() + r.uniform(0, 6.3, 2).tolist()
            out[k, c] = np.clip(128 + r.uniform(40, 120) * np.sin(6.3 * a * i + p) * np.cos(6.3 * b * j + q), 0, 255)
    return torch.from_numpy(out)


# ---------------------------------------------------------------------------------------------------- the nearest image


def naive(x, real, flip=False, skip=None):
    """Index, distance and mirroring by loops over pixels in Python's floats."""
    found = []
    for k, image in enumerate(x.double().tolist()):
        best = (-1, math.inf, False)
        for j, other in enumerate(real.tolist()):
            if skip is not None and j == int(skip[k]):
                continue
            for mirrored in (False, True) if flip else (False,):
                total, count = 0.0, 0
                for plane, other_plane in zip(image, other, strict=True):
                    for line, other_line in zip(plane, other_plane, strict=True):
                        other_line = other_line[::-1] if mirrored else other_line
                        for a, b in zip(line, other_line, strict=True):
                            total += (min(max(a, 0.0), 1.0) - b / 255) ** 2
                            count += 1
                distance = math.sqrt(total / count)
                if distance < best[1] - 1e-12:
                    best = (j, distance, mirrored)
        found.append(best)
    return found


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three images and products of five dimensions, so that a small case has several of each."""
    monkeypatch.setattr(report, "BLOCK", 3 * 72)
    monkeypatch.setattr(report, "PIECE", 5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("skipping", [False, True])
def test_nearest_is_the_loop(small_blocks, flip, skipping):
    x = 1.6 * draw(7, 2, 6, 6) - 0.3  # leaves [0, 1] on both sides
    real = (255 * draw(11, 2, 6, 6, seed=1)).byte()
    x[3] = real[9].flip(2) / 255  # a mirrored copy
    x[5] = real[4] / 255
    skip = torch.tensor([0, 1, 2, 9, 3, 4, 10]) if skipping else None
    index, distance, mirrored = nearest_real(x, real, "cpu", flip, skip)
    expected = naive(x, real, flip, skip)
    assert index.tolist() == [i for i, _, _ in expected]
    assert mirrored.tolist() == [m for _, _, m in expected]
    torch.testing.assert_close(distance, torch.tensor([d for _, d, _ in expected]).double(), rtol=0, atol=1e-7)
    assert distance.dtype == torch.float64 and index.dtype == torch.int64
    if not skipping:
        assert (distance[5], index[5]) == (0, 4) and (bool(mirrored[3]), distance[3] == 0) == (flip, flip)


def test_rounding_does_not_choose():
    # dark, far from the bright x, and apart by one grey level in one pixel: float32 products of 3072 terms differ less
    real = (40 * draw(3, 32, 32)).byte().repeat(400, 1, 1, 1)
    for j in range(400):
        real[j].view(-1)[7 * j] += 1
    x = 0.8 + 0.2 * draw(24, 3, 32, 32, seed=1)
    index, distance, _ = nearest_real(x, real)
    pixels = (real.float() / 255).double()
    exact = torch.stack([(image.double() - pixels).square().flatten(1).mean(1) for image in x])
    assert torch.equal(index, exact.argmin(1))
    torch.testing.assert_close(distance, exact.amin(1).sqrt(), rtol=1e-12, atol=0)
    a, b = x.flatten(1) - 0.5, pixels.flatten(1).float() - 0.5
    about = a.double().square().sum(1)[:, None] + b.double().square().sum(1) - 2 * (a @ b.T).double()
    assert not torch.equal(about.argmin(1), exact.argmin(1))  # the case is one


def test_ties_and_nothing(small_blocks):
    real = (255 * draw(8, 1, 4, 4)).byte()
    real[7] = real[2]  # a duplicate in another block
    real[1] = torch.cat([real[1, :, :, :2], real[1, :, :, :2].flip(2)], 2)  # symmetric
    x = real[[7, 1]].float() / 255
    index, distance, mirrored = nearest_real(x, real, flip=True)
    assert (index.tolist(), distance.tolist(), mirrored.tolist()) == ([2, 1], [0, 0], [False, False])
    index, distance, mirrored = nearest_real(x[:1], real[7:], flip=True, skip=torch.tensor([0]))
    assert (index.tolist(), distance.tolist(), mirrored.tolist()) == ([-1], [math.inf], [False])
    assert [len(part) for part in nearest_real(x[:0], real)] == [0, 0, 0]


def test_distances_between_are_to_another_image():
    real = photos(30)
    real[11] = real[4].flip(2)
    plain, mirrored = (distances_between(real, "cpu", flip, 30).sort().values for flip in (False, True))
    for found, flip in ((plain, False), (mirrored, True)):
        expected = [d for _, d, _ in naive(real / 255, real, flip, torch.arange(30))]
        torch.testing.assert_close(found, torch.tensor(sorted(expected)).double(), rtol=0, atol=1e-7)
    assert plain[0] > 0.01 and mirrored[:2].tolist() == [0, 0]
    some = distances_between(real, "cpu", True, 7)
    assert len(some) == 7 and set(some.tolist()) <= set(mirrored.tolist())
    assert torch.equal(some, distances_between(real, "cpu", True, 7))
    assert len(distances_between(real[:1], "cpu", True, 7)) == 0


def percentile(values, share):
    """With linear interpolation between the sorted values."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def test_copy_check_limit():
    between = 0.1 + 0.2 * draw(251).double()
    limit = percentile(between.tolist(), 0.01)
    distance = torch.tensor([0.0, limit - 1e-9, limit + 1e-9, 0.5], dtype=torch.float64)
    copies, found = copy_check(distance, between)
    assert found == pytest.approx(limit, rel=1e-12) and copies.tolist() == [True, True, False, False]
    between[:30] = 0  # duplicates among the training images: four grey levels
    assert copy_check(distance, between)[1] == pytest.approx(4 / 255)
    between = between * 0.01  # hardly any contrast: half the median
    assert copy_check(distance, between)[1] == pytest.approx(percentile(between.tolist(), 0.5) / 2)
    copies, found = copy_check(torch.zeros(2).double(), torch.zeros(9).double())
    assert copies.all() and found == 0
    copies, found = copy_check(torch.tensor([4.1 / 255, 3.9 / 255]), torch.empty(0))
    assert copies.tolist() == [False, True] and found == 4 / 255


def test_pale_images_are_no_copies():
    x = draw(3, 2, 5, 4) * 1.4 - 0.2
    pixels = [[[min(max(v, 0.0), 1.0) for v in plane.flatten().tolist()] for plane in image] for image in x.double()]
    means = [[sum(plane) / 20 for plane in image] for image in pixels]
    squares = [
        sum((v - m) ** 2 for plane, m in zip(*each, strict=True) for v in plane)
        for each in zip(pixels, means, strict=True)
    ]
    assert report.contrast(x).tolist() == pytest.approx([math.sqrt(s / 40) for s in squares])
    distance, own = torch.tensor([0.09, 0.09, 0.015, 0.2]).double(), torch.tensor([0.17, 0.19, 0.0, 1.0]).double()
    assert copy_check(distance, torch.full((9,), 0.1).double(), own)[0].tolist() == [False, True, True, False]
    real = photos(300, 16) / 255
    blends = real[:20] / 2 + real[100:120] / 2 - 0.5  # of two images each, and paler still
    blends = torch.cat([0.5 + 0.2 * (blends - blends.mean((2, 3), keepdim=True)), real[:1]])
    between = torch.full((9,), 0.5).double()
    distance = nearest_real(blends, (255 * real).round().byte())[1]
    assert copy_check(distance, between)[0].all()
    assert copy_check(distance, between, report.contrast(blends))[0].tolist() == [False] * 20 + [True]


def planted(real):
    """A copy, a mirrored one and one with noise of two levels, of images 3, 5, 8; three new images. Pixel units."""
    noise = torch.randint(-2, 3, real[8].shape, generator=torch.Generator().manual_seed(0))
    copies = [real[3] / 255, real[5].flip(2) / 255, ((real[8].int() + noise).clamp(0, 255)) / 255]
    return torch.cat([torch.stack(copies), photos(3, real.shape[-1], seed=99) / 255])


def test_planted_copies_are_found_and_new_photographs_are_not():
    real = photos(300, 16)
    distance = nearest_real(planted(real), real, flip=True)[1]
    copies, _ = copy_check(distance, distances_between(real, "cpu", True, 300))
    assert copies.tolist() == [True] * 3 + [False] * 3
    distance = nearest_real(planted(real), real, flip=False)[1]
    copies, _ = copy_check(distance, distances_between(real, "cpu", False, 300))
    assert copies.tolist() == [True, False, True] + [False] * 3


# ------------------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """A parsed page: tags closed in order, tables as [(caption, head, {row: cells})], images, links, text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.tables, self.images, self.words = [], [], [], [], [], []
        self.kept, self.svg, self.into = None, [], None
        self.text = Path(path).read_text()
        self.feed(self.text)
        self.close()
        assert self.open == [], self.open

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag), self.attributes.extend(attributes)
        self.svg.append((tag, dict(attributes)))

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append(["", [], {}])
        if tag == "tr":
            self.row = []
        if tag in ("th", "td", "caption", "pre", "figcaption", "p", "h2"):
            self.into = []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag
        text = "".join(self.into or [])
        if tag in ("th", "td"):
            self.row.append(text)
        if tag == "caption":
            self.tables[-1][0] = text
        if tag == "tr":
            if "tbody" in self.open:
                assert self.row[0] not in self.tables[-1][2]
                self.tables[-1][2][self.row[0]] = self.row[1:]
            else:
                self.tables[-1][1] = self.row
        if tag in ("p", "pre", "figcaption", "h2"):
            self.words.append(text)

    def handle_data(self, data):
        if self.into is not None:
            self.into.append(data)

    def said(self, *words):
        """The only paragraph or caption with these words."""
        found = [text for text in self.words if all(word in text for word in words)]
        assert len(found) == 1, (words, found)
        return found[0]

    def table(self, word):
        """Head and rows of the only table with this word in its caption or first heading."""
        found = [t for t in self.tables if word in t[0] or word == t[1][0]]
        assert len(found) == 1, (word, [t[:2] for t in self.tables])
        return found[0][1], found[0][2]

    def picture(self, number):
        """Pixels (H, W, C) of an image, in levels, and nothing but its gaps transparent."""
        data = self.images[number]["src"].removeprefix("data:image/png;base64,")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert pixels.shape[2] in (2, 4) and set(np.unique(pixels[:, :, -1])) <= {0, 255}
        self.transparent = torch.from_numpy(pixels[:, :, -1] == 0)
        return torch.from_numpy(pixels[:, :, :-1].copy())

    def check_alone(self):
        """Nothing runs and nothing is fetched."""
        assert not {"script", "link", "iframe", "object", "embed", "base", "form", "foreignobject"} & set(self.tags)
        for name, value in self.attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), value[:60]
        assert all(url.startswith("#") for url in re.findall(r"url\(\s*['\"]?([^)]*)", self.text))
        assert "@import" not in self.text and "http" not in re.sub(r"base64,[^\"]*|http-equiv", "", self.text)
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        links = {value[1:] for name, value in self.attributes if name == "href"}
        assert links | set(re.findall(r"url\(#([^)]*)\)", self.text)) <= set(ids)
        assert ("http-equiv", "Content-Security-Policy") in self.attributes
        assert any(name == "content" and value.startswith("default-src 'none'") for name, value in self.attributes)


def cell(mean, std, n=3):
    return {"mean": mean, "std": std, "values": [mean] * n}


WHITENING = Zca(draw(1, 8, 8), torch.eye(64), torch.eye(64))
EVAL = {
    "teacher": {"probe": cell(0.98111, 0.00124)},
    "none": {"match": cell(2.55781, 0.02), "probe": cell(0.85333, 0.01728)},
    "random_real": {"match": cell(0.64411, 0.05627), "probe": cell(0.97722, 0.00795)},
    "distilled": {"match": cell(0.30666, 0.0059), "probe": cell(0.98056, 0.00761)},
}


def write_folder(
    folder, x, y=None, method="krr_st", args_class=krr_st.Args, content="c" * 64, scores=None, flags=None, names=(),
    zca=None, events=False, **result,
):  # fmt: skip
    """A run folder as the scripts leave it; without `events`, no curves."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / f"{method}.py", folder / "script.py")
    args = dataclasses.asdict(args_class(**flags or {}))
    (folder / "args.json").write_text(json.dumps(args))
    save_distilled(
        folder / "distilled.safetensors", x, draw(len(x), 5) if y is None else y, torch.full((x.shape[1],), 0.5),
        torch.full((x.shape[1],), 0.25), method=method, data="birds", content=content,
        y_is="class scores" if names else "teacher features", class_names=list(names), resize="squash", step=60,
        seed=0, recipe={}, teacher={"name": "owl", "weights_sha256": "d" * 64}, zca=zca,
    )  # fmt: skip
    if events:
        curve = [{"step": s, "match": cell(0.9 - 0.01 * s, 0.1), "probe": 0.5 + s / 1000} for s in (20, 40)]
        (folder / "curve.json").write_text(json.dumps(curve))
        board = SummaryWriter(str(folder))
        for step in (1, 20, 40, 60):
            board.add_scalar("loss", 1 / step, step)
            board.add_scalar("lam", 0.1 * step, step)
        board.close()
    facts = dict(
        method=method, data="birds", seed=0, steps=60, seconds=98.24, seconds_per_100_steps=3.14,
        peak_memory_bytes=859_824_128, device="cpu (x86_64)", commit="e" * 40, versions={"torch": "2.11.0"}, args=args,
        teacher={"name": "owl", "weights_sha256": "d" * 64, "seconds": 13.6}, storage_bytes=1234,
        eval=EVAL if scores is None else scores,
        distilled_minus_random_real={
            "match": {"mean": -0.33745, "se": 0.0234}, "probe": {"mean": 0.00333, "se": 0.0025}
        },
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(facts | result))
    return folder


@pytest.fixture
def birds(tmp_path):
    """A folder of 40 training and 4 test images of 8 px in two classes; returns (its path, the training images)."""
    pixels, paths = photos(44), []
    for k in range(44):
        part = "train" if k < 40 else "test"
        path = tmp_path / "birds" / part / ("wren" if k % 2 else EVIL.replace("/", "")) / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[k].permute(1, 2, 0).numpy()).save(path)
        paths.append(path)
    return tmp_path / "birds"


def test_the_page_and_its_tables(tmp_path):
    digits = load("digits")
    x = 1.4 * draw(10, 1, 8, 8) - 0.2
    folder = write_folder(tmp_path / "digits__krr_st__7__20261122-121909", x, content=digits.content, events=True)
    path = write_report([folder])
    assert path == folder / "report.html"
    page = Page(path)
    page.check_alone()

    head, rows = page.table("Scores on the test images")
    assert head == ["", "probe", "match"] and list(rows) == ["teacher", "none", "random real", "distilled"]
    for name, row in EVAL.items():
        shown = rows[name.replace("_", " ")]
        probe, match = row["probe"], row.get("match")
        assert shown[0] == f"{100 * probe['mean']:.1f} ± {100 * probe['std']:.1f}"
        assert shown[1] == (f"{match['mean']:.3f} ± {match['std']:.3f}" if match else "-")
    assert rows["distilled"] == ["98.1 ± 0.8", "0.307 ± 0.006"]
    assert page.table("Paired difference")[1] == {"distilled - random real": ["-0.337 ± 0.023", "0.3 ± 0.2"]}
    assert any("over 3 networks" in t[0] for t in page.tables)

    facts = page.table("fact")[1]
    assert facts["method"] == ["krr_st"] and facts["started"] == ["2026-11-22 12:19:09"]
    assert facts["content of the data (sha256)"] == [digits.content] and facts["teacher"] == ["owl"]
    assert facts["teacher's weights (sha256)"] == ["d" * 64] and facts["commit"] == ["e" * 40]
    flags = page.table("flag")[1]
    assert flags.keys() == {f.name for f in dataclasses.fields(krr_st.Args)} and flags["ridge"] == ["1e-06"]

    storage = page.table("storage")[1]
    size = (folder / "distilled.safetensors").stat().st_size
    assert [words[0] for words in storage.values()] == [
        f"{count:,} bytes" for count in (10 * 64 * 4, 10 * 5 * 4, 8, 0, size)
    ]
    cost = page.table("cost")[1]
    assert cost["seconds"] == ["98.2 s"] and cost["peak memory"] == ["0.86 GB"]
    assert cost["seconds per 100 steps"] == ["3.1 s"] and cost["the teacher's training, once"] == ["13.6 s"]

    # the grid: one picture of ten images, clamped and rounded; its pixels enlarged by the page
    picture = page.picture(0)
    assert picture.shape == (8, 10 * 9 - 1, 1) and page.images[0]["width"] == str(6 * 89)
    for k in range(10):
        expected = (x[k, 0].clamp(0, 1) * 255).round()
        assert torch.equal(picture[:, 9 * k : 9 * k + 8, 0].float(), expected), k
    assert page.transparent.nonzero()[:, 1].unique().tolist() == list(range(8, 89, 9))  # the gaps
    assert "image-rendering: pixelated" in page.text and "clamped" in page.said("10 distilled images of 8 px")

    # every image beside its nearest, the nearest first
    expected = [(d, k, i) for k, (i, d, _) in enumerate(naive(x, digits.x_train))]
    captions = [text for text in page.words if re.match(r"\d\.\d{4} \(", text)]
    assert len(captions) == 10
    for number, (text, (d, k, i)) in enumerate(zip(captions, sorted(expected), strict=True), 1):
        assert text.startswith(f"{d:.4f} ({255 * d:.1f} levels)number {k}training image {i}, {int(digits.y_train[i])}")
        pair = page.picture(number)
        assert torch.equal(pair[:, :8, 0].float(), (x[k, 0].clamp(0, 1) * 255).round())
        assert torch.equal(pair[:, 9:, 0], digits.x_train[i, 0])
    assert "mirrored images do not count" in page.said("All 10")
    verdict = page.said("No copies: none of 10")
    between = [d for _, d, _ in naive(*[digits.x_train[:0]] * 2)] or distances_between(
        digits.x_train, "cpu", False, 1000
    )
    assert f"difference of {percentile(between.tolist(), 0.01):.4f}, the first percentile" in verdict
    assert f"smallest found is {sorted(expected)[0][0]:.4f}" in verdict and "1000 training images" in verdict
    assert "is not what the run saw" not in page.text


def test_planted_copies_through_the_page(tmp_path, birds, monkeypatch):
    data = load(str(birds))
    y = torch.eye(2)[[0, 1, 0, 1, 0, 1]]
    folder = write_folder(
        tmp_path / "runs" / "birds__frepo__0__20261122-121909", planted(data.x_train), y, "frepo", frepo.Args,
        flags=dict(data=str(birds), ipc=3), names=data.class_names, scores={}, ipc=3, label_bytes=7777,
    )  # fmt: skip
    page = Page(write_report([folder], data_dir=tmp_path / "data"))
    page.check_alone()
    assert page.table("storage")[1]["labels kept for every epoch, beside the file"] == ["7,777 bytes"]
    assert "3 of 6 distilled images are copies" in page.said("number 0, 1, 2.")
    first = [text for text in page.words if text.endswith("mirrored") or ", a copy" in text]
    assert [", a copy" in text for text in first].count(True) == 3
    one = page.said("number 1,", "0.0000 (0.0 levels), a copy")
    assert "number 1, wren" in one and one.endswith(f"training image 5, {data.class_names[data.y_train[5]]}, mirrored")
    pair = page.picture(2 if "number 1," in first[1] else 1)
    assert torch.equal(pair[:, :8], pair[:, 9:])  # the training image as it was matched
    assert "is not what the run saw (content" in page.said("The data here")
    assert page.said("6 distilled images of 8 px", "one row a class") and page.picture(0).shape == (17, 26, 3)
    assert EVIL.replace("/", "") not in page.text and "&lt;script&gt;alert(1)&lt;script&gt;" in page.text
    # where all images are near by that measure, their contrast decides
    monkeypatch.setattr(report, "distances_between", lambda *args: torch.full((9,), 0.9))
    assert Page(write_report([folder], data_dir=tmp_path / "data")).said("3 of 6 distilled images are copies")


def test_held_out_images_are_no_training_images(tmp_path, birds):
    whole = load(str(birds))
    folder = write_folder(tmp_path / "a__b__0__1", whole.x_train[:4] / 255, flags=dict(data=str(birds), holdout=0.5))
    page = Page(write_report([folder], data_dir=tmp_path / "data"))
    rest = report.hold_out(whole, 0.5, 0)[0].x_train
    kept = [k for k in range(4) if (rest == whole.x_train[k]).flatten(1).all(1).any()]
    assert 0 < len(kept) < 4
    assert f"{len(kept)} of 4 distilled images are copies" in page.said(f"number {', '.join(map(str, kept))}.")


def test_everything_from_files_is_escaped(tmp_path):
    folder = tmp_path / f"a{EVIL.replace('/', '')}__krr_st__0__20261122-121909"
    scores = {EVIL: {EVIL: cell(0.5, 0.1)}, "distilled": {EVIL: cell(0.6, 0.1)}}
    write_folder(
        folder, draw(4, 1, 8, 8), torch.eye(4), scores=scores, names=[EVIL] * 4, flags=dict(data="digits"), data=EVIL,
        device=EVIL, teacher={"name": EVIL, "seconds": EVIL}, backend='"><img src=x onerror=alert(1)>', seconds=EVIL,
        curves={EVIL: {EVIL: [{"at": EVIL, "mean": 1.0, "std": EVIL}]}}, application=EVIL, steps=EVIL, commit=EVIL,
        versions={EVIL: EVIL}, ipc=EVIL,
    )  # fmt: skip
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {EVIL: EVIL, "teacher": EVIL, "size": "\udcff"}))
    (folder / "curve.json").write_text(json.dumps([{"step": 1, EVIL: 0.5}, {"step": EVIL, "match": 1}, EVIL]))
    board = SummaryWriter(str(folder))
    board.add_scalar(f"{EVIL} $\\frac$", 1.0, 60)
    board.close()
    page = Page(write_report([folder, folder]))
    page.check_alone()
    assert "<script" not in page.text and "<img src=x" not in page.text
    assert page.text.count("&lt;script&gt;") > 20
    assert report.esc("\"'<>&") == "&quot;&#x27;&lt;&gt;&amp;"  # inside attributes too
    assert page.tables[0][2].keys() == {f"{i}. {folder.name}" for i in (1, 2)}


def bare(tmp_path, name="digits__krr_st__0__20261122-121909"):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(dataclasses.asdict(krr_st.Args())))
    return folder


def test_missing_parts_are_said(tmp_path):
    folder = bare(tmp_path)
    page = Page(write_report([folder]))
    page.check_alone()
    for words in (
        ("no result.json", "has not ended"), ("no curve.json",), ("no distilled set", "distilled.safetensors"),
        ("no TensorBoard events",), ("There are no scores",),
    ):  # fmt: skip
        page.said(*words)
    assert page.table("fact")[1]["method"] == ["krr_st"] and page.table("cost")[1]["seconds"] == ["-"]
    assert len(page.table("flag")[1]) == len(dataclasses.fields(krr_st.Args)) and not page.images

    whole = write_folder(tmp_path / "whole", draw(4, 1, 8, 8), events=True)
    events = next(whole.glob("events*"))
    events.write_bytes(events.read_bytes()[:-7])  # killed while it wrote
    (folder / events.name).write_bytes(events.read_bytes()[:5])
    for name in ("result.json", "curve.json", "distilled.safetensors"):
        (folder / name).write_bytes((whole / name).read_bytes()[:40])
    page = Page(write_report([folder, whole], tmp_path / "both.html"))
    page.check_alone()
    page.said("result.json cannot be read"), page.said("curve.json cannot be read"), page.said("not a readable")
    page.said("no TensorBoard events")
    assert [points[-1][0] for points in scalars(whole).values()] == [60, 40]  # all but the one that was cut


def test_shapes_of_json_that_are_no_results(tmp_path):
    folder = bare(tmp_path)
    for odd in ([], 3, None, {"eval": 3}, {"eval": {"distilled": {}}, "curves": [], "teacher": "x", "seconds": None},
                {"eval": {"distilled": {"match": {"mean": None}}}, "distilled_minus_random_real": 1, "versions": {}},
                {"method": "evaluate", "cells": 3, "rows": [], "args": 3}):  # fmt: skip
        (folder / "result.json").write_text(json.dumps(odd))
        Page(write_report([folder])).check_alone()
    folder = write_folder(tmp_path / "odd", draw(4, 1, 8, 8))
    (folder / "curve.json").write_text(json.dumps([{"step": 3, "conv": 0.5}]))
    (folder / "result.json").write_text(json.dumps({"eval": {"distilled": {"conv": cell(math.nan, 0.1)}}}))
    page = Page(write_report([folder]))
    assert page.table("Scores")[1] == {"random real": ["-"], "distilled": ["nan ± 10.0"]}
    page.said("There are no times")


def test_no_run_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    whole = bare(tmp_path, "whole")
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        refuse(lambda folder=folder: write_report([whole, folder]), str(folder), "args.json", "name a run folder")
    assert not list(tmp_path.rglob("report.html"))
    for text in ("[1]", "{"):
        (tmp_path / "empty" / "args.json").write_text(text)
        refuse(lambda: write_report([tmp_path / "empty"]), "args.json")
    refuse(lambda: write_report([]), "at least one")
    refuse(lambda: write_report([whole], tmp_path / "nowhere" / "page.html"), "could not write")


def test_source_data_that_cannot_be_had_is_said(tmp_path):
    x = draw(4, 1, 8, 8)
    gone = write_folder(tmp_path / "gone", x, flags=dict(data=str(tmp_path / "no such set")))
    page = Page(write_report([gone]))
    assert "no such folder" in page.said("The training images cannot be had")
    assert len(page.images) == 1 and page.table("Scores")[1]["distilled"] == ["98.1 ± 0.8", "0.307 ± 0.006"]
    other = write_folder(tmp_path / "other", draw(4, 3, 8, 8), flags=dict(data="digits"))
    assert "1x8x8, the distilled ones 3x8x8" in Page(write_report([other])).said("The training images cannot be had")


def test_named_sets_are_read_at_the_size_of_the_images(tmp_path):
    folder = write_folder(tmp_path / "big", draw(3, 1, 16, 16))  # frepo.py takes some sets at another size than usual
    page = Page(write_report([folder], data_dir=tmp_path / "data"))
    assert page.said("All 3") and len(page.images) == 4


# ----------------------------------------------------------------------------------------------------------- the curves


def test_seconds_count_sessions_and_not_the_gaps(tmp_path):
    def session(began, steps, purge=None):
        board = SummaryWriter(str(tmp_path), purge_step=purge, filename_suffix=f".{began}")
        writer = board._get_file_writer()
        for step, seconds in steps:
            board.add_scalar("loss", 10.0 * step + began, step, walltime=began + seconds)
        board.close()
        path = next(tmp_path.glob(f"*.{began}"))
        assert writer is not None
        rewrite(path, began)

    def rewrite(path, began):
        """The file again with its first event at `began`."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = list(LegacyEventFileLoader(str(path)).Load())
        for event in events:
            if not event.HasField("summary"):
                event.wall_time = began
        with open(path, "wb") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())

    session(1000, [(1, 2.0), (20, 6.0), (40, 10.0), (60, 15.0)])
    session(9000, [(60, 5.0), (80, 9.0)], purge=41)  # went on at step 40, an hour later
    session(20000, [(100, 3.0)], purge=81)
    points = scalars(tmp_path)["loss"]
    assert [step for step, _, _ in points] == [1, 20, 40, 60, 80, 100]
    assert [seconds for _, seconds, _ in points] == pytest.approx([2, 6, 10, 15, 19, 22])
    assert [value for _, _, value in points] == [1010, 1200, 1400, 9600, 9800, 21000]


def lines_of(svg):
    """The points of the two curves of a drawing, in its own coordinates: [(x (n,), y (n,)), ...]."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #3b82d6', svg)
    numbers = [np.array(re.findall(r"[ML] (\S+) (\S+)", path), float) for path in paths]
    return [(each[:, 0], each[:, 1]) for each in numbers]


def affine_error(shown, values):
    """The largest misfit of the best straight line shown = a values + b, and a."""
    a, b = np.polyfit(values, shown, 1)
    return np.abs(a * values + b - shown).max(), a


def test_drawing_shows_its_points():
    r = np.random.default_rng(0)
    points = [(s, 3.0 * s + r.uniform(0, 9), r.uniform(1, 2)) for s in (1, 20, 40, 60, 100)]
    svg = report.drawing(points, 0, False, None)
    panels = lines_of(svg)
    assert len(panels) == 2
    for column, (x, y) in enumerate(panels):
        error, slope = affine_error(x, np.array([p[column] for p in points]))
        assert error < 0.01 and slope > 0
        error, slope = affine_error(y, np.array([p[2] for p in points]))
        assert error < 0.01 and slope < 0  # SVG counts downwards
    assert re.findall(r">(steps|seconds)<", svg) == ["steps", "seconds"] and "currentColor" in svg
    assert report.INK not in svg
    steep = [(s, s, 10.0**-s) for s in (1, 2, 3, 4)]  # a logarithmic axis
    error, _ = affine_error(lines_of(report.drawing(steep, 0, False, None))[0][1], np.array([1.0, 2, 3, 4]))
    assert error < 0.01
    error, _ = affine_error(lines_of(report.drawing([(s, s, s - 2.0) for s in (1, 2, 90)], 0, False, None))[0][1],
                            np.array([1.0, 2, 90]))  # fmt: skip
    assert error < 0.01


def test_long_curves_are_averaged(monkeypatch):
    monkeypatch.setattr(report, "POINTS", 4)
    points = [(k, 2.0 * k, k**2) for k in range(10)]
    found = report.thinned(points).tolist()
    expected = []
    for start in (0, 3, 6, 9):
        group = points[start : start + 3]
        expected.append([sum(p[i] for p in group) / len(group) for i in range(3)])
    assert found == pytest.approx(np.array(expected)) and report.thinned(points[:4]).tolist() == [
        list(p) for p in points[:4]
    ]


def test_curves_of_a_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "drawing", lambda *args: seen.append(args) or "<svg></svg>")
    folder = write_folder(tmp_path / "run", draw(4, 1, 8, 8), events=True)
    clock = dict(loss=[(1, 5.0, 1.0), (21, 25.0, 0.5), (60, 100.0, 0.2)], lam=[(21, 25.0, math.inf), (60, 100.0, 6.0)])
    clock |= {"eval/match": [(20, 30.0, 0.7)]}
    monkeypatch.setattr(report, "scalars", lambda folder: dict(reversed(clock.items())))
    page = Page(write_report([folder]))
    captions = [text for text in page.words if text in ("loss", "lam") or text.startswith("evaluation:")]
    assert captions == ["loss", "lam", "evaluation: match; dashed: random real images",
                        "evaluation: probe; dashed: random real images"]  # fmt: skip
    assert seen[0][0] == clock["loss"] and seen[1][0] == clock["lam"][1:]
    # an evaluation stands at the time of its step: 20 is 19/20 of the way from 1 to 21, 40 is 19/39 from 21 to 60
    times = [5 + 20 * 19 / 20, 25 + 75 * 19 / 39]
    expected = [(20, times[0], 0.7), (40, times[1], 0.5)]
    assert np.allclose(seen[2][0], expected) and seen[2][2:] == (True, EVAL["random_real"]["match"]["mean"])
    assert np.allclose(seen[3][0], [(20, times[0], 0.52), (40, times[1], 0.54)])
    assert [args[1] for args in seen] == [0, 1, 2, 3] and seen[0][3] is None


# ------------------------------------------------------------------------------------------- other folders, the command


CELLS = [
    dict(row=row, target=target, protocol=protocol, model=model, metric=metric, **cell(mean, 0.01))
    for protocol, metric, row, target, model, mean in [
        ("probe", "accuracy", "distilled", "cifar10", "convnet", 0.4567),
        ("probe", "accuracy", "distilled", "flowers", "convnet", 0.2345),
        ("probe", "accuracy", "random_real", "cifar10", "convnet", 0.3456),
        ("scratch", "accuracy", "distilled", "cifar10", "convnet", 0.5),
        ("scratch", "accuracy", "distilled", "cifar10", "vgg11", 0.6),
        ("scratch", "accuracy", "random_real", "flowers", "vgg11", 0.7),
        ("scratch", "match", "random_real", "cifar10", "vgg11", 0.81),
    ]
]


def test_an_evaluators_folder(tmp_path):
    folder = tmp_path / "table__evaluate__0__20261122-130000"
    folder.mkdir()
    rows = {"random_real": {"images": 10, "y": "labels"}, "distilled": {"images": 10, "content": "a" * 64}}
    result = dict(method="evaluate", kind="pairs", cells=CELLS, rows=rows, args={"protocol": "probe"}, seconds=60.0)
    (folder / "result.json").write_text(json.dumps(result))
    page = Page(write_report([folder]))
    page.check_alone()
    head, rows = page.table("probe, accuracy, convnet")
    assert head == ["", "cifar10", "flowers"] and list(rows) == ["random real", "distilled"]
    assert rows == {"random real": ["34.6 ± 1.0", "-"], "distilled": ["45.7 ± 1.0", "23.4 ± 1.0"]}
    head, rows = page.table("scratch, accuracy")
    assert head == ["", "cifar10, convnet", "cifar10, vgg11", "flowers, vgg11"]
    assert rows == {"random real": ["-", "-", "70.0 ± 1.0"], "distilled": ["50.0 ± 1.0", "60.0 ± 1.0", "-"]}
    head, rows = page.table("scratch, match, cifar10, vgg11")
    assert rows == {"random real": ["0.810 ± 0.010"]}
    head, rows = page.table("What the rows are")
    assert head == ["row", "images", "y", "content"] and rows["distilled"] == ["10", "-", "a" * 10]
    assert "per cent" in next(t[0] for t in page.tables if "probe, accuracy" in t[0])
    assert "python -m common.evaluate --protocol probe" in page.words and "no distilled set" not in page.text
    (folder / "args.json").write_text(json.dumps({"protocol": "knn"}))
    assert Page(write_report([folder])).table("flag")[1] == {"protocol": ["knn"]}


def test_several_folders_are_compared(tmp_path):
    one = write_folder(tmp_path / "one", draw(4, 1, 8, 8), zca=WHITENING)
    scores = {"random_real": {"conv": cell(0.7, 0.02)}, "distilled": {"conv": cell(0.9, 0.01)}}
    two = write_folder(
        tmp_path / "two", draw(6, 1, 8, 8), torch.eye(6), "frepo", frepo.Args, scores=scores, seconds=500.0
    )
    three = bare(tmp_path, "digits__isa__0__20261122-121909")
    out = write_report([one, two, three], tmp_path / "all.html")
    assert out == tmp_path / "all.html"
    page = Page(out)
    page.check_alone()
    head, rows = page.table("run")
    assert head == [
        "run",
        "method",
        "data",
        "images",
        "storage",
        "measure",
        "distilled",
        "random real",
        "time",
        "memory",
    ]
    sizes = [4 * 64 * 4 + 4 * 5 * 4 + 8 + (64 * 64 + 64) * 4, 6 * 64 * 4 + 6 * 6 * 4 + 8]
    assert rows["1. one"] == ["krr_st", "birds", "4", f"{sizes[0]:,} bytes", "match", "0.307 ± 0.006", "0.644 ± 0.056",
                              "98.2 s", "0.86 GB"]  # fmt: skip
    assert rows["2. two"] == ["frepo", "birds", "6", f"{sizes[1]:,} bytes", "conv %", "90.0 ± 1.0", "70.0 ± 2.0",
                              "8.3 min (500 s)", "0.86 GB"]  # fmt: skip
    assert rows[f"3. {three.name}"] == ["isa", "digits", "-", "-", "-", "-", "-", "-", "-"]
    assert [value for name, value in page.attributes if name == "href" and value.startswith("#run")] == [
        "#run-1", "#run-2", "#run-3"]  # fmt: skip


def test_committed_results_are_printed_whole(tmp_path):
    """Every mean ± std of the five methods' committed tables is on the page."""
    for path in ("krr_st/digits_n010_seed0", "boost_pca/digits_seed0", "scdd/digits_ipc10_seed0",
                 "isa/digits_ipc10_seed0", "frepo/cifar10_ipc10_reduced"):  # fmt: skip
        result = json.loads((ROOT / "tests" / "results" / f"{path}.json").read_text())
        folder = tmp_path / path.split("/")[0]
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "args.json").write_text(json.dumps(result["args"]))
        page = Page(write_report([folder]))
        page.check_alone()
        head, rows = page.table("Scores on the test images")
        for name, row in result["eval"].items():
            for measure, value in row.items():
                mean, std = value["mean"], value["std"]
                text = f"{mean:.3f} ± {std:.3f}" if measure == "match" else f"{100 * mean:.1f} ± {100 * std:.1f}"
                assert rows[name.replace("_", " ")][head.index(measure.replace("_", " ")) - 1] == text
        for model, table in result.get("eval_models", {}).items():
            head, rows = page.table(f"eval models: {model}:")
            match = table["distilled"]["match"]
            assert rows["distilled"][head.index("match") - 1] == f"{match['mean']:.3f} ± {match['std']:.3f}"
        for other, row in result.get("distilled_minus", {}).items():
            head, rows = page.table("Paired difference")
            for word, text in zip(head[1:], rows[f"distilled - {other.replace('_', ' ')}"], strict=True):
                value, scale, digits = row[word.replace(" ", "_")], *((1, 3) if word == "match" else (100, 1))
                assert text == f"{scale * value['mean']:.{digits}f} ± {scale * value['se']:.{digits}f}"
        assert page.table("cost")[1]["peak memory"] == [f"{result['peak_memory_bytes'] / 1e9:.2f} GB"]


def test_applications_curves(tmp_path):
    for name in ("continual_digits_5_steps", "membership_mnist_test"):
        result = json.loads((ROOT / "tests" / "results" / "frepo" / f"{name}.json").read_text())
        folder = bare(tmp_path, name)
        (folder / "result.json").write_text(json.dumps(result))
        page = Page(write_report([folder]))
        for row, measures in result["curves"].items():
            for measure, points in measures.items():
                head, rows = page.table(f": {measure},")
                spread = [p.get("std", p.get("se")) for p in points]
                scale, digits = (1, 3) if measure.startswith("AUC") else (100, 1)
                assert head == ["at", *[str(p["at"]) for p in points]]
                assert rows[row.replace("_", " ")] == [
                    f"{scale * p['mean']:.{digits}f} ± {scale * s:.{digits}f}"
                    for p, s in zip(points, spread, strict=True)
                ]


@pytest.mark.parametrize("module, changes", [
    (krr_st, dict(data="my birds/'1", size=16, widths=(8, 16), teacher_mlp=True, ridge_grad=True, grad_clip=0.5)),
    (krr_st, dict(teacher_mlp=False, holdout=0.1, resume="runs/x", widths=())),
    (frepo, dict(learn_label=False, zca=False, eval_shuffle=False, members=5, eval_models=("conv", "resnet18"))),
])  # fmt: skip
def test_the_command_makes_the_same_flags(tmp_path, module, changes):
    args = module.Args(**changes)
    shutil.copy(module.__file__, tmp_path / "script.py")
    flags = json.loads(json.dumps(dataclasses.asdict(args)))
    line = report.command(f"{module.__name__}.py", flags, report.own_defaults(tmp_path))
    words = shlex.split(line)
    assert words[:2] == ["python", f"{module.__name__}.py"]
    assert tyro.cli(module.Args, args=words[2:]) == dataclasses.replace(args, resume=None)
    assert len(words) < 30  # what is at its default is left out
    assert "--ridge 1e-06" in report.command("x.py", flags, {})  # without the script: everything


def test_storage_by_part(tmp_path):
    x, path = draw(4, 1, 8, 8), tmp_path / "run" / "distilled.safetensors"
    write_folder(tmp_path / "run", x, zca=WHITENING)
    expected = dict(images=4 * 64 * 4, labels=4 * 5 * 4, normalisation=8, whitening=(64 * 64 + 64) * 4)
    assert report.storage(path) == expected | dict(file=path.stat().st_size)


def test_a_set_of_bases(tmp_path):
    tensors = dict(b_x=draw(2, 16), mu_x=draw(16), b_y=draw(2, 5), mu_y=draw(5), c_v=draw(3, 3, 2))
    tensors |= {key: (20 * draw(3, 2)).to(torch.int8) for key in ("c_x", "c_y")}
    tensors |= dict(c_x_scale=draw(2), c_y_scale=draw(2))
    code = Code(tensors, (1, 4, 4), 2, ("rot90", "rot180", "rot270"))
    folder = write_folder(tmp_path / "run", draw(3, 1, 8, 8))
    save_distilled(
        folder / "distilled.safetensors", None, None, torch.zeros(1), torch.ones(1), method="boost_pca", data="digits",
        content="c" * 64, y_is="teacher features", class_names=[], resize="none", step=1, seed=0, recipe={}, code=code,
    )  # fmt: skip
    sizes = report.storage(folder / "distilled.safetensors")
    assert sizes["images"] == 3 * 2 + 2 * 4 + 2 * 16 * 4 + 16 * 4
    assert sizes["labels"] == 3 * 2 + 2 * 4 + 2 * 5 * 4 + 5 * 4 + 3 * 3 * 2 * 4
    page = Page(write_report([folder]))
    assert "3 fixed views of each" in page.said("3 distilled images of 8 px") and len(page.images) == 1 + 3
    assert page.picture(0).shape == (8, 26, 1)


def test_the_page_stays_small(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "run", draw(300, 1, 16, 16), ipc=30)
    monkeypatch.setattr(report, "PICTURES", 60_000)
    page = Page(write_report([folder], data_dir=tmp_path / "data"))
    shown = int(re.match(r"The first (\d+) of 300", page.said("so that the page stays small"))[1])
    assert shown % 30 == 0 and 30 < shown < 300
    assert page.picture(0).shape == (shown // 30 * 17 - 1, 30 * 17 - 1, 1)
    assert 30_000 < sum(len(picture["src"]) for picture in page.images) < 60_000
    assert re.search(r"The (\d+) nearest of 300", page.text)[1] == str(len(page.images) - 1)


@pytest.mark.parametrize("n, ipc, expected", [
    (10, None, 10), (4, 1, 4), (100, 1, 10), (1000, None, 25), (100, 10, 10), (1000, 10, 20), (1000, 1, 25),
    (500, 50, 25), (2000, 2, 20), (100, True, 10), (60, 3, 3), (63, 3, 18),
])  # fmt: skip
def test_rows_of_the_grid(n, ipc, expected):
    assert report.picture_rows(n, ipc) == expected


@pytest.mark.slow
def test_a_thousand_images_of_64_px(tmp_path, monkeypatch):
    x, real = draw(1000, 3, 64, 64), (255 * draw(2000, 3, 64, 64, seed=1)).byte()  # noise: PNG cannot make it smaller
    source = dataclasses.replace(load("digits"), x_train=real, y_train=None, flip=True, class_names=[])
    monkeypatch.setattr(report, "load", lambda *args, **kwargs: source)
    folder = write_folder(tmp_path / "run", x)
    page = write_report([folder])
    assert 15e6 < page.stat().st_size < 20e6
