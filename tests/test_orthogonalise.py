"""opt.orthogonalise: its singular values against the scalar iteration, its routes against each other, its edges."""

import math

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from optimisers.arrays import _matrices, add_matmul, quick_in_bfloat16, symmetric_matmul
from optimisers.rules.matrices import newtonschulz
from optimisers.rules.matrices.newtonschulz import JORDAN, POLAR_EXPRESS, YOU, Start, _by_gram, _plain

both_kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])

NS = opt.NewtonSchulz
FAMILIES = {
    "jordan": NS(),
    "jordan-1": NS(steps=1),
    "jordan-7": NS(steps=7),
    "jordan-safety": NS(safety=1.3),
    "jordan-clamp": NS(normaliser="clamp"),
    "jordan-epsilon": NS(epsilon=0.5),
    "jordan-clamp-large": NS(epsilon=50.0, normaliser="clamp"),
    "you": NS(coefficients="you"),
    "polar_express-3": NS(3, "polar_express"),
    "polar_express-5": NS(coefficients="polar_express"),
    "polar_express-8": NS(8, "polar_express"),
    "polar_express-12": NS(12, "polar_express"),
    "polar_express-safety": NS(6, "polar_express", safety=1.1),
    "explicit": NS(coefficients=((3.0, -3.2, 1.2), (1.5, -0.5, 0.0))),
}
families = pytest.mark.parametrize("ns", FAMILIES.values(), ids=FAMILIES.keys())


def triples(ns):
    """The coefficients of each step, written out once more."""
    if ns.coefficients == "jordan":
        return [JORDAN] * ns.steps
    if ns.coefficients == "you":
        return list(YOU)
    if ns.coefficients == "polar_express":
        f = 1.01 if ns.safety is None else ns.safety
        table = [(a / f, b / f**3, c / f**5) for a, b, c in POLAR_EXPRESS[:7]]
        return [table[k] if k < 7 else (1.875, -1.25, 0.375) for k in range(ns.steps)]
    return list(ns.coefficients)


def scalar_iteration(s, ns):
    """What the iteration does to singular values, unsorted."""
    norm = math.sqrt(float((s**2).sum()))
    factor = ns.safety if ns.safety is not None else 1.01 if ns.coefficients == "polar_express" else 1.0
    s = s / (norm * factor + ns.epsilon if ns.normaliser == "add" else max(norm * factor, ns.epsilon))
    for a, b, c in triples(ns):
        s = a * s + b * s**3 + c * s**5
    return s


def orthonormal(rows, columns, rng):
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def with_singular_values(s, rows, columns, seed=0):
    """(matrix, left, right) with these singular values."""
    rng = np.random.default_rng(seed)
    left, right = orthonormal(rows, len(s), rng), orthonormal(columns, len(s), rng)
    return (left * s) @ right.T, left, right


def unit_spectrum(lowest, count):
    """Singular values from lowest up whose squares add up to 1."""
    s = np.geomspace(lowest, 0.3 / math.sqrt(count), count - 1)
    return np.append(s, math.sqrt(1 - (s**2).sum()))


# --- singular values ----------------------------------------------------------------------------------------------------


@both_kinds
@families
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (3, 8), (64, 200), (201, 64)])
def test_singular_values_follow_the_scalar_iteration(kind, ns, condition, shape):
    count = min(shape)
    s = 20 * np.geomspace(1, 1 / condition, count)
    x, left, right = with_singular_values(s, *shape)
    expected = scalar_iteration(s, ns)
    y = numpy_of(opt.orthogonalise(made(x, kind), ns))
    np.testing.assert_allclose(np.linalg.svd(y, compute_uv=False), np.sort(np.abs(expected))[::-1], rtol=0, atol=1e-6)
    # and the singular vectors are kept
    np.testing.assert_allclose(y, (left * expected) @ right.T, rtol=0, atol=1e-6)


