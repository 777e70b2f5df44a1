"""The rules as a torch.optim.Optimizer: what users of torch expect of one, and that it steps as update_ does."""

import copy
import functools
import io
import pickle
import re
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler as torch_schedulers

import optimisers as opt
import optimisers.torch
from looped import forget
from optimisers.errors import (
    ArgumentError,
    GradientError,
    HyperParameterError,
    ModelError,
    NonFiniteError,
    RuleError,
    SelectionError,
    StructureError,
)
from table import ROWS, cases


@pytest.fixture(autouse=True)
def an_engine_that_knows_nothing(monkeypatch):
    """Programs that other tests have left, so many that no more are made, change how small arrays are stepped."""
    forget(monkeypatch)


Optimizer = optimisers.torch.Optimizer
STEPS = 4


def net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(dtype)


def set_grads(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def train(module, optimizer, steps, start=0):
    for i in range(start, start + steps):
        set_grads(module, i)
        optimizer.step()


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(module, other):
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def saved(optimizer):
    """The state dict after a journey through a file that may hold no objects."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the same engine -----------------------------------------------------------------------------------------------------

EVERY = cases()
FIRST = cases(every=False)


class Mixed(torch.nn.Module):
    """A matrix, a vector and, for rules that take them, complex numbers."""

    def __init__(self, *, complex_too):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = torch.nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
        if complex_too:
            self.z = torch.nn.Parameter(torch.randn(2, 3, generator=generator, dtype=torch.complex128))


def built(row):
    module = Mixed(complex_too=row.complex)
    if row.min_ndim > 1:
        del module.b
    return module


@pytest.mark.parametrize(("row", "rule"), [case[1:] for case in EVERY], ids=[case[0] for case in EVERY])
def test_every_rule_steps_as_update_does_bit_for_bit(row, rule):
    ours, theirs = built(row), built(row)
    optimizer, state = Optimizer(rule, ours), opt.setup(rule, theirs)
    for i in range(STEPS):
        set_grads(ours, i)
        set_grads(theirs, i)
        optimizer.step()
        state, _ = opt.update_(state, theirs)
        assert same(ours, theirs)


@pytest.mark.parametrize(("row", "rule"), [case[1:] for case in FIRST], ids=[case[0] for case in FIRST])
def test_every_rule_has_what_torch_code_looks_for(row, rule):
    optimizer = Optimizer(rule, built(row))
    for group in optimizer.param_groups:
        assert isinstance(group["lr"], float | int)
        assert len(group["betas"]) >= 2
        assert group["maximize"] is False
        assert set(optimizer.defaults) >= {"lr", "betas"}
    assert all(isinstance(x, torch.Tensor) for state in optimizer.state.values() for x in state.values())
    assert len(optimizer.state) == len(list(built(row).parameters()))


@pytest.mark.parametrize(("row", "rule"), [case[1:] for case in FIRST], ids=[case[0] for case in FIRST])
def test_every_rule_resumes_from_a_file_bit_for_bit(row, rule):
    module = built(row)
    optimizer = Optimizer(rule, module)
    train(module, optimizer, 3)
    other = built(row)
    other.load_state_dict(module.state_dict())
    resumed = Optimizer(rule, other)
    resumed.load_state_dict(saved(optimizer))
    assert resumed.tree == optimizer.tree
    train(module, optimizer, 3, start=3)
    train(other, resumed, 3, start=3)
    assert same(module, other)


# eta is a first step size only; a master in float32 rounds float64; what lies outside is projected at any rate.
UNSCALED = {"Rprop", "MixedPrecision", "Projected", "Projected rows", "Projected by a callable"}


@pytest.mark.parametrize(("row", "rule"), [case[1:] for case in FIRST], ids=[case[0] for case in FIRST])
def test_every_rule_takes_no_step_at_learning_rate_zero(row, rule):
    if row.name in UNSCALED or "Scheduled" in repr(rule):
        pytest.skip("its learning rate is its own")
    if any(isinstance(r, opt.WeightDecay | opt.SignDecay) for r in (rule, *getattr(rule, "rules", ()))) and row.name not in {
        "WeightDecay",
        "SignDecay",
    }:
        pytest.skip("decay before momentum is scaled with it, after it is not")
    module = built(row)
    optimizer = Optimizer(rule, module)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(module)
    train(module, optimizer, 1)
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert not any(moved)


def test_the_table_has_a_rule_without_learning_rate():
    assert {"AdaDelta", "WeightDecay"} <= {row.name for row in ROWS}


# --- groups and their entries --------------------------------------------------------------------------------------------


def routed():
    return opt.Route(
        ("*.bias", opt.Momentum(0.1)), (lambda p: p.shape == (2, 5), opt.RMSProp()), otherwise=opt.AdamW(lambda_=0.1)
    )


def test_one_group_for_each_rule_in_the_order_of_first_parameters():
    optimizer = Optimizer(routed(), net())
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["0.weight"], ["0.bias", "2.bias"], ["2.weight"]]
    assert [group["rule"] for group in optimizer.param_groups] == ["AdamW", "Momentum", "RMSProp"]


def entries(rule):
    group = Optimizer(rule, net()).param_groups[0]
    return {key: value for key, value in group.items() if key not in {"params", "param_names", "maximize", "rule"}}


ENTRIES = [
    (opt.AdamW(0.1, (0.5, 0.6), 0.2), {"lr": 0.1, "betas": (0.5, 0.6), "weight_decay": 0.2, "eps": 1e-8, "couple": True}),
    (opt.Momentum(0.1, 0.8), {"lr": 0.1, "betas": (0.8, 0.0), "momentum": 0.8}),
    (opt.RMSProp(0.1), {"lr": 0.1, "betas": (0.0, 0.0), "alpha": 0.9, "eps": 1e-8}),
    (opt.AdaDelta(), {"lr": 1.0, "betas": (0.0, 0.0), "rho": 0.9, "eps": 1e-8}),
    (opt.Descent(), {"lr": 0.1, "betas": (0.0, 0.0)}),
    (opt.OptimiserChain(opt.WeightDecay(0.1), opt.Momentum()), {"weight_decay": 0.1, "momentum": 0.9}),
    (opt.OptimiserChain(opt.WeightDecay(0.1), opt.AdamW()), {"weight_decay": 0.0, "WeightDecay.weight_decay": 0.1}),
    (
        opt.OptimiserChain(opt.WeightDecay(0.1), opt.WeightDecay(0.2), opt.AdamW()),
        {"WeightDecay.weight_decay": 0.1, "WeightDecay2.weight_decay": 0.2},
    ),
    (opt.OptimiserChain(opt.Momentum(1.0), opt.Descent(0.5)), {"lr": 0.5, "momentum": 0.9}),
    (opt.MixedPrecision(opt.AdaDelta()), {"lr": 1.0, "rho": 0.9}),
    (opt.OptimiserChain(opt.ClipNorm(), opt.Averaged(opt.AdaDelta())), {"lr": 1.0, "rho": 0.9, "decay": 0.999}),
    (opt.Scheduled(opt.OptimiserChain(opt.WeightDecay(0.1)), lambda_=lambda _: 0.2), {"lr": 1.0, "weight_decay": 0.1}),
    (opt.Muon(), {"lr": 0.02, "momentum": 0.95, "betas": (0.95, 0.0), "weight_decay": 0.01, "opt.betas": (0.9, 0.95)}),
]


def shown(rule):
    """A rule as a test id: without the addresses of its functions, which differ between the workers of one run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(rule))


