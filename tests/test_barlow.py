"""kernels/barlow.py: both routes and both backends against the loop, its rounding, what it forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import kernels.barlow
from kernels.backend import INTERPRETED, triton
from kernels.barlow import _barlow_terms, _barlow_terms_backward, barlow_loss, barlow_loss_ref, barlow_terms, route

F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
U = 2.0**-24

SIZES = [(5, 7), (70, 81), (2, 3), (7, 5), (6, 6), (4, 1), (2, 1)]  # (B, D); the second takes more than one tile
BOTH = [(5, 7), (7, 5)]
sizes = pytest.mark.parametrize(("b", "d"), SIZES, ids=str)
both_routes = pytest.mark.parametrize(("b", "d"), BOTH, ids=["gram", "correlation"])
no_triton = pytest.mark.skipif(triton is None or not (INTERPRETED or DEVICE == "cuda"), reason="Triton cannot run here")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=no_triton)])


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices here are tiny; and nothing depends on the order of the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def draw(b, d, dtype=F64, grad=True):
    """Two correlated views, with columns of different means and sizes."""
    z = torch.randn(b, d, dtype=F64)
    views = [(z + torch.randn(b, d, dtype=F64)) * torch.arange(1, d + 1) + 3 for _ in range(2)]
    return [view.to(DEVICE, dtype).requires_grad_(grad) for view in views]


def standardised(z):
    return F.batch_norm(z, None, None, training=True)


def loop(z_1, z_2):
    """on and off of (B, D) lists of lists, and C."""

    def standardise(z):
        columns = []
        for column in zip(*z, strict=True):
            mean = sum(column) / len(column)
            var = sum((v - mean) ** 2 for v in column) / len(column)
            columns.append([(v - mean) / math.sqrt(var + 1e-5) for v in column])
        return columns

    z_1, z_2 = standardise(z_1), standardise(z_2)
    c = [[sum(v * w for v, w in zip(a, b, strict=True)) / len(a) for b in z_2] for a in z_1]
    on = sum((1 - c[i][i]) ** 2 for i in range(len(c)))
    off = sum(c[i][j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j)
    return on, off


def relative(a, b):
    return ((a.to(F64) - b.to(F64)).norm() / b.to(F64).norm()).item()


# ------------------------------------------------------------------------------------------------- values and gradients


@backends
@sizes
def test_the_terms_are_those_of_the_loop(b, d, backend):
    """About b + d float64 roundings each; 1e-12 is a thousand of them, and 1e-13 for an off that is zero (d = 1)."""
    z_1, z_2 = draw(b, d, grad=False)
    on, off = loop(z_1.tolist(), z_2.tolist())
    found = barlow_terms(z_1, z_2, backend=backend)
    assert found[0].item() == pytest.approx(on, rel=1e-12)
    assert found[1].item() == pytest.approx(off, rel=1e-12, abs=1e-13)
    assert barlow_loss(z_1, z_2, 0.3, backend=backend).item() == pytest.approx(on + 0.3 * off, rel=1e-12)
    assert barlow_loss_ref(z_1, z_2, 0.3).item() == pytest.approx(on + 0.3 * off, rel=1e-12)


@backends
@sizes
def test_gradients_are_those_of_autograd(b, d, backend):
    """From standardised views, so that they are not all but zero, as they are behind the standardisation of two rows;
    and of the whole loss where there are more. 1e-12: thousands of float64 roundings."""
    views = [standardised(z).detach() * 1.3 for z in draw(b, d)]

    def both(z_1, z_2):
        c = z_1.mT @ z_2 / b
        others = c - c.diagonal().diag()
        return (1 - c.diagonal()).square().sum(), others.square().sum()

    for weights in ((1.0, 0.0), (0.0, 1.0), (0.7, 0.3)):
        found, wanted = ([x.clone().requires_grad_() for x in views] for _ in range(2))
        on, off, *_ = _barlow_terms(*found, "fp64", backend)
        (weights[0] * on + weights[1] * off).backward()
        on, off = both(*wanted)
        (weights[0] * on + weights[1] * off).backward()
        for a, w in zip(found, wanted, strict=True):
            assert (a.grad - w.grad).norm() <= 1e-12 * max(1.0, w.grad.norm())
    if b > 2:
        z = draw(b, d)
        found = torch.autograd.grad(barlow_loss(*z, 0.3, backend=backend), z)
        wanted = torch.autograd.grad(barlow_loss_ref(*z, 0.3), z)
        assert all(relative(a, w) < 1e-12 for a, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("term", [0, 1])
@both_routes
def test_the_gradient_of_one_term_alone(b, d, term):
    """The other one's gradient never comes: it is zero."""
    z = draw(b, d)
    found = torch.autograd.grad(barlow_terms(*z)[term], z)
    on, both = barlow_loss_ref(*z, 0.0), barlow_loss_ref(*z, 1.0)
    wanted = torch.autograd.grad(both - on if term else on, z)
    assert all(relative(a, w) < 1e-12 for a, w in zip(found, wanted, strict=True))


