"""ISA: FRePo on the hardest samples of a batch, each spread along the line through its nearest neighbour.

Li, Zhu, Chen, Chen, Guo and Wang 2025, IEEE Transactions on Multimedia (document 11195723). Everything but the loss is
frepo.py's: `diff frepo.py isa.py`. Departures, results and cost: README.md#isa.

    python isa.py --data cifar100 --ipc 10     # the paper's size: 500,000 steps; wants a GPU
    python isa.py                              # bundled digits, evaluation included: two minutes on a CPU
"""

import shutil
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from math import cos, inf, pi
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import kernels
from common.applications import CHUNK_BATCH, continual, membership
from common.artefact import Distilled, load_distilled, save_distilled
from common.augment import dsa_strategy, upload
from common.data import Data, Inputs, Zca, denormalise, describe, fit_zca, hold_out, load, zca_stride
from common.models import FRePoConvNet, convnet_depth, features_chunked, frepo_student
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
from common.students import (
    BLOCK,
    STEPS,
    STEPS_ISA,
    Recipe,
    evaluate_students,
    per_class,
    predict_seconds,
    student_steps,
    table,
)


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
    ipc: int = 1
    """distilled images per class"""
    steps: int | None = None
    """outer steps; None: from the preset"""
    batch_real: int | None = None
    """real images per outer step (published: 1024), at most all; None: from the preset"""
    lr_img: float | None = None
    """the images' learning rate; a step of LAMB moves all of them together by lr_img times their norm (published 3e-4);
    None: from the preset"""
    lr_label: float | None = None
    """the labels' (published 3e-4); None: from the preset"""
    outer_opt: Literal["lamb", "adam"] = "lamb"
    """outer optimizer: LAMB, or Adam as in the authors' PyTorch branch (there 1e-3)"""
    lr_end: float = 0.1
    """last learning rate as a fraction of the first; a cosine in between"""
    ridge: float = 1e-6
    """lam = ridge * trace(K_ss) / n_s, with its gradient"""
    topk: float = 0.8  # ISA's departure 3: the commands' values, the published code's defaults are 1 and 0
    """share of the batch that counts: its hardest samples (published 0.8); negative: its easiest; 0 and 1: all"""
    epsilon: float = 0.5
    """length of the line in distances to the neighbour (published 0.5; CIFAR-10 also 1); 0: the samples themselves"""
    direction: Literal["away", "towards"] = "away"
    """away from the neighbour, as the published code does, or towards it, as its words say"""
    class_norm: Literal["mean", "half_sum"] = "mean"
    """over the classes: the mean, as published, or FRePo's half sum, C / 2 times as large beside the label margin"""
    learn_label: bool = True
    """learn the labels too"""
    flip: Literal["auto", "on", "off"] = "auto"
    """count every distilled image mirrored as well; auto: as published for a set and its --ipc, for others on while
    twice the images are at most an eighth of the features; never for digits, mnist, svhn"""
    zca: bool = True
    """whiten the images (as published: colour only, one-channel images are never whitened)"""
    zca_reg: float = 0.1
    """added to the covariance: this times its mean eigenvalue"""
    widths: tuple[int, ...] | None = None
    """channels of the ConvNet's blocks, for instance 128 256 512; None: from the preset"""
    norm: Literal["batch", "none"] = "batch"
    """norm before each convolution but the first; students are without"""
    pool: int = 10
    """networks in the pool"""
    max_age: int | None = None
    """training steps after which a network is replaced (published 100); None: from the preset"""
    pool_ages: Literal["trained", "counter"] = "trained"
    """at the start, 0, 1/10, 2/10 .. of the age: trained for as many steps; counter: called so without training, as in
    the release"""
    lr_net: float = 3e-4
    """Adam's learning rate of the pool"""
    online_batch: int = 1000
    """distilled images of a training step of the pool: all up to this many, else so many drawn"""

    # the evaluation
    eval_runs: int = 5
    """students per row and model"""
    eval_every: int = 0
    """outer steps between evaluations of the distilled set, as a curve that says when it is flat; 0: only at the end"""
    select: Literal["last", "best"] = "last"
    """the set to keep: of the last step, or of the best point of the curve, the last step included (take --holdout:
    without, the test images choose, as published)"""
    eval_models: tuple[str, ...] = ("conv",)
    """students' architectures: conv, dcconv, kipconv, frepo_alexnet, frepo_vgg11, resnet18, resnet18_bn"""
    eval_steps: int | None = None
    """updates of a student; 0: as published for the number of images, see --eval-table; None: from the preset"""
    eval_table: Literal["frepo", "isa"] = "frepo"  # ISA's departure 4
    """whose published numbers, where --eval-steps is 0 (all presets but digits)"""
    eval_batch: int = 500
    """images of an update"""
    eval_lr: float = 3e-4
    """Adam's learning rate of a student"""
    eval_loss: Literal["mse", "xent", "softxent"] = "mse"
    """half squared error on the labels, or cross-entropy with their argmax or with softmax(y / --eval-temperature)"""
    eval_temperature: float = 1.0
    """of softxent"""
    eval_dsa: str | None = None
    """augmentation of a student: operations joined by _, of which each batch gets one, or none; None: as published, all
    of --eval-dsa-strengths, without flip for grey images and where a mirrored image is another thing"""
    eval_dsa_strengths: Literal["frepo", "dc"] = "frepo"
    """whose strengths: FRePo's, or DSA's, which has scale in place of translate"""
    eval_dsa_shared: bool = False
    """one draw of strengths for the whole batch (DSA's siamese), not one an image"""
    eval_shuffle: bool = True
    """shuffle a student's images; off: class after class, as published"""
    full_row: bool = False
    """add a row of students of all real images, for as many updates"""

    # the applications, in common/applications.py
    application: Literal["none", "continual", "membership"] = "none"
    """continual: classes come in steps, each distilled alone, and students (--eval-*, 0 updates: 10,000) learn from all
    so far; membership: a chunk of the images is distilled, and students at a constant rate, in batches of 256, of all
    real images in 1024, are attacked: was an image in the chunk?"""
    class_steps: int = 5
    """continual: steps (published 5 and 10)"""
    class_order: int = 0
    """continual: seed of the order of the classes (published 0 to 4)"""
    members: int | None = None
    """membership: images of a chunk (published 10,000); None: from the preset"""
    member_chunk: int = 0
    """membership: which chunk, in the order of the file, or of a fixed draw if that is class after class (published 0
    to 4)"""
    non_members: Literal["test", "train"] = "test"
    """membership: what members are told from: test images (published), or training images from outside the chunk, which
    come from one source with the members where test images may not"""
    attack_updates: tuple[int, ...] | None = None
    """membership: updates of a student when it is tested and attacked (published 100 250 500 1000 2000 4000 8000
    16000); None: from the preset"""
    attack_target: Literal["learned", "initial"] = "learned"
    """membership: the distilled images, or the real ones they start from, which the released script attacks"""
    attack_students: int = 1
    """membership: students of each row that are attacked (published 1)"""


