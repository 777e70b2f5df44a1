"""Walk every page of the built site in a real browser: ``python .ci/look_at_site.py``.

On a wide window and on a phone: no error in the console, no file that fails to load, no picture that cannot be shown, no page
that is wider than its window, and every link to a name in a page finds it there. With ``--pictures FOLDER``, screenshots of
some pages in its place, light and dark.
"""

import argparse
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from browser import Browser, opened

SHOWN = (
    "",
    "methods/muon/",
    "methods/adamw/",
    "api/",
    "rules/",
    "memory/",
    "benchmarks/",
    "muon-in-ten-minutes/",
    "notebooks/first-steps/",
)
SIZES = ((1280, 900), (390, 844))

# Called in the page: what is wrong with it.
FAULTS = """(() => {
  const said = [];
  for (const picture of document.images)
    if (!picture.complete || picture.naturalWidth === 0) said.push("a picture cannot be shown: " + picture.getAttribute("src"));
  for (const link of document.querySelectorAll("a[href^='#']")) {
    const name = decodeURIComponent(link.getAttribute("href").slice(1));
    if (name && !document.getElementById(name)) said.push("a link leads to a name that is not there: #" + name);
  }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth + 1) {
    const wide = [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > page.clientWidth + 1);
    const by = wide[0] ? `, by <${wide[0].tagName}>` : "";
    said.push(`is ${page.scrollWidth} pixels wide in a window of ${page.clientWidth}${by}`);
  }
  return said;
})()"""


class Silent(http.server.SimpleHTTPRequestHandler):
    """Serves files, and keeps its log to itself."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site on a free port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()


def complaints(events: list[dict[str, Any]]) -> Iterator[str]:
    """What the browser had to say while it loaded a page."""
    for event in events:
        told, kind = event["params"], event["method"]
        if kind == "Runtime.exceptionThrown":
            yield f"an error in a script: {told['exceptionDetails']['text']}"
        elif kind == "Runtime.consoleAPICalled" and told["type"] in {"error", "assert"}:
            yield f"an error in the console: {json.dumps([value.get('value') for value in told['args']])}"
        elif kind == "Log.entryAdded" and told["entry"]["level"] == "error":
            yield f"an error in the log: {told['entry']['text']} {told['entry'].get('url', '')}"
        elif kind == "Network.loadingFailed" and not told.get("canceled"):
            yield f"a file failed to load: {told['errorText']}"


def walk(browser: Browser, address: str, pages: list[str]) -> Iterator[str]:
    """What is wrong, in a line each."""
    for width, height in SIZES:
        browser.look(width, height, "light")
        for page in pages:
            events = browser.go(address + page)
            for fault in [*complaints(events), *browser.ask(FAULTS)]:
                yield f"/{page} at {width}: {fault}"


def photograph(browser: Browser, address: str, folder: Path, *, whole: bool) -> None:
    for width, height in SIZES:
        for scheme in ("light", "dark"):
            browser.look(width, height, scheme)
            for page in SHOWN:
                browser.go(address + page)
                browser.picture(folder / f"{page.strip('/').replace('/', '-') or 'home'}-{width}-{scheme}.png", whole=whole)


def main() -> None:
    """Print what is wrong, and exit with 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", nargs="?", type=Path, default=Path("site"))
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="screenshots of some pages, at two widths, light and dark"
    )
    parser.add_argument("--whole", action="store_true", help="pictures of whole pages, and not of what a window shows at first")
    args = parser.parse_args()
    pages = [path.parent.relative_to(args.site).as_posix() + "/" for path in sorted(args.site.rglob("index.html"))]
    pages = ["" if page == "./" else page for page in pages]
    with opened() as browser, served(args.site) as address:
        if args.pictures:
            photograph(browser, address, args.pictures, whole=args.whole)
            return
        found = list(walk(browser, address, pages))
    print("\n".join(found) or f"{len(pages)} pages at {' and '.join(str(w) for w, _ in SIZES)} pixels: nothing is wrong")  # noqa: T201
    if found or not pages:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
