"""OPT and BART: separate projections with biases, fc1 and fc2 directly in the layer, cross-attention in decoders."""

from lightning_autotp.presets.preset import Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "opt",
    ("opt", "bart", "mbart", "m2m_100"),
    AutoTPConfig(
        [
            column(r"(?:self_attn|encoder_attn)\.[qkv]_proj", r"layers\.\d+\.fc1"),
            row(r"(?:self_attn|encoder_attn)\.out_proj", r"layers\.\d+\.fc2"),
            row("embed_tokens", "shared"),
            column("lm_head", gather_output=True),
        ]
    ),
)
