"""What holds for every rule of the table, over NumPy and over torch."""

import copy
import dataclasses
import itertools
import math
import pickle
import re

import numpy as np
import optree
import pytest
import torch

import optimisers as opt
import table
from optimisers.arrays import dtype_name, is_number, kind
from optimisers.errors import ConsumedStateError, RuleError
from optimisers.rules._base import Assign, children, walk, with_child
from optimisers.rules._precision import lacks_range, usable_in_float16
from optimisers.rules._states import map_state, state_leaves
from table import ROWS, cases

SHAPES = ((3, 4), (4,), (), (0, 3))
REAL = {"numpy": ("float16", "float32", "float64"), "torch": ("float16", "bfloat16", "float32", "float64")}
COMPLEX = ("complex64", "complex128")
LIBRARIES = pytest.mark.parametrize("lib", ["numpy", "torch"])


def every(**claims):
    """Parametrise over the configurations of the rows with these claims."""
    found = cases(**claims)
    return pytest.mark.parametrize(("row", "rule"), [pytest.param(row, rule, id=name) for name, row, rule in found])


def accepted(row, lib):
    """The real dtypes of a library that a rule takes, narrow ones first."""
    return tuple(dtype for dtype in REAL[lib] if dtype not in row.refuses)


@every()
def test_numbers_of_numpy_are_taken_as_numbers(row, rule):
    def numpys(value):
        kinds = {int: np.int64, float: np.float64}
        if isinstance(value, tuple):
            return tuple(map(numpys, value))
        return kinds[type(value)](value) if type(value) in kinds else value

    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if not field.name.startswith("_"):
            assert repr(rule.replace(**{field.name: numpys(value)})) == repr(rule)


# --- arrays and trees ----------------------------------------------------------------------------------------------------


class Draw:
    """Seeded arrays of one library."""

    def __init__(self, lib, dtype="float64", seed=0):
        self.lib, self.dtype, self.rng = lib, dtype, np.random.default_rng(seed)

    def __call__(self, *shape, dtype=None):
        dtype = dtype or self.dtype
        values = self.rng.standard_normal(shape)
        if dtype.startswith("complex"):
            values = values + 1j * self.rng.standard_normal(shape)
        return convert(np.asarray(values), self.lib, dtype)

    def like(self, tree):
        return optree.tree_map(lambda x: self(*x.shape), tree)

    def model(self, row):
        first, *rest = [self(*shape) for shape in SHAPES if len(shape) >= row.min_ndim]
        return {"w": first, "rest": rest}


def convert(values, lib, dtype):
    return values.astype(dtype) if lib == "numpy" else torch.tensor(values).to(getattr(torch, dtype))


def raw(x):
    """Everything that makes an array what it is."""
    if is_number(x):
        return x
    data = x.tobytes() if isinstance(x, np.ndarray) else x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return dtype_name(x), tuple(x.shape), data


def snapshot(*trees):
    return [raw(leaf) for leaf in optree.tree_leaves(trees, none_is_leaf=False)]


