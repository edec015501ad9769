"""The tensor parallel plan that a Hugging Face model brings itself, style by style, as rules of ours."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp import PartitionType, TPLayerSpec
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.presets.hf_tp_plan import model_plan
from tests.helpers.plans import config_plan, module, set_attributes


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.gate_up_proj.mT


def with_plan(plan: dict[str, str]) -> nn.ModuleDict:
    """A model with two layers that says it is cut so."""
    layers = [module(fused=nn.Linear(8, 12), plain=nn.Linear(8, 6), experts=Experts()) for _ in range(2)]
    model = module(layers=nn.ModuleList(layers))
    set_attributes(model, _tp_plan=plan, base_model_prefix="model")
    return model


COLUMN, ROW, SKIP = PartitionType.COLUMN, PartitionType.ROW, PartitionType.SKIP
STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": COLUMN},
    "colwise_gather_output": {"partition_type": COLUMN, "gather_output": True},
    "colwise_rep": {"partition_type": COLUMN, "gather_output": True},
    "rowwise": {"partition_type": ROW},
    "rowwise_split_input": {"partition_type": ROW, "split_input": True},
    "rowwise_rep": {"partition_type": ROW, "split_input": True},
    "embedding_rowwise": {"partition_type": ROW},
    "embedding_colwise": {"partition_type": COLUMN, "gather_output": True},
    "replicated_with_grad_allreduce": {"partition_type": SKIP, "grad_allreduce": True},
    "replicate": {"partition_type": SKIP},
    "mla_kv_a_proj": {"partition_type": SKIP, "partial_outputs": "qk_rope_head_dim"},
    "moe_tp_experts": {"partition_type": SKIP, "boundary": True},
    "all_reduce": {"partition_type": SKIP, "boundary": True},
    "moe_identity_expert": {"partition_type": ROW},
}


def only(specs: list[TPLayerSpec]) -> TPLayerSpec:
    assert len(specs) == 1
    return specs[0]


def matches(spec: TPLayerSpec, name: str) -> bool:
    return any(re.match(pattern, name) for pattern in spec.patterns)


@pytest.mark.parametrize("style", STYLES)
def test_style_is_the_rule(style: str) -> None:
    spec = only(model_plan(with_plan({"layers.*.plain": style})).layer_specs)
    assert spec == TPLayerSpec(spec.patterns, **STYLES[style])
    assert matches(spec, "layers.1.plain")
    names_weights = style not in ("moe_tp_experts", "all_reduce", "moe_identity_expert")
    assert matches(spec, "layers.1.plain.weight") is names_weights
    for name in ("layers.1.plainer", "layers.1.2.plain", "x.layers.1.plain", "layers.1.plain.up.weight"):
        assert not matches(spec, name), name


@pytest.mark.parametrize(
    ("style", "key", "kind", "shape", "dim"),
    [
        ("packed_colwise", "layers.*.fused", COLUMN, (2, -1), 0),
        ("packed_colwise", "layers.*.experts.gate_up_proj", COLUMN, (-1, 2, -1), 1),
        ("packed_rowwise", "layers.*.fused", ROW, (-1, 2), 1),
        ("packed_rowwise", "layers.*.experts.down_proj", ROW, (-1, -1, 2), 2),
    ],
)
def test_packed_style_has_two_parts_along_the_dim_that_is_cut(
    style: str, key: str, kind: PartitionType, shape: tuple[int, ...], dim: int
) -> None:
    spec = only(model_plan(with_plan({key: style})).layer_specs)
    assert spec == TPLayerSpec(spec.patterns, kind, shape, dim)
    assert matches(spec, key.replace("*", "0")) and matches(spec, f"{key.replace('*', '0')}.weight")


def test_local_parameters_are_those_that_the_module_keeps_itself() -> None:
    specs = model_plan(with_plan({"layers.*.experts": "local_params"})).layer_specs
    assert [spec.partition_type for spec in specs] == [COLUMN, COLUMN]
    for spec, name in zip(specs, ("gate_up_proj", "down_proj"), strict=True):
        assert matches(spec, f"layers.1.experts.{name}")
        assert not matches(spec, f"layers.1.experts.{name}.weight") and not matches(spec, "layers.1.experts")


@pytest.mark.parametrize("style", ["sequence_parallel", "ep_router", "", "COLWISE"])
def test_style_without_a_rule_is_refused_with_its_module(style: str) -> None:
    with pytest.raises(ValueError, match=rf"cuts 'layers\.\*\.plain' in style '{style}'.*partition_config"):
        model_plan(with_plan({"layers.*.plain": style}))


def test_every_style_of_transformers_has_a_rule_or_is_refused() -> None:
    from transformers.distributed import tensor_parallel

    known = {*STYLES, "packed_colwise", "packed_rowwise", "local_params"}
    others = set(tensor_parallel.ALL_PARALLEL_STYLES.keys()) - known
    assert "sequence_parallel" in others
    # those of expert parallelism are registered only once they are asked for
    assert others <= {"sequence_parallel", "ep_dispatch_experts", "grouped_gemm"}
    assert known <= set(tensor_parallel.ALL_PARALLEL_STYLES.keys())


def test_rules_come_in_the_order_of_the_plan_and_name_the_model_inside() -> None:
    plan = {"layers.*.plain": "colwise", "layers.*.experts": "moe_tp_experts", "layers.*.fused": "rowwise"}
    model = module(a=module(net=with_plan(plan)))
    specs = model_plan(model).layer_specs
    assert [(spec.partition_type, spec.boundary) for spec in specs] == [(COLUMN, False), (SKIP, True), (ROW, False)]
    assert matches(specs[0], "a.net.layers.0.plain.weight") and not matches(specs[0], "layers.0.plain.weight")


def test_plan_of_an_inner_model_is_part_of_the_outer_ones() -> None:
    """A Hugging Face model merges its children's plans into its own; twice would be two rules for one parameter."""
    outer = module(model=with_plan({"layers.*.plain": "colwise"}), other=with_plan({"layers.*.plain": "rowwise"}))
    set_attributes(outer, _tp_plan={"model.layers.*.plain": "colwise"}, base_model_prefix="model")
    spec = only(model_plan(outer).layer_specs)
    assert spec.partition_type is COLUMN
    both = model_plan(module(a=with_plan({"layers.*.plain": "colwise"}), ab=with_plan({"layers.*.plain": "rowwise"})))
    assert [spec.partition_type for spec in both.layer_specs] == [COLUMN, ROW], "a is not around ab"


