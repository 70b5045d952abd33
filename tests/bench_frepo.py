"""What an outer step of frepo.py and isa.py costs on a CPU, beside a plain twin of the authors' PyTorch branch.

Each variant runs in its own process with one thread; the step is timed in CPU seconds and its peak in resident memory.
The twin does what the specification says of that branch: eval-mode BatchNorm as it stands, K_ss and K_ts in float32,
autograd through all of the solve, the default memory layout. What is not about speed (networks, LAMB, mirrored images,
half squared errors) it has as frepo.py has it, so that both work from the same images, networks and batches: they must
report the same losses. Width 128 256 512; images are not whitened in any row.

    python tests/bench_frepo.py         # all rows: twenty minutes; writes tests/results/frepo/speed.json
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_krr_st import peak, reset_peak

import frepo
import isa
from common.data import Data, normalise
from common.run import commit, rng, versions, write_json

IMAGES = 2000  # of the made set: 20 a class
OUT = Path(__file__).parent / "results" / "frepo" / "speed.json"
VARIANTS = {  # name -> (what it is, flags)
    "published": ("the PyTorch branch's step, plainly", {}),
    "algebra": ("frepo.py: algebra and frozen networks alone, the convolutions' layout as published", {}),
    "default": ("frepo.py as it is: and channels-last convolutions", {}),
    "isa": ("isa.py as it is", {}),
    "bf16": ("frepo.py --precision bf16", {"precision": "bf16"}),
}


def made_data() -> Data:
    """Random pixels in 100 classes: the arithmetic does not look at them."""
    x = torch.randint(0, 256, (IMAGES + 100, 3, 32, 32), generator=rng("bench images"), dtype=torch.uint8)
    y = torch.arange(IMAGES + 100) % 100
    mean, std = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.29, 0.29, 0.29])
    return Data("bench", x[:IMAGES], y[:IMAGES], x[IMAGES:], y[IMAGES:], [str(i) for i in range(100)], mean, std,
                "none", "bench", True, native=False)  # fmt: skip


class Clock:
    """CPU seconds of each step: tick() at its beginning, losses beside."""

    def __init__(self):
        self.times, self.losses = [], []

    def tick(self) -> None:
        if len(self.times) == 1:
            reset_peak()
        self.times.append(time.process_time())


def arguments(variant: str, ipc: int, steps: int, folder: Path):
    script = isa if variant == "isa" else frepo
    return script, script.Args(
        data="bench", preset="cifar100", ipc=ipc, batch_real=1024, steps=steps, pool=2, device="cpu", zca=False,
        flip="on" if ipc == 1 else "off", out_dir=str(folder), save_minutes=0.0, lr_end=1.0, log_every=10**6,
        **VARIANTS[variant][1],
    )  # fmt: skip


def published(ipc: int, steps: int, folder: Path) -> Clock:
    """The twin's loop, in the order of the specification's section 1.6."""
    clock, data = Clock(), made_data()
    args = arguments("published", ipc, steps, folder)[1]
    args = frepo.fill(args, frepo.PRESETS["cifar100"])

    def make_net():
        net = frepo.FRePoConvNet(3, 32, 100, args.widths, args.norm)
        return net.to(memory_format=torch.contiguous_format)

    index = frepo.per_class(data.y_train, ipc, "initial images", 0)
    x_s = normalise(data.x_train[index], data.mean, data.std).requires_grad_()
    y_s = frepo.start_labels(data.y_train[index], 100).requires_grad_()
    outer = frepo.Lamb([x_s, y_s], lr=3e-4)
    pool = frepo.Pool(make_net, torch.device("cpu"), args)
    for slot in range(2):
        pool.train(slot, x_s.detach(), y_s.detach())
    y_train = frepo.centred(data.y_train, 100)
    for step in range(steps):
        clock.tick()
        slot = int(torch.randint(2, (), generator=rng("slot", 0, step)))
        net = pool.nets[slot].eval()
        index = frepo.batch_index(step, IMAGES, 1024, 0)
        x_t, y_t = normalise(data.x_train[index], data.mean, data.std), y_train[index]
        x_all, y_all = frepo.doubled(x_s, y_s) if args.flip == "on" else (x_s, y_s)
        with torch.no_grad():
            f_t = net.features(x_t)
        f_s = net.features(x_all)
        k_ss, k_ts = f_s @ f_s.T, f_t @ f_s.T
        k_ss = k_ss + 1e-6 * k_ss.trace() / len(k_ss) * torch.eye(len(k_ss))
        residual = k_ts @ torch.linalg.solve(k_ss, y_all) - y_t
        loss = 0.5 * residual.square().sum(1).mean()
        x_s.grad, y_s.grad = torch.autograd.grad(loss + frepo.label_margin(y_s), [x_s, y_s])
        outer.step()
        pool.grow(slot, x_s.detach(), y_s.detach())
        clock.losses.append(float(loss.detach()))
    return clock


class EndOfLoop(Exception):
    pass


def ours(variant: str, ipc: int, steps: int, folder: Path) -> Clock:
    """The script's main itself, stopped before its evaluation, its functions watched from outside."""
    clock, data = Clock(), made_data()
    script, args = arguments(variant, ipc, steps, folder)
    if variant == "algebra":
        built = script.FRePoConvNet.__init__

        def build(net, *args, **kwargs):
            built(net, *args, **kwargs)
            net.to(memory_format=torch.contiguous_format)

        script.FRePoConvNet.__init__ = build
    index_of, residual_of = script.batch_index, script.krr_residual

    def batch_index(*args):
        clock.tick()
        return index_of(*args)

    def krr_residual(*args):
        residual = residual_of(*args)
        clock.losses.append(float(script.kernel_loss(residual.detach())))
        return residual

    def warm_up(pool, x_s, y_s):
        for slot in range(2):
            pool.train(slot, x_s, y_s)

    def end(*args, **kwargs):
        raise EndOfLoop

    script.load = lambda *args, **kwargs: data
    script.predict_seconds = lambda *args: 0.0
    script.batch_index, script.krr_residual = batch_index, krr_residual
    script.Pool.warm_up, script.evaluate_students = warm_up, end
    with contextlib.suppress(EndOfLoop):
        script.main(args)
    return clock


