"""What the tests of self-supervised and supervised training share: spies, naive networks, optimisers and measures."""

import os
import signal

import pytest
import torch
from torch import nn

import common.pretrain
import common.run
from common.models import ResNet
from common.pretrain import knn_accuracy
from common.run import Stopped, catch_signals
from common.students import per_class

F64 = torch.float64
CPU = torch.device("cpu")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    """Whether all tensors of two modules or state dicts are equal, bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def forbid(*_, **__):
    raise AssertionError("this must not be called")


def close(a, b, rtol=1e-4):
    """Whether a is b up to rtol of b's largest number."""
    return (a.double() - b).abs().max() <= rtol * b.abs().max()


def one_thread():
    """A fixture: the networks are tiny. For whole modules: what is compared bit for bit has one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def handlers():
    """A fixture that puts back what catch_signals replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    catch_signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def spy(monkeypatch):
    """What `optimise` trains: {"before": {name: state dict}, "modules", "rates"}, filled by the next training."""
    seen, whole = {"rates": []}, common.pretrain.optimise

    def optimise(checkpoint, modules, method, *rest, **options):
        clone = lambda module: {key: value.clone() for key, value in module.state_dict().items()}  # noqa: E731
        seen.update(before={name: clone(module) for name, module in modules.items()}, modules=modules)
        after = method.before_update
        method.before_update = lambda rate: seen["rates"].append(rate) or after(rate)
        return whole(checkpoint, modules, method, *rest, **options)

    monkeypatch.setattr(common.pretrain, "optimise", optimise)
    return seen


def record(monkeypatch, module, name):
    """The results of every call of a module's function, as they come."""
    results, whole = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kw: results.append(whole(*args, **kw)) or results[-1])
    return results


def signal_at(patch, module, name, number, at):
    """The process gets the signal in the `at`-th call of a module's function from now (1: the next); counts calls."""
    calls, whole = [], getattr(module, name)

    def function(*args, **options):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return whole(*args, **options)

    catch_signals()
    patch.setattr(module, name, function)
    return calls


def stops(monkeypatch, train, folder, module=nn.functional, name="cross_entropy"):
    """train() ended by signals after 1, 2, 3 and 5 of its six steps, and one in the last; returns its result.

    module, name: the function that is called once a step.
    """
    done = []
    for number, at in ((signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)):
        with monkeypatch.context() as patch:
            signal_at(patch, module, name, number, at)
            with pytest.raises(Stopped):
                train()
        (path,) = (*folder.rglob("checkpoint.pt"), *folder.rglob("probe-*.pt"))
        done.append(common.run.load_checkpoint(path)["step"])
        torch.rand(5)  # the global generator is elsewhere by now
    assert done == [1, 2, 3, 5] and not list(folder.rglob("*.safetensors"))
    with monkeypatch.context() as patch:
        calls = signal_at(patch, module, name, signal.SIGTERM, 1)
        with pytest.raises(Stopped):
            train()
        assert len(calls) == 1 and not path.exists()  # it is finished
    catch_signals()
    return train()


# ------------------------------------------------------------------------------------------------------ naive training


