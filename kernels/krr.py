"""Kernel ridge regression on features: the head fitted to (f_s, y_s), and its prediction at f_t.

    head = f_sᵀ alpha,  alpha = (f_s f_sᵀ + lam I)⁻¹ y_s              dual: an m × m system
         = (f_sᵀ f_s + lam I)⁻¹ f_sᵀ y_s                              primal: a d × d system
    krr_predict = k_ts alpha = f_t head,  k_ts = f_t f_sᵀ             f_s (…, m, d), y_s (…, m, c), f_t (…, n, d)

The order of the products is chosen from the shapes alone, by `route`; autograd of the naive formula always forms the
n × m matrix k_ts and m × m and n × m gradients. One Cholesky factor serves forward and backward. The gradients are
written out below and derived in kernels/README.md.

Precision: gram.py. Everything is in the working dtype, Gram matrix, factor, coefficients and products; only the result
and the gradients are cast back to the dtype of the inputs. Failures (lam too small for the precision): solve.py.
"""

import torch
from torch import Tensor

from .gram import check_like, check_matrix, exact_products, working_dtype
from .solve import as_lam, factor_, record_failure, spd_solve


def krr_predict_ref(f_t: Tensor, f_s: Tensor, y_s: Tensor, lam: float | Tensor) -> Tensor:
    """What `krr_predict` must equal, with its gradients by autograd; `ridge_fit` is this with f_t = I."""
    lam = torch.as_tensor(lam, dtype=f_s.dtype, device=f_s.device)[..., None, None]
    k_ss = f_s @ f_s.mT + lam * torch.eye(f_s.shape[-2], dtype=f_s.dtype, device=f_s.device)
    return (f_t @ f_s.mT) @ torch.linalg.solve(k_ss, y_s)


def ridge_fit_ref(f_s: Tensor, y_s: Tensor, lam: float | Tensor) -> Tensor:
    """What `ridge_fit` must equal."""
    lam = torch.as_tensor(lam, dtype=f_s.dtype, device=f_s.device)[..., None, None]
    k_ss = f_s @ f_s.mT + lam * torch.eye(f_s.shape[-2], dtype=f_s.dtype, device=f_s.device)
    return f_s.mT @ torch.linalg.solve(k_ss, y_s)


def route(m: int, n: int, d: int, c: int) -> str:
    """The cheapest order of products: "primal", "dual_w" (by way of the head) or "dual_k" (by way of k_ts).

    The primal system is used if d <= m: it is the smaller one, and the dual one is then singular up to lam.
    """
    if d <= m:
        return "primal"
    by_head = c * (m + n) * d  # f_sᵀ alpha, then f_t head
    by_kernel = n * m * (d + c)  # f_t f_sᵀ, then k_ts alpha
    return "dual_w" if by_head < by_kernel else "dual_k"


# ---------------------------------------------------------------------------------------- the algebra, forward and back
# Plain functions of tensors in the working dtype. "Unused" stands for a tensor that a route does without.


