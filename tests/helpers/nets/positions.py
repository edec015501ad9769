"""Nets whose attentions know where tokens are: ALiBi, rotary embeddings, biases of heads, masks, cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.nets.frame import (
    HEAD_DIM,
    HEADS,
    QKVO,
    TOKENS,
    VOCAB,
    WIDTH,
    LanguageModel,
    Net,
    Projections,
    attend,
    heads_of_size,
    masked_batch,
    next_token_loss,
    right,
    rule,
    rules,
    wrong,
)


class Scored(Projections):
    """Attention whose scores [B, heads, S, S] are changed by ``biased``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.turned(self.q(x)), self.turned(self.k(x)), heads_of_size(self.v(x), HEAD_DIM)
        scores = self.biased(q @ k.transpose(-1, -2) * HEAD_DIM**-0.5, mask)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def turned(self, x: Tensor) -> Tensor:
        return heads_of_size(x, HEAD_DIM)

    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores


def distances(scores: Tensor) -> Tensor:
    """Minus the distance of each two tokens, as the scores' dtype and on their device."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    return (places[:, None] - places).abs().neg().to(scores.dtype)


def slopes(count: int) -> Tensor:
    return torch.tensor([2.0 ** (-8.0 * (head + 1) / count) for head in range(count)])


class AlibiFunction(Scored):
    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        each = slopes(scores.shape[1])[:, None, None].to(scores)
        return scores + each * distances(scores)


class AlibiBuffer(Scored):
    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", slopes(HEADS), persistent=False)

    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores + self.slopes[: scores.shape[1], None, None] * distances(scores)


class AlibiWholeBuffer(AlibiBuffer):
    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores + self.slopes.view(-1, 1, 1) * distances(scores)


class DistanceAlike(Scored):
    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores + 0.1 * distances(scores)


class Temperature(Scored):
    """A learned temperature of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.temperature = nn.Parameter(torch.ones(HEADS))

    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores * self.temperature.view(-1, 1, 1)


class SlicedTemperature(Temperature):
    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores * self.temperature[: scores.shape[1]].view(-1, 1, 1)


class OneTemperature(Scored):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores * self.temperature.exp()


class RelativeBias(Scored):
    """T5's: a number for each distance and head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.bias = nn.Embedding(TOKENS, HEADS)

    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.bias(distances(scores).neg().long()).permute(2, 0, 1)
        return scores + bias


class RelativeBiasSlice(RelativeBias):
    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.bias(distances(scores).neg().long()).permute(2, 0, 1)
        return scores + bias[: scores.shape[1]]


def rotary(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, dim] for x [B, S, H]."""
    places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
    frequencies = 100 ** -(torch.arange(0, dim, 2, device=x.device, dtype=x.dtype) / dim)
    both = torch.outer(places, frequencies).repeat(1, 2)
    return both.cos(), both.sin()


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Rope(Scored):
    def turned(self, x: Tensor) -> Tensor:
        heads = heads_of_size(x, HEAD_DIM)
        cos, sin = rotary(x, HEAD_DIM)
        return heads * cos + rotate_half(heads) * sin


class RopeBeforeHeads(Scored):
    def turned(self, x: Tensor) -> Tensor:
        cos, sin = rotary(x, x.shape[-1])
        return heads_of_size(x * cos + rotate_half(x) * sin, HEAD_DIM)


class ComplexRope(Scored):
    """Llama's reference code."""

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(heads_of_size(x, HEAD_DIM).contiguous().unflatten(-1, (-1, 2)))
        places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        angles = torch.outer(places, torch.tensor([1.0, 0.1]).to(x))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class SinusoidsInside(Scored):
    """Positions are added to queries and keys, behind their projections."""

    def turned(self, x: Tensor) -> Tensor:
        cos, _ = rotary(x, x.shape[-1])
        return heads_of_size(x + cos, HEAD_DIM)


class AdditiveMask(Scored):
    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return scores + (~mask)[:, None, None, :].to(scores) * -1e9


class BooleanMask(Scored):
    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)


class MaskOfHeads(BooleanMask):
    """Half of the heads look back, half forward: the first half of a rank's own."""

    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        back, ahead = scores.chunk(2, dim=1)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return torch.cat([back.masked_fill(~seen, -1e9), ahead.masked_fill(~seen.T, -1e9)], dim=1)


