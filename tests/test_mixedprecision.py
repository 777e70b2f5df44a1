"""Training in half precision: master weights, autocast, loss scaling, dtypes of moments."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import optree
import pytest
import torch

import optimisers as opt

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - 0.5 * X[:, 1:2]


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))


def backward(net, dtype=torch.float32, scale=1.0):
    net.zero_grad()
    loss = (net(X.to(dtype)).float() - Y).square().mean()
    (scale * loss).backward()
    return loss.item()


def train(rule, net, steps, dtype):
    state = opt.setup(rule, net)
    losses = []
    for _ in range(steps):
        losses.append(backward(net, dtype))
        state, net = opt.update_(state, net)
    return state, losses


@HALVES
@pytest.mark.parametrize(
    "rule",
    [opt.Adam(1e-2), opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.AdamW(1e-2, lambda_=0.1)), opt.Muon(eta=0.02)],
    ids=str,
)
def test_master_weights_train_a_module(dtype, rule):
    state, losses = train(opt.MixedPrecision(rule), network().to(dtype), 30, dtype)
    _, wide = train(rule, network(), 30, torch.float32)
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] < wide[-1] + 0.1 * wide[0]
    assert {leaf.dtype for leaf in optree.tree_leaves(state) if leaf.ndim} == {torch.float32}


@HALVES
def test_the_parameter_is_the_rounded_master(dtype):
    net = network().to(dtype)
    state, _ = train(opt.MixedPrecision(opt.Adam(1e-3)), net, 5, dtype)
    for name, p in net.named_parameters():
        assert torch.equal(state[name].state[0].to(dtype), p)


@HALVES
def test_the_master_steps_as_a_float32_parameter_with_these_gradients(dtype):
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.AdamW(1e-3, lambda_=0.1))
    model = {"w": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)}
    wide = {"w": model["w"].float()}
    state, wide_state = opt.setup(opt.MixedPrecision(rule), model), opt.setup(rule, wide)
    for t in range(5):
        grads = {"w": torch.randn(5, 3, generator=torch.Generator().manual_seed(t + 1)).to(dtype)}
        state, model = opt.update(state, model, grads)
        wide_state, wide = opt.update(wide_state, wide, grads)
        assert torch.equal(state["w"].state[0], wide["w"])


@HALVES
def test_pure_and_in_place_agree_and_resume(dtype):
    rule = opt.MixedPrecision(opt.Adam(1e-3))
    model = {"w": torch.ones(4, dtype=dtype), "b": torch.ones(2)}
    grads = {"w": torch.full((4,), 0.3, dtype=dtype), "b": torch.ones(2)}
    state, other, written = opt.setup(rule, model), opt.setup(rule, model), copy.deepcopy(model)
    for _ in range(3):
        state, model = opt.update(state, model, grads)
        other, written = opt.update_(other, written, grads)
        other = copy.deepcopy(other)
    assert state == other
    assert all(torch.equal(model[k], written[k]) for k in model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    net = network()
    state, losses = opt.setup(opt.AdamW(1e-2), net), []
    for _ in range(40):
        net.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = (net(X).float() - Y).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        state, net = opt.update_(state, net)
    assert losses[-1] < 0.6 * losses[0]


def test_autocast_of_bfloat16_parameters_with_masters():
    net = network().to(torch.bfloat16)
    state, losses = opt.setup(opt.MixedPrecision(opt.AdamW(1e-2)), net), []
    for _ in range(40):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (net(X.bfloat16()).float() - Y).square().mean()
        loss.backward()
        losses.append(loss.item())
        state, net = opt.update_(state, net)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("rule", [opt.AdamW(1e-2), opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.AdamW(1e-2))], ids=str)
def test_grad_scaler_with_update_in_place(rule):
    """It needs param_groups and step, calls step only where nothing overflowed, and divides .grad before."""
    net, twin = network(), network()
    taken = []

    def step():
        taken.append(None)
        box[0], _ = opt.update_(box[0], net)

    box = [opt.setup(opt.Scheduled(rule, eta=lambda t: 1e-2), net)]
    stepper = SimpleNamespace(param_groups=[{"params": list(net.parameters())}], step=step)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    losses = []
    for _ in range(40):
        net.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (net(X) - Y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(stepper)
        scaler.update()
        losses.append(loss.item())
    skipped = 40 - len(taken)
    assert skipped >= 1
    assert scaler.get_scale() == 2.0 ** (24 - skipped)
    assert int(box[0]["0.weight"].state[0]) == len(taken)
    assert losses[-1] < 0.6 * losses[0]
    assert not torch.equal(net[0].weight, twin[0].weight)


def test_float16_parameters_with_a_scale_by_hand():
    net = network().half()
    rule = opt.MixedPrecision(opt.OptimiserChain(opt.SkipNonFinite(), opt.ClipGlobalNorm(1.0), opt.AdamW(1e-2)))
    state, scale, seen, losses = opt.setup(rule, net), 2.0**18, 0, []
    for _ in range(50):
        losses.append(backward(net, torch.float16, scale))
        grads = {name: p.grad.float() / scale for name, p in net.named_parameters()}
        state, net = opt.update_(state, net, grads)
        steps = opt.skipped(state)["0.weight"].steps
        scale, seen = scale / 2 ** (steps - seen), steps
    assert seen >= 1
    assert any(count.culprit for count in opt.skipped(state).values())
    assert losses[-1] < 0.6 * losses[0]


def test_gradients_that_vanish_in_float16_are_saved_by_a_scale():
    w = torch.ones(4, dtype=torch.float16)
    tiny = 1e-9
    assert (torch.full((4,), tiny).half() == 0).all()
    scaled = torch.full((4,), tiny * 2**20).half()
    _, new = opt.update(opt.setup(opt.MixedPrecision(opt.Adam(1e-2, epsilon=1e-12)), w), w, scaled.float() / 2**20)
    np.testing.assert_allclose(new.float(), 0.99, atol=1e-3)


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", ["bfloat16", "float32", "float64", torch.float16])
def test_the_dtype_of_moments(own, wanted):
    model = {"w": torch.ones(4, dtype=own)}
    name = wanted if isinstance(wanted, str) else "float16"
    state = opt.setup(opt.Adam(0.01), model, state_dtype=wanted)
    for _ in range(3):
        state, model = opt.update(state, model, {"w": torch.full((4,), 0.5, dtype=own)})
        assert {leaf.dtype for leaf in state["w"].state[:2]} == {getattr(torch, name)}
        assert model["w"].dtype == own
    np.testing.assert_allclose(model["w"].double(), 0.97, atol=0.01)


def test_the_dtype_of_moments_beside_a_master():
    model = {"w": torch.ones(4, dtype=torch.bfloat16)}
    state = opt.setup(opt.MixedPrecision(opt.Adam(1e-3)), model, state_dtype="bfloat16")
    for _ in range(10):
        state, model = opt.update(state, model, {"w": torch.ones(4)})
    master, (m, v, _) = state["w"].state
    assert (master.dtype, m.dtype, v.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    np.testing.assert_allclose(master, 0.99, atol=1e-4)
    assert math.isclose(model["w"][0].item(), 0.99, abs_tol=0.004)
