"""DINO: a student's probabilities of small and large views are drawn to a slow teacher's of large ones.

Caron et al. 2021, arXiv:2104.14294, with solo-learn's CIFAR settings and the paper's multi-crop.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import small_side, ssl_view, upload
from common.data import Data, normalise
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
from common.swav import SMALLEST
from common.teacher import Teacher

STUDENT = 0.1  # temperature of the student's probabilities
CENTRE = 0.9  # momentum of the centre


class Head(nn.Module):
    """Two layers, with BatchNorm and GELU between, to a unit vector (dim), and its products with `prototypes` others.

    Teachers' departure 3: as in the authors' released ResNet-50; their code's has three layers and no BatchNorm.
    """

    def __init__(self, d_in: int, hidden: int, dim: int, prototypes: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d_in, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.prototypes = nn.Linear(dim, prototypes, bias=False)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """(B, d_in) -> (B, prototypes); frozen: the prototypes get no gradient."""
        weight = self.prototypes.weight.detach() if frozen else self.prototypes.weight
        z = F.normalize(self.layers(x).to(weight.dtype), dim=1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would move the cosines by 0.002
            return z @ F.normalize(weight, dim=1).T


class Centre(nn.Module):
    """The running mean of the teacher's scores, (1, prototypes)."""

    def __init__(self, prototypes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, prototypes))


@torch.no_grad()
def targets_of(scores: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """The teacher's probabilities: softmax((scores - centre) / temperature) of scores (B, K)."""
    return ((scores - centre) / temperature).softmax(1)


def cross_view_loss(scores: list[Tensor], targets: list[Tensor], temperature: float = STUDENT) -> Tensor:
    """Mean over the targets (B, K) of the first views, and over all other views, of the cross-entropy of a view's
    scores (B, K) divided by the temperature (the paper's multi-crop loss)."""
    logs = [F.log_softmax(view / temperature, 1) for view in scores]
    losses = [-(target * log).sum(1).mean() for i, target in enumerate(targets) for j, log in enumerate(logs) if i != j]
    return torch.stack(losses).mean()


def train_dino(
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
    temperature: float = 0.04,
    key_momentum: float = 0.9995,
    prototypes: int = 4096,
    projector_width: int = 2048,
    dim: int = 256,
    crop_min: float = 0.08,
    small_crops: int = 0,
    blur: bool = False,
    seed: int = 0,
    precision: str = "fp32",
    save_minutes: float = 10.0,
) -> Teacher:
    """Train a ResNet by DINO on data.x_train, or load it from `teachers` if it was trained before.

    What is kept is DINO's teacher. The defaults are solo-learn's on CIFAR, but for the targets' temperature, the
    authors' of ResNet-50, as their head is. lr: LARS's per 256 images of batch; eta: its trust; temperature: of the
    targets, a student's is 0.1; key_momentum: of the teacher, rising to 1; prototypes: entries of the probabilities,
    fixed in the first epoch; projector_width: the head's hidden layer; dim: its last; crop_min: smallest area of the
    two large views; small_crops: further views (augment.small_side px) of areas below it, which the student alone sees
    (the paper's 8 at crop_min 0.14); blur: as for ImageNet, of all first, a tenth of the second and half of the small
    views. save_minutes, errors and what is printed: see `train`; what is watched are targets and probabilities.
    """
    at_least_two(data)
    batch = min(batch, len(data.x_train))
    settings = dict(
        eta=eta,
        weight_decay=weight_decay,
        temperature=temperature,
        key_momentum=key_momentum,
        prototypes=prototypes,
        projector_width=projector_width,
        dim=dim,
        crop_min=crop_min,
        small_crops=small_crops,
        blur=blur,
    )
    info = teacher_info("dino", data, settings, arch=arch, width=width, stem_padding=stem_padding, epochs=epochs,
                        batch=batch, lr=lr, seed=seed, precision=precision)  # fmt: skip
    mean, std = data.mean.to(device), data.std.to(device)
    per_epoch = len(data.x_train) // batch
    steps, warmup, peak = epochs * per_epoch, warm_up_epochs(epochs) * per_epoch, lr * batch / 256
    side = small_side(data.size)

    def make() -> dict[str, nn.Module]:
        student = blank_resnet(info)
        head = Head(student.dim, projector_width, dim, prototypes)
        return {
            "net": copy.deepcopy(student).requires_grad_(False),
            "head": copy.deepcopy(head).requires_grad_(False),
            "student_net": student,
            "student_head": head,
            "centre": Centre(prototypes),
        }

    def method_of(modules: dict[str, nn.Module]) -> Method:
        teacher, student = (modules["net"], modules["head"]), (modules["student_net"], modules["student_head"])
        slow, fast = ([p for part in pair for p in part.parameters()] for pair in (teacher, student))
        centre = modules["centre"].mean

        def scores_of(net: nn.Module, head: nn.Module, views: list[Tensor], frozen: bool = False) -> list[Tensor]:
            """Of views of one size (B, C, H, W), which BatchNorm sees together: (B, prototypes) each."""
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                scores = head(net(normalise(torch.cat(views), mean, std)), frozen)
            return list(scores.float().split(batch))

        def loss_of(index: Tensor, epoch: int, i: int) -> tuple[Tensor, Callable]:
            x, generator = upload(data.x_train[index], device) / 255, rng("teacher views", seed, epoch, i)
            view = partial(ssl_view, x, generator, flip=data.flip)
            large = [
                view((crop_min, 1.0), blur=1.0 if blur else 0.0),
                view((crop_min, 1.0), blur=0.1 if blur else 0.0, solarise=0.2),
            ]
            areas, half = (SMALLEST * crop_min, crop_min), 0.5 if blur else 0.0
            small = [view(areas, blur=half, side=side) for _ in range(small_crops)]
            with torch.no_grad():  # Teachers' departure 1: at the beginning of a step
                follow_(slow, fast, momentum_at(epoch * per_epoch + i, steps, key_momentum))
                told = scores_of(*teacher, large)
                targets = [targets_of(part, centre, temperature) for part in told]
                centre.lerp_(torch.cat(told).mean(0, keepdim=True), 1 - CENTRE)  # of use from the next step on
            scores = scores_of(*student, large, epoch == 0)
            scores += scores_of(*student, small, epoch == 0) if small else []

            def terms_of() -> dict[str, float]:
                told = (scores[0] / STUDENT).softmax(1)
                return {"embedding std": min(embedding_std(targets[0]), embedding_std(told))}

            return cross_view_loss(scores, targets), terms_of

        return Method(
            torch.optim.SGD(fast, lr=lr, momentum=0.9),
            loss_of,
            lambda epoch, i: cosine_lr(epoch * per_epoch + i, steps, warmup, peak),
            lambda rate: lars_(fast, rate, eta, weight_decay),
        )

    views = 2 + small_crops * (side / data.size) ** 2
    scores = (batch * (4 + small_crops)) * prototypes
    flags = ("--teacher-batch", "--teacher-projector", "--teacher-lr")
    return train(info, data, teachers, device, make, method_of, views=views, flags=flags, save_minutes=save_minutes,
                 scores=scores)  # fmt: skip
