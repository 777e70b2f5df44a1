"""NVRTC, the compiler that every CUDA build of torch brings: from source to a binary for one architecture."""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# As for the loops of the host: products and sums stay apart, quotients and roots are rounded as they should be.
OPTIONS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")


class CompilationFailed(Exception):  # noqa: N818 (a signal: the caller falls back)
    """There is no compiler, or it refuses."""


class Binary(NamedTuple):
    """What was compiled, and what the compiler has to say of it."""

    image: bytes
    log: str


@cache
def library() -> Any:
    """NVRTC; CompilationFailed if there is none."""
    for name in _candidates():
        try:
            found = ctypes.CDLL(name)
            found.nvrtcVersion.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return found
    raise CompilationFailed("NVRTC is not found, which CUDA builds of torch bring (as a package: nvidia-cuda-nvrtc)")


def _candidates() -> Iterator[str]:
    """Where NVRTC may be: torch's own stub first, whose search path knows; then its packages; then the system's."""
    torch = sys.modules.get("torch")
    if torch is not None:
        yield str(Path(torch.__file__ or "").parent / "lib" / "libcaffe2_nvrtc.so")
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu11"):
        try:
            files = importlib.metadata.files(package) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        yield from (str(file.locate()) for file in files if file.name.startswith("libnvrtc.so"))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@cache
def version() -> tuple[int, int]:
    """The version of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def compiled(text: str, architecture: str, *options: str) -> Binary:
    """The binary of a source for an architecture such as ``"sm_90"``; CompilationFailed if there is none."""
    nvrtc, program = library(), ctypes.c_void_p()
    given = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS, *options)]
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"optimisers.cu", 0, None, None), "nvrtcCreateProgram"
    )
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        log = _bytes_of(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise CompilationFailed(f"NVRTC fails for {architecture}: {log.strip()[-400:] or f'error {failed}'}")
        return Binary(_bytes_of(program, "CUBIN" if architecture.startswith("sm_") else "PTX"), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes_of(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    found = ctypes.create_string_buffer(size.value)
    _check(getattr(library(), f"nvrtcGet{what}")(program, found), f"nvrtcGet{what}")
    return found.raw


def _check(error: int, call: str) -> None:
    if error:
        raise CompilationFailed(f"{call} fails with error {error}")