@backends
@both_routes
def test_gradcheck(b, d, backend):
    z = (z.detach().div(3).requires_grad_() for z in draw(b - 2, d - 2))
    assert route(b, d) == route(b - 2, d - 2)  # smaller, as every input costs two launches
    assert torch.autograd.gradcheck(lambda z_1, z_2: barlow_loss(z_1, z_2, 0.3, backend=backend), tuple(z))


@both_routes
def test_each_gradient_alone(b, d):
    """A gradient that is not asked for is not computed, and the other one is the same bits."""
    z = draw(b, d)
    wanted = torch.autograd.grad(barlow_loss(*z, 0.3), z)
    for i in (0, 1):
        views = [x if i == j else x.detach() for j, x in enumerate(z)]
        loss = barlow_loss(*views, 0.3)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
            (found,) = torch.autograd.grad(loss, views[i])
        assert torch.equal(found, wanted[i])
        products = [event for event in trace.events() if event.name in ("aten::mm", "aten::addmm_")]
        assert len(products) == 1


@both_routes
def test_differentiating_twice_raises(b, d):
    z_1, z_2 = draw(b, d)
    (first,) = torch.autograd.grad(barlow_loss(z_1, z_2, 0.3), z_1, create_graph=True)
    with pytest.raises(RuntimeError, match="barlow_terms_backward"):
        torch.autograd.grad(first.square().sum(), z_1)


# -------------------------------------------------------------------------------------------------- custom ops, compile


@backends
@both_routes
def test_opcheck(b, d, backend):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for dtype in (F64, torch.bfloat16):
        how = "fp64" if dtype == F64 else "fp32", backend
        z = draw(b, d, dtype)
        torch.library.opcheck(_barlow_terms, (*z, *how), test_utils=checks)
    z_1, z_2 = draw(b, d, torch.float32)
    columns_first = z_1.detach().mT.contiguous().mT.requires_grad_()
    for views in ((z_1, z_2.detach()), (columns_first, z_2), (z_1, columns_first)):
        torch.library.opcheck(_barlow_terms, (*views, "fp32", backend), test_utils=checks)


@both_routes
def test_opcheck_of_the_backward(b, d):
    """Shapes, dtypes and strides of its results are what its fake says."""
    for dtype in (F64, torch.float32, torch.bfloat16):
        z_1, z_2 = draw(b, d, dtype, grad=False)
        columns_first = [z.mT.contiguous().mT for z in (z_1, z_2)]
        for views in ((z_1, z_2), columns_first):
            on, off, *saved = _barlow_terms(*views, "fp64" if dtype == F64 else "fp32", "torch")
            for needed in ((True, True), (True, False), (False, True)):
                inputs = (on, off, *views, *saved, *needed)
                torch.library.opcheck(_barlow_terms_backward, inputs, test_utils=("test_schema", "test_faketensor"))
                assert all(x.is_contiguous() for x in _barlow_terms_backward(*inputs))  # opcheck does not look


@both_routes
def test_what_is_saved_is_constant_to_autograd(b, d):
    assert [x.requires_grad for x in _barlow_terms(*draw(b, d), "fp64", "torch")] == [True, True, False, False]


@both_routes
def test_compiled_without_graph_breaks(b, d):
    z = draw(b, d, torch.float32)

    def loss(z_1, z_2):
        return 0.1 * barlow_loss(2 * z_1, z_2, 0.3)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*z)
    assert relative(compiled, loss(*z)) < 1e-6
    found, wanted = (torch.autograd.grad(value, z) for value in (compiled, loss(*z)))
    for a, w in zip(found, wanted, strict=True):
        assert relative(a, w) < 1e-5  # the standardisation of a few rows is traced into other operations


# ------------------------------------------------------------------------------------------------------------ precision


