"""The source of the kernels of every program of the rule table."""

import itertools
import os
from collections import defaultdict
from unittest import mock

import torch

import optimisers as opt
from optimisers.engine.groups import group
from optimisers.engine.kernels.cuda.combine import combining
from optimisers.engine.kernels.cuda.source import source
from table import cases

SHAPES = ((6, 5, 4), (3, 2, 2))


def texts(*dtypes):
    """The text of each program, by rule and dtype, and of three that combine norms."""
    found = {}
    for (name, row, rule), dtype in itertools.product(cases(), dtypes):
        with mock.patch.dict(os.environ, OPTIMISERS_COMPILE="0"), mock.patch.object(group, "_variants", defaultdict(list)):
            model = {str(i): torch.ones(shape, dtype=dtype) for i, shape in enumerate(SHAPES)}
            if row.law == "none" or str(dtype).removeprefix("torch.") in row.refuses:
                continue
            state = opt.setup(rule, model)
            for _ in range(2):
                state, model = opt.update(state, model, model)
            for key, variants in group._variants.items():
                scalars = [f"c{i}" for i, part in enumerate(key[2]) if part.form == "scalar"]
                for variant in variants:
                    label = f"{name}-{str(dtype).removeprefix('torch.')}"
                    found.setdefault(source(variant.program, scalars).text, label)
    for rule in (opt.ClipGlobalNorm(), opt.ClipGlobalNorm(p=3.0), opt.ClipGlobalNorm(p=float("inf"))):
        found[combining(rule, [2], 3, [0])] = f"combining-{rule.p}"
    return [(label, text) for text, label in found.items()]
