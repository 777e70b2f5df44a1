"""The work of a pass: its arrays cut into pieces, and these handed out in units."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_PIECE = 2**14  # elements of a piece: its arrays fit the second-level cache
_UNIT = 2**15  # what a thread takes at a time, in elements
_OVERHEAD = 64  # what a piece costs beside its elements, in elements

Ints = np.ndarray[Any, np.dtype[np.int64]]


class Table(NamedTuple):
    """The work of a pass over some of a group's arrays."""

    members: Ints
    pieces: Ints
    """(array, first element, number of elements) of each piece."""
    first: Ints
    """The first piece of each unit, and the end."""
    starts: Ints
    """The first piece of each array."""
    elements: int
    addresses: tuple[int, int]
    """Those of ``first`` and ``pieces``."""


def address(array: Any) -> int:
    """The address of a NumPy array's first element."""
    return int(array.__array_interface__["data"][0])


def table(members: Ints, sizes: Ints) -> Table:
    """The work over the given arrays but empty ones; ``sizes`` are those of all arrays of the group."""
    members = members[sizes[members] > 0]
    size = sizes[members]
    counts = -(-size // _PIECE)
    leaf = np.repeat(members, counts)
    ends = np.cumsum(counts)
    index = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
    start = index * _PIECE
    n = np.minimum(np.repeat(size, counts) - start, _PIECE)
    unit = np.cumsum(n + _OVERHEAD) // _UNIT
    ends_of_units = [*(np.flatnonzero(np.diff(unit)) + 1), len(n)] if len(n) else []
    first = np.array([0, *ends_of_units], np.int64)
    pieces = np.ascontiguousarray(np.stack([leaf, start, n], axis=1), dtype=np.int64)
    return Table(members, pieces, first, ends - counts, int(size.sum()), (address(first), address(pieces)))
