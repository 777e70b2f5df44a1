"""A step of a whole state tree: groups by compiled loops, everything else by the rules themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..arrays import Untraceable, address, copied, is_recording, kind, torch_if_loaded
from ..errors import TieError
from ..rules._precision import map_state, state_leaves
from ..tree.entry import Entry, Lease, host_state, numbers_in
from ..tree.state import StateTree, rebuilt
from .groups.states import Held, Lineage, grouped
from .groups.step import GroupStep
from .groups.track import Missed
from .memory.strides import element_strides, is_loopable
from .tracks.single import Job, Outcome, Single, quiet, run

if TYPE_CHECKING:
    from .eager.packed import Packed


class Stepped(NamedTuple):
    """The state after a step, the values of parameters that are still to be placed, by slot, and whether they carry a graph."""

    state: StateTree
    values: dict[int, Any]
    graph: bool


def advance(
    tree: StateTree,
    xs: Sequence[Any],
    dxs: Sequence[Any],
    regular: Sequence[bool],
    *,
    in_place: bool,
    differentiable: bool = False,
) -> Stepped:
    """Step all parameters of a state tree.

    Args:
        tree: the state.
        xs: for each slot the parameter.
        dxs: for each slot the gradient, or None for no step.
        regular: for each group of the state whether all its arrays are known to be as described.
        in_place: take over the memory of state and parameters, which consumes the state; what no loop has written is
            returned.
        differentiable: keep the graph through the parameters.

    """
    held = tree._held if isinstance(tree._held, Held) else None
    ordinary = _is_ordinary()
    alone = in_place and ordinary  # what is written in place carries no graph
    graph = not alone and _wants_graph(tree, held if ordinary else None, xs, dxs, differentiable=differentiable)
    packs = not graph
    if not graph and ordinary:
        planned = _planned(tree, held, xs)
        planned.lineage.steps += 1
        while planned.generations:
            usual = regular if planned is held else [False] * len(planned.generations)
            try:
                stepped = _by_groups(tree, planned, xs, dxs, usual, in_place=in_place, packs=packs)
            except _Refused as refused:
                planned.lineage.refused.add(refused.key)
                planned = grouped(tree._entries, xs, planned.lineage, tree._slots)
            except Missed:
                planned, packs = planned.dissolved(), False
            else:
                planned.lineage.misses = 0
                return stepped
        held = planned
    else:
        held = None
    try:
        return _by_rules(tree, held, xs, dxs, in_place=in_place, graph=graph, packs=packs)
    except Missed:
        return _by_rules(tree, held, xs, dxs, in_place=in_place, graph=graph, packs=False)


def _packed(jobs: dict[int, Job], *, packs: bool, in_place: bool) -> tuple[Sequence[Packed], dict[int, Job]]:
    """Jobs on other devices as tracks that step many, and those that are left."""
    if not packs or not jobs or not _may_pack():
        return [], jobs
    from .eager.packed import pack

    return pack(jobs, in_place=in_place)


def _by_rules(
    tree: StateTree, held: Held | None, xs: Sequence[Any], dxs: Sequence[Any], *, in_place: bool, graph: bool, packs: bool
) -> Stepped:
    """A step in which nothing is held by group."""
    entries = tree._entries
    jobs = jobs_of(tree, entries, xs, dxs, range(len(xs)))
    if in_place:
        _refuse_shared([(job.path, job.x) for job in jobs.values()])
    with _mode(jobs, graph=graph), quiet(list(jobs.values())):
        packed, jobs = _packed(jobs, packs=packs, in_place=in_place)
        singles = {i: Single(job) for i, job in jobs.items()}
        run([*singles.values(), *packed])
        outcomes = {i: single.outcome() for i, single in singles.items()}
        if in_place:
            for entry in entries:
                entry.lease.ended = True
        for track in packed:
            outcomes.update(track.commit())
    lease = Lease()
    new = [after(entry, outcomes.get(i), lease, consume=in_place) for i, entry in enumerate(entries)]
    values = {i: out.x for i, out in outcomes.items() if out.x is not None}
    return Stepped(rebuilt(tree, new, held), values, graph)


class _Refused(Exception):  # noqa: N818 (a signal)
    """No loop can be made for a group."""

    def __init__(self, key: Any) -> None:
        super().__init__(key)
        self.key = key


def _by_groups(
    tree: StateTree, held: Held, xs: Sequence[Any], dxs: Sequence[Any], regular: Sequence[bool], *, in_place: bool, packs: bool
) -> Stepped:
    """As `_stepped_by_groups`, with NumPy's warnings off: overflow and division by zero give inf and NaN, as in loops."""
    with np.errstate(all="ignore"):
        return _stepped_by_groups(tree, held, xs, dxs, regular, in_place=in_place, packs=packs)


