"""Moving between torch.optim, optax and this library in the middle of training: the trajectory goes on."""

import copy

import numpy as np
import pytest
import torch

import optimisers as opt
import optimisers.optax
import optimisers.torch
from optimisers.errors import ArgumentError, StructureError

from_torch, to_torch, from_optax = optimisers.torch.from_torch, optimisers.torch.to_torch, optimisers.optax.from_optax
BEFORE, AFTER = 13, 20


def model(kind):
    torch.manual_seed(0)
    if kind is torch.optim.Muon:
        layers = [torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 3, bias=False)]
    else:
        layers = [torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)]
    return torch.nn.Sequential(*layers).double()


def set_grads(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def assert_close(module, other):
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


O = torch.optim  # noqa: E741
MEET = {
    "Adam": (O.Adam, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}, "Adam"),
    "Adam with decay": (O.Adam, {"lr": 0.01, "weight_decay": 0.1}, "OptimiserChain"),
    "Adam, decoupled": (O.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}, "AdamW"),
    "Adam, foreach": (O.Adam, {"lr": 0.01, "foreach": True}, "Adam"),
    "Adam, tensor lr": (O.Adam, {"lr": torch.tensor(0.01, dtype=torch.float64)}, "Adam"),
    "AdamW": (O.AdamW, {"lr": 0.01, "weight_decay": 0.1}, "AdamW"),
    "AdamW, fused": (O.AdamW, {"lr": 0.01, "fused": True}, "AdamW"),
    "SGD": (O.SGD, {"lr": 0.01}, "Descent"),
    "SGD with decay": (O.SGD, {"lr": 0.01, "weight_decay": 0.1}, "OptimiserChain"),
    "SGD, momentum": (O.SGD, {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.1}, "OptimiserChain"),
    "SGD, Nesterov": (O.SGD, {"lr": 0.01, "momentum": 0.8, "nesterov": True}, "Nesterov"),
    "RMSprop": (O.RMSprop, {"lr": 0.01, "alpha": 0.8}, "RMSProp"),
    "RMSprop, centered": (O.RMSprop, {"lr": 0.01, "centered": True, "weight_decay": 0.1}, "OptimiserChain"),
    "Adagrad": (O.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}, "AdaGrad"),
    "Muon": (O.Muon, {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.8}, "Muon"),
    "Muon, plain": (O.Muon, {"lr": 0.01, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}, "Muon"),
}
meeting = pytest.mark.parametrize("name", MEET)


