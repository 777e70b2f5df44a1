"""Checkpoints: exact, whole, checked before they are believed, and clear about what does not fit."""

import importlib
import json
import os
import stat
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors
import torch
from safetensors import torch as safetensors_torch

import optimisers as opt
from looped import natively
from optimisers.errors import ArgumentError, CheckpointError, ConsumedStateError, MissingPackageError
from optimisers.interop import _tensor_file, checkpoint
from table import ROWS

SOURCE = Path(opt.__file__).resolve().parent.parent


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tree(lib="numpy", dtype="float32"):
    """A model with a tie, a transposed tie, a 0-d array, an empty one, one in Fortran order, and leaves not to be trained."""
    shared = noise(4, 4).astype(dtype)
    model = {
        "enc": {"w": noise(6, 4, seed=1).astype(dtype), "b": noise(6, seed=2).astype(dtype)},
        "tie": [shared, shared.T],
        "f": np.asfortranarray(noise(3, 5, seed=3).astype(dtype)),
        "s": np.asarray(0.5, dtype),
        "dot.ted": noise(2, 2, seed=4).astype(dtype),
        "empty": np.zeros((0, 3), dtype),
        "steps": np.arange(3),
        "name": "a model",
    }
    if lib == "numpy":
        return model
    shared = torch.from_numpy(shared)
    tensors = {key: torch.from_numpy(model[key]) for key in ("f", "s", "dot.ted", "empty", "steps")}
    enc = {key: torch.from_numpy(value) for key, value in model["enc"].items()}
    return {"enc": enc, "tie": [shared, shared.T], **tensors, "name": "a model"}


def gradients(model, seed):
    """A gradient for everything that can be trained, but sometimes none for the bias."""
    rng = np.random.default_rng(seed)

    def one(x):
        g = rng.normal(size=tuple(x.shape)).astype("float32")
        return g.astype(x.dtype) if isinstance(x, np.ndarray) else torch.from_numpy(g).to(x.dtype)

    grads = {key: one(model[key]) for key in ("f", "s", "dot.ted", "empty")}
    tie = [one(x) for x in model["tie"]]
    enc = {"w": one(model["enc"]["w"]), "b": one(model["enc"]["b"]) if seed % 2 else None}
    return {"enc": enc, "tie": tie, **grads, "steps": None, "name": None}


def run(state, model, first, steps):
    for seed in range(first, first + steps):
        state, model = opt.update(state, model, gradients(model, seed))
    return state, model


def same_model(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(opt.trainables(a), opt.trainables(b), strict=True))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


def fails(call, *fragments, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    return str(caught.value)


# --- every rule ---------------------------------------------------------------------------------------------------------

OPAQUE = {"Scheduled"}
CASES = [(row, i) for row in ROWS for i in range(len(row.configs))]


def for_row(row, rule):
    """The rule for arrays that it takes, another one for the rest of the tree."""
    return lambda p: rule if p.ndim >= row.min_ndim else opt.Momentum()


@pytest.mark.parametrize("lib", ["numpy", "torch"])
@pytest.mark.parametrize(("row", "i"), CASES, ids=[f"{row.name}-{i}" for row, i in CASES])
def test_a_state_of_any_rule_comes_back_to_the_bit(row, i, lib, path):
    model = tree(lib)
    rule = for_row(row, row.configs[i])
    state, model = run(opt.setup(rule, model), model, 0, 3)
    opt.save(path, state)
    likes = [opt.setup(rule, model), state] + ([model] if row.rebuilds else [])
    for like in likes:
        loaded = opt.load(path, like)
        assert loaded == state
        assert str(loaded) == str(state)
        assert [e.base for e in loaded._entries] == [e.base for e in state._entries]
        a, b = run(state, model, 3, 2), run(loaded, model, 3, 2)
        assert a[0] == b[0]
        assert same_model(a[1], b[1])
    if not row.rebuilds:
        fails(lambda: opt.load(path, model), "which a file cannot hold; give like= a state", "the rule of")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("lib", ["numpy", "torch"])
def test_every_dtype_is_exact(dtype, lib, path):
    x = (noise(3, 4) + (1j * noise(3, 4, seed=1) if "complex" in dtype else 0)).astype(dtype)
    x = x if lib == "numpy" else torch.from_numpy(x)
    state, model = opt.update(opt.setup(opt.Adam(), x), x, x)
    opt.save(path, state)
    assert opt.load(path, model) == state
    assert opt.load(path, opt.setup(opt.Adam(), x)) == state


def test_bfloat16_is_exact_and_stored_as_such(path):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for rule, dtype in ((opt.Adam(), None), (opt.MixedPrecision(opt.Adam()), None), (opt.Adam(), "float32")):
        state, model = opt.update(opt.setup(rule, x, state_dtype=dtype), x, x)
        opt.save(path, state)
        assert opt.load(path, model) == state
    state = opt.setup(opt.Momentum(), x)
    opt.save(path, state)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.get_tensor(":state").dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_arrays_go_where_those_they_are_for_are(path):
    here = {"w": torch.ones(4, 3), "z": torch.ones(2, dtype=torch.complex64), "f": torch.ones(5, 2).t()}
    there = {key: x.cuda() for key, x in here.items()}
    rule = opt.OptimiserChain(opt.ClipNorm(), opt.Adam())
    state, there = opt.update(opt.setup(rule, there), there, there)
    opt.save(path, state)
    for like in (there, opt.setup(rule, there)):
        assert opt.load(path, like) == state
        assert all(x.device.type == "cuda" for x in opt.load(path, like)["w"].state[1][:2])
    loaded = opt.load(path, here)
    assert loaded == opt.to(state, device="cpu")
    assert all(x.device.type == "cpu" for x in loaded["w"].state[1][:2])


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, -0.0, 5e-324])
def test_special_values_are_kept(special, path):
    x = np.array([special, 1.0])
    state = opt.setup(opt.Momentum(), x)
    state, _ = opt.update(state, x, x)
    opt.save(path, state)
    assert opt.load(path, x) == state


