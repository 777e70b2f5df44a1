"""Apollo against the textbook formula with explicit projections, and what its projections and its state promise."""

import math
from collections import OrderedDict

import numpy as np
import optree
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from optimisers.arrays import _random, normal
from optimisers.tree.show import state_bytes
from running import run

both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def trajectory(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=shape)
    return rng.normal(size=shape), [common + rng.normal(size=shape) for _ in range(steps)]


def explicit(shape, refresh):
    """A projection of one's own: a pure function of shape and refresh."""
    return np.random.default_rng([refresh, *shape]).normal(size=shape) / math.sqrt(shape[0])


def explicit_torch(shape, refresh):
    return torch.from_numpy(explicit(shape, refresh))


def textbook(x, grads, rule, rank, *, left, projection=explicit):
    """Algorithm 1 of the paper on a matrix: P (rank, projected side) from the left of G, or from the right of it."""
    adam = rule.opt
    b1, b2 = adam.beta
    m = v = 0.0
    xs = []
    for t, given in enumerate(grads, 1):
        g = given if left else given.T
        p = projection((rank, g.shape[0]), t // rule.u)
        r = p @ g
        m = b1 * m + (1 - b1) * r
        v = b2 * v + (1 - b2) * r**2
        adapted = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + adam.epsilon)
        if rule.mode == "channel":
            factor = np.linalg.norm(adapted, axis=0) / (np.linalg.norm(r, axis=0) + adam.epsilon)
        else:
            factor = np.linalg.norm(adapted) / (np.linalg.norm(r) + adam.epsilon)
        scaled = math.sqrt(rule.scale) * g * factor
        decay = adam.lambda_ * (adam.eta if adam.couple else 1.0)
        x = x - adam.eta * (scaled if left else scaled.T) - decay * x
        xs.append(x)
    return np.array(xs)


def check(ours, theirs, tolerance=1e-12):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


ADAM = opt.AdamW(0.05, (0.8, 0.95), 0.1, 1e-6)


# --- the algorithm ------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (4, 3, 2), (3, 2, 2, 2), (9, 2, 2)], ids=str)
@pytest.mark.parametrize("sort_dims", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{"rank": 2}, {"rank": 1, "mode": "tensor", "scale": 128.0}, {"rank": 3, "scale": 0.25}, {"rank": 2, "mode": "tensor"}],
    ids=["channel", "mini", "scaled channel", "tensor"],
)
def test_a_run_is_the_textbook_formula(kind, shape, sort_dims, fields):
    x, grads = trajectory(shape, 9)
    given = explicit if kind == "numpy" else explicit_torch
    rule = opt.Apollo(ADAM, u=4, sort_dims=sort_dims, projection=given, **fields)
    flat = (shape[0], math.prod(shape[1:]))
    left = not sort_dims or flat[0] <= flat[1]
    rank = min(fields["rank"], flat[0] if left else flat[1])
    expected = textbook(x.reshape(flat), [g.reshape(flat) for g in grads], rule, rank, left=left)
    check(run(rule, x, grads, kind).reshape(expected.shape), expected)


@both_kinds
@pytest.mark.parametrize("couple", [True, False])
def test_weight_decay_follows_couple(kind, couple):
    x, grads = trajectory((4, 6), 5)
    given = explicit if kind == "numpy" else explicit_torch
    rule = opt.Apollo(opt.AdamW(0.05, lambda_=0.2, couple=couple), 2, projection=given)
    check(run(rule, x, grads, kind), textbook(x, grads, rule, 2, left=True))
    still = run(rule.replace(opt=opt.AdamW(0.0, lambda_=0.2, couple=couple)), x, grads[:1], kind)[0]
    check(still, x if couple else 0.8 * x)


@both_kinds
def test_a_run_with_its_own_projections_is_the_textbook_formula(kind):
    # The same, the Gaussian projections taken from the stream by the key that stands in the state.
    x, grads = trajectory((6, 10), 9)
    rule = opt.Apollo(ADAM, 3, u=2)
    key = int(opt.setup(rule, x)[()].state[2])
    expected = textbook(
        x, grads, rule, 3, left=True, projection=lambda shape, refresh: normal(key, refresh, shape, x) / math.sqrt(shape[0])
    )
    check(run(rule, x, grads, kind), expected)


