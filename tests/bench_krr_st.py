"""What an outer step of krr_st.py costs on a CPU, beside a plain twin of the published code.

Each variant runs in its own process with one thread; the step is timed in CPU seconds and its peak in resident memory.
The twin does what the specification says of the released code: the teacher looks at every real batch, eval-mode
BatchNorm as it stands, both Gram matrices in float32, LU, autograd through all of it; in "published aug" a Python loop
crops each image. Only its images start normalised, not raw, so that all variants work from the same images, networks
and batches: they must report the same losses. The table of targets that krr_st.py computes once is in no row.

    python tests/bench_krr_st.py        # all rows: half an hour; writes tests/results/krr_st/speed.json
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import krr_st
from common.augment import draw_variants
from common.data import Data, normalise
from common.models import ResNet
from common.run import commit, rng, seeded, versions, write_json
from common.teacher import Teacher, freeze

WIDTHS, TARGETS, IMAGES = (128, 256, 512), 512, 1024  # CIFAR-100's network and teacher; images of the made set
OUT = Path(__file__).parent / "results" / "krr_st" / "speed.json"
VARIANTS = {  # name -> (what it is, flags of krr_st.py)
    "published": ("the published code's step, plainly", {}),
    "algebra": ("krr_st.py: caching and algebra alone, the convolutions as published", {}),
    "default": ("krr_st.py as it is: and channels-last convolutions", {}),
    "bf16": ("krr_st.py --precision bf16", {"precision": "bf16"}),
    "published aug": ("the last upload's step: augmented in a Python loop", {}),
    "aug, all misses": ("krr_st.py --outer-aug crop_flip, empty cache", {"outer_aug": "crop_flip"}),
    "aug, all hits": ("krr_st.py --outer-aug crop_flip, all in the cache", {"outer_aug": "crop_flip"}),
}


class Parts:
    """CPU seconds by part of a step: mark(part) books the time since the last mark to it."""

    def __init__(self):
        self.steps, self.last = [], time.process_time()

    def begin(self) -> None:
        self.mark("other")
        self.steps.append({})

    def mark(self, part: str) -> None:
        now = time.process_time()
        if self.steps:
            self.steps[-1][part] = self.steps[-1].get(part, 0.0) + now - self.last
        self.last = now


def made_data() -> Data:
    """Random pixels: the arithmetic does not look at them."""
    x = torch.randint(0, 256, (IMAGES + 8, 3, 32, 32), generator=rng("bench images"), dtype=torch.uint8)
    y = torch.arange(IMAGES + 8) % 8
    mean, std = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.29, 0.29, 0.29])
    return Data("bench", x[:IMAGES], y[:IMAGES], x[IMAGES:], y[IMAGES:], [str(i) for i in range(8)], mean, std,
                "none", "bench", True, native=False)  # fmt: skip


def made_teacher(data: Data, folder: Path | None) -> Teacher:
    with seeded("bench teacher"):
        net = ResNet("resnet18", 3, 64)
    info = dict(weights_sha256="bench")
    return Teacher(freeze(net), net.dim, data.mean, data.std, "bench", info, folder)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now


def peak() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


# ------------------------------------------------------------------------------------------------------------ the twin


def plain_convnet(dim: int) -> nn.Sequential:
    blocks = []
    for c_in, c_out in zip((3, *WIDTHS), WIDTHS, strict=False):
        blocks += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(nn.Sequential(*blocks, nn.Flatten()), nn.Linear(WIDTHS[-1] * 16, dim))


def loop_crop_flip(x: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
    """Zero-pad 4, crop and mirror, image by image."""
    out = []
    for image, v in zip(F.pad(x, (4, 4, 4, 4)), variant.tolist(), strict=True):
        dy, dx, mirrored = v // 18, v // 2 % 9, v % 2
        crop = image[:, dy : dy + 32, dx : dx + 32]
        out.append(crop.flip(2) if mirrored else crop)
    return torch.stack(out)


def published(n_s: int, batch: int, steps: int, aug: bool) -> tuple[Parts, list[float]]:
    """The twin's loop, in the order of the specification's section 2.6."""
    data, parts, losses = made_data(), Parts(), []
    teacher = made_teacher(data, None).net.to(memory_format=torch.contiguous_format)
    index = torch.randperm(IMAGES, generator=rng("initial images", 0))[:n_s]
    x_s = normalise(data.x_train[index], data.mean, data.std)
    with torch.no_grad():
        y_s = torch.cat([teacher(part) for part in x_s.split(128)])
    x_s.requires_grad_(), y_s.requires_grad_()
    outer = torch.optim.AdamW([x_s, y_s], lr=1e-4, weight_decay=0.0)
    pool = []
    for slot in range(2):
        with seeded("pool network", 0, slot, 0):
            net = plain_convnet(TARGETS)
        pool.append((net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)))

    def train(slot: int) -> None:
        net, optimizer = pool[slot]
        net.train()
        loss = F.mse_loss(net(x_s.detach()), y_s.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    train(0), train(1)
    for step in range(steps):
        if step == 1:
            reset_peak()
        parts.begin()
        slot = int(torch.randint(2, (), generator=rng("slot", 0, step)))
        net = pool[slot][0].eval()
        x = data.x_train[krr_st.batch_index(step, IMAGES, batch, 0)].float() / 255
        if aug:
            x = loop_crop_flip(x, draw_variants(batch, 32, True, rng("crop flip", 0, step)))
        x_t = (x - data.mean[:, None, None]) / data.std[:, None, None]
        parts.mark("real batch")
        with torch.no_grad():
            y_t = teacher(x_t)
            parts.mark("teacher")
            f_t = net[0](x_t)
            f_t = torch.cat([f_t, torch.ones(len(f_t), 1)], 1)
        parts.mark("real features")
        f_s = net[0](x_s)
        parts.mark("distilled features")
        f_s = torch.cat([f_s, torch.ones(n_s, 1)], 1)
        k_ss, k_ts = f_s @ f_s.T, f_t @ f_s.T
        lam = 1e-6 * k_ss.trace().detach()
        loss = F.mse_loss(k_ts @ torch.linalg.solve(k_ss + lam * torch.eye(n_s), y_s), y_t)
        parts.mark("ridge")
        f_s.register_hook(lambda grad: parts.mark("ridge"))
        x_s.grad, y_s.grad = torch.autograd.grad(loss, [x_s, y_s])
        parts.mark("gradient of the images")
        outer.step()
        parts.mark("other")
        train(slot)
        parts.mark("pool network")
        losses.append(float(loss.detach()))
    return parts, losses


# ---------------------------------------------------------------------------------------------------------- the script


class EndOfLoop(Exception):
    pass


def ours(variant: str, n_s: int, batch: int, steps: int, folder: Path) -> tuple[Parts, list[float]]:
    """krr_st.main itself, stopped before its evaluation, its functions watched from outside."""
    parts, losses = Parts(), []
    if variant == "algebra":
        built = krr_st.ConvNet.__init__

        def build(net, *args):
            built(net, *args)
            net.to(memory_format=torch.contiguous_format)

        krr_st.ConvNet.__init__ = build
    data = made_data()

    def watch(owner, name: str, part: str, before: str = "other") -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            parts.mark(before)
            result = original(*args, **kwargs)
            parts.mark(part)
            return result

        setattr(owner, name, watched)

    index_of = krr_st.batch_index

    def batch_index(step, *rest):
        if step == 1:
            reset_peak()
        parts.begin()
        return index_of(0 if variant == "aug, all hits" else step, *rest)

    frozen = krr_st.ConvNet.frozen

    def watched_frozen(net):
        features = frozen(net)

        def watched(x):
            parts.mark("real batch")
            out = features(x)
            parts.mark("real features" if torch.is_inference_mode_enabled() else "distilled features")
            return out

        parts.mark("other")
        return watched

    loss_of = krr_st.krr_st_loss

    def krr_st_loss(f_t, y_t, f_s, *rest):
        parts.mark("other")
        f_s.register_hook(lambda grad: parts.mark("ridge"))
        loss = loss_of(f_t, y_t, f_s, *rest)
        losses.append(float(loss.detach()))
        parts.mark("ridge")
        return loss

    def warm_up(pool, x_s, y_s):
        for slot in range(2):
            pool.ages[slot] = 1
            pool.train(slot, x_s, y_s)

    def end(*args, **kwargs):
        raise EndOfLoop

    krr_st.load = lambda *args, **kwargs: data
    krr_st.train_teacher = lambda *args, **kwargs: made_teacher(data, folder)
    krr_st.predict_seconds = lambda *args: 0.0
    krr_st.batch_index, krr_st.krr_st_loss, krr_st.ConvNet.frozen = batch_index, krr_st_loss, watched_frozen
    krr_st.Pool.warm_up, krr_st.evaluate_pairs = warm_up, end
    if variant == "aug, all hits":
        krr_st.draw_variants = lambda n, *rest: torch.zeros(n, dtype=torch.int64)
    watch(krr_st.AugmentedTargets, "__call__", "teacher", "real batch")
    watch(torch.autograd, "grad", "gradient of the images")
    watch(krr_st.Pool, "grow", "pool network")
    args = krr_st.Args(
        data="bench", preset="cifar100", num_images=n_s, batch_real=batch, steps=steps, pool=2, device="cpu",
        out_dir=str(folder), save_minutes=0.0, lr_end=1.0, log_every=10**6, **VARIANTS[variant][1],
    )  # fmt: skip
    with contextlib.suppress(EndOfLoop):
        krr_st.main(args)
    parts.mark("other")
    return parts, losses


# ------------------------------------------------------------------------------------------------------------- driving


def one(variant: str, n_s: int, batch: int, steps: int, folder: Path) -> dict:
    """Medians over the steps after the first; the last step holds the end of the loop, so one more is run."""
    if variant.startswith("published"):
        parts, losses = published(n_s, batch, steps + 2, variant.endswith("aug"))
    else:
        parts, losses = ours(variant, n_s, batch, steps + 2, folder)
    timed = parts.steps[1:-1]
    seconds = statistics.median(sum(step.values()) for step in timed)
    shares = {part: statistics.median(step.get(part, 0.0) for step in timed) for part in parts.steps[1]}
    return dict(
        variant=variant, n_s=n_s, batch=batch, cpu_seconds=round(seconds, 4), peak_bytes=peak(),
        parts={part: round(value, 4) for part, value in sorted(shares.items(), key=lambda item: -item[1])},
        spread=[round(sum(step.values()), 4) for step in timed], losses=losses,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one here and print it as JSON")
    parser.add_argument("--shapes", nargs="+", default=["1000x1024", "100x128"], help="pairs x real batch")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (ten times as many for 100 pairs)")
    parser.add_argument("--folder", type=Path, help="for the teacher's table and run folders")
    options = parser.parse_args()
    if options.variant:
        n_s, batch = map(int, options.shapes[0].split("x"))
        result = one(options.variant, n_s, batch, options.steps, options.folder)
        print("RESULT " + json.dumps(result))
        sys.exit()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            base = len(rows)
            for variant in VARIANTS:
                steps = options.steps * (10 if shape.startswith("100x") else 1)
                command = [sys.executable, __file__, "--variant", variant, "--shapes", shape, "--steps", str(steps)]
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run([*command, "--folder", folder], capture_output=True, text=True, env=env)
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                if line is None:
                    sys.exit(f"{variant} at {shape} failed:\n{done.stderr}")
                row = json.loads(line.removeprefix("RESULT "))
                twin = row if variant.startswith("published") else rows[base + (4 if "aug" in variant else 0)]
                row |= dict(what=VARIANTS[variant][0], times_less=round(twin["cpu_seconds"] / row["cpu_seconds"], 2))
                if variant != "aug, all hits":  # the same work: the same losses
                    worst = max(abs(a / b - 1) for a, b in zip(row["losses"], twin["losses"], strict=True))
                    assert worst < (0.05 if variant == "bf16" else 2e-3), (variant, worst)
                    row["loss_difference"] = worst
                rows.append(row)
                about = " ".join(__doc__.split("\n\n")[1].split())
                facts = dict(commit=commit(), versions=versions(), machine=f"{platform.machine()}, 1 thread")
                write_json(OUT, dict(about=about, rows=rows, **facts))
                numbers = f"{row['cpu_seconds']:9.3f} s {row['peak_bytes'] / 1e9:6.2f} GB {row['times_less']:6.2f} x"
                print(f"{shape:10} {variant:16} {numbers}", flush=True)
