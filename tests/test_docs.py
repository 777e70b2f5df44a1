"""The documentation runs, and it is complete."""

import importlib
import inspect
import re
import sys
import tomllib
import types
from pathlib import Path
from typing import NamedTuple

import pytest

import optimisers as opt
from optimisers import errors, rules

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PUBLIC = [name for name in opt.__all__ if not name.startswith("__")]
BESIDE = [f"{face}.{name}" for face in ("torch", "optax") for name in importlib.import_module(f"optimisers.{face}").__all__]

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    line: int
    code: str
    run: bool


def python_blocks(text):
    """The fenced Python blocks of a page, with the number of lines above each, so that tracebacks are right."""
    for fence in FENCE.finditer(text):
        language, _, attributes = fence["info"].strip().partition(" ")
        if language in {"python", "py"}:
            yield Block(text.count("\n", 0, fence.start("code")), fence["code"], ".no-run" not in attributes)


def page_id(page):
    return page.relative_to(ROOT).as_posix()


def test_blocks_are_found_with_their_lines():
    text = "a\n\n```python\nx = 1\ny = 2\n```\n```sh\nls\n```\n```python {.no-run}\nz\n```\n"
    assert list(python_blocks(text)) == [Block(3, "x = 1\ny = 2\n", run=True), Block(10, "z\n", run=False)]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_python_fence_is_recognised(page):
    # An indented fence, or one in tildes, would be shown to readers and never be run.
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^\s*(?:`{3,}|~{3,})\s*(?:python|py)\b", text, re.MULTILINE)
    assert len(fences) == len(list(python_blocks(text)))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_runs(page, tmp_path, monkeypatch):
    blocks = list(python_blocks(page.read_text(encoding="utf-8")))
    if blocks and not any(block.run for block in blocks):
        pytest.skip("every block of this page is marked .no-run")
    monkeypatch.chdir(tmp_path)
    # A module that can be looked up, since dataclasses and pickle ask where a class was defined.
    module = types.ModuleType("docs_" + re.sub(r"\W", "_", page.stem))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
        if block.run:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), vars(module))


def referenced():
    """What the API page names, and hence mkdocstrings documents."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return set(re.findall(r"^::: optimisers\.([\w.]+)", text, re.MULTILINE))


def test_api_page_names_only_what_is_public():
    assert referenced() - set(PUBLIC) <= {"errors", *BESIDE}


def test_api_page_names_all_that_stands_beside():
    assert set(BESIDE) <= referenced()


def test_errors_page_lists_every_error():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    assert listed | {"OptimisersError"} == {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.OptimisersError)
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented(name):
    value = getattr(opt, name)
    if isinstance(value, type | types.FunctionType | types.ModuleType):
        doc = inspect.cleandoc(value.__doc__ or "")
        # A dataclass without a docstring is given its signature for one.
        assert doc, f"optimisers.{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"optimisers.{name} has no docstring of its own"
    targets = referenced()
    rules = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    documented = name in targets or getattr(value, "__module__", "").removeprefix("optimisers.") in targets
    assert documented or re.search(rf"`{name}\b", rules), f"{name} stands neither in docs/api.md nor in docs/rules.md"


def docstrings():
    """What the pages show of each public name and of its methods."""
    for name in [*PUBLIC, *BESIDE]:
        value = opt
        for part in name.split("."):
            value = importlib.import_module(f"optimisers.{part}") if part in {"torch", "optax"} else getattr(value, part)
        yield name, getattr(value, "__doc__", None) or ""
        for key, member in vars(value).items() if isinstance(value, type) else ():
            if not key.startswith("_") and inspect.isroutine(member):
                yield f"{name}.{key}", getattr(value, key).__doc__ or ""


def test_docstrings_are_no_markdown_by_mistake():
    # Two stars outside of code begin bold type, and are gone from the page: (b1**t, b2**t).
    prose = {name: re.sub(r"``.+?``|`[^`]+`", "", text, flags=re.DOTALL) for name, text in docstrings()}
    assert len(prose) > len(PUBLIC)
    assert [name for name, text in prose.items() if re.search(r"\*\*|\*\S[^*]*\*(?!\s)", text)] == []


def advice():
    return tomllib.loads((ROOT / "docs" / "hooks" / "advice.toml").read_text(encoding="utf-8"))


def test_every_rule_has_advice():
    concrete = {name for name in rules.__all__ if isinstance(getattr(rules, name), type)} - {"AbstractRule", "MeasuredRule"}
    expected = {name for name in concrete if issubclass(getattr(rules, name), opt.AbstractRule)}
    assert {name: sorted(said) for name, said in advice().items()} == {name: ["avoid", "use"] for name in sorted(expected)}


def test_expressions_in_advice_can_be_built():
    text = "\n".join(line for said in advice().values() for line in said.values())
    expressions = re.findall(r"`([A-Z]\w*(?:\.\w+)?\(.+?\))`", text)
    assert expressions
    for expression in expressions:
        assert isinstance(eval(expression, dict(vars(opt))), opt.AbstractRule), expression


def test_times_on_the_home_page_were_measured():
    measured = (ROOT / "benchmarks" / "results.md").read_text(encoding="utf-8")
    said = re.findall(r"\b\d+(?:\.\d+)? (?:ms|µs|MB)\b", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert said
    assert [figure for figure in said if f" {figure} " not in measured] == []
