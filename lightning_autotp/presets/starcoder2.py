"""StarCoder2: Llama's attention with biases, an MLP with the names of GPT-2."""

from lightning_autotp.presets.preset import ATTENTION, VOCABULARY, Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "starcoder2",
    ("starcoder2",),
    AutoTPConfig([*ATTENTION, column(r"mlp\.c_fc"), row(r"mlp\.c_proj"), *VOCABULARY]),
)
