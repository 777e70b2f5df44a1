"""``freeze`` and ``thaw``: parameters that updates pass over."""

from __future__ import annotations

from typing import Any

from ..arrays import kind
from ..errors import ArgumentError, SelectionError
from ..tree.select import describe, selected
from ..tree.state import StateTree, check_alive, reruled


def freeze(state: StateTree, *, where: Any = None) -> StateTree:
    """The state with parameters frozen: updates pass them over, and their state stays as it is.

    Args:
        where: which ones, as in `adjust` (all if not given). Raises SelectionError if it selects nothing.

    """
    return _with_frozen(state, where, "freeze", frozen=True)


def thaw(state: StateTree, *, where: Any = None) -> StateTree:
    """The reverse of `freeze`. Parameters whose rule is None stay untrained.

    Args:
        where: which ones, as in `adjust` (all if not given). Raises SelectionError if it selects nothing that has a rule.

    """
    return _with_frozen(state, where, "thaw", frozen=False)


def _with_frozen(state: StateTree, where: Any, verb: str, *, frozen: bool) -> StateTree:
    if not isinstance(state, StateTree):
        what = "a model" if kind(state) or isinstance(state, (dict, list, tuple)) or hasattr(state, "parameters") else "this"
        msg = (
            f"{verb} works on the state that setup returned, not on {what} ({type(state).__name__}): "
            f"state = {verb}(state, where=...)"
        )
        raise ArgumentError(msg)
    check_alive(state)
    chosen = selected([slot.param for slot in state._slots], where)
    if not any(hit and entry.rule is not None for hit, entry in zip(chosen, state._heads, strict=True)):
        msg = f"{verb}: where={describe(where)} selects only parameters that setup was told not to train; set up a new state"
        raise SelectionError(msg)
    return reruled(
        state,
        [
            entry.replace(frozen=frozen) if hit and entry.rule is not None else entry
            for hit, entry in zip(chosen, state._heads, strict=True)
        ],
    )
