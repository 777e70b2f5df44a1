"""State by group: parameters that are stepped by one loop, with their moments and counters side by side."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from ..arrays import Untraceable, dtype_name, evaluated, is_number, kind, torch_if_loaded
from ..errors import CompileWarning, locating
from ..rules._base import AbstractRule
from ..rules._precision import state_leaves
from ..tree.entry import Entry, Lease
from ..tree.leaves import Slot
from . import build
from .loops import Loops, Table, table
from .memory import Column, Layout, Pool
from .program import COMPILED, Program, Schedule, form_of, nesting, numbers_of, structure_of_rule, trace
from .program import filled as filled_state

COMPILE_FROM = 2**12
"""Elements from which on a group is worth a compilation at once."""
COMPILE_AFTER = 64
"""Steps after which it is for smaller ones, where a loop gives the rule's own bits."""

_VARIANTS = 16
_MISSES = 16

Vector = np.ndarray[Any, Any]

_address = attrgetter("__array_interface__")
_SHAPE, _DTYPE, _STRIDES = attrgetter("shape"), attrgetter("dtype"), attrgetter("strides")
_IS_CPU, _ALIGNED = attrgetter("is_cpu"), attrgetter("flags.aligned")


def addresses_of(arrays: Sequence[Any]) -> Vector:
    """The addresses of the first elements of arrays of one library."""
    if arrays and isinstance(arrays[0], np.ndarray):
        return np.fromiter((a["data"][0] for a in map(_address, arrays)), np.uint64, len(arrays))
    torch: Any = torch_if_loaded()
    return np.fromiter(map(torch.Tensor.data_ptr, arrays), np.uint64, len(arrays))


