"""Changes of the adapter that happen whole or not at all, whatever is raised among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.weak import WeakTensorKeyDictionary

from ._groups import Held


@contextmanager
def undone_if_it_fails(optimizer: Any, held: Held) -> Iterator[None]:
    """Put everything back that an optimizer holds if something is raised inside, an interrupt as well."""
    groups, dicts = optimizer.param_groups, [(group, dict(group)) for group in optimizer.param_groups]
    fields = {**vars(held), "groups": list(held.groups), "untrained": dict(held.untrained), "frozen": dict(held.frozen)}
    fields["homes"] = dict(held.homes)
    seen = [(known.seen, dict(known.seen)) for known in held.groups]
    view = {x: (own, dict(own)) for x, own in held.view.items()}
    parked = dict(held.parked.items())
    try:
        yield
    except BaseException:
        for mapping, before in [*dicts, *seen, *view.values()]:
            mapping.clear()
            mapping.update(before)
        groups[:] = [group for group, _ in dicts]
        optimizer.param_groups = groups
        vars(held).update(fields)
        held.parked = WeakTensorKeyDictionary(parked)
        held.view.clear()
        held.view.update({x: own for x, (own, _) in view.items()})
        raise
