"""``optimizer.state``: the states of the tree as dicts of tensors, which may be edited."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from ..setup_api.setup import initial_state
from ..tree.entry import Entry
from ..tree.state import rebuilt
from ._groups import Held
from ._tensors import filled, named_tensors


def shown_state(held: Held) -> defaultdict[torch.Tensor, dict[str, Any]]:
    """The view, filled if the step has moved on since; what users put beside the tensors stays."""
    if held.shown is None and held.tree is not None:
        shown: dict[torch.Tensor, dict[str, Any]] = {}
        for known in held.groups:
            for (_, number), x in zip(known.places, known.params, strict=True):
                shown[x] = {} if number < 0 else named_tensors(held.tree._entries[number].state)
        for x, (_, entry, *_) in held.parked.items():
            shown[x] = named_tensors(entry.state)
        view = {}
        for x, tensors in shown.items():
            extra = {key: value for key, value in held.view.get(x, {}).items() if not str(key).startswith("state")}
            view[x] = {**tensors, **extra}
        held.view.update(view)  # what was put there for a parameter that is still to come stays
        held.shown = shown
    return held.view


def take_state(held: Held, dtype: str | None) -> None:
    """Make what was changed in ``optimizer.state`` part of the state tree."""
    shown: Any = held.shown
    tree: Any = held.tree
    entries: list[Entry] | None = None
    for known in held.groups:
        for (name, number), x in zip(known.places, known.params, strict=True):
            before, now = shown.get(x), held.view.get(x, {})
            if number < 0 or before is None or not _edited(before, now, entry := tree._entries[number]):
                continue
            entries = entries or list(tree._entries)
            if any(key in now for key in before) or any(str(key).startswith("state") for key in now):
                entries[number] = entry.replace(state=filled(entry.state, now, name))
            else:  # torch's optimizers begin anew with what was taken out of their state
                rule: Any = entry.rule
                entries[number] = entry.replace(state=initial_state(rule, tree._slots[number], x, dtype))
    parked = _take_parked(held, shown)
    if entries is not None:
        held.tree = rebuilt(tree, entries)
    if entries is not None or parked:
        held.shown = None


def _take_parked(held: Held, shown: Mapping[torch.Tensor, Any]) -> bool:
    """As `take_state`, for parameters that are in no group now. Whether there was anything to take."""
    found = False
    for x, kept in list(held.parked.items()):
        name, entry, *_ = kept
        before, now = shown.get(x), held.view.get(x, {})
        if before is None or not _edited(before, now, entry):
            continue
        found = True
        if any(key in now for key in before):
            kept[1] = entry.replace(state=filled(entry.state, now, name))
        else:
            del held.parked[x]
            held.view.pop(x, None)
    return found


def show_followed(held: Held, x: torch.Tensor, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Show numbers that have followed others, unless they were edited: that they differ from those shown is no edit."""
    shown, now = (held.shown or {}).get(x), held.view.get(x)
    if shown is None or now is None:
        return
    for key, old in before.items():
        number = key in shown and now.get(key) is shown[key] and not old.ndim
        if number and old.item() == shown[key].item():
            shown[key] = now[key] = after[key]


def _edited(before: Mapping[str, Any], now: Mapping[str, Any], entry: Entry) -> bool:
    """Whether tensors that were shown are others now, or hold another number."""
    if any(now.get(key) is not tensor for key, tensor in before.items()):
        return True
    if not any(entry.numbers):
        return False
    fresh = named_tensors(entry.state)
    return any(fresh[key] is not tensor and fresh[key].item() != tensor.item() for key, tensor in before.items())
