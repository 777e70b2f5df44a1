"""Steps without kernels: by NumPy over blocks, which gives what the rule gives by itself, and by the rules, array by array."""

import inspect
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.arrays import copied, kind
from optimisers.engine.groups import states as held
from optimisers.engine.kernels.numpy import blocks
from optimisers.engine.tracks.single import Job, step
from optimisers.rules._base import walk
from optimisers.rules._states import state_leaves
from table import cases

LAWFUL = [case for case in cases() if case[2].law in {"elementwise", "measured"}]
IDS = [case[0] for case in LAWFUL]
SHAPES = ((3, 4), (5,), (300, 3), (), (2, 3, 4), (1,), (70,))


def array(values, library, dtype):
    if library == "numpy":
        return np.ascontiguousarray(values).astype(dtype)
    return torch.tensor(np.asarray(values), dtype=getattr(torch, dtype))


def numbers(x):
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.detach().to(torch.float64).numpy()


def problem(library, dtype, *, steps=3, shapes=SHAPES, absent=True, seed=0):
    """A model, and for each step its gradients, some of them absent."""
    rng = np.random.default_rng(seed)
    model = {f"p{i}": array(rng.standard_normal(shape), library, dtype) for i, shape in enumerate(shapes)}
    if library == "torch" and len(shapes) > 4:  # laid out by columns
        model["p2"] = model["p2"].t().contiguous().t()
    grads = []
    for t in range(steps):
        grads.append({name: array(rng.standard_normal(x.shape), library, dtype) for name, x in model.items()})
        if absent and t:
            grads[-1]["p1"] = None
            grads[-1][f"p{t}"] = None
    return model, grads


def by_itself(rule, model, grads, *, every=None):
    """States and parameters after steps in which each array is stepped by its rule."""
    rules = {name: rule.resolved(x, name) for name, x in model.items()}
    states = {name: rules[name].init(x) for name, x in model.items()}
    xs = {name: copied(x) for name, x in model.items()}
    for t, given in enumerate(grads):
        if every is not None:
            rules = {name: every(t, name, r) for name, r in rules.items()}
        names = [name for name in xs if given[name] is not None]
        with torch.no_grad():
            jobs = [Job(name, rules[name], states[name], xs[name], given[name]) for name in names]
            for name, outcome in zip(names, step(jobs), strict=True):
                states[name] = outcome.state
                xs[name] = xs[name] if outcome.x is None else outcome.x
    return states, xs


def run(rule, model, grads, verb, *, change=None):
    state, model = opt.setup(rule, model), {name: copied(x) for name, x in model.items()}
    for t, given in enumerate(grads):
        if change is not None:
            state = change(t, state)
        state, model = verb(state, model, given)
    return {slot.path: entry.state for slot, entry in zip(state._slots, state._entries, strict=True)}, model


def assert_same(found, wanted, *, exact, dtype, least=0.0):
    """States and parameters agree: in every bit, or to some units in the last place."""
    rtol = 0 if exact else {"float32": 5e-6, "float64": 1e-12, "bfloat16": 1.6e-2, "float16": 2e-3}[dtype]
    for after, before in zip(found, wanted, strict=True):
        assert after.keys() == before.keys()
        for name in before:
            a, b = state_leaves(after[name]), state_leaves(before[name])
            assert len(a) == len(b), name
            for x, y in zip(a, b, strict=True):
                assert kind(x) == kind(y)
                if kind(x) is None:
                    assert type(x) is type(y)
                    assert x == y
                    continue
                assert x.shape == y.shape
                assert x.dtype == y.dtype
                np.testing.assert_allclose(numbers(x), numbers(y), rtol=rtol, atol=0 if exact else max(rtol * 1e-2, least))


VERBS = pytest.mark.parametrize("verb", [opt.update, opt.update_], ids=["update", "update_"])


# --- by NumPy, over blocks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setenv("OPTIMISERS_COMPILE", "0")
    monkeypatch.setattr(blocks, "BLOCK", 256)
    monkeypatch.setattr(blocks, "_GATHERED", 64)


def is_exact(rule, library):
    """Whether a rule is made of arithmetic, and of roots where the library's are exact."""
    roots = any("sqrt(" in inspect.getsource(type(inner)) for inner in walk(rule))
    return rule.law != "measured" and (library == "numpy" or not roots)


@VERBS
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("name", "row", "rule"), LAWFUL, ids=IDS)
def test_blocks_give_what_the_rule_gives(without_compiler, name, row, rule, library, verb):
    model, grads = problem(library, "float32")
    found = run(rule, model, grads, verb)
    assert_same(found, by_itself(rule, model, grads), exact=is_exact(rule, library), dtype="float32")


@pytest.mark.parametrize(("library", "dtype"), [("numpy", "float64"), ("torch", "float64"), ("torch", "bfloat16")])
@pytest.mark.parametrize(("name", "row", "rule"), LAWFUL, ids=IDS)
def test_blocks_in_other_precisions(without_compiler, name, row, rule, library, dtype):
    model, grads = problem(library, dtype)
    if "MixedPrecision" in repr(rule) and dtype == "float64":
        dtype = "float32"  # the dtype of its master copy
    assert_same(run(rule, model, grads, opt.update_), by_itself(rule, model, grads), exact=False, dtype=dtype, least=1e-14)


def test_without_a_compiler_parameters_are_held_by_group(without_compiler):
    model, grads = problem("numpy", "float32")
    state, _ = opt.update(opt.setup(opt.AdamW(), model), model, grads[0])
    assert isinstance(state._grouped, held.GroupedState)
    assert sum(group_state.group.count for group_state in state._grouped.group_states) == len(SHAPES)


