"""SC-DD: squeeze a labelled set into a self-supervised network, and recover images from its BatchNorm statistics.

Zhou, Yin, Shao and Shen 2024, arXiv:2404.07976. Departures, results and cost: README.md#scdd.

    python scdd.py --data cifar100 --ipc 50    # the paper's size, both teachers included; wants a GPU
    python scdd.py                             # bundled digits, teachers and evaluation included: minutes on a CPU
"""

import copy
import io
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import cos, inf, log10, pi
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

import kernels
from common.analysis import Model, analyse, summary_table
from common.artefact import load_distilled, save_distilled
from common.augment import boxes, counter_uniform, cyclic_shift, resample, upload
from common.data import Data, Inputs, denormalise, describe, hold_out, load, normalise
from common.models import ResNet, replace_norms
from common.pretrain import COLLAPSED, quick_knn, train_probe, train_supervised
from common.recipes import LIMITS as TEACHER_LIMITS
from common.recipes import SETTINGS, fill_teacher, has, train_teacher, without_foreign
from common.relabel import (
    SoftRecipe,
    StoredLabels,
    digest,
    evaluate_soft,
    hits,
    label_all,
    label_bytes,
    predict_seconds,
    random_crops,
    table,
)
from common.run import (
    Run,
    UserError,
    bytes_per_image,
    check_limits,
    check_memory,
    cli,
    fill,
    first_line,
    fit_chunk,
    load_args,
    pick_device,
    preset_name,
    rng,
    save_grid,
    seeded,
    write_atomic,
)  # fmt: skip
from common.students import per_class
from common.teacher import Rescale, Teacher, classifier, freeze, load_classifier, load_teacher