PUBLISHED = dict(  # at 28 and 32 px; folders take it too
    save_every=1000,
    steps=500_000,
    batch_real=1024,
    lr_img=3e-4,
    lr_label=3e-4,
    widths=(128, 256, 512),
    max_age=100,
    eval_steps=0,
    members=10_000,
    attack_updates=(100, 250, 500, 1000, 2000, 4000, 8000, 16_000),
)
# FRePo's departure 8: four and five blocks are second-hand
SIZE_64 = PUBLISHED | dict(widths=(128, 256, 512, 1024))
SIZE_128 = PUBLISHED | dict(widths=(128, 256, 512, 1024, 2048))
DIGITS = PUBLISHED | dict(  # FRePo's departure 10
    save_every=100,
    steps=500,
    batch_real=512,
    lr_img=1e-2,
    lr_label=1e-2,
    widths=(32, 64),
    eval_steps=1000,
    members=360,
    attack_updates=(100, 250, 500, 1000, 2000),
)
PRESETS = {
    "digits": DIGITS,
    "mnist": PUBLISHED,
    "fashion_mnist": PUBLISHED,
    "cifar10": PUBLISHED,
    "cifar100": PUBLISHED,
    "cub200": PUBLISHED,
    "tiny_imagenet": SIZE_64,
    "imagenet": SIZE_64 | dict(steps=2_000_000),
    "imagenette": SIZE_128,
    "imagewoof": SIZE_128,
    "8px": DIGITS,
    "16px": PUBLISHED,
    "48px": SIZE_64,
    "96px": SIZE_128,
}
SIZES = {"cub200": 32, "imagenette": 128, "imagewoof": 128}  # published, where the set's usual size is another
LIMITS = {  # of flags: one that is out of them is refused before anything begins
    (1, inf): "steps batch_real save_every log_every chunk widths pool max_age online_batch eval_runs eval_batch "
    "class_steps members attack_updates attack_students",
    (0, inf): "lr_img lr_label lr_net ridge epsilon zca_reg cache_gb save_minutes eval_every eval_steps eval_lr",
    (0, 1): "lr_end",
    (-1, 1): "topk",
    (0, 2**32 - 1): "class_order member_chunk",
    (1e-6, inf): "eval_temperature",
}
STRATEGIES = {  # of DSA, as published
    "frepo": "flip_color_crop_rotate_translate_cutout",
    "dc": "color_crop_cutout_flip_scale_rotate",
}
FLIP = {  # published: by set, by set and images per class, or by application
    "mnist": False, "fashion_mnist": False, "cifar10": True, "cub200": True, "imagenette": True, "imagewoof": True,
    ("cifar100", 1): True, ("cifar100", 10): False, ("cifar100", 50): False, ("tiny_imagenet", 1): True,
    ("tiny_imagenet", 10): False, "imagenet": False, "continual": True, "membership": True,
}  # fmt: skip


