"""Hugging Face Trainer, through examples/frameworks/hf_trainer.py."""

import pytest
import torch
from comparing import assert_close, assert_same_bits, example, smooth, without_noise

hf_trainer = example("hf_trainer")


def train(out, *, resume=None, **options):
    """(model, its optimizer), and the loss of every step, after a run."""
    run = hf_trainer.trainer(out, **{"steps": 12, "every": 4, **options})
    torch.manual_seed(1 if resume else 0)
    run.train(resume_from_checkpoint=resume)
    assert run.state.global_step == run.args.max_steps
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return (run.model, run.optimizer.optimizer), losses


def test_the_example_learns_and_resumes(tmp_path, capsys):
    loss = hf_trainer.main(["--steps", "40", "--out", str(tmp_path)])
    assert loss < 3.7  # from about log(256) = 5.5
    assert "OptimiserChain(ClipGlobalNorm, Muon(AdamW))" in capsys.readouterr().out
    assert hf_trainer.main(["--steps", "40", "--out", str(tmp_path), "--resume", f"{tmp_path}/checkpoint-20"]) == loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_continues_bit_equal(tmp_path, accumulate):
    whole, losses = train(tmp_path / "whole", accumulate=accumulate)
    resumed, again = train(tmp_path / "resumed", accumulate=accumulate, resume=tmp_path / "whole" / "checkpoint-4")
    assert again == losses  # the log of the first steps comes from the checkpoint
    assert_same_bits(resumed, whole)


def test_checkpoint_holds_plain_tensors_and_names(tmp_path):
    (model, _), _ = train(tmp_path, steps=2, every=2)
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_tied_embedding_is_one_array_with_one_state(tmp_path):
    (model, optimizer), _ = train(tmp_path, steps=2)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert optimizer.tree["lm_head.weight"] == optimizer.tree["transformer.wte.weight"]


def test_accumulated_step_is_that_of_the_whole_batch(tmp_path, monkeypatch):
    gpt2 = hf_trainer.gpt2
    monkeypatch.setattr(hf_trainer, "gpt2", lambda: without_noise(gpt2()))
    monkeypatch.setattr(hf_trainer, "gpt2_rule", lambda: smooth("transformer.h.*", layout="in_out"))
    whole, losses = train(tmp_path / "whole", steps=4)
    halves, others = train(tmp_path / "halves", steps=4, batch=8, accumulate=2)
    assert others == pytest.approx(losses, rel=1e-3)
    assert_close(halves, whole)
