"""Adaptive gradient clipping: Brock et al. 2021 (NFNets), https://arxiv.org/abs/2102.06171."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, absolute, maximum, sqrt, sum_over, where
from .._base import AbstractRule, State
from .._fields import POSITIVE, Choice, Interval, bounded


@dataclass(frozen=True)
class AdaptiveClip(AbstractRule):
    """Scales the gradient of each output unit down to a part of the norm of its weights.

    A unit is a row of a matrix, ``(in, height, width)`` of a kernel, and all of an array with but one dimension longer than 1.

    Args:
        clipping: greatest ratio of the two norms, > 0.
        epsilon: least norm of weights that counts, so that zeros can be left, > 0.
        layout: ``"out_in"``: units are counted by the first axis, as in torch; ``"in_out"``: by the last, as in JAX.

    State: None.
    """

    clipping: Any = bounded(0.01, range=POSITIVE)
    epsilon: Any = bounded(1e-3, range=POSITIVE)
    layout: str = bounded("out_in", range=Choice(("out_in", "in_out")))
    _: dataclasses.KW_ONLY
    _batch: int = bounded(0, range=Interval(0, integer=True), repr=False)  # leading axes that only stack arrays

    law = "stackable"
    structural = ("_batch",)

    def stacked(self) -> AdaptiveClip:
        return self.replace(_batch=self._batch + 1)

    def init(self, x: Array) -> State:
        return None

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        length = self._norms(dx)
        most = self.clipping * maximum(self._norms(x), self.epsilon)
        return state, dx * where(length > most, most / maximum(length, 1e-6), 1 + 0 * length)

    def _norms(self, x: Array) -> Array:
        """The norm of each unit, along axes of length 1."""
        axes = tuple(range(self._batch, x.ndim))
        if sum(n != 1 for n in x.shape[self._batch :]) > 1:
            axes = axes[1:] if self.layout == "out_in" else axes[:-1]
        return sqrt(sum_over(abs2(x), axes)) if axes else absolute(x)
