"""An array that is cut over ranks, under a rule that needs it whole: put together for the step, and cut again."""

from __future__ import annotations

from typing import Any

from ...rules._base import Together
from ...rules._states import map_state
from ...tree.sharding import Sharding, cut_state, whole
from .scheduler import Request
from .single import Job, Outcome, Single


class Gathered(Single):
    """One such array. Every rank takes the whole step; only this one is held whole meanwhile, unless the rule measures."""

    def __init__(self, job: Job, sharding: Sharding) -> None:
        super().__init__(job)
        self._sharding = sharding
        self._begun = False
        self._outcome: Outcome | None = None

    def advance(self, answer: Any) -> Request | Together | None:
        if not self._begun:
            self._begun, cut = True, self.job
            x, dx = (whole(self._sharding.of_parts(part)) for part in (cut.x, cut.dx))
            super().__init__(cut._replace(state=map_state(whole, cut.state), x=x, dx=dx))
        request = super().advance(answer)
        if request is None:
            found = super().outcome()
            new = None if found.x is None else self._sharding.part_of(found.x)
            self._outcome = Outcome(cut_state(found.state, self._sharding), new)
            self.result = None
            self.job = self.job._replace(state=None, x=None, dx=None)
        return request

    def outcome(self) -> Outcome:
        outcome: Any = self._outcome
        return outcome  # type: ignore[no-any-return]
