"""Tables of states: as text, as HTML for notebooks, in colour for terminals."""

from __future__ import annotations

import dataclasses
import html
import re
import textwrap
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from ..arrays import is_number, kind
from ..rules._base import AbstractRule, children
from ..rules._states import state_leaves
from ..rules.wrappers.chain import OptimiserChain
from .fold import fold
from .sharding import local_state

if TYPE_CHECKING:
    from .leaves import Slot
    from .state import StateTree

WIDTH = 120
"""Columns of a table that is to fit a screen."""
ROWS = 40
"""Lines of such a table."""

_HEAD = ["path", "", "shape", "dtype", "state", "", "rule", "why this rule"]
_RULE = _HEAD.index("rule")
_LEAST = {"why this rule": 16, "rule": 24, "path": 32}
"""How narrow columns may become, in the order in which they do."""
_STYLES = {"path": "bold", "state": "green", "rule": "cyan", "why this rule": "dim"}


class Row(NamedTuple):
    """What a table says of one array."""

    path: str
    shape: str
    dtype: str
    size: int
    bytes: int
    frozen: bool
    rule: str
    kind: str
    """The rule without its fields."""
    reason: str
    here: int
    """Bytes on this rank, of an array that is cut over ranks."""

    @classmethod
    def of(cls, slot: Slot, rule: AbstractRule | None, state: Any, *, frozen: bool, reason: str) -> Row:
        path = " = ".join([slot.path or "(the array)", *slot.param.tied_paths])
        shape = "x".join(map(str, slot.param.shape)) or "0-d"
        texts = ("not trained", "not trained") if rule is None else (rule_text(rule), rule_kind(rule))
        if rule is not None and (remark := rule.remark(tuple(slot.param.shape))):
            reason = f"{reason}; {remark}"
        size, used, here = slot.param.size, state_bytes(state), state_bytes(local_state(state))
        return cls(path, shape, slot.dtype, size, used, frozen and rule is not None, *texts, reason, here)


def rows_of(state: StateTree) -> list[Row]:
    """What tables say of each array."""
    return [
        Row.of(slot, entry.rule, entry.state, frozen=entry.frozen, reason=entry.reason)
        for slot, entry in zip(state._slots, state._entries, strict=True)
    ]


class _Table(NamedTuple):
    """Cells, and what stands below them."""

    head: list[str]
    lines: list[list[str]]
    notes: list[str]


def state_table(rows: Sequence[Row], *, full: bool = False) -> str:
    """A line for each array: path, shape, dtype, bytes of state, frozen, rule, why this rule; then the totals.

    Lines that repeat from layer to layer are one, and the table is cut to 40 lines of 120 columns, unless it is to be
    ``full``. A rule that all parameters share is shown once, below; so are the fields of rules that the table has no room for.
    """
    head, lines, notes = _cells(rows, folded=False) if full else _screen(rows, WIDTH)
    return "\n".join([table(head, lines), *notes])


def _cells(rows: Sequence[Row], *, folded: bool = True) -> _Table:
    groups = [(row.path, [i]) for i, row in enumerate(rows)]
    if folded:
        groups = [(f.path, f.members) for f in fold([row.path for row in rows], [row[1:-1] for row in rows])]
    lines = []
    for path, members in groups:
        row, count = rows[members[0]], len(members)
        times = f"x{count}" if count > 1 else ""
        used = bytes_text(row.bytes * count)
        lines.append([path, times, row.shape, row.dtype, used, "frozen" if row.frozen else "", row.rule, row.reason])
    size, total = sum(row.size for row in rows), sum(row.bytes for row in rows)
    here = sum(row.here for row in rows)
    note = f"{len(rows)} array{'' if len(rows) == 1 else 's'}, {size:,} parameters, {bytes_text(total)} of state"
    note += f", {bytes_text(here)} of it on this rank" if here != total else ""
    if len(rows) > 1 and len({(row.rule, row.reason) for row in rows}) == 1:
        return _Table(_HEAD[:_RULE], [line[:_RULE] for line in lines], [f"all: {rows[0].rule} ({rows[0].reason})", note])
    return _Table(list(_HEAD), lines, [note])


def _screen(rows: Sequence[Row], width: int) -> _Table:
    """The table in at most 40 lines, and no wider than a screen as far as that can be."""
    head, lines, notes = _cells(rows)
    if _width(head, lines) > width and "rule" in head:
        rules = [line[_RULE] for line in lines]
        for by_last in (False, True):
            names = named(rows, by_last=by_last)
            for line, rule in zip(lines, rules, strict=True):
                line[_RULE] = names[rule]
            if _width(head, lines) <= width:
                break
        notes = [*(f"{name}: {rule}" for rule, name in names.items() if name != rule), *notes]
    notes = [line for note in notes for line in _wrapped(note, width)]
    room = max(ROWS - 2 - len(notes), 8)
    if len(lines) > room:
        left = len(lines) - (room - 1)
        lines, notes = lines[: room - 1], [f"... and {left} more lines; optimisers.summary(state, by='path') has all", *notes]
    for name, least in _LEAST.items():
        over = _width(head, lines) - width
        if over > 0 and name in head:
            column = head.index(name)
            room = max(max(len(line[column]) for line in lines) - over, least)
            for line in lines:
                # The end of a path tells most, and that of a rule's name is its number.
                line[column] = _end(line[column], room) if name.startswith("why") else _middle(line[column], room)
    return _Table(head, lines, notes)


