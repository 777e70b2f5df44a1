"""The distributed forms of the frameworks on two processes: the parameters of a plain loop in one process."""

from pathlib import Path

import pytest

from torchrun import torchrun

pytestmark = pytest.mark.xdist_group("ranks")

SCRIPT = Path(__file__).resolve().parent / "on_two.py"


@pytest.mark.parametrize("how", ["accelerate", "accelerate_fsdp", "lightning", "trainer"])
def test_two_processes_train_as_one(how, tmp_path):
    printed = torchrun(SCRIPT, how, tmp_path, limit=300)
    assert printed.count("as one process") == 2
