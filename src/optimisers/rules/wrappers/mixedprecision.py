"""Training in low precision with master weights: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...arrays import Array, as_dtype_name, cast_to, detached, dtype_name, working_dtype
from ...errors import HyperParameterError, RuleError, not_a_rule
from .._adjust import with_eta
from .._base import AbstractRule, Assign, CompositeRule, Law, Stages, State, stepped, walk
from .._precision import in_working_precision


@dataclass(frozen=True)
class MixedPrecision(CompositeRule):
    """Steps a master copy of each array, kept in another dtype; the array itself becomes the rounded master.

    Args:
        rule: the rule for the master copy; its moments have the master's dtype.
        dtype: dtype of the master, a name or a NumPy or torch dtype. A complex array has a complex master of that precision.

    State: (master, or None for an array that has this dtype already; state of the rule).
    """

    rule: AbstractRule
    dtype: Any = "float32"

    structural = ("dtype",)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, AbstractRule):
            msg = f"MixedPrecision(rule, dtype): rule must be a rule; got {not_a_rule(self.rule)}"
            raise RuleError(msg)
        if any(isinstance(inner, MixedPrecision) for inner in walk(self.rule)):
            msg = "MixedPrecision inside MixedPrecision would keep two masters of one array; remove one of them"
            raise RuleError(msg)
        try:
            object.__setattr__(self, "dtype", as_dtype_name(self.dtype))
        except ValueError as error:
            msg = f"MixedPrecision: field 'dtype' must be a real floating dtype; {error}"
            raise HyperParameterError(msg) from None

    @property
    def law(self) -> Law:
        return self.rule.law

    def with_eta(self, eta: Any, base: MixedPrecision) -> MixedPrecision:
        return self.replace(rule=with_eta(self.rule, eta, base.rule))

    def init(self, x: Array) -> State:
        master = cast_to(x, self.dtype)
        return (None if master is x else detached(master)), self.rule.init(master)

    def init_as(self, x: Array, dtype: str) -> State:
        master = cast_to(x, self.dtype)
        return (None if master is x else detached(master)), self.rule.init_as(master, dtype)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        master, inner = state
        if master is None:
            inner, step = yield from self.rule.stages(inner, x, dx)
            return (None, inner), step
        inner, step = yield from in_working_precision(self.rule, inner, master, dx)
        if step is None:
            return (master, inner), None
        precision = dtype_name(master)
        master = cast_to(stepped(cast_to(master, working_dtype(precision)), step), precision)
        return (master, inner), Assign(master)
