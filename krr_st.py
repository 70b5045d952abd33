"""KRR-ST: distil an unlabelled image set into pairs of image and self-supervised feature by kernel ridge regression.

Lee, Lee, Ko, Kawaguchi, Lee and Hwang 2024, arXiv:2310.06511. Departures, results and cost: README.md#krr_st.

    python krr_st.py --data cifar100       # the paper's size: 1000 pairs, 160,000 steps; wants a GPU
    python krr_st.py                       # bundled digits, teacher and evaluation included: two minutes on a CPU
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import inf
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import kernels
from common.artefact import Distilled, load_distilled, save_distilled
from common.augment import draw_variants, gather, resident
from common.data import Data, denormalise, describe, hold_out, load, normalise
from common.models import ConvNet, convnet_depth, features_chunked, resnet_dim
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
from common.teacher import AugmentedTargets, load_teacher


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
    num_images: int | None = None
    """n_s, distilled pairs; None: from the preset"""
    steps: int | None = None
    """outer steps; None: from the preset"""
    batch_real: int | None = None
    """real images per outer step (published: 1024); None: from the preset"""
    lr_img: float | None = None
    """AdamW's learning rate of the images (published 1e-4 on CIFAR-100, 1e-5 above; first README 1e-3)"""
    lr_label: float | None = None
    """AdamW's learning rate of the targets (published: the images')"""
    outer_opt: Literal["adamw", "sgd"] = "adamw"
    """outer optimizer: AdamW without decay, or SGD with momentum 0.5"""
    lr_end: float = 1e-3
    """last learning rate as a fraction of the first; linear in between"""
    grad_clip: float = 0.0
    """clip the gradient norms of images and targets, each to this; 0: off"""
    ridge: float = 1e-6
    """lam = ridge * trace(K_ss), or its mean: see --ridge-scale"""
    ridge_scale: Literal["trace", "trace_mean"] = "trace"
    """trace: KRR-ST's; trace_mean: divided by n_s, FRePo's, n_s times weaker"""
    ridge_grad: bool = False
    """let the gradient flow through lam (KRR-ST detaches it)"""
    init_space: Literal["normalised", "raw"] = "normalised"
    """space the initial images are put in: the networks' input, or raw pixels in [0, 1] as the released code does"""
    outer_aug: Literal["none", "crop_flip"] = "none"
    """of the real batch: none (first upload; targets computed once) or zero-pad, crop and flip (last upload)"""
    cache_precision: Literal["fp32", "bf16"] = "fp32"
    """of the augmented targets, which are kept per image, shift and flip up to --cache-gb; bf16 keeps twice as many"""
    cache_device: Literal["same", "cpu"] = "same"
    """where they are kept: on the run's device, or in the machine's memory"""
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
    eval_epochs: int = 1000
    """epochs of pretraining on the pairs (batch 256, SGD 0.1, momentum 0.9, weight decay 1e-3)"""
    eval_probe_steps: int | None = None
    """steps of the linear probe (published 5000); None: from the preset"""
    eval_finetune_steps: int | None = None
    """steps of fine-tuning on the source set (published 10,000); 0: leave it out; None: from the preset"""
    full_row: bool = False
    """add a row pretrained on all real images with their targets, for as many steps"""


