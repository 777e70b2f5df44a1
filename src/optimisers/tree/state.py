"""The state tree: an explicit immutable value, indexed like the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, final

import numpy as np
import optree

from ..arrays import torch_if_loaded
from ..errors import ConsumedStateError, EntryError, ImmutableError
from ..rules._base import AbstractRule
from ..rules._states import map_state
from .entry import Entry, Leaf, Lease, host_state, same_state, shown_state
from .heads import Heads
from .holes import Hole, Placed, map_holes, map_tensors
from .leaves import Place, Slot
from .sealed import Plan
from .sealed import register as register_sealed
from .show import rows_of, state_html, state_rich, state_table
from .structure import ModuleStructure, Structure, TreeStructure


class StatesByGroup(Protocol):
    """States that the engine holds by group, to be shown by leaf."""

    def is_empty(self) -> bool:
        """Whether no state is held so."""

    def elsewhere(self, leaves: Sequence[Any]) -> list[int]:
        """The slots held so of which the parameter, among these leaves of the model, is not on the device of the state."""

    @property
    def ungrouped(self) -> Sequence[int]:
        """The slots that are held otherwise."""

    def holds(self, slot: int) -> bool:
        """Whether the state of this slot is held so."""

    def entry(self, slot: int, head: Entry) -> Entry:
        """The entry of a slot, whatever holds its state."""

    def ended(self, heads: Sequence[Entry]) -> bool:
        """Whether ``update_`` has taken over memory of these states."""

    def with_heads(self, heads: Heads) -> StatesByGroup | None:
        """The same states with other rules; None if they cannot be held by group any more."""


@final
class StateTree:
    """The state of a rule, or of many, over a model: what `setup` returns.

    Immutable. Indexed like the model: ``state["layers"][0]["weight"]``, attribute access for attribute-like nodes, dotted
    names for modules, ``state[()]`` for the only leaf of a bare array; a leaf shows as `Leaf`, an array that is not
    trainable as None. ``==`` compares structure, rules, dtypes and bytes. ``print`` shows a table. It is a pytree for
    optree and for torch: its leaves are the arrays of the state, with counters as 0-d tensors over torch, and the fields
    of rules that are tensors; a tied array appears once.
    """

    __slots__ = ("_by_kind", "_grouped", "_plan", "_slots", "_structure", "_whole")
    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    _structure: Structure
    _slots: tuple[Slot, ...]
    _by_kind: Heads
    _grouped: StatesByGroup | None
    _whole: tuple[Entry, ...] | None

    _plan: Plan

    def __init__(
        self,
        structure: Structure,
        slots: tuple[Slot, ...],
        entries: Iterable[Entry] | Heads,
        grouped: StatesByGroup | None = None,
        *,
        plan: Plan | None = None,
    ) -> None:
        object.__setattr__(self, "_structure", structure)
        object.__setattr__(self, "_slots", slots)
        object.__setattr__(self, "_by_kind", entries if isinstance(entries, Heads) else Heads(entries))
        object.__setattr__(self, "_grouped", grouped)
        object.__setattr__(self, "_plan", plan or Plan(structure, slots))
        object.__setattr__(self, "_whole", None)
        _register_with_torch()

    @property
    def _heads(self) -> tuple[Entry, ...]:
        """The entries, but states that are held by group are out of date in them, and so are their leases."""
        return self._by_kind.entries

    @property
    def _entries(self) -> tuple[Entry, ...]:
        """What is kept for each slot; states that are held by group are shown by leaf."""
        grouped = self._grouped
        if grouped is None or grouped.is_empty():
            return self._heads
        if self._whole is None:
            shown = tuple(grouped.entry(i, head) for i, head in enumerate(self._heads))
            object.__setattr__(self, "_whole", shown)
        return self._whole  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        msg = "a state tree is immutable; use adjust, freeze and thaw, which return a new one"
        raise ImmutableError(msg)

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__setattr__("", value)

    def __reduce__(self) -> tuple[Any, ...]:
        return StateTree, (self._structure, self._slots, self._entries)

    # --- reading ---

    def __getitem__(self, key: Any) -> Any:
        check_alive(self)
        if isinstance(self._structure, ModuleStructure):
            return self._leaf(self._module_index(key))
        if self._structure.spec.is_leaf():
            if key != ():
                raise EntryError(f"this is the state of a single array; its leaf is state[()], not state[{key!r}]")
            return self._leaf(0)
        if isinstance(key, (int, np.integer)) and key < 0 and self._structure.spec.type in {list, tuple}:
            key += self._structure.spec.num_children
        entries = self._structure.spec.entries()
        names = [key == entry and type(key) is type(entry) for entry in entries]
        if not any(names):
            names = [key == entry for entry in entries]
        if not any(names):
            raise EntryError(f"the state has no entry {key!r} here; it has {', '.join(map(repr, entries)) or 'none'}")
        return self._child(names.index(True))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if isinstance(self._structure, TreeStructure):
            spec = self._structure.spec
            if spec.is_leaf() and name in {"rule", "state", "frozen"}:
                return getattr(self[()], name)
            fields = getattr(spec.type, "_fields", None) if isinstance(spec.type, type) else None
            names = list(fields) if fields else ([] if self._is_mapping() else spec.entries())
            if name in names:
                check_alive(self)
                return self._child(names.index(name))
        msg = f"the state has no attribute {name!r} here; index it like the model, state[...]"
        raise EntryError(msg)

    def __len__(self) -> int:
        return len(self._names())

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._structure, TreeStructure) and not self._is_mapping():
            return (self._child(i) for i in range(self._structure.spec.num_children))
        return iter(self._names())

    def __contains__(self, key: object) -> bool:
        return key in self._names()

    def _names(self) -> list[Any]:
        if isinstance(self._structure, ModuleStructure):
            return [slot.path for slot in self._slots]
        return [] if self._structure.spec.is_leaf() else list(self._structure.spec.entries())

    def _is_mapping(self) -> bool:
        kind_of = self._structure.spec.type if isinstance(self._structure, TreeStructure) else None
        return isinstance(kind_of, type) and issubclass(kind_of, dict)

    def _module_index(self, key: Any) -> int:
        aliases = dict(self._structure.aliases)  # type: ignore[union-attr]
        name = aliases.get(key, key)
        if name not in self._structure.paths:
            inside = [path for path in self._structure.paths if isinstance(key, str) and path.startswith(key + ".")]
            hint = f"; did you mean one of {', '.join(map(repr, inside))}?" if inside else ""
            raise EntryError(f"the module has no parameter {key!r}{hint}")
        return self._structure.paths.index(name)

    def _leaf(self, index: int) -> Leaf | None:
        for slot, entry in zip(self._slots, self._entries, strict=True):
            if any(place.leaf == index for place in slot.places):
                rule = None if entry.rule is None else entry.rule.unresolved()
                return Leaf(rule, shown_state(entry, slot.kind), entry.frozen)
        return None

    def _child(self, i: int) -> Any:
        structure: Any = self._structure
        children_specs = structure.spec.children()
        start = sum(spec.num_leaves for spec in children_specs[:i])
        spec = children_specs[i]
        if spec.is_leaf():
            return self._leaf(start)
        end = start + spec.num_leaves
        slots, entries = [], []
        for slot, entry in zip(self._slots, self._entries, strict=True):
            places = tuple(Place(p.leaf - start, p.permutation) for p in slot.places if start <= p.leaf < end)
            if places:
                slots.append(replace(slot, places=places))
                entries.append(entry)
        return StateTree(TreeStructure(spec, structure.keys[start:end], structure.paths[start:end]), tuple(slots), entries)

    # --- comparing and showing ---

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StateTree):
            return NotImplemented
        check_alive(self)
        check_alive(other)
        if self._structure != other._structure or self._slots != other._slots:
            return False
        return all(
            a.rule == b.rule and a.frozen == b.frozen and same_state(host_state(a), host_state(b))
            for a, b in zip(self._entries, other._entries, strict=True)
        )

    def __repr__(self) -> str:
        return _CONSUMED if _has_ended(self) else state_table(rows_of(self))

    def _repr_html_(self) -> str:
        return _CONSUMED if _has_ended(self) else state_html(rows_of(self))

    def __rich_console__(self, _: Any, options: Any) -> Iterator[Any]:
        yield from [_CONSUMED] if _has_ended(self) else state_rich(rows_of(self), options.max_width)


_CONSUMED = "StateTree(consumed by update_)"


def check_alive(state: StateTree) -> None:
    """Raise ConsumedStateError if ``update_`` has taken over memory that this state holds."""
    if _has_ended(state):
        msg = (
            "this state was consumed by update_, which re-used its memory. Go on with the state that update_ returned, or "
            "use update, which leaves its arguments as they are"
        )
        raise ConsumedStateError(msg)


def _has_ended(state: StateTree) -> bool:
    if state._grouped is not None:
        return state._grouped.ended(state._by_kind.given)
    return any(entry.lease.ended for entry in state._by_kind.given)


def hand_over(state: StateTree, new: StateTree) -> None:
    """Make a state that is being consumed the one after the step, where an error keeps that from being returned."""
    object.__setattr__(state, "_whole", None)
    object.__setattr__(state, "_grouped", new._grouped)
    object.__setattr__(state, "_by_kind", new._by_kind)


def rebuilt(state: StateTree, entries: Iterable[Entry] | Heads, grouped: StatesByGroup | None = None) -> StateTree:
    """The same tree with other entries, or states that are held otherwise."""
    return StateTree(state._structure, state._slots, entries, grouped, plan=state._plan)


def reruled(state: StateTree, heads: Iterable[Entry] | Heads) -> StateTree:
    """The same states with other rules, or frozen ones: ``heads`` are the tree's own but for these."""
    new = heads if isinstance(heads, Heads) else Heads(heads)
    grouped = None if state._grouped is None else state._grouped.with_heads(new)
    if state._grouped is not None and grouped is None:
        whole = state._entries
        pairs = zip(whole, new.entries, strict=True)
        new = Heads(e.replace(rule=h.rule, base=h.base, frozen=h.frozen) for e, h in pairs)
    return rebuilt(state, new, grouped)


