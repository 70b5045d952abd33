"""How good a distilled set of (image, teacher feature) pairs is: every row is pretrained and scored the same way.

Fresh ConvNets are pretrained on the pairs by KRR-ST's published schedule (fit_pairs), then scored by
  match     mean squared error of the network's own head to the teacher's features on test images, relative to
            predicting their mean (1.0: no better than the mean; lower is better)
  probe     accuracy of a linear layer trained on frozen features with all labels
  few_5, few_1   accuracy of a ridge classifier on frozen features with 5 and 1 labels a class, mean of 20 draws
  finetune  accuracy after training all weights on the source set
Rows: no pretraining; random real images with the same teacher's targets, drawn anew for every network; distilled; and
on request all real images for as many steps. The r-th network of every row starts from the same weights and meets the
same few-label draws, so rows can be compared pairwise.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from common.artefact import Distilled, fit_pairs
from common.augment import crop_flip
from common.data import Data, normalise
from common.models import ConvNet, apply_chunked
from common.pretrain import cosine_lr
from common.run import rng, seeded, write_json


@dataclass
class Protocol:
    """How rows are scored; every value is recorded in result.json. epochs .. weight_decay: pretraining on the pairs."""

    runs: int = 5
    epochs: int = 1000
    batch: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    probe_steps: int = 5000
    probe_lr: float = 0.2
    probe_batch: int = 512
    few_draws: int = 20
    few_ridge: float = 1e-2
    finetune_steps: int = 10_000
    finetune_lr: float = 0.01
    finetune_batch: int = 256
    finetune_weight_decay: float = 5e-4


def matching_error(prediction: Tensor, target: Tensor) -> float:
    """Mean squared error over that of predicting the targets' mean. (N, d), (N, d) -> scalar."""
    residual = (prediction.double() - target.double()).square().mean()
    return float(residual / (target.double() - target.double().mean(0)).square().mean())


def linear_probe(features, data: Data, f_test: Tensor, protocol: Protocol, *key) -> float:
    """Test accuracy of one linear layer by SGD: momentum 0.9, cosine to zero, cross-entropy, last step.

    features: index (B,) -> (B, d), frozen and un-augmented. Source: KRR-ST's code (batch 512, lr 0.2, 5000 steps).
    """
    device = f_test.device
    with seeded("probe", *key):
        head = nn.Linear(f_test.shape[1], data.num_classes).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=protocol.probe_lr, momentum=0.9, foreach=True)
    generator = rng("probe batches", *key)
    for step in range(protocol.probe_steps):
        index = torch.randint(len(data.y_train), (protocol.probe_batch,), generator=generator)
        loss = F.cross_entropy(head(features(index)), data.y_train[index].to(device))
        optimizer.param_groups[0]["lr"] = cosine_lr(step, protocol.probe_steps, 0, protocol.probe_lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return accuracy(head(f_test), data.y_test)


def accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1).cpu() == y.cpu()).float().mean())


def few_label_draws(y: Tensor, per_class: int | float, draws: int, *key) -> Tensor:
    """Index sets with `per_class` training images of every class, all of a class that has fewer: (draws, n).

    per_class: a number of images, or below 1 a share of each class, rounded, at least one image.
    """
    counts = y.bincount()
    ends = counts.cumsum(0)
    wanted = (counts * per_class + 0.5).long().clamp(min=1) if per_class < 1 else torch.full_like(counts, per_class)
    sets = []
    for draw in range(draws):
        order = torch.randperm(len(y), generator=rng("few", *key, per_class, draw))
        by_class = order[torch.argsort(y[order], stable=True)]  # shuffled inside each class
        ranges = zip(ends.tolist(), counts.tolist(), wanted.tolist(), strict=True)
        sets.append(torch.cat([by_class[end - n : end][:most] for end, n, most in ranges]))
    return torch.stack(sets)


def few_label_probe(
    f_l: Tensor, y_l: Tensor, f_test: Tensor, y_test: Tensor, classes: int, ridge: float
) -> list[float]:
    """Accuracy of the closed-form ridge classifier for every draw; lam = ridge * trace / n of the centred features.

    f_l: (draws, n, d), y_l: (draws, n), f_test: (N, d). Closed form rather than SGD: nothing to tune, no seed.
    """
    centre = f_l.mean(1, keepdim=True)  # (draws, 1, d)
    f_l = f_l - centre
    scores = F.one_hot(y_l, classes).to(f_l.dtype)
    lam = ridge * f_l.square().sum((1, 2)) / f_l.shape[1] + 1e-12
    heads = kernels.ridge_fit(f_l, scores - scores.mean(1, keepdim=True), lam)  # (draws, d, classes)
    offset = scores.mean(1)  # (draws, classes)
    return [accuracy((f_test - c) @ head + b, y_test) for c, head, b in zip(centre, heads, offset, strict=True)]


