"""Train a small GPT, byte by byte, on the English prose that ships with Python itself.

    python examples/train_gpt.py                       # about two minutes on two CPU cores
    python examples/train_gpt.py --rule muon --steps 300
    python examples/train_gpt.py --compare             # several rules, see compare_rules.py

The four lines that concern this library are in `train`: `setup` once, then in every step `adjust` (the schedule),
`update_` (the gradients are taken from `.grad`) and `zero_grad`. Everything else is plain PyTorch.
A run is determined by its seed, on one machine and one version of Python (whose documentation is the data).
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no display is needed

import optree
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor, nn
from tqdm import tqdm

import optimisers as opt

VOCABULARY = 256  # a token is a byte


@dataclass(frozen=True)
class Choice:
    """What --rule offers: a rule tree as a function of its learning rate, and the rate it is run with unless told."""

    rule: Callable[[float], opt.AbstractRule | Callable[[opt.Param], opt.AbstractRule]]
    eta: float


def adamw(eta: float) -> opt.AdamW:
    return opt.AdamW(eta, (0.9, 0.99), lambda_=0.1)


def hidden(eta: float, matrix: opt.AbstractRule) -> opt.Route:
    """A rule for the hidden matrices, and AdamW for embeddings, norms and biases."""
    return opt.Route((("embed.*", "head.*", "position"), adamw(eta)), (lambda p: p.ndim < 2, adamw(eta)), otherwise=matrix)


def quarter(eta: float) -> Callable[[opt.Param], opt.AbstractRule]:
    """APOLLO on the hidden matrices, at a rank of a quarter of the shorter side, as the paper has it."""

    def choose(p: opt.Param) -> opt.AbstractRule:
        matrix = p.ndim == 2 and p.path.startswith("blocks.")
        return opt.Apollo(adamw(eta), rank=min(p.shape) // 4, u=200) if matrix else adamw(eta)

    return choose


def clipped(rule: Callable[[float], opt.AbstractRule]) -> Callable[[float], opt.AbstractRule]:
    """The rule behind one clipping over all parameters."""
    return lambda eta: opt.OptimiserChain(opt.ClipGlobalNorm(1.0), rule(eta))


# The name given to --rule.
RULES: dict[str, Choice] = {
    "adamw": Choice(clipped(adamw), 5e-3),
    "adam": Choice(lambda eta: opt.Adam(eta, (0.9, 0.99)), 5e-3),
    "lion": Choice(clipped(opt.Lion), 5e-4),
    "momentum": Choice(opt.Momentum, 0.1),
    "capped-momentum": Choice(lambda eta: opt.OptimiserChain(opt.NormGrowthCap(), opt.Momentum(eta)), 0.1),
    "nesterov": Choice(clipped(opt.Nesterov), 0.1),
    "muon": Choice(lambda eta: hidden(5e-3, opt.Muon(adamw(5e-3), eta)), 0.02),
    "apollo": Choice(quarter, 5e-3),
    "apollo-mini": Choice(lambda eta: hidden(eta, opt.Apollo.mini(adamw(eta), u=200)), 5e-3),
}


# Data


@dataclass(frozen=True)
class Data:
    """Two runs of bytes, each an int64 tensor of shape `(n,)`; the last tenth of the text is held out."""

    train: Tensor
    validation: Tensor


def load_data() -> Data:
    """Python's language reference, without its drawn tables; a paragraph that several topics share is kept once."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    prose = "\n\n".join(p for p in dict.fromkeys(text.split("\n\n")) if "---" not in p).encode()
    tokens = torch.tensor(list(prose))
    cut = len(tokens) * 9 // 10
    return Data(tokens[:cut], tokens[cut:])


def windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both `(len(starts), context)`: the targets are the inputs moved on by one byte."""
    cuts = tokens[starts[:, None] + torch.arange(context + 1)]
    return cuts[:, :-1], cuts[:, 1:]


# Model


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; `(batch, length, width)` in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes `(batch, length)` to logits `(batch, length, 256)`, with `length <= context`."""

    def __init__(self, context: int = 64, width: int = 128, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight  # tied: one array, one state, stepped once
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("proj.weight", "mlp.2.weight"))  # what is added to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; both arguments are `(batch, length)`."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: GPT, tokens: Tensor, context: int, count: int = 64) -> float:
    """The loss over `count` windows spread evenly over `tokens`: the same ones at each call."""
    starts = torch.linspace(0, len(tokens) - context - 1, count).long()
    return loss_of(model, *windows(tokens, starts, context)).item()


@torch.no_grad()
def generate(model: GPT, prompt: str, length: int, seed: int = 0, temperature: float = 0.7) -> str:
    """Continue `prompt` by `length` bytes, each drawn from the model's own distribution."""
    generator = torch.Generator().manual_seed(seed)
    context = model.position.shape[0]
    tokens = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        logits = model(tokens[:, -context:])[:, -1]  # (1, 256)
        probabilities = (logits / temperature).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


