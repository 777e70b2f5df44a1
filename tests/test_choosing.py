"""The table of docs/choosing.md, which is measured here, so that it cannot go stale."""

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest

import optimisers as opt
from optimisers import rules
from optimisers.rules._adjust import has_eta

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
