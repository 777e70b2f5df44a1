"""The example of several processes trains as one process does, and would tell if it did not."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed.tensor")

import torch
import torch.distributed as dist

from torchrun import torchrun

pytestmark = pytest.mark.xdist_group("ranks")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "distributed_gpt.py"
TINY = ["--steps", "20", "--batch", "8", "--context", "32", "--width", "32", "--layers", "1"]


def load():
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        spec = importlib.util.spec_from_file_location("distributed_gpt", EXAMPLE)
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
    finally:
        sys.path.remove(str(EXAMPLE.parent))
    return example


def run_in_a_rank(arguments):
    """What the example prints in a process that has joined the others already."""
    joined, left, printed = dist.init_process_group, dist.destroy_process_group, io.StringIO()
    dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None
    try:
        with contextlib.redirect_stdout(printed):
            load().main(arguments)
    finally:
        dist.init_process_group, dist.destroy_process_group = joined, left
    return printed.getvalue()


def assert_same_losses(printed):
    assert "all 20 losses are those of one process" in printed
    rows = [line.split() for line in printed.splitlines() if line[:4].strip().isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, 21, 2))
    assert float(rows[-1][2]) < float(rows[0][2]) - 1  # it learns


def test_example_on_two_processes_has_the_losses_of_one():
    assert_same_losses(torchrun(EXAMPLE, *TINY, "--rule", "muon"))


def test_example_in_float64_has_the_losses_of_one(two):
    printed, nothing = two.run(run_in_a_rank, [*TINY, "--rule", "adamw", "--double"])
    assert nothing == ""
    assert_same_losses(printed)


def test_example_says_so_if_losses_differ(capsys):
    example = load()
    alone, cut = example.History(train=[5.0, 4.0]), example.History(train=[5.0, 4.001])
    with pytest.raises(SystemExit, match=r"2\.5e-04 apart, and 1e-05 is allowed"):
        example.report(alone, cut, 2, example.TOLERANCE[torch.float32])
    with pytest.raises(SystemExit, match="nan"):
        example.report(alone, example.History(train=[5.0, float("nan")]), 2, 1e-5)
    assert "step" in capsys.readouterr().out
    assert "train_gpt" in sys.modules
