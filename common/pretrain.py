"""Squeezes: networks trained on all images, without labels or with them, once and cached; the linear probe on them.

Barlow Twins: Zbontar et al. 2021, arXiv:2103.03230, with solo-learn's CIFAR settings. MoCo v2: He et al. 2020,
arXiv:1911.05722, and Chen et al. 2020, arXiv:2003.04297, with the settings of the authors' CIFAR demonstration.

A method gives its modules and a `Method`; `train` does what all of them share, `optimise` the loop.
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from common.augment import colour_jitter, crop_flip, grayscale, resized_crop, two_views, uniform, upload
from common.data import Data, normalise
from common.models import ResNet
from common.run import (
    Interval,
    UserError,
    all_finite,
    bytes_per_image,
    check_memory,
    finish_steps,
    load_checkpoint,
    out_of_memory,
    rng,
    seeded,
    stop_asked,
    stop_if_asked,
    write_atomic,
)
from common.teacher import FORMAT, Teacher, digest_of, freeze, load_own, short
from kernels.barlow import barlow_loss, barlow_terms

CHECKPOINT = "teacher checkpoint 1"
PROBE = "probe 1"


@dataclass
class Method:
    """How a method trains its modules; tensors and numbers in, tensors and numbers out.

    loss_of(index, epoch, i): the loss of the images `index` (B,), on the CPU, the i-th batch of an epoch; and a
    function that gives numbers by name for the line about a training that diverged (`dict`: none). rate_of(epoch, i):
    the learning rate. before_update(rate): called between the gradient and the optimiser's step.
    """

    optimizer: torch.optim.Optimizer
    loss_of: Callable[[Tensor, int, int], tuple[Tensor, Callable[[], dict[str, float]]]]
    rate_of: Callable[[int, int], float]
    before_update: Callable[[float], None] = lambda rate: None


# ----------------------------------------------------------------------------------------------- what all methods share


def teacher_info(
    method: str,
    data: Data,
    settings: dict,
    *,
    arch: str,
    width: int,
    stem_padding: int,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    precision: str,
) -> dict:
    """All that decides a teacher's weights. settings: the method's own. The folder's name holds a hash of it."""
    return dict(
        format=FORMAT,
        method=method,
        data=data.name,
        content=data.content,
        mean=data.mean.tolist(),
        std=data.std.tolist(),
        channels=data.channels,
        size=data.size,
        arch=arch,
        width=width,
        stem="cifar" if data.size <= 96 else "imagenet",
        stem_padding=stem_padding,
        epochs=epochs,
        batch=batch,
        lr=lr,
        **settings,
        flip=data.flip,
        seed=seed,
        precision=precision,
    )


def hash_of(info: dict) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()[:8]


def blank_resnet(info: dict) -> ResNet:
    """The backbone that a teacher's info describes, with new weights."""
    return ResNet(info["arch"], info["channels"], info["width"], info["stem"], info["stem_padding"])


def at_least_two(data: Data) -> None:
    if len(data.x_train) < 2:
        raise UserError("a teacher cannot be trained on one image; add images, or name a teacher with --teacher")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the teacher's folder ({error.strerror}); check --out-dir") from None


