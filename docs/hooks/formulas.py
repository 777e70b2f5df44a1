r"""Formulas in Markdown, ``$\eta\, g$``, become MathML, which browsers set themselves: no script, no font, nothing to load.

A formula between ``$$`` is set apart. Code is left as it is, and so is a dollar after a letter or before a blank.
"""

import re
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r"\$\$(?P<apart>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])", re.DOTALL)

# Names of functions: as operators they would be set apart from their brackets.
_FUNCTION = re.compile(r"<mo>([a-z]{2,})</mo>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    pieces = _CODE.split(markdown)
    return "".join(piece if i % 2 else _FORMULA.sub(_mathml, piece) for i, piece in enumerate(pieces))


def _mathml(match: re.Match[str]) -> str:
    apart = match["apart"]
    text = (apart or match["inline"]).strip().replace(r"\|", "|")  # as a bar is written in a table
    made = _FUNCTION.sub(r"<mi>\1</mi>", convert(text, display="block" if apart else "inline"))
    # Markdown must neither see a pair of its own signs nor end a table's cell.
    for sign, entity in (("|", "&#x7C;"), ("*", "&#x2A;"), ("_", "&#x5F;"), ("\\", "&#x5C;")):
        made = made.replace(sign, entity)
    # Markdown takes a line that begins with <math> for a block of its own.
    return f"\n\n{made}\n\n" if apart else f"<span>{made}</span>"
