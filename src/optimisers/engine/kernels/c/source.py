"""C source for the passes of a program: one function for each, a plain loop that the compiler vectorises."""

from __future__ import annotations

import math
from typing import Any

from ....arrays import HOST, Traced, Untraceable
from ...graph.program import Pass, Program, all_passes

C_TYPES = {
    "float32": "float", "float64": "double", HOST: "double", "int": "double", "bool": "int", "bfloat16": "uint16_t",
    "float16": "uint16_t",
}  # fmt: skip
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "and": "&", "or": "|",
}  # fmt: skip
_CALLS = {"abs": "fabs", "sqrt": "sqrt", "exp": "exp", "log": "log", "tanh": "tanh", "pow": "pow"}
HALVES = """
DEVICE float widened(uint16_t x) { return float_of_bits((uint32_t)x << 16); }

/* To the nearest bfloat16, to even where two are as near; NaN stays NaN. */
DEVICE uint16_t rounded(float x) {
  const uint32_t bits = bits_of_float(x), near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)(x != x ? 0x7fc0u : near);
}

/* From float16. Below 2^-14 the difference of two normal numbers is what it holds: some multiple of 2^-24. */
DEVICE float widened_half(uint16_t x) {
  const uint32_t rest = x & 0x7fffu, sign = (uint32_t)(x & 0x8000u) << 16;
  const uint32_t normal = (rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t small = bits_of_float(float_of_bits((rest << 13) + 0x38800000u) - float_of_bits(0x38800000u));
  return float_of_bits((rest < 0x400u ? small : normal) | sign);
}

/* To the nearest float16, to even where two are as near; NaN stays NaN. Below 2^-14 a sum with 0.5 rounds. */
DEVICE uint16_t rounded_half(float x) {
  const uint32_t bits = bits_of_float(x), rest = bits & 0x7fffffffu;
  const uint32_t normal = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t small = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u;
  const uint32_t finite = rest < 0x38800000u ? small : rest < 0x47800000u ? normal : 0x7c00u;
  return (uint16_t)((rest > 0x7f800000u ? 0x7e00u : finite) | ((bits >> 16) & 0x8000u));
}
"""
"""Conversions between float32 and half precision, by integers alone: every compiler makes vectors of them."""
START = {"sum": "0.0", "largest": "-INFINITY", "smallest": "INFINITY"}

_HEADER = (
    """\
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* What a pass is given. Threads that run it share one. */
typedef struct {
  int64_t next, units;
  const int64_t *first, *pieces;
  void *const *pointers;
  const double *numbers;
  double *sums;
} work;

#define DEVICE static inline

DEVICE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

DEVICE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
"""
    + HALVES
    + """
/* From float64 to float16 with one rounding, as NumPy does it. */
DEVICE uint16_t rounded_half_once(double x) {
  uint64_t bits, rounded;
  memcpy(&bits, &x, 8);
  const uint64_t rest = bits & 0x7fffffffffffffffu;
  const double moved = fabs(x) + 0x1p28;
  memcpy(&rounded, &moved, 8);
  const uint64_t normal = (rest + 0x1ffffffffffu + ((rest >> 42) & 1u) - 0x3f00000000000000u) >> 42;
  const uint64_t small = rounded - 0x41b0000000000000u;
  const uint64_t finite = rest < 0x3f10000000000000u ? small : rest < 0x40f0000000000000u ? normal : 0x7c00u;
  return (uint16_t)((rest > 0x7ff0000000000000u ? 0x7e00u : finite) | ((bits >> 48) & 0x8000u));
}

#if defined(__AVX512F__)
#define STREAMED 64
#elif defined(__AVX__)
#define STREAMED 32
#else
#define STREAMED 8
#endif

/* 64 bytes to memory that is not going to be read soon: past the caches, which would have to read it first.
   In assembly, since <immintrin.h> takes as long to compile as all the rest. */
typedef int64_t vector __attribute__((vector_size(STREAMED), may_alias));

static inline void stream(void *to, const void *from, int aligned) {
#if STREAMED > 8
  if (aligned) {
    for (int part = 0; part < 64 / STREAMED; ++part) {
      vector x;
      memcpy(&x, (const char *)from + STREAMED * part, STREAMED); /* which need not be aligned */
      __asm__ volatile("vmovntdq %1, %0" : "=m"(((vector *)to)[part]) : "v"(x));
    }
    return;
  }
#endif
  memcpy(to, from, 64);
}

static inline void streamed(void) {
#if STREAMED > 8
  __asm__ volatile("sfence" ::: "memory");
#endif
}
"""
)

# Units of work are handed out one by one, so that a thread that is held up does not hold up the others. A unit is a run of
# pieces; a piece is (array, first element, how many).
_FRAME = """
void {name}(void *given) {{
  work *const shared = given;
  const int64_t units = shared->units, *const first = shared->first, *const pieces = shared->pieces;
  void *const *const pointers = shared->pointers;
  const double *const numbers = shared->numbers;
  double *const sums = shared->sums;
  (void)sums;
  for (;;) {{
    const int64_t unit = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
    if (unit >= units) return;
    for (int64_t piece = first[unit]; piece < first[unit + 1]; ++piece) {{
      const int64_t leaf = pieces[3 * piece], start = pieces[3 * piece + 1], n = pieces[3 * piece + 2];
      void *const *p = pointers + {width} * leaf;
      const double *q = numbers + {columns} * leaf;
{head}
{blocks}
{pragma}
      for (int64_t i = {done}; i < n; ++i) {{
{body}
      }}
{tail}
    }}
  }}
}}
"""

