"""What readers are shown of the results: parts of docs/index.md and docs/benchmarks.md, and a picture.

``python benchmarks/pages.py`` writes them from benchmarks/results.json, without measuring anything. A part stands between
``<!-- measured: NAME -->`` and ``<!-- end -->``. A time is told beside that of a peer, whose time is 1.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import report
from measuring import Row

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
PAGES = (DOCS / "index.md", DOCS / "benchmarks.md")
PICTURE = DOCS / "images" / "benchmarks.png"
PART = re.compile(r"(<!-- measured: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

SMALL = ("update_", "adjust, update_", "adapter, LambdaLR")
GROUPS: dict[str, Callable[[Row], bool]] = {
    "in place": lambda row: row.case.startswith(("gpt2/", "rules/", "wave/")) and row.ours.startswith("update_"),
    "pure": lambda row: row.ours == "update" and row.unit == "s",
    "small": lambda row: row.case.startswith(("leaves/", "slope/count")) and row.ours in SMALL,
    "matrices": lambda row: row.case.startswith(("muon/", "soap/", "kin/")),
    "others": lambda row: row.case.startswith(("numpy/", "first/")),
    "memory": lambda row: row.case.startswith("memory/"),
}
# What the machine can do, a part of the same step, and other rules of our own: for ourselves.
NO_PEER = ("the floor", "the matrices alone", "update_, AdamW", "update_, Muon")

# Sides in the words of the pages.
SIDES = {
    "update_": "a step in place",
    "update_, torch": "the same over tensors",
    "optax, jit, donated": "optax, jit",
    "torch clip_grad_norm_, fused AdamW": "torch fused, clipped",
    "torch fused AdamW alone": "torch fused, AdamW alone",
}


def group(rows: list[Row], name: str) -> list[Row]:
    """The lines of a group that were measured."""
    return [row for row in rows if GROUPS[name](row) and row.peer not in NO_PEER and not row.problem]


def what(row: Row) -> str:
    """What is compared: leaves are arrays to a reader."""
    return row.what.replace("leaves", "arrays").replace("each leaf", "each array")


def lines(rows: list[Row]) -> str:
    """A table of times; where the peer is the model, of memory."""
    memory = any(row.unit == "B" for row in rows)
    head = (
        ["what", "side", "share of the model", "bytes"] if memory else ["what", "side", "beside", "relative", "ours", "theirs"]
    )
    found = [report.table_line(head), f"|{'---|' * len(head)}"]
    for row in rows:
        side = re.sub(
            r"^update_?", lambda name: f"`{name[0]}`", SIDES.get(row.ours, row.ours) if "update" not in row.ours else row.ours
        )
        mine, theirs = (report.quantity(value, row.unit) for value in (row.ours_median, row.peer_median))
        peer = SIDES.get(row.peer, row.peer)
        cells = [f"{row.ratio:.3g}", mine] if memory else [peer, f"**{row.ratio:.2f}**", mine, theirs]
        found.append(report.table_line([what(row), side, *cells]))
    return "\n".join(found)


def tables(rows: list[Row]) -> str:
    """All groups, for a terminal."""
    found = {name: group(rows, name) for name in GROUPS}
    return "\n\n".join(f"{name}\n\n{lines(some)}" for name, some in found.items() if some)


def machine(about: dict[str, str]) -> str:
    """The machine and the versions, in sentences."""
    versions = [f"{name} {about[name]}" for name in report.LIBRARIES if about.get(name, "not installed") != "not installed"]
    has = "multiplies" if about["bfloat16 in hardware"] == "yes" else "does not multiply"
    return (
        f"{about['processor']}, {about['cores']} cores, {about['system']}; the processor {has} bfloat16 matrices in hardware. "
        f"Load before the run: {about.get('load before', 'unknown')}.\n\nPython {about['python']}, {', '.join(versions)}."
    )


def one(rows: list[Row], case: str, ours: str, peer: str, words: str = "") -> Row:
    """The one line of a case with these sides; ``words`` of what is compared tell it from others."""
    found = [
        row for row in rows if (row.case, row.ours, row.peer) == (case, ours, peer) and words in row.what and not row.problem
    ]
    if len(found) != 1:
        raise SystemExit(
            f"the pages tell of {case}, {ours} beside {peer}, and there are {len(found)} such lines in the results"
        )
    return found[0]


@dataclass(frozen=True)
class Line:
    """A line of the home page's table: ours beside one side of torch, and optax where it was measured."""

    text: str
    case: str
    peer: str
    added: str = ""  # to the time of torch
    ours: str = "update_"
    optax: bool = False


