"""Wrappers around rules: what each does, against slow references, around ten rules each."""

import re

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from looped import held
from optimisers.arrays import decoded, encoded, is_number
from optimisers.errors import ArgumentError, HyperParameterError, NonFiniteError, RuleError
from optimisers.rules._states import state_leaves
from optimisers.rules.wrappers import quantised
from running import run

TEN = (
    opt.Descent(0.1),
    opt.Momentum(0.1),
    opt.Nesterov(0.1),
    opt.RMSProp(0.1),
    opt.AdamW(0.1, lambda_=0.1),
    opt.RAdam(0.1, (0.0, 0.9)),
    opt.Lion(0.1),
    opt.OptimiserChain(opt.ClipNorm(0.5), opt.Adam(0.1), opt.WeightDecay(0.01)),
    opt.Muon(opt.AdamW(0.01), 0.1),
    opt.Apollo(0.1, 2),
)
"""Rules that wrappers are tried around."""

around_ten = pytest.mark.parametrize("rule", TEN, ids=lambda rule: type(rule).__name__)
both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def drawn(count=7, shape=(4, 6), seed=0):
    """A start and gradients."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal((count, *shape))


class Stepper:
    """A rule outside of any tree: its steps, one after another."""

    def __init__(self, rule, x):
        self.rule = rule.resolved(x, "")
        self.state = self.rule.init(x)

    def __call__(self, x, g):
        self.state, step = self.rule.apply(self.state, x, g)
        return step


def eta_of(rule):
    """The learning rate of one of the ten."""
    if isinstance(rule, opt.OptimiserChain):
        return rule.rules[1].eta
    return rule.opt.eta if isinstance(rule, opt.Apollo) else rule.eta


def rectified(beta, t):
    """The rectification of RAdam, 0 while the variance is not tractable."""
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * t * beta**t / (1 - beta**t)
    if length <= 4:
        return 0.0
    return (((length - 4) * (length - 2) * longest) / ((longest - 4) * (longest - 2) * length)) ** 0.5


# --- ScheduleFree ---------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("options", [{}, {"beta": 0.6, "warmup": 3, "r": 1.5, "power": 0.5}], ids=["defaults", "others"])
@around_ten
def test_schedule_free_is_three_sequences(rule, options, kind):
    x0, grads = drawn()
    beta, warmup = options.get("beta", 0.9), options.get("warmup", 0)
    r, power = options.get("r", 0.0), options.get("power", 2.0)
    step, x, y, z, total, top = Stepper(rule, x0), x0, x0, x0, 0.0, 0.0
    model = made(x0, kind)
    state = opt.setup(opt.ScheduleFree(rule, **options), model)
    for t, g in enumerate(grads, 1):
        rise = min(1.0, t / warmup) if warmup else 1.0
        rate = rise * (rectified(rule.beta[1], t) if isinstance(rule, opt.RAdam) else 1.0)
        top = max(top, rate * eta_of(rule))
        z = z - (rise if rate else 0.0) * step(y, g)
        weight = t**r * top**power
        total += weight
        if total:
            x = x + weight / total * (z - x)
        y = beta * x + (1 - beta) * z
        state, model = opt.update(state, model, made(g, kind))
        np.testing.assert_allclose(numpy_of(model), y, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(numpy_of(opt.averaged(state, model)), x, rtol=1e-9, atol=1e-11)


def test_the_weight_of_a_schedule_free_step_follows_schedules():
    x0, grads = drawn(4)
    rates = [0.1, 0.4, 0.2, 0.3]
    steps = rates.__getitem__
    for rule in (
        opt.Scheduled(opt.ScheduleFree(opt.Descent()), eta=steps),
        opt.ScheduleFree(opt.Scheduled(opt.Descent(), eta=steps)),
        opt.ScheduleFree(opt.OptimiserChain(opt.Descent(0.5), opt.Scheduled(opt.Descent(), eta=lambda t: 2 * rates[t]))),
    ):
        x = z = y = x0
        total = 0.0
        state, model = opt.setup(rule, x0), x0
        for t, g in enumerate(grads):
            z = z - rates[t] * g
            weight = max(rates[: t + 1]) ** 2
            total += weight
            x = x + weight / total * (z - x)
            y = 0.9 * x + 0.1 * z
            state, model = opt.update(state, model, g)
            np.testing.assert_allclose(model, y, rtol=1e-12)


def test_the_average_of_a_master_copy_is_taken_from_it():
    x0, grads = drawn(5)
    x = torch.tensor(x0).to(torch.bfloat16)
    state, exact = opt.setup(opt.MixedPrecision(opt.ScheduleFree(opt.AdamW(0.01))), x), x.float()
    other, model = opt.setup(opt.ScheduleFree(opt.AdamW(0.01)), exact), exact
    for g in torch.tensor(grads).to(torch.bfloat16):
        state, x = opt.update(state, x, g)
        other, model = opt.update(other, model, g.float())
    assert torch.equal(opt.averaged(state, x), opt.averaged(other, model).to(torch.bfloat16))


def test_the_average_is_there_from_the_start_and_has_the_class_of_the_model():
    net = torch.nn.Linear(3, 2)
    state = opt.setup(opt.ScheduleFree(opt.AdamW()), net)
    mean = opt.averaged(state, net)
    assert torch.equal(mean["weight"], net.weight)
    assert not mean["weight"].grad_fn
    net.weight.grad = torch.ones(2, 3)
    state, net = opt.update_(state, net)
    assert not torch.equal(opt.averaged(state, net)["weight"], mean["weight"])
    assert torch.equal(opt.averaged(state, net)["bias"], net.bias)  # it had no gradient


def test_averaged_asks_for_a_rule_that_averages():
    model = {"w": np.ones(3)}
    state = opt.setup(opt.Lookahead(opt.Adam()), model)
    with pytest.raises(ArgumentError, match=re.escape("set up with Averaged(rule, decay) or ScheduleFree(rule)")):
        opt.averaged(state, model)


def test_beta_of_a_schedule_free_rule_is_fixed_and_that_of_the_rule_inside_is_not():
    state = opt.setup(opt.ScheduleFree(opt.AdamW()), np.ones(3))
    with pytest.raises(HyperParameterError, match="field 'beta' of ScheduleFree is fixed at setup"):
        opt.adjust(state, beta=(0.5, 0.9))
    new = opt.adjust(state, beta=(0.5, 0.9), rule=opt.AdamW)
    assert new[()].rule == opt.ScheduleFree(opt.AdamW(beta=(0.5, 0.9)))


# --- Lookahead ------------------------------------------------------------------------------------------------------------


@both_kinds
@around_ten
def test_lookahead_sets_back_every_kth_step(rule, kind):
    x0, grads = drawn()
    step, slow, x, expected = Stepper(rule, x0), x0, x0, []
    for t, g in enumerate(grads, 1):
        x = x - step(x, g)
        if t % 3 == 0:
            x = slow = slow + 0.8 * (x - slow)
        expected.append(x)
    np.testing.assert_allclose(run(opt.Lookahead(rule, 3, 0.8), x0, grads, kind), expected, rtol=1e-9, atol=1e-11)


def test_lookahead_must_be_last():
    with pytest.raises(RuleError, match=r"member 0, Lookahead, is or holds Lookahead, .* must be the last member"):
        opt.OptimiserChain(opt.Lookahead(opt.Adam()), opt.WeightDecay())


# --- Cautious -------------------------------------------------------------------------------------------------------------


@both_kinds
@around_ten
def test_cautious_leaves_out_what_goes_against_the_gradient(rule, kind):
    x0, grads = drawn(seed=1)
    decay = {opt.AdamW: 0.1 * 0.1, opt.OptimiserChain: 0.01, opt.Muon: 0.1 * 0.01}.get(type(rule), 0.0)
    step, x, expected = Stepper(rule, x0), x0, []
    for g in grads:
        bare = step(x, g) - decay * x
        mask = bare * g > 0
        x = x - bare * mask / max(mask.mean(), 1e-3) - decay * x
        expected.append(x)
    np.testing.assert_allclose(run(opt.Cautious(rule), x0, grads, kind), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [opt.AdamW, opt.AdEMAMix, opt.LaProp, opt.Mars], ids=lambda make: make.__name__)
def test_the_decay_of_a_rule_is_told_apart_from_its_step(make):
    x0, grads = drawn()
    without, rule = Stepper(make(eta=0.1), x0), make(eta=0.1, lambda_=0.3)
    step = Stepper(rule, x0)
    for g in grads:
        np.testing.assert_allclose(step(x0, g) - rule.decay_factor(step.state) * x0, without(x0, g), rtol=1e-10, atol=1e-13)


@both_kinds
def test_cautious_decay_does_not_go_against_the_step(kind):
    x0, grads = drawn(seed=2)
    step, x, expected = Stepper(opt.Momentum(0.1), x0), x0, []
    for g in grads:
        bare = step(x, g)
        x = x - bare - 0.3 * np.where(bare * x >= 0, x, 0)
        expected.append(x)
    rule = opt.Cautious(opt.OptimiserChain(opt.Momentum(0.1), opt.WeightDecay(0.3)), mask="decay")
    np.testing.assert_allclose(run(rule, x0, grads, kind), expected, rtol=1e-12, atol=1e-13)


def test_a_step_that_is_left_out_everywhere_is_none():
    rule = opt.Cautious(opt.Momentum(0.1, 0.9))
    x = np.zeros(3)
    state = opt.setup(rule, x)
    state, x = opt.update(state, x, np.ones(3))
    _, after = opt.update(state, x, np.full(3, -0.1))
    np.testing.assert_array_equal(after, x)


# --- Compensated ----------------------------------------------------------------------------------------------------------


def test_compensated_steps_add_up_in_bfloat16():
    x = torch.ones(64, dtype=torch.bfloat16)
    rule = opt.Descent(1e-3)
    ends = {}
    for wrapped in (rule, opt.Compensated(rule)):
        state, model = opt.setup(wrapped, x), x
        for _ in range(100):
            state, model = opt.update(state, model, torch.ones(64, dtype=torch.bfloat16))
        ends[wrapped] = model
    assert (ends[rule] == 1).all()  # each step is less than half of the distance to the next number
    assert (abs(ends[opt.Compensated(rule)].float() - 0.9) < 2**-8).all()


@both_kinds
@around_ten
def test_compensated_steps_are_the_rules_own_where_nothing_is_lost(rule, kind):
    x0, grads = drawn()
    expected = run(rule, x0, grads, kind)
    np.testing.assert_allclose(run(opt.Compensated(rule), x0, grads, kind), expected, rtol=1e-10, atol=1e-12)


# --- Projected ------------------------------------------------------------------------------------------------------------

SETS = {
    "non_negative": lambda x: np.maximum(x, 0),
    "ball": lambda x: x * min(1.0, 1 / np.linalg.norm(x)),
    "unit_rows": lambda x: x / np.linalg.norm(x, axis=1, keepdims=True),
}


@both_kinds
@pytest.mark.parametrize("onto", SETS)
@around_ten
def test_projected_steps_end_in_the_set(rule, onto, kind):
    x0, grads = drawn(4)
    step, x, expected = Stepper(rule, x0), x0, []
    for g in grads:
        x = SETS[onto](x - step(x, g))
        expected.append(x)
    np.testing.assert_allclose(run(opt.Projected(rule, onto), x0, grads, kind), expected, rtol=1e-9, atol=1e-11)
    given = opt.Projected(rule, lambda x: made(SETS[onto](numpy_of(x)), kind))
    np.testing.assert_allclose(run(given, x0, grads, kind), expected, rtol=1e-9, atol=1e-11)


# --- Quantised ------------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("code", ["power", "linear"])
@around_ten
def test_moments_in_codes_are_the_moments_to_two_percent_of_their_size(rule, code, kind):
    if isinstance(rule, opt.Apollo):
        return
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 16, 32)) * np.exp(rng.standard_normal((2, 16, 32)))
    state, _ = opt.update(opt.setup(opt.Quantised(rule, code=code), made(x, kind)), made(x, kind), made(g, kind))
    alone, _ = opt.update(opt.setup(rule, made(x, kind)), made(x, kind), made(g, kind))
    (inner,) = state[()].state
    decoded = opt.Quantised(rule, code=code)._decoded(inner)
    for ours, theirs in zip(state_leaves(decoded), state_leaves(alone[()].state), strict=True):
        if is_number(theirs) or not theirs.ndim:
            assert ours == theirs
            continue
        found, exact = numpy_of(ours).reshape(2, 256), numpy_of(theirs).reshape(2, 256)
        top = abs(exact).max(axis=1, keepdims=True)
        levels = 255 if (exact >= 0).all() else 127
        power = 1 if code == "linear" else 4 if levels == 255 else 2
        near = (abs(exact) / top) ** (1 / power)
        assert (abs((abs(found) / top) ** (1 / power) - near) <= 1 / levels).all()
        assert (np.sign(found) * np.sign(exact) >= 0).all()
        if levels == 255:
            assert ((found > 0) == (exact > 0)).all()


@both_kinds
@pytest.mark.parametrize("linear", [False, True])
def test_codes_of_a_block_do_not_depend_on_the_blocks_beside_it(linear, kind):
    """Where all blocks have a sign, or none has, only that way is computed."""
    rng = np.random.default_rng(3)
    signed = rng.standard_normal(64)
    parts = [made(part, kind) for part in (signed, signed**2, np.concatenate([signed, signed**2]))]
    found = [encoded(part, 16, linear=linear) for part in parts]
    found = [(*each, decoded(*each, 16, linear=linear)) for each in found]
    for apart, together in zip(zip(*found[:2], strict=True), found[2], strict=True):
        assert b"".join(numpy_of(part).tobytes() for part in apart) == numpy_of(together).tobytes()


@both_kinds
def test_states_in_eight_bits_take_a_quarter_of_the_memory(kind):
    x = made({"w": np.zeros((512, 768), np.float32)}, kind)
    alone, narrow = (state_leaves(opt.setup(rule, x)["w"].state) for rule in (opt.AdamW(), opt.Quantised(opt.AdamW())))
    sizes = [sum(leaf.nbytes for leaf in leaves if not is_number(leaf)) for leaves in (alone, narrow)]
    assert sizes[1] <= 0.27 * sizes[0]


@both_kinds
def test_large_arrays_are_stepped_by_pieces_as_they_would_be_whole(kind, monkeypatch):
    rng = np.random.default_rng(1)
    x, *grads = rng.standard_normal((4, 30, 37))
    rule = opt.Quantised(opt.OptimiserChain(opt.ClipGrad(0.5), opt.AdamW(0.1)), block=16)
    whole = run(rule, x, grads, kind)
    monkeypatch.setattr(quantised, "PIECE", 100)
    np.testing.assert_array_equal(run(rule, x, grads, kind), whole)
    waiting = opt.OptimiserChain(opt.Quantised(opt.OptimiserChain(opt.AccumGrad(3), opt.Descent(0.1)), block=16))
    expected = np.stack([x, x, x - 0.1 * np.mean(grads, axis=0)])
    np.testing.assert_allclose(run(waiting, x, grads, kind), expected, atol=0.01)


@both_kinds
def test_quantised_adamw_finds_what_adamw_finds(kind):
    rng = np.random.default_rng(2)
    target, x = rng.standard_normal((2, 20, 30))
    scale = np.geomspace(0.01, 10, 30)
    ends = []
    for rule in (opt.AdamW(0.02), opt.Quantised(opt.AdamW(0.02), block=64)):
        state, w = opt.setup(rule, made(x, kind)), made(x, kind)
        goal, weights = made(target, kind), made(scale, kind)
        for _ in range(200):
            state, w = opt.update(state, w, (w - goal) * weights)
        ends.append(abs(numpy_of(w) - target).max())
    assert ends[1] < max(2 * ends[0], 0.02)


def test_a_block_that_is_not_finite_is_nan_and_the_others_are_not():
    x = np.zeros(8, np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        g = np.ones(8, np.float32)
        g[1] = bad
        state, _ = opt.update(opt.setup(opt.Quantised(opt.Momentum(), block=4), x), x, g)
        _, after = opt.update(state, x, np.zeros(8, np.float32))
        assert np.isnan(after[:4]).all()
        assert np.isfinite(after[4:]).all()


def test_only_states_like_the_parameter_are_quantised():
    x = np.zeros((4, 6))
    text = "the state of Apollo holds an array of shape (2, 6) for a parameter of shape (4, 6)"
    with pytest.raises(RuleError, match=re.escape(text)):
        opt.setup(opt.Quantised(opt.Apollo(0.1, 2)), x)


# --- LowRank --------------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 2, 2, 2)])
@pytest.mark.parametrize("residual", [False, True])
def test_low_rank_steps_are_steps_in_a_projection(shape, residual, kind):
    """Between refreshes signs of singular vectors do not matter, so a slow reference may have others."""
    x0, grads = drawn(4, shape)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    u, _, vt = np.linalg.svd(grads[0].reshape(rows, columns), full_matrices=False)
    tall = columns <= rows
    p = vt[:2] if tall else u[:, :2].T
    inner = Stepper(opt.AdamW(0.1, (0.8, 0.9)), np.zeros((2, max(rows, columns))))
    x, expected = x0, []
    for g in grads:
        matrix = g.reshape(rows, columns)
        matrix = matrix.T if tall else matrix
        low = p @ matrix
        bare = inner(0 * low, low)
        step = p.T @ bare
        if residual:
            step = step + np.linalg.norm(bare, axis=0) / np.linalg.norm(low, axis=0) * (matrix - p.T @ low)
        x = x - 0.25 * (step.T if tall else step).reshape(shape) - 0.1 * 0.3 * x
        expected.append(x)
    rule = opt.LowRank(opt.AdamW(0.1, (0.8, 0.9), 0.3), 2, scale=0.25, residual=residual)
    np.testing.assert_allclose(run(rule, x0, grads, kind), expected, rtol=1e-9, atol=1e-11)


@both_kinds
@around_ten
def test_a_projection_of_full_rank_of_a_linear_rule_changes_nothing(rule, kind):
    x0, grads = drawn()
    wrapped = run(opt.LowRank(rule, 4, refresh=3), x0, grads, kind)
    assert np.isfinite(wrapped).all()
    if isinstance(rule, (opt.Descent, opt.Momentum, opt.Nesterov)):
        once = run(opt.LowRank(rule, 4), x0, grads, kind)
        np.testing.assert_allclose(once, run(rule, x0, grads, kind), rtol=1e-9, atol=1e-11)


def test_a_quarter_of_the_rank_takes_two_fifths_of_the_memory():
    x = np.zeros((64, 64), np.float32)
    sizes = [
        sum(leaf.nbytes for leaf in state_leaves(opt.setup(rule, x)[()].state) if not is_number(leaf))
        for rule in (opt.AdamW(), opt.LowRank(opt.AdamW(), 16), opt.LowRank(opt.Quantised(opt.AdamW()), 16, kind="random"))
    ]
    assert sizes[1] <= 0.4 * sizes[0]
    assert sizes[2] <= 0.07 * sizes[0]


@both_kinds
def test_low_rank_refuses_vectors_and_gradients_that_are_not_finite(kind):
    for shape in ((7,), ()):
        with pytest.raises(RuleError, match=r"'w': LowRank projects matrices, and this array has the shape .*Route"):
            opt.setup(opt.LowRank(opt.Adam(), 2), {"w": made(np.zeros(shape), kind)})
    model = made({"w": np.ones((3, 4))}, kind)
    state = opt.setup(opt.LowRank(opt.Adam(), 2), model)
    with pytest.raises(NonFiniteError, match="'w': the singular vectors of a matrix that is not finite cannot be taken"):
        opt.update(state, model, made({"w": np.full((3, 4), np.nan)}, kind))


# --- all ------------------------------------------------------------------------------------------------------------------

WRAPPERS = {
    "ScheduleFree": opt.ScheduleFree,
    "Lookahead": opt.Lookahead,
    "Cautious": opt.Cautious,
    "Cautious decay": lambda rule: opt.Cautious(rule, "decay"),
    "Compensated": opt.Compensated,
    "Projected": lambda rule: opt.Projected(rule, "non_negative"),
    "Projected ball": lambda rule: opt.Projected(rule, "ball"),
}


@both_kinds
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_of_rules_with_loops_have_loops(wrap, kind):
    x = made({"w": np.zeros((64, 96), np.float32)}, kind)
    for rule in (opt.AdamW(lambda_=0.1), opt.OptimiserChain(opt.ClipNorm(), opt.Lion()), opt.Muon()):
        if kind == "torch" or not isinstance(rule, opt.Muon):
            state = opt.setup(wrap(rule), x)
            for _ in range(2):
                state, x = opt.update(state, x, made({"w": np.ones((64, 96), np.float32)}, kind))
            assert held(state) == 1, rule


@both_kinds
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@around_ten
def test_the_learning_rate_reaches_the_rule_inside(rule, wrap, kind):
    state = opt.setup(wrap(rule), made(np.ones((3, 4)), kind))
    assert opt.adjust(state, 0.5)[()].rule == wrap(opt.adjust(rule, 0.5))
    assert opt.adjust(state, times=0.5)[()].rule == wrap(opt.adjust(rule, times=0.5))
    assert opt.freeze(state)[()].frozen
