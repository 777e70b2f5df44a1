"""The state dict of the adapter: torch's layout, with the rules of each group as plain data, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import CheckpointError, StructureError
from ..rules._base import AbstractRule
from ..setup_api.setup import initial_state
from ..tree.entry import Entry
from . import _rule_text
from ._groups import Group, Held
from ._tensors import filled, named_tensors

# --- out -------------------------------------------------------------------------------------------------------------


def packed(
    param_groups: Sequence[Mapping[str, Any]], groups: Sequence[Group], entries: Sequence[Entry], view: Mapping[Any, Any]
) -> dict[str, Any]:
    """Groups and states as torch lays them out, with numbers in the place of parameters."""
    numbers: dict[int, int] = {}
    shown = []
    for group, known in zip(param_groups, groups, strict=True):
        own = {key: value for key, value in group.items() if key != "params"}
        own["params"] = [numbers.setdefault(id(x), len(numbers)) for x in group["params"]]
        own["rule"] = _packed_rule(known, entries)
        shown.append(own)
    state = {}
    for key, tensors in view.items():
        if not isinstance(key, torch.Tensor):
            state[key] = tensors
        elif id(key) in numbers:
            state[numbers[id(key)]] = tensors
    return {"state": state, "param_groups": shown}


def _packed_rule(known: Group, entries: Sequence[Entry]) -> dict[str, Any]:
    """What the entries of a group cannot say: each distinct (rule, rule at setup), whose it is, and what is frozen.

    Positions are those in the group's list of parameters. Whose it is is left out where there is only one.
    """
    distinct: dict[tuple[AbstractRule, AbstractRule], int] = {}
    seen: dict[tuple[int, int], int] = {}
    of, frozen = [], []
    for position, (_, number) in enumerate(known.places):
        entry: Any = entries[number] if number >= 0 else None
        if entry is None:
            of.append(0)
            continue
        key = id(entry.rule), id(entry.base)
        if key not in seen:
            seen[key] = distinct.setdefault((entry.rule.unresolved(), entry.base.unresolved()), len(distinct))
        of.append(seen[key])
        if entry.frozen:
            frozen.append(position)
    rules = [[_rule_text.described(rule, _kept) for rule in pair] for pair in distinct or [(known.rule, known.base)]]
    result: dict[str, Any] = {"kind": known.entries.kind, "rules": rules}
    if len(rules) > 1:
        result["of"] = of
    if frozen:
        result["frozen"] = frozen
    return result


def _kept(x: Any) -> Any:
    return x.detach().clone()


# --- and back --------------------------------------------------------------------------------------------------------


def kind_of(saved: Mapping[str, Any]) -> str | None:
    """How the rule of a saved group is built, None if that is not known."""
    rule = saved.get("rule")
    return rule.get("kind") if isinstance(rule, Mapping) else rule


def loaded_entries(
    held: Held, sources: Any, states: Mapping[Any, Any], dtype: str | None
) -> tuple[list[Entry], dict[torch.Tensor, dict[str, Any]]]:
    """The entries with the rules and tensors of a state dict, and what users put beside these."""
    tree: Any = held.tree
    entries, extras = list(tree._entries), {}
    for known, (saved, ids) in zip(held.groups, sources, strict=True):
        kind = kind_of(saved)
        if kind is not None and kind != known.entries.kind:
            name = known.places[0][0] if known.places else "a group"
            msg = f"the saved state of {name!r} is that of {kind}, and its rule is {known.entries.kind}"
            raise StructureError(msg)
        with_saved_rules(saved, ids, known, entries, known.params)
        for (name, number), key, x in zip(known.places, ids, known.params, strict=True):
            tensors = states.get(key) or {}
            if kind is not None:
                extras[x] = {k: v for k, v in tensors.items() if not str(k).startswith("state")}
                tensors = {k: v for k, v in tensors.items() if k not in extras[x]}
            if number >= 0:
                entry: Any = entries[number]
                if tensors or not named_tensors(entry.state):
                    state = filled(entry.state, tensors, name, onto=x.device)
                else:  # as with torch, what the state dict holds no state of begins anew
                    state = initial_state(entry.rule, tree._slots[number], x, dtype)
                entries[number] = entry.replace(state=state)
    return entries, {x: found for x, found in extras.items() if found}


def with_saved_rules(
    saved: Mapping[str, Any], ids: Sequence[Any], known: Group, entries: list[Entry], xs: Sequence[torch.Tensor]
) -> None:
    """Give the entries of a group the rules, the rules at setup and the frozen flags that were saved with it."""
    told = saved.get("rule")
    if not isinstance(told, Mapping):
        return
    keys = _saved_order(saved, ids)
    of, frozen = told.get("of"), set(told.get("frozen", ()))
    made: dict[int, list[AbstractRule]] = {}
    shared: dict[AbstractRule, AbstractRule] = {}
    for (name, number), key, x in zip(known.places, keys, xs, strict=True):
        if number < 0:
            continue
        entry: Any = entries[number]
        which = of[key] if of else 0
        if which not in made:
            likes = entry.rule.unresolved(), entry.base.unresolved()
            pair = zip(told["rules"][which], likes, strict=True)
            made[which] = [_rebuilt(text, like, f"the saved rule of {name!r}") for text, like in pair]
        rule, base = made[which]
        if rule != entry.rule.unresolved() or base != entry.base.unresolved():
            here = [r.resolved(x, name) for r in (rule, base)]
            entry = entry.replace(rule=shared.setdefault(here[0], here[0]), base=shared.setdefault(here[1], here[1]))
        entries[number] = entry.replace(frozen=key in frozen)


def _saved_order(saved: Mapping[str, Any], ids: Sequence[Any]) -> list[int]:
    """The position of each key in the group as it was saved; distributed checkpoints reorder ``params``."""
    names = saved.get("param_names")
    by_name = bool(ids) and isinstance(ids[0], str) and names is not None and set(ids) == set(names)
    order = {key: i for i, key in enumerate(names if by_name and names else saved["params"])}
    return [order[key] for key in ids]


def _rebuilt(text: Any, like: AbstractRule, where: str) -> AbstractRule:
    try:
        rule: AbstractRule = _rule_text.rebuilt(text, _kept, like, where)
    except CheckpointError as error:
        raise StructureError(str(error)) from None
    return rule


def matched(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], list[Any]]]:
    """For each group the saved one to load, and the keys of its parameters' states in the group's own order."""
    if all("param_names" in group for group in groups) and all(_names(group) is not None for group in saved):
        return _matched_by_name(groups, saved)
    if len(groups) != len(saved):
        msg = f"loaded state dict has a different number of parameter groups: {len(saved)} for {len(groups)}"
        raise ValueError(msg)
    for i, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            msg = (
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"param_groups[{i}] has {len(group['params'])} parameters, the loaded one {len(other['params'])}"
            )
            raise ValueError(msg)
    return [(other, list(other["params"])) for other in saved]


def _names(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a saved group's parameters: distributed checkpoints have them in the place of numbers."""
    if group["params"] and all(isinstance(key, str) for key in group["params"]):
        return list(group["params"])
    names = group.get("param_names")
    return list(names) if names is not None and len(names) == len(group["params"]) else None


