"""When loops are compiled, and what happens where they cannot be."""

import os
import stat
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import optimisers as opt
from looped import Counter, adjusted, forget, held, raw, traces
from optimisers.engine.groups import group
from optimisers.engine.kernels import backend
from optimisers.engine.kernels.c import compiler as build
from optimisers.errors import CompileWarning
from optimisers.rules._base import walk

# --- when the compiler runs --------------------------------------------------------------------------------------------------


def falling(step):
    return 0.1 / (1 + step)


@pytest.mark.parametrize(
    "rule",
    [
        opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW(0.1, lambda_=0.01)),
        opt.Scheduled(opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.RAdam()), eta=falling),
        opt.AccumGrad(2),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_new_numbers_compile_nothing(rule, switch, monkeypatch, tmp_path):
    switch("1")
    forget(monkeypatch)
    monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path))
    before = build.compilations
    rng = np.random.default_rng(0)
    model = {str(i): rng.standard_normal((i % 7 + 1, i % 3 + 1)) for i in range(30)}
    state = opt.setup(rule, model)
    first = None
    for step in range(103):
        state, model = opt.update(state, model, {k: 0.1 * x + 1 for k, x in model.items()})
        if step == 2:
            first = build.compilations, traces()
        state = adjusted(state, 1 + 1 / (step + 1), where=None if step % 2 else "1*")
    assert (build.compilations, traces()) == first
    # AccumGrad does one thing with the first gradient and another with the last.
    assert 1 <= build.compilations - before == traces() <= 2
    assert len(list(tmp_path.glob("*.so"))) == traces()
    assert held(state) == 30


def test_a_library_is_compiled_once_for_all_processes(switch, monkeypatch, tmp_path):
    switch("1")
    monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path))
    counts = []
    for _ in range(2):
        forget(monkeypatch)
        x = np.ones(5)
        opt.update(opt.setup(opt.Momentum(), x), x, x)
        counts.append(build.compilations)
    assert counts[1] == counts[0]
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".so"


def test_a_directory_that_others_can_write_to_is_not_used(switch, monkeypatch, tmp_path):
    switch("1")
    forget(monkeypatch)
    tmp_path.chmod(0o777)
    monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path))
    build._directory.cache_clear()
    x = np.ones(5)
    state, _ = opt.update(opt.setup(opt.Momentum(), x), x, x)
    assert held(state) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rule", "lib", "elements", "after"),
    [
        (opt.Adam(), "numpy", 4096, 1),
        (opt.Adam(), "torch", 4096, 1),
        (opt.Adam(), "numpy", 4095, 65),
        (opt.Adam(), "torch", 40, 65),
        (opt.ClipNorm(), "torch", 40, 1),  # NumPy adds up in another order
    ],
)
def test_small_groups_wait(rule, lib, elements, after, switch, monkeypatch, tmp_path):
    switch("auto")
    forget(monkeypatch)
    monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path))
    counter = Counter(monkeypatch)
    x = np.linspace(0, 1, elements, dtype=np.float32)
    x = x if lib == "numpy" else torch.from_numpy(x)
    state, first = opt.setup(rule, x), None
    for step in range(1, 70):
        state, x = opt.update(state, x, x)
        if counter.runs and first is None:
            first = step
    assert first == after
    before, counter.runs = build.compilations, 0
    forget(monkeypatch)
    opt.update(state, x, x)
    assert build.compilations == before
    assert counter.runs  # what is on disk is used at once


@pytest.mark.parametrize(
    "rule",
    [
        opt.AdamW(0.1, lambda_=0.1),
        opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW()),
        opt.Scheduled(opt.RAdam(), eta=falling),
        opt.Muon(opt.AdamW(0.1)),
    ],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize("update", [opt.update, opt.update_])
@pytest.mark.parametrize("lib", ["numpy", "torch"])
def test_when_a_loop_was_compiled_changes_no_bit(rule, update, lib, switch, monkeypatch, tmp_path):
    switch("auto")
    rng = np.random.default_rng(0)
    start = {"a": rng.standard_normal((4, 5)), "b": rng.standard_normal(7)}
    seen, counter = [], Counter(monkeypatch)
    for after in (100, 3, 0, 100):  # in the last run libraries are there
        forget(monkeypatch)
        monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path / ("none" if after == 100 and not seen else "kept")))
        monkeypatch.setattr(backend, "COMPILE_AFTER", after)
        model = {key: torch.from_numpy(x.copy()) if lib == "torch" else x.copy() for key, x in start.items()}
        state, counter.runs = opt.setup(rule, model), 0
        for step in range(6):
            state, model = update(state, model, {key: 0.5 * x + 0.1 * step for key, x in model.items()})
        seen.append((raw(model), raw(state), counter.runs))
    assert len({str(found[:2]) for found in seen}) == 1
    runs = [found[2] for found in seen]
    assert runs[1] <= runs[2] == runs[3]
    if not any(isinstance(inner, opt.ClipNorm) for inner in walk(rule)):
        assert runs[0] == 0 < runs[1] < runs[2]


