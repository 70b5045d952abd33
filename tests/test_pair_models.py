"""Networks for (image, feature) pairs: each written out naively in float64, sizes and starts of the specification."""

import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import refuse
from torch import nn

from common.artefact import fit_pairs
from common.data import load, normalise
from common.models import PAIR_NETS, ResNet, ViT, convnet_depth, pair_net
from common.run import UserError, seeded

F64 = torch.float64
WIDTHS = {8: (16, 32), 28: (16, 32, 32), 32: (16, 32, 32), 64: (8, 16, 16, 16)}  # an eighth of the published ones


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def of(net, kinds):
    return [module for module in net.modules() if isinstance(module, kinds)]


def shake(net):
    """Random biases, positions, norm weights and statistics of both signs: nothing hides behind ones and zeros."""
    generator = torch.Generator().manual_seed(1)

    def draw(tensor, low, high):
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith("running_var"):
            draw(tensor, 0.5, 1.5)
        elif name.endswith("positions") or (tensor.ndim == 1 and "bias" in name) or name.endswith("running_mean"):
            draw(tensor, -0.5, 0.5)
        elif tensor.ndim == 1:  # the weight of a norm
            draw(tensor, 0.5, 1.5)
            tensor.data[0] *= -1
    return net


def make(name, channels=3, size=8, out=5, widths=None, norm="batch"):
    with seeded("pair net", name):
        return pair_net(name, channels, size, out, widths or WIDTHS[size], norm)


# ------------------------------------------------------------------------------------------------------ written naively


def convolve(x, weight, bias, padding, stride=1):
    """Every output pixel as the sum over the taps of the kernel, on the image within zeros."""
    n, channels, height, width = x.shape
    kernel = weight.shape[2]
    padded = x.new_zeros(n, channels, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    rows = (height + 2 * padding - kernel) // stride + 1
    y = x.new_zeros(n, len(weight), rows, rows)
    for i in range(kernel):
        for j in range(kernel):
            part = padded[:, :, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (rows - 1) + 1 : stride]
            y = y + torch.einsum("ncij,oc->noij", part, weight[:, :, i, j])
    return y if bias is None else y + bias[None, :, None, None]


def batch_norm(y, name, state, train):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if train:
        mean = y.mean((0, 2, 3))
        var = (y - mean[:, None, None]).square().mean((0, 2, 3))
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    mean, var, weight, bias = (t[:, None, None] for t in (mean, var, weight, bias))
    return (y - mean) / (var + 1e-5).sqrt() * weight + bias


def halve(x, largest):
    """The largest or the mean of 2 x 2 pixels; an odd last row and column are dropped."""
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    corners = torch.stack([x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)])
    return corners.amax(0) if largest else corners.mean(0)


def naive_convnet(state, x, train):
    for i in range(0, 4 * sum(1 for key in state if key.endswith("running_mean")), 4):
        x = convolve(x, state[f"blocks.{i}.weight"], state[f"blocks.{i}.bias"], 1)
        x = halve(batch_norm(x, f"blocks.{i + 1}", state, train).clamp(min=0), largest=False)
    return x.flatten(1)


# after which convolutions, counted from 0, the pools stand: by hand, the published lists and the rule for small maps
POOLS = {
    ("vgg11", 8): (0, 1, 7),  # 8, 4, 2 px, then 1
    ("vgg11", 16): (0, 1, 3, 7),
    ("vgg11", 28): (0, 1, 3, 7),  # 28, 14, 7, 3 px, then 1
    ("vgg11", 32): (0, 1, 3, 5, 7),
    ("vgg11", 64): (0, 1, 3, 5, 7),
    ("alexnet", 8): (0, 1, 4),
    ("alexnet", 16): (0, 1, 4),
    ("alexnet", 28): (0, 1, 4),
    ("alexnet", 32): (0, 1, 4),
    ("alexnet", 64): (0, 1, 4),
}
SIDES = {("vgg11", 64): 2, ("alexnet", 16): 2, ("alexnet", 28): 3, ("alexnet", 32): 4, ("alexnet", 64): 8}  # else 1


