"""Gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from ...arrays import Array, host_int, zeros_like
from .._base import AbstractRule, State
from .._fields import Interval, bounded


@dataclass(frozen=True)
class AccumGrad(AbstractRule):
    """Gathers the mean of n gradients; the members of the chain behind it run, and the parameter moves, every n-th time.

    Args:
        n: number of gradients to a step, >= 1.

    State: (mean so far, of x's shape; number of the coming gradient, 1 to n). On the steps between, ``apply`` returns no
    step, and later members of the chain keep their state. The number is read on the host, so AccumGrad does not work
    inside torch.func.vmap and torch.compile.
    """

    n: int = bounded(range=Interval(1, integer=True))

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), 1

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array | None]:
        mean, count = state
        count = host_int(count, "AccumGrad")
        mean = dx / self.n if count == 1 else mean + dx / self.n
        if count < self.n:
            return (mean, count + 1), None
        return (mean, 1), mean
