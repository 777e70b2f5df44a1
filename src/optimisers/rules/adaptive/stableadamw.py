"""StableAdamW: Wortsman et al. 2023, algorithm 2, https://arxiv.org/abs/2304.13013."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, element_count, maximum, scalar_like, sqrt, zeros_like
from .._base import MeasuredRule, State


@dataclass(frozen=True)
class StableAdamW(MeasuredRule):
    """AdamW whose learning rate falls for an array in a step in which gradients are larger than their running square says.

    It is divided by the root mean square of ``g / sqrt(v^)`` where that is above 1, decay included.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        lambda_: weight decay, times eta, >= 0.
        epsilon: added to the root, and the least root in the measure, >= 0.

    State: ``(m, v, (b1**t, b2**t))``, as Adam's.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.99)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), self.beta

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        _, v, (_, b2t) = state
        square = 1 / (1 - b2t) * self._square(v, dx)
        return ((abs2(dx) / maximum(square, maximum(self.epsilon * self.epsilon, 1e-30))).sum() / maximum(element_count(x), 1),)

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        m, v, (b1t, b2t) = state
        b1, b2 = self.beta
        m, v = b1 * m + (1 - b1) * dx, self._square(v, dx)
        step = 1 / (1 - b1t) * m / (1 / sqrt(1 - b2t) * sqrt(v) + self.epsilon) + self.lambda_ * x
        return (m, v, (b1t * b1, b2t * b2)), step * scalar_like(self.eta / maximum(sqrt(measure[0]), 1.0), dx)

    def _square(self, v: Array, dx: Array) -> Array:
        return self.beta[1] * v + (1 - self.beta[1]) * abs2(dx)
