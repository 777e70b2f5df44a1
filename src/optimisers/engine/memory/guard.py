"""Whether arrays are what they were when a group was made of them: asked before every step, of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from ...arrays import torch_if_loaded
from ..graph.program import COMPILED

_ATTEMPTS = 4  # how often torch's guards are made, which takes as long as ten steps without them
_DTYPE = attrgetter("dtype")
_OF_ARRAY, _OF_TENSOR = attrgetter("shape", "strides", "flags.aligned"), attrgetter("shape", "device")


class Guard:
    """The classes, dtypes, devices, shapes and strides of parameters, which their gradients share but for the dtype."""

    def __init__(self, xs: Sequence[Any], strides: list[tuple[int, ...]]) -> None:
        self._numpy = isinstance(xs[0], np.ndarray)
        self._described: tuple[list[Any], ...] = (
            (list(map(_OF_ARRAY, xs)),) if self._numpy else (list(map(_OF_TENSOR, xs)), strides)
        )
        self._dtype = xs[0].dtype
        self._count = len(xs)
        self._has_single = any((x.size if self._numpy else x.numel()) == 1 for x in xs)
        self._of_torch: Any = None
        self._attempts = 0

    def holds(self, xs: Sequence[Any], dxs: Sequence[Any]) -> bool:
        """Whether parameters and gradients, None where there is none, are as described."""
        known = self._of_torch
        if known is not None and len(dxs) == self._count and known[0](*xs) and known[1](*dxs):
            return True
        if not self._are_as_described(xs, dxs):
            return False
        if not self._numpy and self._attempts < _ATTEMPTS and not any(dx is None for dx in dxs):
            self._attempts += 1
            found = guard_of(xs), guard_of(dxs)
            self._of_torch = None if None in found else found
        return True

    def _are_as_described(self, xs: Sequence[Any], dxs: Sequence[Any]) -> bool:
        """The same, from attributes that are read one after another for all arrays at once."""
        present: Sequence[Any] = dxs
        described = self._described
        if type(None) in set(map(type, dxs)):
            chosen = [i for i, dx in enumerate(dxs) if dx is not None]
            present = [dxs[i] for i in chosen]
            described = tuple([part[i] for i in chosen] for part in described)
        try:
            return (
                self._are_alike(xs, self._described)
                and {self._dtype} == set(map(_DTYPE, xs))
                and self._are_alike(present, described)
                and (not present or _is_compiled(set(map(_DTYPE, present))))
                and (self._numpy or not any(x.is_inference() for x in xs))  # whether they may be written depends on the mode
            )
        except (AttributeError, RuntimeError, TypeError):  # something else than a dense array
            return False

    def _are_alike(self, arrays: Sequence[Any], described: tuple[list[Any], ...]) -> bool:
        kinds = set(map(type, arrays))
        if self._numpy:
            return kinds <= {np.ndarray} and list(map(_OF_ARRAY, arrays)) == described[0]
        torch: Any = torch_if_loaded()
        return (
            kinds <= {torch.Tensor, torch.nn.Parameter}
            and list(map(_OF_TENSOR, arrays)) == described[0]
            and list(map(torch.Tensor.stride, arrays)) == described[1]
            # A lazily negated tensor is half of a complex one, and has its strides, unless it has a single element.
            and not (self._has_single and any(map(torch.Tensor.is_neg, arrays)))
        )


def guard_of(tensors: Sequence[Any]) -> Any:
    """What tells whether other tensors have the classes, dtypes, devices, shapes, strides and flags of these; or None.

    It is what torch's own compiler asks before it runs what it has compiled: one call for all tensors. It refuses a tensor
    that is there twice. It is no public function; without it attributes are read one by one.
    """
    torch: Any = torch_if_loaded()
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    try:
        guard = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return guard.check if guard.check(*tensors) is True else None
    except (AttributeError, TypeError, RuntimeError, SystemError):
        return None


def _is_compiled(dtypes: set[Any]) -> bool:
    """Whether it is one dtype, and loops are made for it."""
    return (
        len(dtypes) == 1
        and str(next(iter(dtypes))).removeprefix("torch.") in COMPILED
        and all(getattr(dtype, "isnative", True) for dtype in dtypes)
    )
