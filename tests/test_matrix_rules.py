"""What rules for matrices share with Muon, and what their papers say."""

import math

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from matrices import LONE, MATRICES, newton_schulz
from optimisers.rules.matrices.newtonschulz import JORDAN
from optimisers.tree.show import state_bytes
from running import run

RULES = {
    "NorMuon": opt.NorMuon(0.1, (0.8, 0.9), 0.3),
    "NorMuon with Muon's scale": opt.NorMuon(0.1, (0.8, 0.9), 0.3, scale="jordan", nesterov=True),
    "AdaMuon": opt.AdaMuon(0.1, (0.8, 0.9), 0.3),
    "AdaMuon without signs": opt.AdaMuon(0.1, (0.8, 0.9), 0.3, signs=False),
    "Dion": opt.Dion(0.1, 0.8, 0.3),
    "Dion of full rank": opt.Dion(0.1, 0.8, 0.3, rank=1.0, scale="jordan"),
    "Scion": opt.Scion(0.1, 0.8, constrained=True),
    "Scion for a first layer": opt.Scion(0.1, 0.8, 2.0, 0.3, scale="jordan", normalised=False),
    "Scion by signs": opt.Scion(0.1, 0.8, norm="sign"),
    "Scion by rows": opt.Scion(0.1, 0.8, norm="rows"),
    "Scion by columns": opt.Scion(0.1, 0.8, norm="columns"),
    "Scion for an embedding": opt.Scion(0.1, 0.8, norm="columns", normalised=False),
}
every = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
with_opt = pytest.mark.parametrize("make", [opt.NorMuon, opt.AdaMuon, opt.Dion], ids=lambda make: make.__name__)
both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def trajectory(shape, steps=5, seed=0):
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-1, 1, steps)
    return rng.standard_normal(shape), [np.asarray(s * rng.standard_normal(shape)) for s in sizes]


def check(a, b, within=1e-10):
    np.testing.assert_allclose(a, b, rtol=within, atol=within)


# --- blocks, stacks, layouts ------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("blocks", [1, 2, 12, (12,), (8, 2, 2), (3, 3, 5, 1)], ids=str)
@pytest.mark.parametrize("columns", [(5,), (2, 3)], ids=str)
@every
def test_each_block_is_as_if_it_were_its_own_parameter(rule, kind, blocks, columns):
    x, grads = trajectory((12, *columns))
    together = run(rule.replace(blocks=blocks), x, grads, kind)
    sizes = blocks if isinstance(blocks, tuple) else (12 // blocks,) * blocks
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        part = slice(end - size, end)
        check(together[:, part], run(rule, x[part], [g[part] for g in grads], kind))


@both_kinds
@pytest.mark.parametrize("columns", [(5,), (2, 3)], ids=str)
@every
def test_batch_dims_stack_matrices(rule, kind, columns):
    x, grads = trajectory((3, 4, *columns))
    together = run(rule.replace(batch_dims=1, blocks=(1, 3)), x, grads, kind)
    for i in range(3):
        check(together[:, i], run(rule.replace(blocks=(1, 3)), x[i], [g[i] for g in grads], kind))
    check(
        run(rule.replace(batch_dims=2), x[None], [g[None] for g in grads], kind)[:, 0],
        run(rule.replace(batch_dims=1), x, grads, kind),
    )


@both_kinds
@pytest.mark.parametrize("blocks", [1, 3, (4, 1, 1)], ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (6, 6)], ids=str)
@every
def test_an_in_out_layer_is_an_out_in_layer_transposed(rule, kind, shape, blocks):
    x, grads = trajectory(shape)
    out_in = run(rule.replace(blocks=blocks), x, grads, kind)
    in_out = run(rule.replace(blocks=blocks, layout="in_out"), x.T, [g.T for g in grads], kind)
    check(in_out.transpose(0, 2, 1), out_in)


@both_kinds
@every
def test_a_kernel_of_a_transposed_convolution_is_in_blocks_of_channels(rule, kind):
    x, grads = trajectory((3, 4, 2, 2))
    ours = run(rule.replace(layout="in_out", blocks=2), x, grads, kind)
    for part in (slice(0, 2), slice(2, 4)):
        alone = run(rule.replace(layout="in_out"), x[:, part], [g[:, part] for g in grads], kind)
        check(ours[:, :, part], alone)


@every
def test_blocks_that_do_not_fit_are_refused_by_path(rule):
    with pytest.raises(opt.RuleError, match=r"blocks=5 does not divide the output axis of shape \(6, 4\)") as raised:
        opt.setup(rule.replace(blocks=5), {"qkv": np.ones((6, 4))})
    assert "qkv" in str(raised.value)


