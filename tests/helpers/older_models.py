"""Small models with the parameter names and layouts of classes that transformers does not have, or no longer has.

They compute what those did, in few lines: what matters is where the parts of a fused weight lie, and which counts a
module keeps.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN, HEADS, VOCABULARY = 64, 8, 131


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [B, S, heads, size]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class CoreAttention(nn.Module):
    """Causal attention with counts of its own, a module apart, as ChatGLM has it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size_per_partition = HIDDEN

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = causal(q, k, v)
        return out.reshape(*out.shape[:2], self.hidden_size_per_partition)


class ChatGLMAttention(nn.Module):
    """query_key_value is all of q, then of k, then of v; with fewer key heads than query heads in multi-query form."""

    def __init__(self, groups: int, interleaved: bool) -> None:
        super().__init__()
        self.hidden_size_per_attention_head = HIDDEN // HEADS
        self.num_attention_heads_per_partition = HEADS
        self.num_multi_query_groups_per_partition = groups
        self.interleaved = interleaved
        self.query_key_value = nn.Linear(HIDDEN, (HEADS + 2 * groups) * self.hidden_size_per_attention_head)
        self.core_attention = CoreAttention()
        self.dense = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.query_key_value(x)
        heads, groups = self.num_attention_heads_per_partition, self.num_multi_query_groups_per_partition
        size = self.hidden_size_per_attention_head
        if self.interleaved:
            q, k, v = mixed.view(*mixed.shape[:-1], heads, 3 * size).chunk(3, dim=-1)
        else:
            q, k, v = mixed.split([heads * size, groups * size, groups * size], dim=-1)
            q = q.view(*q.shape[:-1], heads, size)
            k, v = (part.view(*part.shape[:-1], groups, size) for part in (k, v))
            k, v = (part.repeat_interleave(heads // groups, dim=2) for part in (k, v))
        out: Tensor = self.dense(self.core_attention(q, k, v))
        return out


class ChatGLMMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(HIDDEN, 2 * 96, bias=False)
        self.dense_4h_to_h = nn.Linear(96, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        out: Tensor = self.dense_4h_to_h(functional.silu(gate) * up)
        return out


class MixtralExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, 96, bias=False)
        self.w2 = nn.Linear(96, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


class MixtralBlock(nn.Module):
    """Experts one by one in a list, a linear as the router; the two best for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList(MixtralExpert() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + expert(x) * share
        return out


class Layer(nn.Module):
    def __init__(self, attention: tuple[str, nn.Module], mlp: tuple[str, nn.Module]) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN)
        self.names = attention[0], mlp[0]
        self.add_module(*attention)
        self.add_module(*mlp)

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = (getattr(self, name) for name in self.names)
        x = x + attention(self.input_layernorm(x))
        out: Tensor = x + mlp(self.post_attention_layernorm(x))
        return out


class ChatGLM(nn.Module):
    """The names of the original ChatGLM's second and third version."""

    def __init__(self, groups: int, interleaved: bool, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="chatglm", num_attention_heads=HEADS, hidden_size=HIDDEN, **config)
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Module()
        self.transformer.embedding.word_embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        layers = (
            Layer(("self_attention", ChatGLMAttention(groups, interleaved)), ("mlp", ChatGLMMLP())) for _ in range(2)
        )
        self.transformer.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.transformer.output_layer = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        transformer: Any = self.transformer
        x = transformer.embedding.word_embeddings(tokens)
        for layer in transformer.encoder["layers"]:
            x = layer(x)
        out: Tensor = transformer.output_layer(x)
        return out


class LlamaAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = HIDDEN // HEADS, 4
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, HIDDEN // 4, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN // 4, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (part.repeat_interleave(self.num_key_value_groups, dim=2) for part in (k, v))
        projected: Tensor = self.o_proj(causal(q, k, v).flatten(2))
        return projected


class OldMixtral(nn.Module):
    """Mixtral with the parameter names it had before its experts became one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="mixtral", num_attention_heads=HEADS, num_key_value_heads=2, hidden_size=HIDDEN
        )
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.model.layers = nn.ModuleList(
            Layer(("self_attn", LlamaAttention()), ("block_sparse_moe", MixtralBlock())) for _ in range(2)
        )
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        x = model.embed_tokens(tokens)
        for layer in model.layers:
            x = layer(x)
        out: Tensor = self.lm_head(x)
        return out


def _seeded(build: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = build()
        return model


def chatglm(groups: int = 8, interleaved: bool = False, **config: Any) -> nn.Module:
    return _seeded(lambda: ChatGLM(groups, interleaved, **config))


def old_mixtral() -> nn.Module:
    return _seeded(OldMixtral)
