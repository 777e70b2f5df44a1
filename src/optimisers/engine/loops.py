"""Compiled loops: running one over the pieces of many arrays, on as many threads as the libraries use."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from ..arrays import torch_if_loaded
from . import build
from .blocks import Blocks
from .program import Program
from .source import all_passes, source

_PIECE = 2**14  # elements of a piece: its arrays fit the second-level cache
_UNIT = 2**15  # what a thread takes at a time, in elements
_OVERHEAD = 64  # what a piece costs beside its elements, in elements
_MUCH = 2**21  # elements whose results would not stay in the caches
_ALONE = 2**18  # less than this is not worth a second thread that has to be woken
_TOGETHER = 2**15  # less than this for each is not worth a second thread that torch keeps awake

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
    """The work over the given arrays; ``sizes`` are those of all arrays of the group, none of them empty."""
    size = sizes[members]
    counts = -(-size // _PIECE)
    leaf = np.repeat(members, counts)
    ends = np.cumsum(counts)
    index = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
    start = index * _PIECE
    n = np.minimum(np.repeat(size, counts) - start, _PIECE)
    unit = np.cumsum(n + _OVERHEAD) // _UNIT
    first = np.concatenate([[0], np.flatnonzero(np.diff(unit)) + 1, [len(n)]]).astype(np.int64)
    pieces = np.ascontiguousarray(np.stack([leaf, start, n], axis=1), dtype=np.int64)
    return Table(members, pieces, first, ends - counts, int(size.sum()), (address(first), address(pieces)))


class Loops:
    """The functions of a program."""

    def __init__(self, program: Program, library: ctypes.CDLL) -> None:
        self._functions = []
        self._sums = []
        for i, this in enumerate(all_passes(program)):
            self._functions.append(_function(library, f"pass_{i}"))
            self._sums.append([{"sum": np.add, "largest": np.maximum, "smallest": np.minimum}[n.op] for n in this.reductions])

        self._apart = _function(library, "pass_apart") if program.last.stores else None
        self._torch = program.library == "torch"

    @staticmethod
    def of(program: Program) -> Loops | Blocks:
        """The loops of a program; run by NumPy if they are not to be compiled or, with one warning in a process, cannot be."""
        library = None if build.switch() == "0" else build.built(source(program))
        return Blocks(program) if library is None else Loops(program, library)

    def prepared(self, index: int, work: Table, pointers: Any, numbers: Any, *, apart: bool = False) -> Call:
        """A pass over arrays of which the addresses are in ``pointers``, a row each, and the numbers in ``numbers``.

        With ``apart`` the last pass writes to other memory than it reads, and if that is much, past the caches.
        """
        function = self._functions[index]
        if apart and self._apart is not None and work.elements >= _MUCH:
            function = self._apart
        return Call(function, work, pointers, numbers, self._sums[index], torch=self._torch)


class Call:
    """A pass that may be run as long as the memory it was prepared for is there; tables are read anew each time."""

    def __init__(self, function: Any, work: Table, pointers: Any, numbers: Any, combine: list[Any], *, torch: bool) -> None:
        self._torch, self._function, self._entry = torch, function, ctypes.cast(function, ctypes.c_void_p).value
        self._starts, self._elements, self._combine = work.starts, work.elements, combine
        self._sums = np.empty((len(work.pieces), len(combine))) if combine else None
        sums = 0 if self._sums is None else address(self._sums)
        given = (0, len(work.first) - 1, *work.addresses, address(pointers), address(numbers), sums)  # as in C
        self._given = np.array(given, np.int64)
        self._kept = work, pointers, numbers
        self._at = address(self._given)

    def __call__(self) -> list[Any]:
        """For each number that the pass sums up: the values for the arrays of the work, in order."""
        self._given[0] = 0
        if self._torch:
            _on_threads_of_torch(self._function, self._entry, self._at, self._elements)
        else:
            on_threads(self._function, (self._at,), self._elements)
        return [] if self._sums is None else [f.reduceat(self._sums[:, k], self._starts) for k, f in enumerate(self._combine)]


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p]
    function.restype = None
    return function


_openmp: Any = None
_forked = False


def _on_threads_of_torch(function: Any, entry: Any, given: int, elements: int) -> None:
    """Run a pass on torch's own OpenMP threads where it has such, else on threads of our own.

    Autograd and matrix products have used the same threads just before. They go on looking for work for a while, so others
    would have to share the cores with them, and products after it would wait for both. NumPy's products have other threads.
    """
    global _openmp  # noqa: PLW0603
    count = min(threads(), elements // _TOGETHER)
    if count <= 1:
        function(given)
        return
    if _openmp is None and torch_if_loaded() is not None:
        _openmp = getattr(ctypes.CDLL(None), "GOMP_parallel", False)
        if _openmp:
            _openmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            _openmp.restype = None
    if _openmp and not _forked:  # OpenMP's threads do not survive a fork, and it does not see that they are gone
        _openmp(entry, given, count, 0)
    else:
        on_threads(function, (given,), elements)


_pool: ThreadPoolExecutor | None = None


def threads() -> int:
    """How many threads to use: as many as torch does, or OMP_NUM_THREADS, or the processors of this process."""
    torch = torch_if_loaded()
    if torch is not None:
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def on_threads(function: Any, arguments: tuple[Any, ...], elements: int) -> None:
    """Run a function that shares out its work, on as many threads as that is worth."""
    global _pool  # noqa: PLW0603
    others = min(threads() - 1, elements // _ALONE)
    if others <= 0:
        function(*arguments)
        return
    if _pool is None or _pool._max_workers < others:
        _pool = ThreadPoolExecutor(others, "optimisers")
    helpers: list[Future[Any]] = []
    with suppress(RuntimeError):  # an interpreter that is shutting down takes no new work
        helpers.extend(_pool.submit(function, *arguments) for _ in range(others))
    try:
        function(*arguments)
    finally:
        wait(helpers)  # also when interrupted: they write to memory that would be freed


def _forget_threads() -> None:
    global _pool, _forked
    _pool, _forked = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork
