"""Composition of rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...arrays import Array
from ...errors import RuleError, not_a_rule
from .._adjust import with_eta
from .._base import AbstractRule, CompositeRule, Law, Stages, State, stages_of, walk
from ..decay.weightdecay import WeightDecay
from .mixedprecision import MixedPrecision


@dataclass(frozen=True, init=False)
class OptimiserChain(CompositeRule):
    """Rules applied one after another, each to what the last one returned. An empty chain subtracts the gradient itself.

    Args:
        rules: the members, in order.

    State: the tuple of the members' states. If a member returns no step, later members do not run and keep their state.
    """

    rules: tuple[AbstractRule, ...]

    def __init__(self, *rules: AbstractRule) -> None:
        for i, rule in enumerate(rules):
            if not isinstance(rule, AbstractRule):
                msg = f"OptimiserChain: member {i} must be a rule; got {not_a_rule(rule)}"
                raise RuleError(msg)
            if any(isinstance(inner, MixedPrecision) for inner in walk(rule)):
                msg = (
                    f"OptimiserChain: member {i}, {type(rule).__name__}, is or holds a MixedPrecision; put the chain inside "
                    "that: MixedPrecision(OptimiserChain(...))"
                )
                raise RuleError(msg)
        for i, rule in enumerate(rules[:-1]):
            if last := next((type(inner).__name__ for inner in walk(rule) if inner.final), None):
                msg = (
                    f"OptimiserChain: member {i}, {type(rule).__name__}, is or holds {last}, which goes by the new value of "
                    f"the array and so must be the last member; or put the chain inside that: {last}(OptimiserChain(...))"
                )
                raise RuleError(msg)
        object.__setattr__(self, "rules", tuple(rules))

    @property
    def law(self) -> Law:
        laws = {rule.law for rule in self.rules}
        if laws <= {"elementwise"}:
            return "elementwise"
        if laws <= {"elementwise", "stackable"}:
            return "stackable"
        return "measured" if laws <= {"elementwise", "measured"} else "none"

    def replace(self, **changes: Any) -> OptimiserChain:
        return OptimiserChain(*changes.get("rules", self.rules))

    def with_eta(self, eta: Any, base: OptimiserChain) -> OptimiserChain:
        return OptimiserChain(*(with_eta(rule, eta, old) for rule, old in zip(self.rules, base.rules, strict=True)))

    def learning_rate(self, state: State) -> Any:
        return math.prod(rule.learning_rate(inner) for rule, inner in zip(self.rules, state, strict=True))

    def decay_factor(self, state: State) -> Any:
        """That of the last member that is no `WeightDecay`, and of those behind it."""
        total = 0.0
        for rule, inner in zip(reversed(self.rules), reversed(state), strict=True):
            total = total + rule.decay_factor(inner)
            if not isinstance(rule, WeightDecay):
                break
        return total

    def init(self, x: Array) -> State:
        return tuple(rule.init(x) for rule in self.rules)

    def init_as(self, x: Array, dtype: str) -> State:
        return tuple(rule.init_as(x, dtype) for rule in self.rules)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        after = list(state)
        for i, rule in enumerate(self.rules):
            after[i], dx = yield from stages_of(rule, state[i], x, dx)
            if dx is None:
                break
        return tuple(after), dx

    def __repr__(self) -> str:
        return f"OptimiserChain({', '.join(map(repr, self.rules))})"