def named(rows: Sequence[Row], *, by_last: bool = False) -> dict[str, str]:
    """A short name for each rule: its type, with a number where several rules are of one type.

    The type of a chain is that of all its members, or ``by_last`` of the last one, which steps.
    """
    of_kind: dict[str, dict[str, None]] = {}
    for row in rows:
        of_kind.setdefault(row.kind.rpartition(" > ")[2] if by_last else row.kind, {})[row.rule] = None
    return {
        rule: kind if len(rules) == 1 else f"{kind} #{k}" for kind, rules in of_kind.items() for k, rule in enumerate(rules, 1)
    }


def _width(head: Sequence[str], lines: Sequence[Sequence[str]]) -> int:
    return max(map(len, table(head, lines).splitlines()))


def _end(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 3].rstrip(", ") + "..."


def _middle(text: str, room: int) -> str:
    """The ends of a path say more than its middle."""
    if len(text) <= room:
        return text
    first = (room - 3) // 2
    return f"{text[:first]}...{text[len(text) - (room - 3 - first) :]}"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False) or [text]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces; those without a name are left out if they are empty."""
    lines = _aligned(head, rows)
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * len(cell) for cell in lines[0]], *lines[1:]])


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    used = _used(head, rows)
    widths = {i: max([len(head[i]), *(len(row[i]) for row in rows)]) for i in used}
    return [[line[i].ljust(widths[i]) for i in used] for line in [head, *rows]]


def _used(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [i for i, name in enumerate(head) if name or any(row[i] for row in rows)]


def state_html(rows: Sequence[Row]) -> str:
    """The table for a notebook: lines that repeat are one, and all of them are there, to be scrolled."""
    head, lines, notes = _cells(rows)
    used = _used(head, lines)

    def cells(tag: str, line: Sequence[str]) -> str:
        return "<tr>" + "".join(f'<{tag} style="text-align:left">{html.escape(line[i])}</{tag}>' for i in used) + "</tr>"

    body = "".join(cells("td", line) for line in lines)
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    top = f"<thead>{cells('th', head)}</thead>"
    return f'<div style="max-height:40em;overflow:auto"><table>{top}<tbody>{body}</tbody></table></div>{below}'


def state_rich(rows: Sequence[Row], width: int) -> Iterator[Any]:
    """The lines of the table in colour; only rich asks for them."""
    text = import_module("rich.text").Text
    head, lines, notes = _screen(rows, width)
    styles = [_STYLES.get(head[i], "") for i in _used(head, lines)]
    for k, cells in enumerate(_aligned(head, lines)):
        styled = [(f"{cell}  ", f"bold {style}" if k == 0 else style) for cell, style in zip(cells, styles, strict=True)]
        line = text.assemble(*styled, no_wrap=True)
        line.rstrip()
        yield line
    yield from map(text, notes)


def rule_text(rule: AbstractRule) -> str:
    """A rule in short: only the fields that differ from their defaults."""
    if isinstance(rule, OptimiserChain):
        return " > ".join(map(rule_text, rule.rules)) or "identity"
    shown = []
    for field in dataclasses.fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, field.name)
        if not field.repr:
            continue
        if dataclasses.is_dataclass(value):  # a rule inside, or the description of an iteration
            text = rule_text(value)  # type: ignore[arg-type]
            if hasattr(value, "stages") or value != field.default:
                shown.append(text if hasattr(value, "stages") else f"{field.name}={text}")
        elif field.name == "eta" or kind(value) or field.default is dataclasses.MISSING or value != field.default:
            text = _value_text(value)
            shown.append(f"{field.name}={text if kind(value) is None else 'tensor'}")
    return f"{type(rule).__name__}({', '.join(shown)})"


def rule_kind(rule: AbstractRule) -> str:
    """A rule without its fields: its type, and those of the rules that it chains or wraps."""
    if isinstance(rule, OptimiserChain):
        return " > ".join(map(rule_kind, rule.rules)) or "identity"
    inside = [rule_kind(child) for name, _, child in children(rule) if name == "rule"]
    return f"{type(rule).__name__}({', '.join(inside)})" if inside else type(rule).__name__


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return getattr(value, "__name__", None) or repr(value)


def state_bytes(state: Any) -> int:
    """Bytes of the arrays and counters of a state (8 for a counter)."""
    total = 0
    for leaf in state_leaves(state):
        if is_number(leaf):
            total += 8
        elif kind(leaf):
            total += int(leaf.nbytes)
    return total


def bytes_of(dtype: str) -> int:
    """The bytes of an element of the dtype of this name."""
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1


def bytes_text(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
