"""One step of a group of parameters by compiled loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any

import numpy as np

from ...arrays import Untraceable, cast_to, dtype_name, torch_if_loaded, working_dtype
from ...tree.entry import Lease
from ..graph.program import COMPILED
from ..memory.pool import SMALL, Column, Pool
from ..memory.strides import Vector, addresses_of, element_strides, is_loopable, laid_out_as, lie_alike, native_dtype, places
from ..memory.writes import Writes
from .device_track import DeviceTrack
from .states import GroupState
from .track import GroupTrack, PreparedStep


class GroupStep:
    """A step of the parameters of a group.

    ``xs`` are all of them, ``dxs`` their gradients, None for those that take no step.
    """

    def __init__(
        self, group_state: GroupState, xs: Sequence[Any], dxs: list[Any], *, admitted: bool, last: PreparedStep | None = None
    ) -> None:
        self.group_state, self.group, self.xs, self.dxs = group_state, group_state.group, xs, dxs
        self.moved = True  # whether anything lies elsewhere than in the last step
        self.prepared: PreparedStep | None = None
        states = [column.addresses() for column in group_state.columns]
        if not admitted or type(None) in map(type, dxs):
            self.members = np.array([i for i, dx in enumerate(dxs) if dx is not None], np.int64)
            if not admitted:
                self._one_dtype()
            addresses = [self._addresses(xs), self._addresses(dxs)]
            filled = self.members[self.group.sizes[self.members] > 0] if self.group.has_empty else self.members
            _refuse_nowhere(all(found[filled].all() for found in addresses))
            self._take([*addresses, *states])
            return
        self.members = self.group.everyone
        x_places, dx_places = places(xs), places(dxs)
        if last is None or last.slots is not self.group.slots or last.dx_dtype != dxs[0].dtype:
            last = None
        elif x_places == last.x_places and dx_places == last.dx_places and all(map(is_, states, last.addresses[2:])):
            self.moved, addresses = False, last.addresses
        if self.moved:
            _refuse_nowhere(self.group.has_empty or (all(x_places) and all(dx_places)))
            addresses = [np.array(x_places, np.uint64), np.array(dx_places, np.uint64), *states]
            if self.group.has_empty:
                present = self.group.sizes > 0
                _refuse_nowhere(bool(addresses[0][present].all() and addresses[1][present].all()))
        self._take(addresses, [] if last is None else last.tracks)
        self.prepared = PreparedStep(self.group.slots, dxs[0].dtype, x_places, dx_places, addresses, self.tracks)

    def _take(self, addresses: list[Vector], tracks: Sequence[GroupTrack] = ()) -> None:
        """Take these addresses, and tracks: those that are given, if they still hold."""
        self.x_addresses, self.dx_addresses, *self.s_addresses = addresses
        counters = self.group_state.counters
        if tracks and all(track.renew(self.group, counters) for track in tracks):
            self.tracks = list(tracks)
        else:
            dx_dtype = dtype_name(self.dxs[int(self.members[0])])
            parts = self.group.partition(self.members, counters, dx_dtype)
            kind = GroupTrack if self.group.device is None else DeviceTrack
            self.tracks = [kind(self.group, *part) for part in parts]
        for track in self.tracks:
            track.point(*addresses)

    def _one_dtype(self) -> None:
        """Make all gradients of one dtype in which loops read them, and laid out as the parameters are."""
        group = self.group
        present = [self.dxs[i] for i in self.members]
        mixed = len({dx.dtype for dx in present}) > 1 or dtype_name(present[0]) not in COMPILED
        wide = working_dtype(group.dtype)
        for i in self.members:
            dx = cast_to(self.dxs[i], wide) if mixed else self.dxs[i]
            if not is_loopable(dx) or not lie_alike(dx.shape, element_strides(dx), group.strides[i]):
                dx = laid_out_as(self.xs[i], dx)
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
        for k, found in enumerate(self.s_addresses[: len(group.arrays)]):
            size = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[group.form[group.arrays[k]].dtype]
            first = found[chosen]
            yield first, first + group.bytes_of(np.uint64(size))[chosen]

    def copy_aliased(self, starts: Vector, ends: Vector) -> bool:
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
        self.prepared, self.dx_addresses = None, first.copy()
        for i in self.members[hit]:
            self.dxs[i] = laid_out_as(self.xs[i], self.dxs[i])
            self.dx_addresses[i] = places([self.dxs[i]])[0]
        for track in self.tracks:
            track.point(self.x_addresses, self.dx_addresses)
        return False

    def plan(
        self, writes: Writes, pool: Pool, number: int, lease: Lease, *, in_place: bool
    ) -> tuple[GroupState, dict[int, Any]]:
        """Make ready what is to be written, in place or to memory of a pool. The state after it, and new parameters by member.

        Memory that is new or taken over has this lease; what an old state still has a part in keeps its own.
        """
        group, old = self.group, self.group_state
        columns = self._new_columns(pool, number, lease, in_place=in_place)
        new_xs = None if in_place else self._fresh_parameters(pool, number)
        counters = old.counters.copy()
        for track in self.tracks:
            track.plan(writes, new_xs, columns)
            track.count(counters)
        if new_xs is None and group.library == "torch":
            writes.note(bump_versions(), self._tracked())
        return GroupState(group, columns, counters), new_xs or {}

    def _new_columns(self, pool: Pool, number: int, lease: Lease, *, in_place: bool) -> list[Column]:
        """Where the new state is written. Also in place that is new memory for what others may refer to."""
        group, old = self.group, self.group_state
        columns = []
        for k, i in enumerate(group.stored):
            writers = [t.members for t in self.tracks if t.writes(i)]
            before = old.columns[k]
            if not writers or (in_place and before.is_own()):
                columns.append(before.leased(lease) if in_place else before)
                continue
            dtype = native_dtype(group.library, group.form[i].dtype)
            where = (group.layout(k), pool, dtype, (number, k), lease, group.device and group.device.device)
            column, common = before.taken_over(*where) if in_place else (Column.fresh(*where), set())
            shared = {}
            for member in self._others(writers):
                array = old.array(k, member)
                if member in common:
                    continue
                if group.sizes[member] >= SMALL and not in_place:
                    shared[member] = array
                else:
                    _copy_into(column.array(member, *group.laid_out(k, member)), array)
            if shared:
                column = column.replaced(shared, {member: before.lease_of(member) for member in shared})
            columns.append(column)
        return columns

    def _stepped(self) -> list[int]:
        """The members whose parameters move."""
        return [i for track in self.tracks if track.program.steps for i in track.members.tolist()]

    def _tracked(self) -> list[Any]:
        """The tensors that are written and have a version."""
        stepped = self._stepped()
        xs = list(self.xs) if len(stepped) == self.group.count else [self.xs[i] for i in stepped]
        torch: Any = torch_if_loaded()
        return [x for x in xs if not x.is_inference()] if any(map(torch.Tensor.is_inference, xs)) else xs

    def _others(self, writers: list[Vector]) -> list[int]:
        """The members that are in none of these parts of the group."""
        if sum(map(len, writers)) == self.group.count:
            return []
        kept = np.ones(self.group.count, bool)
        kept[np.concatenate(writers)] = False
        return np.flatnonzero(kept).tolist()

    def _fresh_parameters(self, pool: Pool, number: int) -> dict[int, Any]:
        group, stepped = self.group, self._stepped()
        empty_like: Any = np.empty_like if group.library == "numpy" else torch_if_loaded().empty_like  # type: ignore[union-attr]
        small = group.layout().shared
        few = [i for i in stepped if small[i] or group.device is not None]
        new = dict(zip(few, map(empty_like, [self.xs[i] for i in few]), strict=True))
        if len(few) == len(stepped):
            return new
        turn: Counter[int] = Counter()
        for i in stepped:
            if i not in new:
                size = int(group.sizes[i])
                block, hold = pool.take(size, group.native_dtype, (number, -1, turn[size]))
                turn[size] += 1
                new[i] = block.array(0, group.shapes[i], group.strides[i])
                del hold
        return new


def _refuse_nowhere(have_memory: bool) -> None:
    """Untraceable where a storage has no memory: it was freed, or is a lazy zero."""
    if not have_memory:
        raise Untraceable("an array has no memory")


def _copy_into(target: Any, source: Any) -> None:
    if isinstance(target, np.ndarray):
        target[...] = source
    else:
        target.copy_(source)


def bump_versions() -> Callable[[list[Any]], None]:
    """What tells autograd that tensors were written, which a loop does behind its back."""
    torch: Any = torch_if_loaded()
    return torch.autograd.graph.increment_version  # type: ignore[no-any-return]
