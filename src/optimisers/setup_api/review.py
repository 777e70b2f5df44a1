"""``review``: which parameter goes where and why, and what of that looks wrong, before any training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..arrays import on_meta
from ..errors import RoutingWarning
from ..rules import Compensated, GrokFast, MixedPrecision, StochasticRounding
from ..rules._base import AbstractRule, TransformingRule, children
from ..rules.matrices._matrix_rule import MatrixRule
from ..tree.entry import Entry
from ..tree.fold import fold
from ..tree.leaves import Slot
from ..tree.param import Param
from .setup import check_arguments, planned
from .summary import summary


def review(
    rule: AbstractRule | Callable[[Param], AbstractRule | None],
    model: Any,
    *,
    trainable: Callable[[Param], bool] | None = None,
) -> str:
    """Which parameters of a model go to which rule, and why: the report of `summary` by rule, without a step or a state.

    Gives a RoutingWarning for each kind of choice that rarely is meant: an embedding or an output layer under a rule for
    matrices, weight decay on vectors (biases, norms), a layer stored as (in, out) taken for (out, in), fused query, key and
    value orthogonalised as one, half-precision parameters without a master copy. Which of them matter is for you to say: with
    ``warnings.simplefilter("error", RoutingWarning)`` they are errors, and what is meant can be filtered by its text.

    The arguments are those of `setup`, and so are the errors; the model may be on torch's ``meta`` device.
    """
    check_arguments("review", rule, model)
    state = planned(rule, model, trainable, None, on_meta)
    found: dict[str, list[str]] = {}
    for slot, entry in zip(state._slots, state._entries, strict=True):
        if entry.rule is not None:
            for text in _oddities(slot, entry):
                found.setdefault(text, []).append(slot.path or "(the array)")
    for text, paths in found.items():
        where = ", ".join(row.path for row in fold(paths, [None] * len(paths)))
        warnings.warn(f"{text}: {where}", RoutingWarning, stacklevel=2)
    return summary(state, by="rule")


def _oddities(slot: Slot, entry: Entry) -> Iterator[str]:
    """What looks wrong about the rule of one array."""
    assert entry.rule is not None  # noqa: S101 (asked before)
    acting = list(_acting(entry.rule))
    param = slot.param
    names = [path.lower() for path in (slot.path, *param.tied_paths)]
    for inner in acting:
        if isinstance(inner, (TransformingRule, MatrixRule)):
            yield from _of_matrices(inner, param, names)
    if param.ndim <= 1:
        for inner in acting:
            # GrokFast's lambda_ is no decay, and that of a MatrixRule is for matrices.
            if getattr(inner, "lambda_", 0) > 0 and not isinstance(inner, (MatrixRule, GrokFast)):
                name = type(inner).__name__
                yield f"{name} decays vectors, which mostly are biases and norms; route them to a rule without decay"
    half = slot.dtype in {"float16", "bfloat16"}
    if half and not any(isinstance(inner, (Compensated, MixedPrecision, StochasticRounding)) for inner in acting):
        remedy = "wrap the rule in MixedPrecision, StochasticRounding or Compensated"
        yield f"small steps of {slot.dtype} parameters are rounded away; {remedy}"


def _of_matrices(rule: AbstractRule, param: Param, names: list[str]) -> Iterator[str]:
    name = type(rule).__name__
    owner = "" if param.owner is None else param.owner.__name__
    whole = getattr(rule, "norm", "spectral") == "spectral"  # Scion's other norms are made for embeddings and output layers
    if whole and ("Embedding" in owner or any(word in path for path in names for word in ("embed", "wte", "wpe"))):
        yield f"{name} orthogonalises an embedding, whose rows are not used together; AdamW is usual"
    elif whole and any(path.split(".")[-2:-1] in (["lm_head"], ["head"], ["classifier"]) for path in names):
        yield f"{name} orthogonalises an output layer; AdamW is usual"
    if getattr(rule, "layout", "in_out") == "out_in" and (owner == "Conv1D" or "ConvTranspose" in owner):
        yield f"{name} takes a {owner} for (out, in), but its weight is (in, out); give layout='in_out'"
    if getattr(rule, "blocks", 0) == 1 and any(word in path for path in names for word in ("qkv", "c_attn", "in_proj_weight")):
        yield f"{name} orthogonalises query, key and value as one matrix; give blocks=3, or the sizes of grouped heads"


def _acting(rule: AbstractRule) -> Iterator[AbstractRule]:
    """The rules that treat an array: not those for other arrays that stand in the same rule."""
    if isinstance(rule, MatrixRule):
        yield from [rule] if rule._matrix else _acting(rule.opt)
        return
    yield rule
    for _, _, child in children(rule):
        yield from _acting(child)
