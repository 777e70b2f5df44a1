"""Tensors in which no rule computes: they may be in a model, and only training them is an error."""

from typing import NamedTuple

import numpy as np
import pytest

import optimisers as opt

torch = pytest.importorskip("torch")

EXOTIC = {
    "float8": lambda: torch.ones(2, 2).to(torch.float8_e4m3fn),
    "complex32": lambda: torch.ones(2, 2, dtype=torch.float16).to(torch.complex32),
    "coo": lambda: torch.eye(2).to_sparse(),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}
SAID = {
    "float8": "the array at 'base' is float8_e4m3fn, in which no rule computes; train a copy in bfloat16 or wider",
    "complex32": "the array at 'base' is complex32, in which no rule computes",
    "coo": "the array at 'base' is a torch.sparse_coo tensor; only strided (dense) tensors can be trained",
}
exotic = pytest.mark.parametrize("name", EXOTIC)
shaped = pytest.mark.parametrize("name", SAID)
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]


class WithAdapter(torch.nn.Module):
    """A frozen base of some kind, and a small array that is trained."""

    def __init__(self, base, *, frozen=True):
        super().__init__()
        self.base = torch.nn.Parameter(base, requires_grad=not frozen)
        self.lora = torch.nn.Parameter(torch.ones(2))


@exotic
def test_a_frozen_parameter_of_any_kind_stops_nothing(name, tmp_path):
    net = WithAdapter(EXOTIC[name]())
    state = opt.setup(opt.Descent(0.5), net)
    net.lora.grad = torch.ones(2)
    state, net = opt.update_(state, net)
    assert torch.equal(net.lora.detach(), torch.full((2,), 0.5))
    assert "'base'" in opt.summary(state, net)
    opt.save(tmp_path / "state", state)
    assert opt.load(tmp_path / "state", like=net) == state
    assert opt.extend(state, net) == state
    flat, rebuild = opt.destructure(net)
    assert flat.shape == (2,)
    assert rebuild(flat)["base"] is net.base


@shaped
def test_a_rule_of_none_or_trainable_leaves_a_tensor_of_any_kind_alone(name):
    model = {"base": EXOTIC[name](), "lora": torch.ones(2)}
    grads = {"base": None, "lora": torch.ones(2)}
    for state in (
        opt.setup(opt.Route(("base", None), otherwise=opt.Descent(0.5)), model),
        opt.setup(opt.Descent(0.5), model, trainable=lambda param: param.path == "lora"),
    ):
        new = opt.update(state, model, grads)[1]
        assert new["base"] is model["base"]
        assert torch.equal(new["lora"], torch.full((2,), 0.5))
        assert "lora" in repr(state)
        assert opt.summary(state, model)


@shaped
@pytest.mark.parametrize("verb", ["setup", "trainables", "destructure", "estimate"])
def test_training_such_a_tensor_is_an_error(name, verb):
    model = {"base": EXOTIC[name](), "lora": torch.ones(2)}
    call = {
        "setup": lambda: opt.setup(opt.Adam(), model),
        "estimate": lambda: opt.estimate(opt.Adam(), model),
        "trainables": lambda: opt.trainables(model),
        "destructure": lambda: opt.destructure(model),
    }[verb]
    with pytest.raises(opt.ModelError) as caught:
        call()
    assert SAID[name] in str(caught.value)
    assert "requires_grad_(False), trainable=, or a rule of None" in str(caught.value)


@pytest.mark.parametrize("name", ["jagged", "nested"])
def test_a_nested_tensor_is_told_to_stay_out(name):
    with pytest.raises(opt.ModelError, match="the array at 'base' is a nested tensor, which no rule steps; keep it out"):
        opt.setup(opt.Adam(), {"base": EXOTIC[name](), "lora": torch.ones(2)})


