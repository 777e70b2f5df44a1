"""SkipNonFinite: no step for a group in which a gradient is not finite, and an account of it."""

import copy
import math

import numpy as np
import optree
import pytest
import torch

import optimisers as opt
from optimisers.errors import ArgumentError, NonFiniteError, RuleError

LIBRARIES = pytest.mark.parametrize("lib", ["numpy", "torch"])
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def array(lib, values, dtype="float32"):
    return np.array(values, dtype) if lib == "numpy" else torch.tensor(values, dtype=getattr(torch, dtype))


def make(lib, dtype="float32"):
    return {name: array(lib, [1.0, 2.0, 3.0], dtype) for name in ("a", "b", "c")}


def grads_of(lib, *, bad=None, dtype="float32"):
    grads = {name: array(lib, [0.5, -0.25, 1.0], dtype) for name in ("a", "b", "c")}
    if bad is not None:
        grads["b"][1] = bad
    return grads


def raw(*trees):
    arrays = [
        np.asarray(x.double() if isinstance(x, torch.Tensor) and not x.is_complex() else x) for x in optree.tree_leaves(trees)
    ]
    return [(x.shape, x.tobytes()) for x in arrays]


def chain(*members):
    return opt.OptimiserChain(opt.SkipNonFinite(), *members)


@LIBRARIES
@BAD
@pytest.mark.parametrize("update", [opt.update, opt.update_])
def test_one_bad_element_skips_the_whole_group_and_is_counted(lib, bad, update):
    model = make(lib)
    state = opt.setup(chain(opt.Adam(0.1)), model)
    state, model = update(state, model, grads_of(lib))
    before, moments = raw(model), raw([state[name].state[1] for name in model])
    state, model = update(state, model, grads_of(lib, bad=bad))
    assert raw(model) == before
    assert raw([state[name].state[1] for name in model]) == moments
    assert opt.skipped(state) == {"a": (1, 0), "b": (1, 1), "c": (1, 0)}
    assert [path for path, count in opt.skipped(state).items() if count.culprit] == ["b"]
    state, model = update(state, model, grads_of(lib))
    assert raw(model) != before
    assert opt.skipped(state)["b"] == (1, 1)


@LIBRARIES
def test_finite_gradients_are_stepped_as_without_it(lib):
    rule = opt.AdamW(0.1, lambda_=0.1)
    ends = []
    for each in (rule, chain(rule)):
        model = make(lib)
        state = opt.setup(each, model)
        for _ in range(3):
            state, model = opt.update(state, model, grads_of(lib))
        ends.append(raw(model))
    assert ends[0] == ends[1]


@LIBRARIES
def test_training_with_bad_steps_is_training_without_them(lib):
    plan = [None, math.nan, None, math.inf, None]
    ends = []
    for steps in (plan, [None] * 3):
        model = make(lib)
        state = opt.setup(opt.Scheduled(chain(opt.Adam(0.1)), eta=lambda t: 0.1 / (t + 1)), model)
        for bad in steps:
            state, model = opt.update(state, model, grads_of(lib, bad=bad))
        assert int(state["a"].state[0]) == 3, "a Scheduled around the chain counts steps taken"
        ends.append(raw(model, [state[name].state[1][1] for name in model]))
    assert ends[0] == ends[1]


@LIBRARIES
def test_groups_skip_apart(lib):
    rule = opt.Route(
        ("b", opt.OptimiserChain(opt.SkipNonFinite("one"), opt.Descent(0.1))),
        otherwise=opt.OptimiserChain(opt.SkipNonFinite("other"), opt.Descent(0.1)),
    )
    model = make(lib)
    state, new = opt.update(opt.setup(rule, model), model, grads_of(lib, bad=math.nan))
    assert raw(new["b"]) == raw(model["b"])
    assert raw(new["a"], new["c"]) != raw(model["a"], model["c"])
    assert opt.skipped(state) == {"a": (0, 0), "b": (1, 1), "c": (0, 0)}


