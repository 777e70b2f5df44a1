"""What the ranks of the distributed tests run: models cut in many ways, beside the same model in one piece."""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import optimisers as opt
from optimisers.errors import GatherWarning
from table import ROWS

SHAPES = {"matrix": (6, 5), "vector": (5,), "wide": (7, 3), "row": (1, 8), "large": (64, 80), "cube": (4, 3, 2)}

# name: (shape of the mesh for so many ranks, placements by name of the array)
LAYOUTS = {
    "fsdp": (lambda n: (n,), lambda _: [Shard(0)]),
    "columns": (lambda n: (n,), lambda name: [Replicate() if name == "vector" else Shard(len(SHAPES[name]) - 1)]),
    "replicated": (lambda n: (n,), lambda _: [Replicate()]),
    "hsdp": (lambda n: (2, n // 2), lambda _: [Replicate(), Shard(0)]),
    "fsdp+columns": (lambda n: (2, n // 2), lambda name: [Shard(0), Replicate() if name == "vector" else Shard(1)]),
    "fsdp+rows": (lambda n: (2, n // 2), lambda _: [_StridedShard(0, split_factor=2), Shard(0)]),
}


def layout(name):
    """A function that cuts an array by its name."""
    mesh_shape, placements = LAYOUTS[name]
    mesh = init_device_mesh("cpu", mesh_shape(dist.get_world_size()))
    return lambda key, x: distribute_tensor(x, mesh, placements(key.removeprefix("tied ")), src_data_rank=None)


def arrays(seed, dtype, min_ndim=0):
    torch.manual_seed(seed)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items() if len(shape) >= min_ndim}


def model_of(found, cut=None):
    """The arrays as a model with a tie and a frozen array, cut or in one piece."""
    tree = {name: x.clone() if cut is None else cut(name, x.clone()) for name, x in found.items()}
    tree["frozen"] = tree["matrix"].clone()
    return {**tree, "tied matrix": tree["matrix"]}


@cache
def gradients(step, dtype, min_ndim, cut=None):
    """The gradients of a step; some are absent. Steps do not write them."""
    found = arrays(1000 + step, dtype, min_ndim)
    grads = {name: x if cut is None else cut(name, x) for name, x in found.items()}
    grads = {**grads, "frozen": None, "tied matrix": None}
    if step % 3 == 1:
        grads["wide"] = None
    if step % 4 == 2:
        grads["tied matrix"] = grads["matrix"] * 0.5
    return grads


def trajectory(rule, cut, dtype, min_ndim, steps):
    """The model after so many steps of either kind, with a change of the learning rate on the way."""
    model = model_of(arrays(0, dtype, min_ndim), cut)
    state = opt.setup(rule, model, trainable=lambda p: p.path != "frozen")
    for step in range(steps):
        verb = opt.update_ if step % 2 else opt.update
        state, model = verb(state, model, gradients(step, dtype, min_ndim, cut))
        if step == steps // 2 and opt.hyper(state):
            state = _adjusted(state)
    return state, model


def _adjusted(state):
    try:
        return opt.adjust(state, 0.003)
    except opt.errors.OptimisersError:  # a rule without a learning rate
        return state


def worst(found, expected):
    """The largest difference, relative to the largest element."""
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def part_worst(part, expected):
    """The largest difference of this rank's part of an array, relative to the largest element of the whole."""
    of_whole = distribute_tensor(expected, part.device_mesh, part.placements, src_data_rank=None).to_local().double()
    difference = (part.to_local().double() - of_whole).abs().amax() if of_whole.numel() else 0
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def compared(rule, cut, dtype, min_ndim, steps, alone):
    """The largest difference of this rank's parts to the model of one process."""
    state, parts = trajectory(rule, cut, dtype, min_ndim, steps)
    start = arrays(0, dtype, min_ndim)
    assert all(isinstance(x, DTensor) for x in parts.values())
    assert parts["tied matrix"] is parts["matrix"]
    leaves = torch.utils._pytree.tree_leaves(state)
    for leaf in leaves:
        assert not isinstance(leaf, DTensor) or tuple(leaf.shape) in {tuple(x.shape) for x in start.values()}
    return max(part_worst(x, alone[name]) for name, x in parts.items())


def references(cases, dtype, steps):
    """What one process makes of each case; every rank steps some of them, and all are told."""
    rank, count = dist.get_rank(), dist.get_world_size()
    mine = [trajectory(rule, None, dtype, min_ndim, steps)[1] for rule, min_ndim in cases[rank::count]]
    found = [None] * count
    dist.all_gather_object(found, mine)
    return [found[i % count][i // count] for i in range(len(cases))]


def run_table(name, dtype, steps, first_only, slack):
    """(rule, largest difference) of the rules of the table whose parts here differ from one process's by more than they may."""
    cut, dtype = layout(name), getattr(torch, dtype)
    rows = [row for row in ROWS if str(dtype).removeprefix("torch.") not in row.refuses]
    cases = [(rule, row.min_ndim) for row in rows for rule in row.configs[: 1 if first_only else None]]
    failed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GatherWarning)
        for (rule, min_ndim), alone in zip(cases, references(cases, dtype, steps), strict=True):
            try:
                difference = compared(rule, cut, dtype, min_ndim, steps, alone)
            except Exception as error:
                error.add_note(f"under {rule!r}")
                raise
            if not difference <= (0 if rule.law == "elementwise" else slack):
                failed.append((repr(rule), difference))
    return failed
