"""A step of a whole state tree: groups by kernels, everything else by the rules themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Untraceable, kind, torch_if_loaded
from ..errors import StructureError
from ..rules._states import state_leaves
from ..tree.entry import Entry, Lease
from ..tree.heads import Heads
from ..tree.paths import shown
from ..tree.sharding import Sharding, local_state, sharded_state
from ..tree.state import StateTree, rebuilt
from . import aliasing, autograd
from .groups.group import Group
from .groups.states import GroupedState, GroupState, RunCache, group_entries, lies_well, without_groups
from .groups.step import GroupStep
from .groups.track import GuardFailed
from .kernels.cuda.devices import refuse_capture
from .memory.strides import element_strides, lie_alike
from .memory.writes import Writes
from .tracks.gathered import Gathered
from .tracks.scheduler import run
from .tracks.single import Job, Outcome, Single, entry_after, jobs_of


class Stepped(NamedTuple):
    """A step, of which nothing is written yet if it is one in place.

    Attributes:
        state: the state after it.
        values: the values of parameters that are still to be placed, by slot.
        graph: whether they carry a graph.
        writes: what a step in place is still to write.
        without: what makes the state in which some slots are as before, since they could not be written.

    """

    state: StateTree
    values: dict[int, Any]
    graph: bool
    writes: Writes
    without: Callable[[set[int]], StateTree]


class Given(NamedTuple):
    """What a step is given.

    Attributes:
        tree: the state.
        xs: for each slot the parameter.
        dxs: for each slot the gradient, or None for no step.
        admitted: for each group of the state whether its arrays are known to be as the group describes them.
        in_place: whether to take over the memory of state and parameters, which consumes the state.
        differentiable: whether to keep the graph through the parameters.

    """

    tree: StateTree
    xs: Sequence[Any]
    dxs: Sequence[Any]
    admitted: Sequence[bool]
    in_place: bool
    differentiable: bool = False


def step_tree(given: Given) -> Stepped:
    """Step all parameters of a state tree. What is not written to memory of the engine's own is returned, to be written."""
    refuse_capture()
    tree, xs = given.tree, given.xs
    grouped = tree._grouped if isinstance(tree._grouped, GroupedState) else None
    ordinary = autograd.is_ordinary()
    graph = _wants_graph(given, grouped, ordinary=ordinary)
    if graph or not ordinary:
        return _without_groups(given, graph=graph)
    planned = _planned(tree, grouped, xs)
    planned.cache.steps += 1
    while True:
        try:
            stepped = _Step(given, planned).taken()
        except _NoKernels as refused:
            planned.cache.refused.add(refused.key)
            planned = group_entries(local_entries(tree), xs, planned.cache, tree._slots)
        except GuardFailed:
            planned = planned.dissolved()
        else:
            if planned.group_states:
                planned.cache.guard_failures = 0
            return stepped


def local_entries(tree: StateTree) -> Sequence[Entry]:
    """The entries of a tree, with the parts on this rank in the place of DTensors."""
    if not tree._plan.sharded:
        return tree._entries
    pairs = zip(tree._slots, tree._entries, strict=True)
    return [e if slot.sharding is None else e.replace(state=local_state(e.state)) for slot, e in pairs]


def _refuse_moved(group: Group, member: int) -> None:
    """Raise StructureError for a part of an array that lies otherwise than at setup: other ranks do not know, and wait."""
    if group.sharding(member) is not None:
        msg = (
            f"model at {shown(group.paths[member])}: the part of this DTensor on this rank lies otherwise in memory, or on "
            "another device, than at setup. Set up a new state"
        )
        raise StructureError(msg)


def _without_groups(given: Given, *, graph: bool) -> Stepped:
    """A step in which every array is stepped by its rule, as where a graph is wanted or tensors are not what they seem."""
    none = without_groups(local_entries(given.tree), RunCache(), given.tree._slots)
    stepped = _Step(given, none, graph=graph).taken()
    return stepped._replace(state=rebuilt(given.tree, stepped.state._by_kind))


def _planned(tree: StateTree, grouped: GroupedState | None, xs: Sequence[Any]) -> GroupedState:
    """What the engine holds of the state, by group."""
    if grouped is None:
        return group_entries(local_entries(tree), xs, RunCache(), tree._slots)
    if grouped.pending and grouped.cache.steps >= grouped.cache.regroup_at:
        return group_entries(local_entries(tree), xs, grouped.cache, tree._slots)
    return grouped