@pytest.mark.parametrize("u", [1, 2, 5])
def test_refreshes_are_counted_from_step_one(u):
    asked = []

    def projection(shape, refresh):
        asked.append((tuple(shape), int(refresh)))
        return explicit(shape, refresh)

    x, grads = trajectory((3, 5), 11)
    run(opt.Apollo(rank=2, u=u, projection=projection), x, grads)
    assert asked == [((2, 3), t // u) for t in range(1, 12)]


@both_kinds
def test_moments_are_kept_across_a_refresh(kind):
    x, grads = trajectory((4, 6), 3)
    x, grads = made(x, kind), made(tuple(grads), kind)
    state = opt.setup(opt.Apollo(opt.AdamW(beta=(0.9, 0.99)), 2, u=3), x)
    for grad in grads:
        (before, _, _), _, key = state[()].state
        state, x = opt.update(state, x, grad)
    (after, _, _), t, _ = state[()].state
    refreshed = numpy_of(normal(int(key), 1, (2, 4), grads[0])) / math.sqrt(2) @ numpy_of(grads[2])
    assert int(t) == 4
    check(numpy_of(after), 0.9 * numpy_of(before) + 0.1 * refreshed)


RANKS = [
    (2, (8, 12), 2),
    (100, (8, 12), 8),  # capped at the side that is projected
    (None, (8, 12), 4),  # ceil(sqrt(12))
    (None, (2, 100), 2),
    (lambda side: side // 4, (8, 12), 3),
    (lambda side: side // 4, (12, 8), 3),
    (lambda side: 1000, (8, 12), 8),
]


@both_kinds
@pytest.mark.parametrize(("rank", "shape", "expected"), RANKS)
def test_rank(kind, rank, shape, expected):
    x = made(np.ones(shape), kind)
    (m, v, _), _, _ = opt.setup(opt.Apollo(rank=rank), x)[()].state
    assert tuple(m.shape) == tuple(v.shape) == (expected, max(shape))


def test_a_rank_function_is_given_the_side_that_is_not_projected():
    asked = []

    def rank(side):
        asked.append(side)
        return 2

    opt.setup(opt.Apollo(rank=rank), {"a": np.ones((3, 50)), "b": np.ones((60, 4)), "c": np.ones((5, 7, 10))})
    assert sorted(set(asked)) == [50, 60, 70]
    asked.clear()
    (m, _, _), _, _ = opt.setup(opt.Apollo(rank=rank, sort_dims=False), np.ones((60, 4)))[()].state
    assert set(asked) == {4}
    assert m.shape == (2, 4)


@both_kinds
@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_vectors_use_opt(kind, shape):
    x, grads = trajectory(shape, 5)
    x, grads = np.asarray(x), [np.asarray(g) for g in grads]
    np.testing.assert_array_equal(run(opt.Apollo(ADAM), x, grads, kind), run(ADAM, x, grads, kind))


@both_kinds
def test_complex_matrices(kind):
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(4, 6)) + 1j * rng.normal(size=(4, 6)) for _ in range(2))
    given = explicit if kind == "numpy" else explicit_torch
    y = run(opt.Apollo(0.1, 2, projection=given), x, [g], kind)[0]
    r = explicit((2, 4), 0) @ g
    # at the first step Adam makes r / |r| of r: norms sqrt(2)
    check((x - y) / 0.1, g * math.sqrt(2) / np.linalg.norm(r, axis=0), 1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_kept(dtype):
    x, grads = trajectory((4, 6), 3)
    x = torch.from_numpy(x).to(getattr(torch, dtype))
    state = opt.setup(opt.Apollo(), x)
    for grad in grads:
        state, x = opt.update(state, x, torch.from_numpy(grad).to(x.dtype))
    (m, v, _), _, _ = state[()].state
    assert m.dtype == x.dtype == getattr(torch, dtype)
    assert v.dtype == (torch.float32 if dtype == "float16" else x.dtype)  # it holds squares
    assert x.isfinite().all()


@both_kinds
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)], ids=str)
def test_empty_arrays(kind, shape):
    x = np.ones(shape)
    assert run(opt.Apollo(0.1), x, [x, x], kind).shape == (2, *shape)


