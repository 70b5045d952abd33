"""The nearest neighbour of every row by cosine similarity, without the matrix of all similarities.

    nearest(x)[i] = argmax over j ≠ i of x_i · x_j / (|x_i| |x_j|)        (n, d) -> (n,) int64

One program takes a tile of rows and a share of the columns: it computes one tile of similarities after the other and
keeps the best value and index of each row in registers. The shares leave theirs in a workspace (split, n), and a last
kernel merges them in order, so results are the same bits every time. Inputs are read in their own dtype and with their
own row stride: the norms, computed before, divide the tile of products and not the inputs. Products are those of
gram.py with precision "fp32": float32 by three TF32 products, half inputs' own exact products; float64 stays float64.

What is nearest where it is not clear:
    ties            the lowest index
    a zero row      has similarity 0 to every row; so has one whose squared norm is 0 in the working dtype (1e-30)
    NaN or inf      a row with a squared norm that is not finite (also 1e30, in float32) has similarity NaN to every row
    NaN             a NaN similarity never wins; a row that has no other gets the lowest index that is not its own
Similarities that differ by rounding only may come in either order, and the two backends may round differently. Equal
rows tie on the kernel, always; a BLAS may sum two equal columns in different orders.
"""

import math

import torch
from torch import Tensor

from .backend import INTERPRETED, check_backend, check_matrix, exact_products, jit, tl, triton, use_triton
from .gram import Config, _add_product, _processors, _rows_contiguous, mode_of

BLOCK_ENTRIES = 2**24  # similarities that the torch backend holds at a time


# Chosen for registers without spills on sm_80 and sm_90, aligned and not, and not yet by timing.
CONFIGS = {
    "fp64": Config(64, 16, 4, 3),
    "tf32x3": Config(64, 16, 4, 3),
    "native": Config(64, 32, 4, 3),
    "native_large": Config(128, 64, 8, 3),
}
LARGE = 1500  # rows from which tiles of 128 are enough to fill a GPU
NORM_ROWS, NORM_DEPTH, NORM_WARPS = 4, 512, 4
MERGE_ROWS, MERGE_WARPS = 128, 4


def nearest_ref(x: Tensor) -> Tensor:
    """What `nearest` must equal."""
    f = x.to(_work_dtype(x))
    norm = f.norm(dim=1, keepdim=True)
    f = torch.where(norm == 0, 0, torch.where(norm.isfinite(), f / norm, math.nan))
    similarity = f @ f.mT
    similarity = similarity.masked_fill(similarity.isnan(), -math.inf).fill_diagonal_(-math.inf)
    index = torch.arange(len(x), device=x.device)
    is_best = (similarity == similarity.amax(1, keepdim=True)) & (index[:, None] != index)
    return torch.where(is_best, index, len(x)).amin(1)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------- kernels


@jit(do_not_specialize=("n",))
def _inverse_norm_kernel(
    x, inverse, n, d, x_row,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid (n / ROWS,): 1 / |x_i|, or 0 for a zero row, or NaN where the squared norm is not finite."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    at = x + row.to(tl.int64)[:, None] * x_row
    squares = tl.zeros((ROWS, DEPTH), SUM)
    for k_0 in range(0, d, DEPTH):
        mask = (row < n)[:, None] & (k < d - k_0)[None, :]
        value = tl.load(at + k_0 + k[None, :], mask=mask, other=0.0).to(SUM)
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 1).to(tl.float64))  # so that the result is rounded once
    result = tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))
    result = tl.where(norm < float("inf"), result, float("nan"))
    tl.store(inverse + row, result.to(SUM), mask=row < n)


