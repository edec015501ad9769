"""Low-rank adapters are sharded as the layers that they stand beside."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.helpers.plans import (
    ATTENTION_RULES,
    DOWN,
    EXPERTS,
    GATE_UP,
    MLP_RULES,
    Attention,
    Experts,
    column,
    gpt2_attention,
    latent_attention,
    latent_rules,
    mlp,
    module,
    plan,
    row,
    skip,
)


def adapted(*targets: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Two layers with PEFT's adapters in them."""
    peft = pytest.importorskip("peft")
    model = module(attn=Attention(6, 3, num_heads=6, head_dim=8), mlp=mlp(48, 16)) if model is None else model
    config = peft.LoraConfig(target_modules=list(targets), r=4, **options)
    wrapped: nn.Module = peft.inject_adapter_in_model(config, model)
    return wrapped


LORA_RULES = (*ATTENTION_RULES, *MLP_RULES)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", ["attn.q_proj", "attn.k_proj", "mlp.fc1"])
def test_adapter_of_a_column_is_cut_where_it_makes_the_output(name: str, tp_size: int) -> None:
    sharding = plan(adapted("q_proj", "k_proj", "fc1"), *LORA_RULES, tp_size=tp_size)
    a, b = (sharding.parameters[f"{name}.lora_{half}.default.weight"] for half in "AB")
    base = sharding.parameters[f"{name}.base_layer.weight"]
    assert (a.kind, a.layout.is_replicated) == ("whole", True) and "lora_B" in a.reason
    assert (b.kind, b.layout.dim, b.layout.parts) == ("column", 0, base.layout.parts)
    assert (a.rule, b.rule) == (base.rule, base.rule)
    assert sharding.blockers == sharding.warnings == ()


@pytest.mark.parametrize("name", ["attn.o_proj", "mlp.fc2"])
def test_adapter_of_a_row_is_cut_where_it_reads_the_input(name: str) -> None:
    sharding = plan(adapted("o_proj", "fc2"), *LORA_RULES, tp_size=3)
    a, b = (sharding.parameters[f"{name}.lora_{half}.default.weight"] for half in "AB")
    assert (a.kind, a.layout.dim) == ("row", 1)
    assert a.layout.parts == sharding.layouts[f"{name}.base_layer.weight"].parts
    assert (b.kind, b.layout.is_replicated) == ("whole", True) and "lora_A" in b.reason
    assert sharding.blockers == sharding.warnings == ()


def test_adapter_of_a_fused_weight_is_cut_part_by_part() -> None:
    model = adapted("c_attn", model=module(attn=gpt2_attention(6, 48)))
    sharding = plan(model, column("c_attn", shape=(3, -1)), row("c_proj"), tp_size=4)
    b = sharding.layouts["attn.c_attn.lora_B.default.weight"]
    assert (b.shape, b.dim) == ((144, 4), 0)
    assert b.parts == sharding.layouts["attn.c_attn.base_layer.weight"].parts
    assert len(b.parts[0]) == 3


def test_adapter_of_a_whole_layer_is_whole() -> None:
    rules = skip("fc1", "fc2"), *ATTENTION_RULES
    sharding = plan(adapted("fc1", "fc2"), *rules)
    adapters = [entry for name, entry in sharding.parameters.items() if ".lora_" in name]
    assert len(adapters) == 4
    assert all(e.layout.is_replicated and e.reason == "its layer is whole" for e in adapters)


def test_adapter_of_a_whole_layer_whose_gradient_is_partial_has_a_partial_gradient() -> None:
    """It sees what its layer sees."""
    rules = skip("extra", grad_allreduce=True), *MLP_RULES
    model = adapted("extra", model=module(net=mlp(), extra=nn.Linear(4, 4)))
    sharding = plan(model, *rules)
    summed = {name for name, entry in sharding.parameters.items() if entry.grad_allreduce}
    adapters = {f"extra.lora_{half}.default.weight" for half in "AB"}
    assert adapters <= summed


def test_adapter_beside_partial_outputs_is_not_left_out_of_their_sum() -> None:
    """Its output is added to the layer's: the gradient of the last features is partial there, too."""
    sharding = plan(adapted("kv_a", model=module(attn=latent_attention())), *latent_rules(2))
    b = sharding.parameters["attn.kv_a.lora_B.default.weight"]
    assert b.partial_outputs == 2


@pytest.mark.parametrize("targets", [("q_proj",), ("fc2",), ("q_proj", "fc2")])
def test_adapter_that_reads_the_weight_itself_blocks_setup(targets: tuple[str, ...]) -> None:
    sharding = plan(adapted(*targets, use_dora=True), *LORA_RULES)
    for target in targets:
        assert any(f"{target}.base_layer.weight" in text and "DoRA" in text for text in sharding.blockers)
    named = [text.split(" ")[0] for text in sharding.blockers]
    assert all(any(target in name for target in targets) for name in named), "and no other layer"


def test_rank_stabilized_adapter_is_planned_as_a_plain_one() -> None:
    plain, stable = (plan(adapted("q_proj", "o_proj", use_rslora=on), *LORA_RULES) for on in (False, True))
    assert plain.layouts == stable.layouts and stable.blockers == ()


def test_adapter_of_experts_blocks_setup() -> None:
    """PEFT adds it to the whole parameter, of which a rank has a part."""
    peft = pytest.importorskip("peft")
    model = module(experts=Experts())
    config = peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"], r=2)
    peft.inject_adapter_in_model(config, model)
    assert plan(model, GATE_UP, DOWN, EXPERTS).blockers