@both_kinds
@every
def test_empty_and_zero_matrices_stay(rule, kind):
    rule = rule.replace(lambda_=0.0, **({"constrained": False} if isinstance(rule, opt.Scion) else {}))
    for x in (np.zeros((0, 4)), np.zeros((4, 0)), np.ones((3, 4))):
        check(run(rule, x, [0 * x] * 2, kind), np.stack([x, x]))


# --- which arrays are matrices ----------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("shape", LONE, ids=str)
@with_opt
def test_arrays_that_are_no_matrices_use_opt(make, kind, shape):
    x, grads = trajectory(shape)
    x, inner = np.asarray(x), opt.Adam(0.1)
    check(run(make(opt=inner), x, grads, kind), run(inner, x, grads, kind), 0)
    check(run(opt.Scion(opt=inner), x, grads, kind), run(inner, x, grads, kind), 0)


@both_kinds
@pytest.mark.parametrize("shape", LONE, ids=str)
def test_scion_steps_vectors_by_their_root_mean_square(kind, shape):
    x, grads = trajectory(shape)
    x = np.asarray(x)
    m, expected, signs = 0 * x, [], []
    for g in grads:
        m = 0.8 * m + 0.2 * g
        expected.append((expected or [x])[-1] - 0.1 * 3 * m / (np.sqrt(np.mean(m * m)) + 1e-3))
        signs.append((signs or [x])[-1] - 0.1 * 3 * np.sign(m))
    check(run(opt.Scion(0.1, 0.8, 3.0, epsilon=1e-3), x, grads, kind), expected)
    check(run(opt.Scion(0.1, 0.8, 3.0, norm="sign"), x, grads, kind), signs)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@with_opt
def test_fallback_sends_matrices_to_opt(make, shape):
    x, grads = trajectory(shape)
    inner = opt.Adam(0.1)
    assert np.abs(run(make(opt=inner), x, grads) - run(inner, x, grads)).max() > 1e-3
    check(run(make(opt=inner, fallback=lambda x: x.ndim > 1), x, grads), run(inner, x, grads), 0)


@with_opt
def test_adjust_keeps_the_ratio_of_setup(make):
    state = opt.setup(make(0.1, opt=opt.Adam(0.02)), {"w": np.ones((3, 4)), "b": np.ones(3)})
    state = opt.adjust(opt.adjust(state, 0.0), 0.05)
    assert (state["w"].rule.eta, state["b"].rule.opt.eta) == (0.05, 0.01)
    state = opt.adjust(state, eta=0.3)
    assert (state["w"].rule.eta, state["b"].rule.opt.eta) == (0.3, 0.01)
    with pytest.raises(opt.HyperParameterError, match=f"{make.__name__}'s learning rate was 0 at setup"):
        opt.adjust(opt.setup(make(0.0), np.ones(3)), 0.1)


def test_adjust_of_scion_without_opt():
    state = opt.adjust(opt.setup(opt.Scion(0.1), {"w": np.ones((3, 4)), "b": np.ones(3)}), 0.05)
    assert (state["w"].rule.eta, state["b"].rule.eta) == (0.05, 0.05)


@both_kinds
@every
def test_complex_arrays_are_refused_by_path(rule, kind):
    with pytest.raises(opt.RuleError, match=f"{type(rule).__name__} cannot step a complex") as raised:
        opt.setup(rule, {"w": made(np.ones((2, 3), complex), kind)})
    assert "w" in str(raised.value)


def test_state_bytes():
    model = {name: np.zeros(shape, "float32") for name, shape in {"qkv": (1152, 384), "up": (1536, 384)}.items()}
    size = sum(x.nbytes for x in model.values())

    def share(rule):
        return sum(state_bytes(opt.setup(rule, model)[name].state) for name in model) / size

    assert share(opt.Scion()) == 1
    assert 1 < share(opt.NorMuon()) < 1.003
    assert share(opt.AdaMuon()) == 2
    assert share(opt.Dion()) == 1 + 2 * 384 * 96 / (1152 * 384 + 1536 * 384)


# --- the papers, written out ------------------------------------------------------------------------------------------------


def orthogonal(m):
    return newton_schulz(m, [JORDAN] * 5, lambda norm: norm + 1e-7)


