"""Adafactor: Shazeer & Stern 2018, algorithms 4 and 5, https://arxiv.org/abs/1804.04235."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, maximum, minimum, sqrt
from .. import _factored
from .._base import AbstractRule, State
from .._fields import EXPONENT, NON_NEGATIVE, bounded


@dataclass(frozen=True)
class Adafactor(AbstractRule):
    """RMSProp in little memory: the running square of a matrix is kept as the means of its rows and columns.

    The step is divided by its root mean square where that is above tau, and may be in proportion to the array.

    Args:
        eta: learning rate, >= 0.
        lambda_: weight decay, times eta, >= 0.
        epsilon: added to squared gradients, >= 0.
        tau: greatest root mean square of what the learning rate multiplies, > 0.
        power: the decay of the running square at step t is ``1 - t**-power``, in [0, 16].
        relative: limit the learning rate at step t to ``1 / sqrt(t)``, as the paper and torch do.
        scaled: multiply it by the root mean square of the array, but at least by ``floor``.
        floor: see there, >= 0.
        proportional: True decays by the learning rate after all of this, as transformers does; False by eta.

    State: ((row means, column means), t) for arrays of two and more dimensions, whose last two axes are rows and columns, of
    length 1 where they were averaged; (v, t) for others.
    """

    eta: Any = 0.01
    lambda_: Any = 0.0
    epsilon: Any = 1e-30
    tau: Any = 1.0
    power: Any = bounded(0.8, range=EXPONENT)
    relative: bool = True
    scaled: bool = True
    floor: Any = bounded(1e-3, range=NON_NEGATIVE)
    proportional: bool = False
    _stack: int = dataclasses.field(default=0, repr=False)

    law = "stackable"
    structural = ("_stack",)

    def stacked(self) -> Adafactor:
        return self.replace(_stack=self._stack + 1)

    def init(self, x: Array) -> State:
        return _factored.start(x, self._stack), 1.0

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        squares, t = state
        squares = _factored.moved(squares, abs2(dx) + self.epsilon, t**-self.power)
        step = dx / sqrt(_factored.whole(squares))
        rate = minimum(self.eta, t**-0.5) if self.relative else self.eta
        if self.scaled:
            rate = rate * maximum(self._rms(x), self.floor)
        decay = self.lambda_ * (rate if self.proportional else self.eta)
        return (squares, t + 1), rate / maximum(self._rms(step) / self.tau, 1.0) * step + decay * x

    def _rms(self, x: Array) -> Array:
        return sqrt(_factored.mean_over(abs2(x), range(self._stack, x.ndim)))