class Baddbmm(Scored):
    def biased(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        flat = scores.flatten(0, 1)
        causal = flat.new_full(flat.shape[-2:], -1e9).triu(1).expand_as(flat)
        eye = torch.eye(flat.shape[-1]).to(flat).expand_as(flat)
        return torch.baddbmm(causal, flat, eye, beta=1.0, alpha=0.5).view_as(scores)


class Memory(nn.Module):
    """Cross-attention of tokens to what an encoder made of them in reverse order."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.encoder = Scored()
        self.decoder = Scored()
        self.cross = attention
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        memory = self.embed(tokens.flip(1))
        memory = memory + self.encoder(memory)
        x = self.embed(tokens)
        x = x + self.decoder(x)
        x = x + self.cross(self.norm(x), memory)
        return next_token_loss(self.head(x), tokens)


class Cross(Projections):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (heads_of_size(t, HEAD_DIM) for t in (self.q(x), self.k(memory), self.v(memory)))
        return self.o(attend(q, k, v))


class PackedCross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        k, v = self.kv(memory).chunk(2, dim=-1)
        return self.o(attend(*(heads_of_size(t, HEAD_DIM) for t in (self.q(x), k, v))))


def lm(layer: type[nn.Module]) -> LanguageModel:
    return LanguageModel(layer())


PER_HEAD = rules("q|k|v", "o", rule(r".*\.temperature", "column"))
SUMMED = rules("q|k|v", "o", rule(r".*\.temperature", "skip", grad_allreduce=True))
BIAS = rules("q|k|v", "o", rule("bias", "column"))
CROSS = rules("q|k|v", "o", rule("kv", "column", shape=[2, -1]))
CROSS_HEADS = rules("q|k|v", "o", rule("kv", "column", shape=[-1, -1]))

NETS: tuple[Net, ...] = (
    right("distance for all heads", lambda: lm(DistanceAlike), QKVO),
    right("temperature of each head", lambda: lm(Temperature), PER_HEAD),
    right("one temperature with grad_allreduce", lambda: lm(OneTemperature), SUMMED),
    right("relative bias of each head", lambda: lm(RelativeBias), BIAS),
    right("rotary", lambda: lm(Rope), QKVO),
    right("rotary, complex", lambda: lm(ComplexRope), QKVO),
    right("additive mask", lambda: lm(AdditiveMask), QKVO, batch=masked_batch),
    right("boolean mask", lambda: lm(BooleanMask), QKVO, batch=masked_batch),
    right("baddbmm", lambda: lm(Baddbmm), QKVO),
    right("cross-attention", lambda: Memory(Cross()), QKVO),
    right("cross-attention, packed with shape", lambda: Memory(PackedCross()), CROSS),
    wrong("ALiBi from a function", lambda: lm(AlibiFunction), QKVO, "slopes(scores.shape[1])[:, None, None]"),
    wrong(
        "ALiBi from a slice of a buffer", lambda: lm(AlibiBuffer), QKVO, "self.slopes[: scores.shape[1], None, None]"
    ),
    wrong("ALiBi of all heads", lambda: lm(AlibiWholeBuffer), QKVO, "self.slopes.view(-1, 1, 1)"),
    wrong("temperature of the first heads", lambda: lm(SlicedTemperature), QKVO, "self.temperature[: scores.shape[1]]"),
    wrong("one temperature, its gradient partial", lambda: lm(OneTemperature), QKVO, "scores * self.temperature.exp()"),
    wrong("relative bias of the first heads", lambda: lm(RelativeBiasSlice), QKVO, "scores + bias[: scores.shape[1]]"),
    wrong("rotary over all features", lambda: lm(RopeBeforeHeads), QKVO, "x * cos + rotate_half(x) * sin"),
    wrong("sinusoids of a local width", lambda: lm(SinusoidsInside), QKVO, "cos, _ = rotary(x, x.shape[-1])"),
    wrong("masks of half of the heads", lambda: lm(MaskOfHeads), QKVO, "scores.chunk(2, dim=1)", sizes=(2,)),
    wrong(
        "cross-attention, packed by heads",
        lambda: Memory(PackedCross()),
        CROSS_HEADS,
        "self.kv(memory).chunk(2, dim=-1)",
    ),
)
