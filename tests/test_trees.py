"""Trees of every form: a tree of arrays is stepped as each of its distinct arrays would be alone."""

import os
import random
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

import optimisers as opt
from optimisers.arrays import kind

SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
RULES = (
    opt.Adam(eta=0.1),
    opt.OptimiserChain(opt.ClipNorm(0.5), opt.Momentum(0.1)),
    opt.OptimiserChain(opt.AccumGrad(2), opt.AdamW(lambda_=0.1)),
    opt.RAdam(),
    opt.Lion(),
)
SHAPES = ((), (1,), (3,), (0,), (2, 3), (3, 2), (2, 2, 2), (0, 2))


class Pair(NamedTuple):
    first: Any
    second: Any


class Code:
    """A leaf to be made: what it is, and a number to choose ties by."""

    def __init__(self, what, number):
        self.what, self.number = what, number

    def __repr__(self):
        return f"{self.what}#{self.number}"


codes = st.builds(
    Code,
    st.one_of(st.sampled_from(SHAPES), st.sampled_from(["tie", "transposed", "none", "whole", "number", "text", "flag"])),
    st.integers(0, 1000),
)
KEYS = st.one_of(st.sampled_from(["a", "b", "weight", "bias", "with.dot", ""]), st.text("xyz\\.", max_size=3))


def containers(children):
    return st.one_of(
        st.lists(children, max_size=6),
        st.lists(children, max_size=6).map(tuple),
        st.dictionaries(KEYS, children, max_size=6),
        st.dictionaries(KEYS, children, max_size=4).map(OrderedDict),
        st.dictionaries(st.integers(0, 9), children, max_size=4),
        st.builds(Pair, children, children),
    )


plans = st.recursive(codes, containers, max_leaves=40)


