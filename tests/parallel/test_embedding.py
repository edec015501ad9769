"""Sharded embeddings: outputs and gradients are those of the unsharded one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_autotp.parallel.embedding import VocabParallelEmbedding
from tests.helpers.rank_pool import rank_device
from tests.helpers.sharded_layers import (
    assert_same,
    inputs,
    shard,
    spec,
)


@pytest.mark.parametrize("kind", ["row", "column"])
@pytest.mark.ranks(4)
def test_embedding(kind: str) -> None:
    tokens = torch.tensor([[0, 3, 64, 33], [32, 3, 17, 16]], device=rank_device())
    build = lambda: nn.ModuleDict({"tokens": nn.Embedding(65, 8, padding_idx=3)})  # noqa: E731
    run = lambda model, x: model["tokens"](tokens) * x  # noqa: E731
    rule = spec("tokens", kind, **({"gather_output": True} if kind == "column" else {}))
    model = assert_same(build, [rule], inputs(2, 4, 8), run)
    assert model["tokens"].num_embeddings == 65 and model["tokens"].padding_idx == 3


@pytest.mark.ranks(2)
def test_an_index_outside_the_vocabulary_is_an_error() -> None:
    model = shard(nn.ModuleDict({"tokens": nn.Embedding(65, 8)}), spec("tokens", "row"))
    assert isinstance(model["tokens"], VocabParallelEmbedding)
    for index in (65, -1):
        with pytest.raises(RuntimeError, match="out of range for the 65 embeddings"):
            model["tokens"](torch.tensor([1, index]))
