"""FRePo's networks in common/models.py: each written out naively in float64, sizes and starts of the specification."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from torch import nn

from common.models import FREPO_STUDENTS, FlaxBatchNorm2d, FRePoConvNet, frepo_student
from common.run import seeded

F64 = torch.float64
NORMS = ("batch", "none")
CONV, DENSE = (nn.Conv2d,), (nn.Linear,)


def of(net, kinds):
    return [module for module in net.modules() if isinstance(module, kinds)]


def shake(net):
    """Random biases, norm weights and statistics of both signs, so that nothing hides behind ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    for module in of(net, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
        for name in ("bias", "running_mean", "running_var"):
            if (tensor := getattr(module, name, None)) is not None:
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) - (0 if name == "running_var" else 0.5))
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            module.weight.data[0] *= -1
    return net


def small(norm="batch", channels=3, size=8, widths=(4, 6)):
    torch.manual_seed(0)
    return shake(FRePoConvNet(channels, size, 5, widths, norm)).to(F64)


def pool(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def normalise(x, norm):
    """norm: a BatchNorm2d, whose mode decides between the batch's statistics and the running ones."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    weight, bias, mean, var = (t[:, None, None] for t in (norm.weight, norm.bias, mean, var))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


# ------------------------------------------------------------------------------------------------------- the ConvNet


def naive_convnet(net, x):
    """norm of what block i > 0 is given; the nine taps over a map within zeros; ReLU; means of 2 x 2 squares."""
    norms, convs = of(net, (nn.BatchNorm2d,)), of(net, CONV)
    for i, conv in enumerate(convs):
        if i > 0 and norms:
            x = normalise(x, norms[i - 1])
        border = 3 if i == 0 and x.shape[1] == 1 else 1
        n, _, height, width = x.shape
        padded = x.new_zeros(n, x.shape[1], height + 2 * border, width + 2 * border)
        padded[:, :, border:-border, border:-border] = x
        rows, columns = height + 2 * border - 2, width + 2 * border - 2
        y = conv.bias[None, :, None, None]
        for a in range(3):
            for b in range(3):
                y = y + torch.einsum(
                    "ncij,oc->noij", padded[:, :, a : a + rows, b : b + columns], conv.weight[..., a, b]
                )
        x = pool(y.clamp(min=0)[:, :, : rows // 2 * 2, : columns // 2 * 2])
    return x.flatten(1)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("channels", "size", "widths"), [(3, 8, (4, 6)), (1, 4, (4, 6)), (2, 20, (3, 4, 5))])
def test_convnet_is_what_it_says(norm, mode, channels, size, widths):
    """Values and all gradients, through ReLU in place and the norm in front of the convolution."""
    net = small(norm, channels, size, widths).train(mode == "train")
    assert len(of(net, (nn.BatchNorm2d,))) == (len(widths) - 1 if norm == "batch" else 0)
    x = torch.randn(3, channels, size, size, dtype=F64, requires_grad=True)
    features = naive_convnet(net, x)
    scores = features @ net.head.weight.T + net.head.bias
    torch.testing.assert_close(net(x), scores, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net.features(x), features, rtol=1e-12, atol=1e-12)
    assert features.shape == (3, net.dim)
    of_all = [x, *net.parameters()]
    ours = torch.autograd.grad(net(x).square().sum(), of_all)
    for a, b in zip(ours, torch.autograd.grad(scores.square().sum(), of_all), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("channels", "size", "widths", "dim"),
    [
        (1, 28, (128, 256, 512), 8192),
        (1, 32, (128, 256, 512), 8192),
        (3, 32, (128, 256, 512), 8192),
        (3, 64, (128, 256, 512, 1024), 16384),
        (3, 128, (128, 256, 512, 1024, 2048), 32768),
    ],
)
def test_published_sizes(channels, size, widths, dim):
    with torch.device("meta"):
        net = FRePoConvNet(channels, size, 10, widths)
        assert net.features(torch.empty(2, channels, size, size)).shape == (2, dim)
    assert net.dim == net.head.in_features == dim
    pairs = list(zip((channels, *widths[:-1]), widths, strict=True))
    expected = sum(9 * a * b + b for a, b in pairs) + sum(2 * width for width in widths[:-1]) + 10 * dim + 10
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


# ------------------------------------------------------------------------------------------------------------ BatchNorm


def test_running_statistics_are_flaxs():
    """After every step 0.1 old + 0.9 batch, channel by channel, with the variance over n (not n - 1)."""
    torch.manual_seed(0)
    norm = FlaxBatchNorm2d(3).to(F64)
    mean, var = [0.0] * 3, [1.0] * 3  # Flax's start
    for step in range(4):
        x = torch.randn(2, 3, 1, 2, dtype=F64) * (step + 1) + step  # 4 values: n against n - 1 is 25 %
        norm(x)
        for c in range(3):
            values = x[:, c].flatten().tolist()
            centre = sum(values) / 4
            mean[c] = 0.1 * mean[c] + 0.9 * centre
            var[c] = 0.1 * var[c] + 0.9 * sum((value - centre) ** 2 for value in values) / 4
        torch.testing.assert_close(norm.running_mean, torch.tensor(mean, dtype=F64), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, torch.tensor(var, dtype=F64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.eval()(x), normalise(x, norm), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, torch.tensor(mean, dtype=F64), rtol=1e-12, atol=1e-12)
    assert norm.eps == 1e-5


def test_the_statistics_are_of_the_pooled_map_in_front_of_each_convolution():
    net = small("batch", 3, 8, (4, 6, 5))
    seen, old = [], [(norm.running_mean.clone(), norm.running_var.clone()) for norm in of(net, (nn.BatchNorm2d,))]
    for conv in of(net, CONV):
        conv.register_forward_hook(lambda _, __, out: seen.append(pool(out.detach().clamp(min=0))))
    net(torch.randn(6, 3, 8, 8, dtype=F64))
    for norm, (mean, var), x in zip(of(net, (nn.BatchNorm2d,)), old, seen[:-1], strict=True):
        rows = x.movedim(1, 0).flatten(1)
        torch.testing.assert_close(norm.running_mean, 0.1 * mean + 0.9 * rows.mean(1))
        torch.testing.assert_close(norm.running_var, 0.1 * var + 0.9 * rows.var(1, correction=0))


def test_two_forward_passes_may_come_before_one_backward_pass():
    """The running statistics must not be something that the backward pass keeps."""
    net = small()
    x, z = torch.randn(2, 3, 3, 8, 8, dtype=F64)
    parameters = list(net.parameters())
    together = torch.autograd.grad(net(x).square().sum() + net(z).square().sum(), parameters)
    parts = [torch.autograd.grad(net(part).square().sum(), parameters) for part in (x, z)]
    for whole, one, other in zip(together, *parts, strict=True):
        torch.testing.assert_close(whole, one + other)


def test_a_state_loads_strictly():
    net, other = small(), FRePoConvNet(3, 8, 5, (4, 6)).to(F64)
    net(torch.randn(3, 3, 8, 8, dtype=F64))
    other.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(3, 3, 8, 8, dtype=F64)
    assert torch.equal(other.eval()(x), net.eval()(x))
    assert torch.equal(other.train()(x), net.train()(x))


# ----------------------------------------------------------------------------------------------------------- the start


def check_truncated_normal(weight, variance):
    """The bound exactly; mean, variance and mass within a sigma up to 5 standard errors of so many draws."""
    n, sigma = weight.numel(), math.sqrt(variance) / 0.87962566
    weight = weight.detach().double()
    assert 1.9 * sigma < weight.abs().max() <= 2 * sigma * (1 + 1e-6)
    assert abs(weight.mean()) < 5 * math.sqrt(variance / n)
    kurtosis = 2.3656  # of a normal distribution cut off at two sigma, which gives the variance's error
    assert weight.var().item() == pytest.approx(variance, rel=5 * math.sqrt((kurtosis - 1) / n))
    inside = math.erf(1 / math.sqrt(2)) / math.erf(math.sqrt(2))
    found = (weight.abs() < sigma).double().mean().item()
    assert found == pytest.approx(inside, abs=5 * math.sqrt(inside * (1 - inside) / n))


@pytest.mark.parametrize("name", ["train", *FREPO_STUDENTS])
def test_start_is_flaxs(name):
    """A layer has 864 weights or more: without the rescaling after the cut 0.77 of the variance is far outside."""
    with seeded("start", name):
        if name == "train":
            net = FRePoConvNet(3, 32, 200, (64, 128, 64))
        else:
            net = frepo_student(name, 3, 32, 200, (64, 128, 64))
    gain = 2 if name == "dcconv" else 1
    for conv in of(net, CONV):
        fan_in = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        check_truncated_normal(conv.weight, gain / fan_in)
    check_truncated_normal(net.head.weight, 1 / net.dim)
    biases = [module.bias for module in of(net, CONV + DENSE) if module.bias is not None]
    assert (len(biases) == 1) == (name in ("dcconv", "resnet18_bn"))  # the head's alone
    biases = torch.cat(biases).detach()
    if name == "kipconv":
        n = len(biases)
        assert biases.std().item() == pytest.approx(0.1, rel=5 / math.sqrt(2 * n)) and biases.abs().max() > 0.25
        assert all(module.bias.all() for module in of(net, CONV + DENSE))
    else:
        assert not biases.any()
    norms = of(net, (nn.BatchNorm2d,))
    assert bool(norms) == (name in ("train", "resnet18_bn"))
    for norm in norms:
        assert (norm.weight == 1).all() and not norm.bias.any()
        assert not norm.running_mean.any() and (norm.running_var == 1).all()


@pytest.mark.parametrize("name", ["train", *FREPO_STUDENTS])
def test_start_comes_from_the_seed_and_the_layout_does_not_permute_it(name, monkeypatch):
    def make(seed):
        with seeded("start", seed):
            net = FRePoConvNet(3, 32, 5, (4, 6)) if name == "train" else frepo_student(name, 3, 32, 5, (4, 6))
        return net.state_dict()

    ours, again, other = make(0), make(0), make(1)
    first = next(key for key in ours if ours[key].ndim == 4)
    assert all(torch.equal(ours[key], again[key]) for key in ours) and not torch.equal(ours[first], other[first])
    assert ours[first].is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(nn.Module, "to", lambda net, **_: net)
    assert all(torch.equal(ours[key], value) for key, value in make(0).items())


# --------------------------------------------------------------------------------------------------------------- frozen


def value_and_gradient(features, x):
    x = x.clone().requires_grad_()
    out = features(x)
    weight = torch.linspace(-1, 2, out.numel(), dtype=F64, device=out.device).view_as(out)
    return out.detach(), torch.autograd.grad((out.double() * weight).sum(), x)[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("channels", "size", "widths"), [(3, 8, (4, 6)), (1, 4, (4, 6)), (2, 20, (3, 4, 5))])
def test_frozen_features_are_those_of_eval_mode(norm, channels, size, widths):
    net = small(norm, channels, size, widths)
    if norm == "batch":
        of(net, (nn.BatchNorm2d,))[0].running_var[0] = 0  # only eps is left
    x = torch.randn(5, channels, size, size, dtype=F64)
    frozen, before = net.frozen(), x.clone()
    ours = value_and_gradient(frozen, x)
    for theirs in (net.eval().features, lambda x: naive_convnet(net, x)):
        for a, b in zip(ours, value_and_gradient(theirs, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)
    assert ours[0].shape == (5, net.dim) and ours[1].abs().amax((1, 2, 3)).all()
    assert torch.equal(x, before)  # nothing in place on the images
    with torch.inference_mode():
        assert torch.equal(frozen(x), ours[0])


def test_frozen_features_treat_every_image_by_itself():
    frozen, x = small().frozen(), torch.randn(5, 3, 8, 8, dtype=F64)
    torch.testing.assert_close(frozen(x), torch.cat([frozen(part) for part in x.split(2)]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_a_frozen_network_takes_no_gradient_and_forgets_its_source(norm):
    net = small(norm)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    x = torch.randn(5, 3, 8, 8, dtype=F64, requires_grad=True)
    frozen = net.frozen()
    expected = frozen(x)
    expected.sum().backward()
    assert net.training and all(module.training for module in net.modules())
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())  # no statistics gathered
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert not frozen(x.detach()).requires_grad
    for tensor in [*net.parameters(), *net.buffers()]:  # an optimizer's step, new statistics
        tensor.data.mul_(2)
    assert torch.equal(frozen(x), expected)
    assert not torch.allclose(net.frozen()(x), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_frozen_maps_stay_bf16_and_as_exact_as_the_networks(norm):
    net = small(norm).float().eval()
    x = torch.randn(50, 3, 8, 8)
    exact = value_and_gradient(copy.deepcopy(net).double().features, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = value_and_gradient(net.frozen(), x), value_and_gradient(net.features, x)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    for value, other, truth in zip(ours, theirs, exact, strict=True):
        assert 1e-4 < (value - truth).norm() / truth.norm() < 1.2 * (other - truth).norm() / truth.norm()


def test_maps_are_channels_last(monkeypatch):
    layouts, conv2d, avg_pool2d = [], F.conv2d, F.avg_pool2d

    def watched(function, x, *args, **kwargs):
        out = function(x, *args, **kwargs)
        layouts.append((x.dtype, out.is_contiguous(memory_format=torch.channels_last)))
        return out

    net = small().float()
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: watched(conv2d, *args, **kwargs))
    monkeypatch.setattr(F, "avg_pool2d", lambda *args, **kwargs: watched(avg_pool2d, *args, **kwargs))
    x = torch.randn(2, 3, 8, 8)
    net.features(x)
    net.frozen()(x)
    assert layouts == [(torch.float32, True)] * 8
    layouts.clear()
    with torch.autocast("cpu", torch.bfloat16):
        net.frozen()(x)  # the norm's statistics are fp32
    assert layouts == [(torch.float32, True)] + [(torch.bfloat16, True)] * 3


# ----------------------------------------------------------------------------------------------------------- students


def plain(net, x, plan, grey):
    """plan: (padding, whether a pool follows) of each convolution; grey: padding of the first on grey images."""
    for i, (conv, (padding, pooled)) in enumerate(zip(of(net, CONV), plan, strict=True)):
        padding = grey if i == 0 and x.shape[1] == 1 else padding
        x = F.conv2d(x, conv.weight, conv.bias, padding=padding).clamp(min=0)
        x = F.avg_pool2d(x, 2) if pooled else x
    return x.flatten(1)


def residual(net, x):
    """Stem, then twice a stage: conv, ReLU, conv, added to what went in or its projection, ReLU; no pool at the end."""
    convs, norms = iter(of(net, CONV)), iter(of(net, (nn.BatchNorm2d,)))

    def conv(x, padding, stride=1):
        layer = next(convs)
        y = F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=padding)
        return normalise(y, norm) if (norm := next(norms, None)) else y

    x = conv(x, 1).clamp(min=0)
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            y = conv(conv(x, 1, stride).clamp(min=0), 1)
            x = conv(x, 0, stride) if y.shape != x.shape else x
            x = (x + y).clamp(min=0)
    assert next(convs, None) is None and next(norms, None) is None
    return x.flatten(1)


NAIVE = {
    "conv": lambda net, x: plain(net, x, [(1, True)] * 3, 3),
    "dcconv": lambda net, x: plain(net, x, [(1, True)] * 3, 3),
    "kipconv": lambda net, x: plain(net, x, [(1, False)] + [(1, True)] * 3, 3),
    "frepo_alexnet": lambda net, x: plain(net, x, [(2, True), (2, True), (1, False), (1, False), (1, True)], 4),
    "frepo_vgg11": lambda net, x: plain(net, x, [(1, pooled) for pooled in (1, 1, 0, 1, 0, 1, 0, 1)], 3),
    "resnet18": residual,
    "resnet18_bn": residual,
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 45)])
@pytest.mark.parametrize("name", FREPO_STUDENTS)
def test_students_are_what_they_say(name, channels, size, mode):
    torch.manual_seed(0)
    net = shake(frepo_student(name, channels, size, 5, (8, 12, 10))).to(F64).train(mode == "train")
    x = torch.randn(3, channels, size, size, dtype=F64)
    before = x.clone()
    features = NAIVE[name](net, x)
    torch.testing.assert_close(net.features(x), features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net(x), features @ net.head.weight.T + net.head.bias, rtol=1e-10, atol=1e-10)
    assert features.shape == (3, net.dim) and features.any(1).all()
    assert torch.equal(x, before)


def test_no_student_is_left_out():
    assert list(NAIVE) == list(FREPO_STUDENTS)


STAGES = [(64, 3)] * 5 + [(128, 3), (128, 3), (128, 1), (128, 3), (128, 3)]  # (channels, kernel) as the modules stand
STAGES += [(256, 3), (256, 3), (256, 1), (256, 3), (256, 3), (512, 3), (512, 3), (512, 1), (512, 3), (512, 3)]


@pytest.mark.parametrize(
    ("name", "layers", "dim"),
    [
        ("conv", [(128, 3), (256, 3), (512, 3)], 8192),
        ("dcconv", [(128, 3)] * 3, 2048),
        ("kipconv", [(128, 3)] * 4, 2048),
        ("frepo_alexnet", [(128, 5), (192, 5), (256, 3), (192, 3), (192, 3)], 3072),
        ("frepo_vgg11", [(128, 3)] * 8, 128),
        ("resnet18", STAGES, 8192),
        ("resnet18_bn", STAGES, 8192),
    ],
)
def test_students_have_the_published_channels(name, layers, dim):
    for channels, size in ((1, 28), (3, 32)):
        with torch.device("meta"):
            net = frepo_student(name, channels, size, 10, (128, 256, 512))
        assert [(conv.out_channels, conv.kernel_size[0]) for conv in of(net, CONV)] == layers
        assert net.head.out_features == 10
        assert net.dim == (4 * 4 * 512 if name[:6] == "resnet" else dim)
        assert all((conv.bias is None) == (name in ("dcconv", "resnet18_bn")) for conv in of(net, CONV))
        norms = [norm.num_features for norm in of(net, (FlaxBatchNorm2d,))]
        assert norms == ([channels for channels, _ in layers] if name == "resnet18_bn" else [])
        assert not [module for module in of(net, (nn.BatchNorm2d,)) if type(module) is nn.BatchNorm2d]


@pytest.mark.parametrize(
    ("widths", "name", "expected"),
    [
        ((32, 64), "conv", [32, 64]),
        ((32, 64), "dcconv", [32, 32]),
        ((32, 64, 1), "kipconv", [32] * 4),
        ((32, 64), "frepo_alexnet", [32, 48, 64, 48, 48]),
        ((3, 6), "frepo_alexnet", [3, 4, 6, 4, 4]),  # 192 * 3 / 128 = 4.5
        ((5, 6), "frepo_alexnet", [5, 8, 10, 8, 8]),  # 7.5
        ((1, 2), "frepo_vgg11", [1] * 8),
        ((16, 32), "resnet18", [8] * 5 + [16] * 5 + [32] * 5 + [64] * 5),
        ((1, 2), "resnet18_bn", [1] * 5 + [1] * 5 + [2] * 5 + [4] * 5),  # 64 / 128 would round to none
    ],
)
def test_the_first_width_scales_the_channels(widths, name, expected):
    net = frepo_student(name, 3, 32, 10, widths)
    assert [conv.out_channels for conv in of(net, CONV)] == expected


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "channels", "widths", "smallest"),
    [
        ("conv", 3, (2, 2, 2), 8),
        ("conv", 1, (2, 2, 2), 4),
        ("dcconv", 3, (2, 2), 4),
        ("kipconv", 3, (2, 2, 2), 8),
        ("frepo_alexnet", 3, (2, 2), 8),
        ("frepo_alexnet", 1, (2, 2), 4),
        ("frepo_vgg11", 3, (2, 2), 32),
        ("frepo_vgg11", 1, (2, 2), 28),
    ],
)
def test_a_network_too_deep_for_the_images_names_the_smallest(name, channels, widths, smallest):
    net = frepo_student(name, channels, smallest, 3, widths)
    assert net(torch.zeros(1, channels, smallest, smallest)).shape == (1, 3) and net.dim > 0
    words = ("--eval-models", name, f"{smallest - 1} px", f"at least {smallest} px")
    refuse(lambda: frepo_student(name, channels, smallest - 1, 3, widths), *words)


def test_resnets_take_the_smallest_images():
    for name in ("resnet18", "resnet18_bn"):
        for size in (1, 2, 3):
            net = frepo_student(name, 1, size, 3, (2,))
            assert net(torch.zeros(2, 1, size, size)).shape == (2, 3)


def test_an_unknown_name_lists_the_known():
    refuse(lambda: frepo_student("vgg11", 3, 32, 10, (2, 2)), "--eval-models vgg11", *FREPO_STUDENTS)


# ---------------------------------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the same on a GPU needs a GPU")
@pytest.mark.parametrize("norm", NORMS)
def test_the_same_on_a_gpu(norm):
    net, x = small(norm), torch.randn(10, 3, 8, 8, dtype=F64)
    twin = copy.deepcopy(net).cuda()
    torch.testing.assert_close(twin(x.cuda()).cpu(), net(x), rtol=1e-10, atol=1e-10)  # and moves the statistics
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(value.cpu(), net.state_dict()[key], rtol=1e-10, atol=1e-10)
    for a, b in zip(value_and_gradient(twin.frozen(), x.cuda()), value_and_gradient(net.frozen(), x), strict=True):
        torch.testing.assert_close(a.cpu(), b.to(a.dtype), rtol=1e-10, atol=1e-10)