@pytest.mark.parametrize(("rule", "expected"), ENTRIES, ids=[shown(rule) for rule, _ in ENTRIES])
def test_entries_have_the_names_that_torch_uses(rule, expected):
    shown = entries(rule)
    assert {key: shown[key] for key in expected} == expected


CHANGES = [
    (opt.AdamW(), {"lr": 0.5}, {"eta": 0.5}),
    (
        opt.AdamW(),
        {"betas": [0.5, 0.6], "eps": 1e-3, "weight_decay": 0.1},
        {"beta": (0.5, 0.6), "epsilon": 1e-3, "lambda_": 0.1},
    ),
    (opt.Momentum(), {"momentum": 0.5}, {"rho": 0.5}),
    (opt.Momentum(), {"betas": (0.5, 0.999)}, {"rho": 0.5}),
    (opt.Muon(), {"betas": (0.5, 0.999)}, {"mu": 0.5}),
    (opt.Muon(), {"opt.betas": (0.5, 0.6)}, {"opt": opt.AdamW(3e-4, (0.5, 0.6), 0.01)}),
    (opt.Muon(), {"lr": 0.01}, {"eta": 0.01, "opt": opt.AdamW(1.5e-4, (0.9, 0.95), 0.01)}),
]


@pytest.mark.parametrize(("rule", "changes", "fields"), CHANGES, ids=[f"{shown(r)}-{c}" for r, c, _ in CHANGES])
def test_what_is_written_into_a_group_acts(rule, changes, fields):
    optimizer = Optimizer(rule, net())
    optimizer.param_groups[0].update(changes)
    assert optimizer.tree["0.weight"].rule == rule.replace(**fields)
    for key, value in changes.items():  # shown as written, since schedulers compare
        assert optimizer.param_groups[0][key] == value


def test_cycled_momentum_is_shown_under_both_names():
    optimizer = Optimizer(opt.Momentum(), net())
    optimizer.param_groups[0]["betas"] = (0.5, 0.99)
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.5
    optimizer.param_groups[0]["momentum"] = 0.25
    optimizer.step()
    assert optimizer.param_groups[0]["betas"] == (0.25, 0.0)
    assert optimizer.tree["0.weight"].rule.rho == 0.25


def test_every_member_of_a_group_follows_its_entries_alone():
    module = net()
    optimizer = Optimizer(routed(), module)
    optimizer.param_groups[1]["lr"] = 0.0
    before = weights(module)
    train(module, optimizer, 1)
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert moved == [True, False, True, False]


def test_ratio_of_the_fallback_is_that_of_construction_also_after_zero():
    optimizer = Optimizer(opt.Muon(opt.AdamW(0.003), 0.03), net())
    for lr, fallback in ((0.0, 0.0), (0.06, 0.006), (0.03, 0.003)):
        optimizer.param_groups[0]["lr"] = lr
        rule = optimizer.tree["0.bias"].rule
        assert rule.eta == lr
        assert rule.opt.eta == pytest.approx(fallback, rel=1e-15)


def test_learning_rate_as_a_tensor():
    ours, theirs = net(), net()
    lr = torch.tensor(0.01, dtype=torch.float64)
    optimizer = Optimizer(opt.AdamW(lr), ours)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
    train(ours, optimizer, 1)
    train(theirs, reference, 1)
    optimizer.param_groups[0]["lr"].fill_(0.02)  # as schedulers do with tensors
    reference.param_groups[0]["lr"] = 0.02
    train(ours, optimizer, 2)
    train(theirs, reference, 2)
    assert_close(ours, theirs)


ILL = [
    ({"lr": -0.1}, r"param_groups\[0\], 'lr': AdamW: field 'eta' must be a finite number >= 0; got -0.1"),
    ({"lr": float("nan")}, r"param_groups\[0\], 'lr': AdamW: field 'eta'"),
    ({"betas": (1.5, 0.9)}, r"param_groups\[0\], 'betas': AdamW: field 'beta\[0\]' must be in \[0, 1\); got 1.5"),
    ({"eps": "small"}, r"param_groups\[0\], 'eps': AdamW: field 'epsilon'"),
]


