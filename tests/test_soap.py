"""SOAP: against its paper written out slowly, against recorded trajectories up to what is free, and where matrices fail."""

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from golden_peers import recorded
from optimisers.errors import DecompositionWarning, RuleError
from running import run
from test_golden_peers import CONVENTIONS, NARROW, tolerance

KINDS = pytest.mark.parametrize("kind", ["numpy", "torch"])


def drawn(*shape, steps=9, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal((steps, *shape))


# --- the paper ---------------------------------------------------------------------------------------------------------------


def paper(x, grads, eta, beta, lambda_, epsilon, refresh, first):
    """SOAP of one matrix: moments in the coordinates of the parameter, bases sorted at each renewal, as its authors' code."""
    b1, b2 = beta
    left = right = 0.0
    m, v, steps = 0 * x, 0 * x, 0
    for t, g in enumerate(grads):
        if t == 0:
            left, right = (1 - b2) * g @ g.T, (1 - b2) * g.T @ g
            a, b = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
            if first == "skip":
                yield x
                continue
        steps += 1
        low = a.T @ g @ b
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * low**2
        up = (a.T @ m @ b) / (1 - b1**steps) / (np.sqrt(v / (1 - b2**steps)) + epsilon)
        x = x - eta * (a @ up @ b.T + lambda_ * x)
        yield x
        if t > 0:
            left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
            if t % refresh == 0:
                (a, i), (b, j) = renewed(left, a), renewed(right, b)
                v = v[i][:, j]


def renewed(statistic, basis):
    """One step of power iteration, and the order in which it took the columns."""
    order = np.argsort(-np.einsum("ij,ik,kj->j", basis, statistic, basis))
    return np.linalg.qr(statistic @ basis[:, order])[0], order


@KINDS
@pytest.mark.parametrize("first", ["skip", "step"])
@pytest.mark.parametrize("refresh", [1, 3])
def test_soap_is_that_of_its_paper(refresh, first, kind):
    x, grads = drawn(4, 4)
    expected = list(paper(x, grads, 0.02, (0.8, 0.95), 0.1, 1e-6, refresh, first))
    found = run(opt.SOAP(0.02, (0.8, 0.95), 0.1, 1e-6, refresh, first=first), x, grads, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@KINDS
@pytest.mark.parametrize("source", [source for source in CONVENTIONS if " SOAP(" in source])
@pytest.mark.parametrize("shape", [(5, 3), (4, 6)])
def test_recorded_trajectories_up_to_the_basis_of_what_the_first_gradient_leaves(source, shape, kind):
    """The first statistic has two eigenvalues of 0 on its longer side: a rotation of their vectors is free, and found here."""
    ours = CONVENTIONS[source]
    (record,) = (each for each in recorded("soap")[source] if each.x0.shape == shape and each.dtype == "float64")
    rule, side = eval(ours.rule, vars(opt)), int(shape[1] > shape[0])

    def trajectory(angle, count):
        x = made(record.x0, kind)
        state, xs = rule.init(x), [record.x0]
        for t, g in enumerate(record.grads[:count]):
            state, step = rule.apply(state, x, made(g, kind))
            if t == 0:
                state = turned(state, side, angle)
            x = x if step is None else x - step
            xs.append(numpy_of(x))
        return np.array(xs[1:])

    def error(angle):
        return abs(trajectory(angle, 2) - record.xs[:2]).max()

    best = min(np.linspace(0, np.pi, 60), key=error)
    width = np.pi / 60
    while width > 1e-9:  # ever narrower around the best of a few
        best = min(np.linspace(best - width, best + width, 9), key=error)
        width /= 4
    assert abs(trajectory(best, 12) - record.xs).max() <= tolerance(record, NARROW)


def turned(state, side, angle):
    """The state with the last two vectors of a basis turned in their plane."""
    ((m, v, sides),), t, powers = state
    statistic, basis = sides[side]
    turn = np.eye(len(statistic))
    turn[-2:, -2:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    kind = "torch" if isinstance(basis, torch.Tensor) else "numpy"
    sides = (*sides[:side], (statistic, basis @ made(turn, kind)), *sides[side + 1 :])
    return ((m, v, sides),), t, powers


# --- what it does with arrays ------------------------------------------------------------------------------------------------


@KINDS
def test_blocks_and_stacks_are_matrices_of_their_own(kind):
    x, grads = drawn(6, 5, 4)
    apart = [run(opt.SOAP(0.1, refresh=2), x[i], grads[:, i], kind) for i in range(6)]
    found = run(opt.SOAP(0.1, refresh=2, batch_dims=1), x, grads, kind)
    np.testing.assert_allclose(found, np.stack(apart, 1), rtol=1e-9)
    tall, its = x.reshape(30, 4), grads.reshape(-1, 30, 4)
    np.testing.assert_allclose(run(opt.SOAP(0.1, refresh=2, blocks=6), tall, its, kind), found.reshape(-1, 30, 4), rtol=1e-9)
    rule, parts = opt.SOAP(0.1, refresh=2, max_size=4), (np.s_[:4], np.s_[4:17], np.s_[17:])
    uneven = [run(rule, tall[rows], its[:, rows], kind) for rows in parts]
    found = run(rule.replace(blocks=(4, 13, 13)), tall, its, kind)
    np.testing.assert_allclose(found, np.concatenate(uneven, 1), rtol=1e-9)
    found = run(rule.replace(blocks=(4, 13, 13), layout="in_out"), tall.T, its.transpose(0, 2, 1), kind)
    np.testing.assert_allclose(found, np.concatenate(uneven, 1).transpose(0, 2, 1), rtol=1e-9)


@KINDS
def test_a_convolution_is_a_matrix_or_has_a_basis_for_each_dimension(kind):
    x, grads = drawn(4, 2, 3, 2)
    flat = run(opt.SOAP(0.1), x.reshape(4, 12), grads.reshape(-1, 4, 12), kind)
    np.testing.assert_array_equal(run(opt.SOAP(0.1), x, grads, kind).reshape(-1, 4, 12), flat)
    ((_, _, sides),) = opt.setup(opt.SOAP(merge=False), made(x, kind))[()].state[0]
    assert [tuple(basis.shape) for _, basis in sides] == [(4, 4), (2, 2), (3, 3), (2, 2)]


@KINDS
def test_alike_arrays_are_stepped_as_a_stack_and_end_where_they_would_alone(kind):
    x, grads = drawn(3, 5, 4)
    rule = opt.SOAP(0.1, refresh=2)
    model = {str(i): made(x[i], kind) for i in range(3)}
    state = opt.setup(rule, model)
    for g in grads:
        state, model = opt.update(state, model, {str(i): made(g[i], kind) for i in range(3)})
    for i in range(3):
        np.testing.assert_allclose(numpy_of(model[str(i)]), run(rule, x[i], grads[:, i], kind)[-1], rtol=1e-9)


def test_a_long_side_has_no_basis_and_print_says_so():
    x = torch.empty(30_000, 16, device="meta")
    state = opt.setup(opt.SOAP(), {"embed": x, "hidden": torch.empty(64, 16, device="meta")})
    ((_, _, (long, short)),) = state["embed"].state[0]
    assert long is None
    assert short[0].shape == (16, 16)
    (line,) = (line for line in str(state).splitlines() if line.startswith("embed"))
    assert line.endswith("; no basis for a side of 30,000")
    assert "no basis" not in next(line for line in str(state).splitlines() if line.startswith("hidden"))


@KINDS
def test_without_bases_it_is_adam_from_the_second_gradient_on(kind):
    x, grads = drawn(5, 4)
    found = run(opt.SOAP(0.1, max_size=1, lambda_=0.1), x, grads, kind)
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_allclose(found[1:], run(opt.AdamW(0.1, (0.95, 0.95), 0.1), x, grads[1:], kind), rtol=1e-12)


# --- renewals ----------------------------------------------------------------------------------------------------------------


def bases(state, path):
    return [basis for _, _, sides in state[path].state[0] for _, basis in sides]


def renewals(rule, paths, steps=12):
    """For each array the steps at which its bases changed."""
    rng = np.random.default_rng(1)
    model = {path: rng.standard_normal((4, 3)) for path in paths}
    state = opt.setup(rule, model)
    found = {path: [] for path in paths}
    for t in range(steps):
        new, model = opt.update(state, model, {path: rng.standard_normal((4, 3)) for path in paths})
        for path in paths:
            if any((a != b).any() for a, b in zip(bases(state, path), bases(new, path), strict=True)):
                found[path].append(t)
        state = new
    return found


def test_renewals_are_counted_for_each_array():
    paths = [f"layers.{i}" for i in range(12)]
    together, spread = renewals(opt.SOAP(refresh=4), paths), renewals(opt.SOAP(refresh=4, spread=True), paths)
    assert all(steps == [0, 4, 8] for steps in together.values())
    assert len({tuple(steps) for steps in spread.values()}) == 4
    for steps in spread.values():
        assert steps[0] == 0
        assert set(np.diff(steps[1:])) == {4}
    assert spread == renewals(opt.SOAP(refresh=4, spread=True), paths)


def test_one_decomposition_at_first_and_one_qr_at_each_renewal(monkeypatch):
    counts = {"eigh": 0, "qr": 0}

    def counted(name, function):
        def call(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(torch.linalg, name, call)

    counted("eigh", torch.linalg.eigh)
    counted("qr", torch.linalg.qr)
    run(opt.SOAP(refresh=3), *drawn(5, 4, steps=10), "torch")
    assert counts == {"eigh": 2, "qr": 6}  # two sides; after the gradients 3, 6 and 9


def test_the_counter_cannot_be_read_in_a_transform():
    with pytest.raises(RuleError, match="SOAP decides from a step counter on the host"):
        torch.func.vmap(opt.update)(
            *(torch.func.vmap(lambda x: opt.setup(opt.SOAP(), x))(torch.ones(2, 3, 3)),), *[torch.ones(2, 3, 3)] * 2
        )


# --- matrices that cannot be decomposed ---------------------------------------------------------------------------------------


@KINDS
def test_a_statistic_that_is_not_finite_keeps_the_basis(kind):
    x, grads = drawn(4, 3, steps=6)
    rule = opt.SOAP(0.1, refresh=2)
    state = rule.init(made(x, kind))
    for g in grads[:4]:
        state, _ = rule.apply(state, made(x, kind), made(g, kind))
    before = [numpy_of(basis) for _, basis in state[0][0][2]]
    bad = np.where(np.arange(3) == 1, np.inf, grads[4])
    with np.errstate(all="ignore"), pytest.warns(DecompositionWarning, match="SOAP: statistics of shape .* are not finite"):
        state, _ = rule.apply(state, made(x, kind), made(bad, kind))
    for old, (_, basis) in zip(before, state[0][0][2], strict=True):
        np.testing.assert_allclose(numpy_of(basis), old, atol=1e-12)


@KINDS
def test_of_a_stack_only_what_is_not_finite_keeps_its_basis(kind):
    x, grads = drawn(3, 4, 4, steps=3)
    grads[2, 1, 0, 0] = np.nan
    rule = opt.SOAP(0.1, refresh=2, batch_dims=1)
    state = rule.init(made(x, kind))
    for g in grads[:2]:
        state, _ = rule.apply(state, made(x, kind), made(g, kind))
    before = numpy_of(state[0][0][2][0][1])
    with np.errstate(all="ignore"), pytest.warns(DecompositionWarning, match="not finite"):
        state, step = rule.apply(state, made(x, kind), made(grads[2], kind))
    after = numpy_of(state[0][0][2][0][1])
    np.testing.assert_allclose(after[1], before[1], atol=1e-12)
    assert (abs(after[[0, 2]] - before[[0, 2]]) > 1e-3).any()
    assert np.isfinite(numpy_of(step)[[0, 2]]).all()


@KINDS
def test_a_first_gradient_that_is_not_finite_leaves_the_coordinates(kind):
    rule = opt.SOAP(0.1)
    x, _ = drawn(4, 3)
    with np.errstate(all="ignore"), pytest.warns(DecompositionWarning, match="not finite"):
        state, step = rule.apply(rule.init(made(x, kind)), made(x, kind), made(np.full((4, 3), np.nan), kind))
    assert step is None
    np.testing.assert_array_equal(numpy_of(state[0][0][2][0][1]), np.eye(4))


@KINDS
def test_what_does_not_converge_is_damped(kind, monkeypatch):
    library = np if kind == "numpy" else torch
    eigh, calls = library.linalg.eigh, []

    def failing(x):
        calls.append(x)
        if len(calls) < 3:  # as it is, and alone
            msg = "no convergence"
            raise library.linalg.LinAlgError(msg)
        return eigh(x)

    monkeypatch.setattr(library.linalg, "eigh", failing)
    rule = opt.SOAP(0.1)
    x, grads = drawn(4, 3)
    with pytest.warns(DecompositionWarning, match=r"SOAP: statistics of shape \(4, 4\) are decomposed with something added"):
        state, _ = rule.apply(rule.init(made(x, kind)), made(x, kind), made(grads[0], kind))
    statistic, basis = (numpy_of(part) for part in state[0][0][2][0])
    diagonal = basis.T @ statistic @ basis
    np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-12)
    assert str(calls[2].dtype).endswith("float64")


@KINDS
def test_zero_gradients_and_equal_columns_are_no_failure(kind):
    x, grads = drawn(4, 3, steps=5)
    grads[:, :, 1] = grads[:, :, 0]
    grads[0] = grads[2] = 0
    assert np.isfinite(run(opt.SOAP(0.1, refresh=1), x, grads, kind)).all()


# --- minima ------------------------------------------------------------------------------------------------------------------


def solved(rule, x, gradient, minimum, steps=3000):
    state = opt.setup(rule, x)
    for t in range(steps):
        rate = max(1 - t / steps, 1e-3)
        state, x = opt.update_(opt.adjust(state, eta=rule.eta * rate), x, gradient(x))
    return abs(x - minimum).max() < 1e-2


def test_a_rotated_quadratic_of_a_matrix_is_solved():
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 4))
    scale, minimum = np.logspace(-2, 2, 5)[:, None] * np.logspace(-1, 1, 4), rng.standard_normal((5, 4))

    def gradient(x):
        return left @ (scale * (left.T @ (x - minimum) @ right)) @ right.T

    assert not solved(opt.AdamW(0.1, (0.95, 0.95)), np.zeros((5, 4)), gradient, minimum, 300)
    assert solved(opt.SOAP(0.1, lambda_=0.0), np.zeros((5, 4)), gradient, minimum, 300)


def test_rosenbrocks_function_is_solved_with_a_basis_of_a_vector():
    def gradient(x):
        a, b = x
        return np.array([2 * (a - 1) - 400 * a * (b - a * a), 200 * (b - a * a)])

    assert solved(opt.SOAP(0.03, lambda_=0.0, vectors=True), np.zeros(2), gradient, np.ones(2))
