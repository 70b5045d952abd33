"""The distilled set as one safetensors file that describes itself, and what it is for: pretraining any network.

Tensors: x (N, C, H, W) in pixel units (1.0 = white; not clamped: a learned image may leave [0, 1]), y (targets or
labels), mean and std (C,), and where the networks saw whitened images zca (D, D) and zca_mean (C, H, W). They saw
(x - mean) / std, or ((x - mean) / std - zca_mean) @ zca, phase by phase: see common.data.to_phases. A set that is
stored as a low-rank code has the tensors of common/bases.py in place of x and y, which loading decodes. Metadata:
strings only, see `save_distilled`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.bases import Code
from common.data import Zca, denormalise, mix_pixels
from common.run import UserError, commit, first_line, rng, seeded, write_atomic

FORMAT = "distilled 1"


@dataclass
class Distilled:
    """A distilled set as loaded. x: (N, C, H, W) pixel units; y: (N, d) targets or (N, classes) scores."""

    x: Tensor
    y: Tensor
    mean: Tensor
    std: Tensor
    method: str
    data: str
    y_is: str
    class_names: list[str]
    resize: str
    step: int
    seed: int
    recipe: dict  # how it was meant to be evaluated
    meta: dict = field(default_factory=dict)  # everything else in the file: teacher, commit, content hash, storage
    zca: Tensor | None = None  # (D, D) the whitening, None without
    zca_mean: Tensor | None = None  # (C, H, W), of the normalised training images
    code: Code | None = None  # what x and y were decoded from: all images, then the first view of all, and so on

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def size(self) -> int:
        return self.x.shape[-1]

    def inputs(self) -> Tensor:
        """(N, C, H, W) float32 as the networks take them: (x - mean) / std, then whitened if the set was."""
        x = (self.x - self.mean[:, None, None]) / self.std[:, None, None]
        return x if self.zca is None else mix_pixels(x - self.zca_mean, self.zca)

    def dataset(self) -> TensorDataset:
        """A torch Dataset of (network input, y)."""
        return TensorDataset(self.inputs(), self.y)


def save_distilled(
    path: str | Path,
    x: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    std: Tensor,
    *,
    method: str,
    data: str,
    content: str,
    y_is: str,
    class_names: list[str],
    resize: str,
    step: int,
    seed: int,
    recipe: dict,
    teacher: dict | None = None,
    zca: Zca | None = None,
    code: Code | None = None,
    extra: dict | None = None,
) -> None:
    """Write the set to `path` (temporary name, then rename). Raises UserError if it cannot.

    x: in pixel units; zca: what whitened the networks' images, so that of whitened x_s these are
    denormalise(zca.undo(x_s), mean, std). code: the set as it is stored, x and y are None then. extra: more metadata,
    what JSON can hold; `load_distilled` returns it in `meta`. storage_bytes counts all tensors but the whitening, which
    zca_bytes does.
    """
    if code is not None and zca is not None:
        raise ValueError("a set of bases is not whitened")
    tensors = {"mean": mean, "std": std} | ({"x": x, "y": y} if code is None else {})
    if zca is not None:
        tensors |= {"zca": zca.matrix, "zca_mean": zca.mean}
    tensors = {key: value.detach().float().cpu().contiguous().clone() for key, value in tensors.items()}
    if code is not None:
        tensors |= {key: value.detach().cpu().contiguous().clone() for key, value in code.tensors.items()}
    size = {key: value.nbytes for key, value in tensors.items()}
    zca_bytes = sum(size.pop(key, 0) for key in ("zca", "zca_mean"))
    meta = dict(
        format=FORMAT,
        method=method,
        data=data,
        content=content,
        y_is=y_is,
        class_names=class_names,
        resize=resize,
        channels=len(mean),
        num_images=len(tensors["x" if code is None else "c_x"]),
        step=step,
        seed=seed,
        recipe=recipe,
        teacher=teacher,
        storage_bytes=sum(size.values()),
        zca_bytes=zca_bytes,
        commit=commit() or "unknown",
    )
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}
    if code is not None:
        text["code"] = json.dumps(code.facts())
    extra = extra or {}
    if taken := extra.keys() & (meta.keys() | Distilled.__dataclass_fields__.keys()):
        raise ValueError(f"extra metadata {sorted(taken)}: these names are taken")
    text |= {key: json.dumps(value) for key, value in extra.items()}  # strings too, as they are read as JSON
    write_atomic(path, lambda tmp: save_file(tensors, tmp, metadata=text))


def load_distilled(path: str | Path, method: str | None = None) -> Distilled:
    """Read a file that `save_distilled` wrote.

    Raises UserError if it is missing, truncated, incomplete, of another format version, or not `method`'s.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such distilled set")
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable distilled set ({first_line(error)})") from None
    if text.get("format") != FORMAT:
        raise UserError(f"{path}: format {text.get('format')!r}, this version reads {FORMAT!r}; distil it again")
    if method is not None and text.get("method") != method:
        raise UserError(f"{path}: made by {text.get('method')}, not by {method}; name that method's artefact")
    try:
        return _distilled(tensors, text)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # a tensor or a fact is missing or another's
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: not a whole distilled set ({reason}); distil it again") from None


