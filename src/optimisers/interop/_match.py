"""Bringing what a file holds together with what is there: by path, with an account of everything that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import kind, torch_if_loaded
from ..errors import CheckpointError, OptimisersError
from ..rules._base import AbstractRule, walk
from ..rules._states import state_leaves
from ..setup_api.setup import check_groups, first_entry, initial_state
from ..tree.entry import Entry, Lease, host_state, numbers_in
from ..tree.leaves import Found, Slot
from ..tree.paths import shown
from ..tree.state import StateTree, rebuilt
from . import _rule_text
from ._rule_text import NOTHING, all_own
from ._state_text import Misfit, Reader


@dataclass(frozen=True)
class StoredEntry:
    """What a file says of one array."""

    path: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: str
    rule: int | None
    base: int | None
    """Numbers in the file's list of rules."""
    frozen: bool
    reason: str
    state: Any

    @staticmethod
    def parsed(data: Any, rules: int, where: str) -> StoredEntry:
        """The entry that the JSON object gives; CheckpointError unless every part is of its type."""
        if not isinstance(data, dict):
            data = {}

        def number(value: Any) -> bool:
            return value is None or (type(value) is int and 0 <= value < rules)

        ok = (
            all(isinstance(data.get(key), str) for key in ("path", "dtype", "reason"))
            and isinstance(data.get("tied"), list)
            and all(isinstance(path, str) for path in data["tied"])
            and isinstance(data.get("shape"), list)
            and all(type(n) is int and n >= 0 for n in data["shape"])
            and data.get("kind") in ("numpy", "torch")
            and isinstance(data.get("frozen"), bool)
            and number(data.get("rule"))
            and number(data.get("base"))
            and (data.get("rule") is None) == (data.get("base") is None)
        )
        if not ok:
            msg = f"load: the description in {where!r} has an entry that describes no array: {str(data)[:120]}"
            raise CheckpointError(msg)
        tied, shape = tuple(data["tied"]), tuple(data["shape"])
        rest = {key: data.get(key) for key in ("path", "dtype", "kind", "rule", "base", "frozen", "reason", "state")}
        return StoredEntry(tied=tied, shape=shape, **rest)

    def __str__(self) -> str:
        return f"{shown(self.path)} ({_array_text(self.shape, self.dtype, self.kind)})"