def finetune(
    net: nn.Module,
    data: Data,
    device: torch.device,
    protocol: Protocol,
    *key,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Test accuracy after training all weights with a new head: SGD 0.9, cosine to zero, crop and flip, last step.

    Source: KRR-ST's code (batch 256, lr 0.01, weight decay 5e-4, 10,000 steps on CIFAR). Sets that must not be
    mirrored are only cropped. prepare: what is done to normalised images before the network takes them.
    """
    with seeded("finetune head", *key):
        net.head = nn.Linear(net.dim, data.num_classes).to(device)
    mean, std = data.mean.to(device), data.std.to(device)
    lr, wd = protocol.finetune_lr, protocol.finetune_weight_decay
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=wd, foreach=True)
    generator = rng("finetune", *key)
    net.train()
    for step in range(protocol.finetune_steps):
        index = torch.randint(len(data.x_train), (protocol.finetune_batch,), generator=generator)
        x = crop_flip(data.x_train[index].to(device), generator, data.flip)  # pads with black, as the original
        loss = F.cross_entropy(net(prepare(normalise(x, mean, std))), data.y_train[index].to(device))
        optimizer.param_groups[0]["lr"] = cosine_lr(step, protocol.finetune_steps, 0, lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    scores = apply_chunked(lambda x: net(prepare(normalise(x.to(device), mean, std))).cpu(), data.x_test)
    return accuracy(scores, data.y_test)


def probes(
    features, f_test: Tensor, data: Data, protocol: Protocol, *key, shares: tuple[float, ...] = ()
) -> dict[str, float | list[float]]:
    """probe, few_5 and few_1 (one value a draw) of frozen features, and part_5 for a share 0.05 of the labels.

    features: index (B,) of training images -> (B, d), on the device of f_test (N, d).
    """
    scores = {"probe": linear_probe(features, data, f_test, protocol, *key)}
    for k in (5, 1, *shares):
        name = f"few_{k}" if k >= 1 else f"part_{100 * k:g}"
        scores[name] = []
        for draw in few_label_draws(data.y_train, k, protocol.few_draws, *key):  # (n,), one at a time: they are large
            labelled = features(draw)[None], data.y_train[draw].to(f_test.device)[None]
            scores[name] += few_label_probe(*labelled, f_test, data.y_test, data.num_classes, protocol.few_ridge)
    return scores


def score_network(
    net: ConvNet, data: Data, targets_test: Tensor, device: torch.device, protocol: Protocol, cache_gb: float, *key
) -> dict[str, float | list[float]]:
    """All scores of one pretrained network; fine-tuning comes last and changes it.

    cache_gb: features of the training set are kept for the probe up to this, else computed batch by batch.
    """
    mean, std = data.mean.to(device), data.std.to(device)
    net.eval()

    def embed(x: Tensor) -> Tensor:
        return apply_chunked(lambda part: net.features(normalise(part.to(device), mean, std)), x)

    f_test = embed(data.x_test)  # (N, dim)
    with torch.no_grad():
        scores = {"match": matching_error(net.head(f_test).cpu(), targets_test)}
    if data.labelled:
        if len(data.x_train) * net.dim * 4 <= cache_gb * 1e9:
            f_train = embed(data.x_train)
            features = lambda index: f_train[index.to(device)]  # noqa: E731
        else:
            features = lambda index: embed(data.x_train[index])  # noqa: E731
        scores |= probes(features, f_test, data, protocol, *key)
        if protocol.finetune_steps:
            scores["finetune"] = finetune(net, data, device, protocol, *key)
    return scores


def evaluate_pairs(
    distilled: Distilled,
    data: Data,
    targets_train: Tensor,
    targets_test: Tensor,
    make_net,
    device: torch.device,
    protocol: Protocol,
    seed: int,
    rows: tuple[str, ...] = ("none", "random_real", "distilled"),
    cache_gb: float = 4.0,
    keep: Path | None = None,
    others: dict[str, Callable[[int], tuple[Tensor, Tensor]]] | None = None,
) -> dict[str, dict[str, dict]]:
    """{row: {metric: {"values": one a network, "mean", "std"}}}; std is the sample's, over protocol.runs networks.

    make_net: () -> ConvNet with the teacher's dimension as outputs; targets: the teacher's features of data.x_train and
    data.x_test. rows may also hold "all_real" and "teacher" (the probes of those features themselves).
    keep: a JSON file of the networks scored so far, so that a stop costs one of them; read only if it was made from
    the same pairs by the same protocol. others: further rows, or their own for some of these: number of the network ->
    (inputs, targets) on `device`. Raises kernels.FailedFactorization if a probe's ridge failed.
    """
    mean, std = data.mean.to(device), data.std.to(device)
    n_s = len(distilled.x)
    steps = protocol.epochs * -(-n_s // protocol.batch)  # all rows take the same number of SGD steps
    sgd = dict(batch=protocol.batch, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay)
    scored = Scored(keep, protocol, distilled.x, distilled.y, data.content, seed, distilled.meta.get("teacher"))
    bar = tqdm(total=len(rows) * protocol.runs, desc="evaluation", leave=False, mininterval=1, dynamic_ncols=True)
    for row in rows:
        for run in range(protocol.runs):
            bar.set_postfix_str(row)
            if scored.has(row, run):
                bar.update()
                continue
            if row == "teacher":
                features = lambda index: targets_train[index].to(device)  # noqa: E731
                scores = probes(features, targets_test.to(device), data, protocol, seed, run)
                kernels.raise_if_failed(distilled.step)
                scored.add(row, scores)
                bar.update()
                continue
            with seeded("evaluation network", seed, run):  # the run-th network of every row starts alike
                net = make_net().to(device)
            if others and row in others:
                fit_pairs(net, *others[row](run), seed, run, steps=steps, **sgd)
            elif row == "distilled":
                x, y = distilled.inputs().to(device), distilled.y.to(device)
                fit_pairs(net, x, y, seed, run, steps=steps, **sgd)
            elif row == "random_real":
                index = torch.randperm(len(data.x_train), generator=rng("random real", seed, run))[:n_s]
                x, y = normalise(data.x_train[index].to(device), mean, std), targets_train[index].to(device)
                fit_pairs(net, x, y, seed, run, steps=steps, **sgd)
            elif row == "all_real":
                prepare = lambda x: normalise(x.to(device), mean, std)  # noqa: E731
                fit_pairs(net, data.x_train, targets_train, seed, run, steps=steps, prepare=prepare, **sgd)
            scores = score_network(net, data, targets_test, device, protocol, cache_gb, seed, run)
            kernels.raise_if_failed(distilled.step)
            scored.add(row, scores)
            bar.update()
    bar.close()
    return {row: summarise(scored.rows[row][: protocol.runs]) for row in rows}


class Scored:
    """Scores of the networks so far, {row: [scores of the first network, ...]}, in memory and in a file.

    protocol: a dataclass with `runs`, the networks of a row; x, y: the set that is scored; facts: all else that the
    scores depend on. A file made from anything else is not read.
    """

    def __init__(self, path: Path | None, protocol, x: Tensor, y: Tensor, *facts):
        recipe = asdict(protocol) | {"runs": None}  # more networks can be added to those that are there
        key = hashlib.sha256(json.dumps([recipe, *facts], sort_keys=True, default=str).encode())
        key.update(x.numpy().tobytes() + y.numpy().tobytes())
        self.path, self.key, self.rows = path, key.hexdigest(), {}
        try:
            kept = json.loads(path.read_text()) if path is not None else {}
            self.rows = kept["rows"] if kept.get("key") == self.key else {}
        except (OSError, ValueError):  # none yet
            pass

    def has(self, row: str, run: int) -> bool:
        return run < len(self.rows.get(row, []))

    def add(self, row: str, scores: dict) -> None:
        self.rows.setdefault(row, []).append(scores)
        if self.path is not None:
            write_json(self.path, {"key": self.key, "rows": self.rows})


def seconds_of(function: Callable, device: torch.device, least: float = 0.1) -> float:
    """Seconds of one call: after a first one, repeated until `least` seconds have passed."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began, calls = time.monotonic(), 0
    while calls == 0 or time.monotonic() - began < least:
        function()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.monotonic() - began) / calls


