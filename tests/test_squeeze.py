"""common/moco.py, pretrain.py and teacher.py: MoCo v2, supervised training and the linear probe against loops, whole
steps included; training that stops and goes on; classifiers from files."""

import dataclasses
import hashlib
import json
import math
import signal
from collections import deque
from functools import partial

import pytest
import ssl_helpers
import torch
import torchvision
from conftest import refuse
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from ssl_helpers import (
    CPU,
    F64,
    NaiveSplit,
    Sgd,
    check_net,
    close,
    forbid,
    gen,
    linear,
    naive_net,
    one_label,
    record,
    same,
    signal_at,
    spy,
    stops,
)
from torch import nn

import common.moco
import common.pretrain
import common.run
from common.augment import crop_flip, resized_crop, ssl_view
from common.barlow import train_barlow
from common.data import Data, load, normalise
from common.moco import Queue, SplitBatchNorm2d, enqueue_, info_nce, split_norms, train_moco2
from common.models import ResNet
from common.pretrain import augmented, follow_, probe_lr, train_probe, train_supervised
from common.run import Stopped, catch_signals, rng
from common.teacher import IMAGENET, Teacher, classifier, digest_of, load_classifier, load_teacher

handlers = pytest.fixture(ssl_helpers.handlers)
one_thread = pytest.fixture(ssl_helpers.one_thread, autouse=True, scope="module")
NET = dict(arch="resnet10", width=4)
MOCO = NET | dict(epochs=3, batch=32, lr=0.1, queue=48, dim=8, splits=4, crop_min=0.4)
SUPERVISED = NET | dict(epochs=3, batch=32, lr=0.1)
TRAINERS = {"moco2": (train_moco2, MOCO), "supervised": (train_supervised, SUPERVISED)}
both = pytest.mark.parametrize("kind", TRAINERS)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def few(digits):
    """70 training and 40 test images: two steps of 32 an epoch, six images left over."""
    parts = dict(x_train=digits.x_train[:70], y_train=digits.y_train[:70])
    return dataclasses.replace(digits, **parts, x_test=digits.x_test[:40], y_test=digits.y_test[:40], content="f" * 64)


@pytest.fixture(scope="module")
def made(few, tmp_path_factory):
    """{kind: its teacher of TRAINERS}."""
    place = tmp_path_factory.mktemp("teachers")
    return {kind: trainer(few, place, CPU, **settings) for kind, (trainer, settings) in TRAINERS.items()}


# ------------------------------------------------------------------------------------------------- sub-batch BatchNorm


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_part_of_the_batch_is_normalised_on_its_own(splits, layout):
    norm = nn.BatchNorm2d(3, momentum=0.3).double()
    for i, value in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
        value.data.copy_(torch.rand(3, generator=gen(i)) + 0.5)
    ours, naive = SplitBatchNorm2d(norm, splits).double(), NaiveSplit(norm, splits)
    for step in range(3):
        x = torch.randn(8, 3, 2, 5, generator=gen(10 + step), dtype=F64) * torch.tensor([1.0, 3.0, 0.1])[:, None, None]
        x += 4 * torch.arange(8)[:, None, None, None]  # the parts differ
        x_1, x_2 = (x.clone().contiguous(memory_format=layout).requires_grad_() for _ in range(2))
        for net, images in ((ours, x_1), (naive, x_2)):
            (net(images) * torch.arange(240).view(8, 3, 2, 5).cos()).sum().backward()
        torch.testing.assert_close(ours(x), naive(x), rtol=1e-10, atol=1e-10)
        for a, b in ((x_1.grad, x_2.grad), (ours.weight.grad, naive.weight.grad), (ours.bias.grad, naive.bias.grad)):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(ours.running_mean, naive.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_var, naive.var, rtol=1e-12, atol=1e-12)
    assert ours.num_batches_tracked == 6


def test_a_split_network_is_the_plain_one_in_eval_mode():
    plain = ResNet("resnet10", 1, 4, stem_padding=1)
    for value in plain.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=gen(len(value))) + 0.5)
    split = ResNet("resnet10", 1, 4, stem_padding=1)
    split.load_state_dict(plain.state_dict())
    split_norms(split, 4)
    assert same(split, plain) and sum(isinstance(m, SplitBatchNorm2d) for m in split.modules()) == 12
    x = torch.randn(3, 1, 8, 8, generator=gen())
    assert torch.equal(split.eval()(x), plain.eval()(x))
    assert same(split, plain)
    with pytest.raises(ValueError, match="3 images cannot be split into 4"):
        split.train()(x)


# ----------------------------------------------------------------------------------------------- loss, queue, momentum


