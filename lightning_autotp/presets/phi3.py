"""Phi-3: q, k and v in one projection of unequal parts, gate and up in another."""

from lightning_autotp.presets.preset import VOCABULARY, Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "phi3",
    ("phi3", "phi4_multimodal"),
    AutoTPConfig(
        [
            column(r"self_attn\.qkv_proj", shape=(("q", "kv", "kv"), -1)),
            row(r"self_attn\.o_proj"),
            column(r"mlp\.gate_up_proj", shape=(2, -1)),
            row(r"mlp\.down_proj"),
            *VOCABULARY,
        ]
    ),
)
