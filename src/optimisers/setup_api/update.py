"""``update``: one step as a pure function; ``update_``: the same in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter, setitem
from typing import Any, NamedTuple

import numpy as np

from ..arrays import dtype_name, is_compiling, is_plain, kind, plain, share_memory, torch_if_loaded, without_autocast
from ..engine.groups.states import GroupedState
from ..engine.groups.step import bump_versions
from ..engine.memory.writes import Write
from ..engine.tree_step import Given, Stepped, step_tree
from ..errors import ArgumentError, StructureError, UnfinishedStepError, described
from ..tree.destructure import permuted
from ..tree.entry import device_of
from ..tree.gradients import given_gradients, gradient_of, refuse_untrained
from ..tree.leaves import Slot, refuse_inference, refuse_unsteppable
from ..tree.paths import shown
from ..tree.sharding import Sharding, is_sharded, local, local_gradient, local_parameter, mapped
from ..tree.state import StateTree, check_alive, hand_over
from ..tree.structure import is_module
from ..tree.ties import refuse_cut, still_tied

_REQUIRES_GRAD = attrgetter("requires_grad")


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
        from ..engine.torch_compile import update_traced

        return update_traced(_update, state, model, grads, differentiable=differentiable)
    return _update(state, model, grads, differentiable=differentiable)


def _update(state: StateTree, model: Any, grads: Any, *, differentiable: bool) -> tuple[StateTree, Any]:
    work = prepare(state, model, grads, graph=differentiable)
    restore = grad_mode_restored()
    try:
        with without_autocast():
            stepped = step_tree(Given(state, work.xs, work.dxs, work.admitted, in_place=False, differentiable=differentiable))
    except BaseException:
        restore()
        raise
    leaves = list(work.leaves)
    grouped, slots = stepped.state._grouped, state._slots
    if (
        isinstance(grouped, GroupedState)
        and grouped.single
        and not stepped.graph
        and _are_plain([leaves[i] for i in grouped.first])
    ):
        for i, value in stepped.values.items():
            leaves[grouped.first[i]] = value
        return stepped.state, state._structure.unflatten(model, leaves, work.spec)
    finish = finisher(graph=stepped.graph)
    for i, value in stepped.values.items():
        places = slots[i].places
        for leaf, permutation in places:
            leaves[leaf] = finish(value if permutation is None else permuted(value, permutation), leaves[leaf])
        if len(places) > 1:
            retie(slots[i], leaves)
    return stepped.state, state._structure.unflatten(model, leaves)


def update_(state: StateTree, model: Any, grads: Any = None) -> tuple[StateTree, Any]:
    """One step in place: the same result as `update`, re-using the memory of state and model.

    The state given is consumed, with every state that shares its arrays; go on with the one returned. Gradients are never
    written to. For a ``torch.nn.Module`` grads may be left out: the step then takes each parameter's ``.grad``. Carries no
    graph. Raises as `update` does, and then has changed nothing. An interrupt while it writes is raised when all is written,
    and `UnfinishedStepError` where that could not be: in both cases the state given is the one after the step.
    """
    if is_compiling():
        from ..engine.torch_compile import update_untraced

        reason = "update_ writes to memory that torch.compile manages itself; inside torch.compile use update"
        return update_untraced(update_, reason, state, model, grads)
    module = is_module(model)
    work = prepare(state, model, grads, from_module=grads is None and module, in_place=True)
    stepped: Stepped | None = None
    left: set[int] = set()
    restore = grad_mode_restored()
    try:
        with no_grad(), without_autocast():
            stepped = step_tree(Given(state, work.xs, work.dxs, work.admitted, in_place=True))
            leaves = _written(state, work, stepped, left)
            result = stepped.state, state._structure.unflatten(model, leaves) if left and not module else model
            stepped.writes.run()
        return result  # noqa: TRY300 (until it is returned, an interrupt would lose it)
    except BaseException as error:
        restore()
        if stepped is None or not stepped.writes.begun:
            raise
        _finish(state, stepped, left, error)
        if not isinstance(error, Exception):
            raise
    return result


def _written(state: StateTree, work: Work, stepped: Stepped, left: set[int]) -> list[Any]:
    """The leaves after a step in place, of which values are yet to be written; slots with one that cannot be are noted."""
    leaves = list(work.leaves)
    for i, new in stepped.values.items():
        written: list[Any] = []
        for place in state._slots[i].places:
            x = local(leaves[place.leaf])
            if any(share_memory(x, other) for other in written):
                continue
            value = permuted(new, place.permutation)
            if value is x:
                written.append(x)
            elif kind(x) == "numpy" and not x.flags.writeable:
                left.add(i)
                leaves[place.leaf] = value
            else:
                write = Write(partial(setitem, x, ..., value) if kind(x) == "numpy" else partial(x.copy_, value), [i])
                # What is not known to us comes first: if it raises, nothing has been written.
                stepped.writes.ready.insert(len(stepped.writes.ready) if is_plain(x) else 0, write)
                written.append(x)
    if state._plan.sharded:  # a DTensor has a version besides that of its part
        moved = [slot for slot, dx in zip(state._slots, work.dxs, strict=True) if slot.sharding is not None and dx is not None]
        stepped.writes.note(bump_versions(), [work.leaves[place.leaf] for slot in moved for place in slot.places])
    return leaves


def _finish(state: StateTree, stepped: Stepped, left: set[int], error: BaseException) -> None:
    """Bring a step to its end that was stopped among its writes. The state given becomes the new one if none is returned.

    Raises UnfinishedStepError if some parameters cannot be written.
    """
    with no_grad(), without_autocast():
        missing, reason = stepped.writes.finish()
        if not missing and isinstance(error, Exception):
            return
        lost = missing | left  # new arrays are lost with what would have been returned
        hand_over(state, stepped.without(lost) if lost else stepped.state)
    if reason is not None:
        paths = [shown(state._slots[i].path) for i in sorted(lost)]
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        msg = (
            f"update_: {', '.join(paths[:5])}{more} could not be stepped, and everything else was: {type(reason).__name__}: "
            f"{reason}. The state given is the one after this step now, in which they are as if they had had no gradient"
        )
        raise UnfinishedStepError(msg) from reason


class Work(NamedTuple):
    """What a step is about to do."""

    leaves: list[Any]
    xs: list[Any]
    """For each slot the parameter, of a DTensor the part on this rank."""
    dxs: list[Any]
    """For each slot the gradient, None if it is not to be stepped."""
    admitted: list[bool]
    """For each group that the state holds whether its arrays are as they were when it was made."""
    spec: Any
    """What puts other leaves in their places."""


def prepare(
    state: StateTree, model: Any, grads: Any, *, from_module: bool = False, in_place: bool = False, graph: bool = False
) -> Work:
    """The parameters and gradients of all slots, checked; with ``in_place`` also whether parameters can be written."""
    if not isinstance(state, StateTree):
        hint = "; the order is update(state, model, grads)" if isinstance(model, StateTree) else ""
        msg = f"update: expected the state that setup returned, got {described(state)}{hint}"
        raise ArgumentError(msg)
    if isinstance(model, StateTree) or isinstance(grads, StateTree):
        msg = "update: a state stands where the model or the gradient should; the order is update(state, model, grads)"
        raise ArgumentError(msg)
    check_alive(state)
    structure, slots = state._structure, state._slots
    leaves, spec = structure.taken_apart(model)
    given = [leaf.grad for leaf in leaves] if from_module else given_gradients(structure, model, grads)
    refuse_untrained(state._plan, leaves, given)
    for i in state._plan.tied:
        _check_tie(slots[i], leaves, structure.paths)
    parts = leaves
    if state._plan.sharded:
        parts = mapped(leaves, state._plan.sharded, partial(local_parameter, graph=graph))
        given = mapped(given, state._plan.sharded, local_gradient)
    grouped = state._grouped
    first = grouped.first if isinstance(grouped, GroupedState) else [slot.places[0].leaf for slot in slots]
    xs = [parts[leaf] for leaf in first]
    dxs = [given[leaf] for leaf in first]
    if not isinstance(grouped, GroupedState):
        _check(state, range(len(slots)), xs, dxs, given, in_place=in_place)
        return Work(leaves, xs, dxs, [], spec)
    for i in grouped.idle:
        dxs[i] = None
    _check(state, grouped.checked_singly, xs, dxs, given, in_place=in_place)
    admitted = []
    for group_state in grouped.group_states:
        group = group_state.group
        alike = group.admits([xs[i] for i in group.slots], [dxs[i] for i in group.slots])
        admitted.append(alike)
        if not alike:
            _check(state, group.slots, xs, dxs, given, in_place=in_place)
    return Work(leaves, xs, dxs, admitted, spec)


def _check_tie(slot: Slot, leaves: list[Any], paths: Sequence[str]) -> None:
    """Raise TieError unless all places hold the array that the first one holds."""
    first, *others = slot.places
    for place in others:
        if not still_tied(leaves[first.leaf], leaves[place.leaf], place.permutation):
            refuse_cut(paths[first.leaf], paths[place.leaf])


def _check(state: StateTree, chosen: Iterable[int], xs: list[Any], dxs: list[Any], given: list[Any], *, in_place: bool) -> None:
    """Check parameters and gradients of some slots one by one, add the gradients of tied places, take arrays as plain ones."""
    for i in chosen:
        slot, head = state._slots[i], state._by_kind.at(i)
        _check_parameter(slot, xs[i])
        if head.frozen or head.rule is None:
            dxs[i] = None
            continue
        dxs[i] = gradient_of(slot, xs[i], given, state._structure.paths)
        if dxs[i] is None:
            continue
        _check_device(slot, state, i, xs[i])
        refuse_unsteppable(xs[i], slot.path)
        if in_place:
            refuse_inference(xs[i], slot.path)
        if slot.kind == "numpy":
            xs[i] = plain(xs[i])


def _check_device(slot: Slot, state: StateTree, i: int, x: Any) -> None:
    """Raise StructureError if the parameter was moved since setup, and its state was not."""
    if kind(x) != "torch":
        return
    grouped = state._grouped is not None and state._grouped.holds(i)
    if grouped and x.is_cpu:
        return
    device = device_of(state._entries[i].state if grouped else state._by_kind.at(i).state)
    if device is not None and device != x.device:
        remedy = f"move the state as well, state = opt.to(state, device={str(x.device)!r})"
        if device.type == "meta":
            remedy = "which holds no numbers; set up a new state now that the model has some, state = opt.setup(rule, model)"
        raise StructureError(f"model at {shown(slot.path)}: the parameter is on {x.device}, its state on {device}; {remedy}")


def checked_leaves(state: StateTree, model: Any) -> list[Any]:
    """The leaves of a model; StructureError unless they are those that setup saw, as far as their description goes."""
    leaves = state._structure.flatten(model)
    for slot in state._slots:
        x = leaves[slot.places[0].leaf]
        _check_parameter(slot, x if slot.sharding is None else local_parameter(x, slot.sharding, slot.path))
    return leaves


def _check_parameter(slot: Slot, x: Any) -> None:
    """Raise StructureError unless x is the array that setup saw, as far as its description goes."""
    shape = slot.param.shape if slot.sharding is None else slot.sharding.local_shape
    if kind(x) == slot.kind and tuple(x.shape) == shape and dtype_name(x) == slot.dtype:
        if slot.sharding is None:
            local_parameter(x, None, slot.path)
        return
    got = f"a {kind(x)} array of shape {tuple(x.shape)} and dtype {dtype_name(x)}" if kind(x) else described(x)
    msg = (
        f"model at {shown(slot.path)}: the state was set up for a {slot.kind} array of shape {shape} and dtype "
        f"{slot.dtype}, got {got}. Set up a new state for the changed model"
    )
    raise StructureError(msg)


def _are_plain(xs: list[Any]) -> bool:
    """Whether new values can stand in the place of these as they are: tensors that require no grad, or NumPy arrays."""
    torch = torch_if_loaded()
    kinds = set(map(type, xs))
    if torch is None or torch.Tensor not in kinds:
        return kinds <= {np.ndarray}
    return kinds == {torch.Tensor} and not any(map(_REQUIRES_GRAD, xs))


def finisher(*, graph: bool) -> Callable[[Any, Any], Any]:
    """What makes of (new value, old value) the new one as the model is to hold it: without a graph, a leaf of the old class."""
    if graph or torch_if_loaded() is None:
        return _as_array
    from ..engine.autograd import as_parameter

    return lambda new, old: as_parameter(_as_array(new, old), old)


def _as_array(new: Any, old: Any) -> Any:
    """A new value in the old one's class, if that is one of NumPy's or a DTensor."""
    if is_sharded(old) and not is_sharded(new):
        return Sharding(old).of_parts(new)
    return new if type(old) is np.ndarray or kind(old) != "numpy" else old.__array_wrap__(new)


def retie(slot: Slot, leaves: list[Any]) -> None:
    """Places that hold the array itself hold the same object again, as at setup."""
    first: dict[Any, Any] = {}
    for place in slot.places:
        leaves[place.leaf] = first.setdefault(place.permutation, leaves[place.leaf])


def grad_mode_restored() -> Callable[[], None]:
    """What sets torch's grad mode to what it is now, which an interrupt within a context of torch's may lose."""
    torch = torch_if_loaded()
    return (lambda: None) if torch is None else partial(torch._C._set_grad_enabled, torch.is_grad_enabled())


def no_grad() -> Any:
    """The context in which torch records nothing."""
    torch = torch_if_loaded()
    return nullcontext() if torch is None else torch.no_grad()
