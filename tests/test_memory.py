"""A pure step changes nothing that anybody holds, and uses memory again that nobody does."""

import copy
import os
import subprocess
import sys
import threading

import numpy as np
import optree
import pytest
import torch

import optimisers as opt
from looped import Counter, address, arrays, raw

LIBRARIES = pytest.mark.parametrize("lib", ["numpy", "torch"])
RULE = opt.OptimiserChain(opt.ClipNorm(100.0), opt.AdamW(0.1, lambda_=0.01))


@pytest.fixture(autouse=True)
def _loops(switch):
    switch("1")


class Keeper:
    """Things that somebody holds, with what they were."""

    def __init__(self):
        self.kept = []

    def __call__(self, *things):
        self.kept += [(thing, raw(thing)) for thing in things]

    def check(self):
        for thing, before in self.kept:
            assert raw(thing) == before


# --- pure steps --------------------------------------------------------------------------------------------------------------

HELD = {
    "models": lambda state, model: [model],
    "one parameter": lambda state, model: [model["large"]],
    "states": lambda state, model: [state],
    "slices": lambda state, model: [model["large"][3:9], model["matrix"][1:, 2:3], model["small"][::7], model["tiny"][0]],
    "state arrays": lambda state, model: [state["large"].state[1][0], state["small"].state[1][1]],
    "slices of state arrays": lambda state, model: [state["matrix"].state[1][0][:, 1], state["tiny"].state[1][1][1:]],
    "pytree leaves": lambda state, model: optree.tree_leaves(state),
    "deep copies": lambda state, model: [copy.deepcopy(state), copy.deepcopy(model)],
    "mapped states": lambda state, model: [optree.tree_map(lambda x: x, state)],
    "adjusted states": lambda state, model: [opt.adjust(state, 0.3)],
}
OF_TENSORS = {
    "NumPy views": lambda state, model: [model["large"].numpy(), state["small"].state[1][0].numpy()],
    "storages": lambda state, model: [Storage(model["large"]), Storage(state["large"].state[1][0])],
    "detached": lambda state, model: [model["large"].detach(), model["tiny"].view(-1)],
    "exchanged": lambda state, model: [np.from_dlpack(model["large"])],
}


class Storage:
    """A storage alone, without any tensor."""

    def __init__(self, x):
        self.storage = x.untyped_storage()


