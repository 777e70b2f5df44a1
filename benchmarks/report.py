"""What was measured, as JSON, and every line of it as a table. What readers are shown is in pages.py, bounds in check.py."""

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
    scales = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")), "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))}[unit]
    factor, name = next(((f, n) for f, n in scales if value >= f), scales[-1])
    return f"{value / factor:.3g} {name}"


def cells(row: Row) -> list[str]:
    """One line, by the columns of `HEAD`."""
    if row.problem:
        ratio, spread = row.problem.replace("|", "/"), ""
    else:
        ratio = f"{row.ratio:.3f}"
        spread = "" if row.low is None else f"{row.low:.3f} to {row.high:.3f}"
    times = quantity(row.ours_median, row.unit), quantity(row.peer_median, row.unit)
    return [row.what, row.ours, row.peer, *times, ratio, spread, str(row.rounds or "")]


COLUMNS = ["what", "side", "peer", "side takes", "peer takes", "ratio", "middle half", "rounds"]


def line(row: Row) -> str:
    return table_line(cells(row))


def table_line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


HEAD = f"{table_line(COLUMNS)}\n|{'---|' * len(COLUMNS)}"


def table(rows: list[Row], problems: list[str], about: dict[str, str], settings: Settings) -> str:
    sections = [
        "# Results",
        "Every line that `make bench` measured; how to read it is told in [Benchmarks](../docs/benchmarks.md).",
        "\n".join(f"- {name}: {value}" for name, value in about.items()),
    ]
    if settings.quick:
        sections.append("From a quick run: few rounds, and not every line.")
    sections.append("\n".join([HEAD, *map(line, rows)]))
    if problems:
        sections += ["## Not finished", "\n".join(f"- {problem}" for problem in problems)]
    return "\n\n".join(sections) + "\n"


def write(folder: Path, rows: list[Row], problems: list[str], about: dict[str, str], settings: Settings) -> None:
    """``results.md`` and ``results.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(table(rows, problems, about, settings), encoding="utf-8")
    content = {
        "surroundings": about,
        "settings": dataclasses.asdict(settings),
        "rows": [dataclasses.asdict(row) for row in rows],
        "problems": problems,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[list[Row], list[str], dict[str, str], Settings]:
    """What `write` wrote."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(Row)}
    rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in content["rows"]]
    return rows, content["problems"], content["surroundings"], Settings(**content["settings"])