def converged(b, d):
    """z_1 = z_2 + 0.1 noise; the columns of z_2 are orthogonal, in groups of b − 1, as there can be no more."""
    groups = []
    for _ in range(math.ceil(d / (b - 1))):
        x = torch.randn(b, b - 1, dtype=F64)
        groups.append(torch.linalg.qr(x - x.mean(0))[0] * b**0.5)
    z_2 = torch.cat(groups, 1)[:, :d]
    return [z.to(DEVICE, torch.float32) for z in (z_2 + 0.1 * torch.randn(b, d, dtype=F64), z_2)]


CONVERGED = [(32, 64), (32, 512), (64, 65), (128, 512), (256, 257), (256, 512), (64, 64), (256, 64), (128, 128)]
CONVERGED = [(*size, "torch") for size in CONVERGED]
CONVERGED += [pytest.param(*size, "triton", marks=no_triton) for size in ((32, 64), (40, 130))]


@pytest.mark.parametrize(("b", "d", "backend"), CONVERGED)
def test_the_error_at_convergence(b, d, backend):
    """float32 against float64 of the same standardised views, where ||C||² − ||c||² cancels.

    Gram route: an entry on the diagonal of a Gram matrix sums d positive terms in blocks, with an error of one or two u
    (four if by TF32 products: 2⁻²²) of itself, and ||C||² has two such factors: 8 u ||C||² at most. The gradient of off
    is a difference of ||C||'s and ||c||'s, too: it has twice that error relative to ||C||'s. Correlation route: nothing
    is subtracted, the errors of the entries of C are as random as its signs; 16 u relative to off itself.
    """
    views = [standardised(z).requires_grad_() for z in converged(b, d)]
    exact_views = [z.detach().double().requires_grad_() for z in views]
    on, off, c, products = _barlow_terms(*views, "fp32", backend)
    exact_on, exact_off, exact_c, _ = _barlow_terms(*exact_views, "fp64", "torch")
    assert products.dtype == off.dtype == torch.float32
    gradients, wanted = torch.autograd.grad(off, views), torch.autograd.grad(exact_off, exact_views)
    on, off, exact_on, exact_off = (x.item() for x in (on, off, exact_on, exact_off))
    rounding = 2 * math.sqrt(b) * U  # of a c_i, the sum of b terms, whose errors are random
    assert (c - exact_c).abs().max() <= rounding
    assert abs(on - exact_on) <= 2 * math.sqrt(exact_on * d) * rounding + U * exact_on  # hence, by Cauchy and Schwarz

    squares = exact_c.square().sum().item()
    whole = exact_off + squares  # ||C||²
    error = abs(off - exact_off)
    if route(b, d) == "gram":
        assert error <= 8 * U * whole
        # The docstring's theorem: ||C||² >= (sum c_i)² / (b − 1), so that off is not small while b is well below d.
        assert whole >= exact_c.sum() ** 2 / (b - 1)
        assert whole / exact_off <= d / (d - b + 1) * 1.01  # the c_i are equal within 1 %
        x_1, x_2 = (z.detach() for z in exact_views)
        full = 2 / b**2 * (x_2 @ (x_2.mT @ x_1)), 2 / b**2 * (x_1 @ (x_1.mT @ x_2))
        for a, w, f in zip(gradients, wanted, full, strict=True):
            assert (a - w).norm() <= 16 * U * f.norm()
    else:
        assert error <= 16 * U * exact_off


def test_sums_of_squares_are_in_float64():
    """Of signs, all products and all of c are exact in float32, and the result is, but for its last rounding, if the
    sum over g_1 · g_2 is: it is above 2²⁷, so that float32 would round it to multiples of 16, and off is a tenth of it.
    """
    b, d = 512, 513
    hadamard = torch.ones(1, 1)
    for _ in range(9):
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    signs = torch.cat([hadamard, hadamard[:, :1]], 1)
    z_1, z_2 = ((signs * (torch.rand(b, d) - 0.01).sign()).to(DEVICE) for _ in range(2))  # one in a hundred is wrong
    on, off, c, products = _barlow_terms(z_1, z_2, "fp32", "torch")
    exact = z_1.double().mT @ z_2.double() / b
    assert torch.equal(c, exact.diagonal())
    assert torch.equal(products[1].double(), z_2.double() @ z_2.double().mT)
    assert products.double().prod(0).sum() > 2**27
    expected = exact.square().sum() - c.square().sum()
    assert 0.05 < expected / exact.square().sum() < 0.15
    assert off == expected.float()
    assert on == (1 - c).square().sum().float()


