"""What the documentation tells of the benchmarks is what was recorded, and the scripts that write it work."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scripts():
    """The modules ``pages``, ``report``, ``check`` and ``measuring`` of benchmarks/."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import check
        import measuring
        import pages
        import report
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return {"check": check, "measuring": measuring, "pages": pages, "report": report}


@pytest.mark.parametrize("name", ["index", "benchmarks"])
def test_a_page_tells_what_was_recorded(scripts, name):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert scripts["pages"].rendered(text) == text, "run `make bench-pages`"


def test_every_part_stands_on_a_page(scripts):
    text = "".join(page.read_text(encoding="utf-8") for page in scripts["pages"].PAGES)
    assert set(re.findall(r"<!-- measured: ([\w ]+) -->", text)) == set(scripts["pages"].parts())


def test_readers_are_shown_everything_but_the_floor(scripts):
    pages = scripts["pages"]
    rows = scripts["report"].read(pages.HERE)[0]
    shown = [row for name in pages.GROUPS for row in pages.group(rows, name)]
    left = [row for row in rows if row not in shown]
    assert len(shown) == len(rows) - len(left)
    # The slope is in the lines of its counts.
    assert {"the floor"} <= {row.peer for row in left if row.case != "slope/adamw"} <= set(pages.NO_PEER)


def test_recorded_lines_are_those_of_the_table(scripts, tmp_path):
    report = scripts["report"]
    recorded = report.read(ROOT / "benchmarks")
    report.write(tmp_path, *recorded)
    assert report.read(tmp_path) == recorded
    for name in ("results.md", "results.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "benchmarks" / name).read_text(encoding="utf-8")


def test_bounds_are_checked_apart(scripts):
    check, row = scripts["check"], scripts["report"].read(ROOT / "benchmarks")[0][0]
    good, bad = (dataclasses.replace(row, bound=1.0, ratio=ratio) for ratio in (0.9, 1.1))
    text, met = check.checked([good, dataclasses.replace(row, bound=None)])
    assert (met, text.count("| met |"), text.splitlines()[-1]) == (True, 1, "1 of 1 met")
    text, met = check.checked([good, bad, dataclasses.replace(bad, problem="it is not installed")])
    assert (met, text.count("| not met |"), text.count("| not measured |")) == (False, 1, 1)


def test_a_missing_line_is_a_sentence(scripts):
    with pytest.raises(
        SystemExit, match="the pages tell of gpt2/adamw, update_ beside torch fused, and there are 0 such lines"
    ):
        scripts["pages"].home([])


def test_the_picture_is_drawn(scripts, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import picture, report, pages;"
        "picture.draw(Path(sys.argv[2]), report.read(pages.HERE)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmarks"), str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").stat().st_size > 20_000
