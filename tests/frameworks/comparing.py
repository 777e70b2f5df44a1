"""What the tests of the frameworks share."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

import optimisers as opt

ROOT = Path(__file__).resolve().parents[2]


def example(name):
    """An example's module, loaded from its file."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "frameworks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_bits(ours, theirs):
    """Two (module, optimizer) pairs: parameters, buffers, optimizer state and hyper-parameters are equal, bit for bit."""
    (model, optimizer), (other, other_optimizer) = ours, theirs
    tensors, expected = model.state_dict(), other.state_dict()
    assert tensors.keys() == expected.keys()
    different = [name for name in tensors if not torch.equal(_bytes(tensors[name]), _bytes(expected[name]))]
    assert not different
    assert optimizer.tree == other_optimizer.tree
    for group, known in zip(optimizer.param_groups, other_optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in known.items() if k != "params"}


def _bytes(x):
    return x.reshape(-1).contiguous().view(torch.uint8)


def assert_close(ours, theirs):
    """Two (module, optimizer) pairs: parameters are equal to rounding, learning rates are equal."""
    (model, optimizer), (other, other_optimizer) = ours, theirs
    expected = dict(other.named_parameters())
    for name, x in model.named_parameters():
        torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in other_optimizer.param_groups]


def without_noise(model):
    """The model with nothing in it that depends on how a batch is divided: no dropout, no statistics over the batch."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, nn.Identity())
    return model


def smooth(hidden, **options):
    """Muon on the matrices of what ``hidden`` matches, momentum elsewhere.

    Small differences between gradients stay small: Adam makes full steps of the rounding errors that the bias of a key has
    for its gradient.
    """
    return opt.Route((hidden, opt.Muon(opt.Momentum(0.05), eta=0.02, **options)), otherwise=opt.Momentum(0.05))
