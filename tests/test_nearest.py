"""kernels/nearest.py: both backends against the plain definition, ties, zero and NaN rows, memory, repeatability."""

import importlib
import itertools
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels.backend import triton
from kernels.nearest import (
    CONFIGS,
    LARGE,
    Config,
    _nearest,
    by_blocks,
    config_for,
    launch,
    nearest,
    nearest_ref,
    split_for,
)

module = importlib.import_module("kernels.nearest")  # `kernels.nearest` is the function
device = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
both = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])

F64 = torch.float64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALL = Config(16, 64, 4, 2)  # several tiles for few rows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cosines(x):
    """All similarities in float64; -inf on the diagonal and where they are NaN. Norms in the working dtype."""
    work = x.to(F64 if x.dtype == F64 else torch.float32)
    squares = (work * work).sum(1).to(F64)
    f = x.to(F64) / squares.sqrt().where(squares > 0, 1)[:, None]
    f = f.where((squares > 0)[:, None], 0).where((squares < math.inf)[:, None], math.nan)
    similarity = f @ f.mT
    return similarity.masked_fill(similarity.isnan(), -math.inf).fill_diagonal_(-math.inf)


def expected_index(x):
    """The definition in plain Python."""
    similarity = cosines(x).tolist()
    return [
        max((j for j in range(len(x)) if j != i), key=lambda j, row=row: (row[j], -j))
        for i, row in enumerate(similarity)
    ]


def rounding(x):
    """How far below the largest similarity the chosen one may be: twice the error of one similarity.

    A similarity has an error of at most (d + d + 3) u: d for the sum of products, d / 2 for each squared norm, 3 for
    the reciprocals and the two products with them. u is twice the unit roundoff, as tensor cores truncate their sums.
    A product in three TF32 products is itself wrong by 2^-19.7 at most: low parts truncated to 11 bits after the first
    11, twice, and the product of low parts left out.
    """
    d, u = x.shape[1], 2.0**-52 if x.dtype == F64 else 2.0**-23
    return 2 * ((2 * d + 3) * u + (2.0**-19 if x.dtype == torch.float32 else 0))


def assert_nearest(index, x):
    """The similarity of every chosen row is the largest but for rounding; so is the row, where there is no other."""
    assert index.dtype == torch.int64
    assert index.shape == (len(x),)
    assert index.device == x.device
    similarity, index = cosines(x.cpu()), index.cpu()
    assert not (index == torch.arange(len(x))).any()
    found = similarity.gather(1, index[:, None])
    bound = similarity.amax(1, keepdim=True) - rounding(x)
    assert (found >= bound).all()
    alone = (similarity >= bound).sum(1) == 1
    assert torch.equal(index[alone], similarity.argmax(1)[alone])
    return alone


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("d", [1, 5, 16, 65, 130])
@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 33, 100])
def test_the_torch_backend_and_the_reference(n, d, monkeypatch):
    x = torch.randn(n, d, dtype=F64, device=device)
    for dtype in DTYPES:
        for limit in (1, 5 * n + 1, 2**24):  # blocks of one row, of five and the rest, of all
            monkeypatch.setattr(module, "BLOCK_ENTRIES", limit)
            alone = assert_nearest(nearest(x.to(dtype), backend="torch"), x.to(dtype))
        assert_nearest(nearest_ref(x.to(dtype)), x.to(dtype))
        if d >= 16:
            assert alone.float().mean() > 0.9  # that is, nearly all indices were compared


@needs_triton
@pytest.mark.parametrize("d", [1, 5, 16, 65, 130])
@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 33, 100])
def test_the_kernel(n, d):
    x = torch.randn(n, d, dtype=F64, device=device)
    config = Config(16 if n <= 33 else 64, 16 if d <= 16 else 64, 4, 2)  # nine tiles at most, for the interpreter
    for dtype, split in zip(DTYPES, (3, 2, 1, 2), strict=True):
        assert_nearest(launch(x.to(dtype), config=config, split=split), x.to(dtype))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_as_it_is_launched(dtype):
    """With the table's tiles and its own split; 130 rows are three tiles of 64 or two of 128."""
    x = torch.randn(130, 70, device=device).to(dtype)
    assert_nearest(nearest(x, backend="triton"), x)
    if dtype == torch.bfloat16:
        assert_nearest(launch(x, config=CONFIGS["native_large"]), x)


