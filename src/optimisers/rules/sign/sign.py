"""The sign of what comes, as a member of a chain: signSGD of Bernstein et al. 2018, https://arxiv.org/abs/1802.04434."""

from __future__ import annotations

from dataclasses import dataclass

from ...arrays import Array, sign
from .._base import AbstractRule, State


@dataclass(frozen=True)
class Sign(AbstractRule):
    """Gives the sign of each element; of complex numbers their phase. ``OptimiserChain(Sign(), Descent(eta))`` is signSGD.

    State: None.
    """

    law = "elementwise"

    def init(self, x: Array) -> State:
        return None

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        return state, sign(dx)
