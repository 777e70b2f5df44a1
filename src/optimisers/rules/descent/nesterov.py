"""Nesterov momentum: Nesterov 1983, in the form of Bengio, Boulanger-Lewandowski & Pascanu 2012, https://arxiv.org/abs/1212.0901."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class Nesterov(AbstractRule):
    """Gradient descent with Nesterov momentum, stepping the look-ahead parameter.

    ``v' = rho * v - eta * dx``, ``x <- x + rho * v' - eta * dx``.

    Args:
        eta: learning rate, >= 0.
        rho: momentum, in [0, 1).

    State: v, of x's shape.
    """

    eta: Any = 0.001
    rho: Any = 0.9

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        v = self.rho * state - self.eta * dx
        return v, self.eta * dx - self.rho * v
