"""CUDA C source for the passes of a program: the statements of the C writer, with a block of threads around them.

A program becomes one kernel for each pass, one that adds up the partial sums of each pass that has some (and computes the
measures made of them), and one that writes the numbers of the state that only the device knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ....arrays import Traced, Untraceable
from ...graph.program import SUMS, Boundary, Pass, Program, all_passes
from ..c.source import C_TYPES, START, constant, expression, lines
from .templates import BY_VALUE, LATE, OVER_ARRAYS, OVER_ELEMENTS, PRELUDE, THREADS


class Kernel(NamedTuple):
    """A kernel: its name, and the numbers that the host gives it, in their order."""

    name: str
    numbers: list[Traced]


class Source(NamedTuple):
    """The kernels of a program.

    Attributes:
        text: of all of them.
        passes: a kernel for each pass.
        sums: for each pass with sums the kernel that adds them up.
        measures: for each boundary whose measures are made of sums that were there before, the kernel that computes them.
        finish: the kernel that writes the numbers of the state that are on the device, if there are any.
        columns: where each sum and each measure stands in the values of an array.
        pointers: the addresses of an array, in their order.

    """

    text: str
    passes: list[Kernel]
    sums: dict[int, Kernel]
    measures: dict[int, Kernel]
    finish: Kernel | None
    columns: dict[str, int]
    pointers: list[str]


def measure_name(boundary: int, k: int) -> str:
    """The name of the k-th measure at a boundary, among the values of an array."""
    return f"b{boundary}_{k}"


def source(program: Program, scalars: Sequence[str] = ()) -> Source:
    """The kernels of a program; Untraceable for what cannot be written in CUDA C.

    ``scalars`` are the numbers of the state that lie on the device.
    """
    return _Author(program, tuple(scalars)).source()


class _Author:
    """Writes the kernels of one program."""

    def __init__(self, program: Program, scalars: tuple[str, ...]) -> None:
        self.program, self.scalars = program, scalars
        self.pointers = [*program.pointers, *scalars, *(f"new {name}" for name in scalars)]
        sums = [node.value for this in all_passes(program) for node in this.reductions]
        measures = [measure_name(b, k) for b, at in enumerate(program.boundaries) for k in range(_measures_of(at))]
        self.columns = {name: i for i, name in enumerate([*sums, *measures])}
        self.combined = {name: i for i, name in enumerate(n for at in program.boundaries for n in at.names or ())}
        self._far: dict[int, bool] = {}

    def is_far(self, node: Traced) -> bool:
        """Whether a number is known on the device only: made of sums, of measures, or of the state's numbers there."""
        if id(node) not in self._far:
            given = node.op == "number" and (node.value in self.combined or node.value in self.scalars)
            self._far[id(node)] = given or node.op in SUMS or any(map(self.is_far, node.args))
        return self._far[id(node)]

    def source(self) -> Source:
        program, texts = self.program, [PRELUDE]
        passes: list[Kernel] = []
        sums: dict[int, Kernel] = {}
        measures: dict[int, Kernel] = {}

        def add(text: str, kernel: Kernel) -> Kernel:
            texts.append(text)
            return kernel

        for b, before in enumerate(program.before):
            summing = [this for this in before if this.reductions]
            outputs = self._outputs(b)
            for this in before:
                index = len(passes)
                passes.append(add(*self._pass(this, f"pass_{index}")))
                if this.reductions:
                    more = outputs if this is summing[-1] else []
                    sums[index] = add(*self._numbers(f"sums_{index}", this.reductions, more))
            if outputs and not summing:
                measures[b] = add(*self._numbers(f"measures_{b}", [], outputs))
        passes.append(add(*self._pass(program.last, f"pass_{len(passes)}")))
        new = [(self._scalar(f"new {name}", self._dtype(name)), program.numbers[name]) for name in self.scalars]
        finish = add(*self._numbers("finish", [], new)) if new else None
        return Source("".join(texts), passes, sums, measures, finish, self.columns, self.pointers)

    def _outputs(self, boundary: int) -> list[tuple[str, Traced]]:
        """Where the measures at a boundary go, and what they are."""
        if boundary == len(self.program.boundaries) or not isinstance(self.program.boundaries[boundary], Boundary):
            return []
        nodes = self.program.boundaries[boundary].values
        return [(f"values[{self.columns[measure_name(boundary, k)]}]", node) for k, node in enumerate(nodes)]

    def _dtype(self, name: str) -> str:
        """The dtype of a number of the state on the device, which its new value has as well."""
        return self.program.numbers[name].dtype

    def _scalar(self, name: str, dtype: str) -> str:
        return f"*({C_TYPES[dtype]} *)p[{self.pointers.index(name)}]"

    def read(self, node: Traced) -> str | None:
        """A number that lies on the device; None for one that is computed."""
        if node.op == "number" and node.value in self.combined:
            return f"given.combined[{self.combined[node.value]}]"
        if node.op == "number" and node.value in self.scalars:
            return self._scalar(node.value, node.dtype)
        return f"values[{self.columns[node.value]}]" if node.op in SUMS else None

    def _pass(self, this: Pass, name: str) -> tuple[str, Kernel]:
        writer = _Elements(self)
        sums = []
        for k, node in enumerate(this.reductions):
            sums.append(f"t{k} = joined({HOW[node.op]}, t{k}, {writer.element(node.args[0])});")
        stores = [(target, C_TYPES[node.dtype], writer.element(node)) for target, node in this.stores]
        loads = {array: C_TYPES[self.program.dtypes[array]] for array in writer.loads}
        width = 16 // min(_BYTES[ctype] for ctype in (*loads.values(), *(ctype for _, ctype, _ in stores)))
        begins = [
            f"{'const ' * read}{ctype} *const {array} = ({'const ' * read}{ctype} *)p[{self.pointers.index(at)}] + start;"
            for array, ctype, at, read in (
                *((f"a_{array}", ctype, array, True) for array, ctype in loads.items()),
                *((f"o_{target}", ctype, f"new {target}", False) for target, ctype, _ in stores),
            )
        ]
        arrays = [*(f"a_{array}" for array in loads), *(f"o_{target}" for target, _, _ in stores)]
        fetched = [f"const auto l_{a} = *(const lanes<{ctype}, {width}> *)(a_{a} + i);" for a, ctype in loads.items()]
        fetched += [f"lanes<{ctype}, {width}> w_{target};" for target, ctype, _ in stores]
        text = OVER_ELEMENTS.format(
            name=name,
            threads=THREADS,
            pointers=len(self.pointers),
            columns=max(1, len(writer.given)),
            values=max(1, len(self.columns)),
            begins=lines([*begins, *(f"IS_GLOBAL({array});" for array in arrays)], 2),
            late=writer.late_block(),
            head=lines([*writer.head, *(f"double t{k} = {START[n.op]};" for k, n in enumerate(this.reductions))], 2),
            aligned=f"(({' | '.join(f'(uint64_t){array}' for array in arrays)}) % 16 == 0)",
            width=width,
            loads=lines(fetched, 4),
            lane=lines(writer.body_of(lambda a: f"l_{a}.at[k]", sums, [f"w_{t}.at[k] = {v};" for t, _, v in stores]), 6),
            writes=lines([f"*(lanes<{ctype}, {width}> *)(o_{t} + i) = w_{t};" for t, ctype, _ in stores], 4),
            single=lines(writer.body_of(lambda a: f"a_{a}[i]", sums, [f"o_{t}[i] = {v};" for t, _, v in stores]), 4),
            tail=lines(_tail(this.reductions), 2),
        )
        return text, Kernel(name, writer.given)

    def _numbers(self, name: str, reductions: Sequence[Traced], outputs: Sequence[tuple[str, Traced]]) -> tuple[str, Kernel]:
        """The kernel that adds up partial sums of each array, and computes numbers of it: where they go, and what they are."""
        writer = _Numbers(self)
        adding, total = [], []
        for k, node in enumerate(reductions):
            how = HOW[node.op]
            adding.append(f"t{k} = joined({how}, t{k}, given.partial[{len(reductions)} * piece + {k}]);")
            total.append(f"t{k} = over_block({how}, t{k}, shared);")
            writer.take(node, f"t{k}")
            writer.lines.append(f"values[{self.columns[node.value]}] = t{k};")
        for where, node in outputs:
            value = writer.number(node)
            writer.lines.append(f"{where} = {value};")
        text = OVER_ARRAYS.format(
            name=name,
            threads=THREADS,
            pointers=len(self.pointers),
            columns=max(1, len(writer.given)),
            values=max(1, len(self.columns)),
            start=lines([f"double t{k} = {START[node.op]};" for k, node in enumerate(reductions)], 2),
            shared=f"__shared__ double shared[{THREADS}];" if reductions else "",
            adding=lines(adding, 4),
            total=lines(total, 2),
            body=lines(writer.lines, 2),
        )
        return text, Kernel(name, writer.given)


