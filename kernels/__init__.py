"""Ridge regression on features and the linear algebra under it; see kernels/README.md."""

from .backend import describe, resolve_precision
from .barlow import barlow_loss
from .bn_stats import bn_stats
from .gram import gram, gram_pair
from .krr import factor_ahead, krr_predict, ridge_fit
from .nearest import nearest
from .solve import FailedFactorization, raise_if_failed, spd_factor, spd_solve

__all__ = [
    "FailedFactorization",
    "barlow_loss",
    "bn_stats",
    "describe",
    "factor_ahead",
    "gram",
    "gram_pair",
    "krr_predict",
    "nearest",
    "raise_if_failed",
    "resolve_precision",
    "ridge_fit",
    "spd_factor",
    "spd_solve",
]