def test_models_without_a_plan_have_no_rules() -> None:
    assert model_plan(nn.Linear(2, 2)).layer_specs == []
    assert model_plan(with_plan({})).layer_specs == []


@pytest.mark.parametrize("model_type", ["cohere", "olmoe", "qwen2_moe", "llama4_text", "granite_swa", "longcat_flash"])
def test_the_models_own_plan_is_taken_whatever_its_styles(model_type: str) -> None:
    plan = config_plan(small_model(small_config(model_type)))
    assert any(e.source == "model plan" and not e.layout.is_replicated for e in plan.parameters.values())
    assert not plan.blockers


@pytest.mark.parametrize("child", ["", "model."], ids=["itself", "in a child"])
def test_a_config_with_a_plan_is_read_of_any_model(child: str) -> None:
    layers = [module(up=nn.Linear(8, 12), down=nn.Linear(12, 8)) for _ in range(2)]
    inner = module(layers=nn.ModuleList(layers))
    model = module(model=inner) if child else inner
    plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
    set_attributes(model, config=SimpleNamespace(base_model_tp_plan=plan))
    specs = model_plan(model).layer_specs
    assert [spec.partition_type for spec in specs] == [COLUMN, ROW]
    assert matches(specs[0], f"{child}layers.1.up.weight")
    assert matches(specs[1], f"{child}layers.0.down.weight")
    assert not matches(specs[0], f"{child}layers.1.down.weight")


def test_a_block_of_a_model_that_has_a_plan_is_none() -> None:
    block = module(up=nn.Linear(8, 12))
    set_attributes(block, config=SimpleNamespace(base_model_tp_plan={"layers.*.up": "colwise"}))
    assert not model_plan(module(block=block)).layer_specs
