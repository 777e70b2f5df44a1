"""Kron: against its papers written out slowly, what it whitens, and where factors fail."""

import math

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from optimisers.arrays import norm_below, normal
from optimisers.errors import DecompositionWarning
from optimisers.rules._seeds import stream_key
from running import run
from test_soap import KINDS, drawn, solved

# --- the papers --------------------------------------------------------------------------------------------------------------


def lower_bound(a):
    """Li's bound of a spectral norm, as his code has it, for any matrix."""
    top = abs(a).max()
    a = a / top
    columns, rows = (a * a).sum(0), (a * a).sum(1)
    if columns.max() > rows.max():
        x = a[:, columns.argmax()] @ a
        return top * np.linalg.norm((x / np.linalg.norm(x)) @ a.T)
    x = a @ a[rows.argmax()]
    return top * np.linalg.norm(a.T @ (x / np.linalg.norm(x)))


def paper(x, grads, eta, mu, rate, renewed, scale=None, tau=1.1, lambda_=0.0, epsilon=1e-9, whiten="gradient"):
    """One matrix, its factors by the relative gradients of the 2018 paper and P as a whole matrix."""
    rows, columns = x.shape
    m = np.zeros_like(x)
    scale = scale or (grads[0] ** 4).mean() ** (-1 / 8)
    q, s = math.sqrt(scale) * np.eye(rows), math.sqrt(scale) * np.eye(columns)
    for t, g in enumerate(grads):
        m = mu * m + (1 - mu) * g
        ahead = m / (1 - mu ** (t + 1))
        if renewed(t):
            v = normal(stream_key("Kron:0"), t, x.shape, x)
            a = q @ ((g if whiten == "gradient" else ahead) + epsilon * v) @ s.T
            b = np.linalg.inv(s).T @ v.T @ np.linalg.inv(q)
            left, right = (a @ a.T, b.T @ b), (a.T @ a, b @ b.T)
            q = q - rate * np.triu(left[0] - left[1]) / lower_bound(left[0] + left[1]) @ q
            s = s - rate * np.triu(right[0] - right[1]) / lower_bound(right[0] + right[1]) @ s
        step = (np.kron(q.T @ q, s.T @ s) @ ahead.ravel()).reshape(x.shape)
        step = step * min(1, tau / (math.sqrt((step * step).mean()) + 1e-8))
        x = x - eta * (step + lambda_ * x)
        yield x


@KINDS
@pytest.mark.parametrize("whiten", ["gradient", "momentum"])
def test_kron_is_that_of_its_papers(whiten, kind):
    x, grads = drawn(4, 3)
    expected = list(paper(x, grads, 0.1, 0.8, 0.2, lambda t: True, lambda_=0.1, whiten=whiten))
    found = run(opt.Kron(0.1, 0.8, 0.1, rate=0.2, whiten=whiten), x, grads, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    expected = list(paper(x, grads, 0.1, 0.8, 0.2, lambda t: t < 2 or t % 3 == 0, 0.5, math.inf, epsilon=0.1, whiten=whiten))
    rule = opt.Kron(0.1, 0.8, epsilon=0.1, rate=0.2, refresh=3, warmup=2, scale=0.5, tau=math.inf, whiten=whiten)
    np.testing.assert_allclose(run(rule, x, grads, kind), expected, rtol=1e-9)


@KINDS
def test_diagonal_factors_and_tensors_of_any_order(kind):
    """Element by element: a diagonal for a side of 4 and for one of length 1, a triangle for the third."""
    x, grads = drawn(4, 1, 3, steps=5)
    d, e, s = np.ones(4), np.ones(1), np.eye(3)
    scale = (grads[0] ** 4).mean() ** (-1 / 8)
    d, e, s = (scale ** (1 / 3) * part for part in (d, e, s))
    expected, at = [], x
    for t, g in enumerate(grads):
        v = normal(stream_key("Kron:0"), t, x.shape, x)
        a = np.einsum("i,j,kl,ijl->ijk", d, e, s, g + 1e-9 * v)
        w = np.einsum("i,j,lk,ijl->ijk", 1 / d, 1 / e, np.linalg.inv(s), v)
        new = []
        for factor, axes in ((d, (1, 2)), (e, (0, 2))):
            large, small = (a * a).sum(axes), (w * w).sum(axes)
            new.append(factor - 0.1 * (large - small) / (large + small).max() * factor)
        large, small = (np.einsum("ijk,ijl->kl", part, part) for part in (a, w))
        d, e, s = *new, s - 0.1 * np.triu(large - small) / lower_bound(large + small) @ s
        step = np.einsum("i,j,kl,ijl->ijk", d**2, e**2, s.T @ s, g)
        at = at - 0.1 * step * min(1, 1.1 / (math.sqrt((step * step).mean()) + 1e-8))
        expected.append(at)
    found = run(opt.Kron(0.1, 0.0, max_size=3, merge=False), x, grads, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@KINDS
def test_the_bound_of_a_norm_is_lis_and_below_it(kind):
    rng = np.random.default_rng(0)
    for n in (1, 3, 8):
        a = rng.standard_normal((4, n, n))
        a = a @ a.swapaxes(-1, -2)
        found = numpy_of(norm_below(made(a, kind)))[:, 0, 0]
        np.testing.assert_allclose(found, [lower_bound(each) for each in a], rtol=1e-12)
        norms = np.linalg.norm(a, 2, (-2, -1))
        assert (found <= norms * (1 + 1e-12)).all()
        assert (found > 0.7 * norms).all()
    assert not numpy_of(norm_below(made(np.zeros((2, 2)), kind))).any()


def test_what_it_makes_of_gradients_is_white():
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] * np.logspace(0, 1, n) for n in (4, 3))
    rule, x = opt.Kron(0.0, 0.0, rate=0.02, warmup=4000, tau=math.inf), np.zeros((4, 3))
    state = rule.init(x)
    for _ in range(4000):
        state, _ = rule.apply(state, x, left @ rng.standard_normal((4, 3)) @ right.T)
    ((_, (q, s)),) = state[0]
    mixing = np.kron(q.T @ q @ left, s.T @ s @ right)
    values = np.linalg.svd(mixing, compute_uv=False)
    assert np.linalg.cond(np.kron(left, right)) == pytest.approx(100)
    assert values.max() < 1.5
    assert values.min() > 0.6


