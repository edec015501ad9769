"""Encoder-decoders, cross attention, convolutions along time, and recurrences."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.derivation.models.attention import Heads
from tests.derivation.models.frame import (
    CLASSES,
    HIDDEN,
    ROWS,
    TOKENS,
    VOCAB,
    WIDTH,
    Decoder,
    FeedForward,
    Residual,
    causal,
    drawn,
    frame_batch,
    model,
    next_token_loss,
    token_batch,
)


def clones(module: nn.Module, n: int) -> nn.ModuleList:
    return nn.ModuleList(copy.deepcopy(module) for _ in range(n))


class MultiHeadedAttention(nn.Module):
    """The Annotated Transformer's."""

    def __init__(self, h: int = 8) -> None:
        super().__init__()
        self.d_k, self.h = WIDTH // h, h
        self.linears = clones(nn.Linear(WIDTH, WIDTH), 4)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        nbatches = query.size(0)
        query, key, value = (
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value))
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        x = torch.matmul(scores.softmax(dim=-1), value)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        out: Tensor = self.linears[-1](x)
        return out


class PositionwiseFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_1, self.w_2, self.dropout = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w_2(self.dropout(self.w_1(x).relu()))
        return out


class EncoderDecoder(nn.Module):
    """The Annotated Transformer: embeddings are one, the generator is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norms = clones(nn.LayerNorm(WIDTH), 6)
        self.encoder, self.enc_feed = MultiHeadedAttention(), PositionwiseFeedForward()
        self.own, self.cross, self.feed = MultiHeadedAttention(), MultiHeadedAttention(), PositionwiseFeedForward()
        self.generator = nn.Linear(WIDTH, VOCAB)
        at = torch.arange(TOKENS)[:, None] * torch.exp(torch.arange(0, WIDTH, 2) * -(math.log(100.0) / WIDTH))
        self.register_buffer("pe", torch.stack((at.sin(), at.cos()), dim=-1).flatten(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens.flip(1)) * math.sqrt(WIDTH) + self.pe
        n = self.norms[0](x)
        x = x + self.encoder(n, n, n)
        memory = x + self.enc_feed(self.norms[1](x))
        y = self.embed(tokens) * math.sqrt(WIDTH) + self.pe
        mask = torch.ones(1, TOKENS, TOKENS, device=y.device).tril()
        n = self.norms[2](y)
        y = y + self.own(n, n, n, mask)
        y = y + self.cross(self.norms[3](y), memory, memory)
        y = y + self.feed(self.norms[4](y))
        logits = self.generator(self.norms[5](y)).log_softmax(-1)
        return functional.nll_loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class CrossAttention(nn.Module):
    """Stable Diffusion's: the context has another width, keys and values are one linear."""

    def __init__(self, context: int = 24) -> None:
        super().__init__()
        self.heads = 8
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(context, 2 * WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        seen = torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) / 2).softmax(-1), v)
        out: Tensor = self.to_out(seen.transpose(1, 2).flatten(2))
        return out


class GEGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = self.out(x * functional.gelu(gate))
        return out


class Conditioned(nn.Module):
    """Frames attend to a context of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.cross, self.feed = nn.Linear(CLASSES, 24), CrossAttention(), GEGLU()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.cross(self.norm(x), self.context(y.flip(1)))
        return functional.mse_loss(self.head(x + self.feed(x)), y)


class Perceiver(nn.Module):
    """Latents attend to frames, then to each other, and are read by queries."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.queries = nn.Parameter(torch.randn(6, WIDTH)), nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.read, self.write = CrossAttention(WIDTH), CrossAttention(WIDTH)
        self.block = Residual(GEGLU(), FeedForward())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        latents = self.latents.unsqueeze(0).expand(len(x), -1, -1)
        latents = self.block(latents + self.read(latents, x))
        made = self.write(self.queries.unsqueeze(0).expand(len(x), -1, -1), latents)
        return functional.mse_loss(self.head(made), y)


class ConvModule(nn.Module):
    """Conformer's: 1x1 convolution, GLU, depthwise convolution, batch norm, 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.pointwise1 = nn.Conv1d(WIDTH, 2 * WIDTH, 1)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.norm, self.pointwise2 = nn.GroupNorm(1, WIDTH), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.glu(self.pointwise1(x.transpose(1, 2)), dim=1)
        out: Tensor = self.pointwise2(functional.silu(self.norm(self.depthwise(x))))
        return out.transpose(1, 2)


class Framewise(nn.Module):
    """Frames to numbers of each, through blocks."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body, self.head = Residual(*layers), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.head(self.body(x)), y)


