"""A cap on the growth of the gradient norm that keeps account of what it did; the limiter is that of NormGrowthCap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, scalar_like, zero_norm
from .._base import State
from .._norm import NormRule
from .normgrowthcap import growth_factor


@dataclass(frozen=True)
class GradNormControl(NormRule):
    """NormGrowthCap with running sums of the norms before and after, to see how much is taken away.

    Args:
        tau: as in `NormGrowthCap`.
        epsilon: as in `NormGrowthCap`.
        lb: as in `NormGrowthCap`.
        throw: as in `NormGrowthCap`.
        scale: as in `NormGrowthCap`.

    State: (norm let through last, (sum of norms before, sum of norms after)), all 0-d. Complex arrays are refused.
    """

    tau: Any = 1.1
    epsilon: Any = 1e-8
    lb: Any = 0.1
    throw: bool = True
    scale: bool = True

    real_only = True

    def init(self, x: Array) -> State:
        return zero_norm(x), (zero_norm(x), zero_norm(x))

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        last, (before, after) = state
        (length,) = measure
        factor = growth_factor(self, last, length, x)
        through = length * factor
        return (through, (before + length, after + through)), dx * scalar_like(factor, dx)
