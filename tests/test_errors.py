"""Bad input: one table of calls, the error of each and its text. Nothing may have changed after any of them."""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers import (
    ArgumentError,
    ConsumedStateError,
    EntryError,
    GradientError,
    HyperParameterError,
    ImmutableError,
    ModelError,
    NonFiniteError,
    RuleError,
    SelectionError,
    StructureError,
    TieError,
    UnknownFieldError,
)

NUMPY, TORCH = ("numpy",), ("torch",)
BOTH = NUMPY + TORCH


class Pair(NamedTuple):
    a: Any
    b: Any


class Twin(NamedTuple):
    a: Any
    b: Any


class Box:
    """A class that no pytree library knows."""

    def __init__(self, **content):
        self.__dict__.update(content)


# --- rules that break the protocol ----------------------------------------------------------------------------------------


@dataclass
class Thawed(opt.AbstractRule):
    eta: float = 0.1

    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return state, dx


class Undecorated(opt.AbstractRule):
    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return state, dx


@dataclass(frozen=True)
class Summing(opt.AbstractRule):
    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return state, dx.sum()


@dataclass(frozen=True)
class Wordy(opt.AbstractRule):
    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return (dx, "a word"), dx


@dataclass(frozen=True)
class Numeric(opt.AbstractRule):
    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return state, 1.0


@dataclass(frozen=True)
class Forgetful(opt.AbstractRule):
    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return dx


@dataclass(frozen=True)
class WordyStart(opt.AbstractRule):
    def init(self, x):
        return "a word"

    def apply(self, state, x, dx):
        return state, dx


# --- what a case is given -------------------------------------------------------------------------------------------------


class World:
    """A library, a model with state and gradients, and an account of everything that must not change."""

    def __init__(self, library, verb="update"):
        self.library = library
        self.step = {"update": opt.update, "update_": opt.update_}[verb]
        self.watched = []
        self.model = {
            "layers": [{"weight": self.ones(3, 2), "bias": self.zeros(3)}],
            "pair": Pair(self.ones(2), self.ones(2)),
            "spread": (self.ones(2), self.ones(4)),
        }
        self.state = self.setup(opt.OptimiserChain(opt.Adam(), opt.ClipNorm(1.0)), self.model)

    def ones(self, *shape, dtype="float64"):
        if self.library == "numpy":
            return np.ones(shape, dtype)
        return torch.ones(shape, dtype=getattr(torch, dtype))

    def zeros(self, *shape):
        return 0 * self.ones(*shape)

    def other(self, *shape):
        """An array of the other library."""
        return torch.ones(shape, dtype=torch.float64) if self.library == "numpy" else np.ones(shape)

    def setup(self, rule, model, **options):
        """``setup``, with an account of the state and the model."""
        state = opt.setup(rule, model, **options)
        self.watched += [(state, frozen(state)), (model, frozen(model))]
        return state

    def grads(self, **changes):
        """Gradients for ``self.model`` with some entries replaced."""
        weight = changes.pop("weight", None)
        layer = {"weight": self.ones(3, 2) if weight is None else weight, "bias": self.ones(3)}
        grads = {"layers": [layer], "pair": Pair(*self.model["pair"]), "spread": self.model["spread"]}
        grads.update(changes)
        self.watched.append((grads, frozen(grads)))
        return grads

    def check(self):
        for value, before in self.watched:
            assert frozen(value) == before, "a call that raised has changed something"


