"""Memory for new generations of arrays: what a pure update returns lies where an old generation lay that nobody refers to.

A generation is dropped by its user one step after the next one was made, so two of them take turns, and purity costs memory
but no page faults. A block is used again only when the library's own count of references to its memory says that we alone
hold it: views, NumPy arrays over tensors and autograd graphs all count. Blocks are for the CPU; other devices have allocators
that do this.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from threading import RLock
from types import MappingProxyType
from typing import Any

import numpy as np

from ...tree.entry import Lease
from .strides import addresses_of

Vector = np.ndarray[Any, Any]

SMALL = 2**14
"""Arrays of fewer elements share blocks; larger ones have one each, so that holding one array does not hold the others."""

_SHARED = 2**20  # elements in a shared block
_KEPT = 3  # generations of a block that are looked after; older ones are their holders' alone


class Pool:
    """The blocks of a line of states, by size and dtype."""

    def __init__(self) -> None:
        self._blocks: defaultdict[tuple[Any, ...], list[Block]] = defaultdict(list)
        # Of the thread: an interrupt may fall between its last line and its release, and the next step must not wait for it.
        self._lock = RLock()

    def __deepcopy__(self, memo: Any) -> Pool:
        return Pool()

    def take(self, size: int, dtype: Any, turn: tuple[int, ...], device: Any = None) -> tuple[Block, Any]:
        """A block of so many elements that nobody uses, and what keeps it from being given to anybody else.

        ``turn`` tells blocks of one size in one generation apart. Another device than the host has an allocator that keeps
        memory for the next one who asks.
        """
        if device is not None:
            block = Block(size, dtype, device=device)
            return block, block.hold()
        with self._lock:
            kept = self._blocks[size, dtype, turn]
            for block in kept:
                if block.is_free():
                    return block, block.hold()
            block = Block(size, dtype)
            kept.append(block)
            if len(kept) > _KEPT:
                kept.pop(0)
            return block, block.hold()


class Block:
    """One piece of memory, from which arrays are made."""

    __slots__ = ("_alone", "_count", "_places", "_start", "base", "storage")

    def __init__(self, size: int, dtype: Any, around: Any = None, device: Any = "cpu") -> None:
        self.base: Any
        self.storage: Any
        self._count: Callable[[int], int] | None = None
        if isinstance(dtype, np.dtype):
            self.base, self.storage = np.empty(size, dtype) if around is None else around, None
        else:
            torch = sys.modules["torch"]
            self.base = torch.empty(size, dtype=dtype, device=device) if around is None else around.detach()
            self.storage = self.base.untyped_storage()
            self._count = getattr(torch._C, "_storage_Use_Count", None)
        self._start = self.address()
        self._places: tuple[Any, int, Vector] | None = None
        self._alone = self._holders() if around is None else _alone(isinstance(dtype, np.dtype))

    @staticmethod
    def around(x: Any) -> Block:
        """The memory of an array that nobody else will refer to once the state that it comes from is gone."""
        return Block(0, x.dtype, x)

    def _holders(self) -> int:
        """How many refer to the memory; 0 where the library cannot say."""
        if self.storage is None:
            return sys.getrefcount(self.base)
        # A storage that a user asked a tensor for is this very object, which the library does not count again.
        return 0 if self._count is None else self._count(self.storage._cdata) + sys.getrefcount(self.storage)

    def is_free(self) -> bool:
        """Whether nobody but us refers to the memory, and it is the one that was made here.

        Sharing a tensor with another process moves it, and nobody counts who refers to it there.
        """
        return 0 < self._alone == self._holders() and self.address() == self._start

    def is_held_once(self) -> bool:
        """Whether nobody but us and the one who holds it refers to the memory."""
        return 0 < self._alone == self._holders() - 1 and self.address() == self._start

    def hold(self) -> Any:
        """What keeps the block from being used again while it exists."""
        return self.base[:] if self.storage is None else self.base.detach()

    def address(self) -> int:
        """The address of the first element."""
        if self.storage is None:
            return int(self.base.__array_interface__["data"][0])
        return int(self.base.data_ptr())

    def places(self, layout: Layout) -> Vector:
        """The addresses of the arrays of a layout of which this is the only block; one vector, until it is moved."""
        start = self.address()
        if self._places is None or self._places[0] is not layout or self._places[1] != start:
            self._places = layout, start, np.uint64(start) + layout.offsets * np.uint64(self.base.itemsize)
        return self._places[2]

    def array(self, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Any:
        """An array in this memory: offset and strides in elements. A tensor is no view, so it has a version of its own."""
        if self.storage is None:
            size = self.base.itemsize
            return np.ndarray(shape, self.base.dtype, self.base, offset * size, tuple(s * size for s in strides))
        return self.base.new_empty(0).set_(self.storage, offset, tuple(shape), tuple(strides))


@cache
def _alone(numpy: bool) -> int:
    """How many references to a block's memory the library counts if there is only the block."""
    return Block(1, np.dtype("float32") if numpy else sys.modules["torch"].float32)._alone


