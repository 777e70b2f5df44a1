"""Paths of leaves: keys, and the strings made of them."""

from __future__ import annotations

import re
from collections import Counter
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
    """The keys joined with dots, so that a module, its flat dict of names and a nested dict have the same paths."""
    return ".".join(map(str, keys))


def paths_of(keys: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """The paths of all leaves of a model. Only where two of them would be one, dots inside their keys are escaped."""
    return _distinct([path_of(key) for key in keys], [escaped(key) for key in keys])


def escaped(keys: Sequence[Any]) -> str:
    """The keys joined with dots; a dot or backslash inside a key is escaped with a backslash."""
    return ".".join(str(key).replace("\\", "\\\\").replace(".", "\\.") for key in keys)


def unescaped(paths: Sequence[str]) -> tuple[str, ...]:
    """The paths of a model of whose paths every one was escaped."""
    return _distinct([_ESCAPE.sub(r"\1", path) for path in paths], list(paths))


_ESCAPE = re.compile(r"\\([\\.])")


def _distinct(plain: Sequence[str], escapes: Sequence[str]) -> tuple[str, ...]:
    paths = tuple(plain)
    while True:
        counts = Counter(paths)
        longer = tuple(full if counts[path] > 1 else path for path, full in zip(paths, escapes, strict=True))
        if longer == paths:
            return paths
        paths = longer


def parts_of(path: str) -> list[str]:
    """A path cut at its dots but those that are escaped."""
    return re.split(r"(?<!\\)\.", path) if path else []


def shown(path: str) -> str:
    """A path as it stands in messages; the root, and so a bare array, has an empty path."""
    return repr(path) if path else "the root"
