"""Symmetric positive definite solves by Cholesky, and the record of factorisations that failed.

    spd_factor(k, lam) = L, info    with L Lᵀ = k + lam I
    spd_solve(L, b)    = (L Lᵀ)⁻¹ b

Both compute in the dtype of their inputs. Nothing here waits for the device, except `raise_if_failed`: `cholesky_ex`
leaves its verdict on the device, triangular solves have none, a matrix that has no factor gets a factor of NaN (that
matrix only, the others of the batch are untouched), and the ops of krr.py note the first failure in a small tensor that
the training loop reads with `raise_if_failed(step)` whenever it logs. The ridge is never changed silently.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from .gram import check_like, check_matrix


class FailedFactorization(RuntimeError):
    """A matrix was not positive definite, so that a ridge prediction was NaN."""


def as_lam(lam: float | Tensor, like: Tensor) -> Tensor:
    """The ridge as a tensor with the batch shape, dtype and device of `like`; gradients pass through.

    ValueError for a negative or non-finite number, or a tensor of another shape, device or kind. The entries of a
    tensor are not looked at, as that would wait for the device.
    """
    batch = like.shape[:-2]
    if not isinstance(lam, Tensor):
        if not isinstance(lam, Real) or not 0 <= lam < math.inf:
            raise ValueError(f"lam must be a finite number >= 0 or a tensor, got {lam!r}")
        return like.new_full(batch, float(lam))
    if lam.shape != batch:
        raise ValueError(f"lam must have the batch shape {tuple(batch)}, got {tuple(lam.shape)}")
    if not lam.is_floating_point():
        raise ValueError(f"lam must be floating point, got {lam.dtype}")
    if lam.device != like.device:
        raise ValueError(f"lam is on {lam.device}, but the features are on {like.device}")
    return lam.to(like.dtype)


# -------------------------------------------------------------------------------------------------------------- solve


def spd_solve_ref(k: Tensor, lam: Tensor, b: Tensor) -> Tensor:
    """What `spd_solve(spd_factor(k, lam)[0], b)` must equal."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return torch.linalg.solve(k + lam[..., None, None] * eye, b)


def spd_factor(k: Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of k + lam I, and info.

    k (…, m, m) in float64 or float32, of which only the lower triangle is read; lam >= 0, a number or a tensor (…).
    Returns the factor (…, m, m), all NaN for a matrix that has none, and info (…) int32: 0, or 1 + the first bad pivot.
    """
    check_matrix("k", k)
    if k.shape[-1] != k.shape[-2]:
        raise ValueError(f"k must be square, got {tuple(k.shape)}")
    if k.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"k must be float64 or float32, got {k.dtype}")
    return factor_(k.clone(), as_lam(lam, k))


def factor_(k: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """`spd_factor` without checks or a copy: k is overwritten."""
    k.diagonal(dim1=-2, dim2=-1).add_(lam[..., None])
    lower, info = torch.linalg.cholesky_ex(k)
    # LAPACK lets an infinite pivot pass; a pivot is good if 0 < pivot < inf.
    pivot = lower.detach().diagonal(dim1=-2, dim2=-1)
    bad_pivot = ~((pivot > 0) & (pivot < math.inf))
    first_bad = (1 + bad_pivot.to(torch.uint8).argmax(-1)).to(info.dtype)
    info = torch.where((info == 0) & bad_pivot.any(-1), first_bad, info)
    return lower.masked_fill((info != 0)[..., None, None], math.nan), info


def spd_solve(factor: Tensor, b: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ b for a lower factor L (…, m, m) and b (…, m, c); NaN where the factor is."""
    check_matrix("factor", factor)
    check_like("b", b, "factor", factor)
    if b.shape[-2] != factor.shape[-1]:
        raise ValueError(f"b has {b.shape[-2]} rows, but factor has {factor.shape[-1]}")
    # not torch.cholesky_solve: it copies the factor, reads a status back on a CPU, and leaves a batch on a GPU to MAGMA
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


# ----------------------------------------------------------------------------------------------------------- failures

# Per device [call, lam] of the first failure since the last `raise_if_failed`; call 0 is none. What a call was (shapes,
# known without the device) is kept here on the host, once per distinct call.
_first_failure: dict[torch.device, Tensor] = {}
_calls: dict[tuple, int] = {}


def record_failure(info: Tensor, lam: Tensor, op: str, m: int, n: int | None, d: int) -> None:
    """Notes on the device, without waiting for it, that a factorisation of this call failed, if one did."""
    if info.numel() == 0:
        return
    call = _calls.setdefault((op, m, n, d), len(_calls) + 1)
    if info.device not in _first_failure:
        dtype = torch.float32 if info.device.type == "mps" else torch.float64
        _first_failure[info.device] = torch.zeros(2, dtype=dtype, device=info.device)
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
