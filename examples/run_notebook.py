"""Run notebooks cell by cell, without Jupyter, and keep what they show.

    python examples/run_notebook.py                    # all of examples/notebooks, nothing is written
    python examples/run_notebook.py --write FILE ...   # with what they show written into them

A cell shows what it prints, and the value of its last expression: as HTML where that has `_repr_html_`, and as text.
"""

import argparse
import ast
import contextlib
import io
import json
import sys
import types
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent / "notebooks"


def run_cell(source: str, name: str, module: types.ModuleType) -> list[dict]:
    """What a cell shows, as a notebook keeps it."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";") else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), vars(module))  # noqa: S102 (the notebook's own code)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), vars(module))  # noqa: S307
    outputs: list[dict] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data = {"text/html": lines(value._repr_html_())} | data
        outputs.append({"output_type": "execute_result", "data": data, "metadata": {}})
    return outputs


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def run(path: Path) -> dict:
    """The notebook, with what its cells show when they are run one after the other in a fresh namespace."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    # A module that can be looked up, since dataclasses ask where a class was defined.
    module = types.ModuleType(f"notebook_{path.stem}")
    sys.modules[module.__name__] = module
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = run_cell("".join(cell["source"]), f"{path.name}, cell {count}", module)
            for output in outputs:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = count
            cell.update(execution_count=count, outputs=outputs)
    return notebook


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
    parser.add_argument("--write", action="store_true", help="write what the cells show into the files")
    args = parser.parse_args(argv)
    for path in args.notebooks:
        notebook = run(path)
        shown = sum(len(cell.get("outputs", ())) for cell in notebook["cells"])
        print(f"{path.name}: {len(notebook['cells'])} cells, {shown} outputs")
        if args.write:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
