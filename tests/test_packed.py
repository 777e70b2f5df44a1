"""Steps without compiled loops: by NumPy over blocks, and packed on other devices. Both give what the rule gives by itself."""

import gc
import inspect
import re
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import optimisers as opt
from optimisers.arrays import copied, kind
from optimisers.engine.eager import layout, packed
from optimisers.engine.groups import states as held
from optimisers.engine.kernels.numpy import blocks
from optimisers.engine.tracks.single import Job, step
from optimisers.errors import NonFiniteError
from optimisers.rules._base import walk
from optimisers.rules._states import state_leaves
from table import MeanScaled, cases

LAWFUL = [case for case in cases() if case[2].law in {"elementwise", "measured"}]
IDS = [case[0] for case in LAWFUL]
SHAPES = ((3, 4), (5,), (300, 3), (), (2, 3, 4), (1,), (70,))
DTYPES = ("float32", "float64", "bfloat16")


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


# --- packed -------------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts what is launched: calls that make no view and no empty tensor."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in str(func):
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def far(monkeypatch):
    """Tensors on the host are stepped as if they lay on another device."""
    monkeypatch.setattr(packed, "is_far", lambda x: True)
    monkeypatch.setattr(held, "key_of", lambda *_: None)


@VERBS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "row", "rule"), LAWFUL, ids=IDS)
def test_packed_gives_what_the_rule_gives(far, name, row, rule, dtype, verb):
    model, grads = problem("torch", dtype)
    found = run(rule, model, grads, verb)
    exact = dtype != "bfloat16" and is_exact(rule, "torch")
    assert_same(found, by_itself(rule, model, grads), exact=exact, dtype=dtype, least=1e-14)


@pytest.mark.parametrize(
    "rule", [opt.AdamW(), opt.NormGrowthCap(), opt.OptimiserChain(opt.ClipNorm(0.5), opt.Adam())], ids=repr
)
def test_half_precision_with_float16_moments(far, rule):
    model, grads = problem("torch", "float16")
    found, wanted = run(rule, model, grads, opt.update_), by_itself(rule, model, grads)
    assert_same(found, wanted, exact=False, dtype="bfloat16")


def watched_step(rule, count, *, verb, device="meta", steps=2):
    """What the last of some steps launches for so many arrays."""
    model = [torch.zeros(3 + i % 5, 7, device=device) for i in range(count)]
    grads = [torch.ones_like(x) for x in model]
    state = opt.setup(rule, model)
    for _ in range(steps):
        with Watch() as watch:
            state, model = verb(state, model, grads)
    return watch.calls


COUNTED = [
    opt.AdamW(),
    opt.OptimiserChain(opt.ClipGlobalNorm(), opt.AdamW()),
    opt.OptimiserChain(opt.ClipNorm(), opt.AdamW()),
    opt.NormGrowthCap(),
    opt.Scheduled(opt.AdamW(), eta=lambda t: 0.1 / (1 + t)),
]


@VERBS
@pytest.mark.parametrize("rule", COUNTED, ids=lambda rule: re.sub(r"<.*?>", "", repr(rule))[:40])
def test_launches_do_not_grow_with_the_number_of_arrays(rule, verb):
    few = watched_step(rule, 10, verb=verb)
    assert few == watched_step(rule, 1000, verb=verb)
    assert few.total() < 70


def test_launches_do_not_grow_where_counters_differ():
    def calls(count):
        model = [torch.zeros(3, 7, device="meta") for _ in range(count)]
        grads = [torch.ones_like(x) for x in model]
        state, model = opt.update(opt.setup(opt.AdamW(), model), model, [grads[0], *[None] * (count - 1)])
        with Watch() as watch:
            opt.update_(state, model, grads)
        return watch.calls

    assert calls(10) == calls(100)