def element_strides(x: Any) -> tuple[int, ...]:
    """The strides of an array in elements."""
    return tuple(s // x.itemsize for s in x.strides) if isinstance(x, np.ndarray) else tuple(x.stride())


def is_plain(x: Any) -> bool:
    """Whether x lies in the host's memory without gaps or lazy operations, and is of no class of its own."""
    if type(x) is np.ndarray:
        if not (x.flags.aligned and x.dtype.isnative):
            return False
    else:
        torch = torch_if_loaded()
        if torch is None or type(x) not in {torch.Tensor, torch.nn.Parameter} or x.layout is not torch.strided:
            return False
        if not x.is_cpu or x.is_neg() or x.is_conj():
            return False
    return is_dense(tuple(x.shape), element_strides(x))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return 0 not in shape


def _is_compiled_dtype(dtypes: set[Any]) -> bool:
    return len(dtypes) == 1 and str(next(iter(dtypes))).removeprefix("torch.") in COMPILED and all(
        getattr(dtype, "isnative", True) for dtype in dtypes
    )


class Variant:
    """A program and its loops."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.loops: Loops | None = None
        self.misses = 0


_variants: defaultdict[Any, list[Variant]] = defaultdict(list)
_refused: dict[Any, str] = {}


class Group:
    """Parameters with one kind of rule, one dtype and one form of state, on the host.

    Attributes:
        slots: their numbers in the state tree.
        paths: their names in errors.
        rules: their rules, of one structure.
        hyper: the numbers in the rules' fields, a row for each parameter.
        template: a state of the rule, for its nesting.
        form: what its leaves are.

    """

    def __init__(
        self, key: Any, slots: list[int], paths: list[str], rules: list[AbstractRule], xs: list[Any], template: Any
    ) -> None:
        self.key = key
        self.slots = slots
        self.paths = paths
        self.structure, self.nesting, self.form, self.dtype, self.library = key
        self.rules = rules
        self.hyper = _hyper(rules)
        self.template = template
        self.shapes = [tuple(x.shape) for x in xs]
        self.strides = [element_strides(x) for x in xs]
        self.native_strides = [x.strides if isinstance(x, np.ndarray) else self.strides[i] for i, x in enumerate(xs)]
        self.native_dtype = xs[0].dtype
        self.sizes = np.array([x.size if isinstance(x, np.ndarray) else x.numel() for x in xs], np.int64)
        self.count = len(slots)
        self.arrays = [i for i, part in enumerate(self.form) if part.form == "array"]
        self.numbers = [i for i, part in enumerate(self.form) if part.form != "array"]
        self.everyone = np.arange(self.count)
        self._whole: Table | None = None
        self._layout: Layout | None = None

    def with_rules(self, rules: list[AbstractRule]) -> Group | None:
        """The group with other numbers in its rules; None if they are of another kind now."""
        try:
            if any(structure_of_rule(rule) != self.structure for rule in {id(rule): rule for rule in rules}.values()):
                return None
        except Untraceable:
            return None
        new = object.__new__(Group)
        new.__dict__.update(self.__dict__)
        new.rules, new.hyper = rules, _hyper(rules)
        return new

    def admits(self, xs: Sequence[Any], dxs: Sequence[Any]) -> bool:
        """Whether parameters and gradients are as they were described, so that nothing else need be asked of them.

        Attributes are read one after another for all arrays at once, which costs a tenth of a microsecond for each.
        """
        present: Sequence[Any] | None = None if any(dx is None for dx in dxs) else dxs
        shapes, strides = self.shapes, self.native_strides
        if present is None:
            chosen = [i for i, dx in enumerate(dxs) if dx is not None]
            present = [dxs[i] for i in chosen]
            shapes, strides = [shapes[i] for i in chosen], [strides[i] for i in chosen]
        try:
            return (
                self._are_alike(xs, self.shapes, self.native_strides)
                and {self.native_dtype} == set(map(_DTYPE, xs))
                and self._are_alike(present, shapes, strides)
                and (not present or _is_compiled_dtype(set(map(_DTYPE, present))))
            )
        except (AttributeError, RuntimeError, TypeError):  # something else than a dense array
            return False

    def _are_alike(self, arrays: Sequence[Any], shapes: list[Any], strides: list[Any]) -> bool:
        if self.library == "numpy":
            return (
                set(map(type, arrays)) <= {np.ndarray}
                and list(map(_SHAPE, arrays)) == shapes
                and list(map(_STRIDES, arrays)) == strides
                and all(map(_ALIGNED, arrays))
            )
        torch: Any = torch_if_loaded()
        return (
            set(map(type, arrays)) <= {torch.Tensor, torch.nn.Parameter}
            and list(map(_SHAPE, arrays)) == shapes
            and list(map(torch.Tensor.stride, arrays)) == strides
            and all(map(_IS_CPU, arrays))
            and not any(map(torch.Tensor.is_neg, arrays))
        )

    def work(self, members: Vector) -> Table:
        """The pieces of some of the arrays; of all of them it is kept."""
        if len(members) != self.count:
            return table(members, self.sizes)
        if self._whole is None:
            self._whole = table(members, self.sizes)
        return self._whole

    def layout(self) -> Layout:
        """Where arrays of a new generation lie in blocks."""
        if self._layout is None:
            self._layout = Layout([int(n) for n in self.sizes])
        return self._layout

    def is_exact(self) -> bool:
        """Whether loops give the rule's own bits, so that it does not matter from which step on they are used."""
        try:
            counters = np.array([[float(leaf) for leaf in self._sample()]])
            parts = self.partition(np.array([0]), np.tile(counters, (self.count, 1)), self.dtype)
        except Untraceable:
            return False
        return all(variant.program.exact for variant, _, _ in parts)

    def _sample(self) -> list[Any]:
        leaves = state_leaves(self.template)
        return [leaves[i] for i in self.numbers]

    # --- programs ---

    def columns(self, program: Program, counters: Vector, members: Vector) -> Vector:
        """The inputs of a program for each array, a row each; measures and sums are filled in later.

        Schedules are asked for the given members only.
        """
        matrix = np.zeros((self.count, len(program.columns)))
        matrix[:, : self.hyper.shape[1]] = self.hyper
        for k, i in enumerate(self.numbers):
            matrix[:, program.columns[f"c{i}"]] = counters[:, k]
        matrix[:, program.columns["count"]] = self.sizes
        for schedule in program.schedules:
            self._follow(schedule, matrix, program.columns, members)
        return matrix

    def _follow(self, schedule: Schedule, matrix: Vector, columns: dict[str, int], members: Vector) -> None:
        known: dict[tuple[int, float], list[float]] = {}
        for member in members:
            row, rule = matrix[member], self.rules[member]
            count = row[columns[schedule.counter]]
            key = (id(rule), count)
            if key not in known:
                with locating(self.paths[member]):
                    known[key] = numbers_of(inner(rule, schedule.where).at(int(count)))
            row[schedule.first : schedule.first + schedule.count] = known[key]

    def partition(self, members: Vector, counters: Vector, dx_dtype: str) -> list[tuple[Variant, Vector, Vector]]:
        """(program, members, inputs) so that together all members are covered. Untraceable, with the reason, if that fails."""
        key = (*self.key, dx_dtype)
        if key in _refused:
            raise Untraceable(_refused[key])
        found = []
        variants = _variants[key]
        for variant in variants:
            if len(members) == 0:
                break
            matrix = self.columns(variant.program, counters, members)
            holds = _holds(variant.program, matrix, members)
            if holds is None:
                found.append((variant, members, matrix))
                members = members[:0]
            elif holds.any():
                found.append((variant, members[holds], matrix))
                members = members[~holds]
        while len(members):
            variant = self._traced(int(members[0]), counters, dx_dtype, key)
            matrix = self.columns(variant.program, counters, members)
            holds = _holds(variant.program, matrix, members)
            chosen = members if holds is None else members[holds]
            members = members[:0] if holds is None else members[~holds]
            found.append((variant, chosen, matrix))
        return found

    def _traced(self, member: int, counters: Vector, dx_dtype: str, key: Any) -> Variant:
        rule = self.rules[member]
        try:
            if len(_variants[key]) >= _VARIANTS:
                raise Untraceable("what it does depends on its numbers in too many ways")
            sample = {f"h{k}": v for k, v in enumerate(self.hyper[member])}
            sample |= {f"c{i}": counters[member, k] for k, i in enumerate(self.numbers)}
            sample["count"] = float(self.sizes[member])
            program = trace(rule, self.template, self.form, (self.dtype, dx_dtype), self.library, sample)
        except Untraceable as reason:
            _refused[key] = str(reason)
            _warn_untraceable(rule, str(reason))
            raise
        _variants[key].append(Variant(program))
        return _variants[key][-1]


_warned: set[str] = set()


def _warn_untraceable(rule: AbstractRule, reason: str) -> None:
    """One warning a kind of rule that claims a law and cannot be made a loop of."""
    name = type(rule).__name__
    if name not in _warned and build.switch() != "0":
        _warned.add(name)
        msg = (
            f"{name} is stepped array by array, since no loop can be made of it: {reason}. Results are the same and steps "
            "slower; OPTIMISERS_COMPILE=0 steps everything so without this warning"
        )
        warnings.warn(msg, CompileWarning, stacklevel=2)


def _hyper(rules: Sequence[AbstractRule]) -> Vector:
    rows: dict[int, list[float]] = {}
    for rule in rules:
        if id(rule) not in rows:
            rows[id(rule)] = numbers_of(rule)
    if len(rows) == 1:
        (row,) = rows.values()
        return np.tile(np.array(row, np.float64), (len(rules), 1))
    return np.array([rows[id(rule)] for rule in rules], np.float64).reshape(len(rules), -1)


def inner(rule: AbstractRule, where: Sequence[tuple[str, int | None]]) -> Any:
    """The rule that stands at a place inside a rule."""
    for name, index in where:
        value = getattr(rule, name)
        rule = value if index is None else value[index]
    return rule


def _holds(program: Program, matrix: Vector, members: Vector) -> Vector | None:
    """For which members the program's guards hold; None for all."""
    guards = [(node, value) for node, value in program.guards if not _late(node)]
    if not guards:
        return None
    rows = matrix[members]
    inputs = {name: rows[:, k] for name, k in program.columns.items()}
    memo: dict[int, Any] = {}
    result = np.ones(len(members), bool)
    for node, value in guards:
        result &= np.broadcast_to(evaluated(node, inputs, memo) == value, result.shape)
    return None if result.all() else result


def _late(node: Any) -> bool:
    """Whether a number depends on measures, and so is not known before the step."""
    return (node.op == "number" and str(node.value).startswith("m")) or any(map(_late, node.args))


class Generation:
    """The state of one group at one time.

    Attributes:
        columns: for each array of the state those of all parameters.
        counters: the numbers of the state, a row for each parameter.

    """

    def __init__(self, group: Group, columns: list[Column], counters: Vector) -> None:
        self.group, self.columns, self.counters = group, columns, counters

    def array(self, k: int, member: int) -> Any:
        """One array of the state of a parameter."""
        return self.columns[k].array(member, self.group.shapes[member], self.group.strides[member])

    def state(self, member: int) -> Any:
        """The state of a parameter, as its rule has it."""
        group = self.group
        leaves: list[Any] = [None] * len(group.form)
        for k, i in enumerate(group.arrays):
            leaves[i] = self.array(k, member)
        for k, i in enumerate(group.numbers):
            value, part = float(self.counters[member, k]), group.form[i]
            if part.form == "number":
                leaves[i] = int(value) if part.dtype == "int" else value
            else:
                leaves[i] = _scalar(value, part.dtype, group.library)
        return filled_state(group.template, iter(leaves))

    def leased(self, lease: Lease | None) -> Generation:
        """The same memory, taken over by a new lease if there is one."""
        columns = [column if lease is None else column.leased(lease) for column in self.columns]
        return Generation(self.group, columns, self.counters.copy())

    def put(self, states: dict[int, Any], leases: dict[int, Lease]) -> bool:
        """Take the states of parameters that were stepped otherwise; False if one has another form now."""
        group = self.group
        for member, state in states.items():
            try:
                if nesting(state) != group.nesting or form_of(state, group.shapes[member], group.dtype) != group.form:
                    return False
            except Untraceable:
                return False
            leaves = state_leaves(state)
            if any(not is_plain(leaves[i]) or element_strides(leaves[i]) != group.strides[member] for i in group.arrays):
                return False
        for k, i in enumerate(group.arrays):
            arrays = {member: state_leaves(state)[i] for member, state in states.items()}
            self.columns[k] = self.columns[k].replaced(arrays, addresses_of(list(arrays.values())), leases)
        for member, state in states.items():
            leaves = state_leaves(state)
            self.counters[member] = [float(leaves[i]) for i in group.numbers]
        return True


def _scalar(value: float, dtype: str, library: str) -> Any:
    if library == "numpy":
        return np.array(value, dtype)
    torch: Any = torch_if_loaded()
    return torch.tensor(value, dtype=getattr(torch, dtype), device="cpu")


class Plan:
    """What a line of states knows of how it is stepped.

    Attributes:
        pool: the memory of its generations.
        steps: how many steps were taken.
        again: the step from which on groups that were left out are considered again.
        misses: how often measures came out otherwise than loops were made for.
        refused: kinds of groups that no loop could be made for.
        writes: what was written last, sorted, to be used again while addresses stay.

    """

    def __init__(self) -> None:
        self.pool = Pool()
        self.steps = 0
        self.again = COMPILE_AFTER
        self.misses = 0
        self.refused: set[Any] = set()
        self.writes: tuple[list[Vector], Vector, Vector] | None = None

    def __deepcopy__(self, memo: Any) -> Plan:
        return Plan()


class Held:
    """What a state tree holds by group.

    Attributes:
        generations: one for each group.
        where: for each slot (number of the group, number in it), or None.
        plan: shared by all states that follow from one another.
        lease: of counters; each column has one of its own.
        pending: whether some groups may become worth a compilation later.
        loose: the slots that are in no group.
        idle: the slots that are frozen or have no rule.
        tied: the slots in groups that stand at several places.
        apart: the slots whose gradients are looked at one by one.

    """

    def __init__(
        self,
        generations: list[Generation],
        where: list[tuple[int, int] | None],
        plan: Plan,
        lease: Lease,
        idle: list[int],
        tied: list[int],
        *,
        pending: bool,
    ) -> None:
        self.generations, self.where, self.plan, self.lease, self.idle, self.pending = (
            generations, where, plan, lease, idle, pending,
        )  # fmt: skip
        self.loose = [i for i, place in enumerate(where) if place is None]
        self.tied = [i for i in tied if where[i] is not None]
        self.apart = [*self.loose, *self.tied]

    def next(self, generations: list[Generation], lease: Lease) -> Held:
        """The states after a step."""
        new = object.__new__(Held)
        new.__dict__.update(self.__dict__)
        new.generations, new.lease = generations, lease
        return new

    def dissolved(self) -> Held:
        """Nothing held by group, for one step in which measures came out unexpectedly, or for good if that is the rule."""
        self.plan.misses += 1
        if self.plan.misses > _MISSES:
            self.plan.refused.update(generation.group.key for generation in self.generations)
        self.plan.again = self.plan.steps + 1
        return Held([], [None] * len(self.where), self.plan, Lease(), self.idle, [], pending=True)

    def is_empty(self) -> bool:
        """Whether no state is held so."""
        return not self.generations

    def entry(self, slot: int, head: Entry) -> Entry:
        """The entry of a slot, whatever holds its state."""
        place = self.where[slot]
        if place is None:
            return head
        generation = self.generations[place[0]]
        leases = [self.lease, *(column.lease_of(place[1]) for column in generation.columns)]
        return head.replace(state=generation.state(place[1]), lease=Lease.of(leases))

    def leases(self) -> set[Lease]:
        """All leases of the memory that is held by group."""
        found = {self.lease}
        for generation in self.generations:
            for column in generation.columns:
                found.add(column.lease)
                found.update(column.older.values())
        return found

    def ended(self, heads: Sequence[Entry]) -> bool:
        """Whether ``update_`` has taken over memory of these states."""
        return any(lease.ended for lease in self.leases()) or any(heads[i].lease.ended for i in self.loose)

    def with_heads(self, heads: Sequence[Entry]) -> Held | None:
        """The same states with other rules; None if they cannot be held by group any more."""
        generations = []
        for generation in self.generations:
            group = generation.group
            rules: list[Any] = [heads[i].rule for i in group.slots]
            if any(a is not b for a, b in zip(rules, group.rules, strict=True)):
                new = group.with_rules(rules)
                if new is None:
                    return None
                generation = Generation(new, generation.columns, generation.counters)
            generations.append(generation)
        held = self.next(generations, self.lease)
        held.idle = idle_slots(heads)
        return held


def idle_slots(heads: Sequence[Entry]) -> list[int]:
    """The slots that take no step, whatever their gradients."""
    return [i for i, head in enumerate(heads) if head.frozen or head.rule is None]


def grouped(entries: Sequence[Entry], xs: Sequence[Any], plan: Plan, slots_of: Sequence[Slot]) -> Held:
    """The states of entries by group, as far as loops can be made for them and are worth it.

    ``xs`` are the parameters. Nothing is copied: columns refer to the arrays that are there.
    """
    where: list[tuple[int, int] | None] = [None] * len(entries)
    generations: list[Generation] = []
    mode = build.switch()
    pending = False
    found: defaultdict[Any, list[int]] = defaultdict(list)
    for i, (entry, x) in enumerate(zip(entries, xs, strict=True)):
        key = None if mode == "0" else _key(entry, x)
        if key is not None and key not in plan.refused:
            found[key].append(i)
    for key, slots in found.items():
        rules: list[Any] = [entries[i].rule for i in slots]
        paths = [slots_of[i].path or "(the array)" for i in slots]
        group = Group(key, slots, paths, rules, [xs[i] for i in slots], entries[slots[0]].state)
        if mode == "auto" and int(group.sizes.sum()) < COMPILE_FROM:
            if plan.steps < plan.again:
                pending = True
                continue
            if not group.is_exact():
                continue
        leaves = [state_leaves(entries[i].state) for i in slots]
        columns = []
        for k in group.arrays:
            arrays = [row[k] for row in leaves]
            columns.append(Column.of(arrays, addresses_of(arrays), [entries[i].lease for i in slots]))
        counters = np.array([[float(row[k]) for k in group.numbers] for row in leaves]).reshape(group.count, -1)
        for member, i in enumerate(slots):
            where[i] = len(generations), member
        generations.append(Generation(group, columns, counters))
    lease = Lease.of(entries[i].lease for g in generations for i in g.group.slots) if generations else Lease()
    tied = [i for i, slot in enumerate(slots_of) if len(slot.places) > 1]
    return Held(generations, where, plan, lease, idle_slots(entries), tied, pending=pending)


def _key(entry: Entry, x: Any) -> Any:
    """What parameters of one group have in common; None for one that no loop can step."""
    rule = entry.rule
    if rule is None or rule.law not in {"elementwise", "measured"} or not is_plain(x):
        return None
    dtype = dtype_name(x)
    if dtype not in COMPILED:
        return None
    strides = element_strides(x)
    try:
        form = form_of(entry.state, tuple(x.shape), dtype)
        if any(part.form == "scalar" for part in form) and x.ndim == 0:
            return None
        if rule.law == "measured" and x.ndim == 0:
            return None
        for leaf, part in zip(state_leaves(entry.state), form, strict=True):
            if part.form == "array" and not (is_plain(leaf) and kind(leaf) == kind(x) and element_strides(leaf) == strides):
                return None
            if not is_number(leaf) and getattr(leaf, "requires_grad", False):
                return None
            if part.form == "scalar" and kind(leaf) == "torch" and not (leaf.is_cpu and kind(x) == "torch"):
                return None
        return structure_of_rule(rule), nesting(entry.state), form, dtype, kind(x)
    except Untraceable:
        return None
