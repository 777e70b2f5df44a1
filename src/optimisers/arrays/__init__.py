"""Array functions on whatever array comes: NumPy or torch, and Python numbers where a rule computes with scalars.

Dispatch is by type. torch is never imported here: if an array is a tensor, torch is there already.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from ..errors import HyperParameterError, RuleError

if TYPE_CHECKING:
    from types import ModuleType

Array: TypeAlias = Any
"""A NumPy array or a torch tensor (or, for scalars, a Python number)."""

HALF = frozenset({"float16", "bfloat16"})
_COMPLEX_OF = {"float16": "complex64", "bfloat16": "complex64", "float32": "complex64", "float64": "complex128"}
_REAL_OF = {"complex64": "float32", "complex128": "float64", "complex32": "float16"}
FLOATS = frozenset(_COMPLEX_OF)
_NAMES: dict[Any, str] = {}  # dtype -> name; making the string anew costs more than a small step


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
    name = _NAMES.get(x.dtype)
    if name is None:
        name = _NAMES[x.dtype] = str(x.dtype).removeprefix("torch.")
    return name


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
        if name == "bfloat16":  # the type that other packages add to NumPy is no floating type to it
            msg = "NumPy cannot compute in bfloat16; use float32, or torch tensors"
            raise HyperParameterError(msg)
        return x.astype(np.dtype(name))
    return x.to(getattr(sys.modules["torch"], name))


def working_dtype(name: str) -> str:
    """The dtype in which arithmetic on arrays of this dtype is done: float32 for half precision, else itself."""
    return "float32" if name in HALF else name


def as_array(x: Any) -> Any:
    """x, but a NumPy scalar as a 0-d array: NumPy's arithmetic on 0-d arrays returns scalars."""
    return np.asarray(x) if isinstance(x, np.generic) else x


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
    return as_array(out)


# --- elementwise functions ------------------------------------------------------------------------------------------------


def sqrt(x: Array) -> Array:
    """Square root. In a torch graph its derivative at 0 is taken as 0, so that a zero gradient does not make NaN."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np.sqrt(x)
    if is_number(x):
        return math.sqrt(x)
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


def count_nonfinite(x: Array) -> Array:
    """The number of infinite and NaN elements, 0-d."""
    if isinstance(x, np.ndarray):
        return np.count_nonzero(~np.isfinite(x))
    return sys.modules["torch"].count_nonzero(x - x)  # 0 or NaN; several times faster than isfinite on a CPU


def stack(values: Sequence[Array]) -> Array:
    """0-d numbers as one vector, a tensor if one of them is a tensor."""
    first = next((value for value in values if kind(value) == "torch"), None)
    if first is None:
        return np.stack(values)
    torch = sys.modules["torch"]
    return torch.stack([v if kind(v) == "torch" else torch.as_tensor(v, device=first.device) for v in values])


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


def memory_key(x: Array) -> int | None:
    """What is the same for two arrays that lie in one allocation, or None where that cannot be known."""
    if isinstance(x, np.ndarray):
        while isinstance(x.base, np.ndarray):
            x = x.base
        return id(x) if x.base is None else id(x.base)
    if kind(x) != "torch":
        return None
    from . import _torch

    return _torch.memory_key(x)


def address(x: Array) -> tuple[str, int] | None:
    """Device and address of the first element; None for an empty array and where tensors have no address."""
    if 0 in x.shape:
        return None
    if isinstance(x, np.ndarray):
        return "numpy", x.ctypes.data
    from . import _torch

    return _torch.memory_of(x)


def copied(x: Array) -> Array:
    """x in memory of its own."""
    return x.copy() if isinstance(x, np.ndarray) else x.clone()


def host_int(value: Array, what: str) -> int:
    """A counter as a Python int. Inside ``torch.func`` transforms and ``torch.compile`` it cannot be read: RuleError."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    if not is_concrete(value):
        msg = (
            f"{what} decides from a step counter on the host, which cannot be read inside torch.func.vmap or torch.compile; "
            f"call update outside the transform, or use a rule without {what}"
        )
        raise RuleError(msg)
    return int(value)


def read_int(value: Array, what: str) -> int:
    """A number as a Python int, at the cost of a synchronisation. Inside transforms and traces it cannot be: RuleError."""
    if not can_read(value):
        msg = (
            f"{what} decides on the host whether to step, from the values of the gradients, which cannot be read inside "
            f"torch.func transforms or torch.compile; call update outside of them, or use a rule without {what}"
        )
        raise RuleError(msg)
    return int(value)


