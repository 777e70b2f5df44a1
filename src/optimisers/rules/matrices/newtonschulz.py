"""The matrix sign by odd polynomials: Newton-Schulz iterations with tuned coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...arrays import (
    HALF,
    Array,
    add_identity,
    add_matmul,
    as_dtype_name,
    can_read,
    cast_to,
    copied,
    dtype_name,
    gram,
    is_complex,
    is_inexact,
    is_number,
    kind,
    matrix_norm,
    maximum,
    on_cpu,
    quick_in_bfloat16,
    sqrt,
    symmetric_matmul,
    where,
    without_autocast,
    working_dtype,
)
from ...errors import ArgumentError, HyperParameterError, brief
from .._fields import real, whole

Triple = tuple[float, float, float]

JORDAN: Triple = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: one triple for all steps, steepest at zero."""

YOU: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Jiacheng You's five steps for modded-nanogpt: a narrower band than Jordan's."""

POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Amsel et al. 2025, https://arxiv.org/abs/2505.16932: the optimal polynomials in turn; the last one for ever after."""

_GRAM_FROM = 64  # the shortest side for which iterating on the Gram matrix was found quicker

_MOST_STEPS = 1000  # far beyond any use; files set this field, and a step costs time

# By how much a block of steps may amplify the rounding of its Gram matrix: (in half precision, else).
_AMPLIFICATION = (60.0, 250.0)


@dataclass(frozen=True)
class NewtonSchulz:
    """How a matrix is orthogonalised: ``X <- a X + b (X X^T) X + c (X X^T)^2 X``, from X divided by its Frobenius norm.

    Args:
        steps: number of steps, from 1 to 1,000.
        coefficients: ``"jordan"`` (any number of steps), ``"you"`` (five steps), ``"polar_express"`` (any number), or explicit
            triples (a, b, c), one for each step, used as they are; ``steps`` then is their number.
        epsilon: against division by zero, >= 0.
        normaliser: ``"add"`` divides by norm + epsilon, ``"clamp"`` by max(norm, epsilon).
        safety: factor >= 1 on the norm, against rounding that lifts a singular value above 1; ``"polar_express"`` then takes
            its polynomials at ``x / safety``, all but the last of its table of eight. None: 1.01 for ``"polar_express"``,
            else 1.
        dtype: dtype to compute in. None: bfloat16 for float32 and half precision where the device is quick at it, else the
            array's own (float32 for half precision).

    """

    steps: int = 5
    coefficients: str | tuple[Triple, ...] = "jordan"
    epsilon: float = 1e-7
    normaliser: str = "add"
    safety: float | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.coefficients, str):
            try:
                triples = tuple(tuple(float(v) for v in triple) for triple in self.coefficients)
            except (TypeError, ValueError, OverflowError):
                triples = ()
            if not triples or any(len(t) != 3 or not all(map(math.isfinite, t)) for t in triples):
                _refuse("coefficients", self.coefficients, "triples (a, b, c) of finite numbers, one for each step")
            if self.steps not in {5, len(triples)}:
                _refuse("steps", self.steps, f"the number of explicit coefficients, {len(triples)}")
            object.__setattr__(self, "coefficients", triples)
            object.__setattr__(self, "steps", len(triples))
        elif self.coefficients not in {"jordan", "you", "polar_express"}:
            _refuse("coefficients", self.coefficients, "'jordan', 'you', 'polar_express' or triples (a, b, c)")
        steps = whole(self.steps, 1)
        if steps is None:
            _refuse("steps", self.steps, "a whole number >= 1")
        if steps is not None and steps > _MOST_STEPS:
            _refuse("steps", self.steps, f"at most {_MOST_STEPS}")
        object.__setattr__(self, "steps", steps)
        if self.coefficients == "you" and self.steps != len(YOU):
            _refuse("steps", self.steps, "5 for coefficients='you', which are made for five steps")
        if real(self.epsilon, 0) is None:
            _refuse("epsilon", self.epsilon, "a finite number >= 0")
        if self.normaliser not in {"add", "clamp"}:
            _refuse("normaliser", self.normaliser, "'add' or 'clamp'")
        if self.safety is not None and real(self.safety, 1) is None:
            _refuse("safety", self.safety, "None or a number >= 1")
        for name in ("epsilon", "safety"):
            object.__setattr__(self, name, real(getattr(self, name)))
        if self.dtype is not None:
            try:
                object.__setattr__(self, "dtype", as_dtype_name(self.dtype))
            except ValueError as error:
                _refuse("dtype", self.dtype, f"None or a real floating dtype ({error})")

    @property
    def safety_factor(self) -> float:
        """The factor on the norm."""
        if self.safety is not None:
            return self.safety
        return 1.01 if self.coefficients == "polar_express" else 1.0

    def triples(self) -> tuple[Triple, ...]:
        """The coefficients (a, b, c) of each step, safety included."""
        if self.coefficients == "jordan":
            return (JORDAN,) * self.steps
        if self.coefficients == "you":
            return YOU
        if self.coefficients == "polar_express":
            f, last = self.safety_factor, POLAR_EXPRESS[-1]
            shrunk = [(a / f, b / f**3, c / f**5) for a, b, c in POLAR_EXPRESS[:-1]]
            return tuple([*shrunk, *[last] * (self.steps - len(shrunk))][: self.steps])
        return self.coefficients  # type: ignore[return-value]


