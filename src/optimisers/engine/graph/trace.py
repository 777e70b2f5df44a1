"""Tracing: a rule is run once on values that stand for arrays, with its numbers as inputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...arrays import FLOATS, HOST, Traced, Tracer, Untraceable, as_array, cast_to, is_number, kind, working_dtype
from ...errors import OptimisersError
from ...rules._base import AbstractRule, Assign, MeasuringRule, Stages, Together, Whole
from ...rules._precision import in_working_precision
from ...rules._states import state_leaves
from ...rules.wrappers.scheduled import Scheduled
from .program import COMPILED, Boundary, Part, Place, Program, Schedule, Transform, program_of

# --- rules as structure and numbers -----------------------------------------------------------------------------------------


def _is_lifted(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers_of(rule: AbstractRule) -> list[float]:
    """The numbers in the fields of a rule and of the rules inside, in order."""
    found: list[float] = []
    _gather_numbers(rule, found)
    return found


def _gather_numbers(value: Any, found: list[float]) -> None:
    if _is_lifted(value):
        found.append(value)
    elif isinstance(value, AbstractRule):
        for item in _values(value):
            _gather_numbers(item, found)
    elif type(value) is tuple:
        for item in value:
            _gather_numbers(item, found)


def _values(rule: AbstractRule) -> Iterator[Any]:
    for f in dataclasses.fields(rule):  # type: ignore[arg-type]
        if not (isinstance(rule, Scheduled) and f.name == "schedules"):
            yield getattr(rule, f.name)


def structure_of_rule(rule: AbstractRule) -> Any:
    """What a rule is apart from its numbers: two rules with equal structure are traced alike. Hashable, or Untraceable."""
    measured = (rule.scope, rule.checks) if isinstance(rule, MeasuringRule) else None  # they may follow from its numbers
    return type(rule), measured, tuple(_structure(value) for value in _values(rule))


def _structure(value: Any) -> Any:
    if _is_lifted(value):
        return int if isinstance(value, int) else float
    if isinstance(value, AbstractRule):
        return structure_of_rule(value)
    if type(value) is tuple:
        return tuple(_structure(item) for item in value)
    if kind(value) is not None:
        raise Untraceable("one of its fields is an array")
    try:
        hash(value)
    except TypeError:
        raise Untraceable("one of its fields cannot be compared") from None
    return value


class _Lift:
    """A rule whose numbers are inputs of a trace."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.count = 0
        self.schedules: dict[int, Schedule] = {}
        self.places: dict[int, tuple[Place, AbstractRule]] = {}
        self.kept: list[Any] = []

    def rule(self, rule: AbstractRule, where: Place = ()) -> AbstractRule:
        new = copy.copy(rule)
        self.kept.append(new)
        self.places[id(new)] = where, rule
        first = self.count
        for f in dataclasses.fields(rule):  # type: ignore[arg-type]
            if not (isinstance(rule, Scheduled) and f.name == "schedules"):
                object.__setattr__(new, f.name, self.value(getattr(rule, f.name), where, f.name, None))
        if isinstance(rule, Scheduled):
            self.schedules[id(new)] = Schedule(where, "", first, self.count)
        return new

    def value(self, value: Any, where: Place, name: str, index: int | None) -> Any:
        if _is_lifted(value):
            self.count += 1
            return self.tracer.number(f"h{self.count - 1}", "int" if isinstance(value, int) else HOST)
        if isinstance(value, AbstractRule):
            return self.rule(value, (*where, (name, index)))
        if type(value) is tuple:
            return tuple(self.value(item, where, name, i) for i, item in enumerate(value))
        return value


