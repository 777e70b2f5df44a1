"""What needs processes of its own: first calls, NumPy without torch, memory; and the cost of a leaf."""

import tempfile

import numpy as np

import ours
import peers
from cases import FUSED, OPTAX, OURS, case, gpt2_arrays, gpt2_copy, of
from children import Child, ask
from measuring import Pair, Timing, alternate, build, compare, described, rows_of
from problems import arrays, equal_leaves, gpt2, size


@case("first/2000")
def first_call(settings):
    """Every call is the first of a fresh process, ours with an empty cache."""
    timings, failures = {}, {}
    names = {OURS: "ours:adamw", OPTAX: "optax"}
    for _ in range(1 if settings.quick else 3):
        for side, name in names.items():
            with tempfile.TemporaryDirectory() as cache:
                try:
                    seconds = ask("first", name, "many", OPTIMISERS_CACHE=cache)
                    timings.setdefault(side, Timing()).samples.append(seconds)
                except Exception as error:  # noqa: BLE001
                    failures[side] = described(error)
    pairs = [of("2,000 leaves, AdamW, first call with compilation", OURS, OPTAX, 0.5)]
    return rows_of("first/2000", pairs, timings, failures)


COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000)


@case("slope/adamw")
def slope(settings):
    """Seconds a leaf: the slope of the straight line through the times of all counts."""
    rows, points = [], {OURS: {}, FUSED: {}}
    for count in COUNTS[:: 2 if settings.quick else 1]:
        shapes = equal_leaves(count)
        model, grads = peers.tensors(shapes, 0), peers.tensors(shapes, 1)
        sides, failures = build(
            {
                OURS: lambda m=model, g=grads: ours.in_place(ours.adamw(), m, g),
                FUSED: lambda m=model, g=grads: peers.torch_adamw(m, g, fused=True),
            }
        )
        timings, more = alternate(sides, settings)
        rows += rows_of(
            "slope/count", [of(f"{count:,} leaves of 1,000 elements, AdamW", OURS, FUSED)], timings, failures | more
        )
        for side, timing in timings.items():
            points[side][count] = timing.median
    pair = of("Seconds a leaf, 10 to 10,000 leaves of 1,000 elements, AdamW", OURS, FUSED, 0.6)
    slopes = {side: Timing([np.polyfit(list(by), list(by.values()), 1)[0]]) for side, by in points.items() if len(by) > 1}
    return rows_of("slope/adamw", [pair], slopes, {}) + rows


@case("numpy/gpt2")
def numpy_gpt2(settings):
    """NumPy arrays in this process, and in processes where ``import torch`` fails."""
    model, grads = gpt2_copy()
    gpt2_arrays.cache_clear()
    torch_side, here, absent, plain = (
        "update_, torch",
        "update_, NumPy",
        "update_, NumPy, no torch",
        "update_, NumPy, no compiler",
    )
    children: list[Child] = []

    def child(**environment):
        children.append(Child("numpy:adamw", "gpt2", **environment))
        return children[-1]

    sides = {
        torch_side: lambda: ours.in_place(ours.adamw(), model, grads),
        here: lambda: ours.in_place(ours.adamw(), arrays(gpt2(), 0), arrays(gpt2(), 1)),
        absent: child,
        plain: lambda: child(OPTIMISERS_COMPILE="0"),
    }
    what = "GPT-2, AdamW, NumPy arrays"
    pairs = [
        of(f"{what}, torch installed", here, torch_side, 1.2),
        of(f"{what}, torch absent", absent, torch_side, 6),
        of(f"{what}, torch and a C compiler absent", plain, torch_side),
    ]
    try:
        return compare("numpy/gpt2", sides, pairs, settings)
    finally:
        for process in children:
            process.close()


MEMORY = {
    "ours:adamw": (OURS, "AdamW", 0.05),
    "ours:clip_norm": (OURS, "ClipNorm, AdamW", 0.05),
    "ours:clip_global_norm": (OURS, "ClipGlobalNorm, AdamW", 0.05),
    "ours:chain": (OURS, "ClipGrad, SignDecay, WeightDecay, AdamW", 0.05),
    "ours:adamw:pure": ("update", "AdamW", None),
    "numpy:adamw": ("update_, NumPy", "AdamW", 0.05),
    "torch:fused": (FUSED, "AdamW", None),
    "torch:foreach": ("torch foreach", "AdamW", None),
    "optax": (OPTAX, "AdamW", None),
    "torchopt": ("TorchOpt, functional", "AdamW", None),
}


@case("memory/gpt2")
def memory_gpt2(settings):
    """Bytes beyond model, gradients and state (two moments, so four times the model), over the bytes of the model."""
    rows = []
    count = 4 * size(gpt2())
    sides = list(MEMORY.items())
    for name, (side, rule, bound) in sides[:: 2 if settings.quick else 1]:
        timings, failures = {"the model": Timing([count])}, {}
        try:
            timings[side] = Timing([max(0, ask("peak", name, "gpt2") - 4 * count)])
        except Exception as error:  # noqa: BLE001
            failures[side] = described(error)
        pair = Pair(f"GPT-2, {rule}, extra memory of a step", side, "the model", bound)
        rows += rows_of("memory/gpt2", [pair], timings, failures, unit="B")
    return rows