def naive_stack(name):
    def features(state, x, train):
        convs = sorted(int(key.split(".")[1]) for key in state if key.endswith("weight") and state[key].ndim == 4)
        pools = POOLS[name, x.shape[2]]
        for i, place in enumerate(convs):
            weight = state[f"layers.{place}.weight"]
            x = convolve(x, weight, state[f"layers.{place}.bias"], {3: 1, 5: 2}[weight.shape[2]])
            x = batch_norm(x, f"layers.{place + 1}", state, train).clamp(min=0)
            if i in pools:
                x = halve(x, largest=True)
        return x.flatten(1)

    return features


def naive_resnet(blocks):
    def features(state, x, train):
        x = batch_norm(convolve(x, state["conv1.weight"], None, 2), "bn1", state, train).clamp(min=0)
        for stage in (1, 2, 3, 4):
            for block in range(blocks):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                y = convolve(x, state[f"{name}.conv1.weight"], None, 1, stride)
                y = batch_norm(y, f"{name}.bn1", state, train).clamp(min=0)
                y = batch_norm(convolve(y, state[f"{name}.conv2.weight"], None, 1), f"{name}.bn2", state, train)
                if stride == 2:
                    x = convolve(x, state[f"{name}.downsample.0.weight"], None, 0, 2)
                    x = batch_norm(x, f"{name}.downsample.1", state, train)
                x = (x + y).clamp(min=0)
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3])

    return features


# of the blocks, counted from 0: those of stride 2 and those whose shortcut is a projection
MOBILE = {8: ((3, 6), (0, 1, 10, 13, 16)), 28: ((3, 6, 13), (0, 1, 10, 16)), 64: ((3, 6, 13), (0, 1, 10, 16))}


def depthwise(x, weight, stride):
    """Each channel with its own 3 x 3 kernel, on the map within one pixel of zeros."""
    channels = [convolve(x[:, c : c + 1], weight[c : c + 1], None, 1, stride) for c in range(x.shape[1])]
    return torch.cat(channels, 1)


def naive_mobilenet(state, x, train):
    strided, projected = MOBILE[x.shape[2]]

    def norm(y, name):
        return batch_norm(y, name, state, train)

    x = norm(convolve(x, state["layers.0.weight"], None, 1), "layers.1").clamp(min=0)
    for block in range(17):
        name = f"layers.{3 + block}"
        y = norm(convolve(x, state[f"{name}.conv1.weight"], None, 0), f"{name}.bn1").clamp(min=0)
        assert y.shape[1] == x.shape[1] * (2 if block else 1)
        y = norm(depthwise(y, state[f"{name}.conv2.weight"], 2 if block in strided else 1), f"{name}.bn2").clamp(min=0)
        y = norm(convolve(y, state[f"{name}.conv3.weight"], None, 0), f"{name}.bn3")
        if block in strided:
            x = y
        elif block in projected:
            x = y + norm(convolve(x, state[f"{name}.downsample.0.weight"], None, 0), f"{name}.downsample.1")
        else:
            x = y + x
    x = norm(convolve(x, state["layers.20.weight"], None, 0), "layers.21").clamp(min=0)
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


PATCHES = {8: (4, 2), 20: (7, 3), 28: (7, 4), 32: (8, 4), 64: (8, 8)}  # patches in a row, px of one


