"""SwAV: the cluster of one view, from assignments that use all clusters alike, is predicted from the others.

Caron et al. 2020, arXiv:2006.09882, with solo-learn's CIFAR settings and the paper's multi-crop.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import small_side, ssl_view, upload
from common.data import Data, normalise
from common.moco import Queue, enqueue_
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

SMALLEST = 0.05 / 0.14  # area of the smallest small view, in that of the smallest large one: Teachers' departure 7


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    """Codes (B, K) of scores (B, K): exp(scores / epsilon) with columns and rows scaled in turn, so that all prototypes
    get the same share of the batch, and last each row sums to 1 (the paper's soft assignments). In logarithms, so that
    nothing underflows.
    """
    log_codes = scores / epsilon
    for _ in range(iterations):
        log_codes = log_codes.log_softmax(0)  # to one for each prototype; the rows' scaling makes it B / K
        log_codes = log_codes.log_softmax(1)
    return log_codes.exp()


def swapped_loss(scores: list[Tensor], codes: list[Tensor], temperature: float) -> Tensor:
    """Mean over the codes (B, K) of the first views, and over all other views, of the cross-entropy of a view's
    scores (B, K) divided by the temperature."""
    logs = [F.log_softmax(view / temperature, 1) for view in scores]
    losses = [-(code * log).sum(1).mean() for i, code in enumerate(codes) for j, log in enumerate(logs) if i != j]
    return torch.stack(losses).mean()


def train_swav(
    data: Data,
    teachers: Path,
    device: torch.device,
    *,
    arch: str = "resnet18",
    width: int = 64,
    stem_padding: int = 2,
    epochs: int = 1000,
    batch: int = 256,
    lr: float = 0.6,
    eta: float = 0.02,
    weight_decay: float = 1e-6,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    prototypes: int = 3000,
    queue: int = 3840,
    projector_width: int = 2048,
    dim: int = 128,
    crop_min: float = 0.08,
    small_crops: int = 0,
    blur: bool = True,
    seed: int = 0,
    precision: str = "fp32",
    save_minutes: float = 10.0,
) -> Teacher:
    """Train a ResNet by SwAV on data.x_train, or load it from `teachers` if it was trained before.

    The defaults are solo-learn's on CIFAR. lr: LARS's per 256 images of batch; eta: its trust; epsilon: of the
    assignments, sharper if smaller; prototypes: clusters, fixed in the first epoch, or two of a thousand; queue:
    earlier embeddings that take part in the assignments from a twentieth of the epochs on (0: none); projector_width:
    the head's hidden layer; dim: of the embeddings; crop_min: smallest area of the two large views; small_crops:
    further views (augment.small_side px) of areas below it, which predict alone (the paper's 6 at crop_min 0.14);
    blur: of half of the views. save_minutes, errors and what is printed: see `train`; what is watched are assignments
    and probabilities, as prototypes may become alike while embeddings stay apart.
    """
    at_least_two(data)
    batch = min(batch, len(data.x_train))
    per_epoch = len(data.x_train) // batch
    queue = min(queue, per_epoch * batch)
    settings = dict(
        eta=eta,
        weight_decay=weight_decay,
        temperature=temperature,
        epsilon=epsilon,
        prototypes=prototypes,
        queue=queue,
        projector_width=projector_width,
        dim=dim,
        crop_min=crop_min,
        small_crops=small_crops,
        blur=blur,
    )
    info = teacher_info("swav", data, settings, arch=arch, width=width, stem_padding=stem_padding, epochs=epochs,
                        batch=batch, lr=lr, seed=seed, precision=precision)  # fmt: skip
    mean, std = data.mean.to(device), data.std.to(device)
    steps, warmup, peak = epochs * per_epoch, warm_up_epochs(epochs) * per_epoch, lr * batch / 256
    side, fixed, queue_from = small_side(data.size), max(1, epochs // 500), max(1, epochs // 20)

    def make() -> dict[str, nn.Module]:
        net = blank_resnet(info)
        head = nn.Sequential(
            nn.Linear(net.dim, projector_width),
            nn.BatchNorm1d(projector_width),
            nn.ReLU(),
            nn.Linear(projector_width, dim),
        )
        clusters = nn.Linear(dim, prototypes, bias=False)
        queues = {f"queue_{i}": Queue(queue, dim) for i in range(2) if queue}
        return {"net": net, "head": head, "prototypes": clusters} | queues

    def method_of(modules: dict[str, nn.Module]) -> Method:
        net, head, clusters = modules["net"], modules["head"], modules["prototypes"].weight
        queues = [modules[f"queue_{i}"].keys for i in range(2) if queue]
        params = [*net.parameters(), *head.parameters(), clusters]

        def embed(views: list[Tensor]) -> list[Tensor]:
            """Views of one size (B, C, H, W), which BatchNorm sees together: unit vectors (B, dim) each."""
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                z = head(net(normalise(torch.cat(views), mean, std)))
            return list(F.normalize(z.float(), dim=1).split(batch))

        def loss_of(index: Tensor, epoch: int, i: int) -> tuple[Tensor, Callable]:
            x, generator = upload(data.x_train[index], device) / 255, rng("teacher views", seed, epoch, i)
            view = partial(
                ssl_view, x, generator, flip=data.flip, jitter=(0.8, 0.8, 0.8, 0.2), blur=0.5 if blur else 0.0
            )
            large = [view((crop_min, 1.0)) for _ in range(2)]
            small = [view((SMALLEST * crop_min, crop_min), side=side) for _ in range(small_crops)]
            z = embed(large) + (embed(small) if small else [])
            with torch.no_grad():
                clusters.copy_(F.normalize(clusters, dim=1))
            # fixed at first: they have no gradient then, and nothing moves them
            frozen = clusters.detach() if epoch < fixed else clusters
            scores = [part @ frozen.T for part in z]  # (B, K) each
            seen, codes = (epoch * per_epoch + i) * batch, []
            for own, part, score in zip(queues or [None, None], z[:2], scores[:2], strict=True):
                score = score.detach()
                if queue and epoch >= queue_from:  # full by then
                    score = torch.cat([score, own @ clusters.detach().T])
                codes.append(sinkhorn(score, epsilon)[:batch])
                if queue:
                    enqueue_(own, part.detach(), seen)

            def terms_of() -> dict[str, float]:
                told = (scores[0] / temperature).softmax(1)
                return {"embedding std": min(embedding_std(codes[0]), embedding_std(told))}

            return swapped_loss(scores, codes, temperature), terms_of

        return Method(
            torch.optim.SGD(params, lr=lr, momentum=0.9),
            loss_of,
            lambda epoch, i: cosine_lr(epoch * per_epoch + i, steps, warmup, peak),
            lambda rate: lars_(params, rate, eta, weight_decay),
        )

    views = 2 + small_crops * (side / data.size) ** 2
    scores = (batch * (2 + small_crops) + 2 * queue) * prototypes
    flags = ("--teacher-batch", "--teacher-projector", "--teacher-lr")
    return train(info, data, teachers, device, make, method_of, views=views, flags=flags, save_minutes=save_minutes,
                 scores=scores)  # fmt: skip
