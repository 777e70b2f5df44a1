"""Skipping steps with infinite or NaN gradients, as the loss scaling of Micikevicius et al. 2018 does, https://arxiv.org/abs/1710.03740."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...arrays import Array, count_nonfinite, read_int, stack
from .._base import MeasuredRule, State


class Skips(NamedTuple):
    """How often an array was not stepped, and how often its own gradient was a reason."""

    steps: int
    culprit: int


@dataclass(frozen=True)
class SkipNonFinite(MeasuredRule):
    """No step for any array of the group where a gradient of one of them holds an infinite or NaN element.

    A skipped step leaves everything behind it in its chain as it is, and a Scheduled around it does not count it. Arrays
    that are frozen or have no gradient in this step are not looked at. What is looked at is what reaches the rule: put it
    first in a chain, since clipping a gradient with ``throw=True`` raises instead.

    Args:
        group: which arrays are skipped together.

    State: Skips(steps, culprit): the number of steps skipped by the group, and of those in which this very array had a
    non-finite gradient. `optimisers.skipped` reads them by path. The decision is taken on the host: one
    synchronisation a step for the whole group (and one for each array when a step is skipped, to find the culprits). So it
    does not work inside torch.func transforms and torch.compile, which raise RuleError.
    """

    group: str = ""

    @property
    def scope(self) -> str:
        return f"SkipNonFinite(group={self.group!r})"

    def init(self, x: Array) -> State:
        return Skips(0, 0)

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return (count_nonfinite(dx),)

    def combine(self, measures: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        return (read_int(stack([count for (count,) in measures]).sum(), "SkipNonFinite"),)

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array | None]:
        (total,) = measure
        if total == 0:
            return state, dx
        steps, culprit = state
        guilty = read_int(count_nonfinite(dx), "SkipNonFinite") > 0
        return Skips(steps + 1, culprit + guilty), None
