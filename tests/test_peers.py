"""Fifty steps beside torch.optim and optax, in float64: where formulas meet, and by what they differ where they do not.

What these tests show is the table of docs/comparison.md.
"""

import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch

import optimisers as opt

STEPS = 50
ROOT = Path(__file__).resolve().parent.parent
_RNG = np.random.default_rng(20)
START = _RNG.standard_normal((5, 3))
GRADIENTS = _RNG.standard_normal((STEPS, 5, 3)) * np.exp(_RNG.standard_normal((STEPS, 1, 1)))


@pytest.fixture(autouse=True)
def _float64():
    """jax computes in float64 when told to; torch's NAdam takes its scalars in the default dtype."""
    before, dtype = jax.config.jax_enable_x64, torch.get_default_dtype()
    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
    jax.config.update("jax_enable_x64", before)


def ours(rule):
    state, model = opt.setup(rule, START), START
    path = [START]
    for dx in GRADIENTS:
        state, model = opt.update(state, model, dx)
        path.append(model)
    return np.stack(path)


def by_torch(make, before_step=lambda parameter, optimiser, step: None):
    parameter = torch.nn.Parameter(torch.tensor(START))
    optimiser = make([parameter])
    path = [START]
    for step, dx in enumerate(GRADIENTS):
        parameter.grad = torch.tensor(dx)
        before_step(parameter, optimiser, step)
        optimiser.step()
        path.append(parameter.detach().numpy().copy())
    return np.stack(path)


def by_optax(transformation):
    x = jax.numpy.asarray(START)
    state = transformation.init(x)
    update = jax.jit(transformation.update)
    path = [START]
    for dx in GRADIENTS:
        step, state = update(jax.numpy.asarray(dx), state, x)
        x = optax.apply_updates(x, step)
        path.append(np.asarray(x))
    assert x.dtype == "float64"
    return np.stack(path)


def assert_equal(actual, expected):
    """To 1e-12 of the largest element, at every step."""
    scale = abs(expected).max(axis=(1, 2), keepdims=True)
    assert (abs(actual - expected) <= 1e-12 * scale).all()


def assert_differ(actual, expected, by=1e-6):
    assert abs(actual - expected).max() > by


ADAM = {"eta": 0.02, "beta": (0.8, 0.95), "epsilon": 1e-5}
ADAM_TORCH = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5}
ADAM_OPTAX = {"learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "eps": 1e-5}
ROOT_B2 = 0.95**0.5


# --- torch.optim ---------------------------------------------------------------------------------------------------------

EQUAL_IN_TORCH = {
    "Descent": (opt.Descent(0.1), torch.optim.SGD, {"lr": 0.1}),
    "Momentum": (opt.Momentum(0.1, 0.8), torch.optim.SGD, {"lr": 0.1, "momentum": 0.8}),
    "Nesterov": (opt.Nesterov(0.1, 0.8), torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "WeightDecay": (
        opt.OptimiserChain(opt.WeightDecay(0.1), opt.Momentum(0.1, 0.8)),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1},
    ),
    "Adam": (opt.Adam(**ADAM), torch.optim.Adam, ADAM_TORCH),
    "Adam, L2": (
        opt.OptimiserChain(opt.WeightDecay(0.1), opt.Adam(**ADAM)),
        torch.optim.Adam,
        {**ADAM_TORCH, "weight_decay": 0.1},
    ),
    "AdamW": (opt.AdamW(**ADAM, lambda_=0.1), torch.optim.AdamW, {**ADAM_TORCH, "weight_decay": 0.1}),
    "AdamW, uncoupled": (
        opt.AdamW(**ADAM, lambda_=0.1 * 0.02, couple=False),
        torch.optim.AdamW,
        {**ADAM_TORCH, "weight_decay": 0.1},
    ),
    "AdaMax": (opt.AdaMax(**{**ADAM, "epsilon": 0.0}), torch.optim.Adamax, {**ADAM_TORCH, "eps": 0.0}),
    "NAdam": (
        opt.NAdam(0.02 * ROOT_B2, (0.8, 0.95), 1e-5 * ROOT_B2),
        torch.optim.NAdam,
        {**ADAM_TORCH, "momentum_decay": 1e9},
    ),
    "AdaGrad": (
        opt.AdaGrad(0.1, 1e-3),
        torch.optim.Adagrad,
        {"lr": 0.1, "eps": 1e-3, "initial_accumulator_value": 1e-3},
    ),
    "AdaDelta": (opt.AdaDelta(0.8, 1e-3), torch.optim.Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 1e-3}),
    "AdaDelta, rate": (
        opt.OptimiserChain(opt.AdaDelta(0.8, 1e-3), opt.Descent(0.3)),
        torch.optim.Adadelta,
        {"lr": 0.3, "rho": 0.8, "eps": 1e-3},
    ),
    "RMSProp": (opt.RMSProp(0.02, 0.8, 1e-5), torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "eps": 1e-5}),
    "RMSProp, centred": (
        opt.RMSProp(0.02, 0.8, 1e-5, centred=True),
        torch.optim.RMSprop,
        {"lr": 0.02, "alpha": 0.8, "eps": 1e-5, "centered": True},
    ),
    "Rprop": (
        opt.Rprop(0.02, (0.4, 1.3), (1e-3, 0.1)),
        torch.optim.Rprop,
        {"lr": 0.02, "etas": (0.4, 1.3), "step_sizes": (1e-3, 0.1)},
    ),
}


