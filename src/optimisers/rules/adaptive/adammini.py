"""Adam-mini: Zhang et al. 2024, algorithm 1, https://arxiv.org/abs/2406.16793."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, abs2, sqrt, sum_over, zeros, zeros_like
from ...errors import HyperParameterError, RuleError, brief
from .._base import AbstractRule, State
from .._fields import bounded, whole


@dataclass(frozen=True)
class AdamMini(AbstractRule):
    """AdamW with one second moment a block: the running mean square of the block.

    Args:
        eta: learning rate, >= 0.
        beta: decays of the running mean and of the running square, in [0, 1).
        lambda_: weight decay, times eta, >= 0.
        epsilon: added to the root, >= 0.
        blocks: ``"rows"``, a block for each index of the first axis (output neurons, tokens of an embedding); ``"whole"``, one
            for the array; or so many equal blocks along the first axis (heads of queries and keys). Arrays of fewer than
            two dimensions are one block.

    State: ``(m, v, (b1**t, b2**t))``: m has x's shape, v is (blocks, 1).
    """

    eta: Any = 0.001
    beta: tuple[Any, Any] = (0.9, 0.999)
    lambda_: Any = 0.0
    epsilon: Any = 1e-8
    blocks: Any = bounded("rows", range=None)
    _stack: int = dataclasses.field(default=0, repr=False)

    law = "stackable"
    structural = ("blocks", "_stack")

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = self.blocks if isinstance(self.blocks, str) and self.blocks in {"rows", "whole"} else whole(self.blocks, 1)
        if blocks is None:
            msg = f"AdamMini: field 'blocks' must be 'rows', 'whole' or a whole number >= 1; got {brief(self.blocks)}"
            raise HyperParameterError(msg)
        object.__setattr__(self, "blocks", blocks)

    def stacked(self) -> AdamMini:
        return self.replace(_stack=self._stack + 1)

    def init(self, x: Array) -> State:
        return zeros_like(x), zeros(x, (*self._blocked(x)[:-1], 1), real=True), self.beta

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        m, v, (b1t, b2t) = state
        b1, b2 = self.beta
        shape = self._blocked(x)
        m = b1 * m + (1 - b1) * dx
        v = b2 * v + (1 - b2) / max(shape[-1], 1) * sum_over(abs2(dx).reshape(shape), -1)
        step = self.eta / (1 - b1t) * m.reshape(shape) / (1 / sqrt(1 - b2t) * sqrt(v) + self.epsilon)
        return (m, v, (b1t * b1, b2t * b2)), step.reshape(tuple(x.shape)) + self.eta * self.lambda_ * x

    def _blocked(self, x: Array) -> tuple[int, ...]:
        """The shape of x with an axis of blocks and one of what is in each."""
        stack, shape = tuple(x.shape[: self._stack]), tuple(x.shape[self._stack :])
        if len(shape) < 2 or self.blocks == "whole":
            return (*stack, 1, math.prod(shape))
        count = shape[0] if self.blocks == "rows" else self.blocks
        if count and shape[0] % count:
            msg = f"AdamMini: blocks={count} does not divide the first axis of shape {shape}"
            raise RuleError(msg)
        return (*stack, max(count, 1), math.prod(shape) // max(count, 1))
