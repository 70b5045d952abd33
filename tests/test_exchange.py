"""common/exchange.py: files as the other projects write them, read, written and read again, bit for bit."""

import collections
import dataclasses
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import refuse
from PIL import Image

from common import exchange
from common.artefact import load_distilled, save_distilled
from common.bases import Code
from common.data import Data, Zca, fit_zca
from common.exchange import (
    FEATURES,
    LABELS,
    SCORES,
    class_order,
    form_of,
    from_pixels,
    load_any,
    pixel_zca,
    save_as,
    to_pixels,
    unwhiten,
    whiten,
    zca_of,
)

F64 = torch.float64
NAMES = ["wren", "great tit", "Häher", "owl"]
CONSTANTS = [
    ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ([0.5071, 0.4866, 0.4409], [0.2673, 0.2564, 0.2762]),
    ([0.25, 0.5, 0.125], [0.25, 0.5, 1.0]),
    ([0.0, 1e-3, 0.9999], [1.0, 1e-3, 3.0]),
]
MEAN, STD = (torch.tensor(value) for value in CONSTANTS[0])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_source(channels=3, size=6, classes=4, n=120, seed=5):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(n, channels, size // 2, size // 2, generator=generator)
    smooth = smooth.repeat_interleave(2, -1).repeat_interleave(2, -2)
    noise = torch.rand(n, channels, size, size, generator=generator)
    x = ((0.7 * smooth + 0.3 * noise) * 255).byte()
    y = torch.arange(n) % classes
    return Data("birds", x, y, x[:8], y[:8], NAMES[:classes], MEAN[:channels], STD[:channels], "crop", "c" * 64, True)


SOURCE = make_source()
N, SHAPE = 8, (3, 6, 6)
HARD = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def same(a, b):
    """Whether two loaded sets are the same, bit for bit (0.0 and -0.0 included)."""
    for one, other in ((a.x, b.x), (a.y, b.y)):
        assert one.dtype == other.dtype == torch.float32 and one.shape == other.shape
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)
    assert (a.y_is, a.class_names, a.data, a.resize) == (b.y_is, b.class_names, b.data, b.resize)
    assert (a.zca is None) == (b.zca is None) and (a.zca is None or torch.equal(a.zca, b.zca))


def within_a_step(back, x, mean=MEAN, std=STD):
    """Whether each pixel moved by at most half a float32 step of its normalised number, and of its own."""
    mean, std = (value.double().numpy()[None, :, None, None] for value in (mean, std))
    x, back = x.double().numpy(), back.double().numpy()
    z = np.abs((x - mean) / std).astype(np.float32)
    steps = np.spacing(z).astype(float) / 2 * std + np.spacing(np.abs(x).astype(np.float32)).astype(float) / 2
    return bool((np.abs(back - x) <= steps * 1.0001).all())


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("mean, std", CONSTANTS)
def test_normalised_pixels_come_back_bit_for_bit(mean, std):
    mean, std = torch.tensor(mean), torch.tensor(std)
    zero = -mean.double() / std.double()  # the pixels around 0 lie closer than floats there
    near = zero[:, None].float().repeat(1, 2001)
    steps = torch.arange(-1000, 1001)
    near = (near.view(torch.int32) + steps.int()).view(torch.float32)
    powers = torch.tensor([s * 2.0**k for k in range(-40, 12) for s in (1, -1)]).repeat(3, 1)
    edges = torch.cat([powers, torch.nextafter(powers, torch.zeros(1)), torch.nextafter(powers, 2 * powers)], 1)
    normal = torch.stack([2 * draw(100_000, seed=c) for c in range(3)])
    tiny = 1e-4 * normal[:, :20_000] + zero[:, None].float()
    z = torch.cat([near.nan_to_num(), edges, normal, tiny], 1)[None, :, :, None]
    x = to_pixels(z, mean, std)
    back, off = from_pixels(x, mean, std)
    assert not off.any() and torch.equal(to_pixels(back, mean, std), x)
    assert torch.equal(from_pixels(to_pixels(back, mean, std), mean, std)[0], back)
    for c in range(3):  # one rounding, of the exact value in float64
        for i in range(0, z.shape[2], 977):
            exact = np.float64(z[0, c, i, 0]) * np.float64(std[c]) + np.float64(mean[c])
            assert np.float32(exact) == np.float32(x[0, c, i, 0])


def test_a_pixel_without_such_a_number_is_said_and_bounded():
    x = torch.tensor([1e-12, 0.25, -3e-10]).view(1, 1, 1, 3)
    mean, std = torch.tensor([0.4914]), torch.tensor([0.2023])
    z, off = from_pixels(x, mean, std)
    assert off.flatten().tolist() == [True, False, True]
    step = 2.0**-22  # of float32 between 2 and 4
    assert ((to_pixels(z, mean, std) - x).abs() <= step * 0.2023).all()


