"""GLM: the transformers classes (Glm, Glm4) with a fused gate and up projection, and the names of the original ChatGLM.

The original's query_key_value is q, k and v one behind the other: of equal size, or (multi-query) with the fewer key
and value heads that its module or config tells of.
"""

from lightning_autotp.presets.preset import ATTENTION, VOCABULARY, Inexact, Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "chatglm",
    ("glm", "glm4", "chatglm"),
    AutoTPConfig(
        [
            *ATTENTION,
            column(r"mlp\.gate_up_proj", r"mlp\.dense_h_to_4h", shape=(2, -1)),
            row(r"mlp\.down_proj", r"mlp\.dense_4h_to_h"),
            column(r"self_attention\.query_key_value", shape=(("q", "kv", "kv"), -1)),
            row(r"self_attention\.dense"),
            row(r"embedding\.word_embeddings"),
            column(r"transformer\.output_layer", gather_output=True),
            *VOCABULARY,
        ]
    ),
    inexact=(
        Inexact(
            r".*query_key_value",
            lambda config: getattr(config, "multi_query_attention", None) is False,
            "with `multi_query_attention` false its parts are interleaved head by head; give a rule for it with"
            " `shape: [-1, -1]`, in a partition_config beside `preset_model: chatglm`",
        ),
    ),
)
