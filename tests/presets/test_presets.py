"""The presets: their rules, and how they cut their transformers classes."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_autotp import AutoTPPresets, PartitionType, TPLayerSpec, TPTrainingConfig, make_plan
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.presets import find_preset, preset_for
from tests.helpers.plans import BLOOM, LATENT, column, config_plan, cut_names, hf, plan

ATTENTION_CUT = {f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkvo"}
MLP_CUT = {f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
PACKED_MLP_CUT = {f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate_up", "down")}
ENDS_CUT = {"model.embed_tokens.weight", "lm_head.weight"}
BLOOM_CUT = {
    f"transformer.h.*.{name}.weight"
    for name in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
}
LATENT_CUT = {f"model.layers.*.self_attn.{name}_proj.weight" for name in ("q_b", "kv_b", "o")}
SHARED_EXPERTS_CUT = {f"model.layers.*.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
PRESETS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "Llama": ("llama", {}, ATTENTION_CUT | MLP_CUT | ENDS_CUT),
    "Mistral": ("llama", {}, ATTENTION_CUT | MLP_CUT | ENDS_CUT),
    "Qwen2": ("qwen2", {}, ATTENTION_CUT | MLP_CUT | ENDS_CUT),
    "Glm": ("chatglm", {"head_dim": 8}, ATTENTION_CUT | PACKED_MLP_CUT | ENDS_CUT),
    "Glm4": ("chatglm", {"head_dim": 8}, ATTENTION_CUT | PACKED_MLP_CUT | ENDS_CUT),
    "Mixtral": ("mixtral", {"num_local_experts": 4}, ATTENTION_CUT | ENDS_CUT),
    "Phi3": (
        "phi3",
        {},
        {"model.layers.*.self_attn.qkv_proj.weight", "model.layers.*.self_attn.o_proj.weight"}
        | PACKED_MLP_CUT
        | ENDS_CUT,
    ),
    "Bloom": (
        "bloom",
        BLOOM,
        BLOOM_CUT | {"transformer.word_embeddings.weight", "lm_head.weight"},
    ),
    "DeepseekV2": ("deepseek_v2", LATENT, LATENT_CUT | MLP_CUT | SHARED_EXPERTS_CUT | ENDS_CUT),
    "DeepseekV3": (
        "deepseek_v2",
        LATENT | {"n_group": 2, "topk_group": 1},
        LATENT_CUT | MLP_CUT | SHARED_EXPERTS_CUT | ENDS_CUT,
    ),
}


@pytest.mark.parametrize("named", [False, True], ids=["detected", "named"])
@pytest.mark.parametrize("family", PRESETS)
def test_preset_cuts_its_transformers_class(family: str, named: bool) -> None:
    preset, options, cut = PRESETS[family]
    model = hf(family, **options)
    sharding = plan(model, preset=preset if named else None)
    assert cut_names(sharding) >= cut
    assert {entry.source for entry in sharding.parameters.values() if entry.rule} == {f"preset {preset}"}
    assert sharding.blockers == sharding.warnings == ()


NOT_OF_TRANSFORMERS = {"chatglm"}
"""Model types of code that comes with the weights."""


def model_of(model_type: str) -> nn.Module:
    return small_model(small_config(model_type))


@pytest.mark.parametrize("name", AutoTPPresets.names())
def test_preset_is_detected_for_each_of_its_types_and_cuts_them(name: str) -> None:
    for model_type in set(find_preset(name).model_types) - NOT_OF_TRANSFORMERS:
        sharding = plan(model_of(model_type))
        sources = {entry.source for entry in sharding.parameters.values() if entry.rule}
        assert f"preset {name}" in sources, model_type
        assert sources <= {f"preset {name}", *(["model plan"] if find_preset(name).completes else [])}
        assert sharding.blockers == (), model_type
        cut = {(entry.kind, entry.layout.is_replicated) for entry in sharding.parameters.values()}
        assert {("column", False), ("row", False)} <= cut, model_type


def test_no_two_presets_claim_one_model_type() -> None:
    claims = Counter(model_type for name in AutoTPPresets.names() for model_type in find_preset(name).model_types)
    assert [model_type for model_type, count in claims.items() if count > 1] == []
    for model_type in claims:
        found = preset_for(model_type)
        assert found is not None and model_type in found.model_types
    assert preset_for("nobody's") is None


def test_names_of_the_presets() -> None:
    named = {"llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3", "gpt2", "falcon", "gpt_oss", "t5"}
    assert named <= set(AutoTPPresets.names())
    assert len(set(AutoTPPresets.names())) == len(AutoTPPresets.names())
    assert {preset for preset, _, _ in PRESETS.values()} <= set(AutoTPPresets.names())


@pytest.mark.parametrize("name", AutoTPPresets.names())
def test_preset_has_rules_without_a_config(name: str) -> None:
    rules = AutoTPPresets.get_preset(name)
    assert AutoTPPresets.get_preset(name.upper()) == rules
    assert find_preset(name).name == name and find_preset(name.upper()) is find_preset(name)
    kinds = {spec.partition_type for spec in rules.layer_specs}
    if find_preset(name).completes:
        assert rules.layer_specs, "a few rules before the model's own"
    else:
        assert {PartitionType.COLUMN, PartitionType.ROW} <= kinds
    assert rules.use_default_specs and not rules.strict_mode


@pytest.mark.parametrize(("multi_query", "exact"), [(True, True), (False, False)])
def test_config_that_a_preset_cannot_cut_exactly_blocks_setup(multi_query: bool, exact: bool) -> None:
    config = small_config("gpt_bigcode")
    config.multi_query = multi_query
    sharding = plan(small_model(config))
    assert (sharding.blockers == ()) is exact
    if not exact:
        assert sharding.blockers[0].startswith("transformer.h.*.attn.c_attn.weight cannot be cut exactly by preset")
        assert "`multi_query` false" in sharding.blockers[0] and len(sharding.blockers) == 1
        fixed = plan(small_model(config), column(r"attn\.c_attn", shape=(-1, -1)), preset="gpt_bigcode")
        assert fixed.blockers == (), "the fix of the message works"


def test_completing_preset_comes_before_the_models_own_plan() -> None:
    sharding = plan(model_of("doge"))
    q, o = (sharding.parameters[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qo")
    assert (q.source, q.gather_output, o.source, o.split_input) == ("preset doge", True, "preset doge", True)
    assert "model plan" in {entry.source for entry in sharding.parameters.values()}
    named = plan(model_of("doge"), preset="doge")
    assert named.layouts == sharding.layouts, "the same by its name"


def test_cross_attention_of_gpt2_is_cut_in_whole_heads() -> None:
    """Its c_attn holds keys and values only, and q_attn the queries."""
    config = small_config("gpt2")
    config.add_cross_attention = True
    sharding = plan(small_model(config), tp_size=2)
    half = config.n_embd // 2
    path = "transformer.h.0.crossattention"
    assert sharding.layouts[f"{path}.c_attn.weight"].parts == (
        ((0, half), (2 * half, half)),
        ((half, half), (3 * half, half)),
    )
    assert sharding.layouts[f"{path}.q_attn.weight"].parts == (((0, half),), ((half, half),))


def shapes(specs: list[TPLayerSpec]) -> list[Any]:
    return [spec.shape for spec in specs if spec.shape is not None]


def test_shapes_of_a_preset_are_named_without_a_config_and_numbers_with_one() -> None:
    assert shapes(AutoTPPresets.get_preset("phi3").layer_specs) == [(("q", "kv", "kv"), -1), (2, -1)]
    config = SimpleNamespace(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    assert shapes(AutoTPPresets.get_preset("phi3", config).layer_specs) == [((64, 16, 16), -1), (2, -1)]
    config = SimpleNamespace(hidden_size=64, num_attention_heads=8, head_dim=16)
    assert shapes(AutoTPPresets.get_preset("phi3", config).layer_specs) == [((128, 128, 128), -1), (2, -1)]


def test_preset_with_a_config_plans_as_without() -> None:
    model = hf("Phi3")
    rules = AutoTPPresets.get_preset("phi3", model.config)
    config = TPTrainingConfig(autotp_size=2, partition_config=rules)  # type: ignore[arg-type]
    assert make_plan(model, config).layouts == plan(model, preset="phi3").layouts


def test_preset_whose_shapes_need_head_counts_refuses_a_config_without() -> None:
    with pytest.raises(ValueError, match="needs head counts"):
        AutoTPPresets.get_preset("phi3", SimpleNamespace(hidden_size=64))
    assert AutoTPPresets.get_preset("llama", SimpleNamespace()) == AutoTPPresets.get_preset("llama")


@pytest.mark.parametrize("name", ["lama", "", None, 3])
def test_unknown_preset_is_refused_with_the_list(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^preset_model: there is no preset .* Presets: llama, bloom, chatglm"):
        AutoTPPresets.get_preset(name)


def test_dense_first_layers_and_plain_query_projections_of_deepseek_are_cut() -> None:
    config = small_config("deepseek_v2")
    config.q_lora_rank = None
    parameters = config_plan(small_model(config)).parameters
    dense = [e for name, e in parameters.items() if re.search(r"layers\.0\.mlp\.(gate|up|down)_proj|q_proj", name)]
    assert len(dense) >= 4 and not any(e.layout.is_replicated for e in dense)


def test_the_chatglm_preset_shards_the_classes_of_transformers() -> None:
    for model_type in ("glm", "glm4"):
        plan = config_plan(small_model(small_config(model_type)), preset_model="chatglm")
        assert not plan.warnings and sum(not e.layout.is_replicated for e in plan.parameters.values()) >= 14


def test_experts_are_sharded_whatever_their_form() -> None:
    for model_type in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"):
        plan = config_plan(small_model(small_config(model_type)))
        experts = [e for name, e in plan.parameters.items() if re.search(r"experts\.(gate_up|down)_proj$", name)]
        assert experts and not any(e.layout.is_replicated for e in experts), model_type
