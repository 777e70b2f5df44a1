"""Where the library differs from Optimisers.jl on purpose: one test an item of docs/differences.md, by number."""

import re
from pathlib import Path

import numpy as np
import pytest

import optimisers as opt
from golden_data import (
    EXCLUDED,
    HALF_EPSILON,
    adjusts_missing_field,
    array,
    column_major,
    decode,
    error,
    exact_squares,
    excluded,
    float16_arithmetic,
    gradient_lacks_key,
    lion_weights,
    made,
    numpy_of,
    rule_of,
    state_errors,
    tolerance_of,
)

both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def parametrised(predicate, *groups):
    found = excluded(predicate, *groups)
    return pytest.mark.parametrize("record", found, ids=[each["name"] for each in found])


def random(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def steps(rule, x, grads, kind="numpy"):
    """(state, parameter) after each gradient, as NumPy arrays."""
    x = made(x, kind)
    state = opt.setup(rule, x)
    for grad in grads:
        state, x = opt.update(state, x, made(grad, kind))
        yield state[()].state, numpy_of(x)


def test_every_item_is_documented_in_order():
    text = (Path(__file__).resolve().parent.parent / "docs" / "differences.md").read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)] == list(range(1, 15))
    assert set(EXCLUDED.values()) <= set(range(1, 15))


# --- 1 ------------------------------------------------------------------------------------------------------------------


@both_kinds
def test_1_lion_is_the_paper_s(kind):
    x, grads = random(4, 3), random(6, 4, 3, seed=1)
    m = np.zeros_like(x)
    for (state, ours), g in zip(steps(opt.Lion(eta=0.1), x, grads, kind), grads, strict=True):
        x = x - 0.1 * np.sign(0.9 * m + (1 - 0.9) * g)
        m = 0.99 * m + (1 - 0.99) * g
        np.testing.assert_allclose(ours, x, rtol=1e-14)
        np.testing.assert_allclose(numpy_of(state), m, rtol=1e-13)


def with_paper_weights(rule):
    """The rule in which every Lion, written for the weights m <- b2 g + (1 - b2) m, has those that do the same here.

    There the step is the sign of (b2 - b1) g + b1 m_new, whose weights are in the ratio of 1 - b to b.
    """
    if isinstance(rule, opt.OptimiserChain):
        return opt.OptimiserChain(*map(with_paper_weights, rule.rules))
    if not isinstance(rule, opt.Lion):
        return rule
    b1, b2 = rule.beta
    return rule.replace(beta=(b1 * (1 - b2) / b2, 1 - b2))


@both_kinds
@parametrised(
    lambda each: lion_weights(each) and "papery" not in each["name"] and each["dtype"] != "float16",
    "rules",
    "mixed_dtype",
    "nonfinite",
)
def test_1_upstream_s_lion_is_lion_with_other_weights(record, kind):
    x, dtype = array(record["x0"], record["dtype"]), record["dtype"]
    grads = [array(grad, record["grad_dtype"]) for grad in record["grads"]]
    ours = list(steps(with_paper_weights(rule_of(record)), x, grads, kind))
    tolerance = tolerance_of(record)
    for (_, mine), recorded in zip(ours, record["xs"], strict=True):
        assert error(mine, array(recorded, dtype)) <= tolerance.x
    assert max(state_errors(ours[-1][0], decode(record["final_state"]))) <= tolerance.state


# --- 2 ------------------------------------------------------------------------------------------------------------------