def test_a_neighbour_is_taken_where_only_that_leads_back():
    """At powers of two, where the nearest may lie below x and be rounded away from it."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.rand(40_000, generator=generator), torch.rand(40_000, generator=generator) + 0.1
    for x in (0.25, 0.5, 1.0, -0.125):
        x = torch.full((1, 40_000, 1, 1), x)
        z, off = from_pixels(x, mean, std)
        nearest = ((x.double()[0, :, 0, 0] - mean.double()) / std.double()).float().numpy()
        lead = [nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))]
        lead = [
            (one.astype(np.float64) * std.double().numpy() + mean.double().numpy()).astype(np.float32) for one in lead
        ]
        there = [one == x[0, :, 0, 0].numpy() for one in lead]
        only = (there[1] | there[2]) & ~there[0]
        assert only.sum() > 10  # it does happen
        assert np.array_equal(off[0, :, 0, 0].numpy(), ~(there[0] | there[1] | there[2]))
        assert torch.equal(to_pixels(z, mean, std)[~off], x[~off])


def fitted(tmp_path, source=SOURCE):
    return fit_zca(source, tmp_path)


def test_whitening_is_undone_and_comes_back(tmp_path):
    zca = fitted(tmp_path)
    w = 2 * draw(20, *SHAPE)
    x = unwhiten(w, MEAN, STD, zca)
    matrix, mean = zca.matrix.double().numpy(), zca.mean.double().numpy().ravel()
    std, shift = (np.repeat(v.double().numpy(), 36) for v in (STD, MEAN))
    for i in range(20):  # solved, not multiplied by the rounded inverse
        z = np.linalg.solve(matrix.T, w[i].double().numpy().ravel()) + mean
        exact = z * std + shift
        np.testing.assert_allclose(x[i].numpy().ravel(), exact, rtol=2**-24, atol=2**-33 + 1e-13)
    again = whiten(x, MEAN, STD, zca.mean, zca.matrix)
    assert again.dtype == F64
    for i in range(3):
        z = (x[i].double().numpy().ravel() - shift) / std
        naive = [sum((z[k] - mean[k]) * matrix[k, j] for k in range(108)) for j in range(108)]
        np.testing.assert_allclose(again[i].numpy().ravel(), naive, rtol=1e-12, atol=1e-12)
    assert torch.equal(unwhiten(again, MEAN, STD, zca), x)
    # what float32 pixels cost: half a step of each, through the matrix; and the grid
    moved = (2.0**-25 * (2 * x.abs()).clamp(min=2.0**-8) + 2.0**-33).double().flatten(1) / torch.tensor(std)
    bound = moved @ zca.matrix.double().abs() + 1e-12
    assert ((again - w).abs().flatten(1) <= bound).all()
    # near 0 too: without the grid such a pixel would not come back
    x = x.clone()
    x[0].view(-1)[:41] = torch.arange(-20, 21) * 2.0**-32
    back = unwhiten(whiten(x, MEAN, STD, zca.mean, zca.matrix), MEAN, STD, zca)
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))


def test_another_whitening_is_not_undone(tmp_path):
    zca = fitted(tmp_path)
    other = Zca(zca.mean, zca.matrix, zca.inverse * 3)
    refuse(lambda: unwhiten(draw(4, *SHAPE), MEAN, STD, other), "whitening cannot be undone")


def test_mtts_whitening_is_of_pixels():
    zca = pixel_zca(SOURCE)
    pixels = SOURCE.x_train.numpy().astype(np.float64).reshape(120, -1) / 255
    mean = pixels.sum(0) / 120
    covariance = sum(np.outer(row - mean, row - mean) for row in pixels) / 119
    s, u = np.linalg.eigh(covariance)
    matrix = u @ np.diag([1 / np.sqrt(value + 0.1) for value in s]) @ u.T
    theirs = (pixels[:10] - mean) @ matrix
    ours = zca.whiten((SOURCE.x_train[:10] / 255 - MEAN[:, None, None]) / STD[:, None, None])
    np.testing.assert_allclose(ours.flatten(1).numpy(), theirs, atol=1e-5)
    w = torch.tensor(theirs.astype(np.float32)).view(10, *SHAPE)
    np.testing.assert_allclose(unwhiten(w, MEAN, STD, zca).numpy().reshape(10, -1), pixels[:10], atol=3e-7)
    np.testing.assert_allclose((zca.matrix.double() @ zca.inverse.double()).numpy(), np.eye(108), atol=1e-5)
    refuse(lambda: pixel_zca(make_source(size=66, n=4)), "66 px")


# ----------------------------------------------------------------------------------- files as their code writes them


def write_krr_st(path, x, y):
    path.mkdir()
    torch.save(x.requires_grad_(), path / "x_syn.pt")  # leaves
    torch.save(y.requires_grad_() if y.is_floating_point() else y, path / "y_syn.pt")


def write_mtt(path, x, y, which="best"):
    path.mkdir(exist_ok=True)
    torch.save(x, path / f"images_{which}.pt")
    torch.save(y, path / f"labels_{which}.pt")


def write_dc(path, *sets):
    torch.save({"data": [list(one) for one in sets], "accs_all_exps": {"ConvNet": []}}, path)


def write_npz(path, x, y, names=("image", "label")):
    np.savez(path, **{names[0]: x.permute(0, 2, 3, 1).numpy(), names[1]: y.numpy()})


def write_ddranking(path, x, y, lr=None):
    path.mkdir()
    for name, value in (("images", x), ("labels", y), ("lr", None if lr is None else torch.tensor(lr))):
        if value is not None:
            torch.save(value, path / f"{name}.pt")


def write_folder(path, folders, per_class=2, channels=3, size=6, seed=0, suffix="png"):
    """Returns the pixels (class folders in the order given, per_class, H, W[, C])."""
    random = np.random.default_rng(seed)
    out = []
    for folder in folders:
        (path / folder).mkdir(parents=True)
        for i in range(per_class):
            array = random.integers(0, 256, (size, size, 3) if channels == 3 else (size, size), dtype=np.uint8)
            Image.fromarray(array).save(path / folder / f"class{i:03d}_id{i:03d}.{suffix}")
            out.append(array)
    return out


def naive_pixels(z, mean=MEAN, std=STD):
    z = z.detach()
    out = np.empty(z.shape, np.float32)
    for place in np.ndindex(*z.shape):
        c = place[1]
        out[place] = np.float32(np.float64(z[place]) * np.float64(std[c]) + np.float64(mean[c]))
    return torch.from_numpy(out)


def naive_one_hot(labels, classes=4):
    return torch.tensor([[1.0 if c == int(label) else 0.0 for c in range(classes)] for label in labels])


TORCH_FORMS = {
    "krr_st features": (draw(N, 7, seed=1), FEATURES),
    "krr_st labels": (HARD, LABELS),
    "mtt labels": (torch.tensor([3, 0, 1, 1, 2, 0, 3, 3]), LABELS),
    "mtt scores": (draw(N, 4, seed=1), SCORES),
    "dc labels": (HARD, LABELS),
    "npz scores": (draw(N, 4, seed=1), SCORES),
    "npz labels": (HARD, LABELS),
    "ddranking labels": (HARD, LABELS),
    "ddranking scores": (draw(N, 4, seed=1), SCORES),
}


def write_form(form, tmp_path, x, y, name="in"):
    path = tmp_path / (name + {"dc": ".pt", "npz": ".npz"}.get(form, ""))
    {"krr_st": write_krr_st, "mtt": write_mtt, "npz": write_npz, "ddranking": write_ddranking}.get(
        form, lambda path, x, y: write_dc(path, (x, y))
    )(path, x, y)
    return path


def new_path(form, tmp_path, name="out"):
    return tmp_path / (name + {"dc": ".pt", "npz": ".npz", "ours": ".safetensors"}.get(form, ""))


@pytest.mark.parametrize("case", TORCH_FORMS)
def test_read_written_and_read_again_is_the_same(case, tmp_path, capsys):
    form = case.split()[0]
    z, (y, y_is) = draw(N, *SHAPE), TORCH_FORMS[case]
    z[0, 0] = -0.4914 / 0.2023 + 1e-7 * draw(6, 6)  # pixels near 0
    z[1] = (draw(*SHAPE) > 0) * 1.0
    path = write_form(form, tmp_path, z.clone(), y)
    space = "normalised" if form == "npz" else None
    first = load_any(path, SOURCE, space=space)
    assert torch.equal(first.x, naive_pixels(z))
    assert first.y_is == y_is and torch.equal(first.y, naive_one_hot(y) if y_is == LABELS else y)
    assert not first.x.requires_grad and not first.y.requires_grad and first.x.is_contiguous()
    assert (first.method, first.data, first.class_names, first.resize) == (form, "birds", NAMES, "crop")
    assert (first.step, first.seed, first.recipe, first.zca, first.code) == (0, 0, {}, None, None)
    facts = dict(content="c" * 64, form=form, space="normalised", imported_from=path.name, num_images=N, teacher=None)
    assert {key: first.meta[key] for key in facts} == facts
    assert str(tmp_path) not in str(first.meta)
    out = new_path(form, tmp_path)
    save_as(first, form, out)
    assert form_of(out) == form
    second = load_any(out, SOURCE, space=space)
    same(first, second)
    assert "between the numbers" not in capsys.readouterr().out
    # and once more through our own file
    save_as(second, "ours", tmp_path / "ours.safetensors")
    third = load_any(tmp_path / "ours.safetensors")
    same(first, third)
    own = {field.name for field in dataclasses.fields(third)} - {"x", "y", "mean", "std", "meta", "zca", "zca_mean"}
    assert all(getattr(first, name) == getattr(third, name) for name in own)
    assert second.meta.items() <= third.meta.items()
    save_as(third, form, tmp_path / f"again{out.suffix}")
    same(first, load_any(tmp_path / f"again{out.suffix}", SOURCE, space=space))


def test_folder_of_images_comes_back(tmp_path, capsys):
    arrays = write_folder(tmp_path / "in", [f"new{i:03d}" for i in range(4)])
    first = load_any(tmp_path / "in", SOURCE)
    for i, array in enumerate(arrays):
        for place in np.ndindex(6, 6, 3):
            h, w, c = place
            assert first.x[i, c, h, w] == np.float32(np.float64(array[place]) / 255)
    assert torch.equal(first.y, naive_one_hot(HARD)) and first.y_is == LABELS
    assert (first.meta["form"], first.meta["space"]) == ("folder", "pixels")
    capsys.readouterr()
    save_as(first, "folder", tmp_path / "out")
    assert "rounded" not in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000_wren", "001_great_tit", "002_Häher", "003_owl"]
    same(first, load_any(tmp_path / "out", SOURCE))
    save_as(load_any(tmp_path / "out", SOURCE), "ours", tmp_path / "f.safetensors")
    same(first, load_any(tmp_path / "f.safetensors"))


def test_grey_folder_and_grey_tensors(tmp_path):
    grey = make_source(channels=1)
    arrays = write_folder(tmp_path / "in", ["wren", "great tit", "Häher", "owl"], channels=1, suffix="bmp")
    first = load_any(tmp_path / "in", grey)
    assert torch.equal(first.x[3, 0] * 255, torch.tensor(arrays[3]).float())
    save_as(first, "folder", tmp_path / "out")
    same(first, load_any(tmp_path / "out", grey))
    save_as(first, "npz", tmp_path / "g.npz")
    with np.load(tmp_path / "g.npz") as file:
        assert file["image"].shape == (8, 6, 6, 1)
    again = load_any(tmp_path / "g.npz", grey)  # grey sets are not whitened
    assert again.meta["space"] == "normalised"
    assert ((again.x - first.x).abs() <= 1e-7).all()
    refuse(lambda: load_any(tmp_path / "in", SOURCE, space="normalised"), "are pixels")
    write_folder(tmp_path / "colour", NAMES)
    refuse(lambda: load_any(tmp_path / "colour", grey), "in colour", "--channels")


def test_folder_of_floats_is_rounded_clamped_and_said(tmp_path, capsys):
    x = draw(N, *SHAPE) * 0.4 + 0.5
    path = write_form("mtt", tmp_path, (x - MEAN[:, None, None]) / STD[:, None, None], draw(N, 4))
    distilled = load_any(path, SOURCE)
    distilled.y = naive_one_hot([3, 3, 0, 1, 2, 2, 0, 1]) * 0.4 - 0.1
    capsys.readouterr()
    save_as(distilled, "folder", tmp_path / "out")
    words = capsys.readouterr().out
    clamped, squares = 0, 0.0
    order = sorted(range(N), key=lambda i: [3, 3, 0, 1, 2, 2, 0, 1][i])
    again = load_any(tmp_path / "out", SOURCE)
    for place, i in enumerate(order):
        for index in np.ndindex(*SHAPE):
            value = float(distilled.x[i][index])
            clamped += value < 0 or value > 1
            byte = np.floor(min(max(value, 0), 1) * 255 + 0.5)
            assert float(again.x[place][index]) == np.float32(byte / 255)
            squares += (byte / 255 - value) ** 2
    psnr = -10 * np.log10(squares / x.numel())
    assert f"{clamped} of {x.numel()} values clamped, PSNR {psnr:.1f} dB" in words and clamped > 50
    assert "highest score" in words
    assert again.y.argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_frepos_whitened_images(tmp_path):
    w, y = 2 * draw(N, *SHAPE), draw(N, 4, seed=1)
    path = write_form("npz", tmp_path, w, y)
    first = load_any(path, SOURCE, data_dir=tmp_path)
    zca = fit_zca(SOURCE, tmp_path)
    assert first.meta["space"] == "whitened" and first.meta["zca_bytes"] == 4 * (108 * 108 + 108)
    assert torch.equal(first.zca, zca.matrix) and torch.equal(first.zca_mean, zca.mean)
    torch.testing.assert_close(first.inputs(), w, atol=2e-5, rtol=0)
    save_as(first, "npz", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        assert file["image"].dtype == np.float64 and file["image"].shape == (N, 6, 6, 3)
        np.testing.assert_allclose(file["image"], w.permute(0, 2, 3, 1).numpy(), atol=2e-5)
    second = load_any(tmp_path / "out.npz", SOURCE, data_dir=tmp_path)
    same(first, second)
    save_as(second, "ours", tmp_path / "ours.safetensors")
    third = load_any(tmp_path / "ours.safetensors")
    same(first, third)
    assert torch.equal(third.zca_mean, zca.mean)
    fourth = load_any(tmp_path / "out.npz", SOURCE, zca=zca_of(third))  # by our file's own whitening
    same(first, fourth)
    given = load_any(tmp_path / "out.npz", SOURCE, zca=zca, space="whitened")
    same(first, given)
    save_as(first, "npz", tmp_path / "plain.npz", space="normalised")  # not whitened where it is asked for
    plain = load_any(tmp_path / "plain.npz", SOURCE, space="normalised")
    assert plain.zca is None and within_a_step(plain.x, first.x)


def test_mtts_whitened_images(tmp_path):
    w = draw(N, *SHAPE)
    path = write_form("mtt", tmp_path, w, HARD)
    first = load_any(path, SOURCE, space="whitened")
    pixels = SOURCE.x_train.double().flatten(1) / 255
    s, u = torch.linalg.eigh(torch.cov(pixels.T))
    theirs = (first.x.double().flatten(1) - pixels.mean(0)) @ (u * (s + 0.1) ** -0.5 @ u.T)
    torch.testing.assert_close(theirs, w.double().flatten(1), atol=2e-5, rtol=0)
    torch.testing.assert_close(first.inputs(), w, atol=2e-5, rtol=0)
    save_as(first, "mtt", tmp_path / "out", space="whitened")
    same(first, load_any(tmp_path / "out", SOURCE, space="whitened"))


def test_mtts_files(tmp_path, capsys):
    for which, seed in (("9", 1), ("10", 2), ("best", 3)):
        write_mtt(tmp_path / "run", draw(N, *SHAPE, seed=seed), HARD.roll(seed), which)
    torch.save(torch.tensor(0.0375), tmp_path / "run" / "lr_best.pt")
    best = load_any(tmp_path / "run", SOURCE)
    assert torch.equal(best.x, naive_pixels(draw(N, *SHAPE, seed=3))) and best.meta["lr"] == np.float32(0.0375)
    assert "images_best.pt with labels_best.pt" in capsys.readouterr().out
    save_as(best, "mtt", tmp_path / "out")
    assert torch.load(tmp_path / "out" / "lr_best.pt") == torch.tensor(0.0375)
    ninth = load_any(tmp_path / "run" / "images_9.pt", SOURCE)
    assert torch.equal(ninth.y, naive_one_hot(HARD.roll(1))) and "lr" not in ninth.meta
    (tmp_path / "run" / "images_best.pt").unlink()
    tenth = load_any(tmp_path / "run", SOURCE)  # not 9, which sorts last as a word
    assert torch.equal(tenth.x, naive_pixels(draw(N, *SHAPE, seed=2)))
    (tmp_path / "run" / "labels_10.pt").unlink()
    refuse(lambda: load_any(tmp_path / "run", SOURCE), "labels_10.pt", "no such file")
    torch.save(torch.zeros(3), tmp_path / "run" / "lr_9.pt")
    refuse(lambda: load_any(tmp_path / "run" / "images_9.pt", SOURCE), "lr_9.pt", "not one number")


def test_mtts_pictures_of_whitened_images(tmp_path):
    write_mtt(tmp_path / "run", draw(N, *SHAPE), HARD, "100")
    pictures = draw(N, *SHAPE, seed=4) * 0.2 + 0.5
    torch.save(pictures, tmp_path / "run" / "images_zca_100.pt")
    refuse(lambda: load_any(tmp_path / "run", SOURCE), "--space whitened", "images_100.pt")
    file = tmp_path / "run" / "images_zca_100.pt"
    refuse(lambda: load_any(file, SOURCE), "images_100.pt", "--space pixels")
    read = load_any(file, SOURCE, space="pixels")
    assert torch.equal(read.x, pictures) and torch.equal(read.y, naive_one_hot(HARD))
    assert load_any(tmp_path / "run", SOURCE, space="whitened").zca is not None
    save_as(read, "mtt", tmp_path / "out", space="pixels")
    same(read, load_any(tmp_path / "out", SOURCE, space="pixels"))


def test_other_constants_than_the_sources(tmp_path):
    z, (mean, std) = draw(N, *SHAPE), map(torch.tensor, CONSTANTS[1])
    path = write_form("mtt", tmp_path, z, HARD)
    distilled = load_any(path, SOURCE, mean=mean, std=std)
    assert torch.equal(distilled.x, naive_pixels(z, mean, std))
    assert torch.equal(distilled.mean, mean) and torch.equal(distilled.std, std)
    torch.testing.assert_close(distilled.inputs(), z, atol=2e-6, rtol=0)
    save_as(distilled, "mtt", tmp_path / "out")
    same(distilled, load_any(tmp_path / "out", SOURCE, mean=mean, std=std))
    refuse(lambda: load_any(path, SOURCE, mean=mean[:1], std=std), "3 numbers")
    refuse(lambda: load_any(path, SOURCE, std=std * 0), "std above 0")
    refuse(lambda: load_any(path, SOURCE, std=std, space="whitened"), "--zca")


def test_images_of_float64_are_rounded_before_they_are_pixels(tmp_path):
    """Else those near 0 lead to pixels to which no float32 leads."""
    z = draw(N, *SHAPE).double()
    z[0] = (-MEAN.double() / STD.double())[:, None, None] * (1 + 1e-12 * draw(*SHAPE))
    first = load_any(write_form("mtt", tmp_path, z, HARD), SOURCE)
    assert torch.equal(first.x, naive_pixels(z.float()))
    save_as(first, "mtt", tmp_path / "out")
    same(first, load_any(tmp_path / "out", SOURCE))


def test_dc_experiments(tmp_path):
    sets = [(draw(N, *SHAPE, seed=i), HARD.roll(i), draw(3)) for i in range(3)]
    write_dc(tmp_path / "res_DM.pt", *sets)
    for i in range(3):
        read = load_any(tmp_path / "res_DM.pt", SOURCE, experiment=i)
        assert torch.equal(read.x, naive_pixels(sets[i][0])) and torch.equal(read.y, naive_one_hot(sets[i][1]))
    for i in (-1, 3):
        refuse(lambda i=i: load_any(tmp_path / "res_DM.pt", SOURCE, experiment=i), "it holds 3")
    torch.save({"weights": draw(3)}, tmp_path / "net.pt")
    refuse(lambda: load_any(tmp_path / "net.pt", SOURCE), "'data'")
    torch.save(draw(3), tmp_path / "tensor.pt")
    refuse(lambda: load_any(tmp_path / "tensor.pt", SOURCE), "'data'")


def test_cuda_leaves_are_read(tmp_path, monkeypatch):
    """KRR-ST's tensors are saved on a GPU: a file says so by the tag of its storages."""
    x, y = draw(N, *SHAPE), draw(N, 7)
    real = torch.serialization.location_tag
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0" if real(storage) else "")
    write_krr_st(tmp_path / "in", x.clone(), y.clone())
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):
            torch.load(tmp_path / "in" / "x_syn.pt")
    read = load_any(tmp_path / "in", SOURCE, teacher={"name": "resnet18"})
    assert torch.equal(read.x, naive_pixels(x)) and torch.equal(read.y, y)
    assert read.x.device.type == read.y.device.type == "cpu" and read.meta["teacher"] == {"name": "resnet18"}
    assert torch.equal(load_any(tmp_path / "in" / "x_syn.pt", SOURCE).y, y)


