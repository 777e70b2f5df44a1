"""Sums over parts of arrays, finished over the ranks that hold the others: all that are ready together by one collective.

Every rank gathers the numbers of all and combines them in the order of ranks. So all have the same bits, and decide alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...arrays import torch_if_loaded
from ...tree.sharding import Sharding

Vector = np.ndarray[Any, Any]

_COMBINE: dict[str, Callable[[Vector], Any]] = {"sum": np.sum, "largest": np.max, "smallest": np.min}
NEUTRAL = {"sum": 0.0, "largest": -np.inf, "smallest": np.inf}
"""What an array without elements contributes."""


class Unfinished(NamedTuple):
    """Numbers that were taken over parts of arrays.

    ``ops`` says what each of the vectors is, ``shardings`` how each of the arrays lies, None for one that is here as a whole.
    """

    values: list[Vector]
    ops: Sequence[str]
    shardings: Sequence[Sharding | None]


def finished(asked: Sequence[Unfinished]) -> list[list[Vector]]:
    """The numbers of whole arrays. Every rank has to come here with the same arrays."""
    results = [[np.array(vector, np.float64) for vector in part.values] for part in asked]
    depth = max((len(s.over) for part in asked for s in part.shardings if s is not None), default=0)
    for level in range(depth):
        waiting: defaultdict[tuple[Any, int], list[tuple[Vector, int, str]]] = defaultdict(list)
        for part, vectors in zip(asked, results, strict=True):
            for i, sharding in enumerate(part.shardings):
                if sharding is not None and level < len(sharding.over):
                    at = waiting[sharding.mesh, sharding.over[level]]
                    at += [(vector, i, op) for vector, op in zip(vectors, part.ops, strict=True)]
        for (mesh, dimension), places in waiting.items():
            everywhere = _gathered(np.array([vector[i] for vector, i, _ in places]), mesh, dimension)
            for k, (vector, i, op) in enumerate(places):
                vector[i] = _COMBINE[op](everywhere[:, k])
    return results


def _gathered(values: Vector, mesh: Any, dimension: int) -> Vector:
    """The numbers of all ranks along a dimension of a mesh, a row for each."""
    torch: Any = torch_if_loaded()
    mine = torch.from_numpy(values).to(mesh.device_type)
    found = mine.new_empty((mesh.size(dimension), len(values)))
    torch.distributed.all_gather_single(found.view(-1), mine, group=mesh.get_group(dimension))
    return found.cpu().numpy()  # type: ignore[no-any-return]