SqueezeMethod = Literal["barlow", "moco2", "moco3", "swav", "dino", "supervised"]


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
    """share of the training images kept out of everything, on which all rows are scored in place of the test images, to
    choose flags by; 0: none"""
    skip_bad_images: bool = False
    """leave out images that cannot be read, and count them, instead of stopping at the first"""
    preset: str | None = None
    """whose defaults to take; None: the set's own name, folders by image size (8px, 16px, 48px, 96px: from there on)"""
    out_dir: str = "runs"
    """run folders go here, teachers into its teachers/"""
    seed: int = 0
    """seed of the initial images, the crops and the students"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    resume: str | None = None
    """run folder to go on with; its args.json gives the defaults, flags of the method must not change"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the convolutions in the teachers' training and in recovery; all else is fp32, students and labels too"""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """of the BatchNorm statistics: this project's Triton kernels (CUDA only), torch, or auto: whichever was measured
    faster on this class of GPU (torch without a measurement)"""
    log_every: int = 20
    """steps between log points (TensorBoard, progress bar, check for non-finite values)"""
    save_every: int | None = None
    """steps between checkpoints; None: from the preset"""
    save_minutes: float = 10.0
    """minutes between checkpoints, beside --save-every; 0: only by steps"""
    chunk: int | None = None
    """images recovered at a time, in whole batches, each of which is by itself; None: all that fit the memory"""

    # the method
    ipc: int | None = None
    """images per class (published 50 on CIFAR-100); None: from the preset"""
    steps: int | None = None
    """steps of recovery (published 1000); None: from the preset"""
    recover_batch: int | None = None
    """images whose statistics are matched together, of as many classes as there are (published 100; ImageNet 50); None:
    from the preset"""
    lr_img: float | None = None
    """Adam's learning rate of the pixels (code 0.4 on CIFAR-100, 0.1 on ImageNet, where the paper's table says 0.25);
    None: from the preset, with --teacher-method supervised that of --sre2l-lr-img"""
    r_bn: float | None = None
    """weight of the statistics beside the cross-entropy (published 0.005 on CIFAR-100, 0.01 on ImageNet); it belongs to
    one teacher; None: from the preset, with --teacher-method supervised that of --sre2l-r-bn"""
    first_bn_multiplier: float = 10.0
    """weight of the first BatchNorm among them, the others have 1"""
    init: Literal["noise", "real"] = "noise"
    """start from noise, or from real images of the class"""
    crop: bool | None = None
    """look at a random box of the images in every step, resized, mirrored with chance 1/2 unless a mirrored image is
    another thing (published: not on CIFAR-100); None: from the preset"""
    crop_min: float = 0.08
    """smallest area of the box, as a fraction of the image"""
    curriculum: bool = False
    """with --crop True: that area falls from 1 to --crop-min by a cosine over the steps (CDA)"""
    jitter: tuple[int, int] | None = None
    """least and largest cyclic shift along each axis, in pixels (published 0 4 on CIFAR-100, 0 32 on ImageNet); None:
    from the preset"""
    per_image: bool = False
    """draw box, mirror image and shift for each image; off: once for a batch and step, as published"""
    segments: int = 1
    """above 1: the steps in so many parts, between which the start comes back into the images (FADRM: 4)"""
    residual: float = 0.5
    """share of the start that comes back"""
    compile: bool = False
    """compile the recovery with torch.compile"""
    save_jpeg: bool = False
    """keep the images as the published code does, cut to 8 bits and through JPEG, which costs 15 to 22 dB"""
    sre2l: bool = True
    """recover from the supervised labelling teacher as well, as a row (SRe2L); not with --teacher-method supervised"""
    sre2l_lr_img: float | None = None
    """learning rate of that row (SRe2L 0.25 on CIFAR-100 and ImageNet); None: from the preset"""
    sre2l_r_bn: float | None = None
    """weight of the statistics in that row (SRe2L 0.01 on CIFAR-100 and ImageNet); None: from the preset"""

    # the teachers
    teacher: str | None = None
    """train (by --teacher-method on --data, cached), a file (this project's, a published ResNet's), torchvision:NAME or
    timm:NAME; None: from the preset"""
    teacher_method: SqueezeMethod = "moco2"
    """how the network that images are recovered from is trained: Barlow Twins, MoCo v2 or v3, SwAV, DINO; supervised:
    the labelling teacher is taken, which is SRe2L"""
    teacher_arch: Literal["resnet10", "resnet18", "resnet50"] | None = None
    """of the trained squeeze; None: from the preset"""
    teacher_width: int | None = None
    """channels of its first stage (64 published); None: from the preset"""
    teacher_epochs: int | None = None
    """its epochs (200 published); None: from the preset"""
    teacher_batch: int | None = None
    """its batch; None, here and below: the method's, common/recipes.py"""
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
    """seed of both teachers' training, apart from --seed so that all seeds of a method share them"""
    stem_padding: int = 1
    """zero padding of the squeeze's 3x3 stem (MoCo's and SC-DD's 1, files of solo-learn 2); other networks have 1"""
    probe_epochs: int | None = None
    """epochs of the linear probe on the squeezed network (MoCo 100); None: from the preset"""
    probe_lr: float | None = None
    """its learning rate, on features of root mean square 1; None: from the preset"""
    probe_augment: bool | None = None
    """crop and mirror the probe's images; off: features are computed once; None: from the preset"""
    label_teacher: str | None = None
    """the supervised network that labels: train (on --data, cached), a ResNet file with a classifier, or
    torchvision:NAME; None: from the preset"""
    label_arch: Literal["resnet10", "resnet18", "resnet50"] | None = None
    """of the trained labelling teacher; None: from the preset"""
    label_width: int | None = None
    """channels of its first stage; None: from the preset"""
    label_epochs: int | None = None
    """its epochs (SRe2L 200 on CIFAR-100, 50 on Tiny-ImageNet); None: from the preset"""
    label_batch: int | None = None
    """its batch; None: from the preset"""
    label_lr: float | None = None
    """its learning rate (SGD, cosine); None: from the preset"""
    label_wd: float | None = None
    """its weight decay (SRe2L 5e-4 on CIFAR-100, 1e-4 on Tiny-ImageNet); None: from the preset"""
    label_warm_up: int | None = None
    """epochs of its linear warm-up; None: from the preset"""
    label_crop: Literal["pad", "resized"] | None = None
    """its images: zero-padded, cropped and mirrored, or random boxes of them; None: from the preset"""

    # the evaluation
    labels: Literal["online", "stored"] = "online"
    """the labelling teacher looks at each view as a student does, or its scores of all epochs' views are stored beside
    the images in half precision and counted"""
    teacher_train_mode: bool = False
    """the labelling teacher's BatchNorm uses the statistics of each mixed batch, as in the published CIFAR script (its
    own stay as they are); off: eval mode"""
    published_metric: bool = False
    """also the maximum over prefixes of the test images, which the published CIFAR script prints as best accuracy"""
    eval_runs: int = 3
    """students per row"""
    eval_arch: Literal["resnet10", "resnet18", "resnet50"] | None = None
    """of the students; None: from the preset"""
    eval_width: int | None = None
    """channels of their first stage (64 published); None: from the preset"""
    eval_epochs: int | None = None
    """epochs of a student (published 200 on CIFAR-100, 500 Tiny-ImageNet, 300 ImageNet); None: from the preset"""
    eval_batch: int | None = None
    """images of an update (published 64; successors 16 to 50); None: from the preset"""
    eval_opt: Literal["adamw", "sgd"] | None = None
    """optimizer of a student; None: from the preset"""
    eval_lr: float | None = None
    """its learning rate (code 0.001, where the paper's table says 0.005 for CIFAR-100); None: from the preset"""
    eval_wd: float | None = None
    """its weight decay; None: from the preset"""
    eval_decay_all: bool | None = None
    """decay all parameters, or only those with more than one dimension; None: from the preset"""
    eval_warm_up: int | None = None
    """epochs of linear warm-up; None: from the preset"""
    eval_smooth: float | None = None
    """zeta: the rate is lr (1 + cos(pi e / (zeta E))) / 2 at epoch e of E: 1 a whole cosine, 2 the successors' half, 3
    as published on CIFAR-100; None: from the preset"""
    eval_temperature: float | None = None
    """of the soft labels (published 30 on CIFAR-100, else 20); None: from the preset"""
    eval_scaled: bool | None = None
    """times its square (published on Tiny-ImageNet alone); None: from the preset"""
    eval_loss: Literal["kl", "mse_ce"] = "kl"
    """Kullback-Leibler divergence from the teacher; or squared error of the scores plus --eval-ce times the cross-
    entropy with the classes (EDC)"""
    eval_ce: float = 0.025
    """weight of that cross-entropy"""
    eval_crop: Literal["pad", "resized", "none"] | None = None
    """views of a student: zero-padded and cropped, random boxes, or whole; all of them mirrored; None: from the
    preset"""
    eval_crop_min: float = 0.08
    """smallest area of such a box"""
    eval_mix: Literal["none", "mixup", "cutmix"] | None = None
    """mix each view with another image's; None: from the preset"""
    eval_mix_alpha: float | None = None
    """of the Beta distribution of the share; None: from the preset"""
    eval_ema: float = 0.0
    """score the running mean of a student's weights with this decay (EDC 0.99); 0: its last weights"""
    full_row: bool = False
    """add a row of students of all real images, for about as many updates, at least one epoch"""

    # the analysis
    analyse: bool = False
    """distil nothing: train networks by several methods and of several widths, compare their BatchNorm statistics, what
    a linear probe makes of them and what they cost; plots and JSON in the run folder. A flag --teacher-* is for all
    methods that have it"""
    analyse_methods: tuple[SqueezeMethod, ...] | None = None
    """methods as in --teacher-method, supervised by the flags --label-*; None: supervised and moco2"""
    analyse_widths: tuple[int, ...] | None = None
    """channels of the first stage; None: --teacher-width and half of it"""
    analyse_files: tuple[str, ...] | None = None
    """further networks, named as in --teacher"""


