"""The honest neighbours of a distilled set: noise, subsets of the real images, and sets made by matching (DM, DSA).

Subsets: random, k-means medoids of pixels or of a teacher's features, herding, images of high loss. Everything is
drawn from the training images alone and from keyed generators. DM and DSA are short restatements of the published
methods as they stand in their authors' code (GitHub VICO-UoE/DatasetCondensation); each departure says so there
(Evaluate's departure 6).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import dsa
from common.data import Data, Inputs
from common.models import ConvNet, convnet_depth
from common.run import UserError, rng, seed_of, seeded
from common.students import per_class

SUBSETS = ("random", "kmeans_pixels", "kmeans", "herding", "high_loss")
MATCHED = ("dm", "dsa")
ROWS = 65_536  # rows of features that are float64 at a time
KEPT_BYTES = 2 << 30  # of features in float64 that are kept rather than made again
SPARE = 4 << 30  # bytes left free on a CUDA device beside the real images


# -------------------------------------------------------------------------------------------------- noise and subsets


def gaussian(shape: tuple[int, ...], *key) -> Tensor:
    """Images of noise, N(0, 1) in every number of the networks' input: `shape`, float32 on the CPU."""
    return torch.randn(shape, generator=rng("gaussian", *key))


def share_of(y: Tensor, n: int, classes: int | None = None) -> int:
    """How many images of every class make n. y: (N,) labels; classes: how many there are, None: the highest label's.

    Raises UserError if n is no multiple of the classes, or a class has too few images.
    """
    counts = y.bincount(minlength=classes or 0)
    classes = len(counts)
    if n < 1 or n % classes:
        near = max(1, round(n / classes)) * classes
        raise UserError(f"{n} images: no multiple of the {classes} classes; ask for {near}, or do without balance")
    least, label = int(counts.min()), int(counts.argmin())
    if not least:
        raise UserError(f"class {label} has no training image; give it some, or leave the class out of the data")
    if least < n // classes:
        raise UserError(f"class {label} has {least} training images and {n // classes} of each class were asked for; "
                        f"ask for at most {least} a class, {least * classes} in all")  # fmt: skip
    return n // classes


def random_subset(y: Tensor | None, total: int, n: int, *key) -> Tensor:
    """Indices (n,) of random images: of all `total`, or with labels y (total,) as many of each class, in its order.

    What common/pairs.py and common/students.py train their "random_real" networks on, by the same keys. Raises
    UserError if there are too few images, or as share_of does.
    """
    if y is not None:
        return per_class(y, share_of(y, n), "random real", *key)
    enough(n, total)
    return torch.randperm(total, generator=rng("random real", *key))[:n]


def enough(n: int, total: int) -> None:
    """Raises UserError unless 1 <= n <= total."""
    if not 1 <= n <= total:
        raise UserError(f"{n} images were asked for and there are {total} training images; ask for 1 to {total}")


