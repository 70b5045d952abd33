"""krr_st.py: the mathematics against naive restatements, the pool, a whole small run, resume, bad input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import watched
from conftest import refuse
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from watched import equal, same_end

import common.pairs
import common.run
import kernels
import krr_st
from common.artefact import load_distilled
from common.augment import crop_flip
from common.data import load
from common.models import ResNet
from common.recipes import SETTINGS
from common.teacher import Teacher, freeze, load_own
from krr_st import Args, Pool, batch_index, krr_st_loss, main, ridge_lam

REPO = Path(krr_st.__file__).parent
TINY = dict(
    steps=12, num_images=5, batch_real=64, widths=(4, 4), pool=3, max_age=4, log_every=1, save_every=4, device="cpu",
    teacher_width=2, teacher_epochs=2, teacher_projector=8, eval_runs=2, eval_epochs=4, eval_probe_steps=3,
    eval_finetune_steps=2,
)  # fmt: skip


def tiny(out_dir, **changes) -> Args:
    own = TINY
    if changes.get("teacher", "train") != "train":  # trained already: no settings beside it
        own = {key: value for key, value in own.items() if key.removeprefix("teacher_") not in SETTINGS}
    return Args(**own | {"out_dir": str(out_dir)} | changes)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """An out-dir whose teacher is trained, so that tests that copy it only distil."""
    out_dir = tmp_path_factory.mktemp("teachers")
    result = main(tiny(out_dir))
    return out_dir, result


@pytest.fixture
def out_dir(tmp_path, teachers):
    shutil.copytree(teachers[0] / "teachers", tmp_path / "runs" / "teachers")
    return tmp_path / "runs"


def only_run(out_dir: Path) -> Path:
    (folder,) = [p for p in out_dir.iterdir() if p.name != "teachers"]
    return folder


# -------------------------------------------------------------------------------------------------------- mathematics


def with_ones(features):
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], 1)


def naive_loss(net, x_s, y_s, f_t, y_t, ridge, scale, grad):
    """The outer objective word for word: Gram matrices with the ones column, LU solve, autograd."""
    f_s = with_ones(net(x_s))
    k_ss, k_ts = f_s @ f_s.T, f_t @ f_s.T
    trace = k_ss.trace() if grad else k_ss.trace().detach()
    lam = ridge * trace / (len(x_s) if scale == "trace_mean" else 1)
    alpha = torch.linalg.solve(k_ss + lam * torch.eye(len(x_s), dtype=x_s.dtype), y_s)
    return ((k_ts @ alpha - y_t) ** 2).sum() / y_t.numel()


def naive_primal_loss(net, x_s, y_s, f_t, y_t, ridge, scale, grad):
    """The same by the d x d system."""
    f_s = with_ones(net(x_s))
    trace = f_s.square().sum() if grad else f_s.square().sum().detach()
    lam = ridge * trace / (len(x_s) if scale == "trace_mean" else 1)
    head = torch.linalg.solve(f_s.T @ f_s + lam * torch.eye(f_s.shape[1], dtype=x_s.dtype), f_s.T @ y_s)
    return ((f_t @ head - y_t) ** 2).sum() / y_t.numel()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("scale", ["trace", "trace_mean"])
@pytest.mark.parametrize(
    ("n_s", "n_t", "d", "c", "naive"),
    [(9, 14, 30, 3, naive_loss), (9, 14, 30, 40, naive_loss), (40, 14, 11, 5, naive_primal_loss)],
    ids=["dual, small c", "dual, large c", "primal"],
)
def test_loss_and_gradients_equal_the_naive_restatement(n_s, n_t, d, c, naive, scale, grad):
    """Value and gradients for images and targets, float64, to 1e-9 relative; features from a smooth random network."""
    g = torch.Generator().manual_seed(d + c)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weight = draw(7, d)
    net = lambda x: torch.tanh(x @ weight)  # noqa: E731
    x_s, y_s = draw(n_s, 7).requires_grad_(), draw(n_s, c).requires_grad_()
    f_t, y_t = net(draw(n_t, 7)), draw(n_t, c)
    ridge = 1e-3
    f_s = net(x_s)
    ours = krr_st_loss(f_t, y_t, f_s, y_s, ridge_lam(f_s, ridge, scale, grad))
    theirs = naive(net, x_s, y_s, with_ones(f_t), y_t, ridge, scale, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for a, b in zip(torch.autograd.grad(ours, [x_s, y_s]), torch.autograd.grad(theirs, [x_s, y_s]), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_ridge_lam_is_the_trace_of_the_gram_matrix_with_its_gradient():
    f_s = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (grad,) = torch.autograd.grad(ridge_lam(f_s, 1e-3, "trace_mean", True), f_s)
    torch.testing.assert_close(grad, 2e-3 * f_s / 4)
    h = with_ones(f_s)
    torch.testing.assert_close(ridge_lam(f_s, 2.0, "trace", False), 2.0 * (h @ h.T).trace().detach())


def test_batches_are_shuffled_epochs_that_keep_the_short_one():
    epochs = [[batch_index(step, 10, 4, seed=1) for step in range(e * 3, e * 3 + 3)] for e in range(2)]
    for epoch in epochs:
        assert [len(b) for b in epoch] == [4, 4, 2]
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()
    assert batch_index(0, 10, 4, seed=2).tolist() != epochs[0][0].tolist()


# --------------------------------------------------------------------------------------------------------------- pool


def small_pool(**changes) -> tuple[Pool, torch.Tensor, torch.Tensor]:
    args = Args(**dict(pool=4, max_age=5, lr_net=0.01) | changes)
    pool = Pool(lambda: nn.Linear(3, 2), torch.device("cpu"), args)
    return pool, torch.eye(3), torch.ones(3, 2)


def test_the_pool_starts_at_spread_ages_that_were_really_trained():
    pool, x_s, y_s = small_pool(pool=8, max_age=50)
    fresh = [net.weight.clone() for net in pool.nets]
    pool.warm_up(x_s, y_s)
    assert len(set(pool.ages)) > 4 and all(1 <= age < 50 for age in pool.ages)
    for slot, age in enumerate(pool.ages):
        twin, *_ = small_pool(pool=8, max_age=50)
        assert torch.equal(twin.nets[slot].weight, fresh[slot])
        for _ in range(age):
            twin.train(slot, x_s, y_s)
        assert torch.equal(twin.nets[slot].weight, pool.nets[slot].weight)


def test_a_network_of_age_is_replaced_and_starts_again():
    pool, x_s, y_s = small_pool()
    history = []
    for _ in range(14):
        pool.grow(0, x_s, y_s)
        history.append(pool.ages[0])
    assert history == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert pool.births[0] == 3 and pool.births[1] == 1


def test_replacement_gives_fresh_weights_and_momentum():
    pool, x_s, y_s = small_pool()
    first = pool.nets[0].weight.clone()
    for _ in range(6):
        pool.grow(0, x_s, y_s)
    assert not torch.equal(pool.nets[0].weight, first)  # another draw, untrained
    assert not pool.optimizers[0].state
    with common.run.seeded("pool network", pool.args.seed, 0, 1):
        assert torch.equal(pool.nets[0].weight, nn.Linear(3, 2).weight)


def test_the_released_pool_dies_out():
    """Departure 1: once of age, a slot is replaced at every draw and never trained again."""
    pool, x_s, y_s = small_pool(pool_reset="released")
    for _ in range(12):
        pool.grow(0, x_s, y_s)
    assert pool.ages[0] == 5 and pool.births[0] == 8  # 5 training steps, then 7 replacements in 7 draws
    assert not pool.optimizers[0].state  # what is drawn from now on was never trained


def test_the_inner_step_is_sgd_on_the_mean_squared_error():
    pool, x_s, y_s = small_pool(lr_net=0.5, momentum_net=0.9, wd_net=0.25)
    weight, bias = (p.detach().clone() for p in pool.nets[0].parameters())
    buffers = None
    for _ in range(3):
        residual = x_s @ weight.T + bias - y_s
        grads = [2 * residual.T @ x_s / residual.numel(), 2 * residual.sum(0) / residual.numel()]
        grads = [g + 0.25 * p for g, p in zip(grads, (weight, bias), strict=True)]
        buffers = grads if buffers is None else [0.9 * b + g for b, g in zip(buffers, grads, strict=True)]
        weight, bias = weight - 0.5 * buffers[0], bias - 0.5 * buffers[1]
        pool.train(0, x_s, y_s)
    torch.testing.assert_close(pool.nets[0].weight.detach(), weight)
    torch.testing.assert_close(pool.nets[0].bias.detach(), bias)


# ------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_writes_what_it_says(teachers):
    out_dir, result = teachers
    folder = only_run(out_dir)
    assert folder.name.startswith("digits__krr_st__0__")
    names = {p.name for p in folder.iterdir()}
    assert {"args.json", "script.py", "checkpoint.pt", "distilled.safetensors", "result.json", "curve.json"} <= names
    assert {"grid_000000.png", "grid_000001.png", "grid_000010.png", "grid_000012.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    args = json.loads((folder / "args.json").read_text())
    assert args["lr_img"] == krr_st.DIGITS["lr_img"] and args["steps"] == 12  # None resolved, flags kept
    assert (folder / "script.py").read_text() == Path(krr_st.__file__).read_text()
    on_disk = json.loads((folder / "result.json").read_text())
    assert on_disk == json.loads(json.dumps(result))
    assert set(on_disk["eval"]) == {"teacher", "none", "random_real", "distilled"}
    for row in ("none", "random_real", "distilled"):
        assert set(on_disk["eval"][row]) == {"match", "probe", "few_5", "few_1", "finetune"}
        assert all(len(metric["values"]) == 2 for metric in on_disk["eval"][row].values())
    distilled = load_distilled(folder / "distilled.safetensors", "krr_st")
    state = common.run.load_checkpoint(folder / "checkpoint.pt")
    torch.testing.assert_close(distilled.inputs(), state["x_s"], rtol=0, atol=2e-6)
    assert torch.equal(distilled.y, state["y_s"]) and distilled.step == 12 and state["step"] == 12
    assert on_disk["storage_bytes"] == 4 * (5 * 64 + 5 * 16 + 2)


def test_the_loop_is_the_method(out_dir):
    """Two outer steps restated plainly: naive loss, AdamW by hand, pool by the book. Same images and targets."""
    args = tiny(out_dir, steps=2, save_every=1, eval_runs=1)
    main(args)
    folder = only_run(out_dir)
    state = common.run.load_checkpoint(folder / "checkpoint.pt")
    args = common.run.load_args(Args, folder)
    data = load("digits", data_dir=args.data_dir)
    (teacher,) = (out_dir / "teachers").iterdir()
    targets = load_file(next(teacher.glob("targets-train-*")))["targets"]
    first = torch.randperm(len(data.x_train), generator=common.run.rng("initial images", 0))[:5]
    pixels = (data.x_train.double() / 255 - data.mean.double()) / data.std.double()
    x_s, y_s = pixels[first].float().requires_grad_(), targets[first].clone().requires_grad_()
    pool = Pool(lambda: krr_st.ConvNet(1, 8, targets.shape[1], args.widths), torch.device("cpu"), args)
    pool.warm_up(x_s.detach(), y_s.detach())
    moments = {}
    for step in range(2):
        slot = int(torch.randint(args.pool, (), generator=common.run.rng("slot", 0, step)))
        net = pool.nets[slot].eval()
        index = batch_index(step, len(data.x_train), 64, 0)
        one = torch.ones(64, 1, dtype=torch.float64)
        f_t = torch.cat([net.features(pixels[index].float()).detach().double(), one], 1)
        features = lambda x, net=net: net.features(x.float()).double()  # noqa: E731
        y_t = targets[index].double()
        loss = naive_loss(features, x_s.double(), y_s.double(), f_t, y_t, 1e-6, "trace", False)
        for name, tensor, grad in zip("xy", (x_s, y_s), torch.autograd.grad(loss, [x_s, y_s]), strict=True):
            m, v = moments.get(name, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            moments[name] = m, v
            lr = {"x": args.lr_img, "y": args.lr_label}[name] * (1 - 0.999 * step / 2)
            update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                tensor -= lr * update
        pool.grow(slot, x_s.detach(), y_s.detach())
    torch.testing.assert_close(state["x_s"], x_s.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state["y_s"], y_s.detach(), rtol=1e-3, atol=1e-4)
    assert state["pool"]["ages"] == pool.ages


@pytest.mark.parametrize(
    "change",
    [
        dict(init_space="raw"), dict(outer_aug="crop_flip"), dict(ridge_scale="trace_mean"), dict(ridge_grad=True),
        dict(ridge=1e-2), dict(pool_reset="released"), dict(pool_opt="adamw"), dict(outer_opt="sgd"),
        dict(grad_clip=1e-4), dict(lr_end=1.0), dict(norm="instance"), dict(norm="none"), dict(lr_net=0.01),
        dict(momentum_net=0.0), dict(wd_net=0.5), dict(max_age=2), dict(pool=2), dict(lr_img=1e-3), dict(lr_label=1e-3),
        dict(batch_real=32), dict(seed=1), dict(ridge_precision="fp32"), dict(precision="bf16"),
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items()),
)  # fmt: skip
def test_every_flag_of_the_method_does_something(out_dir, teachers, change):
    short = dict(eval_runs=1, eval_epochs=1, eval_finetune_steps=0, eval_probe_steps=1)
    result = main(tiny(out_dir, **short | change))
    assert np.isfinite(result["eval"]["distilled"]["match"]["mean"])
    before, after = (load_distilled(only_run(d) / "distilled.safetensors") for d in (teachers[0], out_dir))
    assert after.x.isfinite().all() and after.y.isfinite().all()
    assert not torch.equal(after.x, before.x) and not torch.equal(after.y, before.y)


def test_the_triton_backend_runs_the_same_method(out_dir, tmp_path):
    """On a GPU, or through the interpreter: the first steps agree with torch's to rounding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (torch.cuda.is_available() or kernels.backend.INTERPRETED):
        pytest.skip("no CUDA device and no Triton interpreter")
    short = dict(steps=2, device=device, eval_runs=1, eval_epochs=1, eval_finetune_steps=0, eval_probe_steps=1)
    shutil.copytree(out_dir, tmp_path / "torch")
    results = [main(tiny(out_dir, backend="triton", **short)), main(tiny(tmp_path / "torch", backend="torch", **short))]
    assert ["triton backend" in r["backend"] for r in results] == [True, False]
    ours, theirs = (load_distilled(only_run(d) / "distilled.safetensors") for d in (out_dir, tmp_path / "torch"))
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.y, theirs.y, rtol=1e-3, atol=1e-4)


