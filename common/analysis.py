"""What BatchNorm statistics say of a network: how uneven they are, and how strong a signal recovery gets from them.

SC-DD (Zhou et al. 2024, arXiv:2404.07976) holds that the running means and variances of self-supervised networks are
more uneven over channels than those of supervised ones, and that images are therefore recovered better from them. Its
text could not be had, so that the measures here are usual ones. A convolution times k, with the BatchNorm behind it
told so, is the same network with means times k and variances times k^2: what a measure says about "information" must
hold for mu / sigma and sigma^2 / mean(sigma^2) as well, on which k has no influence ("scale-free").
"""

import copy
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.run import UserError, write_atomic, write_json

F64 = torch.float64
SCALES = (0.25, 4.0)  # powers of two: the rescaled network is the same to the last bit, nearly
MEASURES = ("std_mu", "std_var", "max_over_median_var", "cv_sigma", "kurtosis_mu", "kurtosis_var")
ESTIMATORS = ("gaussian", "knn", "histogram")
KINDS = ("raw", "scale_free")
SMALLEST = 2.0**-24  # of a distance between channels, in standard deviations: what float32 tells apart


@dataclass
class Model:
    """One network to analyse."""

    name: str
    """unique; its label in plots"""
    family: str
    """supervised, or the self-supervised method: the colour in plots"""
    size: float
    """what grows, channels of the first stage or depth: the x axis of the trend"""
    net: nn.Module
    """frozen, in eval mode: normalised images (N, C, H, W) -> features (N, d)"""


# ------------------------------------------------------------------------------------------------------ the statistics


