"""Nets that are wrong under sequence parallelism alone: code between modules that sees a rank's own tokens only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.nets.frame import HIDDEN, TOKENS, WIDTH, Net, Projections, attend, heads_of_size, wrong
from tests.helpers.nets.sequences import SWITCHED, Attention, Block, Mlp, Model


class Convolution(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class ShiftInside(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + functional.pad(x, (0, 0, 1, -1))


class Slices(Block):
    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, 1:] + x[:, :-1]], 1)


class Roll(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 1)


class Flip(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + x.flip(1)


class CumulativeSum(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + x.cumsum(1) / 10


class Mean(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Largest(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + x.amax(1, keepdim=True)


class SoftmaxOverTokens(Block):
    def between(self, x: Tensor) -> Tensor:
        return x * x.softmax(1)


class NormOfSequence(Block):
    def between(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=(1, 2), keepdim=True)


class NormOverTokensAndFeatures(Block):
    def between(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[1:])


class NumberOfTokens(Block):
    def between(self, x: Tensor) -> Tensor:
        return x * x.shape[1] ** -0.5


class LearnedPositions(Block):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(200, WIDTH))

    def between(self, x: Tensor) -> Tensor:
        return x + self.positions[: x.shape[1]]


class Sinusoids(Block):
    def between(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        return x * (1 + at.sin()[:, None])


class GateOfTokens(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(TOKENS, 1))

    def between(self, x: Tensor) -> Tensor:
        return x * self.gate


class BatchNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def between(self, x: Tensor) -> Tensor:
        return self.batch_norm(x.transpose(1, 2)).transpose(1, 2)


class TokenMixer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(TOKENS, TOKENS)

    def between(self, x: Tensor) -> Tensor:
        return x + self.mixer(x.transpose(1, 2)).transpose(1, 2)


class PlainAttention(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + functional.scaled_dot_product_attention(x, x, x)


class ForwardCalled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.torch_attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def between(self, x: Tensor) -> Tensor:
        return x + self.torch_attention.forward(x, x, x)[0]


class Prompted(Block):
    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        longer = torch.cat([self.prompt.expand(len(x), -1, -1), x], 1)
        return super().forward(longer)[:, 2:]


class EverySecond(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + functional.interpolate(x[:, ::2].transpose(1, 2), size=x.shape[1]).transpose(1, 2)


class Capacity(Block):
    def between(self, x: Tensor) -> Tensor:
        chosen = x[..., :1] > 0
        fits = chosen & (chosen.cumsum(1) <= 3)
        return torch.where(fits, x.tanh(), x)


class Mask(Block):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask[..., None])


class MaskModel(Model):
    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, (tokens > 9).to(x.dtype))
        return x


class Condition(Block):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + condition[:, None])


class ConditionModel(Model):
    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        condition = x.mean(1)
        for block in self.blocks:
            x = block(x, condition)
        return x


class LossOnHiddenStates(Model):
    def forward(self, tokens: Tensor) -> Tensor:
        self.hidden: list[Tensor] = []
        loss = super().forward(tokens)
        return loss + sum(x.square().mean() for x in self.hidden)

    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            self.hidden.append(x)
        return x


class FirstTokenOfABlock(Model):
    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[1](first) + first[:, :1]


class Hooked(Model):
    """A hook reads what the first block puts out."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: list[Tensor] = []
        self.blocks[0].register_forward_hook(self.reading)

    def reading(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.read.append(output.softmax(1))

    def forward(self, tokens: Tensor) -> Tensor:
        self.read.clear()
        return super().forward(tokens) + self.read[0].square().sum() / 100


class Backwards(Model):
    def run(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class Listed(nn.Module):
    """Blocks that are lists and are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleList([Attention(), Mlp()]) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            for layer in block.children():
                x = x + layer(x)
        return x.square().mean()


class Direct(Projections):
    """Sharded layers directly in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of_size(f(x), 4) for f in (self.q, self.k, self.v))
        x = x + self.o(attend(q, k, v))
        return x + self.down(self.up(x).relu())


def inside(name: str, kind: type[nn.Module], line: str, **options: Any) -> Net:
    """A net of blocks that are wrong."""
    return wrong(name, lambda: Model(kind), SWITCHED, line, **options)


MISTAKES = (
    inside("convolution over tokens", Convolution, "self.conv(x.transpose(1, 2)"),
    inside("token shift", ShiftInside, "functional.pad(x, (0, 0, 1, -1))"),
    inside("slices of tokens", Slices, "x[:, 1:] + x[:, :-1]"),
    inside("roll over tokens", Roll, "x.roll(1, 1)"),
    inside("flip of tokens", Flip, "x.flip(1)"),
    inside("sums over tokens", CumulativeSum, "x.cumsum(1) / 10"),
    inside("mean of tokens", Mean, "x.mean(1, keepdim=True)"),
    inside("largest of tokens", Largest, "x.amax(1, keepdim=True)"),
    inside("softmax over tokens", SoftmaxOverTokens, "x.softmax(1)"),
    inside("norm of a sequence", NormOfSequence, "x.norm(dim=(1, 2), keepdim=True)"),
    inside("norm over tokens and features", NormOverTokensAndFeatures, "functional.layer_norm(x, x.shape[1:])"),
    inside("scale by the number of tokens", NumberOfTokens, "x.shape[1] ** -0.5"),
    inside("learned positions", LearnedPositions, "self.positions[: x.shape[1]]"),
    inside("sinusoids of positions", Sinusoids, "x * (1 + at.sin()[:, None])"),
    inside("gate of each token", GateOfTokens, "x * self.gate"),
    inside("nn.BatchNorm1d over tokens", BatchNorm, "self.batch_norm(x.transpose(1, 2)"),
    inside("token mixer", TokenMixer, "self.mixer(x.transpose(1, 2)"),
    inside("attention in the block's code", PlainAttention, "scaled_dot_product_attention(x, x, x)"),
    inside("attention by its forward", ForwardCalled, "self.torch_attention.forward(x, x, x)"),
    inside("prompts in each block", Prompted, "torch.cat([self.prompt"),
    inside("every second token", EverySecond, "functional.interpolate(x[:, ::2]", sizes=(4,)),
    inside("capacity in the block's code", Capacity, "chosen.cumsum(1)"),
    wrong("mask of tokens", lambda: MaskModel(Mask), SWITCHED, "x * mask[..., None]"),
    wrong("condition of sequences", lambda: ConditionModel(Condition), SWITCHED, "x + condition[:, None]"),
    wrong("loss on hidden states", LossOnHiddenStates, SWITCHED, "x.square().mean() for x in self.hidden"),
    wrong("first token of a block", FirstTokenOfABlock, SWITCHED, "first[:, :1]"),
    wrong("hook on a block", Hooked, SWITCHED, "output.softmax(1)"),
    wrong("blocks in another order", Backwards, SWITCHED, "x = block(x)"),
    wrong("blocks that are lists", Listed, SWITCHED, "x = x + layer(x)", refused=True),
    wrong("layers directly in blocks", lambda: Model(Direct), SWITCHED, "self.down(self.up(x).relu())", refused=True),
    wrong(
        "rows outside of blocks",
        lambda: nn.ModuleDict({"a": Model(), "b": Model()}),
        SWITCHED,
        "for block in self.blocks",
        refused=True,
    ),
)