def normuon(x, grads, eta, beta, lambda_, epsilon, scale=None):
    """NorMuon neuron by neuron: algorithm 1, or with a scale the authors' code."""
    m, v = 0 * x, [0.0] * len(x)
    for g in grads:
        m = beta[0] * m + (1 - beta[0]) * g
        o = orthogonal(m if scale is None else (1 - beta[0]) * g + beta[0] * m)
        rows = []
        for i, row in enumerate(o):
            v[i] = beta[1] * v[i] + (1 - beta[1]) * sum(e * e for e in row) / len(row)
            rows.append(row / (math.sqrt(v[i]) + epsilon))
        step = np.array(rows)
        length = 0.2 * math.sqrt(x.size) if scale is None else scale * np.linalg.norm(o)
        x = x - eta * lambda_ * x - eta * length / np.linalg.norm(step) * step
        yield x


def adamuon(x, grads, eta, beta, lambda_, epsilon, signs):
    """AdaMuon: algorithm 1, and that of its first version without signs."""
    m, v = 0 * x, 0 * x
    for t, g in enumerate(grads, 1):
        m = beta[0] * m + (g if signs else (1 - beta[0]) * g)
        o = orthogonal(np.sign(m) if signs else m)
        v = beta[1] * v + (1 - beta[1]) * o * o
        step = o / (np.sqrt(v if signs else v / (1 - beta[1] ** t)) + epsilon)
        x = x - eta * (0.2 * math.sqrt(x.size) / np.linalg.norm(step) * step + lambda_ * x)
        yield x


def scion(x, grads, eta, mu, radius, lmo, *, constrained):
    """Scion: algorithm 1 and 2 with the linear minimisation oracle of table 2."""
    d = 0 * x
    for g in grads:
        d = mu * d + (1 - mu) * g
        x = (1 - eta * constrained) * x - eta * radius * lmo(d)
        yield x


@both_kinds
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)], ids=str)
def test_normuon_is_that_of_its_paper(kind, shape):
    x, grads = trajectory(shape, 8)
    given = (0.1, (0.8, 0.9), 0.3, 1e-10)
    check(run(opt.NorMuon(*given), x, grads, kind), list(normuon(x, grads, *given)), 1e-8)  # epsilon stands at two places
    scale = math.sqrt(max(1, shape[0] / shape[1]))
    code = run(opt.NorMuon(*given, scale="jordan", nesterov=True), x, grads, kind)
    check(code, list(normuon(x, grads, *given, scale)), 1e-8)


@both_kinds
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)], ids=str)
@pytest.mark.parametrize("signs", [True, False])
def test_adamuon_is_that_of_its_paper(kind, shape, signs):
    x, grads = trajectory(shape, 8)
    given = (0.1, (0.8, 0.9), 0.3, 1e-10)
    check(run(opt.AdaMuon(*given, signs=signs), x, grads, kind), list(adamuon(x, grads, *given, signs)), 1e-8)


def gram_schmidt(columns):
    """The columns of a matrix made orthonormal, one after another and twice."""
    found = []
    for column in columns.T:
        left = column
        for other in 2 * found:
            left = left - (other @ left) * other
        found.append(left / math.sqrt(left @ left))
    return np.array(found).T


def dion(x, grads, q, eta, mu, lambda_, epsilon, scale):
    """Dion: algorithm 1, column by column."""
    m = 0 * x
    for g in grads:
        b = m + g
        p = gram_schmidt(b @ q)
        r = b.T @ p
        m = b - (1 - mu) * sum(np.outer(p[:, i], r[:, i]) for i in range(q.shape[1]))
        q = np.array([column / (math.sqrt(column @ column) + epsilon) for column in r.T]).T
        x = (1 - eta * lambda_) * x - eta * scale * p @ q.T
        yield x


@both_kinds
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)], ids=str)
@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (2, 2), (0.3, 2), (1.0, None), (50, None)])
def test_dion_is_that_of_its_paper(kind, shape, rank, columns):
    x, grads = trajectory(shape, 8)
    rule = opt.Dion(0.1, 0.8, 0.3, 1e-6, rank)
    _, (q,) = opt.setup(rule, x)[()].state
    assert q.shape == (1, shape[1], min(shape) if columns is None else columns)
    expected = list(dion(x, grads, q[0], 0.1, 0.8, 0.3, 1e-6, math.sqrt(shape[0] / shape[1])))
    check(run(rule, x, grads, kind), expected)


@both_kinds
def test_dion_of_full_rank_finds_the_nearest_orthogonal_matrix(kind):
    x, (g,) = trajectory((6, 4), 1)
    xs = run(opt.Dion(1.0, 0.0, rank=1.0, scale="none"), x, [g] * 200, kind)
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    check(xs[-2] - xs[-1], u @ vt, 1e-6)


