"""State by group: parameters that are stepped by one loop, with their moments and counters side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np

from ...arrays import Untraceable, dtype_name, is_number, kind, torch_if_loaded
from ...rules._base import AbstractRule, children
from ...rules._states import state_leaves
from ...rules._wrapper import Wrapper
from ...rules.wrappers.chain import OptimiserChain
from ...rules.wrappers.scheduled import Scheduled
from ...tree.entry import Entry, Lease
from ...tree.heads import Heads
from ...tree.leaves import Slot
from ...tree.sharding import Sharding, sharded_state
from ..graph.program import COMPILED
from ..graph.trace import filled, form_of, nesting, structure_of_rule
from ..kernels.cuda.devices import device_of
from ..memory.pool import Column, Pool
from ..memory.strides import Vector, element_strides, is_loopable, lie_alike
from .group import Group
from .track import PreparedStep

_GUARD_FAILURES = 16


class GroupState:
    """The state of one group at one time.

    Attributes:
        columns: for each array of the state those of all parameters.
        counters: the numbers of the state, a row for each parameter.

    """

    def __init__(self, group: Group, columns: list[Column], counters: Vector) -> None:
        self.group, self.columns, self.counters = group, columns, counters

    def array(self, k: int, member: int) -> Any:
        """One array of the state of a parameter."""
        return self.columns[k].array(member, *self.group.laid_out(k, member))

    def state(self, member: int) -> Any:
        """The state of a parameter, as its rule has it."""
        group = self.group
        leaves: list[Any] = [None] * len(group.form)
        for k, i in enumerate(group.numbers):
            value, part = float(self.counters[member, k]), group.form[i]
            if part.form == "number":
                leaves[i] = int(value) if part.dtype == "int" else value
            else:
                leaves[i] = _scalar(value, part.dtype, group.library)
        for k, i in enumerate(group.stored):
            leaves[i] = self.array(k, member)
        return filled(group.template, iter(leaves))

    def leased(self, lease: Lease | None) -> GroupState:
        """The same memory, taken over by a new lease if there is one."""
        columns = [column if lease is None else column.leased(lease) for column in self.columns]
        return GroupState(self.group, columns, self.counters.copy())

    def restored(self, old: GroupState, members: list[int], lease: Lease) -> GroupState:
        """With what some parameters had before, in the memory where it was."""
        columns = [
            new.replaced({m: old.array(k, m) for m in members}, dict.fromkeys(members, lease))
            for k, new in enumerate(self.columns)
        ]
        counters = self.counters.copy()
        counters[members] = old.counters[members]
        return GroupState(self.group, columns, counters)

    def put(self, states: dict[int, Any], leases: dict[int, Lease]) -> bool:
        """Take the states of parameters that were stepped otherwise; False if one has another form now."""
        group = self.group
        for member, state in states.items():
            try:
                if nesting(state) != group.nesting or form_of(state, group.shapes[member], group.dtype) != group.form:
                    return False
            except Untraceable:
                return False
            leaves = state_leaves(state)
            shape, strides = group.shapes[member], group.strides[member]
            kept = [leaves[i] for i in group.arrays]
            if not all(is_loopable(leaf) and lie_alike(shape, element_strides(leaf), strides) for leaf in kept):
                return False
        for k, i in enumerate(group.stored):
            arrays = {member: state_leaves(state)[i] for member, state in states.items()}
            self.columns[k] = self.columns[k].replaced(arrays, leases)
        for member, state in states.items():
            leaves = state_leaves(state)
            self.counters[member] = group.counters_in(leaves)
        return True


def _scalar(value: float, dtype: str, library: str) -> Any:
    if library == "numpy":
        return np.array(value, dtype)
    torch: Any = torch_if_loaded()
    return torch.tensor(value, dtype=getattr(torch, dtype), device="cpu")


class RunCache:
    """What a line of states knows of how it is stepped.

    Attributes:
        pool: the memory of its generations.
        steps: how many steps were taken.
        regroup_at: the step from which on what is held by no group for a while is considered again.
        guard_failures: how many steps in a row measures came out otherwise than loops were made for.
        refused: kinds of groups that no loop could be made for.
        prepared: how each group was stepped last, by its number; taken out while it is being stepped.
        unaliased: the groups of the last step, by their slots, if none of its gradients lay in memory to be written.

    """

    def __init__(self) -> None:
        self.pool = Pool()
        self.steps = 0
        self.regroup_at = 0
        self.guard_failures = 0
        self.refused: set[Any] = set()
        self.prepared: dict[int, PreparedStep] = {}
        self.unaliased: list[list[int]] | None = None

    def __deepcopy__(self, memo: Any) -> RunCache:
        return RunCache()


class GroupedState:
    """What a state tree holds by group.

    Attributes:
        group_states: one for each group.
        where: for each slot (number of the group, number in it), or None.
        cache: shared by all states that follow from one another.
        lease: of counters; each column has one of its own.
        pending: whether what is left out is to be grouped again later.
        ungrouped: the slots that are in no group.
        idle: the slots that are frozen or have no rule.
        first: for each slot the leaf at its first place.
        tied: the slots in groups that stand at several places.
        single: whether every slot stands at one place only.
        checked_singly: the slots whose gradients are looked at one by one.

    """

    def __init__(
        self,
        group_states: list[GroupState],
        where: list[tuple[int, int] | None],
        cache: RunCache,
        lease: Lease,
        idle: list[int],
        slots: Sequence[Slot],
        *,
        pending: bool,
    ) -> None:
        self.group_states, self.where, self.cache, self.lease, self.idle, self.pending = (
            group_states, where, cache, lease, idle, pending,
        )  # fmt: skip
        self.ungrouped = [i for i, place in enumerate(where) if place is None]
        self.first = [slot.places[0].leaf for slot in slots]
        self.tied = [i for i, slot in enumerate(slots) if len(slot.places) > 1 and where[i] is not None]
        self.single = all(len(slot.places) == 1 for slot in slots)
        self._slots = slots
        self.checked_singly = [*self.ungrouped, *self.tied]

    def next(self, group_states: list[GroupState], lease: Lease) -> GroupedState:
        """The states after a step."""
        new = object.__new__(GroupedState)
        new.__dict__.update(self.__dict__)
        new.group_states, new.lease = group_states, lease
        return new

    def dissolved(self) -> GroupedState:
        """Nothing held by group, for one step in which measures came out unexpectedly, or for good if that is the rule."""
        self.cache.guard_failures += 1
        if self.cache.guard_failures > _GUARD_FAILURES:
            self.cache.refused.update(group_state.group.key for group_state in self.group_states)
        self.cache.regroup_at = self.cache.steps + 1
        return GroupedState([], [None] * len(self.where), self.cache, Lease(), self.idle, self._slots, pending=True)

    def is_empty(self) -> bool:
        """Whether no state is held so."""
        return not self.group_states

    def elsewhere(self, leaves: Sequence[Any]) -> list[int]:
        """The slots held so of which the parameter, among these leaves of the model, is not on the device of the state."""
        first, found = self.first, []
        for group in (group_state.group for group_state in self.group_states):
            place = group.place
            if place is not None:
                found += [i for i in group.slots if leaves[first[i]].device != place]
        return found

    def holds(self, slot: int) -> bool:
        """Whether the state of this slot is held so."""
        return self.where[slot] is not None

    def entry(self, slot: int, head: Entry) -> Entry:
        """The entry of a slot, whatever holds its state."""
        place = self.where[slot]
        if place is None:
            return head
        group_state = self.group_states[place[0]]
        leases = [self.lease, *(column.lease_of(place[1]) for column in group_state.columns)]
        state, sharding = group_state.state(place[1]), self._slots[slot].sharding
        return head.replace(state=state if sharding is None else sharded_state(state, sharding), lease=Lease.of(leases))

    def leases(self) -> set[Lease]:
        """All leases of the memory that is held by group."""
        found = {self.lease}
        for group_state in self.group_states:
            for column in group_state.columns:
                found.add(column.lease)
                found.update(column.older.values())
        return found

    def ended(self, heads: Sequence[Entry]) -> bool:
        """Whether ``update_`` has taken over memory of these states."""
        if self.lease.ended:
            return True
        for group_state in self.group_states:
            for column in group_state.columns:
                if column.lease.ended or (column.older and any(lease.ended for lease in column.older.values())):
                    return True
        return any(heads[i].lease.ended for i in self.ungrouped)

    def with_heads(self, heads: Heads) -> GroupedState | None:
        """The same states with other rules; None if they cannot be held by group any more."""
        group_states = []
        for group_state in self.group_states:
            group: Group | None = group_state.group
            rules = heads.rules.at(group_state.group.slots)
            if not all(map(is_, rules.each(), group_state.group.rules.each())):
                group = group_state.group.with_rules(rules)
            if group is None:
                return None
            group_states.append(GroupState(group, group_state.columns, group_state.counters))
        grouped = self.next(group_states, self.lease)
        grouped.idle = heads.idle
        return grouped


def without_groups(entries: Sequence[Entry], cache: RunCache, slots_of: Sequence[Slot]) -> GroupedState:
    """The states of entries, none of them in a group."""
    return GroupedState([], [None] * len(entries), cache, Lease(), Heads(entries).idle, slots_of, pending=False)


def group_entries(entries: Sequence[Entry], xs: Sequence[Any], cache: RunCache, slots_of: Sequence[Slot]) -> GroupedState:
    """The states of entries by group, as far as loops can be made for them.

    ``xs`` are the parameters. Nothing is copied: columns refer to the arrays that are there.
    """
    where: list[tuple[int, int] | None] = [None] * len(entries)
    group_states: list[GroupState] = []
    heads = Heads(entries)
    found: defaultdict[Any, list[int]] = defaultdict(list)
    for i, (entry, x) in enumerate(zip(entries, xs, strict=True)):
        key = key_of(entry, x, slots_of[i].sharding)
        if key is not None and key not in cache.refused:
            found[key].append(i)
    for key, slots in found.items():
        rules = heads.rules.at(slots)
        paths = [slots_of[i].path or "(the array)" for i in slots]
        shardings = [slots_of[i].sharding for i in slots]
        group = Group(key, slots, paths, rules, [xs[i] for i in slots], entries[slots[0]].state, shardings)
        leaves = [state_leaves(entries[i].state) for i in slots]
        columns = []
        for k in group.stored:
            arrays = [row[k] for row in leaves]
            columns.append(Column.of(arrays, [entries[i].lease for i in slots]))
        counters = np.array([group.counters_in(row) for row in leaves]).reshape(group.count, -1)
        for member, i in enumerate(slots):
            where[i] = len(group_states), member
        group_states.append(GroupState(group, columns, counters))
    lease = Lease.of(entries[i].lease for g in group_states for i in g.group.slots) if group_states else Lease()
    return GroupedState(group_states, where, cache, lease, heads.idle, slots_of, pending=False)


def lies_well(x: Any, sharding: Sharding | None) -> bool:
    """Whether loops can run over an array, or over a part of one, which may be empty."""
    return is_loopable(x) or (sharding is not None and 0 in x.shape)


def key_of(entry: Entry, x: Any, sharding: Sharding | None = None) -> Any:
    """What parameters of one group have in common; None for one that no loop can step."""
    rule = entry.rule
    if rule is None or not has_law(rule) or not lies_well(x, sharding):
        return None
    dtype = dtype_name(x)
    if dtype not in COMPILED:
        return None
    strides = element_strides(x)
    try:
        form = form_of(entry.state, tuple(x.shape), dtype)
        if any(part.form == "scalar" for part in form) and x.ndim == 0:
            return None
        if rule.law != "elementwise" and x.ndim == 0:
            return None
        for leaf, part in zip(state_leaves(entry.state), form, strict=True):
            well = part.form != "array" or (lies_well(leaf, sharding) and kind(leaf) == kind(x))
            if not well or (part.form == "array" and not lie_alike(x.shape, element_strides(leaf), strides)):
                return None
            if part.form == "array" and kind(x) == "torch" and leaf.device != x.device:
                return None
            if not is_number(leaf) and getattr(leaf, "requires_grad", False):
                return None
            if part.form == "scalar" and kind(leaf) == "torch" and not (kind(x) == "torch" and leaf.device == x.device):
                return None
        return structure_of_rule(rule), nesting(entry.state), form, dtype, kind(x), device_of(x)
    except Untraceable:
        return None


def has_law(rule: AbstractRule) -> bool:
    """Whether a rule is made of rules with laws, so that it may become loops. Laws of several kinds together are none."""
    made_of_rules = isinstance(rule, (OptimiserChain, Scheduled)) or (isinstance(rule, Wrapper) and rule.transparent)
    return rule.law != "none" or (made_of_rules and all(has_law(inner) for _, _, inner in children(rule)))
