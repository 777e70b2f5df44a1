"""The description of a parameter that rule-picking functions, routes and ``where=`` see."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Param:
    """One distinct trainable array of a model, and where it stands.

    Attributes:
        path: where it stands, as a string such as ``"encoder.layers.0.attn.weight"``; the
            same for a module, a flat dict of its names and a nested dict.
        keys: the same as a tuple of dict keys, indices and attribute names.
        shape: of the array.
        dtype: of the array.
        array: the array itself (in ``setup`` only; a ``where=`` on a state has no arrays).
        module: the ``nn.Module`` or container that holds it, or None for a bare array (in ``setup`` only).
        owner: the type of that module or container, or None.
        tied_paths: the other places where the same array stands.

    """

    path: str
    keys: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: Any
    owner: type | None = None
    tied_paths: tuple[str, ...] = ()
    _array: Any = field(default=None, repr=False)
    _module: Any = field(default=None, repr=False)
    _live: bool = field(default=False, repr=False)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def array(self) -> Any:
        """The array itself; raises ArgumentError after setup, where only its description is kept."""
        return self._while_setting_up("array", self._array)

    @property
    def module(self) -> Any:
        """The module or container that holds the array, or None; raises ArgumentError after setup."""
        return self._while_setting_up("module", self._module)

    def _while_setting_up(self, name: str, value: Any) -> Any:
        if not self._live:
            msg = f"Param.{name} of {self.path!r} is known during setup only; a state keeps path, shape, dtype and owner"
            raise ArgumentError(msg)
        return value
