"""Optimistic Adam: Daskalakis et al. 2018, algorithm 1, https://arxiv.org/abs/1711.00141."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class OAdam(AbstractRule):
    """Adam for games: twice the present Adam step, less the last one.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        epsilon: added to the root, >= 0.

    State: ``(m, v, (b1**t, b2**t), last Adam step)``; all but the powers have x's shape.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.5, 0.9)
    epsilon: Any = 1e-8

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), self.beta, zeros_like(x)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, (b1t, b2t), last = state
        b1, b2 = self.beta
        m = b1 * m + (1 - b1) * dx
        v = b2 * v + (1 - b2) * abs2(dx)
        rate, root = self.eta / (1 - b1t), 1 / sqrt(1 - b2t)
        step = rate * m / (root * sqrt(v) + self.epsilon)
        return (m, v, (b1t * b1, b2t * b2), step), 2 * step - last