def test_the_layout_in_memory_is_kept(path):
    model = {"f": np.asfortranarray(noise(3, 4)), "t": torch.zeros(2, 3, 4).permute(2, 0, 1)}
    state = opt.setup(opt.Momentum(), model)
    opt.save(path, state)
    loaded = opt.load(path, {"f": np.zeros((3, 4)), "t": torch.zeros(4, 2, 3)})
    assert loaded["f"].state.strides == model["f"].strides
    assert loaded["t"].state.stride() == model["t"].stride()


def test_a_tree_of_both_kinds_of_arrays(path):
    model = {"n": np.ones(3), "t": torch.ones(3)}
    state, model = opt.update(opt.setup(opt.Adam(), model), model, model)
    opt.save(path, state)
    loaded = opt.load(path, model)
    assert loaded == state
    assert isinstance(loaded["n"].state[0], np.ndarray)
    assert isinstance(loaded["t"].state[0], torch.Tensor)


def test_the_file_is_plain_safetensors_with_counters_as_0d_tensors(path):
    model = {"layer": {"w": torch.ones(2, 3)}}
    state, _ = opt.update(opt.setup(opt.OptimiserChain(opt.AccumGrad(2), opt.Adam()), model), model, model)
    opt.save(path, state)
    tensors = safetensors_torch.load_file(path)
    assert tensors["layer.w:state.0.0"].shape == (2, 3)
    assert tensors["layer.w:state.0.1"].item() == 2
    assert tensors["layer.w:state.0.1"].dtype == torch.int64
    assert tensors["layer.w:state.1.2.1"].item() == 0.999
    assert tensors["layer.w:state.1.2.1"].dtype == torch.float64


def test_learned_fields_are_stored_and_keep_their_gradients(path):
    x = torch.ones(2)
    for grad in (False, True):
        rule = opt.Momentum(eta=torch.tensor(0.25, dtype=torch.float64, requires_grad=grad))
        opt.save(path, opt.setup(rule, x))
        for like in (x, opt.setup(rule, x)):
            eta = opt.load(path, like)[()].rule.eta
            assert eta.item() == 0.25
            assert eta.requires_grad == grad


def test_modules_aliases_and_frozen_parameters(path):
    def net():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        model[1].weight = model[0].weight
        model[2].requires_grad_(False)
        return model

    def step(state, model):
        model.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        return opt.update_(state, model)[0]

    model = net()
    state = opt.freeze(opt.setup(opt.AdamW(), model), where="1.bias")
    state = step(step(state, model), model)
    opt.save(path, state)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    after, values = step(state, model), [p.clone() for p in model.parameters()]
    again = net()
    again.load_state_dict(weights)
    loaded = opt.load(path, again)
    assert loaded["1.bias"].frozen
    assert step(loaded, again) == after
    assert all(torch.equal(a, b) for a, b in zip(values, again.parameters(), strict=True))


def test_what_setup_was_told_not_to_train_stays_untrained(path):
    model = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    rule = opt.Route(("b", None), otherwise=opt.Adam())
    state = opt.setup(rule, model, trainable=lambda p: p.path != "c")
    opt.save(path, state)
    fails(lambda: opt.load(path, model), "'c' was not trained when the file was saved (requires_grad, trainable=), and is here")
    loaded = opt.load(path, model, trainable=lambda p: p.path != "c")
    assert loaded == state
    assert loaded["c"] is None
    anew = opt.load(path, model, strict=False)["c"]
    assert anew.rule == opt.Adam()
    assert loaded["b"].rule is None
    assert opt.adjust(opt.adjust(loaded, 0.5), times=2)["a"].rule.eta == 0.002


def test_the_rule_of_setup_is_kept_beside_the_present_one(path):
    x = {"w": np.ones((3, 3)), "b": np.ones(3)}
    state = opt.adjust(opt.adjust(opt.setup(opt.Muon(), x), 0.0), 0.01)
    opt.save(path, opt.adjust(state, 0.0))
    assert opt.adjust(opt.load(path, x), 0.01) == state


def test_the_file_decides_on_hyper_parameters(path):
    x = np.ones(3)
    opt.save(path, opt.adjust(opt.setup(opt.Adam(), x), 0.5))
    assert opt.load(path, opt.setup(opt.Adam(eta=0.1), x))[()].rule == opt.Adam(eta=0.5)


# --- rules that a file cannot hold --------------------------------------------------------------------------------------


def halve(step):
    return 0.1 / 2**step


def small(x):
    return max(x.shape) < 5


def columns(side):
    return side // 2


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (opt.Scheduled(opt.Adam(), eta=halve), "the schedule of 'eta'"),
        (opt.OptimiserChain(opt.ClipGrad(), opt.Scheduled(opt.Adam(), eta=halve)), "field 'rules'[1], Scheduled"),
        (opt.Muon(fallback=small), "Muon: field 'fallback'"),
        (opt.Apollo(rank=columns), "Apollo: field 'rank'"),
    ],
)
def test_functions_come_from_the_state_given(rule, field, path):
    model = {"w": noise(4, 6)}
    state, model = opt.update(opt.setup(rule, model), model, model)
    opt.save(path, state)
    fails(lambda: opt.load(path, model), "the rule of 'w'", field, "give like= a state")
    loaded = opt.load(path, opt.setup(rule, model))
    assert loaded == state
    assert opt.update(loaded, model, model)[0] == opt.update(state, model, model)[0]
    fails(lambda: opt.load(path, opt.setup(opt.Adam(), model)), field)


