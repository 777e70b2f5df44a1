"""metrics: norms of gradients, updates and weights, and the share that was clipped."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.engine.tracks import single as engine_step
from optimisers.errors import ArgumentError, ConsumedStateError, GradientError, StructureError

LIBRARIES = pytest.mark.parametrize("lib", ["numpy", "torch"])


def draw(lib, *shape, seed=0, dtype="float64"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(dtype) if lib == "numpy" else torch.tensor(values).to(getattr(torch, dtype))


def size(x):
    return float(np.linalg.norm(np.asarray(x.detach().double() if isinstance(x, torch.Tensor) else x).ravel()))


def example(lib):
    model = {"block": {"w": draw(lib, 3, 4), "b": draw(lib, 4, seed=1)}, "head": [draw(lib, 2, 2, seed=2)]}
    grads = {"block": {"w": draw(lib, 3, 4, seed=3), "b": draw(lib, 4, seed=4)}, "head": [draw(lib, 2, 2, seed=5)]}
    return model, grads


def parts(model):
    return {"block.b": model["block"]["b"], "block.w": model["block"]["w"], "head.0": model["head"][0]}


@LIBRARIES
@pytest.mark.parametrize(
    "rule",
    [
        opt.Descent(0.1),
        opt.OptimiserChain(opt.ClipNorm(1.0), opt.AdamW(0.1, lambda_=0.1)),
        opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Adam()),
        opt.Scheduled(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Adam()), eta=lambda t: 0.1 / (t + 1)),
        opt.Averaged(opt.Muon()),
        opt.MixedPrecision(opt.OptimiserChain(opt.ClipGrad(0.1), opt.Adam()), "float64"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_they_are_the_sizes_of_the_step_that_update_takes(lib, rule):
    model, grads = example(lib)
    state = opt.setup(rule, model)
    for _ in range(3):
        found = opt.metrics(state, model, grads)
        kept = (state, model)
        state, model = opt.update(*kept, grads)
        later = opt.metrics(*kept, grads, after=model)
        assert sorted(found) == ["block.b", "block.w", "head.0"]
        for path, x in parts(kept[1]).items():
            m = found[path]
            assert m.gradient_norm == pytest.approx(size(parts(grads)[path]))
            assert m.weight_norm == pytest.approx(size(x))
            assert m.update_norm == pytest.approx(size(parts(model)[path] - x), rel=1e-9)
            assert m.ratio == m.update_norm / m.weight_norm
            assert later[path].clipped is None
            sizes, expected = (dataclasses.replace(each, clipped=0.0) for each in (later[path], m))
            assert dataclasses.asdict(sizes) == pytest.approx(dataclasses.asdict(expected), rel=1e-14)  # loops add otherwise


@LIBRARIES
def test_nothing_is_changed(lib):
    model, grads = example(lib)
    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(1.0), opt.Adam(0.1)), model)
    before = copy.deepcopy((state, model, grads))
    opt.metrics(state, model, grads)
    assert state == before[0]
    for now, then in zip((model, grads), before[1:], strict=True):
        for path, x in parts(now).items():
            assert (x == parts(then)[path]).all()
    opt.update_(state, model, grads)
    with pytest.raises(ConsumedStateError):
        opt.metrics(state, model, grads)


@LIBRARIES
def test_the_share_clipped_by_each_limiting_rule(lib):
    model = {"w": draw(lib, 4), "v": draw(lib, 3)}
    grads = {"w": draw(lib, 4, seed=1), "v": draw(lib, 3, seed=2)}
    lengths = {name: size(g) for name, g in grads.items()}
    whole = math.hypot(*lengths.values())

    def clipped(rule):
        found = opt.metrics(opt.setup(rule, model), model, grads)
        return {name: m.clipped for name, m in found.items()}

    assert clipped(opt.Adam()) == {"w": 0, "v": 0}
    assert clipped(opt.OptimiserChain(opt.ClipNorm(1e3), opt.Adam())) == {"w": 0, "v": 0}
    own = clipped(opt.OptimiserChain(opt.ClipNorm(0.1), opt.Adam()))
    assert own == {name: pytest.approx(1 - 0.1 / length) for name, length in lengths.items()}
    shared = clipped(opt.OptimiserChain(opt.ClipGlobalNorm(0.1), opt.Adam()))
    assert shared == dict.fromkeys("wv", pytest.approx(1 - 0.1 / whole))
    each = clipped(opt.ClipGrad(0.1))
    assert each == {n: pytest.approx(1 - size(np.clip(np.asarray(g), -0.1, 0.1)) / lengths[n]) for n, g in grads.items()}
    both = clipped(opt.OptimiserChain(opt.ClipNorm(0.1), opt.WeightDecay(0.1), opt.ClipGlobalNorm(1e-2), opt.Adam()))
    assert all(both[name] > own[name] for name in both)
    assert clipped(opt.OptimiserChain(opt.Adam(1.0), opt.ClipNorm(0.5)))["w"] == pytest.approx(1 - 0.5 / 2, rel=1e-6)


@LIBRARIES
def test_norm_caps_after_the_first_step(lib):
    model, grads = {"w": draw(lib, 4)}, {"w": draw(lib, 4, seed=1)}
    state = opt.setup(opt.OptimiserChain(opt.NormGrowthCap(1.5), opt.Descent(0.1)), model)
    assert opt.metrics(state, model, grads)["w"].clipped == 0
    state, model = opt.update(state, model, grads)
    assert opt.metrics(state, model, {"w": 3 * grads["w"]})["w"].clipped == pytest.approx(0.5, rel=1e-6)


@LIBRARIES
def test_grouping(lib):
    model, grads = example(lib)
    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(0.5), opt.Adam(0.1)), model)
    single = opt.metrics(state, model, grads)
    top = opt.metrics(state, model, grads, by=1)
    assert list(top) == ["block", "head"]
    assert top["head"] == single["head.0"]
    for name in ("gradient_norm", "update_norm", "weight_norm"):
        assert getattr(top["block"], name) == pytest.approx(math.hypot(*(getattr(single[f"block.{k}"], name) for k in "wb")))
    assert top["block"].ratio == pytest.approx(top["block"].update_norm / top["block"].weight_norm)
    left = math.hypot(*(m.gradient_norm * (1 - m.clipped) for m in single.values()))
    (total,) = opt.metrics(state, model, grads, by=0).values()
    assert total.gradient_norm == pytest.approx(math.hypot(*(m.gradient_norm for m in single.values())))
    assert total.clipped == pytest.approx(1 - left / total.gradient_norm)
    named = opt.metrics(state, model, grads, by=lambda p: "matrices" if p.ndim == 2 else "rest")
    assert sorted(named) == ["matrices", "rest"]
    assert named["rest"] == single["block.b"]
    assert opt.metrics(state, model, grads, by=9) == single


@LIBRARIES
def test_what_takes_no_step(lib):
    model, grads = example(lib)
    state = opt.setup(opt.OptimiserChain(opt.AccumGrad(2), opt.Descent(0.1)), model)
    found = opt.metrics(opt.freeze(state, where="head.*"), model, {**grads, "block": {"w": grads["block"]["w"], "b": None}})
    assert list(found) == ["block.w"]
    assert found["block.w"].update_norm == 0
    assert found["block.w"].ratio == 0
    assert opt.metrics(state, model, {"block": None, "head": None}) == {}


@LIBRARIES
def test_non_finite_gradients_are_told_not_raised(lib):
    model = {"w": draw(lib, 4), "v": draw(lib, 4)}
    grads = {"w": draw(lib, 4, seed=1), "v": math.nan * draw(lib, 4)}
    for clip in (opt.ClipNorm(1.0), opt.ClipGlobalNorm(1.0), opt.NormGrowthCap(), opt.GradNormControl()):
        found = opt.metrics(opt.setup(opt.OptimiserChain(clip, opt.Adam()), model), model, grads)
        assert math.isfinite(found["w"].gradient_norm)
        assert math.isnan(found["v"].gradient_norm)
        assert math.isnan(found["v"].update_norm)
        assert math.isnan(found["v"].clipped)
    skip = opt.setup(opt.OptimiserChain(opt.SkipNonFinite(), opt.ClipNorm(1.0), opt.Adam()), model)
    assert {m.update_norm for m in opt.metrics(skip, model, grads).values()} == {0}
    assert math.isnan(opt.metrics(skip, model, grads, by=0)[""].gradient_norm)


@LIBRARIES
def test_zeros(lib):
    model, grads = {"w": 0 * draw(lib, 4)}, {"w": 0 * draw(lib, 4)}
    (m,) = opt.metrics(opt.setup(opt.OptimiserChain(opt.ClipNorm(), opt.Descent()), model), model, grads).values()
    assert m == opt.Metrics(0, 0, 0, 0, 0)
    (m,) = opt.metrics(opt.setup(opt.Descent(), model), model, {"w": 1 + grads["w"]}).values()
    assert m.ratio == math.inf


def test_updates_that_vanish_in_half_precision_are_seen():
    model = {"w": torch.ones(4, dtype=torch.bfloat16)}
    grads = {"w": torch.ones(4, dtype=torch.bfloat16)}
    assert opt.metrics(opt.setup(opt.Descent(1e-3), model), model, grads)["w"].update_norm == 0
    assert opt.metrics(opt.setup(opt.Descent(1e-2), model), model, grads)["w"].update_norm > 0


def test_a_module_and_its_own_gradients():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    net(torch.ones(2, 3)).square().mean().backward()
    state = opt.setup(opt.OptimiserChain(opt.ClipGlobalNorm(0.1), opt.Adam(0.01)), net)
    grads = {name: p.grad for name, p in net.named_parameters()}
    found = opt.metrics(state, net)
    assert list(found) == [name for name, _ in net.named_parameters()]
    assert found == opt.metrics(state, net, grads)
    assert list(opt.metrics(state, net, by=1)) == ["0", "1"]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    after, net = opt.update_(state, net)
    assert opt.metrics(after, before, grads, after=net)["0.weight"].update_norm == pytest.approx(found["0.weight"].update_norm)


def test_a_tree_of_both_libraries_and_tied_and_complex_arrays():
    w = np.array([3.0, 4.0])
    model = {"a": w, "b": w, "t": torch.tensor([3 + 4j])}
    grads = {"a": np.array([1.0, 0.0]), "b": np.array([2.0, 4.0]), "t": torch.tensor([6 + 8j])}
    found = opt.metrics(opt.setup(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Descent(0.1)), model), model, grads)
    assert sorted(found) == ["a", "t"]
    assert found["a"].gradient_norm == pytest.approx(5)
    assert found["t"].gradient_norm == pytest.approx(10)
    assert found["t"].weight_norm == pytest.approx(5)
    assert found["t"].update_norm == pytest.approx(0.1 * 10 / math.hypot(5, 10))


def test_numbers_are_read_once(monkeypatch):
    read = []
    whole = torch.Tensor.tolist

    def tolist(self):
        read.append(self.shape)
        return whole(self)

    model = {str(i): torch.ones(3) for i in range(20)}
    state = opt.setup(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.Adam()), model)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "__float__", None)
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    opt.metrics(state, model, model)
    assert len(read) == 1


def test_with_after_no_step_is_computed(monkeypatch):
    model = {"w": torch.ones(3)}
    state = opt.setup(opt.Adam(0.1), model)
    _, new = opt.update(state, model, model)
    monkeypatch.setattr(engine_step, "run", None)
    assert opt.metrics(state, model, model, after=new)["w"].update_norm == pytest.approx(0.1 * math.sqrt(3))


def test_bad_input():
    model = {"w": torch.ones(3)}
    state = opt.setup(opt.Adam(), model)
    with pytest.raises(ArgumentError, match="give the gradients"):
        opt.metrics(state, model)
    for by in ("path", -1, True, 0.5):
        with pytest.raises(ArgumentError, match="by= takes a number of leading keys"):
            opt.metrics(state, model, model, by=by)
    with pytest.raises(GradientError, match="shape"):
        opt.metrics(state, model, {"w": torch.ones(2)})
    with pytest.raises(StructureError, match="lacks the key"):
        opt.metrics(state, model, model, after={})
    with pytest.raises(ArgumentError, match=r"read on the host.*torch\.func"):
        torch.func.vmap(lambda g: opt.metrics(state, model, {"w": g}))(torch.ones(2, 3))
