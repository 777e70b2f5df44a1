"""What the ranks of the distributed tests run: modules under FSDP2, tensor parallelism and DDP, faults, and communication."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import optimisers as opt
from optimisers.engine.memory import writes
from optimisers.engine.shards.exchange import BROKEN
from optimisers.errors import GatherWarning
from optimisers.torch import Optimizer
from sharded import worst

CHAIN = opt.OptimiserChain(opt.ClipGlobalNorm(0.1), opt.SignDecay(1e-3), opt.WeightDecay(0.01), opt.AdamW(0.01))
RULES = {
    "AdamW": opt.AdamW(0.01, (0.9, 0.99), 0.1),
    "chain": CHAIN,
    "Muon": opt.OptimiserChain(opt.ClipNorm(0.5), opt.Muon(eta=0.02), opt.NormGrowthCap(1.01)),
    "Apollo": opt.Apollo(0.01, rank=2),
}


def net():
    torch.manual_seed(0)
    sizes = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False), nn.Linear(5, 1)]
    return nn.Sequential(sizes[0], nn.Tanh(), sizes[1], nn.Tanh(), sizes[2], nn.Tanh(), sizes[3])


def wrapped(how):
    """The net as its users have it on several ranks."""
    module, count = net(), dist.get_world_size()
    if how == "ddp":
        return DistributedDataParallel(module)
    if how == "tensor parallel":
        mesh = init_device_mesh("cpu", (count,))
        return parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if how == "fsdp of tensor parallel":
        mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("dp", "tp"))
        module = parallelize_module(module, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(module, mesh=mesh["dp"])
    shape, names = ((2, count // 2), ("replicate", "shard")) if how == "hsdp" else ((count,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def backward(module, step):
    torch.manual_seed(step)
    batch = torch.randn(8, 6)
    module.zero_grad()
    (module(batch).square().mean() * 10).backward()


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def train(module, rule, *, adapter, steps=5):
    if adapter:
        optimizer = Optimizer(rule, module)
        for step in range(steps):
            backward(module, step)
            optimizer.step()
        return optimizer
    state = opt.setup(rule, module)
    for step in range(steps):
        backward(module, step)
        if step == 2:
            state = opt.adjust(state, 0.005)
        state, _ = opt.update_(state, module)
    return state


def run_module(how, name, adapter):
    """The largest difference to one process's parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GatherWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own collectives
        alone, several = net(), wrapped(how)
        train(alone, RULES[name], adapter=adapter)
        train(several, RULES[name], adapter=adapter)
    return max(worst(whole(q), p.detach()) for p, q in zip(alone.parameters(), several.parameters(), strict=True))


