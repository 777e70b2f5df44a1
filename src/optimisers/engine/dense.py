"""Where arrays lie: addresses, strides, and whether a loop may run over them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from ..arrays import torch_if_loaded
from .program import COMPILED

Vector = np.ndarray[Any, Any]

_address = attrgetter("__array_interface__")
SHAPE, DTYPE, STRIDES = attrgetter("shape"), attrgetter("dtype"), attrgetter("strides")
IS_CPU, ALIGNED = attrgetter("is_cpu"), attrgetter("flags.aligned")


def addresses_of(arrays: Sequence[Any]) -> Vector:
    """The addresses of the first elements of arrays of one library."""
    if arrays and isinstance(arrays[0], np.ndarray):
        return np.fromiter((a["data"][0] for a in map(_address, arrays)), np.uint64, len(arrays))
    torch: Any = torch_if_loaded()
    return np.fromiter(map(torch.Tensor.data_ptr, arrays), np.uint64, len(arrays))


def element_strides(x: Any) -> tuple[int, ...]:
    """The strides of an array in elements."""
    return tuple(s // x.itemsize for s in x.strides) if isinstance(x, np.ndarray) else tuple(x.stride())


def is_loopable(x: Any) -> bool:
    """Whether x lies in the host's memory without gaps or lazy operations, and is of no class of its own."""
    if type(x) is np.ndarray:
        if not (x.flags.aligned and x.dtype.isnative):
            return False
    else:
        torch = torch_if_loaded()
        if torch is None or type(x) not in {torch.Tensor, torch.nn.Parameter} or x.layout is not torch.strided:
            return False
        if not x.is_cpu or x.is_neg() or x.is_conj():
            return False
    return is_dense(tuple(x.shape), element_strides(x))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return 0 not in shape


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements of a dense array lie in the order of the last axis first."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_compiled_dtype(dtypes: set[Any]) -> bool:
    """Whether it is one dtype, and loops are made for it."""
    return (
        len(dtypes) == 1
        and str(next(iter(dtypes))).removeprefix("torch.") in COMPILED
        and all(getattr(dtype, "isnative", True) for dtype in dtypes)
    )
