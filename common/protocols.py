"""What the evaluator does with a set: train a network on it, by the kind of its targets, and use that network.

A set's kind is what its y are, and with it how networks are trained on it:
  features   a teacher's features: squared error (KRR-ST's schedule, common/pairs.py)
  scores     class scores: FRePo's schedule (common/students.py)
  labels     hard labels: cross-entropy under DSA (`fit_labels`)
  soft       a teacher's labels of augmented views, made as they are needed (SRe2L's schedule, common/relabel.py)

A trained network is then used on a target set:
  scratch    its own head's accuracy on test images of the set's classes
  probe      linear classifiers on frozen features: all labels, 5 % and 1 % of them, 5 and 1 a class
  finetune   all weights are trained on the target
  knn        neighbours vote
  kd         a classifier of the target teaches it on the set's images alone (KRR-ST's Table 4)
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import dsa, upload
from common.data import Data, Inputs
from common.pairs import Protocol, accuracy, probes
from common.pretrain import knn_accuracy
from common.run import UserError, rng, seeded
from common.students import epoch_order

KINDS = ("features", "scores", "labels", "soft")
DSA_OF_DC = "color_crop_cutout_flip_scale_rotate"
SHARES = (0.05, 0.01)  # of the labels, MKDT's
CHUNK = 512  # images of a forward pass while scoring, as in common/pairs.py
LONG = ("cifar10", "cifar100", "tiny_imagenet")  # targets that KRR-ST's code fine-tunes on for 10,000 steps


@dataclass
class LabelRecipe:
    """Training on hard labels: KRR-ST's code for random, k-means, DSA, DM and MTT sets."""

    epochs: int = 1000
    batch: int = 256
    lr: float = 0.01  # a tenth of it from the middle on
    momentum: float = 0.9
    weight_decay: float = 5e-4
    dsa: str = DSA_OF_DC  # operations of common.augment.dsa
    strengths: str = "dc"


@dataclass
class KdRecipe:
    """Distillation of a classifier into a student without its data: KRR-ST's code, but for the two modes."""

    epochs: int = 1000  # passes through the set's images
    batch: int = 512
    lr: float = 1e-4  # AdamW's, a cosine to zero by epochs
    lr_gaussian: float = 1e-3  # of the row "gaussian", which sees new noise in every batch
    weight_decay: float = 0.0
    temperature: float = 1.0
    dsa: str = DSA_OF_DC
    strengths: str = "dc"
    # Evaluate's departure 1: published is train for both
    student_test_mode: str = "eval"  # train: BatchNorm takes the statistics of each test batch, as published
    teacher_mode: str = "eval"  # train: likewise the teacher's of each batch, as published


# ------------------------------------------------------------------------------------------------------------- training


def without_flip(strategy: str, flip: bool) -> str:
    """A DSA strategy for images that may be mirrored, or may not."""
    return "_".join(name for name in strategy.split("_") if flip or name != "flip")


