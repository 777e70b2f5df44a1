"""Averages of the parameters over the course of training: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ...arrays import Array, cast_to, dtype_name, working_dtype
from .._base import AbstractRule, Stages, State, stepped
from .._fields import Interval, bounded
from .._wrapper import Wrapper


class Average(NamedTuple):
    """The state of `Averaged`: the average, the product of the decays so far, the state of the rule inside."""

    average: Any
    power: Any
    rule: Any

    def evaluated(self, x: Array) -> Array:
        """What is to stand in the place of x where the model is used."""
        return self.average


@dataclass(frozen=True)
class Averaged(Wrapper):
    """Steps as the rule inside does, and keeps an exponential moving average of the parameter.

    After step t from x[t-1] to x[t] the average is ``a <- a + w (x[t] - a)``. With debias, ``w = (1 - decay) / (1 -
    decay**t)``, so that a is the weighted mean of x[1], ..., x[t] with weights ``decay**(t - k)``; without it,
    ``w = 1 - decay`` from ``a = x[0]`` on. No step, no averaging. Training itself does not change;
    `optimisers.averaged` gives the averaged model.

    Args:
        rule: what steps the array. It may be a MixedPrecision, and then the master copy is averaged; or stand inside one.
        decay: weight of the past, in [0, 1).
        debias: leave the initial value out of the average.

    State: ``Average(average, decay**t, state of the rule)``. The average has x's shape and the dtype of moments, but float32
    for half precision, in which it would stand still. In a chain it must be the last member, since later ones would change
    the step.
    """

    rule: AbstractRule
    decay: Any = bounded(0.999, range=Interval(0, 1, open_high=True))
    debias: bool = True

    final = True
    alters = False

    def start(self, x: Array, inner: State) -> State:
        return Average(as_start(x), 1.0, inner)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        average, power, inner = state
        inner, step = yield from self.rule.stages(inner, x, dx)
        if step is None:
            return Average(average, power, inner), None
        new = cast_to(stepped(x, step), dtype_name(average))
        power = power * self.decay
        weight = (1 - self.decay) / (1 - power) if self.debias else 1 - self.decay
        return Average(average + weight * (new - average), power, inner), step


def as_start(x: Array) -> Array:
    """A copy of x, with x's strides, in which small changes add up."""
    return 1 * cast_to(x, working_dtype(dtype_name(x)))
