"""The networks: the field's ConvNet, the ResNets of the teachers, FRePo's ConvNet and evaluation networks, KRR-ST's.

Networks of timm can be had too (timm_net). Every one has `features(x) -> (N, d)` and `dim`, which is d.

Weights are channels-last and the maps take the layout of the weights, whatever the images have: on a CPU a ConvNet's
step needs about 0.75 of the default layout's time in fp32 and 0.65 in bf16, a ResNet's 0.75 and 0.85. Results are the
same up to rounding; (N, d) is in the order of (N, C, H, W) in either layout.
"""

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.run import UserError, first_line


def convnet_depth(size: int) -> int:
    """Blocks by image size, KRR-ST's 3 at 32 px, 4 at 64 and 5 at 224 continued; the last map is 2 to 7 px wide."""
    return 2 if size < 16 else 3 if size < 48 else 4 if size < 96 else 5


class ConvNet(nn.Module):
    """Blocks of conv 3x3 - norm - ReLU - 2x2 average pool, flattened, then one linear head.

    widths: channels of each block, (128, 256, 512) for KRR-ST at 32 px; norm: "batch", "instance" or "none";
    out: outputs of the head, classes or teacher dimensions.
    """

    def __init__(self, channels: int, size: int, out: int, widths: tuple[int, ...], norm: str = "batch"):
        super().__init__()
        norms = {
            "batch": nn.BatchNorm2d,
            "instance": lambda width: nn.GroupNorm(width, width),  # instance norm with affine weights
            "none": lambda width: nn.Identity(),
        }
        blocks = []
        for c_in, c_out in zip((channels, *widths[:-1]), widths, strict=True):
            # in place, one map less is written: backward needs the output of ReLU, not of the norm or the convolution
            blocks += [nn.Conv2d(c_in, c_out, 3, padding=1), norms[norm](c_out), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.blocks = nn.Sequential(*blocks)
        self.dim = widths[-1] * (size >> len(widths)) ** 2
        self.head = nn.Linear(self.dim, out)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, dim)."""
        return self.blocks(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    @torch.no_grad()
    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The features of the network as it stands: in eval mode, of copied weights that take no gradient.

        BatchNorm is folded into the convolutions: gamma (w x + b - mean) / std + beta is one affine map of x. Returns
        a function (N, C, H, W) -> (N, dim), differentiable with respect to the images.
        """
        layers = []
        for conv, norm in zip(self.blocks[::4], self.blocks[1::4], strict=True):
            weight, bias, affine = conv.weight.clone(), conv.bias.clone(), None
            if isinstance(norm, nn.BatchNorm2d):
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                weight, bias = weight * scale[:, None, None, None], (bias - norm.running_mean) * scale + norm.bias
            elif isinstance(norm, nn.GroupNorm):
                affine = norm.num_groups, norm.weight.clone(), norm.bias.clone(), norm.eps
            layers.append((weight, bias, affine))

        def features(x: Tensor) -> Tensor:
            for weight, bias, affine in layers:
                x = F.conv2d(x, weight, bias, padding=1)
                if affine:
                    x = F.group_norm(x, *affine)
                x = F.avg_pool2d(F.relu(x, inplace=True), 2)
            return x.flatten(1)

        return features