def _unused(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _factor(f_s: Tensor, lam: Tensor, op: str, n: int | None) -> Tensor:
    m, d = f_s.shape[-2:]
    # cholesky reads the lower triangle only, so the Gram matrix need not be made symmetric as in `gram`
    lower, info = factor_(f_s.mT @ f_s if d <= m else f_s @ f_s.mT, lam)
    record_failure(info, lam, op, m, n, d)
    return lower.contiguous()


def _fit(f_s: Tensor, y_s: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (dual only) and head."""
    m, d = f_s.shape[-2:]
    if d <= m:
        return _unused(f_s), spd_solve(lower, f_s.mT @ y_s).contiguous()
    alpha = spd_solve(lower, y_s).contiguous()
    return alpha, f_s.mT @ alpha


def _fit_backward(
    d_head: Tensor, f_s: Tensor, y_s: Tensor, lower: Tensor, alpha: Tensor, head: Tensor, need_f_s: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of f_s, y_s and lam from that of the head."""
    m, d = f_s.shape[-2:]
    d_f_s = _unused(f_s)
    if d <= m:
        v = spd_solve(lower, d_head)  # (d, c)
        d_y_s = f_s @ v
        d_lam = -(v * head).sum((-2, -1))
        if need_f_s:
            d_f_s = (y_s - f_s @ head) @ v.mT - d_y_s @ head.mT
    else:
        beta = spd_solve(lower, f_s @ d_head)  # (m, c)
        d_y_s = beta.contiguous()
        d_lam = -(beta * alpha).sum((-2, -1))
        if need_f_s:
            d_f_s = alpha @ (d_head - f_s.mT @ beta).mT - beta @ head.mT
    return d_f_s, d_y_s, d_lam


def _predict_by_kernel_backward(
    d_pred: Tensor, f_t: Tensor, f_s: Tensor, lower: Tensor, alpha: Tensor, k_ts: Tensor, need_f_t: bool, need_f_s: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of f_t, f_s, y_s and lam in route dual_k: d_k_ts and d_k_ss are formed."""
    beta = spd_solve(lower, k_ts.mT @ d_pred)  # (m, c)
    d_lam = -(beta * alpha).sum((-2, -1))
    d_f_t, d_f_s = _unused(f_t), _unused(f_s)
    if need_f_t or need_f_s:
        d_k_ts = d_pred @ alpha.mT  # (n, m)
        if need_f_t:
            d_f_t = d_k_ts @ f_s
        if need_f_s:
            d_k_ss = -beta @ alpha.mT  # (m, m)
            d_f_s = (d_k_ss + d_k_ss.mT) @ f_s + d_k_ts.mT @ f_t
    return d_f_t, d_f_s, beta.contiguous(), d_lam


# ---------------------------------------------------------------------------------------------------------- ridge_fit


@torch.library.custom_op("kernels::ridge_fit", mutates_args=())
def _ridge_fit(f_s: Tensor, y_s: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with exact_products(f_s.device):
        lower = _factor(f_s, lam, "ridge_fit", None)
        alpha, head = _fit(f_s, y_s, lower)
    return head, lower, alpha


@_ridge_fit.register_fake
def _(f_s, y_s, lam):
    (*batch, m, d), c = f_s.shape, y_s.shape[-1]
    alpha = _unused(f_s) if d <= m else f_s.new_empty((*batch, m, c))
    size = d if d <= m else m
    return f_s.new_empty((*batch, d, c)), f_s.new_empty((*batch, size, size)), alpha


@torch.library.custom_op("kernels::ridge_fit_backward", mutates_args=())
def _ridge_fit_backward(
    d_head: Tensor, f_s: Tensor, y_s: Tensor, lower: Tensor, alpha: Tensor, head: Tensor, need_f_s: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with exact_products(f_s.device):
        return _fit_backward(d_head, f_s, y_s, lower, alpha, head, need_f_s)


@_ridge_fit_backward.register_fake
def _(d_head, f_s, y_s, lower, alpha, head, need_f_s):
    d_f_s = f_s.new_empty(f_s.shape) if need_f_s else _unused(f_s)
    return d_f_s, y_s.new_empty(y_s.shape), f_s.new_empty(f_s.shape[:-2])


def _ridge_fit_setup(ctx, inputs, output):
    f_s, y_s, _ = inputs
    head, lower, alpha = output
    ctx.mark_non_differentiable(lower, alpha)
    ctx.save_for_backward(f_s, y_s, lower, alpha, head)


def _ridge_fit_autograd(ctx, d_head, *_):
    need_f_s = ctx.needs_input_grad[0]
    d_f_s, d_y_s, d_lam = _ridge_fit_backward(d_head, *ctx.saved_tensors, need_f_s)
    return d_f_s if need_f_s else None, d_y_s, d_lam


_ridge_fit.register_autograd(_ridge_fit_autograd, setup_context=_ridge_fit_setup)


def ridge_fit(f_s: Tensor, y_s: Tensor, lam: float | Tensor, *, precision: str = "auto") -> Tensor:
    """The ridge regression head (…, d, c) = f_sᵀ (f_s f_sᵀ + lam I)⁻¹ y_s: argmin ||f_s head − y_s||² + lam ||head||².

    f_s (…, m, d), y_s (…, m, c) of one device and dtype, m >= 1, d >= 1; the result has their dtype. lam is absolute, a
    number or a tensor (…) of the batch shape; gradients reach f_s, y_s and lam, once. ValueError names the argument
    that does not fit; a matrix that is not positive definite gives NaN and is reported by `raise_if_failed`.
    """
    _check_fit(f_s, y_s)
    work = working_dtype(precision, f_s)
    f, y = f_s.to(work), y_s.to(work)
    return _ridge_fit(f, y, as_lam(lam, f))[0].to(f_s.dtype)


def _check_fit(f_s: Tensor, y_s: Tensor) -> None:
    check_matrix("f_s", f_s)
    if f_s.shape[-2] < 1 or f_s.shape[-1] < 1:
        raise ValueError(f"f_s must have at least one row and one column, got {tuple(f_s.shape)}")
    check_like("y_s", y_s, "f_s", f_s)
    if y_s.shape[-2] != f_s.shape[-2]:
        raise ValueError(f"y_s has {y_s.shape[-2]} rows, but f_s has {f_s.shape[-2]}")


# -------------------------------------------------------------------------------------------------------- krr_predict


@torch.library.custom_op("kernels::krr_predict", mutates_args=())
def _krr_predict(f_t: Tensor, f_s: Tensor, y_s: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, m, d, c = f_t.shape[-2], *f_s.shape[-2:], y_s.shape[-1]
    with exact_products(f_s.device):
        lower = _factor(f_s, lam, "krr_predict", n)
        if route(m, n, d, c) == "dual_k":
            alpha = spd_solve(lower, y_s).contiguous()
            k_ts = f_t @ f_s.mT
            return k_ts @ alpha, lower, alpha, _unused(f_s), k_ts
        alpha, head = _fit(f_s, y_s, lower)
        return f_t @ head, lower, alpha, head, _unused(f_s)


@_krr_predict.register_fake
def _(f_t, f_s, y_s, lam):
    (*batch, m, d), n, c = f_s.shape, f_t.shape[-2], y_s.shape[-1]
    way = route(m, n, d, c)
    size = d if way == "primal" else m
    alpha = _unused(f_s) if way == "primal" else f_s.new_empty((*batch, m, c))
    head = _unused(f_s) if way == "dual_k" else f_s.new_empty((*batch, d, c))
    k_ts = f_s.new_empty((*batch, n, m)) if way == "dual_k" else _unused(f_s)
    return f_s.new_empty((*batch, n, c)), f_s.new_empty((*batch, size, size)), alpha, head, k_ts


@torch.library.custom_op("kernels::krr_predict_backward", mutates_args=())
def _krr_predict_backward(
    d_pred: Tensor,
    f_t: Tensor,
    f_s: Tensor,
    y_s: Tensor,
    lower: Tensor,
    alpha: Tensor,
    head: Tensor,
    k_ts: Tensor,
    need_f_t: bool,
    need_f_s: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m, d, c = f_t.shape[-2], *f_s.shape[-2:], y_s.shape[-1]
    with exact_products(f_s.device):
        if route(m, n, d, c) == "dual_k":
            return _predict_by_kernel_backward(d_pred, f_t, f_s, lower, alpha, k_ts, need_f_t, need_f_s)
        d_f_t = d_pred @ head.mT if need_f_t else _unused(f_t)
        d_head = f_t.mT @ d_pred
        return d_f_t, *_fit_backward(d_head, f_s, y_s, lower, alpha, head, need_f_s)


@_krr_predict_backward.register_fake
def _(d_pred, f_t, f_s, y_s, lower, alpha, head, k_ts, need_f_t, need_f_s):
    d_f_t = f_t.new_empty(f_t.shape) if need_f_t else _unused(f_t)
    d_f_s = f_s.new_empty(f_s.shape) if need_f_s else _unused(f_s)
    return d_f_t, d_f_s, y_s.new_empty(y_s.shape), f_s.new_empty(f_s.shape[:-2])


def _krr_predict_setup(ctx, inputs, output):
    f_t, f_s, y_s, _ = inputs
    _, lower, alpha, head, k_ts = output
    ctx.mark_non_differentiable(lower, alpha, head, k_ts)
    ctx.save_for_backward(f_t, f_s, y_s, lower, alpha, head, k_ts)


def _krr_predict_autograd(ctx, d_pred, *_):
    need_f_t, need_f_s = ctx.needs_input_grad[:2]
    d_f_t, d_f_s, d_y_s, d_lam = _krr_predict_backward(d_pred, *ctx.saved_tensors, need_f_t, need_f_s)
    return d_f_t if need_f_t else None, d_f_s if need_f_s else None, d_y_s, d_lam


_krr_predict.register_autograd(_krr_predict_autograd, setup_context=_krr_predict_setup)


def krr_predict(f_t: Tensor, f_s: Tensor, y_s: Tensor, lam: float | Tensor, *, precision: str = "auto") -> Tensor:
    """The ridge prediction (…, n, c) at f_t = f_t f_sᵀ (f_s f_sᵀ + lam I)⁻¹ y_s.

    f_t (…, n, d), f_s (…, m, d), y_s (…, m, c) with the same batch dimensions, device and dtype, m >= 1, d >= 1; the
    result has their dtype. lam is absolute: a number or a tensor (…) of the batch shape, so a caller writes
    `ridge * trace` or `ridge * trace / m`, detached or not, and autograd carries the gradient of lam on to the trace.
    Gradients reach f_t, f_s, y_s and lam, once. ValueError names the argument that does not fit; a matrix that is not
    positive definite gives NaN and is reported by `raise_if_failed`.
    """
    _check_fit(f_s, y_s)
    check_like("f_t", f_t, "f_s", f_s)
    if f_t.shape[-1] != f_s.shape[-1]:
        raise ValueError(f"f_t has {f_t.shape[-1]} columns, but f_s has {f_s.shape[-1]}")
    work = working_dtype(precision, f_s)
    t, f, y = f_t.to(work), f_s.to(work), y_s.to(work)
    return _krr_predict(t, f, y, as_lam(lam, f))[0].to(f_s.dtype)
