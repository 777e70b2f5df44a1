"""The house is built as its plan says: which part may import which, and what belongs to a rule."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optimisers as opt
from optimisers import rules
from table import ROWS

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "optimisers"
PARTS = ("errors", "schedules", "arrays", "rules", "tree", "engine", "setup_api", "interop")
ROOMS_OF_ENGINE = (
    "graph", "kernels", "memory", "shards", "tracks", "groups", "autograd", "aliasing", "tree_step", "torch_compile",
)  # fmt: skip
FACES = {"torch", "optax", "__main__"}  # what a user imports; all of it stands in interop
MODULES = sorted(SOURCE.rglob("*.py"))


def name_of(path):
    return path.relative_to(SOURCE).as_posix()


def part_of(path):
    """The part of the house a module belongs to, None for the package's own ``__init__``."""
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return None if first == "__init__" else "interop" if first in FACES else first


def imports(path):
    """(absolute name of what is imported, whether at import time, line) for every import, those in functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("optimisers", *path.relative_to(SOURCE).parent.parts)
    found = []

    def visit(node, *, now):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, now, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join([*base, *([child.module] if child.module else [])])
                if child.module:
                    found.append((module, now, child.lineno))
                else:
                    found.extend((f"{module}.{alias.name}", now, child.lineno) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    visit(other, now=now)
            else:
                deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                visit(child, now=now and not deferred)

    visit(tree, now=True)
    return found


def test_the_reader_of_imports_sees_all_of_them(tmp_path):
    names = {name for path in MODULES for name, _, _ in imports(path)}
    assert {"numpy", "optree", "torch", "torch.utils", "optimisers.arrays", "optimisers.rules._base"} <= names
    later = [(name, now) for name, now, _ in imports(SOURCE / "arrays" / "_host.py") if "._torch" in name]
    assert later
    assert not any(now for _, now in later)


def test_every_module_belongs_to_a_part():
    assert {part_of(path) for path in MODULES} - {None} <= set(PARTS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path):
    part = part_of(path)
    for name, _, line in imports(path):
        first, *rest = name.split(".")
        if first != "optimisers" or part is None:
            continue
        assert rest, f"{name_of(path)}:{line} imports the package itself"
        assert PARTS.index(rest[0]) <= PARTS.index(part), f"{name_of(path)}:{line}: {part} must not import {rest[0]}"


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) == "engine"], ids=name_of)
def test_imports_run_one_way_in_the_engine(path):
    rooms = {room: i for i, room in enumerate(ROOMS_OF_ENGINE)}
    own = path.relative_to(SOURCE / "engine").parts[0].removesuffix(".py")
    for name, _, line in imports(path):
        parts = name.split(".")
        if parts[:2] == ["optimisers", "engine"] and own != "__init__":
            assert rooms[parts[2]] <= rooms[own], f"{name_of(path)}:{line}: {own} must not import {parts[2]}"


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) == "engine"], ids=name_of)
def test_the_engine_is_read_by_the_screen(path):
    """No file over 350 lines, no function over 50."""
    text = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f"{node.name} has {n} lines" for node in functions if (n := node.end_lineno - node.lineno + 1) > 50]
    assert not long, f"{name_of(path)}: {', '.join(long)}; the limit is 50"
    assert text.count("\n") <= 350, f"{name_of(path)} has {text.count(chr(10))} lines; the limit is 350"


def test_no_circle_of_imports():
    """No two modules import each other, directly or through others, at import time or later."""
    files = {"optimisers." + name_of(path).removesuffix(".py").replace("/", "."): path for path in MODULES}
    files = {name: path for name, path in files.items() if not name.endswith("__init__")}
    after = {name: {other for other, _, _ in imports(path) if other in files} for name, path in files.items()}
    while after:
        free = [name for name, others in after.items() if not others & after.keys()]
        assert free, f"among these is a circle: {', '.join(sorted(after))}"
        for name in free:
            del after[name]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_torch_is_imported_only_where_tensors_are(path):
    home = name_of(path) == "arrays/_torch.py" or part_of(path) in {"engine", "interop"}
    for name, _, line in imports(path):
        assert name.split(".")[0] != "torch" or home, f"{name_of(path)}:{line} imports {name}"


def test_torch_is_never_imported_by_importing_the_package():
    """Follow what is imported at import time from the package's ``__init__``, and find no torch."""
    files = {"optimisers." + name_of(path).removesuffix(".py").replace("/", "."): path for path in MODULES}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()} | {"optimisers": SOURCE / "__init__.py"}
    seen, queue = set(), ["optimisers"]
    while queue:
        module = queue.pop()
        if module in seen or module not in files:
            continue
        seen.add(module)
        for name, now, line in imports(files[module]):
            if now:
                assert name.split(".")[0] not in {"torch", "jax"}, f"{name_of(files[module])}:{line} imports {name}"
                parents = name.split(".")
                queue += [".".join(parents[: i + 1]) for i in range(len(parents))]
    assert "optimisers.rules.adaptive.adam" in seen
    assert "optimisers.arrays._torch" not in seen


