"""Accidents at seeded random places, each followed by a resume: the end is that of a quiet run. Fifty of each script
with a teacher, and twenty-five of each without.

SIGKILL and SIGTERM in the teachers, at outer steps, in the evaluation, half-way through a checkpoint and between a
write and its rename; a disk that fills up in a checkpoint. `-s` shows each accident; the summary is always printed.
"""

import random
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_bad_input import SCRIPTS, images
from watched import REPO, equal, flags, same_end, start

from common.run import interpreter, load_checkpoint

STEPS = 36
STUDENTS = [  # the chains of frepo and isa; later: flags of the resumed runs alone
    dict(),
    dict(chunk=3, flip="on", precision="bf16", eval_every=7),
    dict(holdout=0.2, eval_every=5, select="best", save_minutes=1e-3),
    # whitened, once or as drawn; a matrix product of three rows has other bits than one of a hundred
    dict(data="coloured", batch_real=3, ipc=3, later=dict(cache_gb=0.0)),
    dict(outer_opt="adam", learn_label=False, pool_ages="counter", norm="none", online_batch=4),
]
CLUSTERS = dict(teacher_projector=8, teacher_dim=8, teacher_prototypes=16)
CHAINS = {  # of runs that keep different things between steps
    "krr_st": [
        dict(),
        dict(outer_aug="crop_flip", batch_real=500, cache_gb=2e-4),
        dict(chunk=2, precision="bf16", eval_every=7, teacher_method="dino", teacher_batch=128, **CLUSTERS),
        dict(holdout=0.2, eval_every=5, pool_opt="adamw", outer_opt="sgd", save_minutes=1e-3),
        dict(ridge_grad=True, ridge_precision="fp32", norm="instance", pool_reset="released", grad_clip=1e-3),
    ],
    "scdd": [
        dict(recover_batch=4, chunk=8),  # two blocks
        dict(teacher_method="swav", recover_batch=4, chunk=4, probe_augment="True", **CLUSTERS),
        dict(init="real", segments=3, crop="True", curriculum=True, per_image=True, labels="stored", precision="bf16"),
        dict(data="coloured", ipc=3, recover_batch=4, save_jpeg=True, full_row=True, probe_epochs=12, label_batch=8),
        dict(holdout=0.2, save_minutes=1e-3, teacher_train_mode=True, published_metric=True, jitter=(0, 2)),
    ],
    "frepo": STUDENTS,
    "isa": STUDENTS,
    "boost_pca": [
        dict(approx="joint", ablate=True),
        dict(approx="none", coefficients="int8", views="corners", holdout=0.2, eval_every=5),
        dict(approx="rank", bases="real", balance="False", eval_models=("convnet", "vgg11"), save_minutes=1e-3),
        dict(precision="bf16", chunk=3, eval_every=7, pool_opt="adamw", outer_views="base", coefficients="fp16"),
        dict(bases="random", balance="True", views="tones", pool_reset="released", grad_clip=1e-3, full_row=True),
    ],
}
# in the teacher's training, of 11 batches an epoch; 1 is the first batch of the process
TEACHER = [("teacher", "SIGKILL", 2, 9), ("teacher", "SIGTERM", 2, 9), ("teacher_save", "SIGKILL", 1, 1),
           ("teacher_save", "disk", 1, 1)]  # fmt: skip
LABEL = [("label", "SIGKILL", 2, 9), ("label", "SIGTERM", 2, 9), ("label", "SIGINT", 2, 9)]  # scdd's labelling teacher
PROBE = [("probe", "SIGKILL", 2, 9), ("probe", "SIGTERM", 2, 9)]  # and its linear probe
# in the run: all of these get through at most 26 of its 36 steps
LOOP = [("step", "SIGKILL", 2, 6), ("step", "SIGTERM", 2, 6), ("step", "SIGINT", 2, 6), ("run_save", "SIGKILL", 1, 2),
        ("run_save", "disk", 1, 2), ("rename", "SIGKILL", 1, 2)]  # fmt: skip
PART = [("step", "SIGKILL", STEPS + 1, STEPS + 8), ("step", "SIGTERM", STEPS + 1, STEPS + 8)]  # boost_pca's pairs
CURVE = [("score", "SIGKILL", 1, 1), ("score", "SIGTERM", 1, 1)]  # inside the loop, where it has evaluations
SCORE = [("score", "SIGKILL", 1, 3), ("score", "SIGTERM", 1, 3)]
EXIT = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130, "disk": 2}