def test_blocks_on_threads(without_compiler, monkeypatch):
    from optimisers.engine.kernels import threads

    monkeypatch.setattr(threads, "_ALONE", 16)
    monkeypatch.setattr(threads, "threads", lambda: 3)
    model, grads = problem("numpy", "float32", shapes=((5000,), (3,), (4,), (100, 70)), absent=False)
    rule = opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW())
    assert_same(run(rule, model, grads, opt.update_), by_itself(rule, model, grads), exact=False, dtype="float32")


@pytest.mark.parametrize("seed", range(20))
def test_every_element_is_in_one_block(seed, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "_GATHERED", 16)
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1, 2, 15, 16, 17, 63, 64, 65, 128, 200], rng.integers(1, 40))
    made = blocks.cut(np.arange(len(sizes)), sizes)
    covered = [np.zeros(size, int) for size in sizes]
    rows = Counter()
    for i, first, n, row in made.slices:
        assert n <= 64
        covered[i][first : first + n] += 1
        rows[row] += 1
    for chosen, starts in made.gathered:
        assert starts[-1] <= 64
        assert np.diff(starts).tolist() == sizes[chosen].tolist()
        for i in chosen:
            covered[i] += 1
            rows[int(made.starts[i])] += 1
    assert all((c == 1).all() for c in covered)
    assert sorted(rows) == list(range(made.rows))
    assert set(rows.values()) == {1}


# --- by the rules themselves, as on other devices -----------------------------------------------------------------------------


@pytest.fixture
def by_rules(monkeypatch):
    """Every array is stepped by its rule, as on a device for which no kernels are made."""
    monkeypatch.setattr(held, "key_of", lambda *_: None)


READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy")


@pytest.fixture
def reads(monkeypatch):
    """How often a value of a tensor is read."""
    count = Counter()

    def counting(name):
        method = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            count[name] += 1
            return method(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in READS:
        counting(name)
    return count


def quiet_rules():
    for name, _, rule in LAWFUL:
        if not any(isinstance(r, opt.SkipNonFinite) for r in walk(rule)):
            yield pytest.param(rule, sum(getattr(r, "throw", False) for r in walk(rule)), id=name)


@VERBS
@pytest.mark.parametrize(("rule", "checks"), list(quiet_rules()))
def test_a_step_reads_once_if_it_checks_and_else_never(by_rules, reads, rule, checks, verb):
    model, grads = problem("torch", "float32", absent=False, shapes=((3, 4), (5,), (7,), (300,)))
    state = opt.setup(rule, model)
    for given in grads:
        reads.clear()
        state, model = verb(state, model, given)
        assert reads.total() == bool(checks), reads


def test_skipping_reads_once(by_rules, reads):
    model, grads = problem("torch", "float32", absent=False, shapes=((3, 4), (5,), (7,)))
    state = opt.setup(opt.OptimiserChain(opt.SkipNonFinite(), opt.Adam()), model)
    opt.update(state, model, grads[0])
    assert reads.total() == 1


@VERBS
@pytest.mark.parametrize(("name", "row", "rule"), LAWFUL, ids=IDS)
def test_a_step_of_arrays_without_values(name, row, rule, verb):
    """On ``meta`` whatever would be read on the host raises."""
    if any(isinstance(r, opt.SkipNonFinite) or getattr(r, "throw", False) for r in walk(rule)):
        pytest.skip("decides on the host")
    model = {f"p{i}": torch.empty(shape, device="meta") for i, shape in enumerate(((30, 10), (300,), (3, 100)))}
    grads = {name: torch.empty_like(x) for name, x in model.items()}
    state = opt.setup(rule, model)
    for _ in range(2):
        state, model = verb(state, model, grads)
    assert all(x.is_meta for x in model.values())


def test_rules_know_no_device():
    for path in (Path(opt.__file__).parent / "rules").glob("*.py"):
        assert not re.search(r"\b(cuda|mps|xpu)\b", path.read_text(encoding="utf-8")), path


# --- on a GPU -----------------------------------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("name", "row", "rule"), [pytest.param(*case, marks=gpu, id=case[0]) for case in LAWFUL])
def test_a_gpu_gives_what_the_host_gives(name, row, rule):
    model, grads = problem("torch", "float32")
    on_gpu = {k: x.cuda() for k, x in model.items()}
    gpu_grads = [{k: None if dx is None else dx.cuda() for k, dx in given.items()} for given in grads]
    _, new = run(rule, on_gpu, gpu_grads, opt.update_)
    wanted = by_itself(rule, model, grads)
    for k, x in wanted[1].items():
        torch.testing.assert_close(new[k].cpu(), x, rtol=1e-5, atol=1e-6)


WITHOUT_WAITS = {
    "AdamW": opt.AdamW(),
    "NormGrowthCap": opt.NormGrowthCap(),
    "Scheduled": opt.Scheduled(opt.AdamW(), eta=lambda t: 0.1 / (1 + t)),
}


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=gpu, id=name) for name, rule in WITHOUT_WAITS.items()])
def test_a_step_on_a_gpu_does_not_wait(rule):
    model, grads = problem("torch", "float32", absent=False)
    model = {k: x.cuda() for k, x in model.items()}
    grads = [{k: dx.cuda() for k, dx in given.items()} for given in grads]
    rule = opt.adjust(rule, throw=False) if hasattr(rule, "throw") else rule
    state = opt.setup(rule, model)
    state, model = opt.update_(state, model, grads[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.update_(state, model, grads[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