class BasicBlock(nn.Module):
    """norm: the class of its three norms; without one (nn.Identity) the convolutions have biases."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, norm: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        bias = norm is nn.Identity
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=bias)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        self.bn2 = norm(width)
        self.stride, self.downsample = stride, shortcut(c_in, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x[:, :, :: self.stride, :: self.stride])
        return F.relu(out + x)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.stride, self.downsample = stride, shortcut(c_in, width * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            x = self.downsample(x[:, :, :: self.stride, :: self.stride])
        return F.relu(out + x)


def shortcut(c_in: int, c_out: int, stride: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential | None:
    """The projection of a block that changes the shape, to be given every stride-th pixel.

    A convolution with kernel 1 and that stride is the same, but oneDNN (torch 2.11) writes out of bounds in its
    channels-last backward pass where it has 8 input channels or fewer and large maps.
    """
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=norm is nn.Identity), norm(c_out))


RESNETS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def resnet_dim(arch: str, width: int) -> int:
    """Features of a ResNet with `width` channels in its first stage."""
    return (width << 3) * RESNETS[arch][0].expansion


class ResNet(nn.Module):
    """ResNet-10/18/50 without a classifier, in torchvision's parameter names so that published files load.

    torchvision's own class fixes the width at 64 and the ImageNet stem; a CPU wants narrow teachers and the field
    wants the CIFAR stem.

    stem: "cifar" is conv 3x3 stride 1 with `stem_padding` and no max-pool (padding 2, as KRR-ST's and solo-learn's,
    turns 32 px into 34); "imagenet" is conv 7x7 stride 2 and a 3x3 max-pool. width: channels of the first stage.
    """

    def __init__(self, arch: str, channels: int = 3, width: int = 64, stem: str = "cifar", stem_padding: int = 2):
        super().__init__()
        block, depths = RESNETS[arch]
        if stem == "cifar":
            self.conv1 = nn.Conv2d(channels, width, 3, 1, stem_padding, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.bn1 = nn.BatchNorm2d(width)
        c_in = width
        for stage, depth in enumerate(depths):
            layers = []
            for i in range(depth):
                layers.append(block(c_in, width << stage, stride=2 if stage and i == 0 else 1))
                c_in = (width << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.dim = c_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)  # each block starts as its shortcut (KRR-ST's ResNets)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
        self.to(memory_format=torch.channels_last)  # last: the layout must not permute the random weights

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, dim), after the global average pool."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))

    forward = features


def replace_norms(net: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> list[nn.Module]:
    """Put make(norm) in the place of every BatchNorm2d of `net`; returns them in the order of registration."""
    norms = {name: make(part) for name, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)}
    for name, norm in norms.items():
        net.set_submodule(name, norm)
    return list(norms.values())


class FlaxBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with Flax's running statistics as FRePo's code sets them: 0.1 old + 0.9 batch, variance biased.

    torch's momentum 0.9 gives the same mean, but its variance is the unbiased one. `num_batches_tracked` is not kept.
    """

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same. In train mode N H W must be at least 2 (torch's ValueError)."""
        if not self.training:
            return super().forward(x)
        # buffers of this call alone: what the backward pass keeps must not be written to afterwards
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        out = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        n = x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
            self.running_var.mul_(1 - self.momentum).add_(var, alpha=self.momentum * (n - 1) / n)
        return out


@torch.no_grad()
def lecun_init(net: nn.Module) -> None:
    """Flax's default for every convolution and linear layer, drawn from torch's global generator; biases 0.

    LeCun normal: a normal distribution cut off at two of its standard deviations, which leaves 0.87962566 of the
    standard deviation, and scaled so that the variance after the cut is 1 / fan_in.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            sigma = module.weight[0].numel() ** -0.5 / 0.87962566
            nn.init.trunc_normal_(module.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def grey_margin(channels: int) -> int:
    """Pixels by which FRePo pads grey images more on every side, in the first convolution: 28 px become 32."""
    return 2 if channels == 1 else 0


class FRePoConvNet(nn.Module):
    """FRePo's network: blocks of [norm] - conv 3x3 - ReLU - 2x2 average pool, flattened, then one linear head.

    The norm stands before the convolution and the first block has none. Layer order and initialisation are those of
    FRePo's published code (README.md#frepo).

    widths: channels of each block, (128, 256, 512) at 32 px; norm: "batch" (training) or "none" (evaluation);
    out: outputs of the head, one for each class.
    """

    def __init__(self, channels: int, size: int, out: int, widths: tuple[int, ...], norm: str = "batch"):
        super().__init__()
        make_norm = {"batch": FlaxBatchNorm2d, "none": nn.Identity}[norm]
        c_ins, margin = (channels, *widths[:-1]), grey_margin(channels)
        self.norms = nn.ModuleList([nn.Identity(), *[make_norm(c_in) for c_in in c_ins[1:]]])
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, padding=1 if i else 1 + margin)
            for i, (c_in, c_out) in enumerate(zip(c_ins, widths, strict=True))
        )
        self.dim = widths[-1] * ((size + 2 * margin) >> len(widths)) ** 2
        self.head = nn.Linear(self.dim, out)
        lecun_init(self)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, dim)."""
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = F.avg_pool2d(F.relu(conv(norm(x)), inplace=True), 2)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    @torch.no_grad()
    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The features of the network as it stands: in eval mode, of copied weights that take no gradient.

        A norm before a convolution that pads with zeros cannot be folded into it (at the border its shift is missing),
        so it stays an affine map, of the pooled and hence small map: no measurable part of the time. addcmul instead of
        F.batch_norm is no faster in all, and under bf16 less exact. Returns a function (N, C, H, W) -> (N, dim),
        differentiable with respect to the images.
        """
        layers = []
        for norm, conv in zip(self.norms, self.convs, strict=True):
            affine = None
            if isinstance(norm, nn.BatchNorm2d):
                affine = [part.clone() for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
            layers.append((affine, conv.weight.clone(), conv.bias.clone(), conv.padding))

        def features(x: Tensor) -> Tensor:
            for affine, weight, bias, padding in layers:
                if affine:
                    x = F.batch_norm(x, *affine)  # eval mode and eps 1e-5, torch's defaults
                x = F.avg_pool2d(F.relu(F.conv2d(x, weight, bias, padding=padding), inplace=True), 2)
            return x.flatten(1)

        return features


class FlatNet(nn.Module):
    """Layers that end in a map of `dim` numbers, flattened, then one linear head.

    init: draws the weights anew; None leaves them as torch drew them.
    """

    def __init__(
        self, layers: list[nn.Module], dim: int, out: int, init: Callable[[nn.Module], None] | None = lecun_init
    ):
        super().__init__()
        self.layers, self.dim = nn.Sequential(*layers), dim
        self.head = nn.Linear(dim, out)
        if init:
            init(self)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, dim)."""
        return self.layers(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def plain_student(channels: int, size: int, out: int, plan: list[tuple[int, int, bool]], bias: bool) -> FlatNet:
    """Convolutions with ReLU, and 2x2 average pools between them.

    plan: (channels, kernel size, whether a pool follows) of every convolution.
    """
    layers, c_in, padding = [], channels, grey_margin(channels)
    side = size + 2 * padding
    for width, kernel, pool in plan:
        layers += [nn.Conv2d(c_in, width, kernel, padding=kernel // 2 + padding, bias=bias), nn.ReLU(inplace=True)]
        if pool:
            layers.append(nn.AvgPool2d(2))
            side //= 2
        c_in, padding = width, 0
    return FlatNet(layers, c_in * side**2, out)


def resnet18_student(channels: int, size: int, out: int, widths: list[int], norm: type[nn.Module]) -> FlatNet:
    """FRePo's ResNet-18: CIFAR stem, padding 1, no global pooling.

    widths: channels of the stem and first stage and of the other three; norm: nn.Identity (as FRePo's code, with
    biases) or FlaxBatchNorm2d, in the stem, the blocks and their projections (FRePo's departure 9).
    """
    layers = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=norm is nn.Identity), norm(widths[0]), nn.ReLU()]
    c_in, side = widths[0], size
    for stage, width in enumerate(widths):
        stride = 2 if stage else 1
        layers += [BasicBlock(c_in, width, stride, norm), BasicBlock(width, width, 1, norm)]
        c_in, side = width, -(-side // stride)
    return FlatNet(layers, c_in * side**2, out)


FREPO_STUDENTS = ("conv", "dcconv", "kipconv", "frepo_alexnet", "frepo_vgg11", "resnet18", "resnet18_bn")


def frepo_student(
    name: str, channels: int, size: int, out: int, widths: tuple[int, ...], flag: str = "--eval-models"
) -> nn.Module:
    """A fresh network of FREPO_STUDENTS, as FRePo's published evaluation builds them; it has dim, features, forward.

    widths: those of the training network; its depth is also that of conv, dcconv and kipconv, and its first entry
    (published: 128) scales the channels of every network but conv. flag: what named it, for errors.
    Drawn from torch's global generator.
    Raises UserError for an unknown name, or if the pools leave nothing of images of this size.
    """
    width, depth = widths[0], len(widths)

    def scaled(published: int) -> int:
        return max(1, round(published * width / 128))

    plans = {
        "conv": [(each, 3, True) for each in widths],
        "dcconv": [(width, 3, True)] * depth,
        "kipconv": [(width, 3, False)] + [(width, 3, True)] * depth,
        "frepo_alexnet": [
            (width, 5, True),
            (scaled(192), 5, True),
            (scaled(256), 3, False),
            (scaled(192), 3, False),
            (scaled(192), 3, True),
        ],
        "frepo_vgg11": [(width, 3, pool) for pool in (True, True, False, True, False, True, False, True)],
    }
    if name not in FREPO_STUDENTS:
        raise UserError(f"{flag} {name}: not one of {', '.join(FREPO_STUDENTS)}")
    if name not in plans:
        stages = [scaled(published) for published in (64, 128, 256, 512)]
        return resnet18_student(channels, size, out, stages, FlaxBatchNorm2d if name == "resnet18_bn" else nn.Identity)
    pools = sum(pool for _, _, pool in plans[name])
    smallest = max(1, 2**pools - 2 * grey_margin(channels))
    if size < smallest:
        lost = f"its {pools} pools leave nothing of {size} px images; leave it out, or take"
        raise UserError(f"{flag} {name}: {lost} images of at least {smallest} px")
    if name == "conv":
        return FRePoConvNet(channels, size, out, widths, norm="none")
    net = plain_student(channels, size, out, plans[name], bias=name != "dcconv")
    with torch.no_grad():
        for module in net.modules():
            if name == "dcconv" and isinstance(module, nn.Conv2d):
                module.weight.mul_(2**0.5)  # He normal: LeCun's with variance 2 / fan_in
            elif name == "kipconv" and isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.bias, std=0.1)
    return net


class ResNetStudent(ResNet):
    """KRR-ST's ResNet with a linear head: CIFAR stem, padding 2, global average pool."""

    def __init__(self, arch: str, channels: int, out: int, width: int):
        super().__init__(arch, channels, width)
        # KRR-ST's code puts its stem in after the fan-out initialisation, so the stem keeps torch's own
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 2, bias=False)
        self.head = nn.Linear(self.dim, out)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def batchnorm_student(channels: int, size: int, out: int, plan: list[tuple[int, int, bool]]) -> FlatNet:
    """Convolutions with BatchNorm and ReLU, and 2x2 max-pools between them, initialised as torch does.

    plan: (channels, kernel size, whether a pool follows) of every convolution. Pools for which the map is too small are
    left out: any that would leave less than 2 px to a convolution, since on 1 px only the middle of its kernel is used
    and BatchNorm cannot be trained on one image, and the last one on a map of 1 px.
    """
    layers, c_in, side = [], channels, size
    for i, (width, kernel, pool) in enumerate(plan, start=1):
        layers += [nn.Conv2d(c_in, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        if pool and side // 2 >= (1 if i == len(plan) else 2):
            layers.append(nn.MaxPool2d(2))
            side //= 2
        c_in = width
    return FlatNet(layers, c_in * side**2, out, init=None)


class InvertedResidual(nn.Module):
    """Conv 1x1 to expansion * c_in channels, 3x3 on each of them, 1x1 to c_out; BatchNorm each, ReLU but for the last.

    With stride 1 the input is added, through a projection where the channels change: KRR-ST's code has that projection,
    MobileNetV2 as published adds only inputs of the same shape and cuts ReLU at 6.
    """

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int):
        super().__init__()
        width = expansion * c_in
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.stride, self.downsample = stride, shortcut(c_in, c_out, 1) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride > 1:
            return out
        return out + (x if self.downsample is None else self.downsample(x))


def mobilenet_student(channels: int, size: int, out: int, scaled: Callable[[int], int]) -> FlatNet:
    """KRR-ST's MobileNetV2: stem 3x3 of stride 1, 17 inverted residuals, conv 1x1, global average pool.

    scaled: the channels for a published number of them. Initialised as torch does. A stride that would leave 1 px, as
    the last one does of 8 px images, is left out (see batchnorm_student); the 1x1 convolutions see 2 px or more too.
    """
    stages = [(1, 16, 1, 1), (2, 24, 2, 1), (2, 32, 3, 2), (2, 64, 4, 2), (2, 96, 3, 1), (2, 160, 3, 2), (2, 320, 1, 1)]
    c_in, side = scaled(32), size
    layers = [nn.Conv2d(channels, c_in, 3, padding=1, bias=False), nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)]
    for expansion, width, blocks, stride in stages:
        for block in range(blocks):
            step = stride if block == 0 and side > 2 else 1
            layers.append(InvertedResidual(c_in, scaled(width), expansion, step))
            c_in, side = scaled(width), -(-side // step)
    dim = scaled(1280)
    layers += [nn.Conv2d(c_in, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return FlatNet(layers, dim, out, init=None)


class ViT(nn.Module):
    """A small vision transformer: pre-norm layers over patches, then BatchNorm, mean over the patches, linear head.

    The image is cut into at most 8 x 8 patches of at least 2 px (28 px: 7 x 7 of 4 px), of an image within zeros where
    they do not tile it. dim: numbers of a token, a multiple of heads; depth: layers.

    Two choices are for SGD without warm-up, which is how it is trained here. The learned positions start about as large
    as the embedded patches, not at the usual 0.02 (digits, 40 random pairs, 500 steps, 3 networks: match error 0.47
    against 0.77). The last norm is BatchNorm over images and patches, which takes what all tokens share out of the
    features (against LayerNorm: loss on those pairs 0.013 and 0.034, match error 0.47 and 0.52).
    """

    def __init__(self, channels: int, size: int, out: int, dim: int = 192, depth: int = 6, heads: int = 3):
        super().__init__()
        patch = max(2, -(-size // 8))
        side = -(-size // patch)
        self.patches = nn.Conv2d(channels, dim, patch, patch, padding=(side * patch - size + 1) // 2)
        self.positions = nn.Parameter(0.5 * torch.randn(side**2, dim))
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        # not nn.TransformerEncoder, whose layers all start as copies of one
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(dim, heads, 4 * dim, **options) for _ in range(depth)])
        self.norm = nn.BatchNorm1d(dim)
        self.dim = dim
        self.head = nn.Linear(dim, out)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, dim)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions  # (N, patches, dim)
        return self.norm(self.layers(tokens).transpose(1, 2)).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class TimmNet(nn.Module):
    """A network of timm without its classifier, then one linear head. net: (N, C, H, W) -> (N, dim)."""

    def __init__(self, net: nn.Module, dim: int, out: int):
        super().__init__()
        self.net, self.dim = net, dim
        self.head = nn.Linear(dim, out)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, dim)."""
        if self.training and len(x) == 1:
            # BatchNorm cannot be trained on one image whose map is 1 px, as many of these make of 32 px; two copies
            # have the mean and the variance of one, so that nothing else changes but the running variance
            return self.net(torch.cat([x, x]))[:1]
        return self.net(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def timm_net(name: str, channels: int, size: int, out: int, flag: str = "--eval-models") -> TimmNet:
    """A fresh network of timm for square images of `size` px, without pretrained weights; name: without "timm:".

    It is told the size of the images if it asks for one, as transformers do, and does not see pixels that
    fill none of its patches. Drawn from torch's global generator.
    Raises UserError without timm, for a name unknown to it, and for a network that fails on two blank images.
    """
    asked = f"{flag} timm:{name}"
    try:
        import timm  # not a requirement
    except ImportError as error:
        why = "is not installed" if error.name == "timm" else f"cannot be imported ({first_line(error)})"
        raise UserError(f"{asked}: timm {why}; pip install timm") from error
    if not timm.is_model(name):  # also refuses names that timm would download or read from a folder
        similar = difflib.get_close_matches(name, timm.list_models(), n=5)
        found = f"similar: {', '.join(similar)}" if similar else "timm.list_models() in Python lists them"
        raise UserError(f"{asked}: timm has no such network; {found}")
    options = dict(pretrained=False, in_chans=channels, num_classes=0)
    try:
        try:
            net = timm.create_model(name, img_size=size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            net = timm.create_model(name, **options)
        net.to(memory_format=torch.channels_last)
        with torch.no_grad():
            blank = net.eval()(torch.zeros(2, channels, size, size))
    except Exception as error:  # whatever a foreign network does with a size it was not made for
        fit = f"does not work with {channels} x {size} x {size} images ({first_line(error)})"
        raise UserError(f"{asked}: {fit}; take another network or another size") from error
    if not isinstance(blank, Tensor) or blank.ndim != 2 or len(blank) != 2 or not blank.shape[1]:
        shape = tuple(blank.shape) if isinstance(blank, Tensor) else type(blank).__name__
        raise UserError(f"{asked}: gives {shape} for 2 images, not 2 rows of features; take another network")
    return TimmNet(net.train(), blank.shape[1], out)


PAIR_NETS = ("convnet", "vgg11", "alexnet", "mobilenet", "resnet10", "resnet18", "vit")


def pair_net(
    name: str,
    channels: int,
    size: int,
    out: int,
    widths: tuple[int, ...],
    norm: str = "batch",
    flag: str = "--eval-models",
) -> ConvNet | FlatNet | ResNetStudent | ViT | TimmNet:
    """A fresh network to be trained on (image, feature) pairs; it has dim, head, features, forward.

    name: one of PAIR_NETS, or "timm:NAME" (timm_net, which takes neither widths nor norm). Layers and initialisation
    are those of KRR-ST's published code, but for the ViT, which it does not have. widths: those of the ConvNet; their
    first scales the channels of the others, which are as published where it is as published at that size (128 at 32 px,
    64 at 64 px, 32 at 224 px). norm: of the ConvNet alone; VGG-11, AlexNet, MobileNet and the ResNets have BatchNorm.
    On small images VGG-11 has fewer pools (batchnorm_student; from 32 px on all five, AlexNet from 8 px on all three)
    and MobileNet fewer strides (from 9 px on all three). flag: what named the network, for errors. Drawn from
    torch's global generator. Raises UserError for an unknown name and as timm_net does.
    """
    if name.startswith("timm:"):
        return timm_net(name.removeprefix("timm:"), channels, size, out, flag)
    if name not in PAIR_NETS:
        raise UserError(f"{flag} {name}: not one of {', '.join(PAIR_NETS)}, and not timm:NAME")
    if name == "convnet":
        return ConvNet(channels, size, out, widths, norm)
    scale = widths[0] / {2: 128, 3: 128, 4: 64, 5: 32}[convnet_depth(size)]

    def scaled(published: int, unit: int = 1) -> int:
        return unit * max(1, round(published * scale / unit))

    if name == "vit":
        return ViT(channels, size, out, scaled(192, unit=24))  # 3 heads of a multiple of 8
    if name == "mobilenet":
        return mobilenet_student(channels, size, out, scaled)
    if name not in ("vgg11", "alexnet"):
        return ResNetStudent(name, channels, out, scaled(64))
    plans = {
        "vgg11": [
            (64, 3, True),
            (128, 3, True),
            (256, 3, False),
            (256, 3, True),
            (512, 3, False),
            (512, 3, True),
            (512, 3, False),
            (512, 3, True),
        ],
        "alexnet": [(128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)],
    }
    plan = [(scaled(width), kernel, pool) for width, kernel, pool in plans[name]]
    return batchnorm_student(channels, size, out, plan)


@torch.no_grad()
def apply_chunked(function, x: Tensor, chunk: int = 512) -> Tensor:
    """function over x in slices of `chunk` rows, without gradients."""
    return torch.cat([function(part) for part in x.split(chunk)])


def features_chunked(features: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> Tensor:
    """features(x), (N, C, H, W) -> (N, d), with the activations of `chunk` images in memory instead of N.

    The backward pass computes each chunk's activations again. Exact if features treats every image by itself, as
    `ConvNet.frozen` does; train-mode BatchNorm does not.
    """
    if chunk >= len(x):
        return features(x)
    options = dict(use_reentrant=False, preserve_rng_state=False)  # features draws no random numbers
    return torch.cat([checkpoint(features, part, **options) for part in x.split(chunk)])
