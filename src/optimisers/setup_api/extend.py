"""``extend``: a state for a model that has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ..arrays import copied, detached, kind
from ..errors import ArgumentError, RuleError, StructureError, described, not_a_rule
from ..rules._base import AbstractRule
from ..rules._states import map_state, state_leaves
from ..tree.entry import Entry, Lease, host_state, numbers_in
from ..tree.leaves import Found, Slot, find
from ..tree.param import Param
from ..tree.paths import shown
from ..tree.sealed import Plan
from ..tree.state import StateTree, check_alive
from .route import Chooser
from .setup import check_groups, first_entry, moment_dtype


def extend(
    state: StateTree,
    model: Any,
    *,
    rule: AbstractRule | Callable[[Param], AbstractRule | None] | None = None,
    resize: Literal["restart", "overlap"] = "restart",
    rename: Callable[[str], str] | None = None,
    trainable: Callable[[Param], bool] | None = None,
    state_dtype: Any = None,
    report: Callable[[str], Any] | None = None,
) -> StateTree:
    """A state for a changed model: layers added, removed, resized, frozen or thawed by ``requires_grad``.

    An array that is at the same path with the same shape, dtype and library keeps its rule, moments, counters and frozen flag;
    its arrays are shared with the state given. One that is gone is dropped. One that is new is set up with ``rule``. One of
    another shape or dtype keeps its rule and frozen flag, and its moments start anew.

    Args:
        rule: for new arrays: a rule, a `Route` (its patterns may select any array of the model) or a function, as in
            `setup`. By default the rule that all arrays share; needed if they do not.
        resize: ``"overlap"`` keeps the moments of the block that the old and the new shape have in common, such as the old
            rows of a grown embedding; what is new in them starts as at setup, and counters go on. A state whose arrays have
            other
            shapes than the parameter's (Apollo's) starts anew all the same.
        rename: a function from a path in the state to the path in the model, for layers that moved, as those behind a
            removed item of a list do.
        trainable: as in `setup`; what is not trainable now is dropped, so give ``trainable`` again if setup
            had it.
        state_dtype: as in `setup`; what is not trainable now is dropped, so give ``trainable`` again if setup
            had it.
        report: called with a text that says what was kept, added, restarted and dropped, such as ``print``. The reasons in
            ``print(state)`` say so too.

    Raises StructureError if nothing of the state is in the model, ArgumentError if a rule is needed and not given, and what
    setup raises.
    """
    if not isinstance(state, StateTree):
        msg = f"extend: expected the state that setup returned, got {described(state)}; the order is extend(state, model)"
        raise ArgumentError(msg)
    if isinstance(model, StateTree):
        msg = "extend: the model is a state tree; give the model itself"
        raise ArgumentError(msg)
    if resize not in {"restart", "overlap"}:
        msg = f"extend: resize is 'restart' or 'overlap'; got {resize!r}"
        raise ArgumentError(msg)
    if isinstance(rule, type) or not (rule is None or isinstance(rule, AbstractRule) or callable(rule)):
        msg = f"extend: rule= is a rule or a function from Param to a rule; got {not_a_rule(rule)}"
        raise RuleError(msg)
    check_alive(state)
    dtype = moment_dtype(state_dtype, "extend: state_dtype")
    found = find(model, trainable)
    old = _renamed(state, rename)
    work = _Extension(old, found, dtype, overlap=resize == "overlap")
    if not any(slot.path in work.old for slot in found.slots):
        msg = "extend: no parameter of the state is in the model, so nothing would be kept; set up a new state"
        raise StructureError(msg)
    new = work.extended(work.rules_of_new(rule))
    if report is not None:
        report(work.report())
    return new


class _Old(NamedTuple):
    slot: Slot
    entry: Entry


def _renamed(state: StateTree, rename: Callable[[str], str] | None) -> dict[str, _Old]:
    """What the state holds, by path in the model."""
    old: dict[str, _Old] = {}
    for slot, entry in zip(state._slots, state._entries, strict=True):
        path = rename(slot.path) if rename else slot.path
        if path in old:
            msg = f"extend: rename gives {shown(path)} for two parameters, {shown(old[path].slot.path)} and {shown(slot.path)}"
            raise ArgumentError(msg)
        old[path] = _Old(slot, entry)
    return old


class _Extension:
    """One state on its way to a changed model."""

    def __init__(self, old: dict[str, _Old], found: Found, dtype: str | None, *, overlap: bool) -> None:
        self.old, self.found, self.dtype, self.overlap = old, found, dtype, overlap
        self.lease = Lease()
        self.shared: dict[AbstractRule, AbstractRule] = {}
        self.kept: list[str] = []
        self.notes: list[str] = []

    def rules_of_new(self, rule: Any) -> dict[str, tuple[AbstractRule | None, AbstractRule | None, str]]:
        """For the path of every new array its rule, the rule it counts as set up with, and the reason."""
        new = {slot.path for slot in self.found.slots} - self.old.keys()
        if rule is None:
            return self._common_rule([slot.path for slot in self.found.slots if slot.path in new])
        chooser = Chooser(rule)
        chosen: dict[str, tuple[AbstractRule | None, AbstractRule | None, str]] = {}
        for slot, places in zip(self.found.slots, self.found.params, strict=True):
            # A Route is checked against the whole model; a function is asked about new arrays only.
            if slot.path in new or isinstance(rule, AbstractRule):
                own, reason = chooser.choose(places)
                if slot.path in new:
                    chosen[slot.path] = own, own, reason
        chooser.unmatched = [path for path in chooser.unmatched if path in new]
        chooser.finish([slot.param for slot in self.found.slots])
        return chosen

    def _common_rule(self, new: list[str]) -> dict[str, tuple[AbstractRule | None, AbstractRule | None, str]]:
        if not new:
            return {}
        entries = [entry for _, entry in self.old.values() if entry.rule is not None]
        bases = {entry.base.unresolved() for entry in entries if entry.base is not None}
        if len(bases) != 1:
            named = ", ".join(map(shown, new))
            msg = f"extend: the arrays of the state have {len(bases)} different rules; say with rule= which one is for {named}"
            raise ArgumentError(msg)
        base = bases.pop()
        present = {entry.rule.unresolved() for entry in entries if entry.rule is not None}
        rule = present.pop() if len(present) == 1 else base
        return dict.fromkeys(new, (rule, base, "the rule of all others"))

    def extended(self, rules: dict[str, tuple[AbstractRule | None, AbstractRule | None, str]]) -> StateTree:
        entries = []
        for slot in self.found.slots:
            x = self.found.leaves[slot.places[0].leaf]
            old = self.old.get(slot.path)
            if old is None:
                entries.append(self._added(slot, x, *rules[slot.path]))
            elif _same_array(old.slot, slot):
                self.kept.append(slot.path)
                entries.append(old.entry)
            else:
                entries.append(self._resized(slot, x, old))
        dropped = [path for path in self.old if path not in {slot.path for slot in self.found.slots}]
        self.notes += [f"dropped {shown(path)}" for path in dropped]
        check_groups([(slot, entry.rule) for slot, entry in zip(self.found.slots, entries, strict=True)])
        plan = Plan(self.found.structure, self.found.slots, self.found.left_out)
        return StateTree(self.found.structure, self.found.slots, entries, plan=plan)

    def _added(self, slot: Slot, x: Any, rule: AbstractRule | None, base: AbstractRule | None, reason: str) -> Entry:
        self.notes.append(f"added {shown(slot.path)}: {'not trained' if rule is None else type(rule).__name__} ({reason})")
        return self._fresh(slot, x, rule, base, f"added: {reason}")

    def _fresh(self, slot: Slot, x: Any, rule: AbstractRule | None, base: AbstractRule | None, reason: str) -> Entry:
        first = first_entry(rule, reason, slot, x, self.dtype, self.shared, self.lease)
        if base is rule or base is None:
            return first
        return first.replace(base=base.resolved(x, slot.path))

    def _resized(self, slot: Slot, x: Any, old: _Old) -> Entry:
        entry = old.entry
        change = f"{_text(old.slot)} became {_text(slot)}"
        rule, base = (None if r is None else r.unresolved() for r in (entry.rule, entry.base))
        new = self._fresh(slot, x, rule, base, f"restarted: {change}").replace(frozen=entry.frozen)
        before = host_state(entry)
        if not (self.overlap and rule is not None and _overlap(before, new.state, old.slot, slot)):
            self.notes.append(f"restarted {shown(slot.path)}: {change}")
            return new
        self.notes.append(f"kept the common block of {shown(slot.path)}: {change}")
        merged = _merged(before, new.state, old.slot, slot)
        return new.replace(state=merged, numbers=numbers_in(merged), reason=f"common block kept: {change}")

    def report(self) -> str:
        """What was done, a line for each array that is not as before."""
        count = len(self.kept)
        return "\n".join([f"kept {count} array{'' if count == 1 else 's'} as they were", *self.notes])


def _same_array(old: Slot, new: Slot) -> bool:
    return old.param.shape == new.param.shape and old.dtype == new.dtype and old.kind == new.kind


def _text(slot: Slot) -> str:
    return f"{slot.kind} {slot.dtype} {'x'.join(map(str, slot.param.shape)) or '0-d'}"


def _overlap(old: Any, new: Any, before: Slot, after: Slot) -> bool:
    """Whether two states of one rule are built alike: moments of the parameter's shape, and all else of one shape in both."""
    was, now = before.param.shape, after.param.shape
    olds, news = state_leaves(old), state_leaves(new)
    if len(was) != len(now) or before.kind != after.kind or len(olds) != len(news):
        return False
    for a, b in zip(olds, news, strict=True):
        if bool(kind(a)) != bool(kind(b)):
            return False
        if kind(a) and tuple(a.shape) != tuple(b.shape) and (tuple(a.shape), tuple(b.shape)) != (was, now):
            return False
    return True


def _merged(old: Any, new: Any, before: Slot, after: Slot) -> Any:
    """The new state with the common block of every moment from the old one, and everything else from the old one."""
    was = before.param.shape
    block = tuple(slice(min(n, m)) for n, m in zip(was, after.param.shape, strict=True))
    given = iter(state_leaves(old))

    def merge(fresh: Any) -> Any:
        a = next(given)
        if not kind(fresh):
            return a
        a = detached(a)
        if tuple(a.shape) != was:
            return copied(a)
        out = copied(fresh)
        out[block] = a[block]
        return out

    return map_state(merge, new)