def test_npz_layouts_and_names(tmp_path, capsys):
    z, y = draw(N, *SHAPE), draw(N, 4, seed=1)
    np.savez(tmp_path / "a.npz", x=z.numpy(), y=y.double().numpy())
    first = load_any(tmp_path / "a.npz", SOURCE, space="normalised")
    assert "channels first" in capsys.readouterr().out
    write_npz(tmp_path / "b.npz", z, y, ("images", "labels"))
    second = load_any(tmp_path / "b.npz", SOURCE, space="normalised")
    assert "channels last" in capsys.readouterr().out
    assert torch.equal(first.x, naive_pixels(z))
    same(first, second)
    pixels = torch.randint(0, 256, (N, *SHAPE), dtype=torch.uint8)
    write_npz(tmp_path / "c.npz", pixels, HARD.int())
    third = load_any(tmp_path / "c.npz", SOURCE, space="pixels")
    assert torch.equal(third.x, (pixels.double() / 255).float())
    save_as(third, "npz", tmp_path / "d.npz", space="pixels")
    same(third, load_any(tmp_path / "d.npz", SOURCE, space="pixels"))
    refuse(lambda: load_any(tmp_path / "c.npz", SOURCE), "--space pixels")
    np.savez(tmp_path / "e.npz", x=z.numpy(), image=z.numpy(), y=y.numpy())
    refuse(lambda: load_any(tmp_path / "e.npz", SOURCE), "one array of")
    np.savez(tmp_path / "f.npz", image=z.numpy())
    refuse(lambda: load_any(tmp_path / "f.npz", SOURCE), "one of label")
    np.savez(tmp_path / "big.npz", image=z.numpy().astype(">f4"), label=y.numpy())
    assert torch.equal(load_any(tmp_path / "big.npz", SOURCE, space="normalised").x, first.x)
    cube = make_source(size=2)
    cube = dataclasses.replace(cube, x_train=torch.zeros(4, 3, 3, 3, dtype=torch.uint8))
    write_npz(tmp_path / "g.npz", draw(4, 3, 3, 3), HARD[:4])
    refuse(lambda: load_any(tmp_path / "g.npz", cube, space="normalised"), "first or last")


