"""GPT-J and GPT-Neo: separate projections under GPT names."""

from lightning_autotp.presets.preset import Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "gptj",
    ("gptj", "gpt_neo"),
    AutoTPConfig(
        [
            column(r"(?:attn|attention)\.[qkv]_proj", r"mlp\.(?:fc_in|c_fc)"),
            row(r"(?:attn|attention)\.out_proj", r"mlp\.(?:fc_out|c_proj)"),
            row("wte"),
            column("lm_head", gather_output=True),
        ]
    ),
)
