"""common/augment.py: every operation against a loop over images that is given the same random numbers."""

import colorsys
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import adjust_hue

import common.augment
from common.augment import (
    boxes,
    colour_jitter,
    counter_uniform,
    crop_flip,
    crop_pad,
    crop_variants,
    cyclic_shift,
    draw_variants,
    gather,
    gaussian_blur,
    grayscale,
    num_variants,
    resample,
    resident,
    resized_crop,
    scramble,
    shift_hue,
    small_side,
    ssl_view,
    two_views,
)
from common.data import NO_FLIP, load
from common.run import seed_of

F64 = torch.float64
JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=6, channels=3, size=8, seed=9, **kind):
    return torch.rand(n, channels, size, size, generator=gen(seed), **kind)


# -------------------------------------------------------------------------------------------------- a counter's numbers

WORDS = 2**64  # all arithmetic below is on Python's integers, modulo this
GOLDEN = 0x9E3779B97F4A7C15


def naive_scramble(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORDS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORDS
    return z ^ (z >> 31)


def naive_counter(index, count, *key):
    """A row of numbers for each place."""
    rows = [naive_scramble((seed_of(*key) + (i + 1) * GOLDEN) % WORDS) for i in index]
    return [[(naive_scramble((row + j * GOLDEN) % WORDS) >> 40) / 2**24 for j in range(1, count + 1)] for row in rows]


def test_scramble_is_splitmix64():
    """The first numbers of the published generator from the state 1234567, as its authors' C code prints them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + k * GOLDEN) % WORDS for k in range(1, 5)]
    assert [naive_scramble(state) for state in states] == published
    signed = torch.tensor([state - WORDS if state >= WORDS // 2 else state for state in states])
    assert [word % WORDS for word in scramble(signed).tolist()] == published


@pytest.mark.parametrize("key", [(), ("view", 0, 7), (123456789, "mix")])
def test_counter_uniform_is_integer_arithmetic(key):
    index = [*range(40), 10**6, 2**31, 2**40 + 3, 2**62]
    found = counter_uniform(torch.tensor(index), 6, *key)
    assert found.dtype == torch.float32 and found.tolist() == naive_counter(index, 6, *key)


def test_counter_uniform_stays_what_it_is():
    """Stored labels rest on these numbers."""
    found = (counter_uniform(torch.tensor([0, 1, 49_999]), 3, "view", 0, 0, 199) * 2**24).long().tolist()
    assert found == [[9621568, 1658396, 8826622], [8929552, 2454764, 2675141], [321576, 7034893, 16598375]]


def test_a_row_of_the_counter_depends_on_key_and_place_alone():
    index = torch.randperm(500, generator=gen())
    whole = counter_uniform(torch.arange(500), 5, "view", 1, 2)
    assert torch.equal(counter_uniform(index, 5, "view", 1, 2), whole[index])
    assert torch.equal(counter_uniform(index[:1], 5, "view", 1, 2), whole[index[:1]])
    assert torch.equal(counter_uniform(index, 2, "view", 1, 2), whole[index, :2])
    for other in (("view", 1, 3), ("view", 2, 2), ("mix", 1, 2), ("view", 12)):
        assert (counter_uniform(index, 5, *other) == whole[index]).float().mean() < 0.01


def test_counter_numbers_are_uniform_and_unrelated():
    """Chi-square over 64 bins (limit: one in a thousand for 63 degrees); correlations of neighbours of all kinds."""
    n = 100_000
    u = counter_uniform(torch.arange(n), 4, "uniform", 0).double()
    other = counter_uniform(torch.arange(n), 4, "uniform", 1).double()
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        counts = torch.bincount((column * 64).long(), minlength=64)
        assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 103.5
    pairs = [
        (u[1:, 0], u[:-1, 0]),
        (u[:, 0], u[:, 1]),
        (u[:, 2], u[:, 3]),
        (u[:, 0], other[:, 0]),
        (u[7:, 1], u[:-7, 2]),
    ]
    for one, two in pairs:
        assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 4 / math.sqrt(n)
        cells = torch.bincount((one * 8).long() * 8 + (two * 8).long(), minlength=64)
        assert ((cells - len(one) / 64) ** 2 / (len(one) / 64)).sum() < 103.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the bits of a GPU need a GPU")
def test_the_counters_bits_are_a_gpus_too():
    index = torch.arange(1000)
    there = counter_uniform(index.cuda(), 5, "view", 1)
    assert there.is_cuda and torch.equal(there.cpu(), counter_uniform(index, 5, "view", 1))


# -------------------------------------------------------------------------------------------------------- crop and flip


def naive_crop_flip(x, generator, flip, pad):
    """Pixel by pixel."""
    n, _, height, width = x.shape
    shifts = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)[..., 0].tolist()
    mirrored = (torch.rand(n, 1, generator=generator) < 0.5)[:, 0].tolist() if flip else [False] * n
    out = torch.zeros_like(x)
    for b in range(n):
        for i in range(height):
            for j in range(width):
                row = i + shifts[0][b] - pad
                column = (width - 1 - j if mirrored[b] else j) + shifts[1][b] - pad
                if 0 <= row < height and 0 <= column < width:
                    out[b, :, i, j] = x[b, :, row, column]
    return out


@pytest.mark.parametrize(
    ("flip", "pad", "shape"),
    [(True, None, (7, 3, 8, 8)), (False, 3, (5, 1, 6, 6)), (True, 4, (6, 2, 5, 7)), (True, None, (4, 1, 8, 28))],
)
def test_crop_flip_is_the_loop(flip, pad, shape):
    x = torch.randn(shape, generator=gen(3))
    expected = naive_crop_flip(x, gen(1), flip, crop_pad(shape[2]) if pad is None else pad)
    assert torch.equal(crop_flip(x, gen(1), flip, pad), expected)


def test_crop_flip_pads_four_pixels_from_28_on():
    assert [crop_pad(size) for size in (4, 8, 16, 27, 28, 32, 64, 224)] == [1, 1, 2, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("flip", [False, True])
def test_crop_flip_draws_every_shift_alike_and_mirrors_half(flip):
    n = 9000
    x = torch.zeros(n, 1, 8, 8)
    x[:, :, 4, 2] = 1  # lands in columns 1 to 3, mirrored in 4 to 6
    out = crop_flip(x, gen(), flip)
    places = out.flatten(1).argmax(1)
    assert (out.flatten(1).sum(1) == 1).all()
    rows, columns = places // 8, places % 8
    mirrored = columns > 3
    counts = torch.bincount((rows - 3) * 3 + torch.where(mirrored, 6 - columns, columns - 1), minlength=9)
    assert len(counts) == 9
    chi_square = ((counts - n / 9) ** 2 / (n / 9)).sum().item()
    assert chi_square < 26.1  # 8 degrees of freedom, one in a thousand; the seed is fixed
    assert abs(mirrored.sum().item() - n / 2) < 4 * math.sqrt(n / 4) if flip else not mirrored.any()


def naive_variant(image, variant, flip, pad):
    """Pad, crop, mirror one image (C, H, W), by the numbering of draw_variants."""
    shift, mirrored = divmod(variant, 2) if flip else (variant, 0)
    dy, dx = divmod(shift, 2 * pad + 1)
    _, height, width = image.shape
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    out = padded[:, dy : dy + height, dx : dx + width]
    return torch.from_numpy((out[:, :, ::-1] if mirrored else out).copy())


def pixel_set(n, shape, seed=3):
    return torch.randint(1, 256, (n, *shape), generator=gen(seed), dtype=torch.uint8)  # 0 is the padding's alone


@pytest.mark.parametrize(
    ("shape", "flip", "pad", "count"),
    [((3, 32, 32), True, None, 162), ((1, 8, 8), False, None, 9), ((2, 5, 7), True, 2, 50), ((1, 6, 6), True, 0, 2)],
)
def test_gather_of_every_variant_is_the_loop(shape, flip, pad, count):
    pixels, index = pixel_set(5, shape), torch.randint(5, (count,), generator=gen(4))
    assert num_variants(shape[1], flip, pad) == count
    out = gather(pixels, index, torch.arange(count), flip, pad)
    width = crop_pad(shape[1]) if pad is None else pad
    expected = [naive_variant(pixels[i], variant, flip, width) for variant, i in enumerate(index.tolist())]
    assert out.dtype == torch.uint8 and out.is_contiguous() and torch.equal(out, torch.stack(expected))
    same = gather(pixels, torch.zeros(count, dtype=torch.int64), torch.arange(count), flip, pad)
    assert len(same.flatten(1).unique(dim=0)) == count  # no two numbers for one crop


def test_gather_without_variants_is_indexing():
    pixels, index = pixel_set(9, (3, 4, 4)), torch.tensor([8, 0, 0, 3])
    out = gather(pixels, index)
    assert torch.equal(out, pixels[index]) and out.data_ptr() != pixels.data_ptr()
    middle = torch.full((4,), 4)  # dy = dx = pad = 1
    assert torch.equal(gather(pixels, index, middle), pixels[index])
    assert torch.equal(gather(pixels, index, middle * 2 + 1, flip=True), pixels[index].flip(3))


def test_gather_leaves_a_mapped_set_alone(tmp_path):
    pixels = pixel_set(20, (3, 8, 8))
    pixels.numpy().tofile(tmp_path / "set.u8")
    mapped = torch.from_file(str(tmp_path / "set.u8"), shared=False, size=pixels.numel(), dtype=torch.uint8)
    mapped = mapped.view_as(pixels)
    index, variant = torch.arange(19, -1, -1), draw_variants(20, 8, True, gen())
    assert torch.equal(gather(mapped, index, variant, True), gather(pixels, index, variant, True))
    assert torch.equal(mapped, pixels)


@pytest.mark.parametrize(("flip", "pad"), [(True, None), (False, None), (True, 3)])
def test_variants_are_the_numbers_that_crop_flip_draws(flip, pad):
    """The first words of the generator are rows, then columns, then mirrors: seeds keep their crops."""
    n, size, width = 40, 8, 1 if pad is None else pad
    ours, generator, other = gen(1), gen(1), gen(1)
    variant = draw_variants(n, size, flip, ours, pad)
    assert variant.shape == (n,) and variant.dtype == torch.int64
    dy, dx = torch.randint(0, 2 * width + 1, (2, n, 1), generator=generator)[..., 0].tolist()
    mirrored = (torch.rand(n, 1, generator=generator) < 0.5)[:, 0].tolist() if flip else [0] * n
    assert torch.equal(ours.get_state(), generator.get_state())
    numbers = [(y * (2 * width + 1) + x) * (2 if flip else 1) + m for y, x, m in zip(dy, dx, mirrored, strict=True)]
    assert variant.tolist() == numbers
    x = pixel_set(n, (3, size, size))
    assert torch.equal(crop_flip(x, other, flip, pad), gather(x, torch.arange(n), variant, flip, pad))


@pytest.mark.parametrize(("size", "flip", "limit"), [(32, True, 222.0), (32, False, 124.9), (8, True, 40.8)])
def test_variants_are_drawn_alike(size, flip, limit):
    """Chi-square of all numbers; the limits are one in a thousand for 161, 80 and 17 degrees; the seed is fixed."""
    count = num_variants(size, flip)
    n = 200 * count
    counts = torch.bincount(draw_variants(n, size, flip, gen()), minlength=count)
    assert len(counts) == count
    assert ((counts - 200) ** 2 / 200).sum() < limit


@pytest.mark.parametrize(("size", "flip", "pad"), [(32, True, None), (8, False, None), (8, True, 0), (16, False, 7)])
def test_variants_from_uniforms_are_exact_floors(size, flip, pad):
    width = 2 * (crop_pad(size) if pad is None else pad) + 1
    u = torch.rand(300, 3, generator=gen())
    u[:4] = torch.tensor([[0, 0, 0], [1 - 2**-24] * 3, [0.5] * 3, [0.5 - 2**-24] * 3])
    expected = []
    for row in u.tolist():
        down, right, mirror = (int(value * 2**24) for value in row)
        shift = down * width // 2**24 * width + right * width // 2**24
        expected.append(2 * shift + (mirror < 2**23) if flip else shift)
    assert crop_variants(u, size, flip, pad).tolist() == expected
    assert max(expected) == expected[1] + (1 if flip else 0) == num_variants(size, flip, pad) - 1


def test_variants_from_a_counter_are_drawn_alike():
    """As test_variants_are_drawn_alike."""
    variant = crop_variants(counter_uniform(torch.arange(200 * 162), 3, "variants"), 32, True)
    counts = torch.bincount(variant, minlength=162)
    assert len(counts) == 162 and ((counts - 200) ** 2 / 200).sum() < 222.0


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (5, 1, 4, 7)])
def test_cyclic_shift_rolls_each_image(shape):
    x = torch.randn(shape, generator=gen(), dtype=F64)
    down, right = torch.randint(-20, 21, (2, shape[0]), generator=gen(1))
    expected = torch.stack(
        [image.roll((i, j), (1, 2)) for image, i, j in zip(x, down.tolist(), right.tolist(), strict=True)]
    )
    assert torch.equal(cyclic_shift(x, down, right), expected)
    for i, j in ((0, 0), (3, 0), (0, -2), (5, 40)):
        assert torch.equal(cyclic_shift(x, torch.tensor([i]), torch.tensor([j])), x.roll((i, j), (2, 3)))
    assert torch.equal(cyclic_shift(x.to(memory_format=torch.channels_last), down, right), expected)


@pytest.mark.parametrize("n", [1, 4])
def test_the_gradient_of_a_cyclic_shift_is_shifted_back(n):
    x, weight = torch.randn(2, 4, 2, 5, 6, generator=gen(), dtype=F64)
    down, right = torch.randint(-9, 10, (2, n), generator=gen(1))
    x.requires_grad_()
    (cyclic_shift(x, down, right) * weight).sum().backward()
    assert torch.equal(x.grad, cyclic_shift(weight, -down, -right))


class Weight:
    """Stands for a set of so many bytes."""

    def __init__(self, nbytes):
        self.nbytes, self.at = nbytes, "cpu"

    def to(self, device):
        moved = Weight(self.nbytes)
        moved.at = str(device)
        return moved


@pytest.mark.parametrize(
    ("device", "nbytes", "at"),
    [("cuda:1", 700, "cuda:1"), ("cuda:1", 701, "cpu"), ("mps", 2**30, "mps"), ("mps", 2**30 + 1, "cpu"),
     ("cpu", 1, "cpu")],
)  # fmt: skip
def test_a_set_is_resident_where_it_fits(monkeypatch, device, nbytes, at):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(str(device)) or (1000, 5000))
    x = Weight(nbytes)
    out = resident(x, torch.device(device), spare=300)
    assert out.at == at and (out is x) == (at == "cpu")
    assert asked == (["cuda:1"] if device == "cuda:1" else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a set on a GPU needs a GPU")
def test_gather_on_a_gpu_is_the_cpus():
    pixels, index, variant = pixel_set(50, (3, 32, 32)), torch.arange(49, -1, -1), draw_variants(50, 32, True, gen())
    there = resident(pixels, torch.device("cuda"), spare=0)
    assert there.is_cuda and resident(pixels, torch.device("cuda"), spare=1 << 50) is pixels
    for choice in (None, variant):
        out = gather(there, index, choice, True)
        assert out.is_cuda and torch.equal(out.cpu(), gather(pixels, index, choice, True))


def test_digits_are_never_mirrored():
    data = load("digits")
    assert not data.flip and "mnist" in NO_FLIP and "svhn" in NO_FLIP
    ramp = torch.linspace(0, 1, 8).expand(200, 1, 8, 8)
    view = resized_crop(ramp, gen(), (0.3, 1.0), data.flip)
    assert (view[..., 1:] >= view[..., :-1]).all()


# --------------------------------------------------------------------------------------------------------- resized crop


def naive_resized_crop(x, generator, scale, flip, side=None):
    """A bilinear look-up for every output pixel; sample positions outside the centres take the border's value."""
    n, channels, height, width = x.shape
    rows, columns = side or height, side or width
    draw = lambda low, high: torch.rand(n, generator=generator).double() * (high - low) + low  # noqa: E731
    area, ratio = draw(*scale), draw(-math.log(4 / 3), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().clamp(max=1).tolist(), (area / ratio).sqrt().clamp(max=1).tolist()
    left, top = draw(0, 1).tolist(), draw(0, 1).tolist()
    mirrored = (draw(0, 1) < 0.5).tolist() if flip else [False] * n
    out = x.new_zeros(n, channels, rows, columns)
    for b in range(n):
        for i in range(rows):
            for j in range(columns):
                across = (columns - 1 - j if mirrored[b] else j) + 0.5
                u = ((1 - w[b]) * left[b] + w[b] * across / columns) * width - 0.5
                v = ((1 - h[b]) * top[b] + h[b] * (i + 0.5) / rows) * height - 0.5
                u, v = min(max(u, 0.0), width - 1.0), min(max(v, 0.0), height - 1.0)
                a, c = min(int(u), width - 2), min(int(v), height - 2)
                s, t = u - a, v - c
                upper = (1 - s) * x[b, :, c, a] + s * x[b, :, c, a + 1]
                lower = (1 - s) * x[b, :, c + 1, a] + s * x[b, :, c + 1, a + 1]
                out[b, :, i, j] = (1 - t) * upper + t * lower
    return out


@pytest.mark.parametrize(("scale", "flip"), [((0.08, 1.0), True), ((0.4, 0.6), False), ((1.0, 1.0), True)])
def test_resized_crop_is_the_bilinear_loop(scale, flip):
    x = images(5, dtype=F64)
    expected = naive_resized_crop(x, gen(2), scale, flip)
    torch.testing.assert_close(resized_crop(x, gen(2), scale, flip), expected, rtol=0, atol=1e-5)  # draws are float32


@pytest.mark.parametrize("side", [3, 4, 7, 13])
@pytest.mark.parametrize("flip", [True, False])
def test_a_crop_of_another_size_is_the_bilinear_loop(side, flip):
    """Of images that are no squares; the same boxes whatever the side."""
    x = images(5, dtype=F64)[:, :, :6]
    expected = naive_resized_crop(x, gen(2), (0.05, 0.3), flip, side)
    torch.testing.assert_close(resized_crop(x, gen(2), (0.05, 0.3), flip, side), expected, rtol=0, atol=1e-5)
    expected = naive_resized_crop(x, gen(2), (0.05, 0.3), flip)
    torch.testing.assert_close(resized_crop(x, gen(2), (0.05, 0.3), flip), expected, rtol=0, atol=1e-5)


def test_the_small_views_sides():
    """96 of 224 px, 4/7 of it rounded and so on: the nearest multiples of four, four at least."""
    assert [small_side(size) for size in (1, 8, 16, 28, 32, 48, 64, 96, 128, 224, 448)] == [
        4, 4, 8, 12, 12, 20, 28, 40, 56, 96, 192]  # fmt: skip
    for size in range(10, 300):
        assert small_side(size) % 4 == 0 and abs(small_side(size) - size * 96 / 224) <= 2


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_whole_image_as_box_is_the_image(monkeypatch, mirrored):
    whole = iter([1.0, 0.5, 0.3, 0.7, 0.4 if mirrored else 0.6])  # area, log ratio (its middle), left, top, mirror
    monkeypatch.setattr(common.augment, "uniform", lambda n, *rest: torch.full((n,), next(whole)))
    x = images()
    out = resized_crop(x, gen(), (1.0, 1.0), True)
    torch.testing.assert_close(out, x.flip(3) if mirrored else x, rtol=0, atol=1e-6)


def test_boxes_stay_inside_and_keep_to_their_ranges():
    n, size = 2000, 16
    ramp = (torch.arange(size, dtype=F64) + 0.5) / size
    x = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)]).expand(n, 2, size, size)
    out = resized_crop(x, gen(), (0.2, 0.5), True)
    middle = out[:, :, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1]  # away from the border's clamp
    width, height = (middle[:, 0, 0, 1] - middle[:, 0, 0, 0]) * size, (middle[:, 1, 1, 0] - middle[:, 1, 0, 0]) * size
    mirrored, width = width < 0, width.abs()
    area, ratio, centre = width * height, width / height, middle.mean((2, 3))  # centre: (n, 2)
    assert 0.2 - 1e-5 < area.min() < 0.21 and 0.49 < area.max() < 0.5 + 1e-5
    assert 3 / 4 - 1e-4 < ratio.min() < 0.76 and 1.32 < ratio.max() < 4 / 3 + 1e-4
    assert abs(ratio.log().mean()) < 4 * 2 * math.log(4 / 3) / math.sqrt(12 * n)  # uniform in the logarithm
    for centre_1d, side in ((centre[:, 0], width), (centre[:, 1], height)):
        start = (centre_1d - side / 2) / (1 - side)
        assert -1e-4 < start.min() < 0.01 and 0.99 < start.max() < 1 + 1e-4
    assert abs(mirrored.sum().item() - n / 2) < 4 * math.sqrt(n / 4)


