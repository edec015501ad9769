"""T5: separate projections, plain or gated MLP; the relative position bias has one number for each head."""

from lightning_autotp.presets.preset import Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "t5",
    ("t5", "mt5"),
    AutoTPConfig(
        [
            column(r"(?:SelfAttention|EncDecAttention)\.[qkv]", r"DenseReluDense\.wi(?:_[01])?"),
            column(r"SelfAttention\.relative_attention_bias"),
            row(r"(?:SelfAttention|EncDecAttention)\.o", r"DenseReluDense\.wo"),
            row("embed_tokens", "shared"),
            column("lm_head", gather_output=True),
        ]
    ),
)
