"""What a gradient is taken for: at the names of a tied parameter, and where the model has nothing to train."""

import numpy as np
import pytest
import torch

import optimisers as opt

SIZES = pytest.mark.parametrize("width", [3, 80], ids=["small", "loops"])  # loops are made from 4,096 elements on


class Tied(torch.nn.Module):
    """Two layers with one weight."""

    def __init__(self, width=3):
        super().__init__()
        self.a = torch.nn.Linear(width, width, bias=False)
        self.b = torch.nn.Linear(width, width, bias=False)
        self.b.weight = self.a.weight
        self.c = torch.nn.Linear(width, width)


def filled(width, *values):
    return [torch.full((width, width), value) for value in values]


def grads_of(net, **given):
    return {**dict.fromkeys(name for name, _ in net.named_parameters()), **given}


# --- names of a tied parameter ----------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("pure", [False, True])
def test_gradients_at_all_names_of_a_parameter_are_added(width, pure):
    net = Tied(width)
    start = net.a.weight.detach().clone()
    state = opt.setup(opt.Descent(1.0), net)
    one, two = filled(width, 1.0, 2.0)
    cases = [
        ({"a.weight": one, "b.weight": two}, 3.0),
        ({"a.weight": None, "b.weight": two}, 2.0),
        ({"a.weight": one, "b.weight": None}, 1.0),
        ({"a.weight": one}, 1.0),
        ({"a.weight": one, "b.weight": one}, 1.0),  # one object counts once, as torch.autograd.grad gives it
        ({"a.weight": one, "b.weight": one.clone()}, 2.0),
    ]
    total = 0.0
    for given, moved in cases:
        total += moved
        if pure:
            model = {**dict(net.named_parameters()), "b.weight": net.b.weight}
            state, model = opt.update(state, model, grads_of(net, **given))
            assert model["a.weight"] is model["b.weight"]
            torch.testing.assert_close(model["a.weight"].detach(), start - moved)
        else:
            state, net = opt.update_(state, net, grads_of(net, **given))
            torch.testing.assert_close(net.b.weight.detach(), start - total)
    assert net.a.weight is net.b.weight


def test_functional_gradients_of_a_tied_module_equal_those_of_autograd():
    net, x = Tied(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    forward = torch.nn.Sequential(net.a, torch.nn.Tanh(), net.b, net.c)
    names = dict(net.named_parameters(remove_duplicate=False))
    apart = {name: p.detach().clone().requires_grad_() for name, p in names.items()}
    h = torch.tanh(x @ apart["a.weight"].T) @ apart["b.weight"].T
    loss = (h @ apart["c.weight"].T + apart["c.bias"]).square().mean()
    grads = dict(zip(apart, torch.autograd.grad(loss, list(apart.values())), strict=True))
    forward(x).square().mean().backward()
    by_names, _ = opt.update(opt.setup(opt.Adam(0.1), net), names, grads)
    by_grad, _ = opt.update_(opt.setup(opt.Adam(0.1), net), net)
    for path in ("a.weight", "c.weight", "c.bias"):
        torch.testing.assert_close(by_names[path].state[0], by_grad[path].state[0])


@SIZES
def test_a_wrong_gradient_at_another_name_is_told_by_that_name(width):
    net = Tied(width)
    state = opt.setup(opt.Descent(1.0), net)
    before = net.a.weight.detach().clone()
    for wrong, error, text in [
        (torch.ones(2, 5), opt.GradientError, r"gradient at 'b.weight': expected shape .*, got \(2, 5\)"),
        (torch.ones(width, width, dtype=torch.int64), opt.GradientError, "gradient at 'b.weight': .* got dtype int64"),
        (np.ones((width, width)), opt.GradientError, "gradient at 'b.weight': .* must come from one library"),
        ("g", opt.GradientError, "gradient at 'b.weight'"),
    ]:
        with pytest.raises(error, match=text):
            opt.update_(state, net, grads_of(net, **{"a.weight": torch.ones(width, width), "b.weight": wrong}))
        assert torch.equal(net.a.weight, before)


# --- where nothing is trained -------------------------------------------------------------------------------------------------


def nothing():
    return None


@pytest.mark.parametrize("size", [3, 6000])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("leaf", "gradient", "text"),
    [
        (lambda make: make([1, 2]), lambda make: make([1.0, 2.0]), "a int64 array"),
        (lambda make: make([True, False]), lambda make: make([1.0, 2.0]), "a bool array"),
        (lambda _: 0.5, lambda make: make([1.0]), "0.5"),
        (lambda _: 0.5, lambda _: 0.0, "0.5"),
        (lambda _: 3, lambda _: np.float64(1.0), "3"),
        (lambda _: None, lambda make: make([1.0, 2.0]), "None"),
        (lambda _: "relu", lambda make: make([1.0]), "'relu'"),
        (lambda _: nothing, lambda make: make([1.0]), "function"),
    ],
)
@pytest.mark.parametrize("step", [opt.update, opt.update_])
def test_a_gradient_for_what_is_not_trained_is_an_error(step, leaf, gradient, text, kind, size):
    make = np.array if kind == "numpy" else torch.tensor
    model = {"w": make([1.0] * size), "in": [{"x": leaf(make)}]}
    state = opt.setup(opt.Descent(0.5), model)
    state, model = step(state, model, {"w": model["w"] + 0, "in": [{"x": None}]})
    before = model["w"] + 0
    with pytest.raises(
        opt.GradientError, match=r"gradient at 'in.0.x': the model has .* there, which is not trained"
    ) as raised:
        step(state, model, {"w": model["w"] + 0, "in": [{"x": gradient(make)}]})
    assert text in str(raised.value)
    assert (model["w"] == before).all()
    state, model = step(state, model, {"w": before, "in": None})  # nothing was consumed
    assert (model["w"] == 0.5 * before).all()


