"""C source for the passes of a program: one function for each, a plain loop that the compiler vectorises."""

from __future__ import annotations

import math
from typing import Any

from ..arrays import HOST, Traced, Untraceable
from .program import Pass, Program

_C_TYPES = {"float32": "float", "float64": "double", HOST: "double", "int": "double", "bool": "int", "bfloat16": "uint16_t"}
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "and": "&", "or": "|",
}  # fmt: skip
_CALLS = {"abs": "fabs", "sqrt": "sqrt", "exp": "exp", "log": "log", "tanh": "tanh", "pow": "pow"}
_START = {"sum": "0.0", "largest": "-INFINITY", "smallest": "INFINITY"}

_HEADER = """\
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float widened(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

/* To the nearest bfloat16, to even where two are as near; NaN stays NaN. */
static inline uint16_t rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)(x != x ? 0x7fc0u : near);
}
"""

# Units of work are handed out one by one, so that a thread that is held up does not hold up the others. A unit is a run of
# pieces; a piece is (array, first element, how many).
_FRAME = """
void {name}(int64_t units, int64_t *next, const int64_t *first, const int64_t *pieces, void *const *pointers,
            const double *numbers, double *sums) {{
  for (;;) {{
    const int64_t unit = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (unit >= units) return;
    for (int64_t piece = first[unit]; piece < first[unit + 1]; ++piece) {{
      const int64_t leaf = pieces[3 * piece], start = pieces[3 * piece + 1], n = pieces[3 * piece + 2];
      void *const *p = pointers + {width} * leaf;
      const double *q = numbers + {columns} * leaf;
{head}
{pragma}
      for (int64_t i = 0; i < n; ++i) {{
{body}
      }}
{tail}
    }}
  }}
}}
"""


def source(program: Program) -> str:
    """The source of all passes of a program; Untraceable for what cannot be written in C."""
    functions = [_function(program, p, f"pass_{i}") for i, p in enumerate(all_passes(program))]
    return _HEADER + "".join(functions)


def all_passes(program: Program) -> list[Pass]:
    """The passes in the order of their functions; the last one writes."""
    return [p for passes in program.before for p in passes] + [program.last]


def pointer_names(program: Program) -> list[str]:
    """The arrays of a leaf in the order of its pointers: those that are read, then those that are written."""
    return [*program.arrays, *(f"new {name}" for name, _ in program.last.stores)]


def _function(program: Program, this: Pass, name: str) -> str:
    writer = _Writer(program)
    sums = []
    for k, node in enumerate(this.reductions):
        value = writer.element(node.args[0])
        sums.append(f"t{k}")
        if node.op == "sum":
            writer.body.append(f"t{k} += {value};")
        else:
            sign = ">" if node.op == "largest" else "<"
            writer.body.append(f"t{k} = ({value} {sign} t{k} || {value} != {value}) ? {value} : t{k};")
    names = pointer_names(program)
    writes = []
    for name_of, node in this.stores:
        value = writer.element(node)
        pointer = f"o_{name_of}"
        ctype = _C_TYPES[node.dtype]
        writer.pointers.append(f"{ctype} *const {pointer} = ({ctype} *)p[{names.index(f'new {name_of}')}] + start;")
        writes.append(f"{pointer}[i] = {value};")
    head = writer.pointers + writer.head + [f"double t{k} = {_START[node.op]};" for k, node in enumerate(this.reductions)]
    plain = all(node.op == "sum" for node in this.reductions)
    reduction = f" reduction(+ : {', '.join(sums)})" if sums else ""
    tail = [f"sums[{len(sums)} * piece + {k}] = t{k};" for k in range(len(sums))]
    return _FRAME.format(
        name=name,
        width=len(names),
        columns=len(program.columns),
        head=_lines(head, 6),
        pragma=f"#pragma omp simd{reduction}" if plain else "",
        body=_lines(writer.body + writes, 8),
        tail=_lines(tail, 6),
    )


def _lines(lines: list[str], indent: int) -> str:
    return "\n".join(" " * indent + line for line in lines)


class _Writer:
    """Statements before the loop (for numbers) and inside (for elements), each value computed once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.pointers: list[str] = []
        self.head: list[str] = []
        self.body: list[str] = []
        self.names: dict[int, str] = {}

    def element(self, node: Traced) -> str:
        """The name of a value; elements are computed inside the loop, numbers before it."""
        if id(node) in self.names:
            return self.names[id(node)]
        given = node.value in self.program.columns and not node.element
        args = [] if given else [self.element(arg) for arg in node.args]
        name = f"v{len(self.names)}"
        ctype = _C_TYPES[node.dtype]
        if node.op == "load":
            index = self.program.arrays.index(node.value)
            pointer = f"a_{node.value}"
            self.pointers.append(f"const {ctype} *const {pointer} = (const {ctype} *)p[{index}] + start;")
            expression = f"{pointer}[i]"
        elif given:
            expression = f"({ctype})q[{self.program.columns[node.value]}]"
        else:
            expression = _expression(node, args)
        (self.body if node.element else self.head).append(f"const {ctype} {name} = {expression};")
        self.names[id(node)] = name
        return name


def _expression(node: Traced, args: list[str]) -> str:
    op, dtype = node.op, node.dtype
    suffix = "f" if dtype == "float32" else ""
    if op == "const":
        return _constant(node.value)
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op in _CALLS:
        return f"{_CALLS[op]}{suffix}({', '.join(args)})"
    if op == "neg":
        return f"-{args[0]}"
    if op == "not":
        return f"!{args[0]}"
    if op == "fill":
        return args[0]
    if op == "where":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    if op == "max":
        return f"(({args[0]} > {args[1]}) | ({args[0]} != {args[0]})) ? {args[0]} : {args[1]}"
    if op == "min":
        return f"(({args[0]} < {args[1]}) | ({args[0]} != {args[0]})) ? {args[0]} : {args[1]}"
    if op == "sign":
        return f"{args[0]} != {args[0]} ? {args[0]} : ({_C_TYPES[dtype]})(({args[0]} > 0) - ({args[0]} < 0))"
    if op == "isnan":
        return f"{args[0]} != {args[0]}"
    if op == "isfinite":
        single = node.args[0].dtype == "float32"
        return f"fabs{'f' if single else ''}({args[0]}) <= {'FLT_MAX' if single else 'DBL_MAX'}"
    if op == "cast":
        return _cast(node.args[0].dtype, dtype, args[0])
    raise Untraceable(f"there is no C for {op}")


def _cast(before: str, after: str, value: str) -> str:
    if before == "bfloat16":
        return f"widened({value})" if after == "float32" else f"(double)widened({value})"
    if after == "bfloat16":
        return f"rounded((float){value})"
    return f"({_C_TYPES[after]}){value}"


def _constant(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return float(value).hex()
