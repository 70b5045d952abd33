"""Symmetric positive definite solves by Cholesky, and the record of factorisations that failed.

    spd_factor(k, lam) = L, info    with L Lᵀ = k + lam I
    spd_solve(L, b)    = (L Lᵀ)⁻¹ b

Both compute in the dtype of their inputs. Nothing here waits for the device, except `raise_if_failed`: a factorisation
leaves its verdict on the device, triangular solves have none, a matrix that has no factor gets a factor of NaN (that
matrix only, the others of the batch are untouched), and the ops of krr.py note the first failure in a small tensor that
the training loop reads with `raise_if_failed(step)` whenever it logs. The ridge is never changed silently.

The kernels. A matrix of up to MAX_SMALL rows is factored by one program, a batch of them at the price of one: the
left-looking Cholesky by blocks of 16 columns, where a diagonal block is eliminated together with the identity, which
gives its factor and the inverse of that. A solve is then products only, 16 rows at a time, one program for 16 columns
of b. A product with a computed inverse is not backward stable where the block is ill conditioned, so each one is
corrected once by its own residual, which is. Larger matrices are factored by the library; a kernel then inverts the
diagonal blocks. The inverses are kept in the factor itself, above its diagonal where nobody looks: "packed" below.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from .backend import check_backend, check_like, check_matrix, jit, tl, triton, use_triton

MAX_SMALL = 208  # rows of the largest matrix for one program
BLOCK = 16  # columns of a diagonal block; Triton's smallest dot
ROWS, DEPTH, COLUMNS = 64, 32, 16  # of a panel of the factor, of the sums over earlier columns, of b
NUM_WARPS, FACTOR_STAGES, SOLVE_STAGES = 4, 1, 2  # without spills on sm_80 and sm_90, see tests/test_compile.py


def as_lam(lam: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The ridge as a tensor of `dtype` with the batch shape and device of `like`; gradients pass through.

    ValueError for a negative or non-finite number, or a tensor of another shape, device or kind. The entries of a
    tensor are not looked at, as that would wait for the device.
    """
    batch = like.shape[:-2]
    if not isinstance(lam, Tensor):
        if not isinstance(lam, Real) or not 0 <= lam < math.inf:
            raise ValueError(f"lam must be a finite number >= 0 or a tensor, got {lam!r}")
        return like.new_full(batch, float(lam), dtype=dtype)
    if lam.shape != batch:
        raise ValueError(f"lam must have the batch shape {tuple(batch)}, got {tuple(lam.shape)}")
    if not lam.is_floating_point():
        raise ValueError(f"lam must be floating point, got {lam.dtype}")
    if lam.device != like.device:
        raise ValueError(f"lam is on {lam.device}, but the features are on {like.device}")
    return lam.to(dtype)


def spd_solve_ref(k: Tensor, lam: Tensor, b: Tensor) -> Tensor:
    """What `spd_solve(spd_factor(k, lam)[0], b)` must equal."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return torch.linalg.solve(k + lam[..., None, None] * eye, b)


# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def _quotient(a, b):
    """a / b rounded once; Triton's own float32 division is approximate."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@jit
