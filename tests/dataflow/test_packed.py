"""A packed projection, of which ranks hold a shard of each part: slices of it, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_autotp.dataflow.event import Wrong
from lightning_autotp.dataflow.placement import Placement, shards
from tests.helpers.operator_chain import followed
from tests.helpers.operator_rows import holds

TOKENS, HIDDEN, PART = 5, 3, 6


def step(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    """A gated product of three slices, and its gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    packed = x @ weight.t()
    part = weight.shape[0] // 3
    gate, up, scale = packed[:, :part], packed[:, part : 2 * part], packed[:, 2 * part :]
    out = gate.sigmoid() * up * scale
    return [out, *torch.autograd.grad(out.square().sum(), (x, weight))]


def inputs(packed: bool) -> tuple[list[Tensor], list[Placement], list[list[Tensor]]]:
    """Tokens and a weight of three parts, of which two ranks hold a half each, or rows in a row."""
    torch.default_generator.manual_seed(0)
    full = [torch.randn(TOKENS, HIDDEN, dtype=torch.float64), torch.randn(3 * PART, HIDDEN, dtype=torch.float64)]
    half = PART // 2
    parts = [
        [(part * PART + rank * half, half) for part in range(3)] if packed else [(rank * 3 * half, 3 * half)]
        for rank in range(2)
    ]
    local = [[full[0], torch.cat([full[1].narrow(0, *interval) for interval in mine])] for mine in parts]
    return full, [Placement((None, None)), Placement((shards(3 * PART, parts), None))], local


def test_the_gradients_of_all_slices_make_that_of_the_packed_weight() -> None:
    full, placements, local = inputs(packed=True)
    found = followed(step, full, placements, local)
    assert all(holds(*result) for result in found)
    assert [placement.partial for placement, _, _ in found] == [False, True, False]
    assert found[2][0] == placements[1]


def test_slices_across_the_parts_are_wrong() -> None:
    full, placements, local = inputs(packed=False)
    with pytest.raises(Wrong, match="of dim 1"):
        followed(step, full, placements, local)