def _wants_graph(given: Given, grouped: GroupedState | None, *, ordinary: bool) -> bool:
    """Whether the step is to carry a graph: not if it is taken in place, but inside a transform, where all is new anyway."""
    torch, tree = torch_if_loaded(), given.tree
    if torch is None or (ordinary and given.in_place):
        return False
    by_group = grouped if ordinary else None  # groups hold no state and have no rule that requires grad
    if by_group is not None and not given.differentiable and not torch.is_grad_enabled():
        return False
    if not any(isinstance(x, torch.Tensor) for x in given.xs):
        return False
    if given.differentiable or (by_group is not None and autograd.requires_grad(given.dxs)):
        return True
    if by_group is not None and not by_group.ungrouped:
        return False
    entries = enumerate(tree._entries) if by_group is None else ((i, tree._by_kind.at(i)) for i in by_group.ungrouped)
    return autograd.wants_graph((entry, given.xs[i], given.dxs[i]) for i, entry in entries)


class _NoKernels(Exception):  # noqa: N818 (a signal)
    """No kernels can be made for a group."""

    def __init__(self, key: Any) -> None:
        super().__init__(key)
        self.key = key


class _Step:
    """One attempt at a step.

    Attributes:
        given: what it is given.
        grouped: the states by group, none of which need be in a group.
        graph: whether to carry a graph.
        groups: the steps of groups, by their numbers.
        misfits: for each group the members that are stepped by their rules, since they are not laid out as their states are.
        gathered: arrays cut over ranks that are put together for their rules, by slot.
        outcomes: what the rules gave, by slot.
        values: new values that are still to be placed, by slot.
        lease: of memory that is new or taken over.
        writes: what is to be written.

    """

    def __init__(self, given: Given, grouped: GroupedState, *, graph: bool = False) -> None:
        self.given, self.grouped, self.graph = given, grouped, graph
        self.groups: dict[int, GroupStep] = {}
        self.misfits: dict[int, list[int]] = {}
        self.gathered: dict[int, Gathered] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.values: dict[int, Any] = {}
        self.lease = Lease()
        self.writes = Writes()

    def taken(self) -> Stepped:
        """Down to the kernels, and up again with a new state."""
        # Overflow and division by zero give inf and NaN in NumPy's arithmetic, as in loops and in torch.
        with np.errstate(all="ignore"):
            for number, group_state in enumerate(self.grouped.group_states):
                self._enter(number, group_state)
            jobs = self._jobs()
            if self.given.in_place:
                aliasing.resolve(self.grouped.cache, list(self.groups.values()), jobs.values())
            with autograd.mode(graph=self.graph or not (jobs or self.gathered)):
                self._run(jobs)
            group_states = [self._plan(number, group_state) for number, group_state in enumerate(self.grouped.group_states)]
            if not self.given.in_place:
                self.writes.run()
        self.values.update({i: outcome.x for i, outcome in self.outcomes.items() if outcome.x is not None})
        state = self._state(list(group_states))
        return Stepped(state, self.values, self.graph, self.writes, partial(self._without, group_states))

    # --- down ---

    def _enter(self, number: int, group_state: GroupState) -> None:
        """Prepare the step of a group, for those of its members that have a gradient and are laid out as their state is."""
        given, group = self.given, group_state.group
        xs, dxs = [given.xs[i] for i in group.slots], [given.dxs[i] for i in group.slots]
        admitted = given.admitted[number] if self.grouped is given.tree._grouped else False
        if given.in_place and group.library == "numpy" and not all(x.flags.writeable for x in xs):
            admitted = False
        if not admitted:
            misfits = [k for k, x in enumerate(xs) if dxs[k] is not None and self._is_misfit(x, group, k)]
            for k in misfits:
                dxs[k] = None
                _refuse_moved(group, k)
            if misfits:
                self.misfits[number] = misfits
        if any(dx is not None for dx in dxs):
            try:
                last = self.grouped.cache.prepared.pop(number, None)
                self.groups[number] = GroupStep(group_state, xs, dxs, admitted=admitted, last=last)
            except Untraceable:
                raise _NoKernels(group.key) from None

    def _is_misfit(self, x: Any, group: Group, member: int) -> bool:
        """Whether a parameter does not lie where and as its state does, or cannot be written."""
        unwritable = self.given.in_place and isinstance(x, np.ndarray) and not x.flags.writeable
        elsewhere = group.place is not None and x.device != group.place
        well = lies_well(x, group.sharding(member)) and lie_alike(x.shape, element_strides(x), group.strides[member])
        return unwritable or elsewhere or not well

    def _jobs(self) -> dict[int, Job]:
        """What the rules themselves are to step."""
        members = (self.grouped.group_states[n].group.slots[k] for n, misfits in self.misfits.items() for k in misfits)
        slots = [*self.grouped.ungrouped, *members]
        if not slots:
            return {}
        jobs = jobs_of(self.given.tree, {i: self._entry(i) for i in slots}, self.given.xs, self.given.dxs)
        for i, sharding in self._cut(jobs):
            if jobs[i].rule.law == "elementwise":
                jobs[i] = jobs[i]._replace(state=local_state(jobs[i].state))
            else:
                self.gathered[i] = Gathered(jobs.pop(i), sharding)
        return jobs

    def _cut(self, slots: Iterable[int]) -> list[tuple[int, Sharding]]:
        """Those of some slots that are cut over ranks, and how."""
        if not self.given.tree._plan.sharded:
            return []
        found = ((i, self.given.tree._slots[i].sharding) for i in slots)
        return [(i, sharding) for i, sharding in found if sharding is not None]

    def _entry(self, slot: int) -> Entry:
        """The entry of what a rule steps."""
        tree = self.given.tree
        return tree._by_kind.at(slot) if tree._grouped is self.grouped and not self.misfits else tree._entries[slot]

    def _run(self, jobs: dict[int, Job]) -> None:
        """Run all rules and measures. What is to be written in place is noted."""
        singles: dict[int, Single] = {**self.gathered, **{i: Single(job) for i, job in jobs.items()}}
        run([*singles.values(), *(track for step in self.groups.values() for track in step.tracks)])
        self.outcomes.update({i: single.outcome() for i, single in singles.items()})
        if self.given.in_place:
            for old in {*self.grouped.leases(), *(self._entry(i).lease for i in self.grouped.ungrouped)}:
                self.writes.note(setattr, old, "ended", True)

    # --- up ---

    def _plan(self, number: int, group_state: GroupState) -> GroupState:
        """Make ready what a group's kernels write. Its state after the step."""
        cache, in_place, slots = self.grouped.cache, self.given.in_place, group_state.group.slots
        if number not in self.groups:
            return group_state.leased(self.lease) if in_place else group_state
        step = self.groups[number]
        new, made = step.plan(self.writes, cache.pool, number, self.lease, in_place=in_place)
        self.values.update({slots[k]: x for k, x in made.items()})
        if step.prepared is not None:
            self.writes.note(cache.prepared.__setitem__, number, step.prepared)
        return new

    def _without(self, group_states: list[GroupState], missing: set[int]) -> StateTree:
        """The state after the step but for some slots, which could not be written and are as before."""
        self.outcomes = {i: outcome for i, outcome in self.outcomes.items() if i not in missing}
        found = []
        for new, old in zip(group_states, self.grouped.group_states, strict=True):
            members = [k for k, i in enumerate(old.group.slots) if i in missing]
            found.append(new.restored(old, members, self.lease) if members and new is not old else new)
        return self._state(found)

    def _state(self, group_states: list[GroupState]) -> StateTree:
        """The new state: groups, and entries of what the rules have stepped."""
        tree, grouped = self.given.tree, self.grouped
        heads = tree._by_kind
        if tree._grouped is not grouped:  # no old arrays are kept alive by entries that are only heads from now on
            where = grouped.where
            heads = Heads(e if where[i] is None else e.replace(state=None) for i, e in enumerate(heads.entries))
        if grouped.ungrouped:
            heads = heads.with_states({i: self._after(i, self._entry(i)) for i in grouped.ungrouped})
        changed = self._put_misfits(group_states)
        state = rebuilt(tree, heads, grouped.next(group_states, self.lease))
        if not changed:
            return state
        return rebuilt(tree, [self._after(i, self._entry(i)) if i in changed else e for i, e in enumerate(state._entries)])

    def _after(self, slot: int, entry: Entry) -> Entry:
        outcome, sharding = self.outcomes.get(slot), self.given.tree._slots[slot].sharding
        if sharding is None or outcome is None or slot in self.gathered:
            return entry_after(entry, outcome, self.lease, consume=self.given.in_place)
        new = entry_after(entry.replace(state=local_state(entry.state)), outcome, self.lease, consume=self.given.in_place)
        return new.replace(state=sharded_state(new.state, sharding))

    def _put_misfits(self, group_states: list[GroupState]) -> set[int]:
        """Put the states of misfits into their groups. The slots of all if one has another form now, so that no group fits."""
        fit = True
        for number, all_members in self.misfits.items():
            members = [k for k in all_members if self.grouped.group_states[number].group.slots[k] in self.outcomes]
            old, new = self.grouped.group_states[number], group_states[number]
            if new is old:
                new = group_states[number] = old.leased(None)
            states = {k: self.outcomes[old.group.slots[k]].state for k in members}
            fit = new.put(states, {k: self._lease_of(old.group.slots[k], state) for k, state in states.items()}) and fit
        if fit:
            return set()
        return {self.grouped.group_states[number].group.slots[k] for number, members in self.misfits.items() for k in members}

    def _lease_of(self, slot: int, state: Any) -> Lease:
        """The lease of a new state: the old one's as well, if they share an array."""
        entry = self._entry(slot)
        old = [leaf for leaf in state_leaves(entry.state) if kind(leaf)]
        shares = any(leaf is other for leaf in state_leaves(state) for other in old)
        return Lease.of([self.lease, entry.lease]) if shares and not self.given.in_place else self.lease
