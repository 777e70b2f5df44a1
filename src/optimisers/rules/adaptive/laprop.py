"""LaProp: Ziyin, Wang & Ueda 2020, algorithm 1, https://arxiv.org/abs/2002.04839."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class LaProp(AbstractRule):
    """Adam with mean and division exchanged: each gradient is divided by the root of the running square, then averaged.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        lambda_: weight decay, times eta, >= 0.
        epsilon: added to the root, >= 0.

    State: ``(m, v, (b1**t, b2**t))``; m and v have x's shape.
    """

    eta: Any = 4e-4
    beta: tuple[Any, Any] = (0.9, 0.999)
    lambda_: Any = 0.0
    epsilon: Any = 1e-15

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), self.beta

    def decay_factor(self, state: State) -> Any:
        return self.eta * self.lambda_

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, (b1t, b2t) = state
        b1, b2 = self.beta
        v = b2 * v + (1 - b2) * abs2(dx)
        m = b1 * m + (1 - b1) * dx / (1 / sqrt(1 - b2t) * sqrt(v) + self.epsilon)
        return (m, v, (b1t * b1, b2t * b2)), self.eta / (1 - b1t) * m + self.decay_factor(state) * x
