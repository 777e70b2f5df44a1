"""A rule over one array and a run of gradients, as several tests want it."""

import numpy as np

import optimisers as opt
from golden_data import made, numpy_of


def run(rule, x, grads, kind="numpy"):
    """The parameter after each gradient."""
    x = made(x, kind)
    state = opt.setup(rule, x)
    xs = []
    for grad in grads:
        state, x = opt.update(state, x, made(grad, kind))
        xs.append(numpy_of(x))
    return np.array(xs)
