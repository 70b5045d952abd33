"""A run of a script: its folder, its log, its checkpoints, its result. What is not the method lives here.

A run folder `runs/{data}__{script}__{seed}__{time}/` explains itself: args.json (every flag, resolved), script.py
(the source that ran), TensorBoard events, grid_*.png, checkpoint.pt, distilled.safetensors, result.json.

Randomness is keyed, not carried: `rng("batch", seed, epoch)` gives the same generator whenever it is asked, so a
resumed run needs no generator state and equals one that was never stopped, bit for bit on a CPU.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import kernels

# flags that may differ when a run is resumed: where it runs, how often it writes, what it keeps, how it is scored
PLACE, OUTPUT = {"device", "backend", "data_dir", "out_dir"}, {"log_every", "save_every", "save_minutes"}
FREE_ON_RESUME = PLACE | OUTPUT | {"resume", "full_row", "compare", "ablate", "coefficients"}
FREE_ON_RESUME |= {"chunk", "cache_gb", "cache_device", "labels", "teacher_train_mode", "published_metric"}
# what takes memory, in the order in which lowering it costs the least
MEMORY_FLAGS = ("cache_gb", "chunk", "recover_batch", "batch_real", "teacher_batch", "num_images", "ipc")


class UserError(Exception):
    """Bad input. The message is one line: what is wrong and how to mend it. `cli` prints it and exits with 2."""


def first_line(error: Exception) -> str:
    """An exception in one line; its type where it has no words."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------- the command line


