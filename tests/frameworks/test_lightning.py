"""PyTorch Lightning, through examples/frameworks/lightning_module.py."""

import re

import lightning as L
import pytest
import torch
from comparing import assert_close, assert_same_bits, example, smooth, without_noise
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch.utils.data import DataLoader

import optimisers as opt
from optimisers.torch import Optimizer

pytestmark = [
    # Lightning's own use of torch's pytrees.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # A resumed run keeps its checkpoints beside those of the run it goes on from, or elsewhere: Lightning remarks on both.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

lightning_module = example("lightning_module")
ByteModel, Windows = lightning_module.ByteModel, lightning_module.Windows


def fit(out, *, steps=12, every=4, accumulate=1, resume=None, seed=0, module=ByteModel, windows=Windows):
    """(module, its optimizer) after a run."""
    torch.manual_seed(seed)
    model = module(steps)
    trainer = lightning_module.trainer(out, steps, every, accumulate)
    trainer.fit(model, windows(steps * accumulate, 8, 32), ckpt_path=resume)
    assert trainer.global_step == steps
    return model, model.optimizers(use_pl_optimizer=False)


def saved_optimizer(path):
    (saved,) = torch.load(path, weights_only=True)["optimizer_states"]
    return saved


def test_the_example_learns_and_resumes(tmp_path, capsys):
    loss = lightning_module.main(["--steps", "40", "--out", str(tmp_path)])
    assert loss < 3.7  # from about log(256) = 5.5
    shown = capsys.readouterr().out
    assert re.search(r"in_proj_weight +(x\d+ +)?192x64 .*Muon", shown)
    assert "blocks=3" in shown
    assert lightning_module.main(["--steps", "40", "--out", str(tmp_path), "--resume", f"{tmp_path}/step=20.ckpt"]) == loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_continues_bit_equal(tmp_path, accumulate):
    whole = fit(tmp_path / "whole", accumulate=accumulate)
    checkpoint = tmp_path / "whole" / "step=4.ckpt"
    assert_same_bits(fit(tmp_path / "resumed", accumulate=accumulate, resume=checkpoint, seed=1), whole)


def test_checkpoint_holds_plain_tensors_and_names(tmp_path):
    fit(tmp_path, steps=4)
    saved = saved_optimizer(tmp_path / "step=4.ckpt")
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in ByteModel(4).named_parameters())
    assert {type(x) for state in saved["state"].values() for x in state.values()} == {torch.Tensor}


def test_schedule_moves_every_rule(tmp_path):
    _, optimizer = fit(tmp_path, steps=6, every=3)
    assert [group["rule"] for group in optimizer.param_groups] == ["AdamW", "Muon(AdamW)", "Muon(AdamW)"]
    half = saved_optimizer(tmp_path / "step=3.ckpt")
    assert [group["lr"] for group in half["param_groups"]] == pytest.approx([2.5e-3, 0.01, 0.01])
    rule = optimizer.tree["blocks.0.linear1.weight"].rule
    assert (rule.eta, rule.opt.eta) == (0.0, 0.0)  # Muon's rule for vectors follows


def test_the_state_tree_can_be_read_during_training(tmp_path):
    class Logging(ByteModel):
        def on_before_optimizer_step(self, optimizer):
            tree = self.optimizers().tree  # through Lightning's wrapper
            assert tree is self.optimizers(use_pl_optimizer=False).tree is optimizer.tree
            metrics = opt.metrics(tree, self)
            assert metrics["embed.weight"].gradient_norm > 0
            assert opt.hyper(tree)["embed.weight"]["eta"] == optimizer.param_groups[0]["lr"]

    fit(tmp_path, steps=3, module=Logging)


class Quiet(ByteModel):
    def __init__(self, steps):
        super().__init__(steps)
        without_noise(self)

    def rule(self):
        return smooth("blocks.*")


