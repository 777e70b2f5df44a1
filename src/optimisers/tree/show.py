"""Tables of states, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..arrays import is_number, kind
from ..rules._precision import state_leaves

if TYPE_CHECKING:
    from ..rules._base import AbstractRule
    from .leaves import Slot


def state_table(rows: Sequence[tuple[Slot, AbstractRule | None, Any, bool, str]]) -> str:
    """One line a parameter: path, shape, dtype, rule, bytes of state, frozen, why this rule; then the totals."""
    head = ["path", "shape", "dtype", "rule", "state", "", "why this rule"]
    lines = []
    total = size = 0
    for slot, rule, state, frozen, reason in rows:
        used = state_bytes(state)
        total, size = total + used, size + slot.param.size
        path = " = ".join([slot.path or "(the array)", *slot.param.tied_paths])
        shape = "x".join(map(str, slot.param.shape)) or "0-d"
        text = "not trained" if rule is None else rule_text(rule)
        lines.append([path, shape, slot.dtype, text, bytes_text(used), "frozen" if frozen and rule is not None else "", reason])
    note = f"{len(rows)} arrays, {size:,} parameters, {bytes_text(total)} of state"
    return f"{table(head, lines)}\n{note}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int = 60) -> str:
    """Columns aligned with spaces; long cells are cut in the middle."""
    cut = [[_cut(cell, most) for cell in row] for row in rows]
    used = [i for i, name in enumerate(head) if name or any(row[i] for row in cut)]
    widths = {i: max(len(head[i]), *(len(row[i]) for row in cut)) if cut else len(head[i]) for i in used}

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cells[i].ljust(widths[i]) for i in used).rstrip()

    return "\n".join([line(head), "  ".join("-" * widths[i] for i in used), *map(line, cut)])


def _cut(cell: str, most: int) -> str:
    return cell if len(cell) <= most else f"{cell[: most // 2 - 2]} ... {cell[-(most // 2 - 3) :]}"


def rule_text(rule: AbstractRule) -> str:
    """A rule in short: only the fields that differ from their defaults."""
    import dataclasses

    from ..rules.chain import OptimiserChain

    if isinstance(rule, OptimiserChain):
        return " > ".join(map(rule_text, rule.rules)) or "identity"
    shown = []
    for field in dataclasses.fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, field.name)
        if hasattr(value, "stages"):
            shown.append(rule_text(value))
        elif field.name == "eta" or kind(value) or field.default is dataclasses.MISSING or value != field.default:
            text = f"{value:g}" if isinstance(value, float) else repr(value)
            shown.append(f"{field.name}={text if kind(value) is None else 'tensor'}")
    return f"{type(rule).__name__}({', '.join(shown)})"


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
