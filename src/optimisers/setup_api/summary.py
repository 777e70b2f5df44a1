"""``summary``: what of a model is trained, by which rules, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..arrays import dtype_name, kind
from ..errors import ArgumentError, described
from ..rules._fields import whole
from ..tree.entry import Entry
from ..tree.fold import fold
from ..tree.leaves import Slot, is_trainable
from ..tree.paths import parts_of, shown
from ..tree.show import WIDTH, bytes_of, bytes_text, named, rows_of, rule_text, state_bytes, state_table, table
from ..tree.state import StateTree, check_alive

By = Literal["owner", "path", "rule"]
_AMOUNTS = ("arrays", "trained", "frozen", "parameters", "bytes", "state")


def summary(state: StateTree, model: Any = None, *, by: By = "owner", depth: int | None = None) -> str:
    """A table of a model and its state, then the totals and what is not trained, and why.

    Args:
        state: the state that setup returned.
        model: the model. Without it, what setup left out is not listed.
        by: what a line is about. ``"owner"``: a module or container, with its type, how many of its arrays are trained,
            frozen or not trained, their elements, the bytes of those arrays and of their state, and the rules. ``"path"``: an
            array; this is the table that ``print(state)`` shows in short. ``"rule"``: a rule, with the paths of its arrays
            and why they have it. A tied array counts once, where it stands first.
        depth: how many keys of the path make an owner; by default all but the last, which is the owner of the array.

    Raises StructureError for a model that is not of the structure that setup saw, and ArgumentError for other values of ``by``.
    """
    if not isinstance(state, StateTree):
        msg = f"summary: expected the state that setup returned, got {described(state)}; the order is summary(state, model)"
        raise ArgumentError(msg)
    if by not in get_args(By):
        msg = f"summary: by is 'owner', 'path' or 'rule'; got {by!r}"
        raise ArgumentError(msg)
    if depth is not None and whole(depth, 0) is None:
        msg = f"summary: depth is a whole number >= 0; got {depth!r}"
        raise ArgumentError(msg)
    if depth is not None and by != "owner":
        msg = f"summary: depth says what an owner is, so it goes with by='owner'; got by={by!r}"
        raise ArgumentError(msg)
    check_alive(state)
    leaves = None if model is None else state._structure.flatten(model)
    if by == "path":
        text = state_table(rows_of(state), full=True)
    else:
        text = _by_owner(state, depth) if by == "owner" else _by_rule(state)
    idle = _not_trained(state, leaves)
    note = ["everything is trained"] if not idle else ["not trained:", *(f"  {line}" for line in idle)]
    return "\n".join([text, *note])


def _by_owner(state: StateTree, depth: int | None) -> str:
    groups: dict[str, _Group] = {}
    for slot, entry in zip(state._slots, state._entries, strict=True):
        parts = parts_of(slot.path)[:-1]
        groups.setdefault(".".join(parts if depth is None else parts[:depth]), _Group()).add(slot, entry, owner=depth is None)
    found = list(groups.items())
    text = _owners(found, None)
    if max(map(len, text.splitlines())) > WIDTH:
        names = named(rows_of(state))
        text = "\n".join([_owners(found, names), *(f"{name}: {rule}" for rule, name in names.items() if name != rule)])
    return text


def _owners(found: Sequence[tuple[str, _Group]], names: Mapping[str, str] | None) -> str:
    rows = []
    for row in fold([path for path, _ in found], [group.key() for _, group in found]):
        group = found[row.members[0]][1]
        counts = [count * len(row.members) for count in group.counts]
        times = f"x{len(row.members)}" if len(row.members) > 1 else ""
        rows.append([row.path or "(the model)", times, " or ".join(group.types), *_amounts(counts)])
        rows[-1].append(" or ".join(rule if names is None else names[rule] for rule in group.rules))
    head = ["owner", "", "type", *_AMOUNTS, "rules"]
    return table(head, [*rows, ["all", "", "", *_total(group for _, group in found), ""]])


def _by_rule(state: StateTree) -> str:
    groups: dict[str, _Group] = {}
    for slot, entry in zip(state._slots, state._entries, strict=True):
        groups.setdefault(_rule(entry), _Group()).add(slot, entry, owner=False)
    names = named(rows_of(state))
    rows = [[names[rule], *_amounts(g.counts), " or ".join(g.reasons)] for rule, g in groups.items()]
    lines = [table(["rule", *_AMOUNTS, "why this rule"], [*rows, ["all", *_total(groups.values()), ""]])]
    for rule, group in groups.items():
        head = rule if names[rule] == rule else f"{names[rule]}: {rule}"
        lines += [head, *(f"  {row.path}" for row in fold(group.paths, [None] * len(group.paths)))]
    return "\n".join(lines)


@dataclass
class _Group:
    """Some arrays, added up."""

    types: dict[str, None] = field(default_factory=dict)
    rules: dict[str, None] = field(default_factory=dict)
    reasons: dict[str, None] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [0] * 6)
    """Arrays, trained, frozen, elements, bytes, bytes of state."""

    def add(self, slot: Slot, entry: Entry, *, owner: bool) -> None:
        if owner and slot.param.owner is not None:
            self.types[slot.param.owner.__name__] = None
        self.rules[_rule(entry)] = None
        self.reasons[entry.reason] = None
        self.paths.append(slot.path or "(the array)")
        trained = entry.rule is not None and not entry.frozen
        frozen = entry.rule is not None and entry.frozen
        size = slot.param.size
        values = (1, trained, frozen, size, size * bytes_of(slot.dtype), state_bytes(entry.state))
        self.counts = [old + new for old, new in zip(self.counts, values, strict=True)]

    def key(self) -> tuple[Any, ...]:
        """What a line says of it, beside its path."""
        return tuple(self.types), tuple(self.rules), tuple(self.counts)


def _rule(entry: Entry) -> str:
    return "not trained" if entry.rule is None else rule_text(entry.rule)


def _total(groups: Iterable[_Group]) -> list[str]:
    return _amounts([sum(counts) for counts in zip(*(group.counts for group in groups), strict=True)])


def _amounts(counts: Sequence[int]) -> list[str]:
    arrays, trained, frozen, size, used, state = counts
    return [str(arrays), str(trained), str(frozen or ""), f"{size:,}", bytes_text(used), bytes_text(state)]


def _not_trained(state: StateTree, leaves: Sequence[Any] | None) -> list[str]:
    """A line for everything in the model that updates pass over: its path, and why."""
    lines = []
    trained = set()
    for slot, entry in zip(state._slots, state._entries, strict=True):
        trained |= {place.leaf for place in slot.places}
        if entry.rule is None:
            lines.append(f"{shown(slot.path)}: its rule is None ({entry.reason})")
        elif entry.frozen:
            lines.append(f"{shown(slot.path)}: frozen")
    for i, (path, leaf) in enumerate(zip(state._structure.paths, leaves or (), strict=False)):
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
