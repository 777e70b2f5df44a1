"""Arrays made like others, and elementwise functions."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from . import _tape
from ._kinds import Array, as_array, cast_to, dtype_name, is_complex, is_number, kind, namespace
from ._traced import Traced, extremum, filled, select, unary

_NUMBERS = (int, float)


def zeros_like(x: Array, *, real: bool = False, wide: bool = False) -> Array:
    """Zeros of x's shape, dtype, device and strides; ``real`` and ``wide`` as in `full_like`."""
    return full_like(x, 0, real=real, wide=wide)


def full_like(x: Array, value: Any, *, real: bool = False, wide: bool = False) -> Array:
    """An array of x's shape, dtype, device and strides, filled with value.

    With ``real``, for squares: of x's real dtype, and ``wide``. With ``wide``: of float32 if x is float16, in which the square
    of anything below 2e-4 is zero.
    """
    if isinstance(x, Traced):
        return filled(x, value)
    x = _wide(x, real=real, wide=wide)
    out = namespace(x).zeros_like(x)
    if not (is_number(value) and value == 0):
        out = out + value
    return as_array(out)


def zeros(like: Array, shape: tuple[int, ...], *, real: bool = False) -> Array:
    """Zeros of another shape, of the dtype and on the device of an array; ``real`` as in `full_like`."""
    like = _wide(like, real=real, wide=False)
    return np.zeros(shape, dtype=like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def _wide(x: Array, *, real: bool, wide: bool) -> Array:
    if real and is_complex(x):
        x = x.real
    return cast_to(x, "float32") if (real or wide) and dtype_name(x) == "float16" else x


def zero_norm(like: Array) -> Array:
    """A 0-d float64 zero beside an array, for a state that is a norm."""
    if isinstance(like, np.ndarray):
        return np.zeros(())
    return like.new_zeros((), dtype=sys.modules["torch"].float64)


def sqrt(x: Array) -> Array:
    """Square root. Its derivative at 0, reverse or forward, is taken as 0, so that a zero gradient does not make NaN."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np.sqrt(x)
    if isinstance(x, Traced):
        return unary("sqrt", x)
    if is_number(x):
        return math.sqrt(x)
    from . import _torch

    torch = sys.modules["torch"]
    if _torch.is_differentiated(x):
        zero = x == 0
        return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))
    return torch.sqrt(x)


def exp(x: Array) -> Array:
    """The exponential."""
    return unary("exp", x) if isinstance(x, Traced) else _tape.exp(x) if is_number(x) else namespace(x).exp(x)


def log(x: Array) -> Array:
    """The natural logarithm."""
    return unary("log", x) if isinstance(x, Traced) else _tape.log(x) if is_number(x) else namespace(x).log(x)


def abs2(x: Array) -> Array:
    """The squared magnitude, real also for complex x."""
    if is_complex(x):
        return x.real * x.real + x.imag * x.imag
    return x * x


def alignment(a: Array, b: Array) -> Array:
    """The product, for complex numbers the real part of a conj(b): positive where the two point the same way."""
    return a.real * b.real + a.imag * b.imag if is_complex(a) or is_complex(b) else a * b


def absolute(x: Array) -> Array:
    """The magnitude, real also for complex x."""
    return abs(x)


def sign(x: Array) -> Array:
    """x / abs(x), 0 at 0, NaN at NaN; complex numbers keep their phase."""
    if isinstance(x, Traced):
        return unary("sign", x)
    xp = namespace(x)
    if xp is np:
        return np.sign(x)
    return xp.where(x.isnan(), x, x.sgn())  # torch's sgn of NaN is 0


def where(condition: Array, a: Array, b: Array) -> Array:
    """a where the condition holds, else b. A Python bool chooses one of the two."""
    if isinstance(condition, (bool, np.bool_)):
        return a if condition else b
    if isinstance(condition, Traced):
        return select(condition, a, b)
    return namespace(condition).where(condition, a, b)


def maximum(a: Array, b: Array) -> Array:
    """The larger one, elementwise; NaN if either is NaN. Both may be Python numbers."""
    return _extremum("maximum", "clamp_min", a, b)


def minimum(a: Array, b: Array) -> Array:
    """The smaller one, elementwise; NaN if either is NaN. Both may be Python numbers."""
    return _extremum("minimum", "clamp_max", a, b)


def _extremum(name: str, clamp: str, a: Array, b: Array) -> Array:
    if isinstance(a, Traced) or isinstance(b, Traced):
        return extremum(name[:3], a, b)
    if type(a) in _NUMBERS and type(b) in _NUMBERS:
        return getattr(np, name)(a, b).item()  # a number as they are: NumPy's would widen what it meets
    if kind(a) is None and kind(b) is not None:
        a, b = b, a
    if kind(a) == "torch":
        torch = sys.modules["torch"]
        return getattr(torch, name)(a, b) if kind(b) == "torch" else getattr(torch, clamp)(a, b)
    return getattr(np, name)(a, b)


def clip(x: Array, low: Any, high: Any) -> Array:
    """x limited to [low, high]; NaN stays NaN."""
    return minimum(maximum(x, low), high)


def add_multiple(a: Array, b: Array, factor: Any) -> Array:
    """``a + factor * b``, in one pass where the library has one."""
    if kind(a) == "torch" and isinstance(factor, (int, float)):
        return sys.modules["torch"].add(a, b, alpha=factor)
    return a + factor * b


def interpolate(a: Array, b: Array, weight: Any) -> Array:
    """``(1 - weight) * a + weight * b``, in one pass where the library has one."""
    if kind(a) == "torch" and isinstance(weight, (int, float)) and a.dtype == b.dtype:
        return sys.modules["torch"].lerp(a, b, weight)
    return (1 - weight) * a + weight * b
