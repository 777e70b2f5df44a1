"""``hyper``: the hyper-parameters in effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..errors import ArgumentError, described
from ..rules import Apollo, OptimiserChain, Scheduled
from ..rules._adjust import field_names
from ..rules._base import AbstractRule, children
from ..rules._wrapper import Wrapper
from ..rules.matrices._matrix_rule import MatrixRule
from ..tree.entry import host_state
from ..tree.leaves import Slot
from ..tree.state import StateTree, check_alive


def hyper(state: StateTree) -> dict[str, dict[str, Any]]:
    """The hyper-parameters in effect, by path and field: ``hyper(state)["encoder.weight"]["eta"]``.

    They are what the next step will use: scheduled fields have the value that their schedule gives for the array's present
    count, and an array that Muon or Apollo leaves to its ``opt`` shows the fields of that rule alone. Chains and wrappers are
    flattened: a field that several rules of one array have is shown for each, with the type in front, as
    ``"WeightDecay.lambda_"`` and ``"AdamW.lambda_"`` (``"ClipNorm#2.omega"`` for the second rule of a type). An array that is
    not trained has none.
    """
    if not isinstance(state, StateTree):
        msg = f"hyper: expected the state that setup returned, got {described(state)}"
        raise ArgumentError(msg)
    check_alive(state)
    found = {}
    for slot, entry in zip(state._slots, state._entries, strict=True):
        rules = [] if entry.rule is None else list(acting(entry.rule, host_state(entry), slot))
        found[slot.path] = _flat(rules)
    return found


def acting(rule: AbstractRule, state: Any, slot: Slot) -> Iterator[AbstractRule]:
    """The rules that step an array, outermost first, with schedules evaluated and without rules it is not left to.

    Args:
        state: of the rule; None inside a user's rule made of rules, where only that rule knows which part is whose.

    """
    if isinstance(rule, Scheduled):
        # The rule at this step has the structure of the rule inside, and so its state.
        count, inner = state if state is not None else (None, None)
        yield from acting(rule.at(count) if isinstance(count, int) else rule.rule, inner, slot)
    elif isinstance(rule, OptimiserChain) and state is not None:
        for member, inner_state in zip(rule.rules, state, strict=True):
            yield from acting(member, inner_state, slot)
    elif isinstance(rule, Wrapper):
        yield rule
        yield from acting(rule.rule, None if state is None else state[-1], slot)
    elif (isinstance(rule, MatrixRule) and rule._matrix is False) or (isinstance(rule, Apollo) and len(slot.param.shape) < 2):
        yield from acting(rule.opt, state, slot)
    else:
        yield rule
        if not isinstance(rule, MatrixRule):  # whose opt has no part in stepping a matrix
            for _, _, child in children(rule):
                yield from acting(child, None, slot)


def _flat(rules: list[AbstractRule]) -> dict[str, Any]:
    """The fields of rules side by side, with the type of the rule in front where one name stands for several."""
    fields = [{name: getattr(rule, name) for name in _own_fields(rule)} for rule in rules]
    often = Counter(name for own in fields for name in own)
    kinds = Counter(type(rule).__name__ for rule in rules)
    seen: Counter[str] = Counter()
    flat = {}
    for rule, own in zip(rules, fields, strict=True):
        kind = type(rule).__name__
        seen[kind] += 1
        label = f"{kind}#{seen[kind]}" if kinds[kind] > 1 else kind
        flat.update({name if often[name] == 1 else f"{label}.{name}": value for name, value in own.items()})
    return flat


def _own_fields(rule: AbstractRule) -> list[str]:
    """The names of a rule's fields that hold no rules."""
    holding = {name for name, _, _ in children(rule)}
    return [name for name in field_names(rule) if name not in holding]
