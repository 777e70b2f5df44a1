"""``to``: a state on another device, or with moments of another dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import cast_to, dtype_name, is_inexact, kind, torch_if_loaded
from ..errors import ArgumentError, described
from ..rules._base import AbstractRule
from ..rules._states import map_state, state_leaves
from ..tree.entry import Entry, Lease, device_of, host_state
from ..tree.leaves import Slot
from ..tree.paths import shown
from ..tree.state import StateTree, check_alive, rebuilt
from .setup import moment_dtype


def to(state: StateTree, *, device: Any = None, dtype: Any = None) -> StateTree:
    """The state with its arrays on another device, or of another dtype; move the model itself as you always do.

    Args:
        device: where tensors go. Counters stay on the host, as does a tensor that is a field of a rule. NumPy arrays stay where
            they are, and any device but ``"cpu"`` is an ArgumentError for them.
        dtype: of the moments: each array takes the dtype that ``setup(..., state_dtype=dtype)`` would have given it. So the
            master copies of MixedPrecision keep the dtype that their rule names, and norms stay float64.

    Arrays that need no change are shared with the state given. Raises HyperParameterError for what is no real floating dtype.
    """
    if not isinstance(state, StateTree):
        msg = f"to: expected the state that setup returned, got {described(state)}; a model has its own ways"
        raise ArgumentError(msg)
    if device is None and dtype is None:
        msg = "to: give device= or dtype=, or both"
        raise ArgumentError(msg)
    check_alive(state)
    name = moment_dtype(dtype, "to: dtype")
    fresh = Lease()
    entries = []
    for slot, entry in zip(state._slots, state._entries, strict=True):
        if device is not None and slot.kind == "numpy" and str(device) != "cpu":
            msg = f"to: {shown(slot.path)} is a NumPy array, and NumPy's arrays are on the host; got device={device!r}"
            raise ArgumentError(msg)
        entries.append(_moved(slot, entry, device if slot.kind == "torch" else None, name, fresh))
    return rebuilt(state, entries)


def beside(state: StateTree, leaves: Sequence[Any]) -> StateTree:
    """The state with the tensors of every entry on the device of its parameter; the state itself if they are there."""
    grouped = state._grouped
    wrong = [] if grouped is None else grouped.elsewhere(leaves)
    for i in range(len(state._slots)) if grouped is None else grouped.ungrouped:
        x = leaves[state._slots[i].places[0].leaf]
        device = device_of(state._heads[i].state) if kind(x) == "torch" else None
        if device is not None and device != x.device:
            wrong.append(i)
    if not wrong:
        return state
    entries = list(state._entries)
    fresh = Lease()
    for i in wrong:
        slot = state._slots[i]
        entries[i] = _moved(slot, entries[i], leaves[slot.places[0].leaf].device, None, fresh)
    return rebuilt(state, entries)


def _moved(slot: Slot, entry: Entry, device: Any, dtype: str | None, fresh: Lease) -> Entry:
    before = host_state(entry)
    after = before
    if dtype is not None and entry.rule is not None:
        after = _cast(slot, entry.rule, before, dtype)
    if device is not None:
        _refuse_meta(before, device, slot.path)
        after = map_state(lambda leaf: leaf.to(device) if kind(leaf) == "torch" else leaf, after)
    old = {id(leaf) for leaf in state_leaves(before) if kind(leaf)}
    shares = any(id(leaf) in old for leaf in state_leaves(after) if kind(leaf))
    return entry.replace(state=after, lease=entry.lease if shares else fresh)


def _refuse_meta(state: Any, device: Any, path: str) -> None:
    """Raise ArgumentError for a state on the meta device, from where there is nothing to move."""
    on = device_of(state)
    if on is not None and on.type == "meta" and str(device) != "meta":
        msg = (
            f"the state of {shown(path)} is on the meta device, which holds no numbers to move; set up a new state once the "
            "model has some, state = opt.setup(rule, model)"
        )
        raise ArgumentError(msg)


def _cast(slot: Slot, rule: AbstractRule, state: Any, dtype: str) -> Any:
    """The state with the dtypes that ``init_as`` gives."""
    example = state_leaves(rule.init_as(_zeros(slot), dtype))
    if len(example) != len(state_leaves(state)):  # a user's rule may have another state than at first
        return map_state(lambda leaf: cast_to(leaf, dtype) if _floats(leaf) and leaf.ndim else leaf, state)
    wanted = iter(example)

    def cast(leaf: Any) -> Any:
        like = next(wanted)
        return cast_to(leaf, dtype_name(like)) if _floats(leaf) and kind(like) and is_inexact(like) else leaf

    return map_state(cast, state)


def _zeros(slot: Slot) -> Any:
    """An array like the parameter, on the host."""
    if slot.kind == "numpy":
        return np.zeros(slot.param.shape, slot.param.dtype)
    torch: Any = torch_if_loaded()
    return torch.zeros(slot.param.shape, dtype=slot.param.dtype)


def _floats(leaf: Any) -> bool:
    return kind(leaf) is not None and is_inexact(leaf)
