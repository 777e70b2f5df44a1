"""What the ranks of the distributed tests run: options of FSDP2 and DDP, and what a step holds in memory at most."""

from __future__ import annotations

import contextlib
import gc
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import optimisers as opt
from optimisers.torch import Optimizer
from sharded import worst
from sharded_models import RULES, net, whole

OPTIONS = {
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "mixed precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "not resharded": {"reshard_after_forward": False},
}


def cut(**options):
    module, mesh = net(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


def loss_of(module, step):
    torch.manual_seed(step)
    return module(torch.randn(8, 6)).float().square().mean() * 10


def beside_one_process(module, trained, rule, backward, *, adapter):
    """The largest difference after four steps of ``trained`` to a process that is given the same gradients whole."""
    alone = dict(net().named_parameters())
    single, optimizer = opt.setup(rule, alone), Optimizer(rule, trained) if adapter else None
    state = None if adapter else opt.setup(rule, module)
    before = torch.cat([p.detach().flatten() for p in alone.values()])
    for step in range(4):
        trained.zero_grad()
        backward(step)
        grads = {name: whole(p.grad) for name, p in module.named_parameters()}
        single, alone = opt.update_(single, alone, grads)
        if optimizer is not None:
            optimizer.step()
        else:
            state, _ = opt.update_(state, module)
    assert worst(torch.cat([p.detach().flatten() for p in alone.values()]), before) > 1e-3
    return max(worst(whole(p), alone[name].detach()) for name, p in module.named_parameters())


def run_option(name, rule, adapter):
    module = cut(**OPTIONS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own collectives
        warnings.simplefilter("ignore", UserWarning)
        return beside_one_process(module, module, RULES[rule], lambda step: loss_of(module, step).backward(), adapter=adapter)


def run_compiled(rule):
    torch._dynamo.reset()
    module = cut()
    compiled = torch.compile(module, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = beside_one_process(module, compiled, RULES[rule], lambda step: loss_of(compiled, step).backward(), adapter=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    return found


def run_accumulated(how, rule):
    """Two small batches, of which only the second is summed over ranks; beside one process that has both."""
    ddp = how == "ddp"
    module = DistributedDataParallel(net(), gradient_as_bucket_view=True) if ddp else cut()
    optimizer, alone = Optimizer(RULES[rule], module), net()
    single = Optimizer(RULES[rule], alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for step in range(4):
            optimizer.zero_grad()
            single.zero_grad()
            for micro in range(2):
                if ddp:
                    module.require_backward_grad_sync = micro == 1
                else:
                    module.set_requires_gradient_sync(micro == 1)
                loss_of(module, 2 * step + micro).backward()
                loss_of(alone, 2 * step + micro).backward()
            optimizer.step()
            single.step()
    return max(worst(whole(q), p.detach()) for p, q in zip(alone.parameters(), module.parameters(), strict=True))


def run_bucket_views(rule, set_to_none, adapter):
    module = DistributedDataParallel(net(), gradient_as_bucket_view=True)
    zero = module.zero_grad
    module.zero_grad = lambda: zero(set_to_none=set_to_none)
    inner = module.module

    def backward(step):
        loss_of(module, step).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = beside_one_process(inner, module, RULES[rule], backward, adapter=adapter)
    buckets = {p.grad.untyped_storage().data_ptr() for p in inner.parameters()}
    assert len(buckets) < len(list(inner.parameters()))  # gradients do lie in buckets
    return found


# --- memory -------------------------------------------------------------------------------------------------------------------


def held():
    """The bytes of all tensors of this process, each memory once."""
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@contextlib.contextmanager
def most_held():
    """Gathers how many bytes of tensors there are while matrices travel, beyond those at its begin."""
    found, before, exchange = [], held(), dist.all_to_all_single

    def exchanging(*given, **options):
        found.append(held() - before)  # with the memory for what comes
        exchange(*given, **options)

    dist.all_to_all_single = exchanging
    try:
        yield found
    finally:
        dist.all_to_all_single = exchange


def memory_of_muon(count, shapes):
    """(bytes that a step in place holds at most while matrices travel, of this rank's share, of the largest stack)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole_model = {f"{i} {k}": torch.randn(shape) for i, shape in enumerate(shapes) for k in range(count)}
    model = {name: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for name, x in whole_model.items()}
    grads = {name: x * 0.1 for name, x in model.items()}
    del whole_model
    state = opt.setup(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Muon(eta=0.1)), model)
    state, model = opt.update_(state, model, grads)

    with most_held() as found:
        opt.update_(state, model, grads)
    sizes = [4 * count * rows * columns for rows, columns in shapes]
    return max(found), sum(sizes) // dist.get_world_size(), max(sizes)
