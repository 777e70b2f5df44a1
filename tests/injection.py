"""Failures at chosen points of a call: whatever is raised there, nothing has changed, or the step is whole.

``python tests/injection.py 10000`` tries as many random points and counts what came of them.
"""

import copy
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import optimisers as opt
import optimisers.torch
from looped import raw
from table import cases

SOURCE = str(Path(opt.__file__).parent)
ERRORS = {
    "memory": MemoryError("injected"),
    "library": RuntimeError("injected"),
    "interrupt": KeyboardInterrupt("injected"),
    "system": OSError(28, "No space left on device (injected)"),
}
VERBS = ("update_", "update", "step", "add", "take", "save", "extend")
OF_THE_ADAPTER = {"step", "add", "take"}
"""Steps, `add_param_group` and `load_state_dict`."""


class Points:
    """The points at which something may be raised: lines of the library (``line``) or calls from it into others (``call``).

    With ``at`` the error is raised at that one; else they are counted.
    """

    def __init__(self, kind, at=None, error=None):
        self.kind, self.at, self.error, self.count, self.where = kind, at, error, 0, None

    def _come(self, frame):
        self.count += 1
        if self.count - 1 == self.at:
            self.where = f"{Path(frame.f_code.co_filename).relative_to(SOURCE)}:{frame.f_lineno} in {frame.f_code.co_name}"
            raise self.error

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self._come(frame)
        return self._trace

    def _profile(self, frame, event, _):
        if event == "c_call" and frame.f_code.co_filename.startswith(SOURCE):
            self._come(frame)

    def __enter__(self):
        sys.settrace(self._trace) if self.kind == "line" else sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
        sys.setprofile(None)


def arrays(row, lib, dtype, seed):
    rng = np.random.default_rng(seed)
    shapes = {"w": (6, 5), "u": (6, 5), "k": (4, 3, 2)} | ({"b": (5,)} if row.min_ndim < 2 else {})
    made = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    if lib == "numpy":
        return {key: x.astype(dtype) for key, x in made.items()}
    return {key: torch.from_numpy(x).to(getattr(torch, dtype)) for key, x in made.items()}


class Line:
    """A line of steps, by one of the verbs; ``act`` takes the next one."""

    def __init__(self, verb, row, rule, lib, dtype):
        self.verb, self.row, self.lib, self.dtype, self.taken = verb, row, lib, dtype, 0
        self.model = arrays(row, lib, dtype, 0)
        self.result = None
        if verb in OF_THE_ADAPTER:
            params = [(key, torch.nn.Parameter(x)) for key, x in self.model.items()]
            self.optimizer = optimisers.torch.Optimizer(rule, params)
            self.new = torch.nn.Parameter(self.model["w"] + 1)
            self.saved = copy.deepcopy(self.optimizer.state_dict())
        else:
            self.state = opt.setup(rule, self.model)
        self.folder = Path(tempfile.mkdtemp()) if verb == "save" else None

    def grads(self):
        return arrays(self.row, self.lib, self.dtype, 1 + self.taken)

    def prepare(self):
        """What comes before the call under attack."""
        if self.verb in OF_THE_ADAPTER:
            for i, x in enumerate(self.parameters()):
                x.grad = torch.full_like(x, 0.5 + i + self.taken)
            if self.taken == 2:
                self.optimizer.state  # noqa: B018 (a view that has to be kept up to date)
                if self.row.rebuilds and self.row.name != "Rprop":  # which may be changed there
                    self.optimizer.param_groups[0]["lr"] *= 0.5
                self.optimizer.param_groups[-1]["params"].reverse()
        self.given = self.grads()

    def act(self):
        if self.verb in OF_THE_ADAPTER:
            if self.taken == 2 and self.verb == "add":
                self.optimizer.add_param_group({"params": [("new", self.new)]})
            elif self.taken == 2 and self.verb == "take":
                self.optimizer.load_state_dict(self.saved)
            else:
                self.optimizer.step()
        elif self.verb == "save":
            opt.save(self.folder / "state", self.state)
        elif self.verb == "extend":
            more = {**self.model, "new": self.model["w"] + 1}
            rule = next(iter(self.state._entries)).base
            self.result = opt.extend(self.state, more, rule=None if rule is None else rule.unresolved())
        else:
            result = (opt.update if self.verb == "update" else opt.update_)(self.state, self.model, self.given)
            self.state, self.model = result

    def done(self):
        self.taken += 1

    def parameters(self):
        return [x for group in self.optimizer.param_groups for x in group["params"]]

    def seen(self):
        """Everything there is, to the bit."""
        if self.verb in OF_THE_ADAPTER:
            return raw([self.optimizer.tree, [x.detach() for x in self.parameters()]])
        return raw([self.state, self.model])


