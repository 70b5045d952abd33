"""The Barlow Twins loss and its gradient, without the D × D matrix where the batch is smaller than D.

    C = z_1ᵀ z_2 / B, c its diagonal               z_1, z_2 (B, D), each column standardised over the batch
    on = sum_i (1 − c_i)²
    off = sum_{i ≠ j} C_ij² = ||C||² − ||c||²
    barlow_loss = on + off_diagonal · off          Zbontar et al. 2021, arXiv:2103.03230

Two routes, chosen from the shapes alone. "correlation" (B >= D) forms C. "gram" (B < D) forms g_1 = z_1 z_1ᵀ and
g_2 = z_2 z_2ᵀ, symmetric and B × B, in one launch on the Triton backend: ||z_1ᵀ z_2||² is the sum of all g_1 · g_2. All
other products are torch's. The gradients of z_1 from d_on and d_off (those of z_2 likewise, with C transposed):

    gram           (2 d_off / B²) g_2 z_1 − (2 / B) z_2 diag(d_off c + d_on (1 − c))
    correlation    z_2 d_Cᵀ / B  with  d_C = 2 d_off C, but −2 d_on (1 − c) on the diagonal

The standardisation is F.batch_norm, outside the op, differentiated by autograd. The op itself is differentiable once.

Precision: "fp32" unless asked otherwise, as nothing is inverted here (backend.py), for c, the products and the
gradients; the sums of squares over them are in float64. The gram route subtracts ||c||² from ||C||², so its off has an
error of about u ||C||² (u = 2⁻²⁴ in fp32; up to 1.5 u ||C||² was seen), and can be negative where it is no larger. This
matters only where B is close to D. Centred columns give C a rank of B − 1 at most, so ||C||² >= (sum c_i)² / (B − 1);
where the c_i are equal, as at convergence, off >= ||C||² (D − B + 1) / D, and the relative error of off is about
u D / (D − B + 1) at most. The correlation route does not subtract.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_backend, check_like, check_matrix, dtype_of, exact_products, precision_for, use_triton
from .gram import gram_, launch, mode_of


def barlow_loss_ref(z_1: Tensor, z_2: Tensor, off_diagonal: float) -> Tensor:
    """What `barlow_loss` must equal."""
    z_1, z_2 = (F.batch_norm(z, None, None, training=True) for z in (z_1, z_2))
    correlation = z_1.mT @ z_2 / len(z_1)  # (D, D)
    on = correlation.diagonal()
    return (1 - on).square().sum() + off_diagonal * (correlation.square().sum() - on.square().sum())


def route(b: int, d: int) -> str:
    """ "gram" (two b × b matrices) or "correlation" (one d × d)."""
    return "gram" if b < d else "correlation"


# --------------------------------------------------------------------------------------------------------------- the op


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def _grams(z_1: Tensor, z_2: Tensor, precision: str, backend: str) -> Tensor:
    """(2, B, B): z_1 z_1ᵀ and z_2 z_2ᵀ."""
    b, d = z_1.shape
    if use_triton("gram", backend, precision, z_1.device, b=2, n=b, m=b, d=d):
        # One launch reads one tensor, hence a copy of 2 B D entries, little beside B² D multiplications. Two launches
        # without it would each have half the tiles, which are few already.
        return launch(torch.stack([z_1, z_2]), None, symmetric=True, mode=mode_of(precision, z_1.dtype))[0]
    return torch.stack([gram_(z, None, precision, "torch", mirror=False) for z in (z_1, z_2)])


@torch.library.custom_op("kernels::barlow_terms", mutates_args=())
def _barlow_terms(z_1: Tensor, z_2: Tensor, precision: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """on and off of standardised z_1, z_2; for the backward the diagonal c (D,), and C or the Gram matrices."""
    (b, d), work, wide = z_1.shape, dtype_of(precision), _sum_dtype(z_1.device)
    with exact_products(z_1.device):
        if route(b, d) == "gram":
            products = _grams(z_1, z_2, precision, backend)
            c = (z_1.to(work) * z_2).sum(0).to(wide) / b
            g_1, g_2 = products.to(wide).flatten(1)
            off = torch.dot(g_1, g_2) / b**2 - c.square().sum()
        else:
            products = (z_1.to(work).mT @ z_2.to(work)).div_(b)
            c = products.diagonal().to(wide, copy=True)
            others = products.clone()
            others.diagonal().zero_()
            off = others.square_().sum(dtype=wide)
        on = (1 - c).square().sum()
    result = torch.promote_types(z_1.dtype, torch.float32)
    return on.to(result), off.to(result), c, products


@_barlow_terms.register_fake
def _(z_1, z_2, precision, backend):
    (b, d), work = z_1.shape, dtype_of(precision)
    on, off = (z_1.new_empty((), dtype=torch.promote_types(z_1.dtype, torch.float32)) for _ in range(2))
    products = z_1.new_empty((2, b, b) if route(b, d) == "gram" else (d, d), dtype=work)
    return on, off, z_1.new_empty(d, dtype=_sum_dtype(z_1.device)), products


@torch.library.custom_op("kernels::barlow_terms_backward", mutates_args=())
def _barlow_terms_backward(
    d_on: Tensor, d_off: Tensor, z_1: Tensor, z_2: Tensor, c: Tensor, products: Tensor, need_1: bool, need_2: bool
) -> tuple[Tensor, Tensor]:
    (b, d), work = z_1.shape, products.dtype
    x_1, x_2 = z_1.to(work), z_2.to(work)
    d_1, d_2 = z_1.new_empty(0), z_2.new_empty(0)
    with exact_products(z_1.device):
        if route(b, d) == "gram":
            g_1, g_2 = products * (2 / b**2 * d_off).to(work)
            column = (-2 / b * (d_off * c + d_on * (1 - c))).to(work)
            if need_1:
                d_1 = (column * x_2).addmm_(g_2, x_1)
            if need_2:
                d_2 = (column * x_1).addmm_(g_1, x_2)
        else:
            d_c = products * (2 / b * d_off).to(work)
            d_c.diagonal().copy_(-2 / b * d_on * (1 - c))
            if need_1:
                d_1 = x_2 @ d_c.mT
            if need_2:
                d_2 = x_1 @ d_c
    return d_1.to(z_1.dtype).contiguous(), d_2.to(z_2.dtype).contiguous()


@_barlow_terms_backward.register_fake
def _(d_on, d_off, z_1, z_2, c, products, need_1, need_2):
    return z_1.new_empty(z_1.shape if need_1 else 0), z_2.new_empty(z_2.shape if need_2 else 0)


def _setup(ctx, inputs, output):
    z_1, z_2, _, _ = inputs
    _, _, c, products = output
    ctx.mark_non_differentiable(c, products)
    ctx.save_for_backward(z_1, z_2, c, products)


def _autograd(ctx, d_on, d_off, *_):
    need_1, need_2 = ctx.needs_input_grad[:2]
    d_1, d_2 = _barlow_terms_backward(d_on, d_off, *ctx.saved_tensors, need_1, need_2)
    return d_1 if need_1 else None, d_2 if need_2 else None, None, None


_barlow_terms.register_autograd(_autograd, setup_context=_setup)


# -------------------------------------------------------------------------------------------------------------- public


def barlow_loss(
    z_1: Tensor, z_2: Tensor, off_diagonal: float, *, precision: str = "fp32", backend: str = "auto"
) -> Tensor:
    """sum_i (1 − C_ii)² + off_diagonal · sum_{i ≠ j} C_ij², C the cross-correlation of z_1 and z_2 over the batch.

    z_1, z_2 (B, D) of one device and dtype, B >= 2, D >= 1 -> a number, float64 for float64 inputs, else float32.
    Differentiable once. ValueError names the argument that does not fit.
    """
    on, off = barlow_terms(z_1, z_2, precision=precision, backend=backend)
    return on + off_diagonal * off


def barlow_terms(z_1: Tensor, z_2: Tensor, *, precision: str = "fp32", backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The two sums of `barlow_loss`: sum_i (1 − C_ii)² and sum_{i ≠ j} C_ij²."""
    check_matrix("z_1", z_1)
    if z_1.ndim != 2 or z_1.shape[0] < 2 or z_1.shape[1] < 1:
        raise ValueError(f"z_1 must be (B, D) with at least two rows and one column, got {tuple(z_1.shape)}")
    check_like("z_2", z_2, "z_1", z_1)
    if z_2.shape != z_1.shape:
        raise ValueError(f"z_2 has shape {tuple(z_2.shape)}, but z_1 has {tuple(z_1.shape)}")
    check_backend(backend, z_1.device.type, z_1.device.index)
    precision = precision_for(precision, z_1)
    z_1, z_2 = (F.batch_norm(z, None, None, training=True) for z in (z_1, z_2))
    on, off, _, _ = _barlow_terms(z_1, z_2, precision, backend)
    return on, off