def values(x):
    """An array as NumPy's, in the widest precision."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        x = x.to(torch.complex128 if x.is_complex() else torch.float64).numpy()
    return np.asarray(x, dtype=np.result_type(np.asarray(x).dtype, np.float64))


def assert_close(actual, expected, rtol=1e-12, atol=0.0):
    actual, expected = optree.tree_leaves(actual), optree.tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(values(a), values(b), rtol=rtol, atol=atol)


def run(rule, model, gradients, state=None, update=opt.update):
    state = opt.setup(rule, model) if state is None else state
    for grads in gradients:
        state, model = update(state, model, grads)
    return state, model


# --- the rule as a value -------------------------------------------------------------------------------------------------


@every()
def test_law_is_as_claimed(row, rule):
    assert rule.law == row.law


@every(rebuilds=True)
def test_repr_evaluates_to_an_equal_rule(row, rule):
    again = eval(repr(rule), vars(opt) | vars(table) | {"inf": math.inf})
    assert type(again) is type(rule)
    assert again == rule
    assert repr(again) == repr(rule)


@every()
def test_equality_and_hash(row, rule):
    same = copy.deepcopy(rule)
    assert same == rule
    assert hash(same) == hash(rule)
    assert len({rule, same}) == 1
    assert rule != "rule"
    for other in row.configs:
        assert (other == rule) is (other is rule)


@every()
def test_rule_survives_pickle_and_copy(row, rule):
    for again in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule), copy.copy(rule)):
        assert again == rule
        assert hash(again) == hash(rule)


@every()
def test_fields_cannot_be_assigned(row, rule):
    for name in vars(rule):
        with pytest.raises(AttributeError):
            setattr(rule, name, 1.0)


@pytest.mark.parametrize(
    ("row", "keywords", "error", "fragment"),
    [pytest.param(row, *bad, id=f"{row.name}-{i}") for row in ROWS for i, bad in enumerate(row.bad)],
)
def test_bad_input(row, keywords, error, fragment):
    with pytest.raises(error, match=re.escape(fragment)):
        row.make(**keywords)


@LIBRARIES
@every(every=False, complex=False)
def test_complex_arrays_are_refused_at_setup(row, rule, lib):
    model = {"a": {"b": Draw(lib, "complex64")(3, 4)}}
    with pytest.raises(RuleError, match=r"'a\.b'.*complex"):
        opt.setup(rule, model)


# --- purity --------------------------------------------------------------------------------------------------------------


@LIBRARIES
@every()
def test_update_writes_to_nothing(row, rule, lib):
    draw = Draw(lib, "float32")
    model = draw.model(row)
    state, model = run(rule, model, [draw.like(model)])
    grads = draw.like(model)
    kept, shown, before = copy.deepcopy(state), repr(state), snapshot(state, model, grads)
    after, moved = opt.update(state, model, grads)
    assert snapshot(state, model, grads) == before
    assert state == kept
    assert repr(state) == shown
    # Nor may a later write to a gradient or the old model reach the new state or model.
    copies, new = snapshot(after, moved), optree.tree_leaves(moved)
    for x in optree.tree_leaves((model, grads)):
        if not any(x is y for y in new):  # AccumGrad returns the same array while it gathers
            x[...] = 7.0
    assert snapshot(after, moved) == copies


@LIBRARIES
@every()
def test_update_in_place_gives_the_same_bytes(row, rule, lib):
    draw = Draw(lib)
    model = draw.model(row)
    pure = mutable = opt.setup(rule, model)
    leaves = optree.tree_map(lambda x: x.copy() if lib == "numpy" else x.clone(), model)
    mutable = opt.setup(rule, leaves)
    for _ in range(4):
        grads = draw.like(model)
        before = snapshot(grads)
        pure, model = opt.update(pure, model, grads)
        consumed = mutable
        mutable, returned = opt.update_(mutable, leaves, grads)
        assert snapshot(grads) == before
        assert all(a is b for a, b in zip(optree.tree_leaves(returned), optree.tree_leaves(leaves), strict=True))
        assert snapshot(returned) == snapshot(model)
        assert mutable == pure
        with pytest.raises(ConsumedStateError, match="consumed by update_"):
            opt.update(consumed, leaves, grads)


# --- laws ----------------------------------------------------------------------------------------------------------------


def side_by_side(rule, whole, parts):
    """One step of a whole array, and one of each of its parts, given the measures of the whole."""
    with np.errstate(all="ignore"):
        runs = [rule.stages(*job) for job in (whole, *parts)]
        results = [None] * len(runs)
        measures = [None] * len(runs)
        while None in results:
            requests = []
            for i, stages in enumerate(runs):
                try:
                    requests.append(stages.send(measures[i]))
                except StopIteration as stop:
                    results[i] = stop.value
            assert len(requests) in {0, len(runs)}
            if requests:
                whole_measure = requests[0].rule.combine([requests[0].value])
                combined = requests[0].rule.combine([r.value for r in requests[1:]]) if requests[0].rule.scope else None
                if combined is not None:
                    assert_close(combined, whole_measure, rtol=1e-6)
                measures = [whole_measure] * len(runs)
    return results


def assert_law(rule, lib, dtype, shape, pieces, *, exact):
    """apply on a whole is the whole of the applies on its pieces, for a few steps from the state of the whole."""
    draw = Draw(lib, dtype)
    x = draw(*shape)
    state = rule.init(x)

    def cut(tree, piece):
        return map_state(lambda leaf: leaf[piece] if kind(leaf) and tuple(leaf.shape) == shape else leaf, tree)

    for piece in pieces:
        assert_same(rule.init(x[piece]), cut(state, piece), exact=exact)
    for _ in range(4):
        dx = draw(*shape)
        whole, *parts = side_by_side(rule, (state, x, dx), [(cut(state, p), x[p], dx[p]) for p in pieces])
        after, step = whole
        for piece, (part_state, part_step) in zip(pieces, parts, strict=True):
            assert_same(part_state, cut(after, piece), exact=exact)
            assert_same(part_step, cut(step, piece), exact=exact)
        state = after
        x = x if step is None else step.value if isinstance(step, Assign) else x - step


def assert_same(a, b, *, exact):
    a, b = state_leaves(a), state_leaves(b)
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        if exact:
            assert raw(left) == raw(right)
        else:
            np.testing.assert_allclose(values(left), values(right), rtol=1e-6 if "32" in str(right) else 1e-13, atol=1e-15)


@LIBRARIES
@every(law="elementwise")
def test_elementwise_law(row, rule, lib):
    pieces = [np.s_[:3], np.s_[3:20], np.s_[20:]]
    for dtype in ("float32", "float64"):
        assert_law(rule, lib, dtype, (37,), pieces, exact=True)
    if row.complex:  # a vectorised magnitude may round differently from a scalar one
        assert_law(rule, lib, "complex128", (37,), pieces, exact=False)


@LIBRARIES
@every(law="measured")
def test_measured_law(row, rule, lib):
    pieces = [np.s_[:3], np.s_[3:20], np.s_[20:]]
    for dtype in ("float32", "float64"):
        assert_law(rule, lib, dtype, (37,), pieces, exact=True)
    if row.complex:
        assert_law(rule, lib, "complex128", (37,), pieces, exact=False)


@LIBRARIES
@every(law="stackable")
def test_stackable_law(row, rule, lib):
    assert row.stacked is not None, "a stackable row says in `stacked` how its rule treats one more dimension as a stack"
    draw, on_stack = Draw(lib), row.stacked(rule)
    x = draw(3, 4, 5)
    states, state = [rule.init(x[i]) for i in range(3)], on_stack.init(x)
    for _ in range(3):
        dx = draw(3, 4, 5)
        state, step = on_stack.apply(state, x, dx)
        alone = [rule.apply(states[i], x[i], dx[i]) for i in range(3)]
        states = [s for s, _ in alone]
        for i, (_, part) in enumerate(alone):
            np.testing.assert_allclose(values(step)[i], values(part), rtol=1e-10, atol=1e-14)
        x = x - step


@LIBRARIES
@pytest.mark.parametrize("rule", [pytest.param(row.configs[0], id=row.name) for row in ROWS if row.law == "elementwise"])
def test_elementwise_rules_are_stackable(rule, lib):
    draw = Draw(lib)
    x, dx = draw(3, 4, 5), draw(3, 4, 5)
    with np.errstate(all="ignore"):
        _, step = rule.apply(rule.init(x), x, dx)
        for i in range(3):
            _, part = rule.apply(rule.init(x[i]), x[i], dx[i])
            assert part is step is None or raw(unwrapped(part)) == raw(unwrapped(step)[i])


def unwrapped(step):
    return step.value if isinstance(step, Assign) else step


@every()
def test_numpy_and_torch_agree(row, rule):
    ends = []
    for lib in ("numpy", "torch"):
        draw = Draw(lib)
        model = draw.model(row)
        ends.append(run(rule, model, [draw.like(model) for _ in range(5)]))
    (state, model), (torch_state, torch_model) = ends
    rtol, atol = (1e-11, 1e-14) if in_float64(rule) else (1e-5, 1e-7)
    assert_close(torch_model, model, rtol, atol)
    assert_close(optree.tree_leaves(torch_state), optree.tree_leaves(state), rtol, atol)


# --- dtype, shape, device, strides ---------------------------------------------------------------------------------------


def layouts(lib, draw):
    """Arrays laid out in the ways that code gets wrong."""
    yield draw(3, 4)
    yield draw(4, 3).T
    yield draw(1, 1)
    yield draw(4)
    yield draw()
    yield draw(0, 3)
    image = draw(2, 5, 4, 3)
    yield image.transpose(0, 3, 1, 2) if lib == "numpy" else image.permute(0, 3, 1, 2)  # channels last
    yield draw(8, 6)[::2, ::3]


def strides(x):
    return x.strides if isinstance(x, np.ndarray) else x.stride()


def elements(steps, x):
    """Strides counted in elements."""
    return tuple(step // x.itemsize for step in steps) if isinstance(x, np.ndarray) else tuple(steps)


def is_dense(x):
    """Whether x fills its memory, so that a new array can have the same strides (those of axes of size 1 mean nothing)."""
    order = sorted(zip(elements(strides(x), x), x.shape, strict=True))
    return all(step == math.prod(n for _, n in order[:i]) for i, (step, _) in enumerate(order)) and not {0, 1} & set(x.shape)


@LIBRARIES
@every()
def test_dtype_shape_device_and_strides_are_kept(row, rule, lib):
    master = {inner.dtype for inner in walk(rule) if isinstance(inner, opt.MixedPrecision)}
    for dtype in accepted(row, lib) + (COMPLEX if row.complex else ()):
        draw = Draw(lib, dtype)
        real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
        wide = {"float32": "complex64", "float64": "complex128"}
        squares = {"float32"} if dtype == "float16" else set()
        allowed = {dtype, real} | squares | master | ({wide[name] for name in master} if dtype.startswith("complex") else set())
        for x in layouts(lib, draw):
            if x.ndim < row.min_ndim:
                continue
            state, model = opt.setup(rule, {"x": x}), {"x": x}
            for step in range(3):
                grad = 0.3 * x if step < 2 else draw(*x.shape)  # laid out as x, then row by row
                state, model = opt.update(state, model, {"x": np.asarray(grad) if lib == "numpy" else grad})
                new = model["x"]
                assert type(new) is type(x)
                assert (new.dtype, new.shape) == (x.dtype, x.shape)
                assert lib == "numpy" or new.device == x.device
                assert not is_dense(x) or strides(new) == strides(x)
                for leaf in filter(kind, state_leaves(state["x"].state)) if row.like_x and x.ndim else ():
                    if leaf.ndim:
                        assert dtype_name(leaf) in allowed
                        assert leaf.shape == x.shape
                        assert step == 2 or not is_dense(x) or elements(strides(leaf), leaf) == elements(strides(x), x)


def memory_of(x):
    """An array of either library as NumPy sees its memory."""
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


@LIBRARIES
@every()
def test_a_new_parameter_shares_no_memory_with_the_state(row, rule, lib):
    """What the caller writes to a parameter must not change what a rule remembers."""
    draw = Draw(lib, "float32")
    model = draw.model(row)
    state = opt.setup(rule, model)
    for _ in range(4):
        state, model = opt.update(state, model, draw.like(model))
        arrays = [leaf for leaf in optree.tree_leaves(state) if kind(leaf)]
        for x in optree.tree_leaves(model):
            assert not any(leaf is x or np.shares_memory(memory_of(leaf), memory_of(x)) for leaf in arrays)


@LIBRARIES
@every(every=False, like_x=True)
def test_state_arrays_have_the_shape_of_the_array(row, rule, lib):
    draw = Draw(lib)
    state, _ = run(rule, {"x": draw(3, 4)}, [{"x": draw(3, 4)}])
    assert {tuple(leaf.shape) for leaf in state_leaves(state["x"].state) if kind(leaf)} <= {(3, 4), ()}


@LIBRARIES
@every(every=False)
def test_gradients_of_another_precision_are_taken_in_that_of_the_parameter(row, rule, lib):
    draw = Draw(lib, "float32")
    model = draw.model(row)
    grads = draw.like(model)
    wide = optree.tree_map(lambda g: convert(values(g), lib, "float64"), grads)
    state, moved = run(rule, model, [grads])
    wide_state, wide_moved = run(rule, model, [wide])
    assert snapshot(moved) == snapshot(wide_moved)
    assert wide_state == state


@LIBRARIES
@every()
def test_state_dtype(row, rule, lib):
    master = {inner.dtype for inner in walk(rule) if isinstance(inner, opt.MixedPrecision)}
    for own, wanted in (("float64", "float32"), ("float32", "float64"), ("float16", "float32")):
        if own in row.refuses:
            continue
        draw = Draw(lib, own)
        x = draw(3, 4)
        state = opt.setup(rule, {"x": x}, state_dtype=wanted)
        model = {"x": x}
        for _ in range(3):
            arrays = [leaf for leaf in state_leaves(state["x"].state) if kind(leaf) and leaf.ndim]
            assert {dtype_name(leaf) for leaf in arrays} <= {wanted, "int8"} | master  # codes have no other dtype
            state, model = opt.update(state, model, {"x": draw(3, 4)})
            assert dtype_name(model["x"]) == own


# --- half precision ------------------------------------------------------------------------------------------------------


def half_ulp(reference, dtype):
    """Half the distance of neighbouring numbers of this dtype, at each reference value."""
    bits, least = {"float16": (10, -24), "bfloat16": (7, -133)}[dtype]
    _, exponent = np.frexp(reference)
    return np.maximum(np.exp2(exponent - 1.0 - bits), 2.0**least) / 2


@LIBRARIES
@every()
def test_half_precision_is_computed_in_float32_and_rounded_once(row, rule, lib):
    for dtype in accepted(row, lib)[:-2]:
        draw = Draw(lib, dtype)
        x = draw(3, 4)
        state, model = opt.setup(rule, {"x": x}), {"x": x}
        (entry,) = state._entries  # its counters are numbers, as rules compute with them
        hidden, exact = entry.state, entry.rule
        dtypes = [dtype_name(leaf) for leaf in state_leaves(hidden) if kind(leaf)]
        exact = usable_in_float16(exact) if lacks_range(dtypes) else exact
        for _ in range(4):
            dx = draw(3, 4)
            wide_x = convert(values(model["x"]), lib, "float32")
            wide_state = map_state(lambda s: convert(values(s), lib, "float32") if is_half(s) else s, hidden)
            after, step = exact.apply(wide_state, wide_x, convert(values(dx), lib, "float32"))
            expected = wide_x if step is None else step.value if isinstance(step, Assign) else wide_x - step
            state, model = opt.update(state, model, {"x": dx})
            assert_rounded_once(model["x"], expected, dtype)
            shown = state["x"].state
            pairs = zip(state_leaves(hidden), state_leaves(after), state_leaves(shown), strict=True)
            for old, reference, new in pairs:
                if is_half(old):
                    assert_rounded_once(new, reference, dtype)
                else:
                    near = (
                        1e-6 if row.law in {"elementwise", "measured"} else 1e-5
                    )  # an iteration on a matrix amplifies what rounds otherwise
                    np.testing.assert_allclose(values(new), values(reference), rtol=near)
            hidden = map_state(lambda new, ref: new if kind(new) and new.ndim else ref, shown, after)


def is_half(leaf):
    return kind(leaf) is not None and dtype_name(leaf) in {"float16", "bfloat16"}


def assert_rounded_once(new, reference, dtype):
    assert dtype_name(new) == dtype
    new, reference = values(new), values(reference)
    over = np.isinf(new)  # what the dtype cannot hold
    assert (np.sign(new) == np.sign(reference))[over].all()
    assert (abs(reference)[over] > 65000).all()
    new, reference = new[~over], reference[~over]
    assert (abs(new - reference) <= half_ulp(reference, dtype) + 1e-6 * abs(reference)).all()


# --- absent gradients, ties, frozen parameters ---------------------------------------------------------------------------


@LIBRARIES
@every()
def test_absent_gradient_is_no_step(row, rule, lib):
    draw = Draw(lib)
    model = draw.model(row)
    state, model = run(rule, model, [draw.like(model)])
    before, old = snapshot(state["w"].state, model["w"]), (state, model)
    for grads in (None, {"w": None, "rest": None}, {"w": None, "rest": [None] * len(model["rest"])}):
        after, same = opt.update(*old, grads)
        assert snapshot(after, same) == snapshot(*old)
        assert after == state
    for _ in range(2):
        state, model = opt.update(state, model, {"w": None, "rest": draw.like(model["rest"])})
        assert snapshot(state["w"].state, model["w"]) == before
    state, model = opt.update_(state, model, {"w": None, "rest": draw.like(model["rest"])})
    assert snapshot(state["w"].state, model["w"]) == before


@LIBRARIES
@every()
def test_what_others_write_to_a_parameter_stays(row, rule, lib):
    """No rule holds a copy of the parameter that it puts in the place of values loaded, averaged or clamped since."""
    if row.name in {"DoG", "Prodigy"}:
        pytest.skip("its step grows with the distance from the start, however it came about")
    for dtype in accepted(row, lib):
        draw = Draw(lib, dtype)
        model = draw.model(row)
        small = optree.tree_map(lambda x, to=dtype: convert(0.01 * values(x), lib, to), draw.like(model))
        state, model = run(rule, model, [small, small])
        written = optree.tree_map(lambda x, to=dtype: convert(np.full(x.shape, 8.0), lib, to), model)
        _, usual = run(rule, model, [small], state)
        _, after = run(rule, written, [small], state)
        for x, y, z in zip(*map(optree.tree_leaves, (model, usual, after)), strict=True):
            with np.errstate(invalid="ignore"):  # without epsilon AdaBelief takes steps that float16 cannot hold
                assert not (abs(values(z) - 8) > 1.1 * abs(values(y) - values(x)) + 4).any()


@LIBRARIES
@pytest.mark.parametrize(
    "rule", [opt.Momentum(), opt.Nesterov(), opt.Adam(), opt.AdamW(lambda_=0.1), opt.Lion(), opt.WeightDecay(0.1)], ids=repr
)
def test_a_zero_gradient_is_a_step(rule, lib):
    draw = Draw(lib)
    model = {"w": draw(3, 4)}
    state, model = run(rule, model, [draw.like(model)])
    after, moved = opt.update(state, model, {"w": 0 * model["w"]})
    assert (values(moved["w"]) != values(model["w"])).any()
    assert rule == opt.WeightDecay(0.1) or after != state


@LIBRARIES
@every()
def test_gradients_of_tied_places_are_added(row, rule, lib):
    draw = Draw(lib)
    w, other = draw(3, 4), draw(5, 2)
    tied, single = {"a": w, "b": [w, w.T], "c": other}, {"a": w, "c": other}
    state, alone = opt.setup(rule, tied), opt.setup(rule, single)
    for _ in range(4):
        ga, gb, gt, gc = draw(3, 4), draw(3, 4), draw(4, 3), draw(5, 2)
        state, tied = opt.update(state, tied, {"a": ga, "b": [gb, gt], "c": gc})
        alone, single = opt.update(alone, single, {"a": ga + gb + gt.T, "c": gc})
        assert tied["a"] is tied["b"][0]
        np.testing.assert_array_equal(values(tied["b"][1]), values(tied["a"]).T)
        assert snapshot(tied["a"], tied["c"]) == snapshot(single["a"], single["c"])
        assert snapshot(state["a"].state, state["c"].state) == snapshot(alone["a"].state, alone["c"].state)
        assert state["a"] == state["b"][0] == state["b"][1] == alone["a"]


@LIBRARIES
@every()
def test_one_gradient_object_at_tied_places_counts_once(row, rule, lib):
    draw = Draw(lib)
    w, grad = draw(3, 4), draw(3, 4)
    _, tied = run(rule, {"a": w, "b": w}, [{"a": grad, "b": grad}] * 2)
    _, half = run(rule, {"a": w, "b": w}, [{"a": None, "b": grad}] * 2)
    _, single = run(rule, {"a": w}, [{"a": grad}] * 2)
    assert snapshot(tied["a"], tied["b"]) == snapshot(half["a"], half["b"]) == snapshot(single["a"], single["a"])


@LIBRARIES
@every()
def test_frozen_parameters_are_left_alone(row, rule, lib):
    draw = Draw(lib)
    model = draw.model(row)
    state, model = run(rule, model, [draw.like(model)])
    before = snapshot(state["w"].state, model["w"])
    kept, held = copy.deepcopy((state, model["w"]))
    state = opt.freeze(state, where="w")
    for _ in range(2):
        state, model = opt.update(state, model, draw.like(model))
    state, model = opt.update_(state, model, draw.like(model))
    assert snapshot(state["w"].state, model["w"]) == before
    assert state["w"].frozen
    grads = draw.like(model)
    after, thawed = opt.update(opt.thaw(state), model, {"w": grads["w"], "rest": None})
    never, expected = opt.update(kept, {"w": held, "rest": model["rest"]}, {"w": grads["w"], "rest": None})
    assert snapshot(after["w"].state, thawed["w"]) == snapshot(never["w"].state, expected["w"])


# --- saving and going on -------------------------------------------------------------------------------------------------


@LIBRARIES
@every()
def test_state_survives_pickle_and_copy(row, rule, lib):
    draw = Draw(lib)
    model = draw.model(row)
    state, model = run(rule, model, [draw.like(model) for _ in range(2)])
    grads = draw.like(model)
    expected = snapshot(*opt.update(state, model, grads))
    for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert again == state
        assert repr(again) == repr(state)
        assert snapshot(again) == snapshot(state)
        assert snapshot(*opt.update_(again, copy.deepcopy(model), grads)) == expected
    assert snapshot(*opt.update(state, model, grads)) == expected  # the copies had memory of their own


@LIBRARIES
@every()
def test_resumed_training_is_the_same_training(row, rule, lib):
    draw = Draw(lib, "float32")
    model = draw.model(row)
    gradients = [draw.like(model) for _ in range(7)]
    state, end = run(rule, model, gradients)
    half_way, middle = run(rule, model, gradients[:3])
    saved, middle = pickle.loads(pickle.dumps((half_way, middle)))
    resumed, again = run(rule, middle, gradients[3:], saved)
    assert snapshot(again) == snapshot(end)
    assert resumed == state


# --- differentiation and transforms --------------------------------------------------------------------------------------


def in_float64(rule):
    """Whether the rule computes in the float64 of its arguments."""
    return all(inner.dtype == "float64" for inner in walk(rule) if isinstance(inner, opt.MixedPrecision))


def smooth(**claims):
    found = [(name, row, rule) for name, row, rule in cases(**claims) if in_float64(rule)]
    return pytest.mark.parametrize(("row", "rule"), [pytest.param(row, rule, id=name) for name, row, rule in found])


def loss_after(rule, gradients, state=None):
    """A function of the parameters after some steps."""
    draw = Draw("torch", seed=5)
    x, weight = draw(3, 4), draw(3, 4)
    _, model = run(rule, {"x": x}, [{"x": g} for g in gradients], state)
    return (weight * model["x"] + model["x"] ** 2).sum()


def with_etas(rule, eta):
    """The rule with this learning rate, wherever it has one (Rprop's too, which only setup may choose)."""
    for field, index, child in list(children(rule)):
        rule = with_child(rule, field, index, with_etas(child, eta))
    return rule.replace(eta=eta) if hasattr(rule, "eta") else rule


def with_eta(**claims):
    """Parametrise over the rules that have a learning rate, their first configurations only."""
    found = [
        pytest.param(row, rule, id=name)
        for name, row, rule in cases(every=False, **claims)
        if in_float64(rule) and any(hasattr(inner, "eta") for inner in walk(rule))
        if not any(isinstance(inner, opt.Scheduled) for inner in walk(rule))
    ]
    return pytest.mark.parametrize(("row", "rule"), found)


@smooth()
def test_derivative_by_the_gradients(row, rule):
    draw = Draw("torch", seed=1)
    gradients = [draw(3, 4).requires_grad_() for _ in range(2 if not row.host_counter else 3)]
    directions = [draw(3, 4) for _ in gradients]
    loss = loss_after(rule, gradients)
    found = torch.autograd.grad(loss, gradients, allow_unused=True)
    slope = sum((d * g).sum().item() for d, g in zip(directions, found, strict=True) if g is not None)
    h = 1e-6
    with torch.no_grad():
        ahead, behind = (
            loss_after(rule, [g + sign * h * d for g, d in zip(gradients, directions, strict=True)]) for sign in (1, -1)
        )
    assert slope == pytest.approx((ahead - behind).item() / (2 * h), rel=1e-5, abs=1e-7)
    if not row.differentiable:
        assert slope == 0


@with_eta()
def test_derivative_by_the_learning_rate(row, rule):
    draw = Draw("torch", seed=2)
    gradients = [draw(3, 4) for _ in range(2)]
    eta = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    loss = loss_after(with_etas(rule, eta), gradients)
    (slope,) = torch.autograd.grad(loss, eta)
    h = 1e-6
    ahead, behind = (loss_after(with_etas(rule, 0.02 + sign * h), gradients) for sign in (1, -1))
    assert slope.item() == pytest.approx((ahead - behind).item() / (2 * h), rel=1e-5, abs=1e-7)


@smooth(host_counter=False)
def test_derivative_by_a_state_passes_through_later_steps(row, rule):
    draw = Draw("torch", seed=3)
    first, second = draw(3, 4).requires_grad_(), draw(3, 4)
    state, model = run(rule, {"x": draw(3, 4)}, [{"x": first}])
    detached = optree.tree_map(lambda leaf: leaf.detach(), state)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(detached))
    _, end = opt.update(state, model, {"x": second})
    depends = [*state_leaves(state["x"].state), model["x"]]
    assert end["x"].requires_grad is any(leaf.requires_grad for leaf in depends if kind(leaf))


