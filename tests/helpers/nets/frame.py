"""What hand-written nets have in common: how one is described, its rules, and the language model around a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HIDDEN, VOCAB = 32, 64, 48
HEADS, HEAD_DIM = 8, 4
ROWS, TOKENS = 5, 12
"""Rows that no TP size divides: with any multiple of it, tokens that are mixed up hide."""

Batch = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Net:
    """A model in a usual style with rules in a usual style, and whether they give the numbers of the unsharded one.

    Args:
        name: says in a few words what is particular.
        build: a new model whose ``forward(**batch)`` returns a loss, with the same weights at every call.
        config: fields of ``TPTrainingConfig``, without the size.
        right: whether loss and gradients are those of the unsharded model, at each of ``sizes``.
        line: where it is wrong, a part of the source line of the model that makes it so.
        batch: what the model is called with, the same at every call.
        sizes: the tensor parallel sizes for which this is said.
        refused: whether planning or sharding refuses it by names and source alone.
    """

    name: str
    build: Callable[[], nn.Module]
    config: dict[str, Any]
    right: bool
    line: str = ""
    batch: Batch = field(default=lambda: token_batch())
    sizes: tuple[int, ...] = (2, 4)
    refused: bool = False


def right(name: str, make: Callable[[], nn.Module], config: dict[str, Any], **options: Any) -> Net:
    """A net whose numbers are those of the unsharded model; ``make`` need not seed itself."""
    return Net(name, seeded(make), config, right=True, **options)


def wrong(name: str, make: Callable[[], nn.Module], config: dict[str, Any], line: str, **options: Any) -> Net:
    """A net that ``line`` makes wrong; ``make`` need not seed itself."""
    return Net(name, seeded(make), config, right=False, line=line, **options)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """``make`` with the same weights at every call, and the caller's random state as it was."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return build


def token_batch() -> dict[str, Tensor]:
    """``{"tokens": [5, 12]}``."""
    return {"tokens": torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(7))}


def masked_batch() -> dict[str, Tensor]:
    """``token_batch()`` with a ``mask`` [5, 12] that is false at the end of padded rows."""
    lengths = torch.tensor([12, 9, 12, 5, 7])
    return {**token_batch(), "mask": torch.arange(TOKENS) < lengths[:, None]}


def rules(
    column: str = "", row: str = "", *more: dict[str, Any], shape: Sequence[Any] | None = None, **config: Any
) -> dict[str, Any]:
    """A config with a column rule and a row rule for layers by their names, ``"q|k|v"``, and ``more`` rules before.

    ``shape`` is the column rule's, ``config`` are further fields.
    """
    specs = [dict(spec) for spec in more]
    if column:
        specs.append(rule(column, "column", **({} if shape is None else {"shape": list(shape)})))
    if row:
        specs.append(rule(row, "row"))
    return {"partition_config": {"layer_specs": specs}, **config}


def rule(names: str, partition_type: str, **fields: Any) -> dict[str, Any]:
    """A rule for the weights of layers by their names; one with a dot or a star is a pattern of its own."""
    pattern = names if "*" in names else rf".*\b({names})\.weight"
    return {"patterns": [pattern], "partition_type": partition_type, **fields}


QKVO = rules("q|k|v", "o")
UP_DOWN = rules("up", "down")


class LanguageModel(nn.Module):
    """Tokens to the loss of the next ones, with residual blocks around the given layers ``[B, S, 32]``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor, **given: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x), **given)
        return next_token_loss(self.head(self.norm(x)), tokens)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, S, V] against the tokens one place further on."""
    return functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


class Projections(nn.Module):
    """The four linears of an attention; what becomes of heads is its subclasses' affair."""

    def __init__(self, keys: int = WIDTH, *, queries: int = WIDTH, bias: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, queries, bias=bias)
        self.k = nn.Linear(WIDTH, keys, bias=bias)
        self.v = nn.Linear(WIDTH, keys, bias=bias)
        self.o = nn.Linear(queries, WIDTH, bias=bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, heads, S, D], as [B, S, heads * D]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    probabilities = scores.masked_fill(future, float("-inf")).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def heads_of_size(x: Tensor, size: int) -> Tensor:
    """[B, S, heads * size] as [B, heads, S, size], however many heads there are."""
    return x.view(*x.shape[:2], -1, size).transpose(1, 2)
