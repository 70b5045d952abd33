"""common/teacher.py: published checkpoints, recognised by their keys; files of the same layout made here."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import refuse
from torch import nn

from common.data import Data, normalise
from common.models import ResNet
from common.teacher import IMAGENET, layout_of, load_classifier, load_teacher

CPU = torch.device("cpu")
WIDTH, DIM, CLASSES = 2, 64, 3  # ResNet-50's features are 32 times as wide as its first stage
PLAIN, SWAV = [0.229, 0.224, 0.225], [0.228, 0.224, 0.225]


def filled(net, seed):
    """The network with weights of its own and statistics that are not the trivial ones, as teachers are laid out."""
    g = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            # a convolution keeps the size of its input, a norm's factors and variances are positive
            scale = 1 if value.ndim == 1 else (2 / value[0].numel()) ** 0.5
            low = 0.5 if value.ndim == 1 and name.endswith(("weight", "running_var")) else -0.5
            draw = torch.rand(value.shape, generator=g) + low
            value.copy_(draw if value.ndim == 1 else scale * torch.randn(value.shape, generator=g))
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def net():
    """The backbone that is to be loaded."""
    return filled(ResNet("resnet50", 3, WIDTH, "imagenet"), 1)


@pytest.fixture(scope="module")
def other():
    """The one beside it."""
    return filled(ResNet("resnet50", 3, WIDTH, "imagenet"), 2)


@pytest.fixture(scope="module")
def data():
    x = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std, y = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.3, 0.2]), torch.arange(12) % CLASSES
    return Data("made", x, y, x[:4], y[:4], ["a", "b", "c"], mean, std, "none", "c" * 64, True)


# ------------------------------------------------------------------------------------------------------- their layouts


def at(prefix, module):
    return {prefix + key: value for key, value in module.state_dict().items()}


def linear(prefix, dim, out, bias=True):
    torch.manual_seed(5)
    return at(prefix, nn.Linear(dim, out, bias))


def norm(prefix, dim, affine=True):
    return at(prefix, nn.BatchNorm1d(dim, affine=affine))


def optimizer():
    group = dict(lr=0.03, momentum=0.9, weight_decay=1e-4, nesterov=False, params=[0])
    return dict(state={0: {"momentum_buffer": torch.zeros(2, 3, 7, 7)}}, param_groups=[group])


def training(state):
    """The dictionary that the training scripts of MoCo and SwAV save."""
    return dict(epoch=800, arch="resnet50", state_dict=state, optimizer=optimizer())


def mlp(prefix):
    return linear(f"{prefix}0.", DIM, DIM) | linear(f"{prefix}2.", DIM, 8)


def moco_v2(net, other):
    return training(
        at("module.encoder_k.", other) | mlp("module.encoder_k.fc.") | {"module.queue": torch.zeros(8, 16)}
        | at("module.encoder_q.", net) | mlp("module.encoder_q.fc.") | {"module.queue_ptr": torch.zeros(1).long()}
    )  # fmt: skip


def moco_v2_released(net, other):
    return dict(epoch=800, arch="resnet50", state_dict=at("module.encoder_q.", net) | mlp("module.encoder_q.fc."))


def moco_v1(net, other):
    return training(
        at("module.encoder_k.", other) | linear("module.encoder_k.fc.", DIM, CLASSES) | {"module.queue": torch.zeros(3)}
        | at("module.encoder_q.", net) | linear("module.encoder_q.fc.", DIM, CLASSES)
    )  # fmt: skip


def moco_v3(net, other):
    def head(prefix):
        ends = linear(f"{prefix}0.", DIM, 16, False) | norm(f"{prefix}1.", 16) | linear(f"{prefix}3.", 16, 8, False)
        return ends | norm(f"{prefix}4.", 8, False)

    encoders = at("module.momentum_encoder.", other) | head("module.momentum_encoder.fc.")
    encoders |= at("module.base_encoder.", net) | head("module.base_encoder.fc.")
    return training(encoders | head("module.predictor.")) | dict(scaler=dict(scale=65536.0, _growth_tracker=7))


def swav(net, other):
    head = linear("module.projection_head.0.", DIM, 16) | norm("module.projection_head.1.", 16)
    head |= linear("module.projection_head.3.", 16, 8)
    return at("module.", net) | head | linear("module.prototypes.", 8, 30, False)


def swav_training(net, other):
    prototypes = linear("module.prototypes.prototypes0.", 8, 30, False)
    return training(at("module.", net) | prototypes)


def swav_bare_names(net, other):
    return {key.removeprefix("module."): value for key, value in swav(net, other).items()}


def dino_head(prefix):
    ends = linear(f"{prefix}mlp.0.", DIM, 16) | norm(f"{prefix}mlp.1.", 16) | linear(f"{prefix}mlp.3.", 16, 8)
    return ends | {f"{prefix}last_layer.weight": torch.zeros(60, 8)}


def dino_full(net, other, teacher="", student="module."):
    return dict(
        student=at(f"{student}backbone.", other) | dino_head(f"{student}head."),
        teacher=at(f"{teacher}backbone.", net) | dino_head(f"{teacher}head."),
        optimizer=optimizer(),
        epoch=800,
        dino_loss=dict(center=torch.zeros(1, 60)),
    )


def dino_run(net, other):
    return dino_full(net, other, teacher="module.")


def dino_teacher(net, other):
    return dict(teacher=dino_full(net, other)["teacher"])


def bare(net, other):
    return dict(net.state_dict())


def barlow_full(net, other):
    projector = linear("module.projector.0.", DIM, 16, False) | norm("module.projector.1.", 16)
    state = at("module.backbone.", net) | projector | norm("module.bn.", 16, False)
    return dict(epoch=999, model=state, optimizer=optimizer())


def solo_learn(net, other, name="backbone"):
    state = at(f"momentum_{name}.", other) | at(f"{name}.", net) | mlp("projector.") | mlp("momentum_projector.")
    state |= linear("classifier.", DIM, 10) | linear("momentum_classifier.", DIM, 10) | linear("prototypes.", 8, 30)
    return dict(state_dict=state | dict(queue=torch.zeros(2, 8, 16)), epoch=999, hyper_parameters=dict(lr=0.3))


def solo_learn_old(net, other):
    return solo_learn(net, other, "encoder")


def torchvision_file(net, other):
    return at("", net) | linear("fc.", DIM, CLASSES)


def probe(net, other):
    """What main_lincls.py of MoCo and of MoCo v3 saves: torchvision's network in DataParallel."""
    return training(at("module.", net) | linear("module.fc.", DIM, CLASSES)) | dict(best_acc1=torch.tensor(67.7))


