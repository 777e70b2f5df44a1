"""The results as a table, as JSON and as a picture."""

import dataclasses
import json
import os
import platform
from importlib import metadata
from pathlib import Path

from measuring import Row, Settings

LIBRARIES = ("numpy", "torch", "jax", "jaxlib", "optax", "torchopt", "pytorch-optimizer", "heavyball", "optree")


def surroundings() -> dict[str, str]:
    """The machine, and the versions of everything that is compared."""
    found = {
        "processor": in_cpuinfo("model name") or platform.machine(),
        "bfloat16 in hardware": "yes" if {"avx512_bf16", "amx_bf16"} & set(in_cpuinfo("flags").split()) else "no",
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        found["load before"] = f"{os.getloadavg()[0]:.1f}"
    for library in ("optimisers", *LIBRARIES):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def in_cpuinfo(key: str) -> str:
    """What Linux says of the processor under this key; empty where it says nothing."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for text in information.read_text().splitlines():
            if text.partition(":")[0].strip() == key:
                return text.partition(":")[2].strip()
    return ""


def quantity(value: float | None, unit: str) -> str:
    """A number of seconds or bytes as a person reads it."""
    if value is None:
        return ""
    scales = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "us")), "B": ((1e6, "MB"), (1e3, "kB"), (1, "B"))}[unit]
    factor, name = next(((f, n) for f, n in scales if value >= f), scales[-1])
    return f"{value / factor:.3g} {name}"


def verdict(row: Row) -> str:
    if row.problem:
        return "not measured"
    return {None: "", True: "met", False: "not met"}[row.met]


def line(row: Row) -> str:
    """One line of the table."""
    if row.problem:
        ratio, spread = row.problem.replace("|", "/"), ""
    else:
        ratio = f"{row.ratio:.3f}"
        spread = "" if row.low is None else f"{row.low:.3f} to {row.high:.3f}"
    bound = "" if row.bound is None else f"{row.bound:g}"
    times = quantity(row.ours_median, row.unit), quantity(row.peer_median, row.unit)
    cells = (row.what, row.ours, row.peer, *times, ratio, spread, bound, verdict(row), str(row.rounds or ""))
    return "| " + " | ".join(cells) + " |"


HEAD = """| what | side | peer | side takes | peer takes | ratio | middle half | at most | | rounds |
|---|---|---|---|---|---|---|---|---|---|"""


def table(rows: list[Row], problems: list[str], about: dict[str, str], settings: Settings) -> str:
    bounded = [row for row in rows if row.bound is not None]
    met = sum(row.met is True for row in bounded)
    sections = [
        "# Results",
        "Written by `make bench`; how to read it is told in [Benchmarks](../docs/benchmarks.md).",
        "\n".join(f"- {name}: {value}" for name, value in about.items()),
    ]
    if settings.quick:
        sections.append("From a quick run: few rounds, and not every line.")
    sections += [f"## Against a bound\n\n{met} of {len(bounded)} met.", "\n".join([HEAD, *map(line, bounded)])]
    others = [row for row in rows if row.bound is None]
    if others:
        sections += ["## For information", "\n".join([HEAD, *map(line, others)])]
    if problems:
        sections += ["## Not finished", "\n".join(f"- {problem}" for problem in problems)]
    return "\n\n".join(sections) + "\n"


def write(folder: Path, rows: list[Row], problems: list[str], about: dict[str, str], settings: Settings) -> None:
    """``results.md``, ``results.json`` and ``results.png``."""
    (folder / "results.md").write_text(table(rows, problems, about, settings), encoding="utf-8")
    content = {
        "surroundings": about,
        "settings": dataclasses.asdict(settings),
        "rows": [dataclasses.asdict(row) | {"met": row.met} for row in rows],
        "problems": problems,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot(folder / "results.png", rows)


def plot(path: Path, rows: list[Row]) -> None:
    """Ratio over bound for each line, and the time of a step against the number of leaves."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.bound is not None and row.ratio]
    counts = [row for row in rows if row.case == "slope/count" and row.ratio]
    height = max(4.0, 0.26 * len(shown) + 1)
    panels = 2 if counts else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(15, height), width_ratios=(3, 2)[:panels], layout="constrained", squeeze=False
    )
    left = axes[0, 0]

    # A ratio of nothing at all has no place on a logarithmic axis.
    values = [max(row.ratio / row.bound, 1e-3) for row in shown]
    places = range(len(shown))
    colours = ["tab:blue" if row.met else "tab:red" for row in shown]
    left.hlines(places, 1, values, colors=colours, linewidth=1)
    left.scatter(values, places, c=colours, s=18)
    left.axvline(1, color="black", linewidth=1)
    left.set_yticks(places, [f"{row.what}: {row.ours} / {row.peer}" for row in shown], fontsize=7)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlabel("ratio over its bound: at most 1 (blue) is met")
    left.grid(axis="x", alpha=0.3)

    if counts:
        right = axes[0, 1]
        leaves = [int(row.what.partition(" ")[0].replace(",", "")) for row in counts]
        right.plot(leaves, [1e3 * row.ours_median for row in counts], marker="o", label=counts[0].ours)
        right.plot(leaves, [1e3 * row.peer_median for row in counts], marker="o", label=counts[0].peer)
        right.legend()
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_xlabel("leaves of 1,000 elements")
        right.set_ylabel("a step of AdamW, ms")
        right.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
