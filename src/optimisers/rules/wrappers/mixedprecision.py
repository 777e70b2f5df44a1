"""Training in low precision with master weights: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...arrays import Array, as_dtype_name, cast_to, detached, dtype_name, real_dtype, where, working_dtype
from ...errors import HyperParameterError, RuleError
from .._base import AbstractRule, Assign, Stages, State, stepped, walk
from .._precision import in_working_precision
from .._wrapper import Wrapper


@dataclass(frozen=True)
class MixedPrecision(Wrapper):
    """Steps a master copy of each array, kept in another dtype; the array itself becomes the rounded master.

    The array is the truth: an element that is not the rounded master any more was written by others, such as
    ``load_state_dict`` or an average, and its master is then that value.

    Args:
        rule: the rule for the master copy; its moments have the master's dtype.
        dtype: dtype of the master, a name or a NumPy or torch dtype. A complex array has a complex master of that precision.

    State: (master, or None for an array that has this dtype already; state of the rule).
    """

    rule: AbstractRule
    dtype: Any = "float32"
    _: dataclasses.KW_ONLY
    _own: str | None = dataclasses.field(default=None, repr=False)  # the array's dtype, where there is a master; made at setup

    structural = ("dtype", "_own")
    alters = False
    assigns = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(isinstance(inner, MixedPrecision) for inner in walk(self.rule)):
            msg = "MixedPrecision inside MixedPrecision would keep two masters of one array; remove one of them"
            raise RuleError(msg)
        try:
            object.__setattr__(self, "dtype", as_dtype_name(self.dtype))
        except ValueError as error:
            msg = f"MixedPrecision: field 'dtype' must be a real floating dtype; {error}"
            raise HyperParameterError(msg) from None

    def resolved(self, x: Array, path: str) -> MixedPrecision:
        own = dtype_name(x)
        return super().resolved(x, path).replace(_own=None if real_dtype(own) == self.dtype else own)

    def unresolved(self) -> MixedPrecision:
        return super().unresolved().replace(_own=None)

    def init(self, x: Array) -> State:
        master = cast_to(x, self.dtype)
        return (None if master is x else detached(master)), self.rule.init(master)

    def init_as(self, x: Array, dtype: str) -> State:
        master = cast_to(x, self.dtype)
        return (None if master is x else detached(master)), self.rule.init_as(master, dtype)

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        master, inner = state
        if master is None:
            inner, step = yield from self.rule.stages(inner, x, dx)
            return (None, inner), step
        present = self._present(master, x)
        inner, step = yield from in_working_precision(self.rule, inner, present, dx)
        if step is None:
            return (master, inner), None
        new = cast_to(stepped(cast_to(present, working_dtype(self.dtype)), step), self.dtype)
        return (new, inner), Assign(new)

    def _present(self, master: Array, x: Array) -> Array:
        """The master where the array is it, rounded; elsewhere the array. NaN is the same from both."""
        seen = dtype_name(x)  # half precision is widened before a rule sees it
        if self._own is None and seen == dtype_name(master):
            return master  # an array of which only the widened values are known
        rounded = cast_to(cast_to(master, self._own or seen), seen)
        return cast_to(where(rounded == x, master, x), self.dtype)
