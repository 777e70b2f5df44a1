"""NovoGrad: Ginsburg et al. 2019, algorithm 1, https://arxiv.org/abs/1905.11286."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, norm, scalar_like, sqrt, zero_norm, zeros_like
from .._base import MeasuredRule, State


@dataclass(frozen=True)
class NovoGrad(MeasuredRule):
    """Momentum over gradients divided by the running norm of the whole array: one second moment an array.

    Args:
        eta: learning rate, >= 0.
        beta: decay of the momentum, and of the running squared norm, in [0, 1).
        lambda_: weight decay, which passes through the momentum, >= 0.
        epsilon: added to the norm, >= 0.

    State: (m, v, seen): m has x's shape, v is 0-d and begins with the first squared norm; seen is 0 before it and 1 after.
    """

    eta: Any = 0.01
    beta: tuple[Any, Any] = (0.95, 0.98)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8

    def init(self, x: Array) -> State:
        return zeros_like(x), zero_norm(x), 0.0

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return (norm(dx),)

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        m, v, seen = state
        b1, b2 = self.beta
        (length,) = measure
        v = seen * b2 * v + (1 - seen * b2) * length * length
        m = b1 * m + dx * scalar_like(1 / (sqrt(v) + self.epsilon), dx) + self.lambda_ * x
        return (m, v, 1.0), self.eta * m
