"""Checkpoints with a right checksum and hostile values: a CheckpointError, or a state that steps."""

import contextlib
import json
import math
import random

import numpy as np
import pytest

import optimisers as opt
from optimisers.interop import _tensor_file
from table import cases

VALUES = [
    None,
    True,
    -1,
    0,
    10**9,
    10**60,
    0.5,
    1e308,
    "",
    "x",
    [],
    [1],
    {},
    {"float": "nan"},
    {"tensor": "x"},
    {"type": "Adam"},
]


TABLE = [(None, None, None), *cases(every=False)]


def saved(path, case=(None, None, None)):
    """A model and its state, by one rule of the table, or by several."""
    _, row, rule = case
    if rule is not None:
        shapes = {"w": (4, 3), "u": (4, 3)} | ({"b": (3,)} if row.min_ndim < 2 else {})
        model = {name: np.linspace(0.1, 1, math.prod(shape)).reshape(shape) for name, shape in shapes.items()}
        state, model = opt.update(opt.setup(rule, model), model, model)
        opt.save(path, state)
        return model, state
    model = {"w": np.linspace(0, 1, 12).reshape(4, 3), "b": np.ones(3), "z": np.ones((2, 2), np.complex64)}
    rule = opt.Route(("z", opt.Apollo(rank=1)), otherwise=opt.OptimiserChain(opt.ClipNorm(1.0), opt.Muon(blocks=2)))
    state = opt.setup(rule, model)
    opt.save(path, state)
    return model, state


def places(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def mutated(header, rng):
    new = json.loads(json.dumps(header))
    at = rng.choice([place for place in places(new) if place])
    holder = new
    for key in at[:-1]:
        holder = holder[key]
    if rng.random() < 0.2:
        del holder[at[-1]]
    else:
        holder[at[-1]] = rng.choice(VALUES)
    return new


@pytest.mark.parametrize("seed", range(120))
def test_a_mutated_description_is_refused_or_steps(seed, tmp_path):
    path, rng = tmp_path / "state", random.Random(seed)
    model, state = saved(path, rng.choice(TABLE))
    text, tensors = _tensor_file.read(path)
    header = mutated(json.loads(text), rng)
    _tensor_file.write(path, tensors, json.dumps(header))
    for like in (model, state):
        try:
            loaded = opt.load(path, like=like)
        except opt.CheckpointError:
            continue
        with contextlib.suppress(opt.OptimisersError):
            opt.update(loaded, model, model)


def test_a_private_field_of_a_rule_is_not_taken_from_a_file(tmp_path):
    path = tmp_path / "state"
    model, state = saved(path)
    text, tensors = _tensor_file.read(path)
    assert "_matrix" not in text
    _tensor_file.write(path, tensors, text.replace('"blocks":2', '"blocks":2,"_matrix":false'))
    for like in (model, state):
        assert opt.load(path, like=like) == state


@pytest.mark.parametrize(
    ("rule", "text", "value", "said"),
    [
        (opt.Muon(), '"batch_dims":0', '"batch_dims":1000000000', "mismatched: 'w'"),
        (opt.LowRank(opt.AdamW(), 2, kind="random"), '"rank":2', '"rank":1000000', "mismatched: 'w'"),
        (opt.Adopt(), '"power":0.25', '"power":1e9', "must be in .0, 16."),
    ],
    ids=["batch_dims", "rank", "power"],
)
def test_a_number_that_does_not_fit_the_arrays_is_refused(rule, text, value, said, tmp_path):
    path = tmp_path / "state"
    model = {"w": np.linspace(0.1, 1, 12).reshape(4, 3)}
    state = opt.setup(rule, model)
    opt.save(path, state)
    header, tensors = _tensor_file.read(path)
    assert text in header
    _tensor_file.write(path, tensors, header.replace(text, value))
    for like in (model, state):
        with pytest.raises(opt.CheckpointError, match=said):
            opt.load(path, like=like)
