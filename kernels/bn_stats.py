"""Frozen BatchNorm that also says how far the statistics of its input are from the frozen ones, with the gradient.

For each group of images (x the BatchNorm's input, m and v its mean and biased variance per channel over the group's
images and pixels, μ, σ², γ, β and eps the frozen layer's):

    y = γ (x − μ) / sqrt(σ² + eps) + β                    BatchNorm in eval mode
    term = ||v − σ²|| + ||m − μ||                         Euclidean norms over the channels, not squared

SRe²L (Yin et al. 2023, arXiv:2306.13092) and SC-DD (Zhou et al. 2024, arXiv:2404.07976) recover images by the sum of
such terms. With M = images · pixels of a group, s = γ / sqrt(σ² + eps), and g_y and w the gradients of y and term, that
of the input is one elementwise pass, which the backward pass of a frozen BatchNorm is anyway:

    g_x = s g_y + w (offset + slope (x − μ))
    slope = 2 (v − σ²) / (M ||v − σ²||)       offset = (m − μ) / (M ||m − μ||) − slope (m − μ)

A norm that is 0 has gradient 0. Nothing but x and vectors over the channels is kept for it.

Precision: float32 inside (float64 for float64 inputs), also where x has half precision. What is summed is x − μ and its
square, so that v has a relative error of about u (1 + (m − μ)² / v), u = 2⁻²⁴, however far from 0 μ is. Backward, the
kernel has slope (x − μ); torch has slope x − slope μ, one pass less, with an error of u |slope x|.

Under torch.compile the torch backend is the same closed form in plain operations (`Traced`), which Inductor fuses with
what stands around them; a custom op would be a wall. Elsewhere it is a custom op.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import DTYPES, check_backend, jit, tl, triton, use_triton
from .gram import _processors

CACHED = 2**18  # entries on which the CPU works at a time, so that the differences from μ stay in its cache


def bn_stats_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """What `bn_stats` must equal: the layer, and what a forward hook on it computes by autograd, in x.dtype."""
    y = F.batch_norm(x, mean, var, weight, bias, eps=eps)
    terms = []
    for part in x.chunk(groups):
        rows = part.permute(1, 0, 2, 3).reshape(part.shape[1], -1)
        terms.append((var - rows.var(1, correction=0)).norm() + (mean - part.mean((0, 2, 3))).norm())
    return y, torch.stack(terms)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(device: torch.device) -> torch.dtype:
    """The dtype of sums of sums: there are few."""
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(G B, C, H, W) -> (G, B, C, H, W), a view."""
    return x.unflatten(0, (groups, -1))


def _channels(v: Tensor) -> Tensor:
    """(…, C) -> (…, 1, C, 1, 1), to stand beside images by group."""
    return v[..., None, :, None, None]


