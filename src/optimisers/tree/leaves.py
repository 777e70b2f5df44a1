"""Finding the trainable arrays of a model: what is one, what hides one, and where each stands."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, MappingView, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..arrays import dtype_name, is_inexact, is_number, kind, plain, torch_if_loaded
from ..errors import ModelError
from .param import Param
from .paths import shown
from .sharding import Sharding, refuse_permuted, sharding_of
from .structure import ModuleStructure, Structure, is_module, named_parameters, structure_of
from .ties import tied_groups

_PLAIN = (
    str, bytes, bool, int, float, complex, np.generic, np.dtype, type, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, np.ufunc, type(None),
)  # fmt: skip


class Place(NamedTuple):
    """One place of an array in a model: the number of the leaf, and the axis permutation that gives it there."""

    leaf: int
    permutation: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Slot:
    """One distinct trainable array: its description, and all its places (the first one is the array itself)."""

    param: Param
    places: tuple[Place, ...]
    kind: str
    """``"numpy"`` or ``"torch"``."""
    dtype: str
    sharding: Sharding | None = None
    """How a DTensor lies on the ranks of its mesh."""

    @property
    def path(self) -> str:
        return self.param.path

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Slot):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return self.param.path, self.param.shape, self.places, self.kind, self.dtype, self.param.tied_paths, self.sharding


class Found(NamedTuple):
    """The trainable arrays of a model, in order of first appearance."""

    structure: Structure
    leaves: list[Any]
    slots: tuple[Slot, ...]
    params: tuple[tuple[Param, ...], ...]
    """For each slot its description at each of its places, arrays and owners included (the first is the slot's)."""
    left_out: frozenset[int]
    """The leaves that could be trained, and that ``trainable=`` left out."""


def find(model: Any, trainable: Callable[[Param], bool] | None = None) -> Found:
    """The trainable arrays of a model.

    Raises ModelError for arrays that would be passed over silently (in unregistered classes, of foreign libraries, in
    generators), for parameters without a shape, for colliding paths and if nothing is trainable; TieError for memory that
    overlaps otherwise than by a tie.
    """
    structure, leaves, owners = structure_of(model)
    paths = structure.paths
    for leaf, path in zip(leaves, paths, strict=True):
        refuse_hidden_arrays(leaf, path)
    wanted = [i for i, leaf in enumerate(leaves) if is_trainable(leaf)]
    torch = torch_if_loaded()
    if torch is not None and any(isinstance(leaf, torch.nn.Parameter) for leaf in leaves):
        wanted = [i for i in wanted if kind(leaves[i]) != "torch" or leaves[i].requires_grad]
    aliases: dict[str, list[tuple[str, Any]]] = {}
    if isinstance(structure, ModuleStructure):
        owner_of = {name: owner for name, _, owner in named_parameters(model)} if structure.aliases else {}
        for alias, name in structure.aliases:
            aliases.setdefault(name, []).append((alias, owner_of[alias]))
    for i in wanted:
        _refuse_shapeless(leaves[i], paths[i])
    slots, params = [], []
    left_out: set[int] = set()
    for group in tied_groups([leaves[i] for i in wanted], [paths[i] for i in wanted]):
        places = tuple(Place(wanted[i], permutation) for i, permutation in group)
        here = _descriptions(places, leaves, paths, structure, owners, aliases)
        if trainable is not None and not trainable(here[0]):
            left_out.update(place.leaf for place in places)
            continue
        first = leaves[places[0].leaf]
        at = here[0]
        param = Param(at.path, at.keys, at.shape, at.dtype, at.owner, at.tied_paths)
        sharding = sharding_of(first, at.path)
        if sharding is not None and any(place.permutation is not None for place in places):
            refuse_permuted([paths[place.leaf] for place in places])
        slots.append(Slot(param, places, str(kind(first)), dtype_name(first), sharding))
        params.append(here)
    if not slots:
        raise ModelError(_nothing_to_train(leaves, paths, narrowed=trainable is not None))
    return Found(structure, leaves, tuple(slots), tuple(params), frozenset(left_out))


def _descriptions(
    places: Sequence[Place],
    leaves: list[Any],
    paths: Sequence[str],
    structure: Structure,
    owners: list[Any],
    aliases: dict[str, list[tuple[str, Any]]],
) -> tuple[Param, ...]:
    """The array as seen from each of its places and aliases."""
    keys = structure.keys
    seen = []
    for place in places:
        i = place.leaf
        seen.append((paths[i], keys[i], leaves[i], owners[i]))
        seen += [(name, tuple(name.split(".")), leaves[i], owner) for name, owner in aliases.get(paths[i], ())]
    names = [path for path, *_ in seen]
    result = []
    for path, key, array, owner in seen:
        others = tuple(name for name in names if name != path)
        shape = tuple(int(n) for n in array.shape)
        owner_type = None if owner is None else type(owner)
        result.append(Param(path, key, shape, array.dtype, owner_type, others, array, owner, True))
    return tuple(result)


def is_trainable(leaf: Any) -> bool:
    """Whether the leaf is a real or complex floating point array (0-d arrays count, scalars do not)."""
    return kind(leaf) is not None and is_inexact(leaf)


def refuse_hidden_arrays(leaf: Any, path: str) -> None:
    """Raise ModelError for a leaf whose arrays training would silently pass over."""
    if kind(leaf) == "numpy" and dtype_name(leaf) == "bfloat16":
        msg = f"the array at {shown(path)} is a NumPy array of bfloat16, which NumPy cannot compute in; use a torch tensor"
        raise ModelError(msg)
    if kind(leaf) is not None or isinstance(leaf, _PLAIN):
        return
    if isinstance(leaf, (Iterator, MappingView)):
        msg = (
            f"the model holds a {type(leaf).__name__} at {shown(path)}, whose arrays can be seen only by going through it. "
            "Give a torch.nn.Module itself in the place of its parameters(), or make a list or a dict of them"
        )
        raise ModelError(msg)
    if is_module(leaf):
        msg = (
            f"the model holds a torch.nn.Module at {shown(path)}; give setup the module itself, or put "
            "dict(module.named_parameters()) in its place"
        )
        raise ModelError(msg)
    if hasattr(leaf, "__array__") and hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        msg = (
            f"the array at {shown(path)} is a {type(leaf).__module__}.{type(leaf).__name__}; this library trains NumPy "
            "arrays and torch tensors. Convert it, for example with numpy.asarray"
        )
        raise ModelError(msg)
    hidden = _arrays_inside(leaf, depth=3)
    if hidden:
        msg = (
            f"the object at {shown(path)} is of the class {type(leaf).__name__}, which is not registered as a tree, but holds "
            f"arrays ({', '.join(hidden[:4])}) that would not be trained. Register the class, for example with "
            "optree.dataclasses.dataclass or optree.register_pytree_node_class, or put the arrays into a dict"
        )
        raise ModelError(msg)


def refuse_unsteppable(x: Any, path: str) -> None:
    """Raise ModelError for an array that no rule can step. A model may hold it as long as it is not to be trained."""
    what = _unsteppable(x) if kind(x) == "torch" else None
    if plain(x) is None:
        what = "a MaskedArray with masked elements, which are no numbers; fill them"
    if what is not None:
        msg = (
            f"the array at {shown(path)} is {what}. If it is not to be trained, say so: requires_grad_(False), trainable=, or "
            "a rule of None"
        )
        raise ModelError(msg)


def refuse_inference(x: Any, path: str) -> None:
    """Raise ModelError for a tensor made under ``torch.inference_mode``, to which torch lets nobody write outside of it."""
    torch = torch_if_loaded()
    if torch is None or kind(x) != "torch" or not x.is_inference() or torch.is_inference_mode_enabled():
        return
    msg = (
        f"the array at {shown(path)} is an inference tensor, which cannot be written to outside of torch.inference_mode; put a "
        "clone() in its place"
    )
    raise ModelError(msg)


def _unsteppable(x: Any) -> str | None:
    """What makes it impossible to step a tensor, and what to do about it."""
    if str(x.layout) != "torch.strided":
        return f"a {x.layout} tensor; only strided (dense) tensors can be trained"
    if dtype_name(x).startswith(("float8", "float4", "complex32")):
        return f"{dtype_name(x)}, in which no rule computes; train a copy in bfloat16 or wider and cast it for the forward pass"
    return None


def _refuse_shapeless(x: Any, path: str) -> None:
    """Raise ModelError for a tensor that has no shape, or none yet."""
    torch = torch_if_loaded()
    if torch is None or kind(x) != "torch":
        return
    if torch.nn.parameter.is_lazy(x):
        msg = (
            f"the parameter at {shown(path)} belongs to a lazy layer and has no shape yet; run the model once, on any batch, "
            "and then set up"
        )
        raise ModelError(msg)
    if x.is_nested:
        msg = f"the array at {shown(path)} is a nested tensor, which no rule steps; keep it out of the model"
        raise ModelError(msg)


def _arrays_inside(value: Any, depth: int, name: str = "") -> list[str]:
    if kind(value) is not None:
        return [name]
    if depth == 0 or isinstance(value, _PLAIN):
        return []
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple, set)):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        slots = [s for c in type(value).__mro__ for s in getattr(c, "__slots__", ()) if isinstance(s, str)]
        items = [(s, getattr(value, s)) for s in slots if hasattr(value, s)] + list(getattr(value, "__dict__", {}).items())
    return [found for key, item in items for found in _arrays_inside(item, depth - 1, f"{name}.{key}" if name else str(key))]


def _nothing_to_train(leaves: list[Any], paths: Sequence[str], *, narrowed: bool) -> str:
    if narrowed:
        return "the model has no trainable array left: trainable= is false for all of them"
    seen = []
    for leaf, path in list(zip(leaves, paths, strict=True))[:8]:
        if kind(leaf):
            frozen = dtype_name(leaf) and is_trainable(leaf)
            seen.append(f"{shown(path)}: {dtype_name(leaf)} array" + (" without requires_grad" if frozen else ""))
        else:
            seen.append(f"{shown(path)}: {'Python or NumPy scalar' if is_number(leaf) else type(leaf).__name__}")
    return (
        "the model has no trainable array, that is no real or complex floating point NumPy array or torch tensor (and, with "
        f"torch Parameters, with requires_grad). Its leaves: {'; '.join(seen) or 'none'}"
    )