PUBLISHED = dict(  # of CIFAR-100; CIFAR-10, where nothing was published, and folders take it too
    save_every=2000,
    num_images=1000,
    steps=160_000,
    batch_real=1024,
    lr_img=1e-4,
    lr_label=1e-4,
    widths=(128, 256, 512),
    max_age=1000,
    teacher="train",
    teacher_arch="resnet18",
    teacher_width=64,
    eval_probe_steps=5000,
    eval_finetune_steps=10_000,
)
SIZE_64 = PUBLISHED | dict(widths=(64, 128, 256, 512), lr_img=1e-5, lr_label=1e-5)
SIZE_224 = SIZE_64 | dict(widths=(32, 64, 128, 256, 512), num_images=10, eval_finetune_steps=5000)
DIGITS = PUBLISHED | dict(
    save_every=200,
    num_images=10,
    steps=2000,
    batch_real=512,
    lr_img=1e-1,
    lr_label=1e-2,
    widths=(32, 64),
    max_age=20,
    teacher_arch="resnet10",
    teacher_width=16,
    eval_probe_steps=300,
    eval_finetune_steps=100,
)
PRESETS = {
    "digits": DIGITS,
    "mnist": PUBLISHED | dict(num_images=100, steps=20_000),
    "cifar10": PUBLISHED,
    "cifar100": PUBLISHED,
    "tiny_imagenet": SIZE_64 | dict(num_images=2000),
    "imagenet": SIZE_64,
    "imagenette": SIZE_224 | dict(teacher="file", teacher_arch="resnet50"),
    "8px": DIGITS,
    "16px": PUBLISHED,
    "48px": SIZE_64,
    "96px": SIZE_224 | dict(num_images=100),
}
LIMITS = {  # of flags: one that is out of them is refused before anything begins
    (1, inf): "steps batch_real save_every log_every chunk widths pool max_age eval_runs eval_epochs eval_probe_steps",
    (0, inf): "lr_img lr_label lr_net wd_net ridge grad_clip cache_gb save_minutes eval_every "
    "eval_finetune_steps stem_padding",
    (0, 1): "lr_end momentum_net",
}


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
    """Networks at different ages, each trained on the current distilled pairs, one full-batch step when drawn."""

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
        """One step of the inner objective: mean squared error over n_s and d, train-mode BatchNorm."""
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
            if self.args.pool_reset == "fixed":  # departure 1: the released code keeps the age
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


