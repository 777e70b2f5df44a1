"""One picture of the results: the time of each comparison, relative to the peer's, in four panels."""

import io
import re
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from PIL import Image

from measuring import Row
from pages import SIDES, group, what

LEFT, RIGHT = ("in place",), ("pure", "small", "matrices")
QUICKER, SLOWER = "#0072b2", "#d55e00"  # can be told apart by the colour-blind
SHORTER = (
    ("ClipGrad, SignDecay, WeightDecay, AdamW in a chain", "four in a chain"),
    ("ClipNorm for each array, then AdamW", "ClipNorm, AdamW"),
    ("ClipGlobalNorm, then AdamW", "ClipGlobalNorm, AdamW"),
    (" of 64x64 and 64", ""),
    (" of 1,000 elements", ""),
    (", steady state", ""),
    (", AdamW, a learning rate for each step", ", new rate"),
)


def label(row: Row) -> str:
    """What is compared, in few words."""
    text = what(row).removeprefix("GPT-2, ")
    for long, brief in SHORTER:
        text = text.replace(long, brief)
    text = re.sub(r"^(\w+), 6 x \(.*\)(, 10 steps)?", r"\1, a transformer", text.removesuffix(", AdamW"))
    half = ", bfloat16" if row.ours.endswith("bfloat16") else ""
    return f"{text}{half} / {SIDES.get(row.peer, row.peer)}"


def panel(axes: plt.Axes, title: str, rows: list[Row]) -> None:
    ratios = [row.ratio for row in rows]
    colours = [QUICKER if ratio <= 1 else SLOWER for ratio in ratios]
    axes.hlines(range(len(ratios)), 1, ratios, colors=colours, linewidth=2)
    axes.scatter(ratios, range(len(ratios)), c=colours, s=22)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(ratios)), [label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(ratios) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(min(0.05, *ratios) / 1.2, max(2.0, *ratios) * 1.1)
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"], fontsize=8)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=10, loc="left")


def draw(path: Path, rows: list[Row]) -> None:
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    for side, names in zip(figure.subfigures(1, 2), (LEFT, RIGHT), strict=True):
        shown = {name: group(rows, name) for name in names if group(rows, name)}
        heights = [len(some) + 1.5 for some in shown.values()]
        found = side.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, some) in zip(found, shown.items(), strict=True):
            panel(axes, name, some)
        found[-1].set_xlabel("time of a step, the peer's being 1", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    Image.open(drawn).quantize(64).save(path, optimize=True)  # a fifth of the bytes
