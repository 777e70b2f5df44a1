"""PSGD with Kronecker factors: Li 2018, https://arxiv.org/abs/1803.09383; as a whitening: Li 2024, https://arxiv.org/abs/2402.04553."""

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
    dtype_name,
    host_int,
    interpolate,
    is_number,
    minimum,
    normal,
    sqrt,
    where,
    working_dtype,
    zeros,
    zeros_like,
)  # fmt: skip
from .._base import AbstractRule, State
from .._fields import FRACTION, Choice, Interval, bounded, inf
from .._seeds import stream_key
from ..adaptive.adamw import AdamW
from ._factors import all_finite, balanced, first_factors, mean_over_sides, nearer, scaled, times
from ._matrix_rule import MatrixRule
from ._sides import cut, joined, piece_shapes
from ._statistics import check_positive, in_one_dtype, offset_of, remark_on, sides_in, takes_vector, warn_of
from .matrix_step import LAYOUTS


@dataclass(frozen=True)
class Kron(MatrixRule):
    """PSGD: matrices are stepped by their momentum, whitened by a triangular factor for each side; another rule for the rest.

    With Q and S upper triangular the step is ``Q.T Q m S.T S``. The factors follow the gradients: those that minimise the
    expectation of ``g.T P g + v.T P**-1 v`` over gradients g and noise v, for which P g is as white as v.

    Args:
        eta: learning rate, >= 0. ``adjust(state, eta)`` gives opt the learning rate that keeps the ratio the two had at setup;
            ``adjust(state, eta=...)`` sets this one alone.
        mu: momentum, corrected for its start at zero, in [0, 1).
        lambda_: weight decay, multiplied by eta, >= 0.
        epsilon: of noise that is added to the gradient which factors are fitted to, >= 0.
        rate: learning rate of the factors, relative to their size, in [0, 1).
        refresh: steps between renewals of the factors, >= 1. What is expected is learned slowly, so they are also renewed at
            each of the first ``warmup`` steps.
        warmup: see there, >= 0.
        opt: rule for arrays that are no matrices (all but one dimension of length 1), and where ``fallback`` is true. None:
            `AdamW` with this learning rate and weight decay.
        fallback: predicate on the array, asked once at setup: true sends it to opt.
        scale: of P's root at the start, > 0. None takes what whitens the first gradient on the whole.
        tau: greatest root mean square of the step without the learning rate, > 0.
        whiten: what factors are fitted to: ``"gradient"``, or ``"momentum"``.
        max_size: a longer side has a diagonal, not a triangular factor, >= 1.
        seed: of the noise, >= 0.
        spread: renew the factors of each array at steps of its own, by its path, so that not all are renewed in one.
        merge: trailing dimensions are one side, so that a convolution is an (out, in * height * width) matrix; False: every
            dimension is a side.
        vectors: step vectors by this rule as well, with their one side.
        layout: as in `Orthogonalise`.
        blocks: as in `Orthogonalise`; each has factors of its own.
        batch_dims: as in `Orthogonalise`.

    State: ``(pieces, t, mu**t)``, t counting gradients, with a piece for each size of block: (m, factors), for each side (side,
    side), or (side,) for a diagonal. Factors of half-precision arrays are float32. Factors that would not be finite stay as
    they are, with a DecompositionWarning. Complex matrices are refused. Inside torch.func.vmap and torch.compile t cannot be
    read. All arrays of one shape see the same noise.
    """

    eta: Any = 1e-3
    mu: Any = 0.9
    lambda_: Any = 0.0
    epsilon: Any = 1e-9
    rate: Any = bounded(0.1, range=FRACTION)
    refresh: int = bounded(10, range=Interval(1, integer=True))
    warmup: int = bounded(500, range=Interval(0, integer=True))
    opt: AbstractRule = None  # type: ignore[assignment]
    fallback: Callable[[Any], bool] | None = None
    _: dataclasses.KW_ONLY
    scale: Any = bounded(None, range=None)
    tau: Any = bounded(1.1, range=Interval(0, open_low=True, finite=False))
    whiten: str = bounded("gradient", range=Choice(("gradient", "momentum")))
    max_size: int = bounded(8192, range=Interval(1, integer=True))
    seed: int = bounded(0, range=Interval(0, integer=True))
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
            object.__setattr__(self, "opt", AdamW(self.eta, lambda_=self.lambda_))
        super().__post_init__()
        check_positive(self, "scale")

    def resolved(self, x: Array, path: str) -> Kron:
        return super().resolved(x, path).replace(_offset=offset_of(self, path))

    def unresolved(self) -> Kron:
        return super().unresolved().replace(_offset=0)

    def _is_matrix(self, x: Array) -> bool:
        return super()._is_matrix(x) or takes_vector(self, x)

    def remark(self, shape: tuple[int, ...]) -> str:
        return remark_on(self, shape, "a diagonal")

    def start(self, x: Array) -> State:
        narrow = x.reshape(-1)[:0]
        like = cast_to(narrow, working_dtype(dtype_name(narrow)))
        pieces = []
        for shape in piece_shapes(self, tuple(x.shape)):
            lead = len(shape) - sides_in(self, tuple(x.shape))
            pieces.append((zeros(x, shape), first_factors(like, shape, lead, self.max_size)))
        return tuple(pieces), 0, self.mu

    def init_as(self, x: Array, dtype: str) -> State:
        return self.start(cast_to(x, dtype)) if self._is_matrix(x) else super().init_as(x, dtype)

    def step(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        pieces, t, mu_t = state
        t = host_int(t, "Kron")
        if 0 in dx.shape:
            return (pieces, t + 1, mu_t * self.mu), zeros_like(dx)
        sides = sides_in(self, tuple(dx.shape))
        pieces, dx = in_one_dtype(pieces, dx)
        results = [self._stepped(piece, g, g.ndim - sides, t, mu_t) for piece, g in zip(pieces, cut(self, dx), strict=True)]
        step = joined(self, [step for _, step in results], tuple(dx.shape))
        after = tuple(piece for piece, _ in results), t + 1, mu_t * self.mu
        return after, self.eta * add_multiple(step, x, self.lambda_)

    def _stepped(self, piece: State, g: Array, lead: int, t: int, mu_t: Any) -> tuple[State, Array]:
        """One piece after a gradient, and its step without the learning rate."""
        m, factors = piece
        m = interpolate(m, g, 1 - self.mu)
        ahead = m / (1 - mu_t)
        if t < self.warmup or (t + self._offset) % self.refresh == 0 or t == 0:
            factors = self._renewed(factors, g if self.whiten == "gradient" else ahead, lead, t)
        step = times(factors, times(factors, ahead, lead), lead, transposed=True)
        if is_number(self.tau) and self.tau == inf:
            return (m, factors), step
        size = sqrt(mean_over_sides(abs2(step), lead))
        limit = minimum(self.tau / (size + 1e-8), 1.0)
        return (m, factors), limit.reshape((*g.shape[:lead], *(1,) * (g.ndim - lead))) * step

    def _renewed(self, factors: State, g: Array, lead: int, t: int) -> State:
        """The factors after one step towards those of a whitening."""
        noise = cast_to(normal(stream_key(f"Kron:{self.seed}"), t, tuple(g.shape[self.batch_dims :]), g), dtype_name(g))
        if t == 0:
            factors = scaled(factors, self._first_scale(g, lead), lead)
        after = nearer(balanced(factors, lead), g + self.epsilon * noise, zeros_like(g) + noise, lead, self.rate)
        kept = []
        for new, old, finite in zip(after, factors, all_finite(after, lead), strict=True):
            if finite is not None:
                warn_of(self, new, "not finite, and stay what they were", "factors")
            kept.append(new if finite is None else where(finite, new, old))
        return tuple(kept)

    def _first_scale(self, g: Array, lead: int) -> Array:
        """What makes the first gradient as large as noise: P times its square is 1, P the square of the factors."""
        if self.scale is not None:
            return zeros(g, (*g.shape[:lead], 1)) + self.scale
        fourth = mean_over_sides(abs2(abs2(cast_to(g, "float64"))), lead)
        return cast_to((fourth + 1e-36) ** -0.125, dtype_name(g))
