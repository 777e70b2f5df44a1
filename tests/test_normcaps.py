"""NormGrowthCap, GradNormControl and AdaptiveGradNormControl against references that keep their own books, in any chain."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of

both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])
CAPS = (opt.NormGrowthCap, opt.GradNormControl, opt.AdaptiveGradNormControl)
caps = pytest.mark.parametrize("cap", CAPS)


class Growth:
    """The growth limiter, one norm at a time."""

    def __init__(self, tau, epsilon, lb, count, scale):
        self.tau, self.epsilon, self.floor = tau, epsilon, lb * math.sqrt(count) if scale else lb
        self.last, self.before, self.after = None, 0.0, 0.0

    def __call__(self, g):
        norm = math.sqrt(sum(float(v) ** 2 for v in g.ravel()))
        factor = 1.0
        if self.last and norm >= self.floor and norm / (self.last + self.epsilon) > self.tau:
            factor = self.tau * self.last / (norm + self.epsilon)
        self.last = norm * factor
        self.before += norm
        self.after += norm * factor
        return factor * g


class Adaptive:
    """The limiter by running mean and deviation."""

    def __init__(self, tau, epsilon, lb, momentum, count):
        self.tau, self.epsilon, self.floor, self.momentum = tau, epsilon, lb * math.sqrt(count), momentum
        self.mean = self.deviation = self.before = self.after = 0.0

    def __call__(self, g):
        norm = math.sqrt(sum(float(v) ** 2 for v in g.ravel()))
        factor = 1.0
        if norm >= self.floor and self.mean == 0:
            self.mean = self.deviation = norm
        else:
            limit = self.mean + self.tau * self.deviation
            if norm >= self.floor and norm > limit:
                factor = limit / (norm + self.epsilon)
            through = factor * norm
            mean = self.momentum * self.mean + (1 - self.momentum) * through
            square = self.momentum * (self.deviation**2 + self.mean**2) + (1 - self.momentum) * through**2
            self.mean, self.deviation = mean, math.sqrt(max(square - mean**2, 1e-8))
        self.before += norm
        self.after += norm * factor
        return factor * g


def reference(rule, count):
    if isinstance(rule, opt.AdaptiveGradNormControl):
        return Adaptive(rule.tau, rule.epsilon, rule.lb, rule.momentum, count)
    return Growth(rule.tau, rule.epsilon, rule.lb, count, rule.scale)


def gradients(pattern, shape, seed=0):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=shape)
    return [size * (common + 0.3 * rng.normal(size=shape)) for size in pattern]


PATTERNS = {
    "steady": [1.0] * 12,
    "spike": [1.0] * 5 + [1e3] + [1.0] * 6,
    "growing": list(2.0 ** np.arange(12)),
    "from zero": [0.0, 0.0, 1.0, 3.0, 0.0, 0.0, 5.0, 5.0],
    "tiny": [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e-9, 1.0, 1.0],
}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())

RULES = [
    opt.NormGrowthCap(),
    opt.NormGrowthCap(1.5, 0.1, 1e-2),
    opt.NormGrowthCap(1.2, lb=0.3, scale=False),
    opt.NormGrowthCap(0.9, lb=0.0),
    opt.GradNormControl(),
    opt.GradNormControl(2.0, lb=0.0),
    opt.GradNormControl(lb=0.5, scale=False, throw=False),
    opt.AdaptiveGradNormControl(),
    opt.AdaptiveGradNormControl(0.1, 1e-3, 0.0, 0.5),
    opt.AdaptiveGradNormControl(3.0, lb=0.5, momentum=0.0, throw=False),
]
rules = pytest.mark.parametrize("rule", RULES, ids=repr)


def books(state):
    """What a reference keeps, from the state of the rule."""
    if not isinstance(state, tuple):
        return [float(state)]
    *rest, (before, after) = state
    return [float(v) for v in (*rest, before, after)]


def kept(ref):
    if isinstance(ref, Adaptive):
        return [ref.mean, ref.deviation, ref.before, ref.after]
    return [ref.last, ref.before, ref.after]


@both_kinds
@rules
@patterns
@pytest.mark.parametrize("shape", [(7,), (4, 3, 2)], ids=str)
def test_alone(kind, rule, pattern, shape):
    x = np.zeros(shape)
    ref = reference(rule, x.size)
    state, x = opt.setup(rule, made(x, kind)), made(x, kind)
    for g in gradients(pattern, shape):
        before = numpy_of(x).copy()
        state, x = opt.update(state, x, made(g, kind))
        expected = ref(g)
        scale = np.abs(before).max() + np.abs(expected).max()
        np.testing.assert_allclose(before - numpy_of(x), expected, rtol=0, atol=1e-13 * scale)
        mine = books(state[()].state)
        np.testing.assert_allclose(mine, kept(ref)[: len(mine)], rtol=1e-12)


CHAINS = {
    "before Momentum": lambda cap: ((cap,), opt.Momentum(0.1, 0.8)),
    "after Momentum": lambda cap: (opt.Momentum(0.1, 0.8), (cap,)),
    "between": lambda cap: (opt.WeightDecay(0.1), (cap,), opt.Adam(0.05)),
    "after Adam": lambda cap: (opt.Adam(0.05), (cap,)),
    "after Apollo's scaling": lambda cap: (opt.Apollo(opt.AdamW(1.0), 2), (cap,), opt.Descent(0.05)),
    "before Apollo": lambda cap: ((cap,), opt.Apollo(0.05, 2)),
    "before Muon": lambda cap: ((cap,), opt.Muon()),
    "behind another norm": lambda cap: (opt.ClipNorm(50.0), (cap,), opt.Descent(0.1)),
}


@both_kinds
@pytest.mark.parametrize("rule", [RULES[0], RULES[4], RULES[7]], ids=repr)
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_anywhere_in_a_chain(kind, rule, chain):
    members = chain(rule)
    whole = opt.OptimiserChain(*(member[0] if isinstance(member, tuple) else member for member in members))
    position = next(i for i, member in enumerate(members) if isinstance(member, tuple))
    x = np.random.default_rng(1).normal(size=(4, 5))
    ref = reference(rule, x.size)
    # by hand: each member for itself, the cap by its reference
    alone = [None if isinstance(member, tuple) else member.resolved(x, "") for member in members]
    states = [None if member is None else member.init(x) for member in alone]
    state, ours, theirs = opt.setup(whole, made(x, kind)), made(x, kind), x
    for g in gradients(PATTERNS["spike"], x.shape):
        state, ours = opt.update(state, ours, made(g, kind))
        step = g
        for i, member in enumerate(alone):
            if member is None:
                step = ref(step)
            else:
                states[i], step = member.apply(states[i], theirs, step)
        theirs = theirs - step
        np.testing.assert_allclose(numpy_of(ours), theirs, rtol=0, atol=1e-11)
        mine = books(state[()].state[position])
        np.testing.assert_allclose(mine, kept(ref)[: len(mine)], rtol=1e-10)


def test_after_apollo_s_scaling_the_growth_of_the_scaled_gradient_is_capped():
    # The paper's place for the limiter: Apollo with eta 1 hands on the scaled gradient; Descent multiplies by the rate.
    rule = opt.OptimiserChain(opt.Apollo(opt.AdamW(1.0), 2), opt.NormGrowthCap(), opt.Descent(0.1))
    x = np.zeros((4, 6))
    state = opt.setup(rule, x)
    sizes = []
    for g in gradients(PATTERNS["spike"], x.shape):
        before = x
        state, x = opt.update(state, x, g)
        sizes.append(np.linalg.norm(x - before) / 0.1)
        assert float(state[()].state[1]) == pytest.approx(sizes[-1], rel=1e-10)
    assert all(later <= 1.01 * earlier * (1 + 1e-9) for earlier, later in pairwise(sizes))


@both_kinds
@pytest.mark.parametrize("cap", CAPS)
def test_a_spike_of_a_thousand_is_survived(kind, cap):
    # A quadratic bowl, one gradient of it a thousand times too long. Behind Momentum the spike goes on for steps.
    def rise(rule):
        x = made(np.ones((4, 4)), kind)
        state, losses = opt.setup(rule, x), []
        for t in range(60):
            losses.append(float((numpy_of(x) ** 2).mean()))
            state, x = opt.update(state, x, x * (1e3 if t == 30 else 1.0))
        return max(losses[31:]) / losses[30]

    momentum = opt.Momentum(0.02, 0.9)
    assert rise(momentum) > 100
    # lb=0 keeps the controls awake, whose default is made for gradients of norm above 0.1 an element.
    extra = {} if cap is opt.NormGrowthCap else {"lb": 0.0}
    assert rise(opt.OptimiserChain(cap(**extra), momentum)) < 1.5


@both_kinds
@caps
@pytest.mark.parametrize("verb", [opt.update, opt.update_], ids=["update", "update_"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_throw_names_the_parameter_and_changes_nothing(kind, cap, verb, bad):
    model = made({"a": np.ones(3), "layer": {"w": np.ones((2, 2))}}, kind)
    grads = made({"a": np.ones(3), "layer": {"w": np.array([[1.0, bad], [1.0, 1.0]])}}, kind)
    state = opt.setup(opt.OptimiserChain(cap(), opt.Adam()), model)
    with pytest.raises(opt.NonFiniteError, match=rf"{cap.__name__} at 'layer\.w': the 2-norm of its gradient is ") as raised:
        verb(state, model, grads)
    assert "'a'" not in str(raised.value)
    assert all((numpy_of(x) == 1).all() for x in (model["a"], model["layer"]["w"]))
    good = made({"a": np.ones(3), "layer": {"w": np.ones((2, 2))}}, kind)
    verb(state, model, good)


@both_kinds
@caps
def test_without_throw_what_is_not_finite_goes_through(kind, cap):
    x = made(np.ones(3), kind)
    _, x = opt.update(opt.setup(cap(throw=False), x), x, made(np.array([1.0, math.nan, 1.0]), kind))
    assert np.isnan(numpy_of(x)).any()


@both_kinds
@caps
def test_complex_arrays_are_refused(kind, cap):
    with pytest.raises(opt.RuleError, match="complex128"):
        opt.setup(cap(), {"w": made(np.ones(3, "complex128"), kind)})


@caps
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_norms_are_float64_whatever_the_array(cap, dtype):
    # 300**2 * 1000 is far above the greatest float16.
    x = torch.zeros(1000, dtype=getattr(torch, dtype))
    state, x = opt.update(opt.setup(cap(), x), x, torch.full((1000,), 300.0).to(x.dtype))
    first, *_ = state[()].state if isinstance(state[()].state, tuple) else (state[()].state,)
    assert first.dtype == torch.float64
    assert float(first) == pytest.approx(300 * math.sqrt(1000), rel=1e-6)
    assert x.dtype == getattr(torch, dtype)
    assert x.isfinite().all()


@caps
def test_each_array_has_its_own_norm(cap):
    model = {"a": np.zeros(3), "b": np.zeros(3)}
    state = opt.setup(cap(lb=0.0), model)
    rule = cap(lb=0.0)
    refs = {name: reference(rule, 3) for name in model}
    grads = {"a": gradients(PATTERNS["growing"], (3,)), "b": gradients(PATTERNS["steady"], (3,), 1)}
    for t in range(12):
        before = model
        state, model = opt.update(state, model, {name: grads[name][t] for name in model})
        for name in model:
            expected = refs[name](grads[name][t])
            np.testing.assert_allclose(before[name] - model[name], expected, rtol=0, atol=1e-12 * np.abs(model[name]).max())


def test_adjust():
    state = opt.setup(opt.OptimiserChain(opt.NormGrowthCap(), opt.Adam()), {"w": np.ones(3)})
    assert opt.adjust(state, tau=2.0)["w"].rule.rules[0] == opt.NormGrowthCap(2.0)
    with pytest.raises(opt.HyperParameterError, match="'tau' must be a finite number > 0"):
        opt.adjust(state, tau=0.0)
    with pytest.raises(opt.UnknownFieldError):
        opt.adjust(opt.setup(opt.NormGrowthCap(), {"w": np.ones(3)}), 0.1)
