"""Running a function that shares out its work on as many threads as the libraries use."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from ...arrays import torch_if_loaded

_ALONE = 2**18  # less than this is not worth a second thread that has to be woken
_TOGETHER = 2**15  # less than this for each is not worth a second thread that torch keeps awake

_openmp: Any = None
_forked = False


def on_threads_of_torch(function: Any, entry: Any, given: int, elements: int) -> None:
    """Run a pass on torch's own OpenMP threads where it has such, else on threads of our own.

    Autograd and matrix products have used the same threads just before. They go on looking for work for a while, so others
    would have to share the cores with them, and products after it would wait for both. NumPy's products have other threads.
    """
    global _openmp  # noqa: PLW0603
    count = elements // _TOGETHER
    count = min(threads(), count) if count > 1 else 1
    if count <= 1:
        function(given)
        return
    if _openmp is None and torch_if_loaded() is not None:
        _openmp = getattr(ctypes.CDLL(None), "GOMP_parallel", False)
        if _openmp:
            _openmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            _openmp.restype = None
    if _openmp and not _forked:  # OpenMP's threads do not survive a fork, and it does not see that they are gone
        _openmp(entry, given, count, 0)
    else:
        on_threads(function, (given,), elements)


_pool: ThreadPoolExecutor | None = None


def threads() -> int:
    """How many threads to use: as many as torch does, or OMP_NUM_THREADS, or the processors of this process."""
    torch = torch_if_loaded()
    if torch is not None:
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def on_threads(function: Any, arguments: tuple[Any, ...], elements: int) -> None:
    """Run a function that shares out its work, on as many threads as that is worth."""
    global _pool  # noqa: PLW0603
    others = elements // _ALONE
    others = min(threads() - 1, others) if others else 0
    if others <= 0:
        function(*arguments)
        return
    if _pool is None or _pool._max_workers < others:
        _pool = ThreadPoolExecutor(others, "optimisers")
    helpers: list[Future[Any]] = []
    with suppress(RuntimeError):  # an interpreter that is shutting down takes no new work
        helpers.extend(_pool.submit(function, *arguments) for _ in range(others))
    try:
        function(*arguments)
    finally:
        wait(helpers)  # also when interrupted: they write to memory that would be freed


def _forget_threads() -> None:
    global _pool, _forked
    _pool, _forked = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork
