"""Whitening by a factor for each side, an upper triangular matrix or the diagonal of one: Li 2018 and 2024."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...arrays import (
    Array,
    exp,
    finite_each,
    identities,
    largest,
    log,
    norm_below,
    solve_lower,
    sum_over,
    upper,
    where,
    zeros,
)  # fmt: skip
from ._sides import _flattened, along, gram_along

Factors = Sequence[Array]


def first_factors(like: Array, shape: tuple[int, ...], lead: int, most: int) -> tuple[Array, ...]:
    """For each side an identity, or ones where a side is longer than most, or of length 1."""
    made = []
    for side in shape[lead:]:
        if 1 < side <= most:
            made.append(identities(zeros(like, (*shape[:lead], side, side))))
        else:
            made.append(1 + zeros(like, (*shape[:lead], side)))
    return tuple(made)


def _is_diagonal(factor: Array, lead: int) -> bool:
    return bool(factor.ndim == lead + 1)


def _beside(diagonal: Array, x: Array, axis: int, lead: int) -> Array:
    """A diagonal shaped so that it multiplies x along a side."""
    return diagonal.reshape((*x.shape[:lead], *(n if i == axis else 1 for i, n in enumerate(x.shape[lead:]))))


def times(factors: Factors, x: Array, lead: int, *, transposed: bool = False) -> Array:
    """x multiplied by each factor along its side, or by its transpose."""
    for axis, factor in enumerate(factors):
        if _is_diagonal(factor, lead):
            x = _beside(factor, x, axis, lead) * x
        else:
            x = along(factor if transposed else factor.mT, x, axis, lead)
    return x


def _divided(factors: Factors, x: Array, lead: int) -> Array:
    """x multiplied by the inverse of the transpose of each factor along its side."""
    for axis, factor in enumerate(factors):
        if _is_diagonal(factor, lead):
            x = x / _beside(factor, x, axis, lead)
            continue
        flat, before, after = _flattened(x, axis, lead)
        if before == 1:
            flat = solve_lower(factor.mT, flat[..., 0, :, :])
        elif after == 1:
            flat = solve_lower(factor.mT, flat[..., 0].mT).mT
        else:
            flat = solve_lower(factor.mT[..., None, :, :], flat)
        x = flat.reshape(x.shape)
    return x


def _squares(x: Array, axis: int, lead: int, *, diagonal: bool) -> Array:
    """The products of the slices along a side with one another, or of each with itself alone."""
    if not diagonal:
        return gram_along(x, axis, lead)
    flat, _, _ = _flattened(x * x, axis, lead)
    return sum_over(sum_over(flat, -1), lead)[..., 0, :, 0]


def nearer(factors: Factors, g: Array, noise: Array, lead: int, rate: Any) -> tuple[Array, ...]:
    """The factors after a step towards those that make the gradient as white as the noise.

    With A the gradient times the factors and W the noise by the inverses of their transposes, each factor is multiplied by
    ``I - rate * upper(A A.T - W W.T) / norm(A A.T + W W.T)``.
    """
    a, w = times(factors, g, lead), _divided(factors, noise, lead)
    after = []
    for axis, factor in enumerate(factors):
        diagonal = _is_diagonal(factor, lead)
        large, small = (_squares(x, axis, lead, diagonal=diagonal) for x in (a, w))
        bound = largest(large + small, 1) if diagonal else norm_below(large + small)
        change = rate * (large - small) / where(bound > 0, bound, 1.0 + 0 * bound)
        after.append(factor - (change * factor if diagonal else upper(change) @ factor))
    return tuple(after)


def balanced(factors: Factors, lead: int) -> tuple[Array, ...]:
    """The factors with one scale between them: it is free, since only their products count."""
    if len(factors) < 2:
        return tuple(factors)
    sizes = [largest(factor, factor.ndim - lead) for factor in factors]
    logs = [log(where(size > 0, size, 1.0 + 0 * size)).reshape((*size.shape[:lead], 1)) for size in sizes]
    mean = sum(logs[1:], start=logs[0]) / len(logs)
    return tuple(factor * exp(mean - own).reshape(size.shape) for factor, own, size in zip(factors, logs, sizes, strict=True))


def all_finite(factors: Factors, lead: int) -> list[Array | None]:
    """For each factor None if it is finite, else which of those that stack are, shaped to choose between factors."""
    found = []
    for factor in factors:
        diagonal = _is_diagonal(factor, lead)
        finite = finite_each(factor[..., None] if diagonal else factor)
        found.append(finite[..., 0] if diagonal and finite is not None else finite)
    return found


def scaled(factors: Factors, scale: Array, lead: int) -> tuple[Array, ...]:
    """The factors with a scale between them: one number for each of what stacks, of shape (leading dimensions, 1)."""
    part = scale ** (1 / max(1, len(factors)))
    return tuple(factor * part.reshape((*factor.shape[:lead], *(1,) * (factor.ndim - lead))) for factor in factors)


def mean_over_sides(x: Array, lead: int) -> Array:
    """The mean over all sides, of shape (leading dimensions, 1)."""
    return sum_over(x.reshape((*x.shape[:lead], -1)), -1) / math.prod(x.shape[lead:])