def test_thawing_a_base_that_no_rule_can_step_is_refused_by_extend():
    net = WithAdapter(EXOTIC["float8"]())
    state = opt.setup(opt.Adam(), net)
    with pytest.raises(opt.ModelError, match="the array at 'base' is float8_e4m3fn"):
        opt.extend(state, WithAdapter(EXOTIC["float8"](), frozen=False))


class Wrapping(torch.Tensor):
    """A tensor without a storage, which only wraps another."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Wrapping({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def inner(x):
            return x.inner if isinstance(x, Wrapping) else x

        args, kwargs = torch.utils._pytree.tree_map(inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, func(*args, **kwargs))


@pytest.mark.parametrize("size", [3, 5000])
@pytest.mark.parametrize("rule", [opt.AdamW(), opt.OptimiserChain(opt.ClipNorm(0.1), opt.Momentum())], ids=["AdamW", "chain"])
def test_a_subclass_without_a_storage_is_trained(rule, size):
    generator = torch.Generator().manual_seed(0)
    x, grads = torch.randn(size, generator=generator), [torch.randn(size, generator=generator) for _ in range(3)]
    wrapped, plain = {"a": Wrapping(x.clone()), "b": torch.ones(2)}, {"a": x.clone(), "b": torch.ones(2)}
    states = [opt.setup(rule, wrapped), opt.setup(rule, plain)]
    for dx in grads:
        states[0], wrapped = opt.update(states[0], wrapped, {"a": Wrapping(dx), "b": None})
        states[1], plain = opt.update(states[1], plain, {"a": dx, "b": None})
    assert type(wrapped["a"]) is Wrapping
    torch.testing.assert_close(wrapped["a"].inner, plain["a"])
    given = wrapped["a"]
    states[0], wrapped = opt.update_(states[0], wrapped, {"a": Wrapping(grads[0]), "b": None})
    states[1], plain = opt.update(states[1], plain, {"a": grads[0], "b": None})
    assert wrapped["a"] is given
    torch.testing.assert_close(wrapped["a"].inner, plain["a"])


def test_a_state_without_bytes_of_its_own_is_not_saved(tmp_path):
    state = opt.setup(opt.Momentum(), {"a": Wrapping(torch.ones(3))})
    with pytest.raises(opt.CheckpointError, match="the state of 'a' at its root is a Wrapping, a tensor that has no bytes"):
        opt.save(tmp_path / "state", state)
    assert not list(tmp_path.iterdir())


# --- parameters without a shape or without numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [
        lambda net: opt.setup(opt.Adam(), net),
        lambda net: opt.estimate(opt.Adam(), net),
        lambda net: opt.review(opt.Adam(), net),
        opt.trainables,
        opt.destructure,
        lambda net: opt.setup(opt.Adam(), dict(net.named_parameters())),
        lambda net: opt.extend(opt.setup(opt.Adam(), torch.nn.Sequential(torch.nn.Linear(2, 2))), net),
    ],
    ids=["setup", "estimate", "review", "trainables", "destructure", "setup of a dict", "extend"],
)
def test_a_lazy_layer_before_its_first_batch_is_told(verb):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LazyLinear(3))
    with pytest.raises(
        opt.ModelError, match=r"the parameter at '1.*(weight|bias)' belongs to a lazy layer .* run the model once"
    ):
        verb(net)
    net(torch.ones(1, 2))
    assert verb(net) is not None


def test_a_state_on_meta_is_set_up_again_not_moved(tmp_path):
    with torch.device("meta"):
        net = torch.nn.Linear(2, 2)
    state = opt.setup(opt.Adam(), net)
    net.to_empty(device="cpu")
    for p in net.parameters():
        p.grad = torch.nn.init.ones_(torch.empty_like(p))
        torch.nn.init.ones_(p)
    with pytest.raises(opt.StructureError, match=r"its state on meta; which holds no numbers; set up a new state"):
        opt.update_(state, net)
    with pytest.raises(opt.ArgumentError, match=r"the state of 'weight' is on the meta device, .* set up a new state"):
        opt.to(state, device="cpu")
    with pytest.raises(opt.CheckpointError, match="has no value to be stored; it is on the meta device"):
        opt.save(tmp_path / "state", state)
    state, net = opt.update_(opt.setup(opt.Descent(0.5), net), net)
    assert torch.equal(net.weight.detach(), torch.full((2, 2), 0.5))


def test_loading_onto_meta_is_refused(tmp_path):
    net = torch.nn.Linear(2, 2)
    opt.save(tmp_path / "state", opt.setup(opt.Adam(), net))
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 2)
    for like in (empty, opt.setup(opt.Adam(), empty)):
        with pytest.raises(opt.CheckpointError, match=r"'weight': its state at 0: it would go to the meta device"):
            opt.load(tmp_path / "state", like=like)


# --- what stands where a model or a gradient should --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (lambda net: net.parameters(), "a generator at the root"),
        (lambda net: net.named_parameters(), "a generator at the root"),
        (lambda net: [{"params": net.parameters()}], "a generator at '0.params'"),
        (lambda net: dict(net.named_parameters()).values(), "a dict_values at the root"),
        (lambda net: iter(list(net.parameters())), "a list_iterator at the root"),
        (lambda net: map(torch.detach, net.parameters()), "a map at the root"),
    ],
)
@pytest.mark.parametrize("verb", [lambda m: opt.setup(opt.Adam(), m), opt.trainables, opt.destructure])
def test_a_generator_of_parameters_is_no_model(model, where, verb):
    with pytest.raises(opt.ModelError) as caught:
        verb(model(torch.nn.Linear(2, 2)))
    assert f"the model holds {where}" in str(caught.value)
    assert "Give a torch.nn.Module itself in the place of its parameters()" in str(caught.value)


class Pair(NamedTuple):
    a: object
    b: object


@pytest.mark.parametrize(
    ("model", "made"),
    [
        (lambda a, b: [a, b], "make a list of it: list(grads)"),
        (lambda a, b: {"x": a, "y": b}, "make a dict of it: dict(zip(model, grads))"),
        (Pair, "make a Pair of it: Pair(*grads)"),
    ],
    ids=["list", "dict", "namedtuple"],
)
def test_a_tuple_of_gradients_is_told_how_to_become_the_model_s(model, made):
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    tree = model(a, b)
    leaves = list(tree.values()) if isinstance(tree, dict) else list(tree)
    grads = torch.autograd.grad(a.sum() + 2 * b.sum(), leaves)
    state = opt.setup(opt.Descent(0.5), tree)
    with pytest.raises(opt.StructureError) as caught:
        opt.update(state, tree, grads)
    assert str(caught.value).endswith(made)
    remedy = eval(made.split(": ")[1], {"grads": grads, "model": tree, "Pair": Pair})
    new = opt.update(state, tree, remedy)[1]
    stepped = list(new.values()) if isinstance(new, dict) else list(new)
    assert [float(x.detach()[0]) for x in stepped] == [0.5, 0.0]


def test_a_tuple_of_gradients_for_a_module_or_an_array_is_told_its_remedy():
    net = torch.nn.Linear(2, 2)
    grads = torch.autograd.grad(net(torch.ones(2)).sum(), list(net.parameters()))
    with pytest.raises(opt.ArgumentError, match=r"make dict\(zip\(names, grads\)\)"):
        opt.update_(opt.setup(opt.Adam(), net), net, grads)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(opt.StructureError, match=r"gives a tuple, take its item \[0\]"):
        opt.update(opt.setup(opt.Adam(), x), x, torch.autograd.grad(x.sum(), x))


def test_a_foreign_number_among_the_gradients_keeps_the_usual_remedy():
    model = [np.ones(2), np.ones(3)]
    with pytest.raises(opt.StructureError, match=r"expected a list of 2, got a tuple of 3\. A gradient has the model's"):
        opt.update(opt.setup(opt.Adam(), model), model, (np.ones(2), np.ones(3), np.ones(2)))
