"""What hand-written training steps have in common: how one is described, and the small module that they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.helpers.nets.features import Mlp
from tests.helpers.nets.frame import ROWS, TOKENS, UP_DOWN, VOCAB, WIDTH


@dataclass(frozen=True)
class Step:
    """A LightningModule with a training step in a usual style, and whether its TP run gives the unsharded numbers.

    Args:
        name: says in a few words what is particular.
        build: a new module, with the same weights at every call.
        right: whether weights are those of the unsharded run after any number of steps.
        line: where it is wrong, a part of the source line that makes it so.
        batches: the batches of an epoch, the same at every call.
        config: fields of ``TPTrainingConfig``, without the size.
        callbacks: those that belong to it.
        loaders: what the Trainer is given, where it is not one loader of ``batches``.
        first_wrong: the optimizer step, counted from 1, whose gradients are the first wrong ones; 0 for right ones.
        epochs: how many epochs it takes to see what it does.
    """

    name: str
    build: Callable[[], LightningModule]
    right: bool = True
    line: str = ""
    batches: Callable[[], list[Any]] = field(default=lambda: token_batches())
    config: dict[str, Any] = field(default_factory=lambda: UP_DOWN)
    callbacks: Callable[[], list[Callback]] = list
    loaders: Callable[[], Any] | None = None
    first_wrong: int = 0
    epochs: int = 1

    def train_dataloaders(self) -> Any:
        """What ``Trainer.fit`` is given."""
        return loader(self.batches()) if self.loaders is None else self.loaders()


def right(name: str, make: Callable[[], LightningModule], **options: Any) -> Step:
    """A step that is right under TP; ``make`` need not seed itself."""
    return Step(name, _seeded(make), **options)


def wrong(name: str, make: Callable[[], LightningModule], line: str, **options: Any) -> Step:
    """A step that ``line`` makes wrong under TP, from the first one unless ``first_wrong`` says otherwise."""
    return Step(name, _seeded(make), False, line, **({"first_wrong": 1} | options))


def _seeded(make: Callable[[], LightningModule]) -> Callable[[], LightningModule]:
    def build() -> LightningModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return build


def loader(batches: list[Any]) -> DataLoader[Any]:
    """A loader that yields ``batches`` as they are."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def tokens_of(count: int, rows: int = ROWS, seed: int = 5) -> list[Tensor]:
    """``count`` times tokens [rows, 12]."""
    return list(torch.randint(VOCAB, (count, rows, TOKENS), generator=torch.Generator().manual_seed(seed)))


def token_batches(count: int = 4) -> list[Any]:
    """``{"tokens": [5, 12], "targets": [5, 12]}``, a few times."""
    return [{"tokens": tokens, "targets": tokens.roll(-1, 1)} for tokens in tokens_of(count)]


class Backbone(nn.Module):
    """Tokens [B, S] to hidden states [B, S, 32]."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(TOKENS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.block = Mlp() if block is None else block

    def forward(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        if places is not None:
            x = x + self.positions(places)
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        """From embeddings on."""
        out: Tensor = x + self.block(self.norm(x))
        return out


class Module(LightningModule):
    """Trains a backbone and a head by SGD, of which a wrong gradient is a wrong weight; subclasses have the steps."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.net = Backbone(block)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.net(tokens))
        return logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy."""
        return cross_entropy(self(batch["tokens"]), batch["targets"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Of logits [B, S, V] and targets [B, S]."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)
