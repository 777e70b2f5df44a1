"""A rule for each parameter, chosen by path, owner or predicate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arrays import Array
from ..errors import ArgumentError, RuleError, SelectionError, TieError, not_a_rule
from ..rules import OptimiserChain, Scheduled
from ..rules._adjust import field_names, with_eta
from ..rules._base import AbstractRule, State, walk
from ..rules._wrapper import Wrapper
from ..tree.param import Param
from ..tree.select import check_pattern, describe, known_paths, matches
from ..tree.show import rule_text


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()


@dataclass(frozen=True, init=False)
class Route(AbstractRule):
    """A rule for each parameter: ``Route((pattern, rule), ..., otherwise=rule)``, first match wins.

    A pattern is a case-sensitive glob on the whole path (``*`` crosses dots, and ``*.bias`` also matches a top-level
    ``bias``), the type of the owner (``torch.nn.Embedding``), a predicate on `Param`, or a tuple of those, any of
    which may match. A rule of None means: not trained. ``setup`` expands a route; it may also stand inside Scheduled,
    a wrapper such as MixedPrecision or Averaged, and last in an OptimiserChain.

    Raises at setup: SelectionError for a pattern that matches nothing, and for parameters that no pattern matches if
    ``otherwise`` is not given; TieError if the places of a tied array get different rules.
    """

    patterns: tuple[Any, ...]
    rules: tuple[AbstractRule | None, ...]
    otherwise: Any

    def __init__(self, *pairs: tuple[Any, AbstractRule | None], otherwise: AbstractRule | None = MISSING) -> None:
        for pair in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                msg = f"Route: each argument is a pair (pattern, rule); got {pair!r}"
                raise ArgumentError(msg)
            check_pattern(pair[0], "Route")
        for rule in (*(rule for _, rule in pairs), otherwise):
            if not (rule is None or rule is MISSING or isinstance(rule, AbstractRule)):
                msg = f"Route: a pattern leads to a rule, or to None for 'not trained'; got {not_a_rule(rule)}"
                raise RuleError(msg)
        object.__setattr__(self, "patterns", tuple(pattern for pattern, _ in pairs))
        object.__setattr__(self, "rules", tuple(rule for _, rule in pairs))
        object.__setattr__(self, "otherwise", otherwise)

    def replace(self, **changes: Any) -> Route:
        rules = changes.get("rules", self.rules)
        return Route(*zip(self.patterns, rules, strict=True), otherwise=changes.get("otherwise", self.otherwise))

    def with_eta(self, eta: Any, base: Route) -> Route:
        rules = [rule and with_eta(rule, eta, old or rule) for rule, old in zip(self.rules, base.rules, strict=True)]
        last = self.otherwise
        if isinstance(last, AbstractRule):
            last = with_eta(last, eta, base.otherwise)
        return self.replace(rules=tuple(rules), otherwise=last)

    def init(self, x: Array) -> State:
        raise RuleError(_UNEXPANDED)

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        raise RuleError(_UNEXPANDED)

    def __repr__(self) -> str:
        pairs = [
            f"({p.__name__ if isinstance(p, type) else repr(p)}, {r!r})" for p, r in zip(self.patterns, self.rules, strict=True)
        ]
        last = [] if self.otherwise is MISSING else [f"otherwise={self.otherwise!r}"]
        return f"Route({', '.join([*pairs, *last])})"


_UNEXPANDED = "a Route has no state of its own: setup(route, model) chooses a rule for each parameter"


class Chooser:
    """Chooses the rule of each parameter, and keeps account of which patterns matched."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.used: dict[int, tuple[Route, list[bool]]] = {}
        self.unmatched: list[str] = []

    def choose(self, places: Sequence[Param]) -> tuple[AbstractRule | None, str]:
        """(rule, reason) for an array described at each of its places."""
        first = places[0]
        if isinstance(self.rule, AbstractRule):
            rule, reason = self.rule, "the rule given to setup"
        else:
            rule = self.rule(first)
            reason = f"chosen by {getattr(self.rule, '__name__', type(self.rule).__name__)}"
            if rule is not None and not isinstance(rule, AbstractRule):
                msg = (
                    f"setup: the rule of {first.path!r}, {reason}, must be a rule, or None for 'not trained'; got "
                    f"{not_a_rule(rule)}"
                )
                raise RuleError(msg)
        if rule is None or not any(isinstance(inner, Route) for inner in walk(rule)):
            return rule, reason
        results = [self._expand(rule, param, reason) for param in places]
        chosen, why = results[0]
        for param, (other, other_why) in zip(places, results, strict=True):
            if other != chosen:
                msg = (
                    f"{first.path!r} and {param.path!r} are one tied array, but get different rules: "
                    f"{_short(chosen)} ({why}) and {_short(other)} ({other_why}). "
                    f"Put a pattern for it first, such as ({first.path!r}, {param.path!r})"
                )
                raise TieError(msg)
        return chosen, why

    def _expand(self, rule: AbstractRule, param: Param, reason: str) -> tuple[AbstractRule | None, str]:
        """The rule with the route inside it replaced by the rule it leads to for this parameter."""
        if isinstance(rule, Route):
            return self._follow(rule, param)
        if isinstance(rule, OptimiserChain) and rule.rules:
            for member in rule.rules[:-1]:
                if any(isinstance(inner, Route) for inner in walk(member)):
                    msg = (
                        "a Route in an OptimiserChain must be its last member; put it last, or put the chain inside it: "
                        "Route((pattern, OptimiserChain(...)), ...)"
                    )
                    raise RuleError(msg)
            last, reason = self._expand(rule.rules[-1], param, reason)
            return None if last is None else OptimiserChain(*rule.rules[:-1], last), reason
        if isinstance(rule, (Scheduled, Wrapper)):
            inner, reason = self._expand(rule.rule, param, reason)
            if inner is None:
                return None, reason
            if isinstance(rule, Scheduled):
                known = {name for r in walk(inner) for name in field_names(r)}
                fields = {name: f for name, f in rule.schedules if name in known}
                return (Scheduled(inner, **fields) if fields else inner), reason
            return rule.replace(rule=inner), reason
        if any(isinstance(inner, Route) for inner in walk(rule)):
            msg = f"a Route cannot stand inside {type(rule).__name__}; put {type(rule).__name__} inside the Route"
            raise RuleError(msg)
        return rule, reason

    def _follow(self, route: Route, param: Param) -> tuple[AbstractRule | None, str]:
        _, used = self.used.setdefault(id(route), (route, [False] * len(route.patterns)))
        hits = [matches(pattern, param) for pattern in route.patterns]
        for i, hit in enumerate(hits):
            used[i] = used[i] or hit
        for pattern, rule, hit in zip(route.patterns, route.rules, hits, strict=True):
            if hit:
                why = describe(pattern)
                return self._expand(rule, param, why) if rule is not None else (None, why)
        if route.otherwise is MISSING:
            self.unmatched.append(param.path)
            return None, "unmatched"
        return self._expand(route.otherwise, param, "otherwise") if route.otherwise is not None else (None, "otherwise")

    def finish(self, params: Sequence[Param]) -> None:
        """Raise SelectionError for parameters without a pattern and patterns without a parameter."""
        if self.unmatched:
            paths = ", ".join(map(repr, dict.fromkeys(self.unmatched)))
            msg = f"Route: no pattern matches {paths}. Add a pattern, or otherwise=rule"
            raise SelectionError(msg)
        for route, used in self.used.values():
            for pattern, hit in zip(route.patterns, used, strict=True):
                if not hit:
                    msg = f"Route: the pattern {describe(pattern)} matches no parameter. {known_paths(pattern, params)}"
                    raise SelectionError(msg)


def _short(rule: AbstractRule | None) -> str:
    return "None" if rule is None else rule_text(rule)
