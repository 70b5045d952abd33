"""Fifty accidents a script, at seeded random places, each followed by a resume: the end is that of a quiet run.

SIGKILL and SIGTERM in the teacher, at outer steps, in the evaluation, half-way through a checkpoint and between a
write and its rename; a disk that fills up in a checkpoint. `-s` shows each accident; the summary is always printed.
"""

import random
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_bad_input import SCRIPTS
from watched import REPO, equal, flags, same_end, start

from common.run import interpreter, load_checkpoint

STEPS = 48
CHAINS = {  # ten accidents each, in runs that keep different things between steps
    "krr_st": [
        dict(),
        dict(outer_aug="crop_flip", batch_real=500, cache_gb=2e-4),
        dict(chunk=2, precision="bf16", eval_every=7),
        dict(holdout=0.2, eval_every=5, pool_opt="adamw", outer_opt="sgd", save_minutes=1e-3),
        dict(ridge_grad=True, ridge_precision="fp32", norm="instance", pool_reset="released", grad_clip=1e-3),
    ]
}
# in the teacher's training, of 11 batches an epoch; 1 is the first batch of the process
TEACHER = [("teacher", "SIGKILL", 2, 9), ("teacher", "SIGTERM", 2, 9), ("teacher_save", "SIGKILL", 1, 1),
           ("teacher_save", "disk", 1, 1)]  # fmt: skip
# in the run: six of these get through at most 42 of its 48 steps
LOOP = [("step", "SIGKILL", 2, 6), ("step", "SIGTERM", 2, 6), ("step", "SIGINT", 2, 6), ("run_save", "SIGKILL", 1, 1),
        ("run_save", "disk", 1, 1), ("rename", "SIGKILL", 1, 2)]  # fmt: skip
CURVE = [("score", "SIGKILL", 1, 1), ("score", "SIGTERM", 1, 1)]  # inside the loop, where it has evaluations
SCORE = [("score", "SIGKILL", 1, 3), ("score", "SIGTERM", 1, 3)]
EXIT = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130, "disk": 2}


def accidents(seed: int, curve: bool) -> list[str]:
    draw = random.Random(seed)
    loop = draw.choices(LOOP, k=6)
    if curve:
        loop[1:3] = CURVE
    kinds = draw.choices(TEACHER, k=3) + loop + draw.choices(SCORE, k=1)
    return [f"{place}:{draw.randint(low, high)}:{what}" for place, what, low, high in kinds]


def the_run(out_dir: Path) -> Path:
    (folder,) = (p for p in out_dir.iterdir() if p.name != "teachers")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("chain", range(5))
@pytest.mark.parametrize("name", SCRIPTS)
def test_accidents_leave_no_trace(name, chain, tmp_path, capsys):
    script = REPO / f"{name}.py"
    values = SCRIPTS[name][0] | dict(steps=STEPS, teacher_epochs=4, save_minutes=0.0) | CHAINS[name][chain]
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    done = start(script, flags(**values, out_dir=straight))
    assert done.returncode == 0, done.stderr
    log = []
    for accident in accidents(chain, "eval_every" in values):
        place, nth, what = accident.split(":")
        begun = hurt.exists()
        words = ["--resume", str(the_run(hurt))] if begun else flags(**values, out_dir=hurt)
        done = start(script, words, accident)
        assert done.returncode == EXIT[what], (accident, done.stdout, done.stderr)
        assert f"accident: {what}" in done.stdout and "Traceback" not in done.stderr, (accident, done.stderr)
        step = next((line.split()[-1] for line in done.stdout.splitlines() if "resumed at step" in line), "0")
        if what in ("SIGTERM", "SIGINT"):
            assert f"go on with: {interpreter()} {script} --resume {the_run(hurt)}" in done.stderr
            if place == "step":  # the step it met is done and saved
                assert load_checkpoint(the_run(hurt) / "checkpoint.pt")["step"] == int(step) + int(nth)
        log.append(f"{name} chain {chain}: {accident} in a run begun at step {step}: exit {done.returncode}")
    done = start(script, ["--resume", str(the_run(hurt))])
    assert done.returncode == 0, done.stderr
    same_end(the_run(hurt), the_run(straight))
    (a,), (b,) = (list((d / "teachers").iterdir()) for d in (straight, hurt))
    assert a.name == b.name
    assert equal(load_file(a / "teacher.safetensors"), load_file(b / "teacher.safetensors"))
    with capsys.disabled():
        print("\n" + "\n".join(log) + f"\n{name} chain {chain}: {len(log)} accidents, the end bit-identical")
