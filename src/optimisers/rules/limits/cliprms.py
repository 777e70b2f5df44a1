"""Clipping by the root mean square: Shazeer & Stern 2018, section 6, https://arxiv.org/abs/1804.04235."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, element_count, maximum, norm, scalar_like
from .._base import MeasuredRule, State


@dataclass(frozen=True)
class ClipRMS(MeasuredRule):
    """Scales what comes down to root mean square tau where that is larger: ``dx / max(1, rms(dx) / tau)``.

    Behind a rule with learning rate 1 it is the update clipping of Adafactor and of StableAdamW:
    ``OptimiserChain(Adam(1.0), ClipRMS(), Descent(eta))``.

    Args:
        tau: greatest root mean square, > 0.

    State: None.
    """

    tau: Any = 1.0

    def init(self, x: Array) -> State:
        return None

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return (norm(dx) / maximum(element_count(dx), 1) ** 0.5,)

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        (size,) = measure
        return state, dx * scalar_like(self.tau / maximum(size, self.tau), dx)
