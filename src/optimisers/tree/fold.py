"""Rows that repeat from layer to layer, shown as one: ``h.{0..11}.attn.weight``."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

Parts: TypeAlias = tuple[str | tuple[int, ...], ...]
"""A path, cut at its whole numbers; each of these is a tuple of those that stand there."""

_INDEX = re.compile(r"(?:(?<=\.)|^)(0|[1-9][0-9]*)(?=\.|$)")


class Folded(NamedTuple):
    """Paths that differ in their indices only."""

    path: str
    members: list[int]
    """Which of the given paths they are."""


def fold(paths: Sequence[str], alike: Sequence[Hashable]) -> list[Folded]:
    """Paths by what they have in common, in the order in which each first appears.

    Two are put together if they differ in one index and are ``alike`` (a key for each), and so are the results again, so that
    a grid of indices becomes one row.
    """
    rows = [(_parts(path), [i]) for i, path in enumerate(paths)]
    places = max((len(parts) for parts, _ in rows), default=0)
    for place in range(1, places, 2):
        joined: dict[Hashable, tuple[Parts, list[int]]] = {}
        for parts, members in rows:
            if place >= len(parts):
                joined[parts, alike[members[0]], tuple(members)] = parts, members
                continue
            key = parts[:place], parts[place + 1 :], alike[members[0]], len(parts)
            if key not in joined:
                joined[key] = parts, list(members)
                continue
            before, others = joined[key]
            merged = tuple(sorted({*before[place], *parts[place]}))
            joined[key] = (*before[:place], merged, *before[place + 1 :]), others + members
        rows = list(joined.values())
    return [Folded("".join(map(_text, parts)), sorted(members)) for parts, members in rows]


def _parts(path: str) -> Parts:
    pieces = _INDEX.split(path)
    return tuple((int(piece),) if k % 2 else piece for k, piece in enumerate(pieces))


def _text(part: str | tuple[int, ...]) -> str:
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return str(part[0])
    runs: list[list[int]] = []
    for index in part:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    texts = [str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in runs]
    return f"{{{','.join(texts)}}}"
