"""From C source to functions: the compiler that the system has, and a directory where what it made is kept."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

from ....errors import CompileWarning

# No option that changes results: products and sums stay apart, NaN and infinity keep their meaning.
_FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip

compilations = 0
"""How often the compiler ran in this process."""


def switch() -> str:
    """``OPTIMISERS_COMPILE``: ``"auto"`` (the default), ``"0"`` never, ``"1"`` always, however small the arrays are.

    What is not compiled is run by NumPy, block by block.
    """
    return os.environ.get("OPTIMISERS_COMPILE", "auto")


@cache
def compiler() -> tuple[str, ...] | None:
    """The command of the C compiler: ``CC`` if it is set, else the first of cc, gcc and clang; None if there is none."""
    if os.name != "posix":
        return None
    if given := os.environ.get("CC"):
        words = tuple(shlex.split(given))
        return words if words and shutil.which(words[0]) else None
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return (found,) if found else None


_failed = False


def warn_once(reason: str) -> None:
    """One warning a process that loops are not compiled."""
    global _failed  # noqa: PLW0603
    if not _failed:
        _failed = True
        msg = (
            f"optimisers steps arrays without compiled loops, since {reason}. Results are the same and steps slower; set "
            "OPTIMISERS_COMPILE=0 to do so without this warning, or CC to a C compiler"
        )
        warnings.warn(msg, CompileWarning, stacklevel=2)


def built(source: str) -> ctypes.CDLL | None:
    """The library of a source, compiled if it is not there yet; None, with one warning, if that cannot be done.

    What cannot be kept or loaded where libraries are kept (a full disk, a folder that has become read-only, one from which
    nothing may be run) is made once more in a folder of this process.
    """
    command = compiler()
    if command is None:
        warn_once("there is no C compiler")
        return None
    try:
        try:
            return _loaded(command, source, cached())
        except OSError:
            return _loaded(command, source, _own_directory())
    except subprocess.CalledProcessError as error:
        warn_once(f"{command[0]} fails: {(error.stderr or '').strip()[-400:]}")
    except (OSError, subprocess.SubprocessError) as error:
        warn_once(f"{command[0]} cannot be used: {error}")
    return None


def is_kept(source: str) -> bool:
    """Whether the library of a source is there, from an earlier process or another."""
    command = compiler()
    try:
        return command is not None and any(cached().glob(f"{_key(command, source)}-*.so"))
    except (OSError, subprocess.SubprocessError):
        return False


def _flags() -> tuple[str, ...]:
    arm = sys.platform == "darwin" and platform.machine() == "arm64"
    return tuple(flag for flag in _FLAGS if not (flag == "-march=native" and arm))


def _key(command: tuple[str, ...], source: str) -> str:
    """What the library of a source depends on."""
    return hashlib.sha256("\0".join((*command, _version(command), *_flags(), _machine(), source)).encode()).hexdigest()[:32]


def _loaded(command: tuple[str, ...], source: str, directory: Path) -> ctypes.CDLL:
    """The library from this directory, after it was compiled if no intact one is there. Raises OSError."""
    key = _key(command, source)
    for path in directory.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError):
            if path.name == _name(key, path):
                return ctypes.CDLL(str(path))
            path.unlink()
    return ctypes.CDLL(str(_compiled(command, source, directory, key)))


def _name(key: str, library: Path) -> str:
    """What a library is called: it holds a digest of the content, since to open one that was cut off ends the process."""
    if not library.is_file():
        return ""
    with library.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(key.encode()))
    return f"{key}-{digest.hexdigest()[:32]}.so"


def _compiled(command: tuple[str, ...], source: str, directory: Path, key: str) -> Path:
    global compilations  # noqa: PLW0603
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        file = Path(scratch) / "loop.c"
        file.write_text(source)
        made = Path(scratch) / "loop.so"
        subprocess.run(  # noqa: S603 (the user's own compiler)
            [*command, *_flags(), str(file), "-o", str(made), "-lm"], check=True, capture_output=True, text=True, timeout=120
        )
        compilations += 1
        # Whole or not at all, whoever else compiles the same now.
        return made.replace(directory / _name(key, made))


@cache
def _version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout  # noqa: S603


@cache
def _machine() -> str:
    """What -march=native depends on: a home directory may be shared by machines of different kinds."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.platform() + platform.processor()
    lines = info.splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def cached() -> Path:
    """The directory in which what was compiled is kept."""
    return _directory(os.environ.get("OPTIMISERS_CACHE"))


@cache
def _directory(given: str | None) -> Path:
    """Where libraries are kept: ``OPTIMISERS_CACHE``, else the user's cache.

    A directory that others could write to is not used, since what lies in it is run.
    """
    path = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optimisers"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(path, os.W_OK):
            return path
    except (OSError, RuntimeError):
        pass
    return _own_directory()


@cache
def _own_directory() -> Path:
    """A folder for this process alone."""
    temporary = tempfile.TemporaryDirectory(prefix="optimisers-")
    atexit.register(temporary.cleanup)
    return Path(temporary.name)