@backends
@both_routes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_views(b, d, dtype, backend):
    """The standardised views have the inputs' dtype; their products are exact, the sums float32, and so is the loss."""
    z = draw(b, d, dtype)
    loss = barlow_loss(*z, 0.3, backend=backend)
    assert loss.dtype == torch.float32
    views = [standardised(x.detach()).double().requires_grad_() for x in z]
    on, off, *_ = _barlow_terms(*views, "fp64", "torch")
    expected = on + 0.3 * off
    assert loss.item() == pytest.approx(expected.item(), rel=100 * U)  # tens of roundings, and ||C||² / off of 5
    gradients = torch.autograd.grad(loss, z)
    assert all(g.dtype == dtype for g in gradients)
    rounded = [x.to(dtype) for x in torch.autograd.grad(expected, views)]  # to one half-precision number, as the op's
    halves = [standardised(x) for x in z]
    for a, w in zip(gradients, torch.autograd.grad(halves, z, rounded), strict=True):
        assert relative(a, w) < 4 * torch.finfo(dtype).eps  # a tie may be rounded to the other side


@both_routes
def test_dtypes(b, d):
    z = draw(b, d, torch.float32)
    exact = barlow_terms(*z, precision="fp64")
    assert [x.dtype for x in exact] == [torch.float32] * 2
    views = [standardised(x).double() for x in z]
    on, off, *_ = _barlow_terms(*views, "fp64", "torch")
    assert torch.equal(torch.stack(exact), torch.stack([on, off]).float())  # one rounding, at the end
    z = draw(b, d, F64)
    assert torch.equal(barlow_loss(*z, 0.3, precision="fp32"), barlow_loss(*z, 0.3, precision="fp64"))
    assert barlow_loss(*z, 0.3).dtype == F64


def run(z, **how):
    """Loss, terms and gradients, detached."""
    on, off = barlow_terms(*z, **how)
    loss = barlow_loss(*z, 0.3, **how)
    return [x.detach() for x in (loss, on, off, *torch.autograd.grad(loss, z))]


