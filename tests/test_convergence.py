"""Each rule of the table solves two small problems, at the learning rate that its row gives."""

import numpy as np
import pytest

import optimisers as opt
from table import ROWS

BLOCK = 100
"""Steps between looks at the distance."""
BLOCKS = 100
TOLERANCE = 3e-2
"""Absolute and relative, as optax asks of its own optimisers."""

_ROTATION, _ = np.linalg.qr(np.random.default_rng(7).standard_normal((3, 3)))
CURVATURE = _ROTATION @ np.diag([1.0, 2.0, 5.0]) @ _ROTATION.T


class Problem:
    """A minimum to be found."""

    def __init__(self, start, minimum, gradient):
        self.start, self.minimum, self.gradient = np.array(start), np.array(minimum), gradient


def quadratic(x):
    return CURVATURE @ (x - np.array([1.0, -1.0, 1.0]))


def rosenbrock(x):
    a, b = x
    return np.array([2 * (a - 1) - 400 * a * (b - a * a), 200 * (b - a * a)])


PROBLEMS = {
    "quadratic": Problem([-1.0, 10.0, 1.0], [1.0, -1.0, 1.0], quadratic),
    "rosenbrock": Problem([0.0, 0.0], [1.0, 1.0], rosenbrock),
}


def steps_to_solve(rule, problem, blocks=BLOCKS):
    """After how many steps x is, and a block later still is, at the minimum; None if it never is."""
    x = problem.start.copy()
    state = opt.setup(rule, x)
    there = None
    for block in range(1, blocks + 1):
        for _ in range(BLOCK):
            state, x = opt.update_(state, x, problem.gradient(x))
        if np.allclose(x, problem.minimum, TOLERANCE, TOLERANCE):
            if there is not None:
                return there
            there = block * BLOCK
        else:
            there = None
    return None


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("row", [row for row in ROWS if row.rates], ids=lambda row: row.name)
def test_the_minimum_is_found(row, problem):
    eta = row.rates[list(PROBLEMS).index(problem)]
    assert steps_to_solve(opt.adjust(row.configs[0], eta), PROBLEMS[problem]) is not None
