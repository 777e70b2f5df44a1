"""Random programs on the adapter and on ``torch.optim``: whatever a training script does, the parameters are the same.

``OPTIMISERS_PROGRAMS=5000`` runs as many of each kind.
"""

import copy
import io
import os
import pickle
import random
import tempfile

import pytest
import torch

import optimisers as opt
import optimisers.torch

COUNT = int(os.environ.get("OPTIMISERS_PROGRAMS", "60"))
SHAPES = [(3,), (2, 2), (3, 2), (2, 2)]


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.05, momentum=0.7, weight_decay=0.1)


OURS = {
    "AdamW": (adamw, opt.AdamW(0.01, (0.8, 0.9), 0.1), {"exp_avg": "state.0", "exp_avg_sq": "state.1"}),
    # torch multiplies by the learning rate what leaves the momentum.
    "SGD": (
        sgd,
        opt.OptimiserChain(opt.WeightDecay(0.1), opt.Momentum(1.0, 0.7), opt.Descent(0.05)),
        {"momentum_buffer": "state.1"},
    ),
}


SCHEDULERS = [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda t: 1 / (1 + t)] * len(o.param_groups)),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5, eta_min=1e-4),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=8),
]


def saved(o):
    """A state dict of its own. torch's own fails on states of what is in no group, which are let go of before."""
    here = {x for group in o.param_groups for x in group["params"]}
    for x in [x for x in o.state if x not in here]:
        del o.state[x]
    return copy.deepcopy(o.state_dict())