def _stepped_by_groups(
    tree: StateTree, held: Held, xs: Sequence[Any], dxs: Sequence[Any], regular: Sequence[bool], *, in_place: bool, packs: bool
) -> Stepped:
    """A step without a graph, of a state of which at least a part is held by group."""
    odd: dict[int, list[int]] = {}
    steps: dict[int, GroupStep] = {}
    for number, generation in enumerate(held.generations):
        group = generation.group
        own, given = [xs[i] for i in group.slots], [dxs[i] for i in group.slots]
        usual = regular[number]
        if in_place and group.library == "numpy" and not all(x.flags.writeable for x in own):
            usual = False
        if not usual:
            odd[number] = [k for k, x in enumerate(own) if given[k] is not None and _is_odd(x, group.strides[k], in_place)]
            for k in odd[number]:
                given[k] = None
        if any(dx is not None for dx in given):
            try:
                last = held.lineage.repeats.pop(number, None)
                steps[number] = GroupStep(generation, own, given, regular=usual, last=last)
            except Untraceable:
                raise _Refused(group.key) from None
    aside = [*held.loose, *(held.generations[n].group.slots[k] for n, members in odd.items() for k in members)]
    entries = tree._heads if tree._held is held else tree._entries
    if any(odd.values()):
        entries = tree._entries
    jobs = jobs_of(tree, entries, xs, dxs, aside)
    if in_place:
        _part(held.lineage, list(steps.values()), jobs)
    with _mode(jobs, graph=False):
        packed, jobs = _packed(jobs, packs=packs, in_place=in_place)
        singles = {i: Single(job) for i, job in jobs.items()}
        run([*singles.values(), *packed, *(track for step in steps.values() for track in step.tracks)])
        outcomes = {i: single.outcome() for i, single in singles.items()}
    # From here on nothing can fail, but for lack of memory, and memory is written.
    lease = Lease()
    if in_place:
        for old in held.leases():
            old.ended = True
        for i in held.loose:
            entries[i].lease.ended = True
    if packed:
        with _mode(packed, graph=False):
            outcomes.update({i: outcome for track in packed for i, outcome in track.commit().items()})
    values: dict[int, Any] = {}
    generations = []
    whole = True
    for number, generation in enumerate(held.generations):
        new = generation
        if number in steps:
            new, made = steps[number].commit(held.lineage.pool, number, lease, in_place=in_place)
            values.update({generation.group.slots[k]: x for k, x in made.items()})
            if (repeat := steps[number].repeat) is not None:
                held.lineage.repeats[number] = repeat
        elif in_place:
            new = generation.leased(lease)
        if odd.get(number):
            slots = generation.group.slots
            new = new if new is not generation else generation.leased(None)
            states = {k: outcomes[slots[k]].state for k in odd[number]}
            whole = new.put(states, {k: _odd_lease(entries[slots[k]], states[k], lease) for k in states}) and whole
        generations.append(new)
    values.update({i: out.x for i, out in outcomes.items() if out.x is not None})
    heads = tree._heads
    if tree._held is not held:  # no old arrays are kept alive by entries that are only heads from now on
        heads = tuple(head if held.where[i] is None else head.replace(state=None) for i, head in enumerate(heads))
    if held.loose:
        loose = set(held.loose)
        heads = tuple(
            after(entry, outcomes.get(i), lease, consume=in_place) if i in loose else heads[i]
            for i, entry in enumerate(entries)
        )
    result = held.next(generations, lease)
    state = rebuilt(tree, heads, result)
    if not whole:  # a rule has given a parameter a state of another form
        changed = {i for n, members in odd.items() for i in (held.generations[n].group.slots[k] for k in members)}
        shown = [
            after(entries[i], outcomes.get(i), lease, consume=in_place) if i in changed else entry
            for i, entry in enumerate(state._entries)
        ]
        state = rebuilt(tree, shown)
    return Stepped(state, values, False)


def _odd_lease(entry: Entry, state: Any, lease: Lease) -> Lease:
    """The lease of a new state: the old one's as well, if they share an array."""
    old = [leaf for leaf in state_leaves(entry.state) if kind(leaf)]
    shares = any(leaf is other for leaf in state_leaves(state) for other in old)
    return Lease.of([lease, entry.lease]) if shares and not entry.lease.ended else lease


def _is_odd(x: Any, strides: tuple[int, ...], in_place: bool) -> bool:
    """Whether a parameter is not laid out as its state is, or cannot be written."""
    return (
        not is_loopable(x)
        or element_strides(x) != strides
        or (in_place and isinstance(x, np.ndarray) and not x.flags.writeable)
    )


def jobs_of(
    tree: StateTree, entries: Sequence[Entry], xs: Sequence[Any], dxs: Sequence[Any], slots: Sequence[int]
) -> dict[int, Job]:
    """A job for each of these slots that has a gradient."""
    jobs = {}
    for i in slots:
        rule = entries[i].rule
        if dxs[i] is not None and rule is not None:
            jobs[i] = Job(tree._slots[i].path or "(the array)", rule, host_state(entries[i]), xs[i], dxs[i])
    return jobs