_BYTES = {"uint16_t": 2, "float": 4, "double": 8}
HOW = {"sum": "SUM", "largest": "LARGEST", "smallest": "SMALLEST"}


def _tail(reductions: Sequence[Traced]) -> list[str]:
    if not reductions:
        return []
    found = [f"__shared__ double shared[{THREADS}];"]
    for k, node in enumerate(reductions):
        found.append(f"t{k} = over_block({HOW[node.op]}, t{k}, shared);")
        found.append(f"if (threadIdx.x == 0) given.partial[{len(reductions)} * piece + {k}] = t{k};")
    return found


def _measures_of(boundary: object) -> int:
    return len(boundary.values) if isinstance(boundary, Boundary) else 0


class _Numbers:
    """Numbers that one thread computes, of those that the host gives and of those that lie on the device."""

    def __init__(self, author: _Author, given: list[Traced] | None = None) -> None:
        self.author = author
        self.names: dict[int, str] = {}
        self.lines: list[str] = []
        self.given: list[Traced] = [] if given is None else given

    def take(self, node: Traced, value: str) -> None:
        """Let a number be what a variable holds."""
        self.names[id(node)] = f"(({C_TYPES[node.dtype]}){value})"

    def number(self, node: Traced) -> str:
        """The name of a number."""
        if id(node) not in self.names:
            if node.op == "const":
                value = constant(node.value)
            elif not self.author.is_far(node):
                value = given_number(self.given, node)
            else:
                value = self.author.read(node) or expression(node, [self.number(arg) for arg in node.args])
            name = f"n{len(self.names)}"
            self.lines.append(f"const {C_TYPES[node.dtype]} {name} = ({C_TYPES[node.dtype]})({value});")
            self.names[id(node)] = name
        return self.names[id(node)]


