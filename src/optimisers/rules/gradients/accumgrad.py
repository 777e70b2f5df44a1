"""Gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...arrays import Array, cast_to, dtype_name, host_int, working_dtype, zeros_like
from .._base import AbstractRule, State, walk
from .._fields import Interval, bounded


class Gathered(NamedTuple):
    """The state of `AccumGrad`: the sum so far, each gradient divided by how many there will be; number of the coming one."""

    mean: Any
    count: Any


@dataclass(frozen=True)
class AccumGrad(AbstractRule):
    """Gathers the mean of n gradients; the members of the chain behind it run, and the parameter moves, every n-th time.

    Args:
        n: number of gradients to a step, >= 1. ``adjust`` may set it at any time: all gradients of a step have one weight.

    State: Gathered(mean so far, of x's shape, for half precision in float32, in which many small ones still count; number
    of the coming gradient, 1 to n). On the steps between, ``apply`` returns no step, and later members of the chain keep their
    state. The number is read on the host, so AccumGrad does not work inside torch.func.vmap and torch.compile.
    """

    n: int = bounded(range=Interval(1, integer=True))

    law = "elementwise"

    def init(self, x: Array) -> State:
        return self.init_as(x, working_dtype(dtype_name(x)))

    def init_as(self, x: Array, dtype: str) -> State:
        return Gathered(zeros_like(cast_to(x, dtype)), 1)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array | None]:
        mean, count = state
        count = host_int(count, "AccumGrad")
        total = max(self.n, count)  # n may have been set to less than there are already
        mean = dx / total if count == 1 else mean + dx / total
        if count < total:
            return Gathered(mean, count + 1), None
        return Gathered(mean, 1), mean


def gathers_otherwise(before: AbstractRule | None, after: AbstractRule | None) -> bool:
    """Whether two rules of one structure wait for different numbers of gradients."""
    return before is not after and before is not None and after is not None and _numbers(before) != _numbers(after)


def regathered(state: State, before: AbstractRule, after: AbstractRule) -> State:
    """The state for a rule that waits for other numbers of gradients: what was gathered takes the new weight."""
    return _rescaled(state, zip(_numbers(before), _numbers(after), strict=True))


def _numbers(rule: AbstractRule) -> list[int]:
    return [inner.n for inner in walk(rule) if isinstance(inner, AccumGrad)]


def _rescaled(state: State, numbers: Iterator[tuple[int, int]]) -> State:
    if isinstance(state, Gathered):
        old, new = (max(n, host_int(state.count, "AccumGrad")) for n in next(numbers))
        return state if old == new or state.count == 1 else Gathered(state.mean * (old / new), state.count)
    if isinstance(state, dict):
        return {key: _rescaled(value, numbers) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        items = [_rescaled(item, numbers) for item in state]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return state
