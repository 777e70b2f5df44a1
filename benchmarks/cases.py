"""What is measured. A case is a name and a function from the settings to lines of the table.

Cases whose names begin alike, up to the slash, share a process.
"""

import functools
from collections.abc import Callable

import torch

import ours
import peers
from floor import floor
from measuring import Pair, Row, Settings, compare
from problems import gpt2, many, mlp, size, tiny

CASES: dict[str, Callable[[Settings], list[Row]]] = {}
NOT_QUICK: set[str] = set()  # what --quick leaves out unless it is asked for by name


def case(name: str, *, quick: bool = True):
    def add(function):
        CASES[name] = function
        if not quick:
            NOT_QUICK.add(name)
        return function

    return add


def of(what: str, ours: str, peer: str, bound: float | None = None) -> Pair:
    return Pair(what, ours, peer, bound)


@functools.cache
def gpt2_arrays():
    return peers.tensors(gpt2(), 0), peers.tensors(gpt2(), 1)


def gpt2_copy():
    """A model of its own, so that no case sees what another did to it; gradients are written to by nobody."""
    model, grads = gpt2_arrays()
    return peers.copied(model), grads


OURS, PURE = "update_", "update"
FUSED, FOREACH = "torch fused", "torch foreach"
OPTAX = "optax, jit, donated"


@case("gpt2/adamw")
def gpt2_adamw(settings):
    model, grads = gpt2_copy()
    what = "GPT-2, AdamW"
    sides = {
        OURS: lambda: ours.in_place(ours.adamw(), model, grads),
        FUSED: lambda: peers.torch_adamw(model, grads, fused=True),
        OPTAX: lambda: peers.by_optax(peers.optax_adamw(), model, grads),
        "the floor": lambda: floor(size(gpt2()), torch.get_num_threads()),
    }
    pairs = [of(what, OURS, FUSED, 1.10), of(what, OURS, OPTAX, 0.75), of(what, OURS, "the floor")]
    return compare("gpt2/adamw", sides, pairs, settings)


@case("gpt2/chain")
def gpt2_chain(settings):
    model, grads = gpt2_copy()
    what = "GPT-2, ClipGrad, SignDecay, WeightDecay, AdamW in a chain"
    sides = {
        OURS: lambda: ours.in_place(ours.chain(), model, grads),
        "torch fused AdamW alone": lambda: peers.torch_adamw(model, grads, fused=True),
        OPTAX: lambda: peers.by_optax(peers.optax_chain(), model, grads),
    }
    pairs = [of(what, OURS, "torch fused AdamW alone", 1.3), of(what, OURS, OPTAX, 0.7)]
    return compare("gpt2/chain", sides, pairs, settings)


@case("gpt2/norms")
def gpt2_norms(settings):
    model, grads = gpt2_copy()
    each, together, clipped = "update_, ClipNorm", "update_, ClipGlobalNorm", "torch clip_grad_norm_, fused AdamW"
    sides = {
        each: lambda: ours.in_place(ours.clip_norm(), model, grads),
        together: lambda: ours.in_place(ours.clip_global_norm(), model, grads),
        clipped: lambda: peers.torch_clipped(model, grads),
    }
    pairs = [
        of("GPT-2, ClipNorm for each leaf, then AdamW", each, clipped, 0.85),
        of("GPT-2, ClipGlobalNorm, then AdamW", together, clipped, 0.85),
    ]
    return compare("gpt2/norms", sides, pairs, settings)


@case("gpt2/pure")
def gpt2_pure(settings):
    model, grads = gpt2_copy()
    what = "GPT-2, AdamW, steady state"
    torchopt = "TorchOpt, functional"
    sides = {
        PURE: lambda: ours.pure(ours.adamw(), model, grads),
        OURS: lambda: ours.in_place(ours.adamw(), peers.copied(model), grads),
        torchopt: lambda: peers.torchopt_adamw(model, grads),
    }
    return compare("gpt2/pure", sides, [of(what, PURE, OURS, 1.8), of(what, PURE, torchopt, 0.2)], settings)