# --- what it does with arrays ------------------------------------------------------------------------------------------------


@KINDS
def test_stacks_see_the_same_noise_and_end_where_each_would_alone(kind):
    x, grads = drawn(3, 5, 4)
    rule = opt.Kron(0.1)
    apart = np.stack([run(rule, x[i], grads[:, i], kind) for i in range(3)], 1)
    np.testing.assert_allclose(run(rule.replace(batch_dims=1), x, grads, kind), apart, rtol=1e-9)
    model = {str(i): made(x[i], kind) for i in range(3)}
    state = opt.setup(rule, model)
    for g in grads:
        state, model = opt.update(state, model, {str(i): made(g[i], kind) for i in range(3)})
    for i in range(3):
        np.testing.assert_allclose(numpy_of(model[str(i)]), apart[-1, i], rtol=1e-9)


@KINDS
def test_blocks_have_factors_of_their_own(kind):
    x, grads = drawn(6, 4)
    rule = opt.Kron(0.1, warmup=0, blocks=(2, 2, 2), scale=1.0, rate=0.0)
    apart = [run(rule.replace(blocks=1), x[i : i + 2], grads[:, i : i + 2], kind) for i in (0, 2, 4)]
    np.testing.assert_allclose(run(rule, x, grads, kind), np.concatenate(apart, 1), rtol=1e-9)
    ((_, factors),) = opt.setup(rule, made(x, kind))[()].state[0]
    assert [tuple(factor.shape) for factor in factors] == [(3, 2, 2), (3, 4, 4)]


def test_a_long_side_has_a_diagonal_and_print_says_so():
    state = opt.setup(opt.Kron(), torch.empty(30_000, 16, device="meta"))
    ((_, (long, short)),) = state[()].state[0]
    assert (tuple(long.shape), tuple(short.shape)) == ((30_000,), (16, 16))
    assert "; a diagonal for a side of 30,000" in str(state)


@KINDS
def test_what_is_not_finite_leaves_the_factors(kind):
    x, grads = drawn(4, 3, steps=3)
    rule = opt.Kron(0.1)
    state = rule.init(made(x, kind))
    for g in grads:
        state, _ = rule.apply(state, made(x, kind), made(g, kind))
    before = [numpy_of(factor) for factor in state[0][0][1]]
    with np.errstate(all="ignore"), pytest.warns(DecompositionWarning, match="Kron: factors of shape .* are not finite"):
        state, _ = rule.apply(state, made(x, kind), made(np.full((4, 3), np.nan), kind))
    for old, factor in zip(before, state[0][0][1], strict=True):
        np.testing.assert_array_equal(numpy_of(factor), old)


@KINDS
def test_gradients_of_any_size_are_steps_of_the_same(kind):
    x, grads = drawn(4, 3, steps=4)
    usual = run(opt.Kron(0.1, epsilon=0.0), x, grads, kind)
    for size in (1e-7, 1e6):  # beside 1e-9, which bounds the first scale
        np.testing.assert_allclose(run(opt.Kron(0.1, epsilon=0.0), x, size * grads, kind), usual, rtol=1e-6)
    assert np.isfinite(run(opt.Kron(0.1), x, 0 * grads, kind)).all()


# --- minima ------------------------------------------------------------------------------------------------------------------


def test_a_rotated_quadratic_of_a_matrix_is_solved():
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 4))
    scale, minimum = np.logspace(-1, 1, 5)[:, None] * np.logspace(-1, 1, 4), rng.standard_normal((5, 4))

    def gradient(x):
        return left @ (scale * (left.T @ (x - minimum) @ right)) @ right.T

    assert solved(opt.Kron(0.03), np.zeros((5, 4)), gradient, minimum)


def test_rosenbrocks_function_is_solved_with_the_factor_of_a_vector():
    def gradient(x):
        a, b = x
        return np.array([2 * (a - 1) - 400 * a * (b - a * a), 200 * (b - a * a)])

    assert solved(opt.Kron(0.03, vectors=True), np.zeros(2), gradient, np.ones(2))
