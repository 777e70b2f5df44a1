"""Composable optimisation rules over trees of NumPy and PyTorch arrays.

``state = setup(rule, model)``, ``state, model = update(state, model, grads)``, ``state = adjust(state, eta)``.
"""

from . import schedules as schedules
from .errors import *
from .interop.checkpoint import load as load
from .interop.checkpoint import save as save
from .rules import *
from .setup_api.adjust import adjust as adjust
from .setup_api.ascend import ascend as ascend
from .setup_api.averaged import averaged as averaged
from .setup_api.estimate import Estimate as Estimate
from .setup_api.estimate import estimate as estimate
from .setup_api.extend import extend as extend
from .setup_api.freeze import freeze as freeze
from .setup_api.freeze import thaw as thaw
from .setup_api.hyper import hyper as hyper
from .setup_api.metrics import Metrics as Metrics
from .setup_api.metrics import metrics as metrics
from .setup_api.review import review as review
from .setup_api.route import Route as Route
from .setup_api.setup import setup as setup
from .setup_api.skipped import skipped as skipped
from .setup_api.summary import summary as summary
from .setup_api.to import to as to
from .setup_api.update import update as update
from .setup_api.update import update_ as update_
from .tree.destructure import destructure as destructure
from .tree.destructure import trainables as trainables
from .tree.entry import Leaf as Leaf
from .tree.param import Param as Param
from .tree.state import StateTree as StateTree

__version__ = "0.1.0"

# Not an assignment, since type checkers and documentation tools read the imports above but cannot evaluate this.
globals()["__all__"] = ["schedules", *(k for k, v in vars().items() if getattr(v, "__module__", "").startswith(__name__))]