@case("gpt2/foreach")
def gpt2_foreach(settings):
    model, grads = gpt2_copy()
    sides = {
        OURS: lambda: ours.in_place(ours.adamw(), model, grads),
        FOREACH: lambda: peers.torch_adamw(model, grads, foreach=True),
    }
    return compare("gpt2/foreach", sides, [of("GPT-2, AdamW", OURS, FOREACH)], settings)


@case("gpt2/heavyball", quick=False)  # it compiles for about a minute
def gpt2_heavyball(settings):
    model, grads = gpt2_copy()
    sides = {
        OURS: lambda: ours.in_place(ours.adamw(), model, grads),
        "HeavyBall": lambda: peers.heavyball_adamw(model, grads),
    }
    return compare("gpt2/heavyball", sides, [of("GPT-2, AdamW", OURS, "HeavyBall")], settings)


@case("leaves/2000")
def leaves_2000(settings):
    model, grads = peers.tensors(many(), 0), peers.tensors(many(), 1)
    what = "2,000 leaves of 64x64 and 64, AdamW"
    sides = {
        OURS: lambda: ours.in_place(ours.adamw(), model, grads),
        PURE: lambda: ours.pure(ours.adamw(), model, grads),
        FUSED: lambda: peers.torch_adamw(model, grads, fused=True),
        FOREACH: lambda: peers.torch_adamw(model, grads, foreach=True),
    }
    pairs = [of(what, OURS, FUSED, 0.6), of(what, PURE, FUSED, 0.8), of(what, OURS, FOREACH)]
    return compare("leaves/2000", sides, pairs, settings)


@case("leaves/scheduled")
def leaves_scheduled(settings):
    model, grads = peers.tensors(many(), 0), peers.tensors(many(), 1)
    what = "2,000 leaves of 64x64 and 64, AdamW, a learning rate for each step"
    adjusted, adapter, scheduled = "adjust, update_", "adapter, LambdaLR", "torch fused, LambdaLR"
    sides = {
        adjusted: lambda: ours.adjusted(ours.adamw(), model, grads),
        OURS: lambda: ours.in_place(ours.adamw(), model, grads),
        adapter: lambda: peers.adapter_scheduled(model, grads),
        scheduled: lambda: peers.torch_scheduled(model, grads),
    }
    pairs = [of(what, adjusted, OURS, 1.15), of(what, adapter, scheduled, 1.1)]
    return compare("leaves/scheduled", sides, pairs, settings)


@case("leaves/6")
def leaves_6(settings):
    model, grads = peers.tensors(mlp(), 0), peers.tensors(mlp(), 1)
    what = "A network of 6 leaves, AdamW"
    sides = {
        OURS: lambda: ours.in_place(ours.adamw(), model, grads),
        FUSED: lambda: peers.torch_adamw(model, grads, fused=True),
        FOREACH: lambda: peers.torch_adamw(model, grads, foreach=True),
        OPTAX: lambda: peers.by_optax(peers.optax_adamw(), model, grads),
    }
    pairs = [of(what, OURS, FUSED, 1.5), of(what, OURS, FOREACH), of(what, OURS, OPTAX)]
    return compare("leaves/6", sides, pairs, settings)


@case("leaves/tiny")
def leaves_tiny(settings):
    model, grads = peers.tensors(tiny(), 0), peers.tensors(tiny(), 1)
    what = "6 leaves of 32x32 and 32, AdamW"
    sides = {
        OURS: lambda: ours.in_place(ours.adamw(), model, grads),
        PURE: lambda: ours.pure(ours.adamw(), model, grads),
        FUSED: lambda: peers.torch_adamw(model, grads, fused=True),
    }
    # Programs of so few elements are compiled after some steps.
    return compare("leaves/tiny", sides, [of(what, OURS, FUSED, 1.5), of(what, PURE, FUSED, 2.0)], settings, warm_up=100)
