"""Families whose own plan lacks something or has it wrong: a few rules before it complete it, or make it exact."""

from lightning_autotp.presets.preset import (
    ATTENTION,
    GATED_MLP,
    HEAD_NORMS,
    SHARED_EXPERTS,
    Preset,
    column,
    row,
    skip,
    summed,
)
from lightning_autotp.specs.layer_spec import AutoTPConfig, TPLayerSpec


def _completing(types: str, *rules: TPLayerSpec) -> Preset:
    names = tuple(types.split())
    return Preset(names[0], names, AutoTPConfig(list(rules)), completes=True)


def _around(before: str, after: str) -> list[TPLayerSpec]:
    """Rules for the projections into and out of what every rank computes whole."""
    return [column(before, gather_output=True), row(after, split_input=True)]


_LATENT_ATTENTION = [
    skip(r"self_attn\.kv_a_proj_with_mqa", partial_outputs="qk_rope_head_dim"),
    skip(r"self_attn\.q_a_proj"),
    column(r"self_attn\.(?:q|q_b|kv_b)_proj"),
    row(r"self_attn\.o_proj"),
]
"""The low-rank projections stay whole, what expands them is cut by heads."""

_SHARED_MLP = [column(r"shared_mlp\.input_linear", shape=(2, -1)), row(r"shared_mlp\.output_linear")]
"""Granite's shared expert: gate and up are one behind the other."""

_INDEXER = skip(r"self_attn\.q_a_proj", r"self_attn\.indexer\.(?:wq_b|wk|weights_proj)")
"""Small projections of latent attention, and those that choose tokens for all heads at once."""

