"""``metrics``: the sizes of gradients, updates and weights, and how much was clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..arrays import Array, can_read, cast_to, dtype_name, norm, without_autocast, working_dtype
from ..engine.tracks.checks import read_all
from ..engine.tracks.single import Job, jobs_of, step
from ..errors import ArgumentError, described
from ..rules import ClipGrad
from ..rules._base import AbstractRule, CompositeRule, Stages, State
from ..rules._fields import whole
from ..rules._norm import NormRule
from ..rules._states import map_state
from ..tree.param import Param
from ..tree.paths import parts_of
from ..tree.sharding import Sharding
from ..tree.sharding import whole as whole_array
from ..tree.state import StateTree
from ..tree.structure import is_module
from .update import checked_leaves, no_grad, prepare


@dataclass(frozen=True)
class Metrics:
    """The sizes of one step of an array, or of a group of them. Norms are 2-norms.

    Attributes:
        gradient_norm: of the gradient as given, before anything in the chain.
        update_norm: of what the array changes by, rounding included; 0 where no step is taken.
        weight_norm: of the array before the step.
        ratio: ``update_norm / weight_norm``; 0 if both are 0.
        clipped: share of the gradient that the limiting rules of its chain (ClipGrad, ClipNorm, ClipGlobalNorm and the norm
            caps) take away: ``1 - after / before`` of the norm around them; 0 without any, None if no step was computed.

    """

    gradient_norm: float
    update_norm: float
    weight_norm: float
    ratio: float
    clipped: float | None


def metrics(
    state: StateTree,
    model: Any,
    grads: Any = None,
    *,
    after: Any = None,
    by: int | Callable[[Param], str] | None = None,
) -> dict[str, Metrics]:
    """The `Metrics` of the step that `update` would take, by path. Nothing is changed.

    Args:
        grads: as `update` takes them; for a ``torch.nn.Module`` they may be left out: its parameters' ``.grad``.
        after: the model after this step, if it was taken already: ``new_state, new = update(state, model, grads)``, then
            ``metrics(state, model, grads, after=new)``. Otherwise the step is computed here and thrown away.
        by: what is measured together: None for every array by itself; a number of leading keys (``by=1`` for the entries of
            the top level, ``by=0`` for all, under the name ``""``); or a function from `Param` to a name.

    Arrays that are frozen or have no gradient are left out. A norm that is infinite or NaN is told, not raised.

    Cost: without ``after`` that of a pure step, its memory for a new model and state included; then one reduction each
    over gradient, update and weights, and all numbers are read with one synchronisation (SkipNonFinite needs one of its
    own). With ``after``, the reductions only.

    Raises as `update` does for arguments that do not fit, and ArgumentError inside torch.func transforms and
    torch.compile, where numbers cannot be read.
    """
    module = is_module(model)
    if grads is None and not module:
        msg = "metrics: give the gradients, metrics(state, model, grads); only a torch.nn.Module has its own"
        raise ArgumentError(msg)
    if not (by is None or callable(by) or whole(by, 0) is not None):
        msg = f"metrics: by= takes a number of leading keys >= 0, or a function from Param to a name; got {described(by)}"
        raise ArgumentError(msg)
    work = prepare(state, model, grads, from_module=grads is None and module)
    jobs = jobs_of(state, dict(enumerate(state._entries)), work.xs, work.dxs)
    with no_grad(), without_autocast():
        jobs = {i: _whole(job, state._slots[i].sharding) for i, job in jobs.items()}
        if after is None:
            watched = {i: _watched(job) for i, job in jobs.items()}
            outcomes = step([w.job for w in watched.values()])
            sizes = [
                _sizes(w.job, out.x, [v for pair in w.seen.norms for v in pair])
                for w, out in zip(watched.values(), outcomes, strict=True)
            ]
        else:
            leaves = checked_leaves(state, after)
            sizes = [_sizes(job, whole_array(leaves[state._slots[i].places[0].leaf]), []) for i, job in jobs.items()]
    if not all(can_read(value) for row in sizes for value in row):
        msg = "metrics are read on the host, which cannot be done inside torch.func transforms or torch.compile"
        raise ArgumentError(msg)
    groups: dict[str, list[tuple[float, ...]]] = {}
    for i, row in zip(jobs, read_all(sizes), strict=True):
        groups.setdefault(_label(state._slots[i].param, by), []).append(row)
    return {label: _together(rows, stepped=after is None) for label, rows in groups.items()}


def _whole(job: Job, sharding: Sharding | None) -> Job:
    """The same with whole arrays, where they are cut over ranks."""
    if sharding is None:
        return job
    x, dx = (whole_array(sharding.of_parts(part)) for part in (job.x, job.dx))
    return job._replace(state=map_state(whole_array, job.state), x=x, dx=dx)


def _label(param: Param, by: int | Callable[[Param], str] | None) -> str:
    if by is None:
        return param.path
    return str(by(param)) if callable(by) else ".".join(parts_of(param.path)[:by])


def _sizes(job: Job, new: Any, around: list[Any]) -> tuple[Any, ...]:
    """Norms of gradient, update and weights, then those before and after each limiting rule."""
    wide = working_dtype(dtype_name(job.x))
    change = 0.0 if new is None else norm(cast_to(new, wide) - cast_to(job.x, wide))
    return norm(job.dx), change, norm(job.x), *around


def _together(rows: list[tuple[float, ...]], *, stepped: bool) -> Metrics:
    gradient, update, weight = (_hypot(row[i] for row in rows) for i in range(3))
    ratio = 0.0 if update == 0 else update / weight if weight else math.inf
    clipped = None
    if stepped:
        left = _hypot(row[0] * _kept(row[3:]) for row in rows)
        clipped = 0.0 if gradient == left else 1 - left / gradient
    return Metrics(gradient, update, weight, ratio, clipped)


def _kept(around: tuple[float, ...]) -> float:
    """The product of after / before over the limiting rules."""
    pairs = zip(around[::2], around[1::2], strict=True)
    return math.prod(1.0 if before == after else after / before for before, after in pairs)


def _hypot(values: Iterable[float]) -> float:
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else math.hypot(*found)


# --- watching the limiting rules of a chain ------------------------------------------------------------------------------


class _Seen:
    """The norms before and after each limiting rule of one array, in the order in which they ran."""

    def __init__(self) -> None:
        self.norms: list[tuple[Any, Any]] = []


class _Watched(NamedTuple):
    job: Job
    seen: _Seen


@dataclass(frozen=True)
class _Watch(CompositeRule):
    """A rule whose input and output are measured. It promises nothing, so that each array is stepped on its own."""

    rule: AbstractRule
    seen: _Seen

    def init(self, x: Array) -> State:
        return self.rule.init(x)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        state, after = yield from self.rule.stages(state, x, dx)
        self.seen.norms.append((norm(dx), norm(after)))
        return state, after


def _watched(job: Job) -> _Watched:
    seen = _Seen()
    return _Watched(job._replace(rule=_watching(job.rule, seen)), seen)


def _watching(rule: AbstractRule, seen: _Seen) -> AbstractRule:
    """The rule with its limiting rules watched, and told not to raise."""
    if isinstance(rule, (ClipGrad, NormRule)):
        return _Watch(rule.replace(throw=False) if isinstance(rule, NormRule) else rule, seen)
    return rule._with_children(lambda child: _watching(child, seen))
