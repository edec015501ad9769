"""Small models of the parity tests, the LightningModule that trains them, and their data.

Every factory builds the same fp32 weights for the same arguments, whatever was drawn before, and leaves the caller's
random state as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from tests.helpers.rank_pool import default_device

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ModelT = TypeVar("ModelT", bound=nn.Module)


class Attention(nn.Module):
    """Causal self-attention over [B, S, H] that takes its head counts from the projections' widths."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, bias: bool) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.head_dim))
        return out


class PackedAttention(nn.Module):
    """Attention with q, k and v in one linear: equal parts, or q wider than k and v if kv_heads < heads."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q_per_kv = heads // kv_heads
        self.qkv_proj = nn.Linear(hidden, (heads + 2 * kv_heads) * self.head_dim)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv_proj(x)
        kv_width = qkv.shape[-1] // (self.q_per_kv + 2)
        q, k, v = qkv.split([self.q_per_kv * kv_width, kv_width, kv_width], dim=-1)
        out: Tensor = self.o_proj(attend(q, k, v, self.head_dim))
        return out


class MLP(nn.Module):
    """Gated MLP."""

    def __init__(self, hidden: int, width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class PackedMLP(nn.Module):
    """Gated MLP with gate and up in one linear."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * width)
        self.down_proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(functional.silu(gate) * up)
        return out


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, hidden: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden)
        self.self_attn = attention
        self.post_attention_layernorm = nn.LayerNorm(hidden)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Tokens [B, S] to logits [B, S, vocab], through the given blocks."""

    def __init__(self, blocks: list[Block], hidden: int, vocab: int, max_length: int, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.embed_positions = nn.Embedding(max_length, hidden)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        # Embeddings as small as a linear's weights, or a tied head would start from saturated probabilities.
        nn.init.normal_(self.embed_tokens.weight, std=hidden**-0.5)
        nn.init.normal_(self.embed_positions.weight, std=hidden**-0.5)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + self.embed_positions(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


class Transformer(Decoder):
    """Decoder with separate projections; biases, grouped-query attention and a tied head as options."""

    def __init__(
        self,
        *,
        hidden: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        layers: int = 2,
        mlp: int = 128,
        vocab: int = 128,
        max_length: int = 64,
        bias: bool = False,
        tied: bool = False,
    ) -> None:
        blocks = [
            Block(hidden, Attention(hidden, heads, kv_heads or heads, bias), MLP(hidden, mlp, bias))
            for _ in range(layers)
        ]
        super().__init__(blocks, hidden, vocab, max_length, tied)


class PackedTransformer(Decoder):
    """Decoder with packed projections, all with biases.

    ``self_attn.qkv_proj`` holds (3, -1) equal parts, or ((q, k, v), -1) unequal ones if ``kv_heads < heads``;
    ``mlp.gate_up_proj`` holds (2, -1).
    """

    def __init__(
        self,
        *,
        hidden: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        layers: int = 2,
        mlp: int = 128,
        vocab: int = 128,
        max_length: int = 64,
        tied: bool = False,
    ) -> None:
        blocks = [
            Block(hidden, PackedAttention(hidden, heads, kv_heads or heads), PackedMLP(hidden, mlp))
            for _ in range(layers)
        ]
        super().__init__(blocks, hidden, vocab, max_length, tied)


def attend(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """Causal attention of [B, S, heads * head_dim] projections; k and v may have fewer heads than q."""
    q, k, v = (x.view(*x.shape[:2], -1, head_dim).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def packed_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ``Transformer(bias=True)``'s state as that of the ``PackedTransformer`` which computes the same."""
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    packed = dict(state)
    for whole, pieces in parts.items():
        for name in [name for name in state if f".{pieces[0]}." in name]:
            tensors = [packed.pop(name.replace(pieces[0], piece)) for piece in pieces]
            packed[name.replace(pieces[0], whole)] = torch.cat(tensors)
    return packed


def transformer(seed: int = 0, **options: Any) -> Transformer:
    """A ``Transformer`` with weights drawn from ``seed``."""
    return _seeded(seed, lambda: Transformer(**options))


def packed_transformer(seed: int = 0, **options: Any) -> PackedTransformer:
    """A ``PackedTransformer`` with weights drawn from ``seed``."""
    return _seeded(seed, lambda: PackedTransformer(**options))


def tiny_llama(
    tied: bool = False,
    kv_heads: int = 8,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 8,
    vocab: int = 128,
    seed: int = 0,
    attention: str = "sdpa",
    **config: Any,
) -> LlamaForCausalLM:
    """Hugging Face's Llama, small; 131 makes a vocabulary that no TP size divides. ``config`` goes to LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "use_cache": False,
        "attn_implementation": attention,
    }
    return _seeded(seed, lambda: LlamaForCausalLM(LlamaConfig(**(options | config))))


def _seeded(seed: int, build: Callable[[], ModelT]) -> ModelT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy, in fp32, of logits [B, S, vocab] against the tokens [B, S] one place further on."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


class LanguageModel(LightningModule):
    """Trains ``factory(**options)`` on batches of tokens [B, S].

    Args:
        factory: a module-level function, so that this module pickles into other processes.
        lr: of AdamW.
        **options: what the factory is called with.

    """

    def __init__(self, factory: Callable[..., nn.Module], lr: float = 1e-3, **options: Any) -> None:
        super().__init__()
        self.lr = lr
        self.model = factory(**options)

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.model(tokens)
        logits: Tensor = getattr(out, "logits", out)  # Hugging Face models wrap theirs
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = next_token_loss(self(batch), batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", next_token_loss(self(batch), batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A larger eps than Adam's own: a gradient that is truly zero holds rounding noise, which 1e-8 would amplify.
        return torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-5)


def token_batches(seed: int = 0, n: int = 4, batch: int = 4, seq: int = 16, vocab: int = 128) -> list[Tensor]:
    """``n`` batches of random tokens [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(vocab, (n, batch, seq), generator=generator))


class TokenDataset(Dataset[Tensor]):
    """The rows of ``token_batches``, one by one."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.rows = torch.cat(batches)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def token_loader(seed: int = 0, n: int = 4, batch: int = 4, seq: int = 16, vocab: int = 128) -> DataLoader[Tensor]:
    """A loader that yields ``token_batches(...)`` in order, where no distributed sampler is put into it."""
    return DataLoader(TokenDataset(token_batches(seed, n, batch, seq, vocab)), batch_size=batch)


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer that writes nothing, over all ranks of the test it is called in; ``options`` go to Trainer."""
    defaults: dict[str, Any] = {
        "accelerator": default_device(),
        "devices": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**(defaults | options))
