"""The library against trajectories recorded from other packages (tests/golden/README.md): which settings of ours are theirs.

The table below is that of docs/conventions.md, which a test compares with it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import optimisers as opt
from golden_data import made, numpy_of
from golden_peers import recorded, sources
from running import run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conventions.md"
CLOSE = 1e-10
"""How far a float64 trajectory may be off, relative to the greatest element."""
NARROW = 1e-6
"""The same where the source computes a number in float32."""
COARSE = 2e-3
"""The same where the source iterates in bfloat16, of which the last bit is 4e-3: of steps that are a hundredth of the array."""


class Ours(NamedTuple):
    """The setting that gives what a source gives ("" if none does), how closely in float64, and what to know about it."""

    rule: str
    note: str = ""
    within: float = CLOSE
    vectors: str = ""
    """The setting for arrays of fewer than two dimensions, where it is another."""
    most: int = 9
    """How many dimensions an array may have for the two to agree."""
    free: tuple[tuple[int, ...], ...] = ()
    """Shapes for which a decomposition is not determined: another test sees to them."""
    rough: tuple[tuple[int, ...], ...] = ()
    """Shapes for which rounding leaves of zeros what epsilon does not hide: float32 says nothing, and a departure 1e-5."""


MUON = "orthogonalises in bfloat16"
LAMB = "decays before the step, not in it; corrects only the mean, after the ratio is taken; limits the array's norm to 10"
CONVENTIONS = {
    "pytorch_optimizer==4.1.0 AdEMAMix(lr=0.01)": Ours("AdEMAMix(0.01)"),
    "pytorch_optimizer==4.1.0 AdEMAMix(lr=0.02, betas=(0.8, 0.95, 0.99), alpha=2.0, weight_decay=0.1, weight_decouple=True, "
    "t_alpha_beta3=8.0)": Ours("AdEMAMix(0.02, (0.8, 0.95, 0.99), 0.1, alpha=2.0, warmup=8)"),
    "optax==0.2.8 contrib.ademamix(learning_rate=0.01)": Ours("AdEMAMix(0.01)"),
    "pytorch_optimizer==4.1.0 Adan(lr=0.01)": Ours("Adan(0.01)"),
    "pytorch_optimizer==4.1.0 Adan(lr=0.02, betas=(0.9, 0.8, 0.95), weight_decay=0.1)": Ours(
        "Adan(0.02, (0.9, 0.8, 0.95), 0.1)"
    ),
    "timm==1.0.31 Adan(lr=0.01, weight_decay=0.05)": Ours("Adan(0.01, lambda_=0.05)"),
    "optax==0.2.8 adan(learning_rate=0.01, weight_decay=0.02)": Ours(
        "", "weighs differences by 1 - b2 where the paper has b2, and adds 1e-8 below the root; decays as proximal=False"
    ),
    "pytorch_optimizer==4.1.0 ADOPT(lr=0.01)": Ours("Adopt(0.01, slack=1)", "counts steps from 1"),
    "pytorch_optimizer==4.1.0 ADOPT(lr=0.02, betas=(0.8, 0.99), weight_decay=0.1, weight_decouple=True)": Ours(
        "OptimiserChain(Adopt(0.02, (0.8, 0.99), slack=1), WeightDecay(0.02 * 0.1))", "decays at the first gradient too"
    ),
    "timm==1.0.31 Adopt(lr=0.01, weight_decay=0.05, decoupled=True)": Ours("Adopt(0.01, lambda_=0.05, power=0.333)"),
    "optax==0.2.8 contrib.adopt(learning_rate=0.01)": Ours("Adopt(0.01)"),
    "pytorch_optimizer==4.1.0 LaProp(lr=0.01)": Ours("LaProp(0.01)", "adds 1e-15 below the root", 1e-9),
    "timm==1.0.31 LaProp(lr=0.01, weight_decay=0.1)": Ours(
        "LaProp(0.01 * 0.999, lambda_=0.1 / 0.999)", "decays what the step has reached; scalars in float32", NARROW
    ),
    "pytorch_optimizer==4.1.0 Yogi(lr=0.01)": Ours("Yogi(0.01)"),
    "optax==0.2.8 yogi(learning_rate=0.01)": Ours("Yogi(0.01)"),
    "schedulefree==1.4.1 SGDScheduleFree(lr=0.1)": Ours("ScheduleFree(Descent(0.1))"),
    "schedulefree==1.4.1 SGDScheduleFree(lr=0.2, momentum=0.8, weight_decay=0.01, warmup_steps=4)": Ours(
        "ScheduleFree(OptimiserChain(WeightDecay(0.01), Descent(0.2)), 0.8, warmup=4)"
    ),
    "schedulefree==1.4.1 AdamWScheduleFree(lr=0.01)": Ours("ScheduleFree(AdamW(0.01, (0.0, 0.999)))"),
    "schedulefree==1.4.1 AdamWScheduleFree(lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, warmup_steps=4)": Ours(
        "ScheduleFree(AdamW(0.02, (0.0, 0.95), 0.1), 0.8, warmup=4)"
    ),
    "schedulefree==1.4.1 RAdamScheduleFree(lr=0.01)": Ours("ScheduleFree(RAdam(0.01, (0.0, 0.999)))"),
    "timm==1.0.31 AdamWLegacy(lr=0.01, weight_decay=0.0, caution=True)": Ours("Cautious(AdamW(0.01))"),
    "timm==1.0.31 AdamWLegacy(lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, caution=True)": Ours(
        "Cautious(AdamW(0.02, (0.8, 0.95), 0.1))"
    ),
    "timm==1.0.31 Lion(lr=0.01, caution=True)": Ours("Cautious(Lion(0.01))"),
    "timm==1.0.31 Lion(lr=0.002, betas=(0.8, 0.95), weight_decay=0.1, caution=True)": Ours(
        "Cautious(OptimiserChain(Lion(0.002, (0.8, 0.95)), WeightDecay(0.002 * 0.1)))"
    ),
    "pytorch_optimizer==4.1.0 LookaheadAdamW(k=5, alpha=0.5, lr=0.01, weight_decay=0.0)": Ours("Lookahead(AdamW(0.01))"),
    "pytorch_optimizer==4.1.0 LookaheadAdamW(k=3, alpha=0.8, lr=0.02, weight_decay=0.1)": Ours(
        "Lookahead(AdamW(0.02, lambda_=0.1), 3, 0.8)"
    ),
    "pytorch_optimizer==4.1.0 GrokFastAdamW(lr=0.01)": Ours(
        "OptimiserChain(GrokFast(), AdamW(0.01 / 3, (0.9, 0.99), epsilon=0.0))",
        "divides the learning rate by 1 + lambda; the larger of root and epsilon, not their sum",
    ),
    "pytorch_optimizer==4.1.0 GrokFastAdamW(lr=0.02, grokfast_alpha=0.9, grokfast_lamb=1.0, weight_decay=0.1)": Ours(
        "OptimiserChain(GrokFast(0.9, 1.0), AdamW(0.01, (0.9, 0.99), 0.1, 0.0))",
        "divides the learning rate by 1 + lambda; the larger of root and epsilon, not their sum",
    ),
    "optax==0.2.8 chain(adaptive_grad_clip(0.01), sgd(0.1))(clipping=0.01, lr=0.1)": Ours(
        'OptimiserChain(AdaptiveClip(0.01, layout="in_out"), Descent(0.1))'
    ),
    "optax==0.2.8 chain(centralize(), sgd(0.1))(lr=0.1)": Ours("OptimiserChain(Centralise(), Descent(0.1))"),
    "pytorch_optimizer==4.1.0 SignSGD(lr=0.01)": Ours(
        "OptimiserChain(Momentum(1.0), Sign(), Descent(0.01))", "the sign of the momentum"
    ),
    "pytorch_optimizer==4.1.0 SignSGD(lr=0.02, momentum=0.0)": Ours("OptimiserChain(Sign(), Descent(0.02))"),
    "torch==2.13.0+cpu Adafactor(lr=0.01)": Ours("Adafactor(0.01)"),
    "torch==2.13.0+cpu Adafactor(lr=0.02, beta2_decay=-0.5, d=2.0, weight_decay=0.1)": Ours(
        "Adafactor(0.02, 0.1, tau=2.0, power=0.5)"
    ),
    "transformers==5.24.0 Adafactor(lr=0.01, scale_parameter=False, relative_step=False)": Ours(
        "Adafactor(0.01, relative=False, scaled=False)"
    ),
    "transformers==5.24.0 Adafactor(lr=0.02, scale_parameter=True, relative_step=False, clip_threshold=2.0, "
    "weight_decay=0.05)": Ours("Adafactor(0.02, 0.05, tau=2.0, relative=False, proportional=True)"),
    "optax==0.2.8 adafactor(learning_rate=0.01, min_dim_size_to_factor=2)": Ours(
        "Adafactor(0.01, relative=False)",
        "factors the two longest axes, so the same up to two dimensions; decay in float32",
        NARROW,
        most=2,
    ),
    "pytorch_optimizer==4.1.0 CAME(lr=0.001)": Ours("Came(0.001)"),
    "pytorch_optimizer==4.1.0 CAME(lr=0.01, betas=(0.8, 0.95, 0.99), weight_decay=0.1)": Ours(
        "Came(0.01, (0.8, 0.95, 0.99), 0.1)"
    ),
    "pytorch_optimizer==4.1.0 MARS(lr=0.01, optimize_1d=True)": Ours(
        "Mars(0.01, from_zero=True)", "adds epsilon before the correction, and 1e-15 below the root", NARROW
    ),
    "pytorch_optimizer==4.1.0 MARS(lr=0.02, betas=(0.8, 0.95), gamma=0.1, weight_decay=0.1, optimize_1d=True)": Ours(
        "Mars(0.02, (0.8, 0.95), 0.1, gamma=0.1, from_zero=True)", "the same", NARROW
    ),
    "timm==1.0.31 Mars(lr=0.01, optimize_1d=True)": Ours("Mars(0.01, (0.9, 0.99))"),
    "pytorch_optimizer==4.1.0 StableAdamW(lr=0.01, kahan_sum=False)": Ours("StableAdamW(0.01, lambda_=0.01)"),
    "pytorch_optimizer==4.1.0 StableAdamW(lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, kahan_sum=False)": Ours(
        "StableAdamW(0.02, (0.8, 0.95), 0.1)"
    ),
    "optax==0.2.8 novograd(learning_rate=0.01)": Ours("NovoGrad(0.01, (0.9, 0.25), epsilon=1e-6)"),
    "timm==1.0.31 NvNovoGrad(lr=0.01, weight_decay=0.01)": Ours(
        "NovoGrad(0.01, lambda_=0.01)", "keeps the squared norm in float32", NARROW
    ),
    "pytorch_optimizer==4.1.0 Lamb(lr=0.01, max_grad_norm=0.0)": Ours("", LAMB),
    "pytorch_optimizer==4.1.0 Lamb(lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, max_grad_norm=0.0)": Ours("", LAMB),
    "optax==0.2.8 lamb(learning_rate=0.01, weight_decay=0.05)": Ours("Lamb(0.01, lambda_=0.05)"),
    "timm==1.0.31 Lamb(lr=0.01, weight_decay=0.1, max_grad_norm=None)": Ours("Lamb(0.01, lambda_=0.1)"),
    "pytorch_optimizer==4.1.0 LARS(lr=0.1)": Ours("Lars(0.1)", "steps vectors by Momentum", vectors="Momentum(0.1)"),
    "pytorch_optimizer==4.1.0 LARS(lr=0.2, weight_decay=0.05, momentum=0.8, trust_coefficient=0.01)": Ours(
        "Lars(0.2, 0.8, 0.05, 0.01)", "the same", vectors="Momentum(0.2, 0.8)"
    ),
    "optax==0.2.8 lars(learning_rate=0.1, weight_decay=0.01)": Ours("Lars(0.1, lambda_=0.01, joint=True)"),
    "timm==1.0.31 Lars(lr=0.5, momentum=0.9, weight_decay=0.01)": Ours("Lars(0.5, lambda_=0.01, epsilon=1e-8)"),
    "prodigyopt==1.1.2 Prodigy(lr=1.0, d0=0.01)": Ours("Prodigy(d0=0.01)"),
    "prodigyopt==1.1.2 Prodigy(lr=0.5, d0=0.01, betas=(0.8, 0.95), weight_decay=0.1, use_bias_correction=True, "
    "safeguard_warmup=True)": Ours("Prodigy(0.5, (0.8, 0.95), 0.1, d0=0.01, debias=True, safeguard=True)"),
    "optax==0.2.8 contrib.prodigy(learning_rate=1.0, estim_lr0=0.01)": Ours("Prodigy(d0=0.01, debias=True)"),
    "optax==0.2.8 contrib.dog(learning_rate=1.0)": Ours("DoG()"),
    "pytorch_optimizer==4.1.0 SOAP(lr=0.01, precondition_frequency=1, weight_decay=0.0)": Ours(
        "SOAP(0.01, lambda_=0.0, refresh=1, merge=False)",
        "makes a basis of each dimension, by QR in float32; no bases for vectors",
        NARROW,
        vectors="SOAP(0.01, lambda_=0.0, vectors=True, max_size=1)",
        free=((5, 3), (4, 6)),
    ),
    "pytorch_optimizer==4.1.0 SOAP(lr=0.01, precondition_frequency=3, betas=(0.9, 0.95), weight_decay=0.1)": Ours(
        "SOAP(0.01 * 0.999, (0.9, 0.95), 0.1 / 0.999, refresh=3, merge=False)",
        "the same; decays what the step has reached",
        NARROW,
        vectors="SOAP(0.01 * 0.999, (0.9, 0.95), 0.1 / 0.999, vectors=True, max_size=1)",
        free=((5, 3), (4, 6)),
    ),
    "pytorch_optimizer==4.1.0 Shampoo(lr=0.1)": Ours(
        "Shampoo(0.1, merge=False, vectors=True)", "takes each dimension for a side, and vectors too", rough=((7,),)
    ),
    "pytorch_optimizer==4.1.0 Shampoo(lr=0.1, momentum=0.9, preconditioning_compute_steps=2)": Ours(
        "",
        "mixes 0.9 of the last step into the gradient before all else, and no root is made before the second step",
        rough=((7,),),
    ),
    "pytorch_optimizer==4.1.0 GaLore(lr=0.01)": Ours(
        "",
        "rank 2, of matrices only; renews at steps 4, 8, ..., where every fourth from the first is meant; singular vectors in "
        "float32, with signs as they come; adds 1e-6 before the correction",
        NARROW,
    ),
    "pytorch_optimizer==4.1.0 NorMuon(lr=0.02)": Ours(
        'NorMuon(0.02, nesterov=True, scale="jordan", ns=NewtonSchulz(normaliser="clamp"), '
        "opt=AdamW(3e-4, (0.9, 0.95), epsilon=1e-10))",
        MUON,
        COARSE,
    ),
    "pytorch_optimizer==4.1.0 AdaMuon(lr=0.02)": Ours(
        'AdaMuon(0.02, (0.9, 0.95), epsilon=1e-10, signs=False, ns=NewtonSchulz(normaliser="clamp"), '
        "opt=AdamW(3e-4, epsilon=1e-10))",
        MUON,
        COARSE,
    ),
    "pytorch_optimizer==4.1.0 SCION(lr=0.01)": Ours('Scion(0.01, ns=NewtonSchulz(normaliser="clamp"))', MUON, COARSE),
    "pytorch_optimizer==4.1.0 SCION(lr=0.01, momentum=0.3, constraint=True)": Ours(
        'Scion(0.01, 0.7, constrained=True, ns=NewtonSchulz(normaliser="clamp"))', MUON, COARSE
    ),
    "optax==0.2.8 contrib.dowg(learning_rate=1.0)": Ours("DoG(epsilon=1e-4, start=0.01, relative=0.0, weighted=True)"),
}


def tolerance(record, within):
    """How far the elements of the parameter may be off, in the unit of the parameter.

    In float32 each step rounds the parameter, and what it is made of some thirty times, on both sides.
    """
    largest = abs(record.xs).max()
    if record.dtype == "float64":
        return within * largest
    moved = abs(np.diff(record.xs, axis=0, prepend=record.x0[None])).max(axis=tuple(range(1, record.xs.ndim))).sum()
    return 2 * 2.0**-24 * (len(record.xs) * largest + 32 * moved) + (0 if within < NARROW else within * largest)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("method", "source"), sources())
def test_recorded_trajectories(method, source, kind):
    ours = CONVENTIONS[source]
    if not ours.rule:
        return
    for record in recorded(method)[source]:
        if record.x0.ndim > ours.most or record.x0.shape in ours.free:
            continue
        if record.dtype == "float32" and record.x0.shape in ours.rough:
            continue
        rule = eval(ours.vectors if ours.vectors and record.x0.ndim < 2 else ours.rule, vars(opt))
        error = abs(run(rule, record.x0, record.grads, kind) - record.xs).max()
        assert error <= tolerance(record, ours.within), f"{record.dtype}, shape {record.x0.shape}"


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("method", "source"), [each for each in sources() if "ScheduleFree(" in each[1]])
def test_recorded_averages(method, source, kind):
    rule = eval(CONVENTIONS[source].rule, vars(opt))
    for record in recorded(method)[source]:
        x = made(record.x0, kind)
        state = opt.setup(rule, x)
        for grad, average in zip(record.grads, record.averaged, strict=True):
            state, x = opt.update(state, x, made(grad, kind))
            assert abs(numpy_of(opt.averaged(state, x)) - average).max() <= tolerance(record, CLOSE)


def line(source):
    """The line of a source in the documentation's table."""
    package, call = source.replace("==", " ").split(" ", 1)[0], source.split(" ", 1)[1]
    version = source.split("==")[1].split(" ")[0].split("+")[0]
    ours = CONVENTIONS[source]
    return f"| {package} {version} | `{call}` | {f'`{ours.rule}`' if ours.rule else 'none'} | {ours.note} |"


