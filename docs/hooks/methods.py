"""A page for each rule, made of what is written elsewhere, so that it cannot go stale.

The formula and the source stand in docs/rules.md, the differences from other libraries in docs/comparison.md, fields and ranges
in the class, the picture in docs/images/gallery, advice in docs/hooks/advice.toml. What a rule keeps is measured.
"""

import dataclasses
import inspect
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mkdocs.structure.files import File, Files

import optimisers as opt
from optimisers import rules
from optimisers.rules._fields import field_range

DOCS = Path(__file__).resolve().parent.parent
IN_VIEW = 8  # entries of a group of the navigation
CHAINED = {"Gradients", "Limits", "Decay"}  # rooms whose rules leave the stepping to others
SYMBOLS = (
    "Here $x$ is the array, $g$ what comes in, $m$, $v$ and $u$ are state, and a hat is the correction for a start at zero; "
    "all symbols are in the [overview](../rules.md)."
)
LAWS = {
    "elementwise": "Elementwise: one pass over memory for all parameters at once, with the elementwise rest of its chain.",
    "measured": "Measured: one pass to measure, then elementwise like the rest of its chain.",
    "stackable": "Stackable: arrays of one shape are stepped as one stack.",
    "none": "No law for every array: an array is stepped by itself, or by the law of the rule that it is given at setup.",
}


def on_config(config: Any) -> None:
    """Put the pages into the navigation: the overview, then a group for each room, those for chains together."""
    (methods,) = [part["Methods"] for part in config["nav"] if "Methods" in part]
    written = {title: pages for part in methods for title, pages in part.items() if isinstance(pages, list)}
    chained = []
    for room, found in by_room().items():
        if room in written:
            written[room] += shelves(found, IN_VIEW - len(written[room]))
        else:
            (chained if room in CHAINED else methods).append({room: shelves(found)})
    methods.append({"Members of chains": chained})


