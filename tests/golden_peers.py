"""Reads the trajectories of tests/golden/peers: one parameter at a time, stepped by the packages people use for a method."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent / "golden" / "peers"


class Recorded(NamedTuple):
    """A trajectory: start, gradients, and the parameter after each step (with the one for evaluation, where there is one)."""

    source: str
    dtype: str
    x0: np.ndarray
    grads: np.ndarray
    xs: np.ndarray
    averaged: np.ndarray | None


@cache
def recorded(method):
    """All trajectories of a method, by their source."""
    found = {}
    with gzip.open(HERE / f"{method}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            each = json.loads(line)
            arrays = (
                np.array(each[name], each["dtype"]) if name in each else None for name in ("x0", "grads", "xs", "averaged")
            )
            found.setdefault(each["source"], []).append(Recorded(each["source"], each["dtype"], *arrays))
    return found


def sources():
    """(method, source) of every file."""
    methods = sorted(path.name.removesuffix(".jsonl.gz") for path in HERE.glob("*.jsonl.gz"))
    return [(method, source) for method in methods for source in recorded(method)]