# --- without a compiler ------------------------------------------------------------------------------------------------------


def failing(tmp_path):
    script = tmp_path / "failing-cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\necho "no space" >&2\nexit 1\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def steps(rule, update, model):
    state = opt.setup(rule, model)
    for _ in range(3):
        state, model = update(state, model, {k: 0.5 * x for k, x in model.items()})
    return state, model


@pytest.mark.parametrize("update", [opt.update, opt.update_])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"CC": "/nonexistent/cc"}, "there is no C compiler"),
        ({"PATH": "/nonexistent"}, "there is no C compiler"),
        ({"CC": "false"}, "false fails"),
        ({"CC": failing}, "failing-cc fails: no space"),
    ],
    ids=["CC", "PATH", "no version", "fails"],
)
def test_without_a_compiler_there_is_one_warning(settings, reason, update, switch, monkeypatch, tmp_path):
    model = {"a": np.linspace(0, 1, 50), "b": np.ones((3, 4)), "c": np.ones(9, np.float32)}
    rule = opt.OptimiserChain(opt.ClipNorm(0.5), opt.Adam())
    switch("0")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        expected = steps(rule, opt.update, {k: x.copy() for k, x in model.items()})
        assert not seen
        switch("1")
        forget(monkeypatch)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path / "cache"))
        for name, value in settings.items():
            monkeypatch.setenv(name, value(tmp_path) if callable(value) else value)
        found = [steps(rule, update, {k: x.copy() for k, x in model.items()}) for _ in range(2)]
    build.compiler.cache_clear()
    assert [w.category for w in seen] == [CompileWarning]
    assert reason in str(seen[0].message)
    assert "OPTIMISERS_COMPILE=0" in str(seen[0].message)
    for state, new in found:
        assert state == expected[0]
        assert all(new[k].tobytes() == expected[1][k].tobytes() for k in model)


@dataclass(frozen=True)
class CubeRoot(opt.AbstractRule):
    """A rule that is elementwise, as it claims, by a function that loops do not know."""

    eta: float = 0.1
    law = "elementwise"

    def init(self, x):
        return 0 * x

    def apply(self, state, x, dx):
        state = 0.5 * state + dx
        return state, self.eta * np.cbrt(state)


def test_a_rule_that_cannot_be_traced_is_named_once(switch, monkeypatch):
    switch("rules")
    expected, right = steps(CubeRoot(), opt.update, {"a": np.linspace(0, 1, 50)})
    forget(monkeypatch)
    switch("1")
    with pytest.warns(CompileWarning, match=r"^CubeRoot is stepped array by array.*: it uses cbrt\.") as seen:
        state, model = steps(CubeRoot(), opt.update_, {"a": np.linspace(0, 1, 50)})
    assert len(seen) == 1
    steps(CubeRoot(0.2), opt.update, {"a": np.ones(3, np.float32)})  # another warning would be an error
    assert state == expected
    assert model["a"].tobytes() == right["a"].tobytes()


@dataclass(frozen=True)
class ByDegree(opt.AbstractRule):
    """A rule whose program is another one for each degree."""

    degree: int
    law = "elementwise"

    def init(self, x):
        return 0 * x

    def apply(self, state, x, dx):
        return 0.5 * state + dx, float(self.degree) * dx


def test_numbers_that_ask_for_too_many_programs_are_named_once_and_leave_earlier_ones_theirs(switch, monkeypatch):
    forget(monkeypatch)
    monkeypatch.setattr(group, "_VARIANTS", 2)
    switch("1")
    model = {"a": np.ones(50)}
    for degree in (1, 2):
        steps(ByDegree(degree), opt.update, model)
    with pytest.warns(CompileWarning, match="in too many ways") as seen:
        further, _ = steps(ByDegree(3), opt.update, model)
    earlier, _ = steps(ByDegree(2), opt.update, model)
    assert (len(seen), held(further), held(earlier)) == (1, 0, 1)


