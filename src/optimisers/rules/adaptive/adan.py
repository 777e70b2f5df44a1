"""Adan: Xie et al. 2022, algorithm 1, https://arxiv.org/abs/2208.06677."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class Adan(AbstractRule):
    """Adam with Nesterov momentum, from running means of the gradients and of their differences.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the mean of gradients, of the mean of differences, and of the running square, in [0, 1). The paper
            writes 1 - beta.
        lambda_: weight decay, >= 0.
        epsilon: added to the root, >= 0.
        proximal: True divides by ``1 + eta * lambda_`` after the step, as the paper does; False adds ``eta * lambda_ * x`` to
            the step, as AdamW does.

    State: ``(m, d, n, last, (b1**t, b2**t, b3**t), seen)``: means of gradients and differences, running square, the last
    gradient, all of x's shape; seen is 0 before the first step, which has no difference, and 1 after it.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any, Any] = (0.98, 0.92, 0.99)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    proximal: bool = True

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x), zeros_like(x, real=True), zeros_like(x), self.beta, 0.0

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, d, n, last, (b1t, b2t, b3t), seen = state
        b1, b2, b3 = self.beta
        difference = seen * (dx - last)
        m = b1 * m + (1 - b1) * dx
        d = b2 * d + (1 - b2) * difference
        n = b3 * n + (1 - b3) * abs2(dx + b2 * difference)
        ahead = self.eta / (1 - b1t) * m + self.eta * b2 / (1 - b2t) * d
        step = ahead / (1 / sqrt(1 - b3t) * sqrt(n) + self.epsilon) + self.eta * self.lambda_ * x
        if self.proximal:
            step = 1 / (1 + self.eta * self.lambda_) * step
        return (m, d, n, 1.0 * dx, (b1t * b1, b2t * b2, b3t * b3), 1.0), step
