"""What the verbs do, one behaviour a test; properties of rules are tested elsewhere, over the whole table."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch

import optimisers as opt
from optimisers.tree.entry import Entry


class Layer(NamedTuple):
    weight: Any
    bias: Any


def layered():
    """Two layers and a bias at the top, in NumPy."""
    return {
        "layers": [Layer(np.ones((2, 3)), np.zeros(2)), Layer(np.ones((1, 2)), np.zeros(1))],
        "bias": np.zeros(4),
    }


def ones_like(model):
    return optree.tree_map(lambda x: np.ones_like(x) if isinstance(x, np.ndarray) else torch.ones_like(x), model)


def tiny(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def backward(net, shape=(5, 3)):
    net.zero_grad()
    net(torch.linspace(-1, 1, math.prod(shape)).reshape(shape)).square().sum().backward()


def etas(state):
    """The learning rate of each leaf of a flat dict."""
    return {name: state[name].rule.eta for name in state}


def arrays(state):
    return [leaf for entry in state._entries for leaf in opt_state_leaves(entry.state)]


def opt_state_leaves(state):
    return [leaf for leaf in optree.tree_leaves(state) if hasattr(leaf, "shape")]


def moved(before, after):
    return not np.array_equal(np.asarray(before), np.asarray(after))


# --- adjust ---------------------------------------------------------------------------------------------------------------


def two():
    return {"a": np.ones(2), "b": np.ones(3)}


def test_adjust_sets_the_learning_rate_everywhere_and_shares_arrays():
    state = opt.setup(opt.OptimiserChain(opt.WeightDecay(), opt.Adam(), opt.Momentum()), two())
    new = opt.adjust(state, 0.5)
    for name in "ab":
        decay, adam, momentum = new[name].rule.rules
        assert (decay, adam, momentum) == (opt.WeightDecay(), opt.Adam(0.5), opt.Momentum(0.5))
    assert all(a is b for a, b in zip(arrays(state), arrays(new), strict=True))
    assert state["a"].rule.rules[1] == opt.Adam()  # the old state is as it was


def test_adjust_to_zero_stops_and_comes_back():
    model, state = two(), opt.setup(opt.Descent(0.1), two())
    _, still = opt.update(opt.adjust(state, 0), model, two())
    assert not moved(model["a"], still["a"])
    assert etas(opt.adjust(opt.adjust(state, 0.0), 0.2)) == {"a": 0.2, "b": 0.2}


def test_times_is_relative_to_setup_however_often_it_is_used():
    state = opt.setup(opt.Route(("a", opt.Descent(0.4)), otherwise=opt.Descent(0.1)), two())
    half = opt.adjust(state, times=0.5)
    assert etas(half) == {"a": 0.2, "b": 0.05}
    assert etas(opt.adjust(half, times=0.5)) == {"a": 0.2, "b": 0.05}
    assert etas(opt.adjust(opt.adjust(half, 7.0), times=1)) == {"a": 0.4, "b": 0.1}
    assert etas(opt.adjust(half, times=2, where="a")) == {"a": 0.8, "b": 0.05}
    stepped, _ = opt.update(half, two(), two())
    assert etas(opt.adjust(stepped, times=0)) == {"a": 0.0, "b": 0.0}


def test_adjust_sets_several_fields_by_name_where_rules_have_them():
    chain = opt.OptimiserChain(opt.ClipNorm(), opt.AdamW(), opt.Momentum())
    new = opt.adjust(opt.setup(chain, two()), eta=0.2, beta=(0.8, 0.95), omega=3)
    clip, adamw, momentum = new["a"].rule.rules
    assert clip == opt.ClipNorm(3.0)
    assert adamw == opt.AdamW(0.2, (0.8, 0.95))
    assert momentum == opt.Momentum(0.2)


def test_adjusted_hyper_parameters_take_effect():
    model = {"w": np.ones(2)}
    state = opt.adjust(opt.setup(opt.Descent(0.1), model), 0.25)
    _, new = opt.update(state, model, {"w": np.ones(2)})
    np.testing.assert_array_equal(new["w"], 0.75)


def at(state, path):
    """The leaf at a path of ``layered``."""
    if path == "bias":
        return state["bias"]
    _, index, name = path.split(".")
    return getattr(state["layers"][int(index)], name)


@pytest.mark.parametrize(
    ("where", "hit"),
    [
        ("layers.*", {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"}),
        ("*.bias", {"layers.0.bias", "layers.1.bias", "bias"}),
        ("*.BIAS", None),
        ("bias", {"bias"}),
        ("layers.?.weight", {"layers.0.weight", "layers.1.weight"}),
        ("layers.[!0].*", {"layers.1.weight", "layers.1.bias"}),
        (Layer, {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"}),
        (lambda p: p.ndim == 2 and p.size > 2, {"layers.0.weight"}),
        (("bias", lambda p: p.keys == ("layers", 1, "weight")), {"bias", "layers.1.weight"}),
        (["bias", "layers.0.bias"], {"bias", "layers.0.bias"}),
    ],
)
def test_where_selects(where, hit):
    model = layered()
    state = opt.setup(opt.Descent(0.1), model)
    if hit is None:
        with pytest.raises(opt.SelectionError):
            opt.adjust(state, 0.5, where=where)
        return
    adjusted, frozen = opt.adjust(state, 0.5, where=where), opt.freeze(state, where=where)
    for path, _ in opt.trainables(model, path=True):
        assert at(adjusted, path).rule.eta == (0.5 if path in hit else 0.1), path
        assert at(frozen, path).frozen == (path in hit), path


def test_rule_reaches_inside_chains_and_wrappers():
    rule = opt.Scheduled(opt.OptimiserChain(opt.WeightDecay(0.1), opt.AdamW(lambda_=0.2)), beta=lambda step: (0.5, 0.5))
    state = opt.adjust(opt.setup(opt.MixedPrecision(rule), two()), lambda_=0.3, rule=opt.WeightDecay)
    decay, adamw = state["a"].rule.rule.rule.rules
    assert (decay.lambda_, adamw.lambda_) == (0.3, 0.2)
    state = opt.adjust(state, 0.7, rule=(opt.AdamW, opt.Adam))
    assert state["a"].rule.rule.rule.rules[1].eta == 0.7
    assert opt.adjust(state, times=0.5, rule=opt.AdamW)["a"].rule.rule.rule.rules[1].eta == 0.0005


def test_rule_selects_by_base_class_too():
    state = opt.setup(opt.Route(("a", opt.Adam()), otherwise=opt.Lion()), two())
    assert etas(opt.adjust(state, 0.5, rule=opt.Lion)) == {"a": 0.001, "b": 0.5}
    assert etas(opt.adjust(state, 0.5, rule=opt.AbstractRule)) == {"a": 0.5, "b": 0.5}


def test_adjust_of_a_rule_and_of_a_leaf():
    assert opt.adjust(opt.Adam(), 0.1) == opt.Adam(0.1)
    assert opt.adjust(opt.Adam(0.4), times=0.5) == opt.Adam(0.2)
    assert opt.adjust(opt.OptimiserChain(opt.Adam(), opt.Lion()), beta=(0.5, 0.5), rule=opt.Lion) == opt.OptimiserChain(
        opt.Adam(), opt.Lion(beta=(0.5, 0.5))
    )
    leaf = opt.setup(opt.Adam(), two())["a"]
    new = opt.adjust(leaf, 0.1)
    assert new.rule == opt.Adam(0.1)
    assert new.state is leaf.state


@pytest.mark.parametrize("lib", ["numpy", "torch"])
def test_adjust_at_every_step_costs_what_there_are_rules_of(lib, monkeypatch):
    make = np.ones if lib == "numpy" else torch.ones
    model = {f"{'a' if i % 3 else 'b'}{i}": make((32, 16)) for i in range(30)}
    a, b = opt.AdamW(0.1), opt.AdamW(0.2)
    state = opt.setup(lambda param: a if param.path.startswith("a") else b, model)
    state, model = opt.update_(state, model, model)
    calls = {"with_eta": 0, "replace": 0}

    def counted(owner, name):
        inner = getattr(owner, name)

        def call(*args, **more):
            calls[name] += 1
            return inner(*args, **more)

        monkeypatch.setattr(owner, name, call)

    counted(opt.AdamW, "with_eta")
    counted(Entry, "replace")
    for k in range(4):
        state = opt.adjust(state, 0.1 / (k + 1))
        state, model = opt.update_(state, model, model)
    assert calls == {"with_eta": 2 * 4, "replace": 0}
    assert set(etas(state).values()) == {0.025}


@pytest.mark.parametrize("lib", ["numpy", "torch"])
def test_selections_that_overlap_adjust_each_parameter_as_asked(lib):
    rng = np.random.default_rng(4)
    make = np.array if lib == "numpy" else torch.tensor
    expected = {f"{i}": rng.standard_normal((40, 16)) for i in range(12)}
    rates = dict.fromkeys(expected, 0.5)
    model = {path: make(x) for path, x in expected.items()}
    state = opt.setup(opt.Descent(0.5), model)
    for step in range(12):
        chosen = set(rng.permutation(list(expected))[: rng.integers(1, 12)].tolist())
        eta = float(rng.uniform(0, 1))
        state = opt.adjust(state, eta, where=lambda param, chosen=chosen: param.path in chosen)
        rates |= dict.fromkeys(chosen, eta)
        if step == 6:
            state = opt.adjust(state, times=0.25)
            rates = dict.fromkeys(expected, 0.125)
        assert etas(state) == rates
        grads = {path: rng.standard_normal(x.shape) for path, x in expected.items()}
        state, model = opt.update(state, model, {path: make(dx) for path, dx in grads.items()})
        expected = {path: x - rates[path] * grads[path] for path, x in expected.items()}
        for path, x in expected.items():
            np.testing.assert_allclose(np.asarray(model[path]), x, rtol=1e-12, atol=1e-13)


def test_adjust_passes_over_what_is_not_trained():
    state = opt.setup(lambda p: opt.Adam() if p.path == "a" else None, two())
    new = opt.adjust(state, 0.5)
    assert new["a"].rule.eta == 0.5
    assert new["b"].rule is None


# --- freeze and thaw ------------------------------------------------------------------------------------------------------


def test_a_frozen_parameter_keeps_value_and_state_and_goes_on_after_thaw():
    model, grads = two(), two()
    state = opt.setup(opt.Momentum(0.1), model)
    state, model = opt.update(state, model, grads)
    cold, same = opt.update(opt.freeze(state, where="a"), model, grads)
    assert same["a"] is model["a"]
    assert moved(model["b"], same["b"])
    assert cold["a"].frozen
    assert not cold["b"].frozen
    np.testing.assert_array_equal(cold["a"].state, state["a"].state)
    warm, last = opt.update(opt.thaw(cold), same, grads)
    _, straight = opt.update(state, model, grads)
    np.testing.assert_array_equal(last["a"], straight["a"])
    assert not warm["a"].frozen


def test_thaw_leaves_untrained_parameters_untrained():
    state = opt.thaw(opt.freeze(opt.setup(lambda p: opt.Adam() if p.path == "a" else None, two())))
    assert not state["a"].frozen
    assert state["b"].frozen
    assert state["b"].rule is None
    _, new = opt.update(state, model := two(), two())
    assert new["b"] is model["b"]


# --- a rule for each parameter --------------------------------------------------------------------------------------------


def test_setup_calls_a_function_once_for_each_distinct_array():
    net = tiny()
    net[2].weight = torch.nn.Parameter(torch.ones(1, 4))
    net.extra = net[2]  # every parameter of the last layer has a second name
    seen = []

    def choose(param):
        seen.append(param)
        return opt.Adam()

    opt.setup(choose, net)
    assert [p.path for p in seen] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    first, last = seen[0], seen[2]
    assert first.keys == ("0", "weight")
    assert (first.shape, first.ndim, first.size) == ((4, 3), 2, 12)
    assert first.dtype == torch.float32
    assert first.array is net[0].weight
    assert first.module is net[0]
    assert first.owner is torch.nn.Linear
    assert first.tied_paths == ()
    assert last.tied_paths == ("extra.weight",)


def test_params_of_a_tree():
    shared = np.ones((2, 2), np.float32)
    model = {"head": Layer(shared, np.zeros(2)), "a.b": [shared.T], "n": 3}
    seen = {}
    opt.setup(lambda p: seen.setdefault(p.path, p) and opt.Adam(), model)
    assert set(seen) == {"a.b.0", "head.bias"}
    param = seen["a.b.0"]
    assert param.keys == ("a.b", 0)
    assert param.tied_paths == ("head.weight",)
    assert param.module == model["a.b"]
    assert param.owner is list
    assert seen["head.bias"].owner is Layer
    opt.setup(lambda p: seen.update(bare=p) or opt.Adam(), np.ones(2))
    assert (seen["bare"].path, seen["bare"].keys, seen["bare"].module, seen["bare"].owner) == ("", (), None, None)


def test_route_takes_globs_types_predicates_and_tuples():
    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    rule = opt.Route(
        (torch.nn.Embedding, opt.Descent(0.1)),
        (("1.*", "*.bias"), opt.Descent(0.2)),
        (lambda p: p.ndim == 2, opt.Descent(0.3)),
    )
    state = opt.setup(rule, net)
    assert etas(state) == {"0.weight": 0.1, "1.weight": 0.2, "1.bias": 0.2, "2.weight": 0.3, "2.bias": 0.2}


def test_route_first_match_wins_and_otherwise_takes_the_rest():
    rule = opt.Route(("*.bias", opt.Descent(0.1)), ("layers.*", opt.Descent(0.2)), ("*", opt.Descent(0.3)), otherwise=None)
    state = opt.setup(rule, {**layered(), "scale": np.ones(())})
    assert state["bias"].rule.eta == 0.1  # "*.bias" matches at the top too
    assert state["layers"][0].bias.rule.eta == 0.1
    assert state["layers"][0].weight.rule.eta == 0.2
    assert state["scale"].rule.eta == 0.3


def test_route_none_means_not_trained_and_needs_no_gradient():
    model = layered()
    state = opt.setup(opt.Route(("layers.0.*", None), otherwise=opt.Descent()), model)
    leaf = state["layers"][0].weight
    assert leaf == opt.Leaf(None, None, frozen=True)
    _, new = opt.update(state, model, ones_like(model))
    assert new["layers"][0].weight is model["layers"][0].weight
    assert moved(model["bias"], new["bias"])


def test_reasons_are_printed():
    def choose(param):
        return None if param.path == "bias" else opt.Adam()

    def is_matrix(param):
        return param.ndim == 2

    route = opt.Route(("bias", opt.Lion()), (is_matrix, opt.Adam()), (Layer, None), otherwise=opt.Descent())
    text = str(opt.setup(route, {**layered(), "other": np.ones(2)}))
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["bias"].endswith("'bias'")
    assert rows["layers.0.weight"].endswith("predicate is_matrix")
    assert rows["layers.0.bias"].endswith("owner Layer")
    assert "not trained" in rows["layers.0.bias"]
    assert rows["other"].endswith("otherwise")
    assert "1x2" in rows["layers.1.weight"]
    assert "Lion(eta=0.001)" in rows["bias"]
    assert "the rule given to setup" in str(opt.setup(opt.Adam(), layered()))
    assert "chosen by choose" in str(opt.setup(choose, layered()))
    assert "frozen" in str(opt.freeze(opt.setup(opt.Adam(), layered())))


def test_route_inside_wrappers_and_chains():
    route = opt.Route(("a", opt.Descent(0.1)), otherwise=opt.Momentum(0.2))
    state = opt.setup(opt.Scheduled(route, eta=lambda step: 0.5, rho=lambda step: 0.3), two())
    assert isinstance(state["a"].rule, opt.Scheduled)
    assert state["a"].rule.at(0) == opt.Descent(0.5)  # it has no rho to schedule
    assert state["b"].rule.at(0) == opt.Momentum(0.5, 0.3)

    state = opt.setup(opt.MixedPrecision(route, "float32"), two())
    assert state["a"].rule == opt.MixedPrecision(opt.Descent(0.1), "float32")

    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(), route), two())
    assert state["b"].rule == opt.OptimiserChain(opt.ClipNorm(), opt.Momentum(0.2))

    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(), opt.Route(("a", None), otherwise=opt.Adam())), two())
    assert state["a"].rule is None

    state = opt.setup(opt.Route(("a", opt.Route((lambda p: p.ndim == 1, opt.Lion()))), otherwise=opt.Adam()), two())
    assert state["a"].rule == opt.Lion()


def test_route_values_a_tie_by_all_its_places():
    shared = np.ones(2)
    model = {"embed": shared, "head": shared, "b": np.ones(2)}
    same = opt.setup(opt.Route((("embed", "head"), opt.Descent(0.1)), otherwise=opt.Descent(0.2)), model)
    assert same["head"].rule.eta == 0.1
    state = opt.adjust(same, 0.5, where="head")  # where= finds a tied array under any of its paths
    assert state["embed"].rule.eta == 0.5


def test_trainable_narrows():
    seen = []
    state = opt.setup(opt.Adam(), layered(), trainable=lambda p: seen.append(p.path) or p.ndim == 2)
    assert len(seen) == 5
    assert state["bias"] is None
    assert state["layers"][0].bias is None
    assert state["layers"][1].weight.rule == opt.Adam()


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32"), torch.float32], ids=repr)
def test_state_dtype_sets_moments_and_leaves_parameters(dtype):
    for model in ({"w": np.ones(3)}, {"w": torch.ones(3, dtype=torch.float64)}):
        state = opt.setup(opt.Adam(), model, state_dtype=dtype)
        state, new = opt.update(state, model, ones_like(model))
        m, v, _ = state["w"].state
        assert str(m.dtype).endswith("float32")
        assert str(v.dtype).endswith("float32")
        assert new["w"].dtype == model["w"].dtype


def test_state_dtype_of_half_precision_moments():
    model = {"w": torch.ones(3)}
    state = opt.setup(opt.Momentum(0.1), model, state_dtype="bfloat16")
    state, new = opt.update(state, model, {"w": torch.full((3,), 1.001)})
    assert state["w"].state.dtype == torch.bfloat16
    assert torch.equal(new["w"], 1 - 0.1 * torch.full((3,), 1.001))  # the step is rounded in neither


# --- ClipGlobalNorm -------------------------------------------------------------------------------------------------------


def clipped(rule, grads, **options):
    """The gradients as a rule lets them through (a step of Descent(1) from zero)."""
    model = {name: np.zeros_like(g) if g is not None else np.zeros(2) for name, g in grads.items()}
    state = opt.setup(rule, model, **options)
    _, new = opt.update(state, model, grads)
    assert all(isinstance(x, np.ndarray) for x in new.values())
    return {name: -x for name, x in new.items()}


@pytest.mark.parametrize(("p", "length"), [(2.0, 13.0), (1, 19.0), (math.inf, 12.0), (0.5, (3**0.5 + 4**0.5 + 12**0.5) ** 2)])
def test_one_norm_over_all_leaves(p, length):
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]]), "c": np.array(12.0)}
    got = clipped(opt.ClipGlobalNorm(1.0, p), grads)
    for name, g in grads.items():
        np.testing.assert_allclose(got[name], g / length)
    for name, same in clipped(opt.ClipGlobalNorm(length * 1.01, p), grads).items():
        np.testing.assert_array_equal(same, grads[name])


def test_one_norm_over_leaves_with_different_chains():
    rule = opt.Route(
        ("a", opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Descent(1.0))),
        ("b", opt.OptimiserChain(opt.Descent(2.0), opt.ClipGlobalNorm(10.0))),
        ("c", opt.Descent(1.0)),
    )
    got = clipped(rule, {"a": np.array([3.0]), "b": np.array([2.0]), "c": np.array([100.0])})
    np.testing.assert_allclose(got["a"], 3 / 5)  # the norm is of what reaches the rule: 3 and 2 * 2
    np.testing.assert_allclose(got["b"], 4.0)  # each place has its own omega
    np.testing.assert_allclose(got["c"], 100.0)


def test_groups_are_measured_apart():
    one, other = opt.ClipGlobalNorm(1.0, group="one"), opt.ClipGlobalNorm(1.0, p=1, group="other")
    rule = opt.Route(("a", one), ("b", one), ("c", other), ("d", opt.OptimiserChain(one, other)))
    got = clipped(rule, {"a": np.array([3.0]), "b": np.array([4.0]), "c": np.array([7.0]), "d": np.array([12.0])})
    np.testing.assert_allclose([got["a"][0], got["b"][0]], [3 / 13, 4 / 13])
    total = 7 + 12 / 13
    np.testing.assert_allclose([got["c"][0], got["d"][0]], [7 / total, 12 / 13 / total])


def test_absent_and_frozen_leaves_do_not_count():
    model = {"a": np.zeros(1), "b": np.zeros(1), "c": np.zeros(1)}
    state = opt.freeze(opt.setup(opt.ClipGlobalNorm(1.0), model), where="c")
    _, new = opt.update(state, model, {"a": np.array([3.0]), "b": None, "c": np.array([np.nan])})
    np.testing.assert_allclose(new["a"], -1.0)


def test_a_tied_array_counts_once():
    shared = np.zeros(1)
    model = {"a": shared, "b": shared, "c": np.zeros(1)}
    state = opt.setup(opt.ClipGlobalNorm(1.0), model)
    _, new = opt.update(state, model, {"a": np.array([1.0]), "b": np.array([2.0]), "c": np.array([4.0])})
    np.testing.assert_allclose([new["a"][0], new["c"][0]], [-3 / 5, -4 / 5])


def test_members_behind_an_accumulation_count_only_on_their_steps():
    rule = opt.Route(("a", opt.OptimiserChain(opt.AccumGrad(2), opt.ClipGlobalNorm(1.0))), otherwise=opt.ClipGlobalNorm(1.0))
    model = {"a": np.zeros(1), "b": np.zeros(1)}
    grads = {"a": np.array([3.0]), "b": np.array([4.0])}
    state, model = opt.update(opt.setup(rule, model), model, grads)
    np.testing.assert_allclose([model["a"][0], model["b"][0]], [0, -1])
    _, model = opt.update(state, model, grads)
    np.testing.assert_allclose([model["a"][0], model["b"][0]], [-3 / 5, -1 - 4 / 5])


def test_zero_gradients_stay_zero():
    got = clipped(opt.ClipGlobalNorm(1.0), {"a": np.zeros(2), "b": np.zeros(2)})
    assert not got["a"].any()
    assert not got["b"].any()


# --- AccumGrad, Scheduled, MixedPrecision ---------------------------------------------------------------------------------


def test_accumulation_steps_every_nth_time_with_the_mean():
    model = {"w": np.zeros(2)}
    state = opt.setup(opt.OptimiserChain(opt.AccumGrad(3), opt.Momentum(1.0)), model)
    for value in (1.0, 2.0):
        state, model = opt.update(state, model, {"w": np.full(2, value)})
        assert not model["w"].any()
        assert not state["w"].state[1].any()  # the members behind it keep their state
    state, model = opt.update(state, model, {"w": np.full(2, 6.0)})
    np.testing.assert_allclose(model["w"], -3.0)
    np.testing.assert_allclose(state["w"].state[1], 3.0)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("size", [3, 6000])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda rule: rule,
        lambda rule: opt.OptimiserChain(opt.ClipNorm(1e9), rule),
        opt.Averaged,
        lambda rule: opt.Scheduled(rule, eta=lambda _: 1.0),
        lambda rule: opt.MixedPrecision(rule, "float64"),
    ],
)
@pytest.mark.parametrize(
    ("first", "then", "after", "steps_at"), [(2, 4, 1, 4), (4, 2, 1, 2), (4, 2, 3, 4), (5, 3, 3, 4), (3, 3, 2, 3)]
)
def test_gradients_of_one_step_have_one_weight_whenever_their_number_is_adjusted(
    wrap, first, then, after, steps_at, size, kind
):
    """``after`` gradients come before the change, and the step with gradient number ``steps_at``, by the mean of all."""
    make = np.full if kind == "numpy" else torch.full
    model = {"w": make((size,), 0.0), "b": make((2,), 0.0)}
    state = opt.setup(wrap(opt.OptimiserChain(opt.AccumGrad(first), opt.Descent(1.0))), model)
    for k in range(1, steps_at + 1):
        assert (model["w"] == 0).all()
        if k == after + 1:
            state = opt.adjust(state, n=then)
        state, model = opt.update(state, model, {"w": make((size,), float(k)), "b": None})
    mean = (steps_at + 1) / 2
    np.testing.assert_allclose(model["w"], -mean, rtol=1e-6)
    assert (model["b"] == 0).all()
    for _ in range(then):  # from then on it is the new number
        assert (abs(np.asarray(model["w"]) + mean) < 1e-4).all()
        state, model = opt.update_(state, model, {"w": make((size,), 1.0), "b": None})
    np.testing.assert_allclose(model["w"], -mean - 1, rtol=1e-6)


def test_a_leaf_and_an_old_state_keep_what_was_gathered():
    model = {"w": np.zeros(2)}
    state, _ = opt.update(opt.setup(opt.AccumGrad(2), model), model, {"w": np.ones(2)})
    adjusted = opt.adjust(state, n=4)
    assert (state["w"].state.mean == 0.5).all()
    assert (adjusted["w"].state.mean == 0.25).all()
    assert opt.adjust(state["w"], n=4) == adjusted["w"]
    assert opt.adjust(adjusted, n=2) == state
    assert opt.adjust(state, n=2)["w"].state.mean is state["w"].state.mean


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [3, 6000])
def test_small_gradients_count_beside_the_sum_of_many_in_half_precision(dtype, size):
    dtype = getattr(torch, dtype)
    model = {"w": torch.zeros(size, dtype=dtype)}
    state = opt.setup(opt.OptimiserChain(opt.AccumGrad(256), opt.Descent(1.0)), model)
    assert state["w"].state[0].mean.dtype == torch.float32
    for k in range(256):
        state, model = opt.update(state, model, {"w": torch.full((size,), 1.0 if k else 256.0, dtype=dtype)})
    assert (model["w"] == torch.tensor(-(256 + 255) / 256).to(dtype)).all()
    small = opt.setup(opt.OptimiserChain(opt.AccumGrad(256), opt.Descent(1.0)), model, state_dtype=dtype)
    assert small["w"].state[0].mean.dtype == dtype


def test_a_schedule_counts_only_steps_taken_and_for_each_leaf():
    seen = {"a": [], "b": []}

    def rule(param):
        return opt.Scheduled(
            opt.OptimiserChain(opt.AccumGrad(2), opt.Descent()), eta=lambda t: seen[param.path].append(t) or 0.1 * (t + 1)
        )

    model = {"a": np.zeros(1), "b": np.zeros(1)}
    state = opt.setup(rule, model)
    for i in range(4):
        state, model = opt.update(state, model, {"a": np.ones(1), "b": np.ones(1) if i < 2 else None})
    np.testing.assert_allclose(model["a"], -(0.1 + 0.2))
    np.testing.assert_allclose(model["b"], -0.1)
    assert set(seen["a"]) == {0, 1}
    assert set(seen["b"]) == {0}
    assert all(type(step) is int for steps in seen.values() for step in steps)
    assert (state["a"].state[0], state["b"].state[0]) == (2, 1)


@pytest.mark.parametrize("make", [float, np.float32, np.float64, np.array, jnp.float32, jnp.asarray])
def test_a_schedule_may_give_any_kind_of_number(make):
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    state = opt.setup(opt.Scheduled(opt.Descent(), eta=lambda step: make(0.25)), model)
    _, new = opt.update(state, model, {"w": torch.ones(1)})
    assert new["w"].item() == -0.25
    assert state["w"].rule.at(0) == opt.Descent(0.25)
    assert type(state["w"].rule.at(0).eta) is float


def test_schedules_of_several_fields():
    rule = opt.Scheduled(opt.AdamW(), eta=lambda t: 1 / (1 + t), beta=lambda t: [0.5, 0.9], lambda_=lambda t: 0.1 * t)
    assert rule.at(0) == opt.AdamW(1.0, (0.5, 0.9), 0.0)
    assert rule.at(3) == opt.AdamW(0.25, (0.5, 0.9), 0.1 * 3)


def test_a_scheduled_learning_rate_reaches_every_member():
    rule = opt.Scheduled(opt.OptimiserChain(opt.Momentum(), opt.WeightDecay(0.1), opt.Descent()), eta=lambda t: 0.5)
    assert rule.at(0) == opt.OptimiserChain(opt.Momentum(0.5), opt.WeightDecay(0.1), opt.Descent(0.5))


def test_other_fields_of_a_scheduled_rule_are_adjusted_and_a_schedule_is_replaced():
    state = opt.setup(opt.Scheduled(opt.Adam(), eta=lambda t: 0.1), two())
    state = opt.adjust(state, beta=(0.5, 0.5))
    assert state["a"].rule.at(0) == opt.Adam(0.1, (0.5, 0.5))
    state = opt.adjust(state, eta=lambda t: 0.2)
    assert state["a"].rule.at(0) == opt.Adam(0.2, (0.5, 0.5))
    assert opt.adjust(state, lambda t: 0.3)["a"].rule.at(0) == opt.Adam(0.3, (0.5, 0.5))


@pytest.mark.parametrize("verb", [opt.update, opt.update_])
def test_mixed_precision_steps_a_master_copy(verb):
    model = {"half": torch.ones(2, dtype=torch.bfloat16), "full": torch.ones(2)}
    state = opt.setup(opt.MixedPrecision(opt.Descent(0.0005)), model)
    assert state["half"].state[0].dtype == torch.float32
    assert state["full"].state[0] is None  # no copy of what has the dtype already
    for _ in range(8):
        state, model = verb(state, model, {"half": torch.ones(2, dtype=torch.bfloat16), "full": torch.ones(2)})
    torch.testing.assert_close(state["half"].state[0], torch.full((2,), 1 - 8 * 0.0005))
    torch.testing.assert_close(model["full"], torch.full((2,), 1 - 8 * 0.0005))
    assert torch.equal(model["half"], state["half"].state[0].bfloat16())  # single steps would all be rounded away
    assert model["half"].dtype == torch.bfloat16


def test_mixed_precision_on_numpy():
    model = {"w": np.ones(2, np.float16), "d": np.ones(2)}
    state = opt.setup(opt.MixedPrecision(opt.Adam(), "float64"), model)
    assert state["w"].state[0].dtype == np.float64
    assert state["d"].state[0] is None
    assert state["w"].state[1][0].dtype == np.float64
    _, new = opt.update(state, model, two_like(model))
    assert new["w"].dtype == np.float16


def two_like(model):
    return {name: np.ones_like(x) for name, x in model.items()}


# --- modules --------------------------------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    """A wrapper as training libraries write them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


