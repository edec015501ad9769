"""Modules whose inside is sharded, and which a boundary goes around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_autotp.parallel.reduced_module import Boundary, OnFirstRank
from tests.helpers.sharded_layers import (
    assert_same,
    inputs,
    seeded,
    shard,
    spec,
)


class Experts(nn.Module):
    """``[T, H]``, ``[T, E]`` -> ``[T, H]``; stored as ``[E, out, in]``, with a bias that is each expert's."""

    def __init__(self, experts: int = 3, width: int = 5) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * width, 16) / 4)
        self.gate_up_bias = nn.Parameter(torch.randn(experts, 2 * width))
        self.down = nn.Parameter(torch.randn(experts, 16, width) / 2)
        self.down_bias = nn.Parameter(torch.randn(experts, 16))
        self.pass_on = nn.Identity()

    def forward(self, hidden: Tensor, *, routing: Tensor) -> Tensor:
        gate, up = (torch.einsum("th,eoh->teo", hidden, self.gate_up) + self.gate_up_bias).chunk(2, -1)
        out = torch.einsum("teo,eho->teh", torch.sigmoid(gate) * up, self.down) + self.down_bias
        first = routing[:, :1] * self.pass_on(hidden)
        return (out * routing[:, :, None]).sum(1) + first


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.after = nn.Linear(16, 3), Experts(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(x + self.experts(x, routing=self.router(x).softmax(-1)))
        return out


EXPERTS = [
    spec(r"experts\.gate_up$", "column", shape=[-1, 2, -1], partition_dim=1),
    spec(r"experts\.gate_up_bias", "column", shape=[-1, 2], partition_dim=1),
    spec(r"experts\.down$", "row"),
    spec(r"experts\.down_bias", "row"),
    spec(r"experts\.pass_on", "row"),
    spec(r"experts$", "skip", boundary=True),
    spec("router|after", "skip"),
]


@pytest.mark.ranks(2)
def test_a_boundary_around_experts() -> None:
    """Their gradients, those of what enters and, through the routing weights, of the router."""
    model = assert_same(Routed, EXPERTS, inputs(7, 16))
    assert isinstance(model.experts, Boundary) and isinstance(model.experts, Experts)
    assert model.experts.gate_up.shape == (3, 2 * (3 - dist.get_rank()), 16)
    assert dict(model.named_parameters())["experts.down_bias"].shape == (3, 16)


@pytest.mark.ranks(4)
def test_a_boundary_over_four() -> None:
    assert_same(Routed, EXPERTS, inputs(7, 16))


@pytest.mark.ranks(2)
def test_a_bias_in_a_boundary_is_added_once_and_stays_a_parameter() -> None:
    model = shard(seeded(Routed), *EXPERTS)
    bias = model.experts.get_parameter("down_bias")
    assert bias is model.experts.down_bias and "experts.down_bias" in model.state_dict()
    seen: list[Tensor] = []
    forward = Experts.forward

    def looking(self: Experts, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(self.down_bias)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "forward", looking)
        model(inputs(7, 16))
    assert torch.equal(seen[0], bias if dist.get_rank() == 0 else torch.zeros_like(bias))
    seen[0].sum().backward()
    assert torch.equal(bias.grad, torch.ones_like(bias))
    assert model.experts.down_bias is bias


@pytest.mark.ranks(2)
def test_what_passes_its_input_on_does_so_once() -> None:
    model = shard(seeded(Routed), *EXPERTS)
    assert isinstance(model.experts.pass_on, OnFirstRank)
    x = inputs(7, 16).requires_grad_()
    out = model.experts.pass_on(x)
    assert torch.equal(out, x if dist.get_rank() == 0 else torch.zeros_like(x))
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, float(dist.get_rank() == 0)))


@pytest.mark.parametrize("frozen", ["router", "experts"])
@pytest.mark.ranks(2)
def test_a_boundary_with_something_frozen(frozen: str) -> None:
    def build() -> nn.Module:
        model = Routed()
        model.get_submodule(frozen).requires_grad_(False)
        return model

    assert_same(build, EXPERTS, inputs(7, 16))


class Pair(Experts):
    def forward(self, hidden: Tensor, *, routing: Tensor) -> Any:
        return super().forward(hidden, routing=routing), routing


@pytest.mark.ranks(2)
def test_a_boundary_that_returns_more_than_a_tensor_is_an_error() -> None:
    model = seeded(Routed)
    model.experts.__class__ = Pair
    shard(model, *EXPERTS)
    with pytest.raises(TypeError, match="returned tuple; a module with a boundary rule must return one tensor"):
        model(inputs(7, 16))


class RoutedInATuple(Routed):
    """Gives its experts what they need as one argument."""

    class Experts(Experts):
        def forward(self, both: Any) -> Tensor:  # type: ignore[override]
            return super().forward(both[0], routing=both[1])

    def __init__(self) -> None:
        super().__init__()
        self.experts.__class__ = self.Experts

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(x + self.experts((x, self.router(x).softmax(-1))))
        return out


@pytest.mark.ranks(2)
def test_a_boundary_that_is_given_its_tensors_in_a_tuple() -> None:
    """Their gradients are summed all the same: never just a rank's part."""
    assert_same(RoutedInATuple, EXPERTS, inputs(7, 16))


@pytest.mark.ranks(2)
def test_a_boundary_under_no_grad_and_checkpointed() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            model(x)
        out: Tensor = checkpoint(model, x * 2, use_reentrant=False)
        return out

    assert_same(Routed, EXPERTS, inputs(7, 16), run)
