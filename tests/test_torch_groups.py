"""The adapter where groups are not as they were made: frozen ones, options that do nothing, moments that follow parameters."""

import copy
import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import optimisers as opt
import optimisers.torch
from optimisers.errors import HyperParameterError, StructureError, TieError

Optimizer = optimisers.torch.Optimizer


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()


def train(module, optimizer, steps=1, start=0):
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(i)
        for p in module.parameters():
            dx = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = dx if p.requires_grad else None
        optimizer.step()


def same(module, other):
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the state dict says what save says ------------------------------------------------------------------------------

CHANGES = {
    "frozen": (opt.AdamW(), lambda t: opt.freeze(t, where="0.weight")),
    "one parameter": (opt.AdamW(), lambda t: opt.adjust(t, 0.3, where="2.weight")),
    "rate of the fallback": (opt.Muon(), lambda t: opt.adjust(t, eta=0.5, rule=opt.AdamW)),
    "rate inside a chain": (
        opt.OptimiserChain(opt.Momentum(1.0), opt.Descent(0.1)),
        lambda t: opt.adjust(t, eta=0.5, rule=opt.Momentum),
    ),
    "all of it": (opt.Muon(), lambda t: opt.adjust(opt.freeze(t, where="0.bias"), mu=0.5, where="0.weight")),
}


@pytest.mark.parametrize("flat", [None, False, True], ids=["torch", "distributed", "distributed and flat"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_tree_was_given_comes_back(change, flat):
    rule, changed = CHANGES[change]
    module, other = net(), net()
    optimizer, resumed = Optimizer(rule, module), Optimizer(rule, other)
    train(module, optimizer, 2)
    optimizer.tree = changed(optimizer.tree)
    train(module, optimizer, 1, 2)
    other.load_state_dict(module.state_dict())
    if flat is None:
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=options))
        set_optimizer_state_dict(other, resumed, state, options=options)
    assert resumed.tree == optimizer.tree
    train(module, optimizer, 3, 3)
    train(other, resumed, 3, 3)
    assert same(module, other)


def test_an_edited_entry_of_a_state_dict_counts():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(state)
    assert optimizer.tree["0.weight"].rule.eta == 0.5


def test_a_tree_in_another_order_is_taken():
    module = net()
    optimizer = Optimizer(opt.AdamW(), reversed(list(module.named_parameters())))
    train(module, optimizer)
    before = optimizer.tree["0.weight"]
    state = opt.setup(opt.AdamW(0.5), module)
    optimizer.tree = state
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.tree["0.weight"] == state["0.weight"] != before


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_distributed_load_after_a_layer_was_frozen(strict, flat):
    options = StateDictOptions(strict=strict, flatten_optimizer_state_dict=flat)
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    fresh = copy.deepcopy(optimizer.tree["0.weight"])
    train(module, optimizer, 2)
    kept = copy.deepcopy(optimizer.tree["2.weight"])
    module[0].requires_grad_(False)
    state = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=options))
    set_optimizer_state_dict(module, optimizer, state, options=options)
    assert optimizer.tree["2.weight"] == kept
    assert optimizer.tree["0.weight"] == fresh
    train(module, optimizer)


def test_empty_state_of_torch_begins_anew():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    fresh = copy.deepcopy(optimizer.tree)
    train(module, optimizer, 2)
    reference = torch.optim.AdamW(module.named_parameters(), weight_decay=0.0)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.tree == fresh


def test_what_users_put_beside_the_state_is_saved_and_loaded():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    optimizer.state[module[0].weight]["mine"] = torch.ones(1)
    other = Optimizer(opt.AdamW(), module)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.state[module[0].weight]["mine"] == 1
    assert copy.deepcopy((module, other))[1].state_dict()["state"][0]["mine"] == 1


# --- groups ----------------------------------------------------------------------------------------------------------


