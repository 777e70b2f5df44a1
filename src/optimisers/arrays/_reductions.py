"""Norms, sums and counts."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np

from ._elementwise import sqrt
from ._kinds import Array, cast_to, dtype_name, kind, namespace, real_dtype
from ._traced import Traced, unary_test
from ._traced_norms import count_where
from ._traced_norms import norm as traced_norm


def norm(x: Array, p: float = 2.0) -> Array:
    """The p-norm of all elements as a 0-d float64 array: p = 0 counts non-zeros, inf and -inf are max and min of abs.

    Accumulated in float64 and scaled where float64 itself would over- or underflow, so that a finite array has a finite
    norm.
    """
    if isinstance(x, Traced):
        return traced_norm(x, p)
    xp = namespace(x)
    if xp is not np and dtype_name(x) not in {"float64", "complex128"} and p not in {math.inf, -math.inf, 0} and x.numel():
        return xp.linalg.vector_norm(abs(x) if x.is_complex() else x, p, dtype=xp.float64)
    a = abs(x)
    if math.prod(x.shape) == 0:
        return cast_to(xp.sum(a), "float64")
    if p == math.inf:
        return cast_to(xp.max(a), "float64")
    if p == -math.inf:
        return cast_to(xp.min(a), "float64")
    if p == 0:
        return cast_to(xp.sum(a != 0), "float64")
    if dtype_name(a) != "float64":
        a = a.astype(np.float64)
        return np.sqrt(np.sum(a * a)) if p == 2 else np.sum(a**p) ** (1 / p)
    top = xp.max(a)
    safe = xp.where((top > 0) & xp.isfinite(top), top, xp.ones_like(top))
    scaled = a / safe
    if p == 2:
        return sqrt(xp.sum(scaled * scaled)) * safe
    total = xp.sum(scaled**p)
    if p > 0:  # the root is taken beside 0, where its derivative is infinite
        zero = total == 0
        return xp.where(zero, total, xp.where(zero, xp.ones_like(total), total) ** (1 / p)) * safe
    return total ** (1 / p) * safe


def count_true(condition: Array) -> Array:
    """How often a condition on elements holds, as a 0-d float64 number."""
    if isinstance(condition, Traced):
        return count_where(condition)
    count = namespace(condition).count_nonzero(condition)
    return cast_to(count, "float64") if kind(count) else np.float64(count)


def count_nonfinite(x: Array) -> Array:
    """The number of infinite and NaN elements, 0-d."""
    if isinstance(x, Traced):
        return count_where(~unary_test("isfinite", x))
    if isinstance(x, np.ndarray):
        return np.count_nonzero(~np.isfinite(x))
    return sys.modules["torch"].count_nonzero(x - x)  # 0 or NaN; several times faster than isfinite on a CPU


def sum_over(x: Array, axis: int | tuple[int, ...] | None) -> Array:
    """The sum over one or several axes, kept as length 1, or over all (0-d)."""
    if axis is None:
        return x.sum()
    return x.sum(axis=axis, keepdims=True) if isinstance(x, np.ndarray) else x.sum(dim=axis, keepdim=True)


def stack(values: Sequence[Array]) -> Array:
    """Arrays of one shape along a new first axis, a tensor if one of them is a tensor; numbers as one vector."""
    if values and isinstance(values[0], Traced):  # stands for all of them
        return values[0].tracer.stacked(values)
    first = next((value for value in values if kind(value) == "torch"), None)
    if first is None:
        return np.array(values)
    torch = sys.modules["torch"]
    return torch.stack([v if kind(v) == "torch" else torch.as_tensor(v, device=first.device) for v in values])


def concatenate(arrays: list[Array], axis: int) -> Array:
    """Arrays joined along an axis."""
    return (
        np.concatenate(arrays, axis=axis) if isinstance(arrays[0], np.ndarray) else sys.modules["torch"].cat(arrays, dim=axis)
    )


def scalar_like(value: Array, x: Array) -> Array:
    """A 0-d number made ready to multiply x without changing x's dtype."""
    return cast_to(value, real_dtype(dtype_name(x))) if kind(value) or isinstance(value, np.generic) else value