WRAPPERS = {
    "DataParallel": torch.nn.DataParallel,
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "custom": Wrapper,
    "compiled wrapper": lambda net: torch.compile(Wrapper(net), backend="eager"),
    "wrapped twice": lambda net: torch.nn.DataParallel(Wrapper(net)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapper_prefixes_are_stripped(wrap):
    net = tiny()
    names = [name for name, _ in net.named_parameters()]
    assert [path for path, _ in opt.trainables(wrap(net), path=True)] == names
    state = opt.setup(opt.Adam(), net)
    backward(net)
    state, same = opt.update_(state, wrap(net))  # a state fits the module with and without its wrapper
    assert list(state) == names
    assert same is not net


def test_a_submodule_called_module_is_not_stripped():
    net = torch.nn.ModuleDict({"module": torch.nn.Linear(1, 1), "head": torch.nn.Linear(1, 1)})
    assert "module.weight" in dict(opt.trainables(net, path=True))


@pytest.mark.parametrize("given", [False, True], ids=["from .grad", "from a dict"])
def test_update_steps_a_module_in_place(given):
    net, twin = tiny(), tiny()
    before = dict(net.named_parameters())
    state = opt.setup(opt.Adam(0.1), net)
    reference = torch.optim.Adam(twin.parameters(), 0.1, fused=False, foreach=False)
    for _ in range(3):
        backward(net)
        backward(twin)
        grads = {name: p.grad for name, p in net.named_parameters()} if given else None
        if given:
            net.zero_grad()
        state, result = opt.update_(state, net, grads)
        reference.step()
    assert result is net
    for name, p in net.named_parameters():
        assert p is before[name]
        assert p.is_leaf
        assert p.requires_grad
        torch.testing.assert_close(p, dict(twin.named_parameters())[name])


def test_parameters_without_grad_are_skipped():
    net = tiny()
    state = opt.setup(opt.Adam(0.1), net)
    backward(net)
    net[0].bias.grad = None
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    state, net = opt.update_(state, net)
    assert torch.equal(net[0].bias, before["0.bias"])
    assert not torch.equal(net[0].weight, before["0.weight"])
    assert not state["0.bias"].state[0].any()
    state, _ = opt.update_(state, net, dict.fromkeys(before))
    assert state["0.weight"].state[2][0].item() == pytest.approx(0.9**2)  # a step skipped is no step


def test_parameters_that_require_no_grad_are_not_trained():
    net = tiny()
    net[0].weight.requires_grad_(False)
    state = opt.setup(opt.Adam(), net)
    assert [path for path, _ in opt.trainables(net, path=True)] == ["0.bias", "2.weight", "2.bias"]
    assert state["0.weight"] is None
    assert "0.weight" not in state
    backward(net)
    before = net[0].weight.clone()
    opt.update_(state, net)
    assert torch.equal(net[0].weight, before)
    assert net[0].weight.grad is None


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i):
        return self.head(self.embed(i))


def test_tied_embeddings_have_one_state_and_two_names():
    torch.manual_seed(0)
    net = Tied()
    state = opt.setup(opt.Route(("head.weight", opt.Adam(0.1)), (torch.nn.Embedding, opt.Adam(0.1))), net)
    assert list(state) == ["embed.weight"]
    assert state["head.weight"] == state["embed.weight"]
    assert len(opt.trainables(net)) == 1
    assert "embed.weight = head.weight" in str(state)
    assert opt.adjust(state, 0.5, where="head.*")["embed.weight"].rule.eta == 0.5
    net(torch.tensor([1, 2])).square().sum().backward()
    gradient = net.embed.weight.grad.clone()
    expected = net.embed.weight.detach() - 0.1 * gradient / (gradient.abs() + 1e-8)
    state, net = opt.update_(state, net)
    torch.testing.assert_close(net.head.weight.detach(), expected)
    assert net.head.weight is net.embed.weight
    for names in (["embed.weight"], ["embed.weight", "head.weight"]):
        state, net = opt.update_(state, net, dict.fromkeys(names, gradient))


def test_destructure_and_rebuild_a_module():
    net = tiny()
    flat, rebuild = opt.destructure(net)
    assert flat.shape == (21,)
    x = torch.ones(2, 3)
    torch.testing.assert_close(torch.func.functional_call(net, rebuild(flat), x), net(x))

    def loss(vector):
        return torch.func.functional_call(net, rebuild(vector), x).square().sum()

    gradient = torch.func.grad(loss)(flat.detach())
    backward_of = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.reshape(-1) for g in backward_of]))


