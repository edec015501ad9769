"""A run that saves or resumes, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tests.helpers.small_nets import (
    Regressor,
    alone,
    full_weights,
    strategy,
    trainer,
)


class Scheduled(Regressor):
    """AdamW with two parameter groups, and a learning rate that falls with every step."""

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups, lr=0.02, eps=1e-5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trained(
    size: int | None,
    epochs: int,
    resume: Path | str | None = None,
    save: Path | str | None = None,
    directory: bool = True,
) -> dict[str, Tensor]:
    """Train up to ``epochs`` epochs, from ``resume`` if given, and save at ``save``. ``size`` None: plain Lightning."""
    model = Scheduled()
    if size is None:
        with alone():
            fit(trainer("auto", devices=1, max_epochs=epochs), model, resume, save)
    else:
        fit(trainer(strategy(size, save_distributed_checkpoint=directory), max_epochs=epochs), model, resume, save)
    return full_weights(model)


def fit(run: Trainer, model: LightningModule, resume: Any, save: Any) -> None:
    run.fit(model, ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
