"""Every other elementwise rule over GPT-2's arrays, beside torch's form of it, or another library's where torch has none."""

from functools import partial
from typing import Any, NamedTuple

import torch

import optimisers as opt
import ours
import peers
from cases import FOREACH, FUSED, OPTAX, OURS, case, gpt2_copy, of
from measuring import compare


class Form(NamedTuple):
    """A rule, what makes the same of other libraries, and the bounds that there are."""

    rule: opt.AbstractRule
    peers: dict[str, Any]
    bounds: dict[str, float]


def in_torch(rule: opt.AbstractRule, name: str, bounds: dict[str, float], **options: Any) -> Form:
    """torch.optim's form in the variants that are named; where it is only for information, the bound is infinite."""
    make = getattr(torch.optim, name)
    how = {FOREACH: {"foreach": True}, FUSED: {"fused": True}}
    return Form(rule, {key: partial(peers.by_torch, make, **options, **how[key]) for key in bounds}, bounds)


def elsewhere(rule: opt.AbstractRule, **forms: Any) -> Form:
    """For information."""
    return Form(rule, forms, {})


def of_optax(name: str, *arguments: Any, **options: Any):
    def make(model, grads):
        import optax

        return peers.by_optax(getattr(optax, name)(*arguments, **options), model, grads)

    return make


NONE = float("inf")
FORMS = {
    "Descent": in_torch(opt.Descent(1e-3), "SGD", {FUSED: 1.25}, lr=1e-3),
    "Momentum": in_torch(opt.Momentum(1e-3), "SGD", {FUSED: 1.25}, lr=1e-3, momentum=0.9),
    "Nesterov": in_torch(opt.Nesterov(1e-3), "SGD", {FUSED: 1.25}, lr=1e-3, momentum=0.9, nesterov=True),
    "AdaGrad": in_torch(opt.AdaGrad(1e-3), "Adagrad", {FUSED: 1.25}, lr=1e-3),
    "Adam": in_torch(opt.Adam(1e-3), "Adam", {FUSED: 1.10}, lr=1e-3),
    "AMSGrad": in_torch(opt.AMSGrad(1e-3), "Adam", {FOREACH: 0.3, FUSED: NONE}, lr=1e-3, amsgrad=True),
    "RMSProp": in_torch(opt.RMSProp(1e-3), "RMSprop", {FOREACH: 0.3}, lr=1e-3, alpha=0.9),
    "RAdam": in_torch(opt.RAdam(1e-3), "RAdam", {FOREACH: 0.3}, lr=1e-3),
    "NAdam": in_torch(opt.NAdam(1e-3), "NAdam", {FOREACH: 0.3}, lr=1e-3),
    "AdaMax": in_torch(opt.AdaMax(1e-3), "Adamax", {FOREACH: 0.3}, lr=1e-3),
    "AdaDelta": in_torch(opt.AdaDelta(), "Adadelta", {FOREACH: 0.3}, lr=1.0),
    "Rprop": in_torch(opt.Rprop(1e-3), "Rprop", {FOREACH: 0.3}, lr=1e-3),
    "OAdam": elsewhere(opt.OAdam(1e-3), **{OPTAX: of_optax("optimistic_adam_v2", 1e-3, b1=0.5, b2=0.9, nesterov=False)}),
    "AdaBelief": elsewhere(
        opt.AdaBelief(1e-3),
        pytorch_optimizer=partial(peers.by_pytorch_optimizer, "AdaBelief", lr=1e-3),
        **{OPTAX: of_optax("adabelief", 1e-3)},
    ),
    "Lion": elsewhere(
        opt.Lion(1e-4),
        pytorch_optimizer=partial(peers.by_pytorch_optimizer, "Lion", lr=1e-4),
        **{OPTAX: of_optax("lion", 1e-4, weight_decay=0.0)},
    ),
}


def measure(name, form, settings):
    model, grads = gpt2_copy()
    sides = {OURS: lambda: ours.in_place(form.rule, model, grads)}
    sides |= {peer: partial(make, model, grads) for peer, make in form.peers.items()}
    bounds = {peer: form.bounds.get(peer, NONE) for peer in form.peers}
    pairs = [of(f"GPT-2, {name}", OURS, peer, None if bound == NONE else bound) for peer, bound in bounds.items()]
    return compare(f"rules/{name}", sides, pairs, settings)


for _name, _form in FORMS.items():
    case(f"rules/{_name}", quick=_name in {"Momentum", "Adam", "RMSProp", "Lion"})(partial(measure, _name, _form))
