"""Bases made of matrices, and of stacks of them: eigenvectors, and what QR makes of columns."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from ._elementwise import sqrt, where
from ._host import detached
from ._kinds import Array, cast_to, dtype_name, is_number, kind, namespace
from ._reductions import count_nonfinite, count_true, stack

_DAMPING = 1e-6  # the part of its greatest element that is added to the diagonal of a matrix that could not be decomposed
_EQUAL = 1e-9  # eigenvalues that differ by less than this part of the greatest one have no derivative of their vectors


class Eigen(NamedTuple):
    """Eigenvalues of shape (..., n), the largest first, and eigenvectors as columns of matrices of shape (..., n, n)."""

    values: Array
    vectors: Array
    damped: int
    """How many matrices could only be decomposed with something added to their diagonals, or not at all."""


def eigen(x: Array) -> Eigen:
    """The eigenvalues and eigenvectors of finite symmetric matrices, of shape (..., n, n).

    The signs, which are free, are those with which the largest element of each vector is positive. Vectors have the
    derivative that they have where eigenvalues differ, and 0 between equal ones. A matrix for which the library finds no
    vectors is decomposed in float64 with a part of its size added to its diagonal; if even that fails, the identity stands in.
    """
    plain = detached(x)
    damped = 0
    try:
        values, vectors = namespace(plain).linalg.eigh(plain)
    except _failures():
        found = [_one(each) for each in plain.reshape((-1, *plain.shape[-2:]))]
        values = stack([each[0] for each in found]).reshape(plain.shape[:-1])
        vectors = stack([each[1] for each in found]).reshape(plain.shape)
        damped = sum(each[2] for each in found)
    values, vectors = _backwards(values), _backwards(vectors)
    vectors = vectors * _leading_signs(vectors)
    if _is_differentiated(x):
        values, vectors = _with_derivative(x, values, vectors)
    return Eigen(values, vectors, damped)


def _failures() -> tuple[type[Exception], ...]:
    torch = sys.modules.get("torch")
    return (np.linalg.LinAlgError,) if torch is None else (np.linalg.LinAlgError, torch.linalg.LinAlgError)


def _one(x: Array) -> tuple[Array, Array, bool]:
    """One matrix alone: (eigenvalues, eigenvectors, whether it had to be damped)."""
    xp = namespace(x)
    try:
        return (*xp.linalg.eigh(x), False)
    except _failures():
        identity = _identity_like(x)
    try:
        wide, size = cast_to(x, "float64"), float(abs(x).max())
        values, vectors = xp.linalg.eigh(wide + _DAMPING * size * cast_to(identity, "float64"))
        dtype = dtype_name(x)
        return cast_to(values - _DAMPING * size, dtype), cast_to(vectors, dtype), True
    except _failures():
        return xp.ones_like(x[0]), identity, True


def identities(x: Array) -> Array:
    """The identity for each matrix of shape (..., n, n), in its dtype."""
    one = _identity_like(x)
    return one + 0 * one if one.ndim == x.ndim else namespace(x).zeros_like(detached(x)) + one


def _identity_like(x: Array) -> Array:
    n = x.shape[-1]
    return (
        np.eye(n, dtype=x.dtype) if isinstance(x, np.ndarray) else sys.modules["torch"].eye(n, dtype=x.dtype, device=x.device)
    )


def _backwards(x: Array) -> Array:
    """The last axis in the other order."""
    return x[..., ::-1] if isinstance(x, np.ndarray) else x.flip(-1)


def _leading_signs(vectors: Array) -> Array:
    """The sign of the largest element of each column."""
    if isinstance(vectors, np.ndarray):
        place = np.argmax(abs(vectors), axis=-2)[..., None, :]
        return np.where(np.take_along_axis(vectors, place, axis=-2) < 0, -1.0, 1.0).astype(vectors.dtype)
    place = vectors.abs().argmax(-2, keepdim=True)
    return where(vectors.gather(-2, place) < 0, -1.0, 1.0).to(vectors.dtype)


def _is_differentiated(x: Array) -> bool:
    if kind(x) != "torch":
        return False
    from . import _torch

    return _torch.is_differentiated(x)


def _with_derivative(x: Array, values: Array, vectors: Array) -> tuple[Array, Array]:
    """The same numbers with the first derivative by x: perturbation theory, left out between equal eigenvalues."""
    change = x - detached(x)  # zero, but for its derivative
    inside = vectors.mT @ (0.5 * (change + change.mT)) @ vectors
    gaps = values[..., None, :] - values[..., :, None]
    equal = abs(gaps) <= _EQUAL * abs(values).max()
    turn = where(equal, 0.0, inside / where(equal, 1.0, gaps))
    return values + inside.diagonal(dim1=-2, dim2=-1), vectors + vectors @ turn


def orthonormal(x: Array) -> Array:
    """The columns of matrices, of shape (..., n, k) with k <= n, made orthonormal one after another: the Q of QR.

    Its signs are those with which R has no negative number on its diagonal. Its derivative is taken as 0 where columns depend
    on one another.
    """
    q, r = namespace(x).linalg.qr(detached(x))
    diagonal = np.diagonal(r, axis1=-2, axis2=-1) if isinstance(r, np.ndarray) else r.diagonal(dim1=-2, dim2=-1)
    signs = cast_to(where(diagonal < 0, -1.0, 1.0), dtype_name(r))
    q = q * signs[..., None, :]
    if _is_differentiated(x):
        torch = sys.modules["torch"]
        low = abs(diagonal).amin(-1) <= _EQUAL * abs(diagonal).amax(-1)
        r = where(low[..., None, None], _identity_like(r), r * signs[..., :, None])
        change = torch.linalg.solve_triangular(r, x - detached(x), upper=True, left=False)  # zero, but for its derivative
        change = where(low[..., None, None], 0.0, change)
        inside = q.mT @ change
        lower = inside.tril(-1)
        turned = q @ (lower - lower.mT)
        if x.shape[-2] > x.shape[-1]:  # out of the space of the columns
            turned = turned + change - q @ inside
        q = q + turned
    return q


def finite_each(x: Array) -> Array | None:
    """None if all is finite; else for each matrix of shape (..., n, n) whether it is, of shape (..., 1, 1).

    This is read on the host, at the cost of a synchronisation.
    """
    if not count_nonfinite(x):
        return None
    xp = namespace(x)
    finite = xp.isfinite(x)
    return finite.all(axis=(-2, -1), keepdims=True) if xp is np else finite.all(-1, keepdim=True).all(-2, keepdim=True)


def descending(x: Array) -> Array:
    """The places of the numbers along the last axis from the largest down, equal ones in their order."""
    if isinstance(x, np.ndarray):
        return np.argsort(-x, axis=-1, kind="stable")
    return detached(x).argsort(dim=-1, descending=True, stable=True)


def taken(x: Array, places: Array, axis: int) -> Array:
    """x with what lies along an axis put in another order: places has the shape of the axes that stack, and (n,)."""
    stacked = places.ndim - 1
    shape = (*places.shape[:-1], *(places.shape[-1] if i == axis else 1 for i in range(stacked, x.ndim)))
    if not stacked and kind(x) == "torch":
        return x.index_select(axis, places)
    if isinstance(x, np.ndarray):
        return np.take_along_axis(x, places.reshape(shape), axis)
    return sys.modules["torch"].take_along_dim(x, places.reshape(shape), axis)


_ROUNDING = {"float32": 2.0**-23, "float64": 2.0**-52}


def inverse_root(x: Array, power: Any, epsilon: Any) -> tuple[Array, int]:
    """``(x + epsilon * I)**-power`` for finite symmetric positive matrices of shape (..., n, n), and how many were damped.

    Eigenvalues that rounding has left of 0 are taken as 0. Where one stays 0 the matrix is damped: a part of the largest
    eigenvalue stands in, or 1 for a zero matrix. The derivative is that of the matrix function.
    """
    given, vectors, damped = eigen(detached(x))
    top = given[..., :1]
    given = where(given <= given.shape[-1] * _ROUNDING[dtype_name(x)] * top, 0.0 * given, given)
    values = given + epsilon
    if is_number(epsilon) and epsilon == 0:
        least = where(top > 0, _DAMPING * top, 1.0 + 0.0 * top)
        singular = values <= 0
        values = where(singular, least, values)
        damped += int(count_true(singular.any(-1)))
    roots = values**-power
    root = (vectors * roots[..., None, :]) @ vectors.mT
    if _is_differentiated(x):
        change = x - detached(x)  # zero, but for its derivative
        gaps = values[..., :, None] - values[..., None, :]
        equal = abs(gaps) <= _EQUAL * values[..., :1, None]
        slopes = (roots[..., :, None] - roots[..., None, :]) / where(equal, 1.0 + 0 * gaps, gaps)
        slopes = where(equal, -power * (roots / values)[..., None, :] + 0 * gaps, slopes)
        root = root + vectors @ (slopes * (vectors.mT @ (0.5 * (change + change.mT)) @ vectors)) @ vectors.mT
    return root, damped


def solve_lower(lower: Array, x: Array) -> Array:
    """What lower triangular matrices of shape (..., n, n) multiply to x of shape (..., n, k): NaN where one is singular."""
    if kind(lower) == "torch":
        return sys.modules["torch"].linalg.solve_triangular(lower, x, upper=False)
    try:
        return np.linalg.solve(lower, x)
    except np.linalg.LinAlgError:
        return np.full(np.broadcast_shapes(x.shape, (*lower.shape[:-1], x.shape[-1])), np.nan, x.dtype)


def upper(x: Array) -> Array:
    """Matrices with 0 below their diagonals."""
    return namespace(x).triu(x)


def largest(x: Array, axes: int) -> Array:
    """The largest magnitude over so many last axes, kept as length 1."""
    over = tuple(range(-axes, 0))
    return abs(x).max(axis=over, keepdims=True) if isinstance(x, np.ndarray) else abs(x).amax(over, keepdim=True)


def norm_below(x: Array) -> Array:
    """A lower bound of the spectral norm of symmetric matrices, close by for those with no negative eigenvalue: (..., 1, 1).

    Two products with the longest column: Li's `norm_lower_bound`.
    """
    scale = largest(x, 2)
    x = x / where(scale > 0, scale, 1.0 + 0 * scale)
    lengths = (x * x).sum(-2)
    if isinstance(x, np.ndarray):
        column = np.take_along_axis(x, np.argmax(lengths, -1)[..., None, None], -1)
    else:
        place = detached(lengths).argmax(-1)[..., None, None]
        column = x.gather(-1, place.expand(*x.shape[:-1], 1))
    column = x @ column
    length = sqrt((column * column).sum(-2))[..., None, :]
    column = x @ (column / where(length > 0, length, 1.0 + 0 * length))
    return scale * sqrt((column * column).sum(-2))[..., None, :]
