"""Heavy-ball momentum: Polyak 1964; the learning rate multiplies the gradient as it enters the momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class Momentum(AbstractRule):
    """Gradient descent with heavy-ball momentum: ``m <- rho * m + eta * dx``, ``x <- x - m``.

    Args:
        eta: learning rate, >= 0. A change of eta acts on later gradients, not on the momentum gathered so far.
        rho: momentum, in [0, 1).

    State: m, of x's shape.
    """

    eta: Any = 0.01
    rho: Any = 0.9

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m = self.rho * state + self.eta * dx
        return m, m
