"""Boost-PCA: KRR-ST's pairs as a low-rank code, with fixed views of every image and small networks for their targets.

After Boost-SSDD (Yu, Yao and Chiu, ICLR 2025, arXiv:2507.21455), of which no code was published and whose tables could
not be read: what is assumed, departures, results and cost: README.md#boost_pca.

    python boost_pca.py --data cifar100    # the storage of 100 pairs, 30,000 steps; wants a GPU
    python boost_pca.py                    # bundled digits, teacher and comparison included: two minutes on a CPU
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil, inf
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import kernels
from common.artefact import Distilled, load_distilled, save_distilled
from common.augment import gather, resident
from common.baselines import kmeans_medoids
from common.bases import (
    LARGE,
    VIEWS,
    Code,
    Pca,
    decode,
    dequantised,
    downsample,
    feature_pca,
    image_pca,
    quantised,
    shift,
    storage,
    view,
)  # fmt: skip
from common.data import Data, denormalise, describe, hold_out, load, normalise
from common.models import PAIR_NETS, ConvNet, convnet_depth, features_chunked, pair_net, resnet_dim
from common.pairs import Protocol, evaluate_pairs, paired, predict_seconds, table
from common.recipes import fill_teacher, train_teacher
from common.run import (
    Run,
    UserError,
    bytes_per_image,
    check_limits,
    check_memory,
    cli,
    fill,
    fit_chunk,
    pick_device,
    preset_name,
    rng,
    seeded,
    write_json,
)  # fmt: skip
from common.teacher import load_teacher


@dataclass
class Args:
    # the run: word for word the same in all five scripts
    data: str = "digits"
    """data set name (digits, mnist, fashion_mnist, cifar10, cifar100, svhn, stl10, tiny_imagenet, imagenette,
    imagewoof, imagenet, flowers, aircraft, cars, cub200, dogs), or a folder: train/<class>/* and test/<class>/*,
    <class>/*, or unlabelled images"""
    data_dir: str = "data"
    """where public sets are downloaded to and decoded folders are cached"""
    size: int | None = None
    """side of the images in pixels; None: a named set's usual size, a folder as it is (unequal images need it)"""
    resize: Literal["squash", "crop"] = "squash"
    """squash: straight to a square with Lanczos (published for fine-grained sets); crop: centre crop"""
    channels: Literal["auto", "rgb", "grey"] = "auto"
    """auto: grey folders stay one channel, a mixture is refused; rgb, grey: convert"""
    test_fraction: float = 0.2
    """share held out as test images of a folder without a test split"""
    split_seed: int = 0
    """seed of that split, apart from --seed so that all seeds share one split and one teacher"""
    holdout: float = 0.0
    """share of the training images kept out of distillation, on which the curve of --eval-every is measured; 0: on the
    test images"""
    skip_bad_images: bool = False
    """leave out images that cannot be read, and count them, instead of stopping at the first"""
    preset: str | None = None
    """whose defaults to take; None: the set's own name, folders by image size (8px, 16px, 48px, 96px: from there on)"""
    out_dir: str = "runs"
    """run folders go here, teachers into its teachers/"""
    seed: int = 0
    """seed of the initial images, the networks and the batches"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    resume: str | None = None
    """run folder to go on with; its args.json gives the defaults, flags of the method must not change"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the convolutions; the ridge never runs below fp32"""
    ridge_precision: Literal["auto", "fp64", "fp32"] = "auto"
    """of the kernel ridge regression; auto: fp64 on the CPU and on GPUs with full-rate float64"""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """of the ridge: this project's Triton kernels (CUDA only), torch, or auto: whichever was measured faster on this
    class of GPU (torch without a measurement)"""
    log_every: int = 20
    """steps between log points (TensorBoard, progress bar, check for non-finite values)"""
    save_every: int | None = None
    """steps between checkpoints; None: from the preset"""
    save_minutes: float = 10.0
    """minutes between checkpoints, beside --save-every; 0: only by steps"""
    cache_gb: float = 4.0
    """memory for what is computed once and used again: augmented targets, whitened images, a linear probe's features"""
    chunk: int | None = None
    """distilled images per pass of the outer gradient (exact, one more forward pass); None: all that fit the memory"""

    # the method
    budget_images: int | None = None
    """N: the set may take the storage of N uncompressed pairs of image and target; None: from the preset"""
    budget_rule: Literal["pairs", "pixels"] = "pairs"
    """what those pairs count: image and target, or the image alone (both were read into the paper)"""
    num_images: int | None = None
    """m, distilled images, each with all its views; None: as many as the budget holds. More are refused"""
    steps: int | None = None
    """outer steps; None: from the preset"""
    batch_real: int | None = None
    """real images per outer step (KRR-ST: 1024); None: from the preset"""
    bases: Literal["pca", "random", "real", "none"] = "pca"
    """how bases begin: principal components, random directions, random real images; none: plain pairs, KRR-ST's"""
    image_bases: int | None = None
    """U, bases of the images; None: from the preset"""
    feature_bases: int | None = None
    """V, bases of the targets; None: from the preset"""
    downsample: int | None = None
    """pixels of a side of the image that share one of a basis; None: from the preset"""
    balance: bool | None = None
    """coefficients of unit variance, bases scaled by what is taken from them; None: from the preset"""
    views: Literal["none", "rotations", "flips", "dihedral", "corners", "tones"] | None = None
    """fixed views of each image, beside itself, with targets of their own (common/bases.py); None: from the preset"""
    outer_views: Literal["all", "base"] = "all"
    """rows of the outer ridge: all views, or the images alone, so that the views' targets are never learned"""
    approx: Literal["after", "joint", "rank", "none"] = "after"
    """what stores a view's targets: networks fitted at the end, networks learned from the start, a closed-form map of
    the same storage; none: coefficients of their own"""
    hidden: int | None = None
    """width of the networks' hidden layer, or rank of the map; None: from the preset"""
    approx_steps: int = 500
    """Adam steps that fit the networks, with all rows"""
    approx_lr: float = 0.01
    """their learning rate"""
    coefficients: Literal["fp32", "fp16", "int8"] = "fp32"
    """type of the stored coefficients; the budget counts numbers, result.json also bytes and what rounding costs"""
    lr_img: float | None = None
    """AdamW's learning rate of the images' bases and coefficients (1e-3 at full size)"""
    lr_label: float | None = None
    """AdamW's learning rate of the targets' bases and coefficients"""
    lr_end: float = 0.0
    """last learning rate as a fraction of the first; linear in between"""
    grad_clip: float = 0.0
    """clip the gradient norm of each learned tensor to this; 0: off"""
    ridge: float = 1e-6
    """lam = ridge * trace(K_ss), or its mean: see --ridge-scale"""
    ridge_scale: Literal["trace", "trace_mean"] = "trace"
    """trace: KRR-ST's; trace_mean: divided by the rows, FRePo's, that many times weaker"""
    ridge_grad: bool = False
    """let the gradient flow through lam (KRR-ST detaches it)"""
    widths: tuple[int, ...] | None = None
    """channels of the ConvNet's blocks, for instance 128 256 512; None: from the preset"""
    norm: Literal["batch", "instance", "none"] = "batch"
    """norm after each convolution"""
    pool: int = 10
    """networks in the pool"""
    max_age: int | None = None
    """training steps after which a network is replaced (published 1000); None: from the preset"""
    pool_reset: Literal["fixed", "released"] = "fixed"
    """fixed: a replaced network is of age 0; released: keeps its age, so that the pool dies out as in the release"""
    pool_opt: Literal["sgd", "adamw"] = "sgd"
    """inner optimizer of the pool"""
    lr_net: float = 0.1
    """its learning rate"""
    momentum_net: float = 0.9
    """its momentum (sgd)"""
    wd_net: float = 1e-3
    """its weight decay"""

    # the teacher
    teacher: str | None = None
    """train (by --teacher-method on --data, cached), a file (this project's, a published ResNet's), torchvision:NAME or
    timm:NAME; None: from the preset"""
    teacher_method: Literal["barlow", "moco2", "moco3", "swav", "dino", "supervised"] = "barlow"
    """how it is trained: Barlow Twins, MoCo v2 or v3, SwAV, DINO, or with the labels"""
    teacher_arch: Literal["resnet10", "resnet18", "resnet50"] | None = None
    """of the trained teacher; None: from the preset"""
    teacher_width: int | None = None
    """channels of its first stage (64 published); None: from the preset"""
    teacher_epochs: int | None = None
    """its epochs; None, here and below: the method's, common/recipes.py"""
    teacher_batch: int | None = None
    """its batch"""
    teacher_lr: float | None = None
    """its learning rate: per 256 images where LARS optimises (all but moco2 and supervised)"""
    teacher_wd: float | None = None
    """its weight decay"""
    teacher_eta: float | None = None
    """barlow, moco3, swav, dino: LARS's trust coefficient (solo-learn 0.02, most authors 0.001)"""
    teacher_projector: int | None = None
    """barlow, moco3, swav, dino: hidden width of the head"""
    teacher_dim: int | None = None
    """moco2, moco3, swav, dino: of the embeddings that are compared"""
    teacher_temperature: float | None = None
    """moco2, moco3, swav: of the scores; dino: of the targets, a student's is 0.1"""
    teacher_key_momentum: float | None = None
    """moco2, moco3, dino: of the encoder that follows; moco3's and dino's rises to 1"""
    teacher_queue: int | None = None
    """moco2: negatives kept from earlier batches; swav: embeddings kept for the assignments"""
    teacher_epsilon: float | None = None
    """swav: of the assignments; lower it if the loss stays at log(prototypes)"""
    teacher_prototypes: int | None = None
    """swav, dino: clusters"""
    teacher_splits: int | None = None
    """moco2: parts of a batch that BatchNorm normalises each by itself, as GPUs would"""
    teacher_mlp: bool | None = None
    """moco2: a head of two layers (ImageNet)"""
    teacher_crop_min: float | None = None
    """smallest area of a view, as a fraction of the image"""
    teacher_small_crops: int | None = None
    """swav, dino: further, smaller views of areas below --teacher-crop-min (multi-crop)"""
    teacher_blur: bool | None = None
    """moco2, moco3, swav, dino: blurred views"""
    teacher_seed: int = 0
    """seed of its training, apart from --seed so that all seeds of a method share one teacher"""
    stem_padding: int = 2
    """zero padding of its 3x3 stem (KRR-ST and solo-learn 2, others 1)"""

    # the evaluation
    eval_runs: int = 5
    """fresh networks per row of the table"""
    eval_every: int = 0
    """outer steps between evaluations of the distilled set, as a curve that says when it is flat; 0: only at the end"""
    eval_epochs: int | None = None
    """epochs of pretraining on the decoded pairs (batch 256, SGD 0.1, momentum 0.9, weight decay 1e-3), as many
    steps for all rows (published 1000 epochs); None: from the preset"""
    eval_probe_steps: int | None = None
    """steps of the linear probe (published 5000); None: from the preset"""
    eval_finetune_steps: int | None = None
    """steps of fine-tuning on the source set (published 10,000); 0: leave it out; None: from the preset"""
    eval_models: tuple[str, ...] = ("convnet",)
    """networks that are pretrained on the sets: convnet, vgg11, alexnet, mobilenet, resnet10, resnet18, vit, or
    timm:NAME; a table each"""
    full_row: bool = False
    """add a row pretrained on all real images with their targets, for as many steps"""
    compare: bool = True
    """distil plain KRR-ST pairs of the same storage too, for a row; random and k-means rows are always there"""
    ablate: bool = False
    """distil with bases alone, and with views whose coefficients are stored, at the same budget, for two rows more"""
    pairs_steps: int | None = None
    """outer steps of the plain pairs; None: from the preset"""
    pairs_lr_img: float | None = None
    """their images' learning rate; None: from the preset, krr_st.py's"""
    pairs_lr_label: float | None = None
    """their targets' learning rate; None: from the preset, krr_st.py's"""


PUBLISHED = dict(  # of CIFAR-100, second-hand; CIFAR-10, where nothing was published, and folders take it too
    save_every=1000,
    budget_images=100,
    steps=30_000,
    batch_real=1024,
    image_bases=200,
    feature_bases=200,
    downsample=2,
    balance=False,
    views="rotations",
    hidden=4,
    lr_img=1e-3,
    lr_label=1e-3,
    widths=(128, 256, 512),
    max_age=1000,
    teacher="train",
    teacher_arch="resnet18",
    teacher_width=64,
    eval_epochs=1000,
    eval_probe_steps=5000,
    eval_finetune_steps=10_000,
    pairs_steps=30_000,
    pairs_lr_img=1e-4,
    pairs_lr_label=1e-4,
)
SIZE_64 = PUBLISHED | dict(
    steps=20_000,
    image_bases=400,
    feature_bases=400,
    downsample=4,
    hidden=16,
    widths=(64, 128, 256, 512),
    pairs_steps=20_000,
    pairs_lr_img=1e-5,
    pairs_lr_label=1e-5,
)
SIZE_224 = SIZE_64 | dict(
    budget_images=10,
    num_images=200,  # the budget would hold thousands, which are trained on in one batch
    image_bases=100,
    feature_bases=60,
    widths=(32, 64, 128, 256, 512),
    eval_finetune_steps=5000,
)
SMALL = PUBLISHED | dict(budget_images=30, image_bases=48, feature_bases=32)
DIGITS = PUBLISHED | dict(  # Boost-PCA's departure 9: upright views, bases of all pixels
    save_every=200,
    budget_images=30,
    steps=1000,
    batch_real=512,
    image_bases=24,
    feature_bases=16,
    downsample=1,
    balance=True,
    views="tones",
    hidden=2,
    lr_img=3e-2,
    lr_label=1e-2,
    widths=(32, 64),
    max_age=8,
    teacher_arch="resnet10",
    teacher_width=32,
    eval_epochs=300,
    eval_probe_steps=300,
    eval_finetune_steps=0,
    pairs_steps=2000,
    pairs_lr_img=1e-1,
    pairs_lr_label=1e-2,
)
PRESETS = {
    "digits": DIGITS,
    "mnist": PUBLISHED | dict(budget_images=50, steps=20_000, image_bases=64, feature_bases=64, pairs_steps=20_000),
    "cifar10": PUBLISHED,
    "cifar100": PUBLISHED,
    "tiny_imagenet": SIZE_64,
    "imagenet": SIZE_64,
    "dogs": SIZE_64,
    "8px": DIGITS,
    "16px": SMALL,  # folders, which may be grey and of few images
    "48px": SIZE_64 | dict(budget_images=20, image_bases=100, feature_bases=64),
    "96px": SIZE_224,
}
LIMITS = {  # of flags: one that is out of them is refused before anything begins
    (1, inf): "budget_images steps batch_real image_bases feature_bases downsample hidden approx_steps save_every "
    "log_every chunk widths pool max_age eval_runs eval_epochs eval_probe_steps pairs_steps",
    (0, inf): "lr_img lr_label lr_net wd_net ridge grad_clip approx_lr cache_gb save_minutes eval_every "
    "eval_finetune_steps stem_padding pairs_lr_img pairs_lr_label",
    (0, 1): "lr_end momentum_net",
}


def code_floats(
    m: int,
    basis: int,
    dim: int,
    image_bases: int,
    feature_bases: int,
    views: int,
    approx: str,
    hidden: int,
    coefficients: str,
) -> dict[str, int]:
    """Numbers that a code of m images stores, by what they are; their sum is storage()'s floats.

    basis, dim: numbers of an image basis and of a target; views: beside the image itself.
    """
    of_view = 2 * feature_bases * hidden + feature_bases + hidden  # two layers with biases
    stored = approx == "none"
    columns = image_bases + feature_bases * (1 + views * stored)
    return {
        "image bases": image_bases * basis,
        "feature bases": feature_bases * dim,
        "means": basis + dim,  # Boost-PCA's departure 1: kept, and paid for
        "networks": 0 if stored else views * of_view,
        "scales": columns if coefficients == "int8" else 0,
        "coefficients": m * columns,
    }


def arithmetic(floats_of: Callable[[int], dict[str, int]], m: int) -> str:
    """What m images take, in words. floats_of: number of images -> {part: floats}, as code_floats."""
    parts, each = floats_of(m), sum(floats_of(1).values()) - sum(floats_of(0).values())
    words = " + ".join(f"{name} {floats}" for name, floats in parts.items() if floats)
    return f"{m} images, {each} each: {words} = {sum(parts.values())}"


def fit_budget(floats_of: Callable[[int], dict[str, int]], budget: int, words: str, wish: int | None) -> int:
    """How many images `budget` floats hold. Raises UserError, with the arithmetic, if none or not `wish` of them."""
    fixed = sum(floats_of(0).values())
    most = max(0, (budget - fixed) // (sum(floats_of(1).values()) - fixed))
    if most < (wish or 1):
        raise UserError(
            f"--budget-images: {words} are {budget} floats, which hold {most}, not {arithmetic(floats_of, wish or 1)}; "
            "raise it, or lower --num-images, --image-bases, --feature-bases or --hidden"
        )
    return most


def first_code(found: Pca, rows: Tensor, kind: str, balance: bool, *key) -> tuple[Tensor, Tensor]:
    """Bases (k, D) and the coefficients (n, k) of rows (n, D) that leave the least error, float64: rows = c b + mean.

    kind: "pca", the components found; "random", orthonormal directions; "real", rows themselves, less the mean, drawn
    again where they are fewer. balance: coefficients of unit mean square, the bases scaled by what they lost.
    """
    (k, dim), generator = found.bases.shape, rng("bases", *key)
    if kind == "pca":
        bases, c = found.bases, found.scores(rows)
    else:
        rows = rows.double() - found.mean
        if kind == "random":
            bases = torch.linalg.qr(torch.randn(dim, k, generator=generator, dtype=torch.float64))[0].T
        else:
            draws = [torch.randperm(len(rows), generator=generator) for _ in range(-(-k // len(rows)))]
            bases = rows[torch.cat(draws)[:k]]
            bases = bases / bases.norm(dim=1, keepdim=True).clamp(min=1e-12)
        c = torch.linalg.lstsq(bases.T, rows.T, driver="gelsd").solution.T
    if balance:
        size = c.square().mean(0).sqrt().clamp(min=1e-6)
        bases, c = bases * size[:, None], c / size
    return bases, c


def fit_networks(
    c_y: Tensor, target: Tensor, b_y: Tensor, hidden: int, steps: int, lr: float, *key
) -> dict[str, Tensor]:
    """Networks of all views that predict the coefficients' shift, by Adam on all rows: {w1, b1, w2, b2} of `shift`.

    c_y (m, V), target (A, m, V): the views' coefficients less c_y; b_y (V, d): the error is that of the features, which
    is the coefficients' where the bases are orthonormal. key: of the first weights, those of torch's linear layers.
    """
    views, rank = len(target), c_y.shape[1]
    # Boost-PCA's departure 3: the features' error, not the coefficients'; inputs of unit size for any scale of bases
    size = c_y.square().mean().sqrt()
    shapes = dict(w1=(hidden, rank), b1=(hidden,), w2=(rank, hidden), b2=(rank,))
    q = {}
    for name, of_view in shapes.items():
        bound = (rank if name in ("w1", "b1") else hidden) ** -0.5
        uniform = torch.rand(views, *of_view, generator=rng("shift", *key, name))
        q[name] = ((2 * uniform - 1) * bound).to(c_y).requires_grad_()
    optimizer = torch.optim.Adam(q.values(), lr=lr)
    wanted = (target / size) @ b_y
    for _ in range(steps):
        loss = F.mse_loss(shift(c_y / size, *q.values(), relu=True) @ b_y, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    w1, b1, w2, b2 = (value.detach() for value in q.values())
    return dict(w1=w1 / size, b1=b1, w2=w2 * size, b2=b2 * size)


def reduced_rank(c_y: Tensor, target: Tensor, b_y: Tensor, rank: int, ridge: float = 1e-6) -> dict[str, Tensor]:
    """The affine maps of that rank with the least squared error of the features, in closed form: {w1, b1, w2, b2}.

    Reduced-rank ridge regression (Mukherjee and Zhu 2011): of the fitted features of the rows, and of the rows that
    stand for the ridge, the first right singular vectors are kept. Arguments as fit_networks; rank <= V.
    """
    x, b = c_y.double(), b_y.double()
    centre = x.mean(0)
    x, n = x - centre, x.shape[1]
    lam = (ridge * x.square().sum() / n).clamp(min=1e-12)  # one image, or equal ones: the shift is the constant
    q = dict(w1=[], b1=[], w2=[], b2=[])
    for y in target.double():
        mean = y.mean(0)
        full = torch.linalg.solve(x.T @ x + lam * torch.eye(n).to(x), x.T @ (y - mean))  # (V, V)
        fitted = torch.cat([x @ full, lam.sqrt() * full]) @ b  # (m + V, d)
        kept = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]  # (rank, d), in the span of the bases
        back = torch.linalg.lstsq(b.T, kept.T).solution  # (V, rank): kept = back^T b
        down = (full @ b @ kept.T).T  # (rank, V)
        for name, value in zip(q, (down, -(down @ centre), back, mean), strict=True):
            q[name].append(value)
    return {name: torch.stack(values).to(c_y.dtype) for name, values in q.items()}


def rounding_error(x: Tensor, exact: Tensor) -> float:
    """Root of the squared error over that of the mean row, over the size of a single row. (N, ...), (N, ...)."""
    spread = exact - exact.mean(0) if len(exact) > 1 else exact
    return float(((x - exact).square().sum() / spread.square().sum().clamp(min=1e-30)).sqrt())


def unexplained(c_y: Tensor, target: Tensor, b_y: Tensor, q: dict[str, Tensor], relu: bool) -> list[float]:
    """Of every view: squared error of its predicted shift of the features over the shift's squared size; 0 of none."""
    error = (target - shift(c_y, *(q[key] for key in ("w1", "b1", "w2", "b2")), relu)) @ b_y
    error, size = (part.square().sum((1, 2)) for part in (error, target @ b_y))
    return torch.where(size > 1e-10 * (c_y @ b_y).square().sum(), error / size, torch.zeros_like(size)).tolist()


def ridge_lam(f_s: Tensor, ridge: float, scale: str, grad: bool) -> Tensor:
    """lam = ridge * trace(K_ss) [/ n_s], the squared norm of [f_s, 1], f_s (n_s, d). Detached unless `grad`."""
    trace = f_s.square().sum() + len(f_s)
    lam = ridge * (trace if scale == "trace" else trace / len(f_s))
    return lam if grad else lam.detach()


def krr_st_loss(
    f_t: Tensor, y_t: Tensor, f_s: Tensor, y_s: Tensor, lam: Tensor, precision: str = "auto", backend: str = "auto"
) -> Tensor:
    """Mean over batch and dimensions of (K_ts (K_ss + lam I)^-1 y_s - y_t)^2: the paper's outer objective.

    f_t: (n_t, d), f_s: (n_s, d) the networks' features, y_t: (n_t, c) the teacher's, y_s: (n_s, c). K is the Gram
    matrix of [h(x), 1]: the constant feature, never stored, is the head's bias, regularised like the rest.
    """
    prediction = kernels.krr_predict(f_t, f_s, y_s, lam, ones=True, precision=precision, backend=backend)
    return F.mse_loss(prediction, y_t)


@lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=rng("batch", seed, epoch))


def batch_index(step: int, n: int, batch: int, seed: int) -> Tensor:
    """Indices of the step-th real batch: shuffled epochs, the last short batch kept. (<= batch,)"""
    per_epoch = -(-n // batch)
    return epoch_order(n, seed, step // per_epoch)[step % per_epoch * batch :][:batch]


class Pool:
    """Networks at different ages, each trained on the current decoded pairs, one full-batch step when drawn."""

    def __init__(self, make_net, device, args: Args):
        self.make_net, self.device, self.args = make_net, device, args
        self.births = [0] * args.pool  # networks each slot has had: the key of its next network's weights
        self.ages = [0] * args.pool  # steps trained
        self.nets, self.optimizers = [None] * args.pool, [None] * args.pool
        for slot in range(args.pool):
            self.replace(slot)

    def replace(self, slot: int) -> None:
        with seeded("pool network", self.args.seed, slot, self.births[slot]):
            self.nets[slot] = self.make_net().to(self.device)
        self.births[slot] += 1
        params, lr, wd = self.nets[slot].parameters(), self.args.lr_net, self.args.wd_net
        if self.args.pool_opt == "sgd":
            momentum = self.args.momentum_net
            self.optimizers[slot] = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=wd, foreach=True)
        else:
            self.optimizers[slot] = torch.optim.AdamW(params, lr=lr, weight_decay=wd, foreach=True)

    def train(self, slot: int, x_s: Tensor, y_s: Tensor) -> None:
        """One step of the inner objective: mean squared error over all views and d, train-mode BatchNorm."""
        net, optimizer = self.nets[slot].train(), self.optimizers[slot]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            prediction = net(x_s)
        optimizer.zero_grad()
        F.mse_loss(prediction.float(), y_s).backward()
        optimizer.step()

    def warm_up(self, x_s: Tensor, y_s: Tensor) -> None:
        """Spread the ages: each network is trained for its own random number of steps in 1 .. max_age - 1."""
        for slot in tqdm(range(self.args.pool), desc="start of the pool", leave=False):
            generator = rng("start age", self.args.seed, slot)
            self.ages[slot] = int(torch.randint(1, max(2, self.args.max_age), (), generator=generator))
            for _ in range(self.ages[slot]):
                self.train(slot, x_s, y_s)

    def grow(self, slot: int, x_s: Tensor, y_s: Tensor) -> None:
        """After the outer step: replace the network if it is of age, else train it once more."""
        if self.ages[slot] >= self.args.max_age:
            self.replace(slot)
            if self.args.pool_reset == "fixed":  # Boost-PCA's departure 7: KRR-ST's release keeps it
                self.ages[slot] = 0
        else:
            self.ages[slot] += 1
            self.train(slot, x_s, y_s)

    def state_dict(self) -> dict:
        parts = [(net.state_dict(), opt.state_dict()) for net, opt in zip(self.nets, self.optimizers, strict=True)]
        return dict(nets=[p[0] for p in parts], optimizers=[p[1] for p in parts], ages=self.ages, births=self.births)

    def load_state_dict(self, state: dict) -> None:
        for slot in range(self.args.pool):
            self.nets[slot].load_state_dict(state["nets"][slot])
            self.optimizers[slot].load_state_dict(state["optimizers"][slot])
        self.ages, self.births = state["ages"], state["births"]


def memory_needs(make_net, data: Data, dim: int, pairs: int, device, args: Args) -> tuple[int, dict]:
    """Bytes of one decoded image in the outer step, and {phase: {flag: bytes}} of all the rest: see check_memory.

    pairs: decoded, all views together.
    """
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with torch.device("meta"):  # shapes alone
        net, x = make_net().to(dtype), torch.zeros(2, data.channels, data.size, data.size, dtype=dtype)
        others = [pair_net(name, data.channels, data.size, dim, args.widths, args.norm) for name in args.eval_models]
    train, outer = bytes_per_image(net, x), bytes_per_image(net.frozen(), x.clone().requires_grad_())
    train = int(1.5 * train)  # and the gradients of the largest maps
    tuned = int(1.5 * max(bytes_per_image(other, x.float()) for other in others))
    n_train, n_t, d = len(data.x_train), args.batch_real, net.dim + 1
    width, ridge = 4 if args.ridge_precision == "fp32" else 8, min(pairs, d)
    copies = 3 if args.pool_opt == "sgd" else 4  # weights, gradients, momenta
    basis = data.x_train[0].numel() // args.downsample**2
    held = {
        "libraries": 200_000_000,  # that are loaded on the way
        "--pool or --widths": args.pool * copies * 4 * sum(p.numel() for p in net.parameters()),
        "the number of images": 4 * n_train * dim,  # their targets
        "--num-images": 2 * 4 * pairs * (data.x_train[0].numel() + dim),  # decoded, for the step and for the pool
        "--image-bases": 4 * 4 * args.image_bases * basis,  # with gradients and moments
    }
    step = {
        "--batch-real": n_t * (int(0.6 * outer) + 2 * width * d),  # of its maps two at a time, features in two types
        "--num-images": held["--num-images"] + width * (3 * pairs * d + 2 * ridge**2),  # features, Gram matrix, factor
    }
    features = 4 * n_train * max(other.dim for other in others)
    batch = 256 if args.full_row or args.eval_finetune_steps else min(pairs, 256)  # images of an evaluation's batch
    score = {"--eval-models or --widths": batch * tuned, "--cache-gb": features * (features <= args.cache_gb * 1e9)}
    views = 4 * pairs * data.x_train[0].numel()  # of the first images, one at a time at the teacher
    begin = {"--downsample": 5 * 8 * min(basis, LARGE) ** 2 + 8 * 1024 * data.x_train[0].numel(), "--num-images": views}
    phases = {"outer step": step, "training of the pool": {"--num-images": held["--num-images"] + pairs * train}}
    phases |= {"evaluation": score, "principal components": begin}
    return outer, {phase: held | parts for phase, parts in phases.items()}


def main(args: Args) -> dict:
    # data
    device = pick_device(args.device)
    data = load(
        args.data,
        data_dir=args.data_dir,
        size=args.size,
        resize=args.resize,
        channels=args.channels,
        test_fraction=args.test_fraction,
        seed=args.split_seed,
        skip_bad_images=args.skip_bad_images,
    )
    check_limits(args, {(0, 0.9): "holdout"})
    data, curve_data = hold_out(data, args.holdout, args.split_seed) if args.holdout else (data, data)
    preset = preset_name(PRESETS, args.preset, data.name, data.native, data.size)
    recipe = "tiny_imagenet" if preset in ("imagenet", "dogs") else preset  # all of 64 px here
    args = fill_teacher(fill(args, PRESETS[preset]), recipe, data.labelled)
    check_limits(args, LIMITS)
    n_train, names = len(data.x_train), VIEWS[args.views]
    if data.size < 4:
        raise UserError(f"--size {data.size}: must be at least 4, the network halves it {len(args.widths)} times")
    if args.num_images is not None and not 1 <= args.num_images <= n_train:
        raise UserError(f"--num-images {args.num_images}: must be 1 to {n_train}, the training images")
    if len(args.widths) != convnet_depth(data.size):
        raise UserError(f"--widths {args.widths}: {data.size} px images take {convnet_depth(data.size)} blocks")
    if args.bases != "none" and data.size % args.downsample:
        raise UserError(f"--downsample {args.downsample}: must divide the {data.size} px of a side; 1 keeps them")
    if args.bases == "none" and args.views != "none":
        raise UserError("--bases none: plain pairs have no views here; add --views none")
    if args.ablate and not (names and args.approx != "none"):
        raise UserError("--ablate: takes views and networks away; leave --bases, --views and --approx as they are")
    if args.outer_views == "base" and args.approx == "joint":
        raise UserError("--outer-views base: learns nothing of the views' targets; take --approx after, rank or none")
    if not args.eval_models:
        raise UserError(f"--eval-models: name at least one of {', '.join(PAIR_NETS)}")
    print(f"data: {describe(data)}; preset {preset}")
    teacher = None if args.teacher == "train" else load_teacher(args.teacher, data, device, args.stem_padding)
    dim = teacher.dim if teacher else resnet_dim(args.teacher_arch, args.teacher_width)  # d, of the targets
    shape = (data.channels, data.size // args.downsample, data.size // args.downsample)  # (C, s, s), of the bases
    image, basis = data.x_train[0].numel(), data.channels * shape[1] ** 2
    code = args.bases != "none"
    for flag, wish, numbers, of in (
        ("--image-bases", args.image_bases, basis, "numbers of a basis"),
        ("--feature-bases", args.feature_bases, dim, "the teacher's features"),
    ):
        most, of = min((numbers, of), (n_train - 1, "the training images less one"))
        if code and wish > most:
            raise UserError(f"{flag} {wish}: must be at most {most}, {of}")
    if names and args.approx != "none" and args.hidden > args.feature_bases:
        raise UserError(f"--hidden {args.hidden}: must be at most --feature-bases {args.feature_bases}")

    def floats_of(views: int, approx: str) -> Callable[[int], dict[str, int]]:
        if not code:
            return lambda m: {"images": m * image, "targets": m * dim}
        sizes = dict(image_bases=args.image_bases, feature_bases=args.feature_bases, hidden=args.hidden)
        sizes |= dict(basis=basis, dim=dim, coefficients=args.coefficients)
        return partial(code_floats, views=views, approx=approx, **sizes)

    # Boost-PCA's departure 4: the third party takes one image for each that it may store
    budget = args.budget_images * (image + (dim if args.budget_rule == "pairs" else 0))
    words = f"{args.budget_images} images" + (" with targets" if args.budget_rule == "pairs" else "")
    most = fit_budget(floats_of(len(names), args.approx), budget, words, args.num_images)
    args = replace(args, num_images=args.num_images or min(most, n_train))
    used = floats_of(len(names), args.approx)
    print(f"budget: {words} are {budget} floats; {arithmetic(used, args.num_images)}")
    ablations = {}  # row: views and images of the same storage
    if args.ablate:
        taken = sum(used(args.num_images).values())
        for row, views in (("bases_only", "none"), ("and_views", args.views)):
            m = fit_budget(floats_of(len(VIEWS[views]), "none"), taken, f"--ablate: the set's {taken} numbers", None)
            ablations[row] = dict(views=views, num_images=min(m, n_train))
    pairs = args.num_images * (1 + len(names))  # M, decoded

    def make_net() -> ConvNet:
        return ConvNet(data.channels, data.size, dim, args.widths, args.norm)

    image_bytes, phases = memory_needs(make_net, data, dim, pairs, device, args)
    if args.chunk is None:
        args = replace(args, chunk=fit_chunk(pairs, image_bytes, sum(phases["outer step"].values()), device))
    phases["outer step"]["--chunk"] = min(args.chunk, pairs) * image_bytes
    need = check_memory(phases, device)
    try:
        ridge = kernels.describe(args.ridge_precision, device, args.backend)
    except ValueError as error:  # float64 or Triton where the device has none
        raise UserError(f"--ridge-precision or --backend: {error}") from None
    print(ridge)
    run = Run(__file__, args, data.name, data.content)
    args = run.args
    mean, std = data.mean.to(device), data.std.to(device)

    # teacher
    if teacher is None:
        teacher = train_teacher(
            args.teacher_method,
            data,
            Path(args.out_dir) / "teachers",
            device,
            arch=args.teacher_arch,
            width=args.teacher_width,
            stem_padding=args.stem_padding,
            epochs=args.teacher_epochs,
            batch=args.teacher_batch,
            lr=args.teacher_lr,
            weight_decay=args.teacher_wd,
            eta=args.teacher_eta,
            projector=args.teacher_projector,
            dim=args.teacher_dim,
            temperature=args.teacher_temperature,
            key_momentum=args.teacher_key_momentum,
            queue=args.teacher_queue,
            epsilon=args.teacher_epsilon,
            prototypes=args.teacher_prototypes,
            splits=args.teacher_splits,
            mlp=args.teacher_mlp,
            crop_min=args.teacher_crop_min,
            small_crops=args.teacher_small_crops,
            blur=args.teacher_blur,
            seed=args.teacher_seed,
            precision=args.precision,
            save_minutes=args.save_minutes,
        )
    teacher.net.to(device)
    # the targets of un-augmented images never change: computed once, never in the loop
    targets_train = teacher.cached_targets(data.x_train, data.content, "train", device)  # (N, c)
    targets_test = teacher.cached_targets(data.x_test, data.content, "test", device)
    targets_curve = targets_test
    if args.holdout:
        targets_curve = teacher.cached_targets(curve_data.x_test, curve_data.content, "held", device)
    run.check_same("teacher's features", targets_train[:8])
    of_mean = float((targets_train - targets_train.mean(0)).square().mean())  # loss of predicting the mean
    if not of_mean > 0:
        raise UserError(f"the features of teacher {teacher.name} are the same for all images; take another teacher")

    # distilled set
    index = torch.randperm(n_train, generator=rng("initial images", args.seed))[: args.num_images]
    x_0 = normalise(data.x_train[index], data.mean, data.std)  # (m, C, H, W)
    fixed, variance = {}, {}
    if not code:  # KRR-ST's, for comparison
        learned = dict(x=x_0, y=targets_train[index])
    else:
        turned = (denormalise(view(x_0, name), data.mean, data.std) for name in names)
        targets = torch.cat([targets_train[index], *(teacher.targets(x, device) for x in turned)])  # ((1 + A) m, d)
        found_x = image_pca(data.x_train, data.mean, data.std, args.downsample, args.image_bases, device)
        found_y = feature_pca(targets_train, args.feature_bases, device)
        fixed = dict(mu_x=found_x.mean, mu_y=found_y.mean)
        variance = {"images": found_x.unexplained(), "targets": found_y.unexplained()}
        words = "components: as many leave out {images:.1%} of the images' variance, {targets:.1%} of the targets'"
        print(words.format(**variance))
        rows = [downsample(part, data.mean, data.std, args.downsample) for part in data.x_train[index].split(1024)]
        b_x, c_x = first_code(found_x, torch.cat(rows), args.bases, args.balance, args.seed, "images")
        b_y, c = first_code(found_y, targets, args.bases, args.balance, args.seed, "features")
        c_y, *c_v = c.view(1 + len(names), args.num_images, -1)
        learned = dict(b_x=b_x, c_x=c_x, b_y=b_y, c_y=c_y)
        if names:
            learned["c_v"] = torch.stack(c_v)  # (A, m, V)
    learned = {key: value.float() for key, value in learned.items()}
    fixed = {key: value.float().to(device) for key, value in fixed.items()}
    at_start = None  # the share of the first shift that networks learned jointly leave out
    if names and args.approx == "joint":
        c_y, b_y = learned["c_y"], learned["b_y"]
        target = learned.pop("c_v") - c_y
        q = fit_networks(c_y, target, b_y, args.hidden, args.approx_steps, args.approx_lr, args.seed)
        at_start, learned = unexplained(c_y, target, b_y, q, relu=True), learned | q
    learned = {key: value.contiguous().to(device).requires_grad_() for key, value in learned.items()}
    if args.outer_views == "base":  # Boost-PCA's departure 2: the third party's; they stay as they began
        learned = {key: value.requires_grad_(key != "c_v") for key, value in learned.items()}
    moving = {key: value for key, value in learned.items() if value.requires_grad}
    of_images = [value for key, value in moving.items() if key in ("x", "b_x", "c_x")]
    of_targets = [value for key, value in moving.items() if key not in ("x", "b_x", "c_x")]
    groups = [{"params": of_images, "lr": args.lr_img}, {"params": of_targets, "lr": args.lr_label}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # Boost-PCA's departure 5: no decay, no clamp, no clip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - (1 - args.lr_end) * t / args.steps)

    def decoded() -> tuple[Tensor, Tensor]:
        """Normalised images (M, C, H, W) and targets (M, d), all views."""
        return decode(learned | fixed, shape, args.downsample, names, True) if code else (learned["x"], learned["y"])

    # networks
    pool = Pool(make_net, device, args)
    curve = []
    if run.state is None:
        with torch.no_grad():
            x_s, y_s = decoded()
        pool.warm_up(x_s, y_s)
    else:
        with torch.no_grad():
            for key, value in learned.items():
                value.copy_(run.state["learned"][key])
        optimizer.load_state_dict(run.state["optimizer"])
        schedule.load_state_dict(run.state["schedule"])
        pool.load_state_dict(run.state["pool"])
        curve, run.state = run.state["curve"], None

    def checkpoint(step: int) -> None:
        states = dict(optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), pool=pool.state_dict())
        values = {key: value.detach() for key, value in learned.items()}
        run.save(step, checked=targets_train[:8], learned=values, curve=curve, **states)

    recipe = Protocol(
        runs=args.eval_runs,
        epochs=args.eval_epochs,
        probe_steps=args.eval_probe_steps,
        finetune_steps=args.eval_finetune_steps,
    )
    rows = ("teacher",) if data.labelled else ()
    rows += ("none", "random_real", "kmeans") + (("krr_st",) if args.compare else ())
    rows += (("bases_only", "and_views") if args.ablate else ()) + ("distilled",)
    rows += ("distilled_fp32",) if code and args.coefficients != "fp32" else ()
    rows += (("all_real",) if args.full_row else ()) + ("random_real_bytes", "kmeans_bytes")
    rows += ("krr_st_bytes",) if args.compare and "distilled_fp32" in rows else ()

    def make(model: str) -> Callable[[], torch.nn.Module]:
        return partial(pair_net, model, data.channels, data.size, dim, args.widths, args.norm)

    def seconds(rows: tuple[str, ...], models: tuple[str, ...]) -> float:
        predicted = (
            predict_seconds(make(model), data, pairs, dim, device, recipe, args.cache_gb, rows) for model in models
        )
        return sum(predicted)

    def scores_file(model: str) -> Path:
        return run.file("evaluation.json" if model == "convnet" else f"evaluation_{model}.json")

    alone = run.is_part()  # plain pairs or an ablation of another run, which scores them
    seconds_all = 0.0 if alone else seconds(rows, args.eval_models)
    seconds_curve = seconds(("distilled",), args.eval_models[:1]) if args.eval_every else 0.0

    def seconds_later(done: int) -> float:
        """Of the distillations and evaluations that are still to come after `done` steps."""
        points = (args.steps - 1) // args.eval_every - done // args.eval_every if args.eval_every else 0
        parts = args.pairs_steps * sum(row.startswith("krr_st") for row in rows) + len(ablations) * args.steps
        # as if each of their steps took as long as ours
        return seconds_all + points * seconds_curve + parts * run.seconds_per_step()

    def as_stored(coefficients: str) -> tuple[Code, list[float] | None]:
        """The set as it is now, as a file holds it, and the unexplained share of each view's shift."""
        tensors, left = {key: value.detach().cpu() for key, value in (learned | fixed).items()}, at_start
        if names and args.approx in ("after", "rank"):
            c_y, b_y = dequantised(quantised({"c_y": tensors["c_y"]}, coefficients))["c_y"], tensors["b_y"]  # as read
            target = tensors.pop("c_v") - c_y
            if args.approx == "rank":
                q = reduced_rank(c_y, target, b_y, args.hidden)
            else:
                q = fit_networks(c_y, target, b_y, args.hidden, args.approx_steps, args.approx_lr, args.seed)
            left = unexplained(c_y, target, b_y, q, args.approx != "rank")
            tensors |= q
        return Code(quantised(tensors, coefficients), shape, args.downsample, names, args.approx != "rank"), left

    def stored_size(tensors: dict[str, Tensor]) -> dict[str, float]:
        return storage(tensors | dict(mean=data.mean, std=data.std), data.x_train.shape[1:], dim)

    def save(step: int) -> Distilled:
        """Save the set and load it again: what is scored is what was saved."""
        x = y = stored = None
        extra = dict(widths=args.widths, norm=args.norm)
        extra |= dict(budget=dict(images=args.budget_images, rule=args.budget_rule, floats=budget))
        if code:
            stored, left = as_stored(args.coefficients)
            extra |= dict(storage=stored_size(stored.tensors), shift_unexplained=left)
        else:
            x, y = denormalise(learned["x"].detach(), mean, std), learned["y"]
            extra |= dict(storage=stored_size(dict(x=x, y=y)))
        save_distilled(
            run.file("distilled.safetensors"),
            x,
            y,
            data.mean,
            data.std,
            method=run.name,
            data=data.name,
            content=data.content,
            y_is="teacher features",
            class_names=data.class_names,
            resize=data.resize,
            step=step,
            seed=args.seed,
            recipe=vars(recipe),
            teacher=teacher.info | dict(name=teacher.name),
            code=stored,
            extra=extra,
        )
        return load_distilled(run.file("distilled.safetensors"), run.name)

    def on_curve(step: int) -> bool:
        return args.eval_every > 0 and step % args.eval_every == 0 and step < args.steps

    def curve_point(step: int) -> None:
        """Score the set as it is, and add it to the curve."""
        with run.aside():
            scores = evaluate_pairs(
                save(step), curve_data, targets_train, targets_curve, make(args.eval_models[0]), device, recipe,
                args.seed, ("distilled",), args.cache_gb, scores_file(args.eval_models[0]),
            )["distilled"]  # fmt: skip
        curve.append({"step": step, **scores})
        run.log_evaluation(step, {f"eval/{key}": value["mean"] for key, value in scores.items()})
        run.plateau(curve, "match")

    # outer loop
    x_train = resident(data.x_train, device, spare=need)  # (N, C, H, W) uint8
    y_train = resident(targets_train, device, spare=need)  # (N, c)

    def shown() -> Tensor:
        """Pixels for the grid, each image followed by its views."""
        with torch.no_grad():
            x = decoded()[0].unflatten(0, (1 + len(names), -1)).transpose(0, 1).flatten(0, 1)
        return denormalise(x, mean, std)

    per_row = max(1, 12 // (1 + len(names))) * (1 + len(names))
    if run.start == 0:
        checkpoint(0)
        run.grid(0, args.steps, shown, per_row)
    elif on_curve(run.start) and run.start not in [point["step"] for point in curve]:  # stopped in this evaluation
        curve_point(run.start)
    for step in run.steps(args.steps, seconds_later):
        slot = int(torch.randint(args.pool, (), generator=rng("slot", args.seed, step)))
        # eval mode, folded: BatchNorm uses statistics gathered from the distilled images; the weights get no gradient
        features = pool.nets[slot].frozen()
        index = batch_index(step, len(x_train), args.batch_real, args.seed)
        # Boost-PCA's departure 6: real images are neither augmented nor turned, so their targets are computed once
        y_t = gather(y_train, index).to(device)  # (n_t, d)
        x_t = normalise(gather(x_train, index).to(device), mean, std)  # (n_t, C, H, W)
        x_s, y_s = decoded()  # (M, C, H, W), (M, d): the images, then their views
        if args.outer_views == "base":
            x_s, y_s = x_s[: args.num_images], y_s[: args.num_images]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            with torch.no_grad():
                f_t = features(x_t)
            f_s = features_chunked(features, x_s, args.chunk)
        f_t, f_s = f_t.float(), f_s.float()  # (n_t, features), (M, features)
        lam = ridge_lam(f_s, args.ridge, args.ridge_scale, args.ridge_grad)
        loss = krr_st_loss(f_t, y_t, f_s, y_s, lam, args.ridge_precision, args.backend)
        for tensor, grad in zip(moving.values(), torch.autograd.grad(loss, list(moving.values())), strict=True):
            tensor.grad = grad
        if args.grad_clip:
            for tensor in moving.values():
                torch.nn.utils.clip_grad_norm_([tensor], args.grad_clip)
        optimizer.step()
        age, lr_img = pool.ages[slot], optimizer.param_groups[0]["lr"]
        schedule.step()
        with torch.no_grad():
            x_s, y_s = decoded()
        pool.grow(slot, x_s, y_s)

        done = step + 1
        logging = done % args.log_every == 0 or done in (1, args.steps)
        saving = on_curve(done) or run.due(done, args.save_every)
        if logging or saving:
            relative = float(loss.detach()) / of_mean
            scalars = {"loss": relative, "mse": relative * of_mean, "lam": float(lam.detach())}
            run.check_finite(done, scalars, f"n_s {len(x_s)}, d {f_s.shape[1]}")
            if logging:
                run.log(done, scalars | {"age": age, "lr_img": lr_img})
        run.grid(done, args.steps, shown, per_row)
        if saving:
            checkpoint(done)
        if on_curve(done):  # after the checkpoint: a run that is stopped in it goes on with it
            curve_point(done)

    # evaluation
    del x_train, y_train  # the other sets' runs load their own
    distilled = save(args.steps)
    size, left = distilled.meta["storage"], distilled.meta.get("shift_unexplained")
    facts = dict(
        data=data.name,
        num_images=args.num_images,
        pairs=pairs,
        steps=args.steps,
        teacher=teacher.info | dict(name=teacher.name),
        loss_of_mean=of_mean,
        storage=size,
        budget=distilled.meta["budget"],
        variance_left_out=variance,
        shift_unexplained=left,
        backend=ridge,
        images_skipped=data.skipped,
        storage_bytes=distilled.meta["storage_bytes"],
    )
    if alone:
        return run.finish(**facts)
    print(f"storage: {size['floats']} floats, {size['pairs']:.1f} pairs or {size['pixels']:.1f} images uncompressed; "
          f"{size['bytes']} bytes in the file")  # fmt: skip
    if left is not None:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, left, strict=True))
        print(f"shift of the views' targets, unexplained{' at the start' if at_start else ''}: {shares}")

    def part(name: str, **changes) -> Distilled:
        """The set of a run like this one but for these flags, in a folder of this one's; made unless it is there."""
        if not (run.file(name) / "result.json").exists():
            own = dict(compare=False, ablate=False, eval_every=0, coefficients="fp32")
            main(run.part(name, **own | changes))
            checkpoint(args.steps)  # its seconds count
        return load_distilled(run.file(name) / "distilled.safetensors", run.name)

    def as_pairs(n: int) -> Distilled:
        rates = dict(lr_img=args.pairs_lr_img, lr_label=args.pairs_lr_label, steps=args.pairs_steps)
        plain = dict(bases="none", views="none", budget_rule="pairs", budget_images=n, num_images=n, lr_end=1e-3)
        return part(f"krr_st_{n}", **plain, **rates)

    def drawn(index: Tensor) -> tuple[Tensor, Tensor]:
        return normalise(data.x_train[index].to(device), mean, std), targets_train[index].to(device)

    def random_real(n: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        return lambda r: drawn(torch.randperm(n_train, generator=rng("random real", args.seed, r))[:n])

    medoids = lru_cache(partial(kmeans_medoids, targets_train))

    def kmeans(n: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        return lambda r: drawn(medoids(n, args.seed, r))

    # as many as the set's storage would hold, rounded up: by numbers, and by bytes, where a real pixel costs one and a
    # target's number four, or two beside rounded coefficients
    counted = "pairs" if args.budget_rule == "pairs" else "images"
    n = min(n_train, ceil(size["pairs" if args.budget_rule == "pairs" else "pixels"]))
    n_bytes = min(n_train, ceil(size["bytes"] / (image + (4 if args.coefficients == "fp32" else 2) * dim)))
    counts = dict(random_real=n, kmeans=n, random_real_bytes=n_bytes, kmeans_bytes=n_bytes)
    others = {row: (kmeans if row.startswith("kmeans") else random_real)(count) for row, count in counts.items()}
    made = {}
    if args.compare:
        made["krr_st"] = as_pairs(n)
        if "krr_st_bytes" in rows:
            made["krr_st_bytes"] = as_pairs(min(n_train, ceil(size["bytes"] / (4 * (image + dim)))))
    if args.ablate:
        made |= {row: part(row, approx="none", **own) for row, own in ablations.items()}
    for row, each in made.items():
        others[row] = lambda r, each=each: (each.inputs().to(device), each.y.to(device))
        counts[row] = each.meta["num_images"]
    rounding = None
    if "distilled_fp32" in rows:
        x, y = as_stored("fp32")[0].decode()
        others["distilled_fp32"] = lambda r: (x.to(device), y.to(device))
        rounding = {"images": rounding_error(distilled.inputs(), x), "targets": rounding_error(distilled.y, y)}
        print("rounding of coefficients: {images:.2%} of the images, {targets:.2%} of the targets".format(**rounding))
    scores, against = {}, [row for row in rows if row in others]
    for model in args.eval_models:
        scores[model] = evaluate_pairs(
            distilled, data, targets_train, targets_test, make(model), device, recipe, args.seed,
            rows if model == args.eval_models[0] else rows[data.labelled :], args.cache_gb, scores_file(model), others,
        )  # fmt: skip
        caption = (
            f"{data.name}, {model}, {args.num_images} images ({pairs} with views) in the storage of {n} {counted}, "
            f"step {args.steps}, seed {args.seed}: mean ± sample std over {args.eval_runs} networks; accuracies in "
            "per cent"
        )
        print(table(scores[model], caption))
    first = scores[args.eval_models[0]]
    differences = {row: {m: paired(first, "distilled", row, m) for m in first["distilled"]} for row in against}
    if not args.holdout:  # else the curve is of other images than the table
        curve.append({"step": args.steps, **first["distilled"]})
    write_json(run.file("curve.json"), curve)
    real = first["random_real"]["match"]["mean"]
    points = {"distilled: match error": [(point["step"], point["match"]["mean"]) for point in curve]}
    points["random real: match error"] = [(0, real), (args.steps, real)]
    run.plot(points, f"{data.name}, {args.num_images} images: error relative to predicting the mean")
    return run.finish(
        **facts,
        eval=first,
        eval_models=scores,
        counts=counts | dict(distilled=args.num_images),
        distilled_minus=differences,
        rounding=rounding,
        protocol=vars(recipe),
    )


if __name__ == "__main__":
    cli(main, Args)