# ------------------------------------------------------------------------------------------------------ what is refused


class Boom:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "trap"
    sane = draw(N, *SHAPE)
    torch.save({"data": [[sane, HARD]], "accs_all_exps": Boom(str(trap))}, tmp_path / "res.pt")
    line = refuse(lambda: load_any(tmp_path / "res.pt", SOURCE), "python -c", "weights_only=False", "res.pt.clean.pt")
    assert "pickled code" in line and not trap.exists()
    for form, names in (
        ("krr_st", ("x_syn", "y_syn")),
        ("mtt", ("images_best", "labels_best")),
        ("ddranking", ("images", "labels", "lr")),
    ):
        for bad in names:
            path = tmp_path / f"{form}_{bad}"
            path.mkdir()
            for name in names:
                good = sane if name in (names[0]) else HARD if form != "krr_st" else draw(N, 7)
                torch.save(Boom(str(trap)) if name == bad else good, path / f"{name}.pt")
            refuse(lambda path=path: load_any(path, SOURCE), "python -c", f"{bad}.pt")
            assert not trap.exists()
    with open(tmp_path / "old.pt", "wb") as file:  # a plain pickle, without a zip
        pickle.dump(Boom(str(trap)), file, 2)
    refuse(lambda: load_any(tmp_path / "old.pt", SOURCE), "old.pt")
    objects = np.empty(2, object)
    objects[:] = [Boom(str(trap)), 1]
    np.savez(tmp_path / "o.npz", image=objects, label=HARD.numpy())
    refuse(lambda: load_any(tmp_path / "o.npz", SOURCE), "pickled objects")
    np.savez(tmp_path / "p.npz", image=sane.numpy(), label=objects)
    refuse(lambda: load_any(tmp_path / "p.npz", SOURCE), "pickled objects")
    with open(tmp_path / "q.npz", "wb") as file:
        pickle.dump(Boom(str(trap)), file, 2)
    refuse(lambda: load_any(tmp_path / "q.npz", SOURCE), "q.npz")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Boom(str(trap))))
    assert trap.exists()  # the trap works