@pytest.mark.parametrize(("changes", "text"), ILL, ids=[str(changes) for changes, _ in ILL])
def test_values_out_of_range_are_refused_and_nothing_changes(changes, text):
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    train(module, optimizer, 2)
    before, state = weights(module), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0].update(changes)
    set_grads(module, 3)
    with pytest.raises(HyperParameterError, match=text):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    optimizer.param_groups[0].update(lr=0.001, betas=(0.9, 0.999), eps=1e-8)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][key], after[i][key]) for i in state for key in state[i])
    optimizer.step()


def test_a_scheduler_that_goes_below_zero_is_an_error_at_the_step():
    module = net()
    optimizer = Optimizer(opt.Descent(0.1), module)
    scheduler = torch_schedulers.LambdaLR(optimizer, lambda i: 1 - 2 * i)
    train(module, optimizer, 1)
    scheduler.step()
    with pytest.raises(HyperParameterError, match=r"param_groups\[0\], 'lr': Descent: field 'eta'"):
        optimizer.step()


def test_fields_with_a_schedule_of_their_own_are_not_overruled():
    optimizer = Optimizer(opt.Scheduled(opt.AdamW(), eta=lambda _: 0.1, lambda_=lambda _: 0.1), net())
    for key, value in (("lr", 0.5), ("weight_decay", 0.5)):
        optimizer.param_groups[0][key], old = value, optimizer.param_groups[0][key]
        with pytest.raises(HyperParameterError, match="is scheduled"):
            optimizer.step()
        optimizer.param_groups[0][key] = old
    optimizer.step()


def test_first_step_size_of_rprop_is_no_learning_rate():
    optimizer = Optimizer(opt.Rprop(), net())
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(HyperParameterError, match="fixed at setup"):
        optimizer.step()


# --- schedulers against torch.optim.AdamW --------------------------------------------------------------------------------

S = torch_schedulers


def chained(o):
    return S.ChainedScheduler([S.ConstantLR(o, 0.1, 5), S.ExponentialLR(o, 0.9)], optimizer=o)


def sequential(o):
    warm, cosine = S.LinearLR(o, 0.01, total_iters=8), S.CosineAnnealingLR(o, 42)
    return S.SequentialLR(o, [warm, cosine], [8])


SCHEDULERS = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda i: 0.95**i),
    "LambdaLR through zero": lambda o: S.LambdaLR(o, lambda i: i % 3 / 2),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda _: 0.97),
    "StepLR": lambda o: S.StepLR(o, 7),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [5, 20], 0.3),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 10),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=20),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.95),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 25),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 7, 2),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 30, 2.0),
    "CyclicLR": lambda o: S.CyclicLR(o, 1e-4, 1e-2, 5),
    "CyclicLR without momentum": lambda o: S.CyclicLR(o, 1e-4, 1e-2, 5, mode="exp_range", gamma=0.9, cycle_momentum=False),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 1e-2, total_steps=60),
    "OneCycleLR in three phases": lambda o: S.OneCycleLR(o, 1e-2, total_steps=60, three_phase=True, anneal_strategy="linear"),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=2),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-2, 10),
}


def test_every_scheduler_of_torch_is_here():
    public = {
        name
        for name, value in vars(S).items()
        if isinstance(value, type) and issubclass(value, S.LRScheduler) and not name.startswith("_") and name != "LRScheduler"
    }
    assert public <= SCHEDULERS.keys()


def assert_close(module, other, rtol=1e-12):
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_has_the_effect_it_has_on_torch(name):
    ours, theirs = net(), net()
    pairs = [
        (ours, Optimizer(opt.AdamW(0.003, (0.9, 0.99), 0.1), ours)),
        (theirs, torch.optim.AdamW(theirs.parameters(), 0.003, (0.9, 0.99), weight_decay=0.1)),
    ]
    schedulers = [SCHEDULERS[name](optimizer) for _, optimizer in pairs]
    for i in range(50):
        for (module, optimizer), scheduler in zip(pairs, schedulers, strict=True):
            set_grads(module, i)
            optimizer.step()
            if name == "ReduceLROnPlateau":
                scheduler.step(float(i % 7))
            else:
                scheduler.step()
        ours_now, theirs_now = (optimizer.param_groups[0] for _, optimizer in pairs)
        assert ours_now["lr"] == theirs_now["lr"]
        assert tuple(ours_now["betas"]) == tuple(theirs_now["betas"])
        assert_close(ours, theirs)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_in_the_order_of_torch_follows_schedulers_as_torch_does(nesterov):
    # torch's SGD multiplies by the learning rate what leaves the momentum, Momentum what enters it.
    ours, theirs = net(), net()
    rule = (opt.Nesterov if nesterov else opt.Momentum)(1.0, 0.8)
    optimizer = Optimizer(opt.OptimiserChain(opt.WeightDecay(0.1), rule, opt.Descent(0.05)), ours)
    reference = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.8, weight_decay=0.1, nesterov=nesterov)
    schedulers = [SCHEDULERS["OneCycleLR"](o) for o in (optimizer, reference)]
    for i in range(50):
        for module, o, scheduler in zip((ours, theirs), (optimizer, reference), schedulers, strict=True):
            train(module, o, 1, start=i)
            scheduler.step()
        assert_close(ours, theirs)


def test_scheduler_resumes_with_the_optimizer():
    def start():
        module = net()
        optimizer = Optimizer(opt.AdamW(), module)
        return module, optimizer, sequential(optimizer)

    def run(module, optimizer, scheduler, steps, first=0):
        for i in range(first, first + steps):
            train(module, optimizer, 1, start=i)
            scheduler.step()

    whole = start()
    run(*whole, 20)
    module, optimizer, scheduler = start()
    run(module, optimizer, scheduler, 10)
    files = copy.deepcopy((module.state_dict(), saved(optimizer), scheduler.state_dict()))
    again = start()
    for part, state in zip(again, files, strict=True):
        part.load_state_dict(state)
    run(*again, 10, first=10)
    assert same(again[0], whole[0])


# --- groups that come later ------------------------------------------------------------------------------------------------


