"""Numbers on the host: what a trace computes from hyper-parameters and counters, before any element is looked at."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

COMPARE = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne}


class Untraceable(Exception):  # noqa: N818 (it says what the rule is; nothing has gone wrong)
    """A rule does something that no loop over elements can be made of, or that depends on their values."""


class Node(Protocol):
    """A value of a trace, as `_traced.Traced`."""

    op: str
    args: tuple[Any, ...]
    dtype: str
    element: bool
    value: Any


_GIVEN = frozenset({"number", "sum", "largest", "smallest"})


def _pow(a: Any, b: Any) -> Any:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):  # NumPy's own power may differ from Python's in the last bit
        return np.array([math.pow(x, y) for x, y in zip(*np.broadcast_arrays(a, b), strict=True)])
    return math.pow(a, b)


def exp(x: float) -> float:
    """The exponential of a number, as loops compute it (NumPy's may differ in the last bit)."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def log(x: float) -> float:
    """The natural logarithm of a number, as loops compute it; -inf for 0, NaN below."""
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _each(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return lambda x: np.array([function(value) for value in x]) if isinstance(x, np.ndarray) else function(x)


_HOST_OPS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs, "pow": _pow,
    "div": np.true_divide, "sqrt": np.sqrt, "exp": _each(exp), "log": _each(log), "tanh": np.tanh,
    "max": np.maximum, "min": np.minimum, "sign": np.sign, "isnan": np.isnan, "isfinite": np.isfinite, **COMPARE,
    "and": np.logical_and, "or": np.logical_or, "not": np.logical_not, "where": np.where,
}  # fmt: skip


class Tape:
    """Numbers as functions of inputs: written down once, run often.

    Args:
        nodes: what is to be computed.
        given: the names of the inputs.

    Raises Untraceable if a number depends on the values of elements.
    """

    def __init__(self, nodes: Sequence[Node], given: Iterable[str]) -> None:
        self._given = frozenset(given)
        self._index: dict[int, int] = {}
        self._start: list[Any] = []  # inputs (by name) and constants come first in the order of use
        self._steps: list[tuple[int, Callable[..., Any], tuple[int, ...]]] = []
        self._names: list[tuple[int, str]] = []
        self._results = [self._place(node) for node in nodes]

    def _place(self, node: Node) -> int:
        if id(node) in self._index:
            return self._index[id(node)]
        if node.op in _GIVEN and node.value in self._given:
            value, name = None, node.value
        elif node.op == "const":
            value, name = node.value, None
        elif not node.element and (node.op in _HOST_OPS or node.op == "cast"):
            arguments = tuple(self._place(arg) for arg in node.args)
            function = _HOST_OPS.get(node.op, _same)
            self._steps.append((len(self._start), _in_single(function) if node.dtype == "float32" else function, arguments))
            value, name = None, None
        else:
            raise Untraceable("it decides by the values of elements")
        index = self._index[id(node)] = len(self._start)
        self._start.append(value)
        if name is not None:
            self._names.append((index, name))
        return index

    def names(self) -> list[str]:
        """The inputs that are used."""
        return [name for _, name in self._names]

    def run(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The numbers: floats, or vectors where inputs are vectors. In float64, but what is float32 is rounded to it."""
        values = list(self._start)
        for index, name in self._names:
            values[index] = inputs[name]
        for index, function, arguments in self._steps:
            values[index] = function(*[values[i] for i in arguments])
        return [values[i] for i in self._results]


def _same(value: Any) -> Any:
    return value


def _in_single(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: np.float64(np.float32(function(*args))) if np.ndim(args[0]) == 0 else _rounded(function(*args))


def _rounded(values: Any) -> Any:
    return values.astype(np.float32).astype(np.float64)


def evaluated(node: Node, inputs: Mapping[str, float]) -> Any:
    """The value of a number; Untraceable if it depends on the values of elements."""
    with np.errstate(all="ignore"):
        (value,) = Tape([node], inputs).run(inputs)
    return value.item() if isinstance(value, np.generic) else value
