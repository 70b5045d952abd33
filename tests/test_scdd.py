"""scdd.py: the specification's checks (1.6), the recovery against a naive restatement, whole small runs, resume."""

import copy
import dataclasses
import importlib.util
import inspect
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from PIL import Image
from safetensors.torch import load_file
from test_frepo import colour_folder
from torch import nn
from watched import REPO, equal, flags, same_end

import common.pretrain
import common.relabel
import common.run
import frepo
import kernels
import scdd
from common.artefact import load_distilled
from common.augment import counter_uniform
from common.data import Data, Inputs, load, normalise
from common.models import ResNet
from common.recipes import LIMITS, RECIPES, SETTINGS
from common.run import rng, seeded
from common.teacher import Teacher, load_own

TINY = dict(
    steps=6, ipc=2, recover_batch=8, chunk=8, teacher_width=4, teacher_epochs=2, teacher_batch=256, teacher_queue=256,
    probe_epochs=2, label_width=4, label_epochs=2, log_every=1, save_every=4, device="cpu", eval_runs=2, eval_epochs=2,
    eval_width=4, eval_batch=10, sre2l_lr_img=0.2, sre2l_r_bn=0.03,
)  # fmt: skip
FEW = dict(eval_runs=1, eval_epochs=1)  # where the students do not matter
COLOUR = dict(teacher_arch="resnet10", label_arch="resnet10", eval_arch="resnet10", teacher_batch=16, label_batch=16,
              probe_augment=False)  # fmt: skip


@pytest.fixture(autouse=True)
def unpredicted(monkeypatch):
    """Nobody waits for these runs: their evaluation is not timed beforehand (that of `whole` is)."""
    monkeypatch.setattr(scdd, "predict_seconds", lambda *args: 0.0)


def tiny(out_dir, **changes):
    method = changes.get("teacher_method", "moco2")
    own = {key: value for key, value in TINY.items() if method != "supervised" or not key.startswith("teacher_")}
    if method not in ("moco2", "swav"):
        own.pop("teacher_queue", None)
    if changes.get("teacher", "train") != "train":
        own = {key: value for key, value in own.items() if key.removeprefix("teacher_") not in SETTINGS}
    return scdd.Args(**own | {"out_dir": str(out_dir)} | changes)


def only_run(out_dir: Path) -> Path:
    (folder,) = (path for path in out_dir.iterdir() if path.name != "teachers")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(out-dir, result) of a whole run with blocks of 8, 8 and 4 images, not to be changed."""
    out_dir = tmp_path_factory.mktemp("whole")
    return out_dir, scdd.main(tiny(out_dir))


@pytest.fixture
def out(whole, tmp_path):
    """An out-dir with the teachers of `whole` and no run."""
    shutil.copytree(whole[0] / "teachers", tmp_path / "runs" / "teachers")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """Flags of runs on a folder of coloured images in two classes, whose teachers are trained."""
    parent = tmp_path_factory.mktemp("colour")
    found = dict(data=str(colour_folder(parent / "set")), data_dir=str(parent / "data"), ipc=5, recover_batch=4)
    found |= COLOUR | dict(chunk=8)
    scdd.main(tiny(parent / "runs", **found | FEW | dict(steps=1)))
    return found | dict(out_dir=str(parent / "runs"))


def newest(out_dir: str | Path) -> Path:
    runs = [path for path in Path(out_dir).iterdir() if path.name != "teachers"]
    return max(runs, key=lambda path: path.stat().st_mtime_ns)


def slow_but(fast, parameters) -> list:
    """The parameters of a test, those that are not `fast` marked slow."""
    return [each if each in fast else pytest.param(each, marks=pytest.mark.slow) for each in parameters]


def draws(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


# ------------------------------------------------------------------------------------------ the loss, by its definition


class Odd(nn.Module):
    """BatchNorms that run in another order than the one they are registered in; one has no weights."""

    def __init__(self):
        super().__init__()
        self.late = nn.BatchNorm2d(7)
        self.conv = nn.Conv2d(3, 5, 3)
        self.early = nn.BatchNorm2d(5)
        self.deep = nn.Sequential(nn.Conv2d(5, 7, 2), nn.Identity())
        self.plain = nn.BatchNorm2d(7, affine=False)
        self.fc = nn.Linear(7, 4)

    def forward(self, x):
        x = self.deep(torch.tanh(self.early(self.conv(x))))
        return self.fc(torch.tanh(self.plain(self.late(x) ** 2)).mean((2, 3)))


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with random BatchNorms: untrained ones would hide what their weights and statistics do."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in [module.running_mean] + ([module.weight.data, module.bias.data] if module.affine else []):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3 + 0.7)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator, dtype=torch.float64) + 0.2)
    return net.eval()


def small_resnet() -> nn.Module:
    with seeded("test"):
        net = ResNet("resnet10", 3, 4, "cifar", 1)
        return nn.Sequential(net, nn.Linear(net.dim, 4))


def odd_net() -> nn.Module:
    with seeded("test"):
        return Odd()


def naive_loss(net: nn.Module, x, y, r_bn, first):
    """(cross-entropy, sum of statistics) of one batch: forward hooks, sums over images and pixels, one by one."""
    inputs = {}
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [
        m.register_forward_hook(lambda m, args, out, i=i: inputs.update({i: args[0]})) for i, m in enumerate(norms)
    ]
    scores = net(x)
    for hook in hooks:
        hook.remove()
    ce = 0.0
    for row, label in zip(scores, y.tolist(), strict=True):
        ce = ce - (row[label] - row.exp().sum().log()) / len(x)
    statistics = 0.0
    for i, norm in enumerate(norms):
        values = inputs[i].permute(1, 0, 2, 3).reshape(norm.num_features, -1)
        count = values.shape[1]
        mean = values.sum(1) / count
        variance = ((values - mean[:, None]) ** 2).sum(1) / count  # biased
        term = ((norm.running_var - variance) ** 2).sum().sqrt() + ((norm.running_mean - mean) ** 2).sum().sqrt()
        statistics = statistics + (first if i == 0 else 1.0) * term
    return ce, statistics


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("make", [small_resnet, odd_net])
def test_loss_and_gradient_equal_the_form_with_hooks(make, groups):
    """Check 1 of the specification, in float64; of several groups: the sum of the losses, each of its own images."""
    net = shaken(make())
    (x,) = draws((groups * 4, 3, 8, 8), seed=groups)
    y = torch.arange(groups * 4) * 3 % 4
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x.requires_grad_()
    scores, terms = scdd.with_statistics(net, groups)(x)
    assert torch.equal(scores, net(x)) or (scores - net(x)).abs().max() < 1e-12
    ce, statistics = scdd.recovery_terms(scores, y, terms, 10.0)
    naive = [naive_loss(net, x[g * 4 : g * 4 + 4], y[g * 4 : g * 4 + 4], 0.3, 10.0) for g in range(groups)]
    for g in range(groups):
        torch.testing.assert_close(ce[g], naive[g][0], rtol=1e-11, atol=0)
        torch.testing.assert_close(statistics[g], naive[g][1], rtol=1e-11, atol=0)
    (ours,) = torch.autograd.grad((ce + 0.3 * statistics).sum(), x)
    (theirs,) = torch.autograd.grad(sum(c + 0.3 * s for c, s in naive), x)
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()
    assert equal(net.state_dict(), before) and all(p.requires_grad for p in net.parameters())


def test_the_first_batchnorm_is_the_first_registered():
    """Its factor changes the loss by 9 times its own term."""
    net = shaken(odd_net())
    (x,) = draws((5, 3, 8, 8))
    _, terms = scdd.with_statistics(net)(x)
    y = torch.zeros(5, dtype=torch.int64)
    scores = net(x)
    one, ten = (scdd.recovery_terms(scores, y, terms, first)[1] for first in (1.0, 10.0))
    late = net.deep(torch.tanh(net.early(net.conv(x))))
    term = (net.late.running_mean - late.mean((0, 2, 3))).norm()
    term = term + (net.late.running_var - late.var((0, 2, 3), correction=0)).norm()
    torch.testing.assert_close(ten - one, 9 * term[None], rtol=1e-11, atol=0)


def test_a_scaled_convolution_changes_the_statistics_and_not_the_scores():
    """Check 4: r_bn belongs to one teacher."""
    net = shaken(small_resnet())
    scaled, k = copy.deepcopy(net), 3.0
    with torch.no_grad():
        block = scaled[0].layer2[0]
        block.conv1.weight.mul_(k), block.bn1.running_mean.mul_(k), block.bn1.running_var.mul_(k**2)
        block.bn1.eps *= k**2
    (x,) = draws((6, 3, 8, 8))
    (a, terms_a), (b, terms_b) = (scdd.with_statistics(each)(x) for each in (net, scaled))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    names = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    place = names.index("0.layer2.0.bn1")
    others = [i for i in range(len(names)) if i != place]
    torch.testing.assert_close(terms_a[others], terms_b[others], rtol=1e-10, atol=1e-12)
    assert terms_b[place] > 2 * terms_a[place]


# ------------------------------------------------------------------------------------------------------------ the views


def naive_view(x, u, crop, area, flip, jitter):
    """One image (C, H, W) in float64: weights of every pixel for every pixel of the box, a mirror image, a roll."""
    if crop:
        size = x.shape[-1]
        share = u[0] * (1 - area) + area
        ratio = (3 / 4) ** (1 - 2 * u[1])
        width, height = min(1.0, math.sqrt(share * ratio)), min(1.0, math.sqrt(share / ratio))
        left, top = u[2] * (1 - width), u[3] * (1 - height)
        rows, columns = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
        for matrix, low, length in ((rows, top, height), (columns, left, width)):
            for i in range(size):
                at = min(max((low + (i + 0.5) / size * length) * size - 0.5, 0), size - 1)
                below = min(int(at), size - 2)
                matrix[i, below], matrix[i, below + 1] = 1 - (at - below), at - below
        x = rows @ x @ columns.T
        x = x.flip(2) if flip and u[4] < 0.5 else x
    low, high = jitter
    down, right = (low + int(v * (high - low + 1)) for v in (u[5], u[6]))
    return x.roll((down, right), (1, 2))


@pytest.mark.parametrize("jitter", [(0, 0), (0, 4), (-3, 2)], ids=str)
@pytest.mark.parametrize(("crop", "flip"), [(False, True), (True, True), (True, False)])
def test_views_equal_the_naive_restatement(crop, flip, jitter):
    (x,) = draws((40, 2, 6, 6))
    u = torch.rand(40, 7, generator=torch.Generator().manual_seed(1))
    ours = scdd.looked_at(x, u, crop, 0.2, flip, jitter)
    theirs = torch.stack([naive_view(a, b, crop, 0.2, flip, jitter) for a, b in zip(x, u.tolist(), strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # the boxes are float32


def test_the_shifts_take_every_value_alike():
    u = counter_uniform(torch.arange(6000), 7, "test")
    x = torch.zeros(6000, 1, 8, 8)
    x[:, :, 0, 0] = 1.0
    places = scdd.looked_at(x, u, False, 1.0, False, (-1, 4)).flatten(1).argmax(1)
    down, right = places // 8, places % 8
    for shifts in (down, right):
        counts = shifts.bincount(minlength=8)[[7, 0, 1, 2, 3, 4]]
        assert counts.sum() == 6000 and (counts - 1000).abs().max() < 5 * math.sqrt(1000)


def test_the_curriculum_falls_from_the_whole_image_to_the_smallest_box():
    for t in range(11):
        assert scdd.smallest_area(t, 10, 0.08, False) == 0.08
        expected = 0.08 + 0.92 * (1 + math.cos(math.pi * t / 10)) / 2
        assert scdd.smallest_area(t, 10, 0.08, True) == pytest.approx(expected, rel=1e-12)
    assert scdd.smallest_area(0, 10, 0.08, True) == pytest.approx(1) and scdd.smallest_area(5, 10, 0.0, True) == 0.5


# ---------------------------------------------------------------------------------------------------- order and batches


@pytest.mark.parametrize(("ipc", "classes", "batch", "chunk"), [
    (3, 10, 10, 30), (3, 10, 10, 10), (3, 10, 10, 25), (3, 10, 8, 16), (3, 10, 8, 1), (1, 3, 100, 5), (2, 5, 1, 4),
    (50, 100, 100, 1234), (4, 3, 12, 12), (1, 2, 2, 1), (7, 4, 9, 1000),
])  # fmt: skip
def test_blocks_are_whole_batches_and_a_left_over_one(ipc, classes, batch, chunk):
    labels = torch.arange(classes) * 2  # a part may lack some
    y, blocks = scdd.recovery_batches(labels, ipc, batch, chunk)
    assert y.tolist() == [2 * c for _ in range(ipc) for c in range(classes)]
    covered, sizes, size_of = [], [], min(batch, len(y))
    for first, size, of in blocks:
        assert first == len(covered) and size % of == 0 and size > 0
        covered += range(first, first + size)
        sizes += [of] * (size // of)
        assert size <= max(chunk, of)
    assert covered == list(range(len(y)))
    left = len(y) % size_of
    assert sizes == [size_of] * (len(y) // size_of) + [left] * (left > 0)
    if left:  # a batch of another size is a block by itself
        assert blocks[-1] == (len(y) - left, left, left)
    for first, size, of in blocks:
        for b in range(first, first + size, of):
            counts = y[b : b + of].bincount(minlength=2 * classes)[labels]
            assert counts.max() - counts.min() <= 1  # as many classes as they can


def test_the_order_of_recovery_and_back():
    x = torch.arange(12)  # three classes of four images
    assert scdd.in_order(x, 4).tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert scdd.by_class(scdd.in_order(x, 4), 4).tolist() == x.tolist()
    images = torch.randn(6, 1, 2, 2)
    y, _ = scdd.recovery_batches(torch.arange(3), 2, 3, 3)
    assert scdd.by_class(y, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(scdd.by_class(images, 2)[3], images[4])  # class 1, its second


# ----------------------------------------------------------------------------------------------------- images and files


def noise_and_smooth(channels: int = 3) -> dict[str, torch.Tensor]:
    """What recovery makes of CIFAR's constants, and what an image is like."""
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(20, channels, 32, 32, generator=generator) * 0.2 + 0.5).clamp(0, 1)
    generator.manual_seed(0)
    coarse = torch.randn(20, channels, 16, 16, generator=generator) * 0.25 + 0.5
    smooth = F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
    return {"noise": noise, "smooth": smooth}


