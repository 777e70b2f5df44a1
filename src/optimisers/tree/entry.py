"""What a state tree keeps for one array."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, final

from ..arrays import copied, dtype_name, is_concrete, is_number, kind, torch_if_loaded
from ..rules._base import AbstractRule
from ..rules._states import map_state, state_leaves
from .sharding import is_sharded, local, with_parts


class Lease:
    """The right to use the memory of some arrays: shared by all states that hold them, ended by ``update_``."""

    def __init__(self) -> None:
        self.ended = False

    def __copy__(self) -> Lease:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return Lease()

    @staticmethod
    def of(leases: Iterable[Lease]) -> Lease:
        """The right to use memory for which all of these are needed."""
        distinct = tuple(dict.fromkeys(leases))
        return distinct[0] if len(distinct) == 1 else JointLease(distinct)


class JointLease(Lease):
    """The right to use memory for which several leases are needed. To end it is to end them all."""

    def __init__(self, leases: tuple[Lease, ...]) -> None:
        self.leases = leases

    @property
    def ended(self) -> bool:
        return any(lease.ended for lease in self.leases)

    @ended.setter
    def ended(self, value: bool) -> None:
        for lease in self.leases:
            lease.ended = value


@final
@dataclass(frozen=True, eq=False)
class Leaf:
    """What a state tree holds for one array.

    Attributes:
        rule: the rule that steps it, or None if it is not trained.
        state: what the rule remembers; over torch, counters and powers are 0-d tensors.
        frozen: whether updates pass it over.

    """

    rule: AbstractRule | None
    state: Any
    frozen: bool = False

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Leaf):
            return NotImplemented
        return self.rule == other.rule and self.frozen == other.frozen and same_state(self.state, other.state)


@dataclass(frozen=True)
class Entry:
    """What the state tree keeps for one slot; ``state`` holds counters as Python numbers."""

    rule: AbstractRule | None
    base: AbstractRule | None
    """The rule as given at setup, from which ratios and ``times=`` are taken."""
    state: Any
    numbers: tuple[bool, ...]
    """Which leaves of the state are counters rather than arrays."""
    frozen: bool
    reason: str
    lease: Lease

    def replace(self, **changes: Any) -> Entry:
        new = object.__new__(Entry)
        new.__dict__.update(self.__dict__, **changes)
        return new

    def __getstate__(self) -> dict[str, Any]:
        # A DTensor whose part lies inside other memory cannot be pickled: torch takes its offset for an address.
        state = map_state(lambda leaf: with_parts(leaf, copied) if is_sharded(leaf) else leaf, self.state)
        return {**vars(self), "state": state}

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        fields = {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "state"}
        # Of a DTensor that was made of its part torch copies neither.
        state = map_state(lambda leaf: with_parts(leaf, lambda part: copy.deepcopy(part, memo)), self.state)
        return self.replace(state=state, **fields)


def same_state(a: Any, b: Any) -> bool:
    """Whether two states have the same nesting, dtypes and bytes."""
    if type(a) is not type(b) and not (is_number(a) and is_number(b)):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    if kind(a) is None:
        return bool(a == b) or (a != a and b != b)  # noqa: PLR0124 (NaN)
    if a.shape != b.shape or dtype_name(a) != dtype_name(b):
        return False
    return _bytes(a) == _bytes(b)


def _bytes(x: Any) -> bytes:
    if kind(x) == "torch":
        x = local(x)
        torch: Any = torch_if_loaded()
        if x.numel() == 0:  # its strides may be such that it has no view as bytes
            return b""
        flat = x.detach().cpu().contiguous().reshape(-1)
        x = flat.view(torch.uint8).numpy()
    return x.tobytes()  # type: ignore[no-any-return]


def shown_state(entry: Entry, array_kind: str) -> Any:
    """The state of a slot with its counters as users see them: 0-d tensors over torch, numbers over NumPy."""
    if array_kind != "torch":
        return entry.state
    from ..arrays import _torch

    return map_state(lambda leaf: _torch.scalar(leaf) if is_number(leaf) else leaf, entry.state)


def host_state(entry: Entry) -> Any:
    """The state as rules compute with it: counters as Python numbers wherever their values can be read."""
    if not any(entry.numbers):
        return entry.state
    leaves = state_leaves(entry.state)
    if len(leaves) != len(entry.numbers) or all(is_number(leaf) for leaf, n in zip(leaves, entry.numbers, strict=True) if n):
        return entry.state
    flags = iter(entry.numbers)

    def read(leaf: Any) -> Any:
        number = next(flags) and kind(leaf) is not None and leaf.ndim == 0 and is_concrete(leaf)
        return leaf.item() if number else leaf

    return map_state(read, entry.state)


def device_of(state: Any) -> Any:
    """The device of the tensors of a state, None if it has none. Norms and moments of one array lie together."""
    for leaf in state_leaves(state):
        if kind(leaf) == "torch" and not (leaf.ndim == 0 and leaf.device.type == "cpu"):
            return leaf.device
    return None


def numbers_in(state: Any) -> tuple[bool, ...]:
    """Which leaves of a fresh state are counters: rules make them as Python numbers."""
    return tuple(is_number(leaf) for leaf in state_leaves(state))