def unknown(net, other):
    return dict(state_dict=at("model.features.", net) | {"model.head.weight": torch.zeros(3, DIM)})


MODULE = "state_dict.module."
PUBLISHED = [  # maker, name, prefix, std that it was trained with, whether its fc is a classifier
    (moco_v2, "MoCo v2", f"{MODULE}encoder_q.", PLAIN, False),
    (moco_v2_released, "MoCo v2", f"{MODULE}encoder_q.", PLAIN, False),
    (moco_v1, "MoCo v1", f"{MODULE}encoder_q.", PLAIN, False),
    (moco_v3, "MoCo v3", f"{MODULE}base_encoder.", PLAIN, False),
    (swav, "SwAV", "module.", SWAV, False),
    (swav_training, "SwAV", MODULE, SWAV, False),
    (swav_bare_names, "SwAV", "", SWAV, False),
    (dino_full, "DINO", "teacher.backbone.", PLAIN, False),
    (dino_run, "DINO", "teacher.module.backbone.", PLAIN, False),
    (dino_teacher, "DINO", "teacher.backbone.", PLAIN, False),
    (bare, "torchvision without fc", "", PLAIN, False),  # DINO's and Barlow Twins' backbones
    (barlow_full, "Barlow Twins", "model.module.backbone.", PLAIN, False),
    (solo_learn, "solo-learn", "state_dict.backbone.", PLAIN, False),
    (solo_learn_old, "solo-learn", "state_dict.encoder.", PLAIN, False),
    (torchvision_file, "torchvision", "", PLAIN, True),
    (probe, "torchvision", MODULE, PLAIN, True),
    (unknown, "features.*", "state_dict.model.features.", PLAIN, False),
]


