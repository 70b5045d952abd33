"""KRR-ST: distil an unlabelled image set into pairs of image and self-supervised feature by kernel ridge regression.

Lee, Lee, Ko, Kawaguchi, Lee and Hwang 2024, arXiv:2310.06511. Departures, results and cost: README.md#krr_st.

    python krr_st.py --data cifar100       # the paper's size: 1000 pairs, 160,000 steps; wants a GPU
    python krr_st.py                       # bundled digits, teacher and evaluation included: two minutes on a CPU
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from common.artefact import load_distilled, save_distilled
from common.augment import crop_flip
from common.data import NAMED, denormalise, describe, load, normalise
from common.evaluate import Protocol, evaluate_pairs, paired, table
from common.models import ConvNet, convnet_depth
from common.pretrain import load_teacher, train_teacher
from common.run import Run, UserError, cli, fill, pick_device, preset_name, rng, seeded, write_json


@dataclass
class Args:
    # the run: word for word the same in all five scripts
    data: str = "digits"
    """data set name (digits, mnist, fashion_mnist, cifar10, cifar100), or a folder: train/<class>/* and test/<class>/*,
    <class>/*, or unlabelled images"""
    data_dir: str = "data"
    """where public sets are downloaded to and decoded folders are cached"""
    size: int | None = None
    """side of the images in pixels; None: as they are (a folder of unequal images needs it)"""
    resize: Literal["squash", "crop"] = "squash"
    """squash: straight to a square with Lanczos (published for fine-grained sets); crop: centre crop"""
    channels: Literal["auto", "rgb", "grey"] = "auto"
    """auto: grey folders stay one channel, a mixture is refused; rgb, grey: convert"""
    test_fraction: float = 0.2
    """share held out as test images of a folder without a test split"""
    split_seed: int = 0
    """seed of that split, apart from --seed so that all seeds share one split and one teacher"""
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
    log_every: int = 20
    """steps between log points (TensorBoard, progress bar, check for non-finite values)"""
    save_every: int | None = None
    """steps between checkpoints; None: from the preset"""

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
    """train (Barlow Twins on --data, cached), a file (this project's, solo-learn's, torchvision's), torchvision:NAME or
    timm:NAME; None: from the preset"""
    teacher_arch: Literal["resnet10", "resnet18", "resnet50"] | None = None
    """of the trained teacher; None: from the preset"""
    teacher_width: int | None = None
    """channels of its first stage (64 published); None: from the preset"""
    teacher_epochs: int | None = None
    """its epochs (1000 published); None: from the preset"""
    teacher_batch: int | None = None
    """its batch (256 published); None: from the preset"""
    teacher_lr: float | None = None
    """LARS's learning rate per 256 images; None: from the preset"""
    teacher_eta: float | None = None
    """LARS's trust coefficient (solo-learn 0.02, Barlow Twins' authors 0.001); None: from the preset"""
    teacher_projector: int | None = None
    """width of the projector; None: from the preset"""
    teacher_crop_min: float | None = None
    """smallest area of a view, as a fraction of the image; None: from the preset"""
    teacher_seed: int = 0
    """seed of its training, apart from --seed so that all seeds of a method share one teacher"""
    stem_padding: int = 2
    """zero padding of its 3x3 stem (KRR-ST and solo-learn 2, others 1)"""

    # the evaluation
    eval_runs: int = 5
    """fresh networks per row of the table"""
    eval_every: int = 0
    """outer steps between evaluations of the distilled set, as a curve; 0: only at the end"""
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
    teacher_epochs=1000,
    teacher_batch=256,
    teacher_lr=0.3,
    teacher_eta=0.02,
    teacher_projector=2048,
    teacher_crop_min=0.08,
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
    teacher_epochs=40,
    teacher_batch=128,
    teacher_eta=0.002,
    teacher_projector=256,
    teacher_crop_min=0.4,
    eval_probe_steps=300,
    eval_finetune_steps=100,
)
PRESETS = {
    "digits": DIGITS,
    "mnist": PUBLISHED | dict(num_images=100, steps=20_000, teacher_epochs=100, teacher_crop_min=0.4),
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


def phi(features: Tensor) -> Tensor:
    """[h(x), 1]: (n, d) -> (n, d + 1). The constant feature is the head's bias, regularised like the rest."""
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def ridge_lam(f_s: Tensor, ridge: float, scale: str, grad: bool) -> Tensor:
    """lam = ridge * trace(K_ss) [/ n_s]; the trace is the squared norm of f_s (n_s, d + 1). Detached unless `grad`."""
    trace = f_s.square().sum()
    lam = ridge * (trace if scale == "trace" else trace / len(f_s))
    return lam if grad else lam.detach()


def krr_st_loss(f_t: Tensor, y_t: Tensor, f_s: Tensor, y_s: Tensor, lam: Tensor, precision: str = "auto") -> Tensor:
    """Mean over batch and dimensions of (K_ts (K_ss + lam I)^-1 y_s - y_t)^2: the paper's outer objective.

    f_t: (n_t, d), f_s: (n_s, d) with the ones column, y_t: (n_t, c) the teacher's features, y_s: (n_s, c).
    """
    return F.mse_loss(kernels.krr_predict(f_t, f_s, y_s, lam, precision=precision), y_t)


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
        for slot in range(self.args.pool):
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
    )
    named = args.data in NAMED and data.resize == "none"
    preset = preset_name(PRESETS, args.preset, data.name, named, data.size)
    args = fill(args, PRESETS[preset])
    for flag in ("steps", "batch_real", "save_every", "log_every", "pool", "max_age", "eval_runs", "eval_epochs",
                 "teacher_width", "teacher_epochs", "teacher_batch", "teacher_projector"):  # fmt: skip
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    if data.size < 4:
        raise UserError(f"--size {data.size}: must be at least 4, the network halves it {len(args.widths)} times")
    if not 1 <= args.num_images <= len(data.x_train):
        raise UserError(f"--num-images {args.num_images}: must be 1 to {len(data.x_train)}, the training images")
    if len(args.widths) != convnet_depth(data.size):
        raise UserError(f"--widths {args.widths}: {data.size} px images take {convnet_depth(data.size)} blocks")
    if args.teacher == "file":
        raise UserError(f"preset {preset} takes a published teacher: --teacher FILE, torchvision:resnet50 or train")
    print(f"data: {describe(data)}; preset {preset}")
    run = Run(__file__, args, data.name, data.content)
    args = run.args
    backend = kernels.describe(args.ridge_precision, device)
    print(backend)
    mean, std = data.mean.to(device), data.std.to(device)

    # teacher
    if args.teacher == "train":
        teacher = train_teacher(
            data,
            Path(args.out_dir) / "teachers",
            device,
            arch=args.teacher_arch,
            width=args.teacher_width,
            stem_padding=args.stem_padding,
            epochs=args.teacher_epochs,
            batch=args.teacher_batch,
            lr=args.teacher_lr,
            eta=args.teacher_eta,
            projector_width=args.teacher_projector,
            crop_min=args.teacher_crop_min,
            seed=args.teacher_seed,
            precision=args.precision,
        )
    else:
        teacher = load_teacher(args.teacher, data, device, args.stem_padding)
    teacher.net.to(device)
    # the targets of un-augmented images never change: computed once, never in the loop
    targets_train = teacher.cached_targets(data.x_train, data.content, "train", device)  # (N, c)
    targets_test = teacher.cached_targets(data.x_test, data.content, "test", device)
    run.check("teacher's features", targets_train[:8])
    of_mean = float((targets_train - targets_train.mean(0)).square().mean())  # loss of predicting the mean

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
    def make_net() -> ConvNet:
        return ConvNet(data.channels, data.size, teacher.dim, args.widths, args.norm)

    pool = Pool(make_net, device, args)
    curve = []
    if run.state:
        with torch.no_grad():
            x_s.copy_(run.state["x_s"]), y_s.copy_(run.state["y_s"])
        optimizer.load_state_dict(run.state["optimizer"])
        schedule.load_state_dict(run.state["schedule"])
        pool.load_state_dict(run.state["pool"])
        curve = run.state["curve"]
    else:
        pool.warm_up(x_s.detach(), y_s.detach())

    def checkpoint(step: int) -> None:
        states = dict(optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), pool=pool.state_dict())
        run.save(step, checked=targets_train[:8], x_s=x_s.detach(), y_s=y_s.detach(), curve=curve, **states)

    recipe = Protocol(
        runs=args.eval_runs,
        epochs=args.eval_epochs,
        probe_steps=args.eval_probe_steps,
        finetune_steps=args.eval_finetune_steps,
    )

    def pixels() -> Tensor:
        return denormalise(x_s.detach(), mean, std)

    def evaluate(step: int, rows: tuple[str, ...]) -> dict:
        """Save the set, load it again, and score what was loaded."""
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
        )
        distilled = load_distilled(run.file("distilled.safetensors"), run.name)
        return evaluate_pairs(distilled, data, targets_train, targets_test, make_net, device, recipe, args.seed, rows)

    # outer loop
    if run.start == 0:
        run.grid(0, args.steps, pixels)
    for step in run.steps(args.steps):
        slot = int(torch.randint(args.pool, (), generator=rng("slot", args.seed, step)))
        net = pool.nets[slot].eval()  # BatchNorm uses statistics gathered from the distilled images
        index = batch_index(step, len(data.x_train), args.batch_real, args.seed)
        x_t = data.x_train[index].to(device)
        if args.outer_aug == "crop_flip":  # departure 3: an option here, the default of the last upload
            x_t = crop_flip(x_t, rng("crop flip", args.seed, step), data.flip)
            y_t = teacher.targets(x_t, device).to(device)
        else:
            y_t = targets_train[index].to(device)  # (n_t, c)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            with torch.no_grad():
                f_t = phi(net.features(normalise(x_t, mean, std)).float())  # (n_t, d + 1)
            f_s = phi(net.features(x_s).float())  # (n_s, d + 1)
        lam = ridge_lam(f_s, args.ridge, args.ridge_scale, args.ridge_grad)
        loss = krr_st_loss(f_t, y_t, f_s, y_s, lam, args.ridge_precision)
        x_s.grad, y_s.grad = torch.autograd.grad(loss, [x_s, y_s])  # the network's weights get no gradient here
        if args.grad_clip:
            for tensor in (x_s, y_s):
                torch.nn.utils.clip_grad_norm_([tensor], args.grad_clip)
        optimizer.step()
        age, lr_img = pool.ages[slot], optimizer.param_groups[0]["lr"]
        schedule.step()
        pool.grow(slot, x_s.detach(), y_s.detach())

        done = step + 1
        saving = done % args.save_every == 0 or done == args.steps
        if done % args.log_every == 0 or saving or done == 1:
            kernels.raise_if_failed(done)
            relative = float(loss.detach()) / of_mean
            scalars = {"loss": relative, "mse": relative * of_mean, "lam": float(lam.detach())}
            run.log(done, scalars | {"age": age, "lr_img": lr_img}, f"n_s {len(x_s)}, d {f_s.shape[1]}")
        run.grid(done, args.steps, pixels)
        if args.eval_every and done % args.eval_every == 0 and done < args.steps:
            scores = evaluate(done, ("distilled",))["distilled"]
            curve.append({"step": done, **scores})
            run.log_evaluation(done, {f"eval/{key}": value["mean"] for key, value in scores.items()})
        if saving:
            checkpoint(done)

    # evaluation
    rows = ("teacher",) if data.labelled else ()
    rows += ("none", "random_real", "distilled") + (("all_real",) if args.full_row else ())
    scores = evaluate(args.steps, rows)
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
        backend=backend,
        storage_bytes=load_distilled(run.file("distilled.safetensors")).meta["storage_bytes"],
    )


if __name__ == "__main__":
    cli(main, Args)
