"""The ranges of hyper-parameters, and the check that every rule runs on construction and on ``adjust``."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import kind
from ..errors import HyperParameterError, UnknownFieldError, brief

inf = math.inf

MOST = 2**63 - 1
"""The largest count: what a 64-bit integer, and so a 0-d tensor in a state, can hold."""


def whole(value: Any, least: int = -MOST, most: int = MOST) -> int | None:
    """A Python or NumPy whole number as an int, or None if it is none (as truth values) or outside of ``[least, most]``."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        return None
    number = int(value)
    return number if least <= number <= most else None


def real(value: Any, least: float = -inf) -> float | None:
    """A Python or NumPy real number as a float, or None if it is none, not finite, or less than ``least``."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    number = _float(value)
    return number if math.isfinite(number) and number >= least else None


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high; ``open_low`` and ``open_high`` exclude the ends; ``length`` asks for so many of them."""

    low: float = -inf
    high: float = inf
    open_low: bool = False
    open_high: bool = False
    integer: bool = False
    length: int | None = None
    finite: bool = True

    def __str__(self) -> str:
        if self.integer:
            text = f"a whole number >= {self.low:g}"
        elif self.high == inf:
            text = f"a number {'>' if self.open_low else '>='} {self.low:g}" if self.low > -inf else "a number"
            text = ("a finite " + text[2:]) if self.finite else text
        else:
            text = f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        return text if self.length is None else f"{self.length} numbers, each {text}"

    def accepts(self, value: Any) -> bool:
        if self.integer:
            return whole(value, int(self.low)) is not None
        if math.isnan(value) or (self.finite and math.isinf(value)):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below)


@dataclass(frozen=True)
class Ordered:
    """A pair (low, high) with ``0 < low < high``; with ``around_one`` also ``low < 1 < high``."""

    around_one: bool = False

    def __str__(self) -> str:
        return "(down, up) with 0 < down < 1 < up" if self.around_one else "(low, high) with 0 < low < high"

    def accepts(self, low: float, high: float) -> bool:
        ordered = 0 < low < high < inf
        return ordered and (low < 1 < high or not self.around_one)


@dataclass(frozen=True)
class Choice:
    """One of a few names."""

    options: tuple[str, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(option) for option in self.options)


NON_NEGATIVE = Interval(0)
POSITIVE = Interval(0, open_low=True)
FRACTION = Interval(0, 1, open_high=True)
EXPONENT = Interval(0, 16)
"""Of counts of steps, whose powers are to stay within float64."""

# One table for the names that mean the same in every rule, so that a rule's fields are written plainly and a user's
# rule is checked as ours are. A field says otherwise with `metadata={"range": ...}` (None: no check).
RANGES: dict[str, Interval] = {
    **dict.fromkeys(("eta", "epsilon", "lambda_", "lb"), NON_NEGATIVE),
    **dict.fromkeys(("beta", "rho", "mu", "momentum"), FRACTION),
    **dict.fromkeys(("omega", "delta", "tau"), POSITIVE),
}

# What the fields are called elsewhere, for the error that names the right one.
ALIASES = {
    "lr": ("eta",),
    "learning_rate": ("eta",),
    "step_size": ("eta",),
    "betas": ("beta",),
    "b1": ("beta",),
    "b2": ("beta",),
    "beta1": ("beta",),
    "beta2": ("beta",),
    "eps": ("epsilon",),
    "weight_decay": ("lambda_",),
    "wd": ("lambda_",),
    "lambda": ("lambda_",),
    "decay": ("lambda_", "rho"),
    "alpha": ("rho",),
    "momentum": ("rho", "mu"),
    "centered": ("centred",),
    "max_norm": ("omega",),
    "norm_type": ("p",),
    "clip_value": ("delta",),
    "etas": ("ell",),
    "step_sizes": ("gamma",),
    "ns_steps": ("ns",),
    "gamma": ("lambda_",),
}


def field_range(field: dataclasses.Field[Any]) -> Interval | Ordered | Choice | None:
    """The range of a field: its own (metadata), or the one its name implies."""
    if "range" in field.metadata:
        return field.metadata["range"]  # type: ignore[no-any-return]
    return RANGES.get(field.name)


