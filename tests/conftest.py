"""Before anything is imported: the arrays of the tests are small, and threads would only wait for each other."""

import os

import pytest

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")


@pytest.fixture(scope="session")
def loops_directory(tmp_path_factory):
    """Where compiled loops are kept for a run of the tests, by all its processes."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "loops"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


@pytest.fixture(scope="session", autouse=True)
def plain_loops(loops_directory):
    """One folder of loops for all tests, compiled for any processor, which takes half the time; some tests take this one's."""
    from optimisers.engine.kernels.c import compiler

    os.environ.setdefault("OPTIMISERS_CACHE", str(loops_directory))
    compiler._FLAGS = tuple(flag for flag in compiler._FLAGS if flag != "-march=native")


@pytest.fixture
def switch(monkeypatch, loops_directory):
    """Says how steps are run: ``"1"`` by compiled loops, ``"0"`` by NumPy's, ``"rules"`` by the rules themselves."""
    from optimisers.engine.groups import states as held

    monkeypatch.setenv("OPTIMISERS_CACHE", str(loops_directory))
    group_key = held.key_of

    def turn(value):
        monkeypatch.setenv("OPTIMISERS_COMPILE", "0" if value == "rules" else value)
        monkeypatch.setattr(held, "key_of", (lambda *_: None) if value == "rules" else group_key)

    return turn


def ranks_of(count):
    """A fixture: so many processes, which all tests of a worker share. They are started when they are asked for first."""

    @pytest.fixture(scope="session")
    def ranks():
        from ranks import Ranks

        found = Ranks(count)
        yield found
        found.stop()

    return ranks


one, two, three, four = map(ranks_of, range(1, 5))
