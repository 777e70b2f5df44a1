"""Steps on several ranks: AdamW beside torch's under the same FSDP2, Muon beside one that gathers every matrix on every rank.

    torchrun --nproc-per-node 2 benchmarks/distributed.py

Only the optimizer's step is timed, in alternation, on gradients that stay; the slowest rank counts, medians are compared. A
rank has one thread. ``--dry`` takes two steps each. The bounds are the project's own; the exit status is 1 if one is not met.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import optimisers as opt

WIDTH, LAYERS, VOCABULARY = 384, 6, 4096


class Block(nn.Module):
    """The parameters of a transformer's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)


class Net(nn.Module):
    """The parameters of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))


def model(mesh):
    torch.manual_seed(0)
    net = Net()
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return net


def ours(rule, net):
    state = [opt.setup(rule, net)]

    def step():
        state[0], _ = opt.update_(state[0], net)

    return step


def torch_adamw(net):
    return torch.optim.AdamW(net.parameters(), 1e-3, fused=True).step


def gathering_muon(net):
    """Muon as it is written without shards in mind: momentum here, every matrix put together everywhere; AdamW for the rest."""
    matrices = [p for n, p in net.named_parameters() if p.ndim == 2 and "embedding" not in n]
    chosen = {id(p) for p in matrices}
    rest = torch.optim.AdamW([p for p in net.parameters() if id(p) not in chosen], 1e-3, fused=True)
    momenta = [torch.zeros_like(p) for p in matrices]
    iterate = opt.NewtonSchulz()

    @torch.no_grad()
    def step():
        rest.step()
        for p, m in zip(matrices, momenta, strict=True):
            m.lerp_(p.grad, 0.05)
            whole = m.full_tensor()
            x = whole / (whole.norm() + 1e-7)
            x = x.mT if x.shape[0] > x.shape[1] else x
            for a, b, c in [(3.4445, -4.7750, 2.0315)] * iterate.steps:
                gram = x @ x.mT
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            x = x.mT if whole.shape[0] > whole.shape[1] else x
            direction = torch.distributed.tensor.distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
            p.mul_(1 - 0.02 * 0.01).sub_(direction, alpha=0.02)

    return step


def timed(step):
    dist.barrier()
    start = time.perf_counter()
    step()
    taken = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def compared(name, mine, theirs, bound, rounds):
    for step in (mine, theirs) * 3:
        step()
    times = [(timed(mine), timed(theirs)) for _ in range(rounds)]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    if dist.get_rank() == 0:
        print(f"{name:44} {first * 1e3:8.1f} ms {second * 1e3:8.1f} ms {ratio:6.2f} (at most {bound})", flush=True)
    return ratio <= bound


def main():
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rounds = 2 if "--dry" in sys.argv else 40
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    route = opt.Route((lambda p: p.ndim == 2 and "embedding" not in p.path, opt.Muon(eta=0.02)), otherwise=opt.AdamW(1e-3))
    met = [
        compared(
            "AdamW / torch.optim.AdamW(fused=True)", ours(opt.AdamW(1e-3), model(mesh)), torch_adamw(model(mesh)), 1.15, rounds
        ),
        compared(
            "Muon / every matrix gathered everywhere", ours(route, model(mesh)), gathering_muon(model(mesh)), 0.7, rounds // 2
        ),
    ]
    dist.barrier()  # a rank that leaves while another still talks to it may abort, with torch 2.13
    dist.destroy_process_group()
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
