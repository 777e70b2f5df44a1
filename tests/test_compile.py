"""``update`` inside ``torch.compile``."""

import logging
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import optimisers as opt
from optimisers.errors import ConsumedStateError
from optimisers.rules._base import TransformingRule, walk
from optimisers.rules.matrices._matrix_rule import MatrixRule
from table import cases

RULES = {name.replace(".", "-"): rule for name, row, rule in cases(every=False, host_counter=False)}
SOME = (
    "RAdam",
    "AdamW",
    "Muon",
    "Apollo",
    "StochasticRounding",
    "NormGrowthCap",
    "ClipNorm > ClipGlobalNorm > Momentum > ClipNorm",
)
ON_THE_HOST = [pytest.param(rule, id=name) for name, _, rule in cases(every=False, host_counter=True, min_ndim=0)]


@pytest.fixture(autouse=True)
def _afresh(monkeypatch, switch):
    switch("rules")  # whose bits a trace gives: loops have another root, and other sums
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep all that the tracer tells
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def a_model(dtype=torch.float32):
    return {"w": torch.randn(3, 4).to(dtype), "rest": [torch.randn(4).to(dtype)], "layers": 2}


def loss_of(params):
    return (abs(params["w"] - 0.5) ** 2).sum() + sum((i + 2) * (abs(x) ** 2).sum() for i, x in enumerate(params["rest"]))


def train_step(state, model):
    """A step as users write it: gradients and update in one function."""
    grads = torch.func.grad(loss_of)({name: x for name, x in model.items() if name != "layers"})
    return opt.update(state, model, {**grads, "layers": None})


def compiled(function, backend="eager"):
    counting = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counting), counting


def run(step, state, model, count=4):
    for _ in range(count):
        state, model = step(state, model)
    return state, model


def assert_equal(actual, expected):
    actual, expected = optree.tree_leaves(actual), optree.tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_close(actual, expected, **tolerance):
    actual, expected = optree.tree_leaves(actual), optree.tree_leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# --- the rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "backend"), [(RULES, "eager"), (SOME, "aot_eager")], ids=["eager", "aot_eager"])
def test_rules(names, backend, switch):
    """One array for each rule, all in one step, since it is compiling that takes the time."""
    model = {name: torch.randn(3, 4) for name in names}

    def step(state, model):
        return opt.update(state, model, {name: 2 * x - 0.5 for name, x in model.items()})

    state = opt.setup(lambda param: RULES[param.path], model)
    fast, counting = compiled(step, backend)
    after_two = run(fast, state, model, 2)
    compilations = counting.frame_count
    actual = run(fast, *after_two, 2)
    assert counting.frame_count == compilations, "compiled anew after the second step"
    switch("rules")  # a trace runs the rules themselves, of which loops differ in the last place of a root
    expected = run(step, state, model)
    for name in names:
        pairs = (actual[1][name], expected[1][name]), (actual[0][name].state, expected[0][name].state)
        # In a trace the norm of a matrix is not read.
        whole = any(isinstance(rule, (TransformingRule, MatrixRule)) for rule in walk(RULES[name]))
        if whole:
            assert_close(*zip(*pairs, strict=True), rtol=0, atol=5e-4)  # five steps amplify what rounds otherwise
        elif backend == "eager":
            assert_equal(*zip(*pairs, strict=True))
            assert actual[0][name] == expected[0][name]
        else:  # 1 / x is rounded twice where x is a tensor
            assert_close(*zip(*pairs, strict=True), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_inductor():
    model = {"w": torch.randn(4, 3), "b": torch.randn(3)}
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.AdamW(0.1, lambda_=0.1))

    def step(state, model):
        return opt.update(state, model, torch.func.grad(lambda p: (p["w"].sum(0) + p["b"]).square().sum())(model))

    state = opt.setup(rule, model)
    actual = run(torch.compile(step, fullgraph=True), state, model, 3)
    assert_close(actual, run(step, state, model, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ON_THE_HOST)
def test_a_rule_that_decides_on_the_host_says_so(rule):
    model = a_model()
    state = opt.setup(rule, model)
    step, _ = compiled(train_step)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"RuleError: .*cannot be read inside torch.func"):
        step(state, model)


def test_without_fullgraph_such_a_rule_runs_uncompiled():
    model = a_model()
    state = opt.setup(opt.OptimiserChain(opt.AccumGrad(2), opt.Adam(0.1)), model)
    assert_equal(run(torch.compile(train_step, backend="eager"), state, model), run(train_step, state, model))


