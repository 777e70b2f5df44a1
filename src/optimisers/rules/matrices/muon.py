"""Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scaling: Liu et al. 2025, https://arxiv.org/abs/2502.16982."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, add_multiple, interpolate, zeros_like
from ...errors import HyperParameterError
from .._base import AbstractRule, Stages, State, TransformingRule, Whole
from .._fields import Choice, Interval, bounded
from ..adaptive.adamw import AdamW
from ..adaptive.nadam import NAdam
from ._matrix_rule import MatrixRule
from .matrix_step import LAYOUTS, SCALES, block_runs, matrix_step
from .newtonschulz import NewtonSchulz, travelling_dtype


@dataclass(frozen=True)
class Muon(MatrixRule, TransformingRule):
    """Momentum orthogonalised by Newton-Schulz for matrices, and another rule for everything else.

    ``x <- x - eta * (scale * orthogonalise(u) + lambda_ * x)`` with u the (Nesterov) momentum.

    Args:
        opt: rule for arrays that are no matrices (all but one dimension of length 1), and where ``fallback`` is true.
        eta: learning rate of the matrices, >= 0. ``adjust(state, eta)`` gives opt the learning rate that keeps the ratio the
            two had at setup; ``adjust(state, eta=...)`` sets this one alone.
        mu: momentum, in [0, 1).
        lambda_: weight decay of the matrices, multiplied by eta (not by the scale), >= 0.
        fallback: predicate on the array, asked once at setup: true sends it to opt.
        ns: the iteration, a `NewtonSchulz`.
        momentum: ``"ema"`` m <- mu m + (1 - mu) dx; ``"ema_debiased"`` the same, corrected for its start at zero;
            ``"classic"`` m <- mu m + dx.
        nesterov: orthogonalise the momentum as it will be after the next gradient, if that is like this one.
        scale: as in `Orthogonalise`.
        layout: as in `Orthogonalise`.
        blocks: as in `Orthogonalise`.
        batch_dims: as in `Orthogonalise`.

    State: m, of x's shape (with ``"ema_debiased"``: ``(m, mu**t)``); for the other arrays the state of opt. Complex matrices
    are refused.
    """

    opt: AbstractRule = AdamW(3e-4, (0.9, 0.95), 0.01)
    eta: Any = 0.02
    mu: Any = 0.95
    lambda_: Any = 0.01
    fallback: Callable[[Any], bool] | None = None
    _: dataclasses.KW_ONLY
    ns: NewtonSchulz = bounded(NewtonSchulz(), range=None)
    momentum: str = bounded("ema", range=Choice(("ema", "ema_debiased", "classic")))
    nesterov: bool = True
    scale: str = bounded("jordan", range=SCALES)
    layout: str = bounded("out_in", range=LAYOUTS)
    blocks: Any = bounded(1, range=None)
    batch_dims: int = bounded(0, range=Interval(0, integer=True))
    _matrix: bool | None = dataclasses.field(default=None, repr=False)  # decided at setup

    structural = ("fallback", "momentum", "batch_dims", "_matrix")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Muon:
        """Muon as another implementation has it: ``"kellerjordan"``, ``"torch"``, ``"moonlight"``, ``"optax"``, ``"dion"``.

        Reproduces that implementation's numbers, at the precision asked for in ``ns``, with two exceptions: convolutions
        are always scaled as the flattened matrix, and absent gradients are always skipped. Overrides are fields.
        """
        if name not in PRESETS:
            msg = f"Muon.preset: {name!r} is not one of {', '.join(map(repr, PRESETS))}"
            raise HyperParameterError(msg)
        return cls(**{**PRESETS[name], **overrides})

    def start(self, x: Array) -> State:
        return (zeros_like(x), self.mu) if self.momentum == "ema_debiased" else zeros_like(x)

    def matrix_stages(self, state: State, x: Array, dx: Array) -> Stages:
        state, u = self._momentum(state, dx)
        direction = yield Whole(self, u)
        return state, self.eta * add_multiple(direction, x, self.lambda_)

    def check(self, shape: tuple[int, ...]) -> None:
        block_runs(self, shape)

    def travels_as(self, u: Array) -> str:
        return travelling_dtype(u, self.ns)

    def transform(self, u: Array) -> Array:
        return matrix_step(self, u)

    def _momentum(self, state: State, dx: Array) -> tuple[State, Array]:
        """The new state, and what is to be orthogonalised."""
        mu = self.mu
        if self.momentum == "classic":
            m = add_multiple(dx, state, mu)
            return m, add_multiple(dx, m, mu) if self.nesterov else m
        if self.momentum == "ema":
            m = interpolate(state, dx, 1 - mu)
            return m, interpolate(m, dx, 1 - mu) if self.nesterov else m
        m, power = state
        m = interpolate(m, dx, 1 - mu)
        if not self.nesterov:
            return (m, power * mu), m / (1 - power)
        return (m, power * mu), mu / (1 - power * mu) * m + (1 - mu) / (1 - power) * dx


def not_a_matrix(x: Array) -> bool:
    """Whether an array has other than two dimensions."""
    return bool(x.ndim != 2)


# dion's own Polar Express coefficients, made for five steps; the safety factor of 1.02 is in them already.
_DION: Any = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

PRESETS: dict[str, dict[str, Any]] = {
    "kellerjordan": {
        "opt": AdamW(3e-4, (0.9, 0.95), 0.0, 1e-10), "eta": 0.02, "mu": 0.95, "lambda_": 0.0,
    },
    "torch": {
        "opt": AdamW(1e-3, (0.9, 0.999), 0.1), "eta": 1e-3, "mu": 0.95, "lambda_": 0.1,
        "ns": NewtonSchulz(normaliser="clamp"),
    },
    "moonlight": {
        "opt": AdamW(1e-3, (0.9, 0.95), 0.1), "eta": 1e-3, "mu": 0.95, "lambda_": 0.1,
        "momentum": "classic", "scale": "moonlight",
    },
    # optax steps everything else by AdamW with Nesterov momentum and no decay. NAdam divides by sqrt(b2) more, which the
    # learning rate and epsilon take back.
    "optax": {
        "opt": NAdam(0.02 * 0.999**0.5, (0.9, 0.999), 1e-8 * 0.999**0.5), "eta": 0.02, "mu": 0.95, "lambda_": 0.0,
        "fallback": not_a_matrix, "momentum": "ema_debiased", "layout": "in_out", "ns": NewtonSchulz(epsilon=1e-8),
    },
    "dion": {
        "opt": AdamW(0.01, (0.9, 0.95), 0.01), "eta": 0.01, "mu": 0.95, "lambda_": 0.01,
        "ns": NewtonSchulz(coefficients=_DION, epsilon=1e-8, safety=1.02),
        "momentum": "classic", "nesterov": False, "scale": "rms",
    },
}  # fmt: skip