@LIBRARIES
def test_one_group_across_different_chains_and_parameters_without_it(lib):
    rule = opt.Route(
        ("a", opt.OptimiserChain(opt.WeightDecay(0.1), opt.SkipNonFinite(), opt.Momentum())),
        ("b", chain(opt.Adam())),
        ("c", opt.Descent(0.1)),
    )
    model = make(lib)
    state, new = opt.update(opt.setup(rule, model), model, grads_of(lib, bad=math.inf))
    assert raw(new["a"], new["b"]) == raw(model["a"], model["b"])
    assert raw(new["c"]) != raw(model["c"])
    assert opt.skipped(state) == {"a": (1, 0), "b": (1, 1)}


@LIBRARIES
def test_absent_and_frozen_parameters_are_not_looked_at(lib):
    model = make(lib)
    state = opt.freeze(opt.setup(chain(opt.Descent(0.1)), model), where="b")
    state, new = opt.update(state, model, grads_of(lib, bad=math.nan))
    assert raw(new["a"], new["c"]) != raw(model["a"], model["c"])
    assert set(opt.skipped(state).values()) == {(0, 0)}
    state = opt.setup(chain(opt.Descent(0.1)), model)
    bad = grads_of(lib, bad=math.nan)
    state, new = opt.update(state, model, {**bad, "a": None})
    assert raw(new) == raw(model)
    assert opt.skipped(state) == {"a": (0, 0), "b": (1, 1), "c": (1, 0)}


@LIBRARIES
def test_it_spares_the_rules_behind_it_an_error_and_not_those_before_it(lib):
    model, bad = make(lib), grads_of(lib, bad=math.nan)
    for clip in (opt.ClipNorm(1.0), opt.ClipGlobalNorm(1.0), opt.NormGrowthCap()):
        _, new = opt.update(opt.setup(chain(clip, opt.Descent(0.1)), model), model, bad)
        assert raw(new) == raw(model)
        state = opt.setup(opt.OptimiserChain(clip, opt.SkipNonFinite(), opt.Descent(0.1)), model)
        with pytest.raises(NonFiniteError, match="'b'"):
            opt.update(state, model, bad)


