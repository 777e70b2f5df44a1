"""``setup``: the state of a rule over a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arrays import as_dtype_name, kind
from ..errors import ArgumentError, HyperParameterError, ModelError, RuleError
from ..rules import ClipGlobalNorm
from ..rules._base import AbstractRule, walk
from ..rules._fields import is_tensor
from ..tree.leaves import Slot, find
from ..tree.param import Param
from ..tree.paths import shown
from ..tree.state import Entry, Lease, StateTree, numbers_in
from .route import Chooser


def setup(
    rule: AbstractRule | Callable[[Param], AbstractRule | None],
    model: Any,
    *,
    trainable: Callable[[Param], bool] | None = None,
    state_dtype: Any = None,
) -> StateTree:
    """The state of a rule over every trainable array of a model.

    rule: a rule for all arrays; or a :class:`Route`; or a function ``Param -> rule``, called once for each distinct array,
        None meaning "not trained".
    model: a tree of NumPy arrays or torch tensors that optree understands, a bare array, or a ``torch.nn.Module``.
    trainable: narrows what is trained, a predicate on :class:`Param`. Arrays are trainable if they are real or complex
        floating point, and, where torch Parameters are present, have ``requires_grad``.
    state_dtype: dtype of the moments (a name, or a NumPy or torch dtype); by default each array's own.

    Raises ModelError if nothing is trainable, or arrays are hidden where they would not be trained; TieError for arrays
    that overlap; SelectionError for patterns that match nothing; RuleError if ``rule`` is neither rule nor function, or
    a rule refuses an array.
    """
    if isinstance(rule, type) or not (isinstance(rule, AbstractRule) or callable(rule)):
        swapped = isinstance(model, AbstractRule)
        got = repr(rule) if isinstance(rule, type) else type(rule).__name__
        hint = (
            "; the order is setup(rule, model)" if swapped else f"; write {rule.__name__}()" if isinstance(rule, type) else ""
        )
        msg = f"setup: expected a rule or a function from Param to a rule, got {got}{hint}"
        raise RuleError(msg)
    if isinstance(model, StateTree):
        msg = "setup: the model is a state tree; give the model itself"
        raise ArgumentError(msg)
    dtype = _state_dtype(state_dtype)
    found = find(model, trainable)
    chooser = Chooser(rule)
    chosen = [chooser.choose(places) for places in found.params]
    chooser.finish([slot.param for slot in found.slots])
    if all(r is None for r, _ in chosen):
        msg = "setup: the rule of every array is None, so nothing would be trained"
        raise ModelError(msg)
    lease = Lease()
    entries = []
    for slot, (own, reason) in zip(found.slots, chosen, strict=True):
        x = found.leaves[slot.places[0].leaf]
        state = None if own is None else _initial(own, slot, x, dtype)
        entries.append(Entry(own, own, state, numbers_in(state), own is None, reason, lease))
    _check_groups([(slot, entry.rule) for slot, entry in zip(found.slots, entries, strict=True)])
    return StateTree(found.structure, found.slots, entries)


def _state_dtype(state_dtype: Any) -> str | None:
    if state_dtype is None:
        return None
    try:
        return as_dtype_name(state_dtype)
    except ValueError as error:
        msg = f"setup: state_dtype must be a real floating dtype; {error}"
        raise HyperParameterError(msg) from None


def _initial(rule: AbstractRule, slot: Slot, x: Any, dtype: str | None) -> Any:
    for inner in walk(rule):
        if inner.real_only and slot.dtype.startswith("complex"):
            msg = (
                f"{type(inner).__name__} cannot step {shown(slot.path)}, which is {slot.dtype}: it compares numbers, and "
                "complex ones have no order. Choose another rule for this parameter with Route"
            )
            raise RuleError(msg)
        tensors = any(is_tensor(v) or (isinstance(v, tuple) and any(map(is_tensor, v))) for v in vars(inner).values())
        if tensors and slot.kind == "numpy":
            msg = f"{type(inner).__name__} has a torch tensor as a field, but {shown(slot.path)} is a NumPy array; use a number"
            raise RuleError(msg)
    try:
        if kind(x) == "torch":
            # Moments start outside any graph; a learned field enters the graph when it is applied.
            return rule.init(x.detach()) if dtype is None else rule.init_as(x.detach(), dtype)
        return rule.init(x) if dtype is None else rule.init_as(x, dtype)
    except Exception as error:
        error.add_note(f"while setting up the parameter {slot.path!r} with {rule!r}")
        raise


def _check_groups(rules: list[tuple[Slot, AbstractRule | None]]) -> None:
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
