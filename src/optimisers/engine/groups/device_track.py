"""The arrays of a group on a device that one program steps.

No number is read from the device but what rules check or decide by.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from ...arrays import Tape
from ..graph.program import Pass, inner
from ..kernels.cuda.kernels import DeviceKernels, Launch, Memory
from ..kernels.cuda.source import Kernel, measure_name
from ..kernels.work import Table
from ..memory.pool import Column
from ..memory.strides import Vector
from ..memory.writes import Write, Writes
from ..shards.measures import Unfinished
from ..tracks.checks import Checked
from ..tracks.scheduler import Request
from .track import GroupTrack


class Vectors:
    """Measures of many arrays, as vectors on a device; taken apart when somebody looks at them."""

    def __init__(self, boundary: int, vectors: list[Any]) -> None:
        self.boundary, self.vectors = boundary, vectors

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*(vector.unbind() for vector in self.vectors), strict=True)


class DeviceTrack(GroupTrack):
    """The parameters of a group on a device that one program steps."""

    loops: DeviceKernels

    def _width(self) -> int:
        return self.variant.kernels().width

    def _made(self) -> DeviceKernels:
        kernels = self.variant.kernels()
        if not hasattr(self, "_launches"):
            self._launches: dict[tuple[str, int], Launch] = {}
            self._used: Memory | None = None
            self._counting = Tape(
                [node for name, node in self.program.numbers.items() if int(name[1:]) not in self.group.scalars],
                self.program.columns,
            )
        return kernels

    def writes(self, i: int) -> bool:
        return super().writes(i) or i in self.group.scalars

    def point(self, *addresses: Vector) -> None:
        given = 2 + len(self.group.arrays)
        super().point(*addresses[:given])
        for i, found in zip(self.group.scalars, addresses[given:], strict=False):
            self._point(self.loops.source.pointers.index(f"c{i}"), found)

    # --- launches ---

    def _here(self) -> Memory:
        """What the kernels use on the current stream."""
        if self._used is None or self._used.stream != self.loops.device.stream():
            self._used = Memory(self.loops, self.pointers)
        return self._used

    def _launch(self, kernel: Kernel, table: Table, *, pieces: bool, stack: int = -1, partial: int = 0) -> None:
        """Launch a kernel, with a block for each piece or for each array."""
        self._ready(kernel, table, pieces=pieces, stack=stack, partial=partial)()

    def _ready(self, kernel: Kernel, table: Table, *, pieces: bool, stack: int = -1, partial: int = 0) -> Callable[[], Any]:
        """The launch of a kernel as one call, which does nothing if it is made again."""
        if not len(table.pieces):  # no part of these arrays is here
            return int  # which does nothing
        memory = self._here()
        launch = self._launches.get((kernel.name, stack))
        if launch is None:
            launch = self._launches[kernel.name, stack] = Launch(self.loops, kernel, table.members, self.matrix)
        work = memory.work(table)
        return launch.ready(work, memory, work.pieces if pieces else work.arrays, partial)

    def _call(self, index: int, work: Table, *, stack: int = -1, out_of_place: bool = False) -> list[Any]:  # noqa: ARG002
        self._launch(self.loops.source.passes[index], work, pieces=True, stack=stack)
        return []

    def _write(self, members: Any, work: Table, *, kept: Any, stack: int = -1, out_of_place: bool = False) -> Write:  # noqa: ARG002
        call = self._ready(self.loops.source.passes[self._pass], work, pieces=True, stack=stack)
        return Write(call, self._slots(members), kept)

    def _sums(self, boundary: int) -> Generator[Unfinished, list[Vector], None]:
        source, memory = self.loops.source, self._here()
        for this in self.program.before[boundary]:
            if this.stores:
                self._storing, self._pass = self._pass, self._pass + 1
                continue
            partial = memory.values.new_empty((len(self.work.pieces), len(this.reductions)))
            self._launch(source.passes[self._pass], self.work, pieces=True, partial=partial.data_ptr())
            self._launch(source.sums[self._pass], self.work, pieces=False, partial=partial.data_ptr())
            self._pass += 1
            if self.group.shardings and this.reductions:
                yield from self._over_ranks(this)
        if boundary in source.measures:
            self._launch(source.measures[boundary], self.work, pieces=False)

    def _over_ranks(self, this: Pass) -> Generator[Unfinished, list[Vector], None]:
        """Finish sums that are cut over ranks, which waits for the device."""
        values, members = self._here().values, self.work.members.tolist()
        columns = [self.loops.source.columns[node.value] for node in this.reductions]
        sums = values[members][:, columns].cpu().numpy()
        whole = yield self._unfinished(this, list(sums.T))
        for column, vector in zip(columns, whole, strict=True):
            values[self.members.tolist(), column] = values.new_tensor(vector)

    # --- measures ---

    def _measured(self, boundary: int) -> list[Any]:
        program, values = self.program, self._here().values
        if not self.whole:
            values = values[self._here().work(self.work).members()]
        columns = self.loops.source.columns
        return [values[:, columns[measure_name(boundary, k)]] for k in range(len(program.boundaries[boundary].values))]

    def _request(self, rule: Any, values: list[Any]) -> Request:
        return Request(rule, Vectors(self._asked - 1, values))

    def combined(self, request: Request) -> tuple[Any, ...] | None:
        boundary: Any = self.program.boundaries[self._asked - 1]
        memory = self._here()
        results = [memory.where[name] for name in boundary.names]
        kernel = self.loops.combining(request.rule, self._asked - 1, results)
        if kernel is None:
            return None
        kernel(memory.work(self.work), memory)
        return tuple(memory.combined[k] for k in results)

    def _take(self, names: Sequence[str], answer: Sequence[Any]) -> None:
        memory = self._here()
        late = bool(self.program.late)
        for name, value in zip(names, answer, strict=True):
            place = memory.combined[memory.where[name]]
            if late:  # a rule decides by it, on the host
                super()._take([name], [value])
            if getattr(value, "data_ptr", int)() != place.data_ptr():
                place.copy_(value) if hasattr(value, "data_ptr") else place.fill_(float(value))

    def faults(self) -> list[str]:
        return []

    def to_check(self) -> list[Checked]:
        members = self.members.tolist()
        return [
            Checked([(self.group.paths[i], inner(self.group.rules.of(i), boundary.where)) for i in members], values)
            for boundary, values in self._checked
        ]

    # --- the end of a step ---

    def plan(self, writes: Writes, new_xs: dict[int, Any] | None, columns: Sequence[Column]) -> None:
        group, source = self.group, self.loops.source
        for k, i in enumerate(group.scalars, len(group.arrays)):
            self._point(source.pointers.index(f"new c{i}"), columns[k].addresses())
        super().plan(writes, new_xs, columns)
        if source.finish is not None:
            writes.after.append(Write(self._ready(source.finish, self.work, pieces=False)))

    def count(self, counters: Vector) -> None:
        chosen: Any = slice(None) if self.whole else self.members
        kept = [k for k, i in enumerate(self.group.numbers) if i not in self.group.scalars]
        for k, values in zip(kept, self._counting.run(self._inputs()), strict=True):
            counters[chosen, k] = values
