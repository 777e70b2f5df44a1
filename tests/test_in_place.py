"""A step in place writes to nothing but the model and the state that it consumes, and to nothing at all if it raises."""

import copy
from dataclasses import dataclass

import numpy as np
import optree
import pytest
import torch
from torch.utils import _pytree

import optimisers as opt
from looped import SHAPES, Counter, address, arrays, copied, held, raw
from optimisers.errors import ConsumedStateError, HyperParameterError, NonFiniteError, TieError
from table import SignedRoot

LIBRARIES = pytest.mark.parametrize("lib", ["numpy", "torch"])
RULE = opt.OptimiserChain(opt.ClipNorm(100.0), opt.AdamW(0.1, lambda_=0.01))


@pytest.fixture(autouse=True)
def _loops(switch):
    switch("1")


@LIBRARIES
def test_a_step_in_place_keeps_memory(lib):
    model = arrays(lib)
    parameters = {key: address(x) for key, x in model.items()}
    state = opt.setup(RULE, model)
    moments = []
    for step in range(4):
        state, model = opt.update_(state, model, arrays(lib, step))
        moments.append([column.addresses().tolist() for g in state._grouped.group_states for column in g.columns])
        assert {key: address(x) for key, x in model.items()} == parameters
    assert moments[0] == moments[1] == moments[2] == moments[3]


@LIBRARIES
def test_the_first_step_in_place_takes_over_large_moments(lib):
    model = {"w": np.ones((200, 200), np.float32)} if lib == "numpy" else {"w": torch.ones(200, 200)}
    state = opt.setup(opt.Adam(), model)
    before = [address(m) for m in state["w"].state[:2]]
    state, _ = opt.update_(state, model, {"w": 0.1 * model["w"]})
    assert [column.addresses().tolist() for column in state._grouped.group_states[0].columns] == [[at] for at in before]


@LIBRARIES
def test_an_array_of_the_state_that_somebody_holds_is_not_overwritten(lib):
    model = {"w": np.ones((200, 200), np.float32)} if lib == "numpy" else {"w": torch.ones(200, 200)}
    grads = {"w": 0.1 * model["w"]}
    state = opt.setup(opt.Adam(), model)
    for _ in range(3):
        held = state["w"].state[0]
        before = raw(held)
        state, model = opt.update_(state, model, grads)
        assert raw(held) == before
        assert raw(state["w"].state[0]) != before


@dataclass(frozen=True)
class Twins(opt.AbstractRule):
    """A rule that starts with one array at two places of its state, and the same for every parameter of a shape."""

    eta: float = 0.1
    law = "elementwise"

    def init(self, x):
        zeros = ZEROS.setdefault((type(x), tuple(x.shape)), 0 * x)
        return zeros, zeros

    def apply(self, state, x, dx):
        a, b = state
        a, b = 0.5 * a + dx, 0.9 * b - dx
        return (a, b), self.eta * (a + 0.1 * b)


ZEROS = {}


@LIBRARIES
def test_one_array_at_two_places_of_a_state(lib, switch):
    found = []
    for value in ("rules", "0", "1"):
        switch(value)
        model = arrays(lib, shapes={"a": (5,), "b": (5,)})
        state = opt.setup(Twins(), model)
        for step in range(3):
            state, model = opt.update_(state, model, arrays(lib, step, {"a": (5,), "b": (5,)}))
        found.append(raw([state, model]))
    assert found[0] == found[1] == found[2]
    assert all((x == 0).all() for x in ZEROS.values())


