"""Gradient noise: Neelakantan et al. 2015, https://arxiv.org/abs/1511.06807."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, cast_to, dtype_name, kind, normal, sqrt
from .._base import AbstractRule, State
from .._fields import EXPONENT, NON_NEGATIVE, Interval, bounded
from .._seeds import stream_key


@dataclass(frozen=True)
class GradientNoise(AbstractRule):
    """Adds Gaussian noise to the gradient, of variance ``variance / (1 + t)**decay`` at step t = 0, 1, ...

    Args:
        variance: that of the first step, >= 0.
        decay: how quickly it falls, in [0, 16].
        seed: with the parameter's path it makes the key of the random stream, >= 0.

    State: (t, key). The noise is a pure function of key, step and place, the same on every device: to resume is to repeat.
    Complex arrays are refused.
    """

    variance: Any = bounded(0.01, range=NON_NEGATIVE)
    decay: Any = bounded(0.55, range=EXPONENT)
    seed: int = bounded(0, range=Interval(0, integer=True))
    _: dataclasses.KW_ONLY
    _key: int | None = dataclasses.field(default=None, repr=False)  # made at setup

    structural = ("seed", "_key")
    real_only = True

    def resolved(self, x: Array, path: str) -> GradientNoise:
        return self.replace(_key=stream_key(f"GradientNoise:{self.seed}:{path}"))

    def unresolved(self) -> GradientNoise:
        return self.replace(_key=None)

    def init(self, x: Array) -> State:
        return 0, self._key if self._key is not None else self.resolved(x, "")._key

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        t, key = state
        noise = cast_to(normal(key, t, tuple(dx.shape), dx), dtype_name(dx))
        count = cast_to(t + 1, "float64") if kind(t) else t + 1
        return (t + 1, key), dx + sqrt(self.variance / count**self.decay) * noise
