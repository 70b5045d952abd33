"""The settings of every way to train a teacher, by preset and method, and the call that trains one.

All scripts take their teachers from here, so that one trained by one of them serves the others at the same flags.
"""

import dataclasses
from math import inf
from pathlib import Path

import torch

from common.barlow import train_barlow
from common.data import Data
from common.dino import train_dino
from common.moco import train_moco2, train_moco3
from common.pretrain import train_supervised
from common.run import UserError, check_limits, fill, load_args
from common.swav import train_swav
from common.teacher import Teacher

SOLO = dict(epochs=1000, batch=256, wd=1e-6, eta=0.02, crop_min=0.08, blur=False)  # solo-learn's on CIFAR
CIFAR = {
    "barlow": dict(epochs=1000, batch=256, lr=0.3, wd=1e-4, eta=0.02, projector=2048, crop_min=0.08),
    "moco2": dict(  # the authors' CIFAR demonstration
        epochs=200,
        batch=512,
        lr=0.06,
        wd=5e-4,
        queue=4096,
        temperature=0.1,
        key_momentum=0.99,
        dim=128,
        splits=8,
        mlp=False,
        crop_min=0.08,
        blur=False,
    ),
    "moco3": SOLO | dict(lr=0.3, projector=4096, dim=256, temperature=0.2, key_momentum=0.99),
    "swav": SOLO
    | dict(
        lr=0.6,
        projector=2048,
        dim=128,
        temperature=0.1,
        epsilon=0.05,
        prototypes=3000,
        queue=3840,
        small_crops=0,
        blur=True,
    ),
    "dino": SOLO
    | dict(lr=0.3, projector=2048, dim=256, temperature=0.04, key_momentum=0.9995, prototypes=4096, small_crops=0),
    "supervised": dict(epochs=200, batch=128, lr=0.1, wd=5e-4),  # SRe2L's
}


def changed(recipes: dict[str, dict], **changes) -> dict[str, dict]:
    """`recipes` with changes: {method: {setting: value}}."""
    return {method: recipe | changes.get(method, {}) for method, recipe in recipes.items()}


SIZE_64 = changed(
    CIFAR,
    swav=dict(crop_min=0.14, small_crops=6),  # the papers' multi-crop; Teachers' departure 4: not below
    dino=dict(crop_min=0.14, small_crops=6),
    supervised=dict(epochs=50, batch=256, lr=0.2, wd=1e-4),
)
SIZE_224 = changed(
    SIZE_64,  # the papers' views and temperatures; batches of 256 where theirs were of 4096
    moco2=dict(
        batch=256,
        lr=0.03,
        wd=1e-4,
        queue=65_536,
        temperature=0.2,
        key_momentum=0.999,
        mlp=True,
        crop_min=0.2,
        blur=True,
    ),
    moco3=dict(temperature=1.0, crop_min=0.2, blur=True),
    dino=dict(key_momentum=0.996, prototypes=65_536, small_crops=8, blur=True),
    supervised=dict(epochs=90, batch=256, lr=0.1, wd=1e-4),
)
FEW_224 = changed(SIZE_224, moco2=dict(queue=4096))
SOFT = dict(epochs=100, crop_min=0.4)
MNIST = changed(CIFAR, barlow=SOFT, moco2=SOFT, moco3=SOFT, swav=SOFT, dino=SOFT, supervised=dict(epochs=100))
TINY = dict(epochs=40, batch=128, projector=256, crop_min=0.4, blur=False)
DIGITS = {
    "barlow": dict(epochs=40, batch=128, lr=0.3, wd=1e-4, eta=0.002, projector=256, crop_min=0.4),
    "moco2": CIFAR["moco2"] | dict(epochs=40, batch=128, lr=0.2, queue=256, key_momentum=0.9, splits=2, crop_min=0.4),
    "moco3": CIFAR["moco3"] | TINY | dict(dim=64, key_momentum=0.9),
    "swav": CIFAR["swav"] | TINY | dict(dim=32, epsilon=0.02, prototypes=256, queue=256),  # Teachers' departure 6
    "dino": CIFAR["dino"] | TINY | dict(batch=64, eta=0.005, dim=16, key_momentum=0.97, prototypes=256),
    "supervised": dict(epochs=20, batch=128, lr=0.1, wd=5e-4),
}
RECIPES = {  # by the scripts' presets
    "digits": DIGITS,
    "mnist": MNIST,
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "tiny_imagenet": SIZE_64,
    "imagenet": SIZE_224,
    "imagenette": FEW_224,
    "8px": DIGITS,
    "16px": CIFAR,
    "48px": SIZE_64,
    "96px": FEW_224,
}
SETTINGS = sorted({setting for recipe in CIFAR.values() for setting in recipe})
LIMITS = {
    (1, inf): "teacher_width teacher_epochs teacher_dim teacher_projector teacher_prototypes teacher_splits",
    (2, inf): "teacher_batch",
    (0, inf): "teacher_queue teacher_small_crops",
    (0, 1e6): "teacher_lr teacher_wd teacher_eta",
    (0, 1): "teacher_key_momentum",
    (1e-4, 1): "teacher_crop_min",
    (1e-3, inf): "teacher_temperature teacher_epsilon",
}


