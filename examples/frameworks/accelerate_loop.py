"""Hugging Face Accelerate: Muon on the matrices of a small convolutional network, momentum elsewhere, one-cycle schedule.

    python examples/frameworks/accelerate_loop.py
    python examples/frameworks/accelerate_loop.py --resume out/accelerate/20

It is an ordinary loop of Accelerate's; what concerns this library is the two lines after `rule`.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import optimisers as opt
from optimisers.torch import Optimizer


def digits() -> TensorDataset:
    """Images `(1797, 1, 8, 8)` of handwritten digits, and which digit each is."""
    data = load_digits()
    return TensorDataset(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10),
    )  # fmt: skip


def train(
    out: Path, *, epochs: int = 2, batch: int = 64, accumulate: int = 1, every: int = 20, resume: Path | None = None
) -> tuple[list[float], nn.Module, Optimizer]:
    """The loss at every batch, the network, and its optimizer.

    every: batches between checkpoints, a multiple of accumulate, because gradients are not saved.
    """
    set_seed(0)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        # A shuffle that depends on the seed and the epoch alone: without it a resumed run has another order.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    model = network()
    # With a generator of its own, a loader that is begun anew draws nothing from the one that dropout uses.
    loader = DataLoader(digits(), batch_size=batch, shuffle=True, drop_last=True, generator=torch.Generator())
    steps = epochs * math.ceil(len(loader) / accumulate)  # the last batch of an epoch always makes a step

    rule = opt.Route(
        (("10.*", nn.BatchNorm2d), opt.Nesterov(0.05)),  # the classes' own weights, and the norms
        otherwise=opt.Muon(opt.Nesterov(0.05), eta=0.02),  # a convolution is a matrix, (out, in * height * width)
    )
    optimizer = Optimizer(rule, model)
    peaks = [group["lr"] for group in optimizer.param_groups]  # one group for each distinct rule
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps)  # it cycles the momentum too

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    done = 0
    if resume is not None:
        accelerator.load_state(resume)
        done = int(resume.name)  # batches, as the checkpoints below are named

    losses = []
    for epoch in range(done // len(loader), epochs):
        loader.set_epoch(epoch)
        skip = done % len(loader) if epoch == done // len(loader) else 0
        for images, labels in accelerator.skip_first_batches(loader, skip) if skip else loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            done += 1
            if done % every == 0:
                accelerator.save_state(out / str(done))
    return losses, accelerator.unwrap_model(model), optimizer.optimizer


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--out", type=Path, default=Path("out/accelerate"))
    args = parser.parse_args(argv)
    losses, _, optimizer = train(
        args.out, epochs=args.epochs, accumulate=args.accumulate, every=10 * args.accumulate, resume=args.resume
    )
    for group in optimizer.param_groups:
        print(f"{group['rule']}: {', '.join(group['param_names'])}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} batches; checkpoints in {args.out}")
    return losses[-1]


if __name__ == "__main__":
    main()
