"""Mixtral: attention as in Llama, experts by their per-expert names; the router stays whole.

Experts that are stored as one 3-D parameter stay whole: the run is exact, but only the attention is cut.
"""

from lightning_autotp.presets.preset import ATTENTION, VOCABULARY, Preset, column, row, skip
from lightning_autotp.specs import AutoTPConfig

PRESET = Preset(
    "mixtral",
    ("mixtral",),
    AutoTPConfig(
        [
            *ATTENTION,
            column(r"block_sparse_moe\.experts\.\d+\.w[13]"),
            row(r"block_sparse_moe\.experts\.\d+\.w2"),
            skip(r"block_sparse_moe\.gate", r"mlp\.gate"),
            *VOCABULARY,
        ]
    ),
)
