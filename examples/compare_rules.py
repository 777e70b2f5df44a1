"""Compare rule trees on the small GPT of train_gpt.py: the same weights, the same batches, learning rates from one sweep.

    python examples/train_gpt.py --compare                        # adamw, muon, apollo, apollo-mini; about half an hour
    python examples/train_gpt.py --compare adamw muon --steps 200

For every rule the learning rate is swept over powers of two around its default, on the first seed, until the best one has
a worse neighbour on both sides. Then all seeds are run at the best rate. Last, momentum is run with and without
NormGrowthCap through one step whose gradient is a thousand times too long.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from tqdm import tqdm
from train_gpt import GPT, RULES, Data, History, train


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    data: Data
    steps: int = 400
    batch: int = 16
    model: Callable[[], GPT] = GPT

    def run(self, name: str, eta: float, seed: int, *, spike: int | None = None) -> History:
        """One run from the weights and batches that the seed gives."""
        torch.manual_seed(seed)
        model, rule = self.model(), RULES[name].rule(eta)
        options = {"steps": self.steps, "batch": self.batch, "seed": seed, "spike": spike}
        return train(model, rule, self.data, **options, progress=True, label=f"{name} {eta:g}")


def sweep(plan: Plan, name: str, widest: int = 12) -> dict[float, float]:
    """Learning rate -> final validation loss, over powers of two until the best has a worse neighbour on both sides."""
    start = RULES[name].eta
    losses = {eta: plan.run(name, eta, seed=0).final for eta in (start / 2, start, start * 2)}
    for _ in range(widest):
        best = min(losses, key=losses.__getitem__)
        wanted = [eta for eta in (best / 2, best * 2) if eta not in losses]
        if not wanted:
            break
        losses |= {eta: plan.run(name, eta, seed=0).final for eta in wanted}
    return dict(sorted(losses.items()))


def pace(plan: Plan, best: dict[str, float], rounds: int = 15) -> dict[str, float]:
    """Seconds a training step takes with each rule: the rules in turn, four steps each, medians over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in best}
    for seed in range(rounds):
        for name, eta in best.items():
            torch.manual_seed(seed)
            model, rule = plan.model(), RULES[name].rule(eta)
            history = train(model, rule, plan.data, steps=4, batch=plan.batch, seed=seed, evaluations=1)
            times[name].append(statistics.median(history.step_seconds))
    return {name: statistics.median(values) for name, values in times.items()}


def reached(history: History, loss: float) -> int | None:
    """The first step at which the validation loss, read linearly between measurements, is at most this."""
    for (a, high), (b, low) in zip(history.validation, history.validation[1:], strict=False):
        if low <= loss:
            return b if high <= low else round(a + (b - a) * (high - loss) / (high - low))
    return None


def compare(plan: Plan, names: list[str], out: Path, seeds: int = 3) -> dict[str, object]:
    """Sweep, run all seeds, draw, and return what was measured (also written to ``results.json``)."""
    out.mkdir(parents=True, exist_ok=True)
    sweeps = {name: sweep(plan, name) for name in tqdm(names, desc="sweeps")}
    best = {name: min(losses, key=losses.__getitem__) for name, losses in sweeps.items()}
    runs = {name: [plan.run(name, best[name], seed) for seed in range(seeds)] for name in names}
    paces = pace(plan, best)
    rows = table(runs, best, paces)
    draw(runs, best, paces, out / "comparison.png")
    spiked = spike_test(plan, out / "spike.png")
    results = {"steps": plan.steps, "batch": plan.batch, "sweeps": sweeps, "rows": rows, "spike": spiked}
    (out / "results.json").write_text(json.dumps({**results, "runs": {k: [asdict(h) for h in v] for k, v in runs.items()}}))
    print_table(rows)
    print("the sweeps, learning rate: final validation loss")
    for name, losses in sweeps.items():
        print(f"  {name:12}", ", ".join(f"{eta:g}: {loss:.3f}" for eta, loss in losses.items()))
    print("one gradient times 1000 at half-way; validation loss before, at its worst after, and at the end")
    for name, (before, worst, final) in spiked.items():
        print(f"  {name:22} {before:.3f}  {worst:.3f}  {final:.3f}")
    return results


