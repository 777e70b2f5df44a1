"""Reads the recorded trajectories of tests/golden: arrays, states and rules from JSON, and how closely to match them."""

import ast
import gzip
import json
import math
import re
from collections import namedtuple
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import optimisers as opt
from optimisers.rules.gradients.accumgrad import Gathered

HERE = Path(__file__).resolve().parent / "golden"


@cache
def records(group):
    """All records of a group."""
    with gzip.open(HERE / f"{group}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def record(group, name):
    """One record by its name."""
    (found,) = [each for each in records(group) if each["name"] == name]
    return found


# --- arrays and states --------------------------------------------------------------------------------------------------

DTYPES = {
    "Float16": "float16",
    "Float32": "float32",
    "Float64": "float64",
    "Complex{Float32}": "complex64",
    "Complex{Float64}": "complex128",
    "Int64": "int64",
}
FUNCTIONS = {"sin": math.sin}


def array(data, dtype):
    """Nested lists, or a pair of them under re and im, as an array of the named dtype (Julia's or NumPy's name)."""
    dtype = np.dtype(DTYPES.get(dtype, dtype))
    if isinstance(data, dict):
        return (np.array(data["re"], dtype) + 1j * np.array(data["im"])).astype(dtype)
    return np.array(data, dtype)


class RecordedLeaf(NamedTuple):
    """A leaf of a recorded state tree."""

    rule: Any
    state: Any
    frozen: bool


def decode(tagged, node=dict):
    """A tagged value: arrays, numbers, tuples, None, leaves of state trees; ``node`` makes a named node of its items."""
    if tagged is None:
        return None
    match tagged:
        case {"array": data, "dtype": dtype, "shape": shape}:
            return array(data, dtype).reshape(shape)
        case {"tuple": items}:
            return tuple(decode(item, node) for item in items)
        case {"vector": items}:
            return [decode(item, node) for item in items]
        case {"scalar": {"re": re_, "im": im}}:
            return complex(re_, im)
        case {"scalar": value} | {"bool": value} | {"str": value}:
            return value
        case {"leaf": leaf}:
            return RecordedLeaf(rule(leaf["rule"]), decode(leaf["state"]), leaf["frozen"])
        case {"named": items}:
            return node({key: decode(value, node) for key, value in items.items()})
        case {"dict": items}:
            return {key: decode(value, node) for key, value in items.items()}
        case {"pairs": pairs}:
            return {decode(key): decode(value, node) for key, value in pairs}
        case {"fn": name}:
            return FUNCTIONS[name]
    raise ValueError(tagged)


@cache
def _named(fields):
    return namedtuple("Node", fields)  # noqa: PYI024 (the fields are known only here)


def as_namedtuple(items):
    """A node of a model as a namedtuple, which keeps the recorded order of its fields."""
    return _named(tuple(items))(**items)


# --- rules --------------------------------------------------------------------------------------------------------------

FIELDS = {"lambda": "lambda_"}
"""Fields whose name differs from the recorded one."""

FALLBACKS = {"x -> false": None, "x -> true": lambda x: True, "x -> size(x,1) >= 5": lambda x: x.shape[0] >= 5}
"""Julia predicates that stand as text in the data."""


def _plain(args):
    return {FIELDS.get(name, name): _value(value) for name, value in args.items()}


def _value(value):
    if isinstance(value, dict) and "type" in value:
        return rule(value)
    return tuple(_value(item) for item in value) if isinstance(value, list) else value


def _chain(spec, record, kind):
    return opt.OptimiserChain(*(rule(member, record, kind) for member in spec["args"]["opts"]))


def _mixed_precision(spec, record, kind):
    return opt.MixedPrecision(rule(spec["args"]["rule"], record, kind), DTYPES[spec["T"]])


def _muon(spec, _record, _kind):
    args = _plain({name: value for name, value in spec["args"].items() if name != "fallback"})
    # The recorded iteration has its coefficients as float32 literals, also in float64.
    triple = tuple(float(np.float32(c)) for c in (3.4445, -4.7750, 2.0315))
    ns = opt.NewtonSchulz(coefficients=(triple,) * 5, epsilon=float(np.float32(1e-7)))
    return opt.Muon(**args, fallback=FALLBACKS[spec["args"]["fallback"]], ns=ns)


def _apollo(spec, record, kind):
    args = spec["args"]
    inner = rule(args["opt"])
    extra = {}
    if record is not None and record.get("P0"):
        # Recorded matrices decay by lambda alone, whatever couple says: that is what couple=False means.
        inner = inner.replace(couple=False)
        matrices = [array(p, record["dtype"]) for p in (record["P0"], *record.get("P_per_step", ()))]
        rank = matrices[0].shape[0]
        # The first refresh is in force from step u on: the entry behind P0 with that number.
        extra = {"rank": rank, "projection": lambda _, refresh: made(matrices[int(refresh) * args["u"]], kind)}
    return opt.Apollo(inner, u=args["u"], sort_dims=args["sort_dims"], **extra)


def _norm_control(spec, _record, _kind):
    # The sums are in the state here, and the recorded threshold for warnings is not kept.
    args = {name: value for name, value in spec["args"].items() if name not in {"heavyclipthresh", "accumulator"}}
    return getattr(opt, spec["type"])(**_plain(args))


BUILDERS = {"OptimiserChain": _chain, "MixedPrecision": _mixed_precision, "Muon": _muon, "Apollo": _apollo}
BUILDERS |= dict.fromkeys(("GradNormControl", "AdaptiveGradNormControl"), _norm_control)
"""How a rule is made of (spec, record, kind of array); all others take their recorded fields by name."""


def rule(spec, record=None, kind="numpy"):
    """The rule that a recorded ``{"type", "args"}`` stands for; the record gives what is not in it (a projection)."""
    build = BUILDERS.get(spec["type"])
    return build(spec, record, kind) if build else getattr(opt, spec["type"])(**_plain(spec["args"]))


def rule_of(record, kind="numpy"):
    """The rule of a trajectory, its coefficients rounded to float16 where the recorded run had them so."""
    made_rule = rule(record["rule"], record, kind)
    return _rounded(made_rule) if DTYPES.get(record["rule"].get("T"), record["dtype"]) == "float16" else made_rule


def _rounded(value):
    """A rule with the decays that weigh its running means in float16: 1 - 0.999 is 2.3 per cent off there."""
    if isinstance(value, opt.AbstractRule):
        members = {name: _rounded(field) for name, field in vars(value).items() if name in {"rules", "rule", "opt"}}
        decays = {name: _rounded(field) for name, field in vars(value).items() if name in {"beta", "rho", "mu"}}
        return value.replace(**members, **decays) if members or decays else value
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return float(np.float16(value)) if isinstance(value, float) else value


def rule_types(spec):
    """The names of all rules in a recorded rule."""
    if isinstance(spec, list):
        return {name for item in spec for name in rule_types(item)}
    if not isinstance(spec, dict):
        return set()
    own = {spec["type"]} if "type" in spec else set()
    return own.union(*(rule_types(value) for value in spec.values()))


def same_rule(ours, recorded):
    """Whether two rules agree up to the last bits of their numbers (and in callables not at all)."""
    if isinstance(ours, opt.AbstractRule):
        return type(ours) is type(recorded) and all(
            same_rule(value, vars(recorded)[name]) for name, value in vars(ours).items()
        )
    if isinstance(ours, tuple):
        return len(ours) == len(recorded) and all(map(same_rule, ours, recorded))
    if isinstance(ours, float):
        return math.isclose(ours, recorded, rel_tol=1e-14)
    return callable(ours) or ours == recorded


_CALL = re.compile(r"adjust!\(leaf(?:, (?P<type>[A-Z]\w*))?(?:, (?P<eta>[\d.e-]+))?(?:; (?P<fields>.*))?\)$")


def adjusted(state, call):
    """The state after a recorded call of ``adjust!``."""
    found = _CALL.match(call.split("#")[0].strip())
    eta = () if found["eta"] is None else (float(found["eta"]),)
    chosen = {} if found["type"] is None else {"rule": getattr(opt, found["type"])}
    fields = _arguments(found["fields"] or "")
    if "opt" in fields:
        # Upstream replaces the whole rule inside; here its fields are adjusted.
        inner = fields.pop("opt")
        return opt.adjust(state, rule=type(inner), **{name: getattr(inner, name) for name in ("eta", "beta", "lambda_")})
    return opt.adjust(state, *eta, **chosen, **fields)


def _arguments(text):
    text = re.sub(r"\blambda\b", "lambda_", text).replace("true", "True").replace("false", "False")
    keywords = ast.parse(f"f({text})", mode="eval").body.keywords
    return {each.arg: _argument(each.value) for each in keywords}


def _argument(node):
    if isinstance(node, ast.Call):
        return getattr(opt, node.func.id)(*(ast.literal_eval(arg) for arg in node.args))
    return ast.literal_eval(node)


# --- frameworks ---------------------------------------------------------------------------------------------------------


def made(value, kind):
    """A NumPy array as one of the kind, ``"numpy"`` or ``"torch"``, in memory of its own; trees of them leaf by leaf."""
    if isinstance(value, np.ndarray):
        if kind == "numpy":
            return value.copy()
        import torch

        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: made(item, kind) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [made(item, kind) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def numpy_of(x):
    """An array of either kind, or a number, as a NumPy array."""
    return x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)


# --- tolerances ---------------------------------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    """How far parameters and states may be off, relative to the greatest magnitude in the array."""

    x: float
    state: float


HALF_EPSILON = 2.0**-11
"""Half a unit in the last place of float16 at the top of the scale: the greatest error of one rounding, relative."""

HALF_FLOOR = 12 * 2.0**-24
"""What the twelve steps of a trajectory may add up to below the normal numbers of float16: one unit a step."""

TOLERANCES = {
    "float64": Tolerance(1e-12, 1e-12),
    "complex128": Tolerance(1e-12, 1e-12),
    "float32": Tolerance(2e-6, 1e-4),
    "complex64": Tolerance(2e-6, 1e-4),
    # The recorded runs round after every operation, ours once a step: five units for parameters, eight for states.
    "float16": Tolerance(5 * 2 * HALF_EPSILON, 8 * 2 * HALF_EPSILON),
}


def coarsest(*dtypes):
    """The dtype of least precision among these names."""
    return min(dtypes, key=lambda name: (np.finfo(name).nmant, name))


def tolerance_of(record):
    """The tolerance of a trajectory: that of the coarsest precision in which something was computed when it was recorded."""
    return TOLERANCES[coarsest(record["dtype"], record["grad_dtype"], DTYPES.get(record["rule"].get("T"), "float64"))]


def error(ours, recorded, mask=None):
    """The greatest difference relative to the greatest finite magnitude recorded; infinite where NaN and inf do not agree.

    Where a mask has the shape of the array, only its elements are looked at.
    """
    ours, recorded = numpy_of(ours), np.asarray(recorded)
    assert ours.shape == recorded.shape
    if recorded.dtype.kind == "c" and ours.dtype.kind != "c":
        assert (recorded.imag == 0).all()
        recorded = recorded.real
    if mask is not None and mask.shape == recorded.shape:
        ours, recorded = ours[mask], recorded[mask]
    finite = np.isfinite(recorded)
    if not np.array_equal(ours[~finite], recorded[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    wide = np.result_type(ours, np.float64)
    off = np.abs(ours[finite].astype(wide) - recorded[finite]).max()
    if recorded.dtype == np.float16:
        off = max(off - HALF_FLOOR, 0.0)
    scale = np.abs(recorded[finite]).max()
    return float(off / scale) if scale > 0 else float(off)


def state_errors(ours, recorded, x=None, mask=None):
    """The error of every array and number of a state; ``x`` is the recorded parameter, which a master may be left out for."""
    if isinstance(recorded, tuple):
        assert isinstance(ours, tuple)
        if isinstance(ours, Gathered) and recorded[0].dtype == np.float16:
            # AccumGrad gathers half-precision gradients in float32.
            assert numpy_of(ours.mean).dtype == np.float32
            ours = numpy_of(ours.mean).astype(np.float16), ours.count
        if len(ours) == 2 and ours[0] is None and isinstance(recorded[0], np.ndarray):
            # MixedPrecision keeps no copy of an array that has its dtype already.
            assert error(x, recorded[0]) == 0
            ours, recorded = ours[1:], recorded[1:]
        if len(ours) == 3 and isinstance(recorded[2], np.ndarray) and numpy_of(ours[2]).dtype.kind == "i":
            # Apollo's state ends in the key of its projection, the recorded one in the projection itself.
            ours, recorded = ours[:2], recorded[:2]
        assert len(ours) == len(recorded)
        return [e for mine, theirs in zip(ours, recorded, strict=True) for e in state_errors(mine, theirs, x, mask)]
    if isinstance(ours, tuple) and isinstance(recorded, float):
        return []  # the running sums, which are recorded apart, against a threshold that follows from the fields
    if recorded is None or recorded is False:
        assert ours is None
        return []
    if isinstance(recorded, np.ndarray):
        # Running squares are real here, also those of complex arrays.
        assert numpy_of(ours).dtype in {recorded.dtype, recorded.real.dtype}
    return [error(ours, recorded, mask)]


# --- deliberate differences -----------------------------------------------------------------------------------------------
# Each predicate tells the records that show one of the differences of docs/differences.md, whose number it has in
# EXCLUDED. They are left out here, and tests/test_differences.py shows what is computed instead.


def lion_weights(record):
    """Lion's momentum has the weights of the paper."""
    return "rule" in record and "Lion" in rule_types(record["rule"])


def muon_gram_shift(record):
    """The recorded run of Muon took the route that adds a multiple of the identity to the Gram matrix of an oblong matrix."""
    if "rule" not in record or "Muon" not in rule_types(record["rule"]):
        return False
    if "newton_schulz_path" in record:
        return record["newton_schulz_path"] == "fused3"
    rows, columns = (record["shape"][0], math.prod(record["shape"][1:]))
    return columns > 1 and max(rows, columns) >= 2.5 * min(rows, columns)


def norm_rule_after_a_lazy_one(record):
    """The recorded run stops since a norm rule cannot measure what a rule before it in the chain hands on."""
    error = record.get("error")
    return bool(error) and "Broadcasted" in error["text"] and not record["dtype"].startswith("complex")


def apollo_rank_above_side(record):
    """The recorded projection has more rows than the side that it projects."""
    matrix = record.get("P0")
    return bool(matrix) and len(matrix) > len(matrix[0])


SQUARING = {"Adam", "AdamW", "RAdam", "NAdam", "OAdam", "AMSGrad", "AdaBelief", "AdaGrad", "AdaDelta", "RMSProp"}


def moments_of(record):
    """The ``state_dtype`` of a trajectory: float16 where the recorded run held squares in it, which is not the default here."""
    own = DTYPES.get(record["rule"].get("T"), record.get("dtype"))
    return "float16" if own == "float16" and rule_types(record["rule"]) & SQUARING else None


def exact_squares(record):
    """The elements whose squares float16 can hold, as a mask; None if nothing in the recorded run was squared in float16.

    An element whose first gradient has a square below the normal numbers of float16 is divided by next to nothing (or by
    nothing) in the recorded run, and goes its own way from there.
    """
    if "float16" not in {record["dtype"], record["grad_dtype"], DTYPES.get(record["rule"].get("T"))}:
        return None
    grads = np.abs([array(grad, "float64") for grad in record["grads"]])
    types = rule_types(record["rule"])
    if "Rprop" in types:  # multiplies successive gradients
        products = grads[1:] * grads[:-1]
        return ((products == 0) | (products >= np.finfo(np.float16).smallest_normal)).all(axis=0)
    return grads[0] >= 0.25 if types & SQUARING else None


def float16_arithmetic(record):
    """No element of the recorded run has squares that float16 can hold."""
    mask = exact_squares(record) if "grads" in record and "grad_dtype" in record else None
    return mask is not None and not mask.any()


def adjusts_missing_field(record):
    """The recorded run adjusts a field that no rule has, or that is fixed at setup, which upstream passes over."""
    calls = [event["call"] for event in record.get("events", ())]
    no_eta = "rule" in record and rule_types(record["rule"]) <= {"AdaDelta", "NormGrowthCap"}
    return any(re.search(r"\bu=", call) or (no_eta and re.search(r"leaf, [\d.]+\)", call)) for call in calls)


def column_major(record):
    """The flat vector goes through an array of two or more dimensions in Julia's order."""
    return "flat" in record and re.search(r'"shape": \[\d+, ', json.dumps(record["model"])) is not None


def gradient_lacks_key(record):
    """The gradient is a dict without one of the model's keys."""
    return record["name"].startswith("tree__dict_missing")


EXCLUDED = {
    lion_weights: 1,
    muon_gram_shift: 2,
    float16_arithmetic: 4,
    adjusts_missing_field: 5,
    norm_rule_after_a_lazy_one: 6,
    column_major: 8,
    gradient_lacks_key: 10,
    apollo_rank_above_side: 12,
}


def cases(*groups):
    """The records of these groups that show no deliberate difference."""
    return [each for group in groups for each in records(group) if not any(predicate(each) for predicate in EXCLUDED)]


def excluded(predicate, *groups):
    """The records of these groups that a predicate excludes."""
    return [each for group in groups for each in records(group) if predicate(each)]
