"""Paths of leaves: keys, and the strings made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optree import FlattenedEntry, GetAttrEntry, NamedTupleEntry, PyTreeAccessor, StructSequenceEntry


def keys_of(accessor: PyTreeAccessor) -> tuple[Any, ...]:
    """The keys of a leaf: dict keys, sequence indices, field names for attribute-like nodes."""
    return tuple(_key(entry) for entry in accessor)


def _key(entry: Any) -> Any:
    if isinstance(entry, (NamedTupleEntry, StructSequenceEntry)):
        return entry.field
    if isinstance(entry, GetAttrEntry):
        return entry.name
    if isinstance(entry, FlattenedEntry):
        return entry.entry
    return entry.entry


def path_of(keys: Sequence[Any]) -> str:
    """The keys joined with dots; a dot or backslash inside a key is escaped with a backslash."""
    return ".".join(str(key).replace("\\", "\\\\").replace(".", "\\.") for key in keys)


def shown(path: str) -> str:
    """A path as it stands in messages; the root, and so a bare array, has an empty path."""
    return repr(path) if path else "the root"
