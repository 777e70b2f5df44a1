"""Projected steps: Goldstein 1964, https://doi.org/10.1090/S0002-9904-1964-11178-2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, as_array, maximum, norm, scalar_like, sqrt, sum_over, where
from ...errors import HyperParameterError
from .._base import AbstractRule, Assign, Law, Measurement, MeasuringRule, Stages, State, stages_of, stepped
from .._fields import POSITIVE, bounded
from .._wrapper import Wrapper

SETS = ("non_negative", "ball", "unit_rows")


@dataclass(frozen=True)
class Projected(Wrapper, MeasuringRule):
    """Puts the array back onto a set after each step.

    Args:
        rule: what makes the steps.
        onto: ``"non_negative"``: negative elements become 0; ``"ball"``: an array of greater norm is scaled to norm radius;
            ``"unit_rows"``: each row (a vector as one, and all of ``x[i]`` with more dimensions) is scaled to norm radius;
            or a callable that is given the new array and returns its projection, of the same shape.
        radius: > 0.

    State: (state of the rule,). Complex arrays are refused. In a chain it must be the last member. The array of before the
    first step is not put onto the set.
    """

    rule: AbstractRule
    onto: str | Callable[[Any], Any] = bounded(range=None)
    radius: Any = bounded(1.0, range=POSITIVE)

    structural = ("onto",)
    final = True
    real_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.onto) and self.onto not in SETS:
            msg = f"Projected: field 'onto' must be one of {', '.join(map(repr, SETS))}, or a callable; got {self.onto!r}"
            raise HyperParameterError(msg)

    @property
    def law(self) -> Law:
        law = self.rule.law
        if self.onto == "non_negative":
            return law
        return "measured" if self.onto == "ball" and law in {"elementwise", "measured"} else "none"

    @property
    def transparent(self) -> bool:
        return self.onto in {"non_negative", "ball"}

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        inner, step = yield from stages_of(self.rule, state[0], x, dx)
        if step is None:
            return (inner,), None
        new = stepped(x, step)
        if self.onto == "non_negative":
            return (inner,), Assign(maximum(as_array(new), 0.0))
        if self.onto == "ball":
            (length,) = yield Measurement(self, (norm(new),))
            return (inner,), Assign(new * scalar_like(self.radius / maximum(length, self.radius), x))
        return (inner,), Assign(self._unit_rows(new) if self.onto == "unit_rows" else self.onto(new))  # type: ignore[operator]

    def _unit_rows(self, x: Array) -> Array:
        axes = tuple(range(1, x.ndim)) or (tuple(range(x.ndim)))
        length = sqrt(sum_over(x * x, axes)) if axes else abs(x)
        return x * (self.radius / where(length > 0, length, 1 + 0 * length))