def test_what_dion_does_not_step_stays_in_its_momentum():
    """Over time all of a steady gradient is stepped, also by steps of rank one."""
    x, (g,) = trajectory((4, 3), 1)
    state = opt.setup(opt.Dion(1e-3, 0.5, rank=1, scale="none"), x)
    seen = []
    for _ in range(60):
        before = x
        state, x = opt.update(state, x, g)
        seen.append(np.linalg.svd(before - x)[0][:, 0])
    assert np.linalg.matrix_rank(np.array(seen), 1e-2) == 3


@both_kinds
def test_dion_starts_alike_for_one_seed(kind):
    model = {"a": made(np.ones((6, 4)), kind), "b": made(np.ones((6, 4)), kind)}
    first = opt.setup(opt.Dion(rank=2), model)
    assert numpy_of(first["a"].state[1][0]).tobytes() == numpy_of(first["b"].state[1][0]).tobytes()
    other = opt.setup(opt.Dion(rank=2, seed=1), model)
    assert np.abs(numpy_of(other["a"].state[1][0]) - numpy_of(first["a"].state[1][0])).max() > 0.1


def test_derivatives_of_dion_are_those_of_its_formulas():
    torch.manual_seed(0)
    x, g = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def stepped(g):
        state = opt.setup(opt.Dion(0.1, rank=2), x)
        state, y = opt.update(state, x, 2 * g)
        return opt.update(state, y, g)[1]

    assert torch.autograd.gradcheck(stepped, g)


LMO = {
    "spectral": lambda d: math.sqrt(d.shape[0] / d.shape[1]) * orthogonal(d),
    "sign": lambda d: np.sign(d) / d.shape[1],
    "rows": lambda d: np.array([row / (np.linalg.norm(row) * math.sqrt(d.shape[1])) for row in d]),
    "columns": lambda d: np.array([c * math.sqrt(d.shape[0]) / (d.shape[1] * np.linalg.norm(c)) for c in d.T]).T,
}


@both_kinds
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)], ids=str)
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("norm", LMO)
def test_scion_is_that_of_its_paper(kind, shape, norm, constrained):
    x, grads = trajectory(shape, 8)
    rule = opt.Scion(0.1, 0.8, 3.0, epsilon=0.0, norm=norm, constrained=constrained)
    check(run(rule, x, grads, kind), list(scion(x, grads, 0.1, 0.8, 3.0, LMO[norm], constrained=constrained)))


@pytest.mark.parametrize(("norm", "factor"), [("spectral", 4**0.5), ("sign", 4), ("rows", 4**0.5), ("columns", 4)], ids=str)
def test_a_first_layer_is_not_divided_by_its_inputs(norm, factor):
    x, grads = trajectory((3, 4), 1)
    usual, first = (x - run(opt.Scion(1.0, epsilon=0.0, norm=norm, normalised=n), x, grads)[0] for n in (True, False))
    check(first, factor * usual)


@both_kinds
@pytest.mark.parametrize("norm", LMO)
def test_constrained_scion_stays_in_the_ball(kind, norm):
    rng = np.random.default_rng(0)
    x = made(np.zeros((6, 4)), kind)
    state = opt.setup(opt.Scion(0.3, 0.5, 2.0, norm=norm, constrained=True, ns=opt.NewtonSchulz(12, "polar_express")), x)
    norms = {
        "spectral": lambda w: np.linalg.norm(w, 2) * math.sqrt(4 / 6),
        "sign": lambda w: 4 * np.abs(w).max(),
        "rows": lambda w: 2 * np.linalg.norm(w, axis=1).max(),
        "columns": lambda w: 4 * (np.linalg.norm(w, axis=0) / math.sqrt(6)).max(),
    }
    for _ in range(20):
        state, x = opt.update(state, x, made(rng.standard_normal((6, 4)), kind))
        assert norms[norm](numpy_of(x)) <= 2 + 1e-6
    assert norms[norm](numpy_of(x)) > 0.3


@pytest.mark.parametrize("make", [opt.Muon, opt.NorMuon, opt.AdaMuon, opt.Scion, opt.Dion, opt.SOAP, opt.Shampoo, opt.Kron])
@pytest.mark.parametrize("blocks", [0, -1, 1.5, True, None, "two", (), (2, 0), 10**30])
def test_blocks_that_cannot_be_are_refused(make, blocks):
    with pytest.raises(opt.HyperParameterError, match=f"{make.__name__}: field 'blocks' must be a whole number >= 1"):
        make(blocks=blocks)
