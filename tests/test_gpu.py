"""What only a CUDA device can show; skipped without one. `python -m pytest -m gpu tests` runs these."""

import threading

import pytest
import torch

import optimisers as opt
from optimisers.arrays import copied
from optimisers.engine.kernels.cuda import devices, driver
from optimisers.errors import CaptureError, GradientError, NonFiniteError
from optimisers.rules._states import map_state
from test_blocks import IDS, LAWFUL, VERBS, assert_same, problem, run
from test_cuda import CHAIN, gpt2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GLOBAL = opt.OptimiserChain(opt.ClipGlobalNorm(1.0, throw=False), *CHAIN)


def moved(tree, device):
    return {name: None if x is None else x.to(device) for name, x in tree.items()}


def on_host(found):
    states, model = found
    back = {name: map_state(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, s) for name, s in states.items()}
    return back, moved(model, "cpu")


@pytest.fixture
def launched(monkeypatch):
    """How many kernels were launched."""
    counts = {"launches": 0, "uploads": 0}
    launch, upload = driver.Gpu.launch, driver.Gpu.upload

    def counted(key, function):
        def call(*args):
            counts[key] += 1
            return function(*args)

        return call

    monkeypatch.setattr(driver.Gpu, "launch", counted("launches", launch))
    monkeypatch.setattr(driver.Gpu, "upload", counted("uploads", upload))
    return counts


@VERBS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("name", "row", "rule"), LAWFUL, ids=IDS)
def test_a_gpu_gives_what_the_loops_of_the_host_give(name, row, rule, dtype, verb, launched, monkeypatch):
    monkeypatch.setenv("OPTIMISERS_COMPILE", "1")
    model, grads = problem("torch", dtype)
    found = on_host(run(rule, moved(model, "cuda"), [moved(given, "cuda") for given in grads], verb))
    assert launched["launches"]
    wanted = run(rule, model, grads, verb)
    # Exponentials, logarithms and powers are those of the device.
    assert_same(found, wanted, exact=False, dtype=dtype, least=1e-6 if dtype == "float32" else 0.0)


@pytest.mark.parametrize("rule", [opt.AdamW(1e-2), opt.Lion(1e-2), opt.Rprop(1e-2), opt.Momentum(0.1)], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_arithmetic_and_roots_have_the_same_bits(rule, dtype, monkeypatch):
    monkeypatch.setenv("OPTIMISERS_COMPILE", "1")
    model, grads = problem("torch", dtype)
    found = on_host(run(rule, moved(model, "cuda"), [moved(given, "cuda") for given in grads], opt.update_))
    assert_same(found, run(rule, model, grads, opt.update_), exact=True, dtype=dtype)


def steps(rule, count=4, shapes=None):
    """A model of GPT-2's form on the device, after some steps, and its gradients."""
    model = {str(i): torch.randn(shape, device="cuda") for i, shape in enumerate(shapes or gpt2(24))}
    grads = {name: torch.randn_like(x) for name, x in model.items()}
    state = opt.setup(rule, model)
    for _ in range(count):
        state, model = opt.update_(state, model, grads)
    return state, model, grads


@pytest.mark.parametrize(("rule", "launches"), [(opt.AdamW(1e-3), 1), (GLOBAL, 4)], ids=["AdamW", "chain"])
def test_a_step_neither_waits_nor_copies(rule, launches, launched):
    state, model, grads = steps(rule)
    launched.update(launches=0, uploads=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.update_(state, model, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert launched == {"launches": launches, "uploads": 0}


def test_a_fault_is_found_before_anything_is_written():
    state, model, grads = steps(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.AdamW()))
    before = {name: copied(x) for name, x in model.items()}
    grads["3"][0] = torch.inf
    with pytest.raises(NonFiniteError, match="'3'"):
        opt.update_(state, model, grads)
    assert all(torch.equal(model[name], x) for name, x in before.items())


def test_streams_follow_one_another():
    model, grads = problem("torch", "float32", absent=False)
    xs, state = moved(model, "cuda"), None
    state = opt.setup(GLOBAL, xs)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for t, given in enumerate(grads):
        with torch.cuda.stream(streams[t % 2]):
            state, xs = opt.update_(state, xs, moved(given, "cuda"))
        torch.cuda.synchronize()
    _, wanted = run(GLOBAL, model, grads, opt.update_)
    for name, x in xs.items():
        torch.testing.assert_close(x.cpu(), wanted[name])


def test_another_thread_has_the_same_context():
    state, model, grads = steps(opt.AdamW(1e-3))
    expected = {name: x.clone() for name, x in model.items()}
    opt.update(state, expected, grads)
    faults = []

    def work():
        try:
            opt.update_(state, model, grads)
        except Exception as error:  # noqa: BLE001
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not faults


@VERBS
def test_no_step_is_captured(verb):
    state, model, grads = steps(opt.Lion(1e-3))
    before = {name: copied(x) for name, x in model.items()}
    torch.cuda.synchronize()
    with pytest.raises(CaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        verb(state, model, grads)
    torch.cuda.synchronize()
    assert all(torch.equal(model[name], x) for name, x in before.items())
    verb(state, model, grads)


def test_gradients_and_parameters_elsewhere():
    model, grads = problem("torch", "float32", absent=False)
    state, new = opt.update(opt.setup(opt.AdamW(0.1), model), model, grads[0])
    with pytest.raises(GradientError, match="cuda:0"):
        opt.update(state, moved(new, "cuda"), grads[1])
    _, found = opt.update(state, moved(new, "cuda"), moved(grads[1], "cuda"))
    _, wanted = opt.update(state, new, grads[1])
    for name, x in found.items():
        torch.testing.assert_close(x.cpu(), wanted[name])


def test_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model, grads = problem("torch", "float32", absent=False)
    place = {name: f"cuda:{i % 2}" for i, name in enumerate(model)}
    there = {name: x.to(place[name]) for name, x in model.items()}
    given = [{name: dx.to(place[name]) for name, dx in g.items()} for g in grads]
    _, found = run(GLOBAL, there, given, opt.update_)
    _, wanted = run(GLOBAL, model, grads, opt.update_)
    for name, x in found.items():
        assert str(x.device) == place[name]
        torch.testing.assert_close(x.cpu(), wanted[name])


@pytest.mark.parametrize("rule", [opt.Muon(), opt.Apollo(opt.AdamW(1e-2), 2)], ids=["Muon", "Apollo"])
def test_rules_of_whole_matrices(rule):
    model, grads = problem("torch", "float32", shapes=((6, 8), (6, 8), (30, 4)), absent=False)
    _, found = run(rule, moved(model, "cuda"), [moved(given, "cuda") for given in grads], opt.update_)
    _, wanted = run(rule, model, grads, opt.update_)
    for name, x in found.items():
        torch.testing.assert_close(x.cpu(), wanted[name], rtol=1e-3, atol=1e-3)


def test_the_device_is_known():
    x = torch.ones(1, device="cuda")
    assert devices.device_of(x) is devices.known[x.device]
    assert isinstance(devices.device_of(x), driver.Gpu)