def layer_norm(x, name, state):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(x, name, state, heads=3):
    """One query, one head at a time."""
    rows = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    dim = x.shape[2]
    q, k, v = rows[..., :dim], rows[..., dim : 2 * dim], rows[..., 2 * dim :]
    images = []
    for image in range(len(x)):
        tokens = []
        for token in range(x.shape[1]):
            mixed = []
            for head in range(heads):
                part = slice(head * dim // heads, (head + 1) * dim // heads)
                scores = (k[image, :, part] @ q[image, token, part]) / math.sqrt(dim / heads)
                weights = scores.exp() / scores.exp().sum()
                mixed.append(weights @ v[image, :, part])
            tokens.append(torch.cat(mixed))
        images.append(torch.stack(tokens))
    return torch.stack(images) @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def naive_vit(state, x, train):
    side, patch = PATCHES[x.shape[2]]
    before = -(-(side * patch - x.shape[2]) // 2)  # px of zeros on the left and on top
    whole = x.new_zeros(*x.shape[:2], side * patch + 1, side * patch + 1)
    whole[:, :, before : before + x.shape[2], before : before + x.shape[2]] = x
    tokens = []
    for i in range(side):
        for j in range(side):
            part = whole[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            embedded = torch.einsum("ncij,dcij->nd", part, state["patches.weight"]) + state["patches.bias"]
            tokens.append(embedded + state["positions"][i * side + j])
    x = torch.stack(tokens, 1)
    for layer in range(6):
        name = f"layers.{layer}"
        x = x + attention(layer_norm(x, f"{name}.norm1", state), f"{name}.self_attn", state)
        y = layer_norm(x, f"{name}.norm2", state) @ state[f"{name}.linear1.weight"].T + state[f"{name}.linear1.bias"]
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + y @ state[f"{name}.linear2.weight"].T + state[f"{name}.linear2.bias"]
    return batch_norm(x.transpose(1, 2)[..., None], "norm", state, train).sum((2, 3)) / side**2


NAIVE = {
    "convnet": naive_convnet,
    "vgg11": naive_stack("vgg11"),
    "alexnet": naive_stack("alexnet"),
    "mobilenet": naive_mobilenet,
    "resnet10": naive_resnet(1),
    "resnet18": naive_resnet(2),
    "vit": naive_vit,
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 28), (3, 64)])
@pytest.mark.parametrize("name", PAIR_NETS)
def test_network_is_what_it_says(name, channels, size, train):
    net = shake(make(name, channels, size)).to(F64).train(train)
    x = torch.randn(3, channels, size, size, dtype=F64, generator=torch.Generator().manual_seed(2))
    state = {key: value.clone() for key, value in net.state_dict().items()}  # before the statistics move
    expected = NAIVE[name](state, x, train)
    with torch.set_grad_enabled(train):  # without gradients torch has another path for the transformer's layers
        features, outputs = net.features(x), net(x)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs, expected @ state["head.weight"].T + state["head.bias"], rtol=1e-10, atol=1e-10)
    assert features.shape == (3, net.dim) and outputs.shape == (3, 5)
    assert features.std(0).min() > 1e-3 or name != "vit"  # the images differ in every feature


