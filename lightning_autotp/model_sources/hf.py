"""What is known of Hugging Face model types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


FEATURES: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"mlp_layer_types": ["dense", *39 * ["sparse"]], "num_shared_experts": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 20,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "granitemoe_swa": {"shared_intermediate_size": 1024},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "granitemoeshared": {"shared_intermediate_size": 1024},
    "hunyuan_v1_moe": {"num_experts": 16, "moe_topk": 2},
    "inkling_text": {"mlp_layer_types": ["dense", *65 * ["sparse"]]},
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"] * 20,
        "num_attention_heads_per_layer": [48, 64] * 20,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "llama4": {"text_config": {"interleave_moe_layer_step": 2}},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * 14},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", *59 * ["minimax_m3_sparse"]],
        "mlp_layer_types": ["dense", *59 * ["sparse"]],
    },
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048},
        **{"indexer_compress_ratio": 4, "ple_layer_ids": [1], "eos_token_id": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
    "t5": {"decoder_start_token_id": 0},
}
"""What the defaults of a config class leave out of the architecture that is named after it."""


def causal_types() -> list[str]:
    """The model types of causal language models whose config class brings a tensor parallel plan."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name in CONFIG_MAPPING and getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None)
    ]


def task(config: PretrainedConfig) -> str:
    """What the model of ``config`` is for: ``causal``, ``seq2seq``, ``masked`` or ``image``."""
    from transformers.models.auto import modeling_auto as auto

    name = config.model_type
    if config.is_encoder_decoder:
        return "seq2seq"
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "masked"
    return "causal" if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "image"


def auto_class(config: PretrainedConfig) -> Any:
    """The class that makes the model of ``config``."""
    import transformers

    names = {"causal": "CausalLM", "seq2seq": "Seq2SeqLM", "masked": "MaskedLM", "image": "ImageClassification"}
    return getattr(transformers, f"AutoModelFor{names[task(config)]}")
