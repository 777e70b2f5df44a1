"""Forward-mode derivatives of a step: equal to those of reverse mode, also at zero gradients and through dual tensors."""

import pytest
import torch
from torch.autograd import forward_ad

import optimisers as opt
from optimisers.rules._base import walk
from table import cases

ROWS = [
    pytest.param(row, rule, id=name)
    for name, row, rule in cases()
    if not row.host_counter and all(r.dtype == "float64" for r in walk(rule) if isinstance(r, opt.MixedPrecision))
]


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tangent_of(f, x, tangent):
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent
    return torch.zeros(()) if found is None else found


@pytest.mark.parametrize("where", ["somewhere", "everywhere"])
@pytest.mark.parametrize(("row", "rule"), ROWS)
def test_both_modes_agree_where_gradients_are_zero(row, rule, where):
    x, weight, tangent = random(0, 3, 4), random(1, 3, 4), random(2, 3, 4)
    zero = {"somewhere": [0, 1, 0, 1], "everywhere": [0, 0, 0, 0]}[where]
    g = random(3, 3, 4) * torch.tensor(zero)

    def loss(g):
        state, model = opt.setup(rule, {"x": x}), {"x": x}
        for _ in range(2):
            state, model = opt.update(state, model, {"x": g})
        return (weight * model["x"] + model["x"] ** 2).sum()

    slopes = torch.func.grad(loss)(g)
    assert slopes.isfinite().all()
    expected = (slopes * tangent).sum()
    _, forward = torch.func.jvp(loss, (g,), (tangent,))
    torch.testing.assert_close(forward, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(tangent_of(loss, g, tangent).double(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", [opt.Adam(0.1), opt.RMSProp(0.1), opt.Apollo(0.1)], ids=repr)
def test_whole_jacobians_and_second_derivatives_agree(rule):
    x = random(0, 3, 4)

    def stepped(g):
        state, model = opt.setup(rule, {"x": x}), {"x": x}
        for _ in range(2):
            state, model = opt.update(state, model, {"x": g})
        return model["x"]

    g = random(1, 3, 4) * torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(torch.func.jacfwd(stepped)(g), torch.func.jacrev(stepped)(g))
    curved = lambda g: stepped(g).square().sum()  # noqa: E731
    forward_over_reverse = torch.func.jacfwd(torch.func.grad(curved))(g)
    assert forward_over_reverse.isfinite().all()
    torch.testing.assert_close(forward_over_reverse, torch.func.jacrev(torch.func.grad(curved))(g))


@pytest.mark.parametrize("mode", ["1", "0", "rules"])
@pytest.mark.parametrize("size", [3, 6000])
@pytest.mark.parametrize("step", [opt.update, opt.update_])
@pytest.mark.parametrize("of", ["gradient", "parameter"])
@pytest.mark.parametrize("wrap", [lambda x: x, torch.nn.Parameter], ids=["tensor", "Parameter"])
def test_tangents_pass_through_a_step_of_any_size(of, step, size, wrap, mode, switch):
    """Loops compute values and know nothing of tangents, so that they would be lost, or old ones kept."""
    switch(mode)
    rule = opt.OptimiserChain(opt.WeightDecay(0.5), opt.Momentum(0.1, 0.9))
    x, first, g, tangent = (random(seed, size) for seed in range(4))
    model = {"x": wrap(x.clone())}
    state, model = step(opt.setup(rule, model), model, {"x": first})
    before, moment = model["x"].detach().clone(), state["x"].state[1].clone()
    with forward_ad.dual_level():
        if of == "gradient":
            given, model = {"x": forward_ad.make_dual(g, tangent.clone())}, {"x": model["x"]}
        else:
            given, model = {"x": g}, {"x": forward_ad.make_dual(model["x"].detach().clone(), tangent.clone())}
        state, model = step(state, model, given)
        new, slope = forward_ad.unpack_dual(model["x"])
        kept, kept_slope = forward_ad.unpack_dual(state["x"].state[1])
        d_moment = 0.1 * tangent * (1.0 if of == "gradient" else 0.5)
        torch.testing.assert_close(kept, 0.9 * moment + 0.1 * (g + 0.5 * before))
        torch.testing.assert_close(kept_slope, d_moment)
        torch.testing.assert_close(new, before - kept)
        torch.testing.assert_close(slope, -d_moment + (0.0 if of == "gradient" else tangent))
    state, model = step(state, {"x": model["x"].detach()}, {"x": g})  # and loops go on
    assert model["x"].isfinite().all()


def test_a_learning_rate_may_have_a_tangent():
    model, g = {"x": random(0, 6000)}, random(1, 6000)
    with forward_ad.dual_level():
        eta = forward_ad.make_dual(torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
        state = opt.setup(opt.Descent(eta), model)
        _, stepped = opt.update(state, model, {"x": g})
        torch.testing.assert_close(forward_ad.unpack_dual(stepped["x"]).tangent, -g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [3, 6000])
def test_values_are_the_same_bits_inside_a_level(dtype, size, switch):
    switch("rules")
    model = {"x": random(0, size).to(dtype)}
    grads = {"x": (random(1, size) * (random(2, size) > 0)).to(dtype)}
    _, plain = opt.update(opt.setup(opt.Adam(0.1), model), model, grads)
    with forward_ad.dual_level():
        _, inside = opt.update(opt.setup(opt.Adam(0.1), model), model, grads)
        assert forward_ad.unpack_dual(inside["x"]).tangent is None
    assert torch.equal(inside["x"], plain["x"])
