"""ZeRO over the data parallel ranks: every stage, with and without tensor parallelism, trains the unsharded run."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_autotp import AutoTPStrategy
from lightning_autotp.distributed.dp_shards import is_dp_sharded, local_rows
from tests.helpers import models
from tests.helpers.corners import corners_of
from tests.helpers.fit_cases import CASES
from tests.helpers.loss_runs import LossModel, checkpointed_llama
from tests.helpers.sharded_runs import RecordedModel, assert_parity, batches_for, reference_run, sharded_run

LLAMA: dict[str, Any] = {"kv_heads": 2, "tied": True, "vocab": 131}
SPEED = {"sequence_parallel": True, "loss_parallel": True, "tp_overlap_comm": True}


def check(case: str, tp_size: int, **strategy: Any) -> RecordedModel:
    factory, options, rules = CASES[case]
    batches = batches_for(options.get("vocab", 128))
    plugin = AutoTPStrategy(autotp_size=tp_size, **({} if tp_size == 1 else rules), **strategy)
    model = sharded_run(plugin, factory, batches, **options)
    assert_parity(model, partial(reference_run, factory, batches, **options))
    return model


def check_llama(tp_size: int, factory: Any = models.tiny_llama, **strategy: Any) -> RecordedModel:
    batches = batches_for(131)
    model = LossModel(batches, factory, "hf", **LLAMA)
    defaults = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "use_distributed_sampler": False}
    plugin = AutoTPStrategy(autotp_size=tp_size, **strategy)
    models.quiet_trainer(strategy=plugin, **defaults).fit(model)
    assert_parity(model, partial(reference_run, models.tiny_llama, batches, **LLAMA))
    return model


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("case", corners_of(CASES, ["llama-untied"]))
@pytest.mark.ranks(2)
def test_dp2_is_the_unsharded_run(case: str, stage: int) -> None:
    check(case, 1, zero_stage=stage)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("case", corners_of(CASES, ["hand-written-tied", "packed-qkv"]))
@pytest.mark.ranks(4)
def test_tp2_dp2_is_the_unsharded_run(case: str, stage: int) -> None:
    check(case, 2, zero_stage=stage)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.ranks(4)
def test_hybrid_shards_are_the_unsharded_run(stage: int) -> None:
    check("hand-written", 1, zero_stage=stage, zero_group_size=2)


@pytest.mark.ranks(2)
def test_gradients_that_are_accumulated_whole_are_the_unsharded_run() -> None:
    check("hand-written", 1, zero_stage=3, zero_accumulate_unsharded=True)


@pytest.mark.parametrize("factory", [pytest.param(models.tiny_llama, marks=pytest.mark.long), checkpointed_llama])
@pytest.mark.ranks(4, timeout=120)
def test_all_switches_beside_zero(factory: Any) -> None:
    check_llama(2, factory, zero_stage=3, **SPEED)


@pytest.mark.long
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.ranks(4, timeout=240)
def test_compiled_blocks_beside_zero(tp_size: int, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by_default = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: by_default(self, backend="aot_eager"))
    check_llama(tp_size, zero_stage=stage, compile=True, **(SPEED if tp_size > 1 else {}))


@pytest.mark.ranks(4, timeout=120)
def test_key_heads_that_ranks_share_in_other_rows() -> None:
    """Two replicas of two ranks each that hold the one key head: their gradients are summed of all rows."""
    options: dict[str, Any] = {"kv_heads": 1, "vocab": 131}
    batches = batches_for(131)
    model = sharded_run(AutoTPStrategy(autotp_size=2, zero_stage=3), models.tiny_llama, batches, **options)
    assert_parity(model, partial(reference_run, models.tiny_llama, batches, **options))


@pytest.mark.ranks(2)
def test_a_rank_holds_its_part_of_parameters_and_states() -> None:
    model = check("llama-untied", 1, zero_stage=2)
    optimizer = model.trainer.optimizers[0]
    full = sum(p.numel() for p in model.parameters())
    assert all(is_dp_sharded(p) for p in model.parameters())
    held = sum(local_rows(p).numel() for p in model.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert held == full / 2 + sum(local_rows(p).numel() - p.numel() / 2 for p in model.parameters())
    assert abs(held - full / 2) <= len(list(model.parameters())) * 64  # rows that do not divide
    assert sum(local_rows(t).numel() for t in states) == 2 * held


class Picks(nn.Module):
    """Experts of which the first token of some rows picks one; a third is never picked."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, picked: list[int]) -> torch.Tensor:
        parts = [self.experts[which](part) for part, which in zip(x.chunk(len(picked)), picked)]
        return x + torch.cat(parts)


class Sometimes(nn.Module):
    """A language model that uses some of its parameters, and scales by a single number.

    Args:
        parts: parts of a batch that pick experts by themselves, as those of replicas do.
    """

    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embedding = nn.Embedding(128, 16)
            self.layers = nn.ModuleList(Picks() for _ in range(2))
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.never = nn.Linear(16, 16)
            self.head = nn.Linear(16, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, [int(part[0, 0]) % 2 for part in tokens.chunk(self.parts)])
        logits: torch.Tensor = self.head(x * self.scale)
        return logits


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.ranks(2)
def test_parameters_that_some_or_no_replicas_use(stage: int) -> None:
    """What no replica uses has no gradient, and what another one uses has that one's part."""
    batches = batches_for(128)
    for at, batch in enumerate(batches):
        batch[0, 0], batch[2, 0] = at % 2, (at // 2) % 2
    model = sharded_run(AutoTPStrategy(zero_stage=stage), Sometimes, batches)
    never = {name for name, _ in model.named_parameters() if ".never." in name or ".experts.2." in name}
    assert len(never) == 6
    assert all(never.isdisjoint(gradients) for gradients in model.record.gradients)
    assert_parity(model, partial(reference_run, Sometimes, batches, parts=2))