def flip_doubling(choice: str, name: str, ipc: int, n_s: int, dim: int, mirror: bool) -> bool:
    """Whether distilled images count mirrored as well: --flip, else the published table, else while 2 n_s <= dim / 8.

    mirror: whether a mirrored image of the set is still the same thing.
    """
    if choice != "auto":
        return choice == "on"
    # FRePo's departure 4: the rule; the published code knows the numbers of the table alone
    return mirror and FLIP.get((name, ipc), FLIP.get(name, 2 * n_s <= dim / 8))


def doubled(x_s: Tensor, y_s: Tensor) -> tuple[Tensor, Tensor]:
    """The images (n_s, C, H, W) and their mirror images, with the labels (n_s, c) twice."""
    return torch.cat([x_s, x_s.flip(3)]), torch.cat([y_s, y_s])


def centred(y: Tensor, classes: int) -> Tensor:
    """Targets of class numbers y (n,): one-hot minus 1 / C. (n, C)"""
    return F.one_hot(y, classes).float() - 1 / classes


def start_labels(y: Tensor, classes: int) -> Tensor:
    """Labels that the distilled images start with: centred, over sqrt(C / 10). (n, C)"""
    return centred(y, classes) / (classes / 10) ** 0.5


def krr_residual(
    f_t: Tensor, y_t: Tensor, f_s: Tensor, y_s: Tensor, ridge: float, precision: str = "auto", backend: str = "auto"
) -> Tensor:
    """K_ts (K_ss + lam I)^-1 y_s - y_t, lam = ridge * trace(K_ss) / n_s. (n_t, C)

    f_t: (n_t, d), f_s: (n_s, d) the networks' features, y_t: (n_t, C), y_s: (n_s, C). The trace has its gradient.
    """
    lam = ridge * f_s.square().sum() / len(f_s)
    # FRePo's departure 3: float64 where that is cheap, and the primal system for more images than features
    return kernels.krr_predict(f_t, f_s, y_s, lam, precision=precision, backend=backend) - y_t


def kernel_loss(residual: Tensor) -> Tensor:
    """Half the squared error summed over the classes, mean over the batch: FRePo's, to compare with. (n_t, C) -> ()"""
    return 0.5 * residual.square().sum(1).mean()


def hardest(residual: Tensor, topk: float) -> Tensor:
    """Indices of the samples that count, by falling loss: the int(topk n_t) largest, or if negative smallest. (M,)

    residual: (n_t, C). 0, and 1 or more: all.
    """
    order = residual.square().sum(1).argsort(descending=True, stable=True)
    kept = int(abs(topk) * len(order)) if -1 < topk < 1 and topk else len(order)
    return order[:kept] if topk >= 0 else order[-kept:]


def isa_loss(residual: Tensor, kept: Tensor, partner: Tensor, epsilon: float, class_norm: str) -> Tensor:
    """Mean over the kept samples and the classes of r(t)^2, averaged over t in 0 .. epsilon.

    residual: (n_t, C), kept: (M,) of its rows, partner: (M,) of the kept ones. Features and targets move along the line
    f_i + t (f_i - f_j), and the prediction is linear: r(t) = a + t (a - v) with a = R_i, v = R_j. epsilon < 0: towards
    the neighbour; 0: the samples themselves. class_norm "half_sum": C / 2 times as much.
    """
    a = residual[kept]  # (M, C)
    v = a[partner]
    k_0, k_1, k_2 = 1 + epsilon + epsilon**2 / 3, -(epsilon + 2 * epsilon**2 / 3), epsilon**2 / 3
    integral = k_0 * a.square() + k_1 * a * v + k_2 * v.square()
    # ISA's departure 2: the mean, as published, is 2 / C of FRePo's weight beside the label margin
    return integral.mean() if class_norm == "mean" else 0.5 * integral.sum(1).mean()


