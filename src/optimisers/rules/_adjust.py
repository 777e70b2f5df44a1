"""Changing hyper-parameters of a rule, however deep it stands inside others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import HyperParameterError, SelectionError, UnknownFieldError, brief
from ._base import AbstractRule, CompositeRule, children, walk, with_child
from ._fields import is_tensor, real, unknown_field


@dataclass(frozen=True)
class Change:
    """One call of ``adjust``: a learning rate, or a factor on the one at setup, or values of named fields."""

    eta: Any = None
    times: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    rule: type[AbstractRule] | tuple[type[AbstractRule], ...] | None = None

    def apply(self, rule: AbstractRule, base: AbstractRule) -> tuple[AbstractRule, set[str]]:
        """The changed rule, and the names of the fields that were found; ``base`` is the rule as given at setup."""
        if self.rule is not None and not isinstance(rule, self.rule):
            return self._inside(rule, base)
        if self.eta is not None:
            return (with_eta(rule, self.eta, base), {"eta"}) if has_eta(rule) else (rule, set())
        if self.times is not None:
            return (scaled(rule, base, self.times), {"eta"}) if has_eta(rule) else (rule, set())
        return set_fields(rule, self.fields)

    def _inside(self, rule: AbstractRule, base: AbstractRule) -> tuple[AbstractRule, set[str]]:
        found: set[str] = set()
        for name, index, child in list(children(rule)):
            new, names = self.apply(child, child_of(base, name, index, child))
            found |= names
            if new is not child:
                rule = with_child(rule, name, index, new)
        return rule, found

    def refuse_unfound(self, found: set[str], rules: list[AbstractRule]) -> None:
        """Raise SelectionError if no rule is of the type asked for, UnknownFieldError if none of those has the field."""
        inside = [inner for rule in rules for inner in walk(rule)]
        reached = rules
        if self.rule is not None:
            reached = [inner for inner in inside if isinstance(inner, self.rule)]
            if not reached:
                wanted = " or ".join(t.__name__ for t in (self.rule if isinstance(self.rule, tuple) else (self.rule,)))
                there = ", ".join(sorted({type(inner).__name__ for inner in inside}))
                msg = f"adjust: no selected rule is of type {wanted}; the types are {there}"
                raise SelectionError(msg)
        if missing := sorted((set(self.fields) or {"eta"}) - found):
            raise nothing_found(missing, reached)


def child_of(base: AbstractRule, name: str, index: int | None, child: AbstractRule) -> AbstractRule:
    """The rule that stands in base where child stands now, or child itself if base is built otherwise."""
    value = getattr(base, name, None)
    if index is not None:
        value = value[index] if isinstance(value, tuple) and index < len(value) else None
    return value if type(value) is type(child) else child


def has_eta(rule: AbstractRule) -> bool:
    """Whether the rule or one inside it has a learning rate."""
    return any("eta" in field_names(inner) for inner in walk(rule))


def field_names(rule: AbstractRule) -> list[str]:
    """The names of a rule's own fields."""
    return [f.name for f in dataclasses.fields(rule) if not f.name.startswith("_")]  # type: ignore[arg-type]


def settable(rule: AbstractRule) -> list[str]:
    """The names of the fields that ``adjust`` may set by name: those that hold no rules."""
    holding = {name for name, _, _ in children(rule)}
    return [name for name in field_names(rule) if name not in holding]


def with_eta(rule: AbstractRule, eta: Any, base: AbstractRule) -> AbstractRule:
    """The rule with this learning rate, ratios kept as in base; a rule without one is returned as it is."""
    if not has_eta(rule):
        return rule
    refuse_structural(rule, "eta")
    return rule.with_eta(eta, base)


def scaled(rule: AbstractRule, base: AbstractRule, times: Any) -> AbstractRule:
    """The rule with every learning rate set to ``times`` that of base."""
    factor: Any = times if is_tensor(times) else real(times, 0)
    if factor is None:
        msg = f"adjust: times must be a finite number >= 0; got {brief(times)}"
        raise HyperParameterError(msg)
    for name, index, child in list(children(rule)):
        new = scaled(child, child_of(base, name, index, child), times)
        if new != child:
            rule = with_child(rule, name, index, new)
    rule.refuse_change("eta", times)
    if "eta" in field_names(rule):
        refuse_structural(rule, "eta")
        rule = rule.replace(eta=factor * getattr(base, "eta", rule.eta))  # type: ignore[attr-defined]
    return rule


def set_fields(rule: AbstractRule, fields: Mapping[str, Any]) -> tuple[AbstractRule, set[str]]:
    """The rule with these fields set wherever it or a rule inside it has them, and the names that were found."""
    rule, fields, found = rule.set_own(fields)
    own = {name: value for name, value in fields.items() if name in field_names(rule)}
    for name in own:
        refuse_structural(rule, name)
    for name, index, child in list(children(rule)):
        if name in rule.opaque:
            continue
        new, names = set_fields(child, fields)
        found |= names
        if new is not child:
            rule = with_child(rule, name, index, new)
    return (rule.replace(**own) if own else rule), found | own.keys()


def refuse_structural(rule: AbstractRule, name: str) -> None:
    """Raise HyperParameterError if the field fixes the state, so that it can only be chosen at setup."""
    holds_rules = any(name == field for field, _, _ in children(rule))
    if name in rule.structural or holds_rules:
        kind = type(rule).__name__
        msg = (
            f"adjust: field {name!r} of {kind} is fixed at setup, since the state follows it. Set up a new state to change "
            f"it, or pass over {kind} with rule= or where="
        )
        if holds_rules:
            msg = f"adjust: field {name!r} of {kind} holds rules; adjust those, with rule=TheirType"
        raise HyperParameterError(msg)


def nothing_found(names: list[str], rules: list[AbstractRule]) -> UnknownFieldError:
    """The error for a field that none of the selected rules has."""
    known: dict[str, list[str]] = {}
    for rule in rules:
        for inner in walk(rule):
            if isinstance(inner, CompositeRule) and not settable(inner):
                continue
            known.setdefault(type(inner).__name__, settable(inner))
    if len(known) == 1:
        ((kind, fields),) = known.items()
        return UnknownFieldError("adjust: " + unknown_field(kind, names[0], fields))
    every = sorted({name for fields in known.values() for name in fields})
    text = "; ".join(f"{kind}({', '.join(fields)})" for kind, fields in known.items())
    hint = unknown_field("", names[0], every).split(" Its fields")[0].split(repr(names[0]), 1)[1]
    return UnknownFieldError(f"adjust: no selected rule has a field {names[0]!r}{hint} The selected rules: {text or 'none'}")


def adjust_rule(rule: AbstractRule, change: Change) -> AbstractRule:
    """One rule adjusted on its own; its present values are the base."""
    new, found = change.apply(rule, rule)
    change.refuse_unfound(found, [rule])
    return new
