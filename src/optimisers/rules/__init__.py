"""The rules: one algorithm a file, one line here. The rooms they stand in are the sections of the documentation."""

from ._base import AbstractRule as AbstractRule
from ._base import MeasuredRule as MeasuredRule
from .adaptive.adabelief import AdaBelief as AdaBelief
from .adaptive.adadelta import AdaDelta as AdaDelta
from .adaptive.adagrad import AdaGrad as AdaGrad
from .adaptive.adam import Adam as Adam
from .adaptive.adamax import AdaMax as AdaMax
from .adaptive.adamw import AdamW as AdamW
from .adaptive.adan import Adan as Adan
from .adaptive.ademamix import AdEMAMix as AdEMAMix
from .adaptive.adopt import Adopt as Adopt
from .adaptive.amsgrad import AMSGrad as AMSGrad
from .adaptive.laprop import LaProp as LaProp
from .adaptive.nadam import NAdam as NAdam
from .adaptive.oadam import OAdam as OAdam
from .adaptive.radam import RAdam as RAdam
from .adaptive.rmsprop import RMSProp as RMSProp
from .adaptive.yogi import Yogi as Yogi
from .decay.signdecay import SignDecay as SignDecay
from .decay.weightdecay import WeightDecay as WeightDecay
from .descent.descent import Descent as Descent
from .descent.momentum import Momentum as Momentum
from .descent.nesterov import Nesterov as Nesterov
from .gradients.accumgrad import AccumGrad as AccumGrad
from .gradients.centralise import Centralise as Centralise
from .gradients.gradientnoise import GradientNoise as GradientNoise
from .gradients.grokfast import GrokFast as GrokFast
from .gradients.skipnonfinite import SkipNonFinite as SkipNonFinite
from .limits.adaptiveclip import AdaptiveClip as AdaptiveClip
from .limits.adaptivegradnormcontrol import AdaptiveGradNormControl as AdaptiveGradNormControl
from .limits.clipglobalnorm import ClipGlobalNorm as ClipGlobalNorm
from .limits.clipgrad import ClipGrad as ClipGrad
from .limits.clipnorm import ClipNorm as ClipNorm
from .limits.cliprms import ClipRMS as ClipRMS
from .limits.gradnormcontrol import GradNormControl as GradNormControl
from .limits.normgrowthcap import NormGrowthCap as NormGrowthCap
from .limits.trustratio import TrustRatio as TrustRatio
from .matrices.apollo import Apollo as Apollo
from .matrices.matrix_step import Orthogonalise as Orthogonalise
from .matrices.muon import Muon as Muon
from .matrices.newtonschulz import NewtonSchulz as NewtonSchulz
from .matrices.newtonschulz import orthogonalise as orthogonalise
from .sign.lion import Lion as Lion
from .sign.rprop import Rprop as Rprop
from .sign.sign import Sign as Sign
from .wrappers.averaged import Averaged as Averaged
from .wrappers.cautious import Cautious as Cautious
from .wrappers.chain import OptimiserChain as OptimiserChain
from .wrappers.lookahead import Lookahead as Lookahead
from .wrappers.mixedprecision import MixedPrecision as MixedPrecision
from .wrappers.scheduled import Scheduled as Scheduled
from .wrappers.schedulefree import ScheduleFree as ScheduleFree
from .wrappers.stochasticrounding import StochasticRounding as StochasticRounding

# Not an assignment, since type checkers and documentation tools read the imports above but cannot evaluate this.
globals()["__all__"] = [name for name, value in vars().items() if getattr(value, "__module__", "").startswith(__name__)]
