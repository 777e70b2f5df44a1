"""A third kind of array: one that stands for any array while a rule is looked at, and records what is computed from it.

The engine runs a rule once on such values and makes a loop of what they recorded. A value is either a *number* (one for
each array of the model: hyper-parameters, counters, norms) or an *element* (one for each element). Arithmetic follows the
library whose arrays it stands for, to the last bit, so that a compiled loop gives what the rule gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._tape import COMPARE, Untraceable, evaluated

HALF = frozenset({"float16", "bfloat16"})
FLOATS = frozenset({*HALF, "float32", "float64"})
HOST = "host"
"""The dtype of Python floats, which take the dtype of what they meet."""

_WIDTH = {"bool": 0, "int": 1, HOST: 2, "float32": 3, "float64": 4}
_MAP_NAMES = {
    "add": "add", "sub": "sub", "subtract": "sub", "mul": "mul", "multiply": "mul", "div": "div", "divide": "div",
    "true_divide": "div", "neg": "neg", "negative": "neg", "abs": "abs", "absolute": "abs", "sqrt": "sqrt", "square": "square",
    "sign": "sign", "sgn": "sign", "exp": "exp", "log": "log", "tanh": "tanh", "reciprocal": "reciprocal", "rsqrt": "rsqrt",
    "maximum": "maximum", "minimum": "minimum", "clamp_min": "maximum", "clamp_max": "minimum", "isnan": "isnan",
    "isfinite": "isfinite", "where": "where", "pow": "pow", "power": "pow", "lt": "lt", "less": "lt", "le": "le",
    "less_equal": "le", "gt": "gt", "greater": "gt", "ge": "ge", "greater_equal": "ge", "eq": "eq", "equal": "eq", "ne": "ne",
    "not_equal": "ne", "zeros_like": "zeros_like", "sum": "sum", "logical_and": "and_", "logical_or": "or_",
}  # fmt: skip


class Tracer:
    """What is common to the values of one trace.

    Attributes:
        library: ``"numpy"`` or ``"torch"``, whose arithmetic is followed.
        inputs: the values of the numbers that are inputs, by name, for the array at hand.
        guards: what was decided from numbers: (condition or number, what it was).
        exact: whether a loop must give the same bits, which holds for arithmetic and roots, not for exp and sums.
        whole: above 0 while a rule is looked at that may depend on the shape, which no trace knows.

    """

    def __init__(self, library: str, inputs: dict[str, float]) -> None:
        self.library = library
        self.inputs = inputs
        self.guards: list[tuple[Traced, float | bool]] = []
        self.exact = True
        self.scheduled: Callable[[Any, Traced], Any] | None = None
        self.whole = 0
        self._made: dict[Any, Traced] = {}

    def node(self, op: str, args: tuple[Traced, ...], dtype: str, *, element: bool, value: Any = None) -> Traced:
        """The value of that description, the same object whenever it is asked for again."""
        key = (op, tuple(map(id, args)), dtype, element, repr(value))
        if key not in self._made:
            self._made[key] = Traced(self, op, args, dtype, element, value)
        return self._made[key]

    def number(self, name: str, dtype: str = HOST) -> Traced:
        """A number that is given for each array."""
        return self.node("number", (), dtype, element=False, value=name)

    def array(self, name: str, dtype: str) -> Traced:
        """An array of which there is one element for each element of the parameter."""
        return self.node("load", (), dtype, element=True, value=name)

    def stacked(self, values: Sequence[Any]) -> Traced:
        """A value of which there is one for each of many arrays, as one with an element for each."""
        first: Traced = values[0]
        if not first.element or any(value is not first for value in values):
            raise Untraceable("it stacks several values")
        return first

    def lift(self, value: Any) -> Traced:
        """A value as one of this trace."""
        if isinstance(value, Traced):
            return value
        if isinstance(value, (bool, np.bool_)):
            return self.node("const", (), "bool", element=False, value=bool(value))
        if isinstance(value, (int, np.integer)) and abs(int(value)) < 2**53:
            return self.node("const", (), "int", element=False, value=int(value))
        if isinstance(value, float) and not isinstance(value, np.generic):
            return self.node("const", (), HOST, element=False, value=value)
        if isinstance(value, np.float64):
            return self.node("const", (), "float64", element=False, value=float(value))
        raise Untraceable(f"it computes with {type(value).__name__}")


class Traced:
    """A number or an element of a trace."""

    __slots__ = ("args", "dtype", "element", "op", "tracer", "value")
    __hash__ = None  # type: ignore[assignment]
    __array_priority__ = 1000

    def __init__(self, tracer: Tracer, op: str, args: tuple[Traced, ...], dtype: str, element: bool, value: Any) -> None:
        self.tracer, self.op, self.args, self.dtype, self.element, self.value = tracer, op, args, dtype, element, value

    # --- what rules ask arrays about ---

    @property
    def shape(self) -> tuple[Any, ...]:
        """One axis, whose length is a number of the trace: a rule with a law cannot depend on more."""
        return (self._count(),) if self.element else ()

    def numel(self) -> Any:
        """The number of elements."""
        return self.tracer.number("count", "int") if self.element else 1

    def _count(self) -> Traced:
        if self.tracer.whole:
            raise Untraceable("it depends on the shape of an array")
        return self.tracer.number("count", "int")

    def is_complex(self) -> bool:
        """Complex arrays are not traced."""
        return False

    requires_grad = False

    def detach(self) -> Traced:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _MAP_NAMES:
            return lambda *args, **kwargs: call(self.tracer, name, (self, *args), kwargs)
        raise Untraceable(f"it uses .{name} of an array")

    def __bool__(self) -> bool:
        return bool(self._decided())

    def __float__(self) -> float:
        return float(self._decided())

    def __int__(self) -> int:
        value = self._decided()
        if value != int(value):
            raise Untraceable("it makes a whole number of a fraction")
        return int(value)

    __index__ = __int__

    def _decided(self) -> float | bool:
        """The value, where it is known before any element is: what was traced then only holds for this value."""
        value: float | bool = evaluated(self, self.tracer.inputs)
        if all(node is not self for node, _ in self.tracer.guards):
            self.tracer.guards.append((self, value))
        return value

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise Untraceable("it makes a NumPy array of what it was given")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            raise Untraceable(f"it uses {ufunc.__name__}.{method}")
        return call(self.tracer, ufunc.__name__, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return call(self.tracer, func.__name__, args, kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = next(a.tracer for a in _flat(args) if isinstance(a, Traced))
        return call(tracer, getattr(func, "__name__", "?"), args, kwargs or {})

    # --- arithmetic ---

    def __add__(self, other: Any) -> Traced:
        return binary("add", self, other)

    def __radd__(self, other: Any) -> Traced:
        return binary("add", other, self)

    def __sub__(self, other: Any) -> Traced:
        return binary("sub", self, other)

    def __rsub__(self, other: Any) -> Traced:
        return binary("sub", other, self)

    def __mul__(self, other: Any) -> Traced:
        return binary("mul", self, other)

    def __rmul__(self, other: Any) -> Traced:
        return binary("mul", other, self)

    def __truediv__(self, other: Any) -> Traced:
        return binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Traced:
        if self.tracer.library == "torch" and self.dtype not in {HOST, "int"}:  # as torch.Tensor.__rtruediv__ does it
            return binary("mul", binary("div", 1.0, self), other)
        return binary("div", other, self)

    def __pow__(self, other: Any) -> Traced:
        return power(self, other)

    def __rpow__(self, other: Any) -> Traced:
        return power(self.tracer.lift(other), self)

    def __neg__(self) -> Traced:
        return unary("neg", self)

    def __abs__(self) -> Traced:
        return unary("abs", self)

    def __lt__(self, other: Any) -> Any:
        return compare("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return compare("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return compare("gt", self, other)

    def __ge__(self, other: Any) -> Any:
        return compare("ge", self, other)

    def __eq__(self, other: object) -> Any:
        return compare("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return compare("ne", self, other)

    def __and__(self, other: Any) -> Traced:
        return logical("and", self, other)

    def __rand__(self, other: Any) -> Traced:
        return logical("and", other, self)

    def __or__(self, other: Any) -> Traced:
        return logical("or", self, other)

    def __ror__(self, other: Any) -> Traced:
        return logical("or", other, self)

    def __invert__(self) -> Traced:
        if self.dtype != "bool":
            raise Untraceable("it inverts the bits of a number")
        return self.tracer.node("not", (self,), "bool", element=self.element)


def cast(x: Traced, name: str) -> Traced:
    """x in another dtype."""
    if x.dtype == name:
        return x
    if name not in FLOATS or (x.dtype not in FLOATS and x.dtype not in {HOST, "int", "bool"}):
        raise Untraceable(f"it converts {x.dtype} to {name}")
    return x.tracer.node("cast", (x,), name, element=x.element)


def _common(values: Sequence[Traced]) -> str:
    """The dtype in which values are computed with one another: elements decide, then arrays, then Python numbers."""
    if any(v.dtype in HALF for v in values):
        raise Untraceable("it computes in half precision")
    elements = [v.dtype for v in values if v.element and v.dtype != "bool"]
    others = [v.dtype for v in values if not v.element]
    if not elements:
        return max((v.dtype for v in values), key=_WIDTH.__getitem__)
    widest = max(elements, key=_WIDTH.__getitem__)
    typed = [d for d in others if d in FLOATS]
    if values[0].tracer.library == "numpy" and any(_WIDTH[d] > _WIDTH[widest] for d in typed):
        return max(typed, key=_WIDTH.__getitem__)  # in NumPy a 0-d array counts as any other
    return widest


def _tracer(*values: Any) -> Tracer:
    return next(v.tracer for v in values if isinstance(v, Traced))


def _prepared(values: tuple[Any, ...]) -> tuple[Tracer, list[Traced], str, bool]:
    tracer = _tracer(*values)
    lifted = [tracer.lift(v) for v in values]
    dtype = _common(lifted)
    return tracer, lifted, dtype, any(v.element for v in lifted)


def in_dtype(dtype: str, v: Traced) -> Traced:
    """v as an operand of that dtype."""
    return v if v.dtype == dtype else v.tracer.node("cast", (v,), dtype, element=v.element)


def binary(op: str, a: Any, b: Any) -> Traced:
    """add, sub, mul, div."""
    tracer, (x, y), dtype, element = _prepared((a, b))
    if dtype == "bool" or (dtype == "int" and op == "div"):
        dtype = HOST
    return tracer.node(op, (in_dtype(dtype, x), in_dtype(dtype, y)), dtype, element=element)


def unary(op: str, x: Traced) -> Traced:
    """A function of one value. Those that the libraries compute by approximations of their own make a trace inexact."""
    dtype = HOST if x.dtype == "int" and op not in {"neg", "abs"} else x.dtype
    if dtype in HALF or dtype == "bool":
        raise Untraceable(f"it takes {op} of {dtype}")
    if x.element and (op in {"exp", "log", "tanh"} or (op == "sqrt" and x.tracer.library == "torch")):
        x.tracer.exact = False  # torch's own root may be off by one unit in the last place
    return x.tracer.node(op, (in_dtype(dtype, x),), dtype, element=x.element)


def extremum(op: str, a: Any, b: Any) -> Traced:
    """The larger (``"max"``) or smaller (``"min"``) one, NaN if either is."""
    tracer, (x, y), dtype, element = _prepared((a, b))
    return tracer.node(op, (in_dtype(dtype, x), in_dtype(dtype, y)), dtype, element=element)


def compare(op: str, a: Any, b: Any) -> Any:
    """A comparison; anything that is no number is unequal to a value of a trace."""
    if not isinstance(b, (Traced, int, float, np.generic)):
        if op in {"eq", "ne"}:
            return op == "ne"
        raise Untraceable(f"it compares with {type(b).__name__}")
    tracer, (x, y), dtype, element = _prepared((a, b))
    return tracer.node(op, (in_dtype(dtype, x), in_dtype(dtype, y)), "bool", element=element)


def logical(op: str, a: Any, b: Any) -> Traced:
    """and, or."""
    tracer = _tracer(a, b)
    x, y = tracer.lift(a), tracer.lift(b)
    if x.dtype != "bool" or y.dtype != "bool":
        raise Untraceable(f"it takes {op} of numbers")
    return tracer.node(op, (x, y), "bool", element=x.element or y.element)


def power(x: Traced, exponent: Any) -> Traced:
    """x ** exponent. Squares are products, as in both libraries."""
    if isinstance(exponent, (int, float)) and exponent == 2:
        return binary("mul", x, x)
    if isinstance(exponent, (int, float)) and exponent == 0.5 and x.element:
        return unary("sqrt", x)
    tracer, (a, b), dtype, element = _prepared((x, exponent))
    dtype = HOST if dtype == "int" else dtype
    if element:
        tracer.exact = False
    return tracer.node("pow", (in_dtype(dtype, a), in_dtype(dtype, b)), dtype, element=element)


def select(condition: Traced, a: Any, b: Any) -> Traced:
    """a where the condition holds, else b."""
    tracer = condition.tracer
    x, y = tracer.lift(a), tracer.lift(b)
    dtype = _common([x, y])
    if dtype == "bool":
        raise Untraceable("it chooses between truth values")
    element = condition.element or x.element or y.element
    if condition.element and not (x.element or y.element) and dtype in {HOST, "int"}:
        raise Untraceable("it makes an array of two numbers")
    return tracer.node("where", (condition, in_dtype(dtype, x), in_dtype(dtype, y)), dtype, element=element)


def filled(x: Traced, value: Any) -> Traced:
    """An array like x, filled with a number."""
    if not x.element:
        raise Untraceable("it makes an array like a number")
    return x.tracer.node("fill", (in_dtype(x.dtype, x.tracer.lift(value)),), x.dtype, element=True)


def reduce(op: str, x: Traced) -> Traced:
    """The sum (in float64), or the largest or smallest (``"largest"``, ``"smallest"``) element, as a number of the array."""
    if not x.element:
        return x
    if op == "sum":
        x.tracer.exact = False
        return x.tracer.node("sum", (in_dtype("float64", x),), "float64", element=False)
    return x.tracer.node(op, (x,), x.dtype, element=False)


def unary_test(op: str, x: Traced) -> Traced:
    """isnan, isfinite."""
    return x.tracer.node(op, (x,), "bool", element=x.element)


def call(tracer: Tracer, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A function of NumPy or torch, by its name."""
    op = _MAP_NAMES.get(name)
    if op is None or kwargs:
        raise Untraceable(f"it uses {name}" + (f" with {', '.join(kwargs)}=" if kwargs else ""))
    values = list(args)
    if op in {"add", "sub", "mul", "div"}:
        return binary(op, *values)
    if op in {"maximum", "minimum"}:
        return extremum(op[:3], *values)
    if op in COMPARE:
        return compare(op, *values)
    if op in {"and_", "or_"}:
        return logical(op[:-1], *values)
    if op == "where":
        return select(*values)
    if op == "pow":
        return power(tracer.lift(values[0]), values[1])
    if len(values) != 1:
        raise Untraceable(f"it uses {name} with {len(values)} arguments")
    (x,) = values
    if op == "square":
        return binary("mul", x, x)
    if op in {"reciprocal", "rsqrt"}:
        return binary("div", 1.0, unary("sqrt", x) if op == "rsqrt" else x)
    if op in {"isnan", "isfinite"}:
        return unary_test(op, x)
    if op == "zeros_like":
        return filled(x, 0.0)
    if op == "sum":
        total = reduce("sum", x)
        return cast(total, x.dtype) if x.dtype in FLOATS else total
    return unary(op, x)


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, (tuple, list)) else (value,))]