@pytest.mark.parametrize("name", EQUAL_IN_TORCH)
@pytest.mark.parametrize("foreach", [False, True])
def test_equal_to_torch(name, foreach):
    rule, make, options = EQUAL_IN_TORCH[name]
    assert_equal(ours(rule), by_torch(lambda parameters: make(parameters, foreach=foreach, **options)))


def test_momentum_takes_a_change_of_learning_rate_otherwise_than_torch():
    # Ours multiplies the gradient by eta as it enters the momentum, torch the momentum as it leaves.
    def drop(parameter, optimiser, step):
        if step == 10:
            optimiser.param_groups[0]["lr"] = 0.01

    theirs = by_torch(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.8), drop)
    mine = ours(opt.Scheduled(opt.Momentum(rho=0.8), eta=lambda step: 0.1 if step < 10 else 0.01))
    assert_equal(mine[:11], theirs[:11])
    assert_differ(mine[11], theirs[11])
    # Momentum of rate one, and the rate applied behind it, is torch's order.
    scaled = torch_order(0.8, lambda step: 0.1 if step < 10 else 0.01)
    assert_equal(scaled, theirs)


def torch_order(rho, eta):
    last = opt.Scheduled(opt.Descent(), eta=eta)
    return ours(opt.OptimiserChain(opt.Momentum(1.0, rho), last))


def test_adamw_decays_nothing_by_default():
    assert_equal(ours(opt.AdamW(0.02)), by_torch(lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0)))
    assert_differ(ours(opt.AdamW(0.02)), by_torch(lambda p: torch.optim.AdamW(p, lr=0.02)))


def test_adamax_adds_epsilon_to_the_maximum_and_torch_to_the_gradient_in_it():
    mine = ours(opt.AdaMax(0.02, (0.8, 0.95), 0.1))
    theirs = by_torch(lambda parameters: torch.optim.Adamax(parameters, lr=0.02, betas=(0.8, 0.95), eps=0.1))
    assert_equal(mine[:2], theirs[:2])  # at the first step the two are one
    assert_differ(mine, theirs, by=1e-3)