# --- matrices ------------------------------------------------------------------------------------------------------------


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
    """The Frobenius norm of each matrix, of shape (..., 1, 1), in float64; no finite matrix over- or underflows."""
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


def concatenate(arrays: list[Array], axis: int) -> Array:
    """Arrays joined along an axis."""
    return (
        np.concatenate(arrays, axis=axis) if isinstance(arrays[0], np.ndarray) else sys.modules["torch"].cat(arrays, dim=axis)
    )


def sum_over(x: Array, axis: int | None) -> Array:
    """The sum over one axis, kept as length 1, or over all (0-d)."""
    if axis is None:
        return x.sum()
    return x.sum(axis=axis, keepdims=True) if isinstance(x, np.ndarray) else x.sum(dim=axis, keepdim=True)


def zeros(like: Array, shape: tuple[int, ...], *, real: bool = False) -> Array:
    """Zeros of another shape, of the dtype (with ``real``, its real dtype) and on the device of an array."""
    if real and is_complex(like):
        like = like.real
    return np.zeros(shape, dtype=like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def zero_norm(like: Array) -> Array:
    """A 0-d float64 zero beside an array, for a state that is a norm."""
    if isinstance(like, np.ndarray):
        return np.zeros(())
    return like.new_zeros((), dtype=sys.modules["torch"].float64)


def element_count(x: Array) -> int:
    """Number of elements."""
    return math.prod(x.shape)


# --- random numbers --------------------------------------------------------------------------------------------------------

# SplitMix64 (Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195) as a counter-based stream: the i-th number
# is a mixture of key + i * gamma, so that it can be computed anywhere, in any order, from array arithmetic alone.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shifted(z: Array, bits: int) -> Array:
    """z >> bits without the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: Array) -> Array:
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def random_bits(key: Any, counter: Any, count: int, like: Array) -> Array:
    """So many random 64-bit numbers as an int64 vector, a pure function of (key, counter): the same on every device.

    Args:
        key: 64-bit ints, or 0-d int64 arrays. The result lies on the device of ``like``.
        counter: 64-bit ints, or 0-d int64 arrays. The result lies on the device of ``like``.

    """
    if isinstance(like, np.ndarray):
        index = np.arange(count, dtype=np.int64)
        seed, step = np.full((1,), key, np.int64), np.full((1,), counter, np.int64)
    else:
        torch = sys.modules["torch"]
        index = torch.arange(count, dtype=torch.int64, device=like.device)
        seed, step = (torch.as_tensor(v, dtype=torch.int64, device=like.device).reshape(1) for v in (key, counter))
    with np.errstate(over="ignore"):
        start = _mixed(seed ^ _mixed((step + 1) * _GAMMA))
        return _mixed(start + index * _GAMMA)


def normal(key: Any, counter: Any, shape: tuple[int, ...], like: Array) -> Array:
    """Independent standard normal float64 numbers, a pure function of (key, counter) as `random_bits`."""
    count = math.prod(shape)
    xp: Any = namespace(like)
    bits = random_bits(key, counter, (count + 1) // 2, like)
    # One 64-bit number makes two uniform ones, and by Box and Muller's method two normal ones.
    high, low = (cast_to(part, "float64") for part in (_shifted(bits, 32), bits & 0xFFFFFFFF))
    radius = xp.sqrt(-2 * xp.log((high + 0.5) / 2.0**32))
    angle = low * (2 * math.pi / 2.0**32)
    both = concatenate([radius * xp.cos(angle), radius * xp.sin(angle)], axis=0)
    return both[:count].reshape(shape)


def rounded_at_random(x: Array, key: Any, counter: Any) -> Array:
    """A float32 tensor rounded to one of the two nearest bfloat16 numbers at random, the mean being x; still float32.

    The random numbers are a pure function of (key, counter) and an element's place. Infinity and NaN are kept. The
    derivative is that of x.
    """
    torch = sys.modules["torch"]
    count = math.prod(x.shape)
    noise = random_bits(key, counter, (count + 3) // 4, x).view(torch.int16)[:count].reshape(x.shape)
    start = x.detach()
    # bfloat16 is the upper half of float32: a number below 2**16 added to the lower half carries with its probability.
    rounded = ((start.view(torch.int32) + 0x8000 + noise) & -0x10000).view(torch.float32)
    finite = start - start == 0
    if is_concrete(x):
        return torch.where(finite, rounded, x)
    return x + torch.where(finite, rounded - start, 0)
