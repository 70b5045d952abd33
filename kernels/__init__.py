"""Ridge regression on features and the linear algebra under it; see kernels/README.md."""

from .gram import describe, gram, resolve_precision
from .krr import krr_predict, ridge_fit
from .solve import FailedFactorization, raise_if_failed, spd_factor, spd_solve

__all__ = [
    "FailedFactorization",
    "describe",
    "gram",
    "krr_predict",
    "raise_if_failed",
    "resolve_precision",
    "ridge_fit",
    "spd_factor",
    "spd_solve",
]
