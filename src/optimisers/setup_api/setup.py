"""``setup``: the state of a rule over a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..arrays import as_array, as_dtype_name, copied, detached, kind, plain, share_memory
from ..engine.groups.parts import steps_parts
from ..engine.groups.states import lies_well
from ..engine.tracks.single import check_state
from ..errors import ArgumentError, GatherWarning, HyperParameterError, ModelError, RuleError, described, locating, not_a_rule
from ..rules import ClipGlobalNorm
from ..rules._base import AbstractRule, walk
from ..rules._fields import is_tensor
from ..rules._states import map_state
from ..tree.entry import Entry, Lease, numbers_in
from ..tree.leaves import Slot, find, refuse_inference, refuse_unsteppable
from ..tree.param import Param
from ..tree.paths import shown
from ..tree.sealed import Plan
from ..tree.sharding import cut_state, is_sharded, local, sharded_state, whole
from ..tree.state import StateTree
from .agreement import check_agreement
from .route import Chooser


def setup(
    rule: AbstractRule | Callable[[Param], AbstractRule | None],
    model: Any,
    *,
    trainable: Callable[[Param], bool] | None = None,
    state_dtype: Any = None,
) -> StateTree:
    """The state of a rule over every trainable array of a model.

    Args:
        rule: a rule for all arrays; or a `Route`; or a function ``Param -> rule``, called once for each distinct array,
            None meaning "not trained".
        model: a tree of NumPy arrays or torch tensors that optree understands, a bare array, or a ``torch.nn.Module``.
        trainable: narrows what is trained, a predicate on `Param`. Arrays are trainable if they are real or complex
            floating point, and, where torch Parameters are present, have ``requires_grad``.
        state_dtype: dtype of the moments (a name, or a NumPy or torch dtype); by default each array's own.

    Raises ModelError if nothing is trainable, or arrays are hidden where they would not be trained; TieError for arrays
    that overlap; SelectionError for patterns that match nothing; RuleError if ``rule`` is neither rule nor function, or
    a rule refuses an array.
    """
    check_arguments("setup", rule, model)
    return planned(rule, model, trainable, moment_dtype(state_dtype))


def check_arguments(verb: str, rule: Any, model: Any) -> None:
    """Raise RuleError or ArgumentError unless these are a rule, or a function that gives rules, and a model."""
    if isinstance(rule, type) or not (isinstance(rule, AbstractRule) or callable(rule)):
        swapped = isinstance(model, AbstractRule)
        got = f"{described(rule)}; the order is {verb}(rule, model)" if swapped else not_a_rule(rule)
        msg = f"{verb}: expected a rule or a function from Param to a rule, got {got}"
        raise RuleError(msg)
    if isinstance(model, StateTree):
        msg = f"{verb}: the model is a state tree; give the model itself"
        raise ArgumentError(msg)


def planned(
    rule: AbstractRule | Callable[[Param], AbstractRule | None],
    model: Any,
    trainable: Callable[[Param], bool] | None,
    dtype: str | None,
    example: Callable[[Any], Any] = lambda x: x,
) -> StateTree:
    """The state; ``example`` gives what stands for an array where its moments are made."""
    found = find(model, trainable)
    chooser = Chooser(rule)
    chosen = [chooser.choose(places) for places in found.params]
    chooser.finish([slot.param for slot in found.slots])
    if all(r is None for r, _ in chosen):
        msg = "setup: the rule of every array is None, so nothing would be trained"
        raise ModelError(msg)
    check_agreement(found.slots, [own for own, _ in chosen])
    lease = Lease()
    shared: dict[AbstractRule, AbstractRule] = {}  # arrays with equal rules share one
    entries = []
    for slot, (own, reason) in zip(found.slots, chosen, strict=True):
        x = found.leaves[slot.places[0].leaf]
        x = x if own is None else example(x)
        entries.append(first_entry(own, reason, slot, x, dtype, shared, lease))
    check_groups([(slot, entry.rule) for slot, entry in zip(found.slots, entries, strict=True)])
    plan = Plan(found.structure, found.slots, found.left_out)
    return StateTree(found.structure, found.slots, entries, plan=plan)


def first_entry(
    rule: AbstractRule | None,
    reason: str,
    slot: Slot,
    x: Any,
    dtype: str | None,
    shared: dict[AbstractRule, AbstractRule],
    lease: Lease,
) -> Entry:
    """The entry of an array before its first step; ``shared`` gathers the rules, so that equal ones become one."""
    here = None if rule is None else _resolved(rule, slot, x, shared)
    state = None if here is None else initial_state(here, slot, x, dtype)
    return Entry(here, here, state, numbers_in(state), rule is None, reason, lease)


def moment_dtype(dtype: Any, where: str = "setup: state_dtype") -> str | None:
    """The name of the dtype that moments are to have, None for each array's own; HyperParameterError if it is none."""
    if dtype is None:
        return None
    try:
        return as_dtype_name(dtype)
    except ValueError as error:
        msg = f"{where} must be a real floating dtype; {error}"
        raise HyperParameterError(msg) from None


