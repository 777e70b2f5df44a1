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


# --- the parameter is the truth ---------------------------------------------------------------------------------------------


def loaded(net):
    net.load_state_dict({name: torch.full_like(p, 5.0) for name, p in net.state_dict().items()})


def clamped(net):
    for p in net.parameters():
        p.data.clamp_(-0.05, 0.05)


def averaged_into(net):
    for p in net.parameters():
        p.data.copy_(0.5 * (p.data.float() + 1))


def reinitialised(net):
    for p in net.parameters():
        torch.nn.init.constant_(p, 0.25)


WRITERS = [loaded, clamped, averaged_into, reinitialised]


@HALVES
@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "rule",
    [
        opt.MixedPrecision(opt.Descent(0.0)),
        opt.MixedPrecision(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.0, lambda_=0.1))),
        opt.Scheduled(opt.MixedPrecision(opt.Descent()), eta=lambda _: 0.0),
        opt.Averaged(opt.MixedPrecision(opt.Descent(0.0))),
        opt.MixedPrecision(opt.Averaged(opt.Adam(0.0))),
        opt.MixedPrecision(opt.Muon(opt.AdamW(0.0), eta=0.0)),
        opt.MixedPrecision(opt.Descent(0.0), "float64"),
    ],
    ids=["plain", "chain", "scheduled", "averaged", "average inside", "Muon", "float64"],
)
@pytest.mark.parametrize("mode", ["1", "0", "rules"])
def test_what_is_written_to_the_parameters_is_not_undone(dtype, write, rule, mode, switch):
    switch(mode)
    net = network().to(dtype)
    state = opt.setup(rule, net)
    for _ in range(2):
        backward(net, dtype)
        state, net = opt.update_(state, net)
    write(net)
    expected = copy.deepcopy(net.state_dict())
    for _ in range(2):
        backward(net, dtype)
        state, net = opt.update_(state, net)
        for name, p in net.named_parameters():
            assert torch.equal(p, expected[name])
    params = dict(net.named_parameters())
    state = opt.setup(rule, params)
    state, params = opt.update(state, params, {name: torch.ones_like(p) for name, p in params.items()})
    params = {name: torch.full_like(p, -3.0) for name, p in params.items()}
    state, params = opt.update(state, params, {name: torch.ones_like(p) for name, p in params.items()})
    assert all((p == -3).all() for p in params.values())


@pytest.mark.parametrize("size", [6, 6000])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_only_elements_that_were_written_leave_their_masters(size, kind):
    """Elsewhere the master goes on with what rounding hides: a hundred steps of 1e-5 are 1e-3."""
    ones = np.ones(size, "float16")
    model = {"w": ones if kind == "numpy" else torch.tensor(ones).bfloat16()}
    state = opt.setup(opt.MixedPrecision(opt.Descent(1e-5)), model)
    grads = {"w": model["w"] + 0}
    for _ in range(100):
        state, model = opt.update(state, model, grads)
    model["w"][0], model["w"][1] = 2.0, math.nan
    for _ in range(100):
        state, model = opt.update_(state, model, grads)
    master = np.asarray(state["w"].state[0])
    np.testing.assert_allclose(master[0], 2.0 - 1e-3, rtol=1e-6)
    assert np.isnan(master[1])
    np.testing.assert_allclose(master[2:], 1.0 - 2e-3, rtol=1e-5)


def test_a_wider_parameter_than_its_master_is_the_truth():
    model = {"w": torch.full((5,), 0.1, dtype=torch.float64)}
    state = opt.setup(opt.MixedPrecision(opt.Descent(0.0), "bfloat16"), model)
    grads = {"w": torch.ones(5, dtype=torch.float64)}
    state, model = opt.update(state, model, grads)
    assert (model["w"] == torch.tensor(0.1, dtype=torch.bfloat16).double()).all()
    assert state["w"].state[0].dtype == torch.bfloat16
    state, model = opt.update(state, {"w": torch.full((5,), 3.0, dtype=torch.float64)}, grads)
    assert (model["w"] == 3).all()


def test_complex_parameters_have_complex_masters_that_follow_them():
    model = {"w": np.full(3, 1 + 2j, np.complex64)}
    state = opt.setup(opt.MixedPrecision(opt.Descent(0.0), "float64"), model)
    state, _ = opt.update(state, model, model)
    state, model = opt.update(state, {"w": np.full(3, 3 - 1j, np.complex64)}, model)
    assert (model["w"] == 3 - 1j).all()
    assert state["w"].state[0].dtype == np.complex128


def test_extend_overlap_and_thaw_do_not_bring_stale_masters_back():
    model = {"w": torch.zeros(4, 2, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.bfloat16)}
    state = opt.freeze(opt.setup(opt.MixedPrecision(opt.Descent(0.0)), model), where="b")
    grown = {"w": torch.full((6, 2), 5.0, dtype=torch.bfloat16), "b": torch.full((2,), 5.0, dtype=torch.bfloat16)}
    state = opt.thaw(opt.extend(state, grown, resize="overlap"))
    state, grown = opt.update(state, grown, {name: torch.ones_like(p) for name, p in grown.items()})
    assert all((p == 5).all() for p in grown.values())


@HALVES
@pytest.mark.parametrize("from_state", [False, True])
def test_a_loaded_state_tells_masters_from_written_parameters(dtype, from_state, tmp_path):
    """A parameter put back to 1, near enough to its master that another precision would round that to 1 as well."""
    rule = opt.MixedPrecision(opt.Descent(1e-4))
    model = {"w": torch.ones(8, dtype=dtype)}
    state = opt.setup(rule, model)
    grads = {"w": torch.ones(8, dtype=dtype)}
    for _ in range(30):
        state, model = opt.update(state, model, grads)
    opt.save(tmp_path / "state", state)
    state = opt.load(tmp_path / "state", like=opt.setup(rule, model) if from_state else model)
    kept, _ = opt.update(state, model, grads)
    np.testing.assert_allclose(kept["w"].state[0], 1 - 31e-4, rtol=1e-5)
    back, _ = opt.update(state, {"w": torch.ones(8, dtype=dtype)}, grads)
    was_one = torch.equal(model["w"], torch.ones(8, dtype=dtype))
    np.testing.assert_allclose(back["w"].state[0], 1 - (31e-4 if was_one else 1e-4), rtol=1e-5)


def test_the_adapter_trains_what_was_loaded():
    from optimisers.torch import Optimizer

    net = torch.nn.Linear(2, 2).bfloat16()
    optimizer = Optimizer(opt.MixedPrecision(opt.Descent(0.0)), net)
    net.load_state_dict({"weight": torch.full((2, 2), 5.0), "bias": torch.full((2,), 5.0)})
    net(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert (net.weight == 5).all()
    assert (net.bias == 5).all()