def is_channels_last(x: Tensor) -> bool:
    """Whether the kernels treat x as a (N H W, C) matrix; a tensor that is both is contiguous to them."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------- kernels
# A program works on tiles (OUTER, INNER) of one group. Where x is channels-last (LAST), a tile is rows of the matrix
# (B H W, C) by channels; else it is images by pixels, of one channel. So both are read along the memory.


@jit(do_not_specialize=("share",))
def _bn_stats_kernel(
    x, weight, bias, mean, var, y, sums, outer, pixels, channels, share,
    EPS: tl.constexpr, LAST: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid (channels, or tiles of them, groups, split): y, and the sums of x − μ and its square over `share` rows.

    The sums go to sums (split, G, 2, C). outer: rows or images of a group.
    """
    tile = tl.program_id(0)
    group = tl.program_id(1)
    i = tl.arange(0, INNER)
    r = tl.arange(0, OUTER)
    if LAST:
        c = tile * INNER + i
        known = c < channels
        width, first_column, last_column, row, start = channels, tile * INNER, tile * INNER + 1, channels, 0
    else:
        c = tile
        known = tile < channels  # always
        width, first_column, last_column, row, start = pixels, 0, pixels, channels * pixels, tile * pixels
    mu = tl.load(mean + c, mask=known, other=0.0)
    scale = 1.0 / tl.sqrt(tl.load(var + c, mask=known, other=1.0) + EPS)
    if WEIGHT:
        scale *= tl.load(weight + c, mask=known, other=0.0)
    shift = scale * 0.0
    if BIAS:
        shift = tl.load(bias + c, mask=known, other=0.0)
    if LAST:
        mu, scale, shift = mu[None, :], scale[None, :], shift[None, :]
    begin = group.to(tl.int64) * outer * row + start
    p = tl.zeros((OUTER, INNER), SUM)
    q = tl.zeros((OUTER, INNER), SUM)
    first = tl.program_id(2).to(tl.int64) * share
    last = tl.minimum(first + share, outer)
    for o in range(first, last, OUTER):
        at = begin + o * row
        for column in range(first_column, last_column, INNER):
            mask = (r < last - o)[:, None] & (column + i < width)[None, :]
            step = r[:, None] * row + (column + i)[None, :]
            shifted = tl.load(x + at + step, mask=mask, other=0.0).to(SUM) - mu
            tl.store(y + at + step, (scale * shifted + shift).to(y.dtype.element_ty), mask=mask)
            shifted = tl.where(mask, shifted, 0.0)
            p += shifted
            q += shifted * shifted
    into = sums + (tl.program_id(2) * tl.num_programs(1) + group) * 2 * channels + c
    if LAST:
        tl.store(into, tl.sum(p, 0), mask=known)
        tl.store(into + channels, tl.sum(q, 0), mask=known)
    else:
        tl.store(into, tl.sum(tl.sum(p, 1), 0))
        tl.store(into + channels, tl.sum(tl.sum(q, 1), 0))


