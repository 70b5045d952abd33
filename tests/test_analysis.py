"""common/analysis.py: each measure against a loop, the laws of scale, what is rescaled, the file and the plots."""

import contextlib
import copy
import json
import math
import warnings

import matplotlib.figure
import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from torch import nn

from common.analysis import (
    SMALLEST,
    Model,
    analyse,
    conv_norm_pairs,
    deep_layer,
    gaussian_entropy,
    histogram_entropy,
    knn_entropy,
    layer_measures,
    line_styles,
    mean_over,
    rescaled,
    rounded,
    scale_argument,
    shared_edges,
    signal,
    statistics_of,
    summary_table,
)
from common.models import ConvNet, ResNet

F64 = torch.float64
NAMES = ("std_mu", "std_var", "max_over_median_var", "cv_sigma", "kurtosis_mu", "kurtosis_var")


@pytest.fixture(autouse=True)
def small():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------- restated, as loops


def mean(v):
    return sum(v) / len(v)


def moment(v, power):
    return mean([(a - mean(v)) ** power for a in v])


def median(v):
    v, half = sorted(v), len(v) // 2
    return v[half] if len(v) % 2 else (v[half - 1] + v[half]) / 2


def measures(mu, var):
    """In the order of NAMES."""
    sigma = [math.sqrt(a) for a in var]
    kurtosis = [moment(v, 4) / moment(v, 2) ** 2 - 3 for v in (mu, var)]
    spreads = [math.sqrt(moment(v, 2)) for v in (mu, var, sigma)]
    return [*spreads[:2], max(var) / median(var), spreads[2] / mean(sigma), *kurtosis]


def free(mu, var):
    """mu / sigma where sigma is above 0, and var / mean."""
    return [m / math.sqrt(v) for m, v in zip(mu, var, strict=True) if v > 0], [v / mean(var) for v in var]


def psi(n):
    """Digamma of a whole number, by its recurrence from Euler's constant."""
    return -0.57721566490153286 + sum(1 / i for i in range(1, n))


def knn(v, k):
    width, total = math.sqrt(moment(v, 2)), 0.0
    for i, a in enumerate(v):
        distances = sorted(abs(a - b) for j, b in enumerate(v) if j != i)
        total += math.log(max(distances[k - 1], 2**-24 * width))
    return psi(len(v)) - psi(k) + math.log(2) + total / len(v)


def histogram(v, edges):
    counts = [0] * (len(edges) - 1)
    for a in v:
        counts[max([i for i in range(len(counts)) if edges[i] <= a], default=0)] += 1
    return -sum(c / len(v) * math.log(c / len(v)) for c in counts if c)


def gaussian(v):
    return 0.5 * math.log(2 * math.pi * math.e * moment(v, 2))


def norms_of(net):
    return [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]


