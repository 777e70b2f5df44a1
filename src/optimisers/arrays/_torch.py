"""What only concerns torch tensors. Imported only once a tensor has been seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch._C import _functorch  # the only way to tell a tensor inside a torch.func transform
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _pytree


def is_transformed(x: torch.Tensor) -> bool:
    """Whether x is seen from inside a ``torch.func`` transform (vmap, grad, jvp)."""
    if torch.compiler.is_compiling():  # the tracer runs transforms itself, and shows plain tensors
        return False
    return bool(_functorch.is_functorch_wrapped_tensor(x))


_AUTOCASTING = ("cpu", "cuda", "mps", "xpu")
_is_any_autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def without_autocast() -> AbstractContextManager[Any]:
    """A context in which products are computed in the dtypes of what is multiplied, whatever ``torch.autocast`` says."""
    if not _is_any_autocast_enabled():
        return nullcontext()
    stack = ExitStack()
    for device in _AUTOCASTING:
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def plain(x: torch.Tensor) -> torch.Tensor:
    """x without a class of its own, if it has memory of its own."""
    if type(x) in {torch.Tensor, torch.nn.Parameter} or is_wrapper(x):
        return x
    return x.as_subclass(torch.Tensor)


def is_wrapper(x: torch.Tensor) -> bool:
    """Whether x is of a class that says itself what operations do to it, such as one that wraps other tensors."""
    return type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _is_forward() -> bool:
    return forward_ad._current_level >= 0  # what ``dual_level`` counts; torch has no function that tells it


def has_tangent(x: torch.Tensor) -> bool:
    """Whether x is a dual tensor of ``torch.autograd.forward_ad``."""
    return _is_forward() and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def is_differentiated(x: torch.Tensor) -> bool:
    """Whether a derivative may be taken of what is computed from x: in a graph, a transform, forward mode, or a trace."""
    return x.requires_grad or torch.compiler.is_compiling() or is_transformed(x) or has_tangent(x)


def is_ordinary() -> bool:
    """Whether tensors are what they seem: no trace, transform, forward mode or dispatch mode is active."""
    if torch.compiler.is_compiling() or _functorch.maybe_current_level() is not None or _is_forward():
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def is_concrete(x: torch.Tensor) -> bool:
    """Whether ``x.item()`` would give x's value, without a graph and without leaving the host."""
    if torch.compiler.is_compiling() or x.requires_grad or x.device.type != "cpu":
        return False
    return not (is_transformed(x) or isinstance(x, FakeTensor))


def can_read(x: torch.Tensor) -> bool:
    """Whether ``x.item()`` would give x's value."""
    if torch.compiler.is_compiling():
        return False
    return not (is_transformed(x) or isinstance(x, FakeTensor) or x.device.type == "meta")


def is_plain(x: torch.Tensor) -> bool:
    """Whether x is a strided tensor of no special class, contiguous, and outside of transforms and traces."""
    if torch.compiler.is_compiling() or type(x) not in {torch.Tensor, torch.nn.Parameter} or x.layout != torch.strided:
        return False
    return x.is_contiguous() and not is_transformed(x)


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are views of one storage."""
    if memory_of(a) is None or memory_of(b) is None or a.device != b.device:
        return False
    return _storage_address(a) == _storage_address(b)


def memory_key(x: torch.Tensor) -> int | None:
    """The address of the storage, or None for a tensor without one."""
    return None if memory_of(x) is None else _storage_address(x) or None


def scalar(value: float) -> torch.Tensor:
    """A 0-d tensor on the host: float64 for a float, int64 for an int."""
    dtype = torch.int64 if isinstance(value, int) else torch.float64
    return torch.tensor(value, dtype=dtype, device="cpu")


def memory_of(x: torch.Tensor) -> tuple[Any, int] | None:
    """(owner of the memory, address of the first element), or None where tensors have no address."""
    if torch.compiler.is_compiling():
        return None
    if is_transformed(x) or isinstance(x, FakeTensor) or x.is_meta or x.layout != torch.strided or x._is_zerotensor():
        return None
    return None if _storage_address(x) is None else (str(x.device), x.data_ptr())


def _storage_address(x: torch.Tensor) -> int | None:
    """Where the storage begins; None for a subclass that only wraps other tensors."""
    try:
        return x.untyped_storage().data_ptr()
    except RuntimeError:
        return None


def quick_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix units (CUDA from compute capability 8.0 on)."""
    if device.type != "cuda":
        return False
    if not torch.cuda.is_available():
        return True  # a fake device stands for a modern one
    return torch.cuda.get_device_capability(device) >= (8, 0)


def register_pytree(cls: type, flatten: Callable[[Any], tuple[list[Any], Any]], unflatten: Callable[[Any, Any], Any]) -> None:
    """Make a class a node of torch's own pytree, through which ``torch.func`` and ``torch.compile`` see."""
    _pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"optimisers.{cls.__name__}")


def pytree_module() -> Any:
    """torch's own pytree."""
    return _pytree
