"""What all ways to train a teacher share: the loop, its checkpoints, the cache. Supervised training; the linear probe.

A method (common/barlow.py, moco.py, swav.py, dino.py) gives its modules and a `Method`; `train` does what all of them
share, `optimise` the loop.
"""

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

from common.augment import crop_flip, resized_crop, upload
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

CHECKPOINT = "teacher checkpoint 2"
PROBE = "probe 1"
COLLAPSED = 0.08  # an embedding_std below it twice: collapses were seen at 0.015 to 0.07, others once at 0.06


@dataclass
class Method:
    """How a method trains its modules; tensors and numbers in, tensors and numbers out.

    loss_of(index, epoch, i): the loss of the images `index` (B,), on the CPU, the i-th batch of an epoch; and a
    function that gives numbers by name for the line about a training that diverged (`dict`: none), among them
    "embedding std" (see embedding_std) where a network can collapse. rate_of(epoch, i): the learning rate.
    before_update(rate): called between the gradient and the optimiser's step.
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
    views: float,
    flags: tuple[str, str, str],
    save_minutes: float,
    scores: int = 0,
) -> Teacher:
    """The teacher that `info` describes: from its folder in `teachers` if it was trained before, else trained.

    make(): the new modules by name: "net", the backbone; "fc", a classifier that is kept with it; others serve the
    training alone. method_of(modules): how they are trained, once they are on the device. views: of each image that a
    step takes a gradient of, small ones as fractions; flags: what sets the memory of the views, that of the weights,
    and the learning rate. scores: numbers in the prototypes' scores of a step, where they are many.

    The folder's name holds data, method, architecture, epochs, seed and a hash of `info`. Training goes on from any
    step as if it had not stopped. Prints as it goes, and keeps in the teacher's info, a k-NN accuracy (labelled data),
    which selects nothing, and the std of the embeddings; warns once if the training collapses.
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
        maps = int(views * info["batch"] * bytes_per_image(blank_resnet(info), x))
    weights = 16 * sum(p.numel() for part in blank.values() for p in part.parameters())  # gradients, momentum, a spare
    maps = int(1.2 * maps) // (2 if info["precision"] == "bf16" else 1)  # and the gradients of the largest ones
    need = {flags[0]: maps, flags[1]: weights} | ({"--teacher-prototypes": 4 * 4 * scores} if scores else {})
    check_memory({"teacher's training": need}, device)  # of scores: themselves, their logarithms, gradients, a spare
    make_folder(folder)

    with seeded("teacher", info["seed"]):
        modules = make()
    for module in modules.values():
        module.to(device, memory_format=torch.channels_last)  # faster on CPU and GPU alike
    net, epochs = modules["net"], info["epochs"]
    measured = {"loss": {}, "knn": {}, "embedding_std": {}, "low": 0}  # by epoch; epochs in a row that look collapsed

    def at_epoch(epoch: int, value: float, terms: dict[str, float]) -> None:
        std = terms.get("embedding std", 1.0)
        measured["low"] = measured["low"] + 1 if std < COLLAPSED else 0
        if measured["low"] == 2 and "collapsed" not in measured:
            measured["collapsed"] = epoch
            tqdm.write(
                f"teacher: warning: epoch {epoch}: the embeddings of all images are nearly the same (std {std:.3f}), "
                f"the training collapses: change {flags[2]} or take another --teacher-method"
            )
        if epoch % max(1, epochs // 5) and epoch not in (1, epochs):
            return
        measured["loss"][str(epoch)] = round(value, 4)
        words = f"teacher: epoch {epoch}/{epochs} loss {value:.3f}"
        if data.labelled:
            measured["knn"][str(epoch)] = round(quick_knn(net, data, device), 4)
            words += f" k-NN {measured['knn'][str(epoch)]:.1%}"
        if "embedding std" in terms:
            measured["embedding_std"][str(epoch)] = round(std, 4)
            words += f" embedding std {std:.3f}"
        tqdm.write(words)

    seconds = optimise(
        folder / "checkpoint.pt",
        modules,
        method_of(modules),
        measured,
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
    del measured["low"]
    info = info | measured | {"seconds": round(seconds, 1)}
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
    at_epoch: Callable[[int, float, dict[str, float]], None] = lambda epoch, value, terms: None,
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
    `measured` (of numbers, changed in place), which at_epoch(epochs done, loss, terms) fills. what: "teacher" or
    "probe", the first word of what is printed; name: for the bar; mend: the end of the line about what is not finite.

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
        measured |= state["measured"]
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
                at_epoch(epoch + 1, value, terms_of())
            if saving and done < steps:  # what is finished is written as such
                seconds = seconds_before + time.monotonic() - began
                state |= dict(format=CHECKPOINT, step=done, seconds=seconds, measured=measured)
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
        return {key: state[key] for key in ("step", "seconds", "measured")}
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


def warm_up_epochs(epochs: int) -> int:
    """Of the methods that LARS optimises: 10 (published), about a tenth of a short training."""
    return min(10, epochs // 10 + 1)


@torch.no_grad()
def lars_(params: list[Tensor], lr: float, eta: float, weight_decay: float) -> None:
    """Scale the gradients in place by LARS's layer-wise trust ratio, clipped at lr; the optimiser is then plain SGD.
    Teachers' departure 2: as solo-learn does.

    You, Gitman and Ginsburg 2017, arXiv:1708.03888. Biases and norm parameters (one dimension) are left alone, as in
    the Barlow Twins recipe, and so is what has no gradient.
    """
    params = [p for p in params if p.ndim > 1 and p.grad is not None]
    p_norms = torch.stack(torch._foreach_norm(params))
    g_norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
    ratio = eta * p_norms / (g_norms + weight_decay * p_norms + 1e-8)
    ratio = torch.where((p_norms > 0) & (g_norms > 0), (ratio / lr).clamp(max=1), 1.0)
    for p, scale in zip(params, ratio, strict=True):
        p.grad.add_(p, alpha=weight_decay).mul_(scale)


def momentum_at(step: int, steps: int, first: float) -> float:
    """Of an encoder that follows another: from `first` to 1 by a cosine (Grill et al. 2020, arXiv:2006.07733)."""
    return 1 - (1 - first) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def embedding_std(z: Tensor) -> float:
    """Of embeddings (B, d) scaled to unit length: the root of their variances' sum over d. 0: all point the same way,
    1: everywhere alike (as Chen and He 2021, arXiv:2011.10566, but for their factor 1/sqrt(d))."""
    mean = F.normalize(z.detach().float(), dim=1).mean(0)
    return math.sqrt(max(1 - float(mean.square().sum()), 0.0))  # NaN stays NaN


@torch.no_grad()
def follow_(slow: list[Tensor], fast: list[Tensor], momentum: float) -> None:
    """slow = momentum * slow + (1 - momentum) * fast, in place."""
    torch._foreach_mul_(slow, momentum)
    torch._foreach_add_(slow, fast, alpha=1 - momentum)


@torch.no_grad()
def knn_accuracy(
    f_train: Tensor, y_train: Tensor, f_test: Tensor, y_test: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Accuracy of a k-nearest-neighbour vote by cosine, weighted by exp(similarity / temperature) (Wu et al. 2018).

    f_train: (N, d), y_train: (N,), f_test: (M, d), y_test: (M,), all on one device.
    """
    f_train, f_test = F.normalize(f_train, dim=1), F.normalize(f_test, dim=1)
    k, classes, right = min(k, len(f_train)), int(y_train.max()) + 1, 0
    for f, y in zip(f_test.split(512), y_test.split(512), strict=True):
        similarity, index = (f @ f_train.T).topk(k)
        votes = f.new_zeros(len(f), classes).scatter_add_(1, y_train[index], (similarity / temperature).exp())
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
    flag: str = "label",
) -> Teacher:
    """Train a ResNet and a linear classifier, the teacher's `fc`, by cross-entropy on the labelled data; or load it.

    The defaults are SRe2L's for CIFAR (spec. 1.2). warmup: epochs of a linear rise to lr, before a cosine per step;
    crop: "pad", shifts over zeros and flips, or "resized", boxes of at least crop_min of the area and flips.
    info["accuracy"]: on the test images at the end, which selects nothing. save_minutes, errors and what is printed:
    see `train`. flag: how the flags begin that errors name. Raises UserError without labels.
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

    flags = (f"--{flag}-batch", f"--{flag}-width", f"--{flag}-lr")
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
) -> tuple[nn.Linear, float]:
    """A linear classifier of the frozen teacher's features, trained on data.x_train, and its accuracy on the test
    images, which selects nothing; or both loaded from `folder`.

    SGD without weight decay on the cross-entropy, from weights N(0, 0.01^2) and biases 0, lr cut tenfold at 60 % and
    80 % of the epochs (MoCo's probe). augment: crops of 0.08 to 1 of the area and flips; False: the features of the
    images as they are, computed once. normalise: train on the features divided by one number, the root mean square of
    their lengths over the training images, which the weights then carry: an lr serves all backbones.

    The file's name holds a hash of the settings, of the teacher's weights and of the data; a checkpoint lies beside it
    while it trains (see `optimise`). The (d -> classes) layer is frozen and on `device`. Raises UserError without
    labels, if the loss or a weight is not finite, and for a file that is no probe; RuntimeError if the training changed
    the teacher, which were a bug.
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
        return fc.to(device), accuracy
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
    return freeze(fc), info["accuracy"]


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
