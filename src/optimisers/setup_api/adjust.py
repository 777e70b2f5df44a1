"""``adjust``: other hyper-parameters, the same state."""

from __future__ import annotations

from typing import Any, TypeVar

from ..errors import ArgumentError
from ..rules._adjust import Change, adjust_rule, nothing_found
from ..rules._base import AbstractRule, walk
from ..tree.select import selected
from ..tree.state import Leaf, StateTree, check_alive, rebuilt

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

    where: parameters to act on: a glob on the path, the type of the owner, a predicate on :class:`Param`, or a tuple.
    rule: type of rule to act on, wherever it stands (in chains, wrappers, ``Muon.opt``, ``Apollo.opt``).

    Raises UnknownFieldError if no selected rule has the field; SelectionError if ``where`` selects nothing;
    HyperParameterError for a value out of range, a field fixed at setup, or a scheduled field.
    """
    given = [eta is not None, times is not None, bool(fields)]
    if sum(given) != 1:
        msg = "adjust: give a learning rate, or times=, or fields by name; one of the three"
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
        return Leaf(adjust_rule(target.rule, change), target.state, target.frozen)
    msg = f"adjust: expected a state from setup, or a rule; got {type(target).__name__}"
    raise ArgumentError(msg)


def _adjust_tree(state: StateTree, change: Change, where: Any) -> StateTree:
    check_alive(state)
    chosen = selected([slot.param for slot in state._slots], where)
    done: dict[tuple[int, int], AbstractRule] = {}  # leaves that share a rule go on sharing it
    found: set[str] = set()
    entries, rules = [], []
    for slot, entry, hit in zip(state._slots, state._entries, chosen, strict=True):
        if not hit or entry.rule is None or entry.base is None:
            entries.append(entry)
            continue
        key = (id(entry.rule), id(entry.base))
        if key not in done:
            try:
                done[key], names = change.apply(entry.rule, entry.base)
            except Exception as error:
                error.add_note(f"while adjusting the rule of the parameter {slot.path!r}: {entry.rule!r}")
                raise
            found |= names
            rules.append(entry.rule)
        entries.append(entry.replace(rule=done[key]))
    if change.rule is not None and not any(isinstance(r, change.rule) for top in rules for r in walk(top)):
        present = sorted({type(r).__name__ for top in rules for r in walk(top)})
        wanted = change.rule if isinstance(change.rule, tuple) else (change.rule,)
        kinds = " or ".join(t.__name__ for t in wanted)
        msg = f"adjust: no selected parameter has a rule of type {kinds}; there are {', '.join(present)}"
        raise ArgumentError(msg)
    missing = sorted((set(change.fields) or {"eta"}) - found)
    if missing:
        raise nothing_found(missing, rules)
    return rebuilt(state, entries)