@every()
@pytest.mark.parametrize("where", ["everywhere", "somewhere"])
def test_derivative_at_a_zero_gradient_is_finite(row, rule, where):
    draw = Draw("torch", seed=4)
    zero = torch.zeros(3, 4, dtype=torch.float64) if where == "everywhere" else draw(3, 4) * torch.tensor([0, 1, 0, 1])
    gradients = [zero.clone().requires_grad_() for _ in range(3)]
    found = torch.autograd.grad(loss_after(rule, gradients), gradients, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in found)
    if not row.host_counter:
        slope = torch.func.grad(lambda g: loss_after(rule, [g, g, g]))
        assert slope(zero).isfinite().all()
        assert torch.func.vmap(slope)(torch.stack([zero, zero])).isfinite().all()


class Special(torch.nn.Parameter):
    """A parameter class of a user's."""


@every()
def test_plain_update_gives_leaves_of_the_same_class(row, rule):
    draw = Draw("torch", "float32")
    model = {
        "w": torch.nn.Parameter(draw(3, 4)),
        "special": Special(draw(4, 2)),
        "frozen": torch.nn.Parameter(draw(3, 3), requires_grad=False),
        "tensor": draw(2, 2).requires_grad_(),
    }
    state = opt.setup(rule, model)
    for _ in range(2):
        grads = {name: None if name == "frozen" else draw(*x.shape) for name, x in model.items()}
        state, new = opt.update(state, model, grads)
        for name, x in model.items():
            assert type(new[name]) is type(x)
            assert new[name].is_leaf
            assert new[name].requires_grad is x.requires_grad
        assert not any(leaf.requires_grad for leaf in optree.tree_leaves(state))
        model = new