@dataclass(frozen=True)
class Lazy(opt.AbstractRule):
    """A user's rule whose state takes shape with the first step."""

    eta: float = 0.1
    label: str = "lazy"

    def init(self, x):
        return None

    def apply(self, state, x, dx):
        last = dx if state is None else state["last"] + dx
        return {"last": last, 3: [1 if state is None else state[3][0] + 1]}, self.eta * last


class Pair(NamedTuple):
    m: object
    t: int


@dataclass(frozen=True)
class Named(opt.AbstractRule):
    """A user's rule with a named tuple for a state."""

    eta: float = 0.1

    def init(self, x):
        return Pair(0 * x, 0)

    def apply(self, state, x, dx):
        m = state.m + dx
        return Pair(m, state.t + 1), self.eta * m / (state.t + 1)


@pytest.mark.parametrize("rule", [Lazy(0.2), Named(0.2), opt.OptimiserChain(Lazy(), Named())])
def test_rules_of_users(rule, path):
    model = {"w": noise(3)}
    state, model = opt.update(opt.setup(rule, model), model, model)
    opt.save(path, state)
    for like in (model, opt.setup(rule, model), state):
        loaded = opt.load(path, like)
        assert loaded == state
        assert type(loaded["w"].state) is type(state["w"].state)
        assert opt.update(loaded, model, model)[0] == opt.update(state, model, model)[0]


def test_no_class_is_imported_on_the_word_of_a_file(path, monkeypatch):
    x = np.ones(2)
    opt.save(path, opt.setup(Lazy(), x))
    rewrite(path, lambda header: header["rules"][0].update(type="antigravity.Rule"))
    before = set(sys.modules)
    fails(lambda: opt.load(path, x), "antigravity.Rule", "nothing is imported", "give like= a state")
    assert "antigravity" not in set(sys.modules) - before
    for name in (
        "builtins.eval",
        "os.system",
        "subprocess.Popen",
        "optimisers.rules.adaptive.adam.Adam",
        "AbstractRule",
        "StateTree",
        "",
    ):
        rewrite(path, lambda header, name=name: header["rules"][0].update(type=name))
        fails(lambda: opt.load(path, x))


def keeping(value):
    """A rule with this state."""

    @dataclass(frozen=True)
    class Keeping(opt.AbstractRule):
        def init(self, x):
            return value

        def apply(self, state, x, dx):
            return state, dx

    return Keeping()


def test_what_a_file_cannot_hold(path):
    x = np.ones(2)
    fails(lambda: opt.save(path, opt.setup(keeping(2**63), x)), "whole numbers of 64 bits")
    fails(lambda: opt.save(path, opt.setup(keeping({(1, 2): 3}), x)), "the key (1, 2)")
    fails(lambda: opt.save(path, opt.setup(keeping(np.ones(2, np.longdouble)), x)), "safetensors cannot hold")
    assert not list(path.parent.iterdir())
    opt.save(path, opt.setup(keeping({1: 2, "1": 3.0}), x))  # keys that look alike
    assert opt.load(path, x)[()].state == {1: 2, "1": 3.0}


# --- what does not fit --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(path):
    shared = np.ones((2, 2))
    model = {"a": {"w": np.ones((3, 2)), "b": np.ones(3)}, "tie": [shared, shared]}
    state = opt.setup(opt.Adam(), model)
    state, _ = opt.update(state, model, model)
    opt.save(path, state)
    return path, model, state


@pytest.mark.parametrize("as_state", [False, True])
@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (
            lambda m: m["a"].update(v=m["a"].pop("w")),
            ["missing: 'a.v' (numpy float64 3x2) is not in the file", "unexpected: 'a.w' (numpy float64 3x2)", "rename="],
        ),
        (lambda m: m["a"].pop("b"), ["unexpected: 'a.b' (numpy float64 3) is not in the model", "strict=False"]),
        (lambda m: m.update(c=np.ones(1)), ["missing: 'c' (numpy float64 1)", "opt.extend"]),
        (
            lambda m: m["a"].update(w=np.ones((4, 2))),
            ["mismatched: 'a.w': numpy float64 3x2 in the file, numpy float64 4x2 here"],
        ),
        (
            lambda m: m["a"].update(w=np.ones((3, 2), "float32")),
            ["'a.w': numpy float64 3x2 in the file, numpy float32 3x2 here"],
        ),
        (lambda m: m["a"].update(w=torch.ones(3, 2).double()), ["numpy float64 3x2 in the file, torch float64 3x2 here"]),
        (
            lambda m: m["tie"].__setitem__(1, np.ones((2, 2))),
            ["'tie.1': tied to 'tie.0' in the file, an array of its own here"],
        ),
    ],
)
def test_every_misfit_is_named(change, texts, as_state, saved):
    path, model, _ = saved
    change(model)
    like = opt.setup(opt.Adam(), model) if as_state else model
    fails(lambda: opt.load(path, like), str(path), *texts)


def test_all_misfits_are_named_at_once(saved):
    path, model, _ = saved
    model["a"] = {"w": np.ones((4, 2)), "v": np.ones(3)}
    text = fails(lambda: opt.load(path, model), "'a.w'", "'a.v'", "'a.b'")
    assert text.index("missing") < text.index("unexpected") < text.index("mismatched")


