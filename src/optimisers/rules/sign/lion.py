"""Lion: Chen et al. 2023, algorithm 2, https://arxiv.org/abs/2302.06675."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, sign, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class Lion(AbstractRule):
    """The sign of a mixture of momentum and gradient: ``x <- x - eta * sign(b1 * m + (1 - b1) * dx)``.

    Args:
        eta: learning rate, >= 0; every element moves by just this much.
        beta: (share of the momentum in the mixture, decay of the momentum), in [0, 1): ``m <- b2 * m + (1 - b2) * dx``.

    State: m, of x's shape.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.99)

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        b1, b2 = self.beta
        step = self.eta * sign(b1 * state + (1 - b1) * dx)
        return b2 * state + (1 - b2) * dx, step