class _Elements:
    """What is computed for each element, with ``@array@`` in the place of its element of an array."""

    def __init__(self, author: _Author) -> None:
        self.author = author
        self.names: dict[int, str] = {}
        self.head: list[str] = []
        self.body: list[str] = []
        self.loads: list[str] = []
        self.given: list[Traced] = []
        self._late = _Numbers(author, self.given)
        self._late_count = 0

    def element(self, node: Traced) -> str:
        """The name of a value."""
        if id(node) in self.names:
            return self.names[id(node)]
        ctype, into = C_TYPES[node.dtype], self.body
        if not node.element:
            into, value = self.head, f"({ctype}){self._number(node)}"
        elif node.op == "load":
            self.loads.append(node.value)
            value = f"@{node.value}@"
        else:
            value = expression(node, [self.element(arg) for arg in node.args])
        name = f"v{len(self.names)}"
        into.append(f"const {ctype} {name} = {value};")
        self.names[id(node)] = name
        return name

    def _number(self, node: Traced) -> str:
        if node.op == "const":
            return constant(node.value)
        if not self.author.is_far(node):
            return given_number(self.given, node)
        self._late.lines.append(f"late[{self._late_count}] = {self._late.number(node)};")
        self._late_count += 1
        return f"late[{self._late_count - 1}]"

    def late_block(self) -> str:
        """What one thread computes before the others begin."""
        return LATE.format(count=self._late_count, body=lines(self._late.lines, 4)) if self._late_count else ""

    def body_of(self, load: Callable[[str], str], *more: Sequence[str]) -> list[str]:
        """The statements of an element, its loads put in, and others behind them."""
        return [
            *(re.sub(r"@(\w+)@", lambda m: load(m[1]), line) for line in self.body),
            *(line for part in more for line in part),
        ]


def given_number(given: list[Traced], node: Traced) -> str:
    """A number that the host gives: it takes its place behind those that are given already."""
    if node.op in SUMS:
        raise Untraceable("a sum is no number of the host")
    k = next((k for k, other in enumerate(given) if other is node), len(given))
    if k == len(given):
        given.append(node)
    return f"(row ? row[{k}] : given.row[{k}])" if k < BY_VALUE else f"row[{k}]"
