"""What a step in place writes.

Everything is made ready before the first write: memory, results, addresses. What is left are calls that need nothing more,
made by one call into C, so that no handler of a signal runs between two of them. Each of them may be made again: loops go on
where they were, and what was copied is copied once more. So whatever is raised among them does not stop the step, which is
finished first.

Whole matrices are transformed in portions, since all at once would take as much memory as the parameters. One of the later
portions may fail after others were written. Then everything else is written all the same, and it is known what was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import call
from typing import Any, NamedTuple

import numpy as np

PORTION = 2**22
"""Elements that are made ready together. What is not more than this fails before anything is written, or not at all."""

_TRIES = 2  # of what fails, not counting interrupts


class Write(NamedTuple):
    """One call, which may be made again, and the slots of what it writes. ``kept`` is to live until then."""

    call: Callable[[], Any]
    slots: Sequence[int] = ()
    kept: Any = None


class Portion(NamedTuple):
    """Writes that are made ready when their turn comes, which needs memory for so many elements."""

    slots: Sequence[int]
    size: int
    make: Callable[[], list[Write]]


class _Stage(NamedTuple):
    """How far it has come. It is exchanged as a whole, so that it is true at any time."""

    ready: list[Write]
    calls: list[Callable[[], Any]]
    made: list[Any]
    """What the calls have returned, as far as they were made."""
    taken: int
    """How many portions were made ready."""
    later: bool
    """Whether anything was written in an earlier stage."""


class Writes:
    """The writes of one step, in their order: those that are ready, portions, what comes after them, and notes at the end."""

    def __init__(self) -> None:
        self.ready: list[Write] = []
        self.portions: list[Portion] = []
        self.after: list[Write] = []
        self.notes: list[Write] = []
        self._stage: _Stage | None = None
        self._at_once = PORTION

    def note(self, function: Callable[..., Any], *args: Any) -> None:
        """Have something noted when all is written."""
        self.notes.append(Write(partial(function, *args)))

    @property
    def begun(self) -> bool:
        """Whether anything was written."""
        stage = self._stage
        if stage is None:
            return False
        ahead = stage.ready[len(stage.made) : len(stage.made) + 1]
        return stage.later or bool(stage.made) or any(getattr(write.call, "begun", False) for write in ahead)

    def run(self) -> None:
        """Make ready and write. After an error it may be called again, and goes on where it was."""
        stage = self._stage
        while True:
            if stage is None or len(stage.made) == len(stage.calls):
                if stage is not None and stage.taken > len(self.portions):
                    return
                self._stage = stage = self._next(stage)
            stage.made.extend(map(call, stage.calls[len(stage.made) :]))

    def _next(self, stage: _Stage | None) -> _Stage:
        """The next calls: as many portions as may be ready together, and at the very end the notes."""
        if stage is None:
            taken, ready = 0, list(self.ready)
        else:
            taken, ready = stage.taken, []
            self._stage = stage = _Stage([], [], [], taken, later=True)  # lets go of what was made ready for the last one
        if taken < len(self.portions):
            with np.errstate(all="ignore"):
                taken = self._make(ready, taken)
        if taken == len(self.portions):
            ready += self.after
            ready += self.notes
            taken += 1
        return _Stage(ready, [write.call for write in ready], [], taken, later=stage is not None)

    def _make(self, ready: list[Write], taken: int) -> int:
        """Make portions ready. How many are, altogether."""
        size = 0
        while taken < len(self.portions) and (not size or size + self.portions[taken].size <= self._at_once):
            size += self.portions[taken].size
            ready += self.portions[taken].make()
            taken += 1
        return taken

    def finish(self) -> tuple[set[int], BaseException | None]:
        """Go on after an error, whatever is raised again. The slots that could not be written, and why."""
        missing: set[int] = set()
        reason: BaseException | None = None
        at: Any = None
        failures = 0
        self._at_once = 0  # so that it is known which one fails
        while True:
            try:
                self.run()
            except Exception as error:  # noqa: BLE001 (it is given to the caller)
                stage: Any = self._stage
                here = stage.taken, len(stage.made), len(stage.ready)
                failures = failures + 1 if here == at else 1
                at = here
                if failures == _TRIES:
                    reason = error
                    missing.update(self._skipped())
            except BaseException:  # noqa: BLE001, S112 (an interrupt, which is raised again by the caller)
                continue
            else:
                return missing, reason

    def _skipped(self) -> Iterable[int]:
        """Leave out what cannot be made ready or written. Its slots."""
        stage: Any = self._stage
        if len(stage.made) < len(stage.ready):
            stage.made.append(None)
            left_out: Write = stage.ready[len(stage.made) - 1]
            return left_out.slots
        self._stage = stage._replace(taken=stage.taken + 1)
        portion: Portion = self.portions[stage.taken]
        return portion.slots