def cli(main: Callable, args_class: type) -> None:
    """Read the flags (with --resume RUN_DIR: over that run's args.json) and call main.

    What a user can mend becomes one line and exit code 2: UserError, a failed factorisation, memory, a full disk.
    SIGINT and SIGTERM print the command that goes on and exit with 128 + their number.
    """
    catch_signals()
    threading.excepthook = quiet_about_files
    args, Run.latest = None, None
    try:
        default = args_class()
        for i, word in enumerate(sys.argv[1:], 1):
            if word == "--resume" and i + 1 < len(sys.argv):
                default = load_args(args_class, sys.argv[i + 1])
            elif word.startswith("--resume="):
                default = load_args(args_class, word.split("=", 1)[1])
        args = tyro.cli(args_class, default=default, description=sys.modules[main.__module__].__doc__)
        main(args)
    except (UserError, kernels.FailedFactorization) as error:
        fail(str(error))
    except KeyboardInterrupt:
        again = f"--resume {shlex.quote(str(Run.latest))}" if Run.latest else shlex.join(sys.argv[1:])
        print(f"\nstopped; go on with: {interpreter()} {program()} {again}".rstrip(), file=sys.stderr)
        sys.exit(128 + (_stop["signal"] or signal.SIGINT))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        flags = ["--" + name.replace("_", "-") for name in MEMORY_FLAGS if hasattr(args, name)]
        fail(f"out of memory ({first_line(error)}); lower {', '.join(flags)}, or take --precision bf16{kept()}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"could not write {error.filename or 'a file'} ({error.strerror}); free some space{kept()}")


def interpreter() -> str:
    """What to type for this Python: "python" where that is the one on the path."""
    found = shutil.which("python")
    return "python" if found and os.path.samefile(found, sys.executable) else shlex.quote(sys.executable)


def program() -> str:
    """What to type behind it for this program: a script's path, or -m and a module's name."""
    spec = sys.modules["__main__"].__spec__
    return shlex.quote(sys.argv[0]) if spec is None or not spec.parent else f"-m {spec.name}"


def quiet_about_files(info) -> None:
    """TensorBoard's writing thread prints no traceback for a full disk: the next log point raises its error again."""
    if not issubclass(info.exc_type, OSError):
        threading.__excepthook__(info)


def fail(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def kept() -> str:
    """The end of an error line: how to go on, once a run has a checkpoint."""
    if Run.latest is None or not any(Run.latest.rglob("checkpoint.pt")):
        return ""
    return f"; the last checkpoint stays: --resume {shlex.quote(str(Run.latest))}"


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory ran out (most libraries raise RuntimeError, known by its words alone)."""
    words = str(error)
    known = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")  # CPU, CUDA, its libraries, C++
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(part in words for part in known)


def load_args(args_class: type, folder: str | Path):
    """The Args of the run in `folder`, with `resume` set to it.

    Raises UserError if there is no readable args.json or if it is another script's.
    """
    path = Path(folder) / "args.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {folder}: no readable args.json there ({error}); name a run folder") from None
    if not isinstance(saved, dict):
        raise UserError(f"--resume {folder}: its args.json holds no flags; name a run folder")
    fields = {f.name for f in dataclasses.fields(args_class)}
    if unknown := sorted(set(saved) - fields):
        raise UserError(f"--resume {folder}: made by another script or version (it has {', '.join(unknown)})")
    return restored(args_class, saved | {"resume": str(folder)})


def restored(kind: type, saved: dict):
    """A dataclass from what JSON kept of it: lists were tuples, dictionaries dataclasses of their own."""
    made, values = {field.name: field.default_factory for field in dataclasses.fields(kind)}, {}
    for key, value in saved.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(made[key]):
            value = restored(made[key], value)
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def preset_name(presets: dict[str, dict], choice: str | None, data_name: str, named: bool, size: int) -> str:
    """The key of `presets` to use: --preset, else the set's own name, else by image size ("16px": from 16 px on).

    named: whether the data is the public set of that name at its own size; a folder is judged by its size, never by
    its name. Raises UserError for an unknown choice.
    """
    if choice is not None:
        if choice not in presets:
            raise UserError(f"--preset {choice}: not one of {', '.join(presets)}")
        return choice
    if named and data_name in presets:
        return data_name
    sizes = sorted(int(key[:-2]) for key in presets if key.endswith("px"))
    return f"{max([s for s in sizes if s <= size], default=sizes[0])}px"


def fill(args, preset: dict):
    """`args` with every None that `preset` knows replaced by its value. Nothing else changes a flag after parsing."""
    unset = {name: value for name, value in preset.items() if getattr(args, name) is None}
    return dataclasses.replace(args, **unset)


def check_limits(args, limits: dict[tuple[float, float], str]) -> None:
    """limits: {(low, high): names of flags}. Raises UserError unless each number is in low .. high; None may be."""
    for (low, high), names in limits.items():
        for name in names.split():
            value = getattr(args, name)
            for number in value if isinstance(value, tuple) else [value]:
                if number is not None and not low <= number <= high:
                    bound = f"at least {low:g}" if high == math.inf else f"in {low:g} .. {high:g}"
                    raise UserError(f"--{name.replace('_', '-')} {number}: must be {bound}")


def pick_device(name: str) -> torch.device:
    """CUDA where there is one, else the CPU, for "auto". Raises UserError for a device that does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise NotImplementedError("not one of cpu, cuda, mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"--device {name}: not available here ({reason}); use --device auto or cpu") from None
    return device


# ------------------------------------------------------------------------------------------------------------ stopping


class Stopped(KeyboardInterrupt):
    """The first SIGINT or SIGTERM: raised at once, or by `stop_if_asked` inside `finish_steps`."""


_stop = {"signal": 0, "wait": False}


def catch_signals() -> None:
    """From now on SIGINT and SIGTERM raise Stopped, or wait for the end of a step; a second one kills at once."""

    def catch(number: int, frame) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # the kernel's own: not even a long operation holds it up
        _stop["signal"] = number
        if not _stop["wait"]:
            raise Stopped
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may not be entered twice

    _stop.update(signal=0, wait=False)
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, catch)


@contextlib.contextmanager
def finish_steps() -> Iterator[None]:
    """Inside the block a signal waits: the loop asks `stop_asked`, saves, and calls `stop_if_asked`."""
    _stop["wait"] = True
    try:
        yield
    finally:
        _stop["wait"] = False


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Inside the block a signal raises Stopped where it comes, as outside finish_steps; so does one that waits."""
    stop_if_asked()
    before, _stop["wait"] = _stop["wait"], False
    try:
        yield
    finally:
        _stop["wait"] = before


def stop_asked() -> bool:
    return _stop["signal"] != 0


def stop_if_asked() -> None:
    """Raises Stopped if a signal came."""
    if stop_asked():
        raise Stopped


class Interval:
    """due(): whether `minutes` have passed since the last start(); never for 0."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.start()

    def start(self) -> None:
        self.began = time.monotonic()

    def due(self) -> bool:
        return self.seconds > 0 and time.monotonic() - self.began >= self.seconds


# ---------------------------------------------------------------------------------------------------------- randomness


def seed_of(*key) -> int:
    """A 63-bit seed from a key of strings and numbers: equal keys, equal seeds, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def rng(*key) -> torch.Generator:
    """A CPU generator keyed by strings and numbers, for instance rng("batch", seed, epoch)."""
    return torch.Generator().manual_seed(seed_of(*key))


@contextlib.contextmanager
def seeded(*key) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block only: module constructors draw their weights from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*key))  # torch.manual_seed would reseed the GPU as well
        yield


# --------------------------------------------------------------------------------------------------------------- files


def write_atomic(path: str | Path, writer: Callable[[Path], None]) -> None:
    """Call `writer` on a temporary name beside `path`, flush it to disk, rename. A kill leaves the old file whole.

    Raises UserError if the disk refuses (full, read-only, too large); the previous file is then intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two runs may write one teacher
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a write that was killed, a day ago or more
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                left.unlink()
    try:
        writer(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = first_line(error)
        raise UserError(f"could not write {path} ({reason}); free some space and resume, nothing was lost") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    write_atomic(path, lambda tmp: tmp.write_text(json.dumps(value, indent=1) + "\n"))


def load_checkpoint(path: str | Path) -> dict:
    """torch.load without pickle's freedom, onto the CPU. Raises UserError for a truncated or foreign file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds here
        if out_of_memory(error):
            raise
        reason = first_line(error)
        raise UserError(f"{path}: not a readable checkpoint ({reason}); delete it to start over") from None


def save_grid(path: str | Path, x: Tensor, per_row: int = 10, at_least: int = 48) -> None:
    """Write pixels (N, C, H, W), 1.0 = white, as one PNG: clamped for display, enlarged without smoothing."""
    from PIL import Image
    from torchvision.utils import make_grid

    scale = max(1, math.ceil(at_least / x.shape[-1]))
    x = x.detach().float().cpu().clamp(0, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(x, nrow=per_row, padding=max(2, scale // 2), pad_value=1.0)
    pixels = (grid * 255).round().byte().permute(1, 2, 0).numpy()
    write_atomic(path, lambda tmp: Image.fromarray(pixels).save(tmp, format="PNG"))


# -------------------------------------------------------------------------------------------------------------- memory


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had: of the GPU, or of the machine within its container's limit; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        facts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(facts["file"])  # cached files can go
        free = min(free, limit - used)
    return free


def bytes_per_image(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that autograd keeps of each image for the backward pass of function(x), x (2, C, H, W).

    Tensors of the "meta" device will do: then nothing is computed or allocated.
    """

    def kept(x: Tensor) -> int:
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()  # each storage once
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(x)
        return sum(storages.values())

    return (kept(torch.cat([x, x])) - kept(x)) // len(x)  # the difference: weights are kept as well


def fit_chunk(n: int, image: int, rest: int, device: torch.device) -> int:
    """How many of n images of `image` bytes each fit beside `rest` into 0.7 of the free memory: 1 to n."""
    free = available_memory(device)
    return n if free is None else max(1, min(n, (int(0.7 * free) - rest) // max(1, image)))


def check_memory(phases: dict[str, dict[str, int]], device: torch.device) -> int:
    """Print and return the bytes of the hungriest phase. phases: {phase: {flag that sets it: bytes}}.

    Raises UserError if it cannot fit, naming the flag that takes most.
    """
    phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    need, free = sum(parts.values()), available_memory(device)
    print(f"memory: about {need / 1e9:.2g} GB for the {phase}" + (f", {free / 1e9:.2g} GB free" if free else ""))
    if free is not None and need > free:
        flag, most = max(parts.items(), key=lambda item: item[1])
        raise UserError(
            f"the {phase} needs about {need / 1e9:.1f} GB of memory on {device}, {free / 1e9:.1f} GB are free; "
            f"{most / 1e9:.1f} GB of it are set by {flag}: lower it"
        )
    return need


# ------------------------------------------------------------------------------------------------------------- the run


class Run:
    """The folder and the log of one run.

    folder, args (resolved), device, start (first step to do: 0, or where the checkpoint stands), state (of it).
    """

    latest: Path | None = None  # folder of the run that this process works on, for the last words of `cli`

    def __init__(self, script: str, args, data_name: str, content: str):
        """Make the folder, or reopen args.resume; `content` is the data's hash, which a resumed run must meet again.

        Raises UserError if a flag that changes the method differs from the resumed run's.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.name = Path(script).stem
        self.device = pick_device(args.device)
        self.content = content
        self.state = None
        if args.resume:
            self.folder = Path(args.resume)
            args = self.reopen(args)
            for left in self.folder.glob(".*.tmp"):  # of a write that was killed
                left.unlink()
        else:
            self.folder = new_folder(Path(args.out_dir), f"{data_name}__{self.name}__{args.seed}")
            shutil.copy(script, self.folder / "script.py")
        self.args = args
        write_json(self.folder / "args.json", dataclasses.asdict(args))
        if not self.is_part():  # a part of a run goes on with the run
            Run.latest = self.folder
        self.start = self.state["step"] if self.state else 0
        self.seconds_before = self.state["seconds"] if self.state else 0.0
        self.began = time.monotonic()
        self.history = self.state["history"] if self.state else []  # [step, loss]
        self.board = SummaryWriter(str(self.folder), purge_step=self.start + 1 if args.resume else None)
        self.bar, self.seconds_per_100_steps, self.prediction, self.no_better_since = None, None, None, None
        self.interval, self.terms, self.checked, self.saved = Interval(args.save_minutes), "", self.start, self.start
        self.pauses = self.ticked = 0.0
        self.cure = "lower the learning rates or raise --ridge"  # what to do about a loss that is not finite
        print(f"run: {self.folder} on {device_words(self.device)}, torch {torch.__version__}", flush=True)
        if self.state:
            print(f"run: resumed at step {self.start}", flush=True)

    def reopen(self, args):
        """Check the resumed folder's flags and checkpoint, touching nothing; returns args with what it resolved."""
        saved = dataclasses.asdict(load_args(type(args), self.folder))
        parts = self.folder.resolve().name.rsplit("__", 3)  # data, script, seed, time
        if len(parts) == 4 and parts[1] != self.name:
            raise UserError(f"--resume {self.folder}: a run of {parts[1]}.py, not of {self.name}.py")
        parent = self.folder.resolve().parent
        if (parent / "args.json").exists() and not self.is_part():
            raise UserError(f"--resume {self.folder}: a part of the run {parent}: resume that")
        args = fill(args, saved)
        for key, value in dataclasses.asdict(args).items():
            free = key in FREE_ON_RESUME or key.startswith(("eval_", "attack_"))
            if not free and value != saved[key]:
                flag = "--" + key.replace("_", "-")
                raise UserError(f"--resume: {flag} was {saved[key]}, now {value}; drop the flag or start a new run")
        path = self.file("checkpoint.pt")
        if path.exists():
            self.state = load_checkpoint(path)
            if not isinstance(self.state, dict) or self.state.get("format") != f"{self.name} 1":
                raise UserError(f"{path}: not a checkpoint of {self.name}; delete it to start over")
            if self.state["content"] != self.content:
                raise UserError(f"--resume {self.folder}: the data changed since (content hash differs); start anew")
        return args

    def is_part(self) -> bool:
        """Whether it is inside the run that this process works on."""
        return Run.latest is not None and self.folder.resolve().parent == Run.latest.resolve()

    def file(self, name: str) -> Path:
        return self.folder / name

    def part(self, name: str, **changes):
        """The args of a run in the folder `name` inside this one's, of the same script: begun, or gone on with.

        changes: of this run's args. A part is a whole run, which goes on when this one does.
        """
        folder = self.file(name)
        args = dataclasses.replace(self.args, resume=str(folder), **changes)
        if (folder / "args.json").exists():
            return fill(args, dataclasses.asdict(load_args(type(args), folder)))  # what it resolved
        folder.mkdir(exist_ok=True)
        shutil.copy(self.file("script.py"), folder)
        write_json(folder / "args.json", dataclasses.asdict(args))
        return args

    def seconds(self) -> float:
        """Seconds this run has taken, the sessions before a resume included."""
        return self.seconds_before + time.monotonic() - self.began

    def steps(self, total: int, later: Callable[[int], float] = lambda done: 0.0) -> Iterator[int]:
        """The steps still to do, start .. total - 1, behind a progress bar; a signal waits for the end of a step.

        later: predicted seconds of all that comes beside the steps themselves, once `done` of them are done.
        """
        every = 0.2 if sys.stderr.isatty() else 30.0
        self.total, self.later, self.pauses, self.done = total, later, 0.0, self.start
        with tqdm(total=total, initial=self.start, desc=self.name, mininterval=every, dynamic_ncols=True) as self.bar:
            self.loop_began = self.ticked = time.monotonic()
            self.tick_step, self.first = self.start, 0
            with finish_steps():
                for step in range(self.start, total):
                    yield step
                    self.done = step + 1
                    self.bar.update()
                    if step == self.start:  # what the first step loads and allocates says nothing of the others
                        self.loop_began, self.first, self.pauses = time.monotonic(), 1, 0.0
                    if self.prediction is None and self.done - self.start >= max(3, total // 50):
                        predicted = self.seconds() + self.seconds_left()
                        self.prediction = {"at_step": self.done, "seconds": round(predicted, 1)}
                        end = time.strftime("%H:%M", time.localtime(time.time() + self.seconds_left()))
                        words = tqdm.format_interval(predicted)
                        what = "for this part" if self.is_part() else "in all"
                        tqdm.write(f"run: about {words} {what}, evaluation included, until {end}")
                    if self.saved == self.done:  # else it came after the question whether to save: one step more
                        stop_if_asked()
            stop_if_asked()
            if self.start < total:
                self.seconds_per_100_steps = 100 * self.seconds_per_step()

    def seconds_per_step(self) -> float:
        return (time.monotonic() - self.loop_began - self.pauses) / max(1, self.done - self.start - self.first)

    def seconds_left(self) -> float:
        """Predicted seconds to the end of the whole run."""
        return (self.total - self.done) * self.seconds_per_step() + self.later(self.done)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent in the block is no part of a step, and a signal stops it at once: save before it."""
        began = time.monotonic()
        with stop_at_once():
            yield
        self.pauses += time.monotonic() - began
        self.ticked += time.monotonic() - began

    def due(self, done: int, every: int) -> bool:
        """Whether to save now: each `every` steps, after --save-minutes, at the end, and before a stop."""
        return done % every == 0 or done == self.total or self.interval.due() or stop_asked()

    def check_finite(self, step: int, scalars: dict[str, float], context: str = "") -> None:
        """Raises UserError if a scalar is not finite or a ridge solve failed since the last check.

        It names all scalars and `context` (n_s, d). Waits for the device.
        """
        self.terms = ", ".join(f"{key} {value:.4g}" for key, value in scalars.items()) + f"; {context}"
        since, self.checked = self.checked + 1, step
        steps = f"{step}" if since >= step else f"{since} to {step}"
        try:
            kernels.raise_if_failed(steps)
        except kernels.FailedFactorization as error:
            raise UserError(f"{error} ({self.terms}); {self.last_checkpoint()}") from None
        if not all(math.isfinite(value) for value in scalars.values()):
            raise UserError(f"step {steps}: not finite ({self.terms}); {self.mend()}")

    def mend(self) -> str:
        return f"{self.cure}; {self.last_checkpoint()}"

    def last_checkpoint(self) -> str:
        there = self.file("checkpoint.pt").exists()
        return f"{'the last good checkpoint stays' if there else 'there is no checkpoint yet'} in {Run.latest}"

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars to TensorBoard with steps/s and memory; "loss" goes into the progress bar and curve.png."""
        now, self.done = time.monotonic(), step
        speed = {
            "steps_per_s": (step - self.tick_step) / max(now - self.ticked, 1e-9),
            "memory_gb": peak_memory(self.device) / 1e9,
        }
        self.ticked, self.tick_step = now, step
        for key, value in (scalars | speed).items():
            self.board.add_scalar(key, value, step)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {scalars['loss']:.4f}, all in {tqdm.format_interval(self.seconds_left())}")
        self.history.append([step, scalars["loss"]])

    def grid(self, step: int, total: int, pixels: Callable[[], Tensor], per_row: int = 10) -> None:
        """At step 0, at powers of ten and at the end: the first 100 images as grid_{step}.png.

        pixels: called only then, gives (N, C, H, W) in pixel units.
        """
        if step == total or step == 0 or math.log10(step).is_integer():
            save_grid(self.file(f"grid_{step:06d}.png"), pixels()[:100], per_row)

    def save(self, step: int, **state) -> None:
        """Write checkpoint.pt: `step` steps are done. Raises UserError rather than save a tensor that is not finite."""
        for key, value in state.items():
            if not all_finite(value):
                terms = f" ({self.terms})" if self.terms else ""
                raise UserError(f"step {step}: {key} is not finite{terms}; {self.mend()}")
        state |= dict(format=f"{self.name} 1", step=step, seconds=self.seconds(), content=self.content)
        state |= dict(history=self.history)
        write_atomic(self.file("checkpoint.pt"), lambda tmp: torch.save(state, tmp))
        self.interval.start()
        self.saved = step

    def log_evaluation(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars of the distilled set to TensorBoard; they have no part in the loop's speed or loss."""
        for key, value in scalars.items():
            self.board.add_scalar(key, value, step)

    def plateau(self, curve: list[dict], metric: str) -> None:
        """Say so, once, when the curve's metric (lower is better) no longer falls."""
        points = [(point["step"], point[metric]) for point in curve]
        steps, values = [step for step, _ in points], [value["mean"] for _, value in points]
        errors = [value["std"] / len(value["values"]) ** 0.5 for _, value in points]
        since = plateau(values, errors)
        if since is not None and since != self.no_better_since:
            self.no_better_since = since
            tqdm.write(
                f"plateau: {metric} {values[-1]:.4f} at step {steps[-1]} is no better than {values[since]:.4f} at step "
                f"{steps[since]}; the rates still fall to their end, so a new run with fewer --steps may do as well"
            )

    def check_same(self, what: str, value: Tensor) -> None:
        """On resume: compare `value` with what save(checked=...) stored. Raises UserError if it is another's."""
        if self.state:
            saved = self.state["checked"]
            scale = float(saved.abs().mean())  # rounding differs between devices
            if saved.shape != value.shape or not torch.allclose(saved, value, rtol=1e-2, atol=1e-2 * scale):
                raise UserError(f"--resume {self.folder}: the {what} changed since; restore it or start a new run")

    def plot(self, points: dict[str, list[tuple[int, float]]], title: str) -> None:
        """Write curve.png: the logged loss, and named points (step, value) over it."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self.history, strict=True), lw=0.7, color="0.6", label="loss")
        for name, values in points.items():
            axes.plot(*zip(*values, strict=True), "o-", label=name)
        axes.set(xlabel="outer step", yscale="log", title=title)
        axes.legend()
        write_atomic(self.file("curve.png"), lambda tmp: figure.savefig(tmp, format="png", dpi=120))

    def finish(self, **result) -> dict:
        """Write result.json with what made it (flags, commit, versions, device, time, memory) and return it."""
        facts = dict(
            method=self.name,
            seed=self.args.seed,
            seconds=round(self.seconds(), 1),
            seconds_predicted=self.prediction,
            seconds_per_100_steps=self.seconds_per_100_steps,
            peak_memory_bytes=peak_memory(self.device),
            device=device_words(self.device),
            commit=commit(),
            versions=versions(),
            args=dataclasses.asdict(self.args),
        )
        result = result | facts
        write_json(self.file("result.json"), result)
        self.board.close()
        cost = f"{result['seconds']:.0f} s, {result['peak_memory_bytes'] / 1e9:.1f} GB"
        print(f"run: {self.file('result.json')} after {cost}")
        return result


def plateau(values: list[float], errors: list[float], patience: int = 3) -> int | None:
    """Index of the lowest value before the last `patience` ones if none of those is lower by more than its error.

    errors: standard errors of the values. None: still falling, or too few values to tell.
    """
    if len(values) <= patience:
        return None
    best = min(range(len(values) - patience), key=values.__getitem__)
    return best if min(values[-patience:]) >= values[best] - errors[best] else None


def all_finite(state) -> bool:
    """Whether every tensor in nested dicts and lists is finite."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, (list, tuple)):
        return True
    return all(all_finite(part) for part in state)


def new_folder(parent: Path, prefix: str) -> Path:
    """Make parent/prefix__time, with a counter if two runs start in the same second. Raises UserError if it cannot."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *[f"-{i}" for i in range(2, 1000)]]:
        try:
            folder = parent / f"{prefix}__{stamp}{suffix}"
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if parent.exists() and not parent.is_dir():
                raise UserError(f"--out-dir {parent} is a file; name a folder") from None
        except OSError as error:
            raise UserError(f"--out-dir {parent}: cannot make a folder there ({error.strerror})") from None
    raise UserError(f"--out-dir {parent}: a thousand runs started this second")


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # on Linux getrusage counts what started this process as well
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def commit() -> str | None:
    """The commit of the sources, "+changes" if they differ from it; None outside git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
        return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
