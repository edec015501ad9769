"""Mixtral: attention as in Llama; experts as 3-D parameters, or one by one by their older names; the router whole."""

from lightning_autotp.presets.preset import ATTENTION, EXPERTS, VOCABULARY, Preset, column, row, skip
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "mixtral",
    ("mixtral",),
    AutoTPConfig(
        [
            *ATTENTION,
            *EXPERTS,
            column(r"block_sparse_moe\.experts\.\d+\.w[13]"),
            row(r"block_sparse_moe\.experts\.\d+\.w2"),
            skip(r"block_sparse_moe\.gate"),
            *VOCABULARY,
        ]
    ),
)
