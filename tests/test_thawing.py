"""Parameters that are frozen when the adapter is made, and thawed later, are trained from then on, as by torch."""

import copy
import io

import pytest
import torch

import optimisers as opt
from optimisers.errors import StructureError
from optimisers.torch import Optimizer


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


FORMS = {
    "module": lambda m: m,
    "list": lambda m: list(m.parameters()),
    "groups": lambda m: [{"params": list(m[0].parameters()), "lr": 0.02}, {"params": list(m[2].parameters())}],
    "mixed": lambda m: [{"params": [m[0].weight, m[2].weight]}, {"params": [m[0].bias, m[2].bias], "lr": 0.03}],
}


def ours(params):
    return Optimizer(opt.AdamW(0.01, lambda_=0.1), params)


def theirs(params):
    return torch.optim.AdamW(params.parameters() if isinstance(params, torch.nn.Module) else params, lr=0.01, weight_decay=0.1)


def train(m, optimizer, steps):
    for i in steps:
        optimizer.zero_grad()
        m(torch.full((5, 3), i + 1.0, dtype=torch.float64)).pow(2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("between", ["nothing", "deepcopy", "state dict", "schedule"])
@pytest.mark.parametrize("form", FORMS)
def test_what_thaws_is_trained_as_by_torch(form, between):
    ends = []
    for make in (ours, theirs):
        m = net()
        m[0].requires_grad_(False)
        optimizer = make(FORMS[form](m))
        train(m, optimizer, range(2))
        if between == "deepcopy":
            m, optimizer = copy.deepcopy((m, optimizer))
        m[0].requires_grad_(True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if between == "schedule" else None
        train(m, optimizer, range(2, 4))
        if scheduler:
            scheduler.step()
        if between == "state dict":
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = make(FORMS[form](m))
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        train(m, optimizer, range(4, 6))
        ends.append(list(m.parameters()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_they_have_their_names_and_places():
    m = net()
    m[0].requires_grad_(False)
    optimizer = ours(m)
    m[0].requires_grad_(True)
    assert optimizer.param_groups[0]["param_names"] == ["2.weight", "2.bias"]
    train(m, optimizer, range(1))
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(optimizer.param_groups[0]["params"]) == list(m.parameters())


def test_what_was_put_into_a_group_by_hand_is_there_once():
    m = net()
    m[0].requires_grad_(False)
    optimizer = ours(m)
    m[0].requires_grad_(True)
    optimizer.param_groups[0]["params"] += [m[0].bias, m[0].weight]
    train(m, optimizer, range(2))
    assert optimizer.param_groups[0]["param_names"] == ["2.weight", "2.bias", "0.bias", "0.weight"]


def test_a_scaler_sees_what_thaws():
    m = net()
    m[0].requires_grad_(False)
    optimizer = ours(m)
    m[0].requires_grad_(True)
    m(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert len([x for group in optimizer.param_groups for x in group["params"]]) == 4
    optimizer.zero_grad()
    assert all(x.grad is None for x in m.parameters())


def test_a_frozen_base_costs_nothing():
    m = net()
    m[0].requires_grad_(False)
    optimizer = ours(m)
    train(m, optimizer, range(3))
    assert len(optimizer.state) == 2
    assert len(optimizer.tree) == 2
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_a_route_says_where_what_thaws_belongs():
    m = net()
    m[0].requires_grad_(False)
    rule = opt.Route((lambda p: p.ndim == 1, opt.AdamW(0.1)), (lambda p: p.ndim == 2, opt.Descent(0.1)))
    optimizer = Optimizer(rule, m)
    m[0].requires_grad_(True)
    train(m, optimizer, range(2))
    assert [group["param_names"] for group in optimizer.param_groups] == [["0.weight", "2.weight"], ["0.bias", "2.bias"]]
    assert isinstance(optimizer.tree["0.weight"].rule, opt.Descent)


REFUSED = {
    "of no group": (lambda p: opt.Descent(0.1) if p.ndim == 2 else opt.AdamW(), [2]),
    "no pattern matches": (opt.Route(("2.*", opt.Descent(0.1))), [0, 2]),
    "made from a state": (None, [0, 2]),
}


def test_what_a_function_gives_no_rule_is_not_trained():
    m = net()
    m[0].requires_grad_(False)
    optimizer = Optimizer(lambda p: opt.Descent() if p.path.startswith("2") else None, m)
    m[0].requires_grad_(True)
    before = m[0].weight.detach().clone()
    train(m, optimizer, range(2))
    assert torch.equal(m[0].weight, before)


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_group_is_named_before_anything_is_stepped(why):
    rule, layers = REFUSED[why]
    m = net()
    if why == "of no group":
        m[2].bias.requires_grad_(False)
    m[0].requires_grad_(False)
    optimizer = Optimizer(opt.setup(opt.Descent(), m) if rule is None else rule, m)
    before = copy.deepcopy(m.state_dict())
    for i in layers:
        m[i].requires_grad_(True)
    m(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    with pytest.raises(StructureError, match=rf"^'\d.\w+' has a gradient; .*{why}.*add_param_group"):
        optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in m.state_dict().items())
