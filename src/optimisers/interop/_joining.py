"""Parameters on their way into the adapter: a part of them becomes groups, and joins the state tree."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..arrays import on_meta
from ..errors import ArgumentError, ModelError, RuleError
from ..rules._base import AbstractRule
from ..setup_api.setup import planned, setup
from ..tree.state import StateTree, check_alive
from ..tree.structure import ModuleStructure
from ._entries import Entries
from ._groups import Group, Held, Home, by_rule, for_each, joined, naming_group, with_rates
from ._named import Given, Named, given
from ._options import refuse_idle_options

_TWICE = "optimizer contains a parameter group with duplicate parameters, which are stepped once"


class Joining:
    """Takes parameters in.

    Attributes:
        held: what they join.
        rule: for those that bring none of their own.
        state_dtype: of their moments.
        named: whether the groups that are there have names.

    """

    def __init__(self, held: Held, rule: Any, state_dtype: Any, *, named: bool) -> None:
        self.held, self.rule, self.state_dtype, self.named = held, rule, state_dtype, named

    def taken(self, part: Mapping[str, Any], *, maximize: bool, alone: bool, whole: bool = False) -> list[dict[str, Any]]:
        """The groups of one part of the parameters, which joins the state tree."""
        held = self.held
        own = dict(part)
        model = given(own.pop("params"), first=len(held.tree._structure.paths) if held.tree is not None else 0)
        if not model.named and self.named:
            model = self._named(model)
        rule = own.pop("rule", None)
        own.pop("param_names", None)
        rule = self.rule if rule is None or isinstance(rule, str) else rule
        if isinstance(rule, StateTree) and not alone:
            msg = (
                "this optimizer was made from a state, so a further parameter group needs its own: {'params': ..., 'rule': ...}"
            )
            raise RuleError(msg)
        params = _tensors_of(model.model)
        if isinstance(model.model, Named) and len(set(params.values())) < len(params):
            warnings.warn(_TWICE, stacklevel=4)
        if not alone and not any(x.requires_grad for x in params.values()) and not whole:
            return self._frozen_groups(rule, model, own, maximize=maximize)
        source = model.model if not whole else Named({name: x.detach() for name, x in params.items()})
        tree = self._state_of(rule if alone else for_each(rule), Given(source, model.named))
        leaves = dict(zip(tree._structure.paths, tree._structure.flatten(model.model), strict=True))
        known = set() if held.tree is None else set(held.tree._structure.paths) - held.untrained.keys()
        if twice := known & leaves.keys():
            msg = f"two parameters have the name {min(twice)!r}; names must be unique, since states are kept and loaded by name"
            raise ModelError(msg)
        trained = [(s, e) for s, e in zip(tree._slots, tree._entries, strict=True) if e.rule is not None]
        offset = 0 if held.tree is None else len(held.tree._slots)
        only = StateTree(tree._structure, tuple(s for s, _ in trained), [e for _, e in trained])
        held.tree = joined(held.tree, only)
        held.note_untrained()
        held.frozen.update({x: name for name, x in leaves.items() if name in held.untrained and not x.requires_grad})
        paths, groups = held.tree._structure.paths, list[dict[str, Any]]()
        self._settle(rule, params, groups)
        for numbers in by_rule(held.tree._heads[offset:]):
            slots = tuple(offset + number for number in numbers)
            places = tuple(
                (paths[place.leaf], n if i == 0 else -1) for n in slots for i, place in enumerate(held.tree._slots[n].places)
            )
            named = [(path, leaves[path]) for path, _ in places]
            head: Any = held.tree._heads[slots[0]]
            known_as = self._made(head.rule, head.base, slots, places, own)
            shown = named if model.named else [x for _, x in named]
            groups.append({"params": shown, **known_as.seen, "rule": known_as.entries.kind, "maximize": maximize, **own})
        return groups

    def _settle(self, rule: Any, params: Mapping[str, torch.Tensor], groups: list[dict[str, Any]]) -> None:
        """Note where those belong that are frozen now."""
        names = tuple(params)
        home = Home(rule if isinstance(rule, AbstractRule) else None, groups, names)
        self.held.homes.update({x: home for x in params.values() if x in self.held.frozen})

    def _made(self, rule: Any, base: Any, slots: tuple[int, ...], places: Any, own: Mapping[str, Any]) -> Group:
        """One more group, which the options given for it fit."""
        entries = Entries(rule)
        with naming_group(len(self.held.groups)):
            refuse_idle_options(own, entries, rule)
        group = Group(entries, slots, places, entries.values(rule), rule.unresolved(), base.unresolved())
        self.held.groups.append(group)
        return group

    def _named(self, model: Given) -> Given:
        """Parameters without names under those by which they are known, if they are: they were frozen, or taken out."""
        held = self.held
        params = list(_tensors_of(model.model).values())
        names = [held.frozen.get(x) or next(iter(held.parked.get(x, ())), None) for x in params]
        if None in names or len(set(names)) != len(names):
            return model  # torch's own error follows
        return Given(Named(dict(zip(names, params, strict=True))), named=True)  # type: ignore[arg-type]

    def _frozen_groups(self, rule: Any, model: Given, own: Mapping[str, Any], *, maximize: bool) -> list[dict[str, Any]]:
        """The groups that parameters would be in of which none requires grad: without parameters, and without memory."""
        params = _tensors_of(model.model)
        plan = planned(for_each(rule), Named({n: x.detach() for n, x in params.items()}), None, None, on_meta)
        plan = with_rates(plan)
        self.held.frozen.update({x: name for name, x in params.items()})
        groups: list[dict[str, Any]] = []
        self._settle(rule, params, groups)
        heads = [head for head in plan._heads if head.rule is not None]
        for numbers in by_rule(heads):
            head: Any = heads[numbers[0]]
            known = self._made(head.rule, head.base, (), (), own)
            names: dict[str, Any] = {"param_names": []} if model.named else {}
            groups.append({"params": [], **names, **known.seen, "rule": known.entries.kind, "maximize": maximize, **own})
        return groups

    def _state_of(self, rule: Any, model: Given) -> StateTree:
        if not isinstance(rule, StateTree):
            tree = setup(rule, model.model, state_dtype=self.state_dtype)
        else:
            check_alive(rule)
            tree = rule
            if not isinstance(tree._structure, ModuleStructure):
                msg = "the state was set up for a tree; Optimizer needs one that was set up for the module, setup(rule, module)"
                raise ArgumentError(msg)
        return with_rates(tree)


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model made of named ones."""
    return dict(model.named_parameters(remove_duplicate=False))
