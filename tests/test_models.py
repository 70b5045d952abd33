"""common/models.py: sizes of the specification, torchvision's ResNets, the ConvNet written out naively."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import refuse
from torch import nn

import common.models
from common.models import RESNETS, ConvNet, ResNet, apply_chunked, convnet_depth, features_chunked, frepo_student

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


# -------------------------------------------------------------------------------------------------------- memory layout


@pytest.mark.parametrize("make", [lambda: ConvNet(3, 8, 2, (4, 6)), lambda: ResNet("resnet10", width=4)])
def test_maps_are_channels_last_and_features_in_the_order_of_nchw(make):
    torch.manual_seed(0)
    net, layouts = make().eval(), []
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(net.features(x), plain.features(x), rtol=1e-4, atol=1e-5)
    assert layouts and all(layouts)
    net.load_state_dict(plain.state_dict())  # a file may hold either layout
    assert net.state_dict()[next(k for k in net.state_dict() if k.endswith("weight"))].stride(1) == 1


def test_the_layout_does_not_permute_the_random_weights(monkeypatch):
    for make in (lambda: ConvNet(3, 8, 2, (4, 6)), lambda: ResNet("resnet10", width=4)):
        torch.manual_seed(0)
        ours = make().state_dict()
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "to", lambda net, **_: net)
            torch.manual_seed(0)
            assert all(torch.equal(ours[key], value) for key, value in make().state_dict().items())


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_relu_in_place_changes_no_gradient(norm):
    torch.manual_seed(0)
    net = shake(ConvNet(3, 8, 5, (8, 16), norm))
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = torch.randn(6, 3, 8, 8)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for one, images in zip((net, twin), inputs, strict=True):
        one(images).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad) and inputs[0].grad.any()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# --------------------------------------------------------------------------------------------------------------- frozen


def trained(norm, channels=3, size=8, widths=(4, 6)):
    """In training mode, with gradients of its own."""
    torch.manual_seed(0)
    net = shake(ConvNet(channels, size, 5, widths, norm)).to(F64)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean -= 1  # of both signs
            module.running_var[0] = 0  # only eps is left
            module.weight.data[1] = -0.5
    return net


def value_and_gradient(features, x, weight=None):
    x = x.clone().requires_grad_()
    out = features(x)
    weight = torch.linspace(-1, 2, out.numel(), dtype=F64).view_as(out)
    return out.detach(), torch.autograd.grad((out.double() * weight).sum(), x)[0]


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize(("channels", "size", "widths"), [(3, 8, (4, 6)), (1, 8, (4, 6)), (2, 20, (3, 4, 5))])
def test_frozen_features_are_those_of_eval_mode(norm, channels, size, widths):
    net = trained(norm, channels, size, widths)
    x = torch.randn(5, channels, size, size, dtype=F64)
    frozen, before = net.frozen(), x.clone()
    ours = value_and_gradient(frozen, x)
    theirs = value_and_gradient(net.eval().features, x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ours[0].shape == (5, net.dim) and ours[1].abs().amax((1, 2, 3)).all()
    with torch.inference_mode():
        assert torch.equal(frozen(x), ours[0])
    assert torch.equal(x, before)  # nothing in place on the images


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_a_frozen_network_takes_no_gradient_and_forgets_its_source(norm):
    net = trained(norm)
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


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_folding_loses_no_precision_under_bf16(norm):
    net = trained(norm).float().eval()
    x = torch.randn(50, 3, 8, 8)
    exact = value_and_gradient(copy.deepcopy(net).double().features, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = value_and_gradient(net.frozen(), x), value_and_gradient(net.features, x)
    assert ours[0].dtype == theirs[0].dtype and ours[1].dtype == torch.float32
    for value, other, truth in zip(ours, theirs, exact, strict=True):
        assert 1e-4 < (value - truth).norm() / truth.norm() < max(0.01, 1.2 * (other - truth).norm() / truth.norm())


def test_frozen_maps_are_channels_last(monkeypatch):
    layouts, conv2d = [], F.conv2d

    def watched(*args, **kwargs):
        out = conv2d(*args, **kwargs)
        layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        return out

    monkeypatch.setattr(F, "conv2d", watched)
    for norm in ("batch", "instance", "none"):
        trained(norm).frozen()(torch.randn(2, 3, 8, 8, dtype=F64))
    assert layouts == [True] * 6


# --------------------------------------------------------------------------------------------------------------- chunks


def test_apply_chunked_is_one_call_in_slices():
    rows, x = [], torch.randn(10, 3, requires_grad=True)

    def double(part):
        rows.append(len(part))
        return part * 2

    out = apply_chunked(double, x, chunk=4)
    assert torch.equal(out, x * 2) and not out.requires_grad
    assert rows == [4, 4, 2]


def test_chunks_give_the_same_value_and_gradient():
    frozen = trained("batch").frozen()
    x = torch.randn(10, 3, 8, 8, dtype=F64)
    for chunk in (1, 3, 5, 9, 10, 99):  # 3 leaves a ragged chunk of one
        sizes = []

        def watched(part, sizes=sizes):
            sizes.append(len(part))
            return frozen(part)

        ours = value_and_gradient(lambda x, f=watched, chunk=chunk: features_chunked(f, x, chunk), x)
        for a, b in zip(ours, value_and_gradient(frozen, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        parts = [len(part) for part in x.split(chunk)]
        assert sorted(sizes) == sorted(parts * (1 if chunk >= 10 else 2))  # what fits at once is computed once
    assert torch.equal(features_chunked(frozen, x, 3), torch.cat([frozen(part) for part in x.split(3)]))
    assert not features_chunked(frozen, x, 3).requires_grad


def test_chunks_are_computed_again_in_the_precision_they_had():
    frozen = trained("batch").float().frozen()
    x = torch.randn(10, 3, 8, 8)

    def gradient(chunk):
        images, kinds = x.clone().requires_grad_(), []

        def watched(part):
            kinds.append(torch.is_autocast_enabled("cpu"))
            return frozen(part)

        with torch.autocast("cpu", torch.bfloat16):
            out = features_chunked(watched, images, chunk)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()  # outside of autocast, as a ridge
        assert all(kinds) and len(kinds) == (1 if chunk >= 10 else 2 * -(-10 // chunk))
        return images.grad

    torch.testing.assert_close(gradient(3), gradient(10), rtol=0.05, atol=0.05)


PEAK = r"""
import re, torch
from pathlib import Path
from common.models import ConvNet, features_chunked
torch.set_num_threads(1)
features = ConvNet(3, 32, 1, (16, 32)).frozen()
def step(n, chunk):
    x = torch.randn(n, 3, 32, 32, requires_grad=True)
    torch.autograd.grad(features_chunked(features, x, chunk).square().mean(), x)
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
start = step(8, 4)  # what is loaded on first use is no memory of the step
chunked = step(512, 8) - start
print(chunked, step(512, 512) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory that Linux tells")
def test_chunks_need_the_memory_of_one():
    root = Path(common.models.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=root, capture_output=True, text=True, check=True)
    chunked, whole = map(int, done.stdout.split())
    assert chunked < 0.6 * whole, (chunked, whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the same on a GPU needs a GPU")
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_frozen_and_chunked_features_on_a_gpu(norm):
    net = trained(norm)
    x = torch.randn(10, 3, 8, 8, dtype=F64)
    expected = value_and_gradient(net.frozen(), x)
    frozen, images = net.cuda().frozen(), x.cuda().requires_grad_()
    out = features_chunked(frozen, images, 4)
    weight = torch.linspace(-1, 2, out.numel(), dtype=F64).view_as(out)
    gradient = torch.autograd.grad((out.cpu() * weight).sum(), images)[0]
    torch.testing.assert_close(out.cpu(), expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient.cpu(), expected[1], rtol=1e-10, atol=1e-10)


def test_narrow_resnets_do_not_crash_on_large_maps():
    """A strided convolution with kernel 1 did, in a process of its own so that a crash is a failure."""
    code = """if True:
        import torch
        from common.models import ResNet
        net = ResNet("resnet10", 3, 4)
        net(torch.ones(128, 3, 64, 64)).sum().backward()
        print("alive")
    """
    env = os.environ | {
        "PYTHONPATH": str(Path(common.models.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "MALLOC_CHECK_": "3",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr


def test_the_shortcut_is_a_strided_convolution():
    """What torchvision's ResNets, whose files load here, compute."""
    torch.manual_seed(0)
    net = ResNet("resnet10", 3, 4).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)  # odd maps as well
    block, seen = net.layer2[0], {}
    block.downsample.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    block.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    net(x)
    conv, norm = block.downsample
    expected = norm(F.conv2d(seen["x"], conv.weight, stride=2))
    torch.testing.assert_close(seen["output"], expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("name", "size"), [("lenet", 32), ("conv", 4)])
def test_errors_of_students_name_the_flag_that_asked(name, size):
    assert refuse(lambda: frepo_student(name, 3, size, 10, (2, 2, 2))).startswith(f"--eval-models {name}: ")
    line = refuse(lambda: frepo_student(name, 3, size, 10, (2, 2, 2), flag="--models"))
    assert line.startswith(f"--models {name}: ")