def with_statistics(net):
    """As scdd.with_statistics: x -> (outputs, terms (L, 1)), here by hooks."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    inputs = []
    for norm in norms_of(net):
        norm.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0])))

    def function(x):
        inputs.clear()
        out = net(x)
        found = {}
        for module, a in inputs:
            m, v = a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
            found[module] = (v - module.running_var).norm() + (m - module.running_mean).norm()
        return out, torch.stack([found[norm] for norm in norms_of(net)])[:, None]

    return function


def uneven(net, seed=0):
    """The net with random statistics and affine weights, frozen; means in proportion to deviations, as they are."""
    generator = torch.Generator().manual_seed(seed)
    for norm in norms_of(net):
        draw = lambda like: torch.randn(like.shape, generator=generator, dtype=F64).to(like)  # noqa: E731
        norm.running_var.copy_(draw(norm.running_var).exp())
        norm.running_mean.copy_(draw(norm.running_mean) * norm.running_var.sqrt())
        norm.weight.data.copy_(draw(norm.weight).mul(0.3).exp())
        norm.bias.data.copy_(draw(norm.bias))
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------- measures


def test_statistics_are_copies_in_order_of_registration():
    net = uneven(ResNet("resnet10", width=4))
    found = statistics_of(net)
    assert [name for name, _, _ in found] == [n for n, m in net.named_modules() if type(m) is nn.BatchNorm2d]
    assert [name for name, _, _ in found][:5] == ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "layer2.0.bn2"]
    before = [(mu.tolist(), var.tolist()) for _, mu, var in found]
    assert before == [(norm.running_mean.tolist(), norm.running_var.tolist()) for norm in norms_of(net)]
    assert all(mu.dtype == var.dtype == F64 for _, mu, var in found)
    net = net.double()
    found = statistics_of(net)
    for norm in norms_of(net):  # float64 on the CPU already: still a copy
        norm.running_mean.zero_()
        norm.running_var.zero_()
    assert [(mu.tolist(), var.tolist()) for _, mu, var in found] == before
    refuse(lambda: statistics_of(nn.Conv2d(1, 1, 1)), "BatchNorm2d")


@pytest.mark.parametrize("channels", [7, 8])
@pytest.mark.parametrize("dead", [0, 2])
def test_measures_are_those_of_the_loops(channels, dead):
    mu, var = torch.randn(channels, dtype=F64) * 3 + 1, torch.randn(channels, dtype=F64).exp()
    var[:dead] = 0
    found = layer_measures(mu, var)
    raw, alike = measures(mu.tolist(), var.tolist()), measures(*free(mu.tolist(), var.tolist()))
    wanted = {f"raw_{name}": value for name, value in zip(NAMES, raw, strict=True)}
    wanted |= {f"scale_free_{name}": value for name, value in zip(NAMES, alike, strict=True)}
    assert found == pytest.approx(wanted, rel=1e-12)
    assert list(found) == list(wanted)


def test_scale_free_measures_know_no_scale():
    mu, var = torch.randn(9, dtype=F64), torch.randn(9, dtype=F64).exp()
    before, after = layer_measures(mu, var), layer_measures(3 * mu, 9 * var)
    for name in NAMES:
        assert after[f"scale_free_{name}"] == pytest.approx(before[f"scale_free_{name}"], rel=1e-12)
    assert after["raw_std_mu"] == pytest.approx(3 * before["raw_std_mu"], rel=1e-12)
    assert after["raw_std_var"] == pytest.approx(9 * before["raw_std_var"], rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 7.7])
def test_equal_channels_have_no_spread_and_no_kurtosis(value):
    """Though torch has a standard deviation of 1e-17 for seven times 0.1."""
    assert torch.full((7,), 0.1, dtype=F64).std(correction=0) > 0
    found = layer_measures(torch.full((7,), value, dtype=F64), torch.full((7,), 0.1, dtype=F64))
    for kind in ("raw", "scale_free"):
        assert [found[f"{kind}_{name}"] for name in NAMES[:4]] == [0, 0, 1, 0]
        assert all(math.isnan(found[f"{kind}_{name}"]) for name in NAMES[4:])


def test_measures_of_a_dead_layer_are_undefined_and_no_error():
    found = layer_measures(torch.randn(5), torch.zeros(5))
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == set(found) - {"raw_std_mu", "raw_std_var", "raw_kurtosis_mu"}
    assert found["raw_std_var"] == 0


# -------------------------------------------------------------------------------------------------------------- entropy


def test_gaussian_entropy_is_the_formula():
    v = torch.randn(11) * 5
    assert gaussian_entropy(v) == pytest.approx(gaussian(v.tolist()), rel=1e-12)
    assert gaussian_entropy(torch.tensor([-1.0, 1.0])) == pytest.approx(1.4189385332046727, rel=1e-14)  # of N(0, 1)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (4, 3), (5, 3), (6, 1), (9, 2), (40, 3), (12, 11)])
def test_knn_entropy_is_that_of_the_loop(n, k):
    v = torch.randn(n, dtype=F64).exp()
    assert knn_entropy(v, k) == pytest.approx(knn(v.tolist(), k), rel=1e-11)
    if k == 3:
        assert knn_entropy(v) == knn_entropy(v, 3)


def test_knn_entropy_of_many_numbers_is_that_of_their_distribution():
    """2000 uniform draws on an interval of length 5: log 5 up to about sqrt(1 / (k n))."""
    assert knn_entropy(5 * torch.rand(2000, dtype=F64)) == pytest.approx(math.log(5), abs=0.04)


def test_ties_count_as_the_smallest_distance():
    v = torch.tensor([0.0, 0, 0, 0, 0, 1, 2.5, 2.5, 4, 7], dtype=F64)
    assert knn_entropy(v, 3) == pytest.approx(knn(v.tolist(), 3), rel=1e-11)
    assert SMALLEST == 2**-24
    for k in (0.25, 4.0, 1e-12):
        assert knn_entropy(k * v, 3) == pytest.approx(knn_entropy(v, 3) + math.log(k), rel=1e-11)


@pytest.mark.parametrize("estimate", [gaussian_entropy, knn_entropy], ids=["gaussian", "knn"])
def test_differential_entropies_move_with_scale_and_not_with_shift(estimate):
    v = torch.randn(20, dtype=F64)
    assert estimate(3 * v) == pytest.approx(estimate(v) + math.log(3), rel=1e-12)
    assert estimate(-v + 5) == pytest.approx(estimate(v), rel=1e-11)


@pytest.mark.parametrize(
    "v",
    [[0.1] * 7, [0.0] * 10, [], [1.0, math.nan] * 4, [1.0, 2, 3, 4, math.inf], [1e-300, 2e-300, 3e-300, 4e-300, 0]],
    ids=["equal", "zero", "none", "nan", "inf", "underflow"],
)
def test_differential_entropies_of_no_width_are_none(v):
    v = torch.tensor(v, dtype=F64)
    assert gaussian_entropy(v) is None
    assert knn_entropy(v) is None


def test_knn_entropy_wants_more_numbers_than_neighbours():
    v = torch.tensor([1.0, 2, 4], dtype=F64)
    assert knn_entropy(v, 3) is None
    assert knn_entropy(v, 2) is not None


def test_histogram_entropy_is_that_of_the_loop():
    edges = torch.tensor([0.0, 1, 2.5, 3, 7], dtype=F64)
    v = torch.tensor([-5.0, 0, 0.5, 1, 1, 2.4, 2.5, 3, 7, 7, 9, 3.5, 2.6], dtype=F64)
    assert histogram_entropy(v, edges) == pytest.approx(histogram(v.tolist(), edges.tolist()), rel=1e-12)
    assert histogram_entropy(v.float(), edges) == pytest.approx(histogram(v.tolist(), edges.tolist()), rel=1e-12)
    # bins hold 3, 3, 2 and 5 of the 13
    by_hand = -sum(c / 13 * math.log(c / 13) for c in (3, 3, 2, 5))
    assert histogram_entropy(v, edges) == pytest.approx(by_hand, rel=1e-12)
    assert histogram_entropy(torch.full((4,), 2.0), edges) == 0
    assert histogram_entropy(torch.zeros(0), edges) is None
    assert histogram_entropy(torch.tensor([1.0, math.nan]), edges) is None
    assert histogram_entropy(torch.tensor([1.0, math.inf]), edges) is None


def test_edges_span_all_vectors_evenly():
    vectors = [torch.tensor([1.0, 4.0]), torch.tensor([-3.0, math.inf]), torch.tensor([math.nan, 5.0, 0.0])]
    assert shared_edges(vectors, 4).tolist() == [-3, -1, 1, 3, 5]
    assert shared_edges(vectors).tolist() == pytest.approx([-3 + 8 * i / 32 for i in range(33)], abs=1e-14)
    assert shared_edges(vectors).dtype == F64
    assert shared_edges([torch.full((3,), 2.0)], 2).tolist() == [1.5, 2, 2.5]
    assert shared_edges([torch.zeros(0)], 2).tolist() == shared_edges([], 2).tolist() == [0, 0.5, 1]
    v = torch.rand(50, dtype=F64)
    edges = shared_edges([v])
    assert edges[0] == v.min() and edges[-1] == v.max()


# ------------------------------------------------------------------------------------------------------------ rescaling


class Wired(nn.Module):
    """Three convolutions; where their outputs go is for `wire`."""

    def __init__(self, wire):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(3) for _ in range(3))
        self.wire = wire

    def forward(self, x):
        return self.wire(self, x).mean((2, 3))


def plain(n, x):
    return n.bn3(n.conv3(F.relu(n.bn2(n.conv2(F.relu(n.bn1(n.conv1(x))))))))


def residual(n, x):
    x = F.relu(n.bn1(n.conv1(x)))
    return F.relu(x + n.bn3(n.conv3(F.relu(n.bn2(n.conv2(x))))))


def norm_of_images(n, x):
    return n.bn2(n.conv1(n.bn1(x)))


def norm_after_relu(n, x):
    return n.bn2(n.conv2(n.bn1(F.relu(n.conv1(x)))))


def pre_activation(n, x):
    x = n.conv1(x)
    x = x + n.conv2(F.relu(n.bn1(x)))
    return n.bn3(n.conv3(F.relu(n.bn2(x))))


def in_place(n, x):
    return n.bn2(n.conv2(F.relu(n.bn1(n.conv1(x).add_(x)))))


def two_norms(n, x):
    x = n.conv1(x)
    return n.bn3(n.conv2(n.bn1(x) * n.bn2(x)))


def called_twice(n, x):
    return n.bn3(n.conv3(F.relu(n.bn2(n.conv1(F.relu(n.bn1(n.conv1(x))))))))


def one_norm_twice(n, x):
    return n.bn2(n.conv3(n.bn1(n.conv2(F.relu(n.bn1(n.conv1(x)))))))


def swapped(n, x):
    return n.bn1(n.conv2(F.relu(n.bn3(n.conv1(x)))))


PAIRS = {
    plain: [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")],
    residual: [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")],
    norm_of_images: [("conv1", "bn2")],
    norm_after_relu: [("conv2", "bn2")],
    pre_activation: [("conv3", "bn3")],
    in_place: [("conv2", "bn2")],
    two_norms: [("conv2", "bn3")],
    called_twice: [("conv3", "bn3")],
    one_norm_twice: [("conv3", "bn2")],
    swapped: [("conv1", "bn3"), ("conv2", "bn1")],
}


@pytest.mark.parametrize("k", [0.3, 5.0])
@pytest.mark.parametrize("wire", PAIRS, ids=lambda wire: wire.__name__)
def test_rescaled_is_the_same_function_of_other_statistics(wire, k):
    net, x = uneven(Wired(wire)).double(), torch.randn(4, 3, 6, 6, dtype=F64)
    for norm in norms_of(net):
        norm.eps = 0.1  # large, so that one that is not scaled shows
    state = {key: value.clone() for key, value in net.state_dict().items()}
    assert sorted(conv_norm_pairs(net, x[:1])) == sorted(PAIRS[wire])
    other = rescaled(net, k, x[:1])
    torch.testing.assert_close(other(x), net(x), rtol=1e-12, atol=1e-12)
    convs, norms = {conv for conv, _ in PAIRS[wire]}, {norm for _, norm in PAIRS[wire]}
    for name, value in other.state_dict().items():
        module, _, part = name.rpartition(".")
        power = 0
        if module in convs:
            power = 1
        elif module in norms:
            power = {"running_mean": 1, "running_var": 2}.get(part, 0)
        torch.testing.assert_close(value, state[name] * k**power if power else state[name], rtol=1e-13, atol=0)
    for name in ("bn1", "bn2", "bn3"):
        assert other.get_submodule(name).eps == pytest.approx(0.1 * k**2 if name in norms else 0.1, rel=1e-13)
        assert net.get_submodule(name).eps == 0.1
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())  # the net itself
    assert not net.training and not other.training


def test_a_training_net_is_not_touched_by_rescaling():
    net = uneven(Wired(plain)).train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():  # whatever the caller's mode
        assert len(conv_norm_pairs(net, torch.randn(2, 3, 6, 6))) == 3
    rescaled(net, 2.0, torch.randn(2, 3, 6, 6))
    # one image that ends as one pixel, of which BatchNorm has no statistics in training
    assert len(conv_norm_pairs(uneven(ResNet("resnet10", width=4)).train(), torch.randn(1, 3, 6, 6))) == 12
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.training and all(not part._forward_hooks and not part._forward_pre_hooks for part in net.modules())


@pytest.mark.parametrize("make", [lambda: ResNet("resnet10", width=4), lambda: ResNet("resnet50", width=2)])
def test_every_norm_of_a_resnet_is_rescaled(make):
    net, x = uneven(make()), torch.randn(3, 3, 8, 8)
    pairs = conv_norm_pairs(net, x)
    assert sorted(norm for _, norm in pairs) == sorted(name for name, _, _ in statistics_of(net))
    assert len({conv for conv, _ in pairs}) == len(pairs)
    other = rescaled(net, 4.0, x[:1])
    assert torch.equal(other(x), net(x))  # a power of two: to the last bit
    for (_, mu, var), (_, mu_k, var_k) in zip(statistics_of(net), statistics_of(other), strict=True):
        assert torch.equal(mu_k, 4 * mu) and torch.equal(var_k, 16 * var)


def test_convolutions_with_biases_and_relu_in_place_are_rescaled():
    net, x = uneven(ConvNet(3, 8, 5, (4, 6))), torch.randn(3, 3, 8, 8)
    assert conv_norm_pairs(net, x) == [("blocks.0", "blocks.1"), ("blocks.4", "blocks.5")]
    assert torch.equal(rescaled(net, 0.25, x)(x), net(x))


# --------------------------------------------------------------------------------------------------------------- signal


def loops_of_terms(net, x):
    """term_l of nn.Sequential(conv, norm, ReLU, conv, norm) with loops over channels."""
    terms = []
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            squares = [0.0, 0.0]
            for c in range(x.shape[1]):
                values = x[:, c].flatten().tolist()
                squares[0] += (moment(values, 2) - float(layer.running_var[c])) ** 2
                squares[1] += (mean(values) - float(layer.running_mean[c])) ** 2
            terms.append(math.sqrt(squares[0]) + math.sqrt(squares[1]))
        x = layer(x)
    return terms


def test_signal_is_the_loss_and_its_slope_by_differences():
    net = uneven(
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Softplus(), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    )
    net, x = net.double(), torch.randn(2, 1, 3, 3, dtype=F64)
    found = signal(with_statistics(net), x, 7.0)
    terms = loops_of_terms(net, x)
    assert found["terms"] == pytest.approx(terms, rel=1e-12)
    assert found["loss"] == pytest.approx(7 * terms[0] + terms[1], rel=1e-12)
    slopes = []
    for i in range(x.numel()):
        h = torch.zeros(x.numel(), dtype=F64)
        h[i] = 1e-5
        up, down = (loops_of_terms(net, x + sign * h.view_as(x)) for sign in (1, -1))
        slopes.append([(a - b) / 2e-5 for a, b in zip(up, down, strict=True)])
    norms = [math.sqrt(sum(slope[layer] ** 2 for slope in slopes)) for layer in range(2)]
    assert found["gradient"] == pytest.approx(norms, rel=1e-7)
    assert found["gradient_total"] == pytest.approx(math.sqrt(sum((7 * a + b) ** 2 for a, b in slopes)), rel=1e-7)
    assert not x.requires_grad
    default = signal(with_statistics(net), x)
    assert default["loss"] == pytest.approx(10 * terms[0] + terms[1], rel=1e-12)


# ------------------------------------------------------------------------------------------------------ the whole of it


def test_mean_over_leaves_out_what_is_unknown():
    items = [dict(a=1.0, b=dict(c=math.nan)), dict(a=None, b=dict(c=math.inf)), dict(a=4, b=dict(c=None))]
    assert mean_over(items) == dict(a=2.5, b=dict(c=None))


def test_rounding_keeps_six_digits_and_nothing_that_json_lacks():
    value = dict(a=[1234567.0, -0.00012345678, math.nan], b=(math.inf, 3, None, "x", True), c=1 / 3)
    assert rounded(value) == dict(a=[1234570.0, -0.000123457, None], b=[None, 3, None, "x", True], c=0.333333)


@contextlib.contextmanager
def figures():
    """{name of the file: figure} of what is saved within the block."""
    drawn, save = {}, matplotlib.figure.Figure.savefig

    def keep(figure, path, **kwargs):
        drawn[path.name.strip(".").split(".")[0]] = figure
        assert kwargs["dpi"] == 100
        return save(figure, path, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", keep)
        yield drawn


def three_models(dtype=torch.float32):
    """Two supervised ones of different size, in no order, and another with one norm in front of all."""
    first = nn.Sequential(nn.BatchNorm2d(3), ResNet("resnet10", width=6))
    return [
        Model("MoCo", "moco2", 6, uneven(first, 1).to(dtype)),
        Model("large", "supervised", 8, uneven(ResNet("resnet10", width=8), 2).to(dtype)),
        Model("small", "supervised", 4, uneven(ResNet("resnet10", width=4), 3).to(dtype)),
    ]


def run_three(folder, dtype=torch.float32, size=4):
    models = three_models(dtype)
    # in another dtype than the networks
    images = {"noise": torch.randn(size, 3, 8, 8, dtype=F64), "real": torch.rand(size, 3, 8, 8, dtype=F64) - 0.5}
    seen = []

    def recover(net):
        assert torch.is_grad_enabled()
        seen.append(net)
        return torch.full((size, 3, 8, 8), 0.1 * len(seen), dtype=F64).add(images["noise"], alpha=0.1).requires_grad_()

    result = analyse(models, images, with_statistics, recover, folder / "sub", "a title", 5.0)
    assert [id(net) for net in seen] == [id(model.net) for model in models]
    return models, images, result


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """(folder, models, images, result, figures) of a run in float64."""
    folder = tmp_path_factory.mktemp("three")
    torch.manual_seed(0)
    with figures() as drawn:
        return folder / "sub", *run_three(folder, F64), drawn


def near(value):
    """6 digits are kept."""
    return pytest.approx(value, rel=6e-6, abs=1e-9)


def test_analyse_gives_what_the_loops_give(three):
    folder, models, images, result, _ = three
    text = (folder / "analysis.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == result
    assert (result["title"], result["first_bn_multiplier"]) == ("a title", 5.0)
    # edges over all layers of all models, of each kind
    everything = {(kind, of): [] for kind in ("raw", "scale_free") for of in ("mu", "var")}
    for model in models:
        for norm in norms_of(model.net):
            mu, var = norm.running_mean.tolist(), norm.running_var.tolist()
            for kind, pair in dict(raw=(mu, var), scale_free=free(mu, var)).items():
                for of, v in zip(("mu", "var"), pair, strict=True):
                    everything[kind, of] += v
    for number, (model, found) in enumerate(zip(models, result["models"], strict=True), 1):
        assert (found["name"], found["family"], found["size"]) == (model.name, model.family, model.size)
        norms = [(n, m) for n, m in model.net.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert [(a["name"], a["channels"], a["dead"]) for a in found["layers"]] == [
            (n, m.num_features, 0) for n, m in norms
        ]
        columns = {}
        for layer, (_, norm) in zip(found["layers"], norms, strict=True):
            mu, var = norm.running_mean.tolist(), norm.running_var.tolist()
            for kind, pair in dict(raw=(mu, var), scale_free=free(mu, var)).items():
                for name, value in zip(NAMES, measures(*pair), strict=True):
                    assert layer[f"{kind}_{name}"] == near(value)
                    columns.setdefault((f"{kind}_{name}",), []).append(value)
                for of, v in zip(("mu", "var"), pair, strict=True):
                    low, high = min(everything[kind, of]), max(everything[kind, of])
                    edges = [low + (high - low) * i / 32 for i in range(33)]
                    wanted = dict(gaussian=gaussian(v), knn=knn(v, 3) if len(v) > 3 else None)
                    wanted["histogram"] = histogram(v, edges)
                    for estimator, value in wanted.items():
                        if value is None:
                            assert layer["entropies"][kind][estimator][of] is None
                            continue
                        assert layer["entropies"][kind][estimator][of] == near(value)
                        columns.setdefault((kind, estimator, of), []).append(value)
        for key, values in columns.items():
            if len(key) == 1:
                assert found["mean"][key[0]] == near(mean(values))
            else:
                kind, estimator, of = key
                assert found["mean"]["entropies"][kind][estimator][of] == near(mean(values))
        # signal
        recovered = torch.full_like(images["noise"], 0.1 * number) + 0.1 * images["noise"]
        losses = {}
        for name, x in dict(images, recovered=recovered).items():
            terms = with_statistics(model.net)(x)[1].flatten().tolist()
            losses[name] = 5 * terms[0] + sum(terms[1:])
            assert found["signal"][name] == near(losses[name])
        assert found["signal"]["range"] == near(losses["noise"] / losses["real"])
        x = images["noise"].clone().requires_grad_()
        terms = with_statistics(model.net)(x)[1][:, 0]
        gradients = [torch.autograd.grad(term, x, retain_graph=True)[0] for term in terms]
        assert found["signal"]["gradient"] == near([g.square().sum().sqrt().item() for g in gradients])
        total = (5 * gradients[0] + sum(gradients[1:])).square().sum().sqrt().item()
        assert found["signal"]["gradient_total"] == near(total)


def test_analyse_shows_that_scale_is_no_information(tmp_path, monkeypatch):
    for name in ("channels", "depth", "entropy", "signal"):  # half of the time, and seen to below
        monkeypatch.setattr(f"common.analysis.plot_{name}", lambda *args: None)
    models, images, result = run_three(tmp_path)
    for model, found in zip(models, result["models"], strict=True):
        norms = len(norms_of(model.net))
        alone = 1 if model.name == "MoCo" else 0  # norms without a convolution
        assert [part["k"] for part in found["scale"]] == [0.25, 4.0]
        for part in found["scale"]:
            k = part["k"]
            assert (part["norms"], part["norms_rescaled"]) == (norms, norms - alone)
            assert part["outputs_change"] == 0  # of float32 networks too: k is a power of two
            before, after = part["entropies"]["before"], part["entropies"]["after"]
            assert before == found["mean"]["entropies"]
            assert before["scale_free"] == after["scale_free"]
            for estimator in ("gaussian", "knn"):
                # a norm of 3 channels has too few of them for three neighbours, and is not in that mean
                share = 1 if estimator == "knn" else (norms - alone) / norms
                for of, power in (("mu", 1), ("var", 2)):
                    moved = after["raw"][estimator][of] - before["raw"][estimator][of]
                    assert moved == pytest.approx(share * power * math.log(k), abs=2e-5)
            # the loss by its definition, of statistics that are scaled by hand
            net = rescaled(model.net, k, images["real"][:1].float())
            sums, slopes = {}, None
            for name, x in images.items():
                x = x.float().requires_grad_()
                terms = with_statistics(net)(x)[1][:, 0]
                loss = 5 * terms[0] + terms[1:].sum()
                sums[name] = loss.item()
                if name == "noise":
                    slopes = torch.autograd.grad(loss, x)[0].norm().item()
            assert part["range"]["before"] == found["signal"]["range"]
            assert part["range"]["after"] == pytest.approx(sums["noise"] / sums["real"], rel=1e-4)
            assert part["gradient"]["before"] == found["signal"]["gradient_total"]
            assert part["gradient"]["after"] == pytest.approx(slopes, rel=1e-4)
            assert abs(math.log(part["gradient"]["after"] / part["gradient"]["before"])) > math.log(2)


def test_a_change_of_the_outputs_is_reported(monkeypatch):
    """As the largest change relative to the largest output: here of a network that does not stay the same function."""

    class Scaled(nn.Module):
        def __init__(self, net, factor):
            super().__init__()
            self.net, self.factor = net, factor

        def forward(self, x):
            return self.net(x) * self.factor

    def broken(net, k, x):
        return Scaled(copy.deepcopy(net), torch.tensor([1.0] * (net.dim - 1) + [k]))

    monkeypatch.setattr("common.analysis.rescaled", broken)
    net, x = uneven(ResNet("resnet10", width=4)), torch.randn(2, 3, 8, 8)
    edges = {kind: dict.fromkeys(("mu", "var"), torch.linspace(0, 1, 3)) for kind in ("raw", "scale_free")}
    before = dict(noise=dict(loss=6.0, gradient_total=5.0), real=2.0, outputs=net(x), entropies="as given")
    for k in (0.25, 4.0):
        found = scale_argument(net, k, dict(noise=x, real=x), before, with_statistics, 10.0, edges)
        share = (net(x)[:, -1].abs().max() / net(x).abs().max()).item()
        assert found["outputs_change"] == near(abs(k - 1) * share)
        assert (found["range"]["before"], found["gradient"]["before"]) == (3, 5)
        assert found["entropies"]["before"] == "as given"


@pytest.mark.slow
def test_flat_and_broken_statistics_reach_the_file_as_null(tmp_path):
    """Of a network as it is built (means 0, variances 1), a dead one, and one with a NaN: no word of warning."""
    nets = [ResNet("resnet10", width=4).eval() for _ in range(3)]
    for norm in norms_of(nets[1]):
        norm.running_var.zero_()
    nets[2].bn1.running_mean[0] = math.nan
    nets[2].layer1[0].bn1.running_var[:] = math.inf
    nets[2].layer4[0].bn2.running_var[1] = 0
    models = [Model(f"net {i}", "supervised", 4, net) for i, net in enumerate(nets)]
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings(), figures() as drawn:
        warnings.simplefilter("error")
        result = analyse(models, dict(noise=x, real=x), with_statistics, lambda net: x, tmp_path, "flat")
    text = (tmp_path / "analysis.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == result
    flat, dead, broken = result["models"]
    none = dict(mu=None, var=None)
    zero = dict(mu=0.0, var=0.0)
    assert flat["mean"]["entropies"]["raw"] == dict(gaussian=none, knn=none, histogram=zero)
    assert flat["mean"]["raw_cv_sigma"] == 0 and flat["mean"]["raw_kurtosis_mu"] is None
    assert [layer["dead"] for layer in dead["layers"]] == [layer["channels"] for layer in dead["layers"]]
    assert dead["mean"]["entropies"]["scale_free"] == dict(gaussian=none, knn=none, histogram=none)
    assert broken["layers"][0]["raw_std_mu"] is None and broken["signal"]["noise"] is None
    assert broken["layers"][2]["raw_std_mu"] == 0
    assert [layer["dead"] for layer in broken["layers"]] == [0] * 10 + [1, 0]
    (line,) = drawn["statistics_channels"].axes[2 * 8 + 6].get_lines()  # mu / sigma of the deep layer: a gap
    assert [math.isnan(y) for y in line.get_ydata()] == [False, True] + [False] * 30
    assert "| net 2 | - |" in summary_table(result)


def test_what_cannot_be_analysed_is_refused(tmp_path):
    model, x = Model("a", "b", 1, uneven(ResNet("resnet10", width=4))), torch.randn(2, 3, 8, 8)

    def call(models):
        return analyse(models, dict(noise=x, real=x), with_statistics, lambda net: x, tmp_path, "")

    refuse(lambda: call([]), "models")
    refuse(lambda: call([model, model]), "a, a", "name")
    refuse(lambda: call([Model("c", "b", 1, nn.Conv2d(3, 3, 1))]), "BatchNorm2d")


def test_the_table_has_a_row_for_each_model():
    def model(name, mu, var, **numbers):
        entropies = {
            "raw": dict(gaussian=dict(mu=mu, var=var), knn=dict(mu=90, var=91)),
            "scale_free": dict(gaussian=dict(mu=mu + 1, var=var + 1), knn=dict(mu=92, var=93)),
        }
        signals = dict(noise=123.456, real=0.01234, recovered=7.0, range=10004.5) | numbers
        return dict(name=name, mean=dict(entropies=entropies, raw_cv_sigma=0.456), signal=signals)

    lines = summary_table(dict(models=[model("a b", 1.234, -2.5), model("c", 0.0, 3.0, range=None)])).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        *("model", "H(mu) raw", "H(mu) scale-free", "H(var) raw", "H(var) scale-free", "CV of sigma"),
        *("noise", "real", "recovered", "noise / real"),
    ]
    assert lines[1] == "|" + "---|" * 10
    assert lines[2] == "| a b | 1.23 | 2.23 | -2.50 | -1.50 | 0.46 | 123 | 0.0123 | 7 | 1e+04 |"
    assert lines[3] == "| c | 0.00 | 1.00 | 3.00 | 4.00 | 0.46 | 123 | 0.0123 | 7 | - |"


# ------------------------------------------------------------------------------------------------------------ the plots


def test_a_family_has_a_colour_and_its_small_models_a_lighter_one():
    facts = [
        ("m8", "moco2", 8),
        ("s16", "supervised", 16),
        ("d", "dino", 4),
        ("m4", "moco2", 4),
        ("s8", "supervised", 8),
    ]
    styles = line_styles(facts)
    light = {name: sum(style["color"]) for name, style in styles.items()}
    assert light["m4"] > light["m8"] and light["s8"] > light["s16"]
    assert styles["s16"]["color"] == matplotlib.colors.to_rgb("tab:blue")
    assert len({styles[name]["color"] for name in ("m8", "s16", "d")}) == 3
    looks = {(style["color"], style["ls"], style["marker"]) for style in styles.values()}
    assert len(looks) == 5
    assert line_styles(facts[::-1]) == styles  # not by the order of the models


def test_the_deep_layer_is_the_last_that_is_no_shortcut():
    names = ["bn1", "layer4.0.bn1", "layer4.0.bn2", "layer4.0.downsample.1"]
    assert deep_layer([(name, None, None) for name in names]) == 2
    assert deep_layer([(name, None, None) for name in names[:3]]) == 2
    assert deep_layer([("downsample.1", None, None)]) == 0


def lines_of(panel):
    """y of every line with a name that is not matplotlib's own."""
    return {line.get_label(): line.get_ydata().tolist() for line in panel.get_lines()}


