"""Shampoo: Gupta, Koren & Singer 2018, algorithms 1 and 2, https://arxiv.org/abs/1802.09568."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, add_multiple, cast_to, host_int, identities
from .._base import AbstractRule, State
from .._fields import Interval, bounded
from ..adaptive.adagrad import AdaGrad
from ._matrix_rule import MatrixRule
from ._sides import along, cut, joined, piece_shapes, plus_gram
from ._statistics import check_decay, check_positive, in_one_dtype, offset_of, remark_on, root_of, takes_vector, zero_statistics
from .matrix_step import LAYOUTS


@dataclass(frozen=True)
class Shampoo(MatrixRule):
    """AdaGrad with a full matrix for each side of a matrix; another rule for everything else.

    With L and R the sums of ``dx dx.T`` and ``dx.T dx``, and epsilon on their diagonals, the step is ``L**-1/4 dx R**-1/4``.

    Args:
        eta: learning rate, >= 0. ``adjust(state, eta)`` gives opt the learning rate that keeps the ratio the two had at setup;
            ``adjust(state, eta=...)`` sets this one alone.
        lambda_: weight decay, multiplied by eta, >= 0.
        epsilon: on the diagonals of the statistics, >= 0.
        refresh: steps between renewals of the roots, >= 1. Above 1 they are also renewed at each of the first so many
            gradients, which find the statistics singular.
        opt: rule for arrays that are no matrices (all but one dimension of length 1), and where ``fallback`` is true. None:
            `AdaGrad` with this learning rate.
        fallback: predicate on the array, asked once at setup: true sends it to opt.
        rho: None sums statistics up; a decay in [0, 1) takes their running mean, corrected for its start at zero.
        power: of the roots, > 0. None: 1 / (2 k) with k sides that have a statistic.
        max_size: a longer side has no statistic, and is left as it is, >= 1.
        spread: renew the roots of each array at steps of its own, by its path, so that not all are renewed in one.
        merge: trailing dimensions are one side, so that a convolution is an (out, in * height * width) matrix; False: every
            dimension is a side, as in algorithm 2.
        vectors: step vectors by this rule as well, with their one side.
        layout: as in `Orthogonalise`.
        blocks: as in `Orthogonalise`; each has statistics of its own.
        batch_dims: as in `Orthogonalise`.

    State: ``(pieces, t, rho**t)``, t counting gradients, with a piece for each size of block: for each side (statistic, root),
    both (side, side), or None where it has none. Those of half-precision arrays are float32. A statistic that is not finite
    keeps the root it had, and one that is singular with epsilon 0 is damped, with a DecompositionWarning. Complex matrices
    are refused. Inside torch.func.vmap and torch.compile t cannot be read.
    """

    eta: Any = 0.1
    lambda_: Any = 0.0
    epsilon: Any = 1e-6
    refresh: int = bounded(1, range=Interval(1, integer=True))
    opt: AbstractRule = None  # type: ignore[assignment]
    fallback: Callable[[Any], bool] | None = None
    _: dataclasses.KW_ONLY
    rho: Any = bounded(None, range=None)
    power: Any = bounded(None, range=None)
    max_size: int = bounded(10_000, range=Interval(1, integer=True))
    spread: bool = False
    merge: bool = True
    vectors: bool = False
    layout: str = bounded("out_in", range=LAYOUTS)
    blocks: Any = bounded(1, range=None)
    batch_dims: int = bounded(0, range=Interval(0, integer=True))
    _matrix: bool | None = dataclasses.field(default=None, repr=False)  # decided at setup
    _offset: int = dataclasses.field(default=0, repr=False)  # by which renewals of this array are early

    structural = ("fallback", "max_size", "spread", "merge", "vectors", "layout", "blocks", "batch_dims", "_matrix", "_offset")

    def __post_init__(self) -> None:
        if self.opt is None:
            AbstractRule.__post_init__(self)  # so that errors name the fields of this rule
            object.__setattr__(self, "opt", AdaGrad(self.eta))
        super().__post_init__()
        check_decay(self)
        check_positive(self, "power")

    def resolved(self, x: Array, path: str) -> Shampoo:
        return super().resolved(x, path).replace(_offset=offset_of(self, path))

    def unresolved(self) -> Shampoo:
        return super().unresolved().replace(_offset=0)

    def _is_matrix(self, x: Array) -> bool:
        return super()._is_matrix(x) or takes_vector(self, x)

    def remark(self, shape: tuple[int, ...]) -> str:
        return remark_on(self, shape)

    def start(self, x: Array) -> State:
        pieces = [zero_statistics(self, x, shape) for shape in piece_shapes(self, tuple(x.shape))]
        sides = tuple(tuple(None if zero is None else (zero, identities(zero)) for zero in piece) for piece in pieces)
        return sides, 0, 0.0 if self.rho is None else self.rho

    def init_as(self, x: Array, dtype: str) -> State:
        return self.start(cast_to(x, dtype)) if self._is_matrix(x) else super().init_as(x, dtype)

    def step(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        pieces, t, rho_t = state
        t = host_int(t, "Shampoo")
        pieces, dx = in_one_dtype(pieces, dx)
        results = [self._stepped(sides, g, t, rho_t) for sides, g in zip(pieces, cut(self, dx), strict=True)]
        step = joined(self, [step for _, step in results], tuple(dx.shape))
        after = tuple(sides for sides, _ in results), t + 1, 0.0 if self.rho is None else rho_t * self.rho
        return after, self.eta * add_multiple(step, x, self.lambda_)

    def _stepped(self, sides: State, g: Array, t: int, rho_t: Any) -> tuple[State, Array]:
        """The sides of a piece after a gradient, and what their roots make of it."""
        lead = g.ndim - len(sides)
        keep, weight = (1.0, 1.0) if self.rho is None else (self.rho, 1 - self.rho)
        count = sum(side is not None for side in sides)
        power = 1 / (2 * count) if self.power is None and count else self.power
        renews = t < self.refresh or (t + self._offset) % self.refresh == 0
        after: list[State] = []
        step = g
        for axis, side in enumerate(sides):
            if side is None:
                after.append(None)
                continue
            statistic, root = side
            statistic = plus_gram(statistic, g, axis, lead, keep, weight)
            if renews:
                root = root_of(self, statistic / (1 - rho_t), root, power)
            after.append((statistic, root))
            step = along(root, step, axis, lead)
        return tuple(after), step
