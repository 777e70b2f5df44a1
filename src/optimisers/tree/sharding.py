"""Arrays of which each rank holds a part: how they lie, their parts on this rank, and such arrays made of parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, final

from ..arrays import is_number, kind, torch_if_loaded
from ..errors import GradientError, ModelError, StructureError, TieError
from ..rules._states import map_state
from .paths import shown


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor, which may be replicated as well."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


@final
class Sharding:
    """How an array lies on the ranks of a mesh. Equal for arrays of one shape that lie alike.

    Attributes:
        mesh: a ``DeviceMesh``.
        placements: for each dimension of the mesh ``Shard`` or ``Replicate``.
        shape: of the whole array.
        stride: of the whole array, in elements.
        local_shape: of the part on this rank.
        over: the dimensions of the mesh over which the array is cut.

    """

    __slots__ = ("_spec", "local_shape", "mesh", "over", "placements", "shape", "stride")

    def __init__(self, x: Any) -> None:
        self._spec = x._spec
        self.mesh, self.placements = x.device_mesh, tuple(x.placements)
        self.shape, self.stride = tuple(x.shape), tuple(x.stride())
        self.local_shape = tuple(x._local_tensor.shape)
        self.over = tuple(d for d, placement in enumerate(self.placements) if not placement.is_replicate())

    def _key(self) -> Any:
        return self.mesh, self.placements, self.shape

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Sharding) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def __copy__(self) -> Sharding:
        return self

    def __deepcopy__(self, memo: Any) -> Sharding:
        return self

    def __repr__(self) -> str:
        """As in errors: ``(Shard(dim=0),) on DeviceMesh('cpu', [0, 1])``."""
        return f"{self.placements} on {self.mesh}"

    def fits(self, x: Any) -> bool:
        """Whether x, a DTensor of this shape, lies so."""
        return x._spec is self._spec or (x.device_mesh == self.mesh and tuple(x.placements) == self.placements)

    def of_parts(self, part: Any) -> Any:
        """The array of which this rank holds that part, in the same memory; carries the graph of the part."""
        tensor: Any = sys.modules["torch.distributed.tensor"]
        torch: Any = torch_if_loaded()
        shape, stride = torch.Size(self.shape), self.stride
        return tensor.DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def part_of(self, whole: Any) -> Any:
        """This rank's part of an array that every rank holds whole, in memory of its own; carries the graph of the whole."""
        tensor: Any = sys.modules["torch.distributed.tensor"]
        everywhere = [tensor.Replicate()] * len(self.placements)
        found = tensor.DTensor.from_local(whole, self.mesh, everywhere, run_check=False).redistribute(
            placements=self.placements
        )
        return local(found, graph=found.requires_grad).clone()

    def is_whole(self, leaf: Any) -> bool:
        """Whether something of a state is a tensor of the shape of the whole array."""
        return kind(leaf) == "torch" and not is_sharded(leaf) and tuple(leaf.shape) == self.shape and leaf.ndim > 0

    def is_part(self, leaf: Any) -> bool:
        """Whether something of a state, made for the part, is a tensor of its shape."""
        return kind(leaf) == "torch" and not is_sharded(leaf) and tuple(leaf.shape) == self.local_shape and leaf.ndim > 0


def sharding_of(x: Any, path: str) -> Sharding | None:
    """How an array lies on several ranks, None for one that no mesh knows; ModelError if no rule can step it so."""
    if not is_sharded(x):
        return None
    if any(placement.is_partial() for placement in x.placements):
        msg = (
            f"the parameter at {shown(path)} has the placements {tuple(x.placements)}: a part of a sum is no parameter. "
            "Redistribute it to Replicate() or Shard() first"
        )
        raise ModelError(msg)
    return Sharding(x)


def local(x: Any, *, graph: bool = False) -> Any:
    """The part of a DTensor on this rank, in the same memory; anything else as it is. With ``graph`` it carries one."""
    if not is_sharded(x):
        return x
    part = x.to_local() if graph else x._local_tensor
    return part.wait() if type(part).__name__ == "AsyncCollectiveTensor" else part


