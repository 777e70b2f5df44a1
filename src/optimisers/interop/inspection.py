"""Looking into files that `save` wrote: what they hold, and what changed between two. No model is needed, no rule is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..arrays import dtype_name
from ..tree.fold import fold
from ..tree.show import bytes_text, table
from . import _tensor_file
from ._match import StoredEntry
from ._rule_text import OWN
from .checkpoint import parsed


class Stored(NamedTuple):
    """What a file says of one parameter."""

    entry: StoredEntry
    rule: str
    bytes: int
    steps: int | None
    """Steps taken, where the state tells."""
    arrays: dict[str, Any]
    """The arrays and numbers of the state, by where they stand in it."""


def contents(path: str | Path) -> dict[str, Stored]:
    """What a file holds, by the path of the parameter; CheckpointError if it is damaged, hostile, or no checkpoint."""
    _tensor_file.import_torch_for(Path(path))
    text, tensors = _tensor_file.read(Path(path))
    header, entries = parsed(text, str(path))
    found = {}
    for entry in entries:
        rule = None if entry.rule is None else header["rules"][entry.rule]
        arrays = dict(_arrays(entry.state, tensors, ""))
        used = sum(int(x.nbytes) for x in arrays.values())
        found[entry.path] = Stored(entry, rule_text(rule), used, _steps(rule, arrays), arrays)
    return found


def show(path: str | Path, *, full: bool = False) -> str:
    """A table of a file: path, shape, dtype, bytes of state, steps taken, frozen, rule; what repeats is one line."""
    found = list(contents(path).values())
    cells = [_cells(stored) for stored in found]
    paths = [" = ".join([stored.entry.path or "(the array)", *stored.entry.tied]) for stored in found]
    rows = [(p, [i]) for i, p in enumerate(paths)] if full else [(f.path, f.members) for f in fold(paths, cells)]
    lines = []
    for name, members in rows:
        shape, dtype, _, steps, frozen, rule = cells[members[0]]
        used = bytes_text(sum(found[i].bytes for i in members))
        lines.append([name, f"x{len(members)}" if len(members) > 1 else "", shape, dtype, used, steps, frozen, rule])
    size = sum(math.prod(stored.entry.shape) for stored in found)
    kept = bytes_text(sum(stored.bytes for stored in found))
    total = f"{len(found)} array{'' if len(found) == 1 else 's'}, {size:,} parameters, {kept} of state"
    return f"{table(['path', '', 'shape', 'dtype', 'state', 'steps', '', 'rule'], lines)}\n{total}"


def _cells(stored: Stored) -> tuple[str, ...]:
    entry = stored.entry
    shape = "x".join(map(str, entry.shape)) or "0-d"
    steps = "" if stored.steps is None else f"{stored.steps:,}"
    return (
        shape,
        entry.dtype,
        str(stored.bytes),
        steps,
        "frozen" if entry.frozen and entry.rule is not None else "",
        stored.rule,
    )


def diff(before: str | Path, after: str | Path) -> str:
    """What changed from one file to another, a line for each kind of change; "the same" if nothing did."""
    old, new = contents(before), contents(after)
    changes: dict[str, list[str]] = {}

    def note(text: str, path: str) -> None:
        changes.setdefault(text, []).append(path or "(the array)")

    for path, a in old.items():
        if path not in new:
            note("only in the first", path)
            continue
        for text in _changes(a, new[path]):
            note(text, path)
    for path in new:
        if path not in old:
            note("only in the second", path)
    lines = []
    for text, paths in changes.items():
        folded = fold(paths, [None] * len(paths))
        lines += [f"{text}:", *(f"  {row.path}" + (f"  x{len(row.members)}" if len(row.members) > 1 else "") for row in folded)]
    return "\n".join(lines) or "the same"


def _changes(a: Stored, b: Stored) -> Iterator[str]:
    for name, old, new in (
        ("shape", a.entry.shape, b.entry.shape),
        ("dtype", a.entry.dtype, b.entry.dtype),
        ("ties", a.entry.tied, b.entry.tied),
        ("rule", a.rule, b.rule),
    ):
        if old != new:
            yield f"{name} {old} -> {new}"
    if a.entry.frozen != b.entry.frozen:
        yield "frozen" if b.entry.frozen else "thawed"
    if a.steps != b.steps and None not in (a.steps, b.steps):
        yield f"steps {a.steps:,} -> {b.steps:,}"
    if a.arrays.keys() != b.arrays.keys():
        yield f"state of {len(a.arrays)} parts -> {len(b.arrays)}"
    elif any(not _same(x, b.arrays[name]) for name, x in a.arrays.items()):
        yield "other values in the state"


def _same(a: Any, b: Any) -> bool:
    alike = tuple(a.shape) == tuple(b.shape) and dtype_name(a) == dtype_name(b)
    return alike and _tensor_file.raw(a) == _tensor_file.raw(b)


def _arrays(state: Any, tensors: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    """(place, array) for each array and number that a description names."""
    if not isinstance(state, dict):
        return
    for word, value in state.items():
        if word in {"array", "int", "float"} and isinstance(value, str) and value in tensors:
            yield f"{at}:{word}", tensors[value]
        elif word in {"tuple", "list", "dict"} and isinstance(value, list):
            for i, item in enumerate(value):
                inner = item[1] if word == "dict" and isinstance(item, list) and len(item) == 2 else item
                yield from _arrays(inner, tensors, f"{at}.{i}")


def _steps(rule: Any, arrays: Mapping[str, Any]) -> int | None:
    """The steps taken, from powers of the betas: Adam and its kin keep ``beta**t``, t being that of the coming step."""
    numbers = [float(x) for name, x in arrays.items() if name.endswith(":float") and not tuple(x.shape)]
    for beta in sorted(set(_betas(rule)), reverse=True):
        for power in numbers:
            if 0 < power <= beta < 1:
                steps = math.log(power) / math.log(beta)
                if abs(steps - round(steps)) < 1e-6 * steps:
                    return round(steps) - 1
    return None


def _betas(rule: Any) -> Iterator[float]:
    if isinstance(rule, list):
        for item in rule:
            yield from _betas(item)
    elif isinstance(rule, dict):
        beta = rule.get("beta")
        yield from (b for b in (beta if isinstance(beta, list) else ()) if isinstance(b, float))
        for value in rule.values():
            yield from _betas(value)


def rule_text(rule: Any) -> str:
    """A described rule in short, only the fields that differ from their defaults; nothing is made of it."""
    if rule is None:
        return "not trained"
    name, fields = rule.get("type"), rule.get("fields")
    if not isinstance(name, str) or not isinstance(fields, dict):
        return "?"
    if name == "OptimiserChain" and isinstance(fields.get("rules"), list):
        return " > ".join(rule_text(member) if isinstance(member, dict) else "?" for member in fields["rules"]) or "identity"
    known = {f.name: f for f in dataclasses.fields(OWN[name])} if name in OWN else {}
    shown_fields = []
    for field, value in fields.items():
        given = known.get(field)
        if isinstance(value, dict) and "type" in value:
            shown_fields.append(rule_text(value))
        elif field == "eta" or given is None or (given.repr and _plain(value) != given.default):
            shown_fields.append(f"{field}={_plain(value)}")
    return f"{name.rpartition('.')[2]}({', '.join(shown_fields)})"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return "a function" if "callable" in value else next(iter(value.values()), "?")
    return value
