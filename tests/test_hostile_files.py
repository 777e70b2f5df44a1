"""Checkpoints with a right checksum and hostile values: a CheckpointError, or a state that steps."""

import contextlib
import json
import random

import numpy as np
import pytest

import optimisers as opt
from optimisers.interop import _tensor_file

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


def saved(path):
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
    path = tmp_path / "state"
    model, state = saved(path)
    text, tensors = _tensor_file.read(path)
    header = mutated(json.loads(text), random.Random(seed))
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
