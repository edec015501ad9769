"""DeepSeek-V2, V2-Lite and V3: multi-head latent attention, routed and shared experts, dense first layers.

The low-rank projections stay whole; what expands them is cut by heads. The rotary key comes straight out of
kv_a_proj_with_mqa and feeds every rank's heads, so its gradient is summed.
"""

from lightning_autotp.presets.preset import EXPERTS, GATED_MLP, SHARED_EXPERTS, VOCABULARY, Preset, column, row, skip
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "deepseek_v2",
    ("deepseek_v2", "deepseek_v3"),
    AutoTPConfig(
        [
            skip(r"self_attn\.kv_a_proj_with_mqa", partial_outputs="qk_rope_head_dim"),
            skip(r"self_attn\.q_a_proj"),
            column(r"self_attn\.(?:q_proj|q_b_proj|kv_b_proj)"),
            row(r"self_attn\.o_proj"),
            *EXPERTS,
            column(r"mlp\.experts\.\d+\.(?:gate|up)_proj"),
            row(r"mlp\.experts\.\d+\.down_proj"),
            *SHARED_EXPERTS,
            *GATED_MLP,
            *VOCABULARY,
        ]
    ),
)