def test_arrays_untied_since_and_tied_since(saved):
    path, model, _ = saved
    model["a"]["b"] = model["extra"] = np.ones(3)
    assert opt.load(path, model)["extra"].rule == opt.Adam()  # a name that the file knows nothing of
    loose = {"x": np.ones(2), "y": np.ones(2)}
    opt.save(path, opt.setup(opt.Adam(), loose))
    loose["y"] = loose["x"]
    fails(lambda: opt.load(path, loose), "'y': an array of its own in the file, tied to 'x' here")


def test_a_parameter_that_is_not_trained_any_more(path):
    net = torch.nn.Linear(2, 2)
    opt.save(path, opt.setup(opt.Adam(), net))
    net.bias.requires_grad_(False)
    fails(lambda: opt.load(path, net), "'bias'", "is in the model, but is not trained there (requires_grad")


def test_other_rules_do_not_fit(saved):
    path, model, _ = saved
    fails(lambda: opt.load(path, opt.setup(opt.Lion(), model)), "'a.b': its rule is Adam in the file, Lion here")
    chain = opt.OptimiserChain(opt.ClipGrad(), opt.Adam())
    fails(lambda: opt.load(path, opt.setup(chain, model)), "Adam in the file, OptimiserChain with ClipGrad, Adam here")
    rule = opt.Route(("a.b", None), otherwise=opt.Adam())
    fails(lambda: opt.load(path, opt.setup(rule, model)), "'a.b': trained in the file, not trained here")
    fails(lambda: opt.load(path, opt.setup(opt.Adam(), model, state_dtype="float32")), "float64 in the file, float32 here")


def test_what_fits_is_taken(saved):
    path, model, state = saved
    model["a"] = {"w": np.ones((4, 2)), "v": np.ones(3), "b": model["a"]["b"]}
    for like in (model, opt.setup(opt.Adam(eta=0.5), model)):
        loaded = opt.load(path, like, strict=False)
        assert loaded["a"]["b"] == state["a"]["b"]
        assert loaded["tie"][0] == state["tie"][0]
        eta = 0.5 if isinstance(like, opt.StateTree) else 0.001
        assert loaded["a"]["w"] == opt.setup(opt.Adam(eta), model["a"]["w"])[()]
        assert loaded["a"]["v"].state[2] == (0.9, 0.999)
        assert opt.summary(loaded, by="path").count("started anew, since the file had nothing that fits") == 2
        opt.update(loaded, model, model)


def test_what_fits_of_several_rules_needs_a_state(path):
    model = {"a": np.ones(2), "b": np.ones(2)}
    opt.save(path, opt.setup(opt.Route(("a", opt.Lion()), otherwise=opt.Adam()), model))
    model["c"] = np.ones(2)
    fails(lambda: opt.load(path, model, strict=False), "nothing that fits 'c'", "2 different rules", "give like= a state")
    assert opt.load(path, opt.setup(opt.Lion(), model), strict=False)["c"].rule == opt.Lion()


def test_renamed_layers(saved):
    path, model, state = saved
    model["block"] = model.pop("a")

    def rename(old):
        return old.replace("a.", "block.")

    loaded = opt.load(path, model, rename=rename)
    assert loaded["block"]["w"] == state["a"]["w"]
    assert loaded["tie"][1] == state["tie"][0]
    fails(lambda: opt.load(path, model, rename=lambda old: "same"), "two entries for 'same'", "rename=")


def test_wrong_arguments(saved, tmp_path):
    path, model, state = saved
    fails(lambda: opt.save(path, model), "save(path, state)", kind=ArgumentError)
    fails(lambda: opt.save(state, path), "save(path, state)", kind=ArgumentError)
    fails(lambda: opt.load(tmp_path / "none", model), kind=FileNotFoundError)
    fails(lambda: opt.load(tmp_path, model), kind=OSError)
    fails(lambda: opt.save(tmp_path / "no" / "folder", state), kind=FileNotFoundError)
    new, _ = opt.update_(state, model, model)
    fails(lambda: opt.save(path, state), "consumed", kind=ConsumedStateError)
    fails(lambda: opt.load(path, state), "consumed", kind=ConsumedStateError)
    assert opt.load(path, new) != new


def test_inside_a_transform_there_is_nothing_to_save(path):
    def f(x):
        opt.save(path, opt.update(opt.setup(opt.Momentum(), x), x, x)[0])
        return x.sum()

    fails(lambda: torch.func.vmap(f)(torch.ones(2, 3)), "outside of torch.func transforms")


def test_a_missing_package_is_named(saved, monkeypatch):
    path, model, state = saved
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: opt.save(path, state), lambda: opt.load(path, model)):
        fails(call, "pip install safetensors", kind=MissingPackageError)
    assert issubclass(MissingPackageError, ImportError)


def test_the_package_is_imported_only_when_asked_for():
    code = "import sys, optimisers as o; o.save, o.load; sys.exit(bool({'torch', 'safetensors'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {"save", "load"} <= set(opt.__all__)


# --- writing ------------------------------------------------------------------------------------------------------------


def test_the_file_has_the_usual_permissions_and_nothing_else_is_left(saved):
    path, _, _ = saved
    plain = path.with_name("plain")
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert sorted(p.name for p in path.parent.iterdir()) == ["plain", path.name]


def test_a_link_stays_a_link(saved):
    path, model, state = saved
    link = path.with_name("latest")
    link.symlink_to(path.name)
    opt.save(link, opt.adjust(state, 0.5))
    assert link.is_symlink()
    assert opt.load(path, model)["a"]["w"].rule.eta == 0.5


