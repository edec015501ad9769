"""What a user turns on in a Trainer gives the numbers of the plain Trainer, or is refused with a sentence.

All features of a layout run in one job; a test of its own says what each gave.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import rank_pool
from tests.helpers.closeness import assert_close
from tests.helpers.features.averages import AVERAGES
from tests.helpers.features.frame import Outcome, alone_outcome, outcomes
from tests.helpers.features.loops import LOOPS
from tests.helpers.features.steps import STEPS

FEATURES = {**LOOPS, **STEPS, **AVERAGES}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tp2": (2, 2, {}),
    "tp4": (4, 4, {}),
    "tp2xdp2": (4, 2, {}),
    "tp2xdp2-zero3": (4, 2, {"zero_stage": 3}),
    "dp2-zero2": (2, 1, {"zero_stage": 2}),
}
REFUSED_BY_ZERO = {
    **dict.fromkeys(["averaging", "ema", "swa", "own-average", "pruning"], "zero_stage: "),
    "func-grad": "were not reduced over the data parallel ranks",
    "other-trainers": "was sharded for stage",
}
REFUSED_BY_ZERO_ALONE = {
    **REFUSED_BY_ZERO,
    "lightning-grad-norm": "With zero_stage a parameter has all its rows only while its own module runs",
    "batch-size-finder": "not supported with distributed strategies",
}
"""What is refused with ZeRO and no tensor parallelism, which has sentences of its own."""
RARELY = {
    *("lr-step", "lr-epoch", "lr-monitor", "timer", "accumulation-scheduler", "predictions", "clip-value", "averaging"),
    *("own-clipping", "clip-by-hand", "other-trainers", "functional-call", "gradient-penalty", "validate-fit-test"),
}
"""What is tried with one layout where there is time: others show as much."""

QUICK = {
    "tp2xdp2": [
        "gan",
        "unused-in-some-steps",
        "backbone-finetuning",
        "ema",
        "prediction-writer",
        "torchmetrics",
        "generate",
    ],
    "tp2": [name for name in FEATURES if name not in RARELY],
    "tp2xdp2-zero3": ["manual", "gan", "sam", "unused-in-some-steps", "generate", "func-grad", "own-average"],
}
"""What is tried always."""


def _others(layout: str) -> list[str]:
    """What is tried only where there is time."""
    return [n for n in FEATURES if n not in QUICK.get(layout, []) and (FEATURES[n].replicas or "dp" not in layout)]


def _cases() -> list[Any]:
    return [
        pytest.param(layout, name, marks=() if name in QUICK.get(layout, ()) else pytest.mark.long)
        for layout in LAYOUTS
        for name in FEATURES
        if name in {*QUICK.get(layout, ()), *_others(layout)}
    ]


def _job(names: list[str], tp_size: int, options: dict[str, Any], directory: str) -> dict[str, Outcome]:
    features = {n: replace(FEATURES[n], strategy={**FEATURES[n].strategy, **options}) for n in names}
    return outcomes(features, tp_size, Path(directory))


@functools.cache
def _sharded(layout: str, quick: bool) -> list[dict[str, Outcome]]:
    names = QUICK.get(layout, []) if quick else _others(layout)
    ranks, tp_size, options = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as directory:
        found: list[dict[str, Outcome]] = rank_pool.run_ranks(
            ranks, _job, names, tp_size, options, directory, timeout=250
        )
    return found


@functools.cache
def _plain(name: str) -> Outcome:
    with tempfile.TemporaryDirectory() as directory:
        return alone_outcome(FEATURES[name], Path(directory))


def _refused(layout: str, name: str) -> str:
    """What the error says where the feature is refused; else empty."""
    if "zero" not in layout:
        return FEATURES[name].refused or ("dp" in layout and FEATURES[name].refused_by_replicas) or ""
    if LAYOUTS[layout][1] == 1:
        return REFUSED_BY_ZERO_ALONE.get(name, "")
    return REFUSED_BY_ZERO.get(name, FEATURES[name].refused)


@pytest.mark.parametrize("layout,name", _cases())
def test_a_feature_gives_what_it_gives_in_a_plain_trainer(layout: str, name: str) -> None:
    found = [of_rank[name] for of_rank in _sharded(layout, name in QUICK.get(layout, []))]
    refused = _refused(layout, name)
    if refused:
        assert all(refused in outcome.error for outcome in found), found[0].error or "it was not refused"
        return
    want = _plain(name)
    assert not want.error, want.error
    for outcome in found:
        assert not outcome.error, outcome.error
        assert outcome.exact == want.exact
        losses = {n: t for n, t in want.tensors.items() if n == "losses" or n.startswith("metric")}
        assert_close({n: outcome.tensors[n] for n in losses}, losses, 1e-5, "loss and metrics")
        assert_close(outcome.tensors, want.tensors, 1e-4, "weights and results")
