"""Muon: every preset against the implementation it names, every field, the learning-rate ratio, and what it refuses."""

import math

import numpy as np
import optree
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from matrices import LONE, MATRICES, newton_schulz
from optimisers.rules.matrices.newtonschulz import JORDAN
from optimisers.tree.show import state_bytes
from running import run

both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])
SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7), "long": (64, 200)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
STEPS = 20


def trajectory(shape, steps=STEPS, seed=0, size=1.0):
    """(x, gradients), those of a training run in that they keep a common part."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=shape)
    return rng.normal(size=shape), [size * (common + rng.normal(size=shape)) for _ in range(steps)]


def check(ours, theirs, tolerance=1e-12):
    np.testing.assert_allclose(ours, np.array(theirs), rtol=0, atol=tolerance * np.abs(theirs).max())


# --- the conventions, transcribed ---------------------------------------------------------------------------------------


def keller_jordan(x, grads, lr=0.02, mu=0.95):
    m, xs = np.zeros_like(x), []
    for g in grads:
        m = m + (1 - mu) * (g - m)
        u = g + mu * (m - g)
        o = newton_schulz(u, [JORDAN] * 5, lambda norm: norm + 1e-7)
        x = x - lr * max(1, x.shape[0] / x.shape[1]) ** 0.5 * o
        xs.append(x)
    return xs


def torch_muon(x, grads, lr=1e-3, mu=0.95, decay=0.1):
    m, xs = np.zeros_like(x), []
    for g in grads:
        m = mu * m + (1 - mu) * g
        o = newton_schulz((1 - mu) * g + mu * m, [JORDAN] * 5, lambda norm: max(norm, 1e-7))
        x = x * (1 - lr * decay) - lr * math.sqrt(max(1, x.shape[0] / x.shape[1])) * o
        xs.append(x)
    return xs


def moonlight(x, grads, lr=1e-3, mu=0.95, decay=0.1):
    m, xs = np.zeros_like(x), []
    for g in grads:
        m = mu * m + g
        o = newton_schulz(g + mu * m, [JORDAN] * 5, lambda norm: norm + 1e-7)
        x = x * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(x.shape)) * o
        xs.append(x)
    return xs


DION = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def dion(x, grads, lr=0.01, mu=0.95, decay=0.01):
    m, xs = np.zeros_like(x), []
    for g in grads:
        m = mu * m + g
        o = newton_schulz(m, DION, lambda norm: 1.02 * norm + 1e-8)
        x = x * (1 - lr * decay) - lr * math.sqrt(x.shape[0] / x.shape[1]) * o
        xs.append(x)
    return xs


def optax_muon(x, grads, lr=0.02, beta=0.95):
    m, xs = np.zeros_like(x), []
    for t, g in enumerate(grads, 1):
        m = beta * m + (1 - beta) * g
        u = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        o = newton_schulz(u, [JORDAN] * 5, lambda norm: norm + 1e-8)
        x = x - lr * math.sqrt(max(1, x.shape[1] / x.shape[0])) * o
        xs.append(x)
    return xs


TRANSCRIBED = {
    "kellerjordan": keller_jordan,
    "torch": torch_muon,
    "moonlight": moonlight,
    "dion": dion,
    "optax": optax_muon,
}


@both_kinds
@shapes
@pytest.mark.parametrize("size", [1.0, 1e-8], ids=["usual", "near epsilon"])
@pytest.mark.parametrize("preset", TRANSCRIBED)
def test_presets_follow_the_formulas(kind, preset, shape, size):
    x, grads = trajectory(shape, size=size)
    # At 1e-8 the norm is near epsilon, so that adding and clamping, and the size of the momentum, make a difference.
    check(run(opt.Muon.preset(preset), x, grads, kind), TRANSCRIBED[preset](x, grads))


@pytest.mark.parametrize("preset", TRANSCRIBED)
def test_presets_take_overrides(preset):
    rule = opt.Muon.preset(preset, eta=0.5, mu=0.5)
    assert rule == opt.Muon.preset(preset).replace(eta=0.5, mu=0.5)
    x, grads = trajectory((4, 6), 3)
    names = {"optax": {"beta": 0.5}}.get(preset, {"mu": 0.5})
    check(run(rule, x, grads), TRANSCRIBED[preset](x, grads, lr=0.5, **names))


@pytest.mark.parametrize("preset", ["kellerjordan", "moonlight"])
def test_a_kernel_is_a_flattened_matrix(preset):
    x, grads = trajectory((6, 3, 2, 2), 4)
    flat = TRANSCRIBED[preset](x.reshape(6, 12), [g.reshape(6, 12) for g in grads])
    check(run(opt.Muon.preset(preset), x, grads).reshape(4, 6, 12), flat)


def test_presets_are_named():
    with pytest.raises(opt.HyperParameterError, match=r"'keller' is not one of 'kellerjordan', 'torch', 'moonlight', 'opt"):
        opt.Muon.preset("keller")


# --- the real thing -----------------------------------------------------------------------------------------------------

ADJUST = {"original": "jordan", "match_rms_adamw": "moonlight"}
adjustments = pytest.mark.parametrize(("theirs", "scale"), ADJUST.items(), ids=ADJUST.keys())


def run_torch_muon(x, grads, **options):
    p = torch.nn.Parameter(x.clone())
    optimiser = torch.optim.Muon([p], **options)
    xs = []
    for grad in grads:
        p.grad = grad.clone()
        optimiser.step()
        xs.append(p.detach().numpy().copy())
    return np.array(xs)


@shapes
@adjustments
def test_torch_muon_in_float64(shape, theirs, scale, monkeypatch):
    # torch.optim.Muon iterates in bfloat16 whatever it is given. With that one cast taken away, it is the same algorithm in
    # the precision of its parameter.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    x, grads = trajectory(shape)
    expected = run_torch_muon(made(x, "torch"), made(tuple(grads), "torch"), adjust_lr_fn=theirs)
    check(run(opt.Muon.preset("torch", scale=scale), x, grads, "torch"), expected)


# As it is, in bfloat16: eps is 2**-9, and the two differ in where they round (we normalise in float32, and round then). The
# iterate, of elements up to 1, is rounded in each of 5 steps, and the first errors grow with the slope of the polynomial, up to
# 3.4445**5 = 485 for directions that the matrix hardly has; in the others the slope is below 1 from the second step on. So
# 5 to 25 times eps in an element, 0.01 to 0.05 (measured: 0.02), and t times that after t steps.
BFLOAT16 = 0.05


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)], ids=["tall", "wide", "square"])
@adjustments
def test_torch_muon_in_bfloat16(shape, theirs, scale):
    x, grads = trajectory(shape)
    x, grads = torch.from_numpy(x).float(), [torch.from_numpy(g).float() for g in grads]
    expected = run_torch_muon(x, grads, adjust_lr_fn=theirs, weight_decay=0.0)
    ns = opt.NewtonSchulz(normaliser="clamp", dtype="bfloat16")
    rule = opt.Muon.preset("torch", scale=scale, ns=ns, lambda_=0.0)
    state, ours = opt.setup(rule, x), []
    for grad in grads:
        state, x = opt.update(state, x, grad)
        ours.append(x.numpy())
    step = rule.eta * (max(1, shape[0] / shape[1]) ** 0.5 if scale == "jordan" else 0.2 * max(shape) ** 0.5)
    off = np.abs(np.array(ours) - expected).max(axis=(1, 2)) / step
    assert (off <= BFLOAT16 * np.arange(1, STEPS + 1)).all(), off


def run_optax(x, grads, **options):
    import jax
    import jax.numpy as jnp
    from optax import apply_updates, contrib

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, x)
        optimiser = contrib.muon(**options)
        state, seen = optimiser.init(params), []

        @jax.jit
        def step(params, state, grad):
            updates, state = optimiser.update(grad, state, params)
            return apply_updates(params, updates), state

        for grad in grads:
            params, state = step(params, state, jax.tree.map(jnp.asarray, grad))
            seen.append({name: np.asarray(p) for name, p in params.items()})
    return seen


@both_kinds
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"lambda_": 0.1}, {"weight_decay": 0.1}),
        ({"nesterov": False, "opt": opt.Adam(0.02)}, {"nesterov": False}),
    ],
    ids=["defaults", "decay", "no nesterov"],
)
def test_optax_muon(kind, fields, options):
    sizes = {**{name: SHAPES[name] for name in ("tall", "wide", "square")}, "vector": (9,), "stack": (3, 4, 2), "scalar": ()}
    both = {name: trajectory(shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}
    x = {name: start for name, (start, _) in both.items()}
    grads = [{name: np.asarray(both[name][1][t]) for name in both} for t in range(STEPS)]
    x = {name: np.asarray(value) for name, value in x.items()}
    expected = run_optax(x, grads, learning_rate=0.02, **options)
    model = made(x, kind)
    state = opt.setup(opt.Muon.preset("optax", **fields), model)
    for grad, theirs in zip(grads, expected, strict=True):
        state, model = opt.update(state, model, made(grad, kind))
        for name, array in theirs.items():
            # 1e-11: their power beta**t and our running product part by rounding.
            np.testing.assert_allclose(numpy_of(model[name]), array, rtol=0, atol=1e-11, err_msg=name)


# --- fields -------------------------------------------------------------------------------------------------------------


def direction(rule, x, grad, kind="numpy"):
    """What one step takes away from x, divided by eta."""
    return (x - run(rule, x, [grad], kind)[0]) / rule.eta


def plain(u, scale=1.0):
    return scale * newton_schulz(u, [JORDAN] * 5, lambda norm: norm + 1e-7)


@both_kinds
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", ["ema", "ema_debiased", "classic"])
def test_momentum(kind, momentum, nesterov):
    x, grads = trajectory((4, 6), 6)
    mu, eta, decay = 0.8, 0.1, 0.3
    rule = opt.Muon(eta=eta, mu=mu, lambda_=decay, momentum=momentum, nesterov=nesterov)
    ours = run(rule, x, grads, kind)
    m = 0 * x
    for t, g in enumerate(grads, 1):
        weight = 1 if momentum == "classic" else 1 - mu
        m = mu * m + weight * g
        u = m
        if momentum == "ema_debiased":
            u = mu * m / (1 - mu ** (t + 1)) + weight * g / (1 - mu**t) if nesterov else m / (1 - mu**t)
        elif nesterov:
            u = mu * m + weight * g
        x = x - eta * plain(u, 1.0) - eta * decay * x
        check(ours[t - 1], x)


@both_kinds
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (5, 5)])
@pytest.mark.parametrize("scale", ["jordan", "moonlight", "rms", "none"])
def test_scale(kind, scale, shape, layout):
    x, (grad,) = trajectory(shape, 1)
    rows, columns = shape if layout == "out_in" else shape[::-1]
    factor = {
        "jordan": math.sqrt(max(1, rows / columns)),
        "moonlight": 0.2 * math.sqrt(max(rows, columns)),
        "rms": math.sqrt(rows / columns),
        "none": 1.0,
    }[scale]
    rule = opt.Muon(eta=1.0, mu=0.0, lambda_=0.0, scale=scale, layout=layout)
    check(direction(rule, x, grad, kind), plain(grad, factor))


@both_kinds
@pytest.mark.parametrize("blocks", [1, 3, (4, 1, 1), (2, 2, 2), (1, 5)])
@pytest.mark.parametrize("scale", ["jordan", "rms", "none"])
def test_an_in_out_layer_is_an_out_in_layer_transposed(kind, scale, blocks):
    x, grads = trajectory((6, 4), 4)
    out_in = run(opt.Muon(scale=scale, blocks=blocks), x, grads, kind)
    in_out = run(opt.Muon(scale=scale, blocks=blocks, layout="in_out"), x.T, [g.T for g in grads], kind)
    check(in_out.transpose(0, 2, 1), out_in)


@both_kinds
@shapes
def test_a_transposed_matrix_gives_the_transposed_update_without_scale(kind, shape):
    x, grads = trajectory(shape, 5)
    rule = opt.Muon(scale="none")
    check(run(rule, x.T, [g.T for g in grads], kind).transpose(0, 2, 1), run(rule, x, grads, kind))


@both_kinds
@pytest.mark.parametrize("blocks", [1, 2, 4, 12, (12,), (8, 2, 2), (1, 11), (3, 3, 5, 1)])
@pytest.mark.parametrize("columns", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("scale", ["jordan", "moonlight"])
def test_each_block_is_as_if_it_were_its_own_parameter(kind, blocks, columns, scale):
    x, grads = trajectory((12, *columns), 4)
    together = run(opt.Muon(blocks=blocks, scale=scale), x, grads, kind)
    sizes = blocks if isinstance(blocks, tuple) else (12 // blocks,) * blocks
    ends = np.cumsum(sizes)
    for size, end in zip(sizes, ends, strict=True):
        part = slice(end - size, end)
        alone = run(opt.Muon(scale=scale), x[part], [g[part] for g in grads], kind)
        check(together[:, part], alone)


@both_kinds
@pytest.mark.parametrize("columns", [(5,), (2, 3)], ids=str)
def test_batch_dims_stack_matrices(kind, columns):
    x, grads = trajectory((3, 4, *columns), 4)
    together = run(opt.Muon(batch_dims=1, blocks=(1, 3)), x, grads, kind)
    for i in range(3):
        check(together[:, i], run(opt.Muon(blocks=(1, 3)), x[i], [g[i] for g in grads], kind))
    two = run(opt.Muon(batch_dims=2), x[None], [g[None] for g in grads], kind)
    check(two[:, 0], run(opt.Muon(batch_dims=1), x, grads, kind))


def test_batch_dims_see_a_matrix_not_its_stack():
    fields = {"eta": 1.0, "mu": 0.0, "lambda_": 0.0}
    x, (grad,) = trajectory((6, 3, 2), 1)
    check(direction(opt.Muon(**fields, batch_dims=1), x, grad)[0], plain(grad[0], math.sqrt(3 / 2)))
    flat = plain(grad.reshape(6, 6)).reshape(6, 3, 2)
    check(direction(opt.Muon(**fields), x, grad), flat)


@both_kinds
def test_a_kernel_of_a_transposed_convolution(kind):
    # (in, out, kh, kw): a matrix (in, out * kh * kw), in blocks of output channels.
    x, grads = trajectory((3, 4, 2, 2), 3)
    ours = run(opt.Muon(layout="in_out", blocks=2, scale="rms"), x, grads, kind)
    for part in (slice(0, 2), slice(2, 4)):
        alone = run(
            opt.Muon(layout="in_out", scale="rms"), x[:, part].reshape(3, 8), [g[:, part].reshape(3, 8) for g in grads], kind
        )
        check(ours[:, :, part].reshape(3, 3, 8), alone)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_are_kept(dtype):
    x, grads = trajectory((4, 6), 3)
    x = torch.from_numpy(x).to(getattr(torch, dtype))
    state = opt.setup(opt.Muon(), x)
    assert state[()].state.dtype == x.dtype
    for grad in grads:
        state, x = opt.update(state, x, torch.from_numpy(grad).to(x.dtype))
    assert x.dtype == getattr(torch, dtype)
    assert x.isfinite().all()


@pytest.mark.parametrize("momentum", ["ema", "classic", "ema_debiased"])
def test_half_the_state_of_adamw(momentum):
    # The matrices of a transformer of width 384.
    model = {
        name: np.zeros(shape, "float32") for name, shape in {"qkv": (1152, 384), "out": (384, 384), "up": (1536, 384)}.items()
    }
    ours, theirs = (opt.setup(rule, model) for rule in (opt.Muon(momentum=momentum), opt.AdamW()))
    bytes_of = [sum(state_bytes(state[name].state) for name in model) for state in (ours, theirs)]
    assert bytes_of[0] <= 0.5 * bytes_of[1]
    assert bytes_of[0] >= sum(x.nbytes for x in model.values())


@both_kinds
@pytest.mark.parametrize("fields", [{}, {"scale": "rms", "blocks": (1, 3)}, {"layout": "in_out", "batch_dims": 0}], ids=str)
def test_orthogonalise_behind_momentum_is_muon(kind, fields):
    x, grads = trajectory((4, 6), 8)
    muon = opt.Muon(eta=0.1, mu=0.9, lambda_=0.2, momentum="classic", nesterov=False, **fields)
    # Momentum(eta=1) gives rho m + dx, which is the classic momentum; then the matrix step, the decay, and the rate.
    chain = opt.OptimiserChain(opt.Momentum(1.0, 0.9), opt.Orthogonalise(**fields), opt.WeightDecay(0.2), opt.Descent(0.1))
    check(run(chain, x, grads, kind), run(muon, x, grads, kind))


@both_kinds
def test_orthogonalise_alone(kind):
    x, (grad,) = trajectory((2, 6, 4), 1)
    rule = opt.OptimiserChain(opt.Orthogonalise(batch_dims=1), opt.Descent(1.0))
    check(
        x - run(rule, x, [grad], kind)[0],
        np.stack([plain(g, math.sqrt(6 / 4)) for g in grad]),
    )
    assert opt.Orthogonalise().init(x) is None


# --- which arrays are matrices ------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("shape", LONE, ids=str)
def test_arrays_that_are_no_matrices_use_opt(kind, shape):
    x, grads = trajectory(shape, 5)
    x, grads = np.asarray(x), [np.asarray(g) for g in grads]
    inner = opt.Adam(0.1)
    check(run(opt.Muon(inner), x, grads, kind), run(inner, x, grads, kind), 0)


@both_kinds
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_everything_else_is_a_matrix(kind, shape):
    x, (grad,) = trajectory(shape, 1)
    rule = opt.Muon(eta=1.0, mu=0.0, lambda_=0.0)
    flat = grad.reshape(shape[0], -1)
    check(direction(rule, x, grad, kind).reshape(flat.shape), plain(flat, math.sqrt(max(1, flat.shape[0] / flat.shape[1]))))


def test_batch_dims_count_before_what_is_a_matrix():
    rule = opt.Muon(opt.Descent(1.0), batch_dims=1, eta=0.0)
    model = {"stack": np.ones((3, 4, 5)), "vectors": np.ones((3, 4)), "columns": np.ones((3, 4, 1))}
    _, after = opt.update(opt.setup(rule, model), model, {name: np.ones_like(x) for name, x in model.items()})
    assert {name: bool((x == 0).all()) for name, x in after.items()} == {"stack": False, "vectors": True, "columns": True}


@both_kinds
def test_fallback_is_asked_once_for_each_array_at_setup(kind):
    asked = []

    def big(x):
        asked.append(tuple(x.shape))
        return x.shape[0] > 5

    model = made({"a": np.ones((6, 3)), "b": np.ones((3, 6)), "c": np.ones(3), "d": np.ones((7, 7))}, kind)
    grads = made({name: np.full(numpy_of(x).shape, 0.5) for name, x in model.items()}, kind)
    state = opt.setup(opt.Muon(opt.Descent(1.0), eta=0.0, fallback=big), model)
    assert sorted(asked) == [(3, 6), (6, 3), (7, 7)]  # a vector is no question
    for _ in range(3):
        state, model = opt.update(state, model, grads)
        state = opt.adjust(state, eta=0.0, rule=opt.Muon)
    assert len(asked) == 3
    changed = {name: bool((numpy_of(x) != 1).any()) for name, x in model.items()}
    assert changed == {"a": True, "b": False, "c": True, "d": True}


@both_kinds
def test_a_tree_of_matrices_and_vectors_is_each_alone(kind):
    # No mixing between layers: equal and unequal shapes, very different sizes.
    sizes = {"a": (6, 4), "b": (6, 4), "c": (4, 6), "bias": (6,), "conv": (6, 2, 2), "d": (6, 4)}
    both = {name: trajectory(shape, 4, seed=i, size=10.0**i) for i, (name, shape) in enumerate(sizes.items())}
    model = made({name: x for name, (x, _) in both.items()}, kind)
    state = opt.setup(opt.Muon(), model)
    for t in range(4):
        state, model = opt.update(state, model, made({name: grads[t] for name, (_, grads) in both.items()}, kind))
    for name, (x, grads) in both.items():
        check(numpy_of(model[name]), run(opt.Muon(), x, grads, kind)[-1])


# --- the two learning rates ---------------------------------------------------------------------------------------------


def etas(state, name):
    rule = state[name].rule
    return rule.eta, rule.opt.eta


@pytest.fixture
def matrix_and_vector():
    model = {"w": np.ones((3, 4)), "b": np.ones(4)}
    return opt.setup(opt.Muon(opt.AdamW(3e-4), eta=0.02), model)


def test_adjust_keeps_the_ratio_of_setup(matrix_and_vector):
    state = opt.adjust(matrix_and_vector, 0.04)
    assert etas(state, "w") == etas(state, "b") == (0.04, pytest.approx(6e-4))
    state = opt.adjust(state, 0.0)
    assert etas(state, "w") == (0.0, 0.0)
    state = opt.adjust(state, 0.02)  # through zero and back
    assert etas(state, "w") == (0.02, pytest.approx(3e-4))


def test_adjust_by_name_sets_one_of_them(matrix_and_vector):
    state = opt.adjust(matrix_and_vector, eta=0.1)
    assert etas(state, "w") == (0.1, 3e-4)
    state = opt.adjust(state, eta=0.5, rule=opt.AdamW)
    assert etas(state, "w") == (0.1, 0.5)
    state = opt.adjust(state, 0.01)  # the ratio is still the one at setup
    assert etas(state, "w") == (0.01, pytest.approx(1.5e-4))


def test_adjust_times(matrix_and_vector):
    state = opt.adjust(opt.adjust(matrix_and_vector, times=0.5), times=0.1)
    assert etas(state, "w") == (pytest.approx(0.002), pytest.approx(3e-5))
    state = opt.adjust(opt.adjust(state, times=0), times=1)
    assert etas(state, "w") == (0.02, 3e-4)


def test_adjust_other_fields(matrix_and_vector):
    state = opt.adjust(matrix_and_vector, mu=0.5, lambda_=0.3, nesterov=False, scale="rms", ns=opt.NewtonSchulz(3))
    rule = state["w"].rule
    assert (rule.mu, rule.lambda_, rule.nesterov, rule.scale, rule.ns.steps) == (0.5, 0.3, False, "rms", 3)
    assert rule.opt == opt.AdamW(3e-4)  # by name, opt is reached with rule= alone
    state = opt.adjust(state, lambda_=0.7, rule=opt.AdamW)
    assert state["b"].rule.opt.lambda_ == 0.7
    assert state["b"].rule.lambda_ == 0.3


@pytest.mark.parametrize(
    "change", [{"momentum": "classic"}, {"batch_dims": 1}, {"fallback": None}, {"opt": opt.Adam()}], ids=str
)
def test_what_the_state_follows_is_fixed(matrix_and_vector, change):
    with pytest.raises(opt.HyperParameterError, match=f"field '{next(iter(change))}' of Muon"):
        opt.adjust(matrix_and_vector, **change)


def test_without_a_ratio_to_keep():
    model = {"layer": {"w": np.ones((3, 4))}}
    state = opt.setup(opt.Muon(opt.AdaDelta()), model)
    with pytest.raises(opt.HyperParameterError, match=r"'?layer\.w'?.*ratio.*AdaDelta"):
        opt.adjust(state, 0.1)
    assert opt.adjust(state, eta=0.1)["layer"]["w"].rule.eta == 0.1
    assert opt.adjust(state, times=0.5)["layer"]["w"].rule.eta == 0.01
    zero = opt.setup(opt.Muon(eta=0.0), model)
    with pytest.raises(opt.HyperParameterError, match=r"learning rate was 0 at setup"):
        opt.adjust(zero, 0.1)


@both_kinds
def test_adjust_is_felt_by_both(kind):
    x = made({"w": np.ones((3, 4)), "b": np.ones(4)}, kind)
    grads = made({"w": np.eye(3, 4), "b": np.ones(4)}, kind)
    state = opt.adjust(opt.setup(opt.Muon(), x), 0.0)
    state, still = opt.update(state, x, grads)
    assert all((numpy_of(still[name]) == 1).all() for name in x)
    state, moved = opt.update(opt.adjust(state, 0.02), still, grads)
    assert all((numpy_of(moved[name]) != 1).any() for name in x)


def test_scheduled():
    x, grads = trajectory((3, 4), 4)
    scheduled = run(opt.Scheduled(opt.Muon(), eta=lambda t: 0.1 / (t + 1)), x, grads)
    state, by_hand = opt.setup(opt.Muon(), x), x
    for t, grad in enumerate(grads):
        state, by_hand = opt.update(opt.adjust(state, 0.1 / (t + 1)), by_hand, grad)
        check(scheduled[t], by_hand)


# --- values and trees ---------------------------------------------------------------------------------------------------


@both_kinds
def test_the_state_survives_flattening(kind):
    x, grads = trajectory((4, 6), 4)
    model = made({"w": x, "b": x[0]}, kind)
    state = opt.setup(opt.Muon(momentum="ema_debiased"), model)
    state, model = opt.update(state, model, made({"w": grads[0], "b": grads[0][0]}, kind))
    leaves, structure = optree.tree_flatten(state)
    again = optree.tree_unflatten(structure, leaves)
    assert again == state
    a, b = (opt.update(each, model, made({"w": grads[1], "b": grads[1][0]}, kind)) for each in (state, again))
    assert a[0] == b[0]


def test_vmap_over_models():
    x, grads = trajectory((3, 4, 6), 1)
    x, grad = made(x, "torch"), made(grads[0], "torch")
    state = torch.func.vmap(lambda x: opt.setup(opt.Muon(), x))(x)
    _, together = torch.func.vmap(opt.update)(state, x, grad)
    for i in range(3):
        check(numpy_of(together[i]), run(opt.Muon(), numpy_of(x[i]), [numpy_of(grad[i])], "torch")[0])


def test_differentiable():
    x, grads = trajectory((3, 4), 1)
    rule = opt.Muon()
    x, grad = made(x, "torch"), made(grads[0], "torch").requires_grad_()
    state = opt.setup(rule, x)
    assert torch.autograd.gradcheck(lambda grad: opt.update(state, x, grad)[1], (grad,))


# --- bad input ----------------------------------------------------------------------------------------------------------


@both_kinds
def test_complex_matrices_are_refused_by_path(kind):
    model = made({"layer": {"w": np.ones((3, 4), "complex128")}}, kind)
    with pytest.raises(opt.RuleError, match=r"layer\.w.*") as raised:
        opt.setup(opt.Muon(), model)
    assert "Muon cannot step a complex matrix" in str(raised.value)
    with pytest.raises(opt.RuleError, match=r"layer\.w"):
        opt.setup(opt.Orthogonalise(), model)
    # complex vectors go to opt, which can
    vector = made({"b": np.ones(3, "complex128")}, kind)
    opt.update(opt.setup(opt.Muon(), vector), vector, vector)
    opt.setup(opt.Muon(fallback=lambda x: True), model)


@pytest.mark.parametrize("make", [opt.Muon, opt.Orthogonalise])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"blocks": 4}, "blocks=4 does not divide the output axis of shape (6, 5), which has 6 rows"),
        ({"blocks": (3, 2)}, "blocks=(3, 2) does not divide the output axis of shape (6, 5), which has 6 rows"),
        ({"blocks": 2, "layout": "in_out"}, "blocks=2 does not divide the output axis of shape (6, 5), which has 5 columns"),
    ],
)
def test_blocks_that_do_not_fit_name_the_parameter(make, fields, text):
    with pytest.raises(opt.RuleError) as raised:
        opt.setup(make(**fields), {"attn": {"qkv": np.ones((6, 5))}})
    assert "attn.qkv" in str(raised.value)
    assert text in str(raised.value)


def test_blocks_that_do_not_fit_are_refused_when_adjusted():
    state = opt.setup(opt.Muon(), {"attn": {"qkv": np.ones((6, 5))}})
    model = {"attn": {"qkv": np.ones((6, 5))}}
    with pytest.raises(opt.RuleError, match=r"attn\.qkv"):
        opt.update(opt.adjust(state, blocks=4), model, model)


def test_orthogonalise_refuses_vectors_by_path():
    with pytest.raises(opt.RuleError, match=r"layer\.b") as raised:
        opt.setup(opt.Orthogonalise(), {"layer": {"b": np.ones(3)}})
    assert "needs at least 2 dimensions" in str(raised.value)


@pytest.mark.parametrize("make", [opt.Muon, opt.Orthogonalise])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scale": "keller"}, "field 'scale' must be one of 'jordan', 'moonlight', 'rms', 'none'; got 'keller'"),
        ({"layout": "io"}, "field 'layout' must be one of 'out_in', 'in_out'; got 'io'"),
        ({"blocks": 0}, "field 'blocks' must be a whole number >= 1, or a tuple of block sizes >= 1; got 0"),
        ({"blocks": ()}, "field 'blocks' must be a whole number >= 1"),
        ({"blocks": (2, 0)}, "field 'blocks' must be a whole number >= 1"),
        ({"blocks": 2.0}, "field 'blocks' must be a whole number >= 1"),
        ({"batch_dims": -1}, "field 'batch_dims' must be a whole number >= 0; got -1"),
        ({"ns": 5}, "field 'ns' must be a NewtonSchulz; got 5"),
    ],
)
def test_bad_fields(make, fields, text):
    with pytest.raises(opt.HyperParameterError) as raised:
        make(**fields)
    assert f"{make.__name__}: {text}" in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"eta": -1}, opt.HyperParameterError, "field 'eta' must be a finite number >= 0"),
        ({"mu": 1.0}, opt.HyperParameterError, "field 'mu' must be in [0, 1)"),
        ({"momentum": "heavy"}, opt.HyperParameterError, "field 'momentum' must be one of 'ema', 'ema_debiased', 'classic'"),
        ({"opt": 3e-4}, opt.RuleError, "field 'opt' must be a rule; got 0.0003"),
        ({"fallback": True}, opt.HyperParameterError, "field 'fallback' must be None or a predicate on the array; got True"),
        ({"lr": 0.1}, opt.UnknownFieldError, "Muon has no field 'lr'; did you mean 'eta'?"),
        ({"weight_decay": 0.1}, opt.UnknownFieldError, "Muon has no field 'weight_decay'; did you mean 'lambda_'?"),
        ({"ns_steps": 5}, opt.UnknownFieldError, "Muon has no field 'ns_steps'; did you mean 'ns'?"),
    ],
)
def test_bad_fields_of_muon(fields, error, text):
    with pytest.raises(error) as raised:
        opt.Muon(**fields)
    assert text in str(raised.value)


@pytest.mark.parametrize("preset", TRANSCRIBED)
def test_a_rule_evaluates_back(preset):
    rule = opt.Muon.preset(preset)
    if rule.fallback is None:
        assert eval(repr(rule), vars(opt)) == rule
    assert hash(rule) == hash(opt.Muon.preset(preset))
