"""``summary``: what of a model is trained, by which rules, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..arrays import dtype_name, kind
from ..errors import ArgumentError, described
from ..tree.entry import Entry
from ..tree.leaves import Slot, is_trainable
from ..tree.paths import path_of, shown
from ..tree.show import bytes_text, rule_text, state_bytes, table
from ..tree.state import StateTree, check_alive


def summary(state: StateTree, model: Any, *, depth: int | None = None) -> str:
    """A table of a model and its state: a line for each owner of arrays, then the totals and what is not trained, and why.

    A line gives the owner's path and type, how many of its arrays are trained, frozen or not trained, their elements, the
    bytes of those arrays and of their state, and the rules. A tied array counts once, where it stands first.

    Args:
        depth: how many keys of the path make a group; by default all but the last, which is the owner of the array.

    Raises StructureError for a model that is not of the structure that setup saw.
    """
    if not isinstance(state, StateTree):
        msg = f"summary: expected the state that setup returned, got {described(state)}; the order is summary(state, model)"
        raise ArgumentError(msg)
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        msg = f"summary: depth is a whole number >= 0; got {depth!r}"
        raise ArgumentError(msg)
    check_alive(state)
    leaves = state._structure.flatten(model)
    groups: dict[str, _Group] = {}
    for slot, entry in zip(state._slots, state._entries, strict=True):
        keys = slot.param.keys[:-1] if depth is None else slot.param.keys[: min(depth, len(slot.param.keys) - 1)]
        group = groups.setdefault(path_of(keys), _Group())
        group.add(slot, entry, leaves[slot.places[0].leaf], owner=depth is None)
    total = _Group()
    for group in groups.values():
        total.join(group)
    head = ["owner", "type", "arrays", "trained", "frozen", "parameters", "bytes", "state", "rules"]
    rows = [[path or "(the model)", *group.cells()] for path, group in groups.items()]
    rows.append(["all", *total.cells()[:-1], ""])
    idle = _not_trained(state, leaves)
    note = ["everything is trained"] if not idle else ["not trained:", *(f"  {line}" for line in idle)]
    return "\n".join([table(head, rows), *note])


@dataclass
class _Group:
    """The arrays of one owner, added up."""

    types: dict[str, None] = field(default_factory=dict)
    rules: dict[str, None] = field(default_factory=dict)
    counts: list[int] = field(default_factory=lambda: [0] * 6)
    """Arrays, trained, frozen, elements, bytes, bytes of state."""

    def add(self, slot: Slot, entry: Entry, x: Any, *, owner: bool) -> None:
        if owner and slot.param.owner is not None:
            self.types[slot.param.owner.__name__] = None
        self.rules["not trained" if entry.rule is None else rule_text(entry.rule)] = None
        trained = entry.rule is not None and not entry.frozen
        frozen = entry.rule is not None and entry.frozen
        values = (1, trained, frozen, slot.param.size, int(x.nbytes), state_bytes(entry.state))
        self.counts = [old + new for old, new in zip(self.counts, values, strict=True)]

    def join(self, other: _Group) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]

    def cells(self) -> list[str]:
        arrays, trained, frozen, size, used, state = self.counts
        amounts = [str(arrays), str(trained), str(frozen or ""), f"{size:,}", bytes_text(used), bytes_text(state)]
        return [" or ".join(self.types), *amounts, " or ".join(self.rules)]


def _not_trained(state: StateTree, leaves: Sequence[Any]) -> list[str]:
    """A line for everything in the model that updates pass over: its path, and why."""
    lines = []
    trained = set()
    for slot, entry in zip(state._slots, state._entries, strict=True):
        trained |= {place.leaf for place in slot.places}
        if entry.rule is None:
            lines.append(f"{shown(slot.path)}: its rule is None ({entry.reason})")
        elif entry.frozen:
            lines.append(f"{shown(slot.path)}: frozen")
    for i, (path, leaf) in enumerate(zip(state._structure.paths, leaves, strict=True)):
        if i not in trained:
            lines.append(f"{shown(path)}: {_why(leaf)}")
    return lines


def _why(leaf: Any) -> str:
    if not kind(leaf):
        return f"{described(leaf)} is no array"
    if not is_trainable(leaf):
        return f"its dtype is {dtype_name(leaf)}"
    if kind(leaf) == "torch" and not leaf.requires_grad:
        return "requires_grad was False at setup, or trainable= left it out"
    return "trainable= left it out at setup, or requires_grad was False then"
