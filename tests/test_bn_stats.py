"""kernels/bn_stats.py: both backends and layouts against the loop, the closed form, its rounding, what it keeps."""

import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from kernels import bn_stats
from kernels.backend import INTERPRETED, triton

module = importlib.import_module("kernels.bn_stats")  # the package exports a function of this name
bn_stats_ref, Traced = module.bn_stats_ref, module.Traced

F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
U = 2.0**-24
EPS = 1e-3  # large enough to be seen where it is missing

SHAPES = [(6, 3, 2, 3), (2, 1, 3, 3), (4, 3, 1, 1), (3, 5, 1, 5)]
no_triton = pytest.mark.skipif(triton is None or not (INTERPRETED or DEVICE == "cuda"), reason="Triton cannot run here")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=no_triton)])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors here are tiny; and nothing depends on the order of the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def to_layout(x, last):
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def draw(shape, last=True, dtype=F64, affine=True):
    """x that requires gradients; weight, bias, mean, var: of channels of different means and sizes."""
    c = shape[1]
    scale, shift = 0.5 + torch.rand(c, 1, 1, dtype=F64), torch.randn(c, 1, 1, dtype=F64)
    x = to_layout((torch.randn(shape, dtype=F64) * scale + shift).to(DEVICE, dtype), last).requires_grad_()
    work = F64 if dtype == F64 else torch.float32
    weight, bias, mean, var = (v.to(DEVICE, work) for v in torch.randn(4, c, dtype=F64))
    return (x, weight, bias, mean, var.square() + 0.5) if affine else (x, None, None, mean, var.square() + 0.5)


def loop(x, weight, bias, mean, var, groups):
    """y as nested lists, and the terms, of (N, C, H, W) nested lists."""
    each, channels = len(x) // groups, len(x[0])
    weight, bias = weight or [1.0] * channels, bias or [0.0] * channels
    y = [
        [
            [[weight[c] * (v - mean[c]) / math.sqrt(var[c] + EPS) + bias[c] for v in row] for row in image[c]]
            for c in range(channels)
        ]
        for image in x
    ]
    terms = []
    for group in range(groups):
        m_part = v_part = 0.0
        for c in range(channels):
            values = [v for image in x[group * each : (group + 1) * each] for row in image[c] for v in row]
            m = sum(values) / len(values)
            v = sum((value - m) ** 2 for value in values) / len(values)
            m_part, v_part = m_part + (mean[c] - m) ** 2, v_part + (var[c] - v) ** 2
        terms.append(math.sqrt(m_part) + math.sqrt(v_part))
    return y, terms


def run(inputs, d_y, d_term, **how):
    """y, term and the gradient of x, detached."""
    y, term = bn_stats(*inputs, EPS, **how)
    (d_x,) = torch.autograd.grad([y, term], inputs[0], [d_y, d_term])
    return y.detach(), term.detach(), d_x


def upstream(inputs, groups=1):
    x = inputs[0]
    return torch.randn_like(x), torch.randn(groups, device=DEVICE, dtype=inputs[3].dtype)


def relative(a, b):
    return ((a.to(F64) - b.to(F64)).norm() / b.to(F64).norm()).item()


def cases(shape):
    """groups, and whether there are a weight and a bias."""
    return [(1, True)] + [(groups, False) for groups in (2, 3) if shape[0] % groups == 0]


# ------------------------------------------------------------------------------------------------- values and gradients


@backends
@layouts
@shapes
def test_values_are_those_of_the_loop(shape, last, backend):
    """A hundred float64 roundings at most; 1e-12 is thousands."""
    for groups, affine in cases(shape):
        inputs = draw(shape, last, affine=affine)
        expected_y, expected = loop(*(v if v is None else v.tolist() for v in inputs), groups)
        y, term = bn_stats(*inputs, EPS, groups=groups, backend=backend)
        assert term.tolist() == pytest.approx(expected, rel=1e-12)
        assert (y.cpu() - torch.tensor(expected_y, dtype=F64)).abs().max() < 1e-12
        assert (y.dtype, term.dtype, y.stride()) == (F64, F64, inputs[0].stride())
        for other in (bn_stats_ref(*inputs, EPS, groups=groups), Traced.apply(*inputs, EPS, groups)):
            assert other[1].tolist() == pytest.approx(expected, rel=1e-12)
            assert (other[0] - y).abs().max() < 1e-12