def plain_newton_schulz(matrix, steps=5):
    """The quintic iteration of Jordan et al. on the smaller side."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@both_kinds
@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (20, 4), (4, 4)], ids=str)
def test_2_muon_adds_nothing_to_the_gram_matrix(shape, kind):
    x, g = random(*shape), random(*shape, seed=1)
    ((_, ours),) = steps(opt.Muon(eta=0.1, lambda_=0.0), x, [g], kind)
    m = (1 - 0.95) * g
    step = plain_newton_schulz((1 - 0.95) * g + 0.95 * m) * np.sqrt(max(1, shape[0] / shape[1]))
    np.testing.assert_allclose(ours, x - 0.1 * step, rtol=0, atol=1e-12)


# --- 3 ------------------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("couple", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (5,)], ids=str)
def test_3_apollo_multiplies_weight_decay_by_eta_when_coupled(shape, couple, kind):
    x, g = random(*shape), random(*shape, seed=1)
    (_, plain), (_, decayed) = (
        next(steps(opt.Apollo(opt.AdamW(0.01, lambda_=decay, couple=couple)), x, [g], kind)) for decay in (0.0, 0.3)
    )
    np.testing.assert_allclose(plain - decayed, (0.01 if couple else 1.0) * 0.3 * x, rtol=1e-12)


# --- 4 ------------------------------------------------------------------------------------------------------------------


def half(x):
    """Rounded to float16 and back."""
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def adam_in_half(x, grads, *, eta, beta, epsilon, lambda_=0.0, couple=True):
    """AdamW in float32, the parameter and the mean rounded to float16 after each step, the squares kept in float32."""
    (b1, b2), m, v = beta, np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = eta * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + epsilon)
        x = half(x - step - (eta if couple else 1) * lambda_ * x)
        m = half(m)
        yield x


def rprop_in_half(x, grads, *, eta, ell, gamma):
    last, size = np.zeros_like(x), half(np.full_like(x, eta))
    for g in grads:
        agreement = last * g
        size = np.where(agreement > 0, np.minimum(size * ell[1], gamma[1]), size)
        size = np.where(agreement < 0, np.maximum(size * ell[0], gamma[0]), size)
        last = np.where(agreement < 0, 0, g)
        x, size = half(x - size * np.sign(last)), half(size)
        yield x


@both_kinds
@parametrised(float16_arithmetic, "rules")
def test_4_half_precision_is_computed_in_float32(record, kind):
    rule = rule_of(record)
    grads = [array(grad, "float16") for grad in record["grads"]]
    x = array(record["x0"], "float16")
    reference = rprop_in_half if isinstance(rule, opt.Rprop) else adam_in_half
    expected = reference(x.astype(np.float32), [g.astype(np.float32) for g in grads], **vars(rule))
    for (_, ours), theirs in zip(steps(rule, x, grads, kind), expected, strict=True):
        assert np.isfinite(ours).all()
        assert error(ours, theirs) <= 2 * HALF_EPSILON


@both_kinds
def test_4_adamw_keeps_a_usable_epsilon_in_float16(kind):
    x, zero = np.ones(3, np.float16), np.zeros(3, np.float16)
    assert np.float16(opt.AdamW().epsilon) == 0
    for rule in (opt.Adam(), opt.AdamW()):
        ((_, ours),) = steps(rule, x, [zero], kind)
        np.testing.assert_array_equal(ours, x)  # not 0 / 0


def test_4_only_small_gradients_are_left_out_of_the_recorded_runs():
    masked = excluded(lambda each: each["dtype"] == "float16", "rules", "mixed_precision")
    masks = [mask for mask in map(exact_squares, masked) if mask is not None and mask.any()]
    assert len(masks) == 30
    assert all(mask.mean() > 0.45 for mask in masks)


# --- 5 ------------------------------------------------------------------------------------------------------------------


@both_kinds
@parametrised(adjusts_missing_field, "adjust")
def test_5_adjusting_a_field_that_no_rule_has_is_an_error(record, kind):
    state = opt.setup(rule_of(record, kind), made(array(record["x0"], record["dtype"]), kind))
    change = {"u": 3, "eta": 0.5} if "Apollo" in record["rule"]["type"] else {"eta": 0.3}
    with pytest.raises((opt.UnknownFieldError, opt.HyperParameterError), match=next(iter(change))):
        opt.adjust(state, **change)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (opt.Descent(), {"rho": 0.9}),
        (opt.Adam(), {"lambda_": 0.1}),
        (opt.OptimiserChain(opt.ClipGrad(), opt.WeightDecay()), {"eta": 0.1}),
        (opt.MixedPrecision(opt.AdaDelta()), {"eta": 0.1}),
    ],
    ids=repr,
)
def test_5_adjust_names_the_unknown_field(rule, change):
    for target in (rule, opt.setup(rule, np.ones(3))):
        with pytest.raises(opt.UnknownFieldError, match=next(iter(change))):
            opt.adjust(target, **change)


@pytest.mark.parametrize(
    ("kind_of", "change"),
    [
        (opt.Descent, {"eta": -1.0}),
        (opt.Momentum, {"rho": 1.0}),
        (opt.AdaMax, {"beta": (0.9, 1.0)}),
        (opt.AdaGrad, {"epsilon": -1e-8}),
        (opt.WeightDecay, {"lambda_": -0.1}),
        (opt.ClipGrad, {"delta": 0.0}),
        (opt.ClipNorm, {"omega": float("nan")}),
        (opt.Rprop, {"ell": (1.2, 0.5)}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_5_ranges_are_checked_for_every_rule(kind_of, change):
    (field,) = change
    for call in (lambda: kind_of(**change), lambda: opt.adjust(opt.setup(kind_of(), np.ones(3)), **change)):
        with pytest.raises(opt.HyperParameterError, match=field):
            call()


# --- 6 and 7 ------------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize(
    "last",
    [opt.ClipNorm(), opt.ClipGlobalNorm(), opt.NormGrowthCap(), opt.GradNormControl(), opt.AdaptiveGradNormControl()],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize(
    "first", [opt.WeightDecay(0.3), opt.ClipGrad(0.5), opt.Adam(2.0), opt.AdamW(2.0, lambda_=0.1)], ids=repr
)
def test_6_norm_rules_work_after_any_rule(first, last, kind):
    x, grads = random(4, 3), random(5, 4, 3, seed=1)
    state, alone = opt.setup(opt.OptimiserChain(first, last), made(x, kind)), last.init(x)
    before, x = first.init(x), made(x, kind)
    for grad in grads:
        held = numpy_of(x)
        state, x = opt.update(state, x, made(grad, kind))
        before, step = first.apply(before, held, grad)
        alone, step = last.apply(alone, held, step)
        np.testing.assert_allclose(numpy_of(x), held - step, rtol=1e-12)


@both_kinds
@pytest.mark.parametrize("rule", [opt.GradNormControl(), opt.AdaptiveGradNormControl()], ids=repr)
def test_7_running_sums_live_in_the_state(rule, kind):
    model = made({"a": random(3), "b": 10 * random(3, seed=1)}, kind)
    state = opt.setup(rule, model)
    after, _ = opt.update(state, model, model)
    again, _ = opt.update(state, model, model)
    assert after == again  # the old state has not changed
    assert after != state
    assert after["a"].state != after["b"].state
    assert hash(after["a"].rule) == hash(rule)


# --- 8 ------------------------------------------------------------------------------------------------------------------


def pieces(record):
    """(recorded array, offset in the flat vector) of each distinct array of a record."""
    model, offsets = decode(record["model"]), decode(record["offsets"])
    if not isinstance(model, dict):
        return [(model, offsets)]
    return list({offset: (model[key], offset) for key, offset in offsets.items()}.values())


@both_kinds
@parametrised(column_major, "destructure")
def test_8_flat_vectors_are_row_major(record, kind):
    recorded = decode(record["flat"])
    arrays = [each for each, _ in pieces(record)]
    for each, offset in pieces(record):
        piece = recorded[offset : offset + each.size]
        np.testing.assert_array_equal(piece.reshape(each.shape, order="F"), each)
    flat, rebuild = opt.destructure(made(tuple(arrays), kind))
    np.testing.assert_array_equal(numpy_of(flat), np.concatenate([each.ravel(order="C") for each in arrays]))
    for ours, each in zip(rebuild(flat), arrays, strict=True):
        np.testing.assert_array_equal(numpy_of(ours), each)


@both_kinds
def test_8_a_rebuilt_dict_is_a_dict(kind):
    model = made({"b": random(2), "name": "net", "a": {"w": random(2, 3)}}, kind)
    flat, rebuild = opt.destructure(model)
    rebuilt = rebuild(flat)
    assert type(rebuilt) is dict
    assert list(rebuilt) == list(model)
    assert rebuilt["name"] == "net"
    np.testing.assert_array_equal(numpy_of(rebuilt["a"]["w"]), numpy_of(model["a"]["w"]))


# --- 9 and 10 -----------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("verb", [opt.update, opt.update_], ids=["update", "update_"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (2, 1), (3, 2), (1, 2, 3)], ids=str)
def test_9_a_gradient_never_broadcasts(shape, verb, kind):
    model = made({"w": random(2, 3)}, kind)
    state = opt.setup(opt.Descent(), model)
    with pytest.raises(opt.GradientError, match=r"'w'.*\(2, 3\)"):
        verb(state, model, made({"w": np.ones(shape)}, kind))
    np.testing.assert_array_equal(numpy_of(model["w"]), random(2, 3))


@both_kinds
@parametrised(gradient_lacks_key, "tree")
def test_10_a_missing_key_is_an_error_and_none_is_a_skip(record, kind):
    model = made(decode(record["model0"]), kind)
    leaf = decode(record["state0"])["b"]
    state = opt.setup(leaf.rule, model)
    for grad, recorded in zip(record["grads"], record["models"], strict=True):
        lacking = made(decode(grad), kind)
        with pytest.raises(opt.StructureError, match="'b'"):
            opt.update(state, model, lacking)
        state, model = opt.update(state, model, {**lacking, "b": None})
        for key, theirs in decode(recorded).items():
            assert error(model[key], theirs) <= 1e-12
    assert max(state_errors(state["b"].state, leaf.state)) == 0


# --- 11 and 12 ----------------------------------------------------------------------------------------------------------


def test_11_muon_keeps_the_ratio_of_its_learning_rates_at_setup():
    state = opt.setup(opt.Muon(opt.AdamW(3e-4), eta=0.02), random(4, 3))
    state = opt.adjust(state, 0.0)
    assert state[()].rule.opt.eta == 0
    state = opt.adjust(state, 0.1)
    assert state[()].rule.eta == 0.1
    assert state[()].rule.opt.eta == pytest.approx(0.1 * 3e-4 / 0.02, rel=1e-15)


def test_11_named_coefficients_are_decimals():
    x = random(4, 6)
    triples = ((3.4445, -4.7750, 2.0315),) * 5
    np.testing.assert_array_equal(
        opt.orthogonalise(x), opt.orthogonalise(x, ns=opt.NewtonSchulz(coefficients=triples)), strict=True
    )


@pytest.mark.parametrize("rank", [100, lambda side: 100 * side, 2], ids=["int", "function", "small"])
@pytest.mark.parametrize("shape", [(3, 8), (8, 3)], ids=str)
def test_12_apollo_s_rank_is_capped_at_the_side_it_projects(shape, rank):
    seen = []

    def projection(size, _refresh):
        seen.append(size)
        return np.ones(size)

    list(steps(opt.Apollo(opt.AdamW(), rank, projection=projection), random(*shape), [random(*shape, seed=1)]))
    assert set(seen) == {(2 if rank == 2 else 3, 3)}


# --- 13 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner", [opt.MixedPrecision(opt.Adam()), opt.MixedPrecision(opt.OptimiserChain(opt.Adam()), "float64")], ids=repr
)
def test_13_mixed_precision_inside_a_chain_is_an_error(inner):
    with pytest.raises(opt.RuleError, match="put the chain inside"):
        opt.OptimiserChain(opt.ClipNorm(), inner)


@both_kinds
def test_13_centred_rmsprop_takes_no_root_of_a_negative_number(kind):
    # Under a constant gradient the variance goes to zero, and rounding takes it below.
    g = np.linspace(0.1, 1.1, 50).astype(np.float32)
    rho, square, mean, below = 0.9, np.zeros_like(g), np.zeros_like(g), False
    for _ in range(300):
        square = np.float32(rho) * square + np.float32(1 - rho) * g * g
        mean = np.float32(rho) * mean + np.float32(1 - rho) * g
        below = below or bool((square - mean * mean < 0).any())
    assert below
    for _, x in steps(opt.RMSProp(centred=True), np.zeros_like(g), [g] * 300, kind):
        assert np.isfinite(x).all()


# --- 14 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [opt.Muon(), opt.Apollo()], ids=["Muon", "Apollo"])
def test_14_rules_inside_rules_are_adjusted_and_not_exchanged(rule):
    state = opt.setup(rule, {"b": np.ones(3)})
    with pytest.raises(opt.HyperParameterError, match=r"field 'opt' of .* holds rules; adjust those, with rule=TheirType"):
        opt.adjust(state, opt=opt.AdamW(0.5))
    adjusted = opt.adjust(state, eta=0.5, rule=opt.AdamW)
    assert adjusted["b"].rule == rule.replace(opt=rule.opt.replace(eta=0.5))
