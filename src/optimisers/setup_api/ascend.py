"""``ascend``: the perturbed model at which sharpness-aware minimisation takes its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arrays import Array, abs2, absolute, norm, scalar_like, stack, where
from ..errors import ArgumentError
from ..rules import MeasuredRule
from ..rules._base import State
from ..rules._fields import NON_NEGATIVE, bounded
from ..tree.structure import is_module, named_parameters
from .setup import setup
from .update import update


@dataclass(frozen=True)
class Ascent(MeasuredRule):
    """A step of length rho up the gradient, by one norm over all arrays."""

    rho: Any = bounded(0.05, range=NON_NEGATIVE)
    adaptive: bool = False

    @property
    def scope(self) -> str:
        return "ascend"

    def init(self, x: Array) -> State:
        return None

    def measure(self, state: State, x: Array, dx: Array) -> tuple[Array, ...]:
        return (norm(absolute(x) * dx if self.adaptive else dx),)

    def combine(self, measures: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        return (norm(stack([length for (length,) in measures])),)

    def apply_measured(self, state: State, x: Array, dx: Array, measure: tuple[Array, ...]) -> tuple[State, Array]:
        (length,) = measure
        factor = where(length > 0, -self.rho / where(length > 0, length, 1.0), 0.0)
        return state, scalar_like(factor, dx) * (abs2(x) * dx if self.adaptive else dx)


def ascend(model: Any, grads: Any = None, rho: float = 0.05, *, adaptive: bool = False) -> Any:
    """The model a step of length rho up the gradient, where SAM takes the gradient of its real step; nothing is changed.

    ``x + rho dx / norm(dx)``, with one norm over all arrays (Foret et al. 2021, https://arxiv.org/abs/2010.01412); if adaptive
    ``x + rho x**2 dx / norm(x dx)`` (ASAM: Kwon et al. 2021, https://arxiv.org/abs/2102.11600).

    Args:
        model: a tree as `setup` takes it. For a ``torch.nn.Module`` the result is a dict of its parameters by name, as
            ``torch.func.functional_call`` takes it.
        grads: as `update` takes them: arrays without a gradient stay where they are and do not count, tied ones count once.
            For a module they may be left out: its parameters' ``.grad``.
        rho: length of the step, >= 0; of the scaled one if adaptive.
        adaptive: scale the step by the size of each element.

    Raises as `setup` and `update` do; ArgumentError if there are no gradients and the model is no module.
    """
    if is_module(model):
        params = {name: x for name, x, _ in named_parameters(model)}
        grads = {name: x.grad for name, x in params.items()} if grads is None else grads
        model = params
    elif grads is None:
        msg = "ascend: give the gradients, ascend(model, grads); only a torch.nn.Module has its own"
        raise ArgumentError(msg)
    _, ahead = update(setup(Ascent(rho, adaptive), model), model, grads)
    return ahead
