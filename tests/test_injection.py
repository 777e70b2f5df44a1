"""Whatever fails in a call, nothing has changed or the step is whole; what could not be written is told."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import injection
import optimisers as opt
import optimisers.torch
from looped import forget, wide
from optimisers.engine.groups import stacking
from optimisers.engine.kernels import threads
from optimisers.engine.kernels.c import compiler as build
from optimisers.engine.kernels.numpy import blocks
from optimisers.engine.memory import writes
from optimisers.errors import ConsumedStateError, UnfinishedStepError
from optimisers.rules.matrices import muon


@pytest.fixture(autouse=True)
def an_engine_of_its_own(monkeypatch):
    """What an injected error leaves in what is remembered of rules and compilers is not for other tests."""
    forget(monkeypatch)
    yield
    build.compiler.cache_clear()
    build._version.cache_clear()


COUNT = int(os.environ.get("OPTIMISERS_POINTS", "25"))


@pytest.mark.parametrize("way", ["auto", "0"])
@pytest.mark.parametrize("verb", injection.VERBS)
@pytest.mark.filterwarnings("ignore::optimisers.errors.CompileWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_has_changed_or_the_step_is_whole(verb, way, switch):
    switch(way)
    outcomes, wrong = injection.points(COUNT, 11, [verb])
    assert not wrong
    assert sum(outcomes.values()) > COUNT // 2


# --- interrupts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["0", "1"])
@pytest.mark.parametrize("lib", ["numpy", "torch"])
def test_interrupts_at_any_time_leave_whole_steps(lib, way, switch):
    # In a process of its own: once torch.compile has run, Python looks for signals between a return and the assignment, where
    # what was returned is lost.
    switch(way)
    code = f"import test_injection; test_injection.interrupted({lib!r})"
    run = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(run, cwd=Path(__file__).parent, timeout=120, check=True)


def interrupted(lib):
    rng = np.random.default_rng(0)
    made = {key: rng.standard_normal(shape).astype("float32") for key, shape in {"w": (64, 64), "b": (7,)}.items()}
    model = made if lib == "numpy" else {key: torch.from_numpy(x) for key, x in made.items()}
    ones = {key: 0 * x + 1 for key, x in model.items()}
    state = opt.setup(opt.OptimiserChain(opt.Momentum(1.0, 0.0), opt.Descent(1.0)), model)
    state, model = opt.update_(state, model, ones)
    start = {key: wide(x).copy() for key, x in model.items()}
    steps = interrupts = 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while interrupts < 300:
            try:
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-4, 4e-3)))
                while True:
                    state, model = opt.update_(state, model, ones)
            except KeyboardInterrupt:
                interrupts += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.is_grad_enabled()
            moved = {round(float(value)) for key in model for value in np.unique(start[key] - wide(model[key])).round(2)}
            assert len(moved) == 1
            assert moved.pop() >= steps
            steps = round(float((start["b"] - wide(model["b"])).mean()))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert steps > 20


# --- what cannot be written --------------------------------------------------------------------------------------------------


def portions(monkeypatch, fails):
    """Muon's matrices one after the other, and one that cannot be transformed."""
    step = muon.matrix_step

    def failing(rule, u):
        if fails(u):
            raise MemoryError("no more")
        return step(rule, u)

    monkeypatch.setattr(writes, "PORTION", 1)
    monkeypatch.setattr(stacking, "ALONE_FROM", 1)
    monkeypatch.setattr(muon, "matrix_step", failing)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((6, 4 + i)) for i, name in enumerate("abc")} | {"bias": np.ones(5)}


def test_a_portion_that_fails_later_is_told_and_all_else_is_stepped(switch, monkeypatch):
    switch("1")
    model = portions(monkeypatch, lambda u: u.shape == (6, 5))
    whole = {key: x.copy() for key, x in model.items()}
    state, before = opt.setup(opt.Muon(), model), {key: x.copy() for key, x in model.items()}
    grads = {key: 0.1 + x for key, x in model.items()}
    expected, whole = opt.update(opt.setup(opt.Muon(), whole), whole, {**grads, "b": None})
    old = opt.adjust(state, eta=0.1)
    with pytest.raises(UnfinishedStepError, match=r"^update_: 'b' could not be stepped, and everything else was: MemoryError"):
        opt.update_(state, model, grads)
    for key in model:
        np.testing.assert_array_equal(model[key], before[key] if key == "b" else whole[key])
    assert state == expected
    with pytest.raises(ConsumedStateError):
        opt.update(old, model, grads)
    monkeypatch.undo()
    switch("1")
    again = opt.update_(state, model, grads)
    np.testing.assert_array_equal(again[1]["a"], opt.update(expected, whole, grads)[1]["a"])


