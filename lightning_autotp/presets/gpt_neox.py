"""GPT-NeoX (Pythia): query_key_value is interleaved by heads, embeddings are embed_in and embed_out."""

from lightning_autotp.presets.preset import Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "gpt_neox",
    ("gpt_neox",),
    AutoTPConfig(
        [
            column(r"attention\.query_key_value", shape=(-1, -1)),
            column(r"mlp\.dense_h_to_4h"),
            row(r"attention\.dense", r"mlp\.dense_4h_to_h"),
            row("embed_in"),
            column("embed_out", "lm_head", gather_output=True),
        ]
    ),
)
