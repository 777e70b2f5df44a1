"""The state of an optax optimizer as a state tree, in the middle of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import ArgumentError, StructureError, locating
from ..rules import Adam, AdamW, Muon, NAdam, OptimiserChain
from ..rules._base import AbstractRule
from ..setup_api.setup import setup
from ..tree.entry import numbers_in
from ..tree.leaves import Slot
from ..tree.state import StateTree, rebuilt


def from_optax(opt_state: Any, rule: Any, model: Any) -> StateTree:
    """The state tree with which ``rule`` goes on where an optax optimizer is.

    Args:
        opt_state: what ``init`` or ``update`` of ``optax.adam``, ``adamw``, ``nadam`` or ``contrib.muon`` returned, alone or
            in a chain with transformations that remember nothing but their schedule's step. Its arrays are copied.
        rule: the rule, route or function, as for `setup`, with the same formula: an optax state holds no learning rate
            and no decay rates, which are constants in its functions. Adam, AdamW or NAdam, or for ``contrib.muon``
            ``Muon.preset("optax", ...)``; alone, or anywhere in an OptimiserChain whose other members keep no state.
        model: the parameters, a tree of NumPy arrays of the structure that optax was given.

    Raises ArgumentError if there is no such state in ``opt_state``, or the rule of a parameter keeps another kind of
    state; StructureError if optax's moments do not have the model's structure and shapes.
    """
    tree = setup(rule, model)
    structure = tree._structure
    moments = []
    for found in _moments(opt_state):
        kinds = [structure.align(model, getattr(found, name)) for name in ("mu", "nu") if hasattr(found, name)]
        moments.append((int(found.count), kinds))
    if not moments:
        msg = "from_optax: found no state of optax.adam, adamw, nadam or contrib.muon in what was given as opt_state"
        raise ArgumentError(msg)
    entries = []
    for slot, entry in zip(tree._slots, tree._entries, strict=True):
        if entry.rule is None:
            entries.append(entry)
            continue
        leaf = slot.places[0].leaf
        here = [(t, [kind[leaf] for kind in kinds]) for t, kinds in moments if hasattr(kinds[0][leaf], "dtype")]
        if len(here) != 1:
            msg = f"from_optax: optax keeps {'several states' if here else 'no state'} for {slot.path!r}"
            raise ArgumentError(msg)
        count, arrays = here[0]
        with locating(slot.path):
            state = _filled(entry.rule, entry.state, count, [_taken(array, slot) for array in arrays])
        entries.append(entry.replace(state=state, numbers=numbers_in(state)))
    return rebuilt(tree, entries)


def _moments(state: Any) -> Iterator[Any]:
    """The parts of an optax state that hold moments, known by their fields."""
    fields = getattr(state, "_fields", ())
    if "count" in fields and "mu" in fields:
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _moments(value)
    elif isinstance(state, (tuple, list)):
        for value in state:
            yield from _moments(value)


def _taken(array: Any, slot: Slot) -> Any:
    new = np.array(array)
    if new.shape != slot.param.shape:
        msg = f"from_optax: expected moments of shape {slot.param.shape}, got {new.shape}"
        raise StructureError(msg)
    return new


def _filled(rule: AbstractRule, state: Any, t: int, arrays: list[Any]) -> Any:
    """The state of a rule after t steps, with optax's moments: one array under Muon, two under Adam."""
    if isinstance(rule, OptimiserChain):
        keeping = [i for i, member in enumerate(state) if member is not None]
        if len(keeping) == 1:
            i = keeping[0]
            return (*state[:i], _filled(rule.rules[i], state[i], t, arrays), *state[i + 1 :])
    if isinstance(rule, Muon) and not rule._matrix:
        return _filled(rule.opt, state, t, arrays)
    if isinstance(rule, Muon) and len(arrays) == 1 and rule.momentum == "ema_debiased":
        return arrays[0].astype(state[0].dtype), rule.mu ** (t + 1)
    if isinstance(rule, (Adam, AdamW, NAdam)) and len(arrays) == 2:
        m, v, _ = state
        return arrays[0].astype(m.dtype), arrays[1].astype(v.dtype), tuple(b ** (t + 1) for b in rule.beta)
    what = "first and second moments" if len(arrays) == 2 else "one momentum that is corrected for its start"
    msg = f"from_optax: optax keeps {what} for this parameter, and {rule.unresolved()!r} does not"
    raise ArgumentError(msg)
