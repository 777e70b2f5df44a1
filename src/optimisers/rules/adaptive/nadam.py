"""Nesterov-accelerated Adam: Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class NAdam(AbstractRule):
    """Adam whose mean looks one step ahead, with a constant momentum (no momentum schedule).

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        epsilon: added to the root, >= 0.

    State: ``(m, v, (b1**t, b2**t))``, as Adam's.
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
        ahead, now = self.eta * b1 / (1 - b1 * b1t), self.eta * (1 - b1) / (1 - b1t)
        root = sqrt(b2 / (1 - b2t))
        return (m, v, (b1t * b1, b2t * b2)), (ahead * m + now * dx) / (root * sqrt(v) + self.epsilon)
