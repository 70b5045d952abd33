"""kernels/ with backend="triton": Gram matrices, factor, solves, the ridge ops on them, and the choice of the backend.

On a CUDA device the kernels run compiled, elsewhere in Triton's interpreter. Every tensor a launch allocates starts as
NaN here (`poisoned`), so that an element no kernel wrote shows; inputs lie in buffers of NaN (`in_nan`), so that an
element read from outside shows; and in the interpreter the address of every load and store is checked (`own_memory`).
"""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from kernels import (
    FailedFactorization,
    factor_ahead,
    gram,
    gram_pair,
    krr_predict,
    raise_if_failed,
    ridge_fit,
    spd_factor,
    spd_solve,
)
from kernels.gram import (
    CONFIGS,
    NATIVE_UNALIGNED,
    Config,
    _gram,
    _gram_pair,
    _lower_tile,
    _rows_contiguous,
    config_for,
    launch,
)
from kernels.krr import _factor_ahead, _krr_predict, _ridge_fit, krr_predict_ref, ridge_fit_ref, route
from kernels.solve import (
    BLOCK,
    MAX_SMALL,
    _spd_factor,
    _spd_solve,
    factor_,
    launch_factor,
    launch_pack,
    launch_solve,
    record_failure,
    uses_factor_kernel,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

GRAM = sys.modules["kernels.gram"]  # kernels.gram is the function
pytestmark = pytest.mark.usefixtures("clean_record")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
U64, U32 = 2.0**-53, 2.0**-24  # unit roundoff
NOWHERE = np.empty(0, np.uint64)
SMALL, LARGER = Config(16, 16, 4, 2), Config(32, 32, 4, 2)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the launches allocate, results and workspaces, starts as NaN, and integers as 77."""
    new_empty = torch.Tensor.new_empty

    def poison(*args, **how):
        made = new_empty(*args, **how)
        return made.fill_(math.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def randn(*shape, dtype=F64):
    return torch.randn(shape, dtype=F64).to(dtype).to(DEVICE)


def in_nan(x):
    """x with a row stride of its own, in the middle of a buffer of NaN."""
    *batch, rows, columns = x.shape
    buffer = x.new_full((*batch, rows + 2, columns + 3), math.nan)
    view = buffer[..., 1 : 1 + rows, 2 : 2 + columns]
    view.copy_(x)
    return view


def addresses(x, keep=None):
    """Of all elements of x, or of those where the mask `keep` is set."""
    index = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        index = index[..., None] + torch.arange(size) * stride
    index = index if keep is None else index[keep.expand(x.shape)]
    return (x.data_ptr() + x.element_size() * index.flatten()).numpy().astype(np.uint64)


@pytest.fixture
def own_memory(monkeypatch):
    """own_memory(call, *readable, writable=(), once=False) is call(), with every address that a kernel uses checked.

    Loads must be from these addresses, or from what was allocated by new_empty in the call; stores must be to that, or
    to `writable`. So an input that was copied fails too. With once=True no element may be stored twice. Only in the
    interpreter: on a GPU, call() is all there is.
    """

    def run(call, *readable, writable=(), once=False):
        if DEVICE == "cuda":
            return call()
        allocated, stored = [], []
        targets, sources = (
            np.sort(np.concatenate([NOWHERE, *writable])),
            np.sort(np.concatenate([NOWHERE, *readable, *writable])),
        )
        new_empty = torch.Tensor.new_empty
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def allocate(*args, **how):
            nonlocal sources, targets
            made = new_empty(*args, **how)
            if made.numel():
                allocated.append(made)  # alive until the end, so that its addresses are nobody else's
                sources, targets = (np.sort(np.concatenate([known, addresses(made)])) for known in (sources, targets))
            return made

        def check(ptrs, mask, known, what):
            used = ptrs.data[mask.data]
            at = np.searchsorted(known, used)
            assert (at < len(known)).all() and (known[at] == used).all(), what
            return used

        def checked_load(self, ptrs, mask, *rest):
            check(ptrs, mask, sources, "read outside")
            return load(self, ptrs, mask, *rest)

        def checked_store(self, ptrs, value, mask, *rest):
            stored.append(check(ptrs, mask, targets, "written outside"))
            return store(self, ptrs, value, mask, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", allocate)
            patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
            patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
            result = call()
        if once and stored:
            used = np.concatenate(stored)
            assert len(np.unique(used)) == len(used), "written twice"
        return result

    return run


def relative(a, b):
    return ((a.to(F64) - b.to(F64)).norm() / b.to(F64).norm()).item()


def same_bits(a, b):
    """Equal with NaN = NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


# ----------------------------------------------------------------------------------------------------------------- gram

MODES = [
    ("fp64", F64),
    ("fp64", F32),
    ("fp64", BF16),
    ("tf32x3", F32),
    ("ieee", F32),
    ("ieee", BF16),
    ("native", BF16),
    ("native", F16),
]
modes = pytest.mark.parametrize(("mode", "dtype"), MODES, ids=[f"{mode}-{str(dtype)[6:]}" for mode, dtype in MODES])
# (m, n, d, plus): sizes below, at and above a tile of 16, whole and rest blocks of columns
SHAPES = [(1, 70, 5, 0.75), (2, 1, 130, 0.0), (16, 15, 0, 0.75), (15, 16, 16, 0.0), (17, 33, 65, 0.75), (70, 2, 1, 0.0)]


def assert_gram(k, x, y, mode, plus=0.0):
    """k = x yᵀ + plus up to rounding, element by element, relative to |x| |y|ᵀ + |plus|.

    fp64: a sum of d + 1 terms in any order is within (d + 1) u of that, and the reference is such a sum too. Otherwise
    twice torch's own error in float32, and 4 u: three TF32 products leave out the product of the two low halves,
    2^-11 · 2^-11 = 4 u of each term, and on an exact torch (d = 1) a factor of two is nothing.
    """
    x, y = x.double(), y.double()
    exact, scale = x @ y.mT + plus, x.abs() @ y.abs().mT + abs(plus)
    if mode == "fp64":
        bound = 2 * (x.shape[-1] + 1) * U64
    else:
        by_torch = x.float() @ y.float().mT + plus
        bound = 2 * ((by_torch - exact).abs() / scale.clamp_min(1e-300)).max() + 4 * U32
    assert k.dtype == (F64 if mode == "fp64" else F32)
    assert ((k - exact).abs() <= bound * scale).all()


@pytest.mark.parametrize(
    ("mode", "dtype", "split"),
    # how the parts are added depends on the dtype of the sums alone
    [(*each, 1) for each in MODES] + [("fp64", F32, 3), ("tf32x3", F32, 3), ("native", BF16, 3)],
    ids=str,
)
def test_gram_of_every_shape(mode, dtype, split, own_memory):
    """Strided rows inside NaN: values, symmetry, all elements written, each once."""
    for m, n, d, plus in SHAPES:
        f_s, f_t = in_nan(randn(m, d, dtype=dtype)), in_nan(randn(n, d, dtype=dtype))
        how = dict(symmetric=True, mode=mode, plus=plus, config=LARGER if d > 100 else SMALL, split=split)

        def call():
            return launch(f_s, f_t, **how)  # noqa: B023

        if mode == "fp64" and dtype == BF16:  # copied to float32
            k_ss, k_ts = call()
        else:
            k_ss, k_ts = own_memory(call, addresses(f_s), addresses(f_t), once=True)
        assert_gram(k_ss, f_s, f_s, mode, plus)
        assert_gram(k_ts, f_t, f_s, mode, plus)
        assert torch.equal(k_ss, k_ss.mT)


@pytest.mark.parametrize("split", [1, 2])
def test_gram_alone_is_as_grouped(split, own_memory):
    f_s, f_t = in_nan(randn(33, 40)), in_nan(randn(17, 40))
    how = dict(mode="fp64", config=SMALL, split=split)
    k_ss, k_ts = launch(f_s, f_t, symmetric=True, **how)
    alone, nothing = own_memory(lambda: launch(f_s, None, symmetric=True, **how), addresses(f_s), once=True)
    assert torch.equal(alone, k_ss)
    assert nothing is None
    both = addresses(f_s), addresses(f_t)
    nothing, alone = own_memory(lambda: launch(f_s, f_t, symmetric=False, **how), *both, once=True)
    assert torch.equal(alone, k_ts)
    assert nothing is None


@modes
def test_gram_with_the_default_configuration(mode, dtype):
    """Whole tiles, rests of tiles, and a second launch with the same bits."""
    f_s, f_t = in_nan(randn(70, 130, dtype=dtype)), in_nan(randn(33, 130, dtype=dtype))
    k_ss, k_ts = launch(f_s, f_t, symmetric=True, mode=mode)
    assert_gram(k_ss, f_s, f_s, mode)
    assert_gram(k_ts, f_t, f_s, mode)
    assert torch.equal(k_ss, k_ss.mT)
    again = launch(f_s, f_t, symmetric=True, mode=mode)
    assert torch.equal(again[0], k_ss)
    assert torch.equal(again[1], k_ts)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2), (0,)])
