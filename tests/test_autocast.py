"""``torch.autocast`` is for the forward pass: a step under it is the step without it."""

from dataclasses import dataclass

import pytest

import optimisers as opt

torch = pytest.importorskip("torch")


@dataclass(frozen=True)
class OwnProduct(opt.AbstractRule):
    """A user's rule with a matrix product."""

    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return state, 0.1 * (dx @ dx.mT @ dx)


RULES = [opt.Muon(), opt.Orthogonalise(), opt.Apollo(), opt.MixedPrecision(opt.Muon()), OwnProduct(), opt.AdamW()]


def arrays(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(24, 80, generator=generator), "b": torch.randn(24, 24, generator=generator)}


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_step_does_not_depend_on_autocast(rule):
    model, grads = arrays(0), arrays(1)
    state = opt.setup(rule, model)
    _, plain = opt.update(state, model, grads)
    with autocast():
        assert (model["w"] @ model["w"].mT).dtype == torch.bfloat16
        _, under = opt.update(opt.setup(rule, model), model, grads)
        _, in_place = opt.update_(opt.setup(rule, model), {name: x.clone() for name, x in model.items()}, grads)
    for name in model:
        assert torch.equal(plain[name], under[name])
        assert torch.equal(plain[name], in_place[name])


def test_orthogonalise_and_metrics_do_not_depend_on_autocast():
    model, grads = arrays(0), arrays(1)
    state = opt.setup(opt.Muon(), model)
    plain, measured = opt.orthogonalise(model["w"]), opt.metrics(state, model, grads)
    with autocast():
        assert torch.equal(opt.orthogonalise(model["w"]), plain)
        assert opt.metrics(state, model, grads) == measured


def test_derivatives_through_a_step_do_not_depend_on_autocast():
    def gradient():
        model = {"w": arrays(0)["w"].double().requires_grad_()}
        state = opt.setup(opt.Muon(), model)
        grads = {"w": model["w"] ** 2}
        _, new = opt.update(state, model, grads, differentiable=True)
        return torch.autograd.grad(new["w"].square().sum(), model["w"])[0]

    plain = gradient()
    with autocast():
        assert torch.equal(gradient(), plain)


def test_the_callers_autocast_goes_on_after_the_step():
    model, grads = arrays(0), arrays(1)
    state = opt.setup(opt.Muon(), model)
    with autocast():
        opt.update(state, model, grads)
        assert (model["w"] @ model["w"].mT).dtype == torch.bfloat16
