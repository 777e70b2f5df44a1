"""One step of a group of parameters by compiled loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..arrays import Tape, Traced, Untraceable, cast_to, dtype_name, torch_if_loaded, working_dtype
from ..errors import RuleError, locating
from ..rules._base import MeasuredRule
from ..rules._norm import NormRule
from ..tree.entry import Lease
from .dense import Vector, addresses_of, element_strides, is_loopable
from .group import Columns, Group, Stack, Variant, inner
from .held import Generation
from .loops import address
from .memory import SMALL, Column, Pool
from .program import COMPILED, Boundary, Program, Transform
from .step import Request, Track


class Missed(Exception):  # noqa: N818 (a signal)
    """A measure came out otherwise than the program was traced for, so the rules themselves have to be run."""


class GroupStep:
    """A step of the parameters of a group.

    ``xs`` are all of them, ``dxs`` their gradients, None for those that take no step.
    """

    def __init__(self, generation: Generation, xs: Sequence[Any], dxs: list[Any], *, regular: bool) -> None:
        self.generation, self.group, self.xs, self.dxs = generation, generation.group, xs, dxs
        self.members = np.array([i for i, dx in enumerate(dxs) if dx is not None], np.int64)
        if not regular:
            self._one_dtype()
        self.x_addresses = self._addresses(xs)
        self.dx_addresses = self._addresses(dxs)
        self.s_addresses = [column.addresses() for column in generation.columns]
        whole = len(self.members) == self.group.count
        if not all((found if whole else found[self.members]).all() for found in (self.x_addresses, self.dx_addresses)):
            raise Untraceable("an array has no memory")  # a storage of which the memory was freed, a lazy zero
        dx_dtype = dtype_name(dxs[int(self.members[0])])
        parts = self.group.partition(self.members, generation.counters, dx_dtype)
        addresses = self.x_addresses, self.dx_addresses, self.s_addresses
        self.tracks = [GroupTrack(self.group, addresses, *part) for part in parts]
        for track in self.tracks:
            track.point()

    def _one_dtype(self) -> None:
        """Make all gradients of one dtype in which loops read them, and laid out as the parameters are."""
        group = self.group
        present = [self.dxs[i] for i in self.members]
        mixed = len({dx.dtype for dx in present}) > 1 or dtype_name(present[0]) not in COMPILED
        wide = working_dtype(group.dtype)
        for i in self.members:
            dx = cast_to(self.dxs[i], wide) if mixed else self.dxs[i]
            if not is_loopable(dx) or element_strides(dx) != group.strides[i]:
                dx = _laid_out_as(self.xs[i], dx)
            self.dxs[i] = dx

    def _addresses(self, arrays: Sequence[Any]) -> Vector:
        """The addresses of the arrays that take part; 0 for the others, which may be anything."""
        if len(self.members) == self.group.count:
            return addresses_of(arrays)
        found = np.zeros(self.group.count, np.uint64)
        found[self.members] = addresses_of([arrays[i] for i in self.members])
        return found

    def writes(self) -> Iterator[tuple[Vector, Vector]]:
        """(first byte, end) of what a step in place writes."""
        group, chosen = self.group, self.members
        first = self.x_addresses[chosen]
        yield first, first + group.bytes_of(np.uint64(self.xs[int(chosen[0])].itemsize))[chosen]
        for k, found in enumerate(self.s_addresses):
            size = {"bfloat16": 2, "float32": 4, "float64": 8}[group.form[group.arrays[k]].dtype]
            first = found[chosen]
            yield first, first + group.bytes_of(np.uint64(size))[chosen]

    def fingerprint(self) -> tuple[Any, ...]:
        """What is the same as long as nothing that is read or written has moved."""
        found = (self.x_addresses, self.dx_addresses, self.members, *self.s_addresses)
        return self.dxs[int(self.members[0])].dtype, *(a.tobytes() for a in found)

    def part_from(self, starts: Vector, ends: Vector) -> bool:
        """Copy gradients that lie in memory which is about to be written; the parameter itself may be its own gradient.

        Whether there were none.
        """
        size = np.uint64(self.dxs[int(self.members[0])].itemsize)
        first = self.dx_addresses
        last = first + self.group.bytes_of(size)
        before = np.searchsorted(starts, last, "left") - 1
        own = (first == self.x_addresses) & (int(size) == self.xs[int(self.members[0])].itemsize)
        hit = (before >= 0) & (ends[np.maximum(before, 0)] > first) & ~own
        hit = hit[self.members]
        if not hit.any():
            return True
        for i in self.members[hit]:
            self.dxs[i] = _laid_out_as(self.xs[i], self.dxs[i])
            self.dx_addresses[i] = addresses_of([self.dxs[i]])[0]
        for track in self.tracks:
            track.point()
        return False

    def commit(self, pool: Pool, number: int, lease: Lease, *, in_place: bool) -> tuple[Generation, dict[int, Any]]:
        """Write, in place or to memory of a pool. The state after the step, and the new parameters by member.

        Memory that is new or taken over has this lease; what an old state still has a part in keeps its own.
        """
        group, old = self.group, self.generation
        columns = self._new_columns(pool, number, lease, in_place=in_place)
        new_xs = None if in_place else self._fresh_parameters(pool, number)
        counters = old.counters.copy()
        for track in self.tracks:
            track.write(new_xs, columns)
            track.count(counters)
        if new_xs is None and group.library == "torch":
            _bump_versions([self.xs[i] for track in self.tracks if track.program.steps for i in track.members])
        return Generation(group, columns, counters), new_xs or {}

    def _new_columns(self, pool: Pool, number: int, lease: Lease, *, in_place: bool) -> list[Column]:
        """Where the new state is written. Also in place that is new memory for what others may refer to."""
        group, old = self.group, self.generation
        columns = []
        for k, i in enumerate(group.arrays):
            writers = [t.members for t in self.tracks if any(name == f"s{i}" for name, _ in t.program.last.stores)]
            before = old.columns[k]
            if not writers or (in_place and before.is_own()):
                columns.append(before.leased(lease) if in_place else before)
                continue
            dtype = _native(group, group.form[i].dtype)
            column, common = before.taken_over(group.layout(), pool, dtype, (number, k), lease) if in_place else (
                Column.fresh(group.layout(), pool, dtype, (number, k), lease), set()
            )  # fmt: skip
            kept = np.ones(group.count, bool)
            kept[np.concatenate(writers)] = False
            shared = {}
            for member in map(int, np.flatnonzero(kept)):
                array = old.array(k, member)
                if member in common:
                    continue
                if group.sizes[member] >= SMALL and not in_place:
                    shared[member] = array
                else:
                    _copy_into(column.array(member, group.shapes[member], group.strides[member]), array)
            if shared:
                column = column.replaced(shared, {member: before.lease_of(member) for member in shared})
            columns.append(column)
        return columns

    def _fresh_parameters(self, pool: Pool, number: int) -> dict[int, Any]:
        group = self.group
        stepped = [i for t in self.tracks if t.program.steps for i in t.members.tolist()]
        small = group.layout().shared
        empty_like: Any = np.empty_like if group.library == "numpy" else torch_if_loaded().empty_like  # type: ignore[union-attr]
        few = [i for i in stepped if small[i]]
        new = dict(zip(few, map(empty_like, [self.xs[i] for i in few]), strict=True))
        turn: Counter[int] = Counter()
        for i in stepped:
            if not small[i]:
                size = int(group.sizes[i])
                block, hold = pool.take(size, group.native_dtype, (number, -1, turn[size]))
                turn[size] += 1
                new[i] = block.array(0, group.shapes[i], group.strides[i])
                del hold
        return new


class GroupTrack(Track):
    """The parameters of a group that one program steps."""

    def __init__(
        self,
        group: Group,
        addresses: tuple[Vector, Vector, Sequence[Vector]],
        variant: Variant,
        members: Vector,
        matrix: Vector,
    ) -> None:
        # Not the step itself: a cycle would keep the old parameters alive, and their memory from being used again.
        self.group, (self.x_addresses, self.dx_addresses, self.s_addresses) = group, addresses
        self.program, self.members, self.matrix = variant.program, members, matrix
        self.loops = variant.loops()
        self.rule = self.group.rules[int(members[0])]
        self.passed = Counter()
        self.work = self.group.work(members)
        self._asked = 0
        self._pass = 0
        self._storing = 0  # the pass that stores what the last transform is given
        self._transformed: list[Any] = []  # what others are still to read
        self._checked: list[tuple[Boundary, list[Any]]] = []
        self.pointers: Vector

    def paths(self) -> list[str]:
        return [self.group.paths[int(i)] for i in self.members]

    def point(self) -> None:
        """Take the addresses of what is read."""
        self.pointers = np.zeros((self.group.count, len(self.program.pointers)), np.uint64)
        self.pointers[:, 0] = self.x_addresses
        self.pointers[:, 1] = self.dx_addresses
        for k, found in enumerate(self.s_addresses):
            self.pointers[:, 2 + k] = found

    def advance(self, answer: Any) -> Request | None:
        program = self.program
        if answer is not None:
            boundary = program.boundaries[self._asked - 1]
            for name, value in zip(boundary.names or (), answer, strict=True):
                self.matrix[:, program.columns[name]] = float(value)
            self._check_guards()
        while self._asked < len(program.boundaries):
            boundary = program.boundaries[self._asked]
            self._sum(self._asked)
            self._asked += 1
            if isinstance(boundary, Transform):
                if not (program.trailing and self._asked == len(program.boundaries)):
                    for stack in self.group.stacks(self.members, boundary.where):
                        self._transformed.append(self._transform(boundary, stack))
                continue
            rule: Any = inner(self.rule, boundary.where)
            if rule.checks or boundary.names is not None:
                values = self._run(program.measuring[self._asked - 1])
                if rule.checks:
                    self._checked.append((boundary, values))
                if boundary.names is not None:
                    return Request(rule, list(zip(*values, strict=True)))
        self._sum(self._asked)
        return None

    def _sum(self, boundary: int) -> None:
        """Run the passes that a measure needs."""
        for this in self.program.before[boundary]:
            if this.stores:  # run for a stack at a time
                self._storing, self._pass = self._pass, self._pass + 1
                continue
            sums = self.loops.prepared(self._pass, self.work, self.pointers, self.matrix)()
            self._pass += 1
            for node, values in zip(this.reductions, sums, strict=True):
                self.matrix[self.members, self.program.columns[node.value]] = values

    def _transform(self, boundary: Transform, stack: Stack) -> Any:
        """Transform some of the arrays. What comes is read at its address, so it is to be kept until then."""
        group, targets = self.group, self.program.targets
        dtype = _native(group, self.program.dtypes[boundary.target])
        given, start = _buffer(stack, dtype)
        size = np.uint64(dtype.itemsize)
        self.pointers[stack.members, targets[boundary.target]] = np.uint64(start) + stack.offsets * size
        self.loops.prepared(self._storing, stack.work, self.pointers, self.matrix)()
        rule: Any = inner(group.rules[stack.members[0]], boundary.where)
        more = f" (and {len(stack.members) - 1} like it)" if len(stack.members) > 1 else ""
        with locating(group.paths[stack.members[0]] + more):
            found = (rule if len(stack.members) == 1 else rule.stacked()).transform(given)
            if tuple(found.shape) != stack.shape or found.dtype != dtype:
                got = f"shape {tuple(found.shape)} and dtype {dtype_name(found)}"
                msg = f"{rule!r} made {got} of an array of shape {stack.shape} and dtype {dtype_name(given)}"
                raise RuleError(msg)
        if element_strides(found) != stack.strides:
            found = _laid_out_as(given, found)
        self.pointers[stack.members, self.program.arrays.index(boundary.source)] = addresses_of([found]) + stack.offsets * size
        return found

    def _run(self, tape: Tape) -> list[Vector]:
        """Numbers for each member."""
        rows = self.matrix if len(self.members) == len(self.matrix) else self.matrix[self.members]
        values = tape.run(Columns(rows, self.program.columns))
        return [value if isinstance(value, np.ndarray) else np.full(len(self.members), value) for value in values]

    def _check_guards(self) -> None:
        """Raise Missed unless what was decided from measures still holds."""
        if self.program.late:
            known = [(node, value) for node, value in self.program.late if not waits(node, self.program, self._asked)]
            found = self._run(Tape([node for node, _ in known], self.program.columns))
            if any((value != expected).any() for value, (_, expected) in zip(found, known, strict=True)):
                raise Missed

    def finite_checks(self) -> list[str]:
        faults = []
        for boundary, values in self._checked:
            rule: Any = inner(self.rule, boundary.where)
            usual = type(rule).fault in {MeasuredRule.fault, NormRule.fault}
            if usual and all(np.isfinite(value).all() for value in values):
                continue
            for k, member in enumerate(self.members):
                own: Any = inner(self.group.rules[int(member)], boundary.where)
                fault = own.fault(tuple(float(value[k]) for value in values))
                if fault is not None:
                    faults.append(f"{type(own).__name__} at {self.group.paths[int(member)]!r}: {fault}")
        return faults

    def write(self, new_xs: dict[int, Any] | None, columns: Sequence[Column]) -> None:
        """Run the last pass. New parameters go to ``new_xs``, or into the old ones."""
        group, targets = self.group, self.program.targets
        if not targets:
            return
        for k, i in enumerate(group.arrays):
            if f"s{i}" in targets:
                self.pointers[:, targets[f"s{i}"]] = columns[k].addresses()
        if self.program.steps:
            if new_xs is None:
                self.pointers[:, targets["x"]] = self.x_addresses
            else:
                self.pointers[self.members, targets["x"]] = addresses_of([new_xs[i] for i in self.members.tolist()])
        apart = new_xs is not None
        if not self.program.trailing:
            self.loops.prepared(self._pass, self.work, self.pointers, self.matrix, apart=apart)()
            return
        boundary: Any = self.program.boundaries[-1]
        for stack in group.stacks(self.members, boundary.where):  # so that only one is held at a time
            found = self._transform(boundary, stack)
            self.loops.prepared(self._pass, stack.work, self.pointers, self.matrix, apart=apart)()
            del found

    def count(self, counters: Vector) -> None:
        """Write the new numbers of the state."""
        if self.program.numbers:
            values = dict(zip(self.program.numbers, self._run(self.program.counting), strict=True))
            chosen: Any = slice(None) if len(self.members) == len(counters) else self.members
            for k, i in enumerate(self.group.numbers):
                counters[chosen, k] = values[f"c{i}"]


def waits(node: Traced, program: Program, asked: int) -> bool:
    """Whether a number depends on a measure that is yet to be combined."""
    ahead = {name for boundary in program.boundaries[asked:] for name in boundary.names or ()}
    return (node.op == "number" and node.value in ahead) or any(waits(arg, program, asked) for arg in node.args)


def _native(group: Group, name: str) -> Any:
    if group.library == "numpy":
        return np.dtype(name)
    return getattr(torch_if_loaded(), name)


def _buffer(stack: Stack, dtype: Any) -> tuple[Any, int]:
    """Memory for a stack, and its address."""
    if isinstance(dtype, np.dtype):
        memory = np.empty(stack.work.elements, dtype)
        strides = tuple(s * dtype.itemsize for s in stack.strides)
        return np.ndarray(stack.shape, dtype, memory, 0, strides), address(memory)
    torch: Any = torch_if_loaded()
    memory = torch.empty_strided(stack.shape, stack.strides, dtype=dtype, device="cpu")
    return memory, memory.data_ptr()


def _copy_into(target: Any, source: Any) -> None:
    if isinstance(target, np.ndarray):
        target[...] = source
    else:
        target.copy_(source)


def _laid_out_as(x: Any, dx: Any) -> Any:
    """dx in memory of its own, with the strides of x."""
    if isinstance(x, np.ndarray):
        new = np.empty_like(x, dtype=dx.dtype, subok=False)
        new[...] = dx
        return new
    torch: Any = torch_if_loaded()
    return torch.empty_strided(x.shape, x.stride(), dtype=dx.dtype, device=x.device).copy_(dx.detach())


def _bump_versions(tensors: list[Any]) -> None:
    """Tell autograd that tensors were written, which a loop does behind its back."""
    torch: Any = torch_if_loaded()
    tracked = [x for x in tensors if not x.is_inference()]
    torch.autograd.graph.increment_version(tracked)
