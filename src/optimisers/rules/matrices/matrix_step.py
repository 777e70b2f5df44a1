"""The matrix step of Muon as a member of a chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ...arrays import Array, concatenate
from ...errors import HyperParameterError, RuleError, brief
from .._base import Stages, State, TransformingRule, Whole
from .._fields import Choice, Interval, bounded, whole
from .newtonschulz import NewtonSchulz, sign_times, travelling_dtype

SCALES = Choice(("jordan", "moonlight", "rms", "none"))
LAYOUTS = Choice(("out_in", "in_out"))


@dataclass(frozen=True)
class Orthogonalise(TransformingRule):
    """Replaces what comes by the nearest semi-orthogonal matrix, roughly, times a scale that depends on the shape.

    Args:
        ns: the iteration, a `NewtonSchulz`.
        scale: with (rows, columns) as (output, input) side: ``"jordan"`` sqrt(max(1, rows / columns)), ``"moonlight"``
            0.2 sqrt(max(rows, columns)), ``"rms"`` sqrt(rows / columns), ``"none"`` 1.
        layout: ``"out_in"`` as in torch.nn.Linear, or ``"in_out"`` for transposed layers: rows and columns change places in
            scale and blocks.
        blocks: so many equal blocks along the output axis (fused QKV), or a tuple of their sizes (grouped heads); each is
            orthogonalised on its own and scaled by its own shape.
        batch_dims: leading dimensions that only stack matrices (experts), >= 0.

    State: None. Arrays have at least ``batch_dims + 2`` dimensions; further trailing ones are flattened, so that a
    convolution is an (out, in * height * width) matrix. Complex arrays are refused.
    """

    ns: NewtonSchulz = bounded(NewtonSchulz(), range=None)
    scale: str = bounded("jordan", range=SCALES)
    layout: str = bounded("out_in", range=LAYOUTS)
    blocks: Any = bounded(1, range=None)
    batch_dims: int = bounded(0, range=Interval(0, integer=True))

    law = "stackable"
    real_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_matrix_fields(self)

    def stacked(self) -> Orthogonalise:
        return self.replace(batch_dims=self.batch_dims + 1)

    def resolved(self, x: Array, path: str) -> Orthogonalise:
        self.check(tuple(x.shape))
        return self

    def init(self, x: Array) -> State:
        return None

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < self.batch_dims + 2:
            need = f"at least {self.batch_dims + 2} dimensions (batch_dims={self.batch_dims} and a matrix)"
            msg = f"Orthogonalise needs {need}, got shape {shape}; route other arrays to another rule"
            raise RuleError(msg)
        block_runs(self, shape)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        return state, (yield Whole(self, dx))

    def travels_as(self, u: Array) -> str:
        return travelling_dtype(u, self.ns)

    def transform(self, u: Array) -> Array:
        return matrix_step(self, u)


def check_matrix_fields(rule: Any) -> None:
    """Raise HyperParameterError unless ``ns`` and ``blocks`` of the rule are what they should be."""
    name = type(rule).__name__
    if not isinstance(getattr(rule, "ns", NewtonSchulz()), NewtonSchulz):
        msg = f"{name}: field 'ns' must be a NewtonSchulz; got {rule.ns!r}"
        raise HyperParameterError(msg)
    several = isinstance(rule.blocks, (tuple, list))
    sizes = tuple(whole(n, 1) for n in (rule.blocks if several else (rule.blocks,)))
    if not sizes or None in sizes:
        msg = f"{name}: field 'blocks' must be a whole number >= 1, or a tuple of block sizes >= 1; got {brief(rule.blocks)}"
        raise HyperParameterError(msg)
    object.__setattr__(rule, "blocks", sizes if several else sizes[0])


def matrix_shape(shape: tuple[int, ...], batch_dims: int) -> tuple[int, ...]:
    """The shape as a stack of matrices: leading dimensions, rows, and everything else as columns."""
    lead, rest = shape[:batch_dims], shape[batch_dims:]
    return (*lead, rest[0], math.prod(rest[1:]))


def block_runs(rule: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The blocks along the output axis of the matrix, neighbours of one size together: (size, how many).

    Raises RuleError if they do not make up the axis.
    """
    shape = tuple(int(n) for n in shape)
    lead = rule.batch_dims
    output = shape[lead] if rule.layout == "out_in" else shape[lead + 1]
    several = isinstance(rule.blocks, tuple)
    if sum(rule.blocks) != output if several else output % rule.blocks:
        axis = "rows" if rule.layout == "out_in" else "columns"
        msg = (
            f"{type(rule).__name__}: blocks={rule.blocks!r} does not divide the output axis of shape {shape}, which has "
            f"{output} {axis} (layout={rule.layout!r}); blocks are a divisor of it, or sizes that add up to it"
        )
        raise RuleError(msg)
    inner = 1 if rule.layout == "out_in" else math.prod(shape[lead + 2 :])
    if not several:
        return ((output // rule.blocks * inner, rule.blocks),)
    return tuple((size * inner, len(list(same))) for size, same in groupby(rule.blocks))


def matrix_step(rule: Any, u: Array) -> Array:
    """u orthogonalised block by block and scaled, in its own shape."""
    return blockwise(rule, u, lambda stack, axis: sign_times(scale_of(rule.scale, *sides(stack, axis)), stack, rule.ns))


def polar(rule: Any, u: Array) -> Array:
    """u orthogonalised block by block, in its own shape."""
    return blockwise(rule, u, lambda stack, _: sign_times(1.0, stack, rule.ns))


def blockwise(rule: Any, u: Array, f: Callable[[Array, int], Array]) -> Array:
    """What f makes of each block of u, in the shape of u. f is given a stack of blocks, and the axis of their outputs."""
    shape = tuple(u.shape)
    runs = block_runs(rule, shape)
    if 0 in shape:
        return u
    if len(runs) == 1 and runs[0][1] == 1:
        matrix = u.reshape(matrix_shape(shape, rule.batch_dims))
        return f(matrix, -2 if rule.layout == "out_in" else -1).reshape(shape)
    return from_blocks(rule, [f(stack, -2) for stack in to_blocks(rule, u)], shape)


def to_blocks(rule: Any, u: Array) -> list[Array]:
    """The blocks of u as (outputs, inputs) matrices, those of one size as one stack: (..., how many, outputs, inputs)."""
    shape = tuple(u.shape)
    matrix = u.reshape(matrix_shape(shape, rule.batch_dims))
    if rule.layout == "in_out":
        matrix = matrix.mT
    *lead, _, columns = matrix.shape
    stacks = []
    start = 0
    for size, count in block_runs(rule, shape):
        stacks.append(matrix[..., start : start + size * count, :].reshape((*lead, count, size, columns)))
        start += size * count
    return stacks


def from_blocks(rule: Any, stacks: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """The array of this shape from its blocks."""
    flat = [stack.reshape((*stack.shape[:-3], stack.shape[-3] * stack.shape[-2], stack.shape[-1])) for stack in stacks]
    matrix = concatenate(flat, axis=-2)
    return (matrix if rule.layout == "out_in" else matrix.mT).reshape(shape)


def sides(stack: Array, axis: int) -> tuple[int, int]:
    """How many outputs and inputs its matrices have, the outputs lying along an axis, -2 or -1."""
    return stack.shape[axis], stack.shape[-3 - axis]


def scale_of(scale: str, outputs: float, inputs: float) -> float:
    """The factor with this name for a matrix with so many outputs and inputs."""
    if 0 in (outputs, inputs):
        return 1.0
    if scale == "jordan":
        return math.sqrt(max(1, outputs / inputs))
    if scale == "moonlight":
        return 0.2 * math.sqrt(max(outputs, inputs))
    return math.sqrt(outputs / inputs) if scale == "rms" else 1.0
