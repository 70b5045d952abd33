"""What an outer step of boost_pca.py costs on a CPU, beside a plain twin written from the method's specification.

Each variant runs in its own process with one thread; the step is timed in CPU seconds and its peak in resident memory.
The twin does what the specification says, plainly: the teacher looks at every real batch, eval-mode BatchNorm as it
stands, weight gradients computed in the outer pass and dropped, both Gram matrices in float32, LU, autograd through all
of it. It makes the bases, the coefficients and the decoded pairs by itself, from the same images, with the same
networks and batches: all variants must report the same losses. Those of the first step differ by the precision of the
ridge and of the convolutions, the later ones by more: AdamW's first steps are as long for a small gradient as for a
large one, so that roundings grow. 64 bases of images (16 px) and 64 of targets, the image
and its three rotations; the networks that predict the shift are fitted at the end, so they are in no step. What is
computed once is in no row: bases, first coefficients, boost_pca.py's table of targets.

    python tests/bench_boost_pca.py     # all rows: ten minutes; writes tests/results/boost_pca/speed.json
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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_krr_st import IMAGES, TARGETS, Parts, made_data, made_teacher, peak, plain_convnet, reset_peak

import boost_pca
from common.run import commit, rng, seeded, versions, write_json

BASES, VIEWS, POOL = 64, 4, 2  # U = V; the image and its rotations; networks of the pool
LOSSES = {"fp32": (3e-3, 2e-2), "bf16": (2e-2, 0.25)}  # relative differences to the twin's: the first, the largest
OUT = Path(__file__).parent / "results" / "boost_pca" / "speed.json"
VARIANTS = {  # name -> (what it is, flags of boost_pca.py)
    "published": ("the specification's step, plainly", {}),
    "algebra": ("boost_pca.py: caching and algebra alone, the convolutions' layout as published", {}),
    "default": ("boost_pca.py as it is: and channels-last convolutions", {}),
    "bf16": ("boost_pca.py --precision bf16", {"precision": "bf16"}),
}


# ------------------------------------------------------------------------------------------------------------ the twin


def components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the first BASES principal directions (BASES, D) of rows (n, D), float64, by a singular value
    decomposition; its signs are whatever they are: AdamW's steps and the decoded pairs do not depend on them."""
    mean = rows.mean(0)
    return mean, torch.linalg.svd(rows - mean, full_matrices=False).Vh[:BASES]


