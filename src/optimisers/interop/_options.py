"""The keys that a parameter group may have: options that would do nothing are told."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import HyperParameterError
from ..rules import AdamW
from ..rules._adjust import field_names
from ..rules._base import AbstractRule, walk
from ._entries import NAMES, Entries

_TORCH = {
    "alpha", "amsgrad", "betas", "centered", "dampening", "decoupled_weight_decay", "eps", "etas", "initial_accumulator_value",
    "lambd", "lr_decay", "momentum", "momentum_decay", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn", "rho",
    "step_sizes", "t0", "weight_decay",
}  # fmt: skip
_WITHOUT_EFFECT_ON_VALUES = {"foreach", "fused", "capturable", "differentiable"}
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "base_momentum", "max_momentum"}
_OWN = {"params", "param_names", "rule", "maximize"}


def refuse_idle_options(given: Mapping[str, Any], entries: Entries, rule: AbstractRule) -> None:
    """Raise HyperParameterError for a key that looks like an option, and is none of this rule's.

    That is an option of a ``torch.optim`` optimizer that the rule does not have (unless it is switched off: 0, False or None),
    a rule's own name for a field, and what one letter makes an option. Other keys are the user's own.
    """
    for key, value in given.items():
        if key in entries.keys or key in _OWN or key in _OF_SCHEDULERS or key in _WITHOUT_EFFECT_ON_VALUES:
            continue
        trouble = _trouble(key, value, entries, rule)
        if trouble:
            options = ", ".join(entries.keys)
            msg = f"{key!r}={value!r} would do nothing for {entries.kind}: {trouble}; its options are {options}"
            raise HyperParameterError(msg)


def _trouble(key: str, value: Any, entries: Entries, rule: AbstractRule) -> str | None:
    if key in _TORCH:
        off = not isinstance(value, (tuple, list)) and not value
        decoupled = key == "decoupled_weight_decay" and any(isinstance(inner, AdamW) for inner in walk(rule))
        return None if off or decoupled else "the rule has no such option"
    if not isinstance(key, str):
        return None
    renamed = {entry.field: entry.key for entry in entries.entries if entry.field != entry.key} | {"eta": "lr"}
    if key in renamed:
        return f"here this is {renamed[key]!r}"
    if key in NAMES or key == "learning_rate":
        return "the rule has no such option" if key in NAMES else "here this is 'lr'"
    if any(key in field_names(inner) for inner in walk(rule)):
        return "it is fixed when the rule is made"
    close = difflib.get_close_matches(key.lower(), [*entries.keys, "maximize", *sorted(_TORCH)], n=1, cutoff=0.84)
    return f"perhaps {close[0]!r} is meant" if close else None
