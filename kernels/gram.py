"""Gram matrices: of one set of rows, exactly symmetric, of two, or both in one launch.

    gram(x)             = x xᵀ           (…, n, d) -> (…, n, n), bitwise symmetric
    gram(x, y)          = x yᵀ           (…, n, d), (…, m, d) -> (…, n, m)
    gram_pair(f_s, f_t) = f_s f_sᵀ, f_t f_sᵀ

The kernel computes the tiles on and below the diagonal of f_s f_sᵀ, writes each one twice, and, in the same launch,
all tiles of f_t f_sᵀ. Where there are too few tiles to fill the GPU, the columns are split: the parts of a tile go to a
workspace and a second launch adds them in a fixed order, so results are the same bits every time. Inputs are read in
their own dtype and with their own row stride.

    precision   what multiplies
    fp64        float64 tensor cores; float32 inputs are cast in registers
    fp32        three TF32 products with float32 sums (float32 inputs), or the half inputs' own exact products
    ieee        float32 multiply and add

Precision and backends: backend.py. When torch is the faster one: kernels/README.md.

Each op is a `torch.library.custom_op`, so that torch.compile sees one node, with its backward as a second op that has
no derivative of its own: differentiating twice raises instead of being silently wrong.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import (
    INTERPRETED,
    check_backend,
    check_like,
    check_matrix,
    dtype_of,
    exact_products,
    jit,
    precision_for,
    tl,
    triton,
    use_triton,
)


class Config(NamedTuple):
    """Of one compiled kernel: a program computes tile × tile entries, depth columns at a time."""

    tile: int
    depth: int
    num_warps: int
    num_stages: int


# Chosen for registers without spills on sm_80 and sm_90 (tests/test_compile.py), not yet by timing.
CONFIGS = {
    "fp64": Config(64, 16, 4, 3),
    "tf32x3": Config(64, 32, 8, 3),
    "native": Config(128, 64, 8, 3),
    "ieee": Config(64, 16, 8, 3),
}
NATIVE_UNALIGNED = Config(64, 32, 4, 3)  # two-byte loads take more registers
# Of a thread: named where the compiler, left alone, aims at more programs for a processor and spills a few bytes.
MAX_REGISTERS = {"fp64": 255, "ieee": 255}
FINALIZE_ROWS, FINALIZE_WARPS = 16, 4
HALF = (torch.bfloat16, torch.float16)


def gram_ref(x: Tensor, y: Tensor | None = None) -> Tensor:
    """What `gram` must equal."""
    return x @ (x if y is None else y).mT


# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def _lower_tile(t):
    """Row and column of the t-th tile on or below the diagonal: 00, 10, 11, 20, …"""
    i = ((tl.sqrt((8 * t + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)  # the square root is rounded: at most one off
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    return i, t - i * (i + 1) // 2


@jit
def _add_product(acc, a, b, one, MODE: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a bᵀ. Sums have two levels, so that their error grows with the number of blocks, not of columns."""
    if MODE == "fp64":
        return tl.dot(a.to(tl.float64), tl.trans(b).to(tl.float64), acc, input_precision="ieee", out_dtype=tl.float64)
    elif INTERPRETED:  # it multiplies the bit patterns of bf16, and knows no tf32x3
        return tl.dot(a.to(tl.float32), tl.trans(b).to(tl.float32), acc, input_precision="ieee")
    elif MODE == "native":  # exact products; times a run-time 1, or the compiler folds both sums into one long chain
        return tl.dot(a, tl.trans(b), input_precision="ieee") * one + acc
    elif MODE == "tf32x3":
        return tl.dot(a, tl.trans(b), acc, input_precision="tf32x3")
    else:
        return tl.dot(a.to(tl.float32), tl.trans(b).to(tl.float32), acc, input_precision="ieee")


