"""One step of many arrays, each by its own rule: measures are combined where rules ask for it, faults found at the end.

Nothing is written: the caller is given new states and new parameters, and nothing at all if a check fails.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ...arrays import as_array, can_read, cast_to, copied, dtype_name, is_number, kind, memory_key, working_dtype
from ...errors import NonFiniteError, RuleError, described, locating
from ...rules._base import AbstractRule, Assign, Measurement, MeasuringRule, Stages, Together, Whole, walk
from ...rules._precision import in_working_precision, map_state, state_leaves
from .stacks import answers


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


class Request(NamedTuple):
    """A measure of one array or of many, to be combined over a scope."""

    rule: MeasuringRule
    values: Iterable[tuple[Any, ...]]


class Track(ABC):
    """One array, or a group of them, on the way through its rule. It stops wherever others have to come so far."""

    rule: AbstractRule
    passed: Counter[str]

    @abstractmethod
    def advance(self, answer: Any) -> Request | Together | None:
        """Go on, with the answer to what was asked for last: a combined measure, or a (new state, step). None at the end."""

    @abstractmethod
    def paths(self) -> list[str]:
        """The arrays on this track, for errors."""

    def combined(self, request: Request) -> tuple[Any, ...] | None:  # noqa: ARG002 (of those who can)
        """The measures of all its arrays as one, if it can combine them itself; asked if no others are in the scope."""
        return None

    def finite_checks(self) -> list[str]:
        """Faults that can be told without reading anything from a device."""
        return []

    def to_read(self) -> list[tuple[list[tuple[str, Any]], list[Any]]]:
        """Measures that are to be checked: (path and rule of each array, for each number of the measure a vector of them)."""
        return []


class Single(Track):
    """One array, stepped by the rule itself."""

    def __init__(self, job: Job) -> None:
        self.job, self.rule = job, job.rule
        self.passed = Counter()
        self.checks: list[Measurement] = []
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
                        self.checks.append(request)
                    if request.rule.scope is not None:
                        self._measures = True
                        return Request(request.rule, [request.value])
                    request = self._stages.send(request.rule.combine([request.value]))
        except StopIteration as stop:
            self.result = stop.value
            return None

    def outcome(self) -> Outcome:
        """The result, checked."""
        return _outcome(self.job, *self.result)


def step(jobs: Sequence[Job]) -> list[Outcome]:
    """Step arrays once, each by its rule itself.

    Raises NonFiniteError, naming the arrays, if a rule that checks its measure finds a fault (one synchronisation for
    all of them), and RuleError if a rule returns what it must not.
    """
    tracks = [Single(job) for job in jobs]
    with quiet(jobs):
        run(tracks)
        return [track.outcome() for track in tracks]


def quiet(jobs: Sequence[Job]) -> AbstractContextManager[Any]:
    """NumPy without warnings: overflow and division by zero give inf and NaN, as in torch."""
    return np.errstate(all="ignore") if any(isinstance(job.x, np.ndarray) for job in jobs) else nullcontext()


def run(tracks: Sequence[Track]) -> None:
    """Take all tracks to their end, side by side; NonFiniteError if a check finds a fault. Nothing is written."""
    waiting: dict[int, Request] = {}
    stackable: dict[int, Together] = {}

    def advance(i: int, answer: Any) -> None:
        request = tracks[i].advance(answer)
        if isinstance(request, Together):
            stackable[i] = request
        elif request is not None:
            waiting[i] = request

    for i in range(len(tracks)):
        advance(i, None)
    while waiting or stackable:
        if stackable:
            asked, stackable = stackable, {}
            found = answers(list(asked.values()), [tracks[i].paths()[0] for i in asked])
            for i, answer in zip(asked, found, strict=True):
                advance(i, answer)
            continue
        scope = _next_scope(tracks, waiting)
        members = [i for i, request in waiting.items() if request.rule.scope == scope]
        requests = [waiting.pop(i) for i in members]
        combined = tracks[members[0]].combined(requests[0]) if len(members) == 1 else None
        if combined is None:
            combined = requests[0].rule.combine(_on_one_device([value for request in requests for value in request.values]))
        for i in members:
            tracks[i].passed[scope] += 1
            advance(i, combined)
    _check(tracks)


def _next_scope(tracks: Sequence[Track], waiting: dict[int, Request]) -> str:
    """A scope that no waiting array will come to later: then all its members are here."""
    held = {id(rule): _scopes(rule) for rule in {id(track.rule): track.rule for track in tracks}.values()}
    ahead = {i: held[id(tracks[i].rule)] - tracks[i].passed for i in waiting}
    present = {i: str(request.rule.scope) for i, request in waiting.items()}
    for scope in present.values():
        if all(present[i] == scope or ahead[i][scope] == 0 for i in waiting):
            return scope
    paths = ", ".join(repr(tracks[i].paths()[0]) for i in list(waiting)[:4])
    scopes = " and ".join(sorted(set(present.values())))
    msg = f"the chains of {paths} hold {scopes} in opposite orders, so none can be measured first; use one order in all"
    raise RuleError(msg)


def _check(tracks: Sequence[Track]) -> None:
    singles = [track for track in tracks if isinstance(track, Single)]
    checks = [(t.job.path, r) for t in singles for r in t.checks if all(can_read(value) for value in r.value)]
    faults = [fault for track in tracks for fault in track.finite_checks()]
    vectors = [(at, values) for track in tracks for at, values in track.to_read() if all(map(can_read, values))]
    if not (checks or faults or vectors):
        return
    measures = [*(r.value for _, r in checks), *(tuple(v for v in values) for _, values in vectors)]
    read = iter(_numbers([value for measure in measures for value in measure]))
    found = [(path, r.rule, tuple(next(read)[0] for _ in r.value)) for path, r in checks]
    for at, values in vectors:
        rows = zip(*(next(read) for _ in values), strict=True)
        found += [(path, rule, row) for (path, rule), row in zip(at, rows, strict=True)]
    for path, rule, numbers in found:
        fault = rule.fault(numbers)
        if fault is not None:
            faults.append(f"{type(rule).__name__} at {path!r}: {fault}")
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        advice = "Nothing was changed. Look at these gradients, skip the step, or set throw=False to let them through"
        raise NonFiniteError("\n".join(faults[:5]) + more + f"\n{advice}")


def _scopes(rule: AbstractRule) -> Counter[str]:
    return Counter(r.scope for r in walk(rule) if isinstance(r, MeasuringRule) and r.scope is not None)


def _on_one_device(measures: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    first = next((value for measure in measures for value in measure if kind(value) == "torch"), None)
    if first is None:
        return measures
    return [tuple(v.to(first.device) if kind(v) == "torch" else v for v in measure) for measure in measures]


def beside(measure: tuple[Any, ...], x: Any) -> tuple[Any, ...]:
    """A combined measure as a rule for x computes with it."""
    if kind(x) != "torch":
        return tuple(v.item() if kind(v) == "torch" else v for v in measure)  # a tree of both kinds
    return tuple(v.to(x.device) if kind(v) == "torch" else v for v in measure)


def read_all(measures: Sequence[tuple[Any, ...]]) -> list[tuple[float, ...]]:
    """The measures as Python floats, with one synchronisation for each device."""
    read = iter(_numbers([value for measure in measures for value in measure]))
    return [tuple(next(read)[0] for _ in measure) for measure in measures]


def _numbers(values: Sequence[Any]) -> list[list[float]]:
    """The numbers in each of many numbers and vectors, with one synchronisation for each device."""
    by_device: defaultdict[Any, list[int]] = defaultdict(list)
    read = [[] if kind(value) == "torch" else [float(value)] for value in values]
    for i, value in enumerate(values):
        if kind(value) == "torch":
            by_device[value.device].append(i)
    for chosen in by_device.values():
        import torch

        joined = torch.cat([values[i].detach().to(torch.float64).reshape(-1) for i in chosen])
        # A subclass that wraps other tensors has no list of its numbers, only one after another.
        numbers = iter(joined.tolist() if type(joined) is torch.Tensor else [number.item() for number in joined])
        for i in chosen:
            read[i] = list(islice(numbers, values[i].numel()))
    return read


def _outcome(job: Job, state: Any, dx: Any) -> Outcome:
    x = job.x
    state = _kept(state, job)
    if dx is None:
        return Outcome(state, None)
    own = dtype_name(x)
    dx = as_array(dx)
    if isinstance(dx, Assign):
        return Outcome(state, _laid_out(cast_to(dx.value, own), x))
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
