"""Running one line of steps by compiled loops and one by the rules themselves, as the tests of the engine want it."""

from collections import defaultdict
from hashlib import blake2b

import numpy as np
import optree
import torch

import optimisers as opt
from optimisers.arrays import dtype_name, is_number
from optimisers.engine.groups import group
from optimisers.engine.kernels.c import compiler as build
from optimisers.engine.kernels.c import loops
from optimisers.engine.memory import pool as memory
from optimisers.errors import OptimisersError
from optimisers.rules._states import state_leaves


def adjusted(state, times, where=None):
    """The state with the first field changed that can be."""
    for field, value in (
        ("eta", 0.03), ("omega", 0.3), ("delta", 0.4), ("lambda_", 0.02), ("rho", 0.6), ("tau", 1.5), ("ell", (0.4, 1.4)),
    ):  # fmt: skip
        try:
            return opt.adjust(state, **{field: value if isinstance(value, tuple) else value * times}, where=where)
        except OptimisersError:
            continue
    return state


class Counter:
    """How often loops were run."""

    def __init__(self, monkeypatch):
        self.runs = 0
        original = loops.Call.ready

        def run(own):
            self.runs += 1
            return original(own)

        monkeypatch.setattr(loops.Call, "ready", run)


NATIVE_FLAGS = build._FLAGS
"""Those of users, read before the tests begin."""


def natively(monkeypatch):
    """Loops for this processor, as in a process of a user."""
    forget(monkeypatch)
    monkeypatch.setattr(build, "_FLAGS", NATIVE_FLAGS)


def forget(monkeypatch):
    """An engine that has traced, compiled and warned of nothing yet."""
    monkeypatch.setattr(group, "_variants", defaultdict(list))
    monkeypatch.setattr(group, "_refused", {})
    monkeypatch.setattr(group, "_warned", set())
    monkeypatch.setattr(build, "_failed", False)
    build.compiler.cache_clear()
    build._version.cache_clear()


def traces():
    """How many programs there are."""
    return sum(map(len, group._variants.values()))


def is_exact(state):
    """Whether everything that this state's groups were stepped by gives the bits of the rules."""
    return all(program.exact for program in programs(state))


def is_agreed(state):
    """Whether everything that this state's groups were stepped by gives the same bits compiled and run by NumPy."""
    return all(program.agreed for program in programs(state))


def programs(state):
    """What this state's groups were stepped by."""
    keys = {group_state.group.key for group_state in state._grouped.group_states}
    found = [variant.program for key, variants in group._variants.items() if key[:-1] in keys for variant in variants]
    assert found
    return found


def held(state):
    """The number of arrays whose state is held by group."""
    return sum(group_state.group.count for group_state in getattr(state._grouped, "group_states", ()))


def wide(x):
    """An array as float64."""
    return x.detach().to(torch.float64).numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


def bits(x):
    """Everything that an array is, as far as it is no NaN, of which there are many."""
    if is_number(x):
        return type(x), x
    return dtype_name(x), tuple(x.shape), np.nan_to_num(wide(x), nan=1.25).tobytes(), np.isnan(wide(x)).tobytes()


def raw(tree):
    """What tells the bytes of the arrays and numbers of a tree from others."""
    return [blake2b(_bytes(x)).hexdigest()[:16] for x in optree.tree_leaves(tree)]


def _bytes(x):
    if is_number(x):
        return repr(x).encode()
    return x.tobytes() if isinstance(x, np.ndarray) else x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}


def coarsest(state):
    """The widest unit in the last place of the arrays that a state computes with."""
    leaves = [leaf for entry in state._entries for leaf in state_leaves(entry.state) if not is_number(leaf)]
    return max((EPS[dtype_name(leaf)] for leaf in leaves if dtype_name(leaf) in {"float32", "float64"}), default=0.0)


def assert_alike(actual, expected, *, exact, what="", unit=0.0):
    """Bit for bit, or within a few units in the last place of the largest element."""
    if is_number(expected) or exact:
        assert bits(actual) == bits(expected), what
        return
    assert (dtype_name(actual), actual.shape) == (dtype_name(expected), expected.shape), what
    a, b = wide(actual), wide(expected)
    large = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    unit = 128 * max(unit, EPS[dtype_name(expected)])
    np.testing.assert_allclose(a, b, rtol=unit, atol=unit * large, err_msg=what)


def assert_states_alike(actual, expected, *, exact):
    unit = coarsest(expected)
    for slot, a, b in zip(expected._slots, actual._entries, expected._entries, strict=True):
        assert (a.rule, a.frozen, a.numbers) == (b.rule, b.frozen, b.numbers)
        ours, theirs = state_leaves(a.state), state_leaves(b.state)
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert_alike(x, y, exact=exact, what=f"state of {slot.path}", unit=unit)


LARGE = memory.SMALL + 100
SHAPES = {"large": (LARGE,), "matrix": (4, LARGE // 4 + 1), "small": (50,), "tiny": (3, 2)}


def arrays(lib, seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    made = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    return made if lib == "numpy" else {key: torch.from_numpy(x) for key, x in made.items()}


def copied(tree):
    return optree.tree_map(lambda x: x.copy() if isinstance(x, np.ndarray) else x.clone(), tree)


def address(x):
    return x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else x.data_ptr()
