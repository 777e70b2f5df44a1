"""Hyper-parameters as functions of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...arrays import Array, Traced, host_int, kind
from ...errors import HyperParameterError, RuleError, UnknownFieldError, not_a_rule
from .._adjust import field_names, refuse_structural, set_fields, with_eta
from .._base import AbstractRule, CompositeRule, Law, Stages, State, children, walk
from .._fields import unknown_field


@dataclass(frozen=True, init=False)
class Scheduled(CompositeRule):
    """A rule some of whose fields follow a schedule: ``Scheduled(AdamW(), eta=cosine)``.

    Args:
        rule: the rule to schedule.
        fields: for each field a callable ``step -> value``. The step is a Python int from 0 on, counted for each array and
            only when a step is taken. Values are checked as on construction. A scheduled ``eta`` acts like ``adjust(rule,
            eta)``: it reaches every member of a chain and keeps the ratio of a rule that has two learning rates.

    State: (number of steps taken, state of the rule). The number is read on the host, so Scheduled does not work inside
    torch.func.vmap and torch.compile. Callables have no ``repr`` to evaluate, so neither has the rule.
    """

    rule: AbstractRule
    schedules: tuple[tuple[str, Callable[[int], Any]], ...]

    def __init__(self, rule: AbstractRule, /, **fields: Callable[[int], Any]) -> None:
        if not isinstance(rule, AbstractRule):
            msg = f"Scheduled(rule, **fields): rule must be a rule; got {not_a_rule(rule)}"
            raise RuleError(msg)
        reachable = set(_reachable(rule))
        for name, schedule in fields.items():
            if name not in reachable:
                fixed = [type(r).__name__ for r in walk(rule) if name in r.structural]
                if fixed:
                    msg = (
                        f"Scheduled: field {name!r} of {fixed[0]} is fixed at setup, since the state follows it; give it there"
                    )
                    raise HyperParameterError(msg)
                raise UnknownFieldError("Scheduled: " + unknown_field(type(rule).__name__, name, sorted(reachable)))
            if not callable(schedule):
                msg = f"Scheduled: field {name!r} must be a callable step -> value; got {schedule!r}"
                raise HyperParameterError(msg)
        object.__setattr__(self, "rule", rule)
        object.__setattr__(self, "schedules", tuple(fields.items()))

    @property
    def law(self) -> Law:
        return self.rule.law

    def at(self, step: int) -> AbstractRule:
        """The rule with the values that the schedules give for this step (a count from 0)."""
        if isinstance(step, Traced):
            return step.tracer.scheduled(self, step)
        return _at(self, step)

    def replace(self, **changes: Any) -> Scheduled:
        return Scheduled(changes.get("rule", self.rule), **dict(changes.get("schedules", self.schedules)))

    def refuse_change(self, name: str, value: Any) -> None:
        if name in dict(self.schedules) and not callable(value):
            msg = (
                f"adjust: {name!r} of {type(self.rule).__name__} is scheduled; give a callable step -> value to change the "
                "schedule, or set up without Scheduled"
            )
            raise HyperParameterError(msg)

    def with_eta(self, eta: Any, base: AbstractRule) -> Scheduled:
        self.refuse_change("eta", eta)
        if "eta" in dict(self.schedules):
            return self.replace(schedules={**dict(self.schedules), "eta": eta})
        inner = base.rule if isinstance(base, Scheduled) else self.rule
        return self.replace(rule=with_eta(self.rule, eta, inner))

    def set_own(self, fields: Mapping[str, Any]) -> tuple[Scheduled, Mapping[str, Any], set[str]]:
        schedules = dict(self.schedules)
        own = {name: value for name, value in fields.items() if name in schedules}
        for name, value in own.items():
            self.refuse_change(name, value)
        rest = {name: value for name, value in fields.items() if name not in own}
        return (self.replace(schedules={**schedules, **own}) if own else self), rest, set(own)

    def learning_rate(self, state: State) -> Any:
        return self.at(host_int(state[0], "Scheduled")).learning_rate(state[1])

    def decay_factor(self, state: State) -> Any:
        return self.at(host_int(state[0], "Scheduled")).decay_factor(state[1])

    def init(self, x: Array) -> State:
        return 0, self.rule.init(x)

    def init_as(self, x: Array, dtype: str) -> State:
        return 0, self.rule.init_as(x, dtype)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        count, inner = state
        rule = self.at(host_int(count, "Scheduled"))
        inner, step = yield from rule.stages(inner, x, dx)
        return (count if step is None else count + 1, inner), step

    def __repr__(self) -> str:
        shown = "".join(f", {name}={schedule!r}" for name, schedule in self.schedules)
        return f"Scheduled({self.rule!r}{shown})"


def _reachable(rule: AbstractRule) -> list[str]:
    names = [name for name in field_names(rule) if name not in {field for field, _, _ in children(rule)}]
    for name, _, child in children(rule):
        if name not in rule.opaque:
            names += _reachable(child)
    return [name for name in names if name not in rule.structural and name != "schedules"]


@lru_cache(maxsize=64)
def _at(scheduled: Scheduled, step: int) -> AbstractRule:
    rule = scheduled.rule
    for name, schedule in scheduled.schedules:
        value = schedule(step)
        if kind(value) != "torch" and hasattr(value, "item"):
            value = value.item()  # a 0-d NumPy or JAX array, as other libraries' schedules return
        try:
            if name == "eta":
                refuse_structural(rule, "eta")
                rule = with_eta(rule, value, scheduled.rule)
            else:
                rule, _ = set_fields(rule, {name: value})
        except HyperParameterError as error:
            msg = f"Scheduled: the schedule of {name!r} gave {value!r} for step {step}. {error}"
            raise HyperParameterError(msg) from None
    return rule
