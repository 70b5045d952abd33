"""Image augmentation for whole batches on the device: crops and flips, and the two views of self-supervised training.

Every random number comes from the CPU generator that is passed in, so a run is the same on every device. Shifts become
one gather and boxes one sampling grid: no loop over images, no synchronisation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, without waiting for what a CUDA device still has to do (pageable memory is copied at once)."""
    return x.to(device, non_blocking=device.type == "cuda" and x.device.type == "cpu")


def uniform(n: int, low: float, high: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return upload(torch.rand(n, generator=generator) * (high - low) + low, device)  # (n,)


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


def resident(x: Tensor, device: torch.device, spare: int) -> Tensor:
    """The uint8 set on the device if that leaves `spare` bytes free, else as it is: then batches are moved instead."""
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] - spare
    else:
        room = 0 if device.type == "cpu" else 2**30  # others share their memory with the system and do not tell
    return x.to(device) if x.nbytes <= room else x


# ------------------------------------------------------------------------------------ views of self-supervised training


def resized_crop(x: Tensor, generator: torch.Generator, scale: tuple[float, float], flip: bool) -> Tensor:
    """A random box of each image, area in `scale`, aspect ratio in 3/4 .. 4/3, resized back (bilinear), half mirrored.

    x: (N, C, H, W). A box wider than the image is clipped to it, as torchvision's fallback does on average.
    """
    n = x.shape[0]
    area = uniform(n, *scale, generator, x.device)
    ratio = uniform(n, -0.2876820724, 0.2876820724, generator, x.device).exp()  # log-uniform in 3/4 .. 4/3
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left = uniform(n, 0, 1, generator, x.device) * (1 - width)
    top = uniform(n, 0, 1, generator, x.device) * (1 - height)
    sign = torch.ones_like(width)
    if flip:
        sign = torch.where(uniform(n, 0, 1, generator, x.device) < 0.5, -sign, sign)
    theta = x.new_zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * sign, 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    inside = x.new_tensor([1 - 1 / x.shape[3], 1 - 1 / x.shape[2]])  # centres of the border pixels
    grid = grid.clamp(-inside, inside)  # is border padding, which MPS lacks
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


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


def ssl_view(x: Tensor, generator: torch.Generator, scale: tuple[float, float], flip: bool, solarise: float) -> Tensor:
    """One view of solo-learn's CIFAR recipe: crop, flip, jitter, grayscale, solarise with chance `solarise`; no blur.

    x: pixels (N, C, H, W) in [0, 1]; returns pixels in [0, 1].
    """
    x = resized_crop(x, generator, scale, flip)
    x = colour_jitter(x, generator, p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    if x.shape[1] == 3:
        grey = (uniform(x.shape[0], 0, 1, generator, x.device) < 0.2)[:, None, None, None]
        x = torch.where(grey, grayscale(x).expand_as(x), x)
    if solarise:
        chosen = (uniform(x.shape[0], 0, 1, generator, x.device) < solarise)[:, None, None, None]
        x = torch.where(chosen & (x >= 0.5), 1 - x, x)
    return x


def two_views(
    x: Tensor, generator: torch.Generator, scale: tuple[float, float], flip: bool, solarise: bool = True
) -> tuple[Tensor, Tensor]:
    """Two views of pixels (N, C, H, W): solarised with chance 0 and 0.2, as solo-learn's Barlow Twins on CIFAR."""
    view_1 = ssl_view(x, generator, scale, flip, 0.0)
    return view_1, ssl_view(x, generator, scale, flip, 0.2 if solarise else 0.0)
