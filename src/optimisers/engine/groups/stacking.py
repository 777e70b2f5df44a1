"""Which of a group's arrays are transformed together, and who transforms them where they are cut over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import locating
from ...rules._base import AbstractRule
from ...tree.heads import Rules
from ..graph.program import Place, inner
from ..graph.trace import numbers_of
from ..kernels.work import Table, table
from ..memory.strides import Vector, is_row_major
from ..shards.exchange import Exchange, cost_of, owners_of
from ..tracks.stacks import CPU_STACK, DEVICE_STACK, in_stacks, likeness

if TYPE_CHECKING:
    from .group import Group

# Where nothing is copied for it, also large arrays are transformed by twos: products of two matrices at a time are a tenth
# quicker than one after the other. From this size on they are not.
ALONE_FROM = 2**20


class Stack(NamedTuple):
    """Parameters that are transformed together, or one of them alone: how they lie one after another, and the work."""

    members: list[int]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offsets: Vector
    """Where each begins, in elements."""
    work: Table
    exchange: Exchange | None = None
    """How their parts come together, if they are cut over ranks."""
    owners: Sequence[int] = ()
    """The rank that transforms each of them then."""


def stacked(group: Group, members: Vector, where: Place) -> list[Stack]:
    """Some of a group's parameters by what the rules that stand where can transform together.

    RuleError if a rule cannot transform its parameter.
    """
    for i in members.tolist():
        sharding = group.shardings[i] if group.shardings else None
        with locating(group.paths[i]):
            inner(group.rules.of(i), where).check(group.shapes[i] if sharding is None else sharding.shape)
    if group.shardings:
        return _exchanged(group, members, where)
    found: dict[Any, list[int]] = {}
    alone: list[list[int]] = []
    for i in members.tolist():
        if (group.device is not None or group.sizes[i] < ALONE_FROM) and is_row_major(group.shapes[i], group.strides[i]):
            found.setdefault((likeness(inner(group.rules.of(i), where)), group.shapes[i]), []).append(i)
        else:
            alone.append([i])
    for like in found.values():
        alone += in_stacks(like, int(group.sizes[like[0]]), *_limits(group))
    return [_stack(group, chosen) for chosen in alone]


def stacks_stay(old: Rules, new: Rules, where: Place) -> bool:
    """Whether other rules of one structure put the same arrays on the same stacks: as a change of rates does."""
    pairs = set(zip(old.kinds, new.kinds, strict=True))
    if any(_counts(old.distinct[a]) != _counts(new.distinct[b]) for a, b in pairs):  # such as numbers of blocks
        return False
    alike = {(likeness(inner(old.distinct[a], where)), likeness(inner(new.distinct[b], where))) for a, b in pairs}
    return len({a for a, _ in alike}) == len(alike) == len({b for _, b in alike})


def _counts(rule: AbstractRule) -> list[float]:
    """The whole numbers in the fields of a rule."""
    return [number for number in numbers_of(rule) if isinstance(number, int)]


def _exchanged(group: Group, members: Vector, where: Place) -> list[Stack]:
    """The same where arrays are cut over ranks: as many on a stack as give each rank what is a stack elsewhere."""
    found: dict[Any, list[int]] = {}
    for i in members.tolist():
        lone = None if is_row_major(group.shapes[i], group.strides[i]) else i
        sharding = group.shardings[i]
        shape = group.shapes[i] if sharding is None else sharding.shape
        found.setdefault((likeness(inner(group.rules.of(i), where)), shape, sharding, lone), []).append(i)
    stacks = []
    loads: dict[Any, list[float]] = {}
    limit, least = _limits(group)
    for (_, shape, sharding, _), like in sorted(found.items(), key=lambda item: -cost_of(item[0][1])):
        exchange, ranks = None, 1
        if sharding is not None:
            exchange = group.exchanges.get(sharding) or group.exchanges.setdefault(sharding, Exchange(sharding))
            ranks = exchange.count
        for chosen in in_stacks(like, math.prod(shape), limit * ranks, least * ranks):
            owners: Sequence[int] = ()
            if exchange is not None:
                owners = owners_of(len(chosen), cost_of(shape), loads.setdefault(exchange.group, [0.0] * ranks))
            stacks.append(_stack(group, chosen, exchange, owners))
    return stacks


def _limits(group: Group) -> tuple[int, int]:
    """(elements on a stack, arrays at least)."""
    return (CPU_STACK, 2) if group.device is None else (DEVICE_STACK, 1)


def _stack(group: Group, chosen: list[int], exchange: Exchange | None = None, owners: Sequence[int] = ()) -> Stack:
    size, shape, strides = int(group.sizes[chosen[0]]), group.shapes[chosen[0]], group.strides[chosen[0]]
    if len(chosen) > 1 or exchange is not None:
        shape, strides = (len(chosen), *shape), (size, *strides)
    work = table(np.array(chosen, np.int64), group.sizes)
    offsets = np.arange(len(chosen), dtype=np.uint64) * np.uint64(size)
    return Stack(chosen, shape, strides, offsets, work, exchange, owners)
