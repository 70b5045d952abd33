"""Run folders as one HTML page that needs nothing else: no script, no other file, no network.

    write_report([Path("runs/digits__krr_st__0__20261122-121909")])      # report.html in that folder

Of a run: where it comes from and the command that makes it again, the distilled images, curves against steps and
seconds, the scores with their neighbours, storage, cost, and each distilled image beside the training image nearest to
it, with a check for copies. Of a folder of the evaluator: its tables. Several folders are compared first.

All words from files are escaped, and the page forbids scripts (its Content-Security-Policy) should one be missed.
"""

import ast
import base64
import html
import io
import itertools
import json
import math
import numbers
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from common.artefact import Distilled, load_distilled
from common.data import Data, hold_out, load
from common.run import UserError, first_line, rng, write_atomic
from common.sets import NAMED
from kernels.backend import exact_products

PICTURES = 18.5e6  # bytes of all pictures of a page, so that it stays below 20 MB
PAIRS = 100  # distilled images that are shown beside their nearest real one
PIECE = 4096  # dimensions that are summed in float32 before float64 takes over
BLOCK = 1 << 25  # numbers held at a time in the search for the nearest image
FEW_LEVELS = 4 / 255  # a difference that nobody sees
POINTS = 400  # of a drawn curve; longer ones are averaged
FRACTIONS = {"match", "mse", "loss", "auc"}  # words of measures that are no per cent
INK = "#010203"  # stands for the colour of the page's text inside a drawing


# ---------------------------------------------------------------------------------------------------- the nearest image