def large_plan(seed, leaves=300):
    """A deep and wide tree, built without shrinking."""
    rng = random.Random(seed)

    def node(budget, depth):
        if budget <= 1 or depth == 0:
            what = rng.choice([*SHAPES, *SHAPES, "tie", "transposed", "none", "whole", "number", "text", "flag"])
            return Code(what, rng.randrange(1000))
        count = min(budget, rng.randint(2, 8))
        children = [node(budget // count, depth - 1) for _ in range(count)]
        form = rng.randrange(4)
        if form == 0:
            return children
        if form == 1:
            return tuple(children)
        return Pair(*children[:2]) if form == 2 else {f"k{i}": child for i, child in enumerate(children)}

    return [node(leaves // 6, 9) for _ in range(12)]


def build(plan, lib, seed=0):
    """The model of a plan."""
    rng = np.random.default_rng(seed)
    plans, spec = optree.tree_flatten(plan, none_is_leaf=True)
    arrays, leaves = [], []
    for code in plans:
        what = code.what
        if isinstance(what, tuple):
            values = np.asarray(rng.standard_normal(what))
            leaves.append(values if lib == "numpy" else torch.tensor(values))
            if 0 not in what:  # zero-size arrays never tie
                arrays.append(leaves[-1])
        elif what in {"tie", "transposed"}:
            other = arrays[code.number % len(arrays)] if arrays else None
            turn = other is not None and what == "transposed" and other.ndim == 2
            leaves.append(other.T if turn else other)
        else:
            whole = np.arange(3) if lib == "numpy" else torch.arange(3)
            leaves.append({"none": None, "whole": whole, "number": 1.5, "text": "name", "flag": True}[what])
    return spec.unflatten(leaves)


def leaves_of(model):
    return optree.tree_leaves(model, none_is_leaf=True)


def is_array(leaf):
    return kind(leaf) is not None and (leaf.dtype.kind == "f" if isinstance(leaf, np.ndarray) else leaf.is_floating_point())


def address(x):
    """The same for all places of one array: zero-size arrays are told apart by identity, as they never tie."""
    if 0 in x.shape:
        return id(x)
    return x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else x.data_ptr()


def places(model):
    """The distinct arrays, each with the leaves where it stands."""
    found = {}
    for i, leaf in enumerate(leaves_of(model)):
        if is_array(leaf):
            found.setdefault(address(leaf), []).append(i)
    return list(found.values())


def draw_grads(model, seed, *, absent=True):
    """Gradients of the model's structure, some of them absent."""
    rng = np.random.default_rng(seed)
    leaves, spec = optree.tree_flatten(model, none_is_leaf=True)
    grads = []
    for leaf in leaves:
        if not is_array(leaf) or (absent and rng.random() < 0.2):
            grads.append(None)
        else:
            values = np.asarray(rng.standard_normal(tuple(leaf.shape)))
            grads.append(values if isinstance(leaf, np.ndarray) else torch.tensor(values))
    return spec.unflatten(grads)


def data(x):
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def check_update(lib, model, rule):
    """Three steps of a tree, and of each distinct array alone."""
    before, spec = optree.tree_flatten(model, none_is_leaf=True)
    groups = places(model)
    state = opt.setup(rule, model)
    alone = [(opt.setup(rule, before[group[0]]), before[group[0]]) for group in groups]
    for step in range(3):
        grads = draw_grads(model, step)
        given = leaves_of(grads)
        state, model = opt.update(state, model, grads)
        after, after_spec = optree.tree_flatten(model, none_is_leaf=True)
        assert after_spec == spec
        for n, group in enumerate(groups):
            here = [(given[i], before[i].shape != before[group[0]].shape or strides_differ(before, i, group[0])) for i in group]
            parts = [g.T if turned else g for g, turned in here if g is not None]
            if parts:
                total = sum(parts[1:], parts[0])
                alone[n] = opt.update(*alone[n], np.asarray(total) if lib == "numpy" else total)
            expected = alone[n][1]
            for i, (_, turned) in zip(group, here, strict=True):
                np.testing.assert_array_equal(data(after[i]), data(expected.T if turned else expected))
        for i, leaf in enumerate(before):
            assert is_array(leaf) or after[i] is leaf
    assert places(model) == groups
    return state, model


def strides_differ(leaves, i, j):
    def strides(x):
        return x.strides if isinstance(x, np.ndarray) else x.stride()

    return strides(leaves[i]) != strides(leaves[j])


def trains(model):
    return any(is_array(leaf) for leaf in leaves_of(model))


LIBRARIES = pytest.mark.parametrize("lib", ["numpy", "torch"])


@LIBRARIES
@SETTINGS
@given(plan=plans, rule=st.sampled_from(RULES))
def test_a_tree_is_stepped_as_its_arrays(lib, plan, rule):
    model = build(plan, lib)
    assume(trains(model))
    check_update(lib, model, rule)


@LIBRARIES
@pytest.mark.parametrize("seed", range(4))
def test_a_large_tree_is_stepped_as_its_arrays(lib, seed):
    model = build(large_plan(seed), lib)
    assert len(leaves_of(model)) > 100
    check_update(lib, model, RULES[seed])


@LIBRARIES
@SETTINGS
@given(plan=plans, rule=st.sampled_from(RULES))
def test_update_in_place_keeps_the_tree(lib, plan, rule):
    model, twin = build(plan, lib), build(plan, lib)
    assume(trains(model))
    state, in_place = opt.setup(rule, model), opt.setup(rule, twin)
    for step in range(2):
        grads = draw_grads(model, step)
        state, model = opt.update(state, model, grads)
        in_place, returned = opt.update_(in_place, twin, grads)
        assert returned is twin
        assert in_place == state
        for a, b in zip(leaves_of(twin), leaves_of(model), strict=True):
            if is_array(a):
                np.testing.assert_array_equal(data(a), data(b))


@LIBRARIES
@SETTINGS
@given(plan=plans)
def test_destructure_round_trip(lib, plan):
    model = build(plan, lib)
    assume(trains(model))
    leaves, groups = leaves_of(model), places(model)
    flat, rebuild = opt.destructure(model)
    distinct = [leaves[group[0]] for group in groups]
    assert all(a is b for a, b in zip(opt.trainables(model), distinct, strict=True))
    np.testing.assert_array_equal(data(flat), np.concatenate([data(x).reshape(-1) for x in distinct]))
    for factor in (1.0, 2.0):
        again = rebuild(flat * factor)
        assert optree.tree_structure(again, none_is_leaf=True) == optree.tree_structure(model, none_is_leaf=True)
        assert places(again) == groups
        for old, new in zip(leaves, leaves_of(again), strict=True):
            if is_array(old):
                np.testing.assert_array_equal(data(new), factor * data(old))
            else:
                assert new is old


@pytest.mark.parametrize("placed", [None, 0, "text", object()], ids=["None", "number", "text", "object"])
def test_a_state_keeps_its_leaves_whatever_a_pytree_map_makes_of_them(placed):
    state = opt.setup(opt.AdamW(eta=torch.tensor(0.1)), {"w": torch.ones(2), "b": torch.ones(3)})
    leaves, spec = _pytree.tree_flatten(state)
    assert len(leaves) == 9  # m, v and two powers of each, and the learning rate
    again, spec = _pytree.tree_flatten(_pytree.tree_unflatten([placed] * 9, spec))
    assert len(again) == 9
    assert placed == 0 or all(leaf is placed for leaf in again)  # a number in the place of a state is shown as a tensor
    assert _pytree.tree_unflatten(leaves, spec) == state


def test_states_may_be_set_up_under_vmap_each_with_its_learning_rate():
    etas = torch.tensor([0.1, 0.2])
    states = torch.func.vmap(lambda eta, w: opt.setup(opt.Descent(eta), {"w": w}))(etas, torch.ones(2, 3))
    _, stepped = torch.func.vmap(opt.update)(states, {"w": torch.ones(2, 3)}, {"w": torch.ones(2, 3)})
    assert torch.equal(stepped["w"], (1 - etas)[:, None].expand(2, 3))


@LIBRARIES
@SETTINGS
@given(plan=plans, rule=st.sampled_from(RULES))
def test_a_state_is_a_pytree(lib, plan, rule):
    model = build(plan, lib)
    assume(trains(model))
    state, _ = opt.update(opt.setup(rule, model), model, draw_grads(model, 0))
    leaves, spec = optree.tree_flatten(state)
    assert spec.unflatten(leaves) == state
    torch_leaves, torch_spec = _pytree.tree_flatten(state)
    assert _pytree.tree_unflatten(torch_leaves, torch_spec) == state
    assert len(torch_leaves) == len(leaves)
    assert optree.tree_map(lambda leaf: leaf, state) == state
    assert optree.tree_map(lambda a, b: b, state, state) == state
    assert optree.tree_structure(state) == spec
    if lib == "torch":
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    arrays = [leaf for leaf in leaves if kind(leaf)]
    assert len({id(leaf) for leaf in arrays}) == len(arrays)  # a tied array's state is there once
    # Mapped over, the state still fits the model.
    doubled = optree.tree_map(lambda leaf: leaf * 1, state)
    opt.update(doubled, model, draw_grads(model, 1))


@LIBRARIES
@SETTINGS
@given(plan=plans, rule=st.sampled_from(RULES))
def test_a_state_is_indexed_like_its_model(lib, plan, rule):
    model = build(plan, lib)
    assume(trains(model))
    state = opt.setup(rule, model)
    count = 0
    accessors, leaves, _ = optree.tree_flatten_with_accessor(model, none_is_leaf=True)
    for accessor, leaf in zip(accessors, leaves, strict=True):
        node, place = state, model
        for entry in accessor:
            node = getattr(node, entry.field) if isinstance(place, Pair) else node[entry.entry]
            place = entry(place)
        node = node[()] if len(accessor) == 0 else node
        if is_array(leaf):
            count += 1
            assert isinstance(node, opt.Leaf)
            assert node.rule == rule
            assert node.state is None or node == opt.Leaf(rule, node.state)
        else:
            assert node is None
    assert count == sum(map(len, places(model)))


@LIBRARIES
@SETTINGS
@given(plan=plans)
def test_equality_and_text(lib, plan):
    model = build(plan, lib)
    assume(trains(model))
    state, other = opt.setup(opt.Adam(), model), opt.setup(opt.Adam(), model)
    assert state == other
    assert state != opt.setup(opt.Adam(0.1), model)
    assert state != "state"
    assert opt.freeze(state) != state
    assert opt.thaw(opt.freeze(state)) == state
    after, _ = opt.update(state, model, draw_grads(model, 0, absent=False))
    assert after != state
    text = str(state)
    assert "Adam(eta=0.001)" in text
    arrays = [leaves_of(model)[group[0]] for group in places(model)]
    sizes = sum(x.size if lib == "numpy" else x.numel() for x in arrays)
    assert re.search(rf"^{len(arrays)} arrays?, {sizes:,} parameters?, ", text, re.MULTILINE)
    with pytest.raises(TypeError, match="unhashable"):
        hash(state)


def test_paths_stand_in_the_table():
    model = {"layers": [{"w": np.ones((2, 3))}, {"w": np.ones(3)}], "a.b": np.asarray(1.0)}
    model["tied"] = model["layers"][0]["w"]
    text = str(opt.setup(opt.Adam(), model))
    shown = [line.split("  ")[0] for line in text.splitlines()[2:5]]
    assert shown == ["a.b", "layers.0.w = tied", "layers.1.w"]


# --- without torch -------------------------------------------------------------------------------------------------------

NUMPY_WORK = """
import copy, pickle, sys, warnings
warnings.simplefilter("error")
{before}
import numpy as np
import optimisers as opt
{after}
from table import cases

rng = np.random.default_rng(0)
for name, row, rule in cases():
    model = {{"a": rng.standard_normal((3, 4)), "b": [rng.standard_normal((2, 2)), None, 3]}}
    model["tied"] = model["a"]
    state = opt.setup(rule, model)
    for _ in range(2):
        grads = {{"a": rng.standard_normal((3, 4)), "b": [rng.standard_normal((2, 2)), None, None], "tied": None}}
        state, model = opt.update(state, model, grads)
    state, model = opt.update_(state, model, grads)
    assert state == copy.deepcopy(state) == pickle.loads(pickle.dumps(state))
    str(state), repr(rule), state["b"][0]
    state = opt.thaw(opt.freeze(state, where="a"))
flat, rebuild = opt.destructure(model)
rebuild(flat)
opt.trainables(model, path=True)
opt.adjust(opt.setup(opt.Adam(), model), 0.1)
opt.setup(opt.Route((("a", "tied"), opt.Adam()), otherwise=opt.Descent()), model)
try:
    opt.setup(opt.Adam(), {{"a": np.arange(3)}})
except opt.ModelError:
    pass
assert {check}
print("done")
"""


def in_a_fresh_interpreter(code):
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


def test_numpy_work_never_imports_torch():
    unasked = "not {'torch', 'jax', 'optax'} & set(sys.modules)"
    in_a_fresh_interpreter(NUMPY_WORK.format(before="", after=f"assert {unasked}", check=unasked))


def test_everything_numpy_works_without_torch():
    check = "sys.modules['torch'] is None"
    in_a_fresh_interpreter(NUMPY_WORK.format(before="sys.modules['torch'] = None", after="", check=check))


def test_torch_may_be_imported_after_a_state_was_made():
    in_a_fresh_interpreter(
        "import numpy as np, optimisers as opt\n"
        "state = opt.setup(opt.Adam(), {'a': np.ones(3)})\n"
        "import torch\n"
        "from torch.utils import _pytree\n"
        "model = {'a': torch.ones(3)}\n"
        "state, model = opt.update(opt.setup(opt.Adam(), model), model, {'a': torch.ones(3)})\n"
        "assert len(_pytree.tree_leaves(state)) == 4\n"
        "print('done')"
    )