def _matched_by_name(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], list[Any]]]:
    where = {
        name: (i, key) for i, other in enumerate(saved) for name, key in zip(_names(other) or (), other["params"], strict=True)
    }
    _refuse_other_names([name for group in groups for name in group["param_names"]], where)
    empty = [other for other in saved if not other["params"]]
    result: list[tuple[Mapping[str, Any], list[Any]]] = []
    for i, group in enumerate(groups):
        sources = {where[name][0] for name in group["param_names"]}
        if len(sources) > 1:
            apart = [next(n for n in group["param_names"] if where[n][0] == j) for j in sorted(sources)]
            msg = f"{' and '.join(map(repr, apart))} have one rule here, and different ones in the loaded state"
            raise StructureError(msg)
        if not sources:  # without parameters: the group at the same place, if that has none either
            at = saved[i] if i < len(saved) and any(saved[i] is other for other in empty) else {"params": []}
            result.append((at, []))
            continue
        result.append((saved[sources.pop()], [where[name][1] for name in group["param_names"]]))
    return result


def _refuse_other_names(wanted: Sequence[str], where: Iterable[str]) -> None:
    known = set(where)
    missing, extra = [n for n in wanted if n not in known], [n for n in where if n not in set(wanted)]
    if missing or extra:
        parts = [f"lacks {', '.join(map(repr, missing[:8]))}"] if missing else []
        parts += [f"holds {', '.join(map(repr, extra[:8]))}, which this optimizer does not have"] if extra else []
        msg = (
            f"the loaded state {' and '.join(parts)}. To match renamed parameters by order, take 'param_names' out of the "
            "loaded param_groups"
        )
        raise StructureError(msg)
