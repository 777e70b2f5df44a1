"""The matrix step of Muon as a member of a chain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ...arrays import Array, concatenate
from ...errors import HyperParameterError, RuleError, brief
from .._base import Stages, State, TransformingRule, Whole
from .._fields import Choice, Interval, bounded, whole
from .newtonschulz import NewtonSchulz, sign_times

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

    def init(self, x: Array) -> State:
        if x.ndim < self.batch_dims + 2:
            need = f"at least {self.batch_dims + 2} dimensions (batch_dims={self.batch_dims} and a matrix)"
            msg = f"Orthogonalise needs {need}, got shape {tuple(x.shape)}; route other arrays to another rule"
            raise RuleError(msg)
        self.check(tuple(x.shape))
        return None

    def check(self, shape: tuple[int, ...]) -> None:
        block_runs(self, shape)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        return state, (yield Whole(self, dx))

    def transform(self, u: Array) -> Array:
        return matrix_step(self, u)


def check_matrix_fields(rule: Any) -> None:
    """Raise HyperParameterError unless ``ns`` and ``blocks`` of the rule are what they should be."""
    name = type(rule).__name__
    if not isinstance(rule.ns, NewtonSchulz):
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
    shape = tuple(u.shape)
    matrix = u.reshape(matrix_shape(shape, rule.batch_dims))
    runs = block_runs(rule, shape)
    rows_first = rule.layout == "out_in"
    if 0 in shape or (len(runs) == 1 and runs[0][1] == 1):
        return sign_times(_scale(rule, matrix), matrix, rule.ns).reshape(shape)
    if not rows_first:
        matrix = matrix.mT
    pieces = []
    start = 0
    for size, count in runs:  # blocks of one size are orthogonalised as one stack
        lead, columns = matrix.shape[:-2], matrix.shape[-1]
        stack = matrix[..., start : start + size * count, :].reshape((*lead, count, size, columns))
        start += size * count
        scale = _scale(rule, stack if rows_first else stack.mT)
        pieces.append(sign_times(scale, stack, rule.ns).reshape((*lead, count * size, columns)))
    whole = concatenate(pieces, axis=-2)
    return (whole if rows_first else whole.mT).reshape(shape)


def _scale(rule: Any, matrix: Array) -> float:
    rows, columns = matrix.shape[-2:]
    if rule.layout == "in_out":
        rows, columns = columns, rows
    if 0 in (rows, columns):
        return 1.0
    if rule.scale == "jordan":
        return math.sqrt(max(1, rows / columns))
    if rule.scale == "moonlight":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if rule.scale == "rms" else 1.0
