"""A small language model over bytes, its data, and a callback that shows what it has learnt.

This is plain Lightning code: the strategy shards the model, nothing here says how. It needs ``transformers``.

    Trainer(strategy=AutoTPStrategy(autotp_size=2), max_steps=1000).fit(ByteLlama(), TextBytes())
"""

import math
import platform
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_autotp.examples.corpus import python_prose, read_text, write_whole

NUM_BYTES = 256

FINAL_LEARNING_RATE = 0.1
"""Where the cosine ends, as a fraction of the peak."""


class ByteLlama(LightningModule):
    """A Llama that reads and writes bytes, from random weights.

    Batches are LongTensors ``[B, S]`` of bytes; each byte is predicted from those before it. Losses are in nats a byte.

    Args:
        hidden_size: width of the residual stream.
        num_layers: decoder blocks.
        num_heads: query heads; ``hidden_size`` is divided among them.
        num_kv_heads: key and value heads, each shared by ``num_heads / num_kv_heads`` query heads.
        intermediate_size: width inside the MLP.
        context_length: bytes that :meth:`generate` looks back on; the windows of the training data are as long.
        tie_word_embeddings: use one matrix for the embedding and the head.
        learning_rate: the peak, reached after ``warmup_steps``, then lowered along a cosine until the last step.
        warmup_steps: optimizer steps of linear warmup.
        weight_decay: AdamW's, on matrices only.
    """

    def __init__(
        self,
        hidden_size: int = 256,
        num_layers: int = 3,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        intermediate_size: int = 704,
        context_length: int = 128,
        tie_word_embeddings: bool = False,
        learning_rate: float = 3e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.config = LlamaConfig(
            vocab_size=NUM_BYTES,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=context_length,
            tie_word_embeddings=tie_word_embeddings,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )

    def configure_model(self) -> None:
        """Build the model here, not in ``__init__``: the strategy then decides where its weights are made."""
        if not hasattr(self, "model"):  # every entry point of the Trainer calls this hook again
            self.model = LlamaForCausalLM(self.config)

    def forward(self, batch: Tensor) -> Tensor:
        """Next-byte logits ``[B, S, 256]``."""
        return self.model(input_ids=batch).logits

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross entropy of the next byte, a scalar."""
        return self.model(input_ids=batch, labels=batch).loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Logits ``[B, 256]`` of the byte that follows each window."""
        return self(batch)[:, -1]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        steps = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
            return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt: bytes, num_bytes: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """The ``num_bytes`` bytes with which the model continues ``prompt``.

        Call it on all ranks, because all of them together run a sharded model. Each draws from a generator of its own
        with the same seed, on the CPU, and so all draw the same bytes. ``temperature`` 0 takes the likeliest byte.

        Raises:
            ValueError: if the prompt is empty.
        """
        if not prompt:
            raise ValueError("prompt: it is empty; the model needs at least one byte to continue.")
        generator = torch.Generator().manual_seed(seed)
        was_training = self.training
        self.eval()
        text = list(prompt)
        for _ in range(num_bytes):
            text.append(self._next_byte(text, temperature, generator))
        self.train(was_training)
        return bytes(text[len(prompt) :])

    def _next_byte(self, text: list[int], temperature: float, generator: torch.Generator) -> int:
        # Padded on the right, where causal attention never looks: all calls have the shape that training has, which
        # sequence parallelism divides among the ranks and torch.compile has compiled.
        length = self.config.max_position_embeddings
        window = torch.tensor(text[-length:], device=self.device)
        logits = self(F.pad(window, (0, length - len(window)))[None])[0, len(window) - 1].float().cpu()
        if temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))


class Windows(Dataset[Tensor]):
    """A text cut into windows that do not overlap; item i is a LongTensor ``[S]`` of bytes.

    Args:
        data: uint8 ``[N, S]``.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index].long()


class TextBytes(LightningDataModule):
    """Windows of text, as bytes: batches are LongTensors ``[B, S]``.

    Training reads the windows of the text's beginning, shuffled; validation, then test and predict, those of its tail.

    Args:
        path: a text file, or a folder of them. Default: the documentation that comes with Python, about 2 MB.
        seq_length: bytes a window.
        batch_size: windows a batch, on each data parallel rank.
        val_fraction: part of the text that is held out for validation, and as much again for test.
        num_workers: processes that load batches. The text is in memory, 0 serves well.
        cache_dir: where the default text is kept.

    Raises:
        ValueError: if an argument is out of range or the text too short.
        FileNotFoundError: if there is no text at ``path``.
    """

    def __init__(
        self,
        path: Optional[str] = None,
        seq_length: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        num_workers: int = 0,
        cache_dir: str = "runs/data",
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 0.5:
            raise ValueError(f"val_fraction: {val_fraction} is not between 0 and 0.5 (it is held out twice).")
        self.seq_length = seq_length
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        # The default text differs between Python versions.
        self.path = Path(path) if path else Path(cache_dir) / f"python-{platform.python_version()}.txt"
        self.is_default = path is None

    def prepare_data(self) -> None:
        if self.is_default and not self.path.exists():
            write_whole(self.path, python_prose())

    def setup(self, stage: Optional[str] = None) -> None:
        text = torch.frombuffer(bytearray(read_text(self.path)), dtype=torch.uint8)
        count = len(text) // self.seq_length
        held_out = max(1, int(count * self.val_fraction))
        if count - 2 * held_out < self.batch_size:
            raise ValueError(
                f"{str(self.path)!r} holds {len(text)} bytes, which is {count} windows of seq_length={self.seq_length};"
                f" training needs at least one batch of {self.batch_size}, validation and test one window each."
                " Give more text, or a smaller seq_length or batch_size."
            )
        windows = text[: count * self.seq_length].view(count, self.seq_length)
        train, val, test = windows.split([count - 2 * held_out, held_out, held_out])
        self.train, self.val, self.test = Windows(train), Windows(val), Windows(test)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(self.train, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(self.test)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        return self._loader(self.test)

    def _loader(self, windows: Windows, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Tensor]:
        return DataLoader(
            windows, batch_size=self.batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=self.num_workers
        )


class SampleText(Callback):
    """Prints a text that the model writes when training ends.

    Args:
        prompt: what the model continues.
        num_bytes: length of the continuation.
        temperature: see :meth:`ByteLlama.generate`.
    """

    def __init__(self, prompt: str = "The ", num_bytes: int = 160, temperature: float = 0.8) -> None:
        self.prompt = prompt
        self.num_bytes = num_bytes
        self.temperature = temperature

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ByteLlama)
        text = pl_module.generate(self.prompt.encode(), self.num_bytes, self.temperature)
        if trainer.is_global_zero:
            print(f"\n{self.prompt}{text.decode(errors='replace')}")
