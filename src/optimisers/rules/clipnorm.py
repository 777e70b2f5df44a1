"""Clipping by the norm of each array: Pascanu, Mikolov & Bengio 2013, https://arxiv.org/abs/1211.5063."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays import Array, minimum, norm, scalar_like
from ._base import MeasuredRule, State
from ._fields import Interval, bounded


@dataclass(frozen=True)
class ClipNorm(MeasuredRule):
    """Scales the gradient of an array down to p-norm omega where it is longer.

    omega: greatest norm, > 0.
    p: order of the norm, any number, inf and -inf included; 0 counts the non-zero elements.
    throw: raise NonFiniteError, naming the parameter, if the norm is infinite or NaN. It costs one synchronisation a step
        for the whole tree. Under torch.func transforms and in torch.compile it has no effect.
    State: None. See :class:`ClipGlobalNorm` for one norm over many arrays.
    """

    omega: Any = 10.0
    p: float = bounded(2.0, range=Interval(finite=False))
    throw: bool = True

    def init(self, x: Array) -> State:
        return None

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return (norm(dx, self.p),)

    def fault(self, measure: tuple[float, ...]) -> str | None:
        return None if super().fault(measure) is None else f"the {self.p:g}-norm of its gradient is {measure[0]}"

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        (length,) = measure
        return state, dx * scalar_like(minimum(self.omega / length, 1.0), dx)
