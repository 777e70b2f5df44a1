"""Autograd around a step: when what comes out carries a graph, and what it is when it does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..arrays import is_recording, kind, torch_if_loaded, torch_part
from ..rules._base import AbstractRule, walk
from ..rules._states import state_leaves
from ..tree.entry import Entry
from ..tree.sharding import is_sharded


def is_ordinary() -> bool:
    """Whether arrays are what they seem: no transform, trace or dispatch mode looks on."""
    if torch_if_loaded() is None:
        return True
    return not is_recording() and bool(torch_part().is_ordinary())


def wants_graph(entries: Iterable[tuple[Entry, Any, Any]]) -> bool:
    """Whether new states or parameters depend on something that requires grad, other than the parameters themselves.

    A parameter alone does not count, so that a plain training loop never chains graphs. Inside a ``torch.func`` transform
    everything counts: there nothing can be left behind. So does a tangent of forward mode, a parameter's as well.

    Args:
        entries: what the state keeps for an array, the parameter, and its gradient, or None for no step.

    """
    from ..arrays._torch import has_tangent, is_transformed

    torch: Any = torch_if_loaded()
    enabled = torch.is_grad_enabled()
    rules: set[int] = set()
    for entry, x, dx in entries:
        if dx is None or entry.rule is None or kind(x) != "torch":
            continue
        if is_transformed(x) or is_transformed(dx) or has_tangent(x):
            return True
        values = [dx, *state_leaves(entry.state)]
        if id(entry.rule) not in rules:
            rules.add(id(entry.rule))
            values += _tensor_fields(entry.rule)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if any(is_transformed(t) or (enabled and t.requires_grad) or has_tangent(t) for t in tensors):
            return True
    return False


def _tensor_fields(rule: AbstractRule) -> list[Any]:
    found: list[Any] = []
    for inner in walk(rule):
        for value in vars(inner).values():
            found += value if isinstance(value, tuple) else [value]
    return found


def requires_grad(arrays: Sequence[Any]) -> bool:
    """Whether any of these arrays does, which may be None."""
    return any(getattr(x, "requires_grad", False) for x in arrays if x is not None)


def mode(*, graph: bool) -> AbstractContextManager[Any]:
    """The context in which to step: as the caller has it if a graph is wanted, else without grad."""
    torch = torch_if_loaded()
    return nullcontext() if graph or torch is None or not torch.is_grad_enabled() else torch.no_grad()


def as_parameter(new: Any, old: Any) -> Any:
    """A new value as a leaf of old's class and ``requires_grad``; NumPy arrays as they are."""
    torch: Any = torch_if_loaded()
    if is_sharded(old):
        new = new.detach().requires_grad_(old.requires_grad)
        return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
    if type(new) is torch.Tensor is type(old) and not (new.requires_grad or old.requires_grad):
        return new
    if not isinstance(new, torch.Tensor):
        return new
    new = new.detach()
    if type(new) is not type(old):
        if type(old) is torch.nn.Parameter or type(new) is not torch.Tensor:
            return torch.nn.Parameter(new, requires_grad=old.requires_grad)
        return torch.Tensor._make_subclass(type(old), new, old.requires_grad)
    return new.requires_grad_(old.requires_grad) if old.requires_grad else new