def bfloat16_beside_its_own_error():
    """How far Muon in bfloat16 is from one process's, and how far that is from one in float32."""
    narrow, wide = (opt.Muon(eta=0.02, ns=opt.NewtonSchulz(dtype=dtype)) for dtype in ("bfloat16", "float32"))
    models = [(net(), narrow), (net(), wide), (wrapped("fsdp"), narrow)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module, rule in models:
            train(module, rule, adapter=False)
    alone, exact, several = ([whole(p) for p in module.parameters()] for module, _ in models)
    return max(map(worst, several, alone)), max(map(worst, exact, alone))


# --- faults -----------------------------------------------------------------------------------------------------------------


def small():
    """A model of two arrays cut by rows, and their gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {"w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3)}
    cut = {name: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for name, x in model.items()}
    grads = {name: distribute_tensor(x + 1, mesh, [Shard(0)], src_data_rank=None) for name, x in model.items()}
    return mesh, cut, grads


def spoiled(grads):
    """The same with a NaN in the part of the last rank."""
    grads = {name: g.clone() for name, g in grads.items()}
    if dist.get_rank() == dist.get_world_size() - 1:
        grads["w"].to_local()[-1, -1] = float("nan")
    return grads


def nan_under_throw():
    _, model, grads = small()
    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(1.0), opt.Adam(0.1)), model)
    before = {name: x.to_local().clone() for name, x in model.items()}
    try:
        opt.update_(state, model, spoiled(grads))
    except opt.errors.NonFiniteError as error:
        text = str(error)
    assert all(torch.equal(x.to_local(), before[name]) for name, x in model.items())
    state, model = opt.update_(state, model, grads)
    return text


def nan_under_skip():
    _, model, grads = small()
    state = opt.setup(opt.OptimiserChain(opt.SkipNonFinite(), opt.Adam(0.1)), model)
    before = {name: x.to_local().clone() for name, x in model.items()}
    state, model = opt.update_(state, model, spoiled(grads))
    assert all(torch.equal(x.to_local(), before[name]) for name, x in model.items())
    return opt.skipped(state)


def text_of(function, *arguments):
    """The error that a call raises, as text."""
    try:
        function(*arguments)
    except opt.errors.OptimisersError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def bad_input(what):
    mesh, model, grads = small()
    plain = {name: x.full_tensor() for name, x in model.items()}
    state = opt.setup(opt.Adam(0.1), model)
    if what == "partial parameter":
        partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        return text_of(opt.setup, opt.Adam(0.1), {"w": partial})
    if what == "partial gradient":
        grads["w"] = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    if what == "replicated gradient":
        grads["w"] = grads["w"].redistribute(placements=[Replicate()])
    if what == "plain gradient":
        grads["w"] = torch.ones(4, 3)
    if what == "gradient of another shape":
        grads["w"] = grads["b"]
    if what == "sharded gradient":
        state, model = opt.setup(opt.Adam(0.1), plain), plain
    if what == "resharded":
        model["w"] = model["w"].redistribute(placements=[Replicate()])
    if what == "no longer sharded":
        model["w"] = plain["w"]
    if what == "sharded after setup":
        state = opt.setup(opt.Adam(0.1), plain)
    if what == "disagreement":
        rule = opt.Adam(0.1) if dist.get_rank() == 0 else opt.Adam(0.2)
        return text_of(opt.setup, lambda p: rule if p.path == "w" else opt.Adam(0.1), model)
    if what == "other routes":
        pattern = "w" if dist.get_rank() == 0 else "b"
        return text_of(opt.setup, opt.Route((pattern, opt.Descent(0.1)), otherwise=opt.Adam(0.1)), model)
    if what == "fewer parameters":
        return text_of(opt.setup, opt.Adam(0.1), model if dist.get_rank() == 0 else {"b": model["b"]})
    return text_of(opt.update_, state, model, grads)


# --- communication ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted():
    """Gathers (name, bytes sent) of each collective that the library asks for; elements of arrays that are put together."""
    calls = []
    gather, exchange, full = dist.all_gather_single, dist.all_to_all_single, DTensor.full_tensor

    def whole_asked(x, **options):
        calls.append(("whole", x.numel()))
        return full(x, **options)

    def gathering(output, given, **options):
        calls.append(("gather", given.numel() * given.element_size()))
        return gather(output, given, **options)

    def exchanging(output, given, into, out, **options):
        group = options["group"]
        mine = dist.get_rank(group)
        size = given.element_size()
        calls.append(("exchange", (sum(out) - out[mine]) * size))
        return exchange(output, given, into, out, **options)

    dist.all_gather_single, dist.all_to_all_single, DTensor.full_tensor = gathering, exchanging, whole_asked
    try:
        yield calls
    finally:
        dist.all_gather_single, dist.all_to_all_single, DTensor.full_tensor = gather, exchange, full


def communication(name):
    rules = {
        "elementwise": opt.OptimiserChain(opt.ClipGrad(0.5), opt.WeightDecay(0.1), opt.AdamW(0.1)),
        "one measure": opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.AdamW(0.1)),
        "each its measure": opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW(0.1)),
        "two measures": opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW(0.1), opt.NormGrowthCap(1.1)),
        "Muon": opt.Muon(eta=0.1),
        "Muon in bfloat16": opt.Muon(eta=0.1, ns=opt.NewtonSchulz(dtype="bfloat16")),
    }
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = {str(i): torch.randn(16, 12) for i in range(8)} | {f"b{i}": torch.randn(16) for i in range(3)}
    model = {k: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for k, x in model.items()}
    grads = {k: x * 0.1 for k, x in model.items()}
    state = opt.setup(rules[name], model)
    state, model = opt.update_(state, model, grads)
    with counted() as calls:
        state, model = opt.update_(state, model, grads)
    return calls


def fail_between_out_and_back():
    """(error, what was sent) of a step whose second transform fails, and of the next one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {f"{n} {k}": torch.ones(n, n) for n in (4, 5, 6) for k in range(2)}
    model = {k: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for k, x in model.items()}
    state, told = opt.setup(opt.Muon(eta=0.1), model), []
    state, model = opt.update_(state, model, model)
    transform, at_once = opt.Muon.transform, writes.PORTION

    def failing(rule, u):
        told.append("transform")
        if len(told) == 2:
            raise MemoryError
        return transform(rule, u)

    writes.PORTION = 1
    for function in (failing, transform):
        opt.Muon.transform = function
        with counted() as calls:
            try:
                opt.update_(state, model, model)
            except opt.errors.UnfinishedStepError as error:
                told.append((str(error), [kind for kind, _ in calls]))
    writes.PORTION = at_once
    BROKEN.clear()
    return told


def go_on_without_the_second(file):
    """What torch tells a rank of which the other has died, which is written to a file; the state is as before."""
    _, model, grads = small()
    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(1.0), opt.Adam(0.1)), model)
    if dist.get_rank() == 1:
        os._exit(7)
    before = {name: x.to_local().clone() for name, x in model.items()}
    try:
        opt.update_(state, model, grads)
    except RuntimeError as error:
        own = isinstance(error, opt.errors.OptimisersError)
        same = all(torch.equal(x.to_local(), before[name]) for name, x in model.items())
        Path(file).write_text(f"of torch: {not own}, nothing changed: {same}")
    time.sleep(1000)  # so that the other is seen to be the dead one


def hang_on_the_second():
    if dist.get_rank() == 1:
        time.sleep(1000)


def rank_of():
    return dist.get_rank()
