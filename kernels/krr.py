"""Kernel ridge regression on features: the head fitted to (f_s, y_s), and its prediction at f_t.

    head = f_sᵀ alpha,  alpha = (f_s f_sᵀ + lam I)⁻¹ y_s              dual: an m × m system
         = (f_sᵀ f_s + lam I)⁻¹ f_sᵀ y_s                              primal: a d × d system
    krr_predict = k_ts alpha = f_t head,  k_ts = f_t f_sᵀ             f_s (…, m, d), y_s (…, m, c), f_t (…, n, d)

The order of the products is chosen from the shapes alone, by `route`; autograd of the naive formula always forms the
n × m matrix k_ts and m × m and n × m gradients. One Cholesky factor serves forward and backward. The gradients are
written out below and derived in kernels/README.md. With ones=True all features have a last column of ones that is never
stored: k + 1 in place of k, and a last row of the head, the bias.

Precision and backends: backend.py. Everything is in the working dtype, Gram matrix, factor, coefficients and products;
only the result and the gradients are cast back to the dtype of the inputs. Failures (lam too small for the precision):
solve.py.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .backend import check_backend, check_like, check_matrix, dtype_of, exact_products, precision_for
from .gram import gram_, gram_pair_
from .solve import as_lam, factor_, record_failure, solve_, uses_factor_kernel


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
# Plain functions of tensors in the working dtype. "Unused" stands for a tensor that a route does without. The column of
# ones of a primal system is written out (d <= m: it is the small side); `ones` below is that of a dual one.


def _unused(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def _is_primal(f_s: Tensor, ones: bool) -> bool:
    return f_s.shape[-1] + ones <= f_s.shape[-2]


def _factor(k: Tensor, lam: Tensor, backend: str, op: str, n: int | None, m: int, d: int, c: int) -> Tensor:
    by_kernel = uses_factor_kernel(k, backend)
    lower, info = factor_(k, lam, backend, c)
    record_failure(info, lam, op, m, n, d, by_kernel)
    return lower.contiguous()


def _transposed_product(f: Tensor, a: Tensor) -> Tensor:
    """fᵀ a (d, c) as (aᵀ f)ᵀ: two to four times faster on a CPU where c is small."""
    return (a.mT @ f).mT


def _head(f: Tensor, a: Tensor, ones: bool) -> Tensor:
    """fᵀ a (d, c), with the sum of a as the row of the ones: the head of alpha, or the gradient of one from d_pred."""
    head = _transposed_product(f, a)
    return torch.cat([head, a.sum(-2, keepdim=True)], -2) if ones else head.contiguous()


def _apply(f: Tensor, head: Tensor, ones: bool) -> Tensor:
    """f head, with the last row of the head as a bias if it has one."""
    return f @ head[..., :-1, :] + head[..., -1:, :] if ones else f @ head


def _fit_backward(
    d_head: Tensor,
    f_s: Tensor,
    y_s: Tensor,
    lower: Tensor,
    alpha: Tensor,
    head: Tensor,
    need_f_s: bool,
    backend: str,
    ones: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of f_s, y_s and lam from that of the head."""
    d_f_s = _unused(f_s)
    if _is_primal(f_s, ones):
        f_s = _with_ones(f_s) if ones else f_s
        v = solve_(lower, d_head, backend)  # (d, c)
        d_y_s = f_s @ v
        d_lam = -(v * head).sum((-2, -1))
        if need_f_s:
            d_f_s = (y_s - f_s @ head) @ v.mT - d_y_s @ head.mT
            d_f_s = d_f_s[..., :-1] if ones else d_f_s
    else:
        beta = solve_(lower, _apply(f_s, d_head, ones), backend)  # (m, c)
        d_y_s = beta
        d_lam = -(beta * alpha).sum((-2, -1))
        if need_f_s:
            if ones:  # the ones themselves have no gradient
                d_head, head = d_head[..., :-1, :], head[..., :-1, :]
            d_f_s = alpha @ (d_head - _transposed_product(f_s, beta)).mT - beta @ head.mT
    return d_f_s, d_y_s, d_lam