@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), 4 / 3), ((0.08, 1.0), 1.0), ((0.9, 1.0), 2.0)])
def test_boxes_are_the_loop(scale, ratio):
    u = torch.rand(200, 4, generator=gen(), dtype=F64)
    expected = []
    for a, r, left, top in u.tolist():
        area, shape = scale[0] + a * (scale[1] - scale[0]), ratio ** (2 * r - 1)
        width, height = min(1.0, math.sqrt(area * shape)), min(1.0, math.sqrt(area / shape))
        expected.append([top * (1 - height), left * (1 - width), height, width])
    found = torch.stack(boxes(u, scale, ratio), 1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-14)
    if ratio == 1:
        assert torch.equal(found[:, 2], found[:, 3])


def drawn_boxes(n, scale=(0.08, 1.0)):
    return [*boxes(torch.rand(n, 4, generator=gen(3)), scale), torch.rand(n, generator=gen(4)) < 0.5]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 8), (torch.float32, 28), (F64, 9)])
def test_resample_has_the_bits_of_affine_grid(dtype, size):
    """Which resized_crop was made of: seeds keep their views."""
    x, box = images(40, size=size, dtype=dtype), drawn_boxes(40)
    top, left, height, width, mirrored = box
    theta = x.new_zeros(40, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = torch.where(mirrored, -width, width), 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    grid = grid.clamp(-x.new_tensor([1 - 1 / size] * 2), x.new_tensor([1 - 1 / size] * 2))
    assert torch.equal(resample(x, *box), F.grid_sample(x, grid, align_corners=False))
    generator = gen(5)
    u = torch.stack([torch.rand(40, generator=generator) for _ in range(4)], 1)
    same = [*boxes(u, (0.2, 0.9)), torch.rand(40, generator=generator) < 0.5]
    assert torch.equal(resized_crop(x, gen(5), (0.2, 0.9), True), resample(x, *same))


def test_resample_has_the_same_bits_in_any_batch():
    x, box = images(23, size=9), drawn_boxes(23)
    whole = resample(x, *box)
    for batch in (1, 2, 7):
        for index in torch.arange(23).flip(0).split(batch):
            assert torch.equal(resample(x[index], *(part[index] for part in box)), whole[index])


def test_one_box_can_be_the_whole_batchs():
    x = images(5, dtype=F64)
    for i in range(5):
        box = [part[i : i + 1] for part in drawn_boxes(5)]
        expected = torch.cat([resample(x[j : j + 1], *box) for j in range(5)])
        assert torch.equal(resample(x, *box), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_resample_is_differentiable_in_the_images(n):
    x, box = images(3, 2, 5, dtype=F64).requires_grad_(), drawn_boxes(n)
    assert torch.autograd.gradcheck(lambda x: resample(x, *box), x)


# --------------------------------------------------------------------------------------------------------------- colour


def test_grayscale_is_pils():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    ours = grayscale(torch.from_numpy(pixels).permute(2, 0, 1)[None].double())[0, 0]
    theirs = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))).double()
    assert (ours - theirs).abs().max() < 0.51  # PIL rounds
    assert grayscale(torch.ones(1, 3, 2, 2)).sum() == pytest.approx(4)