def test_mobilenet_does_not_cut_large_values():
    """ReLU as KRR-ST's, not the ReLU6 of MobileNetV2 as published."""
    net = shake(make("mobilenet")).to(F64)
    for norm in of(net, nn.BatchNorm2d):
        norm.weight.data *= 20
    x = torch.randn(3, 3, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(2))
    expected = naive_mobilenet({key: value.clone() for key, value in net.state_dict().items()}, x, True)
    torch.testing.assert_close(net.features(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [20, 32])
def test_vit_with_other_patches(size):
    with seeded("vit", size):
        net = shake(ViT(2, size, 4, 24)).to(F64).eval()
    x = torch.randn(2, 2, size, size, dtype=F64, generator=torch.Generator().manual_seed(3))
    expected = naive_vit(net.state_dict(), x, False)
    torch.testing.assert_close(net.features(x), expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------ the sizes


def published(name, size, widths, channels=3, out=512):
    with torch.device("meta"):
        net = pair_net(name, channels, size, out, widths)
        assert net.features(torch.empty(2, channels, size, size)).shape == (2, net.dim)
        assert net(torch.empty(2, channels, size, size)).shape == (2, out)
    assert net.head.in_features == net.dim and net.head.out_features == out
    return net.dim, count(net) - count(net.head)


@pytest.mark.parametrize(
    ("name", "at_32", "at_64", "millions"),
    [
        ("vgg11", 512, 2048, 9.23),  # KRR-ST's table is of 64 px and without the head
        ("alexnet", 3072, 12288, 1.84),
        ("mobilenet", 1280, 1280, 1.08),
        ("resnet10", 512, 512, 4.90),
        ("resnet18", 512, 512, 11.17),
    ],
)
def test_published_sizes(name, at_32, at_64, millions):
    (dim, numbers), (large, same) = published(name, 32, (128, 256, 512)), published(name, 64, (64, 128, 256, 512))
    assert (dim, large) == (at_32, at_64)
    assert numbers == same and round(numbers / 1e6, 2) == millions


def test_published_sizes_to_the_last_number():
    """3 x 3 or 5 x 5 kernels with biases and two numbers a channel of BatchNorm."""

    def stack(plan):
        return sum(k * k * a * b + 3 * b for a, b, k in plan)

    chain = (3, 64, 128, 256, 256, 512, 512, 512, 512)
    assert published("vgg11", 32, (128, 256, 512))[1] == stack([*zip(chain, chain[1:], [3] * 8, strict=False)])
    alexnet = [(3, 128, 5), (128, 192, 5), (192, 256, 3), (256, 192, 3), (192, 192, 3)]
    assert published("alexnet", 32, (128, 256, 512))[1] == stack(alexnet)
    # each block: 1x1 to t times the channels, 3x3 on each, 1x1; two numbers a channel of every BatchNorm; a projection
    rows = [(1, 32, 16), (2, 16, 24), (2, 24, 24), (2, 24, 32), *[(2, 32, 32)] * 2, (2, 32, 64), *[(2, 64, 64)] * 3]
    rows += [(2, 64, 96), *[(2, 96, 96)] * 2, (2, 96, 160), *[(2, 160, 160)] * 2, (2, 160, 320)]
    blocks = sum(t * a * a + 9 * t * a + t * a * b + 4 * t * a + 2 * b for t, a, b in rows)
    projections = sum(a * b + 2 * b for a, b in ((32, 16), (16, 24), (64, 96), (160, 320)))
    whole = (27 * 32 + 2 * 32) + blocks + projections + (320 * 1280 + 2 * 1280)
    assert published("mobilenet", 64, (64, 128, 256, 512)) == (1280, whole) and whole == 1_079_504
    assert published("convnet", 32, (128, 256, 512)) == (8192, 5675520 - 8193 * 512)
    layer = 4 * 192**2 + 4 * 192 + 8 * 192**2 + 5 * 192 + 4 * 192  # attention, the two linear layers, the two norms
    # patches, positions, layers, last norm
    assert published("vit", 32, (128, 256, 512)) == (192, 48 * 192 + 192 + 64 * 192 + 6 * layer + 2 * 192)


@pytest.mark.parametrize(
    ("size", "widths"),
    [(8, (128, 256)), (28, (128, 256, 512)), (64, (64, 128, 256, 512)), (224, (32, 64, 128, 256, 512))],
)
def test_published_first_width_gives_the_published_channels(size, widths):
    assert convnet_depth(size) == len(widths)
    for name, first, dim in (
        ("vgg11", 64, 512),
        ("alexnet", 128, 192),
        ("mobilenet", 32, 1280),
        ("resnet10", 64, 512),
        ("resnet18", 64, 512),
    ):
        with torch.device("meta"):
            net = pair_net(name, 1, size, 7, widths)
        assert of(net, nn.Conv2d)[0].out_channels == first
        side = 1 if name in ("mobilenet", "resnet10", "resnet18") else size // (32 if name == "vgg11" else 8) or 1
        assert net.dim == dim * side**2
    assert published("vit", size, widths)[0] == 192


@pytest.mark.parametrize(
    ("first", "vgg", "alexnet", "mobile", "resnet", "vit"),
    [
        (32, (16, 128), (32, 48, 64, 48, 48), (8, 4, 6, 8, 16, 24, 40, 80, 320), 16, 48),  # a quarter
        (48, (24, 192), (48, 72, 96, 72, 72), (12, 6, 9, 12, 24, 36, 60, 120, 480), 24, 72),
        # 150 is 6.25 times 24; 12.5 channels become 12, 18.75 become 19
        (100, (50, 400), (100, 150, 200, 150, 150), (25, 12, 19, 25, 50, 75, 125, 250, 1000), 50, 144),
        # 0.5 channels become one, 1.5 two; at least 8 numbers a head
        (1, (1, 4), (1, 2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 1, 2, 10), 1, 24),
    ],
)
def test_narrow_pools_have_narrow_students(first, vgg, alexnet, mobile, resnet, vit):
    def channels(name):
        return [conv.out_channels for conv in of(pair_net(name, 1, 8, 3, (first, 5)), nn.Conv2d)]

    assert (channels("vgg11")[0], channels("vgg11")[-1]) == vgg
    assert tuple(channels("alexnet")) == alexnet
    layers = pair_net("mobilenet", 1, 8, 3, (first, 5)).layers
    lasts = [layers[0], *[layers[i].conv3 for i in (3, 5, 8, 12, 15, 18, 19)], layers[20]]
    assert tuple(conv.out_channels for conv in lasts) == mobile
    for name in ("resnet10", "resnet18"):
        assert channels(name)[0] == resnet and pair_net(name, 1, 8, 3, (first, 5)).dim == 8 * resnet
    assert pair_net("vit", 1, 8, 3, (first, 5)).dim == vit


@pytest.mark.parametrize("size", [8, 12, 16, 20, 28, 32, 47, 48, 64, 95, 96, 128, 224, 256])
@pytest.mark.parametrize("name", PAIR_NETS)
def test_every_size_works_and_no_convolution_sees_one_pixel(name, size):
    net = pair_net(name, 1, size, 3, (2,) * convnet_depth(size)).eval()
    seen = []
    for conv in of(net, nn.Conv2d):
        conv.register_forward_hook(lambda conv, inputs, _: seen.append((conv.kernel_size[0], inputs[0].shape[2])))
    assert net.features(torch.zeros(1, 1, size, size)).shape == (1, net.dim)
    assert all(side >= 2 for kernel, side in seen if kernel > 1)
    if (name, size) in POOLS:
        assert net.dim == of(net, nn.Conv2d)[-1].out_channels * SIDES.get((name, size), 1) ** 2
        assert len(of(net, nn.MaxPool2d)) == len(POOLS[name, size])


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        (4, (4, 2, 2, 2)),
        (8, (8, 4, 2, 2)),
        (9, (9, 5, 3, 2)),
        (28, (28, 14, 7, 4)),
        (32, (32, 16, 8, 4)),
        (64, (64, 32, 16, 8)),
        (224, (224, 112, 56, 28)),
    ],
)
def test_maps_of_the_mobilenet(size, sides):
    net, seen = pair_net("mobilenet", 1, size, 3, (2,) * convnet_depth(size)).eval(), []
    for layer in net.layers:
        layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[2]))
    net(torch.zeros(1, 1, size, size))
    a, b, c, d = sides  # of the stem and three blocks, of three, of seven, of four and the last convolution and pool
    assert seen == [a] * 7 + [b] * 3 + [c] * 7 + [d] * 7