def _inverse_root(x):
    """1 / sqrt(x), each step rounded once."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, x.dtype), tl.sqrt_rn(x))


@jit
def _eliminate(d, BLOCK: tl.constexpr):
    """Of a symmetric block d in registers: l with l lᵀ = d, l⁻¹, and the first bad pivot (BLOCK if there is none).

    [d | I] is eliminated row by row in one loop without square roots; the left half ends as diag(p) uᵀ with u of unit
    diagonal, the right half as u⁻¹. A register tile cannot be indexed: its rows and columns are picked by masked sums.
    """
    r = tl.arange(0, BLOCK)
    c = tl.arange(0, 2 * BLOCK)
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0).to(d.dtype)
    w = tl.reshape(tl.permute(tl.join(d, eye), (0, 2, 1)), (BLOCK, 2 * BLOCK))
    first_bad = BLOCK
    for j in range(BLOCK):
        row = tl.sum(tl.where(r[:, None] == j, w, 0.0), 0)
        # the column is the row again: w's own column was rounded differently, and l lᵀ would miss d by sqrt(u)
        col = tl.sum(tl.where(c[None, :] == r[:, None], row[None, :], 0.0), 1)
        pivot = tl.sum(tl.where(c == j, row, 0.0), 0)
        # judged now: a NaN further down reaches the rows above it too, as 0 * NaN
        good = (pivot > 0) & (pivot < float("inf"))
        first_bad = tl.where((first_bad == BLOCK) & (good == 0), j, first_bad)
        pivot = tl.where(good, pivot, 1.0)
        w -= tl.where(r > j, _quotient(col, pivot), 0.0)[:, None] * row[None, :]
    left, right = tl.split(tl.permute(tl.reshape(w, (BLOCK, 2, BLOCK)), (0, 2, 1)))
    pivots = tl.sum(tl.where(r[:, None] == r[None, :], left, 0.0), 1)
    scale = _inverse_root(tl.where(pivots > 0, pivots, 1.0))[:, None]  # a bad matrix becomes NaN anyway
    lower = tl.trans(tl.where(r[:, None] <= r[None, :], left * scale, 0.0))
    return lower, right * scale, first_bad


@jit
def _factor_kernel(
    k, lam, factor, info, m, k_row, k_batch,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (batch,): the packed factor (m, m) of k + lam I, or NaN; info = 0, or 1 + the first bad pivot.

    What one thread stores, others load after a barrier: through memory also where a block only changes its layout.
    """
    b = tl.program_id(0).to(tl.int64)
    k += b * k_batch
    factor += b * m * m
    ridge = tl.load(lam + b)
    r = tl.arange(0, BLOCK)
    wide = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    diagonal = r[:, None] == r[None, :]
    bad = 0
    for start in range(0, m, BLOCK):
        q = start + r
        inside = (q < m)[:, None] & (q < m)[None, :]
        # only the lower triangle of k is read; rows past m become those of the identity
        above, left = tl.maximum(q[:, None], q[None, :]), tl.minimum(q[:, None], q[None, :])
        d = tl.load(k + above * k_row + left, mask=inside, other=0.0).to(DTYPE)
        d = tl.where(diagonal, tl.where(inside, d + ridge, 1.0), d)
        for p_0 in range(0, start, DEPTH):
            p = p_0 + depth
            l_q = tl.load(factor + q[:, None] * m + p[None, :], mask=(q < m)[:, None] & (p < start)[None, :], other=0.0)
            d -= tl.dot(l_q, tl.trans(l_q), input_precision="ieee", out_dtype=DTYPE)
        at = factor + q[:, None] * m + q[None, :]
        tl.store(at, d, mask=inside)
        tl.debug_barrier()
        d = tl.load(at, mask=inside, other=0.0)
        lower, inverse, first_bad = _eliminate(tl.where(inside, d, tl.where(diagonal, 1.0, 0.0).to(DTYPE)), BLOCK)
        bad = tl.where((bad == 0) & (first_bad < BLOCK), start + first_bad + 1, bad)
        tl.debug_barrier()
        tl.store(at, tl.where(r[:, None] >= r[None, :], lower, tl.trans(inverse)), mask=inside)
        for row_0 in range(start + BLOCK, m, ROWS):
            i = row_0 + wide
            mask = (i < m)[:, None] & (q < m)[None, :]
            t = tl.load(k + i[:, None] * k_row + q[None, :], mask=mask, other=0.0).to(DTYPE)
            for p_0 in range(0, start, DEPTH):
                p = p_0 + depth
                earlier = (p < start)[None, :]
                l_i = tl.load(factor + i[:, None] * m + p[None, :], mask=(i < m)[:, None] & earlier, other=0.0)
                l_q = tl.load(factor + q[:, None] * m + p[None, :], mask=(q < m)[:, None] & earlier, other=0.0)
                t -= tl.dot(l_i, tl.trans(l_q), input_precision="ieee", out_dtype=DTYPE)
            x = tl.dot(t, tl.trans(inverse), input_precision="ieee", out_dtype=DTYPE)
            rest = t - tl.dot(x, tl.trans(lower), input_precision="ieee", out_dtype=DTYPE)
            x += tl.dot(rest, tl.trans(inverse), input_precision="ieee", out_dtype=DTYPE)
            tl.store(factor + i[:, None] * m + q[None, :], x, mask=mask)
            mirror = factor + q[:, None] * m + i[None, :]
            tl.store(mirror, tl.zeros((BLOCK, ROWS), DTYPE), mask=(q < m)[:, None] & (i < m)[None, :])
        tl.debug_barrier()
    tl.store(info + b, bad)
    if bad != 0:
        for row_0 in range(0, m, BLOCK):
            for p_0 in range(0, m, DEPTH):
                i, p = row_0 + r, p_0 + depth
                nan = tl.full((BLOCK, DEPTH), float("nan"), DTYPE)
                tl.store(factor + i[:, None] * m + p[None, :], nan, mask=(i < m)[:, None] & (p < m)[None, :])


