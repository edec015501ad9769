"""BERT and RoBERTa: encoders with separate projections; the head's decoder is tied to the word embeddings."""

from lightning_autotp.presets.preset import Preset, column, row
from lightning_autotp.specs.layer_spec import AutoTPConfig

PRESET = Preset(
    "bert",
    ("bert", "roberta"),
    AutoTPConfig(
        [
            column(r"attention\.self\.(?:query|key|value)", r"intermediate\.dense"),
            row(r"attention\.output\.dense", r"layer\.\d+\.output\.dense"),
            row("word_embeddings"),
            column(r"predictions\.decoder", r"lm_head\.decoder", gather_output=True),
        ]
    ),
)
