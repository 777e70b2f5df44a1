"""States of models that change: extend, to, and what hyper and summary say of them."""

import math

import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.errors import (
    ArgumentError,
    ConsumedStateError,
    HyperParameterError,
    ModelError,
    RuleError,
    SelectionError,
    StructureError,
)
from optimisers.rules._states import state_leaves
from optimisers.tree.show import state_bytes
from table import ROWS
from test_checkpoint import Lazy


def model_of(**shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def stepped(rule, model, steps=3):
    state = opt.setup(rule, model)
    for _ in range(steps):
        state, model = opt.update(state, model, {key: 0.1 * x + 1 for key, x in model.items()})
    return state, model


def fails(kind, call, *fragments):
    with pytest.raises(kind) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


def reason(state, path):
    return next(entry.reason for slot, entry in zip(state._slots, state._entries, strict=True) if slot.path == path)


# --- extend ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lib", ["numpy", "torch"])
def test_what_is_as_before_is_kept_and_shared(lib):
    model = model_of(a=(3, 2), b=(3,))
    if lib == "torch":
        model = {key: torch.from_numpy(x) for key, x in model.items()}
    state, model = stepped(opt.Adam(), model)
    said = []
    new = opt.extend(state, {**model, "c": model["b"] + 1}, report=said.append)
    assert new["a"] == state["a"]
    assert new["a"].state[0] is state["a"].state[0]
    assert new["c"] == opt.setup(opt.Adam(), model["b"])[()]
    assert said == ["kept 2 arrays as they were\nadded 'c': Adam (the rule of all others)"]
    assert reason(new, "a") == "the rule given to setup"
    assert reason(new, "c") == "added: the rule of all others"
    assert opt.extend(new, {**model, "c": model["b"] + 1}) == new


def test_what_is_gone_is_dropped():
    state, model = stepped(opt.Adam(), model_of(a=(2,), b=(3,)))
    said = []
    new = opt.extend(state, {"a": model["a"]}, report=said.append)
    assert list(new) == ["a"]
    assert said == ["kept 1 array as they were\ndropped 'b'"]
    opt.update(new, {"a": model["a"]}, {"a": model["a"]})


def test_new_arrays_take_the_present_rule_and_the_base_of_setup():
    state, model = stepped(opt.Adam(eta=0.1), model_of(a=(2,)))
    new = opt.extend(opt.adjust(state, 0.02), {**model, "b": np.ones(2)})
    assert new["b"].rule == opt.Adam(eta=0.02)
    assert opt.adjust(new, times=0.5)["b"].rule == opt.Adam(eta=0.05)
    one = opt.adjust(opt.extend(state, {**model, "b": np.ones(2)}), 0.02, where="a")
    new = opt.extend(one, {**model, "b": np.ones(2), "c": np.ones(2)})
    assert new["c"].rule == opt.Adam(eta=0.1)  # those present differ


def test_several_rules_need_a_rule_for_what_is_new():
    rule = opt.Route(("a", opt.Lion()), ("*", opt.Adam()))
    state, model = stepped(rule, model_of(a=(2,), b=(2,)))
    model["lora"] = np.ones((2, 2))
    fails(ArgumentError, lambda: opt.extend(state, model), "2 different rules", "rule=", "'lora'")
    assert opt.extend(state, model, rule=opt.Descent())["lora"].rule == opt.Descent()
    assert opt.extend(state, model, rule=rule)["lora"].rule == opt.Adam()
    narrow = opt.Route(("lora*", opt.Momentum()))  # no pattern for what is kept
    assert opt.extend(state, model, rule=narrow)["lora"].rule == opt.Momentum()
    asked = []
    opt.extend(state, model, rule=lambda p: asked.append(p.path) or opt.Muon())
    assert asked == ["lora"]
    assert opt.extend(state, model, rule=lambda p: None)["lora"].rule is None
    fails(
        SelectionError, lambda: opt.extend(state, model, rule=opt.Route(("lorra", opt.Adam()), otherwise=opt.Adam())), "lorra"
    )
    fails(SelectionError, lambda: opt.extend(state, model, rule=opt.Route(("a", opt.Adam()))), "'lora'")


def test_frozen_flags_are_kept():
    state, model = stepped(opt.Adam(), model_of(a=(2, 2), b=(2,)))
    state = opt.freeze(state)
    for resize in ("restart", "overlap"):
        new = opt.extend(state, {"a": np.ones((3, 2)), "b": model["b"], "c": np.ones(1)}, resize=resize)
        assert [new[key].frozen for key in "abc"] == [True, True, False]


def test_resized_arrays_start_anew_unless_asked():
    state, model = stepped(opt.Adam(eta=0.1), model_of(emb=(4, 3), b=(3,)))
    state = opt.adjust(state, 0.02)
    model["emb"] = np.vstack([model["emb"], np.ones((2, 3))])
    new = opt.extend(state, model)
    assert new["emb"] == opt.adjust(opt.setup(opt.Adam(0.1), model["emb"]), 0.02)[()]
    assert "restarted: numpy float64 4x3 became numpy float64 6x3" in str(new)
    said = []
    new = opt.extend(state, model, resize="overlap", report=said.append)
    m, v, powers = new["emb"].state
    assert np.array_equal(m[:4], state["emb"].state[0])
    assert np.array_equal(v[:4], state["emb"].state[1])
    assert not m[4:].any()
    assert powers == state["emb"].state[2]
    assert "kept the common block of 'emb'" in said[0]
    opt.update(new, model, model)
    small = opt.extend(new, {"emb": np.ones((2, 5)), "b": model["b"]}, resize="overlap")
    assert np.array_equal(small["emb"].state[0][:, :3], m[:2])
    assert not small["emb"].state[0][:, 3:].any()


# The moments are those of a projection, of rows and columns, of blocks.
OVERLAP_RESTARTS = {
    "Apollo",
    "LowRank",
    "LowRank at random",
    "Adafactor",
    "Came",
    "AdamMini",
    "SOAP",
    "Shampoo",
    "Kron",
    "NorMuon",
}


@pytest.mark.parametrize("resize", ["restart", "overlap"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_rule_goes_on_after_a_change(row, resize):
    model = model_of(a=(4, 3), b=(4, 3))
    state, model = stepped(row.configs[0], model)
    model = {"a": model["a"], "b": np.vstack([model["b"], model["b"][:2]]), "c": np.ones((2, 3))}
    new = opt.extend(state, model, resize=resize)
    assert new["a"] == state["a"]
    assert new["c"] == opt.setup(row.configs[0], model)["c"]
    for _ in range(3):
        new, model = opt.update(new, model, model)
    kept = reason(new, "b").startswith("common block kept")
    assert kept == (resize == "overlap" and row.name not in OVERLAP_RESTARTS)


def test_a_master_copy_grows_with_its_array():
    model = {"w": torch.ones(2, 2, dtype=torch.bfloat16)}
    state, model = stepped(opt.MixedPrecision(opt.Adam()), model)
    grown = {"w": torch.cat([model["w"], torch.full((1, 2), 3.0, dtype=torch.bfloat16)])}
    master = opt.extend(state, grown, resize="overlap")["w"].state[0]
    assert torch.equal(master[:2], state["w"].state[0])
    assert torch.equal(master[2], torch.full((2,), 3.0))


def test_another_dtype_or_library_starts_anew():
    state, model = stepped(opt.Adam(), model_of(a=(2,), b=(2,)))
    new = opt.extend(state, {"a": model["a"].astype("float32"), "b": torch.ones(2)}, resize="overlap", report=print)
    assert new["a"].state[0].dtype == np.float32
    assert not new["b"].state[0].any()


def test_layers_thawed_later_in_a_module_join():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    net[0].requires_grad_(False)
    state = opt.setup(opt.AdamW(), net)
    net(torch.ones(3, 2)).sum().backward()
    state, _ = opt.update_(state, net)
    net[0].requires_grad_(True)
    new = opt.extend(state, net)
    assert new["1.weight"] == state["1.weight"]
    assert new["0.weight"].rule == opt.AdamW()
    net.append(torch.nn.Linear(1, 1))
    net(torch.ones(3, 2)).sum().backward()
    new, _ = opt.update_(opt.extend(new, net), net)
    fails(ConsumedStateError, lambda: opt.extend(state, net), "consumed")
    assert len(new) == 6


def test_trainable_and_state_dtype():
    state, model = stepped(opt.Adam(), model_of(a=(2,)))
    new = opt.extend(
        state, {**model, "b": np.ones(2), "c": np.ones(2)}, trainable=lambda p: p.path != "c", state_dtype="float32"
    )
    assert new["b"].state[0].dtype == np.float32
    assert new["a"].state[0].dtype == np.float64
    assert new["c"] is None


def test_ties_made_and_cut():
    state, model = stepped(opt.Adam(), model_of(a=(2, 2), b=(2, 2)))
    tied = opt.extend(state, {"a": model["a"], "b": model["a"]})
    assert tied["b"] == state["a"]
    cut = opt.extend(tied, {"a": model["a"], "b": model["a"].copy()})
    assert cut["a"] == state["a"]
    assert cut["b"] == opt.setup(opt.Adam(), np.ones((2, 2)))[()]


def test_layers_that_moved():
    rng = np.random.default_rng(0)
    model = {"layers": [rng.normal(size=(2, 2)) for _ in range(3)]}
    state, _ = opt.update(opt.setup(opt.Adam(), model), model, model)
    moved = {"layers.1": "layers.0", "layers.2": "layers.1", "layers.0": "gone"}
    new = opt.extend(state, {"layers": model["layers"][1:]}, rename=moved.get)
    assert new["layers"][0] == state["layers"][1]
    assert new["layers"][1] == state["layers"][2]
    fails(ArgumentError, lambda: opt.extend(state, model, rename=lambda path: "layers.0"), "'layers.0' and 'layers.1'")


def test_extend_refuses():
    state, model = stepped(opt.Adam(), model_of(a=(2,)))
    fails(ArgumentError, lambda: opt.extend(model, state), "extend(state, model)")
    fails(ArgumentError, lambda: opt.extend(state, state), "give the model itself")
    fails(ArgumentError, lambda: opt.extend(state, model, resize="grow"), "'restart' or 'overlap'")
    fails(RuleError, lambda: opt.extend(state, model, rule=opt.Adam), "write Adam(...)")
    fails(RuleError, lambda: opt.extend(state, model, rule=0.1), "rule=")
    fails(StructureError, lambda: opt.extend(state, {"z": np.ones(2)}), "nothing would be kept")
    fails(ModelError, lambda: opt.extend(state, {"a": 3}), "no trainable array")
    fails(HyperParameterError, lambda: opt.extend(state, model, state_dtype="int8"), "extend: state_dtype")


# --- to ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lib", ["numpy", "torch"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_cast_state_has_the_dtypes_of_one_set_up_so(row, lib):
    model = model_of(a=(4, 3))
    if lib == "torch":
        model = {"a": torch.from_numpy(model["a"])}
    state, model = stepped(row.configs[0], model)
    cast = opt.to(state, dtype="float32")
    want = opt.setup(row.configs[0], model, state_dtype="float32")
    from_state = [getattr(leaf, "dtype", type(leaf)) for leaf in leaves(cast)]
    assert from_state == [getattr(leaf, "dtype", type(leaf)) for leaf in leaves(want)]
    again, _ = opt.update(cast, model, model)
    assert [getattr(leaf, "dtype", type(leaf)) for leaf in leaves(again)] == from_state
    if row.name != "MixedPrecision":  # whose moments are those of a float32 master from the start
        assert opt.to(state, dtype="float64") == state


def leaves(state):
    return state_leaves(state["a"].state)


def test_masters_and_counters_are_not_cast():
    model = {"w": torch.ones(2, dtype=torch.bfloat16)}
    state, _ = stepped(opt.MixedPrecision(opt.Adam()), model)
    master, (m, _, powers) = opt.to(state, dtype=torch.bfloat16)["w"].state
    assert master.dtype == torch.float32
    assert master is state["w"].state[0]
    assert m.dtype == torch.bfloat16
    assert all(power.dtype == torch.float64 for power in powers)


def test_complex_moments_take_the_complex_dtype():
    model = {"z": np.ones(2, "complex128")}
    m, v, _ = opt.to(stepped(opt.Adam(), model)[0], dtype="float32")["z"].state
    assert m.dtype == np.complex64
    assert v.dtype == np.float32


def test_a_cast_state_lives_on_its_own_and_a_shared_one_does_not():
    state, model = stepped(opt.Adam(), {"w": torch.ones(2)})
    cast, same = opt.to(state, dtype="float64"), opt.to(state, device="cpu")
    assert same["w"].state[0] is state["w"].state[0]
    opt.update_(state, model, model)
    fails(ConsumedStateError, lambda: str(opt.to(same, device="cpu")), "consumed")
    opt.update(cast, model, model)


def test_devices():
    model = {"w": torch.ones(2, 2)}
    moved = opt.to(stepped(opt.Muon(), model)[0], device="meta")
    assert moved["w"].state.device.type == "meta"
    state, _ = stepped(opt.Adam(), model)
    moved = opt.to(state, device=torch.device("meta"), dtype="float64")
    assert moved["w"].state[0].device.type == "meta"
    assert moved["w"].state[0].dtype == torch.float64
    assert [float(power) for power in moved["w"].state[2]] == [float(power) for power in state["w"].state[2]]
    mixed = opt.setup(opt.Adam(), {"n": np.ones(2)})
    assert opt.to(mixed, device="cpu") == mixed
    fails(ArgumentError, lambda: opt.to(mixed, device="cuda"), "'n' is a NumPy array", "'cuda'")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_goes_to_the_gpu_and_back():
    model = {"w": torch.randn(4, 3)}
    state, model = stepped(opt.Adam(), model)
    there = opt.to(state, device="cuda")
    assert opt.to(there, device="cpu") == state
    on_gpu = {"w": model["w"].cuda()}
    new, stepped_there = opt.update(there, on_gpu, on_gpu)
    _, stepped_here = opt.update(state, model, model)
    assert new["w"].state[0].device.type == "cuda"
    assert torch.allclose(stepped_there["w"].cpu(), stepped_here["w"])


def test_a_users_rule_whose_state_took_another_form():
    state, _ = stepped(Lazy(), {"w": np.ones(2)})
    assert opt.to(state, dtype="float32")["w"].state["last"].dtype == np.float32


def test_to_refuses():
    state = opt.setup(opt.Adam(), np.ones(2))
    fails(ArgumentError, lambda: opt.to(state), "device= or dtype=")
    fails(ArgumentError, lambda: opt.to({}, dtype="float32"), "expected the state")
    fails(HyperParameterError, lambda: opt.to(state, dtype="int32"), "to: dtype must be a real floating dtype")
    fails(HyperParameterError, lambda: opt.to(state, dtype="bfloat16"), "NumPy cannot compute in bfloat16")


# --- hyper -------------------------------------------------------------------------------------------------------------------


def halve(step):
    return 0.1 / 2**step


def test_a_plain_rule_shows_its_fields():
    state = opt.adjust(opt.setup(opt.Adam(), {"a": np.ones(2), "b": np.ones(2)}), 0.5, where="b")
    assert opt.hyper(state) == {
        "a": {"eta": 0.001, "beta": (0.9, 0.999), "epsilon": 1e-8},
        "b": {"eta": 0.5, "beta": (0.9, 0.999), "epsilon": 1e-8},
    }
    assert opt.hyper(opt.setup(opt.Descent(), np.ones(1))) == {"": {"eta": 0.1}}


def test_fields_of_one_name_are_told_apart():
    rule = opt.OptimiserChain(opt.ClipGrad(1.0), opt.WeightDecay(0.1), opt.ClipGrad(2.0), opt.AdamW(lambda_=0.2))
    (fields,) = opt.hyper(opt.setup(rule, {"w": np.ones(2)})).values()
    assert fields == {
        "ClipGrad#1.delta": 1.0,
        "WeightDecay.lambda_": 0.1,
        "ClipGrad#2.delta": 2.0,
        "eta": 0.001,
        "beta": (0.9, 0.999),
        "AdamW.lambda_": 0.2,
        "epsilon": 1e-8,
        "couple": True,
    }


@pytest.mark.parametrize(
    "rule",
    [
        opt.Scheduled(opt.Adam(), eta=halve),
        opt.OptimiserChain(opt.ClipGrad(), opt.Scheduled(opt.Adam(), eta=halve)),
        opt.MixedPrecision(opt.Scheduled(opt.Adam(), eta=halve), "float32"),
        opt.Scheduled(opt.MixedPrecision(opt.OptimiserChain(opt.ClipGrad(), opt.Adam())), eta=halve),
        opt.Averaged(opt.Scheduled(opt.Adam(), eta=halve)),
    ],
)
@pytest.mark.parametrize("lib", ["numpy", "torch"])
def test_schedules_have_the_value_of_the_coming_step(rule, lib):
    model = model_of(a=(2,), b=(2,))
    if lib == "torch":
        model = {key: torch.from_numpy(x) for key, x in model.items()}
    state = opt.setup(rule, model)
    for _ in range(3):
        state, model = opt.update(state, model, {"a": model["a"], "b": None})
    fields = opt.hyper(state)
    assert fields["a"]["eta"] == halve(3)
    assert fields["b"]["eta"] == halve(0)


def test_muon_and_apollo_show_what_steps_the_array():
    model = {"w": np.ones((3, 4)), "b": np.ones(3)}
    state = opt.adjust(opt.setup(opt.Muon(), model), 0.1)
    fields = opt.hyper(state)
    assert fields["w"]["eta"] == 0.1
    assert fields["w"]["mu"] == 0.95
    assert "beta" not in fields["w"]
    assert math.isclose(fields["b"].pop("eta"), 0.0015)
    assert fields["b"] == {"beta": (0.9, 0.95), "lambda_": 0.01, "epsilon": 1e-8, "couple": True}
    fields = opt.hyper(opt.setup(opt.Apollo(0.5), model))
    assert fields["w"]["eta"] == 0.5
    assert fields["w"]["u"] == 100
    assert not any(name.startswith("_") for name in fields["w"])
    assert "u" not in fields["b"]
    scheduled = opt.setup(opt.Muon(opt=opt.Scheduled(opt.Adam(), eta=halve)), model)
    assert opt.hyper(scheduled)["b"]["eta"] == 0.1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_rule_has_its_hyper_parameters(row):
    for config in row.configs:
        state, _ = stepped(config, model_of(a=(4, 3)))
        assert opt.hyper(state).keys() == {"a"}


def test_untrained_arrays_have_none_and_consumed_states_are_refused():
    rule = opt.Route(("a", None), otherwise=opt.Adam())
    state, model = stepped(rule, model_of(a=(2,), b=(2,)))
    assert opt.hyper(state)["a"] == {}
    opt.update_(state, model, model)
    fails(ConsumedStateError, lambda: opt.hyper(state), "consumed")
    fails(ArgumentError, lambda: opt.hyper(model), "expected the state")


# --- summary -----------------------------------------------------------------------------------------------------------------


def test_a_summary_of_a_tree():
    shared = np.ones((2, 2), "float32")
    model = {
        "enc": [{"w": np.ones((4, 3), "float32"), "b": np.ones(4, "float32")} for _ in range(2)],
        "tie": {"a": shared, "b": shared},
        "head": np.ones(300),
        "steps": np.arange(3),
        "name": "x",
        "left": np.ones(2),
    }
    rule = opt.Route(("enc.*.b", opt.Descent()), ("head", None), otherwise=opt.Adam())
    state = opt.freeze(opt.setup(rule, model, trainable=lambda p: p.path != "left"), where="enc.1.w")
    assert opt.summary(state, model).splitlines() == [
        "owner        type  arrays  trained  frozen  parameters  bytes    state  rules",
        "-----------  ----  ------  -------  ------  ----------  -------  -----  -----------------------------------",
        "enc.0        dict  2       2                16          64 B     112 B  Descent(eta=0.1) or Adam(eta=0.001)",
        "enc.1        dict  2       1        1       16          64 B     112 B  Descent(eta=0.1) or Adam(eta=0.001)",
        "(the model)  dict  1       0                300         2.3 KiB  0 B    not trained",
        "tie          dict  1       1                4           16 B     48 B   Adam(eta=0.001)",
        "all                6       4        1       336         2.5 KiB  272 B",
        "not trained:",
        "  'enc.1.w': frozen",
        "  'head': its rule is None ('head')",
        "  'left': trainable= left it out at setup, or requires_grad was False then",
        "  'name': a str 'x' is no array",
        "  'steps': its dtype is int64",
    ]
    rows = opt.summary(state, model, depth=1).splitlines()
    assert rows[2].split()[:4] == ["enc", "4", "3", "1"]
    assert opt.summary(state, model, depth=0).splitlines()[2].startswith("(the model)")


def test_a_summary_of_a_module():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    net[1].requires_grad_(False)
    state = opt.setup(opt.Adam(), net)
    text = opt.summary(state, net)
    assert text.splitlines()[2].split() == ["0", "Linear", "2", "2", "8", "32", "B", "96", "B", "Adam(eta=0.001)"]
    assert "'1.weight': requires_grad was False at setup, or trainable= left it out" in text
    net = torch.nn.Linear(3, 2)
    assert opt.summary(opt.setup(opt.Adam(), net), net).endswith("everything is trained")


def test_the_totals_are_those_of_the_state():
    model = model_of(a=(4, 3), b=(5,))
    state, model = stepped(opt.Adam(), model)
    total = sum(state_bytes(state[key].state) for key in model)
    assert f"{total} B" in opt.summary(state, model).splitlines()[-2]


def test_a_summary_of_another_model_is_refused():
    state, model = stepped(opt.Adam(), model_of(a=(2,)))
    fails(StructureError, lambda: opt.summary(state, {"b": model["a"]}), "'a'")
    fails(ArgumentError, lambda: opt.summary(model, state), "summary(state, model)")
    fails(ArgumentError, lambda: opt.summary(state, model, depth=-1), "depth")


# --- ties that are cut after setup --------------------------------------------------------------------------------------------


class TiedLayers(torch.nn.Module):
    """Two layers with one weight."""

    def __init__(self, width=3):
        super().__init__()
        self.a = torch.nn.Linear(width, width, bias=False)
        self.b = torch.nn.Linear(width, width, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def loaded_by_assignment(net):
    net.load_state_dict({name: torch.randn_like(value) for name, value in net.state_dict().items()}, assign=True)


def exchanged(net):
    net.b.weight = torch.nn.Parameter(net.b.weight.detach().clone())


def first_exchanged(net):
    net.a.weight = torch.nn.Parameter(net.a.weight.detach().clone())


@pytest.mark.parametrize("width", [3, 80])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("cut", [loaded_by_assignment, exchanged, first_exchanged], ids=lambda f: f.__name__)
def test_a_tie_of_a_module_that_was_cut_is_told_and_extend_trains_both(cut, steps, width):
    net = TiedLayers(width)
    state = opt.setup(opt.Adam(0.1), net)
    for _ in range(steps):
        net(torch.ones(1, width)).sum().backward()
        state, net = opt.update_(state, net)
    cut(net)
    net.zero_grad()
    net(torch.ones(1, width)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    assert len(before) == 2
    for _ in range(2):
        with pytest.raises(
            opt.TieError, match=r"'a.weight' and 'b.weight' were one array at setup and are two now.*opt.extend"
        ):
            opt.update_(state, net)
    assert all(map(torch.equal, before, net.parameters()))
    state = opt.extend(state, net)
    state, net = opt.update_(state, net)
    assert not any(map(torch.equal, before, net.parameters()))
    net.b.weight = net.a.weight  # and a tie that is made is told as well
    with pytest.raises(opt.TieError, match="were two arrays at setup and are one now"):
        opt.update_(state, net)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("width", [3, 80])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("step", [opt.update, opt.update_])
def test_a_tie_of_a_tree_that_was_cut_is_told_and_extend_trains_both(step, turned, width, kind):
    w = np.ones((width, width)) if kind == "numpy" else torch.ones(width, width)
    model = {"in": w, "out": w.T if turned else w}
    grads = {"in": w + 0, "out": w + 0}
    state, model = step(opt.setup(opt.Descent(0.5), model), model, grads)
    assert (model["in"] == 0).all()
    state, model = step(state, model, grads)  # a tie that was kept is none that was cut
    copied = {**model, "out": model["out"] + 0}
    with pytest.raises(opt.TieError, match="'in' and 'out' were one array at setup and are two now"):
        step(state, copied, grads)
    with pytest.raises(opt.TieError, match="'in' and 'out' were one array at setup and are two now"):
        step(state, {**model, "out": None}, grads)
    assert (copied["in"] == -1).all()
    after = opt.extend(state, copied)
    _, copied = step(after, copied, {"in": w * 0 + 2, "out": w * 0})
    assert (copied["in"] == -2).all()
    assert (copied["out"] == -1).all()


def test_a_dict_of_the_names_of_a_module_is_asked_as_well():
    net = TiedLayers()
    state = opt.setup(opt.Descent(0.5), net)
    named = dict(net.named_parameters(remove_duplicate=False))
    grads = {name: torch.ones(3, 3) for name in named}
    opt.update(state, named, grads)
    named["b.weight"] = named["b.weight"].detach().clone()
    with pytest.raises(opt.TieError, match=r"'a.weight' and 'b.weight' were one array at setup"):
        opt.update(state, named, grads)


def test_a_tie_inside_a_transform_is_believed():
    """There every leaf is wrapped by itself, and has no address."""
    w = torch.ones(3)
    model = {"in": w, "out": w}
    state = opt.setup(opt.Descent(0.5), model)

    def stepped(scale, model):
        return opt.update(state, model, {"in": scale * torch.ones(3), "out": scale * torch.ones(3)})[1]["out"].sum()

    assert torch.func.grad(stepped)(torch.tensor(1.0), model) == -3
    assert torch.func.vmap(stepped, (0, None))(torch.ones(2), model).tolist() == [0, 0]
    assert torch.func.vmap(stepped)(torch.ones(2), {"in": torch.ones(2, 3), "out": torch.ones(2, 3)}).tolist() == [0, 0]