def test_a_module_as_a_dict_of_its_parameters():
    net = tiny()
    params = dict(net.named_parameters())
    state = opt.setup(opt.Adam(0.1), params)
    x = torch.ones(2, 3)
    grads = torch.func.grad(lambda p: torch.func.functional_call(net, p, x).square().sum())(params)
    grads = {name: g.detach() for name, g in grads.items()}  # the parameters require grad, and so does what depends on them
    state, new = opt.update(state, params, grads)
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad and p.is_leaf for p in new.values())
    assert all(torch.equal(p, params[name]) for name, p in net.named_parameters())
    assert not torch.equal(new["0.weight"], params["0.weight"])


# --- graphs and transforms ------------------------------------------------------------------------------------------------


def test_first_order_meta_learning():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    state = opt.setup(opt.Momentum(0.1, 0.5), {"w": w})
    params = {"w": w}
    for _ in range(2):
        state, params = opt.update(state, params, {"w": (2 * params["w"]).detach()}, differentiable=True)
    (meta,) = torch.autograd.grad(params["w"].square().sum(), w)
    torch.testing.assert_close(meta, 2 * params["w"].detach())  # the inner gradients are constants
    _, plain = opt.update(state, {"w": w}, {"w": torch.ones(2)})
    assert plain["w"].is_leaf
    assert plain["w"].requires_grad


