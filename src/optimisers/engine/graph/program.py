"""What a rule computes, as a graph: traced once for a kind of rule, with its hyper-parameters and counters as inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...arrays import HOST, Tape, Traced, Tracer
from ...rules._base import AbstractRule

COMPILED = frozenset({"float16", "bfloat16", "float32", "float64"})
"""The dtypes that loops are made for."""


class Part(NamedTuple):
    """One array or number of a state: ``"array"`` (of x's shape), ``"scalar"`` (a 0-d array) or ``"number"``."""

    form: str
    dtype: str


Place = tuple[tuple[str, int | None], ...]
"""Where a rule stands inside a rule: fields, and indices where these are tuples."""


def inner(rule: AbstractRule, where: Place) -> Any:
    """The rule that stands at a place inside a rule."""
    for name, index in where:
        value = getattr(rule, name)
        rule = value if index is None else value[index]
    return rule


class Boundary(NamedTuple):
    """A measure: of the rule that stands where, which numbers, and the names of the inputs that take the combined ones.

    Without names it is not combined with those of other arrays.
    """

    where: Place
    values: tuple[Traced, ...]
    names: tuple[str, ...] | None


class Transform(NamedTuple):
    """A transform of whole arrays: of the rule that stands where, and what it is given.

    That is stored by a pass in the array ``target``, and the answer is read from the array ``source``.
    """

    where: Place
    values: tuple[Traced]
    target: str
    source: str
    names: None = None


class Schedule(NamedTuple):
    """Where a Scheduled stands in the rule, the counter that drives it, and the numbers that it sets."""

    where: Place
    counter: str
    start: int
    end: int


@dataclass
class Pass:
    """One loop over all elements: numbers that it sums up, or arrays that it writes."""

    reductions: list[Traced] = field(default_factory=list)
    stores: list[tuple[str, Traced]] = field(default_factory=list)


@dataclass
class Program:
    """A rule for one dtype and one form of state.

    Attributes:
        guards: conditions on numbers under which it holds, and what they were; ``early`` ones are known before a step, ``late``
            ones depend on measures.
        boundaries: measures and transforms, in the order in which the rule asks for them.
        before: for each boundary the passes it needs, then those that the last pass needs.
        trailing: whether a transform comes last, with nothing but the last pass after it.
        last: the pass that writes.
        numbers: the new numbers of the state, by name.
        schedules: numbers that follow schedules.
        columns: the inputs, by name: hyper-parameters, numbers of the state, the element count, measures, sums.
        hypers: how many of them are hyper-parameters.
        counters: which of them are the numbers of the state.
        exact: whether it gives the rule's own bits.
        agreed: whether all backends of the host give the same bits: it is made of what IEEE 754 rounds correctly, and no sums.
        steps: whether the parameter moves.
        dtypes: those of the arrays, by name.
        library: whose arrays it is for.
        pointers: the arrays of a leaf in the order of their addresses: those that are read, those that take what is to be
            transformed, and those that the last pass writes.
        targets: for each array that is written its place among the addresses.

    """

    guards: list[tuple[Traced, float | bool]]
    boundaries: list[Boundary | Transform]
    before: list[list[Pass]]
    last: Pass
    numbers: dict[str, Traced]
    schedules: list[Schedule]
    columns: dict[str, int]
    hypers: int
    exact: bool
    steps: bool
    arrays: tuple[str, ...]
    dtypes: dict[str, str]
    library: str

    def __post_init__(self) -> None:
        self.early = [(n, value) for n, value in self.guards if not _depends(n, MEASURED)]
        self.late = [(n, value) for n, value in self.guards if _depends(n, MEASURED)]
        stores = [name for this in (*(p for passes in self.before for p in passes), self.last) for name, _ in this.stores]
        self.pointers = [*self.arrays, *(f"new {name}" for name in stores)]
        self.targets = {name: len(self.arrays) + k for k, name in enumerate(stores)}
        self.trailing = bool(self.boundaries) and isinstance(self.boundaries[-1], Transform) and not self.before[-1]
        self.counters = slice(self.hypers, self.columns["count"])
        self.counting = Tape(list(self.numbers.values()), self.columns)
        self.measuring = [
            Tape(boundary.values if isinstance(boundary, Boundary) else (), self.columns) for boundary in self.boundaries
        ]
        self.deciding = Tape([node for node, _ in self.early], self.columns)
        targets = [n for this in all_passes(self) for n in (*this.reductions, *(node for _, node in this.stores))]
        self.agreed = not any(map(_is_approximate, _nodes(targets)))


_APPROXIMATE = frozenset({"sum", "exp", "log", "tanh", "pow"})


def _is_approximate(node: Traced) -> bool:
    """Whether its last bit is a matter of who computes it. A power of Python numbers is C's own everywhere."""
    return node.op in _APPROXIMATE and not (node.op == "pow" and node.dtype in {HOST, "float64"} and not node.element)


def _nodes(targets: Iterable[Traced]) -> Iterator[Traced]:
    """Targets and all that they are made of, but for sums that are given."""
    seen: set[int] = set()
    ahead = list(targets)
    while ahead:
        node = ahead.pop()
        if id(node) not in seen:
            seen.add(id(node))
            ahead += node.args
            yield node


MEASURED = re.compile(r"m\d+_\d+")


def _depends(node: Traced, names: re.Pattern[str]) -> bool:
    """Whether a number is made from inputs with such names."""
    return (node.op == "number" and bool(names.fullmatch(node.value))) or any(_depends(arg, names) for arg in node.args)


# --- from graph to passes -----------------------------------------------------------------------------------------------------

SUMS = frozenset({"sum", "largest", "smallest"})


def program_of(
    tracer: Tracer,
    boundaries: list[Boundary | Transform],
    stores: list[tuple[str, Traced]],
    numbers: dict[str, Traced],
    schedules: list[Schedule],
    form: Sequence[Part],
    dtypes: tuple[str, str],
    hypers: int,
    *,
    steps: bool,
) -> Program:
    """The program of a trace: its sums ordered into passes, its inputs numbered."""
    names = [f"h{i}" for i in range(hypers)]
    names += [f"c{i}" for i, part in enumerate(form) if part.form != "array"] + ["count"]
    names += [name for boundary in boundaries for name in boundary.names or ()]
    done: dict[int, str] = {}
    before = []
    for boundary in boundaries:
        storing = [Pass(stores=[(boundary.target, boundary.values[0])])] if isinstance(boundary, Transform) else []
        before.append(passes_of(list(boundary.values), done, names) + storing)
    before.append(passes_of([node for _, node in stores] + list(numbers.values()), done, names))
    arrays = ("x", "dx", *(f"s{i}" for i, part in enumerate(form) if part.form == "array"))
    kinds = {"x": dtypes[0], "dx": dtypes[1], **{f"s{i}": p.dtype for i, p in enumerate(form) if p.form == "array"}}
    transforms = [boundary for boundary in boundaries if isinstance(boundary, Transform)]
    arrays += tuple(transform.source for transform in transforms)
    for transform in transforms:
        kinds[transform.source] = kinds[transform.target] = transform.values[0].dtype
    columns = {name: i for i, name in enumerate(names)}
    last = Pass(stores=stores)
    return Program(
        tracer.guards, boundaries, before, last, numbers, schedules, columns, hypers, tracer.exact, steps, arrays, kinds,
        tracer.library,
    )  # fmt: skip


def passes_of(targets: list[Traced], done: dict[int, str], names: list[str]) -> list[Pass]:
    """The passes that sums in targets need, innermost first; ``done`` names the sums that are there."""
    levels: dict[int, list[Traced]] = {}
    depth: dict[int, int] = {}

    def visit(node: Traced) -> int:
        """How many passes must have run before the node can be computed."""
        if id(node) in depth:
            return depth[id(node)]
        own = max((visit(arg) for arg in node.args), default=0)
        if node.op in SUMS:
            if id(node) in done:
                own = 0
            else:
                levels.setdefault(own, []).append(node)
                own += 1
        depth[id(node)] = own
        return own

    for node in targets:
        visit(node)
    result = []
    for level in sorted(levels):
        for node in levels[level]:
            done[id(node)] = f"r{len(done)}"
            node.value = done[id(node)]
            names.append(node.value)
        result.append(Pass(reductions=levels[level]))
    return result


def all_passes(program: Program) -> list[Pass]:
    """The passes in the order of their functions; the last one writes."""
    return [p for passes in program.before for p in passes] + [program.last]
