"""Which rules of the table become loops, and why the others do not: an elementwise or measured one must."""

import numpy as np
import pytest
import torch

import optimisers as opt
from looped import held
from optimisers.rules._states import state_leaves
from table import ROWS

SIDES = "works with sums over rows or columns, which a loop over elements does not have"
MATRICES = "keeps matrices or numbers for rows beside the array, of another shape"
PLACES = "draws numbers by place in the array, with integer arithmetic that loops do not have"
BLOCKS = "keeps codes, of another length than the array, and works in blocks"
NO_LAW = "promises nothing"
NOT_LOOPS = {
    "Adafactor": SIDES,
    "AdamMini": SIDES,
    "AdaptiveClip": SIDES,
    "Apollo": MATRICES,
    "Came": SIDES,
    "Centralise": SIDES,
    "Dion": MATRICES,
    "GradientNoise": PLACES,
    "Kron": MATRICES,
    "LowRank": MATRICES,
    "LowRank at random": MATRICES,
    "NorMuon": MATRICES,
    "Projected by a callable": NO_LAW,
    "Projected rows": SIDES,
    "Quantised": BLOCKS,
    "Shampoo": MATRICES,
    "SOAP": MATRICES,
    "StochasticRounding": PLACES,
    "a user's rule": NO_LAW,
    "a user's stackable rule": SIDES,
}


def stepped(rule, kind):
    """The state of three matrices after three steps."""
    rng = np.random.default_rng(0)
    model = {f"w{i}": rng.standard_normal((6, 5)).astype(np.float32) for i in range(3)}
    if kind == "torch":
        model = {name: torch.from_numpy(x) for name, x in model.items()}
    grads, state = dict(model), opt.setup(rule, model)
    for _ in range(3):
        state, model = opt.update(state, model, grads)
    return state


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_rule_is_a_loop_unless_a_reason_is_given(row, kind):
    looped = {held(stepped(rule, kind)) == 3 for rule in row.configs}
    assert looped == {row.name not in NOT_LOOPS}
    if row.law in {"elementwise", "measured"}:
        assert looped == {True}


@pytest.mark.parametrize("name", [name for name, reason in NOT_LOOPS.items() if reason in {MATRICES, BLOCKS}])
def test_what_a_state_is_said_to_keep_it_keeps(name):
    (row,) = [row for row in ROWS if row.name == name]
    leaves = state_leaves([opt.setup(rule, np.ones((6, 5)))[()].state for rule in row.configs])
    assert {np.shape(leaf) for leaf in leaves} - {(6, 5), ()}


def test_reasons_are_of_rules_that_there_are():
    assert NOT_LOOPS.keys() <= {row.name for row in ROWS}