optree.register_pytree_node(
    Storage,
    lambda s: ((torch.empty(0, dtype=torch.float64).set_(s.storage),), None, None),
    lambda _, children: None,
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


@pytest.mark.parametrize(
    ("lib", "what"), [*(("numpy", w) for w in HELD), *(("torch", w) for w in HELD), *(("torch", w) for w in OF_TENSORS)]
)
def test_what_is_held_keeps_its_bytes(lib, what, monkeypatch):
    counter, keeper, take = Counter(monkeypatch), Keeper(), (HELD | OF_TENSORS)[what]
    model = arrays(lib)
    state = opt.setup(RULE, model)
    for step in range(9):
        grads = arrays(lib, step)
        if step % 3 == 1:
            grads["large"] = grads["tiny"] = None
        keeper(grads)
        state, model = opt.update(state, model, grads)
        if step not in {4, 5}:
            keeper(*take(state, model))
    keeper.check()
    assert counter.runs >= 9


def test_saved_parameters_of_graphs_keep_their_bytes():
    model = {key: x.requires_grad_() for key, x in arrays("torch").items()}
    state = opt.setup(RULE, model)
    losses, expected, leaves = [], [], []
    for step in range(8):
        losses.append(sum((x**3).sum() for x in model.values()))
        expected.append({key: 3 * x.detach() ** 2 for key, x in model.items()})
        leaves.append(list(model.values()))
        state, model = opt.update(state, model, arrays("torch", step))
    for loss, right, inputs in zip(losses, expected, leaves, strict=True):
        for found, key in zip(torch.autograd.grad(loss, inputs), right, strict=True):
            torch.testing.assert_close(found, right[key], rtol=1e-15, atol=0)


@LIBRARIES
def test_memory_is_used_again(lib):
    model = arrays(lib)
    state = opt.setup(RULE, model)
    seen = {key: [] for key in ("large", "matrix", "m", "small m")}
    for step in range(12):
        state, model = opt.update(state, model, arrays(lib, step))
        for key, x in (
            ("large", model["large"]), ("matrix", model["matrix"]), ("m", state["large"].state[1][0]),
            ("small m", state["small"].state[1][0]),
        ):  # fmt: skip
            seen[key].append(address(x))
            del x
    for found in seen.values():
        assert len(set(found[4:])) == 2
        assert found[4:-2] == found[6:]


@LIBRARIES
def test_two_lines_from_one_state_do_not_meet(lib):
    model = arrays(lib)
    state = opt.setup(RULE, model)
    for step in range(3):
        state, model = opt.update(state, model, arrays(lib, step))
    lines = [(opt.adjust(state, eta), model) for eta in (0.1, 0.2)]
    alone = [opt.update(*line, arrays(lib, 9)) for line in lines]
    expected = [raw(line) for line in alone]
    for _ in range(4):
        lines = [opt.update(*line, arrays(lib, 9)) for line in lines]
    assert [raw(line) for line in alone] == expected


def run(lib, seed, steps=8):
    model = arrays(lib, seed)
    state = opt.setup(RULE, model)
    for step in range(steps):
        state, model = opt.update(state, model, arrays(lib, seed + step))
    return raw([state, model])


@LIBRARIES
def test_threads_step_states_of_their_own(lib):
    expected = [run(lib, seed) for seed in range(4)]
    found = [None] * 4

    def work(seed):
        found[seed] = run(lib, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


FORKING = """
import multiprocessing
import sys
import numpy as np
import optimisers as opt

def step(queue, state, model):
    for _ in range(3):
        state, model = opt.update(state, model, model)
    queue.put(np.asarray(model)[::100000].tobytes())

model = np.ones(2**19, np.float32)  # large enough for threads, which a child does not have
if "torch" in sys.argv:
    import torch
    model = torch.from_numpy(model)
state = opt.setup(opt.Adam(), model)
state, model = opt.update(state, model, model)
queue = multiprocessing.get_context("fork").SimpleQueue()
child = multiprocessing.get_context("fork").Process(target=step, args=(queue, state, model))
child.start()
found = queue.get()
child.join(60)
step(queue, state, model)
assert child.exitcode == 0 and queue.get() == found
"""


@pytest.mark.parametrize("lib", ["numpy", "torch"])
def test_a_forked_process_steps_on(lib):
    # In a process of its own: libraries that other tests import warn of any fork.
    subprocess.run([sys.executable, "-c", FORKING, lib], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=120)


@pytest.mark.parametrize("update", [opt.update, opt.update_])
def test_memory_that_moves_to_other_processes_is_followed(update):
    """torch moves the memory of a tensor when it is sent to another process; one that has it keeps what it was sent."""
    found, keeper = [], Keeper()
    for moves in (False, True):
        model = arrays("torch")
        state = opt.setup(RULE, model)
        for step in range(8):
            state, model = update(state, model, arrays("torch", step))
            if moves and step == 3:
                for x in (state["large"].state[1][0], state["tiny"].state[1][1], model["matrix"]):
                    before = x.data_ptr()
                    x.share_memory_()
                    assert x.data_ptr() != before
                    if update is opt.update:  # as another process would see it, of which nobody here counts references
                        name = x.untyped_storage()._share_fd_cpu_()
                        keeper(torch.empty(0, dtype=x.dtype).set_(torch.UntypedStorage._new_shared_fd_cpu(*name)))
        found.append(raw([state, model]))
    assert found[0] == found[1]
    keeper.check()
