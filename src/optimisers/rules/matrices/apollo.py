"""APOLLO: Zhu et al. 2024, algorithm 1, https://arxiv.org/abs/2412.05270."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, cast_to, dtype_name, kind, matmul, real_dtype, recent_normal, sqrt, sum_over, zeros
from ...errors import HyperParameterError, RuleError, brief
from .._base import AbstractRule, CompositeRule, Stages, State
from .._fields import POSITIVE, Choice, Interval, bounded, whole
from .._seeds import stream_key
from ..adaptive.adamw import AdamW


@dataclass(frozen=True)
class Apollo(CompositeRule):
    """AdamW's learning-rate scaling, learned in a random low-rank projection of the gradient.

    The projected gradient ``R = P dx`` is stepped by Adam to ``R'``; each channel of dx (or the whole of it) is scaled by
    ``norm(R') / norm(R)``. P is random, made anew every u steps from (key, refresh index), and not stored.

    Args:
        opt: an `AdamW` (its eta, beta, epsilon, lambda_ and couple), which also steps vectors; or a learning rate.
        rank: rows of P: a number, a function of the longer side, or None for ceil(sqrt(longer side)). Capped at the side that
            is projected.
        u: steps between refreshes, >= 1; the first is at step u. Moments are kept across it.
        sort_dims: project the shorter side; False projects the first.
        scale: the scaled gradient is multiplied by its square root, > 0.
        mode: ``"channel"``, one factor for each index of the side that is not projected; or ``"tensor"``, one for all.
        seed: with the parameter's path it makes the key.
        projection: callable ``(shape, refresh) -> array`` of shape (rank, projected side) in the place of the Gaussian with
            variance 1 / rank.

    State: ``((m, v, (b1**t, b2**t)), t, key)``, m and v of shape (rank, longer side); for vectors the state of opt. Trailing
    dimensions are flattened: a convolution is an (out, in * height * width) matrix.
    """

    opt: Any = AdamW()
    rank: int | Callable[[int], int] | None = bounded(None, range=None)
    u: int = bounded(100, range=Interval(1, integer=True))
    sort_dims: bool = True
    _: dataclasses.KW_ONLY
    scale: Any = bounded(1.0, range=POSITIVE)
    mode: str = bounded("channel", range=Choice(("channel", "tensor")))
    seed: int = bounded(0, range=Interval(0, integer=True))
    projection: Callable[[tuple[int, int], int], Any] | None = None
    _key: int | None = dataclasses.field(default=None, repr=False)  # made at setup

    structural = ("rank", "u", "sort_dims", "mode", "seed", "projection", "_key")

    def __post_init__(self) -> None:
        if not isinstance(self.opt, AbstractRule):
            object.__setattr__(self, "opt", AdamW(self.opt))
        if not isinstance(self.opt, AdamW):
            msg = f"Apollo: field 'opt' must be an AdamW or a learning rate; got {self.opt!r}"
            raise RuleError(msg)
        super().__post_init__()
        rank = self.rank if self.rank is None or callable(self.rank) else whole(self.rank, 1)
        if rank is None and self.rank is not None:
            expected = "None, a whole number >= 1 or a function of the longer side"
            msg = f"Apollo: field 'rank' must be {expected}; got {brief(self.rank)}"
            raise HyperParameterError(msg)
        object.__setattr__(self, "rank", rank)
        if not (self.projection is None or callable(self.projection)):
            msg = f"Apollo: field 'projection' must be None or a callable (shape, refresh) -> array; got {self.projection!r}"
            raise HyperParameterError(msg)

    @classmethod
    def mini(cls, opt: Any = AdamW(), **fields: Any) -> Apollo:  # noqa: B008 (a frozen value)
        """APOLLO-Mini: rank 1, one factor for the whole array, scale 128."""
        return cls(opt, **{"rank": 1, "mode": "tensor", "scale": 128.0, **fields})

    def resolved(self, x: Array, path: str) -> Apollo:
        return self.replace(_key=stream_key(f"{self.seed}:{path}"))

    def unresolved(self) -> Apollo:
        return self.replace(_key=None)

    def with_eta(self, eta: Any, base: Apollo) -> Apollo:
        return self.replace(opt=self.opt.with_eta(eta, base.opt))

    def init(self, x: Array) -> State:
        if x.ndim < 2:
            return self.opt.init(x)
        _, other, rank = self._sides(x)
        key = self._key if self._key is not None else self.resolved(x, "")._key
        moments = zeros(x, (rank, other)), zeros(x, (rank, other), real=True), self.opt.beta
        return moments, 1, key

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        if x.ndim < 2:
            return (yield from self.opt.stages(state, x, dx))  # type: ignore[no-any-return]
        opt = self.opt
        (m, v, (b1t, b2t)), t, key = state
        b1, b2 = opt.beta
        side, _, rank = self._sides(x)
        matrix = dx.reshape((dx.shape[0], math.prod(dx.shape[1:])))
        swapped = side != 0
        if swapped:
            matrix = matrix.mT
        low = matmul(self._projection(key, t // self.u, (rank, matrix.shape[0]), dx), matrix)
        m = b1 * m + (1 - b1) * low
        v = b2 * v + (1 - b2) * abs2(low)
        stepped = m / (1 - b1t) / (sqrt(v / (1 - b2t)) + opt.epsilon)
        axis = 0 if self.mode == "channel" else None
        factor = sqrt(sum_over(abs2(stepped), axis)) / (sqrt(sum_over(abs2(low), axis)) + opt.epsilon)
        matrix = opt.eta * self.scale**0.5 * (matrix * factor)
        step = (matrix.mT if swapped else matrix).reshape(dx.shape)
        decay = opt.eta * opt.lambda_ if opt.couple else opt.lambda_
        return ((m, v, (b1t * b1, b2t * b2)), t + 1, key), step + decay * x

    def _sides(self, x: Array) -> tuple[int, int, int]:
        """(0 if the rows are projected, 1 if the columns are; length of the other side; rank)."""
        rows, columns = int(x.shape[0]), math.prod(x.shape[1:])
        swapped = self.sort_dims and columns < rows
        projected, other = (columns, rows) if swapped else (rows, columns)
        rank = self.rank
        if rank is None:
            rank = math.ceil(math.sqrt(other))
        elif callable(rank):
            given = rank(other)
            rank = whole(given, 1)
            if rank is None:
                msg = f"Apollo: the rank function gave {brief(given)} for a side of {other}; it must give a whole number >= 1"
                raise HyperParameterError(msg)
        return int(swapped), other, max(1, min(rank, projected))

    def _projection(self, key: Any, refresh: Any, shape: tuple[int, int], like: Array) -> Array:
        """P of shape (rank, projected side), in the precision of the gradient."""
        if self.projection is None:
            return recent_normal(key, refresh, shape, like) * shape[0] ** -0.5
        given = self.projection(shape, refresh)
        if kind(given) != kind(like) or tuple(given.shape) != shape:
            got = f"{kind(given)} array of shape {tuple(given.shape)}" if kind(given) else type(given).__name__
            msg = f"Apollo: projection must give a {kind(like)} array of shape {shape}, (rank, projected side); got {got}"
            raise RuleError(msg)
        return cast_to(given, real_dtype(dtype_name(like)))
