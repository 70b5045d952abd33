"""kernels/: values and gradients against naive formulas, precision, failures, shapes, routes."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels import (
    FailedFactorization,
    factor_ahead,
    gram,
    krr_predict,
    raise_if_failed,
    ridge_fit,
    spd_factor,
    spd_solve,
)
from kernels.backend import exact_products, resolve_precision
from kernels.gram import _gram, _gram_pair, gram_ref
from kernels.krr import _factor_ahead, _krr_predict, _ridge_fit, krr_predict_ref, ridge_fit_ref, route
from kernels.solve import _spd_factor, _spd_solve, spd_solve_ref

pytestmark = pytest.mark.usefixtures("clean_record")
F64 = torch.float64

# route: (m, n, d, c)
SIZES = {"dual_w": (7, 5, 11, 2), "dual_k": (5, 4, 6, 9), "primal": (12, 5, 6, 3)}
CASES = [(way, batch) for way in SIZES for batch in ((), (3,), (2, 2))]
cases = pytest.mark.parametrize(("way", "batch"), CASES, ids=[f"{way}{list(batch)}" for way, batch in CASES])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices here are tiny: on a busy machine a second thread costs five times the time it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(way, batch=(), dtype=F64, grad=True):
    """f_t, f_s, y_s for a route."""
    m, n, d, c = SIZES[way]
    assert route(m, n, d, c) == way
    shapes = (*batch, n, d), (*batch, m, d), (*batch, m, c)
    return [torch.randn(shape, dtype=F64).to(dtype).requires_grad_(grad) for shape in shapes]


def primal_fit_ref(f_s, y_s, lam):
    """The head by the d × d system, naively: well conditioned where the dual one is not."""
    eye = torch.eye(f_s.shape[-1], dtype=f_s.dtype)
    lam = torch.as_tensor(lam, dtype=f_s.dtype)[..., None, None]
    return torch.linalg.solve(f_s.mT @ f_s + lam * eye, f_s.mT @ y_s)


def references(way):
    """(naive fit, naive prediction), in the form that is well conditioned."""
    if way == "primal":
        return primal_fit_ref, lambda f_t, *rest: f_t @ primal_fit_ref(*rest)
    return ridge_fit_ref, krr_predict_ref


def relative(a, b):
    return ((a.to(F64) - b.to(F64)).norm() / b.to(F64).norm()).item()


def assert_same_with_gradients(function, reference, inputs, bound=1e-9):
    value, expected = function(*inputs), reference(*inputs)
    assert relative(value, expected) < bound
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((value * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert relative(a, b) < bound, f"gradient of input {i}"


# ------------------------------------------------------------------------------------------------- values and gradients


@cases
def test_prediction_and_gradients_equal_the_naive_formula(way, batch):
    lam = (0.1 + torch.rand(batch, dtype=F64)).requires_grad_()
    f_t, f_s, y_s = draw(way, batch)
    fit_ref, predict_ref = references(way)
    assert_same_with_gradients(krr_predict, predict_ref, (f_t, f_s, y_s, lam))
    assert_same_with_gradients(ridge_fit, fit_ref, (f_s, y_s, lam))


def with_ones(x):
    return torch.cat([x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype)], -1)


# (m, n, d, c) whose route is the same with and without one more feature, and d = m, which the ones turn to dual
WITH_ONES = {**SIZES, "dual_w at d = m": (8, 5, 8, 2), "primal at d = m - 1": (8, 5, 7, 2)}


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("case", WITH_ONES)
def test_ones_are_a_last_feature_that_is_not_stored(case, batch):
    m, n, d, c = WITH_ONES[case]
    f_t, f_s, y_s = (torch.randn(*batch, *shape, dtype=F64).requires_grad_() for shape in ((n, d), (m, d), (m, c)))
    lam = (0.1 + torch.rand(batch, dtype=F64)).requires_grad_()

    def relative_lam(f_s, lam):  # so that its gradient reaches the features too
        return lam * f_s.square().mean((-2, -1))

    assert_same_with_gradients(
        lambda f_t, f_s, y_s, lam: krr_predict(f_t, f_s, y_s, relative_lam(f_s, lam), ones=True),
        lambda f_t, f_s, y_s, lam: krr_predict_ref(with_ones(f_t), with_ones(f_s), y_s, relative_lam(f_s, lam)),
        (f_t, f_s, y_s, lam),
    )
    assert_same_with_gradients(
        lambda f_s, y_s, lam: ridge_fit(f_s, y_s, lam, ones=True),
        lambda f_s, y_s, lam: ridge_fit_ref(with_ones(f_s), y_s, lam),
        (f_s, y_s, lam),
    )
    # alone, too: what is not asked for is not a reason to drop a term
    weight = torch.randn(*batch, n, c, dtype=F64)
    for i in range(4):
        inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate((f_t, f_s, y_s, lam))]
        (found,) = torch.autograd.grad((krr_predict(*inputs, ones=True) * weight).sum(), inputs[i])
        t, s, y, ridge = inputs
        expected = (krr_predict_ref(with_ones(t), with_ones(s), y, ridge) * weight).sum()
        assert relative(found, torch.autograd.grad(expected, inputs[i])[0]) < 1e-9


@pytest.mark.parametrize("ones", [False, True])
@cases
def test_a_factor_computed_ahead_changes_nothing(way, batch, ones):
    f_t, f_s, y_s = draw(way, batch)
    lam = torch.full(batch, 0.3, dtype=F64, requires_grad=True)
    factor = factor_ahead(f_s, lam, y_s.shape[-1], ones=ones)
    assert not factor.requires_grad
    for function, inputs in ((krr_predict, (f_t, f_s, y_s, lam)), (ridge_fit, (f_s, y_s, lam))):
        plain, ahead = function(*inputs, ones=ones), function(*inputs, ones=ones, factor=factor)
        assert torch.equal(plain, ahead)
        pairs = zip(torch.autograd.grad(plain.sum(), inputs), torch.autograd.grad(ahead.sum(), inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_factor_computed_ahead_is_the_one_that_is_used():
    f_t, f_s, y_s = draw("dual_w", grad=False)
    factor = factor_ahead(f_s, 0.3, y_s.shape[-1])
    assert not torch.allclose(krr_predict(f_t, f_s, y_s, 0.3, factor=2 * factor), krr_predict(f_t, f_s, y_s, 0.3))


def test_the_failure_of_a_factor_computed_ahead_is_reported():
    f_t, f_s, y_s = draw("dual_w", grad=False)
    factor = factor_ahead(0 * f_s, 0.0, y_s.shape[-1])
    assert krr_predict(f_t, f_s, y_s, 0.0, factor=factor).isnan().all()
    with pytest.raises(FailedFactorization, match=r"step 3: in factor_ahead .*m = 7, n = none, d = 11, lam = 0\)"):
        raise_if_failed(3)


def test_the_references_agree():
    f_t, f_s, y_s = draw("primal")
    assert relative(primal_fit_ref(f_s, y_s, 0.5), ridge_fit_ref(f_s, y_s, 0.5)) < 1e-12
    assert relative(f_t @ ridge_fit_ref(f_s, y_s, 0.5), krr_predict_ref(f_t, f_s, y_s, 0.5)) < 1e-12


@cases
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_a_ridge_relative_to_the_trace(way, batch, divided, detached):
    ridge = torch.tensor(0.02, dtype=F64, requires_grad=True)

    def with_trace(predict):
        def run(f_t, f_s, y_s, ridge):
            trace = (f_s * f_s).sum((-2, -1))
            trace = trace.detach() if detached else trace
            return predict(f_t, f_s, y_s, ridge * trace / (f_s.shape[-2] if divided else 1))

        return run

    _, predict_ref = references(way)
    assert_same_with_gradients(with_trace(krr_predict), with_trace(predict_ref), (*draw(way, batch), ridge))


def test_a_detached_trace_has_another_gradient():
    """That is, the gradient of lam does reach the features."""
    f_t, f_s, y_s = draw("dual_w")
    trace = (f_s * f_s).sum()
    free, held = (
        torch.autograd.grad(krr_predict(f_t, f_s, y_s, 0.02 * t).sum(), f_s)[0] for t in (trace, trace.detach())
    )
    assert relative(free, held) > 1e-3


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("way", SIZES)
def test_gradcheck(way, batch):
    lam = (0.1 + torch.rand(batch, dtype=F64)).requires_grad_()
    f_t, f_s, y_s = draw(way, batch)
    assert torch.autograd.gradcheck(krr_predict, (f_t, f_s, y_s, lam))
    assert torch.autograd.gradcheck(ridge_fit, (f_s, y_s, lam))


@pytest.mark.parametrize("way", SIZES)
def test_each_gradient_alone(way):
    """A gradient that is not asked for is skipped, and does not change the others."""
    lam = torch.tensor(0.3, dtype=F64, requires_grad=True)
    inputs = [*draw(way), lam]
    all_of_them = torch.autograd.grad(krr_predict(*inputs).square().sum(), inputs)
    for i, wanted in enumerate(all_of_them):
        alone = [x if i == j else x.detach() for j, x in enumerate(inputs)]
        assert torch.equal(torch.autograd.grad(krr_predict(*alone).square().sum(), inputs[i])[0], wanted)


@pytest.mark.parametrize("way", SIZES)
def test_differentiating_twice_raises(way):
    f_t, f_s, y_s = draw(way)
    lam = torch.tensor(0.3, dtype=F64, requires_grad=True)
    losses = {
        "krr_predict": krr_predict(f_t, f_s, y_s, lam).square().sum(),
        "ridge_fit": ridge_fit(f_s, y_s, lam).square().sum(),
        "gram": gram(f_s, f_t).square().sum(),
    }
    for op, loss in losses.items():
        (first,) = torch.autograd.grad(loss, f_s, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{op}_backward"):
            torch.autograd.grad(first.sum(), f_s)


# -------------------------------------------------------------------------------------------------- custom ops, compile


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("way", SIZES)
def test_opcheck(way, batch):
    f_t, f_s, y_s = draw(way, batch)
    lam = torch.full(batch, 0.3, dtype=F64, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for ones in (False, True):
        how = "fp64", "torch", ones
        given = factor_ahead(f_s, lam, y_s.shape[-1], ones=ones)
        for factor in (None, given):
            torch.library.opcheck(_krr_predict, (f_t, f_s, y_s, lam, factor, *how), test_utils=checks)
            torch.library.opcheck(_ridge_fit, (f_s, y_s, lam, factor, *how), test_utils=checks)
        torch.library.opcheck(_krr_predict, (f_t.detach(), f_s, y_s, lam.detach(), None, *how), test_utils=checks)
        torch.library.opcheck(_factor_ahead, (f_s.detach(), lam.detach(), 3, *how), test_utils=checks)
    for op in (_gram, _gram_pair):
        torch.library.opcheck(op, (f_s, f_t, "fp64", "torch"), test_utils=checks)
    torch.library.opcheck(_gram, (f_s, None, "fp64", "torch"), test_utils=checks)
    k = gram(f_s).detach()
    torch.library.opcheck(_spd_factor, (k, lam.detach(), "torch"), test_utils=checks)
    torch.library.opcheck(_spd_solve, (k.tril(), y_s.detach(), "torch"), test_utils=checks)


@pytest.mark.parametrize("way", SIZES)
def test_only_the_result_carries_a_gradient(way):
    """What the ops save for their backward is constant to autograd."""
    f_t, f_s, y_s = draw(way)
    lam = torch.tensor(0.3, dtype=F64)
    how = None, "fp64", "torch", False
    assert [x.requires_grad for x in _krr_predict(f_t, f_s, y_s, lam, *how)] == [True, False, False, False, False]
    assert [x.requires_grad for x in _ridge_fit(f_s, y_s, lam, *how)] == [True, False, False]


@pytest.mark.parametrize("way", SIZES)
def test_compiled_without_graph_breaks(way):
    f_t, f_s, y_s = draw(way, dtype=torch.float32)

    def loss(f_t, f_s, y_s):
        lam = 0.01 * (f_s * f_s).sum()
        pred, head = krr_predict(f_t, f_s, y_s, lam), ridge_fit(f_s, y_s, 0.1)
        return pred.square().mean() + head.square().mean() + gram(f_s).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(f_t, f_s, y_s)
    assert relative(compiled, loss(f_t, f_s, y_s)) < 1e-6
    found = torch.autograd.grad(compiled, (f_t, f_s, y_s))
    wanted = torch.autograd.grad(loss(f_t, f_s, y_s), (f_t, f_s, y_s))
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < 1e-6


# ------------------------------------------------------------------------------------------------------------ precision


def ill_conditioned(m, d, dtype=torch.float32):
    """Features whose Gram matrix has eigenvalues from 1 down to 1e-7 times the largest."""
    u, _ = torch.linalg.qr(torch.randn(m, m, dtype=F64))
    v, _ = torch.linalg.qr(torch.randn(d, m, dtype=F64))
    return (u * torch.logspace(0, -3.5, m, dtype=F64) @ v.mT).to(dtype)


@pytest.mark.parametrize("d", [60, 20])
def test_float32_inputs_are_computed_in_float64(d):
    m, n = 40, 15
    f_s = (ill_conditioned(m, d) if d >= m else ill_conditioned(d, m).mT).clone().requires_grad_()
    f_t, y_s = torch.randn(n, d), torch.randn(m, 3)
    lam = 1e-7

    f_exact = f_s.detach().double().requires_grad_()
    truth = krr_predict(f_t.double(), f_exact, y_s.double(), lam)
    (truth_grad,) = torch.autograd.grad(truth.square().sum(), f_exact)
    _, predict_ref = references("dual_w" if d >= m else "primal")
    assert relative(truth, predict_ref(f_t.double(), f_exact, y_s.double(), lam)) < 1e-7

    error, grad_error = {}, {}
    for precision in ("fp64", "fp32", "auto"):
        pred = krr_predict(f_t, f_s, y_s, lam, precision=precision)
        (grad,) = torch.autograd.grad(pred.square().sum(), f_s)
        assert pred.dtype == grad.dtype == torch.float32
        error[precision], grad_error[precision] = relative(pred, truth), relative(grad, truth_grad)
        head = ridge_fit(f_s, y_s, lam, precision=precision)
        assert head.dtype == torch.float32
    assert error["fp64"] < 1e-5
    assert grad_error["fp64"] < 1e-5
    assert error["auto"] == error["fp64"]
    assert error["fp32"] > 10 * error["fp64"]  # fp32 does mean fp32
    assert grad_error["fp32"] > 10 * grad_error["fp64"]


def test_float64_inputs_are_never_rounded():
    inputs = *draw("dual_w"), 0.1
    assert torch.equal(krr_predict(*inputs, precision="fp32"), krr_predict(*inputs, precision="fp64"))
    assert torch.equal(gram(inputs[0], precision="fp32"), gram(inputs[0], precision="fp64"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", SIZES)
def test_half_precision_inputs_are_upcast(way, dtype):
    f_t, f_s, y_s = draw(way, dtype=dtype)
    lam = torch.tensor(0.5, requires_grad=True)
    pred = krr_predict(f_t, f_s, y_s, lam)
    exact = krr_predict(f_t.double(), f_s.double(), y_s.double(), lam.double())
    assert pred.dtype == dtype
    assert torch.equal(pred, exact.to(dtype))  # one rounding, at the end
    assert torch.equal(gram(f_s), gram(f_s.double()).to(dtype))
    found = torch.autograd.grad(pred.sum(), (f_t, f_s, y_s, lam))
    wanted = torch.autograd.grad(exact.sum(), (f_t, f_s, y_s, lam))
    for a, b, x in zip(found, wanted, (f_t, f_s, y_s, lam), strict=True):
        assert a.dtype == x.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_residual_of_a_solve(dtype, batch):
    m, u = 100, 2.0**-53 if dtype == F64 else 2.0**-24
    f_s = ill_conditioned(m, 150, dtype).expand(*batch, m, 150)
    lam = torch.full(batch, 1e-6, dtype=dtype)
    y = torch.randn(*batch, m, 4, dtype=dtype)
    k = gram(f_s)
    factor, info = spd_factor(k, lam)
    x = spd_solve(factor, y)
    assert info.shape == batch
    assert info.dtype == torch.int32
    assert not info.any()
    assert torch.equal(factor, factor.tril())

    a = k.double() + 1e-6 * torch.eye(m, dtype=F64)
    residual = (a @ x.double() - y.double()).norm(dim=-2)
    scale = torch.linalg.matrix_norm(a, 2)[..., None] * x.double().norm(dim=-2) + y.double().norm(dim=-2)
    assert (residual <= 10 * m * u * scale).all()


def test_solve_equals_the_reference_and_leaves_its_input_alone():
    k = gram(torch.randn(2, 6, 9, dtype=F64))
    before, b = k.clone(), torch.randn(2, 6, 3, dtype=F64)
    lam = torch.tensor([0.1, 0.7], dtype=F64, requires_grad=True)
    k.requires_grad_()
    assert_same_with_gradients(
        lambda k, lam, b: spd_solve(spd_factor(0.5 * (k + k.mT), lam)[0], b),
        lambda k, lam, b: spd_solve_ref(0.5 * (k + k.mT), lam, b),
        (k, lam, b.requires_grad_()),
    )
    assert torch.equal(k, before)


@pytest.fixture
def matmul_settings():
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    legacy = torch.get_float32_matmul_precision()
    before = [backend.fp32_precision for backend in backends]
    yield backends
    torch.set_float32_matmul_precision(legacy)
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


@pytest.mark.parametrize("way", SIZES)
@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_matmul_precision_is_set_inside_and_restored(way, setting, matmul_settings, monkeypatch):
    f_t, f_s, y_s = draw(way, dtype=torch.float32)
    expected = krr_predict(f_t, f_s, y_s, 0.1, precision="fp32")
    expected_grads = torch.autograd.grad(expected.sum(), (f_t, f_s, y_s))

    torch.set_float32_matmul_precision(setting)
    outside = [backend.fp32_precision for backend in matmul_settings]
    inside, solve = [], kernels.krr.solve_

    def spy(*args):
        inside.append([backend.fp32_precision for backend in matmul_settings])
        return solve(*args)

    monkeypatch.setattr(kernels.krr, "solve_", spy)
    pred = krr_predict(f_t, f_s, y_s, 0.1, precision="fp32")
    grads = torch.autograd.grad(pred.sum(), (f_t, f_s, y_s))
    assert inside == [["ieee", "ieee"]] * 2  # forward and backward
    assert torch.get_float32_matmul_precision() == setting
    assert [backend.fp32_precision for backend in matmul_settings] == outside
    assert torch.equal(pred, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_matmul_precision_is_restored_after_an_error(matmul_settings):
    torch.set_float32_matmul_precision("high")
    with pytest.raises(ZeroDivisionError), exact_products(torch.device("cpu")):
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == "high"
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # set by the per-backend name, which the legacy one cannot read
    gram(torch.randn(3, 2), precision="fp32")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("way", SIZES)
def test_autocast_changes_nothing(way, precision):
    f_t, f_s, y_s = draw(way, dtype=torch.float32)

    def run():
        pred = krr_predict(f_t, f_s, y_s, 0.1, precision=precision)
        head = ridge_fit(f_s, y_s, 0.1, precision=precision)
        k = gram(f_t, f_s, precision=precision)
        return pred, head, k, *torch.autograd.grad(pred.sum() + head.sum() + k.sum(), (f_t, f_s, y_s))

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert (f_t @ f_s.mT).dtype == torch.bfloat16
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("Tesla P100-PCIE-16GB", (6, 0), "fp64"),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), "fp32"),
        ("Tesla V100-SXM2-32GB", (7, 0), "fp64"),
        ("Tesla T4", (7, 5), "fp32"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "fp64"),
        ("NVIDIA GeForce RTX 3090", (8, 6), "fp32"),
        ("NVIDIA L40S", (8, 9), "fp32"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "fp64"),
        ("NVIDIA H200", (9, 0), "fp64"),
        ("NVIDIA H20", (9, 0), "fp32"),
        ("NVIDIA H20-3e", (9, 0), "fp32"),
        ("NVIDIA B200", (10, 0), "fp64"),
        ("NVIDIA B300", (10, 3), "fp32"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "fp32"),
    ],
)
def test_auto_precision_of_gpus(name, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    assert resolve_precision("auto", "cuda") == expected
    assert resolve_precision("auto", torch.device("cuda", 0)) == expected
    assert resolve_precision("fp64", "cuda") == "fp64"
    assert resolve_precision("fp32", "cuda:0") == "fp32"
    assert f"float{expected[2:]}" in kernels.describe("auto", "cuda")


def test_precision_names():
    assert resolve_precision("auto", "cpu") == "fp64"
    assert resolve_precision("auto", "mps") == "fp32"
    assert resolve_precision("fp32", "cpu") == "fp32"
    assert kernels.describe("auto", "cpu") == "ridge: float64, torch backend (cpu, precision auto)"
    assert "float32" in kernels.describe("fp32", "cpu")
    for precision, device in (("double", "cpu"), ("fp64", "mps")):
        with pytest.raises(ValueError, match="precision"):
            resolve_precision(precision, device)


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("cause", ["nan", "inf", "negative lam"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("way", SIZES)
def test_a_bad_matrix_spoils_only_itself(way, precision, cause):
    f_t, f_s, y_s = draw(way, (3,), torch.float32, grad=False)
    lam = torch.full((3,), 0.1)
    bad_f_s, bad_lam = f_s.clone(), lam.clone()
    if cause == "negative lam":
        bad_lam[1] = -1000.0
    else:
        bad_f_s[1, 2, 3] = float(cause)

    def run(*inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        pred = krr_predict(*inputs, precision=precision)
        head = ridge_fit(*inputs[1:], precision=precision)
        return pred.detach(), head.detach(), *torch.autograd.grad(pred.sum() + head.sum(), inputs)

    found, expected = run(f_t, bad_f_s, y_s, bad_lam), run(f_t, f_s, y_s, lam)
    for a, b in zip(found, expected, strict=True):
        assert a[1].isnan().all()
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert b.isfinite().all()

    m, n, d, _ = SIZES[way]
    shown = "-1000" if cause == "negative lam" else "0.1"
    message = rf"step 77.*m = {m}, n = {n}, d = {d}, lam = {shown}\).*raise the ridge"
    with pytest.raises(FailedFactorization, match=message):
        raise_if_failed(77)
    raise_if_failed(78)  # cleared


def test_info_names_the_first_bad_pivot():
    k = torch.eye(5, dtype=F64).repeat(5, 1, 1)
    k[1, 3, 1] = math.nan
    k[2, 2, 2] = -1
    k[3, 1, 1] = math.inf
    k[4] = 0
    factor, info = spd_factor(k, 0)
    assert info.tolist() == [0, 4, 3, 2, 1]
    assert torch.equal(factor[0], torch.eye(5, dtype=F64))
    assert factor[1:].isnan().all()
    assert spd_factor(torch.zeros(3, 3), 0.0)[1].item() == 1
    both = torch.eye(5)
    both[0, 0], both[3, 3] = math.inf, -1  # LAPACK lets the first pass, and names the second
    assert spd_factor(both, 0.0)[1].item() == 1
    raise_if_failed(1)  # spd_factor hands info to its caller and records nothing


def test_the_first_failure_is_kept_until_it_is_read():
    ok, bad = torch.randn(4, 9, dtype=F64), torch.zeros(4, 9, dtype=F64)
    fit_bad = torch.zeros(3, 8, dtype=F64)

    krr_predict(ok, ok, ok, 1.0)
    raise_if_failed(1)
    krr_predict(torch.randn(6, 9, dtype=F64), bad, ok, 0.0)
    ridge_fit(fit_bad, fit_bad, torch.tensor(-7.0, dtype=F64))
    krr_predict(ok, ok, ok, 1.0)  # a good call does not wipe the note
    with pytest.raises(FailedFactorization, match=r"step 2: in krr_predict .*m = 4, n = 6, d = 9, lam = 0\)"):
        raise_if_failed(2)
    raise_if_failed(3)
    ridge_fit(fit_bad, fit_bad, torch.tensor(-0.25, dtype=F64))
    with pytest.raises(RuntimeError, match=r"step 4: in ridge_fit .*m = 3, n = none, d = 8, lam = -0.25\)"):
        raise_if_failed(4)


def test_the_ridge_named_is_that_of_the_failed_matrix():
    f_s, y_s = torch.randn(3, 4, 9, dtype=F64), torch.randn(3, 4, 1, dtype=F64)
    ridge_fit(f_s, y_s, torch.tensor([0.1, 0.2, -300.0], dtype=F64))
    with pytest.raises(FailedFactorization, match=r"lam = -300\)"):
        raise_if_failed(5)


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 17, 33, 65, 130])
def test_gram_is_exactly_symmetric(n, dtype):
    x = torch.randn(2, n, 37, dtype=F64).to(dtype)
    for precision in ("fp32", "fp64"):
        k = gram(x, precision=precision)
        assert k.dtype == dtype
        assert torch.equal(k, k.mT)
        assert relative(k, gram_ref(x.double())) < {F64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


def test_gram_mirrors_one_triangle(monkeypatch):
    """Also where the matrix product itself is not symmetric, as that of some BLAS and of a split sum."""
    x = torch.randn(6, 4, dtype=F64)
    exact, matmul = gram(x), torch.Tensor.__matmul__
    noise = 1e-3 * torch.randn(6, 6, dtype=F64)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: matmul(a, b) + noise)
    k = gram(x)
    assert not torch.equal(k, exact)
    assert torch.equal(k, k.mT)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 2)])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 7, 3), (33, 2, 17)])
def test_gram_values_and_gradients(batch, n, m, d):
    x, y = (torch.randn(*batch, rows, d, dtype=F64, requires_grad=True) for rows in (n, m))
    assert_same_with_gradients(gram, gram_ref, (x, y), bound=1e-13)
    assert_same_with_gradients(gram, gram_ref, (x,), bound=1e-13)
    assert torch.equal(
        torch.autograd.grad(gram(x, y.detach()).sum(), x)[0], torch.autograd.grad(gram(x, y).sum(), x)[0]
    )
    assert torch.equal(
        torch.autograd.grad(gram(x.detach(), y).sum(), y)[0], torch.autograd.grad(gram(x, y).sum(), y)[0]
    )


@pytest.mark.parametrize("batch", [(), (3,)])
def test_gram_pair_is_two_gram_matrices(batch):
    f_s, f_t = (torch.randn(*batch, rows, 17, dtype=F64, requires_grad=True) for rows in (5, 33))
    k_ss, k_ts = kernels.gram_pair(f_s, f_t)
    assert torch.equal(k_ss, k_ss.mT)
    weights = torch.randn_like(k_ss), torch.randn_like(k_ts)
    expected = gram_ref(f_s), gram_ref(f_t, f_s)
    for found, wanted in zip((k_ss, k_ts), expected, strict=True):
        assert relative(found, wanted) < 1e-14
    total = [sum((w * k).sum() for w, k in zip(weights, pair, strict=True)) for pair in ((k_ss, k_ts), expected)]
    for inputs in ((f_s, f_t), (f_s,), (f_t,)):
        found, wanted = (torch.autograd.grad(t, inputs, retain_graph=True) for t in total)
        assert all(relative(a, b) < 1e-13 for a, b in zip(found, wanted, strict=True))


def test_gram_of_nothing():
    assert gram(torch.zeros(0, 3)).shape == (0, 0)
    assert gram(torch.zeros(2, 0, 3), torch.zeros(2, 4, 3)).shape == (2, 0, 4)
    assert torch.equal(gram(torch.zeros(2, 0), torch.zeros(4, 0)), torch.zeros(2, 4))


@pytest.mark.parametrize("batch", [(), (3,), (0,)])
@pytest.mark.parametrize(("m", "d"), [(4, 7), (7, 4)])
@pytest.mark.parametrize(("n", "c"), [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_predict_gives_nothing(batch, m, d, n, c):
    f_t, f_s, y_s = (torch.randn(*batch, *shape, requires_grad=True) for shape in ((n, d), (m, d), (m, c)))
    pred, head = krr_predict(f_t, f_s, y_s, 0.1), ridge_fit(f_s, y_s, 0.1)
    assert pred.shape == (*batch, n, c)
    assert head.shape == (*batch, d, c)
    for grad, x in zip(torch.autograd.grad(pred.sum(), (f_t, f_s, y_s)), (f_t, f_s, y_s), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("m", [1, 2, 15, 17])
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("d", [1, 5, 33])
@pytest.mark.parametrize("c", [1, 3, 40])
def test_odd_shapes(m, n, d, c):
    f_t, f_s, y_s = (torch.randn(shape, dtype=F64, requires_grad=True) for shape in ((n, d), (m, d), (m, c)))
    lam = torch.tensor(0.5, dtype=F64, requires_grad=True)
    _, predict_ref = references(route(m, n, d, c))
    assert_same_with_gradients(krr_predict, predict_ref, (f_t, f_s, y_s, lam))


def inside_nan(x):
    """x as a strided view inside a buffer of NaN, and the buffer."""
    *batch, rows, columns = x.shape
    buffer = torch.full((*batch, 2 * rows + 3, 3 * columns + 2), math.nan, dtype=x.dtype)
    view = buffer[..., 1 : 1 + 2 * rows : 2, 2 : 2 + 3 * columns : 3]
    view.copy_(x)
    return view, buffer


@cases
def test_strided_views_inside_nan(way, batch):
    plain = draw(way, batch, grad=False)
    views, buffers = zip(*map(inside_nan, plain), strict=True)
    before = [buffer.clone() for buffer in buffers]
    lam = 0.1

    def run(*inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        pred, head, k, k_ss = krr_predict(*inputs, lam), ridge_fit(*inputs[1:], lam), gram(*inputs[:2]), gram(inputs[1])
        grads = torch.autograd.grad((pred.sum() + head.sum() + k.sum() + k_ss.square().sum()), inputs)
        return pred, head, k, k_ss, *grads

    for a, b in zip(run(*views), run(*plain), strict=True):
        assert relative(a, b) < 1e-12
    for buffer, copy in zip(buffers, before, strict=True):
        assert torch.equal(buffer.isnan(), copy.isnan())
        assert torch.equal(buffer.nan_to_num(), copy.nan_to_num())


def test_expanded_and_transposed_inputs():
    f_t, f_s, y_s = draw("dual_w", grad=False)
    expected = krr_predict(f_t, f_s, y_s, 0.1)
    batched = krr_predict(f_t.expand(3, *f_t.shape), f_s.expand(3, *f_s.shape), y_s.expand(3, *y_s.shape), 0.1)
    assert relative(batched, expected.expand(3, *expected.shape)) < 1e-13
    columns_first = (x.mT.contiguous().mT for x in (f_t, f_s, y_s))
    assert relative(krr_predict(*columns_first, 0.1), expected) < 1e-13


# ----------------------------------------------------------------------------------------------------------- validation

X = torch.randn(4, 3)
BATCHED = torch.randn(2, 4, 3)
Y = torch.randn(4, 2)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: gram(torch.randn(3))),
        ("x", lambda: gram(torch.ones(3, 3, dtype=torch.long))),
        ("x", lambda: gram([[1.0]])),
        ("y", lambda: gram(X, torch.randn(4, 5))),
        ("y", lambda: gram(X, X.double())),
        ("y", lambda: gram(BATCHED, X)),
        ("y", lambda: gram(X, X.to("meta"))),
        ("precision", lambda: gram(X, precision="tf32")),
        ("f_s", lambda: ridge_fit(torch.randn(3), Y, 0.1)),
        ("f_s", lambda: ridge_fit(torch.randn(0, 3), torch.randn(0, 2), 0.1)),
        ("f_s", lambda: ridge_fit(torch.randn(4, 0), Y, 0.1)),
        ("f_s", lambda: ridge_fit(X.long(), Y.long(), 0.1)),
        ("f_s", lambda: ridge_fit(X.to(torch.complex64), Y, 0.1)),
        ("y_s", lambda: ridge_fit(X, torch.randn(4), 0.1)),
        ("y_s", lambda: ridge_fit(X, torch.randn(5, 2), 0.1)),
        ("y_s", lambda: ridge_fit(BATCHED, Y, 0.1)),
        ("y_s", lambda: ridge_fit(X, Y.double(), 0.1)),
        ("y_s", lambda: ridge_fit(X, Y.long(), 0.1)),
        ("y_s", lambda: ridge_fit(X, Y.to("meta"), 0.1)),
        ("f_t", lambda: krr_predict(torch.randn(3), X, Y, 0.1)),
        ("f_t", lambda: krr_predict(torch.randn(5, 4), X, Y, 0.1)),
        ("f_t", lambda: krr_predict(BATCHED, X, Y, 0.1)),
        ("f_t", lambda: krr_predict(X.bfloat16(), X, Y, 0.1)),
        ("f_t", lambda: krr_predict(X.to("meta"), X, Y, 0.1)),
        ("f_s", lambda: krr_predict(X, torch.randn(0, 3), torch.randn(0, 2), 0.1)),
        ("y_s", lambda: krr_predict(X, X, torch.randn(3, 2), 0.1)),
        ("lam", lambda: krr_predict(X, X, Y, -1e-9)),
        ("lam", lambda: krr_predict(X, X, Y, math.nan)),
        ("lam", lambda: krr_predict(X, X, Y, math.inf)),
        ("lam", lambda: krr_predict(X, X, Y, "0.1")),
        ("lam", lambda: krr_predict(X, X, Y, torch.ones(1))),
        ("lam", lambda: krr_predict(BATCHED, BATCHED, BATCHED, torch.tensor(0.1))),
        ("lam", lambda: ridge_fit(BATCHED, BATCHED, torch.ones(3))),
        ("lam", lambda: ridge_fit(X, Y, torch.tensor(1))),
        ("lam", lambda: ridge_fit(X, Y, torch.tensor(0.1, device="meta"))),
        ("precision", lambda: krr_predict(X, X, Y, 0.1, precision="double")),
        ("precision", lambda: ridge_fit(X, Y, 0.1, precision="fp16")),
        ("backend", lambda: krr_predict(X, X, Y, 0.1, backend="cuda")),
        ("backend", lambda: ridge_fit(X, Y, 0.1, backend="")),
        ("backend", lambda: gram(X, backend="cublas")),
        ("backend", lambda: spd_factor(torch.eye(3), 0.1, backend="lapack")),
        ("factor", lambda: krr_predict(X, X, Y, 0.1, factor=torch.eye(4, dtype=F64))),
        ("factor", lambda: krr_predict(X, X, Y, 0.1, factor=torch.eye(3))),
        ("factor", lambda: ridge_fit(X, Y, 0.1, factor=torch.eye(3, dtype=F64, device="meta"))),
        ("f_t", lambda: kernels.gram_pair(X, torch.randn(3, 4))),
        ("f_s", lambda: factor_ahead(torch.randn(0, 3), 0.1, 2)),
        ("k", lambda: spd_factor(X, 0.1)),
        ("k", lambda: spd_factor(torch.eye(3).bfloat16(), 0.1)),
        ("lam", lambda: spd_factor(torch.eye(3), torch.ones(3))),
        ("factor", lambda: spd_solve(torch.ones(3), torch.ones(3, 1))),
        ("b", lambda: spd_solve(torch.eye(3), torch.ones(3))),
        ("b", lambda: spd_solve(torch.eye(3), torch.ones(4, 1))),
        ("b", lambda: spd_solve(torch.eye(3), torch.ones(3, 1, dtype=F64))),
    ],
)
def test_validation_names_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()


def test_numbers_and_tensors_are_the_same_ridge():
    f_t, f_s, y_s = draw("dual_w", (2,))
    expected = krr_predict(f_t, f_s, y_s, 2)
    assert torch.equal(krr_predict(f_t, f_s, y_s, 2.0), expected)
    assert torch.equal(krr_predict(f_t, f_s, y_s, torch.tensor([2.0, 2.0])), expected)  # float32, beside float64


def test_public_names():
    functions = [
        "gram",
        "gram_pair",
        "ridge_fit",
        "krr_predict",
        "factor_ahead",
        "spd_factor",
        "spd_solve",
        "nearest",
        "barlow_loss",
        "bn_stats",
    ]
    functions += ["resolve_precision", "describe"]
    assert sorted(kernels.__all__) == sorted([*functions, "raise_if_failed", "FailedFactorization"])
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


# --------------------------------------------------------------------------------------------------------------- routes


def test_routes_follow_the_cost_rule():
    for m in (1, 10, 100, 1000):
        for n in (0, 1, 100, 5000):
            for d in (1, 100, 101, 2048, 8193):
                for c in (0, 1, 10, 100, 512):
                    if d <= m:
                        expected = "primal"
                    else:
                        expected = "dual_w" if c * (m + n) * d < n * m * (d + c) else "dual_k"
                    assert route(m, n, d, c) == expected
    # the shapes of the methods: few classes, many classes, teacher features, fewer features than images
    assert route(100, 1024, 2049, 10) == "dual_w"
    assert route(100, 1024, 2048, 100) == "dual_k"
    assert route(100, 128, 8193, 512) == "dual_k"
    assert route(1000, 5000, 512, 10) == "primal"


@pytest.mark.parametrize(
    ("sizes", "way", "absent", "present"),
    [
        ((20, 30, 50, 3), "dual_w", {(20, 30), (30, 20), (50, 50)}, {(20, 20), (50, 3)}),
        ((20, 30, 50, 31), "dual_k", {(50, 31), (31, 50), (50, 50)}, {(30, 20), (20, 20)}),
        ((40, 30, 20, 3), "primal", {(40, 30), (30, 40), (40, 40)}, {(20, 20), (20, 3)}),
    ],
)
def test_what_each_route_forms(sizes, way, absent, present):
    """Read off the operands of every operation inside the ops, forward and backward."""
    m, n, d, c = sizes
    assert route(m, n, d, c) == way
    f_t, f_s, y_s = (torch.randn(shape, dtype=F64, requires_grad=True) for shape in ((n, d), (m, d), (m, c)))
    lam = torch.tensor(0.1, dtype=F64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as trace:
        krr_predict(f_t, f_s, y_s, lam).square().sum().backward()
    events = trace.events()
    operands = {tuple(shape) for event in events for shape in event.input_shapes if isinstance(shape, list)}
    assert not operands & absent
    assert present <= operands
    names = [event.name for event in events]
    assert names.count("aten::linalg_cholesky_ex") == 1  # one factor for forward and backward
    assert "aten::_local_scalar_dense" not in names  # nothing was read back to the host
    assert "aten::nonzero" not in names
    if way == "dual_w":  # an m × m matrix is the operand of no product: it is only factored and solved with
        products = [event for event in events if event.name in ("aten::mm", "aten::bmm", "aten::addmm")]
        assert all([m, m] not in event.input_shapes for event in products)


def test_ridge_fit_factors_once():
    f_s, y_s = torch.randn(9, 12, requires_grad=True), torch.randn(9, 2, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        ridge_fit(f_s, y_s, 0.1).square().sum().backward()
    names = [event.name for event in trace.events()]
    assert names.count("aten::linalg_cholesky_ex") == 1
    assert "aten::_local_scalar_dense" not in names
