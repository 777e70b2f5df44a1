"""``update``: one step as a pure function; ``update_``: the same in place."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

from ..arrays import address, dtype_name, is_compiling, kind, share_memory, torch_if_loaded
from ..engine.step import Job, Outcome, step
from ..errors import ArgumentError, StructureError, TieError, described
from ..tree.destructure import permuted
from ..tree.entry import Entry, Lease, device_of, host_state, numbers_in
from ..tree.gradients import gradient_of
from ..tree.leaves import Slot
from ..tree.paths import shown
from ..tree.state import StateTree, check_alive, rebuilt
from ..tree.structure import is_module


def update(state: StateTree, model: Any, grads: Any, *, differentiable: bool = False) -> tuple[StateTree, Any]:
    """One step as a pure function: every array given keeps its bytes.

    Used as ``state, model = update(state, model, grads)``.

    Args:
        state: what `setup` returned for this model, or an earlier update.
        model: a tree as at setup. A ``torch.nn.Module`` is an error, since its parameters cannot be exchanged purely: use
            `update_`, or its dict of parameters with ``torch.func.functional_call``.
        grads: the model's structure; None for a leaf, a branch or the whole means no step there, and its state stays.
        differentiable: keep the graph also through the parameters themselves, as first-order meta-learning needs. Without it
            the outputs carry a graph exactly when grad mode is on and a gradient, a state array or a field requires grad;
            otherwise new parameters are leaves that keep class and ``requires_grad``.

    Raises StructureError and GradientError for gradients that do not fit, naming the path; NonFiniteError from rules with
    ``throw=True``; ConsumedStateError for a state that ``update_`` has used up.
    """
    if is_module(model):
        msg = (
            "update: a torch.nn.Module cannot be updated purely. Use update_(state, module), which steps it in place, or "
            "set up with params = dict(module.named_parameters()), take gradients through "
            "torch.func.functional_call(module, params, ...), and call update(state, params, grads)"
        )
        raise ArgumentError(msg)
    if is_compiling():
        from ..engine.compiling import update_traced

        return update_traced(_update, state, model, grads, differentiable=differentiable)
    return _update(state, model, grads, differentiable=differentiable)


def _update(state: StateTree, model: Any, grads: Any, *, differentiable: bool) -> tuple[StateTree, Any]:
    work = prepare(state, model, grads)
    outcomes, graph = _run(work, differentiable=differentiable)
    leaves = list(work.leaves)
    for i, outcome in outcomes.items():
        if outcome.x is not None:
            for place in state._slots[i].places:
                value = permuted(outcome.x, place.permutation)
                leaves[place.leaf] = finished(value, leaves[place.leaf], graph=graph)
            retie(state._slots[i], leaves)
    new = _entries(state, outcomes, Lease(), consume=False)
    return rebuilt(state, new), state._structure.unflatten(model, leaves)


def update_(state: StateTree, model: Any, grads: Any = None) -> tuple[StateTree, Any]:
    """One step in place: the same result as `update`, re-using the memory of state and model.

    The state given is consumed, with every state that shares its arrays; go on with the one returned. Gradients are never
    written to. For a ``torch.nn.Module`` grads may be left out: the step then takes each parameter's ``.grad``. Carries no
    graph. Raises as `update` does, and then has changed nothing.
    """
    if is_compiling():
        from ..engine.compiling import update_untraced

        reason = "update_ writes to memory that torch.compile manages itself; inside torch.compile use update"
        return update_untraced(update_, reason, state, model, grads)
    module = is_module(model)
    work = prepare(state, model, grads, from_module=grads is None and module)
    _refuse_new_ties(work.jobs)
    with no_grad():
        outcomes, _ = _run(work, differentiable=False)
        leaves = list(work.leaves)
        replaced = False
        for i, outcome in outcomes.items():
            if outcome.x is None:
                continue
            written: list[Any] = []
            for place in state._slots[i].places:
                x = leaves[place.leaf]
                if any(share_memory(x, other) for other in written):
                    continue
                value = permuted(outcome.x, place.permutation)
                if _write(x, value):
                    written.append(x)
                else:
                    replaced, leaves[place.leaf] = True, value
    new = _entries(state, outcomes, Lease(), consume=True)
    result = state._structure.unflatten(model, leaves) if replaced and not module else model
    return rebuilt(state, new), result


class Work(NamedTuple):
    """What a step is about to do."""

    leaves: list[Any]
    jobs: dict[int, Job]
    """For each slot that is to be stepped."""


def prepare(state: StateTree, model: Any, grads: Any, *, from_module: bool = False) -> Work:
    """The leaves of the model, and a job for every slot that has a gradient and is not frozen."""
    if not isinstance(state, StateTree):
        hint = "; the order is update(state, model, grads)" if isinstance(model, StateTree) else ""
        msg = f"update: expected the state that setup returned, got {described(state)}{hint}"
        raise ArgumentError(msg)
    if isinstance(model, StateTree) or isinstance(grads, StateTree):
        msg = "update: a state stands where the model or the gradient should; the order is update(state, model, grads)"
        raise ArgumentError(msg)
    check_alive(state)
    structure = state._structure
    leaves = checked_leaves(state, model)
    given = [leaf.grad for leaf in leaves] if from_module else structure.align(model, grads)
    jobs: dict[int, Job] = {}
    for i, (slot, entry) in enumerate(zip(state._slots, state._entries, strict=True)):
        if entry.frozen or entry.rule is None:
            continue
        x = leaves[slot.places[0].leaf]
        dx = gradient_of(slot, x, given, structure.paths)
        if dx is not None:
            _check_device(slot, entry, x)
            jobs[i] = Job(slot.path or "(the array)", entry.rule, host_state(entry), x, dx)
    return Work(leaves, jobs)


def _check_device(slot: Slot, entry: Entry, x: Any) -> None:
    """Raise StructureError if the parameter was moved since setup, and its state was not."""
    device = device_of(entry.state) if kind(x) == "torch" else None
    if device is not None and device != x.device:
        msg = (
            f"model at {shown(slot.path)}: the parameter is on {x.device}, its state on {device}; move the state as well, "
            f"state = opt.to(state, device={str(x.device)!r})"
        )
        raise StructureError(msg)


def checked_leaves(state: StateTree, model: Any) -> list[Any]:
    """The leaves of a model; StructureError unless they are those that setup saw, as far as their description goes."""
    leaves = state._structure.flatten(model)
    for slot in state._slots:
        _check_parameter(slot, leaves[slot.places[0].leaf])
    return leaves


def _check_parameter(slot: Slot, x: Any) -> None:
    """Raise StructureError unless x is the array that setup saw, as far as its description goes."""
    if kind(x) == slot.kind and tuple(x.shape) == slot.param.shape and dtype_name(x) == slot.dtype:
        return
    got = f"a {kind(x)} array of shape {tuple(x.shape)} and dtype {dtype_name(x)}" if kind(x) else described(x)
    msg = (
        f"model at {shown(slot.path)}: the state was set up for a {slot.kind} array of shape {slot.param.shape} and dtype "
        f"{slot.dtype}, got {got}. Set up a new state for the changed model"
    )
    raise StructureError(msg)


def _run(work: Work, *, differentiable: bool) -> tuple[dict[int, Outcome], bool]:
    """The outcomes of all jobs, and whether they carry a graph."""
    if torch_if_loaded() is None or not any(kind(job.x) == "torch" for job in work.jobs.values()):
        return dict(zip(work.jobs, step(list(work.jobs.values())), strict=True)), False
    from ..engine import torch_graph

    graph = differentiable or torch_graph.wants_graph(work.jobs.values())
    with torch_graph.mode(graph=graph):
        jobs = work.jobs.values()
        return dict(zip(work.jobs, step(list(jobs)), strict=True)), graph


def _refuse_new_ties(jobs: dict[int, Job]) -> None:
    """Raise TieError if arrays that setup saw apart are now one, which would be written twice."""
    seen: dict[tuple[str, int], str] = {}
    for job in jobs.values():
        start = address(job.x)
        if start is not None and seen.setdefault(start, job.path) != job.path:
            msg = (
                f"{seen[start]!r} and {job.path!r} were two arrays at setup and are one now, so update_ would step it twice; "
                "set up a new state, which finds the tie"
            )
            raise TieError(msg)


def _entries(state: StateTree, outcomes: dict[int, Outcome], lease: Lease, *, consume: bool) -> list[Entry]:
    """The entries after a step. What was not stepped still shares its arrays with the old state, unless that is consumed."""
    new = []
    for i, entry in enumerate(state._entries):
        if i in outcomes:
            after = outcomes[i].state
            known = entry.numbers if _same_length(after, entry) else numbers_in(after)
            new.append(entry.replace(state=after, numbers=known, lease=lease))
        else:
            new.append(entry.replace(lease=lease) if consume else entry)
    if consume:
        for entry in state._entries:
            entry.lease.ended = True
    return new


def _same_length(after: Any, entry: Entry) -> bool:
    return len(numbers_in(after)) == len(entry.numbers)


def finished(new: Any, old: Any, *, graph: bool) -> Any:
    """A new value as the model is to hold it: a leaf of old's class, if it carries no graph."""
    if graph or kind(new) != "torch":
        return new
    from ..engine.torch_graph import as_parameter

    return as_parameter(new, old)


def retie(slot: Slot, leaves: list[Any]) -> None:
    """Places that hold the array itself hold the same object again, as at setup."""
    first: dict[Any, Any] = {}
    for place in slot.places:
        leaves[place.leaf] = first.setdefault(place.permutation, leaves[place.leaf])


def _write(x: Any, value: Any) -> bool:
    """Write value into the memory of x if that is allowed."""
    if kind(x) == "numpy":
        if not x.flags.writeable:
            return False
        x[...] = value
    else:
        x.copy_(value)
    return True


def no_grad() -> Any:
    """The context in which torch records nothing."""
    torch = torch_if_loaded()
    return nullcontext() if torch is None else torch.no_grad()
