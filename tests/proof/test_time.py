"""How long the look at a model takes, a small one by values and a large one on the meta device, and its memory."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.proof.prover import Look, Prover
from lightning_autotp.proof.step import loss_of_batch
from lightning_autotp.recipe.make_plan import make_plan
from tests.helpers.meta_models import REAL, real_model

SECONDS = {
    "llama": 0.5,
    "gpt2": 0.5,
    "mixtral": 0.5,
    "Llama-3-8B": 1.5,
    "Mixtral-8x7B": 1.5,
    "DeepSeek-V3": 4.0,
    "Llama-3.1-405B": 4.0,
}

FACTOR = 2
"""For what else the machine does, which costs this process's own time, too."""

MEBIBYTES = 1024
"""By which the look may raise the most that the process has held: what other tests have held is none of its affair."""

SWITCHES: list[dict[str, Any]] = [{}, {"sequence_parallel": True, "loss_parallel": True}]


def seconds(name: str, tp_size: int, switches: dict[str, Any]) -> float:
    """This process's time for a look at a model that is proved: copies, fewer blocks, all kinds of ranks."""
    model = real_model(name).train() if name in REAL else small_model(small_config(name)).train()
    config = TPTrainingConfig.load({"autotp_size": tp_size, **switches})
    plan = make_plan(model, config, tp_size)
    tokens = torch.arange(64).view(4, 16)
    look = Look("training", ({"input_ids": tokens, "labels": tokens},), call=loss_of_batch)
    start = time.process_time()
    prover = Prover(model, plan, config)
    prover.sharded(model)
    verdict = prover.prove(model, look).verdict
    took = time.process_time() - start
    assert verdict.kind == "proved", verdict
    return took


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("switches", SWITCHES, ids=["plain", "sequence and loss parallel"])
@pytest.mark.parametrize("tp_size", [4, 8])
@pytest.mark.parametrize("name", SECONDS)
def test_a_model_is_looked_at_in_seconds(
    name: str, tp_size: int, switches: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = seconds(name, tp_size, switches)
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with capsys.disabled():
        print(f"\n{name} TP={tp_size} {' '.join(switches)}: {took:.2f} s, {held:.0f} MiB")
    assert took < FACTOR * SECONDS[name]
    assert held < MEBIBYTES
