"""Kernels for CUDA without a GPU: their source, compiled by g++ behind a shim, steps arrays of the host."""

import contextlib
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.arrays import copied
from optimisers.engine.kernels.cuda import devices, driver, nvrtc
from optimisers.engine.kernels.cuda.nvrtc import CompilationFailed
from optimisers.engine.kernels.work import table
from optimisers.errors import CaptureError, CompileWarning, NonFiniteError
from programs import texts
from shim import Shim, prebuild
from test_blocks import IDS, LAWFUL, VERBS, assert_same, problem, run

CHAIN = (opt.SignDecay(1e-4), opt.WeightDecay(1e-3), opt.AdamW(3e-3))


@pytest.fixture(scope="module")
def _prebuilt():
    prebuild([text for _, text in texts(torch.float32, torch.bfloat16, torch.float16)])


@pytest.fixture
def shim(monkeypatch, _prebuilt):
    """A device in the place of the host, for torch."""
    shim = Shim()
    monkeypatch.setitem(devices.known, shim.device, shim)
    return shim


@pytest.fixture
def by_loops(monkeypatch):
    """Steps as the host takes them, by loops however small the arrays are."""

    def result(*args):
        with monkeypatch.context() as patch:
            patch.setitem(devices.known, torch.device("cpu"), None)
            patch.setenv("OPTIMISERS_COMPILE", "1")
            return run(*args)

    return result


# --- what kernels compute -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "verb"),
    [("float32", opt.update), ("float32", opt.update_), ("bfloat16", opt.update_), ("float16", opt.update_)],
    ids=["float32-update", "float32-update_", "bfloat16", "float16"],
)
@pytest.mark.parametrize(("name", "row", "rule"), LAWFUL, ids=IDS)
def test_kernels_give_the_bits_of_loops(name, row, rule, dtype, verb, shim, by_loops):
    model, grads = problem("torch", dtype)
    found = run(rule, model, grads, verb)
    assert shim.counts["pass_0"] > 1
    assert_same(found, by_loops(rule, model, grads, verb), exact=row.law != "measured", dtype=dtype)


@pytest.mark.parametrize("threads", [2, 8])
def test_the_threads_of_a_block_share_an_array(threads, shim, by_loops):
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.ClipNorm(0.3), *CHAIN)
    model, grads = problem("torch", "float32")
    shim.threads = threads
    found = run(rule, model, grads, opt.update_)
    assert_same(found, by_loops(rule, model, grads, opt.update_), exact=False, dtype="float32")


@VERBS
def test_arrays_that_begin_anywhere_and_rules_that_differ(verb, shim, by_loops):
    """Addresses that no 16 bytes fit, and numbers in rows."""

    def rule(p):
        return opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW(1e-2 / len(p.path) / p.shape[0]))

    def shifted(x):
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)

    model, grads = problem("torch", "float32", shapes=((3, 5), (300, 31), (40,)), absent=False)
    grads = [{k: shifted(dx) for k, dx in given.items()} for given in grads]
    found = run(rule, {k: shifted(x) for k, x in model.items()}, grads, verb)
    assert_same(found, by_loops(rule, model, grads, verb), exact=False, dtype="float32")


WHOLE = (
    opt.Muon(),
    opt.Muon(mu=0.5, lambda_=0.1),
    opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.Orthogonalise(), opt.AdamW(1e-2)),
    opt.OptimiserChain(opt.Momentum(1.0), opt.Orthogonalise(), opt.ClipNorm(0.1)),
    opt.MixedPrecision(opt.Muon()),
)


@VERBS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", WHOLE, ids=[str(i) for i in range(len(WHOLE))])
def test_kernels_around_transforms_of_whole_matrices(rule, dtype, verb, shim, by_loops):
    """On a device all matrices that are alike are transformed together, also those that the host takes by twos."""
    shapes = ((6, 8), (6, 8), (6, 8), (30, 4), (8, 6), (2, 3, 4))
    model, grads = problem("torch", dtype, shapes=shapes, absent=False)
    found = run(rule, model, grads, verb)
    assert shim.counts["pass_1"]
    assert_same(found, by_loops(rule, model, grads, verb), exact=False, dtype=dtype, least=2e-5)


def test_matrices_that_are_alike_are_one_stack(shim):
    found = counted(opt.Muon(), [(40, 30)] * 20 + [(30, 20)] * 4, shim)
    assert found["pass_0"] == found["pass_1"] == 2  # once for each stack


# --- how often they are launched ----------------------------------------------------------------------------------------------


def gpt2(width):
    """The shapes of GPT-2's 148 arrays, for this width instead of 768."""
    vocabulary = 50257 * width // 768
    shapes = [(vocabulary, width), (width * 4 // 3, width)]
    for _ in range(12):
        shapes += [(width,)] * 4
        for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4)):
            shapes += [(rows * width, columns * width), (rows * width,)]
    return [*shapes, (width,), (width,)]


MANY = [shape for _ in range(1000) for shape in ((4, 4), (4,))]


