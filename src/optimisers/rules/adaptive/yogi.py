"""Yogi: Zaheer et al. 2018, algorithm 2, https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, full_like, sign, sqrt
from .._base import AbstractRule, State
from .._fields import NON_NEGATIVE, bounded


@dataclass(frozen=True)
class Yogi(AbstractRule):
    """Adam whose running square moves by an amount that does not grow with the square itself, so that it falls slowly.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        epsilon: added to the root, >= 0.
        start: what mean and square start from, >= 0. The paper's square starts from a first batch.
        debias: correct both for their start as Adam does. The paper does not.

    State: ``(m, v, (b1**t, b2**t))``; m and v have x's shape.
    """

    eta: Any = 0.01
    beta: tuple[Any, Any] = (0.9, 0.999)
    epsilon: Any = 1e-3
    start: Any = bounded(1e-6, range=NON_NEGATIVE)
    debias: bool = True

    law = "elementwise"
    structural = ("start",)

    def init(self, x: Array) -> State:
        return full_like(x, self.start), full_like(x, self.start, real=True), self.beta

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, (b1t, b2t) = state
        b1, b2 = self.beta
        square = abs2(dx)
        m = b1 * m + (1 - b1) * dx
        v = v - (1 - b2) * sign(v - square) * square
        rate, root = (self.eta / (1 - b1t), 1 / sqrt(1 - b2t)) if self.debias else (self.eta, 1.0)
        return (m, v, (b1t * b1, b2t * b2)), rate * m / (root * sqrt(v) + self.epsilon)
