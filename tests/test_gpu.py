"""What only a CUDA device can show of kernels/: no waiting, CUDA graphs, streams, Inductor, real sizes, memory errors.

The tests of test_triton.py, test_nearest.py, test_barlow.py and test_bn_stats.py run on the device too, at small sizes.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import barlow_loss, bn_stats, factor_ahead, gram_pair, krr_predict, nearest, ridge_fit
from kernels.bn_stats import bn_stats_ref
from kernels.gram import launch
from kernels.krr import krr_predict_ref, route
from kernels.solve import factor_, launch_factor, launch_pack, launch_solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("clean_record"),
]
F64 = torch.float64
# route: (m, n, d, c), at the size of real steps
SIZES = {"dual_w": (100, 1024, 2048, 10), "dual_k": (100, 1024, 8192, 512), "primal": (1000, 512, 256, 100)}
both = pytest.mark.parametrize("backend", ["torch", "triton"])
ways = pytest.mark.parametrize("way", SIZES)


def draw(way, dtype=torch.float32):
    """f_t, f_s, y_s, as a network's features are: not negative, half of them zero."""
    m, n, d, c = SIZES[way]
    assert route(m, n, d, c) == way
    f_t, f_s = (torch.randn(rows, d, device="cuda").relu().to(dtype) for rows in (n, m))
    return f_t, f_s.requires_grad_(), torch.randn(m, c, device="cuda").to(dtype).requires_grad_()


def step(f_t, f_s, y_s, backend, **kwargs):
    """Value and gradients of a loss, with the ridge relative to the trace."""
    lam = 1e-4 * (f_s.detach().square().sum() + len(f_s)) / len(f_s)
    pred = krr_predict(f_t, f_s, y_s, lam, ones=True, backend=backend, **kwargs)
    return pred, *torch.autograd.grad(pred.square().mean(), (f_s, y_s))


def layer(n=100, c=64, side=32, last=True, dtype=torch.float32):
    """x, which requires a gradient, weight, bias, mean and var of a BatchNorm."""
    x = torch.randn(n, c, side, side, device="cuda", dtype=dtype).mul_(2).add_(1)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    work = F64 if dtype == F64 else torch.float32
    weight, bias, mean, var = (torch.randn(c, device="cuda", dtype=work) for _ in range(4))
    return x, weight, bias, mean, var.square() + 0.5


def statistics_step(x, *vectors, backend, groups=1):
    """y, term and the gradient of x of a loss of both."""
    y, term = bn_stats(x, *vectors, 1e-5, groups=groups, backend=backend)
    return y, term, torch.autograd.grad(y.float().square().mean() + term.sum(), x)[0]


@both
@ways
def test_nothing_waits_for_the_device(way, backend):
    inputs = draw(way)
    z = torch.randn(2, 64, 300, device="cuda", requires_grad=True)
    norm = layer(4, 8, 8)

    def run():
        step(*inputs, backend)
        factor = factor_ahead(inputs[1], 1.0, inputs[2].shape[1], ones=True, backend=backend)
        step(*inputs, backend, factor=factor)
        ridge_fit(inputs[1], inputs[2], 1.0, backend=backend).sum().backward()
        gram_pair(inputs[1], inputs[0], backend=backend)[1].sum().backward()
        nearest(inputs[0], backend=backend)
        barlow_loss(z[0], z[1], 0.1, backend=backend).backward()
        statistics_step(*norm, backend=backend, groups=2)

    run()  # compiles, and allocates the record of failures
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ahead", [False, True])
@both
@ways
def test_a_cuda_graph_replays_the_step(way, backend, ahead):
    """Captured on one set of inputs and replayed on another: the same bits as without a graph."""
    f_t, f_s, y_s = draw(way)

    def run():
        lam = 1e-4 * (f_s.detach().square().sum() + len(f_s)) / len(f_s)
        how = dict(ones=True, backend=backend)
        factor = factor_ahead(f_s, lam, y_s.shape[1], **how) if ahead else None
        pred = krr_predict(f_t, f_s, y_s, lam, factor=factor, **how)
        return pred, *torch.autograd.grad(pred.square().mean(), (f_s, y_s))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x in (f_t, f_s, y_s):
            x.copy_(torch.randn_like(x).relu())
    graph.replay()
    expected = run()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@both
