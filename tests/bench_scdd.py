"""What an iteration of SC-DD's recovery costs on a CPU, beside forward hooks as the published code has them.

One iteration: forward pass of a batch of 100 at 32 px through a frozen ResNet-18 (width 64, CIFAR stem with padding 1,
100 classes), cross-entropy and BatchNorm statistics, backward pass to the pixels, a step of Adam (0.5, 0.9), clamping.
Each variant runs in its own process with one thread; the iteration is timed in CPU seconds and its peak in resident
memory. All variants start from the same network and images: they must report the same losses.

The hooks do what the specification says of the published code: at the input of every BatchNorm the mean, and the
variance of a permuted, contiguous copy, by autograd.

    python tests/bench_scdd.py         # all rows: five minutes on an idle machine; writes tests/results/scdd/speed.json
"""

import argparse
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
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_krr_st import peak, reset_peak

from common.models import ResNet
from common.run import commit, rng, versions, write_json
from scdd import with_statistics

OUT = Path(__file__).parent / "results" / "scdd" / "speed.json"
R_BN, FIRST, LR = 0.005, 10.0, 0.4  # SC-DD's for CIFAR-100
MEAN, STD = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
VARIANTS = {  # name -> (what it is, channels-last, torch.compile)
    "published": ("forward hooks, PyTorch's default memory layout", False, False),
    "published, channels-last": ("forward hooks, channels-last", True, False),
    "ours": ("scdd.py as it is: bn_stats, channels-last", True, False),
    "ours, default layout": ("bn_stats, PyTorch's default memory layout", False, False),
    "no statistics": ("cross-entropy alone, channels-last", True, False),
    "published, compiled": ("forward hooks, default memory layout, torch.compile", False, True),
    "published, channels-last, compiled": ("forward hooks, channels-last, torch.compile", True, True),
    "ours, compiled": ("scdd.py --compile", True, True),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = ResNet("resnet18", stem_padding=1)
        self.head = nn.Linear(self.backbone.dim, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def made_net() -> Net:
    """A frozen network whose every block counts, with the statistics of other random images."""
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.0)
            module.bias.normal_(0, 0.1)
            module.momentum = None  # running statistics are those of all batches
    with torch.no_grad():
        net.train()(F.interpolate(torch.randn(50, 3, 8, 8), 32))
    return net.eval()


def with_hooks(net: Net):
    """The function images -> scores and the terms (20, 1), as published."""
    terms = []

    def hook(module, inputs, output):
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().reshape(x.shape[1], -1).var(1, unbiased=False)
        terms.append(torch.norm(module.running_var - var, 2) + torch.norm(module.running_mean - mean, 2))

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(hook)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        terms.clear()
        return net(images), torch.stack(terms)[:, None]

    return forward


def one(variant: str, steps: int) -> dict:
    """Median over the iterations after the first two (the first compiles)."""
    torch.set_num_threads(1)
    what, channels_last, compiled = VARIANTS[variant]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = made_net().to(memory_format=layout)
    images = torch.randn(100, 3, 32, 32, generator=rng("bench pixels")).contiguous(memory_format=layout)
    images.requires_grad_()
    classes, factors = torch.arange(100), torch.tensor([FIRST] + [1.0] * 19)[:, None]
    forward = with_hooks(net) if variant.startswith("published") else with_statistics(net)
    if variant == "no statistics":
        forward = lambda images: (net(images), torch.zeros(20, 1))  # noqa: E731
    if compiled:
        forward = torch.compile(forward, fullgraph=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    low, high = -mean / std, (1 - mean) / std
    adam = torch.optim.Adam([images], LR, betas=(0.5, 0.9))
    times, losses = [], []
    for step in range(steps + 2):
        if step == 2:
            reset_peak()
        start = time.process_time()
        scores, terms = forward(images)
        loss = F.cross_entropy(scores, classes) + R_BN * (factors * terms).sum()
        (images.grad,) = torch.autograd.grad(loss, images)
        adam.step()
        with torch.no_grad():
            images.clamp_(low, high)
        times.append(time.process_time() - start)
        losses.append(loss.item())
    spread = [round(value, 4) for value in times[2:]]
    return dict(variant=variant, what=what, cpu_seconds=round(statistics.median(spread), 4), peak_bytes=peak(),
                spread=spread, loss=losses[0], losses=losses)  # fmt: skip


def check_losses(row: dict, published: dict) -> None:
    """The same work, the same losses; Adam's first steps are as long for a small gradient as for a large one, so that
    roundings grow."""
    differences = [abs(a / b - 1) for a, b in zip(row["losses"], published["losses"], strict=True)]
    assert differences[0] < 1e-5 and max(differences) < 0.02, (row["variant"], differences)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one here and print it as JSON")
    parser.add_argument("--steps", type=int, default=5, help="timed iterations")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.variant:
        print("RESULT " + json.dumps(one(options.variant, options.steps)))
        sys.exit()
    rows = []
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant, "--steps", str(options.steps)]
        with tempfile.TemporaryDirectory() as folder:  # nothing compiled before
            env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": folder}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            sys.exit(f"{variant} failed:\n{done.stderr}")
        row = json.loads(line.removeprefix("RESULT "))
        rows.append(row)
        if variant != "no statistics":
            check_losses(row, rows[0])
    # against the faster of the two layouts of the published code without a compiler
    plain = min(row["cpu_seconds"] for row in rows[:2])
    for row in rows:
        row["times_less"] = round(plain / row["cpu_seconds"], 2)
        numbers = f"{row['cpu_seconds']:7.3f} s {row['peak_bytes'] / 1e9:6.2f} GB {row['times_less']:6.2f} x"
        print(f"{row['variant']:34} {numbers}", flush=True)
    about = " ".join(__doc__.split("\n\n", 1)[1].split("    python")[0].split())
    facts = dict(commit=commit(), versions=versions(), machine=f"{platform.machine()}, 1 thread")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, dict(about=about, rows=rows, **facts))