def test_the_page_says_so():
    page = PAGE.read_text(encoding="utf-8")
    missing = [line(source) for source in CONVENTIONS if line(source) not in page]
    assert not missing, "docs/conventions.md lacks\n" + "\n".join(missing)


def test_every_source_has_its_setting_and_every_setting_a_source():
    assert {source for _, source in sources()} == CONVENTIONS.keys()


# --- what no setting gives: that the differences named in the table are all there is ----------------------------------------


def optax_adan(record, eta, lambda_):
    """Adan as optax has it."""
    x, m, d, n, last = record.x0, 0.0, 0.0, 0.0, record.grads[0]
    for t, g in enumerate(record.grads, 1):
        m = 0.98 * m + 0.02 * g
        d = 0.92 * d + 0.08 * (g - last)
        n = 0.99 * n + 0.01 * (g + (1 - 0.92) * (g - last)) ** 2
        ahead = m / (1 - 0.98**t) + (1 - 0.92) * d / (1 - 0.92**t)
        x = x - eta * (ahead / (np.sqrt(n / (1 - 0.99**t) + 1e-8) + 1e-8) + lambda_ * x)
        last = g
        yield x


def pytorch_lamb(record, eta, beta, lambda_):
    """LAMB as pytorch_optimizer has it."""
    x, m, v = record.x0, 0.0, 0.0
    for t, g in enumerate(record.grads, 1):
        m = beta[0] * m + (1 - beta[0]) * g
        v = beta[1] * v + (1 - beta[1]) * g * g
        x = x * (1 - eta * lambda_)
        step = m / (np.sqrt(v) + 1e-6)
        ratio = min(np.linalg.norm(x), 10) / (np.linalg.norm(step) + 1e-6)
        x = x - eta / (1 - beta[0] ** t) * ratio * step
        yield x


