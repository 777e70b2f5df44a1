"""SOAP: Vyas et al. 2024, algorithm 3, https://arxiv.org/abs/2409.11321; its bases are Shampoo's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import (
    Array,
    abs2,
    add_multiple,
    cast_to,
    descending,
    host_int,
    interpolate,
    orthonormal,
    sqrt,
    sum_over,
    taken,
    where,
    zeros,
)  # fmt: skip
from .._base import AbstractRule, State
from .._fields import Choice, Interval, bounded
from ..adaptive.adamw import AdamW
from ._matrix_rule import MatrixRule
from ._sides import cut, gram_along, joined, piece_shapes, plus_gram, rotated
from ._statistics import check_decay, eigenbasis, in_one_dtype, of_finite, offset_of, remark_on, takes_vector, zero_statistics
from .matrix_step import LAYOUTS


@dataclass(frozen=True)
class SOAP(MatrixRule):
    """Adam in the coordinates in which Shampoo's statistics are diagonal, for matrices; another rule for everything else.

    With L and R the running means of ``dx dx.T`` and ``dx.T dx``, and their eigenvectors as the columns of A and B, Adam steps
    ``A.T dx B``, and A and B turn its step back.

    Args:
        eta: learning rate, >= 0. ``adjust(state, eta)`` gives opt the learning rate that keeps the ratio the two had at setup;
            ``adjust(state, eta=...)`` sets this one alone.
        beta: decays of the mean and of the square, in [0, 1).
        lambda_: weight decay, multiplied by eta, >= 0.
        epsilon: added to the root of the square, >= 0.
        refresh: steps between renewals of the bases, >= 1: of one step of power iteration, made orthonormal by QR. The first
            bases are the eigenvectors of the first statistics.
        opt: rule for arrays that are no matrices (all but one dimension of length 1), and where ``fallback`` is true. None:
            `AdamW` with the numbers of this one.
        fallback: predicate on the array, asked once at setup: true sends it to opt.
        rho: decay of the statistics, in [0, 1). None: ``beta[1]``.
        max_size: a longer side has no statistics, and keeps its coordinates, >= 1.
        first: what the first gradient does besides making the bases: ``"skip"`` nothing, as in the authors' code; ``"step"`` a
            step in the bases that it has made.
        spread: renew the bases of each array at steps of its own, by its path, so that not all are renewed in one.
        merge: trailing dimensions are one side, so that a convolution is an (out, in * height * width) matrix; False: every
            dimension is a side.
        vectors: step vectors by this rule as well, with their one side.
        layout: as in `Orthogonalise`.
        blocks: as in `Orthogonalise`; each has bases of its own.
        batch_dims: as in `Orthogonalise`.

    State: ``(pieces, t, (b1**t, b2**t))``, t counting gradients, with a piece for each size of block: (m, v, sides), m and v in
    the coordinates of the bases, and for each side (statistic, basis), both (side, side), or None where it has none. Statistics
    and bases of half-precision arrays are float32. A statistic that is not finite keeps the basis it had, with a
    DecompositionWarning. Complex matrices are refused. Inside torch.func.vmap and torch.compile t cannot be read.
    """

    eta: Any = 3e-3
    beta: tuple[Any, Any] = (0.95, 0.95)
    lambda_: Any = 0.01
    epsilon: Any = 1e-8
    refresh: int = bounded(10, range=Interval(1, integer=True))
    opt: AbstractRule = None  # type: ignore[assignment]
    fallback: Callable[[Any], bool] | None = None
    _: dataclasses.KW_ONLY
    rho: Any = bounded(None, range=None)
    max_size: int = bounded(10_000, range=Interval(1, integer=True))
    first: str = bounded("skip", range=Choice(("skip", "step")))
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
            object.__setattr__(self, "opt", AdamW(self.eta, self.beta, self.lambda_, self.epsilon))
        super().__post_init__()
        check_decay(self)

    def resolved(self, x: Array, path: str) -> SOAP:
        return super().resolved(x, path).replace(_offset=offset_of(self, path))

    def unresolved(self) -> SOAP:
        return super().unresolved().replace(_offset=0)

    def _is_matrix(self, x: Array) -> bool:
        return super()._is_matrix(x) or takes_vector(self, x)

    def remark(self, shape: tuple[int, ...]) -> str:
        return remark_on(self, shape)

    def start(self, x: Array) -> State:
        shapes = piece_shapes(self, tuple(x.shape))
        pieces = tuple((zeros(x, shape), zeros(x, shape, real=True), self._sides(x, shape)) for shape in shapes)
        return pieces, 0, self.beta

    def _sides(self, x: Array, shape: tuple[int, ...]) -> State:
        """The sides of a piece before the first gradient. There is nothing to turn in a side of length 1."""
        statistics = zero_statistics(self, x, shape, least=2)
        return tuple(None if zero is None else (zero, zeros(zero, tuple(zero.shape))) for zero in statistics)

    def init_as(self, x: Array, dtype: str) -> State:
        return self.start(cast_to(x, dtype)) if self._is_matrix(x) else super().init_as(x, dtype)

    def step(self, state: State, x: Array, dx: Array) -> tuple[State, Array | None]:
        pieces, t, (b1t, b2t) = state
        t = host_int(t, "SOAP")
        pieces, dx = in_one_dtype(pieces, dx)
        given = cut(self, dx)
        if t == 0:
            pieces = tuple((m, v, self._first(sides, g)) for (m, v, sides), g in zip(pieces, given, strict=True))
            if self.first == "skip":
                return (pieces, 1, (b1t, b2t)), None
        results = [self._stepped(piece, g, t, (b1t, b2t)) for piece, g in zip(pieces, given, strict=True)]
        step = joined(self, [step for _, step in results], tuple(dx.shape))
        b1, b2 = self.beta
        after = tuple(piece for piece, _ in results), t + 1, (b1t * b1, b2t * b2)
        return after, self.eta * add_multiple(step, x, self.lambda_)

    def _first(self, sides: State, g: Array) -> State:
        """The statistics of the first gradient, and their eigenvectors."""
        lead, weight = g.ndim - len(sides), 1 - self._rho
        grams = [None if side is None else weight * gram_along(g, axis, lead) for axis, side in enumerate(sides)]
        return tuple(None if gram is None else (gram, eigenbasis(self, gram)) for gram in grams)

    @property
    def _rho(self) -> Any:
        return self.beta[1] if self.rho is None else self.rho

    def _moved(self, sides: State, g: Array) -> State:
        """The sides with the statistics of one more gradient."""
        lead, rho = g.ndim - len(sides), self._rho
        return tuple(
            None if side is None else (plus_gram(side[0], g, axis, lead, rho, 1 - rho), side[1])
            for axis, side in enumerate(sides)
        )

    def _stepped(self, piece: State, g: Array, t: int, powers: tuple[Any, Any]) -> tuple[State, Array]:
        """One piece after a gradient, and its step without the learning rate."""
        m, v, sides = piece
        (b1, b2), (b1t, b2t) = self.beta, powers
        lead, bases = g.ndim - len(sides), [None if side is None else side[1] for side in sides]
        low = rotated(g, bases, lead)
        m = interpolate(m, low, 1 - b1)
        v = interpolate(v, abs2(low), 1 - b2)
        root = sqrt(1 - b2t)
        step = m / (sqrt(v) + root * self.epsilon)
        step = rotated(step, bases, lead, back=True) * (root / (1 - b1t))
        if t > 0:
            sides = self._moved(sides, g)
            if (t + self._offset) % self.refresh == 0:
                m, v, sides = self._renewed(m, v, sides)
        return (m, v, sides), step

    def _renewed(self, m: Array, v: Array, sides: State) -> State:
        """A piece in bases that one step of power iteration has brought nearer to the eigenvectors of now."""
        lead = m.ndim - len(sides)
        bases = [None if side is None else side[1] for side in sides]
        after: list[State] = []
        for axis, side in enumerate(sides):
            if side is None:
                after.append(None)
                continue
            statistic, basis = side
            power = statistic @ basis
            sizes = sum_over(basis * power, -2)
            if (finite := of_finite(self, power)) is not None:
                power, sizes = where(finite, power, basis), where(finite, sizes, 0.0)
            order = descending(sizes[..., 0, :])
            v = taken(v, order, lead + axis)
            after.append((statistic, orthonormal(taken(power, order, power.ndim - 1))))
        m = rotated(rotated(m, bases, lead, back=True), [None if side is None else side[1] for side in after], lead)
        return m, v, tuple(after)
