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


@pytest.fixture
def switch(monkeypatch, loops_directory):
    """Says whether loops are compiled: ``switch("1")`` always, ``switch("0")`` never."""
    monkeypatch.setenv("OPTIMISERS_CACHE", str(loops_directory))
    return lambda value: monkeypatch.setenv("OPTIMISERS_COMPILE", value)
