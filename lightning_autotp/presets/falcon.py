"""Falcon: query_key_value holds each key head's group behind the other, [q ... q, k, v]; ALiBi in its oldest models.

With one key head (multi-query attention), as with as many as query heads, that is one group, or as many as heads.
"""

from lightning_autotp.presets.preset import HeadArgument, Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "falcon",
    ("falcon",),
    AutoTPConfig(
        [
            column(r"self_attention\.query_key_value", shape=(-1, -1)),
            column(r"mlp\.dense_h_to_4h"),
            row(r"self_attention\.dense", r"mlp\.dense_4h_to_h"),
            row("word_embeddings"),
            column("lm_head", gather_output=True),
        ]
    ),
    head_arguments=(
        HeadArgument(r".*self_attention$", "alibi", dim=0, batched=True),
        HeadArgument(r".*self_attention$", "attention_mask", dim=1),  # ALiBi is part of the mask for fused attention
    ),
)