@pytest.mark.parametrize("split", [1, 2])
def test_gram_of_a_batch(batch, split, own_memory):
    """Each matrix of a batch is that of its own features."""
    f_s, f_t = in_nan(randn(*batch, 17, 40)), in_nan(randn(*batch, 18, 40))
    how = dict(symmetric=True, mode="fp64", config=SMALL, split=split)
    k_ss, k_ts = own_memory(lambda: launch(f_s, f_t, **how), addresses(f_s), addresses(f_t), once=True)
    assert k_ss.shape == (*batch, 17, 17)
    assert k_ts.shape == (*batch, 18, 17)
    assert_gram(k_ss, f_s, f_s, "fp64")
    assert_gram(k_ts, f_t, f_s, "fp64")


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_gram_of_no_rows(m, n):
    f_s, f_t = randn(2, m, 3), randn(2, n, 3)
    k_ss, k_ts = launch(f_s, f_t, symmetric=True, mode="fp64", config=SMALL)
    assert k_ss.shape == (2, m, m)
    assert k_ts.shape == (2, n, m)
    if m:
        assert_gram(k_ss, f_s, f_s, "fp64")
    assert gram(f_t, f_s, backend="triton").shape == (2, n, m)
    assert [k.shape for k in gram_pair(f_s, f_t, backend="triton")] == [(2, m, m), (2, n, m)]


