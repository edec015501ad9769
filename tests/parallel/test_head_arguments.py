"""Arguments with an entry for each head: a rank's module takes those of its own heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_autotp.parallel.head_arguments import take_own_heads
from lightning_autotp.plans.plan import HeadInput
from lightning_autotp.sharding.state import sharded
from tests.helpers.sharded_layers import (
    assert_same,
    inputs,
    spec,
)


class Biased(nn.Module):
    """Scales what each of its heads gets by that head's entry of ``bias``."""

    def __init__(self, heads: int = 6) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.o = nn.Linear(16, 4 * heads), nn.Linear(4 * heads, 16)

    def forward(self, x: Tensor, bias: Tensor, batched: Tensor | None = None) -> Tensor:
        heads = self.q(x).unflatten(-1, (self.num_heads, 4)) * bias[..., None]
        if batched is not None:
            heads = heads * batched.view(len(x), self.num_heads, 1)
        out: Tensor = self.o(heads.flatten(-2))
        return out


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.ranks(4)
def test_a_module_takes_its_own_heads_entries_of_an_argument(by_name: bool) -> None:
    x, bias, batched = inputs(5, 16), inputs(6), inputs(5 * 6)
    parts = ((0, 2), (2, 2), (4, 1), (5, 1))

    def run(model: Any, x: Tensor) -> Tensor:
        attention = model["attn"]
        if sharded(model) is not None:
            take_own_heads(attention, HeadInput("attn", "bias", 0, 6, parts), dist.get_rank())
            take_own_heads(attention, HeadInput("attn", "batched", 0, 6, parts, batched=True), dist.get_rank())
        out: Tensor = attention(x, bias=bias, batched=batched) if by_name else attention(x, bias, batched)
        return out

    model = assert_same(lambda: nn.ModuleDict({"attn": Biased()}), [spec(".*q", "column"), spec(".*o", "row")], x, run)
    assert model["attn"].num_heads == parts[dist.get_rank()][1]


@pytest.mark.ranks(2)
def test_an_argument_without_an_entry_for_each_head_is_left_alone() -> None:
    """A mask that is the same for all heads, or none at all."""

    class Echo(nn.Module):
        def forward(self, x: Tensor, mask: Any = None) -> Any:
            return mask

    module = Echo()
    take_own_heads(module, HeadInput("", "mask", 1, 6, ((0, 3), (3, 3))), dist.get_rank())
    one, all_heads = inputs(2, 1, 4), inputs(2, 6, 4)
    assert module(one, one) is one and module(one) is None and module(one, mask="x") == "x"
    mine = all_heads[:, :3] if dist.get_rank() == 0 else all_heads[:, 3:]
    assert torch.equal(module(one, all_heads), mine) and torch.equal(module(one, mask=all_heads), mine)