def test_a_learned_learning_rate_through_an_unrolled_loop():
    def final(eta):
        params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        state = opt.setup(opt.Momentum(eta, 0.9), params)
        for _ in range(4):
            state, params = opt.update(state, params, {"w": 2 * params["w"]})
        return params["w"].square().sum()

    eta = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    final(eta).backward()
    assert torch.autograd.gradcheck(final, (eta,))
    assert eta.grad.item() != 0


@pytest.mark.parametrize("rule", [opt.Momentum(0.1), opt.AdamW(0.1, lambda_=0.1)], ids=repr)
def test_an_ensemble_by_vmap_is_its_members(rule):
    torch.manual_seed(0)
    models = {"w": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}

    def loss(params):
        return (params["w"].sum() * params["b"] - 1) ** 2

    def step(state, params):
        return opt.update(state, params, torch.func.grad(loss)(params))

    states, batch = torch.func.vmap(lambda p: opt.setup(rule, p))(models), models
    for _ in range(3):
        states, batch = torch.func.vmap(step)(states, batch)
    for i in range(3):
        one = {name: x[i] for name, x in models.items()}
        state = opt.setup(rule, one)
        for _ in range(3):
            state, one = step(state, one)
        torch.testing.assert_close(one["w"], batch["w"][i])
        torch.testing.assert_close(one["b"], batch["b"][i])


