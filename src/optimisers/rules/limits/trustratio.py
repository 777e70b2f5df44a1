"""The trust ratio of LARS and LAMB: You et al. 2017, https://arxiv.org/abs/1708.03888, and 2020, https://arxiv.org/abs/1904.00962."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, minimum, norm, scalar_like, where
from .._base import MeasuredRule, State
from .._fields import NON_NEGATIVE, POSITIVE, Interval, bounded, inf


@dataclass(frozen=True)
class TrustRatio(MeasuredRule):
    """Scales what comes to the norm of the parameter: ``dx * coefficient * norm(x) / (norm(dx) + epsilon)``.

    Where one of the norms is 0 it goes on as it is. A learning rate has effect behind it only: LAMB is
    ``OptimiserChain(Adam(1.0), WeightDecay(lambda_), TrustRatio(), Descent(eta))``.

    Args:
        coefficient: how far the parameter is trusted, > 0.
        epsilon: added to the norm of dx, >= 0.
        most: greatest norm of the parameter that counts, > 0.

    State: None.
    """

    coefficient: Any = bounded(1.0, range=POSITIVE)
    epsilon: Any = bounded(0.0, range=NON_NEGATIVE)
    most: Any = bounded(inf, range=Interval(0, open_low=True, finite=False))

    def init(self, x: Array) -> State:
        return None

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return norm(x), norm(dx)

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        size, length = measure
        usual = (size > 0) & (length > 0)
        ratio = self.coefficient * minimum(size, self.most) / where(usual, length + self.epsilon, 1.0)
        return state, dx * scalar_like(where(usual, ratio, 1.0), dx)