# Training


@dataclass
class History:
    """What a run leaves behind: a training loss for each step, a validation loss for each `(step, loss)` measured."""

    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list, compare=False)
    """Time spent on each step, without the measurements."""
    state_bytes: int = 0

    @property
    def final(self) -> float:
        """The last validation loss."""
        return self.validation[-1][1]


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """The factor on every learning rate: linear up over `warmup` steps, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: GPT,
    rule: opt.AbstractRule | Callable[[opt.Param], opt.AbstractRule],
    data: Data,
    *,
    steps: int,
    batch: int,
    seed: int = 0,
    evaluations: int = 20,
    verbose: bool = False,
    progress: bool = False,
    label: str = "",
    spike: int | None = None,
) -> History:
    """Train `model` in place. The batches depend on `seed` alone, so several rules can be shown the same ones.

    At the step `spike`, if given, the gradient is multiplied by 1000, as a broken batch might do.
    """
    context = model.position.shape[0]
    generator = torch.Generator().manual_seed(seed)
    every = max(1, steps // evaluations)
    history = History(validation=[(0, evaluate(model, data.validation, context))])

    state = opt.setup(rule, model)
    if verbose:
        print(state)

    history.state_bytes = sum(leaf.nbytes for leaf in optree.tree_leaves(state))
    bar = tqdm(range(steps), disable=not progress, desc=label or None, leave=not label)
    for step in bar:
        begin = time.perf_counter()
        starts = torch.randint(len(data.train) - context, (batch,), generator=generator)
        loss = loss_of(model, *windows(data.train, starts, context))
        loss.backward()

        if step == spike:
            for p in model.parameters():
                p.grad *= 1000

        state = opt.adjust(state, times=warmup_cosine(step, steps, warmup=max(1, steps // 20)))
        state, _ = opt.update_(state, model)
        model.zero_grad(set_to_none=True)

        history.train.append(loss.item())
        history.step_seconds.append(time.perf_counter() - begin)
        if (step + 1) % every == 0 or step + 1 == steps:
            history.validation.append((step + 1, evaluate(model, data.validation, context)))
        bar.set_postfix(train=f"{history.train[-1]:.3f}", val=f"{history.validation[-1][1]:.3f}")
    return history


def plot(histories: dict[str, History], path: Path) -> None:
    """One colour a run: training loss thin (smoothed over up to 20 steps), validation loss bold."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, (name, history) in enumerate(histories.items()):
        losses = torch.tensor(history.train)
        width = min(20, len(losses))
        axes.plot(
            torch.arange(width, len(losses) + 1).numpy() - width / 2,
            losses.unfold(0, width, 1).mean(1).numpy(),
            color=f"C{colour}", alpha=0.5, linewidth=1, label=f"{name}, training",
        )  # fmt: skip
        axes.plot(*zip(*history.validation, strict=True), "o-", color=f"C{colour}", markersize=3, label=f"{name}, validation")
    axes.set(title="A small GPT on Python's documentation", xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> object:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", choices=RULES, default="adamw")
    parser.add_argument("--compare", nargs="*", choices=RULES, metavar="RULE", help="compare rules (see compare_rules.py)")
    parser.add_argument("--seeds", type=int, default=3, help="of --compare")
    parser.add_argument("--eta", type=float, help="peak learning rate (default: the rule's own)")
    parser.add_argument("--steps", type=int, help="default: 1800, with --compare 400")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: out/train_gpt or out/compare")
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(argv)
    out = args.out or Path("out/train_gpt" if args.compare is None else "out/compare")
    if args.compare is not None:
        from compare_rules import Plan, compare

        def model() -> GPT:
            return GPT(args.context, args.width, args.layers)

        names = args.compare or ["adamw", "muon", "apollo", "apollo-mini"]
        return compare(Plan(load_data(), args.steps or 400, args.batch, model), names, out, args.seeds)

    torch.manual_seed(args.seed)
    model = GPT(args.context, args.width, args.layers)
    choice = RULES[args.rule]
    steps = args.steps or 1800
    begin = time.perf_counter()
    history = train(
        model, choice.rule(args.eta or choice.eta), load_data(), steps=steps, batch=args.batch, seed=args.seed,
        verbose=True, progress=not args.no_progress,
    )  # fmt: skip
    plot({args.rule: history}, out / "loss.png")

    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {steps} steps in {time.perf_counter() - begin:.0f} s")
    print(f"validation loss {history.final:.3f} nats per byte; curves in {out / 'loss.png'}")
    print("--- sample ---")
    print(generate(model, "The ", 400, args.seed))
    return history


if __name__ == "__main__":
    main()
