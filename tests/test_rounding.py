"""StochasticRounding: bfloat16 parameters that small steps move on the mean."""

import copy
import itertools
import math
import pickle
import re

import numpy as np
import optree
import pytest
import torch

import optimisers as opt
from optimisers.arrays import normal, random_bits, rounded_at_random
from optimisers.errors import HyperParameterError, RuleError

BF16 = torch.bfloat16
KEY = 0x1234_5678_9ABC


def bfloat16(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def run(rule, model, gradients, state=None, update=opt.update):
    state = opt.setup(rule, model) if state is None else state
    for grads in gradients:
        state, model = update(state, model, grads)
    return state, model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True))


# --- the random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("like", [np.zeros(1), torch.zeros(1)], ids=["numpy", "torch"])
def test_the_stream_is_a_function_of_key_counter_and_place(like):
    bits = np.asarray(random_bits(KEY, 3, 1000, like))
    assert bits.dtype == np.int64
    assert len(set(bits.tolist())) == 1000
    assert (np.asarray(random_bits(KEY, 3, 10, like)) == bits[:10]).all()
    assert not set(random_bits(KEY, 4, 1000, like).tolist()) & set(bits.tolist())
    assert not set(random_bits(KEY + 1, 3, 1000, like).tolist()) & set(bits.tolist())
    ones = [(bits >> place & 1).mean() for place in range(64)]
    assert all(abs(mean - 0.5) < 5 * 0.5 / math.sqrt(1000) for mean in ones)


def test_both_libraries_have_the_same_stream():
    bits = [np.asarray(random_bits(-KEY, 7, 33, like)) for like in (np.zeros(1), torch.zeros(1))]
    assert (bits[0] == bits[1]).all()
    ends = [np.asarray(normal(KEY, 1, (3, 5), like)) for like in (np.zeros(1), torch.zeros(1))]
    np.testing.assert_allclose(*ends, rtol=1e-12)


def splitmix(z):
    """The finaliser of SplitMix64 in plain integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_the_stream_is_the_one_described():
    """What a state resumes with years later must not change."""
    gamma = 0x9E3779B97F4A7C15
    start = splitmix(KEY ^ splitmix(4 * gamma % 2**64))
    expected = [splitmix((start + i * gamma) % 2**64) for i in range(5)]
    assert [n % 2**64 for n in random_bits(KEY, 3, 5, np.zeros(1)).tolist()] == expected


# --- the rounding of an array --------------------------------------------------------------------------------------------


def test_rounding_goes_to_a_neighbour_and_keeps_what_is_representable():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, 10_000)
    new = rounded_at_random(x, KEY, 0)
    assert new.dtype == torch.float32
    assert torch.equal(new, new.to(BF16).float())
    down = (x.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    up = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((new == down) | (new == up)).all()
    assert 0.45 < (new == up).float().mean() < 0.55
    kept = new
    for counter in range(5):
        assert torch.equal(rounded_at_random(kept, KEY, counter), kept)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -0.3333, 1e-30, 2.0 - 1e-6, 1e-40])
def test_rounding_is_unbiased(value):
    count = 200_000
    x = torch.full((count,), value)
    exact = x[0].double().item()
    new = rounded_at_random(x, KEY, 5).double()
    low, high = new.min().item(), new.max().item()
    assert low <= exact <= high
    share = (exact - low) / (high - low)
    spread = (high - low) * math.sqrt(share * (1 - share) / count)
    assert abs(new.mean().item() - exact) < 5 * spread


def test_the_probability_is_exact(monkeypatch):
    """Over all 2**16 random numbers, the number of those that round up is the lower half of the float32."""
    every = torch.arange(-0x8000, 0x8000, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr("optimisers.arrays._random.random_bits", lambda key, counter, count, like: every[:count])
    for low in (0, 1, 0x1234, 0x8000, 0xFFFF):
        x = torch.full((2**16,), 0x3F800000 + low, dtype=torch.int32).view(torch.float32)
        assert (rounded_at_random(x, KEY, 0) > x).sum().item() == low


def test_infinite_and_nan_are_kept():
    quiet = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # all of them NaN
    special = torch.cat([torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]), quiet])
    for counter in range(20):
        new = rounded_at_random(special, KEY, counter).to(BF16)
        assert new[:2].tolist() == [math.inf, -math.inf]
        assert new[2:3].isnan().all()
        assert new[5:].isnan().all()
        assert new[3:5].tolist() == [0.0, 0.0]
        assert new[3:5].signbit().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 5), (2, 3, 7)])
def test_shapes_and_layouts(shape):
    x = torch.randn(shape)
    new = rounded_at_random(x, KEY, 1)
    assert new.shape == x.shape
    if x.ndim > 1:
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(rounded_at_random(turned, KEY, 1), new)


def test_derivative_is_that_of_the_unrounded():
    x = torch.tensor([1.001, math.inf, -2.5], requires_grad=True)
    new = rounded_at_random(x, KEY, 0)
    assert torch.equal(new, rounded_at_random(x.detach(), KEY, 0))
    (slope,) = torch.autograd.grad(new.sum(), x)
    assert slope.tolist() == [1, 1, 1]
    x = torch.tensor([1.001, -2.5])
    assert torch.func.grad(lambda x: (3 * rounded_at_random(x, KEY, 0)).sum())(x).tolist() == [3, 3]


# --- the rule ------------------------------------------------------------------------------------------------------------


def quadratic(rule, steps=400, dtype=BF16):
    """Descent on ``(x - 1)**2 / 2`` from 2 down, with steps below half of bfloat16's spacing: the mean of x - 1."""
    model = {"x": torch.full((256,), 2.0, dtype=dtype)}
    state = opt.setup(rule, model, state_dtype="float32")
    for _ in range(steps):
        state, model = opt.update_(state, model, {"x": model["x"].float() - 1})
    return (model["x"].float() - 1).mean().item()


