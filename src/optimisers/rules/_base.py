"""What a rule is: a frozen dataclass with ``init`` and ``apply`` for one array, and a law that the engine may use."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias

from ..arrays import Array, can_read, cast_to, detached, dtype_name, kind
from ..errors import NonFiniteError, RuleError, described
from ._fields import check_arguments, checked, is_tensor
from ._states import map_state

Law: TypeAlias = Literal["elementwise", "stackable", "measured", "none"]

State: TypeAlias = Any
"""What a rule remembers of one array: nested tuples (or lists, dicts) of arrays and numbers, or None."""


class Assign(NamedTuple):
    """In the place of a step: the parameter is to become this value (MixedPrecision returns its master copy so)."""

    value: Any


def narrowed(leaf: Any) -> Any:
    """An array of float32, as `init` makes it for float16, in float16."""
    return cast_to(leaf, "float16") if kind(leaf) and dtype_name(leaf) == "float32" else leaf


def stepped(x: Array, step: Any) -> Array:
    """What x becomes by a step, in the precision in which the two come."""
    return step.value if isinstance(step, Assign) else x - step


class Measurement(NamedTuple):
    """What a rule asks the engine for in the middle of a step: its measure, combined over the leaves of its scope."""

    rule: MeasuringRule
    value: tuple[Any, ...]


class Together(NamedTuple):
    """What a stackable rule asks the engine for: its (new state, step), computed alone or with others like it."""

    rule: AbstractRule
    state: State
    x: Array
    dx: Array


class Whole(NamedTuple):
    """What a stackable rule asks for where it needs a whole array at once: ``rule.transform(array)``.

    What comes before and after is elementwise, so the engine may make loops of it, and give ``transform`` a stack of arrays
    that are alike, by the rule that ``stacked()`` makes.
    """

    rule: TransformingRule
    array: Array


Stages: TypeAlias = Generator[Measurement | Together | Whole, Any, tuple[State, Any]]


class AbstractRule(ABC):
    r"""A rule for stepping one array: derive a frozen dataclass from it and write ``init`` and ``apply``.

    Fields are hyper-parameters. Those with a conventional name (``eta``, ``beta``, ``epsilon``, ...) are checked against
    the range that the name implies, on construction and on ``adjust``. A rule is hashable, and its ``repr`` evaluates
    back to an equal rule.

    ``law`` is what the rule promises about itself, and what the engine may rely on:

    * ``"elementwise"``: ``apply`` on a concatenation of arrays must be the concatenation of the ``apply``\\ s;
    * ``"stackable"``: ``stacked().apply`` on a stack of equal-shaped arrays must be the stack of the ``apply``\ s;
    * ``"measured"``: a few numbers are measured first (see `MeasuredRule`), and the rest is elementwise;
    * ``"none"`` (the default): nothing is promised, and each array is stepped on its own.
    """

    real_only: ClassVar[bool] = False
    """Whether complex arrays are refused at setup."""

    structural: ClassVar[tuple[str, ...]] = ()
    """Fields that fix the shape or meaning of the state, so that ``adjust`` must not change them."""

    final: ClassVar[bool] = False
    """Whether it needs to know the new value of the array, so that in a chain it must be the last member."""

    opaque: ClassVar[tuple[str, ...]] = ()
    """Fields holding rules that ``adjust`` by field name reaches only with ``rule=``."""

    @property
    def law(self) -> Law:
        """What the rule promises about itself; override it with a plain class attribute."""
        return "none"

    @abstractmethod
    def init(self, x: Array) -> State:
        """The state for an array x before its first step. Must not keep x or a view of it; numbers are counters."""

    @abstractmethod
    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array | None]:
        """One step: the new state, and what is to be subtracted from x (None: nothing happens to x).

        Must not write to its arguments. dx has x's shape and working precision.
        """

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        """``apply`` as a generator that stops wherever a measure is needed. Only rules made of rules override it."""
        return _pair(self, "apply", self.apply(state, x, dx))
        yield  # makes this a generator

    def resolved(self, x: Array, path: str) -> Self:
        """The rule for this one array, once and for all: what depends on the array or on its path is decided at setup."""
        return self._with_children(lambda child: child.resolved(x, path))

    def unresolved(self) -> Self:
        """The rule as it was written, before `resolved`."""
        return self._with_children(lambda child: child.unresolved())

    def stacked(self) -> Self:
        """The rule for a stack of such arrays along a new first axis, where ``law`` is ``"stackable"``."""
        return self._with_children(lambda child: child.stacked())

    def _with_children(self, f: Callable[[AbstractRule], AbstractRule]) -> Self:
        rule: Any = self
        for name, index, child in list(children(self)):
            new = f(child)
            if new is not child:
                rule = with_child(rule, name, index, new)
        return rule  # type: ignore[no-any-return]

    def init_as(self, x: Array, dtype: str) -> State:
        """``init`` with moments of the named dtype, those that hold squares included."""
        state = self.init(cast_to(x, dtype))
        return map_state(narrowed, state) if dtype == "float16" else state

    def with_eta(self, eta: Any, base: Self) -> Self:
        """This rule with a new learning rate; ``base`` is the rule as given at setup, whose ratios are to be kept."""
        return self.replace(eta=eta)

    def learning_rate(self, state: State) -> Any:
        """What the coming step is multiplied by, as far as only its changes count: `ScheduleFree` weights steps by it."""
        return getattr(self, "eta", 1.0)

    def decay_factor(self, state: State) -> Any:
        """What x is multiplied by in the part of the coming step that is weight decay and nothing else."""
        return 0.0

    def remark(self, shape: tuple[int, ...]) -> str:
        """What a table of states says of an array of this shape besides the rule."""
        return ", ".join(filter(None, (child.remark(shape) for _, _, child in children(self))))

    def split(self, state: State, x: Array, dx: Array) -> tuple[State, Array, Array, Array] | None:
        """``apply``, its step in parts where it can tell them: without decay, the decay, an array with the first's signs."""
        return None

    def set_own(self, fields: Mapping[str, Any]) -> tuple[AbstractRule, Mapping[str, Any], set[str]]:
        """Where a rule keeps values elsewhere than in its fields: (rule with them set, fields left, names that were set)."""
        return self, fields, set()

    def refuse_change(self, name: str, value: Any) -> None:  # noqa: B027 (nothing is refused by default)
        """Raise HyperParameterError if ``adjust`` must not give this field this value."""

    def replace(self, **changes: Any) -> Self:
        """A copy with other field values, checked as on construction."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    # --- what every rule shares ---

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # dataclass() keeps methods that the class itself defines: these know tensors and ranges, the generated do not.
        for name in ("__repr__", "__eq__", "__hash__"):
            if name not in cls.__dict__:
                setattr(cls, name, getattr(cls, name))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        params = cls.__dict__.get("__dataclass_params__")
        if params is None or not params.frozen:
            msg = f"{cls.__name__} must be a frozen dataclass: write @dataclass(frozen=True) above the class"
            raise RuleError(msg)
        if params.init:
            check_arguments(cls, args, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, checked(type(self).__name__, field, getattr(self, field.name)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})  # type: ignore[arg-type]

    def __repr__(self) -> str:
        inner = ", ".join(f"{f.name}={_shown(getattr(self, f.name))}" for f in dataclasses.fields(self) if f.repr)  # type: ignore[arg-type]
        return f"{type(self).__name__}({inner})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            _equal(getattr(self, f.name), getattr(other, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        )

    def __hash__(self) -> int:
        values = (getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return hash((type(self), tuple(_hashable(value) for value in values)))


class MeasuringRule(AbstractRule):
    """A rule whose stages ask for ``Measurement(self, numbers)``."""

    @property
    def scope(self) -> str | None:
        """None: every array is measured for itself. A name: the measures of all arrays with this scope are combined."""
        return None

    @property
    def checks(self) -> bool:
        """Whether ``fault`` is to be asked about the measure, which costs one synchronisation a step for the whole tree."""
        return bool(getattr(self, "throw", False))

    def combine(self, measures: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        """The measures of all arrays of the scope as one."""
        (measure,) = measures
        return measure

    def fault(self, measure: tuple[float, ...]) -> str | None:
        """What is wrong with one array's measure, read on the host; None if nothing. Asked only if ``checks``."""
        bad = [value for value in measure if not math.isfinite(value)]
        return f"a measure of its gradient is {bad[0]}" if bad else None


