"""Distance over gradients: Ivgi, Hinder & Carmon 2023, https://arxiv.org/abs/2302.12022.

DoWG: Khaled, Mishchenko & Jin 2023, https://arxiv.org/abs/2305.16284.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, as_array, maximum, norm, scalar_like, sqrt, stack, zero_norm
from .._base import MeasuredRule, State
from .._fields import NON_NEGATIVE, bounded
from .._norm import latest


@dataclass(frozen=True)
class DoG(MeasuredRule):
    """Gradient descent that finds its own learning rate: the greatest distance from the start over the length of all gradients.

    Distances and gradients are those of all arrays of the group together. The paper evaluates an average of the
    iterates: wrap it in `Averaged`.

    Args:
        eta: factor on the learning rate that is found, >= 0.
        epsilon: added to the squared length of the gradients, >= 0; with weighted, to the length.
        start: distance that is assumed at first, >= 0 ...
        relative: ... and what is added to it for each unit of ``1 + norm(x0)``, >= 0.
        weighted: weigh squared gradients by the squared distance at their time, and use that in place of the distance (DoWG).
        group: which arrays are measured together.

    State: (x0, (distance, squares, t)): the first value, of x's shape; 0-d numbers, the same in all arrays of the group that
    have taken as many steps t.
    """

    eta: Any = 1.0
    epsilon: Any = 1e-8
    start: Any = bounded(0.0, range=NON_NEGATIVE)
    relative: Any = bounded(1e-6, range=NON_NEGATIVE)
    weighted: bool = False
    group: str = ""

    @property
    def scope(self) -> str:
        return f"DoG(group={self.group!r})"

    def init(self, x: Array) -> State:
        return 1 * x, (zero_norm(x), zero_norm(x), zero_norm(x))

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        x0, (distance, squares, t) = state
        return norm(x - x0), norm(dx), norm(x0), distance, squares, t

    def combine(self, measures: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        moved, lengths, starts, distances, squares, steps = zip(*measures, strict=True)
        norms = (norm(stack(each)) for each in (moved, lengths, starts))
        return (*norms, latest(distances, steps), latest(squares, steps), stack(steps).max())

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        x0, (_, _, t) = state
        moved, length, start, distance, squares, _ = measure
        distance = maximum(maximum(distance, moved), self.start + self.relative * (1 + start))
        if self.weighted:
            squares = squares + distance * distance * length * length
            rate = distance * distance / (sqrt(squares) + self.epsilon)
        else:
            squares = squares + length * length
            rate = distance / sqrt(squares + self.epsilon)
        shared = as_array(distance), as_array(squares), as_array(t + 1)
        return (x0, shared), scalar_like(self.eta * rate, dx) * dx