@dataclass
class Problems:
    """What does not fit, each with its text."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def refuse(self, where: str, remedies: Sequence[str]) -> None:
        """Raise CheckpointError if there are any."""
        lines = [
            *(f"  missing: {text}" for text in self.missing),
            *(f"  unexpected: {text}" for text in self.unexpected),
            *(f"  mismatched: {text}" for text in self.mismatched),
        ]
        if lines:
            raise CheckpointError("\n".join([f"load: {where!r} does not fit:", *lines, *remedies]))


class Loading:
    """One file on its way into a state."""

    def __init__(
        self,
        where: str,
        rules: list[Any],
        entries: Sequence[StoredEntry],
        untrained: Sequence[str],
        tensors: Mapping[str, Any],
        rename: Callable[[str], str] | None,
    ) -> None:
        self.where, self.rules, self.tensors = where, rules, tensors
        self.stored: dict[str, StoredEntry] = {}
        for entry in entries:
            path = rename(entry.path) if rename else entry.path
            if path in self.stored:
                hint = " after rename=" if rename else ""
                msg = f"load: {where!r} has two entries for {shown(path)}{hint}"
                raise CheckpointError(msg)
            tied = tuple(map(rename, entry.tied)) if rename else entry.tied
            self.stored[path] = StoredEntry(**{**vars(entry), "path": path, "tied": tied})
        self.untrained = {rename(path) for path in untrained} if rename else set(untrained)
        self.problems = Problems()
        self.lease = Lease()
        self._made: dict[tuple[int, int], AbstractRule] = {}

    # --- into a state ---

    def into_state(self, like: StateTree, *, strict: bool) -> StateTree:
        """The state ``like`` with what the file holds; its rules supply what the file cannot hold."""
        self._compare(like._slots, like._structure.paths)
        device = _device_of(leaf for entry in like._entries for leaf in state_leaves(entry.state))
        entries = []
        for slot, entry in zip(like._slots, like._entries, strict=True):
            stored = self._fitting(slot)
            new = None if stored is None else self._taken_like(slot, entry, stored, device)
            entries.append(entry.replace(reason=_anew(entry.reason)) if new is None else new)
        if strict:
            self.problems.refuse(self.where, self._remedies())
        return rebuilt(like, entries)

    def _taken_like(self, slot: Slot, entry: Entry, stored: StoredEntry, device: Any) -> Entry | None:
        where = f"the rule of {shown(slot.path)}"
        if (stored.rule is None) != (entry.rule is None):
            texts = ("not trained", "trained")
            there, now = texts[stored.rule is not None], texts[entry.rule is not None]
            self.problems.mismatched.append(f"{shown(slot.path)}: {there} in the file, {now} here")
            return None
        rule = self._rule(stored.rule, entry.rule, where)
        base = self._rule(stored.base, entry.base, where)
        if rule is not None and entry.rule is not None:
            file, here = ([type(inner).__name__ for inner in walk(r)] for r in (rule, entry.rule))
            if file != here:
                text = f"{shown(slot.path)}: its rule is {_nested(file)} in the file, {_nested(here)} here"
                self.problems.mismatched.append(text)
                return None
            if rule != entry.rule and not self._takes(rule, slot, host_state(entry)):
                return None
        reader = Reader(self.tensors, slot.kind, device, same_dtypes=True)
        state = self._state(slot, stored, rule, reader, host_state(entry))
        if state is _UNFIT:
            return None
        alike = len(state_leaves(state)) == len(entry.numbers)
        numbers = entry.numbers if alike else numbers_in(state)
        return Entry(rule, base, state, numbers, stored.frozen, stored.reason, self.lease)

    # --- into a model ---

    def into_model(self, found: Found, *, strict: bool) -> StateTree:
        """A state for a model, rules rebuilt from the file alone."""
        self._compare(found.slots, found.structure.paths)
        entries: list[Entry | None] = []
        for slot in found.slots:
            stored = self._fitting(slot)
            x = found.leaves[slot.places[0].leaf]
            entries.append(None if stored is None else self._taken(slot, stored, x))
        if strict:
            self.problems.refuse(self.where, self._remedies())
        common = self._common_rule([slot.path for slot, e in zip(found.slots, entries, strict=True) if e is None])
        shared: dict[AbstractRule, AbstractRule] = {}
        full = []
        for slot, entry in zip(found.slots, entries, strict=True):
            x = found.leaves[slot.places[0].leaf]
            reason = _anew("the one rule in the file")
            full.append(entry or first_entry(common, reason, slot, x, None, shared, self.lease))
        check_groups([(slot, entry.rule) for slot, entry in zip(found.slots, full, strict=True)])
        return StateTree(found.structure, found.slots, full)

    def _taken(self, slot: Slot, stored: StoredEntry, x: Any) -> Entry | None:
        where = f"the rule of {shown(slot.path)}"
        rule = self._rule(stored.rule, NOTHING, where)
        base = self._rule(stored.base, NOTHING, where)
        try:
            rule, base = (None if r is None else r.resolved(x, slot.path) for r in (rule, base))
            expected = None if rule is None else initial_state(rule, slot, x, None)
        except _REFUSALS as error:
            self.problems.mismatched.append(f"{shown(slot.path)}: {type(rule).__name__} refuses it: {error}")
            return None
        device = x.device if kind(x) == "torch" else None
        reader = Reader(self.tensors, slot.kind, device, same_dtypes=False)
        state = self._state(slot, stored, rule, reader, expected)
        if state is _UNFIT:
            return None
        return Entry(rule, base, state, numbers_in(state), stored.frozen, stored.reason, self.lease)

    def _common_rule(self, paths: list[str]) -> AbstractRule | None:
        """The setup rule that all trained entries of the file share, for arrays that the file does not have."""
        if not paths:
            return None
        bases = [self._rule(entry.base, NOTHING, "the rule of the file") for entry in self.stored.values()]
        alike: set[AbstractRule] = {base.unresolved() for base in bases if base is not None}
        if len(alike) != 1:
            listed = ", ".join(map(shown, paths))
            msg = (
                f"load: {self.where!r} has nothing that fits {listed}, and {len(alike)} different rules, so none can be chosen "
                "for them; give like= a state that was set up for the model"
            )
            raise CheckpointError(msg)
        return alike.pop()

    # --- both ---

    def _rule(self, number: int | None, like: Any, where: str) -> Any:
        if number is None:
            return None
        key = number, id(like)
        if key not in self._made:
            made = _rule_text.rebuilt(self.rules[number], self._tensor, like, where)
            if not isinstance(made, AbstractRule):
                msg = f"{where}: the file gives {str(self.rules[number])[:60]!r} in its place"
                raise CheckpointError(msg)
            self._made[key] = made
        return self._made[key]

    def _tensor(self, name: Any) -> Any:
        found = self.tensors.get(name) if isinstance(name, str) else None
        if kind(found) != "torch":
            why = "which is not in the file" if found is None else "and torch is not imported; import it before loading"
            msg = f"load: a field of a rule is the tensor {name!r}, {why}"
            raise CheckpointError(msg)
        if found.ndim != 0 or not found.is_floating_point():  # type: ignore[union-attr]
            msg = f"load: a field of a rule is the tensor {name!r}, which is not the 0-d floating point tensor that it must be"
            raise CheckpointError(msg)
        return found.clone()  # type: ignore[union-attr]

    def _takes(self, rule: AbstractRule, slot: Slot, state: Any) -> bool:
        """Whether a rule of this library, as the file has it, fits the array and such a state; what does not is noted."""
        if not all_own(rule):
            return True
        x = _example(slot)
        try:
            fresh = initial_state(rule.unresolved().resolved(x, slot.path), slot, x, None)
        except _REFUSALS as error:
            self.problems.mismatched.append(f"{shown(slot.path)}: {type(rule).__name__} refuses it: {error}")
            return False
        there, here = ([tuple(leaf.shape) for leaf in state_leaves(s) if kind(leaf)] for s in (fresh, state))
        if there != here:
            text = (
                f"{shown(slot.path)}: {type(rule).__name__} of the file keeps arrays of shapes {there}, the state here {here}"
            )
            self.problems.mismatched.append(text)
        return there == here

    def _state(self, slot: Slot, stored: StoredEntry, rule: AbstractRule | None, reader: Reader, expected: Any) -> Any:
        try:
            # A user's rule may change what its state is made of as it goes; a rule of this library does not.
            return reader.build(stored.state, expected, fixed=all_own(rule))
        except Misfit as error:
            self.problems.mismatched.append(f"{shown(slot.path)}: {error}")
            return _UNFIT

    def _compare(self, slots: Sequence[Slot], paths: Sequence[str]) -> None:
        """Note what is missing, unexpected, or tied otherwise."""
        here = {slot.path for slot in slots}
        tied_here = {alias: slot.path for slot in slots for alias in slot.param.tied_paths}
        tied_there = {alias: path for path, entry in self.stored.items() for alias in entry.tied}
        # A dict of a module's parameters has each of them under one name: what the other side does not know is no difference.
        both = {*paths, *tied_here} & {*self.stored, *tied_there, *self.untrained}
        for slot in slots:
            stored = self.stored.get(slot.path)
            if stored is None and slot.path in tied_there:
                text = f"{shown(slot.path)}: tied to {shown(tied_there[slot.path])} in the file, an array of its own here"
                self.problems.mismatched.append(text)
            elif stored is None and slot.path in self.untrained:
                text = f"{shown(slot.path)} was not trained when the file was saved (requires_grad, trainable=), and is here"
                self.problems.missing.append(text)
            elif stored is None:
                text = f"{shown(slot.path)} ({_array_text(slot.param.shape, slot.dtype, slot.kind)}) is not in the file"
                self.problems.missing.append(text)
            elif {*stored.tied} & both != {*slot.param.tied_paths} & both:
                there, now = (", ".join(map(shown, t)) or "nothing" for t in (sorted(stored.tied), slot.param.tied_paths))
                self.problems.mismatched.append(f"{shown(slot.path)}: tied to {there} in the file, to {now} here")
        for path, stored in self.stored.items():
            if path in here:
                continue
            if path in tied_here:
                text = f"{shown(path)}: an array of its own in the file, tied to {shown(tied_here[path])} here"
                self.problems.mismatched.append(text)
            else:
                untrained = path in paths
                why = (
                    "is in the model, but is not trained there (requires_grad, trainable=)"
                    if untrained
                    else "is not in the model"
                )
                self.problems.unexpected.append(f"{stored} {why}")

    def _fitting(self, slot: Slot) -> StoredEntry | None:
        """The file's entry for an array if it is of the same kind, shape and dtype."""
        stored = self.stored.get(slot.path)
        if stored is None:
            return None
        there = _array_text(stored.shape, stored.dtype, stored.kind)
        now = _array_text(slot.param.shape, slot.dtype, slot.kind)
        if there != now:
            self.problems.mismatched.append(f"{shown(slot.path)}: {there} in the file, {now} here")
            return None
        return stored

    def _remedies(self) -> list[str]:
        lines = []
        if self.problems.missing and self.problems.unexpected:
            lines.append("If layers were renamed, give rename=, a function from the path in the file to the path here.")
        lines.append("strict=False takes what fits and starts the rest anew; opt.extend makes a state for a changed model.")
        return lines


_UNFIT: Any = object()
_REFUSALS = (OptimisersError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, RuntimeError)


def _example(slot: Slot) -> Any:
    """An array like the parameter, of which no memory is touched."""
    if slot.kind == "numpy":
        return np.zeros(slot.param.shape, slot.param.dtype)
    return torch_if_loaded().empty(slot.param.shape, dtype=slot.param.dtype, device="meta")  # type: ignore[union-attr]


def _device_of(leaves: Any) -> Any:
    return next((leaf.device for leaf in leaves if kind(leaf) == "torch"), None)


def _anew(reason: str) -> str:
    return f"{reason}; started anew, since the file had nothing that fits"


def _array_text(shape: Sequence[int], dtype: str, array_kind: str) -> str:
    return f"{array_kind} {dtype} {'x'.join(map(str, shape)) or '0-d'}"


def _nested(names: list[str]) -> str:
    return names[0] + (f" with {', '.join(names[1:])}" if names[1:] else "")
