"""Rules with more state or more passes than AdamW over GPT-2's arrays, beside AdamW; and Muon's kin over its matrices.

What a rule may cost is its bytes' share: what a step reads and writes of each parameter beside the 28 bytes of AdamW's, and
15 % more. A rule that measures first reads what the measure is made of twice.
"""

from functools import partial
from typing import NamedTuple

import optimisers as opt
import ours
import peers
from cases import OURS, case, gpt2_copy, of
from measuring import compare
from problems import PROBLEMS

ADAMW_BYTES = 28
SLACK = 1.15


class Cost(NamedTuple):
    """A rule, and the bytes that a step moves for each parameter in float32."""

    rule: opt.AbstractRule
    bytes: int


COSTS = {
    "AdEMAMix": Cost(opt.AdEMAMix(1e-3, lambda_=0.1), 36),  # three moments
    "Adan": Cost(opt.Adan(1e-3, lambda_=0.1), 44),  # three moments and the last gradient
    "Adopt": Cost(opt.Adopt(1e-3, lambda_=0.1), 28),
    "ScheduleFree(AdamW)": Cost(opt.ScheduleFree(opt.AdamW(1e-3, (0.0, 0.999), 0.1)), 36),  # two moments, and z
    "Cautious(AdamW)": Cost(opt.Cautious(opt.AdamW(1e-3, lambda_=0.1)), 36),  # the share is counted from mean and gradient
}


def measure(name, cost, settings):
    model, grads = gpt2_copy()
    adamw = "update_, AdamW"
    sides = {
        OURS: lambda: ours.in_place(cost.rule, model, grads),
        adamw: lambda: ours.in_place(ours.adamw(), peers.copied(model), grads),
    }
    pairs = [of(f"GPT-2, {name}", OURS, adamw, SLACK * cost.bytes / ADAMW_BYTES)]
    return compare(f"wave/{name}", sides, pairs, settings)


for _name, _cost in COSTS.items():
    case(f"wave/{_name}", quick=False)(partial(measure, _name, _cost))


@case("wave/Lamb", quick=False)  # the peer takes seconds for a step
def lamb(settings):
    model, grads = gpt2_copy()
    sides = {
        OURS: lambda: ours.in_place(opt.Lamb(1e-3, lambda_=0.1), model, grads),
        "pytorch_optimizer": lambda: peers.by_pytorch_optimizer(
            "Lamb", peers.copied(model), peers.copied(grads), lr=1e-3, weight_decay=0.1
        ),
    }
    return compare("wave/Lamb", sides, [of("GPT-2, Lamb", OURS, "pytorch_optimizer", 0.6)], settings, warm_up=1)


@case("kin/transformer_matrices", quick=False)
def kin(settings):
    """For information: what is done besides the iteration, or in its place."""
    model, grads = (peers.tensors(PROBLEMS["transformer_matrices"](), seed) for seed in (0, 1))
    muon = "update_, Muon"
    rules = {"NorMuon": opt.NorMuon(), "AdaMuon": opt.AdaMuon(), "Scion": opt.Scion(), "Dion": opt.Dion()}
    sides = {name: partial(ours.in_place, rule, peers.copied(model), grads) for name, rule in rules.items()}
    sides[muon] = lambda: ours.in_place(opt.Muon(), model, grads)
    what = "6 x (1152x384, 384x384, 1536x384, 384x1536)"
    return compare("kin/transformer_matrices", sides, [of(f"{name}, {what}", name, muon) for name in rules], settings)