def test_group_added_after_steps():
    body, head = net(), net(1)
    reference_body, reference_head = net(), net(1)
    optimizer = Optimizer(opt.AdamW(lambda_=0.1), body.named_parameters())
    reference = torch.optim.AdamW(reference_body.parameters(), weight_decay=0.1)
    train(body, optimizer, 3)
    train(reference_body, reference, 3)
    state = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    optimizer.add_param_group({"params": [(f"head.{n}", p) for n, p in head.named_parameters()], "lr": 0.01})
    reference.add_param_group({"params": reference_head.parameters(), "lr": 0.01})
    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.01]
    assert all(torch.equal(optimizer.state[p][k], state[id(p)][k]) for p in body.parameters() for k in state[id(p)])
    for i in range(3):
        for module in (body, head, reference_body, reference_head):
            set_grads(module, i)
        optimizer.step()
        reference.step()
    assert_close(body, reference_body)
    assert_close(head, reference_head)
    other = Optimizer(opt.AdamW(lambda_=0.1), body.named_parameters())
    other.add_param_group({"params": [(f"head.{n}", p) for n, p in head.named_parameters()]})
    other.load_state_dict(saved(optimizer))
    assert other.tree == optimizer.tree
    assert other.param_groups[1]["lr"] == 0.01


def test_added_group_may_have_rules_of_its_own():
    body, head = net(), net(1)
    optimizer = Optimizer(opt.AdamW(), body.named_parameters())
    named = [(f"head.{n}", p) for n, p in head.named_parameters()]
    optimizer.add_param_group({"params": named, "rule": opt.Route(("*.bias", opt.Descent()), otherwise=opt.Momentum())})
    assert [group["rule"] for group in optimizer.param_groups] == ["AdamW", "Momentum", "Descent"]
    assert optimizer.param_groups[2]["param_names"] == ["head.0.bias", "head.2.bias"]


def test_added_parameters_follow_the_route_given_at_construction():
    module, layer = net(), torch.nn.Linear(2, 2, dtype=torch.float64)
    optimizer = Optimizer(opt.Route(("*.bias", opt.Descent()), ("*.weight", opt.Momentum())), module)
    optimizer.add_param_group({"params": [("last.bias", layer.bias)]})  # no weight: its pattern matches nothing here
    assert optimizer.param_groups[-1]["rule"] == "Descent"
    with pytest.raises(SelectionError, match=r"no pattern matches 'last\.scale'"):
        optimizer.add_param_group({"params": [("last.scale", layer.weight)]})


def test_groups_of_torch_are_groups_here():
    module = net()
    biases = [p for n, p in module.named_parameters() if n.endswith("bias")]
    matrices = [p for n, p in module.named_parameters() if n.endswith("weight")]
    optimizer = Optimizer(opt.AdamW(lambda_=0.1), [{"params": matrices}, {"params": biases, "weight_decay": 0.0, "lr": 0.01}])
    reference_module = net()
    split = [[p for p in reference_module.parameters() if p.ndim == n] for n in (2, 1)]
    groups = [{"params": split[0]}, {"params": split[1], "weight_decay": 0.0, "lr": 0.01}]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    train(module, optimizer, 5)
    train(reference_module, reference, 5)
    assert_close(module, reference_module)


def test_what_cannot_be_added_changes_nothing():
    module, layer = net(), torch.nn.Linear(2, 2, dtype=torch.float64)
    optimizer = Optimizer(opt.AdamW(), module)
    bad = [
        ({"params": [("0.weight", layer.weight)]}, ModelError, "two parameters have the name '0.weight'"),
        ({"params": [("other", module[0].weight)]}, ValueError, "some parameters appear in more than one parameter group"),
        ({"params": [layer.weight]}, ValueError, "should be with/without names"),
        ({"params": [("w", layer.weight)], "lr": -1.0}, HyperParameterError, r"param_groups\[1\], 'lr'"),
        ({"params": []}, ModelError, "there are no parameters"),
        ([layer.weight], ArgumentError, "a parameter group is a dict with"),
    ]
    for group, error, text in bad:
        with pytest.raises(error, match=text):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert len(optimizer.tree) == 4
    train(module, optimizer, 1)


def test_frozen_layers_are_taken_in_when_they_thaw():
    module = net()
    module[0].requires_grad_(requires_grad=False)
    optimizer = Optimizer(opt.AdamW(), module)
    assert optimizer.param_groups[0]["param_names"] == ["2.weight", "2.bias"]
    module[0].requires_grad_()
    optimizer.add_param_group({"params": [(f"0.{n}", p) for n, p in module[0].named_parameters()], "lr": 1e-4})
    before = weights(module)
    train(module, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


# --- steps -------------------------------------------------------------------------------------------------------------------


def test_closure_runs_with_grad_and_its_loss_is_returned():
    module = net()
    optimizer = Optimizer(opt.Descent(0.05), module)
    x, losses = torch.ones(4, 3, dtype=torch.float64), []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = module(x).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_step_before_any_backward_does_nothing():
    module = net()
    optimizer = Optimizer(opt.AdamW(lambda_=0.1), module)
    before, state = weights(module), copy.deepcopy(optimizer.tree)
    assert optimizer.step() is None
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert optimizer.tree == state


def test_parameters_without_gradient_keep_value_and_state():
    module = net()
    optimizer = Optimizer(opt.AdamW(lambda_=0.1), module)
    train(module, optimizer, 2)
    before = weights(module)
    kept = {k: v.clone() for k, v in optimizer.state[module[0].weight].items()}
    set_grads(module, 5)
    module[0].weight.grad = None
    optimizer.step()
    assert torch.equal(before[0], module[0].weight)
    assert not torch.equal(before[1], module[0].bias)
    assert all(torch.equal(v, optimizer.state[module[0].weight][k]) for k, v in kept.items())


def test_zero_grad():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    set_grads(module, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in module.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in module.parameters())


def test_gradients_are_left_as_they_are():
    module = net()
    optimizer = Optimizer(opt.OptimiserChain(opt.ClipNorm(0.1), opt.Adam()), module, maximize=True)
    set_grads(module, 0)
    before = [p.grad.clone() for p in module.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), before, strict=True))


