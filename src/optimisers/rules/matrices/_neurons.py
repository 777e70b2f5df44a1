"""Numbers of neurons: the rows of a matrix, or its columns where the layout is (in, out)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...arrays import Array, abs2, concatenate, sqrt, sum_over, zeros_like
from .matrix_step import block_runs, matrix_shape

RMS = 0.2
"""The root mean square of Adam's steps, roughly, to which those of a matrix are matched (Liu et al. 2025)."""


def neuron_shape(rule: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one number for each neuron of an array: (..., rows, 1), or (..., 1, columns)."""
    *lead, rows, columns = matrix_shape(shape, rule.batch_dims)
    return (*lead, rows, 1) if rule.layout == "out_in" else (*lead, 1, columns)


def squares(rule: Any, u: Array) -> Array:
    """The sum of the squares of each neuron."""
    return sum_over(abs2(u.reshape(matrix_shape(tuple(u.shape), rule.batch_dims))), _inputs_axis(rule))


def times(rule: Any, factors: Array, u: Array) -> Array:
    """u with each neuron multiplied by its factor."""
    return (factors * u.reshape(matrix_shape(tuple(u.shape), rule.batch_dims))).reshape(tuple(u.shape))


def inputs(rule: Any, shape: tuple[int, ...]) -> int:
    """How many inputs a neuron has."""
    return matrix_shape(shape, rule.batch_dims)[_inputs_axis(rule)]


def over_blocks(rule: Any, shape: tuple[int, ...], own: Array, f: Callable[[Array, int], Array]) -> Array:
    """For each neuron what f makes of its block, which it is told by its Frobenius norm and how many outputs it has.

    own are the squares of the neurons of an array of this shape.
    """
    flat = own.reshape((*own.shape[:-2], -1))
    pieces = []
    start = 0
    for size, count in block_runs(rule, shape):
        part = flat[..., start : start + size * count].reshape((*flat.shape[:-1], count, size))
        start += size * count
        found = f(sqrt(sum_over(part, -1)), size) + zeros_like(part)
        pieces.append(found.reshape((*flat.shape[:-1], count * size)))
    return concatenate(pieces, axis=-1).reshape(own.shape)


def aligned(rule: Any, shape: tuple[int, ...], own: Array, epsilon: Any) -> Array:
    """For each neuron the factor that makes the root mean square of its block RMS."""
    columns = inputs(rule, shape)
    return over_blocks(rule, shape, own, lambda norm, outputs: RMS * math.sqrt(outputs * columns) / (norm + epsilon))


def _inputs_axis(rule: Any) -> int:
    return -1 if rule.layout == "out_in" else -2