def test_shift_hue_is_colorsys():
    x = images(4, size=6, dtype=F64)
    x[0, :, 0] = torch.tensor([0.5, 0.0, 1.0])[:, None].expand(3, 6)  # one hue
    x[0, :, 1] = 0.3  # grey
    x[0, :, 2] = 0.0  # black
    x[0, :, 3] = torch.eye(3, dtype=F64).repeat(1, 2)  # primaries
    x[0, :, 4] = 1 - torch.eye(3, dtype=F64).repeat(1, 2)  # two channels at the top
    turns = torch.tensor([0.3, -0.1, 0.5, 0.0], dtype=F64)
    expected = torch.zeros_like(x)
    for b, turn in enumerate(turns.tolist()):
        for i in range(6):
            for j in range(6):
                hue, saturation, value = colorsys.rgb_to_hsv(*x[b, :, i, j].tolist())
                rgb = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
                expected[b, :, i, j] = torch.tensor(rgb, dtype=F64)
    torch.testing.assert_close(shift_hue(x, turns), expected, rtol=0, atol=1e-10)


def test_shift_hue_is_torchvisions():
    x, turns = images(5), torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.5])
    expected = torch.stack([adjust_hue(image, turn) for image, turn in zip(x, turns.tolist(), strict=True)])
    ours = shift_hue(x, turns)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert ours.min() >= 0 and ours.max() <= 1


