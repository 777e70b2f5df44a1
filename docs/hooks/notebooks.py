"""A page for each notebook of examples/notebooks: its text, its code, and what its cells show."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).resolve().parents[2] / "examples" / "notebooks"


def on_files(files: Files, *, config: Any) -> None:
    """Write the pages: notebooks/NAME.md."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        text = "\n\n".join(part for cell in notebook["cells"] for part in parts(cell))
        text += f"\n\nThis page is `examples/notebooks/{path.name}`. The tests run it.\n"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))


def parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", [])})
        if "text/html" in data:
            yield f'<div class="notebook-output">{"".join(data["text/html"])}</div>'
        else:
            yield f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
