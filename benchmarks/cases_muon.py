"""Muon over matrices of three kinds."""

import dataclasses
from functools import partial

import torch

import optimisers as opt
import ours
import peers
from cases import OPTAX, OURS, case, of
from measuring import WARM_UP, compare
from problems import PROBLEMS, small_matrices, small_vectors

TORCH = "torch.optim.Muon"


def optax_muon(model, grads):
    import optax.contrib

    return peers.by_optax(optax.contrib.muon(0.02), model, grads)


def measure(problem, what, settings, *, bounds, repetitions=None):
    model, grads = (peers.tensors(PROBLEMS[problem](), seed) for seed in (0, 1))
    makers = {TORCH: lambda: peers.by_torch(torch.optim.Muon, model, grads, lr=0.02), OPTAX: lambda: optax_muon(model, grads)}
    sides = {OURS: lambda: ours.in_place(opt.Muon(), model, grads)} | {peer: makers[peer] for peer in bounds}
    pairs = [of(what, OURS, peer, bound) for peer, bound in bounds.items()]
    if TORCH in bounds:
        # torch always computes in bfloat16, quickly or very slowly as the processor has it or not; ours is told to as well.
        half = opt.Muon.preset("torch", ns=opt.NewtonSchulz(normaliser="clamp", dtype="bfloat16"))
        sides["update_, bfloat16"] = lambda: ours.in_place(half, model, grads)
        pairs.append(of(what, "update_, bfloat16", TORCH))
    if repetitions:
        settings = dataclasses.replace(settings, rounds=repetitions, least=repetitions)
    # torch's Muon may take many seconds for a step here, so where it takes part one step is warming up enough.
    return compare(f"muon/{problem}", sides, pairs, settings, warm_up=1 if TORCH in bounds else WARM_UP)


for _problem, _what, _bounds, _repetitions in (
    ("transformer_matrices", "Muon, 6 x (1152x384, 384x384, 1536x384, 384x1536)", {TORCH: 0.05, OPTAX: 0.6}, 3),
    ("square_matrices", "Muon, 200 of 128x128", {OPTAX: 0.6}, None),
    ("long_matrices", "Muon, 4 of 256x4096", {OPTAX: 0.22}, None),
):
    case(f"muon/{_problem}")(partial(measure, _problem, _what, bounds=_bounds, repetitions=_repetitions))


@case("muon/route")
def route(settings):
    """Vectors under AdamW beside matrices under Muon."""
    routed = opt.Route((lambda p: p.ndim >= 2, opt.Muon()), otherwise=ours.adamw())
    both, matrices = (
        [peers.tensors(shapes, seed) for seed in (0, 1)] for shapes in (small_matrices() | small_vectors(), small_matrices())
    )
    alone = "the matrices alone"
    sides = {OURS: lambda: ours.in_place(routed, *both), alone: lambda: ours.in_place(opt.Muon(), *matrices)}
    what = "Muon, 50 matrices of at most 64x16, AdamW, 98 vectors, by a route"
    return compare("muon/route", sides, [of(what, OURS, alone, 1.3)], settings, warm_up=100)
