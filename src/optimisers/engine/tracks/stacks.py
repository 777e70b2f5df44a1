"""Stackable rules over arrays that are alike: one step of a stack of them in the place of many small ones."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

from ...arrays import copied, element_count, is_number, is_plain, kind, on_cpu, stack
from ...errors import RuleError, locating
from ...rules._base import AbstractRule, Assign, Together, run_alone
from ...rules._states import map_state, state_leaves

# On a CPU, where a large matrix alone keeps all cores busy: an array of more elements is stepped alone, and a stack is kept
# small enough for the caches. Elsewhere arrays are stacked whatever their size, and the limit is one of memory.
ALONE_FROM = 1 << 16
CPU_STACK = 1 << 18
DEVICE_STACK = 1 << 24


def answers(requests: Sequence[Together], paths: Sequence[str]) -> list[tuple[Any, Any]]:
    """(new state, step) for each request, equal arrays by equal rules stacked and stepped as one.

    Args:
        requests: stackable rules, each with state, array and gradient in working precision.
        paths: what the arrays are called in errors.

    Equal to what each rule gives alone, up to the rounding of sums in another order.
    """
    results: list[Any] = [None] * len(requests)
    for group in stackable_groups(requests):
        members = [requests[i] for i in group]
        more = f" (and {len(group) - 1} like it)" if len(group) > 1 else ""
        with locating(paths[group[0]] + more):
            together = [alone(members[0])] if len(group) == 1 else _as_stack(members)
        for i, result in zip(group, together, strict=True):
            results[i] = result
    return results


def stackable_groups(requests: Sequence[Together]) -> list[list[int]]:
    """The requests by what can be stacked, as lists of places: each of one array alone, or of a stack of bounded size."""
    found: dict[Any, list[int]] = {}
    groups: list[list[int]] = []
    for i, request in enumerate(requests):
        key = _key(request) if _worthwhile(request.x) else None
        if key is None:
            groups.append([i])
        else:
            found.setdefault(key, []).append(i)
    for members in found.values():
        x = requests[members[0]].x
        groups += in_stacks(members, element_count(x), CPU_STACK if on_cpu(x) else DEVICE_STACK)
    return groups


def in_stacks(members: list[int], size: int, limit: int, least: int = 1) -> list[list[int]]:
    """Arrays of so many elements, cut into stacks of no more than the limit, or of so many arrays at least."""
    count = max(least, limit // max(1, size))
    return [members[k : k + count] for k in range(0, len(members), count)]


def alone(request: Together) -> tuple[Any, Any]:
    """The step of one array as its rule takes it by itself."""
    return run_alone(request.rule.stages(request.state, request.x, request.dx))


def _worthwhile(x: Any) -> bool:
    return is_plain(x) and (not on_cpu(x) or element_count(x) < ALONE_FROM)


def _key(request: Together) -> Any:
    """What has to be equal for arrays to be stacked; None for one that has to be stepped alone."""
    x, dx = request.x, request.dx
    key: list[Any] = [likeness(request.rule), *_like(x), dx.dtype]
    return tuple(key) if _describe(request.state, key) else None


_known: dict[int, tuple[weakref.ref[AbstractRule], Hashable]] = {}


def likeness(rule: AbstractRule) -> Hashable:
    """Equal for rules that do the same. Tensors in fields are the same only if they are one."""
    found = _known.get(id(rule))
    if found is not None and found[0]() is rule:
        return found[1]
    number = id(rule)
    fields = dataclasses.fields(rule)  # type: ignore[arg-type]
    key = type(rule), *(_likeness_of(getattr(rule, field.name)) for field in fields)
    _known[number] = weakref.ref(rule, lambda _: _known.pop(number, None)), key
    return key


def _likeness_of(value: Any) -> Hashable:
    if isinstance(value, AbstractRule):
        return likeness(value)
    if isinstance(value, tuple):
        return tuple(_likeness_of(item) for item in value)
    try:
        hash(value)
    except TypeError:
        return "the object at", id(value)
    return ("the object at", id(value)) if kind(value) else (type(value), value)


def _like(x: Any) -> tuple[Any, ...]:
    return x.dtype, tuple(x.shape), x.device if kind(x) == "torch" else None


def _describe(state: Any, key: list[Any]) -> bool:
    """Add structure, shapes and counters of a state to the key; False if it holds what cannot be stacked."""
    if state is None or is_number(state):
        key.append((type(state), state))
    elif isinstance(state, (tuple, list, dict)):
        key.append((type(state), tuple(state) if isinstance(state, dict) else len(state)))
        return all(_describe(item, key) for item in (state.values() if isinstance(state, dict) else state))
    elif is_plain(state) and state.ndim:
        key.extend(_like(state))
    else:  # a counter as a tensor, as inside a transform; or laid out like no stack
        return False
    return True


def _as_stack(members: list[Together]) -> list[tuple[Any, Any]]:
    first = members[0]
    state = map_state(
        lambda *leaves: leaves[0] if is_number(leaves[0]) else stack(leaves), first.state, *(m.state for m in members[1:])
    )
    x, dx = stack([m.x for m in members]), stack([m.dx for m in members])
    after, step = run_alone(first.rule.stacked().stages(state, x, dx))
    value = step.value if isinstance(step, Assign) else step
    arrays = [leaf for leaf in (value, *state_leaves(after)) if leaf is not None and not is_number(leaf)]
    if (step is not None and tuple(value.shape) != tuple(x.shape)) or any(a.shape[:1] != x.shape[:1] for a in arrays):
        shapes = ", ".join(str(tuple(a.shape)) for a in arrays)
        msg = (
            f"{first.rule!r} says law='stackable', but its stacked() made arrays of shapes {shapes} from a stack of shape "
            f"{tuple(x.shape)}; the first axis must stay"
        )
        raise RuleError(msg)
    return [_part(i, after, step) for i in range(len(members))]


def _part(i: int, after: Any, step: Any) -> tuple[Any, Any]:
    """What belongs to one array. What is kept has memory of its own, or one array would keep that of all others alive."""
    state = map_state(lambda leaf: leaf if is_number(leaf) else copied(leaf[i]), after)
    if isinstance(step, Assign):
        return state, Assign(copied(step.value[i]))
    return state, None if step is None else step[i]
