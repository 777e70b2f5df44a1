"""What the host may know of an array: its value, where it lies, and whether two share memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np

from ..errors import RuleError
from ._kinds import Array, kind, torch_if_loaded, torch_part
from ._traced import Traced

_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


@contextmanager
def recording() -> Iterator[None]:
    """While a step is recorded, to be run again with other values: nothing may be decided by the values of now."""
    token = _RECORDING.set(True)
    try:
        yield
    finally:
        _RECORDING.reset(token)


def is_compiling() -> bool:
    """Whether ``torch.compile`` is at work, so that what runs now is being recorded."""
    torch = torch_if_loaded()
    return torch is not None and bool(torch.compiler.is_compiling())


def without_autocast() -> AbstractContextManager[Any]:
    """A context in which arithmetic does not depend on ``torch.autocast``: that is for the forward pass."""
    return nullcontext() if torch_if_loaded() is None else torch_part().without_autocast()


def is_recording() -> bool:
    """Whether a step is being recorded now."""
    return _RECORDING.get()


def is_concrete(x: Array) -> bool:
    """Whether the value of x can be read on the host now: not inside a transform, a trace or an autograd graph."""
    if kind(x) != "torch":
        return True
    from . import _torch

    return _torch.is_concrete(x)


def can_read(x: Array) -> bool:
    """Whether the value of x can be read at all (it may cost a synchronisation): not inside a transform or a trace."""
    if kind(x) != "torch":
        return True
    from . import _torch

    return not _RECORDING.get() and _torch.can_read(x)


def is_plain(x: Array) -> bool:
    """Whether x is an array of its library itself, in the order of its indices, and now to be had: not in a transform."""
    if kind(x) != "torch":
        return type(x) is np.ndarray and x.flags.c_contiguous
    from . import _torch

    return _torch.is_plain(x)


def share_memory(a: Array, b: Array) -> bool:
    """Whether two arrays may lie in the same memory."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.may_share_memory(a, b))
    if kind(a) != "torch" or kind(b) != "torch":
        return False
    from . import _torch

    return _torch.same_storage(a, b)


def memory_key(x: Array) -> int | None:
    """What is the same for two arrays that lie in one allocation, or None where that cannot be known."""
    if isinstance(x, np.ndarray):
        while isinstance(x.base, np.ndarray):
            x = x.base
        return id(x) if x.base is None else id(x.base)
    if kind(x) != "torch":
        return None
    from . import _torch

    return _torch.memory_key(x)


def address(x: Array) -> tuple[str, int] | None:
    """Device and address of the first element; None for an empty array and where tensors have no address."""
    if 0 in x.shape:
        return None
    if isinstance(x, np.ndarray):
        return "numpy", x.ctypes.data
    from . import _torch

    return _torch.memory_of(x)


def detached(x: Array) -> Array:
    """x outside any graph; NumPy arrays and numbers as they are."""
    return x.detach() if kind(x) == "torch" else x


def on_meta(x: Array) -> Array:
    """A tensor's description, as a tensor on torch's ``meta`` device; NumPy arrays as they are."""
    if kind(x) != "torch":
        return x
    if hasattr(x, "full_tensor"):  # a DTensor: as it is in one piece
        torch: Any = torch_if_loaded()
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return x.detach().to("meta")


def copied(x: Array) -> Array:
    """x in memory of its own, laid out as x is."""
    return x.copy(order="K") if isinstance(x, np.ndarray) else x.clone()


def host_int(value: Array, what: str) -> int:
    """A counter as a Python int. Inside ``torch.func`` transforms and ``torch.compile`` it cannot be read: RuleError."""
    recorded = _RECORDING.get()
    if isinstance(value, (int, np.integer)) and not recorded:
        return int(value)
    if isinstance(value, Traced):
        return value  # type: ignore[return-value]
    if recorded or not is_concrete(value):
        msg = (
            f"{what} decides from a step counter on the host, which cannot be read inside torch.func.vmap or torch.compile; "
            f"call update outside the transform, or use a rule without {what}"
        )
        raise RuleError(msg)
    return int(value)


def read_int(value: Array, what: str) -> int:
    """A number as a Python int, at the cost of a synchronisation. Inside transforms and traces it cannot be: RuleError."""
    if not can_read(value):
        msg = (
            f"{what} decides on the host whether to step, from the values of the gradients, which cannot be read inside "
            f"torch.func transforms or torch.compile; call update outside of them, or use a rule without {what}"
        )
        raise RuleError(msg)
    return int(value)
