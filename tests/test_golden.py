"""The library against trajectories recorded from the Julia packages (tests/golden/README.md)."""

import numpy as np
import optree
import pytest

import optimisers as opt
from golden_data import (
    EXCLUDED,
    TOLERANCES,
    RecordedLeaf,
    adjusted,
    array,
    as_namedtuple,
    cases,
    decode,
    error,
    exact_squares,
    excluded,
    made,
    numpy_of,
    record,
    rule,
    rule_of,
    same_rule,
    state_errors,
    tolerance_of,
)

NORMS = ("normgrowthcap", "gradnormcontrol", "adaptivegradnormcontrol")
TRAJECTORIES = ("rules", "mixed_dtype", "mixed_precision", "nonfinite", "adjust", "muon", "apollo", *NORMS, "cwchain")
RUNS = [each for each in cases(*TRAJECTORIES) if "xs" in each]
GROUPS = (*TRAJECTORIES, "tree", "destructure", "trainables")


def name_of(value):
    return value["name"] if isinstance(value, dict) else value


def parametrised(records):
    return pytest.mark.parametrize("record", records, ids=name_of)


both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


# --- single arrays ------------------------------------------------------------------------------------------------------


def start(record, kind):
    x = made(array(record["x0"], record["dtype"]), kind)
    return opt.setup(rule_of(record, kind), x), x


def gradients(record, kind):
    return [made(array(grad, record["grad_dtype"]), kind) for grad in record["grads"]]


def after_step(record, t, state):
    """The state after what was adjusted behind step t."""
    for event in record.get("events", ()):
        if event["after_step"] == t:
            state = adjusted(state, event["call"])
            assert same_rule(state[()].rule, rule(event["rule_after"], record))
    return state


def check_parameter(record, t, x):
    recorded = array(record["xs"][t], record["dtype"])
    assert numpy_of(x).dtype == recorded.dtype
    assert error(x, recorded, exact_squares(record)) <= tolerance_of(record).x, f"parameter after step {t + 1}"


def check_final_state(record, state):
    last = array(record["xs"][-1], record["dtype"])
    errors = state_errors(state[()].state, decode(record["final_state"]), last, exact_squares(record))
    assert all(e <= tolerance_of(record).state for e in errors), errors


@both_kinds
@parametrised([each for each in RUNS if each["error"] is None])
def test_trajectory(record, kind):
    state, x = start(record, kind)
    for t, grad in enumerate(gradients(record, kind)):
        state, x = opt.update(state, x, grad)
        check_parameter(record, t, x)
        state = after_step(record, t + 1, state)
    check_final_state(record, state)


# One for each rule with its fields.
SELECTION = {str(each["rule"]): each for each in cases("rules", "mixed_precision", "adjust") if each["error"] is None}


@both_kinds
@parametrised(list(SELECTION.values()))
def test_trajectory_in_place_is_the_same_to_the_bit(record, kind):
    pure_state, pure_x = start(record, kind)
    x = made(numpy_of(pure_x), kind)
    state = opt.setup(pure_state[()].rule, x)
    for t, grad in enumerate(gradients(record, kind)):
        state, x = opt.update_(state, x, grad)
        pure_state, pure_x = opt.update(pure_state, pure_x, grad)
        np.testing.assert_array_equal(numpy_of(x), numpy_of(pure_x), strict=True)
        check_parameter(record, t, x)
        state, pure_state = after_step(record, t + 1, state), after_step(record, t + 1, pure_state)
    assert state == pure_state
    check_final_state(record, state)


@both_kinds
@parametrised([each for each in RUNS if each["error"] and each["dtype"].startswith("complex")])
def test_complex_is_refused_at_setup(record, kind):
    assert record["error"]["type"] == "MethodError"
    with pytest.raises(opt.RuleError, match="complex128"):
        start(record, kind)


@both_kinds
@pytest.mark.parametrize("verb", [opt.update, opt.update_], ids=["update", "update_"])
@parametrised([each for each in RUNS if each["error"] and not each["dtype"].startswith("complex")])
def test_norm_that_is_not_finite_raises(record, kind, verb):
    assert record["error"]["type"] == "DomainError"
    state, x = start(record, kind)
    before, (bad, *_) = gradients(record, kind)[: len(record["xs"])], gradients(record, kind)[len(record["xs"]) :]
    assert record["error"]["step"] == len(before) + 1
    for t, grad in enumerate(before):
        state, x = verb(state, x, grad)
        check_parameter(record, t, x)
    with pytest.raises(opt.NonFiniteError):
        verb(state, x, bad)
    check_parameter(record, len(before) - 1, x)
    check_final_state(record, state)


# --- trees --------------------------------------------------------------------------------------------------------------

TIES = {"tree__tied__": False, "tree__tied_transpose__": True, "destructure__tied": False, "trainables__nested": False}
"""Records in which dec is enc, or enc transposed."""

EVENTS = {
    "tree__adjust_sub__": {
        2: lambda state: opt.adjust(state, 0.2),
        4: lambda state: opt.adjust(state, 0.01, where="b.*"),
    },
    "tree__frozen__": {0: lambda state: opt.freeze(state, where="b.*"), 3: opt.thaw},
}
"""What ``describe`` says in words: the change after each step."""

nodes = pytest.mark.parametrize("node", [dict, as_namedtuple], ids=["dict", "namedtuple"])


def of_record(table, record, default):
    return next((value for prefix, value in table.items() if record["name"].startswith(prefix)), default)


def child(node, key):
    return node[key] if isinstance(key, int) or not hasattr(node, str(key)) else getattr(node, key)