def pytorch_shampoo(record, eta, mu, every):
    """Shampoo as pytorch_optimizer has it with momentum."""
    x, last = record.x0, record.grads[0]
    sums, roots = [1e-6 * np.eye(n) for n in x.shape], [np.zeros((n, n)) for n in x.shape]
    for t, g in enumerate(record.grads, 1):
        mixed = last = (1 - mu) * g + mu * last
        for axis, n in enumerate(x.shape):
            slices = np.moveaxis(mixed, axis, 0).reshape(n, -1)
            sums[axis] = sums[axis] + slices @ slices.T
            if t % every == 0:
                u, s, vt = np.linalg.svd(sums[axis])
                roots[axis] = (u * s ** (-1 / (2 * x.ndim))) @ vt
            last = np.moveaxis(np.tensordot(roots[axis], last, (1, axis)), 0, axis)
        x = x - eta * last
        yield x


def galore(record, refresh, *, theirs):
    """GaLore around Adam as pytorch_optimizer has it; or as this library has, in float64 and from the first step on."""
    x, m, v, basis = record.x0, 0.0, 0.0, None
    tall = x.ndim == 2 and x.shape[0] >= x.shape[1]
    for t, g in enumerate(record.grads, 1):
        low = x.ndim == 2
        if low and (t == 1 or t % refresh == (0 if theirs else 1)):
            u, _, vt = np.linalg.svd(g.astype(np.float32) if theirs else g, full_matrices=False)
            last, basis = (0.0 if t == 1 else basis), (vt[:2].T if tall else u[:, :2]).astype(x.dtype)
            if not theirs:  # the signs of a decomposition are free: those that the moments suit
                basis = basis * np.where((basis * last).sum(0) < 0, -1.0, 1.0)
        seen = g if not low else (g @ basis if tall else basis.T @ g)
        m = 0.9 * m + 0.1 * seen
        v = 0.999 * v + 0.001 * seen * seen
        root = np.sqrt(1 - 0.999**t)
        step = root / (1 - 0.9**t) * m / (np.sqrt(v) + (1e-6 if theirs else 1e-6 * root))
        x = x - 0.01 * (step if not low else (step @ basis.T if tall else basis @ step))
        yield x


