"""The differentiable siamese augmentation of common/augment.py, every operation against a loop over pixels."""

import math

import numpy as np
import pytest
import torch
from conftest import refuse

from common.augment import DSA, dsa, dsa_strategy

F64 = torch.float64
FREPO, DC = "flip_color_crop_rotate_translate_cutout", "color_crop_cutout_flip_scale_rotate"
OPERATIONS = [("frepo", name) for name in FREPO.split("_")] + [("dc", name) for name in DC.split("_")]
every_operation = pytest.mark.parametrize(("strengths", "name"), OPERATIONS)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(n=6, channels=3, size=8, seed=9, dtype=F64):
    """As a network takes them: whitened, of any sign."""
    return torch.randn(n, channels, size, size, generator=gen(seed), dtype=F64).to(dtype)


# ------------------------------------------------------------------------------------------------------------- the loop


def bilinear(image, row, column, replicate):
    """image (C, H, W) at a place between its pixels; beyond the border its edge again, or 0."""
    _, height, width = image.shape
    out = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            weight = (1 - abs(row - i)) * (1 - abs(column - j))
            if replicate:
                out = out + weight * image[:, min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
            elif 0 <= i < height and 0 <= j < width:
                out = out + weight * image[:, i, j]
    return out


def read(image, place, replicate):
    """Every pixel of the output read at place(row, column) of the image, both counted from its centre."""
    _, height, width = image.shape
    middle, centre, out = (height - 1) / 2, (width - 1) / 2, np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            row, column = place(i - middle, j - centre)
            out[:, i, j] = bilinear(image, row + middle, column + centre, replicate)
    return out


def naive_color(image, order, brightness, contrast, saturation):
    channels, height, width = image.shape
    image = image.copy()
    for kind in order:
        if kind == "brightness":
            image += brightness
        elif kind == "contrast":
            mean = sum(image.flat) / image.size
            image = mean + contrast * (image - mean)
        else:
            for i in range(height):
                for j in range(width):
                    mean = sum(image[:, i, j]) / channels
                    image[:, i, j] = mean + saturation * (image[:, i, j] - mean)
    return image


def naive_erase(image, side, top, left):
    image = image.copy()
    for i in range(top, top + side):
        for j in range(left, left + side):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                image[:, i, j] = 0
    return image


def naive_dsa(x, generator, strengths, name, shared):
    """Image by image, in float64; the draws are float32, in the order of the parameters below."""
    torch.randint(1, (), generator=generator)  # the operation, of one
    n, _, height, width = x.shape
    drawn = 1 if shared else n

    def number(low, high):
        values = torch.rand(drawn, generator=generator) * (high - low) + low
        return values.double().expand(n).tolist()

    def each(operation, *parameters):
        return torch.stack([torch.from_numpy(operation(*one)) for one in zip(x.numpy(), *parameters, strict=True)])

    frepo, size = strengths == "frepo", height
    if name == "flip":
        return each(lambda image, u: image[:, :, ::-1].copy() if u < 0.5 else image, number(0, 1))
    if name == "color" and frepo:
        order = ("brightness", "contrast", "saturation")
        change = lambda image, b, c, s: naive_color(image, order, b, math.exp(c), math.exp(s))  # noqa: E731
        return each(change, *(number(-0.25, 0.25) for _ in range(3)))
    if name == "color":
        order = ("brightness", "saturation", "contrast")
        change = lambda image, b, s, c: naive_color(image, order, b, c, s)  # noqa: E731
        return each(change, number(-0.5, 0.5), number(0, 2), number(0.5, 1.5))
    if name == "crop" and frepo:

        def crop(image, log_zoom, down, right):
            zoom = math.exp(log_zoom)
            down, right = down * abs(height * zoom - height), right * abs(width * zoom - width)
            return read(image, lambda row, column: ((row + down) / zoom, (column + right) / zoom), True)

        return each(crop, number(math.log(0.8), math.log(1.25)), number(-0.5, 0.5), number(-0.5, 0.5))
    if name == "crop":
        most = int(0.125 * size + 0.5)
        down, right = torch.randint(0, 2 * most + 1, (2, drawn, 1), generator=generator)[..., 0].expand(2, n).tolist()
        place = lambda down, right: lambda row, column: (row + down - most, column + right - most)  # noqa: E731
        return each(lambda image, *by: read(image, place(*by), False), down, right)
    if name == "rotate":

        def rotate(image, angle):
            c, s = math.cos(angle), math.sin(angle)
            return read(image, lambda row, column: (c * row + s * column, c * column - s * row), frepo)

        return each(rotate, number(-15 / 180 * math.pi, 15 / 180 * math.pi))
    if name == "translate":
        move = lambda image, down, right: read(image, lambda row, column: (row + down, column + right), True)  # noqa: E731
        return each(move, number(-0.125 * height, 0.125 * height), number(-0.125 * width, 0.125 * width))
    if name == "scale":
        scale = lambda image, tall, wide: read(image, lambda row, column: (row * tall, column * wide), False)  # noqa: E731
        return each(scale, number(1 / 1.2, 1.2), number(1 / 1.2, 1.2))
    side = size // 4 if frepo else int(0.5 * size + 0.5)
    count, before = (size - side + 1, 0) if frepo else (size if side % 2 else size + 1, side // 2)
    cut = lambda image, top, left: naive_erase(image, side, int(top) - before, int(left) - before)  # noqa: E731
    return each(cut, number(0, count), number(0, count))


@every_operation
@pytest.mark.parametrize(
    ("channels", "size", "shared"),
    [(3, 8, False), (3, 8, True), (1, 10, False), (2, 9, False), (2, 12, True), (1, 28, False)],
)
def test_every_operation_is_the_loop(strengths, name, channels, size, shared):
    x = inputs(2 if size == 28 else 6, channels, size)
    kept = x.clone()
    ours = dsa(x, gen(size), name, strengths, shared)
    expected = naive_dsa(x, gen(size), strengths, name, shared)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)
    assert torch.equal(x, kept)


@every_operation
def test_every_operation_keeps_the_dtype(strengths, name):
    """float32 to its rounding; of bfloat16 only the input and the output, neither places nor factors."""
    x = inputs(dtype=torch.float32)
    expected = naive_dsa(x.double(), gen(3), strengths, name, False)
    ours = dsa(x, gen(3), name, strengths)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
    short = x.bfloat16()
    expected = naive_dsa(short.double(), gen(3), strengths, name, False)
    ours = dsa(short, gen(3), name, strengths)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- which is applied


@pytest.mark.parametrize(
    ("strategy", "strengths"),
    [(FREPO, "frepo"), ("color_crop_rotate_translate_cutout", "frepo"), (DC, "dc"), ("cutout", "dc")],
)
def test_one_operation_a_call_each_alike(monkeypatch, strategy, strengths):
    calls, names = [], strategy.split("_")
    for name in names:
        recorder = lambda x, generator, shared, name=name: calls.append((name, len(x), shared)) or x * 1  # noqa: E731
        monkeypatch.setitem(DSA[strengths], name, recorder)
    n, generator = 3000, gen()
    for i in range(n):
        dsa(torch.zeros(5, 1, 2, 2), generator, strategy, strengths, shared=i % 2 == 0)
    assert [call[1:] for call in calls] == [(5, True), (5, False)] * (n // 2)  # once a call, for the whole batch
    counts = torch.tensor([[call[0] for call in calls].count(name) for name in names])
    assert counts.sum() == n
    chi_square = ((counts - n / len(names)) ** 2 / (n / len(names))).sum().item()
    assert chi_square < 20.6  # 5 degrees of freedom (4 and 0 are rarer still), one in a thousand; the seed is fixed


@pytest.mark.parametrize(("strategy", "strengths"), [(FREPO, "frepo"), (DC, "dc")])
@pytest.mark.parametrize("shared", [False, True])
def test_a_call_is_one_of_the_operations_by_name(strategy, strengths, shared):
    """With the whole table: what a strategy does is one of its operations, alone, on all images."""
    x, names, seen = inputs(), strategy.split("_"), set()
    for seed in range(40):
        ours, choice = dsa(x, gen(seed), strategy, strengths, shared), gen(seed)
        name = names[torch.randint(len(names), (), generator=choice).item()]
        assert torch.equal(ours, DSA[strengths][name](x, choice, shared))
        seen.add(name)
    assert seen == set(names)


def test_strategies_are_parsed():
    assert dsa_strategy(FREPO, "frepo") == ["flip", "color", "crop", "rotate", "translate", "cutout"]
    assert dsa_strategy(DC, "dc") == ["color", "crop", "cutout", "flip", "scale", "rotate"]
    assert {name: list(table) for name, table in DSA.items()} == {
        "frepo": dsa_strategy(FREPO, "frepo"), "dc": dsa_strategy(DC, "dc")
    }  # fmt: skip
    for strengths in DSA:
        assert dsa_strategy("", strengths) == dsa_strategy("none", strengths) == []


@pytest.mark.parametrize("nothing", ["", "none"])
def test_no_strategy_returns_the_input_and_draws_nothing(nothing):
    x, generator = inputs(), gen()
    assert dsa(x, generator, nothing) is x and dsa(x, generator, nothing, "dc", shared=True) is x
    assert torch.equal(generator.get_state(), gen().get_state())


@pytest.mark.parametrize(
    ("strategy", "strengths", "words"),
    [
        ("flip_colour", "frepo", ["'flip_colour'", "'colour'", "flip, color, crop, rotate, translate, cutout"]),
        ("flip_scale", "frepo", ["'scale'", "frepo", "flip, color, crop, rotate, translate, cutout"]),
        (FREPO, "dc", ["'translate'", "dc", "color, crop, cutout, flip, scale, rotate"]),
        ("flip__crop", "dc", ["''", "dc"]),
        ("flip_none", "dc", ["'none'"]),
        ("Flip", "frepo", ["'Flip'"]),
        ("flip", "dsa", ["'dsa'", "frepo, dc"]),
        ("", "dsa", ["'dsa'", "frepo, dc"]),
    ],
)  # fmt: skip
def test_a_bad_strategy_is_refused(strategy, strengths, words):
    line = refuse(lambda: dsa_strategy(strategy, strengths), *words)
    assert refuse(lambda: dsa(inputs(), gen(), strategy, strengths)) == line


# ------------------------------------------------------------------------------------------------------- randomness


@every_operation
@pytest.mark.parametrize("shared", [False, True])
def test_a_seed_repeats(strengths, name, shared):
    x = inputs(20)
    ours = dsa(x, gen(1), name, strengths, shared)
    assert torch.equal(ours, dsa(x, gen(1), name, strengths, shared))
    others = [dsa(x, gen(seed), name, strengths, shared) for seed in range(2, 10)]
    assert not all(torch.equal(ours, other) for other in others)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    dsa(x, gen(1), name, strengths, shared)
    assert torch.equal(state, torch.get_rng_state())  # nothing but the generator is drawn from


@every_operation
def test_parameters_are_each_images_own_or_all_images_one(strengths, name):
    n = 40
    x = inputs(1, size=16).expand(n, -1, -1, -1)
    own = dsa(x, gen(1), name, strengths).flatten(1).unique(dim=0)
    kinds = {"flip": 2, "cutout": 25, "crop": 12 if strengths == "dc" else n}.get(name, n)
    assert len(own) >= kinds
    same = dsa(x, gen(1), name, strengths, shared=True)
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("strategy", "strengths"), [(FREPO, "frepo"), (DC, "dc")])
def test_siamese_batches_of_any_size_are_changed_alike(strategy, strengths):
    """What DSA needs: real and distilled images under the same operation with the same parameters."""
    x = inputs(9)
    for seed in range(30):
        many, few = (dsa(batch, gen(seed), strategy, strengths, shared=True) for batch in (x, x[4:7]))
        torch.testing.assert_close(few, many[4:7], rtol=0, atol=1e-13)


# -------------------------------------------------------------------------------------------------------- distributions


def uniform_in(values, low, high):
    """Bounds kept and nearly reached, mean and variance of a uniform distribution within four standard errors."""
    n, width = len(values), high - low
    assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
    assert values.min() < low + 0.01 * width and values.max() > high - 0.01 * width
    assert abs(values.mean() - (low + high) / 2) < 4 * width / math.sqrt(12 * n)
    assert abs(((values - (low + high) / 2) ** 2).mean() - width**2 / 12) < 4 * width**2 / math.sqrt(180 * n)


def independent(a, b):
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(len(a))


def ramps(n, size):
    """(n, 2, size, size): the row and the column of each pixel, counted from the centre."""
    place = torch.arange(size, dtype=F64) - (size - 1) / 2
    return torch.stack([place[:, None].expand(size, size), place.expand(size, size)]).expand(n, 2, size, size)


def reading(strengths, name, n=2000, size=32):
    """Where the middle of the output is read: its place (n, 2) and its derivative (n, place, by row or column)."""
    out = dsa(ramps(n, size), gen(), name, strengths)
    a = size // 2
    middle = out[:, :, a - 1 : a + 1, a - 1 : a + 1]  # far from any border
    by_row, by_column = middle[:, :, 1] - middle[:, :, 0], middle[:, :, :, 1] - middle[:, :, :, 0]
    return middle.mean((2, 3)), torch.stack([by_row.mean(2), by_column.mean(2)], 2)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("strengths", DSA)
def test_rotations_are_by_up_to_fifteen_degrees(strengths):
    place, by = reading(strengths, "rotate")
    close(place, torch.zeros_like(place))
    close(by @ by.mT, torch.eye(2, dtype=F64).expand_as(by))  # no stretching
    close(torch.linalg.det(by), torch.ones(len(by), dtype=F64))  # nor mirroring
    uniform_in(torch.rad2deg(torch.atan2(by[:, 0, 1], by[:, 0, 0])), -15, 15)


def test_translations_are_by_up_to_an_eighth():
    place, by = reading("frepo", "translate")
    close(by, torch.eye(2, dtype=F64).expand_as(by))
    for axis in range(2):
        uniform_in(place[:, axis], -4, 4)
    independent(*place.unbind(1))
    assert (place.frac().abs() > 1e-3).double().mean() > 0.99  # in parts of pixels


def test_frepos_crops_zoom_alike_in_and_out():
    size = 32
    place, by = reading("frepo", "crop", size=size)
    zoom = 1 / by[:, 0, 0]
    close(by, torch.eye(2, dtype=F64) / zoom[:, None, None])  # as much along both axes, no turning
    uniform_in(zoom.log(), math.log(0.8), math.log(1.25))
    room = (size / zoom - size).abs() / 2  # between the box that is read and the image, the one inside the other
    sure = room > 0.1
    for axis in range(2):
        uniform_in((place[:, axis] / room)[sure], -1, 1)
    independent(place[:, 0], place[:, 1])
    independent(zoom, place[:, 0])


def test_dcs_scales_are_each_axis_own():
    place, by = reading("dc", "scale")
    close(place, torch.zeros_like(place))
    close(by, torch.diag_embed(by.diagonal(dim1=1, dim2=2)))
    for axis in range(2):
        uniform_in(by[:, axis, axis], 1 / 1.2, 1.2)
    independent(by[:, 0, 0], by[:, 1, 1])


@pytest.mark.parametrize(("size", "most"), [(8, 1), (12, 2), (28, 4), (32, 4)])
def test_dcs_crops_are_whole_shifts_each_alike(size, most):
    n, count = 6000, (2 * most + 1) ** 2
    out = dsa(ramps(n, size) + 100, gen(), "crop", "dc")
    shift = (out[:, :, size // 2, size // 2] - 100.5).round().long()
    assert shift.abs().max() == most
    counts = torch.bincount((shift[:, 0] + most) * (2 * most + 1) + shift[:, 1] + most, minlength=count)
    freedom = count - 1
    chi_square = ((counts - n / count) ** 2 / (n / count)).sum().item()
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom)
    empty = (out == 0).all(1).sum((1, 2))  # the zeros that moved in
    assert torch.equal(empty, size**2 - (size - shift[:, 0].abs()) * (size - shift[:, 1].abs()))


@pytest.mark.parametrize(
    ("strengths", "size", "side", "first", "last"),
    [
        ("frepo", 8, 2, 0, 6),
        ("frepo", 28, 7, 0, 21),
        ("dc", 8, 4, -2, 6),
        ("dc", 9, 5, -2, 6),
        ("dc", 10, 5, -2, 7),
        ("dc", 28, 14, -7, 21),
    ],
)
def test_squares_are_cut_at_every_place_alike(strengths, size, side, first, last):
    """frepo's lie inside the image; dc's centres do, so that the border cuts a part off."""
    n = 3000
    kept = dsa(torch.ones(n, 2, size, size, dtype=F64), gen(), "cutout", strengths)
    assert set(kept.unique().tolist()) == {0.0, 1.0} and torch.equal(kept[:, 0], kept[:, 1])
    starts = []
    for axis in (2, 1):
        line = (kept[:, 0] == 0).any(axis)  # (n, size)
        length, top = line.sum(1), line.double().argmax(1)
        bottom = size - line.flip(1).double().argmax(1)
        assert torch.equal(bottom - top, length)  # one piece
        starts.append(torch.where(top == 0, bottom - side, top))  # of which rows above the border would be
        assert torch.equal(length, (starts[-1] + side).clamp(max=size) - starts[-1].clamp(min=0))
    assert torch.equal((kept[:, 0] == 0).sum((1, 2)), torch.stack([(s + side).clamp(max=size) - s.clamp(min=0)
                                                                   for s in starts]).prod(0))  # fmt: skip
    count = last - first + 1
    for start in starts:
        counts = torch.bincount(start - first, minlength=count)
        assert len(counts) == count
        chi_square = ((counts - n / count) ** 2 / (n / count)).sum().item()
        assert chi_square < count - 1 + 4.5 * math.sqrt(2 * (count - 1))
    independent(*(start.double() for start in starts))


@pytest.mark.parametrize("strengths", DSA)
def test_half_of_the_images_are_mirrored(strengths):
    n = 4000
    x = inputs(1, size=4).expand(n, -1, -1, -1)
    out = dsa(x, gen(), "flip", strengths)
    mirrored = (out == x.flip(3)).flatten(1).all(1)
    assert torch.equal(mirrored, (out != x).flatten(1).any(1))
    assert abs(mirrored.sum().item() - n / 2) < 4 * math.sqrt(n / 4)
    together = [bool((dsa(x[:3], gen(seed), "flip", strengths, True) != x[:3]).any()) for seed in range(400)]
    assert abs(sum(together) - 200) < 4 * math.sqrt(100)


@pytest.mark.parametrize(
    ("strengths", "brightness", "contrast", "saturation"),
    [("frepo", (-0.25, 0.25), (-0.25, 0.25), (-0.25, 0.25)), ("dc", (-0.5, 0.5), (0.5, 1.5), (0, 2))],
)
def test_colours_change_by_their_strengths(strengths, brightness, contrast, saturation):
    """Contrast takes a pixel's mean from the image's, saturation a channel from its pixel's mean; those two stay."""
    x = inputs(1, size=4).expand(2000, -1, -1, -1)
    out = dsa(x, gen(), "color", strengths)
    parts = []  # brightness, contrast, contrast times saturation
    means = [(y.mean((1, 2, 3)), y.mean(1), y) for y in (x, out)]
    parts.append(means[1][0] - means[0][0])
    for coarse, fine in ((0, 1), (1, 2)):
        away = [m[fine] - (m[0][:, None, None] if coarse == 0 else m[1][:, None]) for m in means]
        ratio = (away[1] / away[0]).flatten(1)
        close(ratio, ratio[:, :1].expand_as(ratio))
        parts.append(ratio[:, 0])
    parts[2] = parts[2] / parts[1]
    if strengths == "frepo":
        parts[1:] = [part.log() for part in parts[1:]]
    for part, bounds in zip(parts, (brightness, contrast, saturation), strict=True):
        uniform_in(part, *bounds)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        independent(parts[a], parts[b])


@pytest.mark.parametrize("strengths", DSA)
def test_grey_images_have_no_saturation(strengths):
    x = inputs(50, channels=1)
    out = dsa(x, gen(), "color", strengths)
    colour = dsa(x.expand(-1, 3, -1, -1), gen(), "color", strengths)
    close(colour, out.expand_as(colour))


# ------------------------------------------------------------------------------------------------------------ gradients


@every_operation
@pytest.mark.parametrize("shared", [False, True])
def test_every_operation_is_differentiable(strengths, name, shared):
    x = inputs(2, channels=2, size=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dsa(x, gen(4), name, strengths, shared), x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a batch on a GPU needs a GPU")
@every_operation
@pytest.mark.parametrize("shared", [False, True])
def test_on_a_gpu_it_is_the_cpus_and_waits_for_nothing(strengths, name, shared):
    x = inputs(size=32)
    expected = dsa(x, gen(1), name, strengths, shared)
    x = x.cuda()
    dsa(x, gen(1), name, strengths, shared)  # whatever is loaded the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = dsa(x, gen(1), name, strengths, shared)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ours.is_cuda
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-9)