class MeasuredRule(MeasuringRule):
    """A rule that needs a few numbers first, such as a norm, and is elementwise once it has them.

    Write ``measure`` and ``apply_measured`` instead of ``apply``; ``combine`` and ``scope`` where the numbers are to be
    taken over several arrays.
    """

    @property
    def law(self) -> Law:
        return "measured"

    @abstractmethod
    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        """A few 0-d numbers about one array."""

    @abstractmethod
    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array | None]:
        """One elementwise step, given the combined measure."""

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array | None]:
        return run_alone(self.stages(state, x, dx))

    def stages(self, state: State, x: Array, dx: Array) -> Stages:
        measure = yield Measurement(self, self.measure(state, x, dx))
        return _pair(self, "apply_measured", self.apply_measured(state, x, dx, measure))


class CompositeRule(AbstractRule):
    """A rule made of rules. It writes ``stages``, in which it delegates to the stages of the rules inside."""

    @abstractmethod
    def stages(self, state: State, x: Array, dx: Array) -> Stages: ...

    def apply(self, state: State, x: Array, dx: Array) -> tuple[State, Array | None]:
        return run_alone(self.stages(state, x, dx))


class TransformingRule(CompositeRule):
    """A stackable rule whose stages ask for ``Whole(self, array)``."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise RuleError unless arrays of this shape can be transformed: asked before anything is written."""

    @abstractmethod
    def transform(self, u: Array) -> Array:
        """What becomes of a whole array, in its shape and dtype."""

    def travels_as(self, u: Array) -> str:
        """The dtype in which arrays like u, and what becomes of them, may travel between ranks: that of the arithmetic."""
        return dtype_name(u)