PUBLISHED = dict(  # of CIFAR-100; CIFAR-10, where nothing was published, and folders take it too
    save_every=200,
    ipc=50,
    steps=1000,
    recover_batch=100,
    lr_img=0.4,
    r_bn=0.005,
    sre2l_lr_img=0.25,
    sre2l_r_bn=0.01,
    crop=False,
    jitter=(0, 4),
    teacher="train",
    teacher_arch="resnet18",
    teacher_width=64,
    teacher_epochs=200,
    probe_epochs=100,
    probe_lr=30.0,
    probe_augment=True,
    label_teacher="train",
    label_arch="resnet18",
    label_width=64,
    label_epochs=200,
    label_batch=128,
    label_lr=0.1,
    label_wd=5e-4,
    label_warm_up=0,
    label_crop="pad",
    eval_arch="resnet18",
    eval_width=64,
    eval_epochs=200,
    eval_batch=64,
    eval_opt="adamw",
    eval_lr=1e-3,
    eval_wd=0.01,
    eval_decay_all=True,
    eval_warm_up=0,
    eval_smooth=3.0,
    eval_temperature=30.0,
    eval_scaled=False,
    eval_crop="pad",
    eval_mix="mixup",
    eval_mix_alpha=0.8,
)
SIZE_64 = PUBLISHED | dict(  # Tiny-ImageNet; SC-DD's departure 9: recovery is its parents'
    lr_img=0.6,
    r_bn=0.05,
    sre2l_lr_img=0.1,
    sre2l_r_bn=1.0,
    crop=True,
    jitter=(-4, 4),
    label_epochs=50,
    label_batch=256,
    label_lr=0.2,
    label_wd=1e-4,
    label_warm_up=5,
    label_crop="resized",
    eval_epochs=500,
    eval_batch=256,
    eval_opt="sgd",
    eval_lr=0.2,
    eval_wd=1e-4,
    eval_warm_up=5,
    eval_smooth=1.0,
    eval_temperature=20.0,
    eval_scaled=True,
    eval_crop="resized",
    eval_mix="none",
)
SIZE_224 = PUBLISHED | dict(  # ImageNet
    ipc=10,
    recover_batch=50,
    lr_img=0.1,
    r_bn=0.01,
    crop=True,
    jitter=(0, 32),
    teacher_arch="resnet50",
    label_epochs=90,
    label_batch=256,
    label_wd=1e-4,
    label_crop="resized",
    eval_epochs=300,
    eval_decay_all=False,
    eval_smooth=1.0,
    eval_temperature=20.0,
    eval_crop="resized",
    eval_mix="cutmix",
    eval_mix_alpha=1.0,
)
DIGITS = PUBLISHED | dict(  # SC-DD's departure 10
    save_every=100,
    ipc=10,
    steps=300,
    lr_img=0.1,
    r_bn=0.01,
    sre2l_lr_img=0.1,
    sre2l_r_bn=0.01,
    jitter=(0, 0),
    teacher_arch="resnet10",
    teacher_width=16,
    teacher_epochs=40,
    probe_augment=False,
    label_arch="resnet10",
    label_width=16,
    label_epochs=20,
    eval_arch="resnet10",
    eval_width=16,
    eval_epochs=100,
    eval_batch=50,
    eval_lr=1e-2,
    eval_smooth=2.0,
)
PRESETS = {
    "digits": DIGITS,
    "cifar10": PUBLISHED,
    "cifar100": PUBLISHED,
    "tiny_imagenet": SIZE_64,
    "imagenet": SIZE_224 | dict(teacher="file", label_teacher="torchvision:resnet18"),
    "imagenette": SIZE_224 | dict(teacher_arch="resnet18", teacher_epochs=800, label_epochs=200),
    "8px": DIGITS,
    "16px": PUBLISHED,
    "48px": SIZE_64,
    "96px": SIZE_224 | dict(teacher_arch="resnet18"),
}
SIZES = {"imagenet": 224}  # published, where the set's usual size is another
LIMITS = {  # of flags: one that is out of them is refused before anything begins
    (1, inf): "steps recover_batch save_every log_every chunk segments probe_epochs label_width label_epochs eval_runs "
    "eval_width eval_epochs eval_smooth",
    (2, inf): "label_batch eval_batch",
    (0, inf): "label_warm_up stem_padding eval_warm_up save_minutes",
    (0, 1e6): "lr_img r_bn first_bn_multiplier sre2l_lr_img sre2l_r_bn probe_lr label_lr label_wd "
    " eval_lr eval_wd eval_ce",
    (0, 1): "residual",
    (1e-4, 1): "crop_min eval_crop_min",
    (0, 0.9999): "eval_ema",
    (1e-3, inf): "eval_mix_alpha",
    (1e-6, inf): "eval_temperature",
}


class StatisticsNorm(nn.Module):
    """A frozen BatchNorm that keeps in `term` how far the statistics of its last input were from its own, (G,)."""

    def __init__(self, norm: nn.BatchNorm2d, groups: int, backend: str):
        super().__init__()
        self.norm, self.groups, self.backend, self.term = norm, groups, backend, None

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        y, self.term = kernels.bn_stats(
            x, n.weight, n.bias, n.running_mean, n.running_var, n.eps, groups=self.groups, backend=self.backend
        )
        return y if type(n) is nn.BatchNorm2d else n(x)  # timm's BatchNorm with an activation in it