@smooth()  # a master copy in another dtype, as MixedPrecision keeps it, does not depend on the parameter
def test_differentiable_forces_the_graph(row, rule):
    draw = Draw("torch")
    x = draw(3, 4).requires_grad_()
    state = opt.setup(rule, {"x": x})
    for _ in range(3):
        state, model = opt.update(state, {"x": x}, {"x": draw(3, 4)}, differentiable=True)
        if model["x"] is not x:  # AccumGrad steps in the end only
            assert model["x"].grad_fn is not None
            (slope,) = torch.autograd.grad(model["x"].sum(), x, allow_unused=True, retain_graph=True)
            assert slope is None or slope.isfinite().all()


@every(host_counter=False)
def test_vmap_equals_a_loop(row, rule):
    draw = Draw("torch")
    models = {"w": draw(3, 2, 4)} if row.min_ndim else {"w": draw(3, 2, 4), "b": draw(3)}
    batches = [draw.like(models) for _ in range(3)]
    states = torch.func.vmap(lambda model: opt.setup(rule, model))(models)
    ends = models
    for grads in batches:
        states, ends = torch.func.vmap(opt.update)(states, ends, grads)

    def pick(tree, i):
        return optree.tree_map(lambda leaf: leaf[i], tree)

    for i in range(3):
        state, end = run(rule, pick(models, i), [pick(grads, i) for grads in batches])
        assert_close(pick(ends, i), end, rtol=1e-11, atol=1e-14)
        assert_close(pick(states, i), state, rtol=1e-11, atol=1e-14)


