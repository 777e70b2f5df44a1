"""A cap on the growth of the gradient norm: the norm-growth limiter of Chen et al. 2024 (Fira), https://arxiv.org/abs/2410.01623."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, element_count, scalar_like, where, zero_norm
from .._base import State
from .._norm import NormRule


@dataclass(frozen=True)
class NormGrowthCap(NormRule):
    """Lets the norm of an array's gradient grow by a factor tau at most from one step to the next.

    APOLLO (Zhu et al. 2024, https://arxiv.org/abs/2412.05270) uses it with tau 1.01, on the scaled gradient.

    Args:
        tau: greatest growth, > 0.
        epsilon: added to the norms in the denominators, >= 0.
        lb: norms below it are never scaled, so that no array is trapped near zero, >= 0.
        throw: raise NonFiniteError, naming the parameter, if the norm is infinite or NaN.
        scale: multiply lb by the square root of the number of elements.

    State: the norm that was let through last, 0-d. Complex arrays are refused.
    """

    tau: Any = 1.01
    epsilon: Any = 1e-8
    lb: Any = 1e-7
    throw: bool = True
    scale: bool = True

    real_only = True

    def init(self, x: Array) -> State:
        return zero_norm(x)

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        (length,) = measure
        factor = growth_factor(self, state, length, x)
        return length * factor, dx * scalar_like(factor, dx)


def growth_factor(rule: Any, last: Array, length: Array, x: Array) -> Array:
    """What a gradient of this norm is multiplied by, if the last one had the norm ``last`` (0: there was none)."""
    floor = rule.lb * element_count(x) ** 0.5 if rule.scale else rule.lb
    grown = (last != 0) & ~(length < floor) & (length / (last + rule.epsilon) > rule.tau)
    return where(grown, rule.tau * last / (length + rule.epsilon), 1.0)