def _references(arrays: dict[int, Any], i: int) -> tuple[int, ...]:
    """How many refer to an array, to what the library makes of it, and to its memory."""
    x = arrays[i]
    if isinstance(x, np.ndarray):
        return (sys.getrefcount(x),)
    torch = sys.modules["torch"]
    storage = x.untyped_storage()
    count = getattr(torch._C, "_storage_Use_Count", None)
    return sys.getrefcount(x), x._use_count(), 0 if count is None else count(storage._cdata), sys.getrefcount(storage)


@cache
def _sole(numpy: bool) -> tuple[int, ...]:
    """The references to an array to which nothing refers but the state of one entry and a column."""
    arrays = {0: np.empty(1, np.float32) if numpy else sys.modules["torch"].empty(1, device="cpu")}
    state = (arrays[0],)
    found = _references(arrays, 0)
    del state
    return found


def _is_sole(arrays: dict[int, Any], i: int) -> bool:
    """Whether the memory of an array may be taken over: all of it is the array's, and nothing else refers to it."""
    x = arrays[i]
    if isinstance(x, np.ndarray):
        whole = x.base is None and x.flags.c_contiguous and x.flags.writeable
    else:
        whole = x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.numel() * x.itemsize and not x.is_inference()
    del x
    return whole and _references(arrays, i) == _sole(isinstance(arrays[i], np.ndarray))


