"""Clipping by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, clip
from .._base import AbstractRule, State


@dataclass(frozen=True)
class ClipGrad(AbstractRule):
    """Limits every element of the gradient to [-delta, delta].

    Args:
        delta: bound, > 0.

    State: None. Complex arrays are refused.
    """

    delta: Any = 10.0

    law = "elementwise"
    real_only = True

    def init(self, x: Array) -> State:
        return None

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        return state, clip(dx, -self.delta, self.delta)