def bounded(default: Any = dataclasses.MISSING, *, range: Interval | Ordered | Choice | None, **options: Any) -> Any:
    """A dataclass field with a range of its own, or none."""
    return dataclasses.field(default=default, metadata={"range": range}, **options)


def is_tensor(value: object) -> bool:
    """Whether a field's value is a torch tensor: data, not a constant, and so exempt from range, repr and hash."""
    return kind(value) == "torch"


def check_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UnknownFieldError unless the constructor of this rule takes these arguments."""
    fields = [f for f in dataclasses.fields(cls) if f.init]
    names = [f.name for f in fields]
    for name in kwargs:
        if name not in names:
            raise UnknownFieldError(unknown_field(cls.__name__, name, names))
    positional = [f for f in fields if not f.kw_only]
    if len(args) > len(positional):
        msg = (
            f"{cls.__name__} takes at most {len(positional)} positional arguments ({', '.join(f.name for f in positional)}), "
            f"got {len(args)}"
        )
        raise UnknownFieldError(msg)
    given = {f.name for f in positional[: len(args)]}
    for name in given & kwargs.keys():
        msg = f"{cls.__name__} got field {name!r} twice, by position and by name"
        raise UnknownFieldError(msg)
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in given and f.name not in kwargs:
            msg = f"{cls.__name__} needs its field {f.name!r}; write {cls.__name__}({f.name}=...)"
            raise UnknownFieldError(msg)


def unknown_field(rule: str, name: str, names: list[str]) -> str:
    """The message for a field that a rule does not have."""
    close = [alias for alias in ALIASES.get(name, ()) if alias in names] or difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{rule} has no field {name!r}{hint} Its fields are: {', '.join(names) or 'none'}"


def checked(rule: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """The value of a field, numbers made plain Python numbers and lists tuples, or HyperParameterError."""
    limits = field_range(field)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(limits, Choice):
        if value not in limits.options:
            _refuse(rule, field.name, value, str(limits))
        return value
    if isinstance(field.default, bool) and not is_tensor(value):
        if not isinstance(value, (bool, np.bool_)):
            _refuse(rule, field.name, value, "True or False")
        return bool(value)
    if limits is None:
        return value
    if isinstance(limits, Ordered):
        return _checked_pair(rule, field.name, value, limits)
    length = limits.length
    if length is None and isinstance(field.default, tuple):
        length = len(field.default)
    if length is not None:
        if not isinstance(value, tuple) or len(value) != length:
            _refuse(rule, field.name, value, f"{length} numbers, each {limits}")
        return tuple(_number(rule, f"{field.name}[{i}]", v, limits) for i, v in enumerate(value))
    if isinstance(value, tuple):
        _refuse(rule, field.name, value, str(limits))
    return _number(rule, field.name, value, limits)


def _checked_pair(rule: str, name: str, value: Any, limits: Ordered) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        _refuse(rule, name, value, str(limits))
    low, high = (_number(rule, name, v, Interval()) for v in value)
    if not is_tensor(low) and not is_tensor(high) and not limits.accepts(low, high):
        _refuse(rule, name, value, str(limits))
    return low, high


def _number(rule: str, name: str, value: Any, limits: Interval) -> Any:
    if is_tensor(value):
        if value.ndim != 0 or not value.is_floating_point():
            shape, dtype = tuple(value.shape), value.dtype
            _refuse(rule, name, f"a tensor of shape {shape} and dtype {dtype}", "a 0-d floating point tensor", shown=True)
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        _refuse(rule, name, value, str(limits))
    number: Any = int(value) if isinstance(value, numbers.Integral) else _float(value)
    if not limits.accepts(number if limits.integer else _float(number)):
        _refuse(rule, name, value, f"{limits} and < 2**63" if limits.integer and number > MOST else str(limits))
    return number


def _float(value: Any) -> float:
    """The number as a float, infinite if it is larger than floats are."""
    try:
        return float(value)
    except OverflowError:
        return inf if value > 0 else -inf


def _refuse(rule: str, name: str, value: Any, expected: str, *, shown: bool = False) -> None:
    got = value if shown else brief(value)
    msg = f"{rule}: field {name!r} must be {expected}; got {got}"
    raise HyperParameterError(msg)
