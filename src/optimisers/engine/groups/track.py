"""The arrays of a group that one program steps: its passes, measures and transforms in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...arrays import Tape, Traced, dtype_name, torch_if_loaded
from ...errors import RuleError, locating
from ...rules._base import MeasuredRule
from ...rules._norm import NormRule
from ..graph.program import Boundary, Pass, Program, Transform, inner
from ..kernels.work import Table
from ..memory.pool import Column
from ..memory.strides import Vector, addresses_of, element_strides, laid_out_as, lie_alike, native_dtype, places
from ..memory.writes import Portion, Write, Writes
from ..shards.measures import NEUTRAL, Unfinished
from ..tracks.scheduler import Request, Track
from .group import Columns, Group, holding
from .stacking import Stack
from .variant import Variant


class GuardFailed(Exception):  # noqa: N818 (a signal)
    """A measure came out otherwise than the program was traced for, so the rules themselves have to be run."""


class GroupTrack(Track):
    """The parameters of a group that one program steps."""

    def __init__(self, group: Group, variant: Variant, members: Vector, matrix: Vector) -> None:
        # Not the step itself, nor any array: that would keep old parameters alive, and their memory from being used again.
        self.group, self.variant, self.program = group, variant, variant.program
        self.members, self.matrix = members, matrix
        self.whole = len(members) == group.count
        self.work = group.work(members)
        self.pointers = np.zeros((group.count, self._width()), np.uint64)
        # Views of the matrix, which is the same in every step; so they are made once.
        self._columns: Mapping[str, Any] | None = dict(Columns(matrix, self.program.columns)) if self.whole else None
        self._at: dict[int, Vector] = {}
        self._calls: dict[tuple[int, int, bool], tuple[Table, Any]] = {}
        self.loops: Any = None
        self._begin()

    def _width(self) -> int:
        """How many addresses an array has."""
        return len(self.program.pointers)

    def writes(self, i: int) -> bool:
        """Whether the i-th part of the state is written."""
        return f"s{i}" in self.program.targets

    def _begin(self) -> None:
        self.rule = self.group.rules.of(int(self.members[0]))
        if self.loops is None or not self.loops.compiled:
            self.loops = self._made()
        self.passed = Counter()
        self._asked = 0
        self._pass = 0
        self._storing = 0  # the pass that stores what the last transform is given
        self._stacks: list[Stack] = []
        self._transformed: list[Any] = []  # what others are still to read
        self._checked: list[tuple[Boundary, list[Any]]] = []
        self._course: Generator[Request | Unfinished, Any, None] = self._advancing()

    def _made(self) -> Any:
        """What runs the passes."""
        return self.variant.loops(self.work.elements)

    def renew(self, group: Group, counters: Vector) -> bool:
        """Take the numbers of the next step, of the same parameters; False if another program is to be chosen for them."""
        group.fill(self.matrix, self.program, counters, self.members, hyper=group is not self.group)
        self.group, loops = group, self.loops
        self._begin()
        if loops is not self.loops:
            self._calls.clear()
        return holding(self.program, self.matrix, self.members) is None

    def paths(self) -> list[str]:
        return [self.group.paths[int(i)] for i in self.members]

    def point(self, *addresses: Vector) -> None:
        """Take the addresses of what is read: parameters, gradients, states."""
        for column, found in enumerate(addresses):
            self._point(column, found)

    def _point(self, column: int, found: Vector) -> None:
        if self._at.get(column) is not found:
            self.pointers[:, column] = found
            self._at[column] = found

    def _call(self, index: int, work: Table, *, stack: int = -1, out_of_place: bool = False) -> list[Any]:
        """Run a pass over all arrays, or over a stack of them."""
        return self._prepared(index, work, stack=stack, out_of_place=out_of_place)()  # type: ignore[no-any-return]

    def _prepared(self, index: int, work: Table, *, stack: int = -1, out_of_place: bool = False) -> Any:
        known, call = self._calls.get((index, stack, out_of_place), (None, None))
        if known is not work:
            call = self.loops.prepare(index, work, self.pointers, self.matrix, out_of_place=out_of_place)
            self._calls[index, stack, out_of_place] = work, call
        return call

    def _write(self, members: Any, work: Table, *, kept: Any, stack: int = -1, out_of_place: bool = False) -> Write:
        """The last pass over some of the arrays, ready to be made. ``kept`` is what it reads."""
        call = self._prepared(self._pass, work, stack=stack, out_of_place=out_of_place)
        return Write(call.ready(), self._slots(members), (call, kept))

    def _slots(self, members: Sequence[int] | Vector) -> list[int]:
        slots = self.group.slots
        return slots if len(members) == len(slots) else [slots[i] for i in members]

    def advance(self, answer: Any) -> Request | Unfinished | None:
        try:
            return self._course.send(answer)
        except StopIteration:
            return None

    def _advancing(self) -> Generator[Request | Unfinished, Any, None]:
        program = self.program
        for number, boundary in enumerate(program.boundaries):
            yield from self._sums(number)
            self._asked = number + 1
            if isinstance(boundary, Transform):
                self._stacks = self.group.stacks(self.members, boundary.where)
                if not (program.trailing and self._asked == len(program.boundaries)):
                    self._transformed += [self._transform(boundary, stack, k) for k, stack in enumerate(self._stacks)]
                continue
            rule: Any = inner(self.rule, boundary.where)
            if rule.checks or boundary.names is not None:
                values = self._measured(number)
                if rule.checks:
                    self._checked.append((boundary, values))
                if boundary.names is not None:
                    answer = yield self._request(rule, values)
                    self._take(boundary.names, answer)
                    self._check_guards()
        yield from self._sums(len(program.boundaries))

    def _take(self, names: Sequence[str], answer: Sequence[Any]) -> None:
        """Take combined measures."""
        for name, value in zip(names, answer, strict=True):
            self.matrix[:, self.program.columns[name]] = float(value)

    def _measured(self, boundary: int) -> list[Any]:
        """The measures at a boundary: for each of their numbers a vector of those of the members."""
        return self._run(self.program.measuring[boundary])

    def _request(self, rule: Any, values: list[Any]) -> Request:
        return Request(rule, list(zip(*values, strict=True)))

    def _sums(self, boundary: int) -> Generator[Unfinished, list[Vector], None]:
        """Run the passes that a measure needs."""
        for this in self.program.before[boundary]:
            if this.stores:  # run for a stack at a time
                self._storing, self._pass = self._pass, self._pass + 1
                continue
            sums = self._call(self._pass, self.work)
            self._pass += 1
            if self.group.shardings and this.reductions:
                sums = yield self._unfinished(this, sums)
            for node, values in zip(this.reductions, sums, strict=True):
                self.matrix[self.members, self.program.columns[node.value]] = values

    def _unfinished(self, this: Pass, sums: list[Vector]) -> Unfinished:
        """Sums over the parts of arrays; those that have no element here were left out of the work."""
        ops = [node.op for node in this.reductions]
        present = self.group.sizes[self.members] > 0
        values = [np.full(len(self.members), NEUTRAL[op]) for op in ops]
        for vector, found in zip(values, sums, strict=True):
            vector[present] = found
        return Unfinished(values, ops, [self.group.shardings[int(i)] for i in self.members])

    def _transform(self, boundary: Transform, stack: Stack, number: int) -> Any:
        """Transform some of the arrays. What comes is read at its address, so it is to be kept until then."""
        group, targets = self.group, self.program.targets
        dtype = native_dtype(group.library, self.program.dtypes[boundary.target])
        given = self._memory(stack, dtype)
        size = np.uint64(dtype.itemsize)
        self.pointers[stack.members, targets[boundary.target]] = addresses_of([given]) + stack.offsets * size
        self._call(self._storing, stack.work, stack=number)
        rule: Any = inner(group.rules.of(stack.members[0]), boundary.where)
        more = f" (and {len(stack.members) - 1} like it)" if len(stack.members) > 1 else ""
        with locating(group.paths[stack.members[0]] + more):
            if stack.exchange is not None:
                together = group.for_stacks(stack.members[0], boundary.where)
                found = stack.exchange.transformed(given, stack.owners, together.transform, together.travels_as(given))
            else:
                chosen = rule if len(stack.members) == 1 else group.for_stacks(stack.members[0], boundary.where)
                found = chosen.transform(given)
            if tuple(found.shape) != stack.shape or found.dtype != dtype:
                got = f"shape {tuple(found.shape)} and dtype {dtype_name(found)}"
                msg = f"{rule!r} made {got} of an array of shape {stack.shape} and dtype {dtype_name(given)}"
                raise RuleError(msg)
        if not lie_alike(stack.shape, element_strides(found), stack.strides):
            found = laid_out_as(given, found)
        self.pointers[stack.members, self.program.arrays.index(boundary.source)] = addresses_of([found]) + stack.offsets * size
        return found

    def _memory(self, stack: Stack, dtype: Any) -> Any:
        """An array for a stack, of any content."""
        if isinstance(dtype, np.dtype):
            strides = tuple(s * dtype.itemsize for s in stack.strides)
            return np.ndarray(stack.shape, dtype, np.empty(stack.work.elements, dtype), 0, strides)
        torch: Any = torch_if_loaded()
        device = "cpu" if self.group.device is None else self.group.device.device
        return torch.empty_strided(stack.shape, stack.strides, dtype=dtype, device=device)

    def _inputs(self) -> Mapping[str, Any]:
        """The inputs of tapes, by name: for each of them a number for each member."""
        return self._columns or Columns(self.matrix[self.members], self.program.columns)

    def _run(self, tape: Tape) -> list[Vector]:
        """Numbers for each member."""
        values = tape.run(self._inputs())
        return [value if isinstance(value, np.ndarray) else np.full(len(self.members), value) for value in values]

    def _check_guards(self) -> None:
        """Raise GuardFailed unless what was decided from measures still holds."""
        if self.program.late:
            known = [(node, value) for node, value in self.program.late if not waits(node, self.program, self._asked)]
            found = self._run(Tape([node for node, _ in known], self.program.columns))
            if any((value != expected).any() for value, (_, expected) in zip(found, known, strict=True)):
                raise GuardFailed

    def faults(self) -> list[str]:
        faults = []
        for boundary, values in self._checked:
            rule: Any = inner(self.rule, boundary.where)
            usual = type(rule).fault in {MeasuredRule.fault, NormRule.fault}
            if usual and all(np.isfinite(value).all() for value in values):
                continue
            for k, member in enumerate(self.members):
                own: Any = inner(self.group.rules.of(int(member)), boundary.where)
                fault = own.fault(tuple(float(value[k]) for value in values))
                if fault is not None:
                    faults.append(f"{type(own).__name__} at {self.group.paths[int(member)]!r}: {fault}")
        return faults

    def plan(self, writes: Writes, new_xs: dict[int, Any] | None, columns: Sequence[Column]) -> None:
        """Make the last pass ready. New parameters go to ``new_xs``, or into the old ones."""
        group, targets = self.group, self.program.targets
        if not targets:
            return
        for k, i in enumerate(group.arrays):
            if f"s{i}" in targets:
                self._point(targets[f"s{i}"], columns[k].addresses())
        if self.program.steps:
            if new_xs is None:
                self._point(targets["x"], self._at[0])
            else:
                chosen: Any = slice(None) if self.whole else self.members
                self.pointers[chosen, targets["x"]] = places([new_xs[i] for i in self.members.tolist()])
                self._at.pop(targets["x"], None)
        out_of_place = new_xs is not None
        if not self.program.trailing:
            kept, self._transformed = self._transformed, []
            writes.ready.append(self._write(self.members, self.work, kept=kept, out_of_place=out_of_place))
            return
        for k, stack in enumerate(self._stacks):  # so that not all are held at once
            make = partial(self._portion, stack, k, out_of_place=out_of_place)
            writes.portions.append(Portion(self._slots(stack.members), stack.work.elements, make))

    def _portion(self, stack: Stack, number: int, *, out_of_place: bool) -> list[Write]:
        """The last pass over a stack, which is transformed for it."""
        boundary: Any = self.program.boundaries[-1]
        found = self._transform(boundary, stack, number)
        return [self._write(stack.members, stack.work, kept=found, stack=number, out_of_place=out_of_place)]

    def count(self, counters: Vector) -> None:
        """Write the new numbers of the state."""
        if self.program.numbers:
            chosen: Any = slice(None) if self.whole else self.members
            for k, values in enumerate(self.program.counting.run(self._inputs())):
                counters[chosen, k] = values


class PreparedStep(NamedTuple):
    """How all parameters of a group were stepped last, which is how they are stepped again while nothing has changed."""

    slots: list[int]
    dx_dtype: Any
    x_places: list[int]
    dx_places: list[int]
    addresses: list[Vector]
    """Of parameters, gradients and states."""
    tracks: list[GroupTrack]


def waits(node: Traced, program: Program, asked: int) -> bool:
    """Whether a number depends on a measure that is yet to be combined."""
    ahead = {name for boundary in program.boundaries[asked:] for name in boundary.names or ()}
    return (node.op == "number" and node.value in ahead) or any(waits(arg, program, asked) for arg in node.args)
