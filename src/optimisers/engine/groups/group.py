"""Parameters that are stepped by one loop, and the programs for them."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...arrays import Untraceable, is_number
from ...errors import CompileWarning, locating
from ...rules._base import AbstractRule, walk
from ...rules._precision import lacks_range, usable_in_float16
from ...rules._states import state_leaves
from ...tree.heads import Rules
from ...tree.sharding import Sharding
from ..graph.program import Place, Program, Schedule, inner
from ..graph.trace import Refused, filled, numbers_of, structure_of_rule, trace
from ..kernels.c import compiler as build
from ..kernels.work import Table, table
from ..memory.guard import Guard
from ..memory.pool import Layout
from ..memory.strides import Vector, element_strides
from ..shards.exchange import Exchange
from .stacking import Stack, stacked, stacks_stay
from .variant import Refusal, Variant

_VARIANTS = 16


class Columns(Mapping[str, Any]):
    """The columns of a matrix by name."""

    def __init__(self, rows: Vector, columns: dict[str, int]) -> None:
        self._rows, self._columns = rows, columns

    def __getitem__(self, name: str) -> Any:
        return self._rows[:, self._columns[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


_variants: defaultdict[Any, list[Variant]] = defaultdict(list)
_refused: dict[Any, list[Refusal]] = {}


class Group:
    """Parameters with one kind of rule, one dtype and one form of state, on one device.

    Attributes:
        slots: their numbers in the state tree.
        paths: their names in errors.
        rules: their rules, of one structure.
        hyper: the numbers in the rules' fields, a row for each parameter.
        low: whether moments are so narrow that ``epsilon`` is raised.
        template: a state of the rule, for its nesting.
        form: what its leaves are.
        sizes: of the arrays, in elements; where they are cut over ranks, of the parts here.
        has_empty: whether one of them is empty, as the part of an array that is cut over ranks may be.
        counts: of whole arrays.
        shardings: how each array lies on several ranks, None for one that is here as a whole; empty if all are.

    """

    def __init__(
        self,
        key: Any,
        slots: list[int],
        paths: list[str],
        rules: Rules,
        xs: list[Any],
        template: Any,
        shardings: Sequence[Sharding | None] = (),
    ) -> None:
        self.key = key
        self.slots = slots
        self.paths = paths
        self.structure, self.nesting, self.form, self.dtype, self.library, self.device = key
        self.rules = rules
        self.low = lacks_range([part.dtype for part in self.form if part.form != "number"])
        self.hyper = hyper_of(rules, low=self.low)
        # Without its arrays, which would be kept alive.
        self.template = filled(template, iter(leaf if is_number(leaf) else 0 for leaf in state_leaves(template)))
        self.shapes = [tuple(x.shape) for x in xs]
        self.strides = [element_strides(x) for x in xs]
        self._guard = Guard(xs, self.strides)
        self.native_dtype = xs[0].dtype
        self.place = xs[0].device if self.library == "torch" else None
        self.sizes = np.array([x.size if isinstance(x, np.ndarray) else x.numel() for x in xs], np.int64)
        self.has_empty = not self.sizes.all()
        self._unsigned = self.sizes.astype(np.uint64)
        self.shardings = list(shardings) if any(s is not None for s in shardings) else []
        self.counts = self.sizes.copy()
        for member, sharding in enumerate(self.shardings):
            if sharding is not None:
                self.counts[member] = math.prod(sharding.shape)
        self.count = len(slots)
        self.arrays = [i for i, part in enumerate(self.form) if part.form == "array"]
        self.numbers = [i for i, part in enumerate(self.form) if part.form != "array"]
        # Numbers that lie on a device are kept as arrays of one element.
        self.scalars = [i for i in self.numbers if self.form[i].form == "scalar" and self.device is not None]
        self.stored = [*self.arrays, *self.scalars]
        self._whole: Table | None = None
        self.everyone = np.arange(self.count)
        self._layout: Layout | None = None
        self._stacks: dict[Place, list[Stack]] = {}
        self._for_stacks: dict[tuple[int, Place], AbstractRule] = {}
        self.exchanges: dict[Sharding, Exchange] = {}

    def sharding(self, member: int) -> Sharding | None:
        """How an array lies on several ranks."""
        return self.shardings[member] if self.shardings else None

    def with_rules(self, rules: Rules) -> Group | None:
        """The group with other numbers in its rules; None if they are of another kind now."""
        try:
            if any(structure_of_rule(rules.distinct[k]) != self.structure for k in set(rules.kinds)):
                return None
        except Untraceable:
            return None
        new = object.__new__(Group)
        new.__dict__.update(self.__dict__)
        new.rules, new.hyper, new._for_stacks = rules, hyper_of(rules, low=self.low), {}
        new._stacks = {where: kept for where, kept in self._stacks.items() if stacks_stay(self.rules, rules, where)}
        return new

    def admits(self, xs: Sequence[Any], dxs: Sequence[Any]) -> bool:
        """Whether parameters and gradients are as they were described, so that nothing else need be asked of them."""
        return self._guard.holds(xs, dxs)

    def work(self, members: Vector) -> Table:
        """The pieces of some of the arrays; of all of them it is kept."""
        if len(members) != self.count:
            return table(members, self.sizes)
        if self._whole is None:
            self._whole = table(members, self.sizes)
        return self._whole

    def stacks(self, members: Vector, where: Place) -> list[Stack]:
        """Some of the parameters by what the rules that stand where can transform together; of all of them they are kept.

        RuleError if a rule cannot transform its parameter.
        """
        if len(members) != self.count:
            return stacked(self, members, where)
        if where not in self._stacks:
            self._stacks[where] = stacked(self, members, where)
        return self._stacks[where]

    def for_stacks(self, member: int, where: Place) -> Any:
        """The rule that stands where in the rule of a parameter, as one for stacks; made once, and not in each step."""
        key = self.rules.kinds[member], where
        if key not in self._for_stacks:
            self._for_stacks[key] = inner(self.rules.of(member), where).stacked()
        return self._for_stacks[key]

    def bytes_of(self, size: Any) -> Vector:
        """The bytes of each array, if an element takes so many."""
        product: Vector = self._unsigned * size
        return product

    def layout(self, k: int = 0) -> Layout:
        """Where arrays of a new generation lie in blocks: the k-th of each state."""
        if k >= len(self.arrays):
            return Layout([1] * self.count)
        if self._layout is None:
            self._layout = Layout([int(n) for n in self.sizes])
        return self._layout

    def laid_out(self, k: int, member: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of the k-th array of a state."""
        return (self.shapes[member], self.strides[member]) if k < len(self.arrays) else ((), ())

    def counters_in(self, leaves: Sequence[Any]) -> list[float]:
        """The numbers of a state, 0 for those that lie on a device."""
        return [0.0 if i in self.scalars else float(leaves[i]) for i in self.numbers]

    # --- programs ---

    def columns(self, program: Program, counters: Vector, members: Vector) -> Vector:
        """The inputs of a program for each array, a row each; measures and sums are filled in later.

        Schedules are asked for the given members only.
        """
        matrix = np.zeros((self.count, len(program.columns)))
        matrix[:, program.columns["count"]] = self.counts
        self.fill(matrix, program, counters, members, hyper=True)
        return matrix

    def fill(self, matrix: Vector, program: Program, counters: Vector, members: Vector, *, hyper: bool) -> None:
        """Put counters into a matrix of inputs, and what follows from them; with ``hyper`` the fields of rules as well."""
        if hyper:
            matrix[:, : self.hyper.shape[1]] = self.hyper
        if self.numbers:
            matrix[:, program.counters] = counters
        for schedule in program.schedules:
            self._follow(schedule, matrix, program.columns, members)

    def _follow(self, schedule: Schedule, matrix: Vector, columns: dict[str, int], members: Vector) -> None:
        known: dict[tuple[int, float], list[float]] = {}
        for member in members:
            row, rule = matrix[member], self.rules.of(member)
            count = row[columns[schedule.counter]]
            key = (id(rule), count)
            if key not in known:
                with locating(self.paths[member]):
                    usable = usable_in_float16(rule) if self.low else rule
                    known[key] = numbers_of(inner(usable, schedule.where).at(int(count)))
            row[schedule.start : schedule.end] = known[key]

    def partition(self, members: Vector, counters: Vector, dx_dtype: str) -> list[tuple[Variant, Vector, Vector]]:
        """(program, members, inputs) so that together all members are covered. Untraceable, with the reason, if that fails."""
        key = (*self.key, dx_dtype)
        found = []
        variants = _variants[key]
        for variant in variants:
            if len(members) == 0:
                break
            matrix = self.columns(variant.program, counters, members)
            holds = holding(variant.program, matrix, members)
            if holds is None:
                found.append((variant, members, matrix))
                members = members[:0]
            elif holds.any():
                found.append((variant, members[holds], matrix))
                members = members[~holds]
        for refusal in _refused.get(key, ()) if len(members) else ():
            matrix = self.columns(refusal.program, counters, members)
            holds = holding(refusal.program, matrix, members)
            if holds is None or holds.any():
                raise Untraceable(refusal.reason)
        while len(members):
            variant = self._traced(int(members[0]), counters, dx_dtype, key)
            matrix = self.columns(variant.program, counters, members)
            holds = holding(variant.program, matrix, members)
            chosen = members if holds is None else members[holds]
            members = members[:0] if holds is None else members[~holds]
            found.append((variant, chosen, matrix))
        return found

    def _traced(self, member: int, counters: Vector, dx_dtype: str, key: Any) -> Variant:
        rule = self.rules.of(member)
        try:
            sample = {f"h{k}": v for k, v in enumerate(self.hyper[member])}
            sample |= {f"c{i}": counters[member, k] for k, i in enumerate(self.numbers)}
            sample["count"] = float(self.counts[member])
            program = trace(rule, self.template, self.form, (self.dtype, dx_dtype), self.library, sample)
            _refuse_more(_variants[key], program)
        except Refused as reason:
            refusals = _refused.setdefault(key, [])
            refusals[:] = [*refusals[1 - _VARIANTS :], Refusal(reason.program, str(reason))]  # older ones are found out anew
            _warn_untraceable(rule, str(reason))
            raise
        _variants[key].append(Variant(program, self.device, [f"c{i}" for i in self.scalars]))
        return _variants[key][-1]


