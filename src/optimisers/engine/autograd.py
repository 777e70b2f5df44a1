"""Autograd around a step: when the new parameters carry a graph, and what they are when they do not."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..arrays import kind
from ..arrays._torch import is_transformed
from ..rules._base import AbstractRule, walk
from ..rules._precision import state_leaves
from .tracks.single import Job


def wants_graph(jobs: Iterable[Job]) -> bool:
    """Whether the outputs depend on something that requires grad, other than the parameters themselves.

    A parameter alone does not count, so that a plain training loop never chains graphs. Inside a ``torch.func`` transform
    everything counts: there nothing can be left behind.
    """
    enabled = torch.is_grad_enabled()
    rules: set[int] = set()
    for job in jobs:
        if kind(job.x) != "torch":
            continue
        if is_transformed(job.x) or is_transformed(job.dx):
            return True
        values = [job.dx, *state_leaves(job.state)]
        if id(job.rule) not in rules:
            rules.add(id(job.rule))
            values += _tensor_fields(job.rule)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if any(is_transformed(t) or (enabled and t.requires_grad) for t in tensors):
            return True
    return False


def _tensor_fields(rule: AbstractRule) -> list[Any]:
    found: list[Any] = []
    for inner in walk(rule):
        for value in vars(inner).values():
            found += value if isinstance(value, tuple) else [value]
    return found


def mode(*, graph: bool) -> AbstractContextManager[Any]:
    """The context in which to step: as the caller has it if a graph is wanted, else without grad."""
    return nullcontext() if graph else torch.no_grad()


def as_parameter(new: Any, old: Any) -> Any:
    """A new value as a leaf of old's class and ``requires_grad``; NumPy arrays as they are."""
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
