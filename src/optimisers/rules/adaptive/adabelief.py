"""AdaBelief: Zhuang et al. 2020, algorithm 2, https://arxiv.org/abs/2010.07468."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class AdaBelief(AbstractRule):
    """Adam that divides by the root of the running squared distance between gradient and mean.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        epsilon: added to the squared distance at every step, and to the root, >= 0.

    State: ``(m, s, (b1**t, b2**t))``; m and s have x's shape.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.999)
    epsilon: Any = 1e-16

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), self.beta

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, s, (b1t, b2t) = state
        b1, b2 = self.beta
        m = b1 * m + (1 - b1) * dx
        s = b2 * s + (1 - b2) * abs2(dx - m) + self.epsilon
        rate, root = self.eta / (1 - b1t), 1 / sqrt(1 - b2t)
        return (m, s, (b1t * b1, b2t * b2)), rate * m / (root * sqrt(s) + self.epsilon)