def close_calls(dtype, scale):
    """Triples (b + 1.3 e, b + e, b): the last one's nearest is the middle one, by 0.35 |e|² / |b|² = 0.35 scale²."""
    b, e = (torch.nn.functional.normalize(torch.randn(8, 50, dtype=F64)) for _ in range(2))
    e = e - (e * b).sum(1, keepdim=True) * b  # of the same order as scale, and normal to b
    e = scale * torch.nn.functional.normalize(e)
    x = torch.stack([b + 1.3 * e, b + e, b], 1).flatten(0, 1).to(dtype)
    return x.to(device), torch.arange(1, 24, 3)


@both
@pytest.mark.parametrize(("dtype", "scale"), [(F64, 1e-5), (torch.float32, 1e-2)])
def test_float32_and_float64_decide_close_calls(backend, dtype, scale):
    """By 3.5e-11, far below float32, and by 3.5e-5, far below TF32 and bf16; a tie would give the first of three."""
    x, middle = close_calls(dtype, scale)
    assert torch.equal(nearest(x, backend=backend)[2::3].cpu(), middle)


def test_autocast_and_the_matmul_settings_change_nothing(monkeypatch):
    x, middle = close_calls(torch.float32, 1e-2)
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    inside = []

    def spy(x):
        inside.append([backend.fp32_precision for backend in backends])
        return by_blocks(x)

    monkeypatch.setattr(module, "by_blocks", spy)
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        with torch.autocast(device, torch.bfloat16):
            found = nearest(x, backend="torch")
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
    assert inside == [["ieee", "ieee"]]
    assert torch.equal(found[2::3].cpu(), middle)


# ---------------------------------------------------------------------------------------------- ties, zero and NaN rows


def one_hot_rows(n):
    """Rows ± 2^k e_j and zero rows: all similarities are exactly -1, 0 or 1, with ties everywhere."""
    x = torch.zeros(n, 11)
    sign = torch.randint(0, 2, (n,)) * 2 - 1.0
    x[torch.arange(n), torch.randint(0, 11, (n,))] = sign * 2.0 ** torch.randint(-3, 4, (n,))
    x[torch.randperm(n)[: n // 10]] = 0
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype):
    x = one_hot_rows(70).to(device, dtype)
    expected = torch.tensor(expected_index(x.cpu()), device=device)
    assert torch.equal(nearest_ref(x), expected)
    assert torch.equal(nearest(x, backend="torch"), expected)
    if triton is not None:
        for split in (1, 2, 3, 7) if dtype == torch.float32 else (2,):  # of five tiles; seven leave shares empty
            assert torch.equal(launch(x, config=SMALL, split=split), expected)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_duplicate_is_the_nearest(backend, dtype):
    """Never the row itself. Integers, so that sums are exact in any order."""
    x = torch.randint(-4, 5, (40, 37)).to(device, dtype)
    x[30] = x[7].clone()
    x[[20, 33]] = x[2].clone()
    found = nearest(x, backend=backend).tolist()
    assert [found[i] for i in (7, 30, 2, 20, 33)] == [30, 7, 20, 2, 2]
    assert_nearest(nearest(x, backend=backend), x)


NAN, INF = math.nan, math.inf
SPECIAL = {
    "a zero row": ([[0, 0], [1, 0], [-1, 0], [0, 0]], [1, 0, 0, 0]),
    "zero is nearer than opposite": ([[1, 0], [-1, 0], [0, 0], [-2, 0]], [2, 3, 0, 1]),
    "only zero rows": ([[0, 0], [0, 0], [0, 0]], [1, 0, 0]),
    "a NaN row": ([[NAN, 1], [1, 0], [1, 1], [0, 1]], [1, 2, 1, 2]),
    "a NaN row between zero rows": ([[0], [NAN], [0], [0]], [2, 0, 0, 0]),
    "NaN does not even win over opposite": ([[NAN], [-1], [1]], [1, 2, 1]),
    "only NaN rows": ([[NAN, 1], [1, NAN], [NAN, NAN]], [1, 0, 0]),
    "no other row than NaN": ([[1, 2], [NAN, 0]], [1, 0]),
    "inf": ([[INF, 1], [1, 0], [1, 1], [0, 1]], [1, 2, 1, 2]),
    "-inf": ([[-1, 0], [1, 0], [-INF, 1], [0, 1], [INF, INF]], [3, 3, 0, 0, 0]),
}


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
def test_zero_and_non_finite_rows(case, dtype, backend):
    rows, expected = SPECIAL[case]
    x = torch.tensor(rows, dtype=dtype, device=device)
    assert expected_index(x.cpu()) == expected
    assert nearest_ref(x).tolist() == expected
    assert nearest(x, backend=backend).tolist() == expected


@both
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_norms_out_of_range(dtype, backend):
    """In float32, where bf16 is computed too, big has the square inf and counts as NaN, and tiny as zero."""
    big, tiny = 2.0**100, 2.0**-100  # powers of two: no rounding, so parallel rows do tie in float64
    x = torch.tensor([[big, 0], [0, 1], [1, 0], [2 * big, 0], [-tiny, 0], [-1, 0]], dtype=dtype, device=device)
    expected = [2, 0, 0, 0, 5, 4] if dtype == F64 else [1, 2, 1, 0, 1, 1]
    assert expected_index(x.cpu()) == expected
    assert nearest_ref(x).tolist() == expected
    assert nearest(x, backend=backend).tolist() == expected


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_rows_do_not_touch_the_others(backend):
    """Across tiles: rows that are NaN are as if they were not there."""
    x = torch.randn(70, 20, device=device)
    bad = torch.tensor([0, 1, 16, 40, 69])
    spoiled = x.clone()
    for row, value in zip(bad, (NAN, INF, -INF, NAN, INF), strict=True):
        spoiled[row, row % 20] = value
    kept = torch.tensor([i for i in range(70) if i not in bad], device=device)
    found = launch(spoiled, config=SMALL, split=2) if backend == "triton" else nearest(spoiled, backend=backend)
    assert torch.equal(found[kept], kept[nearest(x[kept], backend="torch")])
    assert found[bad].tolist() == [1, 0, 0, 0, 0]


@both
def test_without_columns_all_rows_are_zero(backend):
    assert nearest(torch.zeros(4, 0, device=device), backend=backend).tolist() == [1, 0, 0, 0]


# --------------------------------------------------------------------------------------------------------------- layout


def views(x):
    """x as views inside buffers of NaN (with the buffers): rows apart, columns apart too, transposed."""
    n, d = x.shape
    buffers = [
        torch.full(shape, NAN, dtype=x.dtype, device=device) for shape in ((n + 3, d + 5), (2 * n + 3, 3 * d + 2))
    ]
    buffers.append(torch.full((d + 2, n + 3), NAN, dtype=x.dtype, device=device))
    found = [buffers[0][1 : 1 + n, 2 : 2 + d], buffers[1][1 : 1 + 2 * n : 2, 2 : 2 + 3 * d : 3]]
    found.append(buffers[2][1 : 1 + d, 2 : 2 + n].mT)
    for view in found:
        view.copy_(x)
    return zip(found, buffers, strict=True)


@both
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(33, 40), (3, 1)])
def test_strided_views_inside_nan(backend, dtype, n, d):
    x = torch.randn(n, d, device=device).to(dtype)
    expected = nearest_ref(x)
    for view, buffer in views(x):
        before = buffer.clone()
        found = launch(view, config=SMALL, split=2) if backend == "triton" else nearest(view, backend=backend)
        if d > 1:  # in one dimension everything ties but for rounding
            assert torch.equal(found, expected)
        assert_nearest(found, x)
        assert torch.equal(buffer.nan_to_num(), before.nan_to_num())
        assert torch.equal(buffer.isnan(), before.isnan())


