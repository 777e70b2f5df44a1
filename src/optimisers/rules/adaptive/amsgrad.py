"""AMSGrad: Reddi, Kale & Kumar 2018, algorithm 2, https://openreview.net/forum?id=ryQu7f-RZ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, full_like, maximum, sqrt
from .._base import AbstractRule, State


@dataclass(frozen=True)
class AMSGrad(AbstractRule):
    """Adam with the largest running square so far in the place of the present one, and no correction of the start.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        epsilon: added to the root, and the first value of all three averages, >= 0.

    State: (m, v, largest v), of x's shape. Complex arrays are refused.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.999)
    epsilon: Any = 1e-8

    law = "elementwise"
    real_only = True

    def init(self, x: Array) -> State:
        v, largest = (full_like(x, self.epsilon, wide=True) for _ in range(2))
        return full_like(x, self.epsilon), v, largest

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, largest = state
        b1, b2 = self.beta
        m = b1 * m + (1 - b1) * dx
        v = b2 * v + (1 - b2) * abs2(dx)
        largest = maximum(largest, v)
        return (m, v, largest), self.eta * m / (sqrt(largest) + self.epsilon)