def has(method: str, setting: str) -> bool:
    """Whether a method has the setting of the flag --teacher-SETTING."""
    return setting in CIFAR[method]


def without_foreign(args):
    """`args` with None in the place of the flags teacher_* that --teacher-method does not have."""
    foreign = [setting for setting in SETTINGS if not has(args.teacher_method, setting)]
    return dataclasses.replace(args, **{f"teacher_{setting}": None for setting in foreign})


def fill_teacher(args, preset: str, labelled: bool):
    """`args` with the flags teacher_* that --teacher-method has, where they are None, filled from RECIPES[preset].

    Nothing is filled where --teacher names a network. Raises UserError for a flag that the method does not have, one
    that such a network does not need, or one out of its limits; for a supervised teacher of data without labels.
    """
    if args.resume and args.teacher_method != (begun := load_args(type(args), args.resume).teacher_method):
        raise UserError(
            f"--resume: --teacher-method was {begun}, now {args.teacher_method}; drop the flag or start a new run"
        )
    if args.teacher not in (None, "train", "file"):
        for setting in SETTINGS:
            if getattr(args, f"teacher_{setting}") is not None:
                flag = f"--teacher-{setting.replace('_', '-')}"
                raise UserError(f"{flag}: --teacher {args.teacher} is trained already; drop one of them")
        return args
    method = args.teacher_method
    for setting in SETTINGS:
        if not has(method, setting) and getattr(args, f"teacher_{setting}") is not None:
            owners = ", ".join(name for name in CIFAR if has(name, setting))
            flag = f"--teacher-{setting.replace('_', '-')}"
            raise UserError(f"{flag}: --teacher-method {method} has no such setting ({owners} have); drop the flag")
    if method == "supervised" and not labelled:
        raise UserError("--teacher-method supervised: the data has no labels; make one subfolder a class")
    check_limits(args, LIMITS)
    if method == "moco2" and args.teacher_queue == 0:
        raise UserError("--teacher-queue 0: moco2 tells a key from those in the queue; must be at least 1")
    return fill(args, {f"teacher_{setting}": value for setting, value in RECIPES[preset][method].items()})


def train_teacher(
    method: str,
    data: Data,
    teachers: Path,
    device: torch.device,
    *,
    arch: str,
    width: int,
    stem_padding: int,
    epochs: int,
    batch: int,
    lr: float,
    weight_decay: float,
    eta: float | None,
    projector: int | None,
    dim: int | None,
    temperature: float | None,
    key_momentum: float | None,
    queue: int | None,
    epsilon: float | None,
    prototypes: int | None,
    splits: int | None,
    mlp: bool | None,
    crop_min: float | None,
    small_crops: int | None,
    blur: bool | None,
    seed: int,
    precision: str,
    save_minutes: float,
) -> Teacher:
    """The teacher of `method`, from `teachers` if it was trained before: see train_barlow, train_moco2, train_moco3,
    train_swav, train_dino, train_supervised. A setting is None where the method does not have it."""
    own = dict(arch=arch, width=width, stem_padding=stem_padding, epochs=epochs, batch=batch, lr=lr,
               weight_decay=weight_decay, seed=seed, precision=precision, save_minutes=save_minutes)  # fmt: skip
    if method == "supervised":
        crop = "pad" if data.size < 48 else "resized"
        return train_supervised(data, teachers, device, crop=crop, flag="teacher", **own)
    if method == "moco2":
        return train_moco2(data, teachers, device, queue=queue, temperature=temperature, key_momentum=key_momentum,
                           dim=dim, splits=splits, mlp=mlp, crop_min=crop_min, blur=blur, **own)  # fmt: skip
    own |= dict(eta=eta, projector_width=projector, crop_min=crop_min)  # of those that LARS optimises
    if method == "barlow":
        return train_barlow(data, teachers, device, **own)
    own |= dict(dim=dim, temperature=temperature, blur=blur)
    if method == "moco3":
        return train_moco3(data, teachers, device, key_momentum=key_momentum, **own)
    own |= dict(prototypes=prototypes, small_crops=small_crops)
    if method == "swav":
        return train_swav(data, teachers, device, epsilon=epsilon, queue=queue, **own)
    return train_dino(data, teachers, device, key_momentum=key_momentum, **own)
