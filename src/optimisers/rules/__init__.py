"""The rules: one algorithm a file, one line here."""

from ._base import AbstractRule as AbstractRule
from ._base import MeasuredRule as MeasuredRule
from .accumgrad import AccumGrad as AccumGrad
from .adabelief import AdaBelief as AdaBelief
from .adadelta import AdaDelta as AdaDelta
from .adagrad import AdaGrad as AdaGrad
from .adam import Adam as Adam
from .adamax import AdaMax as AdaMax
from .adamw import AdamW as AdamW
from .adaptivegradnormcontrol import AdaptiveGradNormControl as AdaptiveGradNormControl
from .amsgrad import AMSGrad as AMSGrad
from .apollo import Apollo as Apollo
from .averaged import Averaged as Averaged
from .chain import OptimiserChain as OptimiserChain
from .clipglobalnorm import ClipGlobalNorm as ClipGlobalNorm
from .clipgrad import ClipGrad as ClipGrad
from .clipnorm import ClipNorm as ClipNorm
from .descent import Descent as Descent
from .gradnormcontrol import GradNormControl as GradNormControl
from .lion import Lion as Lion
from .matrix_step import Orthogonalise as Orthogonalise
from .mixedprecision import MixedPrecision as MixedPrecision
from .momentum import Momentum as Momentum
from .muon import Muon as Muon
from .nadam import NAdam as NAdam
from .nesterov import Nesterov as Nesterov
from .newtonschulz import NewtonSchulz as NewtonSchulz
from .newtonschulz import orthogonalise as orthogonalise
from .normgrowthcap import NormGrowthCap as NormGrowthCap
from .oadam import OAdam as OAdam
from .radam import RAdam as RAdam
from .rmsprop import RMSProp as RMSProp
from .rprop import Rprop as Rprop
from .scheduled import Scheduled as Scheduled
from .signdecay import SignDecay as SignDecay
from .skipnonfinite import SkipNonFinite as SkipNonFinite
from .stochasticrounding import StochasticRounding as StochasticRounding
from .weightdecay import WeightDecay as WeightDecay

# Not an assignment, since type checkers and documentation tools read the imports above but cannot evaluate this.
globals()["__all__"] = [name for name, value in vars().items() if getattr(value, "__module__", "").startswith(__name__)]
