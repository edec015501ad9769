"""Qwen3-MoE: Qwen3's attention, experts as 3-D parameters, dense layers between them where the config has some."""

from lightning_autotp.presets.preset import ATTENTION, EXPERTS, GATED_MLP, HEAD_NORMS, VOCABULARY, Preset
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset("qwen3_moe", ("qwen3_moe",), AutoTPConfig([*ATTENTION, *HEAD_NORMS, *EXPERTS, *GATED_MLP, *VOCABULARY]))