# --- leaves, indexing and immutability ------------------------------------------------------------------------------------


def test_indexing():
    model = {**layered(), "pair": (np.ones(1), np.ones(2)), "n": 3, 5: np.ones(1)}
    model = {str(key) if key != 5 else "five": value for key, value in model.items()}
    state = opt.setup(opt.Momentum(), model)
    assert state["layers"][-1].weight.state.shape == (1, 2)
    assert state["layers"][1].weight == state["layers"][-1].weight
    assert state["pair"][-2].state.shape == (1,)
    assert state["n"] is None
    assert len(state["layers"]) == 2
    assert [leaf.state.shape for leaf in state["pair"]] == [(1,), (2,)]
    assert set(state) == set(model)
    assert "layers" in state
    assert "absent" not in state
    weight, bias = state["layers"][0]
    assert (weight.state.shape, bias.state.shape) == ((2, 3), (2,))
    with pytest.raises(KeyError):
        state["absent"]
    for index in (2, -3):
        with pytest.raises(IndexError):
            state["layers"][index]
    with pytest.raises(AttributeError):
        _ = state.layers


def test_the_state_of_a_bare_array():
    state = opt.setup(opt.Adam(), np.ones(3))
    assert isinstance(state, opt.StateTree)
    assert state[()].rule == opt.Adam()
    assert state.rule == opt.Adam()
    assert not state.frozen
    state, x = opt.update(state, np.ones(3), np.ones(3))
    assert isinstance(x, np.ndarray)
    with pytest.raises(KeyError):
        state["x"]


