"""Language models whose attention is particular."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.derivation.models.frame import (
    TOKENS,
    VOCAB,
    WIDTH,
    Decoder,
    FeedForward,
    causal,
    model,
    next_token_loss,
)


class CausalSelfAttention(nn.Module):
    """nanoGPT's."""

    mask: Tensor

    def __init__(self, heads: int = 8) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, WIDTH
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.tril(torch.ones(TOKENS, TOKENS)).view(1, 1, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf")).softmax(-1)
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, -1)
        out: Tensor = self.c_proj(y)
        return out


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        table = nn.Embedding(VOCAB, WIDTH)
        self.transformer: Any = nn.ModuleDict(
            {
                "wte": table,
                "wpe": nn.Embedding(TOKENS, WIDTH),
                "h": nn.ModuleList(nn.ModuleList([CausalSelfAttention(), FeedForward()]) for _ in range(2)),
                "ln": nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5)),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        table.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        t = self.transformer
        x = t.wte(tokens) + t.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for at, (attention, feed) in enumerate(t.h):
            x = x + attention(t.ln[2 * at](x))
            x = x + feed(t.ln[2 * at + 1](x))
        return next_token_loss(self.lm_head(t.ln[4](x)), tokens)


class Heads(nn.Module):
    """Query, key, value and output with any numbers of heads."""

    def __init__(self, heads: int = 8, keys: int | None = None, size: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.size, keys = size, keys or heads
        self.wq = nn.Linear(WIDTH, heads * size, bias=bias)
        self.wk = nn.Linear(WIDTH, keys * size, bias=bias)
        self.wv = nn.Linear(WIDTH, keys * size, bias=bias)
        self.wo = nn.Linear(heads * size, WIDTH, bias=bias)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.size).transpose(1, 2)

    def turned(self, x: Tensor) -> Tensor:
        """What is done to queries and keys [B, heads, S, D]."""
        return x

    def biased(self, scores: Tensor) -> Tensor:
        """What is done to scores [B, heads, S, S]."""
        return scores

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.turned(self.split(self.wq(x))), self.turned(self.split(self.wk(x))), self.split(self.wv(x))
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = causal(self.biased(q @ k.transpose(-1, -2) * self.size**-0.5))
        out: Tensor = self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class ExpandedKeys(Heads):
    """Llama's repeat_kv: keys are expanded and viewed, not copied by an index."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.wq(x)), self.split(self.wk(x)), self.split(self.wv(x))
        B, H, S, D = q.shape
        n = k.shape[1]
        k, v = (t[:, :, None].expand(B, n, H // n, S, D).reshape(B, H, S, D) for t in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        made: Tensor = self.wo(out.transpose(1, 2).reshape(B, S, -1))
        return made


class GroupedQueries(Heads):
    """Queries in groups, one product for each group's key."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.wq(x)), self.split(self.wk(x)), self.split(self.wv(x))
        q = q.unflatten(1, (k.shape[1], -1))
        scores = causal(torch.einsum("bghid,bgjd->bghij", q, k) * self.size**-0.5)
        seen = torch.einsum("bghij,bgjd->bghid", scores.softmax(-1), v)
        out: Tensor = self.wo(seen.flatten(1, 2).transpose(1, 2).flatten(2))
        return out


class OneKey(Heads):
    """Multi-query attention by broadcasting the one key head."""

    def __init__(self) -> None:
        super().__init__(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.wq(x)), self.split(self.wk(x)), self.split(self.wv(x))
        scores = causal(torch.matmul(q, k.transpose(-1, -2)) * self.size**-0.5)
        out: Tensor = self.wo(torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2))
        return out


class RotaryByStack(Heads):
    """Pairs of neighbours are turned, by a stack of them."""

    def turned(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2], device=x.device)[:, None] * torch.tensor([1.0, 0.1], device=x.device)
        cos, sin = at.cos().to(x.dtype), at.sin().to(x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class RotaryByHalves(Heads):
    """The first half is turned with the second."""

    def turned(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2], device=x.device)[:, None] * torch.tensor([1.0, 0.1], device=x.device)
        at = torch.cat((at, at), dim=-1).to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return x * at.cos() + torch.cat((-b, a), dim=-1) * at.sin()