def test_checks_have_no_effect():
    def step(state, x, dx):
        return opt.update(state, x, dx)

    x = torch.ones(2)
    state = opt.setup(opt.ClipNorm(1.0), x)
    _, end = compiled(step)[0](state, x, torch.tensor([1.0, math.nan]))
    assert end.isnan().any()


# --- precisions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("rule", [opt.Adam(0.1), opt.MixedPrecision(opt.Momentum(0.1))], ids=["Adam", "MixedPrecision"])
def test_precisions(rule, dtype):
    model = a_model(dtype=dtype)
    state = opt.setup(rule, model)
    step, _ = compiled(train_step, "aot_eager")
    assert_close(run(step, state, model, 3), run(train_step, state, model, 3))


# --- hyper-parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["float", "tensor"])
def test_changed_learning_rates_are_data(number):
    model = a_model()
    state = opt.setup(opt.AdamW(number(0.1)), model)
    step, counting = compiled(train_step)
    actual, expected = run(step, state, model, 2), run(train_step, state, model, 2)
    seen = []
    for eta in (0.05, 0.04, 0.03, 0.02):
        actual, expected = [
            f(opt.adjust(state, eta=number(eta)), model) for f, (state, model) in ((step, actual), (train_step, expected))
        ]
        seen.append(counting.frame_count)
    assert_close(actual, expected)
    assert len(set(seen[1:])) == 1, "only the first two changes compile anew: one for the change, one to make the number data"


def test_other_numbers_of_a_rule_compile_anew():
    model = a_model()
    step, _ = compiled(train_step)
    for p in (2.0, 1.0, math.inf, 3.0):
        state = opt.setup(opt.ClipGlobalNorm(0.5, p), model)
        assert_equal(step(state, model), train_step(state, model))


# --- trees ---------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    weight: Any
    bias: Any


def check_three_steps(step, state, model, backend="eager"):
    actual = run(compiled(step, backend)[0], state, model, 3)
    assert_equal(actual, run(step, state, model, 3))
    return actual


def test_named_tuples_and_order_of_keys():
    model = {"z": Layer(torch.randn(2, 2), [torch.randn(2)]), "a": (torch.randn(3), None, "tanh")}
    _, end = check_three_steps(lambda state, model: opt.update(state, model, model), opt.setup(opt.Adam(0.1), model), model)
    assert list(end) == ["z", "a"]
    assert isinstance(end["z"], Layer)


def test_tied_arrays_are_stepped_once():
    w = torch.randn(3, 3)
    model = {"a": w, "b": w, "c": w.T}

    def step(state, model):
        return opt.update(state, model, {"a": 2 * model["a"], "b": 3 * model["a"], "c": None})

    state, end = check_three_steps(step, opt.setup(opt.Adam(0.1), model), model, "aot_eager")
    assert len(optree.tree_leaves(state)) == 4
    assert end["b"] is end["a"]
    assert torch.equal(end["c"], end["a"].T)


def test_frozen_and_absent_arrays_keep_their_state_and_stay_themselves():
    model = {"a": torch.randn(2), "b": torch.randn(2), "c": torch.randn(2)}

    def step(state, model):
        return opt.update(state, model, {"a": model["a"], "b": model["b"], "c": None})

    state = opt.freeze(opt.setup(opt.Adam(0.1), model), where="b")
    after, end = check_three_steps(step, state, model)
    assert end["b"] is model["b"]
    assert end["c"] is model["c"]
    assert after["c"] == state["c"]


def test_without_gradients_nothing_happens():
    model = a_model()
    state = opt.setup(opt.Adam(0.1), model)
    after, end = compiled(lambda state, model: opt.update(state, model, None))[0](state, model)
    assert after == state
    assert end["w"] is model["w"]


def test_a_rule_for_each_parameter():
    model = a_model()
    rule = opt.Route(
        ("w", opt.Muon(fallback=lambda x: x.shape[0] > 100)),
        ("rest.0", None),
        otherwise=opt.OptimiserChain(opt.ClipGlobalNorm(0.1), opt.AdamW(0.1)),
    )
    state = opt.setup(rule, model)
    assert_close(run(compiled(train_step)[0], state, model, 3), run(train_step, state, model, 3), rtol=0, atol=1e-5)


def test_a_module_as_its_parameters():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[2].weight = net[1].weight
    inputs = torch.randn(5, 3)

    def step(state, params):
        grads = torch.func.grad(lambda p: torch.func.functional_call(net, p, (inputs,)).square().sum())(params)
        return opt.update(state, params, grads)

    params = {name: p.detach() for name, p in net.named_parameters()}
    check_three_steps(step, opt.setup(opt.AdamW(0.1), net), params)