def model_of(record, field, kind, node):
    """The recorded model with its ties made again."""
    transposed = of_record(TIES, record, None)
    if transposed is None:
        return made(decode(record[field], node), kind)
    items = made(dict(decode(record[field], dict)), kind)
    items["dec"] = items["enc"].T if transposed else items["enc"]
    return node({name: made_node(item, node) for name, item in items.items()})


def made_node(item, node):
    return node(item) if isinstance(item, dict) else item


def check_model(ours, recorded):
    mine, theirs = optree.tree_leaves(ours), optree.tree_leaves(recorded)
    assert optree.tree_structure(ours) == optree.tree_structure(recorded)
    for leaf, expected in zip(mine, theirs, strict=True):
        if isinstance(expected, np.ndarray):
            assert numpy_of(leaf).dtype == expected.dtype
            if expected.dtype.kind in "fc":
                assert error(leaf, expected) <= TOLERANCES[expected.dtype.name].x
            else:
                np.testing.assert_array_equal(numpy_of(leaf), expected)
        else:
            assert leaf is expected or leaf == expected


def check_state(ours, recorded):
    if isinstance(recorded, RecordedLeaf):
        assert same_rule(ours.rule, recorded.rule)
        assert ours.frozen == recorded.frozen
        dtypes = [leaf.dtype.name for leaf in optree.tree_leaves(recorded.state) if isinstance(leaf, np.ndarray)]
        tolerance = TOLERANCES[dtypes[0]].state
        assert all(e <= tolerance for e in state_errors(ours.state, recorded.state))
    elif recorded == ():  # not trainable
        assert ours is None
    elif isinstance(recorded, tuple):
        for i, item in enumerate(recorded):
            check_state(ours[i], item)
    elif set(recorded) == {"parent"}:  # a transposed view: its state is that of the array itself
        check_state(ours, recorded["parent"])
    else:
        for key, item in recorded.items():
            check_state(child(ours, key), item)


def seen_from_dec(recorded):
    """A recorded state with its arrays transposed: optree sorts a dict's keys, so there dec is the array itself."""
    if isinstance(recorded, RecordedLeaf):
        return recorded._replace(state=optree.tree_map(np.transpose, recorded.state))
    if isinstance(recorded, dict):
        return {key: seen_from_dec(item) for key, item in recorded.items()}
    return recorded


def check_ties(record, model):
    transposed = of_record(TIES, record, None)
    if transposed is not None:
        enc, dec = child(model, "enc"), child(model, "dec")
        assert dec is enc or (transposed and np.shares_memory(numpy_of(enc), numpy_of(dec)))


@both_kinds
@nodes
@pytest.mark.parametrize("verb", [opt.update, opt.update_], ids=["update", "update_"])
@parametrised([each for each in cases("tree") if "model0" in each])
def test_tree(record, kind, node, verb):
    assert record["error"] is None
    events = of_record(EVENTS, record, {})
    model = model_of(record, "model0", kind, node)
    state = events.get(0, lambda state: state)(opt.setup(rule(record["rule"]), model))
    turned = seen_from_dec if node is dict and of_record(TIES, record, default=False) else lambda recorded: recorded
    check_state(state, turned(decode(record["state0"])))
    for t, grad in enumerate(record["grads"]):
        state, model = verb(state, model, made(decode(grad, node), kind))
        check_model(model, decode(record["models"][t], node))
        check_state(state, turned(decode(record["states"][t])))
        check_ties(record, model)
        state = events.get(t + 1, lambda state: state)(state)


@both_kinds
@nodes
def test_update_leaves_its_arguments(kind, node):
    each = record("tree", "tree__update_nonmutating")
    model = made(decode(each["model_before"], node), kind)
    before = decode(each["state_input_after"])
    state = opt.setup(before["a"].rule, model)
    new_state, new_model = opt.update(state, model, made(decode(each["grads"], node), kind))
    check_model(model, decode(each["model_input_after"], node))
    check_state(state, before)
    check_model(new_model, decode(each["model_out"], node))
    check_state(new_state, decode(each["state_out"]))


# --- destructure and trainables -----------------------------------------------------------------------------------------


@both_kinds
@parametrised(cases("destructure"))
def test_destructure(record, kind):
    flat, rebuild = opt.destructure(model_of(record, "model", kind, as_namedtuple))
    recorded = decode(record["flat"])
    np.testing.assert_array_equal(numpy_of(flat), recorded, strict=True)
    assert len(flat) == record["length"]
    rebuilt = rebuild(made(decode(record["new_flat"]), kind))
    check_model(rebuilt, decode(record["rebuilt"], as_namedtuple))


@both_kinds
@parametrised(cases("trainables"))
def test_trainables(record, kind):
    model = model_of(record, "model", kind, as_namedtuple)
    arrays = [decode(each) for each in record["arrays"]]
    for ours, recorded in zip(opt.trainables(model), arrays, strict=True):
        np.testing.assert_array_equal(numpy_of(ours), recorded, strict=True)
    # KeyPath(:c, :v) is c.v here.
    paths = [".".join(key.strip(' :"') for key in path[len("KeyPath(") : -1].split(",") if key) for path in record["paths"]]
    assert [path for path, _ in opt.trainables(model, path=True)] == paths


# --- what is left out ---------------------------------------------------------------------------------------------------


def test_every_record_is_run_or_excluded_on_purpose():
    left_out = {predicate.__name__: len(excluded(predicate, *GROUPS)) for predicate in EXCLUDED}
    assert left_out == {
        "lion_weights": 20,
        "muon_gram_shift": 5,
        "float16_arithmetic": 5,
        "adjusts_missing_field": 7,
        "column_major": 3,
        "gradient_lacks_key": 1,
    }
