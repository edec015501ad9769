"""Presets on models with older names, which transformers does not have: ChatGLM's own class, Mixtral's expert lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, make_plan
from tests.helpers.corners import corners_of
from tests.helpers.older_models import VOCABULARY, chatglm, old_mixtral
from tests.helpers.sharded_runs import assert_parity, batches_for, reference_run, sharded_run

INTERLEAVED = {"layer_specs": [{"patterns": [r".*query_key_value\.weight"], "shape": [-1, -1]}]}

CASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any]]] = {
    "chatglm-equal-parts": (chatglm, {}, {}),
    "chatglm-multi-query": (chatglm, {"groups": 2, "multi_query_attention": True, "multi_query_group_num": 2}, {}),
    "chatglm-interleaved": (
        chatglm,
        {"interleaved": True, "multi_query_attention": False},
        {"preset_model": "chatglm", "partition_config": INTERLEAVED},
    ),
    "mixtral-expert-lists": (old_mixtral, {}, {}),
}


def check(case: str, tp_size: int, overlap: bool) -> None:
    factory, options, rules = CASES[case]
    batches = batches_for(VOCABULARY)
    strategy = AutoTPStrategy(autotp_size=tp_size, tp_overlap_comm=overlap, **rules)
    model = sharded_run(strategy, factory, batches, **options)
    assert strategy.plan is not None
    held = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in factory(**options).parameters())
    assert held < 0.5 + 0.5 / tp_size**2
    assert_parity(model, partial(reference_run, factory, batches, **options))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(2)
def test_older_names_are_the_unsharded_run_at_tp2(case: str) -> None:
    check(case, 2, overlap=True)


@pytest.mark.parametrize("case", corners_of(CASES, ["chatglm-multi-query", "mixtral-expert-lists"]))
@pytest.mark.ranks(4)
def test_older_names_are_the_unsharded_run_at_tp4(case: str) -> None:
    check(case, 4, overlap=False)


def test_an_interleaved_chatglm_is_refused_without_a_rule_for_it() -> None:
    model = chatglm(interleaved=True, multi_query_attention=False)
    blockers = make_plan(model, TPTrainingConfig(autotp_size=2)).blockers
    assert len(blockers) == 1 and "query_key_value" in blockers[0] and "shape: [-1, -1]" in blockers[0]
