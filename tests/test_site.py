"""The check of the built site finds what it is for. The site itself is checked by `make docs`."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "check_site.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_site", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(count):
    return '<ul class="md-nav__list">' + '<li class="md-nav__item"><a href="../a/">x</a></li>' * count + "</ul>"


GOOD = {
    "index.html": '<h1 id="top">Home</h1><a href="a/#b">to b</a><a href="#top">up</a><a href="https://a.org/">out</a><code>$x$</code>',
    "a/index.html": f'<p id="b">$5 and $6.</p><img src="p.png" alt="a path"><a href="..">home</a><nav>{entries(8)}</nav>',
    "a/p.png": "",
}


@pytest.fixture
def built(tmp_path, check):
    """What is said of the good site with something in the place of something else."""

    def faults(file="index.html", old="", new=""):
        for name, text in GOOD.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace(old, new) if name == file and old else text)
            assert name != file or not old or old in text
        return list(check.faults(tmp_path))

    return faults


def test_a_good_site_is_good(built):
    assert built() == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("index.html", "a/#b", "c/", "index.html: a link leads nowhere: c/"),
        ("index.html", "a/#b", "a/#c", "index.html: a link leads to a name that is not there: a/#c"),
        ("index.html", "#top", "#bottom", "index.html: a link leads to a name that is not there: #bottom"),
        ("a/index.html", "p.png", "q.png", "a/index.html: is not there: q.png"),
        (
            "a/index.html",
            "p.png",
            "https://a.org/p.png",
            "a/index.html: is loaded from elsewhere: https://a.org/p.png",
        ),
        ("a/index.html", ' alt="a path"', "", "a/index.html: a picture has no alternative text: p.png"),
        ("a/index.html", "$5 and", r"$\eta$ and", r"a/index.html: a formula was not set: $\eta$"),
        (
            "a/index.html",
            entries(8),
            entries(9),
            "a/index.html: 9 entries in a group of the navigation; at most 8 are seen at a glance",
        ),
    ],
)
def test_what_is_wrong_is_said(built, file, old, new, said):
    assert built(file, old, new) == [said]


def test_the_contents_of_a_page_are_no_navigation(built):
    assert built("a/index.html", entries(8), f'<nav class="md-nav md-nav--secondary">{entries(20)}</nav>') == []


def test_no_site_is_no_success(check, tmp_path):
    with pytest.raises(SystemExit):
        check.main(str(tmp_path))
