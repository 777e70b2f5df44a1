"""ADOPT: Taniguchi et al. 2024, algorithm 2 with the clipping of its official code, https://arxiv.org/abs/2411.02853."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, clip, maximum, minimum, sqrt, zeros_like
from .._base import AbstractRule, State
from .._fields import EXPONENT, Interval, bounded


@dataclass(frozen=True)
class Adopt(AbstractRule):
    """Adam that converges for every beta: the gradient is divided by the root of the square before it, and then averaged.

    The first gradient only starts the running square, and takes no step. After t gradients, elements of the divided gradient
    are limited to ``(t + slack) ** power``.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        lambda_: weight decay, times eta, >= 0.
        epsilon: least root that is divided by, > 0 to be of use.
        power: how fast the limit grows, in [0, 16].
        slack: see there, >= 0. With inf nothing is limited, as in the paper's first version.

    State: (m, v, t); m and v have x's shape, t is the number of steps taken. Complex arrays are refused.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.9999)
    lambda_: Any = 0.0
    epsilon: Any = 1e-6
    power: Any = bounded(0.25, range=EXPONENT)
    slack: Any = bounded(0.0, range=Interval(0, finite=False))

    law = "elementwise"
    real_only = True

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, wide=True), 0.0

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, t = state
        b1, b2 = self.beta
        begun, limit = minimum(t, 1.0), (t + self.slack) ** self.power  # begun is 0 at the first gradient, then 1
        m = b1 * m + (1 - b1) * begun * clip(dx / maximum(sqrt(v), self.epsilon), -limit, limit)
        v = begun * b2 * v + (1 - begun * b2) * dx * dx
        return (m, v, t + 1), self.eta * m + begun * self.eta * self.lambda_ * x
