"""Barlow Twins: the cross-correlation of two views' embeddings is drawn to the identity.

Zbontar et al. 2021, arXiv:2103.03230, with solo-learn's CIFAR settings.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.augment import two_views, upload
from common.data import Data, normalise
from common.pretrain import (
    Method,
    at_least_two,
    blank_resnet,
    cosine_lr,
    embedding_std,
    lars_,
    teacher_info,
    train,
    warm_up_epochs,
)
from common.run import rng
from common.teacher import Teacher
from kernels.barlow import barlow_loss, barlow_terms


def projector(d_in: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(d_in, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
    )


def train_barlow(
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
    weight_decay: float = 1e-4,
    projector_width: int = 2048,
    off_diagonal: float = 0.0051,
    crop_min: float = 0.08,
    seed: int = 0,
    precision: str = "fp32",
    save_minutes: float = 10.0,
) -> Teacher:
    """Train a ResNet by Barlow Twins on data.x_train, or load it from `teachers` if it was trained before.

    lr: per 256 images of batch (solo-learn 0.3); eta: LARS trust (solo-learn 0.02, the authors 0.001);
    crop_min: smallest area of a view; save_minutes, errors and what is printed: see `train`.
    """
    at_least_two(data)
    batch = min(batch, len(data.x_train))
    settings = dict(
        eta=eta,
        weight_decay=weight_decay,
        projector_width=projector_width,
        off_diagonal=off_diagonal,
        crop_min=crop_min,
    )
    info = teacher_info("barlow", data, settings, arch=arch, width=width, stem_padding=stem_padding, epochs=epochs,
                        batch=batch, lr=lr, seed=seed, precision=precision)  # fmt: skip
    mean, std = data.mean.to(device), data.std.to(device)
    per_epoch = len(data.x_train) // batch
    steps, warmup, peak = epochs * per_epoch, warm_up_epochs(epochs) * per_epoch, lr * batch / 256

    def make() -> dict[str, nn.Module]:
        net = blank_resnet(info)
        return {"net": net, "head": projector(net.dim, projector_width)}

    def method_of(modules: dict[str, nn.Module]) -> Method:
        net, head = modules["net"], modules["head"]
        params = [*net.parameters(), *head.parameters()]

        def loss_of(index: Tensor, epoch: int, i: int) -> tuple[Tensor, Callable]:
            x = upload(data.x_train[index], device) / 255
            x_1, x_2 = two_views(x, rng("teacher views", seed, epoch, i), (crop_min, 1.0), data.flip)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                z_1, z_2 = head(net(normalise(x_1, mean, std))), head(net(normalise(x_2, mean, std)))
            loss = 0.1 * barlow_loss(z_1.float(), z_2.float(), off_diagonal)  # 0.1: solo-learn's scale

            def terms_of() -> dict[str, float]:
                on, off = barlow_terms(z_1.detach().float(), z_2.detach().float())
                return {"diagonal": on, "off-diagonal": off, "embedding std": embedding_std(z_1)}

            return loss, terms_of

        return Method(
            torch.optim.SGD(params, lr=lr, momentum=0.9),
            loss_of,
            lambda epoch, i: cosine_lr(epoch * per_epoch + i, steps, warmup, peak),
            lambda rate: lars_(params, rate, eta, weight_decay),
        )

    flags = ("--teacher-batch", "--teacher-projector", "--teacher-lr")
    return train(info, data, teachers, device, make, method_of, views=2, flags=flags, save_minutes=save_minutes)
