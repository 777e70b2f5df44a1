"""What two processes run: a small network by a framework's distributed form, and by a plain loop of one process.

    torchrun --nproc-per-node 2 tests/frameworks/on_two.py lightning OUT

Every batch is all of the data, half of it on each rank, so that the order does not matter.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import optimisers as opt
from optimisers.torch import Optimizer

STEPS, SAMPLES = 6, 16


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, 8, generator=generator), torch.randn(SAMPLES, 4, generator=generator))


def rule():
    route = opt.Route(("*2.*", opt.Muon(opt.Momentum(0.05), eta=0.02)), otherwise=opt.Momentum(0.05))
    return opt.OptimiserChain(opt.ClipGlobalNorm(0.5), route)


def loss_of(model, inputs, targets):
    return nn.functional.mse_loss(model(inputs), targets)


def schedule(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def loader():
    return DataLoader(data(), batch_size=SAMPLES // 2)


def alone():
    """The parameters after a plain loop in this process."""
    model = network()
    optimizer = Optimizer(rule(), model)
    scheduler = schedule(optimizer)
    for _ in range(STEPS):
        loss_of(model, *data().tensors).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return list(model.parameters())


def check(model, *, cut):
    """The parameters are those of one process, and lie as they should."""
    assert dist.get_world_size() == 2
    for p, q in zip(model.parameters(), alone(), strict=True):
        assert isinstance(p, DTensor) == cut
        torch.testing.assert_close((p.full_tensor() if cut else p).detach(), q.detach(), rtol=1e-5, atol=1e-6)
    sys.stdout.write("as one process\n")


def by_accelerate(out):
    """Accelerate with several processes on a CPU, which is DDP; gone on with from a checkpoint in the middle."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = Optimizer(rule(), model)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    scheduler = schedule(optimizer.optimizer)
    accelerator.register_for_checkpointing(scheduler)
    for step in range(STEPS):
        if step == 3:
            accelerator.save_state(out / "accelerate")
            accelerator.wait_for_everyone()  # rank 0 writes
            accelerator.load_state(out / "accelerate")
        for inputs, targets in batches:
            accelerator.backward(loss_of(model, inputs, targets))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    check(model, cut=False)


def by_accelerate_fsdp(_):
    """Accelerate's FSDP2, whose `prepare` puts cut parameters into the place of those that the optimizer has.

    Accelerate takes the plugin on accelerators only; here it is told that this is one.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100)
    accelerator = Accelerator(cpu=True)
    state = accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    model = network()
    optimizer = Optimizer(rule(), model)
    model, optimizer = accelerator.prepare(model, optimizer)
    batches = accelerator.prepare(loader())
    scheduler = schedule(optimizer.optimizer)
    for _ in range(STEPS):
        for inputs, targets in batches:
            accelerator.backward(loss_of(model, inputs, targets))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    check(model, cut=True)


def by_lightning(out):
    """Lightning's ModelParallelStrategy, FSDP2 in configure_model; a second trainer goes on from the first one's checkpoint."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def configure_model(self):
            if not isinstance(self.network[0].weight, DTensor):
                for layer in (*self.network[::2], self.network):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch):
            return loss_of(self.network, *batch)

        def configure_optimizers(self):
            optimizer = Optimizer(rule(), self)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    def fit(steps, resume=None):
        module = Module()
        trainer = L.Trainer(
            max_steps=steps, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), accelerator="cpu",
            devices=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ModelCheckpoint(out / "lightning", "{step}", every_n_train_steps=3, save_top_k=-1)],
        )  # fmt: skip
        trainer.fit(module, loader(), ckpt_path=resume)
        return module

    fit(3)
    check(fit(STEPS, out / "lightning" / "step=3.ckpt"), cut=True)


def by_trainer(out):
    """The Trainer on a CPU, which is DDP."""
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, inputs, labels):
            return {"loss": loss_of(self.network, inputs, labels)}

    model = Model()
    optimizer = Optimizer(rule(), model)
    arguments = TrainingArguments(
        out / "trainer", max_steps=STEPS, per_device_train_batch_size=SAMPLES // 2, max_grad_norm=0.0, use_cpu=True,
        ddp_backend="gloo", save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    rows = [{"inputs": x, "labels": y} for x, y in data()]
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule(optimizer))).train()
    check(model, cut=False)


if __name__ == "__main__":
    globals()[f"by_{sys.argv[1]}"](Path(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
