"""Families whose own plan has something wrong, or lacks what is not derived: a few rules before it mend it.

What a plan merely leaves out is derived, and needs no rules here.
"""

from lightning_autotp.presets.preset import (
    ATTENTION,
    HEAD_NORMS,
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


COMPLETIONS = (
    # an activation with parameters of its own sees one rank's features
    _completing("apertus", summed(r"mlp\.act_fn\.(?:alpha_p|alpha_n|beta|eps)")),
    _completing(
        "qwen2_moe",
        column(r"mlp\.shared_expert\.(?:gate|up)_proj"),
        row(r"mlp\.shared_expert\.down_proj"),
        skip(r"mlp\.shared_expert_gate"),
    ),
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
    # keys and values go through a convolution; gate and up are one behind the other
    _completing(
        "inkling_text inkling2_text",
        row("embed_tokens"),
        column(r"mlp\.experts\.gate_up_proj", shape=(-1, 2, -1), partition_dim=1),
        *_around(r"self_attn\.(?:[qkvr]|gate)_proj", r"self_attn\.o_proj"),
        skip(r"self_attn\.sink_proj", r"self_attn\.[kv]_sconv\.weight_proj"),
    ),
    # the plan leaves attention out; what mixes the residual streams is needed whole
    _completing(
        "qwen4_exp_text",
        *ATTENTION,
        *HEAD_NORMS,
        column(r"ple\.(?:key|value)_proj", r"\w*hyper_connection\w*\.input_mix_weight_up", gather_output=True),
        skip(r"mlp\.shared_expert_gate", r"\w+_hyper_connection\.block_inject_weight"),
    ),
    _completing(
        "gemma4_text",
        column(r"per_layer_model_projection", gather_output=True),
        row("embed_tokens_per_layer"),
        skip(r"per_layer_(?:input_gate|projection)"),
    ),
)
