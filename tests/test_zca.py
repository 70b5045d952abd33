"""Whitening (common/data.py: Zca, fit_zca, Inputs) against naive float64 numpy; in a saved set: test_artefact.py."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import refuse
from safetensors.torch import load_file, save_file

import common.data
from common.data import Data, Inputs, Zca, fit_zca, from_phases, load, normalise, to_phases, zca_stride

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.3, 0.2])
U = 2**-24  # float32's unit roundoff


def images(n, channels=3, size=4, key=0):
    """uint8 (n, C, S, S) whose neighbours are alike, as in photographs: their covariance is far from diagonal."""
    noise = np.random.default_rng(key).normal(size=(n, channels, size + 1, size + 1))
    smooth = noise + 0.9 * noise[:, :1] + 0.5 * noise.mean((1, 2, 3), keepdims=True)
    smooth = smooth[..., 1:, 1:] + 0.7 * smooth[..., :-1, 1:] + 0.6 * smooth[..., 1:, :-1]
    return torch.tensor(np.clip(120 + 40 * smooth, 0, 255).astype(np.uint8))


def data_of(x, content="c" * 64):
    c = x.shape[1]
    return Data("set", x, None, x[:2], None, [], MEAN[:c], STD[:c], "none", content, True)


def phases_of(image, stride):
    """The rows of one image (C, H, W), by slices."""
    return [image[:, i::stride, j::stride].reshape(-1) for i in range(stride) for j in range(stride)]


def naive(data, stride, reg=0.1):
    """(mean, matrix, inverse, covariance before the regularisation) in float64, by the loops of the definition."""
    mean, std = (value.double().view(-1, 1, 1).numpy() for value in (data.mean, data.std))
    z = (np.float64(data.x_train) / 255 - mean) / std
    mu = z.mean(0)
    dim = mu.size // stride**2
    covariance = np.zeros((dim, dim))
    for p in range(stride**2):
        of_phase = np.zeros((dim, dim))
        for image in z:
            row = phases_of(image - mu, stride)[p]
            of_phase += np.outer(row, row)
        covariance += of_phase / len(z) / stride**2
    u, s, _ = np.linalg.svd(covariance + reg * np.trace(covariance) / dim * np.eye(dim))  # descending
    powers = [np.where(np.arange(dim) < len(z), s**power, 1.0) for power in (-0.5, 0.5)]
    return mu, *((u * power) @ u.T for power in powers), covariance


def assert_rounded(value, exact):
    """float32 of a float64 result: half a unit of the last place, and float64's own noise."""
    assert value.dtype == torch.float32 and value.shape == exact.shape
    error = np.abs(np.float64(value) - exact)
    assert (error <= U * np.abs(exact) + 1e-11 * np.abs(exact).max()).all(), error.max()


@pytest.fixture
def small_phases(monkeypatch):
    """The checkerboard from 5 px on."""
    monkeypatch.setattr(common.data, "PHASE_SIZE", 4)


@pytest.fixture
def fit(tmp_path):
    return lambda data, **options: fit_zca(data, tmp_path, **options)


# --------------------------------------------------------------------------------------------------------------- phases


def test_stride():
    strides = {8: 1, 28: 1, 32: 1, 64: 1, 66: 2, 96: 2, 128: 2, 129: 3, 192: 3, 224: 4, 256: 4}
    assert {size: zca_stride(size) for size in strides} == strides
    refuse(lambda: zca_stride(65), "65 px", "2 x 2", "--size 64", "--no-zca")
    refuse(lambda: zca_stride(130), "130 px", "3 x 3", "--size 129", "--no-zca")


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_phases_are_interleaved_sub_images(stride):
    x = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6)
    phases = to_phases(x, stride)
    assert phases.tolist() == [[row.tolist() for row in phases_of(image, stride)] for image in x]
    assert torch.equal(from_phases(phases, x.shape), x)


# ------------------------------------------------------------------------------------------------------------------ fit