def statistics_of(net: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(name, running mean (C,), running variance (C,)) of every BatchNorm2d, as registered; float64, CPU, copies.

    Raises UserError if there is none.
    """
    norms = [(name, part) for name, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)]
    if not norms:
        raise UserError("the network has no BatchNorm2d, whose statistics are analysed; name one that has")
    return [(name, copied(n.running_mean), copied(n.running_var)) for name, n in norms]


def copied(v: Tensor) -> Tensor:
    return v.detach().to("cpu", F64, copy=True)


def free_of_scale(mu: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """mu / sigma of the channels whose variance is above 0 (a dead one has none), and var / mean(var) of all."""
    alive = var > 0
    return mu[alive] / var[alive].sqrt(), var / var.mean()


def vectors_of(mu: Tensor, var: Tensor) -> dict[str, dict[str, Tensor]]:
    """{kind: {"mu", "var"}} of a layer, raw and scale-free."""
    free_mu, free_var = free_of_scale(mu, var)
    return {"raw": {"mu": mu, "var": var}, "scale_free": {"mu": free_mu, "var": free_var}}


def spread(v: Tensor) -> float:
    """Standard deviation over all entries (no sample's correction); exactly 0 if they are equal, NaN if there are none.

    The mean of equal numbers may differ from them by a rounding.
    """
    if len(v) and bool(v.max() == v.min()):
        return 0.0
    return float(v.std(correction=0)) if len(v) else math.nan


def excess_kurtosis(v: Tensor) -> float:
    """Fourth central moment over the squared second, less 3; NaN of equal numbers."""
    if not spread(v) > 0:
        return math.nan
    squares = (v - v.mean()).square()
    return float(squares.square().mean() / squares.mean().square()) - 3


def ratio(a: float, b: float) -> float:
    """a / b, NaN over 0."""
    return a / b if b else math.nan


def layer_measures(mu: Tensor, var: Tensor) -> dict[str, float]:
    """{kind}_{measure} for KINDS and MEASURES, of a layer's means and variances (C,); NaN where one is undefined.

    Standard deviations over channels of both, max / median of the variances, coefficient of variation (standard
    deviation / mean) of sigma, excess kurtoses; then the same of mu / sigma and var / mean(var). The third, fourth and
    sixth are the same in both kinds: they know no scale.
    """
    measures = {}
    for kind, v in vectors_of(mu.to(F64), var.to(F64)).items():
        sigma = v["var"].sqrt()
        values = (
            spread(v["mu"]),
            spread(v["var"]),
            ratio(float(v["var"].max()), float(v["var"].quantile(0.5))),
            ratio(spread(sigma), float(sigma.mean())),
            excess_kurtosis(v["mu"]),
            excess_kurtosis(v["var"]),
        )
        measures |= {f"{kind}_{measure}": value for measure, value in zip(MEASURES, values, strict=True)}
    return measures


# ------------------------------------------------------------------------------------------------------------- entropy


def gaussian_entropy(v: Tensor) -> float | None:
    """1/2 log(2 pi e Var(v)) in nats, of a normal distribution with the variance of v (C,).

    None where the entries are equal or not finite: a density without width has no entropy.
    """
    width = spread(v.to(F64))
    return 0.5 * math.log(2 * math.pi * math.e) + math.log(width) if 0 < width < math.inf else None


def knn_entropy(v: Tensor, k: int = 3) -> float | None:
    """Kozachenko and Leonenko's estimate in nats, of v (C,): psi(C) - psi(k) + log 2 + mean_i log eps_i.

    eps_i is the distance from entry i to its k-th neighbour; on a line that one is an end of one of the k + 1 windows
    of k + 1 sorted entries that hold i. Ties: a distance counts at least SMALLEST standard deviations of v, which keeps
    the laws of scale and shift. None where the entries are equal or not finite, or no more than k.
    """
    v = v.to(F64).sort().values
    n, width = len(v), spread(v)
    if n <= k or not 0 < width < math.inf:
        return None
    eps = torch.full_like(v, math.inf)
    for left in range(k + 1):  # neighbours on the left within the window
        i = torch.arange(left, n - k + left)
        eps[i] = eps[i].minimum(torch.maximum(v[i] - v[i - left], v[i - left + k] - v[i]))
    psi = torch.digamma(torch.tensor([n, k], dtype=F64))
    return float(psi[0] - psi[1] + math.log(2) + eps.clamp(min=SMALLEST * width).log().mean())


def histogram_entropy(v: Tensor, edges: Tensor) -> float | None:
    """Shannon entropy in nats of the shares of v (C,) in the bins between edges (bins + 1,), ascending.

    A number on an edge is in the bin on its right; the first and last bin also hold what lies beyond them. Equal
    entries have entropy 0; None where there are none or not all are finite.
    """
    if len(v) == 0 or not bool(v.isfinite().all()):
        return None
    bins = len(edges) - 1
    place = torch.bucketize(v.to(F64), edges.to(F64), right=True).sub(1).clamp(0, bins - 1)
    shares = torch.bincount(place, minlength=bins).to(F64) / len(v)
    return float(torch.special.entr(shares).sum())


def shared_edges(vectors: list[Tensor], bins: int = 32) -> Tensor:
    """Edges (bins + 1,) of equally wide bins from the least to the largest finite number of all vectors.

    Where these are one number the bins span 1 around it, and where there is none 0 to 1.
    """
    v = torch.cat([vector.to(F64).flatten() for vector in vectors]) if vectors else torch.zeros(0)
    v = v[v.isfinite()]
    low, high = (float(v.min()), float(v.max())) if len(v) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, bins + 1, dtype=F64)
    edges[-1] = high  # whatever linspace rounds
    return edges


def entropies(mu: Tensor, var: Tensor, edges: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, dict]]:
    """{kind: {estimator: {"mu", "var"}}} of a layer; edges: {kind: {"mu", "var"}}, those of all models."""
    found = {}
    for kind, vectors in vectors_of(mu, var).items():
        found[kind] = {
            "gaussian": {of: gaussian_entropy(v) for of, v in vectors.items()},
            "knn": {of: knn_entropy(v) for of, v in vectors.items()},
            "histogram": {of: histogram_entropy(v, edges[kind][of]) for of, v in vectors.items()},
        }
    return found


# ----------------------------------------------------------------------------------------------- the scale and the loss


def conv_norm_pairs(net: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm2d) where the one's output goes into the other and nowhere else.

    Found by running x through a copy of the net, in the graph that autograd keeps: the input of the BatchNorm is still
    what the convolution made, unchanged in place, and nothing else in the graph reads it (in a pre-activation network
    the first convolution also feeds the shortcut). A module that is called more than once is not in a pair.
    """
    net = copy.deepcopy(net).eval()
    made, read, calls = {}, [], {}  # {node: convolution}, [(BatchNorm, node)], {module: calls}

    def after_conv(name: str):
        def hook(module, inputs, output):
            made[output.grad_fn] = name
            calls[name] = calls.get(name, 0) + 1

        return hook

    def before_norm(name: str):
        def hook(module, inputs):
            read.append((name, inputs[0].grad_fn))
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, part in net.named_modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(after_conv(name))
        elif isinstance(part, nn.BatchNorm2d):
            part.register_forward_pre_hook(before_norm(name))
    with torch.enable_grad():
        out = net(x.detach().clone().requires_grad_())
    readers, seen, nodes = {}, {out.grad_fn}, [out.grad_fn]
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is None:
                continue
            readers[node] = readers.get(node, 0) + 1
            if node not in seen:
                seen.add(node)
                nodes.append(node)
    return [
        (made[node], norm)
        for norm, node in read
        if node in made and readers.get(node) == 1 and calls[norm] == 1 and calls[made[node]] == 1
    ]


@torch.no_grad()
def rescaled(net: nn.Module, k: float, x: Tensor) -> nn.Module:
    """A copy of the net, the same function, with the convolutions of `conv_norm_pairs` multiplied by k > 0.

    Weight and bias times k; running mean of the BatchNorm times k, running variance and eps times k^2. A BatchNorm
    without a convolution of its own is left as it is. x: a few images, whose values do not matter.
    """
    pairs = conv_norm_pairs(net, x)
    net = copy.deepcopy(net).eval()
    for conv, norm in pairs:
        conv, norm = net.get_submodule(conv), net.get_submodule(norm)
        conv.weight.mul_(k)
        if conv.bias is not None:
            conv.bias.mul_(k)
        norm.running_mean.mul_(k)
        norm.running_var.mul_(k**2)
        norm.eps *= k**2
    return net


def statistics_loss(terms: Tensor, first: float) -> float:
    """L_BN = sum_l a_l term_l of terms (L, 1), with a_1 = first and else 1."""
    terms = terms[:, 0].detach().to("cpu", F64)
    return float(terms.sum() + (first - 1) * terms[0])


def signal(scores_and_terms: Callable, x: Tensor, first: float = 10.0) -> dict:
    """L_BN of a batch of normalised images and the norms of its gradients with respect to all pixels.

    scores_and_terms: x -> (outputs, terms (L, 1)), scdd.with_statistics(net). Returns loss; terms: of each layer;
    gradient: the norm of each term's gradient, without the first one's weight; gradient_total: of L_BN's, with it.
    """
    x = x.detach().clone().requires_grad_()
    terms = scores_and_terms(x)[1]  # (L, 1)
    total, norms = torch.zeros_like(x), []
    for layer in range(len(terms)):
        (g,) = torch.autograd.grad(terms[layer, 0], x, retain_graph=layer + 1 < len(terms))
        total += g * (first if layer == 0 else 1.0)
        norms.append(float(g.norm()))
    return dict(
        loss=statistics_loss(terms, first),
        terms=terms[:, 0].tolist(),
        gradient=norms,
        gradient_total=float(total.norm()),
    )


def scale_argument(
    net: nn.Module,
    k: float,
    images: dict[str, Tensor],
    before: dict,
    with_statistics: Callable,
    first: float,
    edges: dict,
) -> dict:
    """What a factor k on all convolutions in front of a BatchNorm changes though the network stays the same function.

    before: {"noise": signal on noise, "real": L_BN, "entropies": mean over layers, "outputs": on the real images}.
    Returns the largest change of an output relative to the largest output, and before and after of noise / real of
    L_BN, its gradient's norm on noise, and the entropies (mean over layers; by the laws of scale the raw Gaussian and
    nearest-neighbour ones of mu move by log k and those of var by 2 log k, times the share of norms that are rescaled).
    """
    real = images["real"]
    scaled = rescaled(net, k, real[:2])
    function = with_statistics(scaled)
    with torch.no_grad():
        outputs, terms = function(real)
    after = signal(function, images["noise"], first)
    layers = [entropies(mu, var, edges) for _, mu, var in statistics_of(scaled)]
    change = float((outputs - before["outputs"]).abs().max())
    return dict(
        k=k,
        norms=len(layers),
        norms_rescaled=len(conv_norm_pairs(net, real[:2])),
        outputs_change=ratio(change, float(before["outputs"].abs().max())),
        range={
            "before": ratio(before["noise"]["loss"], before["real"]),
            "after": ratio(after["loss"], statistics_loss(terms, first)),
        },
        gradient={"before": before["noise"]["gradient_total"], "after": after["gradient_total"]},
        entropies={"before": before["entropies"], "after": mean_over(layers)},
    )


# ---------------------------------------------------------------------------------------------------------- the numbers


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def mean_over(items: list):
    """Mean of nested dicts of numbers, leaf by leaf, over those where it is known; None where it is nowhere."""
    if isinstance(items[0], dict):
        return {key: mean_over([item[key] for item in items]) for key in items[0]}
    values = [value for value in items if known(value)]
    return sum(values) / len(values) if values else None


def rounded(value):
    """Nested dicts and lists with numbers of 6 significant digits; NaN and infinity are None."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def analyse(
    models: list[Model],
    images: dict[str, Tensor],
    with_statistics: Callable[[nn.Module], Callable],
    recover: Callable[[nn.Module], Tensor],
    folder: Path,
    title: str,
    first: float = 10.0,
) -> dict:
    """Measure every model, write analysis.json and statistics_*.png to `folder`, return what the JSON holds.

    images: "noise", N(0, 1), and "real", of different classes, (B, C, H, W), normalised. with_statistics(net): the
    function x -> (outputs, terms (L, 1)) of scdd.py. recover(net): images (B, C, H, W) recovered from its statistics.
    Raises UserError for no models, two of one name, or a network without BatchNorm.
    """
    names = [model.name for model in models]
    if not models or len(set(names)) < len(names):
        raise UserError(f"models to analyse: {', '.join(names) or 'none'}; give at least one, each its own name")
    vectors = {model.name: statistics_of(model.net) for model in models}
    every = [vectors_of(mu, var) for layers in vectors.values() for _, mu, var in layers]
    edges = {kind: {of: shared_edges([v[kind][of] for v in every]) for of in ("mu", "var")} for kind in KINDS}
    result = dict(title=title, first_bn_multiplier=first, models=[])
    for model in models:
        own = vectors[model.name]
        numbers = [layer_measures(mu, var) | dict(entropies=entropies(mu, var, edges)) for _, mu, var in own]
        facts = [dict(name=name, channels=len(mu), dead=int((var == 0).sum())) for name, mu, var in own]
        mean = mean_over(numbers)
        weight = next(model.net.parameters())
        seen = {key: images[key].to(weight) for key in ("noise", "real")}
        function = with_statistics(model.net)
        noise = signal(function, seen["noise"], first)
        x = recover(model.net).detach().to(weight)
        with torch.no_grad():
            outputs, terms = function(seen["real"])
            real, recovered = statistics_loss(terms, first), statistics_loss(function(x)[1], first)
        before = dict(noise=noise, real=real, outputs=outputs, entropies=mean["entropies"])
        result["models"].append(
            dict(
                name=model.name,
                family=model.family,
                size=model.size,
                layers=[a | b for a, b in zip(facts, numbers, strict=True)],
                mean=mean,
                signal=dict(
                    noise=noise["loss"],
                    real=real,
                    recovered=recovered,
                    range=ratio(noise["loss"], real),
                    gradient=noise["gradient"],  # on noise
                    gradient_total=noise["gradient_total"],
                ),
                scale=[scale_argument(model.net, k, seen, before, with_statistics, first, edges) for k in SCALES],
            )
        )
    result = rounded(result)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "analysis.json", result)
    plot_channels(folder / "statistics_channels.png", models, vectors, title)
    plot_depth(folder / "statistics_depth.png", result)
    plot_entropy(folder / "statistics_entropy.png", result)
    plot_signal(folder / "statistics_signal.png", result)
    return result


def summary_table(result: dict) -> str:
    """Markdown, one row a model: what `analyse` returned, means over layers."""
    columns = ["model", "H(mu) raw", "H(mu) scale-free", "H(var) raw", "H(var) scale-free", "CV of sigma"]
    columns += ["noise", "real", "recovered", "noise / real"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for model in result["models"]:
        h = {kind: model["mean"]["entropies"][kind]["gaussian"] for kind in KINDS}
        values = [h[kind][of] for of in ("mu", "var") for kind in KINDS] + [model["mean"]["raw_cv_sigma"]]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        values = [model["signal"][key] for key in ("noise", "real", "recovered", "range")]
        cells += ["-" if value is None else f"{value:.3g}" for value in values]
        lines.append(f"| {' | '.join([model['name'], *cells])} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- the plots

WORDS = {  # raw and scale-free, in the order of the panels
    "std_mu": ("std of $\\mu$", "std of $\\mu/\\sigma$"),
    "std_var": ("std of $\\sigma^2$", "std of $\\sigma^2/$mean"),
    "kurtosis_mu": ("excess kurtosis of $\\mu$", "excess kurtosis of $\\mu/\\sigma$"),
    "max_over_median_var": ("max / median of $\\sigma^2$",) * 2,
    "cv_sigma": ("coefficient of variation of $\\sigma$",) * 2,
    "kurtosis_var": ("excess kurtosis of $\\sigma^2$",) * 2,
}
ESTIMATOR_WORDS = {"gaussian": "Gaussian", "knn": "nearest neighbour", "histogram": "histogram"}
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def line_styles(models: list[tuple[str, str, float]]) -> dict[str, dict]:
    """{name: color, linestyle, marker} of (name, family, size): a family has a colour, small models a lighter one."""
    from matplotlib.colors import to_rgb

    styles = {}
    families = sorted({family for _, family, _ in models}, key=lambda family: (family != "supervised", family))
    for number, family in enumerate(families):
        own = sorted([(size, name) for name, of, size in models if of == family])
        for rank, (_, name) in enumerate(own):
            white = 0.55 * (1 - (rank + 1) / len(own))
            colour = tuple(white + (1 - white) * part for part in to_rgb(COLOURS[number % len(COLOURS)]))
            styles[name] = dict(color=colour, ls=("-", "--", "-.", ":")[rank % 4], marker="os^Dv"[rank % 5])
    return styles


def facts_of(result: dict) -> list[tuple[str, str, float]]:
    return [(model["name"], model["family"], model["size"]) for model in result["models"]]


def plain(values: list) -> list[float]:
    """For matplotlib, which leaves out NaN."""
    return [math.nan if value is None else value for value in values]


def log_if_positive(panel) -> None:
    """A logarithmic y axis where every number drawn is above 0 and they are far apart."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    values = [float(y) for line in panel.get_lines() for y in line.get_ydata() if math.isfinite(y)]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(NullFormatter())
        if max(values) < 1000 * min(values):  # powers of ten alone would be one or two ticks
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def over_layers(panel, words: str) -> None:
    """Titles a panel whose x axis is the number of the layer."""
    from matplotlib.ticker import MaxNLocator

    panel.set_title(words, fontsize=10)
    panel.set_xlabel("BatchNorm, in order of registration", fontsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def save(figure, path: Path, title: str) -> None:
    figure.suptitle(textwrap.fill(title, 150), fontsize=11)
    write_atomic(path, lambda tmp: figure.savefig(tmp, format="png", dpi=100))


def deep_layer(layers: list[tuple[str, Tensor, Tensor]]) -> int:
    """Index of the last BatchNorm that is not a shortcut's (registered last in a block, but not the block's last)."""
    main = [i for i, (name, _, _) in enumerate(layers) if "downsample" not in name and "shortcut" not in name]
    return (main or range(len(layers)))[-1]


def plot_channels(path: Path, models: list[Model], vectors: dict[str, list], title: str) -> None:
    """Means and variances over channels, raw and scale-free; a row a model, the y axis of a column is one for all."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    styles = line_styles([(model.name, model.family, model.size) for model in models])
    figure = Figure(figsize=(18, 1.3 + 1.35 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 8, sharey="col", squeeze=False)
    heads = ("$\\mu$, raw", "$\\sigma^2$, raw", "$\\mu/\\sigma$, scale-free", "$\\sigma^2/$mean, scale-free")
    for row, model in zip(panels, models, strict=True):
        layers = vectors[model.name]
        for half, layer in enumerate((0, deep_layer(layers))):
            name, mu, var = layers[layer]
            alike = torch.where(var > 0, mu / var.sqrt(), math.nan)  # a gap where a channel is dead
            for place, v in enumerate((mu, var, alike, free_of_scale(mu, var)[1])):
                panel = row[4 * half + place]
                panel.plot(v.numpy(), lw=0.8, color=styles[model.name]["color"])
                panel.tick_params(labelsize=7)
                panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                if place == 0:
                    box = dict(fc="white", ec="none", alpha=0.7, pad=1)
                    panel.text(0.03, 0.92, name, transform=panel.transAxes, fontsize=7, va="top", bbox=box)
        row[0].set_ylabel(model.name.replace(" ", "\n"), fontsize=8, color=styles[model.name]["color"])
    for column, panel in enumerate(panels[0]):
        panel.set_title(f"{('first', 'deep')[column // 4]}: {heads[column % 4]}", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("channel", fontsize=8)
    save(figure, path, f"{title}: statistics over channels of the first and of a deep BatchNorm")


def plot_depth(path: Path, result: dict) -> None:
    """Every measure over the number of the layer, raw above, scale-free below where it is another one."""
    from matplotlib.figure import Figure

    styles = line_styles(facts_of(result))
    figure = Figure(figsize=(18, 6.5), layout="constrained")
    panels = figure.subplots(2, len(WORDS))
    for column, (measure, (raw, free)) in enumerate(WORDS.items()):
        for row, (kind, words) in enumerate(zip(KINDS, (raw, free), strict=True)):
            panel = panels[row, column]
            if row and raw == free:
                panel.remove()
                continue
            for model in result["models"]:
                y = plain([layer[f"{kind}_{measure}"] for layer in model["layers"]])
                panel.plot(range(1, len(y) + 1), y, lw=1.1, ms=2.5, label=model["name"], **styles[model["name"]])
            either = "raw = scale-free" if raw == free else kind.replace("_", "-")
            over_layers(panel, f"{words}\n({either})")
            if not measure.startswith("kurtosis"):
                log_if_positive(panel)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center", bbox_to_anchor=(0.75, 0.25), ncols=1 + len(labels) // 9)
    save(figure, path, f"{result['title']}: unevenness over channels, by depth")


def plot_entropy(path: Path, result: dict) -> None:
    """The estimators' mean over layers against the models' size, a line a family."""
    from matplotlib.figure import Figure

    styles = line_styles(facts_of(result))
    figure = Figure(figsize=(18, 6.5), layout="constrained")
    panels = figure.subplots(2, 2 * len(ESTIMATORS))
    sizes = sorted({model["size"] for model in result["models"]})
    for row, kind in zip(panels, KINDS, strict=True):
        for column, panel in enumerate(row):
            of, estimator = ("mu", "var")[column // 3], ESTIMATORS[column % 3]
            for family in dict.fromkeys(model["family"] for model in result["models"]):
                own = sorted([m for m in result["models"] if m["family"] == family], key=lambda m: m["size"])
                y = plain([model["mean"]["entropies"][kind][estimator][of] for model in own])
                colour = styles[own[-1]["name"]]["color"]
                panel.plot([model["size"] for model in own], y, "o-", lw=1.2, ms=4, color=colour, label=family)
            words = {"mu": ("$\\mu$", "$\\mu/\\sigma$"), "var": ("$\\sigma^2$", "$\\sigma^2/$mean")}[of]
            words = f"{words[KINDS.index(kind)]} ({kind.replace('_', '-')})"
            panel.set_title(f"{ESTIMATOR_WORDS[estimator]}, {words}", fontsize=9)
            panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
    for panel in panels[-1]:
        panel.set_xlabel("size of the model")
    for row in panels:
        row[0].set_ylabel("nats, mean over layers")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    save(figure, path, f"{result['title']}: entropy of the statistics over channels")


def plot_signal(path: Path, result: dict) -> None:
    """L_BN of noise, real and recovered images with noise / real, and the gradient's norm layer by layer."""
    from matplotlib.figure import Figure

    styles, models = line_styles(facts_of(result)), result["models"]
    figure = Figure(figsize=(14, max(4.5, 1.5 + 0.5 * len(models))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for y, model in enumerate(models):
        colour = styles[model["name"]]["color"]
        values = plain([model["signal"][key] for key in ("noise", "real", "recovered")])
        left.plot(values, [y] * 3, color=colour, lw=0.8)
        for value, marker in zip(values, "os^", strict=True):
            left.plot(value, y, marker, color=colour, ms=7)
        if known(model["signal"]["range"]):
            words = f"{model['signal']['range']:.3g}"
            left.text(1.01, y, words, transform=left.get_yaxis_transform(), va="center", fontsize=9)
    for marker, words in zip("os^", ("noise", "real", "recovered"), strict=True):
        left.plot([], [], marker, color="0.4", label=words)
    left.set_yticks(range(len(models)), [model["name"] for model in models])
    left.set(xscale="log", xlabel="$L_{BN}$")
    left.set_title("statistics loss (raw); at the right: noise / real", fontsize=10)
    left.invert_yaxis()
    left.legend(fontsize=8)
    for model in models:
        y = plain(model["signal"]["gradient"])
        right.plot(range(1, len(y) + 1), y, lw=1.1, ms=3, label=model["name"], **styles[model["name"]])
    log_if_positive(right)
    over_layers(right, "norm of the gradient of each layer's term with respect to noise images (raw)")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, path, f"{result['title']}: the signal for recovery")