def counted(rule, shapes, shim, *, verb=opt.update_):
    """What a step launches and copies, once nothing moves."""
    generator = torch.Generator().manual_seed(0)
    model = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    grads = {name: torch.randn(x.shape, generator=generator) for name, x in model.items()}
    state = opt.setup(rule, model)
    for _ in range(4):
        shim.counts.clear()
        state, model = verb(state, model, grads)
    return Counter(shim.counts)


@pytest.mark.parametrize("shapes", [gpt2(24), MANY], ids=["gpt2", "many"])
def test_a_step_is_one_launch_and_no_copy(shapes, shim):
    assert counted(opt.AdamW(1e-3), shapes, shim) == {"pass_0": 1}
    assert counted(opt.Lion(1e-3), shapes, shim) == {"pass_0": 1}


@pytest.mark.parametrize("throw", [True, False])
@pytest.mark.parametrize("shapes", [gpt2(24), MANY], ids=["gpt2", "many"])
def test_a_global_norm_costs_three_launches_more(shapes, throw, shim):
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(1.0, throw=throw), *CHAIN)
    assert counted(rule, shapes, shim) == {"pass_0": 1, "sums_0": 1, "combine": 1, "pass_1": 1}


def test_a_pure_step_copies_addresses_only(shim):
    found = counted(opt.AdamW(1e-3), gpt2(24), shim, verb=opt.update)
    assert found["pass_0"] == 1
    assert found["upload"] <= 1


def test_norms_of_several_dtypes_are_combined(shim, by_loops):
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(0.1), opt.Momentum(0.1))
    single, grads = problem("torch", "float32", absent=False)
    half, more = problem("torch", "bfloat16", seed=1, absent=False)
    model = single | {f"h{k}": x for k, x in half.items()}
    given = [a | {f"h{k}": dx for k, dx in b.items()} for a, b in zip(grads, more, strict=True)]
    found = run(rule, model, given, opt.update_)
    assert not shim.counts["combine"]
    assert_same(found, by_loops(rule, model, given, opt.update_), exact=False, dtype="bfloat16")


def test_what_cannot_be_combined_by_a_kernel_is_combined_by_the_rule(shim, by_loops):
    @dataclass(frozen=True)
    class Mean(opt.ClipGlobalNorm):
        """Its measure of all arrays depends on how many there are."""

        def combine(self, measures):
            return (opt.ClipGlobalNorm.combine(self, measures)[0] / len(measures),)

    rule = opt.OptimiserChain(Mean(0.1), opt.Momentum(0.1))
    model, grads = problem("torch", "float32")
    found = run(rule, model, grads, opt.update_)
    assert not shim.counts["combine"]
    assert_same(found, by_loops(rule, model, grads, opt.update_), exact=False, dtype="float32")


def test_an_array_of_two_thousand_million_elements_is_cut_into_pieces():
    size = 2**31 + 5
    work = table(np.array([0, 1]), np.array([7, size]))
    assert work.pieces.dtype == np.int64
    assert work.pieces[0].tolist() == [0, 0, 7]
    assert (work.pieces[1:, 0] == 1).all()
    assert work.pieces[1:, 2].sum() == size
    assert (np.diff(work.pieces[1:, 1]) == work.pieces[1:-1, 2]).all()
    assert work.pieces[-1, 1:].tolist() == [2**31, 5]


@VERBS
def test_arrays_in_other_orders_of_axes(verb, shim, by_loops):
    model, grads = problem("torch", "float32", shapes=((2, 3, 4, 5), (6, 7)), absent=False)
    model["p0"] = model["p0"].to(memory_format=torch.channels_last)
    model["p1"] = model["p1"].t()
    grads = [{**given, "p1": given["p1"].t()[:, :]} for given in grads]
    grads[1]["p0"] = grads[1]["p0"].to(memory_format=torch.channels_last)
    found = run(opt.AdamW(1e-2), model, grads, verb)
    assert shim.counts["pass_0"] == len(grads)
    assert found[1]["p0"].is_contiguous(memory_format=torch.channels_last)
    assert_same(found, by_loops(opt.AdamW(1e-2), model, grads, verb), exact=True, dtype="float32")


def test_binaries_are_kept_and_broken_ones_made_anew(monkeypatch, tmp_path):
    made = []

    def compiled(text, architecture):
        made.append(text)
        return nvrtc.Binary(f"binary of {text} for {architecture}".encode(), "")

    monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compiled", compiled)
    first = driver.binary("text", "sm_90")
    assert driver.binary("text", "sm_90") == first == b"binary of text for sm_90"
    assert made == ["text"]
    (file,) = tmp_path.glob("*.cubin")
    for broken in (file.read_bytes()[:-1], b"", file.read_bytes().replace(b"binary", b"bonary")):
        file.write_bytes(broken)
        assert driver.binary("text", "sm_90") == first
    assert made == ["text"] * 4
    assert driver.binary("text", "sm_100") != first
    assert len(list(tmp_path.iterdir())) == 2


