"""Lines of steps over matrices, for the tests of rules that need whole ones."""

import numpy as np
import torch

import optimisers as opt
from golden_data import numpy_of
from optimisers.rules._adjust import field_names

LONE = [(), (5,), (5, 1), (5, 1, 1), (1, 1)]
MATRICES = [(1, 5), (5, 2), (1, 5, 1), (1, 1, 3)]


def drawn(shape, kind, dtype, rng, order=None):
    """Normal numbers; ``order`` is that of the axes in memory."""
    x = rng.normal(size=shape)
    if order is not None:
        x = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    return torch.from_numpy(np.asarray(x)).to(getattr(torch, dtype)) if kind == "torch" else x.astype(dtype)


def trained(rule, model_of, kind, dtype, update, *, absent=("w0",), adjusted=("w[45]",)):
    """A few steps with absent gradients, a frozen array, tied ones, and an adjustment on the way."""
    rng = np.random.default_rng(0)
    model = model_of(kind, dtype, rng)
    state = opt.freeze(opt.setup(rule, model), where="w3")
    for step in range(5):
        grads = {name: drawn(x.shape, kind, dtype, rng) for name, x in model.items()}
        if step == 1:
            grads |= dict.fromkeys(absent)
        if step == 2:
            state = opt.thaw(state)
        if step == 3 and "eta" in field_names(rule) and not isinstance(rule, opt.Scheduled):
            for where in adjusted:
                state = opt.adjust(state, 0.05, where=where)
        state, model = update(state, model, grads)
    return state, model


def assert_alike(a, b, tolerance):
    """Numbers that are equal, and arrays that are nearly so."""
    for x, y in zip(a, b, strict=True):
        if isinstance(x, (int, float)):
            assert x == y
        else:
            assert x.dtype == y.dtype
            ours, theirs = (numpy_of(v.double() if isinstance(v, torch.Tensor) else v) for v in (x, y))
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def newton_schulz(u, triples, bound):
    """The iteration as the papers write it, on the short side."""
    tall = u.shape[0] > u.shape[1]
    y = (u.T if tall else u) / bound(np.sqrt((u**2).sum()))
    for a, b, c in triples:
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.T if tall else y