class RotaryByComplex(Heads):
    """Llama's first code: pairs as complex numbers."""

    def turned(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2], device=x.device)[:, None] * torch.tensor([1.0, 0.1], device=x.device)
        turn = torch.polar(torch.ones_like(at), at)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


class RelativeBias(Heads):
    """T5's: an embedding of distances gives a number for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Embedding(2 * TOKENS, 8)

    def biased(self, scores: Tensor) -> Tensor:
        at = torch.arange(scores.shape[-1], device=scores.device)
        return scores + self.relative(at[None] - at[:, None] + TOKENS).permute(2, 0, 1)[None]


class SwinBias(Heads):
    """Swin's: a parameter is indexed by distances."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * TOKENS, 8))
        at = torch.arange(TOKENS)
        self.register_buffer("index", at[None] - at[:, None] + TOKENS)

    def biased(self, scores: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(TOKENS, TOKENS, -1).permute(2, 0, 1).contiguous()
        return scores + bias.unsqueeze(0)


class Alibi(Heads):
    """A buffer of slopes, one for each head."""

    alibi: Tensor

    def __init__(self) -> None:
        super().__init__()
        slopes = torch.tensor([2.0 ** -(head + 1) for head in range(8)])
        at = torch.arange(TOKENS)
        self.register_buffer("alibi", slopes[:, None, None] * (at[None] - at[:, None]).clamp(max=0))

    def biased(self, scores: Tensor) -> Tensor:
        return scores + self.alibi


class Temperature(Heads):
    """Swin v2's: cosines of queries and keys times a learned scale for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((8, 1, 1), math.log(10.0)))

    def turned(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1)

    def biased(self, scores: Tensor) -> Tensor:
        return scores * self.logit_scale.clamp(max=math.log(100.0)).exp()


class HeadScale(Heads):
    """NormFormer's: a learned number for each head's output; and norms of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))
        self.norm = nn.LayerNorm(4)

    def turned(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.turned(self.split(self.wq(x))), self.turned(self.split(self.wk(x))), self.split(self.wv(x))
        seen = torch.einsum("bhij,bhjd->bihd", causal(q @ k.mT).softmax(-1), v)
        out: Tensor = self.wo(torch.einsum("bihd,h->bihd", seen, self.gamma).flatten(2))
        return out


class TalkingHeads(Heads):
    """Scores of heads are mixed by a matrix: what is before the mix cannot be apart."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8))

    def biased(self, scores: Tensor) -> Tensor:
        return torch.einsum("bhij,hg->bgij", scores, self.mix)


class Latent(nn.Module):
    """DeepSeek's multi-head latent attention with a rotary key that all heads share."""

    def __init__(self, heads: int = 8, nope: int = 4, rope: int = 2) -> None:
        super().__init__()
        self.nope, self.rope = nope, rope
        self.q_a, self.q_norm = nn.Linear(WIDTH, 16, bias=False), nn.LayerNorm(16)
        self.q_b = nn.Linear(16, heads * (nope + rope), bias=False)
        self.kv_a, self.kv_norm = nn.Linear(WIDTH, 12 + rope, bias=False), nn.LayerNorm(12)
        self.kv_b = nn.Linear(12, heads * (nope + 4), bias=False)
        self.out = nn.Linear(heads * 4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(B, S, -1, self.nope + self.rope).transpose(1, 2)
        latent, key = self.kv_a(x).split([12, self.rope], dim=-1)
        kv = self.kv_b(self.kv_norm(latent)).view(B, S, -1, self.nope + 4).transpose(1, 2)
        k, v = kv.split([self.nope, 4], dim=-1)
        key = key.view(B, S, 1, self.rope).transpose(1, 2).expand(-1, k.shape[1], -1, -1)
        scores = causal(q @ torch.cat((k, key), dim=-1).transpose(-1, -2))
        out: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1))
        return out


