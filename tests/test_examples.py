"""The examples run, learn, and leave their pictures behind."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import optree
import pytest
import torch

import optimisers as opt

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--steps", "30", "--batch", "8", "--context", "32", "--width", "32", "--layers", "1", "--no-progress"]


@pytest.fixture(scope="module")
def train_gpt():
    spec = importlib.util.spec_from_file_location("train_gpt", ROOT / "examples" / "train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_picture(path):
    """A PNG with a header, a size worth looking at and more in it than one colour."""
    from matplotlib import image

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) >= 300
    assert pixels[..., :3].std() > 0.01


@pytest.fixture(scope="module")
def tiny_run(train_gpt):
    """A few steps of a tiny model: rule, seed -> history."""
    data = train_gpt.load_data()

    def run(rule, seed=0, steps=30):
        torch.manual_seed(seed)
        model = train_gpt.GPT(context=32, width=32, layers=1)
        choice = train_gpt.RULES[rule]
        return train_gpt.train(model, choice.rule(choice.eta), data, steps=steps, batch=8, seed=seed, evaluations=1)

    return run


def test_gpt_learns_draws_and_speaks(train_gpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    history = train_gpt.main(TINY)

    assert len(history.train) == 30
    assert all(map(math.isfinite, history.train))
    (first_step, first), *_, (last_step, last) = history.validation
    assert (first_step, last_step) == (0, 30)
    assert first == pytest.approx(math.log(256), rel=0.05)  # before the first step every byte is as likely as another
    assert last < first - 1
    assert_picture(tmp_path / "out" / "train_gpt" / "loss.png")

    printed = capsys.readouterr().out
    assert "blocks.0.qkv.weight" in printed  # the state table
    assert f"validation loss {last:.3f}" in printed
    sample = printed.partition("--- sample ---\n")[2]
    assert sample.startswith("The ")
    assert len(sample) > 100


def test_gpt_learns_by_every_rule(train_gpt, tiny_run):
    for rule in train_gpt.RULES:
        (_, first), (_, last) = tiny_run(rule).validation
        assert last < first - 0.3, rule


def test_gpt_run_is_determined_by_its_seed(tiny_run):
    assert tiny_run("adamw", seed=0, steps=5) == tiny_run("adamw", seed=0, steps=5)
    assert tiny_run("adamw", seed=0, steps=5) != tiny_run("adamw", seed=1, steps=5)


def test_gpt_rules_are_shown_the_same_weights_and_batches(tiny_run):
    (first, second), (other_first, other_second) = tiny_run("adamw", steps=2).train, tiny_run("lion", steps=2).train
    assert first == other_first
    assert second != other_second


def test_gpt_compares_rules(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_gpt

    small = ["--batch", "4", "--context", "16", "--width", "16", "--layers", "1", "--steps", "12", "--seeds", "2"]
    results = train_gpt.main(["--compare", "adamw", "muon", *small, "--out", str(tmp_path)])

    assert_picture(tmp_path / "comparison.png")
    assert_picture(tmp_path / "spike.png")
    for losses in results["sweeps"].values():  # no rule's best lies at the edge of its sweep
        best = min(losses, key=losses.__getitem__)
        assert min(losses) < best < max(losses)
    adamw, muon = results["rows"]
    assert len(adamw["finals"]) == 2
    assert muon["state bytes"] < adamw["state bytes"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["rule"] == "adamw"
    assert "| muon |" in capsys.readouterr().out


def test_state_bytes_on_the_hidden_matrices(train_gpt):
    model = train_gpt.GPT()
    hidden = [name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]

    def bytes_of(rule):
        state = opt.setup(rule, model)
        return sum(leaf.nbytes for name in hidden for leaf in optree.tree_leaves(state[name].state))

    adamw = bytes_of(train_gpt.adamw(1e-3))
    assert bytes_of(opt.Muon()) <= 0.5 * adamw
    assert bytes_of(train_gpt.quarter(1e-3)) <= 0.26 * adamw
    assert bytes_of(opt.Apollo.mini()) <= 0.02 * adamw


def test_digits_reach_their_accuracy_without_torch(tmp_path):
    # A process of its own, for the example asserts at its end that torch was never imported.
    # The products are small: threads would only wait for each other.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    script = ROOT / "examples" / "digits_numpy.py"
    run = subprocess.run(
        [sys.executable, script, "--no-progress", "--out", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    accuracy = re.search(r"test accuracy ([\d.]+)%", run.stdout)
    assert float(accuracy[1]) >= 95
    assert_picture(tmp_path / "curves.png")


# --- the notebooks -----------------------------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def shown(notebook):
    """What the cells show, by their source, with numbers left out: the last digits differ from machine to machine."""
    return [
        ("".join(cell["source"]), re.sub(r"[\d.]+", "#", json.dumps(cell["outputs"])))
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_holds(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import run_notebook

    held = json.loads(path.read_text(encoding="utf-8"))
    assert (held["nbformat"], len({cell["id"] for cell in held["cells"]})) == (4, len(held["cells"]))
    ran = run_notebook.run(path)
    assert shown(ran) == shown(held)
    tables = [
        output["data"]["text/html"]
        for cell in ran["cells"]
        for output in cell.get("outputs", ())
        if "data" in output and "text/html" in output["data"]
    ]
    assert tables
    assert all("<table>" in "".join(table) for table in tables)


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["composing", "first-steps"]


# --- the gallery -------------------------------------------------------------------------------------------------------------


def gallery(*arguments, **options):
    command = [sys.executable, str(ROOT / "examples" / "gallery.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_the_gallery_draws_what_it_is_asked_for(tmp_path):
    done = gallery("Lion", "spectrum", "schedules", "--to", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Lion.png", "schedules.png", "spectrum.png"]
    for file in tmp_path.iterdir():
        assert_picture(file)
        assert file.stat().st_size < 60_000


def test_the_gallery_says_what_it_lacks(tmp_path):
    done = gallery("Leon", "--to", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("there is no picture of Leon; there are ")
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = gallery(env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1
    assert "the gallery is drawn with matplotlib, which is not installed (no matplotlib here)" in done.stderr