def with_parts(x: Any, f: Callable[[Any], Any]) -> Any:
    """f(x), or for a DTensor the one of the part f(part)."""
    return Sharding(x).of_parts(f(local(x))) if is_sharded(x) else f(x)


def local_state(state: Any) -> Any:
    """A state with the parts on this rank in the place of DTensors."""
    return map_state(local, state)


def sharded_state(state: Any, sharding: Sharding) -> Any:
    """A state made for the part of an array, with DTensors in the place of what has its shape."""
    return map_state(lambda leaf: sharding.of_parts(leaf) if sharding.is_part(leaf) else leaf, state)


def whole(x: Any) -> Any:
    """A DTensor as a tensor, whole on every rank, which its ranks have to ask for together; anything else as it is."""
    return x.full_tensor() if is_sharded(x) else x


def cut_state(state: Any, sharding: Sharding) -> Any:
    """A state made for a whole array, with DTensors of this rank's parts in the place of what has its shape."""

    def cut(leaf: Any) -> Any:
        return sharding.of_parts(sharding.part_of(leaf)) if not is_number(leaf) and sharding.is_whole(leaf) else leaf

    return map_state(cut, state)


# --- a step -----------------------------------------------------------------------------------------------------------------


def refuse_permuted(paths: Sequence[str]) -> None:
    """Raise TieError for places of one sharded array that hold it with its axes in another order."""
    msg = (
        f"{' and '.join(map(shown, paths))} are one sharded array with its axes in different orders, which cannot be stepped "
        "once; tie the very same DTensor"
    )
    raise TieError(msg)


def local_parameter(x: Any, sharding: Sharding | None, path: str, *, graph: bool = False) -> Any:
    """The part of a parameter on this rank; StructureError unless it lies as setup saw it."""
    if sharding is None:
        if is_sharded(x):
            msg = (
                f"model at {shown(path)}: the state was set up for a tensor on one device, and the parameter is a DTensor with "
                f"placements {tuple(x.placements)} now. Shard the model first, and then set up"
            )
            raise StructureError(msg)
        return x
    if not is_sharded(x):
        msg = (
            f"model at {shown(path)}: the state was set up for a DTensor with placements {sharding}, and the parameter is none "
            "now. Set up a new state for the changed model"
        )
        raise StructureError(msg)
    if tuple(x.shape) == sharding.shape and not sharding.fits(x):
        msg = (
            f"model at {shown(path)}: the state was set up for placements {sharding}, and the parameter has "
            f"{tuple(x.placements)} on {x.device_mesh}. Save the state and load it for the model as it is now, or redistribute "
            "the parameter"
        )
        raise StructureError(msg)
    return local(x, graph=graph)


def local_gradient(dx: Any, sharding: Sharding | None, path: str) -> Any:
    """The part of a gradient on this rank; GradientError unless it lies as its parameter does."""
    if sharding is None or dx is None:
        return dx
    at = f"gradient at {shown(path)}: expected a DTensor with placements {sharding}, as the parameter has"
    if not is_sharded(dx):
        if kind(dx) is None:
            return dx
        raise GradientError(f"{at}, got a {type(dx).__name__}; make one with distribute_tensor or DTensor.from_local")
    if tuple(dx.shape) != sharding.shape:
        got = tuple(dx.shape)
        raise GradientError(
            f"gradient at {shown(path)}: expected shape {sharding.shape}, got {got}. Gradients are never broadcast"
        )
    if not sharding.fits(dx):
        remedy = "call grad.redistribute(placements=parameter.placements) on every rank"
        if any(placement.is_partial() for placement in dx.placements):
            remedy = f"it has not been summed over the ranks yet; {remedy}"
        raise GradientError(f"{at}, got {tuple(dx.placements)} on {dx.device_mesh}; {remedy}")
    return local(dx, graph=dx.requires_grad)


def mapped(values: Sequence[Any], at: Sequence[tuple[int, Any, str]], f: Callable[[Any, Any, str], Any]) -> list[Any]:
    """The values with f(value, sharding, path) at these places."""
    result = list(values)
    for leaf, sharding, path in at:
        result[leaf] = f(values[leaf], sharding, path)
    return result