BANDS = [
    (NS(), 1e-2, 0.682, 1.134),
    (NS(), 1e-3, 0.471, 1.202),
    (NS(coefficients="you"), 1e-2, 0.978, 1.032),
    (NS(coefficients="you"), 1e-3, 0.475, 1.145),
    (NS(coefficients="polar_express"), 1e-2, 0.87, 1.124),
    (NS(coefficients="polar_express"), 1e-3, 0.84, 1.124),
    (NS(coefficients="polar_express", safety=1.02), 1e-2, 0.859, 1.141),
    (NS(8, "polar_express"), 1e-2, 0.9995, 1.0005),
    (NS(8, "polar_express"), 1e-3, 0.9995, 1.0005),
]


@pytest.mark.parametrize(("ns", "lowest", "low", "high"), BANDS)
@pytest.mark.parametrize("shape", [(40, 48), (64, 200)])
def test_singular_values_lie_in_the_published_bands(ns, lowest, low, high, shape):
    x, _, _ = with_singular_values(5 * unit_spectrum(lowest, shape[0]), *shape)
    s = np.linalg.svd(opt.orthogonalise(x, ns), compute_uv=False)
    # 1e-3 is half a unit in the last place that was published.
    assert low - 1e-3 < s.min()
    assert s.max() < high + 1e-3


# --- stacks, transposes, routes -----------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 4, 6), (3, 64, 200), (2, 2, 64, 192), (0, 4, 4), (2, 1, 5)])
def test_a_stack_is_orthogonalised_one_by_one(kind, dtype, shape):
    # Matrices of very different size: one that leaked into another would show.
    x = np.random.default_rng(1).normal(size=shape)
    x *= 10.0 ** np.arange(-3, math.prod(shape[:-2]) - 3).reshape((*shape[:-2], 1, 1))
    x = x.astype(dtype)
    together = numpy_of(opt.orthogonalise(made(x, kind)))
    flat = x.reshape((-1, *shape[-2:]))
    alone = [numpy_of(opt.orthogonalise(made(matrix, kind))) for matrix in flat]
    expected = np.stack(alone).reshape(shape) if alone else x
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-12 if dtype == "float64" else 2e-5)
    assert together.dtype == x.dtype


@both_kinds
@families
@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (64, 200)])
def test_a_transposed_matrix_gives_the_transpose(kind, ns, shape):
    x = np.random.default_rng(2).normal(size=shape)
    y, z = (numpy_of(opt.orthogonalise(made(np.ascontiguousarray(each), kind), ns)) for each in (x, x.T))
    np.testing.assert_allclose(y, z.T, rtol=0, atol=1e-11)


# Both routes round X X^T to a few eps of its largest eigenvalue, at most 1. A block of steps takes that to at most 250 times as
# much in the worst singular direction, whose singular value is about 1 in the end: 250 * 2**-24 = 1.5e-5 in float32, times
# the few; and 1 / sqrt(long) of it in an element.
ROUTES = {"float64": 1e-13, "float32": 1e-5}


@both_kinds
@families
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("lowest", [None, 1e-2])
@pytest.mark.parametrize("shape", [(64, 96), (2, 64, 256)])
def test_the_gram_route_agrees_with_the_plain_one(kind, ns, dtype, shape, lowest):
    x = np.random.default_rng(3).normal(size=shape)
    if lowest is not None:
        s = np.geomspace(1, lowest, shape[-2])
        x = np.stack([with_singular_values(s, *shape[-2:], seed=i)[0] for i in range(math.prod(shape[:-2]))]).reshape(shape)
    x /= 1.01 * np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = made(x.astype(dtype), kind)
    by_gram, plain = numpy_of(_by_gram(Start(x), ns.triples())), numpy_of(_plain(Start(x), ns.triples()))
    np.testing.assert_allclose(by_gram, plain, rtol=0, atol=ROUTES[dtype])


