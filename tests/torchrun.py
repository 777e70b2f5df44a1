"""Scripts on several processes of this machine, by torchrun, that end when the time is up."""

import os
import signal
import subprocess
import sys


def torchrun(*arguments, count=2, limit=240, cwd=None):
    """What the ranks of a script print, together. AssertionError if they fail or take longer than ``limit`` seconds."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    process = subprocess.Popen(
        [*command, "--nproc-per-node", str(count), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        printed, _ = process.communicate()
        raise AssertionError(f"not done after {limit} seconds:\n{printed}") from None
    assert process.returncode == 0, printed
    return printed
