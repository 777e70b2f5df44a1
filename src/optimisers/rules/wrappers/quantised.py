"""Moments in 8 bits: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861; second moments without a zero: Li et al. 2023, https://arxiv.org/abs/2309.01507."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ...arrays import Array, concatenate, decoded, element_count, encoded, kind
from ...errors import HyperParameterError, RuleError
from .._base import AbstractRule, Law, Stages, State, run_alone, stages_of
from .._fields import Choice, Interval, bounded, whole
from .._states import map_state, state_leaves
from .._wrapper import Wrapper

PIECE = 2**16
"""Elements that are decoded at a time, where the rule inside is elementwise."""


class Codes(NamedTuple):
    """An array in 8 bits: int8 codes of its shape, and a scale for each block of elements."""

    codes: Any
    scales: Any


@dataclass(frozen=True)
class Quantised(Wrapper):
    """Keeps the moments of the rule inside in 8 bits, a quarter of float32's memory.

    They are decoded for a step and coded anew after it. Arrays of more than 65,536 elements are stepped piece by piece if the
    rule is elementwise, so that no moment is ever there as a whole.

    Args:
        rule: any whose state is made of arrays of the parameter's shape and of numbers.
        bits: 8.
        block: elements that share a scale, their greatest magnitude, >= 1. Arrays of fewer elements are kept as they are.
        code: ``"power"``: levels are denser towards 0, the square of evenly spaced ones, or for blocks without a negative
            element, such as second moments, their fourth power; ``"linear"``: evenly spaced ones.

    State: (state of the rule,), with Codes(codes, scales) in the place of arrays: int8 codes of their shape, and scales of
    shape (blocks,) in the dtype of moments, float32 for half precision. Complex arrays are refused. Codes depend on the places
    in the array, so no law holds. No derivative passes through a code.
    """

    rule: AbstractRule
    bits: int = bounded(8, range=None)
    block: int = bounded(256, range=Interval(1, integer=True))
    code: str = bounded("power", range=Choice(("power", "linear")))

    structural = ("bits", "block", "code")
    real_only = True
    transparent = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if whole(self.bits) != 8:
            msg = f"Quantised: field 'bits' must be 8; got {self.bits!r}"
            raise HyperParameterError(msg)
        object.__setattr__(self, "bits", 8)

    @property
    def law(self) -> Law:
        return "none"

    def start(self, x: Array, inner: State) -> State:
        for leaf in state_leaves(inner):
            if kind(leaf) and leaf.ndim and tuple(leaf.shape) != tuple(x.shape):
                msg = (
                    f"Quantised: the state of {type(self.rule).__name__} holds an array of shape {tuple(leaf.shape)} for a "
                    f"parameter of shape {tuple(x.shape)}; only arrays of the parameter's shape can be kept in 8 bits"
                )
                raise RuleError(msg)
        return (self._encoded(inner, element_count(x)),)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        (inner,) = state
        count = element_count(x)
        if self.rule.law == "elementwise" and count > PIECE and self.block <= PIECE:
            return self._by_pieces(inner, x, dx)
        inner, step = yield from stages_of(self.rule, self._decoded(inner), x, dx)
        return (self._encoded(inner, count),), step

    def _by_pieces(self, inner: State, x: Array, dx: Array) -> tuple[State, Array | None]:
        length = PIECE // self.block * self.block
        flat, grads, count = x.reshape((-1,)), dx.reshape((-1,)), element_count(x)
        states, steps = [], []
        for first in range(0, count, length):
            part = slice(first, first + length)
            blocks = slice(first // self.block, (first + length) // self.block)
            given = _each(lambda c, p=part, b=blocks: Codes(c.codes.reshape((-1,))[p], c.scales[b]), inner)
            after, step = run_alone(self.rule.stages(self._decoded(given), flat[part], grads[part]))
            states.append(self._encoded(after, self.block))
            steps.append(step)
        joined = _joined(states, tuple(x.shape))
        return (joined,), None if steps[0] is None else concatenate(steps, axis=0).reshape(x.shape)

    def _encoded(self, state: State, count: int) -> State:
        """The state with codes in the place of arrays, of a parameter of so many elements."""
        if count < self.block:
            return state
        linear = self.code == "linear"
        return map_state(
            lambda leaf: Codes(*encoded(leaf, self.block, linear=linear)) if kind(leaf) and leaf.ndim else leaf, state
        )

    def _decoded(self, state: State) -> State:
        return _each(lambda c: decoded(c.codes, c.scales, self.block, linear=self.code == "linear"), state)


def _each(f: Any, state: State) -> State:
    """f at all codes of a state."""
    if isinstance(state, Codes):
        return f(state)
    if isinstance(state, dict):
        return {key: _each(f, value) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        items = [_each(f, item) for item in state]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return state


def _joined(states: list[State], shape: tuple[int, ...]) -> State:
    """The states of all pieces as that of an array of this shape."""
    first = states[0]
    if isinstance(first, Codes):
        codes, scales = (concatenate(list(parts), axis=0) for parts in zip(*states, strict=True))
        return Codes(codes.reshape(shape), scales)
    if isinstance(first, dict):
        return {key: _joined([state[key] for state in states], shape) for key in first}
    if isinstance(first, (tuple, list)):
        items = [_joined(list(parts), shape) for parts in zip(*states, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first