@pytest.mark.parametrize(
    ("shape", "route"),
    [
        ((64, 192), "gram"),
        ((192, 64), "gram"),
        ((64, 191), "plain"),
        ((63, 630), "plain"),
        ((512, 864), "gram"),
        ((64, 64), "plain"),
    ],
)
def test_the_route_is_chosen_by_shape(shape, route, monkeypatch):
    taken = []
    for name in ("_plain", "_by_gram"):
        monkeypatch.setattr(newtonschulz, name, lambda start, triples, name=name: taken.append(name) or start.x)
    opt.orthogonalise(np.ones(shape))
    assert taken == ["_by_gram" if route == "gram" else "_plain"]


@both_kinds
@families
@pytest.mark.parametrize("lowest", [1e-4, 1e-6])
def test_the_gram_route_rounds_ill_conditioned_matrices_little_more_than_the_plain_one(kind, ns, lowest):
    # There two float32 runs of the plain iteration differ as much.
    x, _, _ = with_singular_values(unit_spectrum(lowest, 64), 64, 160)
    x = x.astype("float32")
    exact = _plain(Start(x.astype("float64")), ns.triples())
    by_gram, plain = (np.abs(numpy_of(route(Start(made(x, kind)), ns.triples())) - exact).max() for route in (_by_gram, _plain))
    assert by_gram < 3 * plain + 2e-6


def test_blocks_share_a_gram_matrix_as_long_as_its_rounding_stays_small():
    def lengths(ns, limit):
        return [len(block) for block in newtonschulz._blocks(ns.triples(), limit)]

    assert lengths(NS(), 250) == [3, 2]
    assert lengths(NS(), 60) == [2, 2, 1]
    assert lengths(NS(coefficients="you"), 250) == [2, 3]
    assert lengths(NS(8, "polar_express"), 250) == [2, 3, 3]
    assert lengths(NS(coefficients=((0.0, 1.0, 0.0),) * 3), 250) == [1, 1, 1]
    for ns in FAMILIES.values():
        assert [t for block in newtonschulz._blocks(ns.triples(), 250) for t in block] == list(ns.triples())
        for block in newtonschulz._blocks(ns.triples(), 250):  # against q'(0) / q(0), by differences
            h, q = 1e-9, 1.0
            e = h
            for a, b, c in block:
                p = a + b * e + c * e * e
                q, e = q * p / a, e * p * p
            assert len(block) == 1 or abs(q - 1) / h < 250 * 1.001


@both_kinds
@pytest.mark.parametrize("shape", [(7, 12), (2, 9, 5)])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_symmetric_product_from_its_upper_half(kind, shape, parts, monkeypatch):
    rng = np.random.default_rng(0)
    x = made(rng.normal(size=shape), kind)
    expected = numpy_of(x @ x.mT)
    monkeypatch.setattr(_matrices, "_parts", lambda x, **_: parts)
    g = symmetric_matmul(x, x.mT)
    np.testing.assert_allclose(numpy_of(g), expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(numpy_of(g), numpy_of(g.mT))
    both = numpy_of(add_matmul(g, g, g, 0.5, -2.0, symmetric=True))
    np.testing.assert_allclose(both, 0.5 * expected - 2 * expected @ expected, rtol=0, atol=1e-11)
    monkeypatch.setattr(newtonschulz, "_GRAM_FROM", 1)
    whole = opt.orthogonalise(x)
    monkeypatch.undo()
    np.testing.assert_allclose(numpy_of(whole), numpy_of(opt.orthogonalise(x)), rtol=0, atol=1e-12)


def test_large_matrices_on_a_cpu_leave_out_half_of_their_symmetric_products():
    assert _matrices._parts(torch.empty(384, 1536)) == 2
    assert _matrices._parts(torch.empty(1024, 1024)) == 4
    assert _matrices._parts(torch.empty(384, 384)) == 1
    assert _matrices._parts(torch.empty(1024, 1024, device="meta")) == 1
    assert _matrices._parts(np.empty((1024, 1024))) == 1
    assert _matrices._parts(torch.empty(384, 384), written=True) == 4
    assert _matrices._parts(torch.empty(128, 384), written=True) == 1
    x = torch.randn(600, 640, generator=torch.Generator().manual_seed(0))
    y, expected = opt.orthogonalise(x), opt.orthogonalise(x.numpy())
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-5)


