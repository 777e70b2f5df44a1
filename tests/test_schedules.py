"""Schedules: equal to those of torch and optax, constant after their end, values like rules."""

import math
import pickle

import numpy as np
import optax
import pytest
import torch

import optimisers as opt
from optimisers import schedules as s
from optimisers.errors import HyperParameterError

EACH = (
    s.Constant(0.1),
    s.Linear(0.1, 0.02, 30),
    s.Polynomial(0.1, 0.01, 30, power=1.5),
    s.Cosine(0.1, 0.01, 30),
    s.Exponential(0.1, 0.9, every=7),
    s.Steps(0.1, 0.5, 7),
    s.Steps(0.1, 0.5, (3, 20)),
    s.InverseSqrt(0.1, 8),
    s.Joined((s.Linear(0.0, 0.1, 5), s.Constant(0.1), s.Cosine(0.1, 0.0, 20)), (5, 12)),
    s.WarmupCosine(0.1, 5, 30, start=0.01, end=0.001),
    s.WarmupStableDecay(0.1, 5, 30, 10, shape="sqrt"),
)


def from_torch(make):
    """The learning rates that a scheduler of torch sets, starting from 0.1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = make(optimizer)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


T = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [
        (s.Constant(0.1), lambda o: T.ConstantLR(o, 1.0, 5), 50),
        (s.Linear(0.1 * 0.25, 0.1 * 0.75, 20), lambda o: T.LinearLR(o, 0.25, 0.75, 20), 50),
        (s.Polynomial(0.1, 0.0, 20, power=1.5), lambda o: T.PolynomialLR(o, 20, 1.5), 50),
        (s.Cosine(0.1, 0.01, 30), lambda o: T.CosineAnnealingLR(o, 30, 0.01), 31),
        (s.Exponential(0.1, 0.9), lambda o: T.ExponentialLR(o, 0.9), 50),
        (s.Steps(0.1, 0.5, 7), lambda o: T.StepLR(o, 7, 0.5), 50),
        (s.Steps(0.1, 0.5, (3, 20)), lambda o: T.MultiStepLR(o, [3, 20], 0.5), 50),
        (
            s.Joined((s.Linear(0.05, 0.1, 10), s.Exponential(0.1, 0.9)), (10,)),
            lambda o: T.SequentialLR(o, [T.LinearLR(o, 0.5, 1.0, 10), T.ExponentialLR(o, 0.9)], [10]),
            50,
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, s.Schedule) else "",
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR calls it itself
def test_the_rates_are_those_of_torchs_schedulers(ours, theirs, steps):
    np.testing.assert_allclose([ours(t) for t in range(steps)], from_torch(theirs)[:steps], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (s.Constant(0.1), optax.constant_schedule(0.1)),
        (s.Linear(0.1, 0.02, 30), optax.linear_schedule(0.1, 0.02, 30)),
        (s.Polynomial(0.1, 0.01, 30, power=1.5), optax.polynomial_schedule(0.1, 0.01, 1.5, 30)),
        (s.Cosine(0.1, 0.01, 30), optax.cosine_decay_schedule(0.1, 30, alpha=0.1)),
        (s.Exponential(0.1, 0.9, every=7), optax.exponential_decay(0.1, 7, 0.9)),
        (s.Steps(0.1, 0.5, (3, 20)), optax.piecewise_constant_schedule(0.1, {3: 0.5, 20: 0.5})),
        (s.WarmupCosine(0.1, 5, 30, 0.01, 0.001), optax.warmup_cosine_decay_schedule(0.01, 0.1, 5, 30, 0.001)),
        (
            s.Joined((s.Linear(0.05, 0.1, 10), s.Cosine(0.1, 0.0, 20)), (10,)),
            optax.join_schedules([optax.linear_schedule(0.05, 0.1, 10), optax.cosine_decay_schedule(0.1, 20)], [10]),
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, s.Schedule) else "",
)
def test_the_values_are_those_of_optaxs_schedules(ours, theirs):
    # optax computes in float32.
    np.testing.assert_allclose([ours(t) for t in range(50)], [float(theirs(t)) for t in range(50)], rtol=1e-5, atol=1e-8)


def test_a_warm_up_a_plateau_and_a_decay():
    for shape, half in (("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))):
        schedule = s.WarmupStableDecay(0.1, 4, 30, 10, start=0.02, end=0.01, shape=shape)
        assert [schedule(t) for t in range(4)] == pytest.approx([0.02, 0.04, 0.06, 0.08])
        assert {schedule(t) for t in range(4, 21)} == {0.1}
        assert schedule(25) == pytest.approx(0.01 + 0.09 * half)
        assert schedule(30) == schedule(1000) == pytest.approx(0.01)
    sudden = s.WarmupStableDecay(0.1, 0, 10, 0)
    assert (sudden(0), sudden(9), sudden(10)) == (0.1, 0.1, 0.0)


def test_the_inverse_root_rises_to_its_peak_and_falls():
    schedule = s.InverseSqrt(0.1, 8)
    assert [schedule(0), schedule(4), schedule(8), schedule(32)] == pytest.approx([0.0, 0.05, 0.1, 0.05])


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_a_schedule_is_a_value(schedule):
    assert eval(repr(schedule), vars(s)) == schedule
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert all(isinstance(schedule(t), float) for t in range(50))
    assert all(math.isfinite(schedule(t)) for t in range(0, 10**6, 9999))


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_a_schedule_drives_a_rule(schedule):
    """The state with a schedule takes the steps that a rate set before each step gives."""
    x = {"w": np.ones(3)}
    state = opt.setup(opt.Scheduled(opt.Momentum(), eta=schedule), x)
    plain, y = opt.setup(opt.Momentum(), x), x
    for t in range(12):
        grads = {"w": np.full(3, 0.5 + t)}
        state, x = opt.update(state, x, grads)
        plain, y = opt.update(opt.adjust(plain, schedule(t)), y, grads)
        assert x["w"].tobytes() == y["w"].tobytes()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: s.Linear(0.1, 0.0, 0), "Linear: field 'steps' must be a whole number >= 1; got 0"),
        (lambda: s.Linear(math.nan, 0.0, 3), "Linear: field 'start' must be a finite number; got nan"),
        (lambda: s.Cosine(0.1, "0", 3), "Cosine: field 'end' must be a finite number; got '0'"),
        (lambda: s.Polynomial(0.1, 0.0, 3, power=0.0), "Polynomial: field 'power' must be a number > 0; got 0.0"),
        (lambda: s.Exponential(0.1, -0.5), "Exponential: field 'factor' must be a number > 0; got -0.5"),
        (lambda: s.Steps(0.1, 0.5, 0), "Steps: field 'at' must be a whole number >= 1, or rising ones; got 0"),
        (lambda: s.Steps(0.1, 0.5, (5, 5)), "Steps: field 'at' must be a whole number >= 1, or rising ones; got (5, 5)"),
        (lambda: s.InverseSqrt(0.1, 0), "InverseSqrt: field 'warmup' must be a whole number >= 1; got 0"),
        (
            lambda: s.Joined((s.Constant(0.1),), (3,)),
            "Joined: field 'at' must be of length 0, one less than schedules; got (3,)",
        ),
        (lambda: s.Joined((0.1,), ()), "Joined: field 'schedules' must be a tuple of callables; got (0.1,)"),
        (lambda: s.WarmupCosine(0.1, 10, 10), "WarmupCosine: field 'steps' must be more than the 10 steps of warm-up; got 10"),
        (
            lambda: s.WarmupStableDecay(0.1, 5, 10, 6),
            "WarmupStableDecay: field 'steps' must be at least warmup + decay, which is 11; got 10",
        ),
        (
            lambda: s.WarmupStableDecay(0.1, 5, 20, 6, shape="log"),
            "field 'shape' must be 'linear', 'cosine' or 'sqrt'; got 'log'",
        ),
    ],
)
def test_a_schedule_refuses_what_it_cannot_be(make, text):
    with pytest.raises(HyperParameterError) as caught:
        make()
    assert text in str(caught.value)