DEPARTURES = {
    ("galore_adamw", "pytorch_optimizer==4.1.0 GaLore(lr=0.01)"): lambda record: galore(record, 4, theirs=True),
    (
        "shampoo",
        "pytorch_optimizer==4.1.0 Shampoo(lr=0.1, momentum=0.9, preconditioning_compute_steps=2)",
    ): lambda record: pytorch_shampoo(record, 0.1, 0.9, 2),
    ("lamb", "pytorch_optimizer==4.1.0 Lamb(lr=0.01, max_grad_norm=0.0)"): lambda record: pytorch_lamb(
        record, 0.01, (0.9, 0.999), 0.0
    ),
    (
        "lamb",
        "pytorch_optimizer==4.1.0 Lamb(lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, max_grad_norm=0.0)",
    ): lambda record: pytorch_lamb(record, 0.02, (0.8, 0.95), 0.1),
    ("adan", "optax==0.2.8 adan(learning_rate=0.01, weight_decay=0.02)"): lambda record: optax_adan(record, 0.01, 0.02),
}


@pytest.mark.parametrize(("method", "source"), DEPARTURES)
def test_departures_are_as_named(method, source):
    for record in recorded(method)[source]:
        if record.dtype == "float64":
            theirs = np.array(list(DEPARTURES[method, source](record)))
            within = 1e-5 if record.x0.shape in CONVENTIONS[source].rough else CONVENTIONS[source].within
            assert abs(theirs - record.xs).max() <= within * abs(record.xs).max()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_low_rank_is_galore_but_for_what_is_named(kind):
    for record in recorded("galore_adamw")["pytorch_optimizer==4.1.0 GaLore(lr=0.01)"]:
        if record.dtype == "float64" and record.x0.ndim == 2:
            rule = opt.LowRank(opt.AdamW(0.01, epsilon=1e-6), 2, refresh=4)
            ours = run(rule, record.x0, record.grads, kind)
            assert abs(ours - np.array(list(galore(record, 4, theirs=False)))).max() <= CLOSE * abs(ours).max()


