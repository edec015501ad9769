"""GLM: the transformers classes (Glm, Glm4) with a fused gate and up projection, and the names of the original ChatGLM.

The original's query_key_value is cut as three equal parts; its multi-query form needs a rule of the user's with the
real sizes, ``((q, kv, kv), -1)``.
"""

from lightning_autotp.presets.preset import ATTENTION, VOCABULARY, Preset, column, row
from lightning_autotp.specs import AutoTPConfig

PRESET = Preset(
    "chatglm",
    ("glm", "glm4"),
    AutoTPConfig(
        [
            *ATTENTION,
            column(r"mlp\.gate_up_proj", r"mlp\.dense_h_to_4h", shape=(2, -1)),
            row(r"mlp\.down_proj", r"mlp\.dense_4h_to_h"),
            column(r"self_attention\.query_key_value", shape=(3, -1)),
            row(r"self_attention\.dense"),
            *VOCABULARY,
        ]
    ),
    inexact={"chatglm": "its attention reads head counts that differ between checkpoints; write rules with its sizes"},
)