# The same loop for results in memory of their own: a block at a time, which goes past the caches. 32 elements of any dtype
# make whole lines of 64 bytes.
_LANES = 32
_BLOCKS = """
      const int aligned = (({addresses}) & 63) == 0;
      const int64_t whole = n - n % {lanes};
      for (int64_t block = 0; block < whole; block += {lanes}) {{
        {buffers}
        #pragma omp simd
        for (int lane = 0; lane < {lanes}; ++lane) {{
          const int64_t i = block + lane;
{body}
        }}
{writes}
      }}
"""


def source(program: Program) -> str:
    """The source of all passes of a program; Untraceable for what cannot be written in C."""
    functions = [_function(program, p, f"pass_{i}") for i, p in enumerate(all_passes(program))]
    if program.last.stores:
        functions.append(_function(program, program.last, "pass_out_of_place", out_of_place=True))
    return _HEADER + "".join(functions)


def _function(program: Program, this: Pass, name: str, *, out_of_place: bool = False) -> str:
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
    names = program.pointers
    stores = []
    for target, node in this.stores:
        value, ctype = writer.element(node), C_TYPES[node.dtype]
        index = names.index(f"new {target}")
        writer.pointers.append(f"{ctype} *const o_{target} = ({ctype} *)p[{index}] + start;")
        stores.append((target, ctype, value))
    head = writer.pointers + writer.head + [f"double t{k} = {START[node.op]};" for k, node in enumerate(this.reductions)]
    plain = all(node.op == "sum" for node in this.reductions)
    reduction = f" reduction(+ : {', '.join(sums)})" if sums else ""
    tail = [f"sums[{len(sums)} * piece + {k}] = t{k};" for k in range(len(sums))]
    return _FRAME.format(
        name=name,
        width=len(names),
        columns=len(program.columns),
        head=lines(head, 6),
        blocks=_blocks(writer.body, stores) if out_of_place else "",
        done="whole" if out_of_place else "0",
        pragma=f"#pragma omp simd{reduction}" if plain else "",
        body=lines([*writer.body, *(f"o_{target}[i] = {value};" for target, _, value in stores)], 8),
        tail=lines([*tail, "streamed();"] if out_of_place else tail, 6),
    )


def _blocks(body: list[str], stores: list[tuple[str, str, str]]) -> str:
    writes = [
        f"for (int part = 0; part < {_LANES}; part += 64 / sizeof({ctype})) "
        f"stream(o_{target} + block + part, w_{target} + part, aligned);"
        for target, ctype, _ in stores
    ]
    return _BLOCKS.format(
        addresses=" | ".join(f"(uintptr_t)o_{target}" for target, _, _ in stores),
        lanes=_LANES,
        buffers=" ".join(f"{ctype} w_{target}[{_LANES}];" for target, ctype, _ in stores),
        body=lines([*body, *(f"w_{t}[lane] = {v};" for t, _, v in stores)], 10),
        writes=lines(writes, 8),
    )


def lines(given: list[str], indent: int) -> str:
    """Statements, one a line."""
    return "\n".join(" " * indent + line for line in given)


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
        ctype = C_TYPES[node.dtype]
        if node.op == "load":
            index = self.program.arrays.index(node.value)
            pointer = f"a_{node.value}"
            self.pointers.append(f"const {ctype} *const {pointer} = (const {ctype} *)p[{index}] + start;")
            value = f"{pointer}[i]"
        elif given:
            value = f"({ctype})q[{self.program.columns[node.value]}]"
        else:
            value = expression(node, args)
        (self.body if node.element else self.head).append(f"const {ctype} {name} = {value};")
        self.names[id(node)] = name
        return name


def expression(node: Traced, args: list[str]) -> str:
    """What a value is, in C, its arguments being what they are called."""
    op, dtype = node.op, node.dtype
    suffix = "f" if dtype == "float32" else ""
    if op == "const":
        return constant(node.value)
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
        # NaN if either is; gcc 12 does not vectorise it in other orders of the two tests.
        return f"{args[1]} != {args[1]} ? {args[1]} : ({args[0]} < {args[1]} ? {args[1]} : {args[0]})"
    if op == "min":
        return f"{args[1]} != {args[1]} ? {args[1]} : ({args[0]} > {args[1]} ? {args[1]} : {args[0]})"
    if op == "sign":
        return f"{args[0]} != {args[0]} ? {args[0]} : ({C_TYPES[dtype]})(({args[0]} > 0) - ({args[0]} < 0))"
    if op == "isnan":
        return f"{args[0]} != {args[0]}"
    if op == "isfinite":
        single = node.args[0].dtype == "float32"
        return f"fabs{'f' if single else ''}({args[0]}) <= {'FLT_MAX' if single else 'DBL_MAX'}"
    if op == "cast":
        return _cast(node.args[0].dtype, dtype, args[0], once=node.tracer.library == "numpy")
    raise Untraceable(f"there is no C for {op}")


_WIDENED = {"bfloat16": "widened", "float16": "widened_half"}
_ROUNDED = {"bfloat16": "rounded", "float16": "rounded_half"}


def _cast(before: str, after: str, value: str, *, once: bool) -> str:
    """A conversion; with ``once`` float64 is rounded to float16 at once, and not by way of float32, as torch does it."""
    if before in _WIDENED:
        value = f"{_WIDENED[before]}({value})"
    if after not in _ROUNDED:
        return f"({C_TYPES[after]}){value}"
    if after == "float16" and once and before not in {*_WIDENED, "float32"}:
        return f"rounded_half_once({value})"
    return f"{_ROUNDED[after]}((float){value})"


def constant(value: Any) -> str:
    """A number of Python, in C, to the last bit."""
    if isinstance(value, bool):
        return str(int(value))
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return float(value).hex()