def with_statistics(
    net: nn.Module, groups: int = 1, backend: str = "auto"
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The function x (G B, C, H, W) -> (scores (G B, classes), terms (L, G)) of a frozen network in eval mode.

    terms: ||v - sigma^2||_2 + ||m - mu||_2 of the L BatchNorms in the order in which they were registered, with m and
    v the mean and biased variance of their inputs over the images of a group (B that follow each other) and all pixels,
    mu and sigma^2 the running ones. The network itself is not changed.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    norms = replace_norms(net, lambda norm: StatisticsNorm(norm, groups, backend))

    def scores_and_terms(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = net(x)
        return scores, torch.stack([norm.term for norm in norms])

    return scores_and_terms


def recovery_terms(scores: Tensor, y: Tensor, terms: Tensor, first: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and statistics with the first BatchNorm's term times `first`: of each group, (G,) both.

    scores: (G B, classes), y: (G B,) class numbers, terms: (L, G). A group's loss is the first plus r_bn times the
    second; groups know nothing of each other, so their losses add up.
    """
    ce = F.cross_entropy(scores, y, reduction="none").unflatten(0, (terms.shape[1], -1)).mean(1)
    return ce, terms.sum(0) + (first - 1) * terms[0]


def looked_at(x: Tensor, u: Tensor, crop: bool, area: float, flip: bool, jitter: tuple[int, int]) -> Tensor:
    """Boxes of images (n, C, H, W) as the uniforms u (n, 7) say, resized and mirrored, then shifted cyclically.

    area: of the smallest box, the largest is the image. Differentiable with respect to x.
    """
    if crop:  # SC-DD's departure 7: boxes are clipped to the image
        mirrored = u[:, 4] < 0.5 if flip else torch.zeros_like(u[:, 4], dtype=torch.bool)
        x = resample(x, *boxes(u[:, :4], (area, 1.0)), mirrored)
    low, high = jitter
    if low == high == 0:
        return x
    down, right = (low + (u[:, 5:] * (high - low + 1)).long()).unbind(1)
    return cyclic_shift(x, down, right)


def smallest_area(t: int, steps: int, crop_min: float, curriculum: bool) -> float:
    """Of the boxes at step t: crop_min, or from 1 to it by a cosine (CDA, arXiv:2311.18838)."""
    return crop_min + (1 - crop_min) * 0.5 * (1 + cos(pi * t / steps)) if curriculum else crop_min


def recovery_batches(labels: Tensor, ipc: int, batch: int, chunk: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The classes (n,) of the images in the order of recovery, and the blocks that are recovered at a time: (first
    image, images, images of a batch).

    One image of every class, then a second one: batches of consecutive images hold as many classes as they can. A block
    is whole batches, at most `chunk` images; what is left over at the end is a block of one smaller batch.
    """
    # SC-DD's departure 6: the code recovers one image of each class at a time
    y = labels.repeat(ipc)
    batch = min(batch, len(y))
    whole, most = len(y) // batch * batch, max(1, chunk // batch) * batch
    blocks = [(first, min(most, whole - first), batch) for first in range(0, whole, most)]
    return y, blocks + [(whole, len(y) - whole, len(y) - whole)] * (whole < len(y))


def in_order(x: Tensor, ipc: int) -> Tensor:
    """From class after class, ipc each, to the order of recovery."""
    return x.unflatten(0, (-1, ipc)).transpose(0, 1).flatten(0, 1)


def by_class(x: Tensor, ipc: int) -> Tensor:
    """And back."""
    return x.unflatten(0, (ipc, -1)).transpose(0, 1).flatten(0, 1)


def through_jpeg(x: Tensor) -> Tensor:
    """Pixel units (n, C, H, W) as the published code keeps them: cut to 8 bits, JPEG of quality 75, and back."""
    images = []
    for image in x:
        file = io.BytesIO()
        picture(image, cut=True).save(file, format="JPEG")
        images.append(pil_to_tensor(Image.open(file)).float() / 255)
    return torch.stack(images)


def picture(x: Tensor, cut: bool = False) -> Image.Image:
    """Of pixel units (C, H, W), rounded to 8 bits, or cut."""
    return to_pil_image((x.clamp(0, 1) * 255 + (0.0 if cut else 0.5)).byte())


def write_images(folder: Path, x: Tensor, y: Tensor, class_names: list[str]) -> None:
    """The set as PNG files in a folder for each class."""
    for place, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        path = folder / re.sub(r"[^\w.-]+", "_", f"{label:03d}_{class_names[label]}") / f"{place:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(image).save(path)


def read_images(path: Path) -> Tensor:
    """The images in a file of this run. Raises UserError if it is missing or damaged."""
    try:
        return load_file(path)["x"]
    except (OSError, SafetensorError) as error:
        mend = "delete it" if path.name.startswith("random") else "delete it and checkpoint.pt to recover again"
        raise UserError(f"{path}: not readable ({first_line(error)}); {mend}, then resume") from None


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [0, 1], in dB."""
    return -10 * log10(max(1e-12, float((x - y).square().mean())))


def squeeze(args: Args, data: Data, device: torch.device) -> Teacher:
    """The network of --teacher-method, trained without labels, or from the folder of teachers."""
    return train_teacher(
        args.teacher_method,
        data,
        Path(args.out_dir) / "teachers",  # SC-DD's departure 8: published are none
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


def label_teacher(args: Args, data: Data, device: torch.device) -> Teacher:
    """The supervised network that labels, trained or from the folder of teachers."""
    return train_supervised(
        data,
        Path(args.out_dir) / "teachers",
        device,
        arch=args.label_arch,
        width=args.label_width,
        stem_padding=1,
        epochs=args.label_epochs,
        batch=args.label_batch,
        lr=args.label_lr,
        weight_decay=args.label_wd,
        warmup=args.label_warm_up,
        crop=args.label_crop,
        seed=args.teacher_seed,
        precision=args.precision,
        save_minutes=args.save_minutes,
    )


def align(args: Args, teacher: Teacher, data: Data, device: torch.device, folder: Path) -> tuple[nn.Linear, float]:
    """A linear probe on the network, which stays as it is, and its test accuracy. Kept beside the teacher if that can
    be written to, else in `folder`."""
    own = teacher.folder
    return train_probe(
        teacher,
        data,
        device,
        own if own and os.access(own, os.W_OK) else folder,
        epochs=args.probe_epochs,
        lr=args.probe_lr,
        augment=args.probe_augment,
        normalise=True,
        seed=args.teacher_seed,
        precision=args.precision,
        save_minutes=args.save_minutes,
    )


def backend_words(args: Args, device: torch.device) -> str:
    """What computes the statistics. Raises UserError for Triton where the device has none."""
    try:
        return kernels.describe("fp32", device, args.backend, "statistics")
    except ValueError as error:
        raise UserError(f"--backend: {error}") from None


def match_statistics(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    steps: int,
    lr: float,
    first: float,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Normalised images x (B, C, H, W) after `steps` of the recovery without cross-entropy: the statistics alone.

    function: of with_statistics, one group; mean, std (C, 1, 1): of the pixels, which stay in [0, 1].
    """
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], betas=(0.5, 0.9))
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + cos(pi * t / steps))
        terms = function(x)[1]
        (x.grad,) = torch.autograd.grad(terms.sum() + (first - 1) * terms[0].sum(), x)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-mean / std, (1 - mean) / std)
    return x.detach()


