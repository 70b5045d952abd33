"""Image augmentation for whole batches on the device: crops and flips, cyclic shifts, the two views of self-supervised
training, and differentiable siamese augmentation (DSA).

Every random number comes from the CPU generator that is passed in, or from `counter_uniform`, so a run is the same on
every device. Shifts become one gather, boxes and warps one sampling grid: no loop over images, no synchronisation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run import UserError, seed_of

RATIO = 4 / 3  # of a random box's sides, at most, either way
GOLDEN, MIX_1, MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, without waiting for what a CUDA device still has to do (pageable memory is copied at once)."""
    return x.to(device, non_blocking=device.type == "cuda" and x.device.type == "cpu")


def uniform(n: int, low: float, high: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return upload(torch.rand(n, generator=generator) * (high - low) + low, device)  # (n,)


def scramble(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) of int64 words, which stand for 64 bits without a sign."""
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor  # the mask makes the shift one without a sign
    return z ^ ((z >> 31) & (2**33 - 1))


def counter_uniform(index: Tensor, count: int, *key) -> Tensor:
    """`count` numbers uniform in [0, 1) for each place in index (B,) int64: (B, count) float32 on its device.

    Row i depends on the key (`common.run.seed_of`) and on index[i] alone, its first numbers not on count. Multiples of
    2^-24, made by integer arithmetic: the same bits on every device, in any batch.
    """
    row = scramble(seed_of(*key) + (index + 1) * GOLDEN)  # (B,)
    column = torch.arange(1, count + 1, device=index.device) * GOLDEN
    return ((scramble(row[:, None] + column) >> 40) & (2**24 - 1)).float() * 2.0**-24


def crop_pad(size: int) -> int:
    """Pixels of zero padding for the field's random crop: 4 from 28 px on (KRR-ST's code), an eighth below."""
    return 4 if size >= 28 else max(1, size // 8)


def num_variants(size: int, flip: bool, pad: int | None = None) -> int:
    """Ways to crop and mirror an image: (2 pad + 1)^2 shifts, twice as many with `flip`; 162 at 32 px."""
    pad = crop_pad(size) if pad is None else pad
    return (2 * pad + 1) ** 2 * (2 if flip else 1)


def draw_variants(n: int, size: int, flip: bool, generator: torch.Generator, pad: int | None = None) -> Tensor:
    """Numbers of n random crops, each of num_variants(size, flip, pad) alike: (n,) int64 on the CPU.

    With shifts dy, dx in 0 .. 2 pad, where pad is the middle: (dy (2 pad + 1) + dx), with `flip` times 2, plus 1 for a
    mirrored image.
    """
    pad = crop_pad(size) if pad is None else pad
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    variant = dy * (2 * pad + 1) + dx
    if flip:
        variant = variant * 2 + (torch.rand(n, 1, generator=generator) < 0.5)
    return variant[:, 0]


def crop_variants(u: Tensor, size: int, flip: bool, pad: int | None = None) -> Tensor:
    """Numbers of random crops as `draw_variants` has them, from uniforms u (N, 3), multiples of 2^-24: (N,) int64."""
    pad = crop_pad(size) if pad is None else pad
    dy, dx = ((u[:, :2] * 2**24).long() * (2 * pad + 1) >> 24).unbind(1)  # exact, unlike the floor of a rounded product
    variant = dy * (2 * pad + 1) + dx
    return variant * 2 + (u[:, 2] < 0.5) if flip else variant


def gather(
    pixels: Tensor, index: Tensor, variant: Tensor | None = None, flip: bool = False, pad: int | None = None
) -> Tensor:
    """The images pixels[index], each zero-padded, cropped and mirrored as its variant says (None: as they are).

    pixels: (N, C, H, W), memory-mapped or on a device; index, variant: (B,), moved there; returns (B, C, H, W) of the
    same dtype. Only the batch is padded, never the set.
    """
    x = pixels[upload(index, pixels.device)]
    if variant is None:
        return x
    _, channels, height, width = x.shape
    pad = crop_pad(height) if pad is None else pad
    shift, columns = upload(variant, x.device)[:, None], torch.arange(width, device=x.device)
    if flip:
        shift, mirrored = shift // 2, shift % 2 == 1
        columns = torch.where(mirrored, columns.flip(0), columns)
    rows = torch.arange(height, device=x.device) + shift // (2 * pad + 1)  # (B, H)
    columns = columns + shift % (2 * pad + 1)  # (B, W)
    flat = rows[:, :, None] * (width + 2 * pad) + columns[:, None]  # (B, H, W), places in the padded image
    padded = F.pad(x, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, flat.flatten(1)[:, None].expand(-1, channels, -1)).view_as(x)


def crop_flip(x: Tensor, generator: torch.Generator, flip: bool, pad: int | None = None) -> Tensor:
    """Zero-pad, crop each image at its own shift, mirror each with chance 1/2 (if `flip`).

    x: (N, C, H, W), pixels or normalised; returns the same shape.
    """
    variant = draw_variants(len(x), x.shape[2], flip, generator, pad)
    return gather(x, torch.arange(len(x)), variant, flip, pad)


def cyclic_shift(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Roll each image by its own whole number of pixels, or all by one; what leaves on one side enters on the other.

    x: (N, C, H, W); down, right: (N,) or (1,) int64 of any sign, moved to x's device. Differentiable with respect to x.
    """
    height, width = x.shape[2:]
    rows, columns = (
        (torch.arange(size, device=x.device) - upload(shift, x.device)[:, None]) % size  # (N or 1, size)
        for size, shift in ((height, down), (width, right))
    )
    flat = rows[:, :, None] * width + columns[:, None]  # (N or 1, H, W)
    return x.flatten(2).gather(2, flat.flatten(1)[:, None].expand(*x.shape[:2], -1)).view(x.shape)