def test_the_conversion_converts(tmp_path):
    """DC's accuracies are numpy's floats, which need unpickling; its sets may be arrays."""
    z = draw(N, *SHAPE)
    accuracies = {"ConvNet": [np.float64(0.5)]}
    path = tmp_path / 'a "quoted" name.pt'
    torch.save({"data": [[z.requires_grad_(), HARD.numpy()]], "accs_all_exps": accuracies}, path)
    line = refuse(lambda: load_any(path, SOURCE), "convert it once")
    command = line[line.index("python -c") : line.index(" and give the same path")]
    command = command.replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    read = load_any(path, SOURCE)
    assert torch.equal(read.x, naive_pixels(z)) and torch.equal(read.y, naive_one_hot(HARD))


def test_wrong_shapes_numbers_and_files(tmp_path):
    z = draw(N, *SHAPE)
    bad = z.clone()
    bad[5, 1, 2, 3] = float("nan")
    infinite = z.clone()
    infinite[2, 0, 0, 0] = float("inf")
    scores = draw(N, 4)
    nan_scores = scores.clone()
    nan_scores[6, 2] = float("nan")
    cases = [
        (bad, HARD, ["image 5 is not finite"]),
        (infinite, HARD, ["image 2 is not finite"]),
        (z, nan_scores, ["labels of image 6 are not finite"]),
        (z, HARD[:-1], ["8 images", "(7,)"]),
        (z, HARD.float(), ["labels of floats"]),
        (z, HARD + 1, ["labels 1 to 4", "4 classes"]),
        (z, HARD - 1, ["labels -1 to 2"]),
        (z, HARD[:, None], ["integer labels of shape (8, 1)"]),
        (z, HARD > 1, ["no tensor of numbers"]),
        (z, torch.tensor(3), ["not of one set"]),
        (z, draw(N, 5), ["5 values", "--y-is"]),
        (z[:0], HARD[:0], ["shape (0, 3, 6, 6)"]),
        (z[:, :1], HARD, ["(1, 6, 6)", "(3, 6, 6)"]),
        (z[..., :5, :5], HARD, ["(3, 5, 5)"]),
        (z[..., :5], HARD, ["(3, 6, 5)"]),
        (z[0], HARD, ["shape (3, 6, 6)"]),
        (z.long(), HARD, ["torch.int64"]),
        ((z * 255).byte(), HARD, ["--space pixels"]),
        ([1, 2], HARD, ["list"]),
        (z * 3e38, HARD, ["finite"]),
        (z.double() * 1e300, HARD, ["overflow"]),
    ]
    for i, (x, y, words) in enumerate(cases):
        write_mtt(tmp_path / str(i), x, y)
        refuse(lambda i=i: load_any(tmp_path / str(i), SOURCE), *words)
    write_mtt(tmp_path / "ok", z, HARD)
    refuse(lambda: load_any(tmp_path / "ok"), "--source")
    refuse(lambda: load_any(tmp_path / "ok", SOURCE, y_is=SCORES), "--y-is")
    refuse(lambda: load_any(tmp_path / "ok", SOURCE, form="tar"), "--in-form tar", "krr_st")
    refuse(lambda: load_any(tmp_path / "ok", SOURCE, space="lab"), "--space lab")
    refuse(lambda: load_any(tmp_path / "ok", SOURCE, y_is="logits"), "--y-is logits")
    refuse(lambda: load_any(tmp_path / "none", SOURCE), "no such file or folder")
    refuse(lambda: load_any(tmp_path / "none", SOURCE, form="mtt"), "no such file or folder")
    unlabelled = dataclasses.replace(SOURCE, class_names=[], y_train=None, y_test=None)
    refuse(lambda: load_any(tmp_path / "ok", unlabelled), "0 classes")
    write_krr_st(tmp_path / "pairs", z.clone(), draw(N, 4))
    refuse(lambda: load_any(tmp_path / "pairs", SOURCE), "4 values", "--y-is")
    assert load_any(tmp_path / "pairs", SOURCE, y_is=SCORES).y_is == SCORES
    assert load_any(tmp_path / "pairs", unlabelled).y_is == FEATURES
    (tmp_path / "pairs" / "y_syn.pt").unlink()
    refuse(lambda: load_any(tmp_path / "pairs", SOURCE), "y_syn.pt", "no such file")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 nothing")
    refuse(lambda: load_any(tmp_path / "broken.pt", SOURCE), "not a readable file of tensors")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    refuse(lambda: load_any(tmp_path / "broken.npz", SOURCE), "not a readable .npz")
    write_mtt(tmp_path / "bytes", z.abs() * 255, HARD)
    refuse(lambda: load_any(tmp_path / "bytes", SOURCE, space="pixels"), "divide by 255")
    zca = Zca(torch.zeros(3, 4, 4), torch.eye(48), torch.eye(48))
    refuse(lambda: load_any(tmp_path / "ok", SOURCE, zca=zca), "(3, 4, 4)")
    refuse(lambda: load_any(tmp_path / "ok", SOURCE, zca=zca, space="normalised"), "--zca goes with")


