"""A frozen network: its features, its cached targets, the files it is loaded from.

A teacher is a network g: images -> R^d (after the global average pool, no projector) with the constants its input is
normalised by, and its linear classifier where it has one. It is this project's (common/pretrain.py), solo-learn's,
torchvision's or timm's.
"""

import hashlib
import importlib
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from common.augment import gather, num_variants, upload
from common.data import Data, normalise
from common.models import RESNETS, ResNet
from common.run import UserError, first_line, write_atomic

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what torchvision's and most published networks expect
SWAV = ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))  # SwAV's src/multicropdataset.py and eval_linear.py: 0.228
FORMAT = "teacher 1"


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
    fc: nn.Linear | None = None  # d -> classes, where it was trained with one

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


# -------------------------------------------------------------------------------------------------------------- loading


def freeze(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def classifier(teacher: Teacher, fc: nn.Linear) -> nn.Module:
    """Normalised images (N, C, H, W) -> logits (N, classes): the teacher's network, then `fc`, both as they are and
    frozen in eval mode."""
    return nn.Sequential(teacher.net, fc).eval().requires_grad_(False)


class Rescale(nn.Module):
    """From images normalised by mean and std (C,) to images normalised by a teacher's constants.

    SC-DD's departure 2: the code recovers with CIFAR-10's constants and trains students with CIFAR-100's.
    """

    def __init__(self, mean: Tensor, std: Tensor, teacher: Teacher):
        super().__init__()
        self.register_buffer("scale", (std / teacher.std)[:, None, None])
        self.register_buffer("shift", ((mean - teacher.mean) / teacher.std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def digest_of(weights: dict[str, Tensor]) -> str:
    """sha256 over the bytes of all tensors in the order of their names: one bit changed, another digest."""
    return hashlib.sha256(b"".join(weights[key].cpu().numpy().tobytes() for key in sorted(weights))).hexdigest()


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
    """A teacher written by common/pretrain.py, with its classifier where info["classes"] says that there is one.

    Raises UserError for any other file.
    """
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
    fc = nn.Linear(net.dim, info["classes"]) if "classes" in info else None
    net.fc = fc  # only while the file is read: it is no part of the features
    fit(net, weights, path, f"{info['arch']} of width {info['width']}")
    info["weights_sha256"] = digest_of(weights)
    mean, std = torch.tensor(info["mean"]), torch.tensor(info["std"])
    freeze(net)
    del net.fc
    return Teacher(net, net.dim, mean, std, path.resolve().parent.name, info, path.parent, fc)


def load_teacher(
    spec: str, data: Data, device: torch.device, stem_padding: int = 2, flag: str = "--teacher"
) -> Teacher:
    """The teacher that --teacher names, on `device`, with its linear classifier where it has one.

    spec: a file or folder of this project; a ResNet file with torchvision's, solo-learn's or a published checkpoint's
    keys (load_resnet); "torchvision:NAME" or "timm:NAME" for those libraries' pretrained networks. stem_padding: of a
    file whose stem is 3x3 (it cannot be read from the weights; solo-learn's is 2). flag: named in the errors. Raises
    UserError for a file that needs unpickling, another architecture, missing keys, other channels than the data's.
    """
    if spec.startswith(("torchvision:", "timm:")):
        teacher = load_library(*spec.split(":", 1), data.size, flag)
    else:
        path = Path(spec)
        path = path / "teacher.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{flag} {spec}: no such file; a path, torchvision:NAME or timm:NAME")
        teacher = load_own(path) if path.suffix == ".safetensors" else load_resnet(path, data, stem_padding)
    if len(teacher.mean) != data.channels:
        raise UserError(f"{flag} {spec}: takes {len(teacher.mean)} channels, the data has {data.channels}")
    teacher.net.to(device)
    if teacher.fc is not None:
        teacher.fc.to(device)
    print(f"teacher: {teacher.name}, {teacher.dim} features")
    return teacher


def load_classifier(
    spec: str, data: Data, device: torch.device, stem_padding: int = 1, flag: str = "--label-teacher"
) -> Teacher:
    """A teacher whose `fc` tells the data's classes apart, on `device`, from what load_teacher takes.

    Raises UserError as load_teacher does, and where there is no classifier or one of another number of classes.
    """
    teacher = load_teacher(spec, data, device, stem_padding, flag)
    if teacher.fc is None:
        raise UserError(f"{flag} {spec}: has no linear classifier (fc); name a network that was trained with labels")
    if teacher.fc.out_features != data.num_classes:
        classes = f"{teacher.fc.out_features} classes, the data has {data.num_classes}"
        raise UserError(f"{flag} {spec}: its classifier has {classes}; name one that was trained on them")
    return teacher


WRAPPERS = re.compile(r"((state_dict|model|module|_orig_mod)\.)*")  # dictionaries around a network, and DataParallel
# Moving averages that are never taken beside the network that they follow, as that is the one which is evaluated:
# MoCo's main_lincls.py reads module.encoder_q, MoCo v3's module.base_encoder, solo-learn's main_linear.py backbone.
MOMENTUM = {"encoder_k", "momentum_encoder", "momentum_backbone"}
HEADS = {"fc", "projector", "predictor", "classifier", "projection_head", "prototypes", "queue", "queue_ptr", "lambd"}
DINO = r"(module\.)?backbone\."  # below "teacher" and "student"
# A layout's name, its backbone's prefix without WRAPPERS, and how a key beside or below it begins; the first row that
# fits holds. From the code that writes and reads the published files, named in each row: no such file was at hand.
LAYOUTS = (
    ("MoCo v3", r"base_encoder\.", ""),  # moco-v3: moco/builder.py, main_lincls.py
    ("MoCo v2", r"encoder_q\.", r"encoder_q\.fc\.0\."),  # moco: moco/builder.py (--mlp), main_lincls.py
    ("MoCo v1", r"encoder_q\.", r"encoder_q\.fc\.weight"),
    ("MoCo", r"encoder_q\.", ""),
    ("SwAV", "", r"(projection_head|prototypes)\."),  # swav: src/resnet50.py; main_swav.py keeps the queue elsewhere
    ("DINO", rf"teacher\.{DINO}", ""),  # dino: main_dino.py; its eval_linear.py and eval_knn.py read "teacher"
    ("solo-learn", r"(backbone|encoder)\.", r"classifier\."),  # solo/methods/base.py; encoder in its first versions
    ("Barlow Twins", r"backbone\.", r"bn\.running_mean"),  # barlowtwins: main.py (checkpoint.pth)
    ("torchvision", "", r"fc\.(weight|bias)"),  # and the probes that both main_lincls.py save, in the same keys
    ("torchvision without fc", "", ""),  # DINO's dino_resnet50_pretrain.pth and Barlow Twins' resnet50.pth are alike
)


def flat(state: dict, levels: int = 4) -> dict[str, Tensor]:
    """The tensors of dictionaries in dictionaries, `levels` deep, by their names joined with dots; all else is left."""
    tensors = {}
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(key, str) and isinstance(value, dict) and levels > 1:
            tensors |= {f"{key}.{name}": tensor for name, tensor in flat(value, levels - 1).items()}
    return tensors


def listed(names: set[str] | list[str], most: int = 6) -> str:
    """The first names in their order, in one line."""
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def layout_of(state: dict) -> tuple[str, str, dict[str, Tensor]]:
    """What a checkpoint is, by its keys: (its name in LAYOUTS, the backbone's prefix, the tensors below the prefix).

    state: tensors by name, in one dictionary or in several ("teacher", "state_dict", "model" ...), whose names then are
    parts of the prefix. A prefix is what stands before a four-dimensional conv1.weight outside the stages layer1 to
    layer4. The tensors are the backbone's, heads included, the prefix taken off. A backbone of no known layout is taken
    where it is the only one, and named by its prefix.

    Raises ValueError, in one line, for no ResNet, a vision transformer, two backbones of which none is known to be the
    one to take, and a moving average (or DINO's student) without the network that its makers evaluate.
    """
    tensors = flat(state)
    stems = re.compile(r"(?!(?:.*\.)?layer\d)((?:.*\.)?)conv1\.weight")
    found = [match[1] for key, value in tensors.items() if (match := stems.fullmatch(key)) and value.ndim == 4]
    found = [prefix for prefix in found if f"{prefix}layer1.0.conv1.weight" in tensors] or found
    if not found:
        attention = [key for key in tensors if re.search(r"(^|[._])attn\.|self_attention|(^|\.)patch_embed\.", key)]
        if attention:
            raise ValueError(f"a vision transformer ({attention[0]}); only ResNets are known, name a file of one")
        # modules by their names: what stands before a number, else before the last dot
        modules = {key if "." not in key else re.split(r"\.(\d+\.|[^.]*$)", key)[0] for key in tensors}
        held = f"it holds {listed(modules)}" if modules else "it holds no tensor with a name"
        raise ValueError(f"no ResNet in it (no conv1.weight outside the layers; {held})")
    taken = [prefix for prefix in found if not MOMENTUM & set(prefix.split("."))]
    students = [prefix for prefix in taken if re.fullmatch(rf"student\.{DINO}", prefix)]
    if taken == students:  # or neither
        why = "DINO's student" if students else "a moving average"
        raise ValueError(f"only {why} in it ({listed(found)}), not the network that its makers evaluate")
    if any(re.fullmatch(rf"teacher\.{DINO}", prefix) for prefix in taken):
        taken = [prefix for prefix in taken if prefix not in students]
    if len(taken) > 1:
        raise ValueError(f"{len(taken)} backbones in it ({listed(taken)}); save the one to take in a file of its own")
    prefix = taken[0]
    root = WRAPPERS.match(prefix)[0]
    core = prefix.removeprefix(root)
    beside = [key.removeprefix(root) for key in tensors if key.startswith(root)]
    names = (
        name
        for name, pattern, sign in LAYOUTS
        if re.fullmatch(pattern, core) and any(re.match(sign, key) for key in beside)
    )
    below = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return next(names, f"{core}*"), prefix, below


def conversion(path: Path) -> str:
    """The shell command that unpickles a file and keeps the tensors of its dictionaries, but for the optimizer's.

    An empty class stands in for whatever the file names of the script that wrote it, which is __main__ then and is not
    there now: Barlow Twins' first checkpoint.pth names a function of its main.py. Names like __file__, for which torch
    asks, stay unknown.
    """
    code = (
        'import torch; __getattr__ = lambda n: getattr(None, n) if n[:2] == "__" else type(n, (), {}); '
        "keep = lambda s: {k: keep(v) if isinstance(v, dict) else v for k, v in s.items() "
        'if isinstance(v, (dict, torch.Tensor)) and k not in ["optimizer"]}; '
        f's = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False); '
        f"torch.save(keep(s if isinstance(s, dict) else s.state_dict()), {json.dumps(f'{path}.clean.pt')})"
    )
    return f"python -c {shlex.quote(code)}"


def load_resnet(path: Path, data: Data, stem_padding: int) -> Teacher:
    """A ResNet-10/18/50 file of MoCo, MoCo v3, SwAV, DINO, Barlow Twins, solo-learn or in torchvision's keys, loaded
    strictly; which one is recognised by the keys (`layout_of`) and kept as info["layout"].

    `fc` becomes the teacher's classifier where it is one linear layer from the features. Pixels are normalised by the
    data's constants before a 3x3 stem, by SwAV's or ImageNet's before a 7x7 one. Raises UserError for a file that needs
    unpickling, with the command that converts it, and for what layout_of refuses.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "GLOBAL" in str(error) or "allowlisted" in str(error):  # torch's words for a class that it does not know
            raise UserError(
                f"{path}: loading it would run pickled code; if you trust it, convert it once with "
                f"{conversion(path)} and name the .clean.pt"
            ) from None
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}); fetch it again") from None
    try:
        layout, _, state = layout_of(state if isinstance(state, dict) else {})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    weight, bias = state.get("fc.weight"), state.get("fc.bias")
    state = {key: value for key, value in state.items() if key.split(".")[0] not in HEADS | MOMENTUM}
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
    published = SWAV if layout == "SwAV" else IMAGENET
    mean, std = (data.mean, data.std) if stem == "cifar" else map(torch.tensor, published)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    info = dict(method="file", file=path.name, sha256=digest, layout=layout, arch=arch, stem=stem)
    info |= dict(stem_padding=stem_padding, mean=mean.tolist(), std=std.tolist())
    fc = None
    linear = weight is not None and bias is not None and weight.shape == (*bias.shape, net.dim)
    if linear and not layout.startswith("MoCo"):  # whose fc is the loss's projection: main_lincls.py drops it
        fc = freeze(nn.Linear(net.dim, len(bias)))
        fc.load_state_dict({"weight": weight, "bias": bias})
    name = f"{path.stem.removesuffix('.pth')} ({layout}, {arch}, {stem} stem)"
    return Teacher(freeze(net), net.dim, mean, std, name, info, None, fc)


def load_library(library: str, name: str, size: int, flag: str = "--teacher") -> Teacher:
    """torchvision's or timm's pretrained network with the constants it was trained with, its classifier taken off.

    torchvision's last linear layer is kept as `fc` where it takes the features.

    Raises UserError if it cannot be had or does not take images of `size` px.
    """
    fc = None
    try:
        module = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
        if library == "torchvision":
            net = module.get_model(name, weights="DEFAULT")
            preset = module.get_model_weights(name).DEFAULT.transforms()
            mean, std = preset.mean, preset.std
            linear = [key for key, child in net.named_modules() if isinstance(child, nn.Linear)]
            if not linear:
                raise UserError(f"{flag} {library}:{name}: has no linear classifier to take off; name another")
            fc = freeze(net.get_submodule(linear[-1]))
            net.set_submodule(linear[-1], nn.Identity())
        else:
            net = module.create_model(name, pretrained=True, num_classes=0)
            mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
        with torch.no_grad():
            dim = freeze(net)(torch.zeros(2, len(mean), size, size)).flatten(1).shape[1]
    except ImportError:
        raise UserError(f"{flag} {library}:{name}: {library} is not installed; pip install {library}") from None
    except UserError:
        raise
    except Exception as error:  # unknown names, no network, a fixed image size: each library raises its own
        reason = short(error)
        raise UserError(f"{flag} {library}:{name}: {reason}; check the name, the network and --size") from None
    info = dict(method=library, model=name, mean=list(mean), std=list(std))
    fc = fc if fc is not None and fc.in_features == dim else None
    return Teacher(net, dim, torch.tensor(mean), torch.tensor(std), f"{library}:{name}", info, None, fc)