def test_amsgrad_corrects_no_bias():
    # Without epsilon, torch's corrections are a schedule of the learning rate.
    b1, b2 = 0.8, 0.95
    schedule = opt.Scheduled(
        opt.AMSGrad(beta=(b1, b2), epsilon=0.0),
        eta=lambda step: 0.02 * (1 - b2 ** (step + 1)) ** 0.5 / (1 - b1 ** (step + 1)),
    )
    theirs = by_torch(lambda p: torch.optim.Adam(p, lr=0.02, betas=(b1, b2), eps=0.0, amsgrad=True))
    assert_equal(ours(schedule), theirs)
    assert_differ(ours(opt.AMSGrad(0.02, (b1, b2), 0.0)), theirs)


def test_radam_turns_adaptive_one_step_earlier_than_in_torch():
    # The length of the average, 5th step of beta 0.999, is 4.996: above our threshold (the paper's 4), below torch's 5.
    mine = np.diff(ours(opt.RAdam(0.02, (0.9, 0.999), 0.0)), axis=0)
    theirs = np.diff(by_torch(lambda p: torch.optim.RAdam(p, lr=0.02, betas=(0.9, 0.999), eps=0.0)), axis=0)
    same = [step for step in range(STEPS) if np.allclose(mine[step], theirs[step], rtol=1e-9, atol=1e-14)]
    assert same == [step for step in range(STEPS) if step != 4]


def test_radam_adds_epsilon_to_the_corrected_root_and_torch_to_the_plain_one():
    mine = ours(opt.RAdam(0.02, (0.9, 0.999), 1e-2))
    theirs = by_torch(lambda p: torch.optim.RAdam(p, lr=0.02, betas=(0.9, 0.999), eps=1e-2))
    assert_equal(mine[:5], theirs[:5])
    assert_differ(np.diff(mine[6:], axis=0), np.diff(theirs[6:], axis=0), by=1e-5)


def test_nadam_has_no_momentum_schedule():
    theirs = by_torch(lambda p: torch.optim.NAdam(p, **ADAM_TORCH))
    assert_differ(ours(opt.NAdam(0.02 * ROOT_B2, (0.8, 0.95), 1e-5 * ROOT_B2)), theirs, by=1e-3)


def test_centred_rmsprop_never_takes_the_root_of_a_negative_number():
    # A constant gradient has no variance; rounding makes torch's a little negative.
    x = torch.nn.Parameter(torch.zeros(1000))
    dx = torch.linspace(0.1, 1.0, 1000)
    theirs = torch.optim.RMSprop([x], lr=0.01, alpha=0.5, eps=0.0, centered=True)
    state, model = opt.setup(opt.RMSProp(0.01, 0.5, 1e-8, centred=True), torch.zeros(1000)), torch.zeros(1000)
    for _ in range(60):
        x.grad = dx.clone()
        theirs.step()
        state, model = opt.update(state, model, dx)
    assert x.isnan().any()
    assert model.isfinite().all()


def test_clipping_by_norm_beside_torch():
    # torch adds 1e-6 to the norm, so that it clips a little more, and a norm just below the bound too.
    dx = GRADIENTS[0]
    parameter = torch.nn.Parameter(torch.tensor(START))
    for omega in (0.1, 1e6):
        parameter.grad = torch.tensor(dx)
        norm = torch.nn.utils.clip_grad_norm_([parameter], omega).item()
        for rule in (opt.ClipNorm(omega), opt.ClipGlobalNorm(omega)):
            _, moved = opt.update(opt.setup(rule, START), START, dx)
            step = START - moved
            if omega < norm:
                np.testing.assert_allclose(step, parameter.grad.numpy() * (norm + 1e-6) / norm, rtol=1e-10)
            else:
                np.testing.assert_allclose(step, dx, rtol=1e-10)


def test_clipping_by_value_beside_torch():
    parameter = torch.nn.Parameter(torch.tensor(START))
    parameter.grad = torch.tensor(GRADIENTS[0])
    torch.nn.utils.clip_grad_value_([parameter], 0.3)
    _, step = opt.ClipGrad(0.3).apply(None, START, GRADIENTS[0])
    np.testing.assert_array_equal(step, parameter.grad.numpy())


# --- optax ---------------------------------------------------------------------------------------------------------------

