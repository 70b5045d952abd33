"""Gram matrices, and the precision in which this package computes.

    gram(x, y) = x yᵀ        (…, n, d), (…, m, d) -> (…, n, m)
    gram(x)    = x xᵀ        (…, n, d) -> (…, n, n), exactly symmetric

Precision. Every function of the package first casts its inputs to a working dtype, computes everything in it, and
casts the result back: float64 where float64 runs at full rate ("auto" on a CPU and on data-centre GPUs), else float32
without TF32, whatever `torch.set_float32_matmul_precision` or an enclosing autocast says. float64 inputs are always
computed in float64. Why float64 from the Gram matrix on, and not only in the solve: kernels/README.md.

Each op is a `torch.library.custom_op`, so that torch.compile sees one node, with its backward as a second op that has
no derivative of its own: differentiating twice raises instead of being silently wrong.
"""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Compute capabilities with float64 at half the float32 rate or better: P100, V100, A100, H100 and H200, B200.
FULL_RATE_FP64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


# ---------------------------------------------------------------------------------------------------------- precision


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """ "fp64" or "fp32": the precision named, or with "auto" the best that the device runs at full rate.

    Raises ValueError for any other name, and for "fp64" on a device that has no float64 (mps).
    """
    device = torch.device(device)
    if precision not in ("auto", "fp64", "fp32"):
        raise ValueError(f"precision must be 'auto', 'fp64' or 'fp32', got {precision!r}")
    if precision == "fp64" and device.type == "mps":
        raise ValueError("precision 'fp64' is not available on mps: use 'fp32' or 'auto'")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "fp64" if _cuda_has_full_rate_fp64(device.index) else "fp32"
    return "fp64" if device.type == "cpu" else "fp32"


@torch.compiler.assume_constant_result  # a fact about the machine: torch.compile need not trace the queries
def _cuda_has_full_rate_fp64(index: int | None) -> bool:
    # The H20 has the capability of an H100 but hardly any float64 units; the H200 has them all.
    crippled = re.search(r"\bH20\b", torch.cuda.get_device_name(index)) is not None
    return torch.cuda.get_device_capability(index) in FULL_RATE_FP64 and not crippled


def describe(precision: str, device: torch.device | str) -> str:
    """One line for a script to print once, such as "ridge: float64 Cholesky, torch backend (cpu, precision auto)"."""
    bits = resolve_precision(precision, device).removeprefix("fp")
    return f"ridge: float{bits} Cholesky, torch backend ({torch.device(device)}, precision {precision})"


def working_dtype(precision: str, x: Tensor) -> torch.dtype:
    """The dtype in which an input like x is computed."""
    resolved = resolve_precision(precision, x.device)
    return torch.float64 if resolved == "fp64" or x.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 or bf16 inside float32 matrix products; the caller's settings come back afterwards.

    The two settings are per backend, because restoring them restores every way in which the caller can have set them;
    `torch.get_float32_matmul_precision` raises where the caller used the per-backend names.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


# --------------------------------------------------------------------------------------------------------- validation


def check_matrix(name: str, x: Tensor) -> None:
    """ValueError naming the argument unless x is a floating-point tensor (…, rows, columns)."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (…, rows, columns), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError naming the argument unless x is a matrix with the device, dtype and batch shape of `other`."""
    check_matrix(name, x)
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, but {other_name} is on {other.device}")
    if x.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {x.dtype}, but {other_name} has {other.dtype}")
    if x.shape[:-2] != other.shape[:-2]:
        raise ValueError(
            f"{name} has batch shape {tuple(x.shape[:-2])}, but {other_name} has {tuple(other.shape[:-2])}"
        )


# --------------------------------------------------------------------------------------------------------------- gram


def gram_ref(x: Tensor, y: Tensor | None = None) -> Tensor:
    """What `gram` must equal."""
    return x @ (x if y is None else y).mT


@torch.library.custom_op("kernels::gram", mutates_args=())
def _gram(x: Tensor, y: Tensor | None) -> Tensor:
    with exact_products(x.device):
        if y is not None:
            return x @ y.mT
        k = x @ x.mT
        return k.tril() + k.tril(-1).mT  # a BLAS may sum (i, j) and (j, i) in different orders: mirror one of them


@_gram.register_fake
def _(x, y):
    return x.new_empty((*x.shape[:-1], (x if y is None else y).shape[-2]))


@torch.library.custom_op("kernels::gram_backward", mutates_args=())
def _gram_backward(d_k: Tensor, x: Tensor, y: Tensor | None, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor]:
    with exact_products(x.device):
        if y is None:
            return (d_k + d_k.mT) @ x, x.new_empty(0)
        return (d_k @ y if need_x else x.new_empty(0)), (d_k.mT @ x if need_y else x.new_empty(0))


@_gram_backward.register_fake
def _(d_k, x, y, need_x, need_y):
    return x.new_empty(x.shape if need_x else 0), x.new_empty(y.shape if need_y else 0)


def _gram_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gram_autograd(ctx, d_k):
    need_x, need_y = ctx.needs_input_grad
    d_x, d_y = _gram_backward(d_k, *ctx.saved_tensors, need_x, need_y)
    return d_x if need_x else None, d_y if need_y else None


_gram.register_autograd(_gram_autograd, setup_context=_gram_setup)


def gram(x: Tensor, y: Tensor | None = None, *, precision: str = "auto") -> Tensor:
    """x yᵀ, or x xᵀ exactly (bitwise) symmetric if y is None.

    x (…, n, d), y (…, m, d) with the same batch dimensions, device and dtype -> (…, n, m) in that dtype. Differentiable
    once. ValueError names the argument that does not fit.
    """
    check_matrix("x", x)
    if y is not None:
        check_like("y", y, "x", x)
        if y.shape[-1] != x.shape[-1]:
            raise ValueError(f"y has {y.shape[-1]} columns, but x has {x.shape[-1]}")
    work = working_dtype(precision, x)
    return _gram(x.to(work), None if y is None else y.to(work)).to(x.dtype)