def naive_info_nce(q, k, negatives, temperature):
    losses = []
    for query, key in zip(q, k, strict=True):
        scores = [(query * other).sum() / temperature for other in (key, *negatives)]
        losses.append(sum(score.exp() for score in scores).log() - scores[0])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_info_nce_is_the_loop(temperature):
    q, k, negatives = (
        nn.functional.normalize(torch.randn(n, 4, generator=gen(n), dtype=F64), dim=1) for n in (5, 6, 9)
    )
    k, (q_1, q_2) = k[:5], (q.clone().requires_grad_() for _ in range(2))
    ours, naive = info_nce(q_1, k, negatives, temperature), naive_info_nce(q_2, k, negatives, temperature)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=0)
    ours.backward(), naive.backward()
    torch.testing.assert_close(q_1.grad, q_2.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("size", "batch"), [(6, 2), (7, 3), (5, 5), (3, 5), (1, 4)])
def test_the_queue_keeps_the_last_keys(size, batch):
    keys = torch.full((size, 2), -1.0)
    naive = deque([[-1.0, -1.0]] * size, maxlen=size)
    for step in range(5):
        new = torch.arange(2.0 * batch * step, 2.0 * batch * (step + 1)).view(batch, 2)
        naive.extend(new.tolist())
        enqueue_(keys, new, step * batch)
        assert torch.roll(keys, -(step + 1) * batch % size, 0).tolist() == list(naive)


def test_a_new_queue_has_unit_vectors_of_any_direction():
    torch.manual_seed(0)
    keys = Queue(500, 3).keys
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(500))
    assert keys.mean(0).abs().max() < 5 / math.sqrt(3 * 500)
    assert (keys.T @ keys / 500 - torch.eye(3) / 3).abs().max() < 0.1


def test_the_slow_weights_follow():
    slow, fast = ([torch.randn(shape, generator=gen(seed), dtype=F64) for shape in ((3, 2), (4,))] for seed in (0, 1))
    expected = [[0.9 * a + 0.1 * b for a, b in zip(p.flatten(), q.flatten())] for p, q in zip(slow, fast)]  # noqa: B905
    before = [p.clone() for p in fast]
    follow_(slow, fast, 0.9)
    for p, wanted in zip(slow, expected, strict=True):
        torch.testing.assert_close(p.flatten(), torch.stack(wanted), rtol=1e-14, atol=0)
    assert all(map(torch.equal, fast, before))


# ---------------------------------------------------------------------------------------------------------------- views


def test_views_of_supervised_training(digits):
    x = digits.x_train[:50] / 255
    for flip in (True, False):
        assert torch.equal(augmented(x, gen(1), "pad", 0.5, flip), crop_flip(x, gen(1), flip))
        assert torch.equal(augmented(x, gen(1), "resized", 0.5, flip), resized_crop(x, gen(1), (0.5, 1.0), flip))


# ----------------------------------------------------------------------------------------------- whole steps, naively


@pytest.mark.parametrize("mlp", [False, True])
def test_moco_is_the_naive_loop(few, monkeypatch, tmp_path, mlp):
    """Four steps in float64 from the same start and views: both encoders, their statistics and the queue."""
    seen, views = spy(monkeypatch), record(monkeypatch, common.moco, "ssl_view")
    settings = dict(MOCO, epochs=2, temperature=0.2, key_momentum=0.7, momentum=0.8, weight_decay=0.01, mlp=mlp)
    settings["blur"] = not mlp
    view = partial(ssl_view, jitter=(0.4, 0.4, 0.4, 0.1), blur=0.0 if mlp else 0.5)
    teacher = train_moco2(few, tmp_path, CPU, **settings)
    before, after = seen["before"], {name: module.state_dict() for name, module in seen["modules"].items()}
    assert same(before["key_net"], before["net"]) and same(before["key_head"], before["head"])

    layers = (0, 2) if mlp else (0,)
    fast, slow = (naive_net(before[name], 4) for name in ("net", "key_net"))
    heads = [[linear(before[name], f"{i}.") for i in layers] for name in ("head", "key_head")]
    q_params = [*fast.parameters(), *(p for layer in heads[0] for p in layer.parameters())]
    k_params = [*slow.parameters(), *(p for layer in heads[1] for p in layer.parameters())]
    queue, sgd = deque(before["queue"]["keys"].double(), maxlen=48), Sgd(q_params, 0.8, 0.01)

    def embed(net, head, x):
        f = net(normalise(x, few.mean, few.std).double())
        f = head[0](f) if len(head) == 1 else head[1](head[0](f).clamp(min=0))
        return torch.stack([z / z.square().sum().sqrt() for z in f])

    rates = []
    for step in range(4):
        epoch, i = divmod(step, 2)
        index = torch.randperm(70, generator=rng("teacher order", 0, epoch))[32 * i : 32 * (i + 1)]
        x_q, x_k = views[2 * step : 2 * step + 2]
        generator = rng("teacher views", 0, epoch, i)  # one for both, which therefore differ
        assert torch.equal(x_q, view(few.x_train[index] / 255, generator, (0.4, 1.0), False))
        assert torch.equal(x_k, view(few.x_train[index] / 255, generator, (0.4, 1.0), False))
        q = embed(fast, heads[0], x_q)
        with torch.no_grad():
            for p_k, p_q in zip(k_params, q_params, strict=True):
                p_k.copy_(0.7 * p_k + 0.3 * p_q)
            members = torch.randperm(32, generator=rng("teacher shuffle", 0, epoch, i)).tolist()
            keys = embed(slow, heads[1], torch.stack([x_k[m] for m in members]))
            keys = [keys[members.index(m)] for m in range(32)]
        rates.append(0.1 * 0.5 * (1 + math.cos(math.pi * epoch / 2)))
        sgd.step(naive_info_nce(q, keys, list(queue), 0.2), rates[-1])
        queue.extend(keys)
    assert seen["rates"] == pytest.approx(rates)
    check_net(after["net"], fast)
    check_net(after["key_net"], slow)
    for name, head in zip(("head", "key_head"), heads, strict=True):
        for i, layer in zip(layers, head, strict=True):
            assert close(after[name][f"{i}.weight"], layer.weight.detach())
            assert close(after[name][f"{i}.bias"], layer.bias.detach())
    assert close(torch.roll(after["queue"]["keys"], -(4 * 32) % 48, 0), torch.stack(list(queue)), 1e-3)
    assert same(teacher.net, after["net"]) and not same(after["net"], before["net"])