def test_maximize_is_an_entry_of_each_group():
    ours, theirs = net(), net()
    optimizer = Optimizer(opt.AdamW(lambda_=0.1), ours, maximize=True)
    reference = torch.optim.AdamW(theirs.parameters(), weight_decay=0.1, maximize=True)
    train(ours, optimizer, 3)
    train(theirs, reference, 3)
    optimizer.param_groups[0]["maximize"] = reference.param_groups[0]["maximize"] = False
    train(ours, optimizer, 3)
    train(theirs, reference, 3)
    assert_close(ours, theirs)


def test_hooks_run_around_the_step():
    module, seen = net(), []
    optimizer = Optimizer(opt.AdamW(), module)
    before = optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", o is optimizer)))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", o is optimizer)))
    optimizer.step()
    before.remove()
    optimizer.step()
    assert seen == [("before", True), ("after", True), ("after", True)]


def test_hooks_of_the_state_dict_run():
    module, seen = net(), []
    optimizer = Optimizer(opt.AdamW(), module)
    optimizer.register_state_dict_post_hook(lambda _, d: {**d, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, d: seen.append(d.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert seen == [1, "loaded"]
    assert "extra" in state  # the caller's dict is left alone


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("parts", ["one group", "two groups", "two optimizers"])
def test_grad_scaler(parts, clip):
    ours, theirs = net(), net()

    def made(make, module):
        halves = [list(module[0].parameters()), list(module[2].parameters())]
        if parts == "two optimizers":
            return [(make(half), half) for half in halves]
        groups = [{"params": halves[0]}, {"params": halves[1], "lr": 0.003}]
        every = halves[0] + halves[1]
        return [(make(groups if parts == "two groups" else every), every)]

    optimizers = made(lambda given: Optimizer(opt.AdamW(0.01, lambda_=0.1), given), ours)
    references = made(lambda given: torch.optim.AdamW(given, 0.01, weight_decay=0.1, fused=True), theirs)
    x = torch.ones(4, 3, dtype=torch.float64)
    for module, steppers in ((ours, optimizers), (theirs, references)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for i in range(6):
            module.zero_grad()
            scaler.scale(module(x).square().sum()).backward()
            if i == 3:
                module[2].weight.grad[0, 0] = float("inf")
            for o, params in steppers:
                before = [p.detach().clone() for p in params], copy.deepcopy(o.state_dict()["state"])
                if clip:
                    scaler.unscale_(o)
                    torch.nn.utils.clip_grad_norm_(params, 0.5)
                scaler.step(o)
                skipped = i == 3 and any(p is module[2].weight for p in params)
                after = [p.detach() for p in params], o.state_dict()["state"]
                assert all(map(torch.equal, before[0], after[0])) == skipped
                if module is ours:
                    assert tree_equal(before[1], after[1]) == skipped
            scaler.update()
        assert scaler.get_scale() == 2.0**11
    assert_close(ours, theirs)


def tree_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])


def test_complex_parameters():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))
    optimizer = Optimizer(opt.AdamW(0.1), [w])
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (w - (1 + 2j)).abs().square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    resumed = Optimizer(opt.AdamW(0.1), [w])
    resumed.load_state_dict(saved(optimizer))
    assert resumed.tree == optimizer.tree