@pytest.mark.parametrize(("kind", "low", "high"), [("noise", 15.2, 15.8), ("smooth", 20.3, 21.9)])
def test_jpeg_costs_what_the_specification_measured(kind, low, high):
    """Published: 15.5 dB for noise-like images of 32 px, 21.6 dB for smooth ones (specification, 4.1)."""
    x = noise_and_smooth()[kind]
    assert low < scdd.psnr(scdd.through_jpeg(x), x) < high


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pils_at_75_with_halved_colours_of_cut_pixels(channels):
    x = noise_and_smooth(channels)["smooth"][:3] * 1.1 - 0.05  # a little outside
    ours = scdd.through_jpeg(x)
    assert ours.shape == x.shape and ours.dtype == torch.float32
    for image, found in zip(x, ours, strict=True):
        pixels = np.floor(image.clamp(0, 1).numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
        file = io.BytesIO()
        made = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        made.save(file, format="JPEG", quality=75, **(dict(subsampling="4:2:0") if channels == 3 else {}))
        back = np.asarray(Image.open(file)).reshape(32, 32, channels).transpose(2, 0, 1)
        assert (found.numpy() * 255).round().astype(np.uint8).tolist() == back.tolist()
    flat = torch.full((1, channels, 16, 16), 127.9 / 255)
    assert torch.equal(scdd.through_jpeg(flat), torch.full_like(flat, 127 / 255))  # not 128


def test_psnr():
    x = torch.zeros(2, 3, 4, 4)
    assert scdd.psnr(x + 0.1, x) == pytest.approx(20, abs=1e-4)
    y = x.clone()
    y[0] = 0.2  # half of the pixels
    assert scdd.psnr(y, x) == pytest.approx(-10 * math.log10(0.02), abs=1e-4)
    assert scdd.psnr(x, x) == 120


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_are_the_rounded_pixels(tmp_path, channels):
    (x,) = draws((4, channels, 5, 5))
    x = (x * 0.4 + 0.5).float()
    x[0, 0, 0, :4] = torch.tensor([0.49, 0.51, 254.49, 254.51]) / 255
    y = torch.tensor([2, 0, 2, 1])
    scdd.write_images(tmp_path, x, y, ["a", "b c", "d"])
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert names == {"002_d/000000.png", "000_a/000001.png", "002_d/000002.png", "001_b_c/000003.png"}
    for place, label in enumerate(["002_d", "000_a", "002_d", "001_b_c"]):
        pixels = np.asarray(Image.open(tmp_path / label / f"{place:06d}.png")).reshape(5, 5, channels)
        expected = np.round(x[place].clamp(0, 1).numpy().astype(np.float64) * 255).transpose(1, 2, 0)
        assert pixels.tolist() == expected.astype(int).tolist()


def test_class_names_stay_one_folder_each(tmp_path):
    scdd.write_images(tmp_path, torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), ["F/A 18", "b"])
    assert len(list(tmp_path.iterdir())) == 2 and len(list(tmp_path.glob("*/*.png"))) == 2