def naive_jitter(x, generator, p, brightness, contrast, saturation, hue):
    """Image by image, with torchvision's hue."""
    n, channels = x.shape[:2]
    weights = [0.299, 0.587, 0.114] if channels == 3 else [1.0]
    luma = lambda image: sum(w * plane for w, plane in zip(weights, image, strict=True))  # noqa: E731
    use = (torch.rand(n, generator=generator) < p).tolist()
    out = list(x)
    for kind in torch.randperm(4, generator=generator).tolist():
        if channels == 1 and kind > 1:
            continue
        draws = torch.rand(n, generator=generator).tolist()
        for b, draw in enumerate(draws):
            if kind == 0:
                new = out[b] * (1 - brightness + 2 * brightness * draw)
            elif kind == 1:
                new = luma(out[b]).mean() + (out[b] - luma(out[b]).mean()) * (1 - contrast + 2 * contrast * draw)
            elif kind == 2:
                new = luma(out[b]) + (out[b] - luma(out[b])) * (1 - saturation + 2 * saturation * draw)
            else:
                new = adjust_hue(out[b], -hue + 2 * hue * draw)
            out[b] = new.clamp(0, 1)
    return torch.stack([new if chosen else old for new, old, chosen in zip(out, x, use, strict=True)])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(5))  # five orders
