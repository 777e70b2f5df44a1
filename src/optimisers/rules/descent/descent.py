"""Gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array
from .._base import AbstractRule, State


@dataclass(frozen=True)
class Descent(AbstractRule):
    """Gradient descent: ``x <- x - eta * dx``.

    Args:
        eta: learning rate, >= 0.

    State: None.
    """

    eta: Any = 0.1

    law = "elementwise"

    def init(self, x: Array) -> State:
        return None

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        return state, self.eta * dx