def published(m: int, batch: int, steps: int) -> tuple[Parts, list[float]]:
    """The twin's loop: sections 1.2 to 1.8 of the specification."""
    data, parts, losses = made_data(), Parts(), []
    teacher = made_teacher(data, None).net.to(memory_format=torch.contiguous_format)
    mean, std = data.mean[:, None, None], data.std[:, None, None]

    def features(x: Tensor) -> Tensor:  # of uint8 images, (N, 512)
        with torch.no_grad():
            return torch.cat([teacher((part.float() / 255 - mean) / std) for part in x.split(128)])

    index = torch.randperm(IMAGES, generator=rng("initial images", 0))[:m]
    small = F.avg_pool2d((data.x_train.double() / 255 - mean) / std, 2).flatten(1)  # (n, 3 * 16 * 16)
    mu_x, b_x = components(small)
    mu_y, b_y = components(features(data.x_train).double())
    c_x = (small[index] - mu_x) @ b_x.T  # (m, U)
    turned = [features(torch.rot90(data.x_train[index], a, (2, 3))) for a in range(VIEWS)]
    c_y = [(y.double() - mu_y) @ b_y.T for y in turned]  # (m, V) of each view
    del small, turned
    mu_x, mu_y = mu_x.float(), mu_y.float()
    b_x, c_x, b_y, *c_y = learned = [value.float().contiguous().requires_grad_() for value in (b_x, c_x, b_y, *c_y)]
    outer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.0)
    pool = []
    for slot in range(POOL):
        with seeded("pool network", 0, slot, 0):
            net = plain_convnet(TARGETS)
        pool.append((net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)))

    def decode() -> tuple[Tensor, Tensor]:
        images = (c_x @ b_x + mu_x).view(m, 3, 16, 16)
        images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        views = [torch.rot90(images, a, (2, 3)) for a in range(VIEWS)]
        return torch.cat(views), torch.cat([c @ b_y + mu_y for c in c_y])

    def train(slot: int) -> None:
        with torch.no_grad():
            x_s, y_s = decode()
        parts.mark("decode")
        net, optimizer = pool[slot]
        net.train()
        loss = F.mse_loss(net(x_s), y_s)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        parts.mark("pool network")

    for slot in range(POOL):
        train(slot)
    for step in range(steps):
        if step == 1:
            reset_peak()
        parts.begin()
        slot = int(torch.randint(POOL, (), generator=rng("slot", 0, step)))
        net = pool[slot][0].eval()
        x_t = (data.x_train[boost_pca.batch_index(step, IMAGES, batch, 0)].float() / 255 - mean) / std
        parts.mark("other")
        with torch.no_grad():
            y_t = teacher(x_t)
            parts.mark("teacher")
            f_t = net[0](x_t)
            f_t = torch.cat([f_t, torch.ones(len(f_t), 1)], 1)
        parts.mark("real features")
        x_s, y_s = decode()
        parts.mark("decode")
        f_s = net[0](x_s)
        parts.mark("distilled features")
        f_s = torch.cat([f_s, torch.ones(len(f_s), 1)], 1)
        k_ss, k_ts = f_s @ f_s.T, f_t @ f_s.T
        lam = 1e-6 * k_ss.trace().detach()
        loss = F.mse_loss(k_ts @ torch.linalg.solve(k_ss + lam * torch.eye(len(f_s)), y_s), y_t)
        parts.mark("ridge")
        f_s.register_hook(lambda grad: parts.mark("ridge"))
        outer.zero_grad()
        net.zero_grad()
        loss.backward()  # to the weights of the network too, which drops them
        parts.mark("gradient")
        outer.step()
        del x_s, y_s, f_s, k_ss, k_ts
        parts.mark("other")
        train(slot)
        losses.append(float(loss.detach()))
        del loss
    return parts, losses


# ---------------------------------------------------------------------------------------------------------- the script


class EndOfLoop(Exception):
    pass


def ours(variant: str, m: int, batch: int, steps: int, folder: Path) -> tuple[Parts, list[float]]:
    """boost_pca.main itself, stopped before it saves the set, its functions watched from outside."""
    parts, losses = Parts(), []
    if variant == "algebra":
        built = boost_pca.ConvNet.__init__

        def build(net, *args):
            built(net, *args)
            net.to(memory_format=torch.contiguous_format)

        boost_pca.ConvNet.__init__ = build
    data = made_data()

    def watch(owner, name: str, part: str) -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            parts.mark("other")
            result = original(*args, **kwargs)
            parts.mark(part)
            return result

        setattr(owner, name, watched)

    index_of = boost_pca.batch_index

    def batch_index(step, *rest):
        if step == 1:
            reset_peak()
        parts.begin()
        return index_of(step, *rest)

    frozen = boost_pca.ConvNet.frozen

    def watched_frozen(net):
        features = frozen(net)

        def watched(x):
            parts.mark("other")
            out = features(x)
            parts.mark("distilled features" if torch.is_grad_enabled() else "real features")
            return out

        return watched

    loss_of = boost_pca.krr_st_loss

    def krr_st_loss(f_t, y_t, f_s, *rest):
        parts.mark("other")
        f_s.register_hook(lambda grad: parts.mark("ridge"))
        loss = loss_of(f_t, y_t, f_s, *rest)
        losses.append(float(loss.detach()))
        parts.mark("ridge")
        return loss

    def warm_up(pool, x_s, y_s):
        for slot in range(POOL):
            pool.ages[slot] = 1
            pool.train(slot, x_s, y_s)

    def end(*args, **kwargs):
        raise EndOfLoop

    boost_pca.load = lambda *args, **kwargs: data
    boost_pca.train_teacher = lambda *args, **kwargs: made_teacher(data, folder)
    boost_pca.predict_seconds = lambda *args: 0.0
    boost_pca.batch_index, boost_pca.krr_st_loss, boost_pca.ConvNet.frozen = batch_index, krr_st_loss, watched_frozen
    boost_pca.Pool.warm_up, boost_pca.save_distilled = warm_up, end
    watch(boost_pca, "decode", "decode")
    watch(torch.autograd, "grad", "gradient")
    watch(boost_pca.Pool, "grow", "pool network")
    args = boost_pca.Args(
        data="bench", preset="cifar100", num_images=m, image_bases=BASES, feature_bases=BASES, batch_real=batch,
        steps=steps, pool=POOL, chunk=VIEWS * m, approx_steps=1, compare=False, device="cpu", out_dir=str(folder),
        save_minutes=0.0, lr_end=1.0, log_every=10**6, **VARIANTS[variant][1],
    )  # fmt: skip
    with contextlib.suppress(EndOfLoop):
        boost_pca.main(args)
    parts.mark("other")
    return parts, losses