@backends
@layouts
@shapes
def test_gradients_are_those_of_autograd(shape, last, backend):
    for groups, affine in cases(shape):
        inputs = draw(shape, last, affine=affine)
        d_y, d_term = upstream(inputs, groups)
        for scale_y, scale_term in ((1, 1), (0, 1), (1, 0)) if backend == "torch" else ((1, 1),):
            given = scale_y * d_y, scale_term * d_term
            wanted = torch.autograd.grad(bn_stats_ref(*inputs, EPS, groups=groups), inputs[0], given)[0]
            found = run(inputs, *given, groups=groups, backend=backend)[2]
            assert (found - wanted).norm() <= 1e-12 * max(1, wanted.norm())
            traced = torch.autograd.grad(Traced.apply(*inputs, EPS, groups), inputs[0], given)[0]
            assert (traced - wanted).norm() <= 1e-12 * max(1, wanted.norm())


@backends
@layouts
def test_gradcheck(last, backend):
    x, *vectors = draw((2, 2, 2, 1), last)
    assert torch.autograd.gradcheck(lambda x: bn_stats(x, *vectors, EPS, groups=2, backend=backend), (x,))


@backends
def test_one_output_alone(backend):
    """The gradient of the other one never comes: it is zero."""
    inputs = draw((6, 3, 2, 3))
    d_y, d_term = upstream(inputs, 2)
    y, term = bn_stats(*inputs, EPS, groups=2, backend=backend)
    whole, of_term, of_y = (torch.autograd.grad(*pair, retain_graph=True) for pair in (
        ([y, term], inputs[0], [d_y, d_term]), (term, inputs[0], d_term), (y, inputs[0], d_y)
    ))  # fmt: skip
    assert relative(of_term[0] + of_y[0], whole[0]) < 1e-14
    assert relative(of_y[0], torch.autograd.grad(F.batch_norm(*inputs[:1], *inputs[3:], *inputs[1:3], eps=EPS),
                                                 inputs[0], d_y)[0]) < 1e-14  # fmt: skip


@backends
@layouts
def test_groups_are_apart(last, backend):
    """Each group alone gives the same; a NaN in one changes no bit of the others."""
    inputs = draw((6, 3, 2, 3), last, torch.float32)
    x, *vectors = inputs
    d_y, d_term = upstream(inputs, 3)
    y, term, d_x = run(inputs, d_y, d_term, groups=3, backend=backend)
    for g in range(3):
        part = x[2 * g : 2 * g + 2].detach().requires_grad_()
        alone = run((part, *vectors), d_y[2 * g : 2 * g + 2], d_term[g : g + 1], backend=backend)
        for a, b in zip(alone, (y[2 * g : 2 * g + 2], term[g : g + 1], d_x[2 * g : 2 * g + 2]), strict=True):
            assert relative(a, b) < 4 * U
    with torch.no_grad():
        x[3, 1, 0, 2] = math.nan
    again = run(inputs, d_y, d_term, groups=3, backend=backend)
    assert again[1].isnan().tolist() == [False, True, False]
    assert again[2][2:4].isnan().any()
    others = [0, 1, 4, 5]
    assert torch.equal(again[0][others], y[others]) and torch.equal(again[2][others], d_x[others])
    assert torch.equal(again[1][[0, 2]], term[[0, 2]])


def exact(last, dtype=F64):
    """Channels with mean 1 and variance 4, exactly."""
    values = torch.tensor([-1.0, 3.0], dtype=dtype, device=DEVICE)
    return to_layout(values.repeat(6).view(3, 1, 2, 2).expand(3, 5, 2, 2), last).requires_grad_()


