"""Models and rules for runs through Trainer.fit: what ``partition_config`` and presets do with small networks."""

from __future__ import annotations

from typing import Any

from tests.helpers import models

HAND_WRITTEN = {
    "layer_specs": [
        {"patterns": [r".*\.(q|k|v|gate|up)_proj\.weight"], "partition_type": "column"},
        {"patterns": [r".*\.(o|down)_proj\.weight"], "partition_type": "row"},
        {"patterns": [r".*embed_tokens\.weight"], "partition_type": "row"},
        {"patterns": [r".*lm_head\.weight"], "partition_type": "column", "gather_output": True},
    ]
}


def packed_rules(qkv: Any) -> dict[str, Any]:
    return {
        "layer_specs": [
            {"patterns": [r".*\.qkv_proj\.weight"], "partition_type": "column", "shape": [qkv, -1]},
            {"patterns": [r".*\.gate_up_proj\.weight"], "partition_type": "column", "shape": [2, -1]},
            {"patterns": [r".*\.(o|down)_proj\.weight"], "partition_type": "row"},
            {"patterns": [r".*embed_tokens\.weight"], "partition_type": "row"},
            {"patterns": [r".*lm_head\.weight"], "partition_type": "column", "gather_output": True},
        ]
    }


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "hand-written": (models.transformer, {"bias": True, "kv_heads": 4}, {"partition_config": HAND_WRITTEN}),
    "hand-written-tied": (models.transformer, {"tied": True}, {"partition_config": HAND_WRITTEN}),
    "llama-untied": (models.tiny_llama, {"kv_heads": 4, "vocab": 131}, {"preset_model": "llama"}),
    "llama-tied": (models.tiny_llama, {"kv_heads": 4, "tied": True}, {}),
    "packed-3": (models.packed_transformer, {}, {"partition_config": packed_rules(3)}),
    "packed-qkv": (models.packed_transformer, {"kv_heads": 4}, {"partition_config": packed_rules([64, 32, 32])}),
}