# --- pytree ---------------------------------------------------------------------------------------------------------------


class _Static:
    """What a state tree is without its arrays: compared when two of them are mapped over together."""

    def __init__(self, plan: Plan, entries: tuple[Entry, ...]) -> None:
        self.plan, self.entries = plan, entries

    def _key(self) -> tuple[Any, ...]:
        return self.plan, tuple((e.rule, e.state, e.numbers, e.frozen) for e in self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((self.plan, tuple(e.frozen for e in self.entries)))


def flatten(state: StateTree) -> tuple[list[Any], _Static, list[str]]:
    """(arrays and tensor-valued fields of rules, the rest, a name for each)."""
    check_alive(state)
    leaves: list[Any] = []
    names: list[str] = []
    rules: dict[int, AbstractRule | None] = {}

    def take(name: str) -> Any:
        def inner(leaf: Any) -> Hole:
            leaves.append(leaf.value if isinstance(leaf, Placed) else leaf)
            names.append(name)
            return Hole(len(leaves) - 1)

        return inner

    entries = []
    for slot, entry in zip(state._slots, state._entries, strict=True):
        for rule in (entry.rule, entry.base):
            if id(rule) not in rules:
                rules[id(rule)] = None if rule is None else map_tensors(rule, take(f"{slot.path}:rule"))
        visible = shown_state(entry, slot.kind)
        hollow = map_state(take(f"{slot.path}:state"), visible)
        entries.append(entry.replace(rule=rules[id(entry.rule)], base=rules[id(entry.base)], state=hollow))
    return leaves, _Static(state._plan, tuple(entries)), names


def unflatten(static: _Static, leaves: Iterable[Any]) -> StateTree:
    """A state tree from its arrays, with memory of its own as far as ``update_`` is concerned."""
    values = list(leaves)
    lease = Lease()
    rules: dict[int, AbstractRule | None] = {}

    def fill(hole: Any) -> Any:
        value = values[hole.index]
        return Placed(value) if value is None or isinstance(value, (tuple, list, dict)) else value

    entries = []
    for entry in static.entries:
        for rule in (entry.rule, entry.base):
            if id(rule) not in rules:
                rules[id(rule)] = None if rule is None else map_holes(rule, fill)
        state = map_state(fill, entry.state)
        new = entry.replace(rule=rules[id(entry.rule)], base=rules[id(entry.base)], state=state, lease=lease)
        entries.append(new.replace(state=host_state(new)))
    return StateTree(static.plan.structure, static.plan.slots, entries, plan=static.plan)


def _optree_flatten(state: StateTree) -> tuple[list[Any], _Static, list[str]]:
    leaves, static, names = flatten(state)
    return leaves, static, [f"{i}:{name}" for i, name in enumerate(names)]


optree.register_pytree_node(
    StateTree,
    _optree_flatten,  # type: ignore[arg-type]
    unflatten,  # type: ignore[arg-type]
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)

_registered_with_torch = False


def _register_with_torch() -> None:
    """Register with torch's own pytree once torch is there; a program without torch never comes to need it."""
    global _registered_with_torch  # noqa: PLW0603
    if _registered_with_torch or torch_if_loaded() is None:
        return
    from ..arrays import _torch

    _registered_with_torch = True
    _torch.register_pytree(
        StateTree,
        lambda state: flatten(state)[:2],
        lambda leaves, static: unflatten(static, leaves),
    )
    register_sealed(_torch.pytree_module())