def accidents(name: str, chain: int, curve: bool) -> list[str]:
    """Ten, of which three hit the teacher and, of boost_pca, one its comparison; five without a teacher."""
    draw, teacher = random.Random(f"{name} {chain}"), SCRIPTS[name].teacher
    loop = draw.sample(LOOP, k=6 if teacher else 4)
    if curve:
        loop[1:3] = CURVE
    if name == "scdd":
        kinds = [draw.choice(stage) for stage in (LABEL, TEACHER, PROBE)]
    else:
        kinds = draw.choices(TEACHER, k=3 if teacher else 0)
    if name == "boost_pca":
        loop[-1] = draw.choice(PART)  # the last: at most 26 steps are done; the rest and 36 of the pairs are to come
    kinds += loop + draw.choices(SCORE, k=1)
    return [f"{place}:{draw.randint(low, high)}:{what}" for place, what, low, high in kinds]


def the_run(out_dir: Path) -> Path | None:
    """The run that can be resumed; None if none was begun."""
    folders = [path.parent for path in out_dir.glob("*/args.json")]
    assert len(folders) < 2
    return folders[0] if folders else None


@pytest.mark.slow
@pytest.mark.parametrize("chain", range(5))
@pytest.mark.parametrize("name", SCRIPTS)
def test_accidents_leave_no_trace(name, chain, tmp_path, capsys):
    script, facts = REPO / f"{name}.py", SCRIPTS[name]
    values = facts.tiny | dict(steps=STEPS, save_minutes=0.0)
    if name == "scdd":
        values |= dict(label_epochs=2, probe_epochs=3) | (facts.folder if "data" in CHAINS[name][chain] else {})
    values |= CHAINS[name][chain]
    later = values.pop("later", {})
    if facts.teacher:
        values["teacher_epochs"] = 4
    if name == "boost_pca":
        values["pairs_steps"] = STEPS
    if "data" in values:
        values["data"] = tmp_path / values["data"]
        images(values["data"] / "cat", 30, (8, 8, 3)), images(values["data"] / "dog", 30, (8, 8, 3), seed=1)
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"

    def words(parent: Path) -> list[str]:
        return flags(**values, out_dir=parent / "runs", data_dir=parent / "data")

    done = start(script, words(straight))
    assert done.returncode == 0, done.stderr
    log = []
    for accident in accidents(name, chain, "eval_every" in values):
        place, nth, what = accident.split(":")
        begun = the_run(hurt / "runs")
        done = start(script, ["--resume", begun, *flags(**later)] if begun else words(hurt), accident)
        assert done.returncode == EXIT[what], (accident, done.stdout, done.stderr)
        assert f"accident: {what}" in done.stdout and "Traceback" not in done.stderr, (accident, done.stderr)
        step = next((line.split()[-1] for line in done.stdout.splitlines() if "resumed at step" in line), "0")
        if what in ("SIGTERM", "SIGINT"):
            folder = the_run(hurt / "runs")
            assert f"go on with: {interpreter()} {script} --resume {folder}" in done.stderr
            if place == "step":  # the step it met is done and saved, of the run or of a part of it
                reached = int(step) + int(nth)
                assert load_checkpoint(folder / "checkpoint.pt")["step"] == min(reached, STEPS)
                if reached > STEPS:
                    (part,) = folder.glob("*/checkpoint.pt")
                    assert load_checkpoint(part)["step"] == reached - STEPS
        log.append(f"{name} chain {chain}: {accident} in a run begun at step {step}: exit {done.returncode}")
    done = start(script, ["--resume", the_run(hurt / "runs"), *flags(**later)])
    assert done.returncode == 0, done.stderr
    same_end(the_run(hurt / "runs"), the_run(straight / "runs"))
    if facts.teacher:
        a, b = (sorted((parent / "runs" / "teachers").glob("*/*.safetensors")) for parent in (straight, hurt))
        assert [path.parts[-2:] for path in a] == [path.parts[-2:] for path in b]
        for one, other in zip(a, b, strict=True):  # teachers, their targets, linear probes
            assert equal(load_file(one), load_file(other)), one
    with capsys.disabled():
        print("\n" + "\n".join(log) + f"\n{name} chain {chain}: {len(log)} accidents, the end bit-identical")
