"""GLM-4.5 (Glm4Moe): biases on q, k and v, norms of each head, routed and shared experts, dense first layers."""

from lightning_autotp.presets.preset import (
    ATTENTION,
    EXPERTS,
    GATED_MLP,
    HEAD_NORMS,
    SHARED_EXPERTS,
    VOCABULARY,
    Preset,
)
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "glm4_moe",
    ("glm4_moe",),
    AutoTPConfig([*ATTENTION, *HEAD_NORMS, *EXPERTS, *SHARED_EXPERTS, *GATED_MLP, *VOCABULARY]),
)