class Layout:
    """Where each of many arrays lies in blocks: (block, first element); a large array has a block of its own."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.block_sizes: list[int] = []
        self.owners: list[int | None] = []  # of blocks that one array has for itself
        places = np.zeros((len(sizes), 2), np.int64)
        shared, used = -1, 0
        for i, size in enumerate(sizes):
            if size >= SMALL:
                places[i] = len(self.block_sizes), 0
                self.block_sizes.append(size)
                self.owners.append(i)
                continue
            if shared < 0 or used + size > _SHARED:
                shared, used = len(self.block_sizes), 0
                self.block_sizes.append(0)
                self.owners.append(None)
            places[i] = shared, used
            used += -(-size // 16) * 16  # each begins on a cache line of its own, as in memory from the allocator
            self.block_sizes[shared] = used
        self.blocks, self.offsets = places[:, 0].copy(), places[:, 1].astype(np.uint64)
        self.shared = [size < SMALL for size in sizes]

    def take(
        self,
        pool: Pool,
        dtype: Any,
        turn: tuple[int, ...],
        adopted: Mapping[int, Any] = MappingProxyType({}),
        device: Any = None,
    ) -> list[tuple[Block, Any]]:
        """Blocks for one generation, each with its hold; those of adopted arrays are their own memory."""
        if len(self.owners) == 1 and not adopted:
            return [pool.take(self.block_sizes[0], dtype, (*turn, 0), device)]
        seen: defaultdict[int, int] = defaultdict(int)
        blocks = []
        for size, owner in zip(self.block_sizes, self.owners, strict=True):
            if owner is not None and owner in adopted:
                block = Block.around(adopted[owner])
                blocks.append((block, block.hold()))
            else:
                blocks.append(pool.take(size, dtype, (*turn, seen[size]), device))
                seen[size] += 1
        return blocks


class Column:
    """One array of the state for each of many parameters: given ones, or places in blocks, made into arrays when looked at.

    Given arrays were made elsewhere, by rules or by users. They are not written, since nobody knows what else they are: one
    array may stand at several places, be read-only, or belong to a state that is not consumed. Large ones to which nothing else
    refers are taken over as blocks, so that a first step in place needs no memory for a second state.

    Attributes:
        lease: of this memory.
        older: those of arrays that were not made with the others, by parameter.

    """

    def __init__(
        self,
        given: dict[int, Any],
        lease: Lease,
        older: dict[int, Lease] | None = None,
        blocks: tuple[Layout, list[tuple[Block, Any]]] | None = None,
    ) -> None:
        self._given, self.lease, self.older = given, lease, older or {}
        self._blocks = blocks
        self._made: dict[int, Any] = {}
        self._known: tuple[list[int], Vector] | None = None

    @staticmethod
    def of(arrays: Sequence[Any], leases: Sequence[Lease]) -> Column:
        """A column of arrays that are there."""
        first = leases[0]
        return Column(dict(enumerate(arrays)), first, {i: lease for i, lease in enumerate(leases) if lease is not first})

    @staticmethod
    def fresh(layout: Layout, pool: Pool, dtype: Any, turn: tuple[int, ...], lease: Lease, device: Any = None) -> Column:
        """A column of memory whose content is yet to be written."""
        return Column({}, lease, None, (layout, layout.take(pool, dtype, turn, device=device)))

    def taken_over(
        self, layout: Layout, pool: Pool, dtype: Any, turn: tuple[int, ...], lease: Lease, device: Any = None
    ) -> tuple[Column, set[int]]:
        """A column to be written in the place of this one, and the arrays whose memory it has in common with it."""
        large = {i for i in layout.owners if i in self._given} if self._blocks is None else set()
        adopted = {i: self._given[i] for i in large if i is not None and _is_sole(self._given, i)}
        return Column({}, lease, None, (layout, layout.take(pool, dtype, turn, adopted, device))), set(adopted)

    def is_own(self) -> bool:
        """Whether it lies in blocks to which nobody else refers, and so may be written."""
        if self._given or self._blocks is None:
            return False
        return all(block.is_held_once() for block, _ in self._blocks[1])

    def addresses(self) -> Vector:
        """Those of the first elements, now: torch moves the memory of tensors that are shared with other processes."""
        if self._blocks is None:
            return addresses_of([self._given[i] for i in range(len(self._given))])
        layout, blocks = self._blocks
        if len(blocks) == 1 and not self._given:
            return blocks[0][0].places(layout)
        places = [block.address() for block, _ in blocks]
        if self._known is not None and not self._given and self._known[0] == places:
            return self._known[1]
        starts = np.array(places, np.uint64)
        found: Vector = starts[layout.blocks] + layout.offsets * np.uint64(blocks[0][0].base.itemsize)
        if not self._given:
            self._known = places, found
        else:
            found[list(self._given)] = addresses_of(list(self._given.values()))
        return found

    def lease_of(self, i: int) -> Lease:
        """The lease of one array."""
        return self.older.get(i, self.lease)

    def leased(self, lease: Lease) -> Column:
        """The same memory, taken over by a new lease."""
        new = object.__new__(Column)
        new.__dict__.update(self.__dict__)
        new.lease, new.older = lease, {}
        return new

    def replaced(self, arrays: dict[int, Any], leases: dict[int, Lease]) -> Column:
        """The column with given arrays for some parameters."""
        new = self.leased(self.lease)
        new._given, new.older = {**self._given, **arrays}, {**self.older, **leases}
        return new

    def array(self, i: int, shape: Sequence[int], strides: Sequence[int]) -> Any:
        """The array of one parameter; strides in elements."""
        if i in self._given:
            return self._given[i]
        if i not in self._made:
            layout, blocks = self._blocks  # type: ignore[misc]
            self._made[i] = blocks[int(layout.blocks[i])][0].array(int(layout.offsets[i]), shape, strides)
        return self._made[i]
