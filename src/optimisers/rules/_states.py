"""Walking over what a rule remembers: nested tuples, lists and dicts of arrays and numbers."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

State: TypeAlias = Any


def map_state(f: Any, state: State, *others: State) -> State:
    """f at every array and number of a state, and of others of the same structure."""
    if state is None:
        return None
    if isinstance(state, dict):
        return {key: map_state(f, value, *(other[key] for other in others)) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        items = [map_state(f, *item) for item in zip(state, *others, strict=True)]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return f(state, *others)


def state_leaves(state: State) -> list[Any]:
    """The arrays and numbers of a state, in order."""
    leaves: list[Any] = []
    _gather(state, leaves)
    return leaves


def find_state(state: State, kind_of: type[T]) -> T | None:
    """The outermost part of a state that is of this type, such as the named tuple of one rule; None if there is none."""
    if isinstance(state, kind_of):
        return state
    if isinstance(state, (tuple, list, dict)):
        for item in state.values() if isinstance(state, dict) else state:
            if (found := find_state(item, kind_of)) is not None:
                return found
    return None


def _gather(state: State, leaves: list[Any]) -> None:
    if isinstance(state, (tuple, list)):
        for item in state:
            _gather(item, leaves)
    elif isinstance(state, dict):
        for item in state.values():
            _gather(item, leaves)
    elif state is not None:
        leaves.append(state)
