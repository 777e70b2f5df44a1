"""Choosing parameters: globs on the path, types of the owner, predicates."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..errors import ArgumentError, SelectionError
from .param import Param


def check_pattern(pattern: Any, where: str) -> None:
    """Raise ArgumentError unless this is a glob, a type, a predicate, or a tuple or list of those."""
    if isinstance(pattern, (tuple, list)) and pattern:
        for item in pattern:
            check_pattern(item, where)
    elif not (isinstance(pattern, (str, type)) or callable(pattern)):
        msg = f"{where}: a pattern is a glob on the path, the type of the owner, or a predicate on Param; got {pattern!r}"
        raise ArgumentError(msg)


def matches(pattern: Any, param: Param, paths: Sequence[str] | None = None) -> bool:
    """Whether the pattern selects the parameter, under any of these paths (its own if not given)."""
    if isinstance(pattern, (tuple, list)):
        return any(matches(item, param, paths) for item in pattern)
    if isinstance(pattern, str):
        return any(glob(pattern, path) for path in ((param.path,) if paths is None else paths))
    if isinstance(pattern, type):
        return param.owner is not None and issubclass(param.owner, pattern)
    return bool(pattern(param))


def glob(pattern: str, path: str) -> bool:
    """Case-sensitive; ``*`` crosses dots, and ``*.name`` also matches a top-level ``name``."""
    return fnmatchcase(path, pattern) or (pattern.startswith("*.") and fnmatchcase(path, pattern[2:]))


def describe(pattern: Any) -> str:
    """A pattern as reports and errors show it."""
    if isinstance(pattern, (tuple, list)):
        return " or ".join(describe(item) for item in pattern)
    if isinstance(pattern, str):
        return repr(pattern)
    if isinstance(pattern, type):
        return f"owner {pattern.__name__}"
    return f"predicate {getattr(pattern, '__name__', type(pattern).__name__)}"


def selected(params: Sequence[Param], where: Any) -> list[bool]:
    """Which parameters ``where`` selects (all if it is None); SelectionError if none."""
    if where is None:
        return [True] * len(params)
    check_pattern(where, "where=")
    chosen = [matches(where, param, (param.path, *param.tied_paths)) for param in params]
    if not any(chosen):
        raise SelectionError(f"where={describe(where)} selects no parameter. {known_paths(where, params)}")
    return chosen


def known_paths(pattern: Any, params: Sequence[Param], most: int = 12) -> str:
    """The paths that exist, those alike first, for an error about a pattern."""
    paths = [path for param in params for path in (param.path, *param.tied_paths)]
    close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5) if isinstance(pattern, str) else []
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    listed = ", ".join(map(repr, paths[:most])) + (f" and {len(paths) - most} more" if len(paths) > most else "")
    return f"{hint}The paths are: {listed}"
