"""Tensors on other devices: those with one kind of rule are packed into one tensor, and their rule is computed on that.

So the number of kernels does not grow with the number of parameters, and nothing is read from the device but what rules check
or decide by.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from ...arrays import FLOATS, Untraceable, dtype_name, evaluated, is_number
from ...rules._precision import lacks_range, usable_in_float16
from ...rules._states import state_leaves
from ...tree.heads import Rules
from ..graph.program import Boundary, Part, inner
from ..graph.trace import filled, nesting, structure_of_rule
from ..groups.group import Group, hyper_of
from ..groups.track import GuardFailed, waits
from ..groups.variant import Variant
from ..memory.strides import is_dense
from ..memory.writes import Portion, Write, Writes
from ..tracks.checks import Checked
from ..tracks.scheduler import Request, Track, beside
from ..tracks.single import Job, Outcome
from .layout import copied_as, shaped_as
from .script import Run, Script

LIMIT = 2**24
"""Elements that are packed together. It bounds the memory that a step needs beside its results."""

_FLOAT = Part("number", "host")
_CLASSES = {torch.Tensor, torch.nn.Parameter, FakeTensor}


def is_far(x: torch.Tensor) -> bool:
    """Whether a tensor lies where each call costs a launch."""
    return x.device.type != "cpu"


class Item(NamedTuple):
    """A job that may be packed: its slot, and the leaves of its state."""

    slot: int
    job: Job
    leaves: list[Any]


def pack(jobs: dict[int, Job], *, in_place: bool) -> tuple[list[Packed], dict[int, Job]]:
    """Tracks for as many jobs as can be packed, and the other jobs.

    With ``in_place`` they will write to the memory of parameters and states.
    """
    found: defaultdict[Any, list[Item]] = defaultdict(list)
    structures: dict[int, Any] = {}
    for i, job in jobs.items():
        if isinstance(job.x, torch.Tensor) and is_far(job.x):
            item = Item(i, job, state_leaves(job.state))
            if (key := _key(item, structures)) is not None:
                found[key].append(item)
    if not found:
        return [], jobs
    tracks, left = [], dict(jobs)
    for key, items in found.items():
        try:
            tracks += list(_tracks(key, items))
        except Untraceable:
            continue
        for item in items:
            del left[item.slot]
    if in_place:
        _part(tracks)
    return tracks, left


def _key(item: Item, structures: dict[int, Any]) -> Any:
    """What packed parameters have in common; None for one that is stepped by its rule itself."""
    rule, x, dx = item.job.rule, item.job.x, item.job.dx
    if rule.law not in {"elementwise", "measured"}:
        return None
    shape, strides = x.shape, _strides(x)
    if strides is None or not is_dense(shape, strides) or (rule.law == "measured" and not shape):
        return None
    if not isinstance(dx, torch.Tensor) or _strides(dx) is None or dx.device != x.device or not dx.is_floating_point():
        return None
    form = []
    for leaf in item.leaves:
        if type(leaf) is float:
            form.append(_FLOAT)
            continue
        if is_number(leaf):
            if type(leaf) not in {int, float}:
                return None
            form.append(Part("number", "int" if type(leaf) is int else "host"))
            continue
        if not isinstance(leaf, torch.Tensor) or leaf.device != x.device or (own := _strides(leaf)) is None:
            return None
        if leaf.shape == shape and own == strides:
            form.append(Part("array", dtype_name(leaf)))
        elif leaf.ndim == 0 and leaf.dtype in {torch.float32, torch.float64}:
            form.append(Part("scalar", dtype_name(leaf)))
        else:
            return None
    if id(rule) not in structures:
        try:
            structures[id(rule)] = structure_of_rule(rule)
        except Untraceable:
            structures[id(rule)] = None
    if structures[id(rule)] is None:
        return None
    return structures[id(rule)], nesting(item.job.state), tuple(form), dtype_name(x), dtype_name(dx), x.device


def _strides(x: torch.Tensor) -> Any:
    """The strides of a tensor; None for one that is not what it seems, or not of real numbers."""
    if type(x) not in _CLASSES or x.layout is not torch.strided or x.is_neg():
        return None
    return x.stride() if dtype_name(x) in FLOATS else None


class Bucket(Group):
    """Parameters that one kind of rule steps, on one device, described as a `Group` is: float16 as float32."""

    def __init__(self, key: Any, jobs: Sequence[Job]) -> None:
        structure, nested, form, dtype, dx_dtype, _ = key
        wide = tuple(Part(part.form, _traceable(part.dtype)) for part in form)
        self.form, self.dx_dtype = wide, _traceable(dx_dtype)
        self.structure, self.nesting, self.dtype, self.library = structure, nested, _traceable(dtype), "torch"
        self.device = None
        self.key = structure, nested, wide, self.dtype, "torch", None
        low = lacks_range([part.dtype for part in form if part.form == "array"])
        self.rules = Rules.sharing([usable_in_float16(job.rule) if low else job.rule for job in jobs])
        self.paths = [job.path for job in jobs]
        self.low, self.hyper = False, hyper_of(self.rules)
        self.template = jobs[0].state
        self.sizes = np.array([job.x.numel() for job in jobs], np.int64)
        self.counts, self.count = self.sizes, len(jobs)
        self.arrays = [i for i, part in enumerate(form) if part.form == "array"]
        self.numbers = [i for i, part in enumerate(form) if part.form != "array"]
        self.scalars = []


def _traceable(dtype: str) -> str:
    return "float32" if dtype == "float16" else dtype


def _tracks(key: Any, items: list[Item]) -> Iterator[Packed]:
    """Tracks that cover these jobs."""
    group = Bucket(key, [item.job for item in items])
    scalars = frozenset(f"c{i}" for i in group.numbers if group.form[i].form == "scalar")
    read = [(i, f"c{i}" in scalars) for i in group.numbers]
    counters = np.array([[0.0 if far else float(item.leaves[i]) for i, far in read] for item in items])
    parts = group.partition(np.arange(len(items)), counters.reshape(len(items), -1), group.dx_dtype)
    scripts = [_script(variant, scalars) for variant, _, _ in parts]
    for (_, members, matrix), script in zip(parts, scripts, strict=True):
        for chosen in _portions(members, group.sizes):
            yield Packed(group, script, [int(i) for i in chosen], matrix[chosen], items)


def _script(variant: Variant, scalars: frozenset[str]) -> Script:
    script: Script | None = variant.scripts.get(scalars)
    if script is None:
        script = variant.scripts[scalars] = Script(variant.program, scalars)
    if script.decides_by_scalars():
        raise Untraceable("it decides by numbers that lie on a device")
    return script


def _portions(members: Any, sizes: Any) -> Iterator[Any]:
    """Members in portions of bounded size."""
    first, total = 0, 0
    for k, size in enumerate(sizes[members].tolist()):
        if k > first and total + size > LIMIT:
            yield members[first:k]
            first, total = k, 0
        total += size
    yield members[first:]


def _part(tracks: Sequence[Packed]) -> None:
    """Copy gradients that lie in memory which is about to be written."""
    written = {_memory(array) for track in tracks for array in track.targets()}
    for track in tracks:
        track.jobs = [job._replace(dx=job.dx.clone()) if _memory(job.dx) in written else job for job in track.jobs]


def _memory(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


class Packed(Track):
    """Parameters that are stepped together, packed."""

    def __init__(self, group: Bucket, script: Script, members: list[int], matrix: Any, items: Sequence[Item]) -> None:
        self.group, self.script, self.program, self.matrix = group, script, script.program, matrix
        self.slots = [items[i].slot for i in members]
        self.jobs, self.leaves = [items[i].job for i in members], [items[i].leaves for i in members]
        self.rules = [group.rules.of(i) for i in members]
        self.rule = self.jobs[0].rule
        self.passed = Counter()
        self._asked = 0
        self._checked: list[tuple[Boundary, list[Any]]] = []
        self._run: Run | None = None

    def paths(self) -> list[str]:
        return [job.path for job in self.jobs]

    def targets(self) -> Iterator[Any]:
        """The arrays that a step in place writes to."""
        yield from (job.x for job in self.jobs)
        for i, part in enumerate(self.group.form):
            if part.form != "number":
                yield from (row[i] for row in self.leaves)

    def _running(self) -> Run:
        if self._run is None:
            leaves = self.leaves
            dxs = [_laid_out(job.dx, job.x) for job in self.jobs]
            arrays = {"x": [job.x.detach() for job in self.jobs], "dx": dxs}
            arrays |= {f"s{i}": [row[i].detach() for row in leaves] for i in self.group.arrays}
            scalars = {name: [row[int(name[1:])] for row in leaves] for name in self.script.scalars}
            self._run = Run(self.script, self.matrix, arrays, scalars)
        return self._run

    def advance(self, measure: tuple[Any, ...] | None) -> Request | None:
        program = self.program
        if not program.boundaries:
            return None
        run = self._running()
        if measure is not None:
            names = program.boundaries[self._asked - 1].names or ()
            run.measures.update(zip(names, beside(measure, self.jobs[0].x), strict=True))
            self._check_guards(run)
        while self._asked < len(program.boundaries):
            boundary: Any = program.boundaries[self._asked]  # all are measures: nothing is packed that transforms whole arrays
            self._asked += 1
            rule: Any = inner(self.rules[0], boundary.where)
            if rule.checks or boundary.names is not None:
                values = [run.number(node) for node in boundary.values]
                if rule.checks:
                    self._checked.append((boundary, values))
                if boundary.names is not None:
                    self._rest(run)
                    return Request(rule, list(zip(*(value.unbind() for value in values), strict=True)))
        self._rest(run)
        return None

    def _rest(self, run: Run) -> None:
        """While others are on their way, large arrays are not held twice."""
        if sum(job.x.numel() for job in self.jobs) > LIMIT // 2:
            run.forget_given()

    def _check_guards(self, run: Run) -> None:
        """Raise GuardFailed unless what was decided from measures still holds; rules that do so read them from the device."""
        ahead = [(node, value) for node, value in self.program.late if not waits(node, self.program, self._asked)]
        if ahead:
            inputs = {name: float(self.matrix[0, k]) for name, k in self.program.columns.items()}
            inputs |= {name: float(value) for name, value in run.measures.items()}
            if any(evaluated(node, inputs) != value for node, value in ahead):
                raise GuardFailed

    def to_check(self) -> list[Checked]:
        return [
            Checked([(job.path, inner(rule, at.where)) for job, rule in zip(self.jobs, self.rules, strict=True)], values)
            for at, values in self._checked
        ]

    def commit(self) -> dict[int, Outcome]:
        """Compute new states and parameters, by slot."""
        run, leaves = self._running(), self.leaves
        stores = [(name, run.elements(node)) for name, node in self.program.last.stores]
        new: dict[str, list[Any]] = {name: [row[int(name[1:])] for row in leaves] for name in self._arrays()}
        new |= {name: self._delivered(run, packed, self._old(name)) for name, packed in stores}
        written = {name for name, _ in stores}
        # What is unchanged is copied: a step in place may write to it later, but not to the old state.
        new |= {name: copied_as(new[name], new[name]) for name in self._arrays() if name not in written}
        for name, node in self.program.numbers.items():
            if name in self.script.scalars:
                old = self._old(name)
                new[name] = copied_as(old, list(run.number(node).to(old[0].dtype).unbind()))
        self._run = None
        return self._outcomes(run, new)

    def plan(self, writes: Writes) -> dict[int, Outcome]:
        """As `commit`, in place and later: what is written is computed when its turn comes."""
        names = [name for name, _ in self.program.last.stores] + [n for n in self.program.numbers if n in self.script.scalars]
        targets = {name: [x if _is_writable(x) else torch.empty_like(x.detach()) for x in self._old(name)] for name in names}
        size = sum(job.x.numel() for job in self.jobs)
        outcomes = self._outcomes(self._running(), dict(targets))
        writes.portions.append(Portion(self.slots, size, partial(self._writes, targets)))
        return outcomes

    def _writes(self, targets: dict[str, list[Any]]) -> list[Write]:
        """What is written in place, computed: all of it, since an array that is alone is not copied to be read."""
        run, found = self._running(), {}
        for name, node in self.program.last.stores:
            found[name] = run.layout.unpack(run.elements(node).to(targets[name][0].dtype))
        for name, node in self.program.numbers.items():
            if name in targets:
                found[name] = list(run.number(node).to(targets[name][0].dtype).unbind())
        calls = [partial(torch._foreach_copy_, shaped_as(targets[name], new), new) for name, new in found.items()]
        return [*(Write(call, self.slots) for call in calls), Write(partial(setattr, self, "_run", None))]

    def _arrays(self) -> list[str]:
        return [f"s{i}" for i in self.group.arrays]

    def _old(self, name: str) -> list[Any]:
        return [job.x for job in self.jobs] if name == "x" else [row[int(name[1:])] for row in self.leaves]

    def _outcomes(self, run: Run, new: dict[str, list[Any]]) -> dict[int, Outcome]:
        """The outcomes, by slot, of which these are the arrays and numbers on the device; those on the host are known."""
        rows = [list(row) for row in self.leaves]
        for name, node in self.program.numbers.items():
            if name not in new:
                number = int if self.group.form[int(name[1:])].dtype == "int" else float
                new[name] = [number(value) for value in run.host[id(node)].tolist()]
        xs = new.pop("x", [None] * len(rows))
        for name, values in new.items():
            for row, value in zip(rows, values, strict=True):
                row[int(name[1:])] = value
        template = self.group.template
        return {slot: Outcome(filled(template, iter(row)), x) for slot, row, x in zip(self.slots, rows, xs, strict=True)}

    def _delivered(self, run: Run, packed: torch.Tensor, old: list[Any]) -> list[Any]:
        """Each array's own new values, in its own memory."""
        packed = packed.to(old[0].dtype)
        if len(old) == 1:
            return [packed if packed.stride() == old[0].stride() else torch.empty_like(old[0].detach()).copy_(packed)]
        return copied_as(old, run.layout.unpack(packed))


def _is_writable(x: torch.Tensor) -> bool:
    return not x.is_inference() or torch.is_inference_mode_enabled()


def _laid_out(dx: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient with the strides of the parameter."""
    dx = dx.detach()
    if dx.stride() == x.stride():
        return dx
    return torch.empty_strided(x.shape, x.stride(), dtype=dx.dtype, device=x.device).copy_(dx)
