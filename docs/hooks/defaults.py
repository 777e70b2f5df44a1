"""The default of a field with a range, ``bounded(0.9, range=...)``, is shown as 0.9."""

from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Called for each attribute before signatures of dataclasses are made of them."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Put the first argument in the place of the call."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and value.function.canonical_name == "bounded" and value.arguments:
            first = value.arguments[0]
            attr.value = None if isinstance(first, griffe.ExprKeyword) else first
