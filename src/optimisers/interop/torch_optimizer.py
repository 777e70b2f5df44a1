"""A rule, or a rule for each parameter, as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, HyperParameterError, ModelError, RuleError, SelectionError, StructureError, described
from ..rules._base import AbstractRule, walk
from ..setup_api.route import Chooser, Route
from ..setup_api.setup import initial_state, moment_dtype, setup
from ..setup_api.to import beside
from ..setup_api.update import update_
from ..tree.entry import Entry
from ..tree.leaves import Place, Slot
from ..tree.param import Param
from ..tree.state import StateTree, check_alive, rebuilt, reruled
from ..tree.structure import ModuleStructure
from ._entries import Betas, Entries, changed_betas, repowered, scalable, sketch
from ._named import Given, given
from ._tensors import filled, named_tensors


class Group(NamedTuple):
    """What is known of one parameter group besides the dict that torch shows."""

    entries: Entries
    slots: tuple[int, ...]
    """The numbers of its arrays in the state tree."""
    places: tuple[tuple[str, int], ...]
    """For each parameter its name, and the number of its array, -1 where that array was named before."""
    seen: dict[str, Any]
    """The hyper-parameters as the rules have them now."""


@dataclass
class Held:
    """What an optimizer holds besides its parameter groups.

    In one object, because wrappers that pass attributes on for reading (Lightning's) would keep what is assigned to them.
    """

    tree: StateTree | None = None
    groups: list[Group] = field(default_factory=list)
    untrained: dict[str, None] = field(default_factory=dict)
    """The names of parameters that belong to the state's structure and are in no group."""
    view: defaultdict[torch.Tensor, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """``optimizer.state``."""
    shown: dict[torch.Tensor, dict[str, Any]] | None = None
    """The tensors that the view was filled with; None when the step has moved on."""


class Optimizer(torch.optim.Optimizer):
    """A real ``torch.optim.Optimizer`` that steps by rules of this library, through `update_`.

    Attributes:
        rule: a rule, a `Route`, or a function ``Param -> rule``, as for `setup`; or a state that ``setup``,
            ``from_torch`` or ``load`` made for these parameters.
        params: a ``torch.nn.Module``, ``module.named_parameters()``, a dict of names, tensors without names, or a list of
            parameter groups, each a dict with ``params`` and optionally ``rule`` and hyper-parameters of its own. Parameters
            that do not require grad now are left out (and take no memory); ``add_param_group`` takes them in later.
        maximize: step along the gradient instead of against it; an entry of each group.
        state_dtype: dtype of the moments, by default each parameter's own.

    There is one parameter group for each distinct rule, in the order of its first parameter. Its entries are the rule's
    hyper-parameters under torch's names (``lr``, ``betas``, ``momentum``, ``eps``, ``weight_decay``, ...), read back before
    every step: a scheduler, or anything else, may change them. ``lr`` acts like ``adjust(state, lr)``: Muon and its
    fallback keep the ratio they were constructed with. A rule without learning rate has its step multiplied by ``lr``, and
    of a chain with several the last one, which scales the step, is ``lr``. Every group has ``betas``, of which the first
    is the momentum, so that schedulers can cycle it; the correction of moments for their start then follows torch's
    formula, ``1 - beta**t`` with beta as it is now.

    ``state`` holds tensors only, and from construction on. The state dict has torch's layout with ``param_names``;
    ``load_state_dict`` matches by name where there are names, else by order. Tensors and dicts in it may be replaced or
    deleted, as with torch (what is deleted starts anew); it is refreshed whenever ``optimizer.state`` is read.

    Raises what `setup` and `update_` raise; HyperParameterError at the step after an entry was given a value
    out of its range, such as a negative learning rate; ModelError for two parameters of one name.
    """

    def __init__(
        self,
        rule: AbstractRule | Callable[[Param], AbstractRule | None] | StateTree,
        params: Any,
        *,
        maximize: bool = False,
        state_dtype: Any = None,
    ) -> None:
        if isinstance(params, (AbstractRule, StateTree)):
            msg = "the order is Optimizer(rule, params)"
            raise ArgumentError(msg)
        self._rule: Any = rule
        self._state_dtype = state_dtype
        self._held = Held()
        if isinstance(params, Iterable) and not isinstance(params, (torch.nn.Module, torch.Tensor, Mapping, AbstractSet)):
            params = list(params)
        parts = params if isinstance(params, list) and params and isinstance(params[0], dict) else [{"params": params}]
        groups = [group for part in parts for group in self._taken(part, maximize=maximize, alone=len(parts) == 1)]
        defaults = {key: groups[0][key] for key in ("lr", "betas", "maximize")}
        super().__init__(groups, defaults)
        self._ready = True
        self._take_entries()

    # --- parameter groups -----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters, after any number of steps.

        ``rule`` in the dict is their rule, by default the one given at construction (a Route is followed for each
        parameter, whether or not all its patterns match). Other keys set hyper-parameters. Parameters with different rules
        make one group for each rule.
        """
        if not getattr(self, "_ready", False):  # torch's constructor, with the groups made above
            super().add_param_group(param_group)
            return
        if not isinstance(param_group, dict) or "params" not in param_group:
            msg = f"a parameter group is a dict with 'params'; got {described(param_group)}"
            raise ArgumentError(msg)
        self._take_edits()
        before = self._held.tree, list(self._held.groups), dict(self._held.untrained)
        try:
            for group in self._taken(param_group, maximize=self.defaults["maximize"], alone=False):
                super().add_param_group(group)
            self._take_entries()
        except Exception:
            self._held.tree, self._held.groups, self._held.untrained = before
            del self.param_groups[len(self._held.groups) :]
            raise
        self._held.shown = None

    def _taken(self, part: Mapping[str, Any], *, maximize: bool, alone: bool) -> list[dict[str, Any]]:
        """The groups of one part of the parameters, which joins the state tree."""
        own = dict(part)
        model = given(own.pop("params"), first=len(self._held.tree._structure.paths) if self._held.tree is not None else 0)
        rule = own.pop("rule", None)
        own.pop("param_names", None)
        rule = self._rule if rule is None or isinstance(rule, str) else rule
        if isinstance(rule, StateTree) and not alone:
            msg = (
                "this optimizer was made from a state, so a further parameter group needs its own: {'params': ..., 'rule': ...}"
            )
            raise RuleError(msg)
        tree = self._state_of(rule if alone else _for_each(rule), model)
        leaves = dict(zip(tree._structure.paths, tree._structure.flatten(model.model), strict=True))
        known = set() if self._held.tree is None else set(self._held.tree._structure.paths) - self._held.untrained.keys()
        if twice := known & leaves.keys():
            msg = f"two parameters have the name {min(twice)!r}; names must be unique, since states are kept and loaded by name"
            raise ModelError(msg)
        trained = [(s, e) for s, e in zip(tree._slots, tree._entries, strict=True) if e.rule is not None]
        offset = 0 if self._held.tree is None else len(self._held.tree._slots)
        only = StateTree(tree._structure, tuple(s for s, _ in trained), [e for _, e in trained])
        tree = _joined(self._held.tree, only)
        paths = tree._structure.paths
        used = {paths[place.leaf] for slot in tree._slots for place in slot.places}
        self._held.untrained = {path: None for path in paths if path not in used}
        made, groups = [], []
        for numbers in _by_rule(tree._heads[offset:]):
            slots = tuple(offset + number for number in numbers)
            places = tuple(
                (paths[place.leaf], n if i == 0 else -1) for n in slots for i, place in enumerate(tree._slots[n].places)
            )
            first: Any = tree._heads[slots[0]].rule
            entries = Entries(first)
            values = entries.values(first)
            made.append(Group(entries, slots, places, values))
            named = [(path, leaves[path]) for path, _ in places]
            shown = named if model.named else [x for _, x in named]
            groups.append({"params": shown, **values, "rule": entries.kind, "maximize": maximize, **own})
        self._held.tree = tree
        self._held.groups += made
        return groups

    def _state_of(self, rule: Any, model: Given) -> StateTree:
        if not isinstance(rule, StateTree):
            tree = setup(rule, model.model, state_dtype=self._state_dtype)
        else:
            check_alive(rule)
            tree = rule
            if not isinstance(tree._structure, ModuleStructure):
                msg = "the state was set up for a tree; Optimizer needs one that was set up for the module, setup(rule, module)"
                raise ArgumentError(msg)
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

    # --- stepping -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a ``.grad``; the others keep their values and their state.

        Args:
            closure: called first, with grad mode on; what it returns is returned.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_edits()
        params: dict[str, Any] = dict(self._held.untrained)
        grads: dict[str, Any] = dict(self._held.untrained)
        for group, known in zip(self.param_groups, self._held.groups, strict=True):
            maximize = group["maximize"]
            for (name, _), x in zip(known.places, group["params"], strict=True):
                params[name] = x
                dx = x.grad
                grads[name] = -dx if maximize and dx is not None else dx
        tree: Any = self._held.tree
        # A model may be moved after its optimizer was made: torch's own make their state later, ours has to follow.
        tree = beside(tree, tree._structure.flatten(params))
        self._held.tree, _ = update_(tree, params, grads)
        self._held.shown = None
        return loss

    # --- the state, for this library and for torch ---------------------------------------------------------------------------

    @property
    def tree(self) -> StateTree:
        """The state tree, for ``save``, ``metrics``, ``hyper``, ...; the next step consumes it.

        Assign one to go on from another state: one that was loaded, adjusted or frozen. Raises StructureError if it is not
        of the same parameters and kinds of rule.
        """
        self._take_edits()
        return self._held.tree  # type: ignore[return-value]

    @tree.setter
    def tree(self, tree: StateTree) -> None:
        if not isinstance(tree, StateTree):
            msg = f"optimizer.tree must be a state tree; got {described(tree)}"
            raise ArgumentError(msg)
        check_alive(tree)
        old: Any = self._held.tree
        kinds = [[e.rule and sketch(e.rule) for e in t._heads] for t in (old, tree)]
        if tree._slots != old._slots or kinds[0] != kinds[1]:
            msg = "optimizer.tree: this state is of other parameters, or of other rules; make a new Optimizer(state, module)"
            raise StructureError(msg)
        self._held.tree = tree
        self._held.shown = None
        for group, known in zip(self.param_groups, self._held.groups, strict=True):
            values = known.entries.values(tree._heads[known.slots[0]].rule)  # type: ignore[arg-type]
            known.seen.update(values)
            group.update(values)

    @property
    def state(self) -> defaultdict[torch.Tensor, dict[str, Any]]:
        """For each parameter its state as a dict of tensors: counters and powers as 0-d ones, on the host."""
        if self._held.shown is None and self._held.tree is not None:
            old = dict(self._held.view)
            self._held.view.clear()
            self._held.shown = {}
            for group, known in zip(self.param_groups, self._held.groups, strict=True):
                for (_, number), x in zip(known.places, group["params"], strict=True):
                    tensors = {} if number < 0 else named_tensors(self._held.tree._entries[number].state)
                    self._held.view[x] = {**old.get(x, {}), **tensors}
                    self._held.shown[x] = tensors
        return self._held.view

    @state.setter
    def state(self, value: Mapping[torch.Tensor, dict[str, Any]]) -> None:
        if not hasattr(self, "_ready"):
            return  # torch's constructor, which begins with none
        self._take_edits()
        view = self.state
        view.clear()
        view.update(value)

    def _take_edits(self) -> None:
        """Make what was changed in ``param_groups`` and ``state`` part of the state tree."""
        if len(self.param_groups) != len(self._held.groups):
            msg = (
                f"there are {len(self.param_groups)} param_groups, {len(self._held.groups)} of them known; use add_param_group"
            )
            raise StructureError(msg)
        for i, (group, known) in enumerate(zip(self.param_groups, self._held.groups, strict=True)):
            if len(group["params"]) != len(known.places):
                msg = (
                    f"param_groups[{i}] has {len(group['params'])} parameters, {len(known.places)} of them known; use "
                    "add_param_group"
                )
                raise StructureError(msg)
        self._take_entries()
        if self._held.shown is not None:
            self._take_state(self._held.shown)

    def _take_entries(self) -> None:
        changes = [g.entries.changes(group, g.seen) for g, group in zip(self._held.groups, self.param_groups, strict=True)]
        if any(changes):
            self._held.tree = self._with_entries(self._held.tree, changes)
            for known, group, changed in zip(self._held.groups, self.param_groups, changes, strict=True):
                _settle(known, group, changed, self._held.tree)

    def _with_entries(self, tree: Any, changes: Sequence[Mapping[str, Any]], *, loaded: bool = False) -> StateTree:
        """The state tree with other hyper-parameters in some groups; loaded states belong to these already."""
        heads = list(tree._heads)
        repower: dict[int, Betas] = {}
        for i, (known, changed) in enumerate(zip(self._held.groups, changes, strict=True)):
            if not changed:
                continue
            done: dict[tuple[int, int], tuple[AbstractRule, Any]] = {}
            for number in known.slots:
                head = heads[number]
                key = (id(head.rule), id(head.base))
                if key not in done:
                    try:
                        new = known.entries.apply(changed, head.rule, head.base)
                    except HyperParameterError as error:
                        error.args = (f"param_groups[{i}], {error}",)
                        raise
                    done[key] = new, [] if loaded else changed_betas(head.rule, new)
                rule, betas = done[key]
                heads[number] = head.replace(rule=rule)
                if betas:
                    repower[number] = betas
        new_tree = reruled(tree, heads)
        if not repower:
            return new_tree
        entries = list(new_tree._entries)
        for number, betas in repower.items():
            entries[number] = entries[number].replace(state=repowered(entries[number].state, betas))
        return rebuilt(tree, entries)

    def _take_state(self, shown: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        tree: Any = self._held.tree
        entries: list[Entry] | None = None
        dtype = moment_dtype(self._state_dtype)
        for group, known in zip(self.param_groups, self._held.groups, strict=True):
            for (name, number), x in zip(known.places, group["params"], strict=True):
                before, now = shown.get(x), self._held.view.get(x, {})
                if number < 0 or before is None or not _edited(before, now, entry := tree._entries[number]):
                    continue
                entries = entries or list(tree._entries)
                if any(key in now for key in before):
                    entries[number] = entry.replace(state=filled(entry.state, now, name))
                else:  # torch's optimizers begin anew with what was taken out of their state
                    rule: Any = entry.rule
                    entries[number] = entry.replace(state=initial_state(rule, tree._slots[number], x, dtype))
        if entries is not None:
            self._held.tree = rebuilt(tree, entries)
            self._held.shown = None

    # --- saving and loading ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; what a scheduler has set under one of two names (``betas``, ``momentum``) stands under both."""
        self._take_edits()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, copying its tensors to the devices of the parameters.

        Parameters are matched by name where both sides have names (whatever their order), otherwise by order. Nothing is
        changed if it raises: StructureError for missing, unexpected and reshaped parameters and for states of other
        rules, by name; ValueError, as torch's own, for groups that differ where there are no names.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._take_edits()
        tree: Any = self._held.tree
        sources = _matched(self.param_groups, state_dict["param_groups"])
        entries = list(tree._entries)
        news, changes = [], []
        for group, known, (saved, ids) in zip(self.param_groups, self._held.groups, sources, strict=True):
            if (kind := saved.get("rule", known.entries.kind)) != known.entries.kind:
                msg = f"the saved state of {known.places[0][0]!r} is that of {kind}, and its rule is {known.entries.kind}"
                raise StructureError(msg)
            for (name, number), key, x in zip(known.places, ids, group["params"], strict=True):
                if number >= 0:
                    tensors = state_dict["state"].get(key, {})
                    state = filled(entries[number].state, tensors, name, onto=x.device)
                    entries[number] = entries[number].replace(state=state)
            new = {key: value for key, value in saved.items() if key not in {"params", "param_names"}}
            news.append(new)
            changes.append(known.entries.changes(new, known.seen))
        tree = self._with_entries(rebuilt(tree, entries), changes, loaded=True)
        self._held.tree = tree
        self._held.shown = None
        for group, known, new, changed in zip(self.param_groups, self._held.groups, news, changes, strict=True):
            group.update(new)
            _settle(known, group, changed, tree)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._take_edits()
        names = ("defaults", "param_groups", "_state_dtype", "_ready")
        plain = isinstance(self._rule, AbstractRule) and not any(isinstance(r, Route) for r in walk(self._rule))
        # A function may not be picklable, and is only needed where add_param_group is given no rule.
        held = replace(self._held, view=defaultdict(dict), shown=None)
        return {**{name: self.__dict__[name] for name in names}, "_held": held, "_rule": self._rule if plain else None}


def _for_each(rule: Any) -> Any:
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


def _joined(first: StateTree | None, second: StateTree) -> StateTree:
    """Two state trees over named parameters as one."""
    if first is None:
        return second
    a: Any = first._structure
    b: Any = second._structure
    paths = list(dict.fromkeys(a.paths + b.paths))  # a name that stands in both was not trained so far
    where = {path: i for i, path in enumerate(paths)}
    slots = [
        Slot(s.param, tuple(Place(where[b.paths[p.leaf]], p.permutation) for p in s.places), s.kind, s.dtype)
        for s in second._slots
    ]
    structure = ModuleStructure(tuple(paths), a.aliases + b.aliases)
    return StateTree(structure, (*first._slots, *slots), (*first._entries, *second._entries))


def _by_rule(entries: Sequence[Entry]) -> list[list[int]]:
    """The numbers of the entries with equal rules, in the order of the first of each."""
    groups: dict[AbstractRule, list[int]] = {}
    known: dict[int, AbstractRule] = {}
    for i, entry in enumerate(entries):
        rule: Any = entry.rule
        if id(rule) not in known:
            known[id(rule)] = rule.unresolved()
        groups.setdefault(known[id(rule)], []).append(i)
    return list(groups.values())


def _settle(known: Group, group: dict[str, Any], changed: Mapping[str, Any], tree: StateTree) -> None:
    """Note the hyper-parameters that were taken over, and show in the group those that follow from them."""
    if changed:
        values = known.entries.values(tree._heads[known.slots[0]].rule)  # type: ignore[arg-type]
        if "betas" in changed and not known.entries.own_betas:
            values["betas"] = (values["betas"][0], *changed["betas"][1:])
        group.update({key: value for key, value in values.items() if key not in changed})
        known.seen.update(values, **changed)


def _edited(before: Mapping[str, Any], now: Mapping[str, Any], entry: Entry) -> bool:
    """Whether tensors that were shown are others now, or hold another number."""
    if any(now.get(key) is not tensor for key, tensor in before.items()):
        return True
    if not any(entry.numbers):
        return False
    fresh = named_tensors(entry.state)
    return any(fresh[key] is not tensor and fresh[key].item() != tensor.item() for key, tensor in before.items())


def _matched(
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
    wanted = [name for group in groups for name in group["param_names"]]
    missing, extra = [n for n in wanted if n not in where], [n for n in where if n not in set(wanted)]
    if missing or extra:
        parts = [f"lacks {', '.join(map(repr, missing[:8]))}"] if missing else []
        parts += [f"holds {', '.join(map(repr, extra[:8]))}, which this optimizer does not have"] if extra else []
        msg = (
            f"the loaded state {' and '.join(parts)}. To match renamed parameters by order, take 'param_names' out of the "
            "loaded param_groups"
        )
        raise StructureError(msg)
    result = []
    for group in groups:
        sources = {where[name][0] for name in group["param_names"]}
        if len(sources) > 1:
            apart = [next(n for n in group["param_names"] if where[n][0] == i) for i in sorted(sources)]
            msg = f"{' and '.join(map(repr, apart))} have one rule here, and different ones in the loaded state"
            raise StructureError(msg)
        result.append((saved[sources.pop()], [where[name][1] for name in group["param_names"]]))
    return result