class Adapted(nn.Module):
    """LoRA beside a linear, written by hand."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 2.0 * self.lora_B(self.lora_A(x))
        return out


class AdaptedHeads(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wv, self.wo = (Adapted(WIDTH, WIDTH) for _ in range(3))  # type: ignore[assignment]


class LowRank(nn.Module):
    """A feed-forward net of which each matrix is a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, 128))
        self.down = nn.Sequential(nn.Linear(128, 8, bias=False), nn.Linear(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.silu(self.up(x)))
        return out


class Bottleneck(nn.Module):
    """Houlsby's adapter behind a feed-forward net."""

    def __init__(self) -> None:
        super().__init__()
        self.feed, self.down, self.up = FeedForward(), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.feed(x)
        out: Tensor = x + self.up(functional.relu(self.down(x)))
        return out


class Together(nn.Module):
    """GPT-J's and PaLM's: attention and feed-forward net of one norm, from one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.fused_dims = 8, (WIDTH, WIDTH, WIDTH, 4 * WIDTH)
        self.fused = nn.Linear(WIDTH, sum(self.fused_dims), bias=False)
        self.attn_out, self.ff_out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused(x).split(self.fused_dims, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        a, gate = ff.chunk(2, dim=-1)
        out: Tensor = self.attn_out(seen.transpose(1, 2).flatten(2)) + self.ff_out(functional.silu(gate) * a)
        return out


class Linearized(nn.Module):
    """Linear attention: running sums of outer products of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 8, nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 4)).unbind(2)
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        states = torch.einsum("bshd,bshe->bshde", k, v).cumsum(1)
        norm = torch.einsum("bshd,bshd->bsh", q, k.cumsum(1))
        out: Tensor = self.out((torch.einsum("bshd,bshde->bshe", q, states) / norm[..., None]).flatten(2))
        return out


class DeepNorm(nn.Module):
    """Norms behind residuals that are scaled up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Heads(), FeedForward(), Heads(), FeedForward()])
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer, norm in zip(self.layers, self.norms):
            x = norm(x * 1.41 + layer(x))
        return next_token_loss(x @ self.embed.weight.T, tokens)


class TorchOwn(nn.Module):
    """nn.MultiheadAttention, which does not run its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        out: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return out


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 8, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


MODELS = (
    model("nanoGPT, tied", NanoGPT, 0.52, 0.27),
    model("llama's repeat_kv", lambda: Decoder(lambda: ExpandedKeys(8, 4)), 0.53, 0.29, quick=True),
    model("two KV heads", lambda: Decoder(lambda: Heads(8, 2)), 0.53, 0.3),
    model("two KV heads by groups", lambda: Decoder(lambda: GroupedQueries(8, 2)), 0.53, 0.3, quick=True),
    model("two KV heads, expanded", lambda: Decoder(lambda: ExpandedKeys(8, 2)), 0.53, 0.3),
    model("one KV head", lambda: Decoder(OneKey), 0.54, 0.31),
    model("six heads", lambda: Decoder(lambda: Heads(6, bias=True)), 0.53, 0.32, quick=True),
    model("six heads of three keys", lambda: Decoder(lambda: Heads(6, 3)), 0.57, 0.31),
    model("rotary by stack", lambda: Decoder(RotaryByStack), 0.52, 0.28),
    model("rotary by halves", lambda: Decoder(RotaryByHalves), 0.52, 0.28),
    model("rotary by complex numbers", lambda: Decoder(RotaryByComplex), 0.52, 0.28),
    model("relative bias of T5", lambda: Decoder(RelativeBias), 0.52, 0.28, quick=True),
    model("relative bias of Swin", lambda: Decoder(SwinBias), 0.52, 0.28),
    model("ALiBi buffer", lambda: Decoder(Alibi), 0.52, 0.28),
    model("temperature by head", lambda: Decoder(Temperature), 0.52, 0.28),
    model("scale by head", lambda: Decoder(HeadScale), 0.52, 0.29),
    model("talking heads", lambda: Decoder(TalkingHeads), 0.53, 0.29),
    model("latent attention", lambda: Decoder(Latent), 0.55, 0.32),
    model("LoRA by hand", lambda: Decoder(AdaptedHeads), 0.52, 0.31),
    model("low rank", lambda: Decoder(Heads, LowRank), 0.53, 0.3),
    model("bottleneck adapter", lambda: Decoder(Heads, Bottleneck), 0.52, 0.29),
    model("attention and feed-forward of one linear", lambda: Decoder(Together), 0.52, 0.27),
    model("linear attention", lambda: Decoder(Linearized), 0.53, 0.29),
    model("DeepNorm, tied by matmul", DeepNorm, 0.56, 0.33),
    model("nn.MultiheadAttention", lambda: Decoder(TorchOwn), 0.73, 0.59),
    model("nn.TransformerEncoderLayer", lambda: Decoder(TorchEncoder), 0.67, 0.5),
)