def test_the_count_sees_a_step_array_by_array(monkeypatch):
    monkeypatch.setattr(packed, "is_far", lambda x: False)
    calls = [watched_step(opt.AdamW(), n, verb=opt.update, steps=1).total() for n in (2, 4)]
    assert calls[1] >= 2 * calls[0] - 1


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
        if not any(isinstance(r, opt.SkipNonFinite) for r in packed_rules(rule)):
            yield pytest.param(rule, sum(getattr(r, "throw", False) for r in packed_rules(rule)), id=name)


def packed_rules(rule):

    return list(walk(rule))


@VERBS
@pytest.mark.parametrize(("rule", "checks"), list(quiet_rules()))
def test_a_step_reads_once_if_it_checks_and_else_never(far, reads, rule, checks, verb):
    model, grads = problem("torch", "float32", absent=False, shapes=((3, 4), (5,), (7,), (300,)))
    state = opt.setup(rule, model)
    for given in grads:
        reads.clear()
        state, model = verb(state, model, given)
        assert reads.total() == bool(checks), reads


def test_skipping_reads_once(far, reads):
    model, grads = problem("torch", "float32", absent=False, shapes=((3, 4), (5,), (7,)))
    state = opt.setup(opt.OptimiserChain(opt.SkipNonFinite(), opt.Adam()), model)
    opt.update(state, model, grads[0])
    assert reads.total() == 1


@VERBS
@pytest.mark.parametrize(("name", "row", "rule"), LAWFUL, ids=IDS)
def test_a_step_of_fake_tensors(name, row, rule, verb):
    if any(isinstance(r, opt.SkipNonFinite) for r in packed_rules(rule)):
        pytest.skip("decides on the host")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = {f"p{i}": torch.empty(shape, device="cuda") for i, shape in enumerate(((30, 10), (300,), (3, 100)))}
        grads = {name: torch.empty_like(x) for name, x in model.items()}
        state = opt.setup(rule, model)
        with Watch() as watch:
            for _ in range(2):
                state, model = verb(state, model, grads)
        assert all(x.fake_mode is mode for x in model.values())
    assert not {name for name in watch.calls if "local_scalar" in name or "item" in name}


@VERBS
def test_frozen_tied_and_adjusted(far, verb):
    rule = opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW(0.01, lambda_=0.1))
    model, grads = problem("torch", "float32", steps=4)
    model["tied"] = model["p0"]
    grads = [{**g, "tied": None} for g in grads]

    def change(t, state):
        if t == 1:
            state = opt.adjust(state, 0.5, where="p2")
            return opt.freeze(state, where="p4")
        return opt.thaw(state) if t == 3 else state

    wanted_grads = [{**g, "p4": None} if t in {1, 2} else g for t, g in enumerate(grads)]
    wanted_grads = [{name: dx for name, dx in g.items() if name != "tied"} for g in wanted_grads]
    every = lambda t, name, r: opt.adjust(r, 0.5) if t == 1 and name == "p2" else r  # noqa: E731
    start = {name: x for name, x in model.items() if name != "tied"}
    wanted = by_itself(rule, start, wanted_grads, every=every)
    state = opt.setup(rule, model)
    model = {name: copied(x) for name, x in start.items()}
    model["tied"] = model["p0"]
    for t, given in enumerate(grads):
        state, model = verb(change(t, state), model, given)
    assert model["tied"] is model["p0"]
    states = {slot.path: entry.state for slot, entry in zip(state._slots, state._entries, strict=True)}
    found = states, {name: x for name, x in model.items() if name != "tied"}
    assert_same(found, wanted, exact=False, dtype="float32")


def test_mixed_dtypes_in_one_model(far):
    model, grads = problem("torch", "float32", absent=False)
    model["p0"], model["p5"] = model["p0"].double(), model["p5"].bfloat16()
    grads = [{**g, "p4": g["p4"].double(), "p6": g["p6"].bfloat16()} for g in grads]
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.AdamW())
    found, wanted = run(rule, model, grads, opt.update), by_itself(rule, model, grads)
    assert_same(found, wanted, exact=False, dtype="bfloat16")