def predict_seconds(
    make_net, data: Data, n_s: int, dim: int, device: torch.device, protocol: Protocol, cache_gb: float, rows
) -> float:
    """Seconds that evaluate_pairs will take over `rows` of n_s pairs with `dim` targets.

    One step of each kind is timed on blank images; fine-tuning is taken as pretraining of its batch.
    """
    with seeded("predict seconds"):
        net = make_net().to(device)
    n = max(protocol.batch, protocol.finetune_batch)
    x, y = torch.zeros(n, data.channels, data.size, data.size, device=device), torch.zeros(n, dim, device=device)

    def fit(batch: int) -> float:
        return seconds_of(lambda: fit_pairs(net, x[:batch], y[:batch], "predict", steps=1), device)

    pretraining = fit(min(n_s, protocol.batch)) * protocol.epochs * -(-n_s // protocol.batch)
    net.eval()
    image = seconds_of(lambda: apply_chunked(net.features, x), device) / n
    score, probing = image * len(data.x_test), 0.0
    if data.labelled:
        short = replace(protocol, probe_steps=20)
        f_test = torch.zeros(len(data.x_test), net.dim, device=device)
        blank = lambda index: f_test.new_zeros(len(index), net.dim)  # noqa: E731
        probing = seconds_of(lambda: linear_probe(blank, data, f_test, short, "predict"), device)
        probing *= protocol.probe_steps / 20
        y_l = torch.arange(5 * data.num_classes, device=device)[None] % data.num_classes
        with seeded("predict few"):
            f_l = torch.randn(1, y_l.shape[1], net.dim).to(device)
        few = lambda: few_label_probe(f_l, y_l, f_test, data.y_test, data.num_classes, 1.0)  # noqa: E731
        probing += 1.5 * protocol.few_draws * seconds_of(few, device)  # 1.5: with one label a class it is cheaper
        kept = len(data.x_train) * net.dim * 4 <= cache_gb * 1e9
        images = len(data.x_train) if kept else protocol.probe_steps * protocol.probe_batch
        score += image * images + probing
        if protocol.finetune_steps:
            score += fit(protocol.finetune_batch) * protocol.finetune_steps + image * len(data.x_test)
    per_row = {"none": score, "teacher": probing * dim / net.dim}
    return protocol.runs * sum(per_row.get(row, pretraining + score) for row in rows)


def summarise(scores: list[dict]) -> dict[str, dict]:
    """Per metric: the values (one a network; few-label draws kept beside), mean and sample std over networks.

    Evaluate's departure 7: KRR-ST's code has the population's.
    """
    summary = {}
    for metric in scores[0]:
        values = [s[metric] for s in scores]
        flat = [sum(v) / len(v) if isinstance(v, list) else v for v in values]
        mean = sum(flat) / len(flat)
        std = (sum((v - mean) ** 2 for v in flat) / (len(flat) - 1)) ** 0.5 if len(flat) > 1 else 0.0
        summary[metric] = dict(mean=mean, std=std, values=flat)
        if isinstance(values[0], list):
            summary[metric]["draws"] = values
    return summary


def paired(results: dict, row: str, against: str, metric: str) -> dict[str, float]:
    """Mean of row - against with its standard error, over all pairs (networks x draws) and over networks alone.

    `se` takes the draws of one network as independent, which they are not quite; `se_networks` does not.
    """
    difference = [
        torch.tensor(
            results[r][metric].get("draws") or [[v] for v in results[r][metric]["values"]], dtype=torch.float64
        )
        for r in (row, against)
    ]
    difference = difference[0] - difference[1]  # (networks, draws)

    def standard_error(x: Tensor) -> float:
        return float(x.std() / len(x) ** 0.5) if len(x) > 1 else 0.0

    flat, networks = difference.flatten(), difference.mean(1)
    se, se_networks = standard_error(flat), standard_error(networks)
    return dict(mean=float(flat.mean()), se=se, se_networks=se_networks, pairs=len(flat))


def table(results: dict[str, dict[str, dict]], caption: str) -> str:
    """The rows as text: match as a fraction, accuracies in per cent, mean ± std."""
    words = dict(match="match error", probe="probe", few_5="5 a class", few_1="1 a class", finetune="fine-tuned")
    metrics = [m for m in words if any(m in row for row in results.values())]
    width = max(15, *(len(name) + 1 for name in results))
    lines = [" " * width + "".join(f"{words[m]:>16}" for m in metrics)]
    for name, row in results.items():
        cells = []
        for m in metrics:
            if m not in row:
                cells.append("-")
            elif m == "match":
                cells.append(f"{row[m]['mean']:.3f} ± {row[m]['std']:.3f}")
            else:
                cells.append(f"{100 * row[m]['mean']:.1f} ± {100 * row[m]['std']:.1f}")
        lines.append(f"{name.replace('_', ' '):{width}}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join([*lines, caption])
