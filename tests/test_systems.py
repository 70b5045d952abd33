"""The ridge solve on 10,000 drawn systems: it is backward stable, or it reports that it failed.

The claim, for A = k + lam I as it is formed in the working dtype, of m rows and unit roundoff u (2^-53 or 2^-24):

- a solve that reports no failure leaves ||A x − b|| <= 10 m u (||A|| ||x|| + ||b||), for every column b alone, and
  ||L Lᵀ − A|| <= 10 m u ||A||;
- a factorisation reports no failure where the smallest eigenvalue of A is at least 10 m u ||A||;
- where it reports one, everything is NaN. Nothing else ever is, and the ridge is the one that was passed.

The bound is the textbook's: a Cholesky factor has a backward error of (m + 1) u |L| |Lᵀ| and two triangular solves one
of 2 m u |L| |Lᵀ| (Higham, Accuracy and Stability of Numerical Algorithms, theorems 10.3 and 8.5), where the norm of
|L| |Lᵀ| is not much more than ||A||. In practice the errors are near u, not m u: the worst of 10,000 is about 1 m u,
and what is not stable breaks the bound by orders of magnitude. It does not depend on the condition number, so no system
is too hard to judge.

On the torch path, all 10,000 are solved; on the Triton path all of them where there is a GPU, and 200 small ones in the
interpreter. A failure names its index, and `draw(index)` makes its systems again.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import FailedFactorization, krr_predict, raise_if_failed, ridge_fit, spd_factor, spd_solve
from kernels.gram import gram_
from kernels.krr import _ridge_fit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
PRECISION = {torch.float64: "fp64", torch.float32: "fp32"}
BATCHES = (1, 3, 4, 8)  # of index 0, 1, 2, 3, 4, …: four indices are 16 systems
EDGES = (2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 80, 96, 113, 128, 129, 130)  # blocks of 16, and beside


@pytest.fixture(autouse=True)
def clean():
    """One thread, as the matrices are tiny; no failure noted before, and none left unread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    raise_if_failed(0)
    yield
    raise_if_failed(0)
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------- the systems


def uniform(g, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=g, dtype=F64)


def pick(g, options):
    return options[int(torch.randint(len(options), (), generator=g))]


def orthonormal(g, batch, rows, columns):
    return torch.linalg.qr(torch.randn(batch, rows, columns, generator=g, dtype=F64))[0]


def normal(g, batch, m, d, u):
    return torch.randn(batch, m, d, generator=g, dtype=F64)


def positive(g, batch, m, d, u):
    """As after a ReLU: one eigenvalue far above the others; some rows may be zero."""
    return (normal(g, batch, m, d, u) + uniform(g, -2, 1, batch, 1, 1)).relu()


def decaying(g, batch, m, d, u):
    """Eigenvalues of f_s f_sᵀ from 1 down to 1 / condition, a condition of 1 to 1e12."""
    r = min(m, d)
    power = -uniform(g, 0, 6, batch, 1, 1) * torch.linspace(0, 1, r, dtype=F64)  # of the singular values of f_s
    return orthonormal(g, batch, m, r) * 10**power @ orthonormal(g, batch, d, r).mT


