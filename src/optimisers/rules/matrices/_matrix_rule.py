"""What rules for matrices share: which arrays are theirs, what steps the others, and the ratio of the two learning rates."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

from ...arrays import Array, is_complex
from ...errors import HyperParameterError, RuleError
from .._adjust import has_eta, scaled
from .._base import AbstractRule, CompositeRule, Law, Stages, State
from .matrix_step import check_matrix_fields


def is_lone(shape: tuple[int, ...], batch_dims: int) -> bool:
    """Whether there is no matrix behind the dimensions that only stack: a vector, or all but one dimension of length 1."""
    return len(shape) < batch_dims + 2 or math.prod(shape[batch_dims + 1 :]) == 1


class MatrixRule(CompositeRule):
    """A rule that steps real matrices itself, and everything else by the rule in its field ``opt``.

    Write ``start``, and ``step`` or ``matrix_stages``. They are given arrays of which the first ``batch_dims`` dimensions only
    stack matrices.
    """

    opt: Any
    eta: Any
    lambda_: Any
    fallback: Callable[[Any], bool] | None
    batch_dims: int
    _matrix: bool | None  # decided at setup

    opaque = ("opt",)

    alone: ClassVar[bool] = False
    """Whether opt may be None, and all arrays are stepped by the rule itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not (isinstance(self.opt, AbstractRule) or (self.alone and self.opt is None)):
            msg = f"{name}: field 'opt' must be {'None or ' if self.alone else ''}a rule; got {self.opt!r}"
            raise RuleError(msg)
        if not (self.fallback is None or callable(self.fallback)):
            msg = f"{name}: field 'fallback' must be None or a predicate on the array; got {self.fallback!r}"
            raise HyperParameterError(msg)
        if hasattr(self, "blocks"):
            check_matrix_fields(self)

    @abstractmethod
    def start(self, x: Array) -> State:
        """``init`` of a matrix. Raises RuleError if it cannot be stepped."""

    def step(self, state: State, x: Array, dx: Array) -> tuple[State, Array]:
        """``apply`` to a matrix."""
        msg = f"{type(self).__name__} is to write step, or matrix_stages in its place"
        raise NotImplementedError(msg)

    def matrix_stages(self, state: State, x: Array, dx: Array) -> Stages:
        """``stages`` of a matrix."""
        return self.step(state, x, dx)
        yield  # makes this a generator

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise RuleError unless a matrix of this shape can be stepped: asked at setup of the whole array.

        ``start`` may be given a part of one, where arrays are cut over ranks.
        """

    @property
    def law(self) -> Law:
        if self._matrix is None:
            return "none"
        return "stackable" if self._matrix else self.opt.law

    def resolved(self, x: Array, path: str) -> Self:
        matrix = self._is_matrix(x)
        if matrix:
            self.check(tuple(x.shape))
        return self.replace(_matrix=matrix, opt=None if self.opt is None else self.opt.resolved(x, path))

    def unresolved(self) -> Self:
        return self.replace(_matrix=None, opt=None if self.opt is None else self.opt.unresolved())

    def stacked(self) -> Self:
        return self.replace(batch_dims=self.batch_dims + 1) if self._matrix else self.replace(opt=self.opt.stacked())

    def with_eta(self, eta: Any, base: Self) -> Self:
        if self.opt is None:
            return self.replace(eta=eta)
        name = type(self).__name__
        if not has_eta(self.opt):
            msg = (
                f"adjust: {name} gives its opt the learning rate that keeps their ratio, but {self.opt!r} has none; "
                f"adjust(state, eta=...) sets the learning rate of {name} alone"
            )
            raise HyperParameterError(msg)
        if base.eta == 0:
            msg = f"adjust: {name}'s learning rate was 0 at setup, so there is no ratio to keep; use adjust(state, eta=...)"
            raise HyperParameterError(msg)
        rule = self.replace(eta=eta)  # checks it first, for an error that names it
        return rule.replace(opt=scaled(self.opt, base.opt, eta / base.eta))

    def _is_matrix(self, x: Array) -> bool:
        if self._matrix is not None:
            return self._matrix
        if self.opt is None:
            return True
        return not is_lone(tuple(x.shape), self.batch_dims) and not (self.fallback is not None and bool(self.fallback(x)))

    def decay_factor(self, state: State) -> Any:
        return self.eta * self.lambda_ if self._matrix else self.opt.decay_factor(state)

    def init(self, x: Array) -> State:
        if not self._is_matrix(x):
            return self.opt.init(x)
        if is_complex(x):
            what = "array" if self.opt is None else "matrix"
            msg = f"{type(self).__name__} cannot step a complex {what}; choose another rule for it, with Route or fallback"
            raise RuleError(msg)
        return self.start(x)

    def init_as(self, x: Array, dtype: str) -> State:
        return super().init_as(x, dtype) if self._is_matrix(x) else self.opt.init_as(x, dtype)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        if not self._is_matrix(x):
            return (yield from self.opt.stages(state, x, dx))  # type: ignore[no-any-return]
        return (yield from self.matrix_stages(state, x, dx))
