"""Scion: Pethick et al. 2025, algorithms 1 and 2 and table 2, https://arxiv.org/abs/2502.07529."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, add_multiple, interpolate, sign, sqrt, sum_over, zeros_like
from ...errors import HyperParameterError
from .._base import AbstractRule, Stages, State, TransformingRule, Whole
from .._fields import POSITIVE, Choice, Interval, bounded
from ._matrix_rule import MatrixRule, is_lone
from .matrix_step import LAYOUTS, SCALES, block_runs, blockwise, scale_of, sides
from .newtonschulz import NewtonSchulz, sign_times


@dataclass(frozen=True)
class Scion(MatrixRule, TransformingRule):
    """Steps to the point of a norm ball that lies farthest against the momentum.

    ``x <- x - eta * radius * u``, u being the element of the unit ball that the momentum has the largest product with; if
    ``constrained``, ``x <- (1 - eta) x - eta * radius * u``, which stays in the ball of this radius once it is there.

    Args:
        eta: learning rate, >= 0; at most 1 if constrained.
        mu: momentum, in [0, 1): the paper's is 1 - mu.
        radius: of the ball, > 0.
        lambda_: further weight decay, times eta, >= 0.
        epsilon: added to norms that are divided by, >= 0.
        opt: None, or a rule for arrays that are no matrices and where ``fallback`` is true, as in `NorMuon`. With None they
            are divided by their root mean square, or are signs with ``norm="sign"``.
        fallback: predicate on the array, asked once at setup: true sends it to opt.
        norm: of a matrix with d inputs: ``"spectral"``, the orthogonalised momentum times ``scale``; ``"sign"``, its signs
            over d; ``"rows"``, its rows (neurons), each of norm 1 / sqrt(d); ``"columns"``, its columns, their elements of root
            mean square 1 / d.
        normalised: False leaves out what depends on the inputs, d (sqrt(d) with ``"spectral"`` and ``"rows"``): for the first
            layer, as ``"columns"`` for an embedding.
        constrained: see above; the algorithm with it is the paper's Scion, the one without its unconstrained variant.
        ns: the iteration of ``"spectral"``, a `NewtonSchulz`.
        scale: as in `Orthogonalise`, and divided by the number of elements of the kernel of a convolution.
        layout: as in `Orthogonalise`; an embedding is an ``"in_out"`` matrix.
        blocks: as in `Orthogonalise`.
        batch_dims: as in `Orthogonalise`.

    State: m, of x's shape; or the state of opt. Complex arrays are refused.
    """

    eta: Any = 1e-3
    mu: Any = 0.9
    radius: Any = bounded(1.0, range=POSITIVE)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    opt: AbstractRule | None = None
    fallback: Callable[[Any], bool] | None = None
    _: dataclasses.KW_ONLY
    norm: str = bounded("spectral", range=Choice(("spectral", "sign", "rows", "columns")))
    normalised: bool = True
    constrained: bool = False
    ns: NewtonSchulz = bounded(NewtonSchulz(), range=None)
    scale: str = bounded("rms", range=SCALES)
    layout: str = bounded("out_in", range=LAYOUTS)
    blocks: Any = bounded(1, range=None)
    batch_dims: int = bounded(0, range=Interval(0, integer=True))
    _matrix: bool | None = dataclasses.field(default=None, repr=False)  # decided at setup

    structural = ("fallback", "batch_dims", "_matrix")
    alone = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opt is None and self.fallback is not None:
            msg = "Scion: field 'fallback' chooses what opt steps, but opt is None; give it a rule"
            raise HyperParameterError(msg)

    def decay_factor(self, state: State) -> Any:
        return self.eta * self._decay() if self._matrix else super().decay_factor(state)

    def start(self, x: Array) -> State:
        return zeros_like(x)

    def check(self, shape: tuple[int, ...]) -> None:
        if not is_lone(shape, self.batch_dims):
            block_runs(self, shape)

    def matrix_stages(self, state: State, x: Array, dx: Array) -> Stages:
        m = interpolate(state, dx, 1 - self.mu)
        u = yield Whole(self, m)
        return m, self.eta * add_multiple(self.radius * u, x, self._decay())

    def _decay(self) -> Any:
        return self.lambda_ + 1 if self.constrained else self.lambda_

    def transform(self, u: Array) -> Array:
        shape = tuple(u.shape)
        if not is_lone(shape, self.batch_dims):
            kernel = math.prod(shape[self.batch_dims + 2 :])
            return blockwise(self, u, lambda stack, axis: self._of_block(stack, axis, kernel))
        if self.norm == "sign" or 0 in shape:
            return sign(u)
        flat = u.reshape((*shape[: self.batch_dims], -1))
        return self._over(flat, -1, flat.shape[-1] ** 0.5).reshape(shape)

    def _of_block(self, u: Array, axis: int, kernel: int) -> Array:
        """What becomes of blocks with the outputs along an axis; kernel elements of them belong to one input channel."""
        outputs, inputs = sides(u, axis)
        if self.norm == "sign":
            return sign(u) / inputs if self.normalised else sign(u)
        if self.norm == "rows":
            return self._over(u, -3 - axis, inputs**-0.5 if self.normalised else 1.0)
        if self.norm == "columns":
            return self._over(u, axis, outputs**0.5 / inputs if self.normalised else outputs**0.5)
        channels = (outputs, inputs / kernel) if self.layout == "out_in" else (outputs / kernel, inputs)
        scale = scale_of(self.scale, *channels) / kernel
        return sign_times(scale if self.normalised else scale * channels[1] ** 0.5, u, self.ns)

    def _over(self, u: Array, axis: int, length: float) -> Array:
        """u with what lies along an axis made so long."""
        return u * (length / (sqrt(sum_over(abs2(u), axis)) + self.epsilon * length))
