"""Loops without a compiler: a pass is run by NumPy, over blocks of elements that stay in the caches.

Everything in a block is written to scratch memory of the thread, so that nothing is allocated and temporaries never reach
main memory. Large arrays are cut into blocks; small ones are gathered into common ones, so that they share calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ...graph.program import Program, all_passes
from ..threads import on_threads
from ..work import Table
from .sheet import Sheet

Vector = np.ndarray[Any, Any]

BLOCK = 2**16
"""Elements of a block. With the dozen registers that a rule needs it fills a second-level cache."""
_GATHERED = 2**12  # arrays of at most so many elements share blocks
_CUTS = 64  # pieces of work of which the blocks are kept


class Cut(NamedTuple):
    """The blocks of a pass over some arrays, and where their sums go: a row for each part of an array."""

    members: list[int]
    sizes: list[int]
    slices: list[tuple[int, int, int, int]]
    """(index of the array, first element, number of elements, row)."""
    gathered: list[tuple[Vector, Vector]]
    """(indices of arrays, their starts in the block)."""
    starts: Vector
    """The first row of each array."""
    rows: int
    elements: int


def cut(members: Vector, sizes: Vector) -> Cut:
    """Blocks for these arrays; ``sizes`` are theirs."""
    slices, gathered = [], []
    count = np.maximum(-(-sizes // BLOCK), 1)
    starts = np.concatenate([[0], np.cumsum(count)])
    small = np.flatnonzero(sizes <= _GATHERED)
    for i in np.flatnonzero(sizes > _GATHERED).tolist():
        size, row = int(sizes[i]), int(starts[i])
        slices += [(i, first, min(BLOCK, size - first), row + k) for k, first in enumerate(range(0, size, BLOCK))]
    ends = np.cumsum(sizes[small])
    first = 0
    while first < len(small):  # as many as a block holds
        before = int(ends[first - 1]) if first else 0
        end = int(np.searchsorted(ends, before + BLOCK, "right"))
        gathered.append((small[first:end], np.concatenate([[0], ends[first:end] - before]).astype(np.int64)))
        first = end
    return Cut(members.tolist(), sizes.tolist(), slices, gathered, starts[:-1], int(starts[-1]), int(sizes.sum()))


class _At:
    """Memory at an address, for NumPy. Whoever uses it sees to it that the memory is there."""

    def __init__(self, address: int, size: int, dtype: Any) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": np.dtype(dtype).str, "version": 3}


class Blocks:
    """The passes of a program, run by NumPy; in the place of compiled loops."""

    compiled = False

    def __init__(self, program: Program) -> None:
        self.sheets = [Sheet(program, this) for this in all_passes(program)]
        self._program = program
        self._cuts: dict[int, tuple[Any, Cut]] = {}
        self._views: dict[tuple[int, int, Any], Vector] = {}

    def prepare(
        self,
        index: int,
        work: Table,
        pointers: Vector,
        numbers: Vector,
        *,
        out_of_place: bool = False,  # noqa: ARG002
    ) -> Callable[[], list[Any]]:
        """As `Loops.prepare`; NumPy's results go through the caches in any case."""
        return lambda: self._run(index, work, pointers, numbers)

    def _run(self, index: int, work: Table, pointers: Vector, numbers: Vector) -> list[Any]:
        sheet, blocks = self.sheets[index], self._blocks(work)
        if not sheet.steps and not sheet.copies and not sheet.sums:
            return []
        rows = numbers[blocks.members]
        values = sheet.tape.run({name: rows[:, k] for name, k in self._program.columns.items()})
        given = [_number(value, dtype) for value, dtype in zip(values, sheet.number_dtypes, strict=True)]
        used = [*sheet.read, *range(len(sheet.columns), sheet.first_number)]
        arrays = {k: self._arrays(sheet.array_dtypes[k], pointers[:, sheet.addresses[k]], blocks) for k in used}
        sums = np.empty((blocks.rows, len(sheet.sums)))
        units = iter(itertools.chain(blocks.slices, blocks.gathered))  # next() of an iterator made in C is atomic
        on_threads(_work, (sheet, blocks, units, arrays, given, sums), blocks.elements)
        return [join.reduceat(sums[:, k], blocks.starts) for k, join in enumerate(sheet.joins)]

    def _blocks(self, work: Table) -> Cut:
        kept = self._cuts.get(id(work))
        if kept is None or kept[0] is not work:
            if len(self._cuts) >= _CUTS:
                self._cuts.clear()
            sizes = np.add.reduceat(work.pieces[:, 2], work.starts)
            kept = self._cuts[id(work)] = work, cut(work.members, sizes)
        return kept[1]

    def _arrays(self, dtype: Any, addresses: Vector, blocks: Cut) -> list[Vector]:
        """Views of the memory at addresses. What they are made of is a number, so they are kept from step to step."""
        if len(self._views) > 8 * len(self._program.pointers) * len(blocks.members) + 1024:
            self._views.clear()
        views, found = self._views, []
        for address, size in zip(addresses[blocks.members].tolist(), blocks.sizes, strict=True):
            key = (address, size, dtype)
            view = views.get(key)
            if view is None:
                view = views[key] = np.asarray(_At(address, size, dtype))
            found.append(view)
        return found


