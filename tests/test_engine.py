"""The engine: compiled loops give what the rules give, whatever the arrays."""

import copy
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import optimisers as opt
from looped import Counter, adjusted, assert_alike, assert_states_alike, coarsest, held, is_agreed, is_exact, natively, raw
from optimisers.engine.groups import states as held_module
from optimisers.engine.kernels import threads, work
from optimisers.engine.kernels.c import loops
from optimisers.engine.memory import guard
from optimisers.rules._base import TransformingRule, walk
from table import MeanScaled, SignedRoot, cases

LARGE = 2**14 + 1003  # more than one piece, and no multiple of a vector's length
DTYPES = (("numpy", "float64"), ("torch", "float32"), ("torch", "bfloat16"), ("torch", "float16"))
# The loops are the same as for the other library, up to roots: for every third rule.
MORE = (("numpy", "float32"), ("torch", "float64"), ("numpy", "float16"))
LOOPED = [case for case in cases() if case[1].law in {"elementwise", "measured"}]
NATIVE = ("Adam", "Rprop", "ClipNorm > AdamW", "MixedPrecision", "Lion", "NAdam", "Lamb", "Prodigy")


class Draw:
    """Seeded arrays of one library and dtype."""

    def __init__(self, lib, dtype, seed=0):
        self.lib, self.dtype, self.rng = lib, dtype, np.random.default_rng(seed)

    def __call__(self, *shape, dtype=None):
        values = np.asarray(self.rng.standard_normal(shape))
        if self.lib == "numpy":
            return values.astype(dtype or self.dtype)
        return torch.tensor(values).to(getattr(torch, dtype or self.dtype))


