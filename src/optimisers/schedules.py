"""Functions of the step for `Scheduled`: ``Scheduled(AdamW(), eta=schedules.WarmupCosine(3e-4, warmup=100, steps=1000))``.

Each is a frozen dataclass that is called with a step, a whole number from 0 on, and returns a float. Being values, schedules
compare by their fields, can be pickled, and have a ``repr`` that evaluates back. After its last step a schedule keeps its end
value.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal

from .errors import HyperParameterError, brief

__all__ = [
    "Constant", "Cosine", "Exponential", "InverseSqrt", "Joined", "Linear", "Polynomial", "Schedule", "Steps", "WarmupCosine",
    "WarmupStableDecay",
]  # fmt: skip

_LEAST = {"steps": 1, "every": 1, "warmup": 0, "decay": 0}
"""Fields that count steps, and how many there must be."""


class Schedule(ABC):
    """What the schedules have in common. Any other callable ``step -> value`` will do for `Scheduled` as well."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value for a step (a count from 0)."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name in _LEAST:
                self._require(field.name, _is_whole(value, _LEAST[field.name]), f"a whole number >= {_LEAST[field.name]}")
            elif field.type == "float":
                self._require(field.name, _is_number(value), "a finite number")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            msg = f"{type(self).__name__}: field {name!r} must be {expected}; got {brief(getattr(self, name))}"
            raise HyperParameterError(msg)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step; useful as a part of `Joined`."""

    value: float

    def __call__(self, step: int) -> float:  # noqa: ARG002 (the same at every step)
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``start`` to ``end`` in equal steps: torch's ``LinearLR``, optax's ``linear_schedule``."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _progress(step, self.steps)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """``end + (start - end) (1 - t/steps)**power``: torch's ``PolynomialLR``, optax's ``polynomial_schedule``."""

    start: float
    end: float
    steps: int
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("power", self.power > 0, "a number > 0")

    def __call__(self, step: int) -> float:
        return float(self.end + (self.start - self.end) * (1 - _progress(step, self.steps)) ** self.power)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from ``start`` to ``end`` (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, without restarts).

    torch's ``CosineAnnealingLR`` up to its ``T_max``, optax's ``cosine_decay_schedule``.
    """

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * _progress(step, self.steps))) / 2


@dataclass(frozen=True)
class Exponential(Schedule):
    """``start * factor**(t / every)``: torch's ``ExponentialLR`` with ``every=1``, optax's ``exponential_decay``."""

    start: float
    factor: float
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("factor", self.factor > 0, "a number > 0")

    def __call__(self, step: int) -> float:
        return float(self.start * self.factor ** (step / self.every))


@dataclass(frozen=True)
class Steps(Schedule):
    """``start``, multiplied by ``factor`` at each step of ``at``, or every ``at`` steps if that is one number.

    torch's ``MultiStepLR`` and ``StepLR``, optax's ``piecewise_constant_schedule``.
    """

    start: float
    factor: float
    at: int | tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        at = (0, *self.at) if isinstance(self.at, tuple) else (0, self.at)
        rising = all(_is_whole(step, 1) for step in at[1:]) and all(a < b for a, b in pairwise(at))
        self._require("at", rising, "a whole number >= 1, or rising ones")

    def __call__(self, step: int) -> float:
        passed = bisect_right(self.at, step) if isinstance(self.at, tuple) else step // self.at
        return float(self.start * self.factor**passed)


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """A linear warm-up to ``peak``, then ``peak * sqrt(warmup / t)`` (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762)."""

    peak: float
    warmup: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("warmup", self.warmup >= 1, "a whole number >= 1")

    def __call__(self, step: int) -> float:
        return self.peak * min(step / self.warmup, math.sqrt(self.warmup / max(step, 1)))


@dataclass(frozen=True)
class Joined(Schedule):
    """Schedules one after another: the next begins, at its own step 0, at each step of ``at``.

    torch's ``SequentialLR``, optax's ``join_schedules``. Any callables ``step -> value`` can be joined.
    """

    schedules: tuple[Callable[[int], float], ...]
    at: tuple[int, ...]

    def __post_init__(self) -> None:
        self._require(
            "schedules", isinstance(self.schedules, tuple) and all(map(callable, self.schedules)), "a tuple of callables"
        )
        rising = isinstance(self.at, tuple) and all(_is_whole(step, 0) for step in self.at)
        rising = rising and all(a <= b for a, b in pairwise(self.at))
        self._require("at", rising, "a tuple of rising whole numbers >= 0")
        self._require(
            "at", len(self.at) == len(self.schedules) - 1, f"of length {len(self.schedules) - 1}, one less than schedules"
        )

    def __call__(self, step: int) -> float:
        passed = bisect_right(self.at, step)
        return self.schedules[passed](step - (self.at[passed - 1] if passed else 0))


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """A linear warm-up from ``start`` to ``peak``, then half a cosine to ``end``; ``steps`` counts both.

    optax's ``warmup_cosine_decay_schedule``; the scheduler that transformers calls ``cosine``.
    """

    peak: float
    warmup: int
    steps: int
    start: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("steps", self.steps > self.warmup, f"more than the {self.warmup} steps of warm-up")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return Linear(self.start, self.peak, self.warmup)(step)
        return Cosine(self.peak, self.end, self.steps - self.warmup)(step - self.warmup)


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """A linear warm-up to ``peak``, a plateau, and a decay to ``end`` over the last ``decay`` of ``steps`` steps.

    Hu et al. 2024 (MiniCPM), https://arxiv.org/abs/2404.06395. The plateau can be trained on, and the decay be taken from any
    point of it. ``shape`` is that of the decay: ``"linear"``, ``"cosine"``, or ``"sqrt"``, which is ``1 - sqrt(progress)``
    (Hägele et al. 2024, https://arxiv.org/abs/2405.18392).
    """

    peak: float
    warmup: int
    steps: int
    decay: int
    start: float = 0.0
    end: float = 0.0
    shape: Literal["linear", "cosine", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("shape", self.shape in ("linear", "cosine", "sqrt"), "'linear', 'cosine' or 'sqrt'")
        least = self.warmup + self.decay
        self._require("steps", self.steps >= least, f"at least warmup + decay, which is {least}")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return Linear(self.start, self.peak, self.warmup)(step)
        done = _progress(step - (self.steps - self.decay), self.decay)
        left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "sqrt": 1 - math.sqrt(done)}[self.shape]
        return self.end + (self.peak - self.end) * left


def _progress(step: int, steps: int) -> float:
    """How much of ``steps`` has passed, from 0 to 1."""
    return min(max(step, 0), steps) / steps if steps else float(step >= 0)
