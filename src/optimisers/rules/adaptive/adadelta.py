"""AdaDelta: Zeiler 2012, algorithm 1, https://arxiv.org/abs/1212.5701."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class AdaDelta(AbstractRule):
    """Steps in the parameter's own units: the running size of steps over the running size of gradients.

    Args:
        rho: decay of both running averages, in [0, 1).
        epsilon: added under both roots, >= 0; it also sets the size of the first steps.

    State: ``(mean of abs(dx)**2, mean of abs(step)**2)``, of x's shape. There is no learning rate.
    """

    rho: Any = 0.9
    epsilon: Any = 1e-8

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x, real=True), zeros_like(x, real=True)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        square, moved = state
        square = self.rho * square + (1 - self.rho) * abs2(dx)
        step = sqrt(moved + self.epsilon) / sqrt(square + self.epsilon) * dx
        moved = self.rho * moved + (1 - self.rho) * abs2(step)
        return (square, moved), step