class GatedConv(nn.Module):
    """Mamba's and LFM's short convolution between linears, causal by a pad."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, c, x = self.inner(x).transpose(1, 2).chunk(3, dim=1)
        made = c * self.conv(b * x)[..., : x.shape[-1]]
        out: Tensor = self.out(made.transpose(1, 2))
        return out


class SpatialGating(nn.Module):
    """gMLP's: half of the hidden features are mixed along tokens and gate the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm, self.spatial = nn.LayerNorm(HIDDEN), nn.Conv1d(TOKENS, TOKENS, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = functional.gelu(self.up(x)).chunk(2, dim=-1)
        out: Tensor = self.down(u * self.spatial(self.norm(v)))
        return out


class SpatialGatingByLinear(SpatialGating):
    """The same without the norm, and with a linear along tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Linear(TOKENS, TOKENS)  # type: ignore[assignment]
        del self.norm

    def forward(self, x: Tensor) -> Tensor:
        u, v = functional.gelu(self.up(x)).chunk(2, dim=-1)
        out: Tensor = self.down(u * self.spatial(v.transpose(1, 2)).transpose(1, 2))
        return out


class TimeMix(nn.Module):
    """RWKV-4's: a decaying mean over time, with a decay and a bonus for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.time_decay, self.time_first = nn.Parameter(torch.linspace(-3, 1, WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.rand(1, 1, WIDTH)) for _ in range(3))
        self.key, self.value, self.receptance, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        last = functional.pad(x, (0, 0, 1, -1))
        k, v, r = (
            lin(x * mix + last * (1 - mix))
            for lin, mix in ((self.key, self.mix_k), (self.value, self.mix_v), (self.receptance, self.mix_r))
        )
        num, den = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        outs, decay = [], torch.exp(-torch.exp(self.time_decay))
        for t in range(x.shape[1]):
            kt, vt = k[:, t], v[:, t]
            bonus = torch.exp(self.time_first + kt)
            outs.append((num + bonus * vt) / (den + bonus))
            num, den = decay * num + torch.exp(kt) * vt, decay * den + torch.exp(kt)
        out: Tensor = self.output(torch.sigmoid(r) * torch.stack(outs, dim=1))
        return out