def test_colour_jitter_is_the_loop(channels, seed):
    x = images(16, channels)
    expected = naive_jitter(x, gen(seed), 0.5, **JITTER)
    ours = colour_jitter(x, gen(seed), 0.5, **JITTER)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    changed = (ours != x).flatten(1).any(1)
    assert changed.any() and not changed.all()


def test_colour_jitter_of_strength_zero_or_chance_zero_is_the_identity():
    x, nothing = images(), dict.fromkeys(JITTER, 0.0)
    torch.testing.assert_close(colour_jitter(x, gen(), 1.0, **nothing), x, rtol=0, atol=1e-6)
    assert torch.equal(colour_jitter(x, gen(), 0.0, **JITTER), x)


def test_one_channel_has_neither_saturation_nor_hue():
    x = images(channels=1)
    only_colour = dict(brightness=0.0, contrast=0.0, saturation=0.9, hue=0.5)
    torch.testing.assert_close(colour_jitter(x, gen(), 1.0, **only_colour), x, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ two views


def test_views_follow_the_recipe(monkeypatch):
    """Crop and jitter stubbed: what is left is grayscale (1 in 5) and solarising (1 in 5, second view only)."""
    calls = []
    monkeypatch.setattr(common.augment, "resized_crop", lambda x, generator, *rest: calls.append(rest) or x)
    monkeypatch.setattr(common.augment, "colour_jitter", lambda x, generator, *how: calls.append(how) or x)
    n = 2000
    x = torch.tensor([0.9, 0.2, 0.5])[:, None, None].expand(n, 3, 2, 2)
    grey = 0.299 * 0.9 + 0.587 * 0.2 + 0.114 * 0.5
    kinds = {(0.9, 0.2, 0.5): "plain", (0.1, 0.2, 0.5): "solarised", (grey,) * 3: "grey"}
    for solarise in (True, False):
        for view, chance in zip(two_views(x, gen(), (0.3, 1.0), True, solarise), (0, 0.2 * solarise), strict=True):
            found = {tuple(round(v, 4) for v in key): name for key, name in kinds.items()}
            seen = [found[tuple(round(v, 4) for v in row)] for row in view[:, :, 0, 0].tolist()]
            four_sigma = 4 * math.sqrt(0.2 * 0.8 * n)
            assert abs(seen.count("grey") - 0.2 * n) < four_sigma
            assert abs(seen.count("solarised") - 0.8 * chance * n) < four_sigma * bool(chance) + 1e-9
    assert calls == [((0.3, 1.0), True, None), (0.8, *JITTER.values())] * 4


def test_a_view_takes_its_settings(monkeypatch):
    """MoCo v2's: crop and flip, the jitter asked for of four in five, grey one in five, blur on demand."""
    asked = []
    monkeypatch.setattr(common.augment, "resized_crop", lambda x, _, *args: asked.append(args) or x)
    monkeypatch.setattr(common.augment, "colour_jitter", lambda x, _, *args: asked.append(args) or x)
    x = torch.rand(4000, 3, 2, 2, generator=gen())
    moco = dict(jitter=(0.4, 0.4, 0.4, 0.1))
    view = ssl_view(x, gen(1), (0.3, 1.0), True, **moco, side=5)
    assert asked == [((0.3, 1.0), True, 5), (0.8, 0.4, 0.4, 0.4, 0.1)]
    grey = (view == view[:, :1]).all(1).all(1).all(1)
    assert torch.equal(view[~grey], x[~grey])
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    torch.testing.assert_close(view[grey, 0], luma[grey])
    assert grey.float().mean() == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / 4000))
    changed = lambda **blur: (ssl_view(x, gen(1), (0.3, 1.0), True, **moco, **blur) != view).flatten(1).any(1)  # noqa: E731
    assert not changed().any()
    for chance in (0.1, 0.5, 1.0):  # a sigma below 0.2 px, one in twenty, changes nothing
        spread = 5 * math.sqrt(chance * (1 - chance) / 4000)
        assert 0.94 * chance - spread < changed(blur=chance).float().mean() < chance - 0.02 * chance + spread
    one = x[:, :1].contiguous()
    assert torch.equal(ssl_view(one, gen(1), (0.3, 1.0), True, **moco), one)