def low_rank(g, batch, m, d, u):
    r = int(torch.randint(1, min(m, d) // 2 + 2, (), generator=g))
    return normal(g, batch, m, r, u) @ normal(g, batch, r, d, u)


def duplicates(g, batch, m, d, u):
    """Some rows are copies of others, and some are zero."""
    f_s = normal(g, batch, m, d, u)
    copies = torch.randint(m, (m // 2,), generator=g)
    f_s[:, copies] = f_s[:, copies.flip(0)]
    f_s[:, torch.randint(m, (m // 8,), generator=g)] = 0
    return f_s


def near_duplicates(g, batch, m, d, u):
    """Rows that are others but for a small step towards third ones: the step makes a tiny pivot, the third large rest.

    The step is from sqrt(u) up, so that its square is about the smallest eigenvalue that a factor can still resolve.
    """
    f_s = normal(g, batch, m, d, u) * 2 ** uniform(g, -1, 1, batch, m, 1)
    step = u**0.5 * 2 ** uniform(g, 0, 12, batch)[:, None]
    for i in range(1, m, pick(g, (2, 3, 16, m))):
        origin, third = (int(torch.randint(high, (), generator=g)) for high in (i, m))
        aside = uniform(g, 0, 0.5, batch, 1) * torch.randn(batch, d, generator=g, dtype=F64)
        f_s[:, i] = f_s[:, origin] + step * (f_s[:, third] + aside)
    return f_s


def singular_block(g, batch, m, d, u):
    """One block of 16 rows is nearly dependent, the other rows are not."""
    f_s = normal(g, batch, m, d, u)
    start = 16 * int(torch.randint((m + 15) // 16, (), generator=g))
    rows = f_s[:, start : start + 16]
    r = int(torch.randint(1, 16, (), generator=g))
    small = u**0.5 * 2 ** uniform(g, 0, 12, batch, 1, 1)
    f_s[:, start : start + 16] = normal(g, batch, rows.shape[1], r, u) @ normal(g, batch, r, d, u) + small * rows
    return f_s


def graded(g, batch, m, d, u):
    """Rows of norms from 1e-6 to 1e6, rising, falling or shuffled."""
    grade = 10 ** torch.linspace(-6, 6, m, dtype=F64)
    order = pick(g, (torch.arange(m), torch.arange(m).flip(0), torch.randperm(m, generator=g)))
    kind = pick(g, (normal, decaying, near_duplicates))
    return kind(g, batch, m, d, u) * grade[order, None]


# near_duplicates twice: hardly any other kind finds a block that is solved by its inverse without a correction
KINDS = (normal, positive, decaying, low_rank, duplicates, near_duplicates, near_duplicates, singular_block, graded)
RIDGES = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, 100.0)  # times 1 to 10, of the mean eigenvalue


class Systems(NamedTuple):
    """A batch: f_s (b, m, d), lam (b,), the right-hand sides y_s (b, m, c), and f_t (b, n, d), all of one dtype."""

    kind: str
    f_s: Tensor
    lam: Tensor
    y_s: Tensor
    f_t: Tensor


def draw(index: int, largest: int = 130) -> Systems:
    """The systems of an index: m up to `largest`, d from 1 to 300 on both sides of m, conditions from 1 to singular."""
    g = torch.Generator().manual_seed(index)
    batch, kind = BATCHES[index % len(BATCHES)], pick(g, KINDS)
    dtype = pick(g, (torch.float64, torch.float32))
    u = ROUNDOFF[dtype]
    m = pick(g, (pick(g, [edge for edge in EDGES if edge <= largest]), int(2 ** uniform(g, 1, math.log2(largest + 1)))))
    d = min(300, max(1, round(m * pick(g, (1.0, float(2 ** uniform(g, -3, 0)), float(2 ** uniform(g, 0, 3)))))))
    f_s = kind(g, batch, m, d, u) * 2.0 ** pick(g, (0, 0, 0, -15, 15))
    squares = (f_s * f_s).sum((-2, -1))
    lam = squares / m * torch.stack([pick(g, RIDGES) * uniform(g, 1, 10) for _ in range(batch)])
    # some ridges are chosen to move the smallest eigenvalue across 10 m u ||A||, where the claim starts
    limit = 10 * m * u * torch.linalg.matrix_norm(f_s @ f_s.mT)
    at_limit = torch.rand(batch, generator=g) < 0.3
    lam = torch.where(at_limit, limit * 2 ** uniform(g, -10, 4, batch), lam)
    y_s, f_t = normal(g, batch, m, pick(g, (1, 3, 17)), u), normal(g, batch, pick(g, (1, 5, 40)), d, u)
    return Systems(kind.__name__, *(x.to(DEVICE, dtype) for x in (f_s, lam, y_s, f_t)))


# ------------------------------------------------------------------------------------------------------------ checks


def exactly(x: Tensor) -> np.ndarray:
    """In a precision in which an error is not a matter: 64 bits (or more) for float64, float64 for float32."""
    x = x.detach().cpu()
    return x.numpy().astype(np.longdouble) if x.dtype == F64 else x.double().numpy()


def norm(x: np.ndarray, axis) -> np.ndarray:
    return np.sqrt((x * x).sum(axis))


class Spectrum(NamedTuple):
    """Of the matrix A (b, m, m) of the working dtype: norm and smallest eigenvalue (b,), and eigenvectors (b, m, m)."""

    a: Tensor
    norm: np.ndarray
    smallest: np.ndarray
    vectors: Tensor


def spectrum_of(k: Tensor, lam: Tensor) -> Spectrum:
    """Of k + lam I, as its lower triangle and the ridge give it in the dtype of k."""
    a = k.tril() + k.tril(-1).mT
    a.diagonal(dim1=-2, dim2=-1).add_(lam[:, None])
    values, vectors = torch.linalg.eigh(a.cpu().double())
    return Spectrum(a, values.abs().amax(-1).numpy(), values[:, 0].numpy(), vectors)


def columns(of: Spectrum, y: Tensor) -> Tensor:
    """Right-hand sides (b, m, 6) that are hard in their own way.

    The eigenvector of the smallest eigenvalue gives the largest solution, A times it one whose parts cancel, that of
    the largest one the smallest: there an error of the factor is not hidden by ||x||. And y, a one-hot column, zero.
    """
    v_min, v_max = of.vectors[..., :1], of.vectors[..., -1:]
    one_hot = torch.zeros_like(v_min)
    one_hot[:, -1] = 1
    b = torch.cat([v_min, of.a.cpu().double() @ v_min, v_max, one_hot, 0 * one_hot], -1)
    return torch.cat([b.to(y), y[..., :1]], -1)


def solve_errors(of: Spectrum, x: Tensor, b: Tensor) -> np.ndarray:
    """||A x − b|| / (||A|| ||x|| + ||b||) in units of m u, for each column; (b, c). 0 / 0 is 0."""
    m, u = x.shape[-2], ROUNDOFF[x.dtype]
    a, x, b = exactly(of.a), exactly(x), exactly(b)
    residual, scale = norm(a @ x - b, -2), of.norm[:, None] * norm(x, -2) + norm(b, -2)
    return np.divide(residual, m * u * scale, out=np.where(residual == 0, residual, np.inf), where=scale > 0)


def factor_errors(of: Spectrum, factor: Tensor) -> np.ndarray:
    """||L Lᵀ − A|| / ||A|| in units of m u; (b,). The Frobenius norm of the difference, which is never smaller.

    In float64 the product has an error of its own, of less than 1 such unit if the factor is float64.
    """
    lower = factor.cpu().double()
    error = torch.linalg.matrix_norm(lower @ lower.mT - of.a.cpu().double()).numpy()
    return error / (factor.shape[-1] * ROUNDOFF[factor.dtype] * of.norm)


class Verdict(NamedTuple):
    """Of one system: the errors are in units of m u, that of the solve is the worst column's."""

    wrong: str  # what is; "" if nothing
    must_succeed: bool
    failed: bool
    solve: float
    factor: float


def judge(of: Spectrum, factor: Tensor, info: Tensor, x: Tensor, b: Tensor) -> list[Verdict]:
    """One verdict per matrix of the batch."""
    m, u = b.shape[-2], ROUNDOFF[b.dtype]
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN where a failure is reported, or A is zero
        solve_error, factor_error = solve_errors(of, x, b).max(-1), factor_errors(of, factor)
    # 11 and not 10: eigh has an error of its own, of less than m u ||A||
    must = (of.smallest > 0) & (of.smallest >= 11 * m * u * of.norm)
    failed = (info != 0).tolist()
    found = []
    for i in range(len(b)):
        wrong = []
        if failed[i]:
            if must[i]:
                wrong.append(f"failed (info {int(info[i])}) with a smallest eigenvalue of {of.smallest[i]:.3g}")
            if not (factor[i].isnan().all() and x[i].isnan().all()):
                wrong.append("failed without all NaN")
        else:
            for name, error in (("residual", solve_error[i]), ("error of the factor", factor_error[i])):
                if not error <= 10:  # nor is NaN
                    wrong.append(f"{name} {error:.3g} m u")
        found.append(Verdict(", ".join(wrong), bool(must[i]), failed[i], float(solve_error[i]), float(factor_error[i])))
    return found


def factor_and_solve(systems: Systems, backend: str) -> list[Verdict]:
    """Of spd_factor and spd_solve."""
    f_s, lam = systems.f_s, systems.lam
    k = gram_(f_s, None, PRECISION[f_s.dtype], "torch", mirror=False)
    of = spectrum_of(k, lam)
    b = columns(of, systems.y_s)
    before = k.clone(), lam.clone(), b.clone()
    factor, info = spd_factor(k, lam, backend=backend)
    x = spd_solve(factor, b, backend=backend)
    assert all(torch.equal(*pair) for pair in zip((k, lam, b), before, strict=True))
    assert torch.equal(factor.triu(1).nan_to_num(), torch.zeros_like(factor))
    return judge(of, factor, info, x, b)


def reported() -> bool:
    try:
        raise_if_failed("of the test")
    except FailedFactorization:
        return True
    return False


def fit(systems: Systems, backend: str, ones: bool) -> list[Verdict]:
    """Of ridge_fit: of the system that it solves, which is that of alpha or, with d <= m, that of the head."""
    _, f_s, lam, y_s, _ = systems
    how = PRECISION[f_s.dtype], backend
    before = lam.clone()
    public = ridge_fit(f_s, y_s, lam, ones=ones, precision=how[0], backend=backend)
    failed = reported()
    head, lower, alpha = _ridge_fit(f_s, y_s, lam, None, *how, ones)
    assert reported() == failed
    assert torch.equal(public.nan_to_num(), head.nan_to_num())
    assert torch.equal(lam, before)
    if alpha.numel():
        k, b, x = gram_(f_s, None, *how, plus=float(ones), mirror=False), y_s, alpha
    else:
        f = torch.cat([f_s, torch.ones_like(f_s[..., :1])], -1) if ones else f_s
        k, b, x = gram_(f.mT, None, *how, mirror=False), f.mT @ y_s, head
    info = public.isnan().flatten(1).any(-1)
    assert info.any() == failed
    lower = torch.where(info[:, None, None], lower, lower.tril())  # above the diagonal a kernel keeps what it likes
    return judge(spectrum_of(k, lam), lower, info, x, b)


def predict(systems: Systems, backend: str, ones: bool) -> None:
    """Of krr_predict: each matrix has a prediction or NaN, and NaN is reported."""
    _, f_s, lam, y_s, f_t = systems
    before = lam.clone()
    pred = krr_predict(f_t, f_s, y_s, lam, ones=ones, precision=PRECISION[f_s.dtype], backend=backend)
    nan = pred.isnan().flatten(1)
    assert torch.equal(nan.any(-1), nan.all(-1))
    assert not pred.isinf().any()
    assert nan.any() == reported()
    assert torch.equal(lam, before)


# ------------------------------------------------------------------------------------------------------------- tests
# Arguments of draw. A block of 16 columns takes the interpreter up to 0.1 s, so 200 systems have three blocks at most
# there, and two have eight and nine.
ALL = [(index, 130) for index in range(2500)]
ON_TRITON = ALL if DEVICE == "cuda" else [(index, 33) for index in range(50)] + [(60, 130), (204, 130)]


def all_right(verdicts: dict[int, list[Verdict]]) -> list[Verdict]:
    """Asserts that nothing is wrong, naming the first of what is; all verdicts in one list."""
    wrong = [f"draw{args}: {v.wrong}" for args, found in verdicts.items() for v in found if v.wrong]
    assert not wrong, f"{len(wrong)} systems, such as " + "; ".join(wrong[:5])
    return [v for found in verdicts.values() for v in found]


@pytest.mark.slow
def test_every_system_is_solved_or_reported():
    """By torch. And the draws do test the claim: there are many systems of each of its three classes."""
    found = all_right({args: factor_and_solve(draw(*args), "torch") for args in ALL})
    assert len(found) == 10_000
    assert sum(v.must_succeed for v in found) > 6000
    assert sum(not v.must_succeed and not v.failed for v in found) > 1500
    assert sum(v.failed for v in found) > 800


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns of NaN
@pytest.mark.slow
def test_every_system_is_solved_or_reported_by_the_kernels():
    found = all_right({args: factor_and_solve(draw(*args), "triton") for args in ON_TRITON})
    assert len(found) >= 198
    assert any(v.failed for v in found)


def test_every_fit_is_solved_or_reported():
    found = all_right({args: fit(draw(*args), "torch", args[0] % 3 == 0) for args in ALL[:600]})
    assert sum(v.must_succeed for v in found) > 1000
    assert sum(v.failed for v in found) > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_fit_is_solved_or_reported_by_the_kernels():
    few = ALL[:600] if DEVICE == "cuda" else ON_TRITON[:12]
    found = all_right({args: fit(draw(*args), "triton", args[0] % 3 == 0) for args in few})
    assert any(v.failed for v in found)


def test_every_prediction_is_finite_or_reported():
    for args in ALL[:600]:
        predict(draw(*args), "torch", args[0] % 3 == 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_prediction_of_the_kernels_is_finite_or_reported():
    for args in ALL[:600] if DEVICE == "cuda" else ON_TRITON[:12]:
        predict(draw(*args), "triton", args[0] % 3 == 0)
