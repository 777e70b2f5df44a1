"""What the ranks of the distributed tests run: checkpoints, and the rest of the library on arrays that are cut over ranks."""

from __future__ import annotations

import copy
import io
import os
import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import optimisers as opt
from optimisers.errors import GatherWarning
from optimisers.torch import Optimizer
from sharded import worst
from sharded_models import RULES, backward, net, whole

RULE = opt.OptimiserChain(opt.ClipNorm(0.5), opt.Muon(eta=0.02), opt.NormGrowthCap(1.01))


def sharded_net():
    module = net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def quietly():
    warnings.simplefilter("ignore", GatherWarning)
    warnings.simplefilter("ignore", FutureWarning)  # of torch's own collectives
    warnings.simplefilter("ignore", UserWarning)


def steps(optimizer, module, first, last):
    for step in range(first, last):
        backward(module, step)
        optimizer.step()


def expected(rule, last):
    module = net()
    steps(Optimizer(rule, module), module, 0, last)
    return [p.detach() for p in module.parameters()]


def save_with_dcp(directory, name, flat):
    """Three steps, saved with the model by torch's own distributed checkpoint."""
    with warnings.catch_warnings():
        quietly()
        module = sharded_net()
        optimizer = Optimizer(RULES[name], module)
        steps(optimizer, module, 0, 3)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        dcp.save(
            {"model": module.state_dict(), "optim": get_optimizer_state_dict(module, optimizer, options=options)},
            checkpoint_id=directory,
        )


def load_with_dcp(directory, name, flat):
    """The difference to one process after three more steps, from what another number of ranks has saved."""
    with warnings.catch_warnings():
        quietly()
        module = sharded_net()
        optimizer = Optimizer(RULES[name], module)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        found = {"model": module.state_dict(), "optim": get_optimizer_state_dict(module, optimizer, options=options)}
        dcp.load(found, checkpoint_id=directory)
        module.load_state_dict(found["model"])
        set_optimizer_state_dict(module, optimizer, found["optim"], options=options)
        steps(optimizer, module, 3, 6)
        return max(worst(whole(q), p) for p, q in zip(expected(RULES[name], 6), module.parameters(), strict=True))


# --- opt.save -----------------------------------------------------------------------------------------------------------------


def trained(rule, last=3, module=None):
    module = sharded_net() if module is None else module
    state = opt.setup(rule, module)
    for step in range(last):
        backward(module, step)
        state, _ = opt.update_(state, module)
    return state, module


def save_file(path, name):
    """A state cut over ranks as a file, and the model whole."""
    with warnings.catch_warnings():
        quietly()
        state, module = trained(RULES[name])
        opt.save(path, state)
        assert opt.load(path, like=module) == state
        return {n: whole(p) for n, p in module.named_parameters()}


def load_file(path, name, model):
    with warnings.catch_warnings():
        quietly()
        module = sharded_net()
        with torch.no_grad():
            for n, p in module.named_parameters():
                p.copy_(distribute_tensor(model[n], p.device_mesh, p.placements, src_data_rank=None))
        state = opt.load(path, like=module)
        leaves = torch.utils._pytree.tree_leaves(state)
        assert any(isinstance(leaf, DTensor) for leaf in leaves)
        for step in range(3, 6):
            backward(module, step)
            state, _ = opt.update_(state, module)
        return max(worst(whole(q), p) for p, q in zip(expected(RULES[name], 6), module.parameters(), strict=True))