def panels_of(figure):
    return {panel.get_title(): panel for panel in figure.axes}


def test_the_plots_show_the_numbers(three):
    folder, models, _, result, drawn = three
    names = ["statistics_channels", "statistics_depth", "statistics_entropy", "statistics_signal"]
    assert sorted(drawn) == names
    for name in names:
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "a title" in drawn[name].get_suptitle()

    # channels: rows are models, columns mu, var, mu / sigma, var / mean of the first norm and of the deep one
    grid = drawn["statistics_channels"].axes
    assert len(grid) == 8 * len(models)
    for row, model in enumerate(models):
        layers = statistics_of(model.net)
        place = [name for name, _, _ in layers].index(("1." if model.name == "MoCo" else "") + "layer4.0.bn2")
        wanted = []
        for _, mu, var in (layers[0], layers[place]):
            wanted += [mu.tolist(), var.tolist(), *free(mu.tolist(), var.tolist())]
        for column, v in enumerate(wanted):
            (line,) = grid[8 * row + column].get_lines()
            assert line.get_ydata().tolist() == pytest.approx(v, rel=1e-12)
            assert grid[8 * row + column].get_ylim() == grid[column].get_ylim()  # shared among models
        assert grid[8 * row].get_ylabel() == model.name
    titles = [panel.get_title() for panel in grid[:8]]
    half = [(True, False)] * 2 + [(False, True)] * 2
    assert [("raw" in title, "scale-free" in title) for title in titles] == half * 2
    assert [title.startswith("first") for title in titles] == [True] * 4 + [False] * 4

    # depth
    panels = panels_of(drawn["statistics_depth"])
    wanted = {
        "std of $\\mu$\n(raw)": "raw_std_mu",
        "std of $\\mu/\\sigma$\n(scale-free)": "scale_free_std_mu",
        "std of $\\sigma^2$\n(raw)": "raw_std_var",
        "std of $\\sigma^2/$mean\n(scale-free)": "scale_free_std_var",
        "excess kurtosis of $\\mu$\n(raw)": "raw_kurtosis_mu",
        "excess kurtosis of $\\mu/\\sigma$\n(scale-free)": "scale_free_kurtosis_mu",
        "max / median of $\\sigma^2$\n(raw = scale-free)": "raw_max_over_median_var",
        "coefficient of variation of $\\sigma$\n(raw = scale-free)": "raw_cv_sigma",
        "excess kurtosis of $\\sigma^2$\n(raw = scale-free)": "raw_kurtosis_var",
    }
    assert set(panels) == set(wanted)
    for title, measure in wanted.items():
        assert lines_of(panels[title]) == {
            model["name"]: [layer[measure] for layer in model["layers"]] for model in result["models"]
        }
        assert all(line.get_xdata()[0] == 1 for line in panels[title].get_lines())
    assert len(drawn["statistics_depth"].legends) == 1

    # entropy
    panels = panels_of(drawn["statistics_entropy"])
    assert len(panels) == 12
    words = {"gaussian": "Gaussian", "knn": "nearest neighbour", "histogram": "histogram"}
    symbols = {("raw", "mu"): "$\\mu$ (raw)", ("scale_free", "mu"): "$\\mu/\\sigma$ (scale-free)"}
    symbols |= {("raw", "var"): "$\\sigma^2$ (raw)", ("scale_free", "var"): "$\\sigma^2/$mean (scale-free)"}
    moco, large, small = result["models"]
    for (kind, of), symbol in symbols.items():
        for estimator, word in words.items():
            panel = panels[f"{word}, {symbol}"]
            h = [model["mean"]["entropies"][kind][estimator][of] for model in (moco, small, large)]
            assert lines_of(panel) == dict(moco2=h[:1], supervised=h[1:])  # in order of size
            assert [line.get_xdata().tolist() for line in panel.get_lines()] == [[6], [4, 8]]
    assert len(drawn["statistics_entropy"].legends) == 1

    # signal
    left, right = drawn["statistics_signal"].axes
    for y, model in enumerate(result["models"]):
        values = [model["signal"][key] for key in ("noise", "real", "recovered")]
        points = {
            line.get_marker(): line.get_xdata()[0]
            for line in left.get_lines()
            if len(line.get_xdata()) == 1 and line.get_ydata()[0] == y
        }
        assert points == dict(zip("os^", values, strict=True))
    assert [text.get_text() for text in left.texts] == [f"{model['signal']['range']:.3g}" for model in result["models"]]
    legend = dict(zip([t.get_text() for t in left.get_legend().get_texts()], "os^", strict=True))
    assert legend == dict(noise="o", real="s", recovered="^")
    assert [label.get_text() for label in left.get_yticklabels()] == ["MoCo", "large", "small"]
    assert left.get_xscale() == right.get_yscale() == "log"
    assert lines_of(right) == {model["name"]: model["signal"]["gradient"] for model in result["models"]}
