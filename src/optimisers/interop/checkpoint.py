"""``save`` and ``load``: states in files that hold no code, keyed by path, and exact to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, CheckpointError
from ..errors import described as named
from ..tree.entry import host_state
from ..tree.leaves import find
from ..tree.param import Param
from ..tree.paths import unescaped
from ..tree.state import StateTree, check_alive
from . import _rule_text, _state_text, _tensor_file, _together
from ._match import Loading, StoredEntry
from ._state_dict import load_state_dict, name_of, state_dict

__all__ = ["load", "load_state_dict", "save", "state_dict"]

SCHEMA = 1
"""Raised when a file could no longer be read by an older version of this library."""


def save(path: str | os.PathLike[str], state: StateTree) -> None:
    """Write a state to a file: moments, counters, rules, frozen flags, ties and reasons, keyed by path.

    The file is a safetensors file whose metadata describe the rules as JSON: no pickle, no code. It appears whole or not at
    all: a crash at any moment leaves the old file or the new one. The model is not in it; save that as you always do.

    Where arrays are cut over ranks (DTensors), all ranks call it: the first one writes the file that a single process would
    write, and each whole tensor is put together when its turn has come. `load` reads it on any number of ranks.

    Raises CheckpointError for a state that a file cannot hold (a number beyond 64 bits, a dtype that safetensors does not
    know), MissingPackageError without the package safetensors, and OSError where the file cannot be written.
    """
    if not isinstance(state, StateTree):
        msg = f"save: expected the state that setup returned, got {named(state)}; the order is save(path, state)"
        raise ArgumentError(msg)
    check_alive(state)
    tensors: dict[str, Any] = {}
    header = _header(state, tensors)
    _together.write(Path(path), tensors, json.dumps(header, separators=(",", ":"), allow_nan=False))


def load(
    path: str | os.PathLike[str],
    like: Any,
    *,
    strict: bool = True,
    rename: Callable[[str], str] | None = None,
    trainable: Callable[[Param], bool] | None = None,
) -> StateTree:
    """A state from a file that `save` wrote; the next step is the one that the saved state would have taken.

    Args:
        like: the model, whose rules are then rebuilt from the file; or a state set up for it, which supplies what no file can
            hold (functions in the fields of rules) and must have the same types of rules. Either says where the arrays go:
            kind, device, structure. Hyper-parameters, frozen flags and reasons are those of the file in both cases.
        strict: with False, what fits is taken and the rest starts anew, with its rule in ``like``, or the one rule that all
            of the file share; entries of the file without a place are dropped. The reasons in ``print(state)`` say which.
        rename: a function from a path in the file to the path in the model, for layers that were renamed.
        trainable: as in `setup`, where ``like`` is a model; give it again if setup had it.

    Raises CheckpointError for a damaged or foreign file; for one that does not fit, with every missing, unexpected and
    mismatched path; and for rules that only ``like=state`` can supply. MissingPackageError without the package safetensors.
    """
    if isinstance(like, StateTree):
        check_alive(like)
    path = Path(path)
    found = None if isinstance(like, StateTree) else find(like, trainable)
    text, tensors = _tensor_file.read(path, _together.keeping(like._slots if found is None else found.slots, rename))
    header, entries = parsed(text, str(path))
    loading = Loading(str(path), header["rules"], entries, header["untrained"], tensors, rename)
    try:
        return loading.into_state(like, strict=strict) if found is None else loading.into_model(found, strict=strict)
    except RecursionError:
        msg = f"load: the description in {str(path)!r} is nested deeper than any rule or state"
        raise CheckpointError(msg) from None


# --- describing -------------------------------------------------------------------------------------------------------


def _header(state: StateTree, tensors: dict[str, Any]) -> dict[str, Any]:
    """The description of a state; its arrays are put into ``tensors``."""

    def keep(name: str, x: Any) -> str:
        while name in tensors:  # keys 1 and "1" of one dict look alike
            name += "'"
        tensors[name] = x
        return name

    rules: list[Any] = []
    numbers: dict[int, int] = {}  # rules that are shared are written once

    def rule_number(rule: Any) -> int | None:
        if rule is None:
            return None
        if id(rule) not in numbers:
            numbers[id(rule)] = len(rules)
            at = f"rule {len(rules)}"
            rules.append(None)
            rules[-1] = _rule_text.described(rule, lambda x: keep(f"{at}:tensor", _tensor_file.stored(x, at)[0]))
        return numbers[id(rule)]

    entries = []
    for slot, entry in zip(state._slots, state._entries, strict=True):

        def keep_here(position: tuple[Any, ...], x: Any, path: str = slot.path) -> str:
            return keep(name_of(path, position), x)

        entries.append(
            {
                "path": slot.path,
                "tied": list(slot.param.tied_paths),
                "shape": list(slot.param.shape),
                "dtype": slot.dtype,
                "kind": slot.kind,
                "rule": rule_number(entry.rule),
                "base": rule_number(entry.base),
                "frozen": entry.frozen,
                "reason": entry.reason,
                "state": _state_text.described(host_state(entry), keep_here, slot.path),
            }
        )
    trained = {place.leaf for slot in state._slots for place in slot.places}
    untrained = [path for i, path in enumerate(state._structure.paths) if i not in trained]
    return {"schema": SCHEMA, "paths": "plain", "untrained": untrained, "rules": rules, "entries": entries}


# --- reading ----------------------------------------------------------------------------------------------------------


def parsed(text: str, where: str) -> tuple[dict[str, Any], tuple[StoredEntry, ...]]:
    """The description in a file, every part of the type that it should be."""
    try:
        header = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        msg = f"load: the description in {where!r} cannot be read: {error}"
        raise CheckpointError(msg) from None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA or isinstance(header.get("schema"), bool):
        got = header.get("schema") if isinstance(header, dict) else None
        msg = f"load: {where!r} has schema {got!r:.40}; this version of the library reads schema {SCHEMA}"
        raise CheckpointError(msg)
    rules, entries, untrained = (header.get(key) for key in ("rules", "entries", "untrained"))
    ok = isinstance(rules, list) and isinstance(entries, list) and _strings(untrained)
    if not ok:
        msg = f"load: the description in {where!r} lacks its rules, its entries or its untrained paths"
        raise CheckpointError(msg)
    found = tuple(StoredEntry.parsed(entry, len(rules), where) for entry in entries)  # type: ignore[arg-type, union-attr]
    return (header, found) if header.get("paths") == "plain" else _with_plain_paths(header, found)


def _with_plain_paths(
    header: dict[str, Any], entries: tuple[StoredEntry, ...]
) -> tuple[dict[str, Any], tuple[StoredEntry, ...]]:
    """The description of a file from the time when every dot inside a key was escaped."""
    old = list(dict.fromkeys([*(name for e in entries for name in (e.path, *e.tied)), *header["untrained"]]))
    new = dict(zip(old, unescaped(old), strict=True))
    moved = tuple(replace(e, path=new[e.path], tied=tuple(new[name] for name in e.tied)) for e in entries)
    return {**header, "untrained": [new[path] for path in header["untrained"]]}, moved


def _refuse_constant(name: str) -> Any:
    msg = f"{name} is no JSON"
    raise ValueError(msg)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
