"""Where arrays lie: addresses, strides, and whether a loop may run over them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from ...arrays import torch_if_loaded
from ..kernels.cuda.devices import device_of

Vector = np.ndarray[Any, Any]

_address = attrgetter("__array_interface__")


def places(arrays: Sequence[Any]) -> list[int]:
    """The addresses of the first elements of arrays of one library."""
    if arrays and isinstance(arrays[0], np.ndarray):
        return [a["data"][0] for a in map(_address, arrays)]
    torch: Any = torch_if_loaded()
    return list(map(torch.Tensor.data_ptr, arrays))


def addresses_of(arrays: Sequence[Any]) -> Vector:
    """The same as a vector."""
    return np.array(places(arrays), np.uint64)


def native_dtype(library: str, name: str) -> Any:
    """The dtype of that name."""
    return np.dtype(name) if library == "numpy" else getattr(torch_if_loaded(), name)


def element_strides(x: Any) -> tuple[int, ...]:
    """The strides of an array in elements."""
    return tuple(s // x.itemsize for s in x.strides) if isinstance(x, np.ndarray) else tuple(x.stride())


def is_loopable(x: Any) -> bool:
    """Whether x lies without gaps or lazy operations where loops or kernels run, and is of no class of its own."""
    if type(x) is np.ndarray:
        if not (x.flags.aligned and x.dtype.isnative):
            return False
    else:
        torch = torch_if_loaded()
        if torch is None or type(x) not in {torch.Tensor, torch.nn.Parameter} or x.layout is not torch.strided:
            return False
        if not (x.is_cpu or device_of(x)) or x.is_neg() or x.is_conj():
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


def lie_alike(shape: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    """Whether arrays of one shape with these strides have their elements in the same places."""
    return all(n <= 1 or a == b for n, a, b in zip(shape, strides, others, strict=True))


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements of a dense array lie in the order of the last axis first."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def laid_out_as(x: Any, dx: Any) -> Any:
    """dx in memory of its own, with the strides of x."""
    if isinstance(x, np.ndarray):
        new = np.empty_like(x, dtype=dx.dtype, subok=False)
        new[...] = dx
        return new
    torch: Any = torch_if_loaded()
    return torch.empty_strided(x.shape, x.stride(), dtype=dx.dtype, device=x.device).copy_(dx.detach())
