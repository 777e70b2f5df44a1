"""Files of states that are cut over ranks: one rank writes, tensor by tensor; each reads, and keeps its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arrays import torch_if_loaded
from ..engine.shards.exchange import group_of
from ..errors import CheckpointError
from ..tree.leaves import Slot
from ..tree.sharding import is_sharded, whole
from . import _tensor_file
from ._state_dict import name_of


def write(path: Path, tensors: Mapping[str, Any], text: str) -> None:
    """`_tensor_file.write`, which all ranks call with their parts of DTensors; the first of them writes.

    Whole tensors are put together one after another. An error of the one that writes is raised on all.
    """
    groups = [group_of(x.device_mesh) for x in tensors.values() if is_sharded(x)]
    if not groups:
        _tensor_file.write(path, tensors, text)
        return
    dist = torch_if_loaded().distributed  # type: ignore[union-attr]
    group = max(groups, key=dist.get_world_size)
    writer = dist.get_process_group_ranks(group)[0]
    feed = _Feed(tensors)
    error: BaseException | None = None
    if dist.get_rank() == writer:
        try:
            _tensor_file.write(path, tensors, text, feed.take)
        except BaseException as raised:  # noqa: BLE001 (raised again, once the others know)
            error = raised
    feed.drain()
    told = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(told, src=writer, group=group)
    if error is not None:
        raise error
    if told[0] is not None:
        msg = f"save: rank {writer}, which writes the file, could not: {told[0]}"
        raise CheckpointError(msg)


class _Feed:
    """Whole tensors in the order in which they are written; every rank has to ask for all."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._left = self._wholes(tensors)

    @staticmethod
    def _wholes(tensors: Mapping[str, Any]) -> Iterator[Any]:
        for name in _tensor_file.ordered(tensors):
            x = tensors[name]
            yield whole(x).cpu().contiguous() if is_sharded(x) else x

    def take(self, _: str) -> Any:
        return next(self._left)

    def drain(self) -> None:
        """Take part in what is left, which a rank that cannot write still owes the others."""
        for _ in self._left:
            pass


def keeping(slots: Sequence[Slot], rename: Callable[[str], str] | None) -> Callable[[str, Any], Any] | None:
    """What is kept of a tensor of a file, by its name: of an array that is cut over ranks this rank's part. None: all."""
    cut = {slot.path: slot.sharding for slot in slots if slot.sharding is not None}
    if not cut:
        return None

    def kept(name: str, x: Any) -> Any:
        path, stands, _ = name.partition(name_of("", ()))
        sharding = cut.get(rename(path) if rename else path) if stands else None
        return x if sharding is None or not sharding.is_whole(x) else sharding.of_parts(sharding.part_of(x))

    return kept
