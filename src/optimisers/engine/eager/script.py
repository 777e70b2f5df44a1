"""Programs by torch: each value of the graph by one call, on packed elements and on vectors of numbers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...arrays import HOST, Tape, Traced, maximum, minimum, sign
from ..graph.program import MEASURED, SUMS, Program
from .layout import Layout, layout

_CALLS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg, "abs": abs,
    "sqrt": torch.sqrt, "exp": torch.exp, "log": torch.log, "tanh": torch.tanh, "pow": torch.pow, "max": maximum,
    "min": minimum, "sign": sign, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq,
    "ne": operator.ne, "and": operator.and_, "or": operator.or_, "not": torch.logical_not, "isnan": torch.isnan,
    "isfinite": torch.isfinite,
}  # fmt: skip


class Script:
    """How a program is computed: which numbers the host knows before a step, and how often each value is needed.

    ``scalars`` are the numbers of the state that lie on the device.
    """

    def __init__(self, program: Program, scalars: frozenset[str]) -> None:
        self.program, self.scalars = program, scalars
        self._far: dict[int, bool] = {}
        self.uses: Counter[int] = Counter()
        known: dict[int, Traced] = {}
        sums = [node for passes in program.before for p in passes for node in p.reductions]
        roots = [*(node for _, node in program.last.stores), *(v for b in program.boundaries for v in b.values)]
        roots += list(program.numbers.values())
        seen: dict[int, Traced] = {}

        def visit(node: Traced) -> None:
            if not self.is_far(node):
                known[id(node)] = node
            elif id(node) not in seen:
                seen[id(node)] = node
                for arg in node.args:
                    self.uses[id(arg)] += 1
                    visit(arg)

        for node in roots:
            self.uses[id(node)] += 1
            visit(node)
        self.known = list(known.values())
        self.loads = [node for node in seen.values() if node.op == "load"]
        self.tape = Tape(self.known, program.columns)
        self.by_rows = bool(sums or scalars)

    def is_far(self, node: Traced) -> bool:
        """Whether a value is made of elements or of numbers that only the device knows."""
        if id(node) not in self._far:
            given = node.op == "number" and (node.value in self.scalars or bool(MEASURED.fullmatch(node.value)))
            self._far[id(node)] = node.element or given or node.op in SUMS or any(self.is_far(arg) for arg in node.args)
        return self._far[id(node)]

    def decides_by_scalars(self) -> bool:
        """Whether it was decided by numbers that lie on the device what the program is."""
        return any(self._is_made_of_scalars(node) for node, _ in self.program.guards)

    def _is_made_of_scalars(self, node: Traced) -> bool:
        return (node.op == "number" and node.value in self.scalars) or any(self._is_made_of_scalars(arg) for arg in node.args)


class Run:
    """One run of a program over arrays.

    Args:
        script: the program.
        matrix: its numbers on the host, a row for each array.
        arrays: for each array that it reads, by name, those of all parameters.
        scalars: likewise for the numbers of the state on the device.

    """

    def __init__(
        self,
        script: Script,
        matrix: Any,
        arrays: Mapping[str, Sequence[torch.Tensor]],
        scalars: Mapping[str, Sequence[torch.Tensor]],
    ) -> None:
        self.script, self.program, self.arrays, self.scalars = script, script.program, arrays, scalars
        self.like = arrays["x"][0]
        self.count = len(arrays["x"])
        self._values: dict[int, Any] = {}
        self._spread: dict[int, torch.Tensor] = {}
        self._uses = Counter(script.uses)
        self.measures: dict[str, Any] = {}
        self.host: dict[int, Any] = {}
        varying = self._read(matrix)
        sizes = tuple(x.numel() for x in arrays["x"])
        self.layout: Layout = layout(sizes, by_rows=script.by_rows or varying)

    def _read(self, matrix: Any) -> bool:
        """Compute what the host knows; what differs between arrays goes to the device, without waiting for it."""
        values = self.script.tape.run({name: matrix[:, k] for name, k in self.program.columns.items()})
        differing = []
        for node, value in zip(self.script.known, values, strict=True):
            vector = np.broadcast_to(np.asarray(value), (self.count,))
            self.host[id(node)] = vector
            if (vector == vector[0]).all() or (vector != vector).all():  # noqa: PLR0124 (NaN)
                self._values[id(node)] = bool(vector[0]) if node.dtype == "bool" else float(vector[0])
            else:
                differing.append(node)
        if differing:
            table = torch.tensor([self.host[id(node)].tolist() for node in differing], dtype=torch.float64)
            device = self.like.device
            rows = table.to(device, non_blocking=device.type == "cuda").unbind()
            self._values.update({id(node): row.to(_dtype(node)) for node, row in zip(differing, rows, strict=True)})
        return bool(differing)

    def number(self, node: Traced) -> Any:
        """A number for each array, as a vector on the device."""
        value = self.value(node)
        if isinstance(value, torch.Tensor):
            return value.reshape(-1).expand(self.count)
        return torch.full((self.count,), value, dtype=_dtype(node), device=self.like.device)

    def elements(self, node: Traced) -> Any:
        """An array of new values, packed; not one that was given."""
        value = self.value(node)
        self._done(node)
        if self.count == 1 and any(value is array for (array, *_) in self.arrays.values()):
            return value.clone()
        shape = tuple(self.layout.shape(self.like.shape))
        return value if tuple(value.shape) == shape else value.expand(shape)

    def forget_given(self) -> None:
        """Let go of what was packed, to be packed again where it is needed once more."""
        for node in [node for node in self.script.loads if self.count > 1]:
            self._values.pop(id(node), None)

    def value(self, node: Traced) -> Any:
        """A value of the graph: a tensor, or a Python number where the host knows it and it is the same for all arrays."""
        if id(node) in self._values:
            return self._values[id(node)]
        value = self._values[id(node)] = self._computed(node)
        return value

    def _done(self, node: Traced) -> None:
        """One use less ahead; elements that nobody needs any more are let go."""
        self._uses[id(node)] -= 1
        if self._uses[id(node)] <= 0 and node.element:
            self._values.pop(id(node), None)

    def _computed(self, node: Traced) -> Any:
        if node.op == "load":
            packed = self.layout.pack(self.arrays[node.value])
            return packed if packed.dtype == _dtype(node) else packed.to(_dtype(node))
        if node.op in SUMS:
            reduced = self.layout.reduced(node.op, self.value(node.args[0]))
            self._done(node.args[0])
            return reduced
        if node.op == "number":
            if node.value in self.scalars:
                return torch.stack(list(self.scalars[node.value])).to(_dtype(node))
            value = self.measures[node.value]
            return value if isinstance(value, torch.Tensor) else self._full((), float(value), torch.float64)
        args = [self._operand(node, arg) for arg in node.args]
        result = self._call(node, args)
        for arg in node.args:
            self._done(arg)
        return result

    def _operand(self, node: Traced, arg: Traced) -> Any:
        value = self.value(arg)
        if not node.element or arg.element or not isinstance(value, torch.Tensor):
            return value
        if id(arg) not in self._spread:
            self._spread[id(arg)] = self.layout.spread(value)
        return self._spread[id(arg)]

    def _call(self, node: Traced, args: list[Any]) -> Any:
        if node.op == "cast":
            return args[0].to(_dtype(node))
        if node.op == "fill":
            shape = self.layout.shape(self.like.shape)
            return args[0].expand(shape) if isinstance(args[0], torch.Tensor) else self._full(shape, args[0], _dtype(node))
        if node.op == "where":
            condition, a, b = args
            if isinstance(condition, bool):
                chosen = a if condition else b
                return chosen if isinstance(chosen, torch.Tensor) else self._full((), chosen, _dtype(node))
            if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
                a = self._full((), a, _dtype(node))
            return torch.where(condition, a, b)
        return _CALLS[node.op](*args)

    def _full(self, shape: Sequence[int], value: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(tuple(shape), value, dtype=dtype, device=self.like.device)


def _dtype(node: Traced) -> torch.dtype:
    """The dtype of a value on the device; Python numbers are kept as they are, in double precision."""
    name = "float64" if node.dtype in {HOST, "int"} else node.dtype
    found: torch.dtype = getattr(torch, name)
    return found
