"""Tables of states, as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..arrays import is_number, kind
from ..rules._base import AbstractRule
from ..rules._precision import state_leaves
from ..rules.chain import OptimiserChain

if TYPE_CHECKING:
    from .leaves import Slot


def state_table(rows: Sequence[tuple[Slot, AbstractRule | None, Any, bool, str]]) -> str:
    """One line a parameter: path, shape, dtype, bytes of state, frozen, rule, why this rule; then the totals.

    A rule that all parameters share is shown once, below.
    """
    head = ["path", "shape", "dtype", "state", "", "rule", "why this rule"]
    texts = ["not trained" if rule is None else rule_text(rule) for _, rule, _, _, _ in rows]
    reasons = [reason for *_, reason in rows]
    alike = len(rows) > 1 and len(set(texts)) == 1 and len(set(reasons)) == 1
    lines = []
    total = size = 0
    for (slot, rule, state, frozen, reason), text in zip(rows, texts, strict=True):
        used = state_bytes(state)
        total, size = total + used, size + slot.param.size
        path = " = ".join([slot.path or "(the array)", *slot.param.tied_paths])
        shape = "x".join(map(str, slot.param.shape)) or "0-d"
        lines.append([path, shape, slot.dtype, bytes_text(used), "frozen" if frozen and rule is not None else "", text, reason])
    note = f"{len(rows)} array{'' if len(rows) == 1 else 's'}, {size:,} parameters, {bytes_text(total)} of state"
    if alike:
        head, lines = head[:-2], [line[:-2] for line in lines]
        note = f"all: {texts[0]} ({reasons[0]})\n{note}"
    return f"{table(head, lines)}\n{note}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces."""
    used = [i for i, name in enumerate(head) if name or any(row[i] for row in rows)]
    widths = {i: max([len(head[i]), *(len(row[i]) for row in rows)]) for i in used}

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cells[i].ljust(widths[i]) for i in used).rstrip()

    return "\n".join([line(head), "  ".join("-" * widths[i] for i in used), *map(line, rows)])


def rule_text(rule: AbstractRule) -> str:
    """A rule in short: only the fields that differ from their defaults."""
    if isinstance(rule, OptimiserChain):
        return " > ".join(map(rule_text, rule.rules)) or "identity"
    shown = []
    for field in dataclasses.fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, field.name)
        if not field.repr:
            continue
        if hasattr(value, "stages"):
            shown.append(rule_text(value))
        elif field.name == "eta" or kind(value) or field.default is dataclasses.MISSING or value != field.default:
            text = _value_text(value)
            shown.append(f"{field.name}={text if kind(value) is None else 'tensor'}")
    return f"{type(rule).__name__}({', '.join(shown)})"


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


def bytes_text(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
