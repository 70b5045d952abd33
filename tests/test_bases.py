"""common/bases.py, codes in common/artefact.py and kmeans_medoids: against NumPy, scikit-learn and loops in float64."""

import json
import math
import struct
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn
from torchvision.transforms import functional as tv

from common import bases
from common.artefact import fit_pairs, load_distilled, pretrain, save_distilled
from common.baselines import kmeans_medoids
from common.bases import (
    VIEWS,
    Code,
    block_sums,
    decode,
    dequantised,
    downsample,
    feature_pca,
    image_pca,
    moments,
    quantised,
    randomised,
    shift,
    signed,
    storage,
    view,
    with_views,
)
from common.data import Zca, denormalise, normalise
from common.run import seed_of

F64, CPU = torch.float64, torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.3, 0.2])
DIHEDRAL = {  # what lands at (i, j) of n x n pixels
    "rot90": lambda i, j, n: (j, n - 1 - i),
    "rot180": lambda i, j, n: (n - 1 - i, n - 1 - j),
    "rot270": lambda i, j, n: (n - 1 - j, i),
    "hflip": lambda i, j, n: (i, n - 1 - j),
    "vflip": lambda i, j, n: (n - 1 - i, j),
    "transpose": lambda i, j, n: (j, i),
    "antitranspose": lambda i, j, n: (n - 1 - j, n - 1 - i),
}
M, U, V, C, S, D, H = 3, 4, 2, 2, 3, 5, 3  # images, bases, channels, side of the bases, target, hidden
FACTS = dict(
    method="boost_pca", data="birds", content="c" * 64, y_is="teacher features", class_names=["wren"], resize="crop",
    step=7, seed=3, recipe={"epochs": 5},
)  # fmt: skip


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(*shape, seed=0, low=0):
    return torch.randint(low, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def digits(n=1797):
    return torch.from_numpy((load_digits().images[:n] * 255 / 16).round().astype("uint8"))[:, None]


def same(found, wanted, tolerance=1e-12):
    """Largest difference relative to the largest wanted number."""
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


# --------------------------------------------------------------------------------------------------------- integer sums


def integer_rows(x, r):
    """uint8 (N, C, H, W) -> int64 (N, C (H / r) (W / r)) by NumPy."""
    x = x.numpy().astype(np.int64)
    return sum(x[:, :, a::r, b::r] for a in range(r) for b in range(r)).reshape(len(x), -1)


@pytest.mark.parametrize("name", ["digits", "random", "colour", "bright"])
@pytest.mark.parametrize("r", [1, 2, 4])
def test_integer_sums_equal_numpys_however_the_images_are_divided(name, r):
    x = dict(
        digits=digits(400), random=pixels(131, 1, 8, 8), colour=pixels(131, 3, 8, 12, seed=1),
        bright=pixels(1000, 3, 8, 8, low=250),
    )[name]  # fmt: skip
    rows = integer_rows(x, r)
    sums = block_sums(x, r)
    assert sums.dtype == F64 and np.array_equal(sums.numpy(), rows)
    if name == "bright":  # float32 holds neither of them
        assert (rows.T @ rows).min() > 2**24 and (rows.T @ rows % 2).any()
    for chunk in (1, 7, 64, len(x)):
        n, total, products = moments(lambda chunk=chunk: (block_sums(part, r) for part in x.split(chunk)))
        assert n == len(x) and total.dtype == products.dtype == F64
        assert np.array_equal(total.numpy().astype(np.int64), rows.sum(0))
        assert np.array_equal(products.numpy().astype(np.int64), rows.T @ rows)
        assert total.frac().abs().max() == products.frac().abs().max() == 0


def test_moments_start_anew_at_every_call_and_leave_the_rows_alone():
    x = draw(20, 3, seed=2)
    parts = [part.clone() for part in x.split(6)]
    first, second = (moments(lambda: iter(parts)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    assert torch.equal(torch.cat(parts), x)
    same(first[2], x.double().T @ x.double())


@pytest.mark.parametrize("r", [1, 2, 4])
def test_image_pca_is_the_same_bit_for_bit_in_any_chunks(r):
    x = pixels(131, 3, 8, 8, seed=3)
    wanted = image_pca(x, MEAN, STD, r, 10, CPU)
    for chunk in (1, 7, 64, 131):
        found = image_pca(x, MEAN, STD, r, 10, CPU, chunk=chunk)
        for name in ("mean", "bases", "variances"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), (chunk, name)
        assert found.total == wanted.total


@pytest.mark.parametrize("large", [4096, 10], ids=["exact", "randomised"])
def test_image_pca_of_a_memory_map_holds_two_chunks_at_most(large, tmp_path, monkeypatch):
    x = digits(500)
    mapped = np.memmap(tmp_path / "x", np.uint8, "w+", shape=tuple(x.shape))
    mapped[:] = x.numpy()
    monkeypatch.setattr(bases, "LARGE", large)
    wanted = image_pca(x, MEAN[:1], STD[:1], 1, 5, CPU, chunk=50)
    alive, most, plain = [], [], bases.block_sums

    def watched(part, r):
        assert len(part) <= 50
        rows = plain(part, r)
        alive.append(weakref.ref(rows))
        most.append(sum(ref() is not None for ref in alive))
        return rows

    monkeypatch.setattr(bases, "block_sums", watched)
    found = image_pca(torch.from_numpy(mapped), MEAN[:1], STD[:1], 1, 5, CPU, chunk=50)
    assert torch.equal(found.bases, wanted.bases) and torch.equal(found.variances, wanted.variances)
    assert max(most) <= 2 and len(most) == (10 if large == 4096 else 10 * 8)  # rounds + 2 readings


# ----------------------------------------------------------------------------------------------------------- downsample


def normalised_rows(x, mean, std, r):
    """float64 (N, C (H / r) (W / r)): normalised, blocks averaged, in loops over channels and pixels of the result."""
    n, channels, height, width = x.shape
    out = np.zeros((n, channels, height // r, width // r))
    for c in range(channels):
        image = (x[:, c].numpy() / 255 - float(mean[c].double())) / float(std[c].double())
        for i in range(height // r):
            for j in range(width // r):
                for a in range(r):
                    for b in range(r):
                        out[:, c, i, j] += image[:, i * r + a, j * r + b] / r**2
    return out.reshape(n, -1)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_downsample_averages_blocks_of_normalised_pixels(r):
    x = pixels(5, 3, 8, 12, seed=4)
    found = downsample(x, MEAN, STD, r)
    assert found.dtype == F64
    np.testing.assert_allclose(found.numpy(), normalised_rows(x, MEAN, STD, r), rtol=0, atol=1e-13)
    z = (x.double() / 255 - MEAN.double()[:, None, None]) / STD.double()[:, None, None]
    bilinear = F.interpolate(z, scale_factor=1 / r, mode="bilinear", align_corners=False).flatten(1)
    if r == 4:
        assert (found - bilinear).abs().max() > 0.1  # of the middle pixels alone
        same(found, F.interpolate(z, scale_factor=1 / r, mode="area").flatten(1))
    else:
        same(found, bilinear)


# ------------------------------------------------------------------------------------------------------------------ PCA


def orthonormal(rows):
    return (rows @ rows.T - torch.eye(len(rows), dtype=F64)).abs().max() < 1e-10


def equal_to_sklearn(found, rows, k):
    """Pca against scikit-learn's of rows (n, D), float64: all that do not belong to equal variances, to 1e-6."""
    wanted = PCA(k, svd_solver="full").fit(rows)
    rank = int((wanted.explained_variance_ > 1e-9 * wanted.explained_variance_[0]).sum())
    assert found.bases.shape == (k, rows.shape[1]) and found.bases.dtype == F64
    same(found.mean, wanted.mean_, 1e-9)
    same(found.variances, wanted.explained_variance_, 1e-6)
    np.testing.assert_allclose(found.variances[:rank].numpy(), wanted.explained_variance_[:rank], rtol=1e-6)
    assert (found.variances >= 0).all() and (found.variances.diff() <= 0).all()
    assert found.total == pytest.approx(rows.var(0, ddof=1).sum(), rel=1e-9)
    assert orthonormal(found.bases)
    for row in found.bases.tolist():
        assert max(row, key=abs) > 0
    scores, others = found.scores(torch.from_numpy(rows)).numpy(), wanted.transform(rows)
    signs = np.sign((found.bases.numpy() * wanted.components_).sum(1))[:rank]
    assert set(signs) <= {-1.0, 1.0}
    assert np.abs(scores[:, :rank] - others[:, :rank] * signs).max() <= 1e-6 * np.abs(others).max()
    assert np.abs(scores[:, rank:]).max(initial=0) <= 1e-6 * np.abs(others).max()
    back = scores @ found.bases.numpy() + found.mean.numpy()
    spread = ((rows - rows.mean(0)) ** 2).sum()
    error = ((rows - back) ** 2).sum() / spread
    assert error == pytest.approx(((rows - wanted.inverse_transform(others)) ** 2).sum() / spread, abs=1e-6)
    assert found.unexplained() == pytest.approx(error, abs=1e-6)
    return rank, error


@pytest.mark.parametrize("r, k, kept", [(1, 20, 0.85), (1, 64, 1), (2, 16, 1), (2, 5, 0.7), (4, 3, 0.8)])
def test_components_of_digits_equal_sklearns(r, k, kept):
    """At r = 1 three pixels are zero in every digit: k = 64 has directions without variance."""
    x = digits()
    rank, error = equal_to_sklearn(
        image_pca(x, MEAN[:1], STD[:1], r, k, CPU), normalised_rows(x, MEAN[:1], STD[:1], r), k
    )
    assert rank == (61 if k == 64 else k) and 1 - error >= kept - 1e-9


@pytest.mark.parametrize("r", [1, 2, 4])
def test_components_of_colour_images_equal_sklearns(r):
    """Channels of unlike std, so that a scale on the wrong channel shows."""
    x = draw(90, 3, 2, 2, seed=5).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = (40 * x + pixels(90, 3, 8, 8, seed=6) / 4 + 80).clamp(0, 255).byte()
    equal_to_sklearn(image_pca(x, MEAN, STD, r, 7, CPU), normalised_rows(x, MEAN, STD, r), 7)


def test_components_of_fewer_images_than_pixels():
    x = digits(10)
    for k in (6, 10):
        rank, error = equal_to_sklearn(
            image_pca(x, MEAN[:1], STD[:1], 1, k, CPU), normalised_rows(x, MEAN[:1], STD[:1], 1), k
        )
    assert rank == 9 and error < 1e-9
    all_of_them = image_pca(x, MEAN[:1], STD[:1], 1, 64, CPU)
    assert all_of_them.bases.shape == (64, 64) and orthonormal(all_of_them.bases)
    assert (all_of_them.variances >= 0).all() and all_of_them.variances[9:].max() < 1e-9 * all_of_them.variances[0]


@pytest.mark.parametrize("k", [4, 12])
def test_components_of_features_equal_sklearns(k):
    """float32 features far from zero, as after a ReLU; in any chunks."""
    f = (draw(203, 12, seed=7) @ draw(12, 12, seed=8)) * torch.linspace(0.1, 3, 12) + 50
    for chunk in (13, 4096):
        equal_to_sklearn(feature_pca(f, k, CPU, chunk=chunk), f.double().numpy(), k)


def test_scores_take_any_rows():
    found = feature_pca(draw(50, 6, seed=9), 2, CPU)
    new = draw(3, 6, seed=10)
    wanted = [
        [sum((float(new[i, t]) - float(found.mean[t])) * float(found.bases[j, t]) for t in range(6)) for j in range(2)]
        for i in range(3)
    ]
    same(found.scores(new), torch.tensor(wanted, dtype=F64))


def test_the_sign_makes_the_largest_entry_positive():
    rows = torch.tensor([[1.0, -3.0, 2.0], [3.0, -1.0, 2.0], [-1.0, -0.5, -0.2]])
    assert signed(rows).tolist() == [[-1.0, 3.0, -2.0], [3.0, -1.0, 2.0], [1.0, 0.5, pytest.approx(0.2)]]


def test_components_of_equal_images():
    x = pixels(1, 1, 4, 4, seed=1).expand(5, -1, -1, -1)
    found = image_pca(x, MEAN[:1], STD[:1], 2, 2, CPU)
    assert found.variances.max() == found.total == found.unexplained() == 0 and orthonormal(found.bases)
    np.testing.assert_allclose(found.mean.numpy(), normalised_rows(x, MEAN[:1], STD[:1], 2)[0], atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- randomised


def decaying(n=400, d=60, base=0.85):
    return draw(n, d, seed=11, dtype=F64) * base ** torch.arange(d) @ torch.linalg.qr(draw(d, d, seed=12, dtype=F64))[0]


def test_randomised_components_are_near_the_exact_ones():
    raw, k = decaying(), 6
    scale, offset = draw(60, seed=13, dtype=F64).abs() + 0.5, draw(60, seed=14, dtype=F64)
    rows = (raw * scale + offset).numpy()
    reads = []

    def chunks():
        reads.append(0)
        return iter((raw + 3).split(70))  # the rows' own mean must not matter

    found = randomised(chunks, k, scale, offset - 3 * scale)
    assert len(reads) == 8  # rounds + 2
    wanted = PCA(k, svd_solver="full").fit(rows)
    np.testing.assert_allclose(found.variances.numpy(), wanted.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(found.mean.numpy(), rows.mean(0), atol=1e-12)
    assert found.total == pytest.approx(rows.var(0, ddof=1).sum(), rel=1e-12)
    assert orthonormal(found.bases) and all(max(row, key=abs) > 0 for row in found.bases.tolist())
    projection = wanted.components_.T @ wanted.components_
    assert np.abs((found.bases.T @ found.bases).numpy() - projection).max() < 1e-5
    assert np.abs(np.abs((found.bases.numpy() * wanted.components_).sum(1)) - 1).max() < 1e-8  # each, not only the span


def test_more_rounds_and_spare_directions_come_nearer():
    raw, k = decaying(base=0.95), 6
    one, zero = torch.ones(60, dtype=F64), torch.zeros(60, dtype=F64)
    exact = PCA(k, svd_solver="full").fit(raw.numpy()).explained_variance_

    def error(rounds, spare):
        found = randomised(lambda: iter(raw.split(100)), k, one, zero, rounds, spare).variances.numpy()
        assert (found <= exact * (1 + 1e-12)).all()  # a subspace holds no more than the best
        return np.abs(found / exact - 1).max()

    assert error(0, 2) > 3 * error(2, 2) > 9 * error(6, 2) > 9 * error(6, 20) > 0
    assert error(6, 100) < 1e-12  # all directions


def test_randomised_is_repeatable_and_starts_from_its_own_generator():
    raw = decaying()
    one, zero = torch.ones(60, dtype=F64), torch.zeros(60, dtype=F64)
    torch.manual_seed(0)
    first = randomised(lambda: iter(raw.split(64)), 5, one, zero)
    state = torch.get_rng_state()
    second = randomised(lambda: iter(raw.split(64)), 5, one, zero)
    assert torch.equal(first.bases, second.bases) and torch.equal(first.variances, second.variances)
    assert first.total == second.total and torch.equal(state, torch.get_rng_state())


def test_only_above_large_is_it_randomised(monkeypatch):
    x, args = digits(600), (MEAN[:1], STD[:1], 1, 8, CPU)
    exact = image_pca(x, *args)
    monkeypatch.setattr(bases, "LARGE", 63)
    found = image_pca(x, *args)
    assert not torch.equal(found.bases, exact.bases)
    np.testing.assert_allclose(found.variances.numpy(), exact.variances.numpy(), rtol=1e-5)
    assert (found.bases.T @ found.bases - exact.bases.T @ exact.bases).abs().max() < 1e-2
    assert found.total == pytest.approx(exact.total, rel=1e-12)
    same(found.mean, exact.mean)
    monkeypatch.setattr(bases, "LARGE", 64)
    assert torch.equal(image_pca(x, *args).bases, exact.bases)
    features = decaying().float()
    monkeypatch.setattr(bases, "LARGE", 60)
    exact = feature_pca(features, 5, CPU)
    monkeypatch.setattr(bases, "LARGE", 59)
    np.testing.assert_allclose(feature_pca(features, 5, CPU).variances.numpy(), exact.variances.numpy(), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("side", [4, 5, 8])
@pytest.mark.parametrize("name", DIHEDRAL)
def test_views_that_move_pixels_equal_loops_bit_for_bit(name, side):
    x = draw(2, 3, side, side)
    found = view(x, name)
    for i in range(side):
        for j in range(side):
            a, b = DIHEDRAL[name](i, j, side)
            assert torch.equal(found[:, :, i, j], x[:, :, a, b])


@pytest.mark.parametrize("side", [4, 7, 32])
def test_rotations_equal_torchs_and_torchvisions_bit_for_bit(side):
    x = draw(2, 3, side, side)
    for turns, rotated in enumerate(with_views(x, VIEWS["rotations"]).chunk(4)):
        assert torch.equal(rotated, torch.rot90(x, turns, (2, 3)))
        assert torch.equal(rotated, tv.rotate(x, 90 * turns, tv.InterpolationMode.NEAREST))


def test_the_dihedral_group_has_eight_images_and_closes():
    x = draw(1, 1, 4, 4)
    images = [tuple(image.flatten().tolist()) for image in with_views(x, VIEWS["dihedral"])]
    assert len(set(images)) == len(images) == 8
    for name in VIEWS["dihedral"]:
        again = {tuple(image.flatten().tolist()) for image in with_views(view(x, name).contiguous(), VIEWS["dihedral"])}
        assert again == set(images)


@pytest.mark.parametrize("up", [2, 4])
def test_pixel_moves_commute_with_upsampling(up):
    x = draw(2, 3, 8, 8)
    for name in VIEWS["dihedral"]:
        after = view(F.interpolate(x, scale_factor=up, mode="bilinear", align_corners=False), name)
        before = F.interpolate(view(x, name), scale_factor=up, mode="bilinear", align_corners=False)
        assert (after - before).abs().max() < 1e-6


def bilinear(at, i, j, n, ratio):
    """The value at (i, j) of an image at(a, b) of n x n pixels, resized by 1 / ratio: half-pixel centres, clamped."""

    def ends(i):
        place = max((i + 0.5) * ratio - 0.5, 0)
        low = min(math.floor(place), n - 1)
        return low, min(low + 1, n - 1), place - low

    (a, a1, u), (b, b1, v) = ends(i), ends(j)
    top, bottom = at(a, b) * (1 - v) + at(a, b1) * v, at(a1, b) * (1 - v) + at(a1, b1) * v
    return top * (1 - u) + bottom * u


def naive_view(image, name):
    """A list of rows of a square image -> the same of its view."""
    n = len(image)
    if name in DIHEDRAL:
        places = [[DIHEDRAL[name](i, j, n) for j in range(n)] for i in range(n)]
        return [[image[a][b] for a, b in row] for row in places]
    if name in VIEWS["corners"]:
        small = min(n - 1, math.floor(n * 7 / 8))
        down = n - small if name.startswith("bottom") else 0
        right = n - small if name.endswith("right") else 0
        return [
            [bilinear(lambda a, b: image[down + a][right + b], i, j, small, small / n) for j in range(n)]
            for i in range(n)
        ]
    change = {"brighter": lambda v: v + 0.5, "darker": lambda v: v - 0.5, "flatter": lambda v: v / 2}[name]
    return [[change(value) for value in row] for row in image]


@pytest.mark.parametrize("side", [4, 8, 17])
@pytest.mark.parametrize("name", VIEWS["corners"] + VIEWS["tones"])
def test_corners_and_tones_equal_loops(name, side):
    x = draw(2, 2, side, side, dtype=F64)
    found = view(x, name)
    assert found.shape == x.shape
    for n in range(2):
        for c in range(2):
            same(found[n, c], torch.tensor(naive_view(x[n, c].tolist(), name), dtype=F64))


def test_a_crop_leaves_its_far_border_out():
    """And is never the whole image, at 4 px either (7/8 of it would be 3.5)."""
    for side, small in ((4, 3), (8, 7), (16, 14), (32, 28)):
        x = torch.zeros(1, 1, side, side)
        x[:, :, small:] = x[:, :, :, small:] = 1
        assert view(x, "top_left").abs().max() == 0
        x = torch.zeros(1, 1, side, side)
        x[:, :, : side - small] = x[:, :, :, : side - small] = 1
        assert view(x, "bottom_right").abs().max() == 0
        assert view(x, "top_left").max() > 0.9


@pytest.mark.parametrize("names", VIEWS.values(), ids=VIEWS)
def test_views_come_image_by_image_after_all_images(names):
    x = draw(3, 2, 4, 4, dtype=F64)
    before = x.clone()
    found = with_views(x, names)
    assert len(found) == 3 * (1 + len(names))
    assert torch.equal(found[:3], x) and torch.equal(x, before)
    for a, name in enumerate(names, 1):
        for n in range(3):
            for c in range(2):
                same(found[a * 3 + n, c], torch.tensor(naive_view(x[n, c].tolist(), name), dtype=F64))


def test_an_unknown_view_is_not_taken_for_another():
    with pytest.raises(ValueError):
        view(draw(1, 1, 4, 4), "rot45")


# ------------------------------------------------------------------------------------------------------------- decoding


def tensors_of(views, kind, dtype=torch.float32, seed=20):
    """Random tensors of a code: kind "stored" has c_v, "networks" w1, b1, w2, b2, "plain" neither."""
    shapes = dict(b_x=(U, C * S * S), c_x=(M, U), mu_x=(C * S * S,), b_y=(V, D), c_y=(M, V), mu_y=(D,))
    if kind == "stored":
        shapes |= dict(c_v=(views, M, V))
    if kind == "networks":
        shapes |= dict(w1=(views, H, V), b1=(views, H), w2=(views, V, H), b2=(views, V))
    return {key: draw(*shape, seed=seed + i, dtype=dtype) for i, (key, shape) in enumerate(shapes.items())}


def naive_decode(t, up, names, relu):
    """decode in loops over scalars of float64 tensors, differentiable."""
    images = []
    for k in range(M):
        image = []
        for c in range(C):

            def at(i, j, k=k, c=c):
                place = (c * S + i) * S + j
                return sum(t["c_x"][k, u] * t["b_x"][u, place] for u in range(U)) + t["mu_x"][place]

            low = [[at(i, j) for j in range(S)] for i in range(S)]
            side = range(S * up)
            image.append([[bilinear(lambda a, b, low=low: low[a][b], i, j, S, 1 / up) for j in side] for i in side])
        images.append(image)
    x, y = [], []
    for a in range(1 + len(names)):
        for k in range(M):
            x += [channel if a == 0 else naive_view(channel, names[a - 1]) for channel in images[k]]
            code = [t["c_y"][k, v] for v in range(V)]
            if a > 0 and "c_v" in t:
                code = [t["c_v"][a - 1, k, v] for v in range(V)]
            elif a > 0:
                hidden = []
                for h in range(H):
                    value = sum(t["w1"][a - 1, h, v] * t["c_y"][k, v] for v in range(V)) + t["b1"][a - 1, h]
                    hidden.append(value if not relu or value > 0 else 0 * value)
                code = [
                    code[v] + sum(t["w2"][a - 1, v, h] * hidden[h] for h in range(H)) + t["b2"][a - 1, v]
                    for v in range(V)
                ]
            y.append(torch.stack([sum(code[v] * t["b_y"][v, i] for v in range(V)) + t["mu_y"][i] for i in range(D)]))
    x = torch.stack([torch.stack([torch.stack(row) for row in channel]) for channel in x])
    return x.view(-1, C, S * up, S * up), torch.stack(y)


CASES = [
    ("plain", "none", 2, True), ("stored", "rotations", 1, True), ("networks", "rotations", 2, True),
    ("networks", "flips", 4, False), ("stored", "corners", 2, True), ("networks", "tones", 1, True),
]  # fmt: skip


@pytest.mark.parametrize("kind, views, up, relu", CASES)
def test_decoding_and_its_gradients_equal_loops(kind, views, up, relu):
    names = VIEWS[views]
    t = {key: value.requires_grad_() for key, value in tensors_of(len(names), kind, F64).items()}
    x, y = decode(t, (C, S, S), up, names, relu)
    wanted_x, wanted_y = naive_decode(t, up, names, relu)
    assert x.shape == ((1 + len(names)) * M, C, up * S, up * S)
    same(x.detach(), wanted_x.detach())
    same(y.detach(), wanted_y.detach())
    weight_x, weight_y = draw(*x.shape, seed=50, dtype=F64), draw(*y.shape, seed=51, dtype=F64)

    def gradients(x, y):
        value = (weight_x * (x + 0.1 * x**2)).sum() + (weight_y * (y + 0.1 * y**2)).sum()
        return dict(zip(t, torch.autograd.grad(value, list(t.values())), strict=True))

    found, wanted = gradients(x, y), gradients(wanted_x, wanted_y)
    for key, grad in found.items():
        same(grad, wanted[key], 1e-10)
        parts = grad if key in ("c_v", "w1", "b1", "w2", "b2") else [grad]  # of every view
        assert all(part.abs().max() > 1e-3 for part in parts), key


def test_both_sides_of_the_relu_are_met_above():
    t = tensors_of(3, "networks", F64)
    hidden = torch.einsum("kv,ahv->akh", t["c_y"], t["w1"]) + t["b1"][:, None]
    assert (hidden > 0.1).any() and (hidden < -0.1).any()
    weights = [t[key] for key in ("w1", "b1", "w2", "b2")]
    assert (shift(t["c_y"], *weights, True) - shift(t["c_y"], *weights, False)).abs().max() > 0.1


@pytest.mark.parametrize("kind, views, up, relu", CASES[1:4])
def test_gradcheck_of_decode(kind, views, up, relu):
    t = {key: value.requires_grad_() for key, value in tensors_of(len(VIEWS[views]), kind, F64).items()}
    torch.autograd.gradcheck(
        lambda *values: decode(dict(zip(t, values, strict=True)), (C, S, S), up, VIEWS[views], relu),
        tuple(t.values()),
        fast_mode=True,
    )


def test_a_code_decodes_its_rounded_coefficients():
    for kind, relu in (("stored", True), ("networks", False), ("networks", True)):
        tensors = tensors_of(3, kind)
        for dtype in ("fp32", "fp16", "int8"):
            code = Code(quantised(tensors, dtype), (C, S, S), 2, VIEWS["rotations"], relu)
            exact = {key: value.double() for key, value in code.tensors.items() if not key.endswith("_scale")}
            for key in ("c_x", "c_y", "c_v"):
                if f"{key}_scale" in code.tensors:
                    exact[key] *= code.tensors[f"{key}_scale"].double()[..., None, :]
            for found, wanted in zip(code.decode(), naive_decode(exact, 2, VIEWS["rotations"], relu), strict=True):
                assert found.dtype == torch.float32
                same(found.double(), wanted, 1e-6)


# -------------------------------------------------------------------------------------------------------------- storage

FLOATS = {"plain": 123, "stored": 123 + 18, "networks": 123 + 3 * (6 + 3 + 6 + 2)}  # 72 + 12 + 18 + 10 + 6 + 5
SCALES = {"plain": 4 + 2, "stored": 4 + 2 + 3 * 2, "networks": 4 + 2}
COEFFICIENTS = {"plain": 12 + 6, "stored": 12 + 6 + 18, "networks": 12 + 6}


@pytest.mark.parametrize("kind", FLOATS)
def test_storage_equals_a_count_by_hand(kind):
    for dtype, size in (("fp32", 4), ("fp16", 2), ("int8", 1)):
        tensors = quantised(tensors_of(3, kind), dtype)
        scales = SCALES[kind] if dtype == "int8" else 0
        found = storage(tensors, (C, 6, 6), D)
        floats = FLOATS[kind] + scales
        assert found == dict(
            floats=floats,
            bytes=4 * (FLOATS[kind] - COEFFICIENTS[kind] + scales) + size * COEFFICIENTS[kind],
            pairs=floats / (2 * 36 + 5),
            pixels=floats / 72,
        )
        beside = storage(tensors | dict(mean=MEAN[:C], std=STD[:C]), (C, 6, 6), D)
        assert beside == found | dict(bytes=found["bytes"] + 16)


# ------------------------------------------------------------------------------------------------------------- rounding


def test_fp32_changes_no_bit_and_only_coefficients_are_rounded():
    tensors = tensors_of(3, "stored") | tensors_of(3, "networks")
    given = {key: value.clone().requires_grad_() for key, value in tensors.items()}
    for dtype in ("fp32", "fp16", "int8"):
        found = quantised(given, dtype)
        for key, value in tensors.items():
            kept = dtype == "fp32" or key not in ("c_x", "c_y", "c_v")
            assert not found[key].requires_grad and found[key].shape == value.shape
            assert (
                found[key].dtype
                == dict(fp32=torch.float32, fp16=torch.float16, int8=torch.int8)["fp32" if kept else dtype]
            )
            if kept:
                assert torch.equal(found[key], value)
        scales = {key for key in found if key not in tensors}
        assert scales == ({"c_x_scale", "c_y_scale", "c_v_scale"} if dtype == "int8" else set())
        back = dequantised(found)
        assert back.keys() == tensors.keys() and all(value.dtype == torch.float32 for value in back.values())
        assert all(torch.equal(given[key], tensors[key]) for key in tensors)
        again = dequantised(found)  # nothing that was given is scaled in place
        assert all(torch.equal(again[key], back[key]) for key in back)
    assert all(torch.equal(dequantised(quantised(given, "fp32"))[key], tensors[key]) for key in tensors)


def test_int8_errs_by_half_a_scale_of_its_column():
    sizes = torch.tensor([1e-3, 1.0, 50.0, 3e4])
    tensors = dict(c_x=draw(40, 4, seed=60) * sizes, c_y=draw(40, 4, seed=61), c_v=draw(3, 40, 4, seed=62) * sizes)
    tensors["c_v"] *= torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    found = quantised(tensors, "int8")
    back = dequantised(found)
    assert found["c_x_scale"].shape == (4,) and found["c_v_scale"].shape == (3, 4)
    for key, value in tensors.items():
        columns = [(index, value[index]) for index in np.ndindex(value.shape[:-2])]
        for index, matrix in columns:
            for column in range(4):
                given = matrix[:, column].double()
                scale = float(given.abs().max()) / 127
                assert float(found[f"{key}_scale"][index][column]) == pytest.approx(scale, rel=1e-6)
                stored = found[key][index][:, column]
                assert stored.abs().max() == 127  # all the range is used
                assert stored.tolist() == [round(float(v) / scale) for v in given]
                assert (back[key][index][:, column].double() - given).abs().max() <= scale * 0.5001


def test_int8_of_a_zero_column_and_of_tiny_numbers():
    c_x = torch.stack([torch.zeros(5), torch.full((5,), 1e-20), draw(5)], 1)
    found = quantised(dict(c_x=c_x), "int8")
    assert found["c_x"][:, 0].abs().max() == 0 and found["c_x_scale"][0] > 0
    back = dequantised(found)["c_x"]
    assert back.isfinite().all() and torch.equal(back[:, 0], c_x[:, 0])
    torch.testing.assert_close(back[:, 1], c_x[:, 1], rtol=1e-6, atol=0)


def test_fp16_rounds_to_the_nearest_and_refuses_what_it_cannot_hold():
    c_x = draw(200, 4, seed=63) * torch.tensor([1e-2, 1.0, 100.0, 1e4])
    c_x = torch.where(c_x.abs() < 1e-4, 1e-4, c_x)  # below 6e-5 its steps are of equal size
    found = quantised(dict(c_x=c_x), "fp16")
    assert torch.equal(found["c_x"], torch.from_numpy(c_x.numpy().astype(np.float16)))
    back = dequantised(found)["c_x"]
    assert ((back - c_x).abs() <= c_x.abs() * 2**-11).all() and not torch.equal(back, c_x)
    for key in ("c_x", "c_y", "c_v"):
        tensors = tensors_of(3, "stored")
        tensors[key][..., -1, 0] = -65504.0
        assert quantised(tensors, "fp16")[key].min() == -65504
        tensors[key][..., -1, 0] = -7e4
        refuse(lambda tensors=tensors: quantised(tensors, "fp16"), "--coefficients fp16", "70000", "fp32")
        assert quantised(tensors, "int8")[key].min() == -127
        for value in (math.nan, math.inf, -math.inf):
            tensors[key][..., -1, 0] = value
            for dtype in ("fp16", "int8"):
                refuse(
                    lambda tensors=tensors, dtype=dtype: quantised(tensors, dtype), f"--coefficients {dtype}", "fp32"
                )
    tensors = tensors_of(3, "stored")
    tensors["b_x"][0, 0] = 1e6  # bases stay float32
    assert quantised(tensors, "fp16")["b_x"][0, 0] == 1e6


# ------------------------------------------------------------------------------------------------------------- the file


def written(path, kind="networks", dtype="int8", views="rotations", relu=True, **changes):
    code = Code(quantised(tensors_of(len(VIEWS[views]), kind), dtype), (C, S, S), 2, VIEWS[views], relu)
    save_distilled(path, None, None, MEAN[:C], STD[:C], **FACTS, code=code, **changes)
    return code


def header_of(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return length, json.loads(raw[8 : 8 + length])


@pytest.mark.parametrize("kind", ["plain", "stored", "networks"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_the_file_is_as_large_as_it_says(kind, dtype, tmp_path):
    path = tmp_path / "distilled.safetensors"
    code = written(path, kind, dtype, "none" if kind == "plain" else "rotations")
    length, header = header_of(path)
    size = storage(code.tensors | dict(mean=MEAN[:C], std=STD[:C]), (C, 6, 6), D)["bytes"]
    assert path.stat().st_size == size + 8 + length
    facts = header.pop("__metadata__")
    assert json.loads(facts["storage_bytes"]) == size and json.loads(facts["zca_bytes"]) == 0
    assert json.loads(facts["num_images"]) == M and json.loads(facts["channels"]) == C
    assert header.keys() == code.tensors.keys() | {"mean", "std"}
    spans = sorted(entry["data_offsets"] for entry in header.values())  # numbers from end to end, so no pickle
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])] and spans[-1][1] == size
    kinds = {"fp32": "F32", "fp16": "F16", "int8": "I8"}
    for key, entry in header.items():
        assert entry["dtype"] == (kinds[dtype] if key in ("c_x", "c_y", "c_v") else "F32")


@pytest.mark.parametrize(
    "kind, views, relu",
    [("plain", "none", 1), ("stored", "corners", 1), ("networks", "rotations", 1), ("networks", "tones", 0)],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_a_loaded_code_is_the_saved_one_decoded(kind, views, relu, dtype, tmp_path, monkeypatch):
    path = tmp_path / "distilled.safetensors"
    code = written(path, kind, dtype, views, bool(relu), extra={"budget": {"images": 3}})
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", None)
    loaded = load_distilled(path, "boost_pca")
    x, y = code.decode()
    assert len(x) == len(y) == M * (1 + len(VIEWS[views]))
    assert torch.equal(loaded.y, y) and loaded.y.dtype == torch.float32
    assert torch.equal(loaded.x, denormalise(x, MEAN[:C], STD[:C]))
    same(loaded.inputs(), x, 1e-6)
    assert loaded.code.facts() == code.facts()
    assert loaded.code.facts() == dict(shape=[C, S, S], up=2, views=list(VIEWS[views]), relu=relu)
    assert loaded.code.tensors.keys() == code.tensors.keys()
    for key, value in code.tensors.items():
        assert torch.equal(loaded.code.tensors[key], value) and loaded.code.tensors[key].dtype == value.dtype
    assert torch.equal(loaded.mean, MEAN[:C]) and torch.equal(loaded.std, STD[:C]) and loaded.zca is None
    assert loaded.meta["budget"] == {"images": 3} and "code" not in loaded.meta
    assert (loaded.recipe, loaded.step, loaded.channels, loaded.size) == ({"epochs": 5}, 7, C, 2 * S)
    assert dict(loaded.dataset())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("relu", [True, False])
def test_the_file_decodes_without_this_project(dtype, relu, tmp_path):
    path = tmp_path / "distilled.safetensors"
    written(path, "networks", dtype, "rotations", relu)

    t, code = load_file(path), json.loads(safe_open(path, "pt").metadata()["code"])
    for key in ("c_x", "c_y"):
        t[key] = t[key].float() * t.get(f"{key}_scale", torch.tensor(1.0))
    x = (t["c_x"] @ t["b_x"] + t["mu_x"]).unflatten(1, code["shape"])
    x = F.interpolate(x, scale_factor=code["up"], mode="bilinear")
    x = torch.cat([torch.rot90(x, turns, (2, 3)) for turns in range(4)])
    hidden = t["c_y"] @ t["w1"].mT + t["b1"][:, None]
    hidden = hidden.relu() if code["relu"] else hidden
    shifted = t["c_y"] + hidden @ t["w2"].mT + t["b2"][:, None]
    y = torch.cat([t["c_y"][None], shifted]).flatten(0, 1) @ t["b_y"] + t["mu_y"]

    loaded = load_distilled(path)
    same(loaded.inputs(), x, 1e-6)
    same(loaded.y, y, 1e-6)


def test_extra_metadata_may_not_take_the_codes_name(tmp_path):
    with pytest.raises(ValueError, match="code"):
        written(tmp_path / "distilled.safetensors", extra={"code": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_a_truncated_file_is_refused(dtype, tmp_path):
    path = tmp_path / "distilled.safetensors"
    written(path, dtype=dtype)
    raw = path.read_bytes()
    for length in (0, 7, 8, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        refuse(lambda: load_distilled(path), str(path), "not a readable distilled set")


def damage(path, leave=(), code=None, **changes):
    """Rewrite the file without some tensors, with other ones, or with another "code" in its metadata."""
    facts = safe_open(path, "pt").metadata()
    tensors = {key: value for key, value in (load_file(path) | changes).items() if key not in leave}
    if code is not None:
        facts["code"] = code
    save_file(tensors, path, metadata={key: value for key, value in facts.items() if value != ""})


LACKING = ["b_x", "c_x", "mu_x", "b_y", "c_y", "mu_y", "mean", "std", "c_x_scale", "c_y_scale"]


@pytest.mark.parametrize(
    "kind, key",
    [("networks", key) for key in (*LACKING, "w1", "b1", "w2", "b2")] + [("stored", "c_v"), ("stored", "c_v_scale")],
)
def test_a_file_without_one_of_its_tensors_is_refused(kind, key, tmp_path):
    path = tmp_path / "distilled.safetensors"
    written(path, kind)
    damage(path, leave=(key,))
    refuse(lambda: load_distilled(path), str(path))


FACTS_OF_CODE = dict(shape=[C, S, S], up=2, views=list(VIEWS["rotations"]), relu=True)


@pytest.mark.parametrize("kind", ["networks", "stored"])
@pytest.mark.parametrize(
    "code",
    ["", "nonsense", "[1]", "{}", "null"]
    + [
        json.dumps(FACTS_OF_CODE | change)
        for change in (
            dict(shape=[C, S + 1, S + 1]), dict(shape=3), dict(up="2"), dict(views=["rot90", "rot180", "rot45"]),
            dict(views=["rot90"]), dict(views=[]), dict(other=1),
        )
    ],
)  # fmt: skip
def test_a_file_whose_metadata_do_not_fit_is_refused(kind, code, tmp_path):
    path = tmp_path / "distilled.safetensors"
    written(path, kind)
    damage(path, code=code)
    refuse(lambda: load_distilled(path), str(path))


def test_a_file_whose_tensors_do_not_fit_is_refused(tmp_path):
    path = tmp_path / "distilled.safetensors"
    for key, value in dict(b_x=draw(U + 1, C * S * S), b_y=draw(V + 1, D), mu_y=draw(D + 2)).items():
        written(path)
        damage(path, **{key: value})
        refuse(lambda: load_distilled(path), str(path))


def test_a_damaged_set_without_bases_is_refused_too(tmp_path):
    path = tmp_path / "distilled.safetensors"
    for key in ("x", "y", "mean", "std"):
        save_distilled(path, draw(4, C, 6, 6), draw(4, D), MEAN[:C], STD[:C], **FACTS)
        load_distilled(path)
        damage(path, leave=(key,))
        refuse(lambda: load_distilled(path), str(path))


def test_a_code_is_not_whitened(tmp_path):
    size = C * (2 * S) ** 2
    zca = Zca(matrix=torch.eye(size) * 2, inverse=torch.eye(size) / 2, mean=draw(C, 2 * S, 2 * S))
    with pytest.raises(ValueError, match="whitened"):
        written(tmp_path / "distilled.safetensors", zca=zca)
    assert not list(tmp_path.iterdir())


def test_pretraining_on_a_code_is_pretraining_on_its_pairs(tmp_path):
    code = written(tmp_path / "code.safetensors", "stored")
    x, y = code.decode()
    save_distilled(tmp_path / "pairs.safetensors", denormalise(x, MEAN[:C], STD[:C]), y, MEAN[:C], STD[:C], **FACTS)
    ends = []
    for name in ("code", "pairs"):
        distilled = load_distilled(tmp_path / f"{name}.safetensors")
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(C, 4, 3), nn.ReLU(), nn.Flatten())
        whole = nn.Sequential(net, nn.Linear(4 * 16, D))
        state = {key: value.clone() for key, value in whole.state_dict().items()}
        losses = [
            fit_pairs(whole, distilled.inputs(), distilled.y, 0, steps=steps, batch=5, lr=0.01) for steps in (1, 60)
        ]
        assert losses[1] < 0.5 * losses[0]
        whole.load_state_dict(state)
        head = pretrain(net, distilled, epochs=4, batch=5, lr=0.01)
        assert not torch.equal(net[0].weight, state["0.0.weight"])
        ends.append([*losses, *net.state_dict().values(), *head.state_dict().values()])
    assert ends[0][:2] == ends[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][2:], ends[1][2:], strict=True))


def test_bases_of_real_images_decode_near_them(tmp_path):
    """Digits at half their side, all components: a loaded code is the images, averaged and resized."""
    x = digits(40)
    mean, std = torch.tensor([0.3]), torch.tensor([0.35])
    found = image_pca(x, mean, std, 2, 16, CPU)
    features = feature_pca(draw(40, 4, seed=70), 4, CPU)
    code = Code(
        dict(
            b_x=found.bases, mu_x=found.mean, c_x=found.scores(downsample(x, mean, std, 2)),
            b_y=features.bases, mu_y=features.mean, c_y=features.scores(draw(40, 4, seed=70)),
        ), (1, 4, 4), 2, (),
    )  # fmt: skip
    code.tensors = quantised(code.tensors, "fp32")
    save_distilled(tmp_path / "code.safetensors", None, None, mean, std, **FACTS, code=code)
    loaded = load_distilled(tmp_path / "code.safetensors")
    small = F.avg_pool2d(normalise(x, mean, std), 2)
    same(loaded.inputs(), F.interpolate(small, scale_factor=2, mode="bilinear"), 1e-5)
    same(loaded.y, draw(40, 4, seed=70), 1e-5)


# ------------------------------------------------------------------------------------------------------------- medoids


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("n", [2, 12, 40])
def test_medoids_are_the_nearest_to_their_centres(n, offset):
    """Of those not yet taken, in loops. The two images of a cluster of two are equally near, up to a rounding."""
    features = draw(150, 6, seed=80) + offset
    before = features.clone()
    found = kmeans_medoids(features, n, 0, 5)
    assert found.dtype == torch.int64 and found.shape == (n,) and torch.equal(features, before)
    rows = features.double() - features.double().mean(0)
    model = KMeans(n, n_init=1, random_state=seed_of("kmeans", 0, 5) % 2**32).fit(rows.float().numpy())
    taken = []
    for index, centre in zip(found.tolist(), model.cluster_centers_.tolist(), strict=True):
        distances = [sum((a - b) ** 2 for a, b in zip(row, centre, strict=True)) for row in rows.tolist()]
        assert index not in taken
        assert distances[index] <= min(d for i, d in enumerate(distances) if i not in taken) * (1 + 1e-5)
        taken.append(index)


@pytest.mark.parametrize("offset", [0, 1000, 1e6])
def test_medoids_of_clusters_apart_are_their_middles(offset):
    """Also where features are far from zero: the clusters are 140 apart, their images 2."""
    features = draw(240, 4, seed=83) + 100 * torch.eye(4).repeat_interleave(60, 0) + offset
    wanted = []
    for cluster in features.double().split(60):
        distances = (cluster - cluster.mean(0)).square().sum(1)
        assert distances.sort().values.diff()[0] > 1e-3  # no tie
        wanted.append(int(distances.argmin()) + 60 * len(wanted))
    assert sorted(kmeans_medoids(features, 4, 0).tolist()) == wanted


def test_medoids_are_keyed():
    features = draw(150, 6, seed=81)
    np.random.seed(0)
    first = kmeans_medoids(features, 10, 0, 1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first, kmeans_medoids(features, 10, 0, 1))
    others = [kmeans_medoids(features, 10, *key) for key in ((0, 2), (1, 1), (0,), (1, 0))]
    sets = {tuple(sorted(index.tolist())) for index in (first, *others)}
    assert len(sets) == 5


def test_medoids_at_the_ends():
    features = draw(40, 6, seed=82)
    assert sorted(kmeans_medoids(features, 40, 0).tolist()) == list(range(40))
    (one,) = kmeans_medoids(features, 1, 0).tolist()
    distances = [float((row - features.mean(0)).square().sum()) for row in features]
    assert one == distances.index(min(distances))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("n", [5, 8, 20])
def test_medoids_of_repeated_images_are_distinct(n):
    features = draw(5, 3, seed=84).repeat(4, 1)
    found = kmeans_medoids(features, n, 0).tolist()
    assert len(set(found)) == n and set(found) <= set(range(20))
    assert {i % 5 for i in found} == {0, 1, 2, 3, 4}
