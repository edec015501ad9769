"""Gemma: Llama's names with scaled embeddings; Gemma 3 norms the queries and keys of each head."""

from lightning_autotp.presets.preset import ATTENTION, GATED_MLP, HEAD_NORMS, VOCABULARY, Preset
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "gemma",
    ("gemma", "gemma2", "gemma3_text"),
    AutoTPConfig([*ATTENTION, *HEAD_NORMS, *GATED_MLP, *VOCABULARY]),
)
