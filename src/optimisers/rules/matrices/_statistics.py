"""What rules with a matrix for each side share: how they begin, when they are renewed, and what is done if that fails."""

from __future__ import annotations

import warnings
from typing import Any

from ...arrays import Array, cast_to, dtype_name, eigen, finite_each, identities, inverse_root, where, working_dtype, zeros
from ...errors import DecompositionWarning, HyperParameterError, brief
from .._base import State
from .._fields import is_tensor, real
from .._seeds import stream_key
from .._states import map_state, state_leaves
from ._sides import piece_shapes


def check_decay(rule: Any) -> None:
    """Raise HyperParameterError unless ``rho`` is None or a decay."""
    if rule.rho is None or is_tensor(rule.rho):
        return
    rho = real(rule.rho, 0)
    if rho is None or rho >= 1:
        msg = f"{type(rule).__name__}: field 'rho' must be None or in [0, 1); got {brief(rule.rho)}"
        raise HyperParameterError(msg)
    object.__setattr__(rule, "rho", rho)


def check_positive(rule: Any, name: str) -> None:
    """Raise HyperParameterError unless a field is None or a number > 0."""
    value = getattr(rule, name)
    if value is None or is_tensor(value):
        return
    number = real(value, 0)
    if not number:
        msg = f"{type(rule).__name__}: field {name!r} must be None or a finite number > 0; got {brief(value)}"
        raise HyperParameterError(msg)
    object.__setattr__(rule, name, number)


def offset_of(rule: Any, path: str) -> int:
    """By how many steps the renewals of this array are early."""
    return stream_key(f"{type(rule).__name__}:{path}") % rule.refresh if rule.spread else 0


def takes_vector(rule: Any, x: Array) -> bool:
    """Whether an array is a vector, and to be stepped by the rule."""
    if not rule.vectors or rule._matrix is not None or x.ndim <= rule.batch_dims:
        return False
    return not (rule.fallback is not None and bool(rule.fallback(x)))


def zero_statistics(rule: Any, x: Array, shape: tuple[int, ...], least: int = 1) -> list[Array | None]:
    """For each side of a piece a zero matrix, of the precision that x is computed with; None for sides too short or long."""
    lead = len(shape) - sides_in(rule, tuple(x.shape))
    narrow = x.reshape(-1)[:0]
    like = cast_to(narrow, working_dtype(dtype_name(narrow)))
    return [zeros(like, (*shape[:lead], side, side)) if least <= side <= rule.max_size else None for side in shape[lead:]]


def in_one_dtype(state: State, dx: Array) -> tuple[State, Array]:
    """State and gradient in the wider of their dtypes, since matrices of two are not multiplied."""
    names = {dtype_name(leaf) for leaf in (dx, *state_leaves(state))}
    if len(names) < 2:
        return state, dx
    wide = "float64" if "float64" in names else "float32"
    return map_state(lambda leaf: cast_to(leaf, wide), state), cast_to(dx, wide)


def sides_in(rule: Any, shape: tuple[int, ...]) -> int:
    """How many sides an array of this shape has."""
    rest: int = len(shape) - rule.batch_dims
    return min(rest, 2) if rule.merge else rest


def remark_on(rule: Any, shape: tuple[int, ...], what: str = "no basis") -> str:
    """Which sides of an array of this shape are too long."""
    if rule._matrix is False:
        return ""
    sides = {side for piece in piece_shapes(rule, shape) for side in piece[-sides_in(rule, shape) :]}
    return ", ".join(f"{what} for a side of {side:,}" for side in sorted(sides) if side > rule.max_size)


def of_finite(rule: Any, x: Array) -> Array | None:
    """None if matrices are finite; else which are, after a warning."""
    finite = finite_each(x)
    if finite is not None:
        warn_of(rule, x, "not finite, and keep what was made of them last")
    return finite


def eigenbasis(rule: Any, statistic: Array) -> Array:
    """The eigenvectors of a statistic, the identity for one that is not finite."""
    finite = of_finite(rule, statistic)
    if finite is not None:
        statistic = where(finite, statistic, identities(statistic))
    found = eigen(statistic)
    if found.damped:
        warn_of(rule, statistic, _DAMPED)
    return found.vectors if finite is None else where(finite, found.vectors, identities(statistic))


def root_of(rule: Any, statistic: Array, last: Array, power: Any) -> Array:
    """``(statistic + epsilon * I)**-power``, the last one for a statistic that is not finite."""
    finite = of_finite(rule, statistic)
    if finite is not None:
        statistic = where(finite, statistic, identities(statistic))
    root, damped = inverse_root(statistic, power, rule.epsilon)
    if damped:
        warn_of(rule, statistic, _DAMPED)
    return root if finite is None else where(finite, root, last)


_DAMPED = "decomposed with something added to their diagonals, since they could not be without"


def warn_of(rule: Any, x: Array, what: str, name: str = "statistics") -> None:
    """Warn that matrices of a rule are something."""
    msg = f"{type(rule).__name__}: {name} of shape {tuple(x.shape)} are {what}"
    warnings.warn(msg, DecompositionWarning, stacklevel=2)