def test_importing_the_package_imports_no_framework():
    code = "import sys, optimisers; sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_tree_imports_optree(path):
    for name, _, line in imports(path):
        assert name.split(".")[0] != "optree" or part_of(path) == "tree", f"{name_of(path)}:{line} imports optree"


# --- rules ---------------------------------------------------------------------------------------------------------------

RULES = {
    name: value
    for name, value in vars(rules).items()
    if inspect.isclass(value) and issubclass(value, opt.AbstractRule) and not inspect.isabstract(value)
}
RULE_FILES = sorted(path for path in (SOURCE / "rules").rglob("*.py") if not path.name.startswith("_"))
ROOMS = {path.parent.name: path for path in sorted((SOURCE / "rules").glob("*/__init__.py"))}


def heading(room):
    """What a room of rules is called in the documentation: how its docstring begins."""
    return (ast.get_docstring(ast.parse(ROOMS[room].read_text(encoding="utf-8"))) or "").split(":")[0]


def section(page, title):
    """The text below a heading of a page, up to the next heading of its kind."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_rooms_hold_rules_and_nothing_else_does():
    assert [path.name for path in RULE_FILES if path.parent == SOURCE / "rules"] == []
    for room, index in ROOMS.items():
        assert index.read_text(encoding="utf-8").count("\n") == 1, f"{room}/__init__.py is one line: what the room is"
        assert heading(room), f"{room}/__init__.py does not say what the room is called"


def test_there_are_rules():
    assert {"Adam", "OptimiserChain", "Scheduled"} <= RULES.keys()
    assert not {"AbstractRule", "MeasuredRule"} & RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_rule_has_all_that_belongs_to_it(name):
    """A rule has a file of its own in a room, its line in the index, a row in the table of tests, and lines in the docs."""
    rule = RULES[name]
    module = importlib.import_module(rule.__module__)
    others = [n for n, r in RULES.items() if r.__module__ == rule.__module__ and n != name]
    file = Path(module.__file__)
    room = file.parent.name
    missing = []
    if file.parent.parent != SOURCE / "rules" or others:
        missing.append(
            f"a file of its own in a room of src/optimisers/rules (it stands in {file.name} with {others or 'none'})"
        )
        room = "descent"
    if getattr(opt, name, None) is not rule:
        missing.append("its name in src/optimisers/__init__.py")
    if not any(row.name == name and any(type(config) is rule for config in row.configs) for row in ROWS):
        missing.append("its row in tests/table.py")
    if not re.search(rf"^\| `{name}\b", section("rules.md", heading(room)), re.MULTILINE):
        missing.append(f"its line in docs/rules.md, under {heading(room)}")
    if not re.search(rf"^::: optimisers\.{name}$", section("api.md", heading(room)), re.MULTILINE):
        missing.append(f"its line in docs/api.md, under {heading(room)}")
    if not inspect.cleandoc(rule.__doc__ or "").strip() or not (module.__doc__ or "").strip():
        missing.append("docstrings of the class and of its file, which gives the reference")
    assert not missing, f"{name} lacks " + "; ".join(missing)


@pytest.mark.parametrize("name", RULES)
def test_every_claim_of_a_row_is_the_rules_own(name):
    row = next((row for row in ROWS if row.name == name), None)
    if row is None:
        pytest.fail(f"{name} lacks its row in tests/table.py")
    refuses = RULES[name].real_only
    assert not (refuses and row.complex), f"{name} refuses complex arrays, and its row in tests/table.py says otherwise"


@pytest.mark.parametrize("path", RULE_FILES, ids=name_of)
def test_a_rule_knows_no_framework_and_writes_to_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, _, line in imports(path):
        root = name.split(".")[0]
        assert root not in {"torch", "numpy", "optree", "jax"}, f"{name_of(path)}:{line} imports {name}"
    for node in ast.walk(tree):
        at = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.If | ast.IfExp):
            assert "torch" not in ast.unparse(node.test) or "kind(" in ast.unparse(node.test), f"{at} asks for torch"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            in_place = name.endswith("_") and not name.endswith("__")
            assert not in_place, f"{at} calls {name}, which writes to its array"
            assert not any(keyword.arg == "out" for keyword in node.keywords), f"{at} writes to out="
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        given = {arg.arg for arg in function.args.args} - {"self"}
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in [node.target] if isinstance(node, ast.AugAssign) else targets:
                inner = target.value if isinstance(target, ast.Subscript) else target
                written = isinstance(target, ast.Subscript) or isinstance(node, ast.AugAssign)
                name = inner.id if isinstance(inner, ast.Name) else ""
                assert not (written and name in given), f"{name_of(path)}:{node.lineno} writes to its argument {name}"