@pytest.mark.parametrize("make, name, prefix, std, classifier", PUBLISHED, ids=[row[0].__name__ for row in PUBLISHED])
def test_a_published_checkpoint_is_recognised(net, other, data, tmp_path, capsys, make, name, prefix, std, classifier):
    """32 px images through a 7x7 stem, by the file's name alone, and the network that its makers evaluate."""
    state, path = make(net, other), tmp_path / "r-50-1000ep.pth.tar"
    found, where, below = layout_of(state)
    assert (found, where) == (name, prefix)
    for key, value in net.state_dict().items():
        assert torch.equal(below[key], value), key
    torch.save(state, path)
    teacher = load_teacher(str(path), data, CPU)
    assert teacher.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert teacher.std.tolist() == pytest.approx(std, rel=1e-6)
    # features, restated: each pixel to [0, 1], less the mean, over the standard deviation
    x = (data.x_test.float() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    expected = net(x.contiguous(memory_format=torch.channels_last))
    assert expected.std() > 0.01 and not torch.allclose(expected, other(x), rtol=0.1)
    assert torch.equal(teacher.features(data.x_test, CPU), net(normalise(data.x_test, teacher.mean, teacher.std)))
    torch.testing.assert_close(teacher.features(data.x_test, CPU), expected, rtol=1e-4, atol=1e-5)
    assert teacher.info["layout"] == name and teacher.name == f"r-50-1000ep ({name}, resnet50, imagenet stem)"
    assert f"teacher: r-50-1000ep ({name}, resnet50, imagenet stem), {DIM} features" in capsys.readouterr().out
    assert (teacher.info["arch"], teacher.info["stem"], teacher.dim) == ("resnet50", "imagenet", DIM)
    assert teacher.info["std"] == pytest.approx(std, rel=1e-6)
    if classifier:
        torch.manual_seed(5)
        fc = nn.Linear(DIM, CLASSES)
        features = teacher.features(data.x_test, CPU)
        assert torch.equal(load_classifier(str(path), data, CPU).fc(features), fc(features))
    else:
        assert teacher.fc is None
        refuse(lambda: load_classifier(str(path), data, CPU), "no linear classifier")


def test_the_order_of_the_keys_does_not_matter(net, other):
    def backwards(state):
        return {key: backwards(value) if isinstance(value, dict) else value for key, value in [*state.items()][::-1]}

    for make, name, prefix, *_ in PUBLISHED:
        state = make(net, other)
        before = backwards(backwards(state))
        assert layout_of(backwards(state))[:2] == (name, prefix)
        assert str(before.keys()) == str(state.keys())  # read, not written to


def test_a_cifar_stem_takes_the_datas_constants_in_any_layout(data, tmp_path):
    net = filled(ResNet("resnet18", 3, 4, "cifar"), 3)
    for make, name in ((swav, "SwAV"), (moco_v3, "MoCo v3"), (solo_learn, "solo-learn"), (dino_full, "DINO")):
        torch.save(make(net, filled(ResNet("resnet18", 3, 4, "cifar"), 4)), tmp_path / "net.ckpt")
        teacher = load_teacher(str(tmp_path / "net.ckpt"), data, CPU)
        assert torch.equal(teacher.mean, data.mean) and torch.equal(teacher.std, data.std)
        assert torch.equal(teacher.features(data.x_test, CPU), net(normalise(data.x_test, data.mean, data.std)))
        assert teacher.name == f"net ({name}, resnet18, cifar stem)"


def test_a_classifier_is_one_layer_of_the_features_width(net, data, tmp_path):
    for head in (linear("fc.", DIM + 1, CLASSES), linear("fc.", DIM, CLASSES, False), mlp("fc.")):
        torch.save(at("", net) | head, tmp_path / "net.pth")
        assert load_teacher(str(tmp_path / "net.pth"), data, CPU).fc is None


# ---------------------------------------------------------------------------------------------------- what is refused


def test_files_without_one_backbone_are_refused(net, other, data, tmp_path):
    path = tmp_path / "net.pth"

    def check(state, *words):
        torch.save(state, path)
        line = refuse(lambda: load_teacher(str(path), data, CPU), f"{path}: ", *words)
        assert len(line) < len(str(path)) + 300
        return line

    heads = {key: value for key, value in swav(net, other).items() if "projection_head" in key or "prototypes" in key}
    check(heads, "no ResNet in it", "it holds module.projection_head, module.prototypes)")
    check(mlp("fc.") | {"queue": torch.zeros(3)}, "no ResNet in it", "it holds fc, queue)")
    check(
        {f"head{i}.weight": torch.zeros(1) for i in range(7)},
        "no ResNet",
        "head0, head1, head2, head3, head4, head5, ...)",
    )
    check({}, "no ResNet in it", "no tensor with a name")
    check({"state_dict": {}}, "no ResNet in it", "no tensor with a name")
    check(at("left.", net) | at("right.", other), "2 backbones in it (left., right.)", "a file of its own")
    check(at("module.encoder_q.", net) | at("module.base_encoder.", other), "module.base_encoder., module.encoder_q.")
    check(dict(student=at("", other), teacher=at("", net)), "2 backbones in it (student., teacher.)")
    check(at("student_backbone.", other) | at("teacher_backbone.", net), "student_backbone., teacher_backbone.")
    check({"state_dict": at("", net), "model": at("", other)}, "2 backbones in it (model., state_dict.)")
    # torchvision's and timm's scripts evaluate both
    check({"model": at("", net), "model_ema": at("module.", other)}, "2 backbones in it (model., model_ema.module.)")
    check({"state_dict": at("", net), "state_dict_ema": at("", other)}, "2 backbones in it")
    check({key: value for key, value in at("", net).items() if key.startswith("layer")}, "no ResNet in it", "layer1, ")
    check({"conv1.weight": torch.zeros(3), "layer1.0.conv1.weight": torch.zeros(2, 2, 1, 1)}, "no ResNet in it")
    for name in ("module.encoder_k.", "module.momentum_encoder.", "momentum_backbone."):
        check(at(name, net), f"only a moving average in it ({name})")
    for name in ("backbone.", "module.backbone."):
        check(dict(student=at(name, net), epoch=3), f"only DINO's student in it (student.{name})")


@pytest.mark.parametrize("wrap", ["", "state_dict.module.base_encoder.", "teacher.backbone."])
def test_a_vision_transformer_has_a_line_of_its_own(data, tmp_path, wrap):
    *parts, prefix = (wrap or ".").removesuffix(".").split(".", 1) if wrap else [""]
    keys = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight")
    state = {f"{prefix}.{key}" if prefix else key: torch.zeros(1, 1, 2, 2) for key in keys}
    torch.save({parts[0]: state} if parts else state, tmp_path / "vit.pth")
    refuse(lambda: load_teacher(str(tmp_path / "vit.pth"), data, CPU), "a vision transformer", "only ResNets are known")


def test_torchvisions_transformers_are_recognised_and_resnets_with_attention_pass(net):
    key = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    with pytest.raises(ValueError, match="vision transformer"):
        layout_of({"class_token": torch.zeros(1, 1, 8), key: torch.zeros(8, 8)})
    with pytest.raises(ValueError, match=r"vision transformer \(module\.blocks\.0\.attn\.qkv\.weight\)"):
        layout_of({"module.blocks.0.attn.qkv.weight": torch.zeros(8, 8)})
    assert layout_of(at("backbone.", net) | {"head.attn.qkv.weight": torch.zeros(8, 8)})[:2] == (
        "backbone.*",
        "backbone.",
    )


@pytest.mark.parametrize("make", [moco_v2, moco_v3, swav, dino_full, barlow_full, solo_learn, torchvision_file])
def test_what_is_too_much_or_missing_below_the_prefix_is_refused(net, other, data, tmp_path, make):
    prefix, path = layout_of(make(net, other))[1], tmp_path / "net.pth"
    tensors = {}
    for key, value in make(net, other).items():
        tensors |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    tensors = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    torch.save(tensors | {f"{prefix}layer2.0.extra": torch.zeros(2)}, path)
    refuse(lambda: load_teacher(str(path), data, CPU), "Unexpected key(s)", "layer2.0.extra")
    torch.save(tensors | {f"{prefix}aside.weight": torch.zeros(2)}, path)
    refuse(lambda: load_teacher(str(path), data, CPU), "Unexpected key(s)", "aside.weight")
    torch.save({key: value for key, value in tensors.items() if key != f"{prefix}layer4.2.bn3.running_var"}, path)
    refuse(lambda: load_teacher(str(path), data, CPU), "Missing key(s)", "layer4.2.bn3.running_var")


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder_q."])
def test_heads_below_the_prefix_are_left_out_by_their_names(net, other, data, tmp_path, prefix):
    state = at(prefix, net) | at(f"{prefix}momentum_encoder.", other) | at(f"{prefix}momentum_backbone.", other)
    for head in ("projector", "predictor", "classifier", "projection_head", "prototypes", "fc"):
        state |= mlp(f"{prefix}{head}.")
    state |= {f"{prefix}{name}": torch.zeros(3) for name in ("queue", "queue_ptr", "lambd")}
    torch.save(state, tmp_path / "net.pth")
    teacher = load_teacher(str(tmp_path / "net.pth"), data, CPU)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in teacher.net.state_dict().items())
    torch.save(state | {f"{prefix}queues": torch.zeros(3)}, tmp_path / "net.pth")
    refuse(lambda: load_teacher(str(tmp_path / "net.pth"), data, CPU), "Unexpected key(s)", "queues")


