"""Memory that a step in place is about to write: no two parameters may share it, and no gradient may lie in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_

import numpy as np

from ..arrays import address
from ..errors import TieError
from .groups.states import RunCache
from .groups.step import GroupStep
from .tracks.single import Job


def resolve(cache: RunCache, steps: Sequence[GroupStep], jobs: Iterable[Job]) -> None:
    """Refuse parameters that are one array now, and copy gradients that lie in memory to be written."""
    known = [step.group.slots for step in steps]
    before = cache.unaliased
    alone = [(job.path, job.x) for job in jobs]
    same = before is not None and len(before) == len(known) and all(map(is_, before, known))
    if same and not alone and not any(step.moved for step in steps):
        return
    found = [pair for step in steps for pair in step.writes()]
    if not found:
        _refuse_shared(alone)
        return
    starts, ends = np.concatenate([first for first, _ in found]), np.concatenate([end for _, end in found])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    if alone or (starts[1:] < ends[:-1]).any():
        xs = [(step.group.paths[int(i)], step.xs[int(i)]) for step in steps for i in step.members]
        _refuse_shared([*xs, *alone])
    clear = [step.copy_aliased(starts, ends) for step in steps]
    cache.unaliased = known if all(clear) else None


def _refuse_shared(parameters: Sequence[tuple[str, object]]) -> None:
    """Raise TieError if arrays that setup saw apart are now one, which would be written twice."""
    seen: dict[tuple[str, int], str] = {}
    for path, x in parameters:
        start = address(x)
        if start is not None and seen.setdefault(start, path) != path:
            msg = (
                f"{seen[start]!r} and {path!r} were two arrays at setup and are one now, so update_ would step it twice; "
                "set up a new state, which finds the tie"
            )
            raise TieError(msg)
