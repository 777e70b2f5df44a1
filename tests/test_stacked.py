"""Stackable rules on stacks: what they give is what each array gets alone."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made
from matrices import assert_alike, drawn, trained
from optimisers.arrays import share_memory
from optimisers.engine.tracks import stacks as stacked
from optimisers.engine.tracks.stacks import stackable_groups
from optimisers.rules._base import Together
from optimisers.rules._states import state_leaves
from table import cases, halving

both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])

RULES = {name: rule for name, _, rule in cases(law="stackable")} | {
    "Muon": opt.Muon(),
    "Muon, debiased": opt.Muon(scale="rms", momentum="ema_debiased"),
    "Muon, blocks": opt.Muon(blocks=2, layout="in_out", momentum="classic"),
    "Muon, other": opt.Muon(opt.OptimiserChain(opt.Orthogonalise(batch_dims=0), opt.Adam()), fallback=lambda x: x.ndim == 2),
    "NorMuon": opt.NorMuon(0.02, lambda_=0.1),
    "NorMuon, blocks": opt.NorMuon(0.02, scale="jordan", blocks=2, layout="in_out"),
    "Dion": opt.Dion(0.02, rank=2),
    "AdaMuon, blocks": opt.AdaMuon(0.02, signs=False, blocks=2),
    "Scion": opt.Scion(0.02, norm="columns"),
    "by hand": opt.OptimiserChain(opt.Momentum(1.0, 0.9), opt.Orthogonalise(), opt.WeightDecay(0.01), opt.Descent(0.02)),
    "measured before": opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.Muon()),
    "measured after": opt.OptimiserChain(opt.Muon(), opt.ClipGlobalNorm(1e-3), opt.ClipNorm(1e-3)),
    "skipping": opt.OptimiserChain(opt.SkipNonFinite(), opt.Muon(momentum="ema_debiased")),
    "gathering": opt.OptimiserChain(opt.AccumGrad(2), opt.Muon()),
    "scheduled": opt.Scheduled(opt.Muon(), eta=halving),
    "averaged": opt.Averaged(opt.OptimiserChain(opt.ClipNorm(0.5), opt.Muon()), 0.5),
    "in a master": opt.MixedPrecision(opt.OptimiserChain(opt.ClipNorm(0.5), opt.Muon()), "float64"),
    "all in a master": opt.MixedPrecision(opt.Muon(momentum="ema_debiased"), "float64"),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
TOLERANCES = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture
def stacks(monkeypatch, switch):
    """The sizes of the stacks that the rules themselves step; loops make stacks of their own."""
    switch("rules")
    sizes = []
    whole = stacked._as_stack
    monkeypatch.setattr(stacked, "_as_stack", lambda members: sizes.append(len(members)) or whole(members))
    return sizes


def model_of(kind, dtype, rng):
    model = {f"w{i}": drawn((6, 4), kind, dtype, rng) for i in range(6)}
    return model | {"tied": model["w1"], "wide": drawn((4, 6), kind, dtype, rng), "wide2": drawn((4, 6), kind, dtype, rng)}


@pytest.mark.parametrize("update", [opt.update, opt.update_], ids=["pure", "in place"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("numpy", "float32"), ("numpy", "float64"), *[("torch", name) for name in TOLERANCES]]
)
@rules
def test_a_stack_is_stepped_as_each_array_alone(rule, kind, dtype, update, stacks, monkeypatch):
    state, model = trained(rule, model_of, kind, dtype, update)
    assert max(stacks) >= 3
    assert model["tied"] is model["w1"]
    count = len(stacks)
    monkeypatch.setattr(stacked, "ALONE_FROM", 0)
    state_alone, model_alone = trained(rule, model_of, kind, dtype, update)
    assert len(stacks) == count
    assert_alike(model.values(), model_alone.values(), TOLERANCES[dtype])
    for name in model:
        assert_alike(state_leaves(state[name].state), state_leaves(state_alone[name].state), TOLERANCES[dtype])


def requests_of(rule, states, xs):
    return [Together(rule.resolved(x, ""), state, x, x * 0.5) for state, x in zip(states, xs, strict=True)]


@both_kinds
def test_what_differs_is_not_stacked(kind):
    rule = opt.Muon(momentum="ema_debiased")
    x, y = made(np.ones((3, 2)), kind), made(np.ones((2, 3)), kind)
    power = rule.mu
    same = [Together(rule.resolved(x, ""), (x, power), x, x) for _ in range(3)]
    others = [
        Together(rule.resolved(x, ""), (x, power**2), x, x),  # a step ahead
        Together(rule.resolved(y, ""), (y, power), y, y),
        Together(rule.replace(eta=0.5).resolved(x, ""), (x, power), x, x),
        Together(rule.resolved(x, ""), (made(np.ones((3, 2), "float32"), kind), power), x, x),
        Together(rule.resolved(x, ""), (y.T, power), y.T, x),  # laid out in another order
    ]
    groups = stackable_groups([others[0], same[0], *others[1:3], same[1], *others[3:], same[2]])
    assert sorted(groups) == [[0], [1, 4, 7], [2], [3], [5], [6]]


@both_kinds
def test_stacks_are_bounded_and_large_arrays_left_alone(kind, monkeypatch):
    monkeypatch.setattr(stacked, "ALONE_FROM", 20)
    monkeypatch.setattr(stacked, "CPU_STACK", 30)
    rule = opt.Orthogonalise()
    xs = [made(np.ones(shape), kind) for shape in [(2, 6), (5, 4), (2, 6), (2, 6), (5, 4), (2, 6), (2, 6)]]
    groups = stackable_groups(requests_of(rule, [None] * 7, xs))
    assert sorted(groups) == [[0, 2], [1], [3, 5], [4], [6]]


def test_on_a_device_arrays_of_any_size_are_stacked():
    xs = [torch.empty(1024, 1024, device="meta") for _ in range(20)]
    assert [len(group) for group in stackable_groups(requests_of(opt.Orthogonalise(), [None] * 20, xs))] == [16, 4]


def test_rules_are_alike_by_value_and_tensors_by_identity():
    x = torch.ones(3, 2)
    rate, other = torch.tensor(0.1), torch.tensor(0.1)
    for a, b, alike in [
        (opt.Muon(), opt.Muon(), True),
        (opt.Muon(eta=rate), opt.Muon(eta=rate), True),
        (opt.Muon(eta=rate), opt.Muon(eta=other), False),
        (opt.Muon(), opt.Muon(nesterov=False), False),
        (opt.Muon(opt.Adam()), opt.Muon(opt.Adam(0.5)), False),
    ]:
        groups = stackable_groups([Together(rule.resolved(x, ""), x, x, x) for rule in (a, b)])
        assert groups == ([[0, 1]] if alike else [[0], [1]])


@both_kinds
def test_no_array_keeps_the_memory_of_another(kind, stacks):
    rng = np.random.default_rng(1)
    model = {f"w{i}": drawn((6, 4), kind, "float64", rng) for i in range(3)}
    state, model = opt.update(opt.setup(opt.Averaged(opt.Muon()), model), model, model)
    assert stacks == [3]
    leaves = state_leaves([model, *(state[name].state for name in model)])
    arrays = [leaf for leaf in leaves if np.ndim(leaf)]
    assert len(arrays) == 9
    assert not any(share_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def test_derivatives_pass_through_stacks(stacks, monkeypatch):
    def gradient():
        generator = torch.Generator().manual_seed(0)
        draw = lambda: torch.randn(5, 3, dtype=torch.float64, generator=generator)  # noqa: E731
        model = [draw() for _ in range(4)]
        eta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        state = opt.setup(opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.Muon(eta=eta)), model)
        grads = [draw().requires_grad_() for _ in range(4)]
        for _ in range(2):
            state, model = opt.update(state, model, grads)
        loss = sum((x * draw()).sum() for x in model)
        return torch.autograd.grad(loss, [eta, *grads])

    together = gradient()
    assert stacks == [4, 4]
    monkeypatch.setattr(stacked, "ALONE_FROM", 0)
    for a, b in zip(together, gradient(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Flattening(opt.AbstractRule):
    """Says that it is stackable, but treats a stack as one array."""

    law = "stackable"

    def init(self, x):
        return None

    def apply(self, state, x, dx):
        if x.ndim > 2:
            raise ValueError("not made for this")
        return state, dx.sum(0)[None] + 0 * dx


@dataclass(frozen=True)
class Reducing(Flattening):
    def apply(self, state, x, dx):
        return state, dx.sum(0) if x.ndim > 2 else dx


@both_kinds
def test_a_rule_that_is_not_stackable_as_it_says(kind):
    model = {"a": made(np.ones((3, 2)), kind), "b": made(np.ones((3, 2)), kind)}
    with pytest.raises(
        opt.RuleError, match=r"'a \(and 1 like it\)'.*says law='stackable', but .* shapes \(3, 2\) from .*\(2, 3, 2\)"
    ):
        opt.update(opt.setup(Reducing(), model), model, model)
    with pytest.raises(ValueError, match="not made for this") as raised:
        opt.update(opt.setup(Flattening(), model), model, model)
    assert "'a (and 1 like it)'" in raised.value.__notes__[0]


def test_a_transformed_tensor_is_stepped_alone(stacks):
    model = {"a": torch.randn(2, 4, 3), "b": torch.randn(2, 4, 3)}

    def one_step(model):
        return opt.update(opt.setup(opt.Muon(), model), model, model)[1]

    batched = torch.func.vmap(one_step)(model)
    assert stacks == []
    torch.testing.assert_close(batched["a"][1], one_step({"a": model["a"][1]})["a"])
