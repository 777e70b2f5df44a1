"""Array functions on whatever array comes: NumPy or torch, and Python numbers where a rule computes with scalars.

Dispatch is by type. torch is never imported here: if an array is a tensor, torch is there already.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

Array: TypeAlias = Any
"""A NumPy array or a torch tensor (or, for scalars, a Python number)."""

HALF = frozenset({"float16", "bfloat16"})
_COMPLEX_OF = {"float16": "complex64", "bfloat16": "complex64", "float32": "complex64", "float64": "complex128"}
_REAL_OF = {"complex64": "float32", "complex128": "float64", "complex32": "float16"}
FLOATS = frozenset(_COMPLEX_OF)


def torch_if_loaded() -> ModuleType | None:
    """The torch module if the program has imported it, else None."""
    return sys.modules.get("torch")


def kind(x: object) -> str | None:
    """``"numpy"`` or ``"torch"`` for an array, None for anything else (NumPy scalars included)."""
    if isinstance(x, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    return None


def is_number(x: object) -> bool:
    """Whether x is a Python or NumPy scalar (not a 0-d array)."""
    return isinstance(x, (int, float, complex, np.generic)) and not isinstance(x, (bool, np.bool_))


def namespace(x: Array) -> Any:
    """The module whose functions take x: ``numpy`` or ``torch``."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return torch
    msg = f"expected a NumPy array or a torch tensor, got {type(x).__name__}"
    raise TypeError(msg)


# --- dtypes -----------------------------------------------------------------------------------------------------------


def dtype_name(x: Array) -> str:
    """The dtype of x as a plain name, the same for both frameworks: ``"float32"``, ``"bfloat16"``, ``"complex128"``."""
    name = str(x.dtype)
    return name.removeprefix("torch.")


def as_dtype_name(dtype: object) -> str:
    """The plain name of a dtype given as a name, a NumPy dtype or type, or a torch dtype.

    Raises ValueError if it is not a real floating dtype that rules can compute in.
    """
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
    elif type(dtype).__module__ == "torch":
        name = str(dtype).removeprefix("torch.")
    else:
        try:
            name = np.dtype(cast("Any", dtype)).name
        except TypeError:
            name = repr(dtype)
    if name not in FLOATS:
        msg = f"{name!r} is not one of {', '.join(sorted(FLOATS))}"
        raise ValueError(msg)
    return name


def is_inexact(x: Array) -> bool:
    """Whether x holds real or complex floating point numbers."""
    if isinstance(x, (np.ndarray, np.generic)):
        return x.dtype.kind in "fc"
    return bool(x.is_floating_point() or x.is_complex())


def is_complex(x: Array) -> bool:
    """Whether x holds complex numbers."""
    if isinstance(x, (np.ndarray, np.generic)):
        return x.dtype.kind == "c"
    return bool(getattr(x, "is_complex", lambda: isinstance(x, complex))())


def real_dtype(name: str) -> str:
    """The dtype of the real part: ``complex64`` gives ``float32``; a real dtype gives itself."""
    return _REAL_OF.get(name, name)


def cast_to(x: Array, name: str) -> Array:
    """x in the dtype of that name (x itself if it has it already). A complex x takes the complex dtype of that precision."""
    if is_complex(x):
        name = _COMPLEX_OF.get(name, name)
    if dtype_name(x) == name:
        return x
    if isinstance(x, (np.ndarray, np.generic)):
        try:
            dtype = np.dtype(name)
        except TypeError:
            msg = f"NumPy has no {name}; use torch arrays for it"
            raise TypeError(msg) from None
        return x.astype(dtype)
    return x.to(getattr(sys.modules["torch"], name))


def working_dtype(name: str) -> str:
    """The dtype in which arithmetic on arrays of this dtype is done: float32 for half precision, else itself."""
    return "float32" if name in HALF else name


# --- construction -----------------------------------------------------------------------------------------------------


def zeros_like(x: Array, *, real: bool = False) -> Array:
    """Zeros of x's shape, dtype, device and strides; with ``real``, of the real dtype of a complex x."""
    return full_like(x, 0, real=real)


def full_like(x: Array, value: Any, *, real: bool = False) -> Array:
    """An array of x's shape, dtype, device and strides, filled with value; with ``real``, of x's real dtype."""
    xp = namespace(x)
    if real and is_complex(x):
        x = x.real
    out = xp.zeros_like(x)
    if not (is_number(value) and value == 0):
        out = out + value
    return out


# --- elementwise functions ------------------------------------------------------------------------------------------------


def sqrt(x: Array) -> Array:
    """Square root. In a torch graph its derivative at 0 is taken as 0, so that a zero gradient does not make NaN."""
    if is_number(x):
        return math.sqrt(x)
    if isinstance(x, np.ndarray):
        return np.sqrt(x)
    torch = sys.modules["torch"]
    if x.requires_grad:
        zero = x == 0
        return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))
    return torch.sqrt(x)


