"""Train the small GPT of train_gpt.py on several processes, its parameters cut over them, and compare with one process.

    torchrun --nproc-per-node 2 examples/distributed_gpt.py                     # under a minute on two CPU cores
    torchrun --nproc-per-node 2 examples/distributed_gpt.py --rule adamw --double

What is particular to several processes is in `train_cut`: `fully_shard` on every block and on the model, and that each rank
takes its own part of a batch. The lines that concern this library are those of train_gpt.py, letter for letter. First every
rank trains the same model on whole batches, alone. The losses are the same but for the order of sums: gradients of parts of a
batch are averaged, and norms of parts of an array added up.

Rules of Adam's kind make that visible: the bias of a key has nothing but rounding errors for its gradient, and they make full
steps of it. So the comparison wants --double for them, in which epsilon is above such gradients.
"""

import argparse
import math
import time
from datetime import timedelta

import optree
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from train_gpt import GPT, RULES, Data, History, load_data, loss_of, train, warmup_cosine, windows

import optimisers as opt

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
"""How far losses may lie apart, relative to the loss: rounding errors grow as a model learns."""


def bytes_here(x: Tensor) -> int:
    """What a tensor takes in this process."""
    return (x.to_local() if isinstance(x, DTensor) else x).nbytes


def mean_over_ranks(x: Tensor) -> float:
    """The mean of a number that each rank has one of."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train_cut(model: GPT, rule: opt.AbstractRule, data: Data, *, steps: int, batch: int, seed: int = 0) -> History:
    """`train` of train_gpt.py on several ranks, without its measurements: the losses are those of whole batches."""
    rank, ranks, context = dist.get_rank(), dist.get_world_size(), model.position.shape[0]
    generator = torch.Generator().manual_seed(seed)  # the same on all ranks, which draw whole batches
    history = History()

    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    state = opt.setup(rule, model)
    history.state_bytes = sum(bytes_here(leaf) for leaf in optree.tree_leaves(state))
    for step in range(steps):
        begin = time.perf_counter()
        starts = torch.randint(len(data.train) - context, (batch,), generator=generator)
        loss = loss_of(model, *windows(data.train, starts.chunk(ranks)[rank], context))
        loss.backward()

        state = opt.adjust(state, times=warmup_cosine(step, steps, warmup=max(1, steps // 20)))
        state, _ = opt.update_(state, model)
        model.zero_grad(set_to_none=True)

        history.train.append(mean_over_ranks(loss))
        history.step_seconds.append(time.perf_counter() - begin)
    return history


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", choices=RULES, default="muon")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="of all ranks together")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--double", action="store_true", help="in float64")
    args = parser.parse_args(argv)

    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    try:
        ranks = dist.get_world_size()
        if args.batch % ranks:
            parser.error(f"--batch {args.batch} cannot be divided among {ranks} ranks")
        data, choice, dtype = load_data(), RULES[args.rule], torch.float64 if args.double else torch.float32
        histories = []
        for run in (train, train_cut):
            torch.manual_seed(args.seed)  # the same weights in both runs, and on all ranks
            model = GPT(args.context, args.width, args.layers).to(dtype)
            rule = choice.rule(choice.eta)
            histories.append(run(model, rule, data, steps=args.steps, batch=args.batch, seed=args.seed))
        dist.barrier()  # nobody leaves while another still talks to it
        if dist.get_rank() == 0:
            report(*histories, ranks, TOLERANCE[dtype])
    finally:
        dist.destroy_process_group()


def report(alone: History, cut: History, ranks: int, tolerance: float) -> None:
    """Print the losses side by side; an error unless they are the same."""
    print(f"step   one process   {ranks} processes   relative difference")
    differences = [abs(a - b) / a for a, b in zip(alone.train, cut.train, strict=True)]
    for step in range(0, len(differences), max(1, len(differences) // 10)):
        print(f"{step + 1:4d}   {alone.train[step]:11.6f}   {cut.train[step]:11.6f}   {differences[step]:19.1e}")
    print(f"bytes of state in a process: {alone.state_bytes:,} alone, {cut.state_bytes:,} of {ranks}")
    worst = max(differences, key=lambda d: math.inf if math.isnan(d) else d)
    if not worst <= tolerance:
        raise SystemExit(f"the losses are up to {worst:.1e} apart, and {tolerance:.0e} is allowed")
    print(f"all {len(differences)} losses are those of one process: at most {worst:.1e} apart, {tolerance:.0e} is allowed")


if __name__ == "__main__":
    main()
