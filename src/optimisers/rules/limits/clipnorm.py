"""Clipping by the norm of each array: Pascanu, Mikolov & Bengio 2013, https://arxiv.org/abs/1211.5063."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, maximum, scalar_like
from .._base import State
from .._fields import Interval, bounded
from .._norm import NormRule


@dataclass(frozen=True)
class ClipNorm(NormRule):
    """Scales the gradient of an array down to p-norm omega where it is longer.

    Args:
        omega: greatest norm, > 0.
        p: order of the norm, any number, inf and -inf included; 0 counts the non-zero elements.
        throw: raise NonFiniteError, naming the parameter, if the norm is infinite or NaN. It costs one synchronisation a step
            for the whole tree. Under torch.func transforms and in torch.compile it has no effect.

    State: None. See `ClipGlobalNorm` for one norm over many arrays.
    """

    omega: Any = 10.0
    p: float = bounded(2.0, range=Interval(finite=False))
    throw: bool = True

    def init(self, x: Array) -> State:
        return None

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        (length,) = measure
        return state, dx * scalar_like(self.omega / maximum(length, self.omega), dx)
