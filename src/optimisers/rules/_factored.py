"""Running squares of a matrix kept as means of its rows and columns: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..arrays import Array, maximum, sum_over, zeros
from ._base import State

_TINY = 1e-36


def mean_over(x: Array, axes: Sequence[int]) -> Array:
    """The mean over some axes, kept as length 1; 0 over none."""
    count = math.prod(x.shape[axis] for axis in axes)
    for axis in axes:
        x = sum_over(x, axis)
    return x / max(count, 1)


def start(x: Array, stack: int) -> State:
    """Zeros: (means over columns, means over rows) of the last two axes, or one array of x's shape if x is no matrix."""
    shape = tuple(x.shape)
    if len(shape) < stack + 2:
        return zeros(x, shape, real=True)
    return zeros(x, (*shape[:-1], 1), real=True), zeros(x, (*shape[:-2], 1, shape[-1]), real=True)


def moved(state: State, square: Array, weight: Any) -> State:
    """The running means, moved to those of a square by a weight."""
    if not isinstance(state, tuple):
        return (1 - weight) * state + weight * square
    rows, columns = state
    rows = (1 - weight) * rows + weight * mean_over(square, [-1])
    return rows, (1 - weight) * columns + weight * mean_over(square, [-2])


def whole(state: State) -> Array:
    """What the means stand for: an array that can be divided by, element by element."""
    if not isinstance(state, tuple):
        return maximum(state, _TINY)
    rows, columns = state
    return maximum(rows / maximum(mean_over(rows, [-2]), _TINY) * columns, _TINY)
