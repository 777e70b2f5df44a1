"""LARS: You, Gitman & Ginsburg 2017, algorithm 1, https://arxiv.org/abs/1708.03888."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, norm, scalar_like, where, zeros_like
from .._base import MeasuredRule, State
from .._fields import NON_NEGATIVE, bounded


@dataclass(frozen=True)
class Lars(MeasuredRule):
    """Momentum whose gradient is given, for each array, a length in proportion to the array's own: for large batches.

    Args:
        eta: learning rate, >= 0.
        rho: momentum, in [0, 1).
        lambda_: weight decay, part of what is scaled, >= 0.
        coefficient: of the proportion, >= 0.
        epsilon: added to the length of the gradient, >= 0.
        joint: True measures gradient and decay together, ``norm(g + lambda_ x)``, False adds their lengths, as the paper does.

    State: the momentum, of x's shape. Where the array or its gradient is zero, nothing is scaled.
    """

    eta: Any = 0.01
    rho: Any = 0.9
    lambda_: Any = 0.0
    coefficient: Any = bounded(0.001, range=NON_NEGATIVE)
    epsilon: Any = 0.0
    joint: bool = False

    def init(self, x: Array) -> State:
        return zeros_like(x)

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        own = norm(x)
        return own, norm(dx + self.lambda_ * x) if self.joint else norm(dx) + self.lambda_ * own

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        own, length = measure
        some = (own > 0) & (length > 0)
        ratio = where(some, self.coefficient * own / (where(some, length, 1.0) + self.epsilon), 1.0)
        m = self.rho * state + (dx + self.lambda_ * x) * scalar_like(self.eta * ratio, dx)
        return m, m