def test_a_step_that_raises_changes_nothing():
    module = net()
    optimizer = Optimizer(opt.OptimiserChain(opt.ClipNorm(), opt.AdamW()), module)
    train(module, optimizer, 1)
    before, state = weights(module), copy.deepcopy(optimizer.tree)
    set_grads(module, 1)
    module[2].bias.grad[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"ClipNorm at '2\.bias'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert optimizer.tree == state
    optimizer.step  # noqa: B018 (still there)
    train(module, optimizer, 1, start=2)


def test_sparse_gradients_are_refused_by_name():
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = Optimizer(opt.AdamW(), table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(GradientError, match=r"'weight'.*sparse=False"):
        optimizer.step()


def test_learns_without_warnings_and_a_lower_loss():
    module = net(dtype=torch.float32)
    optimizer = Optimizer(opt.Muon(), module)
    scheduler = torch_schedulers.OneCycleLR(optimizer, 0.05, total_steps=60)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    y = torch.stack([x.sum(1), x.prod(1)], 1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(module(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- parameters --------------------------------------------------------------------------------------------------------------

FORMS = {
    "module": lambda m: m,
    "named_parameters": lambda m: m.named_parameters(),
    "dict": lambda m: dict(m.named_parameters()),
    "parameters": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_in_any_form(form):
    ours, theirs = net(), net()
    optimizer = Optimizer(opt.AdamW(), FORMS[form](ours))
    train(ours, optimizer, 2)
    train(theirs, Optimizer(opt.AdamW(), theirs), 2)
    assert same(ours, theirs)
    named = form not in {"parameters", "list"}
    assert ("param_names" in optimizer.param_groups[0]) == named
    other = Optimizer(opt.AdamW(), FORMS[form](ours))
    other.load_state_dict(saved(optimizer))
    assert other.tree == optimizer.tree


def test_names_are_without_the_prefixes_of_wrappers():
    module = net()
    optimizer = Optimizer(opt.AdamW(), torch.nn.DataParallel(module))
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in module.named_parameters()]


def test_tied_parameters_are_stepped_once():
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    module.b.weight = module.a.weight
    optimizer = Optimizer(opt.Descent(1.0), module)
    assert optimizer.param_groups[0]["param_names"] == ["a.weight"]
    before = module.a.weight.detach().clone()
    module.a.weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(module.b.weight, before - 1)


def test_views_of_one_memory_are_one_array():
    w = torch.nn.Parameter(torch.randn(3, 4))
    t = torch.nn.Parameter(w.detach().t())
    optimizer = Optimizer(opt.Momentum(1.0), [("w", w), ("t", t)])
    before = w.detach().clone()
    w.grad, t.grad = torch.ones(3, 4), torch.ones(4, 3)
    optimizer.step()
    assert torch.equal(w, before - 2)
    assert torch.equal(t, w.t())
    assert optimizer.param_groups[0]["param_names"] == ["w", "t"]
    optimizer.zero_grad()
    assert t.grad is None
    optimizer.load_state_dict(saved(optimizer))


def test_untrained_parameters_are_in_no_group():
    module = net()
    optimizer = Optimizer(opt.Route(("0.*", None), otherwise=opt.AdamW(lambda_=0.1)), module)
    assert optimizer.param_groups[0]["param_names"] == ["2.weight", "2.bias"]
    before = weights(module)
    train(module, optimizer, 1)
    assert torch.equal(before[0], module[0].weight)


def test_function_of_the_parameter():
    optimizer = Optimizer(lambda p: opt.Muon() if p.ndim == 2 else opt.AdamW(), net())
    assert [group["rule"] for group in optimizer.param_groups] == ["Muon(AdamW)", "AdamW"]


def test_state_dtype():
    module = net(dtype=torch.bfloat16)
    optimizer = Optimizer(opt.AdamW(), module, state_dtype="float32")
    assert optimizer.state[module[0].weight]["state.0"].dtype == torch.float32
    train(module, optimizer, 1)
    other = Optimizer(opt.AdamW(), module, state_dtype="float32")
    other.load_state_dict(saved(optimizer))
    assert other.tree == optimizer.tree  # torch would have rounded the moments


w = torch.nn.Parameter(torch.ones(2))
BAD = [
    ((opt.AdamW(), [("a", w), ("a", torch.nn.Parameter(torch.ones(2)))]), ModelError, "two parameters have the name 'a'"),
    ((opt.AdamW(), []), ModelError, "there are no parameters"),
    ((opt.AdamW(), {w}), ArgumentError, "a set has not"),
    ((opt.AdamW(), 3), ArgumentError, "expected a torch.nn.Module"),
    ((opt.AdamW(), [3]), ArgumentError, "expected tensors, or pairs of a name and a tensor; got an int 3"),
    ((opt.AdamW(), [("a", w), w]), ArgumentError, "expected tensors, or pairs"),
    ((opt.AdamW(), [w * 2]), ModelError, "parameter '0' is not a leaf"),
    ((opt.AdamW, [w]), RuleError, r"write AdamW\(\.\.\.\)"),
    ((0.1, [w]), RuleError, "expected a rule"),
    (([w], opt.AdamW()), ArgumentError, r"the order is Optimizer\(rule, params\)"),
    ((lambda _: None, [w]), ModelError, "the rule of every array is None"),
    ((opt.setup(opt.AdamW(), [w]), [w]), ArgumentError, "was set up for a tree"),
]


@pytest.mark.parametrize(("args", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_arguments(args, error, text):
    with pytest.raises(error, match=text):
        Optimizer(*args)


def test_replaced_parameter_of_a_module_is_not_seen():
    # As with torch: the optimizer goes on with the parameters it was given.
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    old = module[0].weight
    module[0].weight = torch.nn.Parameter(old.detach().clone())
    before = weights(module)
    train(module, optimizer, 1)
    assert torch.equal(before[0], module[0].weight)
    # Put into the group, it begins anew under the old name, as with torch.
    fresh = copy.deepcopy(Optimizer(opt.AdamW(), net()).tree["0.weight"])
    optimizer.param_groups[0]["params"][0] = module[0].weight
    assert optimizer.tree["0.weight"] == fresh
    train(module, optimizer, 1)
    assert not torch.equal(before[0], module[0].weight)
    assert module[0].weight in optimizer.state
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


def test_reshaped_parameter_is_named():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    set_grads(module, 0)
    module[0].weight.data = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(StructureError, match=r"model at '0\.weight': the state was set up for a torch array of shape \(5, 3\)"):
        optimizer.step()


# --- state ---------------------------------------------------------------------------------------------------------------


def test_state_is_there_at_construction():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    assert list(optimizer.state[module[0].weight]) == ["state.0", "state.1", "state.2.0", "state.2.1"]
    assert float(optimizer.state[module[0].weight]["state.2.0"]) == 0.9
    assert list(Optimizer(opt.Descent(), module).state.values()) == [{}] * 4
    assert Optimizer(opt.Momentum(), module).state[module[0].weight].keys() == {"state"}


def test_state_dict_has_the_layout_of_torch():
    ours = Optimizer(routed(), net()).state_dict()
    assert ours.keys() == {"state", "param_groups"}
    assert list(ours["state"]) == [0, 1, 2, 3]
    assert [group["params"] for group in ours["param_groups"]] == [[0], [1, 2], [3]]
    assert [group["param_names"] for group in ours["param_groups"]] == [["0.weight"], ["0.bias", "2.bias"], ["2.weight"]]


def test_loading_matches_by_name():
    module = net()
    optimizer = Optimizer(routed(), module)
    train(module, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.7
    reordered = list(reversed(list(module.named_parameters())))
    other = Optimizer(routed(), reordered)
    assert other.param_groups[0]["rule"] == "Momentum"
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[2]["lr"] == 0.7
    for p in module.parameters():
        assert all(torch.equal(v, other.state[p][k]) for k, v in optimizer.state[p].items())


def test_loading_is_by_order_where_there_are_no_names():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    train(module, optimizer, 2)
    other = Optimizer(opt.AdamW(), module.parameters())
    other.load_state_dict(saved(optimizer))
    for p in module.parameters():
        assert all(torch.equal(v, other.state[p][k]) for k, v in optimizer.state[p].items())
    state = saved(optimizer)
    renamed = Optimizer(opt.AdamW(), [(f"new.{n}", p) for n, p in module.named_parameters()])
    with pytest.raises(StructureError, match=r"lacks 'new\.0\.weight'.*holds '0\.weight'.*take 'param_names' out"):
        renamed.load_state_dict(state)
    del state["param_groups"][0]["param_names"]
    renamed.load_state_dict(state)


def test_loaded_tensors_are_copies():
    module = net()
    optimizer = Optimizer(opt.Momentum(), module)
    state = optimizer.state_dict()
    other = Optimizer(opt.Momentum(), module)
    other.load_state_dict(state)
    train(module, other, 1)
    assert not any(s["state"].any() for s in state["state"].values())


def test_loaded_betas_belong_to_the_loaded_state():
    module = net()
    source = Optimizer(opt.Adam(beta=(0.81, 0.998001)), module)
    other = Optimizer(opt.Adam(), module)
    other.load_state_dict(saved(source))  # its powers are those of the betas here, two steps on
    assert other.tree["0.weight"] == source.tree["0.weight"]


def refused(case):
    module, other = net(), net()
    rule = opt.AdamW()
    if case == "missing":
        other.extra = torch.nn.Linear(1, 1)
    if case == "unexpected":
        module.extra = torch.nn.Linear(1, 1)
    if case == "reshaped":
        other[0] = torch.nn.Linear(3, 6, dtype=torch.float64)
    if case == "another rule":
        rule = opt.NAdam()
    if case == "another state":
        rule = opt.AdamW()
    if case == "re-tied":
        other[0] = torch.nn.Linear(5, 2, dtype=torch.float64)
        other[2].weight = other[0].weight
    state = Optimizer(opt.AdamW(), module).state_dict()
    if case == "another state":
        del state["state"][0]["state.0"]
    if case == "torch":
        reference = torch.optim.AdamW(module.named_parameters())
        train(module, reference, 1)
        state = reference.state_dict()
    if case == "negative":
        state["param_groups"][0]["lr"] = -1.0
    if case == "regrouped":
        rule = routed()
        state["param_groups"][0].pop("rule")
        state["param_groups"].append({**state["param_groups"][0], "params": [3], "param_names": ["2.bias"]})
        for key in ("params", "param_names"):
            state["param_groups"][0][key] = state["param_groups"][0][key][:3]
    return Optimizer(rule, other), state


REFUSED = {
    "missing": r"the loaded state lacks 'extra\.weight', 'extra\.bias'",
    "unexpected": r"holds 'extra\.weight', 'extra\.bias', which this optimizer does not have",
    "reshaped": r"the state of parameter '0\.weight': expected state\.0 to be a tensor of shape \(6, 3\), got shape \(5, 3\)",
    "another rule": r"the saved state of '0\.weight' is that of AdamW, and its rule is NAdam",
    "another state": r"the state of parameter '0\.weight' lacks state\.0",
    "re-tied": r"the loaded state holds '2\.weight', which this optimizer does not have",
    "torch": r"optimisers\.torch\.from_torch",
    "negative": r"param_groups\[0\], 'lr': AdamW: field 'eta' must be a finite number >= 0",
    "regrouped": r"'0\.bias' and '2\.bias' have one rule here, and different ones in the loaded state",
}


@pytest.mark.parametrize("case", REFUSED)
def test_loading_what_does_not_fit_is_refused_and_changes_nothing(case):
    optimizer, state = refused(case)
    before, groups = copy.deepcopy(optimizer.tree), copy.deepcopy([{**g, "params": 0} for g in optimizer.param_groups])
    with pytest.raises((StructureError, HyperParameterError), match=REFUSED[case]):
        optimizer.load_state_dict(state)
    assert optimizer.tree == before
    assert [{**g, "params": 0} for g in optimizer.param_groups] == groups


def test_loading_by_order_checks_as_torch_does():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module.parameters())
    with pytest.raises(ValueError, match="loaded state dict has a different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    state = optimizer.state_dict()
    state["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(state)


def test_state_may_be_changed_as_that_of_torch():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    train(module, optimizer, 2)
    first, second, third, _ = module.parameters()
    optimizer.state[first]["state.0"] = torch.zeros_like(first)  # another tensor
    optimizer.state[second]["state.1"].zero_()  # the same, written to
    optimizer.state[third]["state.2.0"].fill_(0.5)  # a number
    assert not optimizer.tree["0.weight"].state[0].any()
    assert not optimizer.tree["0.bias"].state[1].any()
    assert float(optimizer.tree["2.weight"].state[2][0]) == 0.5
    for tensors in optimizer.state.values():  # moving a state to another device is done so
        for key, value in tensors.items():
            tensors[key] = value.clone()
    train(module, optimizer, 1)
    optimizer.state[first]["state.0"] = torch.zeros(1)
    with pytest.raises(StructureError, match=r"parameter '0\.weight': expected state\.0 to be a tensor of shape"):
        optimizer.step()
    optimizer.state[first]["state.0"] = torch.zeros_like(first)
    optimizer.state[first]["mine"] = "kept"
    train(module, optimizer, 1)
    assert optimizer.state[first]["mine"] == "kept"


def test_what_is_taken_out_of_the_state_begins_anew():
    for take_out in (lambda o, p: o.state.pop(p), lambda o, _: o.state.clear(), lambda o, _: setattr(o, "state", {})):
        module = net()
        optimizer = Optimizer(opt.OptimiserChain(opt.AdaDelta()), module)
        fresh = copy.deepcopy(optimizer.tree["0.weight"])
        train(module, optimizer, 2)
        take_out(optimizer, module[0].weight)
        assert optimizer.tree["0.weight"] == fresh


def test_state_can_be_exchanged_as_a_tree():
    module = net()
    optimizer = Optimizer(routed(), module)
    train(module, optimizer, 1)
    optimizer.tree = opt.freeze(opt.adjust(optimizer.tree, times=0.5), where="0.weight")
    assert [group["lr"] for group in optimizer.param_groups] == [0.0005, 0.05, 0.0005]
    before = weights(module)
    train(module, optimizer, 1)
    assert torch.equal(before[0], module[0].weight)
    with pytest.raises(StructureError, match="other parameters, or of other rules"):
        optimizer.tree = opt.setup(opt.AdamW(), module)
    with pytest.raises(ArgumentError, match="must be a state tree; got None"):
        optimizer.tree = None


def test_made_from_a_state_it_goes_on():
    module, other = net(), net()
    state = opt.setup(routed(), module)
    for i in range(2):
        set_grads(module, i)
        state, _ = opt.update_(state, module)
    train(other, Optimizer(routed(), other), 4)
    train(module, Optimizer(state, module), 2, start=2)
    assert same(module, other)
    with pytest.raises(RuleError, match="needs its own"):
        Optimizer(opt.setup(routed(), module), module).add_param_group({"params": [("new", w)]})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(copied):
    module = net()
    optimizer = Optimizer(opt.Muon(), module)
    torch_schedulers.StepLR(optimizer, 3)  # it wraps the optimizer's step
    train(module, optimizer, 2)
    other_module, other = copied((module, optimizer))
    assert other.tree == optimizer.tree
    assert [p is q for p, q in zip(other_module.parameters(), other.param_groups[0]["params"], strict=True)] == [True] * 4
    train(other_module, other, 2, start=2)
    assert not same(module, other_module)
    train(module, optimizer, 2, start=2)
    assert same(module, other_module)
    other.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(2)))]})


def test_pickle_leaves_out_a_function_that_chose_the_rules():
    module = net()
    other = pickle.loads(pickle.dumps(Optimizer(lambda _: opt.AdamW(), module)))
    assert other.param_groups[0]["rule"] == "AdamW"


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    "rule", [opt.AdamW(lambda_=0.1), opt.Descent(), opt.Muon(), routed()], ids=["AdamW", "Descent", "Muon", "Route"]
)
def test_distributed_checkpoint_state_dict(rule, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    module = net()
    optimizer = Optimizer(rule, module)
    before = weights(module)
    get_optimizer_state_dict(module, optimizer, options=options)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))  # no hidden step
    train(module, optimizer, 2)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    state = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=options))
    other = net()
    other.load_state_dict(module.state_dict())
    resumed = Optimizer(rule, reversed(list(other.named_parameters())) if rule != routed() else other)
    set_optimizer_state_dict(other, resumed, state, options=options)
    train(module, optimizer, 2, start=2)
    train(other, resumed, 2, start=2)
    assert same(module, other)