def test_convolutions_of_other_parts_are_no_backbones(net):
    """A stem without stages beside one that has them, a norm's weight, and what only ends in the same letters."""
    aside = {"decoder.conv1.weight": torch.zeros(2, 2, 3, 3), "myconv1.weight": torch.zeros(2, 2, 3, 3)}
    state = at("backbone.", net) | aside | {"conv1.weight": torch.zeros(2)}
    assert layout_of(state)[1] == "backbone."
    state = {"conv1.weight": torch.zeros(2, 3, 7, 7), "myconv1.weight": torch.zeros(2, 3, 7, 7)}
    assert layout_of(state)[1] == ""


def test_dictionaries_are_read_four_deep(net):
    assert layout_of({"a": {"b": {"model": at("", net)}}})[1] == "a.b.model."
    with pytest.raises(ValueError, match="no tensor"):
        layout_of({"a": {"b": {"c": {"model": at("", net)}}}})
    assert layout_of({3: at("", net), None: torch.zeros(2), "model": at("", net)})[1] == "model."


# --------------------------------------------------------------------------------------- files that need unpickling


def exclude_bias_and_norm(p):
    return p.ndim == 1


def convert(path, data, cwd):
    """Run the printed command as a shell does; returns the converted file."""
    line = refuse(lambda: load_teacher(str(path), data, CPU), "would run pickled code", "if you trust it")
    command = line[line.index("python -c") : line.rindex(" and name the .clean.pt")]
    assert len(shlex.split(command)) == 3
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "HOME": "/nowhere"}
    subprocess.run(["sh", "-c", command], check=True, cwd=cwd, env=environment)
    return Path(f"{path}.clean.pt")