@both
def test_expanded_rows(backend):
    x = torch.randn(1, 9, device=device).expand(5, 9)
    assert nearest(x, backend=backend).tolist() == [1, 0, 0, 0, 0]


@needs_triton
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_poisoned_memory(dtype, monkeypatch):
    """What the kernels leave unwritten would win: +inf in the place of a similarity, no row in that of an index."""
    x = torch.randn(37, 20, dtype=dtype, device=device)
    expected = nearest_ref(x)
    made, new_empty = [], torch.Tensor.new_empty

    def poisoned(self, *size, **how):
        tensor = new_empty(self, *size, **how)
        if "device" in how:  # the interpreter's own
            return tensor
        made.append(tensor.fill_(INF if tensor.is_floating_point() else 10**6))
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for split in (1, 2, 5):  # of three tiles
        assert torch.equal(launch(x, config=SMALL, split=split), expected)
        assert len(made) == 4
        assert sum(t.numel() for t in made) <= (2 + 2 * split) * 37  # all the memory there is: nothing like 37 × 37
        made.clear()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_not_copied(dtype, monkeypatch):
    x = torch.randn(20, 24, device=device).to(dtype)
    pointers, kernel = [], module._nearest_kernel

    class Spy:
        def __getitem__(self, grid):
            def call(x, *args, **named):
                pointers.append((x.data_ptr(), x.dtype))
                return kernel[grid](x, *args, **named)

            return call

    monkeypatch.setattr(module, "_nearest_kernel", Spy())
    assert_nearest(launch(x), x)
    assert pointers == [(x.data_ptr(), dtype)]