def label_margin(y_s: Tensor) -> Tensor:
    """Mean of -min(top1 - top2, 1 / C): pushes a label's margin up until it is 1 / C. (n_s, C) -> ()"""
    top = y_s.topk(2, dim=1).values
    return -(top[:, 0] - top[:, 1]).clamp(max=1 / y_s.shape[1]).mean()


def lamb_update(m: Tensor, v: Tensor, t: int, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's step from its moments after t steps; eps stands outside the root, after the bias correction."""
    return m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962) without decay: every tensor moves by lr times its own norm.

    eps 1e-6 as in FRePo's code, and it matters: a pixel's gradient is of that order.
    """

    def __init__(self, params, lr: float = 3e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for x in group["params"]:
                state, (beta_1, beta_2) = self.state[x], group["betas"]
                if not state:
                    state.update(t=0, m=torch.zeros_like(x), v=torch.zeros_like(x))
                state["t"] += 1
                state["m"].mul_(beta_1).add_(x.grad, alpha=1 - beta_1)
                state["v"].mul_(beta_2).addcmul_(x.grad, x.grad, value=1 - beta_2)
                update = lamb_update(state["m"], state["v"], state["t"], group["betas"], group["eps"])
                norm, length = x.norm(), update.norm()
                trust = torch.where((norm > 0) & (length > 0), norm / length, torch.ones_like(norm))  # unclipped
                x.sub_(update.mul_(trust * group["lr"]))


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n images in an epoch. (n,)"""
    return torch.randperm(n, generator=rng("batch", seed, epoch))


