"""Fine-tune a pretrained Hugging Face model, tensor parallel over two processes.

``python -m lightning_autotp.examples.finetune [FOLDER]`` fine-tunes the model in FOLDER on Python's documentation, byte
by byte; if there is none, it first puts a tiny Llama there that stands for a real one.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_autotp.checkpoint.pretrained import from_pretrained
from lightning_autotp.examples.text import NUM_BYTES, TextBytes
from lightning_autotp.strategies.trainer import AutoTPStrategy


class FineTune(LightningModule):
    """A pretrained causal language model; batches are token ids ``[B, S]``.

    Args:
        path: a folder, or the id of a model on the Hugging Face Hub.
        learning_rate: AdamW's.
    """

    def __init__(self, path: str, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.path, self.learning_rate = path, learning_rate

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = from_pretrained(AutoModelForCausalLM, self.path).train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def make_tiny(folder: Path) -> None:
    """Write a tiny Llama over bytes, as ``save_pretrained`` writes any model."""
    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main(folder: str = "runs/tiny-llama") -> None:
    """Fine-tune what is in ``folder`` for 100 steps; checkpoints are in ``runs``."""
    if not (Path(folder) / "config.json").exists():
        make_tiny(Path(folder))
    trainer = Trainer(
        accelerator="auto",
        devices=2,
        strategy=AutoTPStrategy(autotp_size=2),
        max_steps=100,
        limit_val_batches=10,
        logger=False,
        default_root_dir="runs",
    )
    trainer.fit(FineTune(folder), TextBytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