@ways
def test_the_side_stream_changes_no_bit(way, backend):
    """Under load on the main stream, with memory that is freed and used again at once."""
    f_t, f_s, y_s = draw(way)
    lam = 1e-4 * (f_s.detach().square().sum() + len(f_s)) / len(f_s)
    factor = factor_ahead(f_s, lam, y_s.shape[1], ones=True, backend=backend)
    torch.cuda.synchronize()
    expected = step(f_t, f_s, y_s, backend, factor=factor)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        lam = 1e-4 * (f_s.detach().square().sum() + len(f_s)) / len(f_s)
        factor = factor_ahead(f_s, lam, y_s.shape[1], ones=True, backend=backend)
        del lam
        for _ in range(3):
            busy = (busy @ busy).tanh()
            torch.full((1000, 1000), torch.nan, device="cuda")  # where freed memory of the factorisation may lie
        found = step(f_t, f_s, y_s, backend, factor=factor)
        del factor
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@both
@ways
def test_inductor_takes_the_step_whole(way, backend):
    inputs = draw(way)

    def loss(f_t, f_s, y_s):
        lam = 1e-4 * f_s.square().sum() / len(f_s)
        return krr_predict(f_t, f_s, y_s, lam, ones=True, backend=backend).square().mean()

    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True)(*inputs)
    expected = loss(*inputs)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(value, inputs[1:]), torch.autograd.grad(expected, inputs[1:]), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@ways
def test_real_sizes_against_float64(way):
    """Both backends, forward and backward, as near to the naive float64 formula as float64 with float32 inputs is."""
    f_t, f_s, y_s = draw(way)
    wide = [x.detach().double().requires_grad_() for x in (f_t, f_s, y_s)]
    ones = [torch.cat([x, x.new_ones(len(x), 1)], 1) for x in wide[:2]]
    lam = 1e-4 * (wide[1].detach().square().sum() + len(f_s)) / len(f_s)
    pred = krr_predict_ref(*ones, wide[2], lam)
    expected = pred, *torch.autograd.grad(pred.square().mean(), wide[1:])
    for backend in ("torch", "triton"):
        for found, wanted in zip(step(f_t, f_s, y_s, backend, precision="fp64"), expected, strict=True):
            assert (found - wanted).norm() <= 1e-6 * wanted.norm(), backend


@pytest.mark.parametrize(
    ("mode", "dtype", "unit"),
    [
        ("fp64", torch.float32, 2**-53),
        ("tf32x3", torch.float32, 2**-24),
        ("ieee", torch.float32, 2**-24),
        ("native", torch.bfloat16, 2**-24),
        ("native", torch.float16, 2**-24),
    ],
)
@pytest.mark.parametrize(("m", "n", "d"), [(100, 1024, 2048), (1000, 1024, 8192), (968, 999, 8193), (130, 70, 999)])
def test_gram_at_real_sizes(mode, dtype, unit, m, n, d):
    """Error at most twice that of the library's own product, plus two roundings of the size; twice the same bits.

    In float64 there is no better product to compare with: 4 sqrt(d) roundings.
    """
    roundings = 4 * d**0.5 if mode == "fp64" else 2
    f_s, f_t = (torch.randn(rows, d, device="cuda").to(dtype) for rows in (m, n))
    work = F64 if mode == "fp64" else torch.float32
    for _ in range(2):  # fresh inputs: a race shows up as a moving error
        f_s, f_t = torch.roll(f_s, 1, 0), torch.roll(f_t, 1, 1)
        k_ss, k_ts = launch(f_s, f_t, symmetric=True, mode=mode)
        again = launch(f_s, f_t, symmetric=True, mode=mode)
        assert torch.equal(k_ss, again[0]) and torch.equal(k_ts, again[1])
        assert torch.equal(k_ss, k_ss.mT)
        for found, x, y in ((k_ss, f_s, f_s), (k_ts, f_t, f_s)):
            exact, size = x.double() @ y.double().mT, x.double().abs() @ y.double().abs().mT
            library = (x.to(work) @ y.to(work).mT).double()
            error, theirs = ((k.double() - exact).abs().max() for k in (found, library))
            assert error <= 2 * theirs + roundings * unit * size.max()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(
    ("batch", "m", "c"), [(1, 100, 10), (20, 128, 100), (4, 208, 512), (1, 1000, 100), (2, 2000, 10)]
)
def test_solves_at_real_sizes(batch, m, c, dtype):
    """The residual of every column, and the same bits twice, where one program stores what another thread loads."""
    unit = 2**-53 if dtype == F64 else 2**-24
    x = torch.randn(batch, m, 2 * m, device="cuda", dtype=dtype)
    k, lam, b = (
        x @ x.mT,
        torch.rand(batch, device="cuda", dtype=dtype),
        torch.randn(batch, m, c, device="cuda", dtype=dtype),
    )
    factors = [factor_(k.clone(), lam)[0].contiguous() for _ in range(2)]
    results = [launch_solve(launch_pack(factor), b) for factor in factors]
    if m <= 208:
        factors += [launch_factor(k, lam)[0] for _ in range(2)]
        results += [launch_solve(factor, b) for factor in factors[2:]]
        assert torch.equal(factors[2], factors[3])
    a = k.double() + lam.double()[:, None, None] * torch.eye(m, device="cuda", dtype=F64)
    norm = torch.linalg.matrix_norm(a, 2)[:, None]
    for found, again in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(found, again)
        rest = (a @ found.double() - b.double()).norm(dim=1)
        assert (rest <= 10 * m * unit * (norm * found.double().norm(dim=1) + b.double().norm(dim=1))).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("n", "c", "side", "groups"), [(100, 64, 32, 1), (500, 512, 4, 5), (20, 64, 112, 2)])