EQUAL_IN_OPTAX = {
    "Descent": (opt.Descent(0.1), lambda: optax.sgd(0.1)),
    "Momentum": (opt.Momentum(0.1, 0.8), lambda: optax.sgd(0.1, momentum=0.8)),
    "Nesterov": (opt.Nesterov(0.1, 0.8), lambda: optax.sgd(0.1, momentum=0.8, nesterov=True)),
    "Adam": (opt.Adam(**ADAM), lambda: optax.adam(**ADAM_OPTAX)),
    "AdamW": (opt.AdamW(**ADAM, lambda_=0.1), lambda: optax.adamw(**ADAM_OPTAX, weight_decay=0.1)),
    "NAdam": (
        opt.NAdam(0.02 * ROOT_B2, (0.8, 0.95), 1e-5 * ROOT_B2),
        lambda: optax.nadam(**ADAM_OPTAX),
    ),
    "RAdam": (opt.RAdam(**ADAM), lambda: optax.radam(**ADAM_OPTAX, threshold=4.0)),
    "AdaMax": (opt.AdaMax(**{**ADAM, "epsilon": 0.0}), lambda: optax.adamax(**{**ADAM_OPTAX, "eps": 0.0})),
    "AMSGrad": (
        opt.AMSGrad(**{**ADAM, "epsilon": 0.0}),
        lambda: optax.amsgrad(**{**ADAM_OPTAX, "eps": 0.0}, bias_correction_mu=False, bias_correction_nu=False),
    ),
    "AdaBelief": (opt.AdaBelief(**ADAM), lambda: optax.adabelief(**ADAM_OPTAX, eps_root=1e-5)),
    "AdaGrad": (opt.AdaGrad(0.1, 0.0), lambda: optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0)),
    "AdaDelta": (opt.AdaDelta(0.8, 1e-3), lambda: optax.adadelta(1.0, rho=0.8, eps=1e-3)),
    "RMSProp": (opt.RMSProp(0.02, 0.8, 1e-5), lambda: optax.rmsprop(0.02, decay=0.8, eps=1e-5, eps_in_sqrt=False)),
    "RMSProp, centred": (
        opt.RMSProp(0.02, 0.8, 1e-5, centred=True),
        lambda: optax.rmsprop(0.02, decay=0.8, eps=1e-5, eps_in_sqrt=False, centered=True),
    ),
    "Lion": (opt.Lion(0.02, (0.8, 0.95)), lambda: optax.lion(0.02, b1=0.8, b2=0.95, weight_decay=0.0)),
    "Lion, decay": (
        opt.OptimiserChain(opt.Lion(0.02, (0.8, 0.95)), opt.WeightDecay(0.02 * 0.1)),
        lambda: optax.lion(0.02, b1=0.8, b2=0.95, weight_decay=0.1),
    ),
    "WeightDecay": (
        opt.OptimiserChain(opt.WeightDecay(0.1), opt.Adam(**ADAM)),
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(**ADAM_OPTAX)),
    ),
    "ClipGrad": (
        opt.OptimiserChain(opt.ClipGrad(0.3), opt.Adam(**ADAM)),
        lambda: optax.chain(optax.clip(0.3), optax.adam(**ADAM_OPTAX)),
    ),
    "ClipGlobalNorm": (
        opt.OptimiserChain(opt.ClipGlobalNorm(2.0), opt.Adam(**ADAM)),
        lambda: optax.chain(optax.clip_by_global_norm(2.0), optax.adam(**ADAM_OPTAX)),
    ),
    "AccumGrad": (
        opt.OptimiserChain(opt.AccumGrad(4), opt.Adam(**ADAM)),
        lambda: optax.MultiSteps(optax.adam(**ADAM_OPTAX), 4, accumulator_dtype="float64"),
    ),
    "Scheduled": (
        opt.Scheduled(opt.Adam(beta=(0.8, 0.95), epsilon=1e-5), eta=lambda step: 0.1 * 0.9**step),
        lambda: optax.adam(lambda count: 0.1 * 0.9 ** count.astype("float64"), b1=0.8, b2=0.95, eps=1e-5),
    ),
}


