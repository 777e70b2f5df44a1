"""NorMuon: Li et al. 2025, algorithm 1, https://arxiv.org/abs/2510.05491."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, add_multiple, interpolate, sqrt, zeros, zeros_like
from .._base import AbstractRule, State
from .._fields import Choice, Interval, bounded
from ..adaptive.adamw import AdamW
from ._matrix_rule import MatrixRule
from ._neurons import aligned, inputs, neuron_shape, over_blocks, squares, times
from .matrix_step import LAYOUTS, SCALES, block_runs, polar, scale_of
from .newtonschulz import NewtonSchulz


@dataclass(frozen=True)
class NorMuon(MatrixRule):
    """Muon, each neuron of what it makes divided by the root of its running mean square.

    Args:
        eta: learning rate of the matrices, >= 0.
        beta: decays of the momentum and of the mean square of a neuron, in [0, 1).
        lambda_: weight decay of the matrices, times eta, >= 0.
        epsilon: added to what is divided by, >= 0.
        opt: rule for arrays that are no matrices (all but one dimension of length 1), and where ``fallback`` is true;
            ``adjust(state, eta)`` gives it the learning rate that keeps the ratio the two had at setup.
        fallback: predicate on the array, asked once at setup: true sends it to opt.
        ns: the iteration, a `NewtonSchulz`.
        nesterov: orthogonalise the momentum as it will be after the next gradient, if that is like this one.
        scale: ``"aligned"``: the root mean square of a step is 0.2 eta, as Adam's often is (the paper); else its norm is that
            of the orthogonalised matrix times the scale of `Orthogonalise` with this name (the authors' code: ``"jordan"``).
        layout: as in `Orthogonalise`: neurons are rows with ``"out_in"``, columns with ``"in_out"``.
        blocks: as in `Orthogonalise`; each has a norm of its own.
        batch_dims: as in `Orthogonalise`.

    State: (m, v), v of shape (..., rows, 1) or (..., 1, columns); for the other arrays the state of opt. Complex matrices are
    refused.
    """

    eta: Any = 1e-3
    beta: tuple[Any, Any] = (0.95, 0.95)
    lambda_: Any = 0.0
    epsilon: Any = 1e-10
    opt: AbstractRule = AdamW(3e-4, (0.9, 0.95), 0.01)
    fallback: Callable[[Any], bool] | None = None
    _: dataclasses.KW_ONLY
    ns: NewtonSchulz = bounded(NewtonSchulz(), range=None)
    nesterov: bool = False
    scale: str = bounded("aligned", range=Choice(("aligned", *SCALES.options)))
    layout: str = bounded("out_in", range=LAYOUTS)
    blocks: Any = bounded(1, range=None)
    batch_dims: int = bounded(0, range=Interval(0, integer=True))
    _matrix: bool | None = dataclasses.field(default=None, repr=False)  # decided at setup

    structural = ("fallback", "layout", "batch_dims", "_matrix")

    def start(self, x: Array) -> State:
        block_runs(self, tuple(x.shape))
        return zeros_like(x), zeros(x, neuron_shape(self, tuple(x.shape)), real=True)

    def step(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v = state
        b1, b2 = self.beta
        m = interpolate(m, dx, 1 - b1)
        u = interpolate(m, dx, 1 - b1) if self.nesterov else m
        u = polar(self, u)
        shape = tuple(x.shape)
        own = squares(self, u)
        v = interpolate(v, own / max(1, inputs(self, shape)), 1 - b2)
        factor = 1 / (sqrt(v) + self.epsilon)
        factor = factor * self._scaled(shape, own, own * factor * factor)
        return (m, v), self.eta * add_multiple(times(self, factor, u), x, self.lambda_)

    def _scaled(self, shape: tuple[int, ...], before: Array, after: Array) -> Array:
        """What each neuron is multiplied by last, from the squares of neurons before and after they were divided."""
        if self.scale == "aligned":
            return aligned(self, shape, after, self.epsilon)
        columns = inputs(self, shape)
        wanted = over_blocks(self, shape, before, lambda norm, outputs: scale_of(self.scale, outputs, columns) * norm)
        return wanted / over_blocks(self, shape, after, lambda norm, _: norm + self.epsilon)