@jit
def _pack_kernel(factor, m, blocks, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Grid (batch * blocks,): puts the inverse of each diagonal block above the diagonal of the block."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    r = tl.arange(0, BLOCK)
    q = start + r
    inside = (q < m)[:, None] & (q < m)[None, :]
    diagonal = r[:, None] == r[None, :]
    at = factor + b * m * m + q[:, None] * m + q[None, :]
    below = r[:, None] >= r[None, :]
    lower = tl.load(at, mask=inside & below, other=0.0)
    lower = tl.where(inside, lower, tl.where(diagonal, 1.0, 0.0).to(DTYPE))
    pivots = tl.sum(tl.where(diagonal, lower, 0.0), 1)
    scale = _quotient(tl.full((BLOCK,), 1.0, DTYPE), pivots)  # of the rows of the inverse
    inverse = tl.where(diagonal, 1.0, 0.0).to(DTYPE)
    for j in range(BLOCK):
        row = tl.sum(tl.where(r[:, None] == j, inverse, 0.0), 0)
        col = tl.sum(tl.where(r[None, :] == j, lower, 0.0), 1)
        here = tl.sum(tl.where(r == j, scale, 0.0), 0)
        inverse -= tl.where(r > j, col * here, 0.0)[:, None] * row[None, :]
    tl.store(at, tl.trans(inverse * scale[:, None]), mask=inside & (r[:, None] < r[None, :]))


@jit
def _load_block(at, at_mirrored, inside, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """A packed diagonal block as (l, l⁻¹), the identity outside."""
    r = tl.arange(0, BLOCK)
    diagonal = r[:, None] == r[None, :]
    packed = tl.load(at, mask=inside, other=0.0)
    packed = tl.where(diagonal & (inside == 0), 1.0, packed)
    mirrored = tl.load(at_mirrored, mask=inside, other=0.0)
    lower = tl.where(r[:, None] >= r[None, :], packed, 0.0)
    pivots = tl.where(diagonal, packed, 1.0).to(DTYPE)
    reciprocal = _quotient(tl.full((BLOCK, BLOCK), 1.0, DTYPE), pivots)
    inverse = tl.where(diagonal, reciprocal, tl.where(r[:, None] > r[None, :], mirrored, 0.0))
    return lower.to(DTYPE), inverse.to(DTYPE)


@jit
def _solve_kernel(
    factor, rhs, x, m, c, rhs_row, rhs_batch, strips,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (batch * strips,): x = (L Lᵀ)⁻¹ rhs for COLUMNS columns, forwards and backwards over the blocks of L."""
    b = (tl.program_id(0) // strips).to(tl.int64)
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    factor += b * m * m
    rhs += b * rhs_batch
    x += b * m * c
    r = tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    mine = (column < c)[None, :]
    for start in range(0, m, BLOCK):
        q = start + r
        here = (q < m)[:, None] & mine
        v = tl.load(rhs + q[:, None].to(tl.int64) * rhs_row + column[None, :], mask=here, other=0.0)
        for p_0 in range(0, start, DEPTH):
            p = p_0 + depth
            mask = (q < m)[:, None] & (p < start)[None, :]
            l_q = tl.load(factor + q[:, None].to(tl.int64) * m + p[None, :], mask=mask, other=0.0)
            known = tl.load(x + p[:, None] * c + column[None, :], mask=(p < start)[:, None] & mine, other=0.0)
            v -= tl.dot(l_q, known, input_precision="ieee", out_dtype=DTYPE)
        inside = (q < m)[:, None] & (q < m)[None, :]
        at = factor + q[:, None].to(tl.int64) * m + q[None, :]
        mirrored = factor + q[None, :].to(tl.int64) * m + q[:, None]
        lower, inverse = _load_block(at, mirrored, inside, BLOCK, DTYPE)
        w = tl.dot(inverse, v, input_precision="ieee", out_dtype=DTYPE)
        rest = v - tl.dot(lower, w, input_precision="ieee", out_dtype=DTYPE)
        w += tl.dot(inverse, rest, input_precision="ieee", out_dtype=DTYPE)
        tl.store(x + q[:, None] * c + column[None, :], w, mask=here)
        tl.debug_barrier()
    blocks = tl.cdiv(m, BLOCK)
    for step in range(blocks):
        start = (blocks - 1 - step) * BLOCK
        q = start + r
        here = (q < m)[:, None] & mine
        v = tl.load(x + q[:, None] * c + column[None, :], mask=here, other=0.0)
        for p_0 in range(start + BLOCK, m, DEPTH):
            p = p_0 + depth
            mask = (p < m)[:, None] & (q < m)[None, :]
            l_p = tl.load(factor + p[:, None].to(tl.int64) * m + q[None, :], mask=mask, other=0.0)
            known = tl.load(x + p[:, None] * c + column[None, :], mask=(p < m)[:, None] & mine, other=0.0)
            v -= tl.dot(tl.trans(l_p), known, input_precision="ieee", out_dtype=DTYPE)
        inside = (q < m)[:, None] & (q < m)[None, :]
        at = factor + q[:, None].to(tl.int64) * m + q[None, :]
        mirrored = factor + q[None, :].to(tl.int64) * m + q[:, None]
        lower, inverse = _load_block(at, mirrored, inside, BLOCK, DTYPE)
        w = tl.dot(tl.trans(inverse), v, input_precision="ieee", out_dtype=DTYPE)
        rest = v - tl.dot(tl.trans(lower), w, input_precision="ieee", out_dtype=DTYPE)
        w += tl.dot(tl.trans(inverse), rest, input_precision="ieee", out_dtype=DTYPE)
        tl.debug_barrier()  # the block was read in another layout than it is written in
        tl.store(x + q[:, None] * c + column[None, :], w, mask=here)
        tl.debug_barrier()


@jit(do_not_specialize=("call", "count"))
def _record_kernel(record, info, lam, call, count, WIDTH: tl.constexpr):
    """Grid (1,): record = [call, lam of the first matrix that failed], unless it holds an earlier failure."""
    first = count
    for start in range(0, count, WIDTH):
        at = start + tl.arange(0, WIDTH)
        failed = tl.load(info + at, mask=at < count, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(failed, at, count), 0))
    if first < count:
        if tl.load(record) == 0:
            tl.store(record + 1, tl.load(lam + first).to(record.dtype.element_ty))
            tl.store(record, call)


# -------------------------------------------------------------------------------------------------------------- launch


def _kernel_dtype(x: Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def launch_factor(k: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """The packed factor and info of k (…, m, m) + lam I, of which only the lower triangle is read."""
    batch, m = k.shape[:-2], k.shape[-1]
    k_3d = k.reshape(batch.numel(), m, m)
    k_3d = k_3d if k_3d.stride(-1) == 1 else k_3d.contiguous()
    factor, info = k.new_empty(k.shape), k.new_empty(batch, dtype=torch.int32)
    if batch.numel() and m:
        with torch.cuda.device_of(k):
            _factor_kernel[(batch.numel(),)](
                k_3d, lam.contiguous(), factor, info, m, k_3d.stride(1), k_3d.stride(0),
                BLOCK=BLOCK, ROWS=ROWS, DEPTH=DEPTH, DTYPE=_kernel_dtype(k),
                num_warps=NUM_WARPS, num_stages=FACTOR_STAGES,
            )  # fmt: skip
    return factor, info if m else info.zero_()


def launch_pack(factor: Tensor) -> Tensor:
    """Packs a contiguous lower factor (…, m, m) in place."""
    batch, m = factor.shape[:-2], factor.shape[-1]
    blocks = triton.cdiv(m, BLOCK)
    if batch.numel() and m:
        with torch.cuda.device_of(factor):
            _pack_kernel[(batch.numel() * blocks,)](
                factor, m, blocks, BLOCK=BLOCK, DTYPE=_kernel_dtype(factor), num_warps=1
            )
    return factor


def launch_solve(factor: Tensor, b: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ b for a packed contiguous factor (…, m, m) and b (…, m, c)."""
    batch, (m, c) = b.shape[:-2], b.shape[-2:]
    x = b.new_empty(b.shape)
    if x.numel():
        rhs = b.reshape(batch.numel(), m, c)
        rhs = rhs if rhs.stride(-1) == 1 else rhs.contiguous()
        strips = triton.cdiv(c, COLUMNS)
        with torch.cuda.device_of(b):
            _solve_kernel[(batch.numel() * strips,)](
                factor, rhs, x, m, c, rhs.stride(1), rhs.stride(0), strips,
                BLOCK=BLOCK, DEPTH=DEPTH, COLUMNS=COLUMNS, DTYPE=_kernel_dtype(b),
                num_warps=NUM_WARPS, num_stages=SOLVE_STAGES,
            )  # fmt: skip
    return x


# ------------------------------------------------------------------------------------------------------ without checks


def uses_factor_kernel(k: Tensor, backend: str) -> bool:
    """Whether `factor_` factors k (…, m, m) by the package's kernel."""
    size = dict(b=k.shape[:-2].numel(), m=k.shape[-1])
    return k.shape[-1] <= MAX_SMALL and use_triton("factor", backend, _name(k), k.device, **size)


def _uses_solve_kernel(factor: Tensor, c: int, backend: str) -> bool:
    size = dict(b=factor.shape[:-2].numel(), m=factor.shape[-1], c=c)
    return use_triton("solve", backend, _name(factor), factor.device, **size)


def _name(x: Tensor) -> str:
    return "fp64" if x.dtype == torch.float64 else "fp32"


def factor_(k: Tensor, lam: Tensor, backend: str = "torch", c: int = 0) -> tuple[Tensor, Tensor]:
    """`spd_factor` without checks; k may be overwritten. The factor is packed if solves of c columns want it so."""
    if uses_factor_kernel(k, backend):
        return launch_factor(k, lam)
    k.diagonal(dim1=-2, dim2=-1).add_(lam[..., None])
    lower, info = torch.linalg.cholesky_ex(k)
    # LAPACK lets an infinite pivot pass; a pivot is good if 0 < pivot < inf.
    pivot = lower.detach().diagonal(dim1=-2, dim2=-1)
    bad_pivot = ~((pivot > 0) & (pivot < math.inf))
    first_bad = (1 + bad_pivot.to(torch.uint8).argmax(-1)).to(info.dtype)
    earlier = bad_pivot.any(-1) & ((info == 0) | (first_bad < info))
    info = torch.where(earlier, first_bad, info)
    lower = lower.masked_fill((info != 0)[..., None, None], math.nan)
    if _uses_solve_kernel(lower, c, backend):
        lower = launch_pack(lower.contiguous())
    return lower, info


def solve_(factor: Tensor, b: Tensor, backend: str = "torch") -> Tensor:
    """`spd_solve` without checks, for a factor of `factor_` with the same backend and number of columns."""
    if _uses_solve_kernel(factor, b.shape[-1], backend):
        return launch_solve(factor, b)
    # not torch.cholesky_solve: it copies the factor, reads a status back on a CPU, and leaves a batch on a GPU to MAGMA
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


# --------------------------------------------------------------------------------------------------- ops of the kernels
# Without a derivative: what needs one goes by way of krr.py, or of the torch backend.


@torch.library.custom_op("kernels::spd_factor", mutates_args=())
def _spd_factor(k: Tensor, lam: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    factor, info = factor_(k.clone(), lam, backend)
    # a packed factor without its inverses: the library's is packed too where solves are by the kernel
    return factor.tril().masked_fill_((info != 0)[..., None, None], math.nan), info


@_spd_factor.register_fake
def _(k, lam, backend):
    return torch.empty_like(k, memory_format=torch.contiguous_format), k.new_empty(k.shape[:-2], dtype=torch.int32)


@torch.library.custom_op("kernels::spd_solve", mutates_args=())
def _spd_solve(factor: Tensor, b: Tensor, backend: str) -> Tensor:
    if _uses_solve_kernel(factor, b.shape[-1], backend):
        return launch_solve(launch_pack(factor.clone(memory_format=torch.contiguous_format)), b)
    return solve_(factor, b).contiguous()


@_spd_solve.register_fake
def _(factor, b, backend):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _needs_gradient(name: str, backend: str, *tensors: Tensor) -> bool:
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    if backend == "triton":
        raise ValueError(f"{name} has no gradient with backend 'triton': use 'auto' or 'torch', or krr_predict")
    return True


# -------------------------------------------------------------------------------------------------------------- public


def spd_factor(k: Tensor, lam: float | Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of k + lam I, and info.

    k (…, m, m) in float64 or float32, of which only the lower triangle is read; lam >= 0, a number or a tensor (…).
    Returns the factor (…, m, m), all NaN for a matrix that has none, and info (…) int32: 0, or 1 + the first bad pivot.
    """
    check_matrix("k", k)
    check_backend(backend, k.device.type, k.device.index)
    if k.shape[-1] != k.shape[-2]:
        raise ValueError(f"k must be square, got {tuple(k.shape)}")
    if k.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"k must be float64 or float32, got {k.dtype}")
    lam = as_lam(lam, k, k.dtype)
    if backend == "torch" or _needs_gradient("spd_factor", backend, k, lam):
        return factor_(k.clone(), lam)
    return _spd_factor(k, lam, backend)


def spd_solve(factor: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """(L Lᵀ)⁻¹ b for a lower factor L (…, m, m) and b (…, m, c); NaN where the factor is."""
    check_matrix("factor", factor)
    check_like("b", b, "factor", factor)
    check_backend(backend, b.device.type, b.device.index)
    if b.shape[-2] != factor.shape[-1]:
        raise ValueError(f"b has {b.shape[-2]} rows, but factor has {factor.shape[-1]}")
    if backend == "torch" or _needs_gradient("spd_solve", backend, factor, b):
        return solve_(factor, b)
    return _spd_solve(factor, b, backend)


# ----------------------------------------------------------------------------------------------------------- failures


class FailedFactorization(RuntimeError):
    """A matrix was not positive definite, so that a ridge prediction was NaN."""


# Per device [call, lam] of the first failure since the last `raise_if_failed`; call 0 is none. What a call was (shapes,
# known without the device) is kept here on the host, once per distinct call.
_first_failure: dict[torch.device, Tensor] = {}
_calls: dict[tuple, int] = {}


def record_failure(info: Tensor, lam: Tensor, op: str, m: int, n: int | None, d: int, by_kernel: bool = False) -> None:
    """Notes on the device, without waiting for it, that a factorisation of this call failed, if one did.

    by_kernel: in one launch instead of ten.
    """
    if info.numel() == 0:
        return
    call = _calls.setdefault((op, m, n, d), len(_calls) + 1)
    if info.device not in _first_failure:
        dtype = torch.float32 if info.device.type == "mps" else torch.float64
        _first_failure[info.device] = torch.zeros(2, dtype=dtype, device=info.device)
    if by_kernel:
        with torch.cuda.device_of(info):
            _record_kernel[(1,)](
                _first_failure[info.device], info, lam.contiguous(), call, info.numel(), WIDTH=128, num_warps=1
            )
        return
    noted_call, noted_lam = _first_failure[info.device]  # views
    failed = info.flatten() != 0
    failed_lam = lam.flatten().index_select(0, failed.to(torch.uint8).argmax(0, keepdim=True))[0]
    first = failed.any() & (noted_call == 0)
    noted_lam.copy_(torch.where(first, failed_lam.to(noted_lam.dtype), noted_lam))
    noted_call.masked_fill_(first, call)  # not torch.where: that would copy a Python number to the device, and wait


def raise_if_failed(step: int | str) -> None:
    """Raises FailedFactorization if a factorisation failed since the last call, and clears the record.

    step: when that was, for the message: 12, or "1 to 12" where not every step asks. The message also has the sizes
    and the ridge of the first failure. The only function of the package that waits for the device: call it where the
    loop logs, not at every step.
    """
    found = [record.tolist() for record in _first_failure.values()]
    for record in _first_failure.values():
        record.zero_()
    for call, lam in found:
        if call:
            op, m, n, d = next(what for what, number in _calls.items() if number == call)
            raise FailedFactorization(
                f"step {step}: in {op} the matrix of the ridge solve was not positive definite"
                f" (m = {m}, n = {'none' if n is None else n}, d = {d}, lam = {lam:.4g});"
                " raise the ridge, or look for non-finite features where lam is nan or inf"
            )