@pytest.mark.parametrize(("channels", "size", "stride"), [(3, 4, 1), (1, 4, 1), (3, 6, 2), (2, 8, 2), (1, 9, 3)])
@pytest.mark.parametrize("reg", [0.1, 0.003])
def test_fit_is_the_definition(fit, small_phases, channels, size, stride, reg):
    data = data_of(images(60, channels, size))
    zca, (mu, matrix, inverse, _) = fit(data, reg=reg), naive(data, stride, reg)
    assert_rounded(zca.mean, mu)
    assert_rounded(zca.matrix, matrix)
    assert_rounded(zca.inverse, inverse)
    assert torch.equal(zca.matrix, zca.matrix.T) and torch.equal(zca.inverse, zca.inverse.T)


def test_the_regularisation_is_a_tenth_of_the_mean_variance(fit):
    data = data_of(images(100))
    assert torch.equal(fit(data).matrix, fit(data, reg=0.1).matrix)
    variances = np.linalg.eigvalsh(naive(data, 1)[3])
    expected = (variances + 0.1 * variances.mean()) ** -0.5
    np.testing.assert_allclose(np.linalg.eigvalsh(np.float64(fit(data).matrix)), expected[::-1], rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_whitened_images_have_the_expected_covariance(fit, small_phases, stride):
    """Identity but for the regularisation: of a direction of variance v there remains v / (v + 0.1 mean v)."""
    data = data_of(images(300, size=4 * stride))
    zca, (*_, covariance) = fit(data), naive(data, stride)
    white = zca.whiten(normalise(data.x_train, MEAN, STD))
    assert white.shape == data.x_train.shape and white.dtype == torch.float32
    white = np.float64(white)
    assert np.abs(white.mean(0)).max() < 1e-5
    rows = np.array([phases_of(image, stride) for image in white])  # (N, phases, D)
    v, u = np.linalg.eigh(covariance)
    expected = (u * (v / (v + 0.1 * v.mean()))) @ u.T
    np.testing.assert_allclose(np.einsum("npi,npj->ij", rows, rows) / len(rows) / stride**2, expected, atol=1e-5)
    white = np.float64(fit(data, reg=1e-6).whiten(normalise(data.x_train, MEAN, STD)))
    rows = np.array([phases_of(image, stride) for image in white])
    covariance = np.einsum("npi,npj->ij", rows, rows) / len(rows) / stride**2
    np.testing.assert_allclose(covariance, np.eye(48), atol=1e-4)


def test_fewer_images_than_dimensions(fit):
    """The last D - n of s^-1/2 and s^1/2 are 1. The n-th direction is any of those without variance, as the mean takes
    one, so only values and what the images themselves become are defined."""
    data = data_of(images(30))
    zca, (mu, matrix, inverse, covariance) = fit(data), naive(data, 1)
    floor = 0.1 * np.trace(covariance) / 48
    s = np.append(np.linalg.eigvalsh(covariance)[-29:] + floor, [floor] + 18 * [1.0])
    for value, power in ((zca.matrix, -0.5), (zca.inverse, 0.5)):
        np.testing.assert_allclose(np.linalg.eigvalsh(np.float64(value)), np.sort(s**power), rtol=1e-5)
    x = normalise(data.x_train, MEAN, STD)
    rows = np.float64(x).reshape(30, -1) - mu.reshape(-1)
    np.testing.assert_allclose(zca.whiten(x).flatten(1), rows @ matrix, atol=1e-4)
    np.testing.assert_allclose((x - zca.mean).flatten(1) @ zca.inverse, rows @ inverse, atol=1e-4)


@pytest.mark.parametrize("n", [20, 47, 48])
def test_the_guard_counts_images_though_each_has_many_phases(fit, small_phases, n):
    """As Imagenette at 128 px: 9469 images, 12288 dimensions and four times as many rows."""
    data = data_of(images(n, size=8))
    zca, (mu, matrix, inverse, _) = fit(data), naive(data, 2)
    assert_rounded(zca.mean, mu)
    assert_rounded(zca.matrix, matrix)
    assert_rounded(zca.inverse, inverse)
    ones = (np.abs(np.linalg.eigvalsh(np.float64(zca.matrix)) - 1) < 1e-6).sum()
    assert ones == 48 - n


@pytest.mark.parametrize("stride", [1, 2])
def test_sums_do_not_depend_on_the_chunks(monkeypatch, stride):
    """Bit for bit, of pixels whose products are as large as they can be; and they are the sums of integers."""
    bright = np.random.default_rng(0).random((5000, 1, 1, 1)) < 0.3
    x = torch.tensor(np.where(bright, 255, images(5000, 3, 2 * stride) // 128).astype(np.uint8))
    results = []
    for rows in (common.data.EXACT_ROWS, 37, 999):
        monkeypatch.setattr(common.data, "EXACT_ROWS", rows)
        results.append(common.data._moments(data_of(x), stride))
    for mean, covariance in results[1:]:
        assert torch.equal(mean, results[0][0]) and torch.equal(covariance, results[0][1])
    exact = 0
    for pixels in to_phases(x, stride).long().numpy().swapaxes(0, 1):  # integers below 2^53
        exact += (5000 * (pixels.T @ pixels) - np.outer(pixels.sum(0), pixels.sum(0))) / 5000**2 / stride**2
    scale = np.repeat(1 / (255 * np.float64(STD)), 4)
    np.testing.assert_allclose(results[0][1], exact * np.outer(scale, scale), rtol=1e-12, atol=1e-13)


def test_a_memory_mapped_set_is_fitted_alike(fit, tmp_path):
    data = data_of(images(50))
    path = tmp_path / "x.u8"
    path.write_bytes(data.x_train.numpy().tobytes())
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "c", shape=(50, 3, 4, 4)))
    zca, of_map = fit(data), fit(data_of(mapped, "d" * 64))
    assert all(torch.equal(value, vars(of_map)[key]) for key, value in vars(zca).items())


def test_what_cannot_be_whitened_is_refused(fit, small_phases):
    refuse(lambda: fit(data_of(images(9, size=5))), "5 px", "--size 4", "--no-zca")
    refuse(lambda: fit(data_of(images(1).expand(60, -1, -1, -1))), "60 training images differ too little", "--no-zca")
    flat = images(60)
    flat[:, 1, 2, 2] = 7  # one pixel never changes: no variance but by the regularisation
    assert fit(data_of(flat)).matrix.isfinite().all()
    for key in range(5):  # what is left of a variance of zero is noise of either sign
        few = data_of(images(30, key=key))
        refuse(lambda few=few: fit(few, reg=0), "30 training images", "regularisation 0", "--no-zca")


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def fits(monkeypatch):
    """A list that grows with every fit."""
    done, moments = [], common.data._moments
    monkeypatch.setattr(common.data, "_moments", lambda *args: done.append(args) or moments(*args))
    return done


def test_fitted_once_and_says_so(fit, fits, tmp_path, capsys):
    data = data_of(images(60))
    first = fit(data)
    (path,) = (tmp_path / "cache").iterdir()  # no temporary file either
    line = capsys.readouterr().out
    assert line.startswith("data: whitening of 48 dimensions fitted once in ") and line.endswith(f" s into {path}\n")
    again = fit(data)
    assert len(fits) == 1 and capsys.readouterr().out == ""
    for key, value in vars(first).items():
        assert torch.equal(vars(again)[key], value) and vars(again)[key].dtype == torch.float32
    assert load_file(path).keys() == {"mean", "matrix", "inverse"}


def test_the_key_covers_what_changes_the_result(fit, tmp_path, fits, monkeypatch):
    data = data_of(images(60))
    fit(data)
    for changes in ({"content": "d" * 64}, {"mean": MEAN + 0.1}, {"std": STD * 2}, {"x_train": images(60, size=5)}):
        fit(dataclasses.replace(data, **changes))
    fit(data, reg=0.2)
    monkeypatch.setattr(common.data, "ZCA_VERSION", -1)
    fit(data)
    assert len(fits) == len(list((tmp_path / "cache").iterdir())) == 7
    fit(dataclasses.replace(data, name="other", x_test=data.x_test[:1], class_names=["a"]))
    assert len(fits) == 7


def test_a_damaged_cache_is_fitted_again(fit, fits, tmp_path, capsys):
    data = data_of(images(60))
    zca = fit(data)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()

    def other_tensors():
        save_file({"weights": zca.mean}, path)

    def other_shape():
        save_file(vars(zca) | {"inverse": zca.inverse[:5].clone()}, path)

    def written(content):
        return lambda: path.write_bytes(content)

    damages = [written(whole[:-1]), written(whole[:20]), written(b""), written(b"<html>"), other_tensors, other_shape]
    for count, damage in enumerate(damages, 2):
        damage()
        capsys.readouterr()
        again = fit(data)
        assert len(fits) == count and torch.equal(again.matrix, zca.matrix)
        first, second = capsys.readouterr().out.splitlines()
        assert f"{path} cannot be read" in first and "fitted once" in second
        assert path.read_bytes() == whole


def test_a_place_that_cannot_be_written_costs_a_fit_in_every_run(fits, tmp_path, capsys):
    (tmp_path / "file").touch()
    data = data_of(images(60))
    one, two = (fit_zca(data, tmp_path / "file") for _ in range(2))
    assert len(fits) == 2 and torch.equal(one.matrix, two.matrix)
    assert capsys.readouterr().out.count("cannot be written: every run fits it anew") == 2


def test_a_full_disk_is_one_line(fit, monkeypatch, tmp_path):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.data, "save_file", full)
    refuse(lambda: fit(data_of(images(60))), "could not write", "No space left")
    assert list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("stride", [1, 2])
