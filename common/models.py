"""The networks: the field's ConvNet and the ResNets of the teachers. Every one has `features(x) -> (N, d)`.

Weights are channels-last and the maps take the layout of the weights, whatever the images have: on a CPU a ConvNet's
step needs about 0.75 of the default layout's time in fp32 and 0.65 in bf16, a ResNet's 0.75 and 0.85. Results are the
same up to rounding; (N, d) is in the order of (N, C, H, W) in either layout.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.downsample = stride, shortcut(c_in, width, stride)

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


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    """The projection of a block that changes the shape, to be given every stride-th pixel.

    A convolution with kernel 1 and that stride is the same, but oneDNN (torch 2.11) writes out of bounds in its
    channels-last backward pass where it has 8 input channels or fewer and large maps.
    """
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))


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
