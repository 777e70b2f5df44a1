"""What counts as a number in a field: NumPy's whole numbers, and none that are too large."""

import numpy as np
import pytest

import optimisers as opt

HUGE = 10**400
WHOLE = [
    pytest.param(opt.AccumGrad, lambda rule: rule.n, id="AccumGrad.n"),
    pytest.param(lambda n: opt.Apollo(rank=n), lambda rule: rule.rank, id="Apollo.rank"),
    pytest.param(lambda n: opt.Apollo(u=n), lambda rule: rule.u, id="Apollo.u"),
    pytest.param(lambda n: opt.Apollo(seed=n), lambda rule: rule.seed, id="Apollo.seed"),
    pytest.param(lambda n: opt.Muon(blocks=n), lambda rule: rule.blocks, id="Muon.blocks"),
    pytest.param(lambda n: opt.Muon(blocks=(n, 1)), lambda rule: rule.blocks[0], id="Muon.blocks of sizes"),
    pytest.param(lambda n: opt.Muon(batch_dims=n), lambda rule: rule.batch_dims, id="Muon.batch_dims"),
    pytest.param(lambda n: opt.Orthogonalise(blocks=n), lambda rule: rule.blocks, id="Orthogonalise.blocks"),
    pytest.param(lambda n: opt.NewtonSchulz(steps=n), lambda ns: ns.steps, id="NewtonSchulz.steps"),
    pytest.param(lambda n: opt.StochasticRounding(opt.Adam(), seed=n), lambda rule: rule.seed, id="StochasticRounding.seed"),
]


@pytest.mark.parametrize("number", [np.int64(2), np.uint8(2), np.array(2)], ids=["int64", "uint8", "0-d array"])
@pytest.mark.parametrize(("make", "field"), WHOLE)
def test_a_numpy_integer_is_a_whole_number(make, field, number):
    assert make(number) == make(2)
    assert type(field(make(number))) is int


@pytest.mark.parametrize("wrong", [2.0, np.float64(2.0), True, np.True_, "2", None, -1, np.array([2])])
@pytest.mark.parametrize(("make", "field"), WHOLE)
def test_what_is_no_count_is_refused(make, field, wrong):
    if wrong is None and make(2) != make(3) and isinstance(make(2), opt.Apollo) and field(make(2)) == make(2).rank:
        return  # None is Apollo's own choice of a rank
    with pytest.raises(opt.HyperParameterError, match="must be"):
        make(wrong)


@pytest.mark.parametrize("number", [2**63, HUGE, 10**5000], ids=["2**63", "HUGE", "10**5000"])
@pytest.mark.parametrize(("make", "field"), WHOLE)
def test_a_count_beyond_64_bits_is_refused(make, field, number):
    with pytest.raises(opt.HyperParameterError, match="must be"):
        make(number)


def test_a_rank_function_may_give_a_numpy_integer():
    model = {"w": np.ones((6, 4))}
    state = opt.setup(opt.Apollo(rank=lambda side: np.int64(side // 2)), model)
    assert state["w"].state[0][0].shape == (3, 6)


NUMBERS = [
    pytest.param(opt.Descent, id="eta"),
    pytest.param(lambda x: opt.Adam(epsilon=x), id="epsilon"),
    pytest.param(lambda x: opt.Adam(beta=(x, 0.9)), id="beta"),
    pytest.param(opt.ClipNorm, id="omega"),
    pytest.param(lambda x: opt.Rprop(gamma=(1e-6, x)), id="gamma"),
    pytest.param(lambda x: opt.NewtonSchulz(epsilon=x), id="NewtonSchulz.epsilon"),
    pytest.param(lambda x: opt.NewtonSchulz(safety=x), id="NewtonSchulz.safety"),
    pytest.param(lambda x: opt.NewtonSchulz(coefficients=[(x, 1.0, 1.0)]), id="NewtonSchulz.coefficients"),
    pytest.param(lambda x: opt.adjust(opt.Adam(), x), id="adjust"),
    pytest.param(lambda x: opt.adjust(opt.Adam(), times=x), id="adjust times"),
    pytest.param(opt.schedules.Constant, id="Constant.value"),
    pytest.param(lambda x: opt.schedules.Linear(0.1, x, 3), id="Linear.end"),
]


@pytest.mark.parametrize("number", [HUGE, 10**5000, -HUGE], ids=["HUGE", "10**5000", "-HUGE"])
@pytest.mark.parametrize("make", NUMBERS)
def test_a_number_that_no_float_can_hold_is_refused(make, number):
    with pytest.raises(opt.HyperParameterError, match="must be"):
        make(number)


def test_the_message_tells_the_size_of_a_number_too_long_to_read():
    with pytest.raises(opt.HyperParameterError) as caught:
        opt.Descent(HUGE)
    assert str(caught.value) == "Descent: field 'eta' must be a finite number >= 0; got a whole number of 1,329 bits"
    with pytest.raises(opt.HyperParameterError) as caught:
        opt.AccumGrad(2**63)
    assert str(caught.value) == "AccumGrad: field 'n' must be a whole number >= 1 and < 2**63; got 9223372036854775808"


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5)])
def test_numpy_numbers_are_numbers(number):
    assert opt.adjust(opt.Adam(0.002), times=number) == opt.Adam(0.001)
    assert opt.NewtonSchulz(epsilon=number) == opt.NewtonSchulz(epsilon=0.5)
    assert opt.Descent(number) == opt.Descent(0.5)


def test_a_numpy_integer_indexes_summarises_and_groups():
    model = {"a": [np.ones((2, 2)), np.ones(2)]}
    state = opt.setup(opt.Adam(), model)
    assert state["a"][np.int64(-1)] == state["a"][1]
    assert opt.summary(state, model, depth=np.int64(1)) == opt.summary(state, model, depth=1)
    assert opt.metrics(state, model, model, by=np.int64(1)).keys() == {"a"}


def test_blocks_of_an_empty_matrix_are_as_many_as_wanted():
    model = {"w": np.ones((0, 4))}
    state = opt.setup(opt.Muon(blocks=2**62), model)
    assert opt.update(state, model, model)[1]["w"].shape == (0, 4)


def test_as_many_blocks_as_rows_are_the_rows_alone():
    model = {"w": np.random.default_rng(0).normal(size=(6, 4))}
    for blocks in (6, (1,) * 6):
        state = opt.setup(opt.Orthogonalise(blocks=blocks, ns=opt.NewtonSchulz(30, "polar_express")), model)
        step = model["w"] - opt.update(state, model, model)[1]["w"]
        assert np.allclose(step, model["w"] / np.linalg.norm(model["w"], axis=1, keepdims=True))
