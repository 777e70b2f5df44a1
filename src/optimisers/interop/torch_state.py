"""The state of a ``torch.optim`` optimizer as a state tree, in the middle of training, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, StructureError, described
from ..rules import (
    AdaGrad,
    Adam,
    AdamW,
    Descent,
    Momentum,
    Muon,
    Nesterov,
    NewtonSchulz,
    OptimiserChain,
    RMSProp,
    WeightDecay,
)
from ..rules._adjust import with_eta
from ..rules._base import AbstractRule
from ..setup_api.setup import setup
from ..tree.entry import Entry, numbers_in
from ..tree.param import Param
from ..tree.state import StateTree, check_alive, rebuilt
from ..tree.structure import ModuleStructure
from ._named import given

Group = Mapping[str, Any]


class Meeting(NamedTuple):
    """Where a rule and a torch optimizer have one formula."""

    refuse: Callable[[Group], str | None]
    """An option of the group that has no counterpart."""
    rule: Callable[[Group, float], AbstractRule]
    """(group, learning rate) -> the rule, a weight decay that is added to the gradient apart."""
    taken: Callable[[Any, Mapping[str, Any]], Any]
    """(rule, torch's state of a parameter) -> the rule's state, or None if torch has none yet."""


class Way(NamedTuple):
    """How a rule goes to torch."""

    optimizer: type[torch.optim.Optimizer]
    options: Callable[[Any], dict[str, Any]]
    """rule -> the entries of its parameter group."""
    state: Callable[[Any, Any], dict[str, Any]]
    """(rule, its state) -> torch's state of the parameter."""


def from_torch(optimizer: torch.optim.Optimizer, model: Any) -> StateTree:
    """The state tree with which training goes on as ``optimizer`` would have gone on.

    Args:
        optimizer: a ``torch.optim`` Adam, AdamW, SGD, RMSprop, Adagrad or Muon, before or after any number of steps; it is
            left as it is, and its arrays are copied.
        model: the module whose parameters it steps (or its named parameters). Parameters that are not the optimizer's are not
            trained.

    The rule is AdamW, Adam, Momentum, Nesterov, Descent, RMSProp, AdaGrad or Muon, behind a WeightDecay where torch adds
    the decay to the gradient. Learning rates stand where a scheduler has brought them; those at setup are the group's
    ``initial_lr``. Momentum and Nesterov keep their momentum times the learning rate, so they agree with SGD until the
    learning rate changes, and then follow their own formula.

    Raises ArgumentError, naming group and option, where no rule has the formula: ``amsgrad``, ``maximize``, ``dampening``,
    RMSprop's ``momentum``, Adagrad's ``lr_decay``, complex parameters of the Adam family, one-column matrices under Muon;
    StructureError if the optimizer steps a parameter that the model does not have.
    """
    meeting = _MEETINGS.get(type(optimizer))
    if meeting is None:
        known = ", ".join(kind.__name__ for kind in _MEETINGS)
        msg = f"from_torch takes a torch.optim optimizer, one of {known}; got {described(optimizer)}"
        raise ArgumentError(msg)
    groups = {id(x): (i, group) for i, group in enumerate(optimizer.param_groups) for x in group["params"]}
    rules = [_with_decay(type(optimizer), group, meeting.rule) for group in optimizer.param_groups]
    seen: dict[str, Any] = {}

    def choose(param: Param) -> AbstractRule | None:
        if id(param.array) not in groups:
            return None
        i, group = groups[id(param.array)]
        trouble = _refused_array(type(optimizer), param.array) or meeting.refuse(group)
        if trouble or group.get("maximize"):
            what = f"{type(optimizer).__name__} with {trouble or 'maximize=True'}"
            msg = f"from_torch: no rule has the formula of {what} (param_groups[{i}], parameter {param.path!r})"
            raise ArgumentError(msg)
        seen[param.path] = param.array
        return rules[i]

    tree = setup(choose, given(model).model)
    lost = len(groups) - len({id(x) for x in seen.values()})
    if lost:
        msg = f"from_torch: the optimizer steps {lost} parameters that the model does not have, or that do not require grad"
        raise StructureError(msg)
    entries = []
    for slot, entry in zip(tree._slots, tree._entries, strict=True):
        if entry.rule is None:
            entries.append(entry)
            continue
        x = seen[slot.path]
        group = groups[id(x)][1]
        entries.append(_continued(entry, group, optimizer.state.get(x, {}), meeting))
    return rebuilt(tree, entries)


def _with_decay(kind: type, group: Group, make: Callable[[Group, float], AbstractRule]) -> AbstractRule:
    rule = make(group, float(group.get("initial_lr", group["lr"])))
    decoupled = kind in {torch.optim.AdamW, torch.optim.Muon} or group.get("decoupled_weight_decay", False)
    decay = 0.0 if decoupled else float(group["weight_decay"])
    return OptimiserChain(WeightDecay(decay), rule) if decay else rule


def _continued(entry: Entry, group: Group, saved: Mapping[str, Any], meeting: Meeting) -> Entry:
    """The entry with the learning rate as it is now and the state that torch has."""
    rule: Any = with_eta(entry.rule, float(group["lr"]), entry.base)  # type: ignore[arg-type]
    if float(group["lr"]) == float(group.get("initial_lr", group["lr"])):
        rule = entry.rule
    inner = rule.rules[-1] if isinstance(rule, OptimiserChain) else rule
    start = entry.state[-1] if isinstance(rule, OptimiserChain) else entry.state
    taken = meeting.taken(inner, saved) if saved else None
    state = start if taken is None else taken
    if isinstance(rule, OptimiserChain):
        state = (None, state)
    return entry.replace(rule=rule, state=state, numbers=numbers_in(state))


def _like(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone()


# --- from torch ------------------------------------------------------------------------------------------------------------


def _refused_array(kind: type, x: torch.Tensor) -> str | None:
    if x.is_complex() and kind is not torch.optim.SGD:
        return "a complex parameter"  # torch squares real and imaginary parts apart, the rules take the magnitude
    if kind.__name__ == "Muon" and x.shape[1] == 1:
        return "a matrix of one column, which the rule Muon gives to its opt,"
    return None


def _adam_rule(group: Group, lr: float) -> AbstractRule:
    b1, b2 = (float(b) for b in group["betas"])
    if group.get("decoupled_weight_decay", False):
        return AdamW(lr, (b1, b2), float(group["weight_decay"]), group["eps"])
    return Adam(lr, (b1, b2), group["eps"])


def _adam_state(rule: Any, saved: Mapping[str, Any]) -> Any:
    t = int(saved["step"])
    return _like(saved["exp_avg"]), _like(saved["exp_avg_sq"]), tuple(b ** (t + 1) for b in rule.beta)


def _sgd_refused(group: Group) -> str | None:
    if not group["momentum"]:
        return None
    if group["dampening"]:
        return f"dampening={group['dampening']}"
    return None if group["lr"] else "lr=0, which loses the momentum, since the rules keep it times the learning rate,"


def _sgd_rule(group: Group, lr: float) -> AbstractRule:
    if not group["momentum"]:
        return Descent(lr)
    return (Nesterov if group["nesterov"] else Momentum)(lr, group["momentum"])


def _sgd_state(rule: Any, saved: Mapping[str, Any]) -> Any:
    buffer = saved.get("momentum_buffer")
    if isinstance(rule, Descent) or buffer is None:
        return None
    return buffer.detach() * (-rule.eta if isinstance(rule, Nesterov) else rule.eta)


def _muon_rule(group: Group, lr: float) -> AbstractRule:
    ns = NewtonSchulz(
        steps=group["ns_steps"],
        coefficients=(tuple(group["ns_coefficients"]),) * group["ns_steps"],
        epsilon=group["eps"],
        normaliser="clamp",
        dtype="bfloat16",  # whatever the parameter's dtype
    )
    scale = "moonlight" if group["adjust_lr_fn"] == "match_rms_adamw" else "jordan"
    decay = float(group["weight_decay"])
    return Muon(AdamW(lr, lambda_=decay), lr, group["momentum"], decay, ns=ns, scale=scale, nesterov=bool(group["nesterov"]))


def _amsgrad(group: Group) -> str | None:
    return "amsgrad=True" if group["amsgrad"] else None


_MEETINGS: dict[type, Meeting] = {
    torch.optim.Adam: Meeting(_amsgrad, _adam_rule, _adam_state),
    torch.optim.AdamW: Meeting(
        _amsgrad, lambda group, lr: _adam_rule({**group, "decoupled_weight_decay": True}, lr), _adam_state
    ),
    torch.optim.SGD: Meeting(_sgd_refused, _sgd_rule, _sgd_state),
    torch.optim.RMSprop: Meeting(
        lambda group: f"momentum={group['momentum']}" if group["momentum"] else None,
        lambda group, lr: RMSProp(lr, group["alpha"], group["eps"], bool(group["centered"])),
        lambda rule, saved: (_like(saved["square_avg"]), _like(saved["grad_avg"]) if rule.centred else None),
    ),
    torch.optim.Adagrad: Meeting(
        lambda group: f"lr_decay={group['lr_decay']}" if group["lr_decay"] else None,
        lambda group, lr: AdaGrad(lr, group["eps"]),
        lambda _rule, saved: _like(saved["sum"]),
    ),
}
if hasattr(torch.optim, "Muon"):  # newer than the oldest torch that is supported
    _MEETINGS[torch.optim.Muon] = Meeting(lambda _group: None, _muon_rule, lambda _rule, saved: _like(saved["momentum_buffer"]))


# --- to torch --------------------------------------------------------------------------------------------------------------


def to_torch(state: StateTree, model: Any) -> torch.optim.Optimizer:
    """The ``torch.optim`` optimizer with which training goes on as the state would have gone on.

    Args:
        state: of a module, or of named parameters, whose trained parameters all have rules of one torch class: AdamW, Adam,
            Descent, Momentum, Nesterov, RMSProp, AdaGrad or Muon (with torch's options), alone or in
            ``OptimiserChain(WeightDecay(...), rule)``. It is left as it is, and its arrays are copied.
        model: the module, or its named parameters.

    Raises ArgumentError, naming the parameter, for rules that ``torch.optim`` does not have.
    """
    check_alive(state)
    if not isinstance(state._structure, ModuleStructure):
        msg = "to_torch: the state was set up for a tree; it needs one that was set up for the module, setup(rule, module)"
        raise ArgumentError(msg)
    leaves = state._structure.flatten(given(model).model)
    groups: dict[Any, dict[str, Any]] = {}
    kinds: dict[type, str] = {}
    states = []
    for slot, entry in zip(state._slots, state._entries, strict=True):
        if entry.rule is None or entry.base is None or entry.frozen:
            continue
        x = leaves[slot.places[0].leaf]
        decay, rule = _parts(entry.rule.unresolved())
        way = _WAYS.get(type(rule))
        trouble = way is None or _unlike_torch(rule, x, decay)
        if way is None or trouble:
            hint = f" ({trouble})" if isinstance(trouble, str) else ""
            msg = f"to_torch: torch.optim has no optimizer with the formula of {entry.rule!r}, the rule of {slot.path!r}{hint}"
            raise ArgumentError(msg)
        kinds.setdefault(way.optimizer, slot.path)
        inner = entry.state[-1] if isinstance(entry.rule, OptimiserChain) else entry.state
        states.append((x, way.state(rule, inner)))
        options = way.options(rule)
        if decay:
            options["weight_decay"] = decay
        at_setup = getattr(_parts(entry.base)[1], "eta", rule.eta)
        if at_setup != rule.eta:
            options["initial_lr"] = at_setup
        key = (entry.rule.unresolved(), at_setup)
        groups.setdefault(key, {"params": [], **options})["params"].append((slot.path, x))
    if len(kinds) != 1:
        listed = ", ".join(f"{kind.__name__} for {path!r}" for kind, path in kinds.items())
        msg = (
            f"to_torch: one torch optimizer has one formula, and this state needs {listed or 'none, since nothing is trained'}"
        )
        raise ArgumentError(msg)
    make: Any = next(iter(kinds))
    optimizer: torch.optim.Optimizer = make(list(groups.values()))
    for x, tensors in states:
        optimizer.state[x] = tensors
    return optimizer


def _parts(rule: AbstractRule) -> tuple[float, Any]:
    """(weight decay that is added to the gradient, rule)."""
    if isinstance(rule, OptimiserChain):
        if len(rule.rules) == 1:
            return 0.0, rule.rules[0]
        if len(rule.rules) == 2 and isinstance(rule.rules[0], WeightDecay):
            return rule.rules[0].lambda_, rule.rules[1]
    return 0.0, rule


def _unlike_torch(rule: Any, x: torch.Tensor, decay: float) -> str | None:
    if x.is_complex() and not isinstance(rule, (Descent, Momentum, Nesterov)):
        return "a complex parameter, of which torch squares real and imaginary part apart"
    if isinstance(rule, (Momentum, Nesterov)) and rule.eta == 0:
        return "a learning rate of 0, by which the momentum would have to be divided"
    if isinstance(rule, AdamW) and not rule.couple and rule.lambda_:
        return "couple=False"
    if isinstance(rule, (AdamW, Muon)) and decay:
        return "two kinds of weight decay"
    if isinstance(rule, Muon):
        like = Muon(rule.opt, rule.eta, rule.mu, rule.lambda_, ns=rule.ns, scale=rule.scale, nesterov=rule.nesterov)
        if rule != like or rule.scale not in {"jordan", "moonlight"}:
            return "options that torch.optim.Muon does not have"
        if x.ndim != 2 or x.shape[1] == 1:
            return "not a matrix"
        if rule.ns.normaliser != "clamp" or rule.ns.dtype != "bfloat16" or len(set(rule.ns.triples())) != 1:
            return "another iteration: torch's is NewtonSchulz(normaliser='clamp', dtype='bfloat16')"
    return None


def _steps(rule: Any, powers: tuple[float, float]) -> torch.Tensor:
    """The number of steps taken, from the powers beta**(t + 1) that the state holds."""
    counts = [math.log(power) / math.log(b) - 1 for b, power in zip(rule.beta, powers, strict=True) if b > 0 and power > 0]
    if counts:
        return torch.tensor(float(round(max(counts))))
    # Both betas are 0, or their powers have long underflown: no correction is left.
    return torch.tensor(1.0 if not any(rule.beta) else float(2**24))


def _adam_exported(rule: Any, state: Any) -> dict[str, Any]:
    m, v, powers = state
    return {"step": _steps(rule, powers), "exp_avg": _like(m), "exp_avg_sq": _like(v)}


def _muon_options(rule: Muon) -> dict[str, Any]:
    return {
        "lr": rule.eta, "weight_decay": rule.lambda_, "momentum": rule.mu, "nesterov": rule.nesterov,
        "ns_coefficients": rule.ns.triples()[0], "eps": rule.ns.epsilon, "ns_steps": rule.ns.steps,
        "adjust_lr_fn": "match_rms_adamw" if rule.scale == "moonlight" else "original",
    }  # fmt: skip


_WAYS: dict[type, Way] = {
    Adam: Way(torch.optim.Adam, lambda r: {"lr": r.eta, "betas": r.beta, "eps": r.epsilon}, _adam_exported),
    AdamW: Way(
        torch.optim.AdamW,
        lambda r: {"lr": r.eta, "betas": r.beta, "eps": r.epsilon, "weight_decay": r.lambda_},
        _adam_exported,
    ),
    Descent: Way(torch.optim.SGD, lambda r: {"lr": r.eta}, lambda _r, _state: {}),
    Momentum: Way(
        torch.optim.SGD,
        lambda r: {"lr": r.eta, "momentum": r.rho},
        lambda r, state: {"momentum_buffer": state.detach() / r.eta},
    ),
    Nesterov: Way(
        torch.optim.SGD,
        lambda r: {"lr": r.eta, "momentum": r.rho, "nesterov": r.rho > 0},
        lambda r, state: {"momentum_buffer": state.detach() / -r.eta},
    ),
    RMSProp: Way(
        torch.optim.RMSprop,
        lambda r: {"lr": r.eta, "alpha": r.rho, "eps": r.epsilon, "centered": r.centred},
        lambda r, state: {
            "step": torch.tensor(0.0),
            "square_avg": _like(state[0]),
            **({"grad_avg": _like(state[1])} if r.centred else {}),
        },
    ),
    AdaGrad: Way(
        torch.optim.Adagrad,
        lambda r: {"lr": r.eta, "eps": r.epsilon},
        lambda _r, state: {"step": torch.tensor(0.0), "sum": _like(state)},
    ),
}
if hasattr(torch.optim, "Muon"):
    _WAYS[Muon] = Way(torch.optim.Muon, _muon_options, lambda _r, state: {"momentum_buffer": _like(state)})
