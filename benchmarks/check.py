"""The bounds that the project sets itself, beside what was measured: ``python benchmarks/check.py [--strict] [FOLDER]``.

Nothing else depends on them. With ``--strict`` a bound that is not met is an exit with 1.
"""

import argparse
from pathlib import Path

import report
from measuring import Row

HERE = Path(__file__).resolve().parent


def verdict(row: Row) -> str:
    if row.problem:
        return "not measured"
    return "met" if row.met else "not met"


def checked(rows: list[Row]) -> tuple[str, bool]:
    """The lines with a bound, and whether all are met."""
    bounded = [row for row in rows if row.bound is not None]
    columns = [*report.COLUMNS, "at most", ""]
    lines = [report.table_line([*report.cells(row), f"{row.bound:g}", verdict(row)]) for row in bounded]
    met = sum(verdict(row) == "met" for row in bounded)
    text = "\n".join([report.table_line(columns), f"|{'---|' * len(columns)}", *lines, "", f"{met} of {len(bounded)} met"])
    return text, met == len(bounded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="where results.json lies")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bound is not met")
    args = parser.parse_args()
    text, met = checked(report.read(args.folder)[0])
    print(text)
    if args.strict and not met:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
