"""Running a function that shares out its work on as many threads as the libraries use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any

from ...arrays import torch_if_loaded

_ALONE = 2**18  # less than this is not worth a second thread that has to be woken
_TOGETHER = 2**15  # less than this for each is not worth a second thread that torch keeps awake

_openmp: Any = None
_forked = False


def shared_by_torch(function: Any, entry: Any, given: int, elements: int) -> Callable[[], Any]:
    """A call that runs a pass on torch's own OpenMP threads where it has such, else on threads of our own.

    Autograd and matrix products have used the same threads just before. They go on looking for work for a while, so others
    would have to share the cores with them, and products after it would wait for both. NumPy's products have other threads.
    """
    global _openmp  # noqa: PLW0603
    count = elements // _TOGETHER
    count = min(threads(), count) if count > 1 else 1
    if count <= 1:
        return partial(function, given)
    if _openmp is None and torch_if_loaded() is not None:
        _openmp = getattr(ctypes.CDLL(None), "GOMP_parallel", False)
        if _openmp:
            _openmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            _openmp.restype = None
    if _openmp and not _forked:  # OpenMP's threads do not survive a fork, and it does not see that they are gone
        return partial(_openmp, entry, given, count, 0)
    return shared_out(partial(function, given), elements)


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


def shared_out(function: Callable[[], Any], elements: int) -> Callable[[], Any]:
    """A call that runs a function that shares out its work, on as many threads as that is worth.

    If it was interrupted it may be made again, for the work that is left.
    """
    others = elements // _ALONE
    others = min(threads() - 1, others) if others else 0
    return function if others <= 0 else _OnThreads(function, others)


class _OnThreads:
    """A function that runs on several threads at once."""

    def __init__(self, function: Callable[[], Any], others: int) -> None:
        self._function, self._others = function, others
        self._helpers: list[Future[Any]] = []
        self.begun = False

    def __call__(self) -> None:
        global _pool  # noqa: PLW0603
        if _pool is None or _pool._max_workers < self._others:
            _pool = ThreadPoolExecutor(self._others, "optimisers")
        self.begun = True
        try:
            with suppress(RuntimeError):  # an interpreter that is shutting down takes no new work
                for _ in range(self._others):
                    self._helpers.append(_pool.submit(self._function))
            self._function()
        finally:
            self._join()

    def _join(self) -> None:
        """Wait for the others, also when interrupted: they write to memory that would be freed."""
        stopped: BaseException | None = None
        while self._helpers:
            try:
                wait(self._helpers)
                stopped = stopped or next(filter(None, (helper.exception() for helper in self._helpers)), None)
                self._helpers = []
            except BaseException as error:  # noqa: BLE001 (raised below)
                stopped = error
        if stopped is not None:
            raise stopped


def _forget_threads() -> None:
    global _pool, _forked
    _pool, _forked = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork
