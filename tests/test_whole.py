"""Rules that transform whole arrays: loops run what comes before and after, and alike arrays are transformed as a stack."""

import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import numpy_of
from looped import Counter, forget, held
from matrices import assert_alike, drawn, trained
from optimisers.engine.groups import stacking
from optimisers.rules._base import TransformingRule, Whole
from optimisers.rules._states import state_leaves
from optimisers.rules.matrices import muon
from table import halving


@pytest.fixture(autouse=True)
def an_engine_that_knows_nothing(monkeypatch):
    """Programs that other tests have left, so many that no more are made, change how small arrays are stepped."""
    forget(monkeypatch)


RULES = {
    "Muon": opt.Muon(),
    "debiased": opt.Muon(scale="rms", momentum="ema_debiased"),
    "blocks": opt.Muon(blocks=2, layout="in_out", momentum="classic"),
    "plain momentum": opt.Muon(nesterov=False, lambda_=0.0),
    "Orthogonalise": opt.Orthogonalise(),
    "by hand": opt.OptimiserChain(opt.Momentum(1.0, 0.9), opt.Orthogonalise(), opt.WeightDecay(0.01), opt.Descent(0.02)),
    "twice": opt.OptimiserChain(opt.Orthogonalise(), opt.Momentum(1.0, 0.9), opt.Orthogonalise(), opt.Descent(0.02)),
    "measured before": opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.Muon()),
    "measured after": opt.OptimiserChain(opt.Muon(), opt.ClipGlobalNorm(1e-3), opt.ClipNorm(1e-3)),
    "grown": opt.OptimiserChain(opt.Muon(), opt.NormGrowthCap(), opt.WeightDecay(0.1)),
    "skipping": opt.OptimiserChain(opt.SkipNonFinite(), opt.Muon(momentum="ema_debiased")),
    "gathering": opt.OptimiserChain(opt.AccumGrad(2), opt.Muon()),
    "scheduled": opt.Scheduled(opt.Muon(), eta=halving),
    "averaged": opt.Averaged(opt.OptimiserChain(opt.ClipNorm(0.5), opt.Muon()), 0.5),
    "AdaMuon": opt.AdaMuon(0.02, lambda_=0.1, signs=False),
    "AdaMuon in a chain": opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdaMuon(0.02, signs=False), opt.ClipNorm(1e-3)),
    "Scion": opt.Scion(0.02, constrained=True),
    "Scion by rows": opt.Scion(0.02, norm="rows", blocks=2),
    "in a master": opt.MixedPrecision(opt.Muon(momentum="ema_debiased"), "float64"),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
LINE = {"absent": ("w0", "long"), "adjusted": ("w[45]", "tall")}
TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2e-2}


def model_of(kind, dtype, rng):
    shapes = {"wide": (4, 6), "tall": (70, 64), "long": (64, 200), "stack": (2, 6, 4), "kernel": (4, 2, 3, 3)}
    model = {f"w{i}": drawn((6, 4), kind, dtype, rng) for i in range(6)}
    model |= {name: drawn(shape, kind, dtype, rng) for name, shape in shapes.items()}
    model["turned"] = drawn((6, 4), kind, dtype, rng, order=(1, 0))
    model["channels last"] = drawn((4, 2, 3, 3), kind, dtype, rng, order=(0, 2, 3, 1))
    return model | {"tied": model["w1"]}


@pytest.mark.parametrize("update", [opt.update, opt.update_], ids=["pure", "in place"])
@pytest.mark.parametrize(
    ("kind", "dtype", "way"),
    [
        ("numpy", "float64", "0"),
        ("torch", "bfloat16", "0"),
        ("numpy", "float32", "1"),
        ("torch", "float64", "1"),
        ("torch", "bfloat16", "1"),
    ],
)
@rules
def test_loops_around_a_transform_give_what_the_rule_gives(rule, kind, dtype, way, update, switch, monkeypatch):
    counter = Counter(monkeypatch)
    switch("rules")
    state_alone, model_alone = trained(rule, model_of, kind, dtype, update, **LINE)
    assert counter.runs == 0
    switch(way)
    state, model = trained(rule, model_of, kind, dtype, update, **LINE)
    assert held(state) == len(state._slots)
    assert (counter.runs > 0) == (way == "1")
    assert model["tied"] is model["w1"]
    assert_alike(model.values(), model_alone.values(), TOLERANCES[dtype])
    for name in model:
        assert_alike(state_leaves(state[name].state), state_leaves(state_alone[name].state), TOLERANCES[dtype])


