"""Where arrays lie in a packed one: all elements of many tensors in one tensor, so that a call of torch steps them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch

WIDTH = 256
"""Elements of a row, where each array begins a row of its own: a sum over an array is one of sums over its rows."""
_FAN = 64  # row sums that are added at a time

_NEUTRAL = {"sum": 0.0, "largest": float("-inf"), "smallest": float("inf")}
_ACROSS: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.sum, "largest": torch.amax, "smallest": torch.amin}


class Layout:
    """One array as it is: elements have its shape, numbers one entry."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def pack(self, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        """The arrays as one."""
        (array,) = arrays
        return array

    def unpack(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Views of the packed array, one for each array: of its shape, or flat in the order in which it lies in memory."""
        return [packed]

    def shape(self, own: Sequence[int]) -> Sequence[int]:
        """The shape of packed arrays; ``own`` is that of the first array."""
        return own

    def spread(self, numbers: torch.Tensor) -> torch.Tensor:
        """A number for each array as one that can be computed with elements."""
        return numbers.reshape(())

    def reduced(self, op: str, elements: torch.Tensor) -> torch.Tensor:
        """The sum of each array, or its largest or smallest element (``"largest"``, ``"smallest"``)."""
        return _ACROSS[op](elements).reshape(1)


class Line(Layout):
    """Arrays end to end, for rules that compute with elements and common numbers only."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__(len(sizes))
        self.sizes = sizes

    def pack(self, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([flat(array) for array in arrays])

    def unpack(self, packed: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.split(packed.contiguous(), list(self.sizes)))

    def shape(self, own: Sequence[int]) -> Sequence[int]:  # noqa: ARG002 (as above)
        return (sum(self.sizes),)


class Rows(Layout):
    """Arrays as rows, filled up with zeros, for rules with a number for each array."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__(len(sizes))
        lengths = np.array(sizes, np.int64)
        counts = -(-lengths // WIDTH)
        self.rows = int(counts.sum())
        self.pads = (counts * WIDTH - lengths).tolist()
        self._parts = list(chain.from_iterable(zip(sizes, self.pads, strict=True)))
        of_row = np.repeat(np.arange(len(sizes)), counts)
        filled = np.full(self.rows, WIDTH)
        filled[np.cumsum(counts) - 1] -= np.array(self.pads)
        self._host = [of_row, filled]
        while counts.max() > 1:
            counts, table = _gathering(counts)
            self._host.append(table)
        self._kept: dict[torch.device, list[torch.Tensor]] = {}

    def _tables(self, device: torch.device) -> list[torch.Tensor]:
        """What tells where arrays are, on the device; copied there once."""
        if device not in self._kept:
            tables = [torch.tensor(table.tolist(), device=device) for table in self._host]
            if any(type(table) is not torch.Tensor for table in tables):
                return tables
            self._kept[device] = tables
        return self._kept[device]

    def pack(self, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        zeros = arrays[0].new_zeros(WIDTH)
        pads = {pad: zeros.narrow(0, 0, pad) for pad in set(self.pads)}
        pieces = chain.from_iterable((flat(array), pads[pad]) for array, pad in zip(arrays, self.pads, strict=True))
        return torch.cat(list(pieces)).view(self.rows, WIDTH)

    def unpack(self, packed: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.split(packed.reshape(-1), self._parts))[::2]

    def shape(self, own: Sequence[int]) -> Sequence[int]:  # noqa: ARG002 (as above)
        return (self.rows, WIDTH)

    def spread(self, numbers: torch.Tensor) -> torch.Tensor:
        if numbers.numel() == 1:
            return numbers.reshape(())
        return numbers.index_select(0, self._tables(numbers.device)[0]).unsqueeze(1)

    def reduced(self, op: str, elements: torch.Tensor) -> torch.Tensor:
        """As everywhere in the same order, so that a step repeats bit for bit: nothing is added by atomic operations."""
        _, filled, *gatherings = self._tables(elements.device)
        inside = torch.arange(WIDTH, device=elements.device) < filled.unsqueeze(1)
        result = _ACROSS[op](torch.where(inside, elements, _NEUTRAL[op]), dim=1)
        for table in gatherings:
            result = torch.cat([result, result.new_full((1,), _NEUTRAL[op])])
            result = _ACROSS[op](result.index_select(0, table).view(-1, _FAN), dim=1)
        return result


def _gathering(counts: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """From so many values for each array to fewer: how many are left, and which are taken together; the last one is none."""
    after = -(-counts // _FAN)
    table = np.full(int(after.sum()) * _FAN, int(counts.sum()), np.int64)
    starts, begin = np.cumsum(after) - after, np.cumsum(counts) - counts
    place = np.arange(int(counts.sum())) - np.repeat(begin, counts)
    table[np.repeat(starts * _FAN, counts) + place] = np.arange(int(counts.sum()))
    return after, table


@lru_cache(maxsize=256)
def layout(sizes: tuple[int, ...], *, by_rows: bool) -> Layout:
    """The layout of arrays with so many elements each; ``by_rows`` if there are numbers for each of them."""
    if len(sizes) == 1:
        return Layout()
    return Rows(sizes) if by_rows else Line(sizes)


def flat(x: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor as one axis, in the order in which it lies in memory."""
    x = x.detach()
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def copied_as(old: list[Any], pieces: list[Any]) -> list[Any]:
    """Arrays like the old ones with these values, by one call for all."""
    targets = [torch.empty_like(x.detach()) for x in old]
    torch._foreach_copy_(shaped_as(targets, pieces), pieces)
    return targets


def shaped_as(targets: list[Any], pieces: list[Any]) -> list[Any]:
    """The arrays, shaped as the new values are."""
    return [x.detach() if x.shape == v.shape else flat(x) for x, v in zip(targets, pieces, strict=True)]
