"""Changing hyper-parameters of a rule, however deep it stands inside others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import HyperParameterError, UnknownFieldError
from ._base import AbstractRule, children, walk, with_child
from ._fields import is_tensor, unknown_field


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
    return [f.name for f in dataclasses.fields(rule)]  # type: ignore[arg-type]


def with_eta(rule: AbstractRule, eta: Any, base: AbstractRule) -> AbstractRule:
    """The rule with this learning rate, ratios kept as in base; a rule without one is returned as it is."""
    if not has_eta(rule):
        return rule
    refuse_structural(rule, "eta")
    return rule.with_eta(eta, base)


def scaled(rule: AbstractRule, base: AbstractRule, times: Any) -> AbstractRule:
    """The rule with every learning rate set to ``times`` that of base."""
    if not is_tensor(times) and not (isinstance(times, (int, float)) and times >= 0):
        msg = f"adjust: times must be a number >= 0; got {times!r}"
        raise HyperParameterError(msg)
    for name, index, child in list(children(rule)):
        new = scaled(child, child_of(base, name, index, child), times)
        if new != child:
            rule = with_child(rule, name, index, new)
    rule.refuse_change("eta", times)
    if "eta" in field_names(rule):
        refuse_structural(rule, "eta")
        rule = rule.replace(eta=times * getattr(base, "eta", rule.eta))  # type: ignore[attr-defined]
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
        why = (
            "holds rules; adjust those with rule=TheirType" if holds_rules else "is fixed at setup, since the state follows it"
        )
        msg = (
            f"adjust: field {name!r} of {kind} {why}. Set up a new state to change it, or pass over {kind} with rule= or where="
        )
        raise HyperParameterError(msg)


def nothing_found(names: list[str], rules: list[AbstractRule]) -> UnknownFieldError:
    """The error for a field that none of the selected rules has."""
    known: dict[str, list[str]] = {}
    for rule in rules:
        for inner in walk(rule):
            known.setdefault(type(inner).__name__, field_names(inner))
    if len(known) == 1:
        ((kind, fields),) = known.items()
        return UnknownFieldError("adjust: " + unknown_field(kind, names[0], fields))
    every = sorted({name for fields in known.values() for name in fields})
    text = "; ".join(f"{kind}({', '.join(fields)})" for kind, fields in known.items())
    hint = unknown_field("", names[0], every).split(" Its fields")[0].strip()
    return UnknownFieldError(f"adjust: no selected rule: {hint} The selected rules and their fields: {text or 'none'}")


def adjust_rule(rule: AbstractRule, change: Change) -> AbstractRule:
    """One rule adjusted on its own; its present values are the base."""
    new, found = change.apply(rule, rule)
    wanted = set(change.fields) or {"eta"}
    if missing := sorted(wanted - found):
        raise nothing_found(missing, [rule])
    return new
