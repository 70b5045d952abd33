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

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from common.artefact import Distilled, fit_pairs
from common.augment import crop_flip
from common.data import Data, normalise
from common.models import ConvNet, apply_chunked
from common.pretrain import Teacher
from common.run import rng, seeded

DRAWS = 20
CACHE_BYTES = 4 << 30  # features of a whole set are kept for the probe below this, else computed batch by batch


@dataclass
class Protocol:
    """How rows are scored; every value is recorded in result.json. epochs, batch, lr ...: pretraining on the pairs."""

    runs: int = 5
    epochs: int = 1000
    batch: int = 256
    lr: float = 0.1
    weight_decay: float = 1e-3
    probe_steps: int = 5000
    probe_lr: float = 0.2
    few_ridge: float = 1e-2
    finetune_steps: int = 10_000
    finetune_lr: float = 0.01


def matching_error(prediction: Tensor, target: Tensor) -> float:
    """Mean squared error over that of predicting the targets' mean. (N, d), (N, d) -> scalar."""
    residual = (prediction.double() - target.double()).square().mean()
    return float(residual / (target.double() - target.double().mean(0)).square().mean())


def linear_probe(
    features, y: Tensor, f_test: Tensor, y_test: Tensor, classes: int, *key, steps: int, lr: float
) -> float:
    """Test accuracy of one linear layer by SGD: batch 512, momentum 0.9, cosine to zero, cross-entropy, last step.

    features: index (B,) -> (B, d), frozen and un-augmented; y: (N,). Source: KRR-ST's code (lr 0.2, 5000 steps).
    """
    device, dim = f_test.device, f_test.shape[1]
    with seeded("probe", *key):
        head = nn.Linear(dim, classes).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, foreach=True)
    generator, y = rng("probe batches", *key), y.to(device)
    for step in range(steps):
        index = torch.randint(len(y), (512,), generator=generator).to(device)
        loss = F.cross_entropy(head(features(index)), y[index])
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return accuracy(head(f_test), y_test)


def accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1).cpu() == y.cpu()).float().mean())


def few_label_draws(y: Tensor, per_class: int, *key) -> Tensor:
    """DRAWS index sets of `per_class` training images a class (fewer where a class has fewer): (DRAWS, classes * k)."""
    k = min(per_class, int(y.bincount().min()))
    draws = []
    for draw in range(DRAWS):
        order = torch.randperm(len(y), generator=rng("few", *key, per_class, draw))
        by_class = order[torch.argsort(y[order], stable=True)]  # shuffled inside each class
        starts = torch.cumsum(y.bincount(), 0) - y.bincount()
        draws.append(by_class[(starts[:, None] + torch.arange(k)).flatten()])
    return torch.stack(draws)


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


def finetune(net: ConvNet, data: Data, *key, device: torch.device, steps: int, lr: float) -> float:
    """Test accuracy after training all weights with a new head: SGD 0.9, wd 5e-4, batch 256, cosine, crop and flip.

    Source: KRR-ST's code, lr 0.01 and 10,000 steps on CIFAR. Sets that must not be mirrored are only cropped.
    """
    with seeded("finetune head", *key):
        net.head = nn.Linear(net.dim, data.num_classes).to(device)
    mean, std = data.mean.to(device), data.std.to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, foreach=True)
    generator = rng("finetune", *key)
    net.train()
    for step in range(steps):
        index = torch.randint(len(data.x_train), (256,), generator=generator)
        x = crop_flip(data.x_train[index].to(device), generator, data.flip)  # pads with black, as the original
        loss = F.cross_entropy(net(normalise(x, mean, std)), data.y_train[index].to(device))
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    scores = apply_chunked(lambda x: net(normalise(x.to(device), mean, std)).cpu(), data.x_test)
    return accuracy(scores, data.y_test)


def score_features(
    net, dim: int, mean: Tensor, std: Tensor, data: Data, device: torch.device, protocol: Protocol, seed: int, run: int
) -> dict[str, float | list[float]]:
    """probe, few_5 and few_1 (one value a draw) of a frozen feature map net: pixels by mean and std -> (N, dim)."""

    def embed(x: Tensor) -> Tensor:
        return apply_chunked(lambda part: net(normalise(part.to(device), mean, std)), x)

    f_test = embed(data.x_test)
    if len(data.x_train) * dim * 4 <= CACHE_BYTES:
        f_train = embed(data.x_train)
        features = f_train.__getitem__
    else:
        features = lambda index: embed(data.x_train[index.cpu()])  # noqa: E731
    scores = {
        "probe": linear_probe(
            features,
            data.y_train,
            f_test,
            data.y_test,
            data.num_classes,
            seed,
            run,
            steps=protocol.probe_steps,
            lr=protocol.probe_lr,
        )
    }
    for k in (5, 1):
        draws = few_label_draws(data.y_train, k, seed, run)  # (DRAWS, n)
        f_l = torch.stack([features(draw.to(device)) for draw in draws])
        y_l = data.y_train[draws].to(device)
        scores[f"few_{k}"] = few_label_probe(f_l, y_l, f_test, data.y_test, data.num_classes, protocol.few_ridge)
    return scores