@VERBS
def test_portions_of_bounded_size(far, verb, monkeypatch):
    monkeypatch.setattr(packed, "LIMIT", 100)
    sizes = []
    real = packed.Packed

    class Seen(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            sizes.append([job.x.numel() for job in self.jobs])

    monkeypatch.setattr(packed, "Packed", Seen)
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.AdamW())
    model, grads = problem("torch", "float32", absent=False)
    found = run(rule, model, grads, verb)
    assert all(len(row) == 1 or sum(row) <= 100 for row in sizes)
    assert_same(found, by_itself(rule, model, grads), exact=False, dtype="float32")


@VERBS
def test_results_share_no_memory(far, verb):
    model, grads = problem("torch", "float32", absent=False)
    for rule in (opt.AdamW(), opt.OptimiserChain(opt.NormGrowthCap(), opt.Rprop()), MeanScaled()):
        states, new = run(rule, model, grads, verb)
        arrays = [*new.values(), *(leaf for state in states.values() for leaf in state_leaves(state) if kind(leaf))]
        arrays += [dx for given in grads for dx in given.values()]
        assert len({x.untyped_storage().data_ptr() for x in arrays}) == len(arrays)
        assert all(x._base is None for x in arrays)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in arrays)


def test_in_place_memory_stays_and_versions_count(far):
    model, grads = problem("torch", "float32", absent=False, shapes=((3, 4), (5,), (300, 3)))
    state = opt.setup(opt.OptimiserChain(opt.NormGrowthCap(), opt.AdamW()), model)
    before = {name: (x, x._version) for name, x in model.items()}
    moments = [leaf for entry in state._entries for leaf in state_leaves(entry.state) if kind(leaf)]
    state, model = opt.update_(state, model, grads[0])
    assert all(model[name] is x and x._version > version for name, (x, version) in before.items())
    after = [leaf for entry in state._entries for leaf in state_leaves(entry.state) if kind(leaf)]
    assert all(a is b for a, b in zip(after, moments, strict=True))


def test_a_pure_step_keeps_what_it_was_given(far):
    for shapes in (((3, 4),), ((3, 4), (5,))):
        model, grads = problem("torch", "float32", absent=False, shapes=shapes)
        state = opt.setup(opt.OptimiserChain(opt.NormGrowthCap(), opt.AdamW()), model)
        state, model = opt.update(state, model, grads[0])
        kept = [x.clone() for x in model.values()], [copied(v) for v in moments_of(state)]
        opt.update(state, model, grads[1])
        assert all(torch.equal(a, b) for a, b in zip(model.values(), kept[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(moments_of(state), kept[1], strict=True))


@pytest.mark.parametrize("first", [opt.AccumGrad(2), opt.SkipNonFinite()], ids=["AccumGrad", "SkipNonFinite"])
def test_a_step_in_place_leaves_older_states_alone(far, first):
    model, grads = problem("torch", "float32", absent=False)
    start = opt.setup(opt.OptimiserChain(first, opt.Adam()), model)
    start, model = opt.update(start, model, grads[0])
    start, model = opt.update(start, model, grads[0])
    idle = {name: torch.full_like(dx, float("inf")) for name, dx in grads[1].items()}
    kept = [copied(v) for v in moments_of(start)]
    state, model = opt.update(start, model, idle)  # moments do not change
    for given in grads[1:]:
        state, model = opt.update_(state, model, given)
    assert all(torch.equal(a, b) for a, b in zip(moments_of(start), kept, strict=True))


def moments_of(state):
    return [leaf for entry in state._entries for leaf in state_leaves(entry.state) if kind(leaf)]


def test_gradients_in_memory_that_is_written(far, monkeypatch):
    monkeypatch.setattr(packed, "LIMIT", 15)
    model, _ = problem("torch", "float32", shapes=((3, 4), (4, 3), (12,)))
    grads = [{"p0": model["p1"].reshape(3, 4).clone(), "p1": model["p0"].reshape(4, 3).clone(), "p2": model["p2"].clone()}]
    wanted = by_itself(opt.AdamW(), model, grads)
    state = opt.setup(opt.AdamW(), model)
    given = {"p0": model["p1"].view(3, 4), "p1": model["p0"].view(4, 3), "p2": model["p2"]}
    state, model = opt.update_(state, model, given)
    found = {slot.path: entry.state for slot, entry in zip(state._slots, state._entries, strict=True)}, model
    assert_same(found, wanted, exact=False, dtype="float32")


@VERBS
def test_a_fault_names_its_array_and_changes_nothing(far, verb):
    model, grads = problem("torch", "float32", absent=False)
    grads[0]["p4"][0, 0, 0] = float("nan")
    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(), opt.AdamW()), model)
    kept = {name: x.clone() for name, x in model.items()}
    with pytest.raises(NonFiniteError, match=r"ClipNorm at 'p4': the 2-norm of its gradient is nan"):
        verb(state, model, grads[0])
    assert all(torch.equal(x, kept[name]) for name, x in model.items())
    verb(state, model, grads[1])


