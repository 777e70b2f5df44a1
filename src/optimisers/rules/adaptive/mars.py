"""MARS: Yuan et al. 2024, algorithm 2 (MARS-AdamW with its approximate gradients), https://arxiv.org/abs/2411.10438."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, maximum, norm, scalar_like, sqrt, zeros_like
from .._base import MeasuredRule, State
from .._fields import NON_NEGATIVE, bounded


@dataclass(frozen=True)
class Mars(MeasuredRule):
    """AdamW over gradients whose variance is reduced by the last ones, and whose norm is limited to 1.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        lambda_: weight decay, times eta, >= 0.
        epsilon: added to the root, >= 0.
        gamma: how much of the change since the last gradient is added, times ``beta[0] / (1 - beta[0])``, >= 0.

        from_zero: let the gradient before the first be zero, as the official code does; the paper has no change at first.

    State: ``(m, v, last, (b1**t, b2**t), seen)``; m, v and last have x's shape; seen is 0 before the first gradient, then 1.
    """

    eta: Any = 3e-3
    beta: tuple[Any, Any] = (0.95, 0.99)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    gamma: Any = bounded(0.025, range=NON_NEGATIVE)
    from_zero: bool = False

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), zeros_like(x), self.beta, 0.0

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return (norm(self._corrected(state, dx)),)

    def decay_factor(self, state: State) -> Any:
        return self.eta * self.lambda_

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        m, v, _, (b1t, b2t), _ = state
        b1, b2 = self.beta
        c = self._corrected(state, dx) * scalar_like(1 / maximum(measure[0], 1.0), dx)
        m = b1 * m + (1 - b1) * c
        v = b2 * v + (1 - b2) * abs2(c)
        step = self.eta / (1 - b1t) * m / (1 / sqrt(1 - b2t) * sqrt(v) + self.epsilon)
        return (m, v, 1.0 * dx, (b1t * b1, b2t * b2), 1.0), step + self.decay_factor(state) * x

    def _corrected(self, state: State, dx: Array) -> Array:
        _, _, last, _, seen = state
        b1 = self.beta[0]
        weight = self.gamma * b1 / (1 - b1) * (1.0 if self.from_zero else seen)
        return dx + weight * (dx - last)
