"""float16 parameters: squares are kept in float32, so that small gradients have steps of their size."""

import numpy as np
import pytest
import torch

import optimisers as opt
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
