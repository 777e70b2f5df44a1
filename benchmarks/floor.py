"""The floor: the memory traffic of AdamW's step, 28 bytes a parameter, and next to no arithmetic.

Parameter, gradient and two moments are read, all but the gradient are written.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from measuring import Step

SOURCE = """
void stream(float *restrict p, const float *restrict g, float *restrict m, float *restrict v, long n) {
    for (long i = 0; i < n; i++) {
        m[i] += g[i];
        v[i] += g[i];
        p[i] += g[i];
    }
}
"""


def compiled():
    """The loop as a function, by the C compiler of the machine."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler:
        msg = "no C compiler"
        raise FileNotFoundError(msg)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stream.c"), Path(folder, "stream.so")
        source.write_text(SOURCE)
        flags = ["-march=native"] if sys.platform == "linux" else []
        subprocess.run([compiler, "-O3", *flags, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        stream = ctypes.CDLL(str(library)).stream
    stream.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long]
    stream.restype = None
    return stream


def floor(count: int, threads: int) -> Step:
    """One pass over so many parameters, in equal parts for the threads."""
    stream = compiled()
    p, g, m, v = arrays = [np.zeros(count, np.float32) for _ in range(4)]
    for array in arrays:
        array.fill(1e-3)  # the pages must be there
    pool = ThreadPoolExecutor(threads)
    cuts = [count * i // threads for i in range(threads + 1)]
    parts = [(*(array[a:].ctypes.data for array in (p, g, m, v)), b - a) for a, b in pairwise(cuts)]

    def step():
        # arrays is named so that they live as long as the step.
        assert arrays
        for done in [pool.submit(stream, *part) for part in parts]:
            done.result()

    return step
