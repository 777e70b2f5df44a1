"""Norms and counts of what is traced."""

from __future__ import annotations

import math
from typing import Any

from ._traced import Traced, cast, compare, in_dtype, power, reduce, select, unary, unary_test


def norm(x: Traced, p: Any) -> Traced:
    """As `arrays.norm`."""
    p, a = float(p), abs(x)
    if math.isinf(p):
        return cast(reduce("largest" if p > 0 else "smallest", a), "float64")
    if p == 0:
        return count_where(compare("ne", a, 0.0))
    if x.dtype == "float64":  # scaled, since squares over- or underflow
        top = reduce("largest", a)
        safe = select((top > 0) & unary_test("isfinite", top), top, 1.0)
        a = a / safe
        if p != 2:
            return power(reduce("sum", power(a, p)), 1 / p) * safe
        return unary("sqrt", reduce("sum", a * a)) * safe
    a = cast(a, "float64")
    return unary("sqrt", reduce("sum", a * a)) if p == 2 else power(reduce("sum", power(a, p)), 1 / p)


def count_where(condition: Traced) -> Traced:
    """How often a condition on elements holds, as a float64 number."""
    return condition.tracer.node("sum", (in_dtype("float64", condition),), "float64", element=False)