def _refuse(name: str, value: Any, expected: str) -> None:
    msg = f"NewtonSchulz: field {name!r} must be {expected}; got {brief(value)}"
    raise HyperParameterError(msg)


def orthogonalise(x: Array, ns: NewtonSchulz = NewtonSchulz()) -> Array:
    """Each matrix of x with its singular values moved towards 1, its singular vectors kept.

    Args:
        x: real array of shape (..., rows, columns); leading dimensions stack matrices, each treated on its own. Zero matrices
            stay zero. The result has x's shape and dtype.
        ns: the iteration. Five steps take normalised singular values in [0.01, 1] to [0.68, 1.13] (``"jordan"``),
            [0.98, 1.03] (``"you"``) or [0.87, 1.12] (``"polar_express"``).

    Differentiable over torch. Long matrices are iterated through their Gram matrix, which is algebraically the same.
    ``torch.autocast`` has no effect on it.

    Raises ArgumentError for complex or integer arrays and for fewer than two dimensions.
    """
    if kind(x) is None or not is_inexact(x) or is_complex(x) or len(x.shape) < 2:
        got = f"shape {tuple(x.shape)} and dtype {dtype_name(x)}" if kind(x) else type(x).__name__
        msg = f"orthogonalise: expected a real floating point array of shape (..., rows, columns), got {got}"
        raise ArgumentError(msg)
    with without_autocast():
        return sign_times(1.0, x, ns)


def sign_times(scale: Any, x: Array, ns: NewtonSchulz) -> Array:
    """``scale * orthogonalise(x, ns)`` for an x that was checked; a plain number is put into the last polynomial."""
    if 0 in x.shape:
        return x
    own, shape = dtype_name(x), x.shape
    y = cast_to(x, working_dtype(own))
    if len(shape) > 3:
        y = y.reshape((-1, *shape[-2:]))
    tall = shape[-2] > shape[-1]
    y = y.mT if tall else y
    start = _start(y, ns, _compute_dtype(x, ns))
    triples = ns.triples()
    if is_number(scale) and dtype_name(y) == own:
        a, b, c = triples[-1]
        triples, scale = (*triples[:-1], (scale * a, scale * b, scale * c)), None
    short, long = start.x.shape[-2:]
    # Counting products, 1.5 times the short side is long enough; the rest is overhead. Measured on a CPU in float32.
    enough = 1.5 * short + 96 if on_cpu(start.x) else 2.5 * short
    iterate = _by_gram if short >= _GRAM_FROM and long >= enough else _plain
    y = iterate(start, triples)
    y = cast_to(y.mT if tall else y, own)
    return (y if scale is None else scale * y).reshape(shape)


# Sums of squares that are so large or small can be had in this dtype, and 1 / norm too.
_SAFE = {"float32": (1e-24, 1e24), "float64": (1e-200, 1e200)}


class Start(NamedTuple):
    """What the iteration begins with: ``factor * x`` (None: x as it is), and the Gram matrix of that if it is known."""

    x: Array
    factor: Array | None = None
    g: Array | None = None


def _start(x: Array, ns: NewtonSchulz, dtype: str) -> Start:
    """x divided by its norm, in the dtype to compute in.

    The Gram matrix has the norm in it, and the first product of the iteration can divide by it, which saves going over x. But
    a Gram matrix over- and underflows where x does not, so it is looked at; where that would have to wait for a device, or
    cannot be, the norm is taken from x itself.
    """
    own = dtype_name(x)
    if own == dtype and on_cpu(x) and can_read(x):
        g, squares = gram(x)
        low, high = _SAFE[own]
        if bool(((squares > low) & (squares < high)).all()):
            factor = cast_to(1 / _bound(sqrt(squares), ns), own)
            return Start(x, factor, g * (factor * factor))
    bound = _bound(matrix_norm(x), ns)  # in float64, where no finite float32 matrix over- or underflows
    if own == "float64":
        return Start(cast_to(x / bound, dtype))
    root = cast_to(1 / sqrt(bound), own)  # in two factors, since 1 / bound may be no float32
    return Start(cast_to(x * root * root, dtype))