# ------------------------------------------------------------------------------------------------------------- driving


def one(variant: str, m: int, batch: int, steps: int, folder: Path) -> dict:
    """Medians over the steps after the first; the last step holds the end of the loop, so one more is run."""
    if variant == "published":
        parts, losses = published(m, batch, steps + 2)
    else:
        parts, losses = ours(variant, m, batch, steps + 2, folder)
    timed = parts.steps[1:-1]
    seconds = statistics.median(sum(step.values()) for step in timed)
    shares = {part: statistics.median(step.get(part, 0.0) for step in timed) for part in parts.steps[1]}
    return dict(
        variant=variant, num_images=m, pairs=VIEWS * m, batch=batch, cpu_seconds=round(seconds, 4), peak_bytes=peak(),
        parts={part: round(value, 4) for part, value in sorted(shares.items(), key=lambda item: -item[1])},
        spread=[round(sum(step.values()), 4) for step in timed], losses=losses,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one here and print it as JSON")
    parser.add_argument("--shapes", nargs="+", default=["100x512", "20x128"], help="images x real batch")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (four times as many for 20 images)")
    parser.add_argument("--folder", type=Path, help="for the teacher's table and run folders")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.variant:
        torch.set_num_threads(1)
        m, batch = map(int, options.shapes[0].split("x"))
        result = one(options.variant, m, batch, options.steps, options.folder)
        print("RESULT " + json.dumps(result))
        sys.exit()
    rows, other = [], []
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            base = len(rows)
            for variant in VARIANTS:
                steps = options.steps * (4 if shape.startswith("20x") else 1)
                command = [sys.executable, __file__, "--variant", variant, "--shapes", shape, "--steps", str(steps)]
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run([*command, "--folder", folder], capture_output=True, text=True, env=env)
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                if line is None:
                    sys.exit(f"{variant} at {shape} failed:\n{done.stderr}")
                rows.append(row := json.loads(line.removeprefix("RESULT ")))
                twin = rows[base]
                row |= dict(what=VARIANTS[variant][0], times_less=round(twin["cpu_seconds"] / row["cpu_seconds"], 2))
                # the same work: the same losses
                differences = [abs(a / b - 1) for a, b in zip(row["losses"], twin["losses"], strict=True)]
                first, largest = differences[0], max(differences)
                row |= dict(loss_difference_first=first, loss_difference=largest)
                about = " ".join(__doc__.split("\n\n")[1].split())
                facts = dict(commit=commit(), versions=versions(), machine=f"{platform.machine()}, 1 thread")
                options.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(options.out, dict(about=about, rows=rows, **facts))
                numbers = f"{row['cpu_seconds']:9.3f} s {row['peak_bytes'] / 1e9:6.2f} GB {row['times_less']:6.2f} x"
                print(f"{shape:10} {variant:16} {numbers}, losses {first:.0e} to {largest:.0e}", flush=True)
                allowed = LOSSES["bf16" if variant == "bf16" else "fp32"]
                if not (first < allowed[0] and largest < allowed[1]):
                    other.append(f"{variant} at {shape}: {first:.1e}, {largest:.1e}")
    if other:
        sys.exit("not the twin's losses: " + "; ".join(other))
