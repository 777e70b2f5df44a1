"""float16 parameters: squares are kept in float32, so that small gradients have steps of their size."""

import ctypes

import numpy as np
import pytest
import torch

import optimisers as opt
from looped import assert_alike, held
from optimisers.engine.kernels.c import compiler, source
from optimisers.rules._states import state_leaves
from table import ROWS

SQUARES = (
    "Adam", "AdamW", "RAdam", "NAdam", "OAdam", "AMSGrad", "AdaBelief", "AdaGrad", "AdaDelta", "RMSProp", "Apollo", "Adafactor",
    "AdamMini", "AdEMAMix", "Adopt", "Came", "Lamb", "LaProp", "Prodigy", "StableAdamW", "Yogi",
)  # fmt: skip
RULES = [pytest.param(rule, id=f"{row.name}-{i}") for row in ROWS if row.name in SQUARES for i, rule in enumerate(row.configs)]
SCALES = 10.0 ** np.arange(-6, 3)


def made(x, lib):
    return x if lib is np else torch.from_numpy(x)


def run(rule, x, grads, **options):
    state = opt.setup(rule, x, **options)
    for grad in grads:
        state, x = opt.update(state, x, grad)
    return state, np.asarray(x, np.float64)


@pytest.mark.parametrize("lib", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("rule", RULES)
def test_steps_in_float16_follow_those_in_float32(rule, lib):
    """To a few units in the last place, over gradients from 1e-6 to 1e2, one size for each row."""
    rng = np.random.default_rng(0)
    x = np.ones((len(SCALES), 16), np.float16)
    grads = [(SCALES[:, None] * rng.uniform(0.5, 1.5, x.shape)).astype(np.float16) for _ in range(8)]
    state, low = run(rule, made(x, lib), [made(g, lib) for g in grads])
    _, high = run(rule, made(x.astype(np.float32), lib), [made(g.astype(np.float32), lib) for g in grads])
    held = np.abs(high) < 1000  # without epsilon AdaBelief takes steps that float16 cannot hold
    assert held.any(axis=1).sum() >= 2
    moved, unit = np.abs(high - 1), 2.0**-10
    # Each step is rounded, and so is the running mean of the smallest gradients.
    assert (np.abs(low - high) <= 4 * unit + 0.15 * moved)[held].all()
    dtypes = {str(leaf.dtype).removeprefix("torch.") for leaf in state_leaves(state[()].state) if np.ndim(leaf) > 0}
    assert "float32" in dtypes


@pytest.mark.parametrize("lib", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("rule", [opt.Adam(0.001), opt.NAdam(0.001), opt.AdamW(0.001)], ids=repr)
def test_one_small_gradient_does_not_throw_a_parameter_away(rule, lib):
    x = np.ones(4, np.float16)
    grads = [np.full(4, g, np.float16) for g in (1e-4, 1e-6, 1e-6)]
    _, after = run(rule, made(x, lib), [made(g, lib) for g in grads])
    assert np.abs(after - 1).max() < 0.02
    _, exploded = run(rule, made(x, lib), [made(g, lib) for g in grads], state_dtype="float16")
    assert np.abs(exploded - 1).max() > 0.02  # as asked for


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_state_dtype_decides(name):
    state = opt.setup(opt.Adam(), np.ones(3, np.float16), state_dtype=name)
    m, v, _ = state[()].state
    assert m.dtype == v.dtype == name
    m, v, _ = opt.setup(opt.Adam(), np.ones(3, np.float16))[()].state
    assert (m.dtype, v.dtype) == ("float16", "float32")


def test_the_choice_is_kept(tmp_path):
    x = torch.ones(3, dtype=torch.float16)
    for options in ({}, {"state_dtype": "float16"}):
        state, _ = opt.update(opt.setup(opt.Adam(), x, **options), x, x)
        opt.save(tmp_path / "a", state)
        assert opt.load(tmp_path / "a", like=opt.setup(opt.Adam(), x, **options)) == state
        assert opt.load(tmp_path / "a", like=x) == state
        again, _ = opt.update(state, x, x)
        assert [leaf.dtype for leaf in state_leaves(again[()].state)] == [leaf.dtype for leaf in state_leaves(state[()].state)]


# --- by loops -----------------------------------------------------------------------------------------------------------------

CONVERSIONS = """
#define LOOP(name, from, to, call) \\
  void name(const from *a, to *b, int64_t n) { for (int64_t i = 0; i < n; ++i) b[i] = call(a[i]); }
LOOP(widen, uint16_t, float, widened_half)
LOOP(narrow, float, uint16_t, rounded_half)
LOOP(narrow_once, double, uint16_t, rounded_half_once)
"""


@pytest.fixture
def conversions(loops_directory, monkeypatch):
    monkeypatch.setenv("OPTIMISERS_CACHE", str(loops_directory))
    library = compiler.built(source._HEADER + CONVERSIONS)

    def convert(name, x, dtype):
        out = np.empty(len(x), dtype)
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function(x.ctypes.data, out.ctypes.data, len(x))
        return out

    return convert


def assert_same_bits(found, expected):
    assert (np.isnan(found) == np.isnan(expected)).all()
    word = f"u{found.itemsize}"
    assert (found.view(word) == expected.view(word))[~np.isnan(found)].all()


HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_every_half_is_widened_as_by_the_libraries(conversions):
    found = conversions("widen", HALVES, np.float32)
    assert_same_bits(found, HALVES.astype(np.float32))
    assert_same_bits(found, torch.from_numpy(HALVES).float().numpy())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_are_rounded_to_halves_as_by_the_libraries(conversions):
    """Around each half, half-way to the next one and beside that, and numbers of any size."""
    rng = np.random.default_rng(0)
    bits = HALVES[np.isfinite(HALVES)].astype(np.float32).view(np.uint32)
    near = [bits + np.uint32(d % 2**32) for d in (0, 1, -1, 0xFFF, 0x1000, 0x1001)]
    x = np.concatenate([*near, rng.integers(0, 2**32, 10**5, dtype=np.uint32)]).view(np.float32)
    small = np.arange(-(2**12), 2**12) * 2.0**-26  # below the normal halves, by quarters of their unit
    x = np.concatenate([x, small.astype(np.float32)])
    found = conversions("narrow", x, np.float16)
    assert_same_bits(found, x.astype(np.float16))
    assert_same_bits(found, torch.from_numpy(x).half().numpy())
    finite = x[np.isfinite(x)].astype(np.float64)
    wide = np.concatenate([finite, finite * (1 + 2.0**-45), finite * (1 - 2.0**-45)])
    wide = np.concatenate([wide, rng.integers(0, 2**64, 10**5, dtype=np.uint64).view(np.float64)])
    assert_same_bits(conversions("narrow_once", wide, np.float16), wide.astype(np.float16))


@pytest.mark.parametrize("way", ["0", "1"])
@pytest.mark.parametrize("lib", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("grads", ["float16", "float64"])
@pytest.mark.parametrize(
    "rule",
    [
        opt.AdamW(1e-2),
        opt.OptimiserChain(opt.ClipGrad(0.5), opt.Adam(epsilon=1e-9)),
        opt.Scheduled(opt.RMSProp(), epsilon=lambda t: 1e-9 * t, eta=lambda t: 0.01 / (1 + t)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_loops_know_what_float16_moments_can_hold(rule, grads, lib, way, switch):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(40).astype(np.float16)
    given = [(10.0 ** rng.integers(-6, 2, 40) * rng.standard_normal(40)).astype(grads) for _ in range(4)]
    switch("rules")
    expected, right = run(rule, made(x, lib), [made(g, lib) for g in given], state_dtype="float16")
    switch(way)
    state, found = run(rule, made(x, lib), [made(g, lib) for g in given], state_dtype="float16")
    assert held(state) == 1
    exact = lib is np
    assert_alike(found, right, exact=exact, unit=2.0**-11)
    for a, b in zip(state_leaves(state[()].state), state_leaves(expected[()].state), strict=True):
        assert_alike(a, b, exact=exact or np.ndim(b) == 0, unit=2.0**-11)