def test_a_view_is_blurred_before_it_is_solarised(monkeypatch):
    """With sigmas of 0.1 to 2 px; as the papers' views (solarising moves a mean that blurring keeps)."""
    monkeypatch.setattr(common.augment, "resized_crop", lambda x, *_: x)
    monkeypatch.setattr(common.augment, "colour_jitter", lambda x, *_: x)
    x = images(50, 1)
    blurred = gaussian_blur(x, gen(1), 1.0, 0.1, 2.0)
    assert torch.equal(ssl_view(x, gen(1), (0.3, 1.0), True, blur=1.0), blurred)
    view = ssl_view(x, gen(1), (0.3, 1.0), True, blur=1.0, solarise=1.0)
    assert torch.equal(view, torch.where(blurred >= 0.5, 1 - blurred, blurred))


def test_blur_is_the_loop():
    """Each pixel a mean weighted by exp(-distance^2 / 2 sigma^2), over the pixels that there are."""
    x = torch.rand(40, 2, 5, 7, generator=gen())
    blurred = gaussian_blur(x, gen(3), 0.5, 0.1, 2.0)
    generator = gen(3)
    sigmas, chances = torch.rand(40, generator=generator).double() * 1.9 + 0.1, torch.rand(40, generator=generator)
    kept = 0
    for image, out, sigma, chance in zip(x.double(), blurred, sigmas.tolist(), chances.tolist(), strict=True):
        if chance >= 0.5:
            kept += 1
            assert torch.equal(out, image.float())
            continue
        for row, column in ((0, 0), (2, 3), (4, 5)):
            weights = {
                (r, c): math.exp(-((r - row) ** 2 + (c - column) ** 2) / (2 * sigma**2))
                for r in range(5)
                for c in range(7)
            }
            total = sum(weights.values())
            for channel in range(2):
                wanted = sum(w * image[channel, r, c].item() for (r, c), w in weights.items()) / total
                assert out[channel, row, column].item() == pytest.approx(wanted, abs=1e-6)
    assert 8 < kept < 32


