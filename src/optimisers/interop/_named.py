"""Parameters given in any of the forms that torch's optimizers take, as one model with names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, ModelError, described


class Named(torch.nn.Module):
    """Parameters under their own names, which may hold dots, as a module that ``setup`` understands."""

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._parameters.update(named)  # type: ignore[arg-type]


class Given(NamedTuple):
    """A model, and whether its names are the user's own or were made up from the order."""

    model: torch.nn.Module
    named: bool


def given(params: Any, first: int = 0) -> Given:
    """The parameters as a model: a module, pairs of name and tensor, a dict of them, or tensors alone.

    Args:
        first: the number from which tensors without names are counted.

    Raises ArgumentError for anything else, ModelError for two parameters of one name and for none at all.
    """
    if isinstance(params, torch.nn.Module):
        return Given(params, named=True)
    if isinstance(params, torch.Tensor):
        params = [params]
    if isinstance(params, (set, frozenset)):
        msg = "parameters need an order, which a set has not; give a list, or module.named_parameters()"
        raise ArgumentError(msg)
    try:
        items = list(params.items() if isinstance(params, Mapping) else params)
    except TypeError:
        msg = f"expected a torch.nn.Module, module.named_parameters() or a list of tensors; got {described(params)}"
        raise ArgumentError(msg) from None
    if not items:
        msg = "there are no parameters: the list is empty (a generator can be used only once)"
        raise ModelError(msg)
    named = all(isinstance(item, tuple) and len(item) == 2 for item in items)
    pairs: list[tuple[Any, Any]] = items if named else [(str(first + i), x) for i, x in enumerate(items)]
    result: dict[str, torch.Tensor] = {}
    for name, x in pairs:
        if not isinstance(name, str) or not isinstance(x, torch.Tensor):
            msg = f"expected tensors, or pairs of a name and a tensor; got {described(x)} under {name!r}"
            raise ArgumentError(msg)
        if name in result and result[name] is not x:
            msg = f"two parameters have the name {name!r}; names must be unique, since states are kept and loaded by name"
            raise ModelError(msg)
        if not (x.is_leaf or x.retains_grad):
            msg = f"parameter {name!r} is not a leaf of the autograd graph, so it has no .grad to step by; detach it"
            raise ModelError(msg)
        result[name] = x
    return Given(Named(result), named=named)
