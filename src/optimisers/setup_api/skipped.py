"""``skipped``: what `SkipNonFinite` has counted."""

from __future__ import annotations

from ..errors import ArgumentError, described
from ..rules._states import find_state
from ..rules.gradients.skipnonfinite import Skips
from ..tree.state import StateTree, check_alive


def skipped(state: StateTree) -> dict[str, Skips]:
    """For every path whose rule holds a `SkipNonFinite`: (steps skipped, steps in which it was a culprit).

    ``[path for path, (_, culprit) in skipped(state).items() if culprit]`` names the culprits. Counts start at setup.
    """
    if not isinstance(state, StateTree):
        msg = f"skipped: expected the state that setup returned, got {described(state)}"
        raise ArgumentError(msg)
    check_alive(state)
    found = {slot.path: find_state(entry.state, Skips) for slot, entry in zip(state._slots, state._entries, strict=True)}
    return {path: Skips(int(s.steps), int(s.culprit)) for path, s in found.items() if s is not None}
