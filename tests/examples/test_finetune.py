"""The example that fine-tunes: it makes a model that transformers reads, and trains it from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from transformers import AutoModelForCausalLM

from lightning_autotp import AutoTPStrategy
from lightning_autotp.examples.finetune import FineTune, make_tiny
from tests.helpers.models import quiet_trainer, token_batches, token_loader


@pytest.mark.ranks(2)
def test_the_tiny_model_is_fine_tuned_from_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    if dist.get_rank() == 0:
        seed_everything(0, verbose=False)
        make_tiny(folder)
    dist.barrier()
    batch = token_batches(n=1)[0]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(folder)(input_ids=batch, labels=batch).loss
    trainer = quiet_trainer(strategy=AutoTPStrategy(autotp_size=2), max_epochs=3)
    model = FineTune(str(folder))
    (first,) = trainer.validate(model, token_loader(n=1), verbose=False)
    assert first["val_loss"] == pytest.approx(float(before), abs=1e-5)
    trainer.fit(model, token_loader(n=1))
    assert trainer.callback_metrics["train_loss"] < before