def transposed(x, *axes):
    """An array of that content, dense, with its axes in this order in memory."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
    return x.permute(*axes).contiguous().permute(*np.argsort(axes).tolist())


def model_of(draw):
    tied = draw(3, 4)
    return {
        "tied": [tied, draw(2), tied],
        "frozen": draw(5),
        "absent": draw(7),
        "large": draw(LARGE),
        "transposed": transposed(draw(6, 5), 1, 0),
        "channels": transposed(draw(2, 3, 4, 5), 0, 2, 3, 1),
        "slice": draw(20)[::2],
        "strided": draw(4, 6),
        "odd": draw(33),
        "empty": draw(0, 3),
        "scalar": draw(),
        "one": draw(1),
        "wild": draw(40),
    }


def gradients(draw, step, *, finite):
    other = {"float32": "float64", "float64": "float32"}.get(draw.dtype, "float32")
    grads = {
        "tied": [draw(3, 4), None if step == 2 else draw(2), None if step == 1 else draw(3, 4)],
        "frozen": draw(5),
        "absent": None if step in {1, 3} else draw(7),
        "large": draw(LARGE),
        "transposed": draw(6, 5) if step == 2 else transposed(draw(6, 5), 1, 0),
        "channels": draw(2, 3, 4, 5) if step == 3 else transposed(draw(2, 3, 4, 5), 0, 2, 3, 1),
        "slice": draw(10),
        "strided": transposed(draw(4, 6), 1, 0) if step == 1 else draw(4, 12)[:, ::2],
        "odd": draw(33, dtype={2: other, 3: "float32" if draw.dtype == "float16" else "float16"}.get(step)),
        "empty": draw(0, 3),
        "scalar": draw(),
        "one": draw(1),
        "wild": draw(40),
    }
    if step == 3 and not finite:
        for i, value in enumerate((math.nan, math.inf, -math.inf, 0.0, -0.0)):
            grads["wild"][7 * i] = value
    return grads


def line(rule, lib, dtype, update, *, finite):
    """(state, model) after each of five steps with everything that may come in between."""
    draw = Draw(lib, dtype)
    model = model_of(draw)
    state = opt.freeze(opt.setup(rule, model), where="frozen")
    for step in range(5):
        if step == 2:
            state = opt.thaw(adjusted(state, 1.0))
        if step == 4:
            state = adjusted(state, 0.5, where="large")
        grads = gradients(draw, step, finite=finite)
        state, model = update(state, model, grads)
        copies = {path: x.copy() if lib == "numpy" else x.clone() for path, x in opt.trainables(model, path=True)}
        yield state, copies


def is_finite_only(rule):
    """Whether it raises for gradients that are not finite."""
    return any(getattr(inner, "throw", False) for inner in opt.rules._base.walk(rule))


def compare(rule, lib, dtype, switch, monkeypatch):
    counter = Counter(monkeypatch)
    finite = is_finite_only(rule)
    switch("rules")
    expected = list(line(rule, lib, dtype, opt.update, finite=finite))
    assert counter.runs == 0
    compiled = []
    for update, way in ((opt.update, "1"), (opt.update_, "1"), (opt.update_, "0")):
        counter.runs, exact, agreed = 0, True, way == "0"
        switch(way)
        for (state, model), (right_state, right) in zip(line(rule, lib, dtype, update, finite=finite), expected, strict=True):
            agreed = agreed and (held(state) == 0 or is_agreed(state))
            if update is opt.update:
                compiled.append((state, model))
            elif agreed:
                same_state, same = compiled.pop(0)
                assert raw([*model.values()]) == raw([same[path] for path in model])
                assert_states_alike(state, same_state, exact=True)
            exact = exact and (held(state) == 0 or is_exact(state))  # SkipNonFinite leaves the loops when it skips
            assert exact or not (lib == "numpy" and rule.law == "elementwise")
            unit = coarsest(right_state)
            for path, x in model.items():
                assert_alike(x, right[path], exact=exact, what=path, unit=unit)
            assert_states_alike(state, right_state, exact=exact)
        assert counter.runs >= 5 or way == "0"


FIRST = [case for case in LOOPED if case[2] is case[1].configs[0]]
EACH = [
    pytest.param(rule, *kind, id="-".join((name, *kind)))
    for i, (name, _, rule) in enumerate(FIRST)
    for kind in (DTYPES if i % 3 else (*DTYPES, *MORE))
]


@pytest.mark.parametrize(("rule", "lib", "dtype"), EACH)
def test_loops_give_what_the_rule_gives(rule, lib, dtype, switch, monkeypatch):
    compare(rule, lib, dtype, switch, monkeypatch)


@pytest.mark.parametrize("rule", [pytest.param(rule, id=name) for name, row, rule in LOOPED if rule is not row.configs[0]])
def test_loops_give_what_rules_with_other_numbers_give(rule, switch, monkeypatch):
    compare(rule, "numpy", "float64", switch, monkeypatch)


@pytest.mark.parametrize(("lib", "dtype"), [("numpy", "float64"), ("torch", "bfloat16")])
@pytest.mark.parametrize("name", NATIVE)
def test_loops_for_this_processor_give_what_the_rule_gives(name, lib, dtype, switch, monkeypatch):
    natively(monkeypatch)
    rule = next(rule for case, _, rule in LOOPED if case == name)
    compare(rule, lib, dtype, switch, monkeypatch)


@pytest.mark.parametrize(("lib", "dtype"), [("numpy", "float32"), ("torch", "bfloat16")])
def test_much_is_written_past_the_caches(lib, dtype, switch, monkeypatch):
    natively(monkeypatch)  # others have no such stores
    monkeypatch.setattr(loops, "_MUCH", 1)
    compare(opt.Adam(), lib, dtype, switch, monkeypatch)


@pytest.mark.parametrize(("lib", "openmp"), [("numpy", None), ("torch", None), ("torch", False)])
def test_several_threads_give_what_one_gives(lib, openmp, switch, monkeypatch):
    monkeypatch.setattr(threads, "_ALONE", 1)
    monkeypatch.setattr(threads, "_TOGETHER", 1)
    monkeypatch.setattr(work, "_UNIT", 2**10)
    monkeypatch.setattr(threads, "threads", lambda: 3)
    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.setattr(threads, "_openmp", openmp)
    compare(opt.OptimiserChain(opt.ClipNorm(0.5), opt.Momentum()), lib, "float32", switch, monkeypatch)


LAWLESS = [
    pytest.param(rule, id=name)
    for name, _, rule in cases(every=False, law="none")
    if not any(isinstance(inner, TransformingRule) for inner in walk(rule))
]


@pytest.mark.parametrize("rule", LAWLESS)
def test_rules_without_a_law_are_run_themselves(rule, switch, monkeypatch):
    switch("1")
    counter = Counter(monkeypatch)
    model = {"w": np.ones((8, 4)), "v": np.ones((3, 5))}
    state = opt.setup(rule, model)
    for _ in range(2):
        state, model = opt.update(state, model, {"w": np.ones((8, 4)), "v": np.ones((3, 5))})
    assert held(state) == counter.runs == 0


def test_one_model_with_rules_and_dtypes_of_many_kinds(switch, monkeypatch):
    def build_model():
        draw = Draw("torch", "float32", 3)
        return {
            "a": draw(5), "b": draw(5, dtype="float64"), "c": draw(5, dtype="bfloat16"), "d": draw(5, dtype="float16"),
            "e": torch.complex(draw(5), draw(5)), "f": draw(4, 3), "g": draw(5), "h": np.ones(5),
        }  # fmt: skip

    def rule_for(param):
        return {"f": opt.Muon(), "g": SignedRoot(), "h": opt.Descent()}.get(
            param.path, opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.Adam(0.1))
        )

    results = {}
    for value in ("rules", "0", "1"):
        switch(value)
        model = build_model()
        state = opt.setup(rule_for, model)
        for _ in range(3):
            state, model = opt.update(state, model, {k: 0.5 * x for k, x in model.items()})
        results[value] = state, model
    assert held(state) == 6
    for value, key in itertools.product(("0", "1"), model):
        if key == "e":
            torch.testing.assert_close(results[value][1][key], results["rules"][1][key], rtol=1e-6, atol=0)
        else:
            assert_alike(results[value][1][key], results["rules"][1][key], exact=False, what=key)


def test_tensors_without_memory_are_stepped_beside_others(switch):
    switch("1")
    model = {"cpu": torch.ones(5), "meta": torch.ones(5, device="meta")}
    state = opt.setup(opt.Momentum(0.1), model)
    for _ in range(2):
        state, model = opt.update_(state, model, {"cpu": torch.ones(5), "meta": torch.ones(5, device="meta")})
    assert held(state) == 1
    assert model["meta"].is_meta
    torch.testing.assert_close(model["cpu"], torch.full((5,), 1 - 0.1 - 0.19))


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_lazy_zero_is_a_gradient(value, switch):
    switch(value)
    x = torch.ones(5)
    state = opt.setup(opt.Momentum(0.1), x)
    state, x = opt.update(state, x, torch.ones(5))
    state, x = opt.update(state, x, torch._efficientzerotensor((5,)))
    torch.testing.assert_close(x, torch.full((5,), 1 - 0.1 - 0.09))


def test_the_pieces_of_an_array_of_more_than_2_to_the_31_elements():
    sizes = np.array([5, 2**31 + 17, 2**14, 2**33], np.int64)
    found = work.table(np.array([0, 1, 3]), sizes)
    leaf, start, count = found.pieces.T
    assert found.pieces.dtype == np.int64
    assert found.elements == 5 + 2**31 + 17 + 2**33
    for i in (0, 1, 3):
        own = leaf == i
        assert count[own].sum() == sizes[i]
        assert (start[own] == np.concatenate([[0], np.cumsum(count[own])[:-1]])).all()
    assert (leaf[found.starts] == [0, 1, 3]).all()
    assert (count > 0).all()
    assert found.first[0] == 0
    assert found.first[-1] == len(leaf)
    assert (np.diff(found.first) > 0).all()


# --- norms -------------------------------------------------------------------------------------------------------------------


def norm_of(arrays, p):
    x = np.abs(np.concatenate([np.asarray(a, np.longdouble).ravel() for a in arrays]))
    if math.isinf(p):
        return x.max() if p > 0 else x.min()
    if p == 0:
        return np.longdouble(np.count_nonzero(x))
    return (x**p).sum() ** (np.longdouble(1) / np.longdouble(p))


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 1.0), ("float32", 1e-30), ("float64", 1.0), ("float64", 1e-200), ("float64", 1e200)]
)
@pytest.mark.parametrize("rule", [opt.ClipNorm, opt.ClipGlobalNorm])
def test_norms_of_large_arrays(rule, dtype, scale, switch, monkeypatch):
    switch("1")
    rng = np.random.default_rng(0)
    grads = {key: (scale * rng.standard_normal(n)).astype(dtype) for key, n in (("a", 200_003), ("b", 70_001), ("c", 3))}
    for p in (1.0, 2.0, 3.0, math.inf, -math.inf, 0.0):
        if rule is opt.ClipGlobalNorm and p <= 0:
            continue
        norms = {k: norm_of([g], p) for k, g in grads.items()}
        if rule is opt.ClipGlobalNorm:
            norms = dict.fromkeys(grads, norm_of(grads.values(), p))
        omega = float(min(norms.values())) / 2
        model = {k: np.zeros_like(g) for k, g in grads.items()}
        state = opt.setup(rule(omega, p), model)
        state, model = opt.update(state, model, grads)
        assert held(state) == 3
        for k, g in grads.items():
            factor = np.longdouble(omega) / norms[k]
            tolerance = {"float32": 3e-7, "float64": 1e-12}[dtype]
            least = float(np.finfo(dtype).smallest_subnormal)
            np.testing.assert_allclose(-model[k], (factor * g).astype(dtype), rtol=tolerance, atol=least)


# --- rules whose numbers decide what they do ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts(MeanScaled):
    """Measured over the arrays with the same part, a number."""

    part: int = 0

    @property
    def scope(self):
        return f"part {self.part}"

    def combine(self, measures):
        return (sum(float(size) for (size,) in measures),)


@dataclass(frozen=True)
class Limited(Parts):
    """It halves steps where the measure is above a limit of its own."""

    limit: float = 1.0

    def apply_measured(self, state, x, dx, measure):
        if measure[0] > self.limit:
            dx = 0.5 * dx
        return state, self.eta * dx


@pytest.mark.parametrize(
    "rules",
    [{"a": Parts(part=0), "b": Parts(part=1), "c": Parts(part=0)}, {"a": Limited(limit=1e9), "b": Limited(), "c": Limited()}],
    ids=["scope", "limit"],
)
def test_arrays_whose_numbers_differ_are_told_apart(rules, switch):
    found = []
    for value in ("rules", "0", "1"):
        switch(value)
        model = {"a": np.ones(5), "b": np.ones(7), "c": np.ones(9)}
        state = opt.setup(lambda param: rules[param.path], model)
        for _ in range(3):
            state, model = opt.update(state, model, {"a": np.ones(5), "b": np.full(7, 3.0), "c": np.full(9, 2.0)})
        found.append(model)
    for key in found[0]:
        np.testing.assert_allclose(found[1][key], found[0][key], rtol=1e-15)
        np.testing.assert_allclose(found[2][key], found[0][key], rtol=1e-15)


# --- steps that are alike --------------------------------------------------------------------------------------------------


def test_a_guard_tells_what_a_tensor_is():
    def kinds():
        yield torch.ones(4, 3)
        yield torch.ones(3, 4).t()
        yield torch.ones(4, 6)[:, ::2]
        yield torch.ones(12)
        yield torch.ones(2, 4, 3)
        yield torch.ones(4, 3, dtype=torch.float64)
        yield torch.ones(4, 3, requires_grad=True)
        yield torch.nn.Parameter(torch.ones(4, 3))
        yield torch.ones(4, 3, device="meta")
        yield torch.ones(4, 3).to_sparse()
        yield torch._neg_view(torch.ones(4, 3))

    usual = [torch.ones(4, 3), torch.ones(2)]
    checked = guard.guard_of(usual)
    assert checked(*usual)
    assert checked(torch.zeros(4, 3), torch.zeros(2))
    assert [checked(x, torch.ones(2)) for x in kinds()] == [True] + [False] * 10
    assert not checked(None, torch.ones(2))
    assert not checked(np.ones((4, 3)), torch.ones(2))
    same = torch.ones(4, 3)
    assert guard.guard_of([same, same]) is None


def steps_with(changes, update, *, guards=True, monkeypatch=None):
    """The bytes after each step of a line in which the gradients, or the model, change as told."""
    if not guards:
        monkeypatch.setattr(guard, "guard_of", lambda _: None)
        monkeypatch.setattr(held_module.RunCache, "prepared", property(lambda _: {}, lambda *_: None), raising=False)
    draw = Draw("torch", "float32", 5)
    model = {"a": draw(4, 3), "b": draw(50), "c": draw(1)}
    state = opt.setup(opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.Adam(0.1)), model)
    grads = {name: draw(*x.shape) for name, x in model.items()}
    found = []
    for change in changes:
        state, model, grads = change(state, model, grads, draw)
        state, model = update(state, model, grads)
        found.append(raw([state, model]))
    return found


def same(state, model, grads, draw):
    return state, model, grads


def new_gradients(state, model, grads, draw):
    return state, model, {name: draw(*x.shape) for name, x in model.items()}


def moved(state, model, grads, draw):
    return state, {name: x.clone() for name, x in model.items()}, grads


def absent(state, model, grads, draw):
    return state, model, grads | {"b": None}


def double(state, model, grads, draw):
    return state, model, {name: draw(*x.shape).double() for name, x in model.items()}


def turned(state, model, grads, draw):
    return state, model, grads | {"a": draw(3, 4).t()}


def another_rate(state, model, grads, draw):
    return opt.adjust(state, eta=0.03), model, grads


def another_rate_for_one(state, model, grads, draw):
    return opt.adjust(state, eta=0.05, where="b"), model, grads


def model_as_gradient(state, model, grads, draw):
    """Some lie in memory that is written before they would be read, or after."""
    return state, model, {"a": model["b"][:12].view(4, 3), "b": model["b"], "c": model["a"].view(-1)[:1]}


def copied_state(state, model, grads, draw):
    return copy.deepcopy(state), model, grads


@pytest.mark.parametrize("update", [opt.update, opt.update_])
def test_what_is_remembered_of_the_last_step_changes_nothing(update, switch, monkeypatch):
    switch("1")
    changes = [
        same, same, same, new_gradients, same, moved, same, absent, same, same, double, double, new_gradients, turned, same,
        new_gradients, another_rate, another_rate, same, another_rate_for_one, same, model_as_gradient, same, new_gradients,
        same, model_as_gradient, model_as_gradient, copied_state, same, same,
    ]  # fmt: skip
    assert steps_with(changes, update) == steps_with(changes, update, guards=False, monkeypatch=monkeypatch)


def test_a_step_that_is_like_the_last_one_prepares_nothing(switch, monkeypatch):
    switch("1")
    made = []
    prepare = loops.Loops.prepare
    monkeypatch.setattr(loops.Loops, "prepare", lambda *args, **kwargs: made.append(1) or prepare(*args, **kwargs))
    draw = Draw("torch", "float32")
    model, grads = ({"a": draw(4, 3), "b": draw(50)} for _ in range(2))
    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(0.5), opt.Adam(0.1)), model)
    for step in range(6):
        before = len(made)
        state, model = opt.update_(state, model, grads)
        assert step < 2 or len(made) == before  # the first step has no arrays of its own yet, and remembers nothing
        state = opt.adjust(state, eta=0.1 / (step + 2))


def test_a_change_of_rules_makes_no_entry_for_what_loops_step(switch):
    """Also beside arrays that no loop steps: the entries of the others are out of date, and nobody asks for them."""
    switch("1")
    draw = Draw("numpy", "float32")
    model = {"z": draw(3).astype("complex64"), **{f"w{i}": draw(4) for i in range(5)}}
    grads = {key: 0.5 * x for key, x in model.items()}
    lines = []
    for way in ("1", "rules"):
        switch(way)
        state, x = opt.setup(opt.Momentum(), model), model
        for step in range(4):
            if step:
                state = opt.adjust(state, 0.1 / step, where="w3" if step == 2 else None)
            state, x = opt.update(state, x, grads)
        assert way == "rules" or (held(state) == 5 and state._by_kind._shown is None)
        lines.append((x, state))
    assert raw(lines[0][0]) == raw(lines[1][0])
    assert lines[0][1] == lines[1][1]
    assert [state["w1"].rule.eta for _, state in lines] == [0.1 / 3] * 2


def test_lines_that_branch_do_not_share_what_is_remembered(switch):
    switch("1")
    draw = Draw("numpy", "float32")
    start = {"w": draw(4000)}
    rule = opt.Adam(0.1)
    state, model = opt.setup(rule, start), start
    for _ in range(2):
        state, model = opt.update(state, model, {"w": draw(4000)})
    grads = [[{"w": draw(4000)} for _ in range(20)] for _ in range(4)]

    def run(line):
        own, x = state, model
        for dx in grads[line]:
            own, x = opt.update(own, x, dx)
        return x["w"].copy()

    expected = [run(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