def test_views_solarise_grey_images_too():
    x = torch.full((500, 1, 4, 4), 0.75)
    view = ssl_view(x, gen(), (1.0, 1.0), False, solarise=1.0)
    plain = ssl_view(x, gen(), (1.0, 1.0), False, solarise=0.0)
    torch.testing.assert_close(view, torch.where(plain >= 0.5, 1 - plain, plain))


@pytest.mark.parametrize("channels", [1, 3])
def test_views_stay_pixels_and_repeat_by_seed(channels):
    x = images(300, channels)
    x[:50], x[50:100] = 0.0, 1.0  # the ends of the range
    views, again = (two_views(x, gen(4), (0.08, 1.0), True) for _ in range(2))
    for view, same in zip(views, again, strict=True):
        assert view.min() >= 0 and view.max() <= 1 and view.isfinite().all()
        assert torch.equal(view, same)
    others = [*two_views(x, gen(5), (0.08, 1.0), True), views[1]]
    for other in others:
        assert (other[100:] - views[0][100:]).abs().flatten(1).amax(1).gt(1e-3).all()


@pytest.mark.parametrize("make", [crop_flip, lambda x, g, f: resized_crop(x, g, (0.2, 1.0), f)])
def test_crops_repeat_by_seed(make):
    x = images(20)
    assert torch.equal(make(x, gen(1), True), make(x, gen(1), True))
    assert not torch.equal(make(x, gen(1), True), make(x, gen(2), True))
