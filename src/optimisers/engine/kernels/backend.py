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

Vector = np.ndarray[Any, Any]


class Kernels(Protocol):
    """The passes of a program, ready to run over any number of arrays, whatever their sizes.

    A backend makes them once for a program. It knows the program and memory at addresses, and nothing of parameters, states
    or trees. It gives the results of the rule: the same bits where the order of operations is the same, else rounding. Only
    sums over whole arrays may be taken in another order, the same one every time.
    """

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


def kernels_of(program: Program) -> Kernels:
    """The kernels of a program for the host: compiled, or, if that is switched off or fails, passes run by NumPy."""
    library = None if compiler.switch() == "0" else compiler.built(source(program))
    return Blocks(program) if library is None else Loops(program, library)
