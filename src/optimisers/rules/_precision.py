"""Half precision: the arithmetic of a step is done in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

from ..arrays import HALF, Array, as_array, cast_to, dtype_name, is_number, kind, working_dtype
from ._base import AbstractRule, Stages, State, children, stages_of, with_child
from ._states import map_state, state_leaves

_NUMBERS = (float, int)

FLOAT16_EPSILON = 1e-7  # the smallest epsilon that float16 moments can tell from zero


def in_working_precision(rule: AbstractRule, state: State, x: Array, dx: Array) -> Stages:
    """The stages of a rule, its half-precision arrays widened before and its new state rounded after.

    The step is returned in the working precision of x.
    """
    own = dtype_name(x)
    wide = working_dtype(own)
    names = [dtype_name(leaf) for leaf in state_leaves(state) if type(leaf) not in _NUMBERS and hasattr(leaf, "dtype")]
    half = any(name in HALF for name in names)
    if lacks_range(names) and kind(x) != "traced":  # what is traced is given its numbers from outside
        rule = usable_in_float16(rule)
    if own != wide:
        x = cast_to(x, wide)
    dx = cast_to(dx, dtype_name(x))
    after, step = yield from stages_of(rule, map_state(_widened, state) if half else state, x, dx)
    return _rounded(after, state), step


def _widened(leaf: Any) -> Any:
    return cast_to(leaf, "float32") if kind(leaf) and dtype_name(leaf) in HALF else leaf


def _rounded(after: State, before: State) -> State:
    """The new state in the dtypes of the old one, where the two have the same structure."""
    if after is before:
        return after
    new, old = state_leaves(after), state_leaves(before)
    if len(new) == len(old) and all(_alike(a, b) for a, b in zip(new, old, strict=True)):
        return after
    try:
        return map_state(_like, after, before)
    except (TypeError, ValueError, KeyError, IndexError):
        return after  # a rule may change the structure of its state; then it chooses the dtypes too


def _alike(new: Any, old: Any) -> bool:
    return type(new) in _NUMBERS if type(old) in _NUMBERS else type(new) is type(old) and new.dtype == old.dtype


def _like(new: Any, old: Any) -> Any:
    if kind(old):
        new = as_array(new)
        return cast_to(new, dtype_name(old)) if kind(new) else new
    return new


def lacks_range(dtypes: Collection[str]) -> bool:
    """Whether arrays of these dtypes hold squares in float16, as ``state_dtype="float16"`` asks for."""
    return "float16" in dtypes and "float32" not in dtypes


@lru_cache(maxsize=4096)
def usable_in_float16(rule: AbstractRule) -> AbstractRule:
    """The rule with every positive ``epsilon`` raised to one that does not vanish beside float16 moments."""
    for field, index, child in list(children(rule)):
        rule = with_child(rule, field, index, usable_in_float16(child))
    epsilon = getattr(rule, "epsilon", None)
    if is_number(epsilon) and 0 < epsilon < FLOAT16_EPSILON:  # type: ignore[operator]
        rule = rule.replace(epsilon=FLOAT16_EPSILON)
    return rule