def test_an_ensemble_by_vmap():
    models = {"w": torch.randn(5, 3, 4), "rest": [torch.randn(5, 4)]}

    def step(state, model):
        return opt.update(state, model, torch.func.grad(loss_of)(model))

    states = torch.func.vmap(lambda model: opt.setup(opt.Adam(0.1), model))(models)
    check_three_steps(torch.func.vmap(step), states, models, "aot_eager")


# --- states --------------------------------------------------------------------------------------------------------------


def test_a_state_goes_in_and_out_of_compiled_code(tmp_path):
    model = a_model()
    state = opt.setup(opt.AdamW(0.1), model)
    step, _ = compiled(train_step)
    mixed = run(step, *run(train_step, *run(step, state, model, 2), 1), 1)
    expected = run(train_step, state, model)
    assert_equal(mixed, expected)
    assert mixed[0] == expected[0]
    assert str(mixed[0]) == str(expected[0])
    opt.save(tmp_path / "state.safetensors", mixed[0])
    assert opt.load(tmp_path / "state.safetensors", like=model) == expected[0]


def test_a_resumed_state_has_other_counters():
    model = a_model()
    state = opt.setup(opt.RAdam(0.1), model)
    step, _ = compiled(train_step, "aot_eager")
    for steps in (1, 3):
        start = run(train_step, state, model, steps)
        assert_close(run(step, *start, 2), run(train_step, *start, 2), rtol=1e-6, atol=1e-7)


def test_a_consumed_state_is_refused():
    model = a_model()
    state = opt.setup(opt.Adam(0.1), model)
    opt.update_(state, model, None)
    with pytest.raises((ConsumedStateError, torch._dynamo.exc.Unsupported), match="consumed by update_"):
        compiled(train_step)[0](state, model)


# --- graphs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_new_parameters_require_no_grad(backend):
    params = dict(torch.nn.Linear(3, 2).named_parameters())
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    state = opt.setup(opt.Adam(0.1), params)
    _, end = compiled(opt.update, backend)[0](state, params, grads)
    _, expected = opt.update(state, params, grads)
    assert_equal(end, expected)
    assert not any(p.requires_grad for p in end.values())


def test_a_graph_is_kept():
    eta = torch.tensor(0.1, requires_grad=True)
    x = torch.tensor([1.0, 2.0])
    state = opt.setup(opt.Momentum(eta), x)

    def after_two(state, x):
        for _ in range(2):
            state, x = opt.update(state, x, 2 * x)
        return (x**2).sum()

    (actual,) = torch.autograd.grad(compiled(after_two, "aot_eager")[0](state, x), eta)
    (expected,) = torch.autograd.grad(after_two(state, x), eta)
    torch.testing.assert_close(actual, expected)


# --- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grads", "text"),
    [
        (
            {"w": torch.ones(2, 2), "rest": None, "layers": None},
            r"GradientError: gradient at 'w': expected shape \(3, 4\), got \(2, 2\)",
        ),
        ({"w": torch.ones(3, 4)}, "StructureError: gradient at the root: lacks the keys? 'layers', 'rest'"),
        ({"w": 1.0, "rest": None, "layers": None}, "GradientError: gradient at 'w': expected a torch tensor"),
    ],
)
def test_errors_name_the_parameter(grads, text):
    model = a_model()
    step, _ = compiled(opt.update)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=text):
        step(opt.setup(opt.Adam(), model), model, grads)


@dataclass(frozen=True)
class Growing(opt.AbstractRule):
    eta: float = 0.1

    def init(self, x):
        return ()

    def apply(self, state, x, dx):
        return (*state, 0), self.eta * dx


def test_a_state_that_changes_its_structure_is_refused():
    model = a_model()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="changes the structure of its state at"):
        compiled(train_step)[0](opt.setup(Growing(), model), model)


def test_update_in_place_says_what_to_use():
    model = {"w": torch.ones(2)}
    grads = {"w": torch.ones(2)}
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"inside torch\.compile use update"):
        compiled(opt.update_)[0](opt.setup(opt.Adam(), model), model, grads)
    torch._dynamo.reset()
    uncompiled = torch.compile(opt.update_, backend="eager")(opt.setup(opt.Adam(), model), model, grads)
    assert uncompiled[1] is model
    assert_close(model["w"], torch.full((2,), 0.999))