def batch_index(step: int, n: int, batch: int, seed: int) -> Tensor:
    """Indices of the step-th real batch: shuffled epochs end to end, all batches full, at most all. (min(batch, n),)"""
    size = min(batch, n)
    places = torch.arange(step * size, (step + 1) * size)
    epochs = range(int(places[0]) // n, int(places[-1]) // n + 1)
    return torch.cat([epoch_order(n, seed, epoch)[places[places // n == epoch] % n] for epoch in epochs])


class Pool:
    """Networks at different ages, each trained on the current distilled set, one step when drawn."""

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
        self.ages[slot] = 0
        self.optimizers[slot] = torch.optim.Adam(self.nets[slot].parameters(), lr=self.args.lr_net, foreach=True)

    def train(self, slot: int, x_s: Tensor, y_s: Tensor) -> None:
        """One step of the inner objective: half squared error, train-mode BatchNorm, nothing augmented or mirrored."""
        if len(x_s) > self.args.online_batch:
            generator = rng("online batch", self.args.seed, slot, self.births[slot], self.ages[slot])
            index = upload(torch.randperm(len(x_s), generator=generator)[: self.args.online_batch], x_s.device)
            x_s, y_s = x_s[index], y_s[index]
        net, optimizer = self.nets[slot].train(), self.optimizers[slot]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            f_s = net.features(x_s)
        optimizer.zero_grad()
        (0.5 * (net.head(f_s.float()) - y_s).square().sum(1).mean()).backward()
        optimizer.step()
        self.ages[slot] += 1

    def warm_up(self, x_s: Tensor, y_s: Tensor) -> None:
        """Spread the ages: network i has i / pool of a life behind it."""
        for slot in tqdm(range(self.args.pool), desc="start of the pool", leave=False):
            age = self.args.max_age * slot // self.args.pool
            if self.args.pool_ages == "counter":  # FRePo's departure 1: the released code spreads the counters alone
                self.ages[slot] = age
            else:
                for _ in range(age):
                    self.train(slot, x_s, y_s)

    def grow(self, slot: int, x_s: Tensor, y_s: Tensor) -> None:
        """After the outer step: replace the network if it is of age, else train it once more."""
        if self.ages[slot] > self.args.max_age:
            self.replace(slot)
        else:
            self.train(slot, x_s, y_s)

    def state_dict(self) -> dict:
        parts = [(net.state_dict(), opt.state_dict()) for net, opt in zip(self.nets, self.optimizers, strict=True)]
        return dict(nets=[p[0] for p in parts], optimizers=[p[1] for p in parts], ages=self.ages, births=self.births)

    def load_state_dict(self, state: dict) -> None:
        for slot in range(self.args.pool):
            self.nets[slot].load_state_dict(state["nets"][slot])
            self.optimizers[slot].load_state_dict(state["optimizers"][slot])
        self.ages, self.births = state["ages"], state["births"]


def memory_needs(
    make_net, data: Data, held: Data | None, n_all: int, zca: bool, device, args: Args
) -> tuple[int, int, dict[str, dict[str, int]]]:
    """Bytes of one distilled image in the outer step, of the whitened images kept, and {phase: {flag: bytes}} of all
    but the first: see check_memory.

    held: the set of --holdout; n_all: distilled images with their mirror images, if those count.
    """
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with torch.device("meta"):  # shapes alone
        net, x = make_net().to(dtype), torch.zeros(2, data.channels, data.size, data.size, dtype=dtype)
        outer = bytes_per_image(net.frozen(), x.clone().requires_grad_())
        train = int(1.5 * bytes_per_image(net, x))  # and the gradients of the largest maps
        students = [frepo_student(m, data.channels, data.size, data.num_classes, args.widths) for m in args.eval_models]
        student = int(1.5 * max(bytes_per_image(each, x.float()) for each in students))
    n_s, n_t, d = args.ipc * len(data.y_train.unique()), min(args.batch_real, len(data.x_train)), net.dim
    width, ridge = 4 if args.ridge_precision == "fp32" else 8, min(n_all, d)
    always = {
        "libraries": 200_000_000,  # that are loaded on the way
        "--pool or --widths": args.pool * 4 * 4 * sum(p.numel() for p in net.parameters()),  # and gradients, moments
    }
    kept = 0
    if zca:
        matrix = 4 * (x[0].numel() // zca_stride(data.size) ** 2) ** 2
        always["--size"] = 2 * matrix  # the whitening and its inverse
        for images in [data.x_train, data.x_test] + ([held.x_test] if held else []):  # as they are kept below
            kept += 4 * images.numel() if kept + 4 * images.numel() <= args.cache_gb * 1e9 else 0
        always["--cache-gb"] = kept
    kernel = width * (3 * n_all * d + 2 * ridge**2)  # features, their gradient, the Gram matrix, its factor
    step = {
        "--batch-real": n_t * (int(0.6 * outer) + 2 * width * d),  # of its maps two at a time, features in two types
        "--ipc": kernel,
    }
    n_b = min(len(data.x_train) if args.full_row else n_s, args.eval_batch)
    if args.application == "membership":
        n_b = max(n_b, min(args.members, CHUNK_BATCH))
    score = {"--eval-batch or --eval-models": max(n_b, BLOCK) * student, "--ipc": kernel}
    phases = {"outer step": step, "training of the pool": {"--ipc": min(n_s, args.online_batch) * train}}
    if zca and device.type == "cpu":  # float64: moments, covariance, vectors and what the decomposition takes
        phases["whitening"] = {"--size": 10 * matrix}
    return outer, kept, {phase: always | parts for phase, parts in (phases | {"evaluation": score}).items()}


def main(args: Args, part: Data | None = None, zca: Zca | None = None) -> dict:
    """part, zca: some images of the set and their whitening, where an application has them distilled."""
    # data
    device = pick_device(args.device)
    data = part or load(
        args.data,
        data_dir=args.data_dir,
        size=args.size or SIZES.get(args.data),
        resize=args.resize,  # FRePo's departure 7
        channels=args.channels,
        test_fraction=args.test_fraction,
        seed=args.split_seed,
        labelled=True,
        skip_bad_images=args.skip_bad_images,
    )
    check_limits(args, {(0, 0.9): "holdout"})
    data, curve_data = hold_out(data, args.holdout, args.split_seed) if args.holdout else (data, data)
    named = args.size in (None, SIZES[args.data]) if args.data in SIZES else data.native
    preset = preset_name(PRESETS, args.preset, data.name, named, data.size)
    args = fill(args, PRESETS[preset])
    check_limits(args, LIMITS)
    if data.size < 4:
        raise UserError(f"--size {data.size}: must be at least 4, the network halves it {len(args.widths)} times")
    counts = data.y_train.bincount()
    classes, counts = data.num_classes, counts[counts > 0]  # a part may lack some
    smallest = int(counts.min())
    if not 1 <= args.ipc <= smallest:
        raise UserError(f"--ipc {args.ipc}: must be 1 to {smallest}, the training images of the smallest class")
    if int((abs(args.topk) or 1) * min(args.batch_real, len(data.x_train))) < 2:
        raise UserError(f"--topk {args.topk}: keeps fewer than two of a batch; raise it or --batch-real")
    if len(args.widths) != convnet_depth(data.size):
        blocks = convnet_depth(data.size)
        raise UserError(f"--widths {args.widths} (preset {preset}): {data.size} px images take {blocks} blocks")
    if args.select == "best" and not args.eval_every:
        raise UserError("--select best: chooses a point of the curve; give --eval-every, and --holdout 0.1")
    if not args.eval_models:
        raise UserError("--eval-models: give at least one, for instance conv")
    if args.application != "none" and args.holdout:
        raise UserError(f"--holdout: --application {args.application} takes all images; drop one of the two")
    if args.application == "membership" and len(args.eval_models) > 1:
        raise UserError("--eval-models: --application membership takes one of them")
    for model in args.eval_models:  # what is wrong with one is said now
        with torch.device("meta"):
            frepo_student(model, data.channels, data.size, classes, args.widths)
    strategy = STRATEGIES[args.eval_dsa_strengths] if args.eval_dsa is None else args.eval_dsa
    if args.eval_dsa is None and not (data.flip and data.channels > 1):
        strategy = strategy.replace("flip_", "")
    dsa_strategy(strategy, args.eval_dsa_strengths)
    print(f"data: {describe(data)}; preset {preset}")

    def make_net() -> FRePoConvNet:
        return FRePoConvNet(data.channels, data.size, classes, args.widths, args.norm)

    with torch.device("meta"):
        dim = make_net().dim
    n_s = args.ipc * len(counts)
    known = args.application if args.application != "none" else data.name if named else ""
    mirror = data.flip and (data.channels > 1 or known != "membership")
    flip = flip_doubling(args.flip, known, args.ipc, n_s, dim, mirror)
    n_all = 2 * n_s if flip else n_s
    whitened = args.zca and data.channels > 1
    if whitened:
        zca_stride(data.size)  # refuses a size now
    recipe = Recipe(
        steps=args.eval_steps or student_steps(n_s, dict(frepo=STEPS, isa=STEPS_ISA)[args.eval_table]),
        runs=args.eval_runs,
        batch=args.eval_batch,
        lr=args.eval_lr,
        loss=args.eval_loss,
        temperature=args.eval_temperature,
        dsa=strategy,
        strengths=args.eval_dsa_strengths,
        shared=args.eval_dsa_shared,
        shuffle=args.eval_shuffle,
        ridge=args.ridge,
        flip=flip,
    )
    labels = partial(start_labels, classes=classes)
    whiten = partial(fit_zca, data_dir=args.data_dir, reg=args.zca_reg) if whitened else lambda data: None
    image, kept, phases = memory_needs(
        make_net, data, curve_data if args.holdout else None, n_all, whitened, device, args
    )
    chunk = args.chunk or fit_chunk(n_all, image, sum(phases["outer step"].values()), device)
    phases["outer step"]["--chunk"] = min(chunk, n_all) * image
    need = check_memory(phases, device)
    try:
        ridge = kernels.describe(args.ridge_precision, device, args.backend)
    except ValueError as error:  # float64 or Triton where the device has none
        raise UserError(f"--ridge-precision or --backend: {error}") from None
    if args.application != "none" and part is None:  # else this is a part's run
        start = partial(Run, __file__, args, data.name, data.content)
        shared = dict(widths=args.widths, seed=args.seed, cache_gb=args.cache_gb)
        if args.application == "continual":
            return continual(
                main, data, start, recipe, labels, whiten, steps=args.class_steps, order=args.class_order,
                updates=args.eval_steps, models=args.eval_models, all_real=args.full_row, **shared,
            )  # fmt: skip
        return membership(
            main, data, start, recipe, labels, whiten, ipc=args.ipc, members=args.members, chunk=args.member_chunk,
            updates=args.attack_updates, target=args.attack_target, others=args.non_members,
            attacked=args.attack_students, model=args.eval_models[0], **shared,
        )  # fmt: skip
    print(ridge)
    print(f"distilled: {n_s} images, {'and mirrored' if flip else 'not mirrored'}, {dim} features")
    run = Run(__file__, replace(args, chunk=chunk), data.name, data.content)
    args = run.args
    mean, std = data.mean.to(device), data.std.to(device)
    zca = zca or whiten(data)
    zca = zca and zca.to(device)
    # each set of images whitened once if it fits what the ones before left of --cache-gb; index (B,) -> (B, C, H, W)
    room = partial(Inputs, mean=mean, std=std, zca=zca, device=device, spare=need - kept)
    train = room(data.x_train, gigabytes=args.cache_gb)
    test = room(data.x_test, gigabytes=args.cache_gb - train.gigabytes)
    held = test
    if args.holdout:
        held = room(curve_data.x_test, gigabytes=args.cache_gb - train.gigabytes - test.gigabytes)
    checked = train(torch.arange(min(8, len(train)))).cpu()
    run.check_same("images after normalising and whitening", checked)
    y_train = centred(data.y_train, classes).to(device)  # (N, C)
    # ISA's departure 1: away from the neighbour, as the published code, though its words say interpolation
    epsilon = args.epsilon if args.direction == "away" else -args.epsilon
    of_mean = 0.5 * (1 - 1 / classes)  # loss of predicting the mean

    # distilled set
    index = per_class(data.y_train, args.ipc, "initial images", args.seed)  # FRePo's departure 6
    x_s = train(index).clone()  # (n_s, C, H, W), class after class
    y_s = start_labels(data.y_train[index], classes).to(device)  # (n_s, C)
    learned = [x_s, y_s] if args.learn_label else [x_s]
    for tensor in learned:
        tensor.requires_grad_()
    groups = [{"params": [x_s], "lr": args.lr_img}, {"params": [y_s], "lr": args.lr_label}][: len(learned)]
    optimizer = Lamb(groups) if args.outer_opt == "lamb" else torch.optim.Adam(groups)
    cosine = lambda t: args.lr_end + (1 - args.lr_end) * 0.5 * (1 + cos(pi * t / args.steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)

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
        run.save(step, checked=checked, x_s=x_s.detach(), y_s=y_s.detach(), curve=curve, **states)

    rows = ("random_real", "distilled") + (("all_real",) if args.full_row else ())
    seconds = partial(predict_seconds, data, n_s, classes, args.widths, device, recipe)
    seconds_all = seconds(args.eval_models, rows)
    seconds_curve = seconds(args.eval_models[:1], ("distilled",)) if args.eval_every else 0.0

    def seconds_later(done: int) -> float:
        """Of the evaluations that are still to come after `done` steps."""
        points = (args.steps - 1) // args.eval_every - done // args.eval_every if args.eval_every else 0
        points += args.select == "best"
        return seconds_all + points * seconds_curve

    def pixels() -> Tensor:
        x = x_s.detach()
        return denormalise(zca.undo(x) if zca else x, mean, std)

    def save(step: int, name: str = "distilled.safetensors") -> Distilled:
        """Save the set and load it again: what is scored is what was saved."""
        save_distilled(
            run.file(name),
            pixels(),
            y_s,
            data.mean,
            data.std,
            method=run.name,
            data=data.name,
            content=data.content,
            y_is="class scores",
            class_names=data.class_names,
            resize=data.resize,
            step=step,
            seed=args.seed,
            recipe=asdict(recipe),
            zca=zca,
            extra=dict(
                ipc=args.ipc,
                flip=flip,
                widths=args.widths,
                eval_models=args.eval_models,
                topk=args.topk,
                epsilon=epsilon,
                class_norm=args.class_norm,
            ),
        )
        return load_distilled(run.file(name), run.name)

    def on_curve(step: int) -> bool:
        return args.eval_every > 0 and step % args.eval_every == 0 and step < args.steps

    def evaluate(distilled: Distilled, scored: Data, inputs: Inputs, models, rows) -> dict[str, dict[str, dict]]:
        return evaluate_students(
            distilled, scored, train, inputs, labels, args.widths, device, recipe, args.seed, models, rows,
            run.file("evaluation.json"),
        )  # fmt: skip

    def curve_point(step: int) -> None:
        """Score the set as it is, by the table's schedule (FRePo's departure 5), and add it to the curve."""
        with run.aside():
            scores = evaluate(save(step), curve_data, held, args.eval_models[:1], ("distilled",))["distilled"]
        add_to_curve(step, scores)
        run.log_evaluation(step, {f"eval/{key}": value["mean"] for key, value in scores.items()})
        if args.select == "best" and step == min(curve, key=lambda point: point["error"]["mean"])["step"]:
            save(step, "best.safetensors")
        run.plateau(curve, "error")

    def add_to_curve(step: int, scores: dict) -> None:
        accuracy = scores[args.eval_models[0]]
        error = accuracy | dict(mean=1 - accuracy["mean"], values=[1 - value for value in accuracy["values"]])
        curve.append({"step": step, "error": error, **scores})

    # outer loop
    if run.start == 0:
        checkpoint(0)
        run.grid(0, args.steps, pixels, args.ipc if args.ipc > 1 else 10)
    elif on_curve(run.start) and run.start not in [point["step"] for point in curve]:  # stopped in this evaluation
        curve_point(run.start)
    for step in run.steps(args.steps, seconds_later):
        slot = int(torch.randint(args.pool, (), generator=rng("slot", args.seed, step)))  # FRePo's departure 6
        # eval mode: BatchNorm uses statistics gathered from the distilled images; the weights get no gradient
        features = pool.nets[slot].frozen()
        index = batch_index(step, len(train), args.batch_real, args.seed)
        x_t, y_t = train(index), y_train[upload(index, device)]  # (n_t, C, H, W), (n_t, C)
        x_all, y_all = doubled(x_s, y_s) if flip else (x_s, y_s)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            with torch.no_grad():
                f_t = features(x_t)
            f_s = features_chunked(features, x_all, args.chunk)
        f_t, f_s = f_t.float(), f_s.float()  # (n_t, d), (n_s or 2 n_s, d)
        residual = krr_residual(f_t, y_t, f_s, y_all, args.ridge, args.ridge_precision, args.backend)  # (n_t, C)
        kept = hardest(residual.detach(), args.topk)
        partner = kernels.nearest(f_t[kept], backend=args.backend)  # among the kept, of any class; ISA's departure 5
        kernel, margin = isa_loss(residual, kept, partner, epsilon, args.class_norm), label_margin(y_s)
        for tensor, gradient in zip(learned, torch.autograd.grad(kernel + margin, learned), strict=True):
            tensor.grad = gradient
        optimizer.step()
        age, lr_img = pool.ages[slot], optimizer.param_groups[0]["lr"]
        schedule.step()
        pool.grow(slot, x_s.detach(), y_s.detach())

        done = step + 1
        logging = done % args.log_every == 0 or done in (1, args.steps)
        saving = on_curve(done) or run.due(done, args.save_every)
        if logging or saving:
            relative = float(kernel_loss(residual.detach())) / of_mean
            lam = args.ridge * float(f_s.detach().square().sum()) / len(f_s)
            scalars = {"loss": relative, "kernel": float(kernel.detach()), "margin": float(margin.detach()), "lam": lam}
            run.check_finite(done, scalars, f"n_s {len(f_s)}, d {f_s.shape[1]}")
            if logging:
                right = ((residual.detach() + y_t).argmax(1) == y_t.argmax(1)).float().mean()
                run.log(done, scalars | {"accuracy": float(right), "age": age, "lr_img": lr_img})
        run.grid(done, args.steps, pixels, args.ipc if args.ipc > 1 else 10)
        if saving:
            checkpoint(done)
        if on_curve(done):  # after the checkpoint: a run that is stopped in it goes on with it
            curve_point(done)

    # evaluation
    distilled = save(args.steps)
    if args.select == "best":  # FRePo's departure 2: the last step is the default
        if args.steps not in [point["step"] for point in curve]:
            curve_point(args.steps)
        shutil.copy(run.file("best.safetensors"), run.file("distilled.safetensors"))
        distilled = load_distilled(run.file("distilled.safetensors"), run.name)
        print(f"selected: step {distilled.step}, by the {'held-out' if args.holdout else 'test'} images")
    scores = evaluate(distilled, data, test, args.eval_models, rows)
    if not args.holdout and args.select == "last":  # else the curve is of other images than the table, or has it
        add_to_curve(args.steps, scores["distilled"])
    caption = (
        f"{data.name}, {args.ipc} images a class, step {distilled.step}, seed {args.seed}: test accuracy in per cent, "
        f"mean ± sample std over {args.eval_runs} students"
    )
    print(table(scores, caption))
    write_json(run.file("curve.json"), curve)
    random_real = 1 - scores["random_real"][args.eval_models[0]]["mean"]
    points = {"random real: error of students, test": [(0, random_real), (args.steps, random_real)]}
    if curve:
        name = f"distilled: error of students, {'held out' if args.holdout else 'test'}"
        points[name] = [(point["step"], point["error"]["mean"]) for point in curve]
    run.plot(points, f"{data.name}, {args.ipc} a class: error; loss relative to predicting the mean")
    return run.finish(
        data=data.name,
        ipc=args.ipc,
        steps=args.steps,
        selected_step=distilled.step,
        flip=flip,
        whitened=whitened,
        loss_of_mean=of_mean,
        eval=scores,
        protocol=asdict(recipe),
        backend=ridge,
        images_skipped=data.skipped,
        storage_bytes=distilled.meta["storage_bytes"],
        zca_bytes=distilled.meta["zca_bytes"],
    )


if __name__ == "__main__":
    cli(main, Args)
