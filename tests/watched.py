"""Run a script's command line with one accident in it, for the tests of bad luck: tests import `start`.

An accident is "place:n:what": at the n-th arrival at the place, in this process, this happens.
place: teacher (a step of its self-supervised training), label (of a supervised one's), probe (of a linear probe's),
step (an outer step), score (a network or student of the evaluation, or of an application), rename (a file is written,
not yet renamed), teacher_save and run_save (half of a checkpoint is on disk), begin (before anything).
what: SIGKILL, SIGTERM, SIGINT, disk (files may not grow beyond what this one has), memory (30 MB more than now).
"""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parent.parent


def start(script: str | Path, words: list, accident: str = "none:0:none"):
    """The finished process of `python script words`, begun in REPO; its stdout and stderr are text."""
    _, link = nursery()
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    request = json.dumps([str(script), [str(word) for word in words], accident])
    socket.send_fds(link, [request.encode()], [out_end, err_end])
    os.close(out_end), os.close(err_end)
    with open(out) as out, open(err) as err, ThreadPoolExecutor() as threads:
        texts = threads.map(lambda file: file.read(), (out, err))
    return subprocess.CompletedProcess([script, *words], int(link.recv(100)), *texts)


@cache
def nursery() -> tuple[subprocess.Popen, socket.socket]:
    """A process that forks one child for each run, and the link to it.

    Four seconds of a run of five are imports, which are done here once. The nursery has one thread and computes
    nothing, so that its child is what a fresh process is.
    """
    link, end = socket.socketpair()
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__], cwd=REPO, stdin=end, stdout=subprocess.DEVNULL, env=env)
    end.close()
    return process, link


def wait_and_fork() -> list:
    """In the nursery: fork for each request, and send the exit code back. Returns the request, in the child alone."""
    link = socket.socket(fileno=os.dup(0))
    while True:
        request, ends, *_ = socket.recv_fds(link, 100_000, 2)
        if not request:  # the tests are over
            sys.exit()
        child = os.fork()
        if child == 0:
            link.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(ends[0], 1), os.dup2(ends[1], 2)
            return json.loads(request)
        os.close(ends[0]), os.close(ends[1])
        _, status = os.waitpid(child, 0)
        link.send(str(os.waitstatus_to_exitcode(status)).encode())


def flags(**values) -> list[str]:
    """widths=(4, 4) -> ["--widths", "4", "4"]; True and False become --name and --no-name."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def same_end(folder_a: Path, folder_b: Path) -> None:
    """Asserts bit-identical tensors and results of two runs and of their parts; times, commits, paths may differ."""
    a, b = (load_file(folder / "distilled.safetensors") for folder in (folder_a, folder_b))
    assert equal(a, b)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (folder_a, folder_b))
    assert a.keys() == b.keys()
    for name in a.keys() - {"seconds"}:
        assert equal(a[name], b[name]), name
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (folder_a, folder_b))
    assert a.keys() == b.keys()
    same = {"eval", "loss_of_mean", "statistics", "recognised", "jpeg_psnr_db", "label_bytes", "eval_models", "counts"}
    same |= {"distilled_minus", "shift_unexplained", "variance_left_out", "rounding", "storage"}
    for name in a.keys() & same:
        assert a[name] == b[name], name
    a, b = ({path.name for path in folder.glob("*.safetensors")} for folder in (folder_a, folder_b))
    assert a == b
    for name in a:  # the blocks, crops and labels of scdd.py
        assert equal(load_file(folder_a / name), load_file(folder_b / name)), name
    a, b = ({path.parent.name for path in folder.glob("*/result.json")} for folder in (folder_a, folder_b))
    assert a == b
    for name in a:  # boost_pca.py's plain pairs and ablations
        same_end(folder_a / name, folder_b / name)
    assert (folder_a / "curve.json").exists() == (folder_b / "curve.json").exists()
    if (folder_a / "curve.json").exists():
        a, b = (json.loads((folder / "curve.json").read_text()) for folder in (folder_a, folder_b))
        assert a == b


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def main() -> None:
    import gc
    import importlib
    import importlib.util
    import io
    import resource
    import signal

    import common.applications
    import common.barlow
    import common.dino
    import common.moco
    import common.pairs
    import common.pretrain
    import common.relabel
    import common.run
    import common.students
    import common.swav

    for late in ("matplotlib.figure", "sklearn.datasets", "torch.utils.tensorboard", "torchvision.utils"):
        importlib.import_module(late)
    gc.freeze()  # a child that ends leaves these objects alone: else it would copy all of their memory first
    script_path, words, accident = wait_and_fork()
    place_due, nth, what = accident.split(":")
    arrivals = {}

    def arrive(place: str, size: int = 0) -> None:
        arrivals[place] = arrivals.get(place, 0) + 1
        if place != place_due or arrivals[place] != int(nth):
            return
        print(f"accident: {what} at {place} {nth}", flush=True)
        if what == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        elif what == "memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, -1))
        else:
            os.kill(os.getpid(), getattr(signal, what))

    def watch(module, name: str, place: str) -> None:
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            arrive(place)
            return original(*args, **kwargs)

        setattr(module, name, wrapped)

    watch(common.barlow, "two_views", "teacher")
    watch(common.moco, "info_nce", "teacher")
    watch(common.moco, "batch_contrast", "teacher")
    watch(common.swav, "swapped_loss", "teacher")
    watch(common.dino, "cross_view_loss", "teacher")
    watch(common.pretrain, "augmented", "label")
    watch(common.pretrain, "probe_lr", "probe")
    watch(common.pairs, "score_network", "score")
    watch(common.students, "score_student", "score")
    watch(common.applications, "outputs", "score")
    watch(os, "replace", "rename")

    class Watched(common.relabel.Scored):
        def add(self, *args) -> None:  # a student is trained and not yet noted
            arrive("score")
            super().add(*args)

    common.relabel.Scored = Watched
    steps, torch_save = common.run.Run.steps, torch.save

    def watched_steps(run, *args):
        for step in steps(run, *args):
            arrive("step")
            yield step

    def half_save(state, path) -> None:
        buffer = io.BytesIO()
        torch_save(state, buffer)
        data = buffer.getvalue()
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            arrive("teacher_save" if "/teachers/" in str(path) else "run_save", len(data) // 2)
            file.write(data[len(data) // 2 :])

    common.run.Run.steps, torch.save = watched_steps, half_save
    sys.argv = [script_path, *words]
    spec = importlib.util.spec_from_file_location("script", script_path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["script"] = script
    spec.loader.exec_module(script)
    arrive("begin")
    common.run.cli(script.main, script.Args)


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    main()
