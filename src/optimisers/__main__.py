"""A look into checkpoints: ``python -m optimisers show FILE`` and ``python -m optimisers diff A B``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import OptimisersError
from .interop.inspection import diff, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what it prints goes to standard output, an error in one line to standard error (exit status 2)."""
    parser = argparse.ArgumentParser(prog="python -m optimisers", description="Look into files that optimisers.save wrote.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("show", help="rules, paths, shapes, dtypes, bytes and step counts of a file")
    one.add_argument("file")
    one.add_argument("--full", action="store_true", help="a line for each array, nothing folded")
    two = commands.add_parser("diff", help="what changed between two files (exit status 1 if anything did)")
    two.add_argument("before")
    two.add_argument("after")
    options = parser.parse_args(arguments)
    try:
        text = show(options.file, full=options.full) if options.command == "show" else diff(options.before, options.after)
    except OSError as error:
        print(f"optimisers: {error.filename!r} cannot be read: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 2
    except OptimisersError as error:
        print(f"optimisers: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(text)  # noqa: T201
    return int(options.command == "diff" and text != "the same")


if __name__ == "__main__":
    sys.exit(main())
