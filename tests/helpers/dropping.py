"""Models that draw random numbers in many places, and training of them that writes down its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

VOCAB, ROWS, TOKENS = 13, 4, 6


class Odd(nn.Module):
    """A block whose ``hidden`` features are split unevenly; one dropout module serves several tensors."""

    def __init__(self, width: int = 8, hidden: int = 17, again: str = "") -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop, self.norm, self.again = nn.Dropout(0.3), nn.LayerNorm(width), again

    def forward(self, x: Tensor) -> Tensor:
        if self.again and self.training:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=self.again == "reentrant")
            return out
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        y = self.norm(self.drop(x))
        for layer in (self.up, self.down):  # one line draws for what is sharded and for what is not
            y = F.dropout(F.gelu(layer(y)), 0.2, self.training)
            if layer is self.up:
                y = self.drop(y) + 0.1 * torch.randn_like(y) * self.training
                y = F.dropout(y.transpose(1, 2), 0.1, self.training).transpose(1, 2)
                y = y * torch.empty_like(y).bernoulli_(0.9) if self.training else y
        if self.training:  # stochastic depth: rows
            y = y * torch.empty(y.shape[0], 1, 1).bernoulli_(0.8)
        return x + y


class Oddities(nn.Module):
    def __init__(self, again: str = "", hidden: int = 17) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.blocks = nn.ModuleList(Odd(again=again, hidden=hidden) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


ODD_RULES = {
    "layer_specs": [
        {"patterns": [r".*\.up\.weight"], "partition_type": "column"},
        {"patterns": [r".*\.down\.weight"], "partition_type": "row"},
    ]
}


class Dropping(LightningModule):
    """Trains a model of tokens that drops, and draws in ``training_step``, too.

    Args:
        make: makes the model.
        again: ``"reentrant"`` or ``"not"``: checkpoint the blocks of a Hugging Face model so.
    """

    def __init__(self, make: Callable[[], nn.Module], again: str = "", count: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net: Any = make()
        if again:
            model: Any = self.net
            model.gradient_checkpointing_enable({"use_reentrant": again == "reentrant"})
            model.enable_input_require_grads()
        self.count, self.losses, self.states = count, list[float](), list[Tensor]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.states.append(torch.get_rng_state())
        out = self.net(batch)
        logits = out if isinstance(out, Tensor) else out.logits if "logits" in out else out.last_hidden_state
        logits = F.dropout(logits, 0.1)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.flatten()) + 0.1 * torch.rand(()) * logits.square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        rank, size = getattr(self.trainer.strategy, "dp_rank", 0), getattr(self.trainer.strategy, "dp_size", 1)
        rows = torch.randint(VOCAB, (self.count * ROWS, TOKENS), generator=torch.Generator().manual_seed(2))
        own = [row for batch in rows.split(ROWS) for row in batch.chunk(size)[rank]]
        return DataLoader(own, batch_size=ROWS // size)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def llama(dropout: float = 0.2, **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=dropout, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = {"attn_pdrop": 0.2, "resid_pdrop": 0.1, "embd_pdrop": 0.15}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=8, n_embd=16, n_layer=2, n_head=4, **drops, **options)
    )


def bert(**options: Any) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
        max_position_embeddings=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, **options,
    )  # fmt: skip
    return BertForMaskedLM(config)