def test_a_backend_that_cannot_run_here_is_refused(out_dir, monkeypatch):
    monkeypatch.setattr(kernels.backend, "INTERPRETED", False)
    refuse(lambda: main(tiny(out_dir, backend="triton")), "--backend", "needs a CUDA device, not cpu")
    monkeypatch.setattr(kernels.backend, "triton", None)
    refuse(lambda: main(tiny(out_dir, backend="triton")), "--backend", "not installed")


def test_raw_start_is_the_released_one(out_dir):
    """Departure 2: pixels in [0, 1] where the networks expect normalised ones; the artefact maps them back."""
    main(tiny(out_dir, init_space="raw", lr_img=0.0, steps=1, eval_runs=1))
    distilled = load_distilled(only_run(out_dir) / "distilled.safetensors")
    data = load("digits", data_dir="data")
    first = torch.randperm(len(data.x_train), generator=common.run.rng("initial images", 0))[:5]
    torch.testing.assert_close(distilled.inputs(), data.x_train[first] / 255, rtol=0, atol=1e-6)


def test_the_outer_targets_see_the_augmented_images(out_dir, monkeypatch):
    """Images and targets of a step are of one and the same crop, drawn as crop_flip draws it."""
    images, targets, of_images, loss = [], [], krr_st.gather, krr_st.krr_st_loss
    monkeypatch.setattr(krr_st, "gather", lambda *args: images.append(of_images(*args)) or images[-1])
    monkeypatch.setattr(krr_st, "krr_st_loss", lambda f_t, y_t, *rest: targets.append(y_t) or loss(f_t, y_t, *rest))
    main(tiny(out_dir, outer_aug="crop_flip", steps=3, eval_runs=1))
    (folder,) = (out_dir / "teachers").iterdir()
    teacher, data = load_own(folder / "teacher.safetensors"), load("digits", data_dir="data")
    assert len(images) == len(targets) == 3
    for step, (x, y_t) in enumerate(zip(images, targets, strict=True)):
        plain = data.x_train[batch_index(step, len(data.x_train), 64, 0)]
        assert torch.equal(x, crop_flip(plain, common.run.rng("crop flip", 0, step), False))  # digits: no mirror
        assert not torch.equal(x, plain)
        torch.testing.assert_close(y_t, teacher.targets(x, torch.device("cpu")))


