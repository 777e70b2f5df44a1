"""Measurements that need a process of their own: a first call, a peak of memory, a program without torch.

Run as ``python children.py WHAT ARGUMENTS``; answers are lines of JSON on the stream that was standard output.
"""

import json
import os
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from time import perf_counter
from typing import Any

import memory
import ours
from measuring import described
from problems import PROBLEMS, arrays


class Without(MetaPathFinder):
    """Makes ``import torch`` fail."""

    def find_spec(self, fullname, *_):
        if fullname.partition(".")[0] == "torch":
            msg = f"No module named {fullname!r}"
            raise ModuleNotFoundError(msg, name=fullname)


def side(name: str, problem: str):
    """A side over a problem, by its name: ``ours:RULE``, ``ours:RULE:pure``, ``numpy:RULE``, or a peer's."""
    library, _, rest = name.partition(":")
    rule, _, kind = rest.partition(":")
    shapes = PROBLEMS[problem]() if problem in PROBLEMS else {"x": (64, 64), "y": (64,)}
    if library == "numpy":
        return ours.in_place(ours.CHAINS[rule](), arrays(shapes, 0), arrays(shapes, 1))
    import peers

    model, grads = peers.tensors(shapes, 0), peers.tensors(shapes, 1)
    if library == "ours":
        make = ours.pure if kind == "pure" else ours.in_place
        return make(ours.CHAINS[rule](), model, grads)
    if library == "torch":
        return peers.torch_adamw(model, grads, **({rest: True} if rest else {}))
    if library == "optax":
        return peers.by_optax(peers.optax_adamw(), model, grads)
    return peers.torchopt_adamw(model, grads)


def first(name: str, problem: str):
    """Seconds of the first step, everything imported and set up before."""
    step = side(name, problem)
    start = perf_counter()
    step()
    return perf_counter() - start


def peak(name: str, problem: str):
    """Bytes that three steps use at most, beyond the model, its gradients and the state: of all arrays together.

    What the library itself needs is there before: a step on a small model has been made.
    """
    small = side(name, "small")
    for _ in range(4):
        small()
    before = memory.resident()
    step = side(name, problem)
    step()
    memory.reset_peak()
    for _ in range(3):
        step()
    return memory.peak() - before


def answer_steps(name: str, problem: str, answer):
    """A step for each line of standard input, and a line for each step."""
    step = side(name, problem)
    answer("ready")
    for _ in sys.stdin:
        step()
        answer("done")


class Child:
    """A process that makes a step when told to; calling it waits until the step is made."""

    def __init__(self, name: str, problem: str, **environment: str):
        self.process = subprocess.Popen(
            command("steps", name, problem),
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._wait()

    def _wait(self):
        line = self.process.stdout.readline()
        result = json.loads(line) if line else {"error": "the process has ended"}
        if "error" in result:
            raise RuntimeError(result["error"])

    def __call__(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self._wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *arguments]


def ask(*arguments: str, **environment: str) -> Any:
    """The answer of a fresh process; its error is raised here."""
    done = subprocess.run(
        command(*arguments), env=os.environ | environment, stdout=subprocess.PIPE, text=True, timeout=300, check=False
    )
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1]) if lines else {"error": f"the process ended with {done.returncode}"}
    if "error" in result:
        raise RuntimeError(result["error"])
    return result["value"]


def main(what: str, *arguments: str):
    # Whatever a library prints goes to standard error, so that standard output holds the answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value, key="value"):
        print(json.dumps({key: value}), file=answers, flush=True)

    try:
        if what == "steps":
            if arguments[0].startswith("numpy:"):
                sys.meta_path.insert(0, Without())
                assert "torch" not in sys.modules
            answer_steps(*arguments, answer)
        else:
            answer({"first": first, "peak": peak}[what](*arguments))
    except Exception as error:  # noqa: BLE001 # it is the parent's to report
        answer(described(error), "error")


if __name__ == "__main__":
    main(*sys.argv[1:])