def resident(x: Tensor, device: torch.device, spare: int) -> Tensor:
    """The uint8 set on the device if that leaves `spare` bytes free, else as it is: then batches are moved instead."""
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] - spare
    else:
        room = 0 if device.type == "cpu" else 2**30  # others share their memory with the system and do not tell
    return x.to(device) if x.nbytes <= room else x


# ------------------------------------------------------------------------------------ views of self-supervised training


def boxes(u: Tensor, scale: tuple[float, float], ratio: float = RATIO) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random boxes from uniforms u (N, 4): top, left, height, width as fractions of the image, (N,) each.

    Their area is uniform in `scale`, width / height log-uniform in 1/ratio .. ratio. A box that is wider or higher than
    the image is clipped to it, as torchvision's fallback does on average (Teachers' departure 5).
    """
    area, shape, left, top = u.unbind(1)
    area = area * (scale[1] - scale[0]) + scale[0]
    shape = (shape * (2 * math.log(ratio)) - math.log(ratio)).exp()
    width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    return top * (1 - height), left * (1 - width), height, width


def resample(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, mirrored: Tensor, side: int | None = None
) -> Tensor:
    """A box of each image, resized to the whole (bilinear) and mirrored where `mirrored`; differentiable in x.

    x: (N, C, H, W). top, left, height, width: fractions of the image; mirrored: bool; each (N,), or (1,) for one box
    of the whole batch. side: of the result, which is square; None: the image's. An image's bits do not depend on the
    batch that it is in.
    """
    sign = torch.where(mirrored, -1.0, 1.0)
    axes = []  # of the grid, in -1 .. 1 over the image: F.affine_grid's, without its matrix product
    for size, slope, offset in (
        (x.shape[3], width * sign, 2 * left + width - 1),
        (x.shape[2], height, 2 * top + height - 1),
    ):
        out = side or size
        centres = torch.linspace(-1, 1, out, dtype=x.dtype, device=x.device) * (out - 1) / out
        axis = centres * slope.to(x.dtype)[:, None] + offset.to(x.dtype)[:, None]  # (N or 1, size)
        axes.append(axis.clamp(1 / size - 1, 1 - 1 / size))  # to the border's centres: border padding, which MPS lacks
    grid = torch.stack(torch.broadcast_tensors(axes[0][:, None], axes[1][:, :, None]), -1)  # (N or 1, H, W, 2)
    grid = grid.expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def resized_crop(
    x: Tensor, generator: torch.Generator, scale: tuple[float, float], flip: bool, side: int | None = None
) -> Tensor:
    """A random box of each image, area in `scale`, aspect ratio in 3/4 .. 4/3, resized (bilinear), half mirrored.

    x: (N, C, H, W); side: of the result, None: the image's. See `boxes`.
    """
    n = x.shape[0]
    u = torch.stack([uniform(n, 0, 1, generator, x.device) for _ in range(4)], 1)
    mirrored = torch.zeros(n, dtype=torch.bool, device=x.device)
    if flip:
        mirrored = uniform(n, 0, 1, generator, x.device) < 0.5
    return resample(x, *boxes(u, scale), mirrored, side)


def grayscale(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W): luma of ITU-R 601, as PIL and torchvision."""
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of pixels (N, 3, H, W) by `turns` (N,) of the circle, in the HSV hexcone."""
    high, low = x.amax(1), x.amin(1)
    chroma = (high - low).clamp(min=1e-8)
    r, g, b = x.unbind(1)
    hue = torch.where(
        high == r, ((g - b) / chroma) % 6, torch.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4)
    )
    hue = (hue / 6 + turns[:, None, None]) % 1
    k = (hue[:, None] * 6 + hue.new_tensor([5.0, 3.0, 1.0])[:, None, None]) % 6  # HSV to RGB, channel by channel
    return high[:, None] - (high - low)[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def colour_jitter(
    x: Tensor, generator: torch.Generator, p: float, brightness: float, contrast: float, saturation: float, hue: float
) -> Tensor:
    """Brightness, contrast, saturation, hue with chance p an image, factors per image, order drawn once a batch.

    x: pixels (N, C, H, W) in [0, 1]. One channel has neither saturation nor hue.
    """
    n = x.shape[0]
    use = (uniform(n, 0, 1, generator, x.device) < p)[:, None, None, None]

    def factor(strength: float) -> Tensor:
        return uniform(n, max(0.0, 1 - strength), 1 + strength, generator, x.device)[:, None, None, None]

    out = x
    for kind in torch.randperm(4, generator=generator).tolist():
        if kind == 0:
            out = out * factor(brightness)
        elif kind == 1:
            luma = grayscale(out) if x.shape[1] == 3 else out
            mean = luma.mean((1, 2, 3), keepdim=True)
            out = mean + (out - mean) * factor(contrast)
        elif kind == 2 and x.shape[1] == 3:
            grey = grayscale(out)
            out = grey + (out - grey) * factor(saturation)
        elif kind == 3 and x.shape[1] == 3:
            out = shift_hue(out, uniform(n, -hue, hue, generator, x.device))
        out = out.clamp(0, 1)
    return torch.where(use, out, x)


def gaussian_blur(x: Tensor, generator: torch.Generator, p: float, low: float, high: float) -> Tensor:
    """Each image of x (N, C, H, W) blurred with chance p, its sigma uniform in low .. high pixels.

    At the border the weights inside the image are scaled to sum to one.
    """
    n = len(x)
    sigma = uniform(n, low, high, generator, x.device)[:, None, None]
    use = (uniform(n, 0, 1, generator, x.device) < p)[:, None, None, None]

    def weights(size: int) -> Tensor:
        """(N, 1, size, size): row i holds what each pixel gives to pixel i."""
        at = torch.arange(size, dtype=torch.float32, device=x.device)
        return (-(at[:, None] - at).square() / (2 * sigma.square())).softmax(2)[:, None]

    return torch.where(use, weights(x.shape[2]) @ x @ weights(x.shape[3]).mT, x)


def ssl_view(
    x: Tensor,
    generator: torch.Generator,
    scale: tuple[float, float],
    flip: bool,
    *,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    blur: float = 0.0,
    solarise: float = 0.0,
    side: int | None = None,
) -> Tensor:
    """One view: crop and flip, colour jitter with chance 0.8, grayscale 0.2, blur and solarisation with those chances.

    x: pixels (N, C, H, W) in [0, 1]; returns pixels in [0, 1], of `side` px (None: the images'). scale: of the crop's
    area. jitter: of brightness, contrast, saturation, hue (solo-learn's CIFAR recipe). A blur's sigma is 0.1 to 2 px.
    """
    x = resized_crop(x, generator, scale, flip, side)
    brightness, contrast, saturation, hue = jitter
    x = colour_jitter(x, generator, 0.8, brightness, contrast, saturation, hue)
    if x.shape[1] == 3:
        grey = (uniform(len(x), 0, 1, generator, x.device) < 0.2)[:, None, None, None]
        x = torch.where(grey, grayscale(x).expand_as(x), x)
    if blur:
        x = gaussian_blur(x, generator, blur, 0.1, 2.0)
    if solarise:
        chosen = (uniform(len(x), 0, 1, generator, x.device) < solarise)[:, None, None, None]
        x = torch.where(chosen & (x >= 0.5), 1 - x, x)
    return x


def two_views(
    x: Tensor, generator: torch.Generator, scale: tuple[float, float], flip: bool, solarise: bool = True
) -> tuple[Tensor, Tensor]:
    """Two views of pixels (N, C, H, W): solarised with chance 0 and 0.2, as solo-learn's Barlow Twins on CIFAR."""
    view_1 = ssl_view(x, generator, scale, flip)
    return view_1, ssl_view(x, generator, scale, flip, solarise=0.2 if solarise else 0.0)


def small_side(size: int) -> int:
    """Pixels of multi-crop's small views: 96 of 224 (SwAV, DINO), as a multiple of 4, for images of `size` px."""
    return max(4, 4 * round(size * 96 / 224 / 4))


# ---------------------------------------------------------------------------------- differentiable siamese augmentation
# Every operation takes (x, generator, shared) and returns x changed, differentiable with respect to x.


def draw(x: Tensor, low: float, high: float, generator: torch.Generator, shared: bool) -> Tensor:
    """A number for each image of x, or one for all of them: (N or 1, 1, 1, 1), in x's dtype, at least float32."""
    numbers = uniform(1 if shared else len(x), low, high, generator, x.device)
    return numbers.to(torch.promote_types(x.dtype, torch.float32))[:, None, None, None]


def from_centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """How far the pixels' rows (H, 1) and columns (1, W) lie below and right of the image's centre, in pixels."""
    dtype, (height, width) = torch.promote_types(x.dtype, torch.float32), x.shape[2:]
    rows, columns = (torch.arange(size, dtype=dtype, device=x.device) - (size - 1) / 2 for size in (height, width))
    return rows[:, None], columns[None]


def sample(x: Tensor, down: Tensor, right: Tensor, replicate: bool) -> Tensor:
    """x read at other places (bilinear), `down` and `right` of its centre in pixels, each (N or 1, 1, H or 1, W or 1).

    Beyond the image its edge goes on (`replicate`) or all is 0.
    """
    height, width = x.shape[2:]
    if replicate:  # keeps to the centres of the border pixels: border padding, which MPS lacks
        down = down.clamp((1 - height) / 2, (height - 1) / 2)
        right = right.clamp((1 - width) / 2, (width - 1) / 2)
    grid = torch.stack(torch.broadcast_tensors(right * (2 / width), down * (2 / height)), -1)[:, 0]
    grid = grid.expand(len(x), height, width, 2)
    return F.grid_sample(x.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def scale_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """About the image's mean over channels and pixels."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * factor + mean


def scale_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """About each pixel's mean over channels: nothing changes where there is one channel."""
    mean = x.mean(1, keepdim=True)
    return (x - mean) * factor + mean


def dsa_flip(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    return torch.where(draw(x, 0, 1, generator, shared) < 0.5, x.flip(3), x)


def rotate(x: Tensor, generator: torch.Generator, shared: bool, replicate: bool) -> Tensor:
    """By up to 15 degrees either way, about the centre."""
    angle = draw(x, -math.pi / 12, math.pi / 12, generator, shared)
    (rows, columns), sin, cos = from_centre(x), angle.sin(), angle.cos()
    return sample(x, columns * sin + rows * cos, columns * cos - rows * sin, replicate)


def erase(x: Tensor, side: int, top: Tensor, left: Tensor) -> Tensor:
    """0 in the square of `side` pixels whose first row and column are given: (N or 1, 1, 1, 1) each."""
    rows, columns = torch.arange(x.shape[2], device=x.device)[:, None], torch.arange(x.shape[3], device=x.device)
    square = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return x.masked_fill(square, 0)


def frepo_color(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    """Brightness, contrast, saturation; both factors log-uniform."""
    x = x + draw(x, -0.25, 0.25, generator, shared)
    x = scale_contrast(x, draw(x, -0.25, 0.25, generator, shared).exp())
    return scale_saturation(x, draw(x, -0.25, 0.25, generator, shared).exp())


def frepo_crop(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    """Zoom by 0.8 .. 1.25, log-uniform: above 1 a box of the image fills the output, below 1 all of it lies inside."""
    height, width = x.shape[2:]
    zoom = draw(x, math.log(0.8), math.log(1.25), generator, shared).exp()
    down, right = (draw(x, -0.5, 0.5, generator, shared) * (size * zoom - size).abs() for size in (height, width))
    rows, columns = from_centre(x)
    return sample(x, (rows + down) / zoom, (columns + right) / zoom, replicate=True)


def frepo_rotate(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    return rotate(x, generator, shared, replicate=True)


def frepo_translate(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    """By up to an eighth of the image along each axis, not in whole pixels."""
    down, right = (draw(x, -size / 8, size / 8, generator, shared) for size in x.shape[2:])
    rows, columns = from_centre(x)
    return sample(x, rows + down, columns + right, replicate=True)


def frepo_cutout(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    """0 in a square a quarter as high as the image, fully inside it."""
    side = x.shape[2] // 4
    top, left = (draw(x, 0, size - side + 1, generator, shared).floor() for size in x.shape[2:])
    return erase(x, side, top, left)


def dc_color(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    """Brightness, saturation, contrast; both factors uniform, in 0 .. 2 and 0.5 .. 1.5."""
    x = x + draw(x, -0.5, 0.5, generator, shared)
    x = scale_saturation(x, draw(x, 0, 2, generator, shared))
    return scale_contrast(x, draw(x, 0.5, 1.5, generator, shared))


def dc_crop(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    """Shift by whole pixels, up to an eighth of the image along each axis, zeros moving in."""
    pad = int(x.shape[2] / 8 + 0.5)
    shift = draw_variants(1 if shared else len(x), x.shape[2], False, generator, pad)
    return gather(x, torch.arange(len(x)), shift.expand(len(x)), pad=pad)


def dc_cutout(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    """0 in a square half as high as the image, its centre anywhere in it: the border may cut a part off."""
    side = int(x.shape[2] / 2 + 0.5)
    places = [size + 1 - side % 2 for size in x.shape[2:]]  # centres: pixels if side is odd, else the lines between
    top, left = (draw(x, 0, count, generator, shared).floor() - side // 2 for count in places)
    return erase(x, side, top, left)


def dc_scale(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    """Reading positions stretched by 1/1.2 .. 1.2 along each axis on its own, zeros outside."""
    tall, wide = (draw(x, 1 / 1.2, 1.2, generator, shared) for _ in range(2))
    rows, columns = from_centre(x)
    return sample(x, rows * tall, columns * wide, replicate=False)


def dc_rotate(x: Tensor, generator: torch.Generator, shared: bool) -> Tensor:
    return rotate(x, generator, shared, replicate=False)


DSA = {
    "frepo": dict(
        flip=dsa_flip,
        color=frepo_color,
        crop=frepo_crop,
        rotate=frepo_rotate,
        translate=frepo_translate,
        cutout=frepo_cutout,
    ),
    "dc": dict(color=dc_color, crop=dc_crop, cutout=dc_cutout, flip=dsa_flip, scale=dc_scale, rotate=dc_rotate),
}


def dsa_strategy(strategy: str, strengths: str) -> list[str]:
    """The operations in a strategy such as "flip_color_crop_rotate_translate_cutout"; none in "" and "none".

    Raises UserError for an operation that `strengths` ("frepo" or "dc") does not have, and for other strengths.
    """
    if strengths not in DSA:
        raise UserError(f"DSA strengths {strengths!r}: not one of {', '.join(DSA)}; give one of these")
    names = [] if strategy in ("", "none") else strategy.split("_")
    for name in names:
        if name not in DSA[strengths]:
            raise UserError(
                f"DSA strategy {strategy!r}: {strengths} has no operation {name!r}; "
                f"join any of {', '.join(DSA[strengths])} by _, or give none"
            )
    return names


def dsa(x: Tensor, generator: torch.Generator, strategy: str, strengths: str = "frepo", shared: bool = False) -> Tensor:
    """One operation of the strategy, drawn uniformly for the whole batch, its parameters drawn for each image.

    x: (N, C, H, W), as the network takes it (normalised or whitened); returns the same shape and dtype, differentiable
    with respect to x. shared: all images get the same parameters, and two calls with equal generators the same
    operation and parameters whatever their N, which is the siamese augmentation of Zhao and Bilen 2021
    (arXiv:2102.08259). strengths: "dc" as in their code, "frepo" as in that of Zhou, Nezhadarya and Ba 2022
    (arXiv:2206.00719). Raises UserError as dsa_strategy does. On a CUDA device the gradient with respect to x of what
    turns, zooms or moves by parts of pixels is summed in no fixed order (grid_sample's).
    """
    names = dsa_strategy(strategy, strengths)
    if not names:
        return x
    name = names[torch.randint(len(names), (), generator=generator).item()]
    return DSA[strengths][name](x, generator, shared).to(x.dtype)
