"""ViT: an encoder over image patches; the patch projection and the classifier stay whole."""

from lightning_autotp.presets.preset import Preset, column, row, skip
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "vit",
    ("vit",),
    AutoTPConfig(
        [
            column(r"attention\.[qkv]_proj", r"mlp\.fc1"),
            row(r"attention\.o_proj", r"mlp\.fc2"),
            column(r"attention\.attention\.(?:query|key|value)", r"intermediate\.dense"),
            row(r"attention\.output\.dense", r"layer\.\d+\.output\.dense"),
            skip("classifier", r"pooler\.dense"),
        ]
    ),
)