@backends
@both_routes
def test_autocast_changes_nothing(b, d, backend):
    z = draw(b, d, torch.float32)
    expected = run(z, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (z[0] @ z[1].mT).dtype == torch.bfloat16
        found = run(z, backend=backend)
    assert all(torch.equal(a, w) for a, w in zip(found, expected, strict=True))


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@both_routes
def test_matmul_precision_is_set_inside_and_restored(b, d, setting, monkeypatch):
    """Seen where each op asks for its route, forward and backward."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    legacy, before = torch.get_float32_matmul_precision(), [x.fp32_precision for x in settings]
    z = draw(b, d, torch.float32)
    expected = run(z)
    inside, ask = [], kernels.barlow.route

    def spy(*args):
        inside.append([x.fp32_precision for x in settings])
        return ask(*args)

    monkeypatch.setattr(kernels.barlow, "route", spy)
    try:
        torch.set_float32_matmul_precision(setting)
        outside = [x.fp32_precision for x in settings]
        found = run(z)
        assert [x.fp32_precision for x in settings] == outside
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(legacy)
        for x, value in zip(settings, before, strict=True):
            x.fp32_precision = value
    assert inside == [["ieee", "ieee"]] * 3  # forward twice, backward
    assert all(torch.equal(a, w) for a, w in zip(found, expected, strict=True))


@backends
@pytest.mark.parametrize(("b", "d"), [(40, 130), (130, 40)], ids=["gram", "correlation"])
def test_the_same_bits_every_time(b, d, backend):
    z = draw(b, d, torch.float32)
    first = run(z, backend=backend)
    for _ in range(2):
        again = run([x.detach().clone().requires_grad_() for x in z], backend=backend)
        assert all(torch.equal(a, w) for a, w in zip(again, first, strict=True))


# --------------------------------------------------------------------------------------------------------------- routes


def test_routes():
    assert [route(*size) for size in ((255, 256), (256, 256), (257, 256))] == ["gram", "correlation", "correlation"]
    assert route(256, 2048) == "gram"  # the teachers' default


@pytest.mark.parametrize(("b", "d"), [(20, 50), (50, 20)], ids=["gram", "correlation"])
def test_what_each_route_forms(b, d):
    """Read off the operands of every operation inside the ops, forward and backward."""
    z_1, z_2 = draw(b, d, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as trace:
        barlow_loss(z_1, z_2, 0.3).backward()
    events = trace.events()
    operands = {tuple(shape) for event in events for shape in event.input_shapes if isinstance(shape, list)}
    assert (50, 50) not in operands
    assert (20, 20) in operands  # as that of the Gram matrices, or of C, is
    names = [event.name for event in events]
    assert "aten::_local_scalar_dense" not in names  # nothing was read back to the host
    assert names.count("aten::mm") + names.count("aten::addmm_") == (4 if b < d else 3)


@no_triton
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_one_launch_for_both_gram_matrices(dtype, monkeypatch):
    launches, launch = [], kernels.barlow.launch

    def spy(f_s, f_t, **how):
        launches.append((tuple(f_s.shape), f_s.dtype, f_t, how))
        return launch(f_s, f_t, **how)

    monkeypatch.setattr(kernels.barlow, "launch", spy)
    monkeypatch.setattr(kernels.barlow, "gram_", None)
    z = draw(5, 7, dtype)
    barlow_loss(*z, 0.3, backend="triton").backward()
    mode = {F64: "fp64", torch.float32: "tf32x3", torch.bfloat16: "native"}[dtype]
    assert launches == [((2, 5, 7), dtype, None, dict(symmetric=True, mode=mode))]


def test_auto_follows_the_measurements(monkeypatch):
    """The size asked about is that of the launch: a batch of two Gram matrices."""
    asked = []

    def use_triton(op, backend, precision, device, **size):
        asked.append((op, backend, precision, size))
        return False

    monkeypatch.setattr(kernels.barlow, "use_triton", use_triton)
    barlow_loss(*draw(5, 7, torch.float32), 0.3)
    barlow_terms(*draw(5, 7, torch.float32))
    barlow_loss(*draw(7, 5, torch.float32), 0.3)
    assert asked == [("gram", "auto", "fp32", dict(b=2, n=5, m=5, d=7))] * 2


@backends
@both_routes
def test_strided_views_inside_nan(b, d, backend):
    plain = draw(b, d)
    strided = []
    for x in plain:
        buffer = torch.full((2 * d + 3, 3 * b + 2), math.nan, dtype=F64, device=DEVICE)
        view = buffer[1 : 1 + 2 * d : 2, 2 : 2 + 3 * b : 3].mT  # every stride is another, the columns' the largest
        view.copy_(x.detach())
        strided.append(view.requires_grad_())
    for a, w in zip(run(strided, backend=backend), run(plain, backend=backend), strict=True):
        assert relative(a, w) < 1e-12


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
@backends
@both_routes
def test_nan_reaches_both_terms_and_both_gradients(b, d, backend, where, value):
    z = draw(b, d, torch.float32, grad=False)
    z[where][1, 2] = value
    loss, on, off, d_1, d_2 = run([x.requires_grad_() for x in z], backend=backend)
    assert loss.isnan() and on.isnan() and off.isnan()
    assert d_1.isnan().any() and d_2.isnan().any()


def test_a_constant_column_has_no_correlation():
    """A dead unit of the projector: standardised to zero, it adds one to `on`, and its gradient is finite."""
    for b, d in BOTH:
        z_1, z_2 = draw(b, d)
        with torch.no_grad():
            z_1[:, 2] = 4.0
        on, off = loop(z_1.tolist(), z_2.tolist())
        loss = barlow_loss(z_1, z_2, 0.3)
        assert loss.item() == pytest.approx(on + 0.3 * off, rel=1e-12)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (z_1, z_2)))


Z = torch.randn(4, 3, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("z_1", lambda: barlow_loss([[1.0]], Z, 0.1)),
        ("z_1", lambda: barlow_loss(torch.randn(3), Z, 0.1)),
        ("z_1", lambda: barlow_loss(Z.long(), Z, 0.1)),
        ("z_1", lambda: barlow_loss(torch.stack([Z, Z]), torch.stack([Z, Z]), 0.1)),
        ("z_1", lambda: barlow_loss(Z[:1], Z[:1], 0.1)),
        ("z_1", lambda: barlow_loss(Z[:, :0], Z[:, :0], 0.1)),
        ("z_2", lambda: barlow_loss(Z, Z[:3], 0.1)),
        ("z_2", lambda: barlow_loss(Z, Z[:, :2], 0.1)),
        ("z_2", lambda: barlow_loss(Z, Z.double(), 0.1)),
        ("z_2", lambda: barlow_loss(Z, Z.to("meta"), 0.1)),
        ("z_2", lambda: barlow_loss(Z, None, 0.1)),
        ("precision", lambda: barlow_loss(Z, Z, 0.1, precision="tf32")),
        ("backend", lambda: barlow_loss(Z, Z, 0.1, backend="cuda")),
        ("precision", lambda: barlow_terms(Z, Z, precision="bf16")),
        ("backend", lambda: barlow_terms(Z, Z, backend="numpy")),
    ],
)
def test_validation_names_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()