@jit(do_not_specialize=("n", "share"))
def _nearest_kernel(
    x, inverse, values, indices, one, n, d, x_row, share,
    EVEN: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    MODE: tl.constexpr, SUM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (n / TILE, split): the best similarity of a tile of rows among `share` tiles of columns, and its index.

    Both go to row program_id(1) of values and indices (split, n): -inf and n where there is none. EVEN: d is a multiple
    of DEPTH, so no column of x is masked.
    """
    i = tl.program_id(0)
    s = tl.program_id(1)
    r = tl.arange(0, TILE)
    k = tl.arange(0, DEPTH)
    step = r[:, None] * x_row + k[None, :]  # 32 bits: half the registers of pointers
    row = i * TILE + r
    a_at = x + (i * TILE).to(tl.int64) * x_row
    a_in = (row < n)[:, None]
    a_inverse = tl.load(inverse + row, mask=row < n, other=0.0)
    best = tl.full((TILE,), float("-inf"), SUM)
    index = tl.zeros((TILE,), tl.int32) + n
    first = (s * share).to(tl.int64)  # so that offsets of tiles are 64 bits
    last = tl.minimum(first + share, tl.cdiv(n, TILE))
    for j in range(first, last):
        column = (j * TILE + r).to(tl.int32)
        b_at = x + j * TILE * x_row
        b_in = (column < n)[:, None]
        acc = tl.zeros((TILE, TILE), SUM)
        for k_0 in range(0, d, DEPTH):
            if EVEN:
                a_mask, b_mask = a_in, b_in
            else:
                within = (k < d - k_0)[None, :]
                a_mask, b_mask = a_in & within, b_in & within
            a = tl.load(a_at + k_0 + step, mask=a_mask, other=0.0)
            b = tl.load(b_at + k_0 + step, mask=b_mask, other=0.0)
            acc = _add_product(acc, a, b, one, MODE, INTERPRETED)
        b_inverse = tl.load(inverse + column, mask=column < n, other=0.0)
        # the factor of the row changes no argmax, but makes the similarities of a zero row 0 and of a NaN row NaN
        similarity = acc * a_inverse[:, None] * b_inverse[None, :]
        # A row is left out by its index. The published code takes the second of the top two instead, which is the row
        # itself where an exact duplicate of it comes first.
        allowed = (row[:, None] != column[None, :]) & (column < n)[None, :] & (similarity == similarity)
        similarity = tl.where(allowed, similarity, float("-inf"))
        top, at = tl.max(similarity, 1, return_indices=True)  # the lowest index of equals
        better = top > best  # not equal: of equals the first tile keeps its place
        index = tl.where(better, (j * TILE + at).to(tl.int32), index)
        best = tl.where(better, top, best)
    tl.store(values + s * n + row, best, mask=row < n)
    tl.store(indices + s * n + row, index, mask=row < n)


@jit(do_not_specialize=("n", "split"))
def _merge_kernel(values, indices, out, n, split, ROWS: tl.constexpr, SUM: tl.constexpr):
    """Grid (n / ROWS,): the index of the best of the shares, in their order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best = tl.full((ROWS,), float("-inf"), SUM)
    index = tl.where(row == 0, 1, 0)  # where every similarity is NaN
    for s in range(split):
        value = tl.load(values + s * n + row, mask=row < n, other=float("-inf"))
        better = value > best
        index = tl.where(better, tl.load(indices + s * n + row, mask=row < n, other=0), index)
        best = tl.where(better, value, best)
    tl.store(out + row, index.to(tl.int64), mask=row < n)


# -------------------------------------------------------------------------------------------------------------- launch


def config_for(mode: str, x: Tensor) -> Config:
    """The configuration with which `launch` compiles for x (n, d)."""
    if mode == "native" and len(x) >= LARGE:
        if x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0:
            return CONFIGS["native_large"]  # two-byte loads take more registers than it leaves
    return CONFIGS[mode]


def split_for(across: int, processors: int) -> int:
    """How many programs share the tiles of a row of `across` tiles.

    About eight programs for each processor, so that the last ones to end leave few idle, but none without a tile.
    """
    share = max(1, across * across // (8 * processors))
    return math.ceil(across / share)


def launch(x: Tensor, *, config: Config | None = None, split: int | None = None) -> Tensor:
    """`nearest` of x (n, d) by the kernel, without checks. config and split are for tests and measurements."""
    x = _rows_contiguous(x)[0]
    n, d = x.shape
    mode = "fp64" if x.dtype == torch.float64 else mode_of("fp32", x.dtype)
    tile, depth, num_warps, num_stages = config or config_for(mode, x)
    across = triton.cdiv(n, tile)
    if split is None:
        split = split_for(across, _processors(x.device))
    work = _work_dtype(x)
    inverse, out = x.new_empty(n, dtype=work), x.new_empty(n, dtype=torch.int64)
    values, indices = x.new_empty(split, n, dtype=work), x.new_empty(split, n, dtype=torch.int32)
    total = tl.float64 if work == torch.float64 else tl.float32
    with torch.cuda.device_of(x):
        _inverse_norm_kernel[(triton.cdiv(n, NORM_ROWS),)](
            x, inverse, n, d, x.stride(0), ROWS=NORM_ROWS, DEPTH=NORM_DEPTH, SUM=total, num_warps=NORM_WARPS
        )
        _nearest_kernel[(across, split)](
            x, inverse, values, indices, 1.0, n, d, x.stride(0), triton.cdiv(across, split),
            EVEN=d % depth == 0, TILE=tile, DEPTH=depth, MODE=mode, SUM=total, INTERPRETED=INTERPRETED,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
            values, indices, out, n, split, ROWS=MERGE_ROWS, SUM=total, num_warps=MERGE_WARPS
        )
    return out


# ---------------------------------------------------------------------------------------------------------- torch twin


def by_blocks(x: Tensor) -> Tensor:
    """`nearest` of x (n, d) by torch, without checks: at most BLOCK_ENTRIES similarities, or one row, at a time."""
    n, f = len(x), x.to(_work_dtype(x))
    norm = torch.linalg.vector_norm(f, dim=1)
    inverse = norm.reciprocal().masked_fill_(norm == 0, 0).masked_fill_(~norm.isfinite(), math.nan)
    column = torch.arange(n, dtype=torch.int32, device=x.device)
    out = x.new_empty(n, dtype=torch.int64)
    rows = max(1, BLOCK_ENTRIES // n)
    for first in range(0, n, rows):
        here = slice(first, first + rows)
        similarity = (f[here] @ f.mT).mul_(inverse[here, None]).mul_(inverse)  # as the kernel, ties included
        similarity.masked_fill_(similarity.isnan(), -math.inf).diagonal(first).fill_(-math.inf)
        # not argmax: of equal entries it may take any
        index = column.masked_fill(similarity != similarity.amax(1, keepdim=True), n)
        index.diagonal(first).fill_(n)  # the row itself, where there is nothing but -inf
        out[here] = index.amin(1)
    return out


# -------------------------------------------------------------------------------------------------------- op and public


@torch.library.custom_op("kernels::nearest", mutates_args=())
def _nearest(x: Tensor, backend: str) -> Tensor:
    n, d = x.shape
    if use_triton("nearest", backend, "fp64" if x.dtype == torch.float64 else "fp32", x.device, n=n, d=d):
        return launch(x)
    with exact_products(x.device):
        return by_blocks(x)


@_nearest.register_fake
def _(x, backend):
    return x.new_empty(x.shape[0], dtype=torch.int64)


def nearest(x: Tensor, *, backend: str = "auto") -> Tensor:
    """For each row of x (n, d) the index (n,) int64 of the other row with the largest cosine similarity.

    x is floating point, n >= 2. Similarities are float64 for float64 x, else float32, meant for norms from 1e-15 to
    1e18. Ties, zero rows and NaN: see the top of the file. There is no gradient. ValueError names the argument that
    does not fit.
    """
    check_matrix("x", x)
    check_backend(backend, x.device.type, x.device.index)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x must have shape (rows, columns) with at least two rows, got {tuple(x.shape)}")
    return _nearest(x, backend)
