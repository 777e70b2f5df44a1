"""Stochastic rounding: Gupta et al. 2015, https://arxiv.org/abs/1502.02551; for bfloat16 Zamirai et al. 2020, https://arxiv.org/abs/2010.06192."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...arrays import Array, cast_to, dtype_name, rounded_at_random
from ...errors import RuleError
from .._base import AbstractRule, Assign, Law, Stages, State, stages_of, stepped, walk
from .._fields import Interval, bounded
from .._seeds import stream_key
from .._wrapper import Wrapper
from .mixedprecision import MixedPrecision


@dataclass(frozen=True)
class StochasticRounding(Wrapper):
    """Rounds new bfloat16 parameters up or down at random, so that steps too small for the nearest value add up.

    A float32 result y between neighbours a < b in bfloat16 becomes b with probability (y - a) / (b - a), else a: its mean
    is y. It costs no memory, where the master copy of `MixedPrecision` takes four bytes an element.

    Args:
        rule: what steps the array, in float32; not a MixedPrecision, whose master copy needs no such rounding.
        seed: with the parameter's path it makes the key of the random stream, >= 0.

    State: (steps taken, key, state of the rule); for arrays of float32 and wider, which are stepped as without it, (None,
    None, state of the rule). The random numbers are a pure function of key, step and place, the same on every device: to
    resume is to repeat. The derivative of a step is taken as if it was not rounded. float16 arrays are refused.

    Infinite and NaN results are kept. In a chain it must be the last member.
    """

    rule: AbstractRule
    seed: int = bounded(0, range=Interval(0, integer=True))
    _: dataclasses.KW_ONLY
    _key: int | None = dataclasses.field(default=None, repr=False)  # made at setup

    structural = ("seed", "_key")
    final = True
    alters = False
    transparent = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(isinstance(inner, (MixedPrecision, StochasticRounding)) for inner in walk(self.rule)):
            msg = (
                "StochasticRounding stands for the master copy of MixedPrecision; neither that nor another StochasticRounding "
                "may be inside"
            )
            raise RuleError(msg)

    @property
    def law(self) -> Law:
        return "none"  # the random numbers depend on the place in the array

    def resolved(self, x: Array, path: str) -> StochasticRounding:
        rule = super().resolved(x, path)
        return rule.replace(_key=stream_key(f"StochasticRounding:{self.seed}:{path}"))

    def unresolved(self) -> StochasticRounding:
        return super().unresolved().replace(_key=None)

    def init(self, x: Array) -> State:
        return (*self._stream(x), self.rule.init(x))

    def init_as(self, x: Array, dtype: str) -> State:
        return (*self._stream(x), self.rule.init_as(x, dtype))

    def _stream(self, x: Array) -> tuple[int | None, int | None]:
        """(steps taken, key), or two times None for an array that is not to be rounded so."""
        if dtype_name(x) == "float16":
            msg = "StochasticRounding rounds to bfloat16, and this array is float16; use MixedPrecision for it"
            raise RuleError(msg)
        if dtype_name(x) != "bfloat16":
            return None, None
        return 0, self._key if self._key is not None else self.resolved(x, "")._key

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        count, key, inner = state
        inner, step = yield from stages_of(self.rule, inner, x, dx)
        if step is None or key is None:
            return (count, key, inner), step
        value = rounded_at_random(cast_to(stepped(x, step), "float32"), key, count)
        return (count + 1, key, inner), Assign(value)