@pytest.mark.parametrize("name", PAIR_NETS)
def test_one_pair_can_be_learned(name):
    """A last batch may hold one image: BatchNorm needs two values a channel."""
    net = make(name, 1, 8)
    net(torch.randn(1, 1, 8, 8)).square().sum().backward()


def test_unknown_names_are_refused_in_one_line():
    refuse(lambda: pair_net("lenet", 3, 32, 10, (8, 8, 8)), "--eval-models lenet: not one of", "timm:NAME", *PAIR_NETS)
    refuse(lambda: pair_net("resnet50", 3, 32, 10, (8, 8, 8)), "--eval-models resnet50")
    refuse(lambda: pair_net("resnet50", 3, 32, 10, (8, 8, 8), flag="--models"), "--models resnet50: not one of")


def test_the_norm_is_of_the_convnet():
    assert len(of(make("convnet", norm="instance"), nn.GroupNorm)) == 2
    assert not of(make("convnet", norm="none"), (nn.GroupNorm, nn.BatchNorm2d))
    for name in ("vgg11", "alexnet", "mobilenet", "resnet10", "resnet18"):
        net = make(name, norm="none")
        assert of(net, nn.BatchNorm2d) and not of(net, nn.GroupNorm)


# ------------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("name", PAIR_NETS)
def test_start_comes_from_the_seed_and_the_layout_does_not_permute_it(name, monkeypatch):
    def state(seed):
        with seeded("start", seed):
            return pair_net(name, 3, 32, 5, WIDTHS[32]).state_dict()

    ours, again, other = state(0), state(0), state(1)
    first = next(key for key in ours if ours[key].ndim == 4)
    assert all(torch.equal(ours[key], again[key]) for key in ours) and not torch.equal(ours[first], other[first])
    assert ours[first].is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(nn.Module, "to", lambda net, **_: net)
    assert all(torch.equal(ours[key], value) for key, value in state(0).items())