def test_a_teacher_with_other_constants_sees_its_own_normalisation():
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    theirs = dict(mean=torch.tensor([0.485, 0.456, 0.406]), std=torch.tensor([0.229, 0.224, 0.225]))
    x = torch.rand(4, 3, 5, 5)
    empty = torch.zeros(2, 3, 5, 5, dtype=torch.uint8)
    data = Data("made", empty, torch.arange(2), empty, torch.arange(2), ["a", "b"], mean, std, "none", "key", True)
    teacher = Teacher(nn.Identity(), 1, **theirs, name="other", info={}, folder=None)
    found = scdd.Rescale(data.mean, data.std, teacher)(normalise(x, mean, std))
    torch.testing.assert_close(found, normalise(x, **theirs), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the recovery


def network_of(out_dir: Path, which: str, classes: int) -> nn.Module:
    """What the run recovered from, in float64, read from the files of its teachers."""
    kind = {"distilled": "moco2", "sre2l": "supervised"}[which]
    (folder,) = (path for path in (Path(out_dir) / "teachers").iterdir() if f"-{kind}-" in path.name)
    teacher = load_own(folder / "teacher.safetensors")
    fc = teacher.fc
    if which == "distilled":
        (probe,) = folder.glob("probe-*.safetensors")
        fc = nn.Linear(teacher.dim, classes)
        fc.load_state_dict(load_file(probe))
    return nn.Sequential(teacher.net, fc).double().eval().requires_grad_(False)


def naive_recovery(args, data: Data, net: nn.Module, lr: float, r_bn: float):
    """All images after args.steps steps (n, C, H, W), normalised, float64, in the order of recovery: batch by batch,
    image by image, with Adam on plain tensors. None of it knows of chunks."""
    mean, std = data.mean.double()[:, None, None], data.std.double()[:, None, None]
    classes, n = data.num_classes, args.ipc * data.num_classes
    size = min(args.recover_batch, n)
    order = torch.randperm(len(data.y_train), generator=rng("initial images", args.seed)).tolist()
    of_class = [[i for i in order if data.y_train[i] == c] for c in range(classes)]
    breaks = {round(k * args.steps / args.segments) for k in range(1, args.segments)}
    result = []
    for number, first in enumerate(range(0, n, size)):
        images = range(first, min(first + size, n))
        y = torch.tensor([i % classes for i in images])
        if args.init == "real":
            pixels = torch.stack([data.x_train[of_class[i % classes][i // classes]] for i in images])
            x_0 = (pixels.double() / 255 - mean) / std
        else:
            noise = rng("noise", args.seed, number)
            x_0 = torch.randn(len(images), *data.x_train.shape[1:], generator=noise).double()
        x, m, v, count = x_0.clone(), 0.0, 0.0, 0
        for t in range(args.steps):
            if t in breaks:
                x, m, v, count = (1 - args.residual) * x + args.residual * x_0, 0.0, 0.0, 0
            x = x.requires_grad_()
            area = args.crop_min
            if args.curriculum:
                area += (1 - area) * (1 + math.cos(math.pi * t / args.steps)) / 2
            keys = torch.tensor([i if args.per_image else number for i in images])
            u = counter_uniform(keys, 7, "recovery", args.seed, t).tolist()
            views = [naive_view(a, b, args.crop, area, data.flip, args.jitter) for a, b in zip(x, u, strict=True)]
            ce, statistics = naive_loss(net, torch.stack(views), y, r_bn, args.first_bn_multiplier)
            (g,) = torch.autograd.grad(ce + r_bn * statistics, x)
            count += 1
            m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g**2
            rate = lr * (1 + math.cos(math.pi * t / args.steps)) / 2
            x = x.detach() - rate * (m / (1 - 0.5**count)) / ((v / (1 - 0.9**count)).sqrt() + 1e-8)
            x = torch.minimum(torch.maximum(x, -mean / std), (1 - mean) / std)
        result.append(x)
    return torch.cat(result)


def recovered(folder: Path, which: str) -> torch.Tensor:
    files = sorted(folder.glob(f"recovered-{which}-*.safetensors"))
    return torch.cat([load_file(file)["x"] for file in files])


def same_images(ours: torch.Tensor, theirs: torch.Tensor, far: float = 1e-3) -> None:
    """Up to float32's rounding. Adam divides by the gradient's size: where that is nothing but rounding, a pixel may
    go another way, so one in two hundred may."""
    apart = (ours.double() - theirs.double()).abs() > far * theirs.double().square().mean().sqrt()
    assert apart.double().mean() <= 0.005, apart.double().mean()


@pytest.mark.parametrize("which", ["distilled", "sre2l"])
def test_the_recovery_is_the_method(whole, which):
    """Noise, no crop (the digits' jitter is 0 0): batches of 8, 8 and a left-over 4, in three blocks."""
    out_dir, _ = whole
    run = only_run(out_dir)
    args, data = common.run.load_args(scdd.Args, run), load("digits", data_dir="data")
    lr, r_bn = (args.lr_img, args.r_bn) if which == "distilled" else (args.sre2l_lr_img, args.sre2l_r_bn)
    expected = naive_recovery(args, data, network_of(out_dir, which, 10), lr, r_bn)
    assert len(list(run.glob(f"recovered-{which}-*"))) == 3
    same_images(recovered(run, which), expected)


OPTIONS = {
    "as published": dict(jitter=(0, 4), lr_img=0.4, r_bn=0.005),
    "the successors'": dict(
        crop=True, curriculum=True, init="real", segments=2, jitter=(-2, 3), residual=0.3, first_bn_multiplier=2.0,
    ),
    "per image": dict(crop=True, crop_min=0.3, per_image=True, jitter=(0, 2), init="real", seed=3),
    "three segments": dict(crop=True, segments=3, init="real", steps=6, seed=1, residual=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(("as published", "the successors'"), OPTIONS))
def test_the_recovery_with_its_options_is_the_method(colour, name):
    """Coloured images of a folder, which may be mirrored: two groups in a block, then a left-over batch."""
    scdd.main(scdd.Args(**TINY | colour | FEW | dict(steps=5, sre2l=False) | OPTIONS[name]))
    run = newest(colour["out_dir"])
    args, data = common.run.load_args(scdd.Args, run), load(colour["data"], data_dir=colour["data_dir"])
    assert data.flip
    expected = naive_recovery(args, data, network_of(colour["out_dir"], "distilled", 2), args.lr_img, args.r_bn)
    assert len(list(run.glob("recovered-*"))) == 2  # 8 images in two groups, and 2
    same_images(recovered(run, "distilled"), expected)


def test_blocks_and_more_images_change_nothing_but_rounding(whole, out):
    """Groups know nothing of each other: one block of all, and a set of three images a class whose first two are the
    two of a set of two."""
    straight = recovered(only_run(whole[0]), "distilled")
    scdd.main(tiny(out, chunk=100, sre2l=False, **FEW))
    together = recovered(newest(out), "distilled")
    same_images(together, straight)
    scdd.main(tiny(out, chunk=16, ipc=3, sre2l=False, **FEW))
    more = recovered(newest(out), "distilled")
    assert len(more) == 30
    same_images(more[:16], straight[:16])  # the third batch has other company: 4 images against 8


def test_no_tensor_of_the_networks_changes(whole, out, monkeypatch):
    """Check 2: from the squeeze's file to the end of the run, BatchNorm's buffers included, bit for bit; what the
    recovery works with has the same parameters and statistics, in eval mode."""
    given, original = [], scdd.with_statistics

    def spy(net, *args, **rest):
        function = original(net, *args, **rest)
        given.append((net, inspect.getclosurevars(function).nonlocals["net"]))
        return function

    monkeypatch.setattr(scdd, "with_statistics", spy)
    scdd.main(tiny(out, teacher_train_mode=True, **FEW))
    given = [(net, used) for net, used in given if next(net.parameters()).device.type == "cpu"]
    for which in ("distilled", "sre2l"):
        expected = network_of(out, which, 10).float().state_dict()
        found = 0
        for net, used in given:
            state, state_used = (
                {k.removeprefix("1."): v for k, v in each.state_dict().items()} for each in (net, used)
            )
            if torch.equal(state["0.conv1.weight"], expected["0.conv1.weight"]):
                found += 1
                assert all(torch.equal(state[key], expected[key]) for key in expected)
                own = {key.replace(".norm.", "."): value for key, value in state_used.items()}
                assert all(torch.equal(own[key], expected[key]) for key in expected)
                norms = [m for each in (net, used) for m in each.modules() if isinstance(m, nn.BatchNorm2d)]
                assert norms and not any(norm.training for norm in norms)
        assert found
    for folder in (out / "teachers").iterdir():
        for path in folder.iterdir():
            assert path.read_bytes() == (whole[0] / "teachers" / folder.name / path.name).read_bytes()


@pytest.mark.parametrize("per_image", [False, True])
def test_a_batch_shares_its_view_as_published(colour, monkeypatch, per_image):
    """Check 3: one box, mirror image and shift for a batch and step, another for the next batch and the next step."""
    seen, original = [], scdd.looked_at
    monkeypatch.setattr(scdd, "looked_at", lambda x, u, *rest: seen.append(u) or original(x, u, *rest))
    changes = dict(steps=3, sre2l=False, per_image=per_image, crop=True, jitter=(0, 3))
    scdd.main(scdd.Args(**TINY | colour | FEW | changes))
    assert [len(u) for u in seen] == [8, 8, 8, 2, 2, 2]
    of_batches = [u[i : i + 4] for u in seen for i in range(0, len(u), 4)]
    for u in of_batches:
        assert len({tuple(row) for row in u.tolist()}) == (len(u) if per_image else 1)
    assert len({tuple(u[0].tolist()) for u in of_batches}) == 9  # three batches, three steps


def test_the_saved_pixels_are_the_last_iterate(colour):
    """Check 3: as it was left by the last step, not shifted, in [0, 1]; the artefact gives it back."""
    result = scdd.main(scdd.Args(**TINY | colour | FEW | dict(steps=3, jitter=(1, 4), lr_img=2.0)))
    run = newest(colour["out_dir"])
    distilled = load_distilled(run / "distilled.safetensors", "scdd")
    assert distilled.x.min() >= 0 and distilled.x.max() <= 1
    assert (distilled.x == 0).any() and (distilled.x == 1).any()  # so large a rate reaches the bounds
    x = recovered(run, "distilled")  # in the order of recovery: 0 1 0 1 ...
    assert (distilled.inputs() - torch.cat([x[0::2], x[1::2]])).abs().max() < 1e-5
    assert distilled.y.argmax(1).tolist() == [0] * 5 + [1] * 5 and distilled.y.sum() == 10
    state = common.run.load_checkpoint(run / "checkpoint.pt")
    assert torch.equal(state["x_s"], recovered(run, "sre2l")[8:])
    files = sorted((run / "images").rglob("*.png"))
    assert [path.parent.name for path in files] == ["000_bright"] * 5 + ["001_dark"] * 5
    for path, image in zip(files, distilled.x, strict=True):
        pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)
        assert pixels.tolist() == (image * 255).double().round().int().tolist()
    assert result["storage_bytes"] == 4 * (10 * 3 * 16 * 16 + 10 * 2 + 6) and result["label_bytes"] == 0


# ------------------------------------------------------------------------------------------------------- the evaluation


def test_every_row_is_scored_once_on_all_test_images(whole):
    """Check 5, restated: random real images, random crops, both recoveries; the same labels, recipe and start."""
    out_dir, result = whole
    run, data = only_run(out_dir), load("digits", data_dir="data")
    assert list(result["eval"]) == ["random_real", "random_crops", "sre2l", "distilled"]
    label = network_of(out_dir, "sre2l", 10).float()
    recipe = common.relabel.SoftRecipe(**result["protocol"])
    y = torch.arange(10).repeat_interleave(2)
    own = load_distilled(run / "distilled.safetensors").x
    sre2l = recovered(run, "sre2l") * data.std[:, None, None] + data.mean[:, None, None]
    sre2l = torch.stack([sre2l[c + 10 * i] for c in range(10) for i in range(2)]).clamp(0, 1)
    crops, _ = common.relabel.random_crops(data, label, 2, torch.device("cpu"), 0)
    for student in range(2):
        order = torch.randperm(len(data.y_train), generator=rng("random real", 0, student))
        chosen = torch.stack([i for c in range(10) for i in [i for i in order if data.y_train[i] == c][:2]])
        sets = dict(random_real=data.x_train[chosen], random_crops=crops, sre2l=sre2l, distilled=own)
        for row, x in sets.items():
            with seeded("student", 0, student):
                net = ResNet("resnet10", 1, 4, "cifar", 1)
                net = nn.Sequential(net, nn.Linear(net.dim, 10))
            x = Inputs(x, data.mean, data.std, None, torch.device("cpu"), 0.0)
            net = common.relabel.post_train(net, x, y, label, recipe, 0, student).eval()
            predicted = [int(net(image[None]).argmax()) for image in normalise(data.x_test, data.mean, data.std)]
            right = sum(a == b for a, b in zip(predicted, data.y_test.tolist(), strict=True))
            assert result["eval"][row]["student"]["values"][student] == pytest.approx(right / 360, abs=1.5 / 360), row
    for scores in result["eval"].values():
        assert scores["student"]["mean"] == pytest.approx(sum(scores["student"]["values"]) / 2)


def test_the_result_says_what_was_measured(whole):
    """Statistics of noise, real images and the end; how many the labelling teacher recognises, by their own nets."""
    out_dir, result = whole
    run, data = only_run(out_dir), load("digits", data_dir="data")
    label = network_of(out_dir, "sre2l", 10)
    for which in ("distilled", "sre2l"):
        net, x = network_of(out_dir, which, 10), recovered(run, which).double()
        y = torch.zeros(8, dtype=torch.int64)
        end = naive_loss(net, x[:8], y, 0, 10.0)[1]
        assert result["statistics"][which]["end"] == pytest.approx(float(end), rel=1e-4)
        noise = torch.randn(8, 1, 8, 8, generator=rng("measured noise", 0)).double()
        assert result["statistics"][which]["noise"] == pytest.approx(
            float(naive_loss(net, noise, y, 0, 10.0)[1]), rel=1e-4
        )
        order = torch.randperm(len(data.y_train), generator=rng("floor", 0)).tolist()
        real = [next(i for i in order if data.y_train[i] == c) for c in range(8)]  # the first of classes 0 to 7
        floor = naive_loss(net, normalise(data.x_train[real], data.mean, data.std).double(), y, 0, 10.0)[1]
        assert result["statistics"][which]["real"] == pytest.approx(float(floor), rel=1e-4)
        right = (label(x).argmax(1) == torch.arange(20) % 10).double().mean()
        assert result["recognised"][which] == pytest.approx(float(right))


def test_a_run_explains_itself(whole):
    out_dir, result = whole
    run = only_run(out_dir)
    assert run.name.startswith("digits__scdd__0__")
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    blocks = {f"recovered-{which}-{first:06d}.safetensors" for which in ("distilled", "sre2l") for first in (0, 8, 16)}
    assert names >= blocks | {
        "args.json", "script.py", "checkpoint.pt", "distilled.safetensors", "result.json", "curve.png", "images",
        "evaluation.json", "random_crops.safetensors", "grid_distilled_000000.png", "grid_distilled_000006.png",
        "grid_sre2l_000001.png", "grid_sre2l_000006.png",
    }  # fmt: skip
    assert (run / "script.py").read_text() == Path(scdd.__file__).read_text()
    saved = json.loads((run / "args.json").read_text())
    open_flags = {"size", "preset", "resume", "analyse_methods", "analyse_widths", "analyse_files"}
    open_flags |= {f"teacher_{name}" for name in SETTINGS if name not in RECIPES["digits"]["moco2"]}
    assert all(saved[key] is not None for key in saved.keys() - open_flags) and saved["r_bn"] == 0.01
    assert json.loads((run / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["squeeze"]["method"] == "moco2" and result["label_teacher"]["method"] == "supervised"
    assert result["squeeze"]["stem_padding"] == 1 and result["blocks"] == 3 and result["steps"] == 6
    distilled = load_distilled(run / "distilled.safetensors", "scdd")
    assert distilled.meta["teacher"] == result["squeeze"]
    assert distilled.recipe == result["protocol"] and distilled.step == 6 and distilled.y_is == "class scores"
    assert distilled.meta["label_teacher"] == result["label_teacher"] and distilled.meta["ipc"] == 2
    assert result["storage_bytes"] == 4 * (20 * 64 + 20 * 10 + 2)
    history = common.run.load_checkpoint(run / "checkpoint.pt")["history"]
    assert [step for step, _ in history] == list(range(1, 37))  # 2 recoveries x 3 blocks x 6 steps
    assert result["seconds_predicted"]["seconds"] > 0


def test_evaluation_and_output_flags_do_not_change_the_images(whole, out):
    changes = dict(eval_runs=1, eval_epochs=1, log_every=7, save_every=5, save_minutes=1e-9, published_metric=True)
    result = scdd.main(tiny(out, **changes))
    a, b = (load_distilled(only_run(d) / "distilled.safetensors") for d in (whole[0], out))
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    for row in result["eval"].values():  # the maximum over prefixes is no accuracy: beside it, and not below it
        assert row["published_metric"]["values"][0] >= row["student"]["values"][0]


def test_stored_labels_are_counted_and_score_as_online_ones_of_half_precision(whole, out, monkeypatch):
    """Beside the images: 2 bytes for each epoch, image and class. The students see what they would online."""
    result = scdd.main(tiny(out, labels="stored", **FEW))
    run = only_run(out)
    assert result["label_bytes"] == 2 * 1 * 20 * 10
    assert result["storage_bytes"] == 4 * (20 * 64 + 20 * 10 + 2) + result["label_bytes"]
    file = run / "labels.safetensors"
    assert 0 < file.stat().st_size - result["label_bytes"] < 2000  # its header
    assert load_file(file)["logits"].shape == (1, 20, 10)
    assert load_distilled(run / "distilled.safetensors").meta["label_bytes"] == result["label_bytes"]
    file.unlink(), (run / "evaluation.json").unlink()
    read = []
    monkeypatch.setattr(scdd, "label_all", lambda x, net, recipe, path, *key: read.append(path))
    original = common.relabel.evaluate_soft
    monkeypatch.setattr(scdd, "evaluate_soft", lambda *args, stored, **rest: original(*args, **rest))  # as they go
    again = scdd.main(common.run.load_args(scdd.Args, run))
    assert read == [file] and again["eval"] == result["eval"]


def test_the_images_can_be_kept_as_the_published_code_does(whole, out):
    result = scdd.main(tiny(out, save_jpeg=True, sre2l=False, **FEW))
    plain, kept = (load_distilled(only_run(d) / "distilled.safetensors").x for d in (whole[0], out))
    assert torch.equal(kept, scdd.through_jpeg(plain))
    assert result["jpeg_psnr_db"] == {"distilled": scdd.psnr(kept, plain)}
    assert list(result["eval"]) == ["random_real", "random_crops", "distilled"]


SMALL_HEADS = dict(teacher_projector=16, teacher_dim=8)
CLUSTERS = SMALL_HEADS | dict(teacher_prototypes=16)
OTHERS = dict(supervised={}, barlow=dict(teacher_projector=16), moco3=SMALL_HEADS, swav=CLUSTERS, dino=CLUSTERS)


@pytest.mark.parametrize("squeeze", slow_but(["supervised"], OTHERS))
def test_the_other_squeezes(whole, out, squeeze):
    """SRe2L by itself is the row of the default run; the others have another teacher."""
    result = scdd.main(tiny(out, teacher_method=squeeze, full_row=True, **FEW, **OTHERS[squeeze]))
    run = only_run(out)
    if squeeze == "supervised":
        assert list(result["eval"]) == ["random_real", "random_crops", "distilled", "all_real"]
        assert equal(recovered(run, "distilled"), recovered(only_run(whole[0]), "sre2l"))
        assert result["squeeze"] == result["label_teacher"]
    else:
        assert list(result["eval"]) == ["random_real", "random_crops", "sre2l", "distilled", "all_real"]
        assert result["squeeze"]["method"] == squeeze and len(list((out / "teachers").iterdir())) == 3


def test_images_held_out_are_scored_and_the_test_images_play_no_part(out, monkeypatch):
    seen = []
    for name in ("train_teacher", "train_supervised", "train_probe", "random_crops", "evaluate_soft"):
        original = getattr(scdd, name)

        def spy(*args, original=original, **rest):
            data = next(each for each in [*args, *rest.values()] if isinstance(each, Data))
            seen.append(data)
            return original(*args, **rest)

        monkeypatch.setattr(scdd, name, spy)
    scdd.main(tiny(out, holdout=0.25, steps=1, teacher_epochs=1, label_epochs=1, **FEW))
    whole_set = load("digits", data_dir="data")
    everything, tests = ({bytes(x.numpy()) for x in part} for part in (whole_set.x_train, whole_set.x_test))
    assert len(seen) == 5
    for data in seen:
        assert 1000 < len(data.x_train) < 1150 and len(data.x_train) + len(data.x_test) == 1437
        used, held = ({bytes(x.contiguous().numpy()) for x in part} for part in (data.x_train, data.x_test))
        assert used | held == everything and not used & held and not held & tests - everything
    assert len(list((out / "teachers").iterdir())) == 4  # others than those of all images


# --------------------------------------------------------------------------------------------------------------- resume


STAGES = {  # what is called when, and the arrival at which the run is stopped
    "labelling teacher": ("common.pretrain", "augmented", 15),
    "squeeze": ("common.moco", "info_nce", 7),
    "probe": ("common.pretrain", "probe_lr", 9),
    "first step": ("scdd", "smallest_area", 1),
    "first recovery": ("scdd", "smallest_area", 6),
    "start of a block": ("scdd", "smallest_area", 7),
    "left-over block": ("scdd", "smallest_area", 16),
    "second recovery": ("scdd", "smallest_area", 19),
    "its left-over block": ("scdd", "smallest_area", 33),
    "last step": ("scdd", "smallest_area", 36),
    "random crops": ("scdd", "random_crops", 1),
    "evaluation": ("scdd", "evaluate_soft", 1),
    "a student": ("common.relabel", "post_train", 4),
}
FAST = ("squeeze", "start of a block", "a student")


@pytest.mark.parametrize("stage", slow_but(FAST, STAGES))
def test_a_resumed_run_ends_as_if_it_had_not_stopped(whole, tmp_path, stage, monkeypatch):
    module, name, due = STAGES[stage]
    original, calls = getattr(sys.modules[module], name), []

    def stop(*args, **rest):
        calls.append(args)
        if len(calls) == due:
            raise KeyboardInterrupt
        return original(*args, **rest)

    if stage not in ("labelling teacher", "squeeze"):
        shutil.copytree(whole[0] / "teachers", tmp_path / "teachers")
    if stage == "probe":
        (next((tmp_path / "teachers").glob("*/probe-*.safetensors"))).unlink()
    monkeypatch.setattr(sys.modules[module], name, stop)
    with pytest.raises(KeyboardInterrupt):
        scdd.main(tiny(tmp_path))
    monkeypatch.setattr(sys.modules[module], name, original)
    folder = only_run(tmp_path)
    assert not (folder / "result.json").exists()
    scdd.main(common.run.load_args(scdd.Args, folder))
    same_end(folder, only_run(whole[0]))
    for path in (whole[0] / "teachers").glob("*/*.safetensors"):
        other = tmp_path / "teachers" / path.parent.name / path.name
        assert equal(load_file(path), load_file(other))


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 3, 4, 5, 8])
def test_a_resumed_run_with_segments_and_stored_labels(colour, tmp_path, at, monkeypatch):
    changes = dict(init="real", segments=3, crop=True, per_image=True, labels="stored", save_every=1, sre2l=False)
    changes |= colour | dict(out_dir=str(tmp_path / "runs"), precision="bf16")
    shutil.copytree(Path(colour["out_dir"]) / "teachers", tmp_path / "runs" / "teachers")
    scdd.main(scdd.Args(**TINY | changes))
    straight = only_run(tmp_path / "runs")
    original, calls = scdd.smallest_area, []

    def stop(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(scdd, "smallest_area", stop)
    with pytest.raises(KeyboardInterrupt):
        scdd.main(scdd.Args(**TINY | changes))
    monkeypatch.setattr(scdd, "smallest_area", original)
    hurt = newest(tmp_path / "runs")
    assert hurt != straight
    scdd.main(common.run.load_args(scdd.Args, hurt))
    same_end(hurt, straight)


def test_a_finished_run_can_be_scored_again(whole, tmp_path):
    out_dir, result = whole
    shutil.copytree(out_dir, tmp_path, dirs_exist_ok=True)
    folder = only_run(tmp_path)
    again = scdd.main(dataclasses.replace(common.run.load_args(scdd.Args, folder), eval_runs=3, out_dir=str(tmp_path)))
    for row, scores in result["eval"].items():
        values = again["eval"][row]["student"]["values"]
        assert len(values) == 3 and values[:2] == scores["student"]["values"]
    assert equal(*(load_file(d / "distilled.safetensors") for d in (folder, only_run(out_dir))))


def test_blocks_of_another_size_are_refused_and_the_run_goes_on_without_the_flag(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    args = dataclasses.replace(common.run.load_args(scdd.Args, only_run(tmp_path)), out_dir=str(tmp_path))
    refuse(lambda: scdd.main(dataclasses.replace(args, chunk=16)), "--chunk", "drop the flag")
    args = dataclasses.replace(common.run.load_args(scdd.Args, only_run(tmp_path)), out_dir=str(tmp_path))
    assert scdd.main(args)["eval"] == whole[1]["eval"]


def test_another_network_on_resume_is_refused(whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    args = dataclasses.replace(common.run.load_args(scdd.Args, only_run(tmp_path)), out_dir=str(tmp_path))
    refuse(lambda: scdd.main(dataclasses.replace(args, r_bn=0.5)), "--r-bn was 0.01")
    original = scdd.train_probe
    monkeypatch.setattr(scdd, "train_probe", lambda *a, **k: turned(original(*a, **k)))
    refuse(lambda: scdd.main(args), "changed since", "scores of the network")


def turned(probe: tuple[nn.Linear, float]) -> tuple[nn.Linear, float]:
    with torch.no_grad():
        probe[0].weight.mul_(-1)
    return probe


PARTS = ("recovered-distilled-000008", "recovered-sre2l-000016", "random_crops")


@pytest.mark.parametrize("name", slow_but(PARTS[:1], PARTS))
def test_a_truncated_or_missing_part_of_a_run_is_one_line(whole, tmp_path, name):
    """Nothing is lost by it: the rest of the folder stays; random crops can be made again."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    folder = only_run(tmp_path)
    path = folder / f"{name}.safetensors"
    content = path.read_bytes()
    args = dataclasses.replace(common.run.load_args(scdd.Args, folder), out_dir=str(tmp_path))
    path.write_bytes(content[: len(content) // 2])
    try:
        assert scdd.main(args)["eval"] == whole[1]["eval"]  # made again
    except common.run.UserError as error:
        assert path.name in str(error) and "\n" not in str(error)
    path.unlink()
    if name != "random_crops":
        refuse(lambda: scdd.main(args), path.name)
    path.write_bytes(content)
    assert scdd.main(args)["eval"] == whole[1]["eval"]


def test_damaged_labels_and_those_of_another_recipe_are_made_again(out, capsys):
    scdd.main(tiny(out, labels="stored", sre2l=False, **FEW))
    folder = only_run(out)
    path = folder / "labels.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    scdd.main(common.run.load_args(scdd.Args, folder))
    assert "labels: made again" in capsys.readouterr().out and path.read_bytes() == whole
    args = common.run.load_args(scdd.Args, folder)
    scdd.main(dataclasses.replace(args, eval_mix="none", eval_epochs=2))
    assert "another mix" in capsys.readouterr().out and len(path.read_bytes()) > len(whole)


# ---------------------------------------------------------------------------------------------------------------- flags


def test_bad_values_are_refused_in_one_line_before_anything_begins(tmp_path):
    for change, *expected in [
        (dict(ipc=200), "--ipc 200", "smallest class"), (dict(jitter=(3, 1)), "--jitter 3 1"),
        (dict(jitter=(0, 8)), "--jitter 0 8", "8 pixels"), (dict(segments=2), "--segments", "--init real"),
        (dict(curriculum=True), "--curriculum", "--crop"), (dict(recover_batch=0), "--recover-batch 0"),
        (dict(eval_temperature=0.0), "--eval-temperature"), (dict(eval_ema=1.0), "--eval-ema"),
        (dict(eval_smooth=0.5), "--eval-smooth"), (dict(eval_crop_min=0.0), "--eval-crop-min"),
        (dict(eval_mix_alpha=1e-5), "--eval-mix-alpha"), (dict(crop_min=1.5), "--crop-min"),
        (dict(r_bn=-1.0), "--r-bn"), (dict(lr_img=1e39), "--lr-img"), (dict(teacher="nowhere.pt"), "nowhere.pt"),
        (dict(label_teacher="nowhere.pt"), "--label-teacher", "nowhere.pt"), (dict(backend="triton"), "--backend"),
        (dict(segments=9, init="real"), "--segments"),
    ]:  # fmt: skip
        if "backend" in change and (torch.cuda.is_available() or kernels.backend.INTERPRETED):
            continue
        refuse(lambda change=change: scdd.main(tiny(tmp_path, **change)), *expected)
    assert not list(tmp_path.iterdir())


class Plain(nn.Module):
    """A network without BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_a_network_without_batchnorm_is_refused_if_images_are_recovered_from_it(out, monkeypatch):
    """As a labelling teacher alone it will do."""

    def plain(spec, data, *rest, **flags):
        return Teacher(Plain().eval(), 6, data.mean, data.std, "plain", dict(method="file"), None, nn.Linear(6, 10))

    with monkeypatch.context() as patch:
        patch.setattr(scdd, "load_teacher", plain)
        for sre2l in (True, False):
            refuse(lambda sre2l=sre2l: scdd.main(tiny(out, teacher="a file", sre2l=sre2l)), "--teacher", "BatchNorm")
    monkeypatch.setattr(scdd, "load_classifier", plain)
    refuse(lambda: scdd.main(tiny(out, label_teacher="a file")), "--label-teacher", "BatchNorm")
    alone = dict(label_teacher="a file", teacher_method="supervised")
    refuse(lambda: scdd.main(tiny(out, **alone)), "--label-teacher", "BatchNorm")
    assert [path.name for path in out.iterdir()] == ["teachers"]
    scdd.main(tiny(out, label_teacher="a file", sre2l=False, steps=1, **FEW))


def test_teachers_from_files(whole, out, tmp_path):
    """The squeeze and the labelling teacher by their files: the images of the run that trained them."""
    files = {}
    for folder in (whole[0] / "teachers").iterdir():
        kind = "moco2" if "-moco2-" in folder.name else "supervised"
        files[kind] = str(shutil.copytree(folder, tmp_path / kind) / "teacher.safetensors")
    scdd.main(tiny(out, teacher=files["moco2"], label_teacher=files["supervised"], **FEW))
    for which in ("distilled", "sre2l"):
        assert torch.equal(recovered(only_run(out), which), recovered(only_run(whole[0]), which))
    refuse(lambda: scdd.main(tiny(out, label_teacher=files["moco2"])), "--label-teacher", "no linear classifier")
    torch.save({"fc.weight": torch.zeros(3, 32), "fc.bias": torch.zeros(3), **ResNet("resnet10", 1, 4).state_dict()},
               tmp_path / "three.pt")  # fmt: skip
    refuse(lambda: scdd.main(tiny(out, label_teacher=str(tmp_path / "three.pt"))), "3 classes, the data has 10")


@pytest.mark.parametrize("at", [5, 14])
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(whole, out, monkeypatch, at):
    """Named with its terms and the images in work, at a step that neither logs nor saves by itself; then the run goes
    on as if nothing had been."""
    original, calls = scdd.recovery_terms, []

    def broken(*args):
        calls.append(args)
        ce, statistics = original(*args)
        return ce, statistics * (math.nan if len(calls) == at else 1.0)

    monkeypatch.setattr(scdd, "recovery_terms", broken)
    line = refuse(
        lambda: scdd.main(tiny(out, log_every=100)), "not finite", "statistics nan", "distilled, images", "ce "
    )
    folder = only_run(out)
    assert "the last good checkpoint stays" in line and str(folder) in line and "--r-bn" in line
    assert common.run.load_checkpoint(folder / "checkpoint.pt")["step"] == {5: 4, 14: 12}[at]
    monkeypatch.setattr(scdd, "recovery_terms", original)
    if at == 5:
        scdd.main(common.run.load_args(scdd.Args, folder))
        assert equal(*(load_file(d / "distilled.safetensors") for d in (folder, only_run(whole[0]))))


CHANGES = [
    dict(lr_img=0.2), dict(r_bn=0.1), dict(first_bn_multiplier=1.0), dict(init="real"), dict(crop=True),
    dict(crop=True, crop_min=0.5), dict(crop=True, curriculum=True), dict(jitter=(0, 2)), dict(jitter=(-1, 1)),
    dict(jitter=(0, 2), per_image=True), dict(init="real", segments=2), dict(init="real", segments=2, residual=0.2),
    dict(recover_batch=10), dict(seed=1), dict(ipc=1), dict(precision="bf16"), dict(teacher_method="supervised"),
    dict(teacher_seed=1), dict(stem_padding=2), dict(probe_lr=0.5), dict(probe_epochs=1), dict(probe_augment=True),
    dict(teacher_temperature=0.3), dict(teacher_mlp=True), dict(teacher_crop_min=0.9), dict(teacher_key_momentum=0.1),
    dict(teacher_queue=1000), dict(teacher_lr=0.01), dict(teacher_batch=128),
]  # fmt: skip
IN_FAST = (dict(init="real", segments=2),)
words = lambda change: "-".join(f"{key}={value}" for key, value in change.items())  # noqa: E731


@pytest.mark.parametrize("change", slow_but(IN_FAST, CHANGES), ids=words)
def test_every_flag_of_the_method_does_something(whole, out, change):
    scdd.main(tiny(out, **FEW | dict(sre2l=False) | change))
    before, after = (load_distilled(only_run(d) / "distilled.safetensors") for d in (whole[0], out))
    assert after.x.isfinite().all() and after.x.min() >= 0 and after.x.max() <= 1
    assert after.x.shape != before.x.shape or not torch.equal(after.x, before.x)


EVALUATION = [
    dict(eval_lr=0.03), dict(eval_epochs=5), dict(eval_opt="sgd", eval_lr=0.1), dict(eval_wd=100.0),
    dict(eval_wd=100.0, eval_decay_all=False), dict(eval_warm_up=1), dict(eval_smooth=1.0), dict(eval_temperature=1.0),
    dict(eval_scaled=True, eval_opt="sgd"), dict(eval_loss="mse_ce"), dict(eval_loss="mse_ce", eval_ce=10.0),
    dict(eval_crop="none"), dict(eval_crop="resized"), dict(eval_crop="resized", eval_crop_min=0.9),
    dict(eval_mix="none"), dict(eval_mix="cutmix"), dict(eval_mix_alpha=0.01), dict(eval_ema=0.9), dict(eval_batch=5),
    dict(teacher_train_mode=True), dict(eval_width=8), dict(eval_arch="resnet18"), dict(label_epochs=1),
    dict(label_lr=0.01), dict(label_wd=0.1), dict(label_warm_up=1), dict(label_crop="resized"), dict(label_batch=64),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", EVALUATION, ids=words)
def test_every_flag_of_the_evaluation_reaches_the_students(out, change, monkeypatch):
    """In the recipe or in the networks; what a recipe does to a student is tested in test_relabel.py."""
    seen = []

    def spy(sets, *, data, make_student, teacher, recipe, **rest):
        weights = [value.sum() for net in (make_student(), teacher) for value in net.state_dict().values()]
        seen.append((recipe, len(weights), float(sum(w.double().abs().sum() for w in weights[-20:])), weights[0].shape))
        shapes.append([value.shape for value in make_student().state_dict().values()])
        return {row: {"student": dict(mean=0.5, std=0.0, values=[0.5])} for row in sets}

    shapes = []
    monkeypatch.setattr(scdd, "evaluate_soft", spy)
    for changes in ({}, change):
        with seeded("spy"):
            scdd.main(tiny(out, **dict(steps=1, ipc=1, sre2l=False) | changes))
    assert seen[0] != seen[1] or shapes[0] != shapes[1]


def test_a_net_with_imagenets_stem_for_large_images(tmp_path):
    """Beyond 96 px: 7x7 convolution of stride 2 and max-pool, in teacher and student."""
    folder = colour_folder(tmp_path / "set", n=8, size=100)
    changes = COLOUR | dict(data=str(folder), data_dir=str(tmp_path / "data"), ipc=1, recover_batch=2, steps=1, chunk=2)
    changes |= dict(teacher_epochs=1, label_epochs=1, probe_epochs=1, teacher_batch=4, label_batch=4, crop=True)
    result = scdd.main(tiny(tmp_path / "runs", **changes | FEW | dict(jitter=(0, 32))))
    assert result["squeeze"]["stem"] == result["label_teacher"]["stem"] == "imagenet"
    assert result["args"]["teacher_queue"] == 256 and result["args"]["eval_mix"] == "cutmix"
    weights = load_file(next((tmp_path / "runs" / "teachers").glob("*moco*")) / "teacher.safetensors")
    assert weights["conv1.weight"].shape == (4, 3, 7, 7)


def test_all_real_images_get_about_as_many_updates(out, monkeypatch):
    seen = []

    def spy(sets, *, recipe, **rest):
        seen.append((tuple(sets), recipe.epochs, recipe.warm_up))
        return {row: {"student": dict(mean=0.5, std=0.0, values=[0.5])} for row in sets}

    monkeypatch.setattr(scdd, "evaluate_soft", spy)
    scdd.main(tiny(out, full_row=True, sre2l=False, eval_epochs=200, eval_warm_up=100))
    assert seen[0][1:] == (200, 100)
    assert seen[1] == (("all_real",), round(200 * 20 / 1437), int(100 * 20 / 1437))


def test_barlow_twins_has_its_own_rate_and_batch(out, monkeypatch):
    class Enough(Exception):
        pass

    def spy(method, data, teachers, device, *, lr, batch, **settings):
        assert method == "barlow"
        raise Enough(lr, batch)

    monkeypatch.setattr(scdd, "train_teacher", spy)
    for given, expected in ((dict(), (0.3, 128)), (dict(teacher_lr=0.7, teacher_batch=32), (0.7, 32))):
        with pytest.raises(Enough) as caught:
            scdd.main(tiny(out, teacher_method="barlow", **{"teacher_batch": None} | given))
        assert caught.value.args == expected


def test_compiled_recovery_is_the_same_recovery(whole, out, monkeypatch):
    """That --compile compiles the forward pass of every (network, groups) once; with what, is not tested here."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    scdd.main(tiny(out, compile=True, **FEW))
    assert len(compiled) == 2  # both networks, one group a block
    assert torch.equal(recovered(only_run(out), "distilled"), recovered(only_run(whole[0]), "distilled"))


@pytest.mark.slow
def test_the_triton_backend_runs_the_same_method(out):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (torch.cuda.is_available() or kernels.backend.INTERPRETED):
        pytest.skip("no CUDA device and no Triton interpreter")
    results = {}
    for backend in ("triton", "torch"):
        result = scdd.main(tiny(out, backend=backend, device=device, steps=2, sre2l=False, **FEW))
        results[backend] = recovered(newest(out), "distilled")
        assert ("triton backend" in result["backend"]) == (backend == "triton")
    same_images(results["triton"], results["torch"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_the_gpu_is_the_run_on_the_cpu(out):
    """With the same teachers: three steps of boxes of every image, images equal up to the rounding of convolutions."""
    images = {}
    for device in ("cpu", "cuda"):
        scdd.main(tiny(out, device=device, steps=3, crop=True, per_image=True, jitter=(-1, 1), **FEW))
        images[device] = recovered(newest(out), "distilled")
    assert (images["cpu"] - images["cuda"]).norm() < 1e-2 * images["cpu"].norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_stages_on_the_gpu_in_half_precision(tmp_path):
    result = scdd.main(tiny(tmp_path, device="cuda", precision="bf16", labels="stored", full_row=True))
    assert set(result["eval"]) == {"random_real", "random_crops", "sre2l", "distilled", "all_real"}
    assert load_distilled(only_run(tmp_path) / "distilled.safetensors").x.isfinite().all()


# --------------------------------------------------------------------------------------------------------------- script


def test_args_document_themselves():
    """Every flag has help, and every preset value is a flag that may be left open."""
    source = Path(scdd.__file__).read_text()
    fields = {f.name: f for f in dataclasses.fields(scdd.Args)}
    for name in fields:
        after = source.split(f"\n    {name}: ", 1)[1].split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), name
    open_flags = {n for n, f in fields.items() if f.default is None} - {"size", "preset", "resume", "chunk"}
    open_flags -= {f"teacher_{name}" for name in SETTINGS if name != "epochs"}  # of common/recipes.py
    open_flags -= {"analyse_methods", "analyse_widths", "analyse_files"}
    for name, preset in scdd.PRESETS.items():
        assert set(preset) == open_flags, name
    numbers = {n for n, f in fields.items() if f.type in (int, float) or f.type in (int | None, float | None)}
    limited = {name for limits in (scdd.LIMITS, LIMITS) for names in limits.values() for name in names.split()}
    seeds = {"seed", "split_seed", "teacher_seed", "size", "test_fraction", "holdout", "ipc"}
    assert numbers - limited <= seeds and limited <= numbers


def test_the_presets_are_the_published_code():
    """Values of the specification's tables (2.1, 2.2), the code's where the paper's table is another."""
    p, t, i = (
        {f"teacher_{key}": value for key, value in RECIPES[name]["moco2"].items()} | scdd.PRESETS[name]
        for name in ("cifar100", "tiny_imagenet", "imagenet")
    )
    for name, values in dict(
        lr_img=(0.4, 0.6, 0.1), recover_batch=(100, 100, 50), jitter=((0, 4), (-4, 4), (0, 32)),
        crop=(False, True, True), eval_wd=(0.01, 1e-4, 0.01), eval_decay_all=(True, True, False),
        eval_epochs=(200, 500, 300), eval_lr=(1e-3, 0.2, 1e-3), eval_opt=("adamw", "sgd", "adamw"),
        eval_batch=(64, 256, 64), eval_temperature=(30.0, 20.0, 20.0), eval_scaled=(False, True, False),
        eval_mix=("mixup", "none", "cutmix"), teacher_key_momentum=(0.99, 0.99, 0.999),
        eval_smooth=(3.0, 1.0, 1.0), teacher_lr=(0.06, 0.06, 0.03), teacher_batch=(512, 512, 256),
        teacher_queue=(4096, 4096, 65536), teacher_temperature=(0.1, 0.1, 0.2),
        teacher_mlp=(False, False, True), teacher_epochs=(200, 200, 200), teacher_crop_min=(0.08, 0.08, 0.2),
        label_lr=(0.1, 0.2, 0.1), label_wd=(5e-4, 1e-4, 1e-4), label_epochs=(200, 50, 90), label_batch=(128, 256, 256),
        label_warm_up=(0, 5, 0), steps=(1000, 1000, 1000), eval_mix_alpha=(0.8, 0.8, 1.0), probe_lr=(30.0, 30.0, 30.0),
    ).items():  # fmt: skip
        assert tuple(preset[name] for preset in (p, t, i)) == values, name
    assert (p["r_bn"], i["r_bn"]) == (0.005, 0.01) and (p["sre2l_lr_img"], p["sre2l_r_bn"]) == (0.25, 0.01)
    assert scdd.PRESETS["cifar10"] == scdd.PRESETS["cifar100"]
    assert scdd.Args().first_bn_multiplier == 10 and scdd.Args().crop_min == 0.08
    assert (i["teacher_arch"], i["label_teacher"]) == ("resnet50", "torchvision:resnet18")


def run_fields(script) -> dict[str, str]:
    """{flag: its lines in the source} of the part that all scripts share."""
    source = Path(script.__file__).read_text().split("    # the run: word for word the same in all five scripts\n")[1]
    lines, fields = source.split("    # the method\n")[0].splitlines(), {}
    for line in lines:
        if (
            line.startswith("    ")
            and line[4:5].isalpha()
            and ": " in line
            and "=" in line
            and not line.endswith('"""')
        ):
            name = line.strip().split(":")[0]
            fields[name] = []
        fields[name].append(line)
    return {name: "\n".join(text).strip() for name, text in fields.items()}


def test_run_fields_and_landmarks_are_the_other_scripts():
    """Word for word, but for what this method has not (a ridge, a cache) or uses otherwise."""
    ours, theirs = run_fields(scdd), run_fields(frepo)
    assert len(theirs) > 20 and theirs.keys() - ours.keys() == {"ridge_precision", "cache_gb"}
    assert list(ours) == [name for name in theirs if name in ours]
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {"holdout", "backend", "precision", "seed", "chunk"}
    for name in differing:  # the declaration is the same, its words are not
        assert ours[name].splitlines()[0] == theirs[name].splitlines()[0]
    lines = inspect.getsource(scdd.main).splitlines()
    landmarks = ["# data", "# distilled set", "# networks", "# outer loop", "# evaluation"]
    places = [next(i for i, line in enumerate(lines) if line.split(":")[0] == f"    {name}") for name in landmarks]
    assert places == sorted(places)


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


def test_a_renamed_copy_runs_and_names_its_own_runs(whole, out, tmp_path, monkeypatch, capsys):
    """And importing it does nothing."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    copy_of = loaded(Path(shutil.copy(scdd.__file__, tmp_path / "my_idea.py")))
    assert not list(empty.iterdir()) and capsys.readouterr().out == ""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(copy_of, "predict_seconds", lambda *args: 0.0)
    copy_of.main(copy_of.Args(**TINY | FEW | dict(out_dir=str(out))))
    folder = only_run(out)
    assert folder.name.startswith("digits__my_idea__0__")
    assert load_distilled(folder / "distilled.safetensors", "my_idea").step == 6
    said = capsys.readouterr().out
    for row in ("random real", "random crops", "sre2l", "distilled"):
        assert row in said
    assert torch.equal(recovered(folder, "sre2l"), recovered(only_run(whole[0]), "sre2l"))


@pytest.mark.slow
def test_a_renamed_copy_is_a_command(out, tmp_path):
    shutil.copy(scdd.__file__, tmp_path / "my_idea.py")
    command = [sys.executable, str(tmp_path / "my_idea.py"), *flags(**TINY | FEW, out_dir=out)]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "distilled" in done.stdout and only_run(out).name.startswith("digits__my_idea__0__")


MEASURE = """
import os, sys, threading, time
import torch
import scdd, common.run
torch.set_num_threads(1)
shown, original = [], scdd.check_memory
def check(phases, device):
    images = phases["recovery"]
    shown.append(images.get("--chunk") or images["--recover-batch"])  # all else is there before
    return original(phases, device)
scdd.check_memory = check
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
steps = common.run.Run.steps
def watched(run, *args):
    before, peak, going = resident(), [0], [True]
    def look():
        while going[0]:
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)
    thread = threading.Thread(target=look)
    thread.start()
    yield from steps(run, *args)
    going[0] = False
    thread.join()
    print("MEASURED", shown[0], peak[0] - before)
    os._exit(0)
common.run.Run.steps = watched
sys.argv = ["scdd", *sys.argv[1:]]
common.run.cli(scdd.main, scdd.Args)
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(teacher_width=32, ipc=100), dict(ipc=100), dict(ipc=100, precision="bf16")],
                         ids=str)  # fmt: skip
def test_the_memory_estimate_is_near_the_measured_peak(tmp_path, changes):
    """Of the recovery, in resident memory beyond what the process had before."""
    values = (
        TINY
        | dict(teacher_width=16, label_width=16, ipc=40, recover_batch=100, chunk=1000, steps=2, teacher_epochs=1)
        | changes
    )
    words = flags(**values | dict(label_epochs=1, sre2l=False, out_dir=tmp_path))
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, env=env, cwd=REPO)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MEASURED"))
    estimate, measured = map(int, line.split()[1:])
    print(f"estimate {estimate / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert 0.6 < estimate / measured < 1.7, (estimate, measured)


# ------------------------------------------------------------------------------------------------------------- analysis


def analysed(out_dir, **changes):
    few = dict(analyse=True, analyse_methods=("supervised", "moco2"), analyse_widths=(2, 4), steps=40)
    return scdd.main(tiny(out_dir, **few | dict(teacher_epochs=1, label_epochs=1, label_width=None) | changes))


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """(out-dir, result) of an analysis of four networks."""
    out_dir = tmp_path_factory.mktemp("analysis")
    return out_dir, analysed(out_dir)


@pytest.mark.slow
def test_an_analysis_compares_methods_and_widths(analysis):
    """All networks with their probes; statistics of what was trained; plots and JSON in the run folder."""
    out_dir, result = analysis
    run = only_run(out_dir)
    names = [f"{method} resnet10x{width}" for method in ("supervised", "moco2") for width in (2, 4)]
    assert list(result["teachers"]) == ["untrained resnet10x4", *names]
    assert [model["name"] for model in result["analysis"]["models"]] == names
    assert [model["size"] for model in result["analysis"]["models"]] == [2, 4] * 2
    assert len(list((out_dir / "teachers").iterdir())) == 4
    whole = json.loads((run / "analysis.json").read_text())
    for model, short in zip(whole["models"], result["analysis"]["models"], strict=True):
        assert len(model.pop("layers")) == 12 and model == short  # ResNet-10
        assert model["signal"]["recovered"] < 0.8 * model["signal"]["noise"]
        assert all(scale["outputs_change"] < 1e-4 for scale in model["scale"])
        (folder,) = (out_dir / "teachers").glob(f"*-{model['name'].replace(' ', '-')}-*")
        weights = load_file(folder / "teacher.safetensors")
        mu = weights["bn1.running_mean"].double()
        assert whole_measure(run, model["name"], "raw_std_mu") == pytest.approx(float(mu.std(correction=0)), rel=1e-5)
    for plot in ("channels", "depth", "entropy", "signal"):
        assert (run / f"statistics_{plot}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((run / "result.json").read_text()) == json.loads(json.dumps(result))


def whole_measure(run: Path, name: str, measure: str) -> float:
    models = json.loads((run / "analysis.json").read_text())["models"]
    return next(model for model in models if model["name"] == name)["layers"][0][measure]


@pytest.mark.slow
def test_an_analysis_trains_the_networks_that_the_method_trains(analysis, tmp_path):
    """MoCo's of width 4 is the squeeze of a run with the same flags, and its probe's accuracy is that run's."""
    shutil.copytree(analysis[0] / "teachers", tmp_path / "teachers")
    before = sorted((tmp_path / "teachers").glob("*/*.safetensors"))
    result = scdd.main(tiny(tmp_path, teacher_epochs=1, label_epochs=1, steps=1, sre2l=False, **FEW))
    assert sorted((tmp_path / "teachers").glob("*/*.safetensors")) == before
    assert result["squeeze"]["probe_accuracy"] == analysis[1]["teachers"]["moco2 resnet10x4"]["probe"]


@pytest.mark.slow
def test_the_tables_of_an_analysis(analysis):
    rows = analysis[1]["teachers"]
    table = scdd.teacher_table(rows).splitlines()
    assert len(table) == 2 + len(rows) and all(line.count("|") == 8 for line in table)
    untrained, moco = (next(line for line in table if name in line) for name in ("untrained", "moco2 resnet10x4"))
    row = rows["moco2 resnet10x4"]
    assert untrained.split(" | ")[1:5] == ["-"] * 4 and f"{100 * row['probe']:.1f} |" in moco
    assert f"| 1 | {row['seconds']:.0f} |" in moco and f" {row['embedding_std']['1']:.2f} " in moco
    rows = {"a": row | {"loss": {"1": 3.0, "5": 2.0}, "embedding_std": {"1": 0.5, "5": 0.04}, "collapsed": 3}}
    assert "| 3 to 2 | 0.04 (collapsed) |" in scdd.teacher_table(rows)


def test_statistics_are_matched_as_adam_does(data_of_two):
    """The recovery of the statistics alone against a loop: rate, weight of the first term, limits of the pixels."""
    net, x = data_of_two
    mean, std = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (0.4, 1.0))
    function = scdd.with_statistics(net)
    found = scdd.match_statistics(function, x, 5, 0.3, 10.0, mean, std)
    again, m, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    for t in range(5):
        again.requires_grad_()
        terms = function(again)[1]
        (g,) = torch.autograd.grad(10 * terms[0, 0] + terms[1:, 0].sum(), again)
        m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g**2
        step = (m / (1 - 0.5 ** (t + 1))) / ((v / (1 - 0.9 ** (t + 1))).sqrt() + 1e-8)
        rate = 0.3 * 0.5 * (1 + math.cos(math.pi * t / 5))
        again = (again.detach() - rate * step).clamp(-0.4, 0.6)
    torch.testing.assert_close(found, again, rtol=0, atol=1e-9)
    assert ((found - 0.6).abs() < 1e-12).any() and not ((found - 0.6).abs() < 1e-12).all()


@pytest.fixture
def data_of_two():
    with seeded("two"):
        net = ResNet("resnet10", 1, 2)
        for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return net.double().eval(), torch.randn(4, 1, 8, 8, generator=rng("two images"), dtype=torch.float64)


def test_flags_of_the_analysis_and_of_the_squeeze_that_would_do_nothing_are_refused(out):
    refuse(lambda: scdd.main(tiny(out, analyse_widths=(2,))), "--analyse-widths", "--analyse")
    refuse(lambda: analysed(out, analyse_widths=(0,)), "--analyse-widths 0", "at least 1")
    refuse(lambda: scdd.main(tiny(out, teacher_prototypes=8)), "--teacher-prototypes", "moco2", "swav, dino")
    both = dict(teacher_method="dino", teacher_queue=256)
    refuse(lambda: scdd.main(tiny(out, **both)), "--teacher-queue", "dino", "moco2, swav")
    alone = dict(teacher_method="supervised", teacher_epochs=3)
    refuse(lambda: scdd.main(tiny(out, **alone)), "--teacher-epochs", "--label-")
    assert [path.name for path in out.iterdir()] == ["teachers"]


@pytest.mark.slow
def test_an_analysis_that_was_stopped_goes_on(analysis, tmp_path, monkeypatch):
    original, calls = scdd.train_probe, []

    def stop(*args, **rest):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **rest)

    monkeypatch.setattr(scdd, "train_probe", stop)
    with pytest.raises(KeyboardInterrupt):
        analysed(tmp_path)
    monkeypatch.setattr(scdd, "train_probe", original)
    folder = only_run(tmp_path)
    result = scdd.main(common.run.load_args(scdd.Args, folder))
    assert only_run(tmp_path) == folder
    own = lambda r: {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in r["teachers"].items()}  # noqa: E731
    assert own(result) == own(analysis[1]) and result["analysis"] == analysis[1]["analysis"]


FOREIGN = [
    (dict(teacher="a file"), "--teacher:"), (dict(label_teacher="a file"), "--label-teacher:"),
    (dict(label_width=4), "--label-width:"), (dict(teacher_method="dino"), "--teacher-method:"),
    (dict(teacher_prototypes=7), "--teacher-prototypes: none of supervised, moco2"),
    (dict(analyse_widths=None, teacher_width=0), "--teacher-width 0"), (dict(teacher_queue=0), "--teacher-queue 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), FOREIGN, ids=[line for _, line in FOREIGN])
def test_flags_that_an_analysis_does_not_know_are_refused(out, change, line):
    refuse(lambda: analysed(out, **dict(label_width=None) | change), line)
    assert [path.name for path in out.iterdir()] == ["teachers"]
