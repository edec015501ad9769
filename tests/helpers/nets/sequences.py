"""Nets whose blocks do something with tokens and are right under sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.helpers.nets.frame import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    TOKENS,
    VOCAB,
    WIDTH,
    Projections,
    attend,
    heads_of_size,
    next_token_loss,
    right,
    rule,
    rules,
)

Make = Callable[[], nn.Module]

SWITCHED = rules("q|k|v|up", "o|down", sequence_parallel=True)


class Attention(Projections):
    """None of its arguments says that it mixes tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attended(x, x)

    def attended(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (heads_of_size(f(t), HEAD_DIM) for f, t in ((self.q, x), (self.k, y), (self.v, y)))
        return self.o(attend(q, k, v))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Block(nn.Module):
    """A usual block, of which subclasses change a step."""

    def __init__(self, attention: Make = Attention, mlp: Make = Mlp) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.between(x) + self.mlp(self.norm2(x))

    def between(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    """Tokens to the loss of the next ones, through two blocks."""

    def __init__(self, kind: type[nn.Module] = Block, *args: Any, sequential: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        blocks = [kind(*args) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks) if sequential else nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return next_token_loss(self.head(self.norm(self.run(self.embed(tokens), tokens))), tokens)

    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# right: attention with any signature


class Reshaping(Projections):
    def forward(self, batch_of_sequences: Tensor) -> Tensor:
        b, s, _ = batch_of_sequences.shape
        q, k, v = (f(batch_of_sequences).reshape(b * s, -1, HEAD_DIM) for f in (self.q, self.k, self.v))
        q, k, v = (t.reshape(b, s, -1, HEAD_DIM).transpose(1, 2) for t in (q, k, v))
        return self.o(attend(q, k, v))


class Queries(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return self.attended(query, key)


class CalledThrice(Block):
    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed)
        return x + self.mlp(self.norm2(x))


class KeywordAttention(Attention):
    def forward(self, *, causal: bool, features: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return self.attended(features, features), None


class ByKeyword(Block):
    def forward(self, *, inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = inputs + self.attention(causal=True, features=self.norm1(inputs))[0]
        return x + self.mlp(self.norm2(x)), x.new_ones(())


class KeywordModel(Model):
    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            x, one = block(inputs=x)
        return x * one


class MixingMlp(Mlp):
    """Another MLP that mixes: each token's hidden features see those before it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x).cumsum(1)))


class Positions(Attention):
    """Adds an embedding of positions inside."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.positions[: x.shape[1]])


class Router(nn.Module):
    """Experts with a capacity: places are given by the order of a batch's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x.flatten(0, 1)).softmax(-1)
        chosen = functional.one_hot(scores.argmax(-1), 2)
        fits = chosen * (chosen.cumsum(0) <= x.shape[1] * 2)
        weights = (scores * fits).view(*x.shape[:2], 2)
        return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class SelfAttention(nn.Module):
    """torch's, which the rules do not shard."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class TorchAttention(Block):
    """torch's attention directly in the block."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ConvolutionModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Shift(nn.Module):
    """No parameters: each token and the one before it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.pad(x, (0, 0, 1, -1))


class MeanOfTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class TokenNorm(nn.Module):
    """Over the tokens of a sequence, not over features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, keepdim=True) + 1e-3).sqrt()


class ScaleNorm(nn.Module):
    """A norm over features of one's own: it is known by its code and works on a rank's own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Between(Block):
    """A module between attention and MLP."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.extra = kind()

    def between(self, x: Tensor) -> Tensor:
        return self.extra(x)


class GivenFeatures(Block):
    """Every block is given features of all tokens beside the hidden states."""

    def forward(self, x: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + features.tanh())


class FeaturesModel(Model):
    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        features = x.sin()
        for block in self.blocks:
            x = block(x, features)
        return x


class Checkpointed(Model):
    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Accumulated(Model):
    """Two batches of one size and another shape before the backward pass, recomputed in it."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + super().forward(tokens.view(2, -1))

    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class VisionTransformer(Model):
    """timm's: blocks in a nn.Sequential, a class token, and so an odd number of tokens."""

    def __init__(self) -> None:
        super().__init__(sequential=True)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        patches = self.embed(tokens)
        x = self.norm(self.blocks(torch.cat([self.token.expand(len(patches), -1, -1), patches], 1)))
        return functional.cross_entropy(self.head(x[:, 0]), tokens[:, 0])


class Packed(Block):
    """Takes and returns a tuple, as modules in a nn.Sequential do that need more than one value."""

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, scale = both
        return super().forward(x * scale), scale


class PackedModel(Model):
    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.blocks((x, x.new_full((), 0.7)))[0]


RIGHT = (
    right("attention that reshapes over the batch", lambda: Model(Block, Reshaping), SWITCHED),
    right("attention without telling arguments", Model, SWITCHED),
    right("attention of query, key and value", lambda: Model(CalledThrice, Queries), SWITCHED),
    right("blocks by keyword that return tuples", lambda: KeywordModel(ByKeyword, KeywordAttention), SWITCHED),
    right("MLP that sums over tokens", lambda: Model(Block, Attention, MixingMlp), SWITCHED),
    right(
        "positions inside attention",
        lambda: Model(Block, Positions),
        rules("q|k|v|up", "o|down", rule(".*positions", "skip", grad_allreduce=True), sequence_parallel=True),
    ),
    right("router with capacity", lambda: Model(Block, Attention, Router), SWITCHED),
    right("unsharded attention in a module", lambda: Model(Block, SelfAttention), SWITCHED),
    right("unsharded nn.MultiheadAttention", lambda: Model(TorchAttention), SWITCHED),
    right("convolution over tokens in a module", lambda: Model(Between, ConvolutionModule), SWITCHED),
    right("token shift in a module", lambda: Model(Between, Shift), SWITCHED),
    right("mean over tokens in a module", lambda: Model(Between, MeanOfTokens), SWITCHED),
    right("norm over tokens", lambda: Model(Between, TokenNorm), SWITCHED),
    right("norm of one's own over features", lambda: Model(Between, ScaleNorm), SWITCHED),
    right("features beside hidden states", lambda: FeaturesModel(GivenFeatures), SWITCHED),
    right("checkpointed blocks", Checkpointed, SWITCHED),
    right("checkpointed blocks and two shapes", Accumulated, SWITCHED),
    right("blocks in nn.Sequential", VisionTransformer, SWITCHED),
    right("tuples through nn.Sequential", lambda: PackedModel(Packed, sequential=True), SWITCHED),
)
