"""Averaged: an exponential moving average of the parameters beside the training."""

import copy
import pickle
import re

import numpy as np
import optree
import pytest
import torch

import optimisers as opt
from optimisers.errors import ArgumentError, HyperParameterError, RuleError, StructureError

LIBRARIES = pytest.mark.parametrize("lib", ["numpy", "torch"])


def draw(lib, *shape, seed=0, dtype="float64"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(dtype) if lib == "numpy" else torch.tensor(values).to(getattr(torch, dtype))


def values(x):
    return (x.detach().double().numpy() if isinstance(x, torch.Tensor) else x).copy()


def train(rule, model, steps, update=opt.update, seed=1):
    """(state, model, the models after each step)"""
    state, seen = opt.setup(rule, model), []
    for t in range(steps):
        lib = "torch" if any(isinstance(x, torch.Tensor) for x in model.values()) else "numpy"
        state, model = update(state, model, {name: draw(lib, *x.shape, seed=seed + t) for name, x in model.items()})
        seen.append({name: values(x) for name, x in model.items()})
    return state, model, seen


def expected(xs, decay, start=None):
    """The weighted mean by its definition."""
    weights = np.array([decay ** (len(xs) - 1 - k) for k in range(len(xs))]) * (1 - decay)
    mean = sum(w * x for w, x in zip(weights, xs, strict=True))
    return mean / weights.sum() if start is None else mean + decay ** len(xs) * start


@LIBRARIES
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("debias", [True, False])
def test_the_average_is_what_its_definition_says(lib, decay, debias):
    model = {"w": draw(lib, 3, 4), "b": draw(lib, 4, seed=7)}
    start = copy.deepcopy(model)
    state, model, seen = train(opt.Averaged(opt.Adam(0.1), decay, debias), model, 6)
    mean = opt.averaged(state, model)
    for name in model:
        first = None if debias else values(start[name])
        np.testing.assert_allclose(values(mean[name]), expected([s[name] for s in seen], decay, first), rtol=1e-12, atol=1e-15)


@LIBRARIES
def test_training_is_the_same_as_without_it(lib):
    rule = opt.OptimiserChain(opt.ClipNorm(1.0), opt.AdamW(0.1, lambda_=0.1))
    _, plain, _ = train(rule, {"w": draw(lib, 3, 4)}, 4)
    for each in (opt.Averaged(rule), opt.OptimiserChain(opt.ClipNorm(1.0), opt.Averaged(opt.AdamW(0.1, lambda_=0.1)))):
        _, model, _ = train(each, {"w": draw(lib, 3, 4)}, 4)
        assert (model["w"] == plain["w"]).all()


@LIBRARIES
def test_averaged_writes_to_nothing_and_shares_nothing(lib):
    model = {"w": draw(lib, 3, 4)}
    state, model, _ = train(opt.Averaged(opt.Descent(0.1), 0.5), model, 2)
    kept, mean = copy.deepcopy(state), opt.averaged(state, model)
    mean["w"][...] = 7.0
    assert state == kept
    mean = opt.averaged(state, model)
    before = values(mean["w"])
    opt.update_(state, model, {"w": draw(lib, 3, 4)})
    assert (values(mean["w"]) == before).all()


@LIBRARIES
def test_before_the_first_step_it_is_the_model(lib):
    model = {"w": draw(lib, 3, 4)}
    mean = opt.averaged(opt.setup(opt.Averaged(opt.Adam()), model), model)
    assert (mean["w"] == model["w"]).all()
    assert mean["w"] is not model["w"]


@LIBRARIES
def test_no_step_is_no_averaging(lib):
    model = {"w": draw(lib, 3), "v": draw(lib, 3, seed=3)}
    grads = {"w": draw(lib, 3), "v": None}
    rule = opt.Averaged(opt.OptimiserChain(opt.AccumGrad(2), opt.Descent(0.1)), 0.9)
    state = opt.setup(rule, model)
    state, model = opt.update(state, model, grads)
    assert state["w"].state.power == 1
    state, model = opt.update(state, model, grads)
    assert state["w"].state.power == 0.9
    assert state["v"].state.power == 1
    assert (opt.averaged(state, model)["w"] == model["w"]).all()
    frozen = opt.freeze(state)
    after, _ = opt.update(frozen, model, grads)
    assert after == frozen


@LIBRARIES
def test_in_a_route_others_keep_their_own_arrays(lib):
    model = {"w": draw(lib, 3), "v": draw(lib, 3, seed=3)}
    for rule in (
        opt.Route(("w", opt.Averaged(opt.Descent(0.1))), otherwise=opt.Descent(0.1)),
        opt.Route(("w", opt.Averaged(opt.Descent(0.1))), otherwise=None),
    ):
        state, new, _ = train(rule, model, 2)
        mean = opt.averaged(state, new)
        assert mean["v"] is new["v"]
        assert (mean["w"] != new["w"]).any()


def test_around_a_route():
    rule = opt.Averaged(opt.Route(("w", opt.Descent(0.1)), otherwise=opt.Adam()), 0.5)
    state = opt.setup(rule, {"w": np.ones(2), "v": np.ones(2)})
    assert state["w"].rule == opt.Averaged(opt.Descent(0.1), 0.5)
    assert state["v"].rule == opt.Averaged(opt.Adam(), 0.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "wrap",
    [
        opt.Averaged,
        lambda rule, decay: opt.Averaged(opt.MixedPrecision(rule), decay),
        lambda rule, decay: opt.MixedPrecision(opt.Averaged(rule, decay)),
    ],
    ids=["plain", "around MixedPrecision", "inside MixedPrecision"],
)
def test_half_precision_is_averaged_in_float32(dtype, wrap):
    model = {"w": torch.ones(4, dtype=getattr(torch, dtype))}
    state = opt.setup(wrap(opt.Descent(1e-5), 0.9), model)
    x = torch.ones(4)
    grads = {"w": torch.full((4,), 0.5, dtype=getattr(torch, dtype))}
    for _ in range(20):
        state, model = opt.update(state, model, grads)
    (average,) = [leaf for leaf in optree.tree_leaves(state) if leaf.ndim][-1:]
    assert average.dtype == torch.float32
    mean = opt.averaged(state, model)["w"]
    assert mean.dtype == model["w"].dtype
    if wrap is not opt.Averaged:  # the master moves, and so its average does
        xs = [x - 5e-6 * (t + 1) for t in range(20)]
        found = next(part.average for part in (state["w"].state, state["w"].state[1]) if hasattr(part, "average"))
        np.testing.assert_allclose(found, expected([a.double().numpy() for a in xs], 0.9), rtol=1e-6)


def test_both_places_beside_mixed_precision_average_the_master():
    ends = []
    for rule in (opt.Averaged(opt.MixedPrecision(opt.Adam(0.01)), 0.9), opt.MixedPrecision(opt.Averaged(opt.Adam(0.01), 0.9))):
        model = {"w": draw("torch", 5, dtype="bfloat16")}
        state, model, _ = train(rule, model, 5)
        leaf = state["w"].state
        ends.append(leaf.average if hasattr(leaf, "average") else leaf[1].average)
    assert torch.equal(*ends)


def test_state_dtype_is_that_of_the_average_too():
    x = {"w": torch.ones(2, dtype=torch.float64)}
    for given, found in (("float32", torch.float32), ("bfloat16", torch.float32)):
        assert opt.setup(opt.Averaged(opt.Adam()), x, state_dtype=given)["w"].state.average.dtype == found


@LIBRARIES
def test_ties_are_kept(lib):
    w = draw(lib, 3, 3)
    model = {"a": w, "b": [w, w.T]}
    state = opt.setup(opt.Averaged(opt.Descent(0.1), 0.5), model)
    for seed in range(3):
        g = draw(lib, 3, 3, seed=seed)
        state, model = opt.update(state, model, {"a": g, "b": [None, None]})
    mean = opt.averaged(state, model)
    assert mean["a"] is mean["b"][0]
    assert (mean["b"][1] == mean["a"].T).all()


def test_update_in_place_of_a_module_and_the_call_with_averages():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    state = opt.setup(opt.Averaged(opt.Adam(0.05), 0.9), net)
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    history = []
    for _ in range(5):
        net.zero_grad()
        (net(x) - y).square().mean().backward()
        state, net = opt.update_(state, net)
        history.append([values(p) for p in net.parameters()])
    before = [p.detach().clone() for p in net.parameters()]
    mean = opt.averaged(state, net)
    assert list(mean) == [name for name, _ in net.named_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    for i, value in enumerate(mean.values()):
        assert isinstance(value, torch.nn.Parameter)
        assert value.is_leaf
        np.testing.assert_allclose(value.detach(), expected([h[i] for h in history], 0.9), rtol=2e-5, atol=1e-7)
    out = torch.func.functional_call(net, mean, (x,))
    twin = copy.deepcopy(net)
    twin.load_state_dict(mean)
    assert torch.equal(out, twin(x))
    assert not torch.equal(out, net(x))


@LIBRARIES
def test_resuming_is_going_on(lib):
    rule = opt.Averaged(opt.Adam(0.1), 0.9)
    state, model, _ = train(rule, {"w": draw(lib, 3)}, 3)
    again = pickle.loads(pickle.dumps(state))
    assert again == state
    grads = {"w": draw(lib, 3, seed=9)}
    (one, x), (two, y) = opt.update(state, model, grads), opt.update(again, model, grads)
    assert one == two
    assert (x["w"] == y["w"]).all()


def test_as_a_pytree_and_under_vmap():
    rule = opt.Averaged(opt.Momentum(0.1), 0.9)
    models = {"w": draw("torch", 3, 4)}
    grads = {"w": draw("torch", 3, 4, seed=1)}
    states = torch.func.vmap(lambda m: opt.setup(rule, m))(models)
    for _ in range(2):
        states, models = torch.func.vmap(opt.update)(states, models, grads)
    means = torch.func.vmap(opt.averaged)(states, models)
    for i in range(3):
        x = {"w": draw("torch", 3, 4)[i]}
        state = opt.setup(rule, x)
        for _ in range(2):
            state, x = opt.update(state, x, {"w": grads["w"][i]})
        torch.testing.assert_close(means["w"][i], opt.averaged(state, x)["w"])


def test_the_average_is_differentiable():
    g = torch.ones(2, dtype=torch.float64, requires_grad=True)
    model = {"w": torch.zeros(2, dtype=torch.float64)}
    state = opt.setup(opt.Averaged(opt.Descent(1.0), 0.5), model)
    for _ in range(2):
        state, model = opt.update(state, model, {"w": g})
    (slope,) = torch.autograd.grad(opt.averaged(state, model)["w"].sum(), g)
    torch.testing.assert_close(slope, torch.full_like(slope, -(1 + 2 * 2) / 3))


def test_adjusting():
    state = opt.setup(opt.Averaged(opt.Adam(), 0.9), np.ones(2))
    assert opt.adjust(state, 0.5)[()].rule == opt.Averaged(opt.Adam(0.5), 0.9)
    assert opt.adjust(state, decay=0.5)[()].rule == opt.Averaged(opt.Adam(), 0.5)
    with pytest.raises(HyperParameterError, match=re.escape("Averaged: field 'decay' must be in [0, 1); got 1.0")):
        opt.adjust(state, decay=1.0)
    scheduled = opt.Scheduled(opt.Averaged(opt.Adam()), decay=lambda t: t / (t + 1))
    assert scheduled.at(1).decay == 0.5


def test_a_changing_decay_still_gives_a_mean():
    model = {"w": np.zeros(1)}
    state = opt.setup(opt.Scheduled(opt.Averaged(opt.Descent(1.0)), decay=lambda t: t / (t + 1)), model)
    for value in (1.0, 2.0, 3.0, 6.0):  # so it is the plain mean of all
        state, model = opt.update(state, model, {"w": model["w"] - value})
    np.testing.assert_allclose(opt.averaged(state, model)["w"], [3.0])


def test_bad_input():
    with pytest.raises(RuleError, match=re.escape("Averaged(rule, decay): rule must be a rule; got a float 0.1")):
        opt.Averaged(0.1)
    with pytest.raises(RuleError, match=r"member 0, Averaged, is or holds Averaged, .* must be the last member"):
        opt.OptimiserChain(opt.Averaged(opt.Adam()), opt.WeightDecay())
    model = {"w": np.ones(2)}
    state = opt.setup(opt.Adam(), model)
    with pytest.raises(ArgumentError, match="no rule of this state keeps an average"):
        opt.averaged(state, model)
    state = opt.setup(opt.Averaged(opt.Adam()), model)
    with pytest.raises(ArgumentError, match="order is averaged"):
        opt.averaged(model, state)
    with pytest.raises(StructureError, match="lacks the key"):
        opt.averaged(state, {"v": np.ones(2)})
    with pytest.raises(StructureError, match="shape"):
        opt.averaged(state, {"w": np.ones(3)})
