"""Sharded against unsharded through Trainer.fit: 5 optimizer steps, accumulation 2, clipping on, on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from lightning_autotp import AutoTPStrategy
from tests.helpers.corners import corners_of
from tests.helpers.fit_cases import CASES
from tests.helpers.sharded_runs import assert_parity, batches_for, reference_run, sharded_run


def check(case: str, tp_size: int, **strategy: Any) -> None:
    factory, options, rules = CASES[case]
    batches = batches_for(options.get("vocab", 128))
    model = sharded_run(AutoTPStrategy(autotp_size=tp_size, **rules, **strategy), factory, batches, **options)
    assert_parity(model, partial(reference_run, factory, batches, **options))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(2)
def test_tp2_is_the_unsharded_run(case: str) -> None:
    check(case, 2, tp_overlap_comm=True)


@pytest.mark.parametrize("case", corners_of(CASES, ["hand-written", "llama-tied", "packed-qkv"]))
@pytest.mark.ranks(4)
def test_tp4_is_the_unsharded_run(case: str) -> None:
    check(case, 4)


@pytest.mark.parametrize("case", corners_of(CASES, ["hand-written-tied", "llama-untied"]))
@pytest.mark.ranks(4)
def test_tp2_dp2_is_the_unsharded_run(case: str) -> None:
    check(case, 2)
