"""What Lightning does around checkpoints in the order that it has under DDP; saves that no run has begun with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_autotp.checkpoint.state_dict import full_checkpoint, optimizer_names
from lightning_autotp.checkpoint.tensors import open_checkpoint
from tests.helpers.checkpoints import Scheduled
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import (
    WIDTH,
    Net,
    Regressor,
    Rows,
    alone,
    everyones,
    full_weights,
    plugin_of,
    strategy,
    trainer,
)


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Net(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out


class Finetuned(Regressor):
    """Trains its head, and later its backbone."""

    def __init__(self) -> None:
        super().__init__(TwoParts)
        self.backbone = self.net.backbone

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.02, eps=1e-5)


class Thaw(BaseFinetuning):
    """Thaws a layer an epoch, each in a group of its own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        layers = [pl_module.net.backbone.down, pl_module.net.backbone.up, pl_module.net.backbone.norm]
        if 0 < epoch <= len(layers):
            self.unfreeze_and_add_param_group(layers[epoch - 1], optimizer, lr=0.01 / epoch)


class Regroups(Callback):
    """Rebuilds groups when a fit starts, of what it has saved; and notes what a fit starts with."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weight: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates = state_dict["rates"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weight = pl_module.get_parameter("net.head.weight").detach().clone()
        if self.rates:
            self.split(trainer.optimizers[0])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1 and not self.rates:
            self.rates = [0.01, 0.005]
            self.split(trainer.optimizers[0])

    def split(self, optimizer: Optimizer) -> None:
        everything = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0].update(params=everything[:3], lr=self.rates[0])
        optimizer.add_param_group({"params": everything[3:], "lr": self.rates[1]})


CALLBACKS = {
    "backbone": lambda: BackboneFinetuning(1, lambda epoch: 1.5, backbone_initial_ratio_lr=0.2, should_align=False),
    "layers": Thaw,
    "own": Regroups,
}


def finetuned(
    which: str, size: int | None, epochs: int, resume: Path | None, save: Path | None, directory: bool
) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
    """The full weights, the optimizer's groups and the states of their parameters by name, after ``epochs``."""
    model, callback = Finetuned(), CALLBACKS[which]()
    plugin: Any = "auto" if size is None else strategy(size, save_distributed_checkpoint=directory)
    options: dict[str, Any] = {"devices": 1} if size is None else {}
    run = trainer(plugin, max_epochs=epochs, callbacks=[callback], **options)
    run.fit(model, ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    names = optimizer_names(model, run.optimizers[0])
    state: dict[str, Any] = {"state_dict": model.state_dict(), "optimizer_states": [run.optimizers[0].state_dict()]}
    if size is not None:
        state = full_checkpoint(state, [names], plugin_of(model)._placement)
    optimizer = state["optimizer_states"][0]
    groups = [{**g, "params": [names[n] for n in g["params"]]} for g in optimizer["param_groups"]]
    return full_weights(model), groups, [optimizer["state"].get(n) for n in range(len(names))]


def alone_finetuned(*args: Any) -> Any:
    with alone():
        return finetuned(*args)


@pytest.mark.parametrize(
    ("which", "directory"), [("backbone", True), ("backbone", False), ("layers", True), ("own", True)]
)
def test_optimizer_groups_that_callbacks_rebuild_resume_as_in_a_plain_trainer(
    which: str, directory: bool, tmp_path: Path
) -> None:
    run_ranks(1, alone_finetuned, which, None, 2, None, tmp_path / "plain", False)
    want = run_ranks(1, alone_finetuned, which, None, 4, tmp_path / "plain", None, False)[0]
    run_ranks(2, finetuned, which, 2, 2, None, tmp_path / "ours", directory)
    got = run_ranks(2, finetuned, which, 2, 4, tmp_path / "ours", None, directory)[0]
    assert got[1] == want[1] and len(got[1]) > 1
    assert_close(got[0], want[0], 1e-5, "weight")
    for number, (state, wanted) in enumerate(zip(got[2], want[2])):
        assert (state is None) == (wanted is None)
        assert_close(state or {}, wanted or {}, 1e-3, f"optimizer state {number}")


class Notes(Finetuned):
    seen: Tensor | None = None

    def on_fit_start(self) -> None:
        self.seen = self.net.get_parameter("head.weight").detach().clone()


@pytest.mark.ranks(2)
def test_weights_and_callbacks_are_restored_when_a_fit_starts(tmp_path: Path) -> None:
    saved, run = Notes(), trainer(strategy(2), callbacks=[Regroups()])
    run.fit(saved)
    run.save_checkpoint(tmp_path / "checkpoint")
    model, callback = Notes(), Regroups()
    trainer(strategy(2), max_epochs=2, callbacks=[callback]).fit(model, ckpt_path=tmp_path / "checkpoint")
    want = saved.net.get_parameter("head.weight")
    assert callback.weight is not None and torch.equal(callback.weight, want)
    assert model.seen is not None and torch.equal(model.seen, want)


@pytest.mark.parametrize("pg", ["reinit", "none"])
@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
def test_a_model_that_no_run_has_begun_with_is_saved_as_it_is(directory: bool, pg: Any, tmp_path: Path) -> None:
    assert run_ranks(2, connected, tmp_path / "checkpoint", directory, pg=pg) == [True, True]
    held = open_checkpoint(tmp_path / "checkpoint", all_bytes=True)
    want = Scheduled().state_dict()
    assert all(torch.equal(held.model.read(name), tensor) for name, tensor in want.items())
    assert held.rest["global_step"] == 0
    assert run_ranks(2, validated, tmp_path / "checkpoint") == [True, True]


def connected(path: Path, directory: bool) -> bool:
    model, run = Scheduled(), trainer(strategy(2, save_distributed_checkpoint=directory))
    run.strategy.connect(model)
    run.save_checkpoint(path)
    run.strategy.save_checkpoint(run._checkpoint_connector.dump_checkpoint(), path)
    run.fit(model)  # and goes on as ever
    return everyones(run.global_step) == [4, 4]


def validated(path: Path) -> bool:
    model, run = Scheduled(), trainer(strategy(2))
    run.validate(model, DataLoader(Rows(4), batch_size=2), ckpt_path=path, verbose=False)
    want = Scheduled().state_dict()
    return all(torch.equal(tensor, want[name]) for name, tensor in full_weights(model).items())
