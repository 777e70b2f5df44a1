"""Parameters that were frozen when they were given, and have a gradient now: they are trained from then on, as by torch.

They enter the group in which they would have been, so that a schedule, or a scaler of gradients, sees them with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..arrays import on_meta
from ..errors import ModelError, OptimisersError, StructureError
from ..rules._base import AbstractRule, walk
from ..setup_api.route import Route
from ..setup_api.setup import planned
from ..tree.paths import shown
from ._groups import Group, Held, Home, for_each, with_rates
from ._named import Named


def thawed(held: Held) -> list[torch.Tensor]:
    """Those that were frozen, are not any more, and have a gradient."""
    return [x for x in held.homes if x.requires_grad and x.grad is not None]


def take_in(held: Held, x: torch.Tensor, rule: Any, param_groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Put one into the list of its group, where the next step finds it. Why that cannot be, else None.

    ``rule`` is the one that the optimizer was given.
    """
    if any(y is x for group in param_groups for y in group["params"]):  # by hand
        del held.homes[x]
        return None
    home, name = held.homes[x], held.frozen[x]
    try:
        known = _group_of(held, x, name, home, rule)
    except ModelError:  # a function gave None for its rule: not to be trained
        del held.homes[x]
        return None
    except (OptimisersError, LookupError) as error:
        return str(error)
    if known is None:
        return "its rule is that of no group"
    order = {name: i for i, name in enumerate(home.names)}
    named: dict[Any, str] = {**{y: other for y, (other, _) in zip(known.params, known.places, strict=True)}, **held.frozen}
    group: Any = known.shown
    here = [order.get(named.get(y, ""), len(order)) for y in group["params"]]
    # Between those that were given before it and after it: state dicts without names go by the order.
    at = next((i for i, place in enumerate(here) if place > order[name]), len(here))
    del held.homes[x]
    group["params"].insert(at, x)
    if "param_names" in group:
        group["param_names"].insert(at, name)
    return None


def refuse(held: Held, x: torch.Tensor, why: str) -> None:
    """Raise StructureError for one that has no group."""
    name = held.frozen[x]
    msg = (
        f"{shown(name)} has a gradient; it did not require grad when the optimizer was made, and is in no group, since {why}. "
        f"Take it in, optimizer.add_param_group({{'params': [({name!r}, parameter)], 'rule': ...}}), or freeze it, "
        "parameter.requires_grad_(False)"
    )
    raise StructureError(msg)


def _group_of(held: Held, x: torch.Tensor, name: str, home: Home, rule: Any) -> Group | None:
    """The group of a parameter: the only one of those that came with it, or the one with its rule."""
    groups = [known for known in held.groups if any(known.shown is group for group in home.groups)]
    own: AbstractRule | Callable[..., Any] | None = home.rule or (rule if callable(rule) else None)
    if own is None:
        raise StructureError("the optimizer was made from a state, or copied without its rule")
    if len(groups) == 1 and home.rule is not None and not any(isinstance(part, Route) for part in walk(home.rule)):
        return groups[0]
    plan = with_rates(planned(for_each(own), Named({name: x.detach()}), None, None, on_meta))
    base: Any = plan._heads[0].base
    return next((known for known in groups if known.base == base.unresolved()), None)