def transformed(monkeypatch):
    """The shapes of what is transformed from now on."""
    shapes = []
    step = muon.matrix_step
    monkeypatch.setattr(muon, "matrix_step", lambda rule, u: shapes.append(tuple(u.shape)) or step(rule, u))
    return shapes


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_alike_arrays_are_transformed_as_stacks_of_bounded_size(kind, switch, monkeypatch):
    switch("1")
    shapes = transformed(monkeypatch)
    monkeypatch.setattr(stacking, "ALONE_FROM", 40)
    monkeypatch.setattr(stacking, "CPU_STACK", 80)
    rng = np.random.default_rng(0)
    model = {str(i): drawn((6, 4), kind, "float32", rng) for i in range(5)}
    model |= {f"larger {i}": drawn((6, 6), kind, "float32", rng) for i in range(3)}
    model |= {"large": drawn((6, 7), kind, "float32", rng), "turned": drawn((6, 4), kind, "float32", rng, order=(1, 0))}
    state = opt.setup(opt.Muon(), model)
    state, model = opt.update_(state, model, model)
    assert sorted(shapes) == sorted([(3, 6, 4), (2, 6, 4), (2, 6, 6), (6, 6), (6, 7), (6, 4)])
    shapes.clear()
    opt.update_(state, model, model | {"0": None, "large": None})
    assert sorted(shapes) == sorted([(3, 6, 4), (6, 4), (2, 6, 6), (6, 6), (6, 4)])


def test_only_one_stack_is_in_memory_at_a_time(switch, monkeypatch):
    switch("1")
    alive, results = [], []
    step = muon.matrix_step

    def watch(rule, u):
        assert not any(reference() is not None for reference in [*alive, *results])
        alive.append(weakref.ref(u))
        found = step(rule, u)
        results.append(weakref.ref(found))
        return found

    monkeypatch.setattr(muon, "matrix_step", watch)
    monkeypatch.setattr(stacking, "ALONE_FROM", 1)
    model = {str(i): torch.ones(6, 4) for i in range(4)}
    opt.update_(opt.setup(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Muon()), model), model, model)
    assert len(alive) == 4


