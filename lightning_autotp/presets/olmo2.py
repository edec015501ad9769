"""OLMo 2 and 3: queries and keys are normed over all heads at once, so that every rank computes the whole attention.

The projections are cut and their outputs gathered; the output projection takes each rank's part of its input.
"""

from lightning_autotp.presets.preset import GATED_MLP, VOCABULARY, Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "olmo2",
    ("olmo2", "olmo3"),
    AutoTPConfig(
        [
            column(r"self_attn\.[qkv]_proj", gather_output=True),
            row(r"self_attn\.o_proj", split_input=True),
            *GATED_MLP,
            *VOCABULARY,
        ]
    ),
)