def after(entry: Entry, outcome: Outcome | None, lease: Lease, *, consume: bool) -> Entry:
    """The entry after a step; what was not stepped still shares its arrays with the old state, unless that is consumed."""
    if outcome is None:
        return entry.replace(lease=lease) if consume else entry
    numbers = numbers_in(outcome.state)
    state = outcome.state if consume else _apart(outcome.state, entry.state)
    return entry.replace(state=state, numbers=entry.numbers if len(numbers) == len(entry.numbers) else numbers, lease=lease)


def _apart(state: Any, old: Any) -> Any:
    """A new state without the arrays of the old one: a step in place may write to it later, and the old one is to stay."""
    given = {id(leaf) for leaf in state_leaves(old) if kind(leaf)}
    if given.isdisjoint(map(id, state_leaves(state))):
        return state
    return map_state(lambda leaf: copied(leaf) if id(leaf) in given else leaf, state)


def _planned(tree: StateTree, held: Held | None, xs: Sequence[Any]) -> Held:
    """What the engine holds of the state, by group."""
    if held is None:
        return grouped(tree._entries, xs, Lineage(), tree._slots)
    if held.pending and held.lineage.steps >= held.lineage.again:
        return grouped(tree._entries, xs, held.lineage, tree._slots)
    return held


# --- memory that is about to be written ---------------------------------------------------------------------------------------


def _part(lineage: Lineage, steps: Sequence[GroupStep], jobs: dict[int, Job]) -> None:
    """Refuse parameters that are one array now, and copy gradients that lie in memory to be written."""
    known = [step.group.slots for step in steps]
    before = lineage.apart
    same = before is not None and len(before) == len(known) and all(map(is_, before, known))
    if same and not jobs and not any(step.moved for step in steps):
        return
    found = [pair for step in steps for pair in step.writes()]
    if not found:
        _refuse_shared([(job.path, job.x) for job in jobs.values()])
        return
    starts, ends = np.concatenate([first for first, _ in found]), np.concatenate([end for _, end in found])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    if jobs or (starts[1:] < ends[:-1]).any():
        xs = [(step.group.paths[int(i)], step.xs[int(i)]) for step in steps for i in step.members]
        _refuse_shared([*xs, *((job.path, job.x) for job in jobs.values())])
    clear = [step.part_from(starts, ends) for step in steps]
    lineage.apart = known if all(clear) else None


def _refuse_shared(parameters: Sequence[tuple[str, Any]]) -> None:
    """Raise TieError if arrays that setup saw apart are now one, which would be written twice."""
    seen: dict[tuple[str, int], str] = {}
    for path, x in parameters:
        start = address(x)
        if start is not None and seen.setdefault(start, path) != path:
            msg = (
                f"{seen[start]!r} and {path!r} were two arrays at setup and are one now, so update_ would step it twice; "
                "set up a new state, which finds the tie"
            )
            raise TieError(msg)


# --- graphs and transforms --------------------------------------------------------------------------------------------------


def _is_ordinary() -> bool:
    """Whether arrays are what they seem: no transform, trace or dispatch mode looks on."""
    if torch_if_loaded() is None:
        return True
    if is_recording():
        return False
    from ..arrays import _torch

    return _torch.is_ordinary()


def _may_pack() -> bool:
    """Whether tensors may be stepped together: not in a trace or a transform. Dispatch modes see what is done to all."""
    if torch_if_loaded() is None:
        return False
    from ..arrays import _torch

    return _torch.is_eager()


def _wants_graph(
    tree: StateTree,
    held: Held | None,
    xs: Sequence[Any],
    dxs: Sequence[Any],
    *,
    differentiable: bool,
) -> bool:
    """Whether the step is to carry a graph. ``held`` is what the state holds by group, if nothing looks on."""
    torch = torch_if_loaded()
    if torch is None or (held is not None and not differentiable and not torch.is_grad_enabled()):
        return False
    if not any(kind(x) == "torch" for x in xs):
        return False
    from . import autograd as torch_graph

    if differentiable:
        return True
    if held is not None:  # groups hold no state and have no rule that requires grad
        if any(getattr(dx, "requires_grad", False) for dx in dxs if dx is not None):
            return True
        return torch_graph.wants_graph(jobs_of(tree, tree._heads, xs, dxs, held.loose).values())
    return torch_graph.wants_graph(jobs_of(tree, tree._entries, xs, dxs, range(len(xs))).values())


def _mode(jobs: Any, *, graph: bool) -> AbstractContextManager[Any]:
    if torch_if_loaded() is None or not jobs:
        return nullcontext()
    from . import autograd as torch_graph

    return torch_graph.mode(graph=graph)