# --- places where a torch.optim.Optimizer is asked for ------------------------------------------------------------------


def test_is_an_optimizer_and_shows_as_one():
    optimizer = Optimizer(opt.AdamW(), net())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "lr: 0.001" in repr(optimizer)
    assert "rule: AdamW" in repr(optimizer)


def test_cycled_momentum_resumes():
    def start():
        module = net()
        optimizer = Optimizer(opt.Nesterov(0.1), module)
        return module, optimizer, torch_schedulers.OneCycleLR(optimizer, 0.1, total_steps=8)

    def go_on(module, optimizer, scheduler, i):
        set_grads(module, i)
        optimizer.step()
        scheduler.step()

    module, optimizer, scheduler = start()
    for i in range(3):
        go_on(module, optimizer, scheduler, i)
    other, resumed, rest = start()
    state = saved(optimizer)
    assert state["param_groups"][0]["momentum"] == state["param_groups"][0]["betas"][0]
    other.load_state_dict(module.state_dict())
    resumed.load_state_dict(state)
    rest.load_state_dict(scheduler.state_dict())
    for i in range(3, 6):
        go_on(module, optimizer, scheduler, i)
        go_on(other, resumed, rest, i)
    assert same(module, other)
    assert optimizer.tree == resumed.tree


def test_loaded_state_goes_to_the_device_of_the_parameter():
    # Accelerate and the Trainer move the model after the optimizer was made, and then load its own state dict.
    module = net()
    optimizer = Optimizer(opt.Momentum(), module)
    for p in module.parameters():
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().to("meta")))
    optimizer.load_state_dict(optimizer.state_dict())
    assert {x.device.type for state in optimizer.state.values() for x in state.values()} == {"meta"}


