"""Arrays as tensors with a matrix for each side: how they are cut into blocks, and products along one side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...arrays import Array, add_matmul, concatenate, symmetric_matmul
from .matrix_step import block_runs


def _cuts(rule: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, tuple[tuple[int, int], ...]]:
    """(shape with its sides as they are treated, axis along which blocks lie, neighbours of one size as (size, count))."""
    lead, rest = shape[: rule.batch_dims], shape[rule.batch_dims :]
    if len(rest) < 2:
        return shape, len(lead), block_runs(rule.replace(layout="out_in"), shape)
    runs = block_runs(rule, shape)
    axis = len(lead) + (rule.layout == "in_out")
    if rule.merge:
        return (*lead, rest[0], math.prod(rest[1:])), axis, runs
    inner = math.prod(rest[2:]) if rule.layout == "in_out" else 1
    return shape, axis, tuple((size // max(1, inner), count) for size, count in runs)


def piece_shapes(rule: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of the pieces that `cut` makes."""
    whole, axis, runs = _cuts(rule, tuple(shape))
    if len(runs) == 1 and runs[0][1] == 1:
        return [whole]
    lead = rule.batch_dims
    return [(*whole[:lead], count, *whole[lead:axis], size, *whole[axis + 1 :]) for size, count in runs]


def cut(rule: Any, x: Array) -> list[Array]:
    """x as stacks of blocks of one size, each of shape (leading dimensions, blocks, sides), without blocks (.., sides)."""
    whole, axis, runs = _cuts(rule, tuple(x.shape))
    x = x.reshape(whole)
    if len(runs) == 1 and runs[0][1] == 1:
        return [x]
    pieces, start = [], 0
    for size, count in runs:
        part = x[(*(slice(None),) * axis, slice(start, start + size * count))]
        start += size * count
        part = part.reshape((*whole[:axis], count, size, *whole[axis + 1 :]))
        pieces.append(part.swapaxes(axis, axis - 1) if axis > rule.batch_dims else part)
    return pieces


def joined(rule: Any, pieces: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """The array of this shape from its pieces."""
    whole, axis, runs = _cuts(rule, tuple(shape))
    if len(runs) == 1 and runs[0][1] == 1:
        return pieces[0].reshape(shape)
    parts = [piece.swapaxes(axis, axis - 1) if axis > rule.batch_dims else piece for piece in pieces]
    sizes = [size * count for size, count in runs]
    flat = [part.reshape((*whole[:axis], n, *whole[axis + 1 :])) for part, n in zip(parts, sizes, strict=True)]
    return concatenate(flat, axis=axis).reshape(shape)


def _flattened(x: Array, axis: int, lead: int) -> tuple[Array, int, int]:
    """(x of shape (leading, before, side, after), before, after): the sides before and after one of them in one."""
    before, after = math.prod(x.shape[lead : lead + axis]), math.prod(x.shape[lead + axis + 1 :])
    return x.reshape((*x.shape[:lead], before, x.shape[lead + axis], after)), before, after


def along(q: Array, x: Array, axis: int, lead: int) -> Array:
    """``q.mT`` times x along one of its sides: behind ``lead`` dimensions that stack, q is a square matrix."""
    flat, before, after = _flattened(x, axis, lead)
    if before == 1:
        return (q.mT @ flat[..., 0, :, :]).reshape(x.shape)
    if after == 1:
        return (flat[..., 0] @ q).reshape(x.shape)
    return (q.mT[..., None, :, :] @ flat).reshape(x.shape)


def rotated(x: Array, bases: Sequence[Array | None], lead: int, *, back: bool = False) -> Array:
    """x in other coordinates along all of its sides: columns of a basis are the new axes, None leaves a side as it is."""
    for axis, basis in enumerate(bases):
        if basis is not None:
            x = along(basis.mT if back else basis, x, axis, lead)
    return x


def gram_along(x: Array, axis: int, lead: int) -> Array:
    """The products of the slices of x along a side with one another, of shape (leading dimensions, side, side)."""
    flat, before, after = _flattened(x, axis, lead)
    if before == 1 or after == 1:
        rows = flat[..., 0, :, :] if before == 1 else flat[..., 0].mT
        return symmetric_matmul(rows, rows.mT)
    return symmetric_matmul(flat, flat.mT).sum(lead)


def plus_gram(statistic: Array, x: Array, axis: int, lead: int, keep: Any, weight: Any) -> Array:
    """``keep`` times a statistic and ``weight`` times `gram_along`, in one pass where the library has one."""
    flat, before, after = _flattened(x, axis, lead)
    if before == 1 or after == 1:
        rows = flat[..., 0, :, :] if before == 1 else flat[..., 0].mT
        return add_matmul(statistic, rows, rows.mT, keep, weight, symmetric=True)
    return keep * statistic + weight * gram_along(x, axis, lead)