@pytest.mark.parametrize(("crop", "warmup"), [("pad", 0), ("resized", 1)])
def test_supervised_training_is_the_naive_loop(few, monkeypatch, tmp_path, crop, warmup):
    """Six steps in float64 from the same start and views; the rates step by step, the accuracy at the end."""
    seen, views = spy(monkeypatch), record(monkeypatch, common.pretrain, "augmented")
    asked, whole = [], common.pretrain.augmented
    monkeypatch.setattr(common.pretrain, "augmented", lambda *args: asked.append(args[2:]) or whole(*args))
    settings = SUPERVISED | dict(momentum=0.8, weight_decay=0.01, warmup=warmup, crop=crop, crop_min=0.3)
    teacher = train_supervised(few, tmp_path, CPU, **settings)
    assert asked == [(crop, 0.3, False)] * 6
    before, after = seen["before"], {name: module.state_dict() for name, module in seen["modules"].items()}
    net, fc = naive_net(before["net"], 1), linear(before["fc"])
    sgd, rates = Sgd([*net.parameters(), *fc.parameters()], 0.8, 0.01), []
    for step in range(6):
        epoch, i = divmod(step, 2)
        index = torch.randperm(70, generator=rng("teacher order", 0, epoch))[32 * i : 32 * (i + 1)]
        assert torch.equal(
            views[step], augmented(few.x_train[index] / 255, rng("teacher views", 0, epoch, i), *asked[0])
        )
        scores = fc(net(normalise(views[step], few.mean, few.std).double()))
        losses = [row.exp().sum().log() - row[y] for row, y in zip(scores, few.y_train[index].tolist(), strict=True)]
        if step < 2 * warmup:
            rates.append(max(1e-5, 0.1 * step / 2))
        else:
            rates.append(0.1 * 0.5 * (1 + math.cos(math.pi * (step - 2 * warmup) / (6 - 2 * warmup))))
        sgd.step(sum(losses) / 32, rates[-1])
    assert seen["rates"] == pytest.approx(rates)
    check_net(after["net"], net)
    assert close(after["fc"]["weight"], fc.weight.detach()) and close(after["fc"]["bias"], fc.bias.detach())
    assert same(teacher.net, after["net"]) and same(teacher.fc, after["fc"])
    with torch.no_grad():
        right = teacher.fc(teacher.net(normalise(few.x_test, few.mean, few.std))).argmax(1) == few.y_test
    assert teacher.info["accuracy"] == round(right.float().mean().item(), 4)


# ---------------------------------------------------------------------------------------------------- squeezing digits


MOCO_SMALL = dict(epochs=8, batch=64, lr=0.2, queue=256, splits=2, key_momentum=0.9, crop_min=0.4)
SMALL = {"moco2": (train_moco2, MOCO_SMALL), "supervised": (train_supervised, dict(epochs=8, batch=64))}