def test_forms_are_recognised(tmp_path):
    for form, path in (("krr_st", "a"), ("mtt", "b"), ("npz", "c"), ("ddranking", "d"), ("dc", "e")):
        made = write_form(form, tmp_path, draw(N, *SHAPE), HARD, path)
        assert form_of(made) == form
    write_folder(tmp_path / "f", NAMES)
    assert form_of(tmp_path / "f") == "folder"
    assert form_of(tmp_path / "b" / "images_best.pt") == "mtt"
    assert form_of(tmp_path / "a" / "x_syn.pt") == "krr_st" and form_of(tmp_path / "d" / "images.pt") == "ddranking"
    (tmp_path / "empty").mkdir()
    refuse(lambda: form_of(tmp_path / "empty"), "x_syn.pt", "labels_*.pt", ".npz", ".safetensors")
    (tmp_path / "text.txt").write_text("")
    refuse(lambda: form_of(tmp_path / "text.txt"), "x_syn.pt")
    torch.save(draw(2), tmp_path / "a" / "images_best.pt")
    refuse(lambda: form_of(tmp_path / "a"), "krr_st and mtt", "--in-form")


# -------------------------------------------------------------------------------------------------------- class folders


@pytest.mark.parametrize(
    "folders, names, labels, rule",
    [
        (["a", "b", "c"], ["c", "a", "b"], [1, 2, 0], "names"),
        (["10", "2", "0"], ["0", "2", "10"], [2, 1, 0], "names"),
        (["great_tit", "42"], ["42", "great tit"], [1, 0], "names"),
        (["000_b", "001_a", "002_great_tit"], ["b", "a", "great tit"], [0, 1, 2], "number and name"),
        (["1_a", "0_b"], ["b", "a"], [1, 0], "number and name"),
        (["class10", "class2", *[f"class{i}" for i in (0, 1, 3, 4, 5, 6, 7, 8, 9)]], list("abcdefghijk"),
         [10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9], "from 0"),
        (["new002", "new000", "new001"], ["x", "y", "z"], [2, 0, 1], "from 0"),
        (["2", "1", "3"], ["x", "y", "z"], [1, 0, 2], "from 1"),
        (["n01440764", "n01443537", "n01484850"], ["tench", "goldfish", "shark"], [0, 1, 2], "sorted"),
        (["n2", "n1"], ["n1", "n2"], [1, 0], "names"),
    ],
)  # fmt: skip
def test_the_order_of_class_folders(folders, names, labels, rule):
    found, words = class_order(folders, names)
    assert found == labels and rule in words


@pytest.mark.parametrize(
    "folders, names, words",
    [
        (["a", "b"], ["a", "b", "c"], ["2 class folders", "3 classes"]),
        (["a", "b", "c", "d"], ["a", "b", "c"], ["4 class folders"]),
        (["a", "b", "x"], ["a", "b", "c"], ["2 class folders have names", "not x", "c has no folder"]),
        (["000_b", "001_a"], ["a", "b"], ["class 0 of the source is a"]),
        (["c9", "c10", "c40"], ["x", "y", "z"], ["their order differs"]),
        (["class1", "class01", "class2"], ["x", "y", "z"], ["their order differs"]),
    ],
)
def test_class_folders_whose_order_is_not_sure(folders, names, words):
    refuse(lambda: class_order(folders, names), *words)


def test_labels_of_folders_follow_the_names(tmp_path, capsys):
    """RDED: the wrong order of labels costs all of the accuracy."""
    arrays = write_folder(tmp_path / "in", ["owl", "Häher", "wren", "great tit"], per_class=1)
    read = load_any(tmp_path / "in", SOURCE)
    assert "their names are the classes'" in capsys.readouterr().out
    assert read.y.argmax(1).tolist() == [0, 1, 2, 3]
    for i, place in enumerate((2, 3, 1, 0)):
        assert torch.equal((read.x[i] * 255).round().byte().permute(1, 2, 0), torch.tensor(arrays[place]))
    (tmp_path / "in" / "owl" / ".hidden.png").write_bytes(b"")
    (tmp_path / "in" / "owl" / "notes.txt").write_bytes(b"")
    assert torch.equal(load_any(tmp_path / "in", SOURCE).x, read.x)
    (tmp_path / "in" / "owl" / "class000_id000.png").unlink()
    refuse(lambda: load_any(tmp_path / "in", SOURCE), "owl", "no images")
    (tmp_path / "in" / "owl" / "b.png").write_bytes(b"no image")
    refuse(lambda: load_any(tmp_path / "in", SOURCE), "b.png", "not a readable image")
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "in" / "owl" / "b.png")
    refuse(lambda: load_any(tmp_path / "in", SOURCE), "b.png", "6x5")
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(tmp_path / "in" / "owl" / "b.png")
    refuse(lambda: load_any(tmp_path / "in", SOURCE), "b.png", "8 bits")
    other = make_source(classes=3)
    refuse(lambda: load_any(tmp_path / "in", other), str(tmp_path / "in"), "4 class folders", "3 classes")


# ----------------------------------------------------------------------------------------------------------------- ours