def analysis(args: Args, preset: str, data: Data, device: torch.device) -> dict:
    """--analyse: see common/analysis.py for what is measured."""
    check_limits(args, LIMITS | {(1, inf): LIMITS[1, inf] + " analyse_widths"})
    check_limits(args, TEACHER_LIMITS)
    widths = args.analyse_widths or tuple(sorted({max(1, args.teacher_width // 2), args.teacher_width}))
    args = replace(args, analyse_methods=args.analyse_methods or ("supervised", "moco2"), analyse_widths=widths)
    jobs = []  # one network each
    for method in args.analyse_methods:
        for width in widths:
            own = replace(args, teacher_method=method, teacher_width=width)
            if method == "supervised":
                own = replace(own, label_arch=args.teacher_arch, label_width=width)
            else:
                own = fill_teacher(without_foreign(own), preset, data.labelled)
            jobs.append(own)
    files = [
        load_teacher(spec, data, device, args.stem_padding, "--analyse-files") for spec in args.analyse_files or ()
    ]
    names = [teacher.name for teacher in files]
    if len(set(names)) < len(names):
        raise UserError(f"--analyse-files: two networks have one name ({', '.join(names)}); rename a file or folder")
    print(f"data: {describe(data)}; preset {preset}")
    stem = "cifar" if data.size <= 96 else "imagenet"
    shape = (args.teacher_arch, data.channels, max(widths), stem, args.stem_padding)
    batch = min(args.recover_batch, len(data.x_train))
    with torch.device("meta"):
        function, x = with_statistics(ResNet(*shape), backend="torch"), torch.zeros(2, *data.x_train.shape[1:])
        image = bytes_per_image(lambda x: function(x)[0], x.requires_grad_())
    check_memory({"statistics": {"--recover-batch": int(1.5 * batch * image)}}, device)
    print(backend_words(args, device))
    run = Run(__file__, args, data.name, data.content)

    # teacher
    with seeded("untrained", args.teacher_seed):
        blank = ResNet(*shape)
    untrained = f"untrained {args.teacher_arch}x{max(widths)}"
    teachers = {untrained: Teacher(freeze(blank), blank.dim, data.mean, data.std, untrained, {}, None)}
    for own in jobs:
        name = f"{own.teacher_method} {own.teacher_arch}x{own.teacher_width}"
        supervised = own.teacher_method == "supervised"
        teachers[name] = label_teacher(own, data, device) if supervised else squeeze(own, data, device)
    teachers |= {teacher.name: teacher for teacher in files}
    rows = {}
    for name, teacher in teachers.items():
        accuracy = align(args, teacher, data, device, run.folder)[1]
        net = nn.Sequential(Rescale(data.mean, data.std, teacher), teacher.net).to(device)
        rows[name] = dict(probe=accuracy, knn=quick_knn(net, data, device)) | {
            key: teacher.info.get(key)
            for key in ("epochs", "batch", "lr", "seconds", "loss", "embedding_std", "collapsed")
        }

    # evaluation
    smallest = int(data.y_train.unique(return_counts=True)[1].min())
    each = min(smallest, -(-batch // data.num_classes))
    chosen = in_order(per_class(data.y_train, each, "floor", args.seed), each)[:batch]
    noise = torch.randn(len(chosen), *data.x_train.shape[1:], generator=rng("measured noise", args.seed))
    images = {"noise": noise.to(device), "real": normalise(data.x_train[chosen].to(device), data.mean, data.std)}
    mean, std = data.mean.to(device)[:, None, None], data.std.to(device)[:, None, None]
    function = partial(with_statistics, backend=args.backend)
    bar = tqdm(total=len(teachers) - 1, desc="statistics")

    def recover(net: nn.Module) -> Tensor:
        bar.update()
        return match_statistics(
            function(net), images["noise"], args.steps, args.lr_img, args.first_bn_multiplier, mean, std
        )

    with bar:
        models = [
            Model(
                name,
                name.split()[0],
                next(teacher.net.parameters()).shape[0],
                nn.Sequential(Rescale(data.mean, data.std, teacher), teacher.net).to(device),
            )
            for name, teacher in teachers.items()
            if name != untrained
        ]
        title = f"{data.name}, {args.teacher_arch}"
        found = analyse(models, images, function, recover, run.folder, title, args.first_bn_multiplier)
    print(summary_table(found))
    print(teacher_table(rows))
    for model in found["models"]:
        del model["layers"]  # they are in analysis.json
    return run.finish(data=data.name, teachers=rows, analysis=found, images=len(chosen), images_skipped=data.skipped)


def teacher_table(rows: dict[str, dict]) -> str:
    """Markdown, one row a network: cost, loss at the first and last epoch that was kept, embedding std, accuracies."""
    lines = ["| teacher | epochs | seconds | loss | embedding std | k-NN | probe |", "|" + "---|" * 7]
    for name, row in rows.items():
        cells = [name, row["epochs"] or "-", "-" if row["seconds"] is None else f"{row['seconds']:.0f}"]
        for key, words in (("loss", "{0:.3g} to {1:.3g}"), ("embedding_std", "{1:.2f}")):
            values = list((row[key] or {}).values())
            cells.append(words.format(values[0], values[-1]) if values else "-")
        if values and values[-1] < COLLAPSED:
            cells[-1] += " (collapsed)"
        cells += [f"{100 * row['knn']:.1f}", f"{100 * row['probe']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def memory_needs(
    networks: dict[str, nn.Module], student: nn.Module, x: Tensor, n: int, args: Args
) -> tuple[int, dict[str, dict[str, int]]]:
    """Bytes of one image in recovery, and {phase: {flag: bytes}} of all the rest: see check_memory.

    networks: those that are recovered from; they, student and x (2, C, H, W) are of the meta device, where only shapes
    are known.
    """
    image = 0
    for net in networks.values():
        function = with_statistics(net, backend="torch")
        image = max(image, bytes_per_image(lambda x, f=function: f(x)[0], x.clone().requires_grad_()))
    image = 3 * image // 4 if args.precision == "bf16" else image  # gradients pass through float32
    weights = 4 * sum(p.numel() for net in [*networks.values(), student, student, student] for p in net.parameters())
    held = {"libraries": 300_000_000, "--teacher-width or --eval-width": 2 * weights}
    pixels = 5 * 4 * x[0].numel()  # with Adam's moments, the gradient and the start
    update = {"--eval-batch": int(1.5 * args.eval_batch * bytes_per_image(student, x))}
    if args.labels == "stored":
        update["--eval-epochs"] = 2 * n * student(x).shape[1]  # one epoch at a time
    phases = {"recovery": {}, "training of students": update}
    return int(1.5 * image) + pixels, {phase: held | parts for phase, parts in phases.items()}


def main(args: Args) -> dict:
    # data
    device = pick_device(args.device)
    data = load(
        args.data,
        data_dir=args.data_dir,
        size=args.size or SIZES.get(args.data),
        resize=args.resize,  # SC-DD's departure 12
        channels=args.channels,
        test_fraction=args.test_fraction,
        seed=args.split_seed,
        labelled=True,
        skip_bad_images=args.skip_bad_images,
    )
    check_limits(args, {(0, 0.9): "holdout"})
    if args.holdout:
        data = hold_out(data, args.holdout, args.split_seed)[1]
    named = args.size in (None, SIZES[args.data]) if args.data in SIZES else data.native
    preset = preset_name(PRESETS, args.preset, data.name, named, data.size)
    of = PRESETS[preset]
    if data.size < 4:
        raise UserError(f"--size {data.size}: must be at least 4 pixels")
    if args.analyse:
        of_files = dict(teacher=args.teacher, label_teacher=args.label_teacher)
        others = dict(label_arch=args.label_arch, label_width=args.label_width)
        for name, value in (of_files | others).items():
            if value not in (None, "train") and not args.resume:
                raise UserError(f"--{name.replace('_', '-')}: is not of --analyse; see --analyse-files and -widths")
        if args.teacher_method != "moco2":
            raise UserError("--teacher-method: is not of --analyse; see --analyse-methods")
        methods = args.analyse_methods or ("moco2",)
        for setting in () if args.resume else SETTINGS:
            owned = any(has(method, setting) for method in methods if method != "supervised")  # which has --label-*
            if getattr(args, f"teacher_{setting}") is not None and not owned:
                flag = f"--teacher-{setting.replace('_', '-')}"
                raise UserError(f"{flag}: none of {', '.join(methods)} has such a setting; drop the flag")
        return analysis(fill(args, of), preset, data, device)
    for name in ("analyse_methods", "analyse_widths", "analyse_files"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: is of --analyse; give that too")
    if args.teacher_method == "supervised":
        for setting in ("arch", "width", *SETTINGS):
            if getattr(args, f"teacher_{setting}") is not None:
                flag = f"--teacher-{setting.replace('_', '-')}"
                raise UserError(f"{flag}: with --teacher-method supervised the flags --label-* rule; drop this one")
        args = fill(args, dict(sre2l_lr_img=of["sre2l_lr_img"], sre2l_r_bn=of["sre2l_r_bn"]))
        of = {flag: value for flag, value in of.items() if not flag.startswith("teacher_")}
        args = fill(args, of | dict(lr_img=args.sre2l_lr_img, r_bn=args.sre2l_r_bn))
    else:
        if args.teacher not in (None, "train"):
            of = {flag: value for flag, value in of.items() if flag != "teacher_epochs"}
        args = fill_teacher(fill(args, of), preset, data.labelled)
    check_limits(args, LIMITS)
    labels, counts = data.y_train.unique(return_counts=True)  # a part may lack some
    classes, smallest, n = data.num_classes, int(counts.min()), args.ipc * len(labels)
    if not 1 <= args.ipc <= smallest:
        raise UserError(f"--ipc {args.ipc}: must be 1 to {smallest}, the training images of the smallest class")
    low, high = args.jitter
    if not -data.size < low <= high < data.size:
        raise UserError(f"--jitter {low} {high}: give two shifts in order, below the images' {data.size} pixels")
    if args.segments > args.steps:
        raise UserError(f"--segments {args.segments}: at most the {args.steps} of --steps")
    if args.segments > 1 and args.init != "real":
        raise UserError("--segments: the start that comes back must be real images; give --init real")
    for epochs, warm_up in ((args.eval_epochs, args.eval_warm_up), (args.label_epochs, args.label_warm_up)):
        if warm_up >= epochs:
            raise UserError(f"--eval-warm-up, --label-warm-up: {warm_up} of {epochs} epochs; leave some after it")
    if args.curriculum and not args.crop:
        raise UserError("--curriculum: is of the boxes of --crop; give --crop True as well")
    if args.per_image and not args.crop and low == high:
        raise UserError("--per-image: draws boxes and shifts; give --crop True or --jitter")
    if args.resume and args.chunk != load_args(Args, args.resume).chunk:
        raise UserError("--chunk: the blocks of images are part of a run that is resumed; drop the flag")
    if args.teacher_method == "supervised" and args.teacher not in ("train", "file"):
        raise UserError(
            f"--teacher {args.teacher}: --teacher-method supervised recovers from --label-teacher; drop one of them"
        )
    if args.teacher == "file" and args.teacher_method != "supervised":
        raise UserError(f"preset {preset} takes a published squeeze: --teacher FILE, or train")
    print(f"data: {describe(data)}; preset {preset}")
    stem = "cifar" if data.size <= 96 else "imagenet"
    shape = dict(channels=data.channels, stem=stem)
    recovered = ["distilled"] + (["sre2l"] if args.sre2l and args.teacher_method != "supervised" else [])

    def make_student() -> nn.Module:
        net = ResNet(args.eval_arch, width=args.eval_width, stem_padding=1, **shape)
        return nn.Sequential(net, nn.Linear(net.dim, classes))

    # networks that come as files are looked at before a folder is begun
    squeezed = label = None
    if args.label_teacher != "train":
        label = load_classifier(args.label_teacher, data, device)
    if args.teacher_method != "supervised" and args.teacher != "train":
        squeezed = load_teacher(args.teacher, data, device, args.stem_padding)
    source = dict(distilled="label" if args.teacher_method == "supervised" else "squeezed", sre2l="label")
    with torch.device("meta"):
        blank, x = {}, torch.zeros(2, data.channels, data.size, data.size)
        for name in sorted({"label", source["distilled"]}):
            own = dict(arch=args.label_arch, width=args.label_width, stem_padding=1)
            if name == "squeezed":
                own = dict(arch=args.teacher_arch, width=args.teacher_width, stem_padding=args.stem_padding)
            teacher = label if name == "label" else squeezed
            net = copy.deepcopy(teacher.net).to("meta") if teacher else ResNet(**own, **shape)
            blank[name] = nn.Sequential(net, nn.Linear(net(x).flatten(1).shape[1], classes)).eval()
        for row in recovered:
            if not any(isinstance(module, nn.BatchNorm2d) for module in blank[source[row]].modules()):
                own = source[row] == "squeezed"
                flag = f"--teacher {args.teacher}" if own else f"--label-teacher {args.label_teacher}"
                mend = "name one that has" if row == "distilled" else "name one that has, or give --no-sre2l"
                raise UserError(f"{flag}: has no BatchNorm, whose statistics images are recovered from; {mend}")
        blank_of = {row: blank[source[row]] for row in recovered}
        image, phases = memory_needs(blank_of, make_student(), x, n, args)
    if args.chunk is None:
        args = replace(args, chunk=fit_chunk(n, image, sum(phases["recovery"].values()), device))
    y, blocks = recovery_batches(labels, args.ipc, args.recover_batch, args.chunk)
    flag = "--chunk" if args.chunk >= 2 * args.recover_batch else "--recover-batch"
    phases["recovery"][flag] = max(size for _, size, _ in blocks) * image
    spare = phases["training of students"]["--eval-batch"] + 2**30  # sets of images stay on a GPU if this is left
    sets_of = {"--ipc": 12 * n * x[0].numel()}  # one row's images, twice for a moment, and the distilled ones
    if device.type == "cpu":
        phases["training of students"] |= sets_of
    else:
        check_memory({"rows of images": sets_of}, torch.device("cpu"))
    check_memory(phases, device)
    backend = backend_words(args, device)
    print(backend)
    run = Run(__file__, args, data.name, data.content)
    run.cure = "lower --r-bn or --lr-img"
    args = run.args

    # teacher
    if label is None:
        label = label_teacher(args, data, device)
    if squeezed is None and args.teacher_method != "supervised":
        squeezed = squeeze(args, data, device)

    # every network takes the data's normalised images, whatever constants it was trained with
    def rescaled(teacher: Teacher, fc: nn.Linear) -> nn.Module:
        return nn.Sequential(Rescale(data.mean, data.std, teacher), classifier(teacher, fc)).to(device)

    networks = {"label": rescaled(label, label.fc)}
    facts = {"label": label.info | dict(name=label.name)}
    if args.teacher_method == "supervised":
        networks["distilled"], facts["distilled"] = networks["label"], facts["label"]
    else:
        squeezed.net.to(device)
        probe, accuracy = align(args, squeezed, data, device, run.folder)
        networks["distilled"] = rescaled(squeezed, probe)
        facts["distilled"] = squeezed.info | dict(name=squeezed.name, probe_accuracy=accuracy)
        networks["sre2l"] = networks["label"]

    # distilled set
    mean, std = data.mean.to(device)[:, None, None], data.std.to(device)[:, None, None]
    inputs = partial(Inputs, mean=data.mean, std=data.std, zca=None, device=device, gigabytes=0.0, spare=spare)
    starts = in_order(per_class(data.y_train, args.ipc, "initial images", args.seed), args.ipc)

    def start(first: int, size: int, batch: int) -> Tensor:
        """Images of a block before the first step, normalised. (size, C, H, W)"""
        if args.init == "real":
            return normalise(data.x_train[starts[first : first + size]].to(device), data.mean, data.std)
        numbers = range(first // args.recover_batch, first // args.recover_batch + size // batch)
        noise = [torch.randn(batch, *data.x_train.shape[1:], generator=rng("noise", args.seed, i)) for i in numbers]
        return torch.cat(noise).to(device)

    def measured(name: str, x: Tensor, batch: int) -> float:
        """Mean statistics loss over the batches of normalised images, as they are."""
        with torch.no_grad():
            terms = with_statistics(networks[name], len(x) // batch, args.backend)(x)[1]
            return float((terms.sum(0) + (args.first_bn_multiplier - 1) * terms[0]).mean())

    # networks
    jobs = [(name, *block) for name in recovered for block in blocks]
    total = len(jobs) * args.steps
    returns = {round(i * args.steps / args.segments) for i in range(1, args.segments)}  # steps before which x_0 does
    rates = dict(distilled=args.lr_img, sre2l=args.sre2l_lr_img)
    weights = dict(distilled=args.r_bn, sre2l=args.sre2l_r_bn)
    functions = {}  # (name, groups) -> the recovery's forward pass

    def network(name: str, groups: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        if (name, groups) not in functions:
            function = with_statistics(networks[name], groups, args.backend)
            functions[name, groups] = torch.compile(function) if args.compile else function
        return functions[name, groups]

    def block_file(job: int) -> Path:
        return run.file(f"recovered-{jobs[job][0]}-{jobs[job][1]:06d}.safetensors")

    with torch.no_grad():
        x = normalise(data.x_train[:8].to(device), data.mean, data.std)
        checked = torch.cat([networks[name](x) for name in ("distilled", "label")], 1).cpu()
    run.check_same("scores of the networks that images are recovered from and labelled by", checked)
    recipe = SoftRecipe(
        epochs=args.eval_epochs,
        runs=args.eval_runs,
        batch=args.eval_batch,
        opt=args.eval_opt,
        lr=args.eval_lr,
        weight_decay=args.eval_wd,
        decay_all=args.eval_decay_all,
        warm_up=args.eval_warm_up,
        smooth=args.eval_smooth,
        temperature=args.eval_temperature,
        scaled=args.eval_scaled,
        loss=args.eval_loss,
        ce_weight=args.eval_ce,
        crop=args.eval_crop,
        crop_min=args.eval_crop_min,
        flip=data.flip,
        mix=args.eval_mix,
        mix_alpha=args.eval_mix_alpha,
        ema=args.eval_ema,
        teacher_train=args.teacher_train_mode,  # SC-DD's departure 3
        labels=args.labels,
    )
    rows = ("random_real", "random_crops", *reversed(recovered))
    sizes = dict.fromkeys(rows, n) | ({"all_real": n} if args.full_row else {})
    seconds_all = predict_seconds(sizes, data, make_student, networks["label"], device, recipe, args.published_metric)

    def grid(t: int) -> None:
        """Of the first block of a row, after powers of ten steps and all: the first 100 images."""
        if first == 0 and (t in (0, args.steps) or log10(t).is_integer()):
            save_grid(run.file(f"grid_{name}_{t:06d}.png"), denormalise(x_s[:100].detach(), data.mean, data.std))

    def checkpoint(step: int) -> None:
        run.save(step, checked=checked, x_s=x_s.detach(), optimizer=optimizer.state_dict())

    # outer loop: recovery, one block of images after the other
    for step in run.steps(total, lambda done: seconds_all):
        job, t = divmod(step, args.steps)
        name, first, size, batch = jobs[job]
        if t == 0 or step == run.start:
            x_0 = start(first, size, batch)  # (n_b, C, H, W)
            x_s = x_0.clone()
            optimizer = torch.optim.Adam([x_s.requires_grad_()], betas=(0.5, 0.9))
            if t:
                with torch.no_grad():
                    x_s.copy_(run.state["x_s"])
                optimizer.load_state_dict(run.state["optimizer"])
            run.state = None
            scores_and_terms = network(name, size // batch)
            y_b = upload(y[first : first + size], device)
            drawn = torch.arange(first, first + size, device=device)  # what box, mirror image and shift are drawn for
            if not args.per_image:
                drawn = drawn // args.recover_batch
            if t == 0:
                checkpoint(step)
                grid(0)
        if t in returns:  # FADRM, arXiv:2506.24125
            with torch.no_grad():
                x_s.lerp_(x_0, args.residual)
            optimizer = torch.optim.Adam([x_s], betas=(0.5, 0.9))
        rate = optimizer.param_groups[0]["lr"] = rates[name] * 0.5 * (1 + cos(pi * t / args.steps))
        u = counter_uniform(drawn, 7, "recovery", args.seed, t)  # (n_b, 7)
        area = smallest_area(t, args.steps, args.crop_min, args.curriculum)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            scores, terms = scores_and_terms(looked_at(x_s, u, args.crop, area, data.flip, args.jitter))
        ce, statistics = recovery_terms(scores.float(), y_b, terms, args.first_bn_multiplier)  # (G,), (G,)
        loss = ce + weights[name] * statistics
        (x_s.grad,) = torch.autograd.grad(loss.sum(), x_s)
        optimizer.step()
        with torch.no_grad():
            x_s.clamp_(-mean / std, (1 - mean) / std)  # pixels in [0, 1]

        done = step + 1
        logging = done % args.log_every == 0 or done in (1, total)
        saving = run.due(done, args.save_every) or t + 1 == args.steps
        if logging or saving:
            scalars = {"loss": loss, "ce": ce, "statistics": statistics}
            scalars = {key: float(value.detach().mean()) for key, value in scalars.items()}
            run.check_finite(done, scalars, f"{name}, images {first} to {first + size - 1}")
            if logging:
                run.log(done, scalars | {"lr_img": rate})
        grid(t + 1)
        if t + 1 == args.steps:
            final = {"x": x_s.detach().cpu().contiguous()}
            write_atomic(block_file(job), lambda tmp, final=final: save_file(final, tmp))
        if saving:
            checkpoint(done)

    x_s = x_0 = optimizer = scores_and_terms = None
    functions.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the sets of images that the evaluation keeps there

    # evaluation
    def denormalised(name: str) -> Tensor:
        """All images of a recovery in pixel units, class after class. (n, C, H, W)"""
        x = torch.cat([read_images(block_file(job)) for job in range(len(jobs)) if jobs[job][0] == name])
        x.mul_(data.std[:, None, None]).add_(data.mean[:, None, None]).clamp_(0, 1)
        return by_class(x, args.ipc)

    def collected(name: str) -> Tensor:
        """The same as they are kept."""
        x = denormalised(name)
        return through_jpeg(x) if args.save_jpeg else x  # SC-DD's departure 5: floats are kept

    def save(x: Tensor) -> None:
        save_distilled(
            run.file("distilled.safetensors"),
            x,
            F.one_hot(classes_of, classes),
            data.mean,
            data.std,
            method=run.name,
            data=data.name,
            content=data.content,
            y_is="class scores",
            class_names=data.class_names,
            resize=data.resize,
            step=args.steps,
            seed=args.seed,
            recipe=asdict(recipe),
            teacher=facts["distilled"],
            extra=dict(
                ipc=args.ipc,
                label_teacher=facts["label"],
                label_bytes=label_bytes(n, classes, recipe) if args.labels == "stored" else 0,
                eval_arch=args.eval_arch,
                eval_width=args.eval_width,
            ),
        )

    classes_of = by_class(y, args.ipc)  # (n,)
    statistics, recognised, jpeg_psnr, contents = {}, {}, {}, {}
    _, size, batch = blocks[0]
    floor = in_order(per_class(data.y_train, args.ipc, "floor", args.seed), args.ipc)[:size]
    noise = torch.randn(size, *data.x_train.shape[1:], generator=rng("measured noise", args.seed))
    for name in recovered:  # one after the other: at 224 px a set takes gigabytes
        x = collected(name)
        if args.save_jpeg:
            jpeg_psnr[name] = psnr(x, denormalised(name))
            print(f"{name}: {jpeg_psnr[name]:.1f} dB left by JPEG")
        seen = {
            "noise": noise,
            "real": normalise(data.x_train[floor], data.mean, data.std),
            "end": normalise(in_order(x, args.ipc)[:size], data.mean, data.std),  # as they are kept
        }
        statistics[name] = {key: measured(name, images.to(device), batch) for key, images in seen.items()}
        right = hits(networks["label"], inputs(x), classes_of)
        recognised[name] = float(right.float().mean())
        words = ", ".join(f"{key} {value:.4g}" for key, value in statistics[name].items())
        own = ", which they were recovered from" if source[name] == "label" else ""
        print(f"{name}: statistics: {words}; {recognised[name]:.1%} right by the labelling teacher{own}")
        contents[name] = digest(x)
        if name == "distilled":
            save(x)
            write_images(run.file("images"), x, classes_of, data.class_names)
        del x
    distilled = load_distilled(run.file("distilled.safetensors"), run.name)  # what is scored is what was saved
    crops = run.file("random_crops.safetensors")
    if not crops.exists():
        x, _ = random_crops(data, networks["label"], args.ipc, device, args.seed, pool=max(300, args.ipc))
        write_atomic(crops, lambda tmp: save_file({"x": x}, tmp))
    contents["random_crops"] = digest(read_images(crops))

    def random_real(student: int) -> tuple[Tensor, Tensor]:
        index = per_class(data.y_train, args.ipc, "random real", args.seed, student)
        return data.x_train[index], data.y_train[index]

    stored = {}
    if args.labels == "stored":  # SC-DD's departure 4: scores alone, views are derived again
        path = stored["distilled"] = run.file("labels.safetensors")
        try:
            StoredLabels(path, inputs(distilled.x), recipe, args.seed, teacher=networks["label"])
        except UserError as error:  # none yet, damaged, or of another recipe before a resume
            if path.exists():
                print(f"labels: made again ({error})")
            label_all(inputs(distilled.x), networks["label"], recipe, path, args.seed)
    sets = {
        "random_real": random_real,
        "random_crops": lambda student: (read_images(crops), classes_of),
        "sre2l": lambda student: (collected("sre2l"), classes_of),
        "distilled": lambda student: (distilled.x, classes_of),
    }
    evaluate = partial(
        evaluate_soft,
        data=data,
        make_student=make_student,
        teacher=networks["label"],
        device=device,
        seed=args.seed,
        published=args.published_metric,
        facts=(contents, args.ipc),
        spare=spare,
    )
    # SC-DD's departure 1: of the last epoch, on all test images
    results = evaluate(sets, recipe=recipe, rows=rows, keep=run.file("evaluation.json"), stored=stored)
    if args.full_row:
        every = {"all_real": (data.x_train, data.y_train)}
        share = n / len(data.x_train)
        epochs = max(1, round(args.eval_epochs * share))
        warm_up = min(int(args.eval_warm_up * share), epochs - 1)
        as_many = replace(recipe, epochs=epochs, warm_up=warm_up, labels="online")
        results |= evaluate(every, recipe=as_many, keep=run.file("evaluation_all_real.json"))
    caption = (
        f"{data.name}, {args.ipc} images a class, seed {args.seed}: {'held-out' if args.holdout else 'test'} accuracy "
        f"in per cent, mean ± sample std over {args.eval_runs} students"
    )
    print(table(results, caption))
    run.plot({}, f"{data.name}, {args.ipc} a class: loss of recovery, {' then '.join(recovered)}")
    return run.finish(
        data=data.name,
        ipc=args.ipc,
        steps=args.steps,
        blocks=len(blocks),
        squeeze=facts["distilled"],
        label_teacher=facts["label"],
        statistics=statistics,
        recognised=recognised,
        jpeg_psnr_db=jpeg_psnr,
        eval=results,
        protocol=asdict(recipe),
        backend=backend,
        images_skipped=data.skipped,
        storage_bytes=distilled.meta["storage_bytes"] + distilled.meta["label_bytes"],
        label_bytes=distilled.meta["label_bytes"],
    )


if __name__ == "__main__":
    cli(main, Args)
