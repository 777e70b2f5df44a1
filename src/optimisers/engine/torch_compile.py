"""``update`` inside ``torch.compile``: the tracer sees tensors go in and come out; what happens to them between is recorded.

The tracer follows only how states, models and gradients are taken apart and put together. The step itself is run as it always
is, on tensors that record it, so that rules may be written in any Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch._dynamo
from torch.utils import _pytree

from ..arrays import is_compiling, recording
from ..errors import OptimisersError, RuleError
from ..rules._base import AbstractRule
from ..rules._states import map_state, state_leaves
from ..tree.entry import Entry, Lease
from ..tree.sealed import Constant, Plan, sealed
from ..tree.state import StateTree, check_alive, rebuilt

Update: TypeAlias = Callable[..., tuple[StateTree, Any]]


def update_traced(update: Update, state: StateTree, model: Any, grads: Any, **options: Any) -> tuple[StateTree, Any]:
    """What ``update(state, model, grads, **options)`` gives, by the little Python that the tracer follows."""
    if _recorded is None or not is_compiling():  # the tracer has given up on the caller, and would go on from here
        return _untraced(update, state, model, grads, **options)  # type: ignore[no-any-return]
    check_alive(state)
    rules: list[AbstractRule | None] = []
    parts = []
    for entry in state._entries:
        at = next((i for i, rule in enumerate(rules) if rule is entry.rule), len(rules))
        if at == len(rules):
            rules.append(entry.rule)
        parts.append((at, _without_none(entry.state), entry.numbers, entry.frozen))
    leaves, spec = _pytree.tree_flatten(model)
    tensors = [leaf if isinstance(leaf, torch.Tensor) else Constant(None) for leaf in leaves]
    given = _pytree.tree_unflatten(tensors, spec), _without_none(grads)
    results, stepped, moved, fault = _recorded(Constant(update), state._plan, sealed(rules), parts, *given, options)
    if fault is not None:
        _leave(fault)
        return _untraced(update, state, model, grads, **options)  # type: ignore[no-any-return]
    fresh = iter(results)
    lease = Lease()
    entries = []
    for entry, new in zip(state._entries, stepped, strict=True):
        if new:
            after = map_state(lambda _: next(fresh), entry.state)
            entries.append(Entry(entry.rule, entry.base, after, entry.numbers, entry.frozen, entry.reason, lease))
        else:
            entries.append(entry)
    values = list(fresh)
    leaves = [leaf if at is None else values[at] for at, leaf in zip(moved, leaves, strict=True)]
    return rebuilt(state, entries), _pytree.tree_unflatten(leaves, spec)


def update_untraced(update: Update, reason: str, *args: Any) -> tuple[StateTree, Any]:
    """What ``update(*args)`` gives, where it is not to be traced for this reason."""
    _leave(reason)
    return _untraced(update, *args)  # type: ignore[no-any-return]


def _leave(reason: str) -> None:
    """Have the tracer give up here, which is an error with ``fullgraph=True``; else what follows runs as without it."""
    torch._dynamo.graph_break(reason)


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def _untraced(update: Update, *args: Any, **options: Any) -> Any:
    return update(*args, **options)


def _run(update: Update, plan: Plan, rules: Any, parts: Any, model: Any, grads: Any, options: dict[str, Any]) -> Any:
    """The step.

    Returns (arrays, stepped, moved, None): the arrays of the new states, counters as tensors, and after them the new tensors
    of the model; for every slot whether its state is new; for every leaf of the model which of the new tensors it is, None if
    it is the old one. Or what is wrong in the place of None.
    """
    lease = Lease()
    before = [Entry(rules[at], rules[at], state, numbers, frozen, "", lease) for at, state, numbers, frozen in parts]
    # Counters are tensors from the first step on, so that nothing is decided by them while it is recorded.
    before = [entry.replace(state=map_state(_as_tensor, entry.state)) for entry in before]
    old = _pytree.tree_leaves(model)
    try:
        with recording():
            state = StateTree(plan.structure, plan.slots, before, plan=plan)
            state, model = update(state, model, grads, **options)
        arrays: list[Any] = []
        for slot, entry, after in zip(plan.slots, before, state._entries, strict=True):
            if after is not entry:
                arrays += _as_before(map_state(_as_tensor, after.state), entry, slot.path)
    except OptimisersError as error:
        return [], Constant(()), Constant(()), Constant(f"{type(error).__name__}: {error}")
    stepped = tuple(after is not entry for entry, after in zip(before, state._entries, strict=True))
    new = _pytree.tree_leaves(model)
    places: dict[int, int] = {}  # tied places hold one object
    moved = tuple(None if x is y else places.setdefault(id(y), len(places)) for x, y in zip(old, new, strict=True))
    by_id = {id(y): y for y in new}
    arrays += [_as_plain(by_id[i]) for i in places]
    return arrays, Constant(stepped), Constant(moved), Constant(None)


_record = getattr(torch._dynamo, "nonstrict_trace", None)  # from torch 2.7 on
_recorded: Any = _record and _record(_run)


def _as_tensor(value: Any) -> Any:
    """A number that stands in a state, or a symbol for one, as a 0-d tensor."""
    if isinstance(value, torch.Tensor):
        return value
    whole = isinstance(value, (int, torch.SymInt))
    return torch.scalar_tensor(value, dtype=torch.int64 if whole else torch.float64, device="cpu")


def _as_plain(x: torch.Tensor) -> torch.Tensor:
    """A tensor that a compiled function can return: one that requires grad does so because it carries a graph."""
    return x.detach() if x.is_leaf and x.requires_grad else x


def _as_before(after: Any, before: Entry, path: str) -> list[Any]:
    """The arrays of a new state in the order of the old one."""
    leaves: list[Any] = []
    try:
        map_state(lambda _, new: leaves.append(new), before.state, after)
        same = len(leaves) == len(state_leaves(after))
    except (TypeError, ValueError, KeyError, IndexError):
        same = False
    if not same:
        msg = f"{before.rule!r} changes the structure of its state at {path!r}, which it cannot do inside torch.compile"
        raise RuleError(msg)
    return leaves


def _without_none(tree: Any) -> Any:
    return _pytree.tree_map(lambda leaf: Constant(None) if leaf is None else leaf, tree)