def reference(verb, row, rule, lib, dtype):
    """What a line comes to, before and after its third step and after one more."""
    line, seen = Line(verb, row, rule, lib, dtype), []
    for _ in range(4):
        line.prepare()
        seen.append(line.seen())
        if verb in {"save", "extend"}:
            line.state, line.model = opt.update(line.state, line.model, line.given)
        else:
            line.act()
        line.done()
    return [*seen[2:], line.seen()]


def attack(verb, case, lib, dtype, kind, error, choose, known):
    """Have one call fail at a random point. What came of it: "unchanged" or "whole"; AssertionError for anything else."""
    name, row, rule = case
    key = (verb, name, lib, dtype)
    if key not in known:
        known[key] = reference(verb, row, rule, lib, dtype), {}
    _, counts = known[key]
    if kind not in counts:
        line = _third(verb, row, rule, lib, dtype)
        with Points(kind) as points:
            line.act()
        counts[kind] = points.count
    line = _third(verb, row, rule, lib, dtype)
    near = choose.choice([None, 60, 12])  # the end, where things are written
    points = Points(kind, choose.randrange(max(0, counts[kind] - (near or counts[kind])), counts[kind]), error)
    raised = None
    try:
        with points:
            line.act()
    except BaseException as found:  # noqa: BLE001
        raised = found
    about = f"{verb} {name} {lib} {dtype} {kind} {type(error).__name__} at {points.where}"
    if raised is not None and raised is not error and error not in (raised.__cause__, raised.__context__):
        raise AssertionError(about) from raised
    try:
        return (_unharmed if verb in {"save", "extend"} else _whole)(line, known[key][0], raised, about)
    except Exception as found:
        raise AssertionError(about) from found


def _whole(line, known, raised, about):
    """What came of a step: all of it or nothing, and it can be gone on from."""
    before, after, last = known
    now = line.seen()
    assert now in (before, after), f"half a step: {about}"
    assert raised is not None or now == after, f"no step, and no error: {about}"
    if line.verb == "update":
        assert raised is None or now == before, about
    if now == before:
        line.act()
        assert line.seen() == after, f"the step after it is another: {about}"
    line.done()
    line.prepare()
    line.act()
    assert line.seen() == last, f"a later step is another: {about}"
    return "unchanged" if now == before else "whole"


def _third(verb, row, rule, lib, dtype):
    """A line before its third step."""
    line = Line(verb, row, rule, lib, dtype)
    for _ in range(2):
        line.prepare()
        if verb in {"save", "extend"}:
            line.state, line.model = opt.update(line.state, line.model, line.given)
        else:
            line.act()
        line.done()
    line.prepare()
    if verb == "save":
        (line.folder / "state").write_bytes(b"old")
    return line


def _unharmed(line, known, raised, about):
    """What came of a call that is to change nothing but what it makes."""
    assert line.seen() == known[0], about
    if line.verb == "extend":
        assert raised is not None or "new" in line.result, about
        return "unchanged" if raised else "whole"
    path = line.folder / "state"
    if path.read_bytes() == b"old":
        assert raised is not None, about
        outcome = "unchanged"
    else:
        assert opt.load(path, line.state) == line.state, about
        outcome = "whole"
    for left in line.folder.iterdir():
        left.unlink()
    line.folder.rmdir()
    return outcome


def points(count, seed, verbs=VERBS, progress=None):
    """(outcome by verb, and what went wrong) of so many random points over the table of rules."""
    choose, known, outcomes, wrong = random.Random(seed), {}, Counter(), []
    table = cases(every=False)
    for i in range(count):
        verb, case = choose.choice(verbs), choose.choice(table)
        lib = "torch" if verb in OF_THE_ADAPTER else choose.choice(["numpy", "torch"])
        dtype = choose.choice(["float32", "float64"] if lib == "numpy" else ["float32", "bfloat16"])
        if dtype in case[1].refuses:
            continue
        kind, error = choose.choice(["line", "call"]), ERRORS[choose.choice(list(ERRORS))]
        fresh = copy.copy(error)
        try:
            outcomes[verb, attack(verb, case, lib, dtype, kind, fresh, choose, known)] += 1
        except AssertionError as found:
            outcomes[verb, "WRONG"] += 1
            wrong.append(f"{found}" + (f" <- {found.__cause__!r}" if found.__cause__ else ""))
        if progress and i % progress == progress - 1:
            sys.stderr.write(f"{i + 1} {dict(outcomes)}\n")
    return outcomes, wrong


if __name__ == "__main__":
    os.environ.setdefault("OPTIMISERS_COMPILE", "1")
    found, wrong = points(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, progress=500)
    sys.stdout.write("\n".join([*(f"{' '.join(key)} {found[key]}" for key in sorted(found)), *sorted(set(wrong)), ""]))