def test_every_source_without_a_setting_is_a_departure():
    assert {source for source, ours in CONVENTIONS.items() if not ours.rule} == {source for _, source in DEPARTURES}


# --- what is coarse: in bfloat16 the source's bits, in float64 ours -----------------------------------------------------------


def polar(u, dtype):
    """Newton-Schulz as pytorch_optimizer has it, in a dtype."""
    x = u.to(dtype)
    tall = len(x) > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def pytorch_normuon(x, grads, dtype, eta=0.02, beta=0.95):
    """NorMuon as pytorch_optimizer has it, for a matrix."""
    m, v = torch.zeros_like(x), x.new_zeros(len(x), 1)
    for g in grads:
        m = m.lerp(g, 1 - beta)
        u = polar(g.lerp(m, beta), dtype).to(x.dtype)
        v = v.lerp(u.square().mean(-1, keepdim=True), 1 - beta)
        step = u / (v.sqrt() + 1e-10)
        x = x - eta * max(1, len(x) / x.shape[1]) ** 0.5 * step * (u.norm() / (step.norm() + 1e-10))
        yield x


def pytorch_adamuon(x, grads, dtype, eta=0.02, beta=(0.9, 0.95)):
    """AdaMuon as pytorch_optimizer has it, for a matrix."""
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m = m.lerp(g, 1 - beta[0])
        u = polar(m, dtype)
        v = v.mul(beta[1]).addcmul(u, u, value=1 - beta[1])
        u = (u / ((v / (1 - beta[1] ** t)).sqrt() + 1e-10)).to(dtype)
        u = u * (min(x.shape) ** 0.5 / u.norm().add(1e-10))
        x = x.add(u, alpha=-eta * 0.2 * max(x.shape) ** 0.5)
        yield x


