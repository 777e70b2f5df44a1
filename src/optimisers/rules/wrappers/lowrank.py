"""GaLore: Zhao et al. 2024, https://arxiv.org/abs/2403.03507; its residual, Fira: Chen et al. 2024, https://arxiv.org/abs/2410.01623."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ...arrays import (
    Array,
    abs2,
    cast_to,
    dtype_name,
    host_int,
    leading_vectors,
    matmul,
    normal,
    sqrt,
    sum_over,
    where,
    zeros,
)  # fmt: skip
from ...errors import RuleError
from .._base import AbstractRule, Law, Stages, State, stages_of
from .._fields import POSITIVE, Choice, Interval, bounded
from .._seeds import stream_key
from .._wrapper import Wrapper


@dataclass(frozen=True)
class LowRank(Wrapper):
    """Steps matrices by a rule in a projection of the gradient, so that its state is smaller.

    With P of shape (rank, shorter side) the rule inside is given ``P dx`` and ``P x``; the step is ``P.T`` times what it makes
    of them. Its weight decay is taken of the whole of x. Trailing dimensions are flattened.

    Args:
        rule: what steps the projected matrix.
        rank: rows of P, >= 1; capped at the shorter side.
        refresh: steps between new projections, >= 1; the state of the rule is kept across it.
        kind: ``"svd"``: P is made of the leading singular vectors of the gradient at a refresh, and kept; ``"random"``: it is
            Gaussian with variance 1 / rank, a pure function of a key and the number of the refresh, and not kept.
        scale: the step is multiplied by it, > 0.
        residual: add what the projection leaves of the gradient, each column multiplied by the ratio of the norms of the
            rule's step and of the projected gradient.
        seed: with the parameter's path it makes the key, >= 0.

    State: (P or key, steps taken, state of the rule). Vectors and complex arrays are refused at setup. With ``"svd"`` the
    number of steps is read on the host, so it does not work inside torch.func.vmap and torch.compile; no derivative passes
    through P.

    Raises NonFiniteError if singular vectors are to be taken of a gradient that is not finite.
    """

    rule: AbstractRule
    rank: int = bounded(range=Interval(1, integer=True))
    refresh: int = bounded(200, range=Interval(1, integer=True))
    kind: str = bounded("svd", range=Choice(("svd", "random")))
    _: dataclasses.KW_ONLY
    scale: Any = bounded(1.0, range=POSITIVE)
    residual: bool = False
    seed: int = bounded(0, range=Interval(0, integer=True))
    _key: int | None = dataclasses.field(default=None, repr=False)  # made at setup

    structural = ("rank", "kind", "seed", "_key")
    real_only = True
    transparent = False

    @property
    def law(self) -> Law:
        return "none"

    def resolved(self, x: Array, path: str) -> LowRank:
        rule = self.rule.resolved(zeros(x, self._shape(x)), path)
        return self.replace(rule=rule, _key=stream_key(f"LowRank:{self.seed}:{path}"))

    def unresolved(self) -> LowRank:
        return super().unresolved().replace(_key=None)

    def init(self, x: Array) -> State:
        return self._state(x, self.rule.init(zeros(x, self._shape(x))))

    def init_as(self, x: Array, dtype: str) -> State:
        return self._state(cast_to(x, dtype), self.rule.init_as(zeros(x, self._shape(x)), dtype))

    def _state(self, x: Array, inner: State) -> State:
        rank, side, _ = self._sides(x)
        if self.kind == "svd":
            return zeros(x, (rank, side)), 0, inner
        return self._key if self._key is not None else self.resolved(x, "")._key, 0, inner

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        kept, t, inner = state
        given, weights = self._matrix(dx), self._matrix(x)
        kept, p = self._projection(kept, t, given)
        low, low_x = matmul(p, given), matmul(p, weights)
        factor = self.rule.decay_factor(inner)
        inner, step = yield from stages_of(self.rule, inner, low_x, low)
        if step is None:
            return (kept, t + 1, inner), None
        bare = cast_to(step - factor * low_x, dtype_name(given))
        step = matmul(p.mT, bare)
        if self.residual:
            lengths = sqrt(sum_over(abs2(low), 0))
            ratio = sqrt(sum_over(abs2(bare), 0)) / where(lengths > 0, lengths, 1 + 0 * lengths)
            step = step + ratio * (given - matmul(p.mT, low))
        step = self.scale * step
        step = (step.mT if _is_tall(x) else step).reshape(dx.shape)
        return (kept, t + 1, inner), step + factor * x

    def _projection(self, kept: Any, t: Any, given: Array) -> tuple[Any, Array]:
        """What is kept of it, and P itself."""
        if self.kind == "random":
            shape = min(self.rank, given.shape[0]), given.shape[0]
            return kept, cast_to(normal(kept, t // self.refresh, shape, given), dtype_name(given)) / max(1, shape[0]) ** 0.5
        last = cast_to(kept, dtype_name(given))
        if host_int(t, "LowRank") % self.refresh:
            return kept, last
        p = leading_vectors(given, min(self.rank, given.shape[0]))
        p = p * where(sum_over(p * last, 1) < 0, -1.0, 1.0 + 0 * p[:, :1])  # signs are free: those that the moments suit
        return cast_to(p, dtype_name(kept)), p

    def _matrix(self, x: Array) -> Array:
        """An array as a matrix whose rows are to be projected."""
        matrix = x.reshape((x.shape[0], math.prod(x.shape[1:])))
        return matrix.mT if _is_tall(x) else matrix

    def _shape(self, x: Array) -> tuple[int, int]:
        """The shape of the projected matrix."""
        rank, _, other = self._sides(x)
        return rank, other

    def _sides(self, x: Array) -> tuple[int, int, int]:
        """(rank, shorter side, other side); RuleError for an array that is no matrix."""
        if x.ndim < 2:
            msg = (
                f"LowRank projects matrices, and this array has the shape {tuple(x.shape)}; choose another rule for it: "
                "Route((lambda p: p.ndim >= 2, LowRank(...)), otherwise=...)"
            )
            raise RuleError(msg)
        side, other = sorted((int(x.shape[0]), math.prod(x.shape[1:])))
        return min(self.rank, side), side, other


def _is_tall(x: Array) -> bool:
    """Whether the columns are projected."""
    return bool(math.prod(x.shape[1:]) <= x.shape[0])