def score_pairs(
    pairs: tuple[Tensor, Tensor] | None,
    steps: int,
    data: Data,
    targets_test: Tensor,
    make_net,
    device: torch.device,
    protocol: Protocol,
    seed: int,
    run: int,
) -> dict[str, float | list[float]]:
    """All scores of one fresh network pretrained on `pairs` (network inputs, targets), or not at all for None."""
    with seeded("evaluation network", seed, run):
        net = make_net().to(device)
    if pairs is not None:
        x, y = (tensor.to(device) for tensor in pairs)
        sgd = dict(batch=protocol.batch, lr=protocol.lr, weight_decay=protocol.weight_decay)
        fit_pairs(net, x, y, seed, run, steps=steps, **sgd)
    net.eval()
    mean, std = data.mean.to(device), data.std.to(device)
    predicted = apply_chunked(lambda part: net(normalise(part.to(device), mean, std)).cpu(), data.x_test)
    scores = {"match": matching_error(predicted, targets_test)}
    if data.labelled:
        scores |= score_features(net.features, net.dim, mean, std, data, device, protocol, seed, run)
        if protocol.finetune_steps:
            sgd = dict(steps=protocol.finetune_steps, lr=protocol.finetune_lr)
            scores["finetune"] = finetune(net, data, seed, run, device=device, **sgd)
    return scores


def evaluate_pairs(
    distilled: Distilled,
    data: Data,
    teacher: Teacher,
    targets_train: Tensor,
    targets_test: Tensor,
    make_net,
    device: torch.device,
    protocol: Protocol,
    seed: int,
    rows: tuple[str, ...] = ("none", "random_real", "distilled"),
) -> dict[str, dict[str, dict]]:
    """{row: {metric: {"values": one a network, "mean", "std"}}}; std is the sample's, over protocol.runs networks.

    make_net: () -> ConvNet with the teacher's dimension as outputs; targets: the teacher's, of data.x_train / x_test.
    rows may also hold "all_real" and "teacher" (the teacher's own probes).
    """
    x_s, y_s = distilled.inputs(), distilled.y
    n_s = len(x_s)
    steps = protocol.epochs * -(-n_s // protocol.batch)  # all rows take the same number of SGD steps
    results = {row: [] for row in rows}
    bar = tqdm(total=len(rows) * protocol.runs, desc="evaluation", dynamic_ncols=True)
    for row in rows:
        for run in range(protocol.runs):
            bar.set_postfix_str(row)
            if row == "teacher":
                flat = lambda x: teacher.net(x).flatten(1).float()  # noqa: E731
                own = teacher.dim, teacher.mean, teacher.std
                results[row].append(score_features(flat, *own, data, device, protocol, seed, run))
            else:
                if row == "none":
                    pairs = None
                elif row == "distilled":
                    pairs = x_s, y_s
                elif row == "random_real":
                    index = torch.randperm(len(data.x_train), generator=rng("random real", seed, run))[:n_s]
                    pairs = normalise(data.x_train[index], data.mean, data.std), targets_train[index]
                else:
                    pairs = normalise(data.x_train[:], data.mean, data.std), targets_train
                results[row].append(
                    score_pairs(pairs, steps, data, targets_test, make_net, device, protocol, seed, run)
                )
            bar.update()
    bar.close()
    return {row: summarise(scores) for row, scores in results.items()}


def summarise(scores: list[dict]) -> dict[str, dict]:
    """Per metric: the values (one a network; few-label draws kept beside), mean and sample std over networks."""
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
    """Mean of row - against over networks (and draws), with its standard error."""
    a, b = (results[r][metric].get("draws") or [[v] for v in results[r][metric]["values"]] for r in (row, against))
    difference = torch.tensor(a, dtype=torch.float64).flatten() - torch.tensor(b, dtype=torch.float64).flatten()
    n = len(difference)
    return dict(mean=float(difference.mean()), se=float(difference.std() / n**0.5) if n > 1 else 0.0, pairs=n)


def table(results: dict[str, dict[str, dict]], caption: str) -> str:
    """The rows as text: match as a fraction, accuracies in per cent, mean ± std."""
    words = dict(match="match error", probe="probe", few_5="5 a class", few_1="1 a class", finetune="fine-tuned")
    metrics = [m for m in words if any(m in row for row in results.values())]
    lines = [f"{'':15}" + "".join(f"{words[m]:>16}" for m in metrics)]
    for name, row in results.items():
        cells = []
        for m in metrics:
            if m not in row:
                cells.append("-")
            elif m == "match":
                cells.append(f"{row[m]['mean']:.3f} ± {row[m]['std']:.3f}")
            else:
                cells.append(f"{100 * row[m]['mean']:.1f} ± {100 * row[m]['std']:.1f}")
        lines.append(f"{name.replace('_', ' '):15}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join([*lines, caption])
