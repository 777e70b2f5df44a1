"""``adjust``: other hyper-parameters, the same state."""

from __future__ import annotations

from typing import Any, TypeVar

from ..errors import ArgumentError, described, locating
from ..rules._adjust import Change, adjust_rule
from ..rules._base import AbstractRule
from ..rules.gradients.accumgrad import gathers_otherwise, regathered
from ..tree.entry import Leaf, host_state
from ..tree.heads import Heads
from ..tree.select import selected
from ..tree.state import StateTree, check_alive, rebuilt, reruled

Target = TypeVar("Target", StateTree, Leaf, AbstractRule)


def adjust(
    target: Target,
    eta: Any = None,
    /,
    *,
    times: Any = None,
    where: Any = None,
    rule: type[AbstractRule] | tuple[type[AbstractRule], ...] | None = None,
    **fields: Any,
) -> Target:
    """A state (or a leaf, or a single rule) with other hyper-parameters. Arrays are shared, not copied.

    One of three kinds of change:

    * ``adjust(state, 1e-4)``: this learning rate for every rule that has one; a rule with two keeps their ratio at setup;
    * ``adjust(state, times=0.3)``: every learning rate to 0.3 of the one given at setup, however often it was adjusted;
    * ``adjust(state, eta=1e-4, beta=(0.9, 0.95))``: fields by name, in every rule that has them, chains included.

    Args:
        where: parameters to act on: a glob on the path, the type of the owner, a predicate on `Param`, or a tuple.
        rule: type of rule to act on, wherever it stands (in chains, wrappers, ``Muon.opt``, ``Apollo.opt``).

    Raises UnknownFieldError if no selected rule has the field; SelectionError if ``where`` or ``rule`` selects nothing;
    HyperParameterError for a value out of range, a field fixed at setup, or a scheduled field.
    """
    given = [eta is not None, times is not None, bool(fields)]
    if sum(given) != 1:
        kinds = [name for name, here in zip(("a learning rate", "times=", "fields by name"), given, strict=True) if here]
        msg = (
            "adjust: give a learning rate, or times=, or fields by name, one of the three; got "
            f"{' and '.join(kinds) or 'none of them'}"
        )
        raise ArgumentError(msg)
    types = rule if isinstance(rule, tuple) else () if rule is None else (rule,)
    if not all(isinstance(t, type) and issubclass(t, AbstractRule) for t in types):
        msg = f"adjust: rule= takes a type of rule, such as rule=opt.Adam, or a tuple of types; got {rule!r}"
        raise ArgumentError(msg)
    change = Change(eta, times, fields, rule)
    if isinstance(target, StateTree):
        return _adjust_tree(target, change, where)
    if where is not None:
        msg = f"adjust: where= selects parameters of a state tree; {type(target).__name__} has none"
        raise ArgumentError(msg)
    if isinstance(target, AbstractRule):
        return adjust_rule(target, change)
    if isinstance(target, Leaf):
        if target.rule is None:
            msg = "adjust: this leaf is not trained, so it has no rule"
            raise ArgumentError(msg)
        new = adjust_rule(target.rule, change)
        gathered = gathers_otherwise(target.rule, new)
        return Leaf(new, regathered(target.state, target.rule, new) if gathered else target.state, target.frozen)
    msg = f"adjust: expected the state that setup returned, or a rule; got {described(target)}"
    raise ArgumentError(msg)


def _adjust_tree(state: StateTree, change: Change, where: Any) -> StateTree:
    check_alive(state)
    heads = state._by_kind
    hit = None
    if where is not None:
        hit = selected([slot.param for slot in state._slots], where)
        heads = heads.split(hit)
    new = list(heads.rules.distinct)
    found: set[str] = set()
    rules = []
    for kind, slot in enumerate(heads.firsts):
        rule, base = new[kind], heads.given[slot].base
        if rule is None or base is None or (hit is not None and not hit[slot]):
            continue
        with locating(state._slots[slot].path):
            new[kind], names = change.apply(rule, base)
        found |= names
        rules.append(rule)
    change.refuse_unfound(found, rules)
    return _with_gathered(state, heads, heads.with_rules(new))


def _with_gathered(state: StateTree, before: Heads, heads: Heads) -> StateTree:
    """The state with these rules, and with what an AccumGrad has gathered in the weight that it has now."""
    after = reruled(state, heads)
    old, new = before.rules.distinct, heads.rules.distinct
    changed = {kind for kind, (was, now) in enumerate(zip(old, new, strict=True)) if gathers_otherwise(was, now)}
    if not changed:
        return after
    entries = list(after._entries)
    for i, kind in enumerate(heads.rules.kinds):
        if kind in changed:
            was: Any = old[kind]
            entries[i] = entries[i].replace(state=regathered(host_state(entries[i]), was, entries[i].rule))  # type: ignore[arg-type]
    return rebuilt(after, entries)
