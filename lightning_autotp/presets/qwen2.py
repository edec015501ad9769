"""Qwen2: as Llama, with biases on q, k and v that follow their weights."""

from lightning_autotp.presets.preset import ATTENTION, GATED_MLP, VOCABULARY, Preset
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset("qwen2", ("qwen2",), AutoTPConfig([*ATTENTION, *GATED_MLP, *VOCABULARY]))
