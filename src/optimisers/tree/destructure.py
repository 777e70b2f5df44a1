"""A model as one flat vector, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import kind, plain, torch_if_loaded
from ..errors import ArgumentError, ModelError, described
from .leaves import Found, Slot, find, refuse_unsteppable
from .sharding import is_sharded


def destructure(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """All trainable arrays of a model as one vector, and the function that makes a model of such a vector.

    ``flat`` is 1-d, row-major, in the order of `trainables`, of the dtype to which all of them promote; a tied
    array appears once. ``rebuild(flat)`` gives a model of the same structure with every array in its own shape and dtype,
    in memory of its own, ties kept and everything else as it was; for a ``torch.nn.Module``, a dict of named parameters
    as ``torch.func.functional_call`` takes it. Both directions are differentiable over torch.

    Raises ModelError for a model of NumPy and torch arrays mixed or on several devices; ``rebuild`` raises ArgumentError
    for a vector of the wrong kind, shape or size.
    """
    found = _found(model)
    arrays = [plain(found.leaves[slot.places[0].leaf]) for slot in found.slots]
    kinds = {slot.kind for slot in found.slots}
    if any(map(is_sharded, arrays)):
        msg = (
            "destructure needs whole arrays, and this model has DTensors, of which each rank holds a part; give it "
            "{name: p.full_tensor() for name, p in ...} for a vector of everything, or to_local() for one of this rank's parts"
        )
        raise ModelError(msg)
    if len(kinds) > 1:
        msg = "destructure needs all arrays of one kind; this model has NumPy arrays and torch tensors: take them one by one"
        raise ModelError(msg)
    devices = {str(x.device) for x in arrays} if kinds == {"torch"} else set()
    if len(devices) > 1:
        msg = f"destructure needs all tensors on one device; this model is on {', '.join(sorted(devices))}"
        raise ModelError(msg)
    if kinds == {"numpy"}:
        dtype = np.result_type(*arrays)
        flat = np.concatenate([x.reshape(-1).astype(dtype) for x in arrays])
    else:
        torch: Any = torch_if_loaded()
        dtype = arrays[0].dtype
        for x in arrays:
            dtype = torch.promote_types(dtype, x.dtype)
        flat = torch.cat([x.reshape(-1).to(dtype) for x in arrays])
    # Only what is needed to rebuild is kept: holding the arrays too would keep the first model alive.
    trained = {place.leaf for slot in found.slots for place in slot.places}
    rest = [None if i in trained else leaf for i, leaf in enumerate(found.leaves)]
    skeleton = found.structure.unflatten(model, rest) if not found.structure.is_module else {}

    def rebuild(flat: Any) -> Any:
        return _rebuilt(flat, found.structure, found.slots, rest, skeleton)

    return flat, rebuild


def _found(model: Any) -> Found:
    """The arrays of a model, all of which can be stepped."""
    found = find(model)
    for slot in found.slots:
        refuse_unsteppable(found.leaves[slot.places[0].leaf], slot.path)
    return found


def _rebuilt(flat: Any, structure: Any, slots: tuple[Slot, ...], rest: list[Any], skeleton: Any) -> Any:
    size = sum(slot.param.size for slot in slots)
    want = slots[0].kind
    if kind(flat) != want:
        msg = f"rebuild: expected a {want} vector of {size} elements, got {described(flat)}"
        raise ArgumentError(msg)
    if flat.ndim != 1 or flat.shape[0] != size:
        msg = f"rebuild: expected a vector of {size} elements, got shape {tuple(flat.shape)}"
        raise ArgumentError(msg)
    leaves = list(rest)
    offset = 0
    for slot in slots:
        count = math.prod(slot.param.shape)
        piece = flat[offset : offset + count].reshape(slot.param.shape)
        offset += count
        if want == "numpy":
            piece = piece.real if piece.dtype.kind == "c" and np.dtype(slot.dtype).kind != "c" else piece
            piece = piece.astype(slot.param.dtype)
        else:
            torch: Any = torch_if_loaded()
            piece = piece.real if piece.is_complex() and not slot.param.dtype.is_complex else piece
            piece = piece.to(getattr(torch, slot.dtype), copy=True)
        for place in slot.places:
            leaves[place.leaf] = permuted(piece, place.permutation)
    if structure.is_module:
        return {path: leaf for path, leaf in zip(structure.paths, leaves, strict=True) if leaf is not None}
    return structure.unflatten(skeleton, leaves)


def permuted(x: Any, permutation: tuple[int, ...] | None) -> Any:
    """The array with its axes in this order (a view)."""
    if permutation is None:
        return x
    return x.transpose(permutation) if kind(x) == "numpy" else x.permute(permutation)


def unpermuted(x: Any, permutation: tuple[int, ...] | None) -> Any:
    """The inverse of `permuted`."""
    if permutation is None:
        return x
    inverse = tuple(permutation.index(axis) for axis in range(len(permutation)))
    return permuted(x, inverse)


def trainables(model: Any, *, path: bool = False) -> list[Any]:
    """The trainable arrays of a model, each tied one once; with ``path``, pairs of path and array.

    Trainable are real and complex floating point arrays; for torch also ``requires_grad`` if the model holds Parameters.
    Raises ModelError if there are none, or if arrays are hidden where they would not be trained.
    """
    found = _found(model)
    pairs = [(slot.path, found.leaves[slot.places[0].leaf]) for slot in found.slots]
    return pairs if path else [array for _, array in pairs]