def _number(value: Any, dtype: Any) -> Any:
    """A number of the pass: one for all arrays if they agree (in their bits: NaN is NaN), else one for each."""
    if np.ndim(value) == 0:
        return dtype(value)
    vector = np.asarray(value).astype(dtype)
    first = vector[0]
    return first if (vector == first).all() or (vector != vector).all() else vector  # noqa: PLR0124 (NaN)


def _work(
    sheet: Sheet, blocks: Cut, units: Iterator[Any], arrays: dict[int, list[Vector]], given: list[Any], sums: Vector
) -> None:
    """Take units until there are none."""
    registers: list[Vector] = [np.empty(BLOCK, dtype) for dtype in sheet.registers]
    spare: dict[int, Vector] = {}
    with np.errstate(all="ignore"):
        for unit in units:
            if len(unit) == 4:
                i, first, n, row = unit
                values = [arrays[k][i][first : first + n] if k in arrays else None for k in range(sheet.first_number)]
                values += [value if np.ndim(value) == 0 else value[i] for value in given]
                values += registers if n == BLOCK else [register[:n] for register in registers]
                _call(sheet, values)
                for k, (place, join) in enumerate(zip(sheet.sums, sheet.joins, strict=True)):
                    sums[row, k] = join.reduce(values[place])
            else:
                _gathered(sheet, blocks, unit, arrays, given, registers, spare, sums)


def _call(sheet: Sheet, values: list[Any]) -> None:
    for function, arguments, result in sheet.steps:
        if len(arguments) == 2:
            function(values[arguments[0]], values[arguments[1]], out=values[result])
        else:
            function(*[values[a] for a in arguments], out=values[result])
    for value, place in sheet.copies:
        np.copyto(values[place], values[value])


def _gathered(
    sheet: Sheet,
    blocks: Cut,
    unit: tuple[Vector, Vector],
    arrays: dict[int, list[Vector]],
    given: list[Any],
    registers: list[Vector],
    spare: dict[int, Vector],
    sums: Vector,
) -> None:
    """One block made of many small arrays."""
    chosen, starts = unit
    n, indices = int(starts[-1]), chosen.tolist()
    values: list[Any] = [None] * sheet.first_number
    for k, views in arrays.items():
        if k not in spare:
            spare[k] = np.empty(BLOCK, views[0].dtype)
        values[k] = spare[k][:n]
        if k < len(sheet.columns):
            np.concatenate([views[i] for i in indices], out=values[k])
    lengths = np.diff(starts)
    values += [value if np.ndim(value) == 0 else np.repeat(value[chosen], lengths) for value in given]
    values += [register[:n] for register in registers]
    _call(sheet, values)
    for k, (place, join) in enumerate(zip(sheet.sums, sheet.joins, strict=True)):
        sums[blocks.starts[chosen], k] = join.reduceat(values[place], starts[:-1])
    bounds = starts.tolist()
    for k in range(len(sheet.columns), sheet.first_number):
        block, views = values[k], arrays[k]
        for i, (first, end) in zip(indices, itertools.pairwise(bounds), strict=True):
            views[i][:] = block[first:end]
