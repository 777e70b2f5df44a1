"""Check the built site without a browser, in a few seconds: ``python .ci/check_site.py [site]``.

Every link leads to a page and every anchor to an element; every picture is there, and says in words what it shows; nothing is
loaded from elsewhere; formulas were set; and no group of the navigation has more than eight entries.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

IN_VIEW = 8
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
NOT_LOADED = {"canonical", "next", "prev"}  # kinds of <link> that only tell
FORMULA = re.compile(r"(?<![\\$\w])\$[^\s$](?:[^$\n]*[^\s$])?\$(?!\w)")


class Page(HTMLParser):
    """What a page holds.

    Attributes:
        ids: names that a link can lead to.
        links: where its links lead.
        loaded: files that a browser loads to show it.
        silent: pictures without an alternative text.
        groups: entries in each list of the navigation, the contents of the page apart.
        prose: the text that is no code.

    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.silent: list[str] = []
        self.groups: list[int] = []
        self.prose: list[str] = []
        self._open: list[tuple[str, str, int | None]] = []  # tag, classes, place in groups
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        classes = given.get("class", "")
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if given.get("rel") not in NOT_LOADED:
            self.loaded += [given[name] for name in ("src", "href") if (tag, name) in LOADED and name in given]
        if tag == "img" and not given.get("alt"):
            self.silent.append(given.get("src", ""))
        group = None
        if tag == "ul" and "md-nav__list" in classes and not any("md-nav--secondary" in above for _, above, _ in self._open):
            group = len(self.groups)
            self.groups.append(0)
        if tag == "li" and "md-nav__item" in classes and self._open and self._open[-1][2] is not None:
            self.groups[self._open[-1][2]] += 1
        if tag not in VOID:
            self._open.append((tag, classes, group))

    def handle_endtag(self, tag: str) -> None:
        if any(tag == name for name, _, _ in self._open):  # a </p> that a <div> had closed before has nothing to close
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"pre", "code", "script", "style"} & {tag for tag, _, _ in self._open}:
            self.prose.append(data)


def target(site: Path, page: Path, link: str) -> tuple[Path, str]:
    """The file that a link leads to, and the name in it."""
    parts = urlsplit(link)
    path = unquote(parts.path)
    file = site / path.lstrip("/") if path.startswith("/") else page.parent / path
    if not path:
        file = page
    elif path.endswith("/") or file.is_dir():
        file /= "index.html"
    return file.resolve(), unquote(parts.fragment)


def faults(site: Path) -> Iterator[str]:
    """What is wrong, in a line each."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"there are no pages in {site}; build them with: make docs"
    seen = False  # the navigation is the same on all pages, so that one is enough to tell of
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in page.links:
            if urlsplit(link).scheme or link.startswith("//") or name.name == "404.html":
                continue
            file, fragment = target(site, path, link)
            if not file.exists():
                yield f"{name}: a link leads nowhere: {link}"
            elif fragment and file in pages and fragment not in pages[file].ids:
                yield f"{name}: a link leads to a name that is not there: {link}"
        for file in page.loaded:
            if urlsplit(file).scheme in {"http", "https"} or file.startswith("//"):
                yield f"{name}: is loaded from elsewhere: {file}"
            elif not urlsplit(file).scheme and name.name != "404.html" and not target(site, path, file)[0].exists():
                yield f"{name}: is not there: {file}"
        yield from (f"{name}: a picture has no alternative text: {picture}" for picture in page.silent)
        yield from (f"{name}: a formula was not set: {found}" for text in page.prose for found in FORMULA.findall(text))
        if page.groups and max(page.groups) > IN_VIEW and not seen:
            seen = True
            yield f"{name}: {max(page.groups)} entries in a group of the navigation; at most {IN_VIEW} are seen at a glance"


def main(folder: str = "site") -> None:
    """Print what is wrong, and exit with 1 if anything is."""
    site = Path(folder).resolve()
    found = list(faults(site))
    for fault in found:
        print(fault)  # noqa: T201
    if found:
        sys.exit(1)
    print(f"{len(list(site.rglob('*.html')))} pages: links, anchors, pictures, formulas and navigation are well")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
