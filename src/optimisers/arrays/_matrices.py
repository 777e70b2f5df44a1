"""Matrices and stacks of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from ..errors import NonFiniteError
from ._host import detached
from ._kinds import Array, cast_to, dtype_name, is_complex, kind, namespace
from ._reductions import concatenate, count_nonfinite


def matmul(a: Array, b: Array) -> Array:
    """The matrix product; a real matrix times a complex one is complex."""
    if is_complex(b) and not is_complex(a):
        a = cast_to(a, dtype_name(b))
    return a @ b


def add_matmul(c: Array, a: Array, b: Array, beta: float, alpha: float, *, symmetric: bool = False) -> Array:
    """``beta * c + alpha * a @ b`` for matrices or stacks of them, in one pass where the library has one.

    symmetric: the result is known to be so, and its lower half may be taken from the upper one.
    """
    if symmetric and _may_write(a, b, c) and (parts := _parts(a, written=True)) > 1:
        return _written(a, b, parts, c, beta, alpha)
    if symmetric and (parts := _parts(a)) > 1:
        return _mirrored(lambda i, j: add_matmul(c[..., i, j], a[..., i, :], b[..., j], beta, alpha), c.shape[-1], parts)
    if kind(a) == "torch" and a.ndim in {2, 3}:
        torch = sys.modules["torch"]
        fused = torch.addmm if a.ndim == 2 else torch.baddbmm
        return fused(c, a, b, beta=beta, alpha=alpha)
    return beta * c + alpha * (a @ b)


def leading_vectors(x: Array, count: int) -> Array:
    """The first left singular vectors of a matrix as the rows of a matrix, outside any graph.

    Raises NonFiniteError for a matrix with an infinite or NaN element, at the cost of a synchronisation.
    """
    if count_nonfinite(x):
        msg = "the singular vectors of a matrix that is not finite cannot be taken"
        raise NonFiniteError(msg)
    u, _, _ = namespace(x).linalg.svd(detached(x), full_matrices=False)
    return u[:, :count].mT


def gram(x: Array) -> tuple[Array, Array]:
    """``x @ x.mT``, and the sum of the squares of each matrix in float64, of shape (..., 1, 1). Overflow is no warning."""
    if isinstance(x, np.ndarray):
        with np.errstate(all="ignore"):
            g = x @ x.mT
        return g, np.trace(g, axis1=-2, axis2=-1, dtype=np.float64)[..., None, None]
    g = symmetric_matmul(x, x.mT)
    return g, g.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=sys.modules["torch"].float64)[..., None, None]


def symmetric_matmul(a: Array, b: Array) -> Array:
    """``a @ b`` where that is known to be symmetric: its lower half may be taken from the upper one."""
    if _may_write(a, b) and (parts := _parts(a, written=True)) > 1:
        return _written(a, b, parts)
    if (parts := _parts(a)) > 1:
        return _mirrored(lambda i, j: a[..., i, :] @ b[..., j], a.shape[-2], parts)
    return a @ b


def _may_write(*given: Array) -> bool:
    """Whether a product of these tensors may be written piece by piece: of matrices that nobody differentiates."""
    if any(kind(x) != "torch" or x.ndim != 2 for x in given):
        return False
    from . import _torch

    return not any(map(_torch.is_differentiated, given))


def _written(a: Array, b: Array, parts: int, c: Array | None = None, beta: float = 0.0, alpha: float = 1.0) -> Array:
    """``beta * c + alpha * a @ b``, known to be symmetric: its block rows are written from the diagonal on to their places."""
    torch, side = sys.modules["torch"], a.shape[0]
    out = a.new_empty((side, side))
    cut = [side * i // parts for i in range(parts + 1)]
    for lo, hi in pairwise(cut):
        if c is None:
            torch.mm(a[lo:hi], b[:, lo:], out=out[lo:hi, lo:])
        else:
            torch.addmm(c[lo:hi, lo:], a[lo:hi], b[:, lo:], beta=beta, alpha=alpha, out=out[lo:hi, lo:])
        out[hi:, lo:hi] = out[lo:hi, hi:].mT
    return out


# From so many multiplications on, leaving out half of them is worth the copies; from this side on, four parts beat two.
_SYMMETRIC_FROM, _FOUR_FROM = 1.5e8, 768
# The same where blocks are written to their places.
_WRITTEN_FROM, _FOUR_WRITTEN_FROM = 4e7, 384


def _parts(x: Array, *, written: bool = False) -> int:
    """In how many block rows to compute a symmetric product with x on the left. NumPy knows ``x @ x.mT`` by itself."""
    side, inner = x.shape[-2:]
    if kind(x) != "torch" or side * side * inner < (_WRITTEN_FROM if written else _SYMMETRIC_FROM) or x.device.type != "cpu":
        return 1
    return 4 if side >= (_FOUR_WRITTEN_FROM if written else _FOUR_FROM) else 2


def _mirrored(block: Callable[[slice, slice], Array], side: int, parts: int) -> Array:
    """A symmetric matrix from block rows that begin at the diagonal; block is given the rows and the columns."""
    cut = [side * i // parts for i in range(parts + 1)]
    upper = [block(slice(lo, hi), slice(lo, None)) for lo, hi in pairwise(cut)]
    rows = []
    for i, row in enumerate(upper):
        left = [upper[j][..., cut[i] - cut[j] : cut[i + 1] - cut[j]].mT for j in range(i)]
        rows.append(concatenate([*left, row], axis=-1))
    return concatenate(rows, axis=-2)


def on_cpu(x: Array) -> bool:
    """Whether x is computed with on the CPU."""
    return kind(x) != "torch" or bool(x.device.type == "cpu")


def add_identity(x: Array, value: float) -> Array:
    """``x + value * I`` for each matrix, written to x."""
    if isinstance(x, np.ndarray):
        np.einsum("...ii->...i", x)[...] += value
    else:
        x.diagonal(dim1=-2, dim2=-1).add_(value)
    return x


def matrix_norm(x: Array) -> Array:
    """The Frobenius norm of each matrix, of shape (..., 1, 1), in float64, scaled so that squares do not over- or underflow."""
    if dtype_name(x) != "float64":
        if isinstance(x, np.ndarray):
            x = x.astype(np.float64)
            return np.sqrt(np.sum(x * x, axis=(-2, -1), keepdims=True))
        torch = sys.modules["torch"]
        return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    if isinstance(x, np.ndarray):
        top = np.max(np.abs(x), axis=(-2, -1), keepdims=True)
        safe = np.where((top > 0) & np.isfinite(top), top, 1.0)
        scaled = x / safe
        return np.sqrt(np.sum(scaled * scaled, axis=(-2, -1), keepdims=True)) * safe
    torch = sys.modules["torch"]
    top = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    safe = torch.where((top > 0) & top.isfinite(), top, 1.0)
    return torch.linalg.vector_norm(x / safe, dim=(-2, -1), keepdim=True) * safe


def quick_in_bfloat16(x: Array) -> bool:
    """Whether x's device multiplies bfloat16 matrices faster than float32 ones."""
    if kind(x) != "torch":
        return False
    from . import _torch

    return _torch.quick_in_bfloat16(x.device)