def pytorch_scion(x, grads, dtype, scale, alpha, constrained, eta=0.01):
    """SCION as pytorch_optimizer has it, for a matrix."""
    d = torch.zeros_like(x)
    for g in grads:
        d = d.lerp(g, alpha)
        x = (x * (1 - eta) if constrained else x).add(polar(d, dtype) * torch.tensor(scale, dtype=dtype), alpha=-eta)
        yield x


def coarse(source, record, dtype):
    """The trajectory of a matrix as its source makes it in a dtype."""
    rows, *columns = record.x0.shape
    x, grads = torch.from_numpy(record.x0).reshape(rows, -1), torch.from_numpy(record.grads).flatten(2)
    if "SCION" not in source:
        xs = (pytorch_normuon if "NorMuon" in source else pytorch_adamuon)(x, grads, dtype)
    else:
        scale = (rows / columns[0]) ** 0.5 / np.prod(columns[1:])
        constrained = "constraint=True" in source
        xs = pytorch_scion(x, grads, dtype, float(scale), 0.3 if constrained else 0.1, constrained)
    return torch.stack(list(xs)).reshape(record.xs.shape).numpy()


@pytest.mark.parametrize(("method", "source"), [each for each in sources() if CONVENTIONS[each[1]].within == COARSE])
def test_coarse_sources_are_the_same_but_for_their_dtype(method, source):
    rule = eval(CONVENTIONS[source].rule, vars(opt))
    for record in recorded(method)[source]:
        fine = record.dtype == "float64"
        largest = abs(record.xs).max()
        ours = run(rule, record.x0, record.grads)
        if record.x0.ndim < 2:
            assert abs(ours - record.xs).max() <= (CLOSE if fine else 1e-6) * largest
            continue
        assert abs(coarse(source, record, torch.bfloat16) - record.xs).max() <= (1e-14 if fine else 1e-6) * largest
        if fine:
            assert abs(coarse(source, record, torch.float64) - ours).max() <= CLOSE * largest