@backends
@layouts
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_norm_of_zero_has_no_gradient(last, dtype, backend):
    """Where m = μ, v = σ², or both: term is the other norm, and the gradient the other part."""
    x = exact(last, dtype)
    right_mean, right_var = torch.ones(5, device=DEVICE, dtype=dtype), torch.full((5,), 4.0, device=DEVICE, dtype=dtype)
    d_y = torch.randn_like(x)
    one = torch.ones(1, device=DEVICE, dtype=dtype)
    for d_mean, d_var in ((0.0, 0.0), (0.5, 0.0), (0.0, -3.0)):
        mean, var = right_mean + d_mean, right_var + d_var
        with torch.no_grad():
            sigma = (var + EPS).rsqrt()[:, None, None]
            wanted = sigma * d_y - math.copysign(5**-0.5, d_mean) / 12 * (d_mean != 0)
            wanted += 2 * math.copysign(5**-0.5, -d_var) / 12 * (x - 1) * (d_var != 0)
        inputs = x, None, None, mean, var, EPS
        for y, term in (bn_stats(*inputs, backend=backend), Traced.apply(*inputs, 1)):
            assert term.item() == pytest.approx(5**0.5 * (abs(d_mean) + abs(d_var)), rel=1e-6)
            assert term.item() == 0 or d_mean or d_var
            found = torch.autograd.grad([y, term], x, [d_y, one])[0]
            assert (found - wanted).abs().max() < 1e-5


@backends
def test_weights_and_statistics_are_constants(backend):
    x, *vectors = draw((6, 3, 2, 3))
    vectors = [v.requires_grad_() for v in vectors]
    y, term = bn_stats(x, *vectors, EPS, backend=backend)
    (y.sum() + term.sum()).backward()
    assert x.grad is not None and all(v.grad is None for v in vectors)
    assert not any(part.requires_grad for part in bn_stats(x.detach(), *vectors, EPS, backend=backend))


