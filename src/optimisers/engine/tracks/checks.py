"""Measures that are read and checked at the end of a step: of all arrays together, with one synchronisation for each device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from ...arrays import can_read, kind
from ...errors import NonFiniteError


class Checked(NamedTuple):
    """A measure of one array or of many, that their rules are to be asked about."""

    at: list[tuple[str, Any]]
    """The path and the rule of each array."""
    values: Sequence[Any]
    """For each number of the measure a vector with an entry for each array, or for a single array a number."""


def check(faults: list[str], measures: Sequence[Checked]) -> None:
    """NonFiniteError if there are faults, or if a rule finds one in its measure. What cannot be read is not checked."""
    if not faults and not measures:
        return
    readable = [measure for measure in measures if all(map(can_read, measure.values))]
    read = iter(_numbers([value for measure in readable for value in measure.values]))
    found = list(faults)
    for at, values in readable:
        rows = zip(*(next(read) for _ in values), strict=True)
        for (path, rule), row in zip(at, rows, strict=True):
            fault = rule.fault(row)
            if fault is not None:
                found.append(f"{type(rule).__name__} at {path!r}: {fault}")
    if found:
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        advice = "Nothing was changed. Look at these gradients, skip the step, or set throw=False to let them through"
        raise NonFiniteError("\n".join(found[:5]) + more + f"\n{advice}")


def read_all(measures: Sequence[tuple[Any, ...]]) -> list[tuple[float, ...]]:
    """The measures as Python floats, with one synchronisation for each device."""
    read = iter(_numbers([value for measure in measures for value in measure]))
    return [tuple(next(read)[0] for _ in measure) for measure in measures]


def _numbers(values: Sequence[Any]) -> list[list[float]]:
    """The numbers in each of many numbers and vectors, with one synchronisation for each device."""
    by_device: defaultdict[Any, list[int]] = defaultdict(list)
    read = [[] if kind(value) == "torch" else [float(value)] for value in values]
    for i, value in enumerate(values):
        if kind(value) == "torch":
            by_device[value.device].append(i)
    for chosen in by_device.values():
        import torch

        joined = torch.cat([values[i].detach().to(torch.float64).reshape(-1) for i in chosen])
        # A subclass that wraps other tensors has no list of its numbers, only one after another.
        numbers = iter(joined.tolist() if type(joined) is torch.Tensor else [number.item() for number in joined])
        for i in chosen:
            read[i] = list(islice(numbers, values[i].numel()))
    return read