class Halves(Windows):
    """The batches of Windows in two halves each."""

    def draw(self, i):
        return super().draw(i // 2).chunk(2)[i % 2]


def test_accumulated_step_is_that_of_the_whole_batch(tmp_path):
    whole = fit(tmp_path / "whole", steps=4, module=Quiet)
    assert_close(fit(tmp_path / "halves", steps=4, accumulate=2, module=Quiet, windows=Halves), whole)


def test_accumulating_by_rule_instead(tmp_path):
    class Constant(Quiet):
        def configure_optimizers(self):
            return Optimizer(self.rule(), self)

    class ByRule(Constant):
        def rule(self):
            return opt.OptimiserChain(opt.AccumGrad(2), super().rule())

    whole = fit(tmp_path / "whole", steps=4, module=Constant)
    # To Lightning every half is a step.
    assert_close(fit(tmp_path / "halves", steps=8, module=ByRule, windows=Halves), whole)


class Finetuned(L.LightningModule):
    """A head that is trained from the start, and a backbone that BackboneFinetuning adds as a group, without names."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.make = make
        self.backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        self.head = torch.nn.Linear(8, 2)
        self.double()

    def training_step(self, batch):
        return self.head(torch.tanh(self.backbone(batch))).square().mean()

    def configure_optimizers(self):
        return self.make(self)


FINETUNING = {
    "torch": lambda module: torch.optim.AdamW(module.head.parameters(), lr=0.05, weight_decay=0.0),
    "a module": lambda module: Optimizer(opt.AdamW(0.05), module),
    "a list": lambda module: Optimizer(opt.AdamW(0.05), list(module.head.parameters())),
}


def finetune(out, make, resume=None):
    """The parameters after four epochs of three batches, the backbone's from the second on."""
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda _: 1.5, backbone_initial_ratio_lr=0.1)
    trainer = L.Trainer(
        max_epochs=4, callbacks=[thaw, ModelCheckpoint(out, "{epoch}", save_top_k=-1)], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Finetuned(make)
    data = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume)
    return [p.detach() for p in module.parameters()]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
def test_backbone_finetuning_is_that_of_torch_straight_and_resumed(tmp_path):
    straight = {how: finetune(tmp_path / how, make) for how, make in FINETUNING.items()}
    for how in ("a module", "a list"):
        torch.testing.assert_close(straight[how], straight["torch"], rtol=1e-9, atol=1e-12)
    # Before the backbone is thawed, and after; the latter is not the straight run with torch's own either.
    for epoch in (0, 2):
        resumed = {
            how: finetune(tmp_path / f"{how} {epoch}", make, tmp_path / how / f"epoch={epoch}.ckpt")
            for how, make in FINETUNING.items()
        }
        for how in ("a module", "a list"):
            torch.testing.assert_close(resumed[how], resumed["torch"], rtol=1e-9, atol=1e-12)


# What Lightning itself does not bring back.


class Recorder(L.LightningModule):
    """Learns nothing from numbers, and remembers which came."""

    def __init__(self, steps=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def training_step(self, batch):
        self.seen += batch.tolist()
        return self.weight * 0.0

    def configure_optimizers(self):
        return Optimizer(opt.Descent(0.1), self)


# Lightning advises workers for every loader.
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
def test_position_within_an_epoch_is_lost_without_a_stateful_loader(tmp_path):
    loader = DataLoader(torch.arange(6), batch_size=1)
    first = Recorder()
    lightning_module.trainer(tmp_path, 4, 4).fit(first, loader)
    assert first.seen == [0, 1, 2, 3]
    resumed = Recorder()
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        lightning_module.trainer(tmp_path, 6, 4).fit(resumed, loader, ckpt_path=tmp_path / "step=4.ckpt")
    assert resumed.seen == [0, 1]  # not [4, 5]


def test_dropout_needs_the_generator_that_the_example_saves(tmp_path):
    class Forgetful(ByteModel):
        def on_load_checkpoint(self, checkpoint):
            pass

    whole, _ = fit(tmp_path / "whole")
    resumed, _ = fit(tmp_path / "resumed", resume=tmp_path / "whole" / "step=4.ckpt", seed=1, module=Forgetful)
    assert not torch.equal(resumed.head.weight, whole.head.weight)