def _refuse_more(variants: list[Variant], program: Program) -> None:
    if len(variants) >= _VARIANTS:
        raise Refused("what it does depends on its numbers in too many ways", program)


_warned: set[str] = set()


def _warn_untraceable(rule: AbstractRule, reason: str) -> None:
    """One warning a kind of rule that claims a law and cannot be made a loop of."""
    name = type(rule).__name__
    expected = all(part.law in {"elementwise", "measured"} for part in walk(rule))
    if expected and name not in _warned and build.switch() != "0":
        _warned.add(name)
        msg = (
            f"{name} is stepped array by array, since no loop can be made of it: {reason}. Results are the same and steps "
            "slower; OPTIMISERS_COMPILE=0 steps everything so without this warning"
        )
        warnings.warn(msg, CompileWarning, stacklevel=2)


def hyper_of(rules: Rules, *, low: bool = False) -> Vector:
    """The numbers in the fields of rules of one structure, a row for each array; with ``low`` as float16 moments take them."""
    distinct = rules.distinct
    rows = {k: numbers_of(usable_in_float16(distinct[k]) if low else distinct[k]) for k in set(rules.kinds)}
    if len(rows) == 1:
        (row,) = rows.values()
        return np.tile(np.array(row, np.float64), (len(rules.kinds), 1))
    return np.array([rows[k] for k in rules.kinds], np.float64).reshape(len(rules.kinds), -1)


def holding(program: Program, matrix: Vector, members: Vector) -> Vector | None:
    """For which members the program's guards hold; None for all."""
    if not program.early:
        return None
    rows = matrix[members]
    decided = program.deciding.run(Columns(rows, program.columns))
    result = np.ones(len(members), bool)
    for value, (_, expected) in zip(decided, program.early, strict=True):
        result &= np.broadcast_to(value == expected, result.shape)
    return None if result.all() else result
