"""The entries of a tree by kinds of rule, so that a change of rules costs what there are kinds of."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, final

from ..rules._base import AbstractRule
from .entry import Entry


class Rules(NamedTuple):
    """A rule for each of many arrays, most of which share one."""

    distinct: Sequence[Any]
    kinds: Sequence[int]
    """For each array the number of its rule."""

    @staticmethod
    def sharing(rules: Sequence[AbstractRule | None]) -> Rules:
        """Rules that are given array by array, the same object once."""
        kinds: dict[int, int] = {}
        index = [kinds.setdefault(id(rule), len(kinds)) for rule in rules]
        return Rules([rules[i] for i in _firsts(index)], index)

    def of(self, i: int) -> Any:
        """The rule of one array."""
        return self.distinct[self.kinds[i]]

    def each(self) -> Iterator[Any]:
        """The rule of every array."""
        return map(self.distinct.__getitem__, self.kinds)

    def at(self, places: Iterable[int]) -> Rules:
        """The rules of some of the arrays."""
        return Rules(self.distinct, list(map(self.kinds.__getitem__, places)))


@final
class Heads:
    """The entries of a tree. Immutable.

    Slots with one rule, and one rule at setup, are of one kind. Other rules for the kinds make new heads without looking at
    a slot: the entries that show them are made when somebody asks for them.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.given = tuple(entries)
        """The entries, but their rules may be out of date."""
        self._changed = False
        self._shown: tuple[Entry, ...] | None = None

    @cached_property
    def rules(self) -> Rules:
        """The rule of each slot, by kinds."""
        kinds: dict[tuple[int, int], int] = {}
        index = [kinds.setdefault((id(entry.rule), id(entry.base)), len(kinds)) for entry in self.given]
        return Rules([self.given[i].rule for i in _firsts(index)], index)

    @cached_property
    def firsts(self) -> list[int]:
        """The first slot of each kind."""
        return _firsts(self.rules.kinds)

    @cached_property
    def idle(self) -> list[int]:
        """The slots that take no step, whatever their gradients."""
        return [i for i, entry in enumerate(self.given) if entry.frozen or entry.rule is None]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries, for each slot one."""
        # Not a cached_property, whose lock torch's compiler does not know.
        if not self._changed:
            return self.given
        if self._shown is None:
            self._shown = tuple(
                entry if entry.rule is rule else entry.replace(rule=rule)
                for entry, rule in zip(self.given, self.rules.each(), strict=True)
            )
        return self._shown

    def at(self, i: int) -> Entry:
        """The entry of one slot."""
        entry = self.given[i]
        if not self._changed:
            return entry
        rule = self.rules.of(i)
        return entry if entry.rule is rule else entry.replace(rule=rule)

    def with_states(self, changed: Mapping[int, Entry]) -> Heads:
        """The same with other states in some entries; their rules are what they were."""
        given = list(self.given)
        for i, entry in changed.items():
            given[i] = entry
        new = Heads(given)
        new.rules, new.firsts, new.idle = self.rules, self.firsts, self.idle
        new._changed = self._changed
        return new

    def split(self, labels: Sequence[Hashable]) -> Heads:
        """The same, with kinds of which all slots have one label."""
        index = self.rules.kinds
        kinds = {pair: number for number, pair in enumerate(dict.fromkeys(zip(index, labels, strict=True)))}
        if len(kinds) == len(self.rules.distinct):
            return self
        new = Heads(self.given)
        new.rules = Rules([self.rules.distinct[k] for k, _ in kinds], [kinds[pair] for pair in zip(index, labels, strict=True)])
        new._changed = self._changed
        return new

    def with_rules(self, distinct: Sequence[AbstractRule | None]) -> Heads:
        """The same with another rule for each kind."""
        new = Heads(self.given)
        new.rules, new.firsts, new.idle = self.rules._replace(distinct=distinct), self.firsts, self.idle
        new._changed = True
        return new


def _firsts(index: Sequence[int]) -> list[int]:
    """Where each number stands first, if they come in their order."""
    first = dict(zip(reversed(index), range(len(index) - 1, -1, -1), strict=True))
    return [first[k] for k in range(len(first))]