def test_a_first_portion_that_fails_has_changed_nothing(switch, monkeypatch):
    switch("1")
    model = portions(monkeypatch, lambda u: u.shape == (6, 4))
    state, before = opt.setup(opt.Muon(), model), {key: x.copy() for key, x in model.items()}
    with pytest.raises(MemoryError, match="no more"):
        opt.update_(state, model, before)
    for key in model:
        np.testing.assert_array_equal(model[key], before[key])
    assert state == opt.setup(opt.Muon(), model)


def test_a_portion_that_fails_once_is_tried_again(switch, monkeypatch):
    switch("1")
    failed = []
    model = portions(monkeypatch, lambda u: u.shape == (6, 6) and not failed and not failed.append(1))
    grads = {key: 0.1 + x for key, x in model.items()}
    state, other = opt.setup(opt.Muon(), model), {key: x.copy() for key, x in model.items()}
    state, model = opt.update_(state, model, grads)
    assert failed
    monkeypatch.undo()
    switch("1")
    expected, other = opt.update(opt.setup(opt.Muon(), other), other, grads)
    assert state == expected
    for key in model:
        np.testing.assert_array_equal(model[key], other[key])


class Stubborn(torch.Tensor):
    """A tensor that cannot be written to while it says so."""

    refuses = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_ and getattr(args[0], "refuses", False):
            raise RuntimeError("not here")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_tensor_that_cannot_be_written_comes_before_all_others():
    model = {"a": torch.ones(3), "b": torch.ones(3).as_subclass(Stubborn), "c": torch.ones(2)}
    model["b"].refuses = True
    state = opt.setup(opt.Adam(), model)
    with pytest.raises(RuntimeError, match=r"^not here$"):
        opt.update_(state, model, {key: torch.ones(x.shape) for key, x in model.items()})
    assert all((x == 1).all() for x in model.values())
    assert state == opt.setup(opt.Adam(), model)


def test_of_several_such_tensors_those_that_could_not_be_written_are_told():
    model = {key: torch.ones(3).as_subclass(Stubborn) for key in "abc"}
    model["a"].refuses = True
    state, fresh = opt.setup(opt.Adam(), model), opt.setup(opt.Adam(), model)
    with pytest.raises(UnfinishedStepError, match=r"^update_: 'a' could not be stepped, .* RuntimeError: not here"):
        opt.update_(state, model, {key: torch.ones(3) for key in model})
    assert (model["a"] == 1).all()
    assert (model["b"] < 1).all()
    assert state["a"] == fresh["a"]
    assert state["b"] != fresh["b"]


def test_the_adapter_goes_on_after_an_unfinished_step():
    params = [torch.nn.Parameter(torch.ones(3).as_subclass(Stubborn)) for _ in range(3)]
    optimizer = optimisers.torch.Optimizer(opt.Descent(0.1), [(key, x) for key, x in zip("abc", params, strict=True)])
    for x in params:
        x.grad = torch.ones(3)
    params[0].refuses = True
    with pytest.raises(UnfinishedStepError, match="'a' could not be stepped"):
        optimizer.step()
    params[0].refuses = False
    optimizer.step()
    assert [round(float(x[0].detach()), 3) for x in params] == [0.9, 0.8, 0.8]


def test_a_helper_that_fails_is_no_silent_gap(monkeypatch, switch):
    """A thread that dies takes its part of the work with it; without a compiler it may run out of memory."""
    switch("0")
    monkeypatch.setattr(threads, "_ALONE", 16)
    monkeypatch.setattr(threads, "threads", lambda: 3)
    monkeypatch.setattr(blocks, "BLOCK", 2**12)
    work, failed = blocks._work, []

    def failing(run, left):
        if not failed and next(left, None) is not None:
            failed.append(1)
            raise MemoryError("no more")
        work(run, left)

    model = {"w": np.ones(50_000, np.float32), "v": np.ones(20_000, np.float32)}
    state = opt.setup(opt.OptimiserChain(opt.Momentum(1.0, 0.0), opt.Descent(0.5)), model)
    state, model = opt.update_(state, model, {"w": 0 * model["w"], "v": 0 * model["v"]})
    monkeypatch.setattr(blocks, "_work", failing)
    opt.update_(state, model, {key: 0 * x + 1 for key, x in model.items()})
    assert failed
    assert all((x == 0.5).all() for x in model.values())