def test_a_group_that_is_wholly_frozen_is_there_without_parameters():
    module = net()
    module[0].requires_grad_(False)
    parts = [[(f"{i}.{n}", p) for n, p in module[i].named_parameters()] for i in (0, 2)]
    optimizer = Optimizer(opt.AdamW(), [{"params": parts[0], "lr": 0.5}, {"params": parts[1]}])
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(0, 0.5), (2, 0.001)]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=5)  # a rate for each group
    train(module, optimizer, 2)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    module[0].requires_grad_()
    optimizer.param_groups[0]["params"] += [p for _, p in parts[0]]
    train(module, optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias"]
    assert optimizer.tree["0.weight"].rule.eta == optimizer.param_groups[0]["lr"]


def test_frozen_parameters_are_added_without_names():
    module = net()
    module[0].requires_grad_(False)
    optimizer = Optimizer(opt.AdamW(), module)
    module[0].requires_grad_()
    optimizer.add_param_group({"params": list(module[0].parameters()), "lr": 0.3})
    assert optimizer.param_groups[1]["param_names"] == ["0.weight", "0.bias"]


def test_groups_may_be_set_as_a_whole():
    # As Lightning does when it goes on with finetuning: new dicts, and a group whose parameters are frozen at that time.
    module = net()
    module[0].requires_grad_(False)
    optimizer = Optimizer(opt.AdamW(), module)
    head = dict(optimizer.param_groups[0])
    body = {**head, "params": list(module[0].parameters()), "param_names": ["0.weight", "0.bias"], "lr": 0.25}
    optimizer.param_groups = [head, body]
    assert optimizer.tree["0.weight"].rule.eta == 0.25
    state = through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[1] is body


# --- betas that are changed between two steps, beside other changes -----------------------------------------------------

BESIDE = {
    "nothing": lambda _: None,
    "state is read": lambda o: dict(o.state),
    "state_dict": lambda o: o.state_dict(),
    "a group removed": lambda o: o.param_groups.pop(0),
    "a parameter removed": lambda o: o.param_groups[1]["params"].pop(0),
    "parameters reordered": lambda o: o.param_groups[1]["params"].reverse(),
    "groups reordered": lambda o: o.param_groups.reverse(),
    "state deleted": lambda o: o.state.pop(o.param_groups[0]["params"][0]),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_powers_follow_betas_whatever_else_happens_between_two_steps(beside):
    def run(make):
        module = net()
        optimizer = make([{"params": list(module[0].parameters())}, {"params": list(module[2].parameters())}])
        train(module, optimizer, 3)
        BESIDE[beside](optimizer)
        for group in optimizer.param_groups:
            group["betas"] = (0.5, 0.9)
        train(module, optimizer, 3, start=3)
        return module.parameters()

    ours = run(lambda groups: Optimizer(opt.AdamW(0.1), groups))
    theirs = run(lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("removed", [None, 0, 1])
def test_a_group_may_be_removed_while_a_schedule_cycles_the_momentum(removed):
    def run(make):
        module = net()
        optimizer = make([{"params": list(module[0].parameters())}, {"params": list(module[2].parameters())}])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12)
        for i in range(8):
            if i == 3 and removed is not None:
                del optimizer.param_groups[removed]
            train(module, optimizer, start=i)
            dict(optimizer.state)  # reading changes nothing; torch has no state_dict once a group was removed
            scheduler.step()
        return module.parameters()

    ours = run(lambda groups: Optimizer(opt.AdamW(0.1), groups))
    theirs = run(lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


IDLE = {
    "amsgrad": (True, "the rule has no such option"),
    "momentum": (0.9, "the rule has no such option"),
    "eta": (0.1, "here this is 'lr'"),
    "epsilon": (0.1, "here this is 'eps'"),
    "learning_rate": (0.1, "here this is 'lr'"),
    "weigth_decay": (0.1, "perhaps 'weight_decay' is meant"),
    "LR": (0.1, "perhaps 'lr' is meant"),
}


@pytest.mark.parametrize("key", IDLE)
def test_options_that_do_nothing_are_refused(key):
    value, text = IDLE[key]
    message = rf"param_groups\[0\], '{key}'={value} would do nothing for AdamW: {text}"
    with pytest.raises(HyperParameterError, match=message):
        Optimizer(opt.AdamW(), [{"params": net().parameters(), key: value}])
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    optimizer.param_groups[0][key] = value
    with pytest.raises(HyperParameterError, match=message):
        optimizer.step()


@pytest.mark.parametrize("key", ["nesterov", "amsgrad", "momentum", "fused", "initial_lr", "mine"])
def test_options_that_are_off_and_keys_of_others_are_taken(key):
    value = 0.5 if key == "initial_lr" else False
    optimizer = Optimizer(opt.AdamW(), [{"params": net().parameters(), key: value}])
    assert optimizer.param_groups[0][key] == value


def test_learning_rate_as_a_tensor_of_one_element_with_an_axis():
    module, other = net(), net()
    optimizer = Optimizer(opt.AdamW(), [{"params": module.parameters(), "lr": torch.tensor([0.25], dtype=torch.float64)}])
    reference = Optimizer(opt.AdamW(0.25), other)
    train(module, optimizer)
    train(other, reference)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    reference.param_groups[0]["lr"] = 0.5
    train(module, optimizer)
    train(other, reference)
    assert same(module, other)


def test_a_parameter_twice_in_a_group_is_warned_of_and_stepped_once():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = Optimizer(opt.Descent(1.0), [p, p])
    p.grad = torch.ones(2)
    optimizer.step()
    assert not p.any()


# --- moments follow parameters ---------------------------------------------------------------------------------------


def test_moments_follow_parameters_of_one_shape():
    a, b = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = Optimizer(opt.Momentum(), [("a", a), ("b", b)])
    a.grad, b.grad = torch.ones_like(a), 2 * torch.ones_like(b)
    optimizer.step()
    optimizer.param_groups[0]["params"].reverse()
    assert torch.equal(optimizer.state[a]["state"] * 2, optimizer.state[b]["state"])
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["b", "a"]


def steps_of_both(make_ours, make_torchs, program):
    """The parameters after a program, as ours and as torch's optimizer leave them."""
    for make in (make_ours, make_torchs):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(4)]
        optimizer = make([{"params": params[:2]}, {"params": params[2:]}])

        def step(o=optimizer, generator=generator):
            for x in (x for group in o.param_groups for x in group["params"]):
                x.grad = torch.randn(3, generator=generator, dtype=torch.float64)
            o.step()

        program(optimizer, step)
        yield torch.stack([x.detach() for x in params])


@pytest.mark.parametrize("betas", [(0.7, 0.95), (0.0, 0.9), (0.8, 0.0)])
@pytest.mark.parametrize("look", [lambda o: None, lambda o: o.state], ids=["unseen", "seen"])
def test_corrections_follow_the_betas_of_the_group_that_a_parameter_moves_to(betas, look):
    def program(o, step):
        o.param_groups[1]["betas"] = betas
        for start, end in ((0, 1), (1, 0)):
            step()
            step()
            look(o)
            o.param_groups[end]["params"].append(o.param_groups[start]["params"].pop(0))
            step()

    ours, torchs = steps_of_both(
        lambda groups: Optimizer(opt.AdamW(0.01, (0.8, 0.9), 0.1), groups),
        lambda groups: torch.optim.AdamW(groups, 0.01, (0.8, 0.9), weight_decay=0.1),
        program,
    )
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


MOMENTUM = (
    lambda groups: Optimizer(opt.OptimiserChain(opt.Momentum(1.0, 0.7), opt.Descent(0.05)), groups),
    lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.7),
)


@pytest.mark.parametrize("edit", ["delete", "scale", "replace"])
def test_the_state_of_what_is_in_no_group_is_edited_as_torchs(edit):
    def program(o, step):
        step()
        out = o.param_groups[0]["params"].pop(0)
        step()
        (name,) = o.state[out]
        if edit == "delete":
            del o.state[out]
        elif edit == "scale":
            o.state[out][name].mul_(0.5)
        else:
            o.state[out][name] = torch.full_like(out, 0.25)
        step()
        o.state  # noqa: B018 (filled anew)
        o.param_groups[0]["params"].insert(0, out)
        step()
        step()

    ours, torchs = steps_of_both(*MOMENTUM, program)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def test_a_group_without_parameters_keeps_the_momentum_that_a_scheduler_sets():
    def program(o, step):
        step()
        moving = o.param_groups[1]["params"]
        out = moving.pop(0)
        o.param_groups[0]["params"].append(moving.pop(0))
        step()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=8)
        for _ in range(3):
            step()
            scheduler.step()
        o.param_groups[0]["params"].reverse()  # which looks at all groups anew
        step()
        moving.append(out)
        step()
        step()

    ours, torchs = steps_of_both(*MOMENTUM, program)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def test_what_was_taken_out_is_not_kept_alive():
    import gc
    import weakref

    module = net()
    optimizer = Optimizer(opt.AdamW(), list(module.parameters()))
    train(module, optimizer)
    old = optimizer.param_groups[0]["params"][0]
    alive = weakref.ref(old)
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(2))
    del old, module
    optimizer.step()
    assert optimizer.state
    optimizer.step()
    gc.collect()
    assert alive() is None


def test_a_parameter_moved_to_another_kind_of_rule_is_named():
    module = net()
    optimizer = Optimizer(opt.Route(("*.bias", opt.Momentum()), otherwise=opt.AdamW()), module)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    with pytest.raises(StructureError, match=r"'2\.weight' was moved to param_groups\[1\], whose rule is Momentum"):
        optimizer.step()


def test_memory_that_is_shared_with_what_comes_is_told():
    module = net()
    optimizer = Optimizer(opt.AdamW(), module)
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(module[0].weight.detach()))
    with pytest.raises(TieError, match=r"'0\.weight' and '4' share their memory"):
        optimizer.step()


def test_a_shallow_copy_shares_the_state():
    module, other = net(), net()
    optimizer = Optimizer(opt.AdamW(), module)
    handle = copy.copy(optimizer)
    for i, o in enumerate((optimizer, handle, optimizer)):
        train(module, o, 1, i)
    train(other, Optimizer(opt.AdamW(), other), 3)
    assert same(module, other)
