"""What start, boxes and data residual do to the images of scdd.py: the ablation in the README.

Every variant is a run of the script with its own defaults but for the flags of its name, on test images, at one seed;
the teachers are shared. Writes tests/results/scdd/ablation_NAME.json.

    python tests/ablate_scdd.py digits                                   # ten minutes
    python tests/ablate_scdd.py NAME --flags --data data/cifar100 ...
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scdd
from common.run import write_json

VARIANTS = {
    "noise": dict(init="noise"),
    "noise, shifts": dict(init="noise", jitter=(-1, 1)),
    "noise, boxes": dict(init="noise", crop=True, crop_min=0.5),
    "noise, boxes an image": dict(init="noise", crop=True, crop_min=0.5, per_image=True),
    "noise, curriculum": dict(init="noise", crop=True, crop_min=0.5, curriculum=True),
    "real": dict(init="real"),
    "real, boxes an image": dict(init="real", crop=True, crop_min=0.5, per_image=True),
    "real, residual": dict(init="real", segments=4),
    "real, r_bn tenfold": dict(init="real", r_bn_times=10),
    "real, residual, r_bn tenfold": dict(init="real", segments=4, r_bn_times=10),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("name")
parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of scdd.py, the same in every run")

if __name__ == "__main__":
    options = parser.parse_args()
    base = tyro.cli(scdd.Args, args=options.flags)
    preset = scdd.PRESETS[base.preset or options.name]
    runs = []
    for variant in options.variants:
        changes = dict(VARIANTS[variant])
        times = changes.pop("r_bn_times", 1)
        for flag in ("r_bn", "sre2l_r_bn"):
            given = getattr(base, flag)
            changes[flag] = times * (preset[flag] if given is None else given)
        r = scdd.main(dataclasses.replace(base, **changes))
        scores = {row: {key: round(value, 5) for key, value in e["student"].items() if key != "values"}
                  for row, e in r["eval"].items()}  # fmt: skip
        runs.append(dict(variant=variant, flags=changes, statistics=r["statistics"], recognised=r["recognised"],
                         eval=scores, seconds=r["seconds"]))  # fmt: skip
        print("ablation:", variant, r["recognised"], {row: e["mean"] for row, e in scores.items()}, flush=True)
        varied = {flag for each in VARIANTS.values() for flag in each} | {"r_bn", "sre2l_r_bn", "device", "out_dir"}
        flags = {key: value for key, value in r["args"].items() if key not in varied}
        out = Path(__file__).parent / "results" / "scdd" / f"ablation_{options.name}.json"
        out.parent.mkdir(exist_ok=True)
        write_json(out, dict(about=__doc__.split("\n\n")[1], runs=runs, flags=flags, commit=r["commit"]))
