"""GPT-2 and models that kept its names: Conv1D layers (or linears), fused q, k and v in c_attn, learned positions."""

from lightning_autotp.presets.preset import Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "gpt2",
    ("gpt2",),
    AutoTPConfig(
        [
            column(r"attn\.c_attn", shape=(3, -1)),
            column(r"crossattention\.c_attn", shape=(2, -1)),
            column(r"(?:attn|crossattention)\.q_attn"),
            column(r"mlp\.c_fc"),
            row(r"(?:attn|crossattention)\.c_proj", r"mlp\.c_proj"),
            row("wte"),
            column("lm_head", gather_output=True),
        ]
    ),
)
