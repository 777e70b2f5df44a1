"""What a rule remembers of one array, as plain data that names tensors, and back.

Nothing is null; a tuple, list or dict is ``{"tuple": [...]}``, ``{"list": [...]}``, ``{"dict": [[key, value], ...]}``; an array
is ``{"array": name, "dtype": ..., ...}`` and a counter ``{"int": name}`` or ``{"float": name}``, a 0-d tensor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..arrays import can_read, dtype_name, is_number, kind
from ..errors import CheckpointError
from ..tree.paths import path_of, shown
from ..tree.sharding import Sharding, is_sharded
from ._tensor_file import restored, stored

INT64 = range(-(2**63), 2**63)


class Misfit(Exception):  # noqa: N818 (never leaves this package)
    """Why a stored state does not fit."""


def described(state: Any, keep: Callable[[tuple[Any, ...], Any], str], path: str, at: tuple[Any, ...] = ()) -> Any:
    """A state as plain data; ``keep(position, array)`` stores an array and returns its name."""
    if state is None:
        return None
    if isinstance(state, dict):
        for key in state:
            if not (isinstance(key, str) or type(key) is int):
                msg = (
                    f"save: the state of {shown(path)} has a dict with the key {key!r}; a file holds strings and whole numbers"
                )
                raise CheckpointError(msg)
        return {"dict": [[key, described(value, keep, path, (*at, key))] for key, value in state.items()]}
    if isinstance(state, (tuple, list)):
        items = [described(item, keep, path, (*at, i)) for i, item in enumerate(state)]
        return {"list" if isinstance(state, list) else "tuple": items}
    where = f"the state of {shown(path)} at {path_of(at) or 'its root'}"
    if is_number(state) and not isinstance(state, np.generic):
        return _number(state, where, lambda x: keep(at, x))
    if kind(state) and not can_read(state):
        why = (
            "it is on the meta device"
            if _device(state).type == "meta"
            else "save outside of torch.func transforms and torch.compile"
        )
        raise CheckpointError(f"save: {where} has no value to be stored; {why}")
    x, known = stored(state, where)
    return {"array": keep(at, x), **known}


def _number(value: Any, where: str, keep: Callable[[Any], str]) -> dict[str, str]:
    if isinstance(value, int) and value in INT64:
        return {"int": keep(np.asarray(value, np.int64))}
    if isinstance(value, float):
        return {"float": keep(np.asarray(value, np.float64))}
    msg = f"save: {where} is the number {value!r}; a file holds whole numbers of 64 bits and floats"
    raise CheckpointError(msg)


class Reader:
    """Puts stored states together, and sees to it that they fit.

    Attributes:
        tensors: by name, as read from the file.
        array_kind: of the arrays to make, where what is expected does not say.
        device: of the arrays to make, where what is expected does not say.
        same_dtypes: whether moments must have the expected dtypes (else any of the same kind of number).

    """

    def __init__(self, tensors: Mapping[str, Any], array_kind: str, device: Any, *, same_dtypes: bool) -> None:
        self.tensors, self.array_kind, self.device, self.same_dtypes = tensors, array_kind, device, same_dtypes

    def build(self, data: Any, expected: Any, *, fixed: bool, at: tuple[Any, ...] = ()) -> Any:
        """The state that ``data`` describes; with ``fixed`` it must have the nesting and shapes of ``expected``.

        Raises Misfit. A named tuple is recognised by what is expected in its place.
        """
        if data is None:
            if fixed and expected is not None:
                raise Misfit(f"{_at(at)} is missing from the file")
            return None
        if not (isinstance(data, dict) and data):
            raise Misfit(f"{_at(at)} is described by {str(data)[:40]!r}, which means nothing")
        word = next(iter(data))
        if word in {"tuple", "list", "dict"} and isinstance(data[word], list):
            return self._container(word, data[word], expected, fixed=fixed, at=at)
        if word in {"int", "float"}:
            return self._number(word, data[word], expected, fixed=fixed, at=at)
        if word == "array":
            return self._array(data, expected, fixed=fixed, at=at)
        raise Misfit(f"{_at(at)} is described as {word!r}, which means nothing")

    def _container(self, word: str, items: list[Any], expected: Any, *, fixed: bool, at: tuple[Any, ...]) -> Any:
        if word == "dict":
            if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int)) for pair in items):
                raise Misfit(f"{_at(at)} is described as a dict, but its keys are not")
            given = dict(items)
            like = expected if isinstance(expected, dict) else {}
            if fixed and like.keys() != given.keys():
                raise Misfit(f"{_at(at)} has the keys {list(given)} in the file, {list(like)} here")
            return {key: self.build(value, like.get(key), fixed=fixed, at=(*at, key)) for key, value in given.items()}
        of = {"tuple": tuple, "list": list}[word]
        alike = isinstance(expected, of) and len(expected) == len(items)
        if fixed and not alike:
            here = f"a {type(expected).__name__} of {len(expected)}" if isinstance(expected, (tuple, list)) else _name(expected)
            raise Misfit(f"{_at(at)} is a {word} of {len(items)} in the file, {here} here")
        likes = expected if alike else [None] * len(items)
        built = [self.build(v, like, fixed=fixed, at=(*at, i)) for i, (v, like) in enumerate(zip(items, likes, strict=True))]
        return type(expected)(*built) if alike and hasattr(expected, "_fields") else of(built)

    def _number(self, word: str, name: Any, expected: Any, *, fixed: bool, at: tuple[Any, ...]) -> Any:
        x = self._tensor(name, at)
        if tuple(x.shape) or dtype_name(x) != {"int": "int64", "float": "float64"}[word]:
            raise Misfit(f"{_at(at)} is described as a number, and stored as {_name(x)}")
        if fixed and not (is_number(expected) or (kind(expected) and expected.ndim == 0)):
            raise Misfit(f"{_at(at)} is a number in the file, {_name(expected)} here")
        return x.item()

    def _array(self, data: Mapping[str, Any], expected: Any, *, fixed: bool, at: tuple[Any, ...]) -> Any:
        raw = self._tensor(data["array"], at)
        like = expected if kind(expected) else None
        array_kind, device = (self.array_kind, self.device) if like is None else (str(kind(like)), _device(like))
        try:
            x = restored(raw, data, array_kind, device)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise Misfit(f"{_at(at)}: {error}") from None
        if like is None and not fixed:
            return x
        if is_number(expected) and not tuple(x.shape):  # a counter that carried a graph
            return x
        if like is None:
            raise Misfit(f"{_at(at)} is {_name(x)} in the file, {_name(expected)} here")
        if is_sharded(like) and not is_sharded(x) and tuple(x.shape) == tuple(like.shape):
            sharding = Sharding(like)
            x = sharding.of_parts(sharding.part_of(x))
        if tuple(x.shape) != tuple(expected.shape):
            if not fixed:
                return x
            raise Misfit(f"{_at(at)} has shape {tuple(x.shape)} in the file, {tuple(expected.shape)} here")
        have, want = dtype_name(x), _plain_dtype(expected)
        if fixed and have != want and (self.same_dtypes or _family(have) != _family(want)):
            raise Misfit(f"{_at(at)} is {have} in the file, {want} here")
        return x

    def _tensor(self, name: Any, at: tuple[Any, ...]) -> Any:
        if not isinstance(name, str) or name not in self.tensors:
            raise Misfit(f"{_at(at)} is described, but its tensor {name!r} is not in the file")
        return self.tensors[name]


def _device(x: Any) -> Any:
    return x.device if kind(x) == "torch" else None


def _plain_dtype(x: Any) -> str:
    return dtype_name(x) if kind(x) == "torch" else str(x.dtype.newbyteorder("="))


def _family(dtype: str) -> str:
    return "float" if dtype in {"float16", "bfloat16", "float32", "float64"} else dtype.rstrip("0123456789")


def _at(at: tuple[Any, ...]) -> str:
    return f"its state at {path_of(at)}" if at else "its state"


def _name(x: Any) -> str:
    if kind(x):
        size = "x".join(map(str, x.shape)) if math.prod(x.shape) or x.ndim else "0"
        return f"an array of {dtype_name(x)} and shape {size or '()'}"
    return "nothing" if x is None else f"a {type(x).__name__}"
