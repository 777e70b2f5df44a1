"""Schedule-free learning: Defazio et al. 2024, https://arxiv.org/abs/2405.15682."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ...arrays import Array, cast_to, dtype_name, where
from .._base import AbstractRule, Stages, State, stages_of
from .._fields import EXPONENT, Interval, bounded
from .._wrapper import Wrapper
from .averaged import as_start


class Interpolated(NamedTuple):
    """The state of `ScheduleFree`: z, (number of the coming step, greatest rate, sum of weights, beta), state of the rule."""

    z: Any
    numbers: tuple[Any, Any, Any, Any]
    rule: Any

    def evaluated(self, x: Array) -> Array:
        """The average, by which z and the parameter differ."""
        beta = self.numbers[-1]
        return x + (1 - beta) / beta * (x - self.z)


@dataclass(frozen=True)
class ScheduleFree(Wrapper):
    """Averaging in the place of a schedule: no learning rate has to fall, and training may end at any time.

    The rule inside steps a sequence z by gradients taken at y, which is what the model holds; `optimisers.averaged` gives x,
    the model to evaluate and to save::

        z <- z - step        x <- x + c (z - x)        y = beta x + (1 - beta) z

    with ``c = w_t / (w_1 + ... + w_t)`` and ``w_t = t**r max(eta_1, ..., eta_t)**power``. Weight decay of the rule is taken at
    y. A rule inside needs no momentum of its own: ``AdamW(eta, (0.0, 0.999))`` is AdamWScheduleFree's.

    Args:
        rule: what steps z. While its learning rate is 0 (as RAdam's, until its variance is tractable), no step is taken.
        beta: how far y is on the way from z to x, in (0, 1); momentum is what it replaces.
        warmup: steps over which the learning rate rises to that of the rule, >= 0.
        r: power of the step's number in the weights, in [0, 16].
        power: power of the greatest learning rate so far in the weights, in [0, 16].

    State: (z, numbers, state of the rule); z has x's shape and the dtype of moments, but float32 for half precision. x is not
    kept: it follows from y and z. In a chain it must be the last member.
    """

    rule: AbstractRule
    beta: Any = bounded(0.9, range=Interval(0, 1, open_low=True, open_high=True))
    warmup: int = bounded(0, range=Interval(0, integer=True))
    r: Any = bounded(0.0, range=EXPONENT)
    power: Any = bounded(2.0, range=EXPONENT)

    structural = ("beta",)
    final = True

    def start(self, x: Array, inner: State) -> State:
        return Interpolated(as_start(x), (1.0, 0.0, 0.0, self.beta), inner)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        z, (t, top, total, beta), inner = state
        rate = self.rule.learning_rate(inner)
        inner, step = yield from stages_of(self.rule, inner, x, dx)
        if step is None:
            return Interpolated(z, (t, top, total, beta), inner), None
        rise = where(t < self.warmup, t / self.warmup, 1.0) if self.warmup else 1.0
        top = where(rise * rate > top, rise * rate, top)
        weight = t**self.r * top**self.power
        total = total + weight
        c = where(total > 0, weight / where(total > 0, total, 1.0), 0.0)
        step = where(rate > 0, rise, 0.0) * step
        moved = cast_to(z, dtype_name(step)) - step
        after = Interpolated(cast_to(moved, dtype_name(z)), (t + 1, top, total, beta), inner)
        return after, c * (x - z) + (1 - beta * (1 - c)) * step
