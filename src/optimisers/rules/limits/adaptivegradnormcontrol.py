"""A cap on the gradient norm by its own running mean and deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, element_count, maximum, scalar_like, sqrt, where, zero_norm
from .._base import State
from .._norm import NormRule


@dataclass(frozen=True)
class AdaptiveGradNormControl(NormRule):
    """Scales a gradient down to ``mean + tau * deviation`` of the norms let through so far, where its norm is larger.

    Args:
        tau: deviations above the mean, > 0.
        epsilon: added to the norm in the denominator, >= 0.
        lb: norms below ``lb * sqrt(number of elements)`` are never scaled, >= 0.
        momentum: decay of mean and deviation, in [0, 1).
        throw: raise NonFiniteError, naming the parameter, if the norm is infinite or NaN.

    State: (mean, deviation, (sum of norms before, sum of norms after)), all 0-d. Complex arrays are refused.
    """

    tau: Any = 1.0
    epsilon: Any = 1e-8
    lb: Any = 0.1
    momentum: Any = 0.9
    throw: bool = True

    real_only = True

    def init(self, x: Array) -> State:
        return zero_norm(x), zero_norm(x), (zero_norm(x), zero_norm(x))

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        mean, deviation, (before, after) = state
        (length,) = measure
        small = length < self.lb * element_count(x) ** 0.5
        first = ~small & (mean == 0)  # nothing is known yet: the first norm is mean and deviation
        limit = mean + self.tau * deviation
        factor = where(~small & ~first & (length > limit), limit / (length + self.epsilon), 1.0)
        through = length * factor
        new_mean = self.momentum * mean + (1 - self.momentum) * through
        square = self.momentum * (deviation * deviation + mean * mean) + (1 - self.momentum) * through * through
        new_deviation = sqrt(maximum(square - new_mean * new_mean, 1e-8))
        stats = where(first, length, new_mean), where(first, length, new_deviation)
        return (*stats, (before + length, after + through)), dx * scalar_like(factor, dx)
