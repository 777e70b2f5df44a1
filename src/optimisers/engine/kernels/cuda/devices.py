"""Which devices have kernels, found out once for each."""

from __future__ import annotations

import warnings
from typing import Any

from ....arrays import torch_if_loaded
from ....errors import CaptureError, CompileWarning
from ..c import compiler
from . import nvrtc
from .driver import Gpu
from .kernels import Device

known: dict[Any, Device | None] = {}
"""The devices that were asked for, by torch's name; None for those without kernels."""


def device_of(x: Any) -> Device | None:
    """The device on which a tensor lies, if kernels can be made for it; None for the host, and for others."""
    torch: Any = torch_if_loaded()
    if torch is None or not isinstance(x, torch.Tensor):
        return None
    try:
        found = known[x.device]
    except KeyError:
        found = known[x.device] = _found(x.device)
    return found if found is None or compiler.switch() != "0" else None


def _found(device: Any) -> Device | None:
    torch: Any = torch_if_loaded()
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        nvrtc.library()
        return Gpu(device)
    except nvrtc.CompilationFailed as reason:
        warn_once(device, str(reason))
        return None


def refuse_capture() -> None:
    """Raise CaptureError inside the capture of a CUDA graph: counters and rates are numbers of the host.

    A replay would take the same step again and again, whatever the state says and however rates are adjusted.
    """
    torch: Any = torch_if_loaded()
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        msg = (
            "a step cannot be captured in a CUDA graph: its counters and learning rates are numbers of the host, which each "
            "replay would repeat. Capture the loss and its gradients alone, and call update_ after each replay; nothing was "
            "changed"
        )
        raise CaptureError(msg)


_warned: set[str] = set()


def warn_once(device: Any, reason: str) -> None:
    """One warning a device that its arrays are stepped without kernels of their own."""
    if str(device) not in _warned:
        _warned.add(str(device))
        msg = (
            f"optimisers steps arrays on {device} by torch's own operations, since {reason}. Results are the same and steps "
            "slower; set OPTIMISERS_COMPILE=0 to do so without this warning"
        )
        warnings.warn(msg, CompileWarning, stacklevel=2)