def kmeans_medoids(features: Tensor, n: int, *key) -> Tensor:
    """Indices (n,) of the images nearest to the centres of n clusters of features (N, d), each once."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = KMeans if len(features) <= 200_000 else MiniBatchKMeans  # hours, else, on ImageNet
    features = features.double() - features.double().mean(0)  # so that float32's rounding cannot choose
    fitted = kind(n, n_init=1, random_state=seed_of("kmeans", *key) % 2**32).fit(features.float().numpy())
    chosen = []
    for centres in torch.from_numpy(fitted.cluster_centers_).double().split(64):
        for row in torch.cdist(centres, features):  # (N,)
            row[chosen] = torch.inf
            chosen.append(int(row.argmin()))
    return torch.tensor(chosen)


def herding(features: Tensor, n: int) -> Tensor:
    """Indices (n,), in the order chosen: each time the image that brings the mean of the chosen nearest to all's.

    features: (N, d). Welling 2009 (Herding dynamical weights to learn), as iCaRL (Rebuffi et al. 2017) chooses its
    exemplars, but of features as they are, where iCaRL scales each to length 1. Deterministic, in float64, ROWS rows
    at a time: no N x N. Each image is chosen once. Raises UserError if there are too few images.
    """
    enough(n, len(features))
    parts = features.split(ROWS)
    mean = sum(part.double().sum(0) for part in parts) / len(features)
    centred = lambda: (part.double() - mean for part in parts)  # noqa: E731
    if 8 * features.numel() <= KEPT_BYTES:
        kept = list(centred())
        centred = lambda: kept  # noqa: E731
    half = torch.cat([part.square().sum(1) for part in centred()]) / 2
    total, chosen = torch.zeros_like(mean), []  # total: of the chosen, centred, so that its aim is 0
    for _ in range(n):
        # |total + f|^2 / 2 but for what is the same for all f; the divisor of the mean is the same as well
        score = half + torch.cat([part @ total for part in centred()])
        score[chosen] = torch.inf
        chosen.append(int(score.argmin()))
        total = total + features[chosen[-1]].double() - mean
    return torch.tensor(chosen)


def highest(losses: Tensor, n: int) -> Tensor:
    """Indices (n,) of the n highest of losses (N,), highest first, equal ones by index. Raises UserError if n > N."""
    enough(n, len(losses))
    return losses.sort(descending=True, stable=True).indices[:n].cpu()


def real_losses(
    x: Tensor, y: Tensor, data: Data, make_net: Callable[[], nn.Module], device: torch.device, *key,
    networks: int = 5, epochs: int = 1, batch: int = 256, lr: float = 0.1, momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> Tensor:  # fmt: skip
    """The loss of each training image after `epochs` of training on all of them, mean over networks: (N,) float64.

    x: (N, C, H, W) uint8; y: (N, d) targets (squared error, mean over d) or (N,) labels (cross-entropy); data: mean and
    std; make_net: draws a network. What MKDT (Joshi et al., ICLR 2025, arXiv:2410.02116) ranks its high-loss subset by
    in its code: the loss after the first epoch of SGD (batch 256, rate 0.1, momentum 0.9, weight decay 1e-4, no
    augmentation), mean over its 100 experts (Evaluate's departure 5: 5 networks). Scored in eval mode, without
    augmentation. Raises UserError if a loss is not finite.
    """
    images = Inputs(x, data.mean, data.std, None, device, 0.0, SPARE)
    total = torch.zeros(len(x), dtype=torch.float64)

    def losses_of(net: nn.Module, index: Tensor) -> Tensor:
        out, wanted = net(images(index)), y[index].to(device)
        if y.dim() == 1:
            return F.cross_entropy(out, wanted, reduction="none")
        return (out - wanted).square().mean(1)  # (B,)

    for number in range(networks):
        with seeded("real losses", *key, number):
            net = make_net().to(device).train()
        sgd = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        optimizer = torch.optim.SGD(net.parameters(), **sgd, foreach=True)
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=rng("real losses", *key, number, epoch))
            for index in order.split(batch):
                optimizer.zero_grad()
                losses_of(net, index).mean().backward()
                optimizer.step()
        net.eval()
        with torch.no_grad():
            total += torch.cat([losses_of(net, index).cpu() for index in torch.arange(len(x)).split(batch)])
    if not total.isfinite().all():
        raise UserError(f"high-loss subset: a network's loss is not finite after {epochs} epochs; lower its rate {lr}")
    return total / networks


def subset_of(
    name: str, data: Data, n: int, balanced: bool, features: Tensor | None, losses: Tensor | None, *key
) -> Tensor:
    """Indices (n,) of training images by a name in SUBSETS.

    balanced: as many of every class, chosen inside each, class after class; else out of all images. features: (N, d) of
    the training images, for "kmeans" and "herding"; losses: (N,), for "high_loss" (see real_losses). "kmeans_pixels"
    needs all pixels that it clusters in memory, as float64. Raises UserError for another name, if what the name needs
    is missing, and if there are too few images.
    """
    if name not in SUBSETS:
        raise UserError(f"subset {name!r}: not one of {', '.join(SUBSETS)}; give one of these")
    if name in ("kmeans", "herding") and features is None:
        raise UserError(f"subset {name}: a teacher is needed for its features; give one, or take kmeans_pixels")
    if name == "high_loss" and losses is None:
        raise UserError("subset high_loss: the losses of the training images are needed; compute real_losses first")
    if balanced and not data.labelled:
        raise UserError(f"subset {name}: {data.name} has no labels to balance by; choose without balance")

    def choose(index: Tensor, n: int, *key) -> Tensor:
        if name == "kmeans_pixels":
            return index[kmeans_medoids(data.x_train[index].flatten(1).float() / 255, n, *key)]
        if name == "kmeans":
            return index[kmeans_medoids(features[index].cpu(), n, *key)]
        if name == "herding":
            return index[herding(features[index], n)]
        return index[highest(losses[index], n)]

    total = len(data.x_train)
    if name == "random":
        if balanced:
            share_of(data.y_train, n, data.num_classes)
        return random_subset(data.y_train if balanced else None, total, n, *key)
    if not balanced:
        enough(n, total)
        return choose(torch.arange(total), n, *key)
    share = share_of(data.y_train, n, data.num_classes)
    classes = [(data.y_train == label).nonzero()[:, 0] for label in range(data.num_classes)]
    return torch.cat([choose(index, share, *key, label) for label, index in enumerate(classes)])


# ------------------------------------------------------------------------------------------------------ DM and DSA

STRATEGY = "color_crop_cutout_flip_scale_rotate"
# DSA's updates of the images per network, and epochs of the network between them, by images a class
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclass
class DM:
    """Distribution matching's settings, as published; recorded in result.json."""

    iterations: int = 20_000
    lr_img: float = 1.0
    momentum: float = 0.5
    batch_real: int = 256  # of each class
    strategy: str = STRATEGY  # of common.augment.dsa, strengths "dc"
    init: str = "real"  # or "noise"
    width: int = 128  # of every block of the ConvNet


@dataclass
class DSA:
    """Gradient matching's settings, as published for DSA; recorded in result.json."""

    iterations: int = 1000  # networks
    outer: int | None = None  # updates of the images on each network; None: LOOPS
    inner: int | None = None  # epochs of the network on the images between two of them; None: LOOPS
    lr_img: float = 0.1
    momentum: float = 0.5
    lr_net: float = 0.01
    batch_real: int = 256  # of each class
    batch_train: int = 256
    strategy: str = STRATEGY
    init: str = "real"
    width: int = 128


def loops(ipc: int, settings: DSA) -> tuple[int, int]:
    """(outer, inner); departure: of other numbers than the published ones, those of the nearest by ratio."""
    outer, inner = LOOPS[min(LOOPS, key=lambda known: max(known / ipc, ipc / known))]
    outer = outer if settings.outer is None else settings.outer
    return outer, inner if settings.inner is None else settings.inner


def convnet(data: Data, width: int, device: torch.device, *key) -> ConvNet:
    """The field's ConvNet with instance norm, drawn anew. Departure: depth by the image's size, not always 3; grey
    images are padded by 1 in the first convolution, not by 3."""
    with seeded(*key):
        depth = convnet_depth(data.size)
        return ConvNet(data.channels, data.size, data.num_classes, (width,) * depth, norm="instance").to(device)


def start(data: Data, ipc: int, device: torch.device, settings: DM | DSA, *key):
    """What both methods begin with.

    Returns (label, n, *key) -> network inputs (n, C, H, W) of n random training images of the class, all of it if it is
    smaller; the images to learn, (classes, ipc, C, H, W) network inputs; the strategy. Raises UserError without labels,
    for too few images of a class, and for an unknown init.
    """
    if not data.labelled:
        raise UserError(f"matching needs labels, and {data.name} has none; take another neighbour")
    if settings.init not in ("real", "noise"):
        raise UserError(f"init {settings.init!r}: not one of real, noise; give one of these")
    if ipc < 1:
        raise UserError(f"{ipc} images a class: give a number from 1 on")
    classes = data.num_classes
    share_of(data.y_train, classes, classes)  # each has an image
    inputs = Inputs(data.x_train, data.mean, data.std, None, device, 0.0, SPARE)
    members = [(data.y_train == label).nonzero()[:, 0] for label in range(classes)]

    def real(label: int, n: int, *key) -> Tensor:
        order = torch.randperm(len(members[label]), generator=rng("real batch", *key, label))
        return inputs(members[label][order[:n]])

    shape = (classes, ipc, *data.x_train.shape[1:])
    if settings.init == "real":
        x_s = inputs(random_subset(data.y_train, len(data.x_train), classes * ipc, *key)).view(shape)
    else:
        x_s = gaussian(shape, *key).to(device)
    # departure: a set whose mirrored images are other things is not mirrored
    names = [name for name in settings.strategy.split("_") if name != "flip" or data.flip]
    return real, x_s.requires_grad_(), "_".join(names)


def siamese(x_t: Tensor, x_s: Tensor, strategy: str, *key) -> list[Tensor]:
    """Real and synthetic images under one operation of DSA with one set of parameters for all of them."""
    return [dsa(x, rng("siamese", *key), strategy, "dc", shared=True) for x in (x_t, x_s)]


def check_finite(method: str, loss: float, x_s: Tensor, done: int, settings: DM | DSA) -> None:
    """Raises UserError if the loss or an image is not finite."""
    if not math.isfinite(loss) or not x_s.isfinite().all():
        raise UserError(f"{method}: not finite (loss {loss:.4g}) at iteration {done} of {settings.iterations}; "
                        f"lower the images' rate {settings.lr_img}")  # fmt: skip


def dm(
    data: Data, ipc: int, device: torch.device, settings: DM, *key, after: Callable = lambda done, loss: None
) -> Tensor:
    """Distribution matching (Zhao and Bilen 2023, arXiv:2110.04181): images (classes ipc, C, H, W), on the CPU.

    Network inputs, class after class. In each iteration, for each class, the squared distance between the mean
    embeddings of its real batch and of its images, in a ConvNet that nothing has trained. after(done, loss): called
    after each iteration with the loss before its update, mean over classes. The last iterate; bit for bit the same on a
    CPU. Raises UserError as `start` does, and if it diverges.
    """
    real, x_s, strategy = start(data, ipc, device, settings, *key)
    optimizer = torch.optim.SGD([x_s], settings.lr_img, momentum=settings.momentum)
    for iteration in range(settings.iterations):
        net = convnet(data, settings.width, device, "dm network", *key, iteration).requires_grad_(False)
        optimizer.zero_grad()
        losses = []
        for label, images in enumerate(x_s.unbind()):
            x_t = real(label, settings.batch_real, *key, iteration)
            x_t, images = siamese(x_t, images, strategy, *key, iteration, label)
            with torch.no_grad():
                aim = net.features(x_t).mean(0)  # (d,)
            loss = (net.features(images).mean(0) - aim).square().sum()
            loss.backward()  # class by class, which sums the gradients and keeps one class's maps in memory
            losses.append(loss.detach())
        optimizer.step()
        mean = torch.stack(losses).mean().item()
        check_finite("DM", mean, x_s, iteration + 1, settings)
        after(iteration + 1, mean)
    return x_s.detach().flatten(0, 1).cpu()


def gradient_distance(g_real: list[Tensor], g_syn: list[Tensor]) -> Tensor:
    """Sum over layers and their outputs of 1 - cosine between the two gradients of the weights of one output.

    Lists of one tensor a parameter, in the same order. Dataset condensation's (Zhao, Mopuri and Bilen 2021,
    arXiv:2006.05929), with 1e-6 beside the product of the lengths as in its code; biases and other parameters of one
    dimension do not count.
    """
    distance = g_syn[0].new_zeros(())
    for real, syn in zip(g_real, g_syn, strict=True):
        if real.dim() > 1:
            real, syn = real.flatten(1), syn.flatten(1)  # (outputs, weights of one)
            lengths = torch.linalg.vector_norm(real, dim=1) * torch.linalg.vector_norm(syn, dim=1)
            distance = distance + (1 - (real * syn).sum(1) / (lengths + 1e-6)).sum()
    return distance


def dsa_matching(
    data: Data, ipc: int, device: torch.device, settings: DSA, *key, after: Callable = lambda done, loss: None
) -> Tensor:
    """Gradient matching with siamese augmentation (Zhao and Bilen 2021, arXiv:2102.08259): as `dm`, same result.

    In each iteration a new network; `outer` times the images are updated, by the distance for each class between the
    network's gradients on a real batch and on its images, and between those the network is trained on the images for
    `inner` epochs. The loss told to `after` is the mean over classes and updates.
    """
    real, x_s, strategy = start(data, ipc, device, settings, *key)
    outer, inner = loops(ipc, settings)
    optimizer = torch.optim.SGD([x_s], settings.lr_img, momentum=settings.momentum)
    for iteration in range(settings.iterations):
        net, losses = convnet(data, settings.width, device, "dsa network", *key, iteration), []
        weights = list(net.parameters())
        for update in range(outer):
            at = *key, iteration, update
            optimizer.zero_grad()
            for label, images in enumerate(x_s.unbind()):
                x_t, images = siamese(real(label, settings.batch_real, *at), images, strategy, *at, label)
                y_t, y_s = (torch.full((len(x),), label, device=device) for x in (x_t, images))
                g_real = torch.autograd.grad(F.cross_entropy(net(x_t), y_t), weights)
                g_syn = torch.autograd.grad(F.cross_entropy(net(images), y_s), weights, create_graph=True)
                loss = gradient_distance(g_real, g_syn)
                loss.backward(inputs=[x_s])
                losses.append(loss.detach())
            optimizer.step()
            if update < outer - 1:  # after the last, the network is thrown away
                train_on(net, x_s.detach().flatten(0, 1), inner, settings, strategy, *at)
        mean = torch.stack(losses).mean().item()
        check_finite("DSA", mean, x_s, iteration + 1, settings)
        after(iteration + 1, mean)
    return x_s.detach().flatten(0, 1).cpu()


def train_on(net: nn.Module, x_s: Tensor, epochs: int, settings: DSA, strategy: str, *key) -> None:
    """DSA's inner loop: train net on the images, in place; plain SGD, each image augmented by itself.

    x_s: (classes ipc, C, H, W), class after class.
    """
    y_s = torch.arange(net.head.out_features).repeat_interleave(len(x_s) // net.head.out_features).to(x_s.device)
    optimizer = torch.optim.SGD(net.parameters(), settings.lr_net)
    generator = rng("dsa inner", *key)
    for _ in range(epochs):
        for index in torch.randperm(len(x_s), generator=generator).split(settings.batch_train):
            index = index.to(x_s.device)
            loss = F.cross_entropy(net(dsa(x_s[index], generator, strategy, "dc")), y_s[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