@smooth(host_counter=False, differentiable=True)
def test_functional_gradient_equals_the_recorded_one(row, rule):
    draw = Draw("torch", seed=6)
    first, second = draw(3, 4), draw(3, 4)
    functional = torch.func.grad(lambda a, b: loss_after(rule, [a, b]), argnums=(0, 1))(first, second)
    first, second = first.requires_grad_(), second.requires_grad_()
    recorded = torch.autograd.grad(loss_after(rule, [first, second]), (first, second))
    assert_close(functional, recorded, rtol=1e-10, atol=1e-14)


@with_eta()
def test_tensor_valued_learning_rate(row, rule):
    draw = Draw("torch")
    model = draw.model(row)
    gradients = [draw.like(model) for _ in range(3)]
    plain, tensor = with_etas(rule, 0.03), with_etas(rule, torch.tensor(0.03, dtype=torch.float64))
    _, expected = run(plain, model, gradients)
    with_tensor, end = run(tensor, model, gradients)
    assert_close(end, expected)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves((with_tensor, end)))
    etas = [leaf for leaf in optree.tree_leaves(with_tensor) if leaf.ndim == 0 and leaf == 0.03]
    assert etas, "a tensor field is a leaf of the state's pytree"
    with pytest.raises(RuleError, match="has a torch tensor as a field, but 'w' is a NumPy array"):
        opt.setup(tensor, {"w": np.ones((3, 4))})


@with_eta(host_counter=False)
def test_vmap_over_learning_rates(row, rule):
    draw = Draw("torch")
    gradients = [draw(3, 4), draw(3, 4)]
    etas = torch.tensor([0.001, 0.01, 0.1], dtype=torch.float64)
    losses = torch.func.vmap(lambda eta: loss_after(with_etas(rule, eta), gradients))(etas)
    expected = [loss_after(with_etas(rule, eta), gradients) for eta in etas.tolist()]
    assert_close(losses, torch.stack(expected), rtol=1e-11)


# --- the table itself ----------------------------------------------------------------------------------------------------


def test_names_of_rows_are_distinct():
    names = [row.name for row in ROWS]
    assert sorted(set(names)) == sorted(names)


def test_configurations_are_distinct():
    for row in ROWS:
        assert all(a != b for a, b in itertools.combinations(row.configs, 2)), row.name
