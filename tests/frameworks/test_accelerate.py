"""Hugging Face Accelerate, through examples/frameworks/accelerate_loop.py."""

import pytest
import torch
from comparing import assert_close, assert_same_bits, example, without_noise
from torch.utils.data import TensorDataset

accelerate_loop = example("accelerate_loop")
train = accelerate_loop.train


def test_the_example_learns_and_resumes(tmp_path, capsys):
    loss = accelerate_loop.main(["--out", str(tmp_path)])
    assert loss < 0.5  # from about log(10) = 2.3
    assert "Muon(Nesterov): 0.weight, 0.bias, 3.weight" in capsys.readouterr().out
    assert accelerate_loop.main(["--out", str(tmp_path), "--resume", f"{tmp_path}/20"]) == loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_continues_bit_equal(tmp_path, accumulate):
    losses, *whole = train(tmp_path / "whole", every=4, accumulate=accumulate)
    for batches in (12, 28, 36):  # within the first epoch, at its end, within the second
        checkpoint = tmp_path / "whole" / str(batches)
        again, *resumed = train(tmp_path / "resumed", every=4, accumulate=accumulate, resume=checkpoint)
        assert again == losses[batches:]
        assert_same_bits(resumed, whole)


def test_checkpoint_holds_plain_tensors_and_names(tmp_path):
    _, model, _ = train(tmp_path, epochs=1, every=28)
    saved = torch.load(tmp_path / "28" / "optimizer.bin", weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_one_cycle_moves_the_momentum_too(tmp_path):
    train(tmp_path, epochs=1, every=8)
    saved = torch.load(tmp_path / "8" / "optimizer.bin", weights_only=True)
    for group in saved["param_groups"]:
        assert group["lr"] == pytest.approx(group["max_lr"], rel=0.01)  # the peak
        assert group["momentum"] == group["betas"][0] == pytest.approx(0.85, rel=0.01)


def test_accumulated_step_is_that_of_the_whole_batch(tmp_path, monkeypatch):
    network, (images, labels) = accelerate_loop.network, accelerate_loop.digits().tensors
    # In float64: the steepest part of the schedule multiplies rounding errors.
    monkeypatch.setattr(accelerate_loop, "network", lambda: without_noise(network()).double())
    monkeypatch.setattr(accelerate_loop, "digits", lambda: TensorDataset(images.double(), labels))
    _, *whole = train(tmp_path, epochs=1)
    losses, *halves = train(tmp_path, epochs=1, batch=32, accumulate=2)
    assert len(losses) == 56
    assert_close(halves, whole)


# What Accelerate itself does not bring back.


def test_gradients_accumulated_before_a_checkpoint_are_lost(tmp_path):
    losses, *_ = train(tmp_path / "whole", epochs=1, every=3, accumulate=2)
    again, *_ = train(tmp_path / "resumed", epochs=1, every=3, accumulate=2, resume=tmp_path / "whole" / "3")
    assert again[0] == losses[3]
    assert again[1:] != losses[4:]
