"""GPTBigCode (StarCoder): GPT-2's names; c_attn holds all query heads, then the one key and the one value head."""

from lightning_autotp.presets.preset import Inexact, Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "gpt_bigcode",
    ("gpt_bigcode",),
    AutoTPConfig(
        [
            column(r"attn\.c_attn", shape=(("q", "kv", "kv"), -1)),
            column(r"mlp\.c_fc"),
            row(r"attn\.c_proj", r"mlp\.c_proj"),
            row("wte"),
            column("lm_head", gather_output=True),
        ]
    ),
    inexact=(
        Inexact(
            r".*attn\.c_attn",
            lambda config: not config.multi_query,
            "with `multi_query` false its parts are interleaved head by head; give a rule for it with"
            " `shape: [-1, -1]`, in a partition_config beside `preset_model: gpt_bigcode`",
        ),
    ),
)
