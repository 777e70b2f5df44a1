"""States as flat dicts of arrays, for programs that write files of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arrays import dtype_name, is_number, kind
from ..errors import ArgumentError, CheckpointError
from ..errors import described as named
from ..rules._states import map_state
from ..tree.entry import Lease, host_state, shown_state
from ..tree.paths import path_of
from ..tree.state import StateTree, check_alive, rebuilt


def state_dict(state: StateTree) -> dict[str, Any]:
    """The arrays of a state by name, ``"layer.weight:state.0"``, counters as 0-d arrays: nothing but a flat dict of arrays.

    Over torch ``torch.save`` writes it, and ``torch.load(weights_only=True)`` reads it. It holds no rules: to load it, set up a
    state with the same rules, and give both to `load_state_dict`. Arrays are shared with the state: write or copy them
    before the next ``update_``.
    """
    if not isinstance(state, StateTree):
        msg = f"state_dict: expected the state that setup returned, got {named(state)}"
        raise ArgumentError(msg)
    check_alive(state)
    found: dict[str, Any] = {}
    for slot, entry in zip(state._slots, state._entries, strict=True):
        visible = shown_state(entry.replace(state=host_state(entry)), slot.kind)
        for position, leaf in _positions(visible):
            found[name_of(slot.path, position)] = leaf.detach() if kind(leaf) == "torch" else np.asarray(leaf)
    return found


def load_state_dict(like: StateTree, arrays: Mapping[str, Any]) -> StateTree:
    """The state ``like`` with the arrays that `state_dict` gave: copied, onto like's devices.

    Raises CheckpointError with every missing, unexpected and mismatched name.
    """
    if not isinstance(like, StateTree):
        msg = f"load_state_dict: expected a state that setup returned, got {named(like)}; the order is (like, arrays)"
        raise ArgumentError(msg)
    check_alive(like)
    problems: list[str] = []
    left = dict(arrays)
    entries = []
    lease = Lease()
    for slot, entry in zip(like._slots, like._entries, strict=True):
        names = iter([name_of(slot.path, position) for position, _ in _positions(entry.state)])

        def take(leaf: Any, names: Iterator[str] = names) -> Any:
            return _taken(next(names), leaf, left, problems)

        entries.append(entry.replace(state=map_state(take, host_state(entry)), lease=lease))
    problems += [f"  unexpected: {name!r}" for name in left]
    if problems:
        msg = "\n".join(
            ["load_state_dict: the arrays do not fit the state:", *problems, "Set up the state with the same rules."]
        )
        raise CheckpointError(msg)
    return rebuilt(like, entries)


def name_of(path: str, position: tuple[Any, ...]) -> str:
    """The name of an array or counter at a position (indices and keys) in the state of the parameter at ``path``."""
    return ".".join([f"{path}:state", *([path_of(position)] if position else [])])


def _positions(state: Any, at: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """(position, array or number) for every one in a state."""
    if state is None:
        return []
    if isinstance(state, dict):
        return [found for key, value in state.items() for found in _positions(value, (*at, key))]
    if isinstance(state, (tuple, list)):
        return [found for i, value in enumerate(state) for found in _positions(value, (*at, i))]
    return [(at, state)]


def _taken(name: str, leaf: Any, left: dict[str, Any], problems: list[str]) -> Any:
    """What is to stand in the place of ``leaf``; what does not fit is noted."""
    if name not in left:
        problems.append(f"  missing: {name!r}")
        return leaf
    given = left.pop(name)
    shape = tuple(leaf.shape) if kind(leaf) else ()
    number = is_number(leaf)
    if not kind(given) or tuple(given.shape) != shape or (not number and kind(given) != kind(leaf)):
        got = f"a {kind(given)} array of shape {tuple(given.shape)}" if kind(given) else named(given)
        wanted = "a 0-d array" if number else f"a {kind(leaf)} array of shape {shape}"
        problems.append(f"  mismatched: {name!r} is {got}; the state has {wanted}")
        return leaf
    if number:
        return type(leaf)(given.item())
    if dtype_name(given) != dtype_name(leaf):
        problems.append(f"  mismatched: {name!r} is {dtype_name(given)}; the state has {dtype_name(leaf)}")
        return leaf
    return np.array(given) if kind(given) == "numpy" else given.detach().to(leaf.device, copy=True)