def test_wrapper_that_passes_attributes_on_shows_what_is():
    class Wrapper:  # as Lightning makes one: an instance of a class derived from the optimizer's, without its attributes
        def __init__(self, wrapped):
            self.wrapped = wrapped
            self.__class__ = type("Wrapped", (Wrapper, type(wrapped)), {})

        def __getattr__(self, name):
            return getattr(self.wrapped, name)

    module = net()
    optimizer = Optimizer(opt.Adam(), module)
    wrapper = Wrapper(optimizer)
    for i in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        assert wrapper.tree is optimizer.tree
        train(module, optimizer, 1, start=i)
        assert torch.equal(wrapper.state[module[0].weight]["state.0"], optimizer.tree["0.weight"].state[0])
        assert wrapper.state_dict()["state"][0].keys() == optimizer.state_dict()["state"][0].keys()


def test_names_and_state_after_extra_state_of_schedulers():
    optimizer = Optimizer(opt.AdamW(), net())
    torch_schedulers.LinearLR(optimizer, 0.5)
    assert optimizer.param_groups[0]["initial_lr"] == 0.001
    other = Optimizer(opt.AdamW(), net())
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["initial_lr"] == 0.001
    assert other.param_groups[0]["lr"] == 0.0005


def test_warns_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = net()
        optimizer = Optimizer(opt.AdamW(), module)
        functools.reduce(lambda _, i: train(module, optimizer, 1, start=i), range(3), None)


def test_state_follows_a_model_that_is_moved_after_construction():
    net = torch.nn.Linear(2, 2)
    optimizer = optimisers.torch.Optimizer(opt.Adam(), net)
    for group in optimizer.param_groups:  # on this device a moved parameter is another object; on others it is the same
        group["params"] = [torch.nn.Parameter(p.detach().to("meta")) for p in group["params"]]
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.tree["weight"].state[0].device.type == "meta"