COMPLETIONS = (
    # an activation with parameters of its own sees one rank's features
    _completing("apertus", summed(r"mlp\.act_fn\.(?:alpha_p|alpha_n|beta|eps)")),
    # a mask is made from the values of all heads at once: every rank computes the whole attention
    _completing(
        "doge",
        *_around(r"self_attn\.[qkv]_proj", r"self_attn\.o_proj"),
        skip(r"self_attn\.dt_proj", r"self_attn\.A"),
    ),
    # statistics over all features of the activation; the embedding of each layer's own inputs is the largest weight
    _completing(
        "gemma3n_text",
        *_around(r"mlp\.(?:gate|up)_proj", r"mlp\.down_proj"),
        column(r"altup_(?:unembed_)?projections\.\d+", r"per_layer_model_projection", gather_output=True),
        row("embed_tokens_per_layer"),
        skip(r"per_layer_(?:input_gate|projection)", r"altup\.\w+", r"laurel\.linear_(?:left|right)"),
    ),
    # attention, dense and shared layers that the plan leaves out
    _completing(
        "afmoe",
        *ATTENTION,
        *HEAD_NORMS,
        column(r"self_attn\.gate_proj"),
        *SHARED_EXPERTS,
        *GATED_MLP,
        skip(r"mlp\.router\.gate"),
    ),
    _completing("axk1 youtu", *_LATENT_ATTENTION),
    _completing("flint", *ATTENTION, *HEAD_NORMS, column(r"self_attn\.sinks")),
    _completing("granitemoe phimoe", *ATTENTION, skip(r"block_sparse_moe\.router", r"mlp\.router")),
    _completing("granitemoeshared granitemoe_swa", *ATTENTION, *_SHARED_MLP, skip(r"block_sparse_moe\.router")),
    _completing(
        "hunyuan_v1_moe",
        *ATTENTION,
        summed(r"self_attn\.(?:query|key)_layernorm"),
        column(r"mlp\.shared_mlp\.(?:gate|up)_proj"),
        row(r"mlp\.shared_mlp\.down_proj"),
        skip(r"mlp\.gate\.wg"),
    ),
    _completing("cohere2_moe exaone_moe solar_open", *SHARED_EXPERTS),
    _completing("glm4_moe_lite", *SHARED_EXPERTS, skip(r"self_attn\.q_a_proj")),
    _completing(
        "qwen2_moe",
        column(r"mlp\.shared_expert\.(?:gate|up)_proj"),
        row(r"mlp\.shared_expert\.down_proj"),
        skip(r"mlp\.shared_expert_gate"),
    ),
    # block masks differ by head, so the plan's whole attention stays; gate and up are one behind the other
    _completing(
        "minimax_m3_vl_text",
        column(r"mlp\.(?:shared_experts\.)?gate_up_proj", shape=(2, -1)),
        row(r"mlp\.(?:shared_experts\.)?down_proj"),
        skip(r"self_attn\.indexer\.[qk]_proj"),
    ),
    # the state space model in between stays whole, and what it reads by its weight
    _completing(
        "jamba",
        *ATTENTION,
        column(r"feed_forward\.(?:gate|up)_proj"),
        row(r"feed_forward\.down_proj"),
        *_around(r"mamba\.in_proj", r"mamba\.out_proj"),
        skip(r"feed_forward\.router", r"mamba\.(?:x|dt)_proj"),
    ),
    # a fused kernel takes the weight of mamba's last projection
    _completing(
        "granitemoehybrid",
        *ATTENTION,
        *_SHARED_MLP,
        column(r"mamba\.in_proj", gather_output=True),
        skip(r"block_sparse_moe\.router", r"mamba\.out_proj"),
    ),
    _completing(
        "nemotron_h",
        column(r"mixer\.[qkv]_proj", r"mixer\.(?:shared_experts\.)?up_proj"),
        row(r"mixer\.o_proj", r"mixer\.(?:shared_experts\.)?down_proj"),
        column(r"mixer\.in_proj", "lm_head", gather_output=True),
        skip(r"mixer\.out_proj", r"mixer\.fc[12]_latent_proj"),
    ),
    # the short convolution in between stays whole
    _completing(
        "lfm2_moe",
        column(r"self_attn\.[qkv]_proj", r"feed_forward\.w[13]"),
        row(r"self_attn\.out_proj", r"feed_forward\.w2"),
        *HEAD_NORMS,
        *_around(r"conv\.in_proj", r"conv\.out_proj"),
    ),
    # linear attention stays whole; in these two, latent attention has the same names
    _completing(
        "olmo_hybrid", *_around(r"linear_attn\.[qkvg]_proj", r"linear_attn\.o_proj"), skip(r"linear_attn\.[ab]_proj")
    ),
    _completing(
        "kimi_linear bailing_hybrid",
        *_around(r"self_attn\.(?:[qkvg]|q_b|kv_b|forget_gate\.f)_proj", r"self_attn\.o_proj"),
        skip(r"self_attn\.(?:b|q_a|g_a|g_b|kv_a)_proj(?:_with_mqa)?", r"self_attn\.forget_gate\.f_[ab]_proj"),
    ),
    # lightning attention is normed over all heads
    _completing("minimax", *_around(r"self_attn\.(?:qkv_proj|output_gate)", r"self_attn\.out_proj")),
    # keys and values go through a convolution; gate and up are one behind the other
    _completing(
        "inkling_text inkling2_text",
        row("embed_tokens"),
        column(r"mlp\.experts\.gate_up_proj", shape=(-1, 2, -1), partition_dim=1),
        *_around(r"self_attn\.(?:[qkvr]|gate)_proj", r"self_attn\.o_proj"),
        skip(r"self_attn\.sink_proj", r"self_attn\.[kv]_sconv\.weight_proj"),
    ),
    # compressed keys are made from the layer's input for all heads, and the grouped projection has its own forward
    _completing(
        "deepseek_v4",
        *_around(r"self_attn\.q_b_proj", r"self_attn\.o_b_proj"),
        *SHARED_EXPERTS,
        skip(r"self_attn\.(?:q_a|kv|o_a)_proj", r"self_attn\.compressor\.\w+.*"),
    ),
    # the plan leaves attention out; what mixes the residual streams is needed whole
    _completing(
        "qwen4_exp_text",
        *ATTENTION,
        *HEAD_NORMS,
        column(r"ple\.(?:key|value)_proj", r"\w*hyper_connection\w*\.input_mix_weight_up", gather_output=True),
        skip(r"mlp\.shared_expert_gate", r"\w+_hyper_connection\.block_inject_weight"),
    ),
    # nothing is missing: what stays whole is named
    _completing("deepseek_v32 dots3_note_text glm_moe_dsa hy_v4", _INDEXER),
    _completing("axk2", _INDEXER, skip(r"\w+_layernorm\.mlp\.fc[12]")),
    _completing("minicpm3", skip(r"self_attn\.q_a_proj")),
    _completing("longcat_flash", skip(r"self_attn\.\d\.q_a_proj", r"mlp\.router\.classifier")),
    _completing("llama4_text", skip(r"feed_forward\.router")),
    _completing("qwen3_next qwen3_5_moe_text", skip(r"mlp\.shared_expert_gate")),
    _completing(
        "gemma4_text",
        column(r"per_layer_model_projection", gather_output=True),
        row("embed_tokens_per_layer"),
        skip(r"per_layer_(?:input_gate|projection)"),
    ),
)
