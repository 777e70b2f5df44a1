"""AdaMax: Kingma & Ba 2015, algorithm 2, https://arxiv.org/abs/1412.6980."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, absolute, maximum, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class AdaMax(AbstractRule):
    """Adam with a decaying maximum in the place of the root mean square.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the maximum, in [0, 1).
        epsilon: added to the maximum, >= 0.

    State: ``(m, u, (b1**t, b2**t))``; m and u have x's shape. Complex arrays are refused.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.999)
    epsilon: Any = 1e-8

    law = "elementwise"
    real_only = True

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x), self.beta

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, u, (b1t, b2t) = state
        b1, b2 = self.beta
        m = b1 * m + (1 - b1) * dx
        u = maximum(b2 * u, absolute(dx))
        return (m, u, (b1t * b1, b2t * b2)), self.eta / (1 - b1t) * m / (u + self.epsilon)