def test_small_updates_do_not_vanish():
    exact = (1 - 0.003) ** 400
    assert quadratic(opt.Descent(0.003)) == 1.0  # every step is rounded away
    assert quadratic(opt.StochasticRounding(opt.Descent(0.003))) == pytest.approx(exact, abs=0.01)
    assert quadratic(opt.MixedPrecision(opt.Descent(0.003))) == pytest.approx(exact, abs=0.01)
    exact = quadratic(opt.Adam(0.003), dtype=torch.float32)
    assert quadratic(opt.Adam(0.003)) == 1.0
    assert quadratic(opt.StochasticRounding(opt.Adam(0.003))) == pytest.approx(exact, abs=0.02)


def test_each_step_is_the_rounding_of_the_step_inside():
    rule = opt.StochasticRounding(opt.AdamW(0.01, lambda_=0.1))
    model, grads = {"w": bfloat16(40)}, {"w": bfloat16(40, seed=1)}
    _, new = opt.update(opt.setup(rule, model), model, grads)
    wide = {"w": model["w"].float()}
    _, exact = opt.update(opt.setup(rule.rule, wide, state_dtype="bfloat16"), wide, grads)
    gap = 2.0 ** (exact["w"].abs().log2().floor() - 7)
    assert ((new["w"].float() - exact["w"]).abs() < gap).all()
    assert not torch.equal(new["w"], exact["w"].to(BF16))


def test_the_seed_and_the_path_make_the_stream():
    def end(seed, name):
        model = {name: torch.full((64,), 1.0, dtype=BF16)}
        _, model = run(opt.StochasticRounding(opt.Descent(0.001), seed), model, [{name: torch.ones(64)}] * 3)
        return model[name]

    ends = {(seed, name): end(seed, name) for seed, name in itertools.product((0, 1), ("a", "b"))}
    for key, value in ends.items():
        assert torch.equal(end(*key), value)
        assert not any(torch.equal(value, other) for name, other in ends.items() if name != key)


def test_resuming_is_going_on():
    rule = opt.StochasticRounding(opt.AdamW(0.01))
    model = {"w": bfloat16(33), "v": bfloat16(2, 3, seed=1)}
    gradients = [{"w": bfloat16(33, seed=t), "v": bfloat16(2, 3, seed=t + 50)} for t in range(6)]
    state, end = run(rule, model, gradients)
    saved = pickle.dumps(run(rule, model, gradients[:3]))
    half_way, middle = pickle.loads(saved)
    resumed, again = run(rule, middle, gradients[3:], half_way)
    assert same(again, end)
    assert resumed == state
    leaves, treedef = optree.tree_flatten(pickle.loads(saved)[0])
    _, again = run(rule, middle, gradients[3:], optree.tree_unflatten(treedef, leaves))
    assert same(again, end)


def test_in_place_and_pure_agree():
    rule = opt.StochasticRounding(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Momentum(0.01)))
    model = {"w": bfloat16(3, 7), "b": torch.ones(4)}
    gradients = [{"w": bfloat16(3, 7, seed=t), "b": torch.ones(4)} for t in range(4)]
    state, pure = run(rule, model, gradients)
    other, written = run(rule, copy.deepcopy(model), gradients, update=opt.update_)
    assert same(pure, written)
    assert state == other


def test_wider_arrays_are_stepped_as_without_it():
    for dtype in (torch.float32, torch.float64, torch.complex64):
        model, grads = {"w": torch.ones(3, dtype=dtype)}, {"w": torch.full((3,), 0.1, dtype=dtype)}
        state, new = run(opt.StochasticRounding(opt.Adam()), model, [grads] * 2)
        _, plain = run(opt.Adam(), model, [grads] * 2)
        assert torch.equal(new["w"], plain["w"])
        assert state["w"].state[:2] == (None, None)
    model, grads = np.ones(3), np.ones(3)
    assert (run(opt.StochasticRounding(opt.Adam()), model, [grads])[1] == run(opt.Adam(), model, [grads])[1]).all()


