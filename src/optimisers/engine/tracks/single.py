"""One array, stepped by the rule itself, and what a state keeps of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...arrays import as_array, cast_to, copied, dtype_name, is_number, kind, memory_key, working_dtype
from ...errors import RuleError, described, locating
from ...rules._base import AbstractRule, Assign, Stages, Together, Whole
from ...rules._precision import in_working_precision
from ...rules._states import map_state, state_leaves
from ...tree.entry import Entry, Lease, host_state, numbers_in
from ...tree.state import StateTree
from .checks import Checked
from .scheduler import Request, Track, beside, run


class Job(NamedTuple):
    """One array to step. ``path`` names it in errors."""

    path: str
    rule: AbstractRule
    state: Any
    x: Any
    dx: Any


class Outcome(NamedTuple):
    """The new state of an array and its new value, None if no step was taken."""

    state: Any
    x: Any


def jobs_of(tree: StateTree, entries: Mapping[int, Entry], xs: Sequence[Any], dxs: Sequence[Any]) -> dict[int, Job]:
    """A job for each of these entries, by slot, that has a gradient."""
    jobs = {}
    for i, entry in entries.items():
        if dxs[i] is not None and entry.rule is not None:
            jobs[i] = Job(tree._slots[i].path or "(the array)", entry.rule, host_state(entry), xs[i], dxs[i])
    return jobs


class Single(Track):
    """One array, stepped by the rule itself."""

    def __init__(self, job: Job) -> None:
        self.job, self.rule = job, job.rule
        self.passed = Counter()
        self._checked: list[Checked] = []
        self.result: Any = None
        self._measures = False
        self._stages: Stages = in_working_precision(job.rule, job.state, job.x, job.dx)

    def paths(self) -> list[str]:
        return [self.job.path]

    def advance(self, answer: Any) -> Request | Together | None:
        if self._measures:
            answer = beside(answer, self.job.x)
        self._measures = False
        try:
            with locating(self.job.path):
                request = self._stages.send(answer)
                while True:
                    if isinstance(request, Together):
                        return request
                    if isinstance(request, Whole):
                        request = self._stages.send(request.rule.transform(request.array))
                        continue
                    if request.rule.checks:
                        self._checked.append(Checked([(self.job.path, request.rule)], request.value))
                    if request.rule.scope is not None:
                        self._measures = True
                        return Request(request.rule, [request.value])
                    request = self._stages.send(request.rule.combine([request.value]))
        except StopIteration as stop:
            self.result = stop.value
            return None

    def to_check(self) -> list[Checked]:
        return self._checked

    def outcome(self) -> Outcome:
        """The result, checked."""
        return _outcome(self.job, *self.result)


def step(jobs: Sequence[Job]) -> list[Outcome]:
    """Step arrays once, each by its rule itself.

    Raises NonFiniteError, naming the arrays, if a rule that checks its measure finds a fault (one synchronisation for
    all of them), and RuleError if a rule returns what it must not.
    """
    tracks = [Single(job) for job in jobs]
    with np.errstate(all="ignore"):  # overflow and division by zero give inf and NaN, as in torch
        run(tracks)
        return [track.outcome() for track in tracks]


def _outcome(job: Job, state: Any, dx: Any) -> Outcome:
    x = job.x
    state = _kept(state, job)
    if dx is None:
        return Outcome(state, None)
    own = dtype_name(x)
    dx = as_array(dx)
    if isinstance(dx, Assign):
        return Outcome(_apart(state, new := _laid_out(cast_to(dx.value, own), x)), new)
    if not kind(dx) or tuple(dx.shape) != tuple(x.shape):
        got = f"an array of shape {tuple(dx.shape)}" if kind(dx) else described(dx)
        msg = (
            f"{job.rule!r} returned {got} as the step of {job.path!r}; apply must return (state, step), the step an array of "
            f"shape {tuple(x.shape)}, or None"
        )
        raise RuleError(msg)
    return Outcome(state, _laid_out(cast_to(cast_to(x, working_dtype(own)) - dx, own), x))


def _kept(state: Any, job: Job) -> Any:
    """The new state, checked; arrays that are the caller's own gradient or parameter are copied, since those may change."""
    leaves = state_leaves(state)
    borrowed = False
    taken = {memory_key(job.dx), memory_key(job.x)} - {None}
    for leaf in leaves:
        if type(leaf) is float or type(leaf) is int:
            continue
        if kind(leaf) is None and not is_number(leaf):
            check_state(state, job.rule, job.path)
        borrowed = borrowed or leaf is job.dx or leaf is job.x or memory_key(leaf) in taken
    if not borrowed:
        return state

    def owned(leaf: Any) -> Any:
        return copied(leaf) if leaf is job.dx or leaf is job.x or memory_key(leaf) in taken else leaf

    return map_state(owned, state)


def _apart(state: Any, new: Any) -> Any:
    """The state without memory of the new parameter, which the caller may write to."""
    taken = memory_key(new)

    def owned(leaf: Any) -> Any:
        shared = leaf is new or (taken is not None and kind(leaf) and memory_key(leaf) == taken)
        return copied(leaf) if shared else leaf

    return map_state(owned, state)


def check_state(state: Any, rule: AbstractRule, path: str) -> None:
    """Raise RuleError unless the state is made of what a state may hold."""

    def check(leaf: Any) -> None:
        if kind(leaf) is None and not is_number(leaf):
            msg = (
                f"{rule!r} keeps {described(leaf)} in the state of {path!r}; a state is made of arrays and numbers in tuples, "
                "lists and dicts, or is None"
            )
            raise RuleError(msg)

    map_state(check, state)


def _laid_out(new: Any, x: Any) -> Any:
    """new with the strides of x, which NumPy loses where operands differ in layout."""
    new = as_array(new)
    if isinstance(new, np.ndarray) and new.strides != x.strides:
        out = np.empty_like(x)
        out[...] = new
        return out
    return new


# --- what is kept ---


def entry_after(entry: Entry, outcome: Outcome | None, lease: Lease, *, consume: bool) -> Entry:
    """The entry after a step; what was not stepped still shares its arrays with the old state, unless that is consumed."""
    if outcome is None:
        return entry.replace(lease=lease) if consume else entry
    numbers = numbers_in(outcome.state)
    state = outcome.state if consume else _unshared(outcome.state, entry.state)
    return entry.replace(state=state, numbers=entry.numbers if len(numbers) == len(entry.numbers) else numbers, lease=lease)


def _unshared(state: Any, old: Any) -> Any:
    """A new state without the arrays of the old one: a step in place may write to it later, and the old one is to stay."""
    given = {id(leaf) for leaf in state_leaves(old) if kind(leaf)}
    if given.isdisjoint(map(id, state_leaves(state))):
        return state
    return map_state(lambda leaf: copied(leaf) if id(leaf) in given else leaf, state)
