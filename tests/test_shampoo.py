"""Shampoo: against its paper written out slowly, and where statistics are singular or not finite."""

import numpy as np
import pytest

import optimisers as opt
from golden_data import made, numpy_of
from optimisers.errors import DecompositionWarning
from running import run
from test_soap import KINDS, drawn, solved


def root(statistic, power):
    values, vectors = np.linalg.eigh(statistic)
    return (vectors * values**-power) @ vectors.T


def paper(x, grads, eta, epsilon, power=None, rho=None):
    """Algorithm 2, for a tensor of any order, with statistics as sums or as corrected means."""
    power = power or 1 / (2 * x.ndim)
    sums = [np.zeros((n, n)) for n in x.shape]
    for t, g in enumerate(grads, 1):
        step = g
        for axis, n in enumerate(x.shape):
            slices = np.moveaxis(g, axis, 0).reshape(n, -1)
            product = sum(np.outer(column, column) for column in slices.T)
            sums[axis] = sums[axis] + product if rho is None else rho * sums[axis] + (1 - rho) * product
            mean = sums[axis] if rho is None else sums[axis] / (1 - rho**t)
            step = np.moveaxis(np.tensordot(root(mean + epsilon * np.eye(n), power), step, (1, axis)), 0, axis)
        x = x - eta * step
        yield x


@KINDS
@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 2), (5,)])
def test_shampoo_is_that_of_its_paper(shape, kind):
    x, grads = drawn(*shape)
    rule = opt.Shampoo(0.2, epsilon=1e-3, merge=False, vectors=True)
    np.testing.assert_allclose(run(rule, x, grads, kind), list(paper(x, grads, 0.2, 1e-3)), rtol=1e-9)


@KINDS
def test_its_other_conventions(kind):
    x, grads = drawn(4, 3)
    rule = opt.Shampoo(0.2, epsilon=1e-3, rho=0.9, power=0.5)
    np.testing.assert_allclose(run(rule, x, grads, kind), list(paper(x, grads, 0.2, 1e-3, 0.5, 0.9)), rtol=1e-9)
    flat = list(paper(x.reshape(2, 6), grads.reshape(-1, 2, 6), 0.2, 1e-3))
    found = run(opt.Shampoo(0.2, epsilon=1e-3), x.reshape(2, 3, 2), grads.reshape(-1, 2, 3, 2), kind)
    np.testing.assert_allclose(found.reshape(-1, 2, 6), flat, rtol=1e-9)


@KINDS
def test_a_side_that_is_too_long_leaves_the_other_the_whole_power(kind):
    x, grads = drawn(5, 3)
    total, expected = np.zeros((3, 3)), []
    for g in grads:
        total = total + g.T @ g
        x = x - 0.2 * g @ root(total + 1e-3 * np.eye(3), 0.5)
        expected.append(x)
    found = run(opt.Shampoo(0.2, epsilon=1e-3, max_size=4), drawn(5, 3)[0], grads, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    state = opt.setup(opt.Shampoo(max_size=4), made(x, kind))
    assert "no basis for a side of 5" in str(state)


@KINDS
def test_blocks_are_matrices_of_their_own(kind):
    x, grads = drawn(9, 4)
    parts = np.s_[:2], np.s_[2:4], np.s_[4:]
    apart = np.concatenate([run(opt.Shampoo(), x[rows], grads[:, rows], kind) for rows in parts], 1)
    np.testing.assert_allclose(run(opt.Shampoo(blocks=(2, 2, 5)), x, grads, kind), apart, rtol=1e-9)


def test_roots_are_renewed_at_the_first_gradients_and_then_now_and_then():
    rng = np.random.default_rng(1)
    rule, x = opt.Shampoo(refresh=4), rng.standard_normal((4, 3))
    state, renewed = rule.init(x), []
    for t in range(12):
        after, _ = rule.apply(state, x, rng.standard_normal((4, 3)))
        if (after[0][0][0][1] != state[0][0][0][1]).any():
            renewed.append(t)
        state = after
    assert renewed == [0, 1, 2, 3, 4, 8]


# --- statistics that have no root --------------------------------------------------------------------------------------------


@KINDS
def test_a_singular_statistic_without_epsilon_is_damped(kind):
    x, grads = drawn(4, 3, steps=1)
    rule = opt.Shampoo(0.1, epsilon=0.0, merge=False)
    with pytest.warns(DecompositionWarning, match=r"Shampoo: statistics of shape \(4, 4\) are decomposed with something added"):
        found = run(rule, x, grads, kind)
    left = grads[0] @ np.linalg.pinv(grads[0]) @ grads[0]  # on what the gradient spans the root is exact
    u, s, vt = np.linalg.svd(left, full_matrices=False)
    np.testing.assert_allclose(found[0], x - 0.1 * u @ vt, rtol=1e-6)
    assert s.min() > 0


@KINDS
def test_a_zero_gradient_without_epsilon_is_damped_to_nothing(kind):
    x, _ = drawn(4, 3)
    with pytest.warns(DecompositionWarning):
        found = run(opt.Shampoo(0.1, epsilon=0.0), x, np.zeros((1, 4, 3)), kind)
    np.testing.assert_array_equal(found[0], x)


@KINDS
def test_a_statistic_that_is_not_finite_keeps_its_root(kind):
    x, grads = drawn(4, 3, steps=3)
    rule = opt.Shampoo(0.1)
    state = rule.init(made(x, kind))
    for g in grads[:2]:
        state, _ = rule.apply(state, made(x, kind), made(g, kind))
    before = [numpy_of(last) for _, last in state[0][0]]
    with np.errstate(all="ignore"), pytest.warns(DecompositionWarning, match="Shampoo: statistics of shape .* are not finite"):
        state, _ = rule.apply(state, made(x, kind), made(np.full((4, 3), np.inf), kind))
    for old, (_, last) in zip(before, state[0][0], strict=True):
        np.testing.assert_array_equal(numpy_of(last), old)


# --- minima ------------------------------------------------------------------------------------------------------------------


def test_a_rotated_quadratic_of_a_matrix_is_solved():
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 4))
    scale, minimum = np.logspace(-1, 1, 5)[:, None] * np.logspace(-1, 1, 4), rng.standard_normal((5, 4))

    def gradient(x):
        return left @ (scale * (left.T @ (x - minimum) @ right)) @ right.T

    assert solved(opt.Shampoo(1.0), np.zeros((5, 4)), gradient, minimum)


def test_rosenbrocks_function_is_solved_with_the_matrix_of_a_vector():
    def gradient(x):
        a, b = x
        return np.array([2 * (a - 1) - 400 * a * (b - a * a), 200 * (b - a * a)])

    assert solved(opt.Shampoo(0.3, vectors=True), np.zeros(2), gradient, np.ones(2))