@pytest.fixture
def in_float64(monkeypatch):
    """torch's Muon iterates in bfloat16; without that cast it is the same algorithm in the parameters' precision."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def in_own_dtype(state, name):
    if not name.startswith("Muon"):
        return state
    ns = state["0.weight"].rule.ns
    assert ns.dtype == "bfloat16"
    return opt.adjust(state, ns=opt.NewtonSchulz(ns.steps, ns.coefficients, ns.epsilon, ns.normaliser))


@meeting
@pytest.mark.parametrize("before", [0, BEFORE], ids=["at the start", "in the middle"])
def test_trajectory_of_torch_goes_on(name, before, in_float64):
    kind, options, rule = MEET[name]
    theirs = model(kind)
    reference = kind(theirs.parameters(), **options)
    for i in range(before):
        set_grads(theirs, i)
        reference.step()
    untouched = copy.deepcopy(reference.state_dict())
    ours = copy.deepcopy(theirs)
    state = from_torch(reference, theirs)
    assert type(state["0.weight"].rule).__name__ == rule
    state = in_own_dtype(state, name)
    for i in range(before, before + AFTER):
        for module in (ours, theirs):
            set_grads(module, i)
        state, _ = opt.update_(state, ours)
        if i == before:  # what was imported is a copy
            now = reference.state_dict()["state"]
            for key, tensors in untouched["state"].items():
                assert all(not isinstance(v, torch.Tensor) or torch.equal(v, now[key][k]) for k, v in tensors.items())
        reference.step()
        assert_close(ours, theirs)


@meeting
@pytest.mark.parametrize("before", [0, BEFORE], ids=["at the start", "in the middle"])
def test_trajectory_goes_on_in_torch(name, before, in_float64):
    kind, options, _ = MEET[name]
    ours = model(kind)
    start = from_torch(kind(ours.parameters(), **options), ours)
    state = opt.setup(lambda p: start[p.path].rule, ours)
    state = in_own_dtype(state, name)
    for i in range(before):
        set_grads(ours, i)
        state, _ = opt.update_(state, ours)
    theirs = copy.deepcopy(ours)
    if name.startswith("Muon"):  # torch's Muon is exported to only from bfloat16, which is patched away here
        ns = state["0.weight"].rule.ns
        exported = opt.adjust(
            state, ns=opt.NewtonSchulz(ns.steps, ns.coefficients, ns.epsilon, ns.normaliser, dtype="bfloat16")
        )
    else:
        exported = state
    reference = to_torch(exported, theirs)
    assert type(reference) is (O.AdamW if name == "Adam, decoupled" else kind)
    for i in range(before, before + AFTER):
        for module in (ours, theirs):
            set_grads(module, i)
        state, _ = opt.update_(state, ours)
        reference.step()
        assert_close(ours, theirs)


@meeting
def test_there_and_back(name):
    kind, options, _ = MEET[name]
    module = model(kind)
    reference = kind(module.parameters(), **options)
    for i in range(BEFORE):
        set_grads(module, i)
        reference.step()
    again = to_torch(from_torch(reference, module), module)
    for p in module.parameters():
        for key, value in reference.state[p].items():
            if value is None or (key == "step" and kind in {O.RMSprop, O.Adagrad}):  # there the step does nothing
                continue
            torch.testing.assert_close(again.state[p][key], value, rtol=1e-15, atol=0)
    group, old = again.param_groups[0], reference.param_groups[0]
    same = ("betas", "eps", "weight_decay", "momentum", "nesterov", "alpha", "centered", "ns_steps")
    assert all(group[key] == old[key] for key in same if key in old)
    assert float(group["lr"]) == float(old["lr"])


def test_muon_in_bfloat16_stays_near():
    theirs = model(O.Muon)
    reference = O.Muon(theirs.parameters(), lr=0.01)
    for i in range(BEFORE):
        set_grads(theirs, i)
        reference.step()
    ours = copy.deepcopy(theirs)
    state = from_torch(reference, theirs)
    for i in range(BEFORE, BEFORE + AFTER):
        for module in (ours, theirs):
            set_grads(module, i)
        state, _ = opt.update_(state, ours)
        reference.step()
    # Roundings of the iterate to 8 bits: 0.02 of an element and step (see test_muon.py), times lr, times steps.
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() <= 0.05 * 0.01 * AFTER


def test_groups_and_schedules_come_along():
    module = model(O.AdamW)
    decayed = [p for p in module.parameters() if p.ndim == 2]
    plain = [p for p in module.parameters() if p.ndim == 1]
    reference = O.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0, "lr": 0.02}], lr=0.01)
    scheduler = O.lr_scheduler.CosineAnnealingLR(reference, 30)
    for i in range(5):
        set_grads(module, i)
        reference.step()
        scheduler.step()
    state = from_torch(reference, module)
    lr = [group["lr"] for group in reference.param_groups]
    assert state["0.weight"].rule == opt.AdamW(lr[0], lambda_=0.01)
    assert state["0.bias"].rule == opt.AdamW(lr[1])
    assert opt.adjust(state, times=1.0)["0.bias"].rule.eta == 0.02  # that of the start
    back = to_torch(state, module)
    assert [group["lr"] for group in back.param_groups] == lr
    assert [group["initial_lr"] for group in back.param_groups] == [0.01, 0.02]


def test_adapter_takes_over_optimizer_and_scheduler():
    theirs = model(O.AdamW)
    reference = O.AdamW(theirs.parameters(), lr=0.01)
    scheduler = O.lr_scheduler.CosineAnnealingLR(reference, 30)
    for i in range(5):
        set_grads(theirs, i)
        reference.step()
        scheduler.step()
    ours = copy.deepcopy(theirs)
    state = from_torch(reference, theirs)
    optimizer = optimisers.torch.Optimizer(state, ours)
    continued = O.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    continued.load_state_dict(scheduler.state_dict())
    optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"]  # building a scheduler resets it, as with torch
    for i in range(5, 25):
        for module, o, s in ((ours, optimizer, continued), (theirs, reference, scheduler)):
            set_grads(module, i)
            o.step()
            s.step()
        assert_close(ours, theirs)


def test_parameters_of_no_optimizer_are_not_trained():
    module = model(O.Adam)
    state = from_torch(O.Adam(module[0].parameters()), module)
    assert state["1.bias"].rule is None
    assert isinstance(state["0.weight"].rule, opt.Adam)


APART = {
    "amsgrad": (lambda p: O.Adam(p, amsgrad=True), "amsgrad=True"),
    "amsgrad of AdamW": (lambda p: O.AdamW(p, amsgrad=True), "amsgrad=True"),
    "maximize": (lambda p: O.SGD(p, maximize=True), "maximize=True"),
    "dampening": (lambda p: O.SGD(p, momentum=0.9, dampening=0.1), "dampening=0.1"),
    "momentum of nothing": (lambda p: O.SGD(p, lr=0.0, momentum=0.9), "lr=0"),
    "momentum of RMSprop": (lambda p: O.RMSprop(p, momentum=0.9), "momentum=0.9"),
    "lr_decay": (lambda p: O.Adagrad(p, lr_decay=0.1), "lr_decay=0.1"),
}


@pytest.mark.parametrize("name", APART)
def test_where_formulas_do_not_meet_it_says_so(name):
    make, text = APART[name]
    module = model(O.Adam)
    with pytest.raises(
        ArgumentError, match=rf"from_torch: no rule has the formula of .* with {text}.*param_groups\[0\].*'0\.weight'"
    ):
        from_torch(make(module.parameters()), module)


def test_arrays_that_are_treated_otherwise():
    z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))
    for kind in (O.Adam, O.RMSprop):
        with pytest.raises(ArgumentError, match="a complex parameter"):
            from_torch(kind([z]), [z])
        rule = {O.Adam: opt.Adam(), O.RMSprop: opt.RMSProp()}[kind]
        with pytest.raises(ArgumentError, match="a complex parameter"):
            to_torch(opt.setup(rule, Holder(z)), Holder(z))
    column = torch.nn.Parameter(torch.ones(3, 1))
    with pytest.raises(ArgumentError, match="a matrix of one column"):
        from_torch(O.Muon([column]), [column])


class Holder(torch.nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = x


def test_what_is_no_optimizer_of_torch_is_refused():
    module = model(O.Adam)
    with pytest.raises(ArgumentError, match="one of Adam, AdamW, SGD, RMSprop, Adagrad, Muon; got a Rprop"):
        from_torch(O.Rprop(module.parameters()), module)
    with pytest.raises(StructureError, match="the optimizer steps 2 parameters that the model does not have"):
        from_torch(O.Adam(module.parameters()), module[0])


NOT_EXPORTED = {
    "another rule": (opt.Lion(), "has no optimizer with the formula of Lion"),
    "in a chain": (opt.OptimiserChain(opt.ClipNorm(), opt.Adam()), "no optimizer with the formula of OptimiserChain"),
    "couple": (opt.AdamW(lambda_=0.1, couple=False), r"\(couple=False\)"),
    "twice decayed": (opt.OptimiserChain(opt.WeightDecay(), opt.AdamW(lambda_=0.1)), "two kinds of weight decay"),
    "eta 0": (opt.Momentum(0.0), "a learning rate of 0"),
    "Muon of another kind": (opt.Muon(), "has no optimizer with the formula of Muon"),
    "two classes": (opt.Route(("*.bias", opt.Adam()), otherwise=opt.Descent()), "SGD for '0.weight', Adam for '0.bias'"),
    "nothing": (opt.Route(("0.weight", opt.Adam()), otherwise=None), None),
}


@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_what_torch_does_not_have_is_not_exported(name):
    rule, text = NOT_EXPORTED[name]
    module = model(O.Adam)
    state = opt.setup(rule, module)
    if text is None:
        assert len(to_torch(state, module).param_groups[0]["params"]) == 1
        state = opt.freeze(state)
        text = "none, since nothing is trained"
    with pytest.raises(ArgumentError, match=text):
        to_torch(state, module)


def test_state_of_a_tree_is_not_exported():
    with pytest.raises(ArgumentError, match="was set up for a tree"):
        to_torch(opt.setup(opt.Adam(), [torch.ones(2)]), torch.nn.Linear(1, 1))


def test_step_count_is_read_from_the_powers_however_long_the_training():
    x = torch.nn.Parameter(torch.ones(2))
    for t in (0, 1, 999, 123_456, 2_000_000):
        for beta in ((0.9, 0.999), (0.0, 0.999), (0.9, 0.0)):
            reference = O.Adam([x], betas=beta)
            reference.state[x] = {"step": torch.tensor(float(t)), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
            step = float(to_torch(from_torch(reference, [("x", x)]), [("x", x)]).state[x]["step"])
            if max(beta) ** (t + 1) > 1e-300:
                assert step == t
            else:  # all that matters: the correction is 1
                assert max(beta) ** step < 1e-16


# --- optax ---------------------------------------------------------------------------------------------------------------


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"layer": {"w": rng.standard_normal((4, 6)), "b": rng.standard_normal(6)}, "out": rng.standard_normal((6, 2))}


def optax_cases():
    optax = pytest.importorskip("optax")
    adamw = {"b1": 0.8, "b2": 0.99, "eps": 1e-6}
    rule = {"beta": (0.8, 0.99), "epsilon": 1e-6}
    return {
        "adam": (optax.adam(0.01, **adamw), opt.Adam(0.01, **rule)),
        "adamw": (optax.adamw(0.01, weight_decay=0.1, **adamw), opt.AdamW(0.01, lambda_=0.1, **rule)),
        "clipped, scheduled": (
            optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.01), weight_decay=0.1)),
            opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.AdamW(0.01, lambda_=0.1)),
        ),
        "muon": (optax.contrib.muon(0.02), opt.Muon.preset("optax")),
    }


@pytest.mark.parametrize("name", ["adam", "adamw", "clipped, scheduled", "muon"])
def test_trajectory_of_optax_goes_on(name):
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    with jax.enable_x64(True):
        transformation, rule = optax_cases()[name]
        step = jax.jit(transformation.update)
        params = jax.tree.map(jax.numpy.asarray, tree(0))
        theirs = transformation.init(params)
        for i in range(BEFORE):
            updates, theirs = step(tree(i + 1), theirs, params)
            params = optax.apply_updates(params, updates)
        ours = jax.tree.map(np.array, params)
        state = from_optax(theirs, rule, ours)
        for i in range(BEFORE, BEFORE + AFTER):
            updates, theirs = step(tree(i + 1), theirs, params)
            params = optax.apply_updates(params, updates)
            state, ours = opt.update(state, ours, tree(i + 1))
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(params), strict=True):
                np.testing.assert_allclose(a, np.asarray(b), rtol=1e-10, atol=1e-10)


def test_optax_states_that_do_not_fit():
    optax = pytest.importorskip("optax")
    params = {"w": np.ones((2, 3))}
    adam = optax.adam(0.1).init(params)
    with pytest.raises(ArgumentError, match="found no state of optax"):
        from_optax(optax.sgd(0.1, momentum=0.9).init(params), opt.Momentum(), params)
    with pytest.raises(ArgumentError, match=r"parameter 'w': from_optax: optax keeps first and second moments.*Momentum"):
        from_optax(adam, opt.Momentum(), params)
    with pytest.raises(ArgumentError, match="one momentum that is corrected"):
        from_optax(optax.contrib.muon(0.1).init(params), opt.Muon(), params)
    with pytest.raises(StructureError, match=r"parameter 'w': from_optax: expected moments of shape \(2, 3\), got \(3, 3\)"):
        from_optax(optax.adam(0.1).init({"w": np.ones((3, 3))}), opt.Adam(), params)
    with pytest.raises(ArgumentError, match="several states for 'w'"):
        from_optax((adam, adam), opt.Adam(), params)
    with pytest.raises(StructureError, match="lacks the key 'w'"):
        from_optax(optax.adam(0.1).init({"v": np.ones((2, 3))}), opt.Adam(), params)
