"""Whether the ranks of a mesh agree about a model and its rules: else they would wait for one another in the first step."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from ..arrays import torch_if_loaded
from ..engine.shards.exchange import group_of
from ..errors import ModelError
from ..rules._base import AbstractRule
from ..tree.leaves import Slot
from ..tree.paths import shown


def check_agreement(slots: Sequence[Slot], rules: Sequence[AbstractRule | None]) -> None:
    """Raise ModelError on all ranks of a mesh unless their DTensors and the rules for them are the same.

    Costs a collective of 32 bytes for each mesh.
    """
    meshes: dict[Any, list[tuple[str, str]]] = {}
    for slot, rule in zip(slots, rules, strict=True):
        if slot.sharding is not None:
            text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(rule))  # functions lie elsewhere on each rank
            described = f"shape {slot.param.shape}, {slot.dtype}, placements {slot.sharding.placements}, rule {text}"
            meshes.setdefault(slot.sharding.mesh, []).append((slot.path, described))
    for mesh, rows in meshes.items():
        _check(mesh, rows)


def _check(mesh: Any, rows: list[tuple[str, str]]) -> None:
    torch: Any = torch_if_loaded()
    dist, group = torch.distributed, group_of(mesh)
    count = dist.get_world_size(group)
    digest = list(hashlib.sha256(repr(rows).encode()).digest())
    mine = torch.tensor(digest, dtype=torch.uint8, device=mesh.device_type)
    found = mine.new_empty(count * len(digest))
    dist.all_gather_single(found, mine, group=group)
    if bool((found.view(count, -1) == mine).all(1).all()):
        return
    everywhere: list[Any] = [None] * count
    dist.all_gather_object(everywhere, rows, group=group)
    numbers = dist.get_process_group_ranks(group)
    first = everywhere[0]
    other = next(k for k in range(count) if everywhere[k] != first)
    msg = (
        f"setup: ranks {numbers[0]} and {numbers[other]} of {mesh} disagree, and would wait for each other in the first step: "
        f"{_difference(first, everywhere[other], numbers[0], numbers[other])}. Give every rank the same model and the same rule"
    )
    raise ModelError(msg)


def _difference(rows: list[tuple[str, str]], others: list[tuple[str, str]], rank: int, other: int) -> str:
    """The first row that differs."""
    for (path, text), (other_path, other_text) in zip(rows, others, strict=False):
        if (path, text) != (other_path, other_text):
            return f"rank {rank} has {shown(path)} ({text}), and rank {other} has {shown(other_path)} ({other_text})"
    owner, longer = (rank, rows) if len(rows) > len(others) else (other, others)
    return f"only rank {owner} trains {shown(longer[min(len(rows), len(others))][0])}"
