"""Gradient centralisation: Yong et al. 2020, https://arxiv.org/abs/2004.01461."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ...arrays import Array, sum_over
from .._base import AbstractRule, State
from .._fields import Interval, bounded


@dataclass(frozen=True)
class Centralise(AbstractRule):
    """Takes from the gradient of each output unit its mean, in arrays of two dimensions or more; vectors go on as they are.

    Units are counted by the first axis, as in ``(out, in)`` matrices and ``(out, in, height, width)`` kernels.

    State: None.
    """

    _: dataclasses.KW_ONLY
    _batch: int = bounded(0, range=Interval(0, integer=True), repr=False)  # leading axes that only stack arrays

    law = "stackable"
    structural = ("_batch",)

    def stacked(self) -> Centralise:
        return self.replace(_batch=self._batch + 1)

    def init(self, x: Array) -> State:
        return None

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        axes = tuple(range(self._batch + 1, dx.ndim))
        if not axes:
            return state, dx
        return state, dx - sum_over(dx, axes) / max(1, math.prod(dx.shape[self._batch + 1 :]))
