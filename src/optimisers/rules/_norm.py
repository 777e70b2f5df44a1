"""What the rules that measure the norm of a gradient share."""

from __future__ import annotations

from collections.abc import Sequence

from ..arrays import Array, norm, stack, where
from ._base import MeasuredRule, State


class NormRule(MeasuredRule):
    """Measures the p-norm of the gradient; p is a field, or 2."""

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return (norm(dx, getattr(self, "p", 2.0)),)

    def fault(self, measure: tuple[float, ...]) -> str | None:
        if super().fault(measure) is None:
            return None
        return f"the {getattr(self, 'p', 2.0):g}-norm of its gradient is {measure[0]}"


def latest(numbers: Sequence[Array], steps: Sequence[Array]) -> Array:
    """The number that the arrays of a scope share, of those which have taken most steps (others were absent in some)."""
    counts = stack(steps)
    last = counts == counts.max()
    return where(last, stack(numbers), 0.0).sum() / last.sum()