def check_uniform(weight, bound):
    weight = weight.detach().double()
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 * math.sqrt(0.2 / weight.numel()))


@pytest.mark.parametrize("name", PAIR_NETS)
def test_start_is_torchs_but_for_the_resnets_blocks(name):
    """torch's: uniform within fan_in^-1/2, biases as well. ResNets: normal, variance 2 / fan-out, last norms zero."""
    net = make(name, 3, 32, 200)
    for key, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and "layer" in key and name.startswith("resnet"):
            variance = 2 / (module.out_channels * module.kernel_size[0] ** 2)
            weight = module.weight.detach()
            assert weight.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / weight.numel()))
            assert weight.abs().max() > 2.2 * math.sqrt(variance)  # no uniform distribution
        elif isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and "out_proj" not in key):
            bound = module.weight[0].numel() ** -0.5
            check_uniform(module.weight, bound)
            if module.bias is not None:
                assert module.bias.abs().max() <= bound and module.bias.any()
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (module.weight == (0 if name.startswith("resnet") and key.endswith("bn2") else 1)).all()
            assert not module.bias.any() and not module.running_mean.any() and (module.running_var == 1).all()
    biases = [conv.bias is not None for conv in of(net, nn.Conv2d)]
    assert not any(biases) if name in ("mobilenet", "resnet10", "resnet18") else all(biases)


def test_the_layers_of_the_vit_start_differently():
    net = make("vit", 3, 32)
    firsts = [net.layers[i].self_attn.in_proj_weight for i in range(6)]
    assert len(net.layers) == 6
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    assert net.positions.std().item() == pytest.approx(0.5, rel=0.1) and net.positions.shape == (64, 24)
    assert all(part.p == 0 for part in of(net, nn.Dropout)) and all(
        layer.self_attn.dropout == 0 for layer in net.layers
    )


