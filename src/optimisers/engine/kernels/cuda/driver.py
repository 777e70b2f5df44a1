"""A CUDA device: kernels are compiled for it or read from the disk, loaded, and launched on torch's current stream."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ....arrays import torch_if_loaded
from ..c import compiler
from . import nvrtc
from .templates import THREADS

_INVALID_CONTEXT = 201
_DIGEST = 32  # bytes of a digest at the beginning of a file


class Gpu:
    """One CUDA device, as far as kernels go."""

    def __init__(self, device: Any) -> None:
        torch: Any = torch_if_loaded()
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self._cuda, self._from_numpy = torch.cuda, torch.from_numpy
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._stream, self._current_device = torch._C._cuda_getCurrentRawStream, torch.cuda.current_device
        self._cu_launch = _driver().cuLaunchKernel
        self._cu_launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]

    def load(self, text: str, names: Sequence[str]) -> list[int]:
        """The kernels of these names; CompilationFailed if there is no compiler for this device."""
        image, module, found = binary(text, self.architecture), ctypes.c_void_p(), []
        with self._cuda.device(self._index):
            self._bind()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
            for name in names:
                function = ctypes.c_void_p()
                _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
                found.append(function.value or 0)
        return found

    def stream(self) -> int:
        """The current stream of torch."""
        return int(self._stream(self._index))

    def launch(self, function: int, blocks: int, arguments: int) -> None:
        """Launch a kernel on the current stream; ``arguments`` is the address of its arguments' addresses."""
        if self._current_device() == self._index:
            self._launch(function, blocks, arguments)
        else:
            with self._cuda.device(self._index):
                self._launch(function, blocks, arguments)

    def _launch(self, function: int, blocks: int, arguments: int) -> None:
        given = (function, blocks, 1, 1, THREADS, 1, 1, 0, self.stream(), arguments, None)
        error = self._cu_launch(*given)
        if error == _INVALID_CONTEXT:
            self._bind()
            error = self._cu_launch(*given)
        if error:
            raise RuntimeError(f"a kernel cannot be launched on {self.device}: cuLaunchKernel fails with error {error}")

    def upload(self, array: np.ndarray[Any, Any]) -> Any:
        """A table on the device. Nothing waits: torch keeps the pinned memory until it has been copied."""
        return self._from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def _bind(self) -> None:
        """Give a thread that has not used the device, the current one, its primary context, which is torch's."""
        context, device = ctypes.c_void_p(), ctypes.c_int()
        _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        if not context.value:
            _check(_driver().cuDeviceGet(ctypes.byref(device), self._index), "cuDeviceGet")
            _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
            _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise nvrtc.CompilationFailed(f"the CUDA driver is not found: {error}") from None


def _check(error: int, call: str) -> None:
    if error:
        raise nvrtc.CompilationFailed(f"{call} fails with error {error}")


def binary(text: str, architecture: str) -> bytes:
    """What a source was compiled to, from the directory of the loops if it is there.

    A file begins with the digest of the rest, so that one that is broken is not loaded but made anew.
    """
    key = "\0".join((architecture, repr(nvrtc.version()), *nvrtc.OPTIONS, text))
    path = compiler.cached() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    if len(kept) > _DIGEST and hashlib.sha256(kept[_DIGEST:]).digest() == kept[:_DIGEST]:
        return kept[_DIGEST:]
    image = nvrtc.compiled(text, architecture).image
    _keep(path, hashlib.sha256(image).digest() + image)
    return image


def _keep(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whoever else writes the same now."""
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)  # a full disk: it is compiled again next time
