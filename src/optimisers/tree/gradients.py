"""The gradient of each slot: checked against its parameter, absent ones skipped, those of tied places added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import cast_to, dtype_name, is_complex, is_inexact, is_number, kind, plain, torch_if_loaded, working_dtype
from ..errors import GradientError, StructureError, described
from .destructure import permuted, unpermuted
from .leaves import Slot, is_trainable
from .paths import shown
from .sealed import Plan
from .sharding import is_sharded
from .structure import ModuleStructure, Structure


class AtNames(NamedTuple):
    """The gradients that a module's parameter has at several of its names."""

    pairs: tuple[tuple[str, Any], ...]


def given_gradients(structure: Structure, model: Any, grads: Any) -> list[Any]:
    """For every leaf of the model its gradient, None where there is none, AtNames where there are several."""
    found = structure.align(model, grads)
    if grads is None or not isinstance(structure, ModuleStructure) or not structure.aliases:
        return found
    others: dict[str, list[tuple[str, Any]]] = {}
    for alias, name in structure.aliases:
        if grads.get(alias) is not None:
            others.setdefault(name, []).append((alias, grads[alias]))
    for i, path in enumerate(structure.paths):
        if any(dx is not found[i] for _, dx in others.get(path, ())):
            found[i] = AtNames(((path, found[i]), *others[path]))
    return found


def gradient_of(slot: Slot, x: Any, grads: Sequence[Any], paths: Sequence[str]) -> Any:
    """The gradient of a slot from the gradients of all leaves, or None if it has none at any of its places.

    One object at several places counts once.
    """
    total: Any = None
    seen: list[Any] = []
    for path, given, permutation in _at_places(slot, grads, paths):
        if given is None or any(given is other for other in seen):
            continue
        seen.append(given)
        scalar = isinstance(given, np.generic) and isinstance(x, np.ndarray) and x.ndim == 0
        dx = np.asarray(given) if scalar else given  # a 0-d gradient, as NumPy's own arithmetic makes it
        check_gradient(dx, permuted(x, permutation), path)
        dx = unpermuted(plain(dx), permutation)
        if total is None:
            total = dx
        else:
            wide = working_dtype(dtype_name(x))
            total = cast_to(total, wide) + cast_to(dx, wide)
    return total


def _at_places(slot: Slot, grads: Sequence[Any], paths: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    for leaf, permutation in slot.places:
        dx = grads[leaf]
        for path, each in dx.pairs if isinstance(dx, AtNames) else ((paths[leaf], dx),):
            yield path, each, permutation


def refuse_untrained(plan: Plan, leaves: Sequence[Any], grads: Sequence[Any]) -> None:
    """Raise GradientError for a gradient where the model has nothing that is trained, unless that was somebody's choice.

    Parameters without ``requires_grad`` and what ``trainable=`` left out are passed over, and so is the model's own leaf in the
    place of a gradient.
    """
    for i in plan.untrained:
        dx, leaf = grads[i], leaves[i]
        if dx is None or dx is leaf or not (kind(dx) or is_number(dx) or isinstance(dx, AtNames)):
            continue
        path = shown(plan.structure.paths[i])
        if not is_trainable(leaf) or _is_buffer(leaf):
            what = f"a {dtype_name(leaf)} array" if kind(leaf) else described(leaf)
            what += " without requires_grad" if is_trainable(leaf) else ""
            hint = "put None where there is nothing to train"
            raise GradientError(f"gradient at {path}: the model has {what} there, which is not trained; {hint}")
        if i not in plan.left_out and getattr(leaf, "requires_grad", True):
            hint = "opt.extend(state, model) takes it in, and None passes it over"
            raise GradientError(f"gradient at {path}: what is there was not trainable at setup, and is now; {hint}")


def _is_buffer(leaf: Any) -> bool:
    """Whether it is a tensor beside Parameters that is none itself."""
    torch = torch_if_loaded()
    return torch is not None and type(leaf) is torch.Tensor and not leaf.requires_grad


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
    if plain(dx) is None:
        raise GradientError(
            f"{at}: {expected}, got one with masked elements, which are no numbers; fill them, for example with 0"
        )
    if is_sharded(dx) and not is_sharded(x):
        remedy = "take its part or its whole, with to_local() or full_tensor(), or shard the model before setup"
        raise GradientError(f"{at}: {expected}, got a DTensor, and the parameter is none; {remedy}")
    if found == "torch" and _wraps(dx) and not _wraps(x):
        raise GradientError(f"{at}: {expected}, got a {type(dx).__name__}, which only wraps tensors; take the tensor out of it")
    got = tuple(dx.shape)
    if got != shape:
        hint = "; it looks transposed" if len(got) > 1 and got == shape[::-1] else ""
        raise GradientError(f"{at}: expected shape {shape}, got {got}{hint}. Gradients are never broadcast")
    if found == "torch" and dx.device != x.device:
        raise GradientError(f"{at}: expected a tensor on {x.device}, as the parameter is, got one on {dx.device}")


def _wraps(x: Any) -> bool:
    from ..arrays import _torch

    return _torch.is_wrapper(x) and _torch.is_ordinary()


def _library(x: Any) -> str:
    return "NumPy array" if kind(x) == "numpy" else "torch tensor"