def fit_labels(net: nn.Module, images: Callable[[Tensor], Tensor], y: Tensor, recipe: LabelRecipe, steps: int, *key):
    """Train net on n images with hard labels, in place: SGD, cross-entropy, DSA, a tenth of the rate from half on.

    images: places (B,) -> network inputs (B, C, H, W) float32 on y's device; y: (n,) classes; key: of the order and the
    augmentation. Epochs keep their last short batch. The net stays in train mode. Raises UserError if the last loss is
    not finite.
    """
    optimizer = torch.optim.SGD(
        net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, foreach=True
    )
    generator = rng("labels augmentation", *key)
    per_epoch = -(-len(y) // recipe.batch)
    net.train()
    for step in range(steps):
        epoch, i = divmod(step, per_epoch)
        index = epoch_order(len(y), *key, epoch)[i * recipe.batch :][: recipe.batch]
        x = dsa(images(index), generator, recipe.dsa, recipe.strengths)
        loss = F.cross_entropy(net(x), y[upload(index, y.device)])
        optimizer.param_groups[0]["lr"] = recipe.lr if 2 * step < steps else 0.1 * recipe.lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not loss.isfinite():
        raise UserError(f"training on {len(y)} labels ended at loss {loss.item()}; lower --labels.lr {recipe.lr:g}")


# ---------------------------------------------------------------------------------------------------------------- uses


@torch.no_grad()
def embed(net: nn.Module, images: Inputs, index: Tensor | None = None) -> Tensor:
    """net.features of images, all or those at `index`, as the network stands: (n, d) on its device."""
    index = torch.arange(len(images)) if index is None else index
    return torch.cat([net.features(images(part)) for part in index.split(CHUNK)])


def test_accuracy(net: nn.Module, test: Inputs, y_test: Tensor) -> float:
    """Of the network's own head, in the mode the network is in."""
    with torch.no_grad():
        parts = [net(test(index)) for index in torch.arange(len(test)).split(CHUNK)]
    return accuracy(torch.cat(parts), y_test)


def probe(
    net: nn.Module,
    data: Data,
    train: Inputs,
    test: Inputs,
    protocol: Protocol,
    cache_gb: float,
    *key,
    shares: tuple[float, ...] = SHARES,
    embed=embed,
) -> dict[str, float | list[float]]:
    """Accuracies of linear classifiers on frozen features of data's images.

    probe: by SGD, with all labels; few_5, few_1: closed form, with 5 and 1 labels a class; part_5, part_1: with these
    shares of each class (Evaluate's departure 2: MKDT, arXiv:2410.02116, fits them by L-BFGS), one value a draw.
    train, test: the network inputs of data. cache_gb: features of the training set are kept up to this.
    embed: as the function of that name, or one that remembers.
    """
    net.eval()
    f_test = embed(net, test)
    if len(train) * net.dim * 4 <= cache_gb * 1e9:
        f_train = embed(net, train)
        features = lambda index: f_train[upload(index, f_train.device)]  # noqa: E731
    else:
        features = lambda index: embed(net, train, index)  # noqa: E731
    return probes(features, f_test, data, protocol, *key, shares=shares)


def neighbours_vote(
    net: nn.Module,
    data: Data,
    train: Inputs,
    test: Inputs,
    k: int,
    temperature: float,
    cache_gb: float = 4.0,
    embed=embed,
) -> float:
    """Accuracy of k training images voting by exp(cosine / temperature) (Wu et al. 2018, arXiv:1805.01978).

    Raises UserError where their features would take more than cache_gb.
    """
    net.eval()
    if (needed := 2 * len(train) * net.dim * 4 / 1e9) > cache_gb:  # they are scaled to length 1 beside
        raise UserError(f"--protocol knn: features of {len(train)} images take {needed:.1f} GB; raise --cache-gb")
    return knn_of(embed(net, train), embed(net, test), data, k, temperature)


def knn_of(f_train: Tensor, f_test: Tensor, data: Data, k: int, temperature: float) -> float:
    """See neighbours_vote. f_train: (N, d), f_test: (M, d)."""
    labels = (y.to(f_train.device) for y in (data.y_train, data.y_test))
    y_train, y_test = labels
    return knn_accuracy(f_train, y_train, f_test, y_test, k, temperature)


def kd_loss(scores: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between softmax(target / T) and softmax(scores / T), mean over the batch. Both (B, classes)."""
    soft = (target / temperature).softmax(1)
    return -(soft * (scores / temperature).log_softmax(1)).sum(1).mean()


def distil_knowledge(
    net: nn.Module,
    teacher: nn.Module,
    images: Callable[[Tensor, int], Tensor],
    n: int,
    classes: int,
    recipe: KdRecipe,
    lr: float,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device,
    *key,
    steps: int | None = None,
) -> None:
    """Train net with a new head on the teacher's outputs for n images, in place: no label, no image of the target.

    images: (places (B,), step) -> normalised images (B, C, H, W) on the device, which the teacher sees after DSA, as
    does the student after `prepare` (the whitening of a whitened set). teacher: inputs -> logits. steps: of all epochs,
    where they are not to be counted by n. The net stays in
    train mode; the teacher is left in eval mode. Raises UserError if the last loss is not finite.
    """
    with seeded("kd head", *key):
        net.head = nn.Linear(net.dim, classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=recipe.weight_decay)
    generator, per_epoch = rng("kd augmentation", *key), -(-n // recipe.batch)
    if recipe.teacher_mode == "train":
        teacher = copy.deepcopy(teacher)  # its running statistics drift, as published, but not into the next cell
    teacher.train(recipe.teacher_mode == "train")
    net.train()
    steps = steps or recipe.epochs * per_epoch
    for step in range(steps):
        epoch, i = divmod(step, per_epoch)
        index = epoch_order(n, "kd", *key, epoch)[i * recipe.batch :][: recipe.batch]
        x = dsa(images(index, step), generator, recipe.dsa, recipe.strengths)
        with torch.no_grad():
            target = teacher(x)
        loss = kd_loss(net(prepare(x)), target, recipe.temperature)
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / -(-steps // per_epoch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    teacher.eval()
    if not loss.isfinite():
        raise UserError(f"distilling knowledge ended at loss {loss.item()}; lower --kd.lr {lr:g}")