def one(variant: str, ipc: int, steps: int, folder: Path) -> dict:
    """Median over the steps after the first; the last is timed to the end of the loop, so one more is run."""
    clock = (published if variant == "published" else lambda *a: ours(variant, *a))(ipc, steps + 2, folder)
    spread = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    seconds, spread = round(statistics.median(spread), 4), [round(value, 4) for value in spread]
    return dict(variant=variant, ipc=ipc, batch=1024, cpu_seconds=seconds, peak_bytes=peak(), spread=spread,
                losses=clock.losses)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one here and print it as JSON")
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    options = parser.parse_args()
    if options.variant:
        with tempfile.TemporaryDirectory() as folder:
            print("RESULT " + json.dumps(one(options.variant, options.ipc[0], options.steps, Path(folder))))
        sys.exit()
    rows = []
    for ipc in options.ipc:
        base = len(rows)
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--variant", variant, "--ipc", str(ipc), "--steps", str(options.steps)]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{variant} at ipc {ipc} failed:\n{done.stderr}")
            row = json.loads(line.removeprefix("RESULT "))
            twin = rows[base] if variant != "published" else row
            row |= dict(what=VARIANTS[variant][0], times_less=round(twin["cpu_seconds"] / row["cpu_seconds"], 2))
            # the same work, the same losses; ISA's first step has FRePo's loss, then its images are others
            pairs = list(zip(row["losses"], twin["losses"], strict=True))[: 1 if variant == "isa" else None]
            row["loss_difference"] = max(abs(a / b - 1) for a, b in pairs)
            assert row["loss_difference"] < (0.05 if variant == "bf16" else 2e-3), row
            rows.append(row)
            about = " ".join(__doc__.split("\n\n")[1].split())
            facts = dict(commit=commit(), versions=versions(), machine=f"{platform.machine()}, 1 thread")
            OUT.parent.mkdir(parents=True, exist_ok=True)
            write_json(OUT, dict(about=about, rows=rows, **facts))
            numbers = f"{row['cpu_seconds']:9.3f} s {row['peak_bytes'] / 1e9:6.2f} GB {row['times_less']:6.2f} x"
            print(f"ipc {ipc:3} {variant:10} {numbers}", flush=True)