def test_statistics_at_real_sizes(n, c, side, groups, last, dtype):
    """Both backends against the naive float64 formula; twice the same bits, as many programs add up the sums."""
    x, *vectors = layer(n, c, side, last, dtype)
    d_y, d_term = torch.randn_like(x), torch.randn(groups, device="cuda", dtype=vectors[0].dtype)
    wide = [v.detach().double() for v in (x, *vectors)]
    y, term = bn_stats_ref(wide[0].requires_grad_(), *wide[1:], 1e-5, groups=groups)
    expected = y, term, torch.autograd.grad([y, term], wide[0], [d_y.double(), d_term.double()])[0]
    rounded = {F64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for backend in ("torch", "triton"):
        runs = []
        for _ in range(2):
            y, term = bn_stats(x, *vectors, 1e-5, groups=groups, backend=backend)
            runs.append((y, term, torch.autograd.grad([y, term], x, [d_y, d_term])[0]))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        for found, wanted, bound in zip(runs[0], expected, (rounded, min(rounded, 1e-5), rounded), strict=True):
            assert (found.double() - wanted).norm() <= bound * wanted.norm(), backend


@both
def test_a_cuda_graph_replays_the_statistics(backend):
    inputs = layer(20, 64, 16)
    run = lambda: statistics_step(*inputs, backend=backend, groups=2)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@both
def test_inductor_takes_the_statistics_whole(backend):
    inputs = layer(20, 64, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *v: bn_stats(*v, 1e-5, groups=2, backend=backend), fullgraph=True)
    for found, wanted in zip(compiled(*inputs), bn_stats(*inputs, 1e-5, groups=2, backend=backend), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    y, term = compiled(*inputs)
    d_x = torch.autograd.grad(y.square().mean() + term.sum(), inputs[0])[0]
    wanted = statistics_step(*inputs, backend=backend, groups=2)[2]
    assert (d_x - wanted).norm() <= 1e-5 * wanted.norm()


SANITIZER = shutil.which("compute-sanitizer") or next(
    iter(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
)
CHECKED = """
import torch
from kernels import barlow_loss, bn_stats, krr_predict, nearest
torch.manual_seed(0)
for m, n, d, c in ((33, 70, 130, 3), (17, 20, 65, 40), (100, 7, 33, 5)):
    f_t, f_s = (torch.randn(rows, d, device="cuda", requires_grad=True) for rows in (n, m))
    for precision in ("fp64", "fp32", "ieee"):
        for x, y in ((f_t, f_s), (f_t.bfloat16(), f_s.bfloat16())):
            target = torch.randn(m, c, device="cuda").to(x.dtype)
            krr_predict(x, y, target, 1.0, ones=True, precision=precision, backend="triton").sum().backward()
    nearest(f_t, backend="triton")
    barlow_loss(f_t, torch.roll(f_t, 1, 0), 0.1, backend="triton").backward()
for shape in ((6, 3, 5, 7), (10, 70, 7, 7), (4, 64, 16, 16)):
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
            vectors = torch.rand(4, shape[1], device="cuda") + 0.5
            y, term = bn_stats(x, *vectors, 1e-5, groups=2, backend="triton")
            (y.float().sum() + term.sum()).backward()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", CHECKED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