class NaiveSplit(nn.Module):
    """BatchNorm of (B, C) or (B, C, H, W): every part of the batch by its own mean and variance, as sums, in the dtype
    of the images. norm: whose weights (ones and zeros where it has none), statistics and settings these are."""

    def __init__(self, norm, splits):
        super().__init__()
        self.splits, self.eps, self.momentum = splits, norm.eps, norm.momentum
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()
        if norm.affine:
            self.weight, self.bias = (nn.Parameter(p.detach().clone()) for p in (norm.weight, norm.bias))
        else:
            self.weight, self.bias = torch.ones_like(self.mean), torch.zeros_like(self.mean)

    def forward(self, x):
        size, parts, means, variances = len(x) // self.splits, [], [], []
        for s in range(self.splits):
            part = x[s * size : (s + 1) * size].transpose(0, 1).flatten(1)  # (C, B / splits * H * W)
            n = part.shape[1]
            mean = part.sum(1) / n
            var = (part - mean[:, None]).square().sum(1) / n
            out = (part - mean[:, None]) / (var + self.eps).sqrt()[:, None] * self.weight[:, None] + self.bias[:, None]
            parts.append(out.view(x.shape[1], size, *x.shape[2:]).transpose(0, 1))
            means.append(mean.detach())
            variances.append(var.detach() * n / (n - 1))
        self.mean = (1 - self.momentum) * self.mean + self.momentum * sum(means) / self.splits
        self.var = (1 - self.momentum) * self.var + self.momentum * sum(variances) / self.splits
        return torch.cat(parts)


def naive_norms(net, splits=1):
    """`net` in float64, every norm replaced by the naive one."""
    net = net.double()
    for name, norm in list(net.named_modules()):
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            net.set_submodule(name, NaiveSplit(norm, splits))
    return net


def naive_net(state, splits=1, channels=1, padding=1):
    """A ResNet-10 of width 4 with these weights in float64, every norm replaced by the naive one."""
    net = ResNet("resnet10", channels, 4, "cifar", padding).double()
    net.load_state_dict(state)
    return naive_norms(net, splits)


class Sgd:
    """v = momentum v + g + decay p; p -= lr v; nothing of a parameter that the loss does not depend on."""

    def __init__(self, params, momentum, decay=0.0):
        self.params, self.momentum, self.decay = list(params), momentum, decay
        self.v = [torch.zeros_like(p) for p in self.params]

    def step(self, loss, lr, change=lambda p, g: g):
        """change(p, g): the gradient that is gone along, of a parameter's gradient g."""
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        with torch.no_grad():
            for p, v, g in zip(self.params, self.v, grads, strict=True):
                if g is not None:
                    v.mul_(self.momentum).add_(change(p, g) + self.decay * p)
                    p.sub_(lr * v)


def linear(state, prefix=""):
    layer = nn.Linear(*state[f"{prefix}weight"].shape[::-1], bias=f"{prefix}bias" in state).double()
    layer.load_state_dict({key: state[f"{prefix}{key}"] for key in ("weight", "bias") if f"{prefix}{key}" in state})
    return layer


def check_net(state, naive, rtol=1e-4):
    """A trained network's parameters and running statistics against the naive float64 network's."""
    seen = set()
    for name, module in naive.named_modules():
        pairs = []
        if isinstance(module, NaiveSplit):
            error = (state[f"{name}.running_mean"].double() - module.mean).abs().max()
            assert error <= rtol * (module.mean.abs() + module.var.sqrt()).max(), name  # a mean can be zero
            seen.add(f"{name}.running_mean")
            pairs = [("running_var", module.var)]
            if isinstance(module.weight, nn.Parameter):
                pairs += [("weight", module.weight), ("bias", module.bias)]
        elif isinstance(module, nn.Conv2d | nn.Linear):
            pairs = [("weight", module.weight)] + ([("bias", module.bias)] if module.bias is not None else [])
        for key, wanted in pairs:
            assert close(state[f"{name}.{key}"], wanted.detach(), rtol), (name, key)
            seen.add(f"{name}.{key}")
    assert seen == {key for key in state if not key.endswith("num_batches_tracked")}


# ------------------------------------------------------------------------------------------------------------ measures


def one_label(features, data, draws=20):
    """Accuracy of the nearest of ten labelled images, one of each class, in `draws` paired draws: (draws,)."""
    f_train, f_test = features(data.x_train), features(data.x_test)
    drawn = [per_class(data.y_train, 1, "one label", draw) for draw in range(draws)]
    return torch.tensor([knn_accuracy(f_train[i], data.y_train[i], f_test, data.y_test, k=1) for i in drawn])