def test_states_are_immutable_and_unhashable():
    state = opt.setup(opt.Adam(), two())
    with pytest.raises(AttributeError):
        state.rule = None
    with pytest.raises(TypeError):
        state["a"] = None
    with pytest.raises(AttributeError):
        del state._entries
    with pytest.raises(AttributeError):
        state["a"].frozen = True
    for value in (state, state["a"]):
        with pytest.raises(TypeError, match="unhashable"):
            hash(value)


def test_equality_is_structure_rules_dtypes_and_bytes():
    state = opt.setup(opt.Adam(), two())
    assert state == opt.setup(opt.Adam(), two())
    assert state != opt.setup(opt.Adam(0.1), two())
    assert state != opt.setup(opt.Adam(), two(), state_dtype="float32")
    assert state != opt.freeze(state, where="a")
    assert state != opt.setup(opt.Adam(), {"a": np.ones(2), "c": np.ones(3)})
    assert state != opt.update(state, two(), two())[0]
    assert state == opt.update(state, two(), None)[0]
    assert state["a"] == opt.Leaf(opt.Adam(), state["a"].state)
    assert state != 1


def test_counters_show_as_tensors_over_torch():
    state = opt.setup(opt.Adam(), {"w": torch.ones(2)})
    powers = state["w"].state[2]
    assert [(p.shape, p.dtype) for p in powers] == [(torch.Size([]), torch.float64)] * 2
    assert all(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(state))


