"""A pass as calls of NumPy on the values of a block, with as few registers as they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ....arrays import Tape, Traced, Untraceable
from ...graph.program import Pass, Program

Vector = np.ndarray[Any, Any]

_DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "host": np.float64,
    "int": np.float64,
    "bool": np.bool_,
    "float16": np.float16,
    "bfloat16": np.uint16,
}


def _where(condition: Any, a: Any, b: Any, out: Vector) -> None:
    np.copyto(out, b)
    np.copyto(out, a, where=condition)


def _fill(value: Any, out: Vector) -> None:
    out[...] = value


def _cast(x: Any, out: Vector) -> None:
    np.copyto(out, x, casting="unsafe")


def _widened(x: Any, out: Vector) -> None:
    """From bfloat16."""
    if out.dtype == np.float32:
        np.left_shift(x, np.uint32(16), out=out.view(np.uint32))
    else:
        out[...] = np.left_shift(x, np.uint32(16)).view(np.float32)


def _by_single(x: Any, out: Vector) -> None:
    """From float64 to float16 by way of float32, as torch does it."""
    np.copyto(out, x.astype(np.float32), casting="unsafe")


def _rounded(x: Any, out: Vector) -> None:
    """To the nearest bfloat16, to even where two are as near; NaN stays NaN."""
    x = x.astype(np.float32, copy=False)
    bits = x.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out[...] = np.where(x != x, np.uint32(0x7FC0), near)  # noqa: PLR0124 (NaN)


_CALLS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide, "neg": np.negative, "abs": np.absolute,
    "sqrt": np.sqrt, "exp": np.exp, "log": np.log, "tanh": np.tanh, "pow": np.power, "max": np.maximum, "min": np.minimum,
    "sign": np.sign, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": np.not_equal, "and": np.logical_and, "or": np.logical_or, "not": np.logical_not, "isnan": np.isnan,
    "isfinite": np.isfinite, "where": _where, "fill": _fill, "copy": _cast,
}  # fmt: skip
_JOIN: dict[str, Any] = {"sum": np.add, "largest": np.maximum, "smallest": np.minimum}


class Step(NamedTuple):
    """One call on a block: places of the arguments and of the result among the values."""

    function: Callable[..., Any]
    arguments: tuple[int, ...]
    result: int


class Sheet:
    """A pass as calls on the values of a block: arrays that are read, arrays that are written, numbers, registers.

    With ``direct`` results are written where they belong as soon as that is possible, else all of them at the end.
    """

    def __init__(self, program: Program, this: Pass, *, direct: bool = True) -> None:
        self.program, self.this = program, this
        self.stores = [name for name, _ in this.stores]
        self.columns = list(program.arrays)
        order = _ordered([node.args[0] for node in this.reductions] + [node for _, node in this.stores])
        numbers = {id(arg): arg for node in order for arg in node.args if not arg.element}
        self.numbers = list(numbers.values())
        self.tape = Tape(self.numbers, program.columns)
        self.number_dtypes = [_DTYPES[node.dtype] for node in self.numbers]
        self.steps: list[Step] = []
        self.registers: list[Any] = []  # their dtypes
        self.copies: list[tuple[int, int]] = []  # (value, array that is to become it), at the end
        self.first_number = len(self.columns) + len(self.stores)
        self.addresses = [*range(len(self.columns)), *(program.targets[name] for name in self.stores)]
        kinds = [*(program.dtypes[name] for name in self.columns), *(program.dtypes[name] for name in self.stores)]
        self.array_dtypes = [_DTYPES[kind] for kind in kinds]
        self._first_register = self.first_number + len(self.numbers)
        self._free: dict[Any, list[int]] = {}
        self._place = {id(node): self.first_number + k for k, node in enumerate(self.numbers)}
        self._write(order, direct=direct)
        self.sums = [self._place[id(node.args[0])] for node in this.reductions]
        self.joins = [_JOIN[node.op] for node in this.reductions]
        self.read = sorted(
            {a for step in self.steps for a in step.arguments if a < len(self.columns)}
            | {s for s in self.sums if s < len(self.columns)}
        )

    def _write(self, order: list[Traced], *, direct: bool) -> None:
        loads = [node for node in order if node.op == "load"]
        self._place.update({id(node): self.columns.index(node.value) for node in loads})
        calls = [node for node in order if node.op != "load"]
        borrowed = {id(node): node for _, node in self.this.stores if node.op == "load"}
        last: dict[int, int] = {}
        for k, node in enumerate(calls):
            last.update({id(arg): k for arg in node.args})
        last.update({key: len(calls) for key in borrowed})
        kept = {id(node) for _, node in self.this.stores} | {id(node.args[0]) for node in self.this.reductions}
        targets = self._direct(calls) if direct else {}
        for node in borrowed.values():  # a new value that is an array given: copied before anything is overwritten
            place = self._register(node.dtype)
            self.steps.append(Step(_cast, (self._place[id(node)],), place))
            self._place[-id(node)] = place
        for k, node in enumerate(calls):
            arguments = tuple(self._place[id(arg)] for arg in node.args)
            target, function = targets.get(id(node)), _function(node)
            done = {id(arg): arg for arg in node.args if last[id(arg)] == k and id(arg) not in kept}
            spent = [arg for key, arg in done.items() if self._place[key] >= self._first_register]
            if isinstance(function, np.ufunc):  # may write where it reads
                self._release(spent)
            place = self._register(node.dtype) if target is None else len(self.columns) + target
            if not isinstance(function, np.ufunc):
                self._release(spent)
            self._place[id(node)] = place
            self.steps.append(Step(function, arguments, place))
        for k, (_, node) in enumerate(self.this.stores):
            value = self._place[-id(node) if node.op == "load" else id(node)]
            if value != len(self.columns) + k:
                self.copies.append((value, len(self.columns) + k))

    def _direct(self, calls: list[Traced]) -> dict[int, int]:
        """Which values may be written where they are to go at once: nothing there, or of the gradient, is read later."""
        reads: dict[str, int] = {}
        for k, node in enumerate(calls):
            reads.update({arg.value: k for arg in node.args if arg.op == "load"})
        position = {id(node): k for k, node in enumerate(calls)}
        found: dict[int, int] = {}
        for k, (name, node) in enumerate(self.this.stores):
            at = position.get(id(node))
            names = (name, "dx") if name == "x" else (name,)
            if at is not None and id(node) not in found and all(reads.get(n, -1) <= at for n in names):
                found[id(node)] = k
        return found

    def _register(self, dtype: str) -> int:
        if self._free.get(dtype):
            return self._free[dtype].pop()
        self.registers.append(_DTYPES[dtype])
        return self._first_register + len(self.registers) - 1

    def _release(self, spent: list[Traced]) -> None:
        for node in spent:
            self._free.setdefault(node.dtype, []).append(self._place[id(node)])


def _function(node: Traced) -> Callable[..., Any]:
    if node.op == "cast":
        before = node.args[0].dtype
        if before == "bfloat16":
            return _widened
        if node.dtype == "float16" and before == "float64" and node.tracer.library == "torch":
            return _by_single
        return _rounded if node.dtype == "bfloat16" else _cast
    if node.op not in _CALLS:
        raise Untraceable(f"NumPy has no loop for {node.op}")
    return _CALLS[node.op]


def _ordered(targets: list[Traced]) -> list[Traced]:
    """All elements that targets are made of, each after what it is made of."""
    found: dict[int, Traced] = {}

    def visit(node: Traced) -> None:
        if id(node) not in found and node.element:
            for arg in node.args:
                visit(arg)
            found[id(node)] = node

    for node in targets:
        visit(node)
    return list(found.values())
