"""Hugging Face Trainer: Muon on the hidden matrices of a small GPT-2, AdamW elsewhere, warm-up and cosine, checkpoints.

    python examples/frameworks/hf_trainer.py
    python examples/frameworks/hf_trainer.py --resume out/hf_trainer/checkpoint-40

What concerns this library is `gpt2_rule` and the argument `optimizers=` of the Trainer.
"""

import argparse
from pathlib import Path
from pydoc_data import topics

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_cosine_schedule_with_warmup, set_seed

import optimisers as opt
from optimisers.torch import Optimizer


class Windows(Dataset):
    """Windows of Python's own documentation, one after the other, as the Trainer's models take them."""

    def __init__(self, context: int = 32) -> None:
        tokens = torch.tensor(list("\n\n".join(topics.topics.values()).encode()))
        self.windows = tokens[: len(tokens) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def gpt2(context: int = 32) -> GPT2LMHeadModel:
    """A GPT-2 on bytes, two layers of width 64, with random weights."""
    config = GPT2Config(
        vocab_size=256, n_positions=context, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


def gpt2_rule() -> opt.AbstractRule:
    """Muon on the layers' matrices, which GPT-2 stores transposed; AdamW on the tied embedding and the other parameters."""
    adamw = opt.AdamW(5e-3, (0.9, 0.95), lambda_=0.01)
    route = opt.Route(
        ("*.attn.c_attn.weight", opt.Muon(adamw, eta=0.02, layout="in_out", blocks=3)),  # query, key and value
        ("transformer.h.*", opt.Muon(adamw, eta=0.02, layout="in_out")),  # the vectors among them take adamw
        otherwise=adamw,
    )
    return opt.OptimiserChain(opt.ClipGlobalNorm(1.0), route)


def trainer(out: Path, *, steps: int, every: int, batch: int = 16, accumulate: int = 1) -> Trainer:
    """A Trainer that keeps a checkpoint of every so many steps."""
    set_seed(0)
    model = gpt2()
    optimizer = Optimizer(gpt2_rule(), model)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    arguments = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,  # the rule clips
        data_seed=0,  # the order of the data, whatever else draws random numbers
        save_steps=every, logging_steps=1, use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Windows(), optimizers=(optimizer, scheduler))


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--out", type=Path, default=Path("out/hf_trainer"))
    args = parser.parse_args(argv)
    run = trainer(args.out, steps=args.steps, every=max(1, args.steps // 2), accumulate=args.accumulate)
    for group in run.optimizer.param_groups:
        print(f"{group['rule']}, {len(group['params'])} arrays: {', '.join(group['param_names'][:4])}, ...")
    run.train(resume_from_checkpoint=args.resume)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte; checkpoints in {args.out}")
    return losses[-1]


if __name__ == "__main__":
    main()