class Pair:
    """A program as it runs on both sides at once."""

    def __init__(self, kind, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        make, rule, self.names = OURS[kind]
        starts = [[self.values(self.random.choice(SHAPES)) for _ in range(self.random.randint(1, 3))] for _ in range(2)]
        groups = [[{"params": [self.parameter(x) for x in part]} for part in starts] for _ in range(2)]
        self.sides = [optimisers.torch.Optimizer(rule, groups[0]), make(groups[1])]
        self.parked = []

    def values(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def parameter(self, values):
        return torch.nn.Parameter(values.clone())

    def pairs(self):
        a, b = ([x for group in o.param_groups for x in group["params"]] for o in self.sides)
        return list(zip(a, b, strict=True))

    def place(self):
        places = [(i, j) for i, group in enumerate(self.sides[0].param_groups) for j in range(len(group["params"]))]
        return self.random.choice(places) if places else None

    # --- what a program may do ---

    def step(self):
        closure = self.random.random() < 0.2
        for a, b in self.pairs():
            if a.requires_grad and self.random.random() < 0.85:
                a.grad = self.values(a.shape)
                b.grad = a.grad.clone()
        for o in self.sides:
            if closure:
                assert o.step(lambda: 3.0) == 3.0
            else:
                o.step()

    def zero_grad(self):
        to_none = self.random.random() < 0.5
        for o in self.sides:
            o.zero_grad(set_to_none=to_none)

    def exchange(self):
        if place := self.place():
            i, j = place
            x = self.values(self.random.choice(SHAPES))
            carried = self.random.random() < 0.5
            for o in self.sides:
                old = o.param_groups[i]["params"][j]
                new = self.parameter(x if not carried else old.detach() + 1)
                state = o.state.get(old)
                o.state.pop(old, None)
                o.param_groups[i]["params"][j] = new
                if carried and state:
                    o.state[new] = state

    def grow(self):
        """As a cloud of points is made denser: the parameter and its moments get more rows."""
        if place := self.place():
            i, j = place
            if not self.sides[1].state.get(self.sides[1].param_groups[i]["params"][j]):
                return
            for o, names in zip(self.sides, (self.names.values(), self.names), strict=True):
                old = o.param_groups[i]["params"][j]
                state = o.state[old]
                del o.state[old]
                for name in names:
                    state[name] = torch.cat([state[name], torch.zeros_like(state[name][:1])])
                new = self.parameter(torch.cat([old.detach(), torch.ones_like(old[:1])]))
                o.param_groups[i]["params"][j] = new
                o.state[new] = state

    def reorder(self):
        for_groups, seed = self.random.random() < 0.4, self.random.random()
        for o in self.sides:
            rows = o.param_groups if for_groups else self.random_group(o)["params"]
            random.Random(seed).shuffle(rows)
            self.again(o)

    def random_group(self, o):
        return o.param_groups[len(self.parked) % len(o.param_groups)]

    def again(self, o):
        """A new list in the place of the old, now and then."""
        if len(self.parked) % 2:
            o.param_groups[0]["params"] = list(o.param_groups[0]["params"])

    def remove(self):
        place = self.place()
        if place and len(self.pairs()) > 1:
            i, j = place
            self.parked.append([o.param_groups[i]["params"].pop(j) for o in self.sides])

    def put_back(self):
        if self.parked:
            i = self.random.randrange(len(self.sides[0].param_groups))
            for o, x in zip(self.sides, self.parked.pop(), strict=True):
                o.param_groups[i]["params"].append(x)

    def move(self):
        if (place := self.place()) and len(self.sides[0].param_groups) > 1:
            i, j = place
            to = self.random.randrange(len(self.sides[0].param_groups))
            for o in self.sides:
                o.param_groups[to]["params"].append(o.param_groups[i]["params"].pop(j))

    def append(self):
        i, x = self.random.randrange(len(self.sides[0].param_groups)), self.values(self.random.choice(SHAPES))
        for o in self.sides:
            o.param_groups[i]["params"].append(self.parameter(x))

    def add_group(self):
        x, lr = self.values(self.random.choice(SHAPES)), self.random.choice([0.0, 0.02])
        for o in self.sides:
            o.add_param_group({"params": [self.parameter(x)], "lr": lr})

    def remove_group(self):
        if len(self.sides[0].param_groups) > 1 and not self.schedulers():
            i = self.random.randrange(len(self.sides[0].param_groups))
            left = sum(len(g["params"]) for j, g in enumerate(self.sides[0].param_groups) if j != i)
            if left:
                for o in self.sides:
                    del o.param_groups[i]

    def schedulers(self):
        return getattr(self, "scheduled", None)

    def option(self):
        i = self.random.randrange(len(self.sides[0].param_groups))
        own = [("betas", (0.7, 0.95)), ("betas", (0.0, 0.9)), ("eps", 1e-3)] if "exp_avg" in self.names else [("momentum", 0.4)]
        common = [("lr", 0.03), ("lr", 0.0), ("weight_decay", 0.2), ("maximize", True), ("mine", 3)]
        key, value = self.random.choice([*common, *own])
        for o in self.sides:
            o.param_groups[i][key] = value

    def edit_state(self):
        if place := self.place():
            i, j = place
            way = self.random.choice(["delete", "scale", "replace"])
            if not self.sides[1].state.get(self.sides[1].param_groups[i]["params"][j]):
                return
            for o, names in zip(self.sides, (self.names.values(), self.names), strict=True):
                x = o.param_groups[i]["params"][j]
                if way == "delete":
                    del o.state[x]
                    continue
                name = next(iter(names))
                if way == "scale":
                    o.state[x][name].mul_(0.5)
                else:
                    o.state[x][name] = torch.full_like(o.state[x][name], 0.25)

    def freeze(self):
        if place := self.place():
            i, j = place
            frozen = self.random.random() < 0.5
            for o in self.sides:
                x = o.param_groups[i]["params"][j]
                x.requires_grad_(not frozen)
                if frozen:
                    x.grad = None

    def save_and_load(self):
        way = self.random.choice(["state_dict", "deepcopy", "pickle", "copy"])
        for i, o in enumerate(self.sides):
            parked = [pair[i] for pair in self.parked]
            if way == "state_dict":
                file = io.BytesIO()
                torch.save(saved(o), file)
                file.seek(0)
                o.load_state_dict(torch.load(file, weights_only=True))
                continue
            if way == "copy":
                self.sides[i] = copy.copy(o)
                continue
            both = copy.deepcopy((o, parked)) if way == "deepcopy" else pickle.loads(pickle.dumps((o, parked)))
            self.sides[i], kept = both
            for pair, x in zip(self.parked, kept, strict=True):
                pair[i] = x

    def edit_after_looking(self):
        """What was read or saved between a step and an edit is not used by the next step."""
        look = self.random.choice([lambda o: o.state, saved, copy.copy])
        for o in self.sides:
            look(o)
        self.option()

    def file(self):
        """The state tree by way of a file, as torch's optimizer by its state dict."""
        mine, other = self.sides
        with tempfile.TemporaryDirectory() as folder:
            opt.save(f"{folder}/state", mine.tree)
            mine.tree = opt.load(f"{folder}/state", like=mine.tree)
        mine.load_state_dict(saved(mine))
        other.load_state_dict(saved(other))

    def resume_a_schedule(self):
        """Steps under a scheduler that is made anew in the middle, from its own state dict and the optimizer's."""
        make = self.random.choice(SCHEDULERS)
        schedulers = [make(o) for o in self.sides]
        for t in range(6):
            self.step()
            for scheduler in schedulers:
                scheduler.step()
            self.check()
            if t == 2:
                for i, (o, old) in enumerate(zip(self.sides, schedulers, strict=True)):
                    kept = saved(o), {k: v for k, v in old.state_dict().items() if k != "_anneal_func_type"}
                    schedulers[i] = make(o)
                    o.load_state_dict(kept[0])
                    schedulers[i].load_state_dict(kept[1])

    def look(self):
        assert len(self.sides[0].state) >= len(self.pairs())
        assert self.sides[0].tree is not None

    def schedule(self):
        for o in self.sides:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(o, 0.9)
            o.step()
            scheduler.step()

    def check(self):
        for a, b in self.pairs():
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


ACTIONS = [
    "zero_grad", "exchange", "grow", "reorder", "remove", "put_back", "move", "append", "add_group", "remove_group", "option",
    "edit_state", "freeze", "save_and_load", "look", "schedule", "edit_after_looking", "file", "resume_a_schedule",
]  # fmt: skip


def run(kind, seed):
    pair, done = Pair(kind, seed), []
    for _ in range(12):
        for action in ("step", pair.random.choice(ACTIONS)):
            done.append(action)
            try:
                getattr(pair, action)()
                pair.check()
            except Exception as error:
                error.add_note(f"program {kind} {seed}: {', '.join(done)}")
                raise


@pytest.mark.parametrize("kind", OURS)
def test_programs_end_where_torch_ends(kind):
    for seed in range(COUNT):
        run(kind, seed)


# --- several rules at once, against a state for each parameter on its own -------------------------------------------------

ROUTED = opt.Route(
    (lambda p: p.ndim == 2, opt.Muon(ns=opt.NewtonSchulz(dtype="float64"))), otherwise=opt.AdamW(0.01, lambda_=0.1)
)


class Alone:
    """What steps one parameter, in no company."""

    def __init__(self, x):
        self.x = x.detach().clone()
        self.state = opt.setup(
            opt.Muon(ns=opt.NewtonSchulz(dtype="float64")) if x.ndim == 2 else opt.AdamW(0.01, lambda_=0.1), self.x
        )

    def step(self, dx, eta):
        self.state, self.x = opt.update(opt.adjust(self.state, eta), self.x, dx)


def run_routed(seed):
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def parameter(ndim):
        return torch.nn.Parameter(torch.randn([(), (3,), (4, 2)][ndim], generator=generator, dtype=torch.float64))

    params = [(f"p{i}", parameter(1 + i % 2)) for i in range(5)]
    optimizer = optimisers.torch.Optimizer(ROUTED, params)
    alone = {x: Alone(x) for _, x in params}
    out = []
    for _ in range(12):
        group = choose.choice(optimizer.param_groups)
        here = group["params"]
        action = choose.choice(["reorder", "groups", "exchange", "remove", "put back", "reset", "rate", "load"])
        if action == "reorder":
            choose.shuffle(here)
        elif action == "groups":
            optimizer.param_groups.reverse()
        elif action == "exchange" and here:
            here[0] = parameter(here[0].ndim)
            alone[here[0]] = Alone(here[0])
        elif action == "remove" and len(here) > 1:
            out.append((group, here.pop()))
        elif action == "put back" and out:
            home, x = out.pop()
            home["params"].append(x)
        elif action == "reset" and here:
            del optimizer.state[here[-1]]
            alone[here[-1]] = Alone(alone[here[-1]].x)
        elif action == "rate":
            group["lr"] = choose.choice([0.0, 0.02, 0.5])
        elif action == "load" and not out:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in optimizer.param_groups:
            for x in group["params"]:
                x.grad = torch.randn(x.shape, generator=generator, dtype=x.dtype) if choose.random() < 0.9 else None
                if x.grad is not None:
                    alone[x].step(x.grad, group["lr"])
        optimizer.step()
        for group in optimizer.param_groups:
            for x in group["params"]:
                torch.testing.assert_close(x.detach(), alone[x].x, rtol=1e-12, atol=1e-12, msg=f"{seed} {action}")


def test_programs_over_several_rules_step_each_parameter_as_if_alone():
    for seed in range(COUNT // 4):
        run_routed(seed)
