"""PyTorch Lightning: Muon on the hidden matrices of a byte-level transformer, AdamW elsewhere, a cosine schedule, checkpoints.

    python examples/frameworks/lightning_module.py
    python examples/frameworks/lightning_module.py --resume out/lightning/step=30.ckpt

What concerns this library is `ByteModel.rule` and `ByteModel.configure_optimizers`.
"""

import argparse
import logging
from pathlib import Path
from pydoc_data import topics
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import optimisers as opt
from optimisers.torch import Optimizer


class Windows:
    """Windows of Python's own documentation. Batch `i` depends on `i` alone, so that the position is all there is to save."""

    def __init__(self, batches: int, batch: int, context: int) -> None:
        self.tokens = torch.tensor(list("\n\n".join(topics.topics.values()).encode()))
        self.batches, self.batch, self.context = batches, batch, context
        self.position = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        while self.position < self.batches:
            self.position += 1
            yield self.draw(self.position - 1)
        self.position = 0

    def draw(self, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(i)
        starts = torch.randint(len(self.tokens) - self.context, (self.batch, 1), generator=generator)
        return self.tokens[starts + torch.arange(self.context + 1)]

    # Lightning saves and loads the position with its checkpoints, because these two methods are here.
    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class ByteModel(L.LightningModule):
    """A transformer that predicts the next byte; ``steps`` are those of the whole run, for the schedule."""

    def __init__(self, steps: int, context: int = 32, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.steps = steps
        self.embed = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes `(batch, context)` to logits `(batch, context, 256)`."""
        x = self.embed(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x)

    def training_step(self, tokens: Tensor) -> Tensor:
        loss = F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def rule(self) -> opt.AbstractRule:
        adamw = opt.AdamW(5e-3, (0.9, 0.95), lambda_=0.01)
        return opt.Route(
            ("blocks.*.in_proj_weight", opt.Muon(adamw, eta=0.02, blocks=3)),  # query, key and value each on its own
            ("blocks.*", opt.Muon(adamw, eta=0.02)),  # the vectors among them take adamw
            otherwise=adamw,
        )

    def configure_optimizers(self):
        optimizer = Optimizer(self.rule(), self)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Lightning's checkpoints leave out the random generator, which dropout draws from.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["generator"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["generator"])


def trainer(out: Path, steps: int, every: int, accumulate: int = 1) -> L.Trainer:
    """A quiet trainer that keeps a checkpoint of every so many steps."""
    checkpoints = ModelCheckpoint(out, "{step}", every_n_train_steps=every, save_top_k=-1)
    return L.Trainer(
        max_steps=steps, accumulate_grad_batches=accumulate, callbacks=[checkpoints], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--out", type=Path, default=Path("out/lightning"))
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it advertises

    L.seed_everything(0, verbose=False)
    model = ByteModel(args.steps)
    run = trainer(args.out, args.steps, max(1, args.steps // 2), args.accumulate)
    print(opt.setup(model.rule(), model))  # which rule each parameter gets, and why
    run.fit(model, Windows(args.steps * args.accumulate, 16, 32), ckpt_path=args.resume)

    loss = run.callback_metrics["loss"].item()
    print(f"step {run.global_step}: loss {loss:.3f} nats per byte; checkpoints in {args.out}")
    return loss


if __name__ == "__main__":
    main()