@pytest.mark.parametrize("name", EQUAL_IN_OPTAX)
def test_equal_to_optax(name):
    rule, make = EQUAL_IN_OPTAX[name]
    assert_equal(ours(rule), by_optax(make()))


def test_optax_schedules_are_taken_as_they_are():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 40)
    rule = opt.Scheduled(opt.Adam(beta=(0.8, 0.95), epsilon=1e-5), eta=schedule)
    theirs = by_optax(optax.adam(schedule, b1=0.8, b2=0.95, eps=1e-5))
    np.testing.assert_allclose(ours(rule), theirs, rtol=1e-6, atol=1e-6)  # optax computes this schedule in float32


def test_clip_global_norm_over_a_tree():
    rng = np.random.default_rng(3)
    tree = {"a": rng.standard_normal((3, 4)), "b": [rng.standard_normal(5), rng.standard_normal(())]}
    tree["b"][1] = np.asarray(tree["b"][1])
    clip = optax.clip_by_global_norm(0.5)
    for factor in (0.01, 1.0):
        grads = jax.tree.map(lambda x, by=factor: np.asarray(by * x), tree)
        expected, _ = clip.update(jax.tree.map(jax.numpy.asarray, grads), clip.init(tree))
        _, moved = opt.update(opt.setup(opt.ClipGlobalNorm(0.5), tree), tree, grads)
        for x, new, step in zip(*map(jax.tree.leaves, (tree, moved, expected)), strict=True):
            np.testing.assert_allclose(x - new, step, rtol=1e-10, atol=1e-15)


def test_optimistic_adam_takes_its_first_step_twice():
    # Ours counts the step before the first as zero, as the paper does; optax as equal to the first.
    mine = np.diff(ours(opt.OAdam(**ADAM)), axis=0)
    theirs = np.diff(by_optax(optax.optimistic_adam_v2(**ADAM_OPTAX, nesterov=False)), axis=0)
    np.testing.assert_allclose(mine[0], 2 * theirs[0], rtol=1e-12)
    np.testing.assert_allclose(mine[1:], theirs[1:], rtol=1e-9, atol=1e-14)


def test_rmsprop_in_optax_adds_epsilon_under_the_root_by_default():
    assert_differ(ours(opt.RMSProp(0.02, 0.8, 0.1)), by_optax(optax.rmsprop(0.02, decay=0.8, eps=0.1)), by=1e-3)


def test_rprop_in_optax_begins_with_no_step():
    mine = ours(opt.Rprop(0.02))
    theirs = by_optax(optax.rprop(0.02))
    assert (mine[1] != mine[0]).all()
    np.testing.assert_array_equal(theirs[1], theirs[0])


def test_radam_in_optax_turns_adaptive_at_five_by_default():
    mine = np.diff(ours(opt.RAdam(0.02, (0.9, 0.999))), axis=0)
    theirs = np.diff(by_optax(optax.radam(0.02, b1=0.9, b2=0.999)), axis=0)
    same = [step for step in range(STEPS) if np.allclose(mine[step], theirs[step], rtol=1e-9, atol=1e-14)]
    assert same == [step for step in range(STEPS) if step != 4]


def test_defaults_of_lion():
    # optax decays weights unless told otherwise.
    assert_differ(ours(opt.Lion(1e-2)), by_optax(optax.lion(1e-2)))
    assert_equal(ours(opt.Lion(1e-2)), by_optax(optax.lion(1e-2, weight_decay=0.0)))


# --- the page ------------------------------------------------------------------------------------------------------------


def test_the_comparison_lists_what_is_compared():
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    compared = {name.split(",")[0] for name in (*EQUAL_IN_TORCH, *EQUAL_IN_OPTAX)} | {"OAdam", "ClipNorm"}
    assert compared <= listed
    assert all(hasattr(opt, name) for name in listed)