def shelves(found: list[type], room: int = IN_VIEW) -> list[Any]:
    """The pages of rules; of more than there is room for, in groups that can be seen at a glance."""
    if len(found) <= room:
        return [page(rule) for rule in found]
    count = -(-len(found) // IN_VIEW)
    cuts = [len(found) * i // count for i in range(count + 1)]
    parts = [found[start:end] for start, end in itertools.pairwise(cuts)]
    return [{f"{part[0].__name__} to {part[-1].__name__}": [page(rule) for rule in part]} for part in parts]


def on_files(files: Files, *, config: Any) -> None:
    """Write the pages."""
    rows, peers = dict(table_rows("rules.md")), dict(table_rows("comparison.md"))
    advice = tomllib.loads((DOCS / "hooks" / "advice.toml").read_text(encoding="utf-8"))
    for found in by_room().values():
        for rule in found:
            text = "\n\n".join(sections(rule, rows, peers.get(rule.__name__), advice.get(rule.__name__, {})))
            files.append(File.generated(config, page(rule), content=text))


def page(rule: type) -> str:
    return f"methods/{rule.__name__.lower()}.md"


def by_room() -> dict[str, list[type]]:
    """The rules by the sections of docs/rules.md, in its order."""
    text = (DOCS / "rules.md").read_text(encoding="utf-8")
    found: dict[str, list[type]] = {}
    room = ""
    for line in text.splitlines():
        if line.startswith("## "):
            room = line[3:]
        row = re.match(r"\| `(\w+)", line)
        rule = row and getattr(rules, row[1], None)
        if inspect.isclass(rule) and issubclass(rule, opt.AbstractRule):
            found.setdefault(room, []).append(rule)
    return found


def table_rows(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """For each row of a page's tables: the name in the first cell; the cells by their columns, and what stands before it."""
    head: list[str] = []
    preface = ""
    for line in (DOCS / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            if line:
                preface = "" if line.startswith(("#", "`")) else f"{preface} {line}".strip() if not head else line
            head = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not head:
            head = cells
        elif first := re.match(r"`(\w+)", cells[0]):
            yield first[1], {"preface": preface} | dict(zip(head, cells, strict=False))


def told_of(row: dict[str, str]) -> str:
    """The step of a rule, or what it does, in words and formulas."""
    return next((row[key] for key in ("step", "what it returns", "what it does") if row.get(key)), "")


def bases(name: str, rows: dict[str, dict[str, str]]) -> list[str]:
    """The rules whose steps the step of this one is told by: ``Adam's, plus ...``; and theirs."""
    found = [name]
    for one in found:  # which grows
        found += [base for base in re.findall(r"\b([A-Z]\w+)'s", told_of(rows[one])) if base in rows and base not in found]
    return found[1:]


def sections(rule: type, rows: dict[str, dict[str, str]], peer: dict[str, str] | None, advice: dict[str, str]) -> Iterator[str]:
    """The parts of a page."""
    name = rule.__name__
    row = rows[name]
    yield f"# {name}"
    yield inspect.cleandoc(rule.__doc__ or "").split("\n\n")[0]
    told = told_of(row)
    if told:
        yield f"**{'Step' if 'step' in row else 'What it does'}.** {relinked(told)}"
        yield from (f"**{base}'s step.** {relinked(told_of(rows[base]))}" for base in bases(name, rows))
        if "$" in told:
            about_beta = "`beta`" in row["preface"] and "beta" not in {field.name for field in dataclasses.fields(rule)}
            yield f"{'' if about_beta else relinked(row['preface'])} {SYMBOLS}".strip()
    if row.get("source"):
        yield f"**Source.** {relinked(row['source'])}"
    if (DOCS / "images" / "gallery" / f"{name}.png").exists():
        seen = f"The path of {name} on a rotated quadratic, on Rosenbrock's function and past a saddle"
        yield f"![{seen}](../images/gallery/{name}.png)"
    if advice:
        yield "## When to use it"
        yield from (f"**{word}.** {advice[key]}" for key, word in (("use", "Yes"), ("avoid", "No")) if key in advice)
    yield "## Fields"
    yield "\n".join(fields_table(rule))
    yield "## State and cost"
    yield cost(rule)
    if peer:
        yield "## Beside other libraries"
        yield f"Counterpart: {relinked(peer['counterpart'])}."
        yield from (
            f"{word}: {relinked(peer[key])}." for key, word in (("equal", "Equal"), ("differs", "Differs")) if peer.get(key)
        )
    yield "## Reference"
    yield f"::: optimisers.{name}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false"


def relinked(text: str) -> str:
    """Links of a page in docs/, from a page one folder deeper."""
    return re.sub(r"\]\((?!https?:)([^)]+)\)", r"](../\1)", text)


def fields_table(rule: type) -> Iterator[str]:
    fields = [field for field in dataclasses.fields(rule) if field.repr]
    if not fields or rule is opt.OptimiserChain:
        yield f"`{rule.__name__}{inspect.signature(rule.__init__)}`".replace("self, ", "")
        return
    yield "| field | default | range |"
    yield "| --- | --- | --- |"
    for field in fields:
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        within = field_range(field)
        fixed = " (fixed at setup)" if field.name in rule.structural else ""
        yield f"| `{field.name}` | {default} | {'' if within is None else within}{fixed} |"


def cost(rule: type) -> str:
    made = example(rule)
    if made is None:
        return ""
    x = np.zeros((256, 256), np.float32)
    state = opt.estimate(made, x).state - opt.estimate(made, x[:1, :1]).state
    law = made.resolved(x, "").law
    each = state / (x.size - 1)
    return f"{each:.2g} bytes a parameter, for a matrix of {x.shape[0]} x {x.shape[1]} in float32, as `{made!r}`. {LAWS[law]}"


def example(rule: Any) -> Any:
    """The rule as it is mostly written."""
    for arguments in ((), (4,), (opt.AdamW(),), (opt.AdamW(), 4)):
        try:
            return rule(*arguments)
        except (opt.errors.OptimisersError, TypeError):
            continue
    return None
