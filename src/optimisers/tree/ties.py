"""Which arrays of a model are one array: the same object, or the same memory with its axes permuted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..arrays import dtype_name, kind
from ..errors import TieError
from .paths import shown
from .sharding import local


class Layout(NamedTuple):
    """Where an array lies: the device, the address of its first element, and its strides in bytes."""

    device: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str

    def extent(self) -> tuple[int, int]:
        """First and last byte."""
        spans = [stride * (size - 1) for stride, size in zip(self.strides, self.shape, strict=True)]
        low = self.address + sum(span for span in spans if span < 0)
        return low, self.address + sum(span for span in spans if span > 0) + self.itemsize

    def key(self) -> tuple[Any, ...]:
        """The same for all axis permutations of one memory."""
        axes = sorted((s, n) for s, n in zip(self.strides, self.shape, strict=True) if n > 1)
        return self.device, self.address, self.dtype, len(self.shape), tuple(axes)


def layout_of(x: Any) -> Layout | None:
    """The layout of an array, or None where arrays have no address (inside transforms, on the meta device)."""
    x = local(x)
    shape = tuple(int(n) for n in x.shape)
    if kind(x) == "numpy":
        return Layout("numpy", x.__array_interface__["data"][0], shape, x.strides, x.itemsize, x.dtype.str)
    from ..arrays import _torch

    memory = _torch.memory_of(x)
    if memory is None:
        return None
    size = x.element_size()
    return Layout(*memory, shape, tuple(s * size for s in x.stride()), size, dtype_name(x))


def tied_groups(arrays: Sequence[Any], paths: Sequence[str]) -> list[list[tuple[int, tuple[int, ...] | None]]]:
    """The distinct arrays: for each the places where it stands, with the axis permutation that gives it there.

    The first place of a group is the array itself. None means no permutation. Raises TieError if arrays overlap in any
    other way, or if an array overlaps itself.
    """
    groups: list[list[tuple[int, tuple[int, ...] | None]]] = []
    by_id: dict[int, tuple[int, tuple[int, ...] | None]] = {}
    by_memory: dict[tuple[Any, ...], int] = {}
    layouts: list[Layout | None] = []
    for i, x in enumerate(arrays):
        if id(x) in by_id and 0 not in x.shape:
            group, permutation = by_id[id(x)]
            groups[group].append((i, permutation))
            continue
        layout = layout_of(x) if 0 not in local(x).shape else None
        group, permutation = len(groups), None
        if layout is not None:
            _refuse_self_overlap(layout, paths[i])
            group = by_memory.setdefault(layout.key(), len(groups))
        if group < len(groups):
            first = layouts[group]
            permutation = _permutation(first, layout)  # type: ignore[arg-type]
            groups[group].append((i, permutation))
        else:
            groups.append([(i, None)])
            layouts.append(layout)
        by_id[id(x)] = (group, permutation)
    _refuse_overlaps([(layout, paths[g[0][0]]) for layout, g in zip(layouts, groups, strict=True) if layout is not None])
    return groups


def still_tied(first: Any, other: Any, permutation: tuple[int, ...] | None = None) -> bool:
    """Whether the second array is the first one with its axes in this order; believed where arrays have no address."""
    if other is first and permutation is None:
        return True
    if kind(first) is None or kind(first) != kind(other) or len(first.shape) != len(other.shape):
        return False
    a, b = layout_of(first), layout_of(other)
    if a is None or b is None:
        return True
    axes = permutation or range(len(a.shape))
    sides = zip(b.shape, b.strides, axes, strict=True)
    fits = all(size == a.shape[j] and (size <= 1 or stride == a.strides[j]) for size, stride, j in sides)
    return fits and (a.device, a.address, a.dtype) == (b.device, b.address, b.dtype)


def refuse_cut(path: str, other: str) -> NoReturn:
    """Raise TieError for two places that setup saw tied, and that are not any more."""
    msg = (
        f"{shown(path)} and {shown(other)} were one array at setup and are two now, with one state and one gradient for both; "
        "opt.extend(state, model) makes a state for each"
    )
    raise TieError(msg)


def _permutation(first: Layout, other: Layout) -> tuple[int, ...] | None:
    """The axes of first in the order in which other has them, or None if that is no change."""
    free = list(range(len(first.shape)))
    axes = []
    for size, stride in zip(other.shape, other.strides, strict=True):
        match = next(j for j in free if first.shape[j] == size and (size == 1 or first.strides[j] == stride))
        free.remove(match)
        axes.append(match)
    return None if axes == sorted(axes) else tuple(axes)


def _refuse_self_overlap(layout: Layout, path: str) -> None:
    if any(stride == 0 and size > 1 for stride, size in zip(layout.strides, layout.shape, strict=True)):
        msg = f"the array at {shown(path)} repeats its own memory (a stride of 0, as broadcasting makes); give it a copy"
        raise TieError(msg)


def _refuse_overlaps(layouts: list[tuple[Layout, str]]) -> None:
    """Sweep over the memory: extents that meet are looked at exactly, since views may interleave without sharing."""
    ordered = sorted(((layout.device, *layout.extent()), layout, path) for layout, path in layouts)
    for n, ((device, _, end), layout, path) in enumerate(ordered):
        for (other_device, start, _), other, other_path in ordered[n + 1 :]:
            if other_device != device or start >= end:
                break
            if _share(layout, other):
                msg = (
                    f"the arrays at {shown(path)} and {shown(other_path)} overlap in memory, but neither is the "
                    "other with its axes permuted, so they cannot be stepped once; give one of them a copy, or train only "
                    "the whole"
                )
                raise TieError(msg)


class _Described:
    """Memory described to NumPy by its address only; it is never read."""

    def __init__(self, layout: Layout) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (layout.address, True),
            "shape": layout.shape,
            "strides": layout.strides,
            "typestr": f"|V{layout.itemsize}",
        }


def _share(a: Layout, b: Layout) -> bool:
    try:
        return np.shares_memory(np.asarray(_Described(a)), np.asarray(_Described(b)), max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
