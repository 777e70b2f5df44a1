"""A look into checkpoint files from the command line."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

import optimisers as opt
from optimisers.__main__ import main
from optimisers.errors import CheckpointError
from optimisers.interop.inspection import contents, diff, show

ROUTE = opt.Route(
    ("embed", None),
    ("h.*.b", opt.OptimiserChain(opt.ClipNorm(0.5), opt.Momentum(0.1))),
    otherwise=opt.AdamW(3e-4, (0.9, 0.95)),
)


def model_of(lib=np):
    ones = np.ones if lib is np else torch.ones
    return {"embed": ones((5, 3)), "h": [{"w": ones((4, 3)), "b": ones(4)} for _ in range(3)], "out": ones((2, 4))}


def stepped(rule, model, steps):
    state = opt.setup(rule, model)
    for _ in range(steps):
        state, model = opt.update(state, model, model)
    return state, model


@pytest.mark.parametrize("lib", [np, torch], ids=["numpy", "torch"])
def test_a_file_is_shown(tmp_path, lib):
    state, _ = stepped(ROUTE, model_of(lib), 7)
    opt.save(tmp_path / "a.safetensors", opt.freeze(state, where="out"))
    dtype = "float64" if lib is np else "float32"
    size = 8 if lib is np else 4
    adam = ["AdamW(eta=0.0003,", "beta=(0.9,", "0.95))"]
    lines = [line.split() for line in show(tmp_path / "a.safetensors").splitlines()]
    assert lines[0] == ["path", "shape", "dtype", "state", "steps", "rule"]
    assert lines[2:] == [
        ["embed", "5x3", dtype, "0", "B", "not", "trained"],
        ["h.{0..2}.b", "x3", "4", dtype, str(3 * 4 * size), "B", "ClipNorm(omega=0.5)", ">", "Momentum(eta=0.1)"],
        ["h.{0..2}.w", "x3", "4x3", dtype, str(3 * (2 * 12 * size + 16)), "B", "7", *adam],
        ["out", "2x4", dtype, str(2 * 8 * size + 16), "B", "7", "frozen", *adam],
        f"8 arrays, 71 parameters, {3 * 4 * size + 3 * (24 * size + 16) + 16 * size + 16} B of state".split(),
    ]
    assert show(tmp_path / "a.safetensors", full=True).count("\n") == 10


@pytest.mark.parametrize("steps", [0, 1, 100, 20_000])
def test_steps_are_read_from_the_powers_of_beta(tmp_path, steps):
    state = opt.setup(opt.OptimiserChain(opt.ClipNorm(), opt.Adam()), np.ones(2))
    clip, (m, v, _) = state[()].state
    powers = (0.9 ** (steps + 1), 0.999 ** (steps + 1))
    state = opt.tree.state.rebuilt(state, [entry.replace(state=(clip, (m, v, powers))) for entry in state._entries])
    opt.save(tmp_path / "a", state)
    assert contents(tmp_path / "a")[""].steps == steps


def test_rules_without_powers_have_no_steps(tmp_path):
    state, _ = stepped(opt.Momentum(), np.ones(2), 3)
    opt.save(tmp_path / "a", state)
    assert contents(tmp_path / "a")[""].steps is None


def test_callables_and_users_rules_are_shown_without_being_made(tmp_path):
    rule = opt.Scheduled(opt.Muon(fallback=lambda x: False), eta=lambda step: 0.1 / (1 + step))
    opt.save(tmp_path / "a", opt.setup(rule, {"w": np.ones((2, 3))}))
    assert "Scheduled(Muon(AdamW(eta=0.0003" in show(tmp_path / "a")
    code = "import sys; from optimisers.__main__ import main; main(['show', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fallback=a function" in done.stdout


def test_bfloat16_is_read_with_torch(tmp_path):
    opt.save(tmp_path / "a", opt.setup(opt.Momentum(), torch.ones(4, dtype=torch.bfloat16)))
    done = subprocess.run(
        [sys.executable, "-m", "optimisers", "show", str(tmp_path / "a")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].split()[:6] == ["(the", "array)", "4", "bfloat16", "8", "B"]


def test_what_changed_between_two_files(tmp_path, capsys):
    state, model = stepped(ROUTE, model_of(), 2)
    opt.save(tmp_path / "a", state)
    assert diff(tmp_path / "a", tmp_path / "a") == "the same"
    state, _ = opt.update(state, model, {**model, "embed": None, "out": None})
    state = opt.freeze(opt.adjust(state, rho=0.8, where="h.*.b"), where="out")
    opt.save(tmp_path / "b", state)
    clip = "ClipNorm(omega=0.5) > Momentum(eta=0.1"
    assert diff(tmp_path / "a", tmp_path / "b").splitlines() == [
        f"rule {clip}) -> {clip}, rho=0.8):", "  h.{0..2}.b  x3",
        "other values in the state:", "  h.{0..2}.b  x3", "  h.{0..2}.w  x3",
        "steps 2 -> 3:", "  h.{0..2}.w  x3",
        "frozen:", "  out",
    ]  # fmt: skip
    other = opt.setup(opt.Adam(), {"embed": np.ones((5, 3), "float32"), "new": np.ones(2), "out": np.ones((3, 4))})
    opt.save(tmp_path / "c", other)
    text = diff(tmp_path / "a", tmp_path / "c")
    assert "only in the first:\n  h.{0..2}.b  x3\n  h.{0..2}.w  x3" in text
    assert "only in the second:\n  new" in text
    assert "shape (2, 4) -> (3, 4):\n  out" in text
    assert "dtype float64 -> float32:\n  embed" in text
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert capsys.readouterr().out.rstrip() == text
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "a")]) == 0


def refused(capsys, path):
    """What a command says of a file that it cannot read."""
    assert main(["show", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("optimisers: ")
    assert "Traceback" not in err
    return err


def test_files_of_torch_are_told_from_damaged_ones(tmp_path, capsys):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    assert "a file as torch.save writes; read it with torch.load" in refused(capsys, tmp_path / "a.pt")
    assert refused(capsys, tmp_path / "none").endswith("cannot be read: No such file or directory\n")
    assert refused(capsys, tmp_path).endswith("cannot be read: Is a directory\n")


def test_files_that_are_none_are_refused(tmp_path, capsys):
    opt.save(tmp_path / "a", opt.setup(opt.Adam(), model_of()))
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped").write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    (tmp_path / "text").write_text("not a checkpoint, but long enough to be read as a header")
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "other")
    torch.save({"w": torch.ones(2)}, tmp_path / "torch")
    assert "is cut off" in refused(capsys, tmp_path / "cut")
    assert "is damaged: its checksum" in refused(capsys, tmp_path / "flipped")
    assert "no checkpoint" in refused(capsys, tmp_path / "text")
    assert "but not one that opt.save made" in refused(capsys, tmp_path / "other")
    assert "no checkpoint" in refused(capsys, tmp_path / "torch")
    assert "No such file" in refused(capsys, tmp_path / "missing")


@pytest.mark.parametrize("seed", range(30))
def test_a_hostile_description_is_an_error_or_a_table(tmp_path, seed):
    """Parts of a valid description exchanged for others of any type: never another exception than CheckpointError."""
    from optimisers.interop import _tensor_file

    rng = np.random.default_rng(seed)
    state, _ = stepped(ROUTE, model_of(), 2)
    opt.save(tmp_path / "a", state)
    text, tensors = _tensor_file.read(tmp_path / "a")
    header = json.loads(text)
    wrong = [None, True, -1, 10**30, math.pi, "x", [], {}, [[]], {"type": 3}, {"array": "no"}, {"tuple": 5}, ["x"] * 3]
    spots = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(header)
    for _ in range(int(rng.integers(1, 4))):
        node, key = spots[rng.integers(len(spots))]
        node[key] = wrong[rng.integers(len(wrong))]
    _tensor_file.write(tmp_path / "b", tensors, json.dumps(header))
    try:
        assert re.search(r"\d+ arrays, ", show(tmp_path / "b"))
        diff(tmp_path / "a", tmp_path / "b")
    except CheckpointError:
        pass
