"""AdEMAMix: Pagliardini, Ablin & Grangier 2024, algorithm 1, https://arxiv.org/abs/2409.03137."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, exp, log, maximum, minimum, sqrt, where, zeros_like
from .._base import AbstractRule, State
from .._fields import NON_NEGATIVE, bounded


@dataclass(frozen=True)
class AdEMAMix(AbstractRule):
    """AdamW whose mean is joined by a second, much slower one, alpha times.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean, of the running square, and of the slow mean, in [0, 1).
        lambda_: weight decay, times eta, >= 0.
        epsilon: added to the root, >= 0.
        alpha: weight of the slow mean, >= 0.
        warmup: steps over which alpha grows from 0 and the slow decay from ``beta[0]``, its half-life by the same amount every
            step, >= 0. The paper takes the whole training; 0 begins with their final values.

    State: ``(m, v, slow, (b1**t, b2**t), t)``; m, v and slow have x's shape. The slow mean is not corrected for its start at
    zero.
    """

    eta: Any = 0.001
    beta: tuple[Any, Any, Any] = (0.9, 0.999, 0.9999)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    alpha: Any = bounded(5.0, range=NON_NEGATIVE)
    warmup: Any = bounded(0.0, range=NON_NEGATIVE)

    law = "elementwise"

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True), zeros_like(x), self.beta[:2], 1.0

    def decay_factor(self, state: State) -> Any:
        return self.eta * self.lambda_

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, slow, (b1t, b2t), t = state
        b1, b2, b3 = self.beta
        alpha, b3 = self._warmed(t, b1, b3)
        m = b1 * m + (1 - b1) * dx
        v = b2 * v + (1 - b2) * abs2(dx)
        slow = b3 * slow + (1 - b3) * dx
        mixed = 1 / (1 - b1t) * m + alpha * slow
        step = self.eta * mixed / (1 / sqrt(1 - b2t) * sqrt(v) + self.epsilon)
        return (m, v, slow, (b1t * b1, b2t * b2), t + 1), step + self.decay_factor(state) * x

    def _warmed(self, t: Any, b1: Any, b3: Any) -> tuple[Any, Any]:
        """The weight and the decay of the slow mean at step t."""
        done = minimum(t / maximum(self.warmup, 1e-300), 1.0)
        life = (1 - done) / log(maximum(b1, 1e-300)) + done / log(maximum(b3, 1e-300))
        return done * self.alpha, where(done < 1, exp(1 / life), b3)