def test_the_gram_route_is_stable_in_half_precision():
    # bfloat16 has 2**-9 for eps, so only the band can be asked for: 3 % beside the one of exact arithmetic, and the
    # singular values that rounding drowns (below 2**-9) anywhere between 0 and its top.
    x, _, _ = with_singular_values(unit_spectrum(3e-2, 64), 64, 256)
    for ns in (NS(dtype="bfloat16"), NS(coefficients="polar_express", dtype="bfloat16")):
        y = opt.orthogonalise(torch.from_numpy(x).float(), ns)
        assert y.dtype == torch.float32
        s = torch.linalg.svdvals(y)
        assert s.max() < 1.2 * 1.03
        assert s.min() > 0.68 * 0.97


# --- edges --------------------------------------------------------------------------------------------------------------

DTYPES = [("numpy", "float16"), ("numpy", "float32"), ("numpy", "float64")]
DTYPES += [("torch", name) for name in ("float16", "bfloat16", "float32", "float64")]
dtypes = pytest.mark.parametrize(("kind", "dtype"), DTYPES)
EDGES = [
    NS(),
    NS(normaliser="clamp"),
    NS(8, "polar_express"),
    NS(coefficients="you", epsilon=0),
    NS(epsilon=0, normaliser="clamp"),
]


def as_dtype(x, kind, dtype):
    return torch.from_numpy(x).to(getattr(torch, dtype)) if kind == "torch" else x.astype(dtype)


def as_float64(x):
    return x.double().numpy() if isinstance(x, torch.Tensor) else x.astype("float64")


def extreme(dtype):
    """(tiny, huge): the smallest positive number of the dtype, and near its greatest (in float64 the norm must be finite)."""
    info = torch.finfo(getattr(torch, dtype))
    return info.smallest_normal * info.eps, info.max / (1e3 if dtype == "float64" else 4)


@dtypes
@pytest.mark.parametrize("ns", EDGES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 3), (3, 8), (64, 200), (2, 4, 4)])
def test_nothing_turns_into_nan_or_infinity(kind, dtype, ns, shape):
    random = np.random.default_rng(4).normal(size=shape)
    low = random[..., :1] * random[..., :1, :]  # rank 1
    tiny, huge = extreme(dtype)
    inputs = {"zero": 0 * random, "rank 1": low, "one entry": np.zeros(shape), "random": random}
    inputs["one entry"][..., 0, 0] = 1.0
    inputs |= {f"{name} tiny": np.sign(random) * tiny for name in ("random",)}
    inputs |= {f"{name} huge": np.clip(inputs[name], -1, 1) * huge for name in ("random", "rank 1", "one entry")}
    for name, given in inputs.items():
        x = as_dtype(given, kind, dtype)
        y = opt.orthogonalise(x, ns)
        assert y.dtype == x.dtype
        assert tuple(y.shape) == shape
        y = as_float64(y)
        assert np.isfinite(y).all(), name
        assert np.abs(y).max() < 1.3, name
        if name == "zero":
            assert (y == 0).all()
        elif not name.endswith("tiny") or ns.epsilon == 0:
            # The largest singular value of rank 1 input is 1, and goes to the iteration's image of 1, about 1.
            assert np.linalg.norm(y, 2, axis=(-2, -1)).min() > 0.6, name


@both_kinds
def test_its_argument_is_left_alone_and_strides_do_not_matter(kind):
    x = np.random.default_rng(5).normal(size=(6, 8))
    x = made(x, kind)
    before = numpy_of(x).copy()
    y = numpy_of(opt.orthogonalise(x))
    np.testing.assert_array_equal(numpy_of(x), before)
    view = x[::2, 1:]
    np.testing.assert_allclose(
        numpy_of(opt.orthogonalise(view)), numpy_of(opt.orthogonalise(made(numpy_of(view), kind))), rtol=0, atol=1e-13
    )
    assert y.shape == (6, 8)


@both_kinds
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 4)])
def test_empty(kind, shape):
    assert tuple(opt.orthogonalise(made(np.zeros(shape), kind)).shape) == shape


