"""DeepSeek-V2 and V3: low-rank projections stay whole, what expands them is cut by heads."""

from lightning_autotp.presets.preset import GATED_MLP, VOCABULARY, Preset, column, row, skip
from lightning_autotp.specs import AutoTPConfig

_ROPE = (
    "the rotary columns of kv_a_proj_with_mqa feed every rank's heads, and their gradient has to be summed over the"
    " ranks apart from the other columns'"
)

PRESET = Preset(
    "deepseek_v2",
    ("deepseek_v2", "deepseek_v3"),
    AutoTPConfig(
        [
            skip(r"self_attn\.(?:q_a_proj|kv_a_proj_with_mqa)"),
            column(r"self_attn\.(?:q_proj|q_b_proj|kv_b_proj)"),
            row(r"self_attn\.o_proj"),
            column(r"mlp\.experts\.\d+\.(?:gate|up)_proj", r"mlp\.shared_experts\.(?:gate|up)_proj"),
            row(r"mlp\.experts\.\d+\.down_proj", r"mlp\.shared_experts\.down_proj"),
            skip(r"mlp\.gate"),
            *GATED_MLP,
            *VOCABULARY,
        ]
    ),
    inexact={"deepseek_v2": _ROPE, "deepseek_v3": _ROPE},
)
