"""common/models.py: sizes of the specification, torchvision's ResNets, the ConvNet written out naively."""

import pytest
import torch
import torchvision
from torch import nn

from common.models import RESNETS, ConvNet, ResNet, apply_chunked, convnet_depth

F64 = torch.float64


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def shake(net):
    """Random norm weights and statistics, so that nothing hides behind ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            names = ["weight", "bias"] + (["running_mean", "running_var"] if isinstance(module, nn.BatchNorm2d) else [])
            for name in names:
                getattr(module, name).data.copy_(torch.rand(len(module.weight), generator=generator) + 0.5)
    return net


# ------------------------------------------------------------------------------------------------------------ the sizes


@pytest.mark.parametrize(
    ("size", "widths", "dim", "millions"),
    [
        (32, (128, 256, 512), 8192, 5.675520),
        (64, (64, 128, 256, 512), 8192, 5.747712),
        (224, (32, 64, 128, 256, 512), 25088, 14.4),  # the specification gives three digits
    ],
)
def test_convnet_has_the_published_size(size, widths, dim, millions):
    net = ConvNet(3, size, 512, widths)
    digits = 6 if size < 224 else 1
    assert round(count(net) / 1e6, digits) == millions
    assert net.dim == dim and convnet_depth(size) == len(widths)
    x = torch.zeros(1, 3, size, size)
    assert net.eval().features(x).shape == (1, dim)
    assert net(x).shape == (1, 512)


def test_depth_leaves_a_map_at_every_size():
    for size in (8, 12, 16, 28, 32, 47, 48, 64, 95, 96, 128, 224, 256):
        depth = convnet_depth(size)
        assert 2 <= size >> depth <= 8
        assert ConvNet(1, size, 3, (2,) * depth)(torch.zeros(1, 1, size, size)).shape == (1, 3)


def test_resnets_have_the_published_sizes():
    assert round(count(ResNet("resnet10")) / 1e6, 2) == 4.90
    assert round(count(ResNet("resnet18")) / 1e6, 1) == 11.2


@pytest.mark.parametrize(("size", "padding", "stem", "last"), [(32, 2, 34, 5), (64, 2, 66, 9), (32, 1, 32, 4)])
def test_stem_padding_enlarges_the_maps(size, padding, stem, last):
    options = {} if padding == 2 else {"stem_padding": padding}  # 2 is the default
    net, sizes = ResNet("resnet10", width=4, **options), {}
    for name in ("conv1", "maxpool", "layer4"):
        net.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: sizes.update({name: out.shape[2:]}))
    net(torch.zeros(2, 3, size, size))
    assert sizes == {"conv1": (stem, stem), "maxpool": (stem, stem), "layer4": (last, last)}


# -------------------------------------------------------------------------------------------------------------- ResNets


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_is_torchvisions(arch):
    torch.manual_seed(0)
    theirs = shake(getattr(torchvision.models, arch)(weights=None)).to(F64).eval()
    theirs.fc = nn.Identity()
    ours = ResNet(arch, stem="imagenet").to(F64).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert ours.dim == theirs(x).shape[1]


def test_resnet_blocks_start_as_their_shortcuts_and_stems_by_fan_out():
    torch.manual_seed(0)
    for arch in RESNETS:
        net = ResNet(arch, width=8)
        last = "bn3" if arch == "resnet50" else "bn2"
        for name, parameter in net.named_parameters():
            if name.endswith(f"{last}.weight") and name.startswith("layer"):
                assert not parameter.any(), name
            elif parameter.ndim == 1 and name.endswith("weight"):
                assert (parameter == 1).all(), name
    weight = ResNet("resnet10", width=64).layer4[0].conv1.weight  # 256 to 512 channels, 3 x 3
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_resnet_takes_other_widths_and_channels():
    net = ResNet("resnet10", channels=1, width=4).eval()
    assert net.dim == 32 and ResNet("resnet50", width=4).dim == 128
    assert net.features(torch.zeros(3, 1, 8, 8)).shape == (3, 32)


# -------------------------------------------------------------------------------------------------------------- ConvNet


def naive_convnet(net, x, normalise):
    """Blocks by sums over the nine taps and by means over 2 x 2 squares."""
    state = net.state_dict()
    for block in range(len(net.blocks) // 4):
        weight, bias = state[f"blocks.{4 * block}.weight"], state[f"blocks.{4 * block}.bias"]
        n, _, height, width = x.shape
        padded = x.new_zeros(n, x.shape[1], height + 2, width + 2)
        padded[:, :, 1:-1, 1:-1] = x
        y = bias[None, :, None, None].expand(n, -1, height, width)
        for i in range(3):
            for j in range(3):
                part = padded[:, :, i : i + height, j : j + width]
                y = y + torch.einsum("ncij,oc->noij", part, weight[:, :, i, j])
        y = normalise(y, f"blocks.{4 * block + 1}", state).clamp(min=0)
        x = (y[:, :, ::2, ::2] + y[:, :, 1::2, ::2] + y[:, :, ::2, 1::2] + y[:, :, 1::2, 1::2]) / 4
    return x.reshape(len(x), -1) @ state["head.weight"].T + state["head.bias"]


def standardise(y, dims):
    mean = y.mean(dims, keepdim=True)
    return (y - mean) / ((y - mean).square().mean(dims, keepdim=True) + 1e-5).sqrt()


def affine(y, name, state):
    return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def running(y, name, state):
    mean, var = (state[f"{name}.running_{what}"][:, None, None] for what in ("mean", "var"))
    return affine((y - mean) / (var + 1e-5).sqrt(), name, state)


NORMS = {
    ("batch", "train"): lambda y, name, state: affine(standardise(y, (0, 2, 3)), name, state),
    ("batch", "eval"): running,
    ("instance", "train"): lambda y, name, state: affine(standardise(y, (2, 3)), name, state),
    ("instance", "eval"): lambda y, name, state: affine(standardise(y, (2, 3)), name, state),
    ("none", "eval"): lambda y, name, state: y,
}


@pytest.mark.parametrize(("norm", "mode"), NORMS)
def test_convnet_is_what_it_says(norm, mode):
    torch.manual_seed(0)
    net = shake(ConvNet(3, 8, 5, (4, 6), norm)).to(F64).train(mode == "train")
    x = torch.randn(3, 3, 8, 8, dtype=F64)
    expected = naive_convnet(net, x, NORMS[norm, mode])
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_features_are_the_input_of_the_head():
    net = ConvNet(1, 8, 3, (2, 4)).eval()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(net(x), net.features(x) @ net.head.weight.T + net.head.bias)
    assert net.features(x).shape == (5, net.dim)


# --------------------------------------------------------------------------------------------------------------- chunks


def test_apply_chunked_is_one_call_in_slices():
    rows, x = [], torch.randn(10, 3, requires_grad=True)

    def double(part):
        rows.append(len(part))
        return part * 2

    out = apply_chunked(double, x, chunk=4)
    assert torch.equal(out, x * 2) and not out.requires_grad
    assert rows == [4, 4, 2]
