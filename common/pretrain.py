"""Self-supervised teachers: train once and cache, or load (this project's, solo-learn's, torchvision's, timm's).

A teacher is a frozen network g: images -> R^d (after the global average pool, no projector) with the constants its
input is normalised by. Barlow Twins: Zbontar et al. 2021, arXiv:2103.03230, with solo-learn's CIFAR settings.
"""

import hashlib
import importlib
import json
import math
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from common.augment import gather, num_variants, two_views, upload
from common.data import Data, normalise
from common.models import RESNETS, ResNet
from common.run import (
    Interval,
    UserError,
    all_finite,
    bytes_per_image,
    check_memory,
    finish_steps,
    first_line,
    load_checkpoint,
    out_of_memory,
    rng,
    seeded,
    stop_asked,
    stop_if_asked,
    write_atomic,
)
from kernels.barlow import barlow_loss, barlow_terms

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what torchvision's and most published networks expect
FORMAT = "teacher 1"
CHECKPOINT = "teacher checkpoint 1"


@dataclass
class Teacher:
    """A frozen network in eval mode. mean, std: (C,) of pixels in [0, 1]; info: what made it, kept with artefacts."""

    net: nn.Module
    dim: int
    mean: Tensor
    std: Tensor
    name: str
    info: dict
    folder: Path | None  # where targets are cached; None for networks of other makers

    @torch.no_grad()
    def features(self, x: Tensor, device: torch.device) -> Tensor:
        """g(x) of uint8 or float pixels (N, C, H, W), all at once: (N, d) float32 on `device`."""
        x, mean, std = (upload(part, device) for part in (x, self.mean, self.std))
        return self.net(normalise(x, mean, std)).flatten(1).float()

    def targets(self, x: Tensor, device: torch.device, chunk: int = 256) -> Tensor:
        """g(x) of uint8 or float pixels (N, C, H, W) in chunks: (N, d) float32 on the CPU."""
        targets = torch.empty(len(x), self.dim)
        parts = list(zip(x.split(chunk), targets.split(chunk), strict=True))
        for part, place in tqdm(parts, desc="teacher targets", leave=False, disable=len(x) < 20 * chunk):
            place.copy_(self.features(part, device))
        return targets

    def cached_targets(self, x: Tensor, content: str, split: str, device: torch.device) -> Tensor:
        """`targets` of a whole split, read from the teacher's folder when they are there; content: the data's hash.

        A folder that may not be written to (a group's shared teachers) costs their computation in every run; a full
        disk raises UserError.
        """
        if self.folder is None:
            return self.targets(x, device)
        path = self.folder / f"targets-{split}-{content[:12]}-{self.info['weights_sha256'][:8]}.safetensors"
        if path.exists():
            try:
                targets = load_file(path)["targets"]
                if targets.shape == (len(x), self.dim):
                    return targets
            except (SafetensorError, KeyError, OSError) as error:
                print(f"teacher: {path} cannot be read ({short(error)}); computing it again")
        targets = self.targets(x, device)
        if os.access(self.folder, os.W_OK):
            write_atomic(path, lambda tmp: save_file({"targets": targets}, tmp))
        else:
            print(f"teacher: {self.folder} is read-only; the {split} targets are computed anew by every run")
        return targets


