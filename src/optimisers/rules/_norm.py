"""What the rules that measure the norm of a gradient share."""

from __future__ import annotations

from ..arrays import Array, norm
from ._base import MeasuredRule, State


class NormRule(MeasuredRule):
    """Measures the p-norm of the gradient; p is a field, or 2."""

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return (norm(dx, getattr(self, "p", 2.0)),)

    def fault(self, measure: tuple[float, ...]) -> str | None:
        if super().fault(measure) is None:
            return None
        return f"the {getattr(self, 'p', 2.0):g}-norm of its gradient is {measure[0]}"
