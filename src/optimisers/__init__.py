"""Composable optimisation rules over trees of NumPy and PyTorch arrays.

``state = setup(rule, model)``, ``state, model = update(state, model, grads)``, ``state = adjust(state, eta)``.
"""

from typing import TYPE_CHECKING

from .errors import *
from .rules import *
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

if not TYPE_CHECKING:  # type checkers read the imports above, and cannot evaluate this
    __all__ = [name for name, value in vars().items() if getattr(value, "__module__", "").startswith(__name__)]
