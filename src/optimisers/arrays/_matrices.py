"""Matrices and stacks of them."""

from __future__ import annotations

import sys

import numpy as np

from ._kinds import Array, cast_to, dtype_name, is_complex, kind


def matmul(a: Array, b: Array) -> Array:
    """The matrix product; a real matrix times a complex one is complex."""
    if is_complex(b) and not is_complex(a):
        a = cast_to(a, dtype_name(b))
    return a @ b


def add_matmul(c: Array, a: Array, b: Array, beta: float, alpha: float) -> Array:
    """``beta * c + alpha * a @ b`` for matrices or stacks of them, in one pass where the library has one."""
    if kind(a) == "torch" and a.ndim in {2, 3}:
        torch = sys.modules["torch"]
        fused = torch.addmm if a.ndim == 2 else torch.baddbmm
        return fused(c, a, b, beta=beta, alpha=alpha)
    return beta * c + alpha * (a @ b)


def identity_like(x: Array) -> Array:
    """The identity matrix of x's last side, in x's dtype and on its device."""
    if isinstance(x, np.ndarray):
        return np.eye(x.shape[-1], dtype=x.dtype)
    return sys.modules["torch"].eye(x.shape[-1], dtype=x.dtype, device=x.device)


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