def test_whiten_and_undo_are_the_definition(fit, small_phases, stride):
    """In float64 from the float32 tensors. The rounding of a sum of 48 is a walk of 48 steps; four times that."""
    zca = fit(data_of(images(60, size=4 * stride)))
    x = normalise(images(5, size=4 * stride, key=1), MEAN, STD)
    mean, matrix, inverse = (np.float64(value) for value in vars(zca).values())
    white, back = np.empty(x.shape), np.empty(x.shape)
    for i in range(len(x)):
        for p, (a, b) in enumerate(
            zip(phases_of(np.float64(x[i]) - mean, stride), phases_of(np.float64(x[i]), stride), strict=True)
        ):
            row, column = divmod(p, stride)
            white[i, :, row::stride, column::stride] = (a @ matrix).reshape(3, 4, 4)
            back[i, :, row::stride, column::stride] = (b @ inverse).reshape(3, 4, 4)
    back += mean
    for value, exact in ((zca.whiten(x), white), (zca.undo(x), back)):
        assert np.abs(np.float64(value) - exact).max() <= 4 * math.sqrt(48) * U * np.abs(exact).max()


@pytest.mark.parametrize("stride", [1, 2])
def test_undo_leads_back(fit, small_phases, stride):
    """A rounding on one side is larger by the condition number of the matrices on the other."""
    zca = fit(data_of(images(60, size=4 * stride)))
    x = normalise(images(20, size=4 * stride, key=1), MEAN, STD)
    condition = float(torch.linalg.cond(zca.matrix.double()))
    assert 2 < condition < 100
    for there, back in ((zca.whiten, zca.undo), (zca.undo, zca.whiten)):
        assert (back(there(x)) - x).abs().max() <= 4 * condition * U * x.abs().max()
        assert (there(x) - x).abs().max() > 0.1


