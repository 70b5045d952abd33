"""A distilled set as a low-rank code: bases and coefficients of images and targets, fixed views, and what it costs.

After Boost-SSDD (Yu, Yao and Chiu, ICLR 2025, arXiv:2507.21455); README.md#boost_pca lists what its readable parts
leave open. With m images, A views beside the image itself, s the side of the bases' images and r = H / s:

    x = up_r(c_x b_x + mu_x)                    c_x (m, U), b_x (U, C s s), mu_x (C s s): normalised images (m, C, H, W)
    x_a = view_a(x)                             a = 1 .. A, for instance quarter turns
    y = c_y b_y + mu_y                          c_y (m, V), b_y (V, d), mu_y (d): targets
    y_a = (c_y + q_a(c_y)) b_y + mu_y           q_a a small network; or c_v[a] b_y + mu_y, c_v (A, m, V)

The bases start as principal components: `image_pca` and `feature_pca`, exact where the covariance fits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run import UserError, rng

LARGE = 4096  # dimensions up to which the covariance is formed and decomposed whole
VIEWS = {  # what --views names: views beside the image itself
    "none": (),
    "rotations": ("rot90", "rot180", "rot270"),
    "flips": ("hflip", "vflip"),
    "dihedral": ("rot90", "rot180", "rot270", "hflip", "vflip", "transpose", "antitranspose"),
    "corners": ("top_left", "top_right", "bottom_left", "bottom_right"),
    "tones": ("brighter", "darker", "flatter"),
}
COEFFICIENTS = ("c_x", "c_y", "c_v")
Chunks = Callable[[], Iterator[Tensor]]  # the rows of a matrix in parts (n_i, D), from the beginning at each call


# ----------------------------------------------------------------------------------------------------------------- PCA


@dataclass
class Pca:
    """Principal components of rows (n, D), float64 on the CPU."""

    mean: Tensor  # (D,)
    bases: Tensor  # (k, D) of unit length, the largest variance first; the largest entry of each is positive
    variances: Tensor  # (k,), of the scores, with n - 1
    total: float  # variance of the rows, over all D

    def scores(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, k)."""
        return (rows.double().cpu() - self.mean) @ self.bases.T

    def unexplained(self) -> float:
        """The share of the variance that the bases leave out: the reconstruction error relative to the mean's."""
        return 1 - float(self.variances.sum()) / self.total if self.total > 0 else 0.0


def block_sums(x: Tensor, r: int) -> Tensor:
    """uint8 (N, C, H, W) -> float64 (N, C (H / r) (W / r)): sums of r x r pixels, integers."""
    return F.avg_pool2d(x.double(), r, divisor_override=1).flatten(1)