class Driver:
    """The CUDA driver, as far as it is called: what was called, and the errors that come of it."""

    def __init__(self):
        self.calls, self.errors, self.context = [], {}, 0

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            errors = self.errors.get(name, [])
            if name == "cuModuleGetFunction":
                args[0]._obj.value = 77
            if name in {"cuCtxGetCurrent", "cuDevicePrimaryCtxRetain"}:
                args[0]._obj.value = self.context if name == "cuCtxGetCurrent" else 5
            if name == "cuCtxSetCurrent":
                self.context = args[0].value
            return errors.pop(0) if errors else 0

        if name == "cuLaunchKernel":
            self.__dict__[name] = call
        return call

    def names(self):
        return [name for name, *_ in self.calls]


@pytest.fixture
def gpu(monkeypatch):
    """The second of two devices of compute capability 9.0, and the driver that it calls."""
    found, current = Driver(), [0]

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(driver, "_driver", lambda: found)
    monkeypatch.setattr(driver, "binary", lambda text, architecture: f"{text} for {architecture}".encode())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 * index + current[0], raising=False)
    return driver.Gpu(torch.device("cuda:1")), found


def test_kernels_are_loaded_on_their_device_and_launched_on_its_stream(gpu):
    device, found = gpu
    assert device.load("text", ["pass_0", "sums_0"]) == [77, 77]
    assert found.names() == [
        "cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuModuleLoadData",
        "cuModuleGetFunction", "cuModuleGetFunction",
    ]  # fmt: skip
    assert found.calls[4][2] == b"text for sm_90"
    found.calls.clear()
    device.launch(77, 12, 4242)
    assert found.calls == [("cuLaunchKernel", 77, 12, 1, 1, 256, 1, 1, 0, 1001, 4242, None)]  # device 1 was the current one
    assert torch.cuda.current_device() == 0


def test_a_thread_without_a_context_is_given_one(gpu):
    device, found = gpu
    found.errors["cuLaunchKernel"] = [201]
    device.launch(77, 12, 4242)
    assert found.names()[0] == found.names()[-1] == "cuLaunchKernel"
    assert "cuCtxSetCurrent" in found.names()
    found.errors["cuLaunchKernel"] = [700]
    with pytest.raises(RuntimeError, match="a kernel cannot be launched on cuda:1: cuLaunchKernel fails with error 700"):
        device.launch(77, 12, 4242)
    found.errors["cuModuleLoadData"] = [209]
    with pytest.raises(CompilationFailed, match="cuModuleLoadData fails with error 209"):
        device.load("text", ["pass_0"])


# --- what may go wrong --------------------------------------------------------------------------------------------------------


def test_another_stream_is_given_the_tables_again(shim, by_loops):
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(0.5), *CHAIN)
    model, grads = problem("torch", "float32", absent=False)
    state, xs = opt.setup(rule, model), {name: copied(x) for name, x in model.items()}
    for t, given in enumerate(grads):
        shim.current = t % 2
        shim.counts.clear()
        state, xs = opt.update_(state, xs, given)
        assert shim.counts["upload"]
    _, wanted = by_loops(rule, model, grads, opt.update_)
    for name, x in xs.items():
        torch.testing.assert_close(x, wanted[name])


def test_a_fault_is_found_before_anything_is_written(shim):
    model, grads = problem("torch", "float32", absent=False)
    grads[0]["p0"][0, 0] = torch.nan
    before = {name: copied(x) for name, x in model.items()}
    state = opt.setup(opt.OptimiserChain(opt.ClipGlobalNorm(1.0), opt.AdamW()), model)
    with pytest.raises(NonFiniteError, match=re.escape("ClipGlobalNorm at 'p0': the 2-norm of its gradient is nan")):
        opt.update_(state, model, grads[0])
    assert all(torch.equal(model[name], x) for name, x in before.items())
    opt.update_(state, model, grads[1])


@VERBS
@pytest.mark.parametrize("rule", [opt.Lion(1e-3), opt.Muon(), opt.ClipNorm(1.0)], ids=repr)
def test_no_step_is_captured(rule, verb, shim, monkeypatch):
    model, grads = problem("torch", "float32", shapes=((3, 4), (6, 4)), absent=False)
    before = {name: copied(x) for name, x in model.items()}
    state = opt.setup(rule, model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(CaptureError, match=r"cannot be captured in a CUDA graph: .* call update_ after each replay"):
            verb(state, model, grads[0])
    assert not shim.counts
    assert all(torch.equal(model[name], x) for name, x in before.items())
    verb(state, model, grads[0])


def test_a_failed_compilation_is_told_once_and_changes_nothing(shim, monkeypatch):
    def load(text, names):
        raise CompilationFailed("NVRTC fails for sm_999: no such architecture")

    monkeypatch.setattr(devices, "_warned", set())
    monkeypatch.setattr(shim, "load", load)
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.AdaDelta())
    model, grads = problem("torch", "float32")
    with pytest.warns(CompileWarning, match="sm_999") as caught:
        _, found = run(rule, model, grads, opt.update_)
    assert len(caught) == 1
    assert not shim.counts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(opt.Descent(0.5), model, grads, opt.update)
    monkeypatch.setitem(devices.known, shim.device, None)
    _, wanted = run(rule, model, grads, opt.update_)
    for name, x in found.items():
        torch.testing.assert_close(x, wanted[name])
