"""gpt-oss: attention sinks, one for each head; experts stored [E, in, out] with biases, gate and up interleaved."""

from lightning_autotp.presets.preset import ATTENTION, VOCABULARY, Preset, boundary, column, row, skip
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "gpt_oss",
    ("gpt_oss",),
    AutoTPConfig(
        [
            *ATTENTION,
            column(r"self_attn\.sinks"),
            column(r"mlp\.experts\.gate_up_proj", shape=(-1, -1, -1, 2), partition_dim=2),
            column(r"mlp\.experts\.gate_up_proj_bias", shape=(-1, -1, 2), partition_dim=1),
            row(r"mlp\.experts\.down_proj", shape=(-1, -1, -1), partition_dim=1),
            row(r"mlp\.experts\.down_proj_bias"),
            boundary(r"mlp\.experts"),
            skip(r"mlp\.router"),
            *VOCABULARY,
        ]
    ),
)