@LIBRARIES
@pytest.mark.parametrize("trees", [optree, _pytree], ids=["optree", "torch"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_a_state_that_was_mapped_over_does_not_write_to_the_one_before(lib, trees, later):
    model = arrays(lib)
    state = opt.setup(opt.Momentum(0.1), model)
    state, model = opt.update(state, model, arrays(lib, 1))
    again = trees.tree_map(lambda x: x, state)
    before = raw(state)
    own = copied(model)
    if later:
        none = dict.fromkeys(own)
        again, own = opt.update(again, own, {**none, "tiny": arrays(lib, 2)["tiny"]})
        again, own = opt.update_(again, own, {**none, "small": arrays(lib, 2)["small"]})
    opt.update_(again, own, arrays(lib, 3))
    assert raw(state) == before
    opt.update(state, model, arrays(lib, 3))


def test_read_only_state_arrays_are_not_written():
    x = np.ones(5)
    state = opt.setup(opt.Momentum(0.1), x)
    frozen = optree.tree_map(lambda leaf: np.frombuffer(leaf.tobytes(), leaf.dtype), state)
    (leaf,) = optree.tree_leaves(frozen)
    state, x = opt.update_(frozen, x, np.ones(5))
    assert not leaf.flags.writeable
    assert (leaf == 0).all()
    assert (optree.tree_leaves(state)[0] != 0).all()


@LIBRARIES
@pytest.mark.parametrize(
    "grads",
    [
        lambda state, model: model,
        lambda state, model: {**model, "a": model["b"], "b": model["a"]},
        lambda state, model: {"a": state["a"].state, "b": state["c"].state, "c": model["c"]},
        lambda state, model: {"s": model["s"].T},
        lambda state, model: {"a": model["m"][0], "b": model["m"][1], "c": model["m"][2]},
    ],
    ids=["the parameter", "another parameter", "state arrays", "transposed", "rows of another parameter"],
)
@pytest.mark.parametrize(
    "rule", [opt.Momentum(0.1), opt.OptimiserChain(opt.ClipNorm(0.5), opt.Momentum(0.1))], ids=["", "norm"]
)
def test_gradients_may_lie_in_memory_that_is_written(lib, grads, rule):
    shapes = {"a": (6,), "b": (6,), "c": (6,), "m": (3, 6), "s": (5, 5)}

    def setting():
        model = arrays(lib, shapes=shapes)
        state = opt.setup(rule, model)
        for step in range(2):
            state, model = opt.update_(state, model, arrays(lib, step, shapes))
        return state, model

    def given(state, model):
        plain = {key: _Plain(state[key].state) for key in model}
        return {**dict.fromkeys(shapes), **grads(plain, model)}

    state, model = setting()
    expected = opt.update(state, model, copied(given(state, model)))
    state, model = setting()
    assert raw(opt.update_(state, model, given(state, model))) == raw(expected)


class _Plain:
    """The momentum in a state, whatever stands before it."""

    def __init__(self, state):
        self.state = state[-1] if isinstance(state, tuple) else state


def test_a_gradient_of_another_width_may_begin_where_the_parameter_does():
    found = []
    for shared in (False, True):
        memory_of_both = np.linspace(1, 2, 4096)
        x = memory_of_both.view(np.float32)[:4096]
        dx = memory_of_both if shared else memory_of_both.copy()
        found.append(opt.update_(opt.setup(opt.Descent(0.5), x), x, dx)[1].copy())
    np.testing.assert_array_equal(*found)


@LIBRARIES
def test_a_view_into_the_memory_of_another_model(lib):
    whole = arrays(lib, shapes={"x": (100,)})["x"]
    before = copied(whole)
    part = whole[20:60].reshape(5, 8)
    _, part = opt.update_(opt.setup(opt.Momentum(0.1), part), part, 0 * part + 1)
    assert raw([whole[:20], whole[60:]]) == raw([before[:20], before[60:]])
    assert address(part) == address(whole[20:])
    assert bool((whole[20:60] != before[20:60]).all())


@pytest.mark.parametrize("value", ["0", "1"])
@LIBRARIES
def test_two_parameters_that_became_one(lib, value, switch):
    switch(value)
    model = arrays(lib, shapes={"a": (6,), "b": (6,)})
    state = opt.setup(opt.Momentum(0.1), model)
    model["b"] = model["a"]
    before = raw([state, model])
    with pytest.raises(TieError, match="'a' and 'b' were two arrays at setup and are one now"):
        opt.update_(state, model, arrays(lib, 1, {"a": (6,), "b": (6,)}))
    assert raw([state, model]) == before


def test_read_only_parameters_are_exchanged():
    model = arrays("numpy")
    state = opt.setup(RULE, model)
    state, model = opt.update_(state, model, arrays("numpy", 1))
    expected = opt.update(state, model, arrays("numpy", 2))[1]
    old = model["small"]
    old.flags.writeable = False
    before = old.tobytes()
    state, model = opt.update_(state, model, arrays("numpy", 2))
    assert held(state) == len(SHAPES)
    assert old.tobytes() == before
    assert raw(model) == raw(expected)
    opt.update_(state, model, arrays("numpy", 3))


def test_autograd_notices_a_step_in_place():
    w = torch.ones(50, requires_grad=True)
    state = opt.setup(opt.Momentum(0.1), w)
    state, w = opt.update_(state, w, torch.ones(50))
    loss = (w * w).sum()
    opt.update_(state, w, torch.ones(50))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- calls that raise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [opt.update, opt.update_])
@LIBRARIES
def test_a_call_that_raises_changes_nothing(lib, update, monkeypatch):
    counter = Counter(monkeypatch)

    def falling(step):
        return 0.1 if step < 3 else -1.0

    late = opt.OptimiserChain(opt.Adam(), opt.ClipNorm(0.1))
    rules = {"large": late, "small": late, "tiny": opt.Scheduled(opt.Adam(), eta=falling), "matrix": SignedRoot()}
    model = arrays(lib)
    state = opt.setup(lambda param: rules[param.path], model)
    for step in range(2):
        state, model = update(state, model, arrays(lib, step))
    runs = counter.runs
    for error, step in ((NonFiniteError, 2), (HyperParameterError, 3)):
        grads = arrays(lib, step)
        if error is NonFiniteError:
            grads["small"][7] = np.inf
        before = raw([state, model, grads])
        with pytest.raises(error, match=r"'small'|'tiny'"):
            opt.update_(state, model, grads)
        assert raw([state, model, grads]) == before
        if error is NonFiniteError:
            state, model = update(state, model, arrays(lib, step))
    assert counter.runs > runs


# --- consumed states ---------------------------------------------------------------------------------------------------------


@LIBRARIES
def test_a_step_in_place_consumes_what_shares_memory(lib):
    model = arrays(lib)
    state = opt.setup(RULE, model)
    for step in range(2):
        state, model = opt.update(state, model, arrays(lib, step))
    sharing = [state, opt.adjust(state, 0.3), opt.freeze(state, where="large"), copy.copy(state)]
    apart = [copy.deepcopy(state), optree.tree_map(lambda x: 1 * x, state), opt.update(state, model, arrays(lib, 2))[0]]
    before = raw(apart)
    state, model = opt.update_(state, model, arrays(lib, 3))
    for old in sharing:
        for use in (lambda s: s["large"], optree.tree_leaves, lambda s: opt.update(s, model, None), opt.thaw):
            with pytest.raises(ConsumedStateError):
                use(old)
    assert raw(apart) == before
    for other in apart:
        opt.update_(other, copied(model), arrays(lib, 4))
    opt.update(state, model, arrays(lib, 4))


@LIBRARIES
def test_an_unstepped_large_array_is_shared_with_the_state_before(lib):
    model = arrays(lib)
    state = opt.setup(RULE, model)
    later, _ = opt.update(state, model, {**arrays(lib), "large": None})
    assert address(later["large"].state[1][0]) == address(state["large"].state[1][0])
    opt.update_(later, copied(model), arrays(lib, 1))
    with pytest.raises(ConsumedStateError):
        opt.update(state, model, arrays(lib, 1))