def downsample(x: Tensor, mean: Tensor, std: Tensor, r: int) -> Tensor:
    """uint8 (N, C, H, W) -> float64 (N, C (H / r) (W / r)): normalised, each r x r block averaged.

    At r = 2 bilinear resizing is the same; above that it would look at the middle 2 x 2 pixels of a block alone
    (Boost-PCA's departure 8).
    """
    scale, offset = affine(mean, std, r, x[0, 0].numel() // r**2)
    return block_sums(x, r) * scale.to(x.device) + offset.to(x.device)


def affine(mean: Tensor, std: Tensor, r: int, pixels: int) -> tuple[Tensor, Tensor]:
    """scale, offset (C pixels,) that make normalised averages of sums of r x r pixels, float64."""
    mean, std = mean.double().cpu(), std.double().cpu()
    return (1 / (255 * r**2 * std)).repeat_interleave(pixels), (-mean / std).repeat_interleave(pixels)


def moments(chunks: Chunks) -> tuple[int, Tensor, Tensor]:
    """n, the sum (D,) and the sum of outer products (D, D) of all rows, float64, on the device of the rows.

    Of integers both are exact below 2^53, and then the same however the rows are divided.
    """
    n, total, products = 0, None, None
    for rows in chunks():
        rows = rows.double()
        part, outer = rows.sum(0), rows.T @ rows
        total, products = (part, outer) if n == 0 else (total + part, products.add_(outer))
        n += len(rows)
    return n, total, products


def principal(n: int, total: Tensor, products: Tensor, k: int, scale: Tensor, offset: Tensor) -> Pca:
    """The exact components of the rows `scale * row + offset`, from the moments of the rows."""
    mean = total / n
    covariance = (products - torch.outer(total, mean)) / (n - 1) * torch.outer(scale, scale)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    found = variances.flip(0)[:k].clamp(min=0), vectors.flip(1).T[:k].contiguous()
    return Pca(mean * scale + offset, signed(found[1]), found[0], float(covariance.trace()))


def randomised(chunks: Chunks, k: int, scale: Tensor, offset: Tensor, rounds: int = 6, spare: int = 20) -> Pca:
    """Components of the same rows by subspace iteration from a seeded start, for D too large for a covariance.

    Reads the rows rounds + 2 times. Leading components are exact for practical purposes, the last ones are not: on
    CIFAR-10 at D = 3072 the 200th variance was 8.5 % too low after four rounds.
    """
    n, total, squares = 0, 0, 0
    for rows in chunks():
        n, total, squares = n + len(rows), total + rows.double().sum(0), squares + rows.double().square().sum(0)
    mean = total / n
    variance = float(((squares - n * mean.square()) * scale.square()).sum() / (n - 1))
    q = min(k + spare, len(mean))
    subspace = torch.linalg.qr(torch.randn(len(mean), q, generator=rng("pca", q), dtype=torch.float64))[0]
    for _ in range(rounds + 1):
        subspace = torch.linalg.qr(subspace.to(mean.device))[0]
        image = torch.zeros_like(subspace)
        for rows in chunks():
            rows = (rows.double() - mean) * scale
            image += rows.T @ (rows @ subspace)
        subspace, last = image / (n - 1), subspace
    small = last.T @ subspace  # the covariance within the last subspace
    variances, vectors = torch.linalg.eigh((small + small.T) / 2)
    bases = (last @ vectors.flip(1)[:, :k]).T.contiguous()
    return Pca(mean * scale + offset, signed(bases), variances.flip(0)[:k].clamp(min=0), variance)


def signed(bases: Tensor) -> Tensor:
    """Each row with the sign that makes its largest entry positive: eigenvectors have none of their own."""
    largest = bases.gather(1, bases.abs().argmax(1, keepdim=True))
    return bases * largest.sign()


def pca(chunks: Chunks, k: int, scale: Tensor, offset: Tensor) -> Pca:
    """Exact up to LARGE dimensions, randomised above."""
    if len(scale) <= LARGE:
        found = principal(*moments(chunks), k, scale, offset)
    else:
        found = randomised(chunks, k, scale, offset)
    return Pca(found.mean.cpu(), found.bases.cpu(), found.variances.cpu(), found.total)


def image_pca(x: Tensor, mean: Tensor, std: Tensor, r: int, k: int, device: torch.device, chunk: int = 1024) -> Pca:
    """Components of all images, normalised and averaged over r x r pixels. x: uint8 (N, C, H, W), read in chunks.

    Pixels are summed as integers; normalisation, an affine map, is applied to their moments.
    """
    device = device if device.type == "cuda" else torch.device("cpu")  # others have no float64
    scale, offset = (part.to(device) for part in affine(mean, std, r, x[0, 0].numel() // r**2))
    return pca(lambda: (block_sums(part.to(device), r) for part in x.split(chunk)), k, scale, offset)


def feature_pca(f: Tensor, k: int, device: torch.device, chunk: int = 4096) -> Pca:
    """Components of features (N, d)."""
    device = device if device.type == "cuda" else torch.device("cpu")
    one = torch.ones(f.shape[1], dtype=torch.float64, device=device)
    return pca(lambda: (part.to(device) for part in f.split(chunk)), k, one, 0 * one)


# ---------------------------------------------------------------------------------------------------------------- views


def view(x: Tensor, name: str) -> Tensor:
    """A fixed view of normalised images (N, C, H, W), the same shape.

    Rotations (counter-clockwise) and mirrors move whole pixels. corners: a crop of 7/8 of the side (at least one pixel
    less), resized back; tones: half a standard deviation brighter or darker, or half the contrast.
    """
    side = x.shape[-1]
    small = min(side - 1, side * 7 // 8)
    if name in ("rot90", "rot180", "rot270"):
        return torch.rot90(x, int(name[3:]) // 90, (2, 3))
    if name in ("hflip", "vflip"):
        return x.flip(3 if name == "hflip" else 2)
    if name in ("transpose", "antitranspose"):
        return x.mT if name == "transpose" else x.mT.flip((2, 3))
    if name in VIEWS["corners"]:
        top = slice(0, small) if "top" in name else slice(side - small, side)
        left = slice(0, small) if "left" in name else slice(side - small, side)
        return F.interpolate(x[:, :, top, left], size=(side, side), mode="bilinear", align_corners=False)
    if name not in VIEWS["tones"]:
        raise ValueError(f"no view {name}")
    return x * 0.5 if name == "flatter" else x + (0.5 if name == "brighter" else -0.5)


def with_views(x: Tensor, names: tuple[str, ...]) -> Tensor:
    """The images, then each view of all of them: (N, C, H, W) -> ((1 + A) N, C, H, W)."""
    return torch.cat([x, *(view(x, name) for name in names)])


# ------------------------------------------------------------------------------------------------------------- decoding


def decode_images(c_x: Tensor, b_x: Tensor, mu_x: Tensor, shape: tuple[int, int, int], up: int) -> Tensor:
    """c_x (m, U), b_x (U, C s s), mu_x (C s s), shape (C, s, s) -> normalised images (m, C, up s, up s).

    Upsampling is bilinear with half-pixel centres.
    """
    x = (c_x @ b_x + mu_x).view(-1, *shape)
    return x if up == 1 else F.interpolate(x, scale_factor=up, mode="bilinear", align_corners=False)


def shift(c_y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, relu: bool) -> Tensor:
    """What the networks of all views add to the coefficients, (m, V) -> (A, m, V): w2 relu(w1 c + b1) + b2.

    w1 (A, h, V), b1 (A, h), w2 (A, V, h), b2 (A, V). Without the ReLU: an affine map of rank h, of equal storage.
    """
    hidden = c_y @ w1.mT + b1[:, None]
    return (hidden.relu() if relu else hidden) @ w2.mT + b2[:, None]


def coefficients(tensors: dict[str, Tensor], relu: bool) -> Tensor:
    """Coefficients of the targets of the images and of all their views, (1 + A, m, V)."""
    c_y = tensors["c_y"][None]
    if "c_v" in tensors:
        return torch.cat([c_y, tensors["c_v"]])
    if "w1" in tensors:
        return torch.cat([c_y, c_y + shift(c_y[0], *(tensors[key] for key in ("w1", "b1", "w2", "b2")), relu)])
    return c_y


def decode(
    tensors: dict[str, Tensor], shape: tuple[int, int, int], up: int, views: tuple[str, ...], relu: bool
) -> tuple[Tensor, Tensor]:
    """Normalised images ((1 + A) m, C, H, W) and their targets ((1 + A) m, d), differentiable in all tensors.

    tensors: b_x, c_x, mu_x, b_y, c_y, mu_y, and c_v or w1, b1, w2, b2 where there are views. All images come first,
    then the first view of all, and so on.
    """
    x = with_views(decode_images(*(tensors[key] for key in ("c_x", "b_x", "mu_x")), shape, up), views)
    return x, coefficients(tensors, relu).flatten(0, 1) @ tensors["b_y"] + tensors["mu_y"]


# -------------------------------------------------------------------------------------------------------------- storage


@dataclass
class Code:
    """A set as it is stored, and all that it takes to decode it."""

    tensors: dict[str, Tensor]  # float32; coefficients also float16, or int8 beside c_x_scale, c_y_scale, c_v_scale
    shape: tuple[int, int, int]  # (C, s, s), of the image bases
    up: int
    views: tuple[str, ...]
    relu: bool = True  # in the networks that predict the shift

    def check(self) -> None:
        """Raises ValueError where tensors and facts do not belong together."""
        views, own = len(self.views), {"c_v", "w1", "b1", "w2", "b2"} & self.tensors.keys()
        if (own not in ({"c_v"}, {"w1", "b1", "w2", "b2"})) if views else own:
            raise ValueError(f"targets of {views} views in {sorted(own)}")
        for key in own:
            if len(self.tensors[key]) != views:
                raise ValueError(f"{key} is of {len(self.tensors[key])} views, not of {views}")
        for key, value in self.tensors.items():
            if value.dtype == torch.int8 and f"{key}_scale" not in self.tensors:
                raise ValueError(f"no {key}_scale")

    def decode(self) -> tuple[Tensor, Tensor]:
        """Normalised images ((1 + A) m, C, H, W) and targets ((1 + A) m, d), float32: see decode."""
        return decode(dequantised(self.tensors), tuple(self.shape), self.up, tuple(self.views), self.relu)

    def facts(self) -> dict:
        """All but the tensors, as JSON can hold it."""
        return dict(shape=list(self.shape), up=self.up, views=list(self.views), relu=self.relu)


def quantised(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors with their coefficients as "fp32", "fp16" or "int8", the last with one scale a column.

    Raises UserError for coefficients that it cannot hold.
    """
    out = {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}
    for key in COEFFICIENTS:
        if key not in out or dtype == "fp32":
            continue
        largest = float(out[key].abs().max())
        if not largest <= (65504 if dtype == "fp16" else torch.finfo(torch.float32).max):
            raise UserError(f"--coefficients {dtype}: cannot hold a coefficient of {largest:g}; take fp32")
        if dtype == "fp16":
            out[key] = out[key].half()
        else:
            scale = (out[key].abs().amax(-2) / 127).clamp(min=1e-30)  # (U,), (V,), (A, V)
            out[key], out[f"{key}_scale"] = (out[key] / scale.unsqueeze(-2)).round().to(torch.int8), scale
    return out


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `quantised`, up to the rounding: float32 without scales."""
    out = {key: value.float() for key, value in tensors.items() if not key.endswith("_scale")}
    for key, scale in tensors.items():
        if key.endswith("_scale"):
            out[key.removesuffix("_scale")] *= scale.unsqueeze(-2)
    return out


def storage(tensors: dict[str, Tensor], shape: tuple[int, int, int], dim: int) -> dict[str, float]:
    """What a file of these tensors holds: {floats, bytes, pairs, pixels}.

    floats: numbers of any type: bases, coefficients, the components' means, networks and scales, but not "mean" and
    "std", the normalisation that uncompressed images need as well. bytes: of all tensors, by their types. pairs and
    pixels: the floats as a multiple of an uncompressed pair of image and target, and of an uncompressed image.
    shape: (C, H, W) of the images; dim: of the targets.
    """
    floats = sum(value.numel() for key, value in tensors.items() if key not in ("mean", "std"))
    image = shape[0] * shape[1] * shape[2]
    size = sum(value.nbytes for value in tensors.values())
    return dict(floats=floats, bytes=size, pairs=floats / (image + dim), pixels=floats / image)
