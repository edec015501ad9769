"""Llama and its kin: separate projections, gated MLP, rotary positions; heads are read off the projections' widths."""

from lightning_autotp.presets.preset import ATTENTION, GATED_MLP, VOCABULARY, Preset
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "llama",
    ("llama", "mistral", "ministral", "granite", "stablelm"),
    AutoTPConfig([*ATTENTION, *GATED_MLP, *VOCABULARY]),
)
