"""Sharded against unsharded through Trainer.fit: 5 optimizer steps, accumulation 2, clipping on, on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from lightning_autotp import AutoTPStrategy
from tests.helpers import models
from tests.helpers.sharded_runs import assert_parity, batches_for, reference_run, sharded_run

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


def check(case: str, tp_size: int, **strategy: Any) -> None:
    factory, options, rules = CASES[case]
    batches = batches_for(options.get("vocab", 128))
    model = sharded_run(AutoTPStrategy(autotp_size=tp_size, **rules, **strategy), factory, batches, **options)
    assert_parity(model, partial(reference_run, factory, batches, **options))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(2)
def test_tp2_is_the_unsharded_run(case: str) -> None:
    check(case, 2, tp_overlap_comm=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(4)
def test_tp4_is_the_unsharded_run(case: str) -> None:
    check(case, 4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(4)
def test_tp2_dp2_is_the_unsharded_run(case: str) -> None:
    check(case, 2)
