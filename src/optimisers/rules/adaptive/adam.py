"""Adam: Kingma & Ba 2015, algorithm 1, https://arxiv.org/abs/1412.6980."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class Adam(AbstractRule):
    """Gradients' running mean over the root of their running square, both corrected for their start at zero.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        epsilon: added to the root, >= 0.

    State: ``(m, v, (b1**t, b2**t))``; m and v have x's shape, v is real; t is the number of the coming step.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.999)
    epsilon: Any = 1e-8

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), self.beta

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, (b1t, b2t) = state
        b1, b2 = self.beta
        m = b1 * m + (1 - b1) * dx
        v = b2 * v + (1 - b2) * abs2(dx)
        rate, root = self.eta / (1 - b1t), 1 / sqrt(1 - b2t)  # numbers: corrected once, not at every element
        return (m, v, (b1t * b1, b2t * b2)), rate * m / (root * sqrt(v) + self.epsilon)