@LIBRARIES
def test_with_accumulation_on_either_side(lib):
    gradients = [grads_of(lib), grads_of(lib, bad=math.nan), grads_of(lib)]
    model = make(lib)
    state, new = opt.setup(chain(opt.AccumGrad(2), opt.Descent(1.0)), model), model
    for grads in gradients:  # the bad one is left out of the mean
        state, new = opt.update(state, new, grads)
    np.testing.assert_allclose(np.asarray(new["a"]), [0.5, 2.25, 2.0])
    state, new = opt.setup(opt.OptimiserChain(opt.AccumGrad(2), opt.SkipNonFinite(), opt.Descent(1.0)), model), model
    for grads in gradients[:2]:  # the bad one spoils the mean
        state, new = opt.update(state, new, grads)
    assert raw(new) == raw(model)
    for _ in range(2):
        state, new = opt.update(state, new, gradients[0])
    np.testing.assert_allclose(np.asarray(new["a"]), [0.5, 2.25, 2.0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_inside_mixed_precision(dtype):
    model = make("torch", dtype)
    state = opt.setup(opt.MixedPrecision(chain(opt.Adam(0.1))), model)
    after, new = opt.update(state, model, grads_of("torch", bad=math.inf, dtype=dtype))
    assert raw(new) == raw(model)
    assert raw([after[name].state[0] for name in model]) == raw([state[name].state[0] for name in model])
    assert opt.skipped(after)["b"] == (1, 1)


def test_a_gradient_that_overflows_the_parameters_precision_counts():
    model = {"w": torch.ones(2)}
    state, new = opt.update(opt.setup(chain(opt.Descent()), model), model, {"w": torch.full((2,), 1e300, dtype=torch.float64)})
    assert raw(new) == raw(model)
    assert opt.skipped(state) == {"w": (1, 1)}


def test_a_tree_of_both_libraries_and_complex_arrays():
    model = {"n": np.ones(2), "t": torch.ones(2, dtype=torch.complex64)}
    state = opt.setup(chain(opt.Descent()), model)
    grads = {"n": np.ones(2), "t": torch.tensor([1.0, complex(0.0, math.nan)])}
    state, new = opt.update(state, model, grads)
    assert raw(new) == raw(model)
    assert opt.skipped(state) == {"n": (1, 0), "t": (1, 1)}


def test_the_root_and_a_tied_array():
    x = np.ones(2)
    state, new = opt.update(opt.setup(chain(opt.Descent()), x), x, np.array([1.0, math.nan]))
    assert (new == x).all()
    assert opt.skipped(state) == {"": (1, 1)}
    tied = {"a": x, "b": x}
    state, _ = opt.update(opt.setup(chain(opt.Descent()), tied), tied, {"a": None, "b": np.array([math.inf, 0.0])})
    assert opt.skipped(state) == {"a": (1, 1)}


def test_alone_it_is_descent():
    x, dx = torch.ones(2), torch.tensor([1.0, 2.0])
    rule = opt.SkipNonFinite()
    state, step = rule.apply(rule.init(x), x, dx)
    assert step is dx
    assert rule.apply(state, x, dx * math.nan) == ((1, 1), None)


def test_counts_are_kept_by_pytrees_and_copies():
    model = make("torch")
    state, _ = opt.update(opt.setup(chain(opt.Adam()), model), model, grads_of("torch", bad=math.nan))
    leaves, treedef = optree.tree_flatten(state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    for again in (optree.tree_unflatten(treedef, leaves), copy.deepcopy(state)):
        assert opt.skipped(again) == opt.skipped(state)
        assert opt.skipped(opt.update(again, model, grads_of("torch", bad=math.nan))[0])["b"] == (2, 2)


def test_what_cannot_be_read_is_a_clear_error():
    model = {"w": torch.ones(3, 2)}
    state = opt.setup(chain(opt.Descent()), {"w": torch.ones(2)})
    for transform in (
        lambda f: torch.func.vmap(f)(model["w"]),
        lambda f: torch.func.grad(lambda g: f(g).sum())(torch.ones(2)),
    ):
        with pytest.raises(RuleError, match=r"SkipNonFinite decides on the host.*torch\.func"):
            transform(lambda g: opt.update(state, {"w": torch.ones(2)}, {"w": g})[1]["w"])
    grads = torch.ones(2, requires_grad=True)  # an autograd graph is no obstacle
    _, new = opt.update(state, {"w": torch.ones(2)}, {"w": grads})
    (slope,) = torch.autograd.grad(new["w"].sum(), grads)
    assert (slope == -0.1).all()


def test_skipped_of_something_else():
    with pytest.raises(ArgumentError, match="expected the state"):
        opt.skipped({"w": 1})
    assert opt.skipped(opt.setup(opt.Adam(), np.ones(2))) == {}


def test_loss_scaling_by_hand():
    """What GradScaler does, with update_: halve the scale after an overflow, and take no step."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    state = opt.setup(chain(opt.Adam(0.05)), net)
    scale, losses, seen = 2.0**130, [], 0
    for _ in range(60):
        net.zero_grad()
        loss = (net(x) - y).square().mean()
        (loss * scale).backward()
        grads = {name: p.grad / scale for name, p in net.named_parameters()}
        state, net = opt.update_(state, net, grads)
        skips = max(count.steps for count in opt.skipped(state).values())
        scale, seen = scale / 2 ** (skips - seen), skips
        losses.append(loss.item())
    assert seen >= 1
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in net.parameters())
