"""CUDA C for what a rule makes of the measures of all arrays, such as one norm: one block of threads goes over all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ....arrays import Traced, Tracer, Untraceable
from ....errors import OptimisersError
from ...graph.program import passes_of
from ..c.source import C_TYPES, START, constant, expression, lines
from .source import HOW
from .templates import PRELUDE, THREADS

_FRAME = """
extern "C" __global__ void __launch_bounds__({threads}) combine(ARGUMENT work given) {{
  const int64_t n = (int64_t)given.row[0];
  __shared__ double shared[{threads}];
{body}
  if (threadIdx.x != 0) return;
{results}
}}
"""

_LOOP = """\
  for (int64_t i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {{
    const double *const values = given.values + {values} * given.pieces[3 * given.first[i]];
{body}
  }}"""


def combining(rule: Any, columns: Sequence[int], width: int, results: Sequence[int]) -> str:
    """The source of a kernel that combines measures as a rule does; Untraceable if it cannot be made.

    Args:
        rule: the rule that combines them.
        columns: where each number of a measure stands among the values of an array.
        width: the number of those values.
        results: where the combined numbers go.

    """
    found = {_written(rule, count, columns, width, results) for count in (1, 3)}
    if len(found) > 1:
        raise Untraceable("what it combines depends on how many arrays there are")
    return found.pop()


def _written(rule: Any, count: int, columns: Sequence[int], width: int, results: Sequence[int]) -> str:
    tracer = Tracer("torch", {})
    measure = tuple(tracer.array(f"b{k}", "float64") for k in range(len(columns)))
    try:
        combined = [tracer.lift(value) for value in rule.combine([measure] * count)]
    except (OptimisersError, TypeError, AttributeError, ValueError, KeyError, ArithmeticError) as error:
        raise Untraceable(str(error)) from None
    if any(value.element for value in combined) or len(combined) != len(results):
        raise Untraceable("what it combines to is no number")
    writer = _Writer(columns)
    body: list[str] = []
    for this in passes_of(combined, {}, []):
        sums = [f"t{writer.sums + k}" for k in range(len(this.reductions))]
        joins = [(HOW[node.op], total, writer.value(node.args[0])) for node, total in zip(this.reductions, sums, strict=True)]
        inside = [*writer.taken(inside=True), *(f"{total} = joined({how}, {total}, {value});" for how, total, value in joins)]
        body += lines(writer.taken(inside=False), 2).splitlines()
        body += [f"  double {total} = {START[node.op]};" for node, total in zip(this.reductions, sums, strict=True)]
        body.append(_LOOP.format(values=width, body=lines(inside, 4)))
        body += [f"  {total} = over_block({how}, {total}, shared);" for how, total, _ in joins]
        for node, total in zip(this.reductions, sums, strict=True):
            writer.names[id(node)] = f"(({C_TYPES[node.dtype]}){total})"
        writer.sums += len(sums)
    values = [writer.value(value) for value in combined]
    body += lines(writer.taken(inside=False), 2).splitlines()
    stores = [f"((double *)given.combined)[{k}] = {value};" for k, value in zip(results, values, strict=True)]
    return PRELUDE + _FRAME.format(threads=THREADS, body="\n".join(body), results=lines(stores, 2))


class _Writer:
    """Numbers of one measure, inside the loop over all of them, and of all, outside."""

    def __init__(self, columns: Sequence[int]) -> None:
        self.columns = columns
        self.names: dict[int, str] = {}
        self.sums = 0
        self._count = 0
        self._inside: list[tuple[int, str]] = []
        self._outside: list[str] = []

    def value(self, node: Traced) -> str:
        if id(node) in self.names:
            return self.names[id(node)]
        if node.op == "load":
            found = f"values[{self.columns[int(re.sub('b', '', node.value))]}]"
        elif node.op == "const":
            found = constant(node.value)
        elif node.op == "number":
            raise Untraceable("it combines more than measures")
        else:
            found = expression(node, [self.value(arg) for arg in node.args])
        name = f"v{self._count}"
        self._count += 1
        line = f"const {C_TYPES[node.dtype]} {name} = ({C_TYPES[node.dtype]})({found});"
        if node.element:
            self._inside.append((id(node), line))
        else:
            self._outside.append(line)
        self.names[id(node)] = name
        return name

    def taken(self, *, inside: bool) -> list[str]:
        """The statements since they were taken last. What is inside a loop is computed again in the next one."""
        if not inside:
            found, self._outside = self._outside, []
            return found
        for key, _ in self._inside:
            del self.names[key]
        found, self._inside = [line for _, line in self._inside], []
        return found
