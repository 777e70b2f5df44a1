"""Tracks taken to their end side by side: each stops where it needs a number that others have a part in.

Nothing is written: at the end each track knows what is to come, and nothing at all is known if a check fails.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ...arrays import kind
from ...errors import RuleError
from ...rules._base import AbstractRule, MeasuringRule, Together, walk
from ..shards.measures import Unfinished, finished
from .checks import Checked, check
from .stacks import answers


class Request(NamedTuple):
    """A measure of one array or of many, to be combined over a scope."""

    rule: MeasuringRule
    values: Iterable[tuple[Any, ...]]


class Track(ABC):
    """One array, or a group of them, on the way through its rule. It stops wherever others have to come so far."""

    rule: AbstractRule
    passed: Counter[str]

    @abstractmethod
    def advance(self, answer: Any) -> Request | Together | Unfinished | None:
        """Go on, with the answer to what was asked for last: a combined measure, a (new state, step), or sums of whole arrays.

        None at the end.
        """

    @abstractmethod
    def paths(self) -> list[str]:
        """The arrays on this track, for errors."""

    def combined(self, request: Request) -> tuple[Any, ...] | None:  # noqa: ARG002 (of those who can)
        """The measures of all its arrays as one, if it can combine them itself; asked if no others are in the scope."""
        return None

    def faults(self) -> list[str]:
        """What is wrong with measures that lie on the host."""
        return []

    def to_check(self) -> list[Checked]:
        """Measures that are to be checked once they are read from where they lie, all of them together."""
        return []


def run(tracks: Sequence[Track]) -> None:
    """Take all tracks to their end, side by side; NonFiniteError if a check finds a fault. Nothing is written."""
    waiting: dict[int, Request] = {}
    stackable: dict[int, Together] = {}
    unfinished: dict[int, Unfinished] = {}

    def advance(i: int, answer: Any) -> None:
        request = tracks[i].advance(answer)
        if isinstance(request, Unfinished):
            unfinished[i] = request
        elif isinstance(request, Together):
            stackable[i] = request
        elif request is not None:
            waiting[i] = request

    for i in range(len(tracks)):
        advance(i, None)
    while waiting or stackable or unfinished:
        if unfinished:
            cut, unfinished = unfinished, {}
            for i, sums in zip(cut, finished(list(cut.values())), strict=True):
                advance(i, sums)
            continue
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
    check([fault for track in tracks for fault in track.faults()], [found for track in tracks for found in track.to_check()])


def _next_scope(tracks: Sequence[Track], waiting: dict[int, Request]) -> str:
    """A scope that no waiting array will come to later: then all its members are here."""
    grouped = {id(rule): _scopes(rule) for rule in {id(track.rule): track.rule for track in tracks}.values()}
    ahead = {i: grouped[id(tracks[i].rule)] - tracks[i].passed for i in waiting}
    present = {i: str(request.rule.scope) for i, request in waiting.items()}
    for scope in present.values():
        if all(present[i] == scope or ahead[i][scope] == 0 for i in waiting):
            return scope
    paths = ", ".join(repr(tracks[i].paths()[0]) for i in list(waiting)[:4])
    scopes = " and ".join(sorted(set(present.values())))
    msg = f"the chains of {paths} hold {scopes} in opposite orders, so none can be measured first; use one order in all"
    raise RuleError(msg)


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