# --- numbers over several arrays -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("rule", [opt.DoG(relative=0.1), opt.DoG(weighted=True, start=0.1), opt.Prodigy(d0=0.1, debias=True)])
def test_arrays_of_a_group_are_measured_as_one(rule, kind):
    """Two arrays are stepped as the one array that holds both."""
    rng = np.random.default_rng(3)
    x, grads = rng.standard_normal(6), rng.standard_normal((8, 6))
    whole = run(rule, x, grads, kind)
    model = {"a": made(x[:2], kind), "b": made(x[2:], kind)}
    state = opt.setup(rule, model)
    for expected, g in zip(whole, grads, strict=True):
        state, model = opt.update(state, model, {"a": made(g[:2], kind), "b": made(g[2:], kind)})
        found = np.concatenate([numpy_of(model["a"]), numpy_of(model["b"])])
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("rule", [opt.DoG(relative=0.1), opt.Prodigy(d0=0.1)])
def test_an_array_that_was_absent_takes_what_the_others_have_found(rule):
    rng = np.random.default_rng(4)
    model = {"a": rng.standard_normal(3), "b": rng.standard_normal(2)}
    state = opt.setup(rule, model)
    for _ in range(5):
        state, model = opt.update(state, model, {"a": rng.standard_normal(3), "b": None})
    state, _ = opt.update(state, model, {"a": rng.standard_normal(3), "b": rng.standard_normal(2)})
    shared = {name: next(part for part in state[name].state if isinstance(part, tuple) and len(part) == 3) for name in model}
    assert shared["a"][:2] == shared["b"][:2]
    assert (shared["a"][2], shared["b"][2]) == (6, 1)


