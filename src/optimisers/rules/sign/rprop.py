"""Rprop, the variant without backtracking: Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, full_like, maximum, minimum, sign, where, zeros_like
from .._base import AbstractRule, State
from .._fields import Ordered, bounded


@dataclass(frozen=True)
class Rprop(AbstractRule):
    """Full-batch learning from the gradient's sign, with a step size for every element.

    Args:
        eta: first step size, >= 0. It acts at setup only, so ``adjust`` cannot change it.
        ell: factors (down, up) for a changed and a kept sign, 0 < down < 1 < up.
        gamma: least and greatest step size, 0 < low < high.

    State: (last gradient, step sizes), of x's shape. Complex arrays are refused.
    """

    eta: Any = 1e-3
    ell: tuple[Any, Any] = bounded((0.5, 1.2), range=Ordered(around_one=True))
    gamma: tuple[Any, Any] = bounded((1e-6, 50.0), range=Ordered())

    law = "elementwise"
    real_only = True
    structural = ("eta",)

    def init(self, x: Array) -> State:
        return zeros_like(x), full_like(x, self.eta)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        last, size = state
        (down, up), (low, high) = self.ell, self.gamma
        agreement = last * dx
        grown, shrunk = minimum(size * up, high), maximum(size * down, low)
        size = where(agreement > 0, grown, where(agreement < 0, shrunk, size))
        last = where(agreement < 0, zeros_like(dx), dx)  # after a change of sign the next step counts as the first
        return (last, size), size * sign(last)
