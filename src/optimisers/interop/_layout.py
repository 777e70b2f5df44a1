"""Parameters that were exchanged, moved, added to or taken out of groups by their lists: moments follow the object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..arrays import copied, kind
from ..errors import StructureError
from ..rules._states import map_state
from ..setup_api.setup import first_entry
from ..tree.entry import Entry, Lease, host_state
from ..tree.leaves import Place, Slot, find
from ..tree.state import StateTree
from ..tree.structure import ModuleStructure
from ..tree.ties import tied_groups
from ._entries import changed_betas, repowered
from ._groups import Group, Held, refuse_overlaps
from ._named import Named
from ._tensors import named_tensors


def matched_groups(held: Held, param_groups: Sequence[dict[str, Any]]) -> list[Group | None]:
    """For each dict the group that it is: the same dict, else one of its parameters was in that group; None for a new one."""
    by_dict = {id(known.shown): known for known in held.groups}
    result = [by_dict.get(id(group)) for group in param_groups]
    left = [known for known in held.groups if not any(known is other for other in result)]
    for i, group in enumerate(param_groups):
        if result[i] is None:
            mine = set(group["params"])
            result[i] = next((known for known in left if not mine.isdisjoint(known.params)), None)
            left = [known for known in left if known is not result[i]]
    return result


class Rearrangement:
    """The state tree and the groups for parameter lists as they are now; nothing is changed before ``commit``."""

    def __init__(self, held: Held, param_groups: Sequence[dict[str, Any]], groups: Sequence[Group], dtype: str | None) -> None:
        self.held, self.param_groups, self.olds, self.dtype = held, param_groups, groups, dtype
        tree: Any = held.tree
        self.tree: StateTree = tree
        self.known = {
            x: (name, number, known)
            for known in held.groups
            for (name, number), x in zip(known.places, known.params, strict=True)
        }
        present = [x for group in param_groups for x in group["params"]]
        if len(present) != len(set(present)):
            msg = "a parameter stands in param_groups twice"
            raise StructureError(msg)
        self.present = set(present)
        self.taken = {name for x, (name, _, _) in self.known.items() if x in self.present}
        self.names: dict[str, None] = dict.fromkeys(tree._structure.paths)
        self.made: dict[str, tuple[Slot, Entry]] = {}
        """What comes into the tree, by name."""
        self.followed: list[tuple[torch.Tensor, dict[str, Any], dict[str, Any]]] = []
        """(parameter, state before, state after) where powers follow the betas of another group."""
        self._refuse_cut_ties()
        self.members = [self._members(i) for i in range(len(param_groups))]
        if self.made:
            refuse_overlaps_of = [[name for name, _ in members] for members in self.members]
            names = [name for names in refuse_overlaps_of for name in names]
            tied = tied_groups([x.detach() for x in present], names)
            refuse_overlaps([g for g in tied if any(names[i] in self.made for i, _ in g)], names)

    def _refuse_cut_ties(self) -> None:
        paths = self.tree._structure.paths
        by_name = {name: x for x, (name, _, _) in self.known.items()}
        for slot in self.tree._slots:
            here = [by_name[paths[place.leaf]] in self.present for place in slot.places]
            if any(here) and not all(here):
                names = " and ".join(repr(paths[place.leaf]) for place in slot.places)
                msg = f"{names} share their memory; take both out of param_groups, or neither"
                raise StructureError(msg)

    def _members(self, i: int) -> list[tuple[str, Any]]:
        """(name, old number, or the entry that comes) of each parameter of a group."""
        group, old = self.param_groups[i], self.olds[i]
        found: list[tuple[str, Any]] = []
        for j, x in enumerate(group["params"]):
            if x in self.known:
                name, number, before = self.known[x]
                self._refuse_other_kind(before, old, name, i)
                if before is not old and number >= 0:
                    entry = self.tree._entries[number]
                    self.made[name] = self.tree._slots[number], self._ruled(old, name, x, entry)
                found.append((name, number))
                continue
            name = self._name(group, old, j, x)
            self.taken.add(name)
            self.names[name] = None
            kept = self.held.parked.get(x)
            self.made[name] = self._entered(old, i, name, x, kept)
            found.append((name, 0))
        return found

    def _refuse_other_kind(self, before: Group, now: Group, name: str, i: int) -> None:
        if before.entries.kind != now.entries.kind:
            msg = (
                f"{name!r} was moved to param_groups[{i}], whose rule is {now.entries.kind}; its moments are those of "
                f"{before.entries.kind}"
            )
            raise StructureError(msg)

    def _name(self, group: dict[str, Any], old: Group, j: int, x: torch.Tensor) -> str:
        names = group.get("param_names")
        wishes = [self.held.frozen.get(x), (self.held.parked.get(x) or [None])[0]]
        if names is not None and len(names) == len(group["params"]):
            wishes.append(names[j])
        elif names is None and j < len(old.places):
            wishes.append(old.places[j][0])
        for wish in wishes:
            if wish is not None and wish not in self.taken:
                return str(wish)
        number = len(self.names)
        while str(number) in self.names:
            number += 1
        return str(number)

    def _rules(self, old: Group) -> tuple[Any, Any]:
        """(rule, rule at construction) of a group, for one more parameter."""
        if old.slots:
            first: Any = self.tree._heads[old.slots[0]]
            return first.rule.unresolved(), first.base.unresolved()
        return old.newcomers(), old.base

    def _ruled(self, old: Group, name: str, x: torch.Tensor, entry: Entry) -> Entry:
        """The entry of a parameter that moves to a group, under its rule; torch's corrections follow the betas there."""
        rule, base = self._rules(old)
        before: Any = entry.rule
        new = entry.replace(rule=rule.resolved(x, name), base=base.resolved(x, name))
        if betas := changed_betas(before, new.rule):  # type: ignore[arg-type]
            new = new.replace(state=repowered(entry.state, betas))
            self.followed.append((x, named_tensors(entry.state), named_tensors(new.state)))
        return new

    def _entered(self, old: Group, i: int, name: str, x: torch.Tensor, kept: Any) -> tuple[Slot, Entry]:
        found = find(Named({name: x.detach()}))
        (slot,) = found.slots
        if kept is not None and kept[1].rule is not None and kept[2] == old.entries.kind and kept[3] == tuple(x.shape):
            return slot, self._ruled(old, name, x, kept[1])
        rule, base = self._rules(old)
        entry = first_entry(rule, f"added to param_groups[{i}]", slot, x.detach(), self.dtype, {}, Lease())
        return slot, entry.replace(base=base.resolved(x, name))

    def commit(self) -> None:
        """Make it so."""
        held, old_tree = self.held, self.tree
        gone = [(x, name, number, known) for x, (name, number, known) in self.known.items() if x not in self.present]
        paths = tuple(self.names)
        where = {path: i for i, path in enumerate(paths)}
        lost = {number for _, _, number, _ in gone}
        rows: list[tuple[Slot, Entry, int]] = []
        for number, (slot, entry) in enumerate(zip(old_tree._slots, old_tree._entries, strict=True)):
            if number not in lost:
                moved = self.made.pop(slot.path, None) if slot.path in self.made else None
                rows.append((slot, entry if moved is None else moved[1], number))
        for name, (slot, entry) in self.made.items():
            place = (Place(where[name], None),)
            rows.append((replace(slot, places=place), entry, -1))
        rows.sort(key=lambda row: row[0].places[0].leaf)
        structure: Any = old_tree._structure
        tree = StateTree(ModuleStructure(paths, structure.aliases), tuple(r[0] for r in rows), [r[1] for r in rows])
        numbers = {slot.path: i for i, (slot, _, _) in enumerate(rows)}
        groups = []
        for group, old, members in zip(self.param_groups, self.olds, self.members, strict=True):
            rule, base = self._rules(old)
            places = tuple((name, -1 if number < 0 else numbers[name]) for name, number in members)
            slots = tuple(number for _, number in places if number >= 0)
            groups.append(old._replace(slots=slots, places=places, rule=rule, base=base))
            if "param_names" in group:
                group["param_names"] = [name for name, _ in members]
        self._park(gone)
        for x in self.present:
            held.parked.pop(x, None)
        held.tree, held.groups = tree, groups
        held.bind(self.param_groups)
        held.note_untrained()

    def _park(self, gone: list[tuple[Any, str, int, Group]]) -> None:
        """Keep the moments of what was taken out, in memory of their own, since the next step re-uses that of the tree."""
        for x, name, number, known in gone:
            if number >= 0:
                entry = self.tree._entries[number]
                state = map_state(lambda leaf: copied(leaf) if kind(leaf) else leaf, host_state(entry))
                shape = self.tree._slots[number].param.shape
                self.held.parked[x] = [name, entry.replace(state=state, lease=Lease()), known.entries.kind, shape]
