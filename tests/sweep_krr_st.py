"""How the learning rates of krr_st.py were chosen: a grid judged on images held out of the training set.

The test set is not seen: a fifth of the training images takes its place. Writes tests/results/krr_st/sweep_NAME.json.

    python tests/sweep_krr_st.py digits --lr-img 1e-2 3e-2 1e-1 --lr-label 3e-3 1e-2 3e-2
    python tests/sweep_krr_st.py NAME --match-only --lr-img ... --lr-label ... --flags --data data/cifar100 ...
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common.pairs
import krr_st
from common.run import rng, write_json

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("name")
parser.add_argument("--lr-img", type=float, nargs="+", required=True)
parser.add_argument("--lr-label", type=float, nargs="+", required=True)
parser.add_argument("--max-age", type=int, nargs="+", default=[None])
parser.add_argument("--match-only", action="store_true", help="skip the probes")
parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of krr_st.py, the same in every run")


def held_out(*args, **kwargs):
    """The training images of the set, a fixed random fifth of them as its test images."""
    data = load(*args, **kwargs)
    order = torch.randperm(len(data.x_train), generator=rng("validation split"))
    train, test = order[len(order) // 5 :], order[: len(order) // 5]
    parts = dict(x_train=data.x_train[train], y_train=data.y_train[train], x_test=data.x_train[test])
    return dataclasses.replace(data, **parts, y_test=data.y_train[test], content="held" + data.content)


load, krr_st.load = krr_st.load, held_out

if __name__ == "__main__":
    options = parser.parse_args()
    base = tyro.cli(krr_st.Args, args=options.flags)
    base = dataclasses.replace(base, eval_finetune_steps=0)
    if options.match_only:
        common.pairs.probes = lambda *args: {}
    path = Path(__file__).parent / "results" / "krr_st" / f"sweep_{options.name}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for lr_img, lr_label, max_age in itertools.product(options.lr_img, options.lr_label, options.max_age):
        changes = dict(lr_img=lr_img, lr_label=lr_label) | ({"max_age": max_age} if max_age else {})
        r = krr_st.main(dataclasses.replace(base, **changes))
        scores = {
            row: {m: [round(v["mean"], 5), round(v["std"], 5)] for m, v in e.items()} for row, e in r["eval"].items()
        }
        used = {k: r["args"][k] for k in ("lr_img", "lr_label", "max_age", "steps", "num_images", "seed")}
        gains = {m: [round(v["mean"], 5), round(v["se"], 5)] for m, v in r["distilled_minus_random_real"].items()}
        runs.append(dict(**used, **scores, gains=gains, seconds=r["seconds"]))
        print("sweep:", used, scores["distilled"], gains, flush=True)
        flags = {k: v for k, v in r["args"].items() if k not in ("lr_img", "lr_label", "max_age", "device")}
        write_json(path, dict(about=__doc__.split("\n\n")[1], runs=runs, flags=flags, commit=r["commit"]))
