"""A device in the place of a GPU: its kernels are the CUDA source, compiled by g++ for the host, and it counts what it does."""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch

from optimisers.engine.kernels.cuda.templates import PRELUDE

HERE = Path(__file__).parent
# Blocks one after another; the threads of a block side by side, since they wait for one another.
LAUNCHER = """
struct call { void (*kernel)(const work); const work *given; int block, thread; };
static void *run(void *p) {
  const call *c = (const call *)p;
  blockIdx.x = c->block;
  threadIdx.x = c->thread;
  c->kernel(*c->given);
  return 0;
}
extern "C" void launch(void *kernel, const work *given, int blocks, int threads) {
  blockDim.x = threads;
  pthread_barrier_init(&barrier, 0, threads);
  for (int block = 0; block < blocks; ++block) {
    call calls[64];
    pthread_t started[64];
    for (int i = 0; i < threads; ++i) calls[i] = {(void (*)(const work))kernel, given, block, i};
    for (int i = 1; i < threads; ++i) pthread_create(&started[i], 0, run, &calls[i]);
    run(&calls[0]);
    for (int i = 1; i < threads; ++i) pthread_join(started[i], 0);
  }
  pthread_barrier_destroy(&barrier);
}
"""
COMMAND = ("g++", "-O0", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-shared", "-fPIC")


PREBUILT = {}
"""The library of a text, and what the names of its kernels begin with there."""


def prebuild(texts):
    """Compile many sources at once, which takes a tenth of the time."""
    parts = []
    for i, text in enumerate(texts):
        assert text.startswith(PRELUDE)
        parts.append(re.sub(r"\b(\w+)\(ARGUMENT", rf"n{i}_\1(ARGUMENT", text.removeprefix(PRELUDE)))
    library = built(PRELUDE + "".join(parts))
    PREBUILT.update({text: (library, f"n{i}_") for i, text in enumerate(texts)})


def built(text):
    """The library of a source, compiled once on this machine."""
    source = (HERE / "shim.h").read_text() + text + LAUNCHER
    directory = Path(os.environ.get("OPTIMISERS_SHIM") or Path(tempfile.gettempdir()) / f"optimisers-shim-{os.getuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            file, made = Path(scratch) / "kernels.cpp", Path(scratch) / "kernels.so"
            file.write_text(source)
            subprocess.run([*COMMAND, str(file), "-o", str(made), "-lm", "-lpthread"], check=True, timeout=300)
            made.replace(path)
    return ctypes.CDLL(str(path))


class Shim:
    """As `optimisers.engine.kernels.cuda.driver.Gpu`, over the memory of the host.

    Attributes:
        counts: launches, by kernel, and uploads.
        threads: those of a block.
        current: the number of the current stream.

    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.counts = Counter()
        self.threads = 1
        self.current = 0
        self._names = {}
        self._launch = {}

    def load(self, text, names):
        library, prefix = PREBUILT.get(text) or (built(text), "")
        found = [ctypes.cast(getattr(library, prefix + name), ctypes.c_void_p).value for name in names]
        for function, name in zip(found, names, strict=True):
            self._names[function], self._launch[function] = name, library.launch
        return found

    def stream(self):
        return self.current

    def launch(self, function, blocks, arguments):
        self.counts[self._names[function]] += 1
        given = ctypes.c_void_p.from_address(arguments)
        self._launch[function](ctypes.c_void_p(function), given, blocks, self.threads)

    def upload(self, array):
        self.counts["upload"] += 1
        return torch.from_numpy(array.copy())