@pytest.mark.parametrize("rule", [opt.Adam(), opt.ClipNorm(), opt.OptimiserChain(opt.AccumGrad(1), opt.Lion())], ids=repr)
@pytest.mark.parametrize("verb", [opt.update, opt.update_])
def test_0d_arrays_are_trained_and_stay_arrays(rule, verb):
    for x, g in ((np.array(1.0), np.array(2.0)), (torch.tensor(1.0), torch.tensor(2.0))):
        model = {"x": x, "plain": 2.0}
        state, new = verb(opt.setup(rule, model), model, {"x": g, "plain": None})
        assert type(new["x"]) is type(x)
        assert new["x"].shape == ()
        assert new["plain"] == 2.0
        for leaf in arrays(state):
            assert isinstance(leaf, np.ndarray | torch.Tensor)


def test_a_state_never_shares_memory_with_the_model_or_the_gradient():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Keeper(opt.AbstractRule):
        def init(self, x):
            return x, x[:1]

        def apply(self, state, x, dx):
            return (x, dx), dx

    for model, grads in (({"w": np.ones(2)}, {"w": np.ones(2)}), ({"w": torch.ones(2)}, {"w": torch.ones(2)})):
        state = opt.setup(Keeper(), model)
        model["w"] += 1
        assert state["w"].state[0][0] == 1
        state, _ = opt.update_(state, model, grads)
        grads["w"] += 5
        model["w"] += 5
        assert (state["w"].state[0][0], state["w"].state[1][0]) == (2, 1)