# -------------------------------------------------------------------------------------------------- layout and training


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", PAIR_NETS)
def test_features_do_not_depend_on_the_layout(name, size):
    net = shake(make(name, 3, size)).eval()
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = plain.features(x)
        for images in (x, x.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(net.features(images), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("name", PAIR_NETS)
def test_gradients_reach_every_parameter(name):
    """All but those that the loss cannot depend on: biases before a BatchNorm, the keys' bias before a softmax.

    Of a MobileNet, the biases of what leaves a block: only 1x1 convolutions lie between them and the next BatchNorm.
    """
    net = shake(make(name, 3, 32)).to(F64)
    x = torch.randn(6, 3, 32, 32, dtype=F64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    outputs = net(x)
    (outputs * torch.linspace(-1, 2, outputs.numel(), dtype=F64).view_as(outputs)).sum().backward()
    norms = bool(of(net, nn.BatchNorm2d))
    idle = {f"{key}.bias" for key, part in net.named_modules() if norms and isinstance(part, nn.Conv2d)}
    if name == "mobilenet":
        idle |= {f"{key}.bias" for key, _ in net.named_modules() if key.endswith(("bn3", "downsample.1"))}
    idle.add("layers.5.linear2.bias" if name == "vit" else "")
    for key, parameter in net.named_parameters():
        gradient = parameter.grad.abs()
        if key in idle:
            assert gradient.max() < 1e-9, key
        elif key.endswith("in_proj_bias"):
            dim = net.dim
            assert gradient[dim : 2 * dim].max() < 1e-9 < gradient[:dim].min() and gradient[2 * dim :].min() > 1e-9
        else:
            assert gradient.max() > 1e-6, key
            if parameter.ndim == 4 and parameter.shape[2] == 3:
                assert gradient.amax((0, 1)).min() > 1e-6, key  # every tap
    assert x.grad.abs().amax((0, 1)).min() > 0  # and every pixel


@pytest.fixture(scope="module")
def digits():
    """64 digits and features of a ResNet-10 with random weights, whose scale is that of a teacher's: spread 0.5."""
    data = load("digits")
    x = normalise(data.x_train[:64], data.mean, data.std)
    with seeded("teacher"):
        teacher = shake(ResNet("resnet10", data.channels, 4))
    with torch.no_grad():
        y = teacher.train()(x)
    return x, (y - y.mean(0)) / y.std() * 0.5 + 0.5


# (mean squared error after 50 steps) / (that of predicting the mean): found for four seeds with a margin
BELOW = dict(convnet=0.6, vgg11=0.5, alexnet=0.95, mobilenet=0.3, resnet10=0.85, resnet18=0.8, vit=0.75)


@pytest.mark.parametrize("name", PAIR_NETS)
def test_fifty_steps_of_the_published_schedule_learn_digits(name, digits):
    x, y = digits
    net = make(name, 1, 8, y.shape[1], (32, 64))
    last = fit_pairs(net, x, y, steps=50)
    assert last < BELOW[name] * float(y.var(0, correction=0).mean()), last
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    assert F.mse_loss(net(x), y) < 2 * last


# ----------------------------------------------------------------------------------------------------------------- timm


class Foreign(nn.Module):
    """Stands for a network of timm: a map of side `side`, BatchNorm, mean; `gives` makes of that what it returns."""

    def __init__(self, in_chans, num_classes, side=1, gives=None):
        super().__init__()
        assert num_classes == 0
        self.conv, self.norm = nn.Conv2d(in_chans, 6, 3), nn.BatchNorm2d(6)
        self.side, self.gives, self.seen = side, gives or (lambda y: y), []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled(), tuple(x.shape), bool(x.any())))
        y = self.norm(F.adaptive_avg_pool2d(self.conv(x), self.side))
        return self.gives(F.elu(y).mean((2, 3)))


class Sized(Foreign):
    def __init__(self, img_size, **options):
        super().__init__(**options)
        self.img_size = img_size


def broken(**options):
    raise TypeError("depth is None\nand more lines")


FOREIGN = {
    "plain": Foreign,
    "plain_large": lambda **options: Foreign(side=3, **options),
    "sized": Sized,
    "maps": lambda **options: Foreign(gives=lambda y: y[:, :, None, None], **options),
    "pairs": lambda **options: Foreign(gives=lambda y: (y, y), **options),
    "one_row": lambda **options: Foreign(gives=lambda y: y[:1], **options),
    "empty": lambda **options: Foreign(gives=lambda y: y[:, :0], **options),
    "broken": broken,
}


@pytest.fixture
def timm(monkeypatch):
    """A timm that knows FOREIGN; calls: what it was asked for."""
    fake = types.ModuleType("timm")
    fake.calls = []

    def create_model(name, pretrained=True, **options):
        fake.calls.append((name, pretrained, options))
        return FOREIGN[name](**options)

    fake.create_model, fake.is_model, fake.list_models = create_model, FOREIGN.__contains__, lambda: list(FOREIGN)
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def test_timm_is_asked_for_untrained_networks_without_classifier(timm):
    net = make("timm:plain", 2, 28, 5)
    options = dict(in_chans=2, num_classes=0)
    assert timm.calls == [("plain", False, options | {"img_size": 28}), ("plain", False, options)]
    assert net.dim == 6 and net.net.seen == [(False, False, (2, 2, 28, 28), False)]  # eval mode, no gradients, blank
    assert all(part.training for part in net.modules())
    assert net.net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not net.net.norm.running_mean.any() and all(p.requires_grad for p in net.parameters())
    timm.calls.clear()
    assert make("timm:sized", 1, 64).net.img_size == 64
    assert timm.calls == [("sized", False, dict(in_chans=1, num_classes=0, img_size=64))]


def test_timm_networks_have_a_linear_head(timm):
    net = shake(make("timm:plain", 3, 8, 200)).to(F64)
    x = torch.randn(4, 3, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(6))
    state = net.state_dict()
    for train in (True, False):
        y = convolve(x, state["net.conv.weight"], state["net.conv.bias"], 0).mean((2, 3), keepdim=True)
        y = batch_norm(y, "net.norm", {key: value.clone() for key, value in state.items()}, train)[:, :, 0, 0]
        y = torch.where(y > 0, y, y.exp() - 1)
        net.train(train)
        outputs = y @ state["head.weight"].T + state["head.bias"]
        before = copy.deepcopy(net)
        torch.testing.assert_close(net.features(x), y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(before(x), outputs, rtol=1e-10, atol=1e-10)
        state = net.state_dict()
    check_uniform(make("timm:plain", 3, 8, 200).head.weight, 6**-0.5)


def test_timm_networks_start_from_the_seed(timm):
    ours, again = make("timm:sized").state_dict(), make("timm:sized").state_dict()
    with seeded("another"):
        other = pair_net("timm:sized", 3, 8, 5, (2, 2)).state_dict()
    for key in ("net.conv.weight", "head.weight", "head.bias"):
        assert torch.equal(ours[key], again[key]) and not torch.equal(ours[key], other[key])


def test_one_image_trains_a_timm_network_as_it_would_by_itself(timm):
    x = torch.randn(1, 3, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(7))
    net = shake(make("timm:plain_large")).to(F64)
    alone, weights = copy.deepcopy(net), torch.linspace(-1, 2, 6, dtype=F64)
    ours, theirs = net.features(x), alone.net(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    (ours @ weights).square().sum().backward()
    (theirs @ weights).square().sum().backward()
    for ours, theirs in zip(net.net.parameters(), alone.net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)
    assert net.net.norm.weight.grad.abs().min() > 1e-3
    torch.testing.assert_close(net.net.norm.running_mean, alone.net.norm.running_mean, rtol=1e-10, atol=1e-10)
    net.eval().features(x)
    net.train().features(torch.cat([x, x, x]))
    assert [shape[0] for _, _, shape, _ in net.net.seen[1:]] == [2, 1, 3]  # copies only where they are needed
    assert make("timm:plain")(x.float()).shape == (1, 5)  # a map of one pixel: torch refuses one image
    with pytest.raises(ValueError, match="more than 1 value"):
        make("timm:plain").net(x.float())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maps", ("gives (2, 6, 1, 1) for 2 images", "take another")),
        ("pairs", ("gives tuple for 2 images", "take another")),
        ("one_row", ("gives (1, 6) for 2 images", "take another")),
        ("empty", ("gives (2, 0) for 2 images", "take another")),
        ("broken", ("does not work with 3 x 8 x 8 images (depth is None);", "take another network or another size")),
        ("siced", ("no such network; similar: sized",)),
        ("", ("no such network; timm.list_models()",)),
        ("hf_hub:someone/plain", ("no such network",)),  # nothing is downloaded, no file of a folder read
    ],
)
def test_timm_networks_that_cannot_be_used_are_refused_in_one_line(timm, name, words):
    refuse(lambda: make(f"timm:{name}"), f"--eval-models timm:{name}: ", *words)
    refuse(lambda: pair_net(f"timm:{name}", 3, 8, 5, (2, 2), flag="--models"), f"--models timm:{name}: ", *words)
    assert len(timm.calls) == (2 if name == "broken" else 4 if name in FOREIGN else 0)  # img_size was not the cause


def test_images_too_small_for_a_timm_network(timm):
    refuse(lambda: pair_net("timm:plain", 1, 2, 5, (2,)), "timm:plain: does not work with 1 x 2 x 2 images (", "Kernel")


def test_without_timm_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    text = "--models timm:resnet18: timm is not installed; pip install timm"
    with pytest.raises(UserError) as caught:
        pair_net("timm:resnet18", 3, 8, 5, (2, 2), flag="--models")
    assert str(caught.value) == text
    monkeypatch.delitem(sys.modules, "timm")
    (tmp_path / "timm.py").write_text("import a_module_that_timm_would_need")
    monkeypatch.syspath_prepend(tmp_path)
    refuse(lambda: make("timm:resnet18"), "--eval-models timm:resnet18: timm cannot be imported", "a_module_that_timm")


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto"])
def test_networks_of_timm_itself(name, size):
    library = pytest.importorskip("timm")
    net = make(f"timm:{name}", 1, size)
    with seeded("pair net", f"timm:{name}"):
        options = dict(img_size=size) if name.startswith("vit") else {}
        theirs = library.create_model(name, in_chans=1, num_classes=0, **options).eval()
    x = torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(net.eval().features(x), expected, rtol=1e-3, atol=1e-4)
    assert net.dim == expected.shape[1]
    for images in (x, x[:1]):
        net.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
