"""The state of one parameter as a flat dict of tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..arrays import is_number
from ..arrays._torch import scalar
from ..errors import StructureError


def named_tensors(state: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state by the place where each stands: ``"state"``, or ``"state.0"``, ``"state.2.1"``.

    Counters and powers, which are kept as Python numbers, become 0-d tensors on the host (int64 or float64).
    """
    return {name: scalar(leaf) if is_number(leaf) else leaf for name, leaf in _walk(state, "state")}


def filled(state: Any, tensors: Mapping[str, Any], path: str, *, onto: torch.device | None = None) -> Any:
    """The state with its arrays and numbers taken from tensors by name.

    Args:
        onto: copy each tensor to this device, in the dtype of the one it replaces; otherwise take the tensors themselves.

    Raises StructureError, naming the parameter, for a tensor that is missing, unexpected or of another shape.
    """
    own = dict(_walk(state, "state"))
    missing, extra = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    if missing or (extra and onto is not None):
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"holds {', '.join(map(str, extra))}, unknown here"] if extra else []
        hint = "; a state of torch.optim is taken over with optimisers.torch.from_torch" if "exp_avg" in tensors else ""
        msg = f"the state of parameter {path!r} {' and '.join(parts)}: it was made by another rule{hint}"
        raise StructureError(msg)
    return _fill(state, tensors, "state", path, onto)


def _walk(state: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, value in _items(state):
        yield from _walk(value, f"{name}.{key}")
    if state is not None and not isinstance(state, (dict, tuple, list)):
        yield name, state


def _items(state: Any) -> Any:
    if isinstance(state, dict):
        return state.items()
    return enumerate(state) if isinstance(state, (tuple, list)) else ()


def _fill(state: Any, tensors: Mapping[str, Any], name: str, path: str, onto: torch.device | None) -> Any:
    if state is None:
        return None
    if isinstance(state, (dict, tuple, list)):
        inner = {key: _fill(value, tensors, f"{name}.{key}", path, onto) for key, value in _items(state)}
        if isinstance(state, dict):
            return inner
        return type(state)(*inner.values()) if hasattr(state, "_fields") else type(state)(inner.values())
    new = tensors[name]
    shape = () if is_number(state) else tuple(state.shape)
    if not isinstance(new, torch.Tensor) or tuple(new.shape) != shape:
        got = f"shape {tuple(new.shape)}" if isinstance(new, torch.Tensor) else type(new).__name__
        msg = f"the state of parameter {path!r}: expected {name} to be a tensor of shape {shape}, got {got}"
        raise StructureError(msg)
    if is_number(state):
        return type(state)(new.item())
    return new if onto is None else new.detach().to(device=onto, dtype=state.dtype, copy=True)
