"""GrokFast: Lee et al. 2024, algorithm 2 (EMA), https://arxiv.org/abs/2405.20233."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, zeros_like
from .._base import AbstractRule, State
from .._fields import Interval, bounded


@dataclass(frozen=True)
class GrokFast(AbstractRule):
    """Adds a multiple of the gradient's running mean to it, so that what changes slowly counts for more.

    ``m <- alpha m + (1 - alpha) dx``, from the first gradient on; then ``dx + lambda_ m`` goes on. With lambda_ 2 that is three
    times a constant gradient, for which the learning rate may have to be lower.

    Args:
        alpha: decay of the running mean, in [0, 1).
        lambda_: how much of it is added, >= 0.

    State: (m, 1.0 before the first gradient, else 0.0); m has x's shape.
    """

    alpha: Any = bounded(0.98, range=Interval(0, 1, open_high=True))
    lambda_: Any = 2.0

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), 1.0

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, first = state
        m = (1 - first) * self.alpha * m + (1 - self.alpha + first * self.alpha) * dx
        return (m, 0.0 * first), dx + self.lambda_ * m
