"""Steps on a GPU beside torch's own, in one process and in turn, against the targets of this project; under four minutes.

``python benchmarks/gpu.py`` writes ``gpu_results.md`` and ``gpu_results.json``. Two things need no GPU and write nothing:
``--dry`` runs the same on the host, small, to see that it runs; ``--host`` measures what a step costs the host when kernels are
launched that do nothing.
"""

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import optimisers as opt

HERE = Path(__file__).resolve().parent
SECONDS = 210  # in all
ROUNDS = 7

Step = Callable[[], object]


def gpt2(width: int) -> list[tuple[int, ...]]:
    """The shapes of GPT-2's 148 arrays; its width is 768."""
    shapes: list[tuple[int, ...]] = [(50257 * width // 768, width), (width * 4 // 3, width)]
    for _ in range(12):
        shapes += [(width,)] * 4
        for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4)):
            shapes += [(rows * width, columns * width), (rows * width,)]
    return [*shapes, (width,), (width,)]


class Problem(NamedTuple):
    """Arrays to step: their shapes and the device they are on."""

    shapes: list[tuple[int, ...]]
    device: str

    def arrays(self, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
        generator = torch.Generator(device=self.device).manual_seed(seed)
        return [scale * torch.randn(shape, device=self.device, generator=generator) for shape in self.shapes]


def ours(rule: opt.AbstractRule, problem: Problem, verb: Callable = opt.update_) -> Step:
    """A step by this library."""
    model = {str(i): x for i, x in enumerate(problem.arrays(0, 0.02))}
    grads = {str(i): dx for i, dx in enumerate(problem.arrays(1))}
    state = opt.setup(rule, model)

    def step() -> None:
        nonlocal state, model
        state, model = verb(state, model, grads)

    return step


def theirs(make: Callable, problem: Problem, *, clip: bool = False) -> Step:
    """A step by an optimizer of torch, after a clipping by the global norm if that is asked for."""
    parameters = [torch.nn.Parameter(x) for x in problem.arrays(0, 0.02)]
    for p, dx in zip(parameters, problem.arrays(1), strict=True):
        p.grad = dx
    optimizer = make(parameters)

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def fused(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3, fused=True)


def chain() -> opt.AbstractRule:
    return opt.OptimiserChain(opt.ClipGlobalNorm(1.0, throw=False), opt.SignDecay(1e-4), opt.WeightDecay(1e-3), opt.AdamW(3e-4))


class Case(NamedTuple):
    """What is measured: our step, the peer's, and how long ours may take for each second of the peer's."""

    name: str
    peer: str
    target: float | None
    ours: Callable[[], Step]
    theirs: Callable[[], Step]


def cases(device: str, width: int, leaves: int) -> list[Case]:
    model = Problem(gpt2(width), device)
    many = Problem([shape for _ in range(leaves // 2) for shape in ((64, 64), (64,))], device)
    matrices = Problem([s for s in model.shapes if len(s) == 2 and max(s) <= 4 * width], device)
    rank = width // 4
    return [
        Case("GPT-2, AdamW", "AdamW fused", 1.05, lambda: ours(opt.AdamW(1e-3), model), lambda: theirs(fused, model)),
        Case("GPT-2, AdamW by update", "AdamW fused", None, lambda: ours(opt.AdamW(1e-3), model, opt.update),
             lambda: theirs(fused, model)),
        Case("GPT-2, ClipGlobalNorm > SignDecay > WeightDecay > AdamW", "clip_grad_norm_ and AdamW fused", 0.9,
             lambda: ours(chain(), model), lambda: theirs(fused, model, clip=True)),
        Case(f"{leaves} arrays, AdamW", "AdamW fused", 0.6, lambda: ours(opt.AdamW(1e-3), many), lambda: theirs(fused, many)),
        *(
            Case(f"GPT-2, {type(rule).__name__} ({size} bytes of AdamW's 28)", "AdamW fused", 1.1 * size / 28,
                 lambda rule=rule: ours(rule, model), lambda: theirs(fused, model))
            for rule, size in (
                (opt.Lion(1e-4), 20), (opt.Momentum(1e-2), 20), (opt.RMSProp(1e-3), 20), (opt.Descent(1e-2), 12),
                (opt.AMSGrad(1e-3), 36), (opt.AdaGrad(1e-2), 20),
            )
        ),
        Case("GPT-2's matrices, Muon", "torch.optim.Muon", 0.7, lambda: ours(opt.Muon(), matrices),
             lambda: theirs(torch.optim.Muon, matrices)),
        Case(f"GPT-2's matrices, Apollo of rank {rank}", "our AdamW", 1.5,
             lambda: ours(opt.Apollo(opt.AdamW(1e-3), rank), matrices), lambda: ours(opt.AdamW(1e-3), matrices)),
    ]  # fmt: skip


# --- measuring ----------------------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def milliseconds(step: Step, count: int, device: str) -> tuple[float, float]:
    """(one after the other without waiting, time of the host) of so many steps, for each."""
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    host = time.perf_counter() - start
    wait(device)
    return (time.perf_counter() - start) * 1e3 / count, host * 1e3 / count


def launches(step: Step, device: str) -> tuple[int, int]:
    """(kernels, copies) of a step."""
    if device == "cpu":
        return 0, 0
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        wait(device)
    found = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum("Memcpy" in name or "Memset" in name for name in found)
    return len(found) - copies, copies


def compared(case: Case, device: str) -> dict[str, object]:
    """Both steps in turn; medians, and the median of the ratios of neighbours."""
    sides = case.ours(), case.theirs()
    for step in sides:
        for _ in range(4):
            step()
    one = max(milliseconds(step, 2, device)[0] for step in sides)
    count = max(2, min(40, math.ceil(200 / one)))
    rounds = [[milliseconds(step, count, device) for step in sides] for _ in range(ROUNDS)]
    mine, other = ([statistics.median(r[side][k] for r in rounds) for k in (0, 1)] for side in (0, 1))
    kernels, copies = launches(sides[0], device)
    return {
        "case": case.name, "peer": case.peer, "ratio": statistics.median(r[0][0] / r[1][0] for r in rounds),
        "target": case.target, "ms": mine[0], "peer_ms": other[0], "host_ms": mine[1], "peer_host_ms": other[1],
        "kernels": kernels, "copies": copies, "peer_kernels": launches(sides[1], device)[0],
    }  # fmt: skip


def furthest_from_host(device: str) -> dict[str, float]:
    """The greatest difference from the same steps on the host, by rule and dtype. Elementwise rules give the same bits."""
    found = {}
    for name, rule in (("AdamW", opt.AdamW(1e-2)), ("Lion", opt.Lion(1e-3)), ("chain", chain())):
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(1)
            made = [[torch.randn(s, generator=generator).to(dtype) for s in ((33, 40), (5,), (300, 131))] for _ in range(2)]
            ends = []
            for place in ("cpu", device):
                model, grads = ({str(i): x.clone().to(place) for i, x in enumerate(xs)} for xs in made)
                state = opt.setup(rule, model)
                for _ in range(3):
                    state, model = opt.update_(state, model, grads)
                ends.append([x.cpu().double() for x in model.values()])
            found[f"{name}, {dtype}"] = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
    return found


# --- without a GPU ------------------------------------------------------------------------------------------------------------


class Idle:
    """A device on the host whose kernels are launched and do nothing."""

    device = torch.device("cpu")

    def load(self, text: str, names: list[str]) -> list[int]:
        return list(range(len(names))) if text else []

    def stream(self) -> int:
        return 0

    def launch(self, function: int, blocks: int, arguments: int) -> None:
        pass

    def upload(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array.copy())


def host_times() -> None:
    """What steps cost the host: the targets are 0.5 ms for GPT-2's 148 arrays and 7 ms for 2,000."""
    from optimisers.engine.kernels.cuda import devices

    devices.known[Idle.device] = Idle()  # type: ignore[assignment]
    many = [shape for _ in range(1000) for shape in ((4, 4), (4,))]
    for name, shapes, target in (("GPT-2's 148 arrays", gpt2(24), 0.5), ("2000 arrays", many, 7.0)):
        for rule in (opt.AdamW(1e-3), chain()):
            for verb in (opt.update_, opt.update):
                step = ours(rule, Problem(shapes, "cpu"), verb)
                for _ in range(5):
                    step()
                best = min(milliseconds(step, 20, "cpu")[0] for _ in range(ROUNDS))
                told = f"{name:20s} {type(rule).__name__:15s} {verb.__name__:8s} {best:6.3f} ms"
                print(told + f", to be {target} at most" * (isinstance(rule, opt.AdamW) and verb is opt.update_))


# --- reporting ----------------------------------------------------------------------------------------------------------------

HEAD = (
    "| what | beside | ratio | target | ms | peer ms | host ms | peer host ms | kernels, copies | peer kernels |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def line(row: dict) -> str:
    target = "" if row["target"] is None else f"{row['target']:.2f}"
    met = "" if row["target"] is None else " met" if row["ratio"] <= row["target"] else " **not met**"
    times = " | ".join(f"{row[key]:.3f}" for key in ("ms", "peer_ms", "host_ms", "peer_host_ms"))
    return (
        f"| {row['case']} | {row['peer']} | {row['ratio']:.2f} | {target}{met} | {times} | {row['kernels']}, {row['copies']} | "
        f"{row['peer_kernels']} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the host, small, to see that it runs")
    parser.add_argument("--host", action="store_true", help="what a step costs the host; no GPU is needed")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to; without it, this one")
    given = parser.parse_args()
    if given.host:
        host_times()
        return 0
    if not given.dry and not torch.cuda.is_available():
        print("there is no CUDA device; --dry runs on the host")
        return 1
    device = "cpu" if given.dry else "cuda"
    begin = time.monotonic()
    card = "the host" if given.dry else torch.cuda.get_device_name()
    title = f"{card}; torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(title, flush=True)
    warnings.simplefilter("always", opt.errors.CompileWarning)
    differences = furthest_from_host(device)
    print(json.dumps(differences), HEAD, sep="\n", flush=True)
    rows, left = [], []
    for case in cases(device, 48, 40) if given.dry else cases(device, 768, 2000):
        if time.monotonic() - begin > SECONDS:
            left.append(case.name)
            continue
        try:
            rows.append(compared(case, device))
            print(line(rows[-1]), flush=True)
        except Exception as error:  # noqa: BLE001 (the others are still to be measured)
            left.append(f"{case.name}: {type(error).__name__}: {error}")
            print(left[-1], flush=True)
        if not given.dry:
            torch.cuda.empty_cache()
    if left:
        print("not measured:", *left, sep="\n  ")
    if not given.dry:
        result = {"machine": title, "differences_from_host": differences, "rows": rows, "not_measured": left}
        (given.out / "gpu_results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        table = "\n".join([HEAD, *map(line, rows)])
        found = "".join(f"- {name}: {value:.2e}\n" for name, value in differences.items())
        (given.out / "gpu_results.md").write_text(
            f"# On a GPU\n\n{title}. Ratios are times of ours over the peer's, steps one after the other; the peer runs in "
            f"turn in the same process.\n\n{table}\n\nGreatest difference from the host after three steps:\n\n{found}"
            + "".join(f"\nNot measured: {name}\n" for name in left),
            encoding="utf-8",
        )
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