def _resolved(rule: AbstractRule, slot: Slot, x: Any, shared: dict[AbstractRule, AbstractRule]) -> AbstractRule:
    """The rule for this one array; RuleError if it cannot step it."""
    for inner in walk(rule):
        if inner.real_only and slot.dtype.startswith("complex"):
            reason = "it compares numbers, and complex ones have no order"
            if inner.law == "stackable":
                reason = "it is made for real matrices"
            msg = (
                f"{type(inner).__name__} cannot step {shown(slot.path)}, which is {slot.dtype}: {reason}. "
                "Choose another rule for this parameter with Route"
            )
            raise RuleError(msg)
        tensors = any(is_tensor(v) or (isinstance(v, tuple) and any(map(is_tensor, v))) for v in vars(inner).values())
        if tensors and slot.kind == "numpy":
            msg = f"{type(inner).__name__} has a torch tensor as a field, but {shown(slot.path)} is a NumPy array; use a number"
            raise RuleError(msg)
    with locating(slot.path):
        here = rule.resolved(x, slot.path)
    return shared.setdefault(here, here)


def initial_state(rule: AbstractRule, slot: Slot, x: Any, dtype: str | None) -> Any:
    """The state of a rule for an array."""
    if slot.sharding is not None:
        return _sharded_state(rule, slot, x, dtype)
    refuse_unsteppable(x, slot.path)
    refuse_inference(x, slot.path)
    start = detached(plain(x))  # moments start outside any graph; a learned field enters it when applied
    with locating(slot.path):
        state = rule.init(start) if dtype is None else rule.init_as(start, dtype)
    state = map_state(as_array, state)
    check_state(state, rule, slot.path or "(the array)")
    # A state must not change with the model, whose memory update_ re-uses.
    return map_state(lambda leaf: copied(leaf) if kind(leaf) and share_memory(leaf, x) else leaf, state)


def _sharded_state(rule: AbstractRule, slot: Slot, x: Any, dtype: str | None) -> Any:
    """The state for a DTensor: made for the part on this rank if the rule steps parts, else for the whole array and cut."""
    sharding: Any = slot.sharding
    alone = replace(slot, sharding=None)
    if not is_sharded(x):  # an example of the whole array
        return initial_state(rule, alone, x, dtype)
    if not lies_well(local(x), sharding):
        msg = (
            f"the part of the DTensor at {shown(slot.path)} on this rank has gaps in memory (shape {tuple(local(x).shape)}, "
            f"strides {tuple(local(x).stride())}); make it of parts that are contiguous()"
        )
        raise ModelError(msg)
    if steps_parts(rule, local(x), sharding, alone.path):
        return sharded_state(initial_state(rule, alone, local(x), dtype), sharding)
    if sharding.over:
        _warn_gathered(rule, slot)
    return cut_state(initial_state(rule, alone, whole(x), dtype), sharding)


_warned: set[str] = set()


def _warn_gathered(rule: AbstractRule, slot: Slot) -> None:
    """One warning a kind of rule."""
    name = type(rule.unresolved()).__name__
    if name in _warned:
        return
    _warned.add(name)
    msg = (
        f"{name} needs whole arrays in a way that cannot be divided among ranks, so {shown(slot.path)}, which lies on "
        f"{slot.sharding}, and others like it are put together on every rank in each step, one after another: results are "
        "right, steps slower. What rules communicate is told in the docs, On several devices"
    )
    warnings.warn(msg, GatherWarning, stacklevel=2)


def check_groups(rules: list[tuple[Slot, AbstractRule | None]]) -> None:
    """One norm needs one order: the members of a ClipGlobalNorm group must have the same p."""
    seen: dict[str, tuple[float, str]] = {}
    for slot, rule in rules:
        for inner in walk(rule) if rule is not None else ():
            if isinstance(inner, ClipGlobalNorm):
                p, path = seen.setdefault(inner.group, (inner.p, slot.path))
                if p != inner.p:
                    msg = (
                        f"ClipGlobalNorm: the group {inner.group!r} has p={p:g} at {path!r} and p={inner.p:g} at "
                        f"{slot.path!r}; give them different group names, or one p"
                    )
                    raise RuleError(msg)
