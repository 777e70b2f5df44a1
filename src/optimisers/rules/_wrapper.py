"""What rules around one other rule share."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from ..arrays import Array, cast_to
from ..errors import RuleError, not_a_rule
from ._adjust import with_eta
from ._base import AbstractRule, CompositeRule, Law, State, walk


class Wrapper(CompositeRule):
    """A rule around the one in its field ``rule``. Its state is a tuple, of which the last item is the state of that rule."""

    rule: AbstractRule

    alters: ClassVar[bool] = True
    """Whether it changes the step, so that a rule that goes by the new value of the array must stand around it."""

    assigns: ClassVar[bool] = False
    """Whether it keeps the array in another form, of which the array is a copy."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.rule, AbstractRule):
            first = ", ".join([f.name for f in dataclasses.fields(self)][:2])
            msg = f"{name}({first}): rule must be a rule; got {not_a_rule(self.rule)}"
            raise RuleError(msg)
        if self.alters:
            self._refuse_final(name)
        super().__post_init__()

    def _refuse_final(self, name: str) -> None:
        for inner in walk(self.rule):
            found = type(inner).__name__
            if type(inner) is type(self) and self.final:
                msg = f"{name} inside {name} would work against itself; remove one of them"
                raise RuleError(msg)
            if inner.final or (isinstance(inner, Wrapper) and inner.assigns):
                msg = (
                    f"{name} changes the step of the rule inside, and {found} goes by the new value of the array; put that "
                    f"around: {found}({name}(...))"
                )
                raise RuleError(msg)

    @property
    def transparent(self) -> bool:
        """Whether what it does itself is elementwise or measured, so that it becomes loops where the rule inside does."""
        return True

    @property
    def law(self) -> Law:
        return self.rule.law

    def with_eta(self, eta: Any, base: Self) -> Self:
        return self.replace(rule=with_eta(self.rule, eta, base.rule))

    def learning_rate(self, state: State) -> Any:
        return self.rule.learning_rate(state[-1])

    def decay_factor(self, state: State) -> Any:
        return self.rule.decay_factor(state[-1])

    def start(self, x: Array, inner: State) -> State:
        """The state for an array x in the dtype of moments, and the state of the rule inside."""
        return (inner,)

    def init(self, x: Array) -> State:
        return self.start(x, self.rule.init(x))

    def init_as(self, x: Array, dtype: str) -> State:
        return self.start(cast_to(x, dtype), self.rule.init_as(x, dtype))
