"""MoCo: each view's key is told from others' keys, made by an encoder that follows slowly.

v2: He et al. 2020, arXiv:1911.05722, and Chen et al. 2020, arXiv:2003.04297, with the settings of the authors' CIFAR
demonstration. v3: Chen, Xie and He 2021, arXiv:2104.02057, with solo-learn's CIFAR settings.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import ssl_view, upload
from common.data import Data, normalise
from common.models import replace_norms
from common.pretrain import (
    Method,
    at_least_two,
    blank_resnet,
    cosine_lr,
    embedding_std,
    follow_,
    lars_,
    momentum_at,
    teacher_info,
    train,
    warm_up_epochs,
)
from common.run import rng
from common.teacher import Teacher


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over `splits` parts of the batch, each normalised by its own mean and variance when training.

    The parts are equal runs of consecutive images, as if each were on its own GPU; the running statistics move towards
    the average over the parts of their means and their (unbiased) variances. In eval mode and in the state dict it is
    nn.BatchNorm2d.
    """

    def __init__(self, norm: nn.BatchNorm2d, splits: int):
        super().__init__(norm.num_features, norm.eps, norm.momentum, device=norm.weight.device)
        self.load_state_dict(norm.state_dict())
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(f"{len(x)} images cannot be split into {self.splits} equal parts")
        means, variances = (part.repeat(self.splits, 1) for part in (self.running_mean, self.running_var))
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_norms(net: nn.Module, splits: int) -> nn.Module:
    """`net` with every BatchNorm2d replaced by a SplitBatchNorm2d of the same parameters and buffers."""
    replace_norms(net, lambda norm: SplitBatchNorm2d(norm, splits))
    return net


