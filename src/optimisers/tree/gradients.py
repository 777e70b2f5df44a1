"""The gradient of each slot: checked against its parameter, absent ones skipped, those of tied places added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import cast_to, dtype_name, is_complex, is_inexact, kind, working_dtype
from ..errors import GradientError, StructureError, described
from .destructure import permuted, unpermuted
from .leaves import Slot
from .paths import shown


def gradient_of(slot: Slot, x: Any, grads: Sequence[Any], paths: Sequence[str]) -> Any:
    """The gradient of a slot from the gradients of all leaves, or None if it has none at any of its places.

    One object at several places counts once.
    """
    total: Any = None
    seen: list[Any] = []
    for place in slot.places:
        dx = grads[place.leaf]
        if dx is None or any(dx is other for other in seen):
            continue
        seen.append(dx)
        if isinstance(dx, np.generic) and isinstance(x, np.ndarray) and x.ndim == 0:
            dx = np.asarray(dx)  # a 0-d gradient, as NumPy's own arithmetic makes it
        check_gradient(dx, permuted(x, place.permutation), paths[place.leaf])
        dx = unpermuted(dx, place.permutation)
        if total is None:
            total = dx
        else:
            wide = working_dtype(dtype_name(x))
            total = cast_to(total, wide) + cast_to(dx, wide)
    return total


def check_gradient(dx: Any, x: Any, path: str) -> None:
    """Raise GradientError unless dx can be a gradient of x."""
    at, dtype = f"gradient at {shown(path)}", dtype_name(x)
    shape = tuple(x.shape)
    expected = f"expected a {_library(x)} of shape {shape} and floating dtype"
    found = kind(dx)
    if found is None:
        if isinstance(dx, (dict, list, tuple)):
            single = isinstance(dx, (list, tuple)) and len(dx) == 1
            remedy = "; put an array here, or None" + (
                "; torch.autograd.grad gives a tuple, take its item [0]" if single else ""
            )
            raise StructureError(f"{at}: {expected}, got {described(dx)}{remedy}")
        what = f"a {type(dx).__module__}.{type(dx).__name__}" if hasattr(dx, "shape") else described(dx)
        raise GradientError(f"{at}: {expected}, got {what}. Convert it, or put None where there is no gradient")
    if found != kind(x):
        raise GradientError(f"{at}: {expected}, got a {_library(dx)}: parameter and gradient must come from one library")
    if found == "torch" and str(dx.layout) != "torch.strided":
        remedy = "call .to_dense() on it, or build the layer with sparse=False"
        raise GradientError(f"{at}: {expected}, got a tensor of layout {dx.layout}; {remedy}")
    if not is_inexact(dx):
        raise GradientError(f"{at}: {expected}, got dtype {dtype_name(dx)}; cast it to {dtype} if it is meant")
    if is_complex(dx) and not is_complex(x):
        raise GradientError(f"{at}: {expected}, got complex dtype {dtype_name(dx)} for a {dtype} parameter; take its real part")
    got = tuple(dx.shape)
    if got != shape:
        hint = "; it looks transposed" if len(got) > 1 and got == shape[::-1] else ""
        raise GradientError(f"{at}: expected shape {shape}, got {got}{hint}. Gradients are never broadcast")
    if found == "torch" and dx.device != x.device:
        raise GradientError(f"{at}: expected a tensor on {x.device}, as the parameter is, got one on {dx.device}")


def _library(x: Any) -> str:
    return "NumPy array" if kind(x) == "numpy" else "torch tensor"
