"""Whole matrices from their parts: each has an owner among the ranks of its mesh, who transforms it and sends parts back.

A stack of matrices of one shape goes out and comes back by one all-to-all each. A rank sends what it holds of a matrix to the
matrix's owner, once: of ranks with the same part, the one in the owner's replica does. Back it takes its own part of each. So
no more travels than the parts that lie elsewhere, and work over replicated dimensions of a mesh is divided too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, final

import numpy as np

from ...arrays import cast_to, dtype_name, torch_if_loaded
from ...errors import UnfinishedStepError
from ...tree.sharding import Sharding

Vector = np.ndarray[Any, Any]

BROKEN: set[Any] = set()
"""The process groups on which this rank owes others what is to come back."""


@final
class Exchange:
    """How the matrices of one sharding travel between the ranks of its mesh, which are numbered as in their process group.

    Attributes:
        count: how many ranks there are.
        me: the number of this one.

    """

    def __init__(self, sharding: Sharding) -> None:
        self.sharding, mesh = sharding, sharding.mesh
        self.group = group_of(mesh)
        ranks = _dist().get_process_group_ranks(self.group)
        self.count = len(ranks)
        self.me = ranks.index(_dist().get_rank())
        numbers = np.array(mesh.mesh.tolist())
        at = {int(numbers[place]): place for place in product(*map(range, numbers.shape))}
        places = [at[rank] for rank in ranks]
        self._indices = [_indices_at(sharding, place) for place in places]
        kept = [d for d in range(numbers.ndim) if d not in sharding.over]
        self._replica = [tuple(place[d] for d in kept) for place in places]

    def _shape(self, rank: int) -> tuple[int, ...]:
        return tuple(len(index) for index in self._indices[rank])

    def transformed(self, given: Any, owners: Sequence[int], transform: Callable[[Any], Any], dtype: str) -> Any:
        """What becomes of a stack of arrays, of which this rank has the parts, along a first axis.

        Args:
            given: the parts.
            owners: for each of the arrays the rank that transforms it.
            transform: called with a stack of whole arrays, by ranks that own some.
            dtype: in which they travel.

        Raises:
            UnfinishedStepError: if an error or an interrupt came between out and back before. The others still wait for what
                was to come back, and would take anything else for it.

        """
        if self.group in BROKEN:
            msg = (
                "matrices of an earlier step, or earlier part of this one, did not come back from their owners, since this "
                "rank was interrupted or could not transform its own; the other ranks wait for them. End all, and go on from "
                "the last checkpoint"
            )
            raise UnfinishedStepError(msg)
        BROKEN.add(self.group)
        found = self._there_and_back(given, owners, transform, dtype)
        BROKEN.discard(self.group)
        return found

    def _there_and_back(self, given: Any, owners: Sequence[int], transform: Callable[[Any], Any], dtype: str) -> Any:
        own = dtype_name(given)
        given = cast_to(given, dtype)
        mine = [j for j, owner in enumerate(owners) if owner == self.me]
        received = self._swapped(*self._outwards(given, owners, mine))
        whole = self._whole(received, given, len(mine))
        if mine:
            whole = cast_to(transform(cast_to(whole, own)), dtype)
        return cast_to(self._parts(self._swapped(*self._inwards(whole, given, owners, mine)), given, owners), own)

    def _outwards(self, given: Any, owners: Sequence[int], mine: list[int]) -> tuple[Any, list[int], list[int]]:
        """(what this rank sends to the owners, how much to each, how much it gets of each)."""
        order = [j for rank in range(self.count) if self._is_sender(self.me, rank) for j in _of(owners, rank)]
        sent = given[order].reshape(-1) if order else given.new_empty(0)
        size = given[0].numel()
        out = [size * len(_of(owners, rank)) * self._is_sender(self.me, rank) for rank in range(self.count)]
        into = [_size(self._shape(rank)) * len(mine) * self._is_sender(rank, self.me) for rank in range(self.count)]
        return sent, out, into

    def _is_sender(self, sender: int, owner: int) -> bool:
        return self._replica[sender] == self._replica[owner]

    def _whole(self, received: Any, given: Any, count: int) -> Any:
        """The arrays that this rank owns, put together from the parts of all ranks of its replica."""
        whole = given.new_empty((count, *self.sharding.shape))
        start = 0
        for rank in range(self.count if count else 0):
            if self._is_sender(rank, self.me):
                size = _size(self._shape(rank)) * count
                part = received[start : start + size].reshape((count, *self._shape(rank)))
                start += size
                _put(whole, self._indices[rank], part)
        return whole

    def _inwards(self, whole: Any, given: Any, owners: Sequence[int], mine: list[int]) -> tuple[Any, list[int], list[int]]:
        """(what this rank sends back of the arrays it owns, how much to each, how much it gets of each)."""
        torch: Any = torch_if_loaded()
        pieces = [_take(whole, index).reshape(-1) for index in self._indices] if mine else []
        sent = torch.cat(pieces) if pieces else given.new_empty(0)
        size = given[0].numel()
        out = [_size(self._shape(rank)) * len(mine) for rank in range(self.count)]
        return sent, out, [size * len(_of(owners, rank)) for rank in range(self.count)]

    def _parts(self, received: Any, given: Any, owners: Sequence[int]) -> Any:
        """The parts of this rank, in the order of the stack."""
        torch: Any = torch_if_loaded()
        order = [j for rank in range(self.count) for j in _of(owners, rank)]
        found = received.reshape((len(order), *given.shape[1:]))
        back = torch.empty(len(order), dtype=torch.int64)
        back[order] = torch.arange(len(order))
        return found[back.to(found.device)]

    def _swapped(self, sent: Any, out: list[int], into: list[int]) -> Any:
        received = sent.new_empty(sum(into))
        _dist().all_to_all_single(received, sent, into, out, group=self.group)
        return received


def cost_of(shape: Sequence[int]) -> float:
    """What the transform of a matrix costs, beside those of others: products with its shorter side."""
    rows, columns = int(shape[0]), _size(shape[1:])
    return float(rows * columns * min(rows, columns))


def owners_of(count: int, cost: float, loads: list[float]) -> list[int]:
    """For each of so many arrays of one cost the rank with least to do so far; ``loads`` is what each has to do."""
    owners = []
    for _ in range(count):
        owner = loads.index(min(loads))
        loads[owner] += cost
        owners.append(owner)
    return owners


def _of(owners: Sequence[int], rank: int) -> list[int]:
    return [j for j, owner in enumerate(owners) if owner == rank]


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _indices_at(sharding: Sharding, place: Sequence[int]) -> list[Vector]:
    """Along each axis of an array the indices of the part that the rank at this place of the mesh holds."""
    indices = [np.arange(n) for n in sharding.shape]
    for dimension, placement in enumerate(sharding.placements):
        if placement.is_replicate():
            continue
        axis = placement.dim % len(indices)
        parts = sharding.mesh.size(dimension)
        indices[axis] = _cut(indices[axis], parts, getattr(placement, "split_factor", 1))[place[dimension]]
    return indices


def _cut(index: Vector, parts: int, factor: int) -> list[Vector]:
    """An index cut as torch cuts an axis: pieces of ceil(n / parts), the last ones shorter or empty.

    Where an axis is cut over a later dimension of the mesh first, each of its ``factor`` pieces there is cut.
    """
    found: list[list[Vector]] = [[] for _ in range(parts)]
    for piece in _chunks(index, factor):
        for k, part in enumerate(_chunks(piece, parts)):
            found[k].append(part)
    return [np.concatenate(pieces) for pieces in found]


def _chunks(index: Vector, parts: int) -> list[Vector]:
    size = -(-len(index) // parts)
    return [index[k * size : (k + 1) * size] for k in range(parts)]


def _as_slices(index: Sequence[Vector]) -> tuple[slice, ...] | None:
    """The indices as slices, None if one has gaps."""
    if any(len(i) and i[-1] - i[0] + 1 != len(i) for i in index):
        return None
    return tuple(slice(int(i[0]), int(i[-1]) + 1) if len(i) else slice(0, 0) for i in index)


def _take(whole: Any, index: Sequence[Vector]) -> Any:
    slices = _as_slices(index)
    if slices is not None:
        return whole[(slice(None), *slices)]
    torch: Any = torch_if_loaded()
    for axis, i in enumerate(index, 1):
        whole = whole.index_select(axis, torch.from_numpy(i).to(whole.device))
    return whole


def _put(whole: Any, index: Sequence[Vector], part: Any) -> None:
    slices = _as_slices(index)
    if slices is not None:
        whole[(slice(None), *slices)] = part
        return
    torch: Any = torch_if_loaded()
    grid = torch.meshgrid(*(torch.from_numpy(i).to(whole.device) for i in index), indexing="ij")
    whole[(slice(None), *grid)] = part


_groups: dict[tuple[int, ...], Any] = {}


def group_of(mesh: Any) -> Any:
    """The process group of all ranks of a mesh; made once where the mesh has several dimensions."""
    if mesh.ndim == 1:
        return mesh.get_group(0)
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    if len(ranks) == _dist().get_world_size():
        return _dist().group.WORLD
    if ranks not in _groups:
        _groups[ranks] = _dist().new_group(list(ranks), use_local_synchronization=True)
    return _groups[ranks]


def _dist() -> Any:
    torch: Any = torch_if_loaded()
    return torch.distributed