FUSED = "torch fused"
HOME = (
    Line("GPT-2's 124 million parameters, AdamW", "gpt2/adamw", FUSED, ", fused", optax=True),
    Line(
        "the same, with clipping by the norm of all",
        "gpt2/norms",
        "torch clip_grad_norm_, fused AdamW",
        ours="update_, ClipGlobalNorm",
    ),
    Line("the same, four rules in a chain", "gpt2/chain", "torch fused AdamW alone", ", AdamW alone", optax=True),
    Line("2,000 small arrays, AdamW", "leaves/2000", FUSED, ", fused"),
    Line("a network of 6 small arrays, AdamW", "leaves/6", FUSED, ", fused", optax=True),
    Line(
        "Muon, 24 matrices of a small transformer",
        "muon/transformer_matrices",
        "torch.optim.Muon",
        ", in bfloat16",
        optax=True,
    ),
    Line("the same, in bfloat16", "muon/transformer_matrices", "torch.optim.Muon", ours="update_, bfloat16"),
)


def home(rows: list[Row]) -> str:
    """The table of the home page, and how many of its comparisons are won."""
    head = ["", "optimisers", "`torch.optim`", "optax, jit"]
    found, ratios = [report.table_line(head), f"|{'---|' * len(head)}"], []
    for shown in HOME:
        row = one(rows, shown.case, shown.ours, shown.peer)
        cells = [shown.text, report.quantity(row.ours_median, "s"), report.quantity(row.peer_median, "s") + shown.added, ""]
        ratios.append(row.ratio)
        if shown.optax:
            other = one(rows, shown.case, shown.ours, "optax, jit, donated")
            cells[-1] = report.quantity(other.peer_median, "s")
            ratios.append(other.ratio)
        found.append(report.table_line(cells))
    memory = one(rows, "memory/gpt2", "update_", "the model", "GPT-2, AdamW,")
    text = f"memory that a step in place takes beside the model's {report.quantity(memory.peer_median, 'B')}"
    found.append(report.table_line([text, report.quantity(memory.ours_median, "B"), "", ""]))
    shorter = sum(ratio < 1 for ratio in ratios)
    pure = one(rows, "gpt2/pure", "update", "update_")
    return "\n".join(
        [
            *found,
            "",
            f"Of these {len(ratios)} comparisons of time {shorter} are won here.",
            f"A pure step of GPT-2 takes {pure.ratio:.1f} times as long as one in place.",
        ]
    )


def parts() -> dict[str, str]:
    """The text of every part by its name."""
    rows, _, about, _ = report.read(HERE)
    muon, half = (one(rows, "muon/transformer_matrices", side, "torch.optim.Muon") for side in ("update_", "update_, bfloat16"))
    return {name: lines(group(rows, name)) for name in GROUPS} | {
        "machine": machine(about),
        "home": home(rows),
        "muon": f"{muon.ratio:.2f} times as long with ours in float32, {half.ratio:.2f} times with both in bfloat16.",
    }


def rendered(text: str) -> str:
    """A page with its parts as the results say."""
    found = parts()
    return PART.sub(lambda part: f"{part[1]}\n{found[part['name']]}\n\n{part[3]}", text)


def write() -> None:
    """Write all of it."""
    from picture import draw  # needs matplotlib

    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(PICTURE, report.read(HERE)[0])


if __name__ == "__main__":
    write()
