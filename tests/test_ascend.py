"""ascend: the model at which sharpness-aware minimisation takes its gradient."""

import re

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from optimisers.errors import ArgumentError, GradientError, HyperParameterError

both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def drawn():
    rng = np.random.default_rng(0)
    return ({"a": rng.standard_normal((3, 4)), "b": [rng.standard_normal(5)]} for _ in range(2))


@both_kinds
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_up_the_gradient(kind, adaptive):
    model, grads = drawn()
    pairs = [(model["a"], grads["a"]), (model["b"][0], grads["b"][0])]
    scaled = [abs(x) * g if adaptive else g for x, g in pairs]
    length = np.sqrt(sum((s * s).sum() for s in scaled))
    given = made(model, kind)
    ahead = opt.ascend(given, made(grads, kind), 0.3, adaptive=adaptive)
    for new, (x, g) in zip((ahead["a"], ahead["b"][0]), pairs, strict=True):
        np.testing.assert_allclose(numpy_of(new), x + 0.3 * (x * x * g if adaptive else g) / length, rtol=1e-12)
    np.testing.assert_array_equal(numpy_of(given["a"]), model["a"])


def test_absent_gradients_do_not_count_and_tied_ones_once():
    model, grads = drawn()
    w = model["a"]
    ahead = opt.ascend({"w": w, "again": w, "b": model["b"][0]}, {"w": grads["a"], "again": 2 * grads["a"], "b": None}, 0.1)
    assert ahead["w"] is ahead["again"]
    assert ahead["b"] is model["b"][0]
    np.testing.assert_allclose(ahead["w"], w + 0.1 * grads["a"] / np.linalg.norm(grads["a"]), rtol=1e-12)


@both_kinds
def test_zero_gradients_and_no_gradients_lead_nowhere(kind):
    model, _ = drawn()
    given = made(model, kind)
    zero = made({"a": 0 * model["a"], "b": [0 * model["b"][0]]}, kind)
    for grads in (zero, {"a": None, "b": None}):
        np.testing.assert_array_equal(numpy_of(opt.ascend(given, grads)["a"]), model["a"])


def test_a_module_gives_a_dict_of_its_parameters():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    x = torch.randn(5, 3)
    net(x).square().sum().backward()
    ahead = opt.ascend(net, rho=0.1)
    length = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    torch.testing.assert_close(ahead["weight"], net.weight + 0.1 * net.weight.grad / length)
    torch.func.functional_call(net, ahead, (x,)).square().sum().backward()
    assert ahead["bias"].grad is not None
    assert not torch.equal(ahead["bias"].grad, net.bias.grad)


def test_bad_arguments():
    model, grads = drawn()
    with pytest.raises(ArgumentError, match=re.escape("ascend: give the gradients, ascend(model, grads)")):
        opt.ascend(model)
    with pytest.raises(HyperParameterError, match="field 'rho' must be a finite number >= 0; got -1"):
        opt.ascend(model, grads, -1)
    with pytest.raises(GradientError, match="'a'"):
        opt.ascend(model, {**grads, "a": np.ones(7)})
