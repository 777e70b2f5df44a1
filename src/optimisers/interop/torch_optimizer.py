"""A rule, or a rule for each parameter, as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ArgumentError, ModelError, StructureError, described
from ..rules._base import AbstractRule, walk
from ..setup_api.route import Route
from ..setup_api.setup import moment_dtype
from ..setup_api.to import beside
from ..setup_api.update import update_
from ..tree.entry import Entry
from ..tree.leaves import Slot
from ..tree.param import Param
from ..tree.state import StateTree, check_alive, rebuilt
from ._entries import sketch
from ._groups import Held, naming_group, settle, with_entries, with_rates
from ._joining import Joining
from ._layout import Rearrangement, matched_groups
from ._options import refuse_idle_options
from ._packing import loaded_entries, matched, packed
from ._tensors import named_tensors
from ._thawed import refuse, take_in, thawed
from ._undo import undone_if_it_fails
from ._view import show_followed, shown_state, take_state


class Optimizer(torch.optim.Optimizer):
    """A real ``torch.optim.Optimizer`` that steps by rules of this library, through `update_`.

    Attributes:
        rule: a rule, a `Route`, or a function ``Param -> rule``, as for `setup`; or a state that ``setup``,
            ``from_torch`` or ``load`` made for these parameters.
        params: a ``torch.nn.Module``, ``module.named_parameters()``, a dict of names, tensors without names, or a list of
            parameter groups, each a dict with ``params`` and optionally ``rule`` and hyper-parameters of its own. Parameters
            that do not require grad now are left out (and take no memory) until they are thawed and have a gradient.
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
        apart = isinstance(params, list) and bool(params) and isinstance(params[0], dict)
        parts = params if apart else [{"params": params}]
        joining = Joining(self._held, rule, state_dtype, named=False)
        groups = [group for part in parts for group in joining.taken(part, maximize=maximize, alone=len(parts) == 1)]
        defaults = {key: groups[0][key] for key in ("lr", "betas", "maximize")}
        if not any(known.slots for known in self._held.groups):
            msg = "no parameter requires grad, or has a rule, in any group"
            raise ModelError(msg)
        super().__init__(groups, defaults)
        self._ready = True
        self._held.bind(self.param_groups)
        self._take_entries()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's, with what was frozen at construction and has a gradient now: schedulers and scalers are to see it."""
        if "param_groups" not in self.__dict__:  # a wrapper that passes on what it does not have itself
            raise AttributeError("param_groups")
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        if self.__dict__.get("_ready") and self._held.homes:
            for x in thawed(self._held):
                take_in(self._held, x, self._rule, groups)  # ``step`` says why if it cannot be
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

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
        self._add(param_group)

    def _add(self, param_group: Mapping[str, Any], *, whole: bool = False) -> None:
        """Take in a group; ``whole`` with what does not require grad now."""
        held = self._held
        joining = Joining(held, self._rule, self._state_dtype, named="param_names" in self.param_groups[0])
        with undone_if_it_fails(self, held):
            for group in joining.taken(param_group, maximize=self.defaults["maximize"], alone=False, whole=whole):
                super().add_param_group(group)
            held.bind(self.param_groups)
            self._take_entries()
            held.shown = None

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
        groups = self.param_groups
        for x in thawed(self._held):
            if why := take_in(self._held, x, self._rule, groups):
                refuse(self._held, x, why)
        self._take_edits()
        params, grads = self._with_gradients()
        tree: Any = self._held.tree
        # A model may be moved after its optimizer was made: torch's own make their state later, ours has to follow.
        self._held.tree = tree = beside(tree, tree._structure.flatten(params))
        self._held.outdate()  # before the step: whatever is raised from here on, the tree that is held is the truth
        self._held.tree, _ = update_(tree, params, grads)
        return loss

    def _with_gradients(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and gradients by name."""
        params: dict[str, Any] = dict(self._held.untrained)
        grads: dict[str, Any] = dict(self._held.untrained)
        for group, known in zip(self.param_groups, self._held.groups, strict=True):
            maximize = group["maximize"]
            for (name, _), x in zip(known.places, known.params, strict=True):
                params[name] = x
                dx = x.grad
                grads[name] = -dx if maximize and dx is not None else dx
        return params, grads

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
        tree = with_rates(tree)
        found = {slot.path: (slot, entry) for slot, entry in zip(tree._slots, tree._entries, strict=True)}
        pairs = [(slot, e, *found.get(slot.path, (None, None))) for slot, e in zip(old._slots, old._heads, strict=True)]
        trained = sum(entry.rule is not None for entry in tree._heads)
        if trained != len(pairs) or not all(other is not None and _alike(s, e, other, o) for s, e, other, o in pairs):
            msg = "optimizer.tree: this state is of other parameters, or of other rules; make a new Optimizer(state, module)"
            raise StructureError(msg)
        with undone_if_it_fails(self, self._held):
            self._held.tree = tree if tree._slots == old._slots else rebuilt(old, [o for *_, o in pairs])
            self._held.shown = None
            new: Any = self._held.tree
            for group, known in zip(self.param_groups, self._held.groups, strict=True):
                if known.slots:
                    values = known.entries.values(new._heads[known.slots[0]].rule)
                    known.seen.update(values)
                    group.update(values)

    @property
    def state(self) -> defaultdict[torch.Tensor, dict[str, Any]]:
        """For each parameter its state as a dict of tensors: counters and powers as 0-d ones, on the host."""
        return shown_state(self._held)

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
        held = self._held
        if len(self.param_groups) != len(held.groups) or not all(
            known.is_as_known(group) for known, group in zip(held.groups, self.param_groups, strict=True)
        ):
            self.state  # noqa: B018 (what was put there for new parameters is looked at after)
            with undone_if_it_fails(self, held):
                self._rearrange()
        for i, (known, group) in enumerate(zip(held.groups, self.param_groups, strict=True)):
            if len(group) != len(known.seen) + 3 + ("param_names" in group):
                with naming_group(i):
                    refuse_idle_options(group, known.entries, known.rule)
        if self._held.shown is not None:  # first, since powers that follow changed betas are no edit of the state
            take_state(self._held, moment_dtype(self._state_dtype))
        self._take_entries()

    def _rearrange(self) -> None:
        """Make parameter lists that were changed by hand those of the state tree, whose moments follow the parameters."""
        held, wanted = self._held, self.param_groups
        shown: Any = held.shown
        olds: list[Any] = matched_groups(held, wanted)
        places = [i for i, old in enumerate(olds) if old is not None]
        change = Rearrangement(held, [wanted[i] for i in places], [olds[i] for i in places], moment_dtype(self._state_dtype))
        change.commit()
        for x, before, after in change.followed:
            show_followed(held, x, before, after)
        new = [group for group, old in zip(wanted, olds, strict=True) if old is None]
        if new:
            self._add_at_their_places(wanted, new)
        tree: Any = held.tree
        now: dict[torch.Tensor, dict[str, Any]] = {}
        for known in held.groups:
            for (_, number), x in zip(known.places, known.params, strict=True):
                now[x] = shown[x] if x in shown else {} if number < 0 else named_tensors(tree._entries[number].state)
                if x not in shown and x not in held.view:
                    held.view[x] = dict(now[x])
        held.shown = now
        for x, kept in list(held.parked.items()):
            if x in shown:
                if x not in held.view:
                    del held.parked[x]
                else:
                    now[x] = named_tensors(kept[1].state)
                    held.view[x].update(now[x])

    def _add_at_their_places(self, wanted: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        """Take in the groups that were put into ``param_groups``, which then is again as it was made."""
        held = self._held
        self.param_groups = [group for group in wanted if not any(group is other for other in new)]
        for group in new:
            names: Any = group.get("param_names")
            named = names is not None and len(names) == len(group["params"])
            count = len(held.groups)
            self._add(
                {**group, "params": list(zip(names, group["params"], strict=True)) if named else group["params"]}, whole=True
            )
            kind = group.get("rule", held.groups[-1].entries.kind)
            if len(held.groups) != count + 1 or kind not in {held.groups[-1].entries.kind, self._rule}:
                del held.groups[count:], self.param_groups[count:]
                msg = "a group that was put into param_groups has not the rule that it names, or several; use add_param_group"
                raise StructureError(msg)
            group.update(self.param_groups[-1])
            self.param_groups[-1] = group
        by_dict = {id(group): known for group, known in zip(self.param_groups, held.groups, strict=True)}
        self.param_groups = wanted
        held.groups = [by_dict[id(group)] for group in wanted]
        held.bind(wanted)

    def _take_entries(self) -> None:
        changes = [g.entries.changes(group, g.seen) for g, group in zip(self._held.groups, self.param_groups, strict=True)]
        if any(changes):
            tree = with_entries(self._held.tree, self._held.groups, changes)
            if any(key.endswith("betas") for changed in changes for key in changed):  # powers follow
                self._held.outdate()
            self._held.tree = tree  # what comes after may come once more
            for known, group, changed in zip(self._held.groups, self.param_groups, changes, strict=True):
                settle(known, group, changed, self._held.tree)

    # --- saving and loading ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; what a scheduler has set under one of two names (``betas``, ``momentum``) stands under both."""
        self._take_edits()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._take_edits()
        result = packed(self.param_groups, self._held.groups, self._held.tree._entries, self.state)  # type: ignore[union-attr]
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

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
        sources = matched(self.param_groups, state_dict["param_groups"])
        entries, extras = loaded_entries(self._held, sources, state_dict["state"], moment_dtype(self._state_dtype))
        news, changes = [], []
        old: Any = self._held.tree
        tree: Any = rebuilt(old, entries)
        for i, (known, (saved, _)) in enumerate(zip(self._held.groups, sources, strict=True)):
            new = {key: value for key, value in saved.items() if key not in {"params", "param_names", "rule"}}
            with naming_group(i):
                refuse_idle_options(new, known.entries, known.rule)
            now = known.entries.values(tree._entries[known.slots[0]].rule) if known.slots else known.seen
            news.append({**now, **new})
            changes.append(known.entries.changes(new, now))
        tree = with_entries(tree, self._held.groups, changes, loaded=True)
        with undone_if_it_fails(self, self._held):
            self._held.tree = tree
            self._held.parked.clear()
            self._held.view.clear()
            self._held.view.update(extras)
            self._held.shown = None
            for group, known, new, changed in zip(self.param_groups, self._held.groups, news, changes, strict=True):
                group.update(new)
                known.seen.update({key: new[key] for key in known.seen})
                settle(known, group, changed, tree)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __copy__(self) -> Optimizer:
        """One more handle on the same groups, parameters and state, as a shallow copy of torch's is."""
        new = type(self).__new__(type(self))
        new.__setstate__({**self.__getstate__(), "_held": self._held, "_rule": self._rule})
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state["_held"]
        if isinstance(held.parked, dict):
            held.parked = WeakTensorKeyDictionary(held.parked)
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        self._take_edits()
        names = ("defaults", "param_groups", "_state_dtype", "_ready")
        plain = isinstance(self._rule, AbstractRule) and not any(isinstance(r, Route) for r in walk(self._rule))
        # A function may not be picklable, and is only needed where add_param_group is given no rule.
        view = {x: {k: v for k, v in own.items() if not str(k).startswith("state")} for x, own in self._held.view.items()}
        kept = defaultdict(dict, {x: extra for x, extra in view.items() if extra})
        held = replace(self._held, view=kept, shown=None, parked=dict(self._held.parked.items()))
        return {**{name: self.__dict__[name] for name in names}, "_held": held, "_rule": self._rule if plain else None}


def _alike(slot: Slot, head: Entry, other: Slot, entry: Entry) -> bool:
    """Whether an entry is one of the same parameter, and of a rule built alike."""
    if head.rule is None or entry.rule is None:
        return False
    same = (slot.param.shape, slot.dtype, slot.kind, len(slot.places)) == (
        other.param.shape, other.dtype, other.kind, len(other.places),
    )  # fmt: skip
    return same and sketch(head.rule) == sketch(entry.rule)
