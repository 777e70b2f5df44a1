"""SOAP over the matrices of a small transformer: ten steps, of which one renews the bases."""

import dataclasses

import optimisers as opt
import ours
import peers
from cases import OURS, case, of
from measuring import compare
from problems import PROBLEMS

PEER = "pytorch_optimizer"
STEPS = 10


def ten(step):
    """What decomposes statistics for the first time is not measured."""
    step()

    def steps():
        for _ in range(STEPS):
            step()

    return steps


@case("soap/transformer_matrices", quick=False)
def soap(settings):
    model, grads = (peers.tensors(PROBLEMS["transformer_matrices"](), seed) for seed in (0, 1))
    sides = {
        OURS: lambda: ten(ours.in_place(opt.SOAP(1e-3, refresh=STEPS), model, grads)),
        PEER: lambda: ten(peers.by_pytorch_optimizer("SOAP", model, grads, lr=1e-3, precondition_frequency=STEPS)),
    }
    pairs = [of("SOAP, 6 x (1152x384, 384x384, 1536x384, 384x1536), 10 steps", OURS, PEER, 0.5)]
    settings = dataclasses.replace(settings, rounds=3, least=3)
    return compare("soap/transformer_matrices", sides, pairs, settings, warm_up=1)