def test_products_are_exact_whatever_is_set_around_them(fit):
    zca = fit(data_of(images(60)))
    x = normalise(images(5, key=1), MEAN, STD)
    white, back = zca.whiten(x), zca.undo(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(zca.whiten(x), white) and torch.equal(zca.undo(x), back)


def test_gradients_flow_through_undo_and_whiten(fit, small_phases):
    zca = fit(data_of(images(60, size=8)))
    zca = Zca(*(value.double() for value in vars(zca).values()))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(zca.whiten, x) and torch.autograd.gradcheck(zca.undo, x)


def test_to_moves_a_copy(fit):
    zca = fit(data_of(images(60)))
    moved = zca.to("meta")
    assert {value.device.type for value in vars(moved).values()} == {"meta"}
    assert {value.device.type for value in vars(zca).values()} == {"cpu"}


# --------------------------------------------------------------------------------------------------------------- inputs


@pytest.fixture(scope="module")
def set_32():
    """130 images of 3072 dimensions, where a matrix product's bits depend on its number of rows, and a whitening."""
    x = torch.tensor(np.random.default_rng(3).integers(0, 256, (130, 3, 32, 32), np.uint8))
    noise = torch.randn(3072, 3072, generator=torch.Generator().manual_seed(0)) / 50
    mean = normalise(x, MEAN, STD).mean(0)
    return x, Zca(mean, noise + noise.T + torch.eye(3072), torch.eye(3072))


def inputs(x, zca, gigabytes):
    return Inputs(x, MEAN, STD, zca, CPU, gigabytes)


def test_without_whitening_inputs_are_normalised_pixels():
    x = images(30)
    index = torch.tensor([7, 0, 29, 7])
    for gigabytes in (0.0, 4.0):
        of_set = inputs(x, None, gigabytes)
        assert torch.equal(of_set(index), normalise(x[index], MEAN, STD)) and of_set(index).dtype == torch.float32
        assert len(of_set) == 30 and of_set.kept is None  # uint8 is a quarter as large


def test_kept_and_computed_inputs_are_whitened_images(set_32):
    x, zca = set_32
    kept, computed = inputs(x, zca, 4.0), inputs(x, zca, 0.0)
    assert kept.kept is not None and computed.kept is None and len(kept) == len(computed) == 130
    rows = np.float64(normalise(x, MEAN, STD) - zca.mean).reshape(130, -1)
    exact = rows @ np.float64(zca.matrix)
    for of_set in (kept, computed):
        whole = of_set(torch.arange(130))
        assert whole.shape == x.shape and whole.dtype == torch.float32
        assert np.abs(np.float64(whole).reshape(130, -1) - exact).max() <= math.sqrt(3072) * U * np.abs(exact).max()


def test_an_input_has_the_same_bits_kept_or_computed_in_any_company(set_32):
    x, zca = set_32
    kept, computed = inputs(x, zca, 4.0), inputs(x, zca, 0.0)
    whole = kept(torch.arange(130))
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    repeated = order[torch.arange(200) % 9]
    for index in (order[:1], order[:2], order[:7], order[3:66], order[:64], order[:65], order, repeated, order[:0]):
        assert torch.equal(kept(index), whole[index]), len(index)
        assert torch.equal(computed(index), whole[index]), len(index)


def test_what_fits_is_kept(set_32):
    x, zca = set_32
    size = 4 * 130 * 3072 / 1e9
    assert inputs(x, zca, size).kept is not None and inputs(x, zca, size - 1e-9).kept is None


def test_inputs_of_a_real_set_in_phases(tmp_path, monkeypatch):
    """The bundled digits from the data's own file to the network's input, kept, computed and naive."""
    monkeypatch.setattr(common.data, "PHASE_SIZE", 4)
    data = load("digits", data_dir=tmp_path)
    zca, (mu, matrix, *_) = fit_zca(data, tmp_path), naive(data, 2)
    index = torch.tensor([100, 3, 3, 0])
    mean, std = (value.double().view(-1, 1, 1).numpy() for value in (data.mean, data.std))
    z = (np.float64(data.x_train[index]) / 255 - mean) / std - mu
    exact = np.array([[row @ matrix for row in phases_of(image, 2)] for image in z])
    for gigabytes in (0.0, 1.0):
        x = Inputs(data.x_train, data.mean, data.std, zca, CPU, gigabytes)(index)
        rows = np.array([phases_of(image, 2) for image in np.float64(x)])
        np.testing.assert_allclose(rows, exact, atol=1e-5)