@pytest.mark.parametrize("way", ["0", "1"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_fault_that_is_found_changes_nothing(kind, way, switch):
    switch(way)
    rng = np.random.default_rng(0)
    model = {"a": drawn((6, 4), kind, "float32", rng), "b": drawn((6, 4), kind, "float32", rng)}
    before = {name: numpy_of(x).copy() for name, x in model.items()}
    state = opt.setup(opt.OptimiserChain(opt.Muon(), opt.ClipNorm(0.1, throw=True)), model)
    grads = {name: x * np.inf for name, x in model.items()}
    with pytest.raises(opt.NonFiniteError, match="ClipNorm at 'a'"):
        opt.update_(state, model, grads)
    for name, x in model.items():
        np.testing.assert_array_equal(numpy_of(x), before[name])
    state, model = opt.update_(state, model, {name: x * 0.5 for name, x in model.items()})
    assert held(state) == 2


def test_old_models_and_states_stay_as_they_are(switch):
    switch("1")
    rng = np.random.default_rng(0)
    model = {name: drawn((40, 30), "torch", "float32", rng) for name in "abc"}
    state = opt.setup(opt.Muon(), model)
    kept = []
    for _ in range(5):
        state, model = opt.update(state, model, {name: 0.1 * x for name, x in model.items()})
        kept.append((model, [x.clone() for x in model.values()], state, [state[k].state.clone() for k in model]))
    for held_model, copies, held_state, moments in kept:
        assert all(torch.equal(a, b) for a, b in zip(held_model.values(), copies, strict=True))
        assert all(torch.equal(held_state[k].state, m) for k, m in zip("abc", moments, strict=True))


@dataclass(frozen=True)
class ByShape(opt.AbstractRule):
    """Stackable, and depends on the shape, which a trace does not know."""

    law = "stackable"

    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return state, dx * x.shape[-1]

    def stacked(self):
        return self


@dataclass(frozen=True)
class Anew(opt.AbstractRule):
    """Stackable, and elementwise in truth."""

    law = "stackable"

    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return state, 0.5 * dx

    def stacked(self):
        return self


@dataclass(frozen=True)
class Growing(TransformingRule):
    """Gives its transform back in another shape."""

    law = "stackable"

    def init(self, x):
        return None

    def stages(self, state, x, dx):
        return state, (yield Whole(self, dx))

    def transform(self, u):
        return u[..., :1]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_users_rules_are_looped_where_a_trace_tells_all(kind, switch):
    switch("1")
    rng = np.random.default_rng(0)
    model = {"a": drawn((6, 4), kind, "float32", rng), "b": drawn((6, 4), kind, "float32", rng)}
    for rule, factor, looped in ((ByShape(), 4, 0), (Anew(), 0.5, 2)):  # neither warns
        state, new = opt.update(opt.setup(rule, model), model, model)
        assert held(state) == looped
        np.testing.assert_allclose(numpy_of(new["a"]), numpy_of(model["a"]) * (1 - factor), rtol=1e-6)


@pytest.mark.parametrize("way", ["0", "1"])
def test_a_transform_that_changes_the_shape_is_an_error(way, switch):
    switch(way)
    model = {"a": torch.ones(6, 4), "b": torch.ones(6, 4)}
    state = opt.setup(opt.OptimiserChain(Growing(), opt.ClipNorm(1.0)), model)
    with pytest.raises(opt.RuleError, match=r"Growing\(\) made shape \(2, 6, 1\).*of an array of shape \(2, 6, 4\)"):
        opt.update_(state, model, model)
    assert all((x == 1).all() for x in model.values())


@pytest.mark.parametrize("way", ["rules", "0", "1"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_blocks_that_do_not_fit_are_found_before_anything_is_written(kind, way, switch):
    switch(way)
    rng = np.random.default_rng(0)
    model = {"a": drawn((6, 4), kind, "float32", rng), "b": drawn((8, 4), kind, "float32", rng)}
    before = {name: numpy_of(x).copy() for name, x in model.items()}
    state = opt.setup(opt.Muon(blocks=2), model)
    state, model = opt.update_(state, model, {name: 0 * x for name, x in model.items()})
    wrong = opt.adjust(state, blocks=3)
    with pytest.raises(opt.RuleError, match=r"blocks=3 does not divide the output axis of shape \(8, 4\)"):
        opt.update_(wrong, model, model)
    state, model = opt.update_(opt.adjust(state, lambda_=0.0), model, {name: 0 * x for name, x in model.items()})
    for name, x in model.items():
        np.testing.assert_allclose(numpy_of(x), before[name], rtol=1e-3)


def test_a_rule_that_no_loop_can_be_made_of_for_some_numbers_keeps_the_loops_of_others(switch):
    """Neurons of several blocks are scaled by numbers of their own, which loops cannot sum up."""
    switch("1")
    model = {f"w{i}": np.random.default_rng(i).standard_normal((6, 4)) for i in range(3)}

    def count_held(blocks):
        state, _ = opt.update(opt.setup(opt.AdaMuon(blocks=blocks), model), model, model)
        return held(state)

    assert [count_held(blocks) for blocks in (2, 1, 2)] == [0, 3, 0]


@pytest.mark.parametrize("where", [None, "w[01]"])
@pytest.mark.parametrize("fields", [{"eta": 0.05}, {"mu": 0.5}, {"blocks": 2}], ids=str)
def test_stacks_are_kept_while_rules_keep_them_apart_as_before(fields, where, switch):
    """A change of rates does not gather arrays anew; one for some of them, or of how they are cut, does."""
    switch("1")
    rng = np.random.default_rng(0)
    start = {f"w{i}": rng.standard_normal((6, 4)) for i in range(5)}
    lines = []
    for way in ("1", "rules"):
        switch(way)
        state, model = opt.setup(opt.Muon(), {name: x.copy() for name, x in start.items()}), start
        for step in range(4):
            state, model = opt.update(state, model, {name: 0.5 * x + step for name, x in model.items()})
            if step == 1:
                before = [group_state.group for group_state in getattr(state._grouped, "group_states", ())]
                state = opt.adjust(state, where=where, rule=opt.Muon, **fields)
                after = [group_state.group for group_state in getattr(state._grouped, "group_states", ())]
                kept = [a._stacks == b._stacks for a, b in zip(before, after, strict=True)]
                assert kept == ([where is None and "blocks" not in fields] if way == "1" else [])
        lines.append(model)
    for name in start:
        np.testing.assert_allclose(lines[0][name], lines[1][name], rtol=1e-11, atol=1e-12)