# --- a method without a recorded source --------------------------------------------------------------------------------------


def adam_mini(x, grads, blocks, eta, beta, lambda_, epsilon):
    """Adam-mini block by block and element by element, as its paper writes it."""
    x, m, v = x.copy(), np.zeros(x.shape), [0.0] * len(blocks)
    for t, g in enumerate(grads, 1):
        x = x - eta * lambda_ * x
        m = (1 - beta[0]) * g + beta[0] * m
        for b, indices in enumerate(blocks):
            v[b] = (1 - beta[1]) * sum(g[i] ** 2 for i in indices) / len(indices) + beta[1] * v[b]
            for i in indices:
                x[i] -= eta * (m[i] / (1 - beta[0] ** t)) / ((v[b] / (1 - beta[1] ** t)) ** 0.5 + epsilon)
        yield x.copy()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("blocks", "count"), [("rows", 6), ("whole", 1), (2, 2), (3, 3)])
def test_adam_mini_is_that_of_its_paper(blocks, count, kind):
    rng = np.random.default_rng(5)
    x, grads = rng.standard_normal((6, 2, 2)), rng.standard_normal((10, 6, 2, 2))
    every, size = list(np.ndindex(6, 2, 2)), 6 // count
    members = [[i for i in every if i[0] // size == b] for b in range(count)]
    expected = list(adam_mini(x, grads, members, 0.02, (0.8, 0.95), 0.1, 1e-6))
    found = run(opt.AdamMini(0.02, (0.8, 0.95), 0.1, 1e-6, blocks), x, grads, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(opt.RuleError, match=r"blocks=4 does not divide the first axis of shape \(6, 2\)"):
        opt.setup(opt.AdamMini(blocks=4), np.ones((6, 2)))


# --- memory ------------------------------------------------------------------------------------------------------------------

SHAPES = ((1152, 384), (384, 384), (1536, 384), (384, 1536), (256, 384))
"""The matrices of a small GPT."""


@pytest.mark.parametrize(
    ("rule", "share"),
    [(opt.Adafactor(), 0.02), (opt.Came(), 1.02), (opt.AdamMini(), 1.01), (opt.AdamMini(blocks="whole"), 1.001)],
)
def test_state_bytes_beside_those_of_the_parameters(rule, share):
    model = {str(i): np.ones(shape, np.float32) for i, shape in enumerate(SHAPES)}
    assert opt.estimate(rule, model).state <= share * sum(x.nbytes for x in model.values())


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_lamb_is_a_chain(kind):
    rng = np.random.default_rng(6)
    x, grads = rng.standard_normal((4, 3)), rng.standard_normal((8, 4, 3))
    chain = opt.OptimiserChain(opt.AdamW(1.0, (0.8, 0.95), 0.1, 1e-6), opt.TrustRatio(), opt.Descent(0.02))
    np.testing.assert_allclose(run(opt.Lamb(0.02, (0.8, 0.95), 0.1), x, grads, kind), run(chain, x, grads, kind), rtol=1e-12)
