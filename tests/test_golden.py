"""The library against trajectories recorded from the Julia packages (tests/golden/README.md)."""

import math

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
    moments_of,
    muon_gram_shift,
    norm_rule_after_a_lazy_one,
    numpy_of,
    record,
    records,
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
    return opt.setup(rule_of(record, kind), x, state_dtype=moments_of(record)), x


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


def row_major(recorded, record):
    """A recorded state, the moments of Apollo with the trailing dimensions of the array flattened in row-major order."""
    trailing = record["shape"][1:]
    if not record.get("P0") or len(trailing) < 2:
        return recorded

    def reordered(leaf):
        if not isinstance(leaf, np.ndarray) or leaf.shape[1:] != (math.prod(trailing),):
            return leaf
        return leaf.reshape(-1, *trailing[::-1]).transpose(0, *range(len(trailing), 0, -1)).reshape(leaf.shape)

    return optree.tree_map(reordered, recorded, none_is_leaf=True)


def check_final_state(record, state):
    last = array(record["xs"][-1], record["dtype"])
    recorded = row_major(decode(record["final_state"]), record)
    errors = state_errors(state[()].state, recorded, last, exact_squares(record))
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
    state = opt.setup(pure_state[()].rule, x, state_dtype=moments_of(record))
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
    with pytest.raises(opt.RuleError, match="complex"):
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


# --- what the differences leave comparable ------------------------------------------------------------------------------


@both_kinds
@parametrised([each for each in cases(*NORMS, "cwchain") if "accumulator_per_step" in each and each["error"] is None])
def test_running_sums(record, kind):
    state, x = start(record, kind)
    for grad, recorded in zip(gradients(record, kind), record["accumulator_per_step"], strict=True):
        state, x = opt.update(state, x, grad)
        leaf = state[()].state
        control = leaf if len(record["rule"]["args"].get("opts", ())) == 0 else leaf[0]
        # Upstream measures in the precision of the array, 12 steps of rounding: 1e-6 in float32.
        assert error(np.array([float(v) for v in control[-1]]), recorded) <= max(tolerance_of(record).x, 1e-12)


@both_kinds
@parametrised(excluded(norm_rule_after_a_lazy_one, "cwchain"))
def test_a_norm_rule_goes_on_where_upstream_stops(record, kind):
    state, x = start(record, kind)
    for t, grad in enumerate(gradients(record, kind)):
        state, x = opt.update(state, x, grad)
        if t < len(record["xs"]):
            check_parameter(record, t, x)
    assert np.isfinite(numpy_of(x)).all()


TRIPLE = [float(np.float32(c)) for c in (3.4445, -4.7750, 2.0315)]


def plain_msign(u, triples=(TRIPLE,) * 5, safety=1.0):
    """The iteration written out, in float64."""
    u = u.astype("float64")
    tall = u.shape[0] > u.shape[1]
    y = (u.T if tall else u) / (np.linalg.norm(u) * safety + float(np.float32(1e-7)))
    for a, b, c in triples:
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.T if tall else y


@both_kinds
@parametrised([each for each in excluded(muon_gram_shift, "muon") if each["dtype"] in {"float32", "float64"}])
def test_muon_on_oblong_matrices_is_the_plain_iteration(record, kind):
    rule = rule_of(record)
    x = array(record["x0"], "float64")
    state, ours = start(record, kind)
    flat = (x.shape[0], math.prod(x.shape[1:]))
    m = np.zeros_like(x)
    for t, theirs in enumerate(gradients(record, kind)):
        grad = numpy_of(theirs).astype("float64")
        m = rule.mu * m + (1 - rule.mu) * grad
        step = plain_msign((rule.mu * m + (1 - rule.mu) * grad).reshape(flat)).reshape(x.shape)
        x = x - rule.eta * (max(1, flat[0] / flat[1]) ** 0.5 * step + rule.lambda_ * x)
        state, ours = opt.update(state, ours, theirs)
        assert error(ours, x) <= max(tolerance_of(record).x, 1e-10), f"parameter after step {t + 1}"


MSIGN = {
    "jordan_unfused": opt.NewtonSchulz(coefficients=(tuple(TRIPLE),) * 5, epsilon=float(np.float32(1e-7))),
    "polar_express": opt.NewtonSchulz(8, "polar_express", float(np.float32(1e-7)), safety=1.1),
}
# Rounding of the iterate, 2**-24 of 1 in float32, grows with the slopes of the polynomials: 485 for Jordan, 3e4 at most for
# eight steps of Polar Express, in directions that these matrices of a few rows hardly have. float16 was recorded by way of a
# software bfloat16, with an eps of 2**-8, in every operation.
MSIGN_TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 0.25}


@both_kinds
@pytest.mark.parametrize("method", MSIGN)
@parametrised(records("msign"))
def test_msign(record, method, kind):
    x = made(array(record["X"], record["dtype"]), kind)
    y = opt.orthogonalise(x, MSIGN[method])
    assert numpy_of(y).dtype == record["dtype"]
    assert error(y, array(record[method], "float64")) <= MSIGN_TOLERANCES[record["dtype"]]


# Upstream's second Muon: Polar Express with a safety factor of 1.1, plain where no side is 2.5 times the other.
PLAIN_EXPERIMENTAL = [each for each in records("muon_experimental") if each["shape"] in ([3, 5], [5, 3])]


@both_kinds
@parametrised(PLAIN_EXPERIMENTAL)
def test_muon_with_polar_express(record, kind):
    assert record["error"] is None
    args = record["rule"]["args"]
    ns = opt.NewtonSchulz(5, "polar_express", float(np.float32(1e-7)), safety=1.1)
    x = made(array(record["x0"], record["dtype"]), kind)
    state = opt.setup(opt.Muon(eta=args["eta"], mu=args["mu"], lambda_=args["lambda"], ns=ns), x)
    for t, grad in enumerate(gradients(record, kind)):
        state, x = opt.update(state, x, grad)
        assert error(x, array(record["xs"][t], record["dtype"])) <= TOLERANCES[record["dtype"]].x
    assert all(e <= TOLERANCES[record["dtype"]].state for e in state_errors(state[()].state, decode(record["final_state"])))


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
        "muon_gram_shift": 44,
        "float16_arithmetic": 5,
        "adjusts_missing_field": 7,
        "norm_rule_after_a_lazy_one": 7,
        "column_major": 3,
        "gradient_lacks_key": 1,
        "apollo_rank_above_side": 12,
    }
