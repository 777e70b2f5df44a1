"""What stands in a rule or a state where a pytree takes the arrays out, and putting others back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from ..rules._base import AbstractRule
from ..rules._fields import is_tensor


@dataclass(frozen=True)
class Hole:
    """Stands in an auxiliary value where a pytree leaf was taken out."""

    index: int


@dataclass(frozen=True)
class Placed:
    """Holds what a pytree map put in the place of an array where it would not be seen as a leaf: vmap puts None there."""

    value: Any


def map_tensors(rule: AbstractRule, f: Any) -> AbstractRule:
    """The rule with f at every field that is a tensor, or stands for one."""
    return _map_fields(rule, lambda value: f(value) if is_tensor(value) or isinstance(value, Placed) else value)


def map_holes(rule: AbstractRule, f: Any) -> AbstractRule:
    """The rule with f at every hole that `map_tensors` left."""

    def filled(value: Any) -> Any:
        if not isinstance(value, Hole):
            return value
        value = f(value)
        return value if is_tensor(value) or isinstance(value, Placed) else Placed(value)

    return _map_fields(rule, filled)


def _map_fields(rule: AbstractRule, f: Any) -> AbstractRule:
    """The rule with f at every value and tuple item of its fields; unchecked, since leaves may be anything for a while."""
    new = rule
    for name, value in vars(rule).items():
        if isinstance(value, AbstractRule):
            mapped: Any = _map_fields(value, f)
        elif type(value) is tuple:
            items = [_map_fields(item, f) if isinstance(item, AbstractRule) else f(item) for item in value]
            mapped = value if all(a is b for a, b in zip(items, value, strict=True)) else tuple(items)
        else:
            mapped = f(value)
        if mapped is not value:
            if new is rule:
                new = copy.copy(rule)
            object.__setattr__(new, name, mapped)
    return new
