"""The kernels of a program on one device, and their launches over a group of arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np

from ....arrays import Tape, Traced, Untraceable, torch_if_loaded
from ...graph.program import Program, all_passes
from ..work import Table
from .combine import combining
from .nvrtc import CompilationFailed
from .source import Kernel, measure_name, source
from .templates import BY_VALUE

Vector = np.ndarray[Any, Any]

# Where each argument stands, in words of eight bytes, as in `struct work`.
_PIECES, _FIRST, _POINTERS, _NUMBERS, _PARTIAL, _VALUES, _COMBINED, _ROW = range(8)


class Device(Protocol):
    """What kernels need of a device."""

    device: Any

    def load(self, text: str, names: Sequence[str]) -> list[int]: ...
    def stream(self) -> int: ...
    def launch(self, function: int, blocks: int, arguments: int) -> None: ...
    def upload(self, array: Vector) -> Any: ...


class DeviceKernels:
    """The kernels of a program, loaded on a device.

    Attributes:
        source: their source, and what each of them is given.
        width: how many addresses an array has.

    """

    compiled = True

    def __init__(self, program: Program, scalars: Sequence[str], device: Device) -> None:
        self.program, self.device = program, device
        _refuse(program, scalars)
        self.source = source(program, scalars)
        found = [*self.source.passes, *self.source.sums.values(), *self.source.measures.values()]
        found += [self.source.finish] if self.source.finish else []
        names = [kernel.name for kernel in found]
        self.functions = dict(zip(names, device.load(self.source.text, names), strict=True))
        self.tapes = {kernel.name: Tape(kernel.numbers, program.columns) for kernel in found}
        self.width = len(self.source.pointers)
        self._combining: dict[Any, Combining | None] = {}

    def combining(self, rule: Any, boundary: int, results: Sequence[int]) -> Combining | None:
        """A kernel that combines the measures at a boundary as a rule does, or None if there can be none."""
        key = rule, boundary
        if key not in self._combining:
            values = self.program.boundaries[boundary].values
            columns = [self.source.columns[measure_name(boundary, k)] for k in range(len(values))]
            try:
                text = combining(rule, columns, len(self.source.columns), results)
                self._combining[key] = Combining(self.device, *self.device.load(text, ["combine"]))
            except (Untraceable, CompilationFailed):
                self._combining[key] = None
        return self._combining[key]


def _refuse(program: Program, scalars: Sequence[str]) -> None:
    """Untraceable for a program of which the host would have to know what only the device knows."""
    if any(depends(node, scalars) for node, _ in program.guards):
        raise Untraceable("it decides by numbers that lie on a device")
    measured = {name for boundary in program.boundaries for name in boundary.names or ()}
    sums = {node.value for this in all_passes(program) for node in this.reductions}
    if any(depends(node, measured | sums) for name, node in program.numbers.items() if name not in scalars):
        raise Untraceable("it keeps a measure as a Python number")


def depends(node: Traced, names: Collection[str]) -> bool:
    """Whether a number is made of sums or inputs of these names."""
    return (not node.element and node.value in names) or any(depends(arg, names) for arg in node.args)


class Work:
    """The pieces of some arrays, on the device."""

    def __init__(self, device: Device, table: Table) -> None:
        pieces = table.pieces
        self.table, self._device = table, device
        self._kept = device.upload(np.concatenate([pieces.reshape(-1), table.starts, [len(pieces)]]).astype(np.int64))
        self._members: Any = None
        self.pieces, self.arrays = len(pieces), len(table.starts)
        self.address = int(self._kept.data_ptr())
        self.first = self.address + 8 * pieces.size

    def members(self) -> Any:
        """The numbers of the arrays, as an index on the device."""
        if self._members is None:
            self._members = self._device.upload(self.table.members.astype(np.int64))
        return self._members


class Memory:
    """What the kernels of a program use on the device, for the arrays of one group and launches on one stream.

    Attributes:
        stream: that stream. On another one all is made anew: it does not know when this one has copied what.
        values: a row of sums and measures for each array.
        combined: measures of all arrays together, and ``where`` each of them is.

    """

    def __init__(self, kernels: DeviceKernels, pointers: Vector) -> None:
        torch: Any = torch_if_loaded()
        self._device = kernels.device
        device, wide = self._device.device, torch.float64
        names = [name for boundary in kernels.program.boundaries for name in boundary.names or ()]
        self.stream = self._device.stream()
        self.values = torch.empty((len(pointers), max(1, len(kernels.source.columns))), dtype=wide, device=device)
        self.combined = torch.empty(max(1, len(names)), dtype=wide, device=device)
        self.where = {name: k for k, name in enumerate(names)}
        self._pointers, self._uploaded = pointers, pointers[:0]
        self.table: Any = None  # another one for each change: a launch that is still to be made may read the last one
        self._works: dict[int, Work] = {}

    def pointers(self) -> int:
        """Where the addresses of the arrays are, a row each; copied to the device if any has changed."""
        if not np.array_equal(self._pointers, self._uploaded):
            self._uploaded = self._pointers.copy()
            self.table = self._device.upload(self._uploaded.view(np.int64))
        return int(self.table.data_ptr())

    def work(self, table: Table) -> Work:
        """The pieces of a table."""
        known = self._works.get(id(table))
        if known is None or known.table is not table:
            known = self._works[id(table)] = Work(self._device, table)
        return known


class Combining:
    """A kernel that combines the measures of many arrays."""

    def __init__(self, device: Device, function: int) -> None:
        self._device, self._function = device, function
        self._words = np.zeros(_ROW + BY_VALUE, np.uint64)
        self._arguments = np.array([_address(self._words)], np.uint64)

    def __call__(self, work: Work, memory: Memory) -> None:
        """Launch it."""
        words = self._words
        words[_PIECES], words[_FIRST] = work.address, work.first
        words[_VALUES], words[_COMBINED] = memory.values.data_ptr(), memory.combined.data_ptr()
        words[_ROW:].view(np.float64)[0] = work.arrays
        self._device.launch(self._function, 1, _address(self._arguments))


class Once:
    """A launch, which is not repeated if it is called again. ``kept`` is the memory on the device that it is to read."""

    def __init__(self, launch: Any, *given: Any, kept: Any = None) -> None:
        self._launch, self._given, self._kept = launch, given, kept
        self.begun = False

    def __call__(self) -> None:
        if not self.begun:
            self._launch(*self._given)
            self.begun = True


class Launch:
    """A kernel over some of the arrays of a group, launched again and again.

    Args:
        kernels: what it is one of.
        kernel: which one.
        members: the arrays.
        matrix: the numbers of all arrays of the group, a row each, read anew at each launch.

    """

    def __init__(self, kernels: DeviceKernels, kernel: Kernel, members: Vector, matrix: Vector) -> None:
        self._device, self._function = kernels.device, kernels.functions[kernel.name]
        self._tape, self._members, self._matrix = kernels.tapes[kernel.name], members, matrix
        self._columns = kernels.program.columns
        self._used = [self._columns[name] for name in self._tape.names()]
        self._by_value = len(kernel.numbers) <= BY_VALUE
        self._memory: Memory | None = None
        self._inputs: Vector | None = None  # those of the last launch
        self._rows: Any = None
        self._words = np.zeros(_ROW + BY_VALUE, np.uint64)
        self._row = self._words[_ROW:].view(np.float64)
        self._arguments = np.array([_address(self._words)], np.uint64)
        self._at = _address(self._arguments)

    def ready(self, work: Work, memory: Memory, blocks: int, partial: int) -> Once:
        """Its launch on torch's current stream, with all that it is given in place."""
        words = self._words
        if memory is not self._memory:
            self._memory, self._inputs = memory, None
            words[_VALUES], words[_COMBINED] = memory.values.data_ptr(), memory.combined.data_ptr()
        words[_PIECES], words[_FIRST], words[_PARTIAL] = work.address, work.first, partial
        words[_POINTERS] = memory.pointers()
        self._give_numbers()
        return Once(self._device.launch, self._function, blocks, self._at, kept=(memory, memory.table, work, self._rows))

    def _give_numbers(self) -> None:
        """Numbers by value where all arrays have the same, else in rows on the device."""
        inputs = self._matrix[self._members][:, self._used]
        if self._inputs is not None and np.array_equal(inputs, self._inputs):
            return
        self._inputs = inputs
        if self._by_value and (inputs == inputs[:1]).all():
            first = self._matrix[self._members[:1]]
            for k, value in enumerate(self._tape.run({name: first[:, k] for name, k in self._columns.items()})):
                self._row[k : k + 1] = value
            self._words[_NUMBERS] = 0
            return
        values = self._tape.run({name: self._matrix[self._members, k] for name, k in self._columns.items()})
        rows = np.zeros((len(self._matrix), max(1, len(values))))
        for k, value in enumerate(values):
            rows[self._members, k] = value
        # Always another table: a kernel that is still to run may read the last one.
        self._rows = self._device.upload(rows)
        self._words[_NUMBERS] = self._rows.data_ptr()


def _address(array: Vector) -> int:
    return int(array.__array_interface__["data"][0])
