"""Compiled loops: the functions of a library, run over the pieces of many arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ...graph.program import Program, all_passes
from ..threads import shared_by_torch, shared_out
from ..work import Table, address

_MUCH = 2**21  # elements whose results would not stay in the caches


class Loops:
    """The functions of a program."""

    compiled = True

    def __init__(self, program: Program, library: ctypes.CDLL) -> None:
        self._functions = []
        self._sums = []
        for i, this in enumerate(all_passes(program)):
            self._functions.append(_function(library, f"pass_{i}"))
            self._sums.append([{"sum": np.add, "largest": np.maximum, "smallest": np.minimum}[n.op] for n in this.reductions])

        self._out_of_place = _function(library, "pass_out_of_place") if program.last.stores else None
        self._torch = program.library == "torch"

    def prepare(self, index: int, work: Table, pointers: Any, numbers: Any, *, out_of_place: bool = False) -> Call:
        """A pass over arrays of which the addresses are in ``pointers``, a row each, and the numbers in ``numbers``.

        With ``out_of_place`` the last pass writes to other memory than it reads, and if that is much, past the caches.
        """
        function = self._functions[index]
        if out_of_place and self._out_of_place is not None and work.elements >= _MUCH:
            function = self._out_of_place
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
        self.ready()()
        return [] if self._sums is None else [f.reduceat(self._sums[:, k], self._starts) for k, f in enumerate(self._combine)]

    def ready(self) -> Callable[[], Any]:
        """The pass as one call, which goes on where it was if it is made again: each unit of the work is handed out once."""
        self._given[0] = 0
        if self._torch:
            return shared_by_torch(self._function, self._entry, self._at, self._elements)
        return shared_out(partial(self._function, self._at), self._elements)


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p]
    function.restype = None
    return function