def test_differentiating_twice_raises():
    x, *vectors = draw((6, 3, 2, 3))
    (first,) = torch.autograd.grad(bn_stats(x, *vectors, EPS)[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bn_stats_backward"):
        torch.autograd.grad(first.square().sum(), x)


# --------------------------------------------------------------------------------------------------- layouts and memory


@backends
@layouts
def test_incoming_gradients_in_any_layout(last, backend):
    inputs = draw((6, 3, 2, 3), last)
    d_y, d_term = upstream(inputs, 2)
    expanded = torch.randn(6, 3, 1, 1, dtype=F64, device=DEVICE).expand(6, 3, 2, 3)  # as of a mean over pixels
    for given in (d_y, expanded):
        wanted = run(inputs, to_layout(given, last), d_term, groups=2, backend=backend)
        for other in (to_layout(given, not last), given):
            found = run(inputs, other, d_term, groups=2, backend=backend)
            assert torch.equal(found[2], wanted[2]) and found[2].stride() == inputs[0].stride()
    wanted = run(inputs, d_y, torch.ones_like(d_term), groups=2, backend=backend)
    for ones in (d_term.new_ones(1).expand(2), d_term.new_ones(4)[::2]):  # the first as that of a sum is
        assert torch.equal(run(inputs, d_y, ones, groups=2, backend=backend)[2], wanted[2])
    strided = [torch.stack([v, -v], 1)[:, 0] for v in inputs[1:]]
    found = run((inputs[0], *strided), d_y, torch.ones_like(d_term), groups=2, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@backends
def test_strided_images_inside_nan(backend):
    inputs = draw((6, 3, 2, 3), False)
    buffer = torch.full((6, 2, 7, 9), math.nan, dtype=F64, device=DEVICE)
    view = buffer[:, :, 1:7:2, 1:7:2].permute(0, 3, 1, 2)
    view.copy_(inputs[0].detach())
    given = upstream(inputs, 2)
    for a, b in zip(run((view.requires_grad_(), *inputs[1:]), *given, groups=2, backend=backend),
                    run(inputs, *given, groups=2, backend=backend), strict=True):  # fmt: skip
        assert relative(a, b) < 1e-14
    assert bn_stats(view, *inputs[1:], EPS, backend=backend)[0].is_contiguous()


@backends
@layouts
def test_what_is_kept_for_the_backward_pass(last, backend):
    """x itself, and vectors over the channels."""
    x, *vectors = draw((6, 3, 2, 3), last, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        bn_stats(x, *vectors, EPS, groups=2, backend=backend)
    large = [v for v in kept if v.numel() > 6]
    assert [v.data_ptr() for v in large] == [x.data_ptr()]
    assert len(kept) <= 6


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU")
def test_the_cpu_works_on_pieces_that_fit_its_cache(monkeypatch):
    x, *vectors = draw((6, 3, 2, 3))
    given = upstream((x, *vectors), 2)
    expected = run((x, *vectors), *given, groups=2)
    for limit, images in ((1, 1), (35, 1), (36, 2), (10**6, 3)):
        monkeypatch.setattr(module, "CACHED", limit)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as trace:
            found = run((x, *vectors), *given, groups=2)
        squares = [event.input_shapes[0][0] for event in trace.events() if event.name == "aten::square_"]
        assert max(squares) == images and sum(squares) == 6
        assert all(relative(a, b) < 1e-13 for a, b in zip(found, expected, strict=True))


# -------------------------------------------------------------------------------------------------- custom ops, compile


@backends
@layouts
def test_opcheck(last, backend):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for dtype, shape, affine in ((F64, (6, 3, 2, 3), True), (torch.bfloat16, (2, 3, 2, 2), False),
                                 (torch.float32, (2, 1, 3, 3), True), (torch.float32, (4, 3, 1, 1), True)):  # fmt: skip
        inputs = draw(shape, last, dtype, affine)
        torch.library.opcheck(module._bn_stats, (*inputs, EPS, 2, backend == "triton"), test_utils=checks)


@backends
@layouts
def test_opcheck_of_the_backward(last, backend):
    """Shapes, dtypes and strides of its result are what its fake says."""
    for dtype, shape in ((F64, (6, 3, 2, 3)), (torch.bfloat16, (6, 3, 2, 3)), (torch.float32, (2, 1, 3, 3)),
                         (torch.float32, (4, 3, 1, 1))):  # fmt: skip
        x, weight, bias, mean, var = draw(shape, last, dtype)
        x = x.detach()
        _, term, offset, slope = module._bn_stats(x, weight, bias, mean, var, EPS, 2, backend == "triton")
        for d_y in (x, to_layout(x, not last)):
            inputs = d_y, term, x, weight, mean, var, offset, slope, EPS, backend == "triton"
            torch.library.opcheck(module._bn_stats_backward, inputs, test_utils=("test_schema", "test_faketensor"))
            d_x = module._bn_stats_backward(*inputs)
            assert (d_x.dtype, d_x.stride()) == (dtype, torch.empty_like(x).stride())  # opcheck does not look


@pytest.mark.parametrize("backend", ["auto", "torch", pytest.param("triton", marks=no_triton)])
@layouts
def test_compiled_without_graph_breaks(last, backend):
    """As plain operations, which Inductor can fuse; with the kernel as one node of it."""
    inputs = draw((6, 3, 2, 3), last, torch.float32)
    given = upstream(inputs, 2)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def call(*inputs):
        return bn_stats(*inputs, EPS, groups=2, backend=backend)

    torch._dynamo.reset()
    found = torch.compile(call, fullgraph=True, backend=keep)(*inputs)
    assert any("bn_stats" in name for name in graphs[0]) == (backend == "triton")
    torch._dynamo.reset()
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    d_x = torch.autograd.grad(found, inputs[0], given)[0]
    for a, b in zip((*found, d_x), run(inputs, *given, groups=2, backend=backend), strict=True):
        assert relative(a, b) < 1e-5
    assert found[0].stride() == d_x.stride() == inputs[0].stride()


@pytest.mark.slow
@layouts
def test_inductor_computes_the_same(last):
    inputs = draw((6, 3, 2, 3), last, torch.float32)
    given = upstream(inputs, 2)

    def call(*inputs):
        y, term = bn_stats(*inputs, EPS, groups=2)
        return y.relu(), term

    torch._dynamo.reset()
    found, wanted = torch.compile(call, fullgraph=True)(*inputs), call(*inputs)
    gradients = [torch.autograd.grad(outputs, inputs[0], given)[0] for outputs in (found, wanted)]
    for a, b in (*zip(found, wanted, strict=True), gradients):
        assert relative(a, b) < 1e-5


# ------------------------------------------------------------------------------------------------------------ precision


@layouts
def test_y_is_to_the_bit_what_the_layer_gives(last):
    """On the torch backend; so the network computes the same as without the statistics."""
    for dtype, affine in itertools.product((F64, torch.float32, torch.bfloat16), (True, False)):
        x, weight, bias, mean, var = draw((6, 3, 2, 3), last, dtype, affine)
        expected = F.batch_norm(x, mean, var, weight, bias, eps=EPS)
        assert torch.equal(bn_stats(x, weight, bias, mean, var, EPS, backend="torch")[0], expected)


@backends
@layouts
def test_float32_against_float64_far_from_zero(last, backend):
    """A running mean of 4096, to which x is near: the sums are those of small differences.

    x, μ and hence x − μ are exact. Bound: 30 u, tens of roundings; squares of x itself would be off by 4096² u, a
    hundred per cent and more.
    """
    x, weight, bias, mean, var = draw((6, 3, 2, 3), last, torch.float32)
    mean = mean + 4096
    x = (x.detach() + 4096).requires_grad_()
    inputs = x, weight, bias, mean, var
    given = torch.zeros_like(x), torch.ones(2, device=DEVICE)
    _, term, d_x = run(inputs, *given, groups=2, backend=backend)
    wide = [v.detach().double() for v in inputs]
    _, exact_term, exact_d_x = run((wide[0].requires_grad_(), *wide[1:]), *(v.double() for v in given), groups=2,
                                   backend="torch")  # fmt: skip
    assert relative(term, exact_term) < 30 * U
    # on torch slope · x and slope · μ are subtracted, with μ = 4096: as a BatchNorm's own backward pass would
    assert relative(d_x, exact_d_x) < (30 * U if backend == "triton" else 4096 * 4 * U)


def test_many_entries_in_float32():
    """100 maps of 32 px of one layer: the error does not grow with the number that are added up."""
    x = to_layout(torch.randn(100, 4, 32, 32, device=DEVICE) + 0.5, True)
    vectors = torch.zeros(4, device=DEVICE), torch.full((4,), 2.0, device=DEVICE)
    term = bn_stats(x, None, None, *vectors, EPS, backend="torch")[1]
    expected = bn_stats_ref(x.double(), None, None, *(v.double() for v in vectors), EPS)[1]
    assert relative(term, expected) < 4 * U


@backends
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(last, dtype, backend):
    """Inside float32: the term is that of the rounded images, and y and the gradient are rounded once."""
    inputs = draw((6, 3, 2, 3), last, dtype)
    d_y, d_term = upstream(inputs, 2)
    y, term, d_x = run(inputs, d_y, d_term, groups=2, backend=backend)
    assert (y.dtype, term.dtype, d_x.dtype) == (dtype, torch.float32, dtype)
    wide = [v.detach().double() for v in inputs]
    exact = run((wide[0].requires_grad_(), *wide[1:]), d_y.double(), d_term.double(), groups=2, backend="torch")
    assert relative(term, exact[1]) < 30 * U
    assert relative(Traced.apply(*inputs, EPS, 2)[1], exact[1]) < 30 * U
    unit = torch.finfo(dtype).eps / 2
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        unit *= 2  # the interpreter of Triton 3.6 cuts off where a GPU rounds
    for found, wanted in ((y, exact[0]), (d_x, exact[2])):
        tiny = 1e-5 * wanted.abs().max()  # sums that cancel have the error of their parts
        assert ((found.double() - wanted).abs() <= 1.01 * unit * wanted.abs() + tiny).all()


@backends
def test_autocast_changes_nothing(backend):
    inputs = draw((6, 3, 2, 3), True, torch.float32)
    given = upstream(inputs)
    expected = run(inputs, *given, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(inputs, *given, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -------------------------------------------------------------------------------------------------------------- kernels


@no_triton
@pytest.mark.parametrize(("tile", "split"), [((2, 4), 1), ((2, 2), 3), ((4, 16), 2), ((1, 8), 5)])
@layouts
def test_tiles_and_splits(last, tile, split):
    """Shares of unequal size, masked tiles, several of them over channels and pixels: every entry counts once."""
    inputs = draw((10, 3, 3, 2), last)
    d_y, d_term = upstream(inputs, 2)
    y, term, offset, slope = module.launch(*inputs, EPS, 2, tile=tile, split=split)
    _, weight, _, mean, var = inputs
    d_x = module.launch_backward(d_y, d_term, inputs[0], weight, mean, var, offset, slope, EPS, tile=tile)
    for a, b in zip((y, term, d_x), run(inputs, d_y, d_term, groups=2, backend="torch"), strict=True):
        assert relative(a, b) < 1e-13


@no_triton
@layouts
def test_kernels_write_every_entry_and_no_other(last, monkeypatch):
    """All memory they get is NaN, and lies within NaN, which is still there afterwards; so do the inputs."""
    buffers = []

    def within_nan(shape, dtype, strides=None):
        n = math.prod(shape)
        buffer = torch.full((n + 64,), math.nan, dtype=dtype, device=DEVICE)
        buffers.append((buffer, n))
        inside = buffer[32 : 32 + n]
        return inside.view(shape) if strides is None else inside.as_strided(shape, strides, 32)

    real = torch.Tensor.new_empty

    def new_empty(x, *size, **how):  # the interpreter makes tensors of its own with a device
        return real(x, *size, **how) if how else within_nan(size, x.dtype)

    inputs = []
    for v in draw((6, 3, 2, 3), last):
        strides = v.stride() if v.ndim == 4 else None
        inputs.append(within_nan(v.shape, v.dtype, strides).copy_(v.detach()))
    d_y = within_nan(inputs[0].shape, F64, inputs[0].stride()).copy_(torch.randn_like(inputs[0]))
    d_term = within_nan((2,), F64).copy_(torch.randn(2))
    expected = run((inputs[0].clone().requires_grad_(), *inputs[1:]), d_y, d_term, groups=2, backend="torch")
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(module.torch, "empty_like", lambda x: within_nan(x.shape, x.dtype, x.stride()))
    y, term, offset, slope = module.launch(*inputs, EPS, 2, split=2)
    _, weight, _, mean, var = inputs
    d_x = module.launch_backward(d_y, d_term, inputs[0], weight, mean, var, offset, slope, EPS)
    monkeypatch.undo()
    assert len(buffers) == 7 + 5 + 1  # inputs; y, sums, term, offset, slope; d_x
    for buffer, n in buffers:
        assert buffer[:32].isnan().all() and buffer[32 + n :].isnan().all()
        assert not buffer[32 : 32 + n].isnan().any()
    for a, b in zip((y, term, d_x), expected, strict=True):
        assert relative(a, b) < 1e-13


@backends
@layouts
def test_the_same_bits_every_time(last, backend):
    inputs = draw((10, 70, 3, 3) if last else (10, 9, 3, 3), last, torch.float32)
    given = upstream(inputs, 2)
    first = run(inputs, *given, groups=2, backend=backend)
    wide = [v.detach().double() for v in inputs]
    exact = run((wide[0].requires_grad_(), *wide[1:]), *(v.double() for v in given), groups=2, backend="torch")
    assert all(relative(a, b) < 10 * U for a, b in zip(first, exact, strict=True))  # 70 channels are two tiles
    for _ in range(2):
        again = run((inputs[0].detach().clone().requires_grad_(), *inputs[1:]), *given, groups=2, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@no_triton
def test_splits_leave_no_program_without_a_tile():
    for across, tiles, processors in itertools.product((1, 3, 64, 5000), (1, 2, 7, 3200), (4, 132)):
        split = module.split_for(across, tiles, processors)
        share = -(-tiles // split)
        assert 1 <= split <= tiles and (split - 1) * share < tiles <= split * share
        assert across * split <= max(across, module.PER_PROCESSOR * processors)
    assert module.split_for(1, 3200, 132) > 400  # one tile of channels alone fills a GPU


@no_triton
def test_tiles_follow_the_layout():
    x = torch.empty(4, 50, 14, 14)
    assert module.tile_for(x) == (8, 256)
    assert module.tile_for(to_layout(x, True)) == (32, 64)
    assert module.tile_for(torch.empty(4, 3, 112, 112)) == (2, 1024)
    assert module.tile_for(to_layout(torch.empty(4, 3, 2, 2), True)) == (512, 4)


def test_auto_follows_the_measurements(monkeypatch):
    asked = []

    def use_triton(op, backend, precision, device, **size):
        asked.append((op, backend, precision, size))
        return False

    monkeypatch.setattr(module, "use_triton", use_triton)
    bn_stats(*draw((6, 3, 2, 3), True, torch.bfloat16), EPS)
    bn_stats(*draw((6, 3, 2, 3), False), EPS, backend="torch")
    assert asked == [
        ("bn_stats", "auto", "fp32", dict(n=6, c=3, pixels=6, last=1)),
        ("bn_stats", "torch", "fp64", dict(n=6, c=3, pixels=6, last=0)),
    ]


# ------------------------------------------------------------------------------------------------------------- failures

X = torch.randn(4, 3, 2, 2, device=DEVICE)
V = torch.ones(3, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: bn_stats([1.0], V, V, V, V, EPS)),
        ("x", lambda: bn_stats(X[0], V, V, V, V, EPS)),
        ("x", lambda: bn_stats(X[:0], V, V, V, V, EPS)),
        ("x", lambda: bn_stats(X[:, :, :0], V, V, V, V, EPS)),
        ("x", lambda: bn_stats(X.long(), V, V, V, V, EPS)),
        ("weight", lambda: bn_stats(X, V[:2], V, V, V, EPS)),
        ("weight", lambda: bn_stats(X, V.long(), V, V, V, EPS)),
        ("bias", lambda: bn_stats(X, V, V[:, None], V, V, EPS)),
        ("bias", lambda: bn_stats(X, V, 1.0, V, V, EPS)),
        ("mean", lambda: bn_stats(X, V, V, None, V, EPS)),
        ("mean", lambda: bn_stats(X, V, V, V.to("meta"), V, EPS)),
        ("var", lambda: bn_stats(X, V, V, V, None, EPS)),
        ("var", lambda: bn_stats(X, V, V, V, V[:2], EPS)),
        ("eps", lambda: bn_stats(X, V, V, V, V, -1e-5)),
        ("eps", lambda: bn_stats(X, V, V, V, V, math.nan)),
        ("groups", lambda: bn_stats(X, V, V, V, V, EPS, groups=3)),
        ("groups", lambda: bn_stats(X, V, V, V, V, EPS, groups=0)),
        ("groups", lambda: bn_stats(X, V, V, V, V, EPS, groups=2.0)),
        ("backend", lambda: bn_stats(X, V, V, V, V, EPS, backend="cuda")),
    ],
)
def test_validation_names_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()
