"""Cautious steps: Liang et al. 2024, https://arxiv.org/abs/2411.16085; cautious decay: Chen et al. 2025, https://arxiv.org/abs/2510.12402."""

from __future__ import annotations

from dataclasses import dataclass

from ...arrays import Array, alignment, count_true, element_count, maximum, scalar_like, where
from .._base import AbstractRule, Law, Measurement, MeasuringRule, Stages, State, stages_of
from .._fields import Choice, bounded
from .._wrapper import Wrapper


@dataclass(frozen=True)
class Cautious(Wrapper, MeasuringRule):
    """Leaves out the elements of a step that go against the gradient, or those of its weight decay that go against the step.

    Args:
        rule: what makes the steps.
        mask: ``"step"``: elements whose step and gradient differ in sign are left out, and the others divided by the share that
            is left of the array (at least 1/1000), so that the step keeps its size; the rule's weight decay stays as it is.
            ``"decay"``: the rule's weight decay is left out where it and the rest of the step differ in sign, and nothing else.

    State: (state of the rule,). The gradient is what comes to Cautious: in a chain, what the last member returned. Decay is
    that of AdamW, Muon and their like, and of a WeightDecay at the end of a chain.
    """

    rule: AbstractRule
    mask: str = bounded("step", range=Choice(("step", "decay")))

    structural = ("mask",)

    @property
    def law(self) -> Law:
        law = self.rule.law
        if self.mask == "decay":
            return law
        return "measured" if law in {"elementwise", "measured"} else "none"

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        (inner,) = state
        parts = self.rule.split(inner, x, dx)
        if parts is None:
            factor = self.rule.decay_factor(inner)
            inner, step = yield from stages_of(self.rule, inner, x, dx)
            if step is None:
                return (inner,), None
            decay = factor * x
            parts = inner, step - decay, decay, step - decay
        inner, bare, decay, heading = parts
        if self.mask == "decay":
            return (inner,), bare + where(alignment(bare, x) >= 0, decay, 0 * x)
        agrees = alignment(heading, dx) > 0
        (share,) = yield Measurement(self, (count_true(agrees) / maximum(element_count(x), 1),))
        scale = scalar_like(1 / maximum(share, 1e-3), x)
        return (inner,), bare * where(agrees, scale, 0.0) + decay
