"""Loops without a compiler: a pass is run by NumPy, over blocks of elements that stay in the caches.

Everything in a block is written to scratch memory of the thread, so that nothing is allocated and temporaries never reach
main memory. Large arrays are cut into blocks; small ones are gathered into common ones, so that they share calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import chain, pairwise, repeat
from operator import setitem
from typing import Any, NamedTuple

import numpy as np

from ...graph.program import Program, all_passes
from ..threads import shared_out
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

    def prepare(self, index: int, work: Table, pointers: Vector, numbers: Vector, *, out_of_place: bool = False) -> Call:
        """As `Loops.prepare`; NumPy's results go through the caches in any case."""
        last = index == len(self.sheets) - 1
        return Call(self, self._in_place if last and not out_of_place else self.sheets[index], work, pointers, numbers)

    @cached_property
    def _in_place(self) -> Sheet:
        """The last pass, to write where it reads: nothing before all of a block is computed."""
        return Sheet(self._program, self._program.last, direct=False)

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


class Call:
    """A pass over arrays. What it has written it does not write again."""

    def __init__(self, made: Blocks, sheet: Sheet, work: Table, pointers: Vector, numbers: Vector) -> None:
        self._made, self._sheet, self._work, self._pointers, self._numbers = made, sheet, work, pointers, numbers

    def __call__(self) -> list[Any]:
        run = self.ready()
        run()
        return run.sums()

    def ready(self) -> Run:
        """The pass as one call, which goes on where it was if it is made again."""
        return Run(self._made, self._sheet, self._work, self._pointers, self._numbers)


class Run:
    """One run of a pass."""

    def __init__(self, made: Blocks, sheet: Sheet, work: Table, pointers: Vector, numbers: Vector) -> None:
        self.sheet, self.blocks = sheet, made._blocks(work)
        self._idle = not sheet.steps and not sheet.copies and not sheet.sums
        if self._idle:
            return
        blocks = self.blocks
        rows = numbers[blocks.members]
        values = sheet.tape.run({name: rows[:, k] for name, k in made._program.columns.items()})
        self.given = [_number(value, dtype) for value, dtype in zip(values, sheet.number_dtypes, strict=True)]
        used = [*sheet.read, *range(len(sheet.columns), sheet.first_number)]
        self.arrays = {k: made._arrays(sheet.array_dtypes[k], pointers[:, sheet.addresses[k]], blocks) for k in used}
        self.results = np.empty((blocks.rows, len(sheet.sums)))
        self.units: list[Any] = [*blocks.slices, *blocks.gathered]
        self.done = np.zeros(len(self.units), bool)

    @property
    def begun(self) -> bool:
        """Whether anything was written."""
        return not self._idle and bool(self.done.any())

    def __call__(self) -> None:
        if self._idle:
            return
        left = iter(np.flatnonzero(~self.done).tolist())  # next() of an iterator made in C is atomic
        shared_out(partial(_work, self, left), self.blocks.elements)()

    def sums(self) -> list[Any]:
        """For each number that the pass sums up: the values for the arrays of the work, in order."""
        if self._idle:
            return []
        return [join.reduceat(self.results[:, k], self.blocks.starts) for k, join in enumerate(self.sheet.joins)]


def _number(value: Any, dtype: Any) -> Any:
    """A number of the pass: one for all arrays if they agree (in their bits: NaN is NaN), else one for each."""
    if np.ndim(value) == 0:
        return dtype(value)
    if not len(value):  # no array of the work has an element here
        return dtype(0)
    vector = np.asarray(value).astype(dtype)
    first = vector[0]
    return first if (vector == first).all() or (vector != vector).all() else vector  # noqa: PLR0124 (NaN)


def _work(run: Run, left: Iterator[int]) -> None:
    """Take units until there are none."""
    sheet, arrays, given = run.sheet, run.arrays, run.given
    registers: list[Vector] = [np.empty(BLOCK, dtype) for dtype in sheet.registers]
    spare: dict[int, Vector] = {}
    with np.errstate(all="ignore"):
        for number in left:
            unit = run.units[number]
            if len(unit) == 4:
                i, first, n, row = unit
                values: list[Any] = [
                    arrays[k][i][first : first + n] if k in arrays else None for k in range(sheet.first_number)
                ]
                values += [value if np.ndim(value) == 0 else value[i] for value in given]
                values += registers if n == BLOCK else [register[:n] for register in registers]
                _compute(sheet, values)
                for k, (place, join) in enumerate(zip(sheet.sums, sheet.joins, strict=True)):
                    run.results[row, k] = join.reduce(values[place])
                _write(run, number, [values[place] for _, place in sheet.copies], [values[value] for value, _ in sheet.copies])
            else:
                _gathered(run, number, registers, spare)


def _compute(sheet: Sheet, values: list[Any]) -> None:
    for function, arguments, result in sheet.steps:
        if len(arguments) == 2:
            function(values[arguments[0]], values[arguments[1]], out=values[result])
        else:
            function(*[values[a] for a in arguments], out=values[result])


def _write(run: Run, number: int, targets: list[Vector], values: list[Vector]) -> None:
    """Write the results of a unit, and note that it is done, by one call into C, between which nothing comes."""
    places: Iterator[Any] = chain(repeat(..., len(targets)), [number])
    assign: Callable[..., None] = setitem
    deque(map(assign, [*targets, run.done], places, [*values, True]), maxlen=0)


def _gathered(run: Run, number: int, registers: list[Vector], spare: dict[int, Vector]) -> None:
    """One block made of many small arrays."""
    sheet, arrays, blocks = run.sheet, run.arrays, run.blocks
    chosen, starts = run.units[number]
    n, indices = int(starts[-1]), chosen.tolist()
    values: list[Any] = [None] * sheet.first_number
    for k, views in arrays.items():
        if k not in spare:
            spare[k] = np.empty(BLOCK, views[0].dtype)
        values[k] = spare[k][:n]
        if k < len(sheet.columns):
            np.concatenate([views[i] for i in indices], out=values[k])
    lengths = np.diff(starts)
    values += [value if np.ndim(value) == 0 else np.repeat(value[chosen], lengths) for value in run.given]
    values += [register[:n] for register in registers]
    _compute(sheet, values)
    for value, place in sheet.copies:
        values[place][...] = values[value]
    for k, (place, join) in enumerate(zip(sheet.sums, sheet.joins, strict=True)):
        run.results[blocks.starts[chosen], k] = join.reduceat(values[place], starts[:-1])
    bounds = list(pairwise(starts.tolist()))
    stored = range(len(sheet.columns), sheet.first_number)
    targets = [arrays[k][i] for k in stored for i in indices]
    _write(run, number, targets, [values[k][first:end] for k in stored for first, end in bounds])
