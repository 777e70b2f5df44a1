"""Members of chains against what their papers say, written out slowly."""

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from running import run

both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def passed(rule, x, g, kind):
    """What a member makes of one gradient."""
    (after,) = run(rule, x, [g], kind)
    return x - after


@both_kinds
def test_a_trust_ratio_gives_steps_the_norm_of_the_parameter(kind):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 4, 6))
    size, length = np.linalg.norm(x), np.linalg.norm(g)
    np.testing.assert_allclose(passed(opt.TrustRatio(), x, g, kind), g * size / length, rtol=1e-12)
    rule = opt.TrustRatio(0.1, 0.5, most=1.0)
    np.testing.assert_allclose(passed(rule, x, g, kind), 0.1 * g / (length + 0.5), rtol=1e-11)
    np.testing.assert_array_equal(passed(opt.TrustRatio(), 0 * x, g, kind), g)
    np.testing.assert_array_equal(passed(opt.TrustRatio(), x, 0 * g, kind), 0 * g)


@both_kinds
def test_the_root_mean_square_is_limited(kind):
    rng = np.random.default_rng(1)
    x, g = rng.standard_normal((2, 4, 6))
    rms = np.sqrt(np.mean(g * g))
    np.testing.assert_allclose(passed(opt.ClipRMS(0.5), x, g, kind), g / max(1, rms / 0.5), rtol=1e-12)
    np.testing.assert_allclose(passed(opt.ClipRMS(2.0), x, g, kind), g, rtol=1e-12)


@both_kinds
def test_each_unit_is_clipped_by_its_own_weights(kind):
    rng = np.random.default_rng(2)
    for shape in ((7,), (4, 6), (1, 5), (3, 2, 2, 2)):
        x, g = rng.standard_normal((2, *shape))
        units = shape[0] if sum(n > 1 for n in shape) > 1 else 1
        rows, weights = g.reshape(units, -1), x.reshape(units, -1)
        expected = [
            row * min(1.0, 0.3 * max(np.linalg.norm(own), 1e-3) / np.linalg.norm(row))
            for row, own in zip(rows, weights, strict=True)
        ]
        np.testing.assert_allclose(passed(opt.AdaptiveClip(0.3), x, g, kind).reshape(units, -1), expected, rtol=1e-11)


def test_gradient_noise_has_its_variance_and_another_stream_for_each_array():
    x = {"a": np.zeros(40000), "b": np.zeros(40000)}
    zero = {"a": np.zeros(40000), "b": np.zeros(40000)}
    state = opt.setup(opt.GradientNoise(0.25, 1.0), x)
    for t in range(3):
        state, new = opt.update(state, x, zero)
        noise = {key: new[key] - x[key] for key in x}
        for each in noise.values():
            assert abs(each.mean()) < 0.01
            assert np.var(each) == pytest.approx(0.25 / (1 + t), rel=0.05)
        assert abs(np.corrcoef(noise["a"], noise["b"])[0, 1]) < 0.03
        x = new


def test_gradient_noise_is_the_same_in_both_libraries():
    x = np.zeros((30, 4))
    one, other = (run(opt.GradientNoise(), x, [x, x], kind) for kind in ("numpy", "torch"))
    np.testing.assert_allclose(one, other, rtol=1e-12)


@both_kinds
def test_trust_ratio_and_adaptive_clip_take_stacks_in_chains(kind):
    rng = np.random.default_rng(3)
    model = {str(i): rng.standard_normal((4, 6)) for i in range(5)}
    grads = {key: rng.standard_normal((4, 6)) for key in model}
    rule = opt.OptimiserChain(opt.AdaptiveClip(), opt.Centralise(), opt.Adam(1.0), opt.TrustRatio(), opt.Descent(0.1))
    _, together = opt.update(opt.setup(rule, made(model, kind)), made(model, kind), made(grads, kind))
    for key, x in model.items():
        (alone,) = run(rule, x, [grads[key]], kind)
        np.testing.assert_allclose(numpy_of(together[key]), alone, rtol=1e-11)


def test_sign_keeps_nan():
    _, x = opt.update(opt.setup(opt.Sign(), torch.zeros(3)), torch.zeros(3), torch.tensor([-2.0, 0.0, float("nan")]))
    assert x[:2].tolist() == [1.0, 0.0]
    assert x[2].isnan()