def test_a_zero_gradient_stays_zero():
    x = np.ones((3, 4))
    y = run(opt.Apollo(0.1), x, [0 * x, 0 * x])
    np.testing.assert_array_equal(y, [x, x])


# --- forms --------------------------------------------------------------------------------------------------------------


def test_opt_may_be_a_learning_rate():
    assert opt.Apollo(0.3) == opt.Apollo(opt.AdamW(0.3))
    assert opt.Apollo.mini(0.3, u=7) == opt.Apollo(opt.AdamW(0.3), 1, 7, mode="tensor", scale=128.0)
    assert opt.Apollo.mini() == opt.Apollo(rank=1, mode="tensor", scale=128.0)
    assert opt.Apollo.mini(rank=4).rank == 4
    assert opt.Apollo() == opt.Apollo(opt.AdamW(), None, 100, True, scale=1.0, mode="channel", seed=0)
    assert eval(repr(opt.Apollo.mini(0.3)), vars(opt)) == opt.Apollo.mini(0.3)


# --- projections --------------------------------------------------------------------------------------------------------


def key_of(rule, path="w", kind="numpy"):
    state = opt.setup(rule, {path: made(np.ones((3, 4)), kind)})
    return int(state[path].state[2])


def test_the_key_depends_on_seed_and_path_alone():
    keys = {key_of(opt.Apollo(seed=seed), path) for seed in range(5) for path in ("a", "b", "c")}
    assert len(keys) == 15
    for rule in (opt.Apollo(0.5, 1, 7, False, mode="tensor"), opt.Apollo.mini(), opt.OptimiserChain(opt.Apollo())):
        state = opt.setup(rule, {"a": np.ones((5, 6)), "z": np.ones((3, 3))})["a"].state
        while not isinstance(state[-1], (int, np.integer)):
            state = state[-1]
        assert state[-1] == key_of(opt.Apollo(), "a")
    assert key_of(opt.Apollo(), kind="torch") == key_of(opt.Apollo())


@both_kinds
def test_equal_leaves_at_two_paths_are_projected_differently(kind):
    x, grads = trajectory((4, 6), 2)
    model = made({"a": x, "b": x.copy()}, kind)
    state = opt.setup(opt.Apollo(0.1), model)
    for grad in grads:
        state, model = opt.update(state, model, made({"a": grad, "b": grad.copy()}, kind))
    assert (numpy_of(model["a"]) != numpy_of(model["b"])).any()


@pytest.mark.parametrize("shape", [(1, 7), (3, 5), (16, 96)])
def test_numpy_and_torch_draw_the_same_numbers(shape):
    for key, refresh in [(0, 0), (2**63 - 1, 1), (-(2**63), 10**6), (-1, 3)]:
        a = normal(key, refresh, shape, np.zeros(1))
        b = normal(key, refresh, shape, torch.zeros(1))
        c = normal(torch.tensor(key), torch.tensor(refresh), shape, torch.zeros(1))
        assert a.dtype == np.float64
        # logarithm, cosine and sine of the two libraries part by a few units in the last place
        np.testing.assert_allclose(b.numpy(), a, rtol=1e-13, atol=1e-14)
        assert torch.equal(b, c)
        np.testing.assert_array_equal(a, normal(key, refresh, shape, np.zeros(1)))


def test_the_numbers_are_standard_normal():
    # 400 streams of 500 numbers. The statistic of Kolmogorov and Smirnov exceeds 1.95 / sqrt(n) once in 1,000 draws.
    key = [int(k) for k in np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=20)]
    streams = np.array([normal(k, refresh, (500,), np.zeros(1)) for k in key for refresh in range(20)])
    numbers = np.sort(streams.ravel())
    n = len(numbers)
    cdf = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in numbers])
    gaps = np.abs(cdf - np.arange(n) / n).max(), np.abs(cdf - np.arange(1, n + 1) / n).max()
    assert max(gaps) < 1.95 / math.sqrt(n)
    # Moments to four of their standard errors: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
    for power, moment, deviation in [(1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))]:
        assert abs((numbers**power).mean() - moment) < 4 * deviation / math.sqrt(n)
    # Neither neighbours, halves of a stream (made from the same bits), refreshes nor keys are correlated.
    n = streams.size // 2
    for a, b in [
        (streams[:, ::2], streams[:, 1::2]),
        (streams[:, :250], streams[:, 250:]),
        (streams[::2], streams[1::2]),
        (streams[:200], streams[200:]),
        (streams[:, ::2] ** 2 - 1, streams[:, 1::2] ** 2 - 1),
        (streams[:, :250] ** 2 - 1, streams[:, 250:] ** 2 - 1),
    ]:
        correlation = (a * b).mean() / math.sqrt((a**2).mean() * (b**2).mean())
        assert abs(correlation) < 4 / math.sqrt(n)


