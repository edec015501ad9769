"""Attention with fewer heads of keys and values than ranks: ranks share one, and repeat it for their own heads only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_autotp.dataflow.event import Wrong
from lightning_autotp.dataflow.placement import Placement, shards
from tests.helpers.operator_chain import followed
from tests.helpers.operator_rows import holds

KV, D, TOKENS, ROWS = 2, 4, 5, 3
Repeat = Callable[[Tensor, int], Tensor]


def expanded(keys: Tensor, times: int) -> Tensor:
    """As transformers does it."""
    rows, heads, tokens, size = keys.shape
    return keys[:, :, None].expand(rows, heads, times, tokens, size).reshape(rows, heads * times, tokens, size)


def interleaved(keys: Tensor, times: int) -> Tensor:
    """By torch's own function."""
    return keys.repeat_interleave(times, 1)


def tiled(keys: Tensor, times: int) -> Tensor:
    """In the order of a model whose head i reads keys i % KV."""
    return keys.repeat(1, times, 1, 1)


def attention(repeat: Repeat) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    """A loss of attention weights, and its gradients."""

    def step(q: Tensor, k: Tensor) -> Sequence[Tensor]:
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        heads = q.view(ROWS, TOKENS, -1, D).transpose(1, 2)
        keys = repeat(k.view(ROWS, TOKENS, -1, D).transpose(1, 2), heads.shape[1] // (k.shape[-1] // D))
        weights = (heads @ keys.transpose(2, 3)).softmax(-1)
        out = (weights @ keys).transpose(1, 2).reshape(ROWS, TOKENS, -1)
        return [out, *(torch.autograd.grad(out.square().sum(), (q, k)) if out.requires_grad else ())]

    return step


def inputs(ranks: int, heads: int, shared: bool) -> tuple[list[Tensor], list[Placement], list[list[Tensor]]]:
    """Queries and keys of all heads, and what ranks hold of them: keys of the heads that they share, or all."""
    torch.default_generator.manual_seed(0)
    full = [torch.randn(ROWS, TOKENS, size * D, dtype=torch.float64) for size in (heads, KV)]
    width = heads // ranks * D
    mine = [[(rank * width, width)] for rank in range(ranks)]
    its = [[(rank * KV // ranks * D, D)] if shared else [(0, KV * D)] for rank in range(ranks)]
    local = [[t.narrow(2, *part[0]) for t, part in zip(full, rank)] for rank in zip(mine, its)]
    return full, [Placement((None, None, shards(t.shape[2], p))) for t, p in zip(full, (mine, its))], local


@pytest.mark.parametrize(("ranks", "heads"), [(4, 8), (8, 16)])
@pytest.mark.parametrize("repeat", [expanded, interleaved])
def test_ranks_that_share_a_head_of_keys_are_right(repeat: Repeat, ranks: int, heads: int) -> None:
    found = followed(attention(repeat), *inputs(ranks, heads, shared=True))
    assert all(holds(*result) for result in found)
    assert [placement.partial for placement, _, _ in found] == [False, False, True]


def test_a_rank_may_repeat_its_keys_once() -> None:
    full, placements, local = inputs(8, 8, shared=True)
    with torch.no_grad():
        found = followed(attention(expanded), full, placements, local)
    assert all(holds(*result) for result in found)


def test_ranks_with_all_heads_of_keys_pair_them_with_other_queries() -> None:
    full, placements, local = inputs(4, 8, shared=False)
    with pytest.raises(Wrong, match=r"combines indices of dim 0.* entry 1 of rank 0 .* is none of the full model's."):
        followed(attention(expanded), full, placements, local)


def test_tiled_keys_belong_to_other_heads() -> None:
    full, placements, local = inputs(4, 8, shared=True)
    with pytest.raises(Wrong, match="is none of the full model's"):
        followed(attention(tiled), full, placements, local)
