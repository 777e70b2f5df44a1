"""The tables of docs/choosing.md and docs/memory.md, which are measured here, so that they cannot go stale."""

import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import optree
import pytest
import torch

import optimisers as opt
from optimisers import rules
from optimisers.rules._adjust import has_eta
from table import ROWS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "choosing.md"


def stepping():
    """The rules that can be used by themselves, as they are by default."""
    for name, rule in sorted(vars(rules).items(), key=lambda item: item[0].lower()):
        alone = inspect.isclass(rule) and issubclass(rule, opt.AbstractRule) and not inspect.isabstract(rule)
        if alone and all(field.default is not dataclasses.MISSING for field in dataclasses.fields(rule)):
            made = rule()
            if has_eta(made):
                yield name, made


def line(name, rule):
    """Bytes of state for each parameter of a matrix of 256 x 256 in float32, and the law by which it is stepped."""
    x = np.zeros((256, 256), np.float32)
    return f"| `{name}` | {opt.estimate(rule, x).state / x.size:.2f} | {rule.resolved(x, '').law} |"


@pytest.mark.parametrize(("name", "rule"), list(stepping()), ids=lambda value: value if isinstance(value, str) else "")
def test_the_page_says_what_a_rule_costs(name, rule):
    assert line(name, rule) in PAGE.read_text(encoding="utf-8"), f"docs/choosing.md lacks {line(name, rule)}"


def table(heading):
    """The cells of the rows of the table below a heading of docs/choosing.md, by the name in their first cell."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in section.splitlines() if row.startswith("|")]
    return {cells[0].strip("`"): cells[1:] for cells in found[2:]}


def test_the_page_says_what_matters_of_a_rule():
    found, rates = table("What each costs and keeps"), {row.name: row.rates for row in ROWS}
    assert found.keys() == {name for name, _ in stepping()}
    for name, rule in stepping():
        _, _, cost, matters, solves, _, shown = found[name]
        assert cost
        assert shown
        fields = re.findall(r"`(\w+)`", matters)
        assert fields
        assert all(hasattr(rule, field) for field in fields), name
        assert solves == ("" if rates[name] is None else ", ".join(f"{rate:g}" for rate in rates[name])), name


WRAPPED = {"LowRank": {"rank": 8}, "Projected": {"onto": "ball"}}
FEWER = {"LowRank", "Quantised"}


def test_the_page_says_what_wrappers_add():
    x = np.zeros((256, 256), np.float32)
    for name, (added, cost, matters, *_) in table("Wrappers").items():
        rule = getattr(opt, name)(opt.AdamW(), **WRAPPED.get(name, {}))
        more = (opt.estimate(rule, x).state - opt.estimate(opt.AdamW(), x).state) / x.size
        assert more < -1 if name in FEWER else abs(more - float(added)) < 0.01, name
        assert cost
        assert all(hasattr(rule, field) or hasattr(rule.rule, field) for field in re.findall(r"`(\w+)`", matters)), name


# --- docs/memory.md -----------------------------------------------------------------------------------------

MEMORY = PAGE.parent / "memory.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rows(heading):
    """The cells of the table below a heading, without its head."""
    section = MEMORY.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in section.splitlines() if row.startswith("|")]
    assert len(table) > 6, heading
    return table[2:]


def made(expression):
    return eval(expression.strip("`"), dict(vars(opt)))


def bytes_each(rule, dtype):
    """Of state, for each parameter of a matrix of 1024 x 1024; said to be refused where it is."""
    x = torch.empty(1024, 1024, dtype=dtype, device="meta")
    try:
        return f"{opt.estimate(rule, x).state / x.numel():.2f}"
    except opt.errors.RuleError:
        return "refused"


def test_the_page_on_memory_says_what_rules_keep():
    for cell, *said in rows("State of each rule"):
        rule = made(cell)
        columns = (
            (rule, "float32"),
            (rule, "bfloat16"),
            (opt.MixedPrecision(rule), "bfloat16"),
            (opt.Quantised(rule), "float32"),
        )
        assert said == [bytes_each(one, DTYPES[dtype]) for one, dtype in columns], cell


def test_the_page_on_memory_says_what_wrappers_add():
    for cell, *said, _ in rows("What wrappers and members of chains add"):
        added = [float(bytes_each(made(cell), dtype)) - float(bytes_each(opt.AdamW(), dtype)) for dtype in DTYPES.values()]
        assert said == [f"{number:.2f}" for number in added], cell


def test_the_page_on_memory_adds_up():
    for cell, *said in rows("Everything together"):
        where, _, rule = cell.partition(": ")
        dtype = DTYPES[where.partition(",")[0]]
        state = float(bytes_each(made(rule), dtype))
        size = dtype.itemsize
        assert said == [str(size), str(size), f"{state:.2f}", f"{2 * size + state:.2f}"], cell


def test_what_is_estimated_is_what_is_kept():
    # The figures above are of arrays on meta: here are the bytes of real ones.
    for cell, *_ in rows("State of each rule"):
        x = torch.ones(64, 48)
        state = opt.setup(made(cell.replace("256", "16").replace("128", "16")), x)
        kept = sum(leaf.nbytes for leaf in optree.tree_leaves(state[()].state))
        assert kept == opt.estimate(made(cell.replace("256", "16").replace("128", "16")), x).state, cell
