"""L2 regularisation as a member of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array
from .._base import AbstractRule, State


@dataclass(frozen=True)
class WeightDecay(AbstractRule):
    """Adds ``lambda_ * x`` to what comes: before a rule, L2 regularisation; after one that ends in a step, plain decay.

    Args:
        lambda_: strength, >= 0.

    State: None.
    """

    lambda_: Any = 5e-4

    law = "elementwise"

    def init(self, x: Array) -> State:
        return None

    def decay_factor(self, state: State) -> Any:
        return self.lambda_

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        return state, dx + self.lambda_ * x
