"""Lookahead: Zhang et al. 2019, algorithm 1, https://arxiv.org/abs/1907.08610."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, cast_to, dtype_name, where
from .._base import AbstractRule, Assign, Stages, State, stages_of, stepped
from .._fields import Interval, bounded
from .._wrapper import Wrapper
from .averaged import as_start


@dataclass(frozen=True)
class Lookahead(Wrapper):
    """Steps as the rule inside does; every k-th time slow weights go a part of the way, and the array is set back to them.

    Args:
        rule: what makes the steps. Its state is not touched when the array is set back.
        k: steps between, >= 1.
        alpha: the part of the way, in [0, 1].

    State: (slow weights, steps since the array was at them, state of the rule); the slow weights have x's shape and the dtype
    of moments, but float32 for half precision. In a chain it must be the last member.
    """

    rule: AbstractRule
    k: int = bounded(5, range=Interval(1, integer=True))
    alpha: Any = bounded(0.5, range=Interval(0, 1))

    final = True

    def start(self, x: Array, inner: State) -> State:
        return as_start(x), 0, inner

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        slow, count, inner = state
        inner, step = yield from stages_of(self.rule, inner, x, dx)
        if step is None:
            return (slow, count, inner), None
        new = stepped(x, step)
        back = count + 1 >= self.k
        met = slow + self.alpha * (cast_to(new, dtype_name(slow)) - slow)
        slow = where(back, met, slow)
        return (slow, where(back, 0, count + 1), inner), Assign(where(back, cast_to(slow, dtype_name(new)), new))
