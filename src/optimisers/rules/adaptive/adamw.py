"""AdamW: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, zeros_like
from .._base import AbstractRule, State


@dataclass(frozen=True)
class AdamW(AbstractRule):
    """Adam with weight decay that does not pass through the running averages.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        lambda_: weight decay, >= 0.
        epsilon: added to the root, >= 0.
        couple: True multiplies the decay by eta, ``x <- x - eta * (adam + lambda_ * x)``, as torch.optim.AdamW does; False
            leaves it, ``x <- x - eta * adam - lambda_ * x``, as the paper's decoupled form with a constant schedule.

    State: ``(m, v, (b1**t, b2**t))``, as Adam's.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.999)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    couple: bool = True

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), self.beta

    def decay_factor(self, state: State) -> Any:
        return self.eta * self.lambda_ if self.couple else self.lambda_

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        state, bare, decay, _ = self.split(state, x, dx)
        return state, bare + decay

    def split(self, state: State, x: Array, dx: Array) -> tuple[State, Array, Array, Array]:
        m, v, (b1t, b2t) = state
        b1, b2 = self.beta
        m = b1 * m + (1 - b1) * dx
        v = b2 * v + (1 - b2) * abs2(dx)
        rate, root = self.eta / (1 - b1t), 1 / sqrt(1 - b2t)
        return (m, v, (b1t * b1, b2t * b2)), rate * m / (root * sqrt(v) + self.epsilon), self.decay_factor(state) * x, m