def test_with_absent_gradients_accumulation_and_schedules():
    rule = opt.Scheduled(opt.StochasticRounding(opt.OptimiserChain(opt.AccumGrad(2), opt.Descent(0.1))), eta=lambda t: 0.01)
    model = {"w": bfloat16(8), "v": bfloat16(8)}
    grads = {"w": bfloat16(8, seed=3), "v": None}
    state, new = run(rule, model, [grads])
    assert same(new, model)
    assert state["w"].state[1][0] == 0, "only steps taken count"
    state, new = run(rule, model, [grads, grads])
    assert state["w"].state[1][0] == 1
    assert not torch.equal(new["w"], model["w"])
    assert new["v"] is model["v"]


def test_inside_and_around_averaged():
    model = {"w": torch.full((512,), 1.0, dtype=BF16)}
    gradients = [{"w": torch.ones(512)}] * 50
    state, end = run(opt.Averaged(opt.StochasticRounding(opt.Descent(0.001)), 0.0), model, gradients)
    assert torch.equal(opt.averaged(state, end)["w"], end["w"])
    state, end = run(opt.StochasticRounding(opt.Averaged(opt.Descent(0.001), 0.9)), model, gradients)
    assert opt.averaged(state, end)["w"].dtype == BF16
    assert end["w"].float().mean().item() == pytest.approx(0.95, abs=0.002)


def test_with_a_bfloat16_master_copy():
    model = {"w": torch.full((512,), 1.0)}
    rule = opt.MixedPrecision(opt.StochasticRounding(opt.Descent(0.001)), "bfloat16")
    state, end = run(rule, model, [{"w": torch.ones(512)}] * 50)
    assert state["w"].state[0].dtype == BF16
    assert torch.equal(end["w"], state["w"].state[0].float())
    assert end["w"].mean().item() == pytest.approx(0.95, abs=0.002)


def test_in_a_route_and_around_one():
    model = {"w": bfloat16(4), "v": torch.ones(4)}
    inner = opt.Route(("w", opt.Adam()), otherwise=opt.Descent())
    state = opt.setup(opt.StochasticRounding(inner, seed=3), model)
    assert state["w"].rule == opt.StochasticRounding(opt.Adam(), seed=3)
    assert state["v"].rule == opt.StochasticRounding(opt.Descent(), seed=3)


def test_under_vmap():
    rule = opt.StochasticRounding(opt.Momentum(0.01))
    models, grads = {"w": bfloat16(3, 9)}, {"w": bfloat16(3, 9, seed=1)}
    states = torch.func.vmap(lambda m: opt.setup(rule, m))(models)
    ends = models
    for _ in range(3):
        states, ends = torch.func.vmap(opt.update)(states, ends, grads)
    for i in range(3):
        _, end = run(rule, {"w": models["w"][i]}, [{"w": grads["w"][i]}] * 3)
        assert torch.equal(ends["w"][i], end["w"])


def test_adjusting():
    state = opt.setup(opt.StochasticRounding(opt.Adam()), {"w": bfloat16(3)})
    adjusted = opt.adjust(state, 0.5)
    assert adjusted["w"].rule == opt.StochasticRounding(opt.Adam(0.5))
    assert repr(adjusted["w"].rule) == "StochasticRounding(rule=Adam(eta=0.5, beta=(0.9, 0.999), epsilon=1e-08), seed=0)"
    with pytest.raises(HyperParameterError, match="field 'seed' of StochasticRounding is fixed at setup"):
        opt.adjust(state, seed=1)


def test_bad_input():
    with pytest.raises(RuleError, match=re.escape("StochasticRounding(rule, seed): rule must be a rule; got")):
        opt.StochasticRounding("adam")
    for inner in (opt.MixedPrecision(opt.Adam()), opt.Averaged(opt.MixedPrecision(opt.Adam()))):
        with pytest.raises(RuleError, match="neither that nor another StochasticRounding may be inside"):
            opt.StochasticRounding(inner)
    with pytest.raises(RuleError, match="must be the last member"):
        opt.OptimiserChain(opt.Scheduled(opt.StochasticRounding(opt.Adam()), eta=lambda t: 0.1), opt.WeightDecay())
    for x in (torch.ones(2, dtype=torch.float16), np.ones(2, np.float16)):
        with pytest.raises(RuleError, match=r"'layer\.w'.*this array is float16; use MixedPrecision"):
            opt.setup(opt.StochasticRounding(opt.Adam()), {"layer": {"w": x}})
    with pytest.raises(HyperParameterError, match="seed"):
        opt.StochasticRounding(opt.Adam(), -1)
