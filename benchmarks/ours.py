"""This library's sides. Nothing here imports torch."""

import itertools
from typing import Any

import optimisers as opt
from measuring import Step

ETA, DECAY = 1e-3, 0.1


def adamw() -> opt.AbstractRule:
    return opt.AdamW(ETA, lambda_=DECAY)


def chain() -> opt.AbstractRule:
    return opt.OptimiserChain(opt.ClipGrad(1.0), opt.SignDecay(1e-4), opt.WeightDecay(1e-4), adamw())


def clip_norm() -> opt.AbstractRule:
    """Checks before it writes, since a norm may not be finite."""
    return opt.OptimiserChain(opt.ClipNorm(1.0), adamw())


def clip_global_norm() -> opt.AbstractRule:
    return opt.OptimiserChain(opt.ClipGlobalNorm(1.0), adamw())


CHAINS = {f.__name__: f for f in (adamw, chain, clip_norm, clip_global_norm)}


class InPlace:
    """``update_``, call after call."""

    def __init__(self, rule: opt.AbstractRule, model: Any, grads: Any):
        self.model, self.grads = model, grads
        self.state = opt.setup(rule, model)

    def __call__(self):
        self.state, self.model = opt.update_(self.state, self.model, self.grads)


class Pure(InPlace):
    """``update``: nothing but the newest state and model is kept."""

    def __call__(self):
        self.state, self.model = opt.update(self.state, self.model, self.grads)


def in_place(rule: opt.AbstractRule, model: Any, grads: Any) -> Step:
    return InPlace(rule, model, grads)


def adjusted(rule: opt.AbstractRule, model: Any, grads: Any) -> Step:
    """`adjust`, then ``update_``, which is what a schedule by hand is."""
    step, turn = InPlace(rule, model, grads), itertools.count(1)

    def scheduled():
        step.state = opt.adjust(step.state, ETA / next(turn))
        step()

    return scheduled


def pure(rule: opt.AbstractRule, model: Any, grads: Any) -> Step:
    return Pure(rule, model, grads)