def test_half_precision_is_computed_in_float32_and_rounded_once():
    x = np.random.default_rng(6).normal(size=(6, 9)).astype("float16")
    expected = opt.orthogonalise(x.astype("float32")).astype("float16")
    np.testing.assert_array_equal(opt.orthogonalise(x), expected)
    half = torch.from_numpy(x).bfloat16()
    assert torch.equal(opt.orthogonalise(half), opt.orthogonalise(half.float()).bfloat16())


def test_bfloat16_is_never_computed_in_on_a_cpu(monkeypatch):
    assert not quick_in_bfloat16(torch.ones(1))
    seen = set()

    def watch(start, triples):
        seen.add(str(start.x.dtype).removeprefix("torch."))
        return start.x

    monkeypatch.setattr(newtonschulz, "_plain", watch)
    monkeypatch.setattr(newtonschulz, "_by_gram", watch)
    for kind, dtype in DTYPES:
        for shape in ((4, 4), (64, 200)):
            opt.orthogonalise(as_dtype(np.ones(shape), kind, dtype))
    assert seen == {"float32", "float64"}
    seen.clear()
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        opt.orthogonalise(torch.ones(3, 3), NS(dtype=dtype))
        assert seen == {dtype}
        seen.clear()


# --- derivatives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ns", [NS(), NS(3, "polar_express"), NS(2, ((3.0, -3.2, 1.2), (1.5, -0.5, 0.0)), 0.3, "clamp")])
@pytest.mark.parametrize("shape", [(3, 4), (4, 2), (2, 2, 3), (1, 3)])
def test_derivatives(ns, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: opt.orthogonalise(x, ns), (x,))
    assert torch.autograd.gradgradcheck(lambda x: opt.orthogonalise(x, ns), (x,))


def test_derivative_of_the_gram_route():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 200, dtype=torch.float64, generator=generator, requires_grad=True)
    direction = torch.randn(64, 200, dtype=torch.float64, generator=generator)
    weights = torch.randn(64, 200, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad((weights * opt.orthogonalise(x)).sum(), x)
    h = 1e-5
    with torch.no_grad():
        up, down = ((weights * opt.orthogonalise(x + s * h * direction)).sum() for s in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-6)


def test_derivative_at_zero_is_finite():
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(opt.orthogonalise(x).sum(), x)
    assert gradient.isfinite().all()


def test_vmap():
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.func.vmap(opt.orthogonalise)(x), opt.orthogonalise(x))


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (np.ones((3, 3), "complex128"), r"shape \(3, 3\) and dtype complex128"),
        (torch.ones(3, 3, dtype=torch.complex64), r"shape \(3, 3\) and dtype complex64"),
        (np.ones((3, 3), "int64"), r"shape \(3, 3\) and dtype int64"),
        (torch.ones(3, 3, dtype=torch.int32), r"shape \(3, 3\) and dtype int32"),
        (np.ones(3), r"shape \(3,\) and dtype float64"),
        (torch.ones(()), r"shape \(\) and dtype float32"),
        ([[1.0, 2.0]], "list"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_real_matrix_is_refused(x, got):
    with pytest.raises(opt.ArgumentError, match=rf"orthogonalise: expected a real .*\(\.\.\., rows, columns\), got {got}"):
        opt.orthogonalise(x)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"steps": 0}, "field 'steps' must be a whole number >= 1; got 0"),
        ({"steps": 2.0}, "field 'steps' must be a whole number >= 1; got 2.0"),
        ({"steps": 1001}, "field 'steps' must be at most 1000; got 1001"),
        ({"steps": True}, "field 'steps' must be a whole number >= 1; got True"),
        ({"coefficients": "you", "steps": 4}, "field 'steps' must be 5 for coefficients='you'"),
        ({"coefficients": "newton"}, "field 'coefficients' must be 'jordan', 'you', 'polar_express' or triples"),
        ({"coefficients": ()}, "field 'coefficients' must be triples (a, b, c) of finite numbers"),
        ({"coefficients": ((1.0, 2.0),)}, "field 'coefficients' must be triples (a, b, c) of finite numbers"),
        ({"coefficients": ((1.0, 2.0, math.nan),)}, "field 'coefficients' must be triples (a, b, c) of finite numbers"),
        ({"coefficients": (1.0, 2.0, 3.0)}, "field 'coefficients' must be"),
        ({"coefficients": 3}, "field 'coefficients' must be"),
        ({"coefficients": (("a", "b", "c"),)}, "field 'coefficients' must be"),
        ({"coefficients": ((1.5, -0.5, 0.0),) * 2, "steps": 3}, "field 'steps' must be the number of explicit coefficients, 2"),
        ({"epsilon": -1e-8}, "field 'epsilon' must be a finite number >= 0; got -1e-08"),
        ({"epsilon": math.inf}, "field 'epsilon' must be a finite number >= 0; got inf"),
        ({"epsilon": "small"}, "field 'epsilon' must be a finite number >= 0; got 'small'"),
        ({"normaliser": "max"}, "field 'normaliser' must be 'add' or 'clamp'; got 'max'"),
        ({"safety": 0.9}, "field 'safety' must be None or a number >= 1; got 0.9"),
        ({"safety": math.nan}, "field 'safety' must be None or a number >= 1; got nan"),
        ({"dtype": "int8"}, "field 'dtype' must be None or a real floating dtype"),
    ],
)
def test_bad_fields_of_the_iteration(fields, text):
    with pytest.raises(opt.HyperParameterError) as raised:
        NS(**fields)
    assert text in str(raised.value)
    assert str(raised.value).startswith("NewtonSchulz: ")


