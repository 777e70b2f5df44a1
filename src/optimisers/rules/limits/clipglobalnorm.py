"""Clipping by one norm over many arrays: Pascanu, Mikolov & Bengio 2013, https://arxiv.org/abs/1211.5063."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, maximum, norm, scalar_like, stack
from .._base import State
from .._fields import Interval, bounded
from .._norm import NormRule


@dataclass(frozen=True)
class ClipGlobalNorm(NormRule):
    """Scales the gradients of all arrays by ``min(1, omega / norm)``, with one p-norm over all of them.

    The norm is taken over every array whose chain holds a ClipGlobalNorm of the same group, whatever else their chains
    hold. Arrays that are frozen or have no gradient in this step do not count; a tied array counts once.

    Args:
        omega: greatest norm, > 0.
        p: order of the norm, > 0, inf included. All members of a group must have the same.
        throw: raise NonFiniteError, naming the parameters, if a norm is infinite or NaN.
        group: which arrays are measured together.

    State: None.
    """

    omega: Any = 1.0
    p: float = bounded(2.0, range=Interval(0, open_low=True, finite=False))
    throw: bool = True
    group: str = ""

    @property
    def scope(self) -> str:
        return f"ClipGlobalNorm(p={self.p:g}, group={self.group!r})"

    def init(self, x: Array) -> State:
        return None

    def combine(self, measures: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        return (norm(stack([length for (length,) in measures]), self.p),)

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        (length,) = measure
        return state, dx * scalar_like(self.omega / maximum(length, self.omega), dx)