def truncated(content, _other):
    return content[: len(content) // 2]


def damaged(content, _other):
    place = len(content) // 3
    return content[:place] + bytes(b ^ 0xFF for b in content[place : place + 40]) + content[place + 40 :]


def foreign(_content, other):
    return other


def emptied(_content, _other):
    return b""


@pytest.mark.parametrize("broken", [truncated, damaged, foreign, emptied])
def test_a_library_that_is_not_what_was_compiled_is_never_opened_but_made_anew(broken, switch, monkeypatch, tmp_path):
    switch("1")
    forget(monkeypatch)
    monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path))
    model = {"a": np.linspace(0, 1, 50)}
    steps(opt.Lion(), opt.update, model)
    (file,) = tmp_path.glob("*.so")
    other = file.read_bytes()
    file.unlink()
    forget(monkeypatch)
    expected = steps(opt.Momentum(0.125), opt.update, model)
    (file,) = tmp_path.glob("*.so")
    content = file.read_bytes()
    file.unlink()  # a library that is loaded must not change under its users
    file.write_bytes(broken(content, other))
    forget(monkeypatch)
    opened, before = [], build.compilations
    library = build.ctypes.CDLL
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: (opened.append(Path(path).read_bytes()), library(path))[1])
    state, new = steps(opt.Momentum(0.125), opt.update, model)
    assert held(state) == 1
    assert state == expected[0]
    assert new["a"].tobytes() == expected[1]["a"].tobytes()
    assert build.compilations == before + 1
    assert opened == [content]
    assert [file.read_bytes() for file in tmp_path.glob("*.so")] == [content]


@pytest.mark.parametrize("made", ["a folder", "a pipe", "a dangling link"])
def test_what_is_no_file_in_the_place_of_a_library_is_passed_over(made, switch, monkeypatch, tmp_path):
    switch("1")
    forget(monkeypatch)
    monkeypatch.setenv("OPTIMISERS_CACHE", str(tmp_path))
    model = {"a": np.linspace(0, 1, 50)}
    expected = steps(opt.Momentum(0.125), opt.update, model)
    (file,) = tmp_path.glob("*.so")
    file.unlink()
    {"a folder": file.mkdir, "a pipe": lambda: os.mkfifo(file), "a dangling link": lambda: file.symlink_to(tmp_path / "none")}[
        made
    ]()
    forget(monkeypatch)
    state, _ = steps(opt.Momentum(0.125), opt.update, model)
    assert state == expected[0]
    assert held(state) == 1


@pytest.mark.parametrize("reason", ["nothing can be written", "nothing can be loaded"])
def test_where_libraries_cannot_be_kept_they_are_made_for_this_process(reason, switch, monkeypatch, tmp_path):
    switch("1")
    forget(monkeypatch)
    cache = tmp_path / "cache"
    monkeypatch.setenv("OPTIMISERS_CACHE", str(cache))
    scratch, library = build.tempfile.TemporaryDirectory, build.ctypes.CDLL

    def full(*args, **kwargs):
        if kwargs.get("dir") == cache:
            raise OSError(28, "No space left on device")
        return scratch(*args, **kwargs)

    def forbidden(path):
        if str(path).startswith(str(cache)):
            raise OSError("failed to map segment from shared object")
        return library(path)

    if reason == "nothing can be written":
        monkeypatch.setattr(build.tempfile, "TemporaryDirectory", full)
    else:
        monkeypatch.setattr(build.ctypes, "CDLL", forbidden)
    state, _ = steps(opt.Momentum(0.125), opt.update, {"a": np.linspace(0, 1, 50)})  # a warning would be an error
    assert held(state) == 1


def test_processes_that_compile_the_same_at_once_do_not_disturb_each_other(tmp_path):
    script = (
        "import numpy as np, optimisers as opt\n"
        "x = np.linspace(0, 1, 50)\n"
        "for rule in (opt.Momentum(), opt.Lion()):\n"
        "    state, y = opt.update(opt.setup(rule, x), x, x)\n"
        "    print(y.tobytes().hex())\n"
    )
    environment = {**os.environ, "OPTIMISERS_COMPILE": "1", "OPTIMISERS_CACHE": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(set(results)) == 1
    assert all(file.suffix == ".so" for file in tmp_path.iterdir())
