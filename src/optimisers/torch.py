"""The library in the place of ``torch.optim``: ``import optimisers.torch``."""

from .interop.torch_optimizer import Optimizer
from .interop.torch_state import from_torch, to_torch

__all__ = ["Optimizer", "from_torch", "to_torch"]
