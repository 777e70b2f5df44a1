"""LAMB: You et al. 2019, algorithm 2, https://arxiv.org/abs/1904.00962."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, norm, scalar_like, sqrt, where, zeros_like
from .._base import MeasuredRule, State


@dataclass(frozen=True)
class Lamb(MeasuredRule):
    """AdamW whose step has, for each array, the length of the array itself, times the learning rate: for large batches.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        lambda_: weight decay, part of what is scaled, >= 0.
        epsilon: added to the root, >= 0.

    State: ``(m, v, (b1**t, b2**t))``, as Adam's. Where the array or the step is zero, the step is Adam's.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.999)
    lambda_: Any = 0.0
    epsilon: Any = 1e-6

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), self.beta

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return norm(x), norm(self._step(state, x, dx)[1])

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        own, length = measure
        ratio = where((own > 0) & (length > 0), own / where(length > 0, length, 1.0), 1.0)
        state, step = self._step(state, x, dx)
        return state, step * scalar_like(self.eta * ratio, dx)

    def _step(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, (b1t, b2t) = state
        b1, b2 = self.beta
        m = b1 * m + (1 - b1) * dx
        v = b2 * v + (1 - b2) * abs2(dx)
        step = 1 / (1 - b1t) * m / (1 / sqrt(1 - b2t) * sqrt(v) + self.epsilon) + self.lambda_ * x
        return (m, v, (b1t * b1, b2t * b2)), step