@pytest.mark.parametrize(
    ("where", "what"), [(_tensor_file, "raw"), (_tensor_file, "_checksum"), (os, "fsync"), (Path, "replace"), (Path, "open")]
)
def test_a_failure_leaves_the_old_file(where, what, saved, monkeypatch):
    path, model, state = saved

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, what, fail)
    fails(lambda: opt.save(path, opt.adjust(state, 0.5)), kind=OSError)
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert opt.load(path, model) == state


def test_forgotten_files_are_removed(saved):
    path, _, state = saved
    old, young = (path.with_name(f".{path.name}.{letter * 32}.tmp") for letter in "ab")
    other = path.with_name(f".x{path.name}.{'c' * 32}.tmp")
    for file in (old, young, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (time.time() - 4000,) * 2)
    opt.save(path, state)
    assert not old.exists()
    assert young.exists()
    assert other.exists()


KILLED = '''
import os, random, signal, sys, time
import numpy as np
import optimisers as opt

path = sys.argv[1]
model = {"w": np.ones((150, 1000)), "b": np.ones(7)}
state = opt.setup(opt.Adam(), model)


def saved(k):
    """The k-th state: its numbers are all k."""
    leaves = [{"w": np.full((150, 1000), float(k)), "b": np.full(7, float(k))}] * 2
    return opt.adjust(opt.update(state, model, leaves[0])[0], eta=k / 1000)


random.seed(0)
opt.save(path, saved(0))
start = time.monotonic()
opt.save(path, saved(0))
once = time.monotonic() - start
seen = set()
for turn in range(50):
    child = os.fork()
    if child == 0:
        for k in range(turn, 1000):
            opt.save(path, saved(k % 50))
        os._exit(0)
    time.sleep(random.uniform(0, 8 * once))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = opt.load(path, model)
    k = round(loaded["b"].rule.eta * 1000)
    assert loaded == saved(k), k
    seen.add(k)
left = [name for name in os.listdir(os.path.dirname(path)) if name.endswith(".tmp")]
print(len(seen), len(left))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "files"
    folder.mkdir()
    done = python(script, folder / "state.safetensors")
    states, left = map(int, done.split())
    assert states > 1  # some saves came through whole between the kills, however slow the machine
    assert left > 0  # and some were killed in the middle of writing


def python(*args):
    """What a fresh process prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(__file__).parent)])}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- resuming in a fresh process ----------------------------------------------------------------------------------------

RESUMED = {
    "adam": opt.Adam(),
    "chain": opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.WeightDecay(0.01), opt.RAdam()),
    "muon": opt.Muon(),
    "apollo": opt.Apollo(u=3),
    "accumulated": opt.OptimiserChain(opt.AccumGrad(3), opt.AdamW(lambda_=0.1)),
    "scheduled": opt.Scheduled(opt.AMSGrad(), eta=halve),
    "mixed": opt.MixedPrecision(opt.NAdam(), "float64"),
    "controlled": opt.OptimiserChain(opt.GradNormControl(), opt.Lion()),
    "adaptive": opt.OptimiserChain(opt.AdaptiveGradNormControl(), opt.OAdam()),
}


def resume(folder):
    """In a fresh process: load what was saved, go on for M steps, save the state and the model."""
    for lib in ("numpy", "torch"):
        for name, rule in RESUMED.items():
            model = tree(lib)
            weights = opt.load(Path(folder) / f"{lib}-{name}-model", opt.setup(MASTER, model))
            model = restored(model, weights)
            like = opt.setup(rule, model) if name == "scheduled" else model
            state, model = run(opt.load(Path(folder) / f"{lib}-{name}", like), model, 7, 5)
            opt.save(Path(folder) / f"{lib}-{name}-after", state)
            opt.save(Path(folder) / f"{lib}-{name}-model-after", opt.setup(MASTER, model))


MASTER = opt.MixedPrecision(opt.Descent(), "float64")  # its state is a copy of the model, which serves to store one here


def restored(model, weights):
    """The model with the values that a state of MASTER holds."""
    for x, entry in zip(opt.trainables(model), weights._entries, strict=True):
        value = entry.state[0]
        x[...] = value if isinstance(x, np.ndarray) else value.to(x.dtype)
    return model


def test_resuming_in_a_fresh_process_is_exact(tmp_path, monkeypatch):
    natively(monkeypatch)  # other loops add up in another order
    expected = {}
    for lib in ("numpy", "torch"):
        for name, rule in RESUMED.items():
            model = tree(lib)
            state, model = run(opt.setup(rule, model), model, 0, 7)
            opt.save(tmp_path / f"{lib}-{name}", state)
            opt.save(tmp_path / f"{lib}-{name}-model", opt.setup(MASTER, model))
            expected[lib, name] = run(state, model, 7, 5)
    python("-W", "error", "-c", "import sys, test_checkpoint; test_checkpoint.resume(sys.argv[1])", tmp_path)
    for (lib, name), (state, model) in expected.items():
        assert opt.load(tmp_path / f"{lib}-{name}-after", state) == state, (lib, name)
        there = opt.load(tmp_path / f"{lib}-{name}-model-after", model)
        assert there == opt.setup(MASTER, model), (lib, name)


# --- damaged and hostile files ------------------------------------------------------------------------------------------


def rewrite(path, change):
    """Change the description in a file and put the checksum right, as someone who means harm would."""
    text, tensors = _tensor_file.read(path)
    header = json.loads(text)
    change(header)
    _tensor_file.write(path, tensors, json.dumps(header))


def raw_header(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_raw(path, header, data):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def test_a_truncated_file_is_refused(saved):
    path, model, _ = saved
    whole = path.read_bytes()
    for length in [*range(64), *range(64, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        fails(lambda: opt.load(path, model), str(path))
    path.write_bytes(whole + b"\0")
    fails(lambda: opt.load(path, model), str(path))


def test_every_flipped_bit_is_found(saved):
    path, model, state = saved
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = {*range(24), *range(len(whole) - 24, len(whole)), *rng.integers(0, len(whole), 400).tolist()}
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        fails(lambda: opt.load(path, model))
    path.write_bytes(whole)
    assert opt.load(path, model) == state


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001])
def test_a_huge_header_length_allocates_nothing(length, saved):
    path, model, _ = saved
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    fails(lambda: opt.load(path, model), str(path))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + b"\0" * 100, b"\x80\x04\x95" + b"x" * 50, b"{}", b"\0" * 8, b"\0" * 4096]
)
def test_other_files_are_refused(content, path):
    path.write_bytes(content)
    fails(lambda: opt.load(path, np.ones(1)), str(path))


def test_a_pickle_is_not_opened(path):
    torch.save({"w": torch.ones(2)}, path)
    fails(lambda: opt.load(path, torch.ones(2)), str(path))


def test_other_safetensors_files_are_refused(path):
    safetensors_torch.save_file({"w": torch.ones(2)}, path)
    fails(lambda: opt.load(path, torch.ones(2)), "not one that opt.save made")


def first_tensor(header):
    return next(value for name, value in header.items() if name != "__metadata__")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(shape=[10**9, 10**9]),
        lambda t: t.update(shape=[2**62, 4]),
        lambda t: t.update(shape=[-1]),
        lambda t: t.update(shape=[6, 1]),
        lambda t: t.update(dtype="F32"),
        lambda t: t.update(dtype="I64"),
        lambda t: t.update(dtype="pickle"),
        lambda t: t.update(data_offsets=[0, 2**62]),
        lambda t: t.update(data_offsets=[-8, 40]),
        lambda t: t.update(data_offsets=[8, 56]),
        lambda t: t.update(data_offsets=[48, 0]),
    ],
)
def test_tensors_that_lie_about_themselves_are_refused(change, saved):
    path, model, _ = saved
    header, data = raw_header(path)
    change(first_tensor(header))
    put_raw(path, header, data)
    fails(lambda: opt.load(path, model))


def test_overlapping_tensors_are_refused(saved):
    path, model, _ = saved
    header, data = raw_header(path)
    names = [name for name in header if name != "__metadata__"]
    alike = next((a, b) for a in names for b in names if a != b and header[a]["shape"] == header[b]["shape"])
    header[alike[1]]["data_offsets"] = header[alike[0]]["data_offsets"]
    put_raw(path, header, data)
    fails(lambda: opt.load(path, model))


def test_names_are_only_names(saved, tmp_path):
    path, model, _ = saved

    def traverse(header):
        header["entries"][0]["path"] = "../../../../tmp/outside"
        header["entries"][1]["path"] = "/etc/passwd"

    rewrite(path, traverse)
    before = sorted(p.name for p in tmp_path.iterdir())
    fails(lambda: opt.load(path, model), "unexpected: '../../../../tmp/outside'", "'/etc/passwd'")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def put(key, value):
    return lambda header: header.update({key: value})


def in_entry(key, value):
    return lambda header: header["entries"][0].update({key: value})


def in_rule(key, value):
    return lambda header: header["rules"][0].update({key: value})


def in_field(key, value):
    return lambda header: header["rules"][0]["fields"].update({key: value})


def in_state(i, value):
    return lambda header: header["entries"][0]["state"]["tuple"].__setitem__(i, value)


def nested(depth, word="tuple"):
    value = None
    for _ in range(depth):
        value = {word: [value]}
    return value


HOSTILE = {
    "schema-2": (put("schema", 2), "schema 2"),
    "schema-true": (put("schema", True), "schema True"),
    "schema-text": (put("schema", "1" * 10_000), "schema '111"),
    "no-schema": (lambda h: h.pop("schema"), "schema None"),
    "rules-object": (put("rules", {}), "lacks its rules"),
    "entries-null": (put("entries", None), "lacks"),
    "untrained-numbers": (put("untrained", [1]), "lacks"),
    "entry-number": (put("entries", [3]), "describes no array"),
    "entries-twice": (lambda h: h["entries"].append(h["entries"][0]), "two entries for 'a.b'"),
    "path-number": (in_entry("path", 3), "describes no array"),
    "shape-negative": (in_entry("shape", [-3]), "describes no array"),
    "shape-huge": (in_entry("shape", [10**30]), "'a.b'"),
    "shape-float": (in_entry("shape", [3.0]), "describes no array"),
    "dtype-other": (in_entry("dtype", "float16"), "numpy float16 3 in the file"),
    "kind-other": (in_entry("kind", "jax"), "describes no array"),
    "frozen-number": (in_entry("frozen", 1), "describes no array"),
    "rule-far": (in_entry("rule", 10**6), "describes no array"),
    "rule-negative": (in_entry("rule", -1), "describes no array"),
    "rule-true": (in_entry("rule", True), "describes no array"),
    "base-missing": (in_entry("base", None), "describes no array"),
    "state-null": (in_entry("state", None), "'a.b': its state is missing from the file"),
    "state-number": (in_entry("state", 3), "means nothing"),
    "state-word": (in_entry("state", {"pickle": "gASV"}), "means nothing"),
    "state-short": (lambda h: h["entries"][0]["state"]["tuple"].pop(), "a tuple of 2 in the file"),
    "state-list": (in_entry("state", {"list": [None, None, None]}), "a list of 3 in the file"),
    "state-dict": (in_entry("state", {"dict": [["a", None]]}), "has the keys ['a'] in the file"),
    "state-dict-odd": (in_entry("state", {"dict": [["a"]]}), "its keys are not"),
    "state-deep": (in_entry("state", nested(200)), "a tuple of 1 in the file"),
    "tensor-unknown": (in_state(0, {"array": "x", "dtype": "float64"}), "its tensor 'x' is not in the file"),
    "tensor-list": (in_state(0, {"array": ["x"], "dtype": "float64"}), "is not in the file"),
    "tensor-other": (in_state(0, {"array": "a.w:state.0", "dtype": "float64"}), "shape (3, 2) in the file, (3,) here"),
    "tensor-dtype": (in_state(0, {"array": "a.b:state.0", "dtype": "float32"}), "described as float32"),
    "tensor-complex": (in_state(0, {"array": "a.b:state.0", "dtype": "complex128"}), "stored as pairs"),
    "tensor-no-dtype": (in_state(0, {"array": "a.b:state.0"}), "its state at 0"),
    "axes-twice": (in_state(0, {"array": "a.b:state.0", "dtype": "float64", "axes": [0, 0]}), "no order"),
    "axes-text": (in_state(0, {"array": "a.b:state.0", "dtype": "float64", "axes": ["x"]}), "'a.b'"),
    "axes-object": (in_state(0, {"array": "a.b:state.0", "dtype": "float64", "axes": 7}), "'a.b'"),
    "array-as-number": (in_state(0, {"float": "a.b:state.0"}), "described as a number"),
    "number-for-array": (in_state(0, {"float": "a.b:state.2.0"}), "is a number in the file"),
    "float-as-int": (in_state(2, {"tuple": [{"int": "a.b:state.2.0"}] * 2}), "described as a number"),
    "rule-text": (put("rules", ["Adam()"] * 2), "in its place"),
    "rule-list": (put("rules", [[], []]), "in its place"),
    "rule-iteration": (in_rule("type", "NewtonSchulz"), "cannot be"),
    "rule-abstract": (in_rule("type", "AbstractRule"), "no rule of this library"),
    "rule-fields": (in_rule("fields", [1]), "describes nothing"),
    "rule-deep": (put("rules", [nested(200, "type")] * 2), "describes nothing"),
    "field-unknown": (in_field("lr", 0.1), "Adam has no field 'lr'"),
    "field-range": (in_field("eta", -1.0), "must be a finite number >= 0"),
    "field-type": (in_field("eta", "fast"), "must be a finite number"),
    "field-infinite": (in_field("eta", {"float": "inf"}), "must be a finite number"),
    "field-eval": (in_field("eta", {"float": "__import__('os')"}), "describes nothing"),
    "field-tensor": (in_field("eta", {"tensor": "none"}), "is not in the file"),
    "field-array": (in_field("eta", {"tensor": "a.w:state.0"}), "not the 0-d floating point tensor"),
    "field-call": (in_field("eta", {"callable": "os.system"}), "give like= a state"),
    "field-object": (in_field("eta", {"object": "os.environ"}), "give like= a state"),
    "scheduled-bare": (lambda h: h["rules"][0].update(type="Scheduled", fields={"rule": None}), "gives no schedules"),
    "scheduled-name": (
        lambda h: h["rules"][0].update(type="Scheduled", fields={"rule": None, "schedules": {"eta": 3}}),
        "cannot be",
    ),
    "chain-null": (lambda h: h["rules"][0].update(type="OptimiserChain", fields={}), "cannot be"),
    "chain-rules": (lambda h: h["rules"][0].update(type="OptimiserChain", fields={"rules": [1]}), "cannot be"),
    "muon-vector": (lambda h: h["rules"][0].update(type="Muon", fields={"_matrix": True}), "'a.w'"),
    "orthogonal-vector": (lambda h: h["rules"][0].update(type="Orthogonalise", fields={}), "Orthogonalise refuses it"),
    "apollo-rank": (lambda h: h["rules"][0].update(type="Apollo", fields={"rank": 10**12}), "'a.w'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_description_that_lies_is_refused(name, saved):
    path, model, _ = saved
    change, text = HOSTILE[name]
    rewrite(path, change)
    fails(lambda: opt.load(path, model), text)
    if "shape" in name or "state" in name or "tensor" in name:
        fails(lambda: opt.load(path, opt.setup(opt.Adam(), model)), text)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "NaN", '{"schema": NaN}', "[" * 100_000, '{"schema":' * 50_000, "1" * 10_000]
)
def test_descriptions_that_are_no_description(text, saved):
    path, model, _ = saved
    _, tensors = _tensor_file.read(path)
    _tensor_file.write(path, tensors, text)
    fails(lambda: opt.load(path, model), str(path))


def test_a_state_that_nests_too_deep(path):
    x = np.ones(2)
    opt.save(path, opt.setup(Lazy(), x))
    deep = '{"tuple":[' * 300 + "null" + "]}" * 300
    text, tensors = _tensor_file.read(path)
    header = json.loads(text)
    header["entries"][0]["state"] = "@"
    limit = sys.getrecursionlimit()
    _tensor_file.write(path, tensors, json.dumps(header).replace('"@"', deep))
    sys.setrecursionlimit(250)
    try:
        fails(lambda: opt.load(path, x), str(path))
    finally:
        sys.setrecursionlimit(limit)


def test_a_file_of_bfloat16_without_torch_is_explained(path):
    opt.save(path, opt.setup(opt.Momentum(), torch.ones(2, dtype=torch.bfloat16)))
    code = (
        "import sys, numpy, optimisers as o\n"
        "try: o.load(sys.argv[1], numpy.ones(2))\n"
        "except o.errors.CheckpointError as error: print(error)"
    )
    assert "import torch before loading" in python("-c", code, path)


# --- flat dicts ---------------------------------------------------------------------------------------------------------


def test_a_state_dict_goes_through_torch_save(path):
    model = {"w": torch.ones(3, 2), "z": torch.ones((), dtype=torch.complex64)}
    rule = opt.OptimiserChain(opt.AccumGrad(2), opt.MixedPrecision(opt.Adam(), "float64").rule)
    state, model = opt.update(opt.setup(rule, model), model, model)
    flat = checkpoint.state_dict(state)
    assert all(isinstance(value, torch.Tensor) for value in flat.values())
    torch.save(flat, path.with_suffix(".pt"))
    again = torch.load(path.with_suffix(".pt"), weights_only=True)
    loaded = checkpoint.load_state_dict(opt.setup(rule, model), again)
    assert loaded == state
    a, b = opt.update(state, model, model), opt.update(loaded, model, model)
    assert a[0] == b[0]
    again["w:state.0.0"].zero_()  # copied, not shared
    assert loaded == state


def test_a_state_dict_of_numpy_arrays():
    model = {"w": np.ones(3)}
    state, model = opt.update(opt.setup(opt.Adam(), model), model, model)
    flat = checkpoint.state_dict(state)
    assert {name: value.shape for name, value in flat.items()} == {
        "w:state.0": (3,),
        "w:state.1": (3,),
        "w:state.2.0": (),
        "w:state.2.1": (),
    }
    assert checkpoint.load_state_dict(opt.setup(opt.Adam(), model), flat) == state


def test_a_state_dict_that_does_not_fit_is_explained():
    state = opt.setup(opt.Adam(), {"w": torch.ones(3), "b": torch.ones(1)})
    flat = checkpoint.state_dict(state)
    del flat["w:state.0"]
    flat |= {"x": torch.ones(1), "b:state.0": torch.ones(2), "b:state.1": torch.ones(1).double(), "w:state.2.0": 3}
    text = fails(lambda: checkpoint.load_state_dict(state, flat), "missing: 'w:state.0'", "unexpected: 'x'", "'b:state.0'")
    assert "'b:state.1' is float64; the state has float32" in text
    assert "'w:state.2.0' is an int 3; the state has a 0-d array" in text
    fails(lambda: checkpoint.state_dict({}), kind=ArgumentError)
    fails(lambda: checkpoint.load_state_dict({}, state), "(like, arrays)", kind=ArgumentError)


def test_the_module_loads_by_its_name():
    module = importlib.import_module("optimisers.interop.checkpoint")
    assert module.__all__ == ["load", "load_state_dict", "save", "state_dict"]


# --- any description at all ----------------------------------------------------------------------------------------------

POOL = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2.5,
    10**400,
    1e308,
    "",
    "a",
    "float64",
    "bfloat16",
    "Adam",
    "Muon",
    "numpy",
    [],
    [1],
    {},
]
POOL += [[0.9, 0.99], [None], ["a.b:state.0"], {"float": "nan"}, {"tensor": "a.b:state.0"}, {"callable": "os.system"}]
POOL += [{"type": "Adam", "fields": {}}, {"type": "NewtonSchulz", "fields": {}}, {"tuple": []}, {"array": "a.b:state.0"}]


def spots(data):
    """Every place in plain data, as (container, key)."""
    for key in data if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from spots(data[key])


def test_no_description_does_anything_but_load_or_fail(path):
    model = {"a": {"w": noise(3, 2), "b": noise(3)}}
    rules = [
        opt.Muon(ns=opt.NewtonSchulz(coefficients=((1.0, 2.0, 3.0),))),
        opt.Apollo(),
        opt.MixedPrecision(opt.Averaged(opt.Adam()), "float32"),
        opt.OptimiserChain(opt.ClipNorm(), opt.AccumGrad(2), opt.StochasticRounding(opt.Rprop())),
    ]
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for rule in rules:
        opt.save(path, opt.setup(rule, model))
        text, tensors = _tensor_file.read(path)
        for _ in range(250):
            header = json.loads(text)
            places = list(spots(header))
            container, key = places[rng.integers(len(places))]
            container[key] = POOL[rng.integers(len(POOL))]
            _tensor_file.write(path, tensors, json.dumps(header))
            try:
                loaded = opt.load(path, [model, opt.setup(rule, model)][rng.integers(2)])
            except CheckpointError:
                outcomes[False] += 1
            else:
                outcomes[True] += 1
                assert isinstance(loaded, opt.StateTree)
    assert min(outcomes.values()) > 10


def test_a_program_without_torch_saves_and_loads(path):
    code = (
        "import sys, numpy as np, optimisers as o\n"
        "m = {'z': np.ones((2, 3), 'complex64'), 's': np.asarray(1j), 'f': np.asfortranarray(np.ones((2, 3), 'float16'))}\n"
        "s, m = o.update(o.setup(o.Adam(), m), m, m)\n"
        "o.save(sys.argv[1], s)\n"
        "assert o.load(sys.argv[1], m) == s == o.load(sys.argv[1], s)\n"
        "assert 'torch' not in sys.modules"
    )
    python("-W", "error", "-c", code, path)
    model = {"z": np.ones((2, 3), "complex64"), "s": np.asarray(1j), "f": np.ones((2, 3), "float16")}
    assert opt.load(path, model)["f"].state[0].strides == (2, 4)