def test_a_projection_has_variance_one_over_rank():
    x = np.eye(400)  # the projected gradient is the projection itself, the first moment a tenth of it
    for rank in (4, 25):
        state = opt.setup(opt.Apollo(opt.AdamW(beta=(0.9, 0.999)), rank), x)
        state, _ = opt.update(state, x, np.eye(400))
        p = 10 * state[()].state[0][0]
        assert p.shape == (rank, 400)
        assert p.var() == pytest.approx(1 / rank, rel=4 * math.sqrt(2 / p.size))


@pytest.mark.parametrize(
    ("given", "kind", "got"),
    [
        (lambda shape, refresh: np.ones(shape[::-1]), "numpy", r"numpy array of shape \(4, 2\)"),
        (lambda shape, refresh: np.ones((1, 4)), "numpy", r"numpy array of shape \(1, 4\)"),
        (lambda shape, refresh: torch.ones(shape), "numpy", r"torch array of shape \(2, 4\)"),
        (lambda shape, refresh: np.ones(shape), "torch", r"numpy array of shape \(2, 4\)"),
        (lambda shape, refresh: None, "numpy", "NoneType"),
    ],
)
@pytest.mark.parametrize("verb", [opt.update, opt.update_])
def test_a_projection_of_the_wrong_shape_names_the_parameter(given, kind, got, verb):
    model = made({"layer": {"w": np.ones((4, 6))}}, kind)
    state = opt.setup(opt.Apollo(rank=2, projection=given), model)
    with pytest.raises(opt.RuleError, match=got) as raised:
        verb(state, model, model)
    assert "layer.w" in str(raised.value)
    assert "of shape (2, 4), (rank, projected side)" in str(raised.value)
    assert (numpy_of(model["layer"]["w"]) == 1).all()


# --- the state ----------------------------------------------------------------------------------------------------------


@both_kinds
def test_resuming_is_exact_with_no_projection_stored(kind):
    x, grads = trajectory((24, 40), 12)
    rule = opt.OptimiserChain(opt.NormGrowthCap(), opt.Apollo(0.01, 6, u=5))
    model = made({"w": x, "b": x[0]}, kind)
    grads = [made({"w": g, "b": g[0]}, kind) for g in grads]
    state = opt.setup(rule, model)
    saved = None
    for t, grad in enumerate(grads):
        if t == 7:
            leaves = [np.array(numpy_of(leaf)) for leaf in optree.tree_leaves(state)]
            saved = leaves, optree.tree_map(lambda a: made(numpy_of(a), kind), model)
        state, model = opt.update(state, model, grad)
    leaves, resumed = saved
    projection = 6 * 24
    assert all(leaf.size in {1, 6 * 40, 40} for leaf in leaves)
    assert sum(leaf.size for leaf in leaves if leaf.size > 1) < 2 * 6 * 40 + 2 * 40 + projection
    # a new process: set up anew, and put the saved numbers in the place of the new ones
    fresh, structure = optree.tree_flatten(opt.setup(rule, resumed))
    if kind == "torch":
        put = [torch.as_tensor(leaf) for leaf in leaves]
    else:  # counters are Python numbers there
        put = [new if isinstance(old, np.ndarray) else new.item() for old, new in zip(fresh, leaves, strict=True)]
    state_again = optree.tree_unflatten(structure, put)
    for grad in grads[7:]:
        state_again, resumed = opt.update(state_again, resumed, grad)
    for name in model:
        np.testing.assert_array_equal(numpy_of(resumed[name]), numpy_of(model[name]), strict=True)
    assert state_again == state


