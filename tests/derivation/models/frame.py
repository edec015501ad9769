"""What hand-written models without rules have in common: how one is described, and parts that many of them have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.nets.frame import seeded

WIDTH, HIDDEN, VOCAB, CLASSES = 32, 64, 48, 8
ROWS, TOKENS = 5, 12
"""Rows that no TP size divides."""

Batch = Callable[[int], dict[str, Tensor]]
"""By seed."""


@dataclass(frozen=True)
class Model:
    """A model in a usual style for which nobody wrote rules.

    Args:
        name: says in a few words what is particular.
        build: a new model whose ``forward(**batch)`` returns a loss, with the same weights at every call.
        share: by tensor parallel size, the share of the parameters that a rank holds at most, as it is now.
        batch: what the model is called with, by seed.
        quick: whether it is looked at in CI.
    """

    name: str
    build: Callable[[], nn.Module]
    share: dict[int, float]
    batch: Batch = field(default=lambda seed: token_batch(seed))
    quick: bool = False


def model(
    name: str,
    make: Callable[[], nn.Module],
    two: float,
    four: float,
    batch: Batch | None = None,
    *,
    quick: bool = False,
) -> Model:
    """A model whose ranks hold the shares ``two`` and ``four`` at most; ``make`` need not seed itself."""

    def noisy() -> nn.Module:
        made = make()
        with torch.no_grad():  # parameters that are all zeros or ones hide what they do
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        return made

    return Model(name, seeded(noisy), {2: two, 4: four}, batch or token_batch, quick)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_batch(seed: int) -> dict[str, Tensor]:
    """``{"tokens": [5, 12]}``."""
    return {"tokens": torch.randint(VOCAB, (ROWS, TOKENS), generator=drawn(seed))}


def image_batch(seed: int) -> dict[str, Tensor]:
    """``{"images": [5, 3, 16, 16], "labels": [5]}``."""
    made = drawn(seed)
    return {
        "images": torch.randn(ROWS, 3, 16, 16, generator=made),
        "labels": torch.randint(CLASSES, (ROWS,), generator=made),
    }


def vector_batch(seed: int) -> dict[str, Tensor]:
    """``{"x": [5, 32], "y": [5, 8]}``."""
    made = drawn(seed)
    return {"x": torch.randn(ROWS, WIDTH, generator=made), "y": torch.randn(ROWS, CLASSES, generator=made)}


def frame_batch(seed: int) -> dict[str, Tensor]:
    """``{"x": [5, 12, 32], "y": [5, 12, 8]}``."""
    made = drawn(seed)
    return {
        "x": torch.randn(ROWS, TOKENS, WIDTH, generator=made),
        "y": torch.randn(ROWS, TOKENS, CLASSES, generator=made),
    }


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, S, V] against the tokens one place further on."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def causal(scores: Tensor) -> Tensor:
    """Scores [..., S, S] in which no token sees a later one."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf"))


class Decoder(nn.Module):
    """Tokens to the loss of the next ones, with pre-norm blocks of a mixer of tokens and a feed-forward net."""

    def __init__(self, mixer: Callable[[], nn.Module], feed: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.place = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.layers = nn.ModuleList(make() for _ in range(2) for make in (mixer, feed or FeedForward))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return next_token_loss(self.head(self.norm(x)), tokens)


class FeedForward(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Patches(nn.Module):
    """Images [B, 3, 16, 16] to 16 tokens [B, 16, 32] by a convolution, and back to the loss of their labels."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.place = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x).mean(1)), labels)


class Residual(nn.Module):
    """A block of layers, each behind a norm and besides a residual."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return x