def frozen(tree):
    """A tree as something to compare, arrays as dtype and bytes."""
    if isinstance(tree, opt.StateTree):
        return repr(tree), [frozen(leaf) for leaf in opt_leaves(tree)]
    if isinstance(tree, torch.nn.Module):
        return frozen(dict(tree.named_parameters()))
    if isinstance(tree, dict):
        return {key: frozen(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [frozen(value) for value in tree]
    if isinstance(tree, torch.Tensor) and tree.layout == torch.strided:
        tree = tree.detach().numpy()
    if isinstance(tree, np.ndarray):
        return str(tree.dtype), tree.shape, tree.tobytes()
    return repr(tree)


def opt_leaves(state):
    return [entry.state for entry in state._entries]


# --- the table ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A call that must raise. In its text ``...`` stands for anything, and ``<array>`` for the library's name of one."""

    name: str
    call: Callable[[World], Any]
    error: type
    text: str
    libraries: tuple[str, ...] = NUMPY
    verbs: tuple[str, ...] = ("update",)


def gradient(name, grads, error, text, libraries=BOTH):
    """A gradient tree that does not fit, for both verbs."""
    return Case(name, lambda w: w.step(w.state, w.model, grads(w)), error, text, libraries, verbs=("update", "update_"))


def stepping(name, call, error, text, libraries=BOTH):
    """A case for both verbs."""
    return Case(name, call, error, text, libraries, verbs=("update", "update_"))


def building(name, call, error, text):
    """A case without arrays."""
    return Case(name, lambda w: call(), error, text)


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def consumed(w, use):
    """Use a state that shares arrays with one that ``update_`` has consumed."""
    model = {"a": w.ones(2), "b": w.ones(2)}
    state = opt.setup(opt.Adam(), model)
    use(w, state, model, lambda s=state: opt.update_(s, model, {"a": w.ones(2), "b": None}))


def after_own_step(w, state, model, step):
    step()
    opt.update(state, model, None)


def after_adjusted_sibling(w, state, model, step):
    sibling = opt.adjust(state, 0.1)
    step()
    opt.update(sibling, model, None)


def after_step_of_sibling(w, state, model, step):
    step(opt.adjust(state, 0.1))
    opt.update_(state, model, None)


def after_frozen_sibling(w, state, model, step):
    sibling = opt.freeze(state, where="a")
    step()
    opt.thaw(sibling)


def unstepped_sibling_of_consumed(w):
    model = {"a": w.ones(2), "b": w.ones(2**14)}
    state = opt.setup(opt.Adam(), model)
    later, _ = opt.update(state, model, {"a": w.ones(2), "b": None})  # still shares b, which is too large to be copied
    opt.update_(state, model, None)
    opt.adjust(later, 0.1)


def sub_tree_of_consumed(w):
    model = {"inner": {"a": w.ones(2)}, "b": w.ones(2)}
    state = opt.setup(opt.Adam(), model)
    inner = state["inner"]
    opt.update_(state, model, None)
    inner["a"]


def bad_value_at_step_2(w, step):
    model = {"inner": {"w": w.ones(2)}}
    state = w.setup(opt.Scheduled(opt.Adam(), eta=lambda t: 0.1 - 0.06 * t), model)
    w.watched.clear()
    for _ in range(3):
        state, model = step(state, model, {"inner": {"w": w.ones(2)}})
        w.watched[:] = [(state, frozen(state)), (model, frozen(model))]


def tied(w):
    shared = w.ones(2, 2)
    return {"embed": shared, "head": shared}


def linear():
    return torch.nn.Linear(2, 1)


def sparse_parameter():
    return torch.eye(2).to_sparse()


def sparse_step(w):
    net = torch.nn.Embedding(4, 2, sparse=True)
    net(torch.tensor([1, 2])).sum().backward()
    opt.update_(w.setup(opt.Adam(), net), net)


def last_rebuilt(flat):
    return opt.destructure({"a": np.ones(2), "b": np.ones((2, 2))})[1](flat)


GROUPS_IN_CIRCLE = opt.Route(
    ("a", opt.OptimiserChain(opt.ClipGlobalNorm(group="x"), opt.ClipGlobalNorm(group="y"))),
    ("b", opt.OptimiserChain(opt.ClipGlobalNorm(group="y"), opt.ClipGlobalNorm(group="x"))),
)

CASES = [
    # The structure of gradients.
    gradient(
        "key missing",
        lambda w: without(w.grads(), "pair"),
        StructureError,
        "gradient at the root: lacks the key 'pair'. A gradient has the model's structure; put None where there is no gradient",
    ),
    gradient(
        "key extra",
        lambda w: w.grads(scale=w.ones(2)),
        StructureError,
        "gradient at the root: has the key 'scale', which the model does not have. A gradient has the "
        "model's structure; put None where there is no gradient",
    ),
    gradient(
        "keys missing and extra",
        lambda w: w.grads(layers=[{"weight": w.ones(3, 2), "bais": w.ones(3)}]),
        StructureError,
        "gradient at 'layers.0': lacks the key 'bias' and has the key 'bais', which the model does not "
        "have. A gradient has the model's structure; put None where there is no gradient",
    ),
    gradient(
        "array for a dict",
        lambda w: w.grads(layers=[w.ones(3, 2)]),
        StructureError,
        "gradient at 'layers.0': expected a dict with keys 'bias', 'weight', got a... of shape (3, 2). A "
        "gradient has the model's structure; put None where there is no gradient",
    ),
    gradient(
        "array for the whole",
        lambda w: w.ones(3, 2),
        StructureError,
        "gradient at the root: expected a dict with keys 'layers', 'pair', 'spread', got a... of shape "
        "(3, 2). A gradient has the model's structure; put None where there is no gradient",
    ),
    gradient(
        "dict for an array",
        lambda w: w.grads(weight={"x": w.ones(3, 2)}),
        StructureError,
        "gradient at 'layers.0.weight': expected a <array> of shape (3, 2) and floating dtype, got a "
        "dict; put an array here, or None",
    ),
    gradient(
        "list too long",
        lambda w: w.grads(layers=[None, None]),
        StructureError,
        "gradient at 'layers': expected a list of 1, got a list of 2. A gradient has the model's "
        "structure; put None where there is no gradient",
    ),
    gradient(
        "list for a tuple",
        lambda w: w.grads(spread=[w.ones(2), w.ones(4)]),
        StructureError,
        "gradient at 'spread': expected a tuple of 2, got a list of 2. A gradient has the model's "
        "structure; put None where there is no gradient",
    ),
    gradient(
        "tuple for a namedtuple",
        lambda w: w.grads(pair=(w.ones(2), w.ones(2))),
        StructureError,
        "gradient at 'pair': expected a Pair of 2, got a tuple of 2. A gradient has the model's structure. torch.autograd.grad "
        "gives a tuple, in the order of what it was asked for; make a Pair of it: Pair(*grads)",
    ),
    gradient(
        "namedtuple for a tuple",
        lambda w: w.grads(spread=Pair(w.ones(2), w.ones(4))),
        StructureError,
        "gradient at 'spread': expected a tuple of 2, got a Pair of 2. A gradient has the model's "
        "structure; put None where there is no gradient",
    ),
    gradient(
        "another namedtuple",
        lambda w: w.grads(pair=Twin(w.ones(2), w.ones(2))),
        StructureError,
        "gradient at 'pair': expected a Pair of 2, got a Twin of 2. A gradient has the model's "
        "structure; put None where there is no gradient",
    ),
    # Gradients that are no gradient of their array.
    gradient(
        "transposed",
        lambda w: w.grads(weight=w.ones(2, 3)),
        GradientError,
        "gradient at 'layers.0.weight': expected shape (3, 2), got (2, 3); it looks transposed. Gradients are never broadcast",
    ),
    gradient(
        "wrong shape",
        lambda w: w.grads(weight=w.ones(2)),
        GradientError,
        "gradient at 'layers.0.weight': expected shape (3, 2), got (2,). Gradients are never broadcast",
    ),
    gradient(
        "0-d for a matrix",
        lambda w: w.grads(weight=w.ones()),
        GradientError,
        "gradient at 'layers.0.weight': expected shape (3, 2), got (). Gradients are never broadcast",
    ),
    gradient(
        "shape deep in a namedtuple",
        lambda w: w.grads(pair=Pair(None, w.ones(3))),
        GradientError,
        "gradient at 'pair.b': expected shape (2,), got (3,). Gradients are never broadcast",
    ),
    gradient(
        "integers",
        lambda w: w.grads(weight=w.ones(3, 2, dtype="int64")),
        GradientError,
        "gradient at 'layers.0.weight': expected a <array> of shape (3, 2) and floating dtype, got dtype "
        "int64; cast it to float64 if it is meant",
    ),
    gradient(
        "bools",
        lambda w: w.grads(weight=w.ones(3, 2, dtype="bool")),
        GradientError,
        "gradient at 'layers.0.weight': expected a <array> of shape (3, 2) and floating dtype, got dtype "
        "bool; cast it to float64 if it is meant",
    ),
    gradient(
        "complex for real",
        lambda w: w.grads(weight=w.ones(3, 2, dtype="complex64")),
        GradientError,
        "gradient at 'layers.0.weight': expected a <array> of shape (3, 2) and floating dtype, got "
        "complex dtype complex64 for a float64 parameter; take its real part",
    ),
    gradient(
        "sparse COO",
        lambda w: w.grads(weight=w.ones(3, 2).to_sparse()),
        GradientError,
        "gradient at 'layers.0.weight': expected a torch tensor of shape (3, 2) and floating dtype, got "
        "a tensor of layout torch.sparse_coo; call .to_dense() on it, or build the layer with "
        "sparse=False",
        TORCH,
    ),
    gradient(
        "JAX array",
        lambda w: w.grads(weight=jnp.ones((3, 2))),
        GradientError,
        "gradient at 'layers.0.weight': expected a <array> of shape (3, 2) and floating dtype, got a "
        "jaxlib._jax.ArrayImpl. Convert it, or put None where there is no gradient",
    ),
    gradient(
        "list of numbers",
        lambda w: w.grads(pair=Pair([1.0, 1.0], None)),
        StructureError,
        "gradient at 'pair.a': expected a <array> of shape (2,) and floating dtype, got a list; put an array here, or None",
    ),
    gradient(
        "float",
        lambda w: w.grads(pair=Pair(1.0, None)),
        GradientError,
        "gradient at 'pair.a': expected a <array> of shape (2,) and floating dtype, got a float 1.0. "
        "Convert it, or put None where there is no gradient",
    ),
    gradient(
        "NumPy scalar",
        lambda w: w.grads(pair=Pair(np.float64(1.0), None)),
        GradientError,
        "gradient at 'pair.a': expected a <array> of shape (2,) and floating dtype, got a numpy.float64. "
        "Convert it, or put None where there is no gradient",
    ),
    gradient(
        "string",
        lambda w: w.grads(pair=Pair("none", None)),
        GradientError,
        "gradient at 'pair.a': expected a <array> of shape (2,) and floating dtype, got a str 'none'. "
        "Convert it, or put None where there is no gradient",
    ),
    gradient(
        "other library",
        lambda w: w.grads(weight=w.other(3, 2)),
        GradientError,
        "gradient at 'layers.0.weight': expected a <array> of shape (3, 2) and floating dtype, got a "
        "<other>: parameter and gradient must come from one library",
    ),
    stepping(
        "bare array, wrong shape",
        lambda w: w.step(w.setup(opt.Adam(), x := w.ones(2)), x, w.ones(3)),
        GradientError,
        "gradient at the root: expected shape (2,), got (3,). Gradients are never broadcast",
    ),
    # Values that are not finite: found late, and nothing was written.
    gradient(
        "NaN late in a chain",
        lambda w: w.grads(weight=w.ones(3, 2) * float("nan")),
        NonFiniteError,
        "ClipNorm at 'layers.0.weight': the 2-norm of its gradient is nan\nNothing was changed. Look at "
        "these gradients, skip the step, or set throw=False to let them through",
    ),
    gradient(
        "infinity in the last array",
        lambda w: w.grads(spread=(w.ones(2), w.ones(4) * float("inf"))),
        NonFiniteError,
        "ClipNorm at 'spread.1': the 2-norm of its gradient is nan\nNothing was changed. Look at these "
        "gradients, skip the step, or set throw=False to let them through",
    ),
    stepping(
        "NaN in a group",
        lambda w: w.step(
            w.setup(opt.OptimiserChain(opt.Adam(), opt.ClipGlobalNorm(1.0)), w.model),
            w.model,
            w.grads(weight=w.ones(3, 2) * float("nan")),
        ),
        NonFiniteError,
        "ClipGlobalNorm at 'layers.0.weight': the 2-norm of its gradient is nan\nNothing was changed. "
        "Look at these gradients, skip the step, or set throw=False to let them through",
    ),
    stepping(
        "NaN in two arrays",
        lambda w: w.step(w.state, w.model, w.grads(pair=Pair(w.ones(2) * float("nan"), w.ones(2) * float("inf")))),
        NonFiniteError,
        "ClipNorm at 'pair.a': the 2-norm of its gradient is nan\nClipNorm at 'pair.b': the 2-norm of its "
        "gradient is nan\nNothing was changed. Look at these gradients, skip the step, or set throw=False "
        "to let them through",
    ),
    building(
        "NaN for one array",
        lambda: opt.ClipNorm().apply(None, np.ones(2), np.ones(2) * np.nan),
        NonFiniteError,
        "ClipNorm: the 2-norm of its gradient is nan. Set throw=False to let it through",
    ),
    # Fields of rules.
    building(
        "lr",
        lambda: opt.Adam(lr=0.1),
        UnknownFieldError,
        "Adam has no field 'lr'; did you mean 'eta'? Its fields are: eta, beta, epsilon",
    ),
    building(
        "betas",
        lambda: opt.Adam(betas=(0.9, 0.999)),
        UnknownFieldError,
        "Adam has no field 'betas'; did you mean 'beta'? Its fields are: eta, beta, epsilon",
    ),
    building(
        "eps",
        lambda: opt.AdamW(eps=1e-8),
        UnknownFieldError,
        "AdamW has no field 'eps'; did you mean 'epsilon'? Its fields are: eta, beta, lambda_, epsilon, couple",
    ),
    building(
        "weight_decay",
        lambda: opt.AdamW(weight_decay=0.1),
        UnknownFieldError,
        "AdamW has no field 'weight_decay'; did you mean 'lambda_'? Its fields are: eta, beta, lambda_, epsilon, couple",
    ),
    building(
        "weight_decay of a rule without it",
        lambda: opt.Adam(weight_decay=0.1),
        UnknownFieldError,
        "Adam has no field 'weight_decay'. Its fields are: eta, beta, epsilon",
    ),
    building(
        "momentum",
        lambda: opt.Momentum(momentum=0.9),
        UnknownFieldError,
        "Momentum has no field 'momentum'; did you mean 'rho'? Its fields are: eta, rho",
    ),
    building(
        "a slip",
        lambda: opt.RMSProp(centered=True),
        UnknownFieldError,
        "RMSProp has no field 'centered'; did you mean 'centred'? Its fields are: eta, rho, epsilon, centred",
    ),
    building(
        "nothing like it",
        lambda: opt.Descent(frobnicate=1),
        UnknownFieldError,
        "Descent has no field 'frobnicate'. Its fields are: eta",
    ),
    building("no fields at all", lambda: Summing(eta=1), UnknownFieldError, "Summing has no field 'eta'. Its fields are: none"),
    building(
        "too many arguments",
        lambda: opt.Adam(1, 2, 3, 4),
        UnknownFieldError,
        "Adam takes at most 3 positional arguments (eta, beta, epsilon), got 4",
    ),
    building(
        "field twice", lambda: opt.Adam(0.1, eta=0.1), UnknownFieldError, "Adam got field 'eta' twice, by position and by name"
    ),
    building(
        "AccumGrad without n",
        opt.AccumGrad,
        UnknownFieldError,
        "AccumGrad needs its field 'n'; write AccumGrad(n=...)",
    ),
    building(
        "AccumGrad(0)", lambda: opt.AccumGrad(0), HyperParameterError, "AccumGrad: field 'n' must be a whole number >= 1; got 0"
    ),
    building(
        "AccumGrad(2.5)",
        lambda: opt.AccumGrad(2.5),
        HyperParameterError,
        "AccumGrad: field 'n' must be a whole number >= 1; got 2.5",
    ),
    building(
        "AccumGrad(True)",
        lambda: opt.AccumGrad(True),
        HyperParameterError,
        "AccumGrad: field 'n' must be a whole number >= 1; got True",
    ),
    building(
        "eta below 0",
        lambda: opt.Adam(eta=-1e-3),
        HyperParameterError,
        "Adam: field 'eta' must be a finite number >= 0; got -0.001",
    ),
    building(
        "eta NaN",
        lambda: opt.Adam(eta=float("nan")),
        HyperParameterError,
        "Adam: field 'eta' must be a finite number >= 0; got nan",
    ),
    building(
        "eta infinite",
        lambda: opt.Adam(eta=float("inf")),
        HyperParameterError,
        "Adam: field 'eta' must be a finite number >= 0; got inf",
    ),
    building(
        "eta a string",
        lambda: opt.Adam("1e-3"),
        HyperParameterError,
        "Adam: field 'eta' must be a finite number >= 0; got '1e-3'",
    ),
    building(
        "eta None", lambda: opt.Adam(None), HyperParameterError, "Adam: field 'eta' must be a finite number >= 0; got None"
    ),
    building(
        "eta True", lambda: opt.Adam(True), HyperParameterError, "Adam: field 'eta' must be a finite number >= 0; got True"
    ),
    building(
        "eta a pair",
        lambda: opt.Adam((0.1, 0.2)),
        HyperParameterError,
        "Adam: field 'eta' must be a finite number >= 0; got (0.1, 0.2)",
    ),
    building(
        "eta an array",
        lambda: opt.Adam(np.ones(2)),
        HyperParameterError,
        "Adam: field 'eta' must be a finite number >= 0; got array([1., 1.])",
    ),
    building(
        "eta a long tensor",
        lambda: opt.Adam(torch.ones(2)),
        HyperParameterError,
        "Adam: field 'eta' must be a 0-d floating point tensor; got a tensor of shape (2,) and dtype torch.float32",
    ),
    building(
        "eta an integer tensor",
        lambda: opt.Adam(torch.tensor(1)),
        HyperParameterError,
        "Adam: field 'eta' must be a 0-d floating point tensor; got a tensor of shape () and dtype torch.int64",
    ),
    building(
        "beta 1", lambda: opt.Adam(beta=(0.9, 1.0)), HyperParameterError, "Adam: field 'beta[1]' must be in [0, 1); got 1.0"
    ),
    building(
        "beta below 0",
        lambda: opt.Adam(beta=(-0.1, 0.9)),
        HyperParameterError,
        "Adam: field 'beta[0]' must be in [0, 1); got -0.1",
    ),
    building(
        "beta one number",
        lambda: opt.Adam(beta=0.9),
        HyperParameterError,
        "Adam: field 'beta' must be 2 numbers, each in [0, 1); got 0.9",
    ),
    building(
        "beta three numbers",
        lambda: opt.Adam(beta=(0.9, 0.9, 0.9)),
        HyperParameterError,
        "Adam: field 'beta' must be 2 numbers, each in [0, 1); got (0.9, 0.9, 0.9)",
    ),
    building("rho 1", lambda: opt.Momentum(rho=1), HyperParameterError, "Momentum: field 'rho' must be in [0, 1); got 1"),
    building(
        "lambda_ below 0",
        lambda: opt.WeightDecay(-1),
        HyperParameterError,
        "WeightDecay: field 'lambda_' must be a finite number >= 0; got -1",
    ),
    building(
        "omega 0", lambda: opt.ClipNorm(0), HyperParameterError, "ClipNorm: field 'omega' must be a finite number > 0; got 0"
    ),
    building(
        "p NaN", lambda: opt.ClipNorm(1.0, float("nan")), HyperParameterError, "ClipNorm: field 'p' must be a number; got nan"
    ),
    building(
        "p 0 of a group",
        lambda: opt.ClipGlobalNorm(1.0, 0),
        HyperParameterError,
        "ClipGlobalNorm: field 'p' must be a number > 0; got 0",
    ),
    building(
        "delta 0",
        lambda: opt.ClipGrad(0.0),
        HyperParameterError,
        "ClipGrad: field 'delta' must be a finite number > 0; got 0.0",
    ),
    building(
        "ell",
        lambda: opt.Rprop(ell=(0.5, 0.9)),
        HyperParameterError,
        "Rprop: field 'ell' must be (down, up) with 0 < down < 1 < up; got (0.5, 0.9)",
    ),
    building(
        "ell swapped",
        lambda: opt.Rprop(ell=(1.2, 0.5)),
        HyperParameterError,
        "Rprop: field 'ell' must be (down, up) with 0 < down < 1 < up; got (1.2, 0.5)",
    ),
    building(
        "ell one number",
        lambda: opt.Rprop(ell=0.5),
        HyperParameterError,
        "Rprop: field 'ell' must be (down, up) with 0 < down < 1 < up; got 0.5",
    ),
    building(
        "gamma",
        lambda: opt.Rprop(gamma=(1.0, 0.1)),
        HyperParameterError,
        "Rprop: field 'gamma' must be (low, high) with 0 < low < high; got (1.0, 0.1)",
    ),
    building(
        "centred a number",
        lambda: opt.RMSProp(centred=1),
        HyperParameterError,
        "RMSProp: field 'centred' must be True or False; got 1",
    ),
    building(
        "throw None",
        lambda: opt.ClipNorm(throw=None),
        HyperParameterError,
        "ClipNorm: field 'throw' must be True or False; got None",
    ),
    building(
        "chain of a class",
        lambda: opt.OptimiserChain(opt.ClipNorm, opt.Adam()),
        RuleError,
        "OptimiserChain: member 0 must be a rule; got the class ClipNorm; write ClipNorm(...)",
    ),
    building(
        "chain of a list",
        lambda: opt.OptimiserChain([opt.ClipNorm(), opt.Adam()]),
        RuleError,
        "OptimiserChain: member 0 must be a rule; got a list; write OptimiserChain(*rules)",
    ),
    building(
        "MixedPrecision of a class",
        lambda: opt.MixedPrecision(opt.Adam),
        RuleError,
        "MixedPrecision(rule, dtype): rule must be a rule; got the class Adam; write Adam(...)",
    ),
    building(
        "MixedPrecision in a chain",
        lambda: opt.OptimiserChain(opt.ClipNorm(), opt.MixedPrecision(opt.Adam())),
        RuleError,
        "OptimiserChain: member 1, MixedPrecision, is or holds a MixedPrecision; put the chain inside "
        "that: MixedPrecision(OptimiserChain(...))",
    ),
    building(
        "MixedPrecision deep in a chain",
        lambda: opt.OptimiserChain(opt.Scheduled(opt.MixedPrecision(opt.Adam()), eta=float)),
        RuleError,
        "OptimiserChain: member 0, Scheduled, is or holds a MixedPrecision; put the chain inside that: "
        "MixedPrecision(OptimiserChain(...))",
    ),
    building(
        "MixedPrecision twice",
        lambda: opt.MixedPrecision(opt.MixedPrecision(opt.Adam())),
        RuleError,
        "MixedPrecision inside MixedPrecision would keep two masters of one array; remove one of them",
    ),
    building(
        "MixedPrecision of integers",
        lambda: opt.MixedPrecision(opt.Adam(), "int8"),
        HyperParameterError,
        "MixedPrecision: field 'dtype' must be a real floating dtype; 'int8' is not one of bfloat16, float16, float32, float64",
    ),
    building(
        "MixedPrecision of complex",
        lambda: opt.MixedPrecision(opt.Adam(), torch.complex64),
        HyperParameterError,
        "MixedPrecision: field 'dtype' must be a real floating dtype; 'complex64' is not one of "
        "bfloat16, float16, float32, float64",
    ),
    building(
        "Scheduled of a number",
        lambda: opt.Scheduled(0.1, eta=float),
        RuleError,
        "Scheduled(rule, **fields): rule must be a rule; got a float 0.1",
    ),
    building(
        "Scheduled, unknown field",
        lambda: opt.Scheduled(opt.Adam(), lr=float),
        UnknownFieldError,
        "Scheduled: Adam has no field 'lr'; did you mean 'eta'? Its fields are: beta, epsilon, eta",
    ),
    building(
        "Scheduled, structural field",
        lambda: opt.Scheduled(opt.RMSProp(), centred=bool),
        HyperParameterError,
        "Scheduled: field 'centred' of RMSProp is fixed at setup, since the state follows it; give it there",
    ),
    building(
        "Scheduled, no callable",
        lambda: opt.Scheduled(opt.Adam(), eta=0.1),
        HyperParameterError,
        "Scheduled: field 'eta' must be a callable step -> value; got 0.1",
    ),
    # Rules of users.
    building(
        "rule not frozen",
        Thawed,
        RuleError,
        "Thawed must be a frozen dataclass: write @dataclass(frozen=True) above the class",
    ),
    building(
        "rule no dataclass",
        Undecorated,
        RuleError,
        "Undecorated must be a frozen dataclass: write @dataclass(frozen=True) above the class",
    ),
    building(
        "rule without apply",
        dataclass(frozen=True)(type("Half", (opt.AbstractRule,), {})),
        TypeError,
        "Can't instantiate abstract class Half ...apply...init...",
    ),
    stepping(
        "rule with a wrong shape",
        lambda w: w.step(w.setup(Summing(), w.model), w.model, w.grads()),
        RuleError,
        "Summing() returned an array of shape () as the step of 'layers.0.bias'; apply must return "
        "(state, step), the step an array of shape (3,), or None",
    ),
    stepping(
        "rule with a number",
        lambda w: w.step(w.setup(Numeric(), w.model), w.model, w.grads()),
        RuleError,
        "Numeric() returned a float 1.0 as the step of 'layers.0.bias'; apply must return (state, step), "
        "the step an array of shape (3,), or None",
    ),
    stepping(
        "rule with a string in its state",
        lambda w: w.step(w.setup(Wordy(), w.model), w.model, w.grads()),
        RuleError,
        "Wordy() keeps a str 'a word' in the state of 'layers.0.bias'; a state is made of arrays and "
        "numbers in tuples, lists and dicts, or is None",
    ),
    stepping(
        "rule without a state",
        lambda w: w.step(w.setup(Forgetful(), w.model), w.model, w.grads()),
        RuleError,
        "parameter 'layers.0.bias': Forgetful.apply must return a pair (state, step); got a...",
    ),
    Case(
        "rule starting with a string",
        lambda w: opt.setup(WordyStart(), w.model),
        RuleError,
        "WordyStart() keeps a str 'a word' in the state of 'layers.0.bias'; a state is made of arrays "
        "and numbers in tuples, lists and dicts, or is None",
        BOTH,
    ),
    # setup.
    Case(
        "setup swapped",
        lambda w: opt.setup(w.model, opt.Adam()),
        RuleError,
        "setup: expected a rule or a function from Param to a rule, got a dict; the order is setup(rule, model)",
        BOTH,
    ),
    Case(
        "setup with a class",
        lambda w: opt.setup(opt.Adam, w.model),
        RuleError,
        "setup: expected a rule or a function from Param to a rule, got the class Adam; write Adam(...)",
        BOTH,
    ),
    Case(
        "setup with a number",
        lambda w: opt.setup(0.1, w.model),
        RuleError,
        "setup: expected a rule or a function from Param to a rule, got a float 0.1",
    ),
    Case(
        "setup with a list of rules",
        lambda w: opt.setup([opt.Adam()], w.model),
        RuleError,
        "setup: expected a rule or a function from Param to a rule, got a list; write OptimiserChain(*rules)",
    ),
    Case(
        "setup of a state",
        lambda w: opt.setup(opt.Adam(), w.state),
        ArgumentError,
        "setup: the model is a state tree; give the model itself",
    ),
    Case(
        "setup of nothing",
        lambda w: opt.setup(opt.Adam(), {}),
        ModelError,
        "the model has no trainable array, that is no real or complex floating point NumPy array or "
        "torch tensor (and, with torch Parameters, with requires_grad). Its leaves: none",
    ),
    Case(
        "setup of a number",
        lambda w: opt.setup(opt.Adam(), 1.0),
        ModelError,
        "the model has no trainable array, that is no real or complex floating point NumPy array or "
        "torch tensor (and, with torch Parameters, with requires_grad). Its leaves: the root: Python or "
        "NumPy scalar",
    ),
    Case(
        "setup without a trainable array",
        lambda w: opt.setup(opt.Adam(), {"n": w.ones(2, dtype="int64"), "s": "x", "t": 1.5}),
        ModelError,
        "the model has no trainable array, that is no real or complex floating point ... (and, with "
        "torch Parameters, with requires_grad). Its leaves: 'n': int64 array; 's': str; 't': Python or "
        "NumPy scalar",
        BOTH,
    ),
    Case(
        "setup of frozen parameters",
        lambda w: opt.setup(opt.Adam(), linear().requires_grad_(False)),
        ModelError,
        "the model has no trainable array, that is no real or complex floating point NumPy array or "
        "torch tensor (and, with torch Parameters, with requires_grad). Its leaves: 'weight': float32 "
        "array without requires_grad; 'bias': float32 array without requires_grad",
        TORCH,
    ),
    Case(
        "setup narrowed to nothing",
        lambda w: opt.setup(opt.Adam(), w.model, trainable=lambda p: False),
        ModelError,
        "the model has no trainable array left: trainable= is false for all of them",
    ),
    Case(
        "setup, every rule None",
        lambda w: opt.setup(lambda p: None, w.model),
        ModelError,
        "setup: the rule of every array is None, so nothing would be trained",
    ),
    Case(
        "setup, function to a class",
        lambda w: opt.setup(lambda p: opt.Adam, w.model),
        RuleError,
        "setup: the rule of 'layers.0.bias', chosen by <lambda>, must be a rule, or None for 'not "
        "trained'; got the class Adam; write Adam(...)",
    ),
    Case(
        "setup, state_dtype",
        lambda w: opt.setup(opt.Adam(), w.model, state_dtype="int32"),
        HyperParameterError,
        "setup: state_dtype must be a real floating dtype; 'int32' is not one of bfloat16, float16, float32, float64",
        BOTH,
    ),
    Case(
        "hidden arrays",
        lambda w: opt.setup(opt.Adam(), {"net": Box(w=w.ones(2), deep=[w.ones(2)]), "b": w.ones(2)}),
        ModelError,
        "the object at 'net' is of the class Box, which is not registered as a tree, but holds arrays "
        "(w, deep.0) that would not be trained. Register the class, for example with "
        "optree.dataclasses.dataclass or optree.register_pytree_node_class, or put the arrays into a dict",
        BOTH,
    ),
    Case(
        "module in a dict",
        lambda w: opt.setup(opt.Adam(), {"net": linear()}),
        ModelError,
        "the model holds a torch.nn.Module at 'net'; give setup the module itself, or put "
        "dict(module.named_parameters()) in its place",
        TORCH,
    ),
    Case(
        "JAX array in a model",
        lambda w: opt.setup(opt.Adam(), {"a": {"b": jnp.ones(2)}, "c": w.ones(2)}),
        ModelError,
        "the array at 'a.b' is a jaxlib._jax.ArrayImpl; this library trains NumPy arrays and torch tensors. "
        "Convert it, for example with numpy.asarray",
        BOTH,
    ),
    Case(
        "bfloat16 NumPy array",
        lambda w: opt.setup(opt.Adam(), {"a": np.ones(2, jnp.bfloat16), "b": w.ones(2)}),
        ModelError,
        "the array at 'a' is a NumPy array of bfloat16, which NumPy cannot compute in; use a torch tensor",
    ),
    Case(
        "sparse parameter",
        lambda w: opt.setup(opt.Adam(), {"a": sparse_parameter()}),
        ModelError,
        "the array at 'a' is a torch.sparse_coo tensor; only strided (dense) tensors can be trained. If it is "
        "not to be trained, say so: requires_grad_(False), trainable=, or a rule of None",
        TORCH,
    ),
    Case(
        "colliding keys",
        lambda w: opt.setup(opt.Adam(), {0: w.ones(2), "0": w.ones(2)}),
        ModelError,
        "two leaves have the path '0': their keys are (0,) and ('0',); rename one of the keys",
        BOTH,
    ),
    Case(
        "overlapping views",
        lambda w: opt.setup(opt.Adam(), {"a": (x := w.ones(6))[:4], "b": x[2:]}),
        TieError,
        "the arrays at 'a' and 'b' overlap in memory, but neither is the other with its axes permuted, "
        "so they cannot be stepped once; give one of them a copy, or train only the whole",
        BOTH,
    ),
    Case(
        "part and whole",
        lambda w: opt.setup(opt.Adam(), [x := w.ones(6), x[:2]]),
        TieError,
        "the arrays at '1' and '0' overlap in memory, but neither is the other with its axes permuted, "
        "so they cannot be stepped once; give one of them a copy, or train only the whole",
        BOTH,
    ),
    Case(
        "broadcast NumPy array",
        lambda w: opt.setup(opt.Adam(), {"a": np.broadcast_to(np.ones(2), (3, 2))}),
        TieError,
        "the array at 'a' repeats its own memory (a stride of 0, as broadcasting makes); give it a copy",
    ),
    Case(
        "expanded tensor",
        lambda w: opt.setup(opt.Adam(), {"a": torch.ones(2).expand(3, 2)}),
        TieError,
        "the array at 'a' repeats its own memory (a stride of 0, as broadcasting makes); give it a copy",
        TORCH,
    ),
    *(
        Case(
            f"complex, {rule}",
            lambda w, rule=rule: opt.setup(rule, {"z": w.ones(2, dtype="complex64")}),
            RuleError,
            "... cannot step 'z', which is complex64: it compares numbers, and complex ones have no order. "
            "Choose another rule for this parameter with Route",
            BOTH,
        )
        for rule in (opt.AMSGrad(), opt.AdaMax(), opt.Rprop(), opt.OptimiserChain(opt.ClipGrad(), opt.Adam()))
    ),
    Case(
        "bfloat16 on NumPy",
        lambda w: opt.setup(opt.MixedPrecision(opt.Adam(), "bfloat16"), w.model),
        HyperParameterError,
        "parameter 'layers.0.bias': NumPy cannot compute in bfloat16; use float32, or torch tensors",
    ),
    Case(
        "bfloat16 moments on NumPy",
        lambda w: opt.setup(opt.Adam(), w.model, state_dtype="bfloat16"),
        HyperParameterError,
        "parameter 'layers.0.bias': NumPy cannot compute in bfloat16; use float32, or torch tensors",
    ),
    Case(
        "tensor as field, NumPy model",
        lambda w: opt.setup(opt.Adam(torch.tensor(0.1)), w.model),
        RuleError,
        "Adam has a torch tensor as a field, but 'layers.0.bias' is a NumPy array; use a number",
    ),
    # update and its arguments.
    stepping(
        "update swapped",
        lambda w: w.step(w.model, w.state, w.grads()),
        ArgumentError,
        "update: expected the state that setup returned, got a dict; the order is update(state, model, grads)",
    ),
    stepping(
        "update, model and gradients alike states",
        lambda w: w.step(w.state, w.state, w.grads()),
        ArgumentError,
        "update: a state stands where the model or the gradient should; the order is update(state, model, grads)",
    ),
    stepping(
        "update, rule for a state",
        lambda w: w.step(opt.Adam(), w.model, w.grads()),
        ArgumentError,
        "update: expected the state that setup returned, got an Adam",
    ),
    stepping(
        "update, gradients a state",
        lambda w: w.step(w.state, w.model, w.state),
        ArgumentError,
        "update: a state stands where the model or the gradient should; the order is update(state, model, grads)",
    ),
    Case(
        "update of a module",
        lambda w: opt.update(w.setup(opt.Adam(), net := linear()), net, None),
        ArgumentError,
        "update: a torch.nn.Module cannot be updated purely. Use update_(state, module), which steps it "
        "in place, or set up with params = dict(module.named_parameters()), take gradients through "
        "torch.func.functional_call(module, params, ...), and call update(state, params, grads)",
        TORCH,
    ),
    Case(
        "update_, gradients a module",
        lambda w: opt.update_(w.setup(opt.Adam(), net := linear()), net, net),
        ArgumentError,
        "the gradient must be a dict of the module's parameter names, or be left out to use .grad",
        TORCH,
    ),
    Case(
        "update_, name missing",
        lambda w: opt.update_(w.setup(opt.Adam(), net := linear()), net, {"weight": None}),
        StructureError,
        "gradient: lacks the parameter 'bias'. Put None where there is no gradient",
        TORCH,
    ),
    Case(
        "update_, name extra",
        lambda w: opt.update_(w.setup(opt.Adam(), net := linear()), net, {"weight": None, "bias": None, "scale": None}),
        StructureError,
        "gradient: has 'scale', which setup did not see. Put None where there is no gradient",
        TORCH,
    ),
    Case(
        "update_, module for a tree",
        lambda w: opt.update_(w.state, linear(), None),
        ArgumentError,
        "the state was set up for a tree, and the model is a torch.nn.Module; set up the state with the module",
        TORCH,
    ),
    Case(
        "update_, tree for a module",
        lambda w: opt.update_(w.setup(opt.Adam(), linear()), [1.0], None),
        ArgumentError,
        "the state was set up for a torch.nn.Module; the model must be that module or a dict of its "
        "named parameters, not a list",
        TORCH,
    ),
    Case(
        "update_, sparse .grad",
        sparse_step,
        GradientError,
        "gradient at 'weight': expected a torch tensor of shape (4, 2) and floating dtype, got a tensor "
        "of layout torch.sparse_coo; call .to_dense() on it, or build the layer with sparse=False",
        TORCH,
    ),
    Case(
        "update_, another module",
        lambda w: opt.update_(w.setup(opt.Adam(), linear()), torch.nn.Sequential(linear()), None),
        StructureError,
        "model: lacks the parameters 'weight', 'bias' and has '0.weight', '0.bias', which setup did not "
        "see. Set up a new state, or opt.extend this one",
        TORCH,
    ),
    stepping(
        "model of another shape",
        lambda w: w.step(w.state, {**w.model, "pair": Pair(w.ones(2), w.ones(3))}, None),
        StructureError,
        "model at 'pair.b': the state was set up for a <library> array of shape (2,) and dtype float64, "
        "got a <library> array of shape (3,) and dtype float64. Set up a new state for the changed model",
    ),
    stepping(
        "model of another dtype",
        lambda w: w.step(w.state, {**w.model, "pair": Pair(w.ones(2), w.ones(2, dtype="float32"))}, None),
        StructureError,
        "model at 'pair.b': the state was set up for a <library> array of shape (2,) and dtype float64, "
        "got a <library> array of shape (2,) and dtype float32. Set up a new state for the changed model",
    ),
    stepping(
        "model of another library",
        lambda w: w.step(w.state, {**w.model, "pair": Pair(w.ones(2), w.other(2))}, None),
        StructureError,
        "model at 'pair.b': the state was set up for a <library> array of shape (2,) and dtype float64, "
        "got a <another> array of shape (2,) and dtype float64. Set up a new state for the changed model",
    ),
    stepping(
        "model with a key less",
        lambda w: w.step(w.state, without(w.model, "pair"), None),
        StructureError,
        "model at the root: lacks the key 'pair'. The state fits the model it was set up with; set up a "
        "new state for another one",
    ),
    stepping(
        "model with a key more",
        lambda w: w.step(w.state, {**w.model, "more": w.ones(2)}, None),
        StructureError,
        "model at the root: has the key 'more', which setup did not see. The state fits the model it was "
        "set up with; set up a new state for another one",
    ),
    stepping(
        "model with a longer list",
        lambda w: w.step(w.state, {**w.model, "layers": [*w.model["layers"], None]}, None),
        StructureError,
        "model at 'layers': expected a list of 1, got a list of 2. The state fits the model it was set "
        "up with; set up a new state for another one",
    ),
    stepping(
        "model with a list for a tuple",
        lambda w: w.step(w.state, {**w.model, "spread": [*w.model["spread"]]}, None),
        StructureError,
        "model at 'spread': expected a tuple of 2, got a list of 2. The state fits the model it was set "
        "up with; set up a new state for another one",
    ),
    stepping(
        "model with None for an array",
        lambda w: w.step(w.state, {**w.model, "pair": Pair(w.ones(2), None)}, None),
        StructureError,
        "model at 'pair.b': the state was set up for a <library> array of shape (2,) and dtype float64, "
        "got None. Set up a new state for the changed model",
    ),
    # States that update_ has used up.
    Case(
        "consumed by its own step",
        lambda w: consumed(w, after_own_step),
        ConsumedStateError,
        "this state was consumed by update_, which re-used its memory. Go on with the state that update_ "
        "returned, or use update, which leaves its arguments as they are",
        BOTH,
    ),
    Case(
        "consumed, adjusted sibling",
        lambda w: consumed(w, after_adjusted_sibling),
        ConsumedStateError,
        "this state was consumed by update_, which re-used its memory. Go on with the state that update_ "
        "returned, or use update, which leaves its arguments as they are",
        BOTH,
    ),
    Case(
        "consumed by a sibling's step",
        lambda w: consumed(w, after_step_of_sibling),
        ConsumedStateError,
        "this state was consumed by update_, which re-used its memory. Go on with the state that update_ "
        "returned, or use update, which leaves its arguments as they are",
        BOTH,
    ),
    Case(
        "consumed, frozen sibling",
        lambda w: consumed(w, after_frozen_sibling),
        ConsumedStateError,
        "this state was consumed by update_, which re-used its memory. Go on with the state that update_ "
        "returned, or use update, which leaves its arguments as they are",
        BOTH,
    ),
    Case(
        "consumed, unstepped array",
        unstepped_sibling_of_consumed,
        ConsumedStateError,
        "this state was consumed by update_, which re-used its memory. Go on with the state that update_ "
        "returned, or use update, which leaves its arguments as they are",
        BOTH,
    ),
    Case(
        "consumed, sub-tree",
        sub_tree_of_consumed,
        ConsumedStateError,
        "this state was consumed by update_, which re-used its memory. Go on with the state that update_ "
        "returned, or use update, which leaves its arguments as they are",
        BOTH,
    ),
    # adjust.
    Case(
        "adjust, unknown field",
        lambda w: opt.adjust(w.state, rho=0.9),
        UnknownFieldError,
        "adjust: no selected rule has a field 'rho'. The selected rules: Adam(eta, beta, epsilon); ClipNorm(omega, p, throw)",
    ),
    Case(
        "adjust, lr",
        lambda w: opt.adjust(w.setup(opt.Adam(), w.model), lr=0.9),
        UnknownFieldError,
        "adjust: Adam has no field 'lr'; did you mean 'eta'? Its fields are: eta, beta, epsilon",
    ),
    Case(
        "adjust, one field of two unknown",
        lambda w: opt.adjust(w.setup(opt.Adam(), w.model), eta=0.1, rho=0.9),
        UnknownFieldError,
        "adjust: Adam has no field 'rho'. Its fields are: eta, beta, epsilon",
    ),
    Case(
        "adjust, no learning rate",
        lambda w: opt.adjust(w.setup(opt.AdaDelta(), w.model), 0.1),
        UnknownFieldError,
        "adjust: AdaDelta has no field 'eta'. Its fields are: rho, epsilon",
    ),
    Case(
        "adjust, centred",
        lambda w: opt.adjust(w.setup(opt.RMSProp(), w.model), centred=True),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: field 'centred' of RMSProp is fixed at setup, since the "
        "state follows it. Set up a new state to change it, or pass over RMSProp with rule= or where=",
    ),
    Case(
        "adjust, dtype",
        lambda w: opt.adjust(w.setup(opt.MixedPrecision(opt.Adam()), w.model), dtype="float64"),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: field 'dtype' of MixedPrecision is fixed at setup, since the "
        "state follows it. Set up a new state to change it, or pass over MixedPrecision with rule= or "
        "where=",
    ),
    Case(
        "adjust, eta of Rprop",
        lambda w: opt.adjust(w.setup(opt.Rprop(), w.model), 0.1),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: field 'eta' of Rprop is fixed at setup, since the state "
        "follows it. Set up a new state to change it, or pass over Rprop with rule= or where=",
    ),
    Case(
        "adjust, eta= of Rprop",
        lambda w: opt.adjust(w.setup(opt.Rprop(), w.model), eta=0.1),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: field 'eta' of Rprop is fixed at setup, since the state "
        "follows it. Set up a new state to change it, or pass over Rprop with rule= or where=",
    ),
    Case(
        "adjust, times= of Rprop",
        lambda w: opt.adjust(w.setup(opt.Rprop(), w.model), times=0.1),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: field 'eta' of Rprop is fixed at setup, since the state "
        "follows it. Set up a new state to change it, or pass over Rprop with rule= or where=",
    ),
    Case(
        "adjust, rules of a chain",
        lambda w: opt.adjust(w.state, rules=(opt.Adam(),)),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: field 'rules' of OptimiserChain holds rules; adjust those, with rule=TheirType",
    ),
    Case(
        "adjust, where matches nothing",
        lambda w: opt.adjust(w.state, 0.1, where="layers.0.wieght"),
        SelectionError,
        "where='layers.0.wieght' selects no parameter. Did you mean 'layers.0.weight' or "
        "'layers.0.bias'? The paths are: 'layers.0.bias', 'layers.0.weight', 'pair.a', 'pair.b', "
        "'spread.0', 'spread.1'",
    ),
    Case(
        "adjust, where a type",
        lambda w: opt.adjust(w.state, 0.1, where=torch.nn.Linear),
        SelectionError,
        "where=owner Linear selects no parameter. The paths are: 'layers.0.bias', 'layers.0.weight', "
        "'pair.a', 'pair.b', 'spread.0', 'spread.1'",
    ),
    Case(
        "adjust, where a number",
        lambda w: opt.adjust(w.state, 0.1, where=0),
        ArgumentError,
        "where=: a pattern is a glob on the path, the type of the owner, or a predicate on Param; got 0",
    ),
    Case(
        "adjust, rule matches nothing",
        lambda w: opt.adjust(w.state, 0.1, rule=opt.AdamW),
        SelectionError,
        "adjust: no selected rule is of type AdamW; the types are Adam, ClipNorm, OptimiserChain",
    ),
    Case(
        "adjust, field of another rule",
        lambda w: opt.adjust(w.state, 0.1, rule=opt.ClipNorm),
        UnknownFieldError,
        "adjust: ClipNorm has no field 'eta'. Its fields are: omega, p, throw",
    ),
    Case(
        "adjust of a rule, rule matches nothing",
        lambda w: opt.adjust(opt.Adam(), 0.1, rule=opt.AdamW),
        SelectionError,
        "adjust: no selected rule is of type AdamW; the types are Adam",
    ),
    Case(
        "adjust, rule an instance",
        lambda w: opt.adjust(w.state, 0.1, rule=opt.Adam()),
        ArgumentError,
        "adjust: rule= takes a type of rule, such as rule=opt.Adam, or a tuple of types; got Adam(eta=0.001...)",
    ),
    Case(
        "adjust, two kinds",
        lambda w: opt.adjust(w.state, 0.1, times=0.1),
        ArgumentError,
        "adjust: give a learning rate, or times=, or fields by name, one of the three; got a learning rate and times=",
    ),
    Case(
        "adjust, two kinds again",
        lambda w: opt.adjust(w.state, 0.1, beta=(0.9, 0.9)),
        ArgumentError,
        "adjust: give a learning rate, or times=, or fields by name, one of the three; got a learning rate and fields by name",
    ),
    Case(
        "adjust, nothing",
        lambda w: opt.adjust(w.state),
        ArgumentError,
        "adjust: give a learning rate, or times=, or fields by name, one of the three; got none of them",
    ),
    Case(
        "adjust, eta below 0",
        lambda w: opt.adjust(w.state, -0.1),
        HyperParameterError,
        "parameter 'layers.0.bias': Adam: field 'eta' must be a finite number >= 0; got -0.1",
    ),
    Case(
        "adjust, times below 0",
        lambda w: opt.adjust(w.state, times=-1),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: times must be a finite number >= 0; got -1",
    ),
    Case(
        "adjust, times infinite",
        lambda w: opt.adjust(w.state, times=float("inf")),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: times must be a finite number >= 0; got inf",
    ),
    Case(
        "adjust, times a string",
        lambda w: opt.adjust(w.state, times="0.1"),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: times must be a finite number >= 0; got '0.1'",
    ),
    Case(
        "adjust, beta out of range",
        lambda w: opt.adjust(w.state, beta=(0.9, 1.0)),
        HyperParameterError,
        "parameter 'layers.0.bias': Adam: field 'beta[1]' must be in [0, 1); got 1.0",
    ),
    Case(
        "adjust of a model",
        lambda w: opt.adjust(w.model, 0.1),
        ArgumentError,
        "adjust: expected the state that setup returned, or a rule; got a dict",
    ),
    Case(
        "adjust of a module",
        lambda w: opt.adjust(linear(), 0.1),
        ArgumentError,
        "adjust: expected the state that setup returned, or a rule; got a Linear",
    ),
    Case(
        "adjust of a class",
        lambda w: opt.adjust(opt.Adam, 0.1),
        ArgumentError,
        "adjust: expected the state that setup returned, or a rule; got the class Adam",
    ),
    Case(
        "adjust of a rule with where",
        lambda w: opt.adjust(opt.Adam(), 0.1, where="*"),
        ArgumentError,
        "adjust: where= selects parameters of a state tree; Adam has none",
    ),
    Case(
        "adjust of a rule, unknown field",
        lambda w: opt.adjust(opt.Adam(), betas=(0.9, 0.9)),
        UnknownFieldError,
        "adjust: Adam has no field 'betas'; did you mean 'beta'? Its fields are: eta, beta, epsilon",
    ),
    Case(
        "adjust of a leaf not trained",
        lambda w: opt.adjust(w.setup(lambda p: None if p.path == "pair.a" else opt.Adam(), w.model)["pair"].a, 0.1),
        ArgumentError,
        "adjust: this leaf is not trained, so it has no rule",
    ),
    # freeze and thaw.
    Case(
        "freeze of a model",
        lambda w: opt.freeze(w.model),
        ArgumentError,
        "freeze works on the state that setup returned, not on a model (dict): state = freeze(state, where=...)",
    ),
    Case(
        "freeze of a module",
        lambda w: opt.freeze(linear()),
        ArgumentError,
        "freeze works on the state that setup returned, not on a model (Linear): state = freeze(state, where=...)",
    ),
    Case(
        "thaw of a rule",
        lambda w: opt.thaw(opt.Adam()),
        ArgumentError,
        "thaw works on the state that setup returned, not on this (Adam): state = thaw(state, where=...)",
    ),
    Case(
        "freeze, where matches nothing",
        lambda w: opt.freeze(w.state, where="pair.c"),
        SelectionError,
        "where='pair.c' selects no parameter. Did you mean 'pair.b' or 'pair.a'? The paths are: "
        "'layers.0.bias', 'layers.0.weight', 'pair.a', 'pair.b', 'spread.0', 'spread.1'",
    ),
    Case(
        "thaw of what is not trained",
        lambda w: opt.thaw(w.setup(lambda p: None if p.path == "pair.a" else opt.Adam(), w.model), where="pair.a"),
        SelectionError,
        "thaw: where='pair.a' selects only parameters that setup was told not to train; set up a new state",
    ),
    # Scheduled.
    stepping(
        "schedule out of range",
        lambda w: bad_value_at_step_2(w, w.step),
        HyperParameterError,
        "parameter 'inner.w': Scheduled: the schedule of 'eta' gave -0.0199... for step 2. Adam: field "
        "'eta' must be a finite number >= 0; got -0.0199...",
    ),
    Case(
        "schedule with a string",
        lambda w: opt.update(w.setup(opt.Scheduled(opt.Adam(), beta=lambda t: "0.9"), w.model), w.model, w.grads()),
        HyperParameterError,
        "parameter 'layers.0.bias': Scheduled: the schedule of 'beta' gave '0.9' for step 0. Adam: field "
        "'beta' must be 2 numbers, each in [0, 1); got '0.9'",
    ),
    Case(
        "schedule adjusted",
        lambda w: opt.adjust(w.setup(opt.Scheduled(opt.Adam(), eta=float), w.model), 0.1),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: 'eta' of Adam is scheduled; give a callable step -> value to "
        "change the schedule, or set up without Scheduled",
    ),
    Case(
        "schedule adjusted by name",
        lambda w: opt.adjust(w.setup(opt.Scheduled(opt.Adam(), beta=float), w.model), beta=(0.9, 0.9)),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: 'beta' of Adam is scheduled; give a callable step -> value "
        "to change the schedule, or set up without Scheduled",
    ),
    Case(
        "schedule adjusted by times",
        lambda w: opt.adjust(w.setup(opt.Scheduled(opt.Adam(), eta=float), w.model), times=0.5),
        HyperParameterError,
        "parameter 'layers.0.bias': adjust: 'eta' of Adam is scheduled; give a callable step -> value to "
        "change the schedule, or set up without Scheduled",
    ),
    Case(
        "schedule inside vmap",
        lambda w: torch.func.vmap(lambda s, x: opt.update(s, x, x))(
            torch.func.vmap(lambda x: opt.setup(opt.Scheduled(opt.Adam(), eta=float), x))(torch.ones(2, 3)), torch.ones(2, 3)
        ),
        RuleError,
        "parameter '(the array)': Scheduled decides from a step counter on the host, which cannot be "
        "read inside torch.func.vmap or torch.compile; call update outside the transform, or use a rule "
        "without Scheduled",
        TORCH,
    ),
    Case(
        "AccumGrad inside vmap",
        lambda w: torch.func.vmap(lambda s, x: opt.update(s, x, x))(
            torch.func.vmap(lambda x: opt.setup(opt.AccumGrad(2), x))(torch.ones(2, 3)), torch.ones(2, 3)
        ),
        RuleError,
        "parameter '(the array)': AccumGrad decides from a step counter on the host, which cannot be "
        "read inside torch.func.vmap or torch.compile; call update outside the transform, or use a rule "
        "without AccumGrad",
        TORCH,
    ),
    # Route.
    Case(
        "Route, pattern matches nothing",
        lambda w: opt.setup(opt.Route(("layers.0.wieght", opt.Adam()), otherwise=opt.Adam()), w.model),
        SelectionError,
        "Route: the pattern 'layers.0.wieght' matches no parameter. Did you mean 'layers.0.weight' or "
        "'layers.0.bias'? The paths are: 'layers.0.bias', 'layers.0.weight', 'pair.a', 'pair.b', "
        "'spread.0', 'spread.1'",
    ),
    Case(
        "Route, owner matches nothing",
        lambda w: opt.setup(opt.Route((torch.nn.Embedding, opt.Adam()), otherwise=opt.Adam()), linear()),
        SelectionError,
        "Route: the pattern owner Embedding matches no parameter. The paths are: 'weight', 'bias'",
        TORCH,
    ),
    Case(
        "Route, unmatched parameters",
        lambda w: opt.setup(opt.Route(("pair*", opt.Adam())), w.model),
        SelectionError,
        "Route: no pattern matches 'layers.0.bias', 'layers.0.weight', 'spread.0', 'spread.1'. Add a "
        "pattern, or otherwise=rule",
    ),
    Case(
        "Route, tie routed two ways",
        lambda w: opt.setup(opt.Route(("embed", opt.Adam()), ("head", opt.Lion())), tied(w)),
        TieError,
        "'embed' and 'head' are one tied array, but get different rules: Adam(eta=0.001) ('embed') "
        "and Lion(eta=0.001) ('head'). Put a pattern for it first, such as ('embed', "
        "'head')",
        BOTH,
    ),
    Case(
        "Route in the middle",
        lambda w: opt.setup(opt.OptimiserChain(opt.Route(("*", opt.ClipNorm())), opt.Adam()), w.model),
        RuleError,
        "a Route in an OptimiserChain must be its last member; put it last, or put the chain inside it: "
        "Route((pattern, OptimiserChain(...)), ...)",
    ),
    Case(
        "Route without pairs of two",
        lambda w: opt.Route(("*", opt.Adam(), 1)),
        ArgumentError,
        "Route: each argument is a pair (pattern, rule); got ('*', Adam(eta=0.001...), 1)",
    ),
    Case(
        "Route with a rule alone",
        lambda w: opt.Route(opt.Adam()),
        ArgumentError,
        "Route: each argument is a pair (pattern, rule); got Adam(eta=0.001...)",
    ),
    Case(
        "Route with a number as pattern",
        lambda w: opt.Route((1, opt.Adam())),
        ArgumentError,
        "Route: a pattern is a glob on the path, the type of the owner, or a predicate on Param; got 1",
    ),
    Case(
        "Route to a class",
        lambda w: opt.Route(("*", opt.Adam)),
        RuleError,
        "Route: a pattern leads to a rule, or to None for 'not trained'; got the class Adam; write Adam(...)",
    ),
    Case(
        "Route used as a rule",
        lambda w: opt.Route(("*", opt.Adam())).init(np.ones(2)),
        RuleError,
        "a Route has no state of its own: setup(route, model) chooses a rule for each parameter",
    ),
    # Groups of norms.
    stepping(
        "groups in a circle",
        lambda w: w.step(w.setup(GROUPS_IN_CIRCLE, m := {"a": w.ones(2), "b": w.ones(2)}), m, {"a": w.ones(2), "b": w.ones(2)}),
        RuleError,
        "the chains of 'a', 'b' hold ClipGlobalNorm(p=2, group='x') and ClipGlobalNorm(p=2, group='y') "
        "in opposite orders, so none can be measured first; use one order in all",
    ),
    Case(
        "groups with two orders",
        lambda w: opt.setup(opt.Route(("pair.a", opt.ClipGlobalNorm(p=1)), otherwise=opt.ClipGlobalNorm()), w.model),
        RuleError,
        "ClipGlobalNorm: the group '' has p=2 at 'layers.0.bias' and p=1 at 'pair.a'; give them "
        "different group names, or one p",
    ),
    # Reading a state.
    Case(
        "key of a state",
        lambda w: w.state["layer"],
        EntryError,
        "the state has no entry 'layer' here; it has 'layers', 'pair', 'spread'",
    ),
    Case("index of a state", lambda w: w.state["layers"][1], EntryError, "the state has no entry 1 here; it has 0"),
    Case(
        "attribute of a state",
        lambda w: w.state["pair"].c,
        EntryError,
        "the state has no attribute 'c' here; index it like the model, state[...]",
    ),
    Case(
        "key of a module's state",
        lambda w: opt.setup(opt.Adam(), torch.nn.Sequential(linear()))["0"],
        EntryError,
        "the module has no parameter '0'; did you mean one of '0.weight', '0.bias'?",
    ),
    Case(
        "key of an array's state",
        lambda w: opt.setup(opt.Adam(), w.ones(2))[0],
        EntryError,
        "this is the state of a single array; its leaf is state[()], not state[0]",
    ),
    Case(
        "setting an item",
        lambda w: w.state.__setitem__("pair", None),
        ImmutableError,
        "a state tree is immutable; use adjust, freeze and thaw, which return a new one",
    ),
    Case(
        "setting an attribute",
        lambda w: setattr(w.state, "pair", None),
        ImmutableError,
        "a state tree is immutable; use adjust, freeze and thaw, which return a new one",
    ),
    # destructure and Param.
    Case(
        "destructure of nothing",
        lambda w: opt.destructure({"a": 1}),
        ModelError,
        "the model has no trainable array, that is no real or complex floating point NumPy array or "
        "torch tensor (and, with torch Parameters, with requires_grad). Its leaves: 'a': Python or NumPy "
        "scalar",
    ),
    Case(
        "destructure of two libraries",
        lambda w: opt.destructure({"a": np.ones(2), "b": torch.ones(2)}),
        ModelError,
        "destructure needs all arrays of one kind; this model has NumPy arrays and torch tensors: take them one by one",
    ),
    Case(
        "rebuild from too short a vector",
        lambda w: last_rebuilt(np.ones(5)),
        ArgumentError,
        "rebuild: expected a vector of 6 elements, got shape (5,)",
    ),
    Case(
        "rebuild from a matrix",
        lambda w: last_rebuilt(np.ones((6, 1))),
        ArgumentError,
        "rebuild: expected a vector of 6 elements, got shape (6, 1)",
    ),
    Case(
        "rebuild from a tensor",
        lambda w: last_rebuilt(torch.ones(6)),
        ArgumentError,
        "rebuild: expected a numpy vector of 6 elements, got a Tensor",
    ),
    Case(
        "rebuild from a list",
        lambda w: last_rebuilt([1.0] * 6),
        ArgumentError,
        "rebuild: expected a numpy vector of 6 elements, got a list",
    ),
    Case(
        "array after setup",
        lambda w: opt.adjust(w.state, 0.1, where=lambda p: p.array.ndim == 2),
        ArgumentError,
        "Param.array of 'layers.0.bias' is known during setup only; a state keeps path, shape, dtype and owner",
    ),
]


def every():
    for case in CASES:
        for library in case.libraries:
            for verb in case.verbs:
                yield pytest.param(case, library, verb, id=f"{case.name}-{library}-{verb}")


def pattern(text, library):
    text = text.replace("<array>", "NumPy array" if library == "numpy" else "torch tensor")
    text = text.replace("<other>", "torch tensor" if library == "numpy" else "NumPy array")
    text = text.replace("<library>", library).replace("<another>", "torch" if library == "numpy" else "numpy")
    return ".*".join(re.escape(part) for part in text.split("..."))


@pytest.mark.parametrize(("case", "library", "verb"), list(every()))
def test_bad_input(case, library, verb):
    world = World(library, verb)
    with pytest.raises(case.error) as caught:
        case.call(world)
    assert type(caught.value) is case.error or not issubclass(case.error, opt.OptimisersError)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert re.fullmatch(pattern(case.text, library), text, re.DOTALL), text
    world.check()


# --- what only looks like an error ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", BOTH)
@pytest.mark.parametrize(
    "make",
    [
        lambda w: OrderedDict(b=w.ones(2), a=w.ones(3)),
        lambda w: defaultdict(list, a=w.ones(3), b=w.ones(2)),
        lambda w: {"b": w.ones(2), "a": w.ones(3)},
        lambda w: {"b": w.ones(2, dtype="float16"), "a": w.ones(3, dtype="float32")},
    ],
    ids=["OrderedDict", "defaultdict", "another order", "other float dtypes"],
)
def test_gradients_that_are_accepted(library, make):
    w = World(library)
    model = {"a": w.ones(3), "b": w.ones(2)}
    state = opt.setup(opt.Adam(), model)
    expected = opt.update(state, model, {"a": w.ones(3), "b": w.ones(2)})
    new_state, new_model = opt.update(state, model, make(w))
    assert frozen(new_model) == frozen(expected[1])
    assert new_state == expected[0]


def test_every_error_is_the_librarys_own_and_a_builtin():
    classes = [value for value in vars(opt).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert opt.OptimisersError in classes
    for cls in classes:
        assert issubclass(cls, opt.OptimisersError)
        builtin = {base for base in cls.__mro__ if base.__module__ == "builtins"} - {Exception, BaseException, object}
        assert builtin or cls is opt.OptimisersError
        assert str(cls("a\nb")) == "a\nb"  # KeyError alone would show the repr


# In tests/test_checkpoint.py, since they are about files, in tests/test_cuda.py and in tests/test_injection.py.
ELSEWHERE = {opt.CheckpointError, opt.MissingPackageError, opt.CaptureError, opt.UnfinishedStepError}


def test_every_error_class_is_in_the_table():
    assert {case.error for case in CASES} | ELSEWHERE >= {
        value
        for value in vars(opt).values()
        if isinstance(value, type) and issubclass(value, opt.OptimisersError) and value is not opt.OptimisersError
    }


@pytest.mark.parametrize("library", BOTH)
@pytest.mark.parametrize("verb", ["update", "update_"])
def test_throw_false_lets_values_through(library, verb):
    w = World(library, verb)
    model = {"a": w.ones(2), "b": w.ones(2)}
    state = opt.setup(opt.ClipNorm(1.0, throw=False), model)
    _, new = w.step(state, model, {"a": w.ones(2) * float("nan"), "b": w.ones(2)})
    assert np.isnan(np.asarray(new["a"])).all()
    assert np.isfinite(np.asarray(new["b"])).all()


def test_zero_stride_of_one_element_is_no_broadcast():
    model = {"a": np.broadcast_to(np.ones(1), (1, 1)).copy(), "b": torch.ones(1).expand(1, 1)}
    assert len(opt.trainables(model)) == 2


def test_interleaved_views_do_not_overlap():
    x = np.ones(6)
    assert len(opt.trainables({"even": x[::2], "odd": x[1::2]})) == 2
