"""``averaged``: the model of the averages that `Averaged` and `ScheduleFree` keep."""

from __future__ import annotations

from typing import Any

from ..arrays import cast_to, detached, dtype_name
from ..errors import ArgumentError, described
from ..rules._states import find_state
from ..rules.wrappers.averaged import Average
from ..rules.wrappers.mixedprecision import MixedPrecision
from ..rules.wrappers.schedulefree import Interpolated
from ..tree.destructure import permuted
from ..tree.state import StateTree, check_alive
from .update import checked_leaves, finisher, retie


def averaged(state: StateTree, model: Any) -> Any:
    """The model with every array that an `Averaged` or a `ScheduleFree` steps replaced by its average; nothing is changed.

    Averages come in the dtype, class and ties of the arrays they stand for and in memory of their own; before the first
    step they are the arrays' initial values. Arrays without an average are the model's own. For a ``torch.nn.Module`` it
    is a dict of its parameters by name, as ``torch.func.functional_call`` and ``load_state_dict(..., strict=False)`` take
    it.

    Raises ArgumentError if no rule of the state keeps an average; StructureError for a model that the state is not of.
    """
    if not isinstance(state, StateTree):
        msg = f"averaged: expected the state that setup returned, got {described(state)}; the order is averaged(state, model)"
        raise ArgumentError(msg)
    check_alive(state)
    leaves = checked_leaves(state, model)
    found = False
    for slot, entry in zip(state._slots, state._entries, strict=True):
        kept: Any = find_state(entry.state, Average) or find_state(entry.state, Interpolated)
        if kept is None:
            continue
        found = True
        average = kept.evaluated(present(entry.rule, entry.state, leaves[slot.places[0].leaf]))
        for place in slot.places:
            old = leaves[place.leaf]
            new = 1 * permuted(average, place.permutation)
            finish = finisher(graph=getattr(new, "requires_grad", False))
            leaves[place.leaf] = finish(cast_to(new, dtype_name(old)), old)
        retie(slot, leaves)
    if not found:
        msg = "averaged: no rule of this state keeps an average; set up with Averaged(rule, decay) or ScheduleFree(rule)"
        raise ArgumentError(msg)
    return state._structure.unflatten(model, leaves)


def present(rule: Any, state: Any, x: Any) -> Any:
    """The array, or its master copy if it has one."""
    master = state[0] if isinstance(rule, MixedPrecision) else None
    return detached(x) if master is None else rule._present(master, detached(x))
