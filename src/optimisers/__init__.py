"""Composable optimisation rules over trees of NumPy and PyTorch arrays.

``state = setup(rule, model)``, ``state, model = update(state, model, grads)``, ``state = adjust(state, eta)``.
"""

from .errors import (
    ArgumentError as ArgumentError,
)
from .errors import (
    ConsumedStateError as ConsumedStateError,
)
from .errors import (
    GradientError as GradientError,
)
from .errors import (
    HyperParameterError as HyperParameterError,
)
from .errors import (
    ModelError as ModelError,
)
from .errors import (
    NonFiniteError as NonFiniteError,
)
from .errors import (
    OptimisersError as OptimisersError,
)
from .errors import (
    RuleError as RuleError,
)
from .errors import (
    SelectionError as SelectionError,
)
from .errors import (
    StructureError as StructureError,
)
from .errors import (
    TieError as TieError,
)
from .errors import (
    UnknownFieldError as UnknownFieldError,
)
from .rules import (
    AbstractRule as AbstractRule,
)
from .rules import (
    AccumGrad as AccumGrad,
)
from .rules import (
    AdaBelief as AdaBelief,
)
from .rules import (
    AdaDelta as AdaDelta,
)
from .rules import (
    AdaGrad as AdaGrad,
)
from .rules import (
    Adam as Adam,
)
from .rules import (
    AdaMax as AdaMax,
)
from .rules import (
    AdamW as AdamW,
)
from .rules import (
    AMSGrad as AMSGrad,
)
from .rules import (
    ClipGlobalNorm as ClipGlobalNorm,
)
from .rules import (
    ClipGrad as ClipGrad,
)
from .rules import (
    ClipNorm as ClipNorm,
)
from .rules import (
    Descent as Descent,
)
from .rules import (
    Lion as Lion,
)
from .rules import (
    MeasuredRule as MeasuredRule,
)
from .rules import (
    MixedPrecision as MixedPrecision,
)
from .rules import (
    Momentum as Momentum,
)
from .rules import (
    NAdam as NAdam,
)
from .rules import (
    Nesterov as Nesterov,
)
from .rules import (
    OAdam as OAdam,
)
from .rules import (
    OptimiserChain as OptimiserChain,
)
from .rules import (
    RAdam as RAdam,
)
from .rules import (
    RMSProp as RMSProp,
)
from .rules import (
    Rprop as Rprop,
)
from .rules import (
    Scheduled as Scheduled,
)
from .rules import (
    SignDecay as SignDecay,
)
from .rules import (
    WeightDecay as WeightDecay,
)
from .setup_api.adjust import adjust as adjust
from .setup_api.freeze import freeze as freeze
from .setup_api.freeze import thaw as thaw
from .setup_api.route import Route as Route
from .setup_api.setup import setup as setup
from .setup_api.update import update as update
from .setup_api.update import update_ as update_
from .tree.destructure import destructure as destructure
from .tree.destructure import trainables as trainables
from .tree.param import Param as Param
from .tree.state import Leaf as Leaf
from .tree.state import StateTree as StateTree

__version__ = "0.1.0"