def _bound(size: Array, ns: NewtonSchulz) -> Array:
    """What matrices of this norm are divided by."""
    bound = size * ns.safety_factor
    bound = bound + ns.epsilon if ns.normaliser == "add" else maximum(bound, ns.epsilon)
    return where(bound == 0, 1.0, bound)  # a zero matrix, and epsilon 0


def travelling_dtype(x: Array, ns: NewtonSchulz) -> str:
    """The dtype in which x may travel to where it is orthogonalised, and come back: a narrower one of the iteration."""
    own, computed = dtype_name(x), _compute_dtype(x, ns)
    return computed if computed in HALF else own


def _compute_dtype(x: Array, ns: NewtonSchulz) -> str:
    if ns.dtype is not None:
        return ns.dtype
    own = working_dtype(dtype_name(x))
    return "bfloat16" if own == "float32" and quick_in_bfloat16(x) else own


def _plain(start: Start, triples: tuple[Triple, ...]) -> Array:
    """The iteration as written, for x of shape (..., short, long)."""
    x, factor, g = start
    for a, b, c in triples:
        g = symmetric_matmul(x, x.mT) if g is None else g
        s = add_matmul(g, g, g, b, c, symmetric=True)
        # With a on the diagonal one product is all; in half precision it would round what is added to it.
        x = add_matmul(x, s, x, a, 1.0) if dtype_name(x) in HALF else _times(add_identity(s, a), factor) @ x
        factor = g = None
    return x


def _times(p: Array, factor: Array | None) -> Array:
    return p if factor is None else p * factor


def _by_gram(start: Start, triples: tuple[Triple, ...]) -> Array:
    """The same on the (short, short) side: Q = p_k(G_k) ... p_1(G_1) with G_{i+1} = p_i(G_i) G_i p_i(G_i), and then Q X.

    All of these are polynomials in G_1 = X X^T: they commute, and every product of them is symmetric. Rounding leaves G_1
    with eigenvalues slightly off, and the steps amplify that, so it is made anew from X after every block of steps (Zhang,
    Amsel, Chen & Dao 2026).
    """
    x, factor, g = start
    half = dtype_name(x) in HALF
    for block in _blocks(triples, _AMPLIFICATION[0] if half else _AMPLIFICATION[1]):
        g = symmetric_matmul(x, x.mT) if g is None else g
        q = None
        for k, (a, b, c) in enumerate(block, 1):
            s = add_matmul(g, g, g, b, c, symmetric=True)
            if half:  # what is added to the diagonal would be rounded
                q = add_identity(copied(s), a) if q is None else _sum_times(s, a, q)
                g = _sum_times(s, a, _sum_times(s, a, g)) if k < len(block) else g
            else:
                p = add_identity(s, a)
                q = p if q is None else symmetric_matmul(p, q)
                g = symmetric_matmul(p, symmetric_matmul(p, g)) if k < len(block) else g
        x = _times(q, factor) @ x
        factor = g = None
    return x


def _sum_times(s: Array, a: float, g: Array) -> Array:
    """``(s + a I) g`` of matrices that commute."""
    return add_matmul(g, s, g, a, 1.0, symmetric=True)


def _blocks(triples: tuple[Triple, ...], limit: float) -> list[list[Triple]]:
    """The steps in blocks that share one Gram matrix, each as long as it amplifies that matrix's rounding by at most limit.

    A small singular value grows by q(e) = (a_1 + b_1 e) (a_2 + b_2 a_1^2 e) ..., where e is the rounding in its place of the
    Gram matrix. The amplification is q'(0) / q(0).
    """
    blocks: list[list[Triple]] = []
    error = growth = 0.0
    for a, b, c in triples:
        more = abs(b / a) if a else math.inf
        if blocks and error + growth * more <= limit:
            blocks[-1].append((a, b, c))
        else:
            blocks.append([(a, b, c)])
            error, growth = 0.0, 1.0
        error, growth = error + growth * more, growth * a * a
    return blocks