def _predict_by_kernel_backward(
    d_pred: Tensor,
    f_t: Tensor,
    f_s: Tensor,
    lower: Tensor,
    alpha: Tensor,
    k_ts: Tensor,
    need_f_t: bool,
    need_f_s: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of f_t, f_s, y_s and lam in route dual_k: d_k_ts and d_k_ss are formed."""
    beta = solve_(lower, k_ts.mT @ d_pred, backend)  # (m, c)
    d_lam = -(beta * alpha).sum((-2, -1))
    d_f_t, d_f_s = _unused(f_t), _unused(f_s)
    if need_f_t or need_f_s:
        d_k_ts = d_pred @ alpha.mT  # (n, m)
        if need_f_t:
            d_f_t = d_k_ts @ f_s
        if need_f_s:
            d_k_ss = -beta @ alpha.mT  # (m, m)
            d_f_s = (d_k_ss + d_k_ss.mT) @ f_s + d_k_ts.mT @ f_t
    return d_f_t, d_f_s, beta, d_lam


def _fit(
    f_s: Tensor,
    y_s: Tensor,
    lam: Tensor,
    given: Tensor | None,
    precision: str,
    backend: str,
    ones: bool,
    op: str,
    n: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The head, the factor and alpha (dual only). given: the factor if it is known."""
    f, y = f_s.to(dtype_of(precision)), y_s.to(dtype_of(precision))
    lower = given if given is not None else _factor_of(f_s, f, lam, precision, backend, ones, op, n, y_s.shape[-1])
    if _is_primal(f, ones):
        f = _with_ones(f) if ones else f
        return solve_(lower, _transposed_product(f, y), backend).contiguous(), lower, _unused(f)
    alpha = solve_(lower, y, backend).contiguous()
    return _head(f, alpha, ones), lower, alpha


def _factor_of(
    f_s: Tensor, f: Tensor, lam: Tensor, precision: str, backend: str, ones: bool, op: str, n: int | None, c: int
) -> Tensor:
    """The factor of the system of f_s, where f is f_s in the working dtype."""
    m, d = f.shape[-2:]
    # half inputs go into the Gram matrix as they are; the copy in float64 is made for other products anyway
    rows = f if precision == "fp64" else f_s
    if _is_primal(f, ones):
        k = gram_((_with_ones(rows) if ones else rows).mT, None, precision, backend, mirror=False)
    else:
        k = gram_(rows, None, precision, backend, plus=float(ones), mirror=False)
    return _factor(k, lam, backend, op, n, m, d, c)


# ---------------------------------------------------------------------------------------------------------- ridge_fit
# The ops take features in their own dtype and cast them inside, where a product needs it: the Gram kernel does not, and
# nothing but the factor and the coefficients is kept in the working dtype for the backward. So is their result.


@torch.library.custom_op("kernels::ridge_fit", mutates_args=())
def _ridge_fit(
    f_s: Tensor, y_s: Tensor, lam: Tensor, given: Tensor | None, precision: str, backend: str, ones: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _join(given)
    with exact_products(f_s.device):
        head, lower, alpha = _fit(f_s, y_s, lam, given, precision, backend, ones, "ridge_fit", None)
    return head, (lower if given is None else _unused(lower)), alpha  # an op may not return its input


def _fake_fit(f_s, y_s, given, precision, ones):
    """Shapes of the head, the factor and alpha."""
    like = f_s.new_empty(0, dtype=dtype_of(precision))
    (*batch, m, d), c = f_s.shape, y_s.shape[-1]
    d, primal = d + ones, d + ones <= m
    size = d if primal else m
    lower = _unused(like) if given is not None else like.new_empty((*batch, size, size))
    return like.new_empty((*batch, d, c)), lower, (_unused(like) if primal else like.new_empty((*batch, m, c)))


@_ridge_fit.register_fake
def _(f_s, y_s, lam, given, precision, backend, ones):
    return _fake_fit(f_s, y_s, given, precision, ones)


@torch.library.custom_op("kernels::ridge_fit_backward", mutates_args=())
def _ridge_fit_backward(
    d_head: Tensor,
    f_s: Tensor,
    y_s: Tensor,
    lower: Tensor,
    alpha: Tensor,
    head: Tensor,
    need_f_s: bool,
    backend: str,
    ones: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with exact_products(f_s.device):
        f, y = f_s.to(head.dtype), y_s.to(head.dtype)
        d_f_s, d_y_s, d_lam = _fit_backward(d_head, f, y, lower, alpha, head, need_f_s, backend, ones)
    return d_f_s.to(f_s.dtype).contiguous(), d_y_s.to(f_s.dtype).contiguous(), d_lam


@_ridge_fit_backward.register_fake
def _(d_head, f_s, y_s, lower, alpha, head, need_f_s, backend, ones):
    d_f_s = f_s.new_empty(f_s.shape) if need_f_s else _unused(f_s)
    return d_f_s, y_s.new_empty(y_s.shape), head.new_empty(f_s.shape[:-2])


def _ridge_fit_setup(ctx, inputs, output):
    f_s, y_s, _, given, _, *ctx.how = inputs
    head, lower, alpha = output
    ctx.mark_non_differentiable(lower, alpha)
    ctx.save_for_backward(f_s, y_s, lower if given is None else given, alpha, head)


def _ridge_fit_autograd(ctx, d_head, *_):
    need_f_s = ctx.needs_input_grad[0]
    d_f_s, d_y_s, d_lam = _ridge_fit_backward(d_head, *ctx.saved_tensors, need_f_s, *ctx.how)
    return d_f_s if need_f_s else None, d_y_s, d_lam, None, None, None, None


_ridge_fit.register_autograd(_ridge_fit_autograd, setup_context=_ridge_fit_setup)


def ridge_fit(
    f_s: Tensor,
    y_s: Tensor,
    lam: float | Tensor,
    *,
    ones: bool = False,
    factor: Tensor | None = None,
    precision: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The ridge regression head (…, d, c) = f_sᵀ (f_s f_sᵀ + lam I)⁻¹ y_s: argmin ||f_s head − y_s||² + lam ||head||².

    f_s (…, m, d), y_s (…, m, c) of one device and dtype, m >= 1, d >= 1; the result has their dtype. lam is absolute, a
    number or a tensor (…) of the batch shape; gradients reach f_s, y_s and lam, once. With ones=True the features have
    a last column of ones, which is not to be stored, and the head a last row (…, d + 1, c). factor: of `factor_ahead`.
    ValueError names the argument that does not fit; a matrix that is not positive definite gives NaN and is reported by
    `raise_if_failed`.
    """
    _check_fit(f_s, y_s)
    check_backend(backend, f_s.device.type, f_s.device.index)
    precision = precision_for(precision, f_s)
    lam = as_lam(lam, f_s, dtype_of(precision))
    _check_given(factor, f_s, lam, ones)
    f, y = _cast_ahead(precision, backend, f_s, y_s)
    return _ridge_fit(f, y, lam, factor, precision, backend, ones)[0].to(f_s.dtype)


def _cast_ahead(precision: str, backend: str, *inputs: Tensor) -> list[Tensor]:
    """On a CPU the casts are done once, by autograd, and kept: there they cost more than the memory they take."""
    if inputs[0].device.type != "cpu" or backend == "triton":
        return list(inputs)
    return [x.to(dtype_of(precision)) for x in inputs]


def _check_fit(f_s: Tensor, y_s: Tensor) -> None:
    _check_features(f_s)
    check_like("y_s", y_s, "f_s", f_s)
    if y_s.shape[-2] != f_s.shape[-2]:
        raise ValueError(f"y_s has {y_s.shape[-2]} rows, but f_s has {f_s.shape[-2]}")


def _check_features(f_s: Tensor) -> None:
    check_matrix("f_s", f_s)
    if f_s.shape[-2] < 1 or f_s.shape[-1] < 1:
        raise ValueError(f"f_s must have at least one row and one column, got {tuple(f_s.shape)}")


def _check_given(factor: Tensor | None, f_s: Tensor, lam: Tensor, ones: bool) -> None:
    if factor is None:
        return
    check_matrix("factor", factor)
    size = min(f_s.shape[-2], f_s.shape[-1] + ones)
    expected = (*f_s.shape[:-2], size, size)
    if factor.shape != expected or factor.dtype != lam.dtype or factor.device != f_s.device:
        raise ValueError(
            f"factor must be that of factor_ahead for these features and options: {expected} {lam.dtype} on"
            f" {f_s.device}, got {tuple(factor.shape)} {factor.dtype} on {factor.device}"
        )


# -------------------------------------------------------------------------------------------------------- krr_predict


@torch.library.custom_op("kernels::krr_predict", mutates_args=())
def _krr_predict(
    f_t: Tensor, f_s: Tensor, y_s: Tensor, lam: Tensor, given: Tensor | None, precision: str, backend: str, ones: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work, (m, d), n, c = dtype_of(precision), f_s.shape[-2:], f_t.shape[-2], y_s.shape[-1]
    _join(given)
    with exact_products(f_s.device):
        if route(m, n, d + ones, c) == "dual_k":
            if given is None:
                k_ss, k_ts = gram_pair_(f_s, f_t, precision, backend, plus=float(ones), mirror=False)
                lower = _factor(k_ss, lam, backend, "krr_predict", n, m, d, c)
            else:
                lower, k_ts = given, gram_(f_t, f_s, precision, backend, plus=float(ones))
            alpha = solve_(lower, y_s.to(work), backend).contiguous()
            pred, head = k_ts @ alpha, _unused(alpha)
        else:
            head, lower, alpha = _fit(f_s, y_s, lam, given, precision, backend, ones, "krr_predict", n)
            pred, k_ts = _apply(f_t.to(work), head, ones), _unused(head)
    return pred, (lower if given is None else _unused(lower)), alpha, head, k_ts


@_krr_predict.register_fake
def _(f_t, f_s, y_s, lam, given, precision, backend, ones):
    (*batch, m, d), n, c = f_s.shape, f_t.shape[-2], y_s.shape[-1]
    head, lower, alpha = _fake_fit(f_s, y_s, given, precision, ones)
    k_ts = _unused(head)
    if route(m, n, d + ones, c) == "dual_k":
        head, k_ts = _unused(head), head.new_empty((*batch, n, m))
    return head.new_empty((*batch, n, c)), lower, alpha, head, k_ts


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
    backend: str,
    ones: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m, d, c = f_t.shape[-2], *f_s.shape[-2:], y_s.shape[-1]
    t, f, y = (x.to(lower.dtype) for x in (f_t, f_s, y_s))
    with exact_products(f_s.device):
        if route(m, n, d + ones, c) == "dual_k":
            gradients = _predict_by_kernel_backward(d_pred, t, f, lower, alpha, k_ts, need_f_t, need_f_s, backend)
            d_f_t, d_f_s, d_y_s, d_lam = gradients
        else:
            d_head, d_f_t = _head(t, d_pred, ones), _unused(t)
            if need_f_t:
                d_f_t = d_pred @ (head[..., :-1, :] if ones else head).mT
            d_f_s, d_y_s, d_lam = _fit_backward(d_head, f, y, lower, alpha, head, need_f_s, backend, ones)
    d_f_t, d_f_s, d_y_s = (x.to(f_s.dtype).contiguous() for x in (d_f_t, d_f_s, d_y_s))
    return d_f_t, d_f_s, d_y_s, d_lam


@_krr_predict_backward.register_fake
def _(d_pred, f_t, f_s, y_s, lower, alpha, head, k_ts, need_f_t, need_f_s, backend, ones):
    d_f_t = f_t.new_empty(f_t.shape) if need_f_t else _unused(f_t)
    d_f_s = f_s.new_empty(f_s.shape) if need_f_s else _unused(f_s)
    return d_f_t, d_f_s, y_s.new_empty(y_s.shape), lower.new_empty(f_s.shape[:-2])


def _krr_predict_setup(ctx, inputs, output):
    f_t, f_s, y_s, _, given, _, *ctx.how = inputs
    _, lower, alpha, head, k_ts = output
    ctx.mark_non_differentiable(lower, alpha, head, k_ts)
    ctx.save_for_backward(f_t, f_s, y_s, lower if given is None else given, alpha, head, k_ts)


def _krr_predict_autograd(ctx, d_pred, *_):
    need_f_t, need_f_s = ctx.needs_input_grad[:2]
    gradients = _krr_predict_backward(d_pred, *ctx.saved_tensors, need_f_t, need_f_s, *ctx.how)
    d_f_t, d_f_s, d_y_s, d_lam = gradients
    return d_f_t if need_f_t else None, d_f_s if need_f_s else None, d_y_s, d_lam, None, None, None, None


_krr_predict.register_autograd(_krr_predict_autograd, setup_context=_krr_predict_setup)


def krr_predict(
    f_t: Tensor,
    f_s: Tensor,
    y_s: Tensor,
    lam: float | Tensor,
    *,
    ones: bool = False,
    factor: Tensor | None = None,
    precision: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The ridge prediction (…, n, c) at f_t = f_t f_sᵀ (f_s f_sᵀ + lam I)⁻¹ y_s.

    f_t (…, n, d), f_s (…, m, d), y_s (…, m, c) with the same batch dimensions, device and dtype, m >= 1, d >= 1; the
    result has their dtype. lam is absolute: a number or a tensor (…) of the batch shape, so a caller writes
    `ridge * trace` or `ridge * trace / m`, detached or not, and autograd carries the gradient of lam on to the trace.
    Gradients reach f_t, f_s, y_s and lam, once. With ones=True both have a last column of ones, which is not to be
    stored (the trace of k_ss is then that of f_s f_sᵀ plus m). factor: of `factor_ahead`, for the same f_s and lam.
    ValueError names the argument that does not fit; a matrix that is not positive definite gives NaN and is reported by
    `raise_if_failed`.
    """
    _check_fit(f_s, y_s)
    check_like("f_t", f_t, "f_s", f_s)
    if f_t.shape[-1] != f_s.shape[-1]:
        raise ValueError(f"f_t has {f_t.shape[-1]} columns, but f_s has {f_s.shape[-1]}")
    check_backend(backend, f_s.device.type, f_s.device.index)
    precision = precision_for(precision, f_s)
    lam = as_lam(lam, f_s, dtype_of(precision))
    _check_given(factor, f_s, lam, ones)
    t, f, y = _cast_ahead(precision, backend, f_t, f_s, y_s)
    return _krr_predict(t, f, y, lam, factor, precision, backend, ones)[0].to(f_s.dtype)


# ------------------------------------------------------------------------------------------------------- factor_ahead


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _join(given: Tensor | None) -> None:
    """What follows waits for a factor that is being computed on the side stream."""
    if given is not None and given.is_cuda:
        torch.cuda.current_stream(given.device).wait_stream(_side_stream(given.device))


@torch.library.custom_op("kernels::factor_ahead", mutates_args=())
def _factor_ahead(f_s: Tensor, lam: Tensor, c: int, precision: str, backend: str, ones: bool) -> Tensor:
    def compute() -> Tensor:
        with exact_products(f_s.device):
            f = f_s.to(dtype_of(precision))
            return _factor_of(f_s, f, lam, precision, backend, ones, "factor_ahead", None, c)

    if not f_s.is_cuda:
        return compute()
    here, side = torch.cuda.current_stream(f_s.device), _side_stream(f_s.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        lower = compute()
    for tensor in (f_s, lam):  # else their memory could be used again while the side stream reads it
        tensor.record_stream(side)
    lower.record_stream(here)
    return lower


@_factor_ahead.register_fake
def _(f_s, lam, c, precision, backend, ones):
    m, d = f_s.shape[-2:]
    size = d + ones if d + ones <= m else m
    return f_s.new_empty((*f_s.shape[:-2], size, size), dtype=dtype_of(precision))


def factor_ahead(
    f_s: Tensor, lam: float | Tensor, c: int, *, ones: bool = False, precision: str = "auto", backend: str = "auto"
) -> Tensor:
    """The Cholesky factor that `krr_predict` and `ridge_fit` need, computed beside other work on the GPU.

    It depends on the synthetic features only, and keeps few processors busy: started on a side stream, it hides under
    the forward pass of the real batch. Without a GPU it is computed at once. c: the number of columns of y_s; the other
    arguments are those of the call that is given the factor, which waits for it (nothing else may use it).

        factor = factor_ahead(f_s, lam, y_s.shape[1])
        f_t = net(x_t)
        pred = krr_predict(f_t, f_s, y_s, lam, factor=factor)  # all gradients as without a factor
    """
    _check_features(f_s)
    check_backend(backend, f_s.device.type, f_s.device.index)
    precision = precision_for(precision, f_s)
    f_s = f_s.detach()
    lam = as_lam(lam.detach() if isinstance(lam, Tensor) else lam, f_s, dtype_of(precision))
    return _factor_ahead(f_s, lam, c, precision, backend, ones)