def train(
    info: dict,
    data: Data,
    teachers: Path,
    device: torch.device,
    make: Callable[[], dict[str, nn.Module]],
    method_of: Callable[[dict[str, nn.Module]], Method],
    *,
    views: int,
    flags: tuple[str, str, str],
    save_minutes: float,
) -> Teacher:
    """The teacher that `info` describes: from its folder in `teachers` if it was trained before, else trained.

    make(): the new modules by name: "net", the backbone; "fc", a classifier that is kept with it; others serve the
    training alone. method_of(modules): how they are trained, once they are on the device. views: of each image that a
    step takes a gradient of; flags: what sets the memory of the views, that of the weights, and the learning rate.

    The folder's name holds data, method, architecture, epochs, seed and a hash of `info`. Training goes on from any
    step as if it had not stopped. Prints a k-NN accuracy as it goes (labelled data), which selects nothing.
    Raises UserError if the loss or a weight is not finite, which is never saved, and Stopped after a signal.
    """
    folder = Path(teachers) / (
        f"{info['data']}-{info['method']}-{info['arch']}x{info['width']}-{info['epochs']}ep-s{info['seed']}"
        f"-{hash_of(info)}"
    )
    if (folder / "teacher.safetensors").exists():
        print(f"teacher: {folder.name} (cached)")
        return load_own(folder / "teacher.safetensors")
    with torch.device("meta"):  # shapes alone
        blank, x = make(), torch.zeros(2, data.channels, data.size, data.size)
        maps = views * info["batch"] * bytes_per_image(blank_resnet(info), x)
    weights = 16 * sum(p.numel() for part in blank.values() for p in part.parameters())  # gradients, momentum, a spare
    maps = int(1.2 * maps) // (2 if info["precision"] == "bf16" else 1)  # and the gradients of the largest ones
    check_memory({"teacher's training": {flags[0]: maps, flags[1]: weights}}, device)
    make_folder(folder)

    with seeded("teacher", info["seed"]):
        modules = make()
    for module in modules.values():
        module.to(device, memory_format=torch.channels_last)  # faster on CPU and GPU alike
    net, epochs = modules["net"], info["epochs"]
    info = info | {"knn": {}}

    def at_epoch(epoch: int, value: float) -> None:
        if data.labelled and epoch % max(1, epochs // 5) == 0:
            info["knn"][str(epoch)] = round(quick_knn(net, data, device), 4)
            tqdm.write(f"teacher: epoch {epoch}/{epochs} loss {value:.3f} k-NN {info['knn'][str(epoch)]:.1%}")

    seconds = optimise(
        folder / "checkpoint.pt",
        modules,
        method_of(modules),
        info["knn"],
        at_epoch,
        what="teacher",
        name=folder.name,
        n=len(data.x_train),
        batch=info["batch"],
        epochs=epochs,
        seed=info["seed"],
        mend=f"lower {flags[2]}; the last good checkpoint stays in {folder}",
        save_minutes=save_minutes,
    )
    info["seconds"] = round(seconds, 1)
    weights = dict(net.state_dict())
    if "fc" in modules:
        weights |= {f"fc.{key}": value for key, value in modules["fc"].state_dict().items()}
        info["accuracy"] = round(accuracy_on_test(net, modules["fc"], data, device), 4)
        print(f"teacher: test accuracy {info['accuracy']:.1%}")
    weights = {key: value.cpu().contiguous() for key, value in weights.items()}
    meta = {"info": json.dumps(info)}
    write_atomic(folder / "teacher.safetensors", lambda tmp: save_file(weights, tmp, metadata=meta))
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    print(f"teacher: {folder} in {info['seconds']:.0f} s")
    stop_if_asked()
    return load_own(folder / "teacher.safetensors")


def optimise(
    checkpoint: Path,
    modules: dict[str, nn.Module],
    method: Method,
    measured: dict,
    at_epoch: Callable[[int, float], None] = lambda epoch, value: None,
    *,
    what: str,
    name: str,
    n: int,
    batch: int,
    epochs: int,
    seed: int,
    mend: str,
    save_minutes: float,
) -> float:
    """Train the modules in place, `epochs` times over n images in batches of one size (the rest of an epoch is
    dropped); returns the seconds it took, those before an interruption included.

    A checkpoint is written every save_minutes (0: never for the time alone), at a hundred epochs and when a signal
    asks to stop; one that is there is gone on from, bit for bit on a CPU. It holds the modules, the optimiser and
    `measured` (of numbers, changed in place), which at_epoch(epochs done, loss) fills. what: "teacher" or "probe", the
    first word of what is printed; name: for the bar; mend: the end of the line about what is not finite.

    Raises UserError if the loss or a weight is not finite, which is never saved; Stopped after a signal, except in the
    last step: the caller writes what was trained first.
    """
    per_epoch = n // batch
    steps = epochs * per_epoch
    parts = modules | {"optimizer": method.optimizer}
    start, seconds_before, began = 0, 0.0, time.monotonic()
    if checkpoint.exists():
        state = resume(checkpoint, what, parts)
        start, seconds_before = state["step"], state["seconds"]
        measured |= state["knn"]
        print(f"{what}: {name} goes on at step {start} of {steps}")
    bar = tqdm(total=steps, initial=start, desc=f"{what} {name}", mininterval=1, dynamic_ncols=True)
    interval = Interval(save_minutes)
    with finish_steps(), bar:
        for step in range(start, steps):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == start:
                for module in modules.values():
                    module.train()
                order = torch.randperm(n, generator=rng(f"{what} order", seed, epoch))
            loss, terms_of = method.loss_of(order[i * batch : (i + 1) * batch], epoch, i)
            method.optimizer.zero_grad()
            loss.backward()
            rate = method.optimizer.param_groups[0]["lr"] = method.rate_of(epoch, i)
            method.before_update(rate)
            method.optimizer.step()
            bar.update()

            epoch_ends, done = i + 1 == per_epoch, step + 1
            saving = (epoch_ends and (epoch + 1) % max(1, epochs // 100) == 0) or interval.due() or stop_asked()
            if not (epoch_ends or saving):
                continue
            state = {key: part.state_dict() for key, part in parts.items()}
            value = float(loss.detach())
            if not math.isfinite(value) or not all_finite(state):
                terms = "".join(f"{key} {number:.4g}, " for key, number in terms_of().items())
                raise UserError(
                    f"{what}: epoch {epoch + 1}, step {done}: loss is {value:.4g} or a weight is not finite ({terms}"
                    f"learning rate {rate:.3g}); {mend}"
                )
            bar.set_postfix_str(f"loss {value:.3f}")
            if epoch_ends:
                at_epoch(epoch + 1, value)
            if saving and done < steps:  # what is finished is written as such
                seconds = seconds_before + time.monotonic() - began
                state |= dict(format=CHECKPOINT, step=done, seconds=seconds, knn=measured)
                write_atomic(checkpoint, lambda tmp, state=state: torch.save(state, tmp))
                interval.start()
                stop_if_asked()
    return seconds_before + time.monotonic() - began


def resume(path: Path, what: str, parts: dict) -> dict:
    """Load a checkpoint into its parts and return the rest. Raises UserError if it is damaged or not this one's."""
    try:
        state = load_checkpoint(path)
        if state.get("format") != CHECKPOINT:
            raise ValueError(f"format {state.get('format')}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return {key: state[key] for key in ("step", "seconds", "knn")}
    except Exception as error:  # torch raises many kinds here
        if out_of_memory(error):
            raise
        reason = "unreadable" if isinstance(error, UserError) else short(error)
        line = f"{path}: not a checkpoint of this {what} ({reason}); delete it to train the {what} anew"
        raise UserError(line) from None


def cosine_lr(step: int, steps: int, warmup: int, lr: float) -> float:
    """Linear warm-up from lr / 10,000, then a cosine to zero."""
    if step < warmup:
        return lr * max(1e-4, step / warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def knn_accuracy(f_train: Tensor, y_train: Tensor, f_test: Tensor, y_test: Tensor, k: int = 20) -> float:
    """Accuracy of a k-nearest-neighbour vote by cosine, weighted by exp(similarity / 0.07) (Wu et al. 2018)."""
    f_train, f_test = F.normalize(f_train, dim=1), F.normalize(f_test, dim=1)
    k, classes, right = min(k, len(f_train)), int(y_train.max()) + 1, 0
    for f, y in zip(f_test.split(512), y_test.split(512), strict=True):
        similarity, index = (f @ f_train.T).topk(k)
        votes = torch.zeros(len(f), classes).scatter_add_(1, y_train[index], (similarity / 0.07).exp())
        right += int((votes.argmax(1) == y).sum())
    return right / len(f_test)


def quick_knn(net: nn.Module, data: Data, device: torch.device) -> float:
    """k-NN accuracy on at most 10,000 training and 2,000 test images, a fixed random subset."""
    mean, std = data.mean.to(device), data.std.to(device)
    net.eval()

    def embed(x: Tensor, y: Tensor, most: int) -> tuple[Tensor, Tensor]:
        index = torch.randperm(len(x), generator=rng("knn"))[:most]
        with torch.no_grad():
            parts = [net(normalise(x[i].to(device), mean, std)).float().cpu() for i in index.split(256)]
        return torch.cat(parts), y[index]

    return knn_accuracy(*embed(data.x_train, data.y_train, 10_000), *embed(data.x_test, data.y_test, 2_000))


@torch.no_grad()
def accuracy_on_test(net: nn.Module, fc: nn.Module, data: Data, device: torch.device) -> float:
    """Of fc(net(x)) over all test images; the network is left in eval mode."""
    mean, std = data.mean.to(device), data.std.to(device)
    net.eval()
    right = 0
    for x, y in zip(data.x_test.split(256), data.y_test.split(256), strict=True):
        scores = fc(net(normalise(x.to(device), mean, std)).float())
        right += int((scores.argmax(1).cpu() == y).sum())
    return right / len(data.y_test)


# --------------------------------------------------------------------------------------------------------- Barlow Twins


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


@torch.no_grad()
def lars_(params: list[Tensor], lr: float, eta: float, weight_decay: float) -> None:
    """Scale the gradients in place by LARS's layer-wise trust ratio, clipped at lr; the optimiser is then plain SGD.

    You, Gitman and Ginsburg 2017, arXiv:1708.03888. Biases and norm parameters (one dimension) are left alone, as in
    the Barlow Twins recipe.
    """
    params = [p for p in params if p.ndim > 1]
    p_norms = torch.stack(torch._foreach_norm(params))
    g_norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
    ratio = eta * p_norms / (g_norms + weight_decay * p_norms + 1e-8)
    ratio = torch.where((p_norms > 0) & (g_norms > 0), (ratio / lr).clamp(max=1), 1.0)
    for p, scale in zip(params, ratio, strict=True):
        p.grad.add_(p, alpha=weight_decay).mul_(scale)


def train_teacher(
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
    steps, warmup, peak = epochs * per_epoch, min(10, epochs // 10 + 1) * per_epoch, lr * batch / 256

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
                return {"diagonal": on, "off-diagonal": off}

            return loss, terms_of

        return Method(
            torch.optim.SGD(params, lr=lr, momentum=0.9),
            loss_of,
            lambda epoch, i: cosine_lr(epoch * per_epoch + i, steps, warmup, peak),
            lambda rate: lars_(params, rate, eta, weight_decay),
        )

    flags = ("--teacher-batch", "--teacher-projector", "--teacher-lr")
    return train(info, data, teachers, device, make, method_of, views=2, flags=flags, save_minutes=save_minutes)


# -------------------------------------------------------------------------------------------------------------- MoCo v2


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over `splits` parts of the batch, each normalised by its own mean and variance when training.

    The parts are equal runs of consecutive images, as if each were on its own GPU; the running statistics move towards
    the average over the parts of their means and their (unbiased) variances. In eval mode and in the state dict it is
    nn.BatchNorm2d.
    """

    def __init__(self, norm: nn.BatchNorm2d, splits: int):
        super().__init__(norm.num_features, norm.eps, norm.momentum, device=norm.weight.device)
        self.load_state_dict(norm.state_dict())
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(f"{len(x)} images cannot be split into {self.splits} equal parts")
        means, variances = (part.repeat(self.splits, 1) for part in (self.running_mean, self.running_var))
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_norms(net: nn.Module, splits: int) -> nn.Module:
    """`net` with every BatchNorm2d replaced by a SplitBatchNorm2d of the same parameters and buffers."""
    for name, norm in list(net.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            net.set_submodule(name, SplitBatchNorm2d(norm, splits))
    return net


class Queue(nn.Module):
    """The last `size` keys, unit vectors (size, dim); before that many were seen, random ones."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))


@torch.no_grad()
def enqueue_(keys: Tensor, new: Tensor, seen: int) -> None:
    """Write new keys (B, dim) over the oldest of `keys` (K, dim), in place; seen: keys that came before these."""
    new, seen = new[-len(keys) :], seen + max(0, len(new) - len(keys))
    keys[upload(torch.arange(seen, seen + len(new)) % len(keys), keys.device)] = new


@torch.no_grad()
def follow_(slow: list[Tensor], fast: list[Tensor], momentum: float) -> None:
    """slow = momentum * slow + (1 - momentum) * fast, in place."""
    torch._foreach_mul_(slow, momentum)
    torch._foreach_add_(slow, fast, alpha=1 - momentum)


def info_nce(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each query's key among itself and the negatives, batch mean.

    q, k: (B, d), negatives: (K, d), all of unit length.
    """
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / temperature  # (B, 1 + K)
    return F.cross_entropy(scores, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def gaussian_blur(x: Tensor, generator: torch.Generator, p: float, low: float, high: float) -> Tensor:
    """Each image of x (N, C, H, W) blurred with chance p, its sigma uniform in low .. high pixels.

    At the border the weights inside the image are scaled to sum to one.
    """
    n = len(x)
    sigma = uniform(n, low, high, generator, x.device)[:, None, None]
    use = (uniform(n, 0, 1, generator, x.device) < p)[:, None, None, None]

    def weights(size: int) -> Tensor:
        """(N, 1, size, size): row i holds what each pixel gives to pixel i."""
        at = torch.arange(size, dtype=torch.float32, device=x.device)
        return (-(at[:, None] - at).square() / (2 * sigma.square())).softmax(2)[:, None]

    return torch.where(use, weights(x.shape[2]) @ x @ weights(x.shape[3]).mT, x)


def moco_view(x: Tensor, generator: torch.Generator, scale: tuple[float, float], flip: bool, blur: bool) -> Tensor:
    """One view of MoCo v2: crop, flip, jitter, grayscale; with `blur` half of them blurred, as for ImageNet.

    x: pixels (N, C, H, W) in [0, 1]; returns pixels in [0, 1].
    """
    x = resized_crop(x, generator, scale, flip)
    x = colour_jitter(x, generator, p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    if x.shape[1] == 3:
        grey = (uniform(len(x), 0, 1, generator, x.device) < 0.2)[:, None, None, None]
        x = torch.where(grey, grayscale(x).expand_as(x), x)
    return gaussian_blur(x, generator, 0.5, 0.1, 2.0) if blur else x


def train_moco(
    data: Data,
    teachers: Path,
    device: torch.device,
    *,
    arch: str = "resnet18",
    width: int = 64,
    stem_padding: int = 1,
    epochs: int = 200,
    batch: int = 512,
    lr: float = 0.06,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    queue: int = 4096,
    temperature: float = 0.1,
    key_momentum: float = 0.99,
    dim: int = 128,
    mlp: bool = False,
    splits: int = 8,
    crop_min: float = 0.08,
    blur: bool = False,
    seed: int = 0,
    precision: str = "fp32",
    save_minutes: float = 10.0,
) -> Teacher:
    """Train a ResNet by MoCo v2 on data.x_train, or load it from `teachers` if it was trained before.

    The defaults are those of the authors' demonstration on CIFAR-10 (spec. 1.2). lr: as it is, whatever the batch;
    queue: negative keys, at most as many as an epoch gives; key_momentum: of the key encoder's weights; dim: of the
    keys; mlp: two layers instead of one from the features to them; splits: parts of the batch that BatchNorm normalises
    on their own, fewer where a part would have less than two images; crop_min: smallest area of a view; blur: of half
    of the views. For ImageNet: resnet50, batch 256, lr 0.03, weight_decay 1e-4, queue 65536, temperature 0.2,
    key_momentum 0.999, mlp, crop_min 0.2, blur. save_minutes, errors and what is printed: see `train`.
    """
    at_least_two(data)
    batch = min(batch, len(data.x_train))
    splits = max(1, min(splits, batch // 2))
    batch -= batch % splits
    per_epoch = len(data.x_train) // batch
    queue = min(queue, per_epoch * batch)
    settings = dict(
        weight_decay=weight_decay,
        momentum=momentum,
        queue=queue,
        temperature=temperature,
        key_momentum=key_momentum,
        dim=dim,
        mlp=mlp,
        splits=splits,
        crop_min=crop_min,
        blur=blur,
    )
    info = teacher_info("moco", data, settings, arch=arch, width=width, stem_padding=stem_padding, epochs=epochs,
                        batch=batch, lr=lr, seed=seed, precision=precision)  # fmt: skip
    mean, std = data.mean.to(device), data.std.to(device)

    def make() -> dict[str, nn.Module]:
        net = split_norms(blank_resnet(info), splits)
        hidden = [nn.Linear(net.dim, net.dim), nn.ReLU()] if mlp else []
        head = nn.Sequential(*hidden, nn.Linear(net.dim, dim))
        return {
            "net": net,
            "head": head,
            "key_net": copy.deepcopy(net).requires_grad_(False),
            "key_head": copy.deepcopy(head).requires_grad_(False),
            "queue": Queue(queue, dim),
        }

    def method_of(modules: dict[str, nn.Module]) -> Method:
        query = nn.Sequential(modules["net"], modules["head"])
        key, keys = nn.Sequential(modules["key_net"], modules["key_head"]), modules["queue"].keys
        fast, slow = list(query.parameters()), list(key.parameters())

        def embed(encoder: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                z = encoder(normalise(x, mean, std))
            return F.normalize(z.float(), dim=1)

        def loss_of(index: Tensor, epoch: int, i: int) -> tuple[Tensor, Callable]:
            x, generator = upload(data.x_train[index], device) / 255, rng("teacher views", seed, epoch, i)
            x_q, x_k = (moco_view(x, generator, (crop_min, 1.0), data.flip, blur) for _ in range(2))
            q = embed(query, x_q)
            with torch.no_grad():
                follow_(slow, fast, key_momentum)
                # the parts of BatchNorm have other members here, so that their statistics do not tell which is whose
                order = torch.randperm(batch, generator=rng("teacher shuffle", seed, epoch, i))
                k = embed(key, x_k[upload(order, device)])[upload(order.argsort(), device)]
            loss = info_nce(q, k, keys.clone(), temperature)  # as they are now, for the backward pass
            enqueue_(keys, k, (epoch * per_epoch + i) * batch)
            return loss, dict

        optimizer = torch.optim.SGD(fast, lr=lr, momentum=momentum, weight_decay=weight_decay)
        return Method(optimizer, loss_of, lambda epoch, i: cosine_lr(epoch, epochs, 0, lr))

    flags = ("--teacher-batch", "--teacher-width", "--teacher-lr")
    return train(info, data, teachers, device, make, method_of, views=1, flags=flags, save_minutes=save_minutes)


# ----------------------------------------------------------------------------------------------------------- supervised


def train_supervised(
    data: Data,
    teachers: Path,
    device: torch.device,
    *,
    arch: str = "resnet18",
    width: int = 64,
    stem_padding: int = 1,
    epochs: int = 200,
    batch: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    warmup: int = 0,
    crop: str = "pad",
    crop_min: float = 0.08,
    seed: int = 0,
    precision: str = "fp32",
    save_minutes: float = 10.0,
) -> Teacher:
    """Train a ResNet and a linear classifier, the teacher's `fc`, by cross-entropy on the labelled data; or load it.

    The defaults are SRe2L's for CIFAR (spec. 1.2). warmup: epochs of a linear rise to lr, before a cosine per step;
    crop: "pad", shifts over zeros and flips, or "resized", boxes of at least crop_min of the area and flips.
    info["accuracy"]: on the test images at the end, which selects nothing. save_minutes, errors and what is printed:
    see `train`. Raises UserError without labels.
    """
    at_least_two(data)
    if not data.labelled:
        raise UserError(f"{data.name} has no labels; a supervised network needs them: make one subfolder a class")
    if crop not in ("pad", "resized"):
        raise UserError(f"crop {crop!r}: not one of pad, resized; give one of these")
    batch = min(batch, len(data.x_train))
    settings = dict(
        weight_decay=weight_decay,
        momentum=momentum,
        warmup=warmup,
        crop=crop,
        crop_min=crop_min,
        classes=data.num_classes,
    )
    info = teacher_info("supervised", data, settings, arch=arch, width=width, stem_padding=stem_padding, epochs=epochs,
                        batch=batch, lr=lr, seed=seed, precision=precision)  # fmt: skip
    mean, std = data.mean.to(device), data.std.to(device)
    per_epoch = len(data.x_train) // batch

    def make() -> dict[str, nn.Module]:
        net = blank_resnet(info)
        return {"net": net, "fc": nn.Linear(net.dim, data.num_classes)}

    def method_of(modules: dict[str, nn.Module]) -> Method:
        net, fc = modules["net"], modules["fc"]

        def loss_of(index: Tensor, epoch: int, i: int) -> tuple[Tensor, Callable]:
            x, y = upload(data.x_train[index], device) / 255, upload(data.y_train[index], device)
            x = augmented(x, rng("teacher views", seed, epoch, i), crop, crop_min, data.flip)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                scores = fc(net(normalise(x, mean, std)))
            return F.cross_entropy(scores.float(), y), dict

        params = [*net.parameters(), *fc.parameters()]
        optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        steps = epochs * per_epoch, warmup * per_epoch
        return Method(optimizer, loss_of, lambda epoch, i: cosine_lr(epoch * per_epoch + i, *steps, lr))

    flags = ("--label-batch", "--teacher-width", "--label-lr")
    return train(info, data, teachers, device, make, method_of, views=1, flags=flags, save_minutes=save_minutes)


def augmented(x: Tensor, generator: torch.Generator, crop: str, crop_min: float, flip: bool) -> Tensor:
    """Pixels (N, C, H, W) cropped and, with `flip`, half mirrored: "pad" or "resized", as train_supervised says."""
    if crop == "pad":
        return crop_flip(x, generator, flip)
    return resized_crop(x, generator, (crop_min, 1.0), flip)


# ---------------------------------------------------------------------------------------------------------------- probe


def probe_lr(epoch: int, epochs: int, lr: float) -> float:
    """A tenth from 60 % of the epochs on, a hundredth from 80 %."""
    return lr * 0.1 ** ((10 * epoch >= 6 * epochs) + (10 * epoch >= 8 * epochs))


def train_probe(
    teacher: Teacher,
    data: Data,
    device: torch.device,
    folder: Path,
    *,
    epochs: int = 100,
    batch: int = 256,
    lr: float = 30.0,
    momentum: float = 0.9,
    augment: bool = True,
    normalise: bool = False,
    seed: int = 0,
    precision: str = "fp32",
    save_minutes: float = 10.0,
) -> nn.Linear:
    """A linear classifier of the frozen teacher's features, trained on data.x_train; or loaded from `folder`.

    SGD without weight decay on the cross-entropy, from weights N(0, 0.01^2) and biases 0, lr cut tenfold at 60 % and
    80 % of the epochs (MoCo's probe). augment: crops of 0.08 to 1 of the area and flips; False: the features of the
    images as they are, computed once. normalise: train on the features divided by one number, the root mean square of
    their lengths over the training images, which the weights then carry: an lr serves all backbones.

    The file's name holds a hash of the settings, of the teacher's weights and of the data; a checkpoint lies beside it
    while it trains (see `optimise`). Prints the test accuracy, which selects nothing. Returns a frozen (d -> classes)
    layer on `device`. Raises UserError without labels, if the loss or a weight is not finite, and for a file that is
    no probe; RuntimeError if the training changed the teacher, which were a bug.
    """
    if not data.labelled:
        raise UserError(f"{data.name} has no labels; a linear probe needs them: make one subfolder a class")
    teacher.net.to(device).eval()
    before = digest_of(teacher.net.state_dict())
    batch = min(batch, len(data.x_train))
    info = dict(
        format=PROBE,
        data=data.name,
        content=data.content,
        flip=data.flip,
        classes=data.num_classes,
        teacher=teacher.name,
        weights_sha256=before,
        stem_padding=teacher.info.get("stem_padding"),
        mean=teacher.mean.tolist(),
        std=teacher.std.tolist(),
        epochs=epochs,
        batch=batch,
        lr=lr,
        momentum=momentum,
        augment=augment,
        normalise=normalise,
        seed=seed,
        precision=precision,
    )
    path = Path(folder) / f"probe-{hash_of(info)}.safetensors"
    if path.exists():
        fc, accuracy = load_probe(path, teacher.dim, data.num_classes)
        print(f"probe: {path.name} (cached), test accuracy {accuracy:.1%}")
        return fc.to(device)
    make_folder(path.parent)
    with seeded("probe", seed):
        fc = nn.Linear(teacher.dim, data.num_classes)
        nn.init.normal_(fc.weight, std=0.01)
        nn.init.zeros_(fc.bias)
    fc.to(device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    plain, length = None, 1.0
    with autocast():
        if not augment:
            plain = upload(teacher.targets(data.x_train, device), device)  # (N, d)
        if normalise:
            chunks = (teacher.features(x, device) for x in data.x_train.split(256)) if augment else plain.split(256)
            length = math.sqrt(sum(float(f.square().sum()) for f in chunks) / len(data.x_train)) or 1.0

    def loss_of(index: Tensor, epoch: int, i: int) -> tuple[Tensor, Callable]:
        if augment:
            x = upload(data.x_train[index], device) / 255
            x = augmented(x, rng("probe views", seed, epoch, i), "resized", 0.08, data.flip)
            with autocast():
                f = teacher.features(x, device)
        else:
            f = plain[upload(index, device)]
        return F.cross_entropy(fc(f / length), upload(data.y_train[index], device)), dict

    optimizer = torch.optim.SGD(fc.parameters(), lr=lr, momentum=momentum)
    seconds = optimise(
        path.with_suffix(".pt"),
        {"fc": fc},
        Method(optimizer, loss_of, lambda epoch, i: probe_lr(epoch, epochs, lr)),
        {},
        what="probe",
        name=path.stem,
        n=len(data.x_train),
        batch=batch,
        epochs=epochs,
        seed=seed,
        mend=f"lower --probe-lr; the last good checkpoint, if there is one, stays in {path.parent}",
        save_minutes=save_minutes,
    )
    if digest_of(teacher.net.state_dict()) != before:
        raise RuntimeError(f"the linear probe changed the weights or the statistics of {teacher.name}")
    with torch.no_grad():
        fc.weight.div_(length)
        with autocast():
            f_test = teacher.targets(data.x_test, device)
        accuracy = float((fc(f_test.to(device)).argmax(1).cpu() == data.y_test).float().mean())
    info |= dict(accuracy=round(accuracy, 4), length=length, seconds=round(seconds, 1))
    weights = {key: value.cpu().contiguous() for key, value in fc.state_dict().items()}
    write_atomic(path, lambda tmp: save_file(weights, tmp, metadata={"info": json.dumps(info)}))
    path.with_suffix(".pt").unlink(missing_ok=True)
    print(f"probe: {path.name} in {info['seconds']:.0f} s, test accuracy {accuracy:.1%}")
    stop_if_asked()
    return freeze(fc)


def load_probe(path: Path, dim: int, classes: int) -> tuple[nn.Linear, float]:
    """The layer in a file of train_probe, frozen, and its test accuracy. Raises UserError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {}).get("info", "{}"))
        if info.get("format") != PROBE:
            raise ValueError(f"format {info.get('format')}")
        fc = nn.Linear(dim, classes)
        fc.load_state_dict(load_file(path))
        return freeze(fc), float(info["accuracy"])
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable probe ({short(error)}); delete it to train it anew") from None
