"""Parameters that are no layer's: experts, which a boundary goes around, and numbers for each head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp.layout.heads import share_heads
from lightning_autotp.layout.layout import even_widths
from lightning_autotp.plans.plan import Boundary
from tests.helpers.plans import (
    ATTENTION_RULES,
    DOWN,
    EXPERTS,
    GATE_UP,
    MLP_RULES,
    Attention,
    Experts,
    column,
    mlp,
    module,
    named,
    parts_of,
    plan,
    row,
    set_attributes,
    widths,
)


class InterleavedExperts(nn.Module):
    """The same with biases, weights stored as ``[E, in, out]``, and gate and up of each feature side by side."""

    def __init__(self, experts: int = 3, hidden: int = 8, width: int = 5) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, hidden, 2 * width))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * width))
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden))
        self.down_proj_bias = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, x: Tensor) -> Tensor:
        both = x @ self.gate_up_proj + self.gate_up_proj_bias[:, None]
        out = both[..., ::2].sigmoid() * both[..., 1::2] @ self.down_proj + self.down_proj_bias[:, None]
        return out.sum(0)


INTERLEAVED = (
    named("column", "gate_up_proj", shape=(-1, -1, -1, 2), partition_dim=2),
    named("column", "gate_up_proj_bias", shape=(-1, -1, 2), partition_dim=1),
    named("row", "down_proj", shape=(-1, -1, -1), partition_dim=1),
    named("row", "down_proj_bias"),
    EXPERTS,
)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_experts_are_cut_inside_each(tp_size: int) -> None:
    model = module(layers=nn.ModuleList([module(experts=Experts())]))
    sharding = plan(model, GATE_UP, DOWN, EXPERTS, tp_size=tp_size)
    assert sharding.boundaries == (Boundary("layers.0.experts"),)
    assert sharding.blockers == sharding.warnings == ()
    prefix = "layers.0.experts"
    up, down = (sharding.parameters[f"{prefix}.{name}_proj"] for name in ("gate_up", "down"))
    assert (up.kind, up.layout.dim, down.kind, down.layout.dim) == ("column", 1, "row", 2)
    assert up.features is None and up.communication == "" == down.communication
    full_up = model.get_parameter(f"{prefix}.gate_up_proj").detach()
    full_down = model.get_parameter(f"{prefix}.down_proj").detach()
    for rank, (start, length) in enumerate(even_widths(6, tp_size)):
        gate_and_up = torch.cat([half.narrow(1, start, length) for half in full_up.chunk(2, 1)], 1)
        assert torch.equal(parts_of(up, full_up)[rank], gate_and_up)
        assert torch.equal(parts_of(down, full_down)[rank], full_down.narrow(2, start, length))


def test_experts_with_separate_gates_need_no_shape() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3 = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 6, 8))
            self.w2 = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.w1 + self.w3).mT @ self.w2.mT

    sharding = plan(module(experts=Separate()), named("column", "w1", "w3"), named("row", "w2"), EXPERTS)
    assert [sharding.layouts[f"experts.{name}"].dim for name in ("w1", "w3", "w2")] == [1, 1, 2]
    assert widths(sharding, "experts.w1", "experts.w3", "experts.w2") == [(3, 3)] * 3
    assert sharding.blockers == ()


@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_interleaved_experts_are_cut_in_whole_pairs(tp_size: int) -> None:
    model = module(experts=InterleavedExperts())
    sharding = plan(model, *INTERLEAVED, tp_size=tp_size)
    assert sharding.boundaries == (Boundary("experts", once=("down_proj_bias",)),)
    assert sharding.blockers == ()
    up, up_bias, down, down_bias = (
        sharding.parameters[f"experts.{name}"]
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    )
    assert down_bias.layout.is_replicated and down_bias.kind == "row" and "once" in down_bias.reason
    for entry, dim, unit in ((up, 2, 2), (up_bias, 1, 2), (down, 1, 1)):
        full = model.get_parameter(entry.name).detach()
        for (start, length), have in zip(even_widths(5, tp_size), parts_of(entry, full)):
            assert torch.equal(have, full.narrow(dim, unit * start, unit * length)), entry.name


def test_parameter_without_a_boundary_is_refused_by_name() -> None:
    model = module(net=mlp(), moe=module(experts=Experts()))
    with pytest.raises(ValueError, match=r"^moe\.experts\.gate_up_proj \(rule .*, column\): .*nothing sums") as caught:
        plan(model, *MLP_RULES, GATE_UP, DOWN)
    assert "boundary: true" in str(caught.value)
    assert plan(model, *MLP_RULES, GATE_UP, DOWN, EXPERTS).boundaries, "the fix of the message works"


def test_experts_whose_forward_was_replaced_are_refused_by_name() -> None:
    experts = Experts()
    model = module(experts=experts)
    experts.forward = experts.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^experts \(Experts\): its forward was replaced on the object, and nothing"):
        plan(model, GATE_UP, DOWN, EXPERTS)
    del experts.forward
    assert plan(model, GATE_UP, DOWN, EXPERTS).boundaries, "the fix of the message works"


class ExpertsOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x))
        return out


def test_cut_linear_inside_a_boundary_is_refused_by_name() -> None:
    model = module(net=mlp(), experts=ExpertsOfLayers())
    with pytest.raises(ValueError, match=r"^experts\.fc1\.weight .*inside a module with a boundary rule"):
        plan(model, *MLP_RULES, EXPERTS)
    assert plan(model, *MLP_RULES).boundaries == (), "the fix of the message works"


@pytest.mark.parametrize(("rules", "cut"), [((GATE_UP,), "column"), ((DOWN,), "row")])
def test_boundary_whose_inside_is_not_cut_through_blocks_setup(rules: tuple[dict[str, Any], ...], cut: str) -> None:
    sharding = plan(module(net=mlp(), experts=Experts()), *MLP_RULES, *rules, EXPERTS)
    assert len(sharding.blockers) == 1
    assert sharding.blockers[0].startswith("experts (Experts): a boundary rule sums its outputs")
    assert f"here are {cut} cuts only" in sharding.blockers[0]


def test_plain_cut_of_fused_experts_blocks_setup() -> None:
    model = module(experts=Experts())
    sharding = plan(model, named("column", "gate_up_proj"), DOWN, EXPERTS)
    assert len(sharding.blockers) == 1
    assert sharding.blockers[0].startswith("experts.gate_up_proj (rule ")
    assert "12 features are a multiple of the 6 that the row cut behind it reads" in sharding.blockers[0]
    assert plan(model, GATE_UP, DOWN, EXPERTS).blockers == (), "the fix of the message works"


def test_boundary_of_experts_that_stay_whole_is_none() -> None:
    sharding = plan(
        module(net=mlp(), experts=Experts()), *MLP_RULES, EXPERTS, named("skip", "gate_up_proj", "down_proj")
    )
    assert sharding.boundaries == () and sharding.blockers == ()


@pytest.mark.parametrize("flag", [{"gather_output": True}, {"split_input": True}])
def test_flag_that_a_parameter_without_a_layer_cannot_have_is_refused(flag: dict[str, Any]) -> None:
    kind = "row" if "split_input" in flag else "column"
    with pytest.raises(ValueError, match=r"^experts\.gate_up_proj .*Experts has no input or output of its own"):
        plan(module(experts=Experts()), named(kind, "gate_up_proj", **flag), DOWN, EXPERTS)


def test_shape_that_a_parameter_does_not_have_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"^experts\.gate_up_proj .*shape: 12 features do not divide into 5"):
        plan(module(experts=Experts()), named("column", "gate_up_proj", shape=(-1, 5, -1), partition_dim=1), EXPERTS)


class SinkAttention(Attention):
    """Attention with one more number for each head."""

    def __init__(self, heads: int, kv_heads: int, **attributes: Any) -> None:
        super().__init__(heads, kv_heads, **attributes)
        self.sinks = nn.Parameter(torch.randn(heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.sinks * x


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size"), [(6, 6, 4), (8, 2, 2), (16, 2, 4), (12, 3, 4)])
def test_number_for_each_head_is_cut_as_the_query_heads(heads: int, kv_heads: int, tp_size: int) -> None:
    model = module(attn=SinkAttention(heads, kv_heads, head_dim=8))
    sharding = plan(model, *ATTENTION_RULES, named("column", "sinks"), tp_size=tp_size)
    queries, _ = share_heads(heads, kv_heads, tp_size)
    entry = sharding.parameters["attn.sinks"]
    assert (entry.kind, entry.layout.widths) == ("column", tuple(length for _, length in queries))
    assert not entry.layout.overlaps
    assert sharding.boundaries == () and sharding.blockers == ()


def test_number_for_each_head_where_all_keys_have_as_many_features() -> None:
    """Eight query heads, and one key head of eight features: the sinks are still the query heads'."""
    model = module(attn=SinkAttention(8, 1, head_dim=8))
    sharding = plan(model, *ATTENTION_RULES, named("column", "sinks"), tp_size=4)
    assert widths(sharding, "attn.sinks", "attn.q_proj.weight") == [(2,) * 4, (16,) * 4]


def test_queries_where_all_values_have_as_many_features() -> None:
    """Eight queries of 8 features and four values of 16: both projections are 64 wide, and cut differently."""
    attention = module(q=nn.Linear(64, 64), k=nn.Linear(64, 32), v=nn.Linear(64, 64), o=nn.Linear(128, 64))
    set_attributes(attention, num_heads=8, num_kv_heads=4, head_dim=8, v_head_dim=16)
    sharding = plan(module(attn=attention), column("q", "k", "v"), row("o"), tp_size=8)
    want = [(8,) * 8, (8,) * 8, (16,) * 8, (16,) * 8]
    assert widths(sharding, *(f"attn.{name}.weight" for name in "qkvo")) == want


def test_number_for_each_head_of_an_attention_that_is_not_cut_is_refused() -> None:
    model = module(net=mlp(), attn=SinkAttention(4, 4, head_dim=8))
    with pytest.raises(ValueError, match=r"^attn\.sinks .*nothing sums the output of that module"):
        plan(model, *MLP_RULES, named("column", "sinks"))