@pytest.fixture(scope="module")
def augmented_end(teachers, tmp_path_factory):
    """The end of a run with --outer-aug crop_flip whose cache holds everything."""
    out_dir = tmp_path_factory.mktemp("augmented") / "runs"
    shutil.copytree(teachers[0] / "teachers", out_dir / "teachers")
    result = main(tiny(out_dir, outer_aug="crop_flip", batch_real=700, eval_runs=1))
    assert result["target_cache"]["hits"] > 0 and result["target_cache"]["misses"] < 700 * 12
    return only_run(out_dir)


@pytest.mark.parametrize("change", [dict(cache_gb=0.0), dict(cache_gb=1e-4), dict(cache_device="cpu")])
def test_the_cache_of_augmented_targets_changes_nothing(out_dir, augmented_end, change):
    result = main(tiny(out_dir, outer_aug="crop_flip", batch_real=700, eval_runs=1, **change))
    same_end(only_run(out_dir), augmented_end)
    if change == dict(cache_gb=0.0):
        assert result["target_cache"] == dict(hits=0, misses=4 * 1437)  # twelve steps are four epochs


def test_targets_kept_in_bf16_are_another_method(out_dir, augmented_end):
    main(tiny(out_dir, outer_aug="crop_flip", batch_real=700, eval_runs=1, cache_precision="bf16"))
    a, b = (load_distilled(folder / "distilled.safetensors") for folder in (only_run(out_dir), augmented_end))
    assert not torch.equal(a.x, b.x)
    torch.testing.assert_close(a.y, b.y, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks_are_exact(out_dir, monkeypatch, precision):
    """The gradient of five images two by two is that of all at once, up to the order of a convolution's sums."""
    main(tiny(out_dir, steps=2, eval_runs=1, precision=precision))
    whole = load_distilled(only_run(out_dir) / "distilled.safetensors")
    shutil.rmtree(only_run(out_dir))
    seen, chunked = [], krr_st.features_chunked
    monkeypatch.setattr(krr_st, "features_chunked", lambda *args: seen.append(args[2]) or chunked(*args))
    main(tiny(out_dir, steps=2, eval_runs=1, precision=precision, chunk=2))
    assert seen == [2, 2]
    parts = load_distilled(only_run(out_dir) / "distilled.safetensors")
    close = dict(rtol=1e-3, atol=1e-4) if precision == "fp32" else dict(rtol=0.1, atol=0.1)
    torch.testing.assert_close(parts.x, whole.x, **close)
    torch.testing.assert_close(parts.y, whole.y, **close)


def test_the_chunk_is_what_fits_the_memory(out_dir, monkeypatch):
    """Three images' worth in seven tenths of the free memory: chosen once, recorded, and kept by a resumed run."""
    args, data = tiny(out_dir), load("digits", data_dir="data")
    make_net = lambda: krr_st.ConvNet(1, 8, 16, args.widths, args.norm)  # noqa: E731
    cpu = torch.device("cpu")
    image, phases = krr_st.memory_needs(make_net, data, 16, cpu, common.run.fill(args, krr_st.DIGITS))
    rest = sum(phases["outer step"].values())
    monkeypatch.setattr(common.run, "available_memory", lambda device: int((rest + 3.5 * image) / 0.7))
    seen = []  # other phases need more than that, and are not refused here
    monkeypatch.setattr(krr_st, "check_memory", lambda phases, device: seen.append(phases) or 0)
    main(args)
    assert seen[0]["outer step"]["--chunk"] == 3 * image
    assert json.loads((only_run(out_dir) / "args.json").read_text())["chunk"] == 3
    monkeypatch.undo()
    assert main(common.run.load_args(Args, only_run(out_dir)))["args"]["chunk"] == 3


def test_no_weight_of_the_pool_takes_a_gradient_in_the_outer_pass(out_dir, monkeypatch):
    original, seen = torch.autograd.grad, []

    def grad(loss, inputs):
        todo, nodes = [loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in nodes:
                continue
            nodes.add(node)
            todo += [parent for parent, _ in node.next_functions]
        leaves = [node.variable for node in nodes if hasattr(node, "variable")]
        seen.append({id(leaf) for leaf in leaves} == {id(x) for x in inputs})
        return original(loss, inputs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    main(tiny(out_dir, steps=3, eval_runs=1))
    assert seen == [True] * 3


MEASURE = """
import sys, resource
import torch
import krr_st, common.run
from pathlib import Path

def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])

class End(Exception):
    pass

def end(*args, **kwargs):
    raise End

def started(step, *rest):
    if step == 0:
        needs.append(resident("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")
    return batch_index(step, *rest)

def checked(phases, device):
    if "evaluation" in phases:
        needs.append(max(sum(phases[p].values()) for p in ("outer step", "training of the pool")))
        needs.append(resident("VmRSS"))
    return check_memory(phases, device)

needs, check_memory, batch_index = [], krr_st.check_memory, krr_st.batch_index
krr_st.check_memory, krr_st.batch_index, krr_st.evaluate_pairs = checked, started, end
krr_st.predict_seconds = lambda *args: 0.0
words = sys.argv[1:]
import tyro
try:
    krr_st.main(tyro.cli(krr_st.Args, args=words))
except End:
    pass
print("MEASURED", needs[0], resident("VmHWM") - needs[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_images=1437, widths=(128, 256)),
        dict(num_images=1000, widths=(64, 512), norm="none"),
        dict(num_images=20, batch_real=1437, widths=(256, 256)),
        dict(num_images=1437, widths=(128, 256), precision="bf16"),
    ],
    ids=str,
)
def test_the_memory_estimate_is_near_the_measured_peak(out_dir, changes):
    """Of the outer loop, in resident memory beyond what the process had before."""
    words = watched.flags(**TINY | dict(out_dir=out_dir, steps=4, max_age=2) | changes)
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, env=env)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MEASURED"))
    estimate, measured = map(int, line.split()[1:])
    print(f"estimate {estimate / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert 0.6 < estimate / measured < 1.7, (estimate, measured)


def test_images_held_out_are_seen_by_nothing_but_the_curve(out_dir, monkeypatch):
    seen, trained = [], []
    evaluate, teacher = krr_st.evaluate_pairs, krr_st.train_teacher
    monkeypatch.setattr(krr_st, "evaluate_pairs", lambda *args: seen.append(args) or evaluate(*args))
    monkeypatch.setattr(krr_st, "train_teacher", lambda *a, **k: trained.append(a[1]) or teacher(*a, **k))
    main(tiny(out_dir, holdout=0.25, eval_every=6, eval_runs=1))
    whole = load("digits", data_dir="data")
    curve, final = (args[1] for args in seen)
    assert len(curve.x_test) == len(whole.x_train) - len(final.x_train) > 300
    assert torch.equal(final.x_test, whole.x_test) and torch.equal(curve.x_train, final.x_train)
    assert trained == [final]
    everything = {bytes(x.numpy()) for x in whole.x_train}
    held, used = ({bytes(x.contiguous().numpy()) for x in part} for part in (curve.x_test, final.x_train))
    assert held | used == everything and len(held & used) == 0
    points = json.loads((only_run(out_dir) / "curve.json").read_text())
    assert [point["step"] for point in points] == [6]  # the last is of other images, and in the table


def test_a_checkpoint_by_the_clock_changes_nothing(out_dir, teachers):
    main(tiny(out_dir, save_minutes=1e-9))  # at every step
    same_end(only_run(out_dir), only_run(teachers[0]))


def two_steps(out_dir, monkeypatch, **changes):
    """x_s before and after each of two steps, and the gradients of images and targets."""
    grads, values = [], []
    original = torch.autograd.grad

    def record(loss, inputs):
        values.append([t.detach().clone() for t in inputs])
        grads.append([g.clone() for g in original(loss, inputs)])
        return tuple(g.clone() for g in grads[-1])

    monkeypatch.setattr(torch.autograd, "grad", record)
    main(tiny(out_dir, steps=2, eval_runs=1, lr_end=0.5, lr_img=0.3, lr_label=0.2, **changes))
    state = common.run.load_checkpoint(only_run(out_dir) / "checkpoint.pt")
    values.append([state["x_s"], state["y_s"]])
    return values, grads


def test_outer_sgd_has_momentum_one_half_and_a_linear_schedule(out_dir, monkeypatch):
    values, grads = two_steps(out_dir, monkeypatch, outer_opt="sgd")
    for i, lr in enumerate((0.3, 0.2)):
        first = values[0][i] - lr * grads[0][i]
        torch.testing.assert_close(values[1][i], first)
        second = first - 0.75 * lr * (0.5 * grads[0][i] + grads[1][i])  # half-way to lr_end = 0.5
        torch.testing.assert_close(values[2][i], second)


def test_gradients_are_clipped_each_to_its_own_norm(out_dir, monkeypatch):
    values, grads = two_steps(out_dir, monkeypatch, outer_opt="sgd", grad_clip=1e-3)
    for i, lr in enumerate((0.3, 0.2)):
        assert grads[0][i].norm() > 2e-3
        torch.testing.assert_close((values[0][i] - values[1][i]).norm(), torch.tensor(lr * 1e-3), rtol=1e-3, atol=0)


def test_a_library_teacher_serves_a_whole_run(out_dir, monkeypatch):
    def library(spec, data, device, stem_padding):
        with common.run.seeded("library"):
            net = freeze(ResNet("resnet10", 1, 2))
        info = dict(method="torchvision", model="resnet10", mean=[0.5], std=[0.25])
        return Teacher(net, net.dim, torch.tensor([0.5]), torch.tensor([0.25]), spec, info, None)

    monkeypatch.setattr(krr_st, "load_teacher", library)
    result = main(tiny(out_dir, teacher="torchvision:resnet10"))
    assert result["teacher"]["name"] == "torchvision:resnet10"
    assert load_distilled(only_run(out_dir) / "distilled.safetensors").meta["teacher"]["model"] == "resnet10"


def test_full_row_and_curve(out_dir):
    result = main(tiny(out_dir, full_row=True, eval_every=5))
    assert set(result["eval"]["all_real"]) == {"match", "probe", "few_5", "few_1", "finetune"}
    curve = json.loads((only_run(out_dir) / "curve.json").read_text())
    assert [point["step"] for point in curve] == [5, 10, 12]
    assert curve[-1]["match"] == result["eval"]["distilled"]["match"]
    assert curve[0]["match"]["mean"] != curve[1]["match"]["mean"]


def test_evaluation_flags_do_not_change_the_distilled_set(out_dir, teachers):
    main(tiny(out_dir, eval_every=3, eval_runs=1, eval_epochs=1, log_every=7, save_every=5))
    a, b = (load_distilled(only_run(d) / "distilled.safetensors") for d in (teachers[0], out_dir))
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def make_images(folder: Path, n: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


def test_an_unlabelled_folder_reports_the_teacher_match_alone(tmp_path):
    make_images(tmp_path / "photos", 30)
    small = dict(
        widths=(4, 4, 4), teacher_arch="resnet10", teacher_batch=8, teacher_eta=0.02, lr_img=1e-3, lr_label=1e-3
    )
    result = main(tiny(tmp_path / "runs", data=str(tmp_path / "photos"), data_dir=str(tmp_path / "data"), **small))
    assert set(result["eval"]) == {"none", "random_real", "distilled"}
    assert set(result["eval"]["distilled"]) == {"match"}


def test_a_renamed_copy_runs_and_names_its_own_runs(tmp_path, out_dir):
    shutil.copy(krr_st.__file__, tmp_path / "my_idea.py")
    flags = [f"--{k.replace('_', '-')}" for k in TINY]
    values = [" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in TINY.values()]
    command = [sys.executable, str(tmp_path / "my_idea.py"), "--out-dir", str(out_dir)]
    command += [word for pair in zip(flags, values, strict=True) for word in " ".join(pair).split()]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0, done.stderr
    folder = only_run(out_dir)
    assert folder.name.startswith("digits__my_idea__0__")
    assert load_distilled(folder / "distilled.safetensors", "my_idea").step == 12
    assert "distilled" in done.stdout and "random real" in done.stdout


def test_importing_does_nothing(tmp_path):
    code = "import krr_st, os; print(os.listdir('.'))"
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[]", done.stderr


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("at", [5, 11, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 3))])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(out_dir, teachers, at, monkeypatch):
    def stop(step, *rest):
        if step == at:
            raise KeyboardInterrupt
        return batch_index(step, *rest)

    monkeypatch.setattr(krr_st, "batch_index", stop)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(out_dir))
    monkeypatch.undo()
    folder = only_run(out_dir)
    assert not (folder / "result.json").exists()
    main(common.run.load_args(Args, folder))
    same_end(folder, only_run(teachers[0]))


def test_the_curve_survives_a_stop(out_dir, monkeypatch):
    def stop(step, *rest):
        if step == 9:
            raise KeyboardInterrupt
        return batch_index(step, *rest)

    monkeypatch.setattr(krr_st, "batch_index", stop)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(out_dir, eval_every=3, eval_runs=1))
    monkeypatch.undo()
    folder = only_run(out_dir)
    main(common.run.load_args(Args, folder))
    curve = json.loads((folder / "curve.json").read_text())
    assert [point["step"] for point in curve] == [3, 6, 9, 12]  # 3 and 6 from before the checkpoint at 8
    assert [step for step, _ in common.run.load_checkpoint(folder / "checkpoint.pt")["history"]] == list(range(1, 13))


@pytest.mark.slow
def test_a_stop_in_an_evaluation_of_the_curve_goes_on_with_it(out_dir, tmp_path, monkeypatch):
    """The evaluation at step 5 is stopped: nothing of the five steps is lost, and the curve has its point."""
    flags = dict(eval_every=5, save_every=100)
    shutil.copytree(out_dir / "teachers", tmp_path / "straight" / "teachers")
    main(tiny(tmp_path / "straight", **flags))
    score, calls = common.pairs.score_network, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(common.pairs, "score_network", stop)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(out_dir, **flags))
    folder = only_run(out_dir)
    assert common.run.load_checkpoint(folder / "checkpoint.pt")["step"] == 5
    calls.clear()
    monkeypatch.setattr(common.pairs, "score_network", lambda *args: calls.append(args) or score(*args))
    main(common.run.load_args(Args, folder))
    assert len(calls) == 1 + 2 + 3 * 2  # the second network at step 5, step 10, and the table
    same_end(folder, only_run(tmp_path / "straight"))


def test_a_finished_run_can_be_scored_again(out_dir, teachers):
    main(tiny(out_dir))
    folder = only_run(out_dir)
    again = main(dataclasses.replace(common.run.load_args(Args, folder), eval_runs=3))
    values = [again["eval"]["distilled"]["match"]["values"], teachers[1]["eval"]["distilled"]["match"]["values"]]
    assert len(values[0]) == 3 and values[0][:2] == values[1]
    distilled = (load_file(only_run(d) / "distilled.safetensors") for d in (out_dir, teachers[0]))
    assert equal(*distilled)


def test_another_teacher_on_resume_is_refused(out_dir):
    main(tiny(out_dir))
    folder = only_run(out_dir)
    (teacher,) = (out_dir / "teachers").iterdir()
    weights = load_file(teacher / "teacher.safetensors")
    meta = safe_open(teacher / "teacher.safetensors", "pt").metadata()
    weights["conv1.weight"] *= -1
    save_file(weights, teacher / "teacher.safetensors", metadata=meta)
    with pytest.raises(common.run.UserError, match="teacher's features changed"):
        main(common.run.load_args(Args, folder))


@pytest.mark.slow
def test_the_default_run_beats_random_real_images(tmp_path):
    """`python krr_st.py` as a user runs it, teacher included: the claim of the README's digits table."""
    command = [sys.executable, str(REPO / "krr_st.py"), "--out-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    r = json.loads((only_run(tmp_path) / "result.json").read_text())
    real, ours = (r["eval"][row]["match"] for row in ("random_real", "distilled"))
    assert real["mean"] - ours["mean"] > real["std"] + ours["std"]
    for metric in ("few_5", "few_1"):
        gain = r["distilled_minus_random_real"][metric]
        assert gain["pairs"] == 100 and gain["mean"] + 2 * gain["se"] >= 0
    loss = [value for _, value in common.run.load_checkpoint(only_run(tmp_path) / "checkpoint.pt")["history"]]
    # one value depends on the age of the network drawn: means of ten log points, the first and the last
    assert np.mean(loss[-10:]) < 0.9 * np.mean(loss[:10]) < 0.9 * loss[0]


# --------------------------------------------------------------------------------------------------------------- flags


def test_a_preset_that_needs_a_published_teacher_says_so(tmp_path):
    call = lambda: main(tiny(tmp_path, preset="imagenette", widths=(8, 8), teacher=None))  # noqa: E731
    refuse(call, "published teacher", "--teacher FILE")


def test_args_document_themselves():
    """Every flag has help, and every preset value is a flag that may be left open."""
    source = Path(krr_st.__file__).read_text()
    fields = {f.name: f for f in dataclasses.fields(Args)}
    for name in fields:
        after = source.split(f"\n    {name}: ", 1)[1].split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), name
    for preset in krr_st.PRESETS.values():
        assert all(fields[name].default is None for name in preset)
    open_flags = {n for n, f in fields.items() if f.default is None} - {"size", "preset", "resume", "chunk"}
    open_flags -= {f"teacher_{name}" for name in SETTINGS}  # of common/recipes.py
    assert all(set(preset) == open_flags for preset in krr_st.PRESETS.values())