def abs2(x: Array) -> Array:
    """The squared magnitude, real also for complex x."""
    if is_complex(x):
        return x.real * x.real + x.imag * x.imag
    return x * x


def absolute(x: Array) -> Array:
    """The magnitude, real also for complex x."""
    return abs(x)


def sign(x: Array) -> Array:
    """x / abs(x), 0 at 0, NaN at NaN; complex numbers keep their phase."""
    xp = namespace(x)
    if xp is np:
        return np.sign(x)
    return xp.where(x.isnan(), x, x.sgn())  # torch's sgn of NaN is 0


def where(condition: Array, a: Array, b: Array) -> Array:
    """a where the condition holds, else b. A Python bool chooses one of the two."""
    if isinstance(condition, (bool, np.bool_)):
        return a if condition else b
    return namespace(condition).where(condition, a, b)


def maximum(a: Array, b: Array) -> Array:
    """The larger one, elementwise; NaN if either is NaN. One of the two may be a Python number."""
    return _extremum("maximum", "clamp_min", a, b)


def minimum(a: Array, b: Array) -> Array:
    """The smaller one, elementwise; NaN if either is NaN. One of the two may be a Python number."""
    return _extremum("minimum", "clamp_max", a, b)


def _extremum(name: str, clamp: str, a: Array, b: Array) -> Array:
    if kind(a) is None and kind(b) is not None:
        a, b = b, a
    if kind(a) == "torch":
        torch = sys.modules["torch"]
        return getattr(torch, name)(a, b) if kind(b) == "torch" else getattr(torch, clamp)(a, b)
    return getattr(np, name)(a, b)


def clip(x: Array, low: Any, high: Any) -> Array:
    """x limited to [low, high]; NaN stays NaN."""
    return minimum(maximum(x, low), high)


# --- reductions ---------------------------------------------------------------------------------------------------------


def norm(x: Array, p: float = 2.0) -> Array:
    """The p-norm of all elements as a 0-d float64 array: p = 0 counts non-zeros, inf and -inf are max and min of abs.

    Accumulated in float64 and scaled where float64 itself would over- or underflow, so that a finite array has a finite
    norm.
    """
    xp = namespace(x)
    a = abs(x)
    wide = dtype_name(a) == "float64"
    if math.prod(x.shape) == 0:
        return cast_to(xp.sum(a), "float64")
    if p == math.inf:
        return cast_to(xp.max(a), "float64")
    if p == -math.inf:
        return cast_to(xp.min(a), "float64")
    if p == 0:
        return cast_to(xp.sum(a != 0), "float64")
    if not wide:
        if xp is np:
            a = a.astype(np.float64)
            return np.sqrt(np.sum(a * a)) if p == 2 else np.sum(a**p) ** (1 / p)
        return xp.linalg.vector_norm(a, p, dtype=xp.float64)
    top = xp.max(a)
    safe = xp.where((top > 0) & xp.isfinite(top), top, xp.ones_like(top))
    scaled = a / safe
    total = xp.sum(scaled * scaled) if p == 2 else xp.sum(scaled**p)
    root = sqrt(total) if p == 2 else total ** (1 / p)
    return root * safe


def scalar_like(value: Array, x: Array) -> Array:
    """A 0-d number made ready to multiply x without changing x's dtype."""
    return cast_to(value, real_dtype(dtype_name(x))) if kind(value) or isinstance(value, np.generic) else value


# --- host scalars ---------------------------------------------------------------------------------------------------------


def is_concrete(x: Array) -> bool:
    """Whether the value of x can be read on the host now: not inside a transform, a trace or an autograd graph."""
    if kind(x) != "torch":
        return True
    from . import _torch

    return _torch.is_concrete(x)


def can_read(x: Array) -> bool:
    """Whether the value of x can be read at all (it may cost a synchronisation): not inside a transform or a trace."""
    if kind(x) != "torch":
        return True
    from . import _torch

    return _torch.can_read(x)


def share_memory(a: Array, b: Array) -> bool:
    """Whether two arrays may lie in the same memory."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.may_share_memory(a, b))
    if kind(a) != "torch" or kind(b) != "torch":
        return False
    from . import _torch

    return _torch.same_storage(a, b)


def copied(x: Array) -> Array:
    """x in memory of its own."""
    return x.copy() if isinstance(x, np.ndarray) else x.clone()


def host_int(value: Array, what: str) -> int:
    """A counter as a Python int. Inside ``torch.func`` transforms and ``torch.compile`` it cannot be read: TypeError."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    if not is_concrete(value):
        msg = (
            f"{what} decides from a step counter on the host, which cannot be read inside torch.func.vmap or torch.compile; "
            f"call update outside the transform, or use a rule without {what}"
        )
        raise TypeError(msg)
    return int(value)