@both_kinds
def test_one_run_is_as_the_next(kind):
    x, grads = trajectory((8, 6), 6)
    np.testing.assert_array_equal(run(opt.Apollo(0.1, u=2), x, grads, kind), run(opt.Apollo(0.1, u=2), x, grads, kind))


def test_numpy_and_torch_run_alike():
    x, grads = trajectory((8, 6), 12)
    check(run(opt.Apollo(0.1, u=3), x, grads, "torch"), run(opt.Apollo(0.1, u=3), x, grads, "numpy"))


# The matrices of a transformer of width 384: fused QKV, output projection, the two of the MLP.
MATRICES = {"qkv": (1152, 384), "out": (384, 384), "up": (1536, 384), "down": (384, 1536)}


def total_bytes(rule, shapes=MATRICES, **extra):
    model = {name: np.zeros(shape, "float32") for name, shape in {**shapes, **extra}.items()}
    state = opt.setup(rule, model)
    return sum(state_bytes(state[name].state) for name in model)


def test_bytes_of_state():
    adamw = total_bytes(opt.AdamW())
    for name, shape in MATRICES.items():
        quarter = opt.Apollo(rank=min(shape) // 4)
        assert total_bytes(quarter, {name: shape}) <= 0.26 * total_bytes(opt.AdamW(), {name: shape})
    assert total_bytes(opt.Apollo(rank=96)) <= 0.26 * adamw
    assert total_bytes(opt.Apollo.mini()) <= 0.02 * adamw


def test_structural_fields_cannot_be_adjusted():
    state = opt.setup(opt.Apollo(), {"w": np.ones((3, 4))})
    for change in ({"rank": 2}, {"u": 5}, {"sort_dims": False}, {"mode": "tensor"}, {"seed": 3}, {"projection": None}):
        with pytest.raises(
            opt.HyperParameterError, match=f"field '{next(iter(change))}' of Apollo is fixed at setup"
        ) as raised:
            opt.adjust(state, **change)
        assert "w" in str(raised.value)


def test_adjust():
    state = opt.setup(opt.Apollo(opt.AdamW(0.1)), {"w": np.ones((3, 4))})
    rule = opt.adjust(state, 0.2)["w"].rule
    assert rule.opt == opt.AdamW(0.2)
    assert opt.adjust(state, eta=0.3)["w"].rule.opt.eta == 0.3
    assert opt.adjust(state, times=0.5)["w"].rule.opt.eta == 0.05
    changed = opt.adjust(state, scale=4.0, lambda_=0.5, beta=(0.5, 0.6))["w"].rule
    assert (changed.scale, changed.opt.lambda_, changed.opt.beta) == (4.0, 0.5, (0.5, 0.6))
    assert opt.adjust(state, lambda_=0.7, rule=opt.AdamW)["w"].rule.opt.lambda_ == 0.7


def test_scale_acts_by_its_root():
    x, grads = trajectory((3, 5), 1)
    steps = [x - run(opt.Apollo(0.1, 2, scale=scale), x, grads)[0] for scale in (1.0, 9.0)]
    check(steps[1], 3 * steps[0])


def test_vmap():
    x, (grad,) = trajectory((3, 4, 6), 1)
    x, grad = made(x, "torch"), made(grad, "torch")
    state = torch.func.vmap(lambda x: opt.setup(opt.Apollo(0.1, 2), x))(x)
    for _ in range(2):
        state, x = torch.func.vmap(opt.update)(state, x, grad)
    expected = [run(opt.Apollo(0.1, 2), start, [g, g])[-1] for start, g in zip(*trajectory_of_stack(), strict=True)]
    check(numpy_of(x), np.array(expected))


def trajectory_of_stack():
    x, (grad,) = trajectory((3, 4, 6), 1)
    return x, grad


@both_kinds
def test_the_state_survives_flattening(kind):
    x, grads = trajectory((4, 6), 2)
    model = made({"w": x, "b": x[0]}, kind)
    grads = [made({"w": g, "b": g[0]}, kind) for g in grads]
    state, model = opt.update(opt.setup(opt.Apollo(u=2), model), model, grads[0])
    leaves, structure = optree.tree_flatten(state)
    again = optree.tree_unflatten(structure, leaves)
    assert again == state
    a, b = (opt.update(each, model, grads[1]) for each in (state, again))
    assert a[0] == b[0]
    if kind == "torch":
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)