def memory_needs(make_net, data: Data, dim: int, device, args: Args) -> tuple[int, dict[str, dict[str, int]]]:
    """Bytes of one distilled image in the outer step, and {phase: {flag: bytes}} of all the rest: see check_memory."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with torch.device("meta"):  # shapes alone
        net, x = make_net().to(dtype), torch.zeros(2, data.channels, data.size, data.size, dtype=dtype)
    train, outer = bytes_per_image(net, x), bytes_per_image(net.frozen(), x.clone().requires_grad_())
    train = int(1.5 * train)  # and the gradients of the largest maps
    n_train, n_s, n_t, d = len(data.x_train), args.num_images, args.batch_real, net.dim + 1
    width, ridge = 4 if args.ridge_precision == "fp32" else 8, min(n_s, d)
    copies = 3 if args.pool_opt == "sgd" else 4  # weights, gradients, momenta
    held = {
        "libraries": 200_000_000,  # that are loaded on the way
        "--pool or --widths": args.pool * copies * 4 * sum(p.numel() for p in net.parameters()),
        "the number of images": 4 * n_train * dim,  # their targets
    }
    cache = 0
    if args.outer_aug == "crop_flip" and (args.cache_device == "same" or device.type == "cpu"):
        cache = AugmentedTargets.need(n_train, data.size, data.flip, dim, args.cache_gb, args.cache_precision)
    step = {
        "--batch-real": n_t * (int(0.6 * outer) + 2 * width * d),  # of its maps two at a time, features in two types
        "--num-images": width * (3 * n_s * d + 2 * ridge**2),  # features, their gradient, the Gram matrix, its factor
        "--cache-gb": cache,
    }
    features = 4 * n_train * net.dim
    tuned = 256 if args.full_row or args.eval_finetune_steps else min(n_s, 256)  # images of an evaluation's batch
    score = {"--widths": tuned * train, "--cache-gb": cache + (features if features <= args.cache_gb * 1e9 else 0)}
    phases = {"outer step": step, "training of the pool": {"--num-images": n_s * train, "--cache-gb": cache}}
    return outer, {phase: held | parts for phase, parts in (phases | {"evaluation": score}).items()}


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
    recipe = "tiny_imagenet" if preset == "imagenet" else preset  # both of 64 px here
    args = fill_teacher(fill(args, PRESETS[preset]), recipe, data.labelled)
    check_limits(args, LIMITS)
    if data.size < 4:
        raise UserError(f"--size {data.size}: must be at least 4, the network halves it {len(args.widths)} times")
    if not 1 <= args.num_images <= len(data.x_train):
        raise UserError(f"--num-images {args.num_images}: must be 1 to {len(data.x_train)}, the training images")
    if len(args.widths) != convnet_depth(data.size):
        raise UserError(f"--widths {args.widths}: {data.size} px images take {convnet_depth(data.size)} blocks")
    if args.teacher == "file":
        raise UserError(f"preset {preset} takes a published teacher: --teacher FILE, torchvision:resnet50 or train")
    print(f"data: {describe(data)}; preset {preset}")
    teacher = None if args.teacher == "train" else load_teacher(args.teacher, data, device, args.stem_padding)
    dim = teacher.dim if teacher else resnet_dim(args.teacher_arch, args.teacher_width)  # c, of the targets

    def make_net() -> ConvNet:
        return ConvNet(data.channels, data.size, dim, args.widths, args.norm)

    image, phases = memory_needs(make_net, data, dim, device, args)
    if args.chunk is None:
        args = replace(args, chunk=fit_chunk(args.num_images, image, sum(phases["outer step"].values()), device))
    phases["outer step"]["--chunk"] = min(args.chunk, args.num_images) * image
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
    index = torch.randperm(len(data.x_train), generator=rng("initial images", args.seed))[: args.num_images]
    x_s = data.x_train[index].to(device)  # (n_s, C, H, W)
    # departure 2: the released code starts from pixels in [0, 1] though the networks see normalised images
    x_s = x_s / 255 if args.init_space == "raw" else normalise(x_s, mean, std)
    y_s = targets_train[index].to(device)  # (n_s, c)
    x_s.requires_grad_(), y_s.requires_grad_()
    # departure 4: two learning rates, the released code has one
    groups = [{"params": [x_s], "lr": args.lr_img}, {"params": [y_s], "lr": args.lr_label}]
    if args.outer_opt == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - (1 - args.lr_end) * t / args.steps)

    # networks
    pool = Pool(make_net, device, args)
    curve = []
    if run.state is None:
        pool.warm_up(x_s.detach(), y_s.detach())
    else:
        with torch.no_grad():
            x_s.copy_(run.state["x_s"]), y_s.copy_(run.state["y_s"])
        optimizer.load_state_dict(run.state["optimizer"])
        schedule.load_state_dict(run.state["schedule"])
        pool.load_state_dict(run.state["pool"])
        curve, run.state = run.state["curve"], None

    def checkpoint(step: int) -> None:
        states = dict(optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), pool=pool.state_dict())
        run.save(step, checked=targets_train[:8], x_s=x_s.detach(), y_s=y_s.detach(), curve=curve, **states)

    recipe = Protocol(
        runs=args.eval_runs,
        epochs=args.eval_epochs,
        probe_steps=args.eval_probe_steps,
        finetune_steps=args.eval_finetune_steps,
    )
    rows = ("teacher",) if data.labelled else ()
    rows += ("none", "random_real", "distilled") + (("all_real",) if args.full_row else ())
    seconds = partial(predict_seconds, make_net, data, args.num_images, dim, device, recipe, args.cache_gb)
    seconds_all, seconds_curve = seconds(rows), seconds(("distilled",)) if args.eval_every else 0.0

    def seconds_later(done: int) -> float:
        """Of the evaluations that are still to come after `done` steps."""
        points = (args.steps - 1) // args.eval_every - done // args.eval_every if args.eval_every else 0
        return seconds_all + points * seconds_curve

    def pixels() -> Tensor:
        return denormalise(x_s.detach(), mean, std)

    def save(step: int) -> Distilled:
        """Save the set and load it again: what is scored is what was saved."""
        save_distilled(
            run.file("distilled.safetensors"),
            pixels(),
            y_s,
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
            extra=dict(widths=args.widths, norm=args.norm),
        )
        return load_distilled(run.file("distilled.safetensors"), run.name)

    def on_curve(step: int) -> bool:
        return args.eval_every > 0 and step % args.eval_every == 0 and step < args.steps

    def curve_point(step: int) -> None:
        """Score the set as it is, and add it to the curve."""
        with run.aside():
            scores = evaluate_pairs(
                save(step), curve_data, targets_train, targets_curve, make_net, device, recipe, args.seed,
                ("distilled",), args.cache_gb, run.file("evaluation.json"),
            )["distilled"]  # fmt: skip
        curve.append({"step": step, **scores})
        run.log_evaluation(step, {f"eval/{key}": value["mean"] for key, value in scores.items()})
        run.plateau(curve, "match")

    # outer loop
    x_train = resident(data.x_train, device, spare=need)  # (N, C, H, W) uint8
    y_train = resident(targets_train, device, spare=need)  # (N, c)
    augmented = None
    if args.outer_aug == "crop_flip":  # departure 3: an option here, the default of the last upload
        kept = device if args.cache_device == "same" else torch.device("cpu")
        augmented = AugmentedTargets(
            teacher, x_train, data.flip, device,
            gigabytes=args.cache_gb, precision=args.cache_precision, cache_device=kept,
        )  # fmt: skip
        print(augmented.describe())
    if run.start == 0:
        checkpoint(0)
        run.grid(0, args.steps, pixels)
    elif on_curve(run.start) and run.start not in [point["step"] for point in curve]:  # stopped in this evaluation
        curve_point(run.start)
    for step in run.steps(args.steps, seconds_later):
        slot = int(torch.randint(args.pool, (), generator=rng("slot", args.seed, step)))
        # eval mode, folded: BatchNorm uses statistics gathered from the distilled images; the weights get no gradient
        features = pool.nets[slot].frozen()
        index = batch_index(step, len(x_train), args.batch_real, args.seed)
        variant = None  # shift and flip of each image
        if augmented:
            variant = draw_variants(len(index), data.size, data.flip, rng("crop flip", args.seed, step))
        y_t = augmented(index, variant) if augmented else gather(y_train, index).to(device)  # (n_t, c)
        x_t = normalise(gather(x_train, index, variant, data.flip).to(device), mean, std)  # (n_t, C, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            with torch.no_grad():
                f_t = features(x_t)
            f_s = features_chunked(features, x_s, args.chunk)
        f_t, f_s = f_t.float(), f_s.float()  # (n_t, d), (n_s, d)
        lam = ridge_lam(f_s, args.ridge, args.ridge_scale, args.ridge_grad)
        loss = krr_st_loss(f_t, y_t, f_s, y_s, lam, args.ridge_precision, args.backend)
        x_s.grad, y_s.grad = torch.autograd.grad(loss, [x_s, y_s])
        if args.grad_clip:
            for tensor in (x_s, y_s):
                torch.nn.utils.clip_grad_norm_([tensor], args.grad_clip)
        optimizer.step()
        age, lr_img = pool.ages[slot], optimizer.param_groups[0]["lr"]
        schedule.step()
        pool.grow(slot, x_s.detach(), y_s.detach())

        done = step + 1
        logging = done % args.log_every == 0 or done in (1, args.steps)
        saving = on_curve(done) or run.due(done, args.save_every)
        if logging or saving:
            relative = float(loss.detach()) / of_mean
            scalars = {"loss": relative, "mse": relative * of_mean, "lam": float(lam.detach())}
            run.check_finite(done, scalars, f"n_s {len(x_s)}, d {f_s.shape[1]}")
            if logging:
                hits = {"target_cache_hits": augmented.hit_rate()} if augmented else {}
                run.log(done, scalars | {"age": age, "lr_img": lr_img} | hits)
        run.grid(done, args.steps, pixels)
        if saving:
            checkpoint(done)
        if on_curve(done):  # after the checkpoint: a run that is stopped in it goes on with it
            curve_point(done)

    # evaluation
    scores = evaluate_pairs(
        save(args.steps), data, targets_train, targets_test, make_net, device, recipe, args.seed,
        rows, args.cache_gb, run.file("evaluation.json"),
    )  # fmt: skip
    if not args.holdout:  # else the curve is of other images than the table
        curve.append({"step": args.steps, **scores["distilled"]})
    differences = {m: paired(scores, "distilled", "random_real", m) for m in scores["distilled"]}
    caption = (
        f"{data.name}, {args.num_images} pairs, step {args.steps}, seed {args.seed}: mean ± sample std over "
        f"{args.eval_runs} networks; accuracies in per cent on the test images"
    )
    print(table(scores, caption))
    write_json(run.file("curve.json"), curve)
    random_real = scores["random_real"]["match"]["mean"]
    points = {"distilled: match error": [(point["step"], point["match"]["mean"]) for point in curve]}
    points["random real: match error"] = [(0, random_real), (args.steps, random_real)]
    run.plot(points, f"{data.name}, {args.num_images} pairs: error relative to predicting the mean")
    return run.finish(
        data=data.name,
        num_images=args.num_images,
        steps=args.steps,
        teacher=teacher.info | dict(name=teacher.name),
        loss_of_mean=of_mean,
        eval=scores,
        distilled_minus_random_real=differences,
        protocol=vars(recipe),
        backend=ridge,
        images_skipped=data.skipped,
        target_cache=dict(hits=augmented.hits, misses=augmented.misses) if augmented else None,
        storage_bytes=load_distilled(run.file("distilled.safetensors")).meta["storage_bytes"],
    )


if __name__ == "__main__":
    cli(main, Args)