def table(runs: dict[str, list[History]], best: dict[str, float], paces: dict[str, float]) -> list[dict[str, object]]:
    """One row a rule; the first rule is what the others are measured against."""
    reference = next(iter(runs.values()))
    rows = []
    for name, histories in runs.items():
        finals = [history.final for history in histories]
        # Seed by seed, so that the same weights and batches are compared.
        steps = [reached(h, r.final) for h, r in zip(histories, reference, strict=True)]
        share = [s / r.validation[-1][0] for s, r in zip(steps, reference, strict=True) if s is not None]
        rows.append(
            {
                "rule": name,
                "eta": best[name],
                "final": statistics.mean(finals),
                "finals": finals,
                "share of steps": max(share) if len(share) == len(histories) else None,
                "ms a step": 1000 * paces[name],
                "state bytes": histories[0].state_bytes,
            }
        )
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """The rows as a Markdown table."""
    first = rows[0]
    print(f"| rule | eta | final loss (mean, each seed) | steps to {first['rule']}'s final loss | ms a step | state bytes |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        each = ", ".join(f"{loss:.3f}" for loss in row["finals"])
        share = "not reached" if row["share of steps"] is None else f"{row['share of steps']:.0%}"
        size = f"{row['state bytes']:,} ({row['state bytes'] / first['state bytes']:.0%})"
        print(f"| {row['rule']} | {row['eta']:g} | {row['final']:.3f} ({each}) | {share} | {row['ms a step']:.0f} | {size} |")


def draw(runs: dict[str, list[History]], best: dict[str, float], paces: dict[str, float], path: Path) -> None:
    """Validation loss against steps and seconds (steps times the pace), and the bytes of state; thin lines are single seeds."""
    figure, (steps, seconds, memory) = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for colour, (name, histories) in enumerate(runs.items()):
        at = [step for step, _ in histories[0].validation]
        mean = [statistics.mean(losses) for losses in zip(*([v for _, v in h.validation] for h in histories), strict=True)]
        for axes, unit in ((steps, 1.0), (seconds, paces[name])):
            for history in histories:
                axes.plot(
                    [s * unit for s in at], [v for _, v in history.validation], color=f"C{colour}", alpha=0.3, linewidth=0.8
                )
            axes.plot([s * unit for s in at], mean, color=f"C{colour}", label=f"{name}, eta {best[name]:g}")
        memory.bar(name, histories[0].state_bytes / 2**20, color=f"C{colour}")
    for axes, unit in ((steps, "step"), (seconds, "seconds of training")):
        axes.set(xlabel=unit, ylabel="validation loss (nats per byte)", ylim=(None, 3.5))
        axes.grid(alpha=0.3)
        axes.legend()
    memory.set(ylabel="optimiser state (MiB)")
    memory.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def spike_test(plan: Plan, path: Path) -> dict[str, tuple[float, float, float]]:
    """Momentum with and without NormGrowthCap, one gradient times 1000: loss before it, worst after it, and at the end."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    at = plan.steps // 2
    found = {}
    for name in ("momentum", "capped-momentum"):
        history = plan.run(name, RULES[name].eta, seed=0, spike=at)
        before = [loss for step, loss in history.validation if step <= at]
        after = [loss for step, loss in history.validation if step > at]
        found[name] = (before[-1], max(after), after[-1])
        axes.plot(*zip(*history.validation, strict=True), "o-", markersize=3, label=name)
    axes.axvline(at, color="grey", linestyle=":", label="one gradient times 1000")
    axes.set(xlabel="step", ylabel="validation loss (nats per byte)", yscale="log", title="What a cap on norm growth is for")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return found