def test_update_keeps_key_order_and_other_leaves():
    model = {"z": np.ones(1), "a": np.ones(1), "name": "net", "n": np.arange(2)}
    _, new = opt.update(opt.setup(opt.Descent(), model), model, {"n": None, "a": np.ones(1), "z": None, "name": None})
    assert list(new) == ["z", "a", "name", "n"]
    assert new["n"] is model["n"]
    assert new["z"] is model["z"]


def test_read_only_arrays_are_replaced_by_update_():
    x = np.ones(2)
    x.flags.writeable = False
    model = {"x": x, "y": np.ones(2)}
    y = model["y"]
    _, new = opt.update_(opt.setup(opt.Descent(0.1), model), model, {"x": np.ones(2), "y": np.ones(2)})
    np.testing.assert_array_equal(x, 1)
    np.testing.assert_array_equal(new["x"], 0.9)
    assert new["y"] is y


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_tied_after_setup_are_refused_by_update_(kind):
    make = np.ones if kind == "numpy" else torch.ones
    state = opt.setup(opt.Descent(0.1), {"a": make(3), "b": make(3)})
    one = make(3)
    with pytest.raises(opt.TieError, match="'a' and 'b' were two arrays at setup and are one now"):
        opt.update_(state, {"a": one, "b": one}, {"a": make(3), "b": make(3)})
    assert (one == 1).all()
    opt.update(state, {"a": one, "b": one}, {"a": make(3), "b": make(3)})  # nothing was consumed


def test_a_numpy_scalar_is_the_gradient_of_a_0d_array():
    state = opt.setup(opt.Descent(0.5), {"scale": np.ones(())})
    _, model = opt.update(state, {"scale": np.ones(())}, {"scale": np.float64(2.0)})
    assert isinstance(model["scale"], np.ndarray)
    assert model["scale"] == 0


def test_a_parameter_moved_without_its_state_is_named():
    state = opt.setup(opt.Adam(), {"w": torch.ones(2)})
    moved = {"w": torch.ones(2, device="meta")}
    with pytest.raises(
        opt.StructureError, match=r"'w': the parameter is on meta, its state on cpu.*opt.to\(state, device='meta'\)"
    ):
        opt.update(state, moved, {"w": torch.ones(2, device="meta")})
    state, moved = opt.update(opt.to(state, device="meta"), moved, {"w": torch.ones(2, device="meta")})
    assert moved["w"].device.type == "meta"


def test_a_rule_applied_by_hand_checks_inside_a_graph_too():
    dx = torch.tensor([float("nan")], requires_grad=True)
    with pytest.raises(opt.NonFiniteError, match="the 2-norm of its gradient is nan"):
        opt.ClipNorm(1.0).apply(None, torch.ones(1), dx)