class SelectiveScan(nn.Module):
    """Mamba's: steps, inputs and outputs of a state for each feature are made of all features."""

    def __init__(self, inner: int = HIDDEN, state: int = 4) -> None:
        super().__init__()
        self.state, self.in_proj = state, nn.Linear(WIDTH, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(inner, 2 + 2 * state, bias=False), nn.Linear(2, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(inner, 1))
        self.D, self.out_proj = nn.Parameter(torch.ones(inner)), nn.Linear(inner, WIDTH, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = functional.silu(self.conv1d(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        dt, b, c = self.x_proj(x).split([2, self.state, self.state], dim=-1)
        dt = functional.softplus(self.dt_proj(dt))
        decay = torch.exp(dt[..., None] * -torch.exp(self.A_log))
        grown = dt[..., None] * b[:, :, None, :] * x[..., None]
        h, outs = torch.zeros_like(grown[:, 0]), []
        for t in range(u.shape[1]):
            h = decay[:, t] * h + grown[:, t]
            outs.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
        y = torch.stack(outs, dim=1) + self.D * x
        out: Tensor = self.out_proj(y * functional.silu(z))
        return out


class HeadScan(nn.Module):
    """Mamba-2's and GLA's kind: a state matrix and a decay for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.decay, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, WIDTH)
        self.norm, self.out = nn.RMSNorm(4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).unbind(2)
        decay = self.decay(x).sigmoid()
        h, outs = k.new_zeros(len(x), k.shape[2], 4, 4), []
        for t in range(x.shape[1]):
            h = h * decay[:, t, :, None, None] + k[:, t, :, :, None] * v[:, t, :, None]
            outs.append(torch.einsum("bhd,bhde->bhe", q[:, t], h))
        out: Tensor = self.out(self.norm(torch.stack(outs, 1)).flatten(2) * functional.silu(self.gate(x)))
        return out


class GRU(nn.Module):
    """A cell of one's own: gates of the state before read all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.h2h = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            xr, xz, xn = self.x2h(x[:, t]).chunk(3, -1)
            hr, hz, hn = self.h2h(h).chunk(3, -1)
            z = (xz + hz).sigmoid()
            h = (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h
            outs.append(h)
        return torch.stack(outs, dim=1)


class MinGRU(nn.Module):
    """minGRU: gates read the input alone, so that features of the state stand apart."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_and_gate, self.out = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.hidden_and_gate(x).chunk(2, dim=-1)
        z, h, outs = gate.sigmoid(), torch.zeros_like(hidden[:, 0]), []
        for t in range(x.shape[1]):
            h = (1 - z[:, t]) * h + z[:, t] * hidden[:, t]
            outs.append(h)
        out: Tensor = self.out(torch.stack(outs, dim=1))
        return out


class ByTwo(nn.Module):
    """Two towers, one of tokens: a shared encoder of one, a contrast of both (CLIP's)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shared = nn.Embedding(VOCAB, WIDTH), Residual(Heads(), FeedForward())
        self.left, self.right = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        a, b = self.shared(self.embed(tokens)).mean(1), self.shared(self.embed(tokens.flip(1))).mean(1)
        a, b = functional.normalize(self.left(a), dim=-1), functional.normalize(self.right(b), dim=-1)
        return functional.cross_entropy(a @ b.t() * self.logit_scale.exp(), torch.arange(len(a), device=a.device))


class Universal(nn.Module):
    """One block many times, as in ALBERT, with factored embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.widen = nn.Embedding(VOCAB, 16), nn.Linear(16, WIDTH)
        self.block, self.narrow = Residual(Heads(), FeedForward()), nn.Linear(WIDTH, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.widen(self.embed(tokens))
        for _ in range(3):
            x = self.block(x)
        return next_token_loss(functional.linear(self.narrow(x), self.embed.weight), tokens)


class Windows(nn.Module):
    """Attention in windows that are rolled, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(x, -2, dims=1).unflatten(1, (3, 4)).flatten(0, 1)
        q, k, v = self.qkv(x).view(len(x), 4, 3, -1, 4).permute(2, 0, 3, 1, 4)
        out = self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return torch.roll(out.unflatten(0, (-1, 3)).flatten(1, 2), 2, dims=1)


class SharedBlocks(nn.Module):
    """One block in all places of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks = nn.ModuleList([Residual(Heads(), FeedForward())] * 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return next_token_loss(self.head(x), tokens)


def padded_batch(seed: int) -> dict[str, Tensor]:
    """``token_batch()`` with the lengths of rows."""
    return {**token_batch(seed), "lengths": torch.randint(4, TOKENS + 1, (ROWS,), generator=drawn(seed))}


class Padded(nn.Module):
    """Masks from lengths, which hide padding from attention and from the loss; the last token is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 96), nn.Linear(WIDTH, WIDTH)
        self.feed, self.head = FeedForward(), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(tokens)
        kept = torch.arange(TOKENS, device=x.device) < lengths[:, None]
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = causal(q @ k.mT).masked_fill(~kept[:, None, None], -1e9)
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        last = (x + self.feed(x))[torch.arange(len(x), device=x.device), lengths - 1]
        return functional.cross_entropy(self.head(last), tokens[:, 0])


MODELS = (
    model("Annotated Transformer", EncoderDecoder, 0.52, 0.27, quick=True),
    model("context of another width", Conditioned, 0.51, 0.26, frame_batch),
    model("Perceiver", Perceiver, 0.53, 0.29, frame_batch),
    model("Conformer", lambda: Framewise(FeedForward(), Heads(), ConvModule(), FeedForward()), 0.52, 0.28, frame_batch),
    model("gated short convolution", lambda: Decoder(GatedConv), 0.53, 0.29),
    model("gMLP", lambda: Framewise(SpatialGating(), SpatialGating()), 0.52, 0.28, frame_batch),
    model(
        "gMLP by linear", lambda: Framewise(SpatialGatingByLinear(), SpatialGatingByLinear()), 0.51, 0.26, frame_batch
    ),
    model("RWKV", lambda: Decoder(TimeMix), 0.53, 0.29),
    model("Mamba", lambda: Decoder(SelectiveScan), 0.55, 0.32),
    model("states by head", lambda: Decoder(HeadScan), 0.52, 0.28),
    model("GRU cell", lambda: Decoder(GRU), 0.52, 0.28),
    model("minGRU", lambda: Decoder(MinGRU), 0.52, 0.28),
    model("two towers of one encoder", ByTwo, 0.51, 0.27),
    model("one block many times", Universal, 0.55, 0.32),
    model("one block in all places", SharedBlocks, 0.51, 0.27),
    model("rolled windows", lambda: Decoder(Windows), 0.53, 0.29),
    model("padded", Padded, 0.51, 0.26, padded_batch),
)
