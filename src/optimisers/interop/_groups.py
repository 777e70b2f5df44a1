"""The parameter groups of the adapter, and what it knows of them besides the dicts that torch shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import HyperParameterError, SelectionError, TieError
from ..rules._base import AbstractRule, walk
from ..setup_api.route import Chooser, Route
from ..tree.entry import Entry
from ..tree.leaves import Place
from ..tree.param import Param
from ..tree.state import StateTree, rebuilt, reruled
from ..tree.structure import ModuleStructure
from ._entries import Betas, Entries, changed_betas, repowered, scalable


class Group(NamedTuple):
    """What is known of one parameter group besides the dict that torch shows."""

    entries: Entries
    slots: tuple[int, ...]
    """The numbers of its arrays in the state tree."""
    places: tuple[tuple[str, int], ...]
    """For each parameter its name, and the number of its array, -1 where that array was named before."""
    seen: dict[str, Any]
    """The hyper-parameters as the rules have them now."""
    rule: AbstractRule
    """As it was when the group was last without parameters, for those that come to it then."""
    base: AbstractRule
    params: tuple[torch.Tensor, ...] = ()
    shown: Mapping[str, Any] = {}
    """The dict in ``param_groups``."""

    def newcomers(self) -> AbstractRule:
        """The rule of what comes to the group while it is without parameters."""
        values = self.entries.values(self.rule)
        changes = {
            key: value for key, value in self.seen.items() if key in values and self.entries.changes({key: value}, values)
        }
        return self.entries.apply(changes, self.rule, self.base)

    def is_as_known(self, group: Mapping[str, Any]) -> bool:
        """Whether this is the dict of the group, with the same parameter objects in the same order."""
        params = group["params"]
        return group is self.shown and len(params) == len(self.params) and all(map(is_, params, self.params))


class Home(NamedTuple):
    """Where a parameter belongs that was frozen when it was given."""

    rule: AbstractRule | None
    """Its rule; None for one that the optimizer was given as a function."""
    groups: list[dict[str, Any]]
    """The groups of those that were given with it."""
    names: tuple[str, ...]
    """Of all that were given with it, in their order."""


@dataclass
class Held:
    """What an optimizer holds besides its parameter groups.

    In one object, because wrappers that pass attributes on for reading (Lightning's) would keep what is assigned to them.
    """

    tree: StateTree | None = None
    groups: list[Group] = field(default_factory=list)
    untrained: dict[str, None] = field(default_factory=dict)
    """The names of parameters that belong to the state's structure and are in no group."""
    frozen: dict[torch.Tensor, str] = field(default_factory=dict)
    """Parameters that were left out because they did not require grad, and their names."""
    homes: dict[torch.Tensor, Home] = field(default_factory=dict)
    """Where these belong, should they be thawed."""
    parked: Any = field(default_factory=WeakTensorKeyDictionary)
    """(name, entry) of parameters that were taken out of their group, for as long as they live."""
    view: defaultdict[torch.Tensor, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """``optimizer.state``."""
    shown: dict[torch.Tensor, dict[str, Any]] | None = None
    """The tensors that the view was filled with; None when the step has moved on."""

    def bind(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Note which dicts and parameter objects the groups are."""
        self.groups = [
            known._replace(params=tuple(group["params"]), shown=group)
            for known, group in zip(self.groups, param_groups, strict=True)
        ]
        for x in (x for known in self.groups for x in known.params):
            self.frozen.pop(x, None)
            self.homes.pop(x, None)

    def outdate(self) -> None:
        """Have the view filled anew when it is read next, since the state tree has moved on."""
        if self.shown is not None:
            self.shown = None
            for x in list(self.parked):  # the view must not keep them alive
                self.view.pop(x, None)

    def note_untrained(self) -> None:
        """Note the names of the structure that no array of the tree has."""
        tree: Any = self.tree
        paths = tree._structure.paths
        used = {paths[place.leaf] for slot in tree._slots for place in slot.places}
        self.untrained = {path: None for path in paths if path not in used}


def for_each(rule: Any) -> Any:
    """The rule as a function of one parameter, for a few parameters that need not match every pattern of a Route."""
    if not (isinstance(rule, AbstractRule) and any(isinstance(inner, Route) for inner in walk(rule))):
        return rule

    def routed(param: Param) -> AbstractRule | None:
        chooser = Chooser(rule)
        chosen, _ = chooser.choose((param,))
        if chooser.unmatched:
            msg = f"Route: no pattern matches {param.path!r}. Give the parameter group a rule: {{'params': ..., 'rule': ...}}"
            raise SelectionError(msg)
        return chosen

    return routed


def with_rates(tree: StateTree) -> StateTree:
    """The state tree with a learning rate in every rule: one without gets a factor of 1 on its step."""
    done: dict[int, AbstractRule] = {}  # arrays that share a rule go on sharing it
    entries = []
    for entry in tree._entries:
        if entry.rule is None or entry.base is None:
            entries.append(entry)
            continue
        rules = []
        state = entry.state
        for old in (entry.base, entry.rule):
            new, state = scalable(old, entry.state)
            rules.append(done.setdefault(id(old), new))
        entries.append(entry.replace(base=rules[0], rule=rules[1], state=state))
    return rebuilt(tree, entries)


def joined(first: StateTree | None, second: StateTree) -> StateTree:
    """Two state trees over named parameters as one."""
    if first is None:
        return second
    a: Any = first._structure
    b: Any = second._structure
    paths = list(dict.fromkeys(a.paths + b.paths))  # a name that stands in both was not trained so far
    where = {path: i for i, path in enumerate(paths)}
    slots = [replace(s, places=tuple(Place(where[b.paths[p.leaf]], p.permutation) for p in s.places)) for s in second._slots]
    structure = ModuleStructure(tuple(paths), a.aliases + b.aliases)
    return StateTree(structure, (*first._slots, *slots), (*first._entries, *second._entries))


def by_rule(entries: Iterable[Entry]) -> list[list[int]]:
    """The numbers of the entries with equal rules, in the order of the first of each."""
    groups: dict[AbstractRule, list[int]] = {}
    known: dict[int, AbstractRule] = {}
    for i, entry in enumerate(entries):
        rule: Any = entry.rule
        if id(rule) not in known:
            known[id(rule)] = rule.unresolved()
        groups.setdefault(known[id(rule)], []).append(i)
    return list(groups.values())


def with_entries(
    tree: Any, groups: Sequence[Group], changes: Sequence[Mapping[str, Any]], *, loaded: bool = False
) -> StateTree:
    """The state tree with other hyper-parameters in some groups; loaded states belong to these already."""
    labels = [-1] * len(tree._slots)
    for i, known in enumerate(groups):
        for number in known.slots:
            labels[number] = i
    heads = tree._by_kind.split(labels)
    new = list(heads.rules.distinct)
    repower: dict[int, Betas] = {}
    for kind, first in enumerate(heads.firsts):
        i = labels[first]
        old: Any = new[kind]
        if i < 0 or not changes[i]:
            continue
        with naming_group(i):
            new[kind] = groups[i].entries.apply(changes[i], old, heads.given[first].base)
        if not loaded and (betas := changed_betas(old, new[kind])):
            repower[kind] = betas
    new_tree = reruled(tree, heads.with_rules(new))
    if not repower:
        return new_tree
    entries = list(new_tree._entries)
    for number, kind in enumerate(heads.rules.kinds):
        if kind in repower:
            entries[number] = entries[number].replace(state=repowered(entries[number].state, repower[kind]))
    return rebuilt(tree, entries)


@contextmanager
def naming_group(number: int) -> Iterator[None]:
    """Name the group in an error about its entries."""
    try:
        yield
    except HyperParameterError as error:
        error.args = (f"param_groups[{number}], {error}",)
        raise


def settle(known: Group, group: dict[str, Any], changed: Mapping[str, Any], tree: Any) -> None:
    """Note the hyper-parameters that were taken over, and show in the group those that follow from them."""
    if not changed:
        return
    rule = tree._heads[known.slots[0]].rule if known.slots else known.entries.apply(changed, known.newcomers(), known.base)
    values = known.entries.values(rule)
    if "betas" in changed and not known.entries.own_betas:
        values["betas"] = (values["betas"][0], *changed["betas"][1:])
    group.update({key: value for key, value in values.items() if key not in changed})
    known.seen.update(values, **changed)


def refuse_overlaps(groups: Sequence[Sequence[tuple[int, Any]]], names: Sequence[str]) -> None:
    """Raise TieError for parameters of one memory of which one has just come."""
    for places in groups:
        if len(places) > 1:
            first, second = (names[i] for i, _ in places[:2])
            msg = f"{first!r} and {second!r} share their memory; give both at once, when the optimizer is made"
            raise TieError(msg)
