"""What every op of the package shares: Triton where there is one, the precision, the backend, checks of arguments.

Precision. Every op computes in a working dtype and casts only its result back: float64 where float64 runs at full
rate ("auto" on a CPU and on data-centre GPUs), else float32 without TF32, whatever
`torch.set_float32_matmul_precision` or an enclosing autocast says. float64 inputs are always computed in float64. Why
float64 from the Gram matrix on, and not only in the solve: kernels/README.md.

Backend. "torch" is plain torch; "triton" uses this package's kernels wherever there is one, and raises where they
cannot run; "auto" uses a kernel only where the committed measurements of this class of GPU (kernels/results) say that
it is the faster one at the nearest size measured, and torch elsewhere.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not Linux: everything has a torch twin
    triton = None

    class tl:  # enough for the annotations of kernels that are never run
        constexpr = None


# The interpreter runs kernels on a CPU, for tests. It is switched on by TRITON_INTERPRET=1 before Triton is imported.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("auto", "fp64", "fp32", "ieee")
BACKENDS = ("auto", "triton", "torch")
RESULTS = Path(__file__).parent / "results"
# Compute capabilities with float64 at half the float32 rate or better: P100, V100, A100, H100 and H200, B200.
FULL_RATE_FP64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
WIN = 1.05  # "auto" takes a kernel that was measured at least 5 % faster than torch


def jit(function=None, *, do_not_specialize: tuple[str, ...] = ()):
    """`triton.jit`, or nothing where Triton is not installed."""
    if function is None:
        return lambda f: jit(f, do_not_specialize=do_not_specialize)
    return triton and triton.jit(function, do_not_specialize=list(do_not_specialize))


# ---------------------------------------------------------------------------------------------------------- precision


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """ "fp64", "fp32" or "ieee": the one named, or with "auto" fp64 if the device runs it at full rate, else fp32.

    fp32 has the error of float32 products, and the kernels may reach it by three TF32 products; ieee has float32
    products and nothing else. On the torch backend they are the same. Raises ValueError for any other name, and for
    "fp64" on a device that has no float64 (mps).
    """
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be 'auto', 'fp64', 'fp32' or 'ieee', got {precision!r}")
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


def precision_for(precision: str, x: Tensor) -> str:
    """The precision in which an input like x is computed: `resolve_precision`, but float64 stays float64."""
    resolved = resolve_precision(precision, x.device)
    return "fp64" if x.dtype == torch.float64 else resolved


def dtype_of(precision: str) -> torch.dtype:
    """The working dtype of a resolved precision."""
    return torch.float64 if precision == "fp64" else torch.float32


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


# ------------------------------------------------------------------------------------------------------------ backend


@torch.compiler.assume_constant_result
def check_backend(backend: str, kind: str, index: int | None) -> None:
    """ValueError unless the backend exists and can run on this kind of device ("cuda", "cpu", …)."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if backend != "triton":
        return
    if triton is None:
        raise ValueError("backend 'triton' needs the package triton, which is not installed: use 'auto' or 'torch'")
    if INTERPRETED:
        return
    if kind != "cuda":
        raise ValueError(f"backend 'triton' needs a CUDA device, not {kind}: use 'auto' or 'torch'")
    if torch.cuda.get_device_capability(index) < (8, 0):
        name = torch.cuda.get_device_name(index)
        raise ValueError(f"backend 'triton' needs compute capability 8.0 or more, not {name}: use 'auto' or 'torch'")


def use_triton(op: str, backend: str, precision: str, device: torch.device, **size: int) -> bool:
    """Whether an op of this size runs on the package's kernel (backend checked before by `check_backend`)."""
    if backend != "auto":
        return backend == "triton"
    if triton is None or INTERPRETED or device.type != "cuda":
        return False
    return measured_faster(gpu_class(torch.cuda.get_device_name(device)), op, precision, tuple(sorted(size.items())))


@lru_cache
def gpu_class(name: str) -> str:
    """ "h100" of "NVIDIA H100 80GB HBM3", "rtx-4090" of "NVIDIA GeForce RTX 4090": the name of its file of results."""
    found = re.search(r"\b[A-Z]+ ?\d+[A-Za-z]*\b", name.removeprefix("NVIDIA "))
    return (found[0] if found else name).lower().replace(" ", "-")


@lru_cache
def table(gpu: str) -> tuple[dict, ...]:
    """The measured comparisons of a class of GPU: dicts of op, precision, size, torch_us, triton_us; () if none."""
    path = RESULTS / f"{gpu}.json"
    return tuple(json.loads(path.read_text())["auto"]) if path.exists() else ()


@lru_cache(maxsize=4096)
def measured_faster(gpu: str, op: str, precision: str, size: tuple[tuple[str, int], ...]) -> bool:
    """Whether the kernel was faster than torch at the measured size nearest to this one (in powers of two)."""
    rows = [row for row in table(gpu) if row["op"] == op and row["precision"] == precision]
    if not rows:
        return False

    def distance(row: dict) -> float:
        return sum(math.log2((1 + value) / (1 + row["size"][name])) ** 2 for name, value in size)

    nearest = min(rows, key=distance)
    return nearest["triton_us"] * WIN <= nearest["torch_us"]


def describe(precision: str, device: torch.device | str, backend: str = "auto", what: str = "ridge") -> str:
    """One line for a script to print once, such as "ridge: float64, torch backend (cpu, precision auto)".

    Raises ValueError where the precision or the backend is none, or cannot run on the device.
    """
    device = torch.device(device)
    resolved = resolve_precision(precision, device)
    check_backend(backend, device.type, device.index)
    where = device.type
    chosen = f"{backend} backend"
    if backend == "triton" and INTERPRETED:
        chosen = "triton backend in its interpreter, slowly"
    if backend == "auto":
        chosen = "torch backend"
        if device.type == "cuda" and triton is not None and not INTERPRETED:
            where = torch.cuda.get_device_name(device)
            gpu = gpu_class(where)
            chosen = f"torch backend, as kernels/results has no {gpu}.json"
            if table(gpu):
                wins = sorted({row["op"] for row in table(gpu) if row["triton_us"] * WIN <= row["torch_us"]})
                chosen = f"backend by kernels/results/{gpu}.json (triton at some sizes of: {', '.join(wins) or 'none'})"
    bits = {"fp64": "float64", "fp32": "float32", "ieee": "float32"}[resolved]
    return f"{what}: {bits}, {chosen} ({where}, precision {precision})"


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
