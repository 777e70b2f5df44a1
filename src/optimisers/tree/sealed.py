"""What a step is made of, as pytrees that go through ``torch.compile``: which parts are data, and which are constants.

A recorded function takes and gives pytrees of tensors and numbers. The classes here make such of rules and of what is no data.
They are registered with torch's pytree as soon as torch is seen, since a tracer knows only what was registered before it began.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, final

from ..arrays import torch_if_loaded
from ..rules._fields import RANGES
from .leaves import Slot
from .structure import Structure


@final
class Plan:
    """What all states of one model have in common: a constant, into which a tracer does not look.

    Attributes:
        structure: of the model.
        slots: its trainable arrays.
        tied: the numbers of those that stand at several places.
        untrained: the numbers of the other leaves.
        left_out: those of them that ``trainable=`` has left out; all, where it is not known which.
        sharded: (leaf, sharding, path) of every place at which a DTensor stands.

    """

    __slots__ = ("left_out", "sharded", "slots", "structure", "tied", "untrained")

    def __init__(self, structure: Structure, slots: tuple[Slot, ...], left_out: frozenset[int] | None = None) -> None:
        self.structure, self.slots = structure, slots
        self.tied = tuple(i for i, slot in enumerate(slots) if len(slot.places) > 1)
        trained = {place.leaf for slot in slots for place in slot.places}
        self.untrained = tuple(i for i in range(len(structure.paths)) if i not in trained)
        self.left_out = frozenset(self.untrained) if left_out is None else left_out
        self.sharded = [
            (place.leaf, slot.sharding, structure.paths[place.leaf])
            for slot in slots
            if slot.sharding is not None
            for place in slot.places
        ]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        if self.structure is other.structure and self.slots is other.slots:  # as from one step to the next
            return True
        return self.structure == other.structure and self.slots == other.slots

    def __hash__(self) -> int:
        return hash(self.slots)


@final
class Constant:
    """Holds what is no data, such as None or a function; the other side sees that value itself."""

    def __init__(self, value: Any) -> None:
        self.value = value


@final
class Sealed:
    """A dataclass, such as a rule, taken apart; the other side sees it put together again."""

    def __init__(self, of: type, names: tuple[str, ...], values: list[Any]) -> None:
        self.of, self.names, self.values = of, names, values


def sealed(value: Any) -> Any:
    """A rule, or a part of one: numbers and tensors in it are data, everything else is constant."""
    if isinstance(value, (tuple, list)):
        return tuple([sealed(item) for item in value])
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return Constant(value) if value is None or isinstance(value, (str, bool)) or callable(value) else value
    names = tuple([field.name for field in dataclasses.fields(value)])
    return Sealed(type(value), names, [sealed(getattr(value, name)) for name in names])


def _unsealed(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    of, names = context
    annotations = {field.name: field.type for field in dataclasses.fields(of)}
    rule: Any = object.__new__(of)
    for name, value in zip(names, values, strict=True):
        # A hyper-parameter may be the tracer's symbol for a number; any other number, such as the order of a norm, is itself.
        free = name in RANGES or annotations[name] in {"Any", Any}
        object.__setattr__(rule, name, value if free or not _is_symbol(value) else float(value))
    return rule


def _is_symbol(value: Any) -> bool:
    torch = torch_if_loaded()
    return torch is not None and isinstance(value, torch.SymFloat)


def register(pytree: Any) -> None:
    """Make the classes known to ``torch.utils._pytree``."""
    pytree.register_pytree_node(Constant, lambda c: ([], c.value), lambda _, value: value)
    pytree.register_pytree_node(Sealed, lambda s: (s.values, (s.of, s.names)), _unsealed)
    if hasattr(pytree, "register_constant"):  # from torch 2.7 on
        pytree.register_constant(Plan)
