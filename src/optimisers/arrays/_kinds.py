"""What an array is: of which library, of which dtype, and in which dtype it is computed with."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, TypeAlias
from typing import cast as typed

import numpy as np

from ..errors import HyperParameterError
from ._traced import FLOATS, HALF, HOST, Traced, cast

if TYPE_CHECKING:
    from types import ModuleType


Array: TypeAlias = Any
"""A NumPy array or a torch tensor (or, for scalars, a Python number)."""

_COMPLEX_OF = {"float16": "complex64", "bfloat16": "complex64", "float32": "complex64", "float64": "complex128"}
_REAL_OF = {"complex64": "float32", "complex128": "float64", "complex32": "float16"}
_HOST_DTYPES = frozenset({HOST, "int", "bool"})
_NAMES: dict[Any, str] = {}  # dtype -> name; making the string anew costs more than a small step


def torch_if_loaded() -> ModuleType | None:
    """The torch module if the program has imported it, else None."""
    return sys.modules.get("torch")


_torch_part: Any = None


def torch_part() -> Any:
    """The module with what only concerns torch tensors, which is not to be imported before torch is."""
    global _torch_part  # noqa: PLW0603
    if _torch_part is None:  # an import inside a function takes a microsecond each time
        from . import _torch

        _torch_part = _torch
    return _torch_part


def kind(x: object) -> str | None:
    """``"numpy"``, ``"torch"`` or ``"traced"`` for an array, None for anything else (NumPy scalars included)."""
    if isinstance(x, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    return "traced" if isinstance(x, Traced) and x.dtype not in _HOST_DTYPES else None


def plain(x: Array) -> Any:
    """An array as one of its library's own class, in the same memory; None for masked elements, which are no numbers.

    Other classes give arithmetic a meaning of their own, as ``numpy.matrix`` does to a product, or results their class.
    Tensors that only wrap others stay what they are.
    """
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ma.MaskedArray):
        return None if np.ma.is_masked(x) else np.asarray(x)
    if isinstance(x, np.ndarray):
        return x.view(np.ndarray)
    if kind(x) != "torch":
        return x
    from . import _torch

    return _torch.plain(x)


def is_number(x: object) -> bool:
    """Whether x is a Python or NumPy scalar (not a 0-d array)."""
    if isinstance(x, Traced):
        return x.dtype in _HOST_DTYPES
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
        name = repr(dtype)
        # NumPy 2.0 asks whatever comes for its attribute dtype, and only warns where that is none.
        if isinstance(dtype, np.dtype | type):
            with contextlib.suppress(TypeError):
                name = np.dtype(typed("Any", dtype)).name
    if name not in FLOATS:
        msg = f"{name!r} is not one of {', '.join(sorted(FLOATS))}"
        raise ValueError(msg)
    return name


def is_inexact(x: Array) -> bool:
    """Whether x holds real or complex floating point numbers."""
    if isinstance(x, (np.ndarray, np.generic)):
        return x.dtype.kind in "fc"
    if isinstance(x, Traced):
        return x.dtype in FLOATS
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
    if isinstance(x, Traced):
        return cast(x, name)
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


def element_count(x: Array) -> int:
    """Number of elements, also of an array that is traced."""
    return x.size if isinstance(x, np.ndarray) else x.numel()
