"""What runs a program: the protocol of kernels, and the choice of the backend that makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ..graph.program import Program
from .c import compiler
from .c.loops import Loops
from .c.source import source
from .numpy.blocks import Blocks
from .work import Table

COMPILE_FROM = 2**12
"""Elements from which on a program is worth a compilation at once."""
COMPILE_AFTER = 64
"""Steps after which it is for fewer."""

Vector = np.ndarray[Any, Any]


class Kernels(Protocol):
    """The passes of a program, ready to run over any number of arrays, whatever their sizes.

    A backend makes them once for a program. It knows the program and memory at addresses, and nothing of parameters, states
    or trees. It gives the results of the rule: the same bits where the order of operations is the same, else rounding. Only
    sums over whole arrays may be taken in another order, the same one every time.
    """

    compiled: bool
    """Whether nothing better can come later."""

    def prepare(
        self, index: int, work: Table, pointers: Vector, numbers: Vector, *, out_of_place: bool = False
    ) -> Callable[[], list[Vector]]:
        """A call that runs pass ``index`` (the last one writes) over the arrays of ``work``.

        Args:
            index: which of `all_passes`.
            work: the arrays, as rows of the two tables, cut into pieces.
            pointers: the addresses of what is read and written, a row for each array, in the order of ``program.pointers``.
            numbers: the inputs of the program, a row for each array, in the order of ``program.columns``.
            out_of_place: whether results go to other memory than they come from.

        The call returns, for each sum of the pass, its value for each array of ``work``. It may be made again, as long as the
        memory is there: both tables are read anew each time. It writes to nothing but the targets of the pass.
        """


class Host:
    """The kernels of a program for the host: compiled, or, if that is switched off or fails, passes run by NumPy.

    A compiler takes some tenths of a second, which a few thousand elements are worth only in many steps. So where few are
    stepped, and the program has not been compiled on this machine before, the first steps are run by NumPy, if that gives
    the same bits: then it does not matter to a run when, or whether, it was compiled.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._made: dict[bool, Kernels] = {}
        self._waited = 0

    def kernels(self, elements: int) -> Kernels:
        """The kernels for a step of so many elements, made when they are asked for first."""
        compiled = self._compiles(elements)
        if compiled not in self._made:
            library = compiler.built(source(self._program)) if compiled else None
            self._made[compiled] = Blocks(self._program) if library is None else Loops(self._program, library)
        return self._made[compiled]

    def _compiles(self, elements: int) -> bool:
        mode = compiler.switch()
        if mode != "auto" or True in self._made:
            return mode != "0"
        if elements >= COMPILE_FROM or not self._program.agreed or self._waited >= COMPILE_AFTER:
            return True
        self._waited += 1
        return self._waited == 1 and compiler.is_kept(source(self._program))
