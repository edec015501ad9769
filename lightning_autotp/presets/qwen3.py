"""Qwen3: Llama's names, and norms over the features of each query and key head."""

from lightning_autotp.presets.preset import ATTENTION, GATED_MLP, HEAD_NORMS, VOCABULARY, Preset
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset("qwen3", ("qwen3",), AutoTPConfig([*ATTENTION, *HEAD_NORMS, *GATED_MLP, *VOCABULARY]))
