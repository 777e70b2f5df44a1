"""The table of rules: one row a rule. Every property test runs over all of it, so a new rule is tested by adding a row."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optimisers as opt
from optimisers.errors import HyperParameterError, RuleError, UnknownFieldError

Bad = tuple[dict[str, Any], type[Exception], str]


@dataclass(frozen=True)
class Row:
    """A rule, what it claims, and what it refuses.

    name: of the exported rule, or a description of a composition.
    make: the class (or function) that takes the keywords of ``bad``.
    configs: instances to test; the first has the defaults.
    complex: whether complex arrays are supported; if not, setup refuses them.
    refuses: real dtypes that setup refuses.
    law: what the rule promises about itself.
    differentiable: whether the step depends smoothly on the gradient; if not, its derivative is zero almost everywhere.
    host_counter: whether it reads a step counter on the host, which transforms cannot do.
    rebuilds: whether ``repr`` evaluates back and pickle restores an equal rule (not with callables as fields).
    like_x: whether every array of the state has the shape and strides of x.
    min_ndim: fewest dimensions of the arrays it takes.
    stacked: for a stackable rule: the same rule treating one more leading dimension as a stack.
    rates: learning rates at which the first configuration finds the minimum of a quadratic and of Rosenbrock's function.
    bad: (keywords, error, fragment of its text).
    """

    name: str
    make: Callable[..., Any]
    configs: tuple[opt.AbstractRule, ...]
    complex: bool = True
    refuses: tuple[str, ...] = ()
    law: str = "elementwise"
    differentiable: bool = True
    host_counter: bool = False
    rebuilds: bool = True
    like_x: bool = True
    min_ndim: int = 0
    stacked: Callable[[Any], Any] | None = None
    rates: tuple[float, float] | None = None
    bad: tuple[Bad, ...] = ()


# --- rules as a user would write them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignedRoot(opt.AbstractRule):
    """A rule that claims nothing."""

    eta: float = 0.01

    def init(self, x):
        return {"last": 0 * x, "count": 0}

    def apply(self, state, x, dx):
        step = self.eta * (dx + 0.5 * state["last"])
        return {"last": dx * 1.0, "count": state["count"] + 1}, step


@dataclass(frozen=True)
class Centred(opt.AbstractRule):
    """A stackable rule: it takes the mean over the last axis out of the gradient."""

    law = "stackable"
    eta: float = 0.01

    def init(self, x):
        return None

    def apply(self, state, x, dx):
        return state, self.eta * (dx - dx.sum(-1)[..., None] / max(1, dx.shape[-1]))


@dataclass(frozen=True)
class MeanScaled(opt.MeasuredRule):
    """A measured rule: it divides the gradient by one plus its mean square, and remembers that of the last step."""

    eta: float = 0.01

    def init(self, x):
        return (0 * x,)

    def measure(self, state, x, dx):
        return ((abs(dx) ** 2).sum() / max(1, math.prod(dx.shape)),)

    def apply_measured(self, state, x, dx, measure):
        (size,) = measure
        return (0.5 * state[0] + dx,), self.eta * (dx + state[0]) / (1 + size)


# --- bad inputs that many rules share ------------------------------------------------------------------------------------


def bad_eta(name: str) -> tuple[Bad, ...]:
    return (
        ({"eta": -0.1}, HyperParameterError, f"{name}: field 'eta' must be a finite number >= 0; got -0.1"),
        ({"eta": math.nan}, HyperParameterError, f"{name}: field 'eta' must be a finite number >= 0; got nan"),
        ({"eta": math.inf}, HyperParameterError, f"{name}: field 'eta' must be a finite number >= 0; got inf"),
        ({"eta": "fast"}, HyperParameterError, f"{name}: field 'eta' must be a finite number >= 0; got 'fast'"),
        ({"eta": True}, HyperParameterError, f"{name}: field 'eta' must be a finite number >= 0; got True"),
        ({"lr": 0.1}, UnknownFieldError, f"{name} has no field 'lr'; did you mean 'eta'? Its fields are: "),
    )


def bad_fraction(name: str, field: str) -> tuple[Bad, ...]:
    return (
        ({field: 1.0}, HyperParameterError, f"{name}: field '{field}' must be in [0, 1); got 1.0"),
        ({field: -0.5}, HyperParameterError, f"{name}: field '{field}' must be in [0, 1); got -0.5"),
    )


def bad_epsilon(name: str) -> tuple[Bad, ...]:
    return (
        ({"epsilon": -1e-8}, HyperParameterError, f"{name}: field 'epsilon' must be a finite number >= 0; got -1e-08"),
        ({"eps": 1e-6}, UnknownFieldError, f"{name} has no field 'eps'; did you mean 'epsilon'? Its fields are: "),
    )


def bad_beta(name: str) -> tuple[Bad, ...]:
    return (
        ({"beta": 0.9}, HyperParameterError, f"{name}: field 'beta' must be 2 numbers, each in [0, 1); got 0.9"),
        ({"beta": (0.9, 1.0)}, HyperParameterError, f"{name}: field 'beta[1]' must be in [0, 1); got 1.0"),
        ({"beta": (-0.1, 0.9)}, HyperParameterError, f"{name}: field 'beta[0]' must be in [0, 1); got -0.1"),
        ({"beta": (0.9, 0.9, 0.9)}, HyperParameterError, f"{name}: field 'beta' must be 2 numbers"),
        ({"betas": (0.9, 0.9)}, UnknownFieldError, f"{name} has no field 'betas'; did you mean 'beta'?"),
    )


def bad_betas(name: str) -> tuple[Bad, ...]:
    """As `bad_beta`, of three."""
    return (
        ({"beta": (0.9, 0.9)}, HyperParameterError, f"{name}: field 'beta' must be 3 numbers, each in [0, 1); got (0.9, 0.9)"),
        ({"beta": (0.9, 0.9, 1.0)}, HyperParameterError, f"{name}: field 'beta[2]' must be in [0, 1); got 1.0"),
        ({"betas": (0.9, 0.9, 0.9)}, UnknownFieldError, f"{name} has no field 'betas'; did you mean 'beta'?"),
    )


def bad_lambda(name: str) -> tuple[Bad, ...]:
    return (
        ({"lambda_": -1}, HyperParameterError, f"{name}: field 'lambda_' must be a finite number >= 0; got -1"),
        ({"weight_decay": 0.1}, UnknownFieldError, f"{name} has no field 'weight_decay'; did you mean 'lambda_'?"),
    )


def bad_positive(name: str, field: str) -> tuple[Bad, ...]:
    return (
        ({field: 0}, HyperParameterError, f"{name}: field '{field}' must be a finite number > 0; got 0"),
        ({field: math.inf}, HyperParameterError, f"{name}: field '{field}' must be a finite number > 0; got inf"),
    )


def adam_like(name: str, **claims: Any) -> Row:
    """A row of a rule with the fields of Adam."""
    make = getattr(opt, name)
    configs = (make(), make(eta=0.05, beta=(0.0, 0.5)), make(eta=0.02, beta=(0.8, 0.0), epsilon=1e-3), make(eta=0.0))
    bad = (*bad_eta(name), *bad_beta(name), *bad_epsilon(name), *claims.pop("bad", ()))
    return Row(name, make, configs, bad=bad, **claims)


def usual(name: str, *configs: dict[str, Any], bad: tuple[Bad, ...] = (), **claims: Any) -> Row:
    """A row of a rule whose fields with conventional names refuse what they always refuse; configs are its keywords."""
    make = getattr(opt, name)
    default = make()
    shared: dict[str, Callable[[str], tuple[Bad, ...]]] = {
        "eta": bad_eta, "epsilon": bad_epsilon, "lambda_": bad_lambda,
        "beta": bad_beta if len(getattr(default, "beta", ())) == 2 else bad_betas,
    }  # fmt: skip
    usually = tuple(each for field, refused in shared.items() if hasattr(default, field) for each in refused(name))
    return Row(name, make, (default, *(make(**config) for config in configs)), bad=(*usually, *bad), **claims)


def halving(step: int) -> float:
    """A schedule."""
    return 0.01 / 2**step


def slower(step: int) -> float:
    """Another one."""
    return 0.5 + 0.4 * step / (step + 1)


def halfway(x: Any) -> Any:
    """A projection: onto the arrays of which the elements are not far out."""
    return x / (1 + 0.01 * abs(x))


def later(step: int) -> float:
    """A decay that sets in after two steps."""
    return 0.0 if step < 2 else 0.1


ELL = "must be (down, up) with 0 < down < 1 < up"
GAMMA = "must be (low, high) with 0 < low < high"

ROWS = (
    Row(
        "Descent",
        opt.Descent,
        (opt.Descent(), opt.Descent(eta=0), opt.Descent(0.5)),
        rates=(0.1, 0.0018),
        bad=bad_eta("Descent"),
    ),
    Row(
        "Momentum",
        opt.Momentum,
        (opt.Momentum(), opt.Momentum(0.1, 0.0), opt.Momentum(eta=0.1, rho=0.99)),
        rates=(0.03, 0.002),
        bad=(*bad_eta("Momentum"), *bad_fraction("Momentum", "rho")),
    ),
    Row(
        "Nesterov",
        opt.Nesterov,
        (opt.Nesterov(), opt.Nesterov(0.1, 0.0), opt.Nesterov(eta=0.1, rho=0.99)),
        rates=(0.03, 0.001),
        bad=(*bad_eta("Nesterov"), *bad_fraction("Nesterov", "rho")),
    ),
    Row(
        "RMSProp",
        opt.RMSProp,
        (opt.RMSProp(), opt.RMSProp(centred=True), opt.RMSProp(0.1, 0.0, 1e-3), opt.RMSProp(0.1, 0.5, 1e-2, True)),
        rates=(0.1, 0.003),
        bad=(
            *bad_eta("RMSProp"),
            *bad_fraction("RMSProp", "rho"),
            *bad_epsilon("RMSProp"),
            ({"centred": 1}, HyperParameterError, "RMSProp: field 'centred' must be True or False; got 1"),
            ({"centered": True}, UnknownFieldError, "RMSProp has no field 'centered'; did you mean 'centred'?"),
        ),
    ),
    Row(
        "Rprop",
        opt.Rprop,
        (opt.Rprop(), opt.Rprop(eta=0.1, ell=(0.1, 2.0), gamma=(1e-3, 0.2))),
        complex=False,
        differentiable=False,
        bad=(
            *bad_eta("Rprop"),
            ({"ell": (1.5, 2.0)}, HyperParameterError, f"Rprop: field 'ell' {ELL}; got (1.5, 2.0)"),
            ({"ell": (0.5, 0.9)}, HyperParameterError, f"Rprop: field 'ell' {ELL}; got (0.5, 0.9)"),
            ({"ell": 0.5}, HyperParameterError, f"Rprop: field 'ell' {ELL}; got 0.5"),
            ({"gamma": (2.0, 1.0)}, HyperParameterError, f"Rprop: field 'gamma' {GAMMA}; got (2.0, 1.0)"),
            ({"gamma": (0.0, 1.0)}, HyperParameterError, f"Rprop: field 'gamma' {GAMMA}; got (0.0, 1.0)"),
            ({"etas": (0.5, 1.2)}, UnknownFieldError, "Rprop has no field 'etas'; did you mean 'ell'?"),
        ),
    ),
    adam_like("Adam", rates=(0.3, 0.03)),
    adam_like("RAdam", rates=(0.3, 0.03)),
    adam_like("AdaMax", complex=False, rates=(0.3, 0.1)),
    adam_like("AMSGrad", complex=False, rates=(0.3, 0.03)),
    adam_like("NAdam", rates=(0.3, 0.01)),
    adam_like("OAdam", rates=(0.1, 0.003)),
    adam_like("AdaBelief", rates=(0.1, 0.03)),
    usual(
        "AdEMAMix",
        {"eta": 0.05, "beta": (0.5, 0.9, 0.0), "lambda_": 0.1, "alpha": 2.0, "warmup": 3},
        {"eta": 0.05, "beta": (0.0, 0.9, 0.99), "epsilon": 1e-3, "warmup": 10},
        rates=(1.0, 0.03),
        bad=(
            ({"alpha": -1}, HyperParameterError, "AdEMAMix: field 'alpha' must be a finite number >= 0; got -1"),
            ({"warmup": math.inf}, HyperParameterError, "AdEMAMix: field 'warmup' must be a finite number >= 0; got inf"),
        ),
    ),
    usual(
        "Adan",
        {"eta": 0.05, "beta": (0.0, 0.0, 0.5), "lambda_": 0.1},
        {"eta": 0.05, "lambda_": 0.1, "epsilon": 1e-3, "proximal": False},
        rates=(0.3, 0.1),
        bad=(({"proximal": 1}, HyperParameterError, "Adan: field 'proximal' must be True or False; got 1"),),
    ),
    usual(
        "Adopt",
        {"eta": 0.05, "beta": (0.0, 0.5), "lambda_": 0.1, "slack": math.inf},
        {"eta": 0.05, "beta": (0.5, 0.0), "epsilon": 1e-3, "power": 0.333, "slack": 1},
        complex=False,
        rates=(0.3, 0.1),
        bad=(
            ({"power": -1}, HyperParameterError, "Adopt: field 'power' must be in [0, 16]; got -1"),
            ({"slack": -1}, HyperParameterError, "Adopt: field 'slack' must be a number >= 0; got -1"),
        ),
    ),
    usual("LaProp", {"eta": 0.05, "beta": (0.0, 0.5), "lambda_": 0.1, "epsilon": 1e-3}, rates=(0.3, 0.03)),
    usual(
        "Yogi",
        {"eta": 0.05, "beta": (0.0, 0.5), "start": 0.0},
        {"beta": (0.8, 0.9), "debias": False},
        rates=(0.3, 0.1),
        bad=(({"start": -1}, HyperParameterError, "Yogi: field 'start' must be a finite number >= 0; got -1"),),
    ),
    usual(
        "Mars",
        {"eta": 0.05, "beta": (0.5, 0.9), "lambda_": 0.1, "gamma": 0.2},
        {"eta": 0.05, "epsilon": 1e-3, "from_zero": True},
        law="measured",
        like_x=False,
        rates=(0.3, 0.03),
        bad=(({"gamma": -1}, HyperParameterError, "Mars: field 'gamma' must be a finite number >= 0; got -1"),),
    ),
    usual("StableAdamW", {"eta": 0.05, "beta": (0.5, 0.9), "lambda_": 0.1, "epsilon": 1e-3}, law="measured", rates=(0.3, 0.03)),
    usual(
        "NovoGrad",
        {"eta": 0.05, "beta": (0.9, 0.25), "lambda_": 0.1, "epsilon": 1e-3},
        law="measured",
        like_x=False,
        rates=(0.01, 0.003),
    ),
    usual("Lamb", {"eta": 0.05, "beta": (0.5, 0.9), "lambda_": 0.1, "epsilon": 1e-3}, law="measured", rates=(0.03, 0.003)),
    usual(
        "Lars",
        {"eta": 0.5, "rho": 0.5, "lambda_": 0.1, "coefficient": 0.1, "epsilon": 1e-3},
        {"eta": 0.5, "lambda_": 0.1, "joint": True},
        law="measured",
        rates=(1.0, 1.0),
        bad=(
            *bad_fraction("Lars", "rho"),
            ({"coefficient": -1}, HyperParameterError, "Lars: field 'coefficient' must be a finite number >= 0; got -1"),
        ),
    ),
    usual(
        "DoG",
        {"eta": 0.5, "relative": 0.1, "group": "a"},
        {"epsilon": 1e-4, "start": 0.1, "relative": 0.0, "weighted": True},
        law="measured",
        like_x=False,
        rates=(1.0, 1.0),
        bad=(({"start": -1}, HyperParameterError, "DoG: field 'start' must be a finite number >= 0; got -1"),),
    ),
    usual(
        "Prodigy",
        {"beta": (0.5, 0.9), "lambda_": 0.1, "epsilon": 1e-3, "d0": 0.01, "debias": True},
        {"d0": 0.1, "coefficient": 0.5, "safeguard": True, "group": "a"},
        complex=False,
        law="measured",
        like_x=False,
        rates=(1.0, 1.0),
        bad=(({"d0": 0}, HyperParameterError, "Prodigy: field 'd0' must be a finite number > 0; got 0"),),
    ),
    usual(
        "Adafactor",
        {"eta": 0.05, "lambda_": 0.1, "tau": 2.0, "power": 0.5, "proportional": True},
        {"eta": 0.05, "relative": False, "scaled": False, "epsilon": 1e-3},
        law="stackable",
        like_x=False,
        stacked=lambda rule: rule.stacked(),
        rates=(1.0, 0.01),
        bad=(
            *bad_positive("Adafactor", "tau"),
            ({"floor": -1}, HyperParameterError, "Adafactor: field 'floor' must be a finite number >= 0; got -1"),
        ),
    ),
    usual(
        "Came",
        {"eta": 0.05, "beta": (0.5, 0.9, 0.9), "lambda_": 0.1, "tau": 2.0, "epsilon": 1e-3},
        law="stackable",
        like_x=False,
        stacked=lambda rule: rule.stacked(),
        rates=(0.1, 0.01),
        bad=bad_positive("Came", "tau"),
    ),
    usual(
        "AdamMini",
        {"eta": 0.05, "beta": (0.5, 0.9), "lambda_": 0.1, "blocks": "whole"},
        {"eta": 0.05, "blocks": 1, "epsilon": 1e-3},
        law="stackable",
        like_x=False,
        stacked=lambda rule: rule.stacked(),
        rates=(0.3, 0.01),
        bad=(({"blocks": 0}, HyperParameterError, "AdamMini: field 'blocks' must be 'rows', 'whole' or a whole number >= 1"),),
    ),
    Row(
        "AdaGrad",
        opt.AdaGrad,
        (opt.AdaGrad(), opt.AdaGrad(eta=0.01, epsilon=1e-2)),
        rates=(1.0, 0.1),
        bad=(*bad_eta("AdaGrad"), *bad_epsilon("AdaGrad")),
    ),
    Row(
        "AdaDelta",
        opt.AdaDelta,
        (opt.AdaDelta(), opt.AdaDelta(rho=0.5, epsilon=1e-3), opt.AdaDelta(rho=0.0)),
        bad=(
            *bad_fraction("AdaDelta", "rho"),
            *bad_epsilon("AdaDelta"),
            ({"eta": 0.1}, UnknownFieldError, "AdaDelta has no field 'eta'. Its fields are: rho, epsilon"),
        ),
    ),
    Row(
        "AdamW",
        opt.AdamW,
        (opt.AdamW(), opt.AdamW(0.1, (0.5, 0.9), 0.1), opt.AdamW(0.1, lambda_=0.01, epsilon=1e-3, couple=False)),
        rates=(0.3, 0.03),
        bad=(
            *bad_eta("AdamW"),
            *bad_beta("AdamW"),
            *bad_epsilon("AdamW"),
            *bad_lambda("AdamW"),
            ({"couple": "yes"}, HyperParameterError, "AdamW: field 'couple' must be True or False; got 'yes'"),
        ),
    ),
    Row(
        "Lion",
        opt.Lion,
        (opt.Lion(), opt.Lion(0.1, (0.5, 0.0))),
        differentiable=False,
        rates=(0.1, 0.001),
        bad=(*bad_eta("Lion"), *bad_beta("Lion")),
    ),
    Row(
        "WeightDecay",
        opt.WeightDecay,
        (opt.WeightDecay(), opt.WeightDecay(0.1), opt.WeightDecay(0)),
        bad=bad_lambda("WeightDecay"),
    ),
    Row("SignDecay", opt.SignDecay, (opt.SignDecay(), opt.SignDecay(0.1)), bad=bad_lambda("SignDecay")),
    Row(
        "ClipGrad",
        opt.ClipGrad,
        (opt.ClipGrad(), opt.ClipGrad(0.5)),
        complex=False,
        bad=(
            *bad_positive("ClipGrad", "delta"),
            ({"clip_value": 1}, UnknownFieldError, "ClipGrad has no field 'clip_value'; did you mean 'delta'?"),
        ),
    ),
    Row(
        "ClipNorm",
        opt.ClipNorm,
        (
            opt.ClipNorm(),
            opt.ClipNorm(0.5),
            opt.ClipNorm(0.5, 1.0),
            opt.ClipNorm(0.5, 3.0),
            opt.ClipNorm(0.5, math.inf, throw=False),
        ),
        law="measured",
        bad=(
            *bad_positive("ClipNorm", "omega"),
            ({"p": math.nan}, HyperParameterError, "ClipNorm: field 'p' must be a number; got nan"),
            ({"throw": None}, HyperParameterError, "ClipNorm: field 'throw' must be True or False; got None"),
            ({"max_norm": 1}, UnknownFieldError, "ClipNorm has no field 'max_norm'; did you mean 'omega'?"),
        ),
    ),
    Row(
        "ClipGlobalNorm",
        opt.ClipGlobalNorm,
        (
            opt.ClipGlobalNorm(),
            opt.ClipGlobalNorm(0.1, 1.0),
            opt.ClipGlobalNorm(0.1, math.inf, False),
            opt.ClipGlobalNorm(0.1, 3.0, group="a"),
        ),
        law="measured",
        bad=(
            *bad_positive("ClipGlobalNorm", "omega"),
            ({"p": 0}, HyperParameterError, "ClipGlobalNorm: field 'p' must be a number > 0; got 0"),
        ),
    ),
    Row(
        "GrokFast",
        opt.GrokFast,
        (opt.GrokFast(), opt.GrokFast(0.5, 0.1), opt.GrokFast(0.0)),
        bad=(
            *bad_lambda("GrokFast"),
            ({"alpha": 1.0}, HyperParameterError, "GrokFast: field 'alpha' must be in [0, 1); got 1.0"),
        ),
    ),
    Row("Centralise", opt.Centralise, (opt.Centralise(),), law="stackable", stacked=lambda rule: rule.stacked()),
    Row(
        "GradientNoise",
        opt.GradientNoise,
        (opt.GradientNoise(), opt.GradientNoise(0.5, 0.0, 3)),
        complex=False,
        law="none",
        bad=(
            ({"variance": -1}, HyperParameterError, "GradientNoise: field 'variance' must be a finite number >= 0; got -1"),
            ({"seed": 0.5}, HyperParameterError, "GradientNoise: field 'seed' must be a whole number >= 0; got 0.5"),
        ),
    ),
    Row(
        "Sign",
        opt.Sign,
        (opt.Sign(),),
        differentiable=False,
        bad=(({"eta": 0.1}, UnknownFieldError, "Sign has no field 'eta'"),),
    ),
    Row(
        "TrustRatio",
        opt.TrustRatio,
        (opt.TrustRatio(0.01), opt.TrustRatio(0.1, 1e-6, 1.0)),  # with 1 a step is as long as the parameter
        law="measured",
        bad=(
            *bad_epsilon("TrustRatio"),
            *bad_positive("TrustRatio", "coefficient"),
            ({"most": 0}, HyperParameterError, "TrustRatio: field 'most' must be a number > 0; got 0"),
        ),
    ),
    Row("ClipRMS", opt.ClipRMS, (opt.ClipRMS(), opt.ClipRMS(0.1)), law="measured", bad=bad_positive("ClipRMS", "tau")),
    Row(
        "AdaptiveClip",
        opt.AdaptiveClip,
        (opt.AdaptiveClip(), opt.AdaptiveClip(0.5, 1e-2, "in_out")),
        law="stackable",
        stacked=lambda rule: rule.stacked(),
        bad=(
            *bad_positive("AdaptiveClip", "clipping"),
            ({"layout": "oi"}, HyperParameterError, "AdaptiveClip: field 'layout' must be one of 'out_in', 'in_out'"),
        ),
    ),
    Row(
        "AccumGrad",
        opt.AccumGrad,
        (opt.AccumGrad(2), opt.AccumGrad(1), opt.AccumGrad(n=3)),
        host_counter=True,
        like_x=False,  # the mean of half-precision gradients is kept in float32
        bad=(
            ({}, UnknownFieldError, "AccumGrad needs its field 'n'; write AccumGrad(n=...)"),
            ({"n": 0}, HyperParameterError, "AccumGrad: field 'n' must be a whole number >= 1; got 0"),
            ({"n": 2.0}, HyperParameterError, "AccumGrad: field 'n' must be a whole number >= 1; got 2.0"),
        ),
    ),
    Row(
        "SkipNonFinite",
        opt.SkipNonFinite,
        (opt.SkipNonFinite(), opt.SkipNonFinite("a")),
        law="measured",
        host_counter=True,
        bad=(({"throw": True}, UnknownFieldError, "SkipNonFinite has no field 'throw'. Its fields are: group"),),
    ),
    Row(
        "Averaged",
        opt.Averaged,
        (
            opt.Averaged(opt.Adam()),
            opt.Averaged(opt.Momentum(0.1), 0.5, debias=False),
            opt.Averaged(opt.MixedPrecision(opt.Adam(0.1), "float64"), 0.9),
        ),
        like_x=False,  # the average of a half-precision array is kept in float32
        rates=(1.0, 1.0),
        bad=(
            ({"rule": opt.Adam(), "decay": 1.0}, HyperParameterError, "Averaged: field 'decay' must be in [0, 1); got 1.0"),
            ({}, UnknownFieldError, "Averaged needs its field 'rule'"),
            ({"rule": 0.1}, RuleError, "Averaged(rule, decay): rule must be a rule; got"),
        ),
    ),
    Row(
        "ScheduleFree",
        opt.ScheduleFree,
        (
            opt.ScheduleFree(opt.AdamW(lambda_=0.1)),
            opt.ScheduleFree(opt.Descent(0.1), 0.5, r=0.1, power=0.0),
            opt.ScheduleFree(opt.OptimiserChain(opt.WeightDecay(0.5), opt.RAdam(0.1, (0.0, 0.5)))),
        ),
        like_x=False,  # z of a half-precision array is kept in float32
        rates=(1.0, 0.03),
        bad=(
            ({}, UnknownFieldError, "ScheduleFree needs its field 'rule'"),
            ({"rule": 0.1}, RuleError, "ScheduleFree(rule, beta): rule must be a rule; got"),
            ({"rule": opt.Adam(), "beta": 0}, HyperParameterError, "ScheduleFree: field 'beta' must be in (0, 1); got 0"),
            ({"rule": opt.Adam(), "warmup": -1}, HyperParameterError, "field 'warmup' must be a whole number >= 0; got -1"),
            (
                {"rule": opt.OptimiserChain(opt.ClipGrad(), opt.ScheduleFree(opt.Adam()))},
                RuleError,
                "ScheduleFree inside ScheduleFree would work against itself; remove one of them",
            ),
            (
                {"rule": opt.MixedPrecision(opt.Adam())},
                RuleError,
                "MixedPrecision goes by the new value of the array; put that around: MixedPrecision(ScheduleFree(...))",
            ),
        ),
    ),
    Row(
        "Lookahead",
        opt.Lookahead,
        (opt.Lookahead(opt.Adam(0.1), 2), opt.Lookahead(opt.Momentum(0.1), 3, 0.8)),
        like_x=False,  # slow weights of a half-precision array are kept in float32
        rates=(1.0, 0.3),
        bad=(
            ({"rule": 0.1}, RuleError, "Lookahead(rule, k): rule must be a rule; got"),
            ({"rule": opt.Adam(), "k": 0}, HyperParameterError, "Lookahead: field 'k' must be a whole number >= 1; got 0"),
            ({"rule": opt.Adam(), "alpha": 1.5}, HyperParameterError, "Lookahead: field 'alpha' must be in [0, 1]; got 1.5"),
            ({"rule": opt.Averaged(opt.Adam())}, RuleError, "put that around: Averaged(Lookahead(...))"),
        ),
    ),
    Row(
        "Cautious",
        opt.Cautious,
        (
            opt.Cautious(opt.AdamW(0.1, lambda_=0.1)),
            opt.Cautious(opt.OptimiserChain(opt.ClipNorm(1.0), opt.Momentum(0.1), opt.WeightDecay(0.01))),
        ),
        law="measured",
        rates=(1.0, 0.01),
        bad=(
            ({"rule": 0.1}, RuleError, "Cautious(rule, mask): rule must be a rule; got"),
            ({"rule": opt.Adam(), "mask": "x"}, HyperParameterError, "Cautious: field 'mask' must be one of 'step', 'decay'"),
            ({"rule": opt.ScheduleFree(opt.Adam())}, RuleError, "put that around: ScheduleFree(Cautious(...))"),
        ),
    ),
    Row("Cautious decay", opt.Cautious, (opt.Cautious(opt.AdamW(0.1, lambda_=0.1), mask="decay"),), rates=(1.0, 1.0)),
    Row(
        "Compensated",
        opt.Compensated,
        (opt.Compensated(opt.Momentum(0.1)), opt.Compensated(opt.OptimiserChain(opt.WeightDecay(0.1), opt.Momentum(0.1)))),
        rates=(0.3, 0.003),
        bad=(
            ({"rule": 0.1}, RuleError, "Compensated(rule, _own): rule must be a rule; got"),
            ({"rule": opt.MixedPrecision(opt.Adam())}, RuleError, "put that around: MixedPrecision(Compensated(...))"),
        ),
    ),
    Row(
        "Projected",
        opt.Projected,
        (opt.Projected(opt.Adam(0.1), "non_negative"), opt.Projected(opt.Momentum(0.1), "non_negative")),
        complex=False,
        bad=(
            ({"rule": opt.Adam()}, UnknownFieldError, "Projected needs its field 'onto'"),
            ({"rule": 0.1, "onto": "ball"}, RuleError, "Projected(rule, onto): rule must be a rule; got"),
            (
                {"rule": opt.Adam(), "onto": "simplex"},
                HyperParameterError,
                "field 'onto' must be one of 'non_negative', 'ball', 'unit_rows', or a callable; got 'simplex'",
            ),
            (
                {"rule": opt.Adam(), "onto": "ball", "radius": 0},
                HyperParameterError,
                "'radius' must be a finite number > 0",
            ),
        ),
    ),
    Row(
        "Projected ball",
        opt.Projected,
        (opt.Projected(opt.Adam(0.1), "ball", 20.0),),
        complex=False,
        law="measured",
        rates=(1.0, 1.0),
    ),
    Row("Projected rows", opt.Projected, (opt.Projected(opt.Adam(0.1), "unit_rows", 11.5),), complex=False, law="none"),
    Row(
        "Projected by a callable",
        opt.Projected,
        (opt.Projected(opt.Adam(0.1), halfway),),
        complex=False,
        law="none",
        rebuilds=False,
    ),
    Row(
        "Quantised",
        opt.Quantised,
        (
            opt.Quantised(opt.AdamW(0.1, lambda_=0.1)),
            opt.Quantised(opt.Adam(0.1), block=5),
            opt.Quantised(opt.OptimiserChain(opt.ClipNorm(0.5), opt.Momentum(0.1)), block=4, code="linear"),
        ),
        complex=False,
        law="none",
        like_x=False,  # codes are 8 bits wide, and scales fewer
        rates=(1.0, 0.01),
        bad=(
            ({"rule": 0.1}, RuleError, "Quantised(rule, bits): rule must be a rule; got"),
            ({"rule": opt.Adam(), "bits": 2}, HyperParameterError, "Quantised: field 'bits' must be 8; got 2"),
            ({"rule": opt.Adam(), "block": 0}, HyperParameterError, "field 'block' must be a whole number >= 1; got 0"),
            ({"rule": opt.Adam(), "code": "log"}, HyperParameterError, "field 'code' must be one of 'power', 'linear'"),
            ({"rule": opt.ScheduleFree(opt.Adam())}, RuleError, "put that around: ScheduleFree(Quantised(...))"),
        ),
    ),
    Row(
        "LowRank",
        opt.LowRank,
        (opt.LowRank(opt.Momentum(0.1), 3), opt.LowRank(opt.OptimiserChain(opt.Momentum(0.1), opt.WeightDecay(0.1)), 4, 9)),
        complex=False,
        law="none",
        host_counter=True,
        like_x=False,
        min_ndim=2,
        bad=(
            ({"rule": opt.Adam()}, UnknownFieldError, "LowRank needs its field 'rank'"),
            ({"rule": 0.1, "rank": 2}, RuleError, "LowRank(rule, rank): rule must be a rule; got"),
            ({"rule": opt.Adam(), "rank": 0}, HyperParameterError, "LowRank: field 'rank' must be a whole number >= 1; got 0"),
            ({"rule": opt.Adam(), "rank": 2, "kind": "qr"}, HyperParameterError, "field 'kind' must be one of 'svd', 'random'"),
            ({"rule": opt.Averaged(opt.Adam()), "rank": 2}, RuleError, "put that around: Averaged(LowRank(...))"),
        ),
    ),
    Row(
        "LowRank at random",
        opt.LowRank,
        (
            opt.LowRank(opt.AdamW(0.1, lambda_=0.1), 2, 2, "random"),
            opt.LowRank(opt.Momentum(0.1), 1, 3, "random", residual=True, scale=0.5, seed=1),
        ),
        complex=False,
        law="none",
        like_x=False,
        min_ndim=2,
    ),
    Row(
        "StochasticRounding",
        opt.StochasticRounding,
        (opt.StochasticRounding(opt.Adam()), opt.StochasticRounding(opt.Momentum(0.1), seed=3)),
        law="none",
        refuses=("float16",),
        rates=(1.0, 1.0),
        bad=(
            ({}, UnknownFieldError, "StochasticRounding needs its field 'rule'"),
            ({"rule": 0.1}, RuleError, "StochasticRounding(rule, seed): rule must be a rule; got"),
            ({"rule": opt.Adam(), "seed": 0.5}, HyperParameterError, "field 'seed' must be a whole number >= 0; got 0.5"),
        ),
    ),
    Row(
        "MixedPrecision",
        opt.MixedPrecision,
        (
            opt.MixedPrecision(opt.Adam()),
            opt.MixedPrecision(opt.Momentum(0.1), "float64"),
            opt.MixedPrecision(opt.OptimiserChain(opt.WeightDecay(0.1), opt.Adam(0.1)), "float64"),
        ),
        rates=(1.0, 1.0),
        bad=(
            ({}, UnknownFieldError, "MixedPrecision needs its field 'rule'"),
            ({"rule": 0.1}, RuleError, "MixedPrecision(rule, dtype): rule must be a rule; got"),
            (
                {"rule": opt.MixedPrecision(opt.Adam())},
                RuleError,
                "MixedPrecision inside MixedPrecision would keep two masters of one array",
            ),
            (
                {"rule": opt.Adam(), "dtype": "int32"},
                HyperParameterError,
                "MixedPrecision: field 'dtype' must be a real floating dtype; 'int32' is not one of",
            ),
        ),
    ),
    Row(
        "Scheduled",
        opt.Scheduled,
        (
            opt.Scheduled(opt.AdamW(lambda_=0.1), eta=halving),
            opt.Scheduled(opt.Momentum(), eta=halving, rho=slower),
            opt.Scheduled(opt.OptimiserChain(opt.WeightDecay(), opt.Adam()), eta=halving, lambda_=later),
        ),
        host_counter=True,
        rebuilds=False,
        bad=(
            ({"rule": opt.Adam()}, TypeError, "rule"),
            ({"eta": halving}, TypeError, "rule"),
        ),
    ),
    Row(
        "OptimiserChain",
        opt.OptimiserChain,
        (opt.OptimiserChain(), opt.OptimiserChain(opt.OptimiserChain(opt.WeightDecay(0.1)), opt.Descent(0.1))),
        bad=(({"rule": opt.Adam()}, TypeError, "rule"),),
    ),
    Row(
        "Muon",
        opt.Muon,
        (opt.Muon(), opt.Muon(scale="rms", momentum="ema_debiased"), opt.Muon.preset("dion"), opt.Muon.preset("moonlight")),
        complex=False,
        law="none",
        like_x=False,
        rates=(1.0, 0.3),
        bad=(
            *bad_eta("Muon"),
            *bad_fraction("Muon", "mu"),
            *bad_lambda("Muon"),
            ({"opt": 0.1}, RuleError, "Muon: field 'opt' must be a rule; got 0.1"),
            ({"scale": "keller"}, HyperParameterError, "Muon: field 'scale' must be one of 'jordan'"),
            ({"ns_steps": 3}, UnknownFieldError, "Muon has no field 'ns_steps'; did you mean 'ns'?"),
        ),
    ),
    usual(
        "Kron",
        {"eta": 0.05, "mu": 0.5, "lambda_": 0.1, "refresh": 2, "warmup": 0, "scale": 1.0, "spread": True, "seed": 3},
        {"eta": 0.05, "rate": 0.5, "whiten": "momentum", "max_size": 3, "merge": False, "tau": math.inf, "opt": opt.Lion(0.01)},
        complex=False,
        law="none",
        host_counter=True,
        like_x=False,
        rates=(0.3, 0.03),
        bad=(
            *bad_fraction("Kron", "mu"),
            *bad_fraction("Kron", "rate"),
            ({"opt": 0.1}, RuleError, "Kron: field 'opt' must be a rule; got 0.1"),
            ({"scale": 0}, HyperParameterError, "Kron: field 'scale' must be None or a finite number > 0; got 0"),
            ({"tau": 0}, HyperParameterError, "Kron: field 'tau' must be a number > 0; got 0"),
            ({"whiten": "step"}, HyperParameterError, "Kron: field 'whiten' must be one of 'gradient', 'momentum'; got 'step'"),
            ({"warmup": -1}, HyperParameterError, "Kron: field 'warmup' must be a whole number >= 0; got -1"),
        ),
    ),
    usual(
        "Shampoo",
        {"eta": 0.05, "lambda_": 0.1, "epsilon": 1e-3, "refresh": 2, "rho": 0.9, "spread": True},
        {"eta": 0.05, "epsilon": 1e-2, "power": 0.5, "max_size": 3, "merge": False, "opt": opt.Momentum(0.01)},
        complex=False,
        law="none",
        host_counter=True,
        like_x=False,
        rates=(1.0, 0.1),
        bad=(
            ({"opt": 0.1}, RuleError, "Shampoo: field 'opt' must be a rule; got 0.1"),
            ({"rho": -0.1}, HyperParameterError, "Shampoo: field 'rho' must be None or in [0, 1); got -0.1"),
            ({"power": 0}, HyperParameterError, "Shampoo: field 'power' must be None or a finite number > 0; got 0"),
            ({"refresh": 0}, HyperParameterError, "Shampoo: field 'refresh' must be a whole number >= 1; got 0"),
        ),
    ),
    usual(
        "SOAP",
        {"eta": 0.05, "beta": (0.5, 0.9), "lambda_": 0.1, "refresh": 2, "first": "step", "spread": True, "epsilon": 1e-3},
        {"eta": 0.05, "rho": 0.5, "refresh": 1, "max_size": 3, "merge": False, "opt": opt.Momentum(0.01)},
        complex=False,
        law="none",
        host_counter=True,
        like_x=False,
        rates=(0.3, 0.03),
        bad=(
            ({"opt": 0.1}, RuleError, "SOAP: field 'opt' must be a rule; got 0.1"),
            ({"rho": 1.0}, HyperParameterError, "SOAP: field 'rho' must be None or in [0, 1); got 1.0"),
            ({"refresh": 0}, HyperParameterError, "SOAP: field 'refresh' must be a whole number >= 1; got 0"),
            ({"first": "go"}, HyperParameterError, "SOAP: field 'first' must be one of 'skip', 'step'; got 'go'"),
            ({"max_size": 0}, HyperParameterError, "SOAP: field 'max_size' must be a whole number >= 1; got 0"),
        ),
    ),
    usual(
        "NorMuon",
        {"eta": 0.05, "beta": (0.5, 0.9), "lambda_": 0.1, "epsilon": 1e-3, "nesterov": True},
        {"eta": 0.05, "scale": "jordan", "layout": "in_out"},
        complex=False,
        law="none",
        like_x=False,
        rates=(0.3, 0.1),
        bad=(
            ({"opt": 0.1}, RuleError, "NorMuon: field 'opt' must be a rule; got 0.1"),
            ({"scale": "keller"}, HyperParameterError, "NorMuon: field 'scale' must be one of 'aligned', 'jordan'"),
            ({"blocks": 0}, HyperParameterError, "NorMuon: field 'blocks' must be a whole number >= 1, or a tuple"),
        ),
    ),
    usual(
        "Dion",
        {"eta": 0.05, "mu": 0.5, "lambda_": 0.1, "epsilon": 1e-3, "rank": 2},
        {"eta": 0.05, "rank": 1.0, "scale": "none", "layout": "in_out", "seed": 3, "opt": opt.Momentum(0.01)},
        complex=False,
        law="none",
        like_x=False,
        rates=(0.3, 0.1),
        bad=(
            *bad_fraction("Dion", "mu"),
            (
                {"rank": 0},
                HyperParameterError,
                "Dion: field 'rank' must be a whole number >= 1, or a fraction in (0, 1]; got 0",
            ),
            (
                {"rank": 1.5},
                HyperParameterError,
                "Dion: field 'rank' must be a whole number >= 1, or a fraction in (0, 1]; got",
            ),
            ({"rank": None}, HyperParameterError, "'rank' must be a whole number >= 1, or a fraction in (0, 1]; got None"),
        ),
    ),
    usual(
        "AdaMuon",
        {"eta": 0.05, "beta": (0.5, 0.9), "lambda_": 0.1, "epsilon": 1e-3, "signs": False},
        {"eta": 0.05, "signs": False, "layout": "in_out"},
        complex=False,
        law="none",
        like_x=False,
        rates=(0.3, 0.1),
        bad=(
            ({"fallback": 1}, HyperParameterError, "AdaMuon: field 'fallback' must be None or a predicate on the array; got 1"),
            ({"signs": 1}, HyperParameterError, "AdaMuon: field 'signs' must be True or False; got 1"),
        ),
    ),
    usual(
        "Scion",
        {"eta": 0.05, "mu": 0.5, "lambda_": 0.1, "norm": "rows"},
        {"eta": 0.05, "radius": 2.0, "constrained": True, "norm": "columns", "normalised": False, "opt": opt.Adam(0.1)},
        complex=False,
        law="none",
        like_x=False,
        rates=(0.03, 0.001),
        bad=(
            *bad_fraction("Scion", "mu"),
            *bad_positive("Scion", "radius"),
            (
                {"norm": "nuclear"},
                HyperParameterError,
                "Scion: field 'norm' must be one of 'spectral', 'sign', 'rows'",
            ),
            ({"opt": 0.1}, RuleError, "Scion: field 'opt' must be None or a rule; got 0.1"),
            ({"fallback": bool}, HyperParameterError, "Scion: field 'fallback' chooses what opt steps, but opt is None"),
        ),
    ),
    Row(
        "Orthogonalise",
        opt.Orthogonalise,
        (opt.Orthogonalise(), opt.Orthogonalise(opt.NewtonSchulz(6, "polar_express"), "moonlight", "in_out")),
        complex=False,
        law="stackable",
        min_ndim=2,
        stacked=lambda rule: rule.stacked(),
        bad=(({"blocks": 0}, HyperParameterError, "Orthogonalise: field 'blocks' must be a whole number >= 1, or a tuple"),),
    ),
    Row(
        "Apollo",
        opt.Apollo,
        (opt.Apollo(), opt.Apollo(0.1, 2, 2, False, scale=4.0), opt.Apollo.mini(opt.AdamW(0.1, lambda_=0.1))),
        law="none",
        like_x=False,
        rates=(0.3, 0.03),
        bad=(
            ({"opt": opt.Adam()}, RuleError, "Apollo: field 'opt' must be an AdamW or a learning rate; got Adam("),
            ({"rank": 0}, HyperParameterError, "Apollo: field 'rank' must be None, a whole number >= 1"),
            ({"u": 0}, HyperParameterError, "Apollo: field 'u' must be a whole number >= 1; got 0"),
        ),
    ),
    Row(
        "NormGrowthCap",
        opt.NormGrowthCap,
        (opt.NormGrowthCap(), opt.NormGrowthCap(1.5, 1e-3, 0.0, False, False)),
        complex=False,
        law="measured",
        like_x=False,
        bad=(*bad_positive("NormGrowthCap", "tau"), *bad_epsilon("NormGrowthCap")),
    ),
    Row(
        "GradNormControl",
        opt.GradNormControl,
        (opt.GradNormControl(), opt.GradNormControl(1.5, 1e-3, 0.0, False, False)),
        complex=False,
        law="measured",
        like_x=False,
        bad=(*bad_positive("GradNormControl", "tau"), *bad_epsilon("GradNormControl")),
    ),
    Row(
        "AdaptiveGradNormControl",
        opt.AdaptiveGradNormControl,
        (opt.AdaptiveGradNormControl(), opt.AdaptiveGradNormControl(0.5, 1e-3, 0.0, 0.5, False)),
        complex=False,
        law="measured",
        like_x=False,
        bad=(*bad_positive("AdaptiveGradNormControl", "tau"), *bad_fraction("AdaptiveGradNormControl", "momentum")),
    ),
    Row(
        "ClipGrad > SignDecay > WeightDecay > AdamW",
        opt.OptimiserChain,
        (opt.OptimiserChain(opt.ClipGrad(0.5), opt.SignDecay(), opt.WeightDecay(0.01), opt.AdamW(0.01, lambda_=0.1)),),
        complex=False,
    ),
    Row("ClipNorm > AdamW", opt.OptimiserChain, (opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW()),), law="measured"),
    Row("Adam > ClipNorm", opt.OptimiserChain, (opt.OptimiserChain(opt.Adam(), opt.ClipNorm(1e-3)),), law="measured"),
    Row(
        "ClipNorm > ClipGlobalNorm > Momentum > ClipNorm",
        opt.OptimiserChain,
        (opt.OptimiserChain(opt.ClipNorm(2.0), opt.ClipGlobalNorm(0.5), opt.Momentum(), opt.ClipNorm(1e-3, 1.0)),),
        law="measured",
    ),
    Row(
        "ClipGlobalNorm > Adam",
        opt.OptimiserChain,
        (opt.OptimiserChain(opt.ClipGlobalNorm(0.5), opt.Adam(0.1)),),
        law="measured",
    ),
    Row(
        "AccumGrad > Adam",
        opt.OptimiserChain,
        (opt.OptimiserChain(opt.AccumGrad(2), opt.Adam(0.1)),),
        host_counter=True,
        like_x=False,
    ),
    Row(
        "Scheduled chain",
        opt.OptimiserChain,
        (opt.OptimiserChain(opt.ClipNorm(0.5), opt.Scheduled(opt.AdamW(), eta=halving)),),
        law="measured",
        host_counter=True,
        rebuilds=False,
    ),
    Row(
        "MixedPrecision chain",
        opt.MixedPrecision,
        (opt.MixedPrecision(opt.OptimiserChain(opt.ClipNorm(0.5), opt.AdamW(0.01, lambda_=0.1)), "float64"),),
        law="measured",
    ),
    Row(
        "SkipNonFinite > Adam",
        opt.OptimiserChain,
        (opt.OptimiserChain(opt.SkipNonFinite(), opt.Adam(0.1)),),
        law="measured",
        host_counter=True,
    ),
    Row("a user's rule", SignedRoot, (SignedRoot(), SignedRoot(0.5)), law="none", bad=bad_eta("SignedRoot")),
    Row("a user's stackable rule", Centred, (Centred(),), law="stackable", min_ndim=1, stacked=lambda rule: rule),
    Row("a user's measured rule", MeanScaled, (MeanScaled(),), law="measured"),
)


def cases(*, every: bool = True, **claims: Any) -> list[tuple[str, Row, opt.AbstractRule]]:
    """(id, row, rule) for the configurations of all rows (or their first one only) with these claims."""
    return [
        (f"{row.name}-{i}" if i else row.name, row, rule)
        for row in ROWS
        if all(getattr(row, name) == value for name, value in claims.items())
        for i, rule in enumerate(row.configs if every else row.configs[:1])
    ]
