"""RMSProp: Tieleman & Hinton 2012 (Coursera lecture 6.5); centred: Graves 2013, https://arxiv.org/abs/1308.0850."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, maximum, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class RMSProp(AbstractRule):
    """Gradients divided by a running root mean square; with ``centred``, by a running standard deviation.

    Args:
        eta: learning rate, >= 0.
        rho: decay of the running averages, in [0, 1).
        epsilon: added to the root, >= 0.
        centred: subtract the square of the running mean. It fixes the state, so ``adjust`` cannot change it.

    State: ``(mean of abs(dx)**2, mean of dx, or None if not centred)``, of x's shape.
    """

    eta: Any = 0.001
    rho: Any = 0.9
    epsilon: Any = 1e-8
    centred: bool = False

    law = "elementwise"
    structural = ("centred",)

    def init(self, x: Array) -> State:
        return zeros_like(x, real=True), (zeros_like(x, wide=True) if self.centred else None)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        square, mean = state
        square = self.rho * square + (1 - self.rho) * abs2(dx)
        variance = square
        if self.centred:
            mean = self.rho * mean + (1 - self.rho) * dx
            variance = maximum(square - abs2(mean), 0.0)  # rounding can leave it below zero
        return (square, mean), self.eta * dx / (sqrt(variance) + self.epsilon)