@jit(do_not_specialize=("split",))
def _bn_stats_term_kernel(
    sums, mean, var, term, offset, slope, m, channels, split,
    SHARES: tl.constexpr, CHANNELS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid (groups,): adds the sums of the shares, in a fixed order; term, offset and slope as `_term` has them.

    CHANNELS: a power of two, `channels` or more. In float64, of which there is little to do.
    """
    group = tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    s = tl.arange(0, SHARES)
    known = c < channels
    p = tl.zeros((SHARES, CHANNELS), tl.float64)
    q = tl.zeros((SHARES, CHANNELS), tl.float64)
    for s_0 in range(0, split, SHARES):
        at = ((s_0 + s) * tl.num_programs(0) + group)[:, None] * 2 * channels + c[None, :]
        mask = (s < split - s_0)[:, None] & known[None, :]
        p += tl.load(sums + at, mask=mask, other=0.0)
        q += tl.load(sums + at + channels, mask=mask, other=0.0)
    d_mean = tl.sum(p, 0) / m
    d_var = tl.sum(q, 0) / m - d_mean * d_mean - tl.load(var + c, mask=known, other=0.0)
    mean_norm = tl.sqrt(tl.sum(d_mean * d_mean, 0))
    var_norm = tl.sqrt(tl.sum(d_var * d_var, 0))
    tl.store(term + group, (mean_norm + var_norm).to(SUM))
    steep = 2.0 * d_var / (m * tl.where(var_norm == 0, 1.0, var_norm))
    flat = d_mean / (m * tl.where(mean_norm == 0, 1.0, mean_norm)) - steep * d_mean
    tl.store(slope + group * channels + c, steep.to(SUM), mask=known)
    tl.store(offset + group * channels + c, flat.to(SUM), mask=known)


@jit
def _bn_stats_backward_kernel(
    d_y, d_term, x, weight, mean, var, offset, slope, d_x, outer, pixels, channels,
    EPS: tl.constexpr, LAST: tl.constexpr, WEIGHT: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows or images, tiles of channels or channels, groups): d_x; x, d_y and d_x have one layout."""
    tile = tl.program_id(1)
    group = tl.program_id(2)
    i = tl.arange(0, INNER)
    r = tl.arange(0, OUTER)
    if LAST:
        c = tile * INNER + i
        known = c < channels
        width, first_column, last_column, row, start = channels, tile * INNER, tile * INNER + 1, channels, 0
    else:
        c = tile
        known = tile < channels
        width, first_column, last_column, row, start = pixels, 0, pixels, channels * pixels, tile * pixels
    mu = tl.load(mean + c, mask=known, other=0.0)
    scale = 1.0 / tl.sqrt(tl.load(var + c, mask=known, other=1.0) + EPS)
    if WEIGHT:
        scale *= tl.load(weight + c, mask=known, other=0.0)
    w = tl.load(d_term + group)
    flat = w * tl.load(offset + group * channels + c, mask=known, other=0.0)
    steep = w * tl.load(slope + group * channels + c, mask=known, other=0.0)
    if LAST:
        mu, scale, flat, steep = mu[None, :], scale[None, :], flat[None, :], steep[None, :]
    o = tl.program_id(0).to(tl.int64) * OUTER
    at = (group.to(tl.int64) * outer + o) * row + start
    for column in range(first_column, last_column, INNER):
        mask = (r < outer - o)[:, None] & (column + i < width)[None, :]
        step = r[:, None] * row + (column + i)[None, :]
        shifted = tl.load(x + at + step, mask=mask, other=0.0).to(SUM) - mu
        value = scale * tl.load(d_y + at + step, mask=mask, other=0.0).to(SUM) + flat + steep * shifted
        tl.store(d_x + at + step, value.to(d_x.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------------------------------------- launch
# Chosen for registers without spills on sm_80 and sm_90, and not yet by timing.
TILE, WARPS = 2048, 4  # entries of a tile
WIDEST = {True: 64, False: 1024}  # at most so many channels (channels-last) or pixels (else) of a tile
SUMMED, SUM_WARPS = 2048, 8  # entries of a tile of sums
PER_PROCESSOR = 4  # programs


def tile_for(x: Tensor) -> tuple[int, int]:
    """OUTER, INNER."""
    last = is_channels_last(x)
    inner = min(triton.next_power_of_2(x.shape[1] if last else x[0, 0].numel()), WIDEST[last])
    return TILE // inner, inner


def split_for(across: int, tiles: int, processors: int) -> int:
    """How many programs share the `tiles` tiles of rows or images of one of `across` tiles of channels and groups.

    About PER_PROCESSOR programs for each processor, but none without a tile.
    """
    wanted = max(1, PER_PROCESSOR * processors // across)
    return triton.cdiv(tiles, triton.cdiv(tiles, wanted))


def _sizes(x: Tensor, groups: int) -> tuple[bool, int, int]:
    """Whether x is channels-last, the rows or images of a group, and the pixels."""
    last, pixels = is_channels_last(x), x[0, 0].numel()
    images = len(x) // groups
    return last, images * pixels if last else images, pixels


def launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, groups: int,
    *, tile: tuple[int, int] | None = None, split: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, term, offset and slope by the kernels, without checks. tile and split are for tests and measurements."""
    channels = x.shape[1]
    last, outer, pixels = _sizes(x, groups)
    rows, columns = tile or tile_for(x)
    across = triton.cdiv(channels, columns) if last else channels
    tiles = triton.cdiv(outer, rows)
    split = split_for(across * groups, tiles, _processors(x.device)) if split is None else split
    y, sums = torch.empty_like(x), mean.new_empty(split, groups, 2, channels)
    term, (offset, slope) = mean.new_empty(groups), (mean.new_empty(groups, channels) for _ in range(2))
    total = tl.float64 if mean.dtype == torch.float64 else tl.float32
    at_once = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x):
        _bn_stats_kernel[(across, groups, split)](
            x, weight, bias, mean, var, y, sums, outer, pixels, channels, triton.cdiv(tiles, split) * rows,
            EPS=eps, LAST=last, WEIGHT=weight is not None, BIAS=bias is not None, OUTER=rows, INNER=columns, SUM=total,
            num_warps=WARPS,
        )  # fmt: skip
        _bn_stats_term_kernel[(groups,)](
            sums, mean, var, term, offset, slope, x.numel() // (groups * channels), channels, split,
            SHARES=max(1, SUMMED // at_once), CHANNELS=at_once, SUM=total, num_warps=SUM_WARPS,
        )  # fmt: skip
    return y, term, offset, slope


def launch_backward(
    d_y: Tensor, d_term: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, offset: Tensor,
    slope: Tensor, eps: float, *, tile: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of x by the kernel, without checks. tile is for tests and measurements."""
    groups, channels = slope.shape
    last, outer, pixels = _sizes(x, groups)
    d_y = d_y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    d_term = d_term.contiguous()  # of a sum, it is one number expanded
    rows, columns = tile or tile_for(x)
    d_x = torch.empty_like(x)
    grid = triton.cdiv(outer, rows), triton.cdiv(channels, columns) if last else channels, groups
    with torch.cuda.device_of(x):
        _bn_stats_backward_kernel[grid](
            d_y, d_term, x, weight, mean, var, offset, slope, d_x, outer, pixels, channels,
            EPS=eps, LAST=last, WEIGHT=weight is not None, OUTER=rows, INNER=columns,
            SUM=tl.float64 if mean.dtype == torch.float64 else tl.float32, num_warps=WARPS,
        )  # fmt: skip
    return d_x


# ---------------------------------------------------------------------------------------------------------- torch twin


def _scale(weight: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """s (C,)."""
    return torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight


def _sums(x: Tensor, mean: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Σ (x − μ) and Σ (x − μ)², (G, C), of each group."""
    count, wide = len(x) // groups, _wide(x.device)
    if x.device.type != "cpu":  # few launches, whatever the number of groups
        shifted = _by_group(x, groups) - _channels(mean)
        return shifted.sum((1, 3, 4)).to(wide), shifted.square_().sum((1, 3, 4)).to(wide)
    p, q = (torch.zeros(groups, x.shape[1], dtype=wide, device=x.device) for _ in range(2))
    at_once = max(1, CACHED // x[0].numel())
    for group, images in enumerate(x.split(count)):
        for part in images.split(at_once):
            shifted = part - _channels(mean)[0]  # in mean.dtype
            p[group] += shifted.sum((0, 2, 3))
            q[group] += shifted.square_().sum((0, 2, 3))
    return p, q


def _term(p: Tensor, q: Tensor, var: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """term (G,), offset and slope (G, C), of the sums over m entries."""
    d_mean = p / m
    d_var = q / m - d_mean.square() - var
    mean_norm, var_norm = (d.norm(dim=1, keepdim=True) for d in (d_mean, d_var))
    slope = 2 * d_var / (m * torch.where(var_norm == 0, 1, var_norm))
    offset = d_mean / (m * torch.where(mean_norm == 0, 1, mean_norm)) - slope * d_mean
    return (mean_norm + var_norm)[:, 0], offset, slope


# --------------------------------------------------------------------------------------------------------------- the op


@torch.library.custom_op("kernels::bn_stats", mutates_args=())
def _bn_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, groups: int,
    by_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y and term; for the backward offset and slope (G, C). The vectors have the working dtype."""
    if by_kernel:
        return launch(x, weight, bias, mean, var, eps, groups)
    y = F.batch_norm(x, mean, var, weight, bias, eps=eps)
    p, q = _sums(x, mean, groups)
    term, offset, slope = _term(p, q, var, x.numel() // (groups * x.shape[1]))
    return y, term.to(mean.dtype), offset.to(mean.dtype), slope.to(mean.dtype)


@_bn_stats.register_fake
def _(x, weight, bias, mean, var, eps, groups, by_kernel):
    per_channel = [mean.new_empty(groups, x.shape[1]) for _ in range(2)]
    return torch.empty_like(x), mean.new_empty(groups), *per_channel


@torch.library.custom_op("kernels::bn_stats_backward", mutates_args=())
def _bn_stats_backward(
    d_y: Tensor, d_term: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, offset: Tensor,
    slope: Tensor, eps: float, by_kernel: bool,
) -> Tensor:  # fmt: skip
    if by_kernel:
        return launch_backward(d_y, d_term, x, weight, mean, var, offset, slope, eps)
    groups = len(slope)
    slope = d_term[:, None] * slope
    offset = d_term[:, None] * offset - slope * mean
    out = torch.empty_like(x, dtype=mean.dtype)
    into = _by_group(out, groups)
    torch.addcmul(_channels(offset), _channels(slope), _by_group(x, groups), out=into)
    into.addcmul_(_channels(_scale(weight, var, eps)), _by_group(d_y, groups))
    return out.to(x.dtype)


@_bn_stats_backward.register_fake
def _(d_y, d_term, x, weight, mean, var, offset, slope, eps, by_kernel):
    return torch.empty_like(x)


def _setup(ctx, inputs, output):
    x, weight, _, mean, var, ctx.eps, _, ctx.by_kernel = inputs
    _, _, offset, slope = output
    ctx.mark_non_differentiable(offset, slope)
    ctx.save_for_backward(x, weight, mean, var, offset, slope)


def _autograd(ctx, d_y, d_term, *_):
    d_x = _bn_stats_backward(d_y, d_term, *ctx.saved_tensors, ctx.eps, ctx.by_kernel)
    return d_x, None, None, None, None, None, None, None


_bn_stats.register_autograd(_autograd, setup_context=_setup)


class Traced(torch.autograd.Function):
    """The torch backend for torch.compile: the same arithmetic in operations that Inductor fuses.

    Autograd of the forward pass alone would leave Inductor a longer backward pass, and maps of differences to keep:
    an iteration of SC-DD's recovery took a fifth more time.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, groups):
        shifted = _by_group(x, groups).to(mean.dtype) - _channels(mean)
        p, q = shifted.sum((1, 3, 4)), shifted.square().sum((1, 3, 4))
        term, offset, slope = _term(p, q, var, x.numel() // (groups * x.shape[1]))
        ctx.save_for_backward(x, _scale(weight, var, eps), mean, offset, slope)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), term

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y, d_term):
        x, scale, mean, offset, slope = ctx.saved_tensors
        slope = d_term[:, None] * slope
        offset = d_term[:, None] * offset - slope * mean
        x, d_y = (_by_group(v, len(slope)) for v in (x, d_y))
        d_x = _channels(offset) + _channels(slope) * x + _channels(scale) * d_y
        return d_x.flatten(0, 1).to(x.dtype), None, None, None, None, None, None


# -------------------------------------------------------------------------------------------------------------- public


def bn_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *, groups: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A frozen BatchNorm of x, and for each group of images the distance of their statistics from the frozen ones.

    x (G B, C, H, W) float64, float32, bfloat16 or float16, G = groups of B consecutive images; mean and var (C,), the
    running statistics; weight and bias (C,), or None. Returns y, of x's shape and dtype, and term (G,), float64 for
    float64 x, else float32: ||var − v|| + ||mean − m|| with the group's own mean m and biased variance v.
    y is channels-last where x is, else contiguous; other layouts are copied first.
    Differentiable once, with respect to x: weight, bias, mean and var are constants and get no gradient.
    ValueError names the argument that does not fit.
    """
    _check(x, weight, bias, mean, var, eps, groups)
    check_backend(backend, x.device.type, x.device.index)
    if not is_channels_last(x):
        x = x.contiguous()
    work = _work_dtype(x)
    weight, bias, mean, var = (v if v is None else v.detach().to(work).contiguous() for v in (weight, bias, mean, var))
    if torch.compiler.is_compiling() and backend != "triton":
        return Traced.apply(x, weight, bias, mean, var, eps, groups)
    size = dict(n=len(x), c=x.shape[1], pixels=x[0, 0].numel(), last=int(is_channels_last(x)))
    by_kernel = use_triton("bn_stats", backend, "fp64" if work == torch.float64 else "fp32", x.device, **size)
    y, term, _, _ = _bn_stats(x, weight, bias, mean, var, eps, groups, by_kernel)
    return y, term


def _check(x, weight, bias, mean, var, eps, groups) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"x must have shape (N, C, H, W), none of them 0, got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    for name, v in (("weight", weight), ("bias", bias), ("mean", mean), ("var", var)):
        if v is None and name in ("weight", "bias"):
            continue
        if not isinstance(v, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(v).__name__}")
        if v.shape != x.shape[1:2]:
            raise ValueError(f"{name} must have shape ({x.shape[1]},), one number for each channel of x,"
                             f" got {tuple(v.shape)}")  # fmt: skip
        if v.dtype not in DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {v.dtype}")
        if v.device != x.device:
            raise ValueError(f"{name} is on {v.device}, but x is on {x.device}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a number of at least 0, got {eps}")
    if not isinstance(groups, int) or groups < 1 or len(x) % groups:
        raise ValueError(f"groups must divide the {len(x)} images of x, got {groups}")