def test_the_models_own_leaf_in_the_place_of_a_gradient_is_none():
    model = {"w": np.ones(3), "n": np.array([1, 2]), "scale": 0.5, "name": "relu", "f": nothing, "none": None}
    state = opt.setup(opt.Descent(1.0), model)
    _, stepped = opt.update(state, model, {**model, "w": np.ones(3)})
    assert (stepped["w"] == 0).all()
    assert stepped["n"] is model["n"]
    opt.update(state, model, {**dict.fromkeys(model), "w": np.ones(3), "name": "tanh", "f": print})


def test_what_was_left_out_by_choice_is_passed_over():
    model = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    grads = {name: np.ones(2) for name in model}
    chosen = opt.setup(opt.Descent(1.0), model, trainable=lambda p: p.path != "b")
    none = opt.setup(lambda p: None if p.path == "b" else opt.Descent(1.0), model)
    frozen = opt.freeze(opt.setup(opt.Descent(1.0), model), where="b")
    for state in (chosen, none, frozen):
        after, stepped = opt.update(state, model, grads)
        assert (stepped["b"] == 1).all()
        _, stepped = opt.update(opt.adjust(after, 2.0), stepped, grads)
        assert (stepped["b"] == 1).all()
        assert (stepped["c"] == -2).all()
    net = {"w": torch.nn.Parameter(torch.ones(2)), "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False)}
    state = opt.setup(opt.Descent(1.0), net)
    _, stepped = opt.update(state, net, {"w": torch.ones(2), "frozen": torch.ones(2)})
    assert (stepped["frozen"] == 1).all()


def test_a_gradient_of_what_has_become_trainable_asks_for_extend():
    """Unfreezing a layer is not enough: the state has nothing for it."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    net[0].requires_grad_(False)
    state = opt.setup(opt.Descent(0.1), net)
    net(torch.ones(1, 2)).sum().backward()
    state, net = opt.update_(state, net)
    net[0].requires_grad_(True)
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(opt.GradientError, match=r"gradient at '0.weight': .* not trainable at setup, and is now; opt.extend"):
        opt.update_(state, net)
    state = opt.extend(state, net)
    before = net[0].weight.detach().clone()
    state, net = opt.update_(state, net)
    assert not torch.equal(net[0].weight, before)
    net[0].requires_grad_(False)  # its old gradient is still there
    state = opt.extend(state, net)
    opt.update_(state, net)


def test_an_array_in_the_place_of_what_was_none_at_setup_is_told():
    state = opt.setup(opt.Descent(), {"w": np.ones(2), "bias": None})
    model = {"w": np.ones(2), "bias": np.ones(2)}
    opt.update(state, model, {"w": np.ones(2), "bias": None})
    with pytest.raises(opt.GradientError, match=r"gradient at 'bias': .* not trainable at setup, and is now"):
        opt.update(state, model, {"w": np.ones(2), "bias": np.ones(2)})


def test_buffers_among_parameters_are_not_trained():
    model = {"w": torch.nn.Parameter(torch.ones(2)), "mean": torch.zeros(2)}
    state = opt.setup(opt.Descent(), model)
    with pytest.raises(
        opt.GradientError, match="gradient at 'mean': the model has a float32 array without requires_grad there"
    ):
        opt.update(state, model, {"w": torch.ones(2), "mean": torch.ones(2)})


def test_metrics_are_told_as_well():
    model = {"w": np.ones(2), "n": np.array([1, 2])}
    state = opt.setup(opt.Descent(), model)
    with pytest.raises(opt.GradientError, match="gradient at 'n'"):
        opt.metrics(state, model, {"w": np.ones(2), "n": np.ones(2)})


# --- arrays of other classes --------------------------------------------------------------------------------------------------


class Named(np.ndarray):
    """A class of a user's, whose products are no elementwise ones."""

    def __mul__(self, other):
        raise TypeError("not meant for this")

    __rmul__ = __mul__


class Labelled(torch.Tensor):
    """A class of a user's without behaviour of its own."""


RULES = [
    opt.Descent(0.5),
    opt.OptimiserChain(opt.ClipNorm(1.0), opt.WeightDecay(0.1), opt.AdamW(0.1)),
    opt.Muon(),
    opt.MixedPrecision(opt.Adam(0.1), "float64"),
]


def foreign_numpy(cls, x):
    return np.ma.MaskedArray(x.copy()) if cls is np.ma.MaskedArray else x.copy().view(cls)


@pytest.mark.parametrize("shape", [(3, 3), (3, 4), (80, 80)])
@pytest.mark.parametrize("cls", [np.matrix, np.ma.MaskedArray, np.recarray, Named])
@pytest.mark.parametrize("of", ["gradient", "parameter", "both"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("step", [opt.update, opt.update_])
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_numpy_classes_are_taken_as_plain_arrays(step, rule, of, cls, shape):
    rng = np.random.default_rng(0)
    x, grads = rng.normal(size=shape), [rng.normal(size=shape) for _ in range(3)]
    plain, foreign = {"w": x.copy()}, {"w": foreign_numpy(cls, x) if of != "gradient" else x.copy()}
    state, other = opt.setup(rule, plain), opt.setup(rule, foreign)
    for g in grads:
        state, plain = step(state, plain, {"w": g})
        other, foreign = step(other, foreign, {"w": foreign_numpy(cls, g) if of != "parameter" else g})
        assert type(foreign["w"]) is (np.ndarray if of == "gradient" else cls)
        assert np.asarray(foreign["w"]).tobytes() == plain["w"].tobytes()
    assert other == state


@pytest.mark.parametrize("size", [3, 6000])
@pytest.mark.parametrize("step", [opt.update, opt.update_])
@pytest.mark.parametrize("wrap", [lambda x: x, torch.nn.Parameter], ids=["tensor", "Parameter"])
def test_the_class_of_a_gradient_does_not_become_the_parameters(wrap, step, size):
    x, g = torch.ones(size), torch.full((size,), 0.25)
    plain, foreign = {"w": wrap(x.clone())}, {"w": wrap(x.clone())}
    state, other = opt.setup(opt.Momentum(0.5), plain), opt.setup(opt.Momentum(0.5), foreign)
    for gradient in (g.as_subclass(Labelled), torch.nn.Parameter(g)):
        state, plain = step(state, plain, {"w": g})
        other, foreign = step(other, foreign, {"w": gradient.detach()})
        assert type(foreign["w"]) is type(plain["w"])
        assert type(other["w"].state) is torch.Tensor
        assert torch.equal(foreign["w"], plain["w"])


@pytest.mark.parametrize("size", [3, 6000])
@pytest.mark.parametrize("step", [opt.update, opt.update_])
def test_masked_elements_are_refused_by_path(step, size):
    masked = np.ma.MaskedArray(np.ones(size), mask=np.arange(size) == 1)
    with pytest.raises(opt.ModelError, match="the array at 'w' is a MaskedArray with masked elements"):
        opt.setup(opt.Descent(), {"w": masked})
    model = {"a": np.ones(size), "w": np.ma.MaskedArray(np.ones(size))}
    state = opt.setup(opt.Descent(), model)
    with pytest.raises(opt.GradientError, match=r"gradient at 'w': .* got one with masked elements"):
        step(state, model, {"a": np.ones(size), "w": masked})
    model["w"][1] = np.ma.masked
    with pytest.raises(opt.ModelError, match="the array at 'w' is a MaskedArray with masked elements"):
        step(state, model, {"a": np.ones(size), "w": np.ones(size)})
    assert (model["a"] == 1).all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
@pytest.mark.parametrize("size", [3, 6000])
@pytest.mark.parametrize("step", [opt.update, opt.update_])
def test_gradients_that_only_wrap_tensors_are_refused_by_path(step, size):
    masked = torch.masked.masked_tensor(torch.ones(size), torch.arange(size) > 1)
    model = {"a": torch.ones(size), "w": torch.ones(size)}
    state = opt.setup(opt.Descent(), model)
    with pytest.raises(opt.GradientError, match=r"gradient at 'w': .* got a MaskedTensor, which only wraps tensors"):
        step(state, model, {"a": torch.ones(size), "w": masked})
    assert (model["a"] == 1).all()


def test_memory_mapped_parameters_are_stepped_in_their_file(tmp_path):
    mapped = np.memmap(tmp_path / "w", np.float64, "w+", shape=(6000,))
    mapped[:] = 1
    model = {"w": mapped}
    state, model = opt.update_(opt.setup(opt.Descent(0.5), model), model, {"w": np.ones(6000)})
    assert model["w"] is mapped
    mapped.flush()
    assert (np.fromfile(tmp_path / "w") == 0.5).all()
    read_only = np.memmap(tmp_path / "w", np.float64, "r", shape=(6000,))
    state, model = opt.update_(state, {"w": read_only}, {"w": np.ones(6000)})
    assert (model["w"] == 0).all()
    assert (read_only == 0.5).all()


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_one_flat_vector_of_matrices():
    model = {"w": np.matrix([[1.0, 2.0], [3.0, 4.0]]), "b": np.ones(3)}
    flat, rebuild = opt.destructure(model)
    assert flat.tolist() == [1, 1, 1, 1, 2, 3, 4]
    assert (rebuild(2 * flat)["w"] == 2 * model["w"]).all()


# --- tensors that cannot be written -------------------------------------------------------------------------------------------


def inference(size):
    with torch.inference_mode():
        return torch.ones(size)


@pytest.mark.parametrize("size", [3, 6000])
def test_inference_tensors_are_refused_before_anything_is_written(size):
    ones = {name: torch.ones(size) for name in "abc"}
    with pytest.raises(opt.ModelError, match=r"the array at 'b' is an inference tensor.*clone\(\)"):
        opt.setup(opt.Momentum(), {**ones, "b": inference(size)})
    model = {name: x.clone() for name, x in ones.items()}
    state = opt.setup(opt.Momentum(1.0), model)
    for _ in range(2):
        with pytest.raises(opt.ModelError, match=r"the array at 'b' is an inference tensor"):
            opt.update_(state, {**model, "b": inference(size)}, ones)
        assert all((x == ones[name]).all() for name, x in model.items())
        state, model = opt.update_(state, model, {name: 0 * g for name, g in ones.items()})  # nothing was consumed
    _, new = opt.update(state, {**model, "b": inference(size)}, ones)  # which writes to nothing
    assert not new["b"].is_inference()
    frozen = opt.freeze(state, where="b")
    _, stepped = opt.update_(frozen, {**model, "b": inference(size)}, ones)
    assert (stepped["a"] == 0).all()


@pytest.mark.parametrize("size", [3, 6000])
def test_in_inference_mode_inference_tensors_are_trained(size):
    with torch.inference_mode():
        model = {name: torch.ones(size) for name in "ab"}
        state = opt.setup(opt.Momentum(0.25), model)
        for _ in range(2):
            state, model = opt.update_(state, model, {name: torch.ones(size) for name in model})
        assert all(x.is_inference() for x in model.values())
        np.testing.assert_allclose(model["a"].numpy(), 1 - 0.25 - 0.475)
    for _ in range(2):
        with pytest.raises(opt.ModelError, match="the array at 'a' is an inference tensor"):
            opt.update_(state, model, {name: torch.ones(size) for name in model})


@pytest.mark.parametrize("size", [3, 80])
def test_the_adapter_refuses_inference_tensors(size):
    from optimisers.torch import Optimizer

    net = torch.nn.Linear(size, size)
    optimizer = Optimizer(opt.Momentum(0.5), net)
    net(torch.ones(1, size)).sum().backward()
    good, before = net.bias, net.weight.detach().clone()
    with torch.inference_mode():
        bad = torch.nn.Parameter(torch.ones(size))
    with pytest.raises(opt.ModelError, match="inference tensor"):
        Optimizer(opt.Momentum(0.5), [bad])
    assert torch.equal(net.weight, before)
    assert net.bias is good
    optimizer.step()
    assert not torch.equal(net.weight, before)
