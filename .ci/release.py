"""Make a release: ``make release VERSION=0.2.0``.

Writes the version and the date where they belong, commits and tags. Nothing is pushed: look at it, then
``git push --follow-tags``, and the workflow for tags checks, builds and publishes it.
"""

import datetime as dt
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(version: str) -> None:
    """Check that a release can be made, and make it."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        sys.exit(f"a version is three numbers, such as 0.2.0; got {version!r}")
    if git("status", "--porcelain"):
        sys.exit("there are changes that are not committed; commit them or put them away first")
    if git("tag", "--list", f"v{version}"):
        sys.exit(f"there is a release {version} already")
    today = dt.datetime.now(dt.UTC).date().isoformat()
    replace("CHANGELOG.md", r"^## \[Unreleased\]$", f"## [Unreleased]\n\n## [{version}] - {today}")
    replace("src/optimisers/__init__.py", r'^__version__ = ".*"$', f'__version__ = "{version}"')
    replace("CITATION.cff", r"^version: .*$", f"version: {version}")
    git("commit", "--all", "--quiet", "--message", f"Release {version}")
    git("tag", "--annotate", f"v{version}", "--message", f"optimisers {version}")
    print(f"v{version} is committed and tagged. Publish it with: git push --follow-tags")  # noqa: T201


def replace(name: str, pattern: str, text: str) -> None:
    """Put text in the place of the one line of a file that is like the pattern."""
    path = ROOT / name
    new, count = re.subn(pattern, text, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if count != 1:
        sys.exit(f"{name} has {count} lines like {pattern}; one was expected")
    path.write_text(new, encoding="utf-8")


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603, S607


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
