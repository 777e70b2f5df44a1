"""Compare this library with others, and write ``results.md`` and ``results.json``.

``python benchmarks/run.py --only 'gpt2/*' --quick``

All of it, without ``--only`` and ``--quick``, is what the documentation tells of: its pages and their picture are written then
too.
"""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import warnings
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

import pages
import report
from measuring import QUICK, Row, Settings

HERE = Path(__file__).resolve().parent
MODULES = ("cases", "cases_rules", "cases_muon", "cases_soap", "cases_wave", "cases_processes")
LIMIT = 900  # seconds for one process


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cases by name; --list shows the names")
    parser.add_argument("--quick", action="store_true", help="few rounds, in two or three minutes")
    parser.add_argument("--rounds", type=int, help="so many rounds at most; without it as many as are worth it")
    parser.add_argument(
        "--out",
        type=Path,
        help="the folder to write to; without it, this one for all cases, and out/bench for some or quick ones",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and do nothing")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # of a process that measures: its lines go there
    return parser.parse_args()


def settings_of(given: argparse.Namespace) -> Settings:
    settings = QUICK if given.quick else Settings()
    if given.rounds:
        settings = dataclasses.replace(settings, rounds=given.rounds, least=min(settings.least, given.rounds))
    return settings


def selected(given: argparse.Namespace):
    for module in MODULES:
        importlib.import_module(module)
    cases = importlib.import_module("cases")
    left_out = cases.NOT_QUICK if given.quick and not given.only else ()
    wanted = {name: run for name, run in cases.CASES.items() if name not in left_out}
    return {name: run for name, run in wanted.items() if any(fnmatch(name, pattern) for pattern in given.only or "*")}


def measure(given: argparse.Namespace) -> None:
    """In a process of its own: run the selected cases, one line of JSON for each result."""
    warnings.simplefilter("ignore")  # the peers' own
    with given.into.open("w", encoding="utf-8") as results:
        for name, run in selected(given).items():
            print(name, file=sys.stderr)
            for row in run(settings_of(given)):
                results.write(json.dumps(dataclasses.asdict(row)) + "\n")
                results.flush()


def in_a_process(names: list[str], given: argparse.Namespace) -> tuple[list[Row], str]:
    """The lines of some cases, and what went wrong."""
    with TemporaryDirectory() as folder:
        into, said = Path(folder, "rows"), Path(folder, "said")
        into.touch()
        options = ["--quick"] * given.quick + (["--rounds", str(given.rounds)] if given.rounds else [])
        command = [sys.executable, str(HERE / "run.py"), "--into", str(into), *options, "--only", *names]
        with said.open("w") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=log, timeout=LIMIT, check=False).returncode
                problem = f"ended with {code}" if code else ""
            except subprocess.TimeoutExpired:
                problem = f"took more than {LIMIT} seconds"
        rows = [Row(**json.loads(text)) for text in into.read_text(encoding="utf-8").splitlines()]
        if problem:
            last = (said.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
            problem = f"{names[0].partition('/')[0]}: the process {problem}: {last[:200]}"
    return rows, problem


def main() -> None:
    given = arguments()
    if given.into:
        measure(given)
        return
    names = list(selected(given))
    if given.list:
        print("\n".join(names))
        return
    if not names:
        sys.exit(f"no case is named {' or '.join(given.only)}; --list shows the names")
    about = report.surroundings()
    for name, value in about.items():
        print(f"{name}: {value}")
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    rows, problems = [], []
    print(report.HEAD)
    for group in tqdm(groups.values(), unit="process"):
        more, problem = in_a_process(group, given)
        rows += more
        problems += [problem] if problem else []
        for row in more:
            tqdm.write(report.line(row))
    for problem in problems:
        print(problem)
    whole = not given.quick and not given.only
    out = given.out or (HERE if whole else Path("out", "bench"))
    report.write(out, rows, problems, about, settings_of(given))
    print(pages.tables(rows))
    print(f"every line is in {out / 'results.md'}")
    if out == HERE:
        pages.write()


if __name__ == "__main__":
    main()
