"""CAME: Luo et al. 2023, algorithm 2, https://arxiv.org/abs/2307.02047."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, maximum, sqrt, zeros_like
from .. import _factored
from .._base import AbstractRule, State
from .._fields import NON_NEGATIVE, bounded


@dataclass(frozen=True)
class Came(AbstractRule):
    """Adafactor with momentum, divided by how far steps have been from it: what has been steady moves further.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean, of the running square, and of the squared distance, in [0, 1).
        lambda_: weight decay, times eta, >= 0.
        epsilon: added to squared gradients, >= 0.
        tau: greatest root mean square of a step, > 0.
        floor: added to squared distances, >= 0.

    State: (m, squares, distances): m has x's shape, the others are (row means, column means) as those of `Adafactor`. Arrays of
    fewer than two dimensions have v in the place of squares, and None for distances: they are stepped by m.
    """

    eta: Any = 2e-4
    beta: tuple[Any, Any, Any] = (0.9, 0.999, 0.9999)
    lambda_: Any = 0.0
    epsilon: Any = 1e-30
    tau: Any = 1.0
    floor: Any = bounded(1e-16, range=NON_NEGATIVE)
    _stack: int = dataclasses.field(default=0, repr=False)

    law = "stackable"
    structural = ("_stack",)

    def stacked(self) -> Came:
        return self.replace(_stack=self._stack + 1)

    def init(self, x: Array) -> State:
        squares = _factored.start(x, self._stack)
        return zeros_like(x), squares, _factored.start(x, self._stack) if isinstance(squares, tuple) else None

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, squares, distances = state
        b1, b2, b3 = self.beta
        squares = _factored.moved(squares, abs2(dx) + self.epsilon, 1 - b2)
        u = dx / sqrt(_factored.whole(squares))
        rms = sqrt(_factored.mean_over(abs2(u), range(self._stack, x.ndim)))
        u = u / maximum(rms / self.tau, 1.0)
        m = b1 * m + (1 - b1) * u
        step = m
        if distances is not None:
            distances = _factored.moved(distances, abs2(u - m) + self.floor, 1 - b3)
            step = m / sqrt(_factored.whole(distances))
        return (m, squares, distances), self.eta * step + self.eta * self.lambda_ * x