def nearest_real(
    x: Tensor, real: Tensor, device: torch.device | str = "cpu", flip: bool = False, skip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each image the nearest real one: index (n,) int64, root mean squared pixel difference (n,) float64 in 0 .. 1,
    and whether that one is mirrored (n,) bool. All on the CPU.

    x: (n, C, H, W) pixel units, clamped to [0, 1] first, as displayed; real: (N, C, H, W) uint8, memory-mapped or not.
    flip: mirrored real images count too. skip: (n,) indices of real images that do not count (an image itself).
    Float32 products only choose candidates: all whose distance could be the smallest one, by a bound on their error,
    are measured in float64. Ties: the lower index, then the plain image. Where nothing counts: index -1, distance inf.
    """
    device = torch.device(device)
    n, dim = len(x), x[0].numel() if len(x) else real[0].numel()
    index = torch.full((n,), -1, dtype=torch.int64)
    mirrored = torch.zeros(n, dtype=torch.bool)
    best = torch.full((n,), math.inf, dtype=torch.float64)  # squared distances
    rows = max(1, min(2048, BLOCK // dim))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        plain = x[part].detach().float().clamp(0, 1)
        views = [plain, plain.flip(3)] if flip else [plain]
        views = [view.reshape(len(plain), dim).to(device) for view in views]
        held = best[part].to(device), index[part].to(device), mirrored[part].to(device)
        skipped = None if skip is None else skip[part].to(device)
        for first in range(0, len(real), rows):
            block = real[first : first + rows].flatten(1).to(device)  # (b, D) uint8
            for number, view in enumerate(views):
                held = _nearer(view, block, first, number == 1, skipped, *held)
        best[part], index[part], mirrored[part] = (value.cpu() for value in held)
    return index, (best / dim).sqrt(), mirrored


def _nearer(view, block, first, is_mirrored, skipped, best, index, mirrored) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest squared distance, index and mirroring after one more block of real images (b, D), the first of which has
    the index `first`. view: (m, D)."""
    a, b = view - 0.5, block.float() / 255 - 0.5  # centred: smaller norms, smaller errors
    product = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    with exact_products(a.device):
        for k in range(0, a.shape[1], PIECE):
            product += a[:, k : k + PIECE] @ b[:, k : k + PIECE].T
    squares_a, squares_b = (sum(p.double().square().sum(1) for p in m.split(PIECE, 1)) for m in (a, b))
    about = squares_a[:, None] + squares_b - 2 * product
    # a sum of PIECE products, in any order, is off by at most about PIECE 2^-24 |a| |b|; the last term is for the
    # rounding of the centred pixels
    off = 2 * (PIECE + 2) * 2**-24 * (squares_a[:, None] * squares_b).sqrt() + a.shape[1] * 2**-24
    if skipped is not None:
        of_block = torch.arange(first, first + len(b), device=a.device)
        about[skipped[:, None] == of_block] = math.inf
    within = torch.minimum(best, (about + off).amin(1))
    pairs = ((about - off <= within[:, None]) & about.isfinite()).nonzero()  # (p, 2): row of view, row of block
    exact = torch.cat(
        [
            (view[i].double() - (block[j].float() / 255).double()).square().sum(1)
            for i, j in (chunk.unbind(1) for chunk in pairs.split(max(1, BLOCK // 8 // a.shape[1])))
        ]
        or [best.new_empty(0)]
    )
    row, column = pairs.unbind(1)
    smallest = torch.full_like(best, math.inf).scatter_reduce(0, row, exact, "amin")
    hit = exact == smallest[row]
    lowest = torch.full_like(index, len(b)).scatter_reduce(0, row[hit], column[hit], "amin")
    better = smallest < best
    return (
        smallest.where(better, best),
        (first + lowest).where(better, index),
        torch.full_like(mirrored, is_mirrored).where(better, mirrored),
    )


def distances_between(real: Tensor, device: torch.device | str, flip: bool, at_most: int) -> Tensor:
    """Distances (m,) of up to `at_most` real images, drawn by a fixed seed, to their nearest other one; see
    nearest_real. Empty for less than two images."""
    if len(real) < 2:
        return torch.empty(0, dtype=torch.float64)
    chosen = torch.randperm(len(real), generator=rng("copy check", len(real)))[:at_most]
    return nearest_real(real[chosen].float() / 255, real, device, flip, skip=chosen)[1]


def contrast(x: Tensor) -> Tensor:
    """Root mean squared deviation of each image (n, C, H, W), clamped to [0, 1], from its mean colour. (n,) float64"""
    x = x.detach().cpu().double().clamp(0, 1).flatten(2)
    return (x - x.mean(2, keepdim=True)).square().mean((1, 2)).sqrt()


def copy_check(distance: Tensor, between: Tensor, own: Tensor | None = None) -> tuple[Tensor, float]:
    """Which distilled images are copies (n,) bool, and the distance up to which they can count as one.

    distance: (n,) of each distilled image to its nearest training image; between: (m,) of training images to their
    nearest other one. The limit is the first percentile of `between`; where a set holds duplicates, which make that
    nothing, four grey levels, but at most half the median of `between` (a set of hardly any contrast). own: (n,) the
    images' contrasts: beyond those few levels, a copy is no farther than half of it, as pale images are near to many.
    """
    if not len(between):
        return distance <= FEW_LEVELS, FEW_LEVELS
    low, middle = torch.quantile(between.double(), torch.tensor([0.01, 0.5], dtype=torch.float64)).tolist()
    few = min(FEW_LEVELS, middle / 2)
    limit = max(low, few)
    near = distance <= limit
    return near if own is None else near & (distance <= (own / 2).clamp(min=few)), limit


# --------------------------------------------------------------------------------------------------------- the folders


def read_json(path: Path):
    """What the file holds, and None; or None, and what is wrong with it in words."""
    try:
        return json.loads(path.read_text()), None
    except FileNotFoundError:
        return None, f"no {path.name}"
    except (OSError, ValueError) as error:
        return None, f"{path.name} cannot be read ({first_line(error)})"


def scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """TensorBoard's scalars of a run: {name: [(step, seconds, value), ...]} in the order of the steps.

    Seconds of the run: each session (an events file) counts from its beginning, on top of what the run had taken at the
    last step that the sessions before it left. What a later session did again replaces what was there.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sessions = []
    for path in folder.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        try:
            events.Reload()
            began = events.FirstEventTimestamp()
            found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        except Exception:  # many kinds, from its own to protobuf's: a file cut short or of something else
            continue
        if found:
            sessions.append((began, found))
    out: dict[str, list[tuple[int, float, float]]] = {}
    for began, found in sorted(sessions, key=lambda session: session[0]):
        again = min(event.step for events in found.values() for event in events)
        out = {tag: [point for point in points if point[0] < again] for tag, points in out.items()}
        before = max((seconds for points in out.values() for _, seconds, _ in points), default=0.0)
        for tag, events in found.items():
            points = {event.step: (event.step, before + event.wall_time - began, event.value) for event in events}
            out[tag] = out.get(tag, []) + [points[step] for step in sorted(points)]
    return {tag: points for tag, points in out.items() if points}


def storage(path: Path) -> dict[str, int]:
    """Bytes of images, labels (or targets), normalisation and whitening in an artefact, and of the whole file."""
    sizes = {"images": 0, "labels": 0, "normalisation": 0, "whitening": 0}
    parts = dict(x="images", mean="normalisation", std="normalisation", zca="whitening", zca_mean="whitening")
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a dict)
            codes = key.removesuffix("_scale").endswith("_x")  # c_x, b_x, mu_x of common/bases.py
            sizes[parts.get(key, "images" if codes else "labels")] += file.get_tensor(key).nbytes
    return sizes | {"file": path.stat().st_size}


def own_defaults(folder: Path) -> dict[str, tuple[str, object]]:
    """{flag: (annotation, default)} of the Args in the folder's script.py, read without running it; {} if it cannot."""
    try:
        tree = ast.parse((folder / "script.py").read_text())
        args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
        lines = [node for node in args.body if isinstance(node, ast.AnnAssign) and node.value is not None]
        return {node.target.id: (ast.unparse(node.annotation), ast.literal_eval(node.value)) for node in lines}
    except (OSError, ValueError, SyntaxError, StopIteration, AttributeError):
        return {}


def command(program: str, args: dict, defaults: dict[str, tuple[str, object]]) -> str:
    """The command line that makes these flags, without those at their default. `defaults`: see own_defaults."""
    words = []
    for name, value in args.items():
        annotation, default = defaults.get(name, (None, None))
        value = tuple(value) if isinstance(value, list) else value
        if name == "resume" or value is None or value == default:
            continue
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool) and annotation in (None, "bool"):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return f"python {program} {shlex.join(words)}".rstrip()


def read_run(folder: Path) -> dict:
    """All that the files of a run folder say, and under "missing" what they do not, in words.

    Raises UserError for a folder that is no run's.
    """
    args, wrong = read_json(folder / "args.json")
    result, no_result = read_json(folder / "result.json")
    missing = []
    if not isinstance(result, dict):
        missing.append(f"{no_result or 'result.json holds no facts'}: the run has not ended")
        result = {}
    if wrong and isinstance(result.get("args"), dict) and result.get("method") == "evaluate":
        args, wrong = result["args"], None
    if wrong or not isinstance(args, dict):
        raise UserError(f"--report {folder}: {wrong or 'args.json holds no flags'}; name a run folder")
    curve, no_curve = read_json(folder / "curve.json")
    parts = folder.resolve().name.rsplit("__", 3)  # data, script, seed, time
    run = dict(folder=folder, args=args, result=result, parts=parts if len(parts) == 4 else None, distilled=None)
    run["method"] = str(result.get("method") or (parts[1] if len(parts) == 4 else "unknown"))
    run["evaluator"] = run["method"] == "evaluate"
    path = folder / "distilled.safetensors"
    if not run["evaluator"]:
        try:
            run["distilled"] = load_distilled(path)
        except UserError as error:
            missing.append(f"no distilled set: {error}")
        if not isinstance(curve, list):
            missing.append(f"{no_curve or 'curve.json holds no curve'}: no evaluation while it distilled")
    run["scalars"] = scalars(folder)
    if not run["scalars"] and not run["evaluator"]:
        missing.append("no TensorBoard events: no curve of the loss")
    run["curve"] = [point for point in curve if is_point(point)] if isinstance(curve, list) else []
    return run | dict(missing=missing)


def is_point(point) -> bool:
    return isinstance(point, dict) and is_number(point.get("step"))


# --------------------------------------------------------------------------------------------------------------- words


def esc(value) -> str:
    return html.escape(str(value), quote=True)


def plain(name) -> str:
    """A name as in files, as words."""
    return str(name).replace("_", " ")


def is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_cell(value) -> bool:
    return isinstance(value, dict) and is_number(value.get("mean"))


def is_rows(value) -> bool:
    """Whether it is {row: {column: {"mean": ...}}}."""
    rows = list(value.values()) if isinstance(value, dict) else []
    return bool(rows) and all(isinstance(row, dict) and row and all(map(is_cell, row.values())) for row in rows)


def in_per_cent(measure: str) -> bool:
    return not FRACTIONS & set(re.split(r"[\W_]+", str(measure).lower()))


def score(cell, measure: str) -> str:
    """Mean ± std of a cell: an accuracy in per cent with one decimal, an error as it is with three. "-" for none."""
    if not is_cell(cell):
        return "-"
    scale, digits = (100, 1) if in_per_cent(measure) else (1, 3)
    text = f"{scale * cell['mean']:.{digits}f}"
    spread = cell.get("std", cell.get("se"))
    return f"{text} ± {scale * spread:.{digits}f}" if is_number(spread) else text


def size_words(count) -> str:
    return f"{int(count):,} bytes" if is_number(count) else "-"


def seconds_words(seconds) -> str:
    if not is_number(seconds):
        return "-"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min ({seconds:.0f} s)"


def memory_words(count) -> str:
    return f"{count / 1e9:.2f} GB" if is_number(count) else "-"


def value_words(value) -> str:
    """A flag's or a fact's value."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(value_words, value))
    return json.dumps(value) if isinstance(value, dict) else "none" if value is None else str(value)


def short(value) -> str:
    """A hash in ten digits; whatever else as it is."""
    return str(value)[:10] if re.fullmatch(r"[0-9a-f]{40,}(\+changes)?", str(value)) else str(value)


# -------------------------------------------------------------------------------------------------------- parts of HTML


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], caption: str = "", mark: str = "") -> str:
    """head: words over the columns, the first over the rows' names; rows: (name, cells), all of them plain words, which
    are escaped here. mark: the name of a row that stands out."""
    out = [f"<caption>{esc(caption)}</caption>"] if caption else []
    out.append("<thead><tr>" + "".join(f'<th scope="col">{esc(word)}</th>' for word in head) + "</tr></thead><tbody>")
    for name, cells in rows:
        style = ' class="mark"' if mark and name == mark else ""
        data = "".join(f"<td>{esc(cell)}</td>" for cell in cells)
        out.append(f'<tr{style}><th scope="row">{esc(name)}</th>{data}</tr>')
    return f'<div class="wide"><table>{"".join(out)}</tbody></table></div>'


def note(words: str) -> str:
    return f'<p class="note">{esc(words)}</p>'


def png(x: Tensor) -> bytes:
    """A PNG of one picture (C, H, W) in pixel units: clamped for display, transparent where it is NaN; not enlarged,
    the page does that."""
    x = x.detach().float().cpu()
    x = x if len(x) in (1, 3) else x.mean(0, keepdim=True)
    pixels = torch.cat([x.nan_to_num(0.5).clamp(0, 1), (~x[:1].isnan()).float()])
    pixels = (pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy()  # (H, W, 2 or 4)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


def image(data: bytes, scale: int, words: str) -> str:
    """An image of the page, from the bytes of a PNG; scale: screen pixels a pixel."""
    width = scale * int.from_bytes(data[16:20], "big")  # where a PNG says so
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return f'<img src="{uri}" width="{width}" alt="{esc(words)}">'


def enlarged(size: int, at_least: int = 48) -> int:
    """How many screen pixels wide a pixel is."""
    return max(1, math.ceil(at_least / size))


def sprite(x: Tensor, per_row: int) -> Tensor:
    """Images (n, C, H, W) as one picture, row by row, NaN between them: a pixel wide, two from 24 px on."""
    n, c, h, w = x.shape
    gap = 1 if w < 24 else 2
    rows = -(-n // per_row)
    out = torch.full((c, rows * (h + gap) - gap, per_row * (w + gap) - gap), math.nan)
    for i in range(n):
        top, left = i // per_row * (h + gap), i % per_row * (w + gap)
        out[:, top : top + h, left : left + w] = x[i].nan_to_num(0.5)
    return out


def thinned(points: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Points (n, k) as at most POINTS, each the mean of as many neighbours as the others (the last of fewer)."""
    values = np.asarray(points, dtype=np.float64)
    each = -(-len(values) // POINTS)
    return np.stack([values[i : i + each].mean(0) for i in range(0, len(values), each)])


def drawing(points: Sequence[tuple[float, float, float]], number: int, dots: bool, reference: float | None) -> str:
    """Values against steps and against seconds, points (step, seconds, value), as SVG inside the page.

    number: of the drawing, which keeps its ids apart from those of others. reference: a dashed level.
    """
    import matplotlib
    from matplotlib.figure import Figure

    values = thinned(points)
    axes_of = [(0, "steps"), (1, "seconds")]
    look = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 8, "font.family": "sans-serif"}
    look |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    shown = values[:, 2] if reference is None else np.append(values[:, 2], reference)
    logarithmic = shown.min() > 0 and shown.max() > 20 * shown.min()
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(7.2, 2.1), layout="constrained")
        for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), axes_of, strict=True):
            axes.plot(values[:, column], values[:, 2], "o-" if dots else "-", color="#3b82d6", lw=1.2, ms=3.5)
            if reference is not None:
                axes.axhline(reference, color=INK, lw=0.8, ls="--")
            axes.set(xlabel=label, yscale="log" if logarithmic else "linear")
            axes.spines[["top", "right"]].set_visible(False)
            axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", svg)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="d{number}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#d{number}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"\n\s*", " ", svg)
    return svg.replace(INK, "currentColor").replace("<svg", '<svg role="img"', 1)


