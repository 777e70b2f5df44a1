"""Processes of one process group, started once and given many functions to run; they cannot hang, nor outlive the tests."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

# A fork of a process that has imported what takes seconds to import; elsewhere than on Linux a fork is not safe.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
IMPORTED = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "optimisers.torch"]
STARTING = 240  # seconds, on a machine that does much else
_POLL = 0.2


class RankError(AssertionError):
    """What a rank raised, or where all were when the time was up."""


def _serve(rank, count, directory, requests, answers):
    """What a rank does: join the others, and run what it is asked to."""
    stack = (Path(directory) / f"stack{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    faulthandler.enable(stack)
    warnings.simplefilter("error")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=count, timeout=timedelta(seconds=STARTING)
    )
    answers.put((rank, None, "ready"))
    while (request := requests.get()) is not None:
        function, arguments = request
        try:
            result = function(*arguments)
        except BaseException:  # noqa: BLE001 (told to the test)
            answers.put((rank, traceback.format_exc(), None))
        else:
            answers.put((rank, None, result))
    with contextlib.suppress(RuntimeError):  # another rank may be gone already
        dist.destroy_process_group()


class Ranks:
    """So many processes on this machine, with the gloo backend.

    ``run`` gives a function to all of them and returns a list of what they return. It raises RankError with the tracebacks of
    ranks that fail; or if not all answer in time, with where each of them is. After that the processes are started anew.
    """

    def __init__(self, count):
        self.count = count
        self._processes = []

    def _start(self):
        context = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload(IMPORTED)
        self._directory = tempfile.TemporaryDirectory()
        self._answers = context.Queue()
        self._requests = [context.Queue() for _ in range(self.count)]
        self._processes = [
            context.Process(
                target=_serve, args=(rank, self.count, self._directory.name, self._requests[rank], self._answers), daemon=True
            )
            for rank in range(self.count)
        ]
        for process in self._processes:
            process.start()
        self._gather(STARTING)

    def run(self, function, *arguments, limit=120):
        if not self._processes:
            self._start()
        for requests in self._requests:
            requests.put((function, arguments))
        return self._gather(limit)

    def _gather(self, limit):
        found, end, failed_at = {}, time.monotonic() + limit, None
        while len(found) < self.count:
            try:
                rank, error, result = self._answers.get(timeout=_POLL)
            except queue.Empty:
                now = time.monotonic()
                dead = [r for r, process in enumerate(self._processes) if not process.is_alive() and r not in found]
                # Ranks that wait for one that has failed would wait for long.
                if now > end or dead or (failed_at is not None and now > failed_at + 5):
                    self._fail(found, dead)
                continue
            found[rank] = error, result
            if error is not None:
                failed_at = failed_at or time.monotonic()
        errors = {rank: error for rank, (error, _) in found.items() if error is not None}
        if errors:
            if len(errors) < self.count:
                self.stop()  # the others may be somewhere else
            raise RankError("\n".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())))
        return [found[rank][1] for rank in range(self.count)]

    def _fail(self, found, dead):
        said = [f"rank {rank}: {error}" for rank, (error, _) in sorted(found.items()) if error is not None]
        said += [f"rank {rank} is dead, with exit code {self._processes[rank].exitcode}" for rank in dead]
        waiting = [r for r in range(self.count) if r not in found and r not in dead]
        for rank in waiting:
            with contextlib.suppress(OSError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(1)
        for rank in sorted([*waiting, *dead]):
            said.append(f"rank {rank} was here:\n{(Path(self._directory.name) / f'stack{rank}').read_text()}")
        self.stop()
        raise RankError("\n".join(said))

    def stop(self):
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        if self._processes:
            self._directory.cleanup()
        self._processes = []
