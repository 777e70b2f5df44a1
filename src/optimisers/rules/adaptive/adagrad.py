"""AdaGrad: Duchi, Hazan & Singer 2011, https://jmlr.org/papers/v12/duchi11a.html."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, full_like, sqrt
from .._base import AbstractRule, State


@dataclass(frozen=True)
class AdaGrad(AbstractRule):
    """Gradients divided by the root of the sum of all their squares so far.

    Args:
        eta: learning rate, >= 0.
        epsilon: added to the root, and the first value of the sum, >= 0.

    State: the sum of squares, of x's shape.
    """

    eta: Any = 0.1
    epsilon: Any = 1e-8

    law = "elementwise"

    def init(self, x: Array) -> State:
        return full_like(x, self.epsilon, real=True)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        total = state + abs2(dx)
        return total, self.eta * dx / (sqrt(total) + self.epsilon)
