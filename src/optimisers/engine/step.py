"""One step of many arrays, each by its own rule: measures are combined where rules ask for it, faults found at the end.

Nothing is written: the caller is given new states and new parameters, and nothing at all if a check fails.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import as_array, can_read, cast_to, copied, dtype_name, is_number, kind, memory_key, working_dtype
from ..errors import NonFiniteError, RuleError, described, locating
from ..rules._base import AbstractRule, Assign, MeasuredRule, Measurement, Stages, Together, walk
from ..rules._precision import in_working_precision, map_state, state_leaves
from .stacked import answers


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


def step(jobs: Sequence[Job]) -> list[Outcome]:
    """Step all arrays once.

    Raises NonFiniteError, naming the arrays, if a rule that checks its measure finds a fault (one synchronisation for
    all of them), and RuleError if a rule returns what it must not.
    """
    if any(isinstance(job.x, np.ndarray) for job in jobs):
        with np.errstate(all="ignore"):  # overflow and division by zero give inf and NaN, as in torch
            return _Run(jobs).outcomes()
    return _Run(jobs).outcomes()


class _Run:
    """The stages of all jobs, run side by side: each until it ends or has to wait for others of its scope."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.stages: list[Stages] = [in_working_precision(job.rule, job.state, job.x, job.dx) for job in jobs]
        self.results: list[Any] = [None] * len(jobs)
        self.waiting: dict[int, Measurement] = {}
        self.stackable: dict[int, Together] = {}
        self.checks: list[tuple[int, Measurement]] = []
        self.passed: list[Counter[str]] = [Counter() for _ in jobs]

    def outcomes(self) -> list[Outcome]:
        for i in range(len(self.jobs)):
            self._advance(i, None)
        while self.waiting or self.stackable:
            if self.stackable:
                self._step_together()
            else:
                self._release(self._next_scope())
        self._check()
        return [_outcome(job, *result) for job, result in zip(self.jobs, self.results, strict=True)]

    def _advance(self, i: int, answer: tuple[Any, ...] | None) -> None:
        try:
            with locating(self.jobs[i].path):
                request = self.stages[i].send(answer)
                while True:
                    if isinstance(request, Together):
                        self.stackable[i] = request
                        return
                    if request.rule.checks:
                        self.checks.append((i, request))
                    if request.rule.scope is not None:
                        self.waiting[i] = request
                        return
                    request = self.stages[i].send(request.rule.combine([request.value]))
        except StopIteration as stop:
            self.results[i] = stop.value

    def _step_together(self) -> None:
        requests, self.stackable = self.stackable, {}
        found = answers(list(requests.values()), [self.jobs[i].path for i in requests])
        for i, answer in zip(requests, found, strict=True):
            self._advance(i, answer)

    def _release(self, scope: str) -> None:
        members = [i for i, request in self.waiting.items() if request.rule.scope == scope]
        requests = [self.waiting.pop(i) for i in members]
        combined = requests[0].rule.combine(_on_one_device([request.value for request in requests]))
        for i in members:
            self.passed[i][scope] += 1
            self._advance(i, _beside(combined, self.jobs[i].x))

    def _next_scope(self) -> str:
        """A scope that no waiting array will come to later: then all its members are here."""
        held = {id(rule): _scopes(rule) for rule in {id(job.rule): job.rule for job in self.jobs}.values()}
        ahead = {i: held[id(self.jobs[i].rule)] - self.passed[i] for i in self.waiting}
        present = {i: str(request.rule.scope) for i, request in self.waiting.items()}
        for scope in present.values():
            if all(present[i] == scope or ahead[i][scope] == 0 for i in self.waiting):
                return scope
        paths = ", ".join(repr(self.jobs[i].path) for i in list(self.waiting)[:4])
        scopes = " and ".join(sorted(set(present.values())))
        msg = f"the chains of {paths} hold {scopes} in opposite orders, so none can be measured first; use one order in all"
        raise RuleError(msg)

    def _check(self) -> None:
        checks = [(i, r) for i, r in self.checks if all(can_read(value) for value in r.value)]
        faults = []
        for (i, request), values in zip(checks, read_all([r.value for _, r in checks]), strict=True):
            fault = request.rule.fault(values)
            if fault is not None:
                faults.append(f"{type(request.rule).__name__} at {self.jobs[i].path!r}: {fault}")
        if faults:
            more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
            advice = "Nothing was changed. Look at these gradients, skip the step, or set throw=False to let them through"
            raise NonFiniteError("\n".join(faults[:5]) + more + f"\n{advice}")


def _scopes(rule: AbstractRule) -> Counter[str]:
    return Counter(r.scope for r in walk(rule) if isinstance(r, MeasuredRule) and r.scope is not None)


def _on_one_device(measures: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    first = next((value for measure in measures for value in measure if kind(value) == "torch"), None)
    if first is None:
        return measures
    return [tuple(v.to(first.device) if kind(v) == "torch" else v for v in measure) for measure in measures]


def _beside(measure: tuple[Any, ...], x: Any) -> tuple[Any, ...]:
    if kind(x) != "torch":
        return tuple(v.item() if kind(v) == "torch" else v for v in measure)  # a tree of both kinds
    return tuple(v.to(x.device) if kind(v) == "torch" else v for v in measure)


def read_all(measures: Sequence[tuple[Any, ...]]) -> list[tuple[float, ...]]:
    """The measures as Python floats, with one synchronisation for each device."""
    by_device: defaultdict[Any, list[Any]] = defaultdict(list)
    for value in (value for measure in measures for value in measure):
        if kind(value) == "torch":
            by_device[value.device].append(value)
    read: dict[int, float] = {}
    for values in by_device.values():
        import torch

        numbers = torch.stack([value.detach().to(torch.float64) for value in values]).tolist()
        read.update({id(value): number for value, number in zip(values, numbers, strict=True)})
    return [tuple(read[id(v)] if id(v) in read else float(v) for v in measure) for measure in measures]


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
