"""Bloom: query_key_value is interleaved by heads, so that a plain cut in whole heads keeps each head's q, k and v.

ALiBi's slopes are built for all heads of the model; each rank takes those of its own.
"""

from lightning_autotp.presets.preset import HeadArgument, Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "bloom",
    ("bloom",),
    AutoTPConfig(
        [
            column(r"self_attention\.query_key_value", shape=(-1, -1)),
            column(r"mlp\.dense_h_to_4h"),
            row(r"self_attention\.dense", r"mlp\.dense_4h_to_h"),
            row("word_embeddings"),
            column("lm_head", gather_output=True),
        ]
    ),
    head_arguments=(HeadArgument(r".*self_attention$", "alibi", dim=0, batched=True),),
)
