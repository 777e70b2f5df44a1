"""What docs/distributed.md says that each rule communicates is what it does."""

import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed.tensor")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import optimisers as opt
from optimisers.errors import GatherWarning
from sharded_models import counted
from table import ROWS

pytestmark = pytest.mark.xdist_group("ranks")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"
AROUND = {"OptimiserChain", "Scheduled", "MixedPrecision", "Averaged", "ScheduleFree", "Lookahead", "Cautious", "Projected"}


def step_of(rule, mesh, placements, shapes, dtype=torch.float32):
    """(kind, bytes sent) of each collective in the second step; arrays that are gathered whole with their elements."""
    torch.manual_seed(0)
    cut = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    model = {name: distribute_tensor(x, mesh, placements, src_data_rank=None) for name, x in cut.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GatherWarning)
        state = opt.setup(rule, model)
    grads = {name: x * 0.1 for name, x in model.items()}
    state, model = opt.update_(state, model, grads)
    with counted() as calls:
        opt.update_(state, model, grads)
    return calls


def of_all_rules():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        row.configs[0].__class__.__name__: step_of(row.configs[0], mesh, [Shard(0)], {"w": (16, 12)})
        for row in ROWS
        if hasattr(opt, type(row.configs[0]).__name__)
    }


def rows_of_page():
    """The first cells of the table, by what is said of the rules in them."""
    begins = r"^\| (`Descent`.*|`ClipNorm`.*|`Muon`.*|`Adafactor`.*) \| .* \| .* \|$"
    found = re.findall(begins, PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(found) == 4
    return found


def named(text):
    return set(re.findall(r"`(\w+)`", text))


def test_every_rule_stands_in_its_row(two):
    (found, again), (nothing, sums, matrices, gathered) = two.run(of_all_rules, limit=300), rows_of_page()
    kinds = {name: {kind for kind, _ in calls} for name, calls in found.items()}
    assert kinds == {name: {kind for kind, _ in calls} for name, calls in again.items()}
    assert {name for name, kind in kinds.items() if not kind} - AROUND == named(nothing)
    assert {name for name, kind in kinds.items() if kind == {"gather"}} - AROUND == named(sums)
    assert {name for name, kind in kinds.items() if "exchange" in kind} == named(matrices)
    assert {name for name, kind in kinds.items() if "whole" in kind} - AROUND == named(gathered)
    one, several, three = re.split(r", a sum for each array; |, two; ", sums)
    for text, count in ((one, 1), (several, 2), (three, 3)):
        assert {sum(size for _, size in found[name]) for name in named(text)} == {8 * count}
    assert ("gather", 8) in found["AdaMuon"]
    assert all(size == 16 * 12 for name in named(gathered) for _, size in found[name])


def of_muon(dtype):
    """(bytes out, bytes back, as the page says) for each way to cut eight matrices over four ranks."""
    found = []
    n, ranks = 8 * 16 * 12, dist.get_world_size()
    for shape, placements, parts in [
        ((4,), [Shard(0)], 4),
        ((2, 2), [Replicate(), Shard(0)], 2),
        ((2, 2), [Shard(0), Shard(1)], 4),
        ((4,), [Replicate()], 1),
    ]:
        mesh = init_device_mesh("cpu", shape)
        shapes = {str(i): (16, 12) for i in range(8)}
        (_, out), (_, back) = step_of(opt.Muon(eta=0.1), mesh, placements, shapes, getattr(torch, dtype))
        found.append((out, back, 4 * n * (parts - 1) / parts / ranks, 4 * n * (ranks - 1) / parts / ranks))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_send_what_the_formula_says(four, dtype):
    text = PAGE.read_text("utf-8")
    assert "4*n*(*W* - 1)/(*W N*) out, and 4*n*(*N* - 1)/(*W N*) back" in text
    for found in four.run(of_muon, dtype):
        for out, back, said_out, said_back in found:
            assert (out, back) == (said_out, said_back)
