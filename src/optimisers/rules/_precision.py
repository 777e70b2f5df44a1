"""Half precision: the arithmetic of a step is done in float32 and rounded once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..arrays import HALF, Array, cast_to, dtype_name, is_number, kind, working_dtype
from ._base import AbstractRule, Stages, State, children, with_child

FLOAT16_EPSILON = 1e-7  # the smallest epsilon that float16 moments can tell from zero


def map_state(f: Any, state: State, *others: State) -> State:
    """f at every array and number of a state, and of others of the same structure."""
    if state is None:
        return None
    if isinstance(state, dict):
        return {key: map_state(f, value, *(other[key] for other in others)) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        items = [map_state(f, *item) for item in zip(state, *others, strict=True)]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return f(state, *others)


def state_leaves(state: State) -> list[Any]:
    """The arrays and numbers of a state, in order."""
    leaves: list[Any] = []
    map_state(leaves.append, state)
    return leaves


def in_working_precision(rule: AbstractRule, state: State, x: Array, dx: Array) -> Stages:
    """The stages of a rule, its half-precision arrays widened before and its new state rounded after.

    The step is returned in the working precision of x.
    """
    own = dtype_name(x)
    wide = working_dtype(own)
    leaves = state_leaves(state)
    names = {dtype_name(leaf) for leaf in leaves if kind(leaf)}
    if "float16" in names:
        rule = usable_in_float16(rule)
    if own != wide:
        x = cast_to(x, wide)
    dx = cast_to(dx, dtype_name(x))
    before = map_state(_widened, state) if names & HALF else state
    after, step = yield from rule.stages(before, x, dx)
    if after is not state:
        after = _rounded(after, state)
    return after, step


def _widened(leaf: Any) -> Any:
    return cast_to(leaf, "float32") if kind(leaf) and dtype_name(leaf) in HALF else leaf


def _rounded(after: State, before: State) -> State:
    """The new state in the dtypes of the old one, where the two have the same structure."""
    try:
        return map_state(_like, after, before)
    except (TypeError, ValueError, KeyError, IndexError):
        return after  # a rule may change the structure of its state; then it chooses the dtypes too


def _like(new: Any, old: Any) -> Any:
    if kind(new) and kind(old) and not is_number(old):
        return cast_to(new, dtype_name(old))
    return new


@lru_cache(maxsize=4096)
def usable_in_float16(rule: AbstractRule) -> AbstractRule:
    """The rule with every positive ``epsilon`` raised to one that does not vanish beside float16 moments."""
    for field, index, child in list(children(rule)):
        rule = with_child(rule, field, index, usable_in_float16(child))
    epsilon = getattr(rule, "epsilon", None)
    if is_number(epsilon) and 0 < epsilon < FLOAT16_EPSILON:  # type: ignore[operator]
        rule = rule.replace(epsilon=FLOAT16_EPSILON)
    return rule