def _distilled(tensors: dict[str, Tensor], text: dict[str, str]) -> Distilled:
    plain = ("format", "method", "data", "content", "y_is", "resize", "commit")  # strings; the rest is JSON
    meta = {key: value if key in plain else json.loads(value) for key, value in text.items()}
    own = {key: meta.pop(key) for key in Distilled.__dataclass_fields__ if key in meta}
    if "code" in own:
        constants = {key: tensors.pop(key) for key in ("mean", "std")}
        own["code"] = Code(tensors, **own["code"])
        own["code"].check()
        x, y = own["code"].decode()
        tensors = constants | dict(x=denormalise(x, **constants), y=y)
    return Distilled(**tensors, **own, meta=meta)


def fit_pairs(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *key,
    steps: int,
    batch: int = 256,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Train net(prepare(x)) -> y by mean squared error, in place: SGD, constant rate, no augmentation (KRR-ST's code).

    x: (N, C, H, W) network inputs, or what `prepare` makes them of batch by batch (pixels of a set larger than
    memory); y: (N, d); key: of the batch order. Epochs keep their last short batch. Returns the last loss; the net
    stays in train mode. Raises UserError if the loss is not finite.
    """
    net.train()
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True)
    per_epoch = -(-len(x) // batch)
    for step in range(steps):
        if per_epoch == 1:
            x_b, y_b = prepare(x), y
        else:
            if step % per_epoch == 0:
                order = torch.randperm(len(x), generator=rng("fit", *key, step // per_epoch))
            index = order[step % per_epoch * batch :][:batch]
            x_b, y_b = prepare(x[index]), y[index]
        loss = F.mse_loss(net(x_b.to(device)), y_b.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not loss.isfinite():
        raise UserError(f"pretraining on {len(x)} pairs ended at loss {loss.item()}; lower its learning rate {lr}")
    return loss.item()


def pretrain(module: nn.Module, distilled: Distilled, *, epochs: int = 1000, batch: int = 256, seed: int = 0, **sgd):
    """Pretrain any nn.Module on a distilled set of (image, target feature) pairs, in place, on the module's device.

    The module maps images to features of any shape; a linear head to the d targets is put on the flattened output
    and returned (most uses drop it). sgd: lr, momentum, weight_decay of `fit_pairs`. The module stays in train mode.
    """
    device = next(module.parameters()).device
    x, y = distilled.inputs().to(device), distilled.y.to(device)
    module.eval()
    with torch.no_grad():
        dim = module(x[:1]).flatten(1).shape[1]
    with seeded("pretrain head", seed):
        head = nn.Linear(dim, y.shape[1]).to(device)
    steps = epochs * -(-len(x) // batch)
    fit_pairs(nn.Sequential(module, nn.Flatten(), head), x, y, "pretrain", seed, steps=steps, batch=batch, **sgd)
    return head
