"""MPT: q, k and v one behind the other in Wqkv; ALiBi of all heads as position_bias."""

from lightning_autotp.presets.preset import HeadArgument, Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "mpt",
    ("mpt",),
    AutoTPConfig(
        [
            column(r"attn\.Wqkv", shape=(3, -1)),
            column(r"ffn\.up_proj"),
            row(r"attn\.out_proj", r"ffn\.down_proj"),
            row("wte"),
            column("lm_head", gather_output=True),
        ]
    ),
    head_arguments=(HeadArgument(r".*attn$", "position_bias", dim=0),),
)