def test_dinos_full_checkpoint_converts(net, other, data, tmp_path):
    """Its args are an argparse.Namespace."""
    path = tmp_path / 'it\'s a "$HOME" file.pth'
    torch.save(dino_full(net, other) | dict(args=argparse.Namespace(lr=0.3)), path)
    teacher = load_teacher(str(convert(path, data, tmp_path)), data, CPU)
    assert teacher.info["layout"] == "DINO"
    x = normalise(data.x_test, *map(torch.tensor, IMAGENET))
    assert torch.equal(teacher.features(data.x_test, CPU), net(x))


@pytest.mark.slow
def test_barlow_twins_full_checkpoint_converts(net, other, data, tmp_path, monkeypatch):
    """Its optimizer names a function of the script that wrote it, which nobody else has."""
    state, path = barlow_full(net, other), tmp_path / "checkpoint.pth"
    state["optimizer"]["param_groups"][0]["lars_adaptation_filter"] = exclude_bias_and_norm
    main = sys.modules["__main__"]
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    monkeypatch.setattr(main, "exclude_bias_and_norm", exclude_bias_and_norm, raising=False)
    torch.save(state, path)
    monkeypatch.undo()
    clean = convert(path, data, tmp_path)
    kept = torch.load(clean, weights_only=True)
    assert list(kept) == ["model"] and kept["model"].keys() == state["model"].keys()
    teacher = load_teacher(str(clean), data, CPU)
    assert teacher.info["layout"] == "Barlow Twins"
    assert torch.equal(teacher.features(data.x_test, CPU), net(normalise(data.x_test, *map(torch.tensor, IMAGENET))))


@pytest.mark.slow
def test_mocos_checkpoint_converts(net, other, data, tmp_path):
    """MoCo's of torch before 1.6, which were no zip archives."""
    path = tmp_path / "moco.pth.tar"
    state = moco_v2(net, other) | dict(args=argparse.Namespace(arch="resnet50"))
    state["state_dict"]["note"] = argparse.Namespace()  # nor may one stand among the weights
    torch.save(state, path, _use_new_zipfile_serialization=False)
    teacher = load_teacher(str(convert(path, data, tmp_path)), data, CPU)
    assert teacher.name == "moco.pth.tar.clean (MoCo v2, resnet50, imagenet stem)"
    expected = net(normalise(data.x_test, *map(torch.tensor, IMAGENET)))
    assert torch.equal(teacher.features(data.x_test, CPU), expected)


@pytest.mark.slow
def test_a_whole_network_converts(net, data, tmp_path):
    """Where its class can be imported: the command runs in the folder of this project."""
    torch.save(net, tmp_path / "whole.pt")
    teacher = load_teacher(str(convert(tmp_path / "whole.pt", data, Path(__file__).parents[1])), data, CPU)
    expected = net(normalise(data.x_test, *map(torch.tensor, IMAGENET)))
    assert torch.equal(teacher.features(data.x_test, CPU), expected)