@both
def test_squeezes_of_digits_tell_classes_apart_by_one_label(digits, monkeypatch, tmp_path, kind):
    """The loss falls, and the nearest labelled image is right more often than by the network before training."""
    losses, whole, seen = [], nn.functional.cross_entropy, spy(monkeypatch)

    def record_loss(*args, **options):
        losses.append(whole(*args, **options))
        return losses[-1]

    trainer, settings = SMALL[kind]
    with monkeypatch.context() as patch:
        patch.setattr(common.pretrain.F, "cross_entropy", record_loss)
        teacher = trainer(digits, tmp_path, CPU, arch="resnet10", width=8, **settings)
    per_epoch = torch.stack(losses).detach().view(settings["epochs"], 1437 // 64).mean(1)
    assert per_epoch[-1] < {"moco2": 0.9, "supervised": 0.5}[kind] * per_epoch[1]  # the first fills MoCo's queue
    start = dataclasses.replace(teacher, net=ResNet("resnet10", 1, 8, "cifar", 1).eval())
    start.net.load_state_dict(seen["before"]["net"])
    after, before = (one_label(lambda x, of=of: of.targets(x, CPU), digits) for of in (teacher, start))
    gain = after - before
    assert gain.mean() > 0.1 and gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
    assert list(teacher.info["knn"]) == [str(e) for e in range(1, settings["epochs"] + 1)
                                         if e % max(1, settings["epochs"] // 5) == 0]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- stopping, caches


@both
def test_a_stopped_squeeze_goes_on_bit_for_bit(few, made, monkeypatch, tmp_path, handlers, kind):
    trainer, settings = TRAINERS[kind]
    teacher = stops(monkeypatch, lambda: trainer(few, tmp_path, CPU, **settings), tmp_path)
    assert same(teacher.net, made[kind].net) and teacher.info | {"seconds": 0} == made[kind].info | {"seconds": 0}
    assert kind == "moco2" or same(teacher.fc, made[kind].fc)


def test_a_checkpoint_holds_all_that_moco_needs(few, monkeypatch, tmp_path, handlers):
    seen = spy(monkeypatch)
    with monkeypatch.context() as patch:
        signal_at(patch, nn.functional, "cross_entropy", signal.SIGTERM, 2)
        with pytest.raises(Stopped):
            train_moco2(few, tmp_path, CPU, **MOCO)
    (path,) = tmp_path.rglob("checkpoint.pt")
    state = common.run.load_checkpoint(path)
    for name in ("net", "head", "key_net", "key_head", "queue"):
        assert same(state[name], seen["modules"][name].state_dict())
        assert not same(state[name], seen["before"][name]), name
    catch_signals()
    del state["queue"]
    torch.save(state, path)
    refuse(lambda: train_moco2(few, tmp_path, CPU, **MOCO), str(path), "'queue'", "delete it to train the teacher anew")


@both
def test_a_squeeze_is_trained_once(few, made, monkeypatch, kind):
    monkeypatch.setattr(common.pretrain, "optimise", forbid)
    trainer, settings = TRAINERS[kind]
    again = trainer(few, made[kind].folder.parent, CPU, **settings, save_minutes=1.0)
    assert same(again.net, made[kind].net) and again.info == made[kind].info


CHANGES = dict(arch="resnet18", width=2, stem_padding=2, epochs=4, batch=16, lr=0.2, weight_decay=0.0, momentum=0.5,
               crop_min=0.5, seed=1, precision="bf16")  # fmt: skip
OF_MOCO = dict(queue=16, temperature=0.3, key_momentum=0.5, dim=4, mlp=True, splits=2, blur=True)
OF_SUPERVISED = dict(warmup=1, crop="resized")


@both
def test_every_setting_makes_another_teacher(few, made, monkeypatch, tmp_path, kind):
    """And is in its info under its own name."""
    monkeypatch.setattr(common.pretrain, "optimise", forbid)
    trainer, settings = TRAINERS[kind]
    names = set()
    for key, value in (CHANGES | (OF_MOCO if kind == "moco2" else OF_SUPERVISED)).items():
        with pytest.raises(AssertionError, match="must not be called"):
            trainer(few, tmp_path / key, CPU, **settings | {key: value})
        (folder,) = (tmp_path / key).iterdir()
        names.add(folder.name.rsplit("-", 1)[1])
        assert made[kind].info[key] == settings.get(key, made[kind].info[key]) != value, key
    assert len(names) == len(CHANGES) + len(OF_MOCO if kind == "moco2" else OF_SUPERVISED)
    assert made[kind].folder.name.rsplit("-", 1)[1] not in names


def test_the_defaults_are_the_specifications(few, monkeypatch, tmp_path):
    infos = []
    for module in (common.moco, common.pretrain):
        monkeypatch.setattr(module, "train", lambda info, *_, **__: infos.append(info))
    many = dataclasses.replace(few, x_train=few.x_train[:1].expand(5000, -1, -1, -1))
    train_moco2(many, tmp_path, CPU)
    train_supervised(many, tmp_path, CPU)
    moco = dict(arch="resnet18", width=64, stem="cifar", stem_padding=1, epochs=200, batch=512, lr=0.06, momentum=0.9,
                weight_decay=5e-4, queue=4096, temperature=0.1, key_momentum=0.99, dim=128, mlp=False, splits=8,
                crop_min=0.08, blur=False, seed=0, precision="fp32", method="moco2")  # fmt: skip
    supervised = dict(arch="resnet18", width=64, stem="cifar", stem_padding=1, epochs=200, batch=128, lr=0.1,
                      momentum=0.9, weight_decay=5e-4, warmup=0, crop="pad", seed=0, precision="fp32", classes=10,
                      method="supervised")  # fmt: skip
    assert moco.items() <= infos[0].items() and supervised.items() <= infos[1].items()
    assert "classes" not in infos[0]


@pytest.mark.parametrize(
    ("images", "settings", "recorded"),
    [(70, dict(batch=512, splits=8), (64, 8, 48)), (70, dict(batch=33, splits=4), (32, 4, 48)),
     (5, dict(batch=512, splits=8), (4, 2, 4)), (2, dict(splits=8), (2, 1, 2)), (3, dict(), (3, 1, 3)),
     (70, dict(batch=32, splits=4, queue=4096), (32, 4, 64))],
    ids=str,
)  # fmt: skip
def test_moco_fits_itself_to_few_images(few, tmp_path, images, settings, recorded):
    """(batch, splits, queue) as they were used: two images a part at least, no more keys than an epoch gives."""
    data = dataclasses.replace(few, x_train=few.x_train[:images], y_train=few.y_train[:images])
    info = train_moco2(data, tmp_path, CPU, **MOCO | settings | dict(epochs=1)).info
    assert (info["batch"], info["splits"], info["queue"]) == recorded


def test_bf16_and_colour(tmp_path):
    """Both squeezes of three channels, flips, blur and two layers run in bf16 and end finite and changed."""
    x = torch.randint(0, 256, (16, 3, 8, 8), generator=gen(), dtype=torch.uint8)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.3)
    data = Data(
        "made", x, torch.arange(16) % 2, x[:4], torch.arange(4) % 2, ["a", "b"], mean, std, "none", "c" * 64, True
    )
    settings = NET | dict(epochs=2, batch=8, precision="bf16")
    nets = [train_moco2(data, tmp_path, CPU, **settings, mlp=True, blur=True, dim=4).net]
    nets.append(train_supervised(data, tmp_path, CPU, **settings, crop="resized").net)
    for net in nets:
        assert net.bn1.running_mean.abs().max() > 0 and net.bn1.weight.unique().numel() > 1
        assert all(value.isfinite().all() for value in net.state_dict().values())


# -------------------------------------------------------------------------------------------------------------- errors


@both
def test_one_image_is_refused(few, tmp_path, kind):
    one = dataclasses.replace(few, x_train=few.x_train[:1], y_train=few.y_train[:1])
    refuse(lambda: TRAINERS[kind][0](one, tmp_path, CPU), "cannot be trained on one image")


def test_labels_and_crops_are_checked(few, made, tmp_path):
    bare = dataclasses.replace(few, y_train=None, y_test=None)
    refuse(lambda: train_supervised(bare, tmp_path, CPU), "digits has no labels", "subfolder a class")
    refuse(lambda: train_probe(made["moco2"], bare, CPU, tmp_path), "digits has no labels", "subfolder a class")
    refuse(lambda: train_supervised(few, tmp_path, CPU, crop="centre"), "'centre'", "pad, resized")
    assert not list(tmp_path.iterdir())
    assert train_moco2(bare, tmp_path, CPU, **MOCO | dict(epochs=1)).info["knn"] == {}  # needs none


@pytest.mark.parametrize(("kind", "flag"), [("moco2", "--teacher-lr"), ("supervised", "--label-lr")])
def test_a_squeeze_that_diverges_is_not_saved(few, monkeypatch, tmp_path, kind, flag):
    whole = nn.functional.cross_entropy
    monkeypatch.setattr(
        common.pretrain.F, "cross_entropy", lambda *args, **options: whole(*args, **options) * torch.nan
    )
    trainer, settings = TRAINERS[kind]
    line = refuse(lambda: trainer(few, tmp_path, CPU, **settings), "epoch 1, step 2: loss is nan", f"lower {flag}")
    (folder,) = tmp_path.iterdir()
    terms = {"moco2": "embedding std nan, ", "supervised": ""}[kind]
    assert str(folder) in line and f"({terms}learning rate 0." in line and not list(folder.iterdir())


@pytest.mark.parametrize(
    ("kind", "flag"), [("moco2", "--teacher-batch"), ("supervised", "--label-batch"), ("barlow", "--teacher-projector")]
)
def test_too_little_memory_is_named_by_the_flag(few, monkeypatch, tmp_path, kind, flag):
    """The images, of 10^6 bytes each, or the weights, whichever takes more."""
    monkeypatch.setattr(common.run, "available_memory", lambda device: 1000)
    monkeypatch.setattr(common.pretrain, "bytes_per_image", lambda net, x: 10**6 if kind != "barlow" else 1)
    trainer, settings = (TRAINERS | {"barlow": (train_barlow, NET)})[kind]
    refuse(lambda: trainer(few, tmp_path, CPU, **settings), f"set by {flag}: lower it")
    assert not list(tmp_path.iterdir())


def test_the_folders_of_barlow_twins_keep_their_names(monkeypatch, tmp_path):
    """Those of users' caches: the name for these settings is what it was before other methods came."""
    x = torch.zeros(300, 3, 32, 32, dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([0.25, 0.5, 1.0])
    data = Data("made", x, None, x[:4], None, [], mean, std, "none", "c" * 64, True)
    monkeypatch.setattr(common.pretrain, "optimise", forbid)
    with pytest.raises(AssertionError):
        train_barlow(data, tmp_path, CPU, arch="resnet10", width=4, projector_width=16)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "made-barlow-resnet10x4-1000ep-s0-f288ee10"


# -------------------------------------------------------------------------------------------------------------- probe


PROBE = dict(epochs=3, batch=32, lr=2.0)


def info_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["info"])


def test_the_probes_rate_falls_at_60_and_80_per_cent():
    assert [probe_lr(epoch, 100, 30.0) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert [probe_lr(epoch, 7, 1.0) for epoch in range(7)] == pytest.approx([1, 1, 1, 1, 1, 0.1, 0.01])
    assert [probe_lr(epoch, 1, 1.0) for epoch in range(1)] == [1.0]


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_probe_is_the_naive_loop(few, made, monkeypatch, tmp_path, augment, scaled):
    """Six steps in float64: of the augmented views' features, or of the plain ones'; the teacher stays as it is."""
    teacher, views = made["moco2"], record(monkeypatch, common.pretrain, "augmented")
    before = {key: value.clone() for key, value in teacher.net.state_dict().items()}
    seen = spy(monkeypatch)
    fc, accuracy = train_probe(teacher, few, CPU, tmp_path, **PROBE, momentum=0.8, augment=augment, normalise=scaled)
    assert same(teacher.net, before) and not teacher.net.training
    weight, bias = seen["before"]["fc"]["weight"].double(), seen["before"]["fc"]["bias"].double()
    assert weight.std() == pytest.approx(0.01, rel=0.2) and not bias.any() and weight.shape == (10, 32)
    plain = teacher.targets(few.x_train, CPU).double()
    length = math.sqrt(sum(f.square().sum().item() for f in plain) / 70) if scaled else 1.0
    v_weight, v_bias, rates = torch.zeros_like(weight), torch.zeros_like(bias), []
    for step in range(6):
        epoch, i = divmod(step, 2)
        index = torch.randperm(70, generator=rng("probe order", 0, epoch))[32 * i : 32 * (i + 1)]
        f = plain[index]
        if augment:
            x = augmented(few.x_train[index] / 255, rng("probe views", 0, epoch, i), "resized", 0.08, False)
            assert torch.equal(views[step], x)
            f = teacher.features(x, CPU).double()
        f = f / length
        error = (f @ weight.T + bias).softmax(1)
        error[torch.arange(32), few.y_train[index]] -= 1
        rates.append(2.0 if epoch < 2 else 0.2)
        v_weight, v_bias = 0.8 * v_weight + error.T @ f / 32, 0.8 * v_bias + error.mean(0)
        weight, bias = weight - rates[-1] * v_weight, bias - rates[-1] * v_bias
    assert seen["rates"] == pytest.approx(rates)
    assert close(fc.weight, weight / length) and close(fc.bias, bias)
    (path,) = tmp_path.iterdir()
    info = info_of(path)
    right = fc(teacher.targets(few.x_test, CPU)).argmax(1) == few.y_test
    assert info["accuracy"] == accuracy == round(right.float().mean().item(), 4) and info["length"] == pytest.approx(
        length
    )
    assert not any(p.requires_grad for p in fc.parameters()) and len(views) == (6 if augment else 0)


def test_the_probe_sees_crops_and_flips(few, made, monkeypatch, tmp_path):
    asked, whole = [], common.pretrain.augmented
    monkeypatch.setattr(common.pretrain, "augmented", lambda x, g, *args: asked.append(args) or whole(x, g, *args))
    train_probe(made["moco2"], dataclasses.replace(few, flip=True), CPU, tmp_path, **PROBE | dict(epochs=1))
    assert asked == [("resized", 0.08, True)] * 2


def test_a_probe_that_changes_its_teacher_is_a_bug(few, made, monkeypatch, tmp_path):
    """A last bit of one running statistic is enough."""
    net = ResNet("resnet10", 1, 4, "cifar", 1)
    net.load_state_dict(made["moco2"].net.state_dict())
    teacher, whole = dataclasses.replace(made["moco2"], net=net), Teacher.features

    def touch(self, x, device):
        value = net.layer3[0].bn1.running_var
        value[0] = torch.nextafter(value[0], torch.tensor(torch.inf))
        return whole(self, x, device)

    monkeypatch.setattr(Teacher, "features", touch)
    with pytest.raises(RuntimeError, match="changed the weights or the statistics"):
        train_probe(teacher, few, CPU, tmp_path, **PROBE)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_normalised_probe_is_the_same_for_a_scaled_backbone(few, made, tmp_path):
    """Features four times as long: the same logits, for a power of two up to the last bit of the weights."""
    long = nn.Sequential(made["moco2"].net, Scale())
    scaled = dataclasses.replace(made["moco2"], net=long, name="long")
    (fc, _), (other, _) = (
        train_probe(teacher, few, CPU, tmp_path, **PROBE, augment=False, normalise=True)
        for teacher in (made["moco2"], scaled)
    )
    torch.testing.assert_close(4 * other.weight, fc.weight)
    assert len(list(tmp_path.glob("probe-*"))) == 2


class Scale(nn.Module):
    def forward(self, x):
        return 4 * x


@pytest.mark.parametrize("augment", [True, False])
def test_a_stopped_probe_goes_on_bit_for_bit(few, made, monkeypatch, tmp_path, handlers, augment):
    train = lambda folder: train_probe(made["moco2"], few, CPU, folder, **PROBE, augment=augment)  # noqa: E731
    (tmp_path / "a").mkdir()
    fc, accuracy = stops(monkeypatch, lambda: train(tmp_path / "a"), tmp_path / "a")
    other, expected = train(tmp_path / "b")
    assert same(fc, other) and accuracy == expected
    (a,), (b,) = ((tmp_path / part).iterdir() for part in "ab")
    assert a.name == b.name and info_of(a) | {"seconds": 0} == info_of(b) | {"seconds": 0}


def test_a_probe_is_trained_once(few, made, monkeypatch, tmp_path, capsys):
    fc, accuracy = train_probe(made["moco2"], few, CPU, tmp_path, **PROBE)
    (path,) = tmp_path.iterdir()
    words = f"test accuracy {info_of(path)['accuracy']:.1%}"
    assert words in capsys.readouterr().out
    monkeypatch.setattr(common.pretrain, "optimise", forbid)
    again, read = train_probe(made["moco2"], few, CPU, tmp_path, **PROBE, save_minutes=1.0)
    assert same(again, fc) and read == accuracy == info_of(path)["accuracy"] and not again.weight.requires_grad
    assert words in capsys.readouterr().out
    moved = ResNet("resnet10", 1, 4, "cifar", 1).eval()
    moved.load_state_dict(made["moco2"].net.state_dict())
    moved.layer1[0].bn1.running_mean[0] += 1
    others = [dataclasses.replace(made["moco2"], net=moved), dataclasses.replace(made["moco2"], std=few.std * 2),
              dataclasses.replace(made["moco2"], info={"stem_padding": 2})]  # fmt: skip
    changes = [dict(epochs=4), dict(batch=16), dict(lr=1.0), dict(momentum=0.5), dict(augment=False),
               dict(normalise=True), dict(seed=1), dict(precision="bf16")]  # fmt: skip
    calls = [(other, few, PROBE) for other in others] + [(made["moco2"], few, PROBE | change) for change in changes]
    calls += [
        (made["moco2"], dataclasses.replace(few, **change), PROBE) for change in (dict(flip=True), dict(content="e"))
    ]
    for teacher, data, settings in calls:
        with pytest.raises(AssertionError, match="must not be called"):
            train_probe(teacher, data, CPU, tmp_path, **settings)


def test_a_damaged_probe_is_named(few, made, tmp_path):
    train_probe(made["moco2"], few, CPU, tmp_path, **PROBE)
    (path,) = tmp_path.iterdir()
    whole, weights, info = path.read_bytes(), load_file(path), info_of(path)

    def check():
        words = str(path), "not a readable probe", "delete it"
        refuse(lambda: train_probe(made["moco2"], few, CPU, tmp_path, **PROBE), *words)

    for damaged in (b"", b"<html>", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        check()
    narrow = weights | {"weight": weights["weight"][:, :4].contiguous()}
    for tensors, facts in ((narrow, info), (weights, info | {"format": "probe 0"}), (weights, []), ({}, info)):
        save_file(tensors, path, metadata={"info": json.dumps(facts)})
        check()
    save_file(weights, path)
    check()


def test_a_probe_that_diverges_is_not_saved(few, made, monkeypatch, tmp_path):
    whole = nn.functional.cross_entropy
    monkeypatch.setattr(common.pretrain.F, "cross_entropy", lambda *args: whole(*args) * torch.inf)
    refuse(lambda: train_probe(made["moco2"], few, CPU, tmp_path, **PROBE), "probe: epoch 1, step 2", "--probe-lr")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- classifiers


def logits(teacher, x):
    return teacher.fc(teacher.features(x, CPU))


def test_a_supervised_teacher_comes_back_with_its_classifier(few, made):
    teacher = made["supervised"]
    expected = logits(teacher, few.x_test)
    for spec in (teacher.folder, teacher.folder / "teacher.safetensors"):
        for loaded in (load_classifier(str(spec), few, CPU), load_teacher(str(spec), few, CPU)):
            assert torch.equal(logits(loaded, few.x_test), expected) and loaded.info == teacher.info
            assert torch.equal(loaded.targets(few.x_test, CPU), teacher.targets(few.x_test, CPU))
            assert not any(p.requires_grad for p in (*loaded.net.parameters(), *loaded.fc.parameters()))
            assert not any(key.startswith("fc") for key in loaded.net.state_dict())
    weights = load_file(teacher.folder / "teacher.safetensors")
    assert teacher.info["weights_sha256"] == digest_of(weights)
    assert torch.equal(weights["fc.weight"], teacher.fc.weight) and torch.equal(weights["fc.bias"], teacher.fc.bias)
    joined = hashlib.sha256(b"".join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest()
    assert digest_of(weights) == joined
    assert load_teacher(str(made["moco2"].folder), few, CPU).fc is None


def test_classifier_is_the_network_then_its_layer(few, made):
    teacher = made["supervised"]
    net = classifier(teacher, teacher.fc)
    x = normalise(few.x_test, few.mean, few.std).requires_grad_()
    assert torch.equal(net(x), logits(teacher, few.x_test))
    assert not any(module.training for module in net.modules()) and not any(p.requires_grad for p in net.parameters())
    net(x).sum().backward()
    assert x.grad.abs().sum() > 0  # of the images it has one


def test_files_without_the_right_classifier_are_refused(few, made, tmp_path):
    load = lambda data, folder: load_classifier(str(folder), data, CPU)  # noqa: E731
    refuse(
        lambda: load(few, made["moco2"].folder), "--label-teacher", str(made["moco2"].folder), "no linear classifier"
    )
    three = dataclasses.replace(few, class_names=["a", "b", "c"])
    folder = made["supervised"].folder
    refuse(lambda: load(three, folder), "--label-teacher", "10 classes, the data has 3")
    colour = dataclasses.replace(few, x_train=few.x_train.expand(-1, 3, -1, -1))
    refuse(lambda: load(colour, folder), "--label-teacher", "takes 1 channels, the data has 3")
    refuse(lambda: load(few, tmp_path), "--label-teacher", "no such file")
    weights, info = load_file(folder / "teacher.safetensors"), made["supervised"].info
    path = tmp_path / "teacher.safetensors"
    for change, words in (
        ({"fc.bias": torch.zeros(9)}, ("size mismatch", "fc.bias")),
        ({"fc.weight": None, "fc.bias": None}, ("Missing", "fc.weight", "fc.bias")),
    ):
        changed = {key: value for key, value in (weights | change).items() if value is not None}
        save_file(changed, path, metadata={"info": json.dumps(info)})
        refuse(lambda: load(few, path), str(path), *words)


def colour_data(classes):
    x = torch.randint(0, 256, (12, 3, 32, 32), generator=gen(), dtype=torch.uint8)
    mean, std, y = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.3, 0.2]), torch.arange(12) % classes
    return Data("made", x, y, x[:4], y[:4], [str(i) for i in range(classes)], mean, std, "none", "c" * 64, True)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_torchvision_file_is_a_classifier(tmp_path, prefix):
    torch.manual_seed(0)
    source, path = torchvision.models.resnet18(weights=None, num_classes=5).eval(), tmp_path / "net.pth"
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state}, path)
    data = colour_data(5)
    teacher = load_classifier(str(path), data, CPU)
    with torch.no_grad():
        expected = source(normalise(data.x_test, *map(torch.tensor, IMAGENET)))
    torch.testing.assert_close(
        logits(teacher, data.x_test), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )
    refuse(lambda: load_classifier(str(path), colour_data(6), CPU), "5 classes, the data has 6")
    for missing in ("fc.weight", "fc.bias"):
        torch.save({key: value for key, value in state.items() if key != prefix + missing}, path)
        refuse(lambda: load_classifier(str(path), data, CPU), "no linear classifier")
    torch.save(state | {prefix + "fc.weight": torch.zeros(5, 7)}, path)
    refuse(lambda: load_classifier(str(path), data, CPU), "no linear classifier")
    assert load_teacher(str(path), data, CPU).fc is None


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_torchvision_network_is_a_classifier(monkeypatch, name):
    whole = torchvision.models.get_model

    def get_model(name, weights):
        torch.manual_seed(1)
        return whole(name, weights=None, num_classes=4)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    data = colour_data(4)
    teacher = load_classifier(f"torchvision:{name}", data, CPU)
    source = get_model(name, "DEFAULT").eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = source(normalise(data.x_test, *map(torch.tensor, IMAGENET)))
    x = normalise(data.x_test, teacher.mean, teacher.std)
    assert torch.equal(classifier(teacher, teacher.fc)(x), expected)
    spec = f"torchvision:{name}"
    refuse(lambda: load_classifier(spec, colour_data(7), CPU), f"--label-teacher {spec}", "4 classes, the data has 7")
    refuse(lambda: load_classifier("torchvision:resnet19", data, CPU), "--label-teacher", "check the name")