def test_the_torch_backend_never_forms_the_matrix(monkeypatch):
    """Read off the operands of every operation."""
    n, d, limit = 40, 4, 200
    x = torch.randn(n, d, device=device)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", limit)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as trace:
        nearest(x, backend="torch")
    events = trace.events()
    operands = {tuple(shape) for event in events for shape in event.input_shapes if isinstance(shape, list)}
    assert (5, 40) in operands
    assert max(math.prod(shape) for shape in operands) == limit
    names = {event.name for event in events}
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero"}  # nothing was read back to the host


@needs_triton
def test_the_same_bits_every_time_and_for_every_split():
    """A similarity does not depend on which program computes it: the merge changes no choice, ties included."""
    x = torch.randn(50, 37, device=device)
    x[[7, 30]] = x[12].clone()
    first = launch(x, config=SMALL, split=1)
    for split in (1, 2, 3, 4):
        assert torch.equal(launch(x, config=SMALL, split=split), first)
    once = nearest(x, backend="torch")
    assert torch.equal(nearest(x, backend="torch"), once)


def test_splits():
    assert split_for(13, 132) == 13  # 819 rows on an H100: 169 programs of one tile
    assert split_for(391, 132) == 3  # 50,000 rows in tiles of 128
    for across, processors in itertools.product((1, 2, 3, 13, 40, 100, 782), (4, 108, 132)):
        split = split_for(across, processors)
        share = math.ceil(across / split)
        assert (split - 1) * share < across <= split * share  # every program has a tile, and every tile a program
        assert across * split >= min(across * across, 4 * processors)


def test_configurations():
    def config(n, d, mode="native", start=0):
        return config_for(mode, torch.zeros(n * d + 16, dtype=torch.bfloat16)[start:].as_strided((n, d), (d, 1)))

    assert config(LARGE, 32) == CONFIGS["native_large"]
    for unsuitable in (config(LARGE - 1, 32), config(LARGE, 33), config(LARGE, 8), config(LARGE, 32, start=1)):
        assert unsuitable == CONFIGS["native"]
    rows_apart = torch.zeros(LARGE, 40, dtype=torch.bfloat16)[:, :32]
    assert config_for("native", rows_apart) == CONFIGS["native"]
    for mode in ("tf32x3", "fp64"):
        assert config(LARGE, 32, mode) == CONFIGS[mode]


# ----------------------------------------------------------------------------------------------- op, compile, arguments


@both
def test_opcheck(backend):
    x = torch.randn(5, 7, device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(_nearest, (x, backend), test_utils=checks)
    torch.library.opcheck(_nearest, (x.half().mT, backend), test_utils=checks)


@both
def test_compiled_without_graph_breaks(backend):
    """Gathers by the index and is differentiated around it."""

    def loss(x):
        return ((x - x[nearest(x, backend=backend)]) ** 2).sum()

    x = torch.randn(6, 5, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    (found,) = torch.autograd.grad(compiled, x)
    (wanted,) = torch.autograd.grad(((x - x[nearest_ref(x.detach())]) ** 2).sum(), x)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)  # sums of six numbers near 1
    assert not nearest(x, backend=backend).requires_grad


def test_the_measurements_decide(monkeypatch):
    asked = []

    def decide(*args, **size):
        asked.append((*args, size))
        return args[1] != "torch"

    monkeypatch.setattr(module, "use_triton", decide)
    monkeypatch.setattr(module, "launch", lambda x: x.new_full((len(x),), 77, dtype=torch.int64))
    x = torch.randn(4, 3)
    assert nearest(x).tolist() == [77] * 4
    assert nearest(x.double()).tolist() == [77] * 4
    assert torch.equal(nearest(x.half(), backend="torch"), nearest_ref(x.half()))
    size, cpu = dict(n=4, d=3), torch.device("cpu")
    assert asked == [
        ("nearest", "auto", "fp32", cpu, size),
        ("nearest", "auto", "fp64", cpu, size),
        ("nearest", "torch", "fp32", cpu, size),
    ]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: nearest([[1.0]])),
        ("x", lambda: nearest(torch.randn(3))),
        ("x", lambda: nearest(torch.randn(2, 3, 4))),
        ("x", lambda: nearest(torch.randn(1, 3))),
        ("x", lambda: nearest(torch.randn(0, 3))),
        ("x", lambda: nearest(torch.ones(3, 3, dtype=torch.long))),
        ("x", lambda: nearest(torch.ones(3, 3, dtype=torch.complex64))),
        ("backend", lambda: nearest(torch.randn(3, 3), backend="cuda")),
    ],
)
def test_validation_names_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()
