"""L1 regularisation as a member of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, sign
from .._base import AbstractRule, State


@dataclass(frozen=True)
class SignDecay(AbstractRule):
    """Adds ``lambda_ * sign(x)`` to what comes: before a rule, L1 regularisation.

    Args:
        lambda_: strength, >= 0.

    State: None.
    """

    lambda_: Any = 1e-3

    law = "elementwise"

    def init(self, x: Array) -> State:
        return None

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        return state, dx + self.lambda_ * sign(x)
