"""Whether a rule can step the parts of an array that is cut over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...arrays import Untraceable, as_array
from ...rules._base import AbstractRule
from ...rules._states import map_state, state_leaves
from ...tree.entry import Entry, Lease, numbers_in
from ...tree.heads import Rules
from ...tree.sharding import Sharding
from .group import Group
from .states import has_law, key_of


def steps_parts(rule: AbstractRule, part: Any, sharding: Sharding, path: str) -> bool:
    """Whether it is elementwise but for sums and transforms of whole arrays, which the engine can then take over ranks.

    Otherwise arrays are put together for it.
    """
    if rule.law == "elementwise":
        return True
    if not has_law(rule):
        return False
    try:
        state = map_state(as_array, rule.init(part))
        entry = Entry(rule, rule, state, numbers_in(state), False, "", Lease())
        key = key_of(entry, part, sharding)
        if key is None:
            return False
        group = Group(key, [0], [path], Rules.sharing([rule]), [part], state, [sharding])
        counters = np.array([group.counters_in(state_leaves(state))]).reshape(1, -1)
        group.partition(np.array([0]), counters, group.dtype)
    except Untraceable:
        return False
    return True