# ------------------------------------------------------------------------------------------------------------- sections


def provenance(run: dict) -> str:
    """Where the numbers come from, every flag, and the command that makes them again."""
    result, args, distilled = run["result"], run["args"], run["distilled"]
    meta = distilled.meta if distilled else {}
    facts = {"method": run["method"], "data": result.get("data") or (distilled and distilled.data) or args.get("data")}
    if run["evaluator"]:
        facts["kind"] = result.get("kind")
    facts["content of the data (sha256)"] = meta.get("content") or result.get("content")
    for key, words in (("teacher", "teacher"), ("squeeze", "squeezed network"), ("label_teacher", "label teacher")):
        teacher = result.get(key) or meta.get(key)
        if isinstance(teacher, dict):
            facts[words] = teacher.get("name") or teacher.get("arch")
            facts[f"{words}'s weights (sha256)"] = teacher.get("weights_sha256")
    if distilled:
        facts |= {"distilled images": len(distilled.x), "labels are": distilled.y_is, "step": distilled.step}
    facts |= {"seed": result.get("seed", args.get("seed")), "commit": result.get("commit") or meta.get("commit")}
    facts["versions"] = result.get("versions") and ", ".join(f"{k} {v}" for k, v in dict(result["versions"]).items())
    facts |= {"device": result.get("device"), "backend": result.get("backend")}
    stamp = run["parts"] and re.match(r"(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)", run["parts"][3])
    facts["started"] = stamp and "{}-{}-{} {}:{}:{}".format(*stamp.groups())
    facts["folder"] = run["folder"]
    rows = [(key, [value_words(value)]) for key, value in facts.items() if value not in (None, "")]
    program = "-m common.evaluate" if run["evaluator"] else f"{run['method']}.py"
    again = result.get("command") or command(program, args, own_defaults(run["folder"]))
    flags = table(["flag", "value"], [(key, [value_words(value)]) for key, value in args.items()])
    changes = "+changes" in str(facts["commit"])
    return (
        table(["fact", "value"], rows).replace("<table>", '<table class="facts">')
        + f"<p>The command that makes it again:</p><pre>{esc(again)}</pre>"
        + (note("The sources differed from that commit.") if changes else "")
        + f"<details><summary>All {len(args)} flags</summary>{flags}</details>"
    )