def ours(tmp_path, y, y_is, name="ours.safetensors", zca=None, **changes):
    """A set as a script saves it: pixels made by float32 arithmetic."""
    z = 1.5 * draw(N, *SHAPE, seed=9)
    x = (zca.undo(z) if zca else z) * STD[:, None, None] + MEAN[:, None, None]
    facts = dict(method="krr_st", data="birds", content="c" * 64, class_names=NAMES, resize="crop", step=7, seed=3,
                 recipe={"lr": 0.02, "epochs": 3}, teacher={"name": "r10"}, extra={"ipc": 2, "flip": True})  # fmt: skip
    save_distilled(tmp_path / name, x, y, MEAN, STD, y_is=y_is, zca=zca, **facts | changes)
    return load_distilled(tmp_path / name)


@pytest.mark.parametrize("form", ["krr_st", "mtt", "dc", "npz"])
def test_our_features_in_their_forms(form, tmp_path, capsys):
    made = ours(tmp_path, draw(N, 7), FEATURES)
    save_as(made, form, new_path(form, tmp_path))
    told = capsys.readouterr().out
    assert ("--y-is features" in told) == (form != "krr_st")
    back = load_any(new_path(form, tmp_path), SOURCE, space="normalised", y_is=FEATURES)
    assert torch.equal(back.y, made.y) and back.y_is == FEATURES
    assert within_a_step(back.x, made.x)
    off = int((back.x != made.x).sum())
    assert (f"{off} of {made.x.numel()} pixels" in told) == (off > 0)
    save_as(back, form, new_path(form, tmp_path, "again"))
    same(back, load_any(new_path(form, tmp_path, "again"), SOURCE, space="normalised", y_is=FEATURES))


def test_our_features_have_no_labels(tmp_path):
    made = ours(tmp_path, draw(N, 7), FEATURES)
    for form in ("ddranking", "folder"):
        refuse(lambda form=form: save_as(made, form, tmp_path / "out"), "teacher features", "classes")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["krr_st", "mtt", "dc", "npz", "ddranking"])
def test_our_scores_in_their_forms(form, tmp_path, capsys):
    y = naive_one_hot([0, 0, 1, 1, 2, 2, 3, 3]) - 0.25 + 0.1 * draw(N, 4)
    made = ours(tmp_path, y, SCORES)
    save_as(made, form, new_path(form, tmp_path))
    y_is = SCORES if form == "krr_st" else None
    back = load_any(new_path(form, tmp_path), SOURCE, space="normalised", y_is=y_is)
    assert torch.equal(back.y, made.y) and back.y_is == SCORES
    assert within_a_step(back.x, made.x)
    save_as(back, form, new_path(form, tmp_path, "again"))
    same(back, load_any(new_path(form, tmp_path, "again"), SOURCE, space="normalised", y_is=y_is))
    if form == "dc":
        state = torch.load(tmp_path / "out.pt")
        assert torch.equal(state["data"][0][1], made.y) and len(state["data"]) == 1
    capsys.readouterr()
    one_hot = ours(tmp_path, naive_one_hot(HARD), SCORES, "hot.safetensors")  # SC-DD's
    save_as(one_hot, form, new_path(form, tmp_path, "hot"))
    back = load_any(new_path(form, tmp_path, "hot"), SOURCE, space="normalised")
    assert torch.equal(back.y, one_hot.y) and back.y_is == (SCORES if form == "npz" else LABELS)
    assert ("one-hot" in capsys.readouterr().out) == (form != "npz")