def form_of(state: Any, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
    """What the leaves of a state are, beside an array of this shape and dtype. Untraceable if one is something else."""
    parts = []
    for leaf in state_leaves(state):
        if is_number(leaf):
            if type(leaf) not in {int, float}:
                raise Untraceable(f"its state holds a {type(leaf).__name__}")
            parts.append(Part("number", "int" if isinstance(leaf, int) else HOST))
            continue
        name = str(leaf.dtype).removeprefix("torch.")
        if name not in COMPILED:
            raise Untraceable(f"its state holds {name}")
        if tuple(leaf.shape) == shape:
            parts.append(Part("array", name))
        elif leaf.ndim == 0 and name in {"float32", "float64"}:
            parts.append(Part("scalar", name))
        else:
            raise Untraceable("its state holds an array of another shape")
    if dtype not in COMPILED:
        raise Untraceable(f"the array is {dtype}")
    return tuple(parts)


def nesting(state: Any) -> Any:
    """How a state is nested, hashable."""
    if isinstance(state, dict):
        return dict, tuple((key, nesting(value)) for key, value in state.items())
    if isinstance(state, (tuple, list)):
        return type(state), tuple(nesting(item) for item in state)
    return None if state is None else 0


# --- tracing ----------------------------------------------------------------------------------------------------------------


def trace(
    rule: AbstractRule, state: Any, form: Sequence[Part], dtypes: tuple[str, str], library: str, sample: Mapping[str, float]
) -> Program:
    """What a rule computes from arrays of these dtypes (of x and dx), with a state like this one.

    Args:
        rule: the rule, of whose numbers only the number counts.
        state: a state of it, of which only the form counts.
        form: its form.
        dtypes: those of the parameter and of the gradient.
        library: ``"numpy"`` or ``"torch"``.
        sample: values of the numbers, by name, for decisions that are taken from them. The program holds where these come
            out the same.

    Raises Refused, saying why and for which numbers.
    """
    tracer = Tracer(library, {**sample})
    lift = _Lift(tracer)
    lifted = lift.rule(rule)
    schedules: list[Schedule] = []
    ends = form, dtypes, lift.count

    def scheduled(at: Any, counter: Traced) -> Any:
        found = lift.schedules[id(at)]
        if counter.op != "number" or found.end - found.start != len(numbers_of_lifted(at.rule)):
            raise Untraceable("a schedule stands inside a schedule")
        schedules.append(found._replace(counter=counter.value))
        return at.rule

    tracer.scheduled = scheduled
    try:
        boundaries, stores, numbers, steps = _outcome(lifted, state, form, dtypes, tracer, lift)
    except Untraceable as reason:
        raise Refused(str(reason), program_of(tracer, [], [], {}, schedules, *ends, steps=False)) from None
    return program_of(tracer, boundaries, stores, numbers, schedules, *ends, steps=steps)


class Refused(Untraceable):
    """A rule that no program can be made of, for numbers for which the guards of an empty program hold."""

    def __init__(self, reason: str, program: Program) -> None:
        super().__init__(reason)
        self.program = program


def _outcome(
    rule: AbstractRule, state: Any, form: Sequence[Part], dtypes: tuple[str, str], tracer: Tracer, lift: _Lift
) -> tuple[list[Boundary | Transform], list[tuple[str, Traced]], dict[str, Traced], bool]:
    """(measures and transforms, arrays that are written, new numbers of the state, whether the parameter moves)."""
    leaves = iter(
        tracer.array(f"s{i}", part.dtype) if part.form == "array" else tracer.number(f"c{i}", part.dtype)
        for i, part in enumerate(form)
    )
    x, dx = tracer.array("x", dtypes[0]), tracer.array("dx", dtypes[1])
    boundaries: list[Boundary | Transform] = []
    try:
        after, step = _run(rule, filled(state, leaves), x, dx, boundaries, tracer, lift)
        new_x = None if step is None else _new_value(x, step)
        stores, numbers = _outputs(state, after, form, tracer)
    except (OptimisersError, TypeError, AttributeError, ValueError, KeyError, ArithmeticError) as error:
        # Whatever a rule does to what is no real array shows when it is run on one.
        raise Untraceable(str(error)) from None
    return boundaries, stores if new_x is None else [("x", new_x), *stores], numbers, new_x is not None


def numbers_of_lifted(rule: AbstractRule) -> list[Traced]:
    """The inputs that stand for the numbers of a lifted rule."""
    found: list[Traced] = []

    def gather(value: Any) -> None:
        if isinstance(value, Traced):
            found.append(value)
        elif isinstance(value, AbstractRule):
            for item in _values(value):
                gather(item)
        elif type(value) is tuple:
            for item in value:
                gather(item)

    gather(rule)
    return found


def filled(state: Any, leaves: Iterator[Any]) -> Any:
    """A state of the same nesting with other leaves."""
    if isinstance(state, dict):
        return {key: filled(value, leaves) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        items = [filled(item, leaves) for item in state]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return None if state is None else next(leaves)


def _inside(stages: Stages, tracer: Tracer) -> Stages:
    """The stages, with those of stackable rules in the place of requests to run them."""
    answer: Any = None
    while True:
        try:
            request = stages.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        if isinstance(request, Together):
            tracer.whole += 1
            answer = yield from _inside(request.rule.stages(request.state, request.x, request.dx), tracer)
            tracer.whole -= 1
        else:
            answer = yield request


def _run(
    rule: AbstractRule,
    state: Any,
    x: Traced,
    dx: Traced,
    boundaries: list[Boundary | Transform],
    tracer: Tracer,
    lift: _Lift,
) -> tuple[Any, Any]:
    stages = _inside(in_working_precision(rule, state, x, dx), tracer)
    try:
        request: Any = next(stages)
        while True:
            if isinstance(request, Whole):
                given_array = tracer.lift(request.array)
                if not given_array.element or id(request.rule) not in lift.places:
                    raise Untraceable("it transforms what is no array, or by a rule made in the step")
                where, _ = lift.places[id(request.rule)]
                transform = Transform(where, (given_array,), f"u{len(boundaries)}", f"w{len(boundaries)}")
                boundaries.append(transform)
                tracer.exact = False
                request = stages.send(tracer.array(transform.source, given_array.dtype))
                continue
            values = tuple(tracer.lift(as_array(value)) for value in request.value)
            if any(value.element for value in values):
                raise Untraceable("its measure is no number")
            where, given = lift.places[id(request.rule)]
            if given.scope is None:  # type: ignore[attr-defined]
                boundaries.append(Boundary(where, values, None))
                request = stages.send(request.rule.combine([values]))
                continue
            names = tuple(f"m{len(boundaries)}_{k}" for k in range(len(values)))
            boundaries.append(Boundary(where, values, names))
            for name in names:
                tracer.inputs[name] = 0.0  # what SkipNonFinite expects; a run that finds otherwise goes another way
            request = stages.send(tuple(tracer.number(name, "float64") for name in names))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _new_value(x: Traced, step: Any) -> Traced:
    if isinstance(step, Assign):
        new = step.value
    elif isinstance(step, Traced) and step.element:
        new = cast_to(x, working_dtype(x.dtype)) - step
    else:
        raise Untraceable("its step is no array")
    if not isinstance(new, Traced):
        raise Untraceable("its new value is no array")
    return cast_to(new, x.dtype)  # type: ignore[no-any-return]


def _outputs(
    before: Any, after: Any, form: Sequence[Part], tracer: Tracer
) -> tuple[list[tuple[str, Traced]], dict[str, Traced]]:
    if nesting(before) != nesting(after):
        raise Untraceable("it changes the form of its state")
    stores, numbers = [], {}
    for i, (part, leaf) in enumerate(zip(form, state_leaves(after), strict=True)):
        new = tracer.lift(leaf)
        if part.form == "array":
            if not new.element:
                raise Untraceable("it puts a number where its state had an array")
            if not (new.op == "load" and new.value == f"s{i}"):
                stores.append((f"s{i}", cast_to(new, part.dtype)))
        elif new.element:
            raise Untraceable("it puts an array where its state had a number")
        elif part.dtype == "int" and new.dtype != "int":
            raise Untraceable("it makes a fraction of a counter")
        elif new.dtype == "bool":
            raise Untraceable("it puts a truth value into its state")
        else:
            numbers[f"c{i}"] = cast_to(new, part.dtype) if part.dtype in FLOATS else new
    return stores, numbers