def picture_rows(n: int, ipc) -> int:
    """Images in a row of the grid: whole classes where there are `ipc` images of each."""
    if not isinstance(ipc, int) or isinstance(ipc, bool) or not 1 < ipc <= 40:
        return max(1, min(n, 10 if n <= 100 else 25))
    return ipc if n // ipc <= 20 else ipc * max(1, 20 // ipc)


def without_views(distilled: Distilled) -> Tensor:
    """The images (m, C, H, W) of the set; of one that is stored with fixed views, without the views."""
    return distilled.x[: int(distilled.meta.get("num_images", len(distilled.x)))]


def grid(run: dict, room: float) -> str:
    """The distilled images as one picture of at most `room` bytes in the page."""
    distilled = run["distilled"]
    x = without_views(distilled)
    ipc = run["result"].get("ipc", run["args"].get("ipc"))
    per_row, shown = picture_rows(len(x), ipc), len(x)
    while True:
        data = png(sprite(x[:shown], per_row))
        if len(data) * 4 / 3 <= room or shown <= per_row:
            break
        shown = max(per_row, int(min(0.97, 0.98 * room / (len(data) * 4 / 3)) * shown) // per_row * per_row)
    words = f"{shown} distilled images of {distilled.size} px"
    if shown < len(x):
        words = f"The first {shown} of {len(x)} distilled images of {distilled.size} px, so that the page stays small"
    if per_row == ipc and len(distilled.class_names) * ipc == len(x):
        words += "; one row a class"
    if len(x) < len(distilled.x):
        words += f"; {len(distilled.x) // len(x) - 1} fixed views of each, which cost nothing, are not shown"
    low, high = float(x.min()), float(x.max())
    words += f"; pixels from {low:.2f} to {high:.2f}, clamped to 0 .. 1 for display, enlarged without smoothing."
    picture = image(data, enlarged(distilled.size), words)
    return f'<figure class="grid">{picture}<figcaption>{esc(words)}</figcaption></figure>'


def curves(run: dict, numbering: Iterator[int]) -> str:
    """The logged scalars, the loss first, and the evaluation curve, against steps and seconds."""
    found, rows, out = run["scalars"], run["result"].get("eval"), []
    random_real = rows.get("random_real", {}) if is_rows(rows) else {}

    def add(words: str, points, dots: bool = False, reference: float | None = None) -> None:
        points = [point for point in points if all(map(math.isfinite, point))]
        if points:
            each = -(-len(points) // POINTS)
            words += f" (each point the mean of {each} log points)" if each > 1 else ""
            words += "; dashed: random real images" if reference is not None else ""
            svg = drawing(points, next(numbering), dots, reference)
            out.append(f'<figure class="curve"><figcaption>{esc(words)}</figcaption>{svg}</figure>')

    tags = sorted((tag for tag in found if not tag.startswith("eval/")), key=lambda tag: tag != "loss")
    if tags:
        out.append(note("Seconds of the run: evaluations on the way are in them, gaps between sessions are not."))
    elif run["curve"]:
        out.append(note("There are no times: the right panels show steps too."))
    for tag in tags:
        add(plain(tag), found[tag])
    clock = found[tags[0]] if tags else [(point["step"], point["step"], 0.0) for point in run["curve"]]
    steps, seconds = ([point[i] for point in sorted(clock)] for i in (0, 1))
    for measure in dict.fromkeys(key for point in run["curve"] for key in point if key != "step"):
        points = []
        for point in sorted(run["curve"], key=lambda point: point["step"]):
            value = point.get(measure)
            value = value.get("mean") if isinstance(value, dict) else value
            if is_number(value):
                points.append((point["step"], float(np.interp(point["step"], steps, seconds)), value))
        neighbour = random_real.get(measure)
        add(f"evaluation: {plain(measure)}", points, True, neighbour["mean"] if neighbour else None)
    return "".join(out)


def score_table(rows: dict, caption: str) -> str:
    """{row: {measure: {"mean", "std", "values"}}} as a table; the row of random real images is always there."""
    measures = list(dict.fromkeys(key for row in rows.values() for key in row))
    if "distilled" in rows and "random_real" not in rows:
        rows = {"random_real": {}} | rows
    lines = [(plain(name), [score(row.get(m), m) for m in measures]) for name, row in rows.items()]
    runs = {len(cell["values"]) for row in rows.values() for cell in row.values() if is_list(cell.get("values"))}
    over = f" over {'/'.join(map(str, sorted(runs)))} networks" if runs else ""
    units = "accuracies in per cent" if any(map(in_per_cent, measures)) else ""
    units += (", errors " if units else "errors ") + "as they are" if not all(map(in_per_cent, measures)) else ""
    return table(["", *map(plain, measures)], lines, f"{caption}: mean ± sample std{over}; {units}.", "distilled")


def difference_table(rows: dict) -> str:
    """{other row: {measure: {"mean", "se"}}}: what the distilled set has more than other rows."""
    measures = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [(f"distilled - {plain(name)}", [score(row.get(m), m) for m in measures]) for name, row in rows.items()]
    return table(["", *map(plain, measures)], lines, "Paired difference: mean ± standard error.")


def is_list(value) -> bool:
    return isinstance(value, list) and len(value) > 0


def scores(run: dict) -> str:
    """Every table of the result: rows with their neighbours, differences, and what applications measured."""
    result, out = run["result"], []
    if is_rows(result.get("eval")):
        out.append(score_table(result["eval"], "Scores on the test images"))
        out.append(note("Random real: as many random training images, treated the same way."))
    for key, value in result.items():
        parts = (
            list(value.items()) if isinstance(value, dict) and key not in ("eval", "cells", "rows", "curves") else []
        )
        if key.startswith("distilled_minus"):  # _random_real: {measure: cell}; else {other row: {measure: cell}}
            rows = value if is_rows(value) else {key.removeprefix("distilled_minus_"): value}
            out.append(difference_table(rows) if is_rows(rows) else "")
        elif parts and is_rows(value):
            out.append(score_table(value, plain(key)))
        elif parts and all(is_rows(rows) for _, rows in parts):  # eval_models: {model: rows}
            out += [score_table(rows, f"{plain(key)}: {plain(name)}") for name, rows in parts]
    series = result.get("curves")  # of applications: {row: {measure: [{"at", "mean", ...}]}}
    if isinstance(series, dict):
        rows = {name: row for name, row in series.items() if isinstance(row, dict)}
        for measure in dict.fromkeys(key for row in rows.values() for key in row):
            points = {name: row[measure] for name, row in rows.items() if is_list(row.get(measure))}
            points = {name: [p for p in each if is_cell(p) and "at" in p] for name, each in points.items()}
            stops = list(dict.fromkeys(p["at"] for each in points.values() for p in each))
            by_stop = {name: {p["at"]: score(p, measure) for p in each} for name, each in points.items()}
            lines = [(plain(name), [cells.get(stop, "-") for stop in stops]) for name, cells in by_stop.items()]
            caption = f"{plain(result.get('application', 'application'))}: {plain(measure)}, mean ± std (or its error)"
            out.append(table(["at", *map(str, stops)], lines, caption, "distilled"))
    return "".join(out) or note("There are no scores: the run did not get to its evaluation.")


def cell_tables(run: dict) -> str:
    """The evaluator's cells: one table per protocol and measure; rows by name, columns by target and model."""
    result, out = run["result"], []
    cells = result.get("cells")
    cells = [cell for cell in cells if is_cell(cell)] if isinstance(cells, list) else []
    facts = result.get("rows") if isinstance(result.get("rows"), dict) else {}
    groups = dict.fromkeys((str(cell.get("protocol")), str(cell.get("metric"))) for cell in cells)
    for protocol, metric in groups:
        group = [cell for cell in cells if (str(cell.get("protocol")), str(cell.get("metric"))) == (protocol, metric)]
        columns = list(dict.fromkeys((str(cell.get("target")), str(cell.get("model"))) for cell in group))
        varies = [len({column[i] for column in columns}) > 1 for i in (0, 1)]
        fixed = [columns[0][i] for i in (0, 1) if not varies[i]]
        head = [", ".join(part for part, free in zip(c, varies, strict=True) if free) or c[1] for c in columns]
        names = dict.fromkeys([name for name in facts if any(str(cell.get("row")) == name for cell in group)])
        names |= dict.fromkeys(str(cell.get("row")) for cell in group)
        by_place = {(str(c.get("row")), (str(c.get("target")), str(c.get("model")))): c for c in group}
        lines = [(plain(n), [score(by_place.get((n, column)), metric) for column in columns]) for n in names]
        runs = sorted({len(cell["values"]) for cell in group if is_list(cell.get("values"))})
        over = f" over {'/'.join(map(str, runs))}" if runs else ""
        unit = ", per cent" if in_per_cent(metric) else ""
        caption = ", ".join(map(plain, [protocol, metric, *fixed])) + f": mean ± sample std{over}{unit}."
        out.append(table(["", *map(plain, head)], lines, caption))
    if facts:
        facts = {name: row if isinstance(row, dict) else {"": row} for name, row in facts.items()}
        keys = dict.fromkeys(key for row in facts.values() for key in row)
        keys = [key for key in keys if not any(isinstance(row.get(key), dict) for row in facts.values())]
        words = {name: {k: short(value_words(value)) for k, value in row.items()} for name, row in facts.items()}
        lines = [(plain(name), [row.get(key, "-") for key in keys]) for name, row in words.items()]
        out.append(table(["row", *map(plain, keys)], lines, "What the rows are."))
        nested = {name: {key: row[key] for key in row if key not in keys} for name, row in facts.items()}
        text = esc(json.dumps({name: of for name, of in nested.items() if of}, indent=1))
        out.append(f"<details><summary>Schedules and teachers of the rows</summary><pre>{text}</pre></details>")
    out.append(differences(result))
    return "".join(out) or note("There are no cells: nothing was scored.")


def differences(result: dict) -> str:
    """What the evaluator compared network by network: sets to random images, and DD-Ranking's two measures."""
    out, paired = [], result.get("minus_random")
    lines = [
        (
            ", ".join(plain(pair.get(key, "")) for key in ("row", "protocol", "target", "model", "metric")),
            [signed(pair)],
        )
        for pair in (paired if is_list(paired) else [])
        if isinstance(pair, dict)
    ]
    if lines:
        out.append(table(["minus the random row, paired", ""], lines, "Mean ± standard error over networks."))
    ranking = result.get("ranking")
    lines = [
        (f"{plain(name)}: {plain(what)}", [signed({**pair, "metric": "accuracy"})])
        for name, measures in (ranking.items() if isinstance(ranking, dict) else ())
        for what, pair in (measures.items() if isinstance(measures, dict) else ())
        if isinstance(pair, dict)
    ]
    if lines:
        words = "In points of accuracy, mean ± standard error over networks; of recovery less is better."
        out.append(table(["hard labels and random images", ""], lines, words))
    return "".join(out)


def signed(pair: dict) -> str:
    """A paired difference with its standard error over networks: points of accuracy, or of the matching error."""
    mean, se = pair.get("mean"), pair.get("se_networks")
    if not isinstance(mean, (int, float)) or not isinstance(se, (int, float)):
        return "-"
    scale, digits = (100, 1) if in_per_cent(str(pair.get("metric"))) else (1, 3)
    return f"{scale * mean:+.{digits}f} ± {scale * se:.{digits}f}"


def cost(run: dict) -> str:
    """Bytes by part, seconds and memory."""
    result, distilled, out = run["result"], run["distilled"], []
    if distilled:
        sizes = storage(run["folder"] / "distilled.safetensors")
        names = {"images": "images", "labels": "labels or targets", "normalisation": "mean and std",
                 "whitening": "whitening", "file": "the file, with its description"}  # fmt: skip
        lines = [(names[key], [size_words(size)]) for key, size in sizes.items()]
        extra = distilled.meta.get("label_bytes", result.get("label_bytes"))
        if extra:
            lines.append(("labels kept for every epoch, beside the file", [size_words(extra)]))
        out.append(table(["storage", ""], lines))
    lines = [
        ("seconds", seconds_words(result.get("seconds"))),
        ("seconds per 100 steps", seconds_words(result.get("seconds_per_100_steps"))),
        ("peak memory", memory_words(result.get("peak_memory_bytes"))),
    ]
    teacher = result.get("teacher")
    if isinstance(teacher, dict) and "seconds" in teacher:
        lines.append(("the teacher's training, once", seconds_words(teacher["seconds"])))
    out.append(table(["cost", ""], [(key, [value]) for key, value in lines]))
    return "".join(out)


def source_data(run: dict, data_dir: Path) -> Data:
    """The training images that the run saw, by its own flags. Raises UserError if they cannot be had."""
    args, distilled = run["args"], run["distilled"]
    name = str(args.get("data") or distilled.data)
    # frepo.py, isa.py and scdd.py take some named sets at sizes of their own
    size = args.get("size") or (distilled.size if name in NAMED else None)
    flags = dict(resize="resize", channels="channels", test_fraction="test_fraction", seed="split_seed",
                 skip_bad_images="skip_bad_images")  # fmt: skip
    given = {key: args[flag] for key, flag in flags.items() if args.get(flag) is not None}
    try:
        data = load(name, data_dir=data_dir, size=size, **given)
        if args.get("holdout"):
            data = hold_out(data, args["holdout"], args.get("split_seed", 0))[0]
    except UserError:
        raise
    except Exception as error:  # whatever a library says of a set that is not there
        raise UserError(f"{name} cannot be read ({first_line(error)})") from None
    if data.x_train.shape[1:] != distilled.x.shape[1:]:
        shapes = ("x".join(map(str, shape)) for shape in (data.x_train.shape[1:], distilled.x.shape[1:]))
        raise UserError("its images are {}, the distilled ones {}".format(*shapes))
    return data


def verdict(copies: Tensor, limit: float, distance: Tensor, checked: int) -> str:
    """What the copy check says, in words. checked: training images that gave the limit."""
    count, n = int(copies.sum()), len(copies)
    if count:
        numbers = ", ".join(str(int(i)) for i in copies.nonzero()[:20, 0]) + (", ..." if count > 20 else "")
        are = "image is a copy" if n == 1 else "images are copies"
        said = f"{count} of {n} distilled {are} of training images, or nearly: number {numbers}."
    else:
        said = f"No copies: none of {n} distilled images is so near to a training image."
    why = f"the first percentile of the distance from {checked} training images to their nearest other one"
    why += ", and half of the image's own contrast"
    if limit <= FEW_LEVELS:
        why = "what hardly anybody sees"
    return (
        f"{said} The limit is a root mean squared pixel difference of {limit:.4f}, {why}; the smallest found is "
        f"{float(distance.min()):.4f}, the median {float(distance.median()):.4f}. Copies that are shifted, turned or "
        f"of other colours are not recognised."
    )


def nearest(run: dict, data_dir: Path, room: float) -> str:
    """Each distilled image beside the training image nearest to it, the nearest first, and the copy check."""
    distilled = run["distilled"]
    try:
        data = source_data(run, data_dir)
    except UserError as error:
        return note(f"The training images cannot be had, so nothing is compared with them: {first_line(error)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # others have no float64
    x = without_views(distilled)
    index, distance, mirrored = nearest_real(x, data.x_train, device, data.flip)
    sample = 1000 if data.x_train.numel() <= 2e8 else 200  # each costs as much as a distilled image
    between = distances_between(data.x_train, device, data.flip, sample)
    copies, limit = copy_check(distance, between, contrast(x))
    said = esc(verdict(copies, limit, distance, len(between)))
    out = [f'<p class="verdict {"bad" if copies.any() else "good"}">{said}</p>']
    content = distilled.meta.get("content")
    if content and content != data.content:
        out.append(note(f"The data here is not what the run saw (content {data.content[:10]}, not {content[:10]})."))
    of_classes = distilled.y_is != "teacher features" and distilled.y.shape[1:] == (len(distilled.class_names),)
    scale, spent, shown = enlarged(distilled.size), 0.0, 0
    figures = []
    for i in distance.argsort(stable=True)[:PAIRS].tolist():
        j = int(index[i])
        if j < 0:  # an image that is not finite
            continue
        real = data.x_train[j].float() / 255
        pair = torch.stack([x[i].cpu(), real.flip(2) if mirrored[i] else real])
        picture = png(sprite(pair, 2))
        spent += len(picture) * 4 / 3 + 400
        if spent > room:
            break
        shown += 1
        levels = 255 * float(distance[i])
        words = f"{float(distance[i]):.4f} ({levels:.1f} levels)" + (", a copy" if copies[i] else "")
        of = f"number {i}" + (f", {distilled.class_names[int(distilled.y[i].argmax())]}" if of_classes else "")
        named = data.y_train is not None and data.class_names
        by = f"training image {j}" + (f", {data.class_names[int(data.y_train[j])]}" if named else "")
        by += ", mirrored" if mirrored[i] else ""
        alt = f"distilled image {i} beside training image {j}"
        lines = f"<b>{esc(words)}</b><br>{esc(of)}<br>{esc(by)}"
        style = ' class="copy"' if copies[i] else ""
        figures.append(f"<figure{style}>{image(picture, scale, alt)}<figcaption>{lines}</figcaption></figure>")
    some = f"All {shown}" if shown == len(x) else f"The {shown} nearest of {len(x)}"
    words = f"{some}: the distilled image left, the training image nearest to it right, and the root mean squared "
    words += "difference between their pixels (clamped to 0 .. 1"
    words += "; mirrored training images count too)." if data.flip else "; mirrored images do not count in this set)."
    return "".join([*out, f"<p>{esc(words)}</p>", f'<div class="pairs">{"".join(figures)}</div>'])


def main_measure(run: dict) -> tuple[str, str, str]:
    """The first measure of the run's table in words, distilled and random real."""
    rows = run["result"].get("eval")
    if not is_rows(rows) or "distilled" not in rows:
        return "-", "-", "-"
    measure = next(iter(rows["distilled"]))
    words = plain(measure) + (" %" if in_per_cent(measure) else "")
    return words, score(rows["distilled"][measure], measure), score(rows.get("random_real", {}).get(measure), measure)


def comparison(runs: list[dict]) -> str:
    """One row a run: method, data, images, bytes, main measure, seconds, memory."""
    lines = []
    for i, run in enumerate(runs):
        result, distilled = run["result"], run["distilled"]
        size = distilled.meta.get("storage_bytes") if distilled else result.get("storage_bytes")
        size = size + (distilled.meta.get("zca_bytes") or 0) if distilled and is_number(size) else size
        data = result.get("data") or (distilled.data if distilled else run["args"].get("data"))
        images = len(without_views(distilled)) if distilled else "-"
        costs = [seconds_words(result.get("seconds")), memory_words(result.get("peak_memory_bytes"))]
        cells = [run["method"], value_words(data), str(images), size_words(size), *main_measure(run), *costs]
        lines.append((f"{i + 1}. {run['folder'].resolve().name}", cells))
    head = ["run", "method", "data", "images", "storage", "measure", "distilled", "random real", "time", "memory"]
    return table(head, lines, "Storage with labels and whitening; the first measure of each run's table.")


STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d4d4d4; --soft: #f3f4f6; --blue: #1d5fb4;
  --good: #12702f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --line: #3c4048; --soft: #22252b;
  --blue: #7db2f5; --good: #6fcf8b; --bad: #ff8a80; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; max-width: 68rem;
  margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; } h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
a { color: var(--blue); }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; font-size: .85em; opacity: .8; padding-top: .3rem; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child { text-align: left; font-weight: normal; padding-left: 0; } thead th, thead th:first-child {
  font-weight: 600; } tr.mark th, tr.mark td { font-weight: 700; background: var(--soft); }
td { white-space: nowrap; } table.facts :is(td, th), details :is(td, th) { text-align: left; max-width: 48rem;
  white-space: normal; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.note { font-size: .9em; opacity: .85; } .verdict { border-left: 4px solid var(--good); padding-left: .8rem; }
.verdict.bad { border-color: var(--bad); }
figure { margin: .6rem 0; } figcaption { font-size: .85em; }
img { image-rendering: pixelated; max-width: 100%; height: auto; } .grid img { display: block; }
svg { display: block; max-width: 100%; height: auto; } svg * { stroke-linejoin: round; stroke-linecap: butt; }
.pairs { display: flex; flex-wrap: wrap; gap: .8rem; } .pairs figure { margin: 0; max-width: 14rem;
  overflow-wrap: anywhere; } .pairs .copy { outline: 3px solid var(--bad); outline-offset: 3px; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } figure, tr, .verdict { break-inside: avoid; }
  h2, h3 { break-after: avoid; } pre, .wide { overflow: visible; } }
"""


def write_report(folders: list[Path], out: Path | None = None, data_dir: Path = Path("data")) -> Path:
    """Write the page of these run folders and return where: `out`, or report.html in the first folder.

    data_dir: where the source sets are. Raises UserError for a folder without args.json, before anything is written.
    """
    if not folders:
        raise UserError("--report: name at least one run folder")
    runs = [read_run(Path(folder)) for folder in folders]
    out = Path(folders[0]) / "report.html" if out is None else Path(out)
    room = PICTURES / len(runs)
    numbering = itertools.count()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    written = time.strftime("%Y-%m-%d %H:%M")
    title = runs[0]["folder"].resolve().name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Report: {esc(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>Report: {esc(title)}</h1>",
        "<p>Dataset distillation: a few synthetic images on which a network trains almost as well as on a large set. "
        f"What these runs made, from what, at what cost, and how it compares. Written {written}.</p>",
    ]
    if len(runs) > 1:
        links = "".join(f'<li><a href="#run-{i}">{esc(run["folder"])}</a></li>' for i, run in enumerate(runs, 1))
        parts.append(f"<h2>Comparison</h2>{comparison(runs)}<ol>{links}</ol>")
    for i, run in enumerate(runs, 1):
        parts.append(f'<section id="run-{i}"><h2>{esc(run["folder"].resolve().name)}</h2>')
        parts += [note(f"Missing: {words}.") for words in run["missing"]]
        parts.append(f"<h3>Where it comes from</h3>{provenance(run)}")
        if run["evaluator"]:
            parts.append(f"<h3>Scores</h3>{cell_tables(run)}")
        else:
            compared = nearest(run, Path(data_dir), room / 6) if run["distilled"] else ""
            if run["distilled"]:
                parts.append(f"<h3>Distilled images</h3>{grid(run, room - len(compared))}")
            parts.append(f"<h3>Scores</h3>{scores(run)}")
            if drawn := curves(run, numbering):
                parts.append(f"<h3>Curves</h3>{drawn}")
        parts.append(f"<h3>Storage and cost</h3>{cost(run)}")
        if run["distilled"]:
            parts.append(f"<h3>The nearest training images</h3>{compared}")
        parts.append("</section>")
    parts.append("</body></html>\n")
    page = "".join(parts).encode("utf-8", "backslashreplace")  # names of files need not be text
    write_atomic(out, lambda temporary: temporary.write_bytes(page))
    return out
