"""AdaMuon: Si et al. 2025, algorithm 1, https://arxiv.org/abs/2507.11005."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, add_multiple, element_count, interpolate, sign, sqrt, sum_over, zeros_like
from .._base import AbstractRule, Stages, State, TransformingRule, Whole
from .._fields import Interval, bounded
from ..adaptive.adamw import AdamW
from ._matrix_rule import MatrixRule
from ._neurons import RMS, aligned, squares, times
from .matrix_step import LAYOUTS, block_runs, polar
from .newtonschulz import NewtonSchulz, travelling_dtype


@dataclass(frozen=True)
class AdaMuon(MatrixRule, TransformingRule):
    """Muon of the signs of the momentum, each element of what it makes divided by the root of its running square.

    The step is scaled so that its root mean square is 0.2 eta, as Adam's often is.

    Args:
        eta: learning rate of the matrices, >= 0.
        beta: decays of the momentum and of the square, in [0, 1).
        lambda_: weight decay of the matrices, times eta, >= 0.
        epsilon: added to what is divided by, >= 0.
        opt: as in `NorMuon`.
        fallback: as in `NorMuon`.
        ns: the iteration, a `NewtonSchulz`.
        signs: orthogonalise the signs of the momentum; False: the momentum itself, as the first version of the paper did.
        layout: as in `Orthogonalise`.
        blocks: as in `Orthogonalise`; each is scaled on its own.
        batch_dims: as in `Orthogonalise`.

    State: (m, v), both of x's shape; for the other arrays the state of opt. Complex matrices are refused.
    """

    eta: Any = 1e-3
    beta: tuple[Any, Any] = (0.95, 0.95)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    opt: AbstractRule = AdamW(3e-4, (0.9, 0.95), 0.01)
    fallback: Callable[[Any], bool] | None = None
    _: dataclasses.KW_ONLY
    ns: NewtonSchulz = bounded(NewtonSchulz(), range=None)
    signs: bool = True
    layout: str = bounded("out_in", range=LAYOUTS)
    blocks: Any = bounded(1, range=None)
    batch_dims: int = bounded(0, range=Interval(0, integer=True))
    _matrix: bool | None = dataclasses.field(default=None, repr=False)  # decided at setup

    structural = ("fallback", "batch_dims", "_matrix")

    def start(self, x: Array) -> State:
        return zeros_like(x), zeros_like(x, real=True)

    def check(self, shape: tuple[int, ...]) -> None:
        block_runs(self, shape)

    def travels_as(self, u: Array) -> str:
        return travelling_dtype(u, self.ns)

    def transform(self, u: Array) -> Array:
        return polar(self, u)

    def matrix_stages(self, state: State, x: Array, dx: Array) -> Stages:
        m, v = state
        b1, b2 = self.beta
        m = interpolate(m, dx, 1 - b1)
        u = yield Whole(self, sign(m) if self.signs else m)
        v = interpolate(v, abs2(u), 1 - b2)
        step = self._aligned(u / (sqrt(v) + self.epsilon))
        return (m, v), self.eta * add_multiple(step, x, self.lambda_)

    def _aligned(self, u: Array) -> Array:
        if self.batch_dims == 0 and self.blocks == 1:  # one number for the array, which loops know how to sum up
            return RMS * element_count(u) ** 0.5 / (sqrt(sum_over(abs2(u), None)) + self.epsilon) * u
        return times(self, aligned(self, tuple(u.shape), squares(self, u), self.epsilon), u)
