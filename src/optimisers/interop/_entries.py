"""The hyper-parameters of a rule as the entries of a torch parameter group, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..arrays import is_number
from ..errors import HyperParameterError
from ..rules import AdaDelta, AdaptiveGradNormControl, Descent, OptimiserChain, RMSProp
from ..rules._adjust import field_names, has_eta, with_eta
from ..rules._base import AbstractRule, CompositeRule, children, walk, with_child
from ..rules._fields import is_tensor

NAMES = {
    "beta": "betas",
    "epsilon": "eps",
    "lambda_": "weight_decay",
    "rho": "momentum",
    "mu": "momentum",
    "centred": "centered",
}
# What torch calls a field where it means something else than in most rules.
_NAMES_IN: dict[tuple[type[AbstractRule], str], str] = {
    (RMSProp, "rho"): "alpha",
    (AdaDelta, "rho"): "rho",
    (AdaptiveGradNormControl, "momentum"): "norm_momentum",
}

Step = tuple[str, int | None]


class Entry(NamedTuple):
    """One entry of a parameter group: its key, and the field of which rule (by the steps from the whole) it stands for."""

    key: str
    steps: tuple[Step, ...]
    field: str


class Entries:
    """The entries of one parameter group, for all rules that are built as this one is.

    ``lr`` is the learning rate of the whole, as positional ``adjust`` sets it; of a chain with several, that of the last
    member that has one, since it scales the step that the others made. Each other number that ``adjust`` could set
    has its entry, under torch's name where torch has one; a name that is taken is preceded by the rule's, and fields of a
    rule that only stands in for another (``Muon.opt``) by ``"opt."``. Without a ``beta`` in the rule, ``betas`` is
    ``(momentum, 0.0)``, so that schedulers that cycle the momentum find what they look for in every group.
    """

    def __init__(self, rule: AbstractRule) -> None:
        self.kind = sketch(rule)
        self.rate = _rate_steps(rule)
        self.entries = _entries(rule)
        self.keys = ("lr", "betas", *(e.key for e in self.entries if e.key != "betas"))
        self.own_betas = any(e.key == "betas" for e in self.entries)

    def values(self, rule: AbstractRule) -> dict[str, Any]:
        """The entries of a group with this rule."""
        values = {entry.key: getattr(_at(rule, entry.steps), entry.field) for entry in self.entries}
        rates = (r for r in walk(_at(rule, self.rate)) if "eta" in field_names(r))
        first = {"lr": next(rates).eta}  # type: ignore[attr-defined]
        if not self.own_betas:
            first["betas"] = (values.get("momentum", 0.0), 0.0)
        return {**first, **values}

    def changes(self, group: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
        """The entries that differ from those seen last."""
        return {key: group[key] for key in self.keys if key in group and not _same(group[key], seen[key])}

    def apply(self, changes: Mapping[str, Any], rule: AbstractRule, base: AbstractRule) -> AbstractRule:
        """The rule with these entries; ``base`` is the rule at construction, whose ratios of learning rates are kept.

        Raises HyperParameterError for a value out of its range and for a field that follows a schedule of its own.
        """
        changes = dict(changes)
        if "betas" in changes and not self.own_betas:
            beta = changes.pop("betas")
            if any(entry.key == "momentum" for entry in self.entries):
                changes.setdefault("momentum", beta[0])
        for entry in self.entries:
            if entry.key in changes:
                value = _scalar(changes[entry.key])
                with _naming(entry.key):
                    rule = _with_field(rule, entry.steps, entry.field, value)
        if "lr" in changes:
            with _naming("lr"):
                rule = _with_rate(rule, self.rate, _scalar(changes["lr"]), base)
        return rule


Betas = list[tuple[tuple[float, ...], tuple[float, ...]]]


def changed_betas(old: AbstractRule, new: AbstractRule) -> Betas:
    """(beta before, beta now) of each rule inside where it was changed."""
    pairs = [(getattr(a, "beta", None), getattr(b, "beta", None)) for a, b in zip(walk(old), walk(new), strict=True)]
    return [
        (a, b)
        for a, b in pairs
        if isinstance(a, tuple) and isinstance(b, tuple) and all(is_number(v) for v in (*a, *b)) and a != b
    ]


def repowered(state: Any, betas: Betas) -> Any:
    """The state after betas were changed, its powers those of the betas as they are now.

    torch corrects for the start of the moments by ``1 - beta**t`` with beta as it is now, whatever it was before. So a
    scheduler that cycles the momentum has the same effect here; ``adjust`` on a state leaves the product as it is.
    """
    for old, new in betas:
        state = _repowered(state, old, new)
    return state


def _repowered(state: Any, old: tuple[float, ...], new: tuple[float, ...]) -> Any:
    if isinstance(state, tuple) and 2 <= len(state) <= len(old) and all(type(value) is float for value in state):
        first = old[: len(state)]  # a rule may keep no power of its last beta
        n = _common_exponent(state, first)
        return state if n is None else tuple(b**n for b in new[: len(state)])
    if isinstance(state, (tuple, list)):
        items = [_repowered(value, old, new) for value in state]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return state


def _common_exponent(powers: tuple[float, ...], bases: tuple[float, ...]) -> int | None:
    """n if powers are bases**n, up to rounding and underflow."""
    exponents = [math.log(p) / math.log(b) for p, b in zip(powers, bases, strict=True) if p > 0 and b > 0]
    if not exponents:
        return None
    n = round(exponents[-1])
    fits = all(math.isclose(p, b**n, rel_tol=1e-9, abs_tol=1e-300) for p, b in zip(powers, bases, strict=True))
    return n if fits and n > 0 else None


def sketch(rule: AbstractRule) -> str:
    """How a rule is built, without its numbers: ``"OptimiserChain(ClipNorm, AdamW)"``."""
    inside = ", ".join(sketch(child) for _, _, child in children(rule))
    return type(rule).__name__ + (f"({inside})" if inside else "")


def scalable(rule: AbstractRule, state: Any) -> tuple[AbstractRule, Any]:
    """(rule, state) with a learning rate: a rule without one gets a factor of 1 on its step."""
    if has_eta(rule):
        return rule, state
    if _inner(rule) is not None:  # what wraps a rule keeps that rule's state last
        inner, kept = scalable(_inner(rule), state[-1])  # type: ignore[arg-type]
        items = (*state[:-1], kept)
        return rule.replace(rule=inner), (type(state)(*items) if hasattr(state, "_fields") else items)
    if not isinstance(rule, OptimiserChain):
        return OptimiserChain(rule, Descent(1.0)), (state, None)
    if rule.rules and any(member.final for member in walk(rule.rules[-1])):  # nothing may follow it
        last, kept = scalable(rule.rules[-1], state[-1])
        return OptimiserChain(*rule.rules[:-1], last), (*state[:-1], kept)
    return OptimiserChain(*rule.rules, Descent(1.0)), (*state, None)


def _inner(rule: AbstractRule) -> AbstractRule | None:
    """The rule that this one wraps."""
    inner = getattr(rule, "rule", None)
    return inner if isinstance(rule, CompositeRule) and isinstance(inner, AbstractRule) else None


def _rate_steps(rule: AbstractRule) -> tuple[Step, ...]:
    """Where the learning rate of the whole stands: in a chain, in the last member that has one, as it scales the step."""
    inner = _inner(rule)
    if inner is not None:
        return (("rule", None), *_rate_steps(inner))
    if isinstance(rule, OptimiserChain):
        i = max(i for i, member in enumerate(rule.rules) if has_eta(member))
        return (("rules", i), *_rate_steps(rule.rules[i]))
    return ()


def _entries(rule: AbstractRule) -> list[Entry]:
    found = list(_fields(rule, (), ""))
    found.sort(key=lambda item: "eta" not in field_names(item[0]))  # rules with a learning rate choose their names first
    taken = {"lr", "params", "param_names", "rule", "maximize"}
    entries = []
    for owner, steps, field, prefix in found:
        key = prefix + (_NAMES_IN.get((type(owner), field)) or NAMES.get(field, field))
        if key in taken:
            count = 1
            while (named := f"{type(owner).__name__}{'' if count == 1 else count}.{key}") in taken:
                count += 1
            key = named
        taken.add(key)
        entries.append(Entry(key, steps, field))
    return entries


def _fields(
    rule: AbstractRule, steps: tuple[Step, ...], prefix: str
) -> Iterator[tuple[AbstractRule, tuple[Step, ...], str, str]]:
    for name in field_names(rule):
        if name != "eta" and name not in rule.structural and _plain(getattr(rule, name)):
            yield rule, steps, name, prefix
    for name, index, child in children(rule):
        inner = f"{prefix}{name}." if name in rule.opaque else prefix
        yield from _fields(child, (*steps, (name, index)), inner)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_plain(item) for item in value)
    return isinstance(value, bool) or is_number(value) or is_tensor(value)


def _at(rule: Any, steps: tuple[Step, ...]) -> Any:
    for name, index in steps:
        rule = getattr(rule, name) if index is None else getattr(rule, name)[index]
    return rule


def _with_field(rule: AbstractRule, steps: tuple[Step, ...], field: str, value: Any) -> AbstractRule:
    rule.refuse_change(field, value)
    if not steps:
        return rule.replace(**{field: value})
    (name, index), rest = steps[0], steps[1:]
    return with_child(rule, name, index, _with_field(_at(rule, steps[:1]), rest, field, value))


def _with_rate(rule: AbstractRule, steps: tuple[Step, ...], lr: Any, base: AbstractRule) -> AbstractRule:
    if not steps:
        return with_eta(rule, lr, base)
    rule.refuse_change("eta", lr)
    (name, index), rest = steps[0], steps[1:]
    return with_child(rule, name, index, _with_rate(_at(rule, steps[:1]), rest, lr, _at(base, steps[:1])))


def _scalar(value: Any) -> Any:
    """An entry as a rule has it: tensors of one element without axes (in the same memory, so what fills them acts)."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_scalar, value))
    return value.reshape(()) if is_tensor(value) and value.numel() == 1 else value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if is_tensor(a) or is_tensor(b):
        return False
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Name the entry in an error about its value."""
    try:
        yield
    except HyperParameterError as error:
        error.args = (f"{key!r}: {error}",)
        raise