def test_differentiable():
    x, grads = trajectory((3, 4), 1)
    x, grad = made(x, "torch"), made(grads[0], "torch").requires_grad_()
    state = opt.setup(opt.Apollo(0.1, 2), x)
    assert torch.autograd.gradcheck(lambda grad: opt.update(state, x, grad)[1], (grad,))


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"opt": opt.Adam()}, opt.RuleError, "field 'opt' must be an AdamW or a learning rate; got Adam("),
        ({"opt": -0.1}, opt.HyperParameterError, "field 'eta' must be a finite number >= 0; got -0.1"),
        ({"rank": 0}, opt.HyperParameterError, "field 'rank' must be None, a whole number >= 1 or a function"),
        ({"rank": 2.0}, opt.HyperParameterError, "field 'rank' must be None, a whole number >= 1 or a function"),
        ({"rank": True}, opt.HyperParameterError, "field 'rank' must be None, a whole number >= 1 or a function"),
        ({"u": 0}, opt.HyperParameterError, "field 'u' must be a whole number >= 1; got 0"),
        ({"scale": 0}, opt.HyperParameterError, "field 'scale' must be a finite number > 0; got 0"),
        ({"mode": "row"}, opt.HyperParameterError, "field 'mode' must be one of 'channel', 'tensor'; got 'row'"),
        ({"seed": -1}, opt.HyperParameterError, "field 'seed' must be a whole number >= 0; got -1"),
        ({"sort_dims": 1}, opt.HyperParameterError, "field 'sort_dims' must be True or False; got 1"),
        ({"projection": np.ones(3)}, opt.HyperParameterError, "field 'projection' must be None or a callable (shape, refresh)"),
        ({"lr": 0.1}, opt.UnknownFieldError, "Apollo has no field 'lr'"),
    ],
)
def test_bad_fields(fields, error, text):
    with pytest.raises(error) as raised:
        opt.Apollo(**fields)
    assert text in str(raised.value)


@pytest.mark.parametrize("value", [0, 2.5, True, None])
def test_a_rank_function_must_give_a_number(value):
    with pytest.raises(opt.HyperParameterError, match=r"layer\.w") as raised:
        opt.setup(opt.Apollo(rank=lambda side: value), {"layer": {"w": np.ones((3, 4))}})
    assert f"the rank function gave {value!r} for a side of 4" in str(raised.value)


# --- on devices where a projection costs launches -----------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The projections that are made, on a host that is taken for a device."""
    found = []
    normal = _random.normal

    def counted(key, counter, shape, like):
        found.append((key, counter, shape))
        return normal(key, counter, shape, like)

    monkeypatch.setattr(_random, "normal", counted)
    monkeypatch.setattr(_random, "on_cpu", lambda x: False)
    monkeypatch.setattr(_random, "_recent", OrderedDict())
    return found


def steps_of(rule, count, shape=(6, 8)):
    generator = torch.Generator().manual_seed(0)
    model = {"a": torch.randn(shape, generator=generator), "b": torch.randn(shape, generator=generator)}
    state = opt.setup(rule, model)
    for _ in range(count):
        state, model = opt.update(state, model, {k: torch.randn(shape, generator=generator) for k in model})
    return model


def test_a_projection_is_made_once_a_refresh_on_a_device(drawn, monkeypatch):
    found = steps_of(opt.Apollo(rank=2, u=3), 7)
    assert len(drawn) == len(set(drawn)) == 2 * 3  # refreshes 0, 1 and 2 of each array
    monkeypatch.undo()
    for name, x in steps_of(opt.Apollo(rank=2, u=3), 7).items():
        assert torch.equal(found[name], x)


def test_projections_that_are_kept_are_bounded(drawn, monkeypatch):
    monkeypatch.setattr(_random, "_RECENT", 20)
    steps_of(opt.Apollo(rank=2), 3)  # 2 x 6 numbers for each array
    assert len(_random._recent) == 1
    assert len(drawn) == 2 * 3
