"""Dion: Ahn et al. 2025, algorithm 1, https://arxiv.org/abs/2504.05295."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import (
    Array,
    abs2,
    add_multiple,
    cast_to,
    dtype_name,
    normal,
    orthonormal,
    sqrt,
    sum_over,
    where,
    zeros,
    zeros_like,
)
from ...errors import HyperParameterError, brief
from .._base import AbstractRule, State
from .._fields import Interval, bounded, real, whole
from .._seeds import stream_key
from ..adaptive.adamw import AdamW
from ._matrix_rule import MatrixRule
from .matrix_step import LAYOUTS, SCALES, block_runs, from_blocks, matrix_shape, scale_of, to_blocks


@dataclass(frozen=True)
class Dion(MatrixRule):
    """Orthonormal steps of low rank, by one step of power iteration; what they leave of the momentum stays in it.

    With B the momentum after the gradient was added, and Q of the last step: P is ``B Q`` made orthonormal, and ``R = B.T P``.
    The step is ``scale * P Q.T`` with Q now R, its columns of norm 1, and the new momentum ``B - (1 - mu) P R.T``.

    Args:
        eta: learning rate of the matrices, >= 0.
        mu: momentum of what was stepped, in [0, 1).
        lambda_: weight decay of the matrices, times eta, >= 0.
        epsilon: added to the norms of R's columns, >= 0.
        rank: columns of P and Q: a whole number >= 1, capped at the shorter side; or a fraction of it, in (0, 1], rounded up.
        opt: as in `NorMuon`.
        fallback: as in `NorMuon`.
        scale: as in `Orthogonalise`.
        seed: of the first Q, which is Gaussian, >= 0.
        layout: as in `Orthogonalise`.
        blocks: as in `Orthogonalise`; each has a Q of its own.
        batch_dims: as in `Orthogonalise`.

    State: (m, Qs): m of x's shape, and for each size of block all its Q, of shape (..., blocks, inputs, rank); for the other
    arrays the state of opt. Complex matrices are refused.
    """

    eta: Any = 0.01
    mu: Any = 0.95
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    rank: Any = bounded(0.25, range=None)
    opt: AbstractRule = AdamW(3e-4, (0.9, 0.95), 0.01)
    fallback: Callable[[Any], bool] | None = None
    _: dataclasses.KW_ONLY
    scale: str = bounded("rms", range=SCALES)
    seed: int = bounded(0, range=Interval(0, integer=True))
    layout: str = bounded("out_in", range=LAYOUTS)
    blocks: Any = bounded(1, range=None)
    batch_dims: int = bounded(0, range=Interval(0, integer=True))
    _matrix: bool | None = dataclasses.field(default=None, repr=False)  # decided at setup

    structural = ("rank", "fallback", "seed", "layout", "blocks", "batch_dims", "_matrix")

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = whole(self.rank, 1) or real(self.rank)
        if rank is None or not (isinstance(rank, int) or 0 < rank <= 1):
            msg = f"Dion: field 'rank' must be a whole number >= 1, or a fraction in (0, 1]; got {brief(self.rank)}"
            raise HyperParameterError(msg)
        object.__setattr__(self, "rank", rank)

    def start(self, x: Array) -> State:
        shape = tuple(x.shape)
        *lead, rows, columns = matrix_shape(shape, self.batch_dims)
        inputs = columns if self.layout == "out_in" else rows
        qs = []
        for size, count in block_runs(self, shape):
            q = normal(stream_key(f"Dion:{self.seed}"), 0, (inputs, self._rank(size, inputs)), x)
            qs.append(zeros(x, (*lead, count, *q.shape)) + cast_to(q, dtype_name(x)))
        return zeros_like(x), tuple(qs)

    def step(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, qs = state
        shape = tuple(x.shape)
        if 0 in shape:
            return state, dx
        kept, new, steps = [], [], []
        for b, last in zip(to_blocks(self, m + dx), qs, strict=True):
            q = cast_to(last, dtype_name(b))
            p = orthonormal(b @ q)
            r = b.mT @ p
            squares = sum_over(abs2(r), -2)
            found = squares > 0
            right = where(found, r / (sqrt(where(found, squares, 1.0)) + self.epsilon), 0.0)
            kept.append(b - (1 - self.mu) * (p @ r.mT))
            new.append(where(found, right, q))  # what finds nothing, as in a zero matrix, looks on where it was
            steps.append(scale_of(self.scale, *b.shape[-2:]) * (p @ right.mT))
        step = add_multiple(from_blocks(self, steps, shape), x, self.lambda_)
        return (from_blocks(self, kept, shape), tuple(new)), self.eta * step

    def _rank(self, outputs: int, inputs: int) -> int:
        shorter = min(outputs, inputs)
        return min(self.rank if isinstance(self.rank, int) else math.ceil(self.rank * shorter), shorter)
