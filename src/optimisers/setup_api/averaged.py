"""``averaged``: the model of the averages that `Averaged` keeps."""

from __future__ import annotations

from typing import Any

from ..arrays import cast_to, dtype_name
from ..errors import ArgumentError, described
from ..rules._precision import find_state
from ..rules.wrappers.averaged import Average
from ..tree.destructure import permuted
from ..tree.state import StateTree, check_alive
from .update import checked_leaves, finisher, retie


def averaged(state: StateTree, model: Any) -> Any:
    """The model with every array that a rule `Averaged` steps replaced by its average; nothing is changed.

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
        kept = find_state(entry.state, Average)
        if kept is None:
            continue
        found = True
        for place in slot.places:
            old = leaves[place.leaf]
            new = 1 * permuted(kept.average, place.permutation)
            finish = finisher(graph=getattr(new, "requires_grad", False))
            leaves[place.leaf] = finish(cast_to(new, dtype_name(old)), old)
        retie(slot, leaves)
    if not found:
        msg = "averaged: no rule of this state keeps an average; set up with Averaged(rule, decay)"
        raise ArgumentError(msg)
    return state._structure.unflatten(model, leaves)