@families
def test_the_iteration_is_a_value(ns):
    assert eval(repr(ns), {"NewtonSchulz": NS}) == ns
    assert hash(ns) == hash(NS(**vars(ns)))
    with pytest.raises(AttributeError):
        ns.steps = 3


def test_dtypes_are_named_alike():
    assert NS(dtype=torch.bfloat16) == NS(dtype="bfloat16")
    assert NS(dtype=np.float32) == NS(dtype="float32")


def test_numpy_has_no_bfloat16():
    with pytest.raises(opt.HyperParameterError, match="NumPy cannot compute in bfloat16"):
        opt.orthogonalise(np.ones((3, 3)), NS(dtype="bfloat16"))


# --- where the norm comes from -------------------------------------------------------------------------------------------


@both_kinds
@families
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 9, 4), (70, 300)])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_the_norm_in_the_gram_matrix_is_that_of_the_matrix(kind, ns, dtype, shape, size, monkeypatch):
    x = made((size * np.random.default_rng(4).normal(size=shape)).astype(dtype), kind)
    found = []
    start = newtonschulz._start
    monkeypatch.setattr(newtonschulz, "_start", lambda *args: found.append(start(*args)) or found[-1])
    quick = numpy_of(opt.orthogonalise(x, ns))
    assert found[-1].g is not None
    monkeypatch.setattr(newtonschulz, "can_read", lambda x: False)
    careful = numpy_of(opt.orthogonalise(x, ns))
    assert found[-1].g is None
    np.testing.assert_allclose(quick, careful, rtol=0, atol=ROUTES[dtype])


@both_kinds
@pytest.mark.parametrize("size", [1e-30, 1e-14, 1e14, 1e30])
def test_a_gram_matrix_that_may_over_or_underflow_is_not_used(kind, size, monkeypatch):
    x = np.random.default_rng(5).normal(size=(2, 4, 6))
    scaled = x.copy()
    scaled[1] *= size  # one matrix of the stack is enough
    found = []
    start = newtonschulz._start
    monkeypatch.setattr(newtonschulz, "_start", lambda *args: found.append(start(*args)) or found[-1])
    y = numpy_of(opt.orthogonalise(made(scaled.astype("float32"), kind), NS(epsilon=0.0)))
    assert found[-1].g is None
    np.testing.assert_allclose(y, opt.orthogonalise(x, NS(epsilon=0.0)), rtol=0, atol=1e-5)