@jit(do_not_specialize=("m", "n", "tiles"))
def _gram_kernel(
    f_s, f_t, k_ss, k_ts, partial, one, plus, m, n, d, s_row, t_row, s_batch, t_batch, tiles,
    SYMMETRIC: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    MODE: tl.constexpr, SUM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (batch * tiles, SPLIT). SYMMETRIC: the lower tiles of k_ss come first, then all tiles of k_ts.

    EVEN: d is a multiple of DEPTH, so no column is masked. With SPLIT > 1 the sums go to `partial`, else to the result.
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    s = tl.program_id(1)
    across = tl.cdiv(m, TILE)
    lower = across * (across + 1) // 2 if SYMMETRIC else 0
    symmetric = t < lower
    if symmetric:
        i, j = _lower_tile(t)
        a_row, rows = s_row, m
        a_at = f_s + b * s_batch
    else:
        i, j = (t - lower) // across, (t - lower) % across
        a_row, rows = t_row, n
        a_at = f_t + b * t_batch
    a_at += (i * TILE).to(tl.int64) * a_row
    b_at = f_s + b * s_batch + (j * TILE).to(tl.int64) * s_row
    r = tl.arange(0, TILE)
    k = tl.arange(0, DEPTH)
    a_in = (r < rows - i * TILE)[:, None]
    b_in = (r < m - j * TILE)[:, None]
    a_step = r[:, None] * a_row + k[None, :]  # 32 bits: half the registers of pointers
    b_step = r[:, None] * s_row + k[None, :]
    share = tl.cdiv(tl.cdiv(d, DEPTH), SPLIT) * DEPTH
    first = s * share
    last = tl.minimum(first + share, d)
    acc = tl.zeros((TILE, TILE), SUM)
    for k_0 in range(first, last, DEPTH):
        if EVEN:
            a_mask, b_mask = a_in, b_in
        else:
            within = (k < last - k_0)[None, :]
            a_mask, b_mask = a_in & within, b_in & within
        x = tl.load(a_at + k_0 + a_step, mask=a_mask, other=0.0)
        y = tl.load(b_at + k_0 + b_step, mask=b_mask, other=0.0)
        acc = _add_product(acc, x, y, one, MODE, INTERPRETED)
    if SPLIT > 1:
        part = partial + (tl.program_id(0).to(tl.int64) * SPLIT + s) * (TILE * TILE)
        tl.store(part + r[:, None] * TILE + r[None, :], acc)
    else:
        value = (acc + plus).to(k_ss.dtype.element_ty)
        if symmetric:
            k_at = k_ss + b * m * m
        else:
            k_at = k_ts + b * n * m
        keep = tl.where(symmetric & (i == j), r[:, None] >= r[None, :], True)
        at = k_at + (i * TILE).to(tl.int64) * m + j * TILE
        tl.store(at + r[:, None].to(tl.int64) * m + r[None, :], value, mask=a_in & tl.trans(b_in) & keep)
        if SYMMETRIC:
            if symmetric:  # the mirror image: tf32x3 does not sum (i, j) and (j, i) alike, so only one is computed
                above = tl.where(i == j, r[:, None] < r[None, :], True)
                at = k_at + (j * TILE).to(tl.int64) * m + i * TILE
                mask = b_in & tl.trans(a_in) & above
                tl.store(at + r[:, None].to(tl.int64) * m + r[None, :], tl.trans(value), mask=mask)


@jit(do_not_specialize=("m", "n", "tiles"))
def _finalize_kernel(
    k_ss, k_ts, partial, plus, m, n, tiles,
    SYMMETRIC: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid (batch * tiles, TILE / ROWS): adds the parts of each tile in their order, and mirrors."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    across = tl.cdiv(m, TILE)
    lower = across * (across + 1) // 2 if SYMMETRIC else 0
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, TILE)
    part = partial + tl.program_id(0).to(tl.int64) * (SPLIT * TILE * TILE) + r[:, None] * TILE + c[None, :]
    acc = tl.zeros((ROWS, TILE), SUM)
    for s in range(SPLIT):
        acc += tl.load(part + s * (TILE * TILE))
    value = (acc + plus).to(k_ss.dtype.element_ty)
    if t < lower:
        i, j = _lower_tile(t)
        row, col = (i * TILE + r)[:, None], (j * TILE + c)[None, :]
        keep = (row >= col) & (row < m) & (col < m)
        k_at = k_ss + b * m * m
        tl.store(k_at + row.to(tl.int64) * m + col, value, mask=keep)
        tl.store(k_at + col.to(tl.int64) * m + row, value, mask=keep & (row > col))
    else:
        row, col = ((t - lower) // across * TILE + r)[:, None], ((t - lower) % across * TILE + c)[None, :]
        tl.store(k_ts + b * n * m + row.to(tl.int64) * m + col, value, mask=(row < n) & (col < m))


# -------------------------------------------------------------------------------------------------------------- launch


@lru_cache
def _processors(device: torch.device) -> int:
    if INTERPRETED:
        return 4  # programs run one after another: splitting is tested, not needed
    return torch.cuda.get_device_properties(device).multi_processor_count


def mode_of(precision: str, dtype: torch.dtype) -> str:
    """The kernel's mode for a resolved precision and the inputs' dtype."""
    if precision != "fp32":
        return precision
    return "native" if dtype in HALF else "tf32x3"


def _rows_contiguous(x: Tensor) -> Tensor:
    """(batch, rows, d) with contiguous columns; a copy only where the layout leaves no other way."""
    x = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def config_for(mode: str, *inputs: Tensor) -> Config:
    """The configuration with which `launch` compiles for these (batch, rows, d) inputs."""
    if mode != "native":
        return CONFIGS[mode]
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0 for x in inputs)
    return CONFIGS[mode] if aligned and inputs[0].shape[-1] % 16 == 0 else NATIVE_UNALIGNED


def launch(
    f_s: Tensor,
    f_t: Tensor | None,
    *,
    symmetric: bool,
    mode: str,
    plus: float = 0.0,
    config: Config | None = None,
    split: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """k_ss (…, m, m) if symmetric, and k_ts (…, n, m) if f_t is given, each with `plus` added to every entry.

    f_s (…, m, d), f_t (…, n, d) of one dtype. The results are float64 in mode "fp64", else float32. config and split
    are for tests and measurements.
    """
    batch, m, d = f_s.shape[:-2], *f_s.shape[-2:]
    n = 0 if f_t is None else f_t.shape[-2]
    out = torch.float64 if mode == "fp64" else torch.float32
    k_ss = f_s.new_empty((*batch, m, m), dtype=out) if symmetric else None
    k_ts = f_s.new_empty((*batch, n, m), dtype=out) if f_t is not None else None
    x, y = _rows_contiguous(f_s), _rows_contiguous(f_s if f_t is None else f_t)
    if mode == "fp64" and x.dtype in HALF:  # Triton 3.6 cannot compile a float64 product of what was loaded as 16 bits
        x, y = x.float(), y.float()
    tile, depth, num_warps, num_stages = config or config_for(mode, x, y)
    across = triton.cdiv(m, tile)
    tiles = (across * (across + 1) // 2 if symmetric else 0) + triton.cdiv(n, tile) * across
    programs = tiles * batch.numel()
    if programs == 0:
        return k_ss, k_ts
    if split is None:
        split = max(1, min(triton.cdiv(2 * _processors(f_s.device), programs), d // 256))
    size = programs * split * tile * tile if split > 1 else 1
    partial = f_s.new_empty(size, dtype=out)
    a, b = (k_ts if k_ss is None else k_ss), (k_ss if k_ts is None else k_ts)
    total = tl.float64 if mode == "fp64" else tl.float32
    with torch.cuda.device_of(f_s):
        _gram_kernel[(programs, split)](
            x, y, a, b, partial, 1.0, plus, m, n, d, x.stride(1), y.stride(1), x.stride(0), y.stride(0), tiles,
            SYMMETRIC=symmetric, SPLIT=split, EVEN=d % depth == 0, TILE=tile, DEPTH=depth, MODE=mode, SUM=total,
            INTERPRETED=INTERPRETED, num_warps=num_warps, num_stages=num_stages, maxnreg=MAX_REGISTERS.get(mode),
        )  # fmt: skip
        if split > 1:
            _finalize_kernel[(programs, tile // FINALIZE_ROWS)](
                a, b, partial, plus, m, n, tiles,
                SYMMETRIC=symmetric, SPLIT=split, TILE=tile, ROWS=FINALIZE_ROWS, SUM=total, num_warps=FINALIZE_WARPS,
            )  # fmt: skip
    return k_ss, k_ts


# ------------------------------------------------------------------------------- without checks, in the working dtype


def gram_(x: Tensor, y: Tensor | None, precision: str, backend: str, plus: float = 0.0, mirror: bool = True) -> Tensor:
    """x yᵀ + plus, or x xᵀ + plus, in the dtype of a resolved precision.

    Without mirror, the part above the diagonal may differ from the one below by rounding.
    """
    (*batch, n, d), m = x.shape, (x if y is None else y).shape[-2]
    size = dict(b=torch.Size(batch).numel(), n=n, m=m, d=d)
    if use_triton("gram" if y is None else "gram_xy", backend, precision, x.device, **size):
        mode = mode_of(precision, x.dtype)
        if y is None:
            return launch(x, None, symmetric=True, mode=mode, plus=plus)[0]
        return launch(y, x, symmetric=False, mode=mode, plus=plus)[1]
    work = dtype_of(precision)
    x = x.to(work)
    if y is not None:
        k = x @ y.to(work).mT
    else:
        k = x @ x.mT
        if mirror:
            k = k.tril() + k.tril(-1).mT  # a BLAS may sum (i, j) and (j, i) in different orders: mirror one of them
    return k.add_(plus) if plus else k


def gram_pair_(
    f_s: Tensor, f_t: Tensor, precision: str, backend: str, plus: float = 0.0, mirror: bool = True
) -> tuple[Tensor, Tensor]:
    """f_s f_sᵀ + plus and f_t f_sᵀ + plus in the dtype of a resolved precision."""
    (*batch, m, d), n = f_s.shape, f_t.shape[-2]
    size = dict(b=torch.Size(batch).numel(), n=n, m=m, d=d)
    if use_triton("gram_pair", backend, precision, f_s.device, **size):
        return launch(f_s, f_t, symmetric=True, mode=mode_of(precision, f_s.dtype), plus=plus)
    return gram_(f_s, None, precision, backend, plus, mirror), gram_(f_t, f_s, precision, backend, plus)


# ----------------------------------------------------------------------------------------------------------------- ops


@torch.library.custom_op("kernels::gram", mutates_args=())
def _gram(x: Tensor, y: Tensor | None, precision: str, backend: str) -> Tensor:
    with exact_products(x.device):
        return gram_(x, y, precision, backend).to(x.dtype)


@_gram.register_fake
def _(x, y, precision, backend):
    return x.new_empty((*x.shape[:-1], (x if y is None else y).shape[-2]))


@torch.library.custom_op("kernels::gram_backward", mutates_args=())
def _gram_backward(
    d_k: Tensor, x: Tensor, y: Tensor | None, need_x: bool, need_y: bool, precision: str
) -> tuple[Tensor, Tensor]:
    work = dtype_of(precision)
    g, none = d_k.to(work), x.new_empty(0)
    with exact_products(x.device):
        if y is None:
            return ((g + g.mT) @ x.to(work)).to(x.dtype), none
        d_x = (g @ y.to(work)).to(x.dtype) if need_x else none
        return d_x, ((g.mT @ x.to(work)).to(y.dtype) if need_y else none)


@_gram_backward.register_fake
def _(d_k, x, y, need_x, need_y, precision):
    return x.new_empty(x.shape if need_x else 0), x.new_empty(y.shape if need_y else 0)


def _gram_setup(ctx, inputs, output):
    x, y, ctx.precision, _ = inputs
    ctx.save_for_backward(x, y)


def _gram_autograd(ctx, d_k):
    need_x, need_y = ctx.needs_input_grad[:2]
    d_x, d_y = _gram_backward(d_k, *ctx.saved_tensors, need_x, need_y, ctx.precision)
    return d_x if need_x else None, d_y if need_y else None, None, None


_gram.register_autograd(_gram_autograd, setup_context=_gram_setup)


@torch.library.custom_op("kernels::gram_pair", mutates_args=())
def _gram_pair(f_s: Tensor, f_t: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor]:
    with exact_products(f_s.device):
        k_ss, k_ts = gram_pair_(f_s, f_t, precision, backend)
    return k_ss.to(f_s.dtype), k_ts.to(f_s.dtype)


@_gram_pair.register_fake
def _(f_s, f_t, precision, backend):
    m = f_s.shape[-2]
    return f_s.new_empty((*f_s.shape[:-1], m)), f_s.new_empty((*f_t.shape[:-1], m))


@torch.library.custom_op("kernels::gram_pair_backward", mutates_args=())
def _gram_pair_backward(
    d_k_ss: Tensor, d_k_ts: Tensor, f_s: Tensor, f_t: Tensor, need_s: bool, need_t: bool, precision: str
) -> tuple[Tensor, Tensor]:
    work = dtype_of(precision)
    g, h, s, none = d_k_ss.to(work), d_k_ts.to(work), f_s.to(work), f_s.new_empty(0)
    with exact_products(f_s.device):
        d_s = ((g + g.mT) @ s + h.mT @ f_t.to(work)).to(f_s.dtype) if need_s else none
        return d_s, ((h @ s).to(f_t.dtype) if need_t else none)


@_gram_pair_backward.register_fake
def _(d_k_ss, d_k_ts, f_s, f_t, need_s, need_t, precision):
    return f_s.new_empty(f_s.shape if need_s else 0), f_s.new_empty(f_t.shape if need_t else 0)


def _gram_pair_setup(ctx, inputs, output):
    f_s, f_t, ctx.precision, _ = inputs
    ctx.save_for_backward(f_s, f_t)


def _gram_pair_autograd(ctx, d_k_ss, d_k_ts):
    need_s, need_t = ctx.needs_input_grad[:2]
    d_s, d_t = _gram_pair_backward(d_k_ss, d_k_ts, *ctx.saved_tensors, need_s, need_t, ctx.precision)
    return d_s if need_s else None, d_t if need_t else None, None, None


_gram_pair.register_autograd(_gram_pair_autograd, setup_context=_gram_pair_setup)


# -------------------------------------------------------------------------------------------------------------- public


def gram(x: Tensor, y: Tensor | None = None, *, precision: str = "auto", backend: str = "auto") -> Tensor:
    """x yᵀ, or x xᵀ exactly (bitwise) symmetric if y is None.

    x (…, n, d), y (…, m, d) with the same batch dimensions, device and dtype -> (…, n, m) in that dtype. Differentiable
    once. ValueError names the argument that does not fit.
    """
    check_matrix("x", x)
    check_backend(backend, x.device.type, x.device.index)
    if y is not None:
        _check_columns("y", y, "x", x)
    return _gram(x, y, precision_for(precision, x), backend)


def gram_pair(f_s: Tensor, f_t: Tensor, *, precision: str = "auto", backend: str = "auto") -> tuple[Tensor, Tensor]:
    """gram(f_s) and gram(f_t, f_s), by one launch on the Triton backend.

    f_s (…, m, d), f_t (…, n, d) with the same batch dimensions, device and dtype -> (…, m, m) bitwise symmetric and
    (…, n, m) in that dtype. Differentiable once. ValueError names the argument that does not fit.
    """
    check_matrix("f_s", f_s)
    check_backend(backend, f_s.device.type, f_s.device.index)
    _check_columns("f_t", f_t, "f_s", f_s)
    return _gram_pair(f_s, f_t, precision_for(precision, f_s), backend)


def _check_columns(name: str, y: Tensor, other_name: str, x: Tensor) -> None:
    check_like(name, y, other_name, x)
    if y.shape[-1] != x.shape[-1]:
        raise ValueError(f"{name} has {y.shape[-1]} columns, but {other_name} has {x.shape[-1]}")