class Queue(nn.Module):
    """The last `size` keys, unit vectors (size, dim); before that many were seen, random ones."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))


@torch.no_grad()
def enqueue_(keys: Tensor, new: Tensor, seen: int) -> None:
    """Write new keys (B, dim) over the oldest of `keys` (K, dim), in place; seen: keys that came before these."""
    new, seen = new[-len(keys) :], seen + max(0, len(new) - len(keys))
    keys[upload(torch.arange(seen, seen + len(new)) % len(keys), keys.device)] = new


def info_nce(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each query's key among itself and the negatives, batch mean.

    q, k: (B, d), negatives: (K, d), all of unit length.
    """
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / temperature  # (B, 1 + K)
    return F.cross_entropy(scores, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def train_moco2(
    data: Data,
    teachers: Path,
    device: torch.device,
    *,
    arch: str = "resnet18",
    width: int = 64,
    stem_padding: int = 1,
    epochs: int = 200,
    batch: int = 512,
    lr: float = 0.06,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    queue: int = 4096,
    temperature: float = 0.1,
    key_momentum: float = 0.99,
    dim: int = 128,
    mlp: bool = False,
    splits: int = 8,
    crop_min: float = 0.08,
    blur: bool = False,
    seed: int = 0,
    precision: str = "fp32",
    save_minutes: float = 10.0,
) -> Teacher:
    """Train a ResNet by MoCo v2 on data.x_train, or load it from `teachers` if it was trained before.

    The defaults are those of the authors' demonstration on CIFAR-10 (spec. 1.2). lr: as it is, whatever the batch;
    queue: negative keys, at most as many as an epoch gives; key_momentum: of the key encoder's weights; dim: of the
    keys; mlp: two layers instead of one from the features to them; splits: parts of the batch that BatchNorm normalises
    on their own, fewer where a part would have less than two images; crop_min: smallest area of a view; blur: of half
    of the views. For ImageNet: resnet50, batch 256, lr 0.03, weight_decay 1e-4, queue 65536, temperature 0.2,
    key_momentum 0.999, mlp, crop_min 0.2, blur. save_minutes, errors and what is printed: see `train`.
    """
    at_least_two(data)
    batch = min(batch, len(data.x_train))
    splits = max(1, min(splits, batch // 2))
    batch -= batch % splits
    per_epoch = len(data.x_train) // batch
    queue = min(queue, per_epoch * batch)
    settings = dict(
        weight_decay=weight_decay,
        momentum=momentum,
        queue=queue,
        temperature=temperature,
        key_momentum=key_momentum,
        dim=dim,
        mlp=mlp,
        splits=splits,
        crop_min=crop_min,
        blur=blur,
    )
    info = teacher_info("moco2", data, settings, arch=arch, width=width, stem_padding=stem_padding, epochs=epochs,
                        batch=batch, lr=lr, seed=seed, precision=precision)  # fmt: skip
    mean, std = data.mean.to(device), data.std.to(device)

    def make() -> dict[str, nn.Module]:
        net = split_norms(blank_resnet(info), splits)
        hidden = [nn.Linear(net.dim, net.dim), nn.ReLU()] if mlp else []
        head = nn.Sequential(*hidden, nn.Linear(net.dim, dim))
        return {
            "net": net,
            "head": head,
            "key_net": copy.deepcopy(net).requires_grad_(False),
            "key_head": copy.deepcopy(head).requires_grad_(False),
            "queue": Queue(queue, dim),
        }

    def method_of(modules: dict[str, nn.Module]) -> Method:
        query = nn.Sequential(modules["net"], modules["head"])
        key, keys = nn.Sequential(modules["key_net"], modules["key_head"]), modules["queue"].keys
        fast, slow = list(query.parameters()), list(key.parameters())

        def embed(encoder: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                z = encoder(normalise(x, mean, std))
            return F.normalize(z.float(), dim=1)

        def loss_of(index: Tensor, epoch: int, i: int) -> tuple[Tensor, Callable]:
            x, generator = upload(data.x_train[index], device) / 255, rng("teacher views", seed, epoch, i)
            view = partial(ssl_view, jitter=(0.4, 0.4, 0.4, 0.1), blur=0.5 if blur else 0.0)
            x_q, x_k = (view(x, generator, (crop_min, 1.0), data.flip) for _ in range(2))
            q = embed(query, x_q)
            with torch.no_grad():
                follow_(slow, fast, key_momentum)
                # the parts of BatchNorm have other members here, so that their statistics do not tell which is whose
                order = torch.randperm(batch, generator=rng("teacher shuffle", seed, epoch, i))
                k = embed(key, x_k[upload(order, device)])[upload(order.argsort(), device)]
            loss = info_nce(q, k, keys.clone(), temperature)  # as they are now, for the backward pass
            enqueue_(keys, k, (epoch * per_epoch + i) * batch)
            return loss, lambda: {"embedding std": embedding_std(q)}

        optimizer = torch.optim.SGD(fast, lr=lr, momentum=momentum, weight_decay=weight_decay)
        return Method(optimizer, loss_of, lambda epoch, i: cosine_lr(epoch, epochs, 0, lr))

    flags = ("--teacher-batch", "--teacher-width", "--teacher-lr")
    return train(info, data, teachers, device, make, method_of, views=1, flags=flags, save_minutes=save_minutes)


# -------------------------------------------------------------------------------------------------------------- MoCo v3


def batch_contrast(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """2 T times the cross-entropy of finding each query's key among all keys of the batch, batch mean.

    q, k: (B, d) of unit length.
    """
    scores = q @ k.T / temperature  # (B, B)
    return 2 * temperature * F.cross_entropy(scores, torch.arange(len(q), device=q.device))


def two_layers(d_in: int, hidden: int, d_out: int) -> list[nn.Module]:
    return [
        nn.Linear(d_in, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, d_out, bias=False),
    ]


def train_moco3(
    data: Data,
    teachers: Path,
    device: torch.device,
    *,
    arch: str = "resnet18",
    width: int = 64,
    stem_padding: int = 2,
    epochs: int = 1000,
    batch: int = 256,
    lr: float = 0.3,
    eta: float = 0.02,
    weight_decay: float = 1e-6,
    temperature: float = 0.2,
    key_momentum: float = 0.99,
    projector_width: int = 4096,
    dim: int = 256,
    crop_min: float = 0.08,
    blur: bool = False,
    seed: int = 0,
    precision: str = "fp32",
    save_minutes: float = 10.0,
) -> Teacher:
    """Train a ResNet by MoCo v3 on data.x_train, or load it from `teachers` if it was trained before.

    The defaults are solo-learn's on CIFAR. lr: LARS's per 256 images of batch; eta: its trust; key_momentum: of the key
    encoder, rising to 1; projector_width: hidden layers of projection and prediction; dim: of the keys; crop_min:
    smallest area of a view; blur: as for ImageNet, of all first and a tenth of the second views. For ImageNet (300
    epochs): resnet50, batch 4096, weight_decay 1e-6, temperature 1, eta 0.001, crop_min 0.2, blur. save_minutes, errors
    and what is printed: see `train`.
    """
    at_least_two(data)
    batch = min(batch, len(data.x_train))
    settings = dict(
        eta=eta,
        weight_decay=weight_decay,
        temperature=temperature,
        key_momentum=key_momentum,
        projector_width=projector_width,
        dim=dim,
        crop_min=crop_min,
        blur=blur,
    )
    info = teacher_info("moco3", data, settings, arch=arch, width=width, stem_padding=stem_padding, epochs=epochs,
                        batch=batch, lr=lr, seed=seed, precision=precision)  # fmt: skip
    mean, std = data.mean.to(device), data.std.to(device)
    per_epoch = len(data.x_train) // batch
    steps, warmup, peak = epochs * per_epoch, warm_up_epochs(epochs) * per_epoch, lr * batch / 256

    def make() -> dict[str, nn.Module]:
        net = blank_resnet(info)
        head = nn.Sequential(*two_layers(net.dim, projector_width, dim), nn.BatchNorm1d(dim, affine=False))
        return {
            "net": net,
            "head": head,
            "predictor": nn.Sequential(*two_layers(dim, projector_width, dim)),
            "key_net": copy.deepcopy(net).requires_grad_(False),
            "key_head": copy.deepcopy(head).requires_grad_(False),
        }

    def method_of(modules: dict[str, nn.Module]) -> Method:
        query = nn.Sequential(modules["net"], modules["head"], modules["predictor"])
        key = nn.Sequential(modules["key_net"], modules["key_head"])
        params = list(query.parameters())
        fast, slow = [*modules["net"].parameters(), *modules["head"].parameters()], list(key.parameters())

        def embed(encoder: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                z = encoder(normalise(x, mean, std))
            return F.normalize(z.float(), dim=1)

        def loss_of(index: Tensor, epoch: int, i: int) -> tuple[Tensor, Callable]:
            x, generator = upload(data.x_train[index], device) / 255, rng("teacher views", seed, epoch, i)
            view = partial(ssl_view, x, generator, (crop_min, 1.0), data.flip)
            x_1 = view(blur=1.0 if blur else 0.0)
            x_2 = view(blur=0.1 if blur else 0.0, solarise=0.2)
            q_1, q_2 = embed(query, x_1), embed(query, x_2)
            with torch.no_grad():
                follow_(slow, fast, momentum_at(epoch * per_epoch + i, steps, key_momentum))
                k_1, k_2 = embed(key, x_1), embed(key, x_2)
            loss = batch_contrast(q_1, k_2, temperature) + batch_contrast(q_2, k_1, temperature)
            return loss, lambda: {"embedding std": embedding_std(q_1)}

        return Method(
            torch.optim.SGD(params, lr=lr, momentum=0.9),
            loss_of,
            lambda epoch, i: cosine_lr(epoch * per_epoch + i, steps, warmup, peak),
            lambda rate: lars_(params, rate, eta, weight_decay),
        )

    flags = ("--teacher-batch", "--teacher-projector", "--teacher-lr")
    return train(info, data, teachers, device, make, method_of, views=2, flags=flags, save_minutes=save_minutes)