def test_our_whitened_set(tmp_path, capsys):
    zca = fitted(tmp_path)
    made = ours(tmp_path, draw(N, 4), SCORES, zca=zca, method="frepo")
    save_as(made, "npz", tmp_path / "out.npz")
    back = load_any(tmp_path / "out.npz", SOURCE, data_dir=tmp_path)
    assert ((back.x - made.x).abs() <= 2.0**-32).all() and torch.equal(back.zca, made.zca)
    with np.load(tmp_path / "out.npz") as file:
        image = torch.tensor(file["image"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(made.inputs().double(), image, atol=1e-5, rtol=0)
    save_as(back, "npz", tmp_path / "again.npz")
    same(back, load_any(tmp_path / "again.npz", SOURCE, data_dir=tmp_path))
    capsys.readouterr()
    save_as(made, "mtt", tmp_path / "mtt")
    assert "saw whitened images" in capsys.readouterr().out
    plain = load_any(tmp_path / "mtt", SOURCE)
    assert plain.zca is None and within_a_step(plain.x, made.x)
    for form in ("ddranking", "krr_st"):
        refuse(lambda form=form: save_as(made, form, tmp_path / "w", space="whitened"), "not whitened")
    refuse(lambda: save_as(plain, "mtt", tmp_path / "w", space="whitened"), "not whitened")


def test_pixels_without_a_number_are_said(tmp_path, capsys):
    made = ours(tmp_path, draw(N, 7), FEATURES)
    made.x[0, 0, 0, :3] = torch.tensor([1e-12, -1e-11, 3e-13])
    exact = naive_off(made.x)
    save_as(made, "krr_st", tmp_path / "out")
    assert f"{exact} of {made.x.numel()} pixels lie between" in capsys.readouterr().out and exact >= 3


def naive_off(x):
    count = 0
    for place in np.ndindex(*x.shape):
        mean, std = np.float64(MEAN[place[1]]), np.float64(STD[place[1]])
        z = np.float32((np.float64(x[place]) - mean) / std)
        tries = [z, np.nextafter(z, np.float32(np.inf)), np.nextafter(z, np.float32(-np.inf))]
        count += all(np.float32(np.float64(t) * std + mean) != np.float32(x[place]) for t in tries)
    return count


def test_ours_is_copied_whole(tmp_path):
    made = ours(tmp_path, draw(N, 4), SCORES, zca=fitted(tmp_path))
    save_as(made, "ours", tmp_path / "copy.safetensors")
    copy = load_any(tmp_path / "copy.safetensors")
    same(made, copy)
    assert (copy.method, copy.step, copy.seed, copy.recipe) == ("krr_st", 7, 3, {"lr": 0.02, "epochs": 3})
    assert torch.equal(copy.zca_mean, made.zca_mean)
    assert {k: v for k, v in copy.meta.items() if k != "commit"} == {
        k: v for k, v in made.meta.items() if k != "commit"
    }


def test_a_set_of_bases_is_copied_as_it_is_stored(tmp_path):
    tensors = dict(
        c_x=draw(N, 5).half(), b_x=draw(5, 108), mu_x=draw(108), c_y=draw(N, 2), b_y=draw(2, 7), mu_y=draw(7)
    )
    facts = dict(method="boost_pca", data="birds", content="c" * 64, y_is=FEATURES, class_names=NAMES, resize="crop")
    code = Code(tensors, SHAPE, 1, ())
    save_distilled(tmp_path / "a.safetensors", None, None, MEAN, STD, **facts, step=1, seed=0, recipe={}, code=code)
    made = load_distilled(tmp_path / "a.safetensors")
    save_as(made, "ours", tmp_path / "b.safetensors")
    copy = load_any(tmp_path / "b.safetensors")
    same(made, copy)
    assert {key: value.dtype for key, value in copy.code.tensors.items()} == {k: v.dtype for k, v in tensors.items()}
    assert copy.meta["storage_bytes"] == made.meta["storage_bytes"]
    save_as(made, "krr_st", tmp_path / "pairs")  # decoded
    back = load_any(tmp_path / "pairs", SOURCE)
    assert within_a_step(back.x, made.x) and torch.equal(back.y, made.y)


# ----------------------------------------------------------------------------------------------------------- DD-Ranking


def test_ddranking_is_sorted_by_class(tmp_path, capsys):
    classes = [3, 0, 1, 3, 2, 0, 1, 2]
    y = naive_one_hot(classes) + 0.1 * draw(N, 4)
    made = ours(tmp_path, y, SCORES)
    made.x = to_pixels(draw(N, *SHAPE), MEAN, STD)
    capsys.readouterr()
    save_as(made, "ddranking", tmp_path / "out")
    images, labels, lr = (torch.load(tmp_path / "out" / f"{name}.pt") for name in ("images", "labels", "lr"))
    order = [1, 5, 2, 6, 4, 7, 0, 3]  # stable
    assert torch.equal(labels, y[order]) and labels.dtype == torch.float32  # as they are
    assert images.dtype == torch.float32 and images.shape == (N, *SHAPE) and images.is_contiguous()
    for place, i in enumerate(order):
        torch.testing.assert_close(naive_pixels(images[place][None])[0], made.x[i], atol=0, rtol=0)
    assert lr.shape == () and lr.dtype == torch.float32 and lr == np.float32(0.02)
    save_as(made, "ddranking", tmp_path / "rate", lr=0.5)
    assert torch.load(tmp_path / "rate" / "lr.pt") == 0.5
    back = load_any(tmp_path / "rate", SOURCE)
    assert back.meta["lr"] == 0.5 and back.recipe == {}
    save_as(back, "ddranking", tmp_path / "again")
    assert torch.load(tmp_path / "again" / "lr.pt") == 0.5
    made.recipe = {}
    capsys.readouterr()
    save_as(made, "ddranking", tmp_path / "no_rate")
    assert "--lr" in capsys.readouterr().out and not (tmp_path / "no_rate" / "lr.pt").exists()


def test_ddranking_needs_as_many_of_each_class(tmp_path):
    made = ours(tmp_path, naive_one_hot([0, 0, 0, 1, 2, 2, 3, 3]), SCORES)
    refuse(lambda: save_as(made, "ddranking", tmp_path / "out"), "1 of great tit", "3 of wren")
    assert not (tmp_path / "out").exists()
    write_ddranking(tmp_path / "in", draw(N - 1, *SHAPE), draw(N - 1, 4))
    refuse(lambda: load_any(tmp_path / "in", SOURCE), "7 images for 4 classes")
    write_ddranking(tmp_path / "mixed", draw(N, *SHAPE), HARD.flip(0))
    refuse(lambda: load_any(tmp_path / "mixed", SOURCE), "not sorted")
    # soft labels may be highest for another class than that of the place, which stays
    write_ddranking(tmp_path / "soft", draw(N, *SHAPE), naive_one_hot([1] * N) + 0.0)
    soft = load_any(tmp_path / "soft", SOURCE)
    soft.y = soft.y + 0.01 * draw(N, 4)
    save_as(soft, "ddranking", tmp_path / "soft_again")
    again = load_any(tmp_path / "soft_again", SOURCE)
    same(soft, again)


# ------------------------------------------------------------------------------------------------------------ writing


def test_where_a_set_may_be_written(tmp_path):
    made = ours(tmp_path, naive_one_hot(HARD), LABELS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "images_zca_1.pt").write_bytes(b"")
    for form in ("krr_st", "mtt", "ddranking", "folder"):
        refuse(lambda form=form: save_as(made, form, tmp_path / "full"), "not empty")
        refuse(lambda form=form: save_as(made, form, tmp_path / "ours.safetensors"), "a file")
    for form in ("dc", "npz", "ours"):
        refuse(lambda form=form: save_as(made, form, tmp_path / "full"), "a folder")
        refuse(lambda form=form: save_as(made, form, tmp_path / "ours.safetensors" / "x"), "cannot make a folder")
        save_as(made, form, tmp_path / "deep" / f"{form}.x")
    refuse(lambda: save_as(made, "zip", tmp_path / "a"), "--form zip")
    refuse(lambda: save_as(made, "mtt", tmp_path / "a", space="lab"), "--space lab")
    refuse(lambda: save_as(made, "folder", tmp_path / "a", space="normalised"), "are pixels")
    made.y[3] = 0.5
    refuse(lambda: save_as(made, "mtt", tmp_path / "a"), "not one-hot")
    made.y[2:] = 0
    refuse(lambda: save_as(made, "folder", tmp_path / "a"), "no image of class great tit")
    assert not (tmp_path / "a").exists()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "birds" / "train", ["a", "b"], per_class=6)
    write_folder(tmp_path / "birds" / "test", ["a", "b"], per_class=2, seed=1)
    write_mtt(tmp_path / "run", draw(4, *SHAPE), torch.tensor([0, 0, 1, 1]))
    source = str(tmp_path / "birds")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["exchange.py", *map(str, words)])
        try:
            exchange.cli(exchange.main, exchange.Args)
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    flags = ["--source", source, "--data-dir", tmp_path / "data", "--mean", *CONSTANTS[1][0], "--std", *CONSTANTS[1][1]]
    code, told = run(tmp_path / "run", tmp_path / "a.safetensors", *flags, "--method", "mtt-cifar")
    assert code == 0 and "4 images" in told.out
    made = load_distilled(tmp_path / "a.safetensors")
    assert torch.equal(made.x, naive_pixels(draw(4, *SHAPE), *map(torch.tensor, CONSTANTS[1])))
    assert made.method == "mtt-cifar" and made.class_names == ["a", "b"] and made.meta["imported_from"] == "run"
    code, _ = run(tmp_path / "a.safetensors", tmp_path / "dd", "--form", "ddranking", "--lr", "0.25")
    assert code == 0 and torch.load(tmp_path / "dd" / "lr.pt") == 0.25
    assert torch.equal(torch.load(tmp_path / "dd" / "labels.pt"), torch.tensor([0, 0, 1, 1]))
    for words, part in (
        ([], "two paths"),
        ([tmp_path / "a.safetensors", tmp_path / "x"], "--form"),
        ([tmp_path / "run", tmp_path / "b.safetensors"], "--source"),
    ):
        code, told = run(*words)
        assert code == 2 and part in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1


def test_a_named_tuple_or_ordered_dictionary_is_no_object(tmp_path):
    state = collections.OrderedDict(data=[(draw(N, *SHAPE), HARD)])
    torch.save(state, tmp_path / "o.pt")
    assert torch.equal(load_any(tmp_path / "o.pt", SOURCE).y, naive_one_hot(HARD))