def save_where_nobody_can(path):
    """The error that every rank sees where the one that writes cannot."""
    state, _ = trained(RULES["AdamW"], 1)
    try:
        opt.save(path, state)
    except (OSError, opt.errors.CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def die_while_saving(path, victim):
    """Save once; then again, further on, and one rank dies when it is asked for its second tensor."""
    state, module = trained(RULES["AdamW"], 1)
    opt.save(path, state)
    backward(module, 1)
    state, _ = opt.update_(state, module)
    if dist.get_rank() == victim:
        from optimisers.interop import _together

        whole_of, asked = _together.whole, []

        def dying(x):
            asked.append(x)
            if len(asked) == 2:
                os._exit(7)
            return whole_of(x)

        _together.whole = dying
    opt.save(path, state)


# --- the rest of the library ------------------------------------------------------------------------------------------------


def the_rest():
    """Verbs on a state that is cut over ranks, beside those on one that is not."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    raw = {"a": torch.randn(6, 5), "b": torch.randn(5), "c": torch.randn(7, 3)}
    cut = {k: distribute_tensor(v.clone(), mesh, [Shard(0)], src_data_rank=None) for k, v in raw.items()}
    grads = {k: v * 0.1 for k, v in raw.items()}, {k: v * 0.1 for k, v in cut.items()}
    rule = opt.Averaged(opt.OptimiserChain(opt.ClipNorm(0.1), opt.AdamW(0.1)))
    (alone, x), (state, y) = (opt.update(opt.setup(rule, m), m, g) for m, g in zip((raw, cut), grads, strict=True))
    assert "of it on this rank" in repr(state)
    assert "on this rank" not in repr(alone)
    assert repr(opt.summary(state)) == repr(opt.summary(alone))
    assert opt.metrics(state, y, grads[1]) == opt.metrics(alone, x, grads[0])
    averages = opt.averaged(alone, x), opt.averaged(state, y)
    assert all(torch.equal(averages[1][k].full_tensor(), averages[0][k]) for k in raw)
    perturbed = opt.ascend(x, grads[0]), opt.ascend(y, grads[1])
    assert all(torch.allclose(perturbed[1][k].full_tensor(), perturbed[0][k], rtol=1e-6) for k in raw)
    assert copy.deepcopy(state) == state
    assert_pickled(state, y, grads[1])
    assert opt.to(state, dtype="float64")["a"].state[0].dtype == torch.float64
    assert str(opt.estimate(rule, cut)) == str(opt.estimate(rule, raw))
    frozen = opt.freeze(state, where="a")
    _, after = opt.update(frozen, y, grads[1])
    assert torch.equal(after["a"].to_local(), y["a"].to_local())
    more = {**y, "d": cut["a"] * 2}
    longer = opt.extend(state, more)
    assert isinstance(torch.utils._pytree.tree_leaves(longer["d"].state)[0], DTensor)
    opt.update(longer, more, {**grads[1], "d": grads[1]["a"]})
    leaf = {k: v.clone().requires_grad_() for k, v in grads[1].items()}
    _, differentiable = opt.update(state, y, leaf)
    differentiable["b"].to_local().sum().backward()
    assert leaf["b"].grad is not None
    try:
        opt.destructure(cut)
    except opt.errors.ModelError as error:
        return str(error)
    return "nothing raised"


def assert_pickled(state, model, grads):
    """A pickle of this rank's parts, and what torch.save makes of them, continue as the state does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    _, expected = opt.update(state, model, grads)
    for found in (pickle.loads(pickle.dumps(state)), torch.load(file, weights_only=False)):
        assert found == state
        _, continued = opt.update(found, model, grads)
        assert all(torch.equal(continued[k].to_local(), x.to_local()) for k, x in expected.items())


def a_gradient_through_what_was_written():
    """What autograd says of a DTensor that a graph holds, and that a step in place has written."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None))
    loss = (w * w).sum()
    opt.update_(opt.setup(opt.Descent(0.1), {"w": w}), {"w": w}, {"w": w.detach() * 1})
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "nothing raised"


def one_norm_over_all_kinds():
    """DTensors, tensors and NumPy arrays under one global norm."""
    import numpy as np

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rule = opt.OptimiserChain(opt.ClipGlobalNorm(0.1), opt.Descent(1.0))
    whole_model = {"cut": torch.ones(5, 2), "tensor": torch.ones(4), "array": np.ones(3)}
    model = {**whole_model, "cut": distribute_tensor(whole_model["cut"], mesh, [Shard(0)], src_data_rank=None)}
    _, alone = opt.update(opt.setup(rule, whole_model), whole_model, whole_model)
    _, several = opt.update(opt.setup(rule, model), model, model)
    return (
        worst(several["cut"].full_tensor(), alone["cut"]),
        worst(several["tensor"], alone["tensor"]),
        float(np.abs(several["array"] - alone["array"]).max()),
    )


def exists(path):
    return Path(path).exists()
