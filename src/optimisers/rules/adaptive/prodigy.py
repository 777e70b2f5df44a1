"""Prodigy: Mishchenko & Defazio 2023, algorithm 4 (Adam), https://arxiv.org/abs/2306.06101."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, absolute, as_array, maximum, scalar_like, sqrt, stack, where, zero_norm, zeros_like
from .._base import MeasuredRule, State
from .._fields import NON_NEGATIVE, Interval, bounded
from .._norm import latest


@dataclass(frozen=True)
class Prodigy(MeasuredRule):
    """AdamW that finds its own learning rate, from how far gradients have carried all arrays of its group together.

    Args:
        eta: factor on the learning rate that is found, >= 0: leave it at 1, and schedule it.
        beta: decays of the running mean and of the running square, in [0, 1).
        lambda_: weight decay, times the learning rate, >= 0.
        epsilon: added to the root, times the estimate, >= 0.
        d0: first estimate of the distance to the solution, > 0, small.
        coefficient: factor on the estimate, >= 0: below 1 for caution.
        debias: correct the learning rate for the start of the moments as Adam does.
        safeguard: keep the learning rate out of the denominator of the estimate, for long warm-ups.
        group: which arrays are measured together.

    State: ``(m, v, s, x0, (d, r, t), (b1**t, b2**t))``: m, v, s (sum of gradients) and x0 (the first value) have x's shape; the
    estimate d and its numerator r are 0-d and the same in all arrays of the group that have taken as many steps t. Complex
    arrays are refused.
    """

    eta: Any = 1.0
    beta: tuple[Any, Any] = (0.9, 0.999)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    d0: Any = bounded(1e-6, range=Interval(0, open_low=True))
    coefficient: Any = bounded(1.0, range=NON_NEGATIVE)
    debias: bool = False
    safeguard: bool = False
    group: str = ""

    real_only = True
    structural = ("d0",)

    @property
    def scope(self) -> str:
        return f"Prodigy(group={self.group!r})"

    def init(self, x: Array) -> State:
        shared = as_array(zero_norm(x) + self.d0), zero_norm(x), zero_norm(x)
        m, v, s = (zeros_like(x, wide=True) for _ in range(3))  # gradients times d, which float16 cannot hold at d0
        return m, v, s, 1 * x, shared, self.beta

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        _, _, s, x0, (d, r, t), powers = state
        along = (dx * (x0 - x)).sum()
        return d / self.d0 * self._rate(d, powers) * along, absolute(self._sum(s, dx, d, powers)).sum(), d, r, t

    def combine(self, measures: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        along, sums, ds, rs, steps = zip(*measures, strict=True)
        return stack(along).sum(), stack(sums).sum(), latest(ds, steps), latest(rs, steps), stack(steps).max()

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        m, v, s, x0, (_, _, t), powers = state
        b1, b2 = self.beta
        along, total, d, r, _ = measure
        rate, r = scalar_like(self._rate(d, powers), dx), sqrt(b2) * r + along
        grown = maximum(d, self.coefficient * r / where(total > 0, total, 1.0))
        scaled = scalar_like(d, dx) * dx
        m = b1 * m + (1 - b1) * scaled
        v = b2 * v + (1 - b2) * scaled * scaled
        s = self._sum(s, dx, d, powers)
        step = rate * m / (sqrt(v) + scalar_like(grown * self.epsilon, dx)) + self.lambda_ * rate * x
        shared = as_array(grown), as_array(r), as_array(t + 1)
        return (m, v, s, x0, shared, (powers[0] * b1, powers[1] * b2)), step

    def _rate(self, d: Array, powers: tuple[Any, Any]) -> Array:
        return d * self.eta * (sqrt(1 - powers[1]) / (1 - powers[0]) if self.debias else 1.0)

    def _sum(self, s: Array, dx: Array, d: Array, powers: tuple[Any, Any]) -> Array:
        weight = d / self.d0 * (d if self.safeguard else self._rate(d, powers))
        return sqrt(self.beta[1]) * s + scalar_like(weight, dx) * dx