def test_gram_reads_its_inputs_in_place(own_memory):
    """A stride of rows or of the batch needs no copy; a stride of columns does, and gives the same."""
    x, y = randn(17, 24), randn(5, 24)
    rows = in_nan(x)
    batch = rows.expand(3, 17, 24)
    one_row_for_all = x[:1].expand(17, 24)
    one_column = randn(4, 34).mT[::2, 1:2]  # whatever its stride of columns
    for view in (rows, batch, one_row_for_all, one_column, in_nan(randn(2, 2, 5, 3))):
        assert _rows_contiguous(view).data_ptr() == view.data_ptr()
        (k, _) = own_memory(
            lambda: launch(view, None, symmetric=True, mode="fp64", config=SMALL),  # noqa: B023
            addresses(view),
        )
        assert_gram(k, view, view, "fp64")
    transposed = x.mT.contiguous().mT
    assert transposed.stride() == (1, 17)
    how = dict(symmetric=True, mode="fp64", config=SMALL)
    for a, b in zip(launch(transposed, y, **how), launch(x, y, **how), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(launch(y, transposed, **how)[1], launch(y, x, **how)[1])


def test_the_parts_of_a_split_sum_are_added_in_their_order():
    """(2^60 − 2^60) + 1 = 1, and 0 in any other order: the parts are whole blocks of columns, first to last."""
    x, y = torch.zeros(2, 1, 44, dtype=F64, device=DEVICE)
    for first, a, b in ((0, 2.0**30, 2.0**30), (16, 2.0**30, -(2.0**30)), (32, 1.0, 1.0)):
        x[0, first], y[0, first] = a, b
    k = launch(y, x, symmetric=False, mode="fp64", config=SMALL, split=3)[1]
    assert k.item() == 1


def test_split_automatically():
    """Few tiles and many columns are split, at most into parts of 256 columns; the sum then has other bits."""
    x, y = randn(3, 600, dtype=F32), randn(4, 600, dtype=F32)

    def bits(**how):
        return launch(x, y, symmetric=False, mode="ieee", **how)[1]

    assert torch.equal(bits(), bits(split=2))
    assert not torch.equal(bits(), bits(split=1))
    x, y = x[:, :500], y[:, :500]
    assert torch.equal(bits(), bits(split=1))


@triton.jit
def _tiles_kernel(t, i, j, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    row, column = _lower_tile(tl.load(t + at))
    tl.store(i + at, row)
    tl.store(j + at, column)


@pytest.mark.parametrize("error", [0, 2.0**-22, -(2.0**-22)])
def test_the_tiles_below_the_diagonal(error, monkeypatch):
    """All of the first 300 000, and the first and last of each row up to 2^28 tiles: there float32 square roots do go
    wrong, also those of the interpreter; and as much more as the approximate ones of a GPU may (a relative 2^-23)."""
    if error and DEVICE == "cuda":
        pytest.skip("square roots have their own error")
    exact = InterpreterBuilder.create_sqrt

    def root(self, x):
        y = exact(self, x)
        y.data *= np.float32(1 + error)
        return y

    monkeypatch.setattr(InterpreterBuilder, "create_sqrt", root)
    i = torch.arange(23169)
    first = i * (i + 1) // 2  # tile (i, 0)
    t = torch.cat([torch.arange(300_000), first, first + i, first + i // 2])
    width = 4096
    t = torch.nn.functional.pad(t, (0, -len(t) % width)).to(torch.int32).to(DEVICE)
    row, column = torch.empty_like(t), torch.empty_like(t)
    _tiles_kernel[(len(t) // width,)](t, row, column, WIDTH=width)
    t, row, column = (x.cpu().long() for x in (t, row, column))
    assert ((column >= 0) & (column <= row)).all()
    assert torch.equal(row * (row + 1) // 2 + column, t)


def test_the_configuration_of_half_inputs():
    """Two-byte loads in the large configuration need aligned rows."""
    x = torch.zeros(2, 8, 64, dtype=BF16, device=DEVICE)
    assert config_for("native", x, x) == CONFIGS["native"]
    assert config_for("native", x, x[..., 16:]) == CONFIGS["native"]
    off = torch.zeros(2 * 8 * 64 + 1, dtype=BF16, device=DEVICE)[1:].view(2, 8, 64)
    odd_rows = torch.zeros(2, 8, 72, dtype=BF16, device=DEVICE)[..., :64]
    odd_batch = torch.zeros(2, 8 * 64 + 8, dtype=BF16, device=DEVICE)[:, : 8 * 64].view(2, 8, 64)
    for y in (off, odd_rows, odd_batch):
        assert config_for("native", x, y) == NATIVE_UNALIGNED
        assert config_for("native", y, x) == NATIVE_UNALIGNED
        assert config_for("fp64", x, y) == CONFIGS["fp64"]
    assert config_for("native", x[..., :40], x[..., :40]) == NATIVE_UNALIGNED


@pytest.mark.parametrize(
    ("dtype", "precision", "mode"),
    [
        (F64, "fp32", "fp64"),
        (F32, "fp64", "fp64"),
        (F32, "fp32", "tf32x3"),
        (F32, "ieee", "ieee"),
        (BF16, "fp64", "fp64"),
        (BF16, "fp32", "native"),
        (F16, "fp32", "native"),
        (F16, "ieee", "ieee"),
    ],
)
def test_gram_by_its_public_functions(dtype, precision, mode, monkeypatch):
    """They launch in the right mode, once, and round its result to the inputs' dtype."""
    x, y = randn(2, 17, 5, dtype=dtype), randn(2, 4, 5, dtype=dtype)
    launched = []

    def spy(*args, **how):
        launched.append(how["mode"])
        return launch(*args, **how)

    monkeypatch.setattr(GRAM, "launch", spy)
    how = dict(precision=precision, backend="triton")
    pair = gram_pair(x, y, **how)
    assert launched == [mode]
    k_ss, k_ts = gram(x, **how), gram(y, x, **how)
    assert launched == [mode] * 3
    expected = [k.to(dtype) for k in launch(x, y, symmetric=True, mode=mode)]
    for found in (pair, (k_ss, k_ts)):
        assert all(k.dtype == dtype and torch.equal(k, e) for k, e in zip(found, expected, strict=True))


def test_gram_gradients():
    """By autograd of x xᵀ, x yᵀ and both: a sum of up to 33 products in float64 has an error of about 1e-15."""
    f_s, f_t = randn(2, 17, 5).requires_grad_(), randn(2, 4, 5).requires_grad_()
    how = dict(backend="triton")
    pairs = [
        (gram(f_s, **how), f_s @ f_s.mT),
        (gram(f_t, f_s, **how), f_t @ f_s.mT),
        (torch.cat(gram_pair(f_s, f_t, **how), -2), torch.cat([f_s @ f_s.mT, f_t @ f_s.mT], -2)),
    ]
    for found, wanted in pairs:
        weight = torch.randn_like(wanted)
        for x in (f_s, f_t):
            a, b = (
                torch.autograd.grad(
                    (k * weight).sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
                for k in (found, wanted)
            )
            assert (a - b).norm() <= 1e-13 * b.norm()


# ----------------------------------------------------------------------------------------------------- factor and solve

ROWS = [1, 2, 15, 16, 17, 33, 64, 65, 100, 130, 208]
COLUMNS = dict(zip(ROWS, [1, 3, 16, 17, 40, 1, 3, 17, 40, 16, 1], strict=True))
roundoff = pytest.mark.parametrize(("dtype", "u"), [(F64, U64), (F32, U32)], ids=["fp64", "fp32"])


def below(m):
    """A mask of the lower triangle."""
    return torch.ones(m, m, dtype=torch.bool, device=DEVICE).tril()


def packed_part(m):
    """Where a packed factor holds something: the lower triangle, and all of the diagonal blocks."""
    block = torch.arange(m, device=DEVICE) // BLOCK
    return below(m) | (block[:, None] == block)


def spd(*batch, m, dtype=F64):
    """Eigenvalues from 0.1 to about 4, NaN above the diagonal, rows inside NaN."""
    x = randn(*batch, m, m + 4)
    k = x @ x.mT / m + 0.1 * torch.eye(m, device=DEVICE)
    return in_nan(k.to(dtype).masked_fill(~below(m), math.nan))


def with_ridge(k, lam):
    """In float64 and full, the matrix of which k holds the lower triangle, plus lam I."""
    k = k.double()
    return k.tril() + k.tril(-1).mT + lam.double()[..., None, None] * torch.eye(k.shape[-1], device=DEVICE)


def ridges(*batch, dtype):
    return (0.1 + torch.rand(batch, dtype=F64)).to(dtype).to(DEVICE)


def assert_factor(lower, a, u):
    """L Lᵀ = a + E with ||E|| <= 10 m u ||a||: the bound of any order of sums is (m + 1) u |L| |L|ᵀ, and ten is room
    for the products with computed inverses."""
    error = torch.linalg.matrix_norm(lower.double() @ lower.double().mT - a)
    assert (error <= 10 * a.shape[-1] * u * torch.linalg.matrix_norm(a)).all()


def assert_solved(x, a, b, u):
    """Each column has the backward error of a stable solve, whatever the condition."""
    x, b = x.double(), b.double()
    scale = torch.linalg.matrix_norm(a, 2)[..., None] * x.norm(dim=-2) + b.norm(dim=-2)
    assert ((a @ x - b).norm(dim=-2) <= 10 * a.shape[-1] * u * scale).all()


@roundoff
@pytest.mark.parametrize("m", ROWS)
def test_factor(m, dtype, u, own_memory):
    """From the lower triangle alone, with a ridge for each matrix: the factor, and all that is packed above it.

    A relative change e of the matrix changes the factor by about cond e, and the inverses of its blocks, which have a
    lower condition, by no more: here cond <= 4.1 / 0.2 + 1.1, say 100.
    """
    batch = (2,) if m <= 17 else ()
    k, lam = spd(*batch, m=m, dtype=dtype), ridges(*batch, dtype=dtype)
    readable = addresses(k, below(m)), addresses(lam)
    factor, info = own_memory(lambda: launch_factor(k, lam), *readable) if dtype == F64 else launch_factor(k, lam)
    assert info.dtype == torch.int32
    assert torch.equal(info, torch.zeros(batch, dtype=torch.int32, device=DEVICE))
    a = with_ridge(k, lam)
    assert_factor(factor.tril(), a, u)

    expected = torch.linalg.cholesky(a)
    for start in range(0, m, BLOCK):
        block = expected[..., start : start + BLOCK, start : start + BLOCK]
        block += torch.linalg.inv(block.tril()).tril(-1).mT
    assert relative(factor, expected) <= 100 * 10 * m * u
    assert (factor.masked_select(~packed_part(m)) == 0).all()
    if m < 100:
        assert torch.equal(launch_factor(k, lam)[0], factor)  # the same bits again


@roundoff
@pytest.mark.parametrize("m", ROWS)
def test_pack_and_solve(m, dtype, u, own_memory):
    """What a kernel has no business with is NaN: above the diagonal before, outside of the blocks after packing."""
    batch, c = ((2,) if m <= 17 else ()), COLUMNS[m]
    k, lam, b = spd(*batch, m=m, dtype=dtype), ridges(*batch, dtype=dtype), in_nan(randn(*batch, m, c, dtype=dtype))
    a = with_ridge(k, lam)
    lower = torch.linalg.cholesky(a).to(dtype).masked_fill(~below(m), math.nan)
    factor = lower.clone()
    readable = addresses(factor, below(m) & packed_part(m))
    packed = own_memory(lambda: launch_pack(factor), readable, writable=[addresses(factor, packed_part(m) & ~below(m))])
    assert packed is factor
    assert same_bits(factor.tril(), lower.tril())
    for start in range(0, m, BLOCK):
        block = factor[..., start : start + BLOCK, start : start + BLOCK]
        inverse = block.mT.tril(-1) + torch.diag_embed(1 / block.diagonal(dim1=-2, dim2=-1))
        # |l l⁻¹ − I| <= 16 u |l| |l⁻¹| for a triangular inverse, and cond(l) <= sqrt(100)
        assert ((block.tril() @ inverse - torch.eye(block.shape[-1], device=DEVICE)).abs() <= 16 * 10 * u).all()
    assert factor.masked_select(~packed_part(m)).isnan().all()

    readable = addresses(factor, packed_part(m)), addresses(b)
    x = own_memory(lambda: launch_solve(factor, b), *readable) if dtype == F64 else launch_solve(factor, b)
    assert_solved(x, a, b, u)
    if m < 100:
        assert torch.equal(launch_solve(factor, b), x)


@pytest.mark.parametrize(("one", "other"), [(20, 21), (16, 31), (5, 30)])
@pytest.mark.parametrize(("dtype", "u", "apart"), [(F64, U64, 1e-6), (F32, U32, 0.01)], ids=["fp64", "fp32"])
def test_an_ill_conditioned_matrix(one, other, dtype, u, apart):
    """Two rows of features are almost the same, in one block or two: the bounds of a stable algorithm hold as ever.

    The condition is 1e12 (1e4 in fp32), that of the block's factor 1e6 (100): so many digits are lost by a product with
    an inverse that is not corrected, and by an elimination that does not keep the block symmetric.
    """
    x = randn(50, 70)
    x[other] = x[one] + apart * x[other]
    k = (x @ x.mT).to(dtype)
    a, lam = k.double(), torch.zeros((), dtype=dtype, device=DEVICE)
    b = torch.cat([randn(50, 2), a @ randn(50, 2)], 1).to(dtype)  # a large solution, and one of ordinary size
    factor, info = launch_factor(k, lam)
    assert info.item() == 0
    assert_factor(factor.tril(), a, u)
    assert_solved(launch_solve(factor, b), a, b, u)
    by_library = torch.linalg.cholesky(k).contiguous()
    assert_solved(launch_solve(launch_pack(by_library), b), a, b, u)


@pytest.mark.parametrize("c", [1, 17])
def test_right_hand_sides_of_any_layout(c, own_memory):
    """Strided rows and an expanded batch are read in place; transposed ones are copied; none is changed."""
    m = 33
    a = with_ridge(spd(2, m=m), torch.zeros(2, device=DEVICE))
    factor = launch_pack(torch.linalg.cholesky(a).contiguous())
    rows = in_nan(randn(2, m, c))
    transposed = randn(2, c, m).mT
    for b in (rows, rows[:1].expand(2, m, c), rows[:, :1].expand(2, m, c)):
        x = own_memory(lambda: launch_solve(factor, b), addresses(factor, packed_part(m)), addresses(b))  # noqa: B023
        assert x.is_contiguous()
        assert_solved(x, a, b, U64)
    assert torch.equal(launch_solve(factor, transposed), launch_solve(factor, transposed.contiguous()))


@pytest.mark.parametrize("batch", [(0,), (2, 2), (3, 0)])
def test_factor_and_solve_of_a_batch(batch):
    """Whose ridges are not contiguous, as those of an expanded tensor."""
    k, lam = spd(*batch, m=17), ridges(*batch, 2, dtype=F64)[..., 0]
    factor, info = launch_factor(k, lam)
    assert factor.shape == k.shape
    assert torch.equal(info, torch.zeros(batch, dtype=torch.int32, device=DEVICE))
    b = randn(*batch, 17, 3)
    assert_factor(factor.tril(), with_ridge(k, lam), U64)
    assert_solved(launch_solve(factor, b), with_ridge(k, lam), b, U64)
    assert launch_solve(factor, b[..., :0]).shape == (*batch, 17, 0)


def test_nothing_to_factor():
    factor, info = launch_factor(randn(2, 0, 0), torch.ones(2, dtype=F64, device=DEVICE))
    assert factor.shape == (2, 0, 0)
    assert info.tolist() == [0, 0]
    assert launch_pack(factor) is factor
    assert launch_solve(factor, randn(2, 0, 3)).shape == (2, 0, 3)


def test_factor_of_a_transposed_matrix():
    """Its lower triangle is the upper one in memory."""
    k, lam = spd(m=20), ridges(dtype=F64)
    assert torch.equal(launch_factor(k.mT.contiguous().mT, lam)[0], launch_factor(k, lam)[0])


def with_pivots(bad=(), m=40):
    """L D Lᵀ of small whole numbers, exact in any order of sums: pivots of 1, but those of `bad` {row: pivot}."""
    lower = torch.eye(m, dtype=F64)
    for i in range(1, m):
        lower[i, i - 1] = (-1) ** (i // 3)
    for i in range(17, m):
        lower[i, i - 17] = 1
    d = torch.ones(m, dtype=F64)
    for i, pivot in dict(bad).items():
        d[i] = pivot
    return lower @ d.diag() @ lower.mT


def changed(i, j, value):
    k = with_pivots()
    k[i, j] = k[j, i] = value
    return k


def duplicate():
    """Rows 12 and 27 of the features are the same."""
    x = torch.cat([torch.eye(40, dtype=F64), torch.ones(40, 1, dtype=F64)], 1)
    x[27] = x[12]
    return x @ x.mT


# (matrix, 1 + its first bad pivot)
BAD = {
    "indefinite": (with_pivots({21: -1, 30: -1}), 22),
    "indefinite in two blocks": (with_pivots({5: -1, 20: -1}), 6),
    "singular": (with_pivots({37: 0}), 38),
    "singular at the first row of a block": (with_pivots({16: 0, 17: -2}), 17),
    "zero": (torch.zeros(40, 40, dtype=F64), 1),
    "nan": (changed(21, 3, math.nan), 22),
    "nan within a block": (changed(22, 19, math.nan), 23),
    "nan on the diagonal": (changed(33, 33, math.nan), 34),
    "inf": (changed(30, 2, math.inf), 31),
    "inf within a block": (changed(12, 7, math.inf), 13),
    "inf on the diagonal": (changed(35, 35, math.inf), 36),
    "all nan": (torch.full((40, 40), math.nan, dtype=F64), 1),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what follows a bad pivot may be anything
def test_bad_matrices():
    """Each bad matrix of a batch has its info and a factor of NaN, as on the torch backend; good ones are untouched."""
    good = with_pivots()
    k = torch.stack([good, *(matrix for matrix, _ in BAD.values()), 2 * good])
    expected = [0, *(pivot for _, pivot in BAD.values()), 0]
    # the ridge is one more for each matrix, and taken off before: still whole numbers
    lam = torch.arange(len(k), dtype=F64)
    k -= lam[:, None, None] * torch.eye(40, dtype=F64)
    factor, info = launch_factor(k.to(DEVICE), lam.to(DEVICE))
    assert dict(zip(["good", *BAD, "good too"], info.tolist(), strict=True)) == dict(
        zip(["good", *BAD, "good too"], expected, strict=True)
    )
    assert factor_(k.clone(), lam)[1].tolist() == expected
    assert factor[info != 0].isnan().all()
    x = launch_solve(factor[-2:], randn(2, 40, 3))
    assert x[0].isnan().all()
    assert x[1].isfinite().all()
    for i in (0, len(k) - 1):
        alone, _ = launch_factor(k[i].to(DEVICE), lam[i].to(DEVICE))
        assert torch.equal(factor[i], alone)
        assert alone.isfinite().all()


def test_duplicates_need_a_ridge(own_memory):
    """A pivot of exactly 0 is reported, and not divided by (a warning, which is an error here)."""
    k = duplicate().to(DEVICE)
    for ridge, expected in ((0.0, 28), (1e-6, 0)):
        lam = torch.full((), ridge, dtype=F64, device=DEVICE)
        factor, info = own_memory(lambda: launch_factor(k, lam), addresses(k), addresses(lam))  # noqa: B023
        assert info.item() == expected
        assert factor.isnan().all() if expected else factor.isfinite().all()


def test_which_matrices_are_small():
    for m, small in ((0, True), (1, True), (MAX_SMALL, True), (MAX_SMALL + 1, False)):
        assert uses_factor_kernel(torch.empty(2, m, m, device=DEVICE), "triton") == small


@pytest.mark.parametrize("m", [20, MAX_SMALL + 1])
def test_public_factor_and_solve(m, monkeypatch):
    """Small matrices by the kernel, others by the library; always a plain lower factor, and the kernel's solve."""
    launched = []
    for name in ("launch_factor", "launch_pack", "launch_solve"):
        original = getattr(kernels.solve, name)

        def spy(*args, name=name, original=original):
            launched.append(name)
            return original(*args)

        monkeypatch.setattr(kernels.solve, name, spy)

    k, lam, b = spd(m=m), 0.1, in_nan(randn(m, 3))
    before, a = k.clone(), with_ridge(k, torch.full((), 0.1, dtype=F64, device=DEVICE))
    factor, info = spd_factor(k, lam, backend="triton")
    assert info.item() == 0
    assert torch.equal(factor, factor.tril())
    assert factor.is_contiguous()
    assert_factor(factor, a, U64)
    assert same_bits(k, before)
    assert ("launch_factor" in launched) == (m <= MAX_SMALL)

    launched.clear()
    given = factor.masked_fill(~below(m), math.nan)  # only its lower triangle is read
    before = given.clone()
    x = spd_solve(given, b, backend="triton")
    assert launched == ["launch_pack", "launch_solve"]
    assert_solved(x, a, b, U64)
    assert same_bits(given, before)
    assert torch.equal(spd_solve(given.mT.contiguous().mT, b, backend="triton"), x)


@pytest.mark.parametrize("max_small", [MAX_SMALL, 16])
def test_public_factor_of_a_bad_matrix(max_small, monkeypatch):
    """By the kernel, and by the library."""
    monkeypatch.setattr(kernels.solve, "MAX_SMALL", max_small)
    m = 20
    k = torch.eye(m, dtype=F32, device=DEVICE).repeat(2, 1, 1)
    k[1, 3, 3] = -1
    factor, info = spd_factor(k, torch.tensor([0.0, 0.5], device=DEVICE), backend="triton")
    assert info.tolist() == [0, 4]
    assert torch.equal(factor[0], torch.eye(m, device=DEVICE))
    assert factor[1].isnan().all()
    x = spd_solve(factor, torch.ones(2, m, 1, device=DEVICE), backend="triton")
    assert torch.equal(x[0], torch.ones(m, 1, device=DEVICE))
    assert x[1].isnan().all()


def test_the_kernels_alone_have_no_gradient():
    k, b = torch.eye(3, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    lam = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    for call in (
        lambda backend: spd_factor(k.clone().requires_grad_(), 0.5, backend=backend)[0],
        lambda backend: spd_factor(k, lam, backend=backend)[0],
        lambda backend: spd_solve(k.clone().requires_grad_(), b, backend=backend),
        lambda backend: spd_solve(k, b.clone().requires_grad_(), backend=backend),
    ):
        with pytest.raises(ValueError, match="no gradient with backend 'triton'"):
            call("triton")
        assert call("auto").requires_grad
        with torch.no_grad():
            assert not call("triton").requires_grad


# ------------------------------------------------------------------------------------------------------------ ridge ops

# route: (m, n, d, c); with a column of ones too
SIZES = {"dual_w": (7, 5, 11, 2), "dual_k": (5, 4, 6, 9), "primal": (12, 5, 6, 3)}
ways = pytest.mark.parametrize("way", SIZES)
either = pytest.mark.parametrize("ones", [False, True], ids=["", "ones"])


def draw(way, batch=(), dtype=F64, grad=True):
    """f_t, f_s, y_s for a route."""
    m, n, d, c = SIZES[way]
    assert route(m, n, d, c) == route(m, n, d + 1, c) == way
    shapes = (*batch, n, d), (*batch, m, d), (*batch, m, c)
    return [randn(*shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def draw_lam(batch=()):
    return ridges(*batch, dtype=F64).requires_grad_()


def naive(ones):
    """The naive fit and prediction, in which the column of ones is written out."""

    def wide(f):
        return torch.cat([f, torch.ones_like(f[..., :1])], -1) if ones else f

    def fit(f_s, y_s, lam):
        return ridge_fit_ref(wide(f_s), y_s, lam)

    def predict(f_t, f_s, y_s, lam):
        return krr_predict_ref(wide(f_t), wide(f_s), y_s, lam)

    return fit, predict


def by_kernels(ones=False, **how):
    """ridge_fit and krr_predict with backend="triton"."""

    def fit(f_s, y_s, lam):
        return ridge_fit(f_s, y_s, lam, ones=ones, backend="triton", **how)

    def predict(f_t, f_s, y_s, lam):
        return krr_predict(f_t, f_s, y_s, lam, ones=ones, backend="triton", **how)

    return fit, predict


def with_gradients(function, inputs):
    """The value and the gradients for weights that are the same at every call, and exact in every dtype."""
    value = function(*inputs)
    weight = (2 * torch.randint(-2, 2, value.shape, generator=torch.Generator().manual_seed(1)) + 1).to(value)
    return value, *torch.autograd.grad((value * weight).sum(), inputs)


@ways
@either
@pytest.mark.parametrize("batch", [(), (2,)])
def test_values_and_gradients(way, ones, batch):
    """The condition of the systems is below 1e4, so 1e-9 leaves three digits of float64 for both sides' rounding."""
    f_t, f_s, y_s = draw(way, batch)
    lam = draw_lam(batch)
    for mine, reference, inputs in zip(
        by_kernels(ones), naive(ones), ((f_s, y_s, lam), (f_t, f_s, y_s, lam)), strict=True
    ):
        found, wanted = with_gradients(mine, inputs), with_gradients(reference, inputs)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert relative(a, b) < 1e-9, f"{mine.__name__}: {f'gradient {i}' if i else 'value'}"


@ways
def test_gradcheck(way):
    """Along random directions."""
    inputs = *draw(way), draw_lam()
    how = dict(fast_mode=True, check_undefined_grad=False)
    assert torch.autograd.gradcheck(by_kernels(ones=True)[1], inputs, **how)
    assert torch.autograd.gradcheck(by_kernels(ones=False)[0], inputs[1:], **how)


@ways
@either
def test_a_factor_from_ahead_changes_no_bit(way, ones):
    f_t, f_s, y_s = draw(way)
    lam = draw_lam()
    factor = factor_ahead(f_s, lam, y_s.shape[-1], ones=ones, backend="triton")
    assert not factor.requires_grad
    fit, predict = by_kernels(ones)
    fit_given, predict_given = by_kernels(ones, factor=factor)
    for a, b, again, inputs in (
        (predict, predict_given, predict, (f_t, f_s, y_s, lam)),
        (fit, fit_given, fit, (f_s, y_s, lam)),
    ):
        expected = with_gradients(a, inputs)
        for other in (b, again):
            assert all(torch.equal(x, y) for x, y in zip(with_gradients(other, inputs), expected, strict=True))


@ways
def test_which_kernels_run(way, monkeypatch):
    """Forward: one Gram launch, one factor, one record, one solve. Backward: one solve with the same factor.

    With a factor from ahead only what is left of that, and the features of f_t by those of f_s in route dual_k.
    """
    ran = []

    def spy_on(module, name):
        original = getattr(module, name)

        def spy(*args, **how):
            ran.append(name)
            return original(*args, **how)

        monkeypatch.setattr(module, name, spy)

    spy_on(GRAM, "launch")
    spy_on(kernels.solve, "launch_factor")
    spy_on(kernels.solve, "launch_solve")
    record = kernels.solve._record_kernel

    def record_spy(*args, **how):
        ran.append("record")
        return record[(1,)](*args, **how)

    monkeypatch.setattr(kernels.solve, "_record_kernel", defaultdict(lambda: record_spy))
    f_t, f_s, y_s = draw(way)
    pred = krr_predict(f_t, f_s, y_s, 0.5, backend="triton")
    assert ran == ["launch", "launch_factor", "record", "launch_solve"]
    pred.sum().backward()
    assert ran[4:] == ["launch_solve"]

    ran.clear()
    factor = factor_ahead(f_s, 0.5, y_s.shape[-1], backend="triton")
    assert ran == ["launch", "launch_factor", "record"]
    pred = krr_predict(f_t, f_s, y_s, 0.5, factor=factor, backend="triton")
    ridge_fit(f_s, y_s, 0.5, factor=factor, backend="triton")
    pred.sum().backward()
    assert ran[3:] == ["launch"] * (way == "dual_k") + ["launch_solve"] * 3


@ways
@pytest.mark.parametrize("precision", ["fp64", "fp32", "ieee"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lower_precision(way, precision, dtype):
    """In fp64 the result is rounded once; in fp32 the errors are those of torch in float32.

    That is twice torch's, and, as luck may have torch's near zero, what a change of 4 u in the matrix does to the
    solution at a condition of at most 1000.
    """
    inputs = *draw(way, dtype=dtype), torch.tensor(0.5, device=DEVICE, requires_grad=True)
    exact = with_gradients(naive(False)[1], [x.double() for x in inputs])
    found = with_gradients(by_kernels(precision=precision)[1], inputs)
    by_torch = with_gradients(lambda *args: krr_predict(*args, precision=precision, backend="torch"), inputs)
    rounding = {F32: U32, BF16: 2.0**-8}
    for a, b, t in zip(found, exact, by_torch, strict=True):
        assert a.dtype == t.dtype
        once = rounding[a.dtype]
        if precision == "fp64":
            assert relative(a, b) <= once + 1e-9
        else:
            assert relative(a, b) <= 2 * relative(t, b) + 4 * U32 * 1000


@ways
def test_bf16_features_are_multiplied_exactly(way, monkeypatch):
    """The Gram kernel reads them as they are: the prediction is that of the same numbers in float32."""
    modes_run = []

    def spy(*args, **how):
        modes_run.append(how["mode"])
        return launch(*args, **how)

    monkeypatch.setattr(GRAM, "launch", spy)
    f_t, f_s, y_s = draw(way, dtype=BF16, grad=False)
    pred = krr_predict(f_t, f_s, y_s, 0.5, precision="fp32", backend="triton")
    same = krr_predict(f_t.float(), f_s.float(), y_s.float(), 0.5, precision="fp64", backend="triton")
    assert relative(pred, same) <= 2.0**-8 + 1000 * 4 * U32
    assert modes_run == ["native", "fp64"]


def test_the_larger_systems(monkeypatch):
    """Above MAX_SMALL the library factors, and the failure is noted by torch: values, gradients and the note."""
    monkeypatch.setattr(kernels.solve, "MAX_SMALL", 16)
    f_t, f_s, y_s = draw("dual_w", (2,))
    lam = draw_lam((2,))
    found = with_gradients(by_kernels()[1], (f_t, f_s, y_s, lam))
    for a, b in zip(found, with_gradients(naive(False)[1], (f_t, f_s, y_s, lam)), strict=True):
        assert relative(a, b) < 1e-9
    krr_predict(f_t, f_s, y_s, torch.tensor([0.1, -500.0], dtype=F64, device=DEVICE), backend="triton")
    with pytest.raises(FailedFactorization, match=r"lam = -500\)"):
        raise_if_failed(1)


@pytest.mark.parametrize("batch", [(), (3,), (0,)])
@pytest.mark.parametrize(("m", "d"), [(4, 7), (7, 4)])
@pytest.mark.parametrize(("n", "c"), [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_predict(batch, m, d, n, c):
    inputs = [randn(*batch, *shape).requires_grad_() for shape in ((n, d), (m, d), (m, c))]
    pred = krr_predict(*inputs, 0.1, backend="triton")
    assert pred.shape == (*batch, n, c)
    for grad, x in zip(torch.autograd.grad(pred.sum(), inputs), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


# ------------------------------------------------------------------------------------------------------------- failures


@ways
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("cause", ["nan", "negative lam"])
def test_a_bad_matrix_spoils_only_itself(way, cause):
    f_t, f_s, y_s = draw(way, (3,), F32, grad=False)
    lam = torch.tensor([0.1, 0.2, 0.3], device=DEVICE)
    bad_f_s, bad_lam = f_s.clone(), lam.clone()
    if cause == "nan":
        bad_f_s[1, 2, 3] = math.nan
    else:
        bad_lam[1] = -1000.0

    def run(*inputs):
        return with_gradients(by_kernels()[1], [x.clone().requires_grad_() for x in inputs])

    found, expected = run(f_t, bad_f_s, y_s, bad_lam), run(f_t, f_s, y_s, lam)
    for a, b in zip(found, expected, strict=True):
        assert a[1].isnan().all()
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert b.isfinite().all()
    m, n, d, _ = SIZES[way]
    shown = "0.2" if cause == "nan" else "-1000"
    with pytest.raises(FailedFactorization, match=rf"krr_predict .*m = {m}, n = {n}, d = {d}, lam = {shown}\)"):
        raise_if_failed(77)
    raise_if_failed(78)  # cleared


def test_the_first_failure_is_kept():
    """Of a batch the first bad matrix, of several calls the first, until it is read."""
    zeros, f_s = torch.zeros(2, 4, 9, dtype=F64, device=DEVICE), randn(4, 9)
    how = dict(backend="triton")
    krr_predict(f_s, f_s, f_s, 1.0, **how)
    raise_if_failed(1)
    ridge_fit(zeros, zeros, torch.tensor([-0.25, -7.0], dtype=F64, device=DEVICE), **how)
    krr_predict(zeros, zeros, zeros, 0.0, **how)
    krr_predict(f_s, f_s, f_s, 1.0, **how)  # a good call does not wipe the note
    with pytest.raises(FailedFactorization, match=r"ridge_fit .*m = 4, n = none, d = 9, lam = -0.25\)"):
        raise_if_failed(2)
    raise_if_failed(3)
    factor_ahead(zeros, 0.0, 1, **how)
    with pytest.raises(FailedFactorization, match=r"factor_ahead .*m = 4, n = none, d = 9, lam = 0\)"):
        raise_if_failed(4)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("first", [None, 0, 127, 128, 199, 299])
def test_the_record_of_a_large_batch(first, dtype):
    """The kernel looks at 128 matrices at a time; also where the ridges are not contiguous, as with the torch ops."""
    info = torch.zeros(300, dtype=torch.int32, device=DEVICE)
    lam = torch.arange(600, dtype=dtype, device=DEVICE)[::2]
    if first is not None:
        info[first] = 3
        info[-1] = 1
    found = []
    for by_kernel in (True, False):
        record_failure(info, lam, "here", 5, None, 6, by_kernel=by_kernel)
        try:
            raise_if_failed(1)
            found.append(None)
        except FailedFactorization as failure:
            found.append(str(failure))
    assert found[0] == found[1]
    assert (found[0] is None) == (first is None)
    if first is not None:
        assert f"lam = {2 * first})" in found[0]


def test_the_record_reads_its_own_batch(own_memory):
    info = torch.zeros(130, dtype=torch.int32, device=DEVICE)
    lam = torch.ones(130, dtype=F64, device=DEVICE)
    record_failure(info, lam, "here", 5, None, 6, by_kernel=True)  # makes the record, if this is the first test
    info[129] = 1
    note = addresses(kernels.solve._first_failure[info.device])
    own_memory(
        lambda: record_failure(info, lam, "here", 5, None, 6, by_kernel=True),
        addresses(info),
        addresses(lam),
        writable=[note],
    )
    with pytest.raises(FailedFactorization):
        raise_if_failed(1)


# ------------------------------------------------------------------------------------------------- custom ops, compile


@ways
def test_opcheck(way):
    f_t, f_s, y_s = draw(way)
    lam = draw_lam()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    how = "fp64", "triton", True
    torch.library.opcheck(_krr_predict, (f_t, f_s, y_s, lam, None, *how), test_utils=checks)
    torch.library.opcheck(_ridge_fit, (f_s, y_s, lam, None, *how), test_utils=checks)
    torch.library.opcheck(_factor_ahead, (f_s.detach(), lam.detach(), 3, *how), test_utils=checks)


def test_opcheck_of_the_gram_and_the_solve():
    f_s, f_t = randn(2, 17, 5).requires_grad_(), randn(2, 4, 5).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(_gram, (f_s, None, "fp64", "triton"), test_utils=checks)
    for op in (_gram, _gram_pair):
        torch.library.opcheck(op, (f_s, f_t, "fp64", "triton"), test_utils=checks)
    k, lam = gram(f_s).detach(), torch.ones(2, dtype=F64, device=DEVICE)
    torch.library.opcheck(_spd_factor, (k, lam, "triton"), test_utils=checks)
    torch.library.opcheck(
        _spd_solve, (k + 9 * torch.eye(17, device=DEVICE), randn(2, 17, 3), "triton"), test_utils=checks
    )


@ways
def test_compiled_without_graph_breaks(way):
    inputs = draw(way, dtype=F32)

    def loss(f_t, f_s, y_s):
        lam = 0.01 * (f_s * f_s).sum()
        factor = factor_ahead(f_s, lam, y_s.shape[-1], backend="triton")
        pred = krr_predict(f_t, f_s, y_s, lam, factor=factor, backend="triton")
        head = ridge_fit(f_s, y_s, 0.1, backend="triton")
        return pred.square().mean() + head.square().mean() + gram(f_s, backend="triton").sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    # the same kernels in the same order; sums outside of them may be taken in another one
    for a, b in zip(with_gradients(compiled, inputs), with_gradients(loss, inputs), strict=True):
        assert relative(a, b) < 1e-6


# ------------------------------------------------------------------------------------------------ choice of the backend


@pytest.fixture
def compiled_triton(monkeypatch):
    """compiled_triton(name, capability): as on a machine with such a GPU, where Triton is not interpreted."""

    def pretend(name="NVIDIA H100 80GB HBM3", capability=(9, 0)):
        monkeypatch.setattr(kernels.backend, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)

    return pretend


CALLS = {
    "gram": lambda x, how: gram(x, **how),
    "gram_pair": lambda x, how: gram_pair(x, x, **how),
    "spd_factor": lambda x, how: spd_factor(x, 0.1, **how),
    "spd_solve": lambda x, how: spd_solve(x, x, **how),
    "ridge_fit": lambda x, how: ridge_fit(x, x, 0.1, **how),
    "krr_predict": lambda x, how: krr_predict(x, x, x, 0.1, **how),
    "factor_ahead": lambda x, how: factor_ahead(x, 0.1, 1, **how),
    "describe": lambda x, how: kernels.describe("auto", x.device, **how),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_function_checks_the_backend(name, monkeypatch):
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"^backend must be 'auto', 'triton' or 'torch', got 'cuda'"):
        CALLS[name](x, dict(backend="cuda"))
    monkeypatch.setattr(kernels.backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^backend 'triton' needs a CUDA device, not cpu"):
        CALLS[name](x, dict(backend="triton"))
    monkeypatch.setattr(kernels.backend, "triton", None)
    with pytest.raises(ValueError, match=r"^backend 'triton' needs the package triton, which is not installed"):
        CALLS[name](x, dict(backend="triton"))
    CALLS[name](x, dict(backend="auto"))
    CALLS[name](x, dict(backend="torch"))


def test_old_gpus_are_refused(compiled_triton):
    compiled_triton("Tesla V100-SXM2-16GB", (7, 0))
    with pytest.raises(ValueError, match=r"needs compute capability 8.0 or more, not Tesla V100-SXM2-16GB"):
        kernels.backend.check_backend("triton", "cuda", 0)
    kernels.backend.check_backend("auto", "cuda", 0)
    compiled_triton("NVIDIA A100-SXM4-40GB", (8, 0))
    kernels.backend.check_backend("triton", "cuda", None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla T4", "t4"),
    ],
)
def test_classes_of_gpus(name, expected):
    assert kernels.backend.gpu_class(name) == expected


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(h100=rows) writes the files of results; before, there are none."""
    monkeypatch.setattr(kernels.backend, "RESULTS", tmp_path)

    def forget():
        kernels.backend.table.cache_clear()
        kernels.backend.measured_faster.cache_clear()

    def write(**files):
        for gpu, rows in files.items():
            (tmp_path / f"{gpu}.json").write_text(json.dumps({"auto": rows}))
        forget()

    forget()
    yield write
    forget()


def row(op, precision, torch_us, triton_us, **size):
    return dict(op=op, precision=precision, size=size, torch_us=torch_us, triton_us=triton_us)


def chosen(op, precision, **size):
    return kernels.backend.use_triton(op, "auto", precision, torch.device("cuda", 0), **size)


def test_auto_follows_the_measurements(measured, compiled_triton):
    compiled_triton()
    assert not chosen("gram", "fp64", b=1, n=100, m=100, d=2048)  # nothing measured: torch
    small, large = dict(b=1, n=100, m=100, d=2048), dict(b=1, n=4000, m=4000, d=8192)
    measured(
        h100=[row("gram", "fp64", 40.0, 20.0, **small), row("gram", "fp64", 400.0, 500.0, **large)],
        a100=[row("gram", "fp64", 40.0, 80.0, **small)],
    )
    assert chosen("gram", "fp64", **small)
    assert not chosen("gram", "fp64", **large)
    # the nearest in powers of two: 400 of 100 to 4000 is a little nearer to 100, 1000 is nearer to 4000
    assert chosen("gram", "fp64", b=1, n=400, m=400, d=4096)
    assert not chosen("gram", "fp64", b=1, n=1000, m=1000, d=4096)
    assert chosen("gram", "fp64", b=0, n=0, m=0, d=0)
    # of another op, precision or class of GPU nothing follows
    assert not chosen("gram_xy", "fp64", **small)
    assert not chosen("gram", "fp32", **small)
    compiled_triton("NVIDIA A100-SXM4-40GB", (8, 0))
    assert not chosen("gram", "fp64", **small)
    compiled_triton("NVIDIA L40S", (8, 9))
    assert not chosen("gram", "fp64", **small)


def test_each_size_counts(measured, compiled_triton):
    """Two measured sizes that differ in one number: that number decides."""
    compiled_triton()
    size = dict(b=4, m=64, c=8)
    for name in size:
        other = {**size, name: 16 * size[name]}
        measured(h100=[row("solve", "fp64", 9.0, 1.0, **size), row("solve", "fp64", 1.0, 9.0, **other)])
        assert chosen("solve", "fp64", **{**size, name: 2 * size[name]})
        assert not chosen("solve", "fp64", **{**size, name: 8 * size[name]})


def test_auto_wants_five_percent(measured, compiled_triton):
    compiled_triton()
    for torch_us, expected in ((104.0, False), (106.0, True)):
        measured(h100=[row("factor", "fp32", torch_us, 100.0, b=1, m=64)])
        assert chosen("factor", "fp32", b=1, m=64) == expected


def test_auto_is_torch_without_a_compiled_triton(measured, compiled_triton, monkeypatch):
    size = dict(b=1, m=64)
    measured(h100=[row("factor", "fp64", 100.0, 1.0, **size)])
    compiled_triton()
    assert chosen("factor", "fp64", **size)
    use_triton = kernels.backend.use_triton
    assert not use_triton("factor", "auto", "fp64", torch.device("cpu"), **size)
    for backend, expected in (("triton", True), ("torch", False)):
        assert use_triton("factor", backend, "fp64", torch.device("cuda", 0), **size) == expected
    monkeypatch.setattr(kernels.backend, "INTERPRETED", True)
    assert not chosen("factor", "fp64", **size)
    compiled_triton()
    monkeypatch.setattr(kernels.backend, "triton", None)
    assert not chosen("factor", "fp64", **size)


def test_auto_asks_with_the_sizes_of_the_call(monkeypatch):
    """Each op by its name, with its precision and sizes; where the answer is no, torch computes."""
    asked = []

    def answer(op, backend, precision, device, **size):
        asked.append((op, backend, precision, size))
        return False

    monkeypatch.setattr(GRAM, "use_triton", answer)
    monkeypatch.setattr(kernels.solve, "use_triton", answer)
    x, y = randn(2, 5, 3, dtype=F32), randn(2, 4, 3, dtype=F32)
    k = gram(x, precision="fp64")
    assert asked == [("gram", "auto", "fp64", dict(b=2, n=5, m=5, d=3))]
    asked.clear()
    gram(x, y, precision="ieee")
    assert asked == [("gram_xy", "auto", "ieee", dict(b=2, n=5, m=4, d=3))]
    asked.clear()
    gram_pair(x, y, precision="fp32")
    assert asked[0] == ("gram_pair", "auto", "fp32", dict(b=2, n=4, m=5, d=3))
    asked.clear()
    factor, _ = spd_factor(k, 1.0)
    assert ("factor", "auto", "fp32", dict(b=2, m=5)) in asked
    asked.clear()
    spd_solve(factor.double(), x.double())
    assert asked[0] == ("solve", "auto", "fp64", dict(b=2, m=5, c=3))


@pytest.mark.parametrize("kernel", ["gram", "gram_xy", "gram_pair", "factor", "solve", None])
@ways
def test_any_choice_of_auto_gives_the_same(way, kernel, monkeypatch):
    """One op on its kernel and the others on torch: as packed factors are for kernels only, each pair must fit."""
    for module in (GRAM, kernels.solve):
        monkeypatch.setattr(module, "use_triton", lambda op, *_, **__: op == kernel)
    inputs = *draw(way, (2,)), draw_lam((2,))

    def predict(*args):
        return krr_predict(*args, ones=True)

    for a, b in zip(with_gradients(predict, inputs), with_gradients(naive(True)[1], inputs), strict=True):
        assert relative(a, b) < 1e-9
    k, b = spd(2, m=17), randn(2, 17, 3)
    a = with_ridge(k, torch.full((2,), 0.1, dtype=F64, device=DEVICE))
    factor, _ = spd_factor(k, 0.1)
    assert torch.equal(factor, factor.tril())
    assert_solved(spd_solve(factor, b), a, b, U64)


def test_describe(measured, compiled_triton):
    if DEVICE == "cpu":
        assert kernels.describe("fp32", "cpu", "triton") == (
            "ridge: float32, triton backend in its interpreter, slowly (cpu, precision fp32)"
        )
    assert kernels.describe("auto", "cpu") == "ridge: float64, torch backend (cpu, precision auto)"
    assert kernels.describe("auto", "cpu", "torch") == "ridge: float64, torch backend (cpu, precision auto)"
    compiled_triton()
    for backend in ("torch", "triton"):
        expected = f"ridge: float32, {backend} backend (cuda, precision ieee)"
        assert kernels.describe("ieee", "cuda", backend) == expected
    gpu = "(NVIDIA H100 80GB HBM3, precision auto)"
    assert kernels.describe("auto", "cuda") == (
        f"ridge: float64, torch backend, as kernels/results has no h100.json {gpu}"
    )
    wins = [
        row("solve", "fp64", 9.0, 1.0, b=1),
        row("factor", "fp64", 9.0, 1.0, b=1),
        row("gram", "fp64", 1.0, 1.0, b=1),
    ]
    measured(h100=wins)
    assert kernels.describe("auto", "cuda:0") == (
        f"ridge: float64, backend by kernels/results/h100.json (triton at some sizes of: factor, solve) {gpu}"
    )
    measured(h100=wins[-1:])
    assert "(triton at some sizes of: none)" in kernels.describe("auto", "cuda")
    for precision, backend in (("double", "auto"), ("auto", "cuda")):
        with pytest.raises(ValueError, match=r"^(precision|backend) must be"):
            kernels.describe(precision, "cpu", backend)


def test_without_triton():
    """The package imports and computes; asking for the kernels says what is missing."""
    script = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, kernels
f_t, f_s, y_s = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4, 2)
assert kernels.krr_predict(f_t, f_s, y_s, 0.1).shape == (3, 2)
print(kernels.describe("auto", "cpu"))
try:
    kernels.krr_predict(f_t, f_s, y_s, 0.1, backend="triton")
except ValueError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(kernels.__file__).parents[1],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "ridge: float64, torch backend (cpu, precision auto)",
        "backend 'triton' needs the package triton, which is not installed: use 'auto' or 'torch'",
    ]