@VERBS
def test_a_skipped_step(far, verb):
    model, grads = problem("torch", "float32", absent=False)
    grads[1]["p4"][0, 0, 0] = float("inf")
    rule = opt.OptimiserChain(opt.SkipNonFinite(), opt.Adam())
    assert_same(run(rule, model, grads, verb), by_itself(rule, model, grads), exact=False, dtype="float32")


def test_what_is_not_packed(far):
    """Complex arrays, transforms and graphs go their own way."""
    x, dx = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    _, new = opt.update(opt.setup(opt.Adam(), [x]), [x], [dx])
    assert new[0].requires_grad
    z = torch.randn(3, dtype=torch.complex64)
    _, new = opt.update(opt.setup(opt.Adam(), [z]), [z], [z])
    assert new[0].dtype is torch.complex64


def test_in_a_transform_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(packed, "is_far", lambda x: True)
    x, dx = torch.randn(3, 4), torch.randn(5, 3, 4)
    state = opt.setup(opt.Adam(), [x])
    step_of = torch.func.vmap(lambda dx: opt.update(state, [x], [dx])[1][0])
    torch.testing.assert_close(step_of(dx)[2], opt.update(state, [x], [dx[2]])[1][0])


@pytest.mark.parametrize("seed", range(10))
def test_sums_over_rows(seed):
    rng = np.random.default_rng(seed)
    sizes = tuple(rng.choice([1, 5, 255, 256, 257, 1000, 256 * 64, 256 * 64 + 1, 256 * 200], rng.integers(2, 9)).tolist())
    where = layout.layout(sizes, by_rows=True)
    arrays = [torch.from_numpy(rng.standard_normal(size)) for size in sizes]
    elements = where.pack(arrays)
    for op, of in (("sum", torch.sum), ("largest", torch.amax), ("smallest", torch.amin)):
        torch.testing.assert_close(where.reduced(op, elements + 1), torch.stack([of(x + 1) for x in arrays]))
    factors = torch.arange(len(sizes), dtype=torch.float64)
    pieces = where.unpack(elements * where.spread(factors))
    assert all(torch.equal(piece, x * f) for piece, x, f in zip(pieces, arrays, factors, strict=True))


def test_nothing_packed_is_kept_alive(far):
    model, grads = problem("torch", "float32", absent=False)
    state, _ = opt.update(opt.setup(opt.AdamW(), model), model, grads[0])
    gone = weakref.ref(grads[0]["p0"])
    del grads
    gc.collect()
    assert gone() is None
    assert state is not None


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


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=gpu, id=str(i)) for i, rule in enumerate(COUNTED[:1] + COUNTED[3:])])
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