class AugmentedTargets:
    """The teacher's features of cropped and mirrored training images, kept per pair (image, variant) once drawn.

    All pairs are drawn equally often, so none is worth more than another: the first ones stay, until the cache is
    full. What is in it never changes a value, so that a resumed run, whose cache starts empty, equals one that was
    not stopped: a feature is rounded to the cache's precision when it is computed, too, and computed in chunks of one
    size, as on a CPU the last bits depend on the batch's size (not on a place in it nor on its other images: tested).

    hits, misses: pairs of all calls so far that were there (or came twice in a call), and that had to be computed.
    """

    def __init__(
        self,
        teacher: Teacher,
        pixels: Tensor,
        flip: bool,
        device: torch.device,
        *,
        gigabytes: float,
        precision: str = "fp32",
        cache_device: torch.device | None = None,
    ):
        """pixels: uint8 (N, C, H, W), all training images; device: the teacher's. gigabytes: 10^9 bytes for the table
        of pairs (on the CPU) and the features together, 0 for no cache; precision: "fp32" or "bf16" of the kept
        features; cache_device: where they are, None for `device`. The CPU lends the memory only as it fills."""
        self.teacher, self.pixels, self.flip, self.device = teacher, pixels, flip, device
        self.chunk = 64 if device.type == "cpu" else 256  # a GPU wants more; its bits are not promised
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.variants = num_variants(pixels.shape[-1], flip)
        self.pairs = len(pixels) * self.variants
        self.hits = self.misses = self.used = 0
        self.asked = (0, 0)  # hits and misses when hit_rate was last asked
        self.gigabytes, self.cache_device = gigabytes, device if cache_device is None else cache_device
        room = int(gigabytes * 1e9) - self.pairs * torch.int32.itemsize
        self.capacity = max(0, min(self.pairs, room // (teacher.dim * self.dtype.itemsize), 2**31 - 1))  # features
        self.table = torch.full((self.pairs if self.capacity else 0,), -1, dtype=torch.int32)  # row in the store
        self.store = torch.empty(self.capacity, teacher.dim, dtype=self.dtype, device=self.cache_device)

    def describe(self) -> str:
        """One line for the start of a log."""
        pairs = f"{self.pairs:,} pairs (image, variant)"
        if self.capacity:
            kept, size = self.capacity / self.pairs, (self.table.nbytes + self.store.nbytes) / 1e9
            return f"targets: cache for {kept:.0%} of {pairs} in {size:.1f} GB ({self.cache_device.type}, {self.dtype})"
        why = f" (its table alone does not fit into {self.gigabytes:g} GB)" if self.gigabytes else ""
        return f"targets: no cache{why}, the teacher computes all of {pairs}"

    @staticmethod
    def need(images: int, size: int, flip: bool, dim: int, gigabytes: float, precision: str) -> int:
        """Bytes that it will take at most."""
        row = dim * (4 if precision == "fp32" else 2) + torch.int32.itemsize
        return min(int(gigabytes * 1e9), images * num_variants(size, flip) * row)

    def __call__(self, index: Tensor, variant: Tensor) -> Tensor:
        """Features of pixels[index] as their variants show them. index, variant: (B,) int64 on the CPU (from its
        generators), so that no GPU is waited for; returns (B, d) float32 on the run's device."""
        pairs, place = (index * self.variants + variant).unique(return_inverse=True)
        rows = self.table[pairs] if self.capacity else torch.full_like(pairs, -1)
        there, missed = (rows >= 0).nonzero().flatten(), (rows < 0).nonzero().flatten()
        self.misses += len(missed)
        self.hits += len(index) - len(missed)
        new = self.compute(pairs[missed])
        known = self.store[upload(rows[there].long(), self.cache_device)]
        added = min(len(missed), self.capacity - self.used)
        self.store[self.used : self.used + added] = new[:added].to(self.cache_device)
        self.table[pairs[missed[:added]]] = torch.arange(self.used, self.used + added, dtype=torch.int32)
        self.used += added
        rank = torch.cat([there, missed]).argsort()  # of each pair in `values`
        values = torch.cat([upload(known, self.device), new])
        return values[upload(rank[place], self.device)].float()

    def hit_rate(self) -> float:
        """Share of hits among the pairs of the calls since it was last asked; 0 if there were none."""
        hits, misses = self.hits - self.asked[0], self.misses - self.asked[1]
        self.asked = (self.hits, self.misses)
        return hits / max(1, hits + misses)

    def compute(self, pairs: Tensor) -> Tensor:
        """(M,) -> (M, d) in the cache's precision; the last chunk is filled up with copies of its last pair."""
        full = torch.cat([pairs, pairs[-1:].expand(-len(pairs) % self.chunk)])
        features = torch.empty(len(full), self.teacher.dim, dtype=self.dtype, device=self.device)
        for i in range(0, len(full), self.chunk):
            part = full[i : i + self.chunk]
            x = gather(self.pixels, part // self.variants, part % self.variants, self.flip)
            features[i : i + self.chunk] = self.teacher.features(x, self.device)
        return features[: len(pairs)]


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
    crop_min: smallest area of a view. The folder's name holds data, method, architecture, epochs, seed and a hash of
    every setting and of the data's content. A checkpoint is written every save_minutes (0: never for the time alone),
    at a hundred epochs and when a signal asks to stop; training goes on from any step as if it had not stopped. Prints
    a k-NN accuracy as it goes (labelled data), which selects nothing.
    Raises UserError if the loss or a weight is not finite, which is never saved, and Stopped after a signal.
    """
    if len(data.x_train) < 2:
        raise UserError("a teacher cannot be trained on one image; add images, or name a teacher with --teacher")
    batch = min(batch, len(data.x_train))
    stem = "cifar" if data.size <= 96 else "imagenet"
    info = dict(
        format=FORMAT,
        method="barlow",
        data=data.name,
        content=data.content,
        mean=data.mean.tolist(),
        std=data.std.tolist(),
        channels=data.channels,
        size=data.size,
        arch=arch,
        width=width,
        stem=stem,
        stem_padding=stem_padding,
        epochs=epochs,
        batch=batch,
        lr=lr,
        eta=eta,
        weight_decay=weight_decay,
        projector_width=projector_width,
        off_diagonal=off_diagonal,
        crop_min=crop_min,
        flip=data.flip,
        seed=seed,
        precision=precision,
    )
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(teachers) / f"{data.name}-barlow-{arch}x{width}-{epochs}ep-s{seed}-{digest}"
    if (folder / "teacher.safetensors").exists():
        print(f"teacher: {folder.name} (cached)")
        return load_own(folder / "teacher.safetensors")
    with torch.device("meta"):  # shapes alone
        blank = ResNet(arch, data.channels, width, stem, stem_padding)
        views = 2 * batch * bytes_per_image(blank, torch.zeros(2, data.channels, data.size, data.size))
        both = nn.Sequential(blank, projector(blank.dim, projector_width))
    weights = 16 * sum(p.numel() for p in both.parameters())  # and gradients, momentum, one temporary
    views = int(1.2 * views) // (2 if precision == "bf16" else 1)  # and the gradients of the largest maps
    check_memory({"teacher's training": {"--teacher-batch": views, "--teacher-projector": weights}}, device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the teacher's folder ({error.strerror}); check --out-dir") from None

    with seeded("teacher", seed):
        net = ResNet(arch, data.channels, width, stem, stem_padding)
        head = projector(net.dim, projector_width)
    net, head = net.to(device, memory_format=torch.channels_last), head.to(device)  # faster on CPU and GPU alike
    params = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9)
    per_epoch = len(data.x_train) // batch
    steps, warmup, peak = epochs * per_epoch, min(10, epochs // 10 + 1) * per_epoch, lr * batch / 256
    mean, std = data.mean.to(device), data.std.to(device)
    start, seconds_before, began = 0, 0.0, time.monotonic()
    info["knn"] = {}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = resume(checkpoint, net=net, head=head, optimizer=optimizer)
        start, seconds_before, info["knn"] = state["step"], state["seconds"], state["knn"]
        print(f"teacher: {folder.name} goes on at step {start} of {steps}")
    bar = tqdm(total=steps, initial=start, desc=f"teacher {folder.name}", mininterval=1, dynamic_ncols=True)
    interval = Interval(save_minutes)
    with finish_steps(), bar:
        for step in range(start, steps):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == start:
                net.train(), head.train()
                order = torch.randperm(len(data.x_train), generator=rng("teacher order", seed, epoch))
            x = data.x_train[order[i * batch : (i + 1) * batch]].to(device) / 255
            x_1, x_2 = two_views(x, rng("teacher views", seed, epoch, i), (crop_min, 1.0), data.flip)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                z_1, z_2 = head(net(normalise(x_1, mean, std))), head(net(normalise(x_2, mean, std)))
            loss = 0.1 * barlow_loss(z_1.float(), z_2.float(), off_diagonal)  # 0.1: solo-learn's scale
            optimizer.zero_grad()
            loss.backward()
            rate = optimizer.param_groups[0]["lr"] = cosine_lr(step, steps, warmup, peak)
            lars_(params, rate, eta, weight_decay)
            optimizer.step()
            bar.update()

            epoch_ends, done = i + 1 == per_epoch, step + 1
            saving = (epoch_ends and (epoch + 1) % max(1, epochs // 100) == 0) or interval.due() or stop_asked()
            if not (epoch_ends or saving):
                continue
            state = dict(net=net.state_dict(), head=head.state_dict(), optimizer=optimizer.state_dict())
            value = float(loss.detach())
            if not math.isfinite(value) or not all_finite(state):
                on, off = barlow_terms(z_1.detach().float(), z_2.detach().float())
                raise UserError(
                    f"teacher: epoch {epoch + 1}, step {done}: loss is {value:.4g} or a weight is not finite (diagonal "
                    f"{on:.4g}, off-diagonal {off:.4g}, learning rate {rate:.3g}); lower --teacher-lr; the last good "
                    f"checkpoint stays in {folder}"
                )
            bar.set_postfix_str(f"loss {value:.3f}")
            if epoch_ends and data.labelled and (epoch + 1) % max(1, epochs // 5) == 0:
                info["knn"][str(epoch + 1)] = round(quick_knn(net, data, device), 4)
                tqdm.write(
                    f"teacher: epoch {epoch + 1}/{epochs} loss {value:.3f} k-NN {info['knn'][str(epoch + 1)]:.1%}"
                )
            if saving and done < steps:  # a finished teacher is written as such
                seconds = seconds_before + time.monotonic() - began
                state |= dict(format=CHECKPOINT, step=done, seconds=seconds, knn=info["knn"])
                write_atomic(checkpoint, lambda tmp, state=state: torch.save(state, tmp))
                interval.start()
                stop_if_asked()
    info["seconds"] = round(seconds_before + time.monotonic() - began, 1)
    weights = {key: value.cpu().contiguous() for key, value in net.state_dict().items()}
    meta = {"info": json.dumps(info)}
    write_atomic(folder / "teacher.safetensors", lambda tmp: save_file(weights, tmp, metadata=meta))
    checkpoint.unlink(missing_ok=True)
    print(f"teacher: {folder} in {info['seconds']:.0f} s")
    stop_if_asked()
    return load_own(folder / "teacher.safetensors")


def resume(path: Path, **parts) -> dict:
    """Load a teacher's checkpoint into its parts and return it. Raises UserError if it is damaged or not this one's."""
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
        line = f"{path}: not a checkpoint of this teacher ({reason}); delete it to train the teacher anew"
        raise UserError(line) from None


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


# -------------------------------------------------------------------------------------------------------------- loading


def freeze(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def short(error: Exception, most: int = 200) -> str:
    """An exception's words in one line of at most `most` characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else words[: most - 4] + " ..."


def fit(net: ResNet, weights: dict[str, Tensor], path: Path, what: str) -> None:
    """Load the weights strictly. Raises UserError naming the first keys that are missing, in excess or misshapen."""
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = short(error).removeprefix("Error(s) in loading state_dict for ResNet: ")
        raise UserError(f"{path}: does not fit a {what} ({reason})") from None


def load_own(path: Path) -> Teacher:
    """A teacher written by train_teacher. Raises UserError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
        info = json.loads(meta.get("info", "{}"))
        weights = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable teacher ({first_line(error)})") from None
    kind = str(info.get("format", meta.get("format")) if isinstance(info, dict) else None)
    if kind.startswith("distilled"):
        raise UserError(f"{path}: a distilled set ({kind}), not a teacher; name a teacher.safetensors")
    if kind != FORMAT:
        raise UserError(f"{path}: not a teacher of this project (format {kind}); train one or name another")
    needed = ("arch", "channels", "width", "stem", "stem_padding", "mean", "std")
    if lacking := [key for key in needed if key not in info]:
        raise UserError(f"{path}: does not say its {', '.join(lacking)}; train the teacher anew")
    if info["arch"] not in RESNETS:
        raise UserError(f"{path}: of architecture {info['arch']}; {', '.join(RESNETS)} are known")
    net = ResNet(info["arch"], info["channels"], info["width"], info["stem"], info["stem_padding"])
    fit(net, weights, path, f"{info['arch']} of width {info['width']}")
    info["weights_sha256"] = hashlib.sha256(
        b"".join(weights[key].numpy().tobytes() for key in sorted(weights))
    ).hexdigest()
    mean, std = torch.tensor(info["mean"]), torch.tensor(info["std"])
    return Teacher(freeze(net), net.dim, mean, std, path.resolve().parent.name, info, path.parent)


def load_teacher(spec: str, data: Data, device: torch.device, stem_padding: int = 2) -> Teacher:
    """The teacher that --teacher names, on `device`.

    spec: a file or folder of this project; a ResNet file with torchvision's or solo-learn's keys; "torchvision:NAME"
    or "timm:NAME" for those libraries' pretrained networks. stem_padding: of a file whose stem is 3x3 (it cannot be
    read from the weights; solo-learn's is 2). Raises UserError for a file that needs unpickling, another architecture,
    missing keys, other channels than the data's.
    """
    if spec.startswith(("torchvision:", "timm:")):
        teacher = load_library(*spec.split(":", 1), data.size)
    else:
        path = Path(spec)
        path = path / "teacher.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"--teacher {spec}: no such file; a path, torchvision:NAME or timm:NAME")
        teacher = load_own(path) if path.suffix == ".safetensors" else load_resnet(path, data, stem_padding)
    if len(teacher.mean) != data.channels:
        raise UserError(f"--teacher {spec}: takes {len(teacher.mean)} channels, the data has {data.channels}")
    teacher.net.to(device)
    print(f"teacher: {teacher.name}, {teacher.dim} features")
    return teacher


def load_resnet(path: Path, data: Data, stem_padding: int) -> Teacher:
    """A ResNet-10/18/50 file in torchvision's or solo-learn's keys, recognised by its layout, loaded strictly."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "GLOBAL" in str(error) or "allowlisted" in str(error):  # torch's words for a class that it does not know
            convert = (
                f'import torch; s = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False); '
                f'torch.save(s.get("state_dict", s.get("model", s)), {json.dumps(f"{path}.clean.pt")})'
            )
            raise UserError(
                f"{path}: loading it would run pickled code; if you trust it, convert it once with "
                f"python -c {shlex.quote(convert)} and name the .clean.pt"
            ) from None
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}); fetch it again") from None
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(key, str)}
    stems = [key for key in state if key.endswith("conv1.weight") and "layer" not in key and state[key].ndim == 4]
    if not stems:
        raise UserError(f"{path}: no ResNet in it (no conv1.weight outside the layers)")
    prefix = min(stems, key=len).removesuffix("conv1.weight")  # "", "backbone.", "encoder.", "module.encoder_q." ...
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    heads = ("fc.", "projector.", "predictor.", "classifier.")
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    width, channels, kernel = state["conv1.weight"].shape[:3]
    if channels != data.channels:
        raise UserError(f"{path}: takes {channels} channels, the data has {data.channels}")
    blocks = tuple(len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    arch = {(1, 1, 1, 1): "resnet10", (2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet50"}.get(blocks)
    if arch is None or (arch == "resnet50") != ("layer1.0.conv3.weight" in state):
        raise UserError(f"{path}: a ResNet with {blocks} blocks; resnet10, resnet18 and resnet50 are known")
    stem = "cifar" if kernel == 3 else "imagenet"
    net = ResNet(arch, channels, width, stem, stem_padding)
    fit(net, state, path, f"{arch} of width {width}")
    mean, std = (data.mean, data.std) if stem == "cifar" else map(torch.tensor, IMAGENET)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    info = dict(method="file", file=path.name, sha256=digest, arch=arch, stem=stem, stem_padding=stem_padding)
    info |= dict(mean=mean.tolist(), std=std.tolist())
    return Teacher(freeze(net), net.dim, mean, std, f"{path.stem} ({arch}, {stem} stem)", info, None)


def load_library(library: str, name: str, size: int) -> Teacher:
    """torchvision's or timm's pretrained network without its classifier, with the constants it was trained with.

    Raises UserError if it cannot be had or does not take images of `size` px.
    """
    try:
        module = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
        if library == "torchvision":
            net = module.get_model(name, weights="DEFAULT")
            preset = module.get_model_weights(name).DEFAULT.transforms()
            mean, std = preset.mean, preset.std
            linear = [key for key, child in net.named_modules() if isinstance(child, nn.Linear)]
            if not linear:
                raise UserError(f"--teacher {library}:{name}: has no linear classifier to take off; name another")
            net.set_submodule(linear[-1], nn.Identity())
        else:
            net = module.create_model(name, pretrained=True, num_classes=0)
            mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
        with torch.no_grad():
            dim = freeze(net)(torch.zeros(2, len(mean), size, size)).flatten(1).shape[1]
    except ImportError:
        raise UserError(f"--teacher {library}:{name}: {library} is not installed; pip install {library}") from None
    except UserError:
        raise
    except Exception as error:  # unknown names, no network, a fixed image size: each library raises its own
        reason = short(error)
        raise UserError(f"--teacher {library}:{name}: {reason}; check the name, the network and --size") from None
    info = dict(method=library, model=name, mean=list(mean), std=list(std))
    return Teacher(net, dim, torch.tensor(mean), torch.tensor(std), f"{library}:{name}", info, None)
