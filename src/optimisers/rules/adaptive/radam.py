"""Rectified Adam: Liu et al. 2020, algorithm 2, https://arxiv.org/abs/1908.03265."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, where, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class RAdam(AbstractRule):
    """Adam whose adaptive step begins only once the variance of the running square is under control.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        epsilon: added to the root, >= 0.

    State: ``(m, v, (b1**t, b2**t), t)``; m and v have x's shape.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.999)
    epsilon: Any = 1e-8

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), self.beta, 1

    def learning_rate(self, state: State) -> Any:
        """0 until the variance is tractable, as the authors of schedule-free learning have it."""
        tractable, rectification = self._rectification(state)
        return self.eta * where(tractable, rectification, 0.0)

    def _rectification(self, state: State) -> tuple[Any, Any]:
        """(whether the variance is tractable, factor for it or 1)."""
        _, _, (_, b2t), t = state
        longest = 2 / (1 - self.beta[1]) - 1
        length = longest - 2 * t * b2t / (1 - b2t)
        tractable = length > 4
        above = where(tractable, (length - 4) * (length - 2) * longest, 1.0)
        below = where(tractable, (longest - 4) * (longest - 2) * length, 1.0)
        return tractable, sqrt(above / below)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, (b1t, b2t), t = state
        b1, b2 = self.beta
        m = b1 * m + (1 - b1) * dx
        v = b2 * v + (1 - b2) * abs2(dx)
        tractable, rectification = self._rectification(state)
        rate = self.eta / (1 - b1t) * rectification
        root = 1 / sqrt(1 - b2t)
        step = rate * m / where(tractable, root * sqrt(v) + self.epsilon, 1.0)
        return (m, v, (b1t * b1, b2t * b2), t + 1), step