def _pair(rule: AbstractRule, method: str, result: Any) -> tuple[State, Any]:
    if not (isinstance(result, tuple) and len(result) == 2):
        msg = f"{type(rule).__name__}.{method} must return a pair (state, step); got {described(result)}"
        raise RuleError(msg)
    return result


def stages_of(rule: AbstractRule, state: State, x: Array, dx: Array) -> Stages:
    """The stages of a rule, as the engine and rules made of rules run them: a stackable one in a single request."""
    if rule.law == "stackable":
        return (yield Together(rule, state, x, dx))  # type: ignore[no-any-return]
    return (yield from rule.stages(state, x, dx))


def run_alone(stages: Stages) -> tuple[State, Any]:
    """Run the stages of one array to their end, every measure taken over this array alone."""
    answer: Any = None
    try:
        while True:
            request = stages.send(answer)
            if isinstance(request, Together):
                answer = run_alone(request.rule.stages(request.state, request.x, request.dx))
            elif isinstance(request, Whole):
                answer = request.rule.transform(request.array)
            else:
                check_alone(request)
                answer = request.rule.combine([request.value])
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def check_alone(request: Measurement) -> None:
    """Raise NonFiniteError if the rule checks its measure and finds a fault, for an array without a path."""
    if request.rule.checks and all(can_read(value) for value in request.value):
        fault = request.rule.fault(tuple(float(detached(value)) for value in request.value))
        if fault:
            msg = f"{type(request.rule).__name__}: {fault}. Set throw=False to let it through"
            raise NonFiniteError(msg)


# --- rules inside rules ---------------------------------------------------------------------------------------------------

_PLAIN = frozenset({float, int, bool, str, type(None)})


def children(rule: AbstractRule) -> Iterator[tuple[str, int | None, AbstractRule]]:
    """The rules that stand in a rule's fields: (field, index in a tuple or None, rule)."""
    for field in dataclasses.fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, field.name)
        if type(value) in _PLAIN:  # an abstract class takes its time to say what is none of its own
            continue
        if isinstance(value, AbstractRule):
            yield field.name, None, value
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, AbstractRule):
                    yield field.name, i, item


def walk(rule: AbstractRule) -> Iterator[AbstractRule]:
    """The rule and all rules inside it, outermost first."""
    yield rule
    for _, _, child in children(rule):
        yield from walk(child)


def with_child(rule: AbstractRule, field: str, index: int | None, child: AbstractRule) -> AbstractRule:
    """The rule with one of the rules inside it replaced."""
    if index is None:
        return rule.replace(**{field: child})
    items = list(getattr(rule, field))
    items[index] = child
    return rule.replace(**{field: tuple(items)})


def _restored(cls: type[AbstractRule], values: dict[str, Any]) -> AbstractRule:
    """A rule from its field values, as pickle and copy make it."""
    rule = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(rule, name, value)
    return rule


# --- comparing and showing fields -------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if is_tensor(value):
        return f"tensor(shape={tuple(value.shape)})"
    if isinstance(value, tuple) and type(value) is tuple:
        inner = ", ".join(_shown(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def _equal(a: Any, b: Any) -> bool:
    if is_tensor(a) or is_tensor(b):
        return a is b or (is_tensor(a) and is_tensor(b) and a.shape == b.shape and bool((a == b).all()))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _hashable(value: Any) -> Any:
    if is_tensor(value):
        return None
    if isinstance(value, tuple):
        return tuple(_hashable(item) for item in value)
    return value
